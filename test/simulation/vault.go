package simulation

// This file owns the model of Vault: what a secrets plugin sees of it. Each
// behaviour is one that was measured on Vault 1.21.2 or read in its source
// (vault/expiration.go, vault/rollback.go, vault/mount.go, vault/request_handling.go,
// vault/ha.go); the stories of stories_test.go hold the model against the server.
//
// What must stay true: the model asks of the plugin what Vault would, in the same
// order, and never more kindly.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// What Vault 1.21 does.
const (
	tickEvery      = time.Minute      // core.go: the rollback manager's period
	tickTimeout    = 90 * time.Second // rollback.go
	revokeWorkers  = 180              // expiration.go and fairshare: of 200, for one mount
	revokeAttempts = 6
	revokeTimeout  = 90 * time.Second
	revokeBackoff  = 10 * time.Second // doubles, and half of it is chance
	irrevocableTry = 24 * time.Hour
	noticeAfter    = 100 * time.Millisecond // that a plugin's process has died
	stepDownDrain  = 90 * time.Second       // ha.go
	nodeSkew       = 25 * time.Second       // of a node's clock, as far as the engine is built for it
)

var (
	errSealed  = errors.New("vault is sealed")
	errNoMount = errors.New("unsupported path")
)

// vault is one Vault: its storage, its leases, and the node that is active.
type vault struct {
	w    *world
	name string
	path string

	mu        sync.Mutex
	store     *logical.InmemStorage
	leases    map[string]*lease // as stored
	mounted   bool
	cutShort  bool   // the process died while its mount was disabled
	wiped     string // the admin key of the config of the mount that was disabled last
	term      *term  // nil while sealed
	processes []*process
	offset    time.Duration   // of the active node's clock
	skew      time.Duration   // what of it is that node's
	ended     map[string]bool // IDs whose revocation this Vault has asked for
	dice      *rand.Rand
	count     int
	jumps     []jump
	spawning  chan struct{} // one slot: a new process
	changing  chan struct{} // one slot: a change of the mount; crashes come in between
	powering  chan struct{} // one slot: a change of the active node
	decoded   sync.Map      // by key of storage

	tainted atomic.Bool
	waited  atomic.Bool                    // the last taint found a rollback in flight
	sealing atomic.Bool                    // the taint is of a namespace that is sealed
	moved   atomic.Int64                   // restores and the like, by which leases may be lost
	loads   atomic.Int64                   // restores
	maxTTL  atomic.Int64                   // the mount's max_lease_ttl
	mount   atomic.Int64                   // counts the mounts that were enabled one after the other
	plugin  func(*process) logical.Factory // another than the engine, for stories
}

// jump is a step of a Vault's clock.
type jump struct {
	at time.Time
	by time.Duration
}

// term is the time for which a node is active.
type term struct {
	ctx    context.Context
	cancel context.CancelFunc
	p      *process
	slots  chan struct{}
	busy   sync.WaitGroup // requests, ticks and revocations in progress
	ends   atomic.Bool    // takes no more requests

	lastTick time.Time
	inFlight chan struct{} // closed when the rollback in progress ends; nil if there is none
}

func newVault(w *world, name string) *vault {
	v := &vault{
		w: w, name: name, path: "openai/", store: &logical.InmemStorage{}, leases: map[string]*lease{},
		mounted: true, ended: map[string]bool{}, dice: w.dice(name),
		spawning: make(chan struct{}, 1), changing: make(chan struct{}, 1), powering: make(chan struct{}, 1),
	}
	if w.Namespace {
		v.path = "team/openai/"
	}
	v.maxTTL.Store(int64(768 * time.Hour))
	return v
}

// at is a path for the mount, in its namespace.
func (v *vault) at(path string) string {
	if v.w.Namespace {
		return "team/" + path
	}
	return path
}

// now is the time by this Vault's clock.
func (v *vault) now() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return time.Now().Add(v.offset)
}

// real is a time by this Vault's clock as the SDK must be told it, which reads the
// world's.
func (v *vault) real(t time.Time) time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return t.Add(-v.offset)
}

// setClock steps the clock.
func (v *vault) setClock(by time.Duration) {
	v.mu.Lock()
	v.offset += by
	v.jumps = append(v.jumps, jump{time.Now(), by})
	v.mu.Unlock()
	if by.Abs() > 2*nodeSkew {
		v.w.ledger.excuseAged(v)
	}
}

