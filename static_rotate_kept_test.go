package openaisecrets

// Superseded keys of static roles that are still used, possibly by a Vault that was
// restored from a snapshot of this one, or from which this one was restored.

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// monthly is a mount with a monthly static role, and its superseded key.
func monthly(t *testing.T) (h *harness, superseded fields) {
	t.Helper()
	h = withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "720h"})
	superseded = h.staticCreds("batch")
	h.must(h.write("rotate-role/batch", nil))
	return h, superseded
}

func TestStaticKept_AUsedKeyIsKeptForAWeek(t *testing.T) {
	t.Parallel()
	h, old := monthly(t)
	key := old["api_key"].(string)
	said := func() int { return len(lines(h.log.String(), "superseded key retained")) }
	h.advance(defaultRevocationDelay)
	require.True(t, h.accepted(key))
	h.sim.ResetRequests()
	for range 5 {
		h.runStaticWorker()
	}
	require.Equal(t, 1, h.reads(), "its use is read once")
	require.Equal(t, 1, said())
	require.InDelta(t, 1, h.measured().one(t, "static_keys_superseded"), 0)
	require.Zero(t, h.measured().one(t, "static_role_lag_seconds"), "a retained key is not overdue")
	resp := h.must(h.read("static-roles/batch"))
	require.Equal(t, []any{1, 1}, []any{resp.Data["superseded_keys"], resp.Data["retained_keys"]})
	require.Len(t, resp.Warnings, 1)
	require.Contains(t, resp.Warnings[0], old["api_key_id"].(string)+" was used at ")
	until := h.staticTime("batch", "last_vault_rotation").Add(maxKept)
	about(t, until, h.staticCreds("batch")["previous_api_key_expires_at"])

	h.restartStatic()
	h.runStaticWorker()
	require.Equal(t, 1, said(), "a restart does not log it again")
	for day := range 6 {
		h.advance(24*time.Hour + time.Second)
		h.runStaticWorker()
		h.runStaticWorker()
		require.Equal(t, day+2, said(), "logged once a day")
		require.True(t, h.accepted(key))
	}
	h.until(until)
	h.runStaticWorker()
	require.False(t, h.accepted(key))
	require.Zero(t, h.measured().one(t, "static_keys_superseded"))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticKept_AnUnusedKeyIsDeletedAfterOneRead(t *testing.T) {
	t.Parallel()
	for name, use := range map[string]func(h *harness, key string){
		"never used":          func(*harness, string) {},
		"used in the overlap": func(h *harness, key string) { h.accepted(key); h.advance(defaultRevocationDelay - 2*time.Minute) },
		"last_used_at is absent": func(h *harness, key string) {
			id := h.storedStatic("batch").Superseded[0].ID
			h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKey, Kind: openaitest.FaultGarbageBefore, Body: fmt.Sprintf(`{"object":"organization.project.api_key","id":%q,"name":"x","created_at":1,"redacted_value":"sk-…x","owner":{"type":"service_account"}}`, id)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, old := monthly(t)
			h.sim.ResetRequests()
			use(h, old["api_key"].(string))
			h.until(h.storedStatic("batch").Superseded[0].DeleteAfter)
			h.runStaticWorker()
			require.NotContains(t, h.liveKeys(), old["api_key_id"])
			require.Equal(t, 1, h.reads())
			require.Equal(t, 0, h.staticRole("batch")["superseded_keys"])
			h.deleteStaticRole("batch")
		})
	}
}

// A stolen key may be used constantly.
func TestStaticKept_OperatorSettingsDeleteUsedKeys(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		kept bool
		end  func(h *harness)
	}{
		"force, in the overlap":               {false, func(h *harness) { h.must(h.write("rotate-role/batch", fields{"force": true})) }},
		"force, a retained key":               {true, func(h *harness) { h.must(h.write("rotate-role/batch", fields{"force": true})) }},
		"no revocation_delay, in the overlap": {false, func(h *harness) { h.must(h.write("static-roles/batch", fields{"revocation_delay": 0})) }},
		"no revocation_delay, a retained key": {true, func(h *harness) { h.must(h.write("static-roles/batch", fields{"revocation_delay": 0})) }},
		"a shorter delay, a retained key":     {true, func(h *harness) { h.must(h.write("static-roles/batch", fields{"revocation_delay": "5m"})) }},
		"a shorter delay, at its end": {false, func(h *harness) {
			h.must(h.write("static-roles/batch", fields{"revocation_delay": "2m"}))
			h.advance(2 * time.Minute)
		}},
		"a shorter delay that has passed": {false, func(h *harness) {
			h.advance(3 * time.Minute)
			h.must(h.write("static-roles/batch", fields{"revocation_delay": "2m"}))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, old := monthly(t)
			key := old["api_key"].(string)
			if test.kept {
				h.advance(defaultRevocationDelay)
				require.True(t, h.accepted(key))
				h.runStaticWorker()
				require.Equal(t, 1, h.staticRole("batch")["retained_keys"])
			}
			h.sim.ResetRequests()
			test.end(h)
			require.Zero(t, h.reads(), "the request does not read the use")
			h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKey, Status: http.StatusInternalServerError})
			if test.kept || h.storedStatic("batch").Superseded != nil {
				h.accepted(key) // another use
				h.runStaticWorker()
			}
			require.False(t, h.accepted(key))
			h.sim.ClearFaults()
			h.advance(time.Hour)
			h.runStaticWorker()
			h.onlyStatic()
			h.deleteStaticRole("batch")
		})
	}
}

