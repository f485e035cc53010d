package openaisecrets

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// A Retry-After of an hour may come from a gateway, a wrong endpoint or a limit of the old
// key.
func TestRevoke_NewAdminKeyEndsTheCooldown(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: deleteAccountRoute, Times: 1, Status: 429, Header: http.Header{"Retry-After": {"3600"}}})
	require.ErrorContains(t, h.revoke(lease), "retry in 1h0m0s")
	_, key := h.sim.AddAdminKey("another")
	h.must(h.write("config", map[string]any{"admin_api_key": key}))
	began := time.Now()
	require.NoError(t, h.revoke(lease))
	require.Less(t, time.Since(began), 30*time.Second)
	require.Empty(t, h.sim.Accounts())
}

func TestRevoke_DeletedAccountSucceeds(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(h *harness, account string){
		"deleted by hand":  func(h *harness, account string) { h.sim.DeleteServiceAccount(h.project, account) },
		"project archived": func(h *harness, _ string) { h.sim.ArchiveProject(h.project) },
		"archived, and OpenAI answers with 403": func(h *harness, _ string) {
			h.sim.ArchiveProject(h.project)
			h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 403, Message: "no"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			lease := h.lease("creds/app", nil)
			lose(h, lease.Data["service_account_id"].(string))
			require.NoError(t, h.revoke(lease))
		})
	}
}

func TestRevoke_MissingPermissionFails(t *testing.T) {
	t.Parallel()
	for _, status := range []int{401, 403} {
		h := configured(t, openaitest.Options{})
		lease := h.lease("creds/app", nil)
		cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: status, Message: "not allowed"})
		err := h.revoke(lease)
		require.ErrorContains(t, err, "not allowed")
		require.ErrorContains(t, err, lease.Data["service_account_id"].(string))
		require.Len(t, h.sim.Accounts(), 1)
		require.Error(t, h.revoke(lease))
		require.Len(t, h.walEntries(), 1, "repeated failed revocations create one entry")
		h.runPeriodicWork()
		require.Len(t, h.sim.Accounts(), 1)
		cancel()
		h.runPeriodicWork()
		h.onlyLeased()
		require.NoError(t, h.revoke(lease), "Vault's next attempt succeeds")
	}
}

func TestRevoke_GatewaysNotFoundFails(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 404, Body: "<html>nginx: 404</html>"})
	require.Error(t, h.revoke(lease))
	require.Len(t, h.sim.Accounts(), 1)
	cancel()
	require.NoError(t, h.revoke(lease))
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestRevoke_DuringRotationWithoutGracePeriod(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	lease := h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: routeAccount, Times: 1, Status: 401, OnStrike: func(*http.Request) {
		if _, err := h.write("config/rotate", nil); err != nil {
			t.Error(err)
		}
	}})
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
	h.sim.Keep(h.adminKeyIDs()...)
}

// If Vault cannot store a lease, it revokes the credential only once.
func TestRevoke_IsRecordedAlthoughStorageFailsOnce(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		h := configured(t, openaitest.Options{})
		lease := h.lease("creds/app", nil)
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Kind: openaitest.FaultReset})
		h.storage.fail(storageFault{after: after})
		require.Error(t, h.revoke(lease))
		require.Len(t, h.walEntries(), 1)
		h.sim.ClearFaults()
		h.storage.heal()
		h.rollback()
		h.onlyLeased()
	}
}

func TestRevoke_NeedsOnlyTheLease(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.must(h.remove("roles/app"))
	h.restart()
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
	require.NoError(t, h.revoke(lease), "a repeated revocation succeeds")
}

func TestRevoke_RetriesTransientFailures(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 2, Status: 503})
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

func TestRenew_WithoutACallToOpenAI(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.sim.ResetRequests()
	h.sim.Fail(openaitest.Fault{Status: 500}) // would make any call fail

	resp := h.must(h.end(logical.RenewOperation, lease))
	require.Zero(t, h.sim.Count("", ""))
	require.Equal(t, time.Hour, resp.Secret.TTL)
	require.Equal(t, 24*time.Hour, resp.Secret.MaxTTL)
	require.Equal(t, lease.Data, resp.Data, "Vault keeps only what a renewal returns")
	require.Equal(t, lease.Secret.InternalData, resp.Secret.InternalData)

	h.sim.ClearFaults()
	require.NoError(t, h.revoke(h.stored(resp)), "a renewed lease can be revoked")
	h.onlyLeased()
}

