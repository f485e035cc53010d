// Package metrics owns the metrics of one mount: their names, the counters, and the
// transport to a statsd server.
//
// What must stay true:
//   - each mount has its own set: one process serves many mounts, and the global
//     instance of go-metrics would mix them (in a plugin, it has no receiver either);
//   - label values come from a short list or are role names, of which only the first
//     get their own label; never a secret, an ID, or text from outside;
//   - counting neither calls Vault nor fails; gauges are read with the metrics.
package metrics

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	gometrics "github.com/hashicorp/go-metrics"
	"github.com/hashicorp/go-metrics/datadog"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// OtherRoles is the label of roles beyond the limit.
	OtherRoles = "_other"
	// DefaultMaxRoles is the number of roles with their own label.
	DefaultMaxRoles = 100
)

// The values of the label outcome, for a request, a call, or a rotation.
const (
	OK        = "ok"
	Refused   = "refused"   // status 400: a client error, or a rejection by OpenAI
	Throttled = "throttled" // not sent in time because of OpenAI's rate limit
	Cancelled = "cancelled" // the client disconnected
	Failed    = "error"
)

// Outcomes lists the outcomes, "ok" first.
var Outcomes = []string{OK, Refused, Throttled, Cancelled, Failed}

// durationBuckets, in seconds, range from a fast call to the longest request.
var durationBuckets = []float64{0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60}

// Meters holds the metrics of one mount. Began, Ended, Throttled, and Repeated
// implement client.Observer. The engine sets or counts the exported fields;
// docs/metrics.md documents each metric.
type Meters struct {
	All []*Metric // in the order of the documentation

	issued, Renewed, Revoked, issueTime, activation         *Metric
	staticReads, staticRotations, staticRevoked             *Metric
	StaticRoles, StaticLag, StaticFailing, StaticSuperseded *Metric
	staticMissing, StaticsMissing                           *Metric
	requests, requestTime, waitTime, retries, throttles     *Metric
	InFlight                                                *Metric
	WALEntries, WALAge, WALRetained, walProcessed           *Metric
	rotations, LastRotation, NextRotation, RotationFailing  *Metric
	KeyExpiry, SupersededKeys, RetainedKeys                 *Metric
	PoolReady, poolTaken, poolMissed, poolDestroyed         *Metric
	RoleBlocked                                             *Metric
	tidyRuns, tidyDeleted, tidyFailed, TidyOrphans          *Metric
	TidyPending, LastTidy                                   *Metric
	RoleCost, UsageUnattributed, UsageTotal, LastUsage      *Metric
	Build                                                   *Metric

	inFlight atomic.Int64

	roleNames, staticNames *roleNames
	push                   *pusher // nil unless the environment configures it
}

// Flying returns the number of calls in flight.
func (m *Meters) Flying() int64 { return m.inFlight.Load() }

