package openaisecrets

// The interpretation of written values, derived from the paths' schemas, so that it
// covers new fields, but not what their values do.

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/sysview"
	"vault-plugin-secrets-openai/internal/text"
)

// changing are fields of reads that change without a write.
var changing = []string{"wal_entries", "wal_oldest_entry", "effective_ttl", "effective_max_ttl", "effective_key_lifetime", "effective_key_ttl", "pool_ready", "pool_refilling"}

// TestWrites_EveryFieldOfEveryPath writes values according to the field's type.
func TestWrites_EveryFieldOfEveryPath(t *testing.T) {
	t.Parallel()
	const key = "sk-svcacct-0123456789012345678901234567890123456789"
	walked := 0
	for _, p := range newBackend().Paths {
		entry := p.Operations[logical.CreateOperation] != nil
		if !entry && p.Operations[logical.UpdateOperation] == nil {
			continue
		}
		at := strings.TrimPrefix(readablePath(p.Pattern), "openai/")
		at = strings.Replace(at, ":name", map[bool]string{true: "batch", false: "app"}[strings.Contains(at, "static") || strings.Contains(at, "rotate-role")], 1)
		for name, field := range p.Fields {
			if strings.Contains(p.Pattern, "(?P<"+name+">") {
				continue
			}
			walked++
			t.Run(at+" "+name, func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.holdStatic()
				h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_schedule": "0 2 * * *", "rotation_window": "2h", "scopes": "api.model.read"}))
				defer func() { h.must(h.remove("static-roles/batch")) }()
				h.must(h.write("config", map[string]any{"rotation_schedule": "0 2 * * *", "rotation_window": "2h", "allow_insecure_endpoint": true}))
				h.role(map[string]any{"scopes": "b.read,a.read", "service_account_description": "for the app", "ttl": "30m"})

				// unchanged requires that a write, accepted or rejected, changes nothing.
				unchanged := func(what string, value any, refused bool) {
					t.Helper()
					if !entry && !refused {
						return // the write would have an effect
					}
					var before map[string]any
					if entry {
						before = h.shows(at)
					}
					resp, err := h.write(at, map[string]any{name: value})
					if refused {
						said := h.refused(resp, err)
						require.Contains(t, said, name, what)
						require.NotContains(t, said, key, what)
					} else {
						h.must(resp, err)
					}
					if entry {
						require.Equal(t, before, h.shows(at), what)
					}
				}
				text, list, number, duration := field.Type == framework.TypeString, field.Type == framework.TypeCommaStringSlice, field.Type == framework.TypeInt, field.Type == framework.TypeDurationSecond
				unchanged("null", nil, false)
				unchanged("an object", map[string]any{"a": key}, true)
				unchanged("padded", " 1", true)
				unchanged("padded behind", "1 ", true)
				unchanged("two line breaks", "1\n\n", true)
				if !list {
					unchanged("a list", []any{key}, true)
				}
				if text {
					unchanged("a number", 5, true)
					unchanged("too large", strings.Repeat("x", 1<<17), true)
				}
				if name != "admin_api_key" {
					unchanged("a key", key, true)
					unchanged("a key in a sentence", "see "+key+", please", true)
				}
				if list {
					unchanged("a padded element", []any{" a.read"}, true)
					unchanged("an element that is null", []any{nil}, true)
					unchanged("an element of another type", []any{5}, true)
					unchanged("null as text", "null", true)
					unchanged("too large", strings.Repeat("x,", 1<<16), true)
				}
				if !text && !list {
					unchanged("empty", "", false)
					unchanged("a line break", "\n", false)
					unchanged("a fraction", json.Number("0.9"), true)
				}
				if number || duration {
					unchanged("too small", -1, true)
					unchanged("too large", json.Number("99999999999999999999"), true)
					unchanged("another fraction", json.Number("1.5"), true)
				}
				if duration {
					unchanged("half a second", "500ms", true)
					unchanged("0.9 seconds", "0.9s", true)
					unchanged("no duration", "soon", true)
				}
				if !entry {
					return
				}
				// A value from a read is accepted with a final line break, too.
				shown, is := h.shows(at)[name]
				if value := fmt.Sprint(shown); is && !list && value != "" {
					unchanged("a final line break", value+"\n", false)
				}
				// Zero and empty values are rejected, or read back as written.
				for _, value := range map[bool][]any{true: {""}, false: {0, "0"}}[text] {
					if list || !is {
						continue
					}
					if resp, err := h.write(at, map[string]any{name: value}); err == nil && !resp.IsError() {
						want := fmt.Sprint(value)
						if field.Type == framework.TypeBool {
							want = "false"
						}
						require.Equal(t, want, fmt.Sprint(h.shows(at)[name]))
						before := h.shows(at)
						h.must(h.write(at, map[string]any{name: value}))
						require.Equal(t, before, h.shows(at), "a second write changes nothing")
					}
				}
				require.NotContains(t, h.log.String(), key)
			})
		}
	}
	require.Greater(t, walked, 35)
}

