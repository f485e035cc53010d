// These tests check the accepted and rejected requests for each resource, as documented by
// OpenAI.

package openaitest

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestServiceAccountLife(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	path := accountsPath(project)

	r := manage(t, s, "POST", path, object{"name": "vault-x", "expires_in_seconds": 3600})
	require.Equal(t, 200, r.status, r.raw)
	account, key, value := r.text(t, "id"), r.text(t, "api_key.id"), r.text(t, "api_key.value")
	require.Regexp(t, `^user-[A-Za-z0-9]{24}$`, account)
	require.Regexp(t, `^key_[A-Za-z0-9]{24}$`, key)
	require.Regexp(t, `^sk-svcacct-[A-Za-z0-9]{100,}$`, value)
	require.Equal(t, "member", r.field("role"))
	created, _ := r.field("api_key.created_at").(float64)
	require.Equal(t, created+3600, r.field("api_key.expires_at"))
	require.Regexp(t, `^req_[0-9a-f]{32}$`, r.header.Get("x-request-id"))
	require.Equal(t, s.OrganizationID(), r.header.Get("openai-organization"))
	require.NotEmpty(t, r.header.Get("openai-processing-ms"))
	require.Len(t, s.Leaks(), 1, "created over HTTP and not kept")
	require.Contains(t, s.Leaks()[0], account)
	require.Contains(t, s.Leaks()[0], key)

	require.Equal(t, "vault-x", manage(t, s, "GET", path+"/"+account, nil).field("name"))
	r = manage(t, s, "POST", path+"/"+account, object{"name": "renamed", "role": "owner"})
	require.Equal(t, "renamed", r.field("name"))
	require.Equal(t, "owner", r.field("role"))
	requireError(t, manage(t, s, "POST", path+"/"+account, object{"role": "none"}), 400, "invalid_value", "role")

	require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status)
	require.Equal(t, []string{account}, manage(t, s, "GET", path, nil).ids(t))
	r = manage(t, s, "DELETE", path+"/"+account, nil)
	require.Equal(t, true, r.field("deleted"), r.raw)
	requireError(t, send(t, s, value, "GET", "/models", nil), 401, "invalid_api_key", "")
	requireError(t, manage(t, s, "DELETE", path+"/"+account, nil), 404, "service_account_not_found", "")
	requireError(t, manage(t, s, "GET", path+"/"+account, nil), 404, "service_account_not_found", "")
	requireError(t, manage(t, s, "POST", path+"/"+account+"/api_keys", object{}), 404, "service_account_not_found", "")
	requireError(t, manage(t, s, "GET", accountsPath("proj_none"), nil), 404, "project_not_found", "")
	require.Empty(t, s.Accounts())

	// Duplicate names are accepted: OpenAI does not document that names are unique.
	newAccount(t, s, project, object{"name": "same"})
	newAccount(t, s, project, object{"name": "same"})
}

func TestAccountWithoutKey(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	r := manage(t, s, "POST", accountsPath(project), object{"name": "bare", "create_service_account_only": true, "expires_in_seconds": nil})
	require.Equal(t, 200, r.status, r.raw)
	account := r.text(t, "id")
	s.Keep(account)
	require.Equal(t, "none", r.field("role"))
	require.Nil(t, r.field("api_key"))
	require.Contains(t, r.raw, `"api_key": null`)
	requireError(t, manage(t, s, "POST", accountsPath(project), object{"name": "x", "create_service_account_only": true, "expires_in_seconds": 60}),
		400, "invalid_value", "expires_in_seconds")

	// If the account has no role, its key has no access and an unfiltered list omits it.
	r = manage(t, s, "POST", accountsPath(project)+"/"+account+"/api_keys", nil)
	require.Equal(t, 200, r.status, r.raw)
	key, value := r.text(t, "id"), r.text(t, "value")
	s.Keep(key)
	requireError(t, send(t, s, value, "GET", "/models", nil), 403, "missing_scope", "")
	require.Empty(t, manage(t, s, "GET", keysPath(project), nil).ids(t))
	require.Empty(t, manage(t, s, "GET", keysPath(project)+"?owner_project_access=active", nil).ids(t))
	require.Equal(t, []string{key}, manage(t, s, "GET", keysPath(project)+"?owner_project_access=inactive", nil).ids(t))
	require.Equal(t, []string{key}, manage(t, s, "GET", keysPath(project)+"?owner_project_access=any", nil).ids(t))
	require.Equal(t, 200, manage(t, s, "POST", accountsPath(project)+"/"+account, object{"role": "member"}).status)
	require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status)
	require.Equal(t, []string{key}, manage(t, s, "GET", keysPath(project), nil).ids(t))
}

