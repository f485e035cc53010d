package openaisecrets

// This file owns what is counted and timed, and how little may be said of it.
//
// What must stay true:
//   - each mount counts for itself, in a set of metrics of its own: one process
//     serves many mounts, and go-metrics' global instance would mix them (in a
//     plugin it reaches nobody anyway);
//   - the values of a label come from a short list, or they are names of roles,
//     of which only the first maxRoles are told apart; never a secret, an ID or
//     a text from outside;
//   - counting neither calls Vault nor fails: what must be read is read when
//     somebody asks for the metrics (path_metrics.go).

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	gometrics "github.com/hashicorp/go-metrics"
	"github.com/hashicorp/go-metrics/datadog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus"

	"vault-plugin-secrets-openai/client"
)

const (
	// otherRoles is the label of roles beyond the limit.
	otherRoles      = "_other"
	defaultMaxRoles = 100
)

// How a request, a call or a rotation ends, for the label outcome.
const (
	outcomeOK        = "ok"
	outcomeRefused   = "refused"   // an answer with status 400: the caller's mistake, or OpenAI's no
	outcomeThrottled = "throttled" // OpenAI's rate limit did not let it through in time
	outcomeCancelled = "cancelled" // its client went away
	outcomeError     = "error"
)

// outcomes lists them, "ok" first.
var outcomes = []string{outcomeOK, outcomeRefused, outcomeThrottled, outcomeCancelled, outcomeError}

// durationBuckets, in seconds, reach from a call on a fast line to the longest
// that a request may take.
var durationBuckets = []float64{0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60}

// meters are the metrics of one mount. Its methods with exported names are
// those of client.Observer.
type meters struct {
	all []*metric // in the order of the documentation

	issued, renewed, revoked, issueTime, activation        *metric
	staticReads, staticRotations, staticRevoked            *metric
	staticRoles, staticLag, staticFailing, staticKept      *metric
	requests, requestTime, waitTime, retries, throttles    *metric
	inFlight                                               *metric
	journalEntries, journalAge, journalKept, journalWorked *metric
	rotations, lastRotation, nextRotation, rotationFailed  *metric
	keyExpiry, retiredKeys, keptKeys                       *metric
	sweeps, sweepDeleted, sweepFailed, sweepOrphans        *metric
	sweepWaiting, lastSweep                                *metric
	build                                                  *metric

	flying atomic.Int64 // calls in flight

	roles, static *roleNames
	push          *pusher // nil unless asked for by the environment
}

