package openaisecrets

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/naming"
)

func TestRoles_WriteReadListDelete(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	require.Empty(t, h.must(h.list("roles/")).Data["keys"])

	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Equal(t, map[string]any{
		"project_id":                    h.project,
		"service_account_name_template": naming.DefaultTemplate,
		"service_account_description":   "",
		"ttl":                           int64(0),
		"max_ttl":                       int64(0),
		"scopes":                        []string{},
		"key_expiry":                    expiryMaxTTL,
		"credential_type":               typeAccount,
		"service_account_id":            "",
		"activation_timeout":            int64(10),
		"activation_failure":            "error",
		"pool_size":                     0,
		"pool_max_age":                  int64(0),
		"pool_ready":                    0,
		"pool_refilling":                false,
		"pool_last_error":               "",
		"effective_pool_max_age":        int64(21600),
		"effective_project_id":          h.project,
		"effective_ttl":                 int64(3600),
		"effective_max_ttl":             int64(86400),
		"effective_key_lifetime":        int64(86475),
		"effective_key_expiry":          expiryMaxTTL,
		"effective_credential_type":     typeAccount,
		"effective_activation_failure":  "error",
		"spend_limit":                   "",
		"spend_window":                  windowMonth,
		"spend_action":                  actionWarn,
		"spend_blocked_until":           nil,
		"spend_at_block":                nil,
		"effective_spend_limit":         "",
		"effective_spend_window":        windowMonth,
		"effective_spend_action":        actionWarn,

		"effective_service_account_name_template": naming.DefaultTemplate,
	}, h.must(h.read("roles/app")).Data)

	h.must(h.write("roles/app", map[string]any{"service_account_description": "for the app", "ttl": "30m"}))
	data := h.must(h.read("roles/app")).Data
	require.Equal(t, "for the app", data["service_account_description"])
	require.EqualValues(t, 1800, data["ttl"])
	require.EqualValues(t, 86400, data["effective_max_ttl"], "a partial write keeps the rest")
	require.Equal(t, h.project, data["project_id"])

	h.must(h.write("roles/team.b-1", map[string]any{"project_id": h.project, "max_ttl": "10m"}))
	require.EqualValues(t, 600, h.must(h.read("roles/team.b-1")).Data["effective_ttl"], "the default ttl is no longer than max_ttl")
	for _, at := range []string{"roles", "roles/"} {
		require.Equal(t, []string{"app", "team.b-1"}, h.must(h.list(at)).Data["keys"])
	}
	h.must(h.remove("roles/app"))
	h.must(h.remove("roles/app"))
	resp, err := h.read("roles/app")
	require.NoError(t, err)
	require.Nil(t, resp)
}