func TestProjectKeyLife(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	account := s.AddServiceAccount(project, "app")
	r := manage(t, s, "POST", accountsPath(project)+"/"+account+"/api_keys",
		object{"name": "lease", "scopes": []string{"api.model.request"}, "expires_in_seconds": 60})
	require.Equal(t, 200, r.status, r.raw)
	require.NotContains(t, r.raw, "scopes", "the API never returns a key's scopes")
	key, value := r.text(t, "id"), r.text(t, "value")
	require.Len(t, s.Leaks(), 1, "only the key was created over HTTP")
	require.Equal(t, []string{"api.model.request"}, s.Keys()[0].Scopes)
	require.Equal(t, account, s.Keys()[0].AccountID)

	r = manage(t, s, "GET", keysPath(project)+"/"+key, nil)
	require.Equal(t, account, r.field("owner.service_account.id"))
	require.Equal(t, value[:8]+"..."+value[len(value)-4:], r.field("redacted_value"))
	require.Nil(t, r.field("last_used_at"))

	require.Equal(t, 200, send(t, s, value, "POST", "/chat/completions", object{"model": "m"}).status)
	require.Equal(t, 200, send(t, s, value, "POST", "/embeddings", object{"model": "m"}).status)
	r = send(t, s, value, "GET", "/models", nil)
	requireError(t, r, 403, "missing_scope", "")
	require.Contains(t, r.raw, "Missing scopes: api.model.read")
	requireError(t, send(t, s, value, "POST", "/responses", object{}), 403, "missing_scope", "")
	require.NotNil(t, manage(t, s, "GET", keysPath(project)+"/"+key, nil).field("last_used_at"))

	update := func(body any) reply { return manage(t, s, "POST", keysPath(project)+"/"+key, body) }
	require.Equal(t, 200, update(object{"scopes": []string{"api.responses.write"}}).status)
	require.Equal(t, 200, send(t, s, value, "POST", "/responses", object{"model": "m"}).status)
	require.Equal(t, 200, update(object{"scopes": []string{"api.all.read"}}).status)
	require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status)
	require.Equal(t, 200, update(object{"scopes": []string{}, "expires_in_seconds": 120}).status)
	require.Equal(t, 200, send(t, s, value, "POST", "/responses", nil).status, "an empty list grants all scopes")
	requireError(t, update(object{}), 400, "missing_required_parameter", "")
	requireError(t, update(object{"scopes": nil}), 400, "invalid_type", "scopes")
	requireError(t, update(object{"expires_in_seconds": nil}), 400, "invalid_type", "expires_in_seconds")
	requireError(t, update(object{"scopes": []string{"Nonsense!"}}), 400, "invalid_scope", "scopes")
	requireError(t, update(object{"name": "x"}), 400, "unknown_parameter", "name")

	s.Advance(121 * time.Second)
	requireError(t, send(t, s, value, "GET", "/models", nil), 401, "invalid_api_key", "")
	require.Empty(t, s.Keys())
	require.Empty(t, s.Leaks(), "an expired key is not a leak")
	require.Equal(t, []string{key}, manage(t, s, "GET", keysPath(project), nil).ids(t), "expired keys are still listed")
	requireError(t, update(object{"expires_in_seconds": 60}), 400, "api_key_expired", "")
	require.Equal(t, true, manage(t, s, "DELETE", keysPath(project)+"/"+key, nil).field("deleted"))
	requireError(t, manage(t, s, "DELETE", keysPath(project)+"/"+key, nil), 404, "api_key_not_found", "")
	requireError(t, manage(t, s, "GET", keysPath(project)+"/"+key, nil), 404, "api_key_not_found", "")

	var events []string
	for _, e := range s.Ledger() {
		if e.ID == key {
			events = append(events, e.Event)
		}
	}
	require.Equal(t, []string{"created", "updated", "updated", "updated", "expired", "deleted"}, events)
}

func TestDeletingAServiceAccountKeyRefused(t *testing.T) {
	s := start(t, Options{DeleteServiceAccountKeyRefused: true})
	project := s.AddProject("p")
	_, key, value := newAccount(t, s, project, object{"name": "a"})
	requireError(t, manage(t, s, "DELETE", keysPath(project)+"/"+key, nil), 400, "service_account_key", "")
	require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status)
	require.Equal(t, 200, manage(t, s, "POST", keysPath(project)+"/"+key, object{"expires_in_seconds": 1}).status)
	s.Advance(time.Second)
	require.Equal(t, 401, send(t, s, value, "GET", "/models", nil).status)
}

