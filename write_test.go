package openaisecrets

// What a written value means, walked from the paths' own schemas: a new field is
// held to it without a line here.

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
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
var changing = []string{"journal_entries", "journal_oldest", "effective_ttl", "effective_max_ttl", "effective_key_lifetime", "effective_key_ttl"}

// shows is what a read shows of an entry that a write can have changed.
func (h *harness) shows(at string) map[string]any {
	h.t.Helper()
	data := maps.Clone(h.must(h.read(at)).Data)
	maps.DeleteFunc(data, func(name string, _ any) bool { return slices.Contains(changing, name) })
	return data
}

// TestWrites_EveryFieldOfEveryPath is the table of what each kind of value means.
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
		at = strings.Replace(at, "<name>", map[bool]string{true: "batch", false: "app"}[strings.Contains(at, "static") || strings.Contains(at, "rotate-role")], 1)
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

				// unchanged, refused: what storage holds is what it held.
				unchanged := func(what string, value any, refused bool) {
					t.Helper()
					if !entry && !refused {
						return // it would act
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
					unchanged("too large", strings.Repeat("x", 1<<20), true)
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
					unchanged("too large", strings.Repeat("x,", 1<<20), true)
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
				// What a read shows is taken with the line break of a file, too.
				shown, is := h.shows(at)[name]
				if value := fmt.Sprint(shown); is && !list && value != "" {
					unchanged("a final line break", value+"\n", false)
				}
				// Zero and empty values are refused, or read as they were written.
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

// What is written at the creation of an entry reads as it was written, each field
// alone and all of them at once, so that a tool that compares the two, as Terraform
// does, has nothing to write again.
func TestWrites_WhatIsWrittenReadsBack(t *testing.T) {
	t.Parallel()
	for _, p := range newBackend().Paths {
		if p.Operations[logical.CreateOperation] == nil {
			continue
		}
		at := strings.Replace(strings.TrimPrefix(readablePath(p.Pattern), "openai/"), "<name>", "app", 1)
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

// A read that is written back, whole, changes nothing.
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
		require.Contains(t, strings.Join(resp.Warnings, " "), "Ignored fields that only a read shows: ", at)
		require.Equal(t, before, h.must(h.read(at)).Data, at)
		require.Contains(t, h.refused(h.write(at, map[string]any{"effective_tll": 1})), `unknown field: "effective_tll"`)
	}
	require.Contains(t, h.refused(h.write("creds/app", map[string]any{"api_key_id": "x"})), "unknown field", "a credential is no entry")
	h.must(h.remove("static-roles/batch"))
}

func TestRoles_NarrowingNeedsNoOpenAI(t *testing.T) {
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
	require.Nil(t, h.role(nil), "of an untuned mount there is nothing to say")
	h.system.DefaultLeaseTTLVal = 20 * time.Minute
	time.Sleep(sysview.FreshFor)
	require.Contains(t, h.role(nil).Warnings[0], "leases last 20m0s at first")
	require.EqualValues(t, 1200, h.must(h.read("roles/app")).Data["effective_ttl"])
	lease := h.lease("creds/app", nil)
	require.Equal(t, 20*time.Minute, lease.Secret.TTL)
	require.Empty(t, lease.Warnings)
	require.NoError(t, h.revoke(lease))
	require.Nil(t, h.role(map[string]any{"ttl": "2h"}))
	require.EqualValues(t, 7200, h.must(h.read("roles/app")).Data["effective_ttl"])
}

func TestPaths_ANameThatVaultCannotStoreIsRefused(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for _, at := range []string{"roles/a..b", "static-roles/a..b", "creds/a..b", "static-creds/a..b", "rotate-role/a..b"} {
		require.NotNil(t, h.b.Route(at), at)
		for _, op := range []logical.Operation{logical.ReadOperation, logical.UpdateOperation, logical.DeleteOperation} {
			require.Contains(t, h.refused(h.do(context.Background(), op, at, nil)), "two dots in a row", at)
		}
	}
}

func TestSchedule_AWindowAloneIsTakenWithAStoredSchedule(t *testing.T) {
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
	h.restartStatic() // what is due is read from storage, too
	h.until(end.Add(-48 * time.Hour))
	h.keep()
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
	h.keep()
	require.NotEqual(t, key, h.staticCreds("batch")["api_key_id"])
	require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
	h.gone("batch")
}

func TestStatic_NarrowingNeedsNoOpenAI(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"scopes": "api.model.read,api.model.request"})
	first := h.staticCreds("batch")["api_key_id"]
	h.sim.Fail(openaitest.Fault{Status: http.StatusServiceUnavailable})
	h.sim.ResetRequests()
	h.must(h.write("static-roles/batch", fields{"rotation_period": "12h", "scopes": "api.model.read,api.model.request"}))
	require.Zero(t, h.sim.Count("", ""))
	_, err := h.write("static-roles/batch", fields{"scopes": "api.model.read,api.other"})
	require.Error(t, err, "that is no narrowing")
	resp := h.must(h.write("static-roles/batch", fields{"scopes": "api.model.read"}))
	require.Contains(t, resp.Warnings[0], "keeps its former ones until a rotation succeeds")
	require.Equal(t, []string{"api.model.read"}, h.staticRole("batch")["scopes"])
	require.Equal(t, first, h.staticCreds("batch")["api_key_id"])
	h.sim.ClearFaults()
	h.advance(time.Minute)
	h.keep()
	require.NotEqual(t, first, h.staticCreds("batch")["api_key_id"])
	h.tick()
	h.onlyStatic()
	h.gone("batch")
}

// A value that nobody chose follows what was chosen, and refuses nothing.
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
	delay(360, h.must(h.read("static-roles/batch")).Data) // which chooses nothing
	delay(300, fields{"rotation_period": "5m"})

	// A read of which one field is changed says what it says.
	edited := h.must(h.read("static-roles/batch")).Data
	edited["rotation_period"] = "24h"
	delay(300, edited)
	delay(300, fields{"service_account_description": "another"})

	delay(360, fields{"revocation_delay": "6m"})
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"rotation_period": "5m"})), "revocation_delay must be between 0 and the 5m0s")
	delay(0, fields{"revocation_delay": 0})
	delay(0, fields{"rotation_period": "12h"})
	h.gone("batch")
}

// A default that gets shorter with the schedule ends no key early: nobody asked for
// that.
func TestStatic_AShorterDefaultDelayKeepsWhatWaits(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "24h"})
	h.must(h.write("rotate-role/batch", nil))
	before := h.must(h.read("static-creds/batch")).Data["previous_api_key_expires_at"]
	require.NotNil(t, before)
	h.must(h.write("static-roles/batch", fields{"rotation_period": "1m"}))
	require.EqualValues(t, 60, h.staticRole("batch")["revocation_delay"])
	require.Equal(t, before, h.must(h.read("static-creds/batch")).Data["previous_api_key_expires_at"])
	h.gone("batch")
}

// An ID that is known is not lost to a write that asks for it and looks for nothing.
func TestConfig_AnEmptyIDKeepsTheKnownOneUnchecked(t *testing.T) {
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

	// Of a key that was not looked at the ID is found later, and still reads as written.
	other, otherKey := h.sim.AddAdminKey("other")
	h.must(h.write("config", fields{"admin_api_key": otherKey, "admin_api_key_id": "", "skip_verify": true, "force": true}))
	require.Equal(t, []any{"", ""}, ids())
	h.tick()
	require.Equal(t, []any{"", other}, ids())
	h.must(h.write("config", fields{"admin_api_key_id": other}))
	require.Equal(t, []any{other, other}, ids())
}