func TestRoles_BadInput(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	archived := h.sim.AddProject("old")
	h.sim.ArchiveProject(archived)
	huge := strings.Repeat("x", 1<<20)

	for name, test := range map[string]struct {
		data map[string]any
		said string
	}{
		"no project":               {map[string]any{"ttl": "1h"}, "project_id is required"},
		"empty project":            {map[string]any{"project_id": ""}, "project_id is required"},
		"unknown project":          {map[string]any{"project_id": "proj_unknown"}, "vault list openai/projects"},
		"archived project":         {map[string]any{"project_id": archived}, "is archived"},
		"project with a slash":     {map[string]any{"project_id": "../admin_api_keys"}, "is not a valid ID"},
		"huge project":             {map[string]any{"project_id": huge}, "project_id"},
		"project not UTF-8":        {map[string]any{"project_id": "proj_\xff"}, "UTF-8"},
		"project with control":     {map[string]any{"project_id": "proj_\x07"}, "control character"},
		"ttl over max_ttl":         {map[string]any{"ttl": "2h", "max_ttl": "1h"}, "ttl 2h0m0s exceeds max_ttl 1h0m0s"},
		"ttl over default max_ttl": {map[string]any{"ttl": "25h"}, "exceeds max_ttl 24h"},
		"negative ttl":             {map[string]any{"ttl": "-1s"}, "ttl"},
		"negative max_ttl":         {map[string]any{"max_ttl": -5}, "max_ttl"},
		"overflowing ttl":          {map[string]any{"ttl": "99999999999999999h"}, "ttl"},
		"fraction of a second":     {map[string]any{"max_ttl": "400ms"}, "max_ttl must be a duration in whole seconds"},
		"endless random":           {map[string]any{"service_account_name_template": "{{random 300000000}}{{.RandomSuffix}}"}, "random requires a length"},
		"nonsense ttl":             {map[string]any{"ttl": "tomorrow"}, "ttl"},
		"template without suffix":  {map[string]any{"service_account_name_template": "vault-{{.RoleName}}"}, `must contain {{.RandomSuffix}} unchanged`},
		"template cutting suffix":  {map[string]any{"service_account_name_template": "{{.RandomSuffix | truncate 4}}"}, `it renders as "ab3d"`},
		"template unknown field":   {map[string]any{"service_account_name_template": "{{.Nope}}{{.RandomSuffix}}"}, "Nope"},
		"template syntax":          {map[string]any{"service_account_name_template": "{{.RandomSuffix"}, "service_account_name_template"},
		"huge template":            {map[string]any{"service_account_name_template": huge}, "limit"},
		"template with control":    {map[string]any{"service_account_name_template": "{{.RandomSuffix}}\n-"}, "control character"},
		"huge description":         {map[string]any{"service_account_description": huge}, "limit"},
		"unknown field":            {map[string]any{"scope": "api.model.read"}, `unknown field: "scope"`},
	} {
		if _, ok := test.data["project_id"]; !ok && name != "no project" {
			test.data["project_id"] = h.project
		}
		said := h.refused(h.write("roles/app", test.data))
		require.Contains(t, said, test.said, name)
		resp, err := h.read("roles/app")
		require.NoError(t, err)
		require.Nil(t, resp, name)
	}
	require.Contains(t, h.refused(h.write("roles/"+strings.Repeat("r", 40000), map[string]any{"project_id": h.project})), "the limit is 128")
}

func TestRoles_ProjectIsNotVerifiedWithoutAnAdminKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	resp := h.must(h.write("roles/app", map[string]any{"project_id": "proj_later"}))
	require.Contains(t, resp.Warnings[0], "was not verified")
	require.Contains(t, h.refused(h.write("roles/app", map[string]any{"service_account_name_template": "x"})), "RandomSuffix")
}

func TestRoles_AnOutageIsAnUpstreamError(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	h.sim.Fail(openaitest.Fault{Status: 500, Message: "we broke"})
	_, err := h.write("roles/app", map[string]any{"project_id": h.project})
	require.ErrorContains(t, err, "we broke")
}

func TestRoles_ALongMaxTTLCausesAWarning(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	resp := h.must(h.write("roles/app", map[string]any{"project_id": h.project, "max_ttl": "1000h"}))
	require.Contains(t, resp.Warnings[0], "max_lease_ttl of the mount")
	h.tune(100000 * time.Hour)
	resp = h.must(h.write("roles/app", map[string]any{"max_ttl": "9000h"}))
	require.Contains(t, resp.Warnings[0], "exceeds the maximum key lifetime at OpenAI")
	lease := h.lease("creds/app", nil)
	require.Equal(t, maxLease, lease.Secret.MaxTTL)
	require.NoError(t, h.revoke(lease))
}

