package openaisecrets

// The deletion of superseded admin keys that are in use, with an unknown ID of the current
// key, with clock skew, and with their mount or config.

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// replaced is a mount with a rotated admin key, which no other program should have.
func replaced(t *testing.T) *harness {
	t.Helper()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	h.advance(6 * time.Minute)
	h.runPeriodicWork()
	return h
}

func TestSuperseded_WriteWithoutGracePeriodDeletesAStolenKey(t *testing.T) {
	t.Parallel()
	for name, writes := range map[string][]map[string]any{
		"in one write":                 {{"rotation_grace_period": 0}},
		"after a grace period of 0":    {nil},
		"a grace period of 0 later":    {{"rotation_grace_period": "5m"}, {"rotation_grace_period": 0}},
		"a shorter grace period later": {{"rotation_grace_period": "5m"}, {"rotation_grace_period": "4m"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := replaced(t)
			stolen := h.adminKeyValue()
			h.advance(10 * time.Minute) // the mount is idle
			if writes[0] == nil {
				h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
				writes[0] = map[string]any{}
			}
			h.steals(stolen, 4*time.Minute)
			_, own := h.sim.AddAdminKey("own")
			for i, fields := range writes {
				if i == 0 {
					fields["admin_api_key"] = own
				} else {
					h.steals(stolen, 4*time.Minute+time.Second)
				}
				h.must(h.write("config", fields))
			}
			require.Equal(t, http.StatusUnauthorized, h.callWith(stolen))
			require.Empty(t, h.supersededKeys())
			require.Equal(t, own, h.adminKeyValue())
		})
	}
}

// Each remedy in the warning deletes a retained key.
func TestSuperseded_DocumentedRemediesDeleteRetainedKeys(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(h *harness){
		"a grace period of 0": func(h *harness) {
			require.Contains(t, h.warnings("config"), "rotation_grace_period=0")
			h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
		},
		"force": func(h *harness) {
			require.Contains(t, h.warnings("config"), "force=true")
			h.must(h.write("config/rotate", map[string]any{"force": true}))
		},
		"0 written again": func(h *harness) {
			h.inStorage0()
			h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
		},
		"a rotation with 0": func(h *harness) { h.inStorage0(); h.must(h.write("config/rotate", nil)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := replaced(t)
			h.restart() // forgets the earlier use
			stolen := h.adminKeyValue()
			_, own := h.sim.AddAdminKey("own")
			h.must(h.write("config", map[string]any{"admin_api_key": own}))
			h.steals(stolen, 10*time.Second)
			require.Equal(t, keptUnvouched, h.supersededKeys()[0].Kept)
			end(h)
			require.Equal(t, http.StatusUnauthorized, h.callWith(stolen))
			require.Empty(t, h.supersededKeys())
		})
	}
}

// The first write to a copy may increase the grace period of 0 from the snapshot.
func TestSuperseded_GracePeriodInTheWriteRetainsTheReplacedKey(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	staging := copyOf(h)
	_, own := h.sim.AddAdminKey("staging")
	staging.must(staging.write("config", map[string]any{"admin_api_key": own, "rotation_grace_period": "5m"}))
	together(6*time.Minute, h, staging)
	staging.runPeriodicWork()
	h.lease("creds/app", nil)
	require.Equal(t, keptUnvouched, staging.supersededKeys()[0].Kept)
}

// --- The current key's ID is unknown ---

func TestSuperseded_OneListChecksKeysAfterSkipVerify(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	made := h.adminKeyID()
	id, own := h.sim.AddAdminKey("own")
	resp := h.must(h.write("config", map[string]any{"admin_api_key": own, "force": true, "skip_verify": true}))
	said := strings.Join(resp.Warnings, " ")
	require.Contains(t, said, "only after it has checked")
	require.Contains(t, said, made)
	require.NotContains(t, said, "Not among")
	require.Contains(t, h.warnings("config"), "only after it has checked")
	h.sim.ResetRequests()
	for range 30 {
		h.runPeriodicWork()
		h.advance(time.Minute)
	}
	require.Equal(t, 1, h.sim.Count(http.MethodGet, "/organization/admin_api_keys"))
	require.Equal(t, id, h.adminKeyID())
	require.NotContains(t, h.warnings("config"), "only after it has checked")
	require.Contains(t, h.adminKeyIDs(), made, "the key is retained for a week")
	h.advance(longestKept)
	h.runPeriodicWork()
	require.Equal(t, []string{id}, h.adminKeyIDs())
}

