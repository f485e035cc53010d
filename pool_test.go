package openaisecrets

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/events"
)

const routeCreate = "/organization/projects/{project_id}/service_accounts"

// fill refills the pools until they are full or nothing more is created.
func (h *harness) fill() {
	h.t.Helper()
	h.settlePools()
	h.b.pools.wake()
	if err := h.b.refillPools(client.Background(context.Background()), h.background()); err != nil {
		h.recordMessages(nil, err)
	}
	h.settlePools()
}

// settlePools waits for the background work that a request started.
func (h *harness) settlePools() {
	h.t.Helper()
	h.settle()
	h.b.recordLeaving(context.Background(), h.background())
}

func (h *harness) background() *logical.Request {
	return &logical.Request{Storage: h.storage, MountPoint: "openai/"}
}

// withPool is configured with a full pool for the role "app".
func withPool(t *testing.T, size int, more fields) *harness {
	t.Helper()
	h := configured(t, openaitest.Options{})
	data := fields{"pool_size": size}
	for k, v := range more {
		data[k] = v
	}
	h.role(data)
	h.fill()
	require.Equal(t, size, h.ready("app"))
	return h
}

// ready returns pool_ready of a role.
func (h *harness) ready(role string) int {
	h.t.Helper()
	return h.must(h.read("roles/" + role)).Data["pool_ready"].(int)
}

// holdPools prevents the backend from refilling the pools until release.
func (h *harness) holdPools() (release func()) {
	h.t.Helper()
	release, err := h.b.work.pools.Wait(context.Background())
	require.NoError(h.t, err)
	return release
}

// closed closes the pools at the end of a test and deletes their credentials.
func (h *harness) closed() {
	h.t.Helper()
	h.b.closePools()
	h.settlePools()
	h.runPeriodicWork()
}

func TestPool_ServesARequestWithoutACall(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			if kind == typeKey {
				h.adopted(fields{"scopes": scopeChat, "pool_size": 3})
			} else {
				h.role(fields{"scopes": scopeChat, "pool_size": 3})
			}
			before := h.lease("creds/app", nil) // on demand, or from the pool
			h.fill()
			require.Equal(t, 3, h.ready("app"))
			require.Len(t, h.walEntries(), 3, "one entry for each credential")
			for _, secret := range h.sim.Secrets() {
				if _, admin := h.sim.AdminKey(); secret != admin {
					require.NotContains(t, h.entries(), secret, "storage contains no key")
				}
			}
			require.Contains(t, h.entries(), `"type":"pooled_`+kind+`"`)
			require.Equal(t, 0, h.config()["wal_entries"], "the pool is not a backlog")

			release := h.holdPools()
			h.sim.ResetRequests()
			watched := &watchedStorage{Storage: h.storage}
			resp, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "creds/app", Storage: watched, MountPoint: "openai/"})
			lease := h.stored(h.must(resp, err))
			require.Zero(t, h.sim.Count("", ""), "calls during the request")
			require.EqualValues(t, 1, watched.operations.Load(), "storage operations: the deletion of the WAL entry")
			require.Equal(t, http.StatusOK, h.inference(lease, http.MethodPost, "/chat/completions"))
			require.Equal(t, http.StatusForbidden, h.inference(lease, http.MethodPost, "/responses"), "the key is restricted")
			var names, others []string
			for name := range lease.Data {
				names = append(names, name)
			}
			for name := range before.Data {
				others = append(others, name)
			}
			require.ElementsMatch(t, others, names, "the response has the fields of one created on demand")
			require.Equal(t, 2, h.ready("app"))
			require.Len(t, h.walEntries(), 2)
			release()

			h.fill()
			require.Equal(t, 3, h.ready("app"), "the pool is refilled")
			for _, lease := range []*logical.Response{before, lease} {
				require.NoError(t, h.revoke(lease))
			}
			h.runPeriodicWork() // the worker leaves the pool alone
			require.Equal(t, 3, h.ready("app"))
			require.Len(t, h.sim.Keys(), 3)
			h.closed()
			require.Empty(t, h.sim.Keys())
			require.Empty(t, h.walEntries())
			h.sim.KeepAll() // the adopted account
		})
	}
}

