//go:build integration

package integration

// Many leases at once, an API outage, and a mount that moves. Each test logs its measurements (go test -v).

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// irrevocable returns the number of irrevocable leases of the mount.
func (m *mount) irrevocable() int {
	m.t.Helper()
	mounts, err := m.client.Sys().ListMountsWithContext(m.t.Context())
	require.NoError(m.t, err)
	accessor := mounts[m.path+"/"].Accessor
	require.NotEmpty(m.t, accessor)
	count, err := m.client.Logical().ReadWithDataWithContext(m.t.Context(), "sys/leases/count", map[string][]string{"type": {"irrevocable"}})
	require.NoError(m.t, err)
	counts, _ := count.Data["counts"].(map[string]any)
	n, _ := strconv.Atoi(fmt.Sprint(counts[accessor]))
	return n
}

func TestTwoThousandLeasesEndAtFiftyCallsASecond(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("r", "1h", "24h")
	const leases, perSecond = 2000, 50

	began := time.Now()
	parallel(8, func(int) {
		client := m.vault.Client()
		for range leases / 8 {
			if _, err := client.Logical().Read(m.path + "/creds/r"); err != nil {
				t.Errorf("issuing: %v", err)
				return
			}
		}
	})
	require.Len(t, m.alive(), leases)
	issued := time.Since(began)
	t.Logf("%d leases issued in %s", leases, issued.Round(time.Millisecond))

	m.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 60 * perSecond })
	m.sim.ResetRequests()
	// The rate limit alone takes 40 s; the issue time shows how slow the machine is.
	took := m.revokeAll("r", max(5*time.Minute, 5*issued))
	calls, refused := m.sim.Count("", ""), 0
	for _, r := range m.sim.Requests() {
		if r.Status == 429 {
			refused++
		}
	}
	t.Logf("%d leases revoked in %s at %d calls a second: %d calls, %d of them refused, %.3f per lease; %d failed revocations in Vault's log; irrevocable: %d",
		leases, took.Round(time.Millisecond), perSecond, calls, refused, float64(calls)/leases, m.inLog("failed to revoke lease", m.path), m.irrevocable())
	require.Empty(t, m.alive())
	require.Zero(t, m.irrevocable())
	require.Less(t, calls, leases*3/2, "calls")
}

// Vault marks a lease irrevocable after about ten minutes of failed revocations.
// It tries a revocation with -sync once, and removes the lease with -force even if
// the revocation fails. In all three cases, Vault does not retry the revocation.
// With OUTAGE_FULL=1, the API is down until Vault marks a lease irrevocable.
func TestOutage_EngineRetriesRevocationsThatVaultAbandoned(t *testing.T) {
	m := newMount(t, map[string]any{"request_timeout": "5s"})
	m.role("r", "1h", "24h")
	m.role("forced", "1h", "24h")
	m.role("expired", "1h", "24h")
	var failed, forced []lease
	for range 5 {
		failed, forced = append(failed, m.creds("r")), append(forced, m.creds("forced"))
	}
	full := os.Getenv("OUTAGE_FULL") != ""
	if full {
		failed = append(failed, m.creds("expired"))
	}
	kept := m.creds("r")

	outage := m.sim.Fail(openaitest.Fault{Kind: openaitest.FaultReset})
	parallel(5, func(i int) {
		if err := m.revoke(failed[i]); err == nil {
			t.Errorf("a lease was revoked while the API was down")
		}
	})
	require.NoError(t, m.client.Sys().RevokeForce(m.path+"/creds/forced"))
	require.Empty(t, m.leases("forced"))
	require.Len(t, m.leases("r"), 6)
	if full {
		began := time.Now()
		require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: m.path + "/creds/expired", Prefix: true}))
		require.Eventually(t, func() bool { return m.irrevocable() == 1 }, 20*time.Minute, 5*time.Second, "Vault did not mark the lease irrevocable")
		t.Logf("Vault marked the lease irrevocable after %s", time.Since(began).Round(time.Second))
	}
	require.Len(t, m.alive(), len(failed)+len(forced)+1)

	tries := m.inLog("failed to revoke lease", m.path)
	outage()
	back := time.Now()
	require.Eventually(t, func() bool { return len(m.alive()) == 1 }, 3*time.Minute, 250*time.Millisecond, "the engine did not retry after the outage; accounts left: %s", lazyMessage(m.alive))
	t.Logf("%d accounts of failed revocations were deleted %s after the outage", len(failed)+len(forced), time.Since(back).Round(time.Second))
	require.Equal(t, tries, m.inLog("failed to revoke lease", m.path), "Vault retried a revocation")
	require.Equal(t, []string{kept.account}, m.alive())
	// Vault's next try finds the account deleted and removes the lease.
	for _, l := range failed {
		require.True(t, m.leased(l))
		require.NoError(t, m.revoke(l))
	}
	require.NoError(t, m.revoke(kept))
	require.Zero(t, m.irrevocable())
}

// A moved mount keeps its config; Vault revokes its leases.
func TestAMountCanBeMoved(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	home := m.path
	for _, to := range []string{home + "-moved", home} {
		old := []lease{m.creds("r"), m.creds("r")}
		tag := old[0].account
		require.NoError(t, m.client.Sys().RemountWithContext(t.Context(), m.path, to))
		secret, err := m.client.Logical().Read(m.path + "/creds/r")
		require.True(t, err != nil || secret == nil, "the old path still answers")
		m.path = to
		// The new path works immediately.
		l := m.creds("r")
		require.Empty(t, l.warnings)
		require.Equal(t, []string{l.account}, m.alive(), "accounts from before the move remain, such as %s", tag)
		for _, o := range old {
			require.False(t, m.leased(o))
		}
		require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: l.id, Sync: true}))
		m.write("config/rotate", nil)
	}
	require.Empty(t, m.alive())
}
