//go:build integration

package integration

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// A plugin holds the admin key, so it must exit with its server, whatever the cause.
// The server here is idle: during a request, the plugin would see a broken pipe.
func TestNoPluginOutlivesAKilledServer(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("r", "1h", "24h")
	var longest time.Duration
	for range 10 {
		require.NoError(t, m.revoke(m.creds("r")))
		plugins, err := m.vault.PluginPIDs()
		require.NoError(t, err)
		require.Len(t, plugins, 1)
		require.NoError(t, m.vault.Kill())
		longest = max(longest, ends(t, plugins[0], 2*time.Second))
		require.NoError(t, m.vault.Restart(t.Context()))
	}
	t.Logf("ten plugins exited at most %s after their server", longest.Round(time.Millisecond))
}

// A plugin in a container sees only the connection to its server, not the process.
// Here it is the first process in its own namespace, as in a container.
// TestContainer kills the server of a real container.
func TestNoPluginWithoutAVisibleParentOutlivesAKilledServer(t *testing.T) {
	runParallel(t)
	unshare, err := exec.LookPath("unshare")
	if err == nil {
		err = exec.CommandContext(t.Context(), unshare, "--pid", "--fork", "--kill-child", "true").Run()
	}
	if err != nil {
		t.Skipf("NOT TESTED: a plugin in its own process namespace requires unshare: %v", err)
	}
	wrapped := devenv.Plugin{Name: "openai-apart", Path: filepath.Join(t.TempDir(), "apart"), Version: plugin.Version}
	script := fmt.Sprintf("#!/bin/sh\nexec %q --pid --fork --kill-child %q \"$@\"\n", unshare, plugin.Path)
	require.NoError(t, os.WriteFile(wrapped.Path, []byte(script), 0o700))
	sum := sha256.Sum256([]byte(script))
	wrapped.SHA256 = hex.EncodeToString(sum[:])

	m := mountPlugin(t, ownVaultWith(t, wrapped), wrapped.Name, openaitest.Start(t, openaitest.Options{}))
	m.role("r", "1h", "24h")
	require.NoError(t, m.revoke(m.creds("r")))
	outside, err := m.vault.PluginPIDs() // unshare, whose one child is the plugin
	require.NoError(t, err)
	require.Len(t, outside, 1)
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", outside[0], outside[0]))
	require.NoError(t, err)
	inside, err := strconv.Atoi(strings.TrimSpace(string(children)))
	require.NoError(t, err)
	time.Sleep(35 * time.Second) // it must run with its server
	m.creds("r")
	require.True(t, runs(inside))

	require.NoError(t, m.vault.Kill())
	t.Logf("exited %s after its server", ends(t, inside, 40*time.Second).Round(time.Millisecond))
	require.NoError(t, m.vault.Restart(t.Context()))
}

// ends waits until a process exits and returns how long that took.
func ends(t *testing.T, pid int, within time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	for runs(pid) {
		require.Less(t, time.Since(began), within, "the plugin's process still runs")
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

// runs reports whether a process runs. A zombie, whose parent has not waited for it,
// does not.
func runs(pid int) bool {
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		_, state, _ := strings.Cut(string(stat), ") ")
		return !strings.HasPrefix(state, "Z")
	}
	out, err := exec.CommandContext(context.Background(), "ps", "-o", "stat=", "-p", strconv.Itoa(pid)).Output() // macOS
	return err == nil && len(out) > 0 && out[0] != 'Z'
}
