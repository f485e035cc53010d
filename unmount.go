package openaisecrets

// This file owns the detection of a disabled mount, from Vault's taint. The cleanup
// itself is in drain.go.
//
// What must stay true: nothing that a surviving mount needs is destroyed. Vault taints
// a mount that is disabled or moved. A failure of either leaves the taint, and a later
// seal, step-down or restart then unloads the mount as a disable does. Therefore static
// roles are deleted only if this process saw the taint begin, nothing has failed since,
// and Vault has never paused.

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// unmountWorkers bounds the static roles that an unload deletes in parallel.
	unmountWorkers = 16
	// unmountReading is for reading what must be logged after unmountBudget is spent.
	unmountReading = 5 * time.Second
	// unmountPause is the longest pause between the steps of a disable, from the first
	// rollback to the unload. Normally Vault continues within moments; after a failure
	// that the engine cannot see it never does.
	unmountPause = time.Minute
	// unmountTick is the least time between the last step and a periodic rollback that
	// reveals such a pause: these come once a minute, and may fall between two steps.
	unmountTick = 5 * time.Second
)

// phase is the state of a mount as far as its end is concerned. Any look that finds no
// taint leads to served; only an unload in revoking can be a disable.
//
//	from             when                                            to
//	notSeen, served  the mount is not tainted                        served
//	notSeen          the mount is tainted                            surviving
//	notSeen, served  a revocation fails, or the mount is unloaded,
//	                 and it is tainted                               surviving
//	served           the mount is tainted                            rollingBack
//	rollingBack      the rollback has ended                          revoking
//	rollingBack, revoking
//	                 a revocation fails, or Vault cancels a request  surviving
//	revoking         Vault pauses for longer than in a disable       surviving
type phase int

const (
	notSeen     phase = iota // the process started, and has not looked at the taint
	served                   // not tainted at the last look
	rollingBack              // the taint began, and the first rollback is in progress
	revoking                 // the leases' revocations follow, and then the unload
	surviving                // tainted, and for some reason perhaps not being disabled
)

// unmount decides whether the mount is being disabled. It is a state machine that is fed
// with Vault's requests.
type unmount struct {
	tainted func() bool // asks Vault
	now     func() time.Time
	openBao func() bool

	// draining is set while the mount is being disabled: no creates start, and
	// credentials that are being created are destroyed instead of returned.
	draining atomic.Bool
	// issuing counts the requests that may be creating a credential, revocations the
	// revocations in progress.
	issuing, revocations atomic.Int64
	// lastIssued is when the last credential was returned. It keeps its monotonic
	// reading, so that a clock that is set back does not delay the drain.
	lastIssued atomic.Pointer[time.Time]
	// mountPoint is that of the last request: an unload has none.
	mountPoint atomic.Pointer[string]
	// drainEnds caches drainEnd; nil until the mount is being disabled.
	drainEnds atomic.Pointer[time.Time]

	mu      sync.Mutex
	phase   phase
	reason  string // of surviving
	logged  bool   // retained credentials have been logged, in this taint
	drained bool   // a drain has begun, in this taint

	// step is when the taint's first rollback or the last revocation ended, the later
	// of the two, with its monotonic reading.
	step    time.Time
	revoked bool // there was a revocation since the last rollback
}

// The reasons of surviving.
const (
	reasonUnseen  = "this process did not see the taint begin"
	reasonFailed  = "a revocation failed or was interrupted after the taint began"
	reasonStopped = "Vault stopped disabling or moving the mount"
)

func newUnmount(tainted func() bool, now func() time.Time, openBao func() bool) *unmount {
	return &unmount{tainted: tainted, now: now, openBao: openBao}
}

// issued records that a credential is returned.
func (u *unmount) issued() {
	now := time.Now()
	u.lastIssued.Store(&now)
}

// inTransit reports whether Vault may still be storing the last lease.
func (u *unmount) inTransit() bool {
	last := u.lastIssued.Load()
	return last != nil && time.Since(*last) < leaseTransit
}

// look records whether the mount is tainted. If it was at the last look, this is the
// same taint: a repeated disable does not begin another.
func (u *unmount) look(tainted bool) {
	u.draining.Store(tainted)
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case !tainted:
		u.phase, u.drained = served, false
		return
	case u.phase == notSeen:
		u.phase, u.reason, u.logged = surviving, reasonUnseen, false
	case u.phase == served:
		u.phase, u.logged = rollingBack, false
		u.step, u.revoked = time.Time{}, false
	}
}

// drains records that a drain begins.
func (u *unmount) drains() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.drained = true
}

// foundLate records that something else than a rollback has found the taint. It reports
// whether no drain has begun.
func (u *unmount) foundLate(reason string) bool {
	u.draining.Store(true)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.phase == notSeen || u.phase == served {
		u.phase, u.reason, u.logged = surviving, reason, false
	}
	return !u.drained
}

// request records a request that Vault does not send to a tainted mount.
func (u *unmount) request() {
	u.mu.Lock()
	looked := u.phase != notSeen && u.phase != served
	if !looked {
		u.phase = served
	}
	u.mu.Unlock()
	if looked { // the taint may be over
		u.taintMayBeOver()
	}
}

// taintMayBeOver looks again, and leaves it to the next rollback to find a taint.
func (u *unmount) taintMayBeOver() {
	if !u.tainted() {
		u.mu.Lock()
		u.phase, u.drained = served, false
		u.mu.Unlock()
	}
}

