package openaisecrets

// The static role worker: a reader across many rotations, a thousand due roles, concurrent
// changes, and the disabling of the mount.

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// Vault Agent and consul-template read again a second after ttl has passed, and each
// second while it is 0. In a synctest bubble, so that a reader wakes on time on a busy
// machine.
func TestStaticWorker_AReaderFollowsTwentyRotations(t *testing.T) {
	t.Parallel()
	for name, data := range map[string]fields{
		"period":   {"rotation_period": "1m", "revocation_delay": "30s"},
		"schedule": {"rotation_schedule": "* * * * *", "revocation_delay": "30s"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Longer than the reader's second, so that it reads before the new key works.
			inBubble(t, openaitest.Options{ActivationDelay: 3 * time.Second}, func(t *testing.T, h *harness) {
				h.configure(fields{"tidy_interval": 0})
				h.static("batch", data)
				stop := h.ticking()
				defer stop()
				for rotations, held := -1, ""; rotations < 20; {
					creds := h.staticCreds("batch")
					key := creds["api_key"].(string)
					if key != held {
						rotations++
						held = key
					}
					require.True(t, h.accepted(held), "a key works when it is read")
					again := time.Now().Add(time.Duration(creds["ttl"].(int64)+1) * time.Second)
					for time.Now().Before(again) {
						time.Sleep(min(time.Until(again), 5*time.Second))
						require.True(t, h.accepted(held), "the key that the reader holds works until it reads again")
					}
					last := h.staticTime("batch", "last_vault_rotation")
					require.WithinDuration(t, time.Now(), last, time.Minute+10*time.Second, "each rotation is on time")
				}
				time.Sleep(h.delayOf("batch") + 10*time.Second)
				require.Equal(t, 0, h.staticRole("batch")["superseded_keys"])
				h.onlyStatic()
				h.deleteStaticRole("batch")
			})
		})
	}
}

// gauge counts the calls of one kind that are in progress.
type gauge struct {
	now, most, all atomic.Int64
}

func (g *gauge) around(next http.Handler, counts func(*http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if counts(r) {
			g.all.Add(1)
			n := g.now.Add(1)
			defer g.now.Add(-1)
			for most := g.most.Load(); n > most && !g.most.CompareAndSwap(most, n); most = g.most.Load() {
			}
		}
		next.ServeHTTP(w, r)
	})
}

func isRotation(r *http.Request) bool {
	return r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/api_keys")
}

func TestStaticWorker_AThousandDueRolesAreQueued(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.holdStatic()
	var g gauge
	proxy := httptest.NewServer(g.around(h.sim, isRotation))
	t.Cleanup(proxy.Close)
	h.configure(fields{"api_endpoint": proxy.URL + "/v1"})
	h.must(h.write("roles/app", fields{"project_id": h.project}))
	const roles = 1000
	names := make([]string, roles)
	for i := range names {
		names[i] = fmt.Sprint("role-", i)
		h.static(names[i], fields{"rotation_period": "24h", "activation_timeout": 0})
	}
	pending := names
	allRotated := func() bool {
		for ; len(pending) > 0; pending = pending[1:] {
			r, err := getStaticRole(context.Background(), h.storage, pending[0])
			require.NoError(t, err)
			if len(r.Superseded) == 0 {
				return false
			}
		}
		return true
	}
	// At ten thousand calls a minute, a thousand take at least six seconds.
	h.sim.Configure(func(o *openaitest.Options) {
		o.RatePerMinute, o.RateBurst, o.Latency = 10000, 50, 4*time.Millisecond
	})
	h.until(h.staticTime(names[roles-1], "next_vault_rotation"))
	h.restart() // a new process reads all roles from storage
	rollback := func() {
		_, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
		require.NoError(t, err)
	}
	began := time.Now()
	rollback()
	require.False(t, allRotated(), "the periodic function returns immediately")
	var slowest time.Duration
	for round := 0; !allRotated(); round++ {
		require.Less(t, time.Since(began), 5*time.Minute)
		asked := time.Now()
		lease := h.lease("creds/app", nil)
		slowest = max(slowest, time.Since(asked))
		require.NoError(t, h.revoke(lease))
		if round%5 == 0 {
			rollback() // a tick
		}
	}
	took := time.Since(began)
	t.Logf("%d roles rotated in %s; %d calls, at most %d at a time; the slowest credential request took %s; %d calls were throttled",
		roles, took.Round(time.Millisecond), g.all.Load(), g.most.Load(), slowest.Round(time.Millisecond), h.b.rateLimiter.Throttled())
	require.LessOrEqual(t, g.most.Load(), int64(staticWorkers))
	require.Less(t, slowest, took/2, "a credential request does not wait for the queue")
	require.Less(t, g.all.Load(), int64(roles*12/10), "few calls are wasted")

	h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute, o.Latency = 0, 0 })
	require.NoError(t, h.b.static.worker.End(context.Background()))
	h.holdStatic()
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	for _, name := range names {
		require.Equal(t, 0, h.staticRole(name)["superseded_keys"])
		h.must(h.remove("static-roles/" + name))
	}
	h.onlyStatic()
}

