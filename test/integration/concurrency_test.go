//go:build integration

package integration

// All operations at once, on a plugin with the race detector if it is available:
// its reports fail the run (see races).

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

const loadTime = 40 * time.Second

// operationCounts counts operations and their errors.
type operationCounts struct {
	mu     sync.Mutex
	done   map[string]int
	failed map[string]map[string]int
}

func (c *operationCounts) note(what string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done[what]++; err != nil {
		if c.failed[what] == nil {
			c.failed[what] = map[string]int{}
		}
		c.failed[what][kind(err)]++
	}
}

func TestConcurrency_AllOperations(t *testing.T) {
	m := newMountOn(t, ownVault(t), frequentTidy(), map[string]any{"rotation_grace_period": "30s"})
	m.role("r", "1h", "24h")
	ctx, cancel := context.WithTimeout(t.Context(), loadTime)
	defer cancel()
	count := &operationCounts{done: map[string]int{}, failed: map[string]map[string]int{}}
	received := &readers{received: map[string]bool{}, failures: map[string]int{}}
	var group sync.WaitGroup
	again := func(pause time.Duration, name string, what func(logical *api.Logical) error) {
		group.Go(func() {
			client := m.vault.Client()
			for ctx.Err() == nil {
				count.note(name, what(client.Logical()))
				time.Sleep(rand.N(2 * pause))
			}
		})
	}
	write := func(path string, data map[string]any) func(*api.Logical) error {
		return func(l *api.Logical) error { _, err := l.Write(m.path+"/"+path, data); return err }
	}
	read := func(path string) func(*api.Logical) error {
		return func(l *api.Logical) error { _, err := l.Read(m.path + "/" + path); return err }
	}

	// The credential lifecycle. The other operations must not disturb it.
	for range 4 {
		again(20*time.Millisecond, "credential", func(l *api.Logical) error {
			secret, err := l.Read(m.path + "/creds/r")
			received.note(secret, err)
			if err != nil {
				return err
			}
			if _, err := m.client.Sys().Renew(secret.LeaseID, 7200); err != nil {
				return fmt.Errorf("renew: %w", err)
			}
			if rand.N(4) == 0 {
				return nil // revoked at the end
			}
			if err := m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: secret.LeaseID, Sync: true}); err != nil {
				return fmt.Errorf("revoke: %w", err)
			}
			return nil
		})
	}
	again(50*time.Millisecond, "config write", func(l *api.Logical) error {
		return write("config", map[string]any{"request_timeout": 20 + rand.N(10), "rotation_period": rand.N(2) * 3600})(l)
	})
	again(50*time.Millisecond, "config read", read("config"))
	again(300*time.Millisecond, "rotation", func(l *api.Logical) error {
		// Five superseded keys block it without force, and force deletes keys in use.
		err := write("config/rotate", nil)(l)
		if err != nil && strings.Contains(err.Error(), "wait for the end of their grace period") {
			return nil
		}
		return err
	})
	again(30*time.Millisecond, "role write", func(l *api.Logical) error {
		return write("roles/edited", map[string]any{"project_id": m.project, "ttl": 60 + rand.N(60)})(l)
	})
	// On a slow machine, a delete could follow each write before any read. Therefore, it
	// waits for one that succeeds.
	var edited atomic.Int64
	again(200*time.Millisecond, "role delete", func(l *api.Logical) error {
		for at := edited.Load(); edited.Load() == at && ctx.Err() == nil; {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(rand.N(100 * time.Millisecond)) // also during the next read
		_, err := l.Delete(m.path + "/roles/edited")
		return err
	})
	again(30*time.Millisecond, "credential of the edited role", func(l *api.Logical) error {
		secret, err := l.Read(m.path + "/creds/edited")
		received.note(secret, err)
		if err == nil {
			edited.Add(1)
		}
		return err
	})
	again(100*time.Millisecond, "tidy", func(l *api.Logical) error { return write("tidy", map[string]any{"apply": rand.N(2) == 0})(l) })
	again(100*time.Millisecond, "tidy status", read("tidy-status"))
	again(200*time.Millisecond, "tidy cancel", write("tidy-cancel", nil))
	again(200*time.Millisecond, "projects", func(l *api.Logical) error { _, err := l.List(m.path + "/projects"); return err })

	var unreceived atomic.Int64
	group.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			unreceived.Add(int64(disableMountUnderLoad(t, m, n, count)))
		}
	})
	group.Wait()
	for what, n := range count.done {
		failed := 0
		for _, times := range count.failed[what] {
			failed += times
		}
		t.Logf("%s: %d, of which %d failed: %v", what, n, failed, count.failed[what])
		require.Less(t, failed, n, "no %s succeeded", what)
	}
	require.Empty(t, count.failed["credential"])
	for what, failures := range count.failed {
		for failure := range failures {
			require.True(t, strings.HasPrefix(failure, "4"), "%s: %s", what, failure) // only client errors
		}
	}
	t.Logf("accounts of disabled mounts whose keys no client received: %d", unreceived.Load())

	m.write("config", map[string]any{"rotation_period": 0})
	m.revokeAll("r", time.Minute)
	m.revokeAll("edited", time.Minute)
	for _, id := range m.alive() {
		require.False(t, received.receivedAccounts()[id], "account %s outlived its lease, and a client has its key", id)
	}
	t.Logf("accounts left after the last revocation: %d", len(m.alive()))
	require.NoError(t, races())
	// The cleanup disables the mount and checks for leftovers.
}

