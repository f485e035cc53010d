package openaisecrets

// The race between the pool and the WAL worker: the worker must delete orphaned
// credentials, but none in the pool or in a response. The engine's own functions run
// against storage that pauses between a listing, a read and a delete; sets of names
// replace OpenAI.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/metrics"
)

// stoppingStorage pauses before and after each operation until others proceed.
type stoppingStorage struct {
	logical.Storage
	steps atomic.Int64
}

func (s *stoppingStorage) stop() {
	// #nosec G404 -- a test
	for until := s.steps.Add(1) + rand.Int64N(6); s.steps.Load() < until; {
		if rand.IntN(50) == 0 {
			return // all others may be paused, too
		}
		runtime.Gosched()
	}
}

func (s *stoppingStorage) List(ctx context.Context, prefix string) ([]string, error) {
	s.stop()
	defer s.stop()
	return s.Storage.List(ctx, prefix)
}

func (s *stoppingStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.stop()
	defer s.stop()
	return s.Storage.Get(ctx, key)
}

func (s *stoppingStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	s.stop()
	defer s.stop()
	return s.Storage.Put(ctx, entry)
}

func (s *stoppingStorage) Delete(ctx context.Context, key string) error {
	s.stop()
	defer s.stop()
	return s.Storage.Delete(ctx, key)
}

// TestPool_TheWorkerAndTheHandOutNeverShareAKey returns a thousand credentials
// (POOL_RETURNS=10000 for more) while the worker processes entries of any age.
func TestPool_TheWorkerAndTheHandOutNeverShareAKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project, "pool_size": 100}))
	ended, err := h.b.work.pools.Hold(t.Context()) // only the test refills
	require.NoError(t, err)
	defer ended()
	h.sim.KeepAll()
	b, ctx := h.b, t.Context()
	req := &logical.Request{Storage: &stoppingStorage{Storage: h.storage.inner}, MountPoint: "openai/"}
	r, err := b.roles.get(ctx, h.storage, "app")
	require.NoError(t, err)
	snap, err := b.current(ctx, h.storage)
	require.NoError(t, err)
	of := basis{r, snap.config, 0}
	life := r.lifetime(b.System(), 0)
	b.pools.mu.Lock()
	known := b.pools.roles["app"]
	for _, c := range known.stock { // from the write of the role
		b.wal.release(c.walID)
	}
	known.stock = nil
	b.pools.mu.Unlock()
	for _, id := range h.walEntries() {
		require.NoError(t, framework.DeleteWAL(ctx, h.storage.inner, id))
	}

	returns := 1000 // ten thousand take minutes under the race detector
	if text := os.Getenv("POOL_RETURNS"); text != "" {
		var err error
		returns, err = strconv.Atoi(text)
		require.NoError(t, err)
	}
	var mu sync.Mutex
	created, returned, destroyed := map[string]bool{}, map[string]bool{}, map[string]bool{}
	destroy := func(_ context.Context, entry *framework.WALEntry) error {
		c, err := entryCredential(entry)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if !created[c.Name] { // like an account that no listing shows
			return errNotFinal
		}
		destroyed[c.Name] = true
		return nil
	}

	done := make(chan struct{})
	var clients, others sync.WaitGroup
	var n, names atomic.Int64
	refill := func() {
		m := &issued{credential: credential{Version: 1, Type: typeAccount, ProjectID: h.project, Name: fmt.Sprint("account-", names.Add(1))}, began: b.now(), spare: r.poolMaxAge()}
		m.KeyExpires = m.began.Add(life.Key + m.spare)
		var err error
		if m.walID, err = b.beginWAL(ctx, req.Storage, walPooledAccount, m.credential); err != nil {
			t.Error(err)
			return
		}
		m.ID = "user-" + m.Name
		mu.Lock()
		created[m.Name] = true
		mu.Unlock()
		switch rand.IntN(20) {
		case 0: // a lost response
			b.wal.release(m.walID)
		default:
			c := &pooled{issued: m, made: b.fingerprint(of), life: life.Key + m.spare, start: time.Now()}
			if !b.pools.add("app", c) {
				b.leaveTaken(m, metrics.PoolChanged)
			}
		}
	}
	for range 4 {
		others.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					if b.pools.status("app").ready < 100 {
						refill()
					}
				}
			}
		})
	}
	others.Go(func() { // writes of the role
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
				b.emptyPool("app", h.project)
				b.recordLeaving(ctx, req)
			}
		}
	})
	work := func(minAge time.Duration) {
		ids, err := framework.ListWAL(ctx, req.Storage)
		if err != nil {
			t.Error(err)
			return
		}
		_ = b.wal.listed(ids, b.now())
		// On a busy machine, a run may exceed its budget.
		if err := b.refreshWAL(ctx, req); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		for _, kind := range []string{walAccount, walRevokedAccount} {
			run := &walRun{b: b, req: req, began: time.Now(), refused: map[string]int{}}
			run.each(ctx, b.wal.due(kind, b.now(), minAge), func(ctx context.Context, id string) error { return run.execute(ctx, id, destroy) })
			if run.first != nil && !errors.Is(run.first, context.DeadlineExceeded) {
				t.Error(run.first)
			}
		}
	}
	for range 2 {
		others.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					work(0)
				}
			}
		})
	}
	for range 8 {
		clients.Go(func() {
			for n.Load() < int64(returns) {
				m := b.takePooled("app", of, snap, life)
				if m == nil {
					runtime.Gosched()
					continue
				}
				if err := b.commit(ctx, req, m, leaseData{Role: "app"}, of, life.TTL); err != nil {
					t.Error(err)
				}
				mu.Lock()
				returned[m.Name] = true
				if destroyed[m.Name] {
					t.Errorf("%s was returned and destroyed", m.Name)
				}
				mu.Unlock()
				b.wal.release(m.walID)
				n.Add(1)
			}
		})
	}
	clients.Wait()
	close(done)
	others.Wait()

	b.closePools() // the rest is orphaned
	b.recordLeaving(ctx, req)
	work(0)
	work(0)
	require.Empty(t, h.walEntries(), "the worker deletes all orphaned credentials")
	for name := range created {
		require.NotEqual(t, returned[name], destroyed[name], "%s: returned %t, destroyed %t", name, returned[name], destroyed[name])
	}
	require.GreaterOrEqual(t, len(returned), returns)
	t.Logf("%d created, %d returned, %d destroyed", len(created), len(returned), len(destroyed))
}
