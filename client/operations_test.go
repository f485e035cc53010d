package client

import (
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTarget_AnIDIsOneSegment(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]string{
		"p": "p", ".": "%2E", "..": "%2E%2E", "...": "...", "a/b": "a%2Fb", "a?b#c": "a%3Fb%23c", "%2e": "%252e", "{key_id}": "%7Bkey_id%7D", "é": "%C3%A9",
	} {
		target, err := request{operation: getKey, ids: []string{id, id}}.target()
		require.NoError(t, err)
		require.Equal(t, "/organization/projects/"+want+"/api_keys/"+want, target)
		u, err := url.Parse("https://api.example.com/v1" + target)
		require.NoError(t, err)
		require.Equal(t, "/v1"+target, u.EscapedPath(), "the request contains the escaped path")
		require.Len(t, strings.Split(u.EscapedPath(), "/"), 7)
	}
}

func TestTarget_EveryParameterHasAnID(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		ids  []string
		want string
	}{
		{nil, "missing required project_id parameter"},
		{[]string{"p"}, "missing required api_key_id parameter"},
		{[]string{"", "k"}, "missing required project_id parameter"},
		{[]string{"p", ""}, "missing required api_key_id parameter"},
	} {
		_, err := request{operation: deleteKey, ids: test.ids}.target()
		require.EqualError(t, err, test.want)
	}
}

func TestTarget_OfAListing(t *testing.T) {
	t.Parallel()
	for cursor, want := range map[string]string{"": "?limit=100", "a b&c": "?after=a+b%26c&limit=100"} {
		target, err := request{operation: listProjects, query: pageAfter(cursor)}.target()
		require.NoError(t, err)
		require.Equal(t, "/organization/projects"+want, target)
	}
}
