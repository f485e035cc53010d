package openaisecrets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/events"
)

// limited is a mount that compares costs and whose role "app" has a limit, in the middle
// of a month and of a day.
func limited(t *testing.T, opts openaitest.Options, role fields) *harness {
	t.Helper()
	h := configured(t, opts)
	at := h.now().UTC()
	h.until(time.Date(at.Year(), at.Month()+1, 15, 12, 0, 0, 0, time.UTC))
	h.must(h.write("config", fields{"usage_interval": "5m"}))
	h.limit(role)
	return h
}

// limit writes the role "app" with a limit of 10 dollars, and more if given.
func (h *harness) limit(more fields) {
	h.t.Helper()
	data := fields{"spend_limit": "10", "activation_timeout": 0}
	for k, v := range more {
		data[k] = v
	}
	h.role(data)
}

// cost adds costs of a lease's key today.
func (h *harness) cost(lease *logical.Response, amount string) {
	h.sim.AddCost(h.project, lease.Data["api_key_id"].(string), "gpt-5-mini, input_tokens", h.sim.Now(), amount)
}

// compared refreshes the costs and runs the worker without the deletions.
func (h *harness) compared() error {
	h.t.Helper()
	h.b.spending.mu.Lock()
	h.b.spending.tried = time.Time{}
	h.b.spending.mu.Unlock()
	err := errors.Join(h.b.refreshUsage(context.Background(), h.background()), h.b.checkSpending(context.Background(), h.background()))
	h.recordMessages(nil, err)
	return err
}

// notRenewed fails the test unless a renewal fails with status 400.
func (h *harness) notRenewed(lease *logical.Response) string {
	h.t.Helper()
	_, err := h.renew(h.t.Context(), lease, time.Minute, time.Hour)
	var coded logical.HTTPCodedError
	require.ErrorAs(h.t, err, &coded)
	require.Equal(h.t, http.StatusBadRequest, coded.Code())
	return err.Error()
}

func TestSpendLimit_WarnsBlocksOrRevokes(t *testing.T) {
	t.Parallel()
	for _, action := range []string{actionWarn, actionBlock, actionRevoke} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			h := limited(t, openaitest.Options{}, fields{"spend_action": action, "spend_window": windowDay})
			lease, other := h.lease("creds/app", nil), h.lease("creds/app", nil)
			h.cost(lease, "5.0000001")
			h.cost(other, "4.99")
			require.NoError(t, h.compared())
			require.NoError(t, h.revoke(h.lease("creds/app", nil)), "below the limit")
			h.cost(other, "0.0099999")
			require.NoError(t, h.compared())

			event := h.events.heard(t, events.RoleOverspent)
			require.Equal(t, map[string]string{"name": "app", "spend_action": action, "spend": "10", "spend_limit": "10.00", "spend_window": "day"},
				map[string]string{"name": event["name"], "spend_action": event["spend_action"], "spend": event["spend"], "spend_limit": event["spend_limit"], "spend_window": event["spend_window"]})
			if action == actionWarn {
				require.NoError(t, h.revoke(h.lease("creds/app", nil)))
				require.NotContains(t, h.measured(), `openai_role_blocked{role="app"}`)
				require.Len(t, h.lines("role has reached its spend_limit"), 1)
				require.NoError(t, h.compared())
				require.Len(t, h.lines("role has reached its spend_limit"), 1, "logged once")
				require.NoError(t, h.revoke(lease))
				require.NoError(t, h.revoke(other))
				return
			}
			line := h.lines("role has reached its spend_limit; no key is issued and no lease renewed")
			require.Len(t, line, 1)
			require.Equal(t, "vault lease revoke -prefix openai/creds/app", line[0]["to_end_its_leases"])
			require.InDelta(t, 1, h.measured()[blockedMetric("app")], 0)
			tomorrow := h.sim.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, 1)
			watched := &watchedStorage{Storage: h.storage}
			h.sim.ResetRequests()
			resp, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "creds/app", Storage: watched, MountPoint: "openai/"})
			said := h.refused(resp, err)
			require.Zero(t, watched.operations.Load())
			require.Zero(t, h.sim.Count("", ""))
			for _, said := range []string{said, h.notRenewed(lease)} {
				for _, part := range []string{`role "app"`, "have cost 10 USD", "10.00 USD per day", tomorrow.Format(time.RFC3339)} {
					require.Contains(t, said, part)
				}
			}
			require.Equal(t, tomorrow.Format(time.RFC3339), h.must(h.read("roles/app")).Data["spend_blocked_until"])
			require.Equal(t, "10", h.must(h.read("roles/app")).Data["spend_at_block"])

			if action == actionBlock {
				require.Len(t, h.liveKeys(), 2, "a block deletes nothing")
			} else {
				require.Len(t, h.walEntries(), 2, "the WAL records the keys first")
				h.b.deleteDoomed(t.Context(), h.background())
				require.Empty(t, h.liveKeys())
			}
			require.NoError(t, h.revoke(lease))
			require.NoError(t, h.revoke(other))
			h.onlyLeased()

			// The block ends with the window, by OpenAI's clock.
			h.until(tomorrow.Add(time.Minute))
			require.NoError(t, h.compared()) // any call shows OpenAI's time
			require.NoError(t, h.revoke(h.lease("creds/app", nil)))
			require.Nil(t, h.must(h.read("roles/app")).Data["spend_blocked_until"])
			h.noState()
			require.NotContains(t, h.measured(), blockedMetric("app"))
		})
	}
}

