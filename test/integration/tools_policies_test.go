//go:build integration

package integration

// What the example policies allow and what they do not, asked of a real Vault.

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"
)

// doors are the engine's paths and Vault's around it, and who may go through:
// o the operator, a the application, c the CI job, d its dispatcher (whose right
// to read wrapped has a test of its own).
var doors = []struct{ method, path, who string }{
	{"GET", "config", "o"},
	{"PUT", "config", "o"},
	{"DELETE", "config", "o"},
	{"PUT", "config/rotate", "o"},
	{"PUT", "rotate-root", "o"},
	{"LIST", "roles", "o"},
	{"GET", "roles/my-app", "o"},
	{"PUT", "roles/my-app", "o"},
	{"PUT", "roles/new", "o"},
	{"DELETE", "roles/new", "o"},
	{"LIST", "static-roles", "o"},
	{"GET", "static-roles/my-app", "o"},
	{"PUT", "static-roles/my-app", "o"},
	{"DELETE", "static-roles/my-app", "o"},
	{"PUT", "rotate-role/my-app", "o"},
	{"LIST", "projects", "o"},
	{"PUT", "tidy", "o"},
	{"GET", "tidy-status", "o"},
	{"PUT", "tidy-cancel", "o"},
	{"GET", "metrics", "o"},

	{"GET", "creds/my-app", "a"},
	{"PUT", "creds/my-app", ""},
	{"GET", "creds/ci", "c"},
	{"GET", "creds/another", ""},
	{"GET", "static-creds/my-app", "a"},
	{"GET", "static-creds/another", ""},

	{"LIST", "/sys/leases/lookup/%s/creds/my-app", "o"},
	{"PUT", "/sys/leases/lookup", "oacd"}, // by the lease's ID, in Vault's default policy
	{"PUT", "/sys/leases/renew", "oacd"},  // likewise
	{"PUT", "/sys/leases/revoke", "o"},
	{"PUT", "/sys/leases/revoke-prefix/%s/creds/my-app", "o"},
	{"PUT", "/sys/leases/revoke-force/%s/creds/my-app", ""},
	{"GET", "/sys/mounts/%s/tune", "o"},
	{"DELETE", "/sys/mounts/%s", ""},
	{"PUT", "/auth/token/revoke-self", "oacd"},
}

func TestTheExamplePoliciesAllowWhatTheySayAndNoMore(t *testing.T) {
	m := newMount(t)
	clients := map[string]func() *api.Client{}
	for who, policy := range map[string]string{"o": "operator", "a": "application", "c": "ci", "d": "ci-dispatcher"} {
		name := m.policy(policy)
		// A token for each try, since one of the doors ends it; and none that
		// could make a key, as no role and no config is there.
		clients[who] = func() *api.Client {
			secret, err := m.client.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{name}, TTL: "5m"})
			require.NoError(t, err)
			return m.vault.ClientFor(secret.Auth.ClientToken)
		}
	}
	for _, door := range doors {
		path := m.path + "/" + door.path
		if door.path[0] == '/' {
			path = strings.ReplaceAll(door.path[1:], "%s", m.path)
		}
		for who, client := range clients {
			err := try(client(), door.method, path)
			var answer *api.ResponseError
			denied := errors.As(err, &answer) && answer.StatusCode == http.StatusForbidden
			require.Equal(t, strings.Contains(door.who, who), !denied, "%s %s by %s: %v", door.method, path, who, err)
		}
	}
}

// try goes through a door with empty hands: what is allowed fails for another
// reason, or does nothing.
func try(client *api.Client, method, path string) error {
	var err error
	switch method {
	case "GET":
		_, err = client.Logical().Read(path)
	case "LIST":
		_, err = client.Logical().List(path)
	case "PUT":
		_, err = client.Logical().Write(path, map[string]any{})
	case "DELETE":
		_, err = client.Logical().Delete(path)
	default:
		panic("no such method: " + method)
	}
	return err
}

// A read may ask for a shorter lease without further rights.
func TestAReaderMayAskForAShorterLease(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "2h")
	client := m.vault.ClientFor(m.tokenOf("application"))
	secret, err := client.Logical().ReadWithData(m.path+"/creds/my-app", map[string][]string{"ttl": {"10m"}})
	require.Equal(t, 600, newLease(t, secret, err).seconds)
	_, err = client.Logical().Write(m.path+"/creds/my-app", map[string]any{"ttl": "10m"})
	requireStatus(t, http.StatusForbidden, err)
}
