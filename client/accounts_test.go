package client

// Creates and deletes of service accounts, and the common part of all creates: the expiry,
// and answers that are not the documented object.

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestServiceAccount_Lifecycle(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		ctx := context.Background()
		sim := simulate(t, o)
		c := connect(t, sim)
		project := sim.AddProject("p")

		account, key, err := c.CreateServiceAccount(ctx, project, "vault-web-x1", time.Hour)
		require.NoError(t, err)
		require.Len(t, sim.Accounts(), 1)
		at := sim.Accounts()[0]
		require.Equal(t, at.ID, account.ID)
		require.Equal(t, "vault-web-x1", account.Name)
		require.WithinDuration(t, time.Now(), account.CreatedAt, time.Minute)
		require.Equal(t, at.Keys[0].ID, key.ID)
		require.Equal(t, at.Keys[0].Value, key.Value.Reveal())
		require.WithinDuration(t, time.Now().Add(time.Hour), key.ExpiresAt, time.Minute)
		require.WithinDuration(t, at.Keys[0].ExpiresAt, key.ExpiresAt, 0)
		require.Equal(t, time.UTC, key.ExpiresAt.Location())

		listed, err := c.ListServiceAccounts(ctx, project)
		require.NoError(t, err)
		require.Equal(t, []ServiceAccount{account}, listed)
		read, err := c.GetServiceAccount(ctx, project, account.ID)
		require.NoError(t, err)
		require.Equal(t, account, read)
		require.Equal(t, "member", read.Role)
		_, err = c.GetServiceAccount(ctx, sim.AddProject("another"), account.ID)
		require.True(t, IsNotFound(err), "an account belongs to one project")

		require.NoError(t, c.DeleteServiceAccount(ctx, project, account.ID))
		require.Empty(t, sim.Accounts())
		require.Empty(t, sim.Keys(), "the keys are deleted with the account")
		require.True(t, IsNotFound(c.DeleteServiceAccount(ctx, project, account.ID)))
	})
}

func TestCreate_SendsOnlyTheExpiry(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	c := connect(t, sim)
	rec := record(sim)
	ctx := context.Background()
	for expiry, want := range map[time.Duration]any{
		0:                       nil,
		time.Nanosecond:         1.0, // never 0, which the API refuses
		time.Second:             1.0,
		90 * time.Second:        90.0,
		1500 * time.Millisecond: 2.0, // rounded up: the key must not expire early
		MaxExpiry:               31_536_000.0,
	} {
		t.Run(expiry.String(), func(t *testing.T) {
			expected := func(name string) map[string]any {
				body := map[string]any{"name": name}
				if want != nil {
					body["expires_in_seconds"] = want
				}
				return body
			}
			check := func(name string, err error) {
				t.Helper()
				require.NoError(t, err)
				var body map[string]any
				require.NoError(t, json.Unmarshal([]byte(rec.last(t).body), &body))
				require.Equal(t, expected(name), body)
			}
			_, key, err := c.CreateServiceAccount(ctx, on.project, "a", expiry)
			check("a", err)
			require.Equal(t, expiry == 0, key.ExpiresAt.IsZero())
			_, err = c.CreateServiceAccountKey(ctx, on.project, on.account, "k", nil, expiry)
			check("k", err)
			_, err = c.CreateServiceAccountKey(ctx, on.project, on.account, "k", []string{}, expiry)
			check("k", err)
			_, _, err = c.CreateAdminKey(ctx, "r", expiry)
			check("r", err)
		})
	}
}

// A miscalculated expiry must not create a key that does not expire.
func TestNegativeExpiry_IsNotSent(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	c := connect(t, sim)
	ctx := context.Background()
	_, _, err1 := c.CreateServiceAccount(ctx, on.project, "a", -time.Second)
	_, err2 := c.CreateServiceAccountKey(ctx, on.project, on.account, "k", nil, -1)
	_, _, err3 := c.CreateAdminKey(ctx, "r", -time.Hour)
	_, err4 := c.UpdateProjectKey(ctx, on.project, on.key, []string{"api.model.read"}, -time.Hour)
	for _, err := range []error{err1, err2, err3, err4} {
		e := failed(t, err)
		require.ErrorContains(t, e, "not sent: the expiry must not be negative")
		require.False(t, e.Sent || e.Ambiguous() || e.Retryable())
	}
	require.Empty(t, sim.Requests())
}

func TestEmptyID_IsNotSent(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	c := connect(t, sim)
	for name, v := range allCalls {
		if v.route == adminKeysRoute || v.route == projectsRoute || v.route == modelsRoute {
			continue // these calls have no ID
		}
		e := failed(t, v.call(context.Background(), c, ids{}))
		require.False(t, e.Sent || e.Ambiguous() || e.Retryable(), name)
		require.ErrorContains(t, e, "not sent: missing required", name)
	}
	require.Empty(t, sim.Requests())
}

// IDs are opaque and must stay one path segment, whatever they contain.
func TestSpecialID_StaysOnePathSegment(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"..", ".", "a/b", "../admin_api_keys", "a?b=c", "a#b", "a b", "%2e%2e", "é\x00\n"} {
		t.Run(fmt.Sprintf("%q", id), func(t *testing.T) {
			t.Parallel()
			sim := simulate(t, openaitest.Options{})
			c := connect(t, sim)
			require.True(t, IsNotFound(c.DeleteServiceAccount(context.Background(), id, id)))
			require.True(t, IsNotFound(c.DeleteAdminKey(context.Background(), id)))
			require.Equal(t, 1, sim.Count(http.MethodDelete, accountRoute))
			require.Equal(t, 1, sim.Count(http.MethodDelete, adminKeyRoute))
		})
	}
}