// noState fails the test if a state is stored.
func (h *harness) noState() {
	h.t.Helper()
	names, err := h.storage.inner.List(h.t.Context(), stateStoragePrefix)
	require.NoError(h.t, err)
	require.Empty(h.t, names)
}

func blockedMetric(role string) string {
	return fmt.Sprintf("vault_openai_role_blocked{role=%q}", role)
}

// A restart, an outage and an incomplete answer neither begin nor end a block.
func TestSpendLimit_ABlockOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	for _, fault := range []openaitest.Fault{
		{Kind: openaitest.FaultStatus, Status: 500}, {Kind: openaitest.FaultTruncated}, {Kind: openaitest.FaultEmptyObject}, {Kind: openaitest.FaultStatus, Status: 403, Body: `{"error":"Missing scopes: api.usage.read."}`},
	} {
		fault.Route = "/organization/costs"
		h.sim.Fail(fault)
		require.Error(t, h.compared())
		h.noState()
		h.sim.ClearFaults()
	}
	require.NoError(t, h.compared())
	h.refused(h.read("creds/app"))
	h.restart()
	h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultStatus, Status: 500, Route: "/organization/costs"})
	h.refused(h.read("creds/app"))
	h.notRenewed(lease)
	require.Error(t, h.compared())
	require.InDelta(t, 1, h.measured()[blockedMetric("app")], 0, "the metric needs no costs")
	h.refused(h.read("creds/app"))

	// A raised limit ends it immediately; a lowered one begins it with the next costs.
	h.must(h.write("roles/app", fields{"spend_limit": "10.01"}))
	next := h.lease("creds/app", nil)
	h.sim.ClearFaults()
	require.NoError(t, h.compared())
	h.noState()
	h.must(h.write("roles/app", fields{"spend_limit": "9"}))
	require.NoError(t, h.compared())
	require.Contains(t, h.refused(h.read("creds/app")), "9.00 USD per month")
	// A change of the action and the removal of the limit take effect immediately.
	h.must(h.write("roles/app", fields{"spend_action": "warn"}))
	third := h.lease("creds/app", nil)
	h.must(h.write("roles/app", fields{"spend_action": "block"}))
	h.refused(h.read("creds/app"))
	h.must(h.write("roles/app", fields{"spend_limit": ""}))
	for _, l := range []*logical.Response{lease, next, third, h.lease("creds/app", nil)} {
		require.NoError(t, h.revoke(l))
	}
}

// If the window changes while the role is blocked, it applies from the next costs.
func TestSpendLimit_AWindowChangedWhileBlocked(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock})
	lease := h.lease("creds/app", nil)
	h.sim.AddCost(h.project, lease.Data["api_key_id"].(string), "gpt-5-mini", h.sim.Now().AddDate(0, 0, -3), "9")
	h.cost(lease, "1")
	require.NoError(t, h.compared())
	h.refused(h.read("creds/app"))
	h.must(h.write("roles/app", fields{"spend_window": windowDay}))
	h.refused(h.read("creds/app"))
	require.NoError(t, h.compared())
	require.NoError(t, h.revoke(h.lease("creds/app", nil)), "the day's costs are 1 USD")

	h.must(h.write("roles/app", fields{"spend_limit": "1"}))
	require.NoError(t, h.compared())
	require.Contains(t, h.refused(h.read("creds/app")), "1.00 USD per day")
	h.must(h.write("roles/app", fields{"spend_window": windowMonth}))
	require.NoError(t, h.compared())
	require.Contains(t, h.refused(h.read("creds/app")), "have cost 10 USD, and the limit is 1.00 USD per month")
	require.NoError(t, h.revoke(lease))
}

// Windows are by OpenAI's clock: this server's clock neither begins nor ends one.
func TestSpendLimit_WindowsAreByOpenAIsClock(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock, "spend_window": windowDay})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	offset := h.offset
	h.setClock(offset + 48*time.Hour)
	require.NoError(t, h.compared())
	h.refused(h.read("creds/app"))
	h.setClock(offset - 48*time.Hour)
	h.refused(h.read("creds/app"))
	h.setClock(offset)
	require.NoError(t, h.revoke(lease))
}

