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
	"math/rand/v2"
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
	// unmountWorkers bounds the deletes under way when the mount is disabled.
	unmountWorkers = 16
)

// staticState is what this process knows of static roles.
type staticState struct {
	locks nameLocks     // a role's changes
	busy  chan struct{} // one slot: held by a pass
	stop  atomic.Pointer[context.CancelFunc]
	until atomic.Int64  // when the pass is to end, Unix nanoseconds
	wake  chan struct{} // a due time has changed

	mu       sync.Mutex
	due      map[string]time.Time // nil when storage must be read
	failures map[string]failures
}

// failures are those of a role in a row.
type failures struct {
	count int
	retry time.Time // no try before
}

func newStaticState() *staticState {
	return &staticState{locks: nameLocks{held: map[string]*nameLock{}}, busy: make(chan struct{}, 1), wake: make(chan struct{}, 1), failures: map[string]failures{}}
}

// set notes when a role is due next, and that it has not failed.
func (s *staticState) set(name string, at time.Time) {
	s.mu.Lock()
	delete(s.failures, name)
	if s.due != nil {
		s.due[name] = at
	}
	s.mu.Unlock()
	s.nudge()
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

// failed puts off a role whose rotation has failed: for a minute at first, and
// at last for an hour, or the period where that is shorter.
func (s *staticState) failed(name string, now time.Time, period time.Duration) time.Time {
	longest := longestRetry
	if period > 0 {
		longest = min(longest, period)
	}
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

// take returns the roles that are due, and when the next will be.
func (s *staticState) take(now time.Time) (names []string, next time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, at := range s.due {
		if retry := s.failures[name].retry; at.Before(retry) {
			at = retry
		}
		if !now.Before(at) {
			names = append(names, name)
		} else if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return names, next
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
		names, next := b.static.take(b.now())
		if len(names) > 0 {
			if err := b.rotateDue(ctx, req, names); err != nil {
				return err // it would meet the others, too: the next pass tries again
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
// is called where Vault unloads a mount for whatever reason; that it is disabled
// is known by its taint, with which Vault otherwise unloads none but one whose
// disabling or moving was broken off by a seal.
//
// Until it returns, Vault's plugin protocol holds up the requests to all mounts
// that this process serves, hence the bound, and the hurry within it.
func (b *backend) endStaticRoles(ctx context.Context) {
	if b.storage == nil || b.System() == nil || !b.System().Tainted() || !b.WriteSafeReplicationState() {
		return
	}
	b.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
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
	if len(names) > 0 {
		log.Info("static roles ended with their mount", "static_roles", len(names))
	}
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
			err = b.destroy(ctx, snap.api, c)
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
		b.static.due = map[string]time.Time{}
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
		at := b.now() // what cannot be read is looked at again, and complained of then
		if err == nil {
			at = r.due(at)
		}
		b.static.mu.Lock()
		if _, changed := b.static.due[name]; !changed && b.static.due != nil {
			b.static.due[name] = at
		}
		b.static.mu.Unlock()
	}
	return nil
}

// rotateDue works off roles that are due, a few at once. An error says that
// there is no use in going on now.
func (b *backend) rotateDue(ctx context.Context, req *logical.Request, names []string) error {
	// In another order each time, so that those which always fail cannot keep
	// others from their turn.
	rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] }) // #nosec G404 -- an order, not a secret
	var group sync.WaitGroup
	var mu sync.Mutex // guards inRow and last
	inRow, last := 0, error(nil)
	slots := make(chan struct{}, staticWorkers)
	for _, name := range names {
		slots <- struct{}{}
		mu.Lock()
		hopeless := inRow >= patience || errors.Is(last, errNotConfigured)
		mu.Unlock()
		if hopeless || ctx.Err() != nil {
			break
		}
		group.Go(func() {
			defer func() { <-slots }()
			err := b.keepOne(ctx, req, name)
			mu.Lock()
			defer mu.Unlock()
			if last = err; err == nil || !shared(err) {
				inRow = 0
			} else {
				inRow++
			}
		})
	}
	group.Wait()
	if inRow >= patience || errors.Is(last, errNotConfigured) {
		return fmt.Errorf("not all that were due were tried: %w", last)
	}
	return ctx.Err()
}

// keepOne does what is due for one role.
func (b *backend) keepOne(parent context.Context, req *logical.Request, name string) error {
	ctx, cancel := context.WithTimeout(parent, requestBudget)
	defer cancel()
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		return err // whoever holds it sets when the role is due next
	}
	defer unlock()
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		if parent.Err() == nil {
			retry := b.static.failed(name, b.now(), 0)
			b.log(req).Warn("static role not kept", "static_role", name, "retry_after", timeText(retry), "error", err)
		}
		return err
	}
	if r == nil {
		b.static.drop(name)
		return nil
	}
	r = b.endRetiredKeys(ctx, req, name, r)
	if now := b.now(); now.Before(r.next(now)) {
		due := r.due(now)
		if !now.Before(due) { // a key that could not be deleted just now
			due = now.Add(firstRetry)
		}
		b.static.set(name, due)
		return nil
	}
	_, _, err = b.rotateStatic(ctx, req, name, r)
	if err == nil || parent.Err() != nil {
		return err // a seal or a step-down is no failure of the rotation
	}
	retry := b.static.failed(name, b.now(), r.RotationPeriod)
	b.log(req).Warn("static role not rotated, its key stays in force", "static_role", name, "retry_after", timeText(retry), "error", err)
	note, cancelNote := context.WithTimeout(parent, cleanupBudget)
	defer cancelNote()
	if noteErr := noteStaticFailure(note, req.Storage, name, r.Current.ID, err); noteErr != nil {
		b.log(req).Warn("the failure of a rotation could not be stored", "static_role", name, "error", noteErr)
	}
	return err
}
