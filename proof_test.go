package openaisecrets

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/sysview"
)

// unprovenNotFounds are 404s that prove nothing about the account or key.
var unprovenNotFounds = map[string]string{
	"OpenAI's for an unknown URL":       `{"error":{"message":"Unknown request URL: DELETE /v1/organization/x. Please check the URL for typos.","type":"invalid_request_error","param":null,"code":"unknown_url"}}`,
	"OpenAI's for an invalid URL":       `{"error":{"message":"Invalid URL (DELETE /v1/organization/x)","type":"invalid_request_error","param":null,"code":null}}`,
	"the default of a framework":        `{"timestamp":"2026-11-26T10:00:00Z","status":404,"error":"Not Found","path":"/v1/organization/x"}`,
	"a bare string":                     `{"error":"Not Found"}`,
	"an API gateway's, without a route": `{"error":{"message":"no Route matched with those values","type":"not_found"}}`,
	"Google's form":                     `{"error":{"code":404,"message":"Requested entity was not found.","status":"NOT_FOUND"}}`,
	"an error object with a number":     `{"error":{"message":"Not found","type":404,"code":"not_found"}}`,
	"an envelope of another kind":       `{"message":"Not Found","code":"not_found","type":"error"}`,
	"an empty object":                   `{"error":{}}`,
	"an empty body":                     ``,
	"a page":                            `<html><title>404 Not Found</title></html>`,
	"a list":                            `[]`,
	// In OpenAI's form, but not OpenAI's: only a read of the account or key shows it.
	"an imitation of OpenAI's": `{"error":{"message":"No such thing.","type":"invalid_request_error","param":null,"code":"not_found"}}`,
}

// forEachUnprovenNotFound runs a test for each of these 404s on DELETE only, and for an
// endpoint that answers 404 to all calls.
func forEachUnprovenNotFound(t *testing.T, test func(t *testing.T, deletes openaitest.Fault)) {
	t.Helper()
	t.Parallel()
	for name, body := range unprovenNotFounds {
		fault := openaitest.Fault{Method: http.MethodDelete, Status: 404, Route: "/organization/*", Body: body}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, fault)
		})
		t.Run(name+", to every call", func(t *testing.T) {
			t.Parallel()
			fault := fault
			fault.Method = ""
			test(t, fault)
		})
	}
}

func TestProof_UnprovenNotFoundFailsRevocation(t *testing.T) {
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			forEachUnprovenNotFound(t, func(t *testing.T, deletes openaitest.Fault) {
				h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: kind == typeKey})
				account := ""
				if kind == typeKey {
					account = h.adopted(nil)
				}
				lease := h.lease("creds/app", nil)
				h.advance(time.Hour)
				if kind == typeKey { // or the update that expires the key would succeed
					deletes.Method = ""
				}
				cancel := h.sim.Fail(deletes)
				require.Error(t, h.revoke(lease))
				require.Len(t, h.walEntries(), 1)
				h.runPeriodicWork()
				require.Len(t, h.walEntries(), 1, "the WAL does not take it for a deletion")
				require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
				cancel()
				h.restart() // forgets what the process has learned
				require.NoError(t, h.revoke(lease))
				h.advance(2 * time.Second)
				require.Equal(t, 401, h.inference(lease, http.MethodGet, "/models"))
				h.runPeriodicWork()
				if kind == typeKey {
					h.onlyKeys(account)
				} else {
					h.onlyLeased()
				}
			})
		})
	}
}

func TestProof_UnprovenNotFoundFailsStaticRoleDeletion(t *testing.T) {
	forEachUnprovenNotFound(t, func(t *testing.T, deletes openaitest.Fault) {
		h := withStatic(t, openaitest.Options{})
		h.static("batch", nil)
		h.advance(time.Hour)
		cancel := h.sim.Fail(deletes)
		resp := h.must(h.remove("static-roles/batch"))
		require.Contains(t, fmt.Sprint(resp.Warnings), "Queued for deletion")
		require.Len(t, h.sim.Accounts(), 1)
		h.runPeriodicWork()
		require.Len(t, h.walEntries(), 1)
		cancel()
		h.restart()
		h.runPeriodicWork()
		require.Empty(t, h.sim.Accounts())
		require.Empty(t, h.walEntries())
	})
}

