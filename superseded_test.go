package openaisecrets

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/text"
)

// copyOf is a Vault restored from a snapshot of h: the same storage in another process.
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

func TestSuperseded_CopyWithNewAdminKeyRetainsTheOriginals(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.advance(6 * time.Minute)
	h.runPeriodicWork()
	inForce := h.adminKeyIDs()
	staging := copyOf(h)
	_, own := h.sim.AddAdminKey("staging")
	staging.must(staging.write("config", map[string]any{"admin_api_key": own}))
	h.advance(6 * time.Minute)
	staging.offset = h.offset
	staging.runPeriodicWork()
	t.Log("before", inForce, "after", h.adminKeyIDs())
	_, err := h.read("creds/app")
	require.NoError(t, err, "production can issue credentials")
}

func TestSchedule_FastClockAtARotationDoesNotLockOutTheEngine(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	// The node boots with a clock that is 40 days ahead; everything is due.
	h.mu.Lock()
	h.offset = 40 * 24 * time.Hour
	h.mu.Unlock()
	h.runPeriodicWork()
	// NTP corrects the clock.
	h.mu.Lock()
	h.offset = 0
	h.mu.Unlock()
	h.restart()
	read := h.must(h.read("config")).Data
	t.Log("last_rotated", read["last_rotated"], "next_rotation", read["next_rotation"], "expires", read["admin_api_key_expires_at"])
	for day := range 9 {
		h.advance(24 * time.Hour)
		h.runPeriodicWork()
		h.runPeriodicWork()
		if resp, err := h.read("creds/app"); err != nil || resp.IsError() {
			t.Fatalf("day %d: production is locked out: %v %v", day+1, err, resp)
		}
	}
}

func TestConfig_KeyOfAnotherOrganizationKeepsLeases(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	lease := h.lease("creds/app", nil)
	other := openaitest.Start(t, openaitest.Options{})
	_, wrong := other.AdminKey()
	_, right := h.sim.AdminKey()
	resp := h.must(h.write("config", map[string]any{"admin_api_key": wrong, "api_endpoint": other.URL(), "skip_verify": true}))
	require.Contains(t, strings.Join(resp.Warnings, " "), "not verified")
	require.Error(t, h.revoke(lease))
	h.must(h.write("config", map[string]any{"admin_api_key": right, "api_endpoint": h.sim.URL()}))
	h.runPeriodicWork()
	require.Empty(t, h.sim.Keys(), "the revoked lease's key")
}

const adminKeyRoute = "/organization/admin_api_keys/{key_id}"

// together moves the clocks of two mounts.
func together(d time.Duration, h, other *harness) {
	h.advance(d)
	other.mu.Lock()
	defer other.mu.Unlock()
	other.offset += d
}

func TestSuperseded_KeyUsedByAnotherVaultIsRetainedForAWeek(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.advance(6 * time.Minute)
	h.runPeriodicWork()
	originals := h.adminKeyID()
	staging := copyOf(h)
	staging.must(staging.write("config/rotate", nil))
	together(4*time.Minute, h, staging)
	h.lease("creds/app", nil)
	together(2*time.Minute, h, staging)
	h.sim.ResetRequests()
	for range 48 {
		staging.runPeriodicWork()
		together(time.Hour, h, staging)
	}
	require.Contains(t, h.adminKeyIDs(), originals)
	require.Equal(t, 1, h.sim.Count(http.MethodGet, adminKeyRoute), "one read of its use, and none once it is retained")
	require.Zero(t, h.sim.Count(http.MethodDelete, adminKeyRoute))
	resp := staging.must(staging.read("config"))
	require.Contains(t, strings.Join(resp.Warnings, " "), "Superseded admin key "+originals+" is retained until")
	require.Contains(t, strings.Join(resp.Warnings, " "), "force=true")
	require.Equal(t, 1.0, staging.measured().one(t, "admin_keys_retained"))
	require.Len(t, staging.lines("superseded admin key retained"), 2, "logged once a day")
	require.Equal(t, keptUsed, staging.supersededKeys()[0].Kept)
	require.False(t, staging.supersededKeys()[0].LastUsed.IsZero())
	h.lease("creds/app", nil)

	together(6*24*time.Hour, h, staging)
	staging.restart()
	staging.runPeriodicWork()
	require.NotContains(t, h.adminKeyIDs(), originals, "a week after it was superseded")
	require.Empty(t, staging.supersededKeys())
}

