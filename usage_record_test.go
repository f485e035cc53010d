package openaisecrets

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/sysview"
)

// flush writes the pending usage records.
func (h *harness) flush() {
	h.t.Helper()
	require.NoError(h.t, h.b.writeUsage(context.Background(), h.storage))
}

// usageEntries are the storage keys of the records.
func (h *harness) usageEntries() (all []string) {
	h.t.Helper()
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	for _, key := range keys {
		if strings.HasPrefix(key, usageStoragePrefix) {
			all = append(all, key)
		}
	}
	return all
}

// known returns all records, in the order in which reports read them.
func (h *harness) known() (all []usageRecord) {
	h.t.Helper()
	_, err := h.b.eachUsageRecord(context.Background(), h.storage, func(r *usageRecord) { all = append(all, *r) })
	require.NoError(h.t, err)
	return all
}

// crash replaces the process without unloading the plugin.
func (h *harness) crash() {
	h.b.cancel()
	h.b.usage.drop()
	h.restart()
}

// leaseAs issues a credential to a client with an entity.
func (h *harness) leaseAs(role, entity, name string) *logical.Response {
	h.t.Helper()
	resp, err := h.b.HandleRequest(context.Background(), &logical.Request{
		ID: "req-1", Operation: logical.ReadOperation, Path: "creds/" + role, Storage: h.storage, MountPoint: "openai/", DisplayName: name, EntityID: entity,
	})
	return h.stored(h.must(resp, err))
}

func TestUsageRecord_OfALease(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.leaseAs("app", "entity-1", "userpass-alice")
	require.Empty(t, h.usageEntries(), "the request does not write the record")
	got := h.known()
	require.Len(t, got, 1)
	ends := got[0].Ends
	got[0].Ends = time.Time{}
	require.Equal(t, usageRecord{
		KeyID: lease.Data["api_key_id"].(string), AccountID: lease.Data["service_account_id"].(string), ProjectID: h.project, Type: typeAccount,
		Role: "app", EntityID: "entity-1", DisplayName: "userpass-alice", IssuedAt: got[0].IssuedAt,
	}, got[0])
	require.WithinDuration(t, h.now(), got[0].IssuedAt, time.Minute)
	require.WithinDuration(t, h.now().Add(defaultMaxTTL), ends, 5*time.Minute)
	h.flush()
	require.Len(t, h.usageEntries(), 1)
	require.Equal(t, ends, h.known()[0].Ends)
	require.Len(t, h.known(), 1)
	decoded, err := decodeLease(&logical.Request{Secret: lease.Secret})
	require.NoError(t, err)
	record := h.known()[0]
	require.NoError(t, record.credential().check(), "a record is enough to destroy the credential")
	require.Equal(t, revokedID(decoded.credential), revokedID(record.credential()))
	require.NoError(t, h.revoke(lease))
	h.flush()
	require.Len(t, h.known(), 1, "the revocation does not record a known key again")
}

// One entry is filled over many flushes, and the next one begins when it is full.
func TestUsageRecord_FewEntries(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for i := range usageBatch + 5 {
		h.b.recordUsage(usageRecord{KeyID: fmt.Sprint("key_", i), ProjectID: h.project, Type: typeAccount, Role: "app"})
		if i%50 == 0 {
			h.flush()
		}
	}
	h.flush()
	require.Len(t, h.usageEntries(), 2)
	require.Len(t, h.known(), usageBatch+5)
	h.advance(24 * time.Hour)
	h.b.recordUsage(usageRecord{KeyID: "key_tomorrow", ProjectID: h.project})
	h.flush()
	require.Len(t, h.usageEntries(), 3)
	require.Len(t, h.known(), usageBatch+6)
}

