//go:build integration

package integration

// Vault Agent, Vault Proxy and consul-template, each as it is run in life and
// with its example's configuration: what they hand out must work at all times,
// through renewals and beyond the longest life of a lease.

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Short enough that a lease is renewed and comes to its end, twice, in half a
// minute. Real roles have hours; the tools act at fractions of them.
const (
	agentTTL    = "6s"
	agentMaxTTL = "15s"
)

// agentTemplates are what the Agent renders in the test besides its example's
// own template: file → the path that it reads. A static role belongs here, as
// "static-key": "static-creds/my-app", with its role made in prepare.
var agentTemplates = map[string]string{}

func prepare(m *mount) {
	m.role("my-app", agentTTL, agentMaxTTL)
}

func TestVaultAgentAlwaysHasAWorkingKeyInItsFile(t *testing.T) {
	m := newMount(t)
	prepare(m)
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
			watched.watch("vault agent", 4, 90*time.Second, file(filepath.Join(dir, name)))
		})
	}
	t.Cleanup(func() { require.True(t, agent.Running(), "the Agent has ended") })
}
