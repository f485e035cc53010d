// Command plot draws the panels of a Grafana dashboard from a Prometheus server,
// for the picture in docs/metrics.md, since this project cannot build or pin Grafana
// itself.
//
//	go run . -prometheus http://127.0.0.1:9090 -dashboard ../../deploy/grafana/openai.json \
//	    -start 1790000000 -end 1790000300 -set 'mount_point=openai/' -out ../../docs/dashboard.png
//
// It draws panels of the types stat and timeseries where the dashboard places them,
// and rows as headings. Of a panel, it supports only the title, the queries, their
// legends, the unit and the position.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"maps"
	"math"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

type dashboard struct {
	Title  string
	Panels []panel
}

type panel struct {
	Type, Title string
	GridPos     struct{ X, Y, W, H float64 }
	FieldConfig struct {
		Defaults struct{ Unit string }
	}
	Targets []struct{ Expr, LegendFormat string }
}

// A line is one series of a panel.
type line struct {
	name   string
	points plotter.XYs // seconds since the start, value
}

type options struct {
	prometheus, dashboard, out string
	start, end                 float64
	until                      float64 // panels from this row of the grid on are not drawn
	replace, rename            *strings.Replacer
}

func main() {
	var o options
	set := map[string]string{"__rate_interval": "30s"}
	flag.StringVar(&o.prometheus, "prometheus", "http://127.0.0.1:9090", "address of the Prometheus server")
	flag.StringVar(&o.dashboard, "dashboard", "", "file of the dashboard")
	flag.StringVar(&o.out, "out", "", "PNG file to write")
	flag.Float64Var(&o.start, "start", 0, "begin, in seconds since 1970")
	flag.Float64Var(&o.end, "end", 0, "end, in seconds since 1970")
	flag.Float64Var(&o.until, "rows", math.Inf(1), "draw panels above this row of the grid")
	flag.Func("set", "variable of the dashboard, as name=value; repeatable", func(text string) error {
		name, value, found := strings.Cut(text, "=")
		if !found {
			return errors.New("not name=value")
		}
		set[name] = value
		return nil
	})
	o.rename = strings.NewReplacer()
	flag.Func("rename", "label value and what the legends show instead, as old=new", func(text string) error {
		old, shown, found := strings.Cut(text, "=")
		if !found {
			return errors.New("not old=new")
		}
		o.rename = strings.NewReplacer(old, shown)
		return nil
	})
	flag.Parse()
	var pairs []string
	for name, value := range set {
		pairs = append(pairs, "$"+name, value)
	}
	o.replace = strings.NewReplacer(pairs...)
	if err := run(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

const (
	unitWidth = 15 * vg.Millimeter // of the grid's 24 columns
	rowHeight = 6.4 * vg.Millimeter
	dpi       = 96
)

func run(ctx context.Context, o options) error {
	content, err := os.ReadFile(o.dashboard)
	if err != nil {
		return err
	}
	var d dashboard
	if err := json.Unmarshal(content, &d); err != nil {
		return err
	}
	d.Panels = slices.DeleteFunc(d.Panels, func(p panel) bool {
		return p.GridPos.Y >= o.until || !slices.Contains([]string{"row", "stat", "timeseries"}, p.Type)
	})
	bottom := 0.0
	for _, p := range d.Panels {
		bottom = max(bottom, p.GridPos.Y+p.GridPos.H)
	}
	canvas := vgimg.NewWith(vgimg.UseWH(24*unitWidth, vg.Length(bottom)*rowHeight), vgimg.UseDPI(dpi))
	page := draw.New(canvas)
	for i := range d.Panels {
		p := &d.Panels[i]
		var lines []line
		for _, t := range p.Targets {
			found, err := query(ctx, o, o.replace.Replace(t.Expr), t.LegendFormat)
			if err != nil {
				return fmt.Errorf("%s: %w", p.Title, err)
			}
			lines = append(lines, found...)
		}
		if err := paint(page, p, lines, o.end-o.start); err != nil {
			return fmt.Errorf("%s: %w", p.Title, err)
		}
	}
	file, err := os.Create(o.out)
	if err != nil {
		return err
	}
	return errors.Join(png.Encode(file, few(canvas.Image())), file.Close())
}

// few reduces an image to its 256 most frequent colors, which makes the file small.
func few(img image.Image) *image.Paletted {
	count := map[color.RGBA]int{}
	at := func(x, y int) color.RGBA { return color.RGBAModel.Convert(img.At(x, y)).(color.RGBA) }
	bounds := img.Bounds()
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			count[at(x, y)]++
		}
	}
	all := slices.SortedFunc(maps.Keys(count), func(a, b color.RGBA) int {
		return cmp.Or(cmp.Compare(count[b], count[a]), cmp.Compare(a.R, b.R), cmp.Compare(a.G, b.G), cmp.Compare(a.B, b.B))
	})
	var palette color.Palette
	for _, c := range all[:min(len(all), 256)] {
		palette = append(palette, c)
	}
	index := map[color.RGBA]uint8{}
	for _, c := range all {
		index[c] = uint8(palette.Index(c))
	}
	out := image.NewPaletted(bounds, palette)
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			out.SetColorIndex(x, y, index[at(x, y)])
		}
	}
	return out
}