// New returns the metrics of a mount. tidyEnds lists the final states of a tidy run.
func New(tidyEnds ...string) *Meters {
	m := &Meters{roleNames: newRoleNames(DefaultMaxRoles), staticNames: newRoleNames(DefaultMaxRoles)}

	m.issued = m.counter("credentials_issued_total", "Credential requests.", "role", "outcome")
	m.Renewed = m.counter("credentials_renewed_total", "Lease renewals.", "role", "outcome")
	m.Revoked = m.counter("credentials_revoked_total", "Lease revocations.", "role", "outcome")
	m.issueTime = m.histogram("credential_issue_duration_seconds", "Duration of credential requests, including both waits below.", "outcome")
	m.activation = m.histogram("key_activation_seconds", "Time until OpenAI accepted a new key.", "outcome")

	m.PoolReady = m.gauge("pool_ready", "Keys in the pool of a role on this node.", "role")
	m.poolTaken = m.counter("pool_taken_total", "Credential requests served from the pool.", "role")
	m.poolMissed = m.counter("pool_missed_total", "Credential requests not served from the pool of their role: it was empty (empty), its keys were for another version of the role or config (fingerprint), or expire too early (too_short).", "role", "reason")
	m.poolDestroyed = m.counter("pool_destroyed_total", "Keys removed from a pool without being returned: too old (aged), for another version of the role or config (changed), the request failed (not_returned), left by an earlier process (lost), the role is blocked by its spend_limit (blocked), or the mount is being disabled (disabled).", "reason")

	m.RoleBlocked = m.gauge("role_blocked", "1 while spend_limit blocks a role on this node; absent otherwise. Static roles begin with static-roles/.", "role")

	m.staticReads = m.counter("static_credentials_read_total", "Reads of static role credentials.", "static_role", "outcome")
	m.staticRotations = m.counter("static_rotations_total", "Rotations of static roles, including the first key.", "static_role", "outcome")
	m.staticRevoked = m.counter("static_keys_revoked_total", "Deletions of superseded keys of static roles.", "static_role", "outcome")
	m.StaticRoles = m.gauge("static_roles", "Static roles that this node rotates.")
	m.StaticLag = m.gauge("static_role_lag_seconds", "Lag of the most overdue static role; 0 if none is overdue.")
	m.StaticFailing = m.gauge("static_roles_failing", "Static roles whose last automatic rotation failed.")
	m.StaticSuperseded = m.gauge("static_keys_superseded", "Superseded keys of static roles retained because they are still used.")
	m.staticMissing = m.counter("static_missing_total", "Keys of static roles that others deleted at OpenAI, alone (missing=api_key) or with their account (missing=service_account).", "static_role", "missing")
	m.StaticsMissing = m.gauge("static_roles_missing", "Static roles whose key others deleted at OpenAI.")

	m.requests = m.counter("api_requests_total", "HTTP requests to OpenAI, by status class: 2xx to 5xx, or none without a readable response.", "call", "status")
	m.requestTime = m.histogram("api_request_duration_seconds", "Duration of each HTTP request.", "call")
	m.waitTime = m.histogram("api_wait_seconds", "Wait for the rate limiter and max_concurrent_requests.", "call")
	m.retries = m.counter("api_retries_total", "Retries of calls.", "call")
	m.throttles = m.counter("api_throttled_total", "Calls that OpenAI rejected with a 429 (by=openai), or that the engine did not send because the wait was too long (by=limiter).", "call", "by")
	m.InFlight = m.gauge("api_requests_in_flight", "Calls in progress.")

	m.WALEntries = m.gauge("wal_entries", "Pending deletions at OpenAI, and creates in progress.")
	m.WALAge = m.gauge("wal_oldest_entry_age_seconds", "Age of the oldest WAL entry; 0 if there is none.")
	m.WALRetained = m.gauge("wal_entries_retained", "WAL entries retained because another Vault may hold the lease; not included in wal_entries.")
	m.walProcessed = m.counter("wal_entries_processed_total", "WAL entries processed: ok if the credential is deleted, error if the entry stays.", "outcome")

	m.rotations = m.counter("admin_key_rotations_total", "Rotations of the admin key.", "outcome")
	m.LastRotation = m.gauge("admin_key_last_rotation_timestamp_seconds", "Time of the last rotation of the admin key; absent for a key that was written to the config.")
	m.NextRotation = m.gauge("admin_key_next_rotation_timestamp_seconds", "Time of the next rotation of the admin key.")
	m.RotationFailing = m.gauge("admin_key_rotation_failing", "1 if the last automatic rotation failed, else 0.")
	m.KeyExpiry = m.gauge("admin_key_expiry_timestamp_seconds", "Expiry of the admin key at OpenAI; absent without one.")
	m.SupersededKeys = m.gauge("admin_keys_superseded", "Superseded admin keys that are not deleted yet.")
	m.RetainedKeys = m.gauge("admin_keys_retained", "Superseded admin keys retained because another Vault may use them.")

	m.tidyRuns = m.counter("tidy_runs_total", "Finished tidy runs.", "state", "apply")
	m.tidyDeleted = m.counter("tidy_deleted_total", "Orphans that tidy deleted.")
	m.tidyFailed = m.counter("tidy_failed_total", "Orphans that tidy failed to delete.")
	m.TidyOrphans = m.gauge("tidy_orphans", "Orphans that the last tidy run found.")
	m.TidyPending = m.gauge("tidy_pending_orphans", "Orphaned accounts without a key that the last tidy run left.")
	m.LastTidy = m.gauge("tidy_last_end_timestamp_seconds", "End of the last tidy run.")

	m.RoleCost = m.gauge("role_cost_usd", "Costs in US dollars of the keys of a role, or of a static role as static-roles/<name>, by window in UTC days: the present day (day), the seven days before it (previous_7_days), and the month to date (month). As of the last refresh (usage_interval).", "role", "window")
	m.UsageUnattributed = m.gauge("usage_unattributed_usd", "Costs in US dollars of the mount's projects that belong to no recorded key, by window.", "window")
	m.UsageTotal = m.gauge("usage_total_usd", "Costs in US dollars of the mount's projects, by window.", "window")
	m.LastUsage = m.gauge("usage_last_success_timestamp_seconds", "Time of the last successful refresh of the costs; 0 if none has succeeded in this process, absent without usage_interval.")

	m.Build = m.gauge("build_info", "Always 1.", "version", "go_version")

	// A rate needs an initial 0, so the known label values start with it.
	for _, outcome := range Outcomes {
		m.rotations.Counter.WithLabelValues(outcome)
	}
	for _, c := range []*Metric{m.tidyDeleted, m.tidyFailed} {
		c.Counter.WithLabelValues()
	}
	for _, state := range tidyEnds {
		m.tidyRuns.Counter.WithLabelValues(state, "true")
		m.tidyRuns.Counter.WithLabelValues(state, "false")
	}
	for _, reason := range []string{PoolAged, PoolChanged, PoolNotReturned, PoolLost, PoolBlocked, PoolDisabled} {
		m.poolDestroyed.Counter.WithLabelValues(reason)
	}
	for _, reason := range []string{PoolAged, PoolChanged, PoolNotReturned, PoolLost, PoolBlocked, PoolDisabled} {
		m.poolDestroyed.Counter.WithLabelValues(reason)
	}
	for _, outcome := range []string{OK, Failed} {
		m.walProcessed.Counter.WithLabelValues(outcome)
	}
	return m
}

