package broker

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestVault_TheLoginOfEachMethod(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte("the-"+name+"\n"), 0o600))
		return path
	}
	home := t.TempDir()
	t.Setenv("HOME", home)
	require.NoError(t, os.WriteFile(filepath.Join(home, ".vault-token"), []byte("from-home"), 0o600))
	for _, c := range []struct {
		login Login
		env   string
		path  string
		data  map[string]any
		token string
	}{
		{login: Login{Method: "token"}, env: "from-env", token: "from-env"},
		{login: Login{Method: "token"}, token: "from-home"},
		{login: Login{Method: "token-file", TokenFile: file("token")}, env: "from-env", token: "the-token"},
		{login: Login{Method: "none"}, env: "from-env"},
		{login: Login{Method: "approle", RoleIDFile: file("role"), SecretIDFile: file("secret")}, path: "auth/approle/login", data: map[string]any{"role_id": "the-role", "secret_id": "the-secret"}},
		{login: Login{Method: "approle", Mount: "/ci/", RoleIDFile: file("role"), SecretIDFile: file("secret")}, path: "auth/ci/login", data: map[string]any{"role_id": "the-role", "secret_id": "the-secret"}},
		{login: Login{Method: "kubernetes", Role: "r", JWTFile: file("jwt")}, path: "auth/kubernetes/login", data: map[string]any{"role": "r", "jwt": "the-jwt"}},
		{login: Login{Method: "jwt", Role: "r", JWTFile: file("jwt")}, path: "auth/jwt/login", data: map[string]any{"role": "r", "jwt": "the-jwt"}},
		{login: Login{Method: "cert", Role: "r"}, path: "auth/cert/login", data: map[string]any{"name": "r"}},
	} {
		t.Setenv("VAULT_TOKEN", c.env)
		v := &vault{login: c.login}
		require.NoError(t, v.login.validate())
		client, err := v.client()
		require.NoError(t, err)
		path, data, err := v.credentials(client)
		require.NoError(t, err)
		require.Equal(t, c.path, path)
		if path != "" {
			require.Equal(t, c.data, data)
			continue
		}
		require.Equal(t, c.token, client.Token())
	}
	inPod := Login{Method: "kubernetes", Role: "r"}
	require.NoError(t, inPod.validate())
	require.Equal(t, "/var/run/secrets/kubernetes.io/serviceaccount/token", inPod.JWTFile)
}

func TestSecret_NothingPrintsIt(t *testing.T) {
	l := lease{key: func() string { return "sk-svcacct-secret" }, keyID: "key_1"}
	text, err := json.Marshal(map[string]any{"lease": l})
	require.NoError(t, err)
	for _, printed := range []string{fmt.Sprint(l), fmt.Sprintf("%v %+v %#v", l, l, l), fmt.Sprintf("%v %#v", &key{lease: l}, l.key), string(text)} {
		require.NotContains(t, printed, "svcacct")
		require.NotContains(t, printed, fmt.Sprintf("%x", "svcacct"))
	}
}
