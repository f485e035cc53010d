package devenv

// Programs between Vault and its users, such as Vault Agent. Each runs for one
// test, with its own log, and is ended by its process ID.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Tool is such a program while it runs.
type Tool struct {
	LogPath string

	process *process
}

// Binary returns the server's program, which is also the vault command.
func (v *Vault) Binary() string { return v.opts.VaultBin }

// StartTool starts a program in dir, with its log there. Of the caller's client
// settings, it sees only those in env. The caller must Stop it.
func StartTool(dir string, env []string, program string, args ...string) (*Tool, error) {
	t := &Tool{LogPath: filepath.Join(dir, filepath.Base(program)+".log")}
	log, err := os.OpenFile(t.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }() // the process has its own copy
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	cmd.Env = serverEnv(env)
	cmd.Stdout, cmd.Stderr = log, log
	if t.process, err = startProcess(cmd); err != nil {
		return nil, fmt.Errorf("starting %s: %w", program, err)
	}
	return t, nil
}

// Running reports whether the program still runs.
func (t *Tool) Running() bool { return t.process.running() }

// Children lists the processes that the program has started.
func (t *Tool) Children() ([]int, error) { return children(t.process.pid()) }

// Stop ends the program, and any child that it left behind.
func (t *Tool) Stop() error {
	left, err := children(t.process.pid())
	t.process.terminate()
	for _, pid := range left {
		if killed := killOwn(pid, t.process.pid()); err == nil {
			err = killed
		}
	}
	return err
}

// BuildTool builds a program from a separate module in this checkout, which pins
// it. VCS stamping is off for the same reason as in Build.
func BuildTool(ctx context.Context, output, module, pkg string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	if out, err := runGo(ctx, filepath.Join(root, module), nil, "build", "-buildvcs=false", "-o", output, pkg); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// FreePort returns an unused port on loopback.
func FreePort(ctx context.Context) (int, error) {
	ports, err := freePorts(ctx, 1)
	if err != nil {
		return 0, err
	}
	return ports[0], nil
}
