package broker

// This file owns what the broker records: the audit log and the metrics. A
// record holds names and numbers, never a query, a header or a body.

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// record is one line of the audit log.
type record struct {
	Time      string `json:"time"`
	Event     string `json:"event"` // start, end, or refused for a request that was not forwarded
	ID        string `json:"id"`    // joins start and end
	Agent     string `json:"agent,omitempty"`
	Method    string `json:"method"`
	Path      string `json:"path"`
	Model     string `json:"model,omitempty"`
	KeyID     string `json:"api_key_id,omitempty"`
	LeaseID   string `json:"lease_id,omitempty"`
	Status    int    `json:"status,omitempty"`
	RequestID string `json:"request_id,omitempty"` // OpenAI's
	BytesIn   int64  `json:"bytes_in,omitempty"`
	BytesOut  int64  `json:"bytes_out,omitempty"`
	Millis    int64  `json:"duration_ms,omitempty"`
	Outcome   string `json:"outcome,omitempty"`
}

// ledger writes whole lines in order, and counts. What could not be written
// stays pending, and no new request is accepted before it is written.
type ledger struct {
	writing sync.Mutex
	file    io.Writer // nil without an audit log
	pending []byte

	mu     sync.Mutex
	values map[string]float64 // by name and labels
}

func newLedger(path string) (*ledger, error) {
	l := &ledger{values: map[string]float64{}}
	l.set(1, "build_info{version=%q}", version)
	if path == "" {
		return l, nil
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	last := []byte{'\n'}
	if info, err := file.Stat(); err == nil && info.Size() > 0 {
		_, _ = file.ReadAt(last, info.Size()-1) // only a plain file needs a repair
	}
	if l.file = file; last[0] != '\n' {
		l.pending = []byte{'\n'} // a crash left half a line
	}
	return l, nil
}

// write appends lines, and returns false while anything is pending. Without
// lines it tries again to write what is.
func (l *ledger) write(records ...record) bool {
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.file == nil {
		return true
	}
	for _, r := range records {
		r.Time = time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
		line, _ := json.Marshal(r) // strings and numbers
		l.pending = append(append(l.pending, line...), '\n')
	}
	if len(l.pending) > 0 {
		n, _ := l.file.Write(l.pending) // the rest stays pending, which shows the failure
		l.pending = l.pending[n:]
	}
	l.set(float64(len(l.pending)), "audit_pending_bytes")
	return len(l.pending) == 0
}

// metricHelp lists every metric. Those that end in _total are counters.
var metricHelp = map[string]string{
	"build_info":                    "The broker's version.",
	"memory_locked":                 "1 if the broker's memory is locked.",
	"requests_total":                "Requests by agent and outcome.",
	"requests_in_flight":            "Forwarded requests in progress.",
	"request_seconds_total":         "Time spent on forwarded requests.",
	"key_expires_timestamp_seconds": "When the current key expires; 0 is never.",
	"leases_total":                  "Keys read from Vault.",
	"renewals_total":                "Renewals of leases.",
	"vault_errors_total":            "Failed renewals and replacements.",
	"key_refusals_total":            "Answers of OpenAI with status 401.",
	"audit_pending_bytes":           "What the audit log could not take yet; above 0, requests are refused.",
}

func (l *ledger) add(delta float64, series string, labels ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.values[fmt.Sprintf(series, labels...)] += delta
}

func (l *ledger) set(value float64, series string, labels ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.values[fmt.Sprintf(series, labels...)] = value
}

// ServeHTTP writes the metrics in Prometheus' text format.
func (l *ledger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet || r.URL.Path != "/metrics" {
		http.NotFound(w, r)
		return
	}
	l.mu.Lock()
	values := maps.Clone(l.values)
	l.mu.Unlock()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	const prefix = "openai_broker_"
	last := ""
	for _, series := range slices.Sorted(maps.Keys(values)) {
		if name, _, _ := strings.Cut(series, "{"); name != last {
			last = name
			kind := map[bool]string{true: "counter", false: "gauge"}[strings.HasSuffix(name, "_total")]
			fmt.Fprintf(w, "# HELP %[1]s%[2]s %[3]s\n# TYPE %[1]s%[2]s %[4]s\n", prefix, name, metricHelp[name], kind)
		}
		fmt.Fprintf(w, "%s%s %v\n", prefix, series, values[series])
	}
}
