package openaisecrets

// This file owns when static roles are rotated without being asked: which is
// due when, and the worker that does it.
//
// What must stay true: it runs outside Vault's requests, one pass at a time and
// a few roles at once, so that a thousand due at the same minute are a queue and
// no storm; what is known of due times is a memory of storage, built anew when
// in doubt; a failure that others would share pauses them all.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// staticWorkers bounds the rotations under way, and with that how many calls
	// for them may be in front of an issue's.
	staticWorkers = 2
	// staticShift is how long after Vault's last tick a pass goes on waiting for
	// what becomes due. A tick comes once a minute, so that a pass ends only where
	// ticks do.
	staticShift = 90 * time.Second
	// unmountWorkers and unmountBudget bound the deletes when the mount is
	// disabled, during which other mounts of the process wait.
	unmountWorkers = 16
	unmountBudget  = 15 * time.Second
)

// staticState is what this process knows of static roles.
type staticState struct {
	locks nameLocks     // a role's changes
	busy  chan struct{} // one slot: held by a pass
	stop  atomic.Pointer[context.CancelFunc]
	until atomic.Int64  // when the pass is to end, Unix nanoseconds
	wake  chan struct{} // a due time has changed

	mu       sync.Mutex
	due      map[string]plan // nil when storage must be read
	failures map[string]failures
}

// plan is what is to be done for a role next.
type plan struct {
	rotate, deadline time.Time // from when, and until when a reader may rely on it
	clean            time.Time // when a retired key is to be deleted, or tried again; zero = none
	owed             time.Time // since when the first of them should be gone; zero = none
}

// failures are those of a role in a row.
type failures struct {
	count int
	retry time.Time // no try before
}

func newStaticState() *staticState {
	return &staticState{locks: nameLocks{held: map[string]*nameLock{}}, busy: make(chan struct{}, 1), wake: make(chan struct{}, 1), failures: map[string]failures{}}
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

// failed puts off the rotation of a role that has failed: for a minute at first,
// and at last for longest.
func (s *staticState) failed(name string, now time.Time, longest time.Duration) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := s.failures[name].count
	delay := min(firstRetry<<min(count, 10), longest)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	s.failures[name] = failures{count: count + 1, retry: now.Add(delay)}
	return now.Add(delay)
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
		consider(name, at, p.deadline)
		if !p.clean.IsZero() {
			consider(name, p.clean, p.clean)
		}
	}
	// Not by the order of names, with which those that always fail would keep
	// others of the same urgency from their turn.
	names = slices.SortedFunc(maps.Keys(urgency), func(a, b string) int { return urgency[a].Compare(urgency[b]) })
	return names[:min(n, len(names))], next
}

// kickStatic starts a pass, or has the one under way go on for longer. It
// returns at once.
func (b *backend) kickStatic(req *logical.Request) {
	b.static.until.Store(time.Now().Add(staticShift).UnixNano())
	select {
	case b.static.busy <- struct{}{}:
	default:
		return
	}
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	ctx, cancel := context.WithCancel(b.work.ctx)
	b.static.stop.Store(&cancel)
	if b.isDraining() {
		cancel() // stopStatic may have looked before there was anything to stop
	}
	go func() {
		defer func() { <-b.static.busy }()
		defer cancel()
		if err := b.keepStatic(ctx, req); err != nil && ctx.Err() == nil {
			b.log(req).Warn("static roles not kept", "error", err)
		}
	}()
}