func TestSuperseded_UnknownIDIsSearchedHourlyAndLoggedDaily(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	made := h.adminKeyID()
	_, own := h.sim.AddAdminKey("own")
	h.must(h.write("config", map[string]any{"admin_api_key": own, "force": true, "skip_verify": true, "rotation_grace_period": 0}))
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/admin_api_keys", Status: http.StatusForbidden})
	h.sim.ResetRequests()
	for range 6 * 30 { // thirty hours
		h.runPeriodicWork()
		h.advance(10 * time.Minute)
	}
	require.InDelta(t, 30, h.sim.Count(http.MethodGet, "/organization/admin_api_keys"), 2)
	require.Len(t, h.lines("superseded admin keys not checked: the list of admin keys could not be read"), 2)
	require.Contains(t, h.warnings("config"), made)
	require.Contains(t, h.adminKeyIDs(), made)
	cancel()
	h.must(h.write("config", map[string]any{"request_timeout": 9, "skip_verify": true})) // a write starts the search again
	h.runPeriodicWork()
	require.NotContains(t, h.adminKeyIDs(), made)
	require.Empty(t, h.supersededKeys())
}

func TestSuperseded_UnlistedKeyAfterSkipVerifyIsElsewhere(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	made := h.adminKeyID()
	h.must(h.remove("roles/app"))
	other := openaitest.Start(t, openaitest.Options{})
	other.KeepAll()
	_, key := other.AdminKey()
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": other.URL(), "force": true, "skip_verify": true, "rotation_grace_period": 0}))
	h.runPeriodicWork()
	require.Contains(t, h.warnings("config"), elsewhereText([]string{made}))
	require.Contains(t, h.adminKeyIDs(), made)
}

// A superseded key may be written back with skip_verify.
func TestSuperseded_ReactivatedKeyIsNotDeleted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	id, value := h.adminKeyID(), h.adminKeyValue()
	h.must(h.write("config/rotate", nil))
	h.must(h.write("config", map[string]any{"admin_api_key": value, "force": true, "skip_verify": true, "rotation_grace_period": 0}))
	h.advance(10 * time.Minute)
	h.runPeriodicWork()
	h.runPeriodicWork()
	require.Equal(t, []string{id}, h.adminKeyIDs())
	require.Equal(t, id, h.adminKeyID())
	require.Empty(t, h.supersededKeys())
}

func TestSuperseded_CurrentKeyIsNeverDeleted(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	id := h.adminKeyID()
	due := func() {
		cfg, err := getConfig(t.Context(), h.storage)
		require.NoError(t, err)
		cfg.Superseded = []supersededKey{{ID: id, SupersededAt: h.now().Add(-2 * time.Hour), DeleteAfter: h.now().Add(-time.Hour), EvenIfUsed: true}}
		require.NoError(t, h.b.amendConfig(t.Context(), h.storage, cfg))
	}
	due()
	h.runPeriodicWork()
	require.Contains(t, h.adminKeyIDs(), id)
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	require.Contains(t, h.adminKeyIDs(), id)
	due()
	h.manager.taint()
	h.rollback()
	h.manager.untaint()
	require.Contains(t, h.adminKeyIDs(), id)
	due()
	h.must(h.remove("config"))
	require.Contains(t, h.adminKeyIDs(), id)
}

// --- Clocks ---

func TestSuperseded_CopyWithSlowClockRetainsTheOriginalsKey(t *testing.T) {
	t.Parallel()
	for _, behind := range []time.Duration{time.Hour, 8 * 24 * time.Hour} {
		h := replaced(t)
		staging := copyOf(h)
		staging.setClock(h.offset - behind)
		staging.must(staging.write("config/rotate", nil))
		together(time.Minute, h, staging)
		staging.setClock(h.offset)
		for range 10 {
			h.lease("creds/app", nil)
			staging.runPeriodicWork()
			together(time.Minute, h, staging)
		}
		require.Equal(t, keptUsed, staging.supersededKeys()[0].Kept)
		h.lease("creds/app", nil)
	}
}

