package openaisecrets

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestConfig_AdminKeyAloneIsEnough(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	id, key := h.sim.AdminKey()
	h.sim.AddAdminKey("someone else's")

	resp, err := h.read("config")
	require.NoError(t, err)
	require.Nil(t, resp, "Vault answers 404, and its CLI exits with 2")
	require.Contains(t, h.refused(h.write("tidy", nil)), "vault write openai/config admin_api_key=@admin-key.txt")

	h.must(h.write("config", map[string]any{"admin_api_key": key + "\n", "api_endpoint": h.sim.URL() + "/"}))
	require.Equal(t, map[string]any{
		"admin_api_key_id":           id,
		"organization_id":            "",
		"project_id":                 "",
		"api_endpoint":               h.sim.URL() + "/",
		"effective_admin_api_key_id": id,
		"effective_api_endpoint":     h.sim.URL(),
		"allow_insecure_endpoint":    false,
		"ca_cert":                    "",
		"rotation_grace_period":      int64(300),
		"request_timeout":            int64(30),
		"max_concurrent_requests":    256,
		"wal_entries":                0,
		"wal_oldest_entry":           nil,
		"tidy_interval":              int64(43200),
		"tidy_safety_buffer":         int64(600),
		"last_rotated":               nil,
		"superseded_admin_keys":      0,
		"usage_interval":             int64(0),
		"usage_retention":            int64(35 * 24 * 3600),
		"usage_record_identity":      true,
		"require_spend_limit":        false,
		"require_model_allow_list":   false,
		"require_scopes":             false,

		"rotation_period":            int64(0),
		"rotation_schedule":          "",
		"rotation_window":            int64(0),
		"disable_automated_rotation": false,
		"rotation_manager":           "",
		"next_rotation":              nil,
		"last_rotation_error":        "",
		"admin_api_key_expires_at":   nil,
	}, h.must(h.read("config")).Data)
}

