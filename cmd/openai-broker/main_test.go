package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The tests run this command as a separate process: the test binary, which these
// variables turn into the command.
const (
	asCommand   = "OPENAI_BROKER_TEST"
	asBareProxy = "OPENAI_BROKER_TEST_BARE_PROXY"
	asAgent     = "OPENAI_BROKER_TEST_AGENT" // names what the agent's program does
)

func TestMain(m *testing.M) {
	if act := os.Getenv(asAgent); act != "" {
		agents[act]()
		os.Exit(0)
	}
	if os.Getenv(asCommand) != "" {
		main()
	}
	if upstream := os.Getenv(asBareProxy); upstream != "" {
		bareProxy(upstream)
	}
	os.Exit(m.Run())
}

// vault answers the calls of a start and of an end, and records the paths of all calls.
type vault struct {
	*httptest.Server
	mu      sync.Mutex
	calls   []string
	caching atomic.Bool
	hang    chan struct{} // blocks reads of a key until it is closed; nil does not block
}

const leasedKey = "sk-svcacct-leased-key-for-tests-0123456789"

func startVault(t *testing.T) *vault {
	t.Helper()
	v := &vault{}
	v.Server = httptest.NewServer(v)
	t.Cleanup(v.Close)
	return v
}

func (v *vault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	v.mu.Lock()
	v.calls = append(v.calls, path)
	v.mu.Unlock()
	var body any
	switch {
	case strings.HasSuffix(path, "cache-clear") && v.caching.Load():
		w.WriteHeader(400)
		body = map[string]any{"errors": []string{"failed to parse clear input: no type provided"}}
	case path == "auth/token/lookup-self":
		if v.caching.Load() {
			w.Header().Set("X-Cache", "MISS")
		}
		body = map[string]any{"data": map[string]any{"accessor": "a", "ttl": 0, "renewable": false}}
	case strings.HasPrefix(path, "openai/creds/"):
		if v.hang != nil {
			<-v.hang
		}
		body = map[string]any{"lease_id": path + "/1", "lease_duration": 3600, "renewable": true, "data": map[string]any{"api_key": leasedKey, "api_key_id": "key_1"}}
	case strings.HasPrefix(path, "sys/leases/revoke/"):
		w.WriteHeader(204)
		return
	default:
		w.WriteHeader(404)
		body = map[string]any{"errors": []string{}}
	}
	_ = json.NewEncoder(w).Encode(body)
}

func (v *vault) called(prefix string) (n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, call := range v.calls {
		if strings.HasPrefix(call, prefix) {
			n++
		}
	}
	return n
}

type result struct {
	status   int
	out, err string
}

func (v *vault) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCommand+"=1", "VAULT_ADDR="+v.URL, "VAULT_TOKEN=hvs.token-for-tests", "OPENAI_ADMIN_KEY=sk-admin-for-tests",
		"OPENAI_ORG_ID=org-x", "NO_PROXY=internal.example", "HOME="+t.TempDir())
	return cmd
}

