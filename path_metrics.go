package openaisecrets

// This file owns the path that returns a mount's metrics, and the gauges, which are
// read and not counted.
//
// What must stay true: a read of the metrics changes nothing and does not call OpenAI;
// its only storage operation reads the config if it is not loaded yet; the metrics are
// those of this mount on this node.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"vault-plugin-secrets-openai/internal/metrics"
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
				Description:   "Output format: json, or prometheus for the Prometheus text format.",
				DisplayAttrs:  &framework.DisplayAttributes{Name: "Format"},
				Query:         true,
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			// Not forwarded: a performance standby has its own metrics.
			logical.ReadOperation: &framework.PathOperation{
				Callback: rejectUnknownFields(b.metricsRead),
				Summary:  "Read the metrics of this mount on this node.",
				Responses: map[int][]framework.Response{http.StatusOK: {
					{Description: "The metrics.", Fields: map[string]*framework.FieldSchema{
						"mount_point": {Type: framework.TypeString, Description: "Path of the mount."},
						"counters":    family("Counters since the plugin started: name, labels, value."),
						"gauges":      family("Current values: name, labels, value."),
						"histograms":  family("Durations in seconds since the plugin started. Each bucket counts those up to le."),
					}},
					{Description: "The metrics in the Prometheus text format.", MediaType: prometheusType},
				}},
			},
		},
		HelpSynopsis: "Read the metrics of this mount on this node.",
		HelpDescription: strings.TrimSpace(`
Returns the metrics of this mount since its plugin started, as JSON or, with
format=prometheus, in the Prometheus text format. A Prometheus server scrapes
this path through Vault with a token whose policy allows to read it. Vault
telemetry excludes external plugins, so the engine exposes its own metrics.
`),
	}
}

// prometheusType is the content type of Prometheus's text format.
var prometheusType = string(expfmt.NewFormat(expfmt.TypeTextPlain))

func (b *backend) metricsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	format := d.Get("format").(string)
	if format != "json" && format != "prometheus" {
		return logical.ErrorResponse(`format must be "json" or "prometheus"`), nil
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
		logical.HTTPRawBody:     text.Bytes(), // Vault would try to decode a string as base64
	}}, nil
}

// gather collects all metrics. The mount's path becomes a label only here, since Vault
// can move a mount.
func (b *backend) gather(ctx context.Context, req *logical.Request) ([]*dto.MetricFamily, error) {
	registry := prometheus.NewRegistry()
	register := prometheus.WrapRegistererWith(prometheus.Labels{"mount_point": req.MountPoint}, registry)
	collectors := []prometheus.Collector{readings(b.readings(ctx, req))}
	for _, d := range b.metrics.All {
		switch {
		case d.Counter != nil:
			collectors = append(collectors, d.Counter)
		case d.Histogram != nil:
			collectors = append(collectors, d.Histogram)
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
				if l.GetName() != "mount_point" { // it is a field of the response
					labels[l.GetName()] = l.GetValue()
				}
			}
			item := map[string]any{"name": f.GetName(), "labels": labels}
			switch f.GetType() { //nolint:exhaustive // the engine uses no others
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
	metric *metrics.Metric
	value  float64
	labels []string
}

// readings is a prometheus.Collector of gauges.
type readings []reading

// Describe implements prometheus.Collector. It describes nothing, because the set of
// gauges varies.
func (readings) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (rs readings) Collect(out chan<- prometheus.Metric) {
	for _, r := range rs {
		out <- prometheus.MustNewConstMetric(r.metric.Desc, prometheus.GaugeValue, r.value, r.labels...)
	}
}

// readings reads the gauges, most of them from memory as of the last run of a worker.
// A gauge whose value is unknown is absent, not 0.
func (b *backend) readings(ctx context.Context, req *logical.Request) (all []reading) {
	m, now := b.metrics, b.now()
	set := func(d *metrics.Metric, value float64, labels ...string) {
		all = append(all, reading{metric: d, value: value, labels: labels})
	}
	at := func(d *metrics.Metric, t time.Time) {
		if !t.IsZero() {
			set(d, float64(t.Unix()))
		}
	}
	set(m.Build, 1, strings.TrimPrefix(version, "v"), runtime.Version())
	set(m.InFlight, float64(m.Flying()))

	entries, oldest, kept := b.wal.totals()
	set(m.WALEntries, float64(entries))
	set(m.WALRetained, float64(kept))
	age := time.Duration(0)
	if oldest != 0 {
		age = max(0, now.Sub(time.Unix(oldest, 0)))
	}
	set(m.WALAge, age.Seconds())

	for role, ready := range metrics.ByRole(m, b.pools.ready()) {
		set(m.PoolReady, float64(ready), role)
	}

	for role, blocked := range metrics.ByRole(m, b.states.counted()) {
		set(m.RoleBlocked, float64(blocked), role)
	}

	snap, err := b.current(ctx, req.Storage)
	switch {
	case err == nil:
		cfg := snap.config
		at(m.LastRotation, cfg.LastRotated)
		at(m.NextRotation, cfg.nextRotation(now, 0))
		at(m.KeyExpiry, cfg.AdminKeyExpires)
		set(m.SupersededKeys, float64(len(cfg.Superseded)))
		set(m.RetainedKeys, float64(len(cfg.supersededIDs(func(k *supersededKey) bool { return k.Kept != "" && !k.Elsewhere }))))
		failing := 0.0
		if cfg.RotationError != "" {
			failing = 1
		}
		set(m.RotationFailing, failing)
	case !errors.Is(err, errNotConfigured):
		// The other gauges matter most while storage fails.
		b.log(req).Warn("admin key metrics unavailable: failed to read the config", "error", err)
	}

	if static, known := b.static.gauges(now); known {
		set(m.StaticRoles, float64(static.roles))
		set(m.StaticFailing, float64(static.failing))
		set(m.StaticLag, static.lag.Seconds())
		set(m.StaticSuperseded, float64(static.kept))
		set(m.StaticsMissing, float64(static.missing))
	}
	if run := b.tidy.current(); !run.finished.IsZero() {
		set(m.TidyOrphans, float64(run.orphans))
		set(m.TidyPending, float64(run.waiting))
		at(m.LastTidy, run.finished)
	}
	if figures, at, enabled := b.spending.figures(); enabled {
		seconds := 0.0
		if !at.IsZero() {
			seconds = float64(at.Unix())
		}
		set(m.LastUsage, seconds)
		for _, window := range figures.windows() {
			for role, cost := range metrics.ByRole(m, figures.byRole(window)) {
				set(m.RoleCost, cost, role, window)
			}
			set(m.UsageUnattributed, figures.unattributed(window), window)
			set(m.UsageTotal, float(figures.total[window]), window)
		}
	}
	return all
}

// pushGauges sends the gauges, which no event triggers, once a minute.
func (b *backend) pushGauges(ctx context.Context, req *logical.Request) {
	if !b.metrics.Pushes() {
		return
	}
	for _, r := range b.readings(ctx, req) {
		b.metrics.PushGauge(r.metric, r.value, r.labels...)
	}
}
