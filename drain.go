package openaisecrets

// This file owns the cleanup of a disabled mount: the drain, during its rollbacks, and
// the deletion of its static roles at the unload.
//
// What must stay true: only the drain runs within a request from Vault, which holds a
// lock that a seal or a step-down needs; everything left at OpenAI is logged by name.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

// drain processes the WAL within the request, in at most budget and regardless of the age
// of its entries: the mount is being disabled, and Vault deletes its storage next.
func (b *backend) drain(ctx context.Context, req *logical.Request, budget time.Duration) error {
	b.closePools()
	b.releaseDoomed()
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	if err := b.probeWAL(ctx, req); err != nil {
		b.log(req).Warn("tainted mount not drained: storage accepts no write", "error", err)
		return fmt.Errorf("%w: %w", errNoWrite, err)
	}
	b.unmount.drains()
	for _, ended := range []func(context.Context) error{b.rotation.look.End, b.static.worker.End} {
		if err := ended(ctx); err != nil {
			b.logLeft(context.WithoutCancel(ctx), req, err, true)
			return err
		}
	}
	end := time.Now().Add(budget)
	b.drainEnds.Store(&end)
	for _, j := range b.work.jobs() { // this function does their work
		release, err := j.Hold(ctx)
		if err != nil {
			b.logLeft(context.WithoutCancel(ctx), req, err, true)
			return err
		}
		defer release()
	}
	b.closePools() // a job may have opened them again
	b.tidy.stop()
	// A credential that is being created has its entry, but may not be at OpenAI yet.
	// For one that was just returned, Vault must store the lease before it revokes them
	// all.
	for b.issuing.Load() > 0 || b.inTransit() {
		if err := client.Wait(ctx, 50*time.Millisecond); err != nil {
			break
		}
	}
	b.recordLeaving(ctx, req) // the credentials of the pools, by ID
	if unlock, err := b.lockConfig(ctx); err == nil {
		unlock() // a rotation in progress has finished; its entry is processed below
	}
	minAge, stays := time.Duration(0), b.cannotTellDisable(req.MountPoint)
	if stays {
		minAge = walMinAge
	}
	var err, supersededErr error
	if !stays && b.WriteSafeReplicationState() { // first, since the WAL may take all the time
		supersededErr = b.expireSuperseded(ctx, req)
	}
	for pause := time.Second; ; pause = min(2*pause, 8*time.Second) {
		var again bool
		// Accounts and keys may still appear, and an outage may end. Nothing looks for
		// them later.
		if again, err = b.runAllWAL(ctx, req, minAge); !again || stays || client.Wait(ctx, pause) != nil {
			break
		}
	}
	if stays {
		b.logKept(ctx, req, "OpenBao may only be sealing the namespace")
	}
	if err == nil {
		err = supersededErr
	}
	if _, _, kept := b.wal.totals(); err == nil && kept > 0 {
		b.logLeft(context.WithoutCancel(ctx), req, errKeyUsed, false)
	} else if err != nil {
		b.logLeft(context.WithoutCancel(ctx), req, err, supersededErr != nil)
	}
	return err
}

// drainUnseen drains a mount at its unload if no rollback has: storage accepted no write,
// or none has found the taint. A disable makes one, but one that begins while Vault's
// periodic rollback is in flight waits for that instead (vault/rollback.go, Rollback). If
// the taint began too late in it for the engine to notice, the unload is the last call.
func (b *backend) drainUnseen(ctx context.Context) {
	if b.storage == nil || b.System() == nil || !b.System().Tainted() || !b.mayWriteLocally() || !b.foundLate(reasonUnseen) {
		return
	}
	req := &logical.Request{Storage: b.storage, MountPoint: b.lastMountPoint()}
	err := b.drain(context.WithoutCancel(ctx), req, unmountBudget)
	if errors.Is(err, errNoWrite) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmountReading)
		defer cancel()
		b.logKept(ctx, req, "storage accepts no write; if this node has lost its leadership, the next one goes on with the mount")
	} else if err != nil {
		b.log(req).Error("mount unloaded before its WAL rollback was complete", "error", err)
	}
}

