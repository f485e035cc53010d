package openaisecrets

// Mounts as the community plugin leaves them. The golden files are written by hand
// from the field names and types in that project's source, commit 67d3b6a; the
// releases v0.0.4, v0.0.8 and v0.1.0 have the same.

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/schedule"
)

// communityMount is a mount right after its migration to this plugin: only the
// community plugin's config and role "app".
func communityMount(t *testing.T) *goldenMount {
	t.Helper()
	h := &goldenMount{newHarness(t, openaitest.Options{}), map[string]bool{}}
	h.storeConfig("community/config.json")
	h.store("roles/app", h.file("community/role.json", "proj_1", h.project))
	return h
}

func (h *goldenMount) storeConfig(name string, replace ...string) {
	h.t.Helper()
	id, key := h.sim.AdminKey()
	h.store(configStorageKey, h.file(name, append([]string{"sk-admin-golden", key, "key_1", id, "org-1", h.sim.OrganizationID(), "https://api.openai.com/v1", h.sim.URL()}, replace...)...))
}

// communityLease creates an account as that plugin does, with a key that does not
// expire, and returns its lease.
func (h *goldenMount) communityLease(name string) (lease *logical.Response, account string) {
	h.t.Helper()
	_, admin := h.sim.AdminKey()
	api, err := client.New(client.Options{AdminKey: client.NewSecret(admin), BaseURL: h.sim.URL()})
	require.NoError(h.t, err)
	defer api.Close()
	made, key, err := api.CreateServiceAccount(h.t.Context(), h.project, name, 0)
	require.NoError(h.t, err)
	require.True(h.t, key.ExpiresAt.IsZero())
	lease = h.leaseOf(h.file("community/lease.json", "proj_1", h.project, "user-1", made.ID, "key_1", key.ID))
	lease.Secret.Renewable = false // that plugin has no renewal
	return lease, made.ID
}

func (h *goldenMount) entry(at string) string {
	h.t.Helper()
	entry, err := h.storage.inner.Get(h.t.Context(), at)
	require.NoError(h.t, err)
	if entry == nil {
		return ""
	}
	return string(entry.Value)
}