// The values with which an entry is created read back as written, each field alone and
// all together, so that a tool that compares the two, such as Terraform, does not write
// them again.
func TestWrites_WhatIsWrittenReadsBack(t *testing.T) {
	t.Parallel()
	for _, p := range newBackend().Paths {
		if p.Operations[logical.CreateOperation] == nil {
			continue
		}
		at := strings.Replace(strings.TrimPrefix(readablePath(p.Pattern), "openai/"), ":name", "app", 1)
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			h := newHarness(t, openaitest.Options{})
			h.holdStatic()
			_, key := h.sim.AdminKey()
			base := map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()}
			if at != "config" {
				h.configure(nil)
				base = map[string]any{"project_id": h.project}
			}
			if strings.HasPrefix(at, "static") {
				base["rotation_period"] = 3600
			}
			apply := func(body map[string]any) (taken bool) {
				t.Helper()
				if resp, err := h.write(at, body); err != nil || resp.IsError() {
					h.refused(resp, err)
					return false
				}
				read := h.shows(at)
				for name, value := range body {
					if shown, is := read[name]; is {
						require.Equal(t, fmt.Sprint(value), fmt.Sprint(shown), name)
					}
				}
				h.must(h.write(at, body))
				require.Equal(t, read, h.shows(at), "a second apply changes nothing: %v", body)
				return true
			}
			all := maps.Clone(base)
			for name, field := range p.Fields {
				if strings.Contains(p.Pattern, "(?P<"+name+">") {
					continue
				}
				var zero any
				switch field.Type {
				case framework.TypeString:
					zero = ""
				case framework.TypeCommaStringSlice:
					zero = []string{}
				case framework.TypeBool:
					zero = false
				default:
					zero = 0
				}
				body := maps.Clone(base)
				body[name] = zero
				taken := apply(body)
				if _, given := base[name]; taken && !given {
					all[name] = zero
				}
				if taken {
					h.must(h.remove(at))
				}
				require.True(t, apply(base), "without %s", name)
				apply(map[string]any{name: zero})
				h.must(h.remove(at))
			}
			require.Greater(t, len(all), 8)
			require.True(t, apply(all), "%v", all)
			if at != "config" {
				h.must(h.remove(at))
			}
		})
	}
}

// Writing back a complete read changes nothing.
func TestWrites_AReadCanBeWrittenBack(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.holdStatic()
	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "service_account_id": "", "rotation_period": "24h"}))
	h.must(h.write("roles/app", map[string]any{"ttl": 0, "max_ttl": 0, "key_expiry": "", "credential_type": "", "service_account_name_template": "", "scopes": "b.read,a.read,b.read"}))
	require.Equal(t, []any{int64(0), int64(0), "", "", "", []string{"b.read", "a.read"}}, func() (got []any) {
		data := h.must(h.read("roles/app")).Data
		for _, name := range []string{"ttl", "max_ttl", "key_expiry", "credential_type", "service_account_name_template", "scopes"} {
			got = append(got, data[name])
		}
		return got
	}())
	for _, at := range []string{"config", "roles/app", "static-roles/batch"} {
		before := h.must(h.read(at)).Data
		resp := h.must(h.write(at, before))
		require.NotNil(t, resp, at)
		require.Contains(t, strings.Join(resp.Warnings, " "), "Ignored read-only fields: ", at)
		require.Equal(t, before, h.must(h.read(at)).Data, at)
		require.Contains(t, h.refused(h.write(at, map[string]any{"effective_tll": 1})), `unknown field: "effective_tll"`)
	}
	require.Contains(t, h.refused(h.write("creds/app", map[string]any{"api_key_id": "x"})), "unknown field", "creds has no read-only fields")
	h.must(h.remove("static-roles/batch"))
}

