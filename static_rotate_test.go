package openaisecrets

// The rotation of a static role's key: its schedule, the new key, and the deletion of the
// old one; a fault at any step loses no key and leaves none behind.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestStaticRotation_ByPeriod(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	first := h.keyOf("batch")
	for range 3 {
		h.advance(7 * time.Hour)
		h.runStaticWorker()
	}
	require.Equal(t, first, h.keyOf("batch"), "not yet")
	next := h.staticTime("batch", "next_vault_rotation")
	h.must(h.write("static-roles/batch", fields{"rotation_period": "24h", "activation_timeout": 9}))
	require.Equal(t, next, h.staticTime("batch", "next_vault_rotation"), "an unchanged write does not postpone the rotation")
	h.restartStatic()
	require.Equal(t, next, h.staticTime("batch", "next_vault_rotation"), "a new process does not postpone the rotation")

	for range 3 {
		h.until(h.staticTime("batch", "next_vault_rotation").Add(10 * time.Second))
		before := h.keyOf("batch")
		h.runStaticWorker()
		h.runStaticWorker()
		require.NotEqual(t, before, h.keyOf("batch"))
		require.WithinDuration(t, h.now(), h.staticTime("batch", "last_vault_rotation"), time.Minute)
		require.Equal(t, 24*time.Hour, h.staticTime("batch", "next_vault_rotation").Sub(h.staticTime("batch", "last_vault_rotation")))
		require.Equal(t, 1, h.staticRole("batch")["superseded_keys"])
		h.onlyStatic()
	}
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	require.Zero(t, h.staticRole("batch")["superseded_keys"])

	// A shorter period counts from the last rotation, and may have passed already.
	before := h.keyOf("batch")
	h.must(h.write("static-roles/batch", fields{"rotation_period": "6m"}))
	h.runStaticWorker()
	require.NotEqual(t, before, h.keyOf("batch"))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticRotation_ByCronWithinItsWindow(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_schedule": "0 2 * * *", "rotation_window": "2h"})
	next := func() time.Time { return h.staticTime("batch", "next_vault_rotation") }
	due, id := next(), h.keyOf("batch")
	h.until(due.Add(-time.Minute))
	h.runStaticWorker()
	require.Equal(t, id, h.keyOf("batch"), "not yet")
	h.until(due.Add(time.Minute))
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))
	require.Equal(t, due.Add(24*time.Hour), next())

	id, due = h.keyOf("batch"), next()
	h.until(due.Add(time.Hour + 59*time.Minute)) // Vault was down
	h.restartStatic()
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"), "the missed rotation runs within its window")

	id, due = h.keyOf("batch"), next()
	h.until(due.Add(2*time.Hour + time.Minute))
	h.restartStatic()
	h.runStaticWorker()
	require.Equal(t, id, h.keyOf("batch"), "its window has passed")
	require.Equal(t, due.Add(24*time.Hour), next())
	h.must(h.write("static-roles/batch", fields{"rotation_schedule": "0 2 * * *", "rotation_window": "3h"}))
	require.Equal(t, due, next(), "a longer window makes the rotation due again")
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))

	id, due = h.keyOf("batch"), next()
	h.until(due.Add(3*24*time.Hour + time.Hour)) // Vault was down for days
	h.restartStatic()
	require.Equal(t, due.Add(3*24*time.Hour), next(), "today's window is open")
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))
	require.Equal(t, due.Add(4*24*time.Hour), next())
	h.must(h.write("static-roles/batch", fields{"rotation_schedule": "30 3 * * *"}))
	require.Equal(t, "03:30:00", next().UTC().Format(time.TimeOnly))
	require.True(t, next().After(h.now()), "a new schedule starts with its next time")
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// A run rotates roles on time that become due while it waits.
func TestStaticRotation_ARunWaitsForDueRoles(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.static("batch", fields{"rotation_period": "10s", "revocation_delay": 0}) // starts a run
		first := h.keyOf("batch")
		h.must(h.write("static-roles/late", fields{"project_id": h.project, "rotation_period": "11s", "revocation_delay": 5}))
		late := h.keyOf("late")
		time.Sleep(15 * time.Second)
		require.NotEqual(t, first, h.keyOf("batch"))
		require.NotEqual(t, late, h.keyOf("late"))
		for _, name := range []string{"batch", "late"} {
			r, err := getStaticRole(context.Background(), h.storage, name)
			require.NoError(t, err)
			require.WithinDuration(t, r.NextRotation.Add(-r.RotationPeriod), r.LastRotated, time.Second)
		}
		require.NoError(t, h.b.static.worker.End(context.Background()))
		h.holdStatic()
		h.deleteStaticRole("late")
		h.deleteStaticRole("batch")
	})
}