func TestAdminKeyLife(t *testing.T) {
	s := start(t, Options{AdminActivationDelay: time.Minute})
	rootID, root := s.AdminKey()
	require.Regexp(t, `^sk-admin-`, root)
	r := manage(t, s, "POST", "/organization/admin_api_keys", object{"name": "next", "expires_in_seconds": 3600})
	require.Equal(t, 200, r.status, r.raw)
	id, value := r.text(t, "id"), r.text(t, "value")
	require.Regexp(t, `^sk-admin\.\.\.[A-Za-z0-9]{4}$`, r.text(t, "redacted_value"))
	require.Len(t, s.Leaks(), 1)
	require.Contains(t, s.Leaks()[0], "admin key "+id)

	list := "/organization/admin_api_keys"
	requireError(t, send(t, s, value, "GET", list, nil), 401, "invalid_api_key", "")
	s.Advance(time.Minute)
	require.Equal(t, []string{rootID, id}, send(t, s, value, "GET", list, nil).ids(t))
	require.Equal(t, []string{id, rootID}, send(t, s, value, "GET", list+"?order=desc", nil).ids(t))
	require.Equal(t, []string{rootID}, send(t, s, value, "GET", list+"?order=desc&after="+id, nil).ids(t))
	r = send(t, s, value, "GET", list+"/"+id, nil)
	require.NotContains(t, r.raw, value)
	require.Equal(t, "next", r.field("name"))

	require.Equal(t, 200, send(t, s, value, "DELETE", list+"/"+rootID, nil).status)
	require.Equal(t, 401, send(t, s, root, "GET", list, nil).status)
	s.Advance(time.Hour)
	require.Equal(t, 401, send(t, s, value, "GET", list, nil).status, "the key expired")
	require.Empty(t, s.AdminKeys())
	require.Empty(t, s.Leaks())

	_, other := s.AddAdminKey("by hand")
	require.Equal(t, 200, send(t, s, other, "DELETE", list+"/"+id, nil).status, "an expired key can be deleted")
	requireError(t, send(t, s, other, "DELETE", list+"/"+id, nil), 404, "admin_api_key_not_found", "")
	requireError(t, send(t, s, other, "GET", list+"/"+id, nil), 404, "admin_api_key_not_found", "")
	otherID := s.AdminKeys()[0].ID
	require.Equal(t, 200, send(t, s, other, "DELETE", list+"/"+otherID, nil).status, "an admin key can delete itself")
	require.Equal(t, 401, send(t, s, other, "GET", list, nil).status)
}

func TestProjectLife(t *testing.T) {
	s := start(t, Options{})
	r := manage(t, s, "POST", "/organization/projects", object{"name": "made", "residency": "GLOBAL", "external_key_id": nil})
	require.Equal(t, 200, r.status, r.raw)
	project := r.text(t, "id")
	require.Regexp(t, `^proj_[A-Za-z0-9]{24}$`, project)
	path := "/organization/projects/" + project
	require.Equal(t, "active", manage(t, s, "GET", path, nil).field("status"))
	require.Equal(t, "renamed", manage(t, s, "POST", path, object{"name": "renamed"}).field("name"))
	requireError(t, manage(t, s, "GET", "/organization/projects/proj_none", nil), 404, "project_not_found", "")
	_, key, value := newAccount(t, s, project, object{"name": "a"})
	account := s.Accounts()[0].ID

	require.Equal(t, "archived", manage(t, s, "POST", path+"/archive", nil).field("status"))
	r = manage(t, s, "GET", path, nil)
	require.Equal(t, "archived", r.field("status"))
	require.NotNil(t, r.field("archived_at"))
	require.Empty(t, manage(t, s, "GET", "/organization/projects", nil).ids(t))
	require.Equal(t, []string{project}, manage(t, s, "GET", "/organization/projects?include_archived=true", nil).ids(t))
	require.Equal(t, 401, send(t, s, value, "GET", "/models", nil).status)
	require.Empty(t, s.Accounts())
	for _, call := range []struct {
		method, path string
		body         any
	}{
		{"GET", accountsPath(project), nil},
		{"POST", accountsPath(project), object{"name": "x"}},
		{"GET", accountsPath(project) + "/" + account, nil},
		{"DELETE", accountsPath(project) + "/" + account, nil},
		{"POST", accountsPath(project) + "/" + account + "/api_keys", object{}},
		{"GET", keysPath(project), nil},
		{"DELETE", keysPath(project) + "/" + key, nil},
		{"POST", path, object{"name": "x"}},
		{"POST", path + "/archive", nil},
	} {
		requireError(t, manage(t, s, call.method, call.path, call.body), 400, "project_archived", "")
	}
}

