package openaisecrets

// A lease with key_expiry=ttl: the key's expiry is extended first and never shortened, and
// a failure changes neither lease nor key.

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/text"
)

// following is a mount whose role "app" has key_expiry=ttl, and a lease of it.
func following(t *testing.T, opts openaitest.Options, more map[string]any) (*harness, *logical.Response) {
	t.Helper()
	h := configured(t, opts)
	data := map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "2h"}
	maps.Copy(data, more)
	h.role(data)
	lease := h.lease("creds/app", nil)
	h.sim.ResetRequests()
	return h, lease
}

func TestRenew_WithTTLExtendsTheKeyFirst(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h, lease := following(t, openaitest.Options{}, nil)
			if kind == typeKey {
				require.NoError(t, h.revoke(lease))
				h.adopted(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "2h", "scopes": scopeChat})
				lease = h.lease("creds/app", nil)
				h.sim.ResetRequests()
			}
			bodies := h.bodies()
			first := lease
			age := time.Duration(0)
			// Every eight minutes, as Vault Agent does, to the end of max_ttl.
			for range 14 {
				h.advance(8 * time.Minute)
				age += 8 * time.Minute
				before := h.keyEnd()
				renewed, err := h.renew(t.Context(), lease, age, 0)
				require.NoError(t, err)
				require.NoError(t, renewed.Error())
				want := min(10*time.Minute, 2*time.Hour-age)
				require.InDelta(t, want, renewed.Secret.TTL, float64(10*time.Second))
				require.False(t, h.keyEnd().Before(before), "never earlier")
				require.False(t, h.keyEnd().Before(h.now().Add(renewed.Secret.TTL)), "the key covers the lease")
				require.WithinDuration(t, h.now().Add(want+expiryMargin), h.keyEnd(), 30*time.Second, "the margin is small")
				require.Equal(t, text.Time(h.keyEnd()), renewed.Data["expires_at"])
				about(t, h.keyEnd(), renewed.Secret.InternalData["key_expires_at"])
				for name, value := range first.Secret.InternalData {
					if name != "key_expires_at" {
						require.Equal(t, value, renewed.Secret.InternalData[name], "Vault keeps only what a renewal returns")
					}
				}
				for name, value := range first.Data {
					if name != "expires_at" {
						require.Equal(t, value, renewed.Data[name])
					}
				}
				lease = renewed
			}
			require.Equal(t, 14, h.sim.Count(http.MethodPost, routeKey))
			require.Equal(t, 14, h.sim.Count("", ""))
			for _, body := range bodies() {
				require.NotContains(t, body, "scopes")
			}
			if kind == typeKey {
				require.Equal(t, []string{scopeChat}, h.sim.Keys()[0].Scopes)
			}

			_, err := h.renew(t.Context(), lease, 2*time.Hour, 0)
			require.Error(t, err)
			said := err.Error()
			require.Contains(t, said, "past the max TTL")
			require.Equal(t, 14, h.sim.Count("", ""))
			h.advance(8*time.Minute + expiryMargin)
			require.Empty(t, h.sim.Keys(), "the key expires even without Vault")
			require.NoError(t, h.revoke(lease))
		})
	}
}