// The calls of a proof: none while deletes succeed, two reads for the first 404 of a
// project, one for later ones.
func TestProof_NumberOfReads(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	var leases []*logical.Response
	for range 5 {
		leases = append(leases, h.lease("creds/app", nil))
	}
	h.advance(time.Hour)
	h.sim.ResetRequests()
	require.NoError(t, h.revoke(leases[0]))
	require.Equal(t, 1, h.sim.Count("", ""))
	for i, lease := range leases[1:] {
		h.sim.DeleteServiceAccount(h.project, lease.Data["service_account_id"].(string))
		h.sim.ResetRequests()
		require.NoError(t, h.revoke(lease))
		if i == 0 {
			require.Equal(t, 3, h.sim.Count("", ""))
			continue
		}
		require.Equal(t, 2, h.sim.Count("", ""))
	}
	require.Empty(t, h.walEntries())

	// Another admin key has proven nothing yet.
	lease := h.lease("creds/app", nil)
	h.advance(time.Hour)
	h.sim.DeleteServiceAccount(h.project, lease.Data["service_account_id"].(string))
	h.must(h.write("config/rotate", nil))
	h.sim.ResetRequests()
	require.NoError(t, h.revoke(lease))
	require.Equal(t, 3, h.sim.Count("", ""))
	h.sim.KeepAll()
}

func TestProof_InvisibleProjectProvesNothing(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	h.advance(time.Hour)
	h.sim.Fail(openaitest.Fault{Route: routeProject, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: `{"object":"organization.project","id":"proj_other","status":"active"}`})
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 2, Status: 404, Code: "service_account_not_found", Message: "No service account found."})
	require.ErrorContains(t, h.revoke(lease), "has ID")
	h.sim.Fail(openaitest.Fault{Route: routeProject, Times: 1, Status: 404, Code: "project_not_found", Message: "No project found."})
	require.ErrorContains(t, h.revoke(lease), "project "+h.project+" not found in the admin key's organization")
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

// A lagging server of OpenAI does not find a new account yet.
func TestProof_NotFoundNewCredentialIsCheckedAgain(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	lagging := []func(){
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: routeAccount, Status: 404, Code: "service_account_not_found", Message: "No service account found with id."}),
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeAccount, Status: 404, Code: "service_account_not_found", Message: "No service account found with id."}),
	}
	require.NoError(t, h.revoke(lease), "the revocation succeeds")
	require.Len(t, h.walEntries(), 1)
	h.rollback()
	require.Len(t, h.walEntries(), 1)
	require.NotContains(t, h.log.String(), "incomplete", "waiting is not a failure")
	lagging[0]()
	lagging[1]()
	h.rollback()
	require.Equal(t, 401, h.inference(lease, http.MethodGet, "/models"))
	h.onlyLeased()

	// The 404 of a deleted account is final once the account is old enough.
	lease = h.lease("creds/app", nil)
	h.sim.DeleteServiceAccount(h.project, lease.Data["service_account_id"].(string))
	require.NoError(t, h.revoke(lease))
	h.rollback()
	require.Len(t, h.walEntries(), 1)
	h.advance(notFinalBefore)
	h.rollback()
	h.onlyLeased()
}

// The age counts from the create, although the entry is younger.
func TestProof_AgeCountsFromTheCreate(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	delete(lease.Secret.InternalData, "created_at") // as in leases from before this field
	lease.Secret.IssueTime = h.now().Add(-time.Hour)
	h.sim.DeleteServiceAccount(h.project, lease.Data["service_account_id"].(string))
	require.NoError(t, h.revoke(lease))
	require.Empty(t, h.walEntries())
}

func TestProof_UpdateOfNotFoundNewKeyIsRetried(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"scopes": scopeChat})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Times: 2, Status: 404, Code: "api_key_not_found", Message: "No API key found."})
	lease := h.lease("creds/app", nil)
	require.Equal(t, []string{scopeChat}, h.sim.Keys()[0].Scopes)
	require.NoError(t, h.revoke(lease))

	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "2h"})
	lease = h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Times: 2, Status: 404, Code: "api_key_not_found", Message: "No API key found."})
	resp, err := h.renew(t.Context(), lease, time.Minute, 10*time.Minute)
	require.NoError(t, err)
	require.NoError(t, resp.Error())
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

