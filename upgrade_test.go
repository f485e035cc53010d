package openaisecrets

// A mount of earlier releases: one storage with all golden files, which a new backend
// must serve completely. golden_test.go tests the content of each file. Another test here
// reads entries of a later release.

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// goldenMount stores golden files. The accounts and keys in them are created at the
// simulator, so their IDs, names and keys are replaced by its own; nothing else changes.
type goldenMount struct {
	*harness
	files map[string]bool
}

func (h *goldenMount) file(name string, replace ...string) []byte {
	h.t.Helper()
	content := string(golden(h.t, name))
	h.files[name] = true
	for i := 0; i < len(replace); i += 2 {
		require.Contains(h.t, content, replace[i], name)
	}
	// All at once: a new ID may begin like another ID of the file.
	return []byte(strings.NewReplacer(replace...).Replace(content))
}

func (h *goldenMount) store(at string, content []byte) {
	h.t.Helper()
	require.NoError(h.t, h.storage.Put(h.t.Context(), &logical.StorageEntry{Key: at, Value: content}))
}

// leaseOf is a lease that Vault stored for an earlier release.
func (h *goldenMount) leaseOf(content []byte) *logical.Response {
	h.t.Helper()
	var data map[string]any
	require.NoError(h.t, json.Unmarshal(content, &data))
	data["secret_type"] = secretType // set by the framework
	return &logical.Response{
		Secret: &logical.Secret{LeaseOptions: logical.LeaseOptions{TTL: time.Hour, Renewable: true, IssueTime: time.Now()}, InternalData: data},
		Data:   map[string]any{"service_account_id": data["service_account_id"]},
	}
}

