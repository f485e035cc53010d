//go:build integration

package integration

// No key is written anywhere. Every test ends with the same search for its own
// keys; this one also runs the operations that handle keys, mainly failures, so
// that the search would find a leak.

import (
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestNoKeyIsWrittenAnywhere(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	l := m.creds("r")
	_, err := m.client.Sys().Renew(l.id, 0)
	require.NoError(t, err)
	m.write("config/rotate", nil)
	m.creds("r")

	// Errors about rejected keys are the most likely to quote a key.
	bad := "sk-admin-" + "refused-0123456789abcdef0123456789abcdef"
	for _, key := range []string{bad, l.key} {
		config := m.adminConfig()
		config["admin_api_key"] = key
		_, err := m.client.Logical().Write(m.path+"/config", config)
		require.Error(t, err)
	}
	// Failed responses with a key: each of these faults creates or quotes a key
	// that must not be written.
	current := m.read("config").Data["admin_api_key_id"]
	for _, fault := range []openaitest.Fault{
		{Kind: openaitest.FaultTruncated, Times: 20},
		{Kind: openaitest.FaultGarbage, Times: 20, Body: "{" + l.key},
		{Status: http.StatusBadRequest, Message: "Incorrect API key provided: " + l.key, Times: 20},
		{Status: http.StatusUnauthorized, Message: "Incorrect API key provided: " + l.key, Times: 20},
	} {
		fault.Method = http.MethodPost
		cancel := m.sim.Fail(fault)
		_, err := m.client.Logical().Read(m.path + "/creds/r")
		require.Error(t, err, "%+v", fault)
		_, err = m.client.Logical().Write(m.path+"/config/rotate", nil)
		require.Error(t, err, "%+v", fault)
		cancel()
	}
	require.Equal(t, current, m.read("config").Data["admin_api_key_id"])
	cancel := m.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusForbidden, Message: "no: " + l.key})
	require.Error(t, m.revoke(l))
	cancel()
	require.NoError(t, m.revoke(l))
	require.Eventually(t, func() bool { // Vault asks all mounts, and fails if one ends meanwhile
		_, err := m.client.Logical().ReadWithContext(t.Context(), "sys/internal/specs/openapi")
		return err == nil
	}, time.Minute, 100*time.Millisecond)

	secrets := m.sim.Secrets()
	require.GreaterOrEqual(t, len(secrets), 4, "too few keys to search for")
	m.requireNoSecretWritten(append(secrets, bad)...)
	// Verify that the search has content: the mount path is not secret.
	log, err := os.ReadFile(m.vault.LogPath)
	require.NoError(t, err)
	require.Contains(t, string(log), m.path, "the log does not name the mount")
	require.Contains(t, string(answers.content()), m.path)
}