func TestRenew_Increments(t *testing.T) {
	t.Parallel()
	h, lease := following(t, openaitest.Options{}, nil)
	end := h.keyEnd()
	for _, step := range []struct {
		increment, ttl time.Duration
		calls          int
	}{
		{30 * time.Minute, 30 * time.Minute, 1},
		{5 * time.Minute, 5 * time.Minute, 0}, // never earlier
		{0, 10 * time.Minute, 0},
		{29 * time.Minute, 29 * time.Minute, 0},
		{31 * time.Minute, 31 * time.Minute, 1},
		{time.Second, time.Second, 0},
		{5 * time.Hour, 2 * time.Hour, 1}, // limited by max_ttl
		{5 * time.Hour, 2 * time.Hour, 0},
	} {
		h.sim.ResetRequests()
		renewed, err := h.renew(t.Context(), lease, 0, step.increment)
		require.NoError(t, err)
		require.InDelta(t, step.ttl, renewed.Secret.TTL, float64(10*time.Second), step.increment)
		require.Equal(t, step.calls, h.sim.Count("", ""), step.increment)
		require.False(t, h.keyEnd().Before(end))
		end = h.keyEnd()
		require.False(t, end.Before(h.now().Add(step.ttl)))
		about(t, end, renewed.Secret.InternalData["key_expires_at"])
		lease = renewed
	}
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

// The key's expiry is by OpenAI's clock, and the lease starts when Vault has stored it, so
// a few seconds are not enough slack.
func TestRenew_ExtendsAKeyWithoutSlack(t *testing.T) {
	t.Parallel()
	h, lease := following(t, openaitest.Options{}, nil)
	h.advance(expiryMargin - 10*time.Second)
	_, err := h.renew(t.Context(), lease, expiryMargin-10*time.Second, 0)
	require.NoError(t, err)
	require.Equal(t, 1, h.sim.Count(http.MethodPost, routeKey))
	require.WithinDuration(t, h.now().Add(10*time.Minute+expiryMargin), h.keyEnd(), 30*time.Second)
	require.NoError(t, h.revoke(lease))
}

func TestRenew_ClockSkew(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{-clockSlack + time.Second, clockSlack - time.Second} { // of Vault's clock
		h, lease := following(t, openaitest.Options{}, nil)
		h.mu.Lock()
		h.offset += ahead
		h.mu.Unlock()
		h.advance(5 * time.Minute)
		renewed, err := h.renew(t.Context(), lease, 5*time.Minute, 0)
		require.NoError(t, err, ahead)
		require.NoError(t, renewed.Error())
		require.False(t, h.keyEnd().Before(h.sim.Now().Add(10*time.Minute)), ahead)
		require.NoError(t, h.revoke(renewed))
		h.onlyLeased()
	}
}

func TestRenew_BeyondAYear(t *testing.T) {
	t.Parallel()
	h, lease := following(t, openaitest.Options{}, nil)
	require.NoError(t, h.revoke(lease))
	h.tune(30000 * time.Hour)
	resp := h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "9000h", "max_ttl": "20000h"})
	require.Contains(t, resp.Warnings[0], "ttl 9000h0m0s exceeds the maximum key lifetime at OpenAI")
	lease = h.lease("creds/app", nil)
	age := time.Duration(0)
	for range 3 {
		h.advance(6000 * time.Hour)
		age += 6000 * time.Hour
		for _, increment := range []time.Duration{0, 8999 * time.Hour} {
			renewed, err := h.renew(t.Context(), lease, age, increment)
			require.NoError(t, err)
			require.NoError(t, renewed.Error())
			require.False(t, h.keyEnd().Before(h.now().Add(renewed.Secret.TTL-2*time.Second)), "the key covers the lease")
			require.InDelta(t, min(maxLease, 20000*time.Hour-age), renewed.Secret.TTL, float64(10*time.Second))
			lease = renewed
		}
	}
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

// Vault reads the mount's maximum after the engine, possibly much later: the call that
// extends the key waits for the rate limiter.
func TestRenew_TunedMountDoesNotExtendTheLease(t *testing.T) {
	t.Parallel()
	h, lease := following(t, openaitest.Options{}, nil)
	h.tune(time.Hour)
	secret := *lease.Secret
	secret.InternalData = throughJSON(t, lease.Secret.InternalData)
	secret.IssueTime, secret.Increment = time.Now(), 90*time.Minute
	req := &logical.Request{Operation: logical.RenewOperation, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: throughJSON(t, lease.Data)}
	resp, err := h.b.HandleRequest(t.Context(), req)
	require.NoError(t, err)
	h.tune(24 * time.Hour)
	granted, _, err := framework.CalculateTTL(h.system, 90*time.Minute, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, secret.IssueTime)
	require.NoError(t, err)
	require.False(t, h.keyEnd().Before(h.now().Add(granted)), "the key covers the lease of %s", granted)
	renewed, err := h.renew(t.Context(), h.stored(resp), 0, 90*time.Minute)
	require.NoError(t, err)
	require.InDelta(t, 90*time.Minute, renewed.Secret.TTL, float64(10*time.Second), "the next renewal uses the new maximum")
	require.NoError(t, h.revoke(renewed))
}

