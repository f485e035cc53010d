package openaisecrets

// This file owns the records of who had which key: how they are collected, stored, read
// and deleted. OpenAI reports costs by key ID, also long after the key is deleted, and
// has no name for it then.
//
// What must stay true: a record costs a request neither a storage operation nor a wait;
// the memory is bounded even if storage fails; records are written only where this node
// may write local storage. A record that a crash lost returns with the next renewal or
// the revocation of its lease, whose internal data has all of it.

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-secure-stdlib/base62"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// usageStoragePrefix is local to each cluster, like the WAL: a performance secondary
	// records the credentials that it issued.
	usageStoragePrefix = "usage/"
	usageKeysPrefix    = usageStoragePrefix + "keys/" // then <day>/<entry>
	usageVersion       = 1

	// usageFlush is how long a record may stay in memory only, and usageBatch how many
	// records are written at once, and the most that an entry has.
	usageFlush = 30 * time.Second
	usageBatch = 256
	// maxUnwritten bounds the records in memory while storage fails; the oldest are
	// dropped first.
	maxUnwritten = 10_000
	// maxHeld bounds each of the two generations of known keys.
	maxHeld = 100_000
	// maxDisplayName bounds the only part of a record whose length a client chooses.
	maxDisplayName = 256
	// lastFlushBudget bounds the write when the plugin is unloaded.
	lastFlushBudget = 2 * time.Second
)

// usageRecord is who had a key.
type usageRecord struct {
	KeyID     string `json:"api_key_id"`
	AccountID string `json:"service_account_id,omitempty"`
	ProjectID string `json:"project_id"`
	Type      string `json:"credential_type"`
	// Role or StaticRole is set.
	Role       string `json:"role,omitempty"`
	StaticRole string `json:"static_role,omitempty"`
	// EntityID and DisplayName identify the client; empty if it has none, or without
	// usage_record_identity.
	EntityID    string    `json:"entity_id,omitempty"`
	DisplayName string    `json:"display_name,omitempty"`
	IssuedAt    time.Time `json:"issued_at"`
	// Ends is when the key can be used no more; zero if unknown.
	Ends time.Time `json:"ends_at,omitzero"`
}

// usageEntry is the value of an entry.
type usageEntry struct {
	Version int           `json:"version"`
	Records []usageRecord `json:"records"`
}

// role is the role's name, with static-roles/ before that of a static role.
func (r *usageRecord) role() string {
	if r.StaticRole != "" {
		return staticLabel + r.StaticRole
	}
	return r.Role
}

// credential is what destroy needs.
func (r *usageRecord) credential() credential {
	return credential{Version: credentialVersion, Type: r.Type, ProjectID: r.ProjectID, ID: r.AccountID, KeyID: r.KeyID, StaticRole: r.StaticRole, CreatedAt: r.IssuedAt, KeyExpires: r.Ends}
}

// usageRecord is the record of a lease's key. With key_expiry=ttl, a renewal moves the
// end of the key, up to max_ttl.
func (l leaseData) usageRecord() usageRecord {
	r := usageRecord{KeyID: l.KeyID, AccountID: l.ID, ProjectID: l.ProjectID, Type: l.Type, Role: l.Role, EntityID: l.EntityID, DisplayName: l.DisplayName, IssuedAt: l.CreatedAt, Ends: l.KeyExpires}
	if l.MaxTTL > 0 && !l.CreatedAt.IsZero() {
		r.Ends = later(r.Ends, l.CreatedAt.Add(l.MaxTTL+expiryMargin))
	}
	return r
}

// usageRecord is the record of a key of a static role.
func (r *staticRole) usageRecord(name string, k *staticKey) usageRecord {
	return usageRecord{KeyID: k.ID, AccountID: r.ServiceAccountID, ProjectID: r.ProjectID, Type: typeKey, StaticRole: name, IssuedAt: k.CreatedAt, Ends: k.ExpiresAt}
}

