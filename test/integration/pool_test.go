//go:build integration

package integration

// Pools on a real Vault: crashes under load, a leader crash with full pools, and a
// disable while OpenAI allows few calls.

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// pool writes a role with a pool.
func (m *mount) pool(name string, size int, ttl, maxTTL string) {
	m.t.Helper()
	m.write("roles/"+name, map[string]any{"project_id": m.project, "ttl": ttl, "max_ttl": maxTTL, "pool_size": size, "pool_max_age": "30m"})
}

// poolReady returns pool_ready of a role, or -1 if the role cannot be read.
func (m *mount) poolReady(name string) int64 {
	secret, err := m.client.Logical().Read(m.path + "/roles/" + name)
	if err != nil || secret == nil {
		return -1
	}
	ready, err := secret.Data["pool_ready"].(json.Number).Int64()
	if err != nil {
		return -1
	}
	return ready
}

func (m *mount) full(name string, size int64, within time.Duration) {
	m.t.Helper()
	require.Eventually(m.t, func() bool { return m.poolReady(name) == size }, within, 200*time.Millisecond, "the pool of %s is not full", name)
}

// onlyPool waits until exactly size accounts remain.
func (m *mount) onlyPool(size int, within time.Duration) {
	m.t.Helper()
	require.Eventually(m.t, func() bool { return len(m.alive()) == size }, within, time.Second, "unexpected number of accounts: %v", lazyMessage(m.alive))
}

func TestLong_PoolsUnderCrashesLeaveNothingAndLoseNothing(t *testing.T) {
	m := newMountOn(t, ownVault(t), frequentTidy())
	m.sim.Configure(func(o *openaitest.Options) { o.Latency = apiLatency })
	const size, plugins, servers = 10, 10, 3
	m.pool("r", size, "60s", "120s")
	m.full("r", size, time.Minute)

	// The readers test each key on receipt and again during its lease.
	var mu sync.Mutex
	received, failures := map[string]bool{}, map[string]int{}
	var answered, lost atomic.Int64
	var ended atomic.Bool
	var readers sync.WaitGroup
	works := func(key, when string) {
		status, err := tryKey(m.sim, key)
		if err == nil && status == 401 {
			lost.Add(1)
			t.Errorf("a leased key does not work %s", when)
		}
	}
	t.Cleanup(func() { ended.Store(true); readers.Wait() }) // before the disable
	for range 6 {
		readers.Go(func() {
			for !ended.Load() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				secret, err := m.client.Logical().ReadWithContext(ctx, m.path+"/creds/r")
				cancel()
				if err != nil || secret == nil {
					mu.Lock()
					if err != nil {
						failures[kind(err)]++
					}
					mu.Unlock()
					time.Sleep(100 * time.Millisecond)
					continue
				}
				l := newLease(t, secret, err)
				answered.Add(1)
				mu.Lock()
				received[l.account] = true
				mu.Unlock()
				works(l.key, "on receipt")
				readers.Go(func() {
					time.Sleep(45 * time.Second)
					works(l.key, "45 seconds later")
				})
				time.Sleep(rand.N(3 * time.Second)) // slower than the refill, which adds one at a time
			}
		})
	}
	plan := slices.Concat(slices.Repeat([]bool{false}, plugins), slices.Repeat([]bool{true}, servers))
	rand.Shuffle(len(plan), func(i, j int) { plan[i], plan[j] = plan[j], plan[i] })
	for i, server := range plan {
		at := answered.Load()
		require.Eventually(t, func() bool { return answered.Load() >= at+5 }, 5*time.Minute, 5*time.Millisecond, "too few reads before crash %d", i)
		require.Eventually(t, func() bool { return m.poolReady("r") >= size/2 }, 5*time.Minute, 100*time.Millisecond, "the pool is not half full before crash %d", i)
		time.Sleep(rand.N(time.Second))
		if server {
			require.NoError(t, m.vault.Kill())
			require.NoError(t, m.vault.Restart(t.Context()))
			continue
		}
		require.Eventually(t, func() bool {
			killed, err := m.vault.KillPlugins()
			require.NoError(t, err)
			return killed > 0
		}, 2*time.Minute, time.Millisecond, "no plugin to kill, crash %d", i)
	}
	at := answered.Load()
	require.Eventually(t, func() bool { return answered.Load() >= at+5 }, 5*time.Minute, 5*time.Millisecond, "too few reads after the crashes")
	ended.Store(true)
	readers.Wait()
	t.Logf("plugin killed %d times, Vault %d times; %d reads answered, %d keys lost; failures: %v", plugins, servers, answered.Load(), lost.Load(), failures)

	m.full("r", size, 3*time.Minute)
	took := m.revokeAll("r", 10*time.Minute)
	t.Logf("the leases were revoked in %s", took.Round(time.Millisecond))
	m.write("roles/r", map[string]any{"pool_size": 0})
	require.Eventually(t, func() bool { return fmt.Sprint(m.read("config").Data["wal_entries"]) == "0" }, leftoverTimeout, time.Second, "WAL entries remain; accounts left: %v", lazyMessage(m.alive))

	// A crash before Vault stores the lease of a returned key leaves a key that no
	// client has, until it expires.
	left := m.alive()
	t.Logf("%d keys were lost in a crash and remain until they expire", len(left))
	require.LessOrEqual(t, len(left), 6*len(plan))
	for _, id := range left {
		require.False(t, received[id], "account %s outlived its lease, and a client has its key", id)
	}
	for _, key := range m.sim.Keys() {
		require.WithinRange(t, key.ExpiresAt, key.CreatedAt.Add(120*time.Second), key.CreatedAt.Add(120*time.Second+30*time.Minute+2*time.Minute), "key %s", key.ID)
		m.sim.Keep(key.AccountID, key.ID)
	}
}

