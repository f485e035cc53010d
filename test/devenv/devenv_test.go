package devenv

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestServerEnv_DropsClientAndProxySettings(t *testing.T) {
	for _, name := range []string{"OPENAI_API_KEY", "VAULT_TOKEN", "BAO_ADDR", "HTTPS_PROXY", "no_proxy"} {
		t.Setenv(name, "of-the-caller")
	}
	t.Setenv("SSL_CERT_FILE", "stays")
	env := strings.Join(serverEnv([]string{"VAULT_LEASE_REVOCATION_WORKERS=3"}), "\n")
	require.NotContains(t, env, "of-the-caller")
	require.Contains(t, env, "SSL_CERT_FILE=stays")
	require.Contains(t, env, "VAULT_LEASE_REVOCATION_WORKERS=3", "variables that a test sets")
}

func TestIsolateEnvKeepsTheChoiceOfServer(t *testing.T) {
	t.Setenv("VAULT_BIN", "/a/vault")
	t.Setenv("VAULT_TOKEN", "of-the-caller")
	IsolateEnv()
	require.Equal(t, "/a/vault", os.Getenv("VAULT_BIN"))
	require.Empty(t, os.Getenv("VAULT_TOKEN"))
}

func TestABuildThatIsInterruptedLeavesNothing(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows cannot interrupt a process")
	}
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	t.Setenv("GOCACHE", t.TempDir()) // an empty cache makes the build slow
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	built := make(chan error, 1)
	output := filepath.Join(t.TempDir(), "sim")
	go func() { built <- Build(ctx, output, "./cmd/openai-sim") }()
	inTemporary := func() int {
		entries, err := os.ReadDir(temporary)
		require.NoError(t, err)
		return len(entries)
	}
	require.Eventually(t, func() bool { return inTemporary() > 0 }, time.Minute, 10*time.Millisecond)
	cancel()
	require.Error(t, <-built)
	require.Zero(t, inTemporary(), "files that the build left")
}

func TestKillOwn_OnlyInProcessGroup(t *testing.T) {
	p, err := startProcess(exec.Command("sh", "-c", "sleep 60 & wait"))
	require.NoError(t, err)
	defer p.kill()
	var found []int
	require.NoError(t, poll(t.Context(), 10*time.Second, "the child", func() error {
		found, err = children(p.pid())
		if err == nil && len(found) == 0 {
			err = os.ErrNotExist
		}
		return err
	}))
	require.Len(t, found, 1)

	// killOwn does not kill a process of another group.
	require.NoError(t, killOwn(found[0], p.pid()+1))
	require.True(t, p.running())
	require.NoError(t, killOwn(found[0], p.pid()))
	<-p.done // the shell ends after its child
	require.NoError(t, killOwn(found[0], p.pid()), "a process that has ended is not an error")
}

// A Vault that crashes leaves its plugins running; Stop ends them.
func TestRunningFrom_ListsProcessesInFolder(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("requires /proc")
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	sleep, err := exec.LookPath("sleep")
	require.NoError(t, err)
	content, err := os.ReadFile(sleep)
	require.NoError(t, err)
	program := filepath.Join(dir, filepath.Base(sleep))
	require.NoError(t, os.WriteFile(program, content, 0o700))
	require.Empty(t, runningFrom(dir))
	cmd := exec.Command(program, "60")
	cmd.Args[0] = "sleep" // in case sleep is a multi-call binary, such as busybox
	p, err := startProcess(cmd)
	require.NoError(t, err)
	defer p.kill()
	require.NoError(t, poll(t.Context(), 10*time.Second, "the program", func() error {
		if len(runningFrom(dir)) == 0 {
			return os.ErrNotExist
		}
		return nil
	}))
	require.Equal(t, []int{p.pid()}, runningFrom(dir))
	require.Empty(t, runningFrom(filepath.Dir(dir)), "not the programs in subfolders")
}