func TestCommunity_MigratesAMount(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	lease, account := h.communityLease("vault-app-x7k2m9qa")
	_, unowned := h.communityLease("vault-app-b3n8w5zc") // an account without a lease

	issued := h.lease("creds/app", nil)
	require.NotEmpty(t, issued.Data["expires_at"], "its key expires")
	require.NoError(t, h.revoke(lease))
	require.NotContains(t, h.alive(), account)
	h.must(h.write("config/rotate", nil))
	require.NoError(t, h.revoke(issued))

	// Tidy covers the projects of these roles, whether recorded or not, and leaves
	// accounts without the mount tag.
	require.NoError(t, h.storage.inner.Delete(t.Context(), projectStoragePrefix+h.project))
	orphan := h.orphan()
	require.EqualValues(t, 1, h.tidy(true)["deleted_count"])
	require.NotContains(t, h.alive(), orphan)
	require.Equal(t, []string{unowned}, h.alive())
	h.sim.Keep(unowned, h.liveKey(unowned).ID)
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestCommunity_TheConfigIsCompleted(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	before := h.entry(configStorageKey)
	id, _ := h.sim.AdminKey()
	for field, want := range map[string]any{
		"admin_api_key_id":           id,
		"organization_id":            h.sim.OrganizationID(),
		"api_endpoint":               h.sim.URL(),
		"allow_insecure_endpoint":    false,
		"project_id":                 "",
		"request_timeout":            int64(30),
		"max_concurrent_requests":    client.DefaultConcurrency,
		"rotation_grace_period":      int64(300),
		"tidy_interval":              int64(12 * 3600),
		"tidy_safety_buffer":         int64(600),
		"rotation_period":            int64(0),
		"rotation_schedule":          "",
		"disable_automated_rotation": false,
		"last_rotated":               nil, // that plugin also sets it at each config write
		"next_rotation":              nil,
		"rotation_manager":           "",
	} {
		require.EqualValues(t, want, h.config()[field], field)
	}
	require.Equal(t, before, h.entry(configStorageKey), "a read changes nothing")

	h.must(h.write("config", map[string]any{"tidy_interval": "6h"}))
	require.Contains(t, h.entry(configStorageKey), `"version":1,`)
	h.restart()
	require.EqualValues(t, 6*3600, h.config()["tidy_interval"])
	require.EqualValues(t, 30, h.config()["request_timeout"])
}

func TestCommunity_AcceptsItsEndpoints(t *testing.T) {
	t.Parallel()
	for stored, want := range map[string]struct {
		endpoint string
		insecure bool
	}{
		"":                                {client.DefaultBaseURL, false},
		"https://api.openai.com/v1/":      {"https://api.openai.com/v1", false},
		"http://127.0.0.1:8080/v1":        {"http://127.0.0.1:8080/v1", false},
		"http://gateway.example:8080/v1/": {"http://gateway.example:8080/v1", true},
	} {
		h := &goldenMount{newHarness(t, openaitest.Options{}), map[string]bool{}}
		h.store(configStorageKey, h.file("community/config.json", "https://api.openai.com/v1", stored))
		require.Equal(t, want.endpoint, h.config()["api_endpoint"], stored)
		require.Equal(t, want.insecure, h.config()["allow_insecure_endpoint"], stored)
		// Another spelling of the stored endpoint does not need the admin key.
		h.must(h.write("config", map[string]any{"request_timeout": 20, "skip_verify": true}))
		require.Equal(t, want.endpoint, h.config()["api_endpoint"], stored)
	}
}

func TestCommunity_ItsScheduleContinues(t *testing.T) {
	t.Parallel()
	last := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	t.Run("period", func(t *testing.T) {
		t.Parallel()
		h := communityMount(t)
		h.manager.set(nil) // that plugin accepts a schedule only on Enterprise
		recent := h.now().Add(-24 * time.Hour).UTC().Truncate(time.Second)
		h.storeConfig("community/config_rotated.json", "2026-01-02T03:04:05.678901234Z", recent.Format(time.RFC3339Nano))
		require.Equal(t, recent.Add(7*24*time.Hour), h.time("next_rotation"))
		require.Equal(t, managerVault, h.config()["rotation_manager"])
		require.NoError(t, h.b.runSchedule(t.Context(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}))
		job, known := h.manager.job()
		require.True(t, known, "the rotation manager knows the schedule")
		require.Equal(t, 7*24*time.Hour, job.RotationPeriod)
		require.Equal(t, recent.Add(7*24*time.Hour), h.time("next_rotation"), "the schedule is not postponed")

		before, _ := h.sim.AdminKey()
		require.NoError(t, h.rotateByVault())
		require.NotEqual(t, before, h.adminKeyID())
		require.NotEmpty(t, h.config()["last_rotated"])
		h.sim.Keep(h.adminKeyIDs()...)
	})
	for name, c := range map[string]struct {
		replace []string
		want    schedule.Schedule
	}{
		"cron": {[]string{`"rotation_schedule":""`, `"rotation_schedule":"0 2 * * *"`, `"rotation_window":0`, `"rotation_window":7200000000000`, `"rotation_period":604800000000000`, `"rotation_period":0`},
			schedule.Schedule{RotationSchedule: "0 2 * * *", RotationWindow: 2 * time.Hour, NextRotation: time.Date(2026, 1, 3, 2, 0, 0, 0, time.UTC)}},
		"both, where Vault's scheduler uses the cron": {[]string{`"rotation_schedule":""`, `"rotation_schedule":"0 2 * * *"`},
			schedule.Schedule{RotationSchedule: "0 2 * * *", NextRotation: time.Date(2026, 1, 3, 2, 0, 0, 0, time.UTC)}},
		"paused": {[]string{`"disable_automated_rotation":false`, `"disable_automated_rotation":true`}, schedule.Schedule{RotationPeriod: 7 * 24 * time.Hour}},
		"period": {nil, schedule.Schedule{RotationPeriod: 7 * 24 * time.Hour, NextRotation: last.Add(7 * 24 * time.Hour)}},
	} {
		t.Run("decoded: "+name, func(t *testing.T) {
			t.Parallel()
			h := communityMount(t)
			h.storeConfig("community/config_rotated.json", c.replace...)
			cfg, err := getConfig(t.Context(), h.storage)
			require.NoError(t, err)
			require.Equal(t, c.want, cfg.Schedule)
		})
	}
}

func TestCommunity_ItsLeasesAreRevoked(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	lease, account := h.communityLease("vault-app-x7k2m9qa")
	heal := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusForbidden})
	require.ErrorContains(t, h.revoke(lease), "service account "+account+" in project "+h.project)
	require.Len(t, h.walEntries(), 1, "the WAL retries, even in a new process")
	heal()
	h.restart()
	h.runPeriodicWork()
	h.onlyLeased()
	h.advance(time.Hour) // an account deleted by hand, whose 404 is final by now
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