// Before its first response from OpenAI, a process does not end a block by its own clock.
func TestSpendLimit_AWindowEndsNoSoonerAfterARestart(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock, "spend_window": windowDay})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	offset := h.offset
	h.setClock(offset + 48*time.Hour)
	h.restart()
	h.notRenewed(lease)
	require.NoError(t, h.b.checkSpending(t.Context(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}))
	h.notRenewed(lease)
	h.refused(h.read("creds/app"))
	h.setClock(offset)
	require.NoError(t, h.revoke(lease))
}

// A client that is rebuilt during an outage, after the config is read again, knows
// OpenAI's time from the previous client.
func TestSpendLimit_AWindowEndsAlthoughTheConfigIsReadAgain(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock, "spend_window": windowDay})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	h.until(h.sim.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, 1).Add(time.Minute))
	snap, err := h.b.current(t.Context(), h.storage)
	require.NoError(t, err)
	_, err = snap.api.ListProjects(t.Context()) // shows OpenAI's time
	require.NoError(t, err)
	h.b.dropSnapshot()
	h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultReset})
	_, err = h.renew(t.Context(), lease, time.Minute, time.Hour)
	require.NoError(t, err, "no call is needed")
	h.sim.ClearFaults()
	require.NoError(t, h.revoke(lease))
}

func TestSpendLimit_BlocksAStaticRole(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, nil)
	h.must(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "spend_limit": "10", "spend_action": "block"}))
	key := h.must(h.read("static-creds/batch")).Data["api_key_id"].(string)
	h.sim.AddCost(h.project, key, "gpt-5-mini", h.sim.Now(), "10")
	require.NoError(t, h.compared())
	said := h.refused(h.read("static-creds/batch"))
	require.Contains(t, said, `static role "batch"`)
	require.Contains(t, said, "have cost 10 USD")
	require.InDelta(t, 1, h.measured()[blockedMetric("static-roles/batch")], 0)
	require.NotNil(t, h.must(h.read("static-roles/batch")).Data["spend_blocked_until"])
	h.must(h.write("rotate-role/batch", nil))
	require.Len(t, h.liveKeys(), 2, "rotation continues")
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"spend_action": "revoke"})), "spend_action must be one of warn, block")
	h.must(h.write("static-roles/batch", fields{"spend_limit": "20"}))
	h.must(h.read("static-creds/batch"))
	require.NoError(t, h.compared())
	h.must(h.remove("static-roles/batch"))
	h.runPeriodicWork()
}

func TestSpendLimit_ABlockEmptiesThePool(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock, "pool_size": 3})
	lease := h.lease("creds/app", nil)
	h.fill()
	require.Equal(t, 3, h.ready("app"))
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	require.Equal(t, 0, h.ready("app"))
	require.InDelta(t, 3, h.measured()[`vault_openai_pool_destroyed_total{reason="blocked"}`], 0)
	h.sim.ResetRequests()
	h.fill()
	require.Zero(t, h.sim.Count(http.MethodPost, routeCreate), "a blocked pool is not refilled")
	require.Contains(t, h.must(h.read("roles/app")).Data["pool_last_error"], "blocked by its spend_limit")
	h.runPeriodicWork()
	h.onlyLeased(lease)
	h.must(h.write("roles/app", fields{"spend_limit": "20"}))
	require.NoError(t, h.compared())
	h.fill()
	require.Equal(t, 3, h.ready("app"))
	require.NoError(t, h.revoke(lease))
	h.closed()
}

// A key that is created while its role is blocked is not returned.
func TestSpendLimit_AKeyInTheMakingIsNotReturned(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeCreate, Match: func(*http.Request) bool {
		if err := h.compared(); err != nil {
			t.Error(err)
		}
		return false // observes only
	}})
	h.refused(h.read("creds/app"))
	h.sim.ClearFaults()
	h.b.deleteDoomed(t.Context(), h.background())
	h.runPeriodicWork()
	require.Empty(t, h.alive())
	require.NoError(t, h.revoke(lease))
}

// A request in progress when a role is blocked returns a key that the block deletes, or
// none: after the deletions, no key of the role is valid.
func TestSpendLimit_NoRequestOvertakesABlock(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{Latency: 5 * time.Millisecond}, fields{"spend_action": actionRevoke, "pool_size": 5})
	lease := h.lease("creds/app", nil)
	h.fill()
	var clients sync.WaitGroup
	var mu sync.Mutex
	leases := []*logical.Response{lease}
	for range 8 {
		clients.Go(func() {
			for {
				resp, err := h.read("creds/app")
				if err != nil || resp.IsError() {
					return
				}
				mu.Lock()
				leases = append(leases, h.stored(resp))
				mu.Unlock()
			}
		})
	}
	require.Eventually(t, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(leases) > 8
	}, time.Minute, time.Millisecond, "all clients work")
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	h.refused(h.read("creds/app"))
	clients.Wait()
	h.b.deleteDoomed(t.Context(), h.background())
	h.settlePools()
	h.runPeriodicWork()
	require.Empty(t, h.liveKeys())
	for _, l := range leases {
		require.NoError(t, h.revoke(l))
	}
	h.runPeriodicWork()
	h.onlyLeased()
}