func TestStaticRotation_OnRequest(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	var keys []string // IDs, since a use would retain a key
	for range 4 {     // all within revocation_delay
		old := h.staticCreds("batch")
		keys = append(keys, old["api_key_id"].(string))
		h.advance(time.Minute)
		resp := h.must(h.write("rotate-role/batch", nil))
		require.Equal(t, fields{"api_key_id": h.keyOf("batch"), "last_vault_rotation": h.staticRole("batch")["last_vault_rotation"]}, resp.Data)
		require.Empty(t, resp.Warnings)
		require.NotEqual(t, old["api_key_id"], resp.Data["api_key_id"])
		about(t, h.now().Add(defaultRevocationDelay), h.staticCreds("batch")["previous_api_key_expires_at"])
		require.Equal(t, 24*time.Hour, h.staticTime("batch", "next_vault_rotation").Sub(h.staticTime("batch", "last_vault_rotation")), "the period counts from now")
	}
	for i := range keys { // each is deleted at its own time
		require.Equal(t, len(keys)-i, h.staticRole("batch")["superseded_keys"])
		h.onlyStatic()
		h.advance(2*time.Minute + 2*time.Second)
		if i > 0 {
			h.advance(-time.Minute)
		} else {
			h.advance(time.Minute)
		}
		require.Subset(t, h.liveKeys(), keys[i:])
		h.runStaticWorker()
		require.NotContains(t, h.liveKeys(), keys[i], "key %d", i)
	}
	require.Contains(t, h.refused(h.write("rotate-role/batch", fields{"forced": true})), "unknown field")
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticRotation_WithoutADelayTheOldKeyIsDeletedImmediately(t *testing.T) {
	t.Parallel()
	for _, refusing := range []bool{false, true} {
		t.Run(fmt.Sprintf("deleting keys is refused: %t", refusing), func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{DeleteServiceAccountKeyRefused: refusing})
			h.static("batch", fields{"revocation_delay": 0})
			old := h.staticCreds("batch")
			require.Empty(t, h.must(h.write("rotate-role/batch", nil)).Warnings)
			if refusing { // the keys expire instead
				h.advance(2 * time.Second)
			}
			require.False(t, h.accepted(old["api_key"].(string)))
			require.NotContains(t, h.staticCreds("batch"), "previous_api_key_expires_at")
			h.onlyStatic()

			cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusUnauthorized})
			old = h.staticCreds("batch")
			resp := h.must(h.write("rotate-role/batch", nil))
			require.Contains(t, resp.Warnings[0], "could not be deleted")
			require.NotEqual(t, old["api_key_id"], resp.Data["api_key_id"])
			require.Equal(t, 1, h.staticRole("batch")["superseded_keys"])
			h.runStaticWorker()
			require.Equal(t, 1, h.staticRole("batch")["superseded_keys"])
			require.Contains(t, h.log.String(), "superseded key not deleted")
			cancel()
			h.advance(2 * time.Minute)
			h.runStaticWorker()
			h.advance(2 * time.Second)
			require.False(t, h.accepted(old["api_key"].(string)))
			require.Zero(t, h.staticRole("batch")["superseded_keys"])
			h.onlyStatic()
			h.deleteStaticRole("batch")
		})
	}
}