func TestRenew_FollowsTheRoleButNeverOutlivesTheKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)

	h.must(h.write("roles/app", map[string]any{"ttl": "10m", "max_ttl": "20m"}))
	resp := h.must(h.end(logical.RenewOperation, lease))
	require.Equal(t, 10*time.Minute, resp.Secret.TTL)
	require.Equal(t, 20*time.Minute, resp.Secret.MaxTTL)

	h.must(h.write("roles/app", map[string]any{"ttl": "48h", "max_ttl": "96h"}))
	resp = h.must(h.end(logical.RenewOperation, lease))
	require.Equal(t, 24*time.Hour, resp.Secret.MaxTTL)

	h.must(h.remove("roles/app"))
	_, err := h.end(logical.RenewOperation, lease)
	require.ErrorContains(t, err, "not found")
	require.NoError(t, h.revoke(lease))
}

func TestRollback_RetainsUnfinishedEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	require.Len(t, h.sim.Accounts(), maxAttempts)
	require.Len(t, h.walEntries(), maxAttempts)

	cancel := h.sim.Fail(openaitest.Fault{Status: 403, Message: "not now"})
	h.runPeriodicWork()
	require.Len(t, h.walEntries(), maxAttempts)
	require.Contains(t, h.log.String(), "WAL rollback incomplete", "Vault does not log it")
	cancel()

	h.must(h.remove("config"))
	h.runPeriodicWork()
	require.Len(t, h.walEntries(), maxAttempts, "entries stay without a config")
	h.configure(nil)
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestRevoke_ExpiredKeyMakesNoCall(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.advance(defaultMaxTTL + expiryMargin + 2*time.Minute)
	h.sim.ResetRequests()
	require.NoError(t, h.revoke(lease), "the revocation succeeds")
	require.Zero(t, h.sim.Count("", ""))
	require.Len(t, h.sim.Accounts(), 1)
	require.Empty(t, h.sim.Keys(), "its key has expired")
	h.rollback()
	h.onlyLeased()

	// If the WAL cannot record it, the revocation deletes the account.
	lease = h.lease("creds/app", nil)
	h.advance(defaultMaxTTL + expiryMargin + 2*time.Minute)
	h.storage.fail(storageFault{write: 0})
	require.NoError(t, h.revoke(lease))
	h.storage.heal()
	h.onlyLeased()
}

func TestRevoke_WALRetriesAfterVaultGivesUp(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	var leases []*logical.Response
	for range 10 {
		leases = append(leases, h.lease("creds/app", nil))
	}
	h.must(h.write("config", map[string]any{"request_timeout": shortTimeout}))
	cancel := h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultReset})
	for _, lease := range leases[:3] {
		for range 2 { // Vault makes six attempts; two are enough here
			require.Error(t, h.revoke(lease))
		}
	}
	require.Len(t, h.walEntries(), 3)
	h.rollback()
	require.Len(t, h.walEntries(), 3)
	entries, oldest, _ := h.b.wal.totals()
	require.Equal(t, 3, entries)
	require.NotZero(t, oldest)
	require.Contains(t, h.log.String(), "WAL rollback incomplete")
	cancel()
	h.restart()
	h.rollback()
	h.onlyLeased(leases[3:]...)
	entries, _, _ = h.b.wal.totals()
	require.Zero(t, entries)
	for _, lease := range leases {
		require.NoError(t, h.revoke(lease))
	}
}

func TestWAL_LimitsCallsInAProjectThatRejectsThem(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for range 40 {
		lease := h.lease("creds/app", nil)
		acct := credential{Version: 1, Type: typeAccount, ProjectID: h.project, ID: lease.Data["service_account_id"].(string)}
		_, err := h.b.recordRevocation(t.Context(), h.storage, acct)
		require.NoError(t, err)
	}
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 403, Message: "no"})
	h.sim.ResetRequests()
	h.runPeriodicWork()
	require.Less(t, h.sim.Count(http.MethodDelete, routeAccount), maxSystemicFailures+workers+1)
	require.Len(t, h.walEntries(), 40)
	cancel()
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestWAL_ListingMustBeginAfterTheEntryIsOldEnough(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultReset})
	_, err := h.read("creds/app")
	require.Error(t, err)
	ctx, req := client.Background(t.Context()), &logical.Request{Storage: h.storage}
	h.sim.ResetRequests()
	require.NoError(t, h.runAllWAL(ctx, req, walMinAge))
	require.Zero(t, h.sim.Count("", ""), "a request may still use the entry")

	// A slow listing: the entries are old enough at its end, but not at its start.
	h.advance(notFinalBefore - 30*time.Second)
	h.sim.Fail(openaitest.Fault{Route: listAccountsRoute, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) { h.advance(time.Hour) }})
	require.ErrorIs(t, h.runAllWAL(ctx, req, walMinAge), errNotFinal)
	require.Len(t, h.walEntries(), maxAttempts)
	require.ErrorIs(t, h.runAllWAL(ctx, req, walMinAge), errNotFinal)
	require.Len(t, h.walEntries(), maxAttempts, "one listing may be incomplete")
	for _, id := range h.walEntries() {
		entry, err := framework.GetWAL(ctx, h.storage, id)
		require.NoError(t, err)
		c, err := entryCredential(entry)
		require.NoError(t, err)
		h.unseenBefore(c.ownName())
	}
	require.NoError(t, h.runAllWAL(ctx, req, walMinAge))
	require.Empty(t, h.walEntries(), "two listings of old enough entries prove that no account exists")
}