func (m *Meters) define(kind, name, help string, labels []string) *Metric {
	d := &Metric{Name: Prefix + name, Kind: kind, Help: help, Labels: labels}
	m.All = append(m.All, d)
	return d
}

func (m *Meters) counter(name, help string, labels ...string) *Metric {
	d := m.define("counter", name, help, labels)
	d.Counter = prometheus.NewCounterVec(prometheus.CounterOpts{Name: d.Name, Help: help}, labels)
	return d
}

func (m *Meters) histogram(name, help string, labels ...string) *Metric {
	d := m.define("histogram", name, help, labels)
	d.Histogram = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: d.Name, Help: help, Buckets: durationBuckets}, labels)
	return d
}

func (m *Meters) gauge(name, help string, labels ...string) *Metric {
	d := m.define("gauge", name, help, labels)
	d.Desc = prometheus.NewDesc(d.Name, help, labels, nil)
	return d
}

// add adds n to a counter.
func (m *Meters) add(d *Metric, n int, labels ...string) {
	d.Counter.WithLabelValues(labels...).Add(float64(n))
	m.push.add(d, n, labels)
}

// time records a duration.
func (m *Meters) time(d *Metric, took time.Duration, labels ...string) {
	d.Histogram.WithLabelValues(labels...).Observe(took.Seconds())
	m.push.time(d, took, labels)
}

// Issued counts and times a credential request for an existing role.
func (m *Meters) Issued(role, outcome string, took time.Duration) {
	m.add(m.issued, 1, m.roleNames.label(role), outcome)
	m.time(m.issueTime, took, outcome)
}

// The values of the label reason of pool_missed_total.
const (
	PoolEmpty       = "empty"
	PoolFingerprint = "fingerprint"
	PoolTooShort    = "too_short"
)

// The values of the label reason of pool_destroyed_total.
const (
	PoolAged        = "aged"
	PoolChanged     = "changed"
	PoolNotReturned = "not_returned"
	PoolLost        = "lost"
	PoolBlocked     = "blocked"
	PoolDisabled    = "disabled"
)

// PoolTaken counts a request served from the pool.
func (m *Meters) PoolTaken(role string) { m.add(m.poolTaken, 1, m.roleNames.label(role)) }

// PoolMissed counts a request not served from the pool of its role.
func (m *Meters) PoolMissed(role, reason string) {
	m.add(m.poolMissed, 1, m.roleNames.label(role), reason)
}

// PoolDestroyed counts keys removed from a pool without being returned.
func (m *Meters) PoolDestroyed(reason string, n int) { m.add(m.poolDestroyed, n, reason) }

// ByRole sums the values of roles by label.
func ByRole[N int | float64](m *Meters, values map[string]N) map[string]N {
	sums := map[string]N{}
	for _, role := range slices.Sorted(maps.Keys(values)) {
		sums[m.roleNames.label(role)] += values[role]
	}
	return sums
}

// Lease counts a renewal or revocation; d is Renewed or Revoked.
func (m *Meters) Lease(d *Metric, role, outcome string) {
	m.add(d, 1, m.roleNames.label(role), outcome)
}