func TestPool_TheFieldsOfTheRole(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	role := func(data fields) (string, fields) {
		resp, err := h.write("roles/app", data)
		require.NoError(t, err)
		if resp.IsError() {
			return resp.Error().Error(), nil
		}
		return "", h.must(h.read("roles/app")).Data
	}
	for name, c := range map[string]struct {
		data   fields
		reason string
	}{
		"negative":                      {fields{"pool_size": -1}, "pool_size must be between 0 and 100"},
		"a fraction":                    {fields{"pool_size": 1.5}, "pool_size must be an integer"},
		"above the limit":               {fields{"pool_size": 101}, "pool_size must be between 0 and 100"},
		"text":                          {fields{"pool_size": "many"}, "pool_size must be an integer"},
		"true":                          {fields{"pool_size": true}, "pool_size must be an integer"},
		"a list":                        {fields{"pool_size": []int{1}}, "pool_size must be an integer"},
		"too large":                     {fields{"pool_size": 1e30}, "pool_size must be an integer"},
		"an age too short":              {fields{"pool_max_age": "9m59s"}, "pool_max_age must be between 10m0s and 168h0m0s"},
		"an age too long":               {fields{"pool_max_age": "169h"}, "pool_max_age must be between 10m0s and 168h0m0s"},
		"a negative age":                {fields{"pool_max_age": -600}, "pool_max_age must not be negative"},
		"a fraction of a second":        {fields{"pool_max_age": "600.5s"}, "pool_max_age must be a duration in whole seconds"},
		"keys without an expiry":        {fields{"pool_size": 1, "key_expiry": "none"}, "requires key_expiry=max_ttl or key_expiry=ttl"},
		"a template with .DisplayName":  {fields{"pool_size": 1, "service_account_name_template": "{{.RandomSuffix}}-{{.DisplayName}}"}, "cannot be combined with .DisplayName"},
		"a condition with .DisplayName": {fields{"pool_size": 1, "service_account_name_template": `{{.RandomSuffix}}{{if eq "x" (lowercase .DisplayName)}}x{{else}}y{{end}}`}, "cannot be combined with .DisplayName"},
		"over a year":                   {fields{"pool_size": 1, "max_ttl": "8755h", "pool_max_age": "6h"}, "max_ttl 8755h0m0s plus pool_max_age 6h0m0s exceeds"},
		"over a year, ttl":              {fields{"pool_size": 1, "key_expiry": "ttl", "ttl": "8755h", "max_ttl": "9000h"}, "ttl 8755h0m0s plus pool_max_age 6h0m0s exceeds"},
	} {
		said, _ := role(c.data)
		require.Contains(t, said, c.reason, name)
	}
	_, shown := role(fields{"pool_size": nil, "pool_max_age": nil})
	require.Equal(t, 0, shown["pool_size"], "null counts as unset")
	require.EqualValues(t, 0, shown["pool_max_age"])
	require.EqualValues(t, 6*3600, shown["effective_pool_max_age"])
	require.Equal(t, 0, shown["pool_ready"])
	require.Equal(t, false, shown["pool_refilling"])
	require.Empty(t, shown["pool_last_error"])

	release := h.holdPools()
	_, shown = role(fields{"pool_size": "2", "pool_max_age": "1h", "max_ttl": "8000h"})
	require.Equal(t, 2, shown["pool_size"])
	require.EqualValues(t, 3600, shown["pool_max_age"])
	stored := h.entries()
	again := throughJSON(t, h.must(h.read("roles/app")).Data)
	resp := h.must(h.write("roles/app", again))
	require.NotNil(t, resp, "read-only fields are ignored with a warning")
	require.Equal(t, stored, h.entries(), "a read that is written back changes nothing")
	_, shown = role(fields{"pool_size": 0})
	require.Equal(t, 0, shown["pool_size"])
	release()
	require.Empty(t, h.sim.Keys())
}

func TestPool_TheSumOfAMountIsBounded(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	defer h.holdPools()()
	for i := range 4 {
		h.must(h.write(fmt.Sprintf("roles/r%d", i), fields{"project_id": h.project, "pool_size": 100}))
	}
	// A new process has read no role yet.
	h.restart()
	defer h.holdPools()()
	var refused, stored sync.Map
	var writers sync.WaitGroup
	for i := range 8 {
		writers.Go(func() {
			name := fmt.Sprintf("late%d", i)
			resp, err := h.write("roles/"+name, fields{"project_id": h.project, "pool_size": 60})
			if err == nil && resp.IsError() {
				refused.Store(name, resp.Error().Error())
			} else if err == nil {
				stored.Store(name, true)
			}
		})
	}
	writers.Wait()
	count := func(m *sync.Map) (n int) {
		m.Range(func(_, said any) bool {
			n++
			if said != true {
				require.Contains(t, said, "exceeds the limit of 500 for all roles of a mount; the other roles use 460")
			}
			return true
		})
		return n
	}
	require.Equal(t, 1, count(&stored), "one of the concurrent writes")
	require.Equal(t, 7, count(&refused))
	h.must(h.write("roles/rest", fields{"project_id": h.project, "pool_size": 40}))
	h.refused(h.write("roles/more", fields{"project_id": h.project, "pool_size": 1}))
	h.must(h.write("roles/r0", fields{"pool_size": 99})) // a reduction always succeeds
	h.must(h.write("roles/more", fields{"project_id": h.project, "pool_size": 1}))
	h.must(h.remove("roles/r1"))
	h.must(h.write("roles/r2", fields{"pool_size": 0}))
	h.must(h.write("roles/more", fields{"pool_size": 100}))
}

