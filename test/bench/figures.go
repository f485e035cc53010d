package main

// The figures: the values of each repetition, the medians, the ratios and the
// targets, written as a table and as JSON.
//
// What must stay true: a ratio is of the medians, and its spread is that of the
// repetitions, each of which measures both engines; a target limits the engine's
// ratio to the floor or the engine's own figure, never the floor.

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// stat is a figure of one engine over all repetitions.
type stat struct {
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	Runs   []float64 `json:"runs"`
}

func newStat(runs []float64) *stat {
	if len(runs) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(runs))
	middle := len(sorted) / 2
	s := &stat{Median: sorted[middle], Min: sorted[0], Max: sorted[len(sorted)-1], Runs: runs}
	if len(sorted)%2 == 0 {
		s.Median = (sorted[middle-1] + sorted[middle]) / 2
	}
	return s
}

// ratio is the engine's figure divided by the floor's.
type ratio struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// target is the limit for a figure.
type target struct {
	OfFloor bool    `json:"of_floor"` // Limit is for the ratio, not for the engine's figure
	Most    bool    `json:"most"`     // Limit is a maximum, not a minimum
	Limit   float64 `json:"limit"`
	Peer    float64 `json:"best_known_peer,omitempty"` // in the target's unit
	Reached bool    `json:"reached"`
}

func (t *target) String() string {
	sign := "≥ "
	if t.Most {
		sign = "≤ "
	}
	if t.OfFloor {
		return sign + show(t.Limit) + " of floor"
	}
	return sign + show(t.Limit)
}

// figure is one line of the table.
type figure struct {
	Section string  `json:"section"`
	ID      string  `json:"id"`
	Title   string  `json:"title"`
	Unit    string  `json:"unit"`
	Ratio   *ratio  `json:"ratio,omitempty"` // nil if the floor is zero or not measured
	Floor   *stat   `json:"floor,omitempty"`
	Engine  *stat   `json:"engine,omitempty"`
	Target  *target `json:"target,omitempty"`

	floor, engine []float64
}

// targets lists the target of each figure by ID.
var targets = map[string]target{
	"issue/admin_calls":         {Most: true, Limit: 1, Peer: 2},
	"issue/c32/0ms/rate":        {OfFloor: true, Limit: 0.60, Peer: 0.41},
	"issue/c1/100ms/p50":        {Most: true, Limit: 105, Peer: 204},
	"issue/c256/100ms/rate":     {Limit: 2000, Peer: 1095},
	"issue/pool/c1/p50":         {OfFloor: true, Most: true, Limit: 1.3},
	"issue/pool/c1/storage":     {Most: true, Limit: 4.1}, // includes reading the counters
	"issue/pool/c1/calls":       {Most: true, Limit: 0},
	"burst/20/pool/p99":         {OfFloor: true, Most: true, Limit: 10},
	"burst/20/pool/failed":      {Most: true, Limit: 0},
	"burst/100/pool/p99":        {OfFloor: true, Most: true, Limit: 10},
	"burst/100/pool/failed":     {Most: true, Limit: 0},
	"connections/http1":         {Most: true, Limit: 32, Peer: 2409},
	"leases/revoke/each":        {Limit: 3500, Peer: 3103},
	"issue/rss/c256":            {Most: true, Limit: 55, Peer: 51.8},
	"growth/many/issue/against": {Most: true, Limit: 1.1},
}

// book collects figures in the order of their first values.
type book struct {
	section string
	figures []*figure
	byID    map[string]*figure
}

func newBook() *book { return &book{byID: map[string]*figure{}} }

// engineKind is the engine that a figure is about. The null engine is the floor.
type engineKind bool

const (
	floor  engineKind = false
	engine engineKind = true
)

// note records the value of one repetition. IDs begin with their section.
func (b *book) note(id, title, unit string, whose engineKind, value float64) {
	f := b.byID[id]
	if f == nil {
		f = &figure{Section: b.section, ID: id, Title: title, Unit: unit}
		b.byID[id] = f
		b.figures = append(b.figures, f)
	}
	if whose == engine {
		f.engine = append(f.engine, value)
	} else {
		f.floor = append(f.floor, value)
	}
}

// settle computes medians, ratios and verdicts from the recorded values.
func (b *book) settle() error {
	for _, f := range b.figures {
		f.Floor, f.Engine = newStat(f.floor), newStat(f.engine)
		for _, v := range slices.Concat(f.floor, f.engine) {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return fmt.Errorf("%s is not a number: floor %v, engine %v", f.ID, f.floor, f.engine)
			}
		}
		f.Ratio = ratioOf(f)
		t, asked := targets[f.ID]
		value, has := f.value(t)
		if !asked || !has {
			continue
		}
		if t.Reached = value >= t.Limit; t.Most {
			t.Reached = value <= t.Limit
		}
		f.Target = &t
	}
	return nil
}

func (f *figure) value(t target) (float64, bool) {
	switch {
	case t.OfFloor && f.Ratio != nil:
		return f.Ratio.Median, true
	case !t.OfFloor && f.Engine != nil:
		return f.Engine.Median, true
	}
	return 0, false
}

func ratioOf(f *figure) *ratio {
	if f.Floor == nil || f.Engine == nil || f.Floor.Min <= 0 {
		return nil
	}
	r := &ratio{Median: f.Engine.Median / f.Floor.Median, Min: math.Inf(1)}
	for i := range min(len(f.engine), len(f.floor)) {
		of := f.engine[i] / f.floor[i]
		r.Min, r.Max = min(r.Min, of), max(r.Max, of)
	}
	return r
}