// stopStatic ends the pass under way: the mount is being disabled.
func (b *backend) stopStatic(ctx context.Context) error {
	if stop := b.static.stop.Load(); stop != nil {
		(*stop)()
	}
	select {
	case b.static.busy <- struct{}{}:
		<-b.static.busy
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keepStatic is a pass: it rotates what is due, and what becomes due until it is
// to end.
func (b *backend) keepStatic(ctx context.Context, req *logical.Request) error {
	failed := 0 // in a row, for a reason that others share
	for ctx.Err() == nil {
		if _, err := b.current(ctx, req.Storage); err != nil {
			if errors.Is(err, errNotConfigured) {
				return nil // a write of the config is no reason to hurry
			}
			return err
		}
		if err := b.loadStatic(ctx, req.Storage); err != nil {
			return err
		}
		// A few at a time, so that what becomes urgent meanwhile comes next.
		names, next := b.static.take(b.now(), staticWorkers)
		if len(names) > 0 {
			err := b.keepSome(ctx, req, names, &failed)
			if failed >= patience || errors.Is(err, errNotConfigured) {
				return fmt.Errorf("not all that were due were tried: %w", err) // they would meet it, too
			}
			continue
		}
		rest := time.Until(time.Unix(0, b.static.until.Load()))
		if !next.IsZero() {
			rest = min(rest, next.Sub(b.now()))
		}
		timer := time.NewTimer(max(rest, 0))
		select {
		case <-timer.C:
		case <-b.static.wake:
		case <-ctx.Done():
		}
		timer.Stop()
		if time.Now().UnixNano() >= b.static.until.Load() || !b.WriteSafeReplicationState() {
			break
		}
	}
	return ctx.Err()
}

// endStaticRoles destroys what the static roles own, and leaves their entries to
// Vault, which wipes the mount's storage next: the mount is being disabled. It
// is called where Vault unloads a mount for whatever reason. Vault taints a mount
// that is disabled, and one that moves, which it does not unload; but a move or
// a disabling that has failed leaves the taint, and then a seal or a restart
// unloads the mount all the same, perhaps to be moved later on. So what this
// process has not seen begin, or where the last revoke since has failed, is left
// alone.
//
// Until it returns, Vault's plugin protocol holds up the requests to all mounts
// that this process serves, hence the bound, and the hurry within it.
func (b *backend) endStaticRoles(ctx context.Context) {
	if b.storage == nil || b.System() == nil || !b.System().Tainted() || !b.WriteSafeReplicationState() {
		return
	}
	b.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmountBudget)
	defer cancel()
	log := b.Logger()
	if err := b.stopStatic(ctx); err != nil {
		log.Warn("the mount is being disabled while a static role is rotated", "error", err)
	}
	names, err := b.storage.List(ctx, staticStoragePrefix)
	if err != nil {
		log.Error("the mount is being disabled, and its static roles could not be listed; what they own is left at OpenAI", "error", err)
		return
	}
	if len(names) == 0 {
		return
	}
	if !b.disabling.Load() || b.revokeFailed.Load() {
		log.Warn("unloaded with a taint, but perhaps not disabled: what static roles own is left at OpenAI", "static_roles", len(names))
		return
	}
	var group sync.WaitGroup
	var failed atomic.Int64 // in a row, for a reason that others share
	slots := make(chan struct{}, unmountWorkers)
	for _, name := range names {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			err := errors.New("too many others have failed")
			if failed.Load() < unmountWorkers {
				err = b.endOwned(ctx, name)
			}
			switch {
			case err == nil:
				failed.Store(0)
			case shared(err):
				failed.Add(1)
			}
			if err != nil {
				log.Error("the mount is being disabled, and what a static role owns is left at OpenAI", "static_role", name, "error", err)
			}
		})
	}
	group.Wait()
	log.Info("static roles ended with their mount", "static_roles", len(names))
}

// endOwned destroys what one static role owns.
func (b *backend) endOwned(ctx context.Context, name string) error {
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := getStaticRole(ctx, b.storage, name)
	if r == nil || err != nil {
		return err
	}
	var failures []error
	for _, c := range r.owned(name) {
		snap, err := b.current(ctx, b.storage)
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", c.what(), err))
		}
	}
	return errors.Join(failures...)
}

