package openaisecrets

// The paths of static roles and their credentials.

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/text"
)

type fields = map[string]any

// callSim calls the simulator and decodes the response into answer, if it is not nil.
func callSim(h *harness, method, route, key, body string, answer any) (status int) {
	h.t.Helper()
	req, err := http.NewRequest(method, h.sim.URL()+route, strings.NewReader(body))
	require.NoError(h.t, err)
	req.Header.Set("Authorization", "Bearer "+key)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := sendAlone(req)
	require.NoError(h.t, err)
	defer resp.Body.Close()
	if answer != nil {
		require.NoError(h.t, json.NewDecoder(resp.Body).Decode(answer))
	}
	return resp.StatusCode
}

func TestStatic_CreateReadListDelete(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	require.Nil(t, h.static("batch", nil))
	made := h.sim.Accounts()[0]
	key := made.Keys[0]
	require.Regexp(t, `^vault-static-batch-[a-z0-9]{15}$`, made.Name)
	require.WithinDuration(t, h.now().Add(7*24*time.Hour), key.ExpiresAt, time.Minute, "at least a week")
	require.Equal(t, fields{
		"project_id": h.project, "service_account_id": made.ID, "service_account": made.Name, "service_account_adopted": false, "service_account_description": "",
		"scopes": []string{}, "revocation_delay": int64(360), "key_ttl": int64(0), "effective_key_ttl": int64(7 * 86400), "activation_timeout": int64(10), "activation_failure": "error",
		"rotation_period": int64(86400), "rotation_schedule": "", "rotation_window": int64(0),
		"api_key_id": key.ID, "api_key_expires_at": h.staticRole("batch")["api_key_expires_at"], "superseded_keys": 0, "retained_keys": 0,
		"last_vault_rotation": h.staticRole("batch")["last_vault_rotation"], "next_vault_rotation": text.Time(h.staticTime("batch", "last_vault_rotation").Add(24 * time.Hour)),
		"last_rotation_error": "", "next_rotation_retry": nil,
		"on_missing": "warn", "effective_on_missing": "warn", "missing": "", "missing_since": nil, "last_recreated": nil,
		"spend_limit": "", "spend_window": "month", "spend_action": "warn", "spend_blocked_until": nil, "spend_at_block": nil,
		"effective_spend_limit": "", "effective_spend_window": "month", "effective_spend_action": "warn",
		"disable_automated_rotation": false, "effective_project_id": h.project, "effective_activation_failure": "error", "effective_service_account_id": made.ID,
	}, h.staticRole("batch"))
	about(t, key.ExpiresAt, h.staticRole("batch")["api_key_expires_at"])
	require.WithinDuration(t, h.now(), h.staticTime("batch", "last_vault_rotation"), time.Minute)

	h.static("etl.nightly-2", fields{
		"rotation_schedule": "0 2 * * *", "rotation_window": "2h", "revocation_delay": "1h", "key_ttl": "72h",
		"scopes": "api.model.read,api.model.request,api.model.read", "service_account_description": "loads\n", "activation_timeout": 0,
	})
	data := h.staticRole("etl.nightly-2")
	require.Equal(t, []string{"api.model.read", "api.model.request"}, data["scopes"])
	require.Equal(t, "loads", data["service_account_description"])
	require.Equal(t, []any{int64(0), "0 2 * * *", int64(7200), int64(3600), int64(72 * 3600), int64(0)},
		[]any{data["rotation_period"], data["rotation_schedule"], data["rotation_window"], data["revocation_delay"], data["key_ttl"], data["activation_timeout"]})
	require.Equal(t, "02:00:00", h.staticTime("etl.nightly-2", "next_vault_rotation").UTC().Format(time.TimeOnly))
	scoped := h.sim.Accounts()[1].Keys[0]
	require.Equal(t, []string{"api.model.read", "api.model.request"}, scoped.Scopes)
	require.WithinDuration(t, h.now().Add(72*time.Hour), scoped.ExpiresAt, time.Minute)

	for _, at := range []string{"static-roles", "static-roles/"} {
		require.Equal(t, []string{"batch", "etl.nightly-2"}, h.must(h.list(at)).Data["keys"])
	}
	h.onlyStatic()
	h.deleteStaticRole("batch")
	h.deleteStaticRole("etl.nightly-2")
	require.Nil(t, h.must(h.remove("static-roles/batch")), "deleting a missing role is not an error")
	require.Empty(t, h.must(h.list("static-roles")).Data["keys"])
}

