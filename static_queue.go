package openaisecrets

// This file owns the in-memory state of static roles, when each is due and which have
// failed; their locks; and whether one of them holds a credential.
//
// What must stay true: the due times are a cache of storage and are rebuilt when in
// doubt; what a role holds is read from storage.

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/job"
)

// gauges returns the gauges; known is false if this node does not rotate static roles.
func (s *staticState) gauges(now time.Time) (g staticGauges, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g.roles, g.failing = len(s.due), len(s.failures)
	for name := range s.unread {
		if _, counted := s.failures[name]; !counted {
			g.failing++
		}
	}
	for _, p := range s.due {
		g.kept += p.kept
		if p.missing {
			g.missing++
		}
		if !p.rotate.IsZero() {
			g.lag = max(g.lag, now.Sub(p.rotate))
		}
		if !p.owed.IsZero() {
			g.lag = max(g.lag, now.Sub(p.owed))
		}
	}
	return g, s.due != nil
}

// staticState is the in-memory state of static roles.
type staticState struct {
	locks  *job.NameLocks // one change of a role at a time
	worker *job.Job
	until  atomic.Int64  // when the run ends, in nanoseconds since began
	wake   chan struct{} // a due time has changed
	began  time.Time     // with its monotonic reading

	mu       sync.Mutex
	due      map[string]nextWork // nil if storage must be read
	failures map[string]failures
	// unread has the failures to read a role, which postpone the next attempt.
	unread map[string]failures
	looked time.Time // wall clock time of the last check of due
}

// set stores the next work for a role.
func (s *staticState) set(name string, p nextWork) {
	s.mu.Lock()
	if s.due != nil {
		s.due[name] = p
	}
	s.mu.Unlock()
	s.wakeWorker()
}

// extend has the run continue for d from now, and rest is the part of it that is left,
// both by the monotonic clock.
func (s *staticState) extend(d time.Duration) { s.until.Store(int64(time.Since(s.began) + d)) }

func (s *staticState) rest() time.Duration {
	return time.Duration(s.until.Load()) - time.Since(s.began)
}

// lookAt schedules a role for now, so that the worker reads its entry again.
func (s *staticState) lookAt(name string, now time.Time) {
	s.set(name, nextWork{rotate: now, deadline: now})
}

// succeeded forgets a role's failures.
func (s *staticState) succeeded(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failures, name)
}

// drop removes a deleted role.
func (s *staticState) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failures, name)
	delete(s.unread, name)
	delete(s.due, name)
}

// forget drops the due times, so that the worker reads storage again.
func (s *staticState) forget() {
	s.mu.Lock()
	s.due = nil
	s.mu.Unlock()
	s.wakeWorker()
}

func (s *staticState) wakeWorker() {
	select {
	case s.wake <- struct{}{}:
	default: // the worker has not received the previous signal yet
	}
}

// failed postpones the next rotation of a role whose rotation failed.
func (s *staticState) failed(name string, now time.Time, longest time.Duration) (retry time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures[name] = s.failures[name].again(now, longest)
	return s.failures[name].retry
}

// notRead postpones all work for a role that could not be read.
func (s *staticState) notRead(name string, now time.Time) (retry time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unread[name] = s.unread[name].again(now, longestRetry)
	return s.unread[name].retry
}

// read clears the failures to read a role.
func (s *staticState) read(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.unread, name)
}

// watch records the wall clock. If it was set back, all plans are dropped.
func (s *staticState) watch(now time.Time) {
	now = now.Round(0) // without its monotonic reading, which is never set back
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.looked.Add(-clockSlack)) {
		s.due, s.failures, s.unread = nil, map[string]failures{}, map[string]failures{}
	}
	s.looked = now
}

// retry returns when a failed rotation is retried, zero if none failed.
func (s *staticState) retry(name string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failures[name].retry
}

// nextDue returns up to n roles that are due, the most urgent first, and when the next
// is due if none is.
func (s *staticState) nextDue(now time.Time, n int) (names []string, next time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	urgency := map[string]time.Time{}
	consider := func(name string, at, deadline time.Time) {
		if retry := s.unread[name].retry; waits(now, retry, longestRetry) {
			at = later(at, retry)
		}
		if now.Before(at) {
			if next.IsZero() || at.Before(next) {
				next = at
			}
		} else if before, is := urgency[name]; !is || deadline.Before(before) {
			urgency[name] = deadline
		}
	}
	for name, p := range s.due {
		at := p.rotate
		if retry := s.failures[name].retry; at.Before(retry) && waits(now, retry, longestRetry) {
			at = retry
		}
		if !p.rotate.IsZero() {
			consider(name, at, p.deadline)
		}
		if !p.clean.IsZero() {
			consider(name, p.clean, p.clean)
		}
	}
	// Roles of the same urgency stay in the map's random order: sorted by name, those
	// that always fail would starve the others.
	names = slices.SortedFunc(maps.Keys(urgency), func(a, b string) int { return urgency[a].Compare(urgency[b]) })
	return names[:min(n, len(names))], next
}

func newStaticState() *staticState {
	return &staticState{locks: job.NewNameLocks(), worker: job.New(), wake: make(chan struct{}, 1), began: time.Now(), failures: map[string]failures{}, unread: map[string]failures{}}
}

// failures counts a role's consecutive failures.
type failures struct {
	count int
	retry time.Time // the earliest next attempt
}

// again adds a failure and postpones the next attempt exponentially, from a minute up
// to longest.
func (f failures) again(now time.Time, longest time.Duration) failures {
	delay := min(firstRetry<<min(f.count, 10), longest)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	return failures{count: f.count + 1, retry: now.Add(delay)}
}

// staticGauges has the number of static roles, of failing ones, of those whose key was
// deleted at OpenAI, and of superseded keys that are kept because they are still used,
// and the lag of the most overdue role.
type staticGauges struct {
	roles, failing, kept, missing int
	lag                           time.Duration
}

// lockStatic takes a role's lock; the context bounds the wait. Every holder releases it
// within a bounded time.
func (b *backend) lockStatic(ctx context.Context, name string) (unlock func(), err error) {
	if unlock, err = b.static.locks.Lock(ctx, name); err != nil {
		return nil, fmt.Errorf("another change of static role %q is in progress: %w", name, err)
	}
	return unlock, nil
}

// staticHolds reports whether the static role of a credential still needs it.
func (b *backend) staticHolds(ctx context.Context, s logical.Storage, c credential) (bool, error) {
	if c.StaticRole == "" {
		return false, nil
	}
	// A request that is storing it holds the lock.
	unlock, err := b.lockStatic(ctx, c.StaticRole)
	if err != nil {
		return false, err
	}
	defer unlock()
	r, err := getStaticRole(ctx, s, c.StaticRole)
	if err != nil || r == nil {
		return false, err
	}
	return r.stillNeeds(c), nil
}
