package main

// The cost of issuing a credential: in time, at each concurrency and latency of
// the API, and in calls, storage operations, CPU time, memory and connections.

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// The latencies of the API. The null engine does not call it, so it is measured
// only without latency.
const (
	noLatency  = time.Duration(0)
	apiLatency = 100 * time.Millisecond
)

// stage is a number of clients, and how many credentials they request: enough for
// a second or two, and several for each client even with a slow API.
type stage struct {
	workers   int
	rounds    int // in which the engines alternate
	near, far int // credentials without and with latency; near is for each round
}

func (l *lab) stages() []stage {
	s := l.settings
	return []stage{
		{1, s.size(3, 1), s.size(100, 20), s.size(20, 3)},
		{32, s.size(4, 1), s.size(500, 100), s.size(640, 64)},
		{256, s.size(2, 1), s.size(1000, 300), s.size(5120, 300)},
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
		// Also with the most clients, so that their connections are open.
		for _, at := range l.stages()[1:] {
			if err := m.warmUp(ctx, at.workers, at.near); err != nil {
				return err
			}
		}
	}
	for range l.settings.Repetitions {
		for _, at := range l.stages() {
			near, err := p.near(ctx, "issue", at)
			if err != nil {
				return err
			}
			away, err := measureWithLatency(ctx, p.engine, at)
			if err != nil {
				return err
			}
			if at.workers == 256 {
				l.book.note("issue/rss/c256", "plugin RSS, c=256", "MiB", floor, near[0].peak)
				l.book.note("issue/rss/c256", "plugin RSS, c=256", "MiB", engine, max(near[1].peak, away.peak))
			}
		}
		if err := issueProbed(ctx, p.engine, l.stages()); err != nil {
			return err
		}
	}
	return issuePooled(ctx, l, s)
}

// warmUp opens connections and lets the heaps grow to their usual size.
func (m *mount) warmUp(ctx context.Context, workers, count int) error {
	o, err := m.run(ctx, m.issue(workers, count))
	if err != nil {
		return err
	}
	_, err = m.revokeAndCheck(ctx, o.leaseID, 0)
	return err
}

// times records the throughput and the latencies of a load.
func (m *mount) times(id, title string, r measured) {
	note := func(what, name, unit string, value float64) {
		m.lab.book.note(id+"/"+what, title+", "+name, unit, m.whose, value)
	}
	note("rate", "throughput", "/s", r.rate())
	note("p50", "p50", "ms", r.percentile(50))
	note("p95", "p95", "ms", r.percentile(95))
	note("p99", "p99", "ms", r.percentile(99))
}

// near measures both engines alternately, without latency, and revokes the
// leases. It returns the result of the null engine, then that of the engine.
func (p pair) near(ctx context.Context, section string, at stage) ([]measured, error) {
	turns := []turn{{p.null, p.null.issue(at.workers, at.near)}, {p.engine, p.engine.issue(at.workers, at.near)}}
	all, err := takeTurns(ctx, at.rounds, turns)
	if err != nil {
		return nil, err
	}
	for i, m := range p.each() {
		m.times(fmt.Sprintf("%s/c%d/0ms", section, at.workers), fmt.Sprintf("%s, c=%d, API 0 ms", title(section), at.workers), all[i])
		if at.workers == 32 {
			m.costs(section, all[i])
		}
	}
	for i, m := range p.each() {
		// Only the engine's leases have accounts, and the null engine is cleared first.
		alive := 0
		if m.whose == floor {
			alive = all[1].count
		}
		if _, err := m.revokeAndCheck(ctx, all[i].leaseID, alive); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// title is the prefix of a section's titles.
func title(section string) string {
	if section == "raft" {
		return "raft: issue"
	}
	return "issue"
}

// costs records the cost of a credential other than time.
func (m *mount) costs(section string, r measured) {
	note := func(id, title, unit string, value float64) {
		m.lab.book.note(section+"/"+id, title, unit, m.whose, value)
	}
	note("admin_calls", "Admin calls per credential", "", r.callsEach())
	note("storage/all", "storage operations per credential", "", r.storageEach())
	for _, kind := range kinds {
		note("storage/"+kind, "  of which "+kind, "", r.storageEach(kind))
	}
	note("cpu/plugin", "CPU per credential, plugin", "ms", r.cpuEach(r.plugin))
	note("cpu/vault", "CPU per credential, Vault", "ms", r.cpuEach(r.vault))
	note("cpu/simulator", "CPU per credential, simulator", "ms", r.cpuEach(r.sim))
	note("cpu/load", "CPU per credential, load generator", "ms", r.cpuEach(r.self))
}

// timed measures one load of credential requests and revokes the leases.
func (m *mount) timed(ctx context.Context, id, title string, load load) (measured, error) {
	r, err := m.measure(ctx, load)
	if err != nil {
		return r, err
	}
	m.times(id, title, r)
	_, err = m.revokeAndCheck(ctx, r.leaseID, 0)
	return r, err
}

func measureWithLatency(ctx context.Context, m *mount, at stage) (measured, error) {
	if err := m.sim.latency(ctx, apiLatency); err != nil {
		return measured{}, err
	}
	return m.timed(ctx, fmt.Sprintf("issue/c%d/100ms", at.workers), fmt.Sprintf("issue, c=%d, API 100 ms", at.workers), m.issue(at.workers, at.far))
}

// issueProbed measures with the wait for the key's activation: one call to the
// inference API if the key works immediately.
func issueProbed(ctx context.Context, m *mount, stages []stage) error {
	_, err := m.timed(ctx, "issue/c32/0ms/probed", "issue, c=32, API 0 ms, activation wait", m.issueOf(32, 2*stages[1].near, "probed"))
	if err == nil {
		err = m.sim.latency(ctx, apiLatency)
	}
	if err == nil {
		_, err = m.timed(ctx, "issue/c1/100ms/probed", "issue, c=1, API 100 ms, activation wait", m.issueOf(1, stages[0].far/2+1, "probed"))
	}
	return err
}

// raft measures on a server with raft storage, whose writes wait for the disk.
func raft(ctx context.Context, l *lab) error {
	s, err := l.startServer(ctx, "raft")
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "raft", l.sim)
	if err != nil {
		return err
	}
	size := l.settings.size
	for _, m := range p.each() {
		if err := m.warmUp(ctx, 32, size(500, 50)); err != nil {
			return err
		}
	}
	for range l.settings.Repetitions {
		for _, at := range []stage{{workers: 1, rounds: 2, near: size(50, 5)}, {workers: 32, rounds: 2, near: size(500, 64)}, {workers: 256, rounds: 1, near: size(1000, 256)}} {
			if _, err := p.near(ctx, "raft", at); err != nil {
				return err
			}
		}
	}
	return l.stop(s)
}

// connections counts the connections to the API that 2,000 credential requests
// open on a newly configured mount.
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
					float64(r.connections))
				l.book.note("connections/"+way.id+"/rate", "issue, c=32, API 0 ms, from the first on, "+way.title, "/s", m.whose, r.rate())
				if _, err := m.revokeAndCheck(ctx, r.leaseID, 0); err != nil {
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

// disable disables a mount, which must have no leases.
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