func TestRenew_OtherModesMakeNoCall(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{expiryMaxTTL, expiryNone} {
		for _, kind := range []string{typeAccount, typeKey} {
			h := configured(t, openaitest.Options{})
			data := map[string]any{"key_expiry": mode, "scopes": scopeChat}
			if kind == typeKey {
				h.adopted(data)
			} else {
				h.role(data)
			}
			lease := h.lease("creds/app", nil)
			h.sim.ResetRequests()
			cancel := h.sim.Fail(openaitest.Fault{Status: 500}) // would make any call fail
			h.advance(30 * time.Minute)
			renewed, err := h.renew(t.Context(), lease, 30*time.Minute, 5*time.Hour)
			require.NoError(t, err)
			require.Equal(t, 5*time.Hour, renewed.Secret.TTL)
			require.Zero(t, h.sim.Count("", ""))
			require.Equal(t, lease.Data, renewed.Data)
			require.Equal(t, lease.Secret.InternalData, renewed.Secret.InternalData)
			// A changed role does not matter either: the key keeps its expiry.
			h.must(h.write("config", map[string]any{"skip_verify": true}))
			cancel()
			h.must(h.write("roles/app", map[string]any{"key_expiry": expiryTTL}))
			h.sim.ResetRequests()
			_, err = h.renew(t.Context(), lease, 30*time.Minute, 0)
			require.NoError(t, err)
			require.Zero(t, h.sim.Count("", ""))
			require.NoError(t, h.revoke(renewed))
			require.Empty(t, h.sim.Keys())
		}
	}
}

// Whatever the result of the update, the old lease and its key stay valid as before.
func TestRenew_FailureKeepsTheLease(t *testing.T) {
	t.Parallel()
	faults := maps.Clone(apiFaults)
	faults["an expiry before the end of the lease"] = openaitest.Fault{Kind: openaitest.FaultGarbageBefore, Body: `{"id":"key_x","expires_at":1767225600}`}
	faults["no expiry"] = openaitest.Fault{Kind: openaitest.FaultGarbageBefore, Body: `{"id":"key_x","expires_at":null}`}
	faults["a spend limit"] = openaitest.Fault{Status: 429, Code: "project_spend_limit_exceeded"}
	faults["a policy"] = openaitest.Fault{Status: 400, Code: "key_expiration_too_long", Message: "at most 60"}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, lease := following(t, openaitest.Options{}, nil)
			h.hangs(fault.Kind)
			h.advance(8 * time.Minute)
			before := h.keyEnd()
			internal, data := maps.Clone(lease.Secret.InternalData), maps.Clone(lease.Data)
			fault := fault
			fault.Method, fault.Route = http.MethodPost, routeKey
			cancel := h.sim.Fail(fault)
			ctx, stop := context.WithTimeout(t.Context(), 8*time.Second)
			defer stop()
			resp, err := h.renew(ctx, lease, 8*time.Minute, 0)
			if name == "missing key" { // harmless: an update does not return the key
				require.NoError(t, err)
				require.NoError(t, h.revoke(resp))
				return
			}
			require.True(t, err != nil || resp.IsError())
			said := fmt.Sprint(err, resp)
			require.Contains(t, said, `lease of role "app" not renewed`)
			require.Equal(t, internal, lease.Secret.InternalData)
			require.Equal(t, data, lease.Data)
			require.False(t, h.keyEnd().Before(before))
			require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
			require.Empty(t, h.walEntries())

			// After the fault, the next renewal extends the key.
			cancel()
			renewed, err := h.renew(t.Context(), lease, 8*time.Minute, 0)
			require.NoError(t, err)
			require.False(t, h.keyEnd().Before(h.now().Add(renewed.Secret.TTL)))
			require.NoError(t, h.revoke(lease), "the old lease also works")
			h.onlyLeased()
		})
	}
}