// The next renewal or the revocation restores a record that a crash lost, even without
// the role, and counts it once.
func TestUsageRecord_ACrashIsRepaired(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(h *harness, lease *logical.Response){
		"renewed": func(h *harness, lease *logical.Response) {
			h.must(h.end(logical.RenewOperation, lease))
			require.NoError(h.t, h.revoke(lease))
		},
		"revoked": func(h *harness, lease *logical.Response) { require.NoError(h.t, h.revoke(lease)) },
		"revoked without its role": func(h *harness, lease *logical.Response) {
			h.must(h.remove("roles/app"))
			require.NoError(h.t, h.revoke(lease))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			lease := h.leaseAs("app", "entity-1", "userpass-alice")
			want := h.known()
			h.crash()
			require.Empty(t, h.known(), "the crash loses the record")
			end(h, lease)
			require.Equal(t, want, h.known())
			h.flush()
			h.crash()
			require.Equal(t, want, h.known())
		})
	}
}

// The process dies at each step of a flush. In each case, the records are complete after
// the revocations.
func TestUsageRecord_DeathDuringAFlush(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]storageFault{"before": {kill: true}, "after": {after: true, kill: true}, "failure": {}, "lost response": {after: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			lease, other := h.leaseAs("app", "entity-1", "alice"), h.leaseAs("app", "entity-2", "bob")
			want := h.known()
			h.storage.fail(fault)
			func() {
				defer func() { _ = recover() }()
				err := h.b.writeUsage(context.Background(), h.storage)
				require.ErrorIs(t, err, errStorage)
			}()
			if died := h.storage.heal(); died {
				h.crash()
			}
			for _, one := range []*logical.Response{lease, other} {
				require.NoError(t, h.revoke(one))
			}
			h.flush()
			var distinct []usageRecord
			for _, r := range h.known() {
				if !containsKey(distinct, r.KeyID) {
					distinct = append(distinct, r)
				}
			}
			require.ElementsMatch(t, want, distinct)
			if fault == (storageFault{after: true}) {
				require.Len(t, h.known(), 2, "a write whose response was lost is repeated under its key")
			}
		})
	}
}

func containsKey(records []usageRecord, key string) bool {
	for i := range records {
		if records[i].KeyID == key {
			return true
		}
	}
	return false
}

// A record that is being written is not in storage yet. A reader must not miss it, or a
// spend limit would leave its key valid.
func TestUsageRecord_NoneIsMissedWhileItIsWritten(t *testing.T) {
	t.Parallel()
	h := limited(t, openaitest.Options{}, fields{"spend_action": actionRevoke})
	lease := h.lease("creds/app", nil)
	h.cost(lease, "10")
	s := &watchedStorage{Storage: h.storage}
	h.b.storage = s
	writes, goOn := make(chan struct{}), make(chan struct{})
	s.fail(nil, func(key string) error {
		if strings.HasPrefix(key, usageKeysPrefix) {
			close(writes)
			<-goOn
		}
		return nil
	})
	done := make(chan error, 1)
	go func() { done <- h.b.writeUsage(t.Context(), s) }()
	<-writes
	require.NoError(t, h.compared())
	s.fail(nil, nil)
	close(goOn)
	require.NoError(t, <-done)
	h.b.deleteDoomed(t.Context(), h.background())
	require.Empty(t, h.liveKeys())
	require.NoError(t, h.revoke(lease))
	require.Empty(t, h.b.usage.waiting())
}

// Storage fails for hours: memory stays bounded, requests go on, and dropped records
// return with their leases.
func TestUsageRecord_StorageFails(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	s := &watchedStorage{Storage: h.storage}
	h.b.storage = s
	s.fail(nil, func(string) error { return errStorage })
	lease := h.leaseAs("app", "", "alice")
	h.b.usage.writing <- struct{}{} // records of a write in progress are not dropped
	for i := range maxUnwritten + 10*usageBatch {
		h.b.recordUsage(usageRecord{KeyID: fmt.Sprint("key_", i), ProjectID: h.project})
	}
	<-h.b.usage.writing
	require.LessOrEqual(t, len(h.b.usage.waiting()), maxUnwritten)
	require.False(t, containsKey(h.b.usage.waiting(), lease.Data["api_key_id"].(string)), "the oldest is dropped first")
	require.Eventually(t, func() bool { return len(h.lines("usage records not written; they stay in memory")) > 0 }, 10*time.Second, 10*time.Millisecond)
	s.fail(nil, nil)
	require.NoError(t, h.revoke(lease))
	h.flush()
	require.True(t, containsKey(h.known(), lease.Data["api_key_id"].(string)))
}

