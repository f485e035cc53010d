package openaisecrets

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

// nestedDefine overflows the stack, and crashes the process, if it is executed.
func nestedDefine() string {
	const depth = 60
	return `{{define "a"}}` + strings.Repeat("{{if 1}}", depth) + `{{template "a"}}` + strings.Repeat("{{end}}", depth) + `{{end}}{{template "a"}}{{.RandomSuffix}}`
}

// forbiddenTemplates has one template of each kind that internal/naming rejects; the test
// of that package has all of them.
func forbiddenTemplates() map[string]string {
	const suffix = "{{.RandomSuffix}}"
	return map[string]string{
		nestedDefine(): `"define"`,
		`{{if ne .UnixTime 1767225600}}{{range 1500000000}}{{end}}{{end}}` + suffix: `"range"`,
		`{{printf "%1000000s" .RoleName}}` + suffix:                                 "printf widths",
		`{{$x := 1}}` + suffix:                       "variable $x",
		`{{.RoleName.Foo}}` + suffix:                 "field .RoleName.Foo",
		`{{index .RoleName 0}}` + suffix:             `function "index"`,
		strings.Repeat(`{{random 64}}`, 74) + suffix: "the name is longer than",
		`{{.RoleName}}`:                              "must contain",
	}
}

func TestNameTemplate_InvalidTemplatesAreRejectedAtTheWrite(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	for template, said := range forbiddenTemplates() {
		got := h.refused(h.write("roles/app", map[string]any{"project_id": "proj_1", "service_account_name_template": template}))
		require.Contains(t, got, "service_account_name_template", template)
		require.Contains(t, got, said, template)
		require.Less(t, len(got), 600, "%s: an error does not quote the whole template", template)
		resp, err := h.read("roles/app")
		require.NoError(t, err)
		require.Nil(t, resp, template)
	}
}

func TestNameTemplate_AStoredInvalidTemplateAffectsOnlyItsRole(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	storedRole := func(template string) {
		r, err := getRole(t.Context(), h.storage, "app")
		require.NoError(t, err)
		r.NameTemplate = template
		entry, err := logical.StorageEntryJSON(roleStoragePrefix+"app", r)
		require.NoError(t, err)
		require.NoError(t, h.storage.Put(t.Context(), entry))
		h.restart() // like an upgrade that adds the rule
	}
	templates := forbiddenTemplates()
	templates["{{.RandomSuffix}}"+strings.Repeat("x", text.MaxLen)] = "the limit is"
	templates["{{.RandomSuffix}}"+strings.Repeat("{{if 1}}", 100_000)+strings.Repeat("{{end}}", 100_000)] = "the limit is"
	kept, revoked := h.lease("creds/app", nil), h.lease("creds/app", nil)
	before := len(h.sim.Accounts())
	h.b.Cleanup(t.Context())
	for template, said := range templates {
		if strings.Contains(said, "a branch of") || strings.Contains(said, "must contain") {
			continue // it depends on the data of each name
		}
		storedRole(template)
		got := h.refused(h.read("creds/app"))
		require.Contains(t, got, "service_account_name_template", template)
		require.Contains(t, got, said, template)
		resp := h.must(h.read("roles/app"))
		require.Equal(t, template, resp.Data["service_account_name_template"])
	}
	require.Len(t, h.sim.Accounts(), before)
	require.Empty(t, h.walEntries())

	storedRole(nestedDefine())
	_, err := h.renew(context.Background(), kept, time.Minute, time.Hour)
	require.NoError(t, err)
	require.NoError(t, h.revoke(revoked))
	h.must(h.write("tidy", map[string]any{"apply": true}))
	h.runPeriodicWork()
	require.NoError(t, h.revoke(kept))

	require.Contains(t, h.refused(h.write("roles/app", map[string]any{"ttl": "5m"})), `"define" or "block" is not allowed`)
	h.must(h.write("roles/app", map[string]any{"service_account_name_template": naming.DefaultTemplate}))
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	storedRole(nestedDefine())
	h.must(h.remove("roles/app"))
}

// A template that drops the suffix for some data is detected before anything is
// created.
func TestNameTemplate_ABranchWithoutASuffixCreatesNoAccount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("roles/app", map[string]any{"service_account_name_template": `{{if eq .DisplayName "userpass-alice"}}{{truncate 4 .RandomSuffix}}{{else}}{{.RandomSuffix}}{{end}}`}))
	require.Contains(t, h.refused(h.read("creds/app")), "must contain {{.RandomSuffix}} unchanged")
	require.Empty(t, h.sim.Accounts())
	require.Empty(t, h.walEntries())
}
