package openaisecrets

// This file owns the periodic work of the engine.
//
// What must stay true: no kind of work waits for another; work runs only where this
// node may write, and stops with the backend.

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/job"
)

// background holds the jobs that each periodic call starts.
type background struct {
	superseded, tidyCheck, staticCheck, refresh *job.Job
	pools, leaving, usage, guardrails           *job.Job
	spending, doomed                            *job.Job
	lanes                                       map[string]*job.Job // by the kind of entry
}

func newBackground() *background {
	w := &background{superseded: job.New(), tidyCheck: job.New(), staticCheck: job.New(), refresh: job.New(), pools: job.New(), leaving: job.New(), usage: job.New(), guardrails: job.New(), spending: job.New(), doomed: job.New(), lanes: map[string]*job.Job{}}
	for _, kind := range walKinds {
		w.lanes[kind] = job.New()
	}
	return w
}

func (w *background) jobs() []*job.Job {
	all := []*job.Job{w.superseded, w.tidyCheck, w.staticCheck, w.refresh, w.pools, w.leaving, w.usage, w.guardrails, w.spending, w.doomed}
	for _, kind := range walKinds {
		all = append(all, w.lanes[kind])
	}
	return all
}

// startJobs starts the jobs and returns immediately. None waits for another: a
// superseded admin key must not remain valid because OpenAI throttles the deletion of
// accounts.
func (b *backend) startJobs(req *logical.Request) {
	// The jobs outlive the request, so they get a copy of what remains valid.
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	ctx := client.Background(b.lifetime)
	if b.WriteSafeReplicationState() {
		b.work.superseded.Start(ctx, func(ctx context.Context) {
			b.complain(ctx, req, "superseded admin keys not checked", b.deleteSuperseded(ctx, req))
		})
		b.work.tidyCheck.Start(ctx, func(ctx context.Context) {
			b.complain(ctx, req, "tidy not started", b.tidyIfDue(ctx, req))
			b.tickPools(req) //nolint:contextcheck // they outlive the check, which has read the config first
		})
		b.work.staticCheck.Start(ctx, func(ctx context.Context) {
			b.complain(ctx, req, "static roles not checked", b.checkStaticRoles(ctx, req))
		})
	}
	b.work.usage.Start(ctx, func(ctx context.Context) {
		b.complain(ctx, req, "usage not refreshed", b.refreshUsage(ctx, req)) // first, because its answers tell OpenAI's time
		b.startSpending(req)
		b.complain(ctx, req, "old usage records not deleted", b.sweepUsage(ctx, req))
	})
	b.startSpending(req)
	b.work.guardrails.Start(ctx, func(ctx context.Context) {
		b.complain(ctx, req, "projects not verified", b.rejudge(ctx, req))
	})
	b.work.refresh.Start(ctx, func(ctx context.Context) {
		b.complain(ctx, req, "WAL not read", b.refreshWAL(ctx, req))
		if !b.WriteSafeReplicationState() { // each cluster has its own pools
			if _, err := b.current(ctx, req.Storage); err == nil {
				b.tickPools(req) //nolint:contextcheck // they outlive the refresh
			}
		}
		for _, kind := range walKinds {
			if !b.wal.has(kind) {
				continue
			}
			b.work.lanes[kind].Start(b.lifetime, func(ctx context.Context) { b.workLane(client.Background(ctx), req, kind) }) //nolint:contextcheck // it outlives the refresh
		}
	})
}

// startSpending compares the costs of roles with their limits. Its calls are not
// background calls: keys of a blocked role are deleted before others are.
func (b *backend) startSpending(req *logical.Request) {
	b.work.spending.Start(b.lifetime, func(ctx context.Context) {
		b.complain(ctx, req, "costs of roles not compared with their spend_limit", b.checkSpending(ctx, req))
		if b.doomed.waiting() > 0 {
			b.work.doomed.Start(b.lifetime, func(ctx context.Context) { b.deleteDoomed(ctx, req) }) //nolint:contextcheck // it outlives the check
		}
	})
}

// tickPools is servePools once a minute, which retries what has failed.
func (b *backend) tickPools(req *logical.Request) {
	b.pools.wake()
	b.servePools(req)
}

// servePools starts the refill of the pools and the deletion of credentials that have
// left them, and returns immediately.
func (b *backend) servePools(req *logical.Request) {
	if !b.poolsUsed.Load() || !b.mayWriteLocally() || b.isDraining() {
		return
	}
	// The jobs outlive the request, so they get a copy of what remains valid.
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	if b.pools.someLeave() {
		b.work.leaving.Start(b.lifetime, func(ctx context.Context) {
			b.recordLeaving(ctx, req)
			for _, kind := range []string{walRevokedAccount, walRevokedKey} {
				b.work.lanes[kind].Start(b.lifetime, func(ctx context.Context) { b.workLane(client.Background(ctx), req, kind) }) //nolint:contextcheck // it outlives this job
			}
		})
	}
	b.work.pools.Start(client.Background(b.lifetime), func(ctx context.Context) {
		b.complain(ctx, req, "pools not refilled", b.refillPools(ctx, req))
	})
}

// workLane processes the entries of a kind. A run that used up its time is followed by
// another, which starts with the entries that are then most urgent.
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
		// Vault does not log this, and failures of single entries are logged at debug.
		entries, oldest, _ := b.wal.totals()
		b.log(req).Warn("WAL rollback incomplete", "kind", kind, "entries", entries, "oldest", time.Unix(oldest, 0).UTC(), "error", err)
	}
}