// In a synctest bubble, so that a probe is answered within its second on a busy machine.
func TestStaticRotation_ANewKeyIsActiveOnceOpenAIAcceptsIt(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{ActivationDelay: 1500 * time.Millisecond}, func(t *testing.T, h *harness) {
		h.holdStatic()
		h.configure(nil)
		h.static("batch", fields{"revocation_delay": 0})
		old := h.staticCreds("batch")
		require.True(t, h.accepted(old["api_key"].(string)), "it works at its first read")
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.must(h.write("rotate-role/batch", nil))
		}()
		for rotating := true; rotating; {
			select {
			case <-done:
				rotating = false
			case <-time.After(20 * time.Millisecond):
			}
			before := h.keyOf("batch") // a consistent snapshot: two reads agree
			key := h.staticCreds("batch")["api_key"].(string)
			works := h.accepted(key)
			if before == h.keyOf("batch") {
				require.True(t, works, "a returned key works")
			}
		}
		require.NotEqual(t, old["api_key_id"], h.keyOf("batch"))

		// A key that is never accepted is destroyed, and the old one stays active.
		h.sim.Configure(func(o *openaitest.Options) { o.ActivationDelay = 10 * time.Minute })
		h.must(h.write("static-roles/batch", fields{"activation_timeout": 1}))
		before := h.staticRole("batch")
		_, err := h.write("rotate-role/batch", nil)
		require.ErrorContains(t, err, `static role "batch" not rotated; its key stays active: OpenAI did not accept the new key within 1s`)
		var coded logical.HTTPCodedError
		require.ErrorAs(t, err, &coded)
		require.Equal(t, http.StatusBadGateway, coded.Code())
		require.Equal(t, before, h.staticRole("batch"))
		h.onlyStatic()
		h.until(h.staticTime("batch", "next_vault_rotation"))
		h.runStaticWorker()
		require.Contains(t, h.staticRole("batch")["last_rotation_error"], "did not accept the new key")
		require.NotEmpty(t, h.staticRole("batch")["next_rotation_retry"])
		h.onlyStatic()

		_, err = h.write("static-roles/new", fields{"project_id": h.project, "rotation_period": "24h", "activation_timeout": 1})
		require.ErrorContains(t, err, `static role "new" not stored: OpenAI did not accept the new key`)
		h.onlyStatic()
		h.must(h.write("static-roles/batch", fields{"activation_timeout": 0}))
		h.must(h.write("rotate-role/batch", nil))
		require.False(t, h.accepted(h.staticCreds("batch")["api_key"].(string)), "activation_timeout=0 skips the probe")
		h.advance(10 * time.Minute)
		h.onlyStatic()
		h.deleteStaticRole("batch")
	})
}

func TestStaticRotation_TheKeysExpiryForcesARotation(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"key_ttl": "25h", "revocation_delay": "30m"})
	ends := func() time.Time { return h.staticTime("batch", "api_key_expires_at") }
	require.WithinDuration(t, h.now().Add(25*time.Hour), ends(), time.Minute)
	require.WithinDuration(t, h.now().Add(24*time.Hour), h.staticTime("batch", "next_vault_rotation"), time.Minute)

	// The new period is longer than the lifetime of the existing key.
	h.must(h.write("static-roles/batch", fields{"key_ttl": "1000h", "rotation_period": "500h"}))
	by := ends().Add(-30*time.Minute - staticLead)
	require.Equal(t, by, h.staticTime("batch", "next_vault_rotation"))
	id := h.keyOf("batch")
	h.until(by.Add(-time.Minute))
	require.InDelta(t, 60, h.staticCreds("batch")["ttl"], 30)
	h.runStaticWorker()
	require.Equal(t, id, h.keyOf("batch"))
	h.until(by.Add(time.Second))
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))
	require.WithinDuration(t, h.now().Add(1000*time.Hour), ends(), time.Minute)
	require.Equal(t, 500*time.Hour, h.staticTime("batch", "next_vault_rotation").Sub(h.staticTime("batch", "last_vault_rotation")))
	h.advance(30 * time.Minute)
	h.runStaticWorker()
	h.onlyStatic()

	// Without key_ttl, the default covers three rotations.
	h.must(h.write("static-roles/batch", fields{"key_ttl": 0}))
	h.must(h.write("rotate-role/batch", nil))
	require.WithinDuration(t, h.now().Add(1500*time.Hour+30*time.Minute), ends(), time.Minute)
	h.advance(30 * time.Minute)
	h.runStaticWorker()
	h.deleteStaticRole("batch")
}

