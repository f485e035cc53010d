package openaisecrets

// This file owns what this process knows of the end of its mount: whether it is being
// disabled, and what has been seen of Vault's taint. What is done then is in drain.go.
//
// What must stay true: what a mount that lives on needs is never destroyed. Vault
// taints a mount that is disabled and one that moves, a failure of either leaves
// the taint, and then a seal, a step-down or a restart unloads the mount as a
// disable does. So static roles end only where this process has seen the taint
// begin, nothing has failed since, and Vault has never paused.

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// unmountWorkers and unmountBudget bound the deletes when the mount is
	// disabled, during which other mounts of the process wait.
	unmountWorkers = 16
	// unmountReading is for reading what must be logged when that is spent.
	unmountReading = 5 * time.Second
	// unmountPause is the longest that Vault may pause between the steps of a
	// disable, whose first is a rollback and whose last is the unload. It does so for
	// moments; after a failure that the engine does not see it pauses for ever.
	unmountPause = time.Minute
	// unmountTick is how long Vault's regular tick must come after the last step to
	// show such a pause: it comes once a minute, by chance between two steps, too.
	unmountTick = 5 * time.Second
	// envOpenBao is set by OpenBao for its plugins.
	envOpenBao = "BAO_VERSION"
)

// unmount is what this process knows of the end of its mount.
type unmount struct {
	// draining is set while the mount is being disabled: nothing is created
	// then, and what is being created is destroyed instead of handed out.
	draining atomic.Bool
	// issuing counts the requests that may be creating something, revoking those
	// that revoke.
	issuing, revoking atomic.Int64
	// lastIssued is when the last credential was handed out. It keeps its
	// monotonic reading: a clock that is set back must not make the drain wait.
	lastIssued atomic.Pointer[time.Time]
	// mountPoint is that of the last request: an unload has none.
	mountPoint atomic.Pointer[string]
	taint      taintWatch
	// getenv is os.Getenv, but for tests.
	getenv func(string) string
}

// issued notes that a credential has been handed out.
func (u *unmount) issued() {
	now := time.Now()
	u.lastIssued.Store(&now)
}

// inTransit reports whether Vault may still be storing the last lease.
func (u *unmount) inTransit() bool {
	last := u.lastIssued.Load()
	return last != nil && time.Since(*last) < leaseTransit
}

// taintWatch is what this process has seen of the mount's taint.
type taintWatch struct {
	mu      sync.Mutex
	served  bool // the mount was seen without a taint
	tainted bool // at the last look
	begun   bool // this process has seen the present taint begin
	failed  bool // a revoke has failed, or Vault has broken off a request, since it began
	told    bool // what stays has been logged

	// step is when the taint's first rollback or the last revoke ended, the later of
	// the two, with its monotonic reading. Zero while that rollback is in progress.
	step    time.Time
	revoked bool // there was a revoke since the last rollback
	paused  bool // Vault has paused for longer than in a disable
}

// look takes note of whether the mount is tainted. A taint that was there at the
// last look is the same one: a repeated disable does not begin another.
func (w *taintWatch) look(tainted bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if tainted && !w.tainted {
		w.begun, w.failed, w.told = w.served, false, false
		w.step, w.revoked, w.paused = time.Time{}, false, false
	}
	w.tainted = tainted
	w.served = w.served || !tainted
}

// serve takes note of a request that Vault does not send to a tainted mount.
func (w *taintWatch) serve(tainted func() bool) {
	w.mu.Lock()
	looked := w.tainted
	w.served = w.served || !looked
	w.mu.Unlock()
	if looked { // is it over?
		w.look(tainted())
	}
}

func (w *taintWatch) fail() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed = true
}

// rolledBack takes note of the end of a rollback. One that follows another without a
// revoke between them is a tick of a mount in which nothing goes on.
func (w *taintWatch) rolledBack(now time.Time, revoking bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.tainted:
	case w.step.IsZero():
		w.step = now
	case !w.revoked && !revoking && now.Sub(w.step) > unmountTick:
		w.paused = true
	}
	w.revoked = false
}

