//go:build integration

package integration

// The parts of scripts/ that can run outside of a virtual machine.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// script runs a command in the repository and returns its output.
func script(t *testing.T, env []string, command ...string) (string, error) {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestRunTests_AgainstTheAPINeverPrintsTheKey(t *testing.T) {
	runParallel(t)
	sim := openaitest.Start(t, openaitest.Options{})
	_, key := sim.AdminKey()
	// With tracing on, also in child processes, as for debugging.
	out, err := script(t, []string{
		"SHELLOPTS=xtrace", "OPENAI_ADMIN_KEY=" + key, "OPENAI_TEST_PROJECT_ID=" + sim.AddProject("tests"),
		"OPENAI_ORG_ID=" + sim.OrganizationID(), "OPENAI_BASE_URL=" + sim.URL(),
	}, "bash", "-xv", "scripts/run_tests.sh", "--integration")
	require.NoError(t, err, out)
	require.Contains(t, out, "| calls made |")
	require.Contains(t, out, "All steps passed")
	for _, secret := range sim.Secrets() {
		require.NotContains(t, out, secret)
	}
}

func TestRunTests_SaysWhatIsMissing(t *testing.T) {
	runParallel(t)
	out, err := script(t, []string{"OPENAI_ADMIN_KEY=", "OPENAI_TEST_PROJECT_ID="}, "scripts/run_tests.sh", "--integration")
	require.Error(t, err)
	require.Contains(t, out, "requires OPENAI_ADMIN_KEY")
	out, err = script(t, nil, "scripts/run_tests.sh", "--integration", "VAULT_VERSION=oldest")
	require.Error(t, err, "it must reject further arguments")
	require.Contains(t, out, "takes no further arguments")
}

func TestLiveTests_CleanUpOnASignal(t *testing.T) {
	runParallel(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	binary := filepath.Join(t.TempDir(), "live.test")
	built, err := script(t, nil, "go", "test", "-c", "-buildvcs=false", "-tags", "live", "-o", binary, "./test/live")
	require.NoError(t, err, built)
	for name, c := range map[string]struct {
		command []string
		signal  os.Signal
	}{
		"SIGINT to the tests":   {[]string{binary, "-test.run", "^TestLive$"}, syscall.SIGINT},
		"SIGHUP to the tests":   {[]string{binary, "-test.run", "^TestLive$"}, syscall.SIGHUP},
		"SIGTERM to the script": {[]string{"scripts/run_tests.sh", "--integration"}, syscall.SIGTERM},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := openaitest.Start(t, openaitest.Options{}) // fails the test for leftovers
			_, key := sim.AdminKey()
			cmd := exec.CommandContext(t.Context(), c.command[0], c.command[1:]...)
			cmd.Dir = root
			cmd.Env = append(os.Environ(), "OPENAI_ADMIN_KEY="+key, "OPENAI_TEST_PROJECT_ID="+sim.AddProject("tests"), "OPENAI_BASE_URL="+sim.URL())
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			require.NoError(t, cmd.Start())
			require.Eventually(t, func() bool { return len(sim.Requests()) >= 40 }, 2*time.Minute, time.Millisecond)
			require.NoError(t, cmd.Process.Signal(c.signal))
			require.Error(t, cmd.Wait())
			require.Contains(t, out.String(), "cut short")
			require.NotContains(t, out.String(), "The lifecycle of a key", "later parts must not run")
			require.NotContains(t, out.String(), key)
		})
	}
}

func TestProvisioning_AsRoot(t *testing.T) {
	runParallel(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	gomod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	require.NoError(t, err)
	for machine, want := range map[string]string{"x86_64": "linux-amd64", "aarch64": "linux-arm64"} {
		out, err := script(t, nil, "bash", "-c", ". scripts/vagrant_provision_as_root.sh; go_archive "+machine)
		require.NoError(t, err, out)
		release, ok := strings.CutSuffix(strings.TrimSpace(out), "."+want+".tar.gz")
		require.True(t, ok, out)
		require.Contains(t, string(gomod), "toolchain "+release+"\n")
	}
	out, err := script(t, nil, "scripts/vagrant_provision_as_root.sh")
	require.Error(t, err, "it must require a user")
	require.Contains(t, out, "usage:")
}

func TestProvisioning_AsUser(t *testing.T) {
	runParallel(t)
	state := t.TempDir()
	port, err := devenv.FreePort(t.Context()) // it must still be free after minutes of building
	require.NoError(t, err)
	version := ownVersion()
	command := []string{"scripts/vagrant_provision_as_user.sh"}
	if exec.Command("docker", "version").Run() != nil {
		t.Log("NOT TESTED: the container requires Docker")
		command = append(command, "--no-container")
	}
	env := []string{"STATE=" + state, fmt.Sprintf("LISTEN=127.0.0.1:%d", port), "VERSION=" + version, "HOME=" + state, "VAULT_BIN=" + os.Getenv("VAULT_BIN")}
	for name, value := range goFolders(t) { // they depend on HOME
		env = append(env, name+"="+value)
	}
	t.Cleanup(func() {
		if content, err := os.ReadFile(filepath.Join(state, "vault.pid")); err == nil {
			pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
			if err == nil && syscall.Kill(pid, syscall.SIGTERM) == nil {
				for range 100 { // it stops its plugins first
					if syscall.Kill(pid, 0) != nil {
						break
					}
					time.Sleep(100 * time.Millisecond)
				}
			}
		}
		if len(command) == 1 {
			_ = exec.CommandContext(context.Background(), "docker", "rmi", "-f", devenv.PluginName+":"+strings.TrimPrefix(version, "v")).Run() // the image may not exist
		}
	})
	for range 2 { // it is idempotent
		out, err := script(t, env, command...)
		require.NoError(t, err, out)
		out, err = script(t, nil, "bash", "-c", ". "+state+"/env && vault path-help openai && vault secrets list -detailed")
		require.NoError(t, err, out)
		require.Contains(t, out, version)
		require.Equal(t, len(command) == 1, strings.Contains(out, "openai-container/"), out)
	}
}

func goFolders(t *testing.T) map[string]string {
	t.Helper()
	folders := map[string]string{}
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOFLAGS", "GOPROXY"} {
		out, err := exec.Command("go", "env", name).Output()
		require.NoError(t, err)
		folders[name] = strings.TrimSpace(string(out))
	}
	return folders
}
