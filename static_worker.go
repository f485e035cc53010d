package openaisecrets

// This file owns the worker that rotates static roles automatically.
//
// What must stay true: it runs outside Vault's requests, one run at a time and a few
// roles in parallel, so that a thousand roles due in the same minute do not cause a
// burst of calls; a systemic failure pauses all of them.

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
	// staticWorkers bounds the concurrent rotations, and so the calls for them that can
	// be queued ahead of a credential request.
	staticWorkers = 2
	// staticShift is how long a run waits for work after Vault's last tick. Ticks come
	// once a minute, so a run ends only after they stop.
	staticShift = 90 * time.Second
)

// startStaticWorker starts a run or extends the one in progress, and returns
// immediately.
func (b *backend) startStaticWorker(req *logical.Request) {
	b.static.extend(staticShift)
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	b.static.worker.Start(b.lifetime, func(ctx context.Context) {
		if b.isDraining() {
			return // a request that was still in progress started it
		}
		b.complain(ctx, req, "static role rotation run failed", b.runStaticWorker(ctx, req))
	})
}

// runStaticWorker rotates the roles that are due, and those that become due until the
// run ends.
func (b *backend) runStaticWorker(ctx context.Context, req *logical.Request) error {
	failed := 0 // consecutive systemic failures
	for ctx.Err() == nil {
		if _, err := b.current(ctx, req.Storage); err != nil {
			if errors.Is(err, errNotConfigured) {
				return nil // the next tick starts a run after a config write
			}
			return err
		}
		b.static.watch(b.now())
		if err := b.loadStatic(ctx, req.Storage); err != nil {
			return err
		}
		// A few at a time, so that roles that become urgent during the run come next.
		names, next := b.static.nextDue(b.now(), staticWorkers)
		if len(names) > 0 {
			err := b.serveRoles(ctx, req, names, &failed)
			if failed >= maxSystemicFailures || errors.Is(err, errNotConfigured) {
				return fmt.Errorf("static role rotation stopped before all due roles were processed: %w", err) // the others would fail, too
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

// loadStatic reads the due times of all roles, if they are not in memory.
func (b *backend) loadStatic(ctx context.Context, s logical.Storage) error {
	b.static.mu.Lock()
	known := b.static.due != nil
	if !known {
		// A change of a role during the load sets its due time, which the load keeps.
		b.static.due = map[string]nextWork{}
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
		// A role that cannot be read, or whose times need a correction, is due now.
		now := b.now()
		at := nextWork{rotate: now}
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

// serveRoles does the due work of some roles in parallel, counts consecutive systemic
// failures, and returns the last failure.
func (b *backend) serveRoles(ctx context.Context, req *logical.Request, names []string, failed *int) error {
	var group sync.WaitGroup
	errs := make([]error, len(names))
	for i, name := range names {
		group.Go(func() { errs[i] = b.serveRole(ctx, req, name) })
	}
	group.Wait()
	var last error
	for _, err := range errs {
		switch {
		case err == nil:
			*failed = 0
			continue
		case isSystemic(err):
			*failed++
		default:
			*failed = 0
		}
		last = err
	}
	return last
}

// serveRole does the due work of one role: the rotation first, which must not wait for
// the deletion of superseded keys.
func (b *backend) serveRole(parent context.Context, req *logical.Request, name string) error {
	ctx, cancel := context.WithTimeout(parent, requestBudget)
	defer cancel()
	// Every return that sets no plan must postpone the next attempt.
	putOff := func(err error) error {
		if parent.Err() == nil {
			retry := b.static.notRead(name, b.now())
			b.log(req).Warn("static role not processed", "static_role", name, "retry_after", text.Time(retry), "error", err)
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
		b.log(req).Warn("times of the static role corrected: the system clock was wrong when they were stored",
			"static_role", name, "last_rotation", text.Time(r.LastRotated), "next_rotation", text.Time(r.next(b.now())), "expires_at", text.Time(r.Current.ExpiresAt))
	}
	b.static.read(name)
	if len(r.Superseded) >= maxSuperseded { // otherwise rotateStatic rejects it
		r, _ = b.deleteSupersededStaticKeys(ctx, req, name, r, true)
	}
	var rotateErr error
	if now := b.now(); r.due(now) && !waits(now, b.static.retry(name), longestRetry) {
		b.lookBeforeRotation(ctx, req, name, r)
		next, _, err := b.rotateStatic(ctx, req, name, r, false)
		if err == nil {
			r = next
		} else if parent.Err() != nil {
			return err // a seal or step-down does not count as a failed rotation
		} else {
			rotateErr = err
			b.rotationFailed(parent, req, name, r, err)
			if errors.Is(err, errWhichStaticKey) {
				return err // storing r could undo the rotation
			}
		}
	}
	clean, cancelClean := context.WithTimeout(parent, cleanupBudget)
	defer cancelClean()
	r, err = b.deleteSupersededStaticKeys(clean, req, name, r, true)
	if err != nil && parent.Err() != nil {
		return err // it stays due
	}
	p := r.plan(b.now())
	if soonest := b.now().Add(firstRetry); err != nil && !p.clean.IsZero() && p.clean.Before(soonest) {
		p.clean = soonest // the deletion failed just now
	}
	b.static.set(name, p)
	switch {
	case rotateErr != nil:
		return rotateErr
	case errors.Is(err, errNotFinal):
		return nil // not a failure: the deletion is verified again later
	}
	return err
}

// rotationFailed logs and stores the failure of an automatic rotation, and schedules
// the retry before the active key expires.
func (b *backend) rotationFailed(ctx context.Context, req *logical.Request, name string, r *staticRole, failure error) {
	longest := longestRetry
	if r.RotationPeriod > 0 {
		longest = min(longest, r.RotationPeriod)
	}
	longest = min(longest, max(firstRetry, r.Current.ExpiresAt.Sub(b.now())/4))
	retry := b.static.failed(name, b.now(), longest)
	b.log(req).Warn("static role not rotated; its key stays active", "static_role", name, "retry_after", text.Time(retry), "error", failure)
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	if err := noteStaticFailure(ctx, req.Storage, name, r.Current.ID, failure); err != nil {
		b.log(req).Warn("last_rotation_error of the static role not stored", "static_role", name, "error", err)
	}
}