func TestSuperseded_UnusedKeyIsDeletedAfterOneRead(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(h *harness, id string){
		"used before the rotation": func(*harness, string) {},
		"used in the grace period": func(h *harness, id string) { h.sim.SetAdminKeyUsed(id, h.sim.Now().Add(2*time.Minute)) },
		"never used":               func(h *harness, id string) { h.sim.SetAdminKeyUsed(id, time.Time{}) },
		"last_used_at is absent": func(h *harness, id string) {
			h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: adminKeyRoute, Times: 1, Kind: openaitest.FaultGarbageBefore,
				Body: `{"object":"organization.admin_api_key","id":"` + id + `","redacted_value":"sk-admin...abc"}`})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.must(h.write("config/rotate", nil))
			id := h.adminKeyID()
			h.must(h.write("config/rotate", nil))
			h.sim.KeepAll()
			prepare(h, id)
			root, _ := h.sim.AdminKey() // irrelevant here
			h.sim.DeleteAdminKey(root)
			cfg, err := getConfig(t.Context(), h.storage)
			require.NoError(t, err)
			cfg.dropSuperseded(root)
			require.NoError(t, h.b.amendConfig(t.Context(), h.storage, cfg))
			h.advance(6 * time.Minute)
			h.sim.ResetRequests()
			h.runPeriodicWork()
			require.Equal(t, []string{h.adminKeyID()}, h.adminKeyIDs())
			require.Equal(t, 1, h.sim.Count(http.MethodGet, adminKeyRoute))
			require.Equal(t, 1, h.sim.Count(http.MethodDelete, adminKeyRoute))
		})
	}
}

// A thief may use the key as often as another Vault does. With force it is deleted
// immediately.
func TestSuperseded_ForceDeletesAKeyInUse(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		waits bool // until the grace period is over and the key is kept
		end   func(h *harness)
	}{
		"the documented steps": {false, func(h *harness) {
			h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
			h.must(h.write("config/rotate", nil))
		}},
		"force": {false, func(h *harness) { h.must(h.write("config/rotate", map[string]any{"force": true})) }},
		"force, of a retained key": {true, func(h *harness) {
			h.must(h.write("rotate-root", map[string]any{"force": true}))
		}},
		"a grace period of 0 later":    {true, func(h *harness) { h.must(h.write("config", map[string]any{"rotation_grace_period": 0})) }},
		"a shorter grace period later": {true, func(h *harness) { h.must(h.write("config", map[string]any{"rotation_grace_period": "4m59s"})) }},
		"a shorter grace period with skip_verify": {true, func(h *harness) {
			h.must(h.write("config", map[string]any{"rotation_grace_period": "4m", "skip_verify": true}))
			h.runPeriodicWork()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.KeepAll()
			h.must(h.write("config/rotate", nil))
			h.advance(6 * time.Minute)
			h.runPeriodicWork()
			stolen := h.adminKeyValue()
			require.Equal(t, http.StatusOK, h.callWith(stolen))
			if test.waits {
				h.must(h.write("config/rotate", nil))
				for second := range 400 {
					h.advance(time.Second)
					require.Equal(t, http.StatusOK, h.callWith(stolen))
					if second%60 == 0 {
						h.runPeriodicWork()
					}
				}
				require.Equal(t, keptUsed, h.supersededKeys()[0].Kept)
			}
			reads := h.sim.Count(http.MethodGet, adminKeyRoute)
			test.end(h)
			require.Equal(t, http.StatusUnauthorized, h.callWith(stolen))
			require.LessOrEqual(t, h.sim.Count(http.MethodGet, adminKeyRoute)-reads, 2, "only the reads that verify the new key")
			require.Empty(t, h.supersededKeys())
			require.NoError(t, h.revoke(h.lease("creds/app", nil)))
		})
	}
}

func TestSuperseded_FailedForcedDeletionIsRetried(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.must(h.write("config/rotate", nil))
	stolen, id := h.adminKeyValue(), h.adminKeyID()
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: "/organization/admin_api_keys/" + id, Status: 403})
	resp := h.must(h.write("config/rotate", map[string]any{"force": true}))
	require.Contains(t, strings.Join(resp.Warnings, " "), id)
	require.Len(t, h.adminKeyIDs(), 2, "the others are deleted")
	h.advance(4 * time.Minute)
	require.Equal(t, http.StatusOK, h.callWith(stolen))
	cancel()
	h.restart()
	h.runPeriodicWork()
	require.Equal(t, []string{h.adminKeyID()}, h.adminKeyIDs())
}