// Only the WAL entry leads to an account whose key does not expire.
func TestWAL_OneListingThatLeavesANameOutProvesNothing(t *testing.T) {
	t.Parallel()
	for kind, routes := range map[string][2]string{typeAccount: {routeAccounts, listAccountsRoute}, typeKey: {routeNewKey, routeKeys}} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
				h.configure(nil)
				account := ""
				if kind == typeKey {
					account = h.adopted(map[string]any{"key_expiry": "none"})
				} else {
					h.role(map[string]any{"key_expiry": "none"})
				}
				h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routes[0], Times: maxAttempts, Kind: openaitest.FaultLost})
				_, err := h.read("creds/app")
				require.Error(t, err)
				require.Len(t, h.walEntries(), maxAttempts)
				time.Sleep(2 * notFinalBefore)
				shown := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routes[1], Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
				stop := h.ticking()
				defer stop()
				time.Sleep(notFinalBefore - 30*time.Second)
				require.Len(t, h.walEntries(), maxAttempts, "listings have omitted them for less than five minutes")
				shown()
				time.Sleep(2 * time.Minute)
				if kind == typeKey {
					h.onlyKeys(account)
				} else {
					h.onlyLeased()
				}
			})
		})
	}
}

// Tidy finds an account that these listings omit once its key has expired.
func TestWAL_TwoRunsInARowEndAnUnexecutedCreateOfAKeyThatExpires(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.role(nil)
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultReset})
		_, err := h.read("creds/app")
		require.Error(t, err)
		time.Sleep(2 * notFinalBefore)
		stop := h.ticking()
		defer stop()
		time.Sleep(90 * time.Second)
		require.Len(t, h.walEntries(), maxAttempts, "after one run")
		time.Sleep(time.Minute)
		require.Empty(t, h.walEntries())
	})
}

// A listing of keys may lag behind that of accounts. The account may belong to a lease of
// the Vault from which this one was copied.
func TestWAL_AListingThatMayLagShowsNoAccountWithoutKey(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.role(nil)
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultLost})
		_, err := h.read("creds/app")
		require.Error(t, err)
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKeys, Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
		stop := h.ticking()
		defer stop()
		time.Sleep(2*notFinalBefore - time.Minute)
		require.Len(t, h.sim.Accounts(), maxAttempts, "only one listing began five minutes after the create")
		time.Sleep(3 * time.Minute)
		h.onlyLeased()
	})
}

func TestRollback_KeepsOtherAccounts(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	other := h.sim.AddServiceAccount(h.project, "a person's")
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: 1, Kind: openaitest.FaultLost})
	second := h.lease("creds/app", nil)
	require.Len(t, h.sim.Accounts(), 4)
	h.runPeriodicWork()
	require.Len(t, h.sim.Accounts(), 3)
	h.sim.DeleteServiceAccount(h.project, other)
	h.onlyLeased(lease, second)
	require.NoError(t, h.revoke(lease))
	require.NoError(t, h.revoke(second))
}

func TestRollback_RetainsUnreadableEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for kind, data := range map[string]any{
		"unknown":   map[string]any{"x": 1},
		walAccount:  map[string]any{"version": 1},
		walAdminKey: map[string]any{"version": 1},
	} {
		_, err := framework.PutWAL(t.Context(), h.storage, kind, data)
		require.NoError(t, err)
	}
	_, err := framework.PutWAL(t.Context(), h.storage, walAccount, credential{Version: credentialVersion + 1, ProjectID: "p", Name: "n"})
	require.NoError(t, err)
	_, err = framework.PutWAL(t.Context(), h.storage, walAccount, "text")
	require.NoError(t, err)
	h.runPeriodicWork()
	require.Len(t, h.walEntries(), 5)
	require.Contains(t, h.log.String(), "does not support WAL entries of kind")
	require.Contains(t, h.log.String(), "newer version")
}