// An account may exist although no listing shows it yet.
func TestProof_AbsenceOfANewAccountIsNotFinal(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.advance(walMinAge)
	stale := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeAccounts, Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`})
	h.rollback()
	require.Len(t, h.walEntries(), maxAttempts)
	require.Len(t, h.sim.Accounts(), maxAttempts)
	stale()
	h.rollback()
	h.onlyLeased()
}

// A throttled endpoint does not delay other work of the mount.
func TestPeriodic_ThrottledEndpointDoesNotDelayOthers(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	tick := func() {
		h.t.Helper()
		_, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
		require.NoError(t, err)
	}
	lease := h.lease("creds/app", nil)
	stop := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: routeAccount, Status: 429, Message: "slow down"})
	defer stop()
	_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: lease.Data["service_account_id"].(string)})
	require.NoError(t, err)
	tick()
	require.Eventually(t, func() bool { return h.sim.Count(http.MethodDelete, routeAccount) > 0 }, 20*time.Second, 10*time.Millisecond, "the run has begun")

	// A superseded admin key, and a key on an endpoint that is not throttled.
	superseded := h.adminKeyIDs()[0]
	h.must(h.write("config/rotate", nil))
	id := h.sim.AddServiceAccount(h.project, "batch")
	h.must(h.write("roles/keys", map[string]any{"project_id": h.project, "credential_type": typeKey, "service_account_id": id}))
	key := h.stored(h.must(h.read("creds/keys")))
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: routeKey, Times: 4, Status: 500})
	require.Error(t, h.revoke(key))
	h.advance(6 * time.Minute)
	h.b.tidy.note(func(s *tidyStatus) { *s = tidyStatus{} })
	require.NoError(t, putTidyEntry(t.Context(), h.storage, h.now().Add(-24*time.Hour)))
	require.Eventually(t, func() bool {
		tick()
		tidied := !h.b.tidy.current().started.IsZero()
		return tidied && h.inference(key, http.MethodGet, "/models") == 401 && !slices.Contains(h.adminKeyIDs(), superseded)
	}, 20*time.Second, 100*time.Millisecond, "the superseded admin key, the key of the free endpoint and tidy do not wait")
}

func TestDisable_DeletesExpiredCredentials(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "720h"})
	lease := h.lease("creds/app", nil)
	_, err := h.renew(t.Context(), lease, time.Minute, 700*time.Hour)
	require.NoError(t, err) // but Vault could not store the renewal
	h.advance(14 * time.Minute)
	h.system.TaintedVal = true
	h.rollback()
	require.NoError(t, h.revoke(lease))
	h.b.Cleanup(context.Background())
	require.Empty(t, h.sim.Keys(), "keys that work after the mount is deleted")
	h.onlyLeased()
}

// After a clock step, entries that requests still use look old.
func TestIssue_ClockStepDeletesNothingInProgress(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{ActivationDelay: 1500 * time.Millisecond})
	type result struct {
		resp *logical.Response
		err  error
	}
	done := make(chan result, 1)
	go func() {
		resp, err := h.read("creds/app")
		done <- result{resp, err}
	}()
	require.Eventually(t, func() bool { return len(h.sim.Accounts()) == 1 }, 20*time.Second, 5*time.Millisecond)
	h.runPeriodicWork()
	h.mu.Lock()
	h.offset += time.Hour
	h.mu.Unlock()
	h.rollback()
	got := <-done
	require.NoError(t, got.err)
	require.NoError(t, got.resp.Error())
	require.Len(t, h.sim.Accounts(), 1)
	require.NoError(t, h.revoke(h.stored(got.resp)))
	h.onlyLeased()
}

// After two concurrent renewals, the key has the later expiry, in either order.
func TestRenew_ConcurrentRenewalsKeepTheLaterExpiry(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"key_expiry": expiryTTL, "ttl": "10m", "max_ttl": "720h"})
	lease := h.lease("creds/app", nil)
	first := make(chan *logical.Response, 1)
	began := make(chan struct{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Times: 1, Kind: openaitest.FaultSlow, Delay: 200 * time.Millisecond, OnStrike: func(*http.Request) { close(began) }})
	go func() {
		resp, err := h.renew(context.Background(), lease, time.Minute, 10*time.Hour)
		if err != nil {
			t.Error(err)
		}
		first <- resp
	}()
	<-began
	second, err := h.renew(t.Context(), lease, time.Minute, time.Hour)
	require.NoError(t, err)
	for _, granted := range []*logical.Response{<-first, second} {
		require.GreaterOrEqual(t, h.sim.Keys()[0].ExpiresAt.Sub(h.sim.Now()), granted.Secret.TTL)
	}
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

// Another Vault with a copy of this storage finds entries of credentials that were
// returned later. A used credential must have been returned.
func TestWAL_UsedCredentialIsReportedAndRetained(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			account := ""
			if kind == typeKey {
				account = h.adopted(nil)
			}
			lease := h.lease("creds/app", nil)
			c := credential{Version: credentialVersion, Type: kind, ProjectID: h.project, CreatedAt: h.now()}
			if kind == typeKey {
				c.ID, c.KeyName = account, lease.Secret.InternalData["api_key_name"].(string)
			} else {
				c.Name = lease.Data["service_account"].(string)
			}
			id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
			require.NoError(t, err)
			h.b.wal.release(id)
			h.advance(10 * time.Minute)
			require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
			h.sim.ResetRequests()
			h.rollback()
			require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
			require.Len(t, h.walEntries(), 1)
			require.Contains(t, h.log.String(), "another Vault with a copy of this storage")
			require.Equal(t, 1, h.sim.Count(http.MethodGet, routeKeys))
			entries, _, kept := h.b.wal.totals()
			require.Equal(t, []int{0, 1}, []int{entries, kept}, "a retained entry is not a backlog")
			require.NotContains(t, h.log.String(), "incomplete")

			// The entry ends once its key has expired.
			h.advance(defaultMaxTTL + time.Hour)
			h.rollback()
			require.Empty(t, h.walEntries())
			if kind == typeKey {
				h.onlyKeys(account)
			} else {
				h.onlyLeased()
			}
		})
	}
}

// An incomplete listing of keys does not prove that a key is unused: the engine creates no
// account without a key.
func TestWAL_ListingWithoutTheUsedKeyDeletesNothing(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: h.now(), Name: lease.Data["service_account"].(string)}
	id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(10 * time.Minute)
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	h.rollback()
	require.Len(t, h.walEntries(), 1)
	require.InDelta(t, 1, h.measured()["vault_openai_wal_entries_retained{}"], 0)

	empty := `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKeys, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: empty})
	h.advance(keptFor + time.Minute)
	h.rollback()
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	require.Len(t, h.walEntries(), 1)
	h.advance(keptFor + time.Minute)
	h.rollback()
	require.InDelta(t, 1, h.measured()["vault_openai_wal_entries_retained{}"], 0)

	h.advance(defaultMaxTTL + time.Hour) // its key has expired
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusForbidden, Message: "no"})
	h.rollback()
	require.Len(t, h.walEntries(), 1)
	require.InDelta(t, 0, h.measured()["vault_openai_wal_entries_retained{}"], 0, "it is pending again")
	h.sim.ClearFaults()
	h.rollback()
	h.onlyLeased()
}