func TestRoles_NarrowingDoesNotRequireOpenAI(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(map[string]any{"scopes": "a.read,b.read"})
	h.sim.ResetRequests()
	h.sim.Fail(openaitest.Fault{Status: http.StatusServiceUnavailable})
	for _, data := range []map[string]any{
		{"project_id": h.project, "credential_type": typeKey, "service_account_id": account, "scopes": "a.read,b.read"},
		{"ttl": "5m"}, {"scopes": "a.read"}, {"max_ttl": "10m"},
	} {
		h.must(h.write("roles/app", data))
	}
	require.Zero(t, h.sim.Count("", ""))
	_, err := h.write("roles/app", map[string]any{"project_id": "proj_other"})
	require.Error(t, err)
	h.sim.ClearFaults()
	h.sim.DeleteServiceAccount(h.project, account)
}

func TestRoles_WithoutATTLFollowAShorterMount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	require.Nil(t, h.role(nil), "no warning for an untuned mount")
	h.system.DefaultLeaseTTLVal = 20 * time.Minute
	time.Sleep(sysview.FreshFor)
	require.Contains(t, h.role(nil).Warnings[0], "the TTL of leases is 20m0s")
	require.EqualValues(t, 1200, h.must(h.read("roles/app")).Data["effective_ttl"])
	lease := h.lease("creds/app", nil)
	require.Equal(t, 20*time.Minute, lease.Secret.TTL)
	require.Empty(t, lease.Warnings)
	require.NoError(t, h.revoke(lease))
	require.Nil(t, h.role(map[string]any{"ttl": "2h"}))
	require.EqualValues(t, 7200, h.must(h.read("roles/app")).Data["effective_ttl"])
}

func TestPaths_RejectANameThatVaultCannotStore(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for _, at := range []string{"roles/a..b", "static-roles/a..b", "creds/a..b", "static-creds/a..b", "rotate-role/a..b"} {
		require.NotNil(t, h.b.Route(at), at)
		for _, op := range []logical.Operation{logical.ReadOperation, logical.UpdateOperation, logical.DeleteOperation} {
			require.Contains(t, h.refused(h.do(context.Background(), op, at, nil)), "two consecutive dots", at)
		}
	}
}

func TestSchedule_AWindowAppliesToTheStoredSchedule(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_schedule": "0 2 * * *"}))
	h.must(h.write("config", map[string]any{"rotation_window": "2h"}))
	require.EqualValues(t, 7200, h.config()["rotation_window"])
	require.Equal(t, "0 2 * * *", h.config()["rotation_schedule"])
}

func TestStatic_RotationCanBePaused(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	key, end := h.staticCreds("batch")["api_key_id"], h.staticTime("batch", "api_key_expires_at")
	resp := h.must(h.write("static-roles/batch", fields{"disable_automated_rotation": true}))
	require.Contains(t, resp.Warnings[0], "expires at OpenAI at "+text.Time(end))
	require.Nil(t, h.staticRole("batch")["next_vault_rotation"])
	require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
	h.restartStatic() // the due times are read from storage
	h.until(end.Add(-48 * time.Hour))
	h.runStaticWorker()
	resp = h.must(h.read("static-creds/batch"))
	require.Equal(t, key, resp.Data["api_key_id"])
	require.InDelta(t, 48*3600, resp.Data["ttl"], 60)
	require.Contains(t, resp.Warnings[0], "Rotation is paused")
	require.Contains(t, resp.Warnings[0], "expires at OpenAI at "+text.Time(end))
	h.until(end.Add(time.Minute))
	for _, resp := range []*logical.Response{h.must(h.read("static-creds/batch")), h.must(h.write("static-roles/batch", fields{"service_account_description": "paused"}))} {
		require.Len(t, resp.Warnings, 1)
		require.Contains(t, resp.Warnings[0], "expired at OpenAI at "+text.Time(end))
		require.Contains(t, resp.Warnings[0], "disable_automated_rotation=false")
	}
	h.must(h.write("static-roles/batch", fields{"disable_automated_rotation": false}))
	h.runStaticWorker()
	require.NotEqual(t, key, h.staticCreds("batch")["api_key_id"])
	require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
	h.deleteStaticRole("batch")
}