// Disabling the mount, or stopping the process, stops a run over any number of roles.
func TestStaticWorker_StopsImmediately(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"drain", "close"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			for i := range 60 {
				h.static(fmt.Sprint("role-", i), fields{"revocation_delay": 0})
			}
			h.advance(25 * time.Hour)
			h.sim.Configure(func(o *openaitest.Options) { o.Latency = 200 * time.Millisecond })
			h.releaseStatic()
			req := &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"}
			_, err := h.b.HandleRequest(context.Background(), req)
			require.NoError(t, err)
			require.Eventually(t, func() bool { return h.sim.Count(http.MethodPost, routeNewKey) > 2 }, time.Minute, 5*time.Millisecond)
			if how == "drain" {
				h.manager.taint()
				_, err := h.b.HandleRequest(context.Background(), req)
				require.NoError(t, err)
				require.Empty(t, h.walEntries())
			} else {
				h.b.Cleanup(context.Background())
				h.holdStatic() // waits for the end of the run
			}
			calls := h.sim.Count(http.MethodPost, routeNewKey)
			time.Sleep(500 * time.Millisecond)
			require.Equal(t, calls, h.sim.Count(http.MethodPost, routeNewKey), "no further rotation starts")
			require.Less(t, calls, 60, "the stop did not wait for all roles")
			require.NoError(t, h.checkStoredStaticKeys())
			h.sim.Configure(func(o *openaitest.Options) { o.Latency = 0 })
			if how == "drain" { // the mount was moved
				h.manager.untaint()
				h.holdStatic()
			} else {
				h.restartStatic()
			}
			h.runStaticWorker()
			h.runPeriodicWork()
			h.onlyStatic()
			for i := range 60 {
				require.True(t, h.staticTime(fmt.Sprint("role-", i), "next_vault_rotation").After(h.now()))
				h.must(h.remove(fmt.Sprint("static-roles/role-", i)))
			}
			h.onlyStatic()
		})
	}
}

// A systemic failure stops the run before it tries all roles.
func TestStaticWorker_AnOutagePausesAllRoles(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	const roles = 40
	for i := range roles {
		h.static(fmt.Sprint("role-", i), fields{"revocation_delay": 0})
	}
	h.advance(25 * time.Hour)
	h.sim.ResetRequests()
	tries := func() int { return h.sim.Count(http.MethodPost, routeNewKey) }
	cancel := h.sim.Fail(openaitest.Fault{Status: http.StatusUnauthorized})
	h.runStaticWorker()
	require.GreaterOrEqual(t, tries(), maxSystemicFailures)
	require.LessOrEqual(t, tries(), maxSystemicFailures+staticWorkers)
	require.Contains(t, strings.Join(h.said, "\n"), "stopped before all due roles were processed")
	cancel()

	// The failure of one role does not pause the others.
	ill := h.staticRole("role-7")["service_account_id"].(string)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/projects/" + h.project + "/service_accounts/" + ill + "/api_keys", Status: http.StatusForbidden})
	h.advance(longestRetry)
	h.runStaticWorker()
	for i := range roles {
		name := fmt.Sprint("role-", i)
		require.Equal(t, i != 7, h.staticTime(name, "next_vault_rotation").After(h.now()), name)
		require.Equal(t, i != 7, h.staticRole(name)["last_rotation_error"] == "", name)
	}
	h.sim.ClearFaults()
	for i := range roles {
		h.must(h.remove(fmt.Sprint("static-roles/role-", i)))
	}
	h.onlyStatic()
}

