package devenv

// A Vault server under test: one node that tests can start, stop, kill and
// restart on the same storage.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
)

// startTimeout bounds each step of a start: the process answering, and the node
// becoming active. Both take about a second on an idle machine.
const startTimeout = 60 * time.Second

// Options describe a server. The zero value is a single node with raft storage,
// the most common setup.
type Options struct {
	VaultBin string   // the server; FindVault if empty
	Storage  string   // "raft" (default) or "inmem", which does not survive a restart
	LogLevel string   // "info" by default; the log is a file either way
	Audit    bool     // with a file audit device
	Mlock    bool     // locks the memory of server and plugins, which requires root
	Config   string   // appended to the configuration file
	Env      []string // added to the server's environment, and so to the plugin's

	raftPace int // raft's performance_multiplier; 0 means 1, the fastest
}

// Vault is a running server and what is needed to use it.
type Vault struct {
	Addr      string
	RootToken string
	Product   Product
	Version   string // as the server reports it
	Dir       string // everything it writes
	PluginDir string
	LogPath   string
	AuditPath string // empty without an audit device

	// WrapTransport, if set, wraps the HTTP transport of this server's clients.
	WrapTransport func(http.RoundTripper) http.RoundTripper

	opts      Options
	unsealKey string
	clustered bool // part of a cluster, so a standby is ready too
	process   *process
	log       *os.File
	orphans   []orphan
}

// orphan is a plugin process whose Vault was killed.
type orphan struct{ pid, group int }

// Start starts, initializes and unseals a server. The caller must Stop it.
func Start(ctx context.Context, opts Options) (*Vault, error) {
	return start(ctx, opts, "node1", (*Vault).initialize)
}

