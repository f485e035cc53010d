//go:build integration

package integration

// Static roles when Vault disables or moves a mount, reloads its plugin, or seals.
// Only a disable deletes their credentials.

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// static writes a static role and returns its credential.
func (m *mount) static(name string, fields map[string]any) map[string]any {
	m.t.Helper()
	all := map[string]any{"project_id": m.project, "rotation_period": "1h"}
	for field, value := range fields {
		all[field] = value
	}
	m.write("static-roles/"+name, all)
	return m.read("static-creds/" + name).Data
}

func (m *mount) requireWorks(path string) {
	m.t.Helper()
	secret, err := m.client.Logical().ReadWithContext(m.t.Context(), path)
	require.NoError(m.t, err, path)
	require.NotNil(m.t, secret, path)
	require.Equal(m.t, http.StatusOK, infer(m.t, m.sim, secret.Data["api_key"].(string)), path)
}

func TestDisablingTheMountEndsItsStaticRoles(t *testing.T) {
	runParallel(t)
	for name, own := range map[string]bool{"mount in a shared process": false, "last mount in its process": true} {
		t.Run(name, func(t *testing.T) {
			v := server
			if own {
				v = ownVaultWith(t, plugin)
			}
			m := newMountOn(t, v)
			hand := m.sim.AddServiceAccount(m.project, "by hand")
			var keys []string
			for i := range 5 {
				keys = append(keys, m.static(fmt.Sprint("made-", i), nil)["api_key"].(string))
			}
			keys = append(keys, m.static("adopted", map[string]any{"service_account_id": hand})["api_key"].(string))
			for _, role := range []string{"made-0", "adopted"} { // each now has two keys that work
				m.write("rotate-role/"+role, nil)
				keys = append(keys, m.read("static-creds/" + role).Data["api_key"].(string))
			}
			m.role("r", "1h", "24h")
			keys = append(keys, m.creds("r").key)
			for _, key := range keys {
				require.Equal(t, http.StatusOK, infer(t, m.sim, key))
			}

			began := time.Now()
			require.NoError(t, m.client.Sys().UnmountWithContext(t.Context(), m.path))
			t.Logf("disabled within %s", time.Since(began).Round(time.Millisecond))
			require.Equal(t, []string{hand}, m.alive())
			require.Empty(t, m.sim.Keys())
			for _, key := range keys {
				require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, key))
			}
		})
	}
}

// While OpenAI does not respond, disabling takes a bounded time and logs what is
// left, and the other mounts in the same process soon work again.
func TestDisablingTheMountInAnOutageNamesWhatIsLeft(t *testing.T) {
	m := newMount(t, map[string]any{"request_timeout": "1s"})
	left := m.static("batch", nil)["service_account_id"].(string)
	other := newMountOn(t, server)
	other.static("batch", nil)
	cancel := m.sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang})
	began, disabled := time.Now(), make(chan error, 1)
	go func() { disabled <- m.client.Sys().UnmountWithContext(t.Context(), m.path) }()
	slowest := time.Duration(0)
	for waiting := true; waiting; {
		select {
		case err := <-disabled:
			require.NoError(t, err)
			waiting = false
		case <-time.After(20 * time.Millisecond):
		}
		asked := time.Now()
		other.requireWorks(other.path + "/static-creds/batch")
		slowest = max(slowest, time.Since(asked))
	}
	t.Logf("disabled within %s; another mount always responded within %s", time.Since(began).Round(time.Millisecond), slowest.Round(time.Millisecond))
	require.Less(t, time.Since(began), 90*time.Second)
	require.Less(t, slowest, 25*time.Second, "another mount in the process waited longer than the deletion of static roles may take (15 s)")
	cancel()
	require.NotZero(t, m.inLog("remains at OpenAI", "static_role=batch", left))
	other.write("rotate-role/batch", nil)
	m.sim.DeleteServiceAccount(m.project, left)
}