func TestStatic_AnAdoptedAccountIsNotDeleted(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	account := h.adoptStatic("batch", fields{"scopes": []string{"api.model.read"}})
	data := h.staticRole("batch")
	require.Equal(t, []any{account, "by hand for batch", true}, []any{data["service_account_id"], data["service_account"], data["service_account_adopted"]})
	key := h.sim.Keys()[0]
	require.Equal(t, []string{"api.model.read"}, key.Scopes)
	require.Regexp(t, `^vault-static-batch-[a-z0-9]{15}$`, key.Name)
	h.must(h.write("rotate-role/batch", nil))
	h.onlyStatic(account)
	h.deleteStaticRole("batch", account)
}

func TestStatic_BadInputIsRejectedWithoutSideEffects(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	archived := h.sim.AddProject("archived")
	h.sim.ArchiveProject(archived)
	hand := h.sim.AddServiceAccount(h.project, "by hand")
	h.static("there", fields{"revocation_delay": "1h", "key_ttl": "48h"})
	ours := h.staticRole("there")["service_account_id"]
	year := 365 * 24 * 3600
	for name, test := range map[string]struct {
		data fields
		said string
	}{
		"no schedule":                        {fields{"rotation_period": nil}, "rotation_period or rotation_schedule is required"},
		"zero period":                        {fields{"rotation_period": 0}, "rotation_period or rotation_schedule is required"},
		"both":                               {fields{"rotation_schedule": "0 2 * * *"}, "mutually exclusive"},
		"window with period":                 {fields{"rotation_window": "1h"}, "rotation_window does not apply to period"},
		"window without schedule":            {fields{"rotation_period": nil, "rotation_window": "1h"}, "without rotation_schedule"},
		"short window":                       {fields{"rotation_period": nil, "rotation_schedule": "0 2 * * *", "rotation_window": 3599}, "3600 seconds or more"},
		"short period":                       {fields{"rotation_period": 9}, "10s or more"},
		"negative period":                    {fields{"rotation_period": -1}, "rotation_period"},
		"period over the key lifetime":       {fields{"rotation_period": year}, "rotate more often"},
		"schedule over the key lifetime":     {fields{"rotation_period": nil, "rotation_schedule": "0 0 1 1 *"}, "rotate more often"},
		"schedule for leap years":            {fields{"rotation_period": nil, "rotation_schedule": "0 0 29 2 *"}, "rotate more often"},
		"window over the key lifetime":       {fields{"rotation_period": nil, "rotation_schedule": "0 2 * * *", "rotation_window": year}, "rotate more often"},
		"invalid schedule":                   {fields{"rotation_period": nil, "rotation_schedule": "often"}, "rotation_schedule"},
		"schedule without an occurrence":     {fields{"rotation_period": nil, "rotation_schedule": "0 0 31 2 *"}, "has no future occurrence"},
		"rotation_policy":                    {fields{"rotation_policy": "p"}, "unknown field"},
		"misspelled field":                   {fields{"scope": "api.model.read"}, "unknown field"},
		"negative revocation_delay":          {fields{"revocation_delay": -1}, "negative"},
		"revocation_delay over the period":   {fields{"revocation_delay": "24h1s"}, "revocation_delay must be between 0 and 24h0m0s"},
		"revocation_delay over the gap":      {fields{"rotation_period": nil, "rotation_schedule": "* 2 * * *", "revocation_delay": "23h2m"}, "revocation_delay must be between 0 and 23h1m0s"},
		"negative delay as text":             {fields{"revocation_delay": "-1s"}, "negative"},
		"fraction of a second":               {fields{"revocation_delay": "500ms"}, "whole seconds"},
		"fraction of a second in period":     {fields{"rotation_period": "24h0.5s"}, "whole seconds"},
		"short key_ttl":                      {fields{"key_ttl": "24h10m59s"}, "key_ttl must be 24h11m0s or more"},
		"short key_ttl with window":          {fields{"rotation_period": nil, "rotation_schedule": "0 2 * * *", "rotation_window": "2h", "key_ttl": "26h10m"}, "key_ttl must be 26h11m0s or more"},
		"negative key_ttl":                   {fields{"key_ttl": -5}, "negative"},
		"long key_ttl":                       {fields{"key_ttl": year + 1}, "key_ttl must be 8760h0m0s or less"},
		"long activation_timeout":            {fields{"activation_timeout": 46}, "activation_timeout must be between 0 and 45s"},
		"negative activation_timeout":        {fields{"activation_timeout": -1}, "negative"},
		"no project":                         {fields{"project_id": ""}, "project_id is required, because the config has no default"},
		"unknown project":                    {fields{"project_id": "proj_nobody"}, `project "proj_nobody" not found`},
		"archived project":                   {fields{"project_id": archived}, "is archived"},
		"project that is a path":             {fields{"project_id": "proj/../x"}, "is not a valid ID"},
		"unknown account":                    {fields{"service_account_id": "user-nobody"}, `service account "user-nobody" not found`},
		"account that is a path":             {fields{"service_account_id": "user?x"}, "is not a valid ID"},
		"account of this mount":              {fields{"service_account_id": ours}, "belongs to a lease or static role of this mount"},
		"empty scope":                        {fields{"scopes": []string{"api.model.read", " "}}, "must not contain empty values"},
		"invalid scope":                      {fields{"scopes": []string{"api model"}}, "is not an identifier"},
		"scope that OpenAI rejects":          {fields{"scopes": []string{"Nothing.Such"}}, "Nothing.Such"},
		"scope that OpenAI rejects, adopted": {fields{"scopes": []string{"Nothing.Such"}, "service_account_id": hand}, "Nothing.Such"},
		"description of two lines":           {fields{"service_account_description": "a\nb"}, "service_account_description must not contain control characters"},
	} {
		t.Run(name, func(t *testing.T) {
			data := fields{"project_id": h.project, "rotation_period": "24h"}
			maps.Copy(data, test.data)
			maps.DeleteFunc(data, func(_ string, value any) bool { return value == nil })
			refusedFor(t, h, "static-roles/new", data, test.said)
			resp, err := h.read("static-roles/new")
			require.NoError(t, err)
			require.Nil(t, resp)
		})
	}
	before := h.staticRole("there")
	for name, test := range map[string]struct {
		data fields
		said string
	}{
		"another project":                 {fields{"project_id": archived}, "project_id cannot be changed"},
		"another account":                 {fields{"service_account_id": hand}, "service_account_id cannot be changed"},
		"no schedule":                     {fields{"rotation_period": 0}, "is required"},
		"a period under revocation_delay": {fields{"rotation_period": "59m"}, "revocation_delay must be between 0 and 59m0s"},
		"a period over the key_ttl":       {fields{"rotation_period": "47h"}, "key_ttl must be 48h5m0s or more"},
		"a scope that OpenAI rejects":     {fields{"scopes": "Nothing.Such", "rotation_period": "23h"}, "Nothing.Such"},
	} {
		t.Run("update, "+name, func(t *testing.T) {
			refusedFor(t, h, "static-roles/there", test.data, test.said)
			require.Equal(t, before, h.staticRole("there"), "the role is unchanged")
		})
	}
	long := strings.Repeat("x", maxRoleName+1)
	require.Contains(t, h.refused(h.write("static-roles/"+long, fields{"project_id": h.project, "rotation_period": "24h"})), "the limit is 128")
	longest := strings.Repeat("y", maxRoleName)
	h.static(longest, nil)
	h.deleteStaticRole(longest, hand)
	h.deleteStaticRole("there", hand)
}

