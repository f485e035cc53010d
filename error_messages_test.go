package openaisecrets

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestErrorMessages_ContainThePageToOpen(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	_, readOnly := h.sim.AddAdminKey("read only", openaitest.ReadOnly())
	for name, key := range map[string]string{
		"another kind of key":  "sk-proj-abcdefghijkl",
		"an unknown key":       "sk-admin-unknown-unknown-unknown",
		"a missing permission": readOnly,
	} {
		said := h.refused(h.write("config", map[string]any{"admin_api_key": key}))
		require.Contains(t, said, "platform.openai.com/settings/organization/admin-keys", name)
	}

	archived := h.sim.AddProject("old")
	h.sim.ArchiveProject(archived)
	said := h.refused(h.write("roles/old", map[string]any{"project_id": archived}))
	require.Contains(t, said, "platform.openai.com/settings/organization/projects")

	h.sim.Fail(openaitest.Fault{Status: http.StatusForbidden, Code: "missing_scope", Message: "Missing scopes: api.management.write"})
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "platform.openai.com/settings/organization/admin-keys")
	h.sim.ClearFaults()
}
