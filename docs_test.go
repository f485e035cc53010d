package openaisecrets

// The documentation is held against the code: the API reference is what the
// paths say of themselves, every error has an entry in the troubleshooting
// page, and every link leads somewhere. Its commands are run by the integration
// tests.

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

//go:generate go test -run ^TestAPIReferenceIsUpToDate$ -count=1 . -update

var update = flag.Bool("update", false, "write docs/api.md instead of comparing it")

// --- The API reference ---

func TestAPIReferenceIsUpToDate(t *testing.T) {
	const page = "docs/api.md"
	want := apiReference(newBackend())
	if *update {
		require.NoError(t, os.WriteFile(page, want, 0o644))
		return
	}
	have, err := os.ReadFile(page)
	require.NoError(t, err)
	require.Equal(t, string(want), string(have), "%s is not what the paths say: run go generate .", page)
}

const apiPreamble = `# API reference

<!-- Made by "go generate ." from the engine's own paths. Change it there. -->

Paths are relative to the mount, ` + "`openai/`" + ` here. ` + "`vault path-help openai/<path>`" + ` says the same on a server. Over HTTP, put ` + "`/v1/`" + ` in front of the path; a list is a GET with ` + "`?list=true`" + `. Durations are sent as seconds or as text such as ` + "`90m`" + `, whole seconds only, and read as seconds; times are RFC 3339 or null. A write with an unknown field is refused; [what a value means](configure.md#what-a-value-means) is the same for all fields. A write or delete without data answers 204, or 200 if it has warnings.

What the fields are for is in [configure.md](configure.md), [roles.md](roles.md), [static-roles.md](static-roles.md), [rotation.md](rotation.md) and [tidy.md](tidy.md); what can go wrong is in [troubleshooting.md](troubleshooting.md).
`

func apiReference(b *backend) []byte {
	var out bytes.Buffer
	out.WriteString(apiPreamble)
	out.WriteString("\n| Path | |\n|---|---|\n")
	for _, p := range b.Paths {
		title := readablePath(p.Pattern)
		fmt.Fprintf(&out, "| [`%s`](#%s) | %s |\n", title, slug("`"+title+"`"), p.HelpSynopsis)
	}
	for _, p := range b.Paths {
		writePath(&out, p)
	}
	return out.Bytes()
}

var namedGroup = regexp.MustCompile(`\(\?P<(\w+)>.*\)$`)

// readablePath is a path's pattern as a reader writes it.
func readablePath(pattern string) string {
	return "openai/" + namedGroup.ReplaceAllString(strings.TrimSuffix(pattern, "/?$"), "<$1>")
}

// operationWords are Vault's commands for the operations, in this order.
var operationWords = []struct {
	operation     logical.Operation
	command, http string
}{
	{logical.ListOperation, "vault list", http.MethodGet + " ?list=true"},
	{logical.ReadOperation, "vault read", http.MethodGet},
	{logical.CreateOperation, "", ""}, // with update
	{logical.UpdateOperation, "vault write", http.MethodPost},
	{logical.DeleteOperation, "vault delete", http.MethodDelete},
}

func writePath(out *bytes.Buffer, p *framework.Path) {
	fmt.Fprintf(out, "\n## `%s`\n\n%s\n", readablePath(p.Pattern), strings.TrimSpace(p.HelpDescription))
	out.WriteString("\n| Command | HTTP | |\n|---|---|---|\n")
	for _, w := range operationWords {
		if handler, ok := p.Operations[w.operation]; ok && w.command != "" {
			fmt.Fprintf(out, "| `%s` | `%s` | %s |\n", w.command, w.http, handler.Properties().Summary)
		}
	}
	if len(p.Fields) > 0 {
		out.WriteString("\n### Fields of " + "`" + readablePath(p.Pattern) + "`" + "\n\n| Field | Type | |\n|---|---|---|\n")
		for _, name := range slices.Sorted(maps.Keys(p.Fields)) {
			f := p.Fields[name]
			notes := cell(f.Description)
			if len(f.AllowedValues) > 0 {
				var values []string
				for _, v := range f.AllowedValues {
					values = append(values, fmt.Sprintf("`%v`", v))
				}
				notes += " One of " + strings.Join(values, ", ") + "."
			}
			if f.Default != nil {
				notes += fmt.Sprintf(" Default: `%v`.", f.Default)
			}
			switch {
			case strings.Contains(p.Pattern, "(?P<"+name+">"):
				notes = "In the path. " + notes
			case f.Required:
				notes = "Required. " + notes
			}
			fmt.Fprintf(out, "| `%s` | %s | %s |\n", name, f.Type, notes)
		}
	}
	shown := map[string]bool{}
	for _, w := range operationWords {
		handler, ok := p.Operations[w.operation]
		if !ok {
			continue
		}
		responses := handler.Properties().Responses
		for _, status := range slices.Sorted(maps.Keys(responses)) {
			for _, r := range responses[status] {
				text := answer(status, r)
				if shown[text] { // of read and update alike
					continue
				}
				shown[text] = true
				out.WriteString(text)
			}
		}
	}
}