func TestUsageRecord_Settings(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"usage_record_identity": false}))
	lease := h.leaseAs("app", "entity-1", "userpass-alice")
	require.NotContains(t, fmt.Sprint(lease.Secret.InternalData), "alice")
	require.NotContains(t, fmt.Sprint(lease.Secret.InternalData), "entity-1")
	require.Empty(t, h.known()[0].DisplayName+h.known()[0].EntityID)

	// An earlier lease is recorded again without its identity.
	h.must(h.write("config", map[string]any{"usage_record_identity": true}))
	former := h.leaseAs("app", "entity-1", "userpass-alice")
	h.crash()
	h.must(h.write("config", map[string]any{"usage_record_identity": false}))
	require.NoError(t, h.revoke(former))
	h.flush()
	require.Empty(t, h.known()[0].DisplayName+h.known()[0].EntityID)

	// 0 disables recording and deletes all records.
	h.must(h.write("config", map[string]any{"usage_retention": 0}))
	require.NotEmpty(t, h.usageEntries())
	h.rollback()
	require.Empty(t, h.usageEntries())
	h.must(h.write("config", map[string]any{"usage_record_identity": true}))
	unrecorded := h.leaseAs("app", "entity-1", "userpass-alice")
	require.NotContains(t, fmt.Sprint(unrecorded.Secret.InternalData), "alice")
	h.flush()
	require.Empty(t, h.known())

	for said, data := range map[string]map[string]any{
		"usage_retention must be":                  {"usage_retention": "401d"},
		"usage_interval must be between 5m0s":      {"usage_interval": "4m"},
		"usage_interval requires usage_retention":  {"usage_interval": "5m"},
		"usage_retention must be between 1 and":    {"usage_retention": "1h"},
		"usage_interval must be between 5m0s and ": {"usage_interval": "25h", "usage_retention": "35d"},
	} {
		require.Contains(t, h.refused(h.write("config", data)), said)
	}
	for _, one := range []*logical.Response{lease, unrecorded} {
		require.NoError(t, h.revoke(one))
	}
}

// Retention deletes whole days, but not the record of a valid key.
func TestUsageRecord_Retention(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"usage_retention": "10d"}))
	h.b.recordUsage(usageRecord{KeyID: "key_short", ProjectID: h.project, Role: "app", IssuedAt: h.now(), Ends: h.now().Add(24 * time.Hour)})
	h.b.recordUsage(usageRecord{KeyID: "key_long", ProjectID: h.project, Role: "app", IssuedAt: h.now(), Ends: h.now().Add(15 * 24 * time.Hour)})
	h.flush()
	h.rollback()
	h.advance(9 * 24 * time.Hour)
	h.rollback()
	require.Len(t, h.known(), 2)
	h.advance(3 * 24 * time.Hour)
	h.must(h.list("projects")) // any call shows OpenAI's time
	h.rollback()
	require.Len(t, h.known(), 1)
	require.Equal(t, "key_long", h.known()[0].KeyID)
	require.Len(t, h.usageEntries(), 1)
	h.advance(12 * 24 * time.Hour)
	h.must(h.list("projects"))
	h.rollback()
	require.Empty(t, h.usageEntries())
}