// start starts a server and makes it ready, which unseals it.
func start(ctx context.Context, opts Options, node string, ready func(*Vault, context.Context) error) (_ *Vault, err error) {
	product, err := find(ctx, &opts)
	if err != nil {
		return nil, err
	}
	if opts.Mlock && product.Lacks(Mlock) {
		return nil, fmt.Errorf("%s does not support mlock", product)
	}
	dir, err := os.MkdirTemp("", "vault-openai-")
	if err != nil {
		return nil, err
	}
	// Vault rejects plugins behind a symbolic link, and the temporary folder is one
	// on some systems.
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	v := &Vault{
		Product:   product,
		Dir:       dir,
		PluginDir: filepath.Join(dir, "plugins"),
		LogPath:   filepath.Join(dir, "vault.log"),
		opts:      opts,
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nlast lines of Vault's log:\n%s", err, v.logTail())
			_ = v.Stop()
		}
	}()
	for _, d := range []string{v.PluginDir, filepath.Join(dir, "raft")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return nil, err
		}
	}
	if v.log, err = os.OpenFile(v.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	if err := v.writeConfig(ctx, node); err != nil {
		return nil, err
	}
	if err := v.launch(ctx); err != nil {
		return nil, err
	}
	if err := ready(v, ctx); err != nil {
		return nil, err
	}
	if opts.Audit && !v.clustered {
		if err := v.enableAudit(ctx); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// found is what find has found in this process, by Options.VaultBin. To look it up takes
// as much processor time as the start of a server.
var found = struct {
	sync.Mutex
	servers map[string]server
}{servers: map[string]server{}}

type server struct {
	bin     string
	product Product
}

// find sets opts.VaultBin if it is empty, and returns the server's product.
func find(ctx context.Context, opts *Options) (Product, error) {
	found.Lock()
	defer found.Unlock()
	s, ok := found.servers[opts.VaultBin]
	if !ok {
		var err error
		if s.bin = opts.VaultBin; s.bin == "" {
			if s.bin, err = FindVault(ctx); err != nil {
				return "", err
			}
		}
		if s.product, _, err = identify(ctx, s.bin); err != nil {
			return "", err
		}
		found.servers[opts.VaultBin] = s
	}
	opts.VaultBin = s.bin
	return s.product, nil
}

func (v *Vault) writeConfig(ctx context.Context, node string) error {
	ports, err := freePorts(ctx, 2)
	if err != nil {
		return err
	}
	v.Addr = fmt.Sprintf("http://127.0.0.1:%d", ports[0])
	storage := `storage "inmem" {}`
	if v.opts.Storage != "inmem" {
		storage = fmt.Sprintf(`storage "raft" {
  path                   = %q
  node_id                = %q
  performance_multiplier = %d
}`, filepath.Join(v.Dir, "raft"), node, max(1, v.opts.raftPace))
	}
	config := fmt.Sprintf(`%s

listener "tcp" {
  address         = "127.0.0.1:%d"
  cluster_address = "127.0.0.1:%d"
  tls_disable     = true
}

api_addr         = %q
cluster_addr     = "http://127.0.0.1:%d"
plugin_directory = %q
%s
%s
`, storage, ports[0], ports[1], v.Addr, ports[1], v.PluginDir, v.Product.configFor(v.opts.Mlock), v.opts.Config)
	return os.WriteFile(v.configPath(), []byte(config), 0o600)
}

func (v *Vault) configPath() string { return filepath.Join(v.Dir, "vault.hcl") }

// launch starts the process and waits until it answers.
func (v *Vault) launch(ctx context.Context) error {
	level := v.opts.LogLevel
	if level == "" {
		level = "info"
	}
	// Not CommandContext: the server outlives the call that started it.
	cmd := exec.Command(v.opts.VaultBin, "server", "-config", v.configPath(), "-log-level", level)
	cmd.Dir = v.Dir
	cmd.Env = serverEnv(v.opts.Env)
	cmd.Stdout, cmd.Stderr = v.log, v.log
	p, err := startProcess(cmd)
	if err != nil {
		return fmt.Errorf("starting %s: %w", v.opts.VaultBin, err)
	}
	v.process = p
	return poll(ctx, startTimeout, "Vault to answer", func() error {
		if !p.running() {
			return stop{errors.New("the Vault process ended")}
		}
		health, err := v.Client().Sys().HealthWithContext(ctx)
		if err == nil {
			v.Version = health.Version
		}
		return err
	})
}

func (v *Vault) initialize(ctx context.Context) error {
	keys, err := v.Client().Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return fmt.Errorf("initializing Vault: %w", err)
	}
	v.RootToken, v.unsealKey = keys.RootToken, keys.KeysB64[0]
	return v.unseal(ctx)
}

// unseal unseals the server and waits until it is active or, in a cluster, a
// standby. Raft first elects a leader, even with a single node.
func (v *Vault) unseal(ctx context.Context) error {
	if _, err := v.Client().Sys().UnsealWithContext(ctx, v.unsealKey); err != nil {
		return fmt.Errorf("unsealing Vault: %w", err)
	}
	return poll(ctx, startTimeout, "Vault to become active", func() error {
		health, err := v.Client().Sys().HealthWithContext(ctx)
		if err == nil && (health.Sealed || (health.Standby && !v.clustered)) {
			err = errors.New("the node is sealed or a standby")
		}
		return err
	})
}

func (v *Vault) enableAudit(ctx context.Context) error {
	v.AuditPath = filepath.Join(v.Dir, "audit.log")
	return v.Client().Sys().EnableAuditWithOptionsWithContext(ctx, "file", &api.EnableAuditOptions{
		Type:    "file",
		Options: map[string]string{"file_path": v.AuditPath},
	})
}

// Client returns a new client with the root token. It does not retry, so that a
// test sees each failure.
func (v *Vault) Client() *api.Client {
	return v.ClientFor(v.RootToken)
}

// ClientFor returns a new client with a token.
func (v *Vault) ClientFor(token string) *api.Client {
	config := api.DefaultConfig()
	config.Address = v.Addr
	config.MaxRetries = 0
	if v.WrapTransport != nil {
		config.HttpClient.Transport = v.WrapTransport(config.HttpClient.Transport)
	}
	client, err := api.NewClient(config)
	if err != nil { // only for settings in the environment, which IsolateEnv removed
		panic(fmt.Sprintf("devenv: Vault client: %v", err))
	}
	client.SetToken(token)
	return client
}

// String names the server: its product and version.
func (v *Vault) String() string { return string(v.Product) + " " + v.Version }

// CLIEnv returns the environment for a shell that uses this server. The server's binary
// is on the PATH as vault and as the product's command, regardless of its file name.
func (v *Vault) CLIEnv() ([]string, error) {
	bin := filepath.Join(v.Dir, "bin")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		return nil, err
	}
	target, err := filepath.Abs(v.opts.VaultBin)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"vault", v.Product.CLI()} {
		if err := os.Symlink(target, filepath.Join(bin, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
	}
	return append(serverEnv(nil),
		"PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"),
		"HOME="+v.Dir, // the CLI keeps its token file there
		"VAULT_ADDR="+v.Addr,
		"VAULT_TOKEN="+v.RootToken,
	), nil
}

// Register registers a plugin in the catalog, after copying it to the server's
// plugin directory if it was built elsewhere.
func (v *Vault) Register(ctx context.Context, p Plugin) error {
	if err := v.install(p); err != nil {
		return err
	}
	err := v.Client().Sys().RegisterPluginWithContext(ctx, &api.RegisterPluginInput{
		Name:    cmp.Or(p.Name, PluginName),
		Type:    api.PluginTypeSecrets,
		Command: filepath.Base(p.Path),
		SHA256:  p.SHA256,
		Version: p.Version,
	})
	if err != nil {
		return fmt.Errorf("registering the plugin: %w", err)
	}
	return nil
}

// install copies a plugin to the server's plugin directory.
func (v *Vault) install(p Plugin) error {
	if filepath.Dir(p.Path) == v.PluginDir {
		return nil
	}
	content, err := os.ReadFile(p.Path)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(v.PluginDir, filepath.Base(p.Path)), content, 0o700)
}

