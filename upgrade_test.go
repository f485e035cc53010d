package openaisecrets

// A mount as earlier releases left it: all golden files laid down in one
// storage, which a fresh backend has to serve from end to end. What the bytes of
// each mean is storage_test.go's; what a release does with those of a later one
// is here, too.

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// heirloom lays golden files down. What they name is made at the simulator, so
// their IDs, names and keys are replaced by its own, and nothing else is.
type heirloom struct {
	*harness
	laid map[string]bool
}

func (h *heirloom) file(name string, replace ...string) []byte {
	h.t.Helper()
	content := string(golden(h.t, name))
	h.laid[name] = true
	for i := 0; i < len(replace); i += 2 {
		require.Contains(h.t, content, replace[i], name)
	}
	// All at once: an ID that was put in may begin as another of the file's does.
	return []byte(strings.NewReplacer(replace...).Replace(content))
}

func (h *heirloom) lay(at string, content []byte) {
	h.t.Helper()
	require.NoError(h.t, h.storage.Put(h.t.Context(), &logical.StorageEntry{Key: at, Value: content}))
}

// leaseOf is a lease as Vault has kept it for an earlier release.
func (h *heirloom) leaseOf(content []byte) *logical.Response {
	h.t.Helper()
	var data map[string]any
	require.NoError(h.t, json.Unmarshal(content, &data))
	data["secret_type"] = secretType // the framework's own
	return &logical.Response{
		Secret: &logical.Secret{LeaseOptions: logical.LeaseOptions{TTL: time.Hour, Renewable: true, IssueTime: time.Now()}, InternalData: data},
		Data:   map[string]any{"service_account_id": data["service_account_id"]},
	}
}

// liveKey finds a key by its name, its ID or its account's ID.
func (h *heirloom) liveKey(what string) openaitest.Key {
	h.t.Helper()
	for _, k := range h.sim.Keys() {
		if k.Name == what || k.ID == what || k.AccountID == what {
			return k
		}
	}
	h.t.Fatalf("no key %s", what)
	return openaitest.Key{}
}

