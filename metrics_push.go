package openaisecrets

// This file owns the way of the metrics to a statsd or dogstatsd server, for
// those who do not scrape.
//
// What must stay true: without its settings there is no socket, no goroutine and
// no work; a server that does not listen costs nobody anything; what is sent
// says which mount it is about, since one server hears of all.

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gometrics "github.com/hashicorp/go-metrics"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus"
)

// sender is what both of go-metrics' sinks are.
type sender interface {
	gometrics.ShutdownSink
	gometrics.PrecisionGaugeMetricSink // a time does not fit a float32
}

type sink struct {
	sender
	// flat says that labels become parts of the name: statsd has no tags.
	flat bool
}

// pusher sends each change to all sinks. A nil one sends nothing.
type pusher struct {
	mount atomic.Pointer[string] // where the mount is, as Vault's last request said

	mu    sync.RWMutex // held for writing while the sinks are closed
	sinks []sink
}

// seen notes where the mount is, which only requests tell.
func (p *pusher) seen(req *logical.Request) {
	if p == nil || req.MountPoint == "" {
		return
	}
	if last := p.mount.Load(); last == nil || *last != req.MountPoint {
		mount := strings.Clone(req.MountPoint)
		p.mount.Store(&mount)
	}
}

// close ends the sinks; what is counted later is not sent.
func (p *pusher) close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.sinks {
		s.Shutdown()
	}
	p.sinks = nil
}

// pushedName is a metric's name there: with dots, and without the endings that
// are Prometheus's.
func (d *metric) pushedName() string {
	name := strings.TrimPrefix(d.name, metricPrefix)
	if d.kind != "gauge" { // of which some end in _seconds and are no durations
		name = strings.TrimSuffix(strings.TrimSuffix(name, "_total"), "_seconds")
	}
	return "vault.openai." + name
}

// each calls send for each sink, with the key and the labels as it takes them.
func (p *pusher) each(d *metric, values []string, send func(s sink, key []string, labels []gometrics.Label)) {
	if p == nil {
		return
	}
	mount := "unknown"
	if known := p.mount.Load(); known != nil {
		mount = *known
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, s := range p.sinks {
		labels := []gometrics.Label{{Name: "mount_point", Value: s.clean(mount)}}
		for i, value := range values {
			labels = append(labels, gometrics.Label{Name: d.labels[i], Value: s.clean(value)})
		}
		send(s, strings.Split(d.pushedName(), "."), labels)
	}
}

// clean replaces what would end a name or a tag early.
func (s sink) clean(value string) string {
	special := "|,#@:\n\r"
	if s.flat {
		value = strings.Trim(value, "/")
		special += "./ "
	}
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune(special, r) {
			return '_'
		}
		return r
	}, value)
}

func (p *pusher) add(d *metric, n int, values []string) {
	if n == 0 {
		return
	}
	p.each(d, values, func(s sink, key []string, labels []gometrics.Label) {
		s.IncrCounterWithLabels(key, float32(n), labels)
	})
}

// time sends a duration in milliseconds, as statsd's timers are.
func (p *pusher) time(d *metric, took time.Duration, values []string) {
	p.each(d, values, func(s sink, key []string, labels []gometrics.Label) {
		s.AddSampleWithLabels(key, float32(took.Seconds()*1000), labels)
	})
}

// metric is one of the documented metrics, as one mount keeps it.
type metric struct {
	name   string // with the prefix
	kind   string // counter, gauge or histogram
	help   string
	labels []string

	counter   *prometheus.CounterVec   // of a counter
	histogram *prometheus.HistogramVec // of a histogram
	desc      *prometheus.Desc         // of a gauge, which is read when it is asked for
}

const (
	// metricPrefix starts all names, among which Vault's own begin with vault_.
	metricPrefix = "vault_openai_"
)
