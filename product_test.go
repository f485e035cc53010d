package openaisecrets

import (
	"context"
	"encoding/json"
	"net/http"
	"regexp"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

const baoVersion = "2.6.2"

// baoEnv is the environment of a plugin on OpenBao.
func baoEnv(name string) string { return map[string]string{envOpenBao: baoVersion}[name] }

// onOpenBao is a mount on OpenBao.
func onOpenBao(t *testing.T) *harness {
	t.Helper()
	t.Setenv(envOpenBao, baoVersion)
	h := newHarness(t, openaitest.Options{})
	h.system.PluginEnvironment = &logical.PluginEnvironment{VaultVersion: baoVersion}
	h.restart()
	h.holdStatic()
	return h
}

// answersWithHints returns the errors, warnings and help of a mount that name commands.
func answersWithHints(h *harness) (texts []string) {
	said := func(resp *logical.Response, err error) {
		h.t.Helper()
		require.NoError(h.t, err)
		require.NotNil(h.t, resp)
		if resp.IsError() {
			texts = append(texts, resp.Error().Error())
		}
		texts = append(texts, resp.Warnings...)
	}
	said(h.read("creds/none"))
	said(h.write("roles/app", fields{"project_id": h.project, "nonsense": 1}))
	h.configure(nil)
	said(h.read("creds/none"))
	said(h.read("static-creds/none"))
	said(h.write("rotate-role/none", nil))
	said(h.write("roles/app", nil))
	said(h.write("static-roles/batch", fields{"rotation_period": "24h"}))
	said(h.write("roles/app", fields{"project_id": "proj_other"}))
	said(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "disable_automated_rotation": true}))
	h.check()
	h.byHand("batch", missingKey)
	h.daily()
	said(h.read("static-creds/batch"))
	h.must(h.remove("static-roles/batch"))
	for _, path := range []string{"", "roles/app", "config", "projects", "tidy"} {
		resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Path: path, Storage: h.storage, MountPoint: "openai/"})
		require.NoError(h.t, err)
		encoded, err := json.Marshal(resp.Data)
		require.NoError(h.t, err)
		texts = append(texts, string(encoded))
	}
	return texts
}

// Not parallel, since it changes the environment of the process.
func TestProduct_HintsNameTheServersCLI(t *testing.T) {
	vault := func(t *testing.T) *harness {
		t.Helper()
		h := newHarness(t, openaitest.Options{})
		h.holdStatic()
		return h
	}
	for name, c := range map[string]struct {
		mount       func(*testing.T) *harness
		cli, others string
	}{
		"Vault":   {vault, "vault", "bao"},
		"OpenBao": {onOpenBao, "bao", "vault"},
	} {
		t.Run(name, func(t *testing.T) {
			h := c.mount(t)
			hint := func(cli string) string { return "(?:[\"`]|\\$ )" + cli + ` (?:read|write|list|path-help|delete)` }
			named := 0
			for _, text := range answersWithHints(h) {
				require.NotRegexp(t, hint(c.others), text)
				if regexp.MustCompile(hint(c.cli)).MatchString(text) {
					named++
				}
			}
			require.GreaterOrEqual(t, named, 12)
			h.runPeriodicWork()
		})
	}
}

func TestProduct_TheUserAgentNamesTheServer(t *testing.T) {
	for name, c := range map[string]struct {
		mount func(*testing.T) *harness
		want  string
	}{
		"Vault":   {func(t *testing.T) *harness { return newHarness(t, openaitest.Options{}) }, `^vault-plugin-secrets-openai/\S+ Vault/1\.21\.2\+ent \(\+https://www\.vaultproject\.io/; vault-plugin-secrets-openai; go`},
		"OpenBao": {onOpenBao, `^vault-plugin-secrets-openai/\S+ OpenBao/2\.6\.2 \(\+https://openbao\.org/; vault-plugin-secrets-openai; go`},
	} {
		t.Run(name, func(t *testing.T) {
			h := c.mount(t)
			agents := make(chan string, 100)
			h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, OnStrike: func(r *http.Request) { agents <- r.UserAgent() }})
			h.configure(nil)
			require.Regexp(t, c.want, <-agents)
		})
	}
}

func TestProduct_OnlyCommandsOfTheCLIAreReplaced(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`run "vault list openai/roles" to list roles`: `run "bao list openai/roles" to list roles`,
		"run `vault read a/b`":                        "run `bao read a/b`",
		"    $ vault write openai/config":             "    $ bao write openai/config",
		"another Vault restores it":                   "another Vault restores it",
		`service account "vault-app-1"`:               `service account "vault-app-1"`,
		"another vault read it":                       "another vault read it",
	} {
		require.Equal(t, want, withCLI(text))
	}
}

func TestProduct_TheCLIHasAName(t *testing.T) {
	t.Parallel()
	require.Equal(t, "bao", cli(baoEnv))
	require.Equal(t, "vault", cli(func(string) string { return "" }))
}