func TestRoles_Scopes(t *testing.T) {
	t.Parallel()
	many := func(n int) (all []string) {
		for i := range n {
			all = append(all, fmt.Sprintf("api.scope_%d.read", i))
		}
		return all
	}
	long := "api." + strings.Repeat("x", maxScope-4)
	for name, test := range map[string]struct {
		scopes any
		want   []string
		said   string // the error, "" if accepted
	}{
		"one":                             {"api.model.read", []string{"api.model.read"}, ""},
		"text with commas":                {"b.read,a.read", []string{"b.read", "a.read"}, ""},
		"text with commas and spaces":     {"b.read , a.read\n", []string{"b.read", "a.read"}, ""},
		"a list":                          {[]any{"b.read", "a.read"}, []string{"b.read", "a.read"}, ""},
		"a list with spaces":              {[]any{" b.read", "a.read "}, nil, "must not begin or end with a space"},
		"a list with line breaks":         {[]any{"b.read\n", "a.read"}, []string{"b.read", "a.read"}, ""},
		"twice":                           {"b.read,a.read,b.read", []string{"b.read", "a.read"}, ""},
		"twice, with spaces":              {"b.read, b.read", []string{"b.read"}, ""},
		"an unknown form":                 {"Model:Read/*", []string{"Model:Read/*"}, ""}, // OpenAI validates it
		"none":                            {"", []string{}, ""},
		"an empty list":                   {[]any{}, []string{}, ""},
		"the maximum number":              {many(maxScopes), many(maxScopes), ""},
		"repeated, of the maximum number": {append(many(maxScopes), many(maxScopes)...), many(maxScopes), ""},
		"the maximum length":              {long, []string{long}, ""},
		"an empty value":                  {"a.read,,b.read", nil, "must not contain empty values"},
		"an empty value at the end":       {"a.read,", nil, "must not contain empty values"},
		"only commas":                     {",,", nil, "must not contain empty values"},
		"blank":                           {" ", nil, "must not begin or end with a space"},
		"a list of an empty value":        {[]any{""}, nil, "must not contain empty values"},
		"a list with a blank value":       {[]any{"a.read", "\t"}, nil, "must not contain empty values"},
		"a list of null":                  {[]any{nil}, nil, "must not contain empty values"},
		"null":                            {nil, []string{"old.read", "old.write"}, ""},
		"null as text":                    {"null", nil, "must not contain null"},
		"null in upper case":              {"NULL", nil, "must not contain null"},
		"an empty list as text":           {"[]", nil, "is not an identifier"},
		"a bare list as text":             {"[a.read,b.read]", nil, "is not an identifier"},
		"an object as text":               {"{}", nil, "is not an identifier"},
		"single quotes":                   {"'a.read'", nil, "is not an identifier"},
		"an object":                       {map[string]any{}, nil, "must be a list"},
		"an object with a field":          {map[string]any{"a.read": true}, nil, "scopes"},
		"a comma in a value":              {[]any{"a.read,b.read"}, nil, `"a.read,b.read" is not an identifier`},
		"quotes":                          {`"a.read"`, nil, "is not an identifier"},
		"a list as text":                  {`["a.read","b.read"]`, nil, "is not an identifier"},
		"a space in a value":              {"a.read b.read", nil, "is not an identifier"},
		"a line break in a value":         {"a.read\nb.read", nil, "is not an identifier"},
		"a control character":             {"a.re\x00ad", nil, "is not an identifier"},
		"not ASCII":                       {"a.réad", nil, "is not an identifier"},
		"not UTF-8":                       {"a.\xff", nil, "is not an identifier"},
		"too long":                        {long + "x", nil, "has 129 characters; the limit is 128"},
		"huge":                            {strings.Repeat("x", 1<<20), nil, "the limit is 128"},
		"too many":                        {many(maxScopes + 1), nil, "scopes has 101 entries; the limit is 100"},
		"a list in a list":                {[]any{[]any{"a.read"}}, nil, "scopes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.role(map[string]any{"scopes": "old.read,old.write"})
			resp, err := h.write("roles/app", map[string]any{"scopes": test.scopes})
			if test.said != "" {
				require.Contains(t, h.refused(resp, err), test.said)
				require.Equal(t, []string{"old.read", "old.write"}, h.must(h.read("roles/app")).Data["scopes"])
				return
			}
			h.must(resp, err)
			require.Equal(t, test.want, h.must(h.read("roles/app")).Data["scopes"])
			if len(test.want) == 0 {
				require.Contains(t, resp.Warnings[0], "no longer has scopes")
			} else {
				require.Nil(t, resp)
			}
			h.must(h.write("roles/app", map[string]any{"ttl": "5m"}))
			require.Equal(t, test.want, h.must(h.read("roles/app")).Data["scopes"], "a partial write keeps the scopes")
		})
	}
}