// refusedFor sends a write that the engine or the framework must reject.
func refusedFor(t *testing.T, h *harness, at string, data fields, said string) {
	t.Helper()
	resp, err := h.write(at, data)
	if err != nil {
		require.ErrorContains(t, err, said)
		return
	}
	require.True(t, resp.IsError(), "not rejected: %v", resp)
	require.Contains(t, resp.Error().Error(), said)
}

func TestStatic_AnAccountWithoutARoleIsAdoptedWithAWarning(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	var account struct{ ID string }
	_, adminKey := h.sim.AdminKey()
	require.Equal(t, http.StatusOK, callSim(h, http.MethodPost, "/organization/projects/"+h.project+"/service_accounts", adminKey, `{"name":"powerless","create_service_account_only":true}`, &account))
	id := account.ID
	h.sim.Keep(id)
	resp := h.static("batch", fields{"service_account_id": id})
	require.Contains(t, resp.Warnings[0], `has the role "none" in project`)
	h.must(h.remove("static-roles/batch"))
	require.Equal(t, []string{id}, h.liveAccounts())
}

func TestAdoption_WarnsAboutRolesOtherThanMember(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.sim.KeepAll()
	adopt := func(role string) (warnings string) {
		t.Helper()
		id := h.sim.AddServiceAccount(h.project, "adopted")
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeAccount, Times: 2, Kind: openaitest.FaultGarbageBefore,
			Body: fmt.Sprintf(`{"object":"organization.project.service_account","id":%q,"name":"adopted","role":%q,"created_at":1767225600}`, id, role)})
		asRole := h.must(h.write("roles/adopted", fields{"project_id": h.project, "credential_type": typeKey, "service_account_id": id}))
		asStatic := h.must(h.write("static-roles/adopted", fields{"project_id": h.project, "service_account_id": id, "rotation_period": "24h"}))
		h.sim.ClearFaults()
		h.must(h.remove("static-roles/adopted"))
		h.must(h.remove("roles/adopted"))
		if asRole == nil || asStatic == nil {
			require.Nil(t, asRole)
			require.Nil(t, asStatic)
			return ""
		}
		require.Equal(t, asRole.Warnings[0], asStatic.Warnings[0])
		return asRole.Warnings[0]
	}
	require.Empty(t, adopt("member"))
	for _, role := range []string{"owner", "none", "admin", "Member"} {
		warned := adopt(role)
		require.Contains(t, warned, fmt.Sprintf("has the role %q in project %s", role, h.project))
		require.Equal(t, role == "none", strings.Contains(warned, "have no permissions"))
	}
}

