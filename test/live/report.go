package live

// The report: Markdown to paste into an issue.

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Verdict says what a finding means for the engine.
type Verdict string

// The verdicts. Differs is the one to act on: an assumption of the engine is
// wrong.
const (
	Holds     Verdict = "as assumed"
	Differs   Verdict = "**DIFFERS**"
	Learned   Verdict = "learned"
	Unchecked Verdict = "not checked"
)

// Finding is one answer. Section is its number in the list of open questions.
type Finding struct {
	Section  int
	About    string
	Verdict  Verdict
	Observed string
}

// Report is the result of a run.
type Report struct {
	Host     string
	Began    time.Time
	Took     time.Duration
	Findings []Finding
	calls    []string
}

func (r *Report) add(section int, about string, v Verdict, observed string) {
	r.Findings = append(r.Findings, Finding{section, about, v, scrub(observed)})
}

// expect adds a finding about an assumption of the engine.
func (r *Report) expect(section int, about string, holds bool, observed string) {
	v := Differs
	if holds {
		v = Holds
	}
	r.add(section, about, v, observed)
}

// Differences are the findings that contradict an assumption.
func (r *Report) Differences() []Finding {
	return slices.DeleteFunc(slices.Clone(r.Findings), func(f Finding) bool { return f.Verdict != Differs })
}

// finish counts the calls, by endpoint.
func (r *Report) finish(w *wire) {
	r.Took = time.Since(r.Began)
	w.mu.Lock()
	defer w.mu.Unlock()
	type count struct{ all, limited int }
	counts := map[string]*count{}
	limits := map[string]bool{}
	forms := map[string]bool{}
	for _, x := range w.seen {
		name := x.method + " " + x.route
		if counts[name] == nil {
			counts[name] = &count{}
		}
		counts[name].all++
		if x.status == 429 {
			counts[name].limited++
		}
		for _, h := range x.limits {
			limits[h] = true
		}
		if x.form != "" {
			forms[x.form] = true
		}
	}
	for name, c := range counts {
		r.calls = append(r.calls, fmt.Sprintf("| `%s` | %d | %d |", name, c.all, c.limited))
	}
	slices.Sort(r.calls)
	r.add(4, "Rate limit headers of any answer", Learned, names(limits))
	r.add(1, "Forms of error bodies", Learned, names(forms))
}

func names(set map[string]bool) string {
	if len(set) == 0 {
		return "none"
	}
	var list []string
	for name := range set {
		list = append(list, name)
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// String is the report as Markdown.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "### OpenAI's Admin API, as observed at %s\n\n%s, in %d s. § is the number in the list of open questions.\n\n",
		r.Host, r.Began.UTC().Format("2006-01-02 15:04 UTC"), int(r.Took.Seconds()))
	fmt.Fprintln(&b, "| § | question | verdict | observed |\n|---|---|---|---|")
	findings := slices.Clone(r.Findings)
	slices.SortStableFunc(findings, func(a, b Finding) int { return a.Section - b.Section })
	cell := strings.NewReplacer("|", "\\|", "\n", " ")
	for _, f := range findings {
		fmt.Fprintf(&b, "| %d | %s | %s | %s |\n", f.Section, cell.Replace(f.About), f.Verdict, cell.Replace(f.Observed))
	}
	fmt.Fprintf(&b, "\n| calls made | | of them 429 |\n|---|---|---|\n%s\n", strings.Join(r.calls, "\n"))
	return b.String()
}