func TestStaticWorker_RunsOnlyOnWritableNodes(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		state  consts.ReplicationState
		local  bool
		rotate bool
	}{
		"primary":                              {consts.ReplicationPerformancePrimary, false, true},
		"performance secondary":                {consts.ReplicationPerformanceSecondary, false, false},
		"performance secondary, a local mount": {consts.ReplicationPerformanceSecondary, true, true},
		"performance standby":                  {consts.ReplicationPerformanceStandby, false, false},
		"DR secondary":                         {consts.ReplicationDRSecondary, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.static("batch", nil)
			id := h.keyOf("batch")
			h.until(h.staticTime("batch", "next_vault_rotation"))
			h.system.LocalMountVal = test.local
			h.become(test.state)
			h.restart()
			h.rollback()
			if test.rotate {
				require.Eventually(t, func() bool { return h.keyOf("batch") != id }, time.Minute, 10*time.Millisecond)
			} else {
				time.Sleep(100 * time.Millisecond)
				require.Equal(t, id, h.keyOf("batch"))
			}
			// Unloading a disabled mount there deletes nothing.
			h.manager.taint()
			h.rollbackOnly()
			h.b.Cleanup(context.Background())
			require.Len(t, h.liveAccounts(), map[bool]int{true: 0, false: 1}[test.rotate])
			h.manager.untaint()
			h.become(0)
			h.restartStatic()
			h.deleteStaticRole("batch")
		})
	}
}

func TestStaticWorker_RetriesAnUnreadableRole(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.static("other", nil)
	id, other := h.keyOf("batch"), h.keyOf("other")
	key := staticStoragePrefix + "batch"
	entry, err := h.storage.Get(context.Background(), key)
	require.NoError(t, err)
	require.NoError(t, h.storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte("{")}))
	h.restartStatic()
	h.advance(25 * time.Hour)
	h.runStaticWorker()
	require.NotEqual(t, other, h.keyOf("other"), "the other role is rotated")
	require.Contains(t, h.log.String(), "static role not processed")
	require.NoError(t, h.storage.Put(context.Background(), entry))
	h.advance(2 * time.Minute)
	h.runStaticWorker()
	require.NotEqual(t, id, h.keyOf("batch"))
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	h.onlyStatic()
	h.must(h.remove("static-roles/other"))
	h.deleteStaticRole("batch")
}

// A write of another node invalidates the cache here.
func TestStaticWorker_FollowsChangesInStorage(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.runStaticWorker()
	r, err := getStaticRole(context.Background(), h.storage, "batch")
	require.NoError(t, err)
	r.RotationPeriod, r.RevocationDelay = time.Hour, 0
	r.PlanFrom(r.LastRotated)
	require.NoError(t, putStaticRole(context.Background(), h.storage, "batch", r))
	h.b.invalidate(context.Background(), staticStoragePrefix+"batch")
	h.advance(time.Hour + time.Second)
	h.runStaticWorker()
	require.NotEqual(t, r.Current.ID, h.keyOf("batch"))
	h.onlyStatic()
	require.NoError(t, h.storage.Delete(context.Background(), staticStoragePrefix+"batch"))
	h.advance(time.Hour + time.Second)
	h.runStaticWorker()
	require.Empty(t, h.b.static.due, "a deleted role is not scheduled again")
	h.sim.DeleteServiceAccount(h.project, r.ServiceAccountID)
}

