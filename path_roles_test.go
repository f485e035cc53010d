package openaisecrets

import (
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestRoles_WriteReadListDelete(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	require.Empty(t, h.must(h.list("roles/")).Data["keys"])

	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Equal(t, map[string]any{
		"project_id":                    h.project,
		"service_account_name_template": defaultNameTemplate,
		"service_account_description":   "",
		"ttl":                           int64(3600),
		"max_ttl":                       int64(86400),
	}, h.must(h.read("roles/app")).Data)

	h.must(h.write("roles/app", map[string]any{"service_account_description": "for the app", "ttl": "30m"}))
	data := h.must(h.read("roles/app")).Data
	require.Equal(t, "for the app", data["service_account_description"])
	require.EqualValues(t, 1800, data["ttl"])
	require.EqualValues(t, 86400, data["max_ttl"], "a partial write keeps the rest")
	require.Equal(t, h.project, data["project_id"])

	h.must(h.write("roles/team.b-1", map[string]any{"project_id": h.project, "max_ttl": "10m"}))
	require.EqualValues(t, 600, h.must(h.read("roles/team.b-1")).Data["ttl"], "the default ttl is no longer than max_ttl")
	for _, at := range []string{"roles", "roles/"} {
		require.Equal(t, []string{"app", "team.b-1"}, h.must(h.list(at)).Data["keys"])
	}
	h.must(h.remove("roles/app"))
	h.must(h.remove("roles/app"))
	resp, err := h.read("roles/app")
	require.NoError(t, err)
	require.Nil(t, resp)
}

func TestRoles_BadInput(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	archived := h.sim.AddProject("old")
	h.sim.ArchiveProject(archived)
	huge := strings.Repeat("x", 1<<20)

	for name, test := range map[string]struct {
		data map[string]any
		said string
	}{
		"no project":               {map[string]any{"ttl": "1h"}, "project_id is required"},
		"empty project":            {map[string]any{"project_id": ""}, "project_id is required"},
		"unknown project":          {map[string]any{"project_id": "proj_unknown"}, "vault list openai/projects"},
		"archived project":         {map[string]any{"project_id": archived}, "is archived"},
		"project with a slash":     {map[string]any{"project_id": "../admin_api_keys"}, "not an identifier"},
		"huge project":             {map[string]any{"project_id": huge}, "project_id"},
		"project not UTF-8":        {map[string]any{"project_id": "proj_\xff"}, "UTF-8"},
		"project with control":     {map[string]any{"project_id": "proj_\x07"}, "control character"},
		"ttl over max_ttl":         {map[string]any{"ttl": "2h", "max_ttl": "1h"}, "ttl 2h0m0s is longer than max_ttl 1h0m0s"},
		"ttl over default max_ttl": {map[string]any{"ttl": "25h"}, "longer than max_ttl 24h"},
		"negative ttl":             {map[string]any{"ttl": "-1s"}, "ttl"},
		"negative max_ttl":         {map[string]any{"max_ttl": -5}, "max_ttl"},
		"overflowing ttl":          {map[string]any{"ttl": "99999999999999999h"}, "ttl"},
		"fraction of a second":     {map[string]any{"max_ttl": "400ms"}, "max_ttl must be whole seconds"},
		"endless random":           {map[string]any{"service_account_name_template": "{{random 300000000}}{{.RandomSuffix}}"}, "random takes a length"},
		"nonsense ttl":             {map[string]any{"ttl": "tomorrow"}, "ttl"},
		"template without suffix":  {map[string]any{"service_account_name_template": "vault-{{.RoleName}}"}, `must contain {{.RandomSuffix}} unchanged`},
		"template cutting suffix":  {map[string]any{"service_account_name_template": "{{.RandomSuffix | truncate 4}}"}, `it gives "ab3d"`},
		"template unknown field":   {map[string]any{"service_account_name_template": "{{.Nope}}{{.RandomSuffix}}"}, "Nope"},
		"template syntax":          {map[string]any{"service_account_name_template": "{{.RandomSuffix"}, "service_account_name_template"},
		"huge template":            {map[string]any{"service_account_name_template": huge}, "limit"},
		"template with control":    {map[string]any{"service_account_name_template": "{{.RandomSuffix}}\n"}, "control character"},
		"huge description":         {map[string]any{"service_account_description": huge}, "limit"},
		"unknown field":            {map[string]any{"scopes": "api.model.read"}, `unknown field: "scopes"`},
	} {
		if _, ok := test.data["project_id"]; !ok && name != "no project" {
			test.data["project_id"] = h.project
		}
		said := h.refused(h.write("roles/app", test.data))
		require.Contains(t, said, test.said, name)
		resp, err := h.read("roles/app")
		require.NoError(t, err)
		require.Nil(t, resp, name)
	}
	require.Contains(t, h.refused(h.write("roles/"+strings.Repeat("r", 40000), map[string]any{"project_id": h.project})), "the limit is 128")
}

func TestRoles_ProjectIsNotCheckedWithoutAnAdminKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	resp := h.must(h.write("roles/app", map[string]any{"project_id": "proj_later"}))
	require.Contains(t, resp.Warnings[0], "was not checked")
	require.Contains(t, h.refused(h.write("roles/app", map[string]any{"service_account_name_template": "x"})), "RandomSuffix")
}