// liveKey finds a key by its name, its ID or its account's ID.
func (h *goldenMount) liveKey(what string) openaitest.Key {
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
	h := &goldenMount{newHarness(t, openaitest.Options{}), map[string]bool{}}
	if latest := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC); h.now().Before(latest) {
		h.until(latest) // the files' dates must be in the past
	}
	adminID, adminKey := h.sim.AdminKey()
	supersededAdmin, _ := h.sim.AddAdminKey("vault-admin-superseded")
	const lostAdminName = "vault-admin-ab3defghij4klmn" // as in the file
	lostAdmin, _ := h.sim.AddAdminKey(lostAdminName)
	h.store(configStorageKey, h.file("config.v1.json", "sk-admin-golden", adminKey, "key_1", adminID, "key_0", supersededAdmin,
		"org-1", h.sim.OrganizationID(), "https://api.openai.com/v1", h.sim.URL(), `"PEM"`, `""`, "proj_1", h.project,
		`"kept": "used"`, `"kept": ""`, `"elsewhere": true`, `"elsewhere": false`, `"not_checked": true`, `"not_checked": false`, `"require_scopes": true`, `"require_scopes": false`))
	h.store(stateStoragePrefix+"app", h.file("spending_state.v1.json")) // of a month that has ended
	h.store(verdictStoragePrefix+h.project, h.file("guardrail.v1.json", "https://api.openai.com/v1", h.sim.URL()))
	h.store(mountStorageKey, h.file("mount.v1.json", `"pools":true`, `"pools":false`)) // no refill while entries are counted
	h.store(tidyStorageKey, h.file("tidy.v1.json"))
	h.store(projectStoragePrefix+h.project, h.file("project.v1.json"))
	h.store(longestLeaseStorageKey, h.file("longest_lease.v1.json"))
	h.store(usageKeysPrefix+"2026-01-02/a-1", h.file("usage_records.v1.json"))
	h.restart()

	batch := h.sim.AddServiceAccount(h.project, "batch")
	roleV1 := h.file("role.v1.json")
	h.store(roleStoragePrefix+"app", roleV1)
	h.store(roleStoragePrefix+"team", h.file("role_api_key.v1.json", "proj_1", h.project, "user-1", batch))
	current, superseded := "vault-static-batch-ab3defghij4klmn", "vault-static-batch-ab3dezzzzzzzzzz"
	currentID, supersededID := h.key(batch, current, 216*time.Hour), h.key(batch, superseded, 192*time.Hour)
	h.store(staticStoragePrefix+"batch", h.file("static_role.v1.json", "proj_1", h.project, "user-1", batch,
		"key_2", currentID, "key_1", supersededID, "sk-svcacct-golden", h.liveKey(current).Value, `"disable_automated_rotation": true`, `"disable_automated_rotation": false`))

	// All files use the same name; here, each names a different account or key.
	const name = "vault-app-ab3defghij4klmn"
	account := func(own string) (newName, id string) {
		newName = "vault-app-ab3de" + own
		return newName, h.account(h.project, newName, 24*time.Hour)
	}
	lostName, lost := account("lost000001")
	h.store(framework.WALPrefix+"1", h.file("wal_service_account.v1.json", "proj_1", h.project, name, lostName, "user-1", lost))
	unansweredName, unanswered := account("lost000002")
	h.store(framework.WALPrefix+"2", h.file("wal_service_account.v1.json", "proj_1", h.project, name, unansweredName, `"user-1"`, `""`))
	lostKey := "vault-app-ab3delost000003"
	lostKeyID := h.key(batch, lostKey, 24*time.Hour)
	h.store(framework.WALPrefix+"3", h.file("wal_api_key.v1.json", "proj_1", h.project, name, lostKey, "user-1", batch))
	h.store(framework.WALPrefix+"4", h.file("wal_admin_key.v1.json"))
	pooledName, pooledAccount := account("pool000001") // left by the pool of an earlier process
	h.store(framework.WALPrefix+"5", h.file("wal_pooled_service_account.v1.json", "proj_1", h.project, name, pooledName))
	pooledKey := "vault-app-ab3depool000002"
	pooledKeyID := h.key(batch, pooledKey, 24*time.Hour)
	h.store(framework.WALPrefix+"6", h.file("wal_pooled_api_key.v1.json", "proj_1", h.project, name, pooledKey, "user-1", batch))
	formerName, former := account("former0001")
	h.store(framework.WALPrefix+"7", h.file("wal_recreated_static_role.v1.json", "proj_1", h.project, name, formerName, "user-1", former))

	const end = "2026-01-03T03:06:05Z"
	later := h.now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
	leases := map[string]*logical.Response{}
	leasedName, leased := account("lease00001")
	leases["account"] = h.leaseOf(h.file("lease.v1.json", "proj_1", h.project, name, leasedName, "user-1", leased, "key_1", h.liveKey(leased).ID, end, later))
	leasedKey := "vault-app-ab3delease00003"
	leasedKeyID := h.key(batch, leasedKey, 24*time.Hour)
	leases["key"] = h.leaseOf(h.file("lease_api_key.v1.json", "proj_1", h.project, name, leasedKey, "user-1", batch, "key_1", leasedKeyID))
	takenName, taken := account("lease00005")
	leases["of a pool"] = h.leaseOf(h.file("lease_pooled.v1.json", "proj_1", h.project, name, takenName, "user-1", taken, "key_1", h.liveKey(taken).ID, "2026-01-03T09:06:05Z", later))
	deadName, dead := account("lease00004")
	expired := h.leaseOf(h.file("lease.v1.json", "proj_1", h.project, name, deadName, "user-1", dead)) // its key has expired

	files, err := filepath.Glob("testdata/*.json")
	require.NoError(t, err)
	for _, file := range files {
		require.True(t, h.files[filepath.Base(file)], "%s is not stored anywhere", file)
	}
	require.Len(t, files, len(h.files))

	// The config, both roles and the static role.
	config := h.config()
	require.Equal(t, adminID, config["admin_api_key_id"])
	require.Equal(t, 1, config["superseded_admin_keys"])
	require.Equal(t, 7, config["wal_entries"])
	require.Equal(t, "0 2 * * *", config["rotation_schedule"])
	h.sim.SetSpendLimit(h.project, 1)
	h.sim.SetModelPermissions(h.project, client.AllowList)
	require.Contains(t, h.refused(h.read("creds/app")), "require_model_allow_list", "a negative verdict counts at any age")
	h.must(h.read("projects/" + h.project))
	app, team := h.lease("creds/app", nil), h.lease("creds/team", nil)
	require.Contains(t, app.Data["service_account"], "ab3de", "the name has the mount tag")
	require.Equal(t, batch, team.Data["service_account_id"])
	require.Equal(t, []string{"api.model.request", "api.model.read"}, h.liveKey(team.Data["api_key_id"].(string)).Scopes)
	require.Equal(t, h.liveKey(current).Value, h.staticCreds("batch")["api_key"])

	recorded, err := h.b.keysOfRole(t.Context(), h.storage, "app", time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC), time.Date(2026, 1, 3, 0, 0, 0, 0, time.UTC))
	require.NoError(t, err)
	require.Len(t, recorded, 1)
	require.Equal(t, "entity-1", recorded[0].EntityID)

	// Leases are renewed and revoked. A lease whose key has expired ends immediately, and
	// its account is queued for deletion in the WAL.
	for kind, lease := range leases {
		renewed, err := h.renew(t.Context(), lease, time.Minute, 2*time.Hour)
		require.NoError(t, err, kind)
		require.NoError(t, renewed.Error(), kind)
		require.Equal(t, 2*time.Hour, renewed.Secret.TTL.Round(time.Minute), kind)
		require.NoError(t, h.revoke(renewed), kind)
	}
	require.NoError(t, h.revoke(expired))
	require.Len(t, h.walEntries(), 8)
	require.NotContains(t, h.alive(), leased)
	require.NotContains(t, h.liveKeys(), leasedKeyID)

	// Periodic work: the WAL, superseded keys, and the tidy run that is due.
	h.runPeriodicWork()
	h.runStaticWorker()
	require.Empty(t, h.walEntries())
	for _, id := range []string{lost, unanswered, dead, pooledAccount, former} {
		require.NotContains(t, h.alive(), id)
	}
	require.NotContains(t, h.liveKeys(), lostKeyID)
	require.NotContains(t, h.liveKeys(), pooledKeyID)
	require.NotContains(t, h.liveKeys(), supersededID)
	require.NotContains(t, h.adminKeyIDs(), lostAdmin)
	require.NotContains(t, h.adminKeyIDs(), supersededAdmin)
	require.Equal(t, tidyFinished, h.tidied()["state"])
	project, err := getProjectEntry(t.Context(), h.storage, h.project)
	require.NoError(t, err)
	require.Zero(t, project.UnknownSince, "OpenAI knows the project")
	run, err := getTidyEntry(t.Context(), h.storage)
	require.NoError(t, err)
	require.WithinDuration(t, h.now(), run.LastAutoRun, time.Minute)

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