// An account whose key was deleted by hand is deleted after the second listing, some
// minutes after the first.
func TestWAL_AccountWithoutKeyIsDeletedAfterTwoListings(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.role(nil)
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultLost})
		_, err := h.read("creds/app")
		require.Error(t, err)
		_, admin := h.sim.AdminKey()
		for _, k := range h.sim.Keys() { // deleted by hand
			r := httptest.NewRequest(http.MethodDelete, "/v1/organization/projects/"+h.project+"/api_keys/"+k.ID, nil)
			r.Header.Set("Authorization", "Bearer "+admin)
			h.sim.ServeHTTP(httptest.NewRecorder(), r)
		}
		require.Empty(t, h.sim.Keys())
		stop := h.ticking()
		defer stop()
		time.Sleep(3 * time.Minute)
		require.Len(t, h.walEntries(), maxAttempts)
		time.Sleep(2 * notFinalBefore)
		h.onlyLeased()
	})
}

func TestWAL_FutureCreationTimeIsReset(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.mu.Lock()
	h.offset = 40 * 24 * time.Hour
	h.mu.Unlock()
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.mu.Lock()
	h.offset = 0
	h.mu.Unlock()
	h.restart()
	h.rollback()
	require.Len(t, h.walEntries(), maxAttempts)
	require.Contains(t, h.log.String(), "creation time in the future")
	h.advance(walMinAge)
	h.rollback()
	h.onlyLeased()
}