// If Vault does not store a renewal, the key is still deleted.
func TestRenew_UnstoredRenewalStillDeletesTheKey(t *testing.T) {
	t.Parallel()
	h, lease := following(t, openaitest.Options{}, nil)
	_, err := h.renew(t.Context(), lease, 0, 2*time.Hour)
	require.NoError(t, err)
	h.advance(10*time.Minute + expiryMargin + 2*clockSlack)
	require.Len(t, h.sim.Keys(), 1, "by the data of the lease, the key has expired")
	require.NoError(t, h.revoke(lease))
	h.rollback()
	h.onlyLeased()
}

func TestRenew_Errors(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		before func(h *harness, lease *logical.Response)
		said   string
		calls  int
	}{
		"the key has expired": {func(h *harness, _ *logical.Response) {
			h.advance(12 * time.Minute)
		}, "Expired API keys cannot be updated", 1},
		"the key was deleted": {func(h *harness, lease *logical.Response) {
			require.NoError(h.t, h.api().DeleteProjectKey(h.t.Context(), h.project, lease.Data["api_key_id"].(string)))
		}, "No API key found", 3},
		"the account was deleted": {func(h *harness, lease *logical.Response) {
			h.sim.DeleteServiceAccount(h.project, lease.Data["service_account_id"].(string))
		}, "No API key found", 3},
		"the project was archived": {func(h *harness, _ *logical.Response) { h.sim.ArchiveProject(h.project) }, "is archived", 1},
		"the role was deleted":     {func(h *harness, _ *logical.Response) { h.must(h.remove("roles/app")) }, "not found", 0},
		"the config was deleted":   {func(h *harness, _ *logical.Response) { h.must(h.remove("config")) }, "no admin key", 0},
		"the role has a shorter max_ttl": {func(h *harness, _ *logical.Response) {
			h.must(h.write("roles/app", map[string]any{"ttl": "1m", "max_ttl": "5m"}))
		}, "past the max TTL", 0},
		"the policy is stricter": {func(h *harness, _ *logical.Response) {
			h.sim.Configure(func(o *openaitest.Options) { o.MaxKeyLifetime = time.Minute })
		}, "key_expiration_too_long", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, lease := following(t, openaitest.Options{}, nil)
			h.advance(6 * time.Minute)
			test.before(h, lease)
			h.sim.ResetRequests()
			resp, err := h.renew(t.Context(), lease, 6*time.Minute, 0)
			require.Nil(t, resp, "Vault would print it as a Go value")
			require.ErrorContains(t, err, test.said)
			require.Equal(t, http.StatusBadRequest, coded(t, err))
			require.Equal(t, test.calls, h.sim.Count("", ""))
			h.configure(nil)
			require.NoError(t, h.revoke(lease))
			h.runPeriodicWork()
			h.onlyLeased()
		})
	}
}

func TestRenew_RetriesWithTheRotatedAdminKey(t *testing.T) {
	t.Parallel()
	h, lease := following(t, openaitest.Options{}, nil)
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0})) // for the rotation below
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Times: 1, Status: 401, OnStrike: func(*http.Request) {
		if _, err := h.write("config/rotate", nil); err != nil {
			t.Error(err)
		}
	}})
	h.advance(8 * time.Minute)
	renewed, err := h.renew(t.Context(), lease, 8*time.Minute, 0)
	require.NoError(t, err)
	require.WithinDuration(t, h.now().Add(10*time.Minute+expiryMargin), h.keyEnd(), 30*time.Second)
	require.NoError(t, h.revoke(renewed))
	h.onlyLeased()
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRenew_WithVaultTwoMinutesAhead(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.mu.Lock()
	h.offset += 2 * time.Minute
	h.mu.Unlock()
	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "2h"})
	lease := h.lease("creds/app", nil)
	h.advance(5 * time.Minute)
	renewed, err := h.renew(t.Context(), lease, 5*time.Minute, 0)
	t.Log(err)
	require.NoError(t, err)
	require.NoError(t, h.revoke(renewed))
}

