package client

// Listings that are read page by page, and their end.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// each reads a listing in which a missing item leads to a deletion, and passes on the IDs
// of each page.
var each = map[string]func(ctx context.Context, c *Client, project string, page func(ids []string) error) error{
	"EachServiceAccount": func(ctx context.Context, c *Client, project string, page func([]string) error) error {
		return c.EachServiceAccount(ctx, project, func(accounts []ServiceAccount) error {
			var ids []string
			for _, a := range accounts {
				ids = append(ids, a.ID)
			}
			return page(ids)
		})
	},
	"EachProjectKey": func(ctx context.Context, c *Client, project string, page func([]string) error) error {
		return c.EachProjectKey(ctx, project, func(keys []ProjectKey) error {
			var ids []string
			for _, k := range keys {
				ids = append(ids, k.ID)
			}
			return page(ids)
		})
	},
}

func TestEach_ReadsPageByPage(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	sim := simulate(t, openaitest.Options{})
	sim.KeepAll()
	project := sim.AddProject("p")
	account := sim.AddServiceAccount(project, "owner")
	fill(sim, project, 2*pageSize+2)
	c := connect(t, sim)
	for i := range 2*pageSize + 2 {
		_, err := c.CreateServiceAccountKey(ctx, project, account, "key-"+strconv.Itoa(i), nil, time.Hour)
		require.NoError(t, err)
	}
	accounts, err := c.ListServiceAccounts(ctx, project)
	require.NoError(t, err)
	keys, err := c.ListProjectKeys(ctx, project)
	require.NoError(t, err)
	want := map[string][]string{}
	for _, a := range accounts {
		want["EachServiceAccount"] = append(want["EachServiceAccount"], a.ID)
	}
	for _, k := range keys {
		want["EachProjectKey"] = append(want["EachProjectKey"], k.ID)
	}
	for name, read := range each {
		var pages []int
		var all []string
		require.NoError(t, read(ctx, c, project, func(ids []string) error {
			pages, all = append(pages, len(ids)), append(all, ids...)
			return nil
		}), name)
		require.Len(t, pages, 3, name)
		require.Equal(t, []int{pageSize, pageSize}, pages[:2], name)
		require.Equal(t, want[name], all, name)
		require.Len(t, slices.Compact(slices.Sorted(slices.Values(all))), len(all), name)

		sim.ResetRequests()
		stop := errors.New("enough")
		require.Equal(t, stop, read(ctx, c, project, func([]string) error { return stop }), name)
		require.Equal(t, 1, sim.Count("", ""), "%s: an error of the caller ends the listing", name)

		require.NoError(t, read(ctx, c, sim.AddProject("empty"), func([]string) error { return stop }), "%s: an empty page is skipped", name)
	}
}

func TestEach_RequiresHasMore(t *testing.T) {
	t.Parallel()
	for name, answers := range map[string][]string{
		"an empty page without has_more":   {`{"data":[]}`},
		"a full page without has_more":     {`{"data":[{"id":"a"}]}`},
		"has_more is null":                 {`{"data":[],"has_more":null}`},
		"has_more is a text":               {`{"data":[],"has_more":"false"}`},
		"has_more is a number":             {`{"data":[],"has_more":0}`},
		"the last page lacks has_more":     {`{"data":[{"id":"a"}],"has_more":true}`, `{"data":[]}`},
		"the second page is an error":      {`{"data":[{"id":"a"}],"has_more":true}`, `{"error":"Not Found"}`},
		"the second page is the first one": {`{"data":[{"id":"a"}],"has_more":true}`, `{"data":[{"id":"a"}],"has_more":true}`},
		"more without a cursor":            {`{"data":[],"has_more":true}`},
	} {
		for list, read := range each {
			t.Run(name+", "+list, func(t *testing.T) {
				t.Parallel()
				c := serve(t, func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", "application/json")
					page := 0
					if r.URL.Query().Get("after") != "" {
						page = 1
					}
					_, _ = io.WriteString(w, answers[min(page, len(answers)-1)])
				})
				require.Error(t, read(context.Background(), c, "p", func([]string) error { return nil }))
			})
		}
	}
}

// manyPages is a client of a listing of n pages, whose items have some unused bytes.
func manyPages(t *testing.T, n, items, padding int) *Client {
	filler := strings.Repeat("x", padding)
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		page, _ := strconv.Atoi(r.URL.Query().Get("after"))
		var b strings.Builder
		fmt.Fprintf(&b, `{"has_more":%t,"last_id":"%d","data":[`, page+1 < n, page+1)
		for i := range items {
			if i > 0 {
				b.WriteString(",")
			}
			fmt.Fprintf(&b, `{"id":"item-%d","name":"n","role":"member","padding":"%s","owner":{"service_account":{"id":"a-%d"}}}`, page*items+i, filler, i)
		}
		b.WriteString("]}")
		_, _ = io.WriteString(w, b.String())
	})
}

// 200,000 accounts, at 100 per page.
func TestEach_ReadsTwoThousandPages(t *testing.T) {
	t.Parallel()
	const pages = 2000
	c := manyPages(t, pages, 1, 0)
	n := 0
	require.NoError(t, c.EachServiceAccount(context.Background(), "p", func(a []ServiceAccount) error { n += len(a); return nil }))
	require.Equal(t, pages, n)
}

func TestListing_WithoutAnEndIsAnError(t *testing.T) {
	t.Parallel()
	c := pointAt(t, "http://127.0.0.1:1/v1")
	n := 0
	err := walk(c, "list", func(id string) string { return id }, func(string) (page[string], error) {
		n++
		return page[string]{items: []string{strconv.Itoa(n)}, more: true}, nil
	}, func([]string) error { return nil })
	require.ErrorContains(t, err, "more than 10000 pages")
	require.Equal(t, maxPages, n)
}

func TestList_RetainsOnlyItems(t *testing.T) {
	// Not parallel: it measures the heap.
	const pages, padding = 20, 1 << 20
	c := manyPages(t, pages, 2, padding)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	accounts, err := c.ListServiceAccounts(context.Background(), "p")
	require.NoError(t, err)
	keys, err := c.ListProjectKeys(context.Background(), "p")
	require.NoError(t, err)
	require.Less(t, int64(heap())-int64(before), int64(pages*padding/4), "of %d bytes of answers", 4*pages*padding)
	require.Len(t, accounts, 2*pages)
	require.Len(t, keys, 2*pages)
	require.Equal(t, "a-1", keys[1].AccountID)
}
