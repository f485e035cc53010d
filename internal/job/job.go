// Package job runs work outside Vault's requests, one run at a time, and has locks by
// name.
package job

import (
	"context"
	"sync"
	"sync/atomic"
)

// Job has at most one run in progress.
type Job struct {
	slot chan struct{} // one: held by the run
	stop atomic.Pointer[context.CancelFunc]
	// holding counts the Holds that wait for the run to end.
	holding atomic.Int64
}

// New returns a job without a run.
func New() *Job { return &Job{slot: make(chan struct{}, 1)} }

// Start starts a run unless one is in progress, and returns immediately. The run's
// context ends with parent or by End.
func (j *Job) Start(parent context.Context, run func(context.Context)) {
	select {
	case j.slot <- struct{}{}:
	default:
		return
	}
	ctx, cancel := context.WithCancel(parent)
	j.stop.Store(&cancel)
	if j.holding.Load() > 0 {
		cancel() // Hold may have read stop before this run stored its own
	}
	go func() {
		defer func() { <-j.slot }()
		defer cancel()
		run(ctx)
	}()
}

// End cancels the run in progress and waits for it. The context bounds the wait.
func (j *Job) End(ctx context.Context) error {
	release, err := j.Hold(ctx)
	if err == nil {
		release()
	}
	return err
}

// Hold is End, and prevents further runs until release.
func (j *Job) Hold(ctx context.Context) (release func(), err error) {
	j.holding.Add(1)
	defer j.holding.Add(-1)
	if stop := j.stop.Load(); stop != nil {
		(*stop)()
	}
	return j.Wait(ctx)
}

// Wait is Hold without canceling the run.
func (j *Job) Wait(ctx context.Context) (release func(), err error) {
	select {
	case j.slot <- struct{}{}:
		return func() { <-j.slot }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// NameLocks has a lock for each name. The names share none, so that a rotation that waits
// for its key to become active does not block other roles.
type NameLocks struct {
	mu   sync.Mutex
	held map[string]*nameLock
}

// Lock locks a name; the context bounds the wait.
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
	slot  chan struct{} // a channel, so that the wait honors a context
	users int           // holders and waiters; guarded by NameLocks.mu
}

// NewNameLocks returns locks without holders.
func NewNameLocks() *NameLocks { return &NameLocks{held: map[string]*nameLock{}} }

// SharedLocks has a lock per name, which many callers share or one holds alone. A caller
// that waits to hold it alone precedes callers that want to share it later.
type SharedLocks struct {
	mu   sync.Mutex
	held map[string]*sharedLock
}

type sharedLock struct {
	shared  int           // holders that share it
	alone   bool          // one holder has it alone
	waiting int           // callers that wait to hold it alone
	users   int           // all holders and waiting callers
	changed chan struct{} // closed when it may have become free; nil without a waiting caller
}

// NewSharedLocks returns locks without holders.
func NewSharedLocks() *SharedLocks { return &SharedLocks{held: map[string]*sharedLock{}} }

// Share takes the lock of a name together with others; the context bounds the wait.
func (l *SharedLocks) Share(ctx context.Context, name string) (release func(), err error) {
	return l.take(ctx, name, false)
}

// Alone takes the lock of a name alone; the context bounds the wait.
func (l *SharedLocks) Alone(ctx context.Context, name string) (release func(), err error) {
	return l.take(ctx, name, true)
}

func (l *SharedLocks) take(ctx context.Context, name string, alone bool) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.held[name]
	if n == nil {
		n = &sharedLock{}
		l.held[name] = n
	}
	n.users++
	leave := func() { // under the mutex
		if n.changed != nil {
			close(n.changed)
			n.changed = nil
		}
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
	if alone {
		n.waiting++
	}
	for n.alone || alone && n.shared > 0 || !alone && n.waiting > 0 {
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			err = ctx.Err()
		}
		l.mu.Lock()
		if err != nil {
			if alone {
				n.waiting--
			}
			leave()
			return nil, err
		}
	}
	if alone {
		n.waiting--
		n.alone = true
	} else {
		n.shared++
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if alone {
			n.alone = false
		} else {
			n.shared--
		}
		leave()
	}, nil
}

// Held returns the names whose lock has a holder or a waiting caller.
func (l *SharedLocks) Held() (names []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name := range l.held {
		names = append(names, name)
	}
	return names
}
