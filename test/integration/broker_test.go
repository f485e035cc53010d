//go:build integration

package integration

// openai-broker on a real Vault with the engine: an agent that sends requests
// throughout the lifecycle of its keys, and a search for the keys in everything
// that the agent can see.

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

var brokerBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(bin, "openai-broker")
	return path, devenv.Build(context.Background(), path, "./cmd/openai-broker")
})

// brokered is a "serve" process with one agent, my-app.
type brokered struct {
	m       *mount
	cmd     *exec.Cmd
	dir     string
	address string
	token   string
	done    chan struct{}
}

// broker starts a broker. change may alter its configuration.
func (m *mount) broker(change func(dir string, config map[string]any)) *brokered {
	m.t.Helper()
	b := &brokered{m: m, dir: m.t.TempDir(), done: make(chan struct{})}
	config := map[string]any{
		"upstream": m.sim.URL(), "audit": filepath.Join(b.dir, "audit.json"), "drain": "5s",
		"vault":  map[string]any{"auth": "approle", "role_id_file": filepath.Join(b.dir, "role-id"), "secret_id_file": filepath.Join(b.dir, "secret-id")},
		"agents": []any{map[string]any{"role": "my-app", "mount": m.path, "token_file": filepath.Join(b.dir, "token")}},
	}
	if change != nil {
		change(b.dir, config)
	}
	if _, err := os.Stat(filepath.Join(b.dir, "role-id")); err != nil && config["vault"].(map[string]any)["auth"] == "approle" {
		m.login("application", b.dir)
	}
	content, err := json.Marshal(config)
	require.NoError(m.t, err)
	require.NoError(m.t, os.WriteFile(filepath.Join(b.dir, "broker.json"), content, 0o600))
	binary, err := brokerBinary()
	require.NoError(m.t, err)
	b.cmd = exec.Command(binary, "serve", "-config", filepath.Join(b.dir, "broker.json"))
	b.cmd.Env = []string{"VAULT_ADDR=" + m.vault.Addr, "PATH=" + os.Getenv("PATH")}
	log, err := os.Create(filepath.Join(b.dir, "broker.log"))
	require.NoError(m.t, err)
	b.cmd.Stderr = log
	require.NoError(m.t, b.cmd.Start())
	go func() {
		_ = b.cmd.Wait()
		close(b.done)
	}()
	m.t.Cleanup(func() {
		b.stop()
		_ = log.Close()
		written := b.log()
		if m.t.Failed() {
			m.t.Logf("log of the broker:\n%s", written)
		}
		audit, _ := os.ReadFile(filepath.Join(b.dir, "audit.json"))
		at, _ := find(append([]byte(written), audit...), m.sim.Secrets())
		require.Negative(m.t, at, "a key is in the broker's log or audit log")
	})
	require.Eventually(m.t, func() bool {
		_, after, ready := strings.Cut(b.log(), "address=")
		b.address, _, _ = strings.Cut(after, " ")
		return ready
	}, time.Minute, 10*time.Millisecond, "the broker is not ready: %s", b.log())
	token, err := os.ReadFile(filepath.Join(b.dir, "token"))
	require.NoError(m.t, err)
	b.token = strings.TrimSpace(string(token))
	return b
}

func (b *brokered) log() string {
	content, err := os.ReadFile(filepath.Join(b.dir, "broker.log"))
	if err != nil {
		return err.Error()
	}
	return string(content)
}

// stop sends SIGTERM, as a service manager does.
func (b *brokered) stop() {
	_ = b.cmd.Process.Signal(syscall.SIGTERM) // it may have exited
	select {
	case <-b.done:
	case <-time.After(time.Minute):
		_ = b.cmd.Process.Kill()
		<-b.done
		b.m.t.Error("the broker did not exit within a minute of SIGTERM")
	}
}

func (b *brokered) ask() (status int, body string, err error) {
	req, err := http.NewRequest(http.MethodPost, "http://"+b.address+"/v1/responses", strings.NewReader(`{"model":"gpt-5-mini","input":"hello"}`))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Authorization", "Bearer "+b.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(content), err
}

// load sends 20 requests a second; stop returns the failures.
type load struct {
	answered atomic.Int64
	mu       sync.Mutex
	failures []string
	end      context.CancelFunc
	workers  sync.WaitGroup
}