// A block waits for responses in progress.
func TestSpendLimit_ABlockWaitsForAnswersInProgress(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	release, err := h.b.shareAnswers(t.Context(), "app")
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- h.compared() }()
	require.Never(t, func() bool { return len(done) > 0 }, 300*time.Millisecond, 10*time.Millisecond)
	h.noState()
	release()
	require.NoError(t, <-done)
	h.refused(h.read("creds/app"))
	require.NoError(t, h.revoke(lease))
}

// At ten calls a minute, the key with the highest costs is deleted first.
func TestSpendLimit_DeletesTheDearestKeyFirst(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	adopted := h.sim.AddServiceAccount(h.project, "batch")
	h.must(h.write("roles/keys", fields{"project_id": h.project, "credential_type": typeKey, "service_account_id": adopted, "spend_limit": "10", "spend_action": "revoke", "activation_timeout": 0}))
	var want []string
	var leases []*logical.Response
	for i := range 6 {
		for _, role := range []string{"app", "keys"} {
			lease := h.lease("creds/"+role, nil)
			leases = append(leases, lease)
			h.cost(lease, fmt.Sprintf("%d.5", 10-i))
			want = append(want, lease.Data["api_key_id"].(string))
		}
	}
	gone := h.lease("creds/app", nil)
	h.cost(gone, "1000")
	require.NoError(t, h.revoke(gone))
	require.NoError(t, h.compared())
	require.Len(t, h.walEntries(), 12)
	h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute, o.RateBurst = 10, 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	h.b.deleteDoomed(ctx, h.background())
	alive := map[string]bool{}
	for _, id := range h.liveKeys() {
		alive[id] = true
	}
	require.False(t, alive[want[0]], "the most expensive key is deleted")
	require.True(t, alive[want[len(want)-1]], "the cheapest key waits")
	require.GreaterOrEqual(t, len(h.walEntries()), len(alive), "the WAL records the remaining keys")

	// The leases can still be revoked, and the adopted account stays.
	h.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute = 0 })
	h.runPeriodicWork()
	for _, lease := range leases {
		end := *lease
		secret := *lease.Secret
		end.Secret = &secret
		require.NoError(t, h.revoke(&end))
	}
	h.runPeriodicWork() // checks the 404s of new accounts again
	require.Equal(t, []string{adopted}, h.alive())
	require.Empty(t, h.liveKeys())
	require.Empty(t, h.walEntries())
}

// A role's keys are revoked only once, and a restart does not search for them again.
func TestSpendLimit_RevokesOnce(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	h.restart()
	h.sim.ResetRequests()
	require.NoError(t, h.compared())
	require.Zero(t, h.b.doomed.waiting())
	require.Equal(t, 1, h.sim.Count("", ""), "only the refresh of the costs")
	require.NoError(t, h.revoke(lease))
}

// A key that was issued under a raised limit is deleted after the limit is lowered, even
// without a comparison between the two writes.
func TestSpendLimit_RevokesWhatWasIssuedWhileTheLimitWasRaised(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	h.must(h.write("roles/app", fields{"spend_limit": "20"}))
	next := h.lease("creds/app", nil)
	h.must(h.write("roles/app", fields{"spend_limit": "10"}))
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	require.Empty(t, h.liveKeys())
	// Without a limit, or without the role, no state remains.
	h.must(h.write("roles/app", fields{"spend_limit": "0"}))
	require.NoError(t, h.compared())
	h.noState()
	for _, l := range []*logical.Response{lease, next} {
		require.NoError(t, h.revoke(l))
	}
	h.runPeriodicWork()
	h.onlyLeased()
}

// If a crash lost the record of a key, a renewal of its lease is rejected but restores
// the record, and the key is deleted.
func TestSpendLimit_RevokesAKeyWhoseRecordWasLost(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lost := h.lease("creds/app", nil)
	h.crash()
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	require.Equal(t, []string{lost.Data["api_key_id"].(string)}, h.liveKeys())
	h.notRenewed(lost)
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	require.Empty(t, h.liveKeys())
	require.NoError(t, h.revoke(lost))
	require.NoError(t, h.revoke(lease))
}