func (v *vault) run(t *testing.T, args ...string) result {
	t.Helper()
	cmd := v.command(t, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	require.NotNil(t, cmd.ProcessState, "%v", err)
	require.NotContains(t, out.String()+errOut.String(), leasedKey)
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

func TestStart_EveryMistakeIsFoundBeforeAnythingIsLeased(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), mode))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	open := write("open-token", "hvs.x", 0o604)
	private := write("private-token", "hvs.x", 0o600)
	empty := write("empty-token", "\n", 0o600)
	text := write("not-a-program", "text", 0o600)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	for _, c := range []struct {
		name   string
		args   []string
		status int
		want   string
	}{
		{"no role", []string{"run", "--", "true"}, 1, "exactly one of role and static-role is required"},
		{"two roles", []string{"run", "-role", "r", "-static-role", "s", "--", "true"}, 1, "exactly one of role"},
		{"no program", []string{"run", "-role", "r"}, 2, "no program to run"},
		{"program not found", []string{"run", "-role", "r", "--", "no-such-program"}, 127, "no-such-program"},
		{"program not executable", []string{"run", "-role", "r", "--", text}, 126, "permission denied"},
		{"unknown flag", []string{"run", "-rule", "r", "--", "true"}, 2, "-help"},
		{"unknown command", []string{"walk"}, 2, "openai-broker run"},
		{"unwritable audit log", []string{"run", "-role", "r", "-audit", filepath.Join(dir, "no-such-folder", "audit"), "--", "true"}, 1, "open the audit log"},
		{"port in use", []string{"run", "-role", "r", "-listen", taken.Addr().String(), "--", "true"}, 1, "address already in use"},
		{"metrics port in use", []string{"run", "-role", "r", "-metrics", taken.Addr().String(), "--", "true"}, 1, "address already in use"},
		{"all addresses", []string{"run", "-role", "r", "-listen", ":0", "--", "true"}, 1, "not a loopback address"},
		{"world-readable token file", []string{"run", "-role", "r", "-auth", "token-file", "-token-file", open, "--", "true"}, 1, "other users can access"},
		{"empty token file", []string{"run", "-role", "r", "-auth", "token-file", "-token-file", empty, "--", "true"}, 1, "is empty"},
		{"no token file", []string{"run", "-role", "r", "-auth", "token-file", "--", "true"}, 1, "auth=token-file requires token-file"},
		{"world-readable secret ID", []string{"run", "-role", "r", "-auth", "approle", "-role-id-file", private, "-secret-id-file", open, "--", "true"}, 1, "other users can access"},
		{"unknown auth", []string{"run", "-role", "r", "-auth", "ldap", "--", "true"}, 1, `auth "ldap" is not one of`},
		{"minting family", []string{"run", "-role", "r", "-allow", "realtime/client_secrets", "--", "true"}, 1, "cannot be allowed"},
		{"organization family", []string{"run", "-role", "r", "-allow", "models,organization", "--", "true"}, 1, "cannot be allowed"},
		{"broken pattern", []string{"run", "-role", "r", "-models", "gpt-[", "--", "true"}, 1, "is not a model pattern"},
		{"insecure upstream", []string{"run", "-role", "r", "-upstream", "http://api.example/v1", "--", "true"}, 1, "must use https"},
		{"upstream with a user", []string{"run", "-role", "r", "-upstream", "https://a:b@api.example/v1", "--", "true"}, 1, "is not a plain URL"},
		{"ttl of a static role", []string{"run", "-static-role", "s", "-ttl", "1h", "--", "true"}, 1, "ttl requires role"},
		{"host without remote", []string{"run", "-role", "r", "-host", "broker", "--", "true"}, 1, "host requires allow-remote"},
		{"unknown user", []string{"run", "-role", "r", "-user", "no-such-user", "--", "true"}, 1, "no-such-user"},
		{"no config", []string{"serve"}, 2, "-config"},
		{"config not found", []string{"serve", "-config", filepath.Join(dir, "no.json")}, 1, "no such file"},
		{"config with a typo", []string{"serve", "-config", write("typo.json", `{"agent":[]}`, 0o600)}, 1, `unknown field "agent"`},
		{"config without a token file", []string{"serve", "-config", write("none.json", `{"agents":[{"role":"r"}]}`, 0o600)}, 1, "token_file is required"},
		{"config without agents", []string{"serve", "-config", write("empty.json", `{}`, 0o600)}, 1, "agents must not be empty"},
		{"config with one name twice", []string{"serve", "-config", write("twice.json", `{"agents":[{"role":"r","token_file":"/tmp/a"},{"role":"r","token_file":"/tmp/b"}]}`, 0o600)}, 1, "its own name"},
		{"token file without a folder", []string{"serve", "-config", write("folder.json", fmt.Sprintf(`{"agents":[{"role":"r","token_file":%q}]}`, filepath.Join(dir, "no", "t")), 0o600)}, 1, "no such file"},
		{"env without a token file", []string{"env", "-listen", "127.0.0.1:1"}, 2, "-token-file"},
		{"env of another file", []string{"env", "-listen", "127.0.0.1:1", "-token-file", private}, 1, "not the token file of an agent"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := startVault(t)
			got := v.run(t, c.args...)
			require.Equal(t, c.status, got.status, got.err)
			require.Contains(t, got.err, c.want)
			require.Zero(t, v.called("openai/"), "something was leased")
		})
	}
	t.Run("caching Vault Proxy", func(t *testing.T) {
		v := startVault(t)
		v.caching.Store(true)
		got := v.run(t, "run", "-role", "r", "-auth", "none", "--", "true")
		require.Equal(t, 1, got.status)
		require.Contains(t, got.err, "caches leases")
		require.Zero(t, v.called("openai/"))
	})
}

func TestHelp(t *testing.T) {
	v := startVault(t)
	for _, args := range [][]string{{"-help"}, {"help"}, {"run", "-help"}, {"serve", "-help"}, {"env", "-help"}} {
		got := v.run(t, args...)
		require.Zero(t, got.status, args)
		require.Contains(t, got.out+got.err, "openai-broker", args)
	}
	got := v.run(t, "-version")
	require.Equal(t, "openai-broker v0.1.0-dev\n", got.out)
	require.Equal(t, 2, v.run(t).status)
}

