package openaisecrets

// Golden files pin what each storage entry and lease looks like: every later
// release must read them. A change here is a change of format, and needs a
// new version number beside the old file, not in its place.

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
)

func golden(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	return content
}

func TestGolden_ConfigV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	want := &config{
		Version:               1,
		AdminKey:              client.NewSecret("sk-admin-golden"),
		AdminKeyID:            "key_1",
		AdminKeyRotated:       true,
		OrganizationID:        "org-1",
		APIEndpoint:           "https://api.openai.com/v1",
		AllowInsecureEndpoint: true,
		CACert:                "PEM",
		RotationGracePeriod:   5 * time.Minute,
		RequestTimeout:        30 * time.Second,
		MaxConcurrent:         256,
		TidyInterval:          time.Hour,
		TidySafetyBuffer:      time.Minute,
		LastRotated:           time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Retired:               []retiredKey{{ID: "key_0", DeleteAfter: time.Date(2026, 1, 2, 3, 9, 5, 0, time.UTC)}},

		RotationPeriod:           24 * time.Hour,
		RotationSchedule:         "0 2 * * *",
		RotationWindow:           2 * time.Hour,
		DisableAutomatedRotation: true,
		RotationManager:          "internal",
		NextRotation:             time.Date(2026, 1, 3, 2, 0, 0, 0, time.UTC),
		RotationError:            "a reason",
		AdminKeyExpires:          time.Date(2026, 1, 9, 3, 4, 5, 0, time.UTC),
	}
	require.NoError(t, putConfig(t.Context(), s, want))
	entry, err := s.Get(t.Context(), configStorageKey)
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "config.v1.json")), string(entry.Value))

	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: configStorageKey, Value: golden(t, "config.v1.json")}))
	got, err := getConfig(t.Context(), s)
	require.NoError(t, err)
	require.True(t, want.AdminKey.Equal(got.AdminKey))
	got.AdminKey = want.AdminKey // equal, but another pointer
	require.Equal(t, want, got)
}

func TestGolden_RoleV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	want := &role{Version: 1, ProjectID: "proj_1", NameTemplate: defaultNameTemplate, Description: "for the app", TTL: time.Hour, MaxTTL: 24 * time.Hour}
	encoded, err := json.Marshal(want)
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "role.v1.json")), string(encoded))
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + "app", Value: golden(t, "role.v1.json")}))
	got, err := getRole(t.Context(), s, "app")
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestGolden_MountV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	encoded, err := json.Marshal(mountEntry{Version: 1, Tag: "ab3de"})
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "mount.v1.json")), string(encoded))
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: mountStorageKey, Value: golden(t, "mount.v1.json")}))
	tag, err := getTag(t.Context(), s)
	require.NoError(t, err)
	require.Equal(t, "ab3de", tag)
}

func TestGolden_JournalV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	put := func(file string) any {
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: framework.WALPrefix + file, Value: golden(t, file)}))
		entry, err := framework.GetWAL(t.Context(), s, file)
		require.NoError(t, err)
		return entry.Data
	}
	var acct account
	require.NoError(t, decodeInto(&acct, put("journal_service_account.v1.json")))
	require.Equal(t, account{Version: 1, ProjectID: "proj_1", Name: "vault-app-ab3defghij4klmn", ID: "user-1"}, acct)
	var key adminKeyEntry
	require.NoError(t, decodeInto(&key, put("journal_admin_key.v1.json")))
	require.Equal(t, adminKeyEntry{Version: 1, Name: "vault-admin-ab3defghij4klmn"}, key)

	for file, data := range map[string]any{"journal_service_account.v1.json": acct, "journal_admin_key.v1.json": key} {
		kind := map[bool]string{true: journalAccount, false: journalAdminKey}[data == any(acct)]
		encoded, err := json.Marshal(framework.WALEntry{Kind: kind, Data: data, CreatedAt: 1767323045})
		require.NoError(t, err)
		require.JSONEq(t, string(golden(t, file)), string(encoded))
	}
}

func TestGolden_LeaseV1(t *testing.T) {
	t.Parallel()
	want := leaseData{account: account{Version: 1, ProjectID: "proj_1", Name: "vault-app-ab3defghij4klmn", ID: "user-1"}, Role: "app", MaxTTL: 24 * time.Hour, KeyExpires: time.Date(2026, 1, 3, 3, 6, 5, 0, time.UTC)}
	encoded, err := json.Marshal(want.internal())
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "lease.v1.json")), string(encoded))
	var data map[string]any
	require.NoError(t, json.Unmarshal(golden(t, "lease.v1.json"), &data))
	got, err := decodeLease(&logical.Request{Secret: &logical.Secret{InternalData: data}})
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestStorage_NewerFormatsAreRefused(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	for _, key := range []string{configStorageKey, roleStoragePrefix + "app"} {
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(`{"version":99}`)}))
	}
	_, err := getConfig(t.Context(), s)
	require.ErrorContains(t, err, "newer version")
	_, err = getRole(t.Context(), s, "app")
	require.ErrorContains(t, err, "newer version")
}
