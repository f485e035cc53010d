package openaisecrets

// A static role with a system clock that is wrong and then corrected.

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestStaticClock_AheadAtARotationAndCorrected(t *testing.T) {
	t.Parallel()
	for name, ahead := range map[string]time.Duration{"by 40 days": 40 * 24 * time.Hour, "by an hour": time.Hour} {
		for _, restart := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ", with a restart"}[restart], func(t *testing.T) {
				t.Parallel()
				h := withStatic(t, openaitest.Options{})
				h.static("batch", nil)
				first := h.staticCreds("batch")
				h.runStaticWorker()
				h.setClock(ahead)
				if ahead < 24*time.Hour {
					h.must(h.write("rotate-role/batch", nil))
				}
				h.runStaticWorker()
				require.NotEqual(t, first["api_key_id"], h.keyOf("batch"))
				h.setClock(0)
				if restart {
					h.restartStatic()
				}
				// Reads are correct immediately, and storage after the next run.
				about(t, h.now(), h.staticRole("batch")["last_vault_rotation"])
				h.runStaticWorker()
				for range 3 { // one log line
					h.runStaticWorker()
				}
				require.Len(t, lines(h.log.String(), "the system clock was wrong"), 1)
				r := h.storedStatic("batch")
				for what, at := range map[string]time.Time{"rotation": r.LastRotated, "creation": r.Current.CreatedAt, "supersession": r.Superseded[0].SupersededAt} {
					require.WithinDuration(t, h.now(), at, 5*time.Minute, what)
				}
				about(t, h.now().Add(24*time.Hour), h.staticRole("batch")["next_vault_rotation"])
				about(t, h.sim.Now().Add(7*24*time.Hour), h.staticRole("batch")["api_key_expires_at"])
				require.True(t, h.accepted(first["api_key"].(string)), "readers have the whole overlap")
				about(t, h.now().Add(defaultRevocationDelay), h.staticCreds("batch")["previous_api_key_expires_at"])
				h.advance(defaultRevocationDelay + time.Second)
				h.runStaticWorker()
				require.False(t, h.accepted(first["api_key"].(string)))
				for range 10 {
					h.advance(24 * time.Hour)
					h.runStaticWorker()
					h.onlyStatic()
					require.True(t, h.staticTime("batch", "last_vault_rotation").After(h.now().Add(-time.Hour)), "it rotates daily")
				}
				h.deleteStaticRole("batch")
			})
		}
	}
}

// If an older entry lacks the key's expiry at OpenAI, the key is replaced immediately.
func TestStaticClock_AnOlderEntrysKeyIsRotated(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	id := h.keyOf("batch")
	r := h.storedStatic("batch")
	r.LastRotated, r.NextRotation = h.now().Add(40*24*time.Hour), h.now().Add(41*24*time.Hour)
	r.Current.ExpiresAt = h.now().Add(47 * 24 * time.Hour)
	r.Current.CreatedAt, r.Current.OpenAICreatedAt, r.Current.OpenAIExpiresAt, r.AccountCreatedAt = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	require.NoError(t, putStaticRole(t.Context(), h.storage, "batch", r))
	h.restartStatic()
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))
	about(t, h.now().Add(24*time.Hour), h.staticRole("batch")["next_vault_rotation"])
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticClock_BehindAtARotationAndCorrected(t *testing.T) {
	t.Parallel()
	for name, behind := range map[string]time.Duration{"by 40 days": 40 * 24 * time.Hour, "by an hour": time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.setClock(-behind)
			h.static("batch", nil)
			first := h.staticCreds("batch")
			h.must(h.write("rotate-role/batch", nil))
			h.setClock(0)
			h.runStaticWorker()
			h.runStaticWorker()
			require.True(t, h.accepted(first["api_key"].(string)), "readers have the whole overlap")
			require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
			h.advance(defaultRevocationDelay + time.Second)
			h.runStaticWorker()
			require.False(t, h.accepted(first["api_key"].(string)))
			for range 10 {
				h.advance(24 * time.Hour)
				h.runStaticWorker()
				require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
				require.True(t, h.staticTime("batch", "last_vault_rotation").After(h.now().Add(-25*time.Hour)))
			}
			h.advance(defaultRevocationDelay)
			h.runStaticWorker()
			h.onlyStatic()
			h.deleteStaticRole("batch")
		})
	}
}