func TestStatic_NarrowingDoesNotRequireOpenAI(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"scopes": "api.model.read,api.model.request"})
	first := h.staticCreds("batch")["api_key_id"]
	h.sim.Fail(openaitest.Fault{Status: http.StatusServiceUnavailable})
	h.sim.ResetRequests()
	h.must(h.write("static-roles/batch", fields{"rotation_period": "12h", "scopes": "api.model.read,api.model.request"}))
	require.Zero(t, h.sim.Count("", ""))
	_, err := h.write("static-roles/batch", fields{"scopes": "api.model.read,api.other"})
	require.Error(t, err, "an additional scope is not a narrowing")
	resp := h.must(h.write("static-roles/batch", fields{"scopes": "api.model.read"}))
	require.Contains(t, resp.Warnings[0], "keeps its previous scopes until a rotation succeeds")
	require.Equal(t, []string{"api.model.read"}, h.staticRole("batch")["scopes"])
	require.Equal(t, first, h.staticCreds("batch")["api_key_id"])
	h.sim.ClearFaults()
	h.advance(time.Minute)
	h.runStaticWorker()
	require.NotEqual(t, first, h.staticCreds("batch")["api_key_id"])
	h.runPeriodicWork()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// A default follows the other fields and never causes a rejection.
func TestStatic_TheDefaultRevocationDelayFollowsTheSchedule(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "24h"})
	delay := func(want int, data fields) {
		t.Helper()
		h.must(h.write("static-roles/batch", data))
		require.EqualValues(t, want, h.staticRole("batch")["revocation_delay"])
	}
	delay(300, fields{"rotation_period": "5m"})
	delay(300, fields{"service_account_description": "for the nightly batch"})
	delay(360, fields{"rotation_period": "24h"})
	delay(60, fields{"rotation_schedule": "* * * * *"})
	delay(360, fields{"rotation_period": "24h"})
	delay(360, h.must(h.read("static-roles/batch")).Data) // it keeps the default
	delay(300, fields{"rotation_period": "5m"})

	// Changing one field of a read sets that field.
	edited := h.must(h.read("static-roles/batch")).Data
	edited["rotation_period"] = "24h"
	delay(300, edited)
	delay(300, fields{"service_account_description": "another"})

	delay(360, fields{"revocation_delay": "6m"})
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"rotation_period": "5m"})), "revocation_delay must be between 0 and 5m0s")
	delay(0, fields{"revocation_delay": 0})
	delay(0, fields{"rotation_period": "12h"})
	h.deleteStaticRole("batch")
}

// A default that becomes shorter with the schedule deletes no key early.
func TestStatic_AShorterDefaultDelayDoesNotApplyToSupersededKeys(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "24h"})
	h.must(h.write("rotate-role/batch", nil))
	before := h.must(h.read("static-creds/batch")).Data["previous_api_key_expires_at"]
	require.NotNil(t, before)
	h.must(h.write("static-roles/batch", fields{"rotation_period": "1m"}))
	require.EqualValues(t, 60, h.staticRole("batch")["revocation_delay"])
	require.Equal(t, before, h.must(h.read("static-creds/batch")).Data["previous_api_key_expires_at"])
	h.deleteStaticRole("batch")
}

// A write of an empty ID with skip_verify keeps the known ID.
func TestConfig_AnEmptyIDWithSkipVerifyKeepsTheKnownID(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	id, key := h.sim.AdminKey()
	ids := func() []any {
		data := h.config()
		return []any{data["admin_api_key_id"], data["effective_admin_api_key_id"]}
	}
	require.Equal(t, []any{id, id}, ids())
	for range 2 {
		h.must(h.write("config", fields{"admin_api_key": key, "admin_api_key_id": "", "skip_verify": true}))
		require.Equal(t, []any{"", id}, ids())
	}
	h.must(h.write("config/rotate", nil))
	require.Empty(t, h.config()["admin_api_key_id"], "as it was written")
	require.NotEqual(t, id, h.config()["effective_admin_api_key_id"])
	h.must(h.write("config", fields{"admin_api_key_id": "", "tidy_interval": "6h"}))

	// The ID of an unverified key is looked up later, and still reads back as written.
	other, otherKey := h.sim.AddAdminKey("other")
	h.must(h.write("config", fields{"admin_api_key": otherKey, "admin_api_key_id": "", "skip_verify": true, "force": true}))
	require.Equal(t, []any{"", ""}, ids())
	h.runPeriodicWork()
	require.Equal(t, []any{"", other}, ids())
	h.must(h.write("config", fields{"admin_api_key_id": other}))
	require.Equal(t, []any{other, other}, ids())
}
