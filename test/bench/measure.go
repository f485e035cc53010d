package main

// Measures loads, from the resource usage before and after each, and alternates
// between them.
//
// What must stay true: loads that are compared alternate in one run.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// usage is the CPU time of each process since its start, Vault's storage
// operations, and the simulator's counters.
type usage struct {
	at                                  time.Time
	plugin, vault, sim, self, everybody time.Duration
	storage                             operations
	calls, connections                  int
}

// operations are Vault's counts of storage operations, by kind.
type operations map[string]float64

var kinds = []string{"get", "put", "delete", "list"}

func (m *mount) usage(ctx context.Context) (u usage, err error) {
	if u.storage, err = m.operations(ctx); err != nil {
		return u, err
	}
	st, err := m.sim.stats(ctx)
	if err != nil {
		return u, err
	}
	u.connections = st.Connections
	u.calls, _ = st.admin("")
	for pid, target := range map[int]*time.Duration{m.plugin: &u.plugin, m.vault.PID(): &u.vault, m.sim.PID(): &u.sim, os.Getpid(): &u.self} {
		if *target, err = cpuTime(pid); err != nil {
			return u, err
		}
	}
	u.everybody, err = machineTime()
	u.at = time.Now()
	return u, err
}

// operations reads Vault's own counters, which only grow.
func (s *server) operations(ctx context.Context) (operations, error) {
	text, err := s.do(ctx, http.MethodGet, "sys/metrics?format=prometheus", "")
	if err != nil {
		return nil, err
	}
	return barrier(text)
}

func barrier(text []byte) (operations, error) {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("reading the metrics of Vault: %w", err)
	}
	counts := operations{}
	for _, kind := range kinds {
		if f := families["vault_barrier_"+kind]; f != nil && len(f.GetMetric()) > 0 {
			counts[kind] = float64(f.GetMetric()[0].GetSummary().GetSampleCount())
		}
	}
	if counts["get"] == 0 {
		return nil, errors.New("the metrics of Vault have no operations on storage")
	}
	return counts, nil
}

// measured is the outcome and the cost of one or several loads of the same kind.
type measured struct {
	outcome
	plugin, vault, sim, self time.Duration // CPU time
	storage                  operations
	calls, connections       int
	peak                     float64 // of the plugin's memory, MiB
}

// measure runs a load and computes its cost from the usage before and after.
func (m *mount) measure(ctx context.Context, l load) (r measured, err error) {
	before, err := m.usage(ctx)
	if err != nil {
		return r, err
	}
	stop := peakRSS(ctx, m.plugin)
	r.outcome, err = m.run(ctx, l)
	r.peak = stop()
	if err != nil {
		return r, err
	}
	after, err := m.usage(ctx)
	if err != nil {
		return r, err
	}
	r.plugin, r.vault, r.sim, r.self = after.plugin-before.plugin, after.vault-before.vault, after.sim-before.sim, after.self-before.self
	r.calls, r.connections = after.calls-before.calls, after.connections-before.connections
	r.storage = operations{}
	for _, kind := range kinds {
		r.storage[kind] = after.storage[kind] - before.storage[kind]
	}
	used := r.plugin + r.vault + r.sim + r.self
	m.lab.others += max(0, after.everybody-before.everybody-used)
	m.lab.lasted += after.at.Sub(before.at)
	return r, nil
}

// add adds another load of the same kind.
func (r *measured) add(next measured) {
	r.count += next.count
	r.took += next.took
	r.waits = append(r.waits, next.waits...)
	slices.Sort(r.waits)
	r.leaseID = append(r.leaseID, next.leaseID...)
	r.plugin, r.vault, r.sim, r.self = r.plugin+next.plugin, r.vault+next.vault, r.sim+next.sim, r.self+next.self
	if r.storage == nil {
		r.storage = operations{}
	}
	for kind, n := range next.storage {
		r.storage[kind] += n
	}
	r.calls, r.connections = r.calls+next.calls, r.connections+next.connections
	r.peak = max(r.peak, next.peak)
}

// turn is one of several loads that alternate.
type turn struct {
	*mount
	load load // of each round
}

// takeTurns measures each load once in a round, so that a short disturbance of
// the machine affects all of them. Every other round is in reverse order, so that
// work left over from a load does not always slow the same next one.
func takeTurns(ctx context.Context, rounds int, turns []turn) ([]measured, error) {
	all := make([]measured, len(turns))
	for round := range rounds {
		order := slices.All(turns)
		if round%2 == 1 {
			order = slices.Backward(turns)
		}
		for i, t := range order {
			r, err := t.measure(ctx, t.load)
			if err != nil {
				return nil, err
			}
			all[i].add(r)
		}
	}
	return all, nil
}

// cpuEach is milliseconds of CPU time per request.
func (r measured) cpuEach(used time.Duration) float64 { return milliseconds(used) / float64(r.count) }

// storageEach is storage operations per request, of some kinds or of all.
func (r measured) storageEach(only ...string) float64 {
	if len(only) == 0 {
		only = kinds
	}
	sum := 0.0
	for _, kind := range only {
		sum += r.storage[kind]
	}
	return sum / float64(r.count)
}

// callsEach is Admin API calls per request.
func (r measured) callsEach() float64 { return float64(r.calls) / float64(r.count) }