func TestRoles_BadModes(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.sim.AddServiceAccount(h.project, "batch")
	for name, test := range map[string]struct {
		data map[string]any
		said string
	}{
		"key_expiry":                      {map[string]any{"key_expiry": "never"}, `key_expiry must be one of max_ttl, ttl, none, not "never"`},
		"huge key_expiry":                 {map[string]any{"key_expiry": strings.Repeat("x", 1<<20)}, "must be one of"},
		"credential_type":                 {map[string]any{"credential_type": "API_KEY"}, `must be one of service_account, api_key, not "API_KEY"`},
		"api_key without an account":      {map[string]any{"credential_type": "api_key"}, "credential_type=api_key requires service_account_id"},
		"api_key with a blank account":    {map[string]any{"credential_type": "api_key", "service_account_id": "\n"}, "requires service_account_id"},
		"an account without api_key":      {map[string]any{"service_account_id": account}, "service_account_id requires credential_type=api_key"},
		"an account with service_account": {map[string]any{"credential_type": "service_account", "service_account_id": account}, "requires credential_type=api_key"},
		"an account that is a path":       {map[string]any{"credential_type": "api_key", "service_account_id": "../" + account}, "is not a valid ID"},
		"an account of several lines":     {map[string]any{"credential_type": "api_key", "service_account_id": "user-1\nuser-2"}, "control character"},
		"activation that is too long":     {map[string]any{"activation_timeout": "46s"}, "between 0 and 45s"},
		"activation that is negative":     {map[string]any{"activation_timeout": -1}, "activation_timeout"},
		"activation of half a second":     {map[string]any{"activation_timeout": "500ms"}, "whole seconds"},
		"activation that is no duration":  {map[string]any{"activation_timeout": "soon"}, "activation_timeout"},
		"activation that is very long":    {map[string]any{"activation_timeout": "99999999h"}, "activation_timeout"},
	} {
		before := h.must(h.read("roles/app")).Data
		require.Contains(t, h.refused(h.write("roles/app", test.data)), test.said, name)
		require.Equal(t, before, h.must(h.read("roles/app")).Data, name)
	}
	h.must(h.write("roles/app", map[string]any{"activation_timeout": "45s", "key_expiry": "none", "scopes": scopeChat}))
	data := h.must(h.read("roles/app")).Data
	require.EqualValues(t, 45, data["activation_timeout"])
	require.EqualValues(t, 0, data["effective_key_lifetime"])
}

func TestRoles_WarnAboutRiskySettings(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	require.Contains(t, h.role(map[string]any{"key_expiry": "none"}).Warnings[0], "stays valid until you delete it at OpenAI")
	h.tune(100000 * time.Hour)
	require.Contains(t, h.role(map[string]any{"max_ttl": "9000h"}).Warnings[0], "leases expire after "+maxLease.String())
	require.Nil(t, h.role(map[string]any{"max_ttl": "9000h", "key_expiry": "ttl"}), "renewals extend the key")
	require.Contains(t, h.role(map[string]any{"ttl": "9000h", "max_ttl": "9000h", "key_expiry": "ttl"}).Warnings[0], "and renewals can extend it")
	require.Len(t, h.role(map[string]any{"max_ttl": "9000h", "key_expiry": "none"}).Warnings, 1)
	data := h.must(h.read("roles/app")).Data
	require.EqualValues(t, 9000*3600, data["effective_max_ttl"])
}

