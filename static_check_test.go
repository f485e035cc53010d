package openaisecrets

// Static roles whose key or account an operator deletes at OpenAI.

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// check runs the check of static roles.
func (h *harness) check() {
	h.t.Helper()
	require.NoError(h.t, h.b.checkStaticRoles(client.Background(context.Background()), &logical.Request{Storage: h.storage, MountPoint: "openai/"}))
}

// daily runs the check a day later, and again ten minutes after it.
func (h *harness) daily() {
	h.t.Helper()
	h.advance(checkEvery)
	h.check()
	h.advance(confirmAfterFirst)
	h.check()
}

// byHand deletes the key or account of a static role at OpenAI, outside the engine.
func (h *harness) byHand(name, what string) (account, key string) {
	h.t.Helper()
	r := h.storedStatic(name)
	if what == missingAccount {
		h.sim.DeleteServiceAccount(h.project, r.ServiceAccountID)
	} else {
		require.NoError(h.t, h.api().DeleteProjectKey(context.Background(), h.project, r.Current.ID))
	}
	return r.ServiceAccountID, r.Current.ID
}

const missingLine = "static role key was deleted at OpenAI, not by this engine"

// slow prevents scheduled rotations during a test.
var slow = fields{"rotation_period": "720h"}

func withSlow(more fields) fields {
	all := fields{}
	for _, f := range []fields{slow, more} {
		for name, value := range f {
			all[name] = value
		}
	}
	return all
}

func TestStaticCheck_ReportsManualDeletions(t *testing.T) {
	t.Parallel()
	for _, what := range []string{missingKey, missingAccount} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.static("batch", slow)
			h.static("other", slow)
			adopted := h.adoptStatic("adopted", slow)
			h.check() // starts the first day
			account, key := h.byHand("batch", what)
			h.advance(checkEvery)
			h.check()
			require.Empty(t, h.staticRole("batch")["missing"], "one check proves nothing")
			h.advance(confirmAfterFirst - time.Second)
			h.check()
			require.Empty(t, h.staticRole("batch")["missing"], "two checks close together prove nothing")
			h.advance(time.Second)
			h.check()

			read := h.staticRole("batch")
			require.Equal(t, what, read["missing"])
			require.Equal(t, "warn", read["on_missing"])
			require.WithinDuration(t, h.now().Add(-confirmAfterFirst), h.staticTime("batch", "missing_since"), time.Minute)
			require.Nil(t, read["last_recreated"])
			said := h.lines(missingLine)
			require.Len(t, said, 1)
			require.Equal(t, []any{"batch", what, account, key}, []any{said[0]["static_role"], said[0]["missing"], said[0]["service_account_id"], said[0]["api_key_id"]})
			h.runStaticWorker() // reads the roles
			measured := h.measured()
			require.InDelta(t, 1, measured[fmt.Sprintf(`vault_openai_static_missing_total{missing=%q,static_role="batch"}`, what)], 0, measured)
			require.InDelta(t, 1, measured[`vault_openai_static_roles_missing{}`], 0)
			warning := h.warnings("static-creds/batch")
			for _, part := range []string{map[string]string{missingKey: key, missingAccount: account}[what], "deleted at OpenAI", "openai/rotate-role/batch"}[:2] {
				require.Contains(t, warning, part)
			}
			require.Empty(t, h.warnings("static-creds/other"))

			h.daily()
			require.Len(t, h.lines(missingLine), 1, "logged once")
			require.Equal(t, what, h.staticRole("batch")["missing"])
			h.restartStatic() // another process
			h.daily()
			require.Len(t, h.lines(missingLine), 1)
			require.Contains(t, h.warnings("static-creds/batch"), "deleted at OpenAI")
			if what == missingKey { // the remedy in the warning
				h.must(h.write("rotate-role/batch", nil))
				require.Empty(t, h.staticRole("batch")["missing"])
				require.Empty(t, h.warnings("static-creds/batch"))
				h.advance(defaultRevocationDelay)
				h.runStaticWorker()
			}
			h.must(h.remove("static-roles/batch"))
			h.must(h.remove("static-roles/other"))
			h.deleteStaticRole("adopted", adopted)
		})
	}
}