func TestConfig_PartialWriteKeepsTheRest(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_grace_period": "1h", "organization_id": h.sim.OrganizationID()}))
	h.must(h.write("config", map[string]any{"request_timeout": 7}))
	data := h.must(h.read("config")).Data
	require.EqualValues(t, 3600, data["rotation_grace_period"])
	require.EqualValues(t, 7, data["request_timeout"])
	require.Equal(t, h.sim.OrganizationID(), data["organization_id"])
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

func TestConfig_ARejectedWriteChangesNothing(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	_, good := h.sim.AdminKey()
	_, readOnly := h.sim.AddAdminKey("read only", openaitest.ReadOnly())
	_, nothing := h.sim.AddAdminKey("no access", openaitest.NoAccess())
	otherID, _ := h.sim.AddAdminKey("other")
	lookalikeKey := "sk-admin-AAAAlookalike0000000000000000000000000000000ZZZZ"
	h.sim.AddAdminKey("twin 1", openaitest.WithValue(lookalikeKey))
	h.sim.AddAdminKey("twin 2", openaitest.WithValue(strings.Replace(lookalikeKey, "look", "cook", 1)))
	html := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>hello</html>")) }))
	defer html.Close()
	before := h.must(h.read("config")).Data

	for name, test := range map[string]struct {
		data map[string]any
		said []string
	}{
		"unknown key":          {map[string]any{"admin_api_key": "sk-admin-unknown-unknown-unknown"}, []string{"rejects this admin_api_key", "status 401", "request id"}},
		"project key":          {map[string]any{"admin_api_key": "sk-proj-abcdefghijkl"}, []string{"a project API key", "sk-admin-"}},
		"account key":          {map[string]any{"admin_api_key": "sk-svcacct-abcdefghijkl"}, []string{"a service account's API key"}},
		"read only":            {map[string]any{"admin_api_key": readOnly}, []string{"Organization Administration: Write", "api.management.write"}},
		"no access":            {map[string]any{"admin_api_key": nothing}, []string{"Organization Administration: Write"}},
		"unreachable":          {map[string]any{"admin_api_key": good, "api_endpoint": "http://127.0.0.1:1/v1"}, []string{"cannot reach 127.0.0.1:1", "api_endpoint"}},
		"not the API":          {map[string]any{"admin_api_key": good, "api_endpoint": html.URL}, []string{"does not serve the Admin API"}},
		"no version in path":   {map[string]any{"admin_api_key": good, "api_endpoint": strings.TrimSuffix(h.sim.URL(), "/v1")}, []string{"does not serve the Admin API", "404"}},
		"wrong organization":   {map[string]any{"organization_id": "org-other"}, []string{"organization_id does not match the organization of this admin_api_key"}},
		"another key's ID":     {map[string]any{"admin_api_key_id": otherID}, []string{"admin_api_key_id", "not the ID of this admin key"}},
		"ambiguous":            {map[string]any{"admin_api_key": lookalikeKey}, []string{"matches several admin keys", "admin_api_key_id"}},
		"endpoint without key": {map[string]any{"api_endpoint": "https://elsewhere.example/v1"}, []string{"requires admin_api_key"}},
		"empty key":            {map[string]any{"admin_api_key": ""}, []string{"admin_api_key is empty"}},
		"key with a space":     {map[string]any{"admin_api_key": "sk-admin a"}, []string{"admin_api_key contains a space"}},
		"key with a NUL":       {map[string]any{"admin_api_key": "sk-admin\x00a"}, []string{"control character"}},
		"key not UTF-8":        {map[string]any{"admin_api_key": "sk-admin\xffa"}, []string{"UTF-8"}},
		"huge key":             {map[string]any{"admin_api_key": strings.Repeat("k", 1<<20)}, []string{"limit is 1024"}},
		"huge id":              {map[string]any{"admin_api_key_id": strings.Repeat("k", 1<<20)}, []string{"admin_api_key_id", "limit"}},
		"id with a slash":      {map[string]any{"admin_api_key_id": "a/../b"}, []string{"is not a valid ID"}},
		"huge organization":    {map[string]any{"organization_id": strings.Repeat("k", 1<<20)}, []string{"organization_id", "limit"}},
		"bad CA":               {map[string]any{"ca_cert": "nonsense"}, []string{"ca_cert contains no PEM certificate"}},
		"huge CA":              {map[string]any{"ca_cert": strings.Repeat("k", 1<<20)}, []string{"ca_cert", "limit"}},
		"negative grace":       {map[string]any{"rotation_grace_period": "-5m"}, []string{"rotation_grace_period"}},
		"overflowing grace":    {map[string]any{"rotation_grace_period": "99999999999h"}, []string{"rotation_grace_period"}},
		"zero concurrency":     {map[string]any{"max_concurrent_requests": 0}, []string{"max_concurrent_requests", "4 and 1024"}},
		"long grace":           {map[string]any{"rotation_grace_period": "169h"}, []string{"rotation_grace_period", "168h"}},
		"zero timeout":         {map[string]any{"request_timeout": 0}, []string{"request_timeout"}},
		"timeout over budget":  {map[string]any{"request_timeout": "2m"}, []string{"request_timeout", "1m0s"}},
		"unknown field":        {map[string]any{"rotation_policy": "p"}, []string{"unknown field", "rotation_policy", "path-help"}},
		"http":                 {map[string]any{"admin_api_key": good, "api_endpoint": "http://api.example/v1"}, []string{"must use https"}},
		"user in the endpoint": {map[string]any{"admin_api_key": good, "api_endpoint": "https://a:b@api.example/v1"}, []string{"user name"}},
		"query in endpoint":    {map[string]any{"admin_api_key": good, "api_endpoint": "https://api.example/v1?x=1"}, []string{"query"}},
		"huge endpoint":        {map[string]any{"admin_api_key": good, "api_endpoint": "https://" + strings.Repeat("k", 1<<20)}, []string{"api_endpoint", "limit"}},
	} {
		t.Run(name, func(t *testing.T) {
			said := h.refused(h.write("config", test.data))
			for _, part := range test.said {
				require.Contains(t, said, part)
			}
			require.Equal(t, before, h.must(h.read("config")).Data)
		})
	}
	require.NoError(t, h.revoke(h.lease("creds/app", nil)), "the engine still uses the valid key")
}

func TestConfig_ErrorsDoNotQuoteANonStringKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	_, key := h.sim.AdminKey()
	for _, value := range []any{[]any{key}, map[string]any{"a": key}} {
		req := &logical.Request{Operation: logical.UpdateOperation, Path: "config", Storage: h.storage, Data: map[string]any{"admin_api_key": value}}
		_, _, err := h.b.HandleExistenceCheck(t.Context(), req)
		require.NoError(t, err)
		require.Contains(t, h.refused(h.write("config", map[string]any{"admin_api_key": value})), "must be a string")
	}
}

func TestConfig_AnAmbiguousKeyIsAcceptedWithItsID(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	value := "sk-admin-AAAAlookalike0000000000000000000000000000000ZZZZ"
	id, _ := h.sim.AddAdminKey("twin 1", openaitest.WithValue(value))
	h.sim.AddAdminKey("twin 2", openaitest.WithValue(strings.Replace(value, "look", "cook", 1)))
	h.must(h.write("config", map[string]any{"admin_api_key": value, "admin_api_key_id": id, "api_endpoint": h.sim.URL()}))
	require.Equal(t, id, h.must(h.read("config")).Data["admin_api_key_id"])
}

