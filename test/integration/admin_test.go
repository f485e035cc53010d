//go:build integration

package integration

// The admin key: rejected keys, rotation, and the isolation of two organizations
// in one plugin process.

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestConfig_InvalidAdminKeyKeepsActiveKey(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	before := m.read("config").Data
	for name, key := range map[string]string{
		"unknown":       "sk-admin-" + "nobody-has-ever-seen-this-one-0123456789",
		"a project key": m.creds("r").key,
		"empty":         "",
	} {
		config := m.adminConfig()
		config["admin_api_key"] = key
		_, err := m.client.Logical().Write(m.path+"/config", config)
		requireStatus(t, http.StatusBadRequest, err, name)
	}
	require.Equal(t, before, m.read("config").Data)
	m.creds("r")
}

func TestTheConfigFindsItsKeyAndNeverShowsIt(t *testing.T) {
	m := newMount(t)
	id, key := m.sim.AdminKey()
	config := m.read("config").Data
	require.Equal(t, id, config["admin_api_key_id"])
	require.NotContains(t, config, "admin_api_key")
	for field, value := range config {
		require.NotContains(t, fmt.Sprint(value), key, field)
	}
}

// Rotations fail no concurrent read, and after the grace period one admin key is
// left. The end of the test waits for Vault's periodic call, which comes once a
// minute.
func TestConfigRotate_ConcurrentReadsSucceed(t *testing.T) {
	m := newMount(t, map[string]any{"rotation_grace_period": "1s"})
	m.role("r", "1h", "24h")

	var stop atomic.Bool
	var reads atomic.Int64
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			client := m.vault.Client()
			for !stop.Load() {
				if _, err := client.Logical().Read(m.path + "/creds/r"); err != nil {
					t.Errorf("read %d failed: %v", reads.Load(), err)
					return
				}
				reads.Add(1)
			}
		})
	}
	seen := map[any]bool{m.read("config").Data["admin_api_key_id"]: true}
	for i := range 5 { // the maximum number of superseded keys
		answer := m.write("config/rotate", nil)
		id := answer.Data["admin_api_key_id"]
		require.NotEmpty(t, id)
		require.False(t, seen[id], "rotation %d returned an earlier key", i)
		seen[id] = true
		at := reads.Load()
		require.Eventually(t, func() bool { return reads.Load() > at+4 || t.Failed() }, time.Minute, 5*time.Millisecond, "too few reads between rotations")
	}
	stop.Store(true)
	readers.Wait()
	t.Logf("%d reads during 5 rotations", reads.Load())

	config := m.read("config").Data
	require.Eventually(t, func() bool { return len(m.sim.AdminKeys()) == 1 }, 140*time.Second, time.Second, "superseded admin keys remain after the grace period")
	require.Equal(t, config["admin_api_key_id"], m.sim.AdminKeys()[0].ID)
	// The engine updates the config after the last deletion.
	require.Eventually(t, func() bool { return fmt.Sprint(m.read("config").Data["superseded_admin_keys"]) == "0" }, 30*time.Second, 100*time.Millisecond)
	m.creds("r")
}

func TestTwoOrganizationsInOneProcessDoNotMix(t *testing.T) {
	a := newMount(t)
	b := newMountOn(t, server)
	pids, err := server.PluginPIDs()
	require.NoError(t, err)
	require.Len(t, pids, 1, "this test requires both mounts in one process")
	a.role("r", "1h", "24h")
	b.role("r", "1h", "24h")

	const each = 10
	var wg sync.WaitGroup
	leases := make([]lease, 2*each)
	for i := range leases {
		m := []*mount{a, b}[i%2]
		wg.Go(func() {
			secret, err := m.vault.Client().Logical().ReadWithContext(context.WithoutCancel(t.Context()), m.path+"/creds/r")
			if err == nil && secret != nil {
				leases[i] = lease{id: secret.LeaseID, key: secret.Data["api_key"].(string)}
			}
		})
	}
	wg.Wait()
	for i, l := range leases {
		own, other := a.sim, b.sim
		if i%2 == 1 {
			own, other = other, own
		}
		require.NotEmpty(t, l.key, "read %d failed", i)
		require.Equal(t, http.StatusOK, infer(t, own, l.key))
		require.Equal(t, http.StatusUnauthorized, infer(t, other, l.key))
	}
	require.Len(t, a.alive(), each)
	require.Len(t, b.alive(), each)

	// Rotating one organization's admin key does not affect the other's.
	a.write("config/rotate", nil)
	id, _ := b.sim.AdminKey()
	require.Equal(t, id, b.read("config").Data["admin_api_key_id"])
	for _, l := range leases {
		require.NoError(t, a.revoke(l))
	}
	require.Empty(t, a.alive())
	require.Empty(t, b.alive())
}