func (b *brokered) load() *load {
	l := &load{}
	ctx, cancel := context.WithCancel(context.Background())
	l.end = cancel
	l.workers.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			l.workers.Go(func() {
				status, body, err := b.ask()
				if err == nil && status == http.StatusOK {
					l.answered.Add(1)
					return
				}
				l.mu.Lock()
				defer l.mu.Unlock()
				l.failures = append(l.failures, fmt.Sprintf("%s: %d %s %v", time.Now().Format(time.StampMilli), status, body, err))
			})
		}
	})
	b.m.t.Cleanup(cancel)
	return l
}

func (l *load) stop() []string {
	l.end()
	l.workers.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failures
}

func (b *brokered) leases() int { return strings.Count(b.log(), "key leased") }

func TestBroker_RequestsSucceedAcrossKeyReplacements(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "8s", "20s")
	b := m.broker(func(dir string, _ map[string]any) {
		m.login("application", dir)
		_, err := m.client.Logical().Write("auth/approle/role/"+m.path, map[string]any{"token_policies": m.path + "-application", "token_ttl": "15s", "token_max_ttl": "25s", "token_period": "0"})
		require.NoError(t, err)
	})
	l := b.load()
	require.Eventually(t, func() bool { return b.leases() >= 4 }, 3*time.Minute, 50*time.Millisecond, "replacements at the max_ttl of the key and of the token")

	// An operator revokes all keys of the role, and the admin key is rotated.
	for range 2 {
		before := b.leases()
		require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: m.path + "/creds/my-app", Prefix: true, Sync: true}))
		require.Eventually(t, func() bool { return b.leases() > before }, time.Minute, 20*time.Millisecond)
		_, err := m.client.Logical().Write(m.path+"/config/rotate", nil)
		require.NoError(t, err)
	}
	failures := l.stop()
	require.Empty(t, failures)
	require.Greater(t, l.answered.Load(), int64(200))
	t.Logf("%d requests answered by %d keys, none failed", l.answered.Load(), b.leases())
	b.stop()
	m.requireRevoked()
}

func TestBroker_VaultRestarts(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	require.NoError(t, m.client.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	m.role("my-app", "15s", "40s")
	b := m.broker(func(dir string, _ map[string]any) { m.appRole(dir) })
	l := b.load()
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		require.NoError(t, m.vault.Kill())
		time.Sleep(2 * time.Second) // so that renewals fail while Vault is down
		require.NoError(t, m.vault.Restart(ctx))
		cancel()
		before := b.leases()
		require.Eventually(t, func() bool { return b.leases() > before }, 2*time.Minute, 50*time.Millisecond)
	}
	// If a restart outlasts the lease, requests fail, as docs/broker.md says. Each
	// error states the reason.
	failures := l.stop()
	for _, failure := range failures {
		require.Contains(t, failure, "503")
		require.Contains(t, failure, "broker_no_key")
	}
	t.Logf("%d requests answered, %d had no key while Vault was down", l.answered.Load(), len(failures))
	status, body, err := b.ask()
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status, body)
	b.stop()
	m.requireRevoked()
}

// requireRevoked waits until no account is left: Vault revokes the leases of a
// token after it responds.
func (m *mount) requireRevoked() {
	m.t.Helper()
	require.Eventually(m.t, func() bool { return len(m.alive()) == 0 }, 30*time.Second, 20*time.Millisecond, "the broker left a key")
}

// appRole is login for a server from ownVault.
func (m *mount) appRole(dir string) {
	m.t.Helper()
	role := "auth/approle/role/" + m.path
	_, err := m.client.Logical().Write(role, map[string]any{"token_policies": m.policy("application"), "token_period": "1h"})
	require.NoError(m.t, err)
	id, err := m.client.Logical().Read(role + "/role-id")
	require.NoError(m.t, err)
	secret, err := m.client.Logical().Write(role+"/secret-id", nil)
	require.NoError(m.t, err)
	require.NoError(m.t, os.WriteFile(filepath.Join(dir, "role-id"), []byte(id.Data["role_id"].(string)), 0o600))
	require.NoError(m.t, os.WriteFile(filepath.Join(dir, "secret-id"), []byte(secret.Data["secret_id"].(string)), 0o600))
}

