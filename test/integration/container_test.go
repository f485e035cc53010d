//go:build integration

package integration

// The plugin as a container on the machine's Docker engine. `make image` builds the
// image without a pull. Images and containers have a version that is unique to the
// run, so the test stops and removes only its own.
//
// A container cannot reach the host's loopback addresses. Servers for containers
// listen on the host's address in Docker's bridge network during the test.

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// The limits of the plugin runtimes. The plugin uses about 130 MB with locked
// memory and far less without.
const (
	containerMemory = 256 << 20
	containerCPU    = 1_500_000_000 // 1.5 processors
)

func TestContainer(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("NOT TESTED: the plugin as a container requires Linux")
	}
	needs(t, devenv.ContainerPlugins)
	engine, err := devenv.FindDocker(t.Context())
	if err != nil {
		t.Skipf("NOT TESTED: the plugin as a container requires Docker: %v", err)
	}
	if engine.Rootless() {
		t.Skip("NOT TESTED: the plugin as a container: a rootless engine's containers cannot reach this test's servers; see docs/containers.md")
	}
	runParallel(t)
	t.Logf("on Docker %s", engine.ServerVersion)
	version := ownVersion()
	image := makeImage(t, version)

	for _, oci := range []string{"runc", "runsc"} {
		t.Run(oci, func(t *testing.T) {
			if _, ok := engine.Runtimes[oci]; !ok {
				t.Skipf("NOT TESTED: the plugin under %s, which this engine does not have", oci)
			}
			v := containerVault(t, oci, false)
			require.NoError(t, v.RegisterImage(t.Context(), devenv.PluginName, image, oci))
			containerLife(t, v, image)
		})
	}
	t.Run("mlock", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("NOT TESTED: a container with mlock requires root")
		}
		v := containerVault(t, "runc", true)
		require.NoError(t, v.RegisterImage(t.Context(), devenv.PluginName, image, "runc"))
		containerMlock(t, v)
	})
	t.Run("outbound", func(t *testing.T) { containerOutbound(t, image) })
	t.Run("Dockerfile", func(t *testing.T) { sameAsDockerfile(t, image) })
}

// containerLife leases, renews, rotates and revokes, also after the container and
// then Vault are killed.
func containerLife(t *testing.T, v *devenv.Vault, image devenv.Image) {
	sim, endpoint := bridgedSimulator(t)
	m := mountPlugin(t, v, devenv.PluginName, sim, endpoint)
	m.role("r", "1h", "24h")
	first := m.creds("r")
	require.Equal(t, http.StatusOK, infer(t, sim, first.key))
	_, err := m.client.Sys().RenewWithContext(t.Context(), first.id, 7200)
	require.NoError(t, err)
	rotated := m.write("config/rotate", nil)
	require.NotEmpty(t, rotated.Data["admin_api_key_id"])
	second := m.creds("r")
	require.NoError(t, m.revoke(first))
	require.Equal(t, http.StatusUnauthorized, infer(t, sim, first.key))

	id := onlyContainer(t, v)
	c := inspect(t, id)
	require.Equal(t, image.ID, c.Image)
	require.Equal(t, "65532:0", c.Config.User)
	require.Equal(t, []string{"ALL"}, c.HostConfig.CapDrop)
	require.Empty(t, c.HostConfig.CapAdd)
	require.EqualValues(t, containerMemory, c.HostConfig.Memory)
	require.EqualValues(t, containerCPU, c.HostConfig.NanoCpus)
	if limits := cgroupLimits(t, c.State.Pid); limits != "" {
		require.Equal(t, fmt.Sprintf("memory %d, cpu 150000 of 100000", containerMemory), limits, "the kernel's limits for the container")
	}
	for _, secret := range sim.Secrets() {
		require.NotContains(t, c.raw, secret, "docker container inspect shows a secret")
	}

	killed := time.Now()
	_, err = devenv.Docker(t.Context(), "kill", id)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, err := m.client.Logical().Read(m.path + "/creds/r")
		return err == nil
	}, time.Minute, 50*time.Millisecond, "no read succeeded after the container was killed")
	t.Logf("leased again %s after the container was killed", time.Since(killed).Round(time.Millisecond))
	require.NotEqual(t, id, onlyContainer(t, v))

	require.NoError(t, v.Kill())
	requireNoContainers(t, v)
	require.NoError(t, v.Restart(t.Context()))
	require.NoError(t, m.revoke(second))
	require.Equal(t, http.StatusUnauthorized, infer(t, sim, second.key))
	m.creds("r")
}

