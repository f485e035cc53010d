//go:build integration

package integration

// The demo must succeed, both against its own simulator and, as against the real
// API, with a user's admin key.

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

func demo(t *testing.T, env ...string) string {
	t.Helper()
	out, err := tryDemo(t, env...)
	require.NoError(t, err, out)
	return out
}

func tryDemo(t *testing.T, env ...string) (string, error) {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	program := filepath.Join(t.TempDir(), "demo")
	require.NoError(t, devenv.Build(t.Context(), program, "./test/demo"))
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it cleans up
	cmd.WaitDelay = time.Minute
	cmd.Dir = root
	cmd.Env = append(cmd.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestTheDemoGoesThrough(t *testing.T) {
	runParallel(t)
	out := demo(t)
	require.Contains(t, out, "All steps passed")
	require.Contains(t, out, "HTTP 200")
	require.Contains(t, out, "HTTP 401")
	require.Contains(t, out, "OPENAI_API_KEY=sk-broker-")

	require.True(t, strings.HasPrefix(out, "This program builds "), "the plan must come first:\n%s", out)
	plan, _, found := strings.Cut(out, "Finding a Vault server.")
	require.True(t, found)
	for _, text := range []string{"a minute", "VAULT_BIN", "PATH", "four minutes", "once"} {
		require.Contains(t, plan, text)
	}
	require.Contains(t, out, "vault write openai/config")
	warned := strings.Split(out, "WARNING!")
	require.Len(t, warned, 2, "only the usage report may print a warning")
	require.Contains(t, warned[1], "OpenAI may still change the figures of")
}

// The output of -dev about its keys is true: you can rotate the mount's key, and
// another mount with its own key does not affect OPENAI_ADMIN_KEY.
func TestDevRunsUntilItIsInterrupted(t *testing.T) {
	runParallel(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	program := filepath.Join(t.TempDir(), "demo")
	require.NoError(t, devenv.Build(t.Context(), program, "./test/demo"))
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-dev")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	cmd.Dir = root
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ended := false
	defer func() {
		if !ended {
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
		}
	}()
	var exports, create string
	lines := bufio.NewScanner(stdout)
	for create == "" {
		require.True(t, lines.Scan(), "the program exited early")
		line := lines.Text()
		if strings.HasPrefix(line, "export ") {
			exports += line + "\n"
		}
		if strings.HasPrefix(line, "  curl ") {
			create = strings.TrimSpace(line)
		}
	}
	user := func(script string) string {
		t.Helper()
		shell := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", exports+script)
		out, err := shell.CombinedOutput()
		require.NoError(t, err, "%s\n%s", script, out)
		return string(out)
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Log("NOT TESTED: the command that creates an admin key requires curl")
	} else {
		var created struct{ Value string }
		require.NoError(t, json.Unmarshal([]byte(user(create)), &created))
		answer := user(`vault write -f openai/config/rotate
vault secrets enable -path=second vault-plugin-secrets-openai
vault write second/config admin_api_key=` + created.Value + ` api_endpoint="$OPENAI_BASE_URL" rotation_grace_period=0
vault write -f second/config/rotate
curl -sS -o /dev/null -w 'HTTP %{http_code}\n' -H "Authorization: Bearer $OPENAI_ADMIN_KEY" "$OPENAI_BASE_URL/organization/admin_api_keys"`)
		require.Contains(t, answer, "HTTP 200")
		user("vault read openai/creds/demo")
	}
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	var rest strings.Builder
	for lines.Scan() {
		rest.WriteString(lines.Text() + "\n")
	}
	ended = true
	require.NoError(t, cmd.Wait())
	require.Contains(t, rest.String(), "Stopping.")
}

func TestTheDemoLeavesNothingInAUsersAccount(t *testing.T) {
	runParallel(t)
	sim := openaitest.Start(t, openaitest.Options{}) // fails the test for leftovers
	project := sim.AddProject("mine")
	person := sim.AddServiceAccount(project, "vault-demo-of-somebody")
	id, key := sim.AdminKey()
	out := demo(t, "OPENAI_ADMIN_KEY="+key, "OPENAI_PROJECT_ID="+project, "OPENAI_BASE_URL="+sim.URL())
	for _, secret := range sim.Secrets() {
		require.NotContains(t, out, secret, "the transcript shows a key in full")
	}
	require.Len(t, sim.Accounts(), 1)
	require.Equal(t, person, sim.Accounts()[0].ID)
	require.Len(t, sim.AdminKeys(), 1)
	require.Equal(t, id, sim.AdminKeys()[0].ID)
}

func TestTheDemoLeavesNoAdminKeyOfALostAnswer(t *testing.T) {
	runParallel(t)
	sim := openaitest.Start(t, openaitest.Options{}) // fails the test for leftovers
	_, key := sim.AdminKey()
	sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Kind: openaitest.FaultLost, Times: 1})
	out, err := tryDemo(t, "OPENAI_ADMIN_KEY="+key, "OPENAI_PROJECT_ID="+sim.AddProject("mine"), "OPENAI_BASE_URL="+sim.URL())
	require.Error(t, err, out)
	require.Len(t, sim.AdminKeys(), 1)
}