var placeholder = regexp.MustCompile(`\{\{ *(\w+) *\}\}`)

// query evaluates an expression over the time range of the picture.
func query(ctx context.Context, o options, expr, legend string) ([]line, error) {
	params := url.Values{"query": {expr}, "start": {fmt.Sprint(int64(o.start))}, "end": {fmt.Sprint(int64(o.end))}, "step": {"2"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.prometheus+"/api/v1/query_range?"+params.Encode(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Timeout: time.Minute}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Error string
		Data  struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Error != "" {
		return nil, errors.New(answer.Error)
	}
	var lines []line
	for _, r := range answer.Data.Result {
		l := line{name: placeholder.ReplaceAllStringFunc(legend, func(found string) string {
			return o.rename.Replace(r.Metric[placeholder.FindStringSubmatch(found)[1]])
		})}
		for _, v := range r.Values {
			at, _ := v[0].(float64)
			text, _ := v[1].(string)
			value, err := strconv.ParseFloat(text, 64)
			if err != nil || math.IsNaN(value) || math.IsInf(value, 0) {
				continue
			}
			l.points = append(l.points, plotter.XY{X: at - o.start, Y: value})
		}
		if len(l.points) > 0 {
			lines = append(lines, l)
		}
	}
	return lines, nil
}

var (
	ink    = color.Gray{Y: 0x30}
	frame  = color.Gray{Y: 0xd0}
	colors = []color.Color{
		color.RGBA{0x1f, 0x77, 0xb4, 0xff}, color.RGBA{0xd6, 0x27, 0x28, 0xff}, color.RGBA{0x2c, 0xa0, 0x2c, 0xff},
		color.RGBA{0xff, 0x7f, 0x0e, 0xff}, color.RGBA{0x94, 0x67, 0xbd, 0xff}, color.RGBA{0x8c, 0x56, 0x4b, 0xff},
		color.RGBA{0xe3, 0x77, 0xc2, 0xff}, color.RGBA{0x7f, 0x7f, 0x7f, 0xff}, color.RGBA{0xbc, 0xbd, 0x22, 0xff}, color.RGBA{0x17, 0xbe, 0xcf, 0xff},
	}
)

func style(size float64, bold bool) draw.TextStyle {
	f := font.Font{Typeface: "Liberation", Variant: "Sans", Size: vg.Points(size)}
	if bold {
		f.Weight = xfont.WeightBold
	}
	return draw.TextStyle{Color: ink, Font: f, Handler: text.Plain{Fonts: font.DefaultCache}}
}

// paint draws a panel at its position in the dashboard.
func paint(page draw.Canvas, p *panel, lines []line, seconds float64) error {
	place := draw.Crop(page,
		vg.Length(p.GridPos.X)*unitWidth, -(24-vg.Length(p.GridPos.X+p.GridPos.W))*unitWidth,
		page.Max.Y-vg.Length(p.GridPos.Y+p.GridPos.H)*rowHeight, -vg.Length(p.GridPos.Y)*rowHeight)
	if p.Type == "row" {
		place.FillText(style(11, true), vg.Point{X: place.Min.X + 2*vg.Millimeter, Y: place.Min.Y + 1.2*vg.Millimeter}, p.Title)
		return nil
	}
	const margin = 0.8 * vg.Millimeter
	place = draw.Crop(place, margin, -margin, margin, -margin)
	place.StrokeLines(draw.LineStyle{Color: frame, Width: vg.Points(0.6)}, []vg.Point{
		place.Min, {X: place.Max.X, Y: place.Min.Y}, place.Max, {X: place.Min.X, Y: place.Max.Y}, place.Min,
	})
	place.FillText(style(8.5, true), vg.Point{X: place.Min.X + 2*vg.Millimeter, Y: place.Max.Y - 4.5*vg.Millimeter}, p.Title)
	place = draw.Crop(place, 2*vg.Millimeter, -2*vg.Millimeter, 1.5*vg.Millimeter, -6*vg.Millimeter)
	if p.Type == "stat" {
		shown := "-"
		if len(lines) > 0 {
			points := lines[0].points
			shown = readable(points[len(points)-1].Y, p.FieldConfig.Defaults.Unit)
		}
		place.FillText(style(20, true), vg.Point{X: place.Min.X, Y: place.Min.Y + 3*vg.Millimeter}, shown)
		return nil
	}
	return graph(place, p, lines, seconds)
}

func graph(place draw.Canvas, p *panel, lines []line, seconds float64) error {
	g := plot.New()
	small := style(7, false)
	for _, axis := range []*plot.Axis{&g.X, &g.Y} {
		axis.Tick.Label.Font, axis.Tick.Label.Color = small.Font, ink
		axis.LineStyle.Color, axis.Tick.LineStyle.Color = frame, frame
	}
	g.X.Min, g.X.Max, g.Y.Min = 0, seconds, 0
	g.X.Tick.Marker = plot.TickerFunc(func(lowest, highest float64) (ticks []plot.Tick) {
		for at := 0.0; at <= highest; at += 60 {
			ticks = append(ticks, plot.Tick{Value: at, Label: fmt.Sprintf("%.0f min", at/60)})
		}
		return ticks
	})
	highest := 0.0
	g.Legend.TextStyle, g.Legend.Top, g.Legend.Left = small, true, true
	g.Legend.TextStyle.Handler = text.Plain{Fonts: font.DefaultCache}
	g.Legend.ThumbnailWidth = 4 * vg.Millimeter
	g.Add(&plotter.Grid{Horizontal: draw.LineStyle{Color: color.Gray{Y: 0xec}, Width: vg.Points(0.5)}})
	peak := func(l line) float64 {
		return slices.MaxFunc(l.points, func(a, b plotter.XY) int { return cmp.Compare(a.Y, b.Y) }).Y
	}
	slices.SortStableFunc(lines, func(a, b line) int { return cmp.Compare(peak(b), peak(a)) })
	if len(lines) > 0 && peak(lines[0]) > 0 {
		lines = slices.DeleteFunc(lines, func(l line) bool { return peak(l) == 0 })
	}
	const named = 6 // more names would need too much room
	for i, l := range lines {
		drawn, err := plotter.NewLine(l.points)
		if err != nil {
			return err
		}
		drawn.Color, drawn.Width = colors[i%len(colors)], vg.Points(1.1)
		g.Add(drawn)
		highest = max(highest, peak(l))
		if i < named {
			g.Legend.Add(l.name, drawn)
		}
	}
	g.Y.Max = highest * (1.1 + 0.12*float64(min(len(lines), named))) // room for the legend
	if highest == 0 {
		g.Y.Max = 1
	}
	unit := p.FieldConfig.Defaults.Unit
	g.Y.Tick.Marker = plot.TickerFunc(func(lowest, highest float64) []plot.Tick {
		ticks := plot.DefaultTicks{}.Ticks(lowest, highest)
		for i := range ticks {
			if ticks[i].Label != "" {
				ticks[i].Label = readable(ticks[i].Value, unit)
			}
		}
		return ticks
	})
	g.Draw(place)
	return nil
}

// readable formats a value with its unit, as Grafana does.
func readable(value float64, unit string) string {
	short := func(v float64) string { return strconv.FormatFloat(v, 'g', 3, 64) }
	switch unit {
	case "percentunit":
		return short(value*100) + " %"
	case "reqps":
		return short(value) + "/s"
	case "s":
		size, sign := math.Abs(value), 1.0
		if value < 0 {
			sign = -1
		}
		switch {
		case size == 0:
			return "0 s"
		case size < 1:
			return short(sign*size*1000) + " ms"
		case size < 120:
			return short(sign*size) + " s"
		case size < 7200:
			return short(sign*size/60) + " min"
		case size < 172800:
			return short(sign*size/3600) + " h"
		}
		return short(sign*size/86400) + " d"
	}
	return short(value)
}