func TestBroker_SIGTERMUnderLoadLosesNoAnswer(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	b := m.broker(nil)
	m.sim.Configure(func(o *openaitest.Options) { o.Latency = 300 * time.Millisecond })
	var started, answered, late, refused, lost atomic.Int64
	var stopped atomic.Pointer[time.Time]
	var workers sync.WaitGroup
	stop := make(chan struct{})
	for range 10 {
		workers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				started.Add(1)
				// The broker receives the signal well within this second.
				end := stopped.Load()
				isLate := end != nil && time.Since(*end) > time.Second
				switch status, _, err := b.ask(); {
				case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF):
					// Includes connections that the listener never accepted. If such a request
					// reached OpenAI, the count below would differ.
					refused.Add(1)
					return
				case err == nil && status == http.StatusOK:
					answered.Add(1)
					if isLate {
						late.Add(1)
					}
				case err == nil && status == http.StatusServiceUnavailable:
					refused.Add(1)
					return
				default:
					t.Errorf("%d %v", status, err)
					lost.Add(1)
				}
			}
		})
	}
	time.Sleep(time.Second)
	now := time.Now()
	stopped.Store(&now)
	b.stop()
	close(stop)
	workers.Wait()
	require.Zero(t, lost.Load(), "responses from OpenAI that did not reach the agent")
	require.Equal(t, started.Load(), answered.Load()+refused.Load())
	require.NotZero(t, late.Load(), "no request succeeded during the drain")
	require.Equal(t, m.sim.Count(http.MethodPost, "/responses"), int(answered.Load()))
	m.requireRevoked()
}

func TestBroker_AKilledBrokersKeyEndsWithItsLease(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "10s", "20s")
	b := m.broker(nil)
	status, body, err := b.ask()
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status, body)
	keys := m.sim.Keys()
	require.Len(t, keys, 1)
	require.NoError(t, b.cmd.Process.Kill())
	<-b.done
	require.Eventually(t, func() bool { return infer(t, m.sim, keys[0].Value) == http.StatusUnauthorized }, 2*time.Minute, 100*time.Millisecond)
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, 2*time.Minute, 100*time.Millisecond)
}

// runBroker prepares an openai-broker "run" command with a Vault token.
func (m *mount) runBroker(token string, args ...string) (*exec.Cmd, *bytes.Buffer) {
	m.t.Helper()
	binary, err := brokerBinary()
	require.NoError(m.t, err)
	cmd := exec.Command(binary, append([]string{"run", "-role", "my-app", "-mount", m.path, "-upstream", m.sim.URL()}, args...)...)
	cmd.Env = []string{"VAULT_ADDR=" + m.vault.Addr, "VAULT_TOKEN=" + token, "PATH=" + os.Getenv("PATH"), "OPENAI_ADMIN_KEY=not-for-the-child"}
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	return cmd, out
}

// The agent prints everything that it can see. The agent works, and no key is in its
// output, in the responses or in the broker's output.
func TestBroker_TheAgentNeverSeesTheKey(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	dir := t.TempDir()
	token := m.tokenOf("application")
	script := `env
tr '\0' '\n' </proc/self/environ
for p in $PPID $$ self; do for f in cmdline environ maps status comm; do echo "== $p $f"; cat /proc/$p/$f 2>&1 | tr '\0' '\n'; done; done
cat /proc/*/cmdline 2>/dev/null | tr '\0' '\n'
curl -isS "$OPENAI_BASE_URL/models" -H "Authorization: Bearer $OPENAI_API_KEY"
curl -isS "$OPENAI_BASE_URL/models" -H "Authorization: Bearer sk-wrong"
curl -isS "$OPENAI_BASE_URL/responses" -H "Authorization: Bearer $OPENAI_API_KEY" -H 'Content-Type: application/json' -d '{"model":"m","stream":true}'
curl -isS "$OPENAI_BASE_URL/organization/projects" -H "Authorization: Bearer $OPENAI_API_KEY"
curl -isS -X POST "$OPENAI_BASE_URL/realtime/client_secrets" -H "Authorization: Bearer $OPENAI_API_KEY"
`
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("NOT TESTED: this agent requires curl")
	}
	args := []string{"-audit", filepath.Join(dir, "audit.json"), "--", "bash", "-c", script}
	cmd, out := m.runBroker(token, args...)
	require.NoError(t, cmd.Run(), out)
	require.Contains(t, out.String(), "gpt-5-mini", "the agent works")
	require.Contains(t, out.String(), "response.completed")
	require.Equal(t, 2, strings.Count(out.String(), "broker_never_allowed"), out)
	audit, err := os.ReadFile(filepath.Join(dir, "audit.json"))
	require.NoError(t, err)
	require.NotEmpty(t, audit)
	require.Greater(t, len(m.sim.Secrets()), 1, "no key was created")
	seen := append(out.Bytes(), audit...)
	at, _ := find(seen, m.sim.Secrets())
	require.Negative(t, at, "a key is in the agent's or the broker's output")
	if os.Geteuid() != 0 { // root can read everything: cmd/openai-broker tests this as another user
		require.NotContains(t, string(seen), token)
		require.NotContains(t, string(seen), "not-for-the-child")
	}

	// With the user's token and the default policy, the broker cannot revoke the
	// lease. It prints until when the key stays valid.
	require.Contains(t, out.String(), "the key stays valid until it expires")
	require.Len(t, m.alive(), 1)
	require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: m.path + "/creds/my-app", Prefix: true, Sync: true}))
	require.Empty(t, m.alive())
}