func TestStaticCheck_RecreatesAtMostOnceADay(t *testing.T) {
	t.Parallel()
	for _, what := range []string{missingKey, missingAccount} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.static("batch", withSlow(fields{"on_missing": "recreate", "scopes": "api.model.read"}))
			h.must(h.write("rotate-role/batch", nil)) // adds a superseded key
			h.check()
			account, key := h.byHand("batch", what)
			h.daily()
			r := h.storedStatic("batch")
			require.NotEqual(t, key, r.Current.ID)
			require.Equal(t, what == missingKey, r.ServiceAccountID == account)
			require.Nil(t, r.Missing)
			require.Equal(t, []string{"api.model.read"}, r.Scopes)
			require.WithinDuration(t, h.now(), h.staticTime("batch", "last_recreated"), time.Minute)
			require.Len(t, h.lines("static role recreated"), 1)
			require.Empty(t, h.warnings("static-creds/batch"))
			require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
			if what == missingAccount {
				require.Empty(t, r.Superseded, "deleted with the account")
			}
			// A WAL entry contains the former IDs, which no longer exist.
			require.Len(t, h.walEntries(), 1)
			h.runPeriodicWork()
			require.Empty(t, h.walEntries())

			_, key = h.byHand("batch", what)
			h.advance(12 * time.Hour)
			h.runStaticWorker() // deletes the superseded key
			h.b.checks.suspect("batch", h.storedStatic("batch").suspicion())
			h.check()
			h.advance(confirmAfterFirst)
			h.check()
			require.Equal(t, key, h.storedStatic("batch").Current.ID, "not twice within a day")
			require.Equal(t, what, h.staticRole("batch")["missing"])
			require.Contains(t, h.warnings("static-creds/batch"), "deleted at OpenAI")
			h.advance(12 * time.Hour)
			h.check()
			require.NotEqual(t, key, h.storedStatic("batch").Current.ID)
			require.Len(t, h.lines("static role recreated"), 2)
			h.runPeriodicWork()
			h.onlyStatic()
			h.deleteStaticRole("batch")
		})
	}
}