// jumped reports whether the clock has been set since then by more than the clocks of
// two nodes may differ.
func (v *vault) jumped(since time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	var by, least, most time.Duration // before now
	for _, j := range slices.Backward(v.jumps) {
		if j.at.Before(since) {
			break
		}
		by -= j.by
		least, most = min(least, by), max(most, by)
	}
	return most-least > 2*nodeSkew
}

func (v *vault) roll(n int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.dice.IntN(n)
}

// start makes a node active: the mount is loaded, leases are restored, and the
// rollback manager begins to tick.
func (v *vault) start() {
	ctx, cancel := context.WithCancel(context.Background())
	t := &term{ctx: ctx, cancel: cancel, slots: make(chan struct{}, revokeWorkers), lastTick: time.Now()}
	v.mu.Lock()
	mounted := v.mounted
	v.mu.Unlock()
	if mounted {
		t.p = v.spawnNext()
	}
	v.mu.Lock()
	v.term = t
	v.scheduleAll(t)
	v.mu.Unlock()
	go v.ticks(t)
}

// scheduleAll has all leases end at their time, and be tried again from the beginning.
// The caller holds mu.
func (v *vault) scheduleAll(t *term) {
	for _, l := range v.leases {
		l.attempts = 0 // they are counted in memory
		v.schedule(t, l)
	}
}

// stop ends the active node's term. Gracefully it first waits for what is in
// progress, as a step-down does, and unloads the mount.
func (v *vault) stop(gracefully bool) {
	v.mu.Lock()
	t := v.term
	v.term = nil
	if t != nil {
		for _, l := range v.leases {
			if l.timer != nil {
				l.timer.Stop()
			}
		}
	}
	v.mu.Unlock()
	if t == nil {
		return
	}
	t.ends.Store(true)
	p := t.process()
	if gracefully {
		done := make(chan struct{})
		go func() { t.busy.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(stepDownDrain):
		}
		t.cancel()
		if p != nil {
			p.unload()
		}
	} else if p != nil {
		p.kill()
	}
	t.cancel()
	if p != nil && !gracefully {
		go p.b.Cleanup(context.Background()) // its goroutines end; nothing has an effect any more
	}
}

func (t *term) process() *process { return t.p }

// active is the active term and its process, which may have died.
func (v *vault) active() (*term, *process, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := v.term
	if t == nil || t.ends.Load() {
		return nil, nil, errSealed
	}
	if !v.mounted || t.p == nil {
		return nil, nil, errNoMount
	}
	return t, t.p, nil
}

// serving is the active term and its process, which is replaced if it has died and
// Vault has noticed. Until then all that is asked fails (measured: a disable fails at its
// first lease if the plugin dies of the rollback before).
func (v *vault) serving() (*term, *process, error) {
	t, p, err := v.active()
	switch {
	case err != nil || !p.dead.Load():
		return t, p, err
	case time.Since(p.diedAt()) < noticeAfter:
		return nil, nil, errDied
	}
	return v.respawn(t, p)
}

// respawn replaces a dead process. Who starts one that does not initialize is refused,
// and others are not (builtin/plugin/v5/backend.go, reloadBackend).
func (v *vault) respawn(t *term, p *process) (*term, *process, error) {
	v.spawning <- struct{}{}
	defer func() { <-v.spawning }()
	if t, now, err := v.active(); err != nil || now != p { // another request was first
		return t, now, err
	}
	go p.b.Cleanup(context.Background()) // its goroutines end
	next := v.spawnNext()
	v.mu.Lock()
	defer v.mu.Unlock()
	if t.p != p { // the mount has ended meanwhile
		next.kill()
		go next.b.Cleanup(context.Background())
		return nil, nil, errNoMount
	}
	t.p = next
	return t, next, next.broken
}

// request sends a request to the plugin. A client that goes away cancels ctx.
func (v *vault) request(ctx context.Context, op logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	if v.tainted.Load() {
		return nil, errNoMount
	}
	t, p, err := v.serving()
	if err != nil {
		return nil, err
	}
	ctx, cancel := t.under(ctx)
	defer cancel()
	return v.call(ctx, t, p, &logical.Request{Operation: op, Path: path, Data: throughJSON(data), DisplayName: "userpass-alice"})
}

