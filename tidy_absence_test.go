package openaisecrets

// Tidy with listings from OpenAI or a gateway that omit something.

import (
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/schedule"
)

const getKeyRoute = "/organization/projects/{project_id}/api_keys/{api_key_id}"

func keyObject(k client.ProjectKey, owner any) map[string]any {
	object := map[string]any{
		"object": "organization.project.api_key", "id": k.ID, "name": k.Name, "redacted_value": "sk-...abcd", "created_at": k.CreatedAt.Unix(),
		"last_used_at": nil, "owner_project_access": "active", "owner": owner, "expires_at": nil,
	}
	if !k.ExpiresAt.IsZero() {
		object["expires_at"] = k.ExpiresAt.Unix()
	}
	return object
}

func owner(id string) map[string]any {
	return map[string]any{"id": id, "name": "n", "email": "e@example.com", "created_at": 1, "role": "member"}
}

func TestTidy_IncompleteListingDeletesNoLeasedAccount(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]func(h *harness, leases []*logical.Response){
		"an empty listing": func(h *harness, _ []*logical.Response) { h.listed([]any{}) },
		"a listing that ends after its first key": func(h *harness, leases []*logical.Response) {
			h.listing(func(k client.ProjectKey) bool { return k.ID == leases[0].Data["api_key_id"] })
		},
		"a listing that hides one key": func(h *harness, leases []*logical.Response) {
			h.listing(func(k client.ProjectKey) bool { return k.ID != leases[5].Data["api_key_id"] })
		},
		"a gateway that answers everything with an empty list": func(h *harness, _ []*logical.Response) {
			h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultGarbageBefore, Body: `{"data":[]}`})
		},
		"a gateway that answers every read with a complete and empty list": func(h *harness, _ []*logical.Response) {
			h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"has_more":false}`})
		},
		"keys without an owner": func(h *harness, _ []*logical.Response) {
			keys, err := h.api().ListProjectKeys(h.t.Context(), h.project)
			require.NoError(h.t, err)
			data := []any{}
			for _, k := range keys {
				data = append(data, keyObject(k, map[string]any{"type": "service_account"}))
			}
			h.listed(data)
		},
		"keys whose owner is another account": func(h *harness, _ []*logical.Response) {
			keys, err := h.api().ListProjectKeys(h.t.Context(), h.project)
			require.NoError(h.t, err)
			data := []any{}
			for _, k := range keys {
				data = append(data, keyObject(k, map[string]any{"type": "service_account", "service_account": owner("user-other")}))
			}
			h.listed(data)
		},
	} {
		for _, restarted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, restarted %t", name, restarted), func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.sim.KeepAll()
				var leases []*logical.Response
				for range 10 {
					leases = append(leases, h.lease("creds/app", nil))
				}
				if restarted {
					h.restart()
				}
				h.advance(time.Hour)
				lie(h, leases)
				for range 3 { // the last run shortly before the leases expire
					h.tidyTwice()
					h.advance(7 * time.Hour)
				}
				require.Len(t, h.alive(), 10)
				for _, l := range leases {
					require.Equal(t, 200, h.inference(l, http.MethodGet, "/models"))
				}
			})
		}
	}
}

func TestTidy_StaleListingDeletesNoNewAccount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.listing(func(client.ProjectKey) bool { return true }) // freezes the listing
	lease := h.lease("creds/app", nil)
	h.advance(defaultTidySafetyBuffer + time.Minute)
	h.tidyTwice()
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
}

func TestTidy_AccountWithoutKeyRequiresTwoListings(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		between func(h *harness)
		gone    bool
	}{
		"minutes apart":             {func(h *harness) { h.advance(confirmAfter + time.Second) }, true},
		"too close together":        {func(h *harness) { h.advance(confirmAfter - time.Minute) }, false},
		"in two processes":          {func(h *harness) { h.advance(time.Hour); h.restart() }, false},
		"with a failed run between": {func(h *harness) { h.advance(time.Hour); h.failed(listKeysRoute) }, true},
		"with a listed key between": {func(h *harness) {
			h.advance(confirmAfter)
			_, err := h.api().CreateServiceAccountKey(h.t.Context(), h.project, h.alive()[0], "by hand", nil, 0)
			require.NoError(h.t, err)
			h.tidy(true)
			require.NoError(h.t, h.api().DeleteProjectKey(h.t.Context(), h.project, h.sim.Keys()[0].ID))
			h.advance(time.Minute)
		}, false},
	} {
		for _, apply := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, the first with apply=%t", name, apply), func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.keyless(1)
				h.oldEnough()
				status := h.tidy(apply)
				require.Equal(t, tidyFinished, status["state"])
				require.Equal(t, 1, status["unconfirmed_count"])
				require.Zero(t, status["orphan_count"])
				resp := h.must(h.read("tidy-status"))
				require.Contains(t, strings.Join(resp.Warnings, "\n"), "1 accounts have no key in the listing. A run at least 5m0s later confirms whether they are orphans.")
				test.between(h)
				status = h.tidy(true)
				require.Equal(t, tidyFinished, status["state"], status["error"])
				if test.gone {
					require.Equal(t, 1, status["deleted_count"])
					require.Empty(t, h.alive())
				} else {
					require.Equal(t, 1, status["unconfirmed_count"])
					require.Len(t, h.alive(), 1)
				}
			})
		}
	}
}

func TestTidy_AccountWithoutKeyIsKeptForTheLongestLease(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		arrange func(h *harness)
		longest time.Duration
	}{
		"of the only role": {func(*harness) {}, defaultMaxTTL},
		"of a role that has become stricter": {func(h *harness) {
			h.must(h.write("roles/app", map[string]any{"max_ttl": "2160h"}))
			h.must(h.write("roles/app", map[string]any{"max_ttl": "1h"}))
		}, 2160 * time.Hour},
		"of a role that was deleted": {func(h *harness) {
			h.must(h.write("roles/long", map[string]any{"project_id": h.project, "max_ttl": "2160h", "key_expiry": "none"}))
			h.must(h.remove("roles/long"))
			h.restart()
		}, 2160 * time.Hour},
		"of a mount of an earlier release": {func(h *harness) {
			require.NoError(h.t, h.storage.Delete(h.t.Context(), longestLeaseStorageKey))
		}, assumedLongest},
		"of a role of an earlier release": {func(h *harness) {
			require.NoError(h.t, h.storage.Delete(h.t.Context(), longestLeaseStorageKey))
			entry, err := logical.StorageEntryJSON(roleStoragePrefix+"old", map[string]any{"version": 1, "project_id": h.project, "ttl": time.Hour, "max_ttl": 1000 * time.Hour})
			require.NoError(h.t, err)
			require.NoError(h.t, h.storage.Put(h.t.Context(), entry))
		}, 1000 * time.Hour},
		"of an earlier release, when a role has been written since": {func(h *harness) {
			require.NoError(h.t, h.storage.Delete(h.t.Context(), longestLeaseStorageKey))
			h.must(h.write("roles/app", map[string]any{"max_ttl": "2h"}))
		}, assumedLongest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			test.arrange(h)
			h.keyless(1)
			h.advance(test.longest - 20*time.Minute)
			h.tidyTwice()
			h.advance(confirmAfter + time.Minute)
			status := h.tidy(true)
			require.Equal(t, tidyFinished, status["state"], status["error"])
			require.Zero(t, status["unconfirmed_count"])
			require.Len(t, h.alive(), 1)
			h.advance(20 * time.Minute)
			require.Equal(t, 1, h.tidyTwice()["deleted_count"])
			h.onlyLeased()
		})
	}
}

func TestTidy_UnreadableRoleKeepsAccountsWithoutKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.keyless(1)
	require.NoError(t, h.storage.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + "new", Value: []byte(`{"version":99}`)}))
	h.oldEnough()
	require.Zero(t, h.tidyTwice()["unconfirmed_count"])
	require.Len(t, h.alive(), 1)
	require.NoError(t, h.storage.Delete(t.Context(), roleStoragePrefix+"new"))
	require.Equal(t, 1, h.tidyTwice()["deleted_count"])
}

func TestRole_RecordsTheLongestLeaseBeforeTheRole(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	longest := func() time.Duration {
		t.Helper()
		entry, err := getLongestLease(t.Context(), h.storage)
		require.NoError(t, err)
		return entry.LongestLease
	}
	h.configure(nil)
	require.Zero(t, longest(), "there are no leases yet")
	for _, step := range []struct {
		max    string
		want   time.Duration
		writes []string
	}{
		{"2h", 2 * time.Hour, []string{"put .", "put project", "put role"}},
		{"1h", 2 * time.Hour, []string{"put role"}},
		{"720h", 720 * time.Hour, []string{"put .", "put role"}},
		{"720h", 720 * time.Hour, []string{"put role"}},
	} {
		h.storage.fail(storageFault{write: -1})
		h.must(h.write("roles/app", map[string]any{"project_id": h.project, "ttl": "1h", "max_ttl": step.max}))
		require.Equal(t, step.writes, h.storage.writes)
		require.Equal(t, step.want, longest())
	}
	for i, fault := range []storageFault{{write: 0}, {write: 0, after: true}, {write: 0, kill: true}, {write: 0, after: true, kill: true}, {write: 1}, {write: 1, after: true}, {write: 1, kill: true}, {write: 1, after: true, kill: true}} {
		lease := time.Duration(900+i) * time.Hour
		require.NoError(t, putLongestLease(t.Context(), h.storage, 720*time.Hour))
		h.storage.fail(fault)
		_, err := h.write("roles/app", map[string]any{"max_ttl": lease.String()})
		require.Error(t, err)
		if h.storage.heal() {
			h.restart()
		}
		r, err := getRole(t.Context(), h.storage, "app")
		require.NoError(t, err)
		if r.MaxTTL == lease {
			require.Equal(t, lease, longest())
		}
	}
	lease := h.lease("creds/app", nil)
	h.storage.fail(storageFault{write: -1})
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	require.NotContains(t, h.storage.writes, "put .", "a credential request does not write it")
	require.NoError(t, h.revoke(lease))

	fresh := newHarness(t, openaitest.Options{})
	fresh.must(fresh.write("roles/app", map[string]any{"project_id": fresh.project, "max_ttl": "3h"}))
	fresh.configure(nil)
	entry, err := getLongestLease(t.Context(), fresh.storage)
	require.NoError(t, err)
	require.Equal(t, 3*time.Hour, entry.LongestLease, "the role is older than the config")
}

func TestGolden_LongestLeaseV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	require.NoError(t, putLongestLease(t.Context(), s, 24*time.Hour))
	entry, err := s.Get(t.Context(), "longest-lease")
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "longest_lease.v1.json")), string(entry.Value))
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: "longest-lease", Value: golden(t, "longest_lease.v1.json")}))
	got, err := getLongestLease(t.Context(), s)
	require.NoError(t, err)
	require.Equal(t, longestLeaseEntry{Version: 1, LongestLease: 24 * time.Hour}, *got)
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: "longest-lease", Value: []byte(`{"version":99}`)}))
	_, err = getLongestLease(t.Context(), s)
	require.ErrorContains(t, err, "newer version")
}

func TestTidy_ListingWithoutAnExistingKeyIsIncomplete(t *testing.T) {
	t.Parallel()
	t.Run("of a static role", func(t *testing.T) {
		t.Parallel()
		h := withStatic(t, openaitest.Options{})
		h.sim.KeepAll()
		h.static("batch", fields{"rotation_period": "720h"})
		h.keyless(3)
		h.oldEnough()
		h.restartStatic()
		cancel := h.listed([]any{})
		status := h.tidyTwice()
		require.Equal(t, tidyError, status["state"])
		require.Contains(t, status["error"], "key listing is incomplete: it does not show existing key "+h.sim.Keys()[0].ID)
		require.Zero(t, status["unconfirmed_count"])
		require.Len(t, h.alive(), 4)
		cancel()
		h.tidy(true)
		require.Len(t, h.alive(), 4, "the incomplete listings do not count")
		h.advance(confirmAfter + time.Second)
		require.Equal(t, 3, h.tidy(true)["deleted_count"])
		require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
	})
	t.Run("of a lease", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		h.sim.KeepAll()
		h.keyless(1)
		h.oldEnough()
		lease := h.lease("creds/app", nil)
		h.listed([]any{})
		require.Equal(t, 1, h.tidy(true)["unconfirmed_count"], "the key is too new to check a listing")
		h.advance(notFinalBefore + time.Second)
		status := h.tidy(true)
		require.Equal(t, tidyError, status["state"])
		require.Contains(t, status["error"], lease.Data["api_key_id"])
		require.Len(t, h.alive(), 2)

		require.NoError(t, h.revoke(lease))
		h.sim.ResetRequests()
		require.Equal(t, 1, h.tidyTwice()["deleted_count"], "a deleted key is not missing")
		require.Equal(t, 2, h.sim.Count(http.MethodGet, getKeyRoute), "reads of the deleted key")
	})
	t.Run("a key that cannot be read", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		h.sim.KeepAll()
		h.keyless(1)
		h.oldEnough()
		h.lease("creds/app", nil)
		h.advance(time.Hour)
		h.listed([]any{})
		for _, fault := range []openaitest.Fault{
			{Status: 403}, {Status: 500}, {Status: 404, Body: `{"error":"Not Found"}`}, {Status: 404, Code: "unknown_url", Message: "Unknown request URL: GET /v1/organization"},
		} {
			fault.Route, fault.Method = getKeyRoute, http.MethodGet
			cancel := h.sim.Fail(fault)
			status := h.tidyTwice()
			require.Equal(t, tidyError, status["state"])
			require.Contains(t, status["error"], "key listing may be incomplete")
			require.Len(t, h.alive(), 2)
			cancel()
		}
	})
}

// A process remembers a bounded number of returned keys that are old enough to check a
// listing.
func TestKnownKeys_AreBoundedAndSpaced(t *testing.T) {
	t.Parallel()
	var w knownKeys
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range 100_000 {
		w.add(credential{ProjectID: "p", ID: "a", KeyID: fmt.Sprint(i), KeyExpires: at.Add(time.Hour)}, at)
		at = at.Add(50 * time.Millisecond)
	}
	keys := w.of("p")
	require.Len(t, keys, maxKnownKeys)
	valid := 0
	for _, k := range keys {
		if k.valid(at) {
			valid++
		}
	}
	require.GreaterOrEqual(t, valid, maxKnownKeys/2)
	require.Empty(t, w.of("q"))
	w.forget("p", keys[0].id)
	require.Equal(t, keys[1:], w.of("p"))
	require.False(t, keys[1].valid(at.Add(2*time.Hour)))
}

func TestTidy_ReadsEveryFormOfOwner(t *testing.T) {
	t.Parallel()
	for name, form := range map[string]func(id string) any{
		"a service account":                func(id string) any { return map[string]any{"type": "service_account", "service_account": owner(id)} },
		"a service account without a type": func(id string) any { return map[string]any{"service_account": owner(id)} },
		"a user":                           func(id string) any { return map[string]any{"type": "user", "user": owner(id)} },
		"both": func(id string) any {
			return map[string]any{"type": "user", "user": owner(id), "service_account": owner(id)}
		},
		"a user next to an account":          func(id string) any { return map[string]any{"service_account": owner("user-x"), "user": owner(id)} },
		"a service account as a user":        func(id string) any { return map[string]any{"type": "service_account", "user": owner(id)} },
		"an unknown form":                    func(string) any { return map[string]any{"type": "robot", "robot": owner("user-x")} },
		"a service account without an owner": func(string) any { return map[string]any{"type": "service_account"} },
		"no owner":                           func(string) any { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			id := h.keyless(1)[0]
			h.oldEnough()
			h.listed([]any{keyObject(client.ProjectKey{ID: "key_1", Name: "n", CreatedAt: h.now()}, form(id))})
			h.tidyTwice()
			require.Equal(t, []string{id}, h.alive())
		})
	}
}

func TestTidy_BoundsDeletesOfAccountsWithoutKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	second := h.sim.AddProject("second")
	h.must(h.write("roles/second", map[string]any{"project_id": second}))
	h.rollback() // starts the interval
	h.keyless(absenceLimit - 5)
	for range 10 {
		h.sim.AddServiceAccount(second, h.ours())
	}
	for range 30 {
		h.account(h.project, h.ours(), time.Minute)
	}
	h.oldEnough()
	status := h.tidy(false)
	require.Equal(t, 25, status["unconfirmed_count"])
	require.Equal(t, 30, status["orphan_count"])
	require.Zero(t, status["waiting_count"])
	h.advance(confirmAfter + time.Second)
	status = h.tidy(false)
	require.Equal(t, 55, status["orphan_count"])
	require.Equal(t, 5, status["waiting_count"], "orphans that a run would leave")
	require.NotContains(t, h.log.String(), "some accounts without a key were not deleted")

	h.rollback()
	status = h.tidied()
	require.Equal(t, true, status["automatic"])
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, 55, status["orphan_count"])
	require.Equal(t, 30+absenceLimit, status["deleted_count"], "accounts with an expired key have no limit")
	require.Equal(t, 5, status["waiting_count"])
	require.Contains(t, h.log.String(), "some accounts without a key were not deleted")
	require.Contains(t, h.log.String(), "vault write openai/tidy apply=true force=true")
	resp := h.must(h.read("tidy-status"))
	require.Contains(t, strings.Join(resp.Warnings, "\n"), "5 orphaned accounts without a key remain")
	require.Contains(t, string(h.must(h.do(t.Context(), logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"})).Data[logical.HTTPRawBody].([]byte)),
		`vault_openai_tidy_pending_orphans{mount_point="openai/"} 5`)
	require.Len(t, h.alive(), 5)

	for range absenceLimit + 5 {
		h.sim.AddServiceAccount(second, h.ours())
	}
	h.oldEnough()
	status = h.tidyTwice() // the first deletes the five
	require.Equal(t, absenceLimit, status["deleted_count"], "a manual run has the same limit")
	require.Equal(t, 5, status["waiting_count"])
	require.Contains(t, h.refused(h.write("tidy", map[string]any{"force": true})), "force=true requires apply=true")

	for range 2*absenceBatch + 1 {
		h.sim.AddServiceAccount(second, h.ours())
	}
	h.oldEnough()
	h.tidy(false)
	h.advance(confirmAfter + time.Second)
	h.sim.ResetRequests()
	h.must(h.write("tidy", map[string]any{"apply": true, "force": true}))
	status = h.tidied()
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, 2*absenceBatch+6, status["deleted_count"])
	require.Zero(t, status["waiting_count"])
	require.Equal(t, 2+3, h.sim.Count(http.MethodGet, listKeysRoute), "one for each project, and one more for each batch")
	require.Equal(t, 2*absenceBatch+6, h.sim.Count(http.MethodGet, deleteAccountRoute))
	h.onlyLeased()
}

// Both listings may be incomplete, so tidy checks again just before the delete.
func TestTidy_ChecksAgainBeforeDeletingAccountsWithoutKey(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fault   func(h *harness, id string) openaitest.Fault
		said    string
		deleted int
	}{
		"a key that was created meanwhile": {func(h *harness, id string) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: listKeysRoute, Skip: 1, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) {
				_, err := h.api().CreateServiceAccountKey(t.Context(), h.project, id, "by hand", nil, 0)
				require.NoError(t, err)
			}}
		}, "belongs to an account that two listings showed without a key", 0},
		"a listing that is refused": {func(*harness, string) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: listKeysRoute, Skip: 1, Status: 403}
		}, "list keys of project", 0},
		"an account that cannot be read": {func(*harness, string) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: deleteAccountRoute, Status: 403}
		}, "not deleted: reading the account before its deletion", 0},
		"one account that cannot be read": {func(_ *harness, id string) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: deleteAccountRoute, Status: 403, Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, id) }}
		}, "not deleted: reading the account before its deletion", 2},
		"an account that is not found": {func(*harness, string) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: deleteAccountRoute, Status: 404, Code: "service_account_not_found", Message: "No service account found.", Times: 1}
		}, "", 2},
		"another account in its place": {func(h *harness, id string) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: deleteAccountRoute, Kind: openaitest.FaultGarbage, Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, id) },
				Body: fmt.Sprintf(`{"object":"organization.project.service_account","id":%q,"name":"another","role":"member","created_at":1}`, id)}
		}, "", 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.KeepAll()
			id := h.keyless(3)[1]
			h.oldEnough()
			h.tidy(true)
			h.advance(confirmAfter + time.Second)
			h.sim.ResetRequests()
			h.sim.Fail(test.fault(h, id))
			status := h.tidy(true)
			require.Equal(t, test.deleted, status["deleted_count"])
			require.Len(t, h.alive(), 3-test.deleted)
			if test.said == "" {
				require.Equal(t, tidyFinished, status["state"], status["error"])
				return
			}
			require.Equal(t, tidyError, status["state"])
			require.Contains(t, status["error"], test.said)
			require.Equal(t, test.deleted, h.sim.Count(http.MethodDelete, ""))
		})
	}
	t.Run("a listing without an existing key", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		h.sim.KeepAll()
		h.keyless(3)
		h.oldEnough()
		lease := h.lease("creds/app", nil)
		h.tidy(true)
		h.advance(confirmAfter + time.Second)
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: listKeysRoute, Skip: 1, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
		status := h.tidy(true)
		require.Equal(t, tidyError, status["state"])
		require.Contains(t, status["error"], "key listing is incomplete: it does not show existing key "+lease.Data["api_key_id"].(string))
		require.Len(t, h.alive(), 4)
	})
	t.Run("a failed check resets both listings", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		id := h.keyless(3)[1]
		h.oldEnough()
		h.tidy(true)
		h.advance(confirmAfter + time.Second)
		made := ""
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: listKeysRoute, Skip: 1, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) {
			key, err := h.api().CreateServiceAccountKey(t.Context(), h.project, id, "by hand", nil, 0)
			require.NoError(t, err)
			made = key.ID
		}})
		require.Equal(t, tidyError, h.tidy(true)["state"])
		require.NoError(t, h.api().DeleteProjectKey(t.Context(), h.project, made))
		status := h.tidy(true)
		require.Equal(t, []any{tidyFinished, 0, 3}, []any{status["state"], status["deleted_count"], status["unconfirmed_count"]}, status["error"])
		h.advance(confirmAfter + time.Second)
		require.Equal(t, 3, h.tidy(true)["deleted_count"])
	})
	t.Run("a check older than a minute is repeated", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		h.keyless(4)
		h.oldEnough()
		h.tidy(true)
		h.advance(confirmAfter + time.Second)
		h.sim.ResetRequests()
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Skip: 1, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) { h.advance(absenceHolds + time.Second) }})
		require.Equal(t, 4, h.tidy(true)["deleted_count"])
		require.Equal(t, 3, h.sim.Count(http.MethodGet, listKeysRoute))
	})
}

func TestTidy_ClockSkew(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	lease := h.lease("creds/app", nil)
	h.keyless(1)
	h.account(h.project, h.ours(), time.Minute)
	h.oldEnough()
	h.mu.Lock()
	h.offset -= 40 * 24 * time.Hour // all creation times are in the future
	h.mu.Unlock()
	require.Zero(t, h.tidyTwice()["orphan_count"])
	require.Len(t, h.alive(), 3)
	h.mu.Lock()
	h.offset += 40 * 24 * time.Hour
	h.mu.Unlock()
	require.NoError(t, h.revoke(lease))
	require.Equal(t, 2, h.tidy(true)["deleted_count"].(int)+h.tidyTwice()["deleted_count"].(int))
}

// Accounts that cannot be deleted do not block others in their project, and do not use up
// the limit for other projects.
func TestTidy_FailedDeletesDoNotUseUpTheLimit(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"a systemic failure":             {Method: http.MethodDelete, Status: http.StatusUnauthorized},
		"another failure":                {Method: http.MethodDelete, Status: http.StatusForbidden},
		"an account that cannot be read": {Method: http.MethodGet, Status: http.StatusForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			ids := h.keyless(6)
			slices.Sort(ids)
			for _, id := range ids[:maxSystemicFailures] {
				f := fault
				f.Route, f.Match = deleteAccountRoute, func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, id) }
				h.sim.Fail(f)
			}
			h.oldEnough()
			h.tidyTwice()
			for range 20 { // until the random order does not start with them
				if len(h.alive()) > maxSystemicFailures {
					h.tidyTwice()
				}
			}
			require.ElementsMatch(t, ids[:maxSystemicFailures], h.alive())
			h.sim.KeepAll()
		})
	}
	t.Run("more failures than the limit, in another project", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		projects := []string{h.project, h.sim.AddProject("other")}
		h.must(h.write("roles/other", fields{"project_id": projects[1]}))
		slices.Sort(projects) // tidy processes them in this order
		for range absenceLimit {
			h.sim.AddServiceAccount(projects[0], h.ours())
		}
		h.sim.AddServiceAccount(projects[1], h.ours())
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusForbidden, Match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, projects[0]) }})
		h.oldEnough()
		status := h.tidyTwice()
		require.Equal(t, 1, status["deleted_count"], status["error"])
		require.Equal(t, absenceLimit, status["failed_count"])
		h.sim.KeepAll()
	})
}

// Neither the search nor the final listing counts such a key.
func TestTidy_IgnoresExpiredKeyWithUnknownOwner(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.keyless(1)
	h.oldEnough()
	h.listed([]any{keyObject(client.ProjectKey{ID: "key_1", Name: "n", CreatedAt: h.now().Add(-100 * time.Hour), ExpiresAt: h.now().Add(-time.Hour)}, nil)})
	status := h.tidyTwice()
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Empty(t, h.alive())
}

// Sums of the longest lease must not overflow for any role or stored value.
func TestTidy_LongestLeaseDoesNotOverflow(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for _, field := range []string{"ttl", "max_ttl"} {
		require.Contains(t, h.refused(h.write("roles/long", map[string]any{"project_id": h.project, field: "9223372036"})), field+" must be ")
	}
	require.NoError(t, h.b.raiseLongestLease(t.Context(), h.storage, math.MaxInt64))
	entry, err := getLongestLease(t.Context(), h.storage)
	require.NoError(t, err)
	require.Equal(t, schedule.MaxPeriod, entry.LongestLease)
}

// A new process remembers no returned key, but a static role names one that a listing must
// show.
func TestTidy_ManuallyDeletedStaticKeyDoesNotBlockTidy(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.static("made", nil)
	id := h.storedStatic("made").Current.ID
	require.NoError(t, h.api().DeleteProjectKey(t.Context(), h.project, id))
	h.restart()
	h.advance(2 * notFinalBefore)
	h.orphan()
	require.EqualValues(t, 1, h.tidy(true)["deleted_count"])
	h.must(h.remove("static-roles/made"))
}

// A key that has expired only by this server's clock is valid: the clock may be ahead.
func TestTidy_FastClockDeletesNoLeasedAccount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.lease("creds/app", nil)
	adopted := h.sim.AddServiceAccount(h.project, "batch")
	h.must(h.write("roles/keys", map[string]any{"project_id": h.project, "credential_type": typeKey, "service_account_id": adopted}))
	key := h.lease("creds/keys", nil)
	h.setClock(7 * 24 * time.Hour)
	for range 2 {
		require.Zero(t, h.tidyTwice()["orphan_count"])
	}
	h.setClock(0)
	for _, lease := range []*logical.Response{account, key} {
		require.Equal(t, http.StatusOK, h.inference(lease, http.MethodGet, "/models"))
		require.NoError(t, h.revoke(lease))
	}
}
