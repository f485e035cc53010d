//go:build integration

package integration

// The examples for tools that do not run here: held against what those tools
// read, and, where a tool only asks Vault in a certain way, asked in that way.

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

func TestTheExamplesFitWhatTheirToolsRead(t *testing.T) {
	t.Parallel()
	root, err := devenv.Root()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", ".")
	cmd.Dir = filepath.Join(root, "tools", "examples")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
}

var attribute = regexp.MustCompile(`(?m)^ +(\w+) += (.+)$`)

// Terraform's generic endpoint writes a role, reads it and compares: what is not
// read back as it was written is a change in every plan from then on.
func TestTerraformFindsARoleAsItWroteIt(t *testing.T) {
	m := newMount(t)
	written := map[string]any{}
	block := regexp.MustCompile(`(?s)"vault_generic_endpoint" "role".*?jsonencode\(\{(.*?)\}\)`).
		FindStringSubmatch(m.example("terraform/main.tf", "", "var.project_id", `"`+m.project+`"`))
	require.NotNil(t, block, "the role in main.tf")
	for _, pair := range attribute.FindAllStringSubmatch(block[1], -1) {
		var value any
		require.NoError(t, json.Unmarshal([]byte(pair[2]), &value), pair[0])
		written[pair[1]] = value
	}
	require.Len(t, written, 3)
	for range 2 { // the second write is an apply without a change
		m.write("roles/my-app", written)
		read := m.read("roles/my-app").Data
		for name, value := range written {
			want, err := json.Marshal(value)
			require.NoError(t, err)
			got, err := json.Marshal(read[name])
			require.NoError(t, err)
			require.Equal(t, string(want), string(got), name)
		}
	}
	for range 2 { // nor may a destroy that is repeated fail
		_, err := m.client.Logical().Delete(m.path + "/roles/my-app")
		require.NoError(t, err)
	}

	// The ephemeral variant writes to the path, with what is in data_json.
	m.role("my-app", "1h", "2h")
	l := newLease(t, m.write("creds/my-app", map[string]any{"ttl": 900}), nil)
	require.Equal(t, 900, l.seconds)
}

// The External Secrets Operator's generator is run as the Operator runs it. What
// it is built from takes minutes to compile, so this has to be asked for.
func TestTheExternalSecretsGeneratorMakesAKeyEachTime(t *testing.T) {
	if os.Getenv("TOOLS_FULL") == "" {
		t.Skip("TOOLS_FULL=1 builds the External Secrets Operator's generator, for some minutes, and runs it")
	}
	m := newMount(t)
	m.role("my-app", "45m", "45m")
	dir := t.TempDir()
	program := filepath.Join(dir, "external-secrets")
	require.NoError(t, devenv.BuildTool(t.Context(), program, "tools/external-secrets", "."))
	manifest := m.exampleFile("external-secrets/generator.yaml", dir)
	token := m.tokenOf("application")
	for n := 1; n <= 2; n++ {
		cmd := exec.CommandContext(t.Context(), program, manifest)
		cmd.Env = append(cmd.Environ(), "VAULT_TOKEN="+token)
		out, err := cmd.Output()
		require.NoError(t, err)
		var secret map[string]string
		require.NoError(t, json.Unmarshal(out, &secret))
		require.Equal(t, http.StatusOK, infer(t, m.sim, secret["api_key"]))
		require.Len(t, m.alive(), n, "each refresh is an account, and the last one stays")
	}
}
