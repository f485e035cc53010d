package naming

import (
	"fmt"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/hashicorp/vault/sdk/helper/template"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/internal/text"
)

// allowedTemplates use every allowed construct.
var allowedTemplates = []string{
	DefaultTemplate, StaticTemplate,
	"{{.DisplayName}}-{{.RandomSuffix}}",
	"{{.ProjectID}}/{{.UnixTime}}/{{.RandomSuffix}}",
	"{{.RandomSuffix}}-{{.RoleName | uppercase}}",
	"  {{.RandomSuffix}} {{.UnixTime}}  ",
	`{{.RoleName | truncate 20}}-{{.DisplayName | lowercase | truncate 40}}-{{.UnixTime}}-{{.RandomSuffix}}`,
	`{{/* a comment */}}{{- "a" -}}  {{.RandomSuffix}}{{- /* another */ -}}  x`,
	`{{if .DisplayName}}{{.DisplayName}}-{{end}}{{.RandomSuffix}}`,
	`{{if eq .RoleName "app" "batch"}}a-{{.RandomSuffix}}{{else if ne .ProjectID "x"}}b-{{.RandomSuffix}}{{else}}{{.RandomSuffix}}{{end}}`,
	`{{if and (not (eq (len .DisplayName) 3)) (or .RoleName .ProjectID)}}x{{end}}{{.RandomSuffix}}`,
	`{{.DisplayName | truncate_sha256 12}}-{{.DisplayName | sha256 | truncate 8}}-{{.RandomSuffix}}`,
	`{{.DisplayName | truncate 4096}}-{{truncate 1 "Zoë"}}{{.RandomSuffix}}`,
	`{{.DisplayName | replace "@" "_" | replace "" "."}}-{{.RandomSuffix}}`,
	`{{.RoleName | base64 | lowercase}}-{{"ıſK" | uppercase}}-{{.RandomSuffix}}`,
	`{{printf "%s-%08d-%s" .RoleName .UnixTime .RandomSuffix}}`,
	`{{printf "%-*s|%.*s|%[1]T|%64v|%5.1f|%q|%%|%x" 20 .RoleName 3 .DisplayName .UnixTime 1.25 "q" .RoleName}}-{{.RandomSuffix}}`,
	`{{printf "%*d %d%% %!" 12 .UnixTime 5}}-{{printf "%d"}}-{{printf "x" 1 2}}-{{printf "%[9]d" 1}}-{{.RandomSuffix}}`,
	`{{printf "%[2]*[1]d" 1 9}}{{printf "%t %c %U" true 'x' 'y'}}{{1}}{{0x1F}}{{1.5}}{{1i}}{{true}}{{"é"}}-{{.RandomSuffix}}`,
	"{{printf `%s` (printf `%s` (printf `%s` ((((.RandomSuffix))))))}}",
	`{{or "" .RandomSuffix}}{{not true}}{{len "abc"}}`,
	"vault-é世界-{{.RandomSuffix}}",
}

