//go:build integration

package integration

// The benchmark reports every figure, with plausible values. These tests do not
// judge performance.

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// bench runs the benchmark, and returns its output and its output directory. The
// benchmark must leave its temporary directory empty.
func bench(t *testing.T, args ...string) (said, written string) {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	program, written, temporary := filepath.Join(t.TempDir(), "bench"), t.TempDir(), t.TempDir()
	require.NoError(t, devenv.Build(t.Context(), program, "./test/bench"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{"-quick", "-o", written}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it cleans up
	cmd.WaitDelay = time.Minute
	cmd.Dir = root
	cmd.Env = append(cmd.Environ(), "TMPDIR="+temporary)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	left, err := os.ReadDir(temporary)
	require.NoError(t, err)
	require.Empty(t, left, "the benchmark left temporary files")
	return string(out), written
}

func TestTheBenchmarkMeasuresEverything(t *testing.T) {
	runParallel(t)
	said, written := bench(t)
	content, err := os.ReadFile(filepath.Join(written, "bench.json"))
	require.NoError(t, err)
	type stat struct{ Median, Min, Max float64 }
	var report struct {
		Machine struct {
			Cores             int
			Go, Vault, Commit string
		}
		Figures []struct {
			ID, Title     string
			Ratio         *stat
			Floor, Engine *stat
			Target        *struct{ Limit float64 }
		}
		Functions []string
	}
	require.NoError(t, json.Unmarshal(content, &report))
	require.Positive(t, report.Machine.Cores)
	require.Equal(t, server.Version, report.Machine.Vault)
	require.NotEmpty(t, report.Machine.Go)

	floor, engine, targets := map[string]float64{}, map[string]float64{}, 0
	for _, f := range report.Figures {
		require.Contains(t, said, f.Title)
		if f.Floor != nil {
			floor[f.ID] = f.Floor.Median
		}
		if f.Engine != nil {
			engine[f.ID] = f.Engine.Median
			require.GreaterOrEqual(t, f.Engine.Median, 0.0, f.ID)
		}
		if f.Target != nil {
			targets++
		}
	}
	require.Equal(t, 15, targets, "figures with a target")

	page, err := os.ReadFile(filepath.Join(written, "bench.md"))
	require.NoError(t, err)
	require.Equal(t, 52+4, strings.Count(string(page), "\n"), "a figure that the documentation shows is missing: %s", page)

	// Known values.
	for _, section := range []string{"issue", "raft"} {
		require.Equal(t, 1.0, engine[section+"/admin_calls"], section)
		require.Zero(t, floor[section+"/admin_calls"], "the null engine makes no calls")
		require.InDelta(t, 2, floor[section+"/storage/put"], 0.1, "a lease and its index")
		require.InDelta(t, 3, engine[section+"/storage/put"], 0.1, "a lease, its index and the WAL entry")
		require.InDelta(t, 1, engine[section+"/storage/delete"], 0.1, "the WAL entry")
	}
	require.Zero(t, engine["issue/pool/c1/calls"])
	require.InDelta(t, 1, engine["issue/pool/c1/storage"]-floor["issue/pool/c1/storage"], 0.1, "the deletion of the WAL entry")
	for _, id := range []string{"burst/20", "burst/100"} {
		require.Zero(t, engine[id+"/pool/failed"], id)
		require.Positive(t, engine[id+"/pool/all"], id)
		require.GreaterOrEqual(t, engine[id+"/none/p50"], 1500.0, "includes the activation of each key")
	}
	require.Equal(t, 1.0, engine["leases/revoke/admin_calls"])
	require.Zero(t, engine["leases/renew/admin_calls"])
	require.Equal(t, 1.0, engine["crowd/admin_calls"])
	require.LessOrEqual(t, engine["connections/http2"], 4.0, "calls share HTTP/2 connections")
	require.Positive(t, engine["connections/http1"])
	require.GreaterOrEqual(t, engine["issue/c1/100ms/p50"], 100.0)
	require.GreaterOrEqual(t, engine["issue/c1/100ms/probed/p50"], 200.0, "one more call")
	require.Greater(t, engine["issue/c32/100ms/rate"], engine["issue/c1/100ms/rate"])
	require.InDelta(t, 1.5, engine["limit/calls"], 0.5, "calls per deletion")
	for _, id := range []string{
		"issue/c1/0ms/rate", "issue/c32/0ms/p99", "issue/c256/0ms/p95", "issue/rss/idle", "issue/rss/c256", "leases/renew",
		"leases/revoke/each", "leases/revoke/sync", "leases/revoke/async", "static/rate", "raft/c256/0ms/rate", "startup",
		"growth/few/issue", "growth/more/issue/against", "growth/many/revoke",
	} {
		require.Positive(t, floor[id], id)
		require.Positive(t, engine[id], id)
	}
	for _, id := range []string{"issue/c256/100ms/rate", "limit/seconds", "limit/renew", "crowd/issue/against"} {
		require.Positive(t, engine[id], id)
	}
	benchmarks := strings.Join(report.Functions, "\n")
	for _, name := range []string{"BenchmarkIssue/c=32", "BenchmarkRevoke", "BenchmarkRenew", "BenchmarkStaticRead", "BenchmarkAccountName", "BenchmarkReadRole", "BenchmarkCreateServiceAccount"} {
		require.Contains(t, benchmarks, name)
	}
}

func TestTheBenchmarkTakesProfiles(t *testing.T) {
	runParallel(t)
	_, written := bench(t, "-profile")
	for _, phase := range []string{"issue", "revoke"} {
		for _, of := range []string{"plugin-profile", "plugin-mutex", "plugin-block", "plugin-allocs", "vault-profile", "vault-allocs", "load-profile"} {
			content, err := os.ReadFile(filepath.Join(written, "profiles", phase+"-"+of+".pprof"))
			require.NoError(t, err)
			require.Equal(t, "\x1f\x8b", string(content[:2]), "%s of %s is not a profile: %.100s", of, phase, content)
		}
	}
}