// Not parallel: it counts the goroutines of the process.
func TestPool_NoOverheadWithoutAPool(t *testing.T) {
	h := configured(t, openaitest.Options{})
	h.restartStatic() // holds the static worker, which also reads the config
	count := func(do func()) (operations int64) {
		watched := &watchedStorage{Storage: h.storage}
		h.b.storage = watched
		do()
		return watched.operations.Load()
	}
	watched := &watchedStorage{Storage: h.storage}
	tick := func() {
		_, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.RollbackOperation, Storage: watched, MountPoint: "openai/"})
		require.NoError(t, err)
		h.settle()
	}
	for range 3 { // until everything that is cached was read
		tick()
	}
	h.sim.ResetRequests()
	goroutines := runtime.NumGoroutine()
	require.Zero(t, count(func() {}))
	before := watched.operations.Load()
	tick()
	// The list of the WAL, and the time of the last tidy run.
	require.LessOrEqual(t, watched.operations.Load()-before, int64(2))
	require.Zero(t, h.sim.Count("", ""))
	require.LessOrEqual(t, runtime.NumGoroutine(), goroutines+2)
	require.False(t, h.b.poolsUsed.Load())
	require.Empty(t, h.b.pools.roles)
	require.NotContains(t, h.entries(), "pool")

	read := func() *logical.Response {
		resp, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "creds/app", Storage: watched, MountPoint: "openai/"})
		return h.stored(h.must(resp, err))
	}
	lease := read() // the first also reads the role
	var mu sync.Mutex
	var got, written []string
	note := func(keys *[]string) func(string) error {
		return func(key string) error {
			mu.Lock()
			defer mu.Unlock()
			*keys = append(*keys, key)
			return nil
		}
	}
	watched.fail(note(&got), note(&written))
	failed := func() int { return strings.Count(h.log.String(), " not created: ") }
	began, before := failed(), watched.operations.Load()
	other := read()
	operations := watched.operations.Load() - before
	watched.fail(nil, nil)
	require.Len(t, written, 1+failed()-began, "the WAL entry of each attempt")
	require.EqualValues(t, 2*len(written)+len(got), operations, "each is written and deleted")
	require.Empty(t, withoutWAL(got), "storage keys that are read")
	require.Empty(t, withoutWAL(written), "storage keys that are written")
	require.NotContains(t, fmt.Sprint(lease.Secret.InternalData), "pool")
	require.Empty(t, h.b.pools.answers.Held())
	require.NoError(t, h.revoke(lease))
	require.NoError(t, h.revoke(other))
}

func withoutWAL(keys []string) []string {
	return slices.DeleteFunc(keys, func(key string) bool { return strings.HasPrefix(key, "wal/") })
}

// While many requests read a role, none that begins after a write has returned receives a
// key of the previous role.
func TestPool_ARoleIsNarrowedDuringABurst(t *testing.T) {
	t.Parallel()
	h := withPool(t, 40, fields{"scopes": []string{scopeChat, "api.responses.write"}})
	h.sim.KeepAll()
	type answer struct {
		at  time.Time
		key string
	}
	var mu sync.Mutex
	var answers []answer
	var readers sync.WaitGroup
	stop := make(chan struct{})
	for range 16 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				began := time.Now()
				resp, err := h.read("creds/app")
				if err != nil || resp.IsError() {
					t.Errorf("%v %v", resp, err)
					return
				}
				mu.Lock()
				answers = append(answers, answer{at: began, key: resp.Data["api_key_id"].(string)})
				mu.Unlock()
			}
		})
	}
	require.Eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(answers) > 20 }, time.Minute, time.Millisecond)
	h.must(h.write("roles/app", fields{"scopes": []string{scopeChat}}))
	narrowed := time.Now()
	h.b.pools.mu.Lock()
	require.Empty(t, h.b.pools.roles["app"].stockOf([]string{scopeChat, "api.responses.write"}))
	h.b.pools.mu.Unlock()
	mu.Lock()
	before := len(answers)
	mu.Unlock()
	require.Eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(answers) > before+40 }, time.Minute, time.Millisecond)
	close(stop)
	readers.Wait()
	scopes := map[string][]string{}
	for _, k := range h.sim.Keys() {
		scopes[k.ID] = k.Scopes
	}
	wide, late := 0, 0
	for _, a := range answers {
		if len(scopes[a.key]) == 2 {
			wide++
			require.True(t, a.at.Before(narrowed), "a request that began after the write received a wide key")
		}
		if a.at.After(narrowed) {
			late++
		}
	}
	require.Positive(t, wide)
	require.Positive(t, late)
	h.closed()
	h.sim.KeepAll()
	for _, k := range h.sim.Keys() {
		if len(k.Scopes) == 2 {
			require.True(t, slices.ContainsFunc(answers, func(a answer) bool { return a.key == k.ID }), "the wide keys of the pool are deleted")
		}
	}
}

// stockOf returns the pooled credentials with these scopes.
func (p *pooledRole) stockOf(scopes []string) (found []*pooled) {
	want := strings.Join(slices.Sorted(slices.Values(scopes)), ",")
	for _, c := range p.stock {
		if c.made.scopes == want {
			found = append(found, c)
		}
	}
	return found
}