// A node that may not write its local storage keeps no records. A performance secondary
// writes them.
func TestUsageRecord_Replication(t *testing.T) {
	t.Parallel()
	for state, writes := range map[consts.ReplicationState]bool{
		consts.ReplicationPerformanceStandby:                                        false,
		consts.ReplicationDRSecondary:                                               false,
		consts.ReplicationPerformanceSecondary:                                      true,
		consts.ReplicationPerformanceSecondary | consts.ReplicationDRPrimary:        true,
		consts.ReplicationPerformancePrimary | consts.ReplicationPerformanceStandby: false,
	} {
		h := configured(t, openaitest.Options{})
		h.become(state)
		h.b.recordUsage(usageRecord{KeyID: "key_1", ProjectID: h.project})
		h.storage.fail(storageFault{write: -1}) // counts the writes
		h.flush()
		require.Equal(t, writes, h.storage.last() != "", "%v", state)
		require.Empty(t, h.b.usage.waiting())
	}
}

// Rotations create records of static roles, and the roles contain the keys, too.
func TestUsageRecord_StaticRoles(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"revocation_delay": "1h"})
	first := h.staticCreds("batch")["api_key_id"].(string)
	h.must(h.write("rotate-role/batch", nil))
	second := h.staticCreds("batch")["api_key_id"].(string)
	for range 2 {
		keys, err := h.b.keysOfRole(context.Background(), h.storage, "static-roles/batch", h.now().Add(-time.Hour), h.now().Add(time.Hour))
		require.NoError(t, err)
		require.Len(t, keys, 2)
		require.True(t, containsKey(keys, first) && containsKey(keys, second))
		h.crash() // loses the records, but not the roles
	}
	h.must(h.remove("static-roles/batch"))
}

func TestUsageRecord_KeysOfARole(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	at := time.Date(2026, 11, 10, 12, 0, 0, 0, time.UTC)
	for i, r := range []usageRecord{
		{Role: "app", IssuedAt: at, Ends: at.Add(time.Hour)},
		{Role: "app", IssuedAt: at.Add(-48 * time.Hour), Ends: at.Add(-24 * time.Hour)},
		{Role: "app", IssuedAt: at.Add(48 * time.Hour)},
		{Role: "other", IssuedAt: at},
		{StaticRole: "app", IssuedAt: at},
		{Role: "app", IssuedAt: at.Add(-48 * time.Hour)},
	} {
		r.KeyID, r.ProjectID = fmt.Sprint("key_", i), h.project
		h.b.recordUsage(r)
		h.b.recordUsage(r)
	}
	ids := func(role string) (ids []string) {
		day := at.Truncate(usageDay)
		keys, err := h.b.keysOfRole(context.Background(), h.storage, role, day, day.Add(usageDay))
		require.NoError(t, err)
		for _, k := range keys {
			ids = append(ids, k.KeyID)
		}
		return ids
	}
	require.Equal(t, []string{"key_0", "key_5"}, ids("app"))
	require.Equal(t, []string{"key_4"}, ids("static-roles/app"))
	require.Empty(t, ids("none"))
}

// An entry of a newer version does not fail a report, and is not deleted early.
func TestUsageRecord_UnreadableEntry(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.b.recordUsage(usageRecord{KeyID: "key_1", ProjectID: h.project})
	h.flush()
	require.NoError(t, h.storage.Put(context.Background(), &logical.StorageEntry{Key: usageKeysPrefix + "2026-01-01/x-1", Value: []byte(`{"version":99,"records":{}}`)}))
	var n int
	unread, err := h.b.eachUsageRecord(context.Background(), h.storage, func(*usageRecord) { n++ })
	require.NoError(t, err)
	require.Equal(t, 1, unread)
	require.Equal(t, 1, n)
}

