//go:build integration

package integration

// Costs as finance teams and operators get them: the real CLI, entities of the real
// identity store, and the records that are left after kills.

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// spend adds a cost of a credential's key, dated today.
func (m *mount) spend(secret *api.Secret, amount string) {
	m.sim.AddCost(m.project, secret.Data["api_key_id"].(string), "gpt-6, input_tokens", m.sim.Now(), amount)
}

// The output of the CLI matches docs/usage.md: its field names and amounts, and no nested
// value.
func TestUsageInATerminal(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	m.write("static-roles/batch", map[string]any{"project_id": m.project, "rotation_period": "24h"})
	t.Cleanup(func() { _, _ = m.client.Logical().Delete(m.path + "/static-roles/batch") })
	m.spend(m.read("creds/my-app"), "12")
	m.spend(m.read("creds/my-app"), "0.340012")
	m.spend(m.read("static-creds/batch"), "3.5")
	m.sim.AddCost(m.project, "key_of_a_person", "gpt-6, input_tokens", m.sim.Now(), "0.25")

	out, err := m.vaultCLI("read", m.path+"/usage")
	require.NoError(t, err, out)
	require.NotContains(t, out, "map[")
	root, err := devenv.Root()
	require.NoError(t, err)
	page, err := os.ReadFile(filepath.Join(root, "docs", "usage.md"))
	require.NoError(t, err)
	shown := regexp.MustCompile(`(?s)\$ vault read openai/usage\n(.*?)` + "```").FindSubmatch(page)
	require.NotNil(t, shown)
	times := regexp.MustCompile(`\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?`)
	require.Equal(t, times.ReplaceAllString(strings.TrimSpace(string(shown[1])), "…"), times.ReplaceAllString(strings.TrimSpace(out), "…"))

	out, err = m.vaultCLI("read", "-field=total", m.path+"/usage")
	require.NoError(t, err)
	require.Equal(t, "16.090012", strings.TrimSpace(out))
	out, err = m.vaultCLI("read", "-format=json", m.path+"/usage", "format=json")
	require.NoError(t, err)
	var nested struct {
		Data struct {
			Rows []struct{ Group, Cost string }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &nested), out)
	require.Equal(t, []struct{ Group, Cost string }{{"my-app", "12.340012"}, {"static-roles/batch", "3.5"}}, nested.Data.Rows)
	out, err = m.vaultCLI("read", m.path+"/usage", "group_by=team")
	require.Error(t, err)
	require.Contains(t, out, `group_by "team" is unknown; use role, entity`)
}

