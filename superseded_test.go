package openaisecrets

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// copyOf is a Vault restored from a snapshot of h's: the same storage, another
// process.
func copyOf(h *harness) *harness {
	h.t.Helper()
	other := &harness{t: h.t, sim: h.sim, storage: &faultyStorage{inner: &logical.InmemStorage{}}, log: &lockedBuffer{}, system: h.system, manager: h.manager, project: h.project, offset: h.offset}
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	for _, k := range keys {
		e, err := h.storage.inner.Get(context.Background(), k)
		require.NoError(h.t, err)
		require.NoError(h.t, other.storage.inner.Put(context.Background(), e))
	}
	other.restart()
	return other
}

func TestSuperseded_ACopyThatIsGivenAnAdminKeyOfItsOwnLeavesTheOriginals(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.advance(6 * time.Minute)
	h.tick()
	inForce := h.adminKeyIDs()
	staging := copyOf(h)
	_, own := h.sim.AddAdminKey("staging")
	staging.must(staging.write("config", map[string]any{"admin_api_key": own}))
	h.advance(6 * time.Minute)
	staging.offset = h.offset
	staging.tick()
	t.Log("before", inForce, "after", h.adminKeyIDs())
	_, err := h.read("creds/app")
	require.NoError(t, err, "production can issue")
}

func TestSchedule_AClockThatWasAheadAtARotationDoesNotLockTheEngineOut(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	// The node boots with a clock that is 40 days ahead; all is due at once.
	h.mu.Lock()
	h.offset = 40 * 24 * time.Hour
	h.mu.Unlock()
	h.tick()
	// NTP sets it right.
	h.mu.Lock()
	h.offset = 0
	h.mu.Unlock()
	h.restart()
	read := h.must(h.read("config")).Data
	t.Log("last_rotated", read["last_rotated"], "next_rotation", read["next_rotation"], "expires", read["admin_api_key_expires_at"])
	for day := range 9 {
		h.advance(24 * time.Hour)
		h.tick()
		h.tick()
		if resp, err := h.read("creds/app"); err != nil || resp.IsError() {
			t.Fatalf("day %d: production is locked out: %v %v", day+1, err, resp)
		}
	}
}

func TestConfig_AnotherOrganizationsKeyEndsNoLeaseWhoseKeyLivesOn(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	lease := h.lease("creds/app", nil)
	other := openaitest.Start(t, openaitest.Options{})
	_, wrong := other.AdminKey()
	_, right := h.sim.AdminKey()
	resp := h.must(h.write("config", map[string]any{"admin_api_key": wrong, "api_endpoint": other.URL(), "skip_verify": true}))
	require.Contains(t, strings.Join(resp.Warnings, " "), "not checked")
	require.Error(t, h.revoke(lease))
	h.must(h.write("config", map[string]any{"admin_api_key": right, "api_endpoint": h.sim.URL()}))
	h.tick()
	require.Empty(t, h.sim.Keys(), "the revoked lease's key")
}

var _ = http.MethodGet