func TestRenew_WithVaultFiveMinutesBehind(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.mu.Lock()
	h.offset -= 5 * time.Minute
	h.mu.Unlock()
	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "2h"})
	lease := h.lease("creds/app", nil)
	h.advance(5 * time.Minute)
	renewed, err := h.renew(t.Context(), lease, 5*time.Minute, 0)
	require.NoError(t, err)
	require.NoError(t, renewed.Error())
	end := h.sim.Now().Add(renewed.Secret.TTL)
	require.False(t, h.keyEnd().Before(end), "the key expires at %s, its lease at %s", h.keyEnd(), end)
	require.NoError(t, h.revoke(renewed))
}

// If a lease was issued, or its key extended, while the clock was ahead, the recorded
// expiry of the key is later than the one at OpenAI.
func TestRenew_ExtendsTheKeyAfterAFastClock(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{30 * time.Minute, 5 * time.Hour} {
		for _, restarted := range []bool{false, true} {
			t.Run(fmt.Sprint(ahead, restarted), func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				h.setClock(ahead)
				h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "2h"})
				lease := h.lease("creds/app", nil)
				h.setClock(0)
				if restarted {
					h.restart()
				}
				if restarted && ahead < 2*time.Hour {
					h.lease("creds/app", nil) // shows OpenAI's clock
					h.sim.KeepAll()
				}
				renewed, err := h.renew(t.Context(), lease, 0, time.Hour)
				require.NoError(t, err)
				require.NoError(t, renewed.Error())
				h.advance(30 * time.Minute)
				require.Equal(t, http.StatusOK, h.inference(lease, http.MethodGet, "/models"))
				require.NoError(t, h.revoke(renewed))
			})
		}
	}
}

// With a clock that is ahead, a key seems to expire sooner than it does. Its expiry must
// not move to an earlier time: the longer lease may be in a snapshot.
func TestRenew_AClockThatIsAheadShortensNoKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "20m", "max_ttl": "10h"})
	lease, err := h.renew(t.Context(), h.lease("creds/app", nil), time.Minute, time.Hour)
	require.NoError(t, err)
	ends := h.keyEnd()
	h.setClock(h.offset + 50*time.Minute) // only of this server
	for range 2 {
		lease, err = h.renew(t.Context(), lease, time.Minute, 20*time.Minute)
		require.NoError(t, err)
		require.WithinDuration(t, ends, h.keyEnd(), 2*time.Second)
	}
	require.NoError(t, h.revoke(lease))
}

// A failed restoration is an error, and the next renewal restores the expiry, although
// the lease's data contains a later one.
func TestRenew_AnExpiryThatWasNotRestoredIsMovedByTheNextRenewal(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "20m", "max_ttl": "10h"})
	lease, err := h.renew(t.Context(), h.lease("creds/app", nil), time.Minute, time.Hour)
	require.NoError(t, err)
	offset := h.offset
	h.setClock(offset + 50*time.Minute)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Skip: 1, Times: 1, Status: http.StatusForbidden, Message: "no"})
	_, err = h.renew(t.Context(), lease, time.Minute, 20*time.Minute)
	require.ErrorContains(t, err, "before the lease; renew it again")
	require.True(t, h.keyEnd().Before(time.Now().Add(30*time.Minute)), "the expiry was shortened")
	h.setClock(offset)
	lease, err = h.renew(t.Context(), lease, time.Minute, 50*time.Minute)
	require.NoError(t, err)
	require.False(t, h.keyEnd().Before(time.Now().Add(50*time.Minute)))
	require.NoError(t, h.revoke(lease))
}
