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
	"vault-plugin-secrets-openai/internal/naming"
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
		Retired:               []retiredKey{{ID: "key_0", DeleteAfter: time.Date(2026, 1, 2, 3, 9, 5, 0, time.UTC)}},

		schedule: schedule{
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

	// Added without a new format, since an earlier release may ignore it: roles
	// that rely on it are of a format which that refuses.
	want.ProjectID = "proj_1"
	require.NoError(t, putConfig(t.Context(), s, want))
	entry, err = s.Get(t.Context(), configStorageKey)
	require.NoError(t, err)
	require.Contains(t, string(entry.Value), `"project_id":"proj_1"`)

	// Added likewise. An earlier release deletes such a key when it is due.
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	require.Equal(t, at, want.Retired[0].superseded(want.RotationGracePeriod), "of an entry that does not say when")
	want.Retired = []retiredKey{{ID: "key_0", DeleteAfter: at.Add(7 * 24 * time.Hour), SupersededAt: at, SupersededThere: at, CreatedAt: at, Regardless: true, Kept: keptUsed, LastUsed: at, Elsewhere: true}}
	require.NoError(t, putConfig(t.Context(), s, want))
	entry, err = s.Get(t.Context(), configStorageKey)
	require.NoError(t, err)
	require.Contains(t, string(entry.Value), `"retired_admin_keys":[{"id":"key_0","delete_after":"2026-01-09T03:04:05Z","superseded_at":"2026-01-02T03:04:05Z","superseded_at_openai":"2026-01-02T03:04:05Z","created_at":"2026-01-02T03:04:05Z","regardless_of_use":true,"kept":"used","last_used_at":"2026-01-02T03:04:05Z","elsewhere":true}]`)
	got, err = getConfig(t.Context(), s)
	require.NoError(t, err)
	require.Equal(t, want.Retired, got.Retired)
}

func TestGolden_Roles(t *testing.T) {
	t.Parallel()
	// What format 1 did not know is as it was then, but for the wait until a new
	// key works.
	v1 := &role{
		Version: 1, ProjectID: "proj_1", NameTemplate: naming.DefaultTemplate, Description: "for the app", TTL: time.Hour, MaxTTL: 24 * time.Hour,
		KeyExpiry: expiryMaxTTL, CredentialType: typeAccount, ActivationTimeout: defaultActivation,
	}
	v2 := &role{
		Version: 2, ProjectID: "proj_1", NameTemplate: naming.DefaultTemplate, Description: "for the app", TTL: time.Hour, MaxTTL: 24 * time.Hour,
		Scopes: []string{"api.model.request", "api.model.read"}, KeyExpiry: expiryTTL, CredentialType: typeKey,
		ServiceAccountID: "user-1", ServiceAccount: "batch", ActivationTimeout: 0,
	}
	v3 := &role{
		Version: 3, ProjectID: "proj_1", NameTemplate: naming.DefaultTemplate, KeyExpiry: expiryMaxTTL, CredentialType: typeAccount, ActivationTimeout: defaultActivation,
		AsWritten: asWritten{"key_expiry": ""},
	}
	for file, want := range map[string]*role{"role.v1.json": v1, "role.v2.json": v2, "role.v3.json": v3} {
		s := &logical.InmemStorage{}
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + "app", Value: golden(t, file)}))
		got, err := getRole(t.Context(), s, "app")
		require.NoError(t, err)
		require.Equal(t, want, got, file)
	}
	encoded, err := json.Marshal(v2)
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "role.v2.json")), string(encoded))
	encoded, err = json.Marshal(v3)
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "role.v3.json")), string(encoded))
}

func TestGolden_StaticRoleV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	at := func(day int) time.Time { return time.Date(2026, 1, day, 3, 4, 5, 0, time.UTC) }
	want := &staticRole{
		Version:   1,
		schedule:  schedule{RotationPeriod: 24 * time.Hour, RotationSchedule: "0 2 * * *", RotationWindow: 2 * time.Hour, LastRotated: at(2), NextRotation: at(3)},
		ProjectID: "proj_1", ServiceAccountID: "user-1", ServiceAccount: "batch", Adopted: true, Description: "for the batch",
		Scopes: []string{"api.model.request"}, RevocationDelay: time.Hour, KeyTTL: 72 * time.Hour, ActivationTimeout: 10 * time.Second, RotationError: "a reason",
		Current: staticKey{ID: "key_2", Name: "vault-static-batch-ab3defghij4klmn", Value: client.NewSecret("sk-svcacct-golden"), ExpiresAt: at(9)},
		Retired: []staticKey{{ID: "key_1", Name: "vault-static-batch-ab3dezzzzzzzzzz", ExpiresAt: at(8), DeleteAfter: at(2)}},
	}
	require.NoError(t, putStaticRole(t.Context(), s, "batch", want))
	entry, err := s.Get(t.Context(), staticStoragePrefix+"batch")
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "static_role.v1.json")), string(entry.Value))

	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: staticStoragePrefix + "batch", Value: golden(t, "static_role.v1.json")}))
	got, err := getStaticRole(t.Context(), s, "batch")
	require.NoError(t, err)
	require.True(t, want.Current.Value.Equal(got.Current.Value))
	got.Current.Value = want.Current.Value // equal, but another pointer
	require.Equal(t, want, got)

	// Added without a new format, since an earlier release may ignore it: it
	// deletes a superseded key at the end of revocation_delay.
	want.AccountCreatedAt = at(1)
	want.Current.CreatedAt, want.Current.OpenAICreatedAt, want.Current.OpenAIExpiresAt = at(2), at(2), at(9)
	retired := &want.Retired[0]
	retired.SupersededAt, retired.SuccessorAt, retired.EvenIfUsed, retired.KeptAt, retired.LastUsedAt = at(1), at(2), true, at(3), at(4)
	require.NoError(t, putStaticRole(t.Context(), s, "batch", want))
	entry, err = s.Get(t.Context(), staticStoragePrefix+"batch")
	require.NoError(t, err)
	var stored struct {
		AccountCreated string            `json:"service_account_created_at"`
		Current        map[string]string `json:"current_key"`
		Retired        []map[string]any  `json:"retired_keys"`
	}
	require.NoError(t, entry.DecodeJSON(&stored))
	text := func(day int) string { return at(day).Format(time.RFC3339) }
	require.Equal(t, text(1), stored.AccountCreated)
	require.Equal(t, map[string]string{
		"id": "key_2", "name": "vault-static-batch-ab3defghij4klmn", "expires_at": text(9),
		"created_at": text(2), "openai_created_at": text(2), "openai_expires_at": text(9),
	}, stored.Current)
	require.Equal(t, map[string]any{
		"id": "key_1", "name": "vault-static-batch-ab3dezzzzzzzzzz", "expires_at": text(8), "delete_after": text(2),
		"superseded_at": text(1), "successor_created_at": text(2), "delete_even_if_used": true, "kept_at": text(3), "last_used_at": text(4),
	}, stored.Retired[0])
	got, err = getStaticRole(t.Context(), s, "batch")
	require.NoError(t, err)
	got.Current.Value = want.Current.Value
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

