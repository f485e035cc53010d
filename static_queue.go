package openaisecrets

// This file owns what this process knows of static roles: which is due when, and which
// have failed.
//
// What must stay true: what is known of due times is a memory of storage, built anew
// when in doubt.

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

// late reads the gauges; known is false where this node does not keep static roles.
func (s *staticState) late(now time.Time) (g staticGauges, known bool) {
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
		if !p.rotate.IsZero() {
			g.lag = max(g.lag, now.Sub(p.rotate))
		}
		if !p.owed.IsZero() {
			g.lag = max(g.lag, now.Sub(p.owed))
		}
	}
	return g, s.due != nil
}

// staticState is what this process knows of static roles.
type staticState struct {
	locks *job.NameLocks // a role's changes
	pass  *job.Job
	until atomic.Int64  // when the pass is to end, nanoseconds since began
	wake  chan struct{} // a due time has changed
	began time.Time     // with its monotonic reading

	mu       sync.Mutex
	due      map[string]plan // nil when storage must be read
	failures map[string]failures
	// unread are those of roles that could not be looked at, which is not done
	// before they say.
	unread map[string]failures
	looked time.Time // by the wall clock: the last look at what is due
}

// set notes what is to be done for a role next.
func (s *staticState) set(name string, p plan) {
	s.mu.Lock()
	if s.due != nil {
		s.due[name] = p
	}
	s.mu.Unlock()
	s.nudge()
}

// extend has the pass go on for d from now, and rest is how much of that is left.
// Both are by the monotonic clock.
func (s *staticState) extend(d time.Duration) { s.until.Store(int64(time.Since(s.began) + d)) }

func (s *staticState) rest() time.Duration {
	return time.Duration(s.until.Load()) - time.Since(s.began)
}

// lookAt has a role's entry read again: what is to be done for it is not known.
func (s *staticState) lookAt(name string, now time.Time) {
	s.set(name, plan{rotate: now, deadline: now})
}

// succeeded forgets a role's failures.
func (s *staticState) succeeded(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failures, name)
}

// drop notes that a role is gone.
func (s *staticState) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failures, name)
	delete(s.unread, name)
	delete(s.due, name)
}

// forget has the pass read storage again.
func (s *staticState) forget() {
	s.mu.Lock()
	s.due = nil
	s.mu.Unlock()
	s.nudge()
}

func (s *staticState) nudge() {
	select {
	case s.wake <- struct{}{}:
	default: // it has not looked since the last
	}
}

// failed puts off the rotation of a role that has failed.
func (s *staticState) failed(name string, now time.Time, longest time.Duration) (retry time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures[name] = s.failures[name].again(now, longest)
	return s.failures[name].retry
}

// notRead puts off all that is due for a role that could not be looked at.
func (s *staticState) notRead(name string, now time.Time) (retry time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unread[name] = s.unread[name].again(now, longestRetry)
	return s.unread[name].retry
}

// read notes that a role could be looked at.
func (s *staticState) read(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.unread, name)
}

// mind takes note of the wall clock. If it was set back, all that was planned with
// the former time is forgotten.
func (s *staticState) mind(now time.Time) {
	now = now.Round(0) // without its monotonic reading, which is never set back
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.looked.Add(-clockSlack)) {
		s.due, s.failures, s.unread = nil, map[string]failures{}, map[string]failures{}
	}
	s.looked = now
}

// retry is when a rotation that has failed is tried again, zero without any.
func (s *staticState) retry(name string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failures[name].retry
}

// take returns up to n of the roles that are due, the most urgent first, and
// when the next will be where there are none.
func (s *staticState) take(now time.Time, n int) (names []string, next time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	urgency := map[string]time.Time{}
	consider := func(name string, at, deadline time.Time) {
		at = later(at, s.unread[name].retry)
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
		if retry := s.failures[name].retry; at.Before(retry) {
			at = retry
		}
		if !p.rotate.IsZero() {
			consider(name, at, p.deadline)
		}
		if !p.clean.IsZero() {
			consider(name, p.clean, p.clean)
		}
	}
	// Not by the order of names, with which those that always fail would keep
	// others of the same urgency from their turn.
	names = slices.SortedFunc(maps.Keys(urgency), func(a, b string) int { return urgency[a].Compare(urgency[b]) })
	return names[:min(n, len(names))], next
}

func newStaticState() *staticState {
	return &staticState{locks: job.NewNameLocks(), pass: job.New(), wake: make(chan struct{}, 1), began: time.Now(), failures: map[string]failures{}, unread: map[string]failures{}}
}

// failures are those of a role in a row.
type failures struct {
	count int
	retry time.Time // no try before
}

// again puts the next try off: for a minute at first, and at last for longest.
func (f failures) again(now time.Time, longest time.Duration) failures {
	delay := min(firstRetry<<min(f.count, 10), longest)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	return failures{count: f.count + 1, retry: now.Add(delay)}
}

// staticGauges are how many static roles there are, how many have failed, how late
// the latest is, and how many replaced keys are kept since they are still used.
type staticGauges struct {
	roles, failing, kept int
	lag                  time.Duration
}

// lockStatic takes a role's lock; the context bounds the wait. Whoever holds it
// is bounded in time, too.
func (b *backend) lockStatic(ctx context.Context, name string) (unlock func(), err error) {
	if unlock, err = b.static.locks.Lock(ctx, name); err != nil {
		return nil, fmt.Errorf("another change of static role %q is under way: %w", name, err)
	}
	return unlock, nil
}

// staticHolds reports whether the static role that a credential was made for
// or taken from still names it.
func (b *backend) staticHolds(ctx context.Context, s logical.Storage, c credential) (bool, error) {
	if c.StaticRole == "" {
		return false, nil
	}
	// Behind a request that is storing it.
	unlock, err := b.lockStatic(ctx, c.StaticRole)
	if err != nil {
		return false, err
	}
	defer unlock()
	r, err := getStaticRole(ctx, s, c.StaticRole)
	if err != nil || r == nil {
		return false, err
	}
	return r.names(c), nil
}