func TestPagination(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	other := s.AddProject("other")
	foreign := s.AddServiceAccount(other, "foreign")
	var want []string
	for i := range 45 {
		want = append(want, s.AddServiceAccount(project, fmt.Sprint(i)))
	}
	path := accountsPath(project)
	var got []string
	after := ""
	for range 10 {
		r := manage(t, s, "GET", path+"?after="+after, nil)
		ids := r.ids(t)
		require.Equal(t, ids[0], r.field("first_id"))
		require.Equal(t, ids[len(ids)-1], r.field("last_id"))
		got = append(got, ids...)
		if after = r.text(t, "last_id"); r.field("has_more") == false {
			break
		}
		require.Len(t, ids, 20)
	}
	require.Equal(t, want, got)
	require.Equal(t, want, manage(t, s, "GET", path+"?limit=100", nil).ids(t))
	r := manage(t, s, "GET", path+"?limit=45", nil)
	require.Equal(t, false, r.field("has_more"))

	s.DeleteServiceAccount(project, want[19])
	require.Equal(t, want[20:40], manage(t, s, "GET", path+"?after="+want[19], nil).ids(t), "the cursor remains valid after its account was deleted")
	r = manage(t, s, "GET", path+"?after="+want[44], nil)
	require.Empty(t, r.ids(t))
	require.Nil(t, r.field("last_id"))

	requireError(t, manage(t, s, "GET", path+"?after=nobody", nil), 400, "invalid_value", "after")
	requireError(t, manage(t, s, "GET", path+"?after="+foreign, nil), 400, "invalid_value", "after")
	for _, limit := range []string{"0", "101", "-1", "x", ""} {
		requireError(t, manage(t, s, "GET", path+"?limit="+limit, nil), 400, "integer_out_of_range", "limit")
	}
	requireError(t, manage(t, s, "GET", path+"?page=2", nil), 400, "unknown_parameter", "page")
	requireError(t, manage(t, s, "GET", keysPath(project)+"?owner_project_access=all", nil), 400, "invalid_value", "owner_project_access")
	requireError(t, manage(t, s, "GET", "/organization/projects?include_archived=1", nil), 400, "invalid_value", "include_archived")
	requireError(t, manage(t, s, "GET", "/organization/admin_api_keys?order=up", nil), 400, "invalid_value", "order")
}

func TestStrictBodies(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	account := s.AddServiceAccount(project, "a")
	path := accountsPath(project)
	for body, want := range map[string][2]string{
		``:                                     {"missing_required_parameter", "name"},
		`{}`:                                   {"missing_required_parameter", "name"},
		`{"name":""}`:                          {"empty_string", "name"},
		`{"name":null}`:                        {"invalid_type", "name"},
		`{"name":7}`:                           {"invalid_type", "name"},
		`{"name":"a","x":1}`:                   {"unknown_parameter", "x"},
		`{"name":"a"`:                          {"invalid_json", ""},
		`{"name":"a"} {}`:                      {"invalid_json", ""},
		`["name"]`:                             {"invalid_json", ""},
		`null`:                                 {"invalid_json", ""},
		"{\"name\":\"a\xff\"}":                 {"invalid_json", ""},
		`{"name":"a","expires_in_seconds":0}`:  {"integer_out_of_range", "expires_in_seconds"},
		`{"name":"a","expires_in_seconds":-5}`: {"integer_out_of_range", "expires_in_seconds"},
		`{"name":"a","expires_in_seconds":31536001}`:       {"integer_out_of_range", "expires_in_seconds"},
		`{"name":"a","expires_in_seconds":1.5}`:            {"invalid_type", "expires_in_seconds"},
		`{"name":"a","expires_in_seconds":"60"}`:           {"invalid_type", "expires_in_seconds"},
		`{"name":"a","create_service_account_only":"yes"}`: {"invalid_type", "create_service_account_only"},
	} {
		requireError(t, manage(t, s, "POST", path, body), 400, want[0], want[1])
	}
	requireError(t, manage(t, s, "POST", path+"/"+account+"/api_keys", object{"scopes": "api.model.read"}), 400, "invalid_type", "scopes")
	requireError(t, manage(t, s, "POST", path+"/"+account+"/api_keys", object{"scopes": []string{""}}), 400, "invalid_scope", "scopes")
	requireError(t, manage(t, s, "POST", "/organization/admin_api_keys", object{"name": "a", "scopes": []string{}}), 400, "unknown_parameter", "scopes")
	requireError(t, manage(t, s, "POST", "/organization/admin_api_keys", object{"name": "a", "expires_in_seconds": nil}), 400, "invalid_type", "expires_in_seconds")
	requireError(t, manage(t, s, "POST", "/organization/projects", object{"name": "a", "status": "x"}), 400, "unknown_parameter", "status")
	requireError(t, manage(t, s, "POST", path, object{"name": strings.Repeat("a", maxBody)}), 413, "request_too_large", "")

	req, err := http.NewRequest("POST", s.URL()+path, strings.NewReader(`{"name":"a"}`))
	require.NoError(t, err)
	_, key := s.AdminKey()
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "text/plain")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 400, resp.StatusCode)
	require.Len(t, s.Accounts(), 1, "a rejected request has no effect")
}