func TestStaticRotation_FailuresBackOffAndAreReported(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.until(h.staticTime("batch", "next_vault_rotation"))
	id := h.keyOf("batch")
	tries := func() int { return h.sim.Count(http.MethodPost, routeNewKey) }
	h.sim.ResetRequests()
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Status: 403, Message: "keys are frozen"})
	var gaps []int
	since := 0
	for range 8 * 60 { // eight hours of ticks
		before := tries()
		h.runStaticWorker()
		if since++; tries() > before {
			gaps, since = append(gaps, since), 0
			retry := h.staticTime("batch", "next_rotation_retry")
			require.True(t, retry.After(h.now()) && retry.Before(h.now().Add(time.Hour+time.Second)))
		}
		h.advance(time.Minute)
	}
	require.Greater(t, len(gaps), 10)
	require.Less(t, len(gaps), 30)
	require.LessOrEqual(t, gaps[1], 2, "the first retry comes at the next tick")
	for _, gap := range gaps[len(gaps)-4:] {
		require.GreaterOrEqual(t, gap, 30)
		require.LessOrEqual(t, gap, 61)
	}
	require.Contains(t, h.staticRole("batch")["last_rotation_error"], "keys are frozen")
	require.Contains(t, h.log.String(), "static role not rotated; its key stays active")
	require.Equal(t, id, h.keyOf("batch"))
	require.True(t, h.staticTime("batch", "next_vault_rotation").Before(h.now()), "the rotation is overdue")
	require.Zero(t, h.staticCreds("batch")["ttl"])
	h.onlyStatic()

	h.restartStatic()
	require.Contains(t, h.staticRole("batch")["last_rotation_error"], "keys are frozen")
	require.Empty(t, h.staticRole("batch")["next_rotation_retry"], "a new process retries immediately")
	cancel()
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))
	require.Empty(t, h.staticRole("batch")["last_rotation_error"])

	// A requested rotation clears the error, and its failure is not stored.
	h.until(h.staticTime("batch", "next_vault_rotation"))
	cancel = h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Status: 403, Message: "keys are frozen"})
	_, err := h.write("rotate-role/batch", nil)
	require.ErrorContains(t, err, "keys are frozen")
	require.Empty(t, h.staticRole("batch")["last_rotation_error"])
	h.runStaticWorker()
	require.NotEmpty(t, h.staticRole("batch")["next_rotation_retry"])
	cancel()
	h.must(h.write("rotate-role/batch", nil))
	require.Equal(t, []any{"", nil}, []any{h.staticRole("batch")["last_rotation_error"], h.staticRole("batch")["next_rotation_retry"]})
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

