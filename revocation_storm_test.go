package openaisecrets

// A thousand leases expire in the same minute, at ten calls a minute. In a synctest
// bubble, Vault's schedule, the engine's budgets and OpenAI's limit are realistic, but
// waiting takes no time.

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// How Vault 1.21 revokes an expired lease (vault/expiration.go).
const (
	vaultWorkers  = 200
	vaultAttempts = 6
	vaultTimeout  = 90 * time.Second
	vaultBackoff  = 10 * time.Second
)

func TestRevocationStorm_ThousandLeasesAtTenCallsAMinute(t *testing.T) {
	t.Parallel()
	for name, kind := range map[string]string{"accounts": typeAccount, "keys": typeKey} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
				const n, perMinute = 1000, 10
				const ttl = time.Hour
				h.configure(map[string]any{"tidy_interval": 0})
				role := map[string]any{"key_expiry": expiryTTL, "ttl": "1h", "max_ttl": "4h"}
				adopted := []string{}
				if kind == typeKey {
					adopted = append(adopted, h.adopted(role))
				} else {
					h.role(role)
				}
				var leases []*logical.Response
				for i := range n {
					leases = append(leases, h.lease("creds/app", nil))
					if i%25 == 24 {
						time.Sleep(time.Second) // issues them over 40 s
					}
				}
				h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = perMinute })
				require.Len(t, h.sim.Keys(), n)
				ends := map[string]time.Time{} // of keys, from their leases
				for _, lease := range leases {
					end := lease.Secret.IssueTime.Add(ttl + expiryMargin)
					ends[lease.Data["api_key_id"].(string)] = end
				}

				// Vault's tick, once a minute.
				ticking, stop := context.WithCancel(context.Background())
				var ticks sync.WaitGroup
				ticks.Go(func() {
					for {
						select {
						case <-time.After(time.Minute):
							_, _ = h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
						case <-ticking.Done():
							return
						}
					}
				})
				h.sim.ResetRequests()
				var irrevocable, most atomic.Int64
				var wg sync.WaitGroup
				slots := make(chan struct{}, vaultWorkers)
				for _, lease := range leases {
					wg.Go(func() {
						time.Sleep(time.Until(lease.Secret.IssueTime.Add(ttl)))
						attempts := int64(h.vaultRevokes(lease, slots))
						if attempts > vaultAttempts {
							irrevocable.Add(1)
						}
						for old := most.Load(); attempts > old && !most.CompareAndSwap(old, attempts); old = most.Load() {
						}
					})
				}
				time.Sleep(time.Until(leases[n-1].Secret.IssueTime.Add(ttl + expiryMargin + time.Second)))
				require.Empty(t, h.sim.Keys(), "every key expires on time")
				time.Sleep(time.Second)
				for _, e := range h.sim.Ledger() {
					if e.Kind == openaitest.KindKey && e.Event == openaitest.EventExpired {
						require.WithinDuration(t, ends[e.ID], e.At, 2*time.Second)
						delete(ends, e.ID)
					} else if e.Kind == openaitest.KindKey && e.Event == openaitest.EventDeleted {
						delete(ends, e.ID)
					}
				}
				require.Empty(t, ends)
				wg.Wait()
				over := time.Since(leases[n-1].Secret.IssueTime.Add(ttl))
				require.Zero(t, irrevocable.Load(), "no lease becomes irrevocable")

				// The WAL deletes the rest at the allowed rate.
				began := time.Now()
				left := len(h.walEntries())
				require.Greater(t, left, n/2)
				for len(h.walEntries()) > 0 && time.Since(began) < 5*time.Hour {
					time.Sleep(time.Minute)
				}
				took := time.Since(began)
				stop()
				ticks.Wait()
				h.settle()
				if kind == typeKey {
					h.onlyKeys(adopted[0])
				} else {
					h.onlyLeased()
				}
				deletes, refused := 0, 0
				for _, r := range h.sim.Requests() {
					switch {
					case r.Method != http.MethodDelete:
					case r.Status == http.StatusTooManyRequests:
						refused++
					case r.Status == http.StatusOK:
						deletes++
					}
				}
				t.Logf("%d leases expired; the last revocation succeeded %s later, at attempt %d; the WAL deleted %d in %s; the limit refused %d calls in all",
					n, over.Round(time.Second), most.Load(), left, took.Round(time.Minute), refused)
				require.Equal(t, n, deletes, "each is deleted once")
				// The limit alone requires this time.
				least := time.Duration(left/perMinute) * time.Minute
				require.Less(t, took, 2*least)
				require.Less(t, refused, n/2, "no retry storm")
			})
		})
	}
}