func TestRoles_AnAdoptedAccountIsVerifiedWhenItIsSet(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.sim.AddServiceAccount(h.project, "batch")
	elsewhere := h.sim.AddServiceAccount(h.sim.AddProject("other"), "batch elsewhere")
	lease := h.lease("creds/app", nil)
	adopt := func(id string) (map[string]any, string) {
		data := map[string]any{"project_id": h.project, "credential_type": "api_key", "service_account_id": id}
		return data, "roles/batch"
	}
	refuse := func(id string) string {
		data, at := adopt(id)
		said := h.refused(h.write(at, data))
		resp, err := h.read(at)
		require.NoError(t, err)
		require.Nil(t, resp, "a rejected write stores nothing")
		return said
	}
	require.Contains(t, refuse("user-unknown"), `service account "user-unknown" not found`)
	require.Contains(t, refuse(elsewhere), "not found in project")
	require.Contains(t, refuse(lease.Data["service_account_id"].(string)), "belongs to a lease or static role of this mount")
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeAccount, Times: 1, Status: 403, Body: `{"error":"Missing scopes: api.management.read."}`})
	data, at := adopt(account)
	_, err := h.write(at, data)
	require.ErrorContains(t, err, "api.management.read")
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeAccount, Times: 4, Status: 500})
	_, err = h.write(at, data)
	require.Equal(t, 502, coded(t, err))

	require.Nil(t, h.must(h.write(at, data)))
	shown := h.must(h.read(at)).Data
	require.Equal(t, account, shown["service_account_id"])
	require.Equal(t, typeKey, shown["credential_type"])

	// The keys of an account without a role have no permissions yet.
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeAccount, Times: 1, Kind: openaitest.FaultGarbageBefore,
		Body: `{"object":"organization.project.service_account","id":"` + account + `","name":"batch","role":"none","created_at":1767225600}`})
	h.must(h.remove(at))
	require.Contains(t, h.must(h.write(at, data)).Warnings[0], `has the role "none" in project`)

	// Another credential_type drops the account, and a change back does not restore it.
	h.must(h.write(at, map[string]any{"credential_type": "service_account"}))
	require.Empty(t, h.must(h.read(at)).Data["service_account_id"])
	require.Contains(t, h.refused(h.write(at, map[string]any{"credential_type": "api_key"})), "requires service_account_id")

	// An account belongs to one project.
	h.must(h.write(at, data))
	require.Contains(t, h.refused(h.write(at, map[string]any{"project_id": h.sim.AddProject("third")})), "not found in project")
	require.NoError(t, h.revoke(lease))
}

func TestRoles_AnAccountIsNotVerifiedWithoutAnAdminKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	first, second := h.sim.AddServiceAccount(h.project, "first"), h.sim.AddServiceAccount(h.project, "second")
	h.configure(nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project, "credential_type": "api_key", "service_account_id": first}))
	h.must(h.remove("config"))
	resp := h.must(h.write("roles/app", map[string]any{"service_account_id": second}))
	require.Len(t, resp.Warnings, 2)
	require.Contains(t, resp.Warnings[1], second)
	h.configure(nil)
	lease := h.lease("creds/app", nil)
	require.Equal(t, second, lease.Data["service_account_id"])
	require.Empty(t, lease.Data["service_account"], "not the name of the first account")
	require.NoError(t, h.revoke(lease))
	h.must(h.write("roles/app", map[string]any{"ttl": "5m"}))
	lease = h.lease("creds/app", nil)
	require.Equal(t, "second", lease.Data["service_account"])
	require.NoError(t, h.revoke(lease))
}