func TestWAL_SkipsYoungEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.rollback()
	require.Len(t, h.walEntries(), maxAttempts, "a request in progress may use them")
	require.Greater(t, walMinAge, requestBudget+cleanupBudget)

	// A disabled mount has no later run.
	h.system.TaintedVal = true
	_, err = h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage})
	require.NoError(t, err)
	h.onlyLeased()
	require.True(t, h.b.draining.Load())
	h.system.TaintedVal = false
	h.runPeriodicWork()
	require.NoError(t, h.revoke(h.lease("creds/app", nil)), "a mount that stays works again")
}

func TestRollback_ArchivedProjectEndsEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.sim.ArchiveProject(h.project)
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestWAL_PerformanceSecondaryProcessesItsOwnEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil))
	h.become(consts.ReplicationPerformanceSecondary)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.advance(time.Hour)
	h.rollback()
	h.onlyLeased()
	require.Len(t, h.adminKeyIDs(), 2, "only the primary deletes admin keys")
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestPeriodic_OnlyWhereThisNodeMayWrite(t *testing.T) {
	t.Parallel()
	for _, state := range []consts.ReplicationState{
		consts.ReplicationPerformanceStandby, consts.ReplicationDRSecondary,
	} {
		h := configured(t, openaitest.Options{})
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultLost})
		_, err := h.read("creds/app")
		require.Error(t, err)
		h.must(h.write("config/rotate", nil))
		h.advance(time.Hour)

		h.become(state)
		h.sim.ResetRequests()
		h.rollback()
		require.Zero(t, h.sim.Count("", ""))
		h.become(0)
		h.rollback()
		h.onlyLeased()
		require.Len(t, h.adminKeyIDs(), 1)
		h.sim.Keep(h.adminKeyIDs()...)
	}
}

func TestForwarding_StandbysAndSecondariesCreateNothing(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.ResetRequests()
	for at, secondaryToo := range map[string]bool{
		"creds/app": false, "config": true, "config/rotate": true, "rotate-root": true, "roles/app": true, "tidy": true, "tidy-cancel": true,
	} {
		h.become(consts.ReplicationPerformanceStandby)
		_, err := h.write(at, nil)
		require.ErrorIs(t, err, logical.ErrReadOnly, at)
		if secondaryToo {
			h.become(consts.ReplicationPerformanceSecondary)
			_, err := h.write(at, nil)
			require.ErrorIs(t, err, logical.ErrReadOnly, at)
		}
	}
	require.Zero(t, h.sim.Count("", ""))
}