// usageRecords collects the records of this process.
type usageRecords struct {
	writing chan struct{} // has an element while somebody writes; a wait for it ends with the context
	// Of the writer: the entry that it fills, written again with each flush until it is
	// full, so that a mount has few entries however seldom it issues a credential.
	process string
	at      string // the day
	number  int
	entry   []usageRecord

	mu       sync.Mutex
	swept    time.Time // when old days were last deleted
	pending  []usageRecord
	taken    []usageRecord // of pending, by the writer: not in storage yet
	flushing bool          // a goroutine waits to write
	full     chan struct{} // wakes it
	dropped  int
	// held has the keys that this process recorded, as hashes: an older and a newer
	// generation.
	seed             maphash.Seed
	held, heldBefore map[uint64]struct{}
	turned           time.Time
}

func newUsageRecords() *usageRecords {
	return &usageRecords{writing: make(chan struct{}, 1), full: make(chan struct{}, 1), seed: maphash.MakeSeed(), held: map[uint64]struct{}{}}
}

// holds reports whether this process recorded the key lately. One that it recorded long
// ago is recorded again, before retention deletes the first record.
func (u *usageRecords) holds(key string) bool {
	hash := maphash.String(u.seed, key)
	u.mu.Lock()
	defer u.mu.Unlock()
	_, newer := u.held[hash]
	_, older := u.heldBefore[hash]
	return newer || older
}

// recordUsage remembers a key. It returns immediately.
func (b *backend) recordUsage(r usageRecord) {
	if r.KeyID == "" || r.ProjectID == "" {
		return
	}
	if len(r.DisplayName) > maxDisplayName {
		r.DisplayName = strings.ToValidUTF8(r.DisplayName[:maxDisplayName], "")
	}
	u, now := b.usage, b.now()
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.held) >= maxHeld || now.Sub(u.turned).Abs() > defaultUsageRetention/4 {
		u.heldBefore, u.held, u.turned = u.held, map[uint64]struct{}{}, now
	}
	u.held[maphash.String(u.seed, r.KeyID)] = struct{}{}
	u.pending = append(u.pending, r)
	if len(u.taken)+len(u.pending) > maxUnwritten {
		u.forget(u.pending[:usageBatch])
		u.dropped += usageBatch
		u.pending = slices.Clone(u.pending[usageBatch:])
	}
	if !u.flushing {
		u.flushing = true
		go b.flushUsage()
	}
	if len(u.pending)%usageBatch == 0 {
		select {
		case u.full <- struct{}{}:
		default:
		}
	}
}

// forget makes the renewal or revocation of a lease restore its record. The caller holds
// mu.
func (u *usageRecords) forget(records []usageRecord) {
	for i := range records {
		hash := maphash.String(u.seed, records[i].KeyID)
		delete(u.held, hash)
		delete(u.heldBefore, hash)
	}
}

// restoreUsage records the key of a lease again unless this process holds it.
func (b *backend) restoreUsage(lease leaseData) (restored bool) {
	if restored = !b.usage.holds(lease.KeyID); restored {
		b.recordUsage(lease.usageRecord())
	}
	return restored
}

// flushUsage writes records until there are none. It runs while there are any.
func (b *backend) flushUsage() {
	u := b.usage
	for {
		timer := time.NewTimer(usageFlush)
		select {
		case <-timer.C:
		case <-u.full:
			timer.Stop()
		case <-b.lifetime.Done():
			timer.Stop()
			return
		}
		if err := b.writeUsage(b.lifetime, b.storage); err != nil && b.lifetime.Err() == nil {
			b.Logger().Warn("usage records not written; they stay in memory", "error", err)
		}
		u.mu.Lock()
		done := len(u.pending) == 0
		u.flushing = !done
		if u.dropped > 0 {
			b.Logger().Warn("usage records dropped because storage fails; the renewal or revocation of their leases restores them", "records", u.dropped)
			u.dropped = 0
		}
		u.mu.Unlock()
		if done {
			return
		}
	}
}

