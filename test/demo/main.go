// Command demo plays the life of an OpenAI key that Vault leases: it starts a
// real Vault with the plugin, and the simulator in place of OpenAI, and runs
// the commands that a user would type, with their real output. It stops with
// an error at the first step that does not do what it says, and leaves nothing
// behind, however it ends. With -dev it sets the same up and waits for Ctrl-C.
//
// With OPENAI_ADMIN_KEY and OPENAI_PROJECT_ID set it talks to the real API (or
// to OPENAI_BASE_URL). The admin key given is the user's, and the engine
// rotates the key that it is configured with; so the demo makes a short-lived
// admin key for Vault, in both modes, and uses the user's own only to make that
// one and to clean up after it. No secret appears in an argument list or, in
// full, in the output.
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

func main() {
	dev := flag.Bool("dev", false, "set everything up, print what to paste, and wait for Ctrl-C")
	flag.Parse()

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	began := time.Now()
	if err := run(ctx, *dev); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("interrupted, then %w", err) // what cleaning up met is in there too
		}
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
	if !*dev {
		fmt.Printf("\nEvery step did what it said, in %d s. All that was started is stopped.\n", int(time.Since(began).Seconds()))
	}
}

func run(ctx context.Context, dev bool) (err error) {
	user, err := account(os.Getenv)
	if err != nil {
		return err
	}
	d := &demo{out: os.Stdout, live: user != nil, env: proxies(user != nil)}
	devenv.IsolateEnv()

	// Cleaning up must also happen, and be given its time, when the reason for
	// it is that the context has ended.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		err = errors.Join(err, d.cleanUp(ctx))
	}()

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
	if err := d.lifeOfAKey(ctx); err != nil {
		return err
	}
	return d.nothingIsLeft(ctx)
}

// account reads the user's real account from the environment, or nil for none.
func account(getenv func(string) string) (*api, error) {
	key, project, base := getenv("OPENAI_ADMIN_KEY"), getenv("OPENAI_PROJECT_ID"), getenv("OPENAI_BASE_URL")
	if key == "" {
		return nil, nil //nolint:nilnil // no account is a normal answer: the simulator is used
	}
	if project == "" {
		return nil, errors.New("OPENAI_ADMIN_KEY is set, so this would run against the real API:" +
			" set OPENAI_PROJECT_ID to the project that it may use too, or unset OPENAI_ADMIN_KEY for the simulator")
	}
	if base == "" {
		base = "https://api.openai.com/v1"
	}
	return newAPI(base, key, project), nil
}

// proxies keeps the caller's proxy settings for Vault, the plugin and curl
// where the real API may be reachable only through them. The local Vault never
// is.
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