func TestUpgrade_AMountOfEarlierReleasesIsServed(t *testing.T) {
	t.Parallel()
	h := &heirloom{newHarness(t, openaitest.Options{}), map[string]bool{}}
	if latest := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC); h.now().Before(latest) {
		h.until(latest) // the files' dates lie in the past
	}
	adminID, adminKey := h.sim.AdminKey()
	retiredAdmin, _ := h.sim.AddAdminKey("vault-admin-retired")
	const lostAdminName = "vault-admin-ab3defghij4klmn" // as in the file
	lostAdmin, _ := h.sim.AddAdminKey(lostAdminName)
	h.lay(configStorageKey, h.file("config.v1.json", "sk-admin-golden", adminKey, "key_1", adminID, "key_0", retiredAdmin,
		"org-1", h.sim.OrganizationID(), "https://api.openai.com/v1", h.sim.URL(), `"PEM"`, `""`, "proj_1", h.project,
		`"kept": "used"`, `"kept": ""`, `"elsewhere": true`, `"elsewhere": false`, `"not_checked": true`, `"not_checked": false`))
	h.lay(mountStorageKey, h.file("mount.v1.json"))
	h.lay(tidyStorageKey, h.file("tidy.v1.json"))
	h.lay(projectStoragePrefix+h.project, h.file("project.v1.json"))
	h.lay(longestLeaseStorageKey, h.file("longest_lease.v1.json"))
	h.restart()

	batch := h.sim.AddServiceAccount(h.project, "batch")
	roleV1 := h.file("role.v1.json")
	h.lay(roleStoragePrefix+"app", roleV1)
	h.lay(roleStoragePrefix+"team", h.file("role_api_key.v1.json", "proj_1", h.project, "user-1", batch))
	current, retired := "vault-static-batch-ab3defghij4klmn", "vault-static-batch-ab3dezzzzzzzzzz"
	currentID, retiredID := h.key(batch, current, 216*time.Hour), h.key(batch, retired, 192*time.Hour)
	h.lay(staticStoragePrefix+"batch", h.file("static_role.v1.json", "proj_1", h.project, "user-1", batch,
		"key_2", currentID, "key_1", retiredID, "sk-svcacct-golden", h.liveKey(current).Value, `"disable_automated_rotation": true`, `"disable_automated_rotation": false`))

	// All files have the same name; here each stands for something of its own.
	const name = "vault-app-ab3defghij4klmn"
	account := func(own string) (newName, id string) {
		newName = "vault-app-ab3de" + own
		return newName, h.account(h.project, newName, 24*time.Hour)
	}
	lostName, lost := account("lost000001")
	h.lay(framework.WALPrefix+"1", h.file("journal_service_account.v1.json", "proj_1", h.project, name, lostName, "user-1", lost))
	unansweredName, unanswered := account("lost000002")
	h.lay(framework.WALPrefix+"2", h.file("journal_service_account.v1.json", "proj_1", h.project, name, unansweredName, `"user-1"`, `""`))
	lostKey := "vault-app-ab3delost000003"
	lostKeyID := h.key(batch, lostKey, 24*time.Hour)
	h.lay(framework.WALPrefix+"3", h.file("journal_api_key.v1.json", "proj_1", h.project, name, lostKey, "user-1", batch))
	h.lay(framework.WALPrefix+"4", h.file("journal_admin_key.v1.json"))

	const end = "2026-01-03T03:06:05Z"
	later := h.now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
	leases := map[string]*logical.Response{}
	leasedName, leased := account("lease00001")
	leases["account"] = h.leaseOf(h.file("lease.v1.json", "proj_1", h.project, name, leasedName, "user-1", leased, "key_1", h.liveKey(leased).ID, end, later))
	leasedKey := "vault-app-ab3delease00003"
	leasedKeyID := h.key(batch, leasedKey, 24*time.Hour)
	leases["key"] = h.leaseOf(h.file("lease_api_key.v1.json", "proj_1", h.project, name, leasedKey, "user-1", batch, "key_1", leasedKeyID))
	deadName, dead := account("lease00004")
	expired := h.leaseOf(h.file("lease.v1.json", "proj_1", h.project, name, deadName, "user-1", dead)) // its key's end has passed

	files, err := filepath.Glob("testdata/*.json")
	require.NoError(t, err)
	for _, file := range files {
		require.True(t, h.laid[filepath.Base(file)], "%s is laid down nowhere", file)
	}
	require.Len(t, files, len(h.laid))

	// The config, both roles and the static role.
	config := h.config()
	require.Equal(t, adminID, config["admin_api_key_id"])
	require.Equal(t, 1, config["retired_admin_keys"])
	require.Equal(t, 4, config["journal_entries"])
	require.Equal(t, "0 2 * * *", config["rotation_schedule"])
	app, team := h.lease("creds/app", nil), h.lease("creds/team", nil)
	require.Contains(t, app.Data["service_account"], "ab3de", "it bears the mount's tag")
	require.Equal(t, batch, team.Data["service_account_id"])
	require.Equal(t, []string{"api.model.request", "api.model.read"}, h.liveKey(team.Data["api_key_id"].(string)).Scopes)
	require.Equal(t, h.liveKey(current).Value, h.staticCreds("batch")["api_key"])

	// Leases are renewed and revoked; one whose key is dead goes at once, and
	// what is left of it is the journal's.
	for kind, lease := range leases {
		renewed, err := h.renew(t.Context(), lease, time.Minute, 2*time.Hour)
		require.NoError(t, err, kind)
		require.NoError(t, renewed.Error(), kind)
		require.Equal(t, 2*time.Hour, renewed.Secret.TTL.Round(time.Minute), kind)
		require.NoError(t, h.revoke(renewed), kind)
	}
	require.NoError(t, h.revoke(expired))
	require.Len(t, h.journal(), 5)
	require.NotContains(t, h.alive(), leased)
	require.NotContains(t, h.liveKeys(), leasedKeyID)

	// What runs by itself: the journal, retired keys, and the sweep that is due.
	h.tick()
	h.keep()
	require.Empty(t, h.journal())
	for _, id := range []string{lost, unanswered, dead} {
		require.NotContains(t, h.alive(), id)
	}
	require.NotContains(t, h.liveKeys(), lostKeyID)
	require.NotContains(t, h.liveKeys(), retiredID)
	require.NotContains(t, h.adminKeyIDs(), lostAdmin)
	require.NotContains(t, h.adminKeyIDs(), retiredAdmin)
	require.Equal(t, tidyFinished, h.swept()["state"])
	project, err := getProjectEntry(t.Context(), h.storage, h.project)
	require.NoError(t, err)
	require.Zero(t, project.UnknownSince, "OpenAI knows it")
	sweep, err := getTidyEntry(t.Context(), h.storage)
	require.NoError(t, err)
	require.WithinDuration(t, h.now(), sweep.LastAutoRun, time.Minute)

	// Serving a role does not change its entry, so that the release which wrote
	// it can still read it; writing it does.
	entry, err := h.storage.Get(t.Context(), roleStoragePrefix+"app")
	require.NoError(t, err)
	require.Equal(t, string(roleV1), string(entry.Value))
	h.must(h.write("roles/app", map[string]any{"ttl": "2h"}))
	entry, err = h.storage.Get(t.Context(), roleStoragePrefix+"app")
	require.NoError(t, err)
	require.Contains(t, string(entry.Value), fmt.Sprintf(`"version":%d,`, roleVersion))

	before := h.staticCreds("batch")["api_key"].(string)
	h.must(h.write("rotate-role/batch", nil))
	require.NotEqual(t, before, h.staticCreds("batch")["api_key"])
	h.must(h.write("config/rotate", nil))
	h.must(h.remove("static-roles/batch"))
	require.NoError(t, h.revoke(app))
	require.NoError(t, h.revoke(team))
	require.Equal(t, []string{batch}, h.alive())
	require.Empty(t, h.liveKeys())
	h.sim.Keep(h.adminKeyIDs()...)
}