func TestStatic_ProjectOfTheConfig(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.must(h.write("config", fields{"project_id": h.project}))
	h.must(h.write("static-roles/batch", fields{"rotation_period": "24h"}))
	require.Equal(t, h.project, h.staticRole("batch")["project_id"])
	h.must(h.write("config", fields{"project_id": h.sim.AddProject("another")}))
	h.must(h.write("static-roles/batch", fields{"rotation_period": "48h", "project_id": "", "service_account_id": ""}))
	require.Equal(t, h.project, h.staticRole("batch")["effective_project_id"], "the account stays in its project")
	h.must(h.write("rotate-role/batch", nil))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStatic_NotConfigured(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.holdStatic()
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h"})), "no admin key is configured")
	require.Empty(t, h.must(h.list("static-roles")).Data["keys"])
	for _, at := range []string{"static-creds/batch", "rotate-role/batch"} {
		op := map[bool]logical.Operation{true: logical.ReadOperation, false: logical.UpdateOperation}[at == "static-creds/batch"]
		require.Equal(t, `static role "batch" not found; run "vault list openai/static-roles" to list static roles`, h.refused(h.do(context.Background(), op, at, nil)))
	}
	require.Nil(t, h.must(h.remove("static-roles/batch")))

	h.configure(nil)
	h.static("batch", nil)
	h.must(h.remove("config"))
	require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)), "a read needs no config")
	require.Contains(t, h.refused(h.write("rotate-role/batch", nil)), "no admin key is configured")
	require.Contains(t, strings.Join(h.must(h.write("static-roles/batch", fields{"scopes": "api.model.read"})).Warnings, ""), "The scopes are stored", "narrowing needs no config")
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"scopes": ""})), "no admin key is configured")
	logged := len(h.log.String())
	h.advance(25 * time.Hour)
	h.runStaticWorker()
	require.Len(t, h.log.String(), logged, "without a config, no run logs a warning")
	require.Empty(t, h.staticRole("batch")["last_rotation_error"])
	resp := h.must(h.remove("static-roles/batch"))
	require.Contains(t, resp.Warnings[0], "Queued for deletion at OpenAI in the WAL")
	require.Len(t, h.liveAccounts(), 1)
	h.configure(nil)
	h.runPeriodicWork()
	h.onlyStatic()
}