// newMeters takes the states in which a sweep can end.
func newMeters(sweepEnds ...string) *meters {
	m := &meters{roles: newRoleNames(defaultMaxRoles), static: newRoleNames(defaultMaxRoles)}

	m.issued = m.counter("credentials_issued_total", "Leased credentials asked for, by what came of it.", "role", "outcome")
	m.renewed = m.counter("credentials_renewed_total", "Renewals of leases.", "role", "outcome")
	m.revoked = m.counter("credentials_revoked_total", "Revocations of leases. One that fails is journalled, and Vault tries it again.", "role", "outcome")
	m.issueTime = m.histogram("credential_issue_duration_seconds", "How long the issue of a credential took, waiting for OpenAI's limits and the new key's activation included.", "outcome")
	m.activation = m.histogram("key_activation_seconds", "How long it took until OpenAI accepted a new key, or until waiting for that was given up (error).", "outcome")

	m.staticReads = m.counter("static_credentials_read_total", "Reads of static roles' credentials.", "static_role", "outcome")
	m.staticRotations = m.counter("static_rotations_total", "Rotations of static roles, the making of their first key included.", "static_role", "outcome")
	m.staticRevoked = m.counter("static_keys_revoked_total", "Deletions of static roles' replaced keys.", "static_role", "outcome")
	m.staticRoles = m.gauge("static_roles", "Static roles that this node keeps.")
	m.staticLag = m.gauge("static_role_lag_seconds", "How late the most overdue static role is, with its rotation or with the deletion of a replaced key; 0 = none is late.")
	m.staticFailing = m.gauge("static_roles_failing", "Static roles whose last rotation on schedule failed or whose entry could not be read, as far as this process knows.")
	m.staticKept = m.gauge("static_keys_kept", "Replaced keys of static roles that are kept beyond revocation_delay since they are still used, perhaps by another Vault.")

	m.requests = m.counter("api_requests_total", "Calls to OpenAI, each attempt for itself, by status class: 2xx to 5xx, or none without an answer that can be read.", "call", "status")
	m.requestTime = m.histogram("api_request_duration_seconds", "How long an attempt took, once it was sent.", "call")
	m.waitTime = m.histogram("api_wait_seconds", "How long an attempt waited until it fitted OpenAI's limit and max_concurrent_requests.", "call")
	m.retries = m.counter("api_retries_total", "Calls tried again; a create is tried again under another name.", "call")
	m.throttles = m.counter("api_throttled_total", "Calls that OpenAI answered with 429 for their rate (by=openai), or that were not sent since their turn was too far off (by=pace).", "call", "by")
	m.inFlight = m.gauge("api_requests_in_flight", "Calls under way.")

	m.journalEntries = m.gauge("journal_entries", "Entries that the last pass over the journal left: what must still be deleted at OpenAI, and creates under way.")
	m.journalAge = m.gauge("journal_oldest_entry_age_seconds", "Age of the oldest of them; 0 = none.")
	m.journalKept = m.gauge("journal_entries_kept", "Entries not executed because the key has been used since its create: another Vault with a copy of this storage may hold its lease. Not among journal_entries.")
	m.journalWorked = m.counter("journal_entries_worked_total", "Journal entries acted upon: ok = what it named is gone, error = it stays for the next pass.", "outcome")

	m.rotations = m.counter("admin_key_rotations_total", "Rotations of the admin key, whoever asked for them.", "outcome")
	m.lastRotation = m.gauge("admin_key_last_rotation_timestamp_seconds", "When the engine last rotated the admin key; absent for a key that was written by hand.")
	m.nextRotation = m.gauge("admin_key_next_rotation_timestamp_seconds", "When the admin key is to be rotated next; absent without a plan.")
	m.rotationFailed = m.gauge("admin_key_rotation_failing", "1 if the last rotation on schedule failed, else 0.")
	m.keyExpiry = m.gauge("admin_key_expiry_timestamp_seconds", "When the admin key expires at OpenAI; absent when it has no end.")
	m.retiredKeys = m.gauge("admin_keys_retired", "Replaced admin keys that are not deleted yet.")
	m.keptKeys = m.gauge("admin_keys_kept", "Of those, the ones that are kept beyond their grace period because another Vault uses them, or may.")

	m.sweeps = m.counter("sweeps_total", "Sweeps ended, by state, and whether they were to delete or only to look.", "state", "apply")
	m.sweepDeleted = m.counter("sweep_deleted_total", "Orphans that sweeps have deleted.")
	m.sweepFailed = m.counter("sweep_failed_total", "Orphans that sweeps could not delete.")
	m.sweepOrphans = m.gauge("sweep_orphans", "Orphans that the last sweep has found; absent before the first in this process.")
	m.sweepWaiting = m.gauge("sweep_waiting", "Orphans without a key that the last sweep left, since it deletes only 20 of them unless it is forced to; absent before the first in this process.")
	m.lastSweep = m.gauge("sweep_last_end_timestamp_seconds", "When the last sweep ended; absent before the first in this process.")

	m.build = m.gauge("build_info", "Always 1.", "version", "go_version")

	// A rate needs a zero to rise from, so what can be foreseen starts there.
	for _, outcome := range outcomes {
		m.rotations.counter.WithLabelValues(outcome)
	}
	for _, c := range []*metric{m.sweepDeleted, m.sweepFailed} {
		c.counter.WithLabelValues()
	}
	for _, state := range sweepEnds {
		m.sweeps.counter.WithLabelValues(state, "true")
		m.sweeps.counter.WithLabelValues(state, "false")
	}
	for _, outcome := range []string{outcomeOK, outcomeError} {
		m.journalWorked.counter.WithLabelValues(outcome)
	}
	return m
}

