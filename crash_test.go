package openaisecrets

// Faults and crashes at each storage write and API call, before and after its effect, of a
// credential request, a renewal and an admin key rotation; of a revocation, at the API
// calls. After the WAL is processed, only leased credentials remain at OpenAI.
// faults_test.go has the driver; static_rotate_test.go and pool_fault_test.go have the
// tables of static roles and pools.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestIssue_FaultsLeaveOnlyLeasedCredentials(t *testing.T) {
	t.Parallel()
	everyLeaseFault(t, openaitest.Options{}, func(*harness) {},
		func(h *harness) (*logical.Response, error) { return h.read("creds/app") },
		func(h *harness, resp *logical.Response, err error) {
			gap := errors.Is(err, errKilled) && h.storage.last() == "delete wal"
			h.runPeriodicWork()
			if gap && len(h.sim.Accounts()) == 1 {
				// No plugin can detect a crash after the deletion of the WAL entry and
				// before Vault stores the lease. No client received the key; it expires,
				// and tidy deletes the account.
				require.WithinDuration(h.t, time.Now().Add(defaultMaxTTL+expiryMargin), h.sim.Keys()[0].ExpiresAt, time.Minute)
				h.advance(defaultMaxTTL + expiryMargin + clockSlack + time.Second)
				h.rollback()
				h.tidied()
				h.onlyLeased()
				return
			}
			if err != nil || resp.IsError() {
				h.onlyLeased()
				return
			}
			lease := h.stored(resp)
			h.onlyLeased(lease)
			require.NoError(h.t, h.revoke(lease))
			h.onlyLeased()
		})
}

// diedBeforeLeaseStored reports whether the process died after it deleted the WAL entry
// and before Vault stored the lease. Call it before anything else.
func diedBeforeLeaseStored(h *harness, err error) bool {
	return errors.Is(err, errKilled) && h.storage.last() == "delete wal" && len(h.sim.Keys()) == 1 && len(h.walEntries()) == 0
}

// checkUnleasedKeyCleanup checks the cleanup of such a key: no client has it, it expires,
// and then tidy deletes its account.
func checkUnleasedKeyCleanup(h *harness, life time.Duration) {
	h.t.Helper()
	require.WithinDuration(h.t, h.now().Add(life+expiryMargin), h.keyEnd(), time.Minute)
	h.advance(life + expiryMargin + clockSlack + defaultTidySafetyBuffer)
	require.Empty(h.t, h.sim.Keys())
	h.tidy(true)
}

func TestIssue_FaultsWithScopes(t *testing.T) {
	t.Parallel()
	everyLeaseFault(t, openaitest.Options{},
		func(h *harness) { h.role(map[string]any{"scopes": scopeChat, "activation_timeout": "3s"}) },
		func(h *harness) (*logical.Response, error) { return h.read("creds/app") },
		func(h *harness, resp *logical.Response, err error) {
			if err == nil && !resp.IsError() {
				lease := h.stored(resp)
				require.Equal(h.t, 200, h.inference(lease, http.MethodPost, "/chat/completions"))
				require.Equal(h.t, 403, h.inference(lease, http.MethodPost, "/responses"), "a returned key is restricted")
				h.runPeriodicWork()
				h.onlyLeased(lease)
				require.NoError(h.t, h.revoke(lease))
				h.onlyLeased()
				return
			}
			gap := diedBeforeLeaseStored(h, err)
			h.runPeriodicWork()
			if gap {
				checkUnleasedKeyCleanup(h, defaultMaxTTL)
			}
			h.onlyLeased()
		})
}

