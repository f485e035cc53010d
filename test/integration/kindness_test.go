//go:build integration

package integration

// What a newcomer meets first: a mount without a config, and path-help.

import (
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// vaultCLI runs the vault command as a user would.
func (m *mount) vaultCLI(args ...string) (string, error) {
	m.t.Helper()
	env, err := m.vault.CLIEnv()
	require.NoError(m.t, err)
	cmd := exec.CommandContext(m.t.Context(), "vault", args...)
	cmd.Env = env
	if cmd.Path, err = lookPath(env, "vault"); err != nil {
		m.t.Fatal(err)
	}
	cmd.Err = nil // of the look-up on this process's own PATH
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestReadingAConfigThatIsNotThereSaysWhatToDo(t *testing.T) {
	m := newMount(t)
	_, err := m.client.Logical().Delete(m.path + "/config")
	require.NoError(t, err)
	defer func() { m.write("config", m.adminConfig()) }() // the mount is to clean up after itself

	raw, err := m.client.Logical().ReadRawWithContext(t.Context(), m.path+"/config")
	require.NotNil(t, raw, "%v", err)
	require.NoError(t, raw.Body.Close())
	require.Equal(t, http.StatusNotFound, raw.StatusCode)

	secret, err := m.client.Logical().Read(m.path + "/config")
	require.NoError(t, err)
	require.NotNil(t, secret)
	require.Empty(t, secret.Data)
	require.Len(t, secret.Warnings, 1)
	require.Contains(t, secret.Warnings[0], "vault write "+m.path+"/config admin_api_key=@admin-key.txt")
	require.Contains(t, secret.Warnings[0], "platform.openai.com/settings/organization/admin-keys")

	out, err := m.vaultCLI("read", m.path+"/config")
	t.Logf("vault read: %v\n%s", err, out)
	require.Contains(t, out, "This engine has no admin key yet")
}

func TestPathHelpTeaches(t *testing.T) {
	m := newMount(t)
	out, err := m.vaultCLI("path-help", m.path)
	require.NoError(t, err, out)
	for _, word := range []string{
		"openai/config admin_api_key=@admin-key.txt", "openai/creds/my-app", "scopes=api.model.request", "static-creds", "openai/tidy",
		"platform.openai.com/settings/organization/admin-keys",
	} {
		require.Contains(t, out, word)
	}
}

// lookPath finds a program on the PATH of an environment.
func lookPath(env []string, name string) (string, error) {
	for i := len(env) - 1; i >= 0; i-- { // of several the last counts
		if path, ok := strings.CutPrefix(env[i], "PATH="); ok {
			for _, dir := range filepath.SplitList(path) {
				if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
					return found, nil
				}
			}
		}
	}
	return "", exec.ErrNotFound
}
