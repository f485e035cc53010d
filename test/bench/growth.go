package main

// What a credential costs with many leases, many roles, and many accounts in the
// project, against few.
//
// What must stay true: few and many are measured in turns. For leases and roles
// that takes a server for each number, all running at once, since filling one
// between two measurements would set them half a minute apart; for accounts it
// takes two roles of one mount.

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// grown is both engines on a server, each with so many leases; the engine has as
// many roles.
type grown struct {
	pair
	n int
}

func growth(ctx context.Context, l *lab) error {
	sizes := []int{10, l.settings.size(1000, 100), l.settings.size(10000, 300)}
	// A simulator for all sizes, so that each finds it equally full.
	sim, err := l.startSimulator(ctx)
	if err != nil {
		return err
	}
	var all []grown
	for _, n := range sizes {
		g, err := fill(ctx, l, sim, n)
		if err != nil {
			return err
		}
		all = append(all, g)
	}
	batch := l.settings.size(800, 60)
	for range l.settings.Repetitions {
		few := map[which]map[string]float64{}
		for _, g := range all {
			for _, m := range g.each() {
				now, err := g.costs(ctx, m, batch)
				if err != nil {
					return err
				}
				if few[m.whose] == nil {
					few[m.whose] = now
				}
				for _, c := range growing {
					l.book.note(fmt.Sprintf("growth/%d/%s", g.n, c.id), fmt.Sprintf("%s, %d leases and roles", c.title, g.n), c.unit, m.whose, now[c.id])
					if g.n != sizes[0] {
						l.book.note(fmt.Sprintf("growth/%d/%s/against", g.n, c.id), fmt.Sprintf("  against %d", sizes[0]), "×", m.whose, against(now[c.id], few[m.whose][c.id]))
					}
				}
			}
		}
	}
	for _, g := range all {
		if err := l.stop(g.null.server); err != nil {
			return err
		}
	}
	return nil
}

// growing is what is measured at each size.
var growing = []struct{ id, title, unit string }{
	{"issue", "wall time per credential, c=32", "ms"},
	{"cpu/plugin", "CPU per credential, plugin", "ms"},
	{"cpu/vault", "CPU per credential, Vault", "ms"},
	{"storage", "storage operations per credential", ""},
	{"revoke", "wall time per revocation, c=32", "ms"},
}

// against is a figure by that of few. A processor time can be too short for its
// clock, and then nothing can be said.
func against(now, few float64) float64 {
	if few == 0 {
		return 1
	}
	return now / few
}

// fill starts a server and makes the leases and roles.
func fill(ctx context.Context, l *lab, sim *simulator, n int) (g grown, err error) {
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

// issue is a load that goes round all roles.
func (g grown) issue(m *mount, count int) load {
	return load{workers: 32, count: count, leases: true, request: func(i int) request {
		return request{method: http.MethodGet, path: fmt.Sprintf("%s/creds/app-%d", m.path, i%g.n)}
	}}
}

// costs issues a batch and revokes it, so that the next one finds the same.
func (g grown) costs(ctx context.Context, m *mount, batch int) (map[string]float64, error) {
	before, err := m.sim.stats(ctx)
	if err != nil {
		return nil, err
	}
	r, err := m.measure(ctx, g.issue(m, batch))
	if err != nil {
		return nil, err
	}
	revoked, err := m.clear(ctx, r.leaseID, before.Accounts)
	if err != nil {
		return nil, err
	}
	storage := 0.0
	for _, kind := range kinds {
		storage += r.storageEach(kind)
	}
	return map[string]float64{
		"issue":      r.each(),
		"cpu/plugin": r.cpuEach(func(u usage) time.Duration { return u.plugin }),
		"cpu/vault":  r.cpuEach(func(u usage) time.Duration { return u.vault }),
		"storage":    storage,
		"revoke":     revoked.each(),
	}, nil
}

// crowd issues in a project with 5,000 accounts, and in one with none, in turns.
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
	if err := p.engine.warmUp(ctx); err != nil {
		return err
	}
	title := fmt.Sprintf("wall time per credential, c=32, %d accounts in the project", accounts)
	for range l.settings.Repetitions {
		few := 0.0
		for _, role := range []string{"app", "crowded"} {
			r, err := p.engine.measure(ctx, p.engine.issueOf(32, l.settings.size(1000, 60), role))
			if err != nil {
				return err
			}
			if _, err := p.engine.clear(ctx, r.leaseID, 0); err != nil {
				return err
			}
			if role == "app" {
				few = r.each()
				continue
			}
			l.book.note("crowd/issue", title, "ms", engine, r.each())
			l.book.note("crowd/issue/against", "  against none", "×", engine, against(r.each(), few))
			l.book.note("crowd/admin_calls", "  Admin calls per credential", "", engine, r.callsEach())
		}
	}
	return nil
}