func TestIssue_FaultsWithAPIKey(t *testing.T) {
	t.Parallel()
	for _, refused := range []bool{false, true} {
		t.Run(fmt.Sprintf("DELETE refused: %t", refused), func(t *testing.T) {
			t.Parallel()
			everyLeaseFault(t, openaitest.Options{DeleteServiceAccountKeyRefused: refused},
				func(h *harness) {
					h.adopted(map[string]any{"scopes": scopeChat, "activation_timeout": "3s", "key_expiry": expiryTTL})
				},
				func(h *harness) (*logical.Response, error) { return h.read("creds/app") },
				func(h *harness, resp *logical.Response, err error) {
					gap := diedBeforeLeaseStored(h, err)
					h.runPeriodicWork()
					if err == nil && !resp.IsError() {
						lease := h.stored(resp)
						require.Equal(h.t, 403, h.inference(lease, http.MethodPost, "/responses"), "a returned key is restricted")
						if refused {
							h.advance(time.Second) // a key that OpenAI does not delete expires
						}
						require.Len(h.t, h.sim.Keys(), 1)
						require.NoError(h.t, h.revoke(lease))
					} else if gap {
						checkUnleasedKeyCleanup(h, defaultTTL)
					}
					if refused {
						h.advance(time.Second)
					}
					h.onlyKeys(h.alive()[0])
				})
		})
	}
}

func TestRenew_FaultsLeaveTheKeyValidForTheLease(t *testing.T) {
	t.Parallel()
	leases := sync.Map{} // by test name
	everyLeaseFault(t, openaitest.Options{},
		func(h *harness) {
			h.role(map[string]any{"key_expiry": expiryTTL, "scopes": scopeChat})
			leases.Store(h.t.Name(), h.lease("creds/app", nil))
			h.advance(30 * time.Minute)
		},
		func(h *harness) (resp *logical.Response, err error) {
			defer func() {
				if died := recover(); died == any(errKilled) {
					resp, err = nil, errKilled
				} else if died != nil {
					panic(died)
				}
			}()
			lease, _ := leases.Load(h.t.Name())
			return h.renew(context.Background(), lease.(*logical.Response), 30*time.Minute, 0)
		},
		func(h *harness, resp *logical.Response, err error) {
			kept, _ := leases.Load(h.t.Name())
			lease := kept.(*logical.Response)
			left := 30 * time.Minute // of the lease before the renewal
			if err == nil && !resp.IsError() {
				lease, left = resp, time.Hour
			}
			require.False(h.t, h.keyEnd().Before(h.now().Add(left-time.Second)), "the key covers the lease")
			require.Equal(h.t, []string{scopeChat}, h.sim.Keys()[0].Scopes)
			require.Empty(h.t, h.walEntries())
			require.NoError(h.t, h.revoke(lease))
			h.onlyLeased()
		})
}

func TestRevoke_FaultsWithAPIKeyStillDeleteIt(t *testing.T) {
	t.Parallel()
	for name, fault := range apiFaults {
		for _, times := range []int{1, 9} { // a retry succeeds, or all attempts fail
			for _, refused := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %d times, DELETE refused: %t", name, times, refused), func(t *testing.T) {
					t.Parallel()
					h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: refused})
					h.hangs(fault.Kind)
					account := h.adopted(nil)
					lease := h.lease("creds/app", nil)
					fault := fault
					fault.Times = times
					if fault.Status == http.StatusTooManyRequests {
						fault.Times = min(times, 3) // each makes the next call wait longer
					}
					h.sim.Fail(fault)
					err := h.revoke(lease)
					h.sim.ClearFaults()
					if err != nil {
						require.Len(t, h.walEntries(), 1)
					}
					h.runPeriodicWork() // Vault may have given up, or OpenAI may show it again
					h.advance(2 * time.Second)
					h.onlyKeys(account)
					require.NoError(t, h.revoke(lease), "Vault may retry, even after a day")
				})
			}
		}
	}
}

