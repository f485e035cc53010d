package openaisecrets

// The links of the documentation. Other tests compare the API reference, the messages and
// the metrics with the code, and the integration tests run the commands.

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

func TestOpenAPIKeepsReferences(t *testing.T) {
	t.Parallel()
	resp := logical.HelpResponse("", nil, &framework.OASDocument{Components: framework.OASComponents{
		Schemas: map[string]*framework.OASSchema{"a": {Items: &framework.OASSchema{Ref: "#/components/schemas/b"}}},
	}})
	keepReferences(resp)
	doc, err := framework.NewOASDocumentFromMap(resp.Data["openapi"].(map[string]any)) // as Vault does
	require.NoError(t, err)
	require.Equal(t, "#/components/schemas/b", doc.Components.Schemas["a"].Items.Ref)
}

// --- Links ---

var (
	fence      = regexp.MustCompile("(?ms)^ *(```|~~~).*?^ *(```|~~~) *$")
	inlineCode = regexp.MustCompile("``.+?``|`[^`\n]+`")
	link       = regexp.MustCompile(`\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"[^"]*")?\)`)
	htmlLink   = regexp.MustCompile(`(?:src|href|srcset)="([^"]+)"`)
	heading    = regexp.MustCompile(`(?m)^#{1,6} +(.+?) *#* *$`)
)

func TestDocs_LinksResolve(t *testing.T) {
	t.Parallel()
	var pages []string
	require.NoError(t, filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == ".git" || path == "bin" || path == "dist" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".md") {
			pages = append(pages, path)
		}
		return nil
	}))
	require.Greater(t, len(pages), 5)
	checked := 0
	for _, page := range pages {
		content, err := os.ReadFile(page)
		require.NoError(t, err)
		text := fence.ReplaceAllString(string(content), "")
		targets := htmlLink.FindAllStringSubmatch(inlineCode.ReplaceAllString(text, ""), -1)
		// A link's text may be code, but code contains no links.
		text = inlineCode.ReplaceAllStringFunc(text, func(code string) string { return strings.Repeat("x", len(code)) })
		for _, m := range append(targets, link.FindAllStringSubmatch(text, -1)...) {
			checked++
			if problem := checkLink(page, m[1]); problem != "" {
				t.Errorf("%s: link %q: %s", page, m[1], problem)
			}
		}
	}
	require.Greater(t, checked, 20, "the links were not found")
}

// The dashboard's panels and the alerts link to existing pages.
func TestLinks_PanelsAndAlertsLeadToPages(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("deploy/grafana/openai.json")
	require.NoError(t, err)
	type target struct{ URL string }
	var dashboard struct {
		Links  []target
		Panels []struct {
			Type, Title, Description string
			Links                    []target
		}
	}
	require.NoError(t, json.Unmarshal(content, &dashboard))
	check := func(title, url string) {
		page, found := strings.CutPrefix(url, "${docs}/")
		require.True(t, found, "%s: %s", title, url)
		require.Empty(t, checkLink("docs/metrics.md", page), "%s: %s", title, url)
	}
	for _, p := range dashboard.Panels {
		if p.Type == "row" {
			continue
		}
		require.Greater(t, len(strings.Fields(p.Description)), 4, "%s: no description", p.Title)
		require.NotEmpty(t, p.Links, "%s: no link", p.Title)
		for _, l := range p.Links {
			check(p.Title, l.URL)
		}
	}
	for _, l := range dashboard.Links {
		check("dashboard", l.URL)
	}

	rules, err := os.ReadFile("deploy/prometheus/openai-alerts.yml")
	require.NoError(t, err)
	alerts := strings.Split(string(rules), "- alert: ")[1:]
	require.NotEmpty(t, alerts)
	for _, alert := range alerts {
		name, _, _ := strings.Cut(alert, "\n")
		runbook := regexp.MustCompile(`(?m)^ +runbook_url: (\S+)$`).FindStringSubmatch(alert)
		require.NotNil(t, runbook, "%s: no runbook_url", name)
		require.Empty(t, checkLink("README.md", runbook[1]), "%s: %s", name, runbook[1])
	}
}

// checkLink returns the problem of a link on a page, "" if there is none. It does not
// contact other sites.
func checkLink(page, target string) string {
	u, err := url.Parse(target)
	switch {
	case err != nil:
		return err.Error()
	case u.Scheme == "http" || u.Scheme == "https":
		if u.Host == "" || !strings.Contains(u.Host, ".") {
			return "has no host"
		}
		return ""
	case u.Scheme != "":
		return "has scheme " + u.Scheme
	case strings.HasPrefix(u.Path, "/"):
		return "is absolute; a checkout may be anywhere"
	}
	file := page
	if u.Path != "" {
		file = filepath.Join(filepath.Dir(page), filepath.FromSlash(u.Path))
	}
	info, err := os.Stat(file)
	if err != nil {
		return "there is no " + file
	}
	if u.Fragment == "" {
		return ""
	}
	if info.IsDir() || !strings.HasSuffix(file, ".md") {
		return file + " has no headings"
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	seen := map[string]int{}
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(string(content), ""), -1) {
		s := slug(m[1])
		seen[s]++
		if n := seen[s]; n > 1 {
			s += "-" + strconv.Itoa(n-1)
		}
		if s == u.Fragment {
			return ""
		}
	}
	return fmt.Sprintf("%s has no heading #%s", file, u.Fragment)
}

// slug is the anchor that GitHub and GitLab give a heading.
func slug(text string) string {
	text = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(text, "$1")
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ' || r == '-':
			return '-'
		case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, text)
}