// take removes up to n pending records, the oldest first. Those that it took before are
// in storage.
func (u *usageRecords) take(n int) []usageRecord {
	u.mu.Lock()
	defer u.mu.Unlock()
	n = min(n, len(u.pending))
	u.taken, u.pending = slices.Clone(u.pending[:n]), slices.Clone(u.pending[n:])
	return u.taken
}

// giveBack returns records that were not written.
func (u *usageRecords) giveBack() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.taken, u.pending = nil, append(u.taken, u.pending...)
}

// drop forgets all pending records.
func (u *usageRecords) drop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.forget(u.pending)
	u.pending = nil
}

// waiting returns a copy of the records that may not be in storage.
func (u *usageRecords) waiting() []usageRecord {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Concat(u.taken, u.pending)
}

// writeUsage writes the pending records. A write whose answer is lost is repeated under
// the same storage key.
func (b *backend) writeUsage(ctx context.Context, s logical.Storage) error {
	u := b.usage
	select {
	case u.writing <- struct{}{}:
		defer func() { <-u.writing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if len(u.waiting()) == 0 {
		return nil
	}
	if !b.mayWriteLocally() {
		u.drop()
		return nil
	}
	snap, err := b.current(ctx, s)
	if errors.Is(err, errNotConfigured) || err == nil && snap.config.UsageRetention == 0 {
		u.drop()
		return nil
	}
	if err != nil {
		return err
	}
	if u.process == "" {
		if u.process, err = base62.Random(10); err != nil {
			return err
		}
	}
	for {
		if today := b.now().UTC().Format(time.DateOnly); today != u.at {
			u.at, u.entry, u.number = today, nil, u.number+1
		}
		taken := u.take(usageBatch - len(u.entry))
		if len(taken) == 0 {
			return nil
		}
		all := slices.Concat(u.entry, taken)
		if !snap.config.UsageRecordIdentity {
			for i := range all {
				all[i].EntityID, all[i].DisplayName = "", ""
			}
		}
		key := fmt.Sprintf("%s%s/%s-%d", usageKeysPrefix, u.at, u.process, u.number)
		if err := writeEntry(ctx, s, key, "usage records", usageEntry{Version: usageVersion, Records: all}); err != nil {
			u.giveBack()
			return err
		}
		if u.entry = all; len(all) == usageBatch {
			u.entry, u.number = nil, u.number+1
		}
	}
}

// lastFlush writes what is pending when the plugin is unloaded, as far as Vault lets it.
// The records of a mount that is being disabled are deleted with its storage.
func (b *backend) lastFlush(ctx context.Context) {
	if len(b.usage.waiting()) == 0 || b.System().Tainted() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lastFlushBudget)
	defer cancel()
	if err := b.writeUsage(ctx, b.storage); err != nil {
		b.Logger().Debug("usage records not written before the plugin was unloaded; renewals and revocations restore them", "error", err)
	}
}

// eachUsageRecord calls each with every record, those in memory last. A key may have
// several. An entry that this version cannot read is skipped and counted.
func (b *backend) eachUsageRecord(ctx context.Context, s logical.Storage, each func(*usageRecord)) (unread int, err error) {
	pending := b.usage.waiting() // before storage, so that none is missed while it is written
	days, err := s.List(ctx, usageKeysPrefix)
	if err != nil {
		return 0, fmt.Errorf("listing the usage records: %w", err)
	}
	slices.Sort(days)
	for _, day := range days {
		entries, err := s.List(ctx, usageKeysPrefix+day)
		if err != nil {
			return unread, fmt.Errorf("listing the usage records: %w", err)
		}
		for _, name := range entries {
			entry, err := readUsageEntry(ctx, s, day+name)
			if errors.As(err, &unreadable{}) {
				b.Logger().Warn("usage records not read", "error", err)
				unread++
				continue
			}
			if err != nil {
				return unread, err
			}
			for i := range entry.Records {
				each(&entry.Records[i])
			}
		}
	}
	for i := range pending {
		each(&pending[i])
	}
	return unread, nil
}

// readUsageEntry reads an entry by its name; it is empty if it was deleted meanwhile.
func readUsageEntry(ctx context.Context, s logical.Storage, name string) (entry usageEntry, err error) {
	_, err = readEntry(ctx, s, usageKeysPrefix+name, "the usage records "+name, usageVersion, &entry)
	return entry, err
}

// eachStaticRecord calls each with the records of the keys that static roles have now: a
// key may be older than the records.
func (b *backend) eachStaticRecord(ctx context.Context, s logical.Storage, each func(*usageRecord)) error {
	names, err := listNames(ctx, s, staticStoragePrefix)
	if err != nil {
		return fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range names {
		r, err := getStaticRole(ctx, s, name)
		if err != nil && !errors.As(err, &unreadable{}) {
			return err
		}
		if err != nil || r == nil {
			continue
		}
		for _, k := range r.keys() {
			record := r.usageRecord(name, &k)
			each(&record)
		}
	}
	return nil
}

// eachKnownKey calls each with all that is known of keys, a key perhaps several times.
func (b *backend) eachKnownKey(ctx context.Context, s logical.Storage, each func(*usageRecord)) (unread int, err error) {
	if unread, err = b.eachUsageRecord(ctx, s, each); err != nil {
		return unread, err
	}
	return unread, b.eachStaticRecord(ctx, s, each)
}

// sweepUsage deletes the days that are older than the retention, once a day and after a
// change of it. Records of keys that may still be valid, or that a limit of a month still
// counts, move to the present day first.
func (b *backend) sweepUsage(ctx context.Context, req *logical.Request) error {
	u, now := b.usage, b.now()
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	retention := snap.config.UsageRetention
	u.mu.Lock()
	due := now.Sub(u.swept).Abs() >= usageDay
	if due {
		u.swept = now // a config write meanwhile makes it due again
	}
	u.mu.Unlock()
	if !due {
		return nil
	}
	// A clock that is ahead by mistake must not delete what limits count.
	if err := b.deleteUsage(ctx, req.Storage, snap.api.NotAfter(now), retention); err != nil {
		u.sweepSoon()
		return err
	}
	return nil
}

// deleteUsage deletes the days that are older than the retention.
func (b *backend) deleteUsage(ctx context.Context, s logical.Storage, now time.Time, retention time.Duration) error {
	days, err := s.List(ctx, usageKeysPrefix)
	if err != nil {
		return fmt.Errorf("listing the usage records: %w", err)
	}
	keep := now
	if retention >= longestMonth {
		keep, _ = windowOf(windowMonth, now.UTC().Truncate(usageDay))
	}
	for _, day := range days {
		date, err := time.Parse(time.DateOnly, strings.TrimSuffix(day, "/"))
		if err != nil || retention > 0 && now.Before(date.Add(usageDay+retention)) {
			continue
		}
		if err := b.deleteUsageDay(ctx, s, day, retention > 0, keep); err != nil {
			return err
		}
	}
	return nil
}

// deleteUsageDay deletes a day. With keepSome, records of keys that end after keep move.
func (b *backend) deleteUsageDay(ctx context.Context, s logical.Storage, day string, keepSome bool, keep time.Time) error {
	entries, err := s.List(ctx, usageKeysPrefix+day)
	if err != nil {
		return fmt.Errorf("listing the usage records: %w", err)
	}
	for _, name := range entries {
		if keepSome {
			entry, err := readUsageEntry(ctx, s, day+name)
			if err != nil && !errors.As(err, &unreadable{}) {
				return err
			}
			for _, r := range entry.Records {
				if r.Ends.After(keep) {
					b.recordUsage(r)
				}
			}
			if err := b.writeUsage(ctx, s); err != nil {
				return err
			}
		}
		if err := s.Delete(ctx, usageKeysPrefix+day+name); err != nil {
			return fmt.Errorf("deleting old usage records: %w", err)
		}
	}
	b.Logger().Debug("old usage records deleted", "day", strings.TrimSuffix(day, "/"), "entries", len(entries))
	return nil
}

// sweepSoon makes the next periodic call delete what the retention no longer allows.
func (u *usageRecords) sweepSoon() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.swept = time.Time{}
}
