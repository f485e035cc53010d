//go:build integration

package integration

// Vault's features around an engine: response wrapping, policies, the OpenAPI
// document, and the management of the plugin process.

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// token creates a token with one policy.
func (m *mount) token(policy string) string {
	m.t.Helper()
	require.NoError(m.t, m.client.Sys().PutPolicyWithContext(m.t.Context(), m.path, policy))
	secret, err := m.client.Auth().Token().CreateWithContext(m.t.Context(), &api.TokenCreateRequest{Policies: []string{m.path}})
	require.NoError(m.t, err)
	return secret.Auth.ClientToken
}

func TestACredentialCanBeWrapped(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	client := m.vault.Client()
	client.SetWrappingLookupFunc(func(string, string) string { return "1m" })
	wrapped, err := client.Logical().Read(m.path + "/creds/r")
	require.NoError(t, err)
	require.NotNil(t, wrapped.WrapInfo)
	require.Empty(t, wrapped.Data)

	unwrapped, err := m.client.Logical().Unwrap(wrapped.WrapInfo.Token)
	l := newLease(t, unwrapped, err)
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
	_, err = m.client.Logical().Unwrap(wrapped.WrapInfo.Token)
	require.Error(t, err, "a second unwrap must fail")
	require.NoError(t, m.revoke(l))
	require.Empty(t, m.alive())
}

func TestAPolicyCanAllowOneRoleOnly(t *testing.T) {
	m := newMount(t)
	m.role("mine", "1h", "24h")
	m.role("theirs", "1h", "24h")
	client := m.vault.ClientFor(m.token(`path "` + m.path + `/creds/mine" { capabilities = ["read"] }`))
	secret, err := client.Logical().Read(m.path + "/creds/mine")
	newLease(t, secret, err)
	for _, path := range []string{"creds/theirs", "roles/mine", "config"} {
		_, err := client.Logical().Read(m.path + "/" + path)
		requireStatus(t, http.StatusForbidden, err, path)
	}
	_, err = client.Logical().Write(m.path+"/config/rotate", nil)
	requireStatus(t, http.StatusForbidden, err)
	require.Len(t, m.alive(), 1)
}

func TestTheOpenAPIDocumentDescribesTheMount(t *testing.T) {
	m := newMount(t)
	// Vault builds the document from all mounts, and returns none while another
	// test disables its mount.
	var document *api.Secret
	var err error
	require.Eventually(t, func() bool {
		document, err = m.client.Logical().ReadWithContext(t.Context(), "sys/internal/specs/openapi")
		return err == nil
	}, time.Minute, 200*time.Millisecond, "%v", err)
	paths, ok := document.Data["paths"].(map[string]any)
	require.True(t, ok, "no paths in the document")
	for _, path := range []string{"config", "config/rotate", "rotate-root", "roles/", "roles/{name}", "creds/{name}", "projects/"} {
		require.Contains(t, paths, "/"+m.path+"/"+path)
	}
}

func TestProjectsAreListed(t *testing.T) {
	m := newMount(t)
	second := m.sim.AddProject("second")
	for _, path := range []string{"projects", "projects/"} {
		list, err := m.client.Logical().List(m.path + "/" + path)
		require.NoError(t, err)
		require.ElementsMatch(t, []any{m.project, second}, list.Data["keys"])
	}
}

// ownVault starts a server for a single test.
func ownVault(t *testing.T) *devenv.Vault {
	t.Helper()
	runParallel(t)
	return ownVaultWith(t, plugin)
}

func ownVaultWith(t *testing.T, plugin devenv.Plugin) *devenv.Vault {
	t.Helper()
	v, err := startVault(t.Context(), plugin)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, v.Stop()) })
	return v
}

func TestMountsShareAProcessUnlessTheirPluginsNamesDiffer(t *testing.T) {
	v := ownVault(t)
	other := plugin
	other.Name = "openai-team-b"
	require.NoError(t, v.Register(t.Context(), other))
	for i, c := range []struct {
		plugin    string
		processes int
	}{{devenv.PluginName, 1}, {devenv.PluginName, 1}, {other.Name, 2}, {other.Name, 2}} {
		m := mountPlugin(t, v, c.plugin, openaitest.Start(t, openaitest.Options{}))
		m.role("r", "1h", "24h")
		m.creds("r")
		pids, err := v.PluginPIDs()
		require.NoError(t, err)
		require.Len(t, pids, c.processes, "after mount %d", i)
	}
}

func TestAKilledPluginIsReplaced(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("r", "1h", "24h")
	old := m.creds("r")
	for range 3 {
		killed, err := m.vault.KillPlugins()
		require.NoError(t, err)
		require.Equal(t, 1, killed)
		// Vault restarts the plugin after failed requests.
		require.Eventually(t, func() bool {
			_, err := m.client.Logical().Read(m.path + "/creds/r")
			return err == nil
		}, time.Minute, 20*time.Millisecond, "no read succeeded after the plugin was killed")
	}
	require.NoError(t, m.revoke(old))
	require.NotContains(t, m.alive(), old.account)
}

func TestLeasesOutliveARestartAndACrashOfVault(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("r", "1h", "24h")
	first, second := m.creds("r"), m.creds("r")

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	require.NoError(t, m.vault.Restart(ctx))
	require.NoError(t, m.revoke(first))
	require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, first.key))

	require.NoError(t, m.vault.Kill())
	require.NoError(t, m.vault.Restart(ctx))
	_, err := m.client.Sys().RenewWithContext(ctx, second.id, 7200)
	require.NoError(t, err)
	require.NoError(t, m.revoke(second))
	require.Empty(t, m.alive())
	m.creds("r")
}