func TestSuperseded_ShorterGracePeriodAppliesToPendingKeys(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_grace_period": "1h"}))
	h.must(h.write("config/rotate", nil))
	at := h.supersededKeys()[0].SupersededAt
	ends := func(after time.Duration) {
		t.Helper()
		require.Equal(t, at.Add(after), h.supersededKeys()[0].DeleteAfter)
	}
	ends(time.Hour)
	h.must(h.write("config", map[string]any{"rotation_grace_period": "2h"}))
	ends(time.Hour)
	h.must(h.write("config", map[string]any{"rotation_grace_period": "90m"}))
	ends(time.Hour)
	h.must(h.write("config", map[string]any{"rotation_grace_period": "10m"}))
	ends(10 * time.Minute)
	h.advance(9 * time.Minute)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 2)
	h.advance(time.Minute + time.Second)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 1)
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestSuperseded_ConfigWriteChecksWhoUsedTheKey(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		used    time.Duration // after this process's last use
		restart bool
		kept    bool
	}{
		"used by this process":        {0, false, false},
		"used shortly after":          {2 * time.Minute, false, false},
		"used later by another Vault": {4 * time.Minute, false, true},
		"used before a restart":       {0, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.KeepAll()
			h.must(h.write("config/rotate", nil))
			h.advance(6 * time.Minute)
			h.runPeriodicWork()
			made := h.adminKeyID()
			h.lease("creds/app", nil)
			h.sim.SetAdminKeyUsed(made, h.sim.Now().Add(test.used))
			h.b.dropSnapshot() // the record of the use survives
			h.advance(10 * time.Minute)
			if test.restart {
				h.restart()
			}
			_, key := h.sim.AddAdminKey("by hand")
			resp := h.must(h.write("config", map[string]any{"admin_api_key": key}))
			require.Equal(t, test.kept, resp != nil && strings.Contains(strings.Join(resp.Warnings, " "), made+" is retained"))
			h.advance(6 * time.Minute)
			h.sim.ResetRequests()
			h.runPeriodicWork()
			require.Equal(t, test.kept, len(h.adminKeyIDs()) == 2)
			if test.kept {
				require.Empty(t, h.routes(), "no call is needed")
				h.advance(longestKept)
				h.runPeriodicWork()
				require.Len(t, h.adminKeyIDs(), 1)
			}
		})
	}
}

func TestSuperseded_DisabledCopyRetainsTheOriginalsKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	staging := copyOf(h)
	_, own := h.sim.AddAdminKey("staging")
	staging.must(staging.write("config", map[string]any{"admin_api_key": own}))
	h.manager.taint()
	staging.rollback()
	require.Contains(t, staging.log.String(), "a superseded admin key remains at OpenAI")
	require.Contains(t, h.adminKeyIDs(), h.adminKeyID())
}

func TestSuperseded_HangingDeletionBlocksNeitherOthersNorConfig(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	var ids []string
	var value string
	for range 4 {
		ids, value = append(ids, h.adminKeyID()), h.adminKeyValue()
		h.must(h.write("config/rotate", nil))
	}
	h.advance(6 * time.Minute)
	struck := make(chan struct{}, 8)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: "/organization/admin_api_keys/" + ids[3], Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { struck <- struct{}{} }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- h.b.deleteSuperseded(ctx, &logical.Request{Storage: h.storage, MountPoint: "openai/"})
	}()
	<-struck
	require.Eventually(t, func() bool { return len(h.adminKeyIDs()) == 2 }, 20*time.Second, 10*time.Millisecond, "the others are deleted")
	h.must(h.write("config", map[string]any{"request_timeout": 9}))
	require.Contains(t, h.refused(h.write("config", map[string]any{"admin_api_key": value, "force": true})), "try again in a minute")
	require.Contains(t, h.refused(h.write("config", map[string]any{"admin_api_key": value, "force": true, "skip_verify": true})), "try again in a minute")
	otherID, other := h.sim.AddAdminKey("another")
	require.Contains(t, h.refused(h.write("config", map[string]any{"admin_api_key": other, "skip_verify": true, "force": true})), "set admin_api_key_id")
	h.must(h.write("config", map[string]any{"admin_api_key": other, "admin_api_key_id": otherID, "skip_verify": true, "force": true}))
	cancel()
	require.NoError(t, <-done)
	require.NotEmpty(t, h.supersededKeys())
	require.EqualValues(t, 9, h.config()["request_timeout"])
	h.sim.ClearFaults()
	h.must(h.write("config", map[string]any{"admin_api_key": value, "force": true}))
	h.advance(6 * time.Minute)
	h.runPeriodicWork()
	require.Contains(t, h.adminKeyIDs(), ids[3], "the key is active again")
}