// A failed revocation that succeeds later leaves no entry, and a repeated one
// keeps the time of the first.
func TestRevoke_DeletesItsWALEntry(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	stop := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 403, Message: "no"})
	require.Error(t, h.revoke(lease))
	_, first, _ := h.b.wal.totals()
	h.advance(time.Hour)
	require.Error(t, h.revoke(lease))
	_, again, _ := h.b.wal.totals()
	require.Equal(t, first, again)
	stop()
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

// A run that cannot succeed reads only the entries that it tries.
func TestWAL_StopsReadingAfterSystemicFailures(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	const n = 300
	for i := range n {
		_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: fmt.Sprint("user-", i)})
		require.NoError(t, err)
	}
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 401, Message: "no"})
	counted := &watchedStorage{Storage: h.storage}
	req := &logical.Request{Storage: counted, MountPoint: "openai/"}
	require.Error(t, h.runAllWAL(client.Background(t.Context()), req, 0))
	require.Less(t, counted.reads.Load(), int64(4*(maxSystemicFailures+workers)))
	require.Len(t, h.walEntries(), n)
	h.sim.KeepAll()
}

// Entries whose key may still work come first, in random order.
func TestWALIndex_LiveKeysFirst(t *testing.T) {
	t.Parallel()
	x, now := newWALIndex(), time.Now()
	for i := range 100 {
		c := credential{KeyExpires: now.Add(time.Hour)}
		if i%2 == 0 {
			c.KeyExpires = now.Add(-time.Hour)
		}
		x.put(fmt.Sprint(i%2, "-", i), newWALNote(walRevokedAccount, now.Add(-time.Minute), c))
	}
	x.put("another kind", newWALNote(walKey, now, credential{}))
	x.use("1-1")
	ids := x.due(walRevokedAccount, now, 0)
	require.Len(t, ids, 99)
	for _, id := range ids[:49] {
		require.Equal(t, "1-", id[:2])
	}
	require.NotEqual(t, ids, x.due(walRevokedAccount, now, 0))
	require.Empty(t, x.due(walRevokedAccount, now, 2*time.Minute))
}

// The memory of the index of a hundred thousand entries.
func TestWAL_HundredThousandEntries(t *testing.T) { //nolint:paralleltest // it measures the process's memory
	const n = 100_000
	x := newWALIndex()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	ids := make([]string, n)
	for i := range ids {
		ids[i] = revokedID(credential{ProjectID: "proj", ID: fmt.Sprint(i)})
		x.put(ids[i], newWALNote(fmt.Sprint(walRevokedAccount), time.Now(), credential{}))
	}
	require.Empty(t, x.listed(ids, time.Now()))
	require.Len(t, x.due(walRevokedAccount, time.Now(), math.MinInt64), n)
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(x)
	taken := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) >> 20
	t.Logf("%d entries take %d MiB", n, taken)
	require.Less(t, taken, int64(64))
}

// A run that used up its time is followed by another immediately, so that the rate limit
// is fully used.
func TestWAL_BacklogIsProcessedAtTheRateLimit(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		const n, perMinute = 600, 60
		h.configure(nil)
		for i := range n {
			c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: h.sim.AddServiceAccount(h.project, fmt.Sprint("left-", i))}
			_, err := h.b.recordRevocation(t.Context(), h.storage, c)
			require.NoError(t, err)
		}
		next := h.sim.Now()
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 429, Message: "slow down", Match: func(*http.Request) bool {
			now := h.sim.Now()
			if now.Before(next) {
				return true
			}
			next = now.Add(time.Minute / perMinute)
			return false
		}})
		stop := h.ticking()
		defer stop()
		began := time.Now()
		for len(h.walEntries()) > 0 && time.Since(began) < time.Hour {
			time.Sleep(time.Second)
		}
		took := time.Since(began)
		t.Logf("%d deletes at %d a minute took %s", n, perMinute, took)
		require.Less(t, took, 2*n/perMinute*time.Minute)
		require.Empty(t, h.walEntries())
	})
}

