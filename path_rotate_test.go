package openaisecrets

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestRotate_TheSupersededKeyIsDeletedAfterTheGracePeriod(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"config/rotate", "rotate-root"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			old, _ := h.sim.AdminKey()
			resp := h.must(h.write(at, nil))
			id := resp.Data["admin_api_key_id"].(string)
			require.NotEqual(t, old, id)

			data := h.must(h.read("config")).Data
			require.Equal(t, id, data["admin_api_key_id"])
			require.Equal(t, 1, data["superseded_admin_keys"])
			require.Equal(t, resp.Data["last_rotated"], data["last_rotated"])
			require.ElementsMatch(t, []string{old, id}, h.adminKeyIDs())
			require.Empty(t, h.walEntries())

			h.runPeriodicWork()
			require.Len(t, h.adminKeyIDs(), 2, "still within the grace period")
			h.advance(defaultRotationGrace + time.Second)
			h.runPeriodicWork()
			require.Equal(t, []string{id}, h.adminKeyIDs())
			require.Equal(t, 0, h.must(h.read("config")).Data["superseded_admin_keys"])
			require.NoError(t, h.revoke(h.lease("creds/app", nil)))
			h.sim.Keep(id)
		})
	}
}

// A disabled mount loses its storage, so its superseded keys are deleted with it. A
// moved mount continues.
func TestRotate_ADisabledMountDeletesSupersededKeys(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	var id string
	for range 3 {
		id = h.must(h.write("config/rotate", nil)).Data["admin_api_key_id"].(string)
	}
	require.Len(t, h.adminKeyIDs(), 4)
	h.system.TaintedVal = true
	h.rollback()
	require.Equal(t, []string{id}, h.adminKeyIDs())
	h.system.TaintedVal = false
	require.Equal(t, 0, h.must(h.read("config")).Data["superseded_admin_keys"])
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.sim.Keep(id)
}

func TestRotate_WithoutAGracePeriodTheOldKeyIsDeletedImmediately(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	resp := h.must(h.write("config/rotate", nil))
	require.Equal(t, []string{resp.Data["admin_api_key_id"].(string)}, h.adminKeyIDs())
	require.Empty(t, resp.Warnings)

	// A failure of the deletion is a warning, and is retried.
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: "/organization/admin_api_keys/{key_id}", Skip: 2, Times: 4, Status: 500})
	resp = h.must(h.write("config/rotate", nil))
	require.Len(t, resp.Warnings, 1)
	require.Len(t, h.adminKeyIDs(), 2)
	h.runPeriodicWork()
	require.Equal(t, []string{resp.Data["admin_api_key_id"].(string)}, h.adminKeyIDs())
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_WaitsForTheNewKeyToWork(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{AdminActivationDelay: 1500 * time.Millisecond})
	h.must(h.write("config/rotate", nil))
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_AKeyWithFewerPermissionsIsDiscarded(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	old, _ := h.sim.AdminKey()
	h.sim.SetNewAdminKeys(openaitest.ReadOnly())
	_, err := h.write("config/rotate", nil)
	require.ErrorContains(t, err, "the new admin key does not work")
	require.ErrorContains(t, err, "the previous one stays active")
	require.ErrorContains(t, err, "api.management.write")
	require.Equal(t, []string{old}, h.adminKeyIDs())
	require.Empty(t, h.walEntries())
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

func TestRotate_OnlyRecordedKeysAreDeleted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	person, _ := h.sim.AddAdminKey("vault-admin-by-a-person")
	for range 3 {
		h.must(h.write("config/rotate", nil))
	}
	h.advance(defaultRotationGrace + time.Second)
	h.runPeriodicWork()
	current := h.must(h.read("config")).Data["admin_api_key_id"].(string)
	require.ElementsMatch(t, []string{person, current}, h.adminKeyIDs())
	h.sim.Keep(current)
}

func TestRotate_ASupersededKeyThatCannotBeDeletedStaysListed(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil))
	h.advance(defaultRotationGrace + time.Second)
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 403, Message: "not today"})
	h.runPeriodicWork()
	require.Equal(t, 1, h.must(h.read("config")).Data["superseded_admin_keys"])
	require.Contains(t, h.log.String(), "superseded admin key not deleted")
	cancel()
	h.runPeriodicWork()
	require.Equal(t, 0, h.must(h.read("config")).Data["superseded_admin_keys"])
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_WithoutConfig(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.Contains(t, h.refused(h.write("config/rotate", nil)), "vault write openai/config")
	h.runPeriodicWork()
}