// Mount enables the engine at a path.
func (v *Vault) Mount(ctx context.Context, path string, config api.MountConfigInput) error {
	if err := v.Client().Sys().MountWithContext(ctx, path, &api.MountInput{Type: PluginName, Config: config}); err != nil {
		return fmt.Errorf("enabling the engine at %s: %w", path, err)
	}
	return nil
}

// PID is the server's process ID.
func (v *Vault) PID() int { return v.process.pid() }

// PluginPIDs lists the plugin processes that the server has started.
func (v *Vault) PluginPIDs() ([]int, error) { return children(v.process.pid()) }

// KillPlugins kills all plugin processes, as in a crash, and returns their number.
func (v *Vault) KillPlugins() (int, error) {
	pids, err := v.PluginPIDs()
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		if err := killOwn(pid, v.process.pid()); err != nil {
			return 0, err
		}
	}
	return len(pids), nil
}

// Kill kills the server, as in a crash. Its plugins run on as after a real crash;
// Stop ends those that are left.
func (v *Vault) Kill() error {
	// Suspend it first, so that it starts no plugin after they are listed.
	_ = v.process.cmd.Process.Signal(syscall.SIGSTOP) // an error means that it has ended
	pids, err := v.PluginPIDs()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		v.orphans = append(v.orphans, orphan{pid, v.process.pid()})
	}
	v.process.kill()
	return nil
}

// Restart starts the server again on its storage, ending it first if it runs.
func (v *Vault) Restart(ctx context.Context) error {
	if v.process.running() {
		v.process.terminate()
	}
	if err := v.launch(ctx); err != nil {
		return err
	}
	return v.unseal(ctx)
}

// Snapshot writes a snapshot of the server's storage, as vault operator raft snapshot
// save does.
func (v *Vault) Snapshot(ctx context.Context, to io.Writer) error {
	if err := v.Client().Sys().RaftSnapshotWithContext(ctx, to); err != nil {
		return fmt.Errorf("saving a snapshot: %w", err)
	}
	return nil
}

// Restore makes the server a copy of another, as vault operator raft snapshot
// restore -force does: it then has the other's storage, with its audit device, and
// the other's unseal key and token.
func (v *Vault) Restore(ctx context.Context, snapshot io.Reader, of *Vault) error {
	if err := v.Client().Sys().RaftSnapshotRestoreWithContext(ctx, snapshot, true); err != nil {
		return fmt.Errorf("restoring a snapshot: %w", err)
	}
	// Vault answers before it has restored the storage. After that, it accepts the
	// other's token or is sealed. A request during the restore can hang.
	restored := v.ClientFor(of.RootToken)
	restored.SetClientTimeout(5 * time.Second)
	err := poll(ctx, time.Minute, "the snapshot to be restored", func() error {
		if status, err := restored.Sys().SealStatusWithContext(ctx); err == nil && status.Sealed {
			return nil
		}
		_, err := restored.Auth().Token().LookupSelfWithContext(ctx)
		return err
	})
	if err != nil {
		return err
	}
	v.RootToken, v.unsealKey, v.AuditPath = of.RootToken, of.unsealKey, of.AuditPath
	return v.Restart(ctx) // the process still has the unseal key that it was initialized with
}

// Stop ends the server and removes its files.
func (v *Vault) Stop() error {
	if v.process != nil {
		// A server that crashed, for example out of memory, left its plugins running.
		for _, pid := range runningFrom(v.PluginDir) {
			v.orphans = append(v.orphans, orphan{pid, v.process.pid()})
		}
		// A graceful stop also ends the plugins. Record them in case it fails.
		pids, err := v.PluginPIDs()
		if err == nil {
			for _, pid := range pids {
				v.orphans = append(v.orphans, orphan{pid, v.process.pid()})
			}
		}
		v.process.terminate()
	}
	var errs []error
	for _, o := range v.orphans {
		errs = append(errs, killOwn(o.pid, o.group))
	}
	if v.log != nil {
		errs = append(errs, v.log.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(v.Dir))...)
}

// logTail returns the end of the log, for errors about a server whose files are removed.
func (v *Vault) logTail() string {
	content, err := os.ReadFile(v.LogPath)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	return strings.Join(lines[max(0, len(lines)-25):], "\n")
}

// freePorts returns unused ports below the ephemeral range (from 32768 on Linux, from
// 49152 elsewhere), so that the system gives none of them to another process before the
// server listens, or while it restarts.
func freePorts(ctx context.Context, n int) ([]int, error) {
	var ports []int
	for range 1000 {
		port := 10_000 + rand.N(22_000)
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer func() { _ = l.Close() }() // only after the last is found, so that they differ
		if ports = append(ports, port); len(ports) == n {
			return ports, nil
		}
	}
	return nil, fmt.Errorf("no %d free ports found", n)
}

// stop is an error that ends polling.
type stop struct{ error }

// poll repeats what until it succeeds or the timeout ends.
func poll(ctx context.Context, timeout time.Duration, goal string, what func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := what()
		if err == nil {
			return nil
		}
		var final stop
		if errors.As(err, &final) {
			return fmt.Errorf("waiting for %s: %w", goal, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w (last: %w)", goal, ctx.Err(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