// logLeft logs what a disabled mount leaves at OpenAI, once for each disable: a failed
// one leaves the mount tainted, and drained each minute.
func (b *backend) logLeft(ctx context.Context, req *logical.Request, failure error, superseded bool) {
	if !b.unmount.shouldLogRetained() {
		b.log(req).Warn("WAL rollback incomplete", "error", failure)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	log := b.log(req)
	if superseded {
		b.logSuperseded(ctx, req, "superseded admin key remains at OpenAI", "mount is being disabled")
	}
	ids, err := framework.ListWAL(ctx, req.Storage)
	log.Error("mount is being disabled but WAL rollback is incomplete; the credentials in the WAL remain at OpenAI", "entries", len(ids), "error", errors.Join(failure, err))
	for _, id := range ids[:min(len(ids), maxLeftLines)] {
		entry := b.readLeft(ctx, req, id)
		if entry == nil {
			continue
		}
		log.Error("credential remains at OpenAI", entryAttrs(entry)...)
	}
}

// readLeft reads an entry of the WAL that is to be logged, nil if there is none or it
// cannot be read, which is logged instead.
func (b *backend) readLeft(ctx context.Context, req *logical.Request, id string) *framework.WALEntry {
	entry, err := framework.GetWAL(ctx, req.Storage, id)
	if err != nil {
		b.log(req).Error("WAL entry could not be read; its credential remains at OpenAI", "wal_entry", id, "error", err)
	}
	return entry
}

const (
	// maxLeftLines bounds the log lines about credentials that a disabled mount leaves.
	maxLeftLines = maxPoolSum + 100
)

// errNoWrite is of a drain that has not begun.
var errNoWrite = errors.New("storage accepts no write")

// unmountProbe and walProbe are storage keys that never exist. Each cluster has its own
// WAL, and may write there.
const (
	unmountProbe = "unmount"
	walProbe     = framework.WALPrefix + unmountProbe
)

// probe returns why storage accepts no write. A node that has lost its leadership during
// a disable or a move unloads the mount, too, and another node goes on with what it has at
// OpenAI. Raft and Consul accept no write of such a node; other storage cannot tell.
func (b *backend) probe(ctx context.Context, key string, s logical.Storage) error {
	return tryAgain(ctx, func() error { return s.Delete(ctx, key) })
}

// probeWAL gives storage some seconds to accept a write.
func (b *backend) probeWAL(ctx context.Context, req *logical.Request) error {
	ctx, cancel := context.WithTimeout(ctx, lastLookBudget)
	defer cancel()
	for {
		err := b.probe(ctx, walProbe, req.Storage)
		if err == nil || client.Wait(ctx, time.Second) != nil {
			return err
		}
	}
}

// deleteStaticRoles destroys the accounts and keys of the static roles of a disabled
// mount. It leaves the storage entries to Vault, which deletes the mount's storage next.
// It is called for every unload, whatever the reason.
//
// Until it returns, Vault's plugin protocol blocks the requests to all mounts of this
// process, so its time is bounded and the deletes run in parallel.
func (b *backend) deleteStaticRoles(ctx context.Context) {
	if b.storage == nil || b.System() == nil || !b.System().Tainted() || !b.WriteSafeReplicationState() {
		return
	}
	whyKeep := b.whyKeepStaticRoles() // before any wait, since the state may change
	b.draining.Store(true)
	reading, cancelReading := context.WithTimeout(context.WithoutCancel(ctx), unmountBudget+unmountReading)
	defer cancelReading()
	ctx, cancel := context.WithTimeout(reading, unmountBudget)
	defer cancel()
	log := b.Logger()
	if known := b.mountPoint.Load(); known != nil {
		log = log.With("mount", *known)
	}
	if err := b.static.worker.End(ctx); err != nil {
		log.Warn("mount is being disabled during a static role rotation", "error", err)
	}
	var names []string
	err := tryAgain(reading, func() (err error) {
		names, err = b.storage.List(reading, staticStoragePrefix)
		return err
	})
	if err != nil {
		log.Error("tainted mount unloaded but its static roles could not be listed; their credentials remain at OpenAI", "error", err)
		return
	}
	if len(names) == 0 {
		return
	}
	if whyKeep == "" {
		if err := b.probe(ctx, unmountProbe, b.storage); err != nil {
			whyKeep = "storage accepts no write: " + err.Error()
		}
	}
	if whyKeep != "" {
		log.Warn("tainted mount unloaded but possibly not disabled; static roles keep their accounts and keys", "static_roles", len(names), "reason", whyKeep)
	}
	e := &staticDeletion{b: b, log: log, leave: whyKeep != ""}
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
		log.Info("static roles deleted with the disabled mount", "static_roles", len(names))
	}
}

