package openaisecrets

// This file owns how work runs outside Vault's requests: one run at a time, which
// ends with the backend or when its slot is taken.

import (
	"context"
	"sync/atomic"
)

// job is work of which at most one run is in progress.
type job struct {
	slot chan struct{} // one: held by the run
	stop atomic.Pointer[context.CancelFunc]
	// holding counts those that wait for the end of the run.
	holding atomic.Int64
}

func newJob() *job { return &job{slot: make(chan struct{}, 1)} }

// start begins a run unless one is in progress, and returns at once.
func (j *job) start(parent context.Context, run func(context.Context)) {
	select {
	case j.slot <- struct{}{}:
	default:
		return
	}
	ctx, cancel := context.WithCancel(parent)
	j.stop.Store(&cancel)
	if j.holding.Load() > 0 {
		cancel() // hold may have looked before there was anything to end
	}
	go func() {
		defer func() { <-j.slot }()
		defer cancel()
		run(ctx)
	}()
}

// hold ends the run in progress and keeps others from starting until release.
// The context bounds the wait for it.
func (j *job) hold(ctx context.Context) (release func(), err error) {
	j.holding.Add(1)
	defer j.holding.Add(-1)
	if stop := j.stop.Load(); stop != nil {
		(*stop)()
	}
	return j.wait(ctx)
}

// wait is hold for a run that may finish.
func (j *job) wait(ctx context.Context) (release func(), err error) {
	select {
	case j.slot <- struct{}{}:
		return func() { <-j.slot }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
