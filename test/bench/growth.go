package main

// The cost of a credential with many leases, many roles, and many accounts in the
// project, compared with few.
//
// What must stay true: measurements of few and many alternate. For leases and
// roles, each number has its own server, all running at once, since filling one
// between two measurements would separate them by half a minute; for accounts,
// two roles of one mount suffice.

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
)

// loadedServer is both engines on a server, each with n leases; the OpenAI engine also
// has n roles.
type loadedServer struct {
	pair
	n     int
	level string // the name of n in the figures' IDs
}

func growth(ctx context.Context, l *lab) error {
	sizes := []int{10, l.settings.size(1000, 100), l.settings.size(10000, 300)}
	// One simulator for all sizes, so that all measure it with the same data.
	sim, err := l.startSimulator(ctx)
	if err != nil {
		return err
	}
	var all []loadedServer
	for i, n := range sizes {
		g, err := fill(ctx, l, sim, n)
		if err != nil {
			return err
		}
		g.level = []string{"few", "more", "many"}[i]
		all = append(all, g)
	}
	var turns []turn
	for _, g := range all {
		for _, m := range g.each() {
			turns = append(turns, turn{m, g.issue(m, l.settings.size(300, 60))})
		}
	}
	for range l.settings.Repetitions {
		if err := growthOnce(ctx, l, all, turns); err != nil {
			return err
		}
	}
	for _, g := range all {
		if err := l.stop(g.null.server); err != nil {
			return err
		}
	}
	return nil
}

func growthOnce(ctx context.Context, l *lab, all []loadedServer, turns []turn) error {
	results, err := takeTurns(ctx, l.settings.size(4, 1), turns)
	if err != nil {
		return err
	}
	st, err := turns[0].sim.stats(ctx)
	if err != nil {
		return err
	}
	few := map[engineKind]map[string]float64{}
	for i, t := range turns {
		r, g := results[i], all[i/2]
		if t.whose == engine {
			st.Accounts -= r.count
		}
		revoked, err := t.revokeAndCheck(ctx, r.leaseID, st.Accounts)
		if err != nil {
			return err
		}
		now := map[string]float64{
			"issue": r.each(), "cpu/plugin": r.cpuEach(r.plugin), "cpu/vault": r.cpuEach(r.vault), "storage": r.storageEach(), "revoke": revoked.each(),
		}
		if i < 2 {
			few[t.whose] = now
		}
		for _, c := range growing {
			id := "growth/" + g.level + "/" + c.id
			l.book.note(id, fmt.Sprintf("%s, %d leases and roles", c.title, g.n), c.unit, t.whose, now[c.id])
			if i >= 2 {
				l.book.note(id+"/against", fmt.Sprintf("%s, %d leases and roles against %d", c.title, g.n, all[0].n), "×", t.whose, relativeTo(now[c.id], few[t.whose][c.id]))
			}
		}
	}
	return nil
}

// growing lists the figures of each size.
var growing = []struct{ id, title, unit string }{
	{"issue", "wall time per credential, c=32", "ms"},
	{"cpu/plugin", "CPU per credential, plugin", "ms"},
	{"cpu/vault", "CPU per credential, Vault", "ms"},
	{"storage", "storage operations per credential", ""},
	{"revoke", "wall time per revocation, c=32", "ms"},
}

// relativeTo is a figure divided by the one with few. A CPU time can be too short
// for its clock, which measures 0; the result is then 1.
func relativeTo(now, few float64) float64 {
	if few == 0 {
		return 1
	}
	return now / few
}

// fill starts a server and creates the leases and roles.
func fill(ctx context.Context, l *lab, sim *simulator, n int) (g loadedServer, err error) {
	s, err := l.startServer(ctx, "inmem")
	if err != nil {
		return g, err
	}
	g.n = n
	if g.pair, err = s.pair(ctx, "grown", sim); err != nil {
		return g, err
	}
	body, err := json.Marshal(roleFields(sim.Projects[0].ID, 0))
	if err != nil {
		return g, err
	}
	_, err = s.run(ctx, load{workers: 32, count: n, request: func(i int) request {
		return request{http.MethodPost, fmt.Sprintf("%s/roles/app-%d", g.engine.path, i), string(body)}
	}})
	if err != nil {
		return g, err
	}
	for _, m := range g.each() {
		if _, err := m.run(ctx, g.issue(m, n)); err != nil {
			return g, err
		}
	}
	return g, sim.forget(ctx)
}

// issue is a load that cycles through all roles.
func (g loadedServer) issue(m *mount, count int) load {
	return load{workers: 32, count: count, leases: true, request: func(i int) request {
		return request{method: http.MethodGet, path: fmt.Sprintf("%s/creds/app-%d", m.path, i%g.n)}
	}}
}

// crowd alternately issues in a project with 5,000 accounts and in an empty one.
func crowd(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	sim, err := l.startSimulator(ctx, "-project", "crowded")
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "crowd", sim)
	if err != nil {
		return err
	}
	accounts := l.settings.size(5000, 200)
	if err := sim.crowd(ctx, sim.Projects[1].ID, accounts); err != nil {
		return err
	}
	if err := p.engine.role(ctx, "crowded", sim.Projects[1].ID, 0); err != nil {
		return err
	}
	if err := p.engine.warmUp(ctx, 32, l.settings.size(500, 50)); err != nil {
		return err
	}
	m := p.engine
	turns := []turn{{m, m.issueOf(32, l.settings.size(300, 60), "app")}, {m, m.issueOf(32, l.settings.size(300, 60), "crowded")}}
	for range l.settings.Repetitions {
		r, err := takeTurns(ctx, l.settings.size(4, 1), turns)
		if err != nil {
			return err
		}
		if _, err := m.revokeAndCheck(ctx, slices.Concat(r[0].leaseID, r[1].leaseID), 0); err != nil {
			return err
		}
		title := fmt.Sprintf("wall time per credential, c=32, %d accounts in the project", accounts)
		l.book.note("crowd/issue", title, "ms", engine, r[1].each())
		l.book.note("crowd/issue/against", title+" against none", "×", engine, relativeTo(r[1].each(), r[0].each()))
		l.book.note("crowd/admin_calls", "Admin calls per credential there", "", engine, r[1].callsEach())
	}
	return nil
}
