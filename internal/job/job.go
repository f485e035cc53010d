// Package job owns how work runs outside Vault's requests: one run at a time, which
// ends with its parent or when it is ended. A lock for each name is beside it.
package job

import (
	"context"
	"sync"
	"sync/atomic"
)

// Job is work of which at most one run is in progress.
type Job struct {
	slot chan struct{} // one: held by the run
	stop atomic.Pointer[context.CancelFunc]
	// holding counts those that wait for the end of the run.
	holding atomic.Int64
}

// New returns a job without a run.
func New() *Job { return &Job{slot: make(chan struct{}, 1)} }

// Start begins a run unless one is in progress, and returns at once.
func (j *Job) Start(parent context.Context, run func(context.Context)) {
	select {
	case j.slot <- struct{}{}:
	default:
		return
	}
	ctx, cancel := context.WithCancel(parent)
	j.stop.Store(&cancel)
	if j.holding.Load() > 0 {
		cancel() // Hold may have looked before there was anything to end
	}
	go func() {
		defer func() { <-j.slot }()
		defer cancel()
		run(ctx)
	}()
}

// End ends the run in progress. The context bounds the wait for that.
func (j *Job) End(ctx context.Context) error {
	release, err := j.Hold(ctx)
	if err == nil {
		release()
	}
	return err
}

// Hold is End, and keeps other runs from starting until release.
func (j *Job) Hold(ctx context.Context) (release func(), err error) {
	j.holding.Add(1)
	defer j.holding.Add(-1)
	if stop := j.stop.Load(); stop != nil {
		(*stop)()
	}
	return j.Wait(ctx)
}

// Wait is Hold for a run that may finish.
func (j *Job) Wait(ctx context.Context) (release func(), err error) {
	select {
	case j.slot <- struct{}{}:
		return func() { <-j.slot }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// NameLocks is a lock for each name. Names do not share any: a rotation that
// waits for its key to work keeps nobody from another role.
type NameLocks struct {
	mu   sync.Mutex
	held map[string]*nameLock
}

// Lock takes a name's lock; the context bounds the wait.
func (l *NameLocks) Lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	n := l.held[name]
	if n == nil {
		n = &nameLock{slot: make(chan struct{}, 1)}
		l.held[name] = n
	}
	n.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
	select {
	case n.slot <- struct{}{}:
		return func() { <-n.slot; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

type nameLock struct {
	slot  chan struct{} // one slot, whose wait honours a context
	users int           // who holds it or waits for it; guarded by NameLocks.mu
}

// NewNameLocks returns locks that nobody holds.
func NewNameLocks() *NameLocks { return &NameLocks{held: map[string]*nameLock{}} }