func TestGolden_Journal(t *testing.T) {
	t.Parallel()
	const name = "vault-app-ab3defghij4klmn"
	made := int64(1767323045)
	// What is written now, and what releases before wrote.
	now := map[string]framework.WALEntry{
		"journal_service_account.v2.json": {Kind: journalAccount, CreatedAt: made, Data: credential{Version: 2, Type: typeAccount, ProjectID: "proj_1", Name: name}},
		"journal_api_key.v2.json":         {Kind: journalKey, CreatedAt: made, Data: credential{Version: 2, Type: typeKey, ProjectID: "proj_1", Name: "batch", ID: "user-1", KeyName: name, StaticRole: "batch"}},
		"journal_admin_key.v1.json":       {Kind: journalAdminKey, CreatedAt: made, Data: adminKeyEntry{Version: 1, Name: "vault-admin-ab3defghij4klmn"}},
	}
	before := map[string]any{
		"journal_service_account.v1.json": credential{Version: 1, ProjectID: "proj_1", Name: name, ID: "user-1"},
	}
	for file, entry := range now {
		encoded, err := json.Marshal(entry)
		require.NoError(t, err)
		require.JSONEq(t, string(golden(t, file)), string(encoded), file)
		before[file] = entry.Data
	}
	s := &logical.InmemStorage{}
	for file, want := range before {
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: framework.WALPrefix + file, Value: golden(t, file)}))
		entry, err := framework.GetWAL(t.Context(), s, file)
		require.NoError(t, err)
		if _, isKey := want.(adminKeyEntry); isKey {
			var got adminKeyEntry
			require.NoError(t, decodeInto(&got, entry.Data))
			require.Equal(t, want, got, file)
			continue
		}
		var got credential
		require.NoError(t, decodeInto(&got, entry.Data))
		require.Equal(t, want, got, file)
		require.NoError(t, got.check(), file)
	}
	// Added without a new format; an entry without it counts as old.
	encoded, err := json.Marshal(adminKeyEntry{Version: 1, Name: "vault-admin-ab3defghij4klmn", CreatedAt: time.Unix(made, 0).UTC()})
	require.NoError(t, err)
	require.JSONEq(t, `{"version":1,"name":"vault-admin-ab3defghij4klmn","created_at":"2026-01-02T03:04:05Z"}`, string(encoded))
	require.Equal(t, []string{journalAccount, journalRevoked, journalKey, journalRevokedKey},
		[]string{"service_account", "revoked_service_account", "api_key", "revoked_api_key"}, "the kinds are part of the format")
}

func TestGolden_Leases(t *testing.T) {
	t.Parallel()
	const name = "vault-app-ab3defghij4klmn"
	expires := time.Date(2026, 1, 3, 3, 6, 5, 0, time.UTC)
	v1 := leaseData{credential: credential{Version: 1, ProjectID: "proj_1", Name: name, ID: "user-1", KeyExpires: expires}, Role: "app", MaxTTL: 24 * time.Hour}
	v2 := leaseData{
		credential: credential{Version: 2, Type: typeAccount, ProjectID: "proj_1", Name: name, ID: "user-1", KeyID: "key_1", KeyExpires: expires},
		Role:       "app", MaxTTL: 24 * time.Hour, KeyExpiry: expiryMaxTTL,
	}
	key := v2
	key.credential = credential{Version: 2, Type: typeKey, ProjectID: "proj_1", Name: "batch", ID: "user-1", KeyName: name, KeyID: "key_1"}
	key.KeyExpiry = expiryNone
	for file, want := range map[string]leaseData{"lease.v1.json": v1, "lease.v2.json": v2, "lease_api_key.v2.json": key} {
		var data map[string]any
		require.NoError(t, json.Unmarshal(golden(t, file), &data))
		got, err := decodeLease(&logical.Request{Secret: &logical.Secret{InternalData: data}})
		require.NoError(t, err)
		require.Equal(t, want, got, file)
		if want.Version == credentialVersion {
			encoded, err := json.Marshal(want.internal())
			require.NoError(t, err)
			require.JSONEq(t, string(golden(t, file)), string(encoded), file)
		}
	}
}

func TestStorage_NewerFormatsAreRefused(t *testing.T) {
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
