//go:build integration

// Package integration tests the engine's promises on a real Vault server: the
// plugin is the built binary, the server an ordinary one with raft storage and
// a file audit device, and only OpenAI is simulated.
//
// Most tests share one server, each on a mount and a simulator of its own, so
// that they run side by side as mounts do in life; a test that harms the server
// starts one for itself. Whatever a test makes must be gone at its end: the
// simulator fails a test that leaves something alive, and each test's keys are
// searched for in all that Vault wrote.
//
// Those on crashes, load and failover log the numbers that they found; go test
// -v shows them. OUTAGE_FULL=1 makes the test of a long outage wait until Vault
// itself has given up, for up to 20 minutes (with go test -timeout 30m).
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
	server *devenv.Vault // the shared one
	plugin devenv.Plugin // the binary that all servers use
	bin    string        // the folder that it lies in
)

func TestMain(m *testing.M) {
	devenv.IsolateEnv()
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = flag.Set("test.parallel", "1000") // a number that it takes; beside has the bound
	}
	os.Exit(run(m))
}

// slots bounds the tests that run beside each other. Most of what takes long here waits for
// Vault's clock and not for a processor, so the number of those is no measure.
var slots = make(chan struct{}, 24)

// long begins the name of a test that waits for minutes. `make test` starts these tests
// with the unit tests; they take no slot, so that none of them begins last.
const long = "TestLong_"

// beside runs a test beside others, in a slot. A subtest runs in that of its test, which
// waits for it.
func beside(t *testing.T) {
	t.Helper()
	t.Parallel()
	if strings.HasPrefix(t.Name(), long) || strings.Contains(t.Name(), "/") {
		return
	}
	slots <- struct{}{}
	t.Cleanup(func() { <-slots })
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

// serverOptions are those of all servers here.
func serverOptions() devenv.Options {
	return devenv.Options{
		LogLevel: "trace",
		Audit:    true,
		// Where the plugin's race detector reports: Vault's log may lack
		// what a plugin writes to its standard error.
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
	return fmt.Errorf("the plugin has data races, %d processes reported some: %s %w", len(reports), content, err)
}