// table writes all figures as a text table.
func (b *book) table(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	heading(w)
	section := ""
	for _, f := range b.figures {
		if f.Section != section {
			section = f.Section
			fmt.Fprintf(w, "\t\t\t\t\t\t\t\t\n\t\t%s\t\t\t\t\t\t\n", strings.ToUpper(section))
		}
		f.line(w)
	}
	return w.Flush()
}

// asked writes the figures that have a target.
func (b *book) asked(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w)
	heading(w)
	for _, f := range b.figures {
		if f.Target != nil {
			f.line(w)
		}
	}
	return w.Flush()
}

func heading(w io.Writer) {
	fmt.Fprintln(w, "ratio\tspread\tfigure\tfloor\tengine\tunit\tto reach\tpeer\t")
}

func (f *figure) line(w io.Writer) {
	cells := f.cells()
	verdict := ""
	if f.Target != nil {
		verdict = "short"
		if f.Target.Reached {
			verdict = "ok"
		}
	}
	fmt.Fprintf(w, "%s\t%s\n", strings.Join(cells, "\t"), verdict)
}

// cells returns ratio, spread, figure, floor, engine, unit, target and peer.
func (f *figure) cells() []string {
	share, spread, wanted, peer := "", "", "", ""
	if f.Ratio != nil {
		share, spread = fmt.Sprintf("%.2f", f.Ratio.Median), fmt.Sprintf("%.2f..%.2f", f.Ratio.Min, f.Ratio.Max)
	}
	if t := f.Target; t != nil {
		wanted = t.String()
		if t.Peer != 0 {
			peer = show(t.Peer)
		}
	}
	return []string{share, spread, f.Title, f.Floor.show(), f.Engine.show(), f.Unit, wanted, peer}
}

func (s *stat) show() string {
	if s == nil {
		return "–"
	}
	return show(s.Median)
}

// show formats a number with its significant digits.
func show(v float64) string {
	switch a := math.Abs(v); {
	case a >= 1000 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// published are the figures that docs/performance.md shows, in this order.
var published = []string{
	"issue/c1/0ms/rate", "issue/c32/0ms/rate", "issue/c256/0ms/rate", "issue/c1/0ms/p50", "issue/c32/0ms/p50", "issue/c32/0ms/p99",
	"issue/c1/100ms/p50", "issue/c1/100ms/probed/p50", "issue/c32/100ms/rate", "issue/c256/100ms/rate",
	"issue/admin_calls", "issue/storage/all", "issue/cpu/plugin", "issue/cpu/vault", "issue/rss/idle", "issue/rss/c256",
	"issue/pool/c1/p50", "issue/pool/c32/p50", "issue/pool/c1/storage", "issue/pool/c1/calls",
	"burst/20/pool/all", "burst/20/pool/p50", "burst/20/pool/p99", "burst/20/pool/failed", "burst/20/none/all", "burst/20/none/p50", "burst/20/none/failed",
	"burst/100/pool/all", "burst/100/pool/p50", "burst/100/pool/p99", "burst/100/pool/failed", "burst/100/none/all", "burst/100/none/p50", "burst/100/none/failed",
	"connections/http1", "connections/http2",
	"leases/renew", "leases/revoke/each", "leases/revoke/sync", "leases/revoke/async", "limit/seconds", "limit/calls",
	"static/rate", "static/p50",
	"raft/c1/0ms/rate", "raft/c32/0ms/rate", "raft/c256/0ms/rate",
	"growth/more/issue/against", "growth/many/issue/against", "growth/many/revoke/against", "crowd/issue/against",
	"startup",
}

// page writes the published figures as a table for the documentation.
func (b *book) page(path string, m machine) error {
	var out strings.Builder
	fmt.Fprintf(&out, "Vault %s, %s, %s, %d cores, commit %s; other processes used %.0f %% of the machine.\n\n", m.Vault, m.Go, m.System, m.Cores, m.Commit, 100*m.Others)
	out.WriteString("| Ratio | Spread | Figure | Floor | Engine | Unit | To reach | Peer |\n|---|---|---|---|---|---|---|---|\n")
	for _, id := range published {
		if f := b.byID[id]; f != nil { // a run with -only has only some of them
			fmt.Fprintf(&out, "| %s |\n", strings.Join(f.cells(), " | "))
		}
	}
	return os.WriteFile(path, []byte(out.String()), 0o644)
}

// report is the JSON file.
type report struct {
	Machine  machine   `json:"machine"`
	Settings settings  `json:"settings"`
	Figures  []*figure `json:"figures"`
	// Functions is the output of the Go benchmarks, for benchstat.
	Functions []string `json:"functions,omitempty"`
}

func (r report) write(path string) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(content, '\n'), 0o644)
}

// verdict summarizes in one line which targets were reached.
func (b *book) verdict() string {
	var reached int
	var short []string
	for _, f := range b.figures {
		switch {
		case f.Target == nil:
		case f.Target.Reached:
			reached++
		default:
			short = append(short, f.ID)
		}
	}
	text := fmt.Sprintf("%d targets reached, %d short", reached, len(short))
	if len(short) > 0 {
		text += ": " + strings.Join(short, ", ")
	}
	return text
}