func TestRun_TheChildHasAPlaceholderAndNoWayToVault(t *testing.T) {
	v := startVault(t)
	got := v.run(t, "run", "-role", "r", "--", "env")
	require.Zero(t, got.status, got.err)
	env := map[string]string{}
	for line := range strings.Lines(got.out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		env[name] = value
		require.False(t, strings.HasPrefix(name, "VAULT_"), line)
	}
	require.Regexp(t, `^sk-broker-[A-Za-z0-9_-]{43}$`, env["OPENAI_API_KEY"])
	require.Equal(t, env["OPENAI_API_KEY"], env["CODEX_API_KEY"])
	require.Regexp(t, `^http://127\.0\.0\.1:\d+/v1$`, env["OPENAI_BASE_URL"])
	require.Equal(t, env["OPENAI_BASE_URL"], env["OPENAI_API_BASE"])
	require.Equal(t, "ws"+strings.TrimPrefix(env["OPENAI_BASE_URL"], "http"), env["OPENAI_WEBSOCKET_BASE_URL"])
	require.Equal(t, "127.0.0.1,localhost,::1,internal.example", env["NO_PROXY"])
	require.Equal(t, env["NO_PROXY"], env["no_proxy"])
	require.Equal(t, "1", env["OPENAI_AGENTS_DISABLE_TRACING"])
	require.NotContains(t, env, "OPENAI_ADMIN_KEY")
	require.NotContains(t, env, "OPENAI_ORG_ID")
	require.Equal(t, 1, v.called("sys/leases/revoke/"), "the key is revoked at the end")
}

func TestRun_ExitStatusAndSignals(t *testing.T) {
	v := startVault(t)
	require.Equal(t, 7, v.run(t, "run", "-role", "r", "--", "sh", "-c", "exit 7").status)
	require.Equal(t, 128+15, v.run(t, "run", "-role", "r", "--", "sh", "-c", "kill -TERM $$").status)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGHUP} {
		cmd := v.command(t, "run", "-role", "r", "--", "sh", "-c", "trap 'exit 3' TERM INT USR1 HUP; echo ready; while :; do sleep 0.05; done")
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = out.Read(make([]byte, 6))
		require.NoError(t, err)
		require.NoError(t, cmd.Process.Signal(s))
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
		require.Equal(t, 3, cmd.ProcessState.ExitCode(), s)
	}
	require.Equal(t, v.called("openai/creds/"), v.called("sys/leases/revoke/"))
}

func TestRun_ASignalBeforeTheChildStartsEndsTheBroker(t *testing.T) {
	v := startVault(t)
	v.hang = make(chan struct{})
	cmd := v.command(t, "run", "-role", "r", "--", "true")
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return v.called("openai/creds/") == 1 }, 20*time.Second, 5*time.Millisecond)
	signaled := time.Now()
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	_ = cmd.Wait()
	close(v.hang)
	require.Less(t, time.Since(signaled), time.Minute, "it waited for Vault")
	require.Equal(t, 128+15, cmd.ProcessState.ExitCode())
}

// A child of the same user cannot read the broker's files in /proc.
func TestRun_TheChildCannotInspectTheBroker(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("NOT TESTED: /proc, which this system lacks")
	}
	v := startVault(t)
	script := asAgent + `=inspect "$0"
for f in mem environ maps fd/0 stack auxv syscall personality; do if head -c 1 /proc/$PPID/$f >/dev/null 2>&1; then echo "read""able: $f"; fi; done; cat /proc/$PPID/cmdline | tr '\0' ' '; echo; grep -c . /proc/self/environ; tr '\0' '\n' </proc/self/environ`
	cmd := v.command(t, "run", "-role", "r", "--", "sh", "-c", script, os.Args[0])
	if os.Geteuid() == 0 { // root may read everything, so run the broker as another user
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		binary, err := os.ReadFile(os.Args[0])
		require.NoError(t, err)
		dir, err := os.MkdirTemp("", "broker-test-")
		require.NoError(t, err)
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		require.NoError(t, os.Chmod(dir, 0o755))
		cmd.Path = filepath.Join(dir, "openai-broker")
		require.NoError(t, os.WriteFile(cmd.Path, binary, 0o755))
		cmd.Dir, cmd.Args[len(cmd.Args)-1] = "/", cmd.Path
	}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.NotContains(t, string(out), "readable:")
	require.Contains(t, string(out), "ptrace: operation not permitted\nprocess_vm_readv: operation not permitted\n")
	require.NotContains(t, string(out), leasedKey)
	require.NotContains(t, string(out), "hvs.token-for-tests")
}

var agents = map[string]func(){
	"ask": func() {
		req, _ := http.NewRequest(http.MethodGet, os.Getenv("OPENAI_BASE_URL")+"/models", http.NoBody)
		req.Header.Set("Authorization", "Bearer "+os.Getenv("OPENAI_API_KEY"))
		resp, err := http.DefaultClient.Do(req)
		fmt.Println(resp.Status, err)
	},
}