// If a role is narrowed while a credential is created on demand, the engine discards the
// credential and starts over with the new role.
func TestPool_ACredentialCreatedOnDemandFitsTheRoleOfItsAnswer(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(fields{"scopes": []string{scopeChat, "api.responses.write"}})
	creating := newHold()
	var once sync.Once
	h.sim.Fail(openaitest.Fault{Route: routeCreate, Match: func(*http.Request) bool {
		once.Do(creating.up)
		return false
	}})
	var lease *logical.Response
	var reader sync.WaitGroup
	reader.Go(func() { lease = h.lease("creds/app", nil) })
	<-creating.entered
	h.role(fields{"scopes": []string{scopeChat}})
	close(creating.release)
	reader.Wait()
	require.Equal(t, http.StatusForbidden, h.inference(lease, http.MethodPost, "/responses"))
	h.onlyLeased(lease)

	// If the role is deleted meanwhile, nothing is left.
	creating = newHold()
	once = sync.Once{}
	reader.Go(func() { require.Contains(t, h.refused(h.read("creds/app")), "role \"app\"") })
	<-creating.entered
	h.must(h.remove("roles/app"))
	close(creating.release)
	reader.Wait()
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))
}

func TestPool_AWriteDiscardsUnfitCredentialsBeforeItReturns(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]struct {
		at   string
		data fields // nil deletes
		left int
	}{
		"scopes":          {"roles/app", fields{"scopes": scopeChat}, 0},
		"template":        {"roles/app", fields{"service_account_name_template": "x-{{.RandomSuffix}}"}, 0},
		"max_ttl":         {"roles/app", fields{"max_ttl": "2h"}, 0},
		"key_expiry":      {"roles/app", fields{"key_expiry": "ttl"}, 0},
		"a shorter age":   {"roles/app", fields{"pool_max_age": "1h"}, 0},
		"a longer age":    {"roles/app", fields{"pool_max_age": "12h"}, 3},
		"fewer":           {"roles/app", fields{"pool_size": 1}, 1},
		"none":            {"roles/app", fields{"pool_size": 0}, 0},
		"description":     {"roles/app", fields{"service_account_description": "x"}, 3},
		"the same size":   {"roles/app", fields{"pool_size": 3}, 3},
		"deletion":        {"roles/app", nil, 0},
		"another project": {"config", fields{"project_id": "the other"}, 0},
		"another limit":   {"config", fields{"max_concurrent_requests": 8}, 3},
		"a rotation":      {"config/rotate", fields{}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHarness(t, openaitest.Options{})
			other := h.sim.AddProject("other")
			h.configure(fields{"project_id": h.project})
			h.must(h.write("roles/app", fields{"pool_size": 3}))
			h.fill()
			require.Equal(t, 3, h.ready("app"))
			made := h.liveKeys()
			pools, leaving := h.holdPools(), func() func() {
				release, err := h.b.work.leaving.Wait(t.Context())
				require.NoError(t, err)
				return release
			}()
			if change.data == nil {
				h.must(h.remove(change.at))
			} else {
				if change.data["project_id"] != nil {
					change.data["project_id"] = other
				}
				h.must(h.write(change.at, change.data))
			}
			require.Equal(t, change.left, h.b.pools.status("app").ready)
			require.ElementsMatch(t, made, h.liveKeys(), "the write does not wait for their deletion")
			pools()
			leaving()
			h.settlePools()
			h.runPeriodicWork()
			require.Len(t, h.liveKeys(), change.left)
			h.closed()
			require.Empty(t, h.liveKeys())
			require.Empty(t, h.walEntries())
			h.sim.Keep(h.adminKeyIDs()...)
		})
	}
}

func TestPool_AKeyThatIsTooOldIsReplacedAndNotReturned(t *testing.T) {
	t.Parallel()
	h := withPool(t, 4, fields{"pool_max_age": "1h"})
	first := h.liveKeys()
	h.advance(50 * time.Minute) // more than three quarters of the age
	h.fill()
	require.Equal(t, 4, h.ready("app"))
	require.Empty(t, intersect(first, h.liveKeysInPool()), "all are replaced")
	h.runPeriodicWork()
	require.Empty(t, intersect(first, h.liveKeys()), "the old keys are deleted")

	second := h.liveKeys()
	release := h.holdPools()
	h.advance(time.Hour + time.Second)
	lease := h.lease("creds/app", nil)
	require.NotContains(t, second, lease.Data["api_key_id"], "no key over pool_max_age is returned")
	release()
	h.closed()
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))

	// A clock that is set back does not make a key younger.
	h.b.pools.wake()
	h.fill()
	c := h.b.pools.roles["app"].stock[0]
	c.start = c.start.Add(-2 * time.Hour)
	require.Greater(t, c.age(h.now()), time.Hour)
	h.closed()
}

func intersect(a, b []string) (both []string) {
	for _, x := range a {
		if slices.Contains(b, x) {
			both = append(both, x)
		}
	}
	return both
}

func (h *harness) liveKeysInPool() (ids []string) {
	h.b.pools.mu.Lock()
	defer h.b.pools.mu.Unlock()
	for _, known := range h.b.pools.roles {
		for _, c := range known.stock {
			ids = append(ids, c.KeyID)
		}
	}
	return ids
}

