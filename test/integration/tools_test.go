//go:build integration

package integration

// Helpers for the tests of tools around Vault. The tests use the examples under
// deploy/ and replace only addresses, paths and names, so that the examples stay
// correct. watch records every moment at which a tool's key does not work.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// example reads a file of deploy/ and replaces the example's names with this
// mount's. pairs are further replacements. An address or path of the example that
// remains fails the test.
func (m *mount) example(file, dir string, pairs ...string) string {
	m.t.Helper()
	root, err := devenv.Root()
	require.NoError(m.t, err)
	content, err := os.ReadFile(filepath.Join(root, "deploy", file))
	require.NoError(m.t, err)
	pairs = append(pairs,
		"https://vault.example.com:8200", m.vault.Addr,
		"/run/openai/", dir+"/",
		"/etc/openai-agent/", dir+"/",
		"openai/", m.path+"/",
	)
	text := strings.NewReplacer(pairs...).Replace(string(content))
	for _, line := range strings.Split(text, "\n") {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			require.NotRegexp(m.t, `example\.com|/usr/local/|/etc/|/run/|\bopenai/`, line, "%s: not replaced", file)
		}
	}
	return text
}

// exampleFile writes an example into dir and returns its path.
func (m *mount) exampleFile(file, dir string, pairs ...string) string {
	m.t.Helper()
	path := filepath.Join(dir, filepath.Base(file))
	require.NoError(m.t, os.WriteFile(path, []byte(m.example(file, dir, pairs...)), 0o700))
	return path
}

// policy writes an example policy under a name of this mount.
func (m *mount) policy(name string, pairs ...string) string {
	m.t.Helper()
	policy := m.path + "-" + name
	require.NoError(m.t, m.client.Sys().PutPolicyWithContext(m.t.Context(), policy, m.example("policies/"+name+".hcl", "", pairs...)))
	return policy
}

// tokenOf creates a token with an example policy and Vault's default policy.
func (m *mount) tokenOf(policy string, pairs ...string) string {
	m.t.Helper()
	secret, err := m.client.Auth().Token().CreateWithContext(m.t.Context(), &api.TokenCreateRequest{
		Policies: []string{m.policy(policy, pairs...)}, TTL: "1h", // longer than a build on a busy machine
	})
	require.NoError(m.t, err)
	return secret.Auth.ClientToken
}

var approle sync.Once

// login creates an AppRole with an example policy, as the page on the Agent
// describes, and writes its role ID and secret ID to dir.
func (m *mount) login(policy, dir string) {
	m.t.Helper()
	approle.Do(func() {
		require.NoError(m.t, server.Client().Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	})
	role := "auth/approle/role/" + m.path
	_, err := m.client.Logical().Write(role, map[string]any{"token_policies": m.policy(policy), "token_period": "1h"})
	require.NoError(m.t, err)
	m.t.Cleanup(func() { _, _ = m.client.Logical().Delete(role) })
	id, err := m.client.Logical().Read(role + "/role-id")
	require.NoError(m.t, err)
	secret, err := m.client.Logical().Write(role+"/secret-id", nil)
	require.NoError(m.t, err)
	for file, value := range map[string]any{"role-id": id.Data["role_id"], "secret-id": secret.Data["secret_id"]} {
		require.NoError(m.t, os.WriteFile(filepath.Join(dir, file), []byte(value.(string)), 0o600))
	}
}

// tool starts a program beside Vault. At its end, the test stops the process by
// its ID and searches its log for keys.
func (m *mount) tool(dir string, env []string, program string, args ...string) *devenv.Tool {
	m.t.Helper()
	tool, err := devenv.StartTool(dir, env, program, args...)
	require.NoError(m.t, err)
	m.t.Cleanup(func() {
		require.NoError(m.t, tool.Stop())
		log, err := os.ReadFile(tool.LogPath)
		require.NoError(m.t, err)
		if m.t.Failed() {
			m.t.Logf("log of %s:\n%s", program, log)
		}
		at, _ := find(log, m.sim.Secrets())
		require.Negative(m.t, at, "a key is in the log of %s", program)
	})
	return tool
}

// script runs an example's script as a user does, with a token for Vault, and
// returns its standard output.
func (m *mount) script(token, path string, args ...string) (string, error) {
	m.t.Helper()
	env, err := m.vault.CLIEnv()
	require.NoError(m.t, err)
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	var stderr strings.Builder
	var out []byte
	// A new script is busy while a process that another test just started still has its
	// file open.
	for range 50 {
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.Env = append(env, "VAULT_TOKEN="+token)
		cmd.Stderr = &stderr
		cmd.WaitDelay = 5 * time.Second
		if out, err = cmd.Output(); !errors.Is(err, syscall.ETXTBSY) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out)), err
}

