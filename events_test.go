package openaisecrets

// Events and observations for Vault. At the end of every test, the harness searches them
// for keys, like the log.

import (
	"net/http"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/events"
)

func TestEvents_TellWhatWasDone(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	require.Equal(t, "openai/config", h.events.heard(t, events.ConfigWrite)["data_path"])
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Equal(t, h.project, h.events.heard(t, events.RoleWrite)["project_id"])

	lease := h.lease("creds/app", nil)
	event := h.events.heard(t, events.CredsCreate)
	for name, want := range map[string]string{
		"path": "openai/creds/app", "operation": "creds-create", "modified": "false", "name": "app", "project_id": h.project,
		"service_account_id": lease.Data["service_account_id"].(string), "api_key_id": lease.Data["api_key_id"].(string),
	} {
		require.Equal(t, want, event[name], name)
	}
	_, err := h.end(logical.RenewOperation, lease)
	require.NoError(t, err)
	require.Equal(t, "app", h.events.heard(t, events.CredsRenew)["name"])
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
	require.Error(t, h.revoke(lease))
	require.Equal(t, "false", h.events.heard(t, events.CredsRevokeFail)["modified"])
	require.NoError(t, h.revoke(lease))
	require.Equal(t, lease.Data["api_key_id"], h.events.heard(t, events.CredsRevoke)["api_key_id"])

	h.must(h.write("config/rotate", nil))
	require.Equal(t, h.must(h.read("config")).Data["admin_api_key_id"], h.events.heard(t, events.Rotate)["admin_api_key_id"])
	cancel := h.sim.Fail(openaitest.Fault{Route: "/organization/admin_api_keys", Method: http.MethodPost, Status: http.StatusBadRequest})
	h.refused(h.write("config/rotate", nil))
	cancel()
	h.events.heard(t, events.RotateFail)
	h.sim.Keep(h.adminKeyIDs()...)

	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_period": "1h"}))
	h.events.heard(t, events.StaticRoleWrite)
	require.Equal(t, "openai/static-creds/batch", h.events.heard(t, events.StaticRotate)["data_path"])
	cancel = h.sim.Fail(openaitest.Fault{Route: routeNewKey, Status: http.StatusBadRequest})
	h.refused(h.write("rotate-role/batch", nil))
	cancel()
	h.events.heard(t, events.StaticRotateFail)
	h.must(h.remove("static-roles/batch"))
	h.events.heard(t, events.StaticRoleDelete)

	h.must(h.write("tidy", nil))
	require.Equal(t, tidyFinished, h.events.heard(t, events.Tidy)["state"])
	h.must(h.remove("roles/app"))
	h.events.heard(t, events.RoleDelete)
	h.must(h.remove("config"))
	h.events.heard(t, events.ConfigDelete)
}

func TestEvents_AServerWithoutThemIsAskedOnce(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.events.refusal = status.Error(codes.Unimplemented, "unknown service")
	h.configure(nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Eventually(t, func() bool { return h.b.events.Unsupported() }, time.Minute, 5*time.Millisecond)
	for range 5 {
		require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	}
	require.Eventually(t, func() bool { return h.b.events.Waiting() == 0 }, time.Minute, 5*time.Millisecond)
	h.events.mu.Lock()
	defer h.events.mu.Unlock()
	require.LessOrEqual(t, h.events.asked, 2, "once for events and once for observations")
}

func TestEvents_CommunityGetsNone(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.system.PluginEnvironment = &logical.PluginEnvironment{VaultVersion: "1.21.2"}
	h.configure(nil)
	require.Eventually(t, func() bool { return h.b.events.Unsupported() }, time.Minute, 5*time.Millisecond)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.events.mu.Lock()
	defer h.events.mu.Unlock()
	require.Zero(t, h.events.asked)
}

// A server that does not answer does not delay the engine.
func TestEvents_DoNotBlockRequests(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.events.mu.Lock() // blocks every event and observation
	for range 1000 {
		h.b.events.Emit(events.Tidy, "openai/", "tidy", false)
	}
	require.Positive(t, h.b.events.Dropped())
	h.events.mu.Unlock()
}

func TestEvents_AreDocumented(t *testing.T) {
	t.Parallel()
	code, err := os.ReadFile("internal/events/events.go")
	require.NoError(t, err)
	page, err := os.ReadFile("docs/events.md")
	require.NoError(t, err)
	kinds := func(text []byte, pattern string) (found []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllSubmatch(text, -1) {
			found = append(found, string(m[1]))
		}
		slices.Sort(found)
		return slices.Compact(found)
	}
	require.Equal(t, kinds(code, `= "(openai/[a-z-]+)"`), kinds(page, "(?m)^- `(openai/[a-z-]+)`:"))
}
