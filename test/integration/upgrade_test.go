//go:build integration

package integration

// Two versions of the plugin on one Vault. A mount moves between them in both
// directions, as docs/upgrades.md describes: each version serves and deletes what
// the other created. The page also describes pins and a missing binary, so these
// tests cover Vault's behavior with both.
//
// The tests read the operator's commands from the page, so it shows only commands
// that were run.

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

const (
	accountsRoute = "/organization/projects/{project_id}/service_accounts"
	accountRoute  = accountsRoute + "/{service_account_id}"

	pinPath = "sys/plugins/pins/secret/" + devenv.PluginName

	// periodicTimeout is long enough for Vault's next periodic call and the work that the
	// engine does in it.
	periodicTimeout = 90 * time.Second
	// walTimeout is when the WAL processes a lost create, plus a tick.
	walTimeout = 2*time.Minute + periodicTimeout
	// delay is how long superseded keys stay valid: longer than it takes to move
	// the mount, so that the other version finds them.
	delay = 90 * time.Second
)

// upgrade is a mount at openai/ and the two versions that the page names.
type upgrade struct {
	*mount
	old, new devenv.Plugin
	env      []string
	commands []string // from the page's blocks for this test

	hand, team string // accounts created by hand, for a static role and for leased keys
}

func newUpgrade(t *testing.T) *upgrade {
	t.Helper()
	u := newMove(t, ownVault(t), "upgrades.md")
	u.start()
	return u
}

// newMove builds two versions of the plugin and reads the commands of a page.
func newMove(t *testing.T, v *devenv.Vault, page string) *upgrade {
	t.Helper()
	u := &upgrade{mount: &mount{t: t, vault: v, client: v.Client(), path: "openai", sim: openaitest.Start(t, openaitest.Options{})}}
	u.project = u.sim.AddProject("apps")
	t.Logf("on %s", v)
	var err error
	u.env, err = v.CLIEnv()
	require.NoError(t, err)
	root, err := devenv.Root()
	require.NoError(t, err)
	content, err := os.ReadFile(filepath.Join(root, "docs", page))
	require.NoError(t, err)
	for _, block := range docsBlocks(t, "docs/"+page, string(content)) {
		if strings.Contains(block.mark, strings.Split(t.Name(), "/")[0]) {
			u.commands = append(u.commands, block.script)
		}
	}

	// Build each version and copy it to the path on the page.
	for version, into := range map[string]*devenv.Plugin{"v0.1.0": &u.old, "v0.2.0": &u.new} {
		built, err := devenv.BuildPlugin(t.Context(), t.TempDir(), devenv.BuildOptions{Version: version, Race: devenv.RaceAvailable(t.Context())})
		require.NoError(t, err)
		require.Equal(t, version, built.Version)
		path := filepath.Join(v.PluginDir, devenv.PluginName+"_"+strings.TrimPrefix(version, "v")+"_linux_amd64")
		content, err := os.ReadFile(built.Path)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path, content, 0o700))
		built.Path = path
		*into = built
	}
	return u
}

// run runs the page's block that contains words.
func (u *upgrade) run(words string) string {
	u.t.Helper()
	var found []string
	for _, script := range u.commands {
		if strings.Contains(script, words) {
			found = append(found, script)
		}
	}
	require.Len(u.t, found, 1, "blocks of the page with %q", words)
	out, err := u.shell(found[0])
	require.NoError(u.t, err, "%s\n%s", found[0], out)
	return out
}

func (u *upgrade) shell(script string) (string, error) {
	cmd := exec.CommandContext(u.t.Context(), "bash", "-euo", "pipefail", "-c", strings.ReplaceAll(script, "<sum>", u.new.SHA256))
	cmd.WaitDelay = 5 * time.Second
	cmd.Dir, cmd.Env = u.vault.Dir, u.env
	out, err := cmd.CombinedOutput()
	return strings.Join(strings.Fields(string(out)), " "), err // the CLI wraps lines
}

// refused runs a command that Vault must refuse with the error why.
func (u *upgrade) refused(script, why string) {
	u.t.Helper()
	out, err := u.shell(script)
	require.Error(u.t, err, "not refused: %s\n%s", script, out)
	require.Contains(u.t, out, why, script)
}