// staticDeletion is the deletion of a mount's static roles.
type staticDeletion struct {
	b      *backend
	log    hclog.Logger
	leave  bool         // nothing is destroyed, only logged
	failed atomic.Int64 // systemic failures in a row
}

// role destroys the credentials of one static role, or logs that they remain.
func (e *staticDeletion) role(ctx, reading context.Context, name string) {
	log := e.log.With("static_role", name)
	const left = "mount is being disabled but a static role's credential remains at OpenAI"
	unlock, notLocked := e.b.lockStatic(ctx, name)
	if notLocked == nil {
		defer unlock()
	}
	var r *staticRole
	err := tryAgain(reading, func() (err error) {
		r, err = getStaticRole(reading, e.b.storage, name)
		return err
	})
	if err != nil {
		log.Error("static role could not be read; its credentials remain at OpenAI", "error", err)
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
		err := notLocked
		if err == nil && e.failed.Load() >= unmountWorkers {
			err = errors.New("skipped after too many failures in a row")
		} else if err == nil {
			err = e.b.destroyNow(ctx, c)
		}
		switch {
		case err == nil:
			e.failed.Store(0)
			continue
		case isSystemic(err):
			e.failed.Add(1)
		}
		log.Error(left, append(attrs, "error", fmt.Errorf("%s: %w", c.describe(), err))...)
	}
}

// destroyNow destroys a credential that nothing can delete later: one that OpenAI does
// not find yet is retried until the context ends.
func (b *backend) destroyNow(ctx context.Context, c credential) error {
	for attempt := 0; ; attempt++ {
		var snap *snapshot
		err := tryAgain(ctx, func() (err error) {
			snap, err = b.current(ctx, b.storage)
			return err
		})
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		if !errors.Is(err, errNotFinal) || client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
	}
}

// logSuperseded names the superseded admin keys that a drain has not deleted.
func (b *backend) logSuperseded(ctx context.Context, req *logical.Request, what, why string) {
	log := b.log(req)
	if snap, err := b.current(ctx, req.Storage); err == nil {
		for _, key := range snap.config.Superseded {
			log.Warn(what, "admin_api_key_id", key.ID, "delete_after", text.Time(key.DeleteAfter), "reason", why)
		}
	} else if !errors.Is(err, errNotConfigured) {
		log.Warn("config could not be read; superseded admin keys, if there are any, remain at OpenAI", "error", err)
	}
}

// logKept logs, once for each taint, what a drain leaves because the mount may survive:
// where cannotTellDisable, superseded admin keys within their grace period, and WAL
// entries of credentials that were just created; without storage, all of them.
func (b *backend) logKept(ctx context.Context, req *logical.Request, why string) {
	if !b.unmount.shouldLogRetained() {
		return
	}
	log := b.log(req)
	b.logSuperseded(ctx, req, "superseded admin key retained", why)
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		log.Warn("WAL could not be listed; the credentials in it remain at OpenAI", "error", err)
		return
	}
	for i, id := range ids {
		if i == maxLeftLines {
			log.Warn("more WAL entries retained", "entries", len(ids)-maxLeftLines)
			return
		}
		entry := b.readLeft(ctx, req, id)
		if entry == nil {
			continue
		}
		log.Warn("WAL entry retained", append(entryAttrs(entry), "reason", why)...)
	}
}