func TestPool_AKeyCoversItsLease(t *testing.T) {
	t.Parallel()
	for _, expiry := range []string{expiryMaxTTL, expiryTTL} {
		t.Run(expiry, func(t *testing.T) {
			t.Parallel()
			h := withPool(t, 3, fields{"key_expiry": expiry, "ttl": "1h", "max_ttl": "20h", "pool_max_age": "2h"})
			release := h.holdPools()
			h.advance(2*time.Hour - time.Minute)
			lease := h.lease("creds/app", nil)
			covers := 20 * time.Hour
			if expiry == expiryTTL {
				covers = time.Hour
			}
			end, err := time.Parse(time.RFC3339, lease.Data["expires_at"].(string))
			require.NoError(t, err)
			left := end.Sub(h.now())
			require.GreaterOrEqual(t, left, covers, "the key outlives the lease")
			require.LessOrEqual(t, left, covers+2*time.Hour+expiryMargin+time.Second)

			if expiry == expiryTTL {
				// A longer lease gets a new credential, and the pool is unchanged.
				long := h.lease("creds/app", fields{"ttl": "5h"})
				require.Equal(t, 2, h.ready("app"))
				require.InDelta(t, 1, h.measured()[`vault_openai_pool_missed_total{reason="too_short",role="app"}`], 0)
				require.NoError(t, h.revoke(long))

				// A renewal within the lifetime of the key makes no call.
				fresh := withPool(t, 1, fields{"key_expiry": expiry, "ttl": "1h", "max_ttl": "20h", "pool_max_age": "2h"})
				young := fresh.lease("creds/app", nil)
				fresh.settlePools()
				fresh.sim.ResetRequests()
				renewed, err := fresh.renew(t.Context(), young, 0, 0)
				require.NoError(t, err)
				require.Zero(t, fresh.sim.Count(http.MethodPost, routeKey))
				require.NoError(t, fresh.revoke(renewed))
				fresh.closed()
			}
			require.NoError(t, h.revoke(lease))
			release()
			h.closed()
		})
	}
}

// A new process does not know the pool of the previous one, so its entries are orphans.
func TestPool_AProcessLeavesItsPoolToTheNext(t *testing.T) {
	t.Parallel()
	h := withPool(t, 5, nil)
	old := h.liveKeys()
	h.restart()
	h.advance(walMinAge - 30*time.Second)
	h.rollback()
	require.Len(t, intersect(old, h.liveKeys()), 5, "entries of creates are skipped for two minutes")
	h.advance(notFinalBefore)
	h.rollback()
	h.rollback()
	require.Empty(t, intersect(old, h.liveKeys()))
	h.fill()
	require.Equal(t, 5, h.ready("app"), "the new process fills its own pool")
	require.InDelta(t, 5, h.measured()[`vault_openai_pool_destroyed_total{reason="lost"}`], 0)
	h.closed()
	h.onlyLeased()
}

func TestPool_ARefusedCreateIsNotRepeatedInAStorm(t *testing.T) {
	for name, fault := range map[string]openaitest.Fault{
		"400": {Status: 400}, "403": {Status: 403}, "401": {Status: 401}, "429": {Status: 429}, "500": {Status: 500}, "reset": {Kind: openaitest.FaultReset},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
				h.configure(nil)
				fault.Route = routeCreate
				h.sim.Fail(fault)
				for i := range 5 {
					h.must(h.write(fmt.Sprintf("roles/r%d", i), fields{"project_id": h.project, "pool_size": 20}))
				}
				stop := h.ticking()
				time.Sleep(10 * time.Minute)
				creates := h.sim.Count(http.MethodPost, routeCreate)
				require.Positive(t, creates)
				require.LessOrEqual(t, creates, 40, "creates in ten minutes")
				require.NotEmpty(t, h.must(h.read("roles/r0")).Data["pool_last_error"])
				h.sim.ClearFaults()
				time.Sleep(70 * time.Minute)
				for i := range 5 {
					require.Equal(t, 20, h.ready(fmt.Sprintf("r%d", i)), "the pool is filled after the fault")
					require.Empty(t, h.must(h.read(fmt.Sprintf("roles/r%d", i))).Data["pool_last_error"])
				}
				stop()
				synctest.Wait()
			})
		})
	}
}

func TestPool_AnArchivedProjectEmptiesThePool(t *testing.T) {
	t.Parallel()
	h := withPool(t, 3, nil)
	release := h.holdPools()
	lease := h.lease("creds/app", nil)
	h.sim.ArchiveProject(h.project)
	release()
	h.fill()
	require.Zero(t, h.ready("app"))
	require.NotEmpty(t, h.must(h.read("roles/app")).Data["pool_last_error"])
	require.Equal(t, "app", h.events.heard(t, events.PoolRefillFail)["name"])
	require.Len(t, h.lines("pool not refilled"), 1)
	h.runPeriodicWork()
	require.Empty(t, h.walEntries())
	require.NoError(t, h.revoke(lease))
	h.sim.KeepAll()
}