func TestStaticHammer_NoKeyLeaksOrIsLost(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.releaseStatic()
	hand := h.sim.AddServiceAccount(h.project, "by hand")
	h.static("stays", fields{"activation_timeout": 5})
	names := []string{"stays", "a", "b", "c"}
	var all sync.WaitGroup
	began, lasts := time.Now(), 4*time.Second
	var done, errs atomic.Int64
	run := func(what func()) {
		all.Go(func() {
			for time.Since(began) < lasts {
				what()
				done.Add(1)
			}
		})
	}
	note := func(resp *logical.Response, err error) {
		if err != nil {
			errs.Add(1)
			t.Errorf("%v", err)
		}
	}
	for range 2 {
		run(func() { // writes of existing and new roles
			name := names[rand.N(len(names))]
			data := fields{"project_id": h.project, "rotation_period": "24h", "revocation_delay": rand.N(3), "scopes": []string{"api.model.read", "api.model.request"}[:1+rand.N(2)]}
			if name == "c" {
				data["service_account_id"] = hand
			}
			if name == "stays" {
				data["revocation_delay"] = 600
			}
			note(h.write("static-roles/"+name, data))
		})
		run(func() { note(h.write("rotate-role/"+names[rand.N(len(names))], nil)) })
		run(func() { note(h.remove("static-roles/" + names[1+rand.N(len(names)-1)])) })
		run(func() { note(h.read("static-roles/" + names[rand.N(len(names))])) })
		run(func() {
			resp, err := h.read("static-creds/stays")
			note(resp, err)
			if key := resp.Data["api_key"].(string); !h.accepted(key) {
				t.Error("the key of a role that stays does not work")
			}
		})
	}
	run(func() { h.runPeriodicWork(); time.Sleep(5 * time.Millisecond) })
	run(func() {
		h.rollbackOnly()
		h.b.static.forget()
		time.Sleep(10 * time.Millisecond)
	})
	all.Wait()
	t.Logf("%d requests and ticks", done.Load())
	require.NoError(t, h.b.static.worker.End(context.Background()))
	h.holdStatic()
	h.runPeriodicWork()
	// Past the delays of a, b and c, and until a 404 is final: the end of the run may have
	// canceled a delete after its effect.
	h.advance(notFinalBefore + 2*time.Second)
	h.runStaticWorker()
	h.onlyStatic(hand)
	h.restartStatic()
	h.runPeriodicWork()
	h.advance(10 * time.Minute)
	h.runStaticWorker()
	for _, name := range names {
		h.must(h.remove("static-roles/" + name))
	}
	h.onlyStatic(hand)
}

func TestStaticUnmount_DeletesEverything(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	var hands []string
	for i := range 20 {
		h.static(fmt.Sprint("made-", i), nil)
		hands = append(hands, h.adoptStatic(fmt.Sprint("adopted-", i), nil))
	}
	for _, name := range []string{"made-0", "adopted-0", "adopted-1"} {
		h.must(h.write("rotate-role/"+name, nil))
	}
	// A role whose account was deleted before, and a failed delete.
	h.sim.DeleteServiceAccount(h.project, h.staticRole("made-1")["service_account_id"].(string))
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusUnauthorized})
	require.Contains(t, h.must(h.remove("static-roles/adopted-2")).Warnings[0], "Queued for deletion at OpenAI in the WAL")
	cancel()
	h.advance(notFinalBefore)
	h.unmount()
	require.ElementsMatch(t, hands, h.liveAccounts())
	require.Empty(t, h.liveKeys())
	require.Empty(t, h.walEntries())
	require.NotContains(t, h.log.String(), "remains at OpenAI")
}

// A revocation that failed before the mount was disabled does not show that Vault gave
// up disabling it.
func TestStaticUnmount_AnEarlierFailureDoesNotPreventTheDeletion(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.must(h.write("roles/app", fields{"project_id": h.project}))
	h.static("batch", nil)
	lease := h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
	require.Error(t, h.revoke(lease))
	h.runPeriodicWork() // deletes the account
	h.unmount()
	require.Empty(t, h.liveAccounts())
	require.Empty(t, h.liveKeys())
}

// Vault also unloads a mount for other reasons, and taints one while it moves it.
func TestStaticUnmount_OnlyADisabledMountDeletesItsRoles(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.releaseStatic()
	h.b.Cleanup(context.Background()) // a seal, a step-down, a reload
	h.onlyStatic()
	h.restartStatic()
	h.manager.taint() // a move
	h.releaseStatic()
	h.rollbackOnly()
	require.Contains(t, h.refused(h.write("rotate-role/batch", nil)), "this mount is being disabled")
	h.manager.untaint()
	h.holdStatic()
	h.onlyStatic()
	h.must(h.write("rotate-role/batch", nil))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}

