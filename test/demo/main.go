// Command demo walks through the lifecycle of an OpenAI key that Vault leases.
// It starts a real Vault with the plugin and the simulator in place of OpenAI,
// and runs the commands that a user types, with their real output. It stops
// with an error at the first step with an unexpected result and leaves nothing
// behind. With -dev it sets up the same environment and waits for Ctrl-C.
//
// With OPENAI_ADMIN_KEY and OPENAI_PROJECT_ID set it uses the real API (or
// OPENAI_BASE_URL). The engine rotates the admin key that it is configured
// with, so in both modes the demo creates an admin key for Vault. It uses the
// user's own key only to create that one and to clean up. No secret appears in
// an argument list or, in full, in the output.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

// plan is the first output of the program: which steps take long, and how to avoid them.
const plan = `This program builds the plugin and the simulator: about a minute the first time,
seconds after that. It needs a Vault server and uses the one that VAULT_BIN names,
or a vault on the PATH. Without either it builds Vault into bin/, once, in about
four minutes on two cores.

`

func main() {
	dev := flag.Bool("dev", false, "set up the environment, print the variables to export, and wait for Ctrl-C")
	flag.Parse()

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	began := time.Now()
	if err := run(ctx, *dev); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("interrupted: %w", err) // includes errors of the cleanup
		}
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
	if !*dev {
		fmt.Printf("\nAll steps passed in %d s. All processes are stopped and all temporary files are deleted.\n", int(time.Since(began).Seconds()))
	}
}

func run(ctx context.Context, dev bool) (err error) {
	user, err := account(os.Getenv)
	if err != nil {
		return err
	}
	d := &demo{out: os.Stdout, live: user != nil, env: proxies(user != nil)}
	devenv.IsolateEnv()

	// The cleanup also runs, with a time limit of its own, after the context
	// has ended.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		err = errors.Join(err, d.cleanUp(ctx))
	}()

	fmt.Fprint(d.out, plan)
	if err := d.start(ctx, user); err != nil {
		return err
	}
	if err := d.configure(ctx); err != nil {
		return err
	}
	if dev {
		d.printExports()
		<-ctx.Done()
		fmt.Fprintln(d.out, "\nStopping.")
		return nil
	}
	if err := d.lifecycle(ctx); err != nil {
		return err
	}
	if err := d.agentWithoutKey(ctx); err != nil {
		return err
	}
	return d.nothingIsLeft(ctx)
}

// account reads the user's real account from the environment; nil selects the
// simulator.
func account(getenv func(string) string) (*api, error) {
	key, project, base := getenv("OPENAI_ADMIN_KEY"), getenv("OPENAI_PROJECT_ID"), getenv("OPENAI_BASE_URL")
	if key == "" {
		return nil, nil //nolint:nilnil // no account is a normal answer: the simulator is used
	}
	if project == "" {
		return nil, errors.New("OPENAI_ADMIN_KEY selects the real API and requires OPENAI_PROJECT_ID;" +
			" unset OPENAI_ADMIN_KEY to use the simulator")
	}
	if base == "" {
		base = "https://api.openai.com/v1"
	}
	return newAPI(base, key, project), nil
}

// proxies keeps the caller's proxy settings for Vault, the plugin and curl, in
// case the real API is reachable only through a proxy. The local Vault bypasses it.
func proxies(live bool) []string {
	var env []string
	if live {
		for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
			if value := os.Getenv(name); value != "" {
				env = append(env, name+"="+value)
			}
		}
		env = append(env, "NO_PROXY=127.0.0.1,localhost", "no_proxy=127.0.0.1,localhost")
	}
	return env
}