// The entry of a request in progress may be deleted at any time, and must not be written
// again.
func TestWAL_RefreshSkipsEntriesInUse(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.setClock(5 * time.Minute)
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: h.now().UTC(), Name: "vault-app-x"}
	id, err := h.b.beginWAL(t.Context(), h.storage, walAccount, c)
	require.NoError(t, err)
	h.setClock(0)
	counted := &watchedStorage{Storage: h.storage}
	h.storage.fail(storageFault{write: -1}) // records the writes
	require.NoError(t, h.b.refreshWAL(t.Context(), &logical.Request{Storage: counted, MountPoint: "openai/"}))
	require.Empty(t, h.storage.writes)
	require.NoError(t, h.b.deleteWAL(t.Context(), h.storage, id))
}

// The index has entries that were written while the clock was ahead.
func TestWAL_IndexedEntriesAreCorrectedWithTheClock(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.setClock(40 * 24 * time.Hour)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	h.rollback() // adds them to the index
	require.NotEmpty(t, h.walEntries())
	h.setClock(0)
	h.rollback()
	h.advance(10 * time.Minute)
	h.rollback()
	h.onlyLeased()
}

// A revocation has an entry whose create was recorded while the clock was ahead.
func TestWAL_RevokedEntryWithFutureCreationTimeIsProcessed(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.setClock(40 * 24 * time.Hour)
	lease := h.lease("creds/app", nil)
	h.sim.DeleteServiceAccount(h.project, lease.Data["service_account_id"].(string))
	require.NoError(t, h.revoke(lease)) // proven, but new: the WAL checks it again
	require.Len(t, h.walEntries(), 1)
	h.setClock(0)
	h.rollback()
	h.advance(10 * time.Minute)
	h.rollback()
	h.onlyLeased()
}

// OpenAI lists the owner of a key in the other documented form.
func TestWAL_UsedKeyIsFoundInEveryFormOfOwner(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: h.now(), Name: lease.Data["service_account"].(string)}
	id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(10 * time.Minute)
	keys, err := h.api().ListProjectKeys(h.t.Context(), h.project)
	require.NoError(t, err)
	o := keyObject(keys[0], map[string]any{"type": "user", "user": owner(keys[0].AccountID)})
	o["last_used_at"] = h.sim.Now().Unix()
	h.listed([]any{o})
	h.rollback()
	h.sim.KeepAll()
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	require.Len(t, h.walEntries(), 1)
}

// One rejected entry must not prevent the drain from retrying others.
func TestDisable_RetriesAlthoughAnotherEntryFails(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	refused := h.lease("creds/app", nil)
	lease := h.lease("creds/app", nil)
	for _, l := range []*logical.Response{refused, lease} {
		_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: l.Data["service_account_id"].(string), CreatedAt: h.now()})
		require.NoError(t, err)
	}
	rid, lid := refused.Data["service_account_id"].(string), lease.Data["service_account_id"].(string)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 403, Message: "no", Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, rid) }})
	var n atomic.Int64
	h.sim.Fail(openaitest.Fault{Route: routeAccount, Status: 404, Code: "service_account_not_found", Message: "No service account found.", Match: func(r *http.Request) bool {
		return strings.HasSuffix(r.URL.Path, lid) && n.Add(1) < 6
	}})
	h.system.TaintedVal = true
	time.Sleep(sysview.FreshFor)
	h.rollback()
	require.Equal(t, 401, h.inference(lease, http.MethodGet, "/models"))
	h.sim.KeepAll()
}

// A short outage during the drain.
func TestDisable_RetriesTransientServerErrors(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: lease.Data["service_account_id"].(string), CreatedAt: h.now()})
	require.NoError(t, err)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 500, Times: 6})
	h.system.TaintedVal = true
	time.Sleep(sysview.FreshFor)
	h.rollback()
	require.Equal(t, 401, h.inference(lease, http.MethodGet, "/models"))
	h.sim.KeepAll()
}