func TestSuperseded_NotFoundYoungKeyIsCheckedAgain(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	h.must(h.write("config/rotate", nil))
	young := h.adminKeyID()
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: "/organization/admin_api_keys/" + young, Times: 1, Status: 404, Code: "admin_api_key_not_found", Message: "No admin API key found."})
	resp := h.must(h.write("config/rotate", nil))
	require.Contains(t, strings.Join(resp.Warnings, " "), young)
	require.Len(t, h.supersededKeys(), 1)
	h.runPeriodicWork()
	require.NotContains(t, h.adminKeyIDs(), young)
}

func TestSuperseded_NotFoundRequiresACompleteList(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.advance(6 * time.Minute)
	for _, fault := range []openaitest.Fault{
		{Code: "admin_api_key_not_found", Message: "No admin API key found."},
		{Code: "unknown_url", Message: "Unknown request URL: DELETE /organization/admin_api_keys."},
		{Body: `{"error":{"message":"Invalid URL (DELETE /v1/organization/admin_api_keys)","type":"invalid_request_error","param":null,"code":null}}`},
		{Body: `{"timestamp":"2026-01-01T00:00:00Z","status":404,"error":"Not Found","path":"/organization/admin_api_keys"}`},
	} {
		fault.Method, fault.Route, fault.Status = http.MethodDelete, adminKeyRoute, http.StatusNotFound
		cancel := h.sim.Fail(fault)
		h.runPeriodicWork()
		require.Len(t, h.adminKeyIDs(), 2)
		require.Len(t, h.supersededKeys(), 1, "%+v", fault)
		cancel()
	}
	// A list that is cut short does not show the current key either.
	root, _ := h.sim.AdminKey()
	h.sim.DeleteAdminKey(root)
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/admin_api_keys", Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
	h.runPeriodicWork()
	require.Len(t, h.supersededKeys(), 1)
	cancel()
	h.runPeriodicWork()
	require.Empty(t, h.supersededKeys())
}

func TestSuperseded_KeysOfAFormerOrganizationAreReportedAndRetained(t *testing.T) {
	t.Parallel()
	for _, skip := range []bool{false, true} {
		h := configured(t, openaitest.Options{})
		h.sim.KeepAll()
		root, _ := h.sim.AdminKey()
		h.must(h.write("config/rotate", nil))
		made := h.adminKeyID()
		h.must(h.remove("roles/app"))
		other := openaitest.Start(t, openaitest.Options{})
		other.KeepAll()
		_, key := other.AdminKey()
		resp := h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": other.URL(), "skip_verify": skip, "force": skip}))
		said := strings.Join(resp.Warnings, " ")
		require.Equal(t, !skip, strings.Contains(said, "their revocation fails"))
		require.Contains(t, said, root+", "+made)
		h.must(h.write("config/rotate", nil)) // finds the ID after skip_verify
		h.advance(time.Hour)
		h.runPeriodicWork()
		require.ElementsMatch(t, []string{root, made}, h.adminKeyIDs())
		require.Len(t, h.supersededKeys(), 2, "no key is considered deleted")
		require.Contains(t, strings.Join(h.must(h.read("config")).Warnings, " "), root)

		// With a key of the first organization, they are deleted as planned. This process
		// does not know the last use of the one that the engine created.
		_, key = h.sim.AddAdminKey("by hand")
		h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()}))
		h.runPeriodicWork()
		require.NotContains(t, h.adminKeyIDs(), root)
		h.must(h.write("config/rotate", map[string]any{"force": true}))
		require.Equal(t, []string{h.adminKeyID()}, h.adminKeyIDs())
	}
}

func TestSuperseded_KeysOfAFormerOrganizationAreDroppedAfterAWeek(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.must(h.remove("roles/app"))
	other := openaitest.Start(t, openaitest.Options{})
	_, key := other.AdminKey()
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": other.URL()}))
	h.advance(longestKept - time.Minute)
	h.runPeriodicWork()
	require.Len(t, h.supersededKeys(), 2)
	h.advance(2 * time.Minute)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), 2)
	require.Empty(t, h.supersededKeys())
	require.Len(t, h.lines("superseded admin keys of another organization or endpoint are no longer tracked; delete them there"), 1)
}

