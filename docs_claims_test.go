package openaisecrets

// The pages name the tests that verify them: "held by" follows a claim, and "run by"
// precedes a block of commands.

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var (
	testComment = regexp.MustCompile(`<!-- (held|run) by: (.+?) -->`)
	testName    = regexp.MustCompile(`\bTest[A-Z]\w*`)
	testFunc    = regexp.MustCompile(`(?m)^func (Test[A-Z]\w*)\(`)
	anyTest     = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Example)[A-Z]\w*)\(`)
	section     = regexp.MustCompile(`(?m)^## .*$`)
)

// files returns the paths of the module's files with this suffix.
func files(t *testing.T, suffix string) (paths []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (path == "bin" || path == "dist" || d.Name() == ".git"):
			return filepath.SkipDir
		case !d.IsDir() && strings.HasSuffix(path, suffix):
			paths = append(paths, path)
		}
		return nil
	}))
	return paths
}

func TestDocs_TheTestsThatPagesNameExist(t *testing.T) {
	t.Parallel()
	exists := map[string]bool{}
	for _, path := range files(t, "_test.go") {
		code, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, m := range testFunc.FindAllSubmatch(code, -1) {
			exists[string(m[1])] = true
		}
	}
	named := 0
	for _, path := range files(t, ".md") {
		page, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, comment := range testComment.FindAllStringSubmatch(string(page), -1) {
			names := testName.FindAllString(comment[2], -1)
			if len(names) == 0 {
				t.Errorf("%s: no test in %s", path, comment[0])
			}
			for _, name := range names {
				named++
				if !exists[name] {
					t.Errorf("%s: %s does not exist", path, name)
				}
			}
		}
	}
	require.Greater(t, named, 30, "the comments were not found")
}

// make test runs the tests that tables selects without the race detector, from this
// package only, and skips them everywhere else.
func TestDocs_TheTablesOfMakeTestAreInThisPackage(t *testing.T) {
	t.Parallel()
	script, err := os.ReadFile("scripts/test.sh")
	require.NoError(t, err)
	said := regexp.MustCompile(`(?m)^tables='(.+)'$`).FindSubmatch(script)
	require.NotNil(t, said)
	parts := map[string]*regexp.Regexp{}
	for part := range strings.SplitSeq(string(said[1]), "|") {
		parts[part] = regexp.MustCompile(part)
	}
	unused := maps.Clone(parts)
	for _, path := range files(t, "_test.go") {
		if strings.HasPrefix(path, "test/integration/") || strings.HasPrefix(path, "tools/release/") {
			continue // they always run completely
		}
		code, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, m := range anyTest.FindAllSubmatch(code, -1) {
			for part, pattern := range parts {
				if !pattern.Match(m[1]) {
					continue
				}
				delete(unused, part)
				if filepath.Dir(path) != "." {
					t.Errorf("%s: make test does not run %s, since %q in tables selects it", path, m[1], part)
				}
			}
		}
	}
	require.Empty(t, unused, "these parts of tables select no test")
}

// Each item of these sections of the README names a test.
func TestDocs_EachPromiseOfTheReadmeHasATest(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("README.md")
	require.NoError(t, err)
	promises := []string{"## What makes it different", "## Security"}
	headings := section.FindAllStringIndex(string(page), -1)
	checked := 0
	for i, at := range headings {
		if !slices.Contains(promises, string(page[at[0]:at[1]])) {
			continue
		}
		end := len(page)
		if i+1 < len(headings) {
			end = headings[i+1][0]
		}
		for _, item := range strings.Split(string(page[at[1]:end]), "\n- ")[1:] {
			checked++
			if !strings.Contains(item, "<!-- held by: ") {
				t.Errorf("README.md: no test for: %s", item)
			}
		}
	}
	require.Greater(t, checked, 5, "the promises were not found")
}

var goFile = regexp.MustCompile("`([\\w/.-]+\\.go)`")

func TestDocs_TheFilesThatPagesNameExist(t *testing.T) {
	t.Parallel()
	all := files(t, ".go")
	named := 0
	for _, path := range files(t, ".md") {
		page, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, m := range goFile.FindAllStringSubmatch(string(page), -1) {
			named++
			if !slices.ContainsFunc(all, func(p string) bool { return strings.HasSuffix("/"+filepath.ToSlash(p), "/"+m[1]) }) {
				t.Errorf("%s: there is no file %s", path, m[1])
			}
		}
	}
	require.Greater(t, named, 20, "the names were not found")
}

var (
	storageConst = regexp.MustCompile(`(?m)^\s*(?:const )?\w+(?:StorageKey|StoragePrefix|RolePrefix)\s*= "([^"]+)"`)
	kindConst    = regexp.MustCompile(`(?m)^\s+wal\w+\s*= "([a-z_]+)"`)
)

// The architecture page names each storage key and each kind of WAL entry.
func TestDocs_TheArchitectureNamesWhatIsStored(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("docs/architecture.md")
	require.NoError(t, err)
	page := string(content)
	keys, kinds := 0, 0
	for _, path := range files(t, ".go") {
		if strings.ContainsRune(filepath.ToSlash(path), '/') || strings.HasSuffix(path, "_test.go") {
			continue
		}
		code, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, m := range storageConst.FindAllSubmatch(code, -1) {
			keys++
			require.Regexp(t, "`"+regexp.QuoteMeta(string(m[1]))+"(<[a-z]+>)?`", page, "a storage key of %s", path)
		}
		if path != "wal_index.go" {
			continue
		}
		for _, m := range kindConst.FindAllSubmatch(code, -1) {
			kinds++
			require.Contains(t, page, "`"+string(m[1])+"`", "a kind of WAL entry")
		}
	}
	require.GreaterOrEqual(t, keys, 8, "the storage keys were not found")
	require.GreaterOrEqual(t, kinds, 5, "the kinds of WAL entries were not found")
}

// No test runs on OpenBao, so its page gives the evidence for each statement: measured,
// read or tested.
func TestDocs_EachStatementOnOpenBaoSaysHowItIsKnown(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("docs/openbao.md")
	require.NoError(t, err)
	require.LessOrEqual(t, len(strings.Fields(string(content))), 1200, "words")
	_, page, _ := strings.Cut(string(content), "\n## Install\n")
	page, _, _ = strings.Cut(page, "\n## Not checked\n")
	known := regexp.MustCompile(`\b(measured|read|tested)\b[^|.]*(\)|\|)`)
	whole := regexp.MustCompile(`\(measured, all of this table\)`)
	inTable, fenced, statements := false, false, 0
	for line := range strings.Lines(page) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
			continue
		}
		if whole.MatchString(line) {
			inTable = true
		} else if strings.HasPrefix(line, "#") {
			inTable = false
		}
		row := strings.HasPrefix(line, "|")
		if fenced || line == "" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, "<!--") || strings.HasPrefix(line, "|---") || row && inTable {
			continue
		}
		if header := row && (strings.HasSuffix(line, "Known by |") || strings.HasSuffix(line, "Do |")); header || regexp.MustCompile(`^\d\. `).MatchString(line) || strings.HasPrefix(line, "[The end of") {
			continue
		}
		statements++
		if !known.MatchString(line) {
			t.Errorf("docs/openbao.md: neither measured nor read: %s", line)
		}
	}
	require.Greater(t, statements, 25)
}
