//go:build integration

package integration

// The demo is a promise too: it must go through, against the simulator and, in
// the way that it goes against the real API, with an account of the user's.

import (
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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
	t.Parallel()
	out := demo(t)
	require.Contains(t, out, "Every step did what it said")
	require.Contains(t, out, "HTTP 200")
	require.Contains(t, out, "HTTP 401")
}

func TestTheDemoLeavesNothingInAUsersAccount(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{}) // and fails the test for what is left
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
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{}) // fails the test for what is left
	_, key := sim.AdminKey()
	sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Kind: openaitest.FaultLost, Times: 1})
	out, err := tryDemo(t, "OPENAI_ADMIN_KEY="+key, "OPENAI_PROJECT_ID="+sim.AddProject("mine"), "OPENAI_BASE_URL="+sim.URL())
	require.Error(t, err, out)
	require.Len(t, sim.AdminKeys(), 1)
}