func TestStaticUnmount_IsBoundedAndReportsRemainingKeys(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	for i := range 100 {
		h.static(fmt.Sprint("role-", i), fields{"activation_timeout": 0})
	}
	ill := h.staticRole("role-7")["service_account_id"].(string)
	h.sim.Fail(openaitest.Fault{Route: "/organization/projects/" + h.project + "/service_accounts/" + ill, Status: http.StatusForbidden})
	h.unmount()
	require.Equal(t, []string{ill}, h.liveAccounts(), "one failure does not stop the others")
	require.Equal(t, 1, strings.Count(h.log.String(), "remains at OpenAI"))
	require.Contains(t, h.log.String(), "service account "+ill+" in project "+h.project+": ")
	h.sim.ClearFaults()
	h.sim.DeleteServiceAccount(h.project, ill)

	h = withStatic(t, openaitest.Options{})
	h.must(h.write("config", fields{"request_timeout": shortTimeout}))
	for i := range 100 {
		h.static(fmt.Sprint("role-", i), fields{"activation_timeout": 0})
	}
	h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang})
	began := time.Now()
	h.unmount()
	require.Less(t, time.Since(began), 4*unmountBudget, "the roles do not wait for the outage one by one")
	log := h.log.String()
	require.Equal(t, 100, strings.Count(log, "remains at OpenAI"))
	for _, id := range h.liveAccounts() {
		require.Contains(t, log, `"service_account_id":"`+id)
	}
	h.sim.KeepAll()
}

func TestStaticUnmount_RepeatsReadsThatFail(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.static("other", nil)
	h.b.dropSnapshot() // the config must be read, too
	watched := &watchedStorage{Storage: h.storage}
	reads := watched.failEachOnce()
	h.b.storage = watched
	h.unmount()
	require.Empty(t, h.liveAccounts())
	require.NotContains(t, h.log.String(), "remain")
	for _, key := range []string{staticStoragePrefix, staticStoragePrefix + "batch"} {
		require.GreaterOrEqual(t, reads(key), 2, "%s was read again", key)
	}
}

func TestStaticUnmount_WithoutAConfig(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.manager.taint()
	h.b.Cleanup(context.Background()) // the mount was never configured
	require.NotContains(t, h.log.String(), "OpenAI")
}

// Tidy does not delete the credentials of static roles, and deletes orphans.
func TestStaticTidy_DeletesOnlyCredentialsThatNoRoleNeeds(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("made", nil)
	account := h.adoptStatic("adopted", nil)
	// A lost key: superseded, not deleted, and no longer in storage.
	r, err := getStaticRole(context.Background(), h.storage, "adopted")
	require.NoError(t, err)
	h.must(h.write("rotate-role/adopted", nil))
	forgotten := r.Current.ID
	r, err = getStaticRole(context.Background(), h.storage, "adopted")
	require.NoError(t, err)
	r.Superseded = nil
	require.NoError(t, putStaticRole(context.Background(), h.storage, "adopted", r))
	stray := h.firstKeyOf("made")

	run := func() {
		t.Helper()
		h.must(h.write("tidy", fields{"apply": true}))
		require.Eventually(t, func() bool { return h.must(h.read("tidy-status")).Data["state"] != "Running" }, time.Minute, 10*time.Millisecond)
		require.Equal(t, "Finished", h.must(h.read("tidy-status")).Data["state"], "%v", h.must(h.read("tidy-status")).Data)
	}
	listed := func(id string) bool {
		_, adminKey := h.sim.AdminKey()
		return callSim(h, http.MethodGet, "/organization/projects/"+h.project+"/api_keys/"+id, adminKey, "", nil) == http.StatusOK
	}
	h.advance(time.Hour)
	run()
	require.True(t, listed(forgotten), "the key may still work")
	require.True(t, listed(stray))
	h.advance(8 * 24 * time.Hour) // without a rotation, every key has expired
	require.Empty(t, h.liveKeys())
	run()
	require.False(t, listed(forgotten))
	require.Contains(t, h.liveAccounts(), account)
	require.Contains(t, h.liveAccounts(), h.staticRole("made")["service_account_id"])
	h.runStaticWorker()
	for _, name := range []string{"made", "adopted"} {
		require.True(t, h.accepted(h.staticCreds(name)["api_key"].(string)))
	}
	require.Len(t, h.liveAccounts(), 2)
	h.advance(defaultRevocationDelay)
	h.runStaticWorker()
	h.must(h.remove("static-roles/made"))
	h.deleteStaticRole("adopted", account)
}

