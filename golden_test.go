package openaisecrets

// Golden files pin the format of each storage entry and lease, with every field; the
// TestGolden_ of some entries are in other files. After the first release, every later
// release must read them: a change of the format then needs a new version number and an
// additional file.

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/schedule"
)

func golden(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	return content
}

// pinned compares the current output with a golden file. UPDATE_GOLDEN=1 writes the
// file, which is correct only before the first release with the format.
func pinned(t *testing.T, file string, encoded []byte) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		var text bytes.Buffer
		require.NoError(t, json.Indent(&text, encoded, "", "  "))
		require.NoError(t, os.WriteFile(filepath.Join("testdata", file), append(text.Bytes(), '\n'), 0o600))
	}
	require.JSONEq(t, string(golden(t, file)), string(encoded), file)
}

func TestGolden_ConfigV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := &config{
		Version:               1,
		AdminKey:              client.NewSecret("sk-admin-golden"),
		AdminKeyID:            "key_1",
		AdminKeyRotated:       true,
		KeyOriginUnknown:      true,
		OrganizationID:        "org-1",
		APIEndpoint:           "https://api.openai.com/v1",
		AllowInsecureEndpoint: true,
		CACert:                "PEM",
		RotationGracePeriod:   5 * time.Minute,
		RequestTimeout:        30 * time.Second,
		MaxConcurrent:         256,
		TidyInterval:          time.Hour,
		TidySafetyBuffer:      time.Minute,
		UsageInterval:         10 * time.Minute,
		UsageRetention:        90 * 24 * time.Hour,
		UsageRecordIdentity:   true,
		ProjectID:             "proj_1",
		Superseded: []supersededKey{{
			ID: "key_0", DeleteAfter: at.Add(7 * 24 * time.Hour), SupersededAt: at, SupersededThere: at, CreatedAt: at,
			EvenIfUsed: true, Kept: keptUsed, LastUsed: at, Elsewhere: true, Unchecked: true,
		}},

		Schedule: schedule.Schedule{
			RotationPeriod:   24 * time.Hour,
			RotationSchedule: "0 2 * * *",
			RotationWindow:   2 * time.Hour,
			LastRotated:      time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
			NextRotation:     time.Date(2026, 1, 3, 2, 0, 0, 0, time.UTC),
		},
		DisableAutomatedRotation: true,
		RotationManager:          "internal",
		RotationError:            "a reason",
		AdminKeyExpires:          time.Date(2026, 1, 9, 3, 4, 5, 0, time.UTC),
		AsWritten:                asWritten{"api_endpoint": ""},
		requirements:             requirements{RequireSpendLimit: true, RequireModelAllowList: true, RequireScopes: true},
	}
	require.NoError(t, putConfig(t.Context(), s, want))
	entry, err := s.Get(t.Context(), configStorageKey)
	require.NoError(t, err)
	pinned(t, "config.v1.json", entry.Value)

	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: configStorageKey, Value: golden(t, "config.v1.json")}))
	got, err := getConfig(t.Context(), s)
	require.NoError(t, err)
	require.True(t, want.AdminKey.Equal(got.AdminKey))
	got.AdminKey = want.AdminKey // equal, but different pointers
	require.Equal(t, want, got)
}

func TestGolden_RoleV1(t *testing.T) {
	t.Parallel()
	for file, want := range map[string]*role{
		"role.v1.json": {
			Version: 1, NameTemplate: naming.DefaultTemplate, KeyExpiry: expiryMaxTTL, CredentialType: typeAccount, ActivationTimeout: defaultActivation,
			AsWritten: asWritten{"key_expiry": ""},
		},
		"role_api_key.v1.json": {
			Version: 1, ProjectID: "proj_1", NameTemplate: naming.DefaultTemplate, Description: "for the app", TTL: time.Hour, MaxTTL: 24 * time.Hour,
			Scopes: []string{"api.model.request", "api.model.read"}, KeyExpiry: expiryTTL, CredentialType: typeKey,
			ServiceAccountID: "user-1", ServiceAccount: "batch", ActivationFailure: activationWarn, PoolSize: 20, PoolMaxAge: time.Hour,
			spendRule: spendRule{SpendLimit: 1250, SpendWindow: windowDay, SpendAction: actionRevoke},
		},
	} {
		encoded, err := json.Marshal(want)
		require.NoError(t, err)
		pinned(t, file, encoded)
		s := &logical.InmemStorage{}
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + "app", Value: golden(t, file)}))
		got, err := getRole(t.Context(), s, "app")
		require.NoError(t, err)
		require.Equal(t, want, got, file)
	}
}