func TestStaticKept_ForceReportsAndRetriesFailedDeletions(t *testing.T) {
	t.Parallel()
	h, old := monthly(t)
	heal := h.sim.Fail(openaitest.Fault{Route: routeKey, Status: http.StatusForbidden})
	resp := h.must(h.write("rotate-role/batch", fields{"force": true}))
	require.Contains(t, resp.Warnings[0], "could not be deleted")
	heal()
	h.advance(firstRetry)
	require.True(t, h.accepted(old["api_key"].(string)))
	h.runStaticWorker()
	require.False(t, h.accepted(old["api_key"].(string)))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// A key whose use cannot be read is kept, but no longer than a used key.
func TestStaticKept_AnUnreadableKeyIsKeptForAtMostAWeek(t *testing.T) {
	t.Parallel()
	h, old := monthly(t)
	heal := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKey, Status: http.StatusForbidden})
	defer heal()
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	require.Contains(t, h.liveKeys(), old["api_key_id"])
	h.advance(maxKept - defaultRevocationDelay)
	h.runStaticWorker()
	require.NotContains(t, h.liveKeys(), old["api_key_id"])
	h.deleteStaticRole("batch")
}

// Kept keys must not fill the list of superseded keys, which would block rotation.
func TestStaticKept_KeptKeysDoNotBlockRotation(t *testing.T) {
	t.Parallel()
	h, _ := monthly(t)
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	r := h.storedStatic("batch")
	for i := range maxSuperseded {
		r.Superseded = append(r.Superseded, staticKey{
			ID: fmt.Sprint("key_", i), ExpiresAt: r.Current.ExpiresAt, DeleteAfter: r.LastRotated.Add(defaultRevocationDelay),
			SupersededAt: r.LastRotated, KeptAt: h.now().UTC().Truncate(time.Second), LastUsedAt: h.now().UTC().Truncate(time.Second),
		})
	}
	require.NoError(t, putStaticRole(t.Context(), h.storage, "batch", r))
	require.Contains(t, h.refused(h.write("rotate-role/batch", nil)), "so the key cannot be rotated")
	h.must(h.write("rotate-role/batch", fields{"force": true}))
	for h.staticRole("batch")["superseded_keys"] != 0 { // a slow machine needs several runs
		h.advance(firstRetry)
		h.runStaticWorker()
	}
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// Staging is restored from a snapshot of production, and both continue.
func TestStaticKept_ARestoredCopyKeepsTheOriginalsKey(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	staging := h.copied()
	key := h.staticCreds("batch")["api_key"].(string)
	staging.must(staging.write("rotate-role/batch", nil))
	for range 10 { // production uses its key until it rotates it
		h.advance(2 * time.Minute)
		staging.setClock(h.offset)
		require.True(t, h.accepted(key))
		staging.runStaticWorker()
	}
	require.Equal(t, 1, staging.staticRole("batch")["retained_keys"])
	require.Len(t, lines(staging.log.String(), "possibly by another Vault"), 1)
	h.advance(24 * time.Hour)
	h.runStaticWorker()
	require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
	h.sim.KeepAll()
}

// last_used_at is by OpenAI's clock, and the end of the overlap by this server's.
func TestStaticKept_ARestoredCopyWithAClockAheadKeepsTheOriginalsKey(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{90 * time.Second, 3 * time.Minute, 40 * 24 * time.Hour} {
		t.Run(ahead.String(), func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.sim.KeepAll()
			h.static("batch", fields{"rotation_period": "1440h"})
			staging := h.copied()
			key := h.staticCreds("batch")["api_key"].(string)
			staging.setClock(ahead)
			staging.must(staging.write("rotate-role/batch", nil))
			for range 20 {
				h.advance(30 * time.Second)
				staging.setClock(h.offset + ahead)
				require.True(t, h.accepted(key), "after %s", h.offset)
				staging.runStaticWorker()
			}
			require.Equal(t, 1, staging.staticRole("batch")["retained_keys"])
		})
	}
}