// watch polls a tool's key until it has seen `keys` different ones, and fails the
// test for each moment at which the current key did not work. current returns the
// key as a user of the tool would get it. If the key changes while watch tries the
// old one, watch tries the new one instead.
//
// No tool renews in time on a stalled machine. So watch also measures Vault, and
// restarts, three times at most, after a gap that came with a stall.
func (m *mount) watch(what string, keys int, atMost time.Duration, current func() (string, error)) {
	m.t.Helper()
	stalled := m.stalls()
	began := time.Now()
	seen := map[string]time.Duration{} // key → when it was first seen
	var gaps []string
	looks, starts := 0, 1
	var down time.Time
	for len(seen) < keys {
		require.Less(m.t, time.Since(began), atMost, "%s: %d of %d keys were seen in %d polls", what, len(seen), keys, looks)
		time.Sleep(50 * time.Millisecond)
		key, err := current()
		if (err != nil || key == "") && len(seen) == 0 {
			continue // it is still starting
		}
		looks++
		works := err == nil && key != "" && infer(m.t, m.sim, key) == http.StatusOK
		if !works {
			if again, err := current(); err == nil && again != key {
				continue
			}
			if down.IsZero() {
				down = time.Now()
			}
			continue
		}
		if !down.IsZero() && starts <= 3 && stalled(down.Add(-longestTTL)) {
			m.t.Logf("%s: the key was invalid for %s, and Vault stalled; the watch restarts", what, time.Since(down).Round(10*time.Millisecond))
			began, down, looks = time.Now(), time.Time{}, 0
			starts++
			clear(seen)
		}
		if !down.IsZero() {
			gaps = append(gaps, fmt.Sprintf("%s long, %s after the start", time.Since(down).Round(10*time.Millisecond), down.Sub(began).Round(10*time.Millisecond)))
			down = time.Time{}
		}
		if _, ok := seen[key]; !ok {
			seen[key] = time.Since(began)
		}
	}
	m.t.Logf("%s: %d keys in %d polls, first seen after %v", what, len(seen), looks, times(seen))
	require.Empty(m.t, gaps, "%s: the key did not always work", what)
}

const (
	// longestTTL is the longest TTL of the leases under watch.
	longestTTL = 30 * time.Second
	// stall is how long a write to Vault's storage may take. A renewal needs
	// several within the last third of agentTTL.
	stall = time.Second
)

// stalls writes to Vault's storage until the end of the test. since reports whether
// any write since a given time took longer than stall.
func (m *mount) stalls() (since func(at time.Time) bool) {
	var mu sync.Mutex
	var last time.Time // the end of the last stall
	var writing sync.WaitGroup
	ctx, stop := context.WithCancel(m.t.Context())
	m.t.Cleanup(func() { stop(); writing.Wait() })
	client := m.vault.Client()
	writing.Go(func() {
		for ctx.Err() == nil {
			began := time.Now()
			_, err := client.Logical().WriteWithContext(ctx, "cubbyhole/"+m.path, map[string]any{"pulse": "x"})
			if ctx.Err() == nil && (err != nil || time.Since(began) > stall) {
				mu.Lock()
				last = time.Now()
				mu.Unlock()
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	return func(at time.Time) bool {
		mu.Lock()
		defer mu.Unlock()
		return last.After(at)
	}
}

func times(seen map[string]time.Duration) (all []string) {
	for _, at := range seen {
		all = append(all, at.Round(100*time.Millisecond).String())
	}
	return all
}

// file reads the key in a file, as a program would.
func file(path string) func() (string, error) {
	return func() (string, error) {
		content, err := os.ReadFile(path)
		return string(content), err
	}
}

// command runs a command of Vault's CLI with a token and an input. If it fails, the
// error contains the command's output.
func (m *mount) command(token, input string, args ...string) error {
	m.t.Helper()
	env, err := m.vault.CLIEnv()
	require.NoError(m.t, err)
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.vault.Binary(), args...)
	cmd.Env = append(env, "VAULT_TOKEN="+token)
	cmd.Stdin = strings.NewReader(input)
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("vault %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