func TestGolden_StaticRoleV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	at := func(day int) time.Time { return time.Date(2026, 1, day, 3, 4, 5, 0, time.UTC) }
	want := &staticRole{
		Version:   1,
		Schedule:  schedule.Schedule{RotationPeriod: 24 * time.Hour, RotationSchedule: "0 2 * * *", RotationWindow: 2 * time.Hour, LastRotated: at(2), NextRotation: at(3)},
		ProjectID: "proj_1", ServiceAccountID: "user-1", ServiceAccount: "batch", Adopted: true, Description: "for the batch",
		Scopes: []string{"api.model.request"}, RevocationDelay: time.Hour, KeyTTL: 72 * time.Hour, ActivationTimeout: 10 * time.Second, RotationError: "a reason",
		AccountCreatedAt: at(1), ActivationFailure: activationWarn, DisableAutomatedRotation: true, DefaultDelay: true, AsWritten: asWritten{"key_ttl": "0"},
		spendRule: spendRule{SpendLimit: 1250, SpendWindow: windowDay, SpendAction: actionBlock},
		OnMissing: recreateMissing, Missing: &missing{What: missingKey, Since: at(2)}, Recreated: at(1),
		Current: staticKey{
			ID: "key_2", Name: "vault-static-batch-ab3defghij4klmn", Value: client.NewSecret("sk-svcacct-golden"), ExpiresAt: at(9), Warning: "a warning",
			CreatedAt: at(2), OpenAICreatedAt: at(2), OpenAIExpiresAt: at(9),
		},
		Superseded: []staticKey{{
			ID: "key_1", Name: "vault-static-batch-ab3dezzzzzzzzzz", ExpiresAt: at(8), CreatedAt: at(1), OpenAICreatedAt: at(1), OpenAIExpiresAt: at(8),
			DeleteAfter: at(2), SupersededAt: at(1), SuccessorAt: at(2), EvenIfUsed: true, KeptAt: at(3), LastUsedAt: at(4),
		}},
	}
	require.NoError(t, putStaticRole(t.Context(), s, "batch", want))
	entry, err := s.Get(t.Context(), staticStoragePrefix+"batch")
	require.NoError(t, err)
	pinned(t, "static_role.v1.json", entry.Value)

	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: staticStoragePrefix + "batch", Value: golden(t, "static_role.v1.json")}))
	got, err := getStaticRole(t.Context(), s, "batch")
	require.NoError(t, err)
	require.True(t, want.Current.Value.Equal(got.Current.Value))
	got.Current.Value = want.Current.Value // equal, but different pointers
	require.Equal(t, want, got)
}

func TestGolden_MountV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	encoded, err := json.Marshal(mountEntry{Version: 1, Tag: "ab3de", Pools: true})
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "mount.v1.json")), string(encoded))
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: mountStorageKey, Value: golden(t, "mount.v1.json")}))
	tag, err := getTag(t.Context(), s)
	require.NoError(t, err)
	require.Equal(t, "ab3de", tag)
}