// A role that is deleted and written again without a limit issues keys. Once the limit is
// restored, they are deleted.
func TestSpendLimit_RevokesWhatWasIssuedWhileTheRoleHadNoLimit(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	h.must(h.remove("roles/app"))
	h.role(fields{"activation_timeout": 0})
	next := h.lease("creds/app", nil)
	h.limit(fields{"spend_action": actionRevoke})
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	require.Empty(t, h.liveKeys())
	require.NoError(t, h.revoke(lease))
	require.NoError(t, h.revoke(next))
}

// If a limit is raised while the keys are recorded for deletion, they stay. If it is
// lowered again, keys that were issued meanwhile are deleted, too.
func TestSpendLimit_ALimitRaisedWhileKeysAreRecorded(t *testing.T) {
	t.Parallel()
	for _, lowered := range []bool{false, true} {
		t.Run(fmt.Sprint("lowered=", lowered), func(t *testing.T) {
			t.Parallel()
			h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
			leases := []*logical.Response{h.lease("creds/app", nil)}
			h.cost(leases[0], "10")
			calls := 0
			h.sim.Fail(openaitest.Fault{Route: "/organization/costs", Match: func(*http.Request) bool {
				if calls++; calls == 2 { // the order of the deletions
					h.must(h.write("roles/app", fields{"spend_limit": "20"}))
					if lowered {
						leases = append(leases, h.lease("creds/app", nil))
						h.must(h.write("roles/app", fields{"spend_limit": "10"}))
					}
				}
				return false // observes only
			}})
			require.NoError(t, h.compared())
			h.sim.ClearFaults()
			require.Equal(t, 2, calls)
			h.b.deleteDoomed(t.Context(), h.background())
			if lowered {
				require.NoError(t, h.compared())
				h.b.deleteDoomed(t.Context(), h.background())
				require.Empty(t, h.liveKeys())
			} else {
				require.Len(t, h.liveKeys(), 1)
				require.Empty(t, h.walEntries())
			}
			for _, lease := range leases {
				require.NoError(t, h.revoke(lease))
			}
		})
	}
}

// A role that this version cannot read keeps its block.
func TestSpendLimit_AnUnreadableRoleKeepsItsBlock(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock})
	h.must(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "spend_limit": "10", "spend_action": "block"}))
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	h.sim.AddCost(h.project, h.must(h.read("static-creds/batch")).Data["api_key_id"].(string), "gpt-5-mini", h.sim.Now(), "10")
	require.NoError(t, h.compared())
	h.refused(h.read("creds/app"))
	h.refused(h.read("static-creds/batch"))
	was := map[string]*logical.StorageEntry{}
	for _, key := range []string{roleStoragePrefix + "app", staticStoragePrefix + "batch"} {
		entry, err := h.storage.inner.Get(t.Context(), key)
		require.NoError(t, err)
		was[key] = entry
		require.NoError(t, h.storage.inner.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(`{"version":99}`)}))
	}
	h.restart()
	require.NoError(t, h.b.checkSpending(t.Context(), h.background()))
	for _, entry := range was {
		require.NoError(t, h.storage.inner.Put(t.Context(), entry))
	}
	h.restart()
	h.refused(h.read("creds/app"))
	h.refused(h.read("static-creds/batch"))
	require.NoError(t, h.revoke(lease))
	h.must(h.remove("static-roles/batch"))
	h.runPeriodicWork()
}

// Before OpenAI's first response, a wrong clock of this server does not end a state.
func TestSpendLimit_AWrongClockAfterARestartEndsNoState(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock, "spend_window": windowDay})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	require.NoError(t, h.compared())
	offset := h.offset
	h.setClock(offset + 48*time.Hour)
	h.restart()
	h.sim.ResetRequests()
	require.NoError(t, h.b.checkSpending(t.Context(), h.background()))
	require.Zero(t, h.sim.Count("", ""))
	h.setClock(offset)
	h.refused(h.read("creds/app"))
	require.NoError(t, h.revoke(lease))
}

// A clock that is ahead while the keys are recorded does not hide any of them.
func TestSpendLimit_AWrongClockHidesNoKey(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	offset := h.offset
	h.setClock(offset + 1000*time.Hour)
	require.NoError(t, h.compared())
	h.setClock(offset)
	h.b.deleteDoomed(t.Context(), h.background())
	require.Empty(t, h.liveKeys())
	require.NoError(t, h.revoke(lease))
}

// A valid key that listings omit for a while is deleted once a listing shows it.
func TestSpendLimit_OneListingProvesNoKeyGone(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	h.advance(time.Hour)
	shown := h.listed([]any{})
	for range 3 { // within seconds
		require.NoError(t, h.compared())
		h.b.deleteDoomed(t.Context(), h.background())
		require.Len(t, h.liveKeys(), 1)
	}
	shown()
	require.NoError(t, h.compared())
	h.b.deleteDoomed(t.Context(), h.background())
	require.Empty(t, h.liveKeys())
	h.sim.ResetRequests()
	require.NoError(t, h.compared())
	require.NoError(t, h.compared())
	require.Equal(t, 2, h.sim.Count("", ""), "the refreshes: there is no further search")
	require.NoError(t, h.revoke(lease))
}