func TestRoles_DefaultToTheConfigsProject(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	second := h.sim.AddProject("second")
	archived := h.sim.AddProject("old")
	h.sim.ArchiveProject(archived)
	require.Contains(t, h.refused(h.write("roles/app", nil)), "project_id is required, because the config has no default")

	for value, said := range map[string]string{
		"proj_unknown": "vault list openai/projects", archived: "is archived", "a/b": "is not a valid ID", "a\nb": "control character", strings.Repeat("p", 2000): "limit",
	} {
		require.Contains(t, h.refused(h.write("config", map[string]any{"project_id": value})), said)
		require.Empty(t, h.must(h.read("config")).Data["project_id"])
		require.Empty(t, h.recorded())
	}
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/projects/{project_id}", Times: 4, Status: 500, Message: "we broke"})
	_, err := h.write("config", map[string]any{"project_id": h.project})
	require.Equal(t, 502, coded(t, err))
	require.Empty(t, h.must(h.read("config")).Data["project_id"])

	h.must(h.write("config", map[string]any{"project_id": h.project}))
	require.Equal(t, h.project, h.must(h.read("config")).Data["project_id"])
	require.Equal(t, []string{h.project}, h.recorded(), "tidy searches the project")
	h.must(h.write("roles/app", nil))
	data := h.must(h.read("roles/app")).Data
	require.Empty(t, data["project_id"])
	require.Equal(t, h.project, data["effective_project_id"])
	lease := h.lease("creds/app", nil)
	require.Equal(t, h.project, lease.Data["project_id"])

	// A change affects only new credentials.
	h.must(h.write("config", map[string]any{"project_id": second}))
	require.ElementsMatch(t, []string{h.project, second}, h.recorded())
	require.Equal(t, second, h.must(h.read("roles/app")).Data["effective_project_id"])
	other := h.lease("creds/app", nil)
	require.Equal(t, second, other.Data["project_id"])
	h.onlyLeased(lease, other)
	require.NoError(t, h.revoke(lease))

	// The role's own project takes precedence until it is cleared.
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Equal(t, h.project, h.must(h.read("roles/app")).Data["effective_project_id"])
	h.must(h.write("roles/app", map[string]any{"project_id": ""}))
	require.Equal(t, second, h.must(h.read("roles/app")).Data["effective_project_id"])

	// Without either, the role issues nothing; existing leases are unaffected.
	h.must(h.write("config", map[string]any{"project_id": ""}))
	require.Empty(t, h.must(h.read("roles/app")).Data["effective_project_id"])
	h.sim.ResetRequests()
	require.Contains(t, h.refused(h.read("creds/app")), `role "app" has no project_id, and the config has no default`)
	require.Zero(t, h.sim.Count("", ""))
	_, err = h.renew(t.Context(), other, time.Minute, 0)
	require.NoError(t, err)
	require.NoError(t, h.revoke(other))

	// With skip_verify, the config stores the default unverified.
	h.must(h.write("config", map[string]any{"project_id": "proj_later", "skip_verify": true}))
	require.Equal(t, "proj_later", h.must(h.read("roles/app")).Data["effective_project_id"])
	require.Contains(t, h.refused(h.read("creds/app")), "proj_later")
	h.must(h.write("roles/app", map[string]any{"ttl": "5m"})) // unchanged values are not verified
	require.Contains(t, h.refused(h.write("roles/app", map[string]any{"project_id": "proj_sooner"})), `project "proj_sooner" not found`)
	h.must(h.write("config", map[string]any{"request_timeout": "20s"})) // unchanged values are not verified
	h.must(h.remove("config"))
	require.Contains(t, h.refused(h.write("roles/app", map[string]any{"ttl": "5m"})), "project_id is required")
	h.onlyLeased()
}

func TestRoles_AnArchivedDefaultProjectDoesNotBlockConfigWrites(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(map[string]any{"project_id": h.project})
	h.sim.ArchiveProject(h.project)
	_, key := h.sim.AddAdminKey("another")
	h.must(h.write("config", map[string]any{"admin_api_key": key, "project_id": h.project}))
}