// Many entries in a project that the admin key cannot read.
func TestWAL_LimitsCallsInAnUnknownProject(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for i := range 200 {
		_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: "proj_gone", ID: fmt.Sprint("user-", i)})
		require.NoError(t, err)
	}
	h.sim.ResetRequests()
	h.rollback()
	require.Less(t, h.sim.Count("", ""), 50)
}

// OpenAI's own 404 quotes the ID, which may contain any text.
func TestProof_IDMayContainTheWordURL(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	id := "user-7url9XkQ"
	h.sim.Fail(openaitest.Fault{Route: routeAccount, Status: 404, Code: "service_account_not_found", Message: "No service account found with id '" + id + "' in project '" + h.project + "'."})
	_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: id, CreatedAt: h.now().Add(-time.Hour)})
	require.NoError(t, err)
	h.rollback()
	require.Empty(t, h.walEntries())
}

// This server's clock is behind OpenAI's: the probe of a crashed request must not count as
// use.
func TestWAL_ProbeDoesNotCountAsUseWithSlowClock(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.setClock(-3 * time.Minute)       // only the engine's clock
	lease := h.lease("creds/app", nil) // probed at its issue
	created, _ := time.Parse(time.RFC3339, lease.Secret.InternalData["created_at"].(string))
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: created, Name: lease.Data["service_account"].(string)}
	id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(10 * time.Minute)
	h.rollback()
	h.onlyLeased()
}

// This server's clock is ahead of OpenAI's.
func TestWAL_UseIsDetectedWithFastClock(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.setClock(9 * time.Minute) // only the engine's clock; maxSkew allows it
	lease := h.lease("creds/app", nil)
	created, _ := time.Parse(time.RFC3339, lease.Secret.InternalData["created_at"].(string))
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: created, Name: lease.Data["service_account"].(string)}
	id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(8 * time.Minute)
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models")) // eight minutes after the create
	h.rollback()
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	h.sim.KeepAll()
}

// A key that OpenAI shows as expired counts as deleted, whatever the answer to its delete.
func TestProof_ExpiredKeyCountsAsDeleted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.adopted(nil)
	lease := h.lease("creds/app", nil)
	h.advance(defaultMaxTTL + 2*time.Hour)
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: routeKey, Status: 404, Code: "api_key_not_found", Message: "No API key found."})
	require.NoError(t, h.revoke(lease))
	h.rollback()
	require.Empty(t, h.walEntries())
	h.sim.KeepAll()
}

// A disable logs retained entries.
func TestDisable_LogsRetainedEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: h.now(), Name: lease.Data["service_account"].(string)}
	id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(10 * time.Minute)
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	h.rollback()
	before := len(h.log.String())
	h.system.TaintedVal = true
	time.Sleep(sysview.FreshFor)
	h.rollback()
	require.Contains(t, h.log.String()[before:], "credential remains at OpenAI")
	h.sim.KeepAll()
}

// A 404 about the project proves nothing about the account, even if the project was read
// before.
func TestProof_NotFoundProjectProvesNothingAboutTheAccount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	first, lease := h.lease("creds/app", nil), h.lease("creds/app", nil)
	h.advance(time.Hour)
	h.sim.DeleteServiceAccount(h.project, first.Data["service_account_id"].(string))
	require.NoError(t, h.revoke(first)) // proves that the project is visible
	stop := h.sim.Fail(openaitest.Fault{Route: "/organization/projects/*", Status: 404, Code: "project_not_found", Message: "No project found with id '" + h.project + "'."})
	require.Error(t, h.revoke(lease))
	stop()
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	h.sim.KeepAll()
}

