package openaisecrets

// This file owns what the engine does each minute without a request, and the drain that takes its place
// when the mount is being disabled.
//
// What must stay true: no kind of work waits for another; it runs only where this
// node may write, and ends with the backend. Only the drain runs within a request of
// Vault's, which holds a lock that a seal or a step-down needs.

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/job"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	// maxLeftLines bounds the lines of the log on what a disabled mount leaves.
	maxLeftLines = 100
)

// background is the work that a tick starts.
type background struct {
	superseded, sweepCheck, refresh *job.Job
	lanes                           map[string]*job.Job // by the kind of entry
	wal                             *walIndex
}

func newBackground() *background {
	w := &background{superseded: job.New(), sweepCheck: job.New(), refresh: job.New(), lanes: map[string]*job.Job{}, wal: newWALIndex()}
	for _, kind := range journalKinds {
		w.lanes[kind] = job.New()
	}
	return w
}

// jobs are all that a tick starts.
func (w *background) jobs() []*job.Job {
	all := []*job.Job{w.superseded, w.sweepCheck, w.refresh}
	for _, kind := range journalKinds {
		all = append(all, w.lanes[kind])
	}
	return all
}

// kick starts all that this engine does at each tick, and returns at once. None of
// it waits for another: a superseded admin key must not live on because OpenAI
// throttles the deletion of accounts.
func (b *backend) kick(req *logical.Request) {
	// Of the request only what outlives it.
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	ctx := client.Background(b.lifetime)
	if b.WriteSafeReplicationState() {
		b.work.superseded.Start(ctx, func(ctx context.Context) {
			b.complain(ctx, req, "superseded admin keys not checked", b.deleteRetired(ctx, req))
		})
		b.work.sweepCheck.Start(ctx, func(ctx context.Context) { b.complain(ctx, req, "tidy not started", b.tidyIfDue(ctx, req)) })
	}
	b.work.refresh.Start(ctx, func(ctx context.Context) {
		b.complain(ctx, req, "WAL not read", b.refreshWAL(ctx, req))
		for _, kind := range journalKinds {
			b.work.lanes[kind].Start(b.lifetime, func(ctx context.Context) { b.workLane(client.Background(ctx), req, kind) }) //nolint:contextcheck // it outlives the refresh
		}
	})
}

// workLane executes the entries of a kind. A run that its time has ended is followed
// by another, which takes first what has become urgent meanwhile.
func (b *backend) workLane(ctx context.Context, req *logical.Request, kind string) {
	for more := true; more && ctx.Err() == nil; {
		run := b.runWAL(ctx, req, kind, walMinAge)
		b.complainWAL(ctx, req, kind, run.err())
		if more = run.cut && run.done > 0; more {
			b.complain(ctx, req, "WAL not read", b.refreshWAL(ctx, req))
		}
	}
}

func (b *backend) complainWAL(ctx context.Context, req *logical.Request, kind string, err error) {
	if err != nil && !errors.Is(err, errNotFinal) && ctx.Err() == nil {
		// Vault logs nothing of it, and the entries' own failures are at debug.
		entries, oldest, _ := b.work.wal.totals()
		b.log(req).Warn("WAL rollback incomplete", "kind", kind, "entries", entries, "oldest", time.Unix(oldest, 0).UTC(), "error", err)
	}
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
