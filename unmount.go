package openaisecrets

// This file owns the end of the mount: what this process has seen of Vault's
// taint, and what static roles own when the mount is unloaded.
//
// What must stay true: what a mount that lives on needs is never destroyed. Vault
// taints a mount that is disabled and one that moves, a failure of either leaves
// the taint, and then a seal, a step-down or a restart unloads the mount as a
// disable does. So static roles end only where this process has seen the taint
// begin, nothing has failed since, and Vault has never paused; where they stay the
// log says what stays and until when.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
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

// endStaticRoles destroys what the static roles own, and leaves their entries to
// Vault, which wipes the mount's storage next: the mount is being disabled. It is
// called where Vault unloads a mount for whatever reason.
//
// Until it returns, Vault's plugin protocol holds up the requests to all mounts
// that this process serves, hence the bound, and the hurry within it.
func (b *backend) endStaticRoles(ctx context.Context) {
	if b.storage == nil || b.System() == nil || !b.System().Tainted() || !b.WriteSafeReplicationState() {
		return
	}
	stays := b.mayStay() // before anything is awaited
	b.draining.Store(true)
	reading, cancelReading := context.WithTimeout(context.WithoutCancel(ctx), unmountBudget+unmountReading)
	defer cancelReading()
	ctx, cancel := context.WithTimeout(reading, unmountBudget)
	defer cancel()
	log := b.Logger()
	if known := b.mountPoint.Load(); known != nil {
		log = log.With("mount", *known)
	}
	if err := b.static.pass.End(ctx); err != nil {
		log.Warn("the mount is being disabled while a static role is rotated", "error", err)
	}
	names, err := b.storage.List(ctx, staticStoragePrefix)
	if err != nil {
		log.Error("the tainted mount is unloaded, and its static roles could not be listed; what they own is left at OpenAI", "error", err)
		return
	}
	if len(names) == 0 {
		return
	}
	if stays != "" {
		log.Warn("unloaded with a taint, but perhaps not disabled: static roles keep their accounts and keys", "static_roles", len(names), "reason", stays)
	}
	e := &ending{b: b, log: log, leave: stays != ""}
	var group sync.WaitGroup
	slots := make(chan struct{}, unmountWorkers)
	for _, name := range names {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			e.role(ctx, reading, name)
		})
	}
	group.Wait()
	if !e.leave {
		log.Info("static roles ended with their mount", "static_roles", len(names))
	}
}

// ending is the end of a mount's static roles.
type ending struct {
	b      *backend
	log    hclog.Logger
	leave  bool         // nothing is destroyed, and the log says what stays
	failed atomic.Int64 // in a row, for a reason that others share
}

// role destroys what one static role owns, or logs what stays.
func (e *ending) role(ctx, reading context.Context, name string) {
	log := e.log.With("static_role", name)
	const left = "the mount is being disabled, and what a static role owns is left at OpenAI"
	unlock, err := e.b.lockStatic(ctx, name)
	if err == nil {
		defer unlock()
	} else if !e.leave {
		log.Error(left, "error", err)
		return
	}
	r, err := getStaticRole(reading, e.b.storage, name)
	if err != nil {
		log.Error("a static role could not be read; what it owns is left at OpenAI", "error", err)
		return
	}
	if r == nil {
		return
	}
	for _, c := range r.owned(name) {
		attrs := append(c.attrs(), "key_expires_at", text.Time(c.KeyExpires))
		if e.leave {
			log.Warn("static role keeps its credential", attrs...)
			continue
		}
		err := errors.New("too many others have failed")
		if e.failed.Load() < unmountWorkers {
			err = e.b.destroyNow(ctx, c)
		}
		switch {
		case err == nil:
			e.failed.Store(0)
			continue
		case shared(err):
			e.failed.Add(1)
		}
		log.Error(left, append(attrs, "error", fmt.Errorf("%s: %w", c.what(), err))...)
	}
}

// destroyNow destroys a credential for which there is no later: what OpenAI does
// not find yet is looked for until the context ends.
func (b *backend) destroyNow(ctx context.Context, c credential) error {
	for attempt := 0; ; attempt++ {
		snap, err := b.current(ctx, b.storage)
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		if !errors.Is(err, errNotFinal) || client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
	}
}