// With the policy of deploy/broker, the user's token can revoke its lease.
func TestBroker_ThePolicyLetsALeaseBeRevoked(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	require.NoError(t, m.client.Sys().PutPolicyWithContext(t.Context(), m.path+"-broker", m.example("broker/policy.hcl", "")))
	secret, err := m.client.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{m.path + "-broker"}, TTL: "10m"})
	require.NoError(t, err)
	cmd, out := m.runBroker(secret.Auth.ClientToken, "--", "true")
	require.NoError(t, cmd.Run(), out)
	require.Empty(t, out.String())
	require.Empty(t, m.alive())
	_, err = m.client.Auth().Token().LookupAccessor(secret.Auth.Accessor)
	require.NoError(t, err, "the broker must not revoke the user's token")

	// Vault revokes the lease in the body, not the one in the path.
	another := m.creds("my-app")
	client, err := m.client.Clone()
	require.NoError(t, err)
	client.SetToken(secret.Auth.ClientToken)
	_, err = client.Logical().Write("sys/leases/revoke/"+m.path+"/creds/my-app/x", map[string]any{"lease_id": another.id})
	require.ErrorContains(t, err, "permission denied")
	require.NoError(t, m.revoke(another))
}

// The JWT method, with a token that this test signs.
func TestBroker_LogsInWithAJWT(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("my-app", "1h", "24h")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	require.NoError(t, err)
	require.NoError(t, m.client.Sys().EnableAuthWithOptions("jwt", &api.EnableAuthOptions{Type: "jwt"}))
	for path, data := range map[string]map[string]any{
		"auth/jwt/config":      {"jwt_validation_pubkeys": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))},
		"auth/jwt/role/my-app": {"role_type": "jwt", "user_claim": "sub", "bound_audiences": "vault", "token_policies": m.policy("application")},
	} {
		_, err := m.client.Logical().Write(path, data)
		require.NoError(t, err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + encode(fmt.Appendf(nil, `{"sub":"agent","aud":"vault","exp":%d,"iat":%d}`, time.Now().Add(time.Hour).Unix(), time.Now().Unix()))
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	require.NoError(t, err)
	jwt := filepath.Join(t.TempDir(), "jwt")
	require.NoError(t, os.WriteFile(jwt, []byte(signed+"."+encode(signature)), 0o600))
	cmd, out := m.runBroker("", "-auth", "jwt", "-auth-role", "my-app", "-jwt-file", jwt, "--", "true")
	require.NoError(t, cmd.Run(), out)
	require.Empty(t, out.String())
	m.requireRevoked()
}

func TestBroker_KillTerminatesChild(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "5s", "10s")
	dir := t.TempDir()
	cmd, out := m.runBroker(m.tokenOf("application"), "--", "bash", "-c", `trap 'echo ended >"$0/ended"; exit' TERM; echo $$ >"$0/pid"; while :; do sleep 0.05; done`, dir)
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { _, err := os.Stat(filepath.Join(dir, "pid")); return err == nil }, time.Minute, 10*time.Millisecond, out)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.Eventually(t, func() bool { _, err := os.Stat(filepath.Join(dir, "ended")); return err == nil }, time.Minute, 10*time.Millisecond, "the child still runs")
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, 2*time.Minute, 100*time.Millisecond)
}

