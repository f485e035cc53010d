// This file owns the simulator's objects and their order. Every object has a sequence
// number that is never reused, and lists are sorted by it. An ID that was listed keeps its
// place, so that a page cursor remains valid after its object was deleted.

package openaitest

import (
	"slices"
	"time"
)

// entity is the common part of projects, accounts and keys.
type entity struct {
	id        string
	seq       uint64
	name      string
	createdAt time.Time
	overHTTP  bool // created by a caller, hence a leak unless kept
}

func (e *entity) base() *entity { return e }

type table[T interface{ base() *entity }] struct {
	byID map[string]T
	list []T // by ascending sequence number
}

func newTable[T interface{ base() *entity }]() table[T] {
	return table[T]{byID: map[string]T{}}
}

func (t *table[T]) add(item T) {
	t.byID[item.base().id] = item
	t.list = append(t.list, item)
}

func (t *table[T]) remove(item T) {
	delete(t.byID, item.base().id)
	i := t.after(item.base().seq - 1)
	t.list = slices.Delete(t.list, i, i+1)
}

// after is the index of the first item after a sequence number.
func (t *table[T]) after(seq uint64) int {
	i, _ := slices.BinarySearchFunc(t.list, seq+1, func(item T, target uint64) int {
		switch have := item.base().seq; {
		case have < target:
			return -1
		case have > target:
			return 1
		}
		return 0
	})
	return i
}

// place is the current or former position of an ID in its list.
type place struct {
	list string
	seq  uint64
}

func (s *Server) newEntity(list, prefix, name, requestID string) entity {
	s.seq++
	e := entity{
		id:        prefix + alnum(24),
		seq:       s.seq,
		name:      name,
		createdAt: s.now(),
		overHTTP:  requestID != "",
	}
	s.places[e.id] = place{list: list, seq: e.seq}
	return e
}

// credential is the common part of admin keys and project keys.
type credential struct {
	entity
	value     string
	activeAt  time.Time
	expiresAt time.Time // zero if it does not expire
	lastUsed  time.Time // zero if never
	expired   bool      // its expiry is in the ledger
}

func (k *credential) alive(now time.Time) bool {
	return k.expiresAt.IsZero() || now.Before(k.expiresAt)
}

func (k *credential) working(now time.Time) bool {
	return k.alive(now) && !now.Before(k.activeAt)
}

// setExpiry sets the key to expire that many seconds after now, truncated to seconds; 0
// for no expiry.
func (s *Server) setExpiry(k *credential, seconds int64) {
	if seconds == 0 {
		return
	}
	k.expiresAt = s.now().Truncate(time.Second).Add(time.Duration(seconds) * time.Second)
	if s.nextExpiry.IsZero() || k.expiresAt.Before(s.nextExpiry) {
		s.nextExpiry = k.expiresAt
	}
}

// expire records every newly expired key in the ledger, with the time of its expiry. It
// checks the keys only when one of them may have expired.
func (s *Server) expire() {
	now := s.now()
	if s.nextExpiry.IsZero() || now.Before(s.nextExpiry) {
		return
	}
	s.nextExpiry = time.Time{}
	check := func(k *credential, kind, project string) {
		switch {
		case k.expired || k.expiresAt.IsZero():
		case k.alive(now):
			if s.nextExpiry.IsZero() || k.expiresAt.Before(s.nextExpiry) {
				s.nextExpiry = k.expiresAt
			}
		default:
			k.expired = true
			s.ledger = append(s.ledger, Entry{
				At: k.expiresAt, Event: EventExpired, Kind: kind, ID: k.id, Name: k.name, ProjectID: project,
			})
		}
	}
	for _, p := range s.projects.list {
		for _, k := range p.keys.list {
			check(&k.credential, KindKey, p.id)
		}
	}
	for _, k := range s.adminKeys.list {
		check(&k.credential, KindAdminKey, "")
	}
}

func unix(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.Unix()
}