// A request in progress may start a run after the drain has begun.
func TestStaticWorker_DoesNotRunWhileTheMountIsBeingDisabled(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.releaseStatic()
	h.manager.taint()
	h.rollbackOnly()
	h.b.startStaticWorker(&logical.Request{Storage: h.storage, MountPoint: "openai/"})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	release, err := h.b.static.worker.Wait(ctx)
	require.NoError(t, err, "a run is in progress")
	release()
	h.manager.untaint()
	h.deleteStaticRole("batch")
}

func TestStaticWorker_ClockSkewDoesNotCauseConstantRotation(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.mu.Lock()
	h.offset += 2 * time.Minute
	h.mu.Unlock()
	h.static("batch", fields{"rotation_period": "1m", "revocation_delay": "1m", "key_ttl": "7m"})
	h.sim.ResetRequests()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	h.b.static.until.Store(0)
	_ = h.b.runStaticWorker(ctx, &logical.Request{Storage: h.storage, MountPoint: "openai/"})
	n := 0
	for _, r := range h.sim.Requests() {
		if r.Method == http.MethodPost {
			n++
		}
	}
	t.Logf("%d creates; role: %v", n, h.staticRole("batch"))
	require.Less(t, n, 3, "rotations in five seconds with rotation_period=1m")
	h.sim.KeepAll()
}

func TestStaticWorker_AHangingDeleteDoesNotDelayRotations(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "5m"}) // revocation_delay 5m: both are due at once
	h.must(h.write("rotate-role/batch", nil))
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Kind: openaitest.FaultHang})
	before := h.staticRole("batch")["api_key_id"]
	h.advance(5*time.Minute + time.Second)
	h.b.static.until.Store(0)
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 80*time.Second)
	defer cancel()
	_ = h.b.runStaticWorker(ctx, &logical.Request{Storage: h.storage, MountPoint: "openai/"})
	t.Log(time.Since(began), h.staticRole("batch")["last_rotation_error"])
	h.sim.ClearFaults()
	h.sim.KeepAll()
	require.NotEqual(t, before, h.staticRole("batch")["api_key_id"], "rotated although the deletion of the old key hangs")
}

func TestStaticUnmount_AFailedMoveAndARestartKeepTheRoles(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	lease := h.lease("creds/app", nil)
	h.manager.taint() // vault secrets move
	h.releaseStatic()
	h.rollbackOnly()
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
	require.Error(t, h.revoke(lease)) // the failure cancels the move: the mount stays tainted
	h.b.Cleanup(context.Background()) // vault plugin reload, a seal, a step-down, a shutdown
	h.restartStatic()
	h.releaseStatic()
	h.rollbackOnly()
	h.b.Cleanup(context.Background()) // again, in a process that has only seen the taint
	h.restartStatic()
	h.manager.untaint() // the repeated move succeeds
	require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
	h.advance(notFinalBefore) // the WAL deleted the account first
	require.NoError(t, h.revoke(lease))
	h.runPeriodicWork() // the entry of the first attempt, by another process
	h.deleteStaticRole("batch")
}