// The deletion of the create's entry may take effect although it returns an error.
func TestCreds_UnreturnedCredentialIsRecordedAgain(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.storage.fail(storageFault{write: 1, after: true})
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "is queued for deletion in the WAL")
	h.storage.heal()
	require.Len(t, h.sim.Accounts(), 1)
	require.Len(t, h.walEntries(), 1)
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestRevoke_FaultsStillDeleteTheAccount(t *testing.T) {
	t.Parallel()
	for name, fault := range apiFaults {
		for _, times := range []int{1, 5} { // a retry succeeds, or all attempts fail
			t.Run(fmt.Sprintf("%s, %d times", name, times), func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.hangs(fault.Kind)
				lease := h.lease("creds/app", nil)
				fault := fault
				fault.Times = times
				h.sim.Fail(fault)
				err := h.revoke(lease)
				h.sim.ClearFaults()
				if err != nil {
					require.Len(t, h.walEntries(), 1)
				}
				h.runPeriodicWork() // Vault may have given up, or OpenAI may show it again
				h.onlyLeased()
				require.NoError(t, h.revoke(lease), "Vault may retry, even after a day")
			})
		}
	}
}

func TestRotate_FaultsLeaveOneWorkingKey(t *testing.T) {
	t.Parallel()
	everyLeaseFault(t, openaitest.Options{}, func(*harness) {},
		func(h *harness) (*logical.Response, error) { return h.write("config/rotate", nil) },
		func(h *harness, resp *logical.Response, err error) {
			// The engine works immediately after any fault.
			lease := h.lease("creds/app", nil)
			// Run the WAL, then end the grace period.
			h.runPeriodicWork()
			require.Empty(h.t, h.walEntries())
			h.advance(defaultRotationGrace + time.Second)
			h.runPeriodicWork()

			cfg, cfgErr := getConfig(context.Background(), h.storage)
			require.NoError(h.t, cfgErr)
			require.Equal(h.t, []string{cfg.AdminKeyID}, h.adminKeyIDs(), "only the stored admin key is valid")
			require.Empty(h.t, cfg.Superseded)
			if err == nil && !resp.IsError() {
				require.Equal(h.t, cfg.AdminKeyID, resp.Data["admin_api_key_id"])
				require.True(h.t, cfg.AdminKeyRotated)
			}
			require.NoError(h.t, h.revoke(lease))
			h.onlyLeased()
			h.sim.Keep(h.adminKeyIDs()...)
		})
}

func TestWAL_RetriesAfterEveryFault(t *testing.T) {
	t.Parallel()
	for name, fault := range apiFaults {
		for _, route := range []string{routeAccounts, routeAccount} {
			t.Run(name+" "+route, func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultLost})
				_, err := h.read("creds/app")
				require.Error(t, err)
				require.Len(t, h.sim.Accounts(), maxAttempts)
				h.hangs(fault.Kind)

				fault := fault
				fault.Method = map[string]string{routeAccounts: http.MethodGet, routeAccount: http.MethodDelete}[route]
				fault.Route, fault.Times = route, 6
				h.sim.Fail(fault)
				h.runPeriodicWork()
				require.GreaterOrEqual(t, len(h.walEntries()), len(h.sim.Accounts()), "the WAL records every remaining account")
				h.sim.ClearFaults()
				h.runPeriodicWork()
				h.onlyLeased()
			})
		}
	}
}

func TestOutage_RequestsFailInTimeAndRecover(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"request_timeout": "2s", "max_concurrent_requests": 16}))
	cancel := h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang})
	began := time.Now()
	var wg sync.WaitGroup
	for range 60 {
		wg.Go(func() {
			resp, err := h.read("creds/app")
			if err == nil || resp != nil {
				t.Error("a read succeeded in an outage")
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	require.Less(t, took, requestBudget+cleanupBudget)
	cancel()

	began = time.Now()
	lease := h.lease("creds/app", nil)
	require.Less(t, time.Since(began), took/2, "the first read after the outage")
	h.runPeriodicWork()
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))
}

func TestCreds_RetriesTwoRateLimitErrors(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 2, Status: http.StatusTooManyRequests})
	lease := h.lease("creds/app", nil)
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))
}