// containerMlock leases from a plugin with locked memory: the process in the image
// is not root and must still be able to lock it.
func containerMlock(t *testing.T, v *devenv.Vault) {
	sim, endpoint := bridgedSimulator(t)
	m := mountPlugin(t, v, devenv.PluginName, sim, endpoint)
	m.role("r", "1h", "24h")
	require.NoError(t, m.revoke(m.creds("r")))
	c := inspect(t, onlyContainer(t, v))
	require.Equal(t, "65532:0", c.Config.User)
	require.Equal(t, []string{"ALL"}, c.HostConfig.CapDrop)
	require.Len(t, c.HostConfig.CapAdd, 1, "only IPC_LOCK")
	locked, resident := memory(t, c.State.Pid)
	require.Positive(t, locked, "kB locked")
	t.Logf("%d kB of memory locked, %d kB in use", locked, resident)
}

// containerOutbound calls an API that the container can neither resolve nor
// connect to, through the proxy in the plugin registration. ca_cert or a file in
// the image makes the plugin trust the API's certificate.
func containerOutbound(t *testing.T, image devenv.Image) {
	sim := openaitest.Start(t, openaitest.Options{TLS: true})
	// A container cannot read the host's files, so a derived image contains the CA
	// file.
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), []byte(sim.CACert()), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM "+image.Reference()+"\nCOPY ca.pem /ca.pem\n"), 0o600))
	derived := buildImage(t, image, "with-ca", dir)

	v := containerVault(t, "runc", false)
	proxy := startProxy(t, sim)
	const host = "example.com" // a name in the simulator's certificate; Go connects to loopback without a proxy
	endpoint := map[string]any{"api_endpoint": "https://" + host + "/v1"}
	lease := func(name string, extra ...map[string]any) {
		t.Helper()
		before := proxy.tunnels.Load()
		m := mountPlugin(t, v, name, sim, append(extra, endpoint)...)
		m.role("r", "1h", "24h")
		require.NoError(t, m.revoke(m.creds("r")))
		require.Greater(t, proxy.tunnels.Load(), before, "no connection through the proxy")
		require.Equal(t, host+":443", proxy.host.Load())
	}

	require.NoError(t, v.RegisterImage(t.Context(), "proxied", image, "runc", "HTTPS_PROXY="+proxy.url))
	lease("proxied", map[string]any{"ca_cert": sim.CACert()})

	require.NoError(t, v.RegisterImage(t.Context(), "with-ca", derived, "runc", "HTTPS_PROXY="+proxy.url, "SSL_CERT_FILE=/ca.pem"))
	lease("with-ca")

	// Without SSL_CERT_FILE, the same setup must fail.
	require.NoError(t, v.RegisterImage(t.Context(), "without-ca", derived, "runc", "HTTPS_PROXY="+proxy.url))
	client := v.Client()
	require.NoError(t, client.Sys().MountWithContext(t.Context(), "without-ca", &api.MountInput{Type: "without-ca"}))
	_, key := sim.AdminKey()
	_, err := client.Logical().WriteWithContext(t.Context(), "without-ca/config", map[string]any{"admin_api_key": key, "api_endpoint": endpoint["api_endpoint"]})
	require.ErrorContains(t, err, "certificate signed by unknown authority")
}

// sameAsDockerfile compares the image with the Dockerfile's.
func sameAsDockerfile(t *testing.T, image devenv.Image) {
	root, err := devenv.Root()
	require.NoError(t, err)
	dir := t.TempDir()
	dockerfile, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	require.NoError(t, err)
	// Build only the last stage, with a stub binary: the earlier stages pull an
	// image.
	_, last, found := strings.Cut(string(dockerfile), "\nFROM scratch\n")
	require.True(t, found, "the Dockerfile has no last stage")
	last = "FROM scratch\n" + regexp.MustCompile(`(?m)^(COPY) --from=\S+`).ReplaceAllString(last, "$1")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(last), 0o600))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "out"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "out", devenv.PluginName), []byte("no program\n"), 0o700))
	built := buildImage(t, image, "by-dockerfile", dir, "--build-arg", "VERSION="+image.Version, "--build-arg", "REVISION="+revision(t, image))

	for _, format := range []string{"{{.Os}}", "{{.Architecture}}", "{{.Config.User}}", "{{json .Config.Entrypoint}}", "{{json .Config.Cmd}}", "{{json .Config.Labels}}", "{{.Config.WorkingDir}}", "{{json .Config.Volumes}}"} {
		ours, err := devenv.Docker(t.Context(), "image", "inspect", "--format", format, image.ID)
		require.NoError(t, err)
		theirs, err := devenv.Docker(t.Context(), "image", "inspect", "--format", format, built.ID)
		require.NoError(t, err)
		require.Equal(t, ours, theirs, format)
	}
}

