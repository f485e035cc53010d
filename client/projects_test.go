package client

// Projects, and errors of incomplete listings.

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestListProjects_IncludesArchived(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	sim := simulate(t, openaitest.Options{})
	c := connect(t, sim)
	active, archived := sim.AddProject("one"), sim.AddProject("two")
	sim.ArchiveProject(archived)

	projects, err := c.ListProjects(ctx)
	require.NoError(t, err)
	require.Equal(t, []Project{{active, "one", "active"}, {archived, "two", "archived"}}, projects)
	require.False(t, projects[0].Archived())
	require.True(t, projects[1].Archived())

	for _, want := range projects {
		got, err := c.GetProject(ctx, want.ID)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err = c.GetProject(ctx, "proj_none")
	require.True(t, IsNotFound(err))
}

// In the API, name and status are nullable.
func TestGetProject_WithoutNameAndStatus(t *testing.T) {
	t.Parallel()
	p, err := answering(t, http.StatusOK, nil, `{"id":"p1","object":"organization.project","name":null,"status":null,"created_at":1}`).
		GetProject(context.Background(), "p1")
	require.NoError(t, err)
	require.Equal(t, Project{ID: "p1"}, p)
	require.False(t, p.Archived())
}

// The WAL worker and tidy rely on presence and absence in a listing, so an incomplete one
// must be an error.
func TestListing_IncompleteIsAnError(t *testing.T) {
	t.Parallel()
	want := map[string]string{}
	calls := map[string]func() error{}
	for name, test := range map[string]struct {
		page func(n int, after string) string
		want string
	}{
		"the same page forever": {
			func(int, string) string { return `{"data":[{"id":"a"}],"has_more":true,"last_id":"a"}` },
			"repeats itself",
		},
		"a cycle": {
			func(n int, _ string) string {
				return fmt.Sprintf(`{"data":[{"id":"%d"}],"has_more":true,"last_id":"%d"}`, n%3, n%3)
			},
			"repeats itself",
		},
		"more without a cursor": {
			func(int, string) string { return `{"data":[],"has_more":true}` },
			"repeats itself",
		},
		"an item without an id":   {func(int, string) string { return `{"data":[{"id":"a"},{}],"has_more":false}` }, "without an id"},
		"an item of another type": {func(int, string) string { return `{"data":[{"id":"a"},"x"],"has_more":false}` }, "not the documented object"},
		"no data":                 {func(int, string) string { return `{"has_more":false}` }, "not the documented object"},
		"null data":               {func(int, string) string { return `{"data":null,"has_more":false}` }, "not the documented object"},
		"an object for a list":    {func(int, string) string { return `{"data":{},"has_more":false}` }, "not the documented object"},
		"an invalid second page": {func(n int, _ string) string {
			return []string{`{"data":[{"id":"a"}],"has_more":true}`, `{}`}[min(n, 1)]
		}, "not the documented object"},
	} {
		for _, list := range []string{"ListServiceAccounts", "ListProjectKeys", "ListAdminKeys", "ListProjects"} {
			var n atomic.Int64
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				_, _ = io.WriteString(w, test.page(int(n.Add(1)-1), r.URL.Query().Get("after")))
			})
			want[name+", "+list] = test.want
			calls[name+", "+list] = func() error {
				return allCalls[list].call(context.Background(), c, placeholderIDs)
			}
		}
	}
	for name, err := range together(calls) {
		require.Error(t, err, name)
		e := failed(t, err)
		require.ErrorContains(t, e, want[name], name)
		require.False(t, e.NotFound() || e.Denied(), name)
	}
}

func TestListing_FollowsLastID(t *testing.T) {
	t.Parallel()
	pages := map[string]string{
		"":       `{"data":[{"id":"a"}],"has_more":true,"last_id":"cursor"}`,
		"cursor": `{"data":[],"has_more":true,"last_id":"hidden"}`, // all items of the page were filtered out
		"hidden": `{"data":[{"id":"b"}],"has_more":true,"last_id":"b"}`,
		"b":      `{"data":[],"has_more":false}`,
	}
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, pages[r.URL.Query().Get("after")])
	})
	projects, err := c.ListProjects(context.Background())
	require.NoError(t, err)
	require.Equal(t, []Project{{ID: "a"}, {ID: "b"}}, projects)

	pages["b"] = `{"data":[]}` // does not prove the end
	_, err = c.ListProjects(context.Background())
	require.Error(t, err)
	_, err = c.ListAdminKeys(context.Background())
	require.Error(t, err)
}