func TestPool_TheTaintClosesIt(t *testing.T) {
	t.Parallel()
	h := withPool(t, 5, nil)
	lease := h.lease("creds/app", nil)
	h.settlePools()
	h.manager.taint()
	h.rollbackOnly()
	require.Empty(t, h.walEntries())
	h.onlyLeased(lease)
	require.Contains(t, h.refused(h.read("creds/app")), "being disabled")
	require.Zero(t, h.ready("app"))
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()

	// The mount was moved, and works again.
	h.manager.untaint()
	h.rollback()
	h.fill()
	require.Equal(t, 5, h.ready("app"))
	h.closed()
}

// A credential that cannot be deleted in time is logged with its ID, and expires.
func TestPool_ADisableAtAFewCallsAMinute(t *testing.T) {
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.must(h.write("roles/app", fields{"project_id": h.project, "pool_size": 100}))
		h.fill()
		require.Equal(t, 100, h.ready("app"))
		deletes := 0
		var mu sync.Mutex
		var last time.Time
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 429, Match: func(*http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			if time.Since(last) < 6*time.Second {
				return true
			}
			last = time.Now()
			deletes++
			return false
		}})
		began := time.Now()
		h.manager.taint()
		h.rollbackOnly()
		require.LessOrEqual(t, time.Since(began), 90*time.Second, "Vault waits at most this long")
		left := h.liveAccounts()
		require.Len(t, left, 100-deletes)
		require.Positive(t, deletes)
		logged := map[any]bool{}
		for _, line := range h.lines("credential remains at OpenAI") {
			logged[line["service_account_id"]] = true
			require.NotEmpty(t, line["key_expires_at"])
		}
		for _, id := range left {
			require.True(t, logged[id], "%s is logged", id)
		}
		h.sim.Advance(defaultMaxTTL + defaultPoolMaxAge + expiryMargin + time.Second)
		require.Empty(t, h.sim.Keys(), "each expires")
		h.sim.KeepAll()
	})
}

func TestPool_ADisconnectedClientGetsNothing(t *testing.T) {
	t.Parallel()
	h := withPool(t, 2, nil)
	release := h.holdPools()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := h.do(ctx, logical.ReadOperation, "creds/app", nil)
	require.Error(t, err)
	require.Equal(t, 1, h.ready("app"), "the credential does not return to the pool")
	require.Len(t, h.liveKeys(), 1)
	require.InDelta(t, 1, h.measured()[`vault_openai_pool_destroyed_total{reason="not_returned"}`], 0)
	release()
	h.closed()
	h.onlyLeased()
}

func TestPool_TidyLeavesItAlone(t *testing.T) {
	t.Parallel()
	h := withPool(t, 3, fields{"max_ttl": "1h", "ttl": "1h", "pool_max_age": "48h"})
	longest, err := getLongestLease(t.Context(), h.storage)
	require.NoError(t, err)
	require.Equal(t, 49*time.Hour, longest.LongestLease, "the maximum age of a leased account")
	release := h.holdPools()
	h.advance(30 * time.Hour)
	require.Zero(t, h.tidy(true)["orphans_found"])
	lease := h.lease("creds/app", nil)
	h.advance(time.Minute)
	h.tidy(true)
	require.Equal(t, http.StatusOK, h.inference(lease, http.MethodGet, "/models"))
	require.Equal(t, 2, h.ready("app"))
	require.NoError(t, h.revoke(lease))
	release()
	h.closed()
	h.onlyLeased()
}

func TestPool_MetricsTellIt(t *testing.T) {
	t.Parallel()
	h := withPool(t, 2, nil)
	release := h.holdPools()
	leases := []*logical.Response{h.lease("creds/app", nil), h.lease("creds/app", nil), h.lease("creds/app", nil)}
	m := h.measured()
	require.InDelta(t, 0, m[`vault_openai_pool_ready{role="app"}`], 0)
	require.InDelta(t, 2, m[`vault_openai_pool_taken_total{role="app"}`], 0)
	require.InDelta(t, 1, m[`vault_openai_pool_missed_total{reason="empty",role="app"}`], 0)
	require.InDelta(t, 0, m["vault_openai_wal_entries{}"], 0, "the pool is not a backlog")
	for _, lease := range leases {
		require.NoError(t, h.revoke(lease))
	}
	h.must(h.write("roles/app", fields{"pool_size": 0}))
	_, shown := h.measured()[`vault_openai_pool_ready{role="app"}`]
	require.False(t, shown)
	release()
}

func TestPool_IsEachClustersOwn(t *testing.T) {
	t.Parallel()
	h := withPool(t, 2, nil)
	stock := h.liveKeysInPool()
	for state, filled := range map[consts.ReplicationState]bool{
		consts.ReplicationPerformanceSecondary: true, // it has its own WAL
		consts.ReplicationPerformanceStandby:   false,
		consts.ReplicationDRSecondary:          false,
	} {
		node := h.copied()
		node.become(state)
		node.rollback()
		node.rollback()
		node.settle()
		shown := node.must(node.read("roles/app")).Data
		if filled {
			require.Equal(t, 2, shown["pool_ready"])
			// A write on the primary reaches it by an invalidation.
			r, err := getRole(t.Context(), node.storage, "app")
			require.NoError(t, err)
			r.Scopes = []string{scopeChat}
			require.NoError(t, writeEntry(t.Context(), node.storage, roleStoragePrefix+"app", "role", r))
			node.b.InvalidateKey(t.Context(), roleStoragePrefix+"app")
			lease := node.lease("creds/app", nil)
			require.Equal(t, http.StatusForbidden, node.inference(lease, http.MethodPost, "/responses"))
			node.closed()
		} else {
			require.Nil(t, shown["pool_ready"], "this node has no pool")
			require.Empty(t, node.b.pools.roles)
		}
		require.Len(t, intersect(stock, h.liveKeys()), 2, "the pool of the other cluster is unchanged")
	}
	h.closed()
	h.sim.KeepAll()
}