// A single list may omit a key that is still valid.
func TestSuperseded_OneListDropsNoRecord(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: adminKeyRoute, Status: http.StatusForbidden})
	h.advance(longestKept + time.Hour)
	id, own := h.sim.AddAdminKey("own")
	h.must(h.write("config", map[string]any{"admin_api_key": own, "admin_api_key_id": id, "skip_verify": true, "force": true}))
	kept := h.supersededKeys()
	require.NotEmpty(t, kept)
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/admin_api_keys", Times: 1, Kind: openaitest.FaultGarbageBefore,
		Body: fmt.Sprintf(`{"object":"list","data":[{"object":"organization.admin_api_key","id":%q,"name":"own","redacted_value":"sk-admin...x","created_at":1,"last_used_at":null,"owner":{"type":"user","object":"organization.user","id":"user_1","name":"A","created_at":1,"role":"owner"}}],"first_id":null,"last_id":null,"has_more":false}`, id)})
	h.sim.ResetRequests()
	h.runPeriodicWork()
	require.NotZero(t, h.sim.Count(http.MethodGet, "/organization/admin_api_keys"))
	require.Len(t, h.supersededKeys(), len(kept))
}

func TestSuperseded_ForceDropsAndReportsKeysOfAFormerOrganization(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	made := h.adminKeyID()
	h.must(h.remove("roles/app"))
	other := openaitest.Start(t, openaitest.Options{})
	other.KeepAll()
	_, key := other.AdminKey()
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": other.URL()}))
	resp := h.must(h.write("config/rotate", map[string]any{"force": true}))
	require.Contains(t, strings.Join(resp.Warnings, " "), made)
	require.Empty(t, h.supersededKeys())
	require.Len(t, h.adminKeyIDs(), 2)
	require.Len(t, other.AdminKeys(), 1)
}

// Faults at each storage write of the deletion of a superseded key: steps that were not
// stored are repeated.
func TestSuperseded_StorageFaultsAreRecovered(t *testing.T) {
	t.Parallel()
	for name, used := range map[string]bool{"deleted": false, "kept": true} {
		for kind, fault := range map[string]storageFault{"before": {}, "after": {after: true}, "killed before": {kill: true}, "killed after": {after: true, kill: true}} {
			t.Run(name+", "+kind, func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.sim.KeepAll()
				root, _ := h.sim.AdminKey()
				h.must(h.write("config/rotate", nil))
				h.advance(6 * time.Minute)
				if used {
					h.sim.SetAdminKeyUsed(root, h.sim.Now())
				}
				h.storage.fail(fault)
				func() {
					defer func() { _ = recover() }()
					_ = h.b.deleteSuperseded(context.Background(), &logical.Request{Storage: h.storage, MountPoint: "openai/"})
				}()
				if h.storage.heal() {
					h.restart()
				}
				h.runPeriodicWork()
				require.Equal(t, used, len(h.adminKeyIDs()) == 2)
				require.Equal(t, used, len(h.supersededKeys()) == 1)
			})
		}
	}
}

func TestRotate_WarnsThatAWrittenKeyStopsWorkingEverywhere(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	root, _ := h.sim.AdminKey()
	note := h.must(h.write("config/rotate", nil)).Data["note"]
	require.Contains(t, note, root)
	require.Contains(t, note, "in 5m0s, including in any other mount")
	require.NotContains(t, h.must(h.write("config/rotate", nil)).Data, "note")
}

// --- Unfinished rotations ---

func TestRotate_AbsenceRequiresAnOldEntryAndACompleteList(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	require.ErrorIs(t, h.rollbackAdminKey("vault-admin-x", h.now()), errNotFinal)
	require.ErrorIs(t, h.rollbackAdminKey("vault-admin-x", h.now().Add(-notFinalBefore+time.Minute)), errNotFinal)
	require.ErrorIs(t, h.rollbackAdminKey("vault-admin-x", h.now().Add(-notFinalBefore)), errNotFinal, "one list proves nothing")
	require.ErrorIs(t, h.rollbackAdminKey("vault-admin-x", h.now().Add(-notFinalBefore)), errNotFinal, "two lists in a row prove nothing")
	h.unseenBefore("vault-admin-x")
	require.NoError(t, h.rollbackAdminKey("vault-admin-x", h.now().Add(-notFinalBefore)))
	h.unseenBefore("vault-admin-x")
	require.NoError(t, h.rollbackAdminKey("vault-admin-x", time.Time{}), "an entry of an earlier release")

	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/admin_api_keys", Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
	require.ErrorContains(t, h.rollbackAdminKey("vault-admin-x", time.Time{}), "does not show the current key")
	cancel()

	// A listed key is deleted, and its 404 counts only once it is old and not listed.
	id, _ := h.sim.AddAdminKey("vault-admin-x")
	notFound := openaitest.Fault{Method: http.MethodDelete, Route: adminKeyRoute, Times: 1, Status: 404, Code: "admin_api_key_not_found", Message: "No admin API key found."}
	h.sim.Fail(notFound)
	require.ErrorIs(t, h.rollbackAdminKey("vault-admin-x", h.now()), errNotFinal)
	h.sim.Fail(notFound)
	require.ErrorContains(t, h.rollbackAdminKey("vault-admin-x", h.now().Add(-time.Hour)), "still lists it")
	require.Contains(t, h.adminKeyIDs(), id)
	require.NoError(t, h.rollbackAdminKey("vault-admin-x", h.now()))
	require.NotContains(t, h.adminKeyIDs(), id)

	// A new entry replaces one that was written while the clock was ahead.
	require.NoError(t, h.rollbackAdminKey("vault-admin-x", h.now().Add(40*24*time.Hour)))
	require.Len(t, h.walEntries(), 1)
	h.runPeriodicWork()
	require.Empty(t, h.walEntries())
}

