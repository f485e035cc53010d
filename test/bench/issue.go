package main

// What it takes to issue a credential: in time, at each concurrency and latency
// of the API, and in calls, storage, processor time, memory and connections.

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// The latencies of the API. The null engine has no API, so its figures are those
// without one.
const (
	near = time.Duration(0)
	far  = 100 * time.Millisecond
)

// stage is a number of clients, and how many credentials they ask for: enough
// for a second or two, each client many in turn where the API is far.
type stage struct{ workers, near, far int }

func (l *lab) stages() []stage {
	s := l.settings
	return []stage{
		{1, s.size(300, 20), s.size(20, 3)},
		{32, s.size(2000, 100), s.size(640, 64)},
		{256, s.size(2000, 300), s.size(5120, 300)},
	}
}

func issue(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "issue", l.sim)
	if err != nil {
		return err
	}
	if err := p.engine.role(ctx, "probed", l.sim.Projects[0].ID, 10*time.Second); err != nil {
		return err
	}
	if err := pause(ctx, time.Second); err != nil {
		return err
	}
	for _, m := range p.each() {
		idle, err := rss(m.plugin)
		if err != nil {
			return err
		}
		l.book.note("issue/rss/idle", "plugin RSS, idle", "MiB", m.whose, idle)
		if err := m.warmUp(ctx); err != nil {
			return err
		}
	}
	for range l.settings.Repetitions {
		for _, at := range l.stages() {
			peak := map[which]float64{}
			for _, m := range p.each() {
				stop := peakRSS(ctx, m.plugin)
				err := issueNear(ctx, m, at)
				if err == nil && m.whose == engine {
					err = issueFar(ctx, m, at)
				}
				peak[m.whose] = stop()
				if err != nil {
					return err
				}
				if at.workers == 256 {
					l.book.note("issue/rss/c256", "plugin RSS, c=256", "MiB", m.whose, peak[m.whose])
				}
			}
		}
		if err := issueProbed(ctx, p.engine, l.stages()); err != nil {
			return err
		}
	}
	return nil
}

// warmUp opens connections and lets the runtimes find their sizes.
func (m *mount) warmUp(ctx context.Context) error {
	o, err := m.run(ctx, m.issue(32, m.lab.settings.size(500, 50)))
	if err != nil {
		return err
	}
	_, err = m.clear(ctx, o.leaseID, 0)
	return err
}

// timed measures a load of issues, takes down its times, and clears up.
func (m *mount) timed(ctx context.Context, id, title string, load load) (measured, error) {
	r, err := m.measure(ctx, load)
	if err != nil {
		return r, err
	}
	note := func(what, name, unit string, value float64) {
		m.lab.book.note(id+"/"+what, title+", "+name, unit, m.whose, value)
	}
	note("rate", "throughput", "/s", r.rate())
	note("p50", "p50", "ms", r.percentile(50))
	note("p95", "p95", "ms", r.percentile(95))
	note("p99", "p99", "ms", r.percentile(99))
	_, err = m.clear(ctx, r.leaseID, 0)
	return r, err
}

func issueNear(ctx context.Context, m *mount, at stage) error {
	r, err := m.timed(ctx, fmt.Sprintf("issue/c%d/0ms", at.workers), fmt.Sprintf("issue, c=%d, API 0 ms", at.workers), m.issue(at.workers, at.near))
	if err == nil && at.workers == 32 {
		m.costs("issue", r)
	}
	return err
}

// costs takes down what a credential costs besides time.
func (m *mount) costs(section string, r measured) {
	note := func(id, title, unit string, value float64) {
		m.lab.book.note(section+"/"+id, title, unit, m.whose, value)
	}
	note("admin_calls", "Admin calls per credential", "", r.callsEach())
	all := 0.0
	for _, kind := range kinds {
		all += r.storageEach(kind)
	}
	note("storage/all", "storage operations per credential", "", all)
	for _, kind := range kinds {
		note("storage/"+kind, "  of which "+kind, "", r.storageEach(kind))
	}
	note("cpu/plugin", "CPU per credential, plugin", "ms", r.cpuEach(func(u usage) time.Duration { return u.plugin }))
	note("cpu/vault", "CPU per credential, Vault", "ms", r.cpuEach(func(u usage) time.Duration { return u.vault }))
	note("cpu/simulator", "CPU per credential, simulator", "ms", r.cpuEach(func(u usage) time.Duration { return u.sim }))
	note("cpu/load", "CPU per credential, load generator", "ms", r.cpuEach(func(u usage) time.Duration { return u.self }))
}