// If OpenAI shows a key or account again after its recreation, the engine deletes it.
func TestStaticCheck_WhatComesBackAfterARecreationEnds(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", withSlow(fields{"on_missing": "recreate"}))
	account := h.storedStatic("batch").ServiceAccountID
	h.check()
	h.advance(checkEvery)
	var heal []func()
	for _, route := range []string{routeAccount, routeKey} {
		heal = append(heal, h.sim.Fail(openaitest.Fault{Route: route, Status: http.StatusNotFound, Code: "not_found", Message: "No such thing."}))
	}
	for _, route := range []string{routeAccounts, routeKeys} {
		heal = append(heal, h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: route, Status: http.StatusOK, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`}))
	}
	h.check()
	h.advance(confirmAfterFirst)
	h.check()
	require.NotEqual(t, account, h.storedStatic("batch").ServiceAccountID)
	require.Contains(t, h.liveAccounts(), account)
	for _, h := range heal {
		h()
	}
	h.runPeriodicWork()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticCheck_AnAdoptedAccountIsNotCreated(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	account := h.adoptStatic("batch", withSlow(fields{"on_missing": "recreate"}))
	h.check()
	h.byHand("batch", missingKey)
	h.daily()
	require.Len(t, h.lines("static role recreated"), 1, "only a key is created")
	require.Equal(t, account, h.storedStatic("batch").ServiceAccountID)
	h.runPeriodicWork()
	h.onlyStatic(account)

	h.advance(checkEvery)
	h.byHand("batch", missingAccount)
	h.daily()
	require.Equal(t, missingAccount, h.staticRole("batch")["missing"])
	require.Contains(t, h.warnings("static-creds/batch"), "with another service_account_id")
	require.Len(t, h.lines("static role recreated"), 1)
	require.Empty(t, h.liveAccounts())
	h.must(h.remove("static-roles/batch"))
}

// An incomplete listing, an unproven 404 and an outage do not prove a deletion.
func TestStaticCheck_NothingButProofCounts(t *testing.T) {
	t.Parallel()
	const empty = `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`
	for name, faults := range map[string][]openaitest.Fault{
		"no listing shows it": {
			{Method: http.MethodGet, Route: routeAccounts, Status: http.StatusOK, Body: empty},
			{Method: http.MethodGet, Route: routeKeys, Status: http.StatusOK, Body: empty},
		},
		"a listing fails":      {{Method: http.MethodGet, Route: routeKeys, Status: http.StatusForbidden}},
		"another organization": {{Method: http.MethodGet, Status: http.StatusNotFound, Code: "project_not_found", Message: "No such project."}},
		"a gateway's 404":      {{Method: http.MethodGet, Status: http.StatusNotFound, Body: `{"status":404,"error":"Not Found"}`}},
		"no permission":        {{Method: http.MethodGet, Status: http.StatusForbidden}},
		"an outage":            {{Status: http.StatusServiceUnavailable}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			for _, role := range []string{"a", "b", "c"} {
				h.static(role, withSlow(fields{"on_missing": "recreate"}))
			}
			h.check()
			var heal []func()
			for _, f := range faults {
				heal = append(heal, h.sim.Fail(f))
			}
			h.configure(fields{"skip_verify": true, "request_timeout": "1s"})
			for range 4 {
				h.daily()
			}
			for _, role := range []string{"a", "b", "c"} {
				require.Empty(t, h.staticRole(role)["missing"])
			}
			require.Empty(t, h.lines(missingLine))
			require.Empty(t, h.lines("static role recreated"))
			if name == "no listing shows it" {
				require.Len(t, h.lines("listings of a project are incomplete: OpenAI shows a key or account that they lack"), 4, "one existing key stands for the others")
			}
			for _, h := range heal {
				h()
			}
			h.daily()
			h.onlyStatic()
			for _, role := range []string{"a", "b"} {
				h.must(h.remove("static-roles/" + role))
			}
			h.deleteStaticRole("c")
		})
	}
}

func TestStaticCheck_AKeyThatIsShownAgainIsNotMissing(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", slow)
	h.check()
	heal := h.sim.Fail(openaitest.Fault{Route: routeKey, Status: http.StatusNotFound, Code: "not_found", Message: "No such key."})
	healList := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKeys, Status: http.StatusOK, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
	h.daily()
	require.Equal(t, missingKey, h.staticRole("batch")["missing"])
	heal()
	healList()
	h.daily()
	require.Empty(t, h.staticRole("batch")["missing"])
	require.Empty(t, h.warnings("static-creds/batch"))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// A rotation replaces a deleted key, but does not hide the deletion.
func TestStaticCheck_AKeyThatARotationReplacesIsSaid(t *testing.T) {
	t.Parallel()
	const line = "static role key was deleted at OpenAI before its rotation, not by this engine"
	for _, by := range []string{"an operator", "no deletion", "this engine"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			delay := fields{}
			if by == "this engine" {
				delay["revocation_delay"] = 0
			}
			h.static("batch", delay)
			h.advance(24 * time.Hour)
			key := h.storedStatic("batch").Current.ID
			if by == "an operator" {
				h.byHand("batch", missingKey)
			} else { // the read before the rotation is wrong
				h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKey, Times: 1, Status: http.StatusNotFound, Code: "not_found", Message: "No such key."})
			}
			h.runStaticWorker()
			require.NotEqual(t, key, h.storedStatic("batch").Current.ID)
			h.check()
			h.advance(confirmAfterFirst)
			h.runStaticWorker() // deletes the superseded key
			h.check()
			if by == "an operator" {
				said := h.lines(line)
				require.Len(t, said, 1)
				require.Equal(t, key, said[0]["api_key_id"])
				require.InDelta(t, 1, h.measured()[`vault_openai_static_missing_total{missing="api_key",static_role="batch"}`], 0)
			} else {
				require.Empty(t, h.lines(line))
			}
			require.Empty(t, h.lines(missingLine))
			h.advance(time.Hour)
			h.runStaticWorker()
			h.onlyStatic()
			h.deleteStaticRole("batch")
		})
	}
}

// At each moment of a rotation, an operator deletes the active key, its account, or the
// new key. The role then gets a working key: by the rotation itself, by the next one, or
// with on_missing=recreate.
func TestStaticCheck_DeletedByHandInTheMiddleOfARotation(t *testing.T) {
	t.Parallel()
	moments := map[string]openaitest.Fault{
		"before the create": {Method: http.MethodGet, Route: routeKey},
		"at the create":     {Method: http.MethodPost, Route: routeNewKey},
		"at the activation": {Method: http.MethodGet, Route: "/models"},
	}
	for moment, at := range moments {
		for _, what := range []string{missingKey, missingAccount, "new key"} {
			if what == "new key" && moment != "at the activation" {
				continue
			}
			for _, on := range []string{"warn", "recreate"} {
				t.Run(moment+"/"+what+"/"+on, func(t *testing.T) {
					t.Parallel()
					h := withStatic(t, openaitest.Options{})
					h.static("batch", fields{"on_missing": on, "rotation_period": "24h"})
					h.check()
					h.advance(24 * time.Hour)
					r := h.storedStatic("batch")
					at := at
					at.Times, at.Kind = 1, openaitest.FaultSlow
					at.OnStrike = func(*http.Request) {
						switch what {
						case missingAccount:
							h.sim.DeleteServiceAccount(h.project, r.ServiceAccountID)
						case missingKey:
							h.byHandKey(r.Current.ID)
						default:
							for _, id := range h.liveKeys() {
								if id != r.Current.ID {
									h.byHandKey(id)
								}
							}
						}
					}
					h.sim.Fail(at)
					h.runStaticWorker()
					for range 3 { // days, with the relevant ticks
						h.check()
						h.advance(confirmAfterFirst)
						h.check()
						h.runStaticWorker()
						h.runPeriodicWork()
						h.advance(24 * time.Hour)
						h.runStaticWorker()
						h.advance(time.Hour)
						h.runStaticWorker()
					}
					if what == missingAccount && on == "warn" {
						require.Equal(t, missingAccount, h.staticRole("batch")["missing"])
						require.Contains(t, h.warnings("static-creds/batch"), "deleted at OpenAI")
						require.Empty(t, h.liveAccounts())
						h.must(h.remove("static-roles/batch"))
						return
					}
					require.Empty(t, h.staticRole("batch")["missing"])
					require.Empty(t, h.staticRole("batch")["last_rotation_error"])
					recreated := 0
					if what == missingAccount {
						recreated = 1
					}
					require.Len(t, h.lines("static role recreated"), recreated)
					h.advance(time.Hour)
					h.runStaticWorker()
					h.runPeriodicWork()
					h.onlyStatic()
					h.deleteStaticRole("batch")
				})
			}
		}
	}
}

// byHandKey deletes a key of the project outside the engine.
func (h *harness) byHandKey(id string) {
	if err := h.api().DeleteProjectKey(context.Background(), h.project, id); err != nil {
		h.t.Errorf("deleting a key by hand: %v", err)
	}
}

// Ten calls a minute for each endpoint, with no Retry-After.
func TestStaticCheck_AThousandRolesCostFewCalls(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(fields{"tidy_interval": 0})
		const roles, deleted = 1000, 12
		for i := range roles {
			on := "warn"
			if i%2 == 0 {
				on = "recreate"
			}
			h.static(fmt.Sprint("role-", i), withSlow(fields{"activation_timeout": 0, "on_missing": on}))
		}
		h.check()
		h.advance(checkEvery)
		h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 10 })
		calls := func() (n int) { return len(h.routes()) }
		before := calls()
		began := time.Now()
		h.check()
		require.Equal(t, 2*roles/100, calls()-before, "only the pages of the listings")
		h.check()
		require.Equal(t, 2*roles/100, calls()-before, "once a day")
		t.Logf("a day's check of %d roles: %d calls in %s", roles, calls()-before, time.Since(began))

		for i := range deleted {
			what := missingKey
			if i%4 >= 2 {
				what = missingAccount
			}
			if what == missingAccount {
				h.sim.DeleteServiceAccount(h.project, h.storedStatic(fmt.Sprint("role-", i)).ServiceAccountID)
			} else {
				h.byHandKey(h.storedStatic(fmt.Sprint("role-", i)).Current.ID)
			}
		}
		h.advance(checkEvery)
		before, began = calls(), time.Now()
		for range 40 { // ticks
			h.check()
			time.Sleep(time.Minute)
		}
		missing, recreated := len(h.lines(missingLine)), len(h.lines("static role recreated"))
		require.Equal(t, []int{deleted, deleted / 2}, []int{missing, recreated})
		most := 2*roles/100 + deleted*2*4 + 1 + recreated + int(h.b.rateLimiter.Throttled())
		require.LessOrEqual(t, calls()-before, most)
		t.Logf("with %d of them missing: %d calls, %d recreated, in %s", missing, calls()-before, recreated, time.Since(began))
		h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 0 })
		h.sim.KeepAll()
	})
}

// A failed recreation leaves the role unchanged, and is retried.
func TestStaticCheck_EveryFaultOfARecreation(t *testing.T) {
	t.Parallel()
	faults := map[string]func(h *harness) (heal func()){
		"create": func(h *harness) func() {
			return h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Status: http.StatusForbidden})
		},
		"activation": func(h *harness) func() {
			return h.sim.Fail(openaitest.Fault{Route: "/models", Status: http.StatusUnauthorized, Code: "invalid_api_key"})
		},
	}
	for write := range 6 {
		for _, f := range []storageFault{{write: write}, {write: write, after: true}, {write: write, kill: true}, {write: write, after: true, kill: true}} {
			faults[fmt.Sprintf("%+v", f)] = func(h *harness) func() {
				h.storage.fail(f)
				return func() {
					if h.storage.heal() {
						h.restartStatic()
					}
				}
			}
		}
	}
	for _, what := range []string{missingKey, missingAccount} {
		for name, fault := range faults {
			t.Run(what+"/"+name, func(t *testing.T) {
				t.Parallel()
				h := withStatic(t, openaitest.Options{})
				h.static("batch", withSlow(fields{"on_missing": "recreate"}))
				h.check()
				_, key := h.byHand("batch", what)
				h.advance(checkEvery)
				h.check()
				h.advance(confirmAfterFirst)
				heal := fault(h)
				func() {
					defer func() { _ = recover() }() // the process dies
					_ = h.b.checkStaticRoles(client.Background(context.Background()), &logical.Request{Storage: h.storage, MountPoint: "openai/"})
				}()
				heal()
				if name == "create" || name == "activation" {
					require.Equal(t, key, h.storedStatic("batch").Current.ID)
					require.Equal(t, what, h.staticRole("batch")["missing"])
					require.Len(t, h.lines("static role not recreated"), 1)
				}
				for range 3 {
					h.advance(time.Hour)
					h.check()
				}
				h.daily() // a new process has forgotten the first check
				require.NotEqual(t, key, h.storedStatic("batch").Current.ID)
				require.Empty(t, h.staticRole("batch")["missing"])
				h.runPeriodicWork()
				h.runPeriodicWork()
				h.onlyStatic()
				h.deleteStaticRole("batch")
			})
		}
	}
}

func TestStaticCheck_OnMissingIsWarnOrRecreate(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "on_missing": "panic"})), "on_missing must be warn or recreate")
	h.static("batch", slow)
	require.Equal(t, "warn", h.staticRole("batch")["on_missing"])
	h.check()
	h.byHand("batch", missingKey)
	h.daily()
	require.Equal(t, missingKey, h.staticRole("batch")["missing"])
	h.must(h.write("static-roles/batch", fields{"on_missing": "recreate"}))
	require.Equal(t, "recreate", h.staticRole("batch")["on_missing"])
	h.check() // the write requests a check before the next day
	require.Empty(t, h.staticRole("batch")["missing"])
	h.must(h.write("static-roles/batch", fields{"on_missing": "warn"}))
	require.Equal(t, "warn", h.staticRole("batch")["on_missing"])
	h.runPeriodicWork()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// Tidy and the check each store a time in the record of a project.
func TestStaticCheck_TidyKeepsItsTime(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", slow)
	h.check()
	entry := func() *projectEntry {
		e, err := getProjectEntry(t.Context(), h.storage, h.project)
		require.NoError(t, err)
		return e
	}
	checked := entry().StaticChecked
	require.WithinDuration(t, h.now(), checked, time.Minute)
	h.deleteStaticRole("batch") // tidy looks up only a project without roles
	heal := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Status: http.StatusNotFound, Code: "project_not_found", Message: "No such project."})
	h.tidy(true)
	require.NotZero(t, entry().UnknownSince)
	require.Equal(t, checked, entry().StaticChecked)
	heal()
	h.tidy(true)
	require.Zero(t, entry().UnknownSince)
	require.Equal(t, checked, entry().StaticChecked)
}
