// Command vuln reads `govulncheck -format json` from standard input and fails on
// each vulnerability that this module's code calls.
//
// What must stay true: a vulnerability is accepted only by its ID, with a reason, and while
// it has no fix. An accepted one that is fixed or no longer found is an error, so that the
// list stays current. An incomplete scan is an error.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
)

// accepted are vulnerabilities without a fixed version, with the reason why they do not
// affect this module.
var accepted = map[string]string{
	"GO-2026-4883": "in the Docker daemon's check of plugin privileges; vault/sdk links Docker's client, which the plugin never uses",
	"GO-2026-4887": "in the Docker daemon's authorization plugins; vault/sdk links Docker's client, which the plugin never uses",
}

// message is the decoded part of a govulncheck message.
type message struct {
	SBOM *struct{} `json:"SBOM"`
	OSV  *struct {
		ID      string `json:"id"`
		Summary string `json:"summary"`
	} `json:"osv"`
	Finding *struct {
		OSV          string `json:"osv"`
		FixedVersion string `json:"fixed_version"`
		Trace        []struct {
			Module   string `json:"module"`
			Version  string `json:"version"`
			Function string `json:"function"`
		} `json:"trace"`
	} `json:"finding"`
}

func main() {
	if err := run(os.Stdin, os.Stdout, accepted); err != nil {
		fmt.Fprintln(os.Stderr, "vuln:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, accepted map[string]string) error {
	scanned, failed := false, 0
	summaries, called := map[string]string{}, map[string]bool{}
	for d := json.NewDecoder(in); ; {
		var m message
		err := d.Decode(&m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading govulncheck's output: %w", err)
		}
		scanned = scanned || m.SBOM != nil
		if m.OSV != nil {
			summaries[m.OSV.ID] = m.OSV.Summary
		}
		// A finding without a function is for a module or package that is only required or
		// imported.
		if m.Finding == nil || len(m.Finding.Trace) == 0 || m.Finding.Trace[0].Function == "" || called[m.Finding.OSV] {
			continue
		}
		f, at := m.Finding, m.Finding.Trace[0]
		called[f.OSV] = true
		reason, ok := accepted[f.OSV]
		switch {
		case ok && f.FixedVersion == "":
			fmt.Fprintf(out, "accepted: %s in %s@%s: %s\n", f.OSV, at.Module, at.Version, reason)
		case f.FixedVersion == "":
			fmt.Fprintf(out, "FOUND: %s in %s@%s, no fix: %s\n", f.OSV, at.Module, at.Version, summaries[f.OSV])
			failed++
		default:
			fmt.Fprintf(out, "FOUND: %s in %s@%s, fixed in %s: %s\n", f.OSV, at.Module, at.Version, f.FixedVersion, summaries[f.OSV])
			failed++
		}
	}
	if !scanned {
		return errors.New("incomplete scan: the input has no SBOM message")
	}
	for _, id := range slices.Sorted(maps.Keys(accepted)) {
		if !called[id] {
			fmt.Fprintf(out, "STALE: %s is accepted in tools/vuln and no longer found\n", id)
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d problems; run bin/govulncheck ./... for the call stacks", failed)
	}
	return nil
}
