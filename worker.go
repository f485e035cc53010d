package openaisecrets

// This file owns what the engine does each minute without a request.
//
// What must stay true: no kind of work waits for another; it runs only where this
// node may write, and ends with the backend.

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/job"
)

// background is the work that a tick starts.
type background struct {
	superseded, sweepCheck, refresh *job.Job
	lanes                           map[string]*job.Job // by the kind of entry
}

func newBackground() *background {
	w := &background{superseded: job.New(), sweepCheck: job.New(), refresh: job.New(), lanes: map[string]*job.Job{}}
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
		entries, oldest, _ := b.wal.totals()
		b.log(req).Warn("WAL rollback incomplete", "kind", kind, "entries", entries, "oldest", time.Unix(oldest, 0).UTC(), "error", err)
	}
}