func TestNameTemplate_MatchesVaultsTemplates(t *testing.T) {
	t.Parallel()
	for _, data := range []Data{
		{RoleName: "app", DisplayName: "oidc-Zoë@example.com", ProjectID: "proj_1", UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn"},
		{RoleName: strings.Repeat("r", 128), DisplayName: "", ProjectID: "x", UnixTime: 1, RandomSuffix: "z9yxw8vutsrq7po"},
	} {
		for _, text := range allowedTemplates {
			if data.UnixTime == 1 && strings.Contains(text, "*") {
				continue
			}
			vaults, err := template.NewTemplate(template.Template(text))
			require.NoError(t, err, text)
			want, err := vaults.Generate(data)
			require.NoError(t, err, text)
			parsed, err := parseTemplate(text)
			require.NoError(t, err, text)
			got, err := parsed.render(data)
			require.NoError(t, err, text)
			require.Equal(t, want, got, text)
		}
	}
	for _, text := range allowedTemplates {
		require.NoError(t, Check(text, "app", "proj_1"), text)
	}
	// The results of these differ each time.
	for text, want := range map[string]string{"{{random 64}}": "^[0-9A-Za-z]{64}$", "{{unix_time}}": "^[0-9]{10}$"} {
		parsed, err := parseTemplate(text)
		require.NoError(t, err)
		got, err := parsed.render(Data{})
		require.NoError(t, err)
		require.Regexp(t, want, got)
	}
}

// fmt rejects a larger width, so UnixTime as the width of a * is harmless.
func TestNameTemplate_FmtWidthLimit(t *testing.T) {
	t.Parallel()
	require.Equal(t, "%!(BADWIDTH)1", fmt.Sprintf("%*d", maxFmtWidth+1, 1))
	require.Equal(t, "%!(BADWIDTH)1", fmt.Sprintf("%*d", -maxFmtWidth-1, 1))
}

// The most expensive templates are the longest, with values at the limit or just over it
// at each step.
func TestNameTemplate_WorstCaseIsCheap(t *testing.T) { // not parallel: allocations of other tests count, too
	fill := func(before, step, after string) string {
		return before + strings.Repeat(step, (text.MaxLen-len(before)-len(after)-len("{{.RandomSuffix}}"))/len(step)) + after + "{{.RandomSuffix}}"
	}
	sixty := strings.Repeat("a", 60)
	full := `{{replace "" "` + sixty + `" "` + sixty + `"` // about 3.7 KiB
	wide := strings.Repeat("ɐ", 30)                        // grows by half in upper case
	templates := []string{
		nestedDefine(),
		fill("", "{{.RoleName}}", ""),
		fill("", "{{random 64}}", ""),
		fill("", "{{1}}", ""),
		strings.Repeat("{{if 1}}", 66) + "{{.RandomSuffix}}" + strings.Repeat("{{end}}", 66),
		fill("{{", "(", ""),
		fill(`{{1 | printf "%*d"`, " 1", "}}"),
		fill(full, "|uppercase|lowercase", "|len}}"),
		fill(full, `|printf "%s"`, "|len}}"),
		fill(full, `|replace "a" "b"`, "|len}}"),
		fill(full, `|replace "" "`+sixty+`"`, "|len}}"),
		fill(full, `|sha256|base64`, "|len}}"),
		fill(full, `|base64`, "|len}}"),
		fill(full, `|printf "%# x"`, "|len}}"),
		fill(full, `|printf "%# [1]x%# [1]x%# [1]x%# [1]x"`, "|len}}"),
		fill(`{{replace "" "`+wide+`" "`+wide+`"`, "|uppercase|lowercase", "|len}}"),
		fill(`{{printf "`, "%64d", `" 1}}`),
		fill(`{{printf "`, "%.64f", `" 1e308}}`),
		fill(`{{printf (replace "" "%[1].64f" "`+strings.Repeat("a", 300)+`") 1e308|len}}`, "x", ""),
		fill("", full+"|printf|len}}", ""),
		fill(`{{if eq 1 `, ` 2`, `}}{{end}}`),
	}
	data := Data{RoleName: strings.Repeat("r", 128), DisplayName: strings.Repeat("%# x", 1<<18), ProjectID: "proj_1", UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn"}
	templates = append(templates, `{{printf .DisplayName .DisplayName}}{{.RandomSuffix}}`, fill("{{printf .DisplayName", " .DisplayName", "}}"), fill("", "{{.DisplayName}}", ""))
	for _, source := range templates {
		require.LessOrEqual(t, len(source), text.MaxLen)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		name, err := Name(source, data)
		runtime.ReadMemStats(&after)
		parsedTemplates.Remove(source)
		t.Logf("%7d bytes in %5d allocations: %.60s: %.100s %v", after.TotalAlloc-before.TotalAlloc, after.Mallocs-before.Mallocs, source, name, err)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20), source)
		require.Less(t, after.Mallocs-before.Mallocs, uint64(20_000), source)
	}
}

func TestNameTemplate_RejectsForbiddenConstructs(t *testing.T) {
	t.Parallel()
	for template, said := range forbiddenTemplates() {
		err := Check(template, "app", "proj_1")
		require.ErrorContains(t, err, said, template)
		require.Less(t, len(err.Error()), 500, "%s: an error does not quote the whole template", template)
	}
}

