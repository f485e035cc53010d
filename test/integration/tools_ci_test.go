//go:build integration

package integration

// The scripts for CI jobs.

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

func TestAJobsKeyEndsWithItsCommand(t *testing.T) {
	m := newMount(t)
	m.role("ci", "1h", "2h")
	dir := t.TempDir()
	script := m.exampleFile("ci/with-openai-key", dir)
	for command, ok := range map[string]bool{
		`printf '%s %s' "$OPENAI_API_KEY" "${VAULT_TOKEN-none}"`:                                                                                       true,
		`printf '%s %s' "$OPENAI_API_KEY" "${VAULT_TOKEN-none}"; exit 7`:                                                                               false,
		`printf '%s %s' "$OPENAI_API_KEY" "${VAULT_TOKEN-none}"; kill -TERM "$PPID"; exec sleep 600`:                                                   false,
		`curl -sf -o "` + dir + `/models" -H "Authorization: Bearer $OPENAI_API_KEY" "` + m.sim.URL() + `/models"; printf '%s none' "$OPENAI_API_KEY"`: true,
	} {
		token := m.tokenOf("ci")
		out, err := m.script(token, script, "ci", "sh", "-c", command)
		require.Equal(t, ok, err == nil, "%s: %v", command, err)
		key, rest, _ := strings.Cut(out, " ")
		require.Equal(t, "none", rest, "the command has the job's token")
		require.NotEmpty(t, key)
		_, err = m.vault.ClientFor(token).Auth().Token().LookupSelf()
		require.Error(t, err, "the job's token must be revoked after the job")
		require.Eventually(t, func() bool { return infer(t, m.sim, key) == http.StatusUnauthorized }, time.Minute, 50*time.Millisecond, "the key still works after the job")
	}
	if _, err := os.Stat(filepath.Join(dir, "models")); err != nil {
		t.Log("NOT TESTED: use of the key inside the job requires curl")
	}

	// With a token that it must not or cannot revoke, it runs and reads nothing.
	batch, err := m.client.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{m.policy("ci")}, Type: "batch", TTL: "10m"})
	require.NoError(t, err)
	for token, message := range map[string]string{
		m.vault.RootToken:      "is a root token",
		batch.Auth.ClientToken: "is not a service token",
		"":                     "set it to a token of this job",
	} {
		out, err := m.script(token, script, "ci", "echo", "ran")
		require.ErrorContains(t, err, message)
		require.Empty(t, out)
		if token != "" {
			_, err = m.vault.ClientFor(token).Auth().Token().LookupSelf()
			require.NoError(t, err, "the token must stay valid")
		}
	}
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, time.Minute, 50*time.Millisecond)
}

func TestADispatcherHandsOutKeysOnlyWrapped(t *testing.T) {
	m := newMount(t)
	m.role("ci", "1h", "2h")
	m.role("other", "1h", "2h")
	dir := t.TempDir()
	wrap, unwrap := m.exampleFile("ci/wrap-key", dir), m.exampleFile("ci/unwrap-key", dir)
	dispatcher := m.tokenOf("ci-dispatcher")

	wrapping, err := m.script(dispatcher, wrap, "ci")
	require.NoError(t, err)
	key, err := m.script(wrapping, unwrap, "ci")
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, infer(t, m.sim, key))
	_, err = m.script(wrapping, unwrap, "ci")
	require.Error(t, err, "a second unwrap must fail")

	_, err = m.vault.ClientFor(dispatcher).Logical().Read(m.path + "/creds/ci")
	requireStatus(t, http.StatusForbidden, err, "a dispatcher must not read a key")
	// If the dispatcher unwraps the key, the job detects it.
	wrapping, err = m.script(dispatcher, wrap, "ci")
	require.NoError(t, err)
	_, err = m.vault.ClientFor(dispatcher).Logical().Unwrap(wrapping)
	require.NoError(t, err)
	_, err = m.script(wrapping, unwrap, "ci")
	require.Error(t, err, "the job must detect the unwrap")
	_, err = m.script(dispatcher, wrap, "other")
	require.Error(t, err)

	// A substituted token wraps something else.
	foreign, err := m.script(m.vault.RootToken, wrap, "other")
	require.NoError(t, err)
	_, err = m.script(foreign, unwrap, "ci")
	require.ErrorContains(t, err, "not a key of this role")
	_, err = m.script(foreign, unwrap, "other")
	require.NoError(t, err, "the lookup must not unwrap the token")
}

// A wrapped response that no client unwraps still has a lease. The lease ends with
// the token that requested it, or expires.
func TestAWrappedKeyThatNobodyOpensEndsWithItsDispatcher(t *testing.T) {
	m := newMount(t)
	m.role("ci", "1h", "2h")
	dispatcher := m.tokenOf("ci-dispatcher")
	_, err := m.script(dispatcher, m.exampleFile("ci/wrap-key", t.TempDir()), "ci")
	require.NoError(t, err)
	require.Len(t, m.alive(), 1)
	require.NoError(t, m.client.Auth().Token().RevokeTree(dispatcher))
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, time.Minute, 50*time.Millisecond)
}

// jq installs gojq under the name jq, so that the tests run on a machine without
// jq.
func jq(t *testing.T, v *devenv.Vault) {
	t.Helper()
	_, err := v.CLIEnv() // creates the first directory on a script's PATH
	require.NoError(t, err)
	require.NoError(t, devenv.BuildTool(t.Context(), filepath.Join(v.Dir, "bin", "jq"), "tools/examples", "github.com/itchyny/gojq/cmd/gojq"))
}