func TestStaticKept_ARestoredCopyWithAClockBehindKeepsTheOriginalsKey(t *testing.T) {
	t.Parallel()
	for _, behind := range []time.Duration{90 * time.Second, 9 * time.Minute, time.Hour} {
		t.Run(behind.String(), func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.sim.KeepAll()
			h.static("batch", nil)
			staging := h.copied()
			key := h.staticCreds("batch")["api_key"].(string)
			staging.setClock(-behind)
			staging.must(staging.write("rotate-role/batch", nil))
			for range 20 { // the clock is correct from now on
				h.advance(30 * time.Second)
				staging.setClock(h.offset)
				require.True(t, h.accepted(key), "after %s", h.offset)
				staging.runStaticWorker()
			}
			require.Equal(t, 1, staging.staticRole("batch")["retained_keys"])
		})
	}
}

func TestStaticKept_AClockBehindDoesNotKeepUnusedKeys(t *testing.T) {
	t.Parallel()
	for _, behind := range []time.Duration{10 * time.Second, time.Minute} {
		for _, use := range []string{"never used", "used in the overlap"} {
			t.Run(use+", behind by "+behind.String(), func(t *testing.T) {
				t.Parallel()
				h := withStatic(t, openaitest.Options{})
				h.setClock(-behind)
				h.static("batch", fields{"revocation_delay": "2m"})
				old := h.staticCreds("batch")["api_key"].(string)
				h.must(h.write("rotate-role/batch", nil))
				if use != "never used" {
					h.advance(30 * time.Second)
					require.True(t, h.accepted(old))
				}
				h.until(h.storedStatic("batch").Superseded[0].DeleteAfter)
				h.runStaticWorker()
				require.Equal(t, 0, h.staticRole("batch")["retained_keys"])
				if use != "never used" { // the clock may be correct by now
					for _, k := range h.storedStatic("batch").Superseded {
						require.WithinDuration(t, h.now().Add(behind), k.DeleteAfter, requestBudget)
						h.until(k.DeleteAfter)
					}
					h.runStaticWorker()
				}
				require.False(t, h.accepted(old))
				h.deleteStaticRole("batch")
			})
		}
	}
}

// OpenAI may round last_used_at.
func TestStaticKept_AUseWithinTheMarginCountsAsAfterTheEnd(t *testing.T) {
	t.Parallel()
	for before, kept := range map[time.Duration]bool{50 * time.Second: true, 70 * time.Second: false} {
		t.Run(before.String(), func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.static("batch", fields{"revocation_delay": "1h"})
			key := h.staticCreds("batch")["api_key"].(string)
			h.must(h.write("rotate-role/batch", nil))
			end := h.storedStatic("batch").Superseded[0].DeleteAfter
			h.until(end.Add(-before))
			require.True(t, h.accepted(key))
			h.until(end)
			h.runStaticWorker()
			require.Equal(t, kept, h.accepted(key))
			h.deleteStaticRole("batch")
		})
	}
	for before, used := range map[time.Duration]bool{time.Second: true, 2 * time.Second: false} { // the margin is a sixth of the overlap
		at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
		k := staticKey{SupersededAt: at, DeleteAfter: at.Add(9 * time.Second)}
		require.Equal(t, used, k.usedAfterEnd(k.DeleteAfter.Add(-before), time.Hour))
	}
}

// During a slow activation, readers have only the old key.
func TestStaticKept_TheOverlapStartsAfterTheActivation(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	m := &issued{began: at.Add(900 * time.Millisecond), key: client.Key{CreatedAt: at.Add(time.Hour)}}
	require.Equal(t, at.Add(time.Hour), m.supersedes(at.Add(1800*time.Millisecond)), "fractions of a second are dropped")
	m.began = at
	require.Equal(t, at.Add(time.Hour+30*time.Second), m.supersedes(at.Add(30*time.Second)))
	require.Equal(t, at.Add(time.Hour), m.supersedes(at.Add(-time.Hour)), "a clock that was set back")
	require.Equal(t, at.Add(time.Hour+requestBudget), m.supersedes(at.Add(24*time.Hour)), "a clock that was set ahead")
	m.key.CreatedAt = time.Time{}
	require.Zero(t, m.supersedes(at))
}