// A copy of Vault compares by its own state: it deletes the original's keys in the
// snapshot, even if the original's limit was raised, but no other keys.
func TestSpendLimit_OfACopy(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.flush()
	other := h.copied()
	h.must(h.write("roles/app", fields{"spend_limit": "20"}))
	later := h.lease("creds/app", nil)
	h.cost(lease, "10")
	h.cost(later, "5")
	require.NoError(t, h.compared())
	require.NoError(t, other.compared())
	other.b.deleteDoomed(t.Context(), other.background())
	require.Equal(t, []string{later.Data["api_key_id"].(string)}, h.liveKeys())
	require.NoError(t, h.revoke(lease))
	require.NoError(t, h.revoke(later))
}

func TestSpendLimit_EveryFaultAtEveryStepOfACrossing(t *testing.T) {
	t.Parallel()
	for _, action := range []string{actionBlock, actionRevoke} {
		everyFault(t, faultFlow{
			mount: func(t *testing.T) *harness {
				return limited(t, openaitest.Options{}, fields{"spend_action": action, "pool_size": 1})
			},
			arrange: func(h *harness) {
				release := h.holdPools()
				for range 2 {
					lease := h.lease("creds/app", nil)
					h.cost(lease, "6")
					h.leases = append(h.leases, lease)
				}
				h.refillOnce()
				require.NoError(h.t, h.b.writeUsage(h.t.Context(), h.storage))
				h.releasePools = release
			},
			restart: func(h *harness) {
				h.restart()
				h.releasePools = func() {}
			},
			flow: func(h *harness) (resp *logical.Response, err error) {
				defer func() {
					if died := recover(); died == any(errKilled) {
						resp, err = nil, errKilled
					} else if died != nil {
						panic(died)
					}
				}()
				err = h.compared()
				for d, ok := h.b.doomed.take(); ok; d, ok = h.b.doomed.take() { // in this goroutine, to detect a crash
					_ = h.b.deleteOne(h.t.Context(), h.background(), d)
				}
				return nil, err
			},
			check: func(h *harness, _ *logical.Response, err error) {
				h.recordMessages(nil, err)
				h.releasePools()
				if strings.Contains(h.entries(), stateStoragePrefix) {
					require.Contains(h.t, h.refused(h.read("creds/app")), "have cost 12 USD", "a stored state applies immediately")
				} else if action == actionRevoke {
					require.GreaterOrEqual(h.t, len(h.liveKeys()), 2, "nothing is deleted before the state is stored")
				}
				// The next run completes what this one began.
				require.NoError(h.t, h.compared())
				h.b.deleteDoomed(h.t.Context(), h.background())
				h.settlePools()
				h.runPeriodicWork()
				h.refused(h.read("creds/app"))
				if action == actionRevoke {
					require.Empty(h.t, h.liveKeys())
				} else {
					require.Len(h.t, h.liveKeys(), 2, "leased keys stay valid")
				}
				require.Empty(h.t, h.walEntries())
				for _, lease := range h.leases {
					require.NoError(h.t, h.revoke(lease))
				}
				h.runPeriodicWork() // checks the 404 of a new account again
				h.onlyLeased()
			},
		})
	}
}

func TestSpendLimit_NeedsTheUsageSettings(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	require.Contains(t, h.refused(h.write("roles/app", fields{"spend_limit": "1"})), "requires usage_interval and usage_retention")
	require.Contains(t, h.refused(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "spend_limit": "1"})), "requires usage_interval and usage_retention")
	h.must(h.write("config", fields{"usage_interval": "5m", "usage_retention": "7d"}))
	require.Contains(t, h.refused(h.write("roles/app", fields{"spend_limit": "1"})), "usage_retention of 31 days")
	h.must(h.write("roles/app", fields{"spend_limit": "1", "spend_window": "day"}))
	h.must(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "spend_limit": "1", "spend_window": "day"}))
	for _, data := range []fields{{"usage_interval": 0}, {"usage_interval": 0, "usage_retention": 0}} {
		said := h.refused(h.write("config", data))
		require.Contains(t, said, `role "app", static role "batch"`)
		require.Equal(t, int64(300), h.config()["usage_interval"])
	}
	h.must(h.write("config", fields{"usage_interval": "10m", "usage_retention": "8d"}))
	h.must(h.write("roles/app", fields{"spend_limit": "0"}))
	h.must(h.remove("static-roles/batch"))
	h.must(h.write("config", fields{"usage_interval": 0}))
	h.runPeriodicWork()
}