func issueFar(ctx context.Context, m *mount, at stage) error {
	if err := m.sim.latency(ctx, far); err != nil {
		return err
	}
	_, err := m.timed(ctx, fmt.Sprintf("issue/c%d/100ms", at.workers), fmt.Sprintf("issue, c=%d, API 100 ms", at.workers), m.issue(at.workers, at.far))
	return err
}

// issueProbed is with the wait for the key's activation, which takes one call of
// the inference side where the key works at once.
func issueProbed(ctx context.Context, m *mount, stages []stage) error {
	_, err := m.timed(ctx, "issue/c32/0ms/probed", "issue, c=32, API 0 ms, activation wait", m.issueOf(32, stages[1].near/2, "probed"))
	if err == nil {
		err = m.sim.latency(ctx, far)
	}
	if err == nil {
		_, err = m.timed(ctx, "issue/c1/100ms/probed", "issue, c=1, API 100 ms, activation wait", m.issueOf(1, stages[0].far/2+1, "probed"))
	}
	return err
}

// raft is the issue on a server with raft, whose writes wait for a disk.
func raft(ctx context.Context, l *lab) error {
	s, err := l.startServer(ctx, "raft")
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "raft", l.sim)
	if err != nil {
		return err
	}
	for _, m := range p.each() {
		if err := m.warmUp(ctx); err != nil {
			return err
		}
	}
	for range l.settings.Repetitions {
		for _, at := range []stage{{workers: 1, near: l.settings.size(100, 10)}, {workers: 32, near: l.settings.size(1000, 64)}, {workers: 256, near: l.settings.size(1000, 256)}} {
			for _, m := range p.each() {
				r, err := m.timed(ctx, fmt.Sprintf("raft/c%d/0ms", at.workers), fmt.Sprintf("raft: issue, c=%d, API 0 ms", at.workers), m.issue(at.workers, at.near))
				if err != nil {
					return err
				}
				if at.workers == 32 {
					m.costs("raft", r)
				}
			}
		}
	}
	return l.stop(s)
}

// connections counts what 2,000 issues open at the API, from a mount that has
// just been configured.
func connections(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	secure, err := l.startSimulator(ctx, "-tls")
	if err != nil {
		return err
	}
	for range l.settings.Repetitions {
		for _, way := range []struct {
			id, title string
			sim       *simulator
		}{{"http1", "HTTP/1.1", l.sim}, {"http2", "HTTP/2", secure}} {
			p, err := s.pair(ctx, way.id, way.sim)
			if err != nil {
				return err
			}
			n := l.settings.size(2000, 100)
			for _, m := range p.each() {
				r, err := m.measure(ctx, m.issue(32, n))
				if err != nil {
					return err
				}
				l.book.note("connections/"+way.id, fmt.Sprintf("connections for %d issues, c=32, %s", n, way.title), "", m.whose,
					float64(r.after.stats.Connections-r.before.stats.Connections))
				l.book.note("connections/"+way.id+"/rate", "issue, c=32, API 0 ms, from the first on, "+way.title, "/s", m.whose, r.rate())
				if _, err := m.clear(ctx, r.leaseID, 0); err != nil {
					return err
				}
				if err := m.disable(ctx); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// disable ends a mount, which must have no lease left.
func (m *mount) disable(ctx context.Context) error {
	left, err := m.leased(ctx)
	if err == nil && left > 0 {
		err = fmt.Errorf("%d leases of %s are left", left, m.path)
	}
	if err != nil {
		return err
	}
	_, err = m.do(ctx, http.MethodDelete, "sys/mounts/"+m.path, "")
	return err
}
