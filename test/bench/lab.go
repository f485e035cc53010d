package main

// The measured processes: Vault servers with both engines mounted, and the
// simulator. measure.go has the measurements.
//
// What must stay true: each component is a separate process, so that its CPU time
// and memory can be measured. That includes the simulator: its heap, which keeps
// all events, would add garbage collection to the load generator's costs.
// Everything is on loopback, in temporary folders, and ends with the lab.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-openai/test/devenv"
)

const nullName = "vault-plugin-secrets-null"

// revokers is the number of workers that renew and revoke leases, in measurements
// and in the cleanup.
const revokers = 32

type lab struct {
	settings settings
	book     *book
	out      io.Writer // progress
	dir      string
	vaultBin string
	simBin   string
	engine   devenv.Plugin
	null     devenv.Plugin

	version   string   // Vault's
	functions []string // the output of the Go benchmarks

	memory  *server // the in-memory server that most sections share
	sim     *simulator
	servers []*server
	sims    []*simulator

	others, lasted time.Duration // CPU time of other processes during measurements, and their duration
}

// open builds the programs and starts the simulator. The caller must close the lab.
func open(ctx context.Context, s settings, out io.Writer) (_ *lab, err error) {
	l := &lab{settings: s, book: newBook(), out: out}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.vaultBin, err = devenv.FindVault(ctx); err != nil {
		return nil, err
	}
	if l.dir, err = os.MkdirTemp("", "vault-openai-bench-"); err != nil {
		return nil, err
	}
	l.say("building the engine, the null engine and the simulator")
	opts := devenv.BuildOptions{Release: true}
	if s.Profile {
		opts.Tags = []string{"bench"}
	}
	if l.engine, err = devenv.BuildPlugin(ctx, l.dir, opts); err != nil {
		return nil, err
	}
	if l.null, err = devenv.BuildPlugin(ctx, l.dir, devenv.BuildOptions{Name: nullName, Package: "./test/bench/null", Release: true}); err != nil {
		return nil, err
	}
	l.simBin = filepath.Join(l.dir, "openai-sim")
	if err := devenv.Build(ctx, l.simBin, "./cmd/openai-sim"); err != nil {
		return nil, err
	}
	l.sim, err = l.startSimulator(ctx)
	return l, err
}

// close stops all processes and removes all files.
func (l *lab) close() error {
	var errs []error
	for _, s := range l.servers {
		errs = append(errs, s.vault.Stop())
	}
	for _, s := range l.sims {
		s.Stop()
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	l.servers, l.sims = nil, nil
	return errors.Join(errs...)
}

// stop stops a server before the lab closes.
func (l *lab) stop(s *server) error {
	l.servers = slices.DeleteFunc(l.servers, func(other *server) bool { return other == s })
	return s.vault.Stop()
}

func (l *lab) say(format string, args ...any) {
	fmt.Fprintf(l.out, format+"\n", args...)
}

// simulator is an openai-sim with its control plane.
type simulator struct {
	*devenv.Simulator
	control string
	http    *http.Client
	extra   int // accounts without a lease
}

func (l *lab) startSimulator(ctx context.Context, flags ...string) (*simulator, error) {
	started, err := devenv.StartSimulator(ctx, l.simBin, "app", flags...)
	if err != nil {
		return nil, err
	}
	s := &simulator{Simulator: started, control: strings.TrimSuffix(started.URL, "/v1") + "/_sim/", http: &http.Client{Timeout: time.Minute}}
	if started.CACert != "" {
		s.http.Transport = trusting(started.CACert)
	}
	l.sims = append(l.sims, s)
	return s, nil
}

func (s *simulator) send(ctx context.Context, method, path string, body, answer any) error {
	var payload io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		payload = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.control+path, payload)
	if err != nil {
		return err
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("the simulator's %s answered %d: %s", path, resp.StatusCode, content)
	}
	if err == nil && answer != nil {
		err = json.Unmarshal(content, answer)
	}
	return err
}

// set changes options of the simulator.
func (s *simulator) set(ctx context.Context, options map[string]any) error {
	return s.send(ctx, http.MethodPost, "options", options, nil)
}

func (s *simulator) latency(ctx context.Context, d time.Duration) error {
	return s.set(ctx, map[string]any{"latency": d.String()})
}

// crowd creates accounts without leases in a project.
func (s *simulator) crowd(ctx context.Context, project string, n int) error {
	s.extra += n
	return s.send(ctx, http.MethodPost, "accounts", map[string]any{"project_id": project, "count": n}, nil)
}

// stats are the simulator's counters.
type stats struct {
	Connections int `json:"connections"`
	Accounts    int `json:"accounts"`
	Calls       []struct {
		Method string `json:"method"`
		Route  string `json:"route"`
		Status int    `json:"status"`
		Count  int    `json:"count"`
	} `json:"calls"`
}

func (s *simulator) stats(ctx context.Context) (st stats, err error) {
	err = s.send(ctx, http.MethodGet, "stats", nil, &st)
	st.Accounts -= s.extra
	return st, err
}

// forget clears the log of requests, since stats iterates over all of it.
func (s *simulator) forget(ctx context.Context) error {
	return s.send(ctx, http.MethodDelete, "requests", nil, nil)
}