func TestStaticTidy_ConsidersARoleWrittenDuringTheRun(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	s := &tidyRun{b: h.b, storage: h.storage, log: hclog.NewNullLogger(), apply: true, buffer: 10 * time.Minute, moved: func() {}}
	ctx := client.Background(context.Background())
	_, err := s.covered(ctx) // a tidy run starts; at ten calls a minute it takes hours
	require.NoError(t, err)
	h.static("batch", fields{"rotation_period": "10m", "revocation_delay": "6m", "key_ttl": "21m"})
	h.advance(25 * time.Minute) // without a successful rotation
	require.NoError(t, s.project(ctx, coveredProject{id: h.project, named: true}))
	require.Contains(t, h.liveAccounts(), h.staticRole("batch")["service_account_id"])
	h.runStaticWorker()
	require.True(t, h.accepted(h.staticCreds("batch")["api_key"].(string)))
	h.deleteStaticRole("batch")
}

func TestStaticWorker_EveryQueuedKeyIsRotatedInTime(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(map[string]any{"tidy_interval": 0})
		const n = 300
		for i := range n {
			h.static(fmt.Sprint("daily-", i), fields{"rotation_schedule": "0 2 * * *", "activation_timeout": 0})
		}
		h.static("fast", fields{"rotation_period": "6m", "revocation_delay": "4m", "key_ttl": "15m", "activation_timeout": 0})
		h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 10 })
		stop := h.ticking()
		defer stop()
		dead, overlong := time.Duration(0), time.Duration(0)
		said := time.Time{}
		day := time.Date(2000, 1, 1, 2, 0, 0, 0, time.UTC)
		time.Sleep(time.Until(day.Add(-20 * time.Minute)))
		for time.Since(day) < time.Hour {
			time.Sleep(10 * time.Second)
			creds := h.staticCreds("fast")
			if end, _ := time.Parse(time.RFC3339, creds["expires_at"].(string)); time.Now().After(end) {
				dead += 10 * time.Second
			}
			if p, ok := h.staticCreds("daily-0")["previous_api_key_expires_at"]; ok {
				said, _ = time.Parse(time.RFC3339, p.(string))
			}
			if !said.IsZero() && time.Now().After(said) && h.staticRole("daily-0")["superseded_keys"] != 0 {
				overlong += 10 * time.Second
			}
		}
		t.Logf("fast's active key was invalid for %s; daily-0's old key outlived previous_api_key_expires_at by %s so far", dead, overlong)
		require.Zero(t, dead)
		require.Less(t, overlong, 5*time.Minute)
	})
}

// An entry that was read before a rotation may have a key that is no longer active.
func TestStaticWorker_DoesNotOverwriteARotationThatMayBeStored(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "10m", "revocation_delay": "10m"})
	h.must(h.write("rotate-role/batch", nil))
	before := h.staticRole("batch")["api_key_id"]
	h.advance(10*time.Minute + time.Second) // a rotation and the deletion of a superseded key are due
	h.storage.fail(storageFault{write: 1, after: true})
	h.runStaticWorker()
	h.storage.heal()
	require.NotEqual(t, before, h.staticRole("batch")["api_key_id"], "the rotation is stored")
	h.runPeriodicWork() // runs the WAL worker
	h.advance(time.Minute)
	h.runStaticWorker()
	h.onlyStatic()
	require.Equal(t, 1, h.staticRole("batch")["superseded_keys"])
	h.deleteStaticRole("batch")
}

func TestStaticWorker_RetriesBeforeTheKeyExpires(t *testing.T) {
	t.Parallel()
	died := 0
	for range 10 {
		inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
			h.configure(map[string]any{"tidy_interval": 0, "request_timeout": "5s"})
			h.static("batch", fields{"rotation_period": "24h", "revocation_delay": "6m", "key_ttl": "24h11m", "activation_timeout": 0})
			stop := h.ticking()
			defer stop()
			due := h.staticTime("batch", "next_vault_rotation")
			time.Sleep(time.Until(due.Add(-time.Minute)))
			h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Status: 503})
			time.Sleep(time.Until(due.Add(8 * time.Minute)))
			h.sim.ClearFaults()
			for time.Since(due) < 20*time.Minute {
				time.Sleep(5 * time.Second)
				if end, _ := time.Parse(time.RFC3339, h.staticCreds("batch")["expires_at"].(string)); time.Now().After(end) {
					died++
					return
				}
			}
		})
	}
	require.Zero(t, died, "of 10 active keys, these expired although the outage ended three minutes before")
}