// The metadata of real entities yields a team's costs, and the table adds up.
func TestUsageByTeamAndAsATable(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("my-app", "1h", "24h")
	sys := m.client.Logical()
	auth := "userpass-" + m.path
	require.NoError(t, m.client.Sys().EnableAuthWithOptions(auth, &api.EnableAuthOptions{Type: "userpass"}))
	t.Cleanup(func() { _ = m.client.Sys().DisableAuth(auth) })
	require.NoError(t, m.client.Sys().PutPolicy(m.path, `path "`+m.path+`/creds/my-app" { capabilities = ["read"] }`))
	mounted, err := m.client.Sys().ListAuth()
	require.NoError(t, err)
	gone := ""
	for name, team := range map[string]string{"alice": "search", "bob": "search", "carol": "=1+1"} {
		_, err := sys.Write("auth/"+auth+"/users/"+name, map[string]any{"password": name, "token_policies": m.path})
		require.NoError(t, err)
		entity, err := sys.Write("identity/entity", map[string]any{"name": m.path + name, "metadata": map[string]string{"team": team}})
		require.NoError(t, err)
		id := entity.Data["id"].(string)
		if name == "carol" {
			gone = id
		}
		_, err = sys.Write("identity/entity-alias", map[string]any{"name": name, "canonical_id": id, "mount_accessor": mounted[auth+"/"].Accessor})
		require.NoError(t, err)
		login, err := sys.Write("auth/"+auth+"/login/"+name, map[string]any{"password": name})
		require.NoError(t, err)
		client, err := m.client.Clone()
		require.NoError(t, err)
		client.SetToken(login.Auth.ClientToken)
		secret, err := client.Logical().Read(m.path + "/creds/my-app")
		require.NoError(t, err)
		m.spend(secret, map[string]string{"alice": "12", "bob": "0.340012", "carol": "1"}[name])
	}
	m.spend(m.read("creds/my-app"), "0.5") // the root token has no entity
	m.sim.AddCost(m.project, "", "", m.sim.Now(), "0.000000000001")

	out, err := m.vaultCLI("read", m.path+"/usage", "group_by=metadata:team")
	require.NoError(t, err, out)
	require.Regexp(t, `(?m)^cost_search +12\.340012$`, out)
	require.Regexp(t, `(?m)^cost_\(none\) +0\.5$`, out)
	out, err = m.vaultCLI("read", m.path+"/usage", "group_by=display_name")
	require.NoError(t, err, out)
	require.Regexp(t, `(?m)^cost_`+auth+`-alice +12$`, out)

	out, err = m.vaultCLI("read", "-format=raw", m.path+"/usage", "group_by=metadata:team", "format=csv")
	require.NoError(t, err, out)
	lines, err := csv.NewReader(strings.NewReader(out)).ReadAll()
	require.NoError(t, err, out)
	var cells [][]string
	for _, line := range lines {
		cells = append(cells, line[2:5])
	}
	require.Equal(t, [][]string{{"metadata:team", "name", "cost_usd"}, {"search", "", "12.340012"}, {"'=1+1", "", "1"}, {"(none)", "", "0.5"}, {"(unattributed)", "", "0.000000000001"}}, cells)

	// A deleted entity appears with its ID: no other entity gets its costs.
	_, err = sys.Delete("identity/entity/id/" + gone)
	require.NoError(t, err)
	_, err = m.client.Sys().ReloadPlugin(&api.ReloadPluginInput{Plugin: devenv.PluginName}) // clears the cached entities
	require.NoError(t, err)
	out, err = m.vaultCLI("read", m.path+"/usage", "group_by=metadata:team")
	require.NoError(t, err, out)
	require.Regexp(t, `(?m)^cost_`+gone+` +1$`, out)
}

// If the plugin is killed before the records are written, the costs of their keys are
// unattributed until the renewal or the revocation of each lease, and the total stays
// correct. Written records survive a kill of Vault.
func TestUsageOutlivesKills(t *testing.T) {
	m := newMountOn(t, ownVault(t))
	m.role("r", "1h", "24h")
	// A different period each time, so that no report is cached.
	days := 0
	report := func() map[string]any {
		days++
		start := m.sim.Now().UTC().AddDate(0, 0, -days).Format(time.DateOnly)
		var secret *api.Secret
		require.Eventually(t, func() (ok bool) {
			var err error
			secret, err = m.client.Logical().ReadWithData(m.path+"/usage", map[string][]string{"start": {start}})
			return err == nil && secret != nil
		}, time.Minute, 100*time.Millisecond)
		require.Equal(t, "3", secret.Data["total"])
		return secret.Data
	}
	first, second := m.read("creds/r"), m.read("creds/r")
	m.spend(first, "1")
	m.spend(second, "2")
	require.Equal(t, "3", report()["cost_r"])
	_, err := m.vault.KillPlugins()
	require.NoError(t, err)
	require.Equal(t, "3", report()["unattributed"], "killed before the records were written")
	_, err = m.client.Sys().Renew(first.LeaseID, 3600)
	require.NoError(t, err)
	require.Equal(t, "1", report()["cost_r"])
	require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: second.LeaseID, Sync: true}))
	require.Equal(t, "3", report()["cost_r"])
	require.Equal(t, "0", report()["unattributed"])

	time.Sleep(35 * time.Second) // until written
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	require.NoError(t, m.vault.Kill())
	require.NoError(t, m.vault.Restart(ctx))
	require.Equal(t, "3", report()["cost_r"])
	status, err := tryKey(m.sim, first.Data["api_key"].(string))
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status)
}