func TestCommunity_AnInvalidLeaseNamesTheMissingField(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	for _, missing := range []string{"service_account_id", "project_id"} {
		var data map[string]any
		require.NoError(t, json.Unmarshal(h.file("community/lease.json"), &data))
		delete(data, missing)
		lease := &logical.Response{Secret: &logical.Secret{InternalData: data}}
		require.ErrorContains(t, h.revoke(lease), missing)
	}
}

func TestCommunity_ItsLeasesAreNotRenewed(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	lease, account := h.communityLease("vault-app-x7k2m9qa")
	// Vault does not request it, since these leases are not renewable; if it did, the
	// lease would stay unchanged.
	_, err := h.renew(t.Context(), lease, time.Minute, time.Hour)
	require.ErrorContains(t, err, "cannot be renewed")
	require.ErrorContains(t, err, "creds/app")
	require.Equal(t, http.StatusBadRequest, coded(t, err))
	metrics := h.must(h.do(t.Context(), logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"})).Data[logical.HTTPRawBody].([]byte)
	require.Contains(t, string(metrics), `vault_openai_credentials_renewed_total{mount_point="openai/",outcome="refused"`, "a refusal is not a failure")
	require.Equal(t, []string{account}, h.alive())
	require.NoError(t, h.revoke(lease))
}

func TestCommunity_ItsRolesIssueCredentials(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	h.store("roles/zero", h.file("community/role.json", "proj_1", h.project, "3600000000000", "0", "86400000000000", "0"))
	h.must(h.write("roles/own", map[string]any{"project_id": h.project}))
	before := h.entry("roles/app")
	require.Equal(t, []string{"app", "own", "zero"}, h.must(h.list("roles")).Data["keys"])
	for role, ttls := range map[string][2]int64{"app": {3600, 86400}, "zero": {3600, 86400}} {
		data := h.must(h.read("roles/" + role)).Data
		require.Equal(t, h.project, data["project_id"], role)
		require.Equal(t, ttls[0], data["effective_ttl"], role)
		require.Equal(t, ttls[1], data["effective_max_ttl"], role)
		require.Equal(t, "Service account created by Vault", data["service_account_description"])
		require.Equal(t, typeAccount, data["credential_type"])
		require.Equal(t, expiryMaxTTL, data["key_expiry"])
		lease := h.lease("creds/"+role, nil)
		require.Equal(t, time.Hour, lease.Secret.TTL, role)
		require.NoError(t, h.revoke(lease))
	}
	require.Equal(t, before, h.entry("roles/app"), "serving a role does not change it")

	// The engine's own entry takes precedence; the other one stays for a rollback.
	h.must(h.write("roles/app", map[string]any{"ttl": "2h"}))
	require.EqualValues(t, 7200, h.must(h.read("roles/app")).Data["ttl"])
	require.Equal(t, before, h.entry("roles/app"))
	require.Equal(t, []string{"app", "own", "zero"}, h.must(h.list("roles")).Data["keys"])

	// Deleting a role deletes both entries.
	for _, role := range []string{"app", "zero"} {
		h.must(h.remove("roles/" + role))
		require.Nil(t, h.must(h.read("roles/"+role)))
		require.Contains(t, h.refused(h.read("creds/"+role)), "not found")
	}
	require.Equal(t, []string{"own"}, h.must(h.list("roles")).Data["keys"])
	require.Empty(t, h.entry("roles/app"))
}

func TestCommunity_ARoleDeletedOnAnotherNodeIsInvalidated(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	require.NoError(t, h.storage.inner.Delete(t.Context(), "roles/app"))
	h.b.invalidate(t.Context(), "roles/app")
	require.Contains(t, h.refused(h.read("creds/app")), `role "app" not found`)
}

func TestCommunity_InvalidTemplatesCauseWarnings(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	lease, _ := h.communityLease("vault-app-x7k2m9qa")
	for template, why := range map[string]string{
		"vault-{{.ProjectName}}-{{.RandomSuffix}}": ".ProjectName",
		"vault-{{uuid}}-{{.RandomSuffix}}":         `function "uuid"`,
		"vault-{{.RoleName}}-{{random 8}}":         "{{.RandomSuffix}}",
	} {
		h.store("roles/app", h.file("community/role.json", "proj_1", h.project, "vault-{{.RoleName}}-{{.RandomSuffix}}", template))
		h.restart()
		resp := h.must(h.read("roles/app"))
		require.Len(t, resp.Warnings, 1, template)
		require.Contains(t, resp.Warnings[0], why)
		require.Contains(t, resp.Warnings[0], "service_account_name_template")
		said := h.refused(h.read("creds/app"))
		require.Contains(t, said, `role "app"`)
		require.Contains(t, said, why)
	}
	require.NoError(t, h.revoke(lease), "a revocation does not read the role")
	h.must(h.write("roles/app", map[string]any{"service_account_name_template": ""}))
	require.Empty(t, h.must(h.read("roles/app")).Warnings)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.onlyLeased()
}

// The tag is created once, before any name contains it and after the roles' projects
// and longest lease are recorded for tidy: a role may be deleted before tidy reads it.
func TestCommunity_TheTagIsCreatedOnceAndFirst(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	second := h.sim.AddProject("second")
	h.store("roles/second", h.file("community/role.json", "proj_1", second, "86400000000000", "172800000000000"))

	for write := range 5 { // the longest lease and the project of each role, and the tag
		h.storage.fail(storageFault{write: write})
		_, err := h.read("creds/app")
		require.Error(t, err, "write %d", write)
		h.storage.heal()
		require.Empty(t, h.alive(), "write %d", write)
		require.Empty(t, h.entry(mountStorageKey), "write %d", write)
		for _, at := range []string{projectStoragePrefix + h.project, projectStoragePrefix + second, longestLeaseStorageKey} {
			require.NoError(t, h.storage.inner.Delete(t.Context(), at))
		}
	}

	var group sync.WaitGroup
	leases := make([]*logical.Response, 8)
	for i := range leases {
		group.Go(func() { leases[i], _ = h.read("creds/app") })
	}
	group.Wait()
	tag, err := getTag(t.Context(), h.storage)
	require.NoError(t, err)
	for _, lease := range leases {
		require.NotNil(t, lease)
		require.Contains(t, fmt.Sprint(lease.Data["service_account"]), "vault-app-"+tag)
		require.NoError(t, h.revoke(h.stored(lease)))
	}
	projects, err := h.storage.List(t.Context(), projectStoragePrefix)
	require.NoError(t, err)
	require.ElementsMatch(t, []string{h.project, second}, projects)
	longest, err := getLongestLease(t.Context(), h.storage)
	require.NoError(t, err)
	require.Equal(t, 48*time.Hour, longest.LongestLease)
	h.onlyLeased()
}

// Without a request, the first tick creates the tag.
func TestCommunity_TheFirstTickCreatesTheTag(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	h.rollback()
	require.NotEmpty(t, h.entry(mountStorageKey))
}

// The mount gets its tag, without which tidy deletes nothing, only once all roles are
// read and recorded.
func TestCommunity_AnUnreadableRoleBlocksTheTag(t *testing.T) {
	t.Parallel()
	h := communityMount(t)
	h.store("roles/broken", []byte("{")) // it cannot issue credentials
	broken := errors.New("no quorum")
	storage := &watchedStorage{Storage: h.storage, get: func(key string) error {
		if key == communityRolePrefix+"app" {
			return broken
		}
		return nil
	}}
	_, err := h.b.ensureTag(t.Context(), storage)
	require.ErrorIs(t, err, broken)
	_, err = getTag(t.Context(), h.storage)
	require.ErrorIs(t, err, errNoTag)
	_, err = h.b.ensureTag(t.Context(), h.storage)
	require.NoError(t, err)
	require.Equal(t, []string{h.project}, h.recorded())

	// The same for the longest lease of a mount that has not recorded it.
	_, err = h.b.longestUnrecorded(t.Context(), storage, time.Hour)
	require.ErrorIs(t, err, broken)
	_, err = h.b.longestUnrecorded(t.Context(), h.storage, time.Hour)
	require.NoError(t, err)
}