func TestAccountName(t *testing.T) {
	t.Parallel()
	data := Data{RoleName: "app", DisplayName: "oidc-Zoë@example.com", ProjectID: "proj_1", UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn"}
	long := data
	long.RoleName = strings.Repeat("r", 300)
	for template, want := range map[string]string{
		DefaultTemplate:                                  "vault-app-ab3defghij4klmn",
		StaticTemplate:                                   "vault-static-app-ab3defghij4klmn",
		"{{.DisplayName}}-{{.RandomSuffix}}":             "oidc-Zo-@example.com-ab3defghij4klmn",
		"{{.ProjectID}}/{{.UnixTime}}/{{.RandomSuffix}}": "proj_1-1767225600-ab3defghij4klmn",
		"{{.RandomSuffix}}-{{.RoleName | uppercase}}":    "ab3defghij4klmn-APP",
		"  {{.RandomSuffix}} {{.UnixTime}}  ":            "ab3defghij4klmn 1767225600",
	} {
		got, err := Name(template, data)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, template := range []string{DefaultTemplate, "{{.RandomSuffix}}{{.RoleName}}", "{{.RoleName}}{{.RandomSuffix}}{{.RoleName}}"} {
		got, err := Name(template, long)
		require.NoError(t, err)
		require.Len(t, got, MaxLength)
		require.Contains(t, got, data.RandomSuffix, "the suffix survives truncation")
	}
	endless := data
	endless.DisplayName = strings.Repeat("%1000000d", 1<<20)
	got, err := Name("{{.DisplayName}}-{{.RandomSuffix}}", endless)
	require.NoError(t, err)
	require.Len(t, got, MaxLength)
	_, err = Name("{{printf .DisplayName 1}}-{{.RandomSuffix}}", endless)
	require.ErrorContains(t, err, errWidth.Error())
}

func FuzzNameTemplate(f *testing.F) {
	for _, text := range allowedTemplates {
		f.Add(text, "app", "token", int64(1767225600))
	}
	for text := range forbiddenTemplates() {
		f.Add(text, "ä", "\xff%100d", int64(5))
	}
	allowed := regexp.MustCompile(`^[A-Za-z0-9 ._@-]+$`)
	f.Fuzz(func(t *testing.T, text, role, display string, at int64) {
		const suffix = "ab3defghij4klmn"
		data := Data{RoleName: role, DisplayName: display, ProjectID: "proj_1", UnixTime: at, RandomSuffix: suffix}
		parsed, err := parseTemplate(text)
		if err != nil {
			return
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		rendered, err := parsed.render(data)
		runtime.ReadMemStats(&after)
		if spent := after.TotalAlloc - before.TotalAlloc; spent > 2<<20 { // including the fuzzer's
			t.Fatalf("template %q takes %d bytes", text, spent)
		}
		if len(rendered) > maxText {
			t.Fatalf("template %q renders %d bytes", text, len(rendered))
		}
		if err != nil {
			return
		}
		name, err := Name(text, data)
		if err != nil {
			return
		}
		if !strings.Contains(name, suffix) || utf8.RuneCountInString(name) > MaxLength || !allowed.MatchString(name) {
			t.Fatalf("template %q renders %q", text, name)
		}
	})
}

// nestedDefine recurses through as many ifs as fit into 970 bytes. Without a
// check it overflows the stack, which ends the process.
func nestedDefine() string {
	const depth = 60
	return `{{define "a"}}` + strings.Repeat("{{if 1}}", depth) + `{{template "a"}}` + strings.Repeat("{{end}}", depth) + `{{end}}{{template "a"}}{{.RandomSuffix}}`
}

// forbiddenTemplates are rejected in a write and in a stored role, each with an error
// that names the problem.
func forbiddenTemplates() map[string]string {
	const suffix = "{{.RandomSuffix}}"
	long := strings.Repeat("a", 60)
	return map[string]string{
		nestedDefine(): `"define"`,
		`{{if ne .UnixTime 1767225600}}{{range 1500000000}}{{end}}{{end}}` + suffix: `"range"`,
		`{{printf "%1000000s" .RoleName}}` + suffix:                                 "printf widths",
		`{{replace "" "aaaaaaaaaa" .RoleName | replace "" "` + long + `"}}` + suffix + `{{.RoleName | replace "" "` + long + `" | replace "" "` + long + `"}}`: "replace returns",
		`{{.RoleName` + strings.Repeat(" | base64", 40) + `}}` + suffix:                                                                                        "base64 returns",

		// Loops, other templates and variables.
		`{{range 3}}x{{end}}` + suffix:                                     `"range"`,
		`{{range $i, $e := .RoleName}}{{end}}` + suffix:                    `"range"`,
		`{{with .RoleName}}{{.}}{{end}}` + suffix:                          `"with"`,
		`{{if .RoleName}}{{else with .DisplayName}}x{{end}}` + suffix:      "<with>",
		`{{define "x"}}{{end}}` + suffix:                                   `"define"`,
		`{{define "` + templateName + `"}}{{end}}` + suffix:                "the limit is",
		`{{block "x" .}}b{{end}}` + suffix:                                 `"block"`,
		`{{template "x"}}` + suffix:                                        `"template"`,
		`{{if false}}{{template "` + "x" + `" .RoleName}}{{end}}` + suffix: `"template"`,
		`{{$x := 1}}` + suffix:                                             "variable $x",
		`{{$x := .RoleName}}{{$x}}` + suffix:                               "variable $x",
		`{{if $x := .RoleName}}y{{end}}` + suffix:                          "variable $x",
		`{{$}}` + suffix:                                                   "variable $",
		`{{$.RoleName}}` + suffix:                                          "variable $.RoleName",
		`{{break}}` + suffix:                                               "break",

		// Data other than the five fields.
		`{{.}}` + suffix:                                             "the dot",
		`{{printf "%v" .}}` + suffix:                                 "the dot",
		`{{.RoleName.Foo}}` + suffix:                                 "field .RoleName.Foo",
		`{{.UnixTime.String}}` + suffix:                              "field .UnixTime.String",
		`{{.roleName}}` + suffix:                                     "field .roleName",
		`{{.RandomSuffix.Len}}` + suffix:                             "field .RandomSuffix.Len",
		`{{(.RoleName).Foo}}` + suffix:                               "(.RoleName).Foo",
		`{{if eq .UnixTime 1}}{{.Nope}}{{end}}` + suffix:             "field .Nope",
		`{{nil}}` + suffix:                                           "nil",
		`{{printf "%v" nil}}` + suffix:                               "nil",
		`{{.RoleName "argument"}}` + suffix:                          "RoleName",
		`{{.RandomSuffix}}{{.Ünïcode}}`:                              "field .Ünïcode",
		`{{len (printf "%s" .RoleName.Foo)}}` + suffix:               "field .RoleName.Foo",
		`{{not (eq (len .DisplayName.X) 1) | printf "%v"}}` + suffix: "field .DisplayName.X",

		// Functions that are not allowed.
		`{{index .RoleName 0}}` + suffix:                        `function "index"`,
		`{{slice .RoleName 0 1}}` + suffix:                      `function "slice"`,
		`{{call .RoleName}}` + suffix:                           `function "call"`,
		`{{.RoleName | html}}` + suffix:                         `function "html"`,
		`{{.RoleName | js}}` + suffix:                           `function "js"`,
		`{{urlquery .RoleName}}` + suffix:                       `function "urlquery"`,
		`{{print .RoleName}}` + suffix:                          `function "print"`,
		`{{println .RoleName}}` + suffix:                        `function "println"`,
		`{{if lt .UnixTime 1}}x{{end}}` + suffix:                `function "lt"`,
		`{{if ge .UnixTime 1}}x{{end}}` + suffix:                `function "ge"`,
		`{{timestamp "2006"}}` + suffix:                         `function "timestamp"`,
		`{{uuid}}` + suffix:                                     `function "uuid"`,
		`{{nosuch .RoleName}}` + suffix:                         `function "nosuch"`,
		`{{if and false (index .RoleName 9)}}x{{end}}` + suffix: `function "index"`,

		// Sizes.
		`{{.RoleName | printf "%*d" 1000000}}` + suffix:                                                         "printf widths",
		`{{printf "%[1]*d" 1000000}}` + suffix:                                                                  "printf widths",
		`{{printf "%[2]*[1]d" 1 65}}` + suffix:                                                                  "printf widths",
		`{{printf "%.*d" 999999 1}}` + suffix:                                                                   "printf widths",
		`{{printf "%.1000000d" 1}}` + suffix:                                                                    "printf widths",
		`{{printf "%-065d" 1}}` + suffix:                                                                        "printf widths",
		`{{printf "%99999999999999999999d" 1}}` + suffix:                                                        "printf widths",
		`{{printf "%5%%1000000d" 1}}` + suffix:                                                                  "printf does not allow options",
		`{{printf "%5-%%%1000000d" 1}}` + suffix:                                                                "printf does not allow options",
		`{{printf "%+-# 0.1000000f" 1.5}}` + suffix:                                                             "printf widths",
		`{{printf (printf "%%%dd" 1000000) 1}}` + suffix:                                                        "printf widths",
		`{{len (printf "%1000000s" "")}}` + suffix:                                                              "printf widths",
		`{{if eq (printf "%1000000d" 1) (printf "%1000000d" 2)}}x{{end}}` + suffix:                              "printf widths",
		`{{printf "` + strings.Repeat("%[1]s", 150) + `" .RandomSuffix}}` + suffix:                              "printf may return",
		`{{printf "` + strings.Repeat("%64[1]d", 70) + `" 1}}` + suffix:                                         "printf returns",
		`{{random 65}}` + suffix:                                                                                "random requires a length",
		`{{random -1}}` + suffix:                                                                                "random requires a length",
		strings.Repeat(`{{random 64}}`, 74) + suffix:                                                            "the name is longer than",
		`{{replace "a" "` + strings.Repeat("a", 100) + `" "` + strings.Repeat("a", 100) + `"}}` + suffix:        "replace returns",
		`{{replace .RoleName (replace "" "` + long + `" "` + long + `") .RoleName | replace "" "xx"}}` + suffix: "replace returns",
		`{{truncate 0 .RoleName}}` + suffix:                                                                     "max length must be > 0",
		`{{truncate 99999999999999999999 .RoleName}}` + suffix:                                                  "99999999999999999999",
		`{{truncate_sha256 8 .RoleName}}` + suffix:                                                              "max length must be > 8",
		strings.Repeat("(", 2000) + suffix:                                                                      "the limit is",
		"{{" + strings.Repeat("(", 1100) + suffix:                                                               "the limit is",
		"{{" + strings.Repeat("(", 600) + suffix:                                                                "unexpected",
		"{{" + strings.Repeat("(", 400):                                                                         "unclosed",

		// A suffix that is missing in a branch, or changed.
		`vault-{{.RoleName}}`:                                                             "must contain {{.RandomSuffix}} unchanged",
		`{{if .RoleName}}{{.RandomSuffix}}{{end}}`:                                        "a branch of",
		`{{if ne .UnixTime 1767225600}}x{{else}}{{.RandomSuffix}}{{end}}`:                 "must contain",
		`{{if eq .UnixTime 1}}x{{else}}{{.RandomSuffix}}{{end}}`:                          "a branch of",
		`{{if eq .DisplayName "token"}}{{.RandomSuffix}}{{else}}x{{end}}`:                 "must contain",
		`{{if .RoleName}}{{.RandomSuffix}}{{else if .ProjectID}}{{.RandomSuffix}}{{end}}`: "a branch of",
		`{{/* {{.RandomSuffix}} */}}`:                                                     "must contain",
		`{{.RandomSuffix | uppercase}}`:                                                   "must contain",
		`{{.RandomSuffix | truncate 4}}`:                                                  "must contain",
		`{{"{{.RandomSuffix}}"}}`:                                                         "must contain",
	}
}

func TestUses(t *testing.T) {
	for text, want := range map[string]bool{
		"{{.RandomSuffix}}-{{.DisplayName}}":                                     true,
		"{{.RandomSuffix}}-{{ truncate 5 (lowercase .DisplayName) }}":            true,
		"{{if .DisplayName}}a-{{.RandomSuffix}}{{else}}{{.RandomSuffix}}{{end}}": true,
		"{{.RandomSuffix}}{{if .RoleName}}{{.DisplayName}}{{end}}":               true,
		"{{.RandomSuffix}}{{if .RoleName}}a{{else}}{{.DisplayName}}{{end}}":      true,
		"{{.RandomSuffix}}-DisplayName":                                          false,
		"{{.RandomSuffix}}-{{\".DisplayName\"}}":                                 false,
		"{{.RandomSuffix}}{{/* .DisplayName */}}":                                false,
		DefaultTemplate:  false,
		"{{.DisplayName": false,
	} {
		if Uses(text, "DisplayName") != want {
			t.Errorf("%s: %t", text, !want)
		}
	}
}
