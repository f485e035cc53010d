package openaisecrets

// This file owns what tidy believes of something that it does not see: of an
// account without a key, and of a listing.
//
// What must stay true: the engine makes no account without a key, so an account
// without one is more likely a listing's fault than an orphan. It is an orphan only
// if two complete listings that are minutes apart show no key of it, it is older
// than any lease of this mount can be, and a last look just before its deletion
// agrees. A listing that lacks a key which exists is not complete, whatever it says.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	longestLeaseStorageKey = "longest-lease"
	longestLeaseVersion    = 1
	// assumedLongest is what leases of a mount can have lasted that an earlier
	// release made, whose former roles nobody remembers: Vault's default limit, or
	// the mount's if that is longer.
	assumedLongest = 768 * time.Hour

	// confirmAfter is how far apart two listings must be that are to agree: as long
	// as one of OpenAI's servers may lag.
	confirmAfter = notFinalBefore
	// absenceHolds is how old the last look may be when an account is deleted.
	absenceHolds = time.Minute
	// absenceBatch is how many accounts one last look is for, and absenceLimit how
	// many a run deletes unless it is forced to.
	absenceBatch = 20
	absenceLimit = 20

	// A key that was handed out is remembered if the last one was so long before;
	// of each project so many are. Without that spacing a busy mount would remember
	// only keys that are too young for a listing to be held against.
	witnessSpacing = 2 * time.Minute
	maxWitnesses   = 8
)

// longestLeaseEntry is the longest lease that a role of this mount has ever
// allowed. The mount's max_lease_ttl, which may be raised again, does not limit it.
type longestLeaseEntry struct {
	Version      int           `json:"version"`
	LongestLease time.Duration `json:"longest_lease"`
}

// getLongestLease returns nil when it is not recorded.
func getLongestLease(ctx context.Context, s logical.Storage) (*longestLeaseEntry, error) {
	stored, err := s.Get(ctx, longestLeaseStorageKey)
	if err != nil {
		return nil, fmt.Errorf("reading the longest lease of the roles: %w", err)
	}
	if stored == nil {
		return nil, nil
	}
	var entry longestLeaseEntry
	if err := stored.DecodeJSON(&entry); err != nil {
		return nil, fmt.Errorf("decoding the longest lease of the roles: %w", err)
	}
	if entry.Version > longestLeaseVersion {
		return nil, fmt.Errorf("the longest lease of the roles was written by a newer version of this plugin (format %d, this one knows %d)", entry.Version, longestLeaseVersion)
	}
	return &entry, nil
}

func putLongestLease(ctx context.Context, s logical.Storage, lease time.Duration) error {
	entry, err := logical.StorageEntryJSON(longestLeaseStorageKey, longestLeaseEntry{Version: longestLeaseVersion, LongestLease: lease})
	if err != nil {
		return err
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing the longest lease of the roles: %w", err)
	}
	return nil
}

// raiseLongestLease records that a role is about to allow leases of that length. It
// precedes the write of the role.
func (b *backend) raiseLongestLease(ctx context.Context, s logical.Storage, lease time.Duration) error {
	lease = min(lease, maxRotationPeriod)
	b.tidy.longest.Lock() // roles are written in parallel
	defer b.tidy.longest.Unlock()
	entry, err := getLongestLease(ctx, s)
	if err != nil {
		return err
	}
	if entry == nil {
		if lease, err = b.longestUnrecorded(ctx, s, lease); err != nil {
			return err
		}
	} else if lease <= entry.LongestLease {
		return nil
	}
	return putLongestLease(ctx, s, lease)
}

// longestUnrecorded is the longest lease of a mount without the entry that now
// allows leases of that length. What has no tag has issued nothing; what has one was
// made by an earlier release.
func (b *backend) longestUnrecorded(ctx context.Context, s logical.Storage, lease time.Duration) (time.Duration, error) {
	if _, err := getTag(ctx, s); errors.Is(err, errNoTag) {
		return lease, nil
	} else if err != nil {
		return 0, err
	}
	lease = max(lease, assumedLongest, b.System().MaxLeaseTTL())
	names, err := listNames(ctx, s, roleStoragePrefix, communityRolePrefix)
	if err != nil {
		return 0, fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range names {
		r, err := getRole(ctx, s, name)
		switch {
		case errors.As(err, &unreadable{}): // by a newer release, which has recorded its lease
		case err != nil:
			return 0, err
		case r != nil:
			lease = max(lease, r.maxTTL())
		}
	}
	return lease, nil
}

// longestLease returns the longest lease of this mount, and records it if tidy may
// write. roles is the longest of the roles that there are.
func (s *sweep) longestLease(ctx context.Context, roles time.Duration) (time.Duration, error) {
	if s.apply {
		if err := s.raiseLongestLease(ctx, s.storage, roles); err != nil {
			return 0, err
		}
	}
	entry, err := getLongestLease(ctx, s.storage)
	switch {
	case err != nil:
		return 0, err
	case entry == nil:
		longest, err := s.longestUnrecorded(ctx, s.storage, roles)
		return min(longest, maxRotationPeriod), err
	}
	return min(max(entry.LongestLease, roles), maxRotationPeriod), nil // it must not overflow a sum
}

// witness is a key that OpenAI must list as long as it lives.
type witness struct {
	id, account string
	at, end     time.Time // when it was made, and when it expires, zero = never
}

// valid reports whether a listing must show the key: it is old enough for every
// server of OpenAI's to know it, and has not expired.
func (w witness) valid(now time.Time) bool {
	return now.Sub(w.at) >= notFinalBefore && (w.end.IsZero() || now.Before(w.end))
}

// witnesses are the keys that this process has handed out lately, by project. The
// zero value is ready.
type witnesses struct {
	mu   sync.Mutex
	keys map[string][]witness
}

// add remembers a key that is handed out.
func (w *witnesses) add(c credential, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	keys := w.keys[c.ProjectID]
	if n := len(keys); c.KeyID == "" || (n > 0 && now.Sub(keys[n-1].at).Abs() < witnessSpacing) {
		return
	}
	if w.keys == nil {
		w.keys = map[string][]witness{}
	}
	if len(keys) == maxWitnesses {
		keys = slices.Delete(keys, 0, 1)
	}
	w.keys[c.ProjectID] = append(keys, witness{id: c.KeyID, account: c.ID, at: now, end: c.KeyExpires})
}

func (w *witnesses) of(project string) []witness {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.keys[project])
}