// A config write that disables the usage settings waits for the write of a static role
// with a limit, and is then rejected.
func TestSpendLimit_AStaticRoleAndTheConfigDoNotCross(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", fields{"usage_interval": "5m"}))
	type result struct {
		resp *logical.Response
		err  error
	}
	disabled := make(chan result, 1)
	var once sync.Once
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeCreate, Match: func(*http.Request) bool {
		once.Do(func() {
			go func() {
				resp, err := h.write("config", fields{"usage_interval": 0})
				disabled <- result{resp, err}
			}()
			for range 50 {
				if time.Sleep(10 * time.Millisecond); len(disabled) > 0 {
					return
				}
			}
		})
		return false // observes only
	}})
	h.must(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "spend_limit": "1"}))
	got := <-disabled
	require.Contains(t, h.refused(got.resp, got.err), `first clear the spend_limit of static role "batch"`)
	h.must(h.remove("static-roles/batch"))
	h.must(h.write("config", fields{"usage_interval": 0}))
	h.runPeriodicWork()
}

// The records of a month's keys stay until the month ends, even if the keys were issued
// before it and have expired, and even if this server's clock is wrong.
func TestSpendLimit_TheMonthsRecordsStay(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock, "max_ttl": "240h"})
	h.must(h.write("config", fields{"usage_retention": "31d"}))
	_, month := windowOf(windowMonth, h.now().UTC().Truncate(usageDay))
	h.until(month.AddDate(0, 0, -5))
	lease := h.lease("creds/app", nil)
	h.flush()
	h.until(month.AddDate(0, 0, 1))
	h.cost(lease, "9")
	require.NoError(t, h.revoke(lease))
	h.until(month.AddDate(0, 0, 27).Add(12 * time.Hour))
	require.NoError(t, h.compared())
	offset := h.offset
	h.setClock(offset + 10_000*time.Hour)
	require.NoError(t, h.b.sweepUsage(t.Context(), h.background()))
	h.setClock(offset)
	h.b.usage.sweepSoon()
	require.NoError(t, h.b.sweepUsage(t.Context(), h.background()))
	next := h.lease("creds/app", nil)
	h.cost(next, "1")
	require.NoError(t, h.compared())
	require.Contains(t, h.refused(h.read("creds/app")), "have cost 10 USD")
	require.NoError(t, h.revoke(next))
}

func TestSpendLimit_AmountsAreExact(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, nil)
	for _, bad := range []string{"NaN", "Inf", "-1", "+1", "1e3", "1.001", "0.005", "1,000", "$1", ".5", "5.", "0x10", "1 000", strings.Repeat("9", 13)} {
		require.Contains(t, h.refused(h.write("roles/app", fields{"spend_limit": bad})), "at most two decimals", bad)
	}
	require.Contains(t, h.refused(h.write("roles/app", fields{"spend_limit": 12.5})), "spend_limit must be a string")
	for written, want := range map[string]string{"12.5": "12.50", "12.50": "12.50", "0012": "12.00", "999999999999.99": "999999999999.99", "0": "", "0.00": "", "": ""} {
		h.must(h.write("roles/app", fields{"spend_limit": written}))
		data := h.must(h.read("roles/app")).Data
		require.Equal(t, written, data["spend_limit"])
		require.Equal(t, want, data["effective_spend_limit"])
	}
	for _, bad := range []fields{{"spend_window": "week"}, {"spend_action": "delete"}} {
		h.refused(h.write("roles/app", bad))
	}
	require.True(t, reaches(big.NewRat(1000, 100), 1000))
	below, _ := new(big.Rat).SetString("9.99999999999999999999")
	require.False(t, reaches(below, 1000))
}

// A limit adds no call and no storage operation to a credential, except to the first one.
func TestSpendLimit_CostsNothingPerCredential(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	watched := &watchedStorage{Storage: h.storage}
	life := func() (operations int64, calls int) {
		h.sim.ResetRequests()
		from := watched.operations.Load()
		resp, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "creds/app", Storage: watched, MountPoint: "openai/"})
		h.must(resp, err)
		lease := h.stored(resp)
		renewal := &logical.Request{Operation: logical.RenewOperation, Path: "creds/app", Storage: watched, MountPoint: "openai/", Secret: lease.Secret, Data: lease.Data}
		h.must(h.b.HandleRequest(t.Context(), renewal))
		operations, calls = watched.operations.Load()-from, h.sim.Count("", "")
		require.NoError(t, h.revoke(lease))
		return operations, calls
	}
	life()
	operations, calls := life()
	h.must(h.write("config", fields{"usage_interval": "5m"}))
	h.must(h.write("roles/app", fields{"spend_limit": "10", "spend_action": "revoke"}))
	life()
	with, callsWith := life()
	require.Equal(t, operations, with)
	require.Equal(t, calls, callsWith)
}

