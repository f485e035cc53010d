package main

// Runs the Go benchmarks of the functions that each credential request uses, so
// that one report has all figures of a commit.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

func functions(ctx context.Context, l *lab) error {
	root, err := devenv.Root()
	if err != nil {
		return err
	}
	lasts := "0.3s"
	if l.settings.Quick {
		lasts = "10x"
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-buildvcs=false", "-run", "^$", "-bench", ".", "-benchtime", lasts, ".", "./client")
	cmd.Dir = root
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // go then ends its child processes
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go test -bench: %w\n%s", err, out)
	}
	l.functions = strings.Split(strings.TrimSpace(string(out)), "\n")
	if err := os.MkdirAll(l.settings.Output, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(l.settings.Output, "bench.txt"), out, 0o644)
}
