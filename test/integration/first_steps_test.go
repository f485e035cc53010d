//go:build integration

package integration

// A new user's first steps: a mount without a config, and path-help.

import (
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
	cmd.Err = nil // from the lookup on this process's PATH
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestReadingAConfigThatIsNotThereExitsWith2(t *testing.T) {
	m := newMount(t)
	_, err := m.client.Logical().Delete(m.path + "/config")
	require.NoError(t, err)
	defer func() { m.write("config", m.adminConfig()) }() // the cleanup requires a config

	secret, err := m.client.Logical().Read(m.path + "/config")
	require.NoError(t, err)
	require.Nil(t, secret)

	out, err := m.vaultCLI("read", m.path+"/config")
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, out)
	require.Equal(t, 2, exit.ExitCode(), out)
	_, err = m.client.Logical().List(m.path + "/projects")
	require.ErrorContains(t, err, server.Product.CLI()+" write "+m.path+"/config admin_api_key=@admin-key.txt")
}

func TestPathHelp_ContainsQuickStart(t *testing.T) {
	m := newMount(t)
	out, err := m.vaultCLI("path-help", m.path)
	require.NoError(t, err, out)
	for _, word := range []string{
		"openai/config admin_api_key=@admin-key.txt", "openai/creds/my-app", "scopes=api.model.read,api.model.request", "static-creds", "openai/tidy",
		"platform.openai.com/settings/organization/admin-keys",
	} {
		require.Contains(t, out, word)
	}
}

// lookPath finds a program on the PATH of an environment.
func lookPath(env []string, name string) (string, error) {
	for i := len(env) - 1; i >= 0; i-- { // the last entry wins
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