// A deletion that OpenAI confirms to this process is final even for a new account or key:
// otherwise, a disable would wait for it.
func TestProof_ConfirmedDeletionIsFinal(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		h := configured(t, openaitest.Options{})
		account := ""
		if kind == typeKey {
			account = h.adopted(nil)
		}
		lease := h.lease("creds/app", nil)
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: 403, Message: "no"})
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Times: 1, Status: 403, Message: "no"})
		if kind == typeKey {
			h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKey, Times: 1, Status: 403, Message: "no"})
		}
		require.Error(t, h.revoke(lease))
		h.sim.ClearFaults()
		h.rollback()
		require.Empty(t, h.walEntries())
		require.NoError(t, h.revoke(lease), "Vault's next attempt")
		require.Empty(t, h.walEntries())
		if kind == typeKey {
			h.onlyKeys(account)
		} else {
			h.onlyLeased()
		}
	}
}

// If a worker does not end in time, the WAL is not processed, and its entries are logged.
func TestDisable_LogsEntriesWhenAWorkerDoesNotEnd(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	lease := h.lease("creds/app", nil)
	id := lease.Data["service_account_id"].(string)
	_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: id})
	require.NoError(t, err)
	release, err := h.b.work.refresh.Wait(t.Context())
	require.NoError(t, err)
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.Error(t, h.b.drain(ctx, &logical.Request{Storage: h.storage, MountPoint: "openai/"}, drainBudget))
	lines := h.lines("credential remains at OpenAI")
	require.Len(t, lines, 1)
	require.Equal(t, id, lines[0]["service_account_id"])
	require.Len(t, h.lines("superseded admin key remains at OpenAI"), 1)
}

// Two listings without a key count as two only if no listing between them shows it.
func TestWAL_ListingThatShowsAKeyResetsTheOneThatDidNot(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, CreatedAt: h.now(), Name: lease.Data["service_account"].(string)}
	id, err := h.b.beginWAL(t.Context(), h.storage, walKind(c, false), c)
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(10 * time.Minute)
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	account := lease.Data["service_account_id"].(string)
	h.unseenBefore(account)
	h.rollback()
	require.Len(t, h.walEntries(), 1, "this listing shows the used key")

	empty := `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKeys, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: empty})
	h.advance(keptFor + time.Minute)
	h.rollback()
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	require.Len(t, h.walEntries(), 1)

	h.advance(defaultMaxTTL + time.Hour) // its key has expired
	h.rollback()
	h.onlyLeased()
}

// The age of a listed key is by OpenAI's clock alone: by a clock that is behind, a key
// seems too young until that clock has passed its creation.
func TestWAL_AClockThatIsBehindDoesNotDelayTheDeletion(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			if kind == typeKey {
				h.adopted(nil)
			}
			h.setClock(-time.Hour)
			h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Times: maxAttempts, Kind: openaitest.FaultLost})
			_, err := h.read("creds/app")
			require.Error(t, err)
			require.NotEmpty(t, h.sim.Keys())
			h.advance(10 * time.Minute)
			h.rollback()
			require.Empty(t, h.sim.Keys())
			require.Empty(t, h.walEntries())
			h.sim.KeepAll()
		})
	}
	h := configured(t, openaitest.Options{})
	h.setClock(-time.Hour)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.write("config/rotate", nil)
	require.Error(t, err)
	require.Greater(t, len(h.sim.AdminKeys()), 1)
	h.advance(10 * time.Minute)
	h.rollback() // PutWAL uses the machine's clock
	h.advance(10 * time.Minute)
	h.rollback()
	require.Len(t, h.sim.AdminKeys(), 1)
	require.Empty(t, h.walEntries())
}

// An entry that was postponed under a clock that was ahead is due once the clock is
// corrected.
func TestWAL_NothingIsPostponedForLongerAfterAClockAhead(t *testing.T) {
	t.Parallel()
	x, now := newWALIndex(), time.Now()
	x.put("kept", walNote{kind: walAccount, created: now.Add(-time.Hour).Unix()})
	x.put("postponed", walNote{kind: walAccount, created: now.Add(-time.Hour).Unix()})
	x.keep("kept", now.Add(keptFor))
	x.postpone("postponed", now.Add(notFinalBefore))
	require.Empty(t, x.due(walAccount, now, 0))
	x.keep("kept", now.Add(5*time.Hour+keptFor))
	x.postpone("postponed", now.Add(5*time.Hour+notFinalBefore))
	require.ElementsMatch(t, []string{"kept", "postponed"}, x.due(walAccount, now, 0))
}
