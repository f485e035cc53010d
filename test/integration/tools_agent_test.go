//go:build integration

package integration

// Vault Agent, Vault Proxy and consul-template, each with its example
// configuration: the keys that they provide must always work, through renewals
// and beyond max_ttl.

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// Short enough that a lease is renewed twice and then ends, all within a minute.
// Real roles have hours. The tools renew after two thirds of the TTL. If a busy
// disk delays a renewal by more than the last third, Vault answers it but still
// revokes the lease. See watch.
const (
	agentTTL    = "18s"
	agentMaxTTL = "45s"
)

// agentTemplates are the test's templates besides the example's: file → the path
// that it reads.
var agentTemplates = map[string]string{"static-key": "static-creds/my-app"}

func prepare(m *mount) { m.role("my-app", agentTTL, agentMaxTTL) }

func TestVaultAgentAlwaysHasAWorkingKeyInItsFile(t *testing.T) {
	m := newMount(t)
	prepare(m)
	m.write("static-roles/my-app", map[string]any{"project_id": m.project, "rotation_period": "10s"})
	dir := t.TempDir()
	m.login("application", dir)
	config := m.example("vault-agent/agent.hcl", dir)
	files := []string{"api-key"}
	for name, path := range agentTemplates {
		files = append(files, name)
		config += fmt.Sprintf("\ntemplate {\n  destination = %q\n  contents = %q\n}\n", filepath.Join(dir, name),
			fmt.Sprintf(`{{ with secret "%s/%s" }}{{ .Data.api_key }}{{ end }}`, m.path, path))
	}
	path := filepath.Join(dir, "agent.hcl")
	require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
	agent := m.tool(dir, nil, m.vault.Binary(), "agent", "-config="+path)

	for _, name := range files {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			watched := *m
			watched.t = t
			watched.watch("vault agent", 3, 3*time.Minute, file(filepath.Join(dir, name)))
		})
	}
	t.Cleanup(func() { require.True(t, agent.Running(), "the Agent has exited") })
}

// The supervised program writes the key that it started with to a file. Each
// key must work as long as its process runs.
func TestVaultAgentRestartsAProgramBeforeItsKeyEnds(t *testing.T) {
	m := newMount(t)
	// The Agent waits two seconds for further changes before it restarts the
	// program. The old key outlasts that, and a slow read: a tenth of its ttl is left.
	m.role("my-app", "60s", "90s")
	dir := t.TempDir()
	m.login("application", dir)
	app, started := filepath.Join(dir, "my-app"), filepath.Join(dir, "started")
	require.NoError(t, os.WriteFile(app, []byte(`#!/bin/sh
printf '%s' "$OPENAI_API_KEY" > `+started+`.new && mv `+started+`.new `+started+`
exec sleep 600
`), 0o700))
	config := m.exampleFile("vault-agent/exec.hcl", dir, "/usr/local/bin/my-app", app)
	agent := m.tool(dir, nil, m.vault.Binary(), "agent", "-config="+config)
	m.watch("vault agent's program", 2, 3*time.Minute, file(started))

	running, err := agent.Children()
	require.NoError(t, err)
	require.Len(t, running, 1, "programs that the Agent runs")
	require.NoError(t, agent.Stop())
	require.Eventually(t, func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", running[0]))
		return os.IsNotExist(err)
	}, time.Minute, 50*time.Millisecond, "the program outlived the Agent")
}

func TestVaultProxyAnswersEverybodyWithOneLease(t *testing.T) {
	m := newMount(t)
	prepare(m)
	m.role("long", "1h", "2h")
	dir := t.TempDir()
	m.login("application", dir)

	// A program that knows only the Proxy and has no token.
	settings := api.DefaultConfig()
	settings.MaxRetries = 0
	client, err := api.NewClient(settings)
	require.NoError(t, err)
	read := func() (*api.Secret, error) { return client.Logical().Read(m.path + "/creds/my-app") }
	var proxy *devenv.Tool
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		require.Less(t, time.Since(began), 2*time.Minute, "the Proxy did not log in")
		if proxy == nil || !proxy.Running() { // again, if another process took the port
			port, err := devenv.FreePort(t.Context())
			require.NoError(t, err)
			listener := fmt.Sprintf("127.0.0.1:%d", port)
			config := m.exampleFile("vault-proxy/proxy.hcl", dir, "127.0.0.1:8100", listener)
			proxy = m.tool(dir, nil, m.vault.Binary(), "proxy", "-config="+config)
			require.NoError(t, client.SetAddress("http://"+listener))
		}
		if _, err := read(); err == nil {
			break
		}
	}
	// The Proxy requires the header that Vault's clients send.
	for header, status := range map[string]int{"X-Vault-Request": http.StatusOK, "X-Other": http.StatusPreconditionFailed} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, client.Address()+"/v1/"+m.path+"/creds/my-app", nil)
		require.NoError(t, err)
		req.Header.Set(header, "true")
		answer, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, status, answer.StatusCode, header)
	}
	first, err := read()
	l := newLease(t, first, err)
	again, err := read()
	require.Equal(t, l.id, newLease(t, again, err).id)
	require.Len(t, m.alive(), 1, "all reads must share one account")

	m.watch("vault proxy", 3, 3*time.Minute, func() (string, error) {
		secret, err := read()
		if err != nil || secret == nil {
			return "", err
		}
		return secret.Data["api_key"].(string), nil
	})

	// A lease revoked in Vault stays in the Proxy's cache until the Proxy tries to
	// renew it.
	cached, err := read()
	l = newLease(t, cached, err)
	require.NoError(t, m.revoke(l))
	require.Eventually(t, func() bool {
		secret, err := read()
		return err == nil && infer(t, m.sim, newLease(t, secret, err).key) == http.StatusOK
	}, 2*time.Minute, 50*time.Millisecond, "no working key after a revocation")

	// The policy of the Proxy's login applies to all clients.
	_, err = client.Logical().Read(m.path + "/creds/long")
	requireStatus(t, http.StatusForbidden, err)
}

func TestConsulTemplateAlwaysHasAWorkingKeyInItsFile(t *testing.T) {
	m := newMount(t)
	prepare(m)
	dir := t.TempDir()
	program := filepath.Join(dir, "consul-template")
	require.NoError(t, devenv.BuildTool(t.Context(), program, "tools/consul-template", "github.com/hashicorp/consul-template"))
	config := m.exampleFile("consul-template/config.hcl", dir)
	m.tool(dir, []string{"VAULT_TOKEN=" + m.tokenOf("application")}, program, "-config="+config)
	m.watch("consul-template", 3, 3*time.Minute, file(filepath.Join(dir, "api-key")))
	info, err := os.Stat(filepath.Join(dir, "api-key"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
}