// Costs are read for the projects that the mount has recorded, by key and line item, and
// are exact.
func TestUsageCosts_ExactAndComplete(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{AmountsVary: true})
	today := h.now().UTC().Truncate(usageDay)
	for i := range 100 { // more than a page of days
		h.sim.AddCost(h.project, "key_1", "gpt-5-mini, input_tokens", today.AddDate(0, 0, -i), "0.000000000000000000001")
		h.sim.AddCost(h.project, "", "", today.AddDate(0, 0, -i), "0.1")
		h.sim.AddCost("proj_of_others", "key_2", "", today.AddDate(0, 0, -i), "1000")
	}
	req := &logical.Request{Storage: h.storage, MountPoint: "openai/"}
	got, err := h.b.readCosts(context.Background(), req, today.AddDate(0, 0, -99), today.AddDate(0, 0, 1), func(c client.Cost) string { return modelOf(c.LineItem) })
	require.NoError(t, err)
	require.Equal(t, "10.0000000000000000001", dollars(got.total))
	require.Equal(t, "10", dollars(got.cells[costCell{"", ""}]))
	require.Len(t, got.cells, 2)
	require.Equal(t, "0.0000000000000000001", dollars(got.cells[costCell{"key_1", "gpt-5-mini"}]))

	// A failure in the middle returns no partial costs.
	h.sim.Fail(openaitest.Fault{Method: "GET", Route: "/organization/costs", Skip: 1, Times: 4, Kind: openaitest.FaultStatus, Status: 500})
	_, err = h.b.readCosts(context.Background(), req, today.AddDate(0, 0, -99), today.AddDate(0, 0, 1), nil)
	require.Error(t, err)
}

// 100,000 records cost little memory in the recorder, since they are in storage.
func TestUsageRecord_MemoryOfManyRecords(t *testing.T) {
	h := configured(t, openaitest.Options{})
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	discard := &discarding{Storage: h.storage}
	before := heap()
	for i := range 100_000 {
		h.b.recordUsage(usageRecord{
			KeyID: fmt.Sprintf("key_%024d", i), AccountID: fmt.Sprintf("user-%024d", i), ProjectID: h.project, Type: typeAccount, Role: "app",
			EntityID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i%1000), DisplayName: "userpass-alice", IssuedAt: h.now(), Ends: h.now().Add(time.Hour),
		})
		if i%usageBatch == 0 {
			require.NoError(t, h.b.writeUsage(context.Background(), discard))
		}
	}
	grown := int64(heap()) - int64(before)
	t.Logf("100,000 records: %d writes of %d KiB in all, %.1f MiB of memory for the known keys", discard.puts, discard.bytes>>10, float64(grown)/(1<<20))
	require.Less(t, grown, int64(32<<20)) // twice the growth under the race detector
	require.Less(t, discard.puts, 100_000/usageBatch*3)
}

// discarding counts writes and discards them.
type discarding struct {
	logical.Storage
	puts, bytes int
}

func (d *discarding) Put(_ context.Context, entry *logical.StorageEntry) error {
	if !strings.HasPrefix(entry.Key, usageStoragePrefix) {
		return errors.New("not a record")
	}
	d.puts++
	d.bytes += len(entry.Value)
	return nil
}

// Usage records add no storage operation to a credential.
func TestUsageRecord_CostsNoStorageOperation(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.leaseAs("app", "", "root") // the role and the config are in memory now
	s := &watchedStorage{Storage: h.storage}
	ask := func(op logical.Operation, path string, secret *logical.Secret) *logical.Response {
		resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: op, Path: path, Storage: s, MountPoint: "openai/", EntityID: "entity-1", DisplayName: "alice", Secret: secret, Data: map[string]any{}})
		return h.must(resp, err)
	}
	const n = 50
	for range n {
		lease := h.stored(ask(logical.ReadOperation, "creds/app", nil))
		ask(logical.RenewOperation, "creds/app", lease.Secret)
		ask(logical.RevokeOperation, "creds/app", lease.Secret)
	}
	require.EqualValues(t, 2*n, s.operations.Load(), "the WAL entry of each create, written and deleted")
	require.NoError(t, h.b.writeUsage(context.Background(), s))
	require.EqualValues(t, 2*n+1, s.operations.Load(), "and one for all records")
	h.sim.KeepAll()
}