// answer documents one answer, for one without data in one line.
func answer(status int, r framework.Response) string {
	var out strings.Builder
	fmt.Fprintf(&out, "\n**%d %s:** %s\n", status, http.StatusText(status), r.Description)
	if len(r.Fields) > 0 {
		out.WriteString("\n| Field | Type | |\n|---|---|---|\n")
		for _, name := range slices.Sorted(maps.Keys(r.Fields)) {
			fmt.Fprintf(&out, "| `%s` | %s | %s |\n", name, r.Fields[name].Type, cell(r.Fields[name].Description))
		}
	}
	return out.String()
}

// cell is a text as it may stand in a table: what looks like HTML would vanish.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "\n", " ").Replace(text)
}

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

// --- The troubleshooting page ---

// internalErrors are texts that say that something else is wrong than what an
// operator could mend or look up by them.
var internalErrors = []string{
	"an empty list of scopes would allow all of them", // the caller of the client asks for nothing else
	"neither scopes nor expiry to change",
	"the expiry is negative",
	"missing required … parameter",                      // IDs are checked before
	"the base URL is not an absolute http or https URL", // checked before
	"the CA bundle holds no certificate",
	"unknown error",
}

// A message is a text that the code can say, with … for what it fills in.
type message struct{ text, at string }

var verb = regexp.MustCompile(`%(\[\d+\])?[-+# 0]*(\d+)?(\.\d+)?[vTtbcdoOqxXUeEfFgGspw]`)

// parts are the fixed parts of a text.
func parts(text string) []string {
	var all []string
	for _, part := range strings.Split(text, "…") {
		if part = strings.Trim(part, " :;,.()\"`"); part != "" {
			all = append(all, part)
		}
	}
	return all
}

// distinctive is the longest fixed part of a text, "" when none says anything.
func distinctive(text string) string {
	longest := ""
	for _, part := range parts(text) {
		// A single word is a field's name, or joins two others.
		if strings.Contains(part, " ") && len(part) > max(len(longest), 7) {
			longest = part
		}
	}
	return longest
}

// TestTroubleshooting_CoversEveryMessage holds the page against every text with
// which this engine answers, and the texts of the page against the code.
func TestTroubleshooting_CoversEveryMessage(t *testing.T) {
	page, err := os.ReadFile("docs/troubleshooting.md")
	require.NoError(t, err)
	entries := troubleshootingEntries(t, string(page))
	said := append(messages(t, "."), messages(t, "client")...)
	leaves, err := filepath.Glob("internal/*")
	require.NoError(t, err)
	for _, leaf := range leaves {
		said = append(said, messages(t, leaf)...)
	}
	require.Greater(t, len(said), 100, "the messages were not found")

	for _, m := range said {
		want := distinctive(m.text)
		if want == "" || slices.Contains(internalErrors, m.text) {
			continue
		}
		if !slices.ContainsFunc(entries, func(entry string) bool {
			begin := distinctive(entry) // of a long message the page may have less
			return strings.Contains(entry, want) || (len(begin) >= 30 && strings.Contains(m.text, begin))
		}) {
			t.Errorf("%s: no entry in docs/troubleshooting.md for: %s", m.at, m.text)
		}
	}
	for _, entry := range entries {
		want := distinctive(entry)
		if want == "" || !slices.ContainsFunc(said, func(m message) bool { return strings.Contains(m.text, want) }) {
			t.Errorf("docs/troubleshooting.md: nothing in the code says: %s", entry)
		}
	}
	for _, internal := range internalErrors {
		if !slices.ContainsFunc(said, func(m message) bool { return m.text == internal }) {
			t.Errorf("internalErrors: nothing in the code says: %s", internal)
		}
	}
}