func TestStatic_APartialWriteKeepsTheRest(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"scopes": "api.model.read", "revocation_delay": "2h", "key_ttl": "100h", "service_account_description": "loads", "activation_timeout": 20})
	before := h.staticRole("batch")
	h.sim.ResetRequests()
	for field, value := range (fields{"service_account_description": "loads more", "revocation_delay": int64(3600), "key_ttl": int64(200 * 3600), "activation_timeout": int64(0)}) {
		require.Nil(t, h.must(h.write("static-roles/batch", fields{field: value})))
		before[field] = value
		if field == "key_ttl" {
			before["effective_key_ttl"] = value
		}
		require.Equal(t, before, h.staticRole("batch"), field)
	}
	h.must(h.write("static-roles/batch", nil))
	require.Equal(t, before, h.staticRole("batch"))
	h.must(h.write("static-roles/batch", throughJSON(t, fields{
		"project_id": before["project_id"], "service_account_id": before["service_account_id"], "scopes": before["scopes"], "rotation_period": before["rotation_period"],
	})))
	require.Equal(t, before, h.staticRole("batch"), "a read can be written back")
	require.Zero(t, h.sim.Count("", ""), "none of these writes makes a call")

	// One kind of schedule replaces the other.
	h.must(h.write("static-roles/batch", fields{"rotation_schedule": "0 2 * * *", "rotation_window": "1h"}))
	data := h.staticRole("batch")
	require.Equal(t, []any{int64(0), "0 2 * * *", int64(3600)}, []any{data["rotation_period"], data["rotation_schedule"], data["rotation_window"]})
	h.must(h.write("static-roles/batch", fields{"rotation_period": "5h"}))
	data = h.staticRole("batch")
	require.Equal(t, []any{int64(5 * 3600), "", int64(0)}, []any{data["rotation_period"], data["rotation_schedule"], data["rotation_window"]})
	require.Equal(t, h.staticTime("batch", "last_vault_rotation").Add(5*time.Hour), h.staticTime("batch", "next_vault_rotation"))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStatic_AChangeOfScopesRotatesImmediately(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"scopes": "api.model.read"})
	first := h.staticCreds("batch")
	require.Nil(t, h.must(h.write("static-roles/batch", fields{"scopes": []string{"api.model.read", "api.model.request"}})))
	second := h.staticCreds("batch")
	require.NotEqual(t, first["api_key_id"], second["api_key_id"])
	require.Equal(t, first["service_account_id"], second["service_account_id"])
	require.Equal(t, text.Time(h.staticTime("batch", "last_vault_rotation").Add(defaultRevocationDelay)), second["previous_api_key_expires_at"])
	require.True(t, h.accepted(first["api_key"].(string)))
	for _, k := range h.sim.Keys() {
		require.Len(t, k.Scopes, map[bool]int{true: 1, false: 2}[k.ID == first["api_key_id"]])
	}
	h.must(h.write("static-roles/batch", fields{"scopes": "api.model.read,api.model.request"}))
	require.Equal(t, second["api_key_id"], h.staticCreds("batch")["api_key_id"], "the same scopes do not rotate the key")
	resp := h.must(h.write("static-roles/batch", fields{"scopes": ""}))
	require.Contains(t, resp.Warnings[0], "no longer has scopes")
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticCreds_EveryField(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	account := h.sim.Accounts()[0]
	got := h.staticCreds("batch")
	require.Equal(t, fields{
		"api_key": account.Keys[0].Value, "api_key_id": account.Keys[0].ID, "service_account": account.Name, "service_account_id": account.ID, "project_id": h.project,
		"expires_at": got["expires_at"], "ttl": got["ttl"], "last_vault_rotation": text.Time(h.staticTime("batch", "last_vault_rotation")), "rotation_period": int64(86400),
	}, got)
	about(t, account.Keys[0].ExpiresAt, got["expires_at"])
	require.InDelta(t, 86400, got["ttl"], 60)

	h.advance(20 * time.Hour)
	require.InDelta(t, 4*3600, h.staticCreds("batch")["ttl"], 60, "ttl counts down")
	h.until(h.staticTime("batch", "next_vault_rotation").Add(time.Second))
	require.Zero(t, h.staticCreds("batch")["ttl"], "due")
	h.advance(time.Hour)
	require.Zero(t, h.staticCreds("batch")["ttl"], "overdue")
	h.runStaticWorker()
	next := h.staticCreds("batch")
	require.NotEqual(t, got["api_key_id"], next["api_key_id"])
	require.InDelta(t, 86400, next["ttl"], 60)
	about(t, h.now().Add(defaultRevocationDelay), next["previous_api_key_expires_at"])
	require.True(t, h.accepted(got["api_key"].(string)), "the previous key works during the overlap")
	h.advance(defaultRevocationDelay - 2*time.Minute)
	h.runStaticWorker()
	require.Contains(t, h.staticCreds("batch"), "previous_api_key_expires_at")
	h.advance(2 * time.Minute)
	require.NotContains(t, h.staticCreds("batch"), "previous_api_key_expires_at", "the time has passed, even before the deletion")
	h.runStaticWorker()
	require.False(t, h.accepted(got["api_key"].(string)))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticCreds_WithASchedule(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_schedule": "30 4 * * 1"})
	got := h.staticCreds("batch")
	require.Equal(t, []any{int64(0), "30 4 * * 1", int64(0)}, []any{got["rotation_period"], got["rotation_schedule"], got["rotation_window"]})
	require.InDelta(t, time.Until(h.staticTime("batch", "next_vault_rotation")).Seconds(), got["ttl"], 30)
	h.must(h.write("static-roles/batch", fields{"rotation_schedule": "30 4 * * 1", "rotation_window": "3h"}))
	require.Equal(t, int64(3*3600), h.staticCreds("batch")["rotation_window"])
	h.deleteStaticRole("batch")
}

func TestStaticCreds_AnExpiredKeyComesWithAWarning(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Status: http.StatusForbidden, Message: "keys are frozen"})
	h.advance(8 * 24 * time.Hour)
	h.runStaticWorker()
	resp := h.must(h.read("static-creds/batch"))
	require.Len(t, resp.Warnings, 1)
	require.Contains(t, resp.Warnings[0], "expired at OpenAI, because no rotation has succeeded since "+h.staticRole("batch")["last_vault_rotation"].(string))
	require.Contains(t, resp.Warnings[0], "keys are frozen")
	h.sim.ClearFaults()
	h.advance(time.Hour)
	h.runStaticWorker()
	require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
	require.NotContains(t, h.staticCreds("batch"), "previous_api_key_expires_at", "the previous key has expired")
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}