func TestRoles_OutageIsNotTheCallersFault(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	h.sim.Fail(openaitest.Fault{Status: 500, Message: "we broke"})
	_, err := h.write("roles/app", map[string]any{"project_id": h.project})
	require.ErrorContains(t, err, "we broke")
}

func TestRoles_LongMaxTTLIsWarnedOf(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	resp := h.must(h.write("roles/app", map[string]any{"project_id": h.project, "max_ttl": "1000h"}))
	require.Contains(t, resp.Warnings[0], "max_lease_ttl of the mount")
	h.system.MaxLeaseTTLVal = 100000 * time.Hour
	resp = h.must(h.write("roles/app", map[string]any{"max_ttl": "9000h"}))
	require.Contains(t, resp.Warnings[0], "longer than a key can live at OpenAI")
	lease := h.lease("creds/app", nil)
	require.Equal(t, maxLease, lease.Secret.MaxTTL)
	require.NoError(t, h.revoke(lease))
}

func TestAccountName(t *testing.T) {
	t.Parallel()
	data := nameData{RoleName: "app", DisplayName: "oidc-Zoë@example.com", ProjectID: "proj_1", UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn"}
	long := data
	long.RoleName = strings.Repeat("r", 300)
	for template, want := range map[string]string{
		defaultNameTemplate:                              "vault-app-ab3defghij4klmn",
		"{{.DisplayName}}-{{.RandomSuffix}}":             "oidc-Zo-@example.com-ab3defghij4klmn",
		"{{.ProjectID}}/{{.UnixTime}}/{{.RandomSuffix}}": "proj_1-1767225600-ab3defghij4klmn",
		"{{.RandomSuffix}}-{{.RoleName | uppercase}}":    "ab3defghij4klmn-APP",
		"  {{.RandomSuffix}} {{.UnixTime}}  ":            "ab3defghij4klmn 1767225600",
	} {
		got, err := accountName(template, data)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, template := range []string{defaultNameTemplate, "{{.RandomSuffix}}{{.RoleName}}", "{{.RoleName}}{{.RandomSuffix}}{{.RoleName}}"} {
		got, err := accountName(template, long)
		require.NoError(t, err)
		require.Len(t, got, maxNameLength)
		require.Contains(t, got, data.RandomSuffix, "the suffix survives truncation")
	}
}

func FuzzAccountName(f *testing.F) {
	f.Add(defaultNameTemplate, "app", "token")
	f.Add("{{.RandomSuffix}}{{.DisplayName | truncate 3}}", "ä", "\xff")
	f.Add("{{range $i, $e := .RoleName}}{{end}}{{.RandomSuffix}}", "a", "b")
	f.Add(`{{printf "%100d" 1}}{{.RandomSuffix}}`, "a", "b")
	allowed := regexp.MustCompile(`^[A-Za-z0-9 ._@-]+$`)
	f.Fuzz(func(t *testing.T, template, role, display string) {
		if checkText("template", template) != "" || strings.Contains(template, "random") || regexp.MustCompile(`[0-9]{4}`).MatchString(template) {
			t.Skip() // random and printf take a length that would only cost time here
		}
		const suffix = "ab3defghij4klmn"
		name, err := accountName(template, nameData{RoleName: role, DisplayName: display, ProjectID: "proj_1", RandomSuffix: suffix})
		if err != nil {
			return
		}
		if !strings.Contains(name, suffix) || utf8.RuneCountInString(name) > maxNameLength || !allowed.MatchString(name) {
			t.Fatalf("template %q gives %q", template, name)
		}
	})
}