// A role is rotated even if its superseded keys cannot be deleted.
func TestStaticRotation_SupersededKeysAreBounded(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"activation_timeout": 0})
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: routeKey, Status: http.StatusUnauthorized})
	h.advance(25 * time.Hour)
	h.runStaticWorker()
	h.advance(25 * time.Hour)
	h.runStaticWorker()
	require.Equal(t, 2, h.staticRole("batch")["superseded_keys"])
	require.Empty(t, h.staticRole("batch")["last_rotation_error"])
	for range maxSuperseded - 2 {
		h.must(h.write("rotate-role/batch", nil))
	}
	require.Contains(t, h.refused(h.write("rotate-role/batch", nil)), "100 superseded keys are not deleted yet")
	h.advance(25 * time.Hour)
	h.runStaticWorker()
	require.Contains(t, h.staticRole("batch")["last_rotation_error"], "100 superseded keys are not deleted yet")
	h.onlyStatic()
	cancel()
	for range 5 { // on a busy machine, a run's budget ends before the hundredth deletion
		h.advance(time.Hour)
		h.runStaticWorker()
		if h.staticRole("batch")["last_rotation_error"] == "" {
			break
		}
	}
	require.Equal(t, []any{1, ""}, []any{h.staticRole("batch")["superseded_keys"], h.staticRole("batch")["last_rotation_error"]}, "all keys are deleted, and the role is rotated")
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticRotation_ReportsAMissingAccount(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("made", nil)
	account := h.adoptStatic("adopted", nil)
	for name, id := range map[string]string{"made": h.staticRole("made")["service_account_id"].(string), "adopted": account} {
		h.sim.DeleteServiceAccount(h.project, id)
		if name == "made" { // the engine knows the age of the account
			require.Contains(t, h.refused(h.write("rotate-role/made", nil)), "may still appear")
			h.advance(notFinalBefore)
		}
		said := "service account " + id + " no longer exists; delete the static role and create it again"
		require.Contains(t, h.refused(h.write("rotate-role/"+name, nil)), said)
	}
	h.advance(24 * time.Hour)
	h.runStaticWorker()
	for _, name := range []string{"made", "adopted"} {
		require.Contains(t, h.staticRole(name)["last_rotation_error"], "no longer exists")
		require.Nil(t, h.must(h.remove("static-roles/"+name)))
	}
	h.onlyStatic()
	h.static("made", nil)
	h.onlyStatic()
	h.deleteStaticRole("made")
}

func TestStaticRotation_AnArchivedProjectEndsWithTheRole(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("made", nil)
	h.adoptStatic("adopted", nil)
	h.sim.ArchiveProject(h.project)
	for _, name := range []string{"made", "adopted"} {
		require.Contains(t, h.refused(h.write("rotate-role/"+name, nil)), "archived")
		require.Nil(t, h.must(h.remove("static-roles/"+name)))
	}
	require.Empty(t, h.walEntries())
}

func TestStaticRotation_ReportsALifetimePolicy(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{MaxKeyLifetime: 48 * time.Hour})
	account := h.sim.AddServiceAccount(h.project, "by hand")
	for _, id := range []string{"", account} {
		data := fields{"project_id": h.project, "service_account_id": id, "rotation_period": "24h"}
		said := h.refused(h.write("static-roles/batch", data))
		require.Contains(t, said, "reduce key_ttl")
		data["key_ttl"] = "30h"
		h.must(h.write("static-roles/batch", data))
		h.must(h.write("rotate-role/batch", nil))
		h.deleteStaticRole("batch", account)
	}
}