func TestSuperseded_SlowClockDeletesNoKey(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	h.must(h.write("config", map[string]any{"rotation_grace_period": "24h"}))
	staging := copyOf(h)
	staging.must(staging.write("config/rotate", nil))
	before := staging.supersededKeys()
	together(10*time.Minute, h, staging)
	h.lease("creds/app", nil)
	staging.setClock(h.offset - 8*24*time.Hour) // after a boot, before NTP
	staging.runPeriodicWork()
	staging.setClock(h.offset)
	staging.runPeriodicWork()
	require.Equal(t, before, staging.supersededKeys(), "times that OpenAI confirms are not corrected")
	together(24*time.Hour, h, staging)
	staging.runPeriodicWork()
	require.Equal(t, keptUsed, staging.supersededKeys()[0].Kept)
	h.lease("creds/app", nil)
}

// --- With the mount or the config ---

func TestSuperseded_CopyDisabledInGracePeriodRetainsTheOriginalsKey(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"disable", "delete"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := replaced(t)
			h.must(h.write("config", map[string]any{"rotation_grace_period": "24h"}))
			h.must(h.write("config", map[string]any{"rotation_period": "720h"}))
			h.must(h.write("config/rotate", map[string]any{"force": true})) // so that the key expires
			id := h.adminKeyID()
			staging := copyOf(h)
			staging.must(staging.write("config/rotate", nil))
			unused := staging.adminKeyID()
			staging.must(staging.write("config/rotate", nil))
			together(10*time.Minute, h, staging)
			h.lease("creds/app", nil)
			h.sim.ResetRequests()
			said := staging.ended(what)
			require.Equal(t, 2, h.sim.Count(http.MethodGet, adminKeyRoute), "one read of each")
			require.Contains(t, said, "Superseded admin key "+id+" remains at OpenAI: OpenAI reports that it was last used at")
			require.Contains(t, said, "It expires at "+h.config()["admin_api_key_expires_at"].(string))
			h.lease("creds/app", nil)
			require.NotContains(t, h.adminKeyIDs(), unused, "no other Vault uses it")
		})
	}
}

func TestSuperseded_DisableDeletesKeysWithUnknownUse(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"disable", "delete"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := replaced(t)
			old := h.adminKeyID()
			h.must(h.write("config/rotate", nil))
			h.advance(4 * time.Minute)
			h.sim.SetAdminKeyUsed(old, h.sim.Now())
			h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: adminKeyRoute, Status: http.StatusForbidden})
			h.ended(what)
			require.NotContains(t, h.adminKeyIDs(), old)
		})
	}
}

// A requested deletion also applies when the mount ends.
func TestSuperseded_DisableDeletesAKeyWithForcedDeletion(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"disable", "delete"} {
		h := replaced(t)
		stolen, id := h.adminKeyValue(), h.adminKeyID()
		cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: "/organization/admin_api_keys/" + id, Status: http.StatusForbidden})
		h.must(h.write("config/rotate", map[string]any{"force": true}))
		h.steals(stolen, 5*time.Minute)
		cancel()
		h.ended(what)
		require.Equal(t, http.StatusUnauthorized, h.callWith(stolen))
	}
}

func TestSuperseded_DisableFindsTheCurrentKeyOrLogsRetainedKeys(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"disable", "delete"} {
		for _, found := range []bool{true, false} {
			h := replaced(t)
			made := h.adminKeyID()
			_, own := h.sim.AddAdminKey("own")
			h.must(h.write("config", map[string]any{"admin_api_key": own, "force": true, "skip_verify": true, "rotation_grace_period": 0}))
			if !found {
				h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/admin_api_keys", Status: http.StatusForbidden})
			}
			said := h.ended(what)
			if found {
				require.NotContains(t, h.adminKeyIDs(), made)
			} else {
				require.Contains(t, h.adminKeyIDs(), made)
				require.Contains(t, said, "Superseded admin key "+made+" remains at OpenAI: the ID of the current admin key is unknown")
			}
		}
	}
}

func TestRotate_FailedForceExplainsHowToDeleteSupersededKeys(t *testing.T) {
	t.Parallel()
	h := replaced(t)
	stolen := h.adminKeyValue()
	h.must(h.write("config/rotate", nil))
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: http.StatusBadRequest})
	require.Contains(t, h.refused(h.write("config/rotate", map[string]any{"force": true})), "write rotation_grace_period=0")
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	require.Equal(t, http.StatusUnauthorized, h.callWith(stolen))
}
