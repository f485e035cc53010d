package metrics

// This file owns the transport of the metrics to a statsd or dogstatsd server, an
// alternative to scraping.
//
// What must stay true: without its settings there is no socket, goroutine, or work; an
// unavailable server does not slow a request; each packet names its mount, since one
// server receives those of all mounts.

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gometrics "github.com/hashicorp/go-metrics"
)

// sender is the interface of both go-metrics sinks.
type sender interface {
	gometrics.ShutdownSink
	gometrics.PrecisionGaugeMetricSink // float32 is too small for a timestamp
}

type sink struct {
	sender
	// flat makes labels part of the name, since statsd has no tags.
	flat bool
}

// pusher sends each change to all sinks. A nil pusher sends nothing.
type pusher struct {
	mount atomic.Pointer[string] // path of the mount in Vault's last request

	mu    sync.RWMutex // held for writing while the sinks are closed
	sinks []sink
}

// Seen records the path of the mount, which only requests have.
func (m *Meters) Seen(mount string) {
	p := m.push
	if p == nil || mount == "" {
		return
	}
	if last := p.mount.Load(); last == nil || *last != mount {
		mount := strings.Clone(mount)
		p.mount.Store(&mount)
	}
}

// Pushes reports whether the environment has set a server to send to.
func (m *Meters) Pushes() bool { return m.push != nil }

// PushGauge sends the current value of a gauge.
func (m *Meters) PushGauge(d *Metric, value float64, labels ...string) {
	m.push.each(d, labels, func(s sink, key []string, labels []gometrics.Label) {
		s.SetPrecisionGaugeWithLabels(key, value, labels)
	})
}

// Close closes the sinks; later changes are not sent.
func (m *Meters) Close() {
	p := m.push
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

// PushedName is the metric's name at a statsd server: with dots, and without the
// suffixes that Prometheus prescribes.
func (d *Metric) PushedName() string {
	name := strings.TrimPrefix(d.Name, Prefix)
	if d.Kind != "gauge" { // a gauge in _seconds is a time, not a timer
		name = strings.TrimSuffix(strings.TrimSuffix(name, "_total"), "_seconds")
	}
	return "vault.openai." + name
}

// each calls send for each sink, with its form of the key and labels.
func (p *pusher) each(d *Metric, values []string, send func(s sink, key []string, labels []gometrics.Label)) {
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
			labels = append(labels, gometrics.Label{Name: d.Labels[i], Value: s.clean(value)})
		}
		send(s, strings.Split(d.PushedName(), "."), labels)
	}
}

// clean replaces characters that would terminate a name or a tag.
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

func (p *pusher) add(d *Metric, n int, values []string) {
	if n == 0 {
		return
	}
	p.each(d, values, func(s sink, key []string, labels []gometrics.Label) {
		s.IncrCounterWithLabels(key, float32(n), labels)
	})
}

// time sends a duration in milliseconds, the unit of statsd timers.
func (p *pusher) time(d *Metric, took time.Duration, values []string) {
	p.each(d, values, func(s sink, key []string, labels []gometrics.Label) {
		s.AddSampleWithLabels(key, float32(took.Seconds()*1000), labels)
	})
}
