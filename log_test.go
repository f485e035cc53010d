package openaisecrets

// The log has a line for each decision, with the mount, the request ID of the audit log,
// and OpenAI's request ID if something was created or deleted there.

import (
	"context"
	"net/http"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestLog_OneLinePerDecision(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	one := func(message, level string, named ...string) {
		t.Helper()
		found := h.lines(message)
		require.Len(t, found, 1, message)
		require.Equal(t, level, found[0]["@level"], message)
		require.Equal(t, "openai/", found[0]["mount"], message)
		require.Equal(t, "req-1", found[0]["request_id"], message)
		for _, name := range named {
			require.NotEmpty(t, found[0][name], "%s in %q", name, message)
		}
	}
	one("config stored", "info", "admin_api_key_id")
	one("role stored", "info", "role", "project_id")

	lease := h.lease("creds/app", nil)
	one("credential issued", "info", "role", "project_id", "service_account_id", "api_key_id", "openai_request_id", "ttl", "expires_at")
	asked := func(op logical.Operation) error {
		secret := *lease.Secret
		_, err := h.b.HandleRequest(context.Background(), &logical.Request{ID: "req-1", Operation: op, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: lease.Data})
		return err
	}
	require.NoError(t, asked(logical.RenewOperation))
	one("lease renewed", "info", "role", "api_key_id", "ttl")
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
	require.Error(t, asked(logical.RevokeOperation))
	one("credential not revoked; queued for deletion in the WAL", "warn", "role", "service_account_id", "error")
	require.NoError(t, asked(logical.RevokeOperation))
	one("credential revoked", "info", "role", "service_account_id", "openai_request_id")

	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeModels, Status: http.StatusInternalServerError})
	h.must(h.write("roles/app", map[string]any{"activation_timeout": 1}))
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.sim.ClearFaults()
	one("credential not returned; deleted", "info", "for", "reason", "service_account_id", "openai_request_id")

	h.must(h.write("config/rotate", nil))
	one("admin key rotated", "info", "admin_api_key_id", "superseded_admin_api_key_id")
	require.NotEmpty(t, h.lines("admin key created")[0]["openai_request_id"])
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Times: 1, Status: http.StatusBadRequest})
	h.refused(h.write("config/rotate", nil))
	one("admin key not rotated", "warn", "error")
	h.sim.Keep(h.adminKeyIDs()...)
	h.refused(h.write("config", map[string]any{"admin_api_key": "sk-admin-nobodys-0123456789"}))
	one("config not stored: verification failed", "warn", "endpoint", "error")

	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_period": "1h"}))
	one("static role rotated", "info", "static_role", "api_key_id", "openai_request_id")
	one("static role stored", "info", "static_role")
	h.must(h.remove("static-roles/batch"))
	one("static role deleted", "info", "static_role")
	h.must(h.remove("roles/app"))
	one("role deleted", "info", "role")
}