var versions atomic.Int32

// ownVersion returns a version that no other test or run uses, so that no test
// removes the images of another.
func ownVersion() string {
	return fmt.Sprintf("v0.0.0-test.%d.%d.%d", os.Getpid(), time.Now().Unix(), versions.Add(1))
}

func revision(t *testing.T, image devenv.Image) string {
	t.Helper()
	out, err := devenv.Docker(t.Context(), "image", "inspect", "--format", `{{index .Config.Labels "org.opencontainers.image.revision"}}`, image.ID)
	require.NoError(t, err)
	return out
}

// makeImage builds the image twice, the second time with other environment
// variables, and requires the same result.
func makeImage(t *testing.T, version string) devenv.Image {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // it may compile everything
	defer cancel()
	var archives [2][]byte
	var image devenv.Image
	for i, env := range [][]string{nil, {"GOAMD64=v3", "GOARM64=v9.0", "GOFLAGS=-tags=anything", "TZ=Asia/Tokyo"}} {
		dir := t.TempDir()
		made, err := devenv.MakeImage(ctx, dir, version, env...)
		require.NoError(t, err)
		if i == 0 {
			image = made
			removeAtEnd(t, image)
		}
		require.Equal(t, image, made, "the image built again")
		paths, err := filepath.Glob(filepath.Join(dir, "*.oci.tar"))
		require.NoError(t, err)
		require.Len(t, paths, 1)
		archives[i], err = os.ReadFile(paths[0])
		require.NoError(t, err)
	}
	require.Equal(t, archives[0], archives[1], "the archive built again")
	t.Logf("image %s, %d bytes, same ID in two builds: %s", image.Reference(), len(archives[0]), image.ID)
	return image
}

// buildImage has Docker build an image in a directory.
func buildImage(t *testing.T, of devenv.Image, suffix, dir string, args ...string) devenv.Image {
	t.Helper()
	name := devenv.Image{Repository: of.Repository + "-" + suffix, Version: of.Version}
	args = append([]string{"build", "--quiet", "--tag", name.Reference()}, args...)
	_, err := devenv.Docker(t.Context(), append(args, dir)...)
	require.NoError(t, err)
	image, err := devenv.FindImage(t.Context(), name.Repository, name.Version)
	require.NoError(t, err)
	removeAtEnd(t, image)
	return image
}

func removeAtEnd(t *testing.T, image devenv.Image) {
	t.Cleanup(func() { require.NoError(t, image.Remove(context.WithoutCancel(t.Context()))) })
}

// containerVault starts a server with one plugin runtime, named after its OCI
// runtime. The containers must stop with the server.
func containerVault(t *testing.T, oci string, mlock bool) *devenv.Vault {
	t.Helper()
	opts := serverOptions()
	opts.Mlock = mlock
	v, err := devenv.Start(t.Context(), opts)
	require.NoError(t, err)
	v.WrapTransport = answers.record
	t.Cleanup(func() {
		if err := v.Stop(); err != nil {
			t.Errorf("stopping Vault: %v", err)
		}
		requireNoContainers(t, v)
	})
	require.NoError(t, v.Client().Sys().RegisterPluginRuntime(t.Context(), &api.RegisterPluginRuntimeInput{
		Name:       oci,
		Type:       api.PluginRuntimeTypeContainer,
		OCIRuntime: oci,
		CPU:        containerCPU,
		Memory:     containerMemory,
	}))
	return v
}

// requireNoContainers waits until the containers of a stopped server stop, and
// removes those that do not. A plugin waits half a minute for its server to
// reconnect.
func requireNoContainers(t *testing.T, v *devenv.Vault) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		left, err := v.Containers(ctx)
		require.NoError(t, err)
		if len(left) == 0 {
			return
		}
		if time.Since(began) > 40*time.Second {
			_, err := devenv.Docker(ctx, append([]string{"rm", "--force"}, left...)...)
			require.Failf(t, "containers outlive their Vault", "%v; removing them: %v", left, err)
		}
	}
}

// bridgedSimulator starts a simulator that containers can also reach, and returns
// it with the config fields for them.
func bridgedSimulator(t *testing.T) (*openaitest.Server, map[string]any) {
	t.Helper()
	sim := openaitest.Start(t, openaitest.Options{})
	return sim, map[string]any{"api_endpoint": serveOnBridge(t, sim) + "/v1", "allow_insecure_endpoint": true}
}

