//go:build integration

package integration

// What the tests of the tools around Vault share: the examples under deploy/
// are used as they are, but for addresses, paths and names, so that none can
// rot; and a watch over a key that a tool keeps, which notes every moment at
// which it does not work.

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

// example reads a file of deploy/ and puts this mount's names in the place of
// the example's. More replacements come as pairs. What is left of the
// example's world afterwards would be a test of nothing, and fails.
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
			require.NotRegexp(m.t, `example\.com|/usr/local/|/etc/|/run/|\bopenai/`, line, "%s: left as in the example", file)
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

// policy writes an example's policy under a name of this mount's.
func (m *mount) policy(name string, pairs ...string) string {
	m.t.Helper()
	policy := m.path + "-" + name
	require.NoError(m.t, m.client.Sys().PutPolicyWithContext(m.t.Context(), policy, m.example("policies/"+name+".hcl", "", pairs...)))
	return policy
}

// tokenOf makes a token with the policy of an example, and Vault's default one.
func (m *mount) tokenOf(policy string, pairs ...string) string {
	m.t.Helper()
	secret, err := m.client.Auth().Token().CreateWithContext(m.t.Context(), &api.TokenCreateRequest{
		Policies: []string{m.policy(policy, pairs...)}, TTL: "10m",
	})
	require.NoError(m.t, err)
	return secret.Auth.ClientToken
}

var approle sync.Once

// login makes an AppRole with the policy of an example, as the page on the
// Agent has it made, and writes what an agent logs in with into dir.
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

// tool starts a program beside Vault. At the end of the test it is stopped, by
// its id, and its log is searched for keys.
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
	// A script that was just written is busy while a process that another test starts at
	// that moment still has its file.
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

// watch looks at a key that a tool keeps, again and again until it has seen
// `keys` different ones, and fails the test for each moment at which the key
// that was there did not work. current returns the key as a user of the tool
// would get it; an answer that changes while the old key is tried is a user who
// came a moment too early, and he tries again with the new one.
//
// No tool renews in time on a machine that stands still. So the watch measures
// Vault meanwhile, and starts again, three times at most, after a gap that came
// with a stall.
func (m *mount) watch(what string, keys int, atMost time.Duration, current func() (string, error)) {
	m.t.Helper()
	stalled := m.stalls()
	began := time.Now()
	seen := map[string]time.Duration{} // key → when it was first seen
	var gaps []string
	looks, starts := 0, 1
	var down time.Time
	for len(seen) < keys {
		require.Less(m.t, time.Since(began), atMost, "%s: %d of %d keys were seen, %d looks", what, len(seen), keys, looks)
		time.Sleep(50 * time.Millisecond)
		key, err := current()
		if (err != nil || key == "") && len(seen) == 0 {
			continue // it has only been started
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
			m.t.Logf("%s: the key was dead for %s, and Vault stalled; watched again", what, time.Since(down).Round(10*time.Millisecond))
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
	m.t.Logf("%s: %d keys, %d looks, first seen after %v", what, len(seen), looks, times(seen))
	require.Empty(m.t, gaps, "%s: moments at which the key did not work", what)
}

const (
	// longestTTL is more than any lease lives here without a renewal.
	longestTTL = 30 * time.Second
	// stall is what a write to Vault's storage may take. A renewal has several,
	// and the last third of agentTTL for them.
	stall = time.Second
)

// stalls writes to Vault's storage until the end of the test. What it returns
// reports whether any write since some time took longer than stall.
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
			time.Sleep(100 * time.Millisecond) // the pause itself
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

// file is the key in a file, as a program would read it.
func file(path string) func() (string, error) {
	return func() (string, error) {
		content, err := os.ReadFile(path)
		return string(content), err
	}
}

// command runs one of Vault's own commands with a token, and an input where it
// reads one. A refusal is an error with what the command printed.
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