// waitForVersion waits until the mount runs a version; a global reload does not wait.
func (u *upgrade) waitForVersion(version devenv.Plugin, configured string) {
	u.t.Helper()
	require.Eventually(u.t, func() bool { return u.runningVersion() == version.Version }, time.Minute, 50*time.Millisecond, "%s", version.Version)
	data := u.mountTable()
	if data["running_sha256"] != "" || !server.Product.Lacks(devenv.RunningSHA256) {
		require.Equal(u.t, version.SHA256, data["running_sha256"])
	}
	require.Equal(u.t, configured, data["plugin_version"])
	require.NotEmpty(u.t, u.read("config").Data)
}

func (u *upgrade) mountTable() map[string]any {
	u.t.Helper()
	secret, err := u.client.Logical().ReadWithContext(u.t.Context(), "sys/mounts/"+u.path)
	require.NoError(u.t, err)
	return secret.Data
}

// settings returns the config without fields that the engine changes.
func (u *upgrade) settings() map[string]any {
	u.t.Helper()
	data := u.read("config").Data
	for _, changes := range []string{"wal_entries", "wal_oldest_entry", "superseded_admin_keys"} {
		require.Contains(u.t, data, changes)
		delete(data, changes)
	}
	return data
}

// state is what one version leaves to the other.
type state struct {
	leases     map[string]lease // by role
	static     map[string]map[string]any
	superseded []string // superseded keys of static roles
	admin      string   // the superseded admin key
	unrevoked  lease
	lost       []string // accounts of lost creates
	config     map[string]any
	heal       func() // removes the fault
}

// createState creates leases of each kind, rotates keys, and makes deletions fail until
// the other version serves the mount.
func (u *upgrade) createState() *state {
	u.t.Helper()
	s := &state{leases: map[string]lease{}, static: map[string]map[string]any{}}
	for _, role := range []string{"ttl", "key", "scoped"} {
		s.leases[role] = u.creds(role)
	}
	for _, role := range []string{"made", "adopted"} {
		s.superseded = append(s.superseded, u.read("static-creds/" + role).Data["api_key"].(string))
		u.write("rotate-role/"+role, nil)
		s.static[role] = u.read("static-creds/" + role).Data
	}
	s.unrevoked = u.creds("scoped")
	s.heal = u.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: accountRoute, Status: http.StatusForbidden})
	require.Error(u.t, u.revoke(s.unrevoked))
	before := map[string]bool{}
	for _, id := range u.alive() {
		before[id] = true
	}
	lose := u.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: accountsRoute, Kind: openaitest.FaultLost})
	_, err := u.client.Logical().Read(u.path + "/creds/scoped")
	require.Error(u.t, err)
	lose()
	for _, id := range u.alive() {
		if !before[id] {
			s.lost = append(s.lost, id)
		}
	}
	require.NotEmpty(u.t, s.lost)
	entries := number(u.t, u.read("config").Data["wal_entries"])
	require.GreaterOrEqual(u.t, entries, int64(len(s.lost)+1), "the failed revocation and the lost creates")

	// Last: starts a grace period.
	s.admin = u.read("config").Data["admin_api_key_id"].(string)
	u.write("config/rotate", nil)
	require.EqualValues(u.t, 1, number(u.t, u.read("config").Data["superseded_admin_keys"]))
	s.config = u.settings()
	return s
}