// A copy may be from a snapshot that was taken during a rotation of the original.
func TestRotate_CopyDoesNotDeleteTheOriginalsActiveKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	staging := copyOf(h)
	began := h.now()
	h.must(h.write("config/rotate", nil))
	name := ""
	for _, k := range h.sim.AdminKeys() {
		if k.ID == h.adminKeyID() {
			name = k.Name
		}
	}
	together(2*time.Minute, h, staging)
	h.lease("creds/app", nil)
	for _, created := range []time.Time{began, {}} {
		require.ErrorIs(t, staging.rollbackAdminKey(name, created), errKeyUsed)
	}
	h.lease("creds/app", nil)
	h.sim.DeleteAdminKey(h.adminKeyID())
	staging.unseenBefore(name)
	require.NoError(t, staging.rollbackAdminKey(name, began.Add(-time.Hour)), "the key no longer exists")
}

// An expired key is useless, so its WAL entry ends.
func TestRotate_CopyDeletesTheOriginalsKeyOnceItHasExpired(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	staging := copyOf(h)
	began := h.now()
	h.must(h.write("config/rotate", nil))
	key := h.adminKeyID()
	i := slices.IndexFunc(h.sim.AdminKeys(), func(k openaitest.AdminKey) bool { return k.ID == key })
	name := h.sim.AdminKeys()[i].Name
	together(2*time.Minute, h, staging)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	together(minKeyLife-3*time.Minute, h, staging)
	require.ErrorIs(t, staging.rollbackAdminKey(name, began), errKeyUsed)
	right := staging.offset
	staging.setClock(right + 8*24*time.Hour)
	require.ErrorIs(t, staging.rollbackAdminKey(name, began.Add(-time.Hour)), errKeyUsed, "a clock that is ahead does not expire a key")
	staging.setClock(right)
	together(time.Minute+clockSlack/2, h, staging)
	require.ErrorIs(t, staging.rollbackAdminKey(name, began), errKeyUsed, "within the clock slack")
	together(2*clockSlack, h, staging)
	require.NoError(t, staging.rollbackAdminKey(name, began))
	require.NotContains(t, h.adminKeyIDs(), key)
}

// The rate limiter can hold back the create of a rotation, so that the copy's entry is
// older than the original's new admin key.
func TestRotate_CopyWaitsForAnAdminKeyThatWasCreatedLate(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	staging := copyOf(h)
	h.must(h.write("config/rotate", nil))
	active := h.adminKeyID()
	i := slices.IndexFunc(h.sim.AdminKeys(), func(k openaitest.AdminKey) bool { return k.ID == active })
	entry := h.now().Add(-80 * time.Second)
	together(45*time.Second, h, staging)
	err := staging.b.rollbackAdminKey(t.Context(), &logical.Request{Storage: staging.storage}, adminKeyEntry{Version: 1, Name: h.sim.AdminKeys()[i].Name, CreatedAt: entry}, walMinAge)
	require.ErrorIs(t, err, errNotFinal)
	require.Contains(t, h.adminKeyIDs(), active)
}

func TestRotate_NotFoundDiscardedKeyStaysInTheWAL(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.SetNewAdminKeys(openaitest.ReadOnly())
	_, right := h.sim.AdminKey()
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: adminKeyRoute, Status: 404, Code: "admin_api_key_not_found", Message: "No admin API key found.", Times: 1,
		Match: func(r *http.Request) bool { return r.Header.Get("Authorization") == "Bearer "+right }})
	_, err := h.write("config/rotate", nil)
	require.ErrorContains(t, err, "does not work")
	require.Len(t, h.walEntries(), 1)
	require.Len(t, h.adminKeyIDs(), 2)
	h.runPeriodicWork()
	require.Empty(t, h.walEntries())
	require.Len(t, h.adminKeyIDs(), 1)
}

