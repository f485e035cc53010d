package client

// Admin keys, the search for one by its redacted value, and the check of its permission
// without a side effect.

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestAdminKey_Lifecycle(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		ctx := context.Background()
		sim := simulate(t, o)
		c := connect(t, sim)
		rootID, rootKey := sim.AdminKey()

		made, value, err := c.CreateAdminKey(ctx, "vault-rotated", 24*time.Hour)
		require.NoError(t, err)
		require.Equal(t, "vault-rotated", made.Name)
		require.WithinDuration(t, time.Now().Add(24*time.Hour), made.ExpiresAt, time.Minute)
		require.True(t, made.Matches(value))
		require.False(t, made.Matches(NewSecret(rootKey)))

		next := connect(t, sim, withKey(value.Reveal()))
		got, err := next.GetAdminKey(ctx, made.ID)
		require.NoError(t, err, "the new key works")
		require.WithinDuration(t, time.Now(), made.CreatedAt, 5*time.Second)
		require.Zero(t, made.LastUsedAt)
		require.WithinDuration(t, time.Now(), got.LastUsedAt, 5*time.Second)
		got.LastUsedAt = time.Time{}
		require.Equal(t, made, got)

		keys, err := next.ListAdminKeys(ctx)
		require.NoError(t, err)
		require.Len(t, keys, 2)
		require.Equal(t, rootID, keys[0].ID)
		require.True(t, keys[0].Matches(NewSecret(rootKey)))
		keys[1].LastUsedAt = time.Time{}
		require.Equal(t, made, keys[1])

		require.NoError(t, c.DeleteAdminKey(ctx, made.ID))
		require.True(t, IsNotFound(c.DeleteAdminKey(ctx, made.ID)))
		_, err = c.GetAdminKey(ctx, made.ID)
		require.True(t, IsNotFound(err))
		_, err = next.ListAdminKeys(ctx)
		require.True(t, IsDenied(err))
		require.False(t, IsNotFound(err), "the rejection of a key does not prove that an object is missing")
	})
}

// OpenAI's example of a list has owners of an undocumented type, and names may be null.
func TestListAdminKeys_IgnoresUnusedFields(t *testing.T) {
	t.Parallel()
	keys, err := answering(t, http.StatusOK, nil, `{"object":"list","has_more":false,"data":[
		{"id":"k1","name":null,"redacted_value":"sk-admin...1234","created_at":1,"expires_at":null,"owner":{"type":"service_account","role":["x"]}},
		{"id":"k2","owner":"nobody"}]}`).ListAdminKeys(context.Background())
	require.NoError(t, err)
	require.Equal(t, []AdminKey{{ID: "k1", RedactedValue: "sk-admin...1234", CreatedAt: time.Unix(1, 0).UTC()}, {ID: "k2"}}, keys)
}

func TestAdminKeyMatches_RedactedValue(t *testing.T) {
	t.Parallel()
	for redactedValue, want := range map[string]bool{
		"sk-admin...wxyz":                   true,
		"sk-admin…wxyz":                     true,
		"sk-admin-0123***wxyz":              true,
		"sk-*****************wxyz":          true,
		"...wxyz":                           true,
		"sk-admin.*.…*wxyz":                 true,
		"sk-admin...wxyy":                   false,
		"sk-other...wxyz":                   false,
		"sk-admin...":                       false, // shows no part that identifies the key
		"...":                               false,
		"":                                  false,
		testKey:                             false, // not redacted
		testKey[:30] + "..." + testKey[20:]: false, // shows more than the whole key
		testKey + "...z":                    false,
		"sk-ad...min...wxyz":                false,
	} {
		require.Equal(t, want, AdminKey{RedactedValue: redactedValue}.Matches(NewSecret(testKey)), redactedValue)
		require.False(t, AdminKey{RedactedValue: redactedValue}.Matches(Secret{}), redactedValue)
	}
}

func TestCheckWrite_DetectsPermissionsWithoutSideEffect(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	_, readOnly := sim.AddAdminKey("reader", openaitest.ReadOnly())
	_, nothing := sim.AddAdminKey("nobody", openaitest.NoAccess())
	goneID, gone := sim.AddAdminKey("gone")
	sim.DeleteAdminKey(goneID)
	_, full := sim.AdminKey()
	before := len(sim.Ledger())

	for name, test := range map[string]struct {
		key    string
		status int
		text   string
	}{
		"allowed":   {full, 0, ""},
		"read only": {readOnly, http.StatusForbidden, "api.management.write"},
		"no access": {nothing, http.StatusForbidden, "api.management.write"},
		"deleted":   {gone, http.StatusUnauthorized, "invalid_api_key"},
	} {
		t.Run(name, func(t *testing.T) {
			err := connect(t, sim, withKey(test.key)).CheckWrite(context.Background())
			if test.status == 0 {
				require.NoError(t, err)
				return
			}
			e := failed(t, err)
			require.Equal(t, test.status, e.Status)
			require.True(t, e.Denied())
			require.True(t, strings.HasPrefix(e.Error(), "check that the admin key has write permission: OpenAI error: "), e)
			require.ErrorContains(t, e, test.text)
		})
	}
	require.Len(t, sim.Ledger(), before)

	t.Run("an outage is an error", func(t *testing.T) {
		defer sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusServiceUnavailable})()
		e := failed(t, connect(t, sim).CheckWrite(context.Background()))
		require.Equal(t, http.StatusServiceUnavailable, e.Status)
	})
}

func FuzzRedactedMatch(f *testing.F) {
	f.Add("sk-admin...wxyz", testKey, uint8(8), uint8(4))
	f.Add("…", "sk", uint8(0), uint8(0))
	f.Add("***a", "…a", uint8(1), uint8(1))
	f.Add("sk-admin-\xe2\x80", "\xe2\x80\xa6", uint8(200), uint8(200))
	f.Fuzz(func(t *testing.T, shown, key string, head, tail uint8) {
		if (AdminKey{RedactedValue: shown}).Matches(NewSecret(key)) {
			front := shown[:strings.IndexAny(shown, ".*…")]
			if !strings.HasPrefix(key, front) || strings.HasPrefix(shown, key) || shown[len(shown)-1] != key[len(key)-1] {
				t.Fatalf("%q matches %q", shown, key)
			}
		}
		// Whatever part is shown, a key matches its own redaction.
		if strings.ContainsAny(key, ".*…") || tail == 0 || int(head)+int(tail) >= len(key) {
			return
		}
		for _, mask := range []string{"...", "*", "…", "*****"} {
			own := key[:head] + mask + key[len(key)-int(tail):]
			if !(AdminKey{RedactedValue: own}).Matches(NewSecret(key)) {
				t.Fatalf("%q does not match %q", own, key)
			}
		}
	})
}