func TestUnknownRoutesAndMethods(t *testing.T) {
	s := start(t, Options{})
	requireError(t, manage(t, s, "GET", "/organization/users", nil), 404, "unknown_url", "")
	requireError(t, manage(t, s, "GET", "/organization/projects/", nil), 404, "unknown_url", "")
	requireError(t, manage(t, s, "GET", "/organization/projects//archive", nil), 404, "unknown_url", "")
	r := manage(t, s, "PUT", "/organization/projects", object{})
	requireError(t, r, 405, "method_not_allowed", "")
	require.Equal(t, "GET, POST", r.header.Get("Allow"))
	requireError(t, manage(t, s, "GET", "/organization/projects/a%2Fb", nil), 404, "project_not_found", "")
}

func TestKeyPolicies(t *testing.T) {
	s := start(t, Options{MaxKeyLifetime: time.Hour})
	project := s.AddProject("p")
	requireError(t, manage(t, s, "POST", accountsPath(project), object{"name": "a"}), 400, "key_expiration_required", "expires_in_seconds")
	requireError(t, manage(t, s, "POST", accountsPath(project), object{"name": "a", "expires_in_seconds": 3601}), 400, "key_expiration_too_long", "expires_in_seconds")
	require.Empty(t, s.Accounts())
	account, key, _ := newAccount(t, s, project, object{"name": "a", "expires_in_seconds": 3600})
	requireError(t, manage(t, s, "POST", keysPath(project)+"/"+key, object{"expires_in_seconds": 3601}), 400, "key_expiration_too_long", "expires_in_seconds")
	requireError(t, manage(t, s, "POST", accountsPath(project)+"/"+account+"/api_keys", object{}), 400, "key_expiration_required", "expires_in_seconds")
	s.Advance(30 * time.Minute)
	require.Equal(t, 200, manage(t, s, "POST", keysPath(project)+"/"+key, object{"expires_in_seconds": 3600}).status, "the lifetime is counted from the update")
	require.Equal(t, 200, manage(t, s, "POST", keysPath(project)+"/"+key, object{"scopes": []string{"api.model.read"}}).status)

	s.Configure(func(o *Options) { o.MaxKeyLifetime = 0 })
	s.SetKeyCreationDisabled(true)
	requireError(t, manage(t, s, "POST", accountsPath(project), object{"name": "b"}), 403, "key_creation_disabled", "")
	bare := manage(t, s, "POST", accountsPath(project), object{"name": "b", "create_service_account_only": true})
	require.Equal(t, 200, bare.status, "an account without a key is allowed")
	s.Keep(bare.text(t, "id"))
}