func TestPool_RefillsTheEmptiestFirst(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	release := h.holdPools()
	h.must(h.write("roles/a", fields{"project_id": h.project, "pool_size": 10}))
	h.must(h.write("roles/b", fields{"project_id": h.project, "pool_size": 2}))
	now := h.now()
	p := h.b.pools
	order := ""
	for range 12 {
		name, r := p.next(now)
		require.NotNil(t, r)
		order += name
		require.True(t, p.add(name, &pooled{issued: &issued{began: now, spare: time.Hour}, start: time.Now()}))
	}
	require.Equal(t, "abaaaaabaaaa", order)
	_, r := p.next(now)
	require.Nil(t, r)
	for _, name := range []string{"a", "b"} {
		p.roles[name].stock = nil
	}
	h.must(h.write("roles/a", fields{"pool_size": 0}))
	h.must(h.write("roles/b", fields{"pool_size": 0}))
	release()
}

func TestPool_AWriteWarnsOfAPoolThatStaysEmpty(t *testing.T) {
	inBubble(t, openaitest.Options{RatePerMinute: 2, RateBurst: 1}, func(t *testing.T, h *harness) {
		h.configure(nil)
		release := h.holdPools()
		h.must(h.write("roles/app", fields{"project_id": h.project}))
		for range 8 { // some are rejected, so the client learns the rate
			if resp, err := h.read("creds/app"); err == nil && !resp.IsError() {
				require.NoError(t, h.revoke(h.stored(resp)))
			}
		}
		snap, err := h.b.current(t.Context(), h.storage)
		require.NoError(t, err)
		rate, limited := snap.api.CreateRate(false)
		require.True(t, limited)
		require.Contains(t, strings.Join(warningsOf(h.must(h.write("roles/app", fields{"pool_size": 100, "pool_max_age": "10m"}))), " "),
			fmt.Sprintf("need 10 creates a minute even without requests, more than the %.2g that OpenAI currently allows", rate))
		require.Empty(t, warningsOf(h.must(h.write("roles/app", fields{"pool_size": 10, "pool_max_age": "10h"}))))
		h.must(h.write("roles/app", fields{"pool_size": 0}))
		release()
		h.runPeriodicWork()
		h.sim.KeepAll()
	})
}

func warningsOf(resp *logical.Response) []string {
	if resp == nil {
		return nil
	}
	return resp.Warnings
}

func TestPool_ALifetimePolicyIsWarnedOf(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{MaxKeyLifetime: 25 * time.Hour})
	h.role(fields{"pool_size": 2, "pool_max_age": "6h"}) // 24h and 6h
	h.fill()
	said := h.must(h.read("roles/app")).Data["pool_last_error"].(string)
	require.Contains(t, said, "reduce pool_max_age or max_ttl")
	warned := strings.Join(warningsOf(h.must(h.write("roles/app", fields{"pool_max_age": "7h"}))), " ")
	require.Contains(t, warned, "OpenAI has rejected a key lifetime of 30h1m15s")
	require.Empty(t, warningsOf(h.must(h.write("roles/app", fields{"pool_max_age": "30m"}))))
	require.Eventually(t, func() bool { // a late failure with the old role can postpone the next refill
		h.advance(time.Minute)
		h.fill()
		return h.ready("app") == 2
	}, time.Minute, 10*time.Millisecond)
	h.closed()
}

// The WAL entry of a pooled credential in storage contains no key.
func TestPool_TheEntryHasNoKey(t *testing.T) {
	t.Parallel()
	h := withPool(t, 1, nil)
	id := h.walEntries()[0]
	entry, err := framework.GetWAL(t.Context(), h.storage, id)
	require.NoError(t, err)
	require.Equal(t, walPooledAccount, entry.Kind)
	data, err := json.Marshal(entry.Data)
	require.NoError(t, err)
	for _, secret := range h.sim.Secrets() {
		require.NotContains(t, string(data), secret)
	}
	h.closed()
}

// If a clock is set back, the worker must discard the old credentials and not their
// replacements, or it would never stop creating new ones.
func TestPool_AClockThatIsSetBackStartsNoStorm(t *testing.T) {
	t.Parallel()
	h := withPool(t, 2, fields{"pool_max_age": "1h"})
	for _, c := range h.b.pools.roles["app"].stock {
		c.start = c.start.Add(-50 * time.Minute) // by the monotonic clock
	}
	old := h.liveKeysInPool()
	h.setClock(-3 * time.Hour)
	h.sim.ResetRequests()
	h.fill()
	require.Equal(t, 2, h.sim.Count(http.MethodPost, routeCreate), "creates")
	require.Empty(t, intersect(old, h.liveKeysInPool()))
	h.setClock(0)
	h.closed()
}

