//go:build integration

package integration

// What the example policies allow and deny on a real Vault, through its CLI where
// a command and the API use different paths.

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"
)

// policyCases are requests to the engine and to Vault, with the policies that allow them:
// o operator, a application, c CI job, d its dispatcher (another test covers its
// wrapped reads), t team (another test covers its writes), f finance.
var policyCases = []struct{ method, path, allowedFor string }{
	{"GET", "config", "o"},
	{"PUT", "config", "o"},
	{"DELETE", "config", "o"},
	{"PUT", "config/rotate", "o"},
	{"PUT", "rotate-root", "o"},
	{"LIST", "roles", "o"},
	{"GET", "roles/my-app", "o"},
	{"PUT", "roles/my-app", "o"},
	{"PUT", "roles/new", "o"},
	{"DELETE", "roles/new", "o"},
	{"DELETE", "roles/team-a-new", "ot"},
	{"DELETE", "roles/team-b-new", "o"},
	{"LIST", "static-roles", "o"},
	{"GET", "static-roles/my-app", "o"},
	{"PUT", "static-roles/my-app", "o"},
	{"DELETE", "static-roles/my-app", "o"},
	{"PUT", "rotate-role/my-app", "o"},
	{"LIST", "projects", "o"},
	{"GET", "projects/proj_abc", "o"},
	{"PUT", "tidy", "o"},
	{"GET", "tidy-status", "o"},
	{"PUT", "tidy-cancel", "o"},
	{"GET", "metrics", "o"},
	{"GET", "usage", "f"},

	{"GET", "creds/my-app", "a"},
	{"PUT", "creds/my-app", ""},
	{"GET", "creds/ci", "c"},
	{"GET", "creds/another", ""},
	{"GET", "static-creds/my-app", "a"},
	{"GET", "static-creds/another", ""},

	{"LIST", "/sys/leases/lookup/%s/creds/my-app", "o"},
	{"PUT", "/sys/leases/lookup", "oacdtf"}, // by the lease's ID, in Vault's default policy
	{"PUT", "/sys/leases/renew", "oacdtf"},  // also by the ID
	{"PUT", "/sys/leases/revoke", ""},       // for any mount
	{"PUT", "/sys/leases/revoke/%s/creds/my-app/id", "o"},
	{"PUT", "/sys/leases/revoke/another/creds/my-app/id", ""},
	{"PUT", "/sys/leases/revoke-prefix/%s/creds/my-app", "o"},
	{"PUT", "/sys/leases/revoke-force/%s/creds/my-app", ""},
	{"PUT", "/sys/leases/revoke-prefix/another/creds/my-app", ""},
	{"GET", "/sys/mounts/%s/tune", ""},
	{"PUT", "/sys/mounts/%s/tune", ""},
	{"DELETE", "/sys/mounts/%s", ""},
	{"PUT", "/auth/token/revoke-self", "oacdtf"},
}

func TestTheExamplePoliciesAllowWhatTheySayAndNoMore(t *testing.T) {
	m := newMount(t)
	clients := map[string]func() *api.Client{}
	for who, policy := range map[string]string{"o": "operator", "a": "application", "c": "ci", "d": "ci-dispatcher", "t": "team", "f": "finance"} {
		name := m.policy(policy)
		// A token for each request, since one of them revokes it. No request
		// can create a key, since there is no role.
		clients[who] = func() *api.Client {
			secret, err := m.client.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{name}, TTL: "5m"})
			require.NoError(t, err)
			return m.vault.ClientFor(secret.Auth.ClientToken)
		}
	}
	for _, c := range policyCases {
		path := m.path + "/" + c.path
		if c.path[0] == '/' {
			path = strings.ReplaceAll(c.path[1:], "%s", m.path)
		}
		for who, client := range clients {
			err := try(client(), c.method, path)
			var answer *api.ResponseError
			denied := errors.As(err, &answer) && answer.StatusCode == http.StatusForbidden
			require.Equal(t, strings.Contains(c.allowedFor, who), !denied, "%s %s by %s: %v", c.method, path, who, err)
		}
	}
}

