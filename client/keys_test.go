package client

// Keys of existing service accounts, and listings of several pages.

import (
	"context"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestProjectKey_Lifecycle(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		ctx := context.Background()
		sim := simulate(t, o)
		c := connect(t, sim)
		project := sim.AddProject("p")
		account := sim.AddServiceAccount(project, "shared")

		scopes := []string{"api.model.read", "api.responses.write"}
		key, err := c.CreateServiceAccountKey(ctx, project, account, "lease-1", scopes, time.Hour)
		require.NoError(t, err)
		require.Len(t, sim.Keys(), 1)
		at := sim.Keys()[0]
		require.Equal(t, at.ID, key.ID)
		require.Equal(t, "lease-1", key.Name)
		require.Equal(t, at.Value, key.Value.Reveal())
		require.Equal(t, scopes, at.Scopes)
		require.WithinDuration(t, at.ExpiresAt, key.ExpiresAt, 0)

		listed, err := c.ListProjectKeys(ctx, project)
		require.NoError(t, err)
		require.Len(t, listed, 1)
		require.Equal(t, account, listed[0].AccountID)
		require.Equal(t, key.ID, listed[0].ID)
		require.Equal(t, key.Name, listed[0].Name)
		require.Equal(t, key.ExpiresAt, listed[0].ExpiresAt)
		require.WithinDuration(t, time.Now(), listed[0].CreatedAt, time.Minute)
		require.WithinDuration(t, time.Now(), key.CreatedAt, time.Minute)
		read, err := c.GetProjectKey(ctx, project, key.ID)
		require.NoError(t, err)
		require.Equal(t, listed[0], read)

		require.NoError(t, c.DeleteProjectKey(ctx, project, key.ID))
		require.Empty(t, sim.Keys())
		require.Len(t, sim.Accounts(), 1, "the account stays")
		require.True(t, IsNotFound(c.DeleteProjectKey(ctx, project, key.ID)))
		_, err = c.GetProjectKey(ctx, project, key.ID)
		require.True(t, IsNotFound(err))
	})
}

// After a failed delete, a read shows whether the key has expired.
func TestGetProjectKey_ReturnsExpiredKeys(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	sim := simulate(t, openaitest.Options{})
	c := connect(t, sim)
	project := sim.AddProject("p")
	key, err := c.CreateServiceAccountKey(ctx, project, sim.AddServiceAccount(project, "shared"), "k", nil, time.Minute)
	require.NoError(t, err)
	sim.Advance(time.Hour)
	require.Empty(t, sim.Keys())
	read, err := c.GetProjectKey(ctx, project, key.ID)
	require.NoError(t, err)
	require.Equal(t, key.ExpiresAt, read.ExpiresAt)
	require.True(t, read.ExpiresAt.Before(sim.Now()))
}

func TestUpdateProjectKey_ChangesOnlyGivenFields(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	sim := simulate(t, openaitest.Options{})
	c := connect(t, sim)
	project := sim.AddProject("p")
	account := sim.AddServiceAccount(project, "shared")
	key, err := c.CreateServiceAccountKey(ctx, project, account, "k", []string{"api.model.read"}, time.Hour)
	require.NoError(t, err)
	sim.Keep(key.ID)

	updated, err := c.UpdateProjectKey(ctx, project, key.ID, nil, 2*time.Hour)
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(2*time.Hour), updated.ExpiresAt, time.Minute)
	require.Equal(t, []string{"api.model.read"}, sim.Keys()[0].Scopes)

	_, err = c.UpdateProjectKey(ctx, project, key.ID, []string{"api.responses.write"}, 0)
	require.NoError(t, err)
	require.Equal(t, []string{"api.responses.write"}, sim.Keys()[0].Scopes)
	require.WithinDuration(t, updated.ExpiresAt, sim.Keys()[0].ExpiresAt, 0)

	sent := sim.Count("", "")
	for _, scopes := range [][]string{nil, {}} {
		_, err = c.UpdateProjectKey(ctx, project, key.ID, scopes, 0)
		require.False(t, failed(t, err).Retryable())
	}
	_, err = c.UpdateProjectKey(ctx, project, key.ID, []string{}, time.Hour)
	require.ErrorContains(t, failed(t, err), "would allow all scopes")
	require.Equal(t, sent, sim.Count("", ""), "an invalid update is not sent")

	sim.Advance(3 * time.Hour)
	_, err = c.UpdateProjectKey(ctx, project, key.ID, nil, time.Hour)
	require.Equal(t, http.StatusBadRequest, failed(t, err).Status, "an expired key cannot be revived")
}

// Without the filter the API omits keys whose account lost its role, which work again once
// the role is back.
func TestListProjectKeys_IncludesKeysOfAnyOwner(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	rec := record(sim)
	keys, err := connect(t, sim).ListProjectKeys(context.Background(), sim.AddProject("p"))
	require.NoError(t, err)
	require.Empty(t, keys)
	require.Contains(t, rec.last(t).query, "owner_project_access=any")
}

func TestListings_ReadAllPages(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	const many = 101
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	c := connect(t, sim)
	for range many {
		sim.AddProject("p")
		sim.AddServiceAccount(on.project, "a")
		sim.AddAdminKey("r")
		_, err := c.CreateServiceAccountKey(ctx, on.project, on.account, "k", nil, time.Hour)
		require.NoError(t, err)
	}
	sim.ResetRequests()

	accounts, err := c.ListServiceAccounts(ctx, on.project)
	require.NoError(t, err)
	keys, err := c.ListProjectKeys(ctx, on.project)
	require.NoError(t, err)
	adminKeys, err := c.ListAdminKeys(ctx)
	require.NoError(t, err)
	projects, err := c.ListProjects(ctx)
	require.NoError(t, err)

	for route, listed := range map[string][]string{
		accountsRoute:  pluck(accounts, func(a ServiceAccount) string { return a.ID }),
		keysRoute:      pluck(keys, func(k ProjectKey) string { return k.ID }),
		adminKeysRoute: pluck(adminKeys, func(k AdminKey) string { return k.ID }),
		projectsRoute:  pluck(projects, func(p Project) string { return p.ID }),
	} {
		require.GreaterOrEqual(t, len(listed), many+1, route)
		require.Len(t, slices.Compact(slices.Sorted(slices.Values(listed))), len(listed), "%s: an item is repeated", route)
		require.Equal(t, 2, sim.Count(http.MethodGet, route), "%s: pages are as large as the API allows", route)
	}
}

func pluck[T any](items []T, id func(T) string) []string {
	var out []string
	for _, item := range items {
		out = append(out, id(item))
	}
	return out
}