// Only a change of the same role waits for a rotation, and only until its context is
// done.
func TestStaticRotation_DoesNotBlockOtherRoles(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	const roles = 260 // more than a fixed number of locks could serve independently
	for i := range roles {
		h.static(fmt.Sprint("role-", i), fields{"activation_timeout": 0})
	}
	h.must(h.write("static-roles/role-0", fields{"activation_timeout": 45}))
	struck, resume := make(chan struct{}), make(chan struct{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/models", Times: 1, Status: 401, OnStrike: func(*http.Request) { close(struck); <-resume }})
	rotated := make(chan struct{})
	go func() {
		defer close(rotated)
		h.must(h.write("rotate-role/role-0", nil))
	}()
	<-struck
	ctx, leave := context.WithTimeout(context.Background(), 100*time.Millisecond)
	_, err := h.do(ctx, logical.UpdateOperation, "rotate-role/role-0", nil)
	leave()
	require.ErrorContains(t, err, `another change of static role "role-0" is in progress`)
	for i := 1; i < roles; i++ {
		h.must(h.write(fmt.Sprint("static-roles/role-", i), fields{"service_account_description": "changed"}))
	}
	h.staticCreds("role-0")
	close(resume)
	<-rotated
	require.Equal(t, 1, h.staticRole("role-0")["superseded_keys"])
	for i := range roles {
		h.must(h.remove(fmt.Sprint("static-roles/role-", i)))
	}
	h.onlyStatic()
}

func TestStaticRotation_CompletesWhenTheClientDisconnects(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	for at, data := range map[string]fields{"rotate-role/batch": nil, "static-roles/batch": {"scopes": "api.model.read"}, "static-roles/new": {"project_id": h.project, "rotation_period": "24h"}} {
		ctx, leave := context.WithCancel(context.Background())
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: 1, Kind: openaitest.FaultSlow, Delay: 50 * time.Millisecond, OnStrike: func(*http.Request) { leave() }})
		h.must(h.do(ctx, logical.UpdateOperation, at, data))
		h.onlyStatic()
	}
	require.Equal(t, 2, h.staticRole("batch")["superseded_keys"])
	h.must(h.remove("static-roles/new"))
	h.deleteStaticRole("batch")
}

// WAL entries of a deleted role must not affect a new role of the same name.
func TestStaticRotation_EntriesOfADeletedRoleDoNotAffectANewOne(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	for name, test := range map[string]struct {
		data   fields
		others []string
	}{
		"made":    {nil, nil},
		"adopted": {fields{"service_account_id": h.sim.AddServiceAccount(h.project, "by hand")}, nil},
	} {
		h.static(name, test.data)
		h.must(h.write("rotate-role/"+name, nil))
		cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusUnauthorized})
		resp := h.must(h.remove("static-roles/" + name))
		require.Contains(t, resp.Warnings[0], "Queued for deletion at OpenAI in the WAL: ")
		require.Equal(t, map[string]int{"made": 1, "adopted": 2}[name], strings.Count(resp.Warnings[0], "OpenAI error"), "the warning names all that is left: %s", resp.Warnings[0])
		h.static(name, test.data)
		cancel()
		require.NotEmpty(t, h.walEntries())
		h.runPeriodicWork()
		require.Empty(t, h.walEntries())
		require.True(t, h.accepted(h.staticCreds(name)["api_key"].(string)), name)
	}
	h.onlyStatic(h.staticRole("adopted")["service_account_id"].(string))
	others := []string{h.staticRole("adopted")["service_account_id"].(string)}
	h.must(h.remove("static-roles/made"))
	h.deleteStaticRole("adopted", others...)
}

// If a role needs the credential of a WAL entry, only the entry is deleted.
func TestStaticWAL_CredentialsOfARoleAreNotDestroyed(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("made", nil)
	account := h.adoptStatic("adopted", nil)
	for _, name := range []string{"made", "adopted"} {
		h.must(h.write("rotate-role/"+name, nil))
		r, err := getStaticRole(context.Background(), h.storage, name)
		require.NoError(t, err)
		entries := append(r.owned(name), r.credential(name, &r.Current), r.credential(name, &r.Superseded[0]))
		for _, c := range entries { // by ID, and by name as before the create returned
			put := func(c credential, revoked bool) {
				_, err := framework.PutWAL(context.Background(), h.storage, walKind(c, revoked), c)
				require.NoError(t, err)
			}
			put(c, true)
			put(c, false)
			if c.isKey() {
				if c.KeyID = ""; c.KeyName == "" {
					continue // created with its account
				}
			} else {
				c.ID = ""
			}
			put(c, false)
		}
	}
	require.NotEmpty(t, h.walEntries())
	h.runPeriodicWork()
	h.onlyStatic(account)
	h.must(h.remove("static-roles/made"))
	h.deleteStaticRole("adopted", account)
}