// troubleshootingEntries are the messages in the first column of the page's
// tables, each with a second column that says something. What follows the
// heading "Said by others" is not this engine's.
func troubleshootingEntries(t *testing.T, page string) []string {
	t.Helper()
	own, _, found := strings.Cut(page, "\n## Said by others")
	require.True(t, found)
	var entries []string
	for line := range strings.Lines(own) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if !strings.HasPrefix(line, "| `") || len(cells) < 2 {
			continue
		}
		if strings.TrimSpace(cells[len(cells)-1]) == "" {
			t.Errorf("docs/troubleshooting.md: no remedy: %s", line)
		}
		for _, span := range inlineCode.FindAllString(cells[0], -1) {
			entries = append(entries, strings.Trim(span, "`"))
		}
	}
	return entries
}

// speaking are the calls whose arguments reach a caller, an operator or a log's
// field "error".
var speaking = []string{"ErrorResponse", "Errorf", "New", "AddWarning", "mistake", "upstream", "CodedError", "Fprintf", "refuse", "failure"}

// messages are the texts that a package's code can answer with: arguments of
// the calls above, what functions return as a string or put into a variable,
// and what is added to a list of warnings.
func messages(t *testing.T, dir string) []message {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	fset := token.NewFileSet()
	var parsed []*ast.File
	var local []ast.Expr
	constants := map[string]string{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		parsed = append(parsed, file)
	}
	for range 2 { // a constant may use one of a later file
		local = nil
		for _, file := range parsed {
			ast.Inspect(file, func(n ast.Node) bool {
				if spec, ok := n.(*ast.ValueSpec); ok {
					for i, value := range spec.Values {
						text, ok := literal(value, constants)
						if !ok || i >= len(spec.Names) {
							continue
						}
						name := spec.Names[i].Name
						if name == "op" || name == "what" { // several functions have their own, and say it
							local = append(local, value)
							continue
						}
						constants[name] = text
					}
				}
				return true
			})
		}
	}
	var all []message
	say := func(e ast.Expr) {
		if text, ok := literal(e, constants); ok {
			all = append(all, message{verb.ReplaceAllString(strings.ReplaceAll(text, "%%", "%"), "…"), fset.Position(e.Pos()).String()})
		}
	}
	for _, value := range local {
		say(value)
	}
	for _, file := range parsed {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				name := calledName(n)
				switch {
				case slices.Contains(speaking, name):
					for _, arg := range n.Args {
						say(arg)
					}
				case name == "append" && len(n.Args) == 2:
					say(n.Args[1])
				}
			case *ast.ReturnStmt:
				for _, result := range n.Results {
					say(result)
				}
			case *ast.AssignStmt:
				for _, value := range n.Rhs {
					say(value)
				}
			case *ast.KeyValueExpr: // of a client.Error
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Message" {
					say(n.Value)
				}
			}
			return true
		})
	}
	return all
}

func calledName(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		return f.Sel.Name
	}
	return ""
}

// literal is the text of an expression as far as it is written in the code,
// with … for the rest; false when nothing of it is.
func literal(e ast.Expr, constants map[string]string) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind != token.STRING {
			return "", false
		}
		text, err := strconv.Unquote(e.Value)
		return text, err == nil
	case *ast.Ident:
		text, ok := constants[e.Name]
		return text, ok
	case *ast.ParenExpr:
		return literal(e.X, constants)
	case *ast.CallExpr:
		if name := calledName(e); (name == "Sprintf" || name == "mistake" || name == "upstream") && len(e.Args) > 0 {
			return literal(e.Args[0], constants)
		}
		return "", false
	case *ast.BinaryExpr:
		left, okLeft := literal(e.X, constants)
		right, okRight := literal(e.Y, constants)
		if e.Op != token.ADD || (!okLeft && !okRight) {
			return "", false
		}
		if !okLeft {
			left = "…"
		}
		if !okRight {
			right = "…"
		}
		return left + right, true
	}
	return "", false
}

// --- Links ---

var (
	fence      = regexp.MustCompile("(?ms)^ *(```|~~~).*?^ *(```|~~~) *$")
	inlineCode = regexp.MustCompile("``.+?``|`[^`\n]+`")
	link       = regexp.MustCompile(`\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"[^"]*")?\)`)
	htmlLink   = regexp.MustCompile(`(?:src|href|srcset)="([^"]+)"`)
	heading    = regexp.MustCompile(`(?m)^#{1,6} +(.+?) *#* *$`)
)

func TestLinksLeadSomewhere(t *testing.T) {
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
		// A link's text may be code, but a link in code is none.
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

// checkLink says what is wrong with a link on a page, "" when nothing is.
// Another site is not asked.
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
