package broker

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// docs/broker.md names each code, outcome, metric, field of the audit log and
// default family, and no code or metric that does not exist.
func TestDocs_ThePageNamesThemAll(t *testing.T) {
	page, err := os.ReadFile("../docs/broker.md")
	require.NoError(t, err)
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	var code strings.Builder
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			code.Write(content)
		}
	}
	names := map[string]bool{}
	for _, m := range regexp.MustCompile(`"(broker_[a-z_]+)"`).FindAllStringSubmatch(code.String(), -1) {
		names[m[1]] = true
	}
	require.Greater(t, len(names), 10)
	for _, m := range regexp.MustCompile(`(?:outcome\(|return |x\.Outcome = )"([a-z_]{5,})"`).FindAllStringSubmatch(code.String(), -1) {
		if m[1] != "answered" && !strings.HasPrefix(m[1], "broker_") && m[1] != "never" {
			names[m[1]] = true
		}
	}
	require.Contains(t, names, "max_session")
	for name := range metricHelp {
		names[name] = true
	}
	for i := range reflect.TypeFor[record]().NumField() {
		name, _, _ := strings.Cut(reflect.TypeFor[record]().Field(i).Tag.Get("json"), ",")
		if name != "event" { // shown as "event":"start"
			names[name] = true
		}
	}
	for _, family := range defaultFamilies {
		names[family] = true
	}
	for name := range names {
		require.Contains(t, string(page), "`"+name+"`")
	}
	for _, m := range regexp.MustCompile("`(broker_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		require.True(t, names[m[1]], "%s does not exist", m[1])
	}
	require.LessOrEqual(t, len(strings.Fields(string(page))), 1500)
}

// The page names each key of broker.json.
func TestDocs_ThePageNamesTheKeys(t *testing.T) {
	page, err := os.ReadFile("../docs/broker.md")
	require.NoError(t, err)
	for _, of := range []reflect.Type{reflect.TypeFor[Config](), reflect.TypeFor[Login](), reflect.TypeFor[Agent]()} {
		for i := range of.NumField() {
			require.Contains(t, string(page), "`"+of.Field(i).Tag.Get("json")+"`")
		}
	}
}

// The page names each variable that a child process gets.
func TestDocs_ThePageNamesTheVariables(t *testing.T) {
	page, err := os.ReadFile("../docs/broker.md")
	require.NoError(t, err)
	for _, entry := range childEnv([]string{"VAULT_TOKEN=x", "BAO_ADDR=x", "OPENAI_PROJECT=x"}, "127.0.0.1:1", "x") {
		name, _, _ := strings.Cut(entry, "=")
		require.Contains(t, string(page), "`"+name+"`")
	}
}
