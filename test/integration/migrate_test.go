//go:build integration

package integration

// A mount migrates from the community plugin to this one, as docs/migrate.md
// describes. The community plugin does not run here: a version of this plugin takes
// its place in the catalog, and the test writes the community plugin's data through
// sys/raw into the mount's storage and into the leases.

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// raw accesses Vault's storage by sys/raw.
type raw struct {
	t      *testing.T
	client *api.Client
}

func (r raw) read(at string) string {
	r.t.Helper()
	secret, err := r.client.Logical().ReadWithContext(r.t.Context(), "sys/raw/"+at)
	require.NoError(r.t, err)
	require.NotNil(r.t, secret, at)
	return secret.Data["value"].(string)
}

func (r raw) write(at, value string) {
	r.t.Helper()
	_, err := r.client.Logical().WriteWithContext(r.t.Context(), "sys/raw/"+at, map[string]any{"value": value})
	require.NoError(r.t, err)
}

// clear deletes everything under a prefix.
func (r raw) clear(prefix string) {
	r.t.Helper()
	list, err := r.client.Logical().ListWithContext(r.t.Context(), "sys/raw/"+prefix)
	require.NoError(r.t, err)
	if list == nil {
		return
	}
	for _, name := range list.Data["keys"].([]any) {
		if at := prefix + name.(string); strings.HasSuffix(at, "/") {
			r.clear(at)
		} else {
			_, err := r.client.Logical().DeleteWithContext(r.t.Context(), "sys/raw/"+at)
			require.NoError(r.t, err)
		}
	}
}

// golden reads a file written by hand from that plugin's source.
func (u *upgrade) golden(name string, replace ...string) string {
	u.t.Helper()
	root, err := devenv.Root()
	require.NoError(u.t, err)
	content, err := os.ReadFile(filepath.Join(root, "testdata", "community", name))
	require.NoError(u.t, err)
	return strings.NewReplacer(replace...).Replace(string(content))
}

// communityLease issues a lease and rewrites it as the community plugin's.
func (u *upgrade) communityLease(r raw, role string) lease {
	u.t.Helper()
	l := u.creds(role)
	at := "sys/expire/id/" + l.id
	var entry map[string]any
	require.NoError(u.t, json.Unmarshal([]byte(r.read(at)), &entry))
	secret := entry["secret"].(map[string]any)
	ids := secret["internal_data"].(map[string]any)
	var want map[string]any
	require.NoError(u.t, json.Unmarshal([]byte(u.golden("lease.json")), &want))
	for field := range want {
		require.Contains(u.t, ids, field)
	}
	for field := range ids {
		if _, theirs := want[field]; !theirs {
			delete(ids, field)
		}
	}
	require.Contains(u.t, secret, "renewable")
	secret["renewable"] = false
	encoded, err := json.Marshal(entry)
	require.NoError(u.t, err)
	r.write(at, string(encoded))
	return l
}

func TestAMountOfTheCommunityPluginIsTakenOver(t *testing.T) {
	runParallel(t)
	opts := serverOptions()
	opts.Config = "raw_storage_endpoint = true"
	v, err := devenv.Start(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, v.Stop()) })
	r := raw{t: t, client: v.Client()} // not recorded: its responses hold keys
	v.WrapTransport = answers.record
	u := newMove(t, v, "migrate.md")
	require.NoError(t, v.Register(t.Context(), u.old))
	require.NoError(t, u.client.Sys().MountWithContext(t.Context(), u.path, &api.MountInput{Type: devenv.PluginName, Config: api.MountConfigInput{PluginVersion: u.old.Version}}))
	t.Cleanup(func() { u.requireNoSecretWritten(u.sim.Secrets()...) })
	u.write("config", u.adminConfig())
	u.role("my-app", "1h", "24h")
	first, second := u.communityLease(r, "my-app"), u.communityLease(r, "my-app")

	storage := "logical/" + u.mountTable()["uuid"].(string) + "/"
	adminID, admin := u.sim.AdminKey()
	r.clear(storage)
	r.write(storage+"config", u.golden("config.json", "sk-admin-golden", admin, "key_1", adminID, "org-1", u.sim.OrganizationID(), "https://api.openai.com/v1", u.sim.URL()))
	r.write(storage+"roles/my-app", u.golden("role.json", "proj_1", u.project))
	r.write(storage+"roles/team", u.golden("role.json", "proj_1", u.project, "{{.RoleName}}", "{{.ProjectName}}"))

	u.run("vault plugin register")
	u.run("tune -plugin-version=v0.2.0")
	u.waitForVersion(u.new, u.new.Version)
	out := u.run("vault read openai/config")
	require.Contains(t, out, "request_timeout 30")
	require.Contains(t, out, "my-app team")
	require.Contains(t, out, "effective_max_ttl 24h")
	_, err = u.client.Logical().Read(u.path + "/creds/team")
	requireStatus(t, http.StatusBadRequest, err)
	require.ErrorContains(t, err, ".ProjectName")

	_, err = u.client.Sys().RenewWithContext(t.Context(), first.id, 0)
	require.ErrorContains(t, err, "lease is not renewable")
	require.NoError(t, u.revoke(first))
	require.Equal(t, http.StatusUnauthorized, infer(t, u.sim, first.key))
	require.False(t, u.leased(first))

	u.run("vault write -f openai/config/rotate")
	require.NotEqual(t, adminID, u.read("config").Data["admin_api_key_id"])
	require.Contains(t, u.run("vault lease revoke -sync -prefix"), "expires_at")
	require.Equal(t, http.StatusUnauthorized, infer(t, u.sim, second.key))
	require.Contains(t, u.run("service_account_name_template="), "Success")
	require.Contains(t, u.run("vault list sys/leases/lookup"), "my-app")

	issued := u.creds("my-app")
	require.True(t, issued.renewable)
	require.Equal(t, http.StatusOK, infer(t, u.sim, issued.key))
	u.keepAdminKey()
	require.NoError(t, u.client.Sys().UnmountWithContext(t.Context(), u.path))
	require.Empty(t, u.alive())
}