// fail records that a revocation failed, or that Vault canceled a request.
func (u *unmount) fail() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.phase == rollingBack || u.phase == revoking {
		u.phase, u.reason = surviving, reasonFailed
	}
}

// rolledBack records the end of a rollback. A second one without a revocation in between
// is a periodic rollback of a mount whose disable does not proceed.
func (u *unmount) rolledBack() {
	now, others := u.now(), u.revocations.Load() > 0
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.phase == rollingBack:
		u.phase, u.step = revoking, now
	case u.phase == revoking && !u.revoked && !others && now.Sub(u.step) > unmountTick:
		u.phase, u.reason = surviving, reasonStopped
	}
	u.revoked = false
}

// revokes records the start of a revocation. After a pause it is not part of a disable:
// a lease of a surviving mount has expired.
func (u *unmount) revokes() {
	now, others := u.now(), u.revocations.Add(1) > 1
	u.mu.Lock()
	defer u.mu.Unlock()
	if !others {
		u.endPause(now)
	}
	u.revoked = true
}

// revokeDone records the end of a revocation.
func (u *unmount) revokeDone(failed bool) {
	if failed {
		if u.tainted() { // perhaps the disable that fails found a rollback in flight
			u.foundLate(reasonFailed)
		}
		u.fail()
	}
	u.mu.Lock()
	u.revoked = true
	if u.phase == revoking {
		u.step = u.now()
	}
	u.mu.Unlock()
	u.revocations.Add(-1)
}

// endPause leaves revoking if the last step was too long ago for a disable. The caller
// holds mu.
func (u *unmount) endPause(now time.Time) {
	if u.phase == revoking && now.Sub(u.step) > unmountPause {
		u.phase, u.reason = surviving, reasonStopped
	}
}

// shouldLogRetained reports true once for each taint, when the retained credentials must be logged.
func (u *unmount) shouldLogRetained() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	first := !u.logged
	u.logged = true
	return first
}

// watch records a request from Vault. The caller calls done with its result.
func (u *unmount) watch(ctx context.Context, req *logical.Request) (done func(*logical.Response, error)) {
	if last := u.mountPoint.Load(); req.MountPoint != "" && (last == nil || *last != req.MountPoint) {
		mountPoint := strings.Clone(req.MountPoint)
		u.mountPoint.Store(&mountPoint)
	}
	switch req.Operation { // Vault sends no others to a tainted mount
	case logical.RevokeOperation:
		u.revokes()
	case logical.RollbackOperation:
	default:
		u.request()
		return func(*logical.Response, error) {}
	}
	// A seal or a step-down during a disable cancels the request, and may unload the
	// mount before the handler returns.
	stop := context.AfterFunc(ctx, u.fail)
	return func(resp *logical.Response, err error) {
		if !stop() { // perhaps before the taint was seen
			u.fail()
		}
		if req.Operation == logical.RollbackOperation {
			u.rolledBack()
		} else {
			u.revokeDone(err != nil || resp.IsError())
		}
	}
}

// lastMountPoint is the mount point of the last request, "" before the first.
func (u *unmount) lastMountPoint() string {
	if known := u.mountPoint.Load(); known != nil {
		return *known
	}
	return ""
}

// whyKeepStaticRoles returns why an unload of the tainted mount may not be a disable, "" if it is.
func (u *unmount) whyKeepStaticRoles() string {
	now := u.now()
	u.mu.Lock()
	u.endPause(now)
	phase, reason := u.phase, u.reason
	u.mu.Unlock()
	switch {
	case phase == notSeen || phase == served: // the unload is the first to see the taint
		return reasonUnseen
	case phase == surviving:
		return reason
	case phase == rollingBack:
		return "the first rollback of the disable has not completed"
	case u.revocations.Load() > 0: // Vault revokes all leases before it disables the mount
		return "a revocation is in progress"
	case u.cannotTellDisable(u.lastMountPoint()):
		return "OpenBao may be sealing the namespace"
	}
	return ""
}

// cannotTellDisable reports whether a disable of this mount looks the same as an
// operation that the mount survives. OpenBao seals a namespace by tainting and unloading
// its mounts, and keeps their storage. Its mount points include the namespace, so only a
// mount point without a slash is certainly in no namespace.
func (u *unmount) cannotTellDisable(mountPoint string) bool {
	path := strings.Trim(mountPoint, "/")
	return u.openBao() && (path == "" || strings.Contains(path, "/")) // before the first request it is not known
}

// isDraining reports whether the mount is being disabled. Vault also taints a mount that
// it moves, but that taint ends at once.
func (u *unmount) isDraining() bool {
	if !u.draining.Load() {
		return false
	}
	tainted := u.tainted()
	u.draining.Store(tainted)
	return tainted
}

// drainEnd is when the disable in progress stops waiting for accounts and keys that
// OpenAI does not show yet.
func (u *unmount) drainEnd() time.Time {
	if end := u.drainEnds.Load(); end != nil {
		return *end
	}
	end := time.Now().Add(drainBudget)
	u.drainEnds.Store(&end)
	return end
}

// beingDisabled reports whether the mount is being disabled, so that nothing can be
// deleted later. A move on Vault begins in the same way and counts as one.
func (u *unmount) beingDisabled(req *logical.Request) bool {
	return u.isDraining() && !u.cannotTellDisable(req.MountPoint)
}