// serveOnBridge serves on the host's address in Docker's bridge network.
func serveOnBridge(t *testing.T, handler http.Handler) (url string) {
	t.Helper()
	name, err := devenv.Docker(t.Context(), "network", "inspect", "--format", `{{index .Options "com.docker.network.bridge.name"}}`, "bridge")
	require.NoError(t, err)
	bridge, err := net.InterfaceByName(name)
	require.NoError(t, err, "the network interface %q of Docker's bridge", name)
	addrs, err := bridge.Addrs()
	require.NoError(t, err)
	require.NotEmpty(t, addrs, "no address on %s", name)
	ip, _, err := net.ParseCIDR(addrs[0].String())
	require.NoError(t, err)

	server := httptest.NewUnstartedServer(handler)
	require.NoError(t, server.Listener.Close())
	server.Listener, err = net.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
	require.NoError(t, err, "listen on Docker's bridge address")
	server.Start()
	t.Cleanup(server.Close)
	return server.URL
}

// proxy is an HTTP proxy that connects every request to one simulator.
type proxy struct {
	url     string
	tunnels atomic.Int32
	host    atomic.Value // the last one requested
}

func startProxy(t *testing.T, sim *openaitest.Server) *proxy {
	t.Helper()
	p := &proxy{}
	target := strings.TrimSuffix(strings.TrimPrefix(sim.URL(), "https://"), "/v1")
	p.url = serveOnBridge(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "this proxy supports only CONNECT", http.StatusMethodNotAllowed)
			return
		}
		api, err := net.Dial("tcp", target)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		p.tunnels.Add(1)
		p.host.Store(r.Host)
		w.WriteHeader(http.StatusOK)
		client, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			api.Close()
			return
		}
		// Either direction closes both, so that none outlives the test.
		tunnel := func(to io.Writer, from io.Reader) {
			_, _ = io.Copy(to, from)
			_ = client.Close()
			_ = api.Close()
		}
		go tunnel(client, api)
		go tunnel(api, buffered) // which may already hold data from the client
	}))
	return p
}

// container is the output of docker inspect.
type container struct {
	Image string
	State struct {
		Pid int
	}
	Config struct {
		User string
	}
	HostConfig struct {
		CapAdd, CapDrop  []string
		Memory, NanoCpus int64
	}
	raw string
}

func inspect(t *testing.T, id string) container {
	t.Helper()
	out, err := devenv.Docker(t.Context(), "container", "inspect", id)
	require.NoError(t, err)
	var all []container
	require.NoError(t, json.Unmarshal([]byte(out), &all))
	require.Len(t, all, 1)
	all[0].raw = out
	return all[0]
}

// onlyContainer returns the server's only container. It waits for the exit of one
// that only reports the version.
func onlyContainer(t *testing.T, v *devenv.Vault) string {
	t.Helper()
	var ids []string
	require.Eventually(t, func() bool {
		var err error
		ids, err = v.Containers(t.Context())
		return err == nil && len(ids) == 1
	}, time.Minute, 50*time.Millisecond, "not exactly one container")
	return ids[0]
}

// cgroupLimits returns the kernel's limits for a process, or "" if the process is
// not visible, for example if Docker runs in a virtual machine.
func cgroupLimits(t *testing.T, pid int) string {
	t.Helper()
	membership, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Logf("NOT TESTED: the kernel's limits: %v", err)
		return ""
	}
	value := func(controller, path, file string) string {
		content, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, path, file))
		require.NoError(t, err)
		return strings.TrimSpace(string(content))
	}
	var memory, quota, period string
	for line := range strings.Lines(strings.TrimSpace(string(membership))) {
		_, line, _ = strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(line, ":")
		switch controllers {
		case "": // v2, unless v1 controllers follow
			if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", path, "memory.max")); err == nil {
				memory = value("", path, "memory.max")
				quota, period, _ = strings.Cut(value("", path, "cpu.max"), " ")
			}
		case "memory":
			memory = value("memory", path, "memory.limit_in_bytes")
		case "cpu,cpuacct", "cpu":
			quota, period = value(controllers, path, "cpu.cfs_quota_us"), value(controllers, path, "cpu.cfs_period_us")
		}
	}
	return fmt.Sprintf("memory %s, cpu %s of %s", memory, quota, period)
}

var memoryLine = regexp.MustCompile(`(?m)^(VmLck|VmRSS):\s+(\d+) kB$`)

// memory returns how much of a process's memory is locked and in use, in kB.
func memory(t *testing.T, pid int) (locked, resident int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	for _, match := range memoryLine.FindAllStringSubmatch(string(status), -1) {
		kB, err := strconv.Atoi(match[2])
		require.NoError(t, err)
		if match[1] == "VmLck" {
			locked = kB
		} else {
			resident = kB
		}
	}
	return locked, resident
}