func (m *meters) define(kind, name, help string, labels []string) *metric {
	d := &metric{name: metricPrefix + name, kind: kind, help: help, labels: labels}
	m.all = append(m.all, d)
	return d
}

func (m *meters) counter(name, help string, labels ...string) *metric {
	d := m.define("counter", name, help, labels)
	d.counter = prometheus.NewCounterVec(prometheus.CounterOpts{Name: d.name, Help: help}, labels)
	return d
}

func (m *meters) histogram(name, help string, labels ...string) *metric {
	d := m.define("histogram", name, help, labels)
	d.histogram = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: d.name, Help: help, Buckets: durationBuckets}, labels)
	return d
}

func (m *meters) gauge(name, help string, labels ...string) *metric {
	d := m.define("gauge", name, help, labels)
	d.desc = prometheus.NewDesc(d.name, help, labels, nil)
	return d
}

// add counts n more.
func (m *meters) add(d *metric, n int, labels ...string) {
	d.counter.WithLabelValues(labels...).Add(float64(n))
	m.push.add(d, n, labels)
}

// time takes note of a duration.
func (m *meters) time(d *metric, took time.Duration, labels ...string) {
	d.histogram.WithLabelValues(labels...).Observe(took.Seconds())
	m.push.time(d, took, labels)
}

// outcome puts the end of a request or a flow into one word.
func outcome(resp *logical.Response, err error) string {
	var coded logical.HTTPCodedError
	var theirs mistake
	switch {
	case err == nil && resp.IsError(), errors.As(err, &theirs):
		return outcomeRefused
	case err == nil:
		return outcomeOK
	case errors.Is(err, context.Canceled):
		return outcomeCancelled
	case errors.As(err, &coded) && coded.Code() == http.StatusTooManyRequests:
		return outcomeThrottled
	}
	switch e := client.AsError(err); {
	case e != nil && e.RateLimited():
		return outcomeThrottled
	case e != nil && e.Refused() && !e.Denied():
		return outcomeRefused
	}
	return outcomeError
}

// outcomeFor is outcome of a request: an error that is answered with a status no
// longer says that its client had gone, but the request's context does.
func outcomeFor(ctx context.Context, resp *logical.Response, err error) string {
	if o := outcome(resp, err); o == outcomeOK || !errors.Is(ctx.Err(), context.Canceled) {
		return o
	}
	return outcomeCancelled
}

// issue takes note of a request for a credential of a role that exists.
func (m *meters) issue(ctx context.Context, role string, began time.Time, resp *logical.Response, err error) {
	o := outcomeFor(ctx, resp, err)
	m.add(m.issued, 1, m.roles.label(role), o)
	m.time(m.issueTime, time.Since(began), o)
}

// countLeases wraps what Vault has done to a lease.
func (m *meters) countLeases(d *metric, handler framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
		role := ""
		if req.Secret != nil { // read before the handler, which may replace it
			role, _ = req.Secret.InternalData["role"].(string)
		}
		resp, err := handler(ctx, req, data)
		m.add(d, 1, m.roles.label(role), outcomeFor(ctx, resp, err))
		return resp, err
	}
}

// activated takes note of the wait for a new key, if there was one.
func (m *meters) activated(timeout time.Duration, began time.Time, err error) {
	if timeout != 0 {
		m.time(m.activation, time.Since(began), outcome(nil, err))
	}
}

// staticRead takes note of a read of a static role's credentials.
func (m *meters) staticRead(name string) { m.add(m.staticReads, 1, m.static.label(name), outcomeOK) }

// staticRotated takes note of a static role's rotation.
func (m *meters) staticRotated(name string, err error) {
	m.add(m.staticRotations, 1, m.static.label(name), outcome(nil, err))
}

// staticKeyRevoked takes note of the deletion of a static role's replaced key.
func (m *meters) staticKeyRevoked(name string, err error) {
	m.add(m.staticRevoked, 1, m.static.label(name), outcome(nil, err))
}

