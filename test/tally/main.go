// Command tally summarizes the JSON stream of one or several `go test -json`
// runs, read from standard input: one line for each package, the output of
// failed tests, a list of skipped tests with the reasons, and the counts alone on
// the last line. Continuous integration reads that line, so its format must not
// change: "N passed, N failed, N skipped".
//
// It exits with 1 if a test or a build failed, or if no test passed.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// event is the part of test2json's record that is used here. Lines that are
// not JSON at all (a tool that writes to the wrong stream) are passed through.
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

type test struct{ pkg, name string }

type tally struct {
	out     io.Writer
	output  map[test]*strings.Builder
	parents map[test]bool // tests with subtests, which are counted instead
	results map[test]string
	order   []test
	built   map[string]*strings.Builder
	broken  int // packages that failed outside of any test
}

func main() {
	passed, err := run(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tally:", err)
	}
	if err != nil || !passed {
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) (bool, error) {
	t := &tally{
		out:     out,
		output:  map[test]*strings.Builder{},
		parents: map[test]bool{},
		results: map[test]string{},
		built:   map[string]*strings.Builder{},
	}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			t.line(line)
		}
		if err == io.EOF {
			return t.finish(), nil
		}
		if err != nil {
			return false, err
		}
	}
}

func (t *tally) line(line string) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
		fmt.Fprint(t.out, line)
		return
	}
	id := test{e.Package, e.Test}
	switch e.Action {
	case "run":
		if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
			t.parents[test{e.Package, e.Test[:i]}] = true
		}
		t.order = append(t.order, id)
	case "output":
		keep(t.output, id, e.Output)
	case "build-output":
		keep(t.built, e.ImportPath, e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			t.pkg(e)
			return
		}
		t.results[id] = e.Action
		if e.Action == "pass" {
			delete(t.output, id)
		}
	}
}

// pkg prints the result of a package as it arrives, with the output of each of
// its failed tests, so that a long run shows failures early.
func (t *tally) pkg(e event) {
	switch e.Action {
	case "skip": // a package without tests
		return
	case "pass":
		fmt.Fprintf(t.out, "ok   %s (%.1fs)\n", e.Package, e.Elapsed)
		return
	}
	fmt.Fprintf(t.out, "FAIL %s (%.1fs)\n", e.Package, e.Elapsed)
	explained := false
	for _, id := range t.order {
		result := t.results[id]
		if id.pkg != e.Package || result == "pass" || result == "skip" {
			continue
		}
		if result == "" { // it was running when the process died
			t.results[id] = "fail"
		}
		explained = true
		fmt.Fprint(t.out, indent(text(t.output, id)))
	}
	if !explained {
		t.broken++
		fmt.Fprint(t.out, indent(text(t.built, e.FailedBuild)), indent(text(t.output, test{e.Package, ""})))
	}
}

func (t *tally) finish() bool {
	// A parent that fails with no failing child failed by its own code (a check
	// at its end, say) and must not vanish from the count.
	failedChild := map[test]bool{}
	for id, result := range t.results {
		if i := strings.LastIndexByte(id.name, '/'); i >= 0 && result == "fail" {
			failedChild[test{id.pkg, id.name[:i]}] = true
		}
	}
	count := map[string]int{}
	var failed, skipped []string
	for _, id := range t.order {
		result := t.results[id]
		if t.parents[id] && (result != "fail" || failedChild[id]) {
			continue
		}
		if result == "" {
			result = "fail"
		}
		count[result]++
		switch result {
		case "fail":
			failed = append(failed, id.pkg+" "+id.name)
		case "skip":
			skipped = append(skipped, id.name+": "+reason(text(t.output, id)))
		}
	}
	list(t.out, "Failed:", failed)
	list(t.out, "Skipped:", skipped)
	if t.broken > 0 {
		fmt.Fprintf(t.out, "%d packages failed outside of their tests, see above.\n", t.broken)
	}
	count["fail"] += t.broken
	fmt.Fprintf(t.out, "%d passed, %d failed, %d skipped\n", count["pass"], count["fail"], count["skip"])
	return count["fail"] == 0 && count["pass"] > 0
}

func keep[K comparable](m map[K]*strings.Builder, key K, s string) {
	if m[key] == nil {
		m[key] = &strings.Builder{}
	}
	m[key].WriteString(s)
}

func text[K comparable](m map[K]*strings.Builder, key K) string {
	if m[key] == nil {
		return ""
	}
	return m[key].String()
}

// reason returns the reason of a skipped test: its last line of output that is
// not the test runner's.
func reason(output string) string {
	said := "no reason given"
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			said = line
		}
	}
	return said
}

func indent(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString("      " + line)
	}
	return b.String()
}

func list(out io.Writer, title string, items []string) {
	if len(items) == 0 {
		return
	}
	fmt.Fprintln(out, title)
	for _, item := range items {
		fmt.Fprintln(out, "  "+item)
	}
}
