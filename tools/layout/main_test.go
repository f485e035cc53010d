package main

import (
	"strings"
	"testing"
)

func TestReport_FailsOnCirclesAndOnArrowsAgainstTheOrder(t *testing.T) {
	tests := map[string]struct {
		arrows [][2]string
		want   string // "" passes
	}{
		"in order":          {[][2]string{{"a.go", "b.go"}, {"b.go", "c.go"}, {"a.go", "c.go"}}, ""},
		"against the order": {[][2]string{{"c.go", "b.go"}}, "against the order: c.go -> b.go"},
		"a pair":            {[][2]string{{"a.go", "b.go"}, {"b.go", "a.go"}}, "pair: a.go -> b.go"},
		"a longer circle":   {[][2]string{{"a.go", "b.go"}, {"b.go", "c.go"}, {"c.go", "a.go"}}, "circle of 3: a.go b.go c.go"},
	}
	files := []string{"a.go", wiring, "b.go", "c.go"}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			found := arrows{}
			for _, arrow := range test.arrows {
				found.add(arrow[0], arrow[1], "name")
			}
			var out strings.Builder
			good := report(&out, found, files, order("a.go # first\nb.go\n\nc.go\n"), false, false)
			if good != (test.want == "") || !strings.Contains(out.String(), test.want) {
				t.Errorf("good: %v, printed:\n%s", good, out.String())
			}
		})
	}
}

func TestReport_FailsWhenTheOrderAndThePackageDiffer(t *testing.T) {
	var out strings.Builder
	if report(&out, arrows{}, []string{"a.go", "b.go"}, order("b.go\nc.go"), false, false) {
		t.Error("passed")
	}
	for _, want := range []string{"not in order.txt: a.go", "in order.txt, but not in the package: c.go"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, out.String())
		}
	}
}

func TestListedIn_ReadsTheItemsOfTheList(t *testing.T) {
	comment := `Package p does it: not an item.

  - paths: path_a, path_b,
    path_c;
  - used by all: d.

See order.txt: it lists all.
    code: e
`
	if got := strings.Join(listedIn(comment), " "); got != "path_a.go path_b.go path_c.go d.go" {
		t.Errorf("files: %s", got)
	}
}