// revokes takes note of the begin of a revoke, and revokeDone of its end. The first
// in a while is no part of a disable: a lease of a mount that lives on has ended.
func (w *taintWatch) revokes(now time.Time, others bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.paused = w.paused || !others && w.idle(now)
	w.revoked = true
}

func (w *taintWatch) revokeDone(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.revoked = true; !w.step.IsZero() {
		w.step = now
	}
}

// idle reports whether the last step of a disable was too long ago.
func (w *taintWatch) idle(now time.Time) bool {
	return w.tainted && !w.step.IsZero() && now.Sub(w.step) > unmountPause
}

// tell reports once for each taint that what stays must be logged.
func (w *taintWatch) tell() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	first := !w.told
	w.told = true
	return first
}

// doubt says why an unload of the tainted mount may be no disable, "" if it is one.
func (w *taintWatch) doubt(now time.Time) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.begun:
		return "this process has not seen the taint begin"
	case w.failed:
		return "a revocation has failed or was interrupted since the taint began"
	case w.step.IsZero():
		return "the rollback with which a disable begins has not ended"
	case w.paused || w.idle(now):
		return "Vault did not go on with disabling or moving the mount"
	}
	return ""
}

// cannotTellDisable reports whether a disable of this mount looks like something
// that the mount survives. OpenBao seals a namespace by tainting and unloading its
// mounts, and keeps their storage. Its mount points include the namespace, so that
// only one without a slash is known not to be in any.
func (b *backend) cannotTellDisable(mountPoint string) bool {
	return b.getenv(envOpenBao) != "" && strings.Contains(strings.Trim(mountPoint, "/"), "/")
}

// watch takes note of a request of Vault's. The caller calls done with its end.
func (b *backend) watch(ctx context.Context, req *logical.Request) (done func(*logical.Response, error)) {
	if last := b.mountPoint.Load(); req.MountPoint != "" && (last == nil || *last != req.MountPoint) {
		mountPoint := strings.Clone(req.MountPoint)
		b.mountPoint.Store(&mountPoint)
	}
	revoke := req.Operation == logical.RevokeOperation
	if !revoke && req.Operation != logical.RollbackOperation {
		b.taint.serve(b.System().Tainted)
		return func(*logical.Response, error) {}
	}
	if revoke {
		b.taint.revokes(b.now(), b.revoking.Add(1) > 1)
	}
	// A seal or a step-down in the middle of a disable breaks the request off, and
	// unloads the mount perhaps before the request has noticed.
	stop := context.AfterFunc(ctx, b.taint.fail)
	return func(resp *logical.Response, err error) {
		stop()
		if !revoke {
			b.taint.rolledBack(b.now(), b.revoking.Load() > 0)
			return
		}
		if err != nil || resp.IsError() {
			b.taint.fail()
		}
		b.taint.revokeDone(b.now())
		b.revoking.Add(-1)
	}
}

// mayStay says why an unload of the tainted mount may be no disable, "" if it is one.
func (b *backend) mayStay() string {
	mountPoint := ""
	if known := b.mountPoint.Load(); known != nil {
		mountPoint = *known
	}
	switch doubt := b.taint.doubt(b.now()); {
	case doubt != "":
		return doubt
	case b.revoking.Load() > 0: // Vault disables once all are done
		return "a revocation is in progress"
	case b.cannotTellDisable(mountPoint):
		return "OpenBao seals a namespace in the same way"
	}
	return ""
}

// isDraining reports whether the mount is being disabled. Vault taints a mount
// that moves, too, and unlike a disabled one it comes back at once.
func (b *backend) isDraining() bool {
	if !b.draining.Load() {
		return false
	}
	tainted := b.System().Tainted()
	b.draining.Store(tainted)
	return tainted
}

// drainEnd is when what OpenAI does not show is no longer waited for, in the
// disabling that is in progress.
func (b *backend) drainEnd() time.Time {
	if end := b.drainEnds.Load(); end != nil {
		return *end
	}
	end := time.Now().Add(drainBudget)
	b.drainEnds.Store(&end)
	return end
}

// beingDisabled reports whether the mount is being disabled, after which nothing
// of it is left that could delete anything.
func (b *backend) beingDisabled(req *logical.Request) bool {
	return b.isDraining() && !b.cannotTellDisable(req.MountPoint)
}