// loadStatic reads all roles' due times, once.
func (b *backend) loadStatic(ctx context.Context, s logical.Storage) error {
	b.static.mu.Lock()
	known := b.static.due != nil
	if !known {
		// From now on changes are noted, so that none is lost to what is read.
		b.static.due = map[string]plan{}
	}
	b.static.mu.Unlock()
	if known {
		return nil
	}
	names, err := s.List(ctx, staticStoragePrefix)
	if err != nil {
		b.static.forget()
		return fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range names {
		r, err := getStaticRole(ctx, s, name)
		if r == nil && err == nil {
			continue
		}
		at := plan{rotate: b.now()} // what cannot be read is looked at again, and complained of then
		if err == nil {
			at = r.plan(at.rotate)
		}
		b.static.mu.Lock()
		if _, changed := b.static.due[name]; !changed && b.static.due != nil {
			b.static.due[name] = at
		}
		b.static.mu.Unlock()
	}
	return nil
}

// keepSome does what is due for some roles at once, and counts the failures in a
// row that others would share. It returns the last failure.
func (b *backend) keepSome(ctx context.Context, req *logical.Request, names []string, failed *int) error {
	var group sync.WaitGroup
	errs := make([]error, len(names))
	for i, name := range names {
		group.Go(func() { errs[i] = b.keepOne(ctx, req, name) })
	}
	group.Wait()
	var last error
	for _, err := range errs {
		switch {
		case err == nil:
			*failed = 0
			continue
		case shared(err):
			*failed++
		default:
			*failed = 0
		}
		last = err
	}
	return last
}

// keepOne does what is due for one role: the rotation first, whose time does
// not wait for the deletion of old keys.
func (b *backend) keepOne(parent context.Context, req *logical.Request, name string) error {
	ctx, cancel := context.WithTimeout(parent, requestBudget)
	defer cancel()
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		return err // whoever holds it sets what is to be done next
	}
	defer unlock()
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		if parent.Err() == nil {
			retry := b.static.failed(name, b.now(), longestRetry)
			b.log(req).Warn("static role not kept", "static_role", name, "retry_after", timeText(retry), "error", err)
		}
		return err
	}
	if r == nil {
		b.static.drop(name)
		return nil
	}
	if len(r.Retired) >= maxRetired { // without which there is no rotation
		r, _ = b.endRetiredKeys(ctx, req, name, r)
	}
	var rotateErr error
	if now := b.now(); !now.Before(r.next(now)) && !now.Before(b.static.retry(name)) {
		next, _, err := b.rotateStatic(ctx, req, name, r)
		if err == nil {
			r = next
		} else if parent.Err() != nil {
			return err // a seal or a step-down is no failure of the rotation
		} else {
			rotateErr = err
			b.rotationFailed(parent, req, name, r, err)
			if errors.Is(err, errWhichStaticKey) {
				return err // r may be what was in force: writing it would undo the rotation
			}
		}
	}
	clean, cancelClean := context.WithTimeout(parent, cleanupBudget)
	defer cancelClean()
	r, err = b.endRetiredKeys(clean, req, name, r)
	if err != nil && parent.Err() != nil {
		return err // it stays due
	}
	p := r.plan(b.now())
	if soonest := b.now().Add(firstRetry); err != nil && !p.clean.IsZero() && p.clean.Before(soonest) {
		p.clean = soonest // of a key that could not be deleted just now
	}
	b.static.set(name, p)
	if rotateErr != nil {
		return rotateErr
	}
	return err
}

// rotationFailed takes note of a rotation that nobody waits for and that has
// failed. It is tried again before the key that stays in force ends.
func (b *backend) rotationFailed(ctx context.Context, req *logical.Request, name string, r *staticRole, failure error) {
	longest := longestRetry
	if r.RotationPeriod > 0 {
		longest = min(longest, r.RotationPeriod)
	}
	longest = min(longest, max(firstRetry, r.Current.ExpiresAt.Sub(b.now())/4))
	retry := b.static.failed(name, b.now(), longest)
	b.log(req).Warn("static role not rotated, its key stays in force", "static_role", name, "retry_after", timeText(retry), "error", failure)
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	if err := noteStaticFailure(ctx, req.Storage, name, r.Current.ID, failure); err != nil {
		b.log(req).Warn("the failure of a rotation could not be stored", "static_role", name, "error", err)
	}
}
