package broker

// This file owns start and shutdown. The order of the start is a promise:
// whatever can be wrong without Vault is found before anything is leased.

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// version is set by the build.
var version = "v0.1.0-dev"

// Version returns the broker's version.
func Version() string { return version }

const (
	headerTimeout = 10 * time.Second // for reading a request's header
	idleTimeout   = 2 * time.Minute  // of a connection between requests
	lastAnswers   = 5 * time.Second  // for requests in progress after -drain
	closeTimeout  = 45 * time.Second // for revoking every key
)

// broker is a running broker, which forwards the requests of all agents.
type broker struct {
	config      *Config
	log         *slog.Logger
	ledger      *ledger
	agents      []*agent
	hosts       map[string]bool // accepted Host headers
	upstream    *url.URL
	base        http.RoundTripper // to upstream
	reverse     *httputil.ReverseProxy
	server      *http.Server
	statistics  *http.Server
	address     string       // host:port for the agents
	connections atomic.Int64 // that are open
	phase       atomic.Int32
	prefix      string // of request IDs
	sequence    atomic.Int64
}

// newBroker checks a configuration and opens what needs neither Vault nor a port.
func newBroker(config *Config, logger *slog.Logger) (*broker, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	upstream, err := url.Parse(strings.TrimSuffix(config.Upstream, "/"))
	if err != nil {
		return nil, err
	}
	vault := &vault{login: config.Vault}
	client, err := vault.client()
	if err != nil {
		return nil, err
	}
	if _, _, err := vault.credentials(client); err != nil {
		return nil, err
	}
	b := &broker{config: config, log: logger, hosts: map[string]bool{}, upstream: upstream, base: newTransport(), prefix: rand.Text()[:8] + "-"}
	b.reverse = &httputil.ReverseProxy{Rewrite: b.rewrite, Transport: b, FlushInterval: -1, ModifyResponse: b.answered, ErrorHandler: b.unanswered}
	if b.ledger, err = newLedger(config.Audit); err != nil {
		return nil, err
	}
	for _, a := range config.Agents {
		token, err := placeholderFor(a)
		if err != nil {
			return nil, fmt.Errorf("agent %s: %w", a.Name, err)
		}
		b.agents = append(b.agents, &agent{
			Agent: a, token: token, hash: sha256.Sum256([]byte(token)),
			keys: newKeys(a, vault, logger, b.ledger), limits: newLimits(a.MaxConcurrent, a.MaxRPM),
		})
	}
	return b, nil
}

// open binds the ports, leases a key for every agent, and writes the token
// files. The ports come first: a port in use must not cost a lease.
func (b *broker) open(ctx context.Context) error {
	listener, err := b.bind(ctx, b.config.Listen)
	if err != nil {
		return err
	}
	b.serve(listener)
	if b.config.Metrics != "" {
		listener, err := b.bind(ctx, b.config.Metrics)
		if err != nil {
			return err
		}
		b.statistics = &http.Server{Handler: b.ledger, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout}
		go func() { _ = b.statistics.Serve(listener) }() // ends with Close
	}
	for _, a := range b.agents {
		if none := a.keys.replace(ctx, nil); none != nil {
			return fmt.Errorf("agent %s: no OpenAI key: %w", a.Name, none)
		}
	}
	b.phase.Store(serving)
	for _, a := range b.agents {
		if a.TokenFile != "" {
			if err := a.writeToken(); err != nil {
				return fmt.Errorf("agent %s: write token_file: %w", a.Name, err)
			}
		}
	}
	return nil
}

// bind looks at the address that was bound, so that no name hides what it is.
func (b *broker) bind(ctx context.Context, address string) (net.Listener, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if bound, isTCP := listener.Addr().(*net.TCPAddr); !b.config.AllowRemote && (!isTCP || !bound.IP.IsLoopback()) {
		_ = listener.Close() // nothing was served on it
		return nil, fmt.Errorf("%s is not a loopback address: other machines could reach the broker; use -allow-remote to accept that", address)
	}
	return listener, nil
}

// serve answers on a listener, with refusals until every agent has a key.
func (b *broker) serve(listener net.Listener) {
	host, port, _ := net.SplitHostPort(listener.Addr().String()) // an address of net's own
	if !isLoopback(host) {
		host = "127.0.0.1" // for a program on this machine
	}
	b.address = net.JoinHostPort(host, port)
	for _, name := range append([]string{"127.0.0.1", "localhost", "::1", host}, b.config.Hosts...) {
		b.hosts[net.JoinHostPort(strings.ToLower(name), port)] = true
	}
	b.phase.Store(stopping)
	b.server = &http.Server{
		Handler: b, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 64 << 10,
		DisableGeneralOptionsHandler: true, // each request has a line in the audit log
		ErrorLog:                     slog.NewLogLogger(b.log.Handler(), slog.LevelDebug),
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				b.connections.Add(1)
			} else if state == http.StateClosed || state == http.StateHijacked {
				b.connections.Add(-1)
			}
		},
	}
	go func() { _ = b.server.Serve(listener) }() // ends with Shutdown
}

