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
	"fmt"
	"slices"
	"time"

	"vault-plugin-secrets-openai/client"
)

const (

	// confirmAfter is how far apart two listings must be that are to agree: as long
	// as one of OpenAI's servers may lag.
	confirmAfter = notFinalBefore
	// absenceHolds is how old the last look may be when an account is deleted.
	absenceHolds = time.Minute
	// absenceBatch is how many accounts one last look is for, and absenceLimit how
	// many a run deletes unless it is forced to.
	absenceBatch = 20
)

// longestLease returns the longest lease of this mount, and records it if tidy may
// write. roles is the longest of the roles that there are.
func (s *sweep) longestLease(ctx context.Context, roles time.Duration) (time.Duration, error) {
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
		return min(longest, maxRotationPeriod), err
	}
	return min(max(entry.LongestLease, roles), maxRotationPeriod), nil // it must not overflow a sum
}

// muster holds a key listing against the keys that it must show.
type muster struct {
	project string
	missing map[string]witness
}

func (s *sweep) muster(project string, static []witness) muster {
	m := muster{project: project, missing: map[string]witness{}}
	now := s.b.now()
	for _, w := range append(static, s.b.tidy.witnesses.of(project)...) {
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
		s.b.tidy.witnesses.forget(m.project, id) // its lease was revoked
		s.moved()
	}
	return nil
}

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
		if i%absenceBatch == 0 || s.b.now().Sub(looked) > absenceHolds {
			if err := s.lookAgain(ctx, project, absent[i:min(len(absent), i-i%absenceBatch+absenceBatch)]); err != nil {
				delete(s.b.tidy.absent, project) // two listings have erred
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
func (s *sweep) lookAgain(ctx context.Context, project string, batch []listedAccount) error {
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
	muster := s.muster(project, static)
	if err := snap.api.EachProjectKey(ctx, project, func(keys []client.ProjectKey) error {
		s.moved()
		for _, k := range keys {
			muster.shown(k)
			switch {
			case ownerless(k) && !s.dead(k, snap.api.NotAfter(s.b.now())):
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
	snap, err := s.b.current(ctx, s.storage)
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
