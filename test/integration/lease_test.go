//go:build integration

package integration

// The lifecycle of a lease: its duration, its renewal, and the deletion of the
// key when it ends.

import (
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestALeaseHasTheRolesTTLAndIsRenewable(t *testing.T) {
	m := newMount(t)
	m.role("r", "17m", "3h")
	l := m.creds("r")
	l.requireSeconds(t, 17*60)
	require.True(t, l.renewable)
	require.Empty(t, l.warnings)
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
}

func TestCreds_OneAdminCallAndKeyExpiry(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "2h")
	m.creds("r")
	before, tried := m.sim.Count("", ""), m.sim.Count(http.MethodGet, "/models")
	m.creds("r")
	tried = m.sim.Count(http.MethodGet, "/models") - tried
	require.Equal(t, 1, tried, "the key must be probed once")
	require.Equal(t, 1, m.sim.Count("", "")-before-tried, "Admin API calls for one credential")
	for _, key := range m.sim.Keys() {
		require.False(t, key.ExpiresAt.IsZero(), "the key never expires")
		life := key.ExpiresAt.Sub(key.CreatedAt)
		require.GreaterOrEqual(t, life, 2*time.Hour, "the key must outlive the lease's max_ttl")
		require.Less(t, life, 3*time.Hour)
	}
}

func TestATTLCanBeAskedForOnTheReadAndOnTheWriteForm(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	read, err := m.client.Logical().ReadWithDataWithContext(t.Context(), m.path+"/creds/r", map[string][]string{"ttl": {"600"}})
	l := newLease(t, read, err)
	l.requireSeconds(t, 600)
	require.Empty(t, l.warnings)
	written := m.write("creds/r", map[string]any{"ttl": 600})
	newLease(t, written, nil).requireSeconds(t, 600)
	written = m.write("creds/r", map[string]any{"ttl": "10m"})
	newLease(t, written, nil).requireSeconds(t, 600)
}

func TestATTLOverTheMaximumIsCutWithAWarning(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "2h")
	l := newLease(t, m.write("creds/r", map[string]any{"ttl": "5h"}), nil)
	l.requireSeconds(t, 2*3600)
	require.NotEmpty(t, l.warnings)
}

func TestCreds_InvalidTTLIsAClientError(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "2h")
	for _, ttl := range []string{"-5m", "soon", "99999999999999999999h"} {
		_, err := m.client.Logical().Write(m.path+"/creds/r", map[string]any{"ttl": ttl})
		requireStatus(t, http.StatusBadRequest, err, ttl)
	}
	require.Empty(t, m.alive())
}

func TestALeaseRenewsToTwoHoursWithoutACall(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	l := m.creds("r")
	before := m.sim.Count("", "")
	renewed, err := m.client.Sys().RenewWithContext(t.Context(), l.id, 7200)
	require.NoError(t, err)
	require.InDelta(t, 7200, renewed.LeaseDuration, 2)
	require.True(t, renewed.Renewable)
	require.Equal(t, before, m.sim.Count("", ""), "the renewal called the API")
	// The lease still has the data to revoke it.
	require.NoError(t, m.revoke(l))
	require.Empty(t, m.alive())
}

func TestARevokeKillsTheKey(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	l, other := m.creds("r"), m.creds("r")
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
	require.NoError(t, m.revoke(l))
	require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, l.key))
	require.Equal(t, []string{other.account}, m.alive())
	require.Equal(t, http.StatusOK, infer(t, m.sim, other.key), "the other lease's key")
	require.False(t, m.leased(l))
}

func TestALeaseThatRunsOutKillsTheKey(t *testing.T) {
	m := newMount(t)
	m.role("r", "2s", "4s")
	l := m.creds("r")
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, time.Minute, 100*time.Millisecond, "the account remains after its lease expired")
	require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, l.key))
}

func TestARevokeOfTheRolesPrefixKillsAllItsKeys(t *testing.T) {
	m := newMount(t)
	m.role("a", "1h", "24h")
	m.role("b", "1h", "24h")
	var leases []lease
	for range 5 {
		leases = append(leases, m.creds("a"))
	}
	other := m.creds("b")
	require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: m.path + "/creds/a", Prefix: true, Sync: true}))
	for _, l := range leases {
		require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, l.key))
	}
	require.Equal(t, []string{other.account}, m.alive())
}

func TestTokenRevocationDeletesItsKeys(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	token := m.token(`path "` + m.path + `/creds/*" { capabilities = ["read"] }`)
	secret, err := m.vault.ClientFor(token).Logical().Read(m.path + "/creds/r")
	newLease(t, secret, err)
	require.NoError(t, m.client.Auth().Token().RevokeTree(token))
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, time.Minute, 100*time.Millisecond, "the account remains after its token was revoked")
}

func TestDisablingTheMountLeavesNothing(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	for range 10 {
		m.creds("r")
	}
	require.Len(t, m.alive(), 10)
	require.NoError(t, m.client.Sys().UnmountWithContext(t.Context(), m.path))
	require.Empty(t, m.sim.Accounts())
	require.Empty(t, m.sim.Keys())
}

func TestRevokingWhatWasDeletedByHandEndsTheLease(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	l := m.creds("r")
	m.sim.DeleteServiceAccount(m.project, l.account)
	require.NoError(t, m.revoke(l))
	require.False(t, m.leased(l))
}

func TestAnArchivedProjectCountsAsGone(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	l := m.creds("r")
	m.sim.ArchiveProject(m.project)
	require.NoError(t, m.revoke(l))
	require.False(t, m.leased(l))
}

func TestADeniedRevokeKeepsTheLease(t *testing.T) {
	runParallel(t)
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			m := newMount(t)
			m.role("r", "1h", "24h")
			l := m.creds("r")
			cancel := m.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: status})
			require.Error(t, m.revoke(l))
			require.True(t, m.leased(l), "the lease must stay")
			require.Equal(t, []string{l.account}, m.alive())
			cancel()
			require.NoError(t, m.revoke(l))
			require.False(t, m.leased(l))
			require.Empty(t, m.alive())
		})
	}
}

// Vault cannot renew the leases of a deleted role, and can revoke them without
// the role.
func TestALeaseOfADeletedRoleCanOnlyEnd(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	l := m.creds("r")
	_, err := m.client.Logical().Delete(m.path + "/roles/r")
	require.NoError(t, err)
	_, err = m.client.Sys().Renew(l.id, 0)
	requireStatus(t, http.StatusBadRequest, err)
	require.True(t, m.leased(l))
	require.NoError(t, m.revoke(l))
	require.Empty(t, m.alive())
}

// requireStatus checks the HTTP status of an error from Vault's client.
func requireStatus(t *testing.T, status int, err error, what ...any) {
	t.Helper()
	var answer *api.ResponseError
	require.ErrorAs(t, err, &answer, what...)
	require.Equal(t, status, answer.StatusCode, "%v: %v", what, err)
}
