package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	scan     = `{"config":{}} {"SBOM":{"go_version":"go1.26.8"}} {"osv":{"id":"GO-1","summary":"a hole"}} `
	imported = `{"finding":{"osv":"GO-1","trace":[{"module":"m","version":"v1.0.0","package":"m/p"}]}} `
	call     = `{"finding":{"osv":"GO-1","trace":[{"module":"m","version":"v1.0.0","package":"m/p","function":"F"}]}} `
	fixable  = `{"finding":{"osv":"GO-1","fixed_version":"v1.0.1","trace":[{"module":"m","version":"v1.0.0","package":"m/p","function":"F"}]}} `
)

func TestOnlyAcceptedVulnerabilitiesWithoutAFixPass(t *testing.T) {
	none, one := map[string]string{}, map[string]string{"GO-1": "a reason"}
	for name, c := range map[string]struct {
		input    string
		accepted map[string]string
		says     string
		passes   bool
	}{
		"nothing is found":              {scan, none, "", true},
		"only imported":                 {scan + imported, none, "", true},
		"called":                        {scan + imported + call, none, "FOUND: GO-1 in m@v1.0.0, no fix: a hole\n", false},
		"called and fixed":              {scan + fixable, none, "FOUND: GO-1 in m@v1.0.0, fixed in v1.0.1: a hole\n", false},
		"accepted, found twice":         {scan + call + call, one, "accepted: GO-1 in m@v1.0.0: a reason\n", true},
		"accepted, but there is a fix":  {scan + fixable, one, "FOUND: GO-1 in m@v1.0.0, fixed in v1.0.1: a hole\n", false},
		"accepted, but no longer found": {scan + imported, one, "STALE: GO-1 is accepted in tools/vuln and no longer found\n", false},
		"no scan":                       {`{"config":{}}`, none, "", false},
		"no output":                     {"", none, "", false},
		"cut off":                       {scan + `{"finding":`, none, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			err := run(strings.NewReader(c.input), &out, c.accepted)
			require.Equal(t, c.passes, err == nil, "%v", err)
			require.Equal(t, c.says, out.String())
		})
	}
}