func TestConfig_AnOutageDuringVerificationIsAnUpstreamError(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Status: 503, Message: "down for maintenance"})
	_, key := h.sim.AdminKey()
	_, err := h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()})
	require.ErrorContains(t, err, "down for maintenance")
	var coded logical.HTTPCodedError
	require.ErrorAs(t, err, &coded)
	require.Equal(t, http.StatusBadGateway, coded.Code())

	resp := h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL(), "skip_verify": true}))
	require.Contains(t, resp.Warnings[0], "without verification")
	h.sim.ClearFaults()
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

func TestConfig_VerificationHasNoSideEffect(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	before := h.sim.Ledger()
	h.configure(nil)
	require.Equal(t, before, h.sim.Ledger())
}

func TestConfig_CustomCA(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{TLS: true})
	_, key := h.sim.AdminKey()
	said := h.refused(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()}))
	require.Contains(t, said, "certificate")
	require.Contains(t, said, "ca_cert")
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL(), "ca_cert": h.sim.CACert()}))
}

func TestConfig_AnInsecureEndpointCausesAWarning(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	resp := h.must(h.write("config", map[string]any{
		"admin_api_key": "sk-admin-x1234567", "api_endpoint": "http://gateway.example/v1", "allow_insecure_endpoint": true, "skip_verify": true,
	}))
	require.Contains(t, strings.Join(resp.Warnings, " "), "plaintext")
}

func TestConfig_StorageFailureIsAnError(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	_, key := h.sim.AdminKey()
	for n := range 2 { // the tag, the config
		h.storage.fail(storageFault{write: n})
		_, err := h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()})
		require.ErrorIs(t, err, errStorage)
		h.storage.heal()
	}
	h.configure(nil)
}

func TestConfig_DeleteWarnsAndDeletesSupersededKeys(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.must(h.write("config/rotate", nil))
	current := h.must(h.read("config")).Data["admin_api_key_id"].(string)

	resp := h.must(h.remove("config"))
	said := strings.Join(resp.Warnings, " ")
	require.Contains(t, said, "cannot revoke leases")
	require.Contains(t, said, current, "the warning names the remaining key")
	require.Equal(t, []string{current}, h.adminKeyIDs(), "the superseded key is deleted")
	h.sim.Keep(current)

	err := h.revoke(lease)
	require.ErrorContains(t, err, "config")
	require.ErrorContains(t, err, lease.Data["service_account_id"].(string))
	require.Len(t, h.sim.Accounts(), 1)
	h.must(h.remove("config"))

	_, key := h.sim.AddAdminKey("a new one")
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()}))
	h.rollback()
	h.onlyLeased()
	require.NoError(t, h.revoke(lease), "Vault's retry succeeds")
}

func TestConfig_TheMountTagOutlivesTheConfig(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	tag, err := getTag(t.Context(), h.storage)
	require.NoError(t, err)
	require.Regexp(t, `^[a-z0-9]{5}$`, tag)
	h.must(h.remove("config"))
	h.configure(nil)
	again, err := getTag(t.Context(), h.storage)
	require.NoError(t, err)
	require.Equal(t, tag, again)
}

func TestConfig_WritingAnotherKeySupersedesARotatedKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil))
	made := h.must(h.read("config")).Data["admin_api_key_id"].(string)
	id, key := h.sim.AddAdminKey("by hand")
	h.must(h.write("config", map[string]any{"admin_api_key": key}))
	require.EqualValues(t, 2, h.must(h.read("config")).Data["superseded_admin_keys"])
	h.advance(defaultRotationGrace + time.Second)
	h.runPeriodicWork()
	require.Equal(t, []string{id}, h.adminKeyIDs(), "%s is deleted", made)
}

func TestConfig_AnotherKeyOfTheSameOrganizationCausesNoWarning(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	_, second := h.sim.AddAdminKey("by hand")
	require.Nil(t, h.must(h.write("config", map[string]any{"admin_api_key": second})))
}