// A role that cannot be read may need any credential.
func TestStaticWAL_AnUnreadableRoleKeepsItsEntries(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("made", nil)
	r, err := getStaticRole(context.Background(), h.storage, "made")
	require.NoError(t, err)
	_, err = h.b.recordRevocation(context.Background(), h.storage, r.credential("made", nil))
	require.NoError(t, err)
	entry, err := h.storage.Get(context.Background(), staticStoragePrefix+"made")
	require.NoError(t, err)
	require.NoError(t, h.storage.Put(context.Background(), &logical.StorageEntry{Key: entry.Key, Value: []byte(`{"version":99}`)}))
	h.runPeriodicWork()
	require.Len(t, h.walEntries(), 1)
	require.Len(t, h.liveAccounts(), 1)
	for _, op := range []logical.Operation{logical.ReadOperation, logical.DeleteOperation} {
		_, err = h.do(context.Background(), op, "static-roles/made", nil)
		require.ErrorContains(t, err, "newer version")
	}
	require.NoError(t, h.storage.Put(context.Background(), entry))
	h.runPeriodicWork()
	h.onlyStatic()
	h.deleteStaticRole("made")
}

func TestStaticCreate_EveryFaultLeavesTheStoredRoleOrNothing(t *testing.T) {
	t.Parallel()
	for _, adopt := range []bool{false, true} {
		t.Run(fmt.Sprintf("adopted %t", adopt), func(t *testing.T) {
			t.Parallel()
			others := func(h *harness) (ids []string) {
				for _, a := range h.sim.Accounts() {
					if a.Name == "by hand" {
						ids = append(ids, a.ID)
					}
				}
				return ids
			}
			everyStaticFault(t,
				func(h *harness) {
					if adopt {
						h.sim.AddServiceAccount(h.project, "by hand")
					}
				},
				func(h *harness) (*logical.Response, error) {
					data := fields{"project_id": h.project, "rotation_period": "24h", "scopes": "api.model.read"}
					if adopt {
						data["service_account_id"] = others(h)[0]
					}
					return h.write("static-roles/batch", data)
				},
				func(h *harness, resp *logical.Response, err error) {
					if err == nil && !resp.IsError() {
						id := h.keyOf("batch")
						i := slices.IndexFunc(h.sim.Keys(), func(k openaitest.Key) bool { return k.ID == id })
						require.Equal(h.t, []string{"api.model.read"}, h.sim.Keys()[i].Scopes)
					}
					require.Len(h.t, others(h), map[bool]int{true: 1}[adopt])
					h.requireCleanAfterFault("batch", others(h)...)
				})
		})
	}
}

func TestStaticRotate_EveryFaultLeavesTheStoredKeys(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		adopt bool
		delay string
	}{"made": {false, "6m"}, "made, no delay": {false, "0"}, "adopted": {true, "6m"}, "adopted, no delay": {true, "0"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everyStaticFault(t,
				func(h *harness) {
					data := fields{"revocation_delay": test.delay, "scopes": "api.model.read"}
					if test.adopt {
						h.adoptStatic("batch", data)
					} else {
						h.static("batch", data)
					}
				},
				func(h *harness) (*logical.Response, error) { return h.write("rotate-role/batch", nil) },
				func(h *harness, resp *logical.Response, err error) {
					if err == nil && !resp.IsError() {
						require.Equal(h.t, resp.Data["api_key_id"], h.keyOf("batch"))
					}
					var others []string
					if test.adopt {
						others = []string{h.staticRole("batch")["service_account_id"].(string)}
					}
					if test.delay == "0" { // a key whose immediate deletion failed
						h.advance(firstRetry + time.Second)
						restore := h.treatNotFoundAsFinal()
						h.runStaticWorker()
						restore()
					}
					h.requireCleanAfterFault("batch", others...)
				})
		})
	}
}