func TestGolden_WALV1(t *testing.T) {
	t.Parallel()
	const name = "vault-app-ab3defghij4klmn"
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for file, want := range map[string]framework.WALEntry{
		"wal_service_account.v1.json": {Kind: walAccount, Data: credential{
			Version: 1, Type: typeAccount, ProjectID: "proj_1", Name: name, ID: "user-1", KeyID: "key_1", CreatedAt: made, KeyExpires: made.Add(24 * time.Hour),
		}},
		"wal_api_key.v1.json": {Kind: walKey, Data: credential{
			Version: 1, Type: typeKey, ProjectID: "proj_1", Name: "batch", ID: "user-1", KeyName: name, StaticRole: "batch", CreatedAt: made, KeyExpires: made.Add(24 * time.Hour),
		}},
		"wal_recreated_static_role.v1.json": {Kind: walRevokedAccount, Data: credential{ // the previous account
			Version: 1, Type: typeAccount, ProjectID: "proj_1", Name: name, ID: "user-1", KeyID: "key_1", StaticRole: "batch", CreatedAt: made, KeyExpires: made.Add(24 * time.Hour),
		}},
		"wal_pooled_service_account.v1.json": {Kind: walPooledAccount, Data: credential{
			Version: 1, Type: typeAccount, ProjectID: "proj_1", Name: name, CreatedAt: made, KeyExpires: made.Add(30 * time.Hour),
		}},
		"wal_pooled_api_key.v1.json": {Kind: walPooledKey, Data: credential{
			Version: 1, Type: typeKey, ProjectID: "proj_1", Name: "batch", ID: "user-1", KeyName: name, CreatedAt: made, KeyExpires: made.Add(30 * time.Hour),
		}},
		"wal_admin_key.v1.json": {Kind: walAdminKey, Data: adminKeyEntry{Version: 1, Name: "vault-admin-ab3defghij4klmn", CreatedAt: made}},
	} {
		want.CreatedAt = made.Unix()
		encoded, err := json.Marshal(want)
		require.NoError(t, err)
		pinned(t, file, encoded)
		s := &logical.InmemStorage{}
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: framework.WALPrefix + file, Value: golden(t, file)}))
		entry, err := framework.GetWAL(t.Context(), s, file)
		require.NoError(t, err)
		if _, isKey := want.Data.(adminKeyEntry); isKey {
			var got adminKeyEntry
			require.NoError(t, decodeInto(&got, entry.Data))
			require.Equal(t, want.Data, got, file)
			continue
		}
		var got credential
		require.NoError(t, decodeInto(&got, entry.Data))
		require.Equal(t, want.Data, got, file)
		require.NoError(t, got.check(), file)
	}
	require.Equal(t, []string{walAccount, walRevokedAccount, walPooledAccount, walKey, walRevokedKey, walPooledKey, walAdminKey},
		[]string{"service_account", "revoked_service_account", "pooled_service_account", "api_key", "revoked_api_key", "pooled_api_key", "admin_key"}, "the kinds are part of the format")
}

func TestGolden_LeaseV1(t *testing.T) {
	t.Parallel()
	const name = "vault-app-ab3defghij4klmn"
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	account := leaseData{
		credential: credential{Version: 1, Type: typeAccount, ProjectID: "proj_1", Name: name, ID: "user-1", KeyID: "key_1", CreatedAt: made, KeyExpires: made.Add(24*time.Hour + 2*time.Minute)},
		Role:       "app", MaxTTL: 24 * time.Hour, KeyExpiry: expiryMaxTTL, EntityID: "entity-1", DisplayName: "userpass-alice",
	}
	key := account
	key.credential = credential{Version: 1, Type: typeKey, ProjectID: "proj_1", Name: "batch", ID: "user-1", KeyName: name, KeyID: "key_1", CreatedAt: made}
	key.KeyExpiry = expiryNone
	pooled := account
	pooled.KeyExpires, pooled.Spare = made.Add(30*time.Hour+2*time.Minute), 6*time.Hour
	for file, want := range map[string]leaseData{"lease.v1.json": account, "lease_api_key.v1.json": key, "lease_pooled.v1.json": pooled} {
		encoded, err := json.Marshal(want.internal())
		require.NoError(t, err)
		pinned(t, file, encoded)
		var data map[string]any
		require.NoError(t, json.Unmarshal(golden(t, file), &data))
		got, err := decodeLease(&logical.Request{Secret: &logical.Secret{InternalData: data}})
		require.NoError(t, err)
		require.Equal(t, want, got, file)
	}
}

func TestGolden_UsageRecordsV1(t *testing.T) {
	t.Parallel()
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := usageEntry{Version: 1, Records: []usageRecord{
		{KeyID: "key_1", AccountID: "user-1", ProjectID: "proj_1", Type: typeAccount, Role: "app", EntityID: "entity-1", DisplayName: "userpass-alice", IssuedAt: made, Ends: made.Add(24 * time.Hour)},
		{KeyID: "key_2", AccountID: "user-2", ProjectID: "proj_1", Type: typeKey, StaticRole: "batch", IssuedAt: made},
	}}
	encoded, err := json.Marshal(want)
	require.NoError(t, err)
	pinned(t, "usage_records.v1.json", encoded)
	s := &logical.InmemStorage{}
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: usageKeysPrefix + "2026-01-02/a-1", Value: golden(t, "usage_records.v1.json")}))
	got, err := readUsageEntry(t.Context(), s, "2026-01-02/a-1")
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestStorage_NewerFormatsAreRejected(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	for _, key := range []string{configStorageKey, roleStoragePrefix + "app", staticStoragePrefix + "app"} {
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(`{"version":99}`)}))
	}
	_, err := getConfig(t.Context(), s)
	require.ErrorContains(t, err, "newer version")
	_, err = getRole(t.Context(), s, "app")
	require.ErrorContains(t, err, "newer version")
	_, err = getStaticRole(t.Context(), s, "app")
	require.ErrorContains(t, err, "newer version")
}
