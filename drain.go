package openaisecrets

// This file owns what is done at the end of the mount: the drain, within the rollbacks
// of a mount that is being disabled, and the end of its static roles at the unload.
//
// What must stay true: only the drain runs within a request of Vault's, which holds a
// lock that a seal or a step-down needs; what is left at OpenAI is named in the log.

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
	if _, _, kept := b.wal.totals(); err == nil && kept > 0 {
		b.logLeft(context.WithoutCancel(ctx), req, errHandedOut)
	} else if err != nil {
		b.logLeft(context.WithoutCancel(ctx), req, err)
	}
	return err
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