func (w *witnesses) forget(project, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.keys[project] == nil { // it was a static role's
		return
	}
	w.keys[project] = slices.DeleteFunc(w.keys[project], func(k witness) bool { return k.id == id })
}

// muster holds a key listing against the keys that it must show.
type muster struct {
	project string
	missing map[string]witness
}

func (s *sweep) muster(project string, static []witness) muster {
	m := muster{project: project, missing: map[string]witness{}}
	now := s.now()
	for _, w := range append(static, s.tidy.witnesses.of(project)...) {
		if w.valid(now) {
			m.missing[w.id] = w
		}
	}
	return m
}

// shown takes note of a listed key. One that is shown as another account's is not.
func (m muster) shown(k client.ProjectKey) {
	if w, ok := m.missing[k.ID]; ok && (w.account == k.AccountID || w.account == k.UserID) {
		delete(m.missing, k.ID)
	}
}

// complete returns why the listing is not complete although it was read to its end:
// it lacks a key that exists.
func (s *sweep) complete(ctx context.Context, snap *snapshot, m muster) error {
	for id := range m.missing {
		_, err := snap.api.GetProjectKey(ctx, m.project, id)
		if err == nil {
			return fmt.Errorf("the listing of keys is not complete: it does not show key %s as its account's, and OpenAI knows it", id)
		}
		if err := snap.keyDeleted(ctx, m.project, id, err, time.Time{}); err != nil {
			return fmt.Errorf("the listing of keys may not be complete: it does not show key %s as its account's: %w", id, err)
		}
		s.tidy.witnesses.forget(m.project, id) // its lease was revoked
		s.moved()
	}
	return nil
}

// absences are the accounts that a project's listings showed without a key, by the
// hash of their ID, and when that was seen first, as time since then. They are lost
// with the process, which only means that they are looked at longer.
type absences map[uint64]time.Time

// confirm keeps those accounts without a key that a listing before has shown
// without one, too, and returns how many others there are. The listing began and
// ended at these times.
func (t *tidyState) confirm(project string, accounts []listedAccount, began, ended time.Time) (confirmed []listedAccount, unconfirmed int) {
	before, now := t.absent[project], absences{}
	confirmed = slices.DeleteFunc(accounts, func(a listedAccount) bool {
		if a.keys > 0 {
			return false
		}
		hash := hash(a.id())
		first, seen := before[hash]
		if !seen {
			first = ended
		}
		now[hash] = first
		if seen && began.Sub(first) >= confirmAfter {
			return false
		}
		unconfirmed++
		return true
	})
	if t.absent == nil {
		t.absent = map[string]absences{}
	}
	t.absent[project] = now
	if len(now) == 0 {
		delete(t.absent, project)
	}
	return confirmed, unconfirmed
}

// removeAbsent deletes accounts without a key, after a last look at each batch.
func (s *sweep) removeAbsent(ctx context.Context, project string, absent []listedAccount) error {
	var looked time.Time
	for i, a := range absent {
		if i%absenceBatch == 0 || s.now().Sub(looked) > absenceHolds {
			if err := s.lookAgain(ctx, project, absent[i:min(len(absent), i-i%absenceBatch+absenceBatch)]); err != nil {
				delete(s.tidy.absent, project) // two listings have erred
				return err
			}
			looked = s.now()
		}
		o := s.orphanAccount(project, a)
		same, err := s.sameAccount(ctx, project, a)
		if err != nil {
			err = s.notRemoved(ctx, o, err)
		} else if same {
			err = s.removeOne(ctx, o)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lookAgain returns an error unless another listing shows that these accounts have
// no key.
func (s *sweep) lookAgain(ctx context.Context, project string, batch []listedAccount) error {
	snap, err := s.current(ctx, s.storage)
	if err != nil {
		return err
	}
	_, static, err := s.staticClaims(ctx, project)
	if err != nil {
		return err
	}
	keyless := map[string]bool{}
	for _, a := range batch {
		keyless[a.id()] = true
	}
	muster := s.muster(project, static)
	if err := snap.api.EachProjectKey(ctx, project, func(keys []client.ProjectKey) error {
		s.moved()
		for _, k := range keys {
			muster.shown(k)
			switch {
			case ownerless(k) && !s.dead(k, snap.api.NotAfter(s.now())):
				return unknownOwner(k)
			case keyless[k.AccountID] || keyless[k.UserID]:
				return fmt.Errorf("key %s belongs to an account that two listings have shown without a key; no account without a key is deleted", k.ID)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return s.complete(ctx, snap, muster)
}

// sameAccount reads an account and reports whether it is what the listing showed.
func (s *sweep) sameAccount(ctx context.Context, project string, a listedAccount) (bool, error) {
	snap, err := s.current(ctx, s.storage)
	if err != nil {
		return false, err
	}
	account, err := snap.api.GetServiceAccount(ctx, project, a.id())
	if client.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("it could not be read before its deletion: %w", err)
	}
	s.moved()
	return account.ID == a.id() && account.Name == a.name() && seconds(account.CreatedAt) == a.created, nil
}
