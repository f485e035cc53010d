//go:build integration

// Package integration tests the engine on a real Vault server: the built plugin
// binary, a standard server with raft storage and a file audit device, and a
// simulated OpenAI API.
//
// Most tests share one server and run in parallel, each with its own mount and
// simulator; a test that disrupts the server starts its own. A test must delete
// everything that it creates: the simulator fails a test that leaves an account or
// a valid key, and each test searches everything that Vault wrote for its keys.
//
// The tests of crashes, load and failover log their measurements; go test -v shows
// them. With OUTAGE_FULL=1, the test of a long outage waits until Vault gives up,
// for up to 20 minutes (with go test -timeout 30m).
package integration

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-openai/test/devenv"
)

var (
	server *devenv.Vault // the shared server
	plugin devenv.Plugin // the binary that all servers use
	bin    string        // the binary's directory
)

func TestMain(m *testing.M) {
	devenv.IsolateEnv()
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = flag.Set("test.parallel", "1000") // effectively unlimited; parallelSlots is the limit
	}
	os.Exit(run(m))
}

// parallelSlots limits the tests that run in parallel. Slow tests mostly wait for Vault's
// timers, so the limit does not depend on the number of processors.
var parallelSlots = make(chan struct{}, 24)

// longTestPrefix is the name prefix of tests that wait for minutes. `make test` starts
// them with the unit tests. They take no slot, so that none of them starts late.
const longTestPrefix = "TestLong_"

// runParallel runs a test in parallel with others, in a slot. A subtest uses the slot of
// its parent.
func runParallel(t *testing.T) {
	t.Helper()
	t.Parallel()
	if strings.HasPrefix(t.Name(), longTestPrefix) || strings.Contains(t.Name(), "/") {
		return
	}
	parallelSlots <- struct{}{}
	t.Cleanup(func() { <-parallelSlots })
}

func run(m *testing.M) (code int) {
	ctx := context.Background()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1
	}
	dir, err := os.MkdirTemp("", "vault-openai-test-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	bin = dir
	race := devenv.RaceAvailable(ctx)
	if plugin, err = devenv.BuildPlugin(ctx, dir, devenv.BuildOptions{Race: race}); err != nil {
		return fail(err)
	}
	if server, err = startVault(ctx, plugin); err != nil {
		return fail(err)
	}
	fmt.Printf("%s, plugin %s (race detector: %t)\n", server, plugin.Version, race)
	defer func() {
		if err := server.Stop(); err != nil {
			code = fail(err)
		}
		if err := races(); err != nil {
			code = fail(err)
		}
	}()
	return m.Run()
}

// serverOptions apply to all servers here.
func serverOptions() devenv.Options {
	return devenv.Options{
		LogLevel: "trace",
		Audit:    true,
		// Data races are reported to files: Vault's log may lack what
		// a plugin writes to standard error.
		Env: []string{"GORACE=log_path=" + filepath.Join(bin, "race")},
	}
}

// startVault starts a server with a plugin in its catalog.
func startVault(ctx context.Context, plugin devenv.Plugin) (*devenv.Vault, error) {
	v, err := devenv.Start(ctx, serverOptions())
	if err != nil {
		return nil, err
	}
	v.WrapTransport = answers.record
	if err := v.Register(ctx, plugin); err != nil {
		_ = v.Stop()
		return nil, err
	}
	return v, nil
}

// races returns what the race detector found in any plugin process.
func races() error {
	reports, err := filepath.Glob(filepath.Join(bin, "race.*"))
	if err != nil || len(reports) == 0 {
		return err
	}
	content, err := os.ReadFile(reports[0])
	return fmt.Errorf("%d plugin processes reported data races: %s %w", len(reports), content, err)
}