func TestConfig_RejectsAKeyWithoutAccessToTheRolesProjects(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.sim.KeepAll()
	h.static("batch", nil)
	archived := h.sim.AddProject("closed")
	h.must(h.write("roles/closed", map[string]any{"project_id": archived}))
	h.sim.ArchiveProject(archived)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	other := openaitest.Start(t, openaitest.Options{})
	_, key := other.AdminKey()
	before := h.config()
	said := h.refused(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": other.URL()}))
	for _, part := range []string{h.project, archived, `role "app"`, `role "closed"`, `static role "batch"`, "skip_verify=true"} {
		require.Contains(t, said, part)
	}
	require.Equal(t, before, h.config())
	require.Equal(t, 1, other.Count(http.MethodGet, "/organization/projects"))

	// A key of the same organization is verified with one call.
	_, key = h.sim.AddAdminKey("second")
	h.sim.ResetRequests()
	h.must(h.write("config", map[string]any{"admin_api_key": key}))
	require.Equal(t, 1, h.sim.Count(http.MethodGet, "/organization/projects"))
	h.sim.ResetRequests()
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL(), "request_timeout": 20}))
	require.Zero(t, h.sim.Count(http.MethodGet, "/organization/projects"), "neither key nor endpoint has changed")

	// Without a response the key is not stored, unless skip_verify is set.
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/projects", Status: 503})
	_, key = h.sim.AddAdminKey("third")
	before = h.config()
	_, err := h.write("config", map[string]any{"admin_api_key": key})
	require.ErrorContains(t, err, "config not stored")
	require.Equal(t, before, h.config())
	h.sim.ResetRequests()
	resp := h.must(h.write("config", map[string]any{"admin_api_key": key, "skip_verify": true}))
	require.Contains(t, strings.Join(resp.Warnings, " "), "not verified")
	require.Empty(t, h.routes())
}

func TestConfig_AGateway404DoesNotRejectTheKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	_, key := h.sim.AddAdminKey("second")
	before := h.config()
	for _, body := range []string{
		`{"error":{"message":"Unknown request URL: DELETE /organization/admin_api_keys. Please check the URL for typos.","type":"invalid_request_error","param":null,"code":"unknown_url"}}`,
		`{"error":{"message":"Invalid URL (DELETE /v1/organization/admin_api_keys)","type":"invalid_request_error","param":null,"code":null}}`,
		`{"timestamp":"2026-01-01T00:00:00Z","status":404,"error":"Not Found","path":"/x"}`,
		`{"error":"Not Found"}`,
		`{"message":"no Route matched with those values"}`,
		`404 page not found`,
		`{"error":{"message":"The requested resource was not found.","type":"","code":""}}`,
		`{"detail":"Not Found"}`,
	} {
		for _, at := range []struct{ method, route string }{
			{http.MethodDelete, "/organization/*"}, {http.MethodGet, "/organization/*"}, {http.MethodGet, "/organization/projects"},
		} {
			cancel := h.sim.Fail(openaitest.Fault{Method: at.method, Route: at.route, Status: 404, Body: body})
			resp, err := h.write("config", map[string]any{"admin_api_key": key})
			require.Contains(t, h.refused(resp, err), "does not serve the Admin API", "%s %s: %s", at.method, at.route, body)
			cancel()
		}
	}
	require.Equal(t, before, h.config())
}

func TestConfig_AKeyFromTheOperatorIsNeverSuperseded(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil))
	person, value := h.sim.AddAdminKey("a person's")
	require.Contains(t, h.refused(h.write("config", map[string]any{"admin_api_key_id": person, "skip_verify": true})), "cannot be changed")
	h.must(h.write("config", map[string]any{"admin_api_key": value}))
	id, third := h.sim.AddAdminKey("another person's")
	h.must(h.write("config", map[string]any{"admin_api_key": third}))
	h.must(h.write("config", map[string]any{"admin_api_key": third}))
	require.Equal(t, id, h.must(h.read("config")).Data["admin_api_key_id"])
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.ElementsMatch(t, []string{person, id}, h.adminKeyIDs())
}

func TestConfig_ASupersededKeyConfiguredAgainIsNotDeleted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	first, value := h.sim.AdminKey()
	h.must(h.write("config/rotate", nil))
	h.must(h.write("config", map[string]any{"admin_api_key": value, "force": true}))
	h.advance(defaultRotationGrace + time.Second)
	h.runPeriodicWork()
	require.Equal(t, []string{first}, h.adminKeyIDs())
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

// Storage deletes the config, but its answer is lost. No later request can show what
// remains at OpenAI.
func TestConfig_ADeletionWhoseAnswerIsLostSaysWhatRemains(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		h := configured(t, openaitest.Options{})
		h.must(h.write("config/rotate", nil))
		cfg, err := getConfig(t.Context(), h.storage)
		require.NoError(t, err)
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusServiceUnavailable})
		h.storage.fail(storageFault{after: after})
		resp, err := h.do(t.Context(), logical.DeleteOperation, "config", nil)
		require.Equal(t, "delete .", h.storage.last())
		if after {
			require.NoError(t, err)
			require.Contains(t, strings.Join(resp.Warnings, "\n"), cfg.AdminKeyID)
			require.Contains(t, strings.Join(resp.Warnings, "\n"), cfg.Superseded[0].ID)
		} else {
			require.ErrorContains(t, err, "deleting the config")
		}
		h.storage.heal()
		h.sim.ClearFaults()
		h.sim.Keep(h.adminKeyIDs()...)
	}
}
