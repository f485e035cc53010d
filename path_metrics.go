package openaisecrets

// This file owns the path by which a mount's metrics leave it, and what is read
// rather than counted for them.
//
// What must stay true: reading them changes nothing, calls nobody at OpenAI and
// costs no storage operation but that of a config which no request has read yet;
// what is shown is this mount's on this node, and nothing else's.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"time"

	gometrics "github.com/hashicorp/go-metrics"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

func (b *backend) pathMetrics() *framework.Path {
	family := func(description string) *framework.FieldSchema {
		return &framework.FieldSchema{Type: framework.TypeSlice, Description: description}
	}
	return &framework.Path{
		Pattern:      "metrics/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "metrics"},
		Fields: map[string]*framework.FieldSchema{
			"format": {
				Type:          framework.TypeString,
				Default:       "json",
				AllowedValues: []any{"json", "prometheus"},
				Description:   "json, or prometheus for Prometheus's text format.",
				DisplayAttrs:  &framework.DisplayAttributes{Name: "Format"},
				Query:         true,
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			// Not forwarded by a performance standby, which counts for itself.
			logical.ReadOperation: &framework.PathOperation{
				Callback: strict(b.metricsRead),
				Summary:  "Read the metrics of this mount on this node.",
				Responses: map[int][]framework.Response{http.StatusOK: {
					{Description: "The metrics.", Fields: map[string]*framework.FieldSchema{
						"mount_point": {Type: framework.TypeString, Description: "The mount that they are of."},
						"counters":    family("What was counted since the plugin started: name, labels, value."),
						"gauges":      family("What is so now: name, labels, value."),
						"histograms":  family("What was timed since the plugin started, in seconds: name, labels, count, sum, and buckets, each with how many took no longer than le."),
					}},
					{Description: "The same with format=prometheus.", MediaType: prometheusType},
				}},
			},
		},
		HelpSynopsis: "Read the metrics of this mount on this node.",
		HelpDescription: strings.TrimSpace(`
What this mount has done since its plugin started, and what state it is in, as
JSON or, with format=prometheus, as Prometheus's text format, which a Prometheus
server scrapes through Vault with a token whose policy allows to read this path.
Vault's own telemetry has none of it: it does not hear of a plugin's metrics.
`),
	}
}

// prometheusType is the content type of Prometheus's text format.
var prometheusType = string(expfmt.NewFormat(expfmt.TypeTextPlain))

func (b *backend) metricsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	format := d.Get("format").(string)
	if format != "json" && format != "prometheus" {
		return logical.ErrorResponse("format must be json or prometheus"), nil
	}
	families, err := b.gather(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("gathering the metrics: %w", err)
	}
	if format == "json" {
		return metricsJSON(req.MountPoint, families), nil
	}
	var text bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			return nil, fmt.Errorf("writing the metrics: %w", err)
		}
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: prometheusType,
		logical.HTTPStatusCode:  http.StatusOK,
		logical.HTTPRawBody:     text.Bytes(), // of a string Vault would try whether it is base64
	}}, nil
}

// gather reads all metrics. The mount's path becomes a label of each here and
// not before, since Vault may move a mount.
func (b *backend) gather(ctx context.Context, req *logical.Request) ([]*dto.MetricFamily, error) {
	registry := prometheus.NewRegistry()
	register := prometheus.WrapRegistererWith(prometheus.Labels{"mount_point": req.MountPoint}, registry)
	collectors := []prometheus.Collector{readings(b.readings(ctx, req))}
	for _, d := range b.metrics.all {
		switch {
		case d.counter != nil:
			collectors = append(collectors, d.counter)
		case d.histogram != nil:
			collectors = append(collectors, d.histogram)
		}
	}
	for _, c := range collectors {
		if err := register.Register(c); err != nil {
			return nil, err
		}
	}
	return registry.Gather()
}