func TestAuthorization(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	list := "/organization/projects"
	r := send(t, s, "", "GET", list, nil)
	requireError(t, r, 401, "", "")
	r = send(t, s, "sk-admin-nobodyknowsthis1234", "GET", list, nil)
	requireError(t, r, 401, "invalid_api_key", "")
	require.Contains(t, r.raw, "sk-admin****")
	require.Contains(t, r.raw, "**1234")
	require.NotContains(t, r.raw, "nobodyknowsthis")
	require.NotContains(t, send(t, s, "sk-short", "GET", list, nil).raw, "short")

	bareString := func(r reply, scope string) {
		t.Helper()
		require.Equal(t, 403, r.status, r.raw)
		require.True(t, strings.HasPrefix(r.text(t, "error"), "You have insufficient permissions for this operation. Missing scopes: "+scope+". "), r.raw)
	}
	_, reader := s.AddAdminKey("reader", ReadOnly())
	require.Equal(t, 200, send(t, s, reader, "GET", list, nil).status)
	bareString(send(t, s, reader, "POST", list, object{"name": "x"}), scopeWrite)
	bareString(send(t, s, reader, "DELETE", accountsPath(project)+"/nobody", nil), scopeWrite)
	bareString(send(t, s, reader, "POST", list, "not json"), scopeWrite)
	requireError(t, manage(t, s, "DELETE", accountsPath(project)+"/nobody", nil), 404, "service_account_not_found", "")
	requireError(t, manage(t, s, "DELETE", "/organization/admin_api_keys/nobody", nil), 404, "admin_api_key_not_found", "")
	_, nothing := s.AddAdminKey("nothing", NoAccess())
	bareString(send(t, s, nothing, "GET", list, nil), scopeRead)

	_, _, value := newAccount(t, s, project, object{"name": "a"})
	bareString(send(t, s, value, "GET", list, nil), scopeRead)
	bareString(send(t, s, value, "POST", list, object{"name": "x"}), scopeWrite)
	_, root := s.AdminKey()
	requireError(t, send(t, s, root, "GET", "/models", nil), 403, "missing_scope", "")

	_, brief := s.AddAdminKey("brief", ExpiresIn(time.Hour))
	require.Equal(t, 200, send(t, s, brief, "GET", list, nil).status)
	s.Advance(time.Hour)
	requireError(t, send(t, s, brief, "GET", list, nil), 401, "invalid_api_key", "")

	// It is unknown whether OpenAI gives a new key its creator's restrictions; this is the
	// worse case.
	s.SetNewAdminKeys(ReadOnly())
	r = manage(t, s, "POST", "/organization/admin_api_keys", object{"name": "weak"})
	s.Keep(r.text(t, "id"))
	bareString(send(t, s, r.text(t, "value"), "POST", list, object{"name": "x"}), scopeWrite)

	req, err := http.NewRequest("GET", s.URL()+list, nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "bearer "+root)
	req.Header.Set("OpenAI-Organization", "org-other")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 401, resp.StatusCode)
}

func TestActivationDelay(t *testing.T) {
	s := start(t, Options{ActivationDelay: 2 * time.Second})
	_, _, value := newAccount(t, s, s.AddProject("p"), object{"name": "a"})
	requireError(t, send(t, s, value, "GET", "/models", nil), 401, "invalid_api_key", "")
	s.Advance(2 * time.Second)
	require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status)
}

func TestClock(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 900_000_000, time.UTC)
	s := start(t, Options{Clock: func() time.Time { return at }})
	_, key, value := newAccount(t, s, s.AddProject("p"), object{"name": "a", "expires_in_seconds": 60})
	require.Equal(t, at.Truncate(time.Second).Add(time.Minute), s.Keys()[0].ExpiresAt, "the expiry is counted from the full second of the creation")
	s.Advance(59 * time.Second)
	require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status)
	s.Advance(time.Second)
	require.Equal(t, 401, send(t, s, value, "GET", "/models", nil).status)
	last := s.Ledger()[len(s.Ledger())-1]
	require.Equal(t, EventExpired, last.Event)
	require.Equal(t, key, last.ID)
	require.Equal(t, at.Truncate(time.Second).Add(time.Minute), last.At)
}

func TestSecrets(t *testing.T) {
	s := start(t, Options{AdminKey: "sk-admin-given"})
	project := s.AddProject("p")
	s.Fail(Fault{Method: "POST", Route: accountsRoute, Kind: FaultLost})
	_, err := try(s, "sk-admin-given", "POST", accountsPath(project), object{"name": "lost"})
	require.Error(t, err)
	require.Len(t, s.Secrets(), 2)
	require.Contains(t, s.Secrets(), "sk-admin-given")
	require.Contains(t, s.Secrets(), s.Keys()[0].Value)
	value := s.Keys()[0].Value
	s.DeleteServiceAccount(project, s.Accounts()[0].ID)
	require.Contains(t, s.Secrets(), value, "values of deleted keys are included")
	require.True(t, slices.ContainsFunc(s.Ledger(), func(e Entry) bool {
		return e.Kind == KindKey && e.Event == EventCreated && regexp.MustCompile(`^req_`).MatchString(e.RequestID)
	}))
}
