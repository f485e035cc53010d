package main

// The effect of a pool: on the time of credential requests, and on a burst of readers
// while OpenAI allows few creates.
//
// What must stay true: a burst with a pool, one without, and the null engine's are
// measured in one run, each on its own mount, since the engine remembers the rate limit
// that it learned; a failed request in a burst is a figure, not an error.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"
)

// pool writes the role "app" with a pool and waits until the pool is full.
func (m *mount) pool(ctx context.Context, size int, activation time.Duration) error {
	fields := roleFields(m.sim.Projects[0].ID, activation)
	fields["pool_size"] = size
	if err := m.write(ctx, "roles/app", fields); err != nil {
		return err
	}
	return m.poolIs(ctx, "full", func(s poolState) bool { return s.Ready == size && !s.Refilling })
}

// poolState is the state of the pool in a read of the role.
type poolState struct {
	Ready     int    `json:"pool_ready"`
	Refilling bool   `json:"pool_refilling"`
	LastError string `json:"pool_last_error"`
}

func (m *mount) poolIs(ctx context.Context, what string, is func(poolState) bool) error {
	const within = 5 * time.Minute
	for deadline := time.Now().Add(within); ; {
		answer, err := m.do(ctx, http.MethodGet, m.path+"/roles/app", "")
		if err != nil {
			return err
		}
		var role struct {
			Data poolState `json:"data"`
		}
		if err := json.Unmarshal(answer, &role); err != nil {
			return err
		}
		if is(role.Data) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the pool of %s is not %s after %s: %+v", m.path, what, within, role.Data)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

const createRoute = "/organization/projects/{project_id}/service_accounts"

// pauseRefill makes the simulator reject a create, after which the engine creates nothing for a
// minute, so that no refill disturbs the measurement. It returns the lease of its request.
func (m *mount) pauseRefill(ctx context.Context) (leases []string, err error) {
	fault := map[string]any{"method": http.MethodPost, "route": createRoute, "kind": "status", "status": http.StatusBadRequest}
	if err := m.sim.send(ctx, http.MethodPost, "faults", fault, nil); err != nil {
		return nil, err
	}
	o, err := m.run(ctx, m.issue(1, 1))
	if err != nil {
		return nil, err
	}
	err = m.poolIs(ctx, "quiet", func(s poolState) bool { return s.LastError != "" && !s.Refilling })
	return o.leaseID, err
}

// issuePooled measures requests from a pool, alternating with the null engine.
func issuePooled(ctx context.Context, l *lab, s *server) error {
	sim, err := l.startSimulator(ctx)
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "pooled", sim)
	if err != nil {
		return err
	}
	size, repetitions := l.settings.size(100, 10), l.settings.Repetitions
	for range repetitions {
		for _, workers := range []int{1, 32} {
			if err := p.engine.pool(ctx, size, 0); err != nil {
				return err
			}
			ended, err := p.engine.pauseRefill(ctx)
			if err != nil {
				return err
			}
			n := size - 1
			all, err := takeTurns(ctx, 1, []turn{{p.null, p.null.issue(workers, n)}, {p.engine, p.engine.issue(workers, n)}})
			if err != nil {
				return err
			}
			for i, m := range p.each() {
				id, title := fmt.Sprintf("issue/pool/c%d", workers), fmt.Sprintf("issue from a pool, c=%d", workers)
				m.times(id, title, all[i])
				l.book.note(id+"/storage", title+", storage operations", "", m.whose, all[i].storageEach())
				l.book.note(id+"/calls", title+", Admin calls", "", m.whose, all[i].callsEach())
			}
			if err := sim.send(ctx, http.MethodDelete, "faults", nil, nil); err != nil {
				return err
			}
			if err := p.engine.revokeAndRemovePool(ctx, append(ended, all[1].leaseID...)); err != nil {
				return err
			}
			if _, err := p.null.run(ctx, revoke(all[0].leaseID)); err != nil {
				return err
			}
		}
	}
	return nil
}

// revokeAndRemovePool revokes the leases, removes the pool, and waits until no account is left.
func (m *mount) revokeAndRemovePool(ctx context.Context, leases []string) error {
	if err := m.sim.set(ctx, fast); err != nil {
		return err
	}
	if err := m.write(ctx, "roles/app", map[string]any{"pool_size": 0}); err != nil {
		return err
	}
	if _, err := m.run(ctx, revoke(leases)); err != nil {
		return err
	}
	return m.waitUntilNoLeases(ctx)
}

// slow has the simulator's options during a burst: ten creates a minute, and a delay until
// new keys work. fast has those while a pool is filled.
var (
	slow = map[string]any{"latency": apiLatency.String(), "rate_per_minute": 10, "activation_delay": "1500ms"}
	fast = map[string]any{"latency": "0s", "rate_per_minute": 0, "activation_delay": "0s"}
)

func burst(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	for _, id := range []int{20, 100} {
		n := l.settings.size(id, id/8)
		for _, pooled := range []bool{true, false} {
			if err := burstOf(ctx, l, s, id, n, pooled); err != nil {
				return err
			}
		}
	}
	return nil
}

// burstOf measures n readers at once and records them in the figures of id readers.
func burstOf(ctx context.Context, l *lab, s *server, id, n int, pooled bool) error {
	sim, err := l.startSimulator(ctx)
	if err != nil {
		return err
	}
	way, title := "none", fmt.Sprintf("burst of %d, no pool", n)
	if pooled {
		way, title = "pool", fmt.Sprintf("burst of %d, pool_size=%d", n, n)
	}
	p, err := s.pair(ctx, fmt.Sprintf("burst-%d-%s", n, way), sim)
	if err != nil {
		return err
	}
	m := p.engine
	size := 0
	if pooled {
		size = n
	}
	// The pool fills before OpenAI becomes slow.
	if err := m.pool(ctx, size, 10*time.Second); err != nil {
		return err
	}
	if err := sim.set(ctx, slow); err != nil {
		return err
	}
	if _, err := p.null.burst(ctx, n); err != nil { // opens connections
		return err
	}
	rounds := 1 // without a pool it takes a minute
	if pooled {
		rounds = l.settings.Repetitions
	}
	var leases []string
	for round := range rounds {
		for _, engine := range p.each() {
			b, err := engine.burst(ctx, n)
			if err != nil {
				return err
			}
			engine.bursts(id, way, title, b)
			if engine.whose == floor {
				_, err = engine.run(ctx, revoke(b.leaseID))
			} else {
				leases = append(leases, b.leaseID...)
			}
			if err != nil {
				return err
			}
		}
		if round+1 < rounds { // a full pool again, as fast as possible
			if err := m.refill(ctx, n); err != nil {
				return err
			}
		}
	}
	return m.revokeAndRemovePool(ctx, leases)
}

// refill fills the pool without the limits of the burst.
func (m *mount) refill(ctx context.Context, size int) error {
	if err := m.sim.set(ctx, fast); err != nil {
		return err
	}
	if err := m.pool(ctx, size, 10*time.Second); err != nil {
		return err
	}
	return m.sim.set(ctx, slow)
}

// bursts records the outcome of a burst.
func (m *mount) bursts(id int, way, title string, b outcome) {
	note := func(what, name, unit string, value float64) {
		m.lab.book.note(fmt.Sprintf("burst/%d/%s/%s", id, way, what), title+", "+name, unit, m.whose, value)
	}
	note("all", "until all have an answer", "ms", milliseconds(b.took))
	note("p50", "p50", "ms", b.percentile(50))
	note("p99", "p99", "ms", b.percentile(99))
	note("failed", "failures", "", float64(b.count-len(b.leaseID)))
}

// burst sends n reads at once. Failed reads have no lease ID.
func (m *mount) burst(ctx context.Context, n int) (o outcome, err error) {
	r := m.issue(1, 1).request(0)
	var mu sync.Mutex
	var group sync.WaitGroup
	ready := make(chan struct{})
	for range n {
		group.Go(func() {
			var buf bytes.Buffer
			<-ready
			sent := time.Now()
			failure := m.call(ctx, r, &buf)
			wait := time.Since(sent)
			mu.Lock()
			defer mu.Unlock()
			o.waits = append(o.waits, wait)
			if failure == nil {
				id, bad := leaseIn(buf.Bytes())
				if bad != nil {
					err = bad
				}
				o.leaseID = append(o.leaseID, id)
			}
		})
	}
	began := time.Now()
	close(ready)
	group.Wait()
	o.count, o.took = n, time.Since(began)
	slices.Sort(o.waits)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return o, err
}