func TestInvalidate_NextRequestReadsStorage(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	_, key := h.sim.AddAdminKey("by another node")
	cfg, err := getConfig(t.Context(), h.storage)
	require.NoError(t, err)
	first := cfg.AdminKeyID
	entry := storedConfig{config: cfg, AdminKey: key}
	encoded, err := logical.StorageEntryJSON(configStorageKey, entry)
	require.NoError(t, err)
	require.NoError(t, h.storage.Put(t.Context(), encoded))
	h.sim.DeleteAdminKey(first)

	_, err = h.read("creds/app")
	require.Error(t, err, "still the old snapshot")
	h.b.InvalidateKey(t.Context(), "roles/app")
	_, err = h.read("creds/app")
	require.Error(t, err)
	h.b.InvalidateKey(t.Context(), configStorageKey)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

func TestLease_UnusableDataIsAnError(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for name, data := range map[string]map[string]any{
		"nothing":           {},
		"no project":        {"service_account_id": "user-1"},
		"no account":        {"project_id": "proj_1"},
		"wrong type":        {"project_id": 7, "service_account_id": "user-1"},
		"no max_ttl":        {"project_id": "proj_1", "service_account_id": "user-1"},
		"newer version":     {"version": 9, "project_id": "proj_1", "service_account_id": "user-1"},
		"unknown type":      {"version": 1, "credential_type": "robot", "project_id": "proj_1", "service_account_id": "user-1", "api_key_id": "key_1", "max_ttl": 1},
		"no key":            {"version": 1, "credential_type": "api_key", "project_id": "proj_1", "service_account_id": "user-1", "max_ttl": 1},
		"no key ID":         {"version": 1, "credential_type": "api_key", "project_id": "proj_1", "service_account_id": "user-1", "api_key_name": "n", "max_ttl": 1},
		"no key to extend":  {"version": 1, "project_id": "proj_1", "service_account_id": "user-1", "key_expiry": "ttl", "max_ttl": 1},
		"no owner of a key": {"version": 1, "credential_type": "api_key", "project_id": "proj_1", "api_key_id": "key_1", "max_ttl": 1},
		"invalid time":      {"version": 1, "project_id": "proj_1", "service_account_id": "user-1", "key_expires_at": "soon", "max_ttl": 1},
	} {
		data["secret_type"] = secretType
		lease := &logical.Response{Secret: &logical.Secret{InternalData: data}}
		require.ErrorContains(t, h.revoke(lease), "data", name)
		_, err := h.end(logical.RenewOperation, lease)
		require.ErrorContains(t, err, "data", name)
	}
}

func FuzzLeaseData(f *testing.F) {
	f.Add([]byte(`{"version":1,"project_id":"p","service_account":"n","service_account_id":"u","role":"r","max_ttl":86400000000000}`))
	f.Add([]byte(`{"version":1,"credential_type":"api_key","project_id":"p","service_account_id":"u","api_key_id":"k","api_key_name":"n","role":"r","max_ttl":1,"key_expiry":"ttl","key_expires_at":"2026-01-03T04:06:05.25+01:00"}`))
	f.Add([]byte(`{"version":1,"credential_type":"","project_id":"p","service_account_id":"u","static_role":"s","max_ttl":1,"key_expires_at":"9999-12-31T23:59:59-23:59"}`))
	f.Add([]byte(`{"version":1e99,"project_id":[],"max_ttl":"x"}`))
	f.Add([]byte(`{"PROJECT_ID":"p","service_account":null}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var data map[string]any
		if json.Unmarshal(raw, &data) != nil {
			t.Skip()
		}
		lease, err := decodeLease(&logical.Request{Secret: &logical.Secret{InternalData: data}})
		if err == nil && (lease.ProjectID == "" || (lease.ID == "" && lease.Name == "")) {
			t.Fatalf("%s is accepted as a lease: %+v", raw, lease)
		}
		if err == nil {
			stored := lease.internal()
			again, err := decodeLease(&logical.Request{Secret: &logical.Secret{InternalData: stored}})
			if err != nil || !maps.Equal(again.internal(), stored) {
				t.Fatalf("%+v is read back as %+v (%v)", lease, again, err)
			}
		}
	})
}

func TestProjects_List(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.Contains(t, h.refused(h.list("projects/")), "vault write openai/config")
	h.configure(nil)
	archived := h.sim.AddProject("old")
	h.sim.ArchiveProject(archived)
	for _, at := range []string{"projects", "projects/"} {
		data := h.must(h.list(at)).Data
		require.Equal(t, slices.Sorted(slices.Values([]string{h.project, archived})), data["keys"])
		require.Equal(t, map[string]any{
			h.project: map[string]any{"name": "apps", "status": "active"},
			archived:  map[string]any{"name": "old", "status": "archived"},
		}, data["key_info"])
	}
	h.sim.Fail(openaitest.Fault{Status: 403, Body: `{"error":"Missing scopes: api.management.read."}`})
	_, err := h.list("projects/")
	require.ErrorContains(t, err, "api.management.read")
	require.NotErrorIs(t, err, logical.ErrPermissionDenied)
	require.NotContains(t, err.Error(), "sk-")
}

func TestRevoke_RateLimitedRevocationsAreProcessedByTheWAL(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.role(nil)
		const n = 40
		var leases []*logical.Response
		for range n {
			leases = append(leases, h.lease("creds/app", nil))
		}
		h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 10 }) // with a burst of ten
		h.sim.ResetRequests()

		var failed atomic.Int64
		var wg sync.WaitGroup
		for _, lease := range leases {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), vaultTimeout)
				defer cancel()
				secret := *lease.Secret
				req := &logical.Request{Operation: logical.RevokeOperation, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: lease.Data}
				_, err := h.b.HandleRequest(ctx, req)
				h.recordMessages(nil, err)
				if err != nil {
					failed.Add(1)
				}
			})
		}
		wg.Wait()
		require.Positive(t, failed.Load())
		require.Len(t, h.walEntries(), int(failed.Load()), "the WAL records each failed revocation")
		require.Len(t, h.sim.Accounts(), int(failed.Load()))
		require.Less(t, h.sim.Count(http.MethodDelete, routeAccount), 2*n, "no retry storm")

		// Credential requests use another endpoint, and do not wait for the backlog.
		began := time.Now()
		lease := h.lease("creds/app", nil)
		require.Less(t, time.Since(began), 2*time.Second)

		h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 3000 }) // shortens the test
		for range 20 {
			h.runPeriodicWork()
			time.Sleep(time.Minute)
		}
		h.onlyLeased(lease)
		require.NoError(t, h.revoke(lease))
	})
}