// checkState checks that the other version serves s.
func (u *upgrade) checkState(s *state) {
	u.t.Helper()
	t := u.t
	require.Equal(t, s.config, u.settings(), "the config and its schedule")
	require.EqualValues(t, 1, number(t, u.read("config").Data["superseded_admin_keys"]), "the superseded key is in its grace period")
	require.Contains(t, u.adminKeys(), s.admin)
	for role, creds := range s.static {
		require.Equal(t, creds["api_key"], u.read("static-creds/" + role).Data["api_key"], role)
	}
	for _, key := range s.superseded {
		require.Equal(t, http.StatusOK, infer(t, u.sim, key), "a superseded key within its delay")
	}
	require.Subset(t, u.alive(), append(s.lost, s.unrevoked.account), "the first version must not have deleted these accounts")
	s.heal()

	for role, l := range s.leases {
		require.Equal(t, http.StatusOK, use(t, u.sim, "/chat/completions", l.key), role)
		renewed, err := u.client.Sys().RenewWithContext(t.Context(), l.id, 7200)
		require.NoError(t, err, role)
		require.InDelta(t, 7200, renewed.LeaseDuration, 2)
	}
	for _, k := range u.sim.Keys() {
		if k.Value == s.leases["ttl"].key {
			require.WithinDuration(t, time.Now().Add(2*time.Hour+75*time.Second), k.ExpiresAt, time.Minute, "the renewal must extend the key's lifetime")
		}
	}
	require.Equal(t, http.StatusForbidden, use(t, u.sim, "/responses", s.leases["scoped"].key), "beyond its scopes")
	for role, l := range s.leases {
		require.NoError(t, u.revoke(l), role)
		require.Eventually(t, func() bool { return infer(t, u.sim, l.key) == http.StatusUnauthorized }, time.Minute, 50*time.Millisecond, role)
	}
	for role, creds := range s.static {
		u.write("rotate-role/"+role, nil)
		now := u.read("static-creds/" + role).Data
		require.NotEqual(t, creds["api_key"], now["api_key"])
		require.Equal(t, creds["service_account_id"], now["service_account_id"])
		require.Equal(t, http.StatusOK, infer(t, u.sim, now["api_key"].(string)))
		s.superseded = append(s.superseded, creds["api_key"].(string))
	}

	began := time.Now()
	gone := func(what string, within time.Duration, is func() bool) {
		t.Helper()
		require.Eventually(t, is, within, 500*time.Millisecond, what)
		t.Logf("%s: %s after the move", what, time.Since(began).Round(time.Second))
	}
	gone("the failed revocation is completed", periodicTimeout, func() bool {
		return infer(t, u.sim, s.unrevoked.key) == http.StatusUnauthorized
	})
	gone("the superseded admin key is deleted", delay+periodicTimeout, func() bool {
		return number(t, u.read("config").Data["superseded_admin_keys"]) == 0
	})
	require.NotContains(t, u.adminKeys(), s.admin)
	// This lists the keys instead of using them: the engine keeps a key in use.
	gone("the superseded keys of static roles are deleted", delay+periodicTimeout, func() bool {
		return !slices.ContainsFunc(u.sim.Keys(), func(k openaitest.Key) bool { return slices.Contains(s.superseded, k.Value) })
	})
	for _, key := range s.superseded {
		require.Equal(t, http.StatusUnauthorized, infer(t, u.sim, key))
	}
	gone("all WAL entries are processed", walTimeout, func() bool {
		return number(t, u.read("config").Data["wal_entries"]) == 0
	})
	for _, id := range append(s.lost, s.unrevoked.account) {
		require.NotContains(t, u.alive(), id)
	}
	require.NoError(t, u.revoke(s.unrevoked), "Vault retries a completed revocation")
	require.False(t, u.leased(s.unrevoked))
	require.Len(t, u.alive(), 3, "the accounts of the static roles and of the leased keys")
}

func (u *upgrade) adminKeys() (ids []string) {
	for _, k := range u.sim.AdminKeys() {
		ids = append(ids, k.ID)
	}
	return ids
}

func number(t *testing.T, value any) int64 {
	t.Helper()
	text, ok := value.(json.Number)
	require.True(t, ok, "%v", value)
	n, err := text.Int64()
	require.NoError(t, err)
	return n
}

// Both directions run in parallel, since each waits for Vault's timers.
func TestLong_AMountIsMovedToAnotherVersionAndBack(t *testing.T) {
	runParallel(t)
	t.Run("upgrade, then pins", func(t *testing.T) {
		u := newUpgrade(t)
		made := u.createState()
		u.run("tune -plugin-version=v0.2.0")
		u.waitForVersion(u.new, u.new.Version)
		require.Contains(t, u.run("vault read sys/mounts/openai"), u.new.SHA256)
		u.checkState(made)
		u.run("tune -plugin-version=v0.1.0")
		u.waitForVersion(u.old, u.old.Version)
		u.pinned()
		u.end()
	})
	t.Run("downgrade, then missing binary", func(t *testing.T) {
		u := newUpgrade(t)
		u.run("tune -plugin-version=v0.2.0")
		u.waitForVersion(u.new, u.new.Version)
		made := u.createState()
		u.run("tune -plugin-version=v0.1.0")
		u.waitForVersion(u.old, u.old.Version)
		u.checkState(made)
		u.withoutItsBinary()
		u.end()
	})
}