// metricsJSON shapes the metrics as Vault's own sys/metrics does.
func metricsJSON(mount string, families []*dto.MetricFamily) *logical.Response {
	counters, gauges, histograms := []any{}, []any{}, []any{} // [] and not null without any
	for _, f := range families {
		for _, one := range f.GetMetric() {
			labels := map[string]any{}
			for _, l := range one.GetLabel() {
				if l.GetName() != "mount_point" { // said once
					labels[l.GetName()] = l.GetValue()
				}
			}
			item := map[string]any{"name": f.GetName(), "labels": labels}
			switch f.GetType() { //nolint:exhaustive // there are no others
			case dto.MetricType_COUNTER:
				item["value"] = one.GetCounter().GetValue()
				counters = append(counters, item)
			case dto.MetricType_GAUGE:
				item["value"] = one.GetGauge().GetValue()
				gauges = append(gauges, item)
			case dto.MetricType_HISTOGRAM:
				h := one.GetHistogram()
				var buckets []any
				for _, bucket := range h.GetBucket() {
					buckets = append(buckets, map[string]any{"le": bucket.GetUpperBound(), "count": bucket.GetCumulativeCount()})
				}
				item["count"], item["sum"], item["buckets"] = h.GetSampleCount(), h.GetSampleSum(), buckets
				histograms = append(histograms, item)
			}
		}
	}
	return &logical.Response{Data: map[string]any{"mount_point": mount, "counters": counters, "gauges": gauges, "histograms": histograms}}
}

// reading is a gauge's value.
type reading struct {
	metric *metric
	value  float64
	labels []string
}

// readings is a prometheus.Collector of what was read.
type readings []reading

// Describe implements prometheus.Collector. What there is to read differs, so
// nothing is promised.
func (readings) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (rs readings) Collect(out chan<- prometheus.Metric) {
	for _, r := range rs {
		out <- prometheus.MustNewConstMetric(r.metric.desc, prometheus.GaugeValue, r.value, r.labels...)
	}
}

// readings reads the gauges. Most come from memory, as the last pass of a
// worker has left them; what is not known is absent and not 0.
func (b *backend) readings(ctx context.Context, req *logical.Request) (all []reading) {
	m, now := b.metrics, b.now()
	set := func(d *metric, value float64, labels ...string) {
		all = append(all, reading{metric: d, value: value, labels: labels})
	}
	at := func(d *metric, t time.Time) {
		if !t.IsZero() {
			set(d, float64(t.Unix()))
		}
	}
	set(m.build, 1, strings.TrimPrefix(version, "v"), runtime.Version())
	set(m.inFlight, float64(m.flying.Load()))

	entries, oldest, kept := b.wal.totals()
	set(m.journalEntries, float64(entries))
	set(m.journalKept, float64(kept))
	age := time.Duration(0)
	if oldest != 0 {
		age = max(0, now.Sub(time.Unix(oldest, 0)))
	}
	set(m.journalAge, age.Seconds())

	snap, err := b.current(ctx, req.Storage)
	switch {
	case err == nil:
		cfg := snap.config
		at(m.lastRotation, cfg.LastRotated)
		at(m.nextRotation, cfg.nextRotation(now, 0))
		at(m.keyExpiry, cfg.AdminKeyExpires)
		set(m.retiredKeys, float64(len(cfg.Retired)))
		set(m.keptKeys, float64(len(cfg.retiredIDs(func(k *retiredKey) bool { return k.Kept != "" && !k.Elsewhere }))))
		failing := 0.0
		if cfg.RotationError != "" {
			failing = 1
		}
		set(m.rotationFailed, failing)
	case !errors.Is(err, errNotConfigured):
		// The rest is worth the more when storage is in trouble.
		b.log(req).Warn("metrics are without what the config tells", "error", err)
	}

	if static, known := b.static.late(now); known {
		set(m.staticRoles, float64(static.roles))
		set(m.staticFailing, float64(static.failing))
		set(m.staticLag, static.lag.Seconds())
		set(m.staticKept, float64(static.kept))
	}
	if sweep := b.tidy.current(); !sweep.finished.IsZero() {
		set(m.sweepOrphans, float64(sweep.orphans))
		set(m.sweepWaiting, float64(sweep.waiting))
		at(m.lastSweep, sweep.finished)
	}
	return all
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
