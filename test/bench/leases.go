package main

// Lease renewal and revocation, also with a rate limit of the API below Vault's
// rate, and reads of static roles.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// prefix revokes all leases of a mount's role with one request.
func (m *mount) prefix(ctx context.Context, sync bool) error {
	_, err := m.do(ctx, http.MethodPut, "sys/leases/revoke-prefix/"+m.path+"/creds/app", fmt.Sprintf(`{"sync":%t}`, sync))
	return err
}

// leased returns the number of the role's leases in Vault.
func (m *mount) leased(ctx context.Context) (int, error) {
	answer, err := m.do(ctx, "LIST", "sys/leases/lookup/"+m.path+"/creds/app", "")
	var status *statusError
	if errors.As(err, &status) && status.status == http.StatusNotFound {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	// Not decoded, to save CPU time during the measurement.
	_, keys, _ := bytes.Cut(answer, []byte(`"keys":[`))
	keys, _, _ = bytes.Cut(keys, []byte("]"))
	return bytes.Count(keys, []byte(`"`)) / 2, nil
}

// waitUntilNoLeases waits until the role has no leases and the API no accounts.
func (m *mount) waitUntilNoLeases(ctx context.Context) error {
	const within = time.Minute
	for deadline := time.Now().Add(within); ; {
		asked := time.Now()
		left, err := m.leased(ctx)
		if err != nil {
			return err
		}
		// Listing many leases affects the measurement, so wait longer after a slow list.
		again := max(20*time.Millisecond, 10*time.Since(asked))
		st, err := m.sim.stats(ctx)
		if err != nil {
			return err
		}
		if left == 0 && st.Accounts == 0 {
			return m.sim.forget(ctx)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d leases of %s and %d accounts are left after %s", left, m.path, st.Accounts, within)
		}
		if err := pause(ctx, again); err != nil {
			return err
		}
	}
}

// leases renews and revokes 2,000 leases at a time, in each way that Vault has.
func leases(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "leases", l.sim)
	if err != nil {
		return err
	}
	for _, m := range p.each() {
		if err := m.warmUp(ctx, 32, l.settings.size(500, 50)); err != nil {
			return err
		}
	}
	n := l.settings.size(2000, 100)
	for range l.settings.Repetitions {
		for _, m := range p.each() {
			if err := renewAndRevoke(ctx, m, n); err != nil {
				return err
			}
		}
		for _, m := range p.each() {
			if err := revokePrefix(ctx, m, n); err != nil {
				return err
			}
		}
	}
	return nil
}

func renewAndRevoke(ctx context.Context, m *mount, n int) error {
	note := func(id, title, unit string, value float64) {
		m.lab.book.note("leases/"+id, title, unit, m.whose, value)
	}
	issued, err := m.run(ctx, m.issue(32, n))
	if err != nil {
		return err
	}
	r, err := m.measure(ctx, renew(issued.leaseID))
	if err != nil {
		return err
	}
	note("renew", fmt.Sprintf("renew, %d leases, c=%d", n, revokers), "/s", r.rate())
	note("renew/p50", "renew, p50", "ms", r.percentile(50))
	note("renew/admin_calls", "Admin calls per renewal", "", r.callsEach())
	note("renew/cpu/plugin", "CPU per renewal, plugin", "ms", r.cpuEach(r.plugin))

	r, err = m.measure(ctx, revoke(issued.leaseID))
	if err != nil {
		return err
	}
	note("revoke/each", fmt.Sprintf("revoke, %d leases one by one, c=%d", n, revokers), "/s", r.rate())
	note("revoke/p50", "revoke, p50", "ms", r.percentile(50))
	note("revoke/admin_calls", "Admin calls per revocation", "", r.callsEach())
	note("revoke/cpu/plugin", "CPU per revocation, plugin", "ms", r.cpuEach(r.plugin))
	note("revoke/cpu/vault", "CPU per revocation, Vault", "ms", r.cpuEach(r.vault))
	return m.waitUntilNoLeases(ctx)
}