// rotated takes note of a rotation of the admin key.
func (m *meters) rotated(err error) { m.add(m.rotations, 1, outcome(nil, err)) }

// journalled takes note of a journal entry that was acted upon.
func (m *meters) journalled(err error) {
	o := outcomeOK
	if err != nil {
		o = outcomeError
	}
	m.add(m.journalWorked, 1, o)
}

// swept takes note of the end of a sweep.
func (m *meters) swept(state string, apply bool, deleted, failed int) {
	m.add(m.sweeps, 1, state, strconv.FormatBool(apply))
	m.add(m.sweepDeleted, deleted)
	m.add(m.sweepFailed, failed)
}

// Began implements client.Observer.
func (m *meters) Began(call string, waited time.Duration) {
	m.flying.Add(1)
	m.time(m.waitTime, waited, call)
}

// Ended implements client.Observer.
func (m *meters) Ended(call string, status int, took time.Duration) {
	m.flying.Add(-1)
	class := "none"
	if status != 0 {
		class = strconv.Itoa(status/100) + "xx"
	}
	m.add(m.requests, 1, call, class)
	m.time(m.requestTime, took, call)
}

// Throttled implements client.Observer.
func (m *meters) Throttled(call string, heldBack bool) {
	by := "openai"
	if heldBack {
		by = "pace"
	}
	m.add(m.throttles, 1, call, by)
}

// Repeated implements client.Observer.
func (m *meters) Repeated(call string) { m.add(m.retries, 1, call) }

// roleNames gives the first roles that are seen a label of their own, and all
// others one together: a thousand roles are no reason for a hundred thousand
// series. It lasts as long as the process.
type roleNames struct {
	mu    sync.RWMutex
	limit int
	seen  map[string]bool
}

func newRoleNames(limit int) *roleNames { return &roleNames{limit: limit, seen: map[string]bool{}} }

func (r *roleNames) label(name string) string {
	r.mu.RLock()
	known, full := r.seen[name], len(r.seen) >= r.limit
	r.mu.RUnlock()
	switch {
	case known:
		return name
	case full || name == "":
		return otherRoles
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.seen[name] && len(r.seen) >= r.limit {
		return otherRoles
	}
	r.seen[name] = true
	return name
}

// configure applies the environment. What makes no sense there is left out and
// returned: metrics are no reason to refuse service.
func (m *meters) configure(getenv func(string) string) error {
	var problems []error
	if text := getenv(envMaxRoles); text != "" {
		limit, err := strconv.Atoi(text)
		if err != nil || limit < 0 {
			problems = append(problems, fmt.Errorf("%s must be a number of roles, 0 or more", envMaxRoles))
		} else {
			m.roles, m.static = newRoleNames(limit), newRoleNames(limit)
		}
	}
	push := &pusher{}
	for _, name := range []string{envStatsd, envDogstatsd} {
		addr := getenv(name)
		if addr == "" {
			continue
		}
		_, _, err := net.SplitHostPort(addr) // the sinks say nothing of it
		var s sink
		if err == nil && name == envStatsd {
			s.flat = true
			s.sender, err = gometrics.NewStatsdSink(addr)
		} else if err == nil {
			s.sender, err = datadog.NewDogStatsdSink(addr, "")
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", name, err))
			continue
		}
		push.sinks = append(push.sinks, s)
	}
	if len(push.sinks) > 0 {
		m.push = push
	}
	return errors.Join(problems...)
}

// The settings are the process's environment, which is given with the plugin's
// registration (vault plugin register -env=...): a setting of the mount would
// let whoever may write its config send packets to any host.
const (
	envStatsd    = "VAULT_OPENAI_METRICS_STATSD_ADDR"    // host:port
	envDogstatsd = "VAULT_OPENAI_METRICS_DOGSTATSD_ADDR" // host:port
	envMaxRoles  = "VAULT_OPENAI_METRICS_MAX_ROLES"
)