// try sends a request without data: if it is allowed, it fails for another reason
// or does nothing.
func try(client *api.Client, method, path string) error {
	var err error
	switch method {
	case "GET":
		_, err = client.Logical().Read(path)
	case "LIST":
		_, err = client.Logical().List(path)
	case "PUT":
		_, err = client.Logical().Write(path, map[string]any{})
	case "DELETE":
		_, err = client.Logical().Delete(path)
	default:
		panic("no such method: " + method)
	}
	return err
}

// A read can request a shorter lease without more permissions.
func TestAReaderMayAskForAShorterLease(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "2h")
	client := m.vault.ClientFor(m.tokenOf("application"))
	secret, err := client.Logical().ReadWithData(m.path+"/creds/my-app", map[string][]string{"ttl": {"10m"}})
	newLease(t, secret, err).requireSeconds(t, 600)
	_, err = client.Logical().Write(m.path+"/creds/my-app", map[string]any{"ttl": "10m"})
	requireStatus(t, http.StatusForbidden, err)
}

// forbidden reports whether Vault's policies denied a request.
func forbidden(err error) bool {
	var answer *api.ResponseError
	if errors.As(err, &answer) {
		return answer.StatusCode == http.StatusForbidden
	}
	return err != nil && strings.Contains(err.Error(), "Code: 403")
}

// The forms of `vault lease revoke` use four different paths.
func TestAnOperatorEndsTheLeasesOfThisEngineOnly(t *testing.T) {
	m, another := newMountPair(t)
	operator := m.tokenOf("operator")
	m.role("my-app", "1h", "2h")
	another.role("my-app", "1h", "2h")
	theirs := another.creds("my-app")
	vault := func(args ...string) error { return m.command(operator, "", args...) }
	one, two, kept := m.creds("my-app"), m.creds("my-app"), m.creds("my-app")

	// A lease ID may be in the path, not in the body, which Vault prefers.
	id := "lease_id=" + theirs.id
	for _, args := range [][]string{
		{"lease", "revoke", theirs.id},
		{"lease", "revoke", "-sync", theirs.id},
		{"lease", "revoke", "-prefix", another.path + "/creds/my-app"},
		{"lease", "revoke", "-prefix", m.path},
		{"lease", "revoke", "-force", "-prefix", m.path + "/creds/my-app"},
		{"write", "sys/leases/revoke", id},
		{"write", "sys/leases/revoke", "lease_id=" + kept.id},
		{"write", "sys/leases/revoke/" + kept.id, id},
		{"write", "sys/leases/revoke/" + kept.id, "sync=true", id},
		{"write", "sys/leases/revoke/" + kept.id, "url_lease_id=" + theirs.id},
		{"write", "sys/revoke", id},
		{"write", "sys/revoke/" + theirs.id, "sync=true"},
		{"read", m.path + "/creds/my-app"},
		{"secrets", "tune", "-audit-non-hmac-response-keys=api_key", m.path},
		{"secrets", "disable", m.path},
	} {
		err := vault(args...)
		require.True(t, forbidden(err), "%v: %v", args, err)
	}
	require.True(t, forbidden(m.vault.ClientFor(operator).Sys().Revoke(kept.id)), "Go's Revoke sends the ID in the body")
	require.Contains(t, another.alive(), theirs.account)
	require.Len(t, m.alive(), 3)

	require.NoError(t, vault("lease", "lookup", one.id))
	require.NoError(t, vault("list", "sys/leases/lookup/"+m.path+"/creds/my-app"))
	require.NoError(t, vault("lease", "revoke", one.id))
	require.NoError(t, vault("lease", "revoke", "-sync", two.id))
	require.NoError(t, vault("lease", "revoke", "-prefix", "-sync", m.path+"/creds/my-app"))
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, 30*time.Second, 50*time.Millisecond, "the first lease's account remains")
	require.NoError(t, vault("lease", "revoke", "-prefix", m.path+"/creds/my-app"))
	require.NoError(t, another.revoke(theirs))
}

