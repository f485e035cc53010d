package openaisecrets

// The fault tables of the pool: the state of OpenAI and storage after a failure or a
// crash at any step of a refill, a hand-out or an invalidation.

import (
	"errors"
	"net/http"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// poolFault is everyFault for a mount whose role "app" has a pool, filled if full is set.
// Only the flow refills it.
func poolFault(t *testing.T, full bool, role fields, flow func(h *harness) (*logical.Response, error), check func(h *harness, resp *logical.Response, err error)) {
	t.Helper()
	everyFault(t, faultFlow{
		mount: func(t *testing.T) *harness { return configured(t, openaitest.Options{}) },
		arrange: func(h *harness) {
			release := h.holdPools()
			h.role(role)
			if full {
				h.refillOnce()
			}
			h.releasePools = release
		},
		restart: func(h *harness) {
			h.restart()
			h.releasePools = func() {}
		},
		flow: func(h *harness) (resp *logical.Response, err error) {
			defer func() {
				if died := recover(); died == any(errKilled) {
					resp, err = nil, errKilled
				} else if died != nil {
					panic(died)
				}
			}()
			return flow(h)
		},
		check: func(h *harness, resp *logical.Response, err error) {
			h.releasePools()
			check(h, resp, err)
		},
	})
}

// refillOnce runs the worker in the test's goroutine, where a crash of the process is
// detected.
func (h *harness) refillOnce() {
	h.b.pools.wake()
	_ = h.b.refillPools(client.Background(h.t.Context()), h.background())
}

// requireOnlyPooledAndLeasedKeys fails the test unless only the keys of the pool and of
// these leases are valid, the leased keys work, and each pooled key has a WAL entry.
func (h *harness) requireOnlyPooledAndLeasedKeys(leases ...*logical.Response) {
	h.t.Helper()
	keys := h.liveKeysInPool()
	entries := len(keys)
	for _, lease := range leases {
		keys = append(keys, lease.Data["api_key_id"].(string))
		require.NotEqual(h.t, http.StatusUnauthorized, h.inference(lease, http.MethodGet, "/models"), "the leased key works")
	}
	require.ElementsMatch(h.t, keys, h.liveKeys(), "valid keys")
	require.Len(h.t, h.liveAccounts(), len(keys))
	require.Len(h.t, h.walEntries(), entries, "WAL entries")
}

// checkAndDrainPool processes the WAL, fills the pool, checks that only the pool and these
// leases are left, and then ends both.
func (h *harness) checkAndDrainPool(leases ...*logical.Response) {
	h.t.Helper()
	h.settlePools()
	h.runPeriodicWork()
	h.requireOnlyPooledAndLeasedKeys(leases...)
	h.fill()
	h.requireOnlyPooledAndLeasedKeys(leases...)
	for _, lease := range leases {
		require.NoError(h.t, h.revoke(lease))
	}
	h.closed()
	h.onlyLeased()
}

func TestPoolRefill_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, false, fields{"pool_size": 2, "scopes": scopeChat, "activation_timeout": "3s"},
		func(h *harness) (*logical.Response, error) {
			h.refillOnce()
			return nil, nil
		},
		func(h *harness, _ *logical.Response, _ error) {
			for _, c := range h.b.pools.roles["app"].list() {
				require.Equal(h.t, []string{scopeChat}, h.scopesOf(c.KeyID), "a pooled key is restricted")
			}
			h.checkAndDrainPool()
		})
}

func (p *pooledRole) list() []*pooled {
	if p == nil {
		return nil
	}
	return p.stock
}

func (h *harness) scopesOf(keyID string) []string {
	h.t.Helper()
	for _, k := range h.sim.Keys() {
		if k.ID == keyID {
			return k.Scopes
		}
	}
	h.t.Fatalf("key %s is invalid", keyID)
	return nil
}

func TestPoolHandOut_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, true, fields{"pool_size": 2},
		func(h *harness) (*logical.Response, error) { return h.read("creds/app") },
		func(h *harness, resp *logical.Response, err error) {
			if err == nil && !resp.IsError() {
				lease := h.stored(resp)
				h.checkAndDrainPool(lease)
				return
			}
			if errors.Is(err, errKilled) && h.storage.last() == "delete wal" && len(h.walEntries()) == 1 {
				// No plugin can detect a crash after the deletion of the entry and before
				// the response. The key expires, and tidy deletes the account.
				h.runPeriodicWork()
				require.Len(h.t, h.liveKeys(), 1)
				h.advance(defaultMaxTTL + defaultPoolMaxAge + expiryMargin + clockSlack + defaultTidySafetyBuffer)
				require.Empty(h.t, h.liveKeys())
				h.tidy(true)
				h.fill()
				h.checkAndDrainPool()
				return
			}
			h.checkAndDrainPool()
		})
}

// A write of a role discards its pool. A failure or a crash leaves neither a key of the
// old role nor an orphaned one.
func TestPoolInvalidation_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, true, fields{"pool_size": 2, "scopes": []string{scopeChat, "api.responses.write"}},
		func(h *harness) (*logical.Response, error) {
			release, err := h.b.work.leaving.Wait(h.t.Context()) // so that the test detects a crash
			if err != nil {
				return nil, err
			}
			defer release()
			resp, err := h.write("roles/app", fields{"scopes": scopeChat})
			if err == nil && !resp.IsError() {
				h.b.recordLeaving(h.t.Context(), h.background())
			}
			return resp, err
		},
		func(h *harness, _ *logical.Response, err error) {
			wide := http.StatusForbidden
			if r, getErr := getRole(h.t.Context(), h.storage, "app"); getErr == nil && len(r.Scopes) == 2 {
				require.Error(h.t, err, "a successful write is stored")
				wide = http.StatusOK
			}
			lease := h.lease("creds/app", nil)
			require.Equal(h.t, wide, h.inference(lease, http.MethodPost, "/responses"), "the key fits the stored role")
			h.checkAndDrainPool(lease)
		})
}

// Before a disable processes the WAL, it closes the pool and records its credentials.
func TestPoolDisable_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, true, fields{"pool_size": 2},
		func(h *harness) (*logical.Response, error) {
			h.b.closePools()
			require.Empty(h.t, h.liveKeysInPool())
			h.b.recordLeaving(h.t.Context(), h.background())
			return nil, nil
		},
		func(h *harness, _ *logical.Response, _ error) { h.checkAndDrainPool() })
}