func revokePrefix(ctx context.Context, m *mount, n int) error {
	for _, way := range []struct {
		id, title string
		sync      bool
	}{{"sync", "one after the other", true}, {"async", "by Vault's own workers", false}} {
		if _, err := m.run(ctx, m.issue(32, n)); err != nil {
			return err
		}
		began := time.Now()
		err := m.prefix(ctx, way.sync)
		if err == nil {
			err = m.waitUntilNoLeases(ctx)
		}
		if err != nil {
			return err
		}
		m.lab.book.note("leases/revoke/"+way.id, fmt.Sprintf("revoke, %d leases by prefix, %s", n, way.title), "/s", m.whose, float64(n)/time.Since(began).Seconds())
	}
	return nil
}

// limit revokes 2,000 leases while the API allows 50 calls a second. It runs once,
// since it mostly waits for that limit.
func limit(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	// On a separate mount, since the engine remembers the rate limit that it learned.
	p, err := s.pair(ctx, "limit", l.sim)
	if err != nil {
		return err
	}
	m, n := p.engine, l.settings.size(2000, 50)
	const perSecond = 50
	issued, err := m.run(ctx, m.issue(32, n))
	if err != nil {
		return err
	}
	if err := m.sim.set(ctx, map[string]any{"rate_per_minute": 60 * perSecond}); err != nil {
		return err
	}
	renewed, err := m.measure(ctx, renew(issued.leaseID))
	if err != nil {
		return err
	}
	l.book.note("limit/renew", fmt.Sprintf("renew, %d leases, c=%d, API 50 calls/s", n, revokers), "/s", engine, renewed.rate())
	if err := m.sim.forget(ctx); err != nil {
		return err
	}
	began := time.Now()
	if err := m.prefix(ctx, false); err != nil {
		return err
	}
	var st stats
	for {
		if st, err = m.sim.stats(ctx); err != nil {
			return err
		}
		if st.Accounts == 0 {
			break
		}
		if time.Since(began) > 5*time.Minute {
			return fmt.Errorf("%d accounts are left after 5 minutes at %d calls a second", st.Accounts, perSecond)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	took := time.Since(began).Seconds()
	calls, refused := st.admin(http.MethodDelete)
	l.book.note("limit/seconds", fmt.Sprintf("revoke, %d leases by prefix, API 50 calls/s, until nothing is alive", n), "s", engine, took)
	l.book.note("limit/share", "  part of what 50 calls/s allow", "", engine, float64(n)/perSecond/took)
	l.book.note("limit/calls", "  calls per deletion", "", engine, float64(calls)/float64(n))
	l.book.note("limit/refused", "  of which refused (429)", "", engine, float64(refused)/float64(n))
	if err := m.sim.set(ctx, map[string]any{"rate_per_minute": 0}); err != nil {
		return err
	}
	return m.waitUntilNoLeases(ctx)
}

// static reads the active key of a static role.
func static(ctx context.Context, l *lab) error {
	s, err := l.memoryServer(ctx)
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "static", l.sim)
	if err != nil {
		return err
	}
	if err := p.engine.write(ctx, "static-roles/app", map[string]any{"project_id": l.sim.Projects[0].ID, "rotation_period": "24h"}); err != nil {
		return err
	}
	for range l.settings.Repetitions {
		for _, m := range p.each() {
			r := request{method: http.MethodGet, path: m.path + "/static-creds/app"}
			read := func(workers, count int) load {
				return load{workers: workers, count: count, request: func(int) request { return r }}
			}
			if _, err := m.run(ctx, read(32, l.settings.size(500, 50))); err != nil {
				return err
			}
			many, err := m.measure(ctx, read(32, l.settings.size(5000, 200)))
			if err != nil {
				return err
			}
			l.book.note("static/rate", "static role reads, c=32", "/s", m.whose, many.rate())
			l.book.note("static/cpu/plugin", "CPU per read, plugin", "ms", m.whose, many.cpuEach(many.plugin))
			l.book.note("static/storage", "storage operations per read", "", m.whose, many.storageEach())
			one, err := m.run(ctx, read(1, l.settings.size(500, 20)))
			if err != nil {
				return err
			}
			l.book.note("static/p50", "static role read, c=1, p50", "ms", m.whose, one.percentile(50))
		}
	}
	_, err = p.engine.do(ctx, http.MethodDelete, p.engine.path+"/static-roles/app", "")
	if err != nil {
		return err
	}
	return p.engine.waitUntilNoLeases(ctx)
}