// formats are those that are written now, as docs/upgrades.md calls them, and
// how each is read.
var formats = []struct {
	name    string
	version int
	read    func(h *harness, content []byte) error
}{
	{"config", configVersion, reads(configStorageKey, func(h *harness) error { _, err := getConfig(h.t.Context(), h.storage); return err })},
	{"role", roleVersion, reads(roleStoragePrefix+"r", func(h *harness) error { _, err := getRole(h.t.Context(), h.storage, "r"); return err })},
	{"static role", staticVersion, reads(staticStoragePrefix+"r", func(h *harness) error { _, err := getStaticRole(h.t.Context(), h.storage, "r"); return err })},
	{"lease", credentialVersion, func(_ *harness, content []byte) error {
		var data map[string]any
		if err := json.Unmarshal(content, &data); err != nil {
			return err
		}
		_, err := decodeLease(&logical.Request{Secret: &logical.Secret{InternalData: data}})
		return err
	}},
	{"journal, of a credential", credentialVersion, acts(journalAccount)},
	{"journal, of an admin key", adminKeyVersion, acts(journalAdminKey)},
	{"mount's tag", mountVersion, reads(mountStorageKey, func(h *harness) error { _, err := getTag(h.t.Context(), h.storage); return err })},
	{"project to sweep", projectVersion, reads(projectStoragePrefix+"p", func(h *harness) error { _, err := getProjectEntry(h.t.Context(), h.storage, "p"); return err })},
	{"time of the last sweep", tidyVersion, reads(tidyStorageKey, func(h *harness) error { _, err := getTidyEntry(h.t.Context(), h.storage); return err })},
}

func reads(at string, read func(*harness) error) func(*harness, []byte) error {
	return func(h *harness, content []byte) error {
		if err := h.storage.Put(h.t.Context(), &logical.StorageEntry{Key: at, Value: content}); err != nil {
			return err
		}
		return read(h)
	}
}

func acts(kind string) func(*harness, []byte) error {
	return func(h *harness, content []byte) error {
		r := &walRun{b: h.b, req: &logical.Request{Storage: h.storage}}
		entry := &framework.WALEntry{Kind: kind, Data: json.RawMessage(content)}
		if kind == journalAccount || kind == journalKey {
			return r.actFound(h.t.Context(), entry, &lookedUp{})
		}
		return r.act(client.Background(h.t.Context()), entry)
	}
}

// A release that goes back meets what the later one has written. It must say so,
// and neither guess nor delete.
func TestUpgrade_WhatALaterReleaseWroteIsRefusedByName(t *testing.T) {
	t.Parallel()
	for _, format := range formats {
		t.Run(format.name, func(t *testing.T) {
			t.Parallel()
			h := newHarness(t, openaitest.Options{})
			err := format.read(h, fmt.Appendf(nil, `{"version": %d}`, format.version+1))
			require.ErrorContains(t, err, fmt.Sprintf("written by a newer version of this plugin (format %d, this one knows %d)", format.version+1, format.version))
		})
	}
}

func TestUpgrade_ThePageNamesTheFormats(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/upgrades.md")
	require.NoError(t, err)
	for _, format := range formats {
		require.Contains(t, string(page), fmt.Sprintf("\n| %s | %d |", format.name, format.version))
	}
	require.Len(t, regexp.MustCompile(`(?m)^\| [^|]+ \| \d+ \|`).FindAll(page, -1), len(formats), "rows of the page's table")
}