func TestBroker_AStaticRole(t *testing.T) {
	m := newMount(t)
	m.write("static-roles/my-app", map[string]any{"project_id": m.project, "rotation_period": "10s", "revocation_delay": "5s"})
	b := m.broker(func(_ string, config map[string]any) {
		config["agents"] = []any{map[string]any{"static_role": "my-app", "mount": m.path, "token_file": config["agents"].([]any)[0].(map[string]any)["token_file"]}}
	})
	l := b.load()
	seen := map[string]bool{}
	require.Eventually(t, func() bool {
		for _, k := range m.sim.Keys() {
			seen[k.ID] = true
		}
		return len(seen) >= 4
	}, 3*time.Minute, 100*time.Millisecond, "too few rotations")
	require.Empty(t, l.stop())
	b.stop()
	require.NotEmpty(t, m.sim.Keys(), "the broker must not revoke a static role's key")
	_, err := m.client.Logical().Delete(m.path + "/static-roles/my-app")
	require.NoError(t, err)
}

// A Vault Proxy can log in for the broker. The broker detects a Proxy with a cache
// before it leases a key.
func TestBroker_BehindAVaultProxy(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	dir := t.TempDir()
	m.login("application", dir)
	for _, cache := range []bool{false, true} {
		config := m.example("vault-proxy/proxy.hcl", dir)
		port, err := devenv.FreePort(t.Context())
		require.NoError(t, err)
		address := fmt.Sprintf("127.0.0.1:%d", port)
		config = strings.Replace(config, "127.0.0.1:8100", address, -1)
		if !cache {
			config = strings.Replace(config, "cache {}", "", 1)
		}
		path := filepath.Join(dir, fmt.Sprintf("proxy-%t.hcl", cache))
		require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
		m.tool(dir, nil, m.vault.Binary(), "proxy", "-config="+path)
		require.Eventually(t, func() bool {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				_ = conn.Close()
			}
			return err == nil
		}, time.Minute, 20*time.Millisecond)
		run := func() (string, error) {
			cmd, out := m.runBroker("", "-auth", "none", "--", "bash", "-c", `curl -sS "$OPENAI_BASE_URL/models" -H "Authorization: Bearer $OPENAI_API_KEY"`)
			cmd.Env = []string{"VAULT_ADDR=http://" + address, "PATH=" + os.Getenv("PATH")}
			err := cmd.Run()
			return out.String(), err
		}
		if cache {
			require.Eventually(t, func() bool { // once the Proxy has a token
				out, err := run()
				return err != nil && strings.Contains(out, "caches leases")
			}, time.Minute, 100*time.Millisecond)
			require.Empty(t, m.alive())
			continue
		}
		var out string
		require.Eventually(t, func() bool { out, err = run(); return err == nil }, time.Minute, 100*time.Millisecond, "the Proxy has no token yet")
		require.Contains(t, out, "gpt-5-mini")
		require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: m.path + "/creds/my-app", Prefix: true, Sync: true}))
		require.Empty(t, m.alive())
	}
}

// A shell reads an agent's placeholder from its file. Each agent has its own key
// and models.
func TestBroker_Serve(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	var other string
	b := m.broker(func(dir string, config map[string]any) {
		other = filepath.Join(dir, "other")
		config["agents"] = append(config["agents"].([]any), map[string]any{"name": "other", "role": "my-app", "mount": m.path, "token_file": other, "models": []string{"gpt-5*"}})
	})
	binary, err := brokerBinary()
	require.NoError(t, err)
	ask := func(file, model string) string {
		cmd := exec.CommandContext(t.Context(), "bash", "-c", `eval "$("$0" env -listen "$1" -token-file "$2")"
curl -sS "$OPENAI_BASE_URL/responses" -H "Authorization: Bearer $OPENAI_API_KEY" -H 'Content-Type: application/json' -d "{\"model\":\"$3\"}"`, binary, b.address, file, model)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		return string(out)
	}
	require.Contains(t, ask(filepath.Join(b.dir, "token"), "gpt-4o"), "completed")
	require.Contains(t, ask(other, "gpt-5-mini"), "completed")
	require.Contains(t, ask(other, "gpt-4o"), "broker_model")
	require.Len(t, m.alive(), 2, "each agent has its own key")
	b.stop()
	m.requireRevoked()
}