// Activated times the activation of a new key.
func (m *Meters) Activated(took time.Duration, outcome string) { m.time(m.activation, took, outcome) }

// StaticRead counts a read of a static role's credentials.
func (m *Meters) StaticRead(name string) { m.add(m.staticReads, 1, m.staticNames.label(name), OK) }

// StaticRotated counts a rotation of a static role.
func (m *Meters) StaticRotated(name, outcome string) {
	m.add(m.staticRotations, 1, m.staticNames.label(name), outcome)
}

// StaticKeyRevoked counts a deletion of a static role's superseded key.
func (m *Meters) StaticKeyRevoked(name, outcome string) {
	m.add(m.staticRevoked, 1, m.staticNames.label(name), outcome)
}

// StaticMissing counts a static role's key that was deleted at OpenAI, alone or with its
// account.
func (m *Meters) StaticMissing(name, what string) {
	m.add(m.staticMissing, 1, m.staticNames.label(name), what)
}

// Rotated counts a rotation of the admin key.
func (m *Meters) Rotated(outcome string) { m.add(m.rotations, 1, outcome) }

// WALProcessed counts a processed WAL entry.
func (m *Meters) WALProcessed(err error) {
	outcome := OK
	if err != nil {
		outcome = Failed
	}
	m.add(m.walProcessed, 1, outcome)
}

// Tidied counts a finished tidy run.
func (m *Meters) Tidied(state string, apply bool, deleted, failed int) {
	m.add(m.tidyRuns, 1, state, strconv.FormatBool(apply))
	m.add(m.tidyDeleted, deleted)
	m.add(m.tidyFailed, failed)
}

// Began implements client.Observer.
func (m *Meters) Began(call string, waited time.Duration) {
	m.inFlight.Add(1)
	m.time(m.waitTime, waited, call)
}

// Ended implements client.Observer.
func (m *Meters) Ended(call string, status int, took time.Duration) {
	m.inFlight.Add(-1)
	class := "none"
	if status != 0 {
		class = strconv.Itoa(status/100) + "xx"
	}
	m.add(m.requests, 1, call, class)
	m.time(m.requestTime, took, call)
}

// Throttled implements client.Observer.
func (m *Meters) Throttled(call string, heldBack bool) {
	by := "openai"
	if heldBack {
		by = "limiter"
	}
	m.add(m.throttles, 1, call, by)
}

// Repeated implements client.Observer.
func (m *Meters) Repeated(call string) { m.add(m.retries, 1, call) }

// roleNames bounds the number of series: the first roles in this process get their own
// label, and all others share one.
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
		return OtherRoles
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.seen[name] && len(r.seen) >= r.limit {
		return OtherRoles
	}
	r.seen[name] = true
	return name
}

// Configure applies the environment. It skips invalid settings and returns them as an
// error, which must not stop the engine.
func (m *Meters) Configure(getenv func(string) string) error {
	var problems []error
	if text := getenv(EnvMaxRoles); text != "" {
		limit, err := strconv.Atoi(text)
		if err != nil || limit < 0 {
			problems = append(problems, fmt.Errorf("%s must be an integer of 0 or more", EnvMaxRoles))
		} else {
			m.roleNames, m.staticNames = newRoleNames(limit), newRoleNames(limit)
		}
	}
	push := &pusher{}
	for _, name := range []string{EnvStatsd, EnvDogstatsd} {
		addr := getenv(name)
		if addr == "" {
			continue
		}
		_, _, err := net.SplitHostPort(addr) // the sinks do not check it
		var s sink
		if err == nil && name == EnvStatsd {
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

// The environment variables, which vault plugin register -env=... sets: with a setting
// of the mount, write access to the config would be enough to send packets to any host.
const (
	EnvStatsd    = "VAULT_OPENAI_METRICS_STATSD_ADDR"    // host:port
	EnvDogstatsd = "VAULT_OPENAI_METRICS_DOGSTATSD_ADDR" // host:port
	EnvMaxRoles  = "VAULT_OPENAI_METRICS_MAX_ROLES"
)

// Prefix is the prefix of all names; Vault's own metrics begin with vault_.
const Prefix = "vault_openai_"

// Metric is one of the documented metrics of one mount.
type Metric struct {
	Name   string // with the prefix
	Kind   string // counter, gauge or histogram
	Help   string
	Labels []string

	// One of the three, by kind. A gauge has only its description, since its value is
	// read with the metrics.
	Counter   *prometheus.CounterVec
	Histogram *prometheus.HistogramVec
	Desc      *prometheus.Desc
}