func TestMovingTheMountKeepsItsStaticRoles(t *testing.T) {
	m := newMount(t)
	hand := m.sim.AddServiceAccount(m.project, "by hand")
	made, adopted := m.static("made", map[string]any{"rotation_period": "30s"}), m.static("adopted", map[string]any{"service_account_id": hand})
	to := m.path + "-moved"
	require.NoError(t, m.client.Sys().RemountWithContext(t.Context(), m.path, to))
	m.path = to
	for role, before := range map[string]map[string]any{"made": made, "adopted": adopted} {
		require.Equal(t, http.StatusOK, infer(t, m.sim, before["api_key"].(string)))
		m.requireWorks(to + "/static-creds/" + role)
	}
	m.write("rotate-role/adopted", nil)
	m.requireWorks(to + "/static-creds/adopted")
	// The schedule continues with Vault's next periodic call.
	require.Eventually(t, func() bool { return m.read("static-creds/made").Data["api_key_id"] != made["api_key_id"] }, 150*time.Second, 500*time.Millisecond)
	m.requireWorks(to + "/static-creds/made")
}

// A failed move leaves the mount tainted, as a disable does. After a restart, the
// engine must not mistake it for a disable, even if a lease has ended meanwhile.
func TestAMoveThatFailedAndARestartKeepStaticRoles(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	made := m.static("made", nil)
	m.role("r", "1h", "24h")
	var leases []lease
	for range 5 {
		leases = append(leases, m.creds("r"))
	}
	alive := func() []string {
		return slices.DeleteFunc(m.alive(), func(id string) bool { return id == made["service_account_id"] })
	}
	var refused sync.Map // the first account to be revoked, whose deletion fails
	cancel := m.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusForbidden, Match: func(r *http.Request) bool {
		first, _ := refused.LoadOrStore("path", r.URL.Path)
		return first == r.URL.Path
	}})
	to := m.path + "-moved"
	err := m.client.Sys().RemountWithContext(t.Context(), m.path, to)
	t.Logf("the first move: %v", err)
	require.Error(t, err)
	left := alive()
	require.NotEmpty(t, left)
	path, _ := refused.Load("path")
	for _, l := range leases { // revoke another
		if slices.Contains(left, l.account) && !strings.HasSuffix(path.(string), l.account) {
			require.NoError(t, m.revoke(l))
			break
		}
	}
	require.Less(t, len(alive()), len(left), "another lease must be revoked")
	cancel()
	stopped := make(chan struct{})
	var watched sync.WaitGroup
	watched.Go(func() { // keeps using the key
		for uses := 1; ; uses++ {
			if status, err := tryKey(m.sim, made["api_key"].(string)); err != nil || status != http.StatusOK {
				t.Errorf("use %d of the static key: %d %v", uses, status, err)
				return
			}
			select {
			case <-stopped:
				t.Logf("the static key was used %d times", uses)
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	stop := sync.OnceFunc(func() { close(stopped); watched.Wait() })
	defer stop()
	require.NoError(t, m.vault.Restart(t.Context()))
	require.NoError(t, m.client.Sys().RemountWithContext(t.Context(), m.path, to))
	m.path = to
	m.requireWorks(to + "/static-creds/made")
	stop()
	m.write("rotate-role/made", nil)
	m.requireWorks(to + "/static-creds/made")
	for _, l := range leases {
		require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, l.key), "the move must revoke the leases")
	}
}

func TestStaticRolesOutliveSealsReloadsAndCrashes(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	hand := m.sim.AddServiceAccount(m.project, "by hand")
	m.static("made", nil)
	m.static("adopted", map[string]any{"service_account_id": hand})
	works := func(after string) {
		t.Helper()
		for _, role := range []string{"made", "adopted"} {
			require.Eventually(t, func() bool {
				_, err := m.client.Logical().Read(m.path + "/static-creds/" + role)
				return err == nil
			}, 20*time.Second, 20*time.Millisecond, after)
			m.requireWorks(m.path + "/static-creds/" + role)
			m.write("rotate-role/"+role, nil)
			m.requireWorks(m.path + "/static-creds/" + role)
		}
		require.Len(t, m.alive(), 2, after)
	}
	_, err := m.client.Logical().Write("sys/plugins/reload/backend", map[string]any{"mounts": m.path + "/"})
	require.NoError(t, err)
	works("after a reload of the plugin")
	require.NoError(t, m.vault.Restart(t.Context()))
	works("after a restart of Vault")
	_, err = m.vault.KillPlugins()
	require.NoError(t, err)
	works("after a crash of the plugin")
	require.NoError(t, m.vault.Kill())
	require.NoError(t, m.vault.Restart(t.Context()))
	works("after a crash of Vault")
}