// Each write changes only its own fields, even if another write runs at the same time: an
// older read of the role must not undo a narrowing or restore a deleted role.
func TestRoles_WritesAtTheSameTimeAreBothStored(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		meanwhile func(h *harness)
		check     func(h *harness, resp *logical.Response, err error)
	}{
		"narrowed": {
			func(h *harness) { h.must(h.write("roles/app", fields{"scopes": scopeChat})) },
			func(h *harness, resp *logical.Response, err error) {
				h.must(resp, err)
				data := h.must(h.read("roles/app")).Data
				require.Equal(h.t, []string{scopeChat}, data["scopes"])
				require.EqualValues(h.t, 1800, data["ttl"])
			},
		},
		"written often": {
			func(h *harness) {
				for i := range 20 {
					h.must(h.write("roles/app", fields{"service_account_description": fmt.Sprint(i)}))
				}
			},
			func(h *harness, resp *logical.Response, err error) {
				h.must(resp, err)
				data := h.must(h.read("roles/app")).Data
				require.Equal(h.t, "19", data["service_account_description"])
				require.EqualValues(h.t, 1800, data["ttl"])
			},
		},
		"deleted": {
			func(h *harness) {
				h.must(h.write("config", fields{"project_id": h.project})) // enough for a new role
				h.must(h.remove("roles/app"))
			},
			func(h *harness, resp *logical.Response, err error) {
				require.ErrorContains(h.t, resp.Error(), `role "app" not stored: it was deleted during the write`)
				require.NoError(h.t, err)
				resp, err = h.read("roles/app")
				require.NoError(h.t, err)
				require.Nil(h.t, resp)
			},
		},
		"created": {
			func(h *harness) {
				h.must(h.remove("roles/app"))
				h.must(h.write("roles/app", fields{"project_id": h.project, "scopes": scopeChat, "max_ttl": "2h"}))
			},
			func(h *harness, resp *logical.Response, err error) {
				h.must(resp, err)
				data := h.must(h.read("roles/app")).Data
				require.Equal(h.t, []string{scopeChat}, data["scopes"])
				require.EqualValues(h.t, 7200, data["max_ttl"])
				require.EqualValues(h.t, 1800, data["ttl"])
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.KeepAll()
			h.must(h.write("roles/app", fields{"scopes": []string{scopeChat, "api.responses.write"}}))
			watched := &watchedStorage{Storage: h.storage}
			held := watched.holdAt(roleStoragePrefix + "app")
			var resp *logical.Response
			var err error
			var writing sync.WaitGroup
			writing.Go(func() {
				resp, err = h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.UpdateOperation, Path: "roles/app", Storage: watched, Data: fields{"ttl": "30m"}, MountPoint: "openai/"})
			})
			<-held.entered // it has read the role
			test.meanwhile(h)
			close(held.release)
			writing.Wait()
			test.check(h, resp, err)
		})
	}
}

// A write that waits for another one, whose storage hangs, ends with its request.
func TestRoles_AWaitForAnotherWriteEndsWithTheRequest(t *testing.T) {
	t.Parallel()
	for _, key := range []string{longestLeaseStorageKey, "project/"} {
		t.Run(key, func(t *testing.T) {
			t.Parallel()
			inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
				h.configure(nil)
				held, watched := newHold(), &watchedStorage{Storage: h.storage}
				var reads atomic.Int64
				watched.fail(func(at string) error {
					// The first read of a project is before the lock.
					if strings.HasPrefix(at, key) && reads.Add(1) == map[bool]int64{true: 1, false: 2}[key == longestLeaseStorageKey] {
						watched.next.Store(held)
					}
					return nil
				}, nil)
				write := func(ctx context.Context, name string) error {
					resp, err := h.b.HandleRequest(ctx, &logical.Request{Operation: logical.CreateOperation, Path: "roles/" + name, Storage: watched, Data: fields{"project_id": h.project}, MountPoint: "openai/"})
					return errors.Join(err, resp.Error())
				}
				var writing sync.WaitGroup
				var first error
				writing.Go(func() { first = write(t.Context(), "first") })
				<-held.entered
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				require.ErrorContains(t, write(ctx, "second"), `role "second" not stored: waiting for another write of the `)
				close(held.release)
				writing.Wait()
				require.NoError(t, first)
				require.NoError(t, write(t.Context(), "second"))
			})
		})
	}
}

// The first role of a mount is written while the first config creates the tag.
func TestRoles_ALongLeaseIsKeptWhileTheTagIsMade(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.sim.KeepAll()
	watched := &watchedStorage{Storage: h.storage}
	held := watched.holdAt(longestLeaseStorageKey)
	_, key := h.sim.AdminKey()
	var resp *logical.Response
	var err error
	var writing sync.WaitGroup
	writing.Go(func() {
		resp, err = h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.CreateOperation, Path: "config", Storage: watched, Data: fields{"admin_api_key": key, "api_endpoint": h.sim.URL()}, MountPoint: "openai/"})
	})
	<-held.entered
	var second sync.WaitGroup
	second.Go(func() { h.must(h.write("roles/app", fields{"project_id": h.project, "max_ttl": "480h"})) })
	time.Sleep(100 * time.Millisecond) // until the write is stored or waits for the lock
	close(held.release)
	writing.Wait()
	second.Wait()
	h.must(resp, err)
	entry, err := getLongestLease(t.Context(), h.storage)
	require.NoError(t, err)
	require.Equal(t, "480h0m0s", entry.LongestLease.String())
}
