package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Linked modules run in the process that holds the admin key, so CONTRIBUTING.md
// lists each with its reason, and lists no other module.
func TestDependencies_EachLinkedModuleHasAReason(t *testing.T) {
	t.Parallel()
	listed := dependencies(t)
	linked := map[string]string{} // and one operating system for each
	for _, goos := range []string{"linux", "darwin", "windows"} {
		cmd := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}}{{end}}{{end}}", ".")
		cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH=amd64", "CGO_ENABLED=0")
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		require.NoError(t, err)
		for _, module := range strings.Fields(string(out)) {
			linked[module] = goos
		}
	}
	require.Contains(t, linked, "github.com/hashicorp/vault/sdk")
	for module, goos := range linked {
		if listed[module] == "" {
			t.Errorf("%s is linked on %s and not in CONTRIBUTING.md's list of dependencies", module, goos)
		}
	}
	for module := range listed {
		if linked[module] == "" {
			t.Errorf("%s is in CONTRIBUTING.md's list of dependencies and not linked any more", module)
		}
	}
}

// dependencies returns the modules in CONTRIBUTING.md's list, each with the rest
// of its row.
func dependencies(t *testing.T) map[string]string {
	t.Helper()
	page, err := os.ReadFile("../../CONTRIBUTING.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(page), "\n## Dependencies\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	listed := map[string]string{}
	name := regexp.MustCompile("`([^`]+)`")
	for line := range strings.Lines(section) {
		modules, reason, row := strings.Cut(strings.TrimPrefix(line, "| "), " | ")
		if !row || !strings.HasPrefix(line, "| `") {
			continue
		}
		for _, found := range name.FindAllStringSubmatch(modules, -1) {
			require.NotContains(t, listed, found[1], "it has two rows")
			require.Greater(t, len(strings.Trim(reason, " |\n")), 10, "%s has no reason", found[1])
			listed[found[1]] = reason
		}
	}
	return listed
}