// If a clock is set while a key is created, the newest key in the pool can seem old. The
// replacement must replace that key, or the replacements would never end.
func TestPool_AKeyThatSeemsOldIsReplacedOnce(t *testing.T) {
	t.Parallel()
	h := withPool(t, 3, fields{"pool_max_age": "1h"})
	release := h.holdPools()
	newest := h.b.pools.roles["app"].stock[2]
	newest.began = newest.began.Add(-50 * time.Minute)
	newest.life += time.Second
	release()
	h.sim.ResetRequests()
	h.fill()
	require.Equal(t, 1, h.sim.Count(http.MethodPost, routeCreate), "creates")
	require.NotContains(t, h.liveKeysInPool(), newest.KeyID)
	h.closed()
}

// A lease stores the times of its key by the clock at its issue. With the clock at the
// create, a renewal would take the key to be valid for hours longer than it is.
func TestPool_AClockThatIsSetBetweenCreateAndHandOut(t *testing.T) {
	t.Parallel()
	for name, ahead := range map[string]time.Duration{"ahead": 3 * time.Hour, "behind": -3 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.setClock(ahead)
			h.role(fields{"pool_size": 2, "pool_max_age": "4h", "key_expiry": "ttl", "ttl": "15m", "max_ttl": "20h"})
			h.fill()
			release := h.holdPools()
			h.setClock(0)
			pooled := h.liveKeysInPool()
			lease := h.lease("creds/app", nil)
			require.Contains(t, pooled, lease.Data["api_key_id"])
			stored := func(field string) time.Time {
				at, err := time.Parse(time.RFC3339, lease.Secret.InternalData[field].(string))
				require.NoError(t, err)
				return at
			}
			shown, err := time.Parse(time.RFC3339, lease.Data["expires_at"].(string))
			require.NoError(t, err)
			require.WithinDuration(t, h.now(), stored("created_at"), time.Minute)
			require.False(t, stored("key_expires_at").After(shown.Add(2*time.Second)), "not later than the expiry at OpenAI")
			require.True(t, stored("key_expires_at").After(h.now().Add(15*time.Minute)), "the key does not seem to have expired")

			// The key that stays is also recorded for deletion with these times: its 404
			// becomes final no later than that of a new key.
			h.b.closePools()
			for _, m := range h.b.pools.leaving {
				require.WithinDuration(t, h.now(), m.CreatedAt, time.Minute)
			}
			release()
			h.closed()
			require.NoError(t, h.revoke(lease))
		})
	}
}

// While a machine is suspended, its monotonic clock stops, and the clock of the process
// may stop; OpenAI's does not.
func TestPool_ASuspendedMachineHandsOutNoKeyThatExpires(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.b.now = time.Now // with both readings, as in production
	h.role(fields{"pool_size": 2, "pool_max_age": "4h"})
	h.fill()
	release := h.holdPools()
	stock := h.b.pools.roles["app"].stock
	require.NotContains(t, stock[0].began.String(), "m=", "a monotonic reading alone would determine the age")

	pooled := h.liveKeysInPool()
	h.sim.Advance(defaultMaxTTL) // only OpenAI's responses show this time
	snap, err := h.b.current(t.Context(), h.storage)
	require.NoError(t, err)
	_, err = snap.api.GetServiceAccount(t.Context(), h.project, stock[0].ID)
	require.NoError(t, err)
	lease := h.lease("creds/app", nil)
	require.NotContains(t, pooled, lease.Data["api_key_id"], "the key would expire before its lease")
	require.InDelta(t, 1, h.measured()[`vault_openai_pool_missed_total{reason="too_short",role="app"}`], 0)
	release()
	h.closed()
	require.NoError(t, h.revoke(lease))
}

// A role changes on another node (invalidate) while readPools reads it.
func TestPool_AnInvalidationDuringTheReadIsNotLost(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("roles/app", fields{"pool_size": 1, "activation_timeout": 0}))
	h.runPeriodicWork()
	h.b.rereadPool("app") // an earlier invalidation
	held, watched := newHold(), &watchedStorage{Storage: h.storage}
	watched.next.Store(held)
	var err error
	var reading sync.WaitGroup
	reading.Go(func() { err = h.b.readPools(t.Context(), watched) })
	<-held.entered // it has read the older role
	r, rerr := getRole(t.Context(), h.storage, "app")
	require.NoError(t, rerr)
	r.Scopes = []string{scopeChat}
	require.NoError(t, writeEntry(t.Context(), h.storage, roleStoragePrefix+"app", "role", r)) // as replication does
	h.b.invalidate(t.Context(), roleStoragePrefix+"app")
	close(held.release)
	reading.Wait()
	require.NoError(t, err)
	require.False(t, h.b.pools.roles["app"].role.Scopes == nil && !h.b.pools.unread["app"], "the older role stays and is not read again")
}