func TestStaticWorker_EveryFaultLeavesTheStoredKeys(t *testing.T) {
	t.Parallel()
	for name, frozen := range map[string]bool{"rotation": false, "failing rotation": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everyStaticFault(t,
				func(h *harness) {
					h.static("batch", nil)
					h.must(h.write("rotate-role/batch", nil)) // adds a superseded key to delete
					h.advance(24 * time.Hour)
					if frozen {
						h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Status: http.StatusForbidden})
					}
				},
				func(h *harness) (resp *logical.Response, err error) {
					defer func() {
						if died := recover(); died == any(errKilled) {
							err = errKilled
						} else if died != nil {
							panic(died)
						}
					}()
					err = h.b.serveRole(context.Background(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}, "batch")
					if h.recordMessages(nil, err); frozen && err != nil && !errors.Is(err, errKilled) {
						err = nil
					}
					return nil, err
				},
				func(h *harness, _ *logical.Response, err error) {
					h.advance(longestRetry + time.Second)
					h.runStaticWorker() // without faults
					h.advance(longestRetry + time.Second)
					h.runStaticWorker()
					require.True(h.t, h.staticTime("batch", "next_vault_rotation").After(h.now()), "the role is rotated in the end")
					require.Empty(h.t, h.staticRole("batch")["last_rotation_error"])
					h.requireCleanAfterFault("batch")
				})
		})
	}
}

func TestStaticDelete_EveryFaultLeavesTheWholeRoleOrNothing(t *testing.T) {
	t.Parallel()
	for _, adopt := range []bool{false, true} {
		t.Run(fmt.Sprintf("adopted %t", adopt), func(t *testing.T) {
			t.Parallel()
			var others []string
			everyStaticFault(t,
				func(h *harness) {
					if adopt {
						h.adoptStatic("batch", nil)
					} else {
						h.static("batch", nil)
					}
					h.must(h.write("rotate-role/batch", nil))
				},
				func(h *harness) (*logical.Response, error) { return h.remove("static-roles/batch") },
				func(h *harness, resp *logical.Response, err error) {
					others := slices.Clone(others)
					for _, a := range h.sim.Accounts() {
						if a.Name == "by hand for batch" {
							others = append(others, a.ID)
						}
					}
					require.Len(h.t, others, map[bool]int{true: 1}[adopt], "an adopted account is never deleted")
					if err == nil {
						gone, readErr := h.read("static-roles/batch")
						require.NoError(h.t, readErr)
						require.Nil(h.t, gone)
					}
					h.requireCleanAfterFault("batch", others...)
				})
		})
	}
}

func TestStaticWrite_EveryStorageFaultIsAtomic(t *testing.T) {
	t.Parallel()
	for name, data := range map[string]fields{"schedule": {"rotation_period": "48h"}, "scopes": {"scopes": "api.model.read", "rotation_period": "48h"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everyStaticFault(t,
				func(h *harness) { h.static("batch", nil) },
				func(h *harness) (*logical.Response, error) { return h.write("static-roles/batch", data) },
				func(h *harness, resp *logical.Response, err error) {
					role := h.staticRole("batch")
					changed := role["rotation_period"] == int64(48*3600)
					if err == nil && !resp.IsError() {
						require.True(h.t, changed)
					}
					if name == "scopes" {
						require.Equal(h.t, changed, len(role["scopes"].([]string)) == 1, "the write is atomic")
						stored := err == nil && resp != nil && strings.Contains(strings.Join(resp.Warnings, ""), "The scopes are stored")
						require.Equal(h.t, changed && !stored, role["superseded_keys"] == 1)
					}
					h.requireCleanAfterFault("batch")
				})
		})
	}
}