func TestRotate_RollbackDoesNotHoldTheConfigLock(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.AddAdminKey("vault-admin-x")
	h.sim.KeepAll()
	struck := make(chan struct{}, 8)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: adminKeyRoute, Kind: openaitest.FaultHang, Times: 1, OnStrike: func(*http.Request) { struck <- struct{}{} }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- h.b.rollbackAdminKey(ctx, &logical.Request{Storage: h.storage, MountPoint: "openai/"}, adminKeyEntry{Version: 1, Name: "vault-admin-x"}, 0)
	}()
	<-struck
	h.must(h.write("config", map[string]any{"request_timeout": 9}))
	cancel()
	require.Error(t, <-done)
}

// --- Clocks ---

func TestSchedule_WrongClockAtARotationDeletesNoActiveKey(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for name, offsets := range map[string][]time.Duration{
		"behind":               {-40 * day},
		"an hour behind":       {-time.Hour},
		"three days":           {3 * day},
		"eight days":           {8 * day},
		"a year":               {365 * day},
		"twice":                {40 * day, 400 * day},
		"ahead, behind, ahead": {40 * day, -40 * day, 10 * day},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.KeepAll()
			h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
			truth := time.Duration(0)
			for _, offset := range offsets {
				h.setClock(truth + offset)
				h.must(h.write("config/rotate", nil))
				for range 3 {
					h.runPeriodicWork()
				}
				h.setClock(truth)
				h.restart()
				for range 3 * 24 {
					h.advance(time.Hour)
					truth += time.Hour
					h.runPeriodicWork()
				}
				last := h.time("last_rotated")
				require.False(t, last.After(h.now()), "last_rotated %s", last)
				require.Less(t, h.now().Sub(last), 26*time.Hour)
				require.LessOrEqual(t, h.time("next_rotation").Sub(h.now()), day)
				for _, k := range h.supersededKeys() {
					require.LessOrEqual(t, k.DeleteAfter.Sub(h.now()), defaultRotationGrace)
				}
			}
			for range 9 {
				h.advance(day)
				h.runPeriodicWork()
				h.lease("creds/app", nil)
			}
			// The schedule may just have rotated the key again. No other outlives its grace.
			h.advance(6 * time.Minute)
			h.runPeriodicWork()
			graces := h.supersededKeys()
			for _, k := range graces {
				require.True(t, k.DeleteAfter.After(h.now()), "superseded admin key %s outlives its grace period", k.ID)
			}
			require.Len(t, h.adminKeyIDs(), 1+len(graces))
			h.advance(6 * time.Minute)
			h.runPeriodicWork()
			require.Len(t, h.adminKeyIDs(), 1)
		})
	}
}

func TestSchedule_FutureTimesAreCorrectedOnce(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.setClock(10 * 24 * time.Hour)
	h.must(h.write("config", map[string]any{"rotation_schedule": "0 2 1 * *", "rotation_grace_period": "24h"}))
	h.must(h.write("config/rotate", nil))
	cfg, err := getConfig(t.Context(), h.storage)
	require.NoError(t, err)
	require.False(t, cfg.correctTimes(h.now()))
	require.False(t, cfg.correctTimes(h.now().Add(-30*time.Second)), "within the skew of two nodes")

	end := cfg.AdminKeyExpires
	h.setClock(0)
	for range 3 {
		h.runSchedule()
	}
	require.Len(t, h.lines("config has times in the future, written while the clock was ahead; reset to the current time"), 1)
	require.WithinDuration(t, h.now(), h.time("last_rotated"), 5*time.Second)
	require.False(t, h.time("admin_api_key_expires_at").After(end), "never later than at OpenAI")
	require.WithinDuration(t, h.now().Add(24*time.Hour), h.supersededKeys()[0].DeleteAfter, 5*time.Second)
}

func TestSchedule_FastClockDoesNotRotateEveryMinute(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.setClock(40 * 24 * time.Hour)
	h.sim.ResetRequests()
	for range 90 {
		h.runSchedule()
		h.advance(time.Minute)
	}
	require.LessOrEqual(t, h.sim.Count(http.MethodPost, "/organization/admin_api_keys"), 3)
}