// The worker compares after each refresh, and a role with a limit adds no call.
func TestSpendLimit_TheWorkerComparesAfterEachRefresh(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.sim.ResetRequests()
	h.rollback()
	require.Equal(t, 1, h.sim.Count("", "/organization/costs"))
	h.rollback()
	require.Equal(t, 1, h.sim.Count("", "/organization/costs"), "not due")
	h.cost(lease, "10")
	h.advance(5 * time.Minute)
	h.rollback()
	h.rollback()
	require.Equal(t, 3, h.sim.Count("", "/organization/costs"), "the refresh, and the order of the deletions")
	require.Empty(t, h.liveKeys())
	require.NoError(t, h.revoke(lease))

	// A lowered limit is compared with the known costs.
	h.must(h.write("roles/other", fields{"project_id": h.project, "spend_limit": "1", "spend_action": "block", "activation_timeout": 0}))
	other := h.lease("creds/other", nil)
	h.cost(other, "0.5")
	h.advance(5 * time.Minute)
	h.rollback()
	h.sim.ResetRequests()
	h.must(h.write("roles/other", fields{"spend_limit": "0.50"}))
	h.rollback()
	require.Contains(t, h.refused(h.read("creds/other")), "have cost 0.5 USD")
	require.Zero(t, h.sim.Count("", "/organization/costs"))
	require.NoError(t, h.revoke(other))
}

func TestGolden_RoleStateV1(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	want := &roleState{Version: 1, Since: at.Add(time.Hour), Window: windowMonth, Start: at, End: at.AddDate(0, 1, 0), Spend: "50.0000001", Limit: 5000, Recorded: true}
	encoded, err := json.Marshal(want)
	require.NoError(t, err)
	pinned(t, "spending_state.v1.json", encoded)
	s := &logical.InmemStorage{}
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: "role-state/app", Value: golden(t, "spending_state.v1.json")}))
	got, err := newRoleStates().get(t.Context(), s, "app")
	require.NoError(t, err)
	require.Equal(t, want, got)
	require.Equal(t, staticLabel+"x", (&usageRecord{StaticRole: "x"}).role())
}

// A limit is lowered while the limits are being compared.
func TestSpendLimit_ALimitLoweredDuringAComparisonIsCompared(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionBlock})
	h.sim.KeepAll()
	lease := h.lease("creds/app", nil)
	h.cost(lease, "6")
	require.NoError(t, h.compared())
	h.must(h.write("roles/zzz", fields{"project_id": h.project})) // the limits are compared again
	watched := &watchedStorage{Storage: h.storage}
	held := watched.holdAt(roleStoragePrefix + "zzz")
	var err error
	var comparing sync.WaitGroup
	comparing.Go(func() {
		err = h.b.checkSpending(t.Context(), &logical.Request{Storage: watched, MountPoint: "openai/"})
	})
	<-held.entered
	h.must(h.write("roles/app", fields{"spend_limit": "5"}))
	close(held.release)
	comparing.Wait()
	require.NoError(t, err)
	for range 3 { // ticks before the next refresh of the costs
		require.NoError(t, h.b.checkSpending(t.Context(), h.background()))
	}
	if resp, err := h.read("creds/app"); err != nil || !resp.IsError() {
		t.Error("not blocked until the next refresh of the costs")
	}
	h.b.states.compareAgain() // requests the comparison
	require.NoError(t, h.b.checkSpending(t.Context(), h.background()))
	h.refused(h.read("creds/app"))
}

// reconsider runs while recordDoomed stores that every key is recorded.
func TestSpendLimit_AReconsiderationIsNotLost(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	h.sim.KeepAll()
	lease := h.lease("creds/app", nil)
	h.cost(lease, "11")
	watched := &watchedStorage{Storage: h.storage}
	puts, entered, release := 0, make(chan struct{}), make(chan struct{})
	watched.fail(nil, func(key string) error {
		if strings.HasPrefix(key, stateStoragePrefix) {
			if puts++; puts == 2 { // keys_recorded
				close(entered)
				<-release
			}
		}
		return nil
	})
	require.NoError(t, h.b.refreshUsage(t.Context(), h.background()))
	var err error
	var comparing sync.WaitGroup
	comparing.Go(func() {
		err = h.b.checkSpending(t.Context(), &logical.Request{Storage: watched, MountPoint: "openai/"})
	})
	<-entered
	require.NoError(t, h.b.states.reconsider(t.Context(), h.storage, "app"))
	close(release)
	comparing.Wait()
	require.NoError(t, err)
	state, err := h.b.states.get(t.Context(), h.storage, "app")
	require.NoError(t, err)
	require.False(t, state.recorded(), "the keys must be searched again")
}