// pinned runs pins in a subtest, which is skipped if the server has no pins.
func (u *upgrade) pinned() {
	outer := u.t
	outer.Run("pins", func(t *testing.T) {
		needs(t, devenv.PluginPins)
		u.t = t
		defer func() { u.t = outer }()
		u.pins()
	})
}

// start registers both versions and mounts the older one.
func (u *upgrade) start() {
	u.t.Helper()
	t := u.t
	require.NoError(t, u.vault.Register(t.Context(), u.old))
	u.run("vault plugin register")
	require.NoError(t, u.client.Sys().MountWithContext(t.Context(), u.path, &api.MountInput{Type: devenv.PluginName, Config: api.MountConfigInput{PluginVersion: u.old.Version}}))
	t.Cleanup(func() { u.requireNoSecretWritten(u.sim.Secrets()...) })
	// A schedule that is due in weeks: it must be kept, but not rotate anything.
	schedule := fmt.Sprintf("0 2 %d * *", (time.Now().UTC().Day()+13)%28+1)
	config := u.adminConfig()
	config["rotation_grace_period"], config["rotation_schedule"], config["rotation_window"] = delay.String(), schedule, "1h"
	config["project_id"], config["tidy_interval"] = u.project, 0 // only the tested code deletes anything
	u.write("config", config)
	u.waitForVersion(u.old, u.old.Version)

	u.hand, u.team = u.adopted("by hand"), u.adopted("team")
	u.write("roles/ttl", map[string]any{"ttl": "10m", "max_ttl": "24h", "key_expiry": "ttl"})
	u.write("roles/key", map[string]any{"credential_type": "api_key", "service_account_id": u.team})
	u.write("roles/scoped", map[string]any{"project_id": u.project, "scopes": "api.model.request"})
	u.write("static-roles/made", map[string]any{"project_id": u.project, "rotation_schedule": schedule, "revocation_delay": delay.String()})
	u.write("static-roles/adopted", map[string]any{"project_id": u.project, "rotation_period": "1h", "revocation_delay": delay.String(), "service_account_id": u.hand})
}

// end deletes everything that the test created.
func (u *upgrade) end() {
	u.t.Helper()
	t := u.t
	for _, role := range []string{"made", "adopted"} {
		_, err := u.client.Logical().DeleteWithContext(t.Context(), u.path+"/static-roles/"+role)
		require.NoError(t, err)
	}
	require.ElementsMatch(t, []string{u.hand, u.team}, u.alive(), "the two accounts created by hand")
	require.Empty(t, u.sim.Keys())
	u.keepAdminKey()
	require.Len(t, u.sim.AdminKeys(), 1)
	require.NoError(t, u.client.Sys().UnmountWithContext(t.Context(), u.path))
}