func TestRotate_LooksUpTheIDAfterSkipVerify(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(map[string]any{"skip_verify": true})
	require.Empty(t, h.must(h.read("config")).Data["admin_api_key_id"])
	h.must(h.write("config/rotate", nil))
	h.advance(defaultRotationGrace + time.Second)
	h.runPeriodicWork()
	require.Equal(t, []string{h.must(h.read("config")).Data["admin_api_key_id"].(string)}, h.adminKeyIDs())
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_AWrongIDIsDetectedBeforeTheRotation(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	person, _ := h.sim.AddAdminKey("a person's")
	h.must(h.write("config", map[string]any{"admin_api_key_id": person, "skip_verify": true}))
	require.Contains(t, h.refused(h.write("config/rotate", nil)), "admin_api_key_id")
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 2)
}

func TestRotate_RetriesAnAmbiguousCreateUnderANewName(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Times: 2, Kind: openaitest.FaultLost})
	h.must(h.write("config/rotate", nil))
	require.Len(t, h.adminKeyIDs(), 4)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 2, "the WAL deletes only the lost keys")
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 1)
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_IsRejectedWhileTheMountIsBeingDisabled(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.system.TaintedVal = true
	h.rollback()
	_, err := h.write("config/rotate", nil)
	require.ErrorContains(t, err, "being disabled")
	require.Len(t, h.adminKeyIDs(), 1)
	h.system.TaintedVal = false // the mount was moved
	h.must(h.write("config/rotate", nil))
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_CompletesWhenTheClientDisconnects(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Times: 1, Kind: openaitest.FaultSlow, Delay: 50 * time.Millisecond,
		OnStrike: func(*http.Request) { cancel() }})
	h.must(h.do(ctx, logical.UpdateOperation, "config/rotate", nil))
	require.Empty(t, h.walEntries())
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_AStorageFailureReportsThatTheActiveKeyIsUnknown(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.storage.fail(storageFault{write: 1, after: true})
	_, err := h.write("config/rotate", nil)
	require.ErrorIs(t, err, errWhichKey)
	h.storage.heal()
	h.runPeriodicWork()
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 1)
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_ConcurrentRotationsAndReaders(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.role(nil)
		const rotations, readers = 5, 4
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for range readers {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(10 * time.Millisecond):
					}
					resp, err := h.read("creds/app")
					if err != nil || resp.IsError() {
						t.Errorf("a read failed: %v %v", err, resp)
						return
					}
					if err := h.revoke(h.stored(resp)); err != nil {
						t.Errorf("a revoke failed: %v", err)
					}
				}
			})
		}
		var rotating sync.WaitGroup
		for range rotations {
			rotating.Go(func() {
				if resp, err := h.write("config/rotate", nil); err != nil || resp.IsError() {
					t.Errorf("a rotation failed: %v %v", err, resp)
				}
			})
		}
		rotating.Wait()
		close(stop)
		wg.Wait()
		require.Len(t, h.adminKeyIDs(), rotations+1)
		h.advance(defaultRotationGrace + time.Second)
		h.runPeriodicWork()
		require.Equal(t, []string{h.must(h.read("config")).Data["admin_api_key_id"].(string)}, h.adminKeyIDs())
		h.sim.Keep(h.adminKeyIDs()...)
		h.onlyLeased()
	})
}

// One listing without an admin key does not prove its deletion; it takes two that are
// minutes apart, since nothing else searches for admin keys later.
func TestRotate_OneIncompleteListingDoesNotLoseTheNewKey(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(map[string]any{"tidy_interval": 0})
		lost := h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Kind: openaitest.FaultLost})
		_, err := h.write("config/rotate", nil)
		require.Error(t, err)
		lost()
		require.Greater(t, len(h.adminKeyIDs()), 1)
		time.Sleep(2 * notFinalBefore)
		root, _ := h.sim.AdminKey()
		short := fmt.Sprintf(`{"object":"list","data":[{"object":"organization.admin_api_key","id":%q,"name":"root","redacted_value":"sk-admin...abcd","created_at":1,"last_used_at":null,"owner":{}}],"first_id":null,"last_id":null,"has_more":false}`, root)
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/admin_api_keys", Times: 1, Kind: openaitest.FaultGarbageBefore, Body: short})
		stop := h.ticking()
		defer stop()
		time.Sleep(3 * notFinalBefore)
		require.Equal(t, []string{root}, h.adminKeyIDs())
		require.Empty(t, h.walEntries())
	})
}