// formats are the current formats, with their names in docs/upgrades.md and their
// readers.
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
	{"WAL entry of a credential", credentialVersion, acts(walAccount)},
	{"WAL entry of a pooled credential", credentialVersion, acts(walPooledAccount)},
	{"WAL entry of an admin key", adminKeyVersion, acts(walAdminKey)},
	{"mount tag", mountVersion, reads(mountStorageKey, func(h *harness) error { _, err := getTag(h.t.Context(), h.storage); return err })},
	{"longest lease", longestLeaseVersion, reads(longestLeaseStorageKey, func(h *harness) error { _, err := getLongestLease(h.t.Context(), h.storage); return err })},
	{"project of tidy", projectVersion, reads(projectStoragePrefix+"p", func(h *harness) error { _, err := getProjectEntry(h.t.Context(), h.storage, "p"); return err })},
	{"usage records", usageVersion, reads(usageKeysPrefix+"2026-01-02/a-1", func(h *harness) error {
		_, err := readUsageEntry(h.t.Context(), h.storage, "2026-01-02/a-1")
		return err
	})},
	{"guardrail of a project", verdictVersion, reads(verdictStoragePrefix+"p", func(h *harness) error { _, err := h.b.verdictOf(h.t.Context(), h.storage, "p", ""); return err })},
	{"spending state of a role", stateVersion, reads(stateStoragePrefix+"r", func(h *harness) error { _, err := h.b.states.get(h.t.Context(), h.storage, "r"); return err })},
	{"last tidy run", tidyVersion, reads(tidyStorageKey, func(h *harness) error { _, err := getTidyEntry(h.t.Context(), h.storage); return err })},
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
		if lane := laneOf(kind); lane == walAccount || lane == walKey {
			return r.processFound(h.t.Context(), entry, &lookedUp{})
		}
		return r.processEntry(client.Background(h.t.Context()), entry)
	}
}

// After a downgrade, the older release reads entries of the newer one. It must reject
// them with an error that names the format, and delete nothing.
func TestUpgrade_EntriesOfALaterReleaseAreRejectedByName(t *testing.T) {
	t.Parallel()
	for _, format := range formats {
		t.Run(format.name, func(t *testing.T) {
			t.Parallel()
			h := newHarness(t, openaitest.Options{})
			err := format.read(h, fmt.Appendf(nil, `{"version": %d}`, format.version+1))
			require.ErrorContains(t, err, fmt.Sprintf("written by a newer version of this plugin (format %d; this version supports up to format %d)", format.version+1, format.version))
		})
	}
}

func TestUpgrade_ThePageNamesTheFormats(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/upgrades.md")
	require.NoError(t, err)
	listed := 0
	for _, item := range regexp.MustCompile(`(?m)^- Format (\d+): (.+)\.$`).FindAllStringSubmatch(string(page), -1) {
		listed += len(strings.Split(item[2], ", "))
		for _, format := range formats {
			if slices.Contains(strings.Split(item[2], ", "), format.name) {
				require.Equal(t, item[1], strconv.Itoa(format.version), format.name)
			}
		}
	}
	for _, format := range formats {
		require.Regexp(t, `(?m)^- Format .*[:,] `+regexp.QuoteMeta(format.name)+`[,.]`, string(page))
	}
	require.Equal(t, len(formats), listed, "formats of the page")
}