// newMountPair returns two mounts of a server.
func newMountPair(t *testing.T) (m, another *mount) {
	m = newMount(t)
	return m, newMountOn(t, m.vault)
}

// absent is a field that a write omits.
type absent struct{}

func TestATeamWritesRolesWithinItsLimitsOnly(t *testing.T) {
	m := newMount(t)
	token := m.tokenOf("team", "proj_abc", m.project)
	elsewhere := m.sim.AddProject("another")
	m.role("team-b-app", "1h", "2h")

	limits := map[string]any{"project_id": m.project, "ttl": "30m", "max_ttl": "4h", "scopes": "api.model.request"}
	body := func(change map[string]any) string {
		fields := maps.Clone(limits)
		maps.Copy(fields, change)
		maps.DeleteFunc(fields, func(_ string, value any) bool { return value == absent{} })
		text, err := json.Marshal(fields)
		require.NoError(t, err)
		return string(text)
	}
	write := func(role, body string) error {
		return m.command(token, body, "write", m.path+"/roles/"+role, "-")
	}
	// A value of another type may fail before the policy check.
	refused := func(err error) bool {
		return forbidden(err) || err != nil && strings.Contains(err.Error(), "error converting input for field")
	}
	require.NoError(t, write("team-a-app", body(nil)))
	before := m.read("roles/team-a-app").Data

	type change = map[string]any
	list := func(of ...any) []any { return append([]any{}, of...) }
	for _, c := range []change{
		{"project_id": elsewhere}, {"project_id": m.project + "," + elsewhere}, {"project_id": list(elsewhere)},
		{"ttl": "60m"}, {"ttl": "1000h"}, {"ttl": 1800}, {"ttl": 1.5}, {"ttl": -1}, {"ttl": "0"}, {"ttl": list("1000h")},
		{"max_ttl": "480m"}, {"max_ttl": "9h"}, {"max_ttl": "0"}, {"max_ttl": 0}, {"max_ttl": 28800}, {"max_ttl": "8h,9h"},
		{"scopes": "api.all"}, {"scopes": "api.model.request,api.all"}, {"scopes": list("api.model.request", "api.all")},
		{"scopes": list(list())}, {"scopes": list(nil)}, {"scopes": list("")}, {"scopes": " "}, {"scopes": ","},
		{"scopes": "[]"}, {"scopes": "*"}, {"scopes": "api.model.*"}, {"scopes": 1}, {"scopes": true},
		{"scopes": "api.model.request,"}, {"scopes": list("api.model.request,api.all")},
		{"Project_ID": elsewhere}, {"TTL": "1000h"}, {"SCOPES": list()}, {"Scopes": "api.all"},
		{"key_expiry": "none"}, {"credential_type": "api_key", "service_account_id": "user-1"}, {"service_account_id": "user-1"},
		{"service_account_name_template": "{{.RandomSuffix}}"}, {"service_account_description": "ours"},
		{"activation_timeout": 0}, {"name": "another"}, {"unknown": "x"},
	} {
		err := write("team-a-app", body(c))
		require.True(t, refused(err), "%v: %v", c, err)
	}
	for field := range limits {
		for _, value := range []any{absent{}, nil, "", list(), change{}, false} {
			for _, role := range []string{"team-a-app", "team-a-new"} {
				err := write(role, body(change{field: value}))
				require.True(t, refused(err), "%s=%#v: %v", field, value, err)
			}
		}
	}
	for _, role := range []string{"team-b-app", "team-a", "team-ab", "Team-a-app", "another", "xteam-a-app"} {
		require.True(t, forbidden(write(role, body(nil))), role)
	}
	// Values that the policy treats as a list and the engine rejects.
	for _, c := range []change{{"project_id": list(m.project)}, {"ttl": "15m,1h"}, {"ttl": list("1h")}, {"max_ttl": list("1h", "8h")}, {"ttl": "1h", "max_ttl": "1h,8h"}} {
		require.Error(t, write("team-a-app", body(c)), "%v", c)
	}
	require.Error(t, write("team-a-x/../another", body(nil)))
	require.Error(t, write("team-a-x/another", body(nil)))

	// Methods and encodings that the CLI does not use.
	send := func(method, kind, body string) int {
		req, err := http.NewRequestWithContext(t.Context(), method, m.vault.Addr+"/v1/"+m.path+"/roles/team-a-app?project_id="+elsewhere, strings.NewReader(body))
		require.NoError(t, err)
		req.Header.Set("X-Vault-Token", token)
		req.Header.Set("Content-Type", kind)
		answer, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer answer.Body.Close()
		_, err = io.Copy(io.Discard, answer.Body)
		require.NoError(t, err)
		return answer.StatusCode
	}
	form := url.Values{"project_id": {m.project}, "ttl": {"30m"}, "max_ttl": {"4h"}, "scopes": {""}}.Encode()
	for _, method := range []string{http.MethodPut, http.MethodPost} {
		require.Equal(t, http.StatusForbidden, send(method, "application/json", body(change{"scopes": list()})), method)
		// Some versions of Vault refuse a duplicate field, others use the last one.
		require.GreaterOrEqual(t, send(method, "application/json", strings.TrimSuffix(body(nil), "}")+`,"max_ttl":"9h"}`), http.StatusBadRequest, method)
		require.Equal(t, http.StatusForbidden, send(method, "application/x-www-form-urlencoded", form), method)
		require.Equal(t, http.StatusForbidden, send(method, "application/json", ""), "%s without a body", method)
		require.Equal(t, http.StatusNoContent, send(method, "application/json", body(nil)), method)
	}
	for _, kind := range []string{"application/merge-patch+json", "application/json"} {
		require.GreaterOrEqual(t, send(http.MethodPatch, kind, body(nil)), http.StatusBadRequest, kind)
		require.GreaterOrEqual(t, send(http.MethodPatch, kind, `{"scopes":[]}`), http.StatusBadRequest, kind)
	}

	require.Equal(t, before, m.read("roles/team-a-app").Data, "the refused writes must not change the role")
	names, err := m.client.Logical().List(m.path + "/roles")
	require.NoError(t, err)
	require.ElementsMatch(t, []any{"team-a-app", "team-b-app"}, names.Data["keys"])

	// Within the limits. Vault 1.19 compares a list as a whole.
	allowed := []change{{"ttl": "15m", "max_ttl": "1h"}, {"ttl": "1h", "max_ttl": "8h", "scopes": "api.model.read"}}
	if !strings.HasPrefix(strings.TrimPrefix(m.vault.Version, "v"), "1.19.") {
		allowed = append(allowed, change{"scopes": "api.model.read,api.model.request"}, change{"scopes": list("api.model.read", "api.model.request")})
	}
	for _, c := range allowed {
		require.NoError(t, write("team-a-app", body(c)), "%v", c)
	}
	// Vault also requires the fields in a read.
	role := m.path + "/roles/team-a-app"
	err = m.command(token, "", "read", role)
	require.True(t, forbidden(err), "%v", err)
	err = m.command(token, "", "read", role, "project_id="+m.project, "ttl=1h", "max_ttl=8h", "scopes=api.model.read")
	require.NoError(t, err)
	for _, path := range []string{"creds/team-a-app", "roles/team-b-app", "config", "projects/" + m.project} {
		err = m.command(token, "", "read", m.path+"/"+path)
		require.True(t, forbidden(err), "%s: %v", path, err)
	}
	err = m.command(token, body(change{"rotation_period": "1h"}), "write", m.path+"/static-roles/team-a-app", "-")
	require.True(t, forbidden(err), "%v", err)
	err = m.command(token, "", "delete", m.path+"/roles/team-b-app")
	require.True(t, forbidden(err), "%v", err)
	err = m.command(token, "", "delete", role)
	require.NoError(t, err)
}
