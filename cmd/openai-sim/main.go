// Command openai-sim serves the simulator of OpenAI's Admin API on loopback, for
// the demo, for development and for benchmarks.
//
// When it is ready, it prints one line of JSON on standard output. The control plane under
// /_sim/ has no authentication, and the line contains an admin key, so it listens only on
// loopback by default.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"vault-plugin-secrets-openai/client/openaitest"
)

// drainTime bounds the wait for requests in flight at shutdown.
const drainTime = 3 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// It keeps all events in memory, and benchmarks share its CPU cores, so memory is
	// traded for CPU.
	debug.SetGCPercent(400)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "openai-sim:", err)
		os.Exit(1)
	}
}

type settings struct {
	listen      string
	allowRemote bool
	tls         bool
	projects    []string
	options     openaitest.Options
}

func parse(args []string, errOut io.Writer) (settings, error) {
	var in settings
	fs := flag.NewFlagSet("openai-sim", flag.ContinueOnError)
	fs.SetOutput(errOut)
	fs.StringVar(&in.listen, "listen", "127.0.0.1:0", "`address` to listen on; port 0 picks a free one")
	fs.BoolVar(&in.allowRemote, "allow-remote", false, "allow an address that is not loopback")
	fs.BoolVar(&in.tls, "tls", false, "serve HTTPS with HTTP/2, with a new certificate that is part of the output")
	fs.StringVar(&in.options.AdminKey, "admin-key", "", "`value` of the first admin key (default: generated)")
	fs.Func("project", "`name` of a project; may be repeated (default: one named demo)", func(name string) error {
		if name == "" {
			return errors.New("project name must not be empty")
		}
		in.projects = append(in.projects, name)
		return nil
	})
	fs.DurationVar(&in.options.Latency, "latency", 0, "latency to add to each answer")
	fs.IntVar(&in.options.RatePerMinute, "rate-per-minute", 0, "requests per minute and endpoint of the Admin API (default: no limit)")
	fs.IntVar(&in.options.RateBurst, "rate-burst", 0, "burst size for -rate-per-minute (default: the smaller of it and 10)")
	fs.BoolVar(&in.options.RetryAfter, "retry-after", false, "send Retry-After with a 429")
	fs.DurationVar(&in.options.ActivationDelay, "activation-delay", 0, "time until a new project key works")
	fs.DurationVar(&in.options.AdminActivationDelay, "admin-activation-delay", 0, "time until a new admin key works")
	fs.DurationVar(&in.options.MaxKeyLifetime, "max-key-lifetime", 0, "maximum lifetime of a new project key; keys without expiry are rejected (default: no policy)")
	if err := fs.Parse(args); err != nil {
		return in, err
	}
	if fs.NArg() > 0 {
		return in, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	o := in.options
	if o.Latency < 0 || o.ActivationDelay < 0 || o.AdminActivationDelay < 0 || o.MaxKeyLifetime < 0 || o.RatePerMinute < 0 || o.RateBurst < 0 {
		return in, errors.New("durations and rates must not be negative")
	}
	if len(in.projects) == 0 {
		in.projects = []string{"demo"}
	}
	return in, nil
}

// introduction is the line on standard output.
type introduction struct {
	URL        string        `json:"url"`
	CACert     string        `json:"ca_cert,omitempty"` // PEM, with -tls
	AdminKey   string        `json:"admin_key"`
	AdminKeyID string        `json:"admin_key_id"`
	Projects   []projectLine `json:"projects"`
}

type projectLine struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// run serves until ctx ends.
func run(ctx context.Context, args []string, out, errOut io.Writer) error {
	in, err := parse(args, errOut)
	if err != nil {
		return err
	}
	listener, err := listen(ctx, in.listen, in.allowRemote)
	if err != nil {
		return err
	}
	sim := openaitest.New(in.options)
	server := &http.Server{
		Handler:           sim.WithControl(),
		ConnState:         sim.ConnState,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(errOut, "openai-sim: ", 0),
	}
	scheme, serve := "http://", func() error { return server.Serve(listener) }
	if in.tls {
		cert, err := sim.Certificate()
		if err != nil {
			return errors.Join(err, listener.Close())
		}
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
		scheme, serve = "https://", func() error { return server.ServeTLS(listener, "", "") }
	}
	sim.SetURL(scheme + listener.Addr().String() + "/v1")
	line := introduction{URL: sim.URL(), CACert: sim.CACert()}
	line.AdminKeyID, line.AdminKey = sim.AdminKey()
	for _, name := range in.projects {
		line.Projects = append(line.Projects, projectLine{ID: sim.AddProject(name), Name: name})
	}

	served := make(chan error, 1)
	go func() { served <- serve() }()
	if err := json.NewEncoder(out).Encode(line); err != nil {
		_ = server.Close() // err is the error to report
		return err
	}
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}

	sim.Close() // releases requests that hang
	drained, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	if err := server.Shutdown(drained); err != nil {
		return server.Close()
	}
	return nil
}

// listen rejects addresses that other machines can reach. It checks the bound address,
// since a host name may resolve to any.
func listen(ctx context.Context, address string, allowRemote bool) (net.Listener, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	bound, isTCP := listener.Addr().(*net.TCPAddr)
	if !allowRemote && (!isTCP || !bound.IP.IsLoopback()) {
		_ = listener.Close() // unused so far
		return nil, fmt.Errorf("%s is not a loopback address, and the simulator has no authentication; set -allow-remote to allow it", address)
	}
	return listener, nil
}
