package openaisecrets

// This file owns tidy's rules of absence: when an account counts as having no key, and
// when a listing counts as complete.
//
// What must stay true: the engine never creates an account without a key, so one
// without a key is more likely an incomplete listing than an orphan. It is an orphan
// only if two complete listings that are minutes apart show no key of it, it is older
// than any lease of this mount can be, and a final listing just before its deletion
// agrees. A listing that lacks an existing key is incomplete, even if it was read to its
// end.

import (
	"context"
	"fmt"
	"slices"
	"time"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/schedule"
)

const (
	// confirmAfter is the least time between two listings that confirm an absence: as
	// long as one of OpenAI's servers may lag.
	confirmAfter = notFinalBefore
	// absenceHolds is how old the final listing may be when an account is deleted.
	absenceHolds = time.Minute
	// absenceBatch is the number of accounts checked with one final listing.
	absenceBatch = 20
)

// longestLease returns the longest lease of this mount, and records it if tidy may
// write. roles is the longest lease of the current roles.
func (s *tidyRun) longestLease(ctx context.Context, roles time.Duration) (time.Duration, error) {
	if s.apply {
		if err := s.b.raiseLongestLease(ctx, s.storage, roles); err != nil {
			return 0, err
		}
	}
	entry, err := getLongestLease(ctx, s.storage)
	switch {
	case err != nil:
		return 0, err
	case entry == nil:
		longest, err := s.b.longestUnrecorded(ctx, s.storage, roles)
		return min(longest, schedule.MaxPeriod), err
	}
	return min(max(entry.LongestLease, roles), schedule.MaxPeriod), nil // bounded, so that sums do not overflow
}

// requiredKeys checks a key listing for the keys that it must show.
type requiredKeys struct {
	project string
	missing map[string]knownKey
}

func (s *tidyRun) requiredKeys(project string, static []knownKey) requiredKeys {
	m := requiredKeys{project: project, missing: map[string]knownKey{}}
	now := s.b.now()
	for _, w := range append(static, s.b.tidy.knownKeys.of(project)...) {
		if w.valid(now) {
			m.missing[w.id] = w
		}
	}
	return m
}

// shown records a listed key, unless it is listed for another account.
func (m requiredKeys) shown(k client.ProjectKey) {
	if w, ok := m.missing[k.ID]; ok && (w.account == k.AccountID || w.account == k.UserID) {
		delete(m.missing, k.ID)
	}
}

// complete returns an error if the listing lacks a key that exists.
func (s *tidyRun) complete(ctx context.Context, snap *snapshot, m requiredKeys) error {
	for id := range m.missing {
		_, err := snap.api.GetProjectKey(ctx, m.project, id)
		if err == nil {
			return fmt.Errorf("key listing is incomplete: it does not show existing key %s under its account", id)
		}
		if err := snap.keyDeleted(ctx, m.project, id, err, time.Time{}); err != nil {
			return fmt.Errorf("key listing may be incomplete: it does not show key %s under its account: %w", id, err)
		}
		s.b.tidy.knownKeys.forget(m.project, id) // its lease was revoked
		s.moved()
	}
	return nil
}

// confirm keeps the accounts without a key that an earlier listing also showed without
// one, and counts the others. began and ended are the times of this listing.
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

// removeAbsent deletes accounts without a key, after a final listing for each batch.
func (s *tidyRun) removeAbsent(ctx context.Context, project string, absent []listedAccount) error {
	var looked time.Time
	for i, a := range absent {
		if i%absenceBatch == 0 || s.b.now().Sub(looked) > absenceHolds {
			if err := s.lookAgain(ctx, project, absent[i:min(len(absent), i-i%absenceBatch+absenceBatch)]); err != nil {
				delete(s.b.tidy.absent, project) // the earlier listings cannot be trusted
				return err
			}
			looked = s.b.now()
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
func (s *tidyRun) lookAgain(ctx context.Context, project string, batch []listedAccount) error {
	snap, err := s.b.current(ctx, s.storage)
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
	required := s.requiredKeys(project, static)
	if err := snap.api.EachProjectKey(ctx, project, func(keys []client.ProjectKey) error {
		s.moved()
		for _, k := range keys {
			required.shown(k)
			switch {
			case ownerless(k) && !s.keyExpired(k, snap.api.NotAfter(s.b.now())):
				return unknownOwner(k)
			case keyless[k.AccountID] || keyless[k.UserID]:
				return fmt.Errorf("key %s belongs to an account that two listings showed without a key; the accounts without a key in this project are not deleted", k.ID)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return s.complete(ctx, snap, required)
}

// sameAccount reads an account and reports whether it is what the listing showed.
func (s *tidyRun) sameAccount(ctx context.Context, project string, a listedAccount) (bool, error) {
	snap, err := s.b.current(ctx, s.storage)
	if err != nil {
		return false, err
	}
	account, err := snap.api.GetServiceAccount(ctx, project, a.id())
	if client.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading the account before its deletion: %w", err)
	}
	s.moved()
	return account.ID == a.id() && account.Name == a.name() && seconds(account.CreatedAt) == a.created, nil
}
