package openaisecrets

// The fault tables of the pool: what is alive at OpenAI, and what storage knows, if a
// step of a refill, of a hand-out or of an invalidation fails or the process dies there.

import (
	"errors"
	"net/http"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// poolFault is everyFault for a mount whose role "app" has a pool of this size, full
// unless it is empty. Nothing refills it but the flow.
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

// refillOnce is a run of the worker in the test's goroutine, where a death of the
// process can be seen.
func (h *harness) refillOnce() {
	h.b.pools.wake()
	_ = h.b.refillPools(client.Background(h.t.Context()), h.background())
}

// poolOnly fails the test unless what the pool of this process has is what is alive
// besides these leases, each with its entry, and all of it works.
func (h *harness) poolOnly(leases ...*logical.Response) {
	h.t.Helper()
	keys := h.liveKeysInPool()
	entries := len(keys)
	for _, lease := range leases {
		keys = append(keys, lease.Data["api_key_id"].(string))
		require.NotEqual(h.t, http.StatusUnauthorized, h.inference(lease, http.MethodGet, "/models"), "the leased key works")
	}
	require.ElementsMatch(h.t, keys, h.liveKeys(), "keys alive")
	require.Len(h.t, h.liveAccounts(), len(keys))
	require.Len(h.t, h.walEntries(), entries, "WAL entries")
}

// afterwards lets the WAL be worked off, has the pool filled, and checks that nothing is
// alive but the pool and these leases; then it ends both.
func (h *harness) afterwards(leases ...*logical.Response) {
	h.t.Helper()
	h.settlePools()
	h.tick()
	h.poolOnly(leases...)
	h.fill()
	h.poolOnly(leases...)
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
				require.Equal(h.t, []string{scopeChat}, h.scopesOf(c.KeyID), "what is in the pool is restricted")
			}
			h.afterwards()
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
	h.t.Fatalf("key %s is not alive", keyID)
	return nil
}

func TestPoolHandOut_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, true, fields{"pool_size": 2},
		func(h *harness) (*logical.Response, error) { return h.read("creds/app") },
		func(h *harness, resp *logical.Response, err error) {
			if err == nil && !resp.IsError() {
				lease := h.stored(resp)
				h.afterwards(lease)
				return
			}
			if errors.Is(err, errKilled) && h.storage.last() == "delete wal" && len(h.walEntries()) == 1 {
				// The gap that no plugin sees: the entry has gone and the answer was not
				// sent. The key expires, and tidy deletes the account.
				h.tick()
				require.Len(h.t, h.liveKeys(), 1)
				h.advance(defaultMaxTTL + defaultPoolMaxAge + expiryMargin + clockSlack + defaultTidySafetyBuffer)
				require.Empty(h.t, h.liveKeys())
				h.tidy(true)
				h.fill()
				h.afterwards()
				return
			}
			h.afterwards()
		})
}

// A write of a role discards its pool; what fails or dies on the way leaves neither a key
// of the old role nor one that nobody has.
func TestPoolInvalidation_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, true, fields{"pool_size": 2, "scopes": []string{scopeChat, "api.responses.write"}},
		func(h *harness) (*logical.Response, error) {
			release, err := h.b.work.leaving.Wait(h.t.Context()) // so that the test sees a death
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
				require.Error(h.t, err, "the write that was answered is stored")
				wide = http.StatusOK
			}
			lease := h.lease("creds/app", nil)
			require.Equal(h.t, wide, h.inference(lease, http.MethodPost, "/responses"), "the key is that of the stored role")
			h.afterwards(lease)
		})
}

// What a disable does first, before the WAL is worked off: the pool is closed, and what
// it had is recorded.
func TestPoolDisable_EveryFaultAtEveryStep(t *testing.T) {
	t.Parallel()
	poolFault(t, true, fields{"pool_size": 2},
		func(h *harness) (*logical.Response, error) {
			h.b.closePools()
			require.Empty(h.t, h.liveKeysInPool())
			h.b.recordLeaving(h.t.Context(), h.background())
			return nil, nil
		},
		func(h *harness, _ *logical.Response, _ error) { h.afterwards() })
}