// pins tests Vault's behavior with pins. It starts and ends with the old version.
func (u *upgrade) pins() {
	u.t.Helper()
	t := u.t
	l := u.creds("scoped")
	u.refused("vault write "+pinPath+" version=v9.9.9", "does not exist")

	// A pin applies from the next start, whatever version the mount is tuned to.
	// Before the reload, only a warning shows it.
	_, err := u.client.Logical().WriteWithContext(t.Context(), pinPath, map[string]any{"version": u.new.Version})
	require.NoError(t, err)
	u.waitForVersion(u.old, u.old.Version)
	u.run("version=v0.2.0\n")
	u.waitForVersion(u.new, u.old.Version)
	require.Contains(t, u.run("vault read sys/mounts/openai"), `configured as "v0.1.0", but running "v0.2.0" because that version is pinned`)
	require.NoError(t, u.revoke(l))

	// While a pin exists, no mount can be given a version, not even the same.
	for _, version := range []string{u.old.Version, u.new.Version} {
		u.refused("vault secrets tune -plugin-version="+version+" openai", "as a pinned version v0.2.0 is in effect")
		u.refused("vault secrets enable -path=second -plugin-version="+version+" "+devenv.PluginName, "as it is pinned to version v0.2.0")
	}
	require.NoError(t, u.client.Sys().MountWithContext(t.Context(), "second", &api.MountInput{Type: devenv.PluginName}))
	mounts, err := u.client.Sys().ListMountsWithContext(t.Context())
	require.NoError(t, err)
	require.Equal(t, u.new.Version, mounts["second/"].RunningVersion)
	require.NoError(t, u.client.Sys().UnmountWithContext(t.Context(), "second"))
	u.refused("vault plugin deregister -version=v0.2.0 secret "+devenv.PluginName, "cannot delete a pinned version")

	// Without the pin, the mount runs its own version.
	l = u.creds("scoped")
	u.run("vault delete " + pinPath)
	u.waitForVersion(u.old, u.old.Version)
	require.NoError(t, u.revoke(l))
}

// withoutItsBinary tests Vault's behavior with a missing binary, and the recovery.
// It starts with the old version and ends after its deregistration.
func (u *upgrade) withoutItsBinary() {
	u.t.Helper()
	t := u.t
	content, err := os.ReadFile(u.old.Path)
	require.NoError(t, err)
	l := u.creds("scoped")

	// A running plugin keeps working until it must start again.
	require.NoError(t, os.Remove(u.old.Path))
	require.NoError(t, u.revoke(u.creds("scoped")))
	const gone = "error verifying checksum"
	u.refused("vault write sys/plugins/reload/backend mounts=openai/", gone)
	notServed := func() {
		t.Helper()
		_, err := u.client.Logical().ReadWithContext(t.Context(), u.path+"/config")
		require.ErrorContains(t, err, gone)
		require.ErrorContains(t, u.revoke(l), gone)
		require.True(t, u.leased(l))
	}
	notServed()
	require.Equal(t, u.old.Version, u.runningVersion(), "Vault reports the last version that ran")

	// Recovery without the file: move to the other version.
	u.run("tune -plugin-version=v0.2.0")
	u.waitForVersion(u.new, u.new.Version)
	require.NoError(t, u.revoke(l))

	// Tuning does not check the file, and reloading fails; the previous version then
	// continues to serve the mount.
	l = u.creds("scoped")
	_, err = u.shell("vault secrets tune -plugin-version=v0.1.0 openai")
	require.NoError(t, err)
	u.refused("vault write sys/plugins/reload/backend mounts=openai/ scope=global", gone)
	u.waitForVersion(u.new, u.old.Version)
	require.NoError(t, u.revoke(u.creds("scoped")))

	// If Vault restarts in between, the mount is unavailable. Once the file is back, a
	// reload alone permits reads but not writes: Vault keeps the storage of a mount
	// that it could not start read-only until the next unseal.
	require.NoError(t, u.vault.Restart(t.Context()))
	config, err := u.client.Logical().ReadWithContext(t.Context(), u.path+"/config")
	require.NoError(t, err)
	require.Nil(t, config, "404")
	require.NoError(t, os.WriteFile(u.old.Path, content, 0o700))
	_, err = u.shell("vault write sys/plugins/reload/backend mounts=openai/")
	require.NoError(t, err)
	u.waitForVersion(u.old, u.old.Version)
	_, err = u.client.Logical().ReadWithContext(t.Context(), u.path+"/creds/scoped")
	require.ErrorContains(t, err, "cannot write to storage during setup")
	require.NoError(t, u.vault.Restart(t.Context()))
	u.waitForVersion(u.old, u.old.Version)
	require.NoError(t, u.revoke(l))
	require.NoError(t, u.revoke(u.creds("scoped")))

	u.run("tune -plugin-version=v0.2.0")
	u.waitForVersion(u.new, u.new.Version)
	u.run("vault plugin deregister")
	u.refused("vault secrets tune -plugin-version=v0.1.0 openai", "not found")
}