// Neither a debug setting nor a crash prints the key.
func TestRun_NothingPrintsTheKey(t *testing.T) {
	v := startVault(t)
	var seen atomic.Pointer[http.Request]
	upstream := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen.Store(r) }))
	upstream.EnableHTTP2 = true
	upstream.StartTLS()
	defer upstream.Close()
	certificate := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: upstream.Certificate().Raw}), 0o600))
	cmd := v.command(t, "run", "-role", "r", "-upstream", upstream.URL+"/v1", "--", "sh", "-c", asAgent+`=ask "$0"; kill -ABRT $PPID; sleep 0.2`, os.Args[0])
	cmd.Env = append(cmd.Env, "GODEBUG=http2debug=2", "GOTRACEBACK=crash", "SSL_CERT_FILE="+certificate)
	out, _ := cmd.CombinedOutput()
	require.Contains(t, string(out), "200 OK")
	require.Contains(t, string(out), "SIGABRT")
	require.Equal(t, 2, seen.Load().ProtoMajor)
	require.Equal(t, "Bearer "+leasedKey, seen.Load().Header.Get("Authorization"))
	require.NotContains(t, string(out), leasedKey)
	require.NotContains(t, string(out), "hvs.token-for-tests")
}

func TestRun_AnotherAccountForTheChild(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: -user, which takes root")
	}
	v := startVault(t)
	got := v.run(t, "run", "-role", "r", "-user", "nobody", "--", "sh", "-c", "id -un; echo $USER; grep Groups /proc/self/status")
	require.Zero(t, got.status, got.err)
	require.Regexp(t, `^nobody\nnobody\nGroups:\s*65534`, got.out)
}

// serve writes the token file and keeps it across a restart; env reads it.
func TestServe_TokenFilesAndEnv(t *testing.T) {
	v := startVault(t)
	dir := t.TempDir()
	token := filepath.Join(dir, "my-app")
	config := filepath.Join(dir, "broker.json")
	require.NoError(t, os.WriteFile(config, []byte(fmt.Sprintf(`{"drain":"1s","agents":[{"role":"r","token_file":%q}]}`, token)), 0o600))
	var first string
	for range 2 {
		cmd := v.command(t, "serve", "-config", config)
		errOut, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var log strings.Builder
		buffer := make([]byte, 1024)
		for !strings.Contains(log.String(), "address=") {
			n, err := errOut.Read(buffer)
			require.NoError(t, err, log.String())
			log.Write(buffer[:n])
		}
		info, err := os.Stat(token)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
		content, err := os.ReadFile(token)
		require.NoError(t, err)
		if first == "" {
			first = string(content)
		}
		require.Equal(t, first, string(content), "a restart locks out a running agent")
		address := regexp.MustCompile(`address=(127\.0\.0\.1:\d+)`).FindStringSubmatch(log.String())[1]
		got := v.run(t, "env", "-listen", address, "-token-file", token)
		require.Contains(t, got.out, "export OPENAI_API_KEY='"+strings.TrimSpace(first)+"'\n")
		require.Contains(t, got.out, "export OPENAI_BASE_URL='http://"+address+"/v1'\n")
		require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		_, _ = io.Copy(io.Discard, errOut)
		require.NoError(t, cmd.Wait())
		// Not the broker's own port, which another test's server may have taken.
		got = v.run(t, "env", "-listen", "127.0.0.1:1", "-token-file", token)
		require.Equal(t, 1, got.status)
		require.Contains(t, got.err, "no broker listens at 127.0.0.1:1")
	}
	require.Equal(t, 2, v.called("sys/leases/revoke/"))
}

// The wrappers of deploy/broker, with a stand-in for codex.
func TestWrappers(t *testing.T) {
	v := startVault(t)
	dir := t.TempDir()
	require.NoError(t, os.Symlink(os.Args[0], filepath.Join(dir, "openai-broker")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "codex"), []byte("#!/bin/sh\necho \"$OPENAI_BASE_URL\"; for a in \"$@\"; do echo \"[$a]\"; done; echo \"$CODEX_API_KEY\"\n"), 0o700))
	wrappers, err := filepath.Abs("../../deploy/broker")
	require.NoError(t, err)
	cmd := v.command(t)
	cmd.Path, cmd.Args = filepath.Join(wrappers, "codex-with-broker"), []string{"codex-with-broker", "exec", "two words"}
	cmd.Args[0] = cmd.Path
	cmd.Env = append(cmd.Env, "PATH="+dir+":"+os.Getenv("PATH"), "OPENAI_ROLE=team-a", "OPENAI_BROKER_FLAGS=-ttl 30m -max-rpm 60")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	require.Equal(t, []string{"[-c]", "[openai_base_url=\"" + lines[0] + "\"]", "[exec]", "[two words]"}, lines[1:5])
	require.Regexp(t, `^sk-broker-`, lines[5])
	require.Equal(t, 1, v.called("openai/creds/team-a"))
}
