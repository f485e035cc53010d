package openaisecrets

// This file owns the worker that rotates static roles without being asked.
//
// What must stay true: it runs outside Vault's requests, one pass at a time and a few
// roles at once, so that a thousand due at the same minute are a queue and no storm;
// a failure that others would share pauses them all.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/text"
)

const (
	// staticWorkers bounds the rotations under way, and with that how many calls
	// for them may be in front of an issue's.
	staticWorkers = 2
	// staticShift is how long after Vault's last tick a pass goes on waiting for
	// what becomes due. A tick comes once a minute, so that a pass ends only where
	// ticks do.
	staticShift = 90 * time.Second
)

// kickStatic starts a pass, or has the one under way go on for longer. It
// returns at once.
func (b *backend) kickStatic(req *logical.Request) {
	b.static.extend(staticShift)
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	b.static.pass.Start(b.lifetime, func(ctx context.Context) {
		if b.isDraining() {
			return // a request that was under way has asked for it
		}
		b.complain(ctx, req, "static roles not kept", b.keepStatic(ctx, req))
	})
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
		b.static.mind(b.now())
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
		rest := b.static.rest()
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
		if b.static.rest() <= 0 || !b.WriteSafeReplicationState() {
			break
		}
	}
	return ctx.Err()
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
		// What cannot be read is looked at again, and complained of then; what holds
		// a time that lies ahead is corrected.
		now := b.now()
		at := plan{rotate: now}
		if err == nil && !r.clone().correct(now) {
			at = r.plan(now)
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
	// Without a look at the role nothing is known of when to look next: each way out
	// of here that sets no plan puts the next look off.
	putOff := func(err error) error {
		if parent.Err() == nil {
			retry := b.static.notRead(name, b.now())
			b.log(req).Warn("static role not kept", "static_role", name, "retry_after", text.Time(retry), "error", err)
		}
		return err
	}
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		return putOff(err)
	}
	defer unlock()
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		return putOff(err)
	}
	if r == nil {
		b.static.drop(name)
		return nil
	}
	if r.correct(b.now()) {
		if err := putStaticRole(ctx, req.Storage, name, r); err != nil {
			return putOff(err)
		}
		b.log(req).Warn("the clock was wrong when a time of a static role was stored: it is corrected, and the next rotation is planned anew",
			"static_role", name, "last_rotation", text.Time(r.LastRotated), "next_rotation", text.Time(r.next(b.now())), "expires_at", text.Time(r.Current.ExpiresAt))
	}
	b.static.read(name)
	if len(r.Retired) >= maxRetired { // without which there is no rotation
		r, _ = b.endRetiredKeys(ctx, req, name, r, true)
	}
	var rotateErr error
	if now := b.now(); r.due(now) && !now.Before(b.static.retry(name)) {
		next, _, err := b.rotateStatic(ctx, req, name, r, false)
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
	r, err = b.endRetiredKeys(clean, req, name, r, true)
	if err != nil && parent.Err() != nil {
		return err // it stays due
	}
	p := r.plan(b.now())
	if soonest := b.now().Add(firstRetry); err != nil && !p.clean.IsZero() && p.clean.Before(soonest) {
		p.clean = soonest // of a key that could not be deleted just now
	}
	b.static.set(name, p)
	switch {
	case rotateErr != nil:
		return rotateErr
	case errors.Is(err, errNotFinal):
		return nil // it only waits
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
	b.log(req).Warn("static role not rotated, its key stays in force", "static_role", name, "retry_after", text.Time(retry), "error", failure)
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	if err := noteStaticFailure(ctx, req.Storage, name, r.Current.ID, failure); err != nil {
		b.log(req).Warn("the failure of a rotation could not be stored", "static_role", name, "error", err)
	}
}