// close refuses new requests, waits for those in progress up to a bound, cuts
// the rest, and revokes every key. Each request has its last line when it returns.
func (b *broker) close(wait time.Duration) (err error) {
	b.phase.Store(stopping)
	if b.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		_ = b.server.Shutdown(ctx) // what is left is cut
		b.idle(ctx)                // WebSockets, which Shutdown does not know
		b.phase.Store(cutting)
		_ = b.server.Close()
	}
	if b.statistics != nil {
		_ = b.statistics.Close() // it only shows numbers
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	errs := make(chan error, len(b.agents))
	for _, a := range b.agents {
		go func() { errs <- a.keys.close(ctx) }() // WebSockets end with their keys
	}
	for range b.agents {
		err = cmp.Or(err, <-errs)
	}
	b.idle(ctx)
	return err
}

// idle waits until no request is in progress.
func (b *broker) idle(ctx context.Context) {
	for ctx.Err() == nil && b.busy() {
		time.Sleep(10 * time.Millisecond)
	}
}

func (b *broker) busy() bool {
	return slices.ContainsFunc(b.agents, func(a *agent) bool { return a.limits.busy() })
}

// Run serves until a signal, or with args for as long as a program runs, which
// has a placeholder in its environment. It returns the program's exit status, or
// a shell's for a program that cannot be started.
//
// Without a program it serves for -drain more after the first signal, or until no
// connection is left; a second signal ends the wait.
func Run(config *Config, args []string, logger *slog.Logger) (status int, err error) {
	var child *child
	if args != nil {
		if child, status, err = newChild(args, config.Agents[0].User); err != nil {
			return status, err
		}
	}
	b, err := newBroker(config, logger)
	if err != nil {
		return exitFailed, err
	}
	log.SetOutput(io.Discard) // net/http would print every header here with GODEBUG=http2debug=1, and with it the key
	b.harden()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, passedSignals...)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready := make(chan error, 1)
	go func() { ready <- b.open(ctx) }()
	select {
	case err = <-ready:
	case s := <-signals:
		cancel()
		logger.Info("start interrupted", "error", <-ready)
		return signalStatus(s), b.close(0)
	}
	if err == nil && child != nil {
		err = child.start(b.address, b.agents[0].token)
	}
	wait := lastAnswers
	switch {
	case err != nil:
		wait = 0
	case child != nil:
		status, wait = child.wait(signals), time.Duration(config.Drain)
	default:
		logger.Info("ready", "address", b.address, "agents", len(config.Agents), "version", version)
		<-signals
		b.drain(signals, time.Duration(config.Drain))
	}
	if err = errors.Join(err, b.close(wait)); err != nil {
		status = max(status, exitFailed)
	}
	return status, err
}

// drain waits until no connection has been open for a second.
func (b *broker) drain(signals <-chan os.Signal, atMost time.Duration) {
	b.log.Info("stopping", "drain", atMost.String())
	b.phase.Store(draining)
	deadline, quietSince := time.After(atMost), time.Now()
	for time.Since(quietSince) < time.Second {
		if b.connections.Load() > 0 || b.busy() {
			quietSince = time.Now()
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-deadline:
			return
		case <-signals:
			return
		}
	}
}

var tokenForm = regexp.MustCompile(`^sk-broker-[A-Za-z0-9_-]{43}$`)

// placeholderFor makes an agent's token. One that the agent's token file has
// already stays, so that a restart does not lock out a running agent.
func placeholderFor(a Agent) (string, error) {
	if a.TokenFile != "" {
		if old, err := readFile(a.TokenFile, 0o077); err == nil && tokenForm.MatchString(old) {
			return old, nil
		}
		if _, err := os.Stat(filepath.Dir(a.TokenFile)); err != nil {
			return "", err
		}
	}
	token := make([]byte, 32)
	_, _ = rand.Read(token) // never fails
	return "sk-broker-" + base64.RawURLEncoding.EncodeToString(token), nil
}

// writeToken puts the token into its file, for the agent's account only.
func (a *agent) writeToken() error {
	temporary, err := os.CreateTemp(filepath.Dir(a.TokenFile), ".token-") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temporary.Name()) }() // unless it has its name
	_, err = temporary.WriteString(a.token + "\n")
	if err == nil && a.User != "" {
		var owner *syscall.Credential
		if _, owner, err = account(a.User); err == nil {
			err = temporary.Chown(int(owner.Uid), int(owner.Gid))
		}
	}
	if err = errors.Join(err, temporary.Close()); err != nil {
		return err
	}
	return os.Rename(temporary.Name(), a.TokenFile)
}