// under is a context that ends with the term, too.
func (t *term) under(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(t.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// call has the plugin handle a request.
func (v *vault) call(ctx context.Context, t *term, p *process, req *logical.Request) (*logical.Response, error) {
	req.ID, req.MountPoint = fmt.Sprintf("req-%d", v.roll(1<<30)), v.mountPoint()
	again := *req
	again.Data = maps.Clone(req.Data)
	if req.Secret != nil {
		again.Secret = stored(req.Secret)
	}
	resp, err := v.send(ctx, t, p, req)
	if !errors.Is(err, errDied) || !v.w.Trouble || v.roll(8) > 0 {
		return resp, err
	}
	// Vault has heard of the process's end before it has seen the broken connection: it
	// starts another and sends the request again (builtin/plugin/v5/backend.go,
	// HandleRequest; measured under load: in three of four stories).
	t, next, err := v.respawn(t, p)
	if err == nil && next.mount != p.mount {
		err = errNoMount // another mount's is of no use
	}
	if err != nil {
		return nil, err
	}
	return v.send(ctx, t, next, &again)
}

// send sends a request to a process. It returns when that dies.
func (v *vault) send(ctx context.Context, t *term, p *process, req *logical.Request) (*logical.Response, error) {
	type result struct {
		resp *logical.Response
		err  error
	}
	req.Storage = view{p}
	done := make(chan result, 1)
	began := time.Now()
	var gone atomic.Pointer[time.Time] // when the client went
	defer context.AfterFunc(ctx, func() { now := time.Now(); gone.Store(&now) })()
	t.busy.Add(1)
	p.asked(req)
	v.w.run(func() {
		defer t.busy.Done()
		if req.Operation == logical.UpdateOperation {
			if checked, exists, err := p.b.HandleExistenceCheck(ctx, req); err == nil && checked && !exists {
				req.Operation = logical.CreateOperation
			}
		}
		resp, err := p.b.HandleRequest(ctx, req)
		v.w.bounded(fmt.Sprintf("%s: %s %s", p.name, req.Operation, req.Path), began, callBound)
		v.w.checkSpending(p, req, began, resp, err)
		if at := gone.Load(); err == nil && req.Operation != logical.RenewOperation {
			v.w.ledger.answered(resp, at != nil && time.Since(*at) > 0)
		}
		done <- result{resp, err}
	})
	select {
	case r := <-done:
		if p.dead.Load() {
			return nil, errDied
		}
		v.w.heard(r.resp, r.err)
		return r.resp, r.err
	case <-p.died:
		return nil, errDied
	}
}

func (v *vault) mountPoint() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.path
}

// ticks is the rollback manager.
func (v *vault) ticks(t *term) {
	for {
		select {
		case <-time.After(tickEvery):
		case <-t.ctx.Done():
			return
		}
		v.mu.Lock()
		t.lastTick = time.Now()
		v.mu.Unlock()
		v.rollback(t)
	}
}

// rollback is one RollbackOperation, or waits for one that is in flight and makes no
// other (rollback.go, Rollback). Its errors are of no consequence.
func (v *vault) rollback(t *term) (waited bool) {
	v.mu.Lock()
	inFlight, done := t.inFlight, make(chan struct{})
	if inFlight == nil {
		t.inFlight = done
	}
	v.mu.Unlock()
	if inFlight != nil {
		<-inFlight
		return true
	}
	defer func() {
		v.mu.Lock()
		t.inFlight = nil
		v.mu.Unlock()
		close(done)
	}()
	serving, p, err := v.serving()
	if err != nil || serving != t {
		return false
	}
	ctx, cancel := context.WithTimeout(t.ctx, tickTimeout)
	defer cancel()
	_, _ = v.call(ctx, t, p, &logical.Request{Operation: logical.RollbackOperation, Path: ""})
	return false
}

// stored is a lease's secret after a trip through Vault's storage.
func stored(s *logical.Secret) *logical.Secret {
	copied := *s
	copied.InternalData = throughJSON(s.InternalData)
	return &copied
}

// throughJSON is what data looks like after a trip through storage or the wire.
func throughJSON(data map[string]any) map[string]any {
	changes := false
	for _, v := range data {
		switch v.(type) {
		case string, bool, json.Number:
		default:
			changes = true
		}
	}
	if !changes {
		return maps.Clone(data)
	}
	encoded, err := json.Marshal(data)
	if err != nil {
		panic(err) // responses are JSON
	}
	decoder := json.NewDecoder(bytes.NewReader(encoded))
	decoder.UseNumber()
	result := map[string]any{}
	if err := decoder.Decode(&result); err != nil {
		panic(err)
	}
	return result
}