// A pooled key has no owner until it is returned.
func TestUsageRecord_OfAPooledKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("roles/app", map[string]any{"project_id": h.project, "pool_size": 1}))
	require.Eventually(t, func() bool { return h.b.pools.ready()["app"] == 1 }, 10*time.Second, 10*time.Millisecond)
	require.Empty(t, h.known())
	pooled := h.keysThere()
	lease := h.leaseAs("app", "entity-1", "userpass-alice")
	require.Contains(t, pooled, lease.Data["api_key_id"])
	require.Len(t, h.known(), 1)
	require.Equal(t, "entity-1", h.known()[0].EntityID)
	require.NoError(t, h.revoke(lease))
	h.must(h.write("roles/app", map[string]any{"pool_size": 0}))
	h.settle()
	h.sim.KeepAll()
}

// An unload writes what is pending; a disable, which deletes the storage, does not.
func TestUsageRecord_Unload(t *testing.T) {
	t.Parallel()
	for _, tainted := range []bool{false, true} {
		h := configured(t, openaitest.Options{})
		lease := h.leaseAs("app", "", "root")
		if tainted {
			h.manager.taint()
			time.Sleep(sysview.FreshFor)
		}
		h.b.Cleanup(context.Background())
		require.Len(t, h.usageEntries(), map[bool]int{false: 1, true: 0}[tainted])
		h.manager.untaint()
		h.restart()
		require.NoError(t, h.revoke(lease))
	}
}

// If renewals extend a key, its record ends with the longest lease.
func TestUsageRecord_EndsWithTheLongestLease(t *testing.T) {
	t.Parallel()
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		lease leaseData
		ends  time.Time
	}{
		{leaseData{credential: credential{CreatedAt: made, KeyExpires: made.Add(time.Hour)}, MaxTTL: 24 * time.Hour}, made.Add(24*time.Hour + expiryMargin)},
		{leaseData{credential: credential{CreatedAt: made, KeyExpires: made.Add(30 * time.Hour)}, MaxTTL: 24 * time.Hour}, made.Add(30 * time.Hour)},
		{leaseData{credential: credential{CreatedAt: made}, MaxTTL: 24 * time.Hour}, made.Add(24*time.Hour + expiryMargin)},
		{leaseData{credential: credential{CreatedAt: made}}, time.Time{}}, // a lease of the community plugin
	} {
		require.Equal(t, c.ends, c.lease.usageRecord().Ends)
	}
}

// keysOfRole returns the keys that a role had in a window, each once. The role has the
// form of usageRecord.role.
func (b *backend) keysOfRole(ctx context.Context, s logical.Storage, role string, start, end time.Time) (keys []usageRecord, err error) {
	seen := map[string]bool{}
	_, err = b.eachKnownKey(ctx, s, func(r *usageRecord) {
		if r.role() == role && r.within(start, end) && !seen[r.KeyID] {
			seen[r.KeyID] = true
			keys = append(keys, *r)
		}
	})
	return keys, err
}

// within reports whether the key may have been used in a window.
func (r *usageRecord) within(start, end time.Time) bool {
	return r.IssuedAt.Before(end) && (r.Ends.IsZero() || r.Ends.After(start))
}

// A hanging write delays the unload by no more than the budget of the last flush.
func TestUsageRecord_UnloadDoesNotWaitForAHangingWrite(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.b.recordUsage(usageRecord{KeyID: "key_1", ProjectID: h.project, Type: typeAccount, Role: "app", IssuedAt: h.now()})
	h.b.usage.writing <- struct{}{} // a write that hangs
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.b.lastFlush(context.Background())
	}()
	select {
	case <-done:
	case <-time.After(lastFlushBudget + 30*time.Second):
		t.Error("the unload waits for the write")
	}
	<-h.b.usage.writing
}
