//go:build integration

package integration

// A cluster and two plugin versions: upgrades and leader failures while clients
// read credentials.

import (
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// runningVersion returns the version of the mount's plugin.
func (m *mount) runningVersion() string {
	m.t.Helper()
	mounts, err := m.client.Sys().ListMountsWithContext(m.t.Context())
	require.NoError(m.t, err)
	return mounts[m.path+"/"].RunningVersion
}

func TestLong_AClusterLosesItsLeaderTwiceAndIsUpgradedUnderLoad(t *testing.T) {
	runParallel(t)
	ctx := t.Context()
	cluster, err := devenv.StartCluster(ctx, 3, serverOptions())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, cluster.Stop()) })
	var clients []*api.Client
	for _, node := range cluster.Nodes {
		node.WrapTransport = answers.record
		clients = append(clients, node.Client())
	}
	require.NoError(t, cluster.Register(ctx, plugin))
	leader, err := cluster.Leader(ctx)
	require.NoError(t, err)
	m := newMountOn(t, leader, frequentTidy())
	t.Cleanup(func() {
		for _, node := range cluster.Nodes {
			m.vault = node
			m.requireNoSecretWritten(m.sim.Secrets()...)
		}
	})
	m.sim.Configure(func(o *openaitest.Options) { o.Latency = apiLatency })
	// The readers see each failure. The test's own requests retry through an
	// election, which a busy cluster may hold at any time.
	m.client.SetMaxRetries(10)
	require.NoError(t, cluster.WaitMounted(ctx, m.path+"/config"))
	m.role("r", "60s", "120s")
	m.role("long", "1h", "24h")
	old := m.creds("long")
	require.Equal(t, plugin.Version, m.runningVersion())

	// Two thirds of the reads go to standbys, which forward them.
	r := m.startReaders(6, 100*time.Millisecond, "r", clients...)
	r.wait(t, 20, "through all nodes")
	require.Zero(t, r.failed.Load(), "%v", r.failuresSoFar())

	// Upgrade: register a second version, tune the mount, and reload.
	second, err := devenv.BuildPlugin(ctx, bin, devenv.BuildOptions{Version: "v0.2.0", Race: devenv.RaceAvailable(ctx)})
	require.NoError(t, err)
	require.NoError(t, cluster.Register(ctx, second))
	require.NoError(t, m.client.Sys().TuneMountAllowNilWithContext(ctx, m.path, api.TuneMountConfigInput{PluginVersion: &second.Version}))
	r.wait(t, 10, "between tune and reload")
	failed := r.failed.Load()
	_, err = m.client.Logical().WriteWithContext(ctx, "sys/plugins/reload/backend", map[string]any{"mounts": m.path + "/"})
	require.NoError(t, err)
	r.wait(t, 20, "after the reload")
	require.Equal(t, second.Version, m.runningVersion())
	renewed, err := m.client.Sys().RenewWithContext(ctx, old.id, 7200)
	require.NoError(t, err, "a lease of the old version")
	require.InDelta(t, 7200, renewed.LeaseDuration, 60)
	t.Logf("upgraded from %s to %s under load: %d reads failed", plugin.Version, second.Version, r.failed.Load()-failed)

	for i := range 2 {
		dead, err := cluster.Leader(ctx)
		require.NoError(t, err)
		failed, began := r.failed.Load(), time.Now()
		require.NoError(t, dead.Kill())
		leader, err := cluster.Leader(ctx)
		require.NoError(t, err)
		require.NotSame(t, dead, leader)
		m.vault, m.client = leader, leader.Client()
		m.client.SetMaxRetries(10)
		require.Eventually(t, func() bool {
			secret, err := m.client.Logical().Read(m.path + "/creds/r")
			return err == nil && secret != nil && m.revoke(newLease(t, secret, err)) == nil
		}, 5*time.Minute, 50*time.Millisecond, "no credential issued and revoked on the new leader")
		t.Logf("leader %d killed: the new leader issued and revoked a credential after %s, %d reads failed", i+1, time.Since(began).Round(100*time.Millisecond), r.failed.Load()-failed)
		require.NoError(t, dead.Restart(ctx))
		require.NoError(t, cluster.WaitHealthy(ctx))
		r.wait(t, 20, "through all nodes again")
	}
	require.Equal(t, second.Version, m.runningVersion())
	r.stop()
	t.Logf("%d reads answered, %d failed: %v", r.answered.Load(), r.failed.Load(), r.failuresSoFar())

	require.NoError(t, m.revoke(old), "a lease of the old version and of the first leader")
	m.requireNothingLeft("r", r.receivedAccounts())
	require.NoError(t, m.revoke(m.creds("r")), "the engine must still work")
}
