//go:build integration

package integration

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

// find returns the offset of a secret in content, or -1. A crash test has
// thousands of secrets, too many to search for one by one, so find groups them by
// their first characters.
func find(content []byte, secrets []string) (at int, secret string) {
	const prefix = 3
	type group struct {
		lengths map[int]bool
		values  map[string]bool
	}
	groups := map[string]group{}
	for _, s := range secrets {
		g, ok := groups[s[:prefix]]
		if !ok {
			g = group{map[int]bool{}, map[string]bool{}}
			groups[s[:prefix]] = g
		}
		g.lengths[len(s)], g.values[s] = true, true
	}
	for start, g := range groups {
		for i := 0; ; i++ {
			next := bytes.Index(content[i:], []byte(start))
			if next < 0 {
				break
			}
			i += next
			for n := range g.lengths {
				if i+n <= len(content) && g.values[string(content[i:i+n])] {
					return i, string(content[i : i+n])
				}
			}
		}
	}
	return -1, ""
}

func TestTheSearchForSecretsFindsThem(t *testing.T) {
	runParallel(t)
	secrets := []string{"sk-admin-abc", "sk-svcacct-abcdef", "other-secret"}
	for _, s := range secrets {
		at, found := find([]byte("xsk-sk-"+s+"y"), secrets)
		require.Equal(t, s, found)
		require.Equal(t, 7, at)
		at, _ = find([]byte(s), secrets)
		require.Zero(t, at)
	}
	at, _ := find([]byte("sk-admin-ab sk-svcacct-abcde"), secrets)
	require.Equal(t, -1, at)
}