func TestArchivedProject_ErrorIsNotNotFound(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	c := connect(t, sim)
	sim.ArchiveProject(on.project)
	ctx := context.Background()
	for _, name := range []string{"CreateServiceAccount", "DeleteServiceAccount", "ListServiceAccounts", "DeleteProjectKey", "ListProjectKeys"} {
		e := failed(t, allCalls[name].call(ctx, c, on))
		assert.Equal(t, http.StatusBadRequest, e.Status, name)
		assert.Equal(t, "project_archived", e.Code, name)
		assert.False(t, e.NotFound() || e.Ambiguous() || e.Retryable(), name)
	}
}

// A lease is built from the answer, so an answer that is not the documented object must be
// an error; but an account may have been created.
func TestCreate_UnexpectedAnswerIsAmbiguous(t *testing.T) {
	t.Parallel()
	const key = `{"id":"k1","name":"n","value":"` + testKey + `","created_at":1,"expires_at":2}`
	for name, body := range map[string]string{
		"empty":                   ``,
		"space":                   ` `,
		"not JSON":                `<html>welcome</html>`,
		"binary":                  "\xff\xfe\x00",
		"truncated":               `{"id":"a1","api_key":` + key,
		"null":                    `null`,
		"number":                  `5`,
		"string":                  `"` + testKey + `"`,
		"array":                   `[{"id":"a1","api_key":` + key + `}]`,
		"empty object":            `{}`,
		"another object":          `{"status":"ok","value":"` + testKey + `"}`,
		"error in a 200":          `{"error":{"message":"` + testKey + `"}}`,
		"no id":                   `{"api_key":` + key + `}`,
		"null id":                 `{"id":null,"api_key":` + key + `}`,
		"empty id":                `{"id":"","api_key":` + key + `}`,
		"numeric id":              `{"id":5,"api_key":` + key + `}`,
		"no key":                  `{"id":"a1"}`,
		"null key":                `{"id":"a1","api_key":null}`,
		"key of another type":     `{"id":"a1","api_key":"` + testKey + `"}`,
		"key in a list":           `{"id":"a1","api_key":[` + key + `]}`,
		"key without a value":     `{"id":"a1","api_key":{"id":"k1"}}`,
		"key with a null value":   `{"id":"a1","api_key":{"id":"k1","value":null}}`,
		"key with an empty value": `{"id":"a1","api_key":{"id":"k1","value":""}}`,
		"key with a number":       `{"id":"a1","api_key":{"id":"k1","value":7}}`,
		"key with a boolean":      `{"id":"a1","api_key":{"id":"k1","value":true}}`,
		"key with an object":      `{"id":"a1","api_key":{"id":"k1","value":{}}}`,
		"key without an id":       `{"id":"a1","api_key":{"value":"` + testKey + `"}}`,
		"key with a numeric id":   `{"id":"a1","api_key":{"id":5,"value":"` + testKey + `"}}`,
		"nested one level lower":  `{"data":{"id":"a1","api_key":` + key + `}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := answering(t, http.StatusOK, map[string]string{"x-request-id": "req_1"}, body)
			account, made, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
			e := failed(t, err)
			require.Zero(t, account)
			require.Zero(t, made)
			require.Equal(t, http.StatusOK, e.Status)
			require.Equal(t, "req_1", e.RequestID)
			require.True(t, e.Sent && e.Ambiguous() && e.Retryable())
			require.False(t, e.NotFound() || e.Denied())
			requireFit(t, e, testKey)
		})
	}
	t.Run("other creates", func(t *testing.T) {
		t.Parallel()
		for _, body := range []string{`{}`, `{"id":"k1"}`, `{"id":"k1","value":7}`, `{"id":5,"value":"` + testKey + `"}`} {
			c := answering(t, http.StatusOK, nil, body)
			for name, v := range allCalls {
				if v.once {
					err := v.call(context.Background(), c, placeholderIDs)
					require.Error(t, err, "%s: %s", name, body)
					require.True(t, failed(t, err).Ambiguous(), "%s: %s", name, body)
				}
			}
		}
	})
	t.Run("other fields may be invalid", func(t *testing.T) {
		t.Parallel()
		c := answering(t, http.StatusOK, nil, `{"id":"a1","name":null,"created_at":"x","role":7,"new":{},
			"api_key":{"id":"k1","value":"`+testKey+`","expires_at":"soon","name":[]}}`)
		account, made, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		require.NoError(t, err, "an unused field does not discard a working key")
		require.Equal(t, ServiceAccount{ID: "a1"}, account)
		require.True(t, made.ExpiresAt.IsZero() && made.CreatedAt.IsZero(), "an invalid time is the zero time")
		require.True(t, made.Value.Equal(NewSecret(testKey)))
	})
	t.Run("only a valid number is a time", func(t *testing.T) {
		t.Parallel()
		for text, want := range map[string]time.Time{
			"1e400": {}, "1e300": {}, "-1e300": {}, "9223372036854775808": {}, "253402300800": {}, "null": {}, "true": {}, `"1767323045"`: {}, "[1767323045]": {}, "{}": {},
			"1767323045":                      time.Unix(1767323045, 0).UTC(),
			"1767323045.9":                    time.Unix(1767323045, 0).UTC(),
			"1.767323045e9":                   time.Unix(1767323045, 0).UTC(),
			"-1":                              time.Unix(-1, 0).UTC(), // in the past, not unset
			`1767323045,"expires_at":"never"`: {},                     // the last value counts
		} {
			c := answering(t, http.StatusOK, nil, `{"id":"a1","api_key":{"id":"k1","value":"`+testKey+`","expires_at":`+text+`}}`)
			_, made, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
			require.NoError(t, err, text)
			require.Equal(t, want, made.ExpiresAt, text)
		}
	})
}
