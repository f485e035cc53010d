//go:build integration

package integration

// deploy/broker/compose.yaml on a real Docker engine: an agent whose network
// reaches only the broker, and the broker in front of the simulator. The test
// replaces names, addresses and user IDs.

import (
	"context"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// composeAgent stands in for "python". With an address, it only dials it.
const composeAgent = `package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if os.Args[1] != "agent.py" {
		_, err := net.DialTimeout("tcp", os.Args[1], 2*time.Second)
		fmt.Println("reached:", err == nil)
		return
	}
	fmt.Println("environment:", os.Environ())
	req, err := http.NewRequest(http.MethodGet, os.Getenv("OPENAI_BASE_URL")+"/models", nil)
	if err != nil {
		panic(err)
	}
	req.Header.Set("Authorization", "Bearer "+os.Getenv("OPENAI_API_KEY"))
	resp, err := http.DefaultClient.Do(req)
	fmt.Println("through the broker:", resp.Status, err)
	time.Sleep(time.Hour)
}
`

func TestBroker_TheComposeFile(t *testing.T) {
	if _, err := devenv.FindDocker(t.Context()); err != nil {
		t.Skipf("NOT TESTED: the broker's Compose file requires Docker: %v", err)
	}
	compose := []string{"docker", "compose"}
	if exec.CommandContext(t.Context(), "docker", "compose", "version").Run() != nil {
		compose = []string{"docker-compose"}
		if _, err := exec.LookPath(compose[0]); err != nil {
			t.Skip("NOT TESTED: the broker's Compose file requires Compose")
		}
	}
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	dir, images := t.TempDir(), t.TempDir()
	m.login("application", dir)
	target, err := url.Parse(m.vault.Addr)
	require.NoError(t, err)
	vaultURL := serveOnBridge(t, httputil.NewSingleHostReverseProxy(target))

	// The broker connects to OpenAI only over TLS, so the simulator has a certificate
	// and a matching host name.
	sim := httptest.NewUnstartedServer(m.sim)
	bridge, err := url.Parse(serveOnBridge(t, http.NotFoundHandler()))
	require.NoError(t, err)
	require.NoError(t, sim.Listener.Close())
	sim.Listener, err = net.Listen("tcp", net.JoinHostPort(bridge.Hostname(), "0"))
	require.NoError(t, err)
	sim.StartTLS()
	t.Cleanup(sim.Close)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: sim.Certificate().Raw}), 0o600))
	_, port, _ := strings.Cut(sim.Listener.Addr().String(), ":")
	upstream := "https://example.com:" + port + "/v1"

	version := ownVersion()
	own := devenv.Image{Repository: "openai-broker-compose-test", Version: version}
	root, err := devenv.Root()
	require.NoError(t, err)
	static := func(target string, args ...string) {
		cmd := exec.CommandContext(t.Context(), "go", append([]string{"build", "-o", target}, args...)...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
	}
	brokerContext, agentContext := filepath.Join(images, "broker"), filepath.Join(images, "agent")
	static(filepath.Join(brokerContext, "openai-broker"), "./cmd/openai-broker")
	require.NoError(t, os.WriteFile(filepath.Join(brokerContext, "Dockerfile"), []byte("FROM scratch\nCOPY openai-broker /\nENTRYPOINT [\"/openai-broker\"]\n"), 0o600))
	for _, program := range []string{"sh", "cat"} { // and their libraries
		path, err := exec.LookPath(program)
		require.NoError(t, err)
		copyInto(t, agentContext, path, "bin/"+program)
		libraries, err := exec.CommandContext(t.Context(), "ldd", path).Output()
		require.NoError(t, err)
		for _, file := range regexp.MustCompile(`/\S+`).FindAllString(string(libraries), -1) {
			copyInto(t, agentContext, file, strings.TrimPrefix(file, "/"))
		}
	}
	source := filepath.Join(images, "main.go")
	require.NoError(t, os.WriteFile(source, []byte(composeAgent), 0o600))
	static(filepath.Join(agentContext, "bin", "python"), source)
	require.NoError(t, os.WriteFile(filepath.Join(agentContext, "Dockerfile"), []byte("FROM scratch\nCOPY . /\n"), 0o600))
	buildImage(t, own, "broker", brokerContext)
	buildImage(t, own, "agent", agentContext)

	image := func(name string) string { return own.Repository + "-" + name + ":" + strings.TrimPrefix(version, "v") }
	for name, pairs := range map[string][]string{
		"compose.yaml": {
			"openai-broker:0.1.0", image("broker"), "my-app:1.0", image("agent"), "https://vault.example.com:8200", vaultURL,
			"65532:65532", fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid()), "uid=65532,gid=65532", fmt.Sprintf("uid=%d,gid=%d", os.Getuid(), os.Getgid()),
		},
		"compose-broker.json": {`"listen":`, fmt.Sprintf(`"upstream": %q, "listen":`, upstream), `"role": "my-app"`, fmt.Sprintf(`"role": "my-app", "mount": %q`, m.path)},
	} {
		content, err := os.ReadFile(filepath.Join(root, "deploy", "broker", name))
		require.NoError(t, err)
		for i := 0; i < len(pairs); i += 2 {
			require.Contains(t, string(content), pairs[i])
		}
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(strings.NewReplacer(pairs...).Replace(string(content))), 0o600))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "test.yaml"), fmt.Appendf(nil, `services:
  openai-broker:
    extra_hosts: ["example.com:%s"]
    environment: {SSL_CERT_FILE: /ca.pem}
    volumes: ["./ca.pem:/ca.pem:ro"]
`, bridge.Hostname()), 0o600))

	project := strings.NewReplacer(".", "-").Replace(own.Repository + "-" + version)
	composed := func(ctx context.Context, args ...string) string {
		cmd := exec.CommandContext(ctx, compose[0], append(append(compose[1:], "-f", "compose.yaml", "-f", "test.yaml"), args...)...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "COMPOSE_PROJECT_NAME="+project)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return string(out)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			t.Log(composed(ctx, "logs"))
		}
		composed(ctx, "down", "--volumes")
	})
	composed(t.Context(), "up", "--detach")
	id := func(service string) string { return strings.TrimSpace(composed(t.Context(), "ps", "--quiet", service)) }
	broker, agent := id("openai-broker"), id("agent")
	var log string
	require.Eventually(t, func() bool { // docker logs is faster than compose logs
		log, err = devenv.Docker(t.Context(), "logs", agent)
		return err == nil && strings.Contains(log, "through the broker")
	}, 2*time.Minute, 500*time.Millisecond)
	require.Contains(t, log, "through the broker: 200 OK")
	for network, reached := range map[string]string{"agents": "true", "outside": "false"} {
		ip, err := devenv.Docker(t.Context(), "inspect", "--format", fmt.Sprintf("{{(index .NetworkSettings.Networks %q).IPAddress}}", project+"_"+network), broker)
		require.NoError(t, err)
		out, err := devenv.Docker(t.Context(), "exec", agent, "python", ip+":8180")
		require.NoError(t, err)
		require.Equal(t, "reached: "+reached, out, network)
	}
	require.Len(t, m.alive(), 1)
	composed(t.Context(), "stop", "agent")
	composed(t.Context(), "stop", "openai-broker")
	m.requireRevoked()
	log = composed(t.Context(), "logs")
	at, _ := find([]byte(log), m.sim.Secrets())
	require.Negative(t, at, "a key is in the containers' output")
	require.Contains(t, log, "sk-broker-", "the agent prints its environment")
}

// copyInto copies a file into a build context.
func copyInto(t *testing.T, folder, file, name string) {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	path := filepath.Join(folder, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, content, 0o755))
}
