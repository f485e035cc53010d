package main

// What is measured: Vault servers with both engines mounted, and the simulator;
// how, is in measure.go.
//
// What must stay true: each piece is a process of its own, so that its processor
// time and memory can be read apart. That includes the simulator: inside this
// process its heap, which remembers all that ever happened, would be scanned
// with the load generator's, and what it costs could not be told from what the
// load costs. Everything is on loopback, in temporary folders, and ends with the
// lab.

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

// revokers is the number of workers that clear up, and that renew and revoke
// where that is measured.
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
	functions []string // what the Go benchmarks printed

	memory  *server // the in-memory server that most sections share
	sim     *simulator
	servers []*server
	sims    []*simulator

	others, lasted time.Duration // processor time of other processes while measuring, and how long that was
}

// open builds what is measured. The caller must close the lab.
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

// close ends all that runs and removes all that was written.
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

// stop ends a server before the lab does.
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
	extra   int // accounts that no lease made
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

// crowd puts accounts into a project that nobody's lease made.
func (s *simulator) crowd(ctx context.Context, project string, n int) error {
	s.extra += n
	return s.send(ctx, http.MethodPost, "accounts", map[string]any{"project_id": project, "count": n}, nil)
}

// stats are the simulator's numbers.
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

// forget empties the log of requests, which the simulator would otherwise count
// through each time.
func (s *simulator) forget(ctx context.Context) error {
	return s.send(ctx, http.MethodDelete, "requests", nil, nil)
}

// admin is the number of calls of the Admin API, of a method or of any.
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

// server is a Vault with both plugins in its catalog.
type server struct {
	lab   *lab
	vault *devenv.Vault
	*caller
}

// startServer starts a Vault with a storage.
func (l *lab) startServer(ctx context.Context, storage string, env ...string) (*server, error) {
	vault, err := devenv.Start(ctx, devenv.Options{
		VaultBin: l.vaultBin,
		Storage:  storage,
		LogLevel: "warn",
		Env:      env,
		// The operations on storage are counted by Vault, and kept for as long as
		// any run takes.
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
	whose  which
	plugin int        // process
	sim    *simulator // what it is configured for; the null engine calls nobody
}

// pair is both engines at fresh paths of a server, the engine with the role
// "app" that most sections use.
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

func (s *server) mount(ctx context.Context, path string, whose which, sim *simulator) (*mount, error) {
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

// configure writes the engine's config, with nothing in it that has a default.
func (m *mount) configure(ctx context.Context) error {
	return m.write(ctx, "config", map[string]any{"admin_api_key": m.sim.AdminKey, "api_endpoint": m.sim.URL, "ca_cert": m.sim.CACert})
}

// role writes a role with the defaults but for the wait for the key's activation.
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

// clear ends leases and checks that nothing of them is left.
func (m *mount) clear(ctx context.Context, ids []string, alive int) (outcome, error) {
	if err := m.sim.latency(ctx, 0); err != nil {
		return outcome{}, err
	}
	o, err := m.run(ctx, revoke(ids))
	if err != nil {
		return o, err
	}
	st, err := m.sim.stats(ctx)
	if err == nil && st.Accounts != alive {
		err = fmt.Errorf("%d accounts are alive after all leases of %s were revoked, not %d", st.Accounts, m.path, alive)
	}
	return o, errors.Join(err, m.sim.forget(ctx))
}
