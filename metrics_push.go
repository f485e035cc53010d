package openaisecrets

// This file owns the way of the metrics to a statsd or dogstatsd server, for
// those who do not scrape.
//
// What must stay true: without its settings there is no socket, no goroutine and
// no work; a server that does not listen costs nobody anything; what is sent
// says which mount it is about, since one server hears of all.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gometrics "github.com/hashicorp/go-metrics"
	"github.com/hashicorp/go-metrics/datadog"
	"github.com/hashicorp/vault/sdk/logical"
)

// The settings are the process's environment, which is given with the plugin's
// registration (vault plugin register -env=...): a setting of the mount would
// let whoever may write its config send packets to any host.
const (
	envStatsd    = "VAULT_OPENAI_METRICS_STATSD_ADDR"    // host:port
	envDogstatsd = "VAULT_OPENAI_METRICS_DOGSTATSD_ADDR" // host:port
	envMaxRoles  = "VAULT_OPENAI_METRICS_MAX_ROLES"
)

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

// pushGauges sends what is read and not counted, once a minute.
func (b *backend) pushGauges(ctx context.Context, req *logical.Request) {
	if b.metrics.push == nil {
		return
	}
	for _, r := range b.readings(ctx, req) {
		b.metrics.push.each(r.metric, r.labels, func(s sink, key []string, labels []gometrics.Label) {
			s.SetPrecisionGaugeWithLabels(key, r.value, labels)
		})
	}
}