// A clock that was behind may be slightly behind OpenAI's even after its correction, and
// the times of the rotation are rounded.
func TestStaticClock_SlightlyBehindAfterTheCorrection(t *testing.T) {
	t.Parallel()
	for _, still := range []time.Duration{time.Second, clockSlack - 2*time.Second} {
		t.Run(still.String(), func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.setClock(-time.Hour)
			h.static("batch", nil)
			old := h.staticCreds("batch")["api_key"].(string)
			h.must(h.write("rotate-role/batch", nil))
			h.setClock(-still)
			h.runStaticWorker()
			require.True(t, h.accepted(old), "readers have the whole overlap")
			h.advance(defaultRevocationDelay + clockSlack)
			h.runStaticWorker()
			require.False(t, h.accepted(old))
			h.deleteStaticRole("batch")
		})
	}
}

// Long after a clock was ahead, no stored time is in the future, but the expiry of the
// key is too late.
func TestStaticClock_TheExpiryAtOpenAIBoundsTheNextRotation(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.setClock(time.Hour)
	h.static("batch", fields{"rotation_period": "24h", "key_ttl": "24h12m"})
	h.sim.Advance(2 * time.Hour)
	h.setClock(2 * time.Hour) // corrected, two hours later
	end := h.storedStatic("batch").Current.OpenAIExpiresAt
	require.True(t, h.staticTime("batch", "next_vault_rotation").Before(end.Add(-defaultRevocationDelay)))
	h.deleteStaticRole("batch")
}

// A clock that is permanently ahead does not cause constant rotation.
func TestStaticClock_PermanentlyWrongRotatesOnSchedule(t *testing.T) {
	t.Parallel()
	for name, ahead := range map[string]time.Duration{"ahead": 40 * 24 * time.Hour, "behind": -40 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.setClock(ahead)
			h.static("batch", nil)
			for range 3 {
				h.runStaticWorker()
				id := h.keyOf("batch")
				h.runStaticWorker()
				require.Equal(t, id, h.keyOf("batch"))
				h.advance(23 * time.Hour)
				h.runStaticWorker()
				require.Equal(t, id, h.keyOf("batch"))
				h.advance(time.Hour + time.Second)
				h.runStaticWorker()
				require.NotEqual(t, id, h.keyOf("batch"))
			}
			h.advance(defaultRevocationDelay)
			h.runStaticWorker()
			h.onlyStatic()
			h.deleteStaticRole("batch")
		})
	}
}

// A correction of the clock long after the rotation does not extend the old key.
func TestStaticClock_CorrectsTheTimeOfASupersession(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.setClock(time.Hour)
	h.static("batch", nil)
	old := h.staticCreds("batch")["api_key"].(string)
	h.must(h.write("rotate-role/batch", nil))
	h.sim.Advance(defaultRevocationDelay + time.Minute)
	h.setClock(defaultRevocationDelay + time.Minute)
	h.runStaticWorker()
	require.False(t, h.accepted(old))
	h.deleteStaticRole("batch")
}

// Work that was postponed under a clock that was ahead is due once the clock is
// corrected.
func TestStaticClock_FailuresWhileAheadDoNotPostpone(t *testing.T) {
	t.Parallel()
	s, now := newStaticState(), time.Now()
	s.due = map[string]nextWork{}
	s.due["a"] = nextWork{rotate: now.Add(-time.Minute), deadline: now.Add(time.Hour)}
	s.due["b"] = nextWork{rotate: now.Add(-time.Minute), deadline: now.Add(time.Hour)}
	s.failed("a", now, longestRetry)
	s.notRead("b", now)
	names, _ := s.nextDue(now, 2)
	require.Empty(t, names)
	s.failed("a", now.Add(5*time.Hour), longestRetry)
	s.notRead("b", now.Add(5*time.Hour))
	names, _ = s.nextDue(now, 2)
	require.ElementsMatch(t, []string{"a", "b"}, names)
}