func TestRotate_RejectedWithFiveSupersededKeysInGracePeriod(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config", map[string]any{"rotation_grace_period": "168h"}))
	for range maxWaiting {
		h.must(h.write("config/rotate", nil))
		h.advance(time.Minute)
	}
	first := h.supersededKeys()[0]
	before := h.entries()
	for _, at := range []string{"config/rotate", "rotate-root"} {
		said := h.refused(h.write(at, nil))
		require.Contains(t, said, text.Time(first.DeleteAfter))
		require.Contains(t, said, "force=true")
	}
	require.Equal(t, before, h.entries())
	require.Len(t, h.adminKeyIDs(), maxWaiting+1)

	// A scheduled rotation still runs.
	h.must(h.write("config", map[string]any{"rotation_period": "10m"}))
	h.advance(11 * time.Minute)
	h.runPeriodicWork()
	require.Len(t, h.adminKeyIDs(), maxWaiting+2)
	h.must(h.write("config", map[string]any{"rotation_period": 0}))
	h.refused(h.write("config/rotate", nil))

	// Retained keys, and keys that could not be deleted, do not count.
	cfg, err := getConfig(t.Context(), h.storage)
	require.NoError(t, err)
	cfg.keep(cfg.Superseded[0].ID, keptUsed, h.now())
	cfg.Superseded[1].DeleteAfter = h.now().Add(-time.Minute)
	require.NoError(t, h.b.amendConfig(t.Context(), h.storage, cfg))
	h.must(h.write("config/rotate", nil))
	h.refused(h.write("config/rotate", nil))

	// With force, no superseded key is left.
	h.must(h.write("config/rotate", map[string]any{"force": true}))
	require.Len(t, h.adminKeyIDs(), 1)
}

func TestRotate_NotRejectedWithoutGracePeriod(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	for range maxWaiting {
		h.must(h.write("config/rotate", nil))
	}
	failed := h.supersededKeys()[1].ID
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: "/organization/admin_api_keys/" + failed, Status: 403})
	resp := h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	require.Equal(t, []string{notDeletedText([]string{failed})}, resp.Warnings, "only for the failed deletion")
	cancel()
	require.Empty(t, h.must(h.write("config/rotate", nil)).Warnings)
	require.Len(t, h.adminKeyIDs(), 1)
}

func TestSuperseded_WarnsOnlyOfFailures(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config", map[string]any{"rotation_grace_period": "1h"}))
	h.must(h.write("config/rotate", nil))
	require.Nil(t, h.must(h.write("config", map[string]any{"rotation_grace_period": "30m"})), "a pending deletion is not a failure")
	h.advance(10 * time.Minute)
	h.must(h.write("config/rotate", nil))
	// The first key is deleted, and the second is pending. The worker handles the storage
	// failure.
	h.advance(10 * time.Minute)
	h.storage.fail(storageFault{write: 1})
	require.Nil(t, h.must(h.write("config", map[string]any{"rotation_grace_period": "15m"})))
	require.Len(t, h.adminKeyIDs(), 2)
	h.storage.heal()
	h.runPeriodicWork()
	require.Len(t, h.supersededKeys(), 1)
}

// A snapshot can be taken while a create waits for OpenAI's rate limit. Its entry is then
// older than the key that the original returns.
func TestWAL_CopyWaitsForAKeyThatWasCreatedLate(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			route := routeAccounts
			if kind == typeKey {
				account := h.sim.AddServiceAccount(h.project, "adopted")
				h.must(h.write("roles/app", map[string]any{"credential_type": typeKey, "service_account_id": account}))
				route = routeNewKey
			}
			h.sim.KeepAll()
			var staging *harness
			h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: route, Kind: openaitest.FaultSlow, Times: 1, OnStrike: func(*http.Request) {
				staging = copyOf(h)
				h.advance(80 * time.Second)
			}})
			lease := h.lease("creds/app", nil)
			require.NotEmpty(t, staging.walEntries())
			work := func() {
				staging.offset = h.offset
				ctx, req := client.Background(t.Context()), &logical.Request{Storage: staging.storage, MountPoint: "openai/"}
				require.NoError(t, staging.b.refreshWAL(ctx, req))
				for _, kind := range []string{walAccount, walKey} {
					staging.b.runWAL(ctx, req, kind, walMinAge)
				}
			}
			h.advance(45 * time.Second)
			work()
			require.Equal(t, http.StatusOK, h.inference(lease, http.MethodGet, "/models"), "the copy keeps a new account")
			h.advance(3 * time.Minute)
			require.Equal(t, http.StatusOK, h.inference(lease, http.MethodGet, "/models"))
			work()
			require.Equal(t, http.StatusOK, h.inference(lease, http.MethodGet, "/models"), "the copy keeps a used key")
		})
	}
}