// admin counts the Admin API calls with a method, or all if it is empty.
func (st stats) admin(method string) (all, refused int) {
	for _, c := range st.Calls {
		if strings.HasPrefix(c.Route, "/organization/") && (method == "" || c.Method == method) {
			all += c.Count
			if c.Status == http.StatusTooManyRequests {
				refused += c.Count
			}
		}
	}
	return all, refused
}

// server is a Vault server with both plugins in its catalog.
type server struct {
	lab   *lab
	vault *devenv.Vault
	*caller
}

// startServer starts a Vault server with a storage type.
func (l *lab) startServer(ctx context.Context, storage string, env ...string) (*server, error) {
	vault, err := devenv.Start(ctx, devenv.Options{
		VaultBin: l.vaultBin,
		Storage:  storage,
		LogLevel: "warn",
		Env:      env,
		// Vault counts the storage operations; keep the counts longer than any run.
		Config: `telemetry {
  prometheus_retention_time = "24h"
  disable_hostname          = true
}
`,
	})
	if err != nil {
		return nil, err
	}
	l.version = vault.Version
	s := &server{lab: l, vault: vault}
	l.servers = append(l.servers, s)
	if s.caller, err = newCaller(vault.Addr, vault.RootToken); err != nil {
		return nil, err
	}
	for _, p := range []devenv.Plugin{l.engine, l.null} {
		if err := vault.Register(ctx, p); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// memoryServer is the server with in-memory storage that most sections share.
func (l *lab) memoryServer(ctx context.Context) (_ *server, err error) {
	if l.memory == nil {
		l.memory, err = l.startServer(ctx, "inmem")
	}
	return l.memory, err
}

// mount is an engine at a path of a server.
type mount struct {
	*server
	path   string
	whose  engineKind
	plugin int        // process ID
	sim    *simulator // configured as the API; the null engine does not call it
}

// pair is both engines at new paths of a server, the engine with the role "app"
// that most sections use.
type pair struct{ null, engine *mount }

func (p pair) each() []*mount { return []*mount{p.null, p.engine} }

func (s *server) pair(ctx context.Context, suffix string, sim *simulator) (p pair, err error) {
	if p.null, err = s.mount(ctx, "null-"+suffix, floor, sim); err != nil {
		return p, err
	}
	if p.engine, err = s.mount(ctx, "openai-"+suffix, engine, sim); err != nil {
		return p, err
	}
	if err = p.engine.configure(ctx); err != nil {
		return p, err
	}
	return p, p.engine.role(ctx, "app", sim.Projects[0].ID, 0)
}

func (s *server) mount(ctx context.Context, path string, whose engineKind, sim *simulator) (*mount, error) {
	m := &mount{server: s, path: path, whose: whose, sim: sim}
	plugin := s.lab.null
	if whose == engine {
		plugin = s.lab.engine
	}
	if err := s.vault.Client().Sys().MountWithContext(ctx, path, &api.MountInput{Type: plugin.Name}); err != nil {
		return nil, fmt.Errorf("enabling %s: %w", plugin.Name, err)
	}
	var err error
	m.plugin, err = pluginPID(ctx, s.vault, plugin)
	return m, err
}

// configure writes the engine's config, with all defaults.
func (m *mount) configure(ctx context.Context) error {
	return m.write(ctx, "config", map[string]any{"admin_api_key": m.sim.AdminKey, "api_endpoint": m.sim.URL, "ca_cert": m.sim.CACert})
}

// role writes a role with all defaults except activation_timeout.
func (m *mount) role(ctx context.Context, name, project string, activation time.Duration) error {
	return m.write(ctx, "roles/"+name, roleFields(project, activation))
}

func roleFields(project string, activation time.Duration) map[string]any {
	return map[string]any{"project_id": project, "activation_timeout": activation.String()}
}

func (m *mount) write(ctx context.Context, path string, data map[string]any) error {
	body, err := json.Marshal(data)
	if err != nil {
		return err
	}
	_, err = m.do(ctx, http.MethodPost, m.path+"/"+path, string(body))
	return err
}

// issue is a load that issues credentials of the role "app".
func (m *mount) issue(workers, count int) load { return m.issueOf(workers, count, "app") }

func (m *mount) issueOf(workers, count int, role string) load {
	r := request{method: http.MethodGet, path: m.path + "/creds/" + role}
	return load{workers: workers, count: count, leases: true, request: func(int) request { return r }}
}

// renew and revoke are loads on leases.
func renew(ids []string) load {
	return load{workers: revokers, count: len(ids), request: func(i int) request {
		return request{http.MethodPut, "sys/leases/renew", `{"lease_id":"` + ids[i] + `"}`}
	}}
}

func revoke(ids []string) load {
	return load{workers: revokers, count: len(ids), request: func(i int) request {
		return request{http.MethodPut, "sys/leases/revoke", `{"lease_id":"` + ids[i] + `","sync":true}`}
	}}
}

// revokeAndCheck revokes leases and checks how many accounts are left.
func (m *mount) revokeAndCheck(ctx context.Context, ids []string, alive int) (outcome, error) {
	if err := m.sim.latency(ctx, 0); err != nil {
		return outcome{}, err
	}
	o, err := m.run(ctx, revoke(ids))
	if err != nil {
		return o, err
	}
	st, err := m.sim.stats(ctx)
	if err == nil && st.Accounts != alive {
		err = fmt.Errorf("%d accounts are left after all leases of %s were revoked; want %d", st.Accounts, m.path, alive)
	}
	return o, errors.Join(err, m.sim.forget(ctx))
}