func TestAPoolDiesWithItsLeaderAndTheNextFillsItsOwn(t *testing.T) {
	runParallel(t)
	ctx := t.Context()
	cluster, err := devenv.StartCluster(ctx, 3, serverOptions())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, cluster.Stop()) })
	for _, node := range cluster.Nodes {
		node.WrapTransport = answers.record
	}
	require.NoError(t, cluster.Register(ctx, plugin))
	leader, err := cluster.Leader(ctx)
	require.NoError(t, err)
	m := newMountOn(t, leader, frequentTidy())
	m.client.SetMaxRetries(10)
	const size = 20
	m.pool("a", size, "1h", "24h")
	m.pool("b", size, "1h", "24h")
	m.full("a", size, time.Minute)
	m.full("b", size, time.Minute)
	leased := m.creds("a")
	m.full("a", size, time.Minute)
	old := map[string]bool{}
	for _, id := range m.alive() {
		old[id] = id != leased.account
	}

	began := time.Now()
	require.NoError(t, leader.Kill())
	next, err := cluster.Leader(ctx)
	require.NoError(t, err)
	m.vault, m.client = next, next.Client()
	m.client.SetMaxRetries(10)
	m.full("a", size, 5*time.Minute)
	m.full("b", size, 5*time.Minute)
	t.Logf("the new leader's pools were full %s after the kill", time.Since(began).Round(time.Second))
	m.onlyPool(2*size+1, 10*time.Minute)
	t.Logf("the old leader's pools were deleted %s after the kill", time.Since(began).Round(time.Second))
	for _, id := range m.alive() {
		require.False(t, old[id], "account %s is from the old leader's pool", id)
	}
	require.Equal(t, 200, infer(t, m.sim, leased.key), "the key of the lease must stay valid")
	fresh := m.creds("a")
	require.Equal(t, 200, infer(t, m.sim, fresh.key))
	for _, l := range []lease{leased, fresh} {
		require.NoError(t, m.revoke(l))
	}
	require.NoError(t, leader.Restart(ctx))
	require.NoError(t, cluster.WaitHealthy(ctx))
}

func TestDisablingAMountWithAFullPoolAtTenCallsAMinute(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	const size = 60
	m.pool("r", size, "1h", "2h")
	m.full("r", size, time.Minute)
	var taken atomic.Int64
	var ended atomic.Bool
	var readers sync.WaitGroup
	m.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 10 })
	m.keepAdminKey()
	path, client := m.path, m.vault.Client()
	began := make(chan struct{})
	for range 4 {
		readers.Go(func() {
			<-began
			for !ended.Load() {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				secret, err := client.Logical().ReadWithContext(ctx, path+"/creds/r")
				cancel()
				if err == nil && secret != nil {
					taken.Add(1)
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	disabling := make(chan error, 1)
	at := time.Now()
	go func() { disabling <- m.unmount() }()
	time.Sleep(500 * time.Millisecond) // the mount is tainted by now
	close(began)
	err := <-disabling
	took := time.Since(at)
	ended.Store(true)
	readers.Wait()
	require.NoError(t, err)
	require.Zero(t, taken.Load(), "a key was returned by a mount that is being disabled")
	left := m.alive()
	require.Less(t, len(left), size, "no account was deleted in time")
	for _, id := range left {
		require.NotZero(t, m.inLog("credential remains at OpenAI", id), "%s is not in the log", id)
	}
	t.Logf("disabled in %s: %d of %d accounts deleted, %d logged by ID", took.Round(time.Second), size-len(left), size, len(left))
	m.sim.Advance(2*time.Hour + 30*time.Minute + 75*time.Second + time.Second)
	require.Empty(t, m.sim.Keys(), "each key must expire")
	m.sim.KeepAll()
}

// The pool serves a burst of readers, although the rate limit would make most of them
// wait for minutes.
func TestABurstIsServedFromThePool(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.sim.Configure(func(o *openaitest.Options) {
		o.Latency, o.ActivationDelay = 100*time.Millisecond, 1500*time.Millisecond
	})
	const size = 20
	m.pool("r", size, "1h", "2h")
	m.full("r", size, 2*time.Minute)
	m.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 10 })
	began := time.Now()
	var group sync.WaitGroup
	leases := make(chan lease, size)
	clients := make([]*api.Client, size)
	for i := range clients {
		clients[i] = m.vault.Client()
	}
	for _, client := range clients {
		group.Go(func() {
			secret, err := client.Logical().Read(m.path + "/creds/r")
			if err != nil {
				t.Error(err)
				return
			}
			leases <- newLease(t, secret, err)
		})
	}
	group.Wait()
	took := time.Since(began)
	close(leases)
	n := 0
	for l := range leases {
		n++
		require.Equal(t, 200, infer(t, m.sim, l.key), "the key must work immediately")
	}
	require.Equal(t, size, n)
	t.Logf("%d clients served in %s", n, took.Round(time.Millisecond))
	require.Less(t, took, 5*time.Second)
	m.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 0 })
	m.revokeAll("r", 2*time.Minute)
}