// logKept logs what a drain leaves where a disable cannot be told from what the
// mount survives: superseded admin keys through their grace period, and the WAL
// entries of what has just been created. Once for each taint.
func (b *backend) logKept(ctx context.Context, req *logical.Request) {
	if !b.taint.tell() {
		return
	}
	log := b.log(req)
	if snap, err := b.current(ctx, req.Storage); err == nil {
		for _, key := range snap.config.Retired {
			log.Warn("superseded admin key keeps its grace period: OpenBao may only be sealing the namespace", "admin_api_key_id", key.ID, "delete_after", text.Time(key.DeleteAfter))
		}
	}
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		log.Warn("the WAL could not be listed, and what its entries name is left at OpenAI", "error", err)
		return
	}
	const most = 100 // lines
	for i, id := range ids {
		if i == most {
			log.Warn("more WAL entries are left", "entries", len(ids)-most)
			return
		}
		entry, err := framework.GetWAL(ctx, req.Storage, id)
		if err != nil || entry == nil {
			continue
		}
		var c credential
		attrs := []any{"kind", entry.Kind, "made_at", text.Time(time.Unix(entry.CreatedAt, 0).UTC())}
		if entry.Kind != journalAdminKey && decodeInto(&c, entry.Data) == nil {
			attrs = append(append(attrs, c.attrs()...), "key_expires_at", text.Time(c.KeyExpires))
		}
		log.Warn("WAL entry left: OpenBao may only be sealing the namespace", attrs...)
	}
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

// drain executes the WAL within the request, however young its entries: the mount
// is being disabled and its storage is deleted next.
func (b *backend) drain(ctx context.Context, req *logical.Request) error {
	end := time.Now().Add(drainBudget)
	b.drainEnds.Store(&end)
	for _, j := range b.work.jobs() { // what they do now is done here
		release, err := j.Hold(ctx)
		if err != nil {
			b.logLeft(context.WithoutCancel(ctx), req, err)
			return err
		}
		defer release()
	}
	b.tidy.stop()
	// What is being created has its entry, but may not be at OpenAI yet; and of
	// what has just been returned Vault must have stored the lease before it
	// revokes all there are.
	for b.issuing.Load() > 0 || b.inTransit() {
		if err := client.Wait(ctx, 50*time.Millisecond); err != nil {
			break
		}
	}
	if unlock, err := b.lockConfig(ctx); err == nil {
		unlock() // a rotation was finished; its entry is settled below
	}
	minAge, stays := time.Duration(0), b.cannotTellDisable(req.MountPoint)
	if stays {
		minAge = walMinAge
	}
	var err, retiredErr error
	if !stays && b.WriteSafeReplicationState() { // before what may take all the time
		retiredErr = b.endRetired(ctx, req)
	}
	for pause := time.Second; ; pause = min(2*pause, 8*time.Second) {
		var again bool
		// What OpenAI does not show may appear yet, and an outage may end: afterwards
		// nothing looks.
		if again, err = b.runAllWAL(ctx, req, minAge); !again || stays || client.Wait(ctx, pause) != nil {
			break
		}
	}
	if stays {
		b.logKept(ctx, req)
	}
	if err == nil {
		err = retiredErr
	}
	if _, _, kept := b.work.wal.totals(); err == nil && kept > 0 {
		b.logLeft(context.WithoutCancel(ctx), req, errHandedOut)
	} else if err != nil {
		b.logLeft(context.WithoutCancel(ctx), req, err)
	}
	return err
}

// mayPass reports whether what kept a WAL entry from its end may pass within the
// drain's budget.
func mayPass(err error) bool {
	return isNotFoundAtAll(err) || shared(err) && !client.IsDenied(err)
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

// logLeft names what a mount that is being disabled leaves at OpenAI, once for each
// disabling: one that has failed leaves the mount tainted, and drained each minute.
func (b *backend) logLeft(ctx context.Context, req *logical.Request, failure error) {
	if !b.taint.tell() {
		b.log(req).Warn("WAL rollback incomplete", "error", failure)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	log := b.log(req)
	ids, err := framework.ListWAL(ctx, req.Storage)
	log.Error("the mount is being disabled and its WAL could not be executed; what it names is left at OpenAI", "entries", len(ids), "error", errors.Join(failure, err))
	for _, id := range ids[:min(len(ids), maxLeftLines)] {
		entry, err := framework.GetWAL(ctx, req.Storage, id)
		if err != nil || entry == nil {
			continue
		}
		var c credential
		var key adminKeyEntry
		if entry.Kind == journalAdminKey && decodeInto(&key, entry.Data) == nil {
			log.Error("left at OpenAI", "kind", entry.Kind, "name", key.Name)
		} else if decodeInto(&c, entry.Data) == nil {
			log.Error("left at OpenAI", append([]any{"kind", entry.Kind, "key_expires_at", text.Time(c.KeyExpires)}, c.attrs()...)...)
		}
	}
}

const (
	// maxLeftLines bounds the lines of the log on what a disabled mount leaves.
	maxLeftLines = 100
)

// beingDisabled reports whether the mount is being disabled, after which nothing
// of it is left that could delete anything.
func (b *backend) beingDisabled(req *logical.Request) bool {
	return b.isDraining() && !b.cannotTellDisable(req.MountPoint)
}