// disableMountUnderLoad enables the engine at another path, and disables it while in
// use. It returns how many accounts are left whose keys no client received.
func disableMountUnderLoad(t *testing.T, m *mount, n int, count *operationCounts) (unreceived int) {
	sim := openaitest.Start(t, openaitest.Options{})
	project := sim.AddProject("short-lived")
	_, key := sim.AdminKey()
	path := fmt.Sprintf("%s-%d", m.path, n)
	client := m.vault.Client()
	write := func(to string, data map[string]any) error {
		_, err := client.Logical().Write(path+"/"+to, data)
		return err
	}
	for _, err := range []error{
		m.vault.Mount(t.Context(), path, api.MountConfigInput{}),
		write("config", map[string]any{"admin_api_key": key, "api_endpoint": sim.URL(), "rotation_grace_period": "1h"}),
		write("roles/r", map[string]any{"project_id": project}),
	} {
		if err != nil {
			t.Error(err)
			return 0
		}
	}
	received := &readers{received: map[string]bool{}, failures: map[string]int{}}
	var current atomic.Value
	current.Store("")
	var disabled atomic.Bool
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for !disabled.Load() {
				secret, err := client.Logical().Read(path + "/creds/r")
				received.note(secret, err)
			}
		})
	}
	group.Go(func() {
		for !disabled.Load() {
			_ = write("config", map[string]any{"request_timeout": 20 + rand.N(10)})
			if answer, err := client.Logical().Write(path+"/config/rotate", nil); err == nil && answer != nil {
				current.Store(answer.Data["admin_api_key_id"])
			}
		}
	})
	time.Sleep(rand.N(2 * time.Second)) // a random point
	err := client.Sys().Unmount(path)
	count.note("disable", err)
	disabled.Store(true)
	group.Wait()
	if err != nil {
		t.Errorf("disabling a mount in use: %v", err)
		if err := client.Sys().Unmount(path); err != nil {
			t.Error(err)
		}
	}
	// The active admin key outlives the mount: the engine never deletes it.
	keys := sim.AdminKeys()
	if len(keys) != 1 {
		t.Errorf("%d admin keys after the mount was disabled; the last known active key is %v", len(keys), current.Load())
	}
	for _, k := range keys {
		sim.Keep(k.ID)
	}
	for _, a := range sim.Accounts() {
		sim.Keep(a.ID)
		for _, k := range a.Keys {
			sim.Keep(k.ID)
		}
		if unreceived++; received.receivedAccounts()[a.ID] {
			t.Errorf("account %s outlived its mount, and a client has its key", a.ID)
		}
	}
	return unreceived
}
