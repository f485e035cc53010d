//go:build integration

package integration

// Spend limits on a real Vault: a block outlives its leader.

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// blocked requires that a role refuses a key with status 400 and its figures.
func (m *mount) blocked(role, figures string) {
	m.t.Helper()
	_, err := m.client.Logical().Read(m.path + "/creds/" + role)
	var refusal *api.ResponseError
	require.ErrorAs(m.t, err, &refusal)
	require.Equal(m.t, http.StatusBadRequest, refusal.StatusCode)
	require.Contains(m.t, err.Error(), figures)
}

func TestLong_ABlockOutlivesItsLeader(t *testing.T) {
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
	m := newMountOn(t, leader)
	m.client.SetMaxRetries(10)
	m.pool("held", 3, "1h", "24h")
	m.pool("ended", 3, "1h", "24h")
	m.write("static-roles/batch", map[string]any{"project_id": m.project, "rotation_period": "24h"})
	m.full("held", 3, time.Minute)
	m.full("ended", 3, time.Minute)
	held, ended := m.creds("held"), m.creds("ended")
	static, err := m.client.Logical().Read(m.path + "/static-creds/batch")
	require.NoError(t, err)
	for _, k := range m.sim.Keys() {
		if k.AccountID == held.account || k.AccountID == ended.account || k.ID == static.Data["api_key_id"] {
			m.sim.AddCost(m.project, k.ID, "gpt-5-mini, output_tokens", m.sim.Now(), "1.5000001")
		}
	}
	m.write("config", map[string]any{"usage_interval": "5m"})
	m.write("roles/held", map[string]any{"spend_limit": "1.50", "spend_action": "block"})
	m.write("roles/ended", map[string]any{"spend_limit": "1.50", "spend_action": "revoke"})
	m.write("static-roles/batch", map[string]any{"spend_limit": "1.50", "spend_action": "block"})

	began := time.Now()
	require.Eventually(t, func() bool {
		role, err := m.client.Logical().Read(m.path + "/roles/ended")
		return err == nil && role.Data["spend_blocked_until"] != nil && infer(t, m.sim, ended.key) == http.StatusUnauthorized
	}, 3*time.Minute, time.Second)
	t.Logf("blocked, and the key deleted, %s after the limit was written", time.Since(began).Round(time.Second))
	const figures = "have cost 1.5000001 USD, and the limit is 1.50 USD per month"
	m.blocked("held", figures)
	m.blocked("ended", figures)
	require.Equal(t, http.StatusOK, infer(t, m.sim, held.key), "a block deletes no key")
	m.onlyPool(2, 2*time.Minute) // the lease's account and the static role's: the pools are empty

	// The next leader knows the block without reading costs.
	m.sim.Fail(openaitest.Fault{Kind: openaitest.FaultStatus, Status: 500, Route: "/organization/costs"})
	require.NoError(t, leader.Kill())
	next, err := cluster.Leader(ctx)
	require.NoError(t, err)
	m.vault, m.client = next, next.Client()
	m.client.SetMaxRetries(10)
	require.Eventually(t, func() bool {
		_, err := m.client.Logical().Read(m.path + "/creds/held")
		return err != nil && strings.Contains(err.Error(), figures)
	}, time.Minute, time.Second)
	m.blocked("ended", figures)
	_, err = m.client.Logical().Read(m.path + "/static-creds/batch")
	require.ErrorContains(t, err, figures)
	_, err = m.client.Sys().Renew(held.id, 3600)
	require.ErrorContains(t, err, figures)
	var refusal *api.ResponseError
	require.ErrorAs(t, err, &refusal)
	require.Equal(t, http.StatusBadRequest, refusal.StatusCode)
	time.Sleep(70 * time.Second) // a periodic call, which would refill the pools
	require.Zero(t, m.poolReady("held"))
	require.Len(t, m.alive(), 2)

	m.write("roles/held", map[string]any{"spend_limit": "2"})
	fresh := m.creds("held")
	require.Equal(t, http.StatusOK, infer(t, m.sim, fresh.key))
	m.sim.ClearFaults()
	for _, l := range []lease{held, ended, fresh} {
		require.NoError(t, m.revoke(l))
	}
	require.NoError(t, leader.Restart(context.WithoutCancel(ctx)))
	require.NoError(t, cluster.WaitHealthy(ctx))
}
