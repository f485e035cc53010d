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
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
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
	stepDownDrain  = 90 * time.Second // ha.go
)

var (
	errSealed  = errors.New("Vault is sealed")
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
	term      *term // nil while sealed
	processes []*process
	offset    time.Duration   // of its clock
	ended     map[string]bool // IDs whose revocation this Vault has asked for
	dice      *rand.Rand
	count     int
	jumps     []jump
	changing  chan struct{} // one slot: a change of the mount; crashes come in between
	powering  chan struct{} // one slot: a change of the active node

	tainted atomic.Bool
	moved   atomic.Int64 // restores and the like, by which leases may be lost
	loads   atomic.Int64 // restores
	mount   atomic.Int64 // counts the mounts that were enabled one after the other
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
}

// lease is an entry of the lease store.
type lease struct {
	id, role      string
	path          string
	secret        *logical.Secret
	data          map[string]any
	issue, expire time.Time // by this Vault's clock
	began         time.Time // by the world's
	renewable     bool
	revoking      bool // its end was asked for, or its time is over
	irrevocable   bool
	timer         *time.Timer
}

func (l *lease) account() string { id, _ := l.data["service_account_id"].(string); return id }
func (l *lease) keyID() string   { id, _ := l.data["api_key_id"].(string); return id }
func (l *lease) key() string     { key, _ := l.data["api_key"].(string); return key }

func newVault(w *world, name string) *vault {
	return &vault{
		w: w, name: name, path: "openai/", store: &logical.InmemStorage{}, leases: map[string]*lease{},
		mounted: true, ended: map[string]bool{}, dice: w.dice(name), changing: make(chan struct{}, 1), powering: make(chan struct{}, 1),
	}
}

// now is the time by this Vault's clock.
func (v *vault) now() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return time.Now().Add(v.offset)
}

// setClock steps the clock.
func (v *vault) setClock(by time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.offset += by
	v.jumps = append(v.jumps, jump{time.Now(), by})
}

// jumped is by how much the clock was set since then, in either direction.
func (v *vault) jumped(since time.Time) (sum time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, j := range v.jumps {
		if !j.at.Before(since) {
			sum += j.by.Abs()
		}
	}
	return sum
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
	t := &term{ctx: ctx, cancel: cancel, slots: make(chan struct{}, revokeWorkers)}
	v.mu.Lock()
	mounted := v.mounted
	v.count++
	name := fmt.Sprintf("%s/%d", v.name, v.count)
	v.mu.Unlock()
	if mounted {
		t.p = v.spawn(name)
	}
	v.mu.Lock()
	v.term = t
	for _, l := range v.leases {
		v.schedule(t, l)
	}
	v.mu.Unlock()
	go v.ticks(t)
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

// serving is the active term and its process, which is started anew if it has died.
func (v *vault) serving() (*term, *process, error) {
	v.mu.Lock()
	t := v.term
	if t == nil || t.ends.Load() {
		v.mu.Unlock()
		return nil, nil, errSealed
	}
	if !v.mounted || t.p == nil {
		v.mu.Unlock()
		return nil, nil, errNoMount
	}
	p := t.p
	if !p.dead.Load() {
		v.mu.Unlock()
		return t, p, nil
	}
	v.count++
	name := fmt.Sprintf("%s/%d", v.name, v.count)
	v.mu.Unlock()
	go p.b.Cleanup(context.Background()) // its goroutines end
	next := v.spawn(name)
	v.mu.Lock()
	defer v.mu.Unlock()
	if t.p == p {
		t.p = next
	} else if t.p != nil { // another request was first
		next.kill()
		go next.b.Cleanup(context.Background())
	}
	return t, t.p, nil
}

// request sends a request to the plugin. A client that goes away cancels ctx.
func (v *vault) request(ctx context.Context, op logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	t, p, err := v.serving()
	if err != nil {
		return nil, err
	}
	if v.tainted.Load() {
		return nil, errNoMount
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

// call is one call of the plugin. It returns when the process dies.
func (v *vault) call(ctx context.Context, t *term, p *process, req *logical.Request) (*logical.Response, error) {
	type result struct {
		resp *logical.Response
		err  error
	}
	req.ID, req.Storage, req.MountPoint = fmt.Sprintf("req-%d", v.roll(1<<30)), view{p}, v.mountPoint()
	done := make(chan result, 1)
	began := time.Now()
	var gone atomic.Pointer[time.Time] // when the client went
	defer context.AfterFunc(ctx, func() { now := time.Now(); gone.Store(&now) })()
	t.busy.Add(1)
	p.asked(req)
	go func() {
		defer t.busy.Done()
		if req.Operation == logical.UpdateOperation {
			if checked, exists, err := p.b.HandleExistenceCheck(ctx, req); err == nil && checked && !exists {
				req.Operation = logical.CreateOperation
			}
		}
		resp, err := p.b.HandleRequest(ctx, req)
		v.w.bounded(fmt.Sprintf("%s: %s %s", p.name, req.Operation, req.Path), began, callBound)
		if at := gone.Load(); err == nil && req.Operation != logical.RenewOperation {
			v.w.ledger.answered(resp, at != nil && time.Since(*at) > 0)
		}
		done <- result{resp, err}
	}()
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
		v.rollback(t.ctx)
	}
}

// rollback is one RollbackOperation. Its errors are of no consequence.
func (v *vault) rollback(ctx context.Context) {
	t, p, err := v.serving()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, tickTimeout)
	defer cancel()
	_, _ = v.call(ctx, t, p, &logical.Request{Operation: logical.RollbackOperation, Path: ""})
}

// issue reads credentials of a role, and stores the lease.
func (v *vault) issue(ctx context.Context, role string, data map[string]any) (*lease, *logical.Response, error) {
	path := "creds/" + role
	v.mu.Lock()
	t := v.term
	v.mu.Unlock()
	resp, err := v.request(ctx, logical.ReadOperation, path, data)
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if err != nil {
		return nil, resp, err
	}
	if ctx.Err() != nil {
		return nil, resp, ctx.Err() // the client has gone: the answer is dropped, and nothing is revoked
	}
	if resp == nil || resp.Secret == nil {
		return nil, resp, errors.New("no secret")
	}
	now := v.now()
	l := &lease{role: role, path: path, issue: now, began: time.Now(), renewable: resp.Secret.Renewable, data: throughJSON(resp.Data)}
	l.secret = stored(resp.Secret)
	l.secret.IssueTime = now
	ttl, _, err := framework.CalculateTTL(&systemView{v: v, StaticSystemView: logical.StaticSystemView{DefaultLeaseTTLVal: 768 * time.Hour, MaxLeaseTTLVal: 768 * time.Hour}}, 0, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, now)
	if err != nil {
		return nil, resp, err
	}
	l.expire = now.Add(ttl)
	time.Sleep(time.Duration(1+v.roll(40)) * time.Millisecond) // the gap: Vault may die in it
	v.mu.Lock()
	alive := v.term == t && t != nil && t.ctx.Err() == nil
	l.id = fmt.Sprintf("%screds/%s/%d", v.path, role, v.dice.Int64())
	fails := v.w.Trouble && v.dice.IntN(300) == 0
	if alive && !fails {
		v.leases[l.id] = l
		v.schedule(t, l)
	}
	v.mu.Unlock()
	if !alive {
		v.w.tell(v.name, "dies before it has stored the lease of %s %s", l.account(), l.keyID())
		return nil, resp, errSealed
	}
	if fails { // Vault revokes at once, and forgets
		v.w.tell(v.name, "cannot store the lease of %s %s, and revokes", l.account(), l.keyID())
		v.note(l)
		_ = v.revokeCall(t.ctx, l)
		return nil, resp, errStorage
	}
	v.w.tell(v.name, "leases %s %s of role %s until %s", l.account(), l.keyID(), role, l.expire.UTC().Format(time.DateTime))
	v.w.ledger.leased(l)
	v.w.ledger.excuse(false, l.account(), l.keyID())
	return l, resp, nil
}

// schedule has a lease end at its time. The caller holds mu.
func (v *vault) schedule(t *term, l *lease) {
	wait := l.expire.Sub(time.Now().Add(v.offset))
	if l.irrevocable {
		wait = irrevocableTry
	}
	if l.timer != nil {
		l.timer.Stop()
	}
	l.timer = time.AfterFunc(max(wait, 0), func() { v.expire(t, l) })
}

// expire revokes a lease whose time is over: six tries, and one a day after that.
func (v *vault) expire(t *term, l *lease) {
	v.w.checkEnd(v, l)
	for attempt := 1; ; attempt++ {
		select {
		case t.slots <- struct{}{}:
		case <-t.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(t.ctx, revokeTimeout)
		err := v.revokeLease(ctx, l)
		cancel()
		<-t.slots
		if err == nil || t.ctx.Err() != nil {
			return
		}
		if attempt == revokeAttempts || l.irrevocable {
			v.mu.Lock()
			l.irrevocable = true
			if v.term == t {
				v.schedule(t, l)
			}
			v.mu.Unlock()
			v.w.tell(v.name, "lease %s of %s %s is irrevocable: %v", l.id, l.account(), l.keyID(), err)
			return
		}
		backoff := float64(revokeBackoff << attempt)
		wait := time.Duration(backoff * (0.5 + float64(v.roll(1000))/1000))
		select {
		case <-time.After(wait):
		case <-t.ctx.Done():
			return
		}
	}
}

// revokeLease revokes a lease once, and forgets it if that succeeds.
func (v *vault) revokeLease(ctx context.Context, l *lease) error {
	v.mu.Lock()
	if v.leases[l.id] != l {
		v.mu.Unlock()
		return nil
	}
	v.mu.Unlock()
	v.note(l)
	if err := v.revokeCall(ctx, l); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases[l.id] == l {
		delete(v.leases, l.id)
	}
	if l.timer != nil {
		l.timer.Stop()
	}
	return nil
}

// note says that a lease's end was asked for.
func (v *vault) note(l *lease) {
	v.mu.Lock()
	defer v.mu.Unlock()
	l.revoking = true
	v.ended[l.account()], v.ended[l.keyID()] = true, true
}

func (v *vault) revokeCall(ctx context.Context, l *lease) error {
	t, p, err := v.serving()
	if err != nil {
		return err
	}
	resp, err := v.call(ctx, t, p, &logical.Request{Operation: logical.RevokeOperation, Path: l.path, Secret: stored(l.secret), Data: throughJSON(l.data)})
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	return err
}

// lookup is the lease of an ID that still stands; nil for none.
func (v *vault) lookup(id string) *lease {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.leases[id]
}

// revoke ends a lease as `vault lease revoke` does: in the background.
func (v *vault) revoke(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l := v.leases[id]; l != nil && v.term != nil && !l.revoking {
		l.expire = time.Now().Add(v.offset)
		v.schedule(v.term, l)
	}
}

// revokePrefix is a revocation of all leases: one after the other until one fails, or
// all of them in the background, or by force.
func (v *vault) revokePrefix(ctx context.Context, force bool) error {
	v.mu.Lock()
	all := make([]*lease, 0, len(v.leases))
	for _, l := range v.leases {
		all = append(all, l)
	}
	v.mu.Unlock()
	slices.SortFunc(all, func(a, b *lease) int { return bytes.Compare([]byte(a.id), []byte(b.id)) })
	for _, l := range all {
		err := v.revokeLease(ctx, l)
		if err != nil && !force {
			return fmt.Errorf("failed to revoke %q: %w", l.id, err)
		}
		if err != nil { // forgotten all the same
			v.w.tell(v.name, "forgets lease %s of %s %s by force", l.id, l.account(), l.keyID())
			v.w.ledger.excuse(true, l.account(), l.keyID())
			v.mu.Lock()
			l.timer.Stop()
			delete(v.leases, l.id)
			v.mu.Unlock()
		}
	}
	return nil
}

// renew renews a lease for increment.
func (v *vault) renew(ctx context.Context, id string, increment time.Duration) error {
	t, p, err := v.serving()
	if err != nil {
		return err
	}
	v.mu.Lock()
	l := v.leases[id]
	if l == nil || l.revoking || v.tainted.Load() || !time.Now().Add(v.offset).Before(l.expire) {
		v.mu.Unlock()
		return errors.New("lease not found or not renewable")
	}
	secret := stored(l.secret)
	v.mu.Unlock()
	secret.Increment, secret.IssueTime = increment, l.issue
	ctx, cancel := t.under(ctx)
	defer cancel()
	resp, err := v.call(ctx, t, p, &logical.Request{Operation: logical.RenewOperation, Path: l.path, Secret: secret, Data: throughJSON(l.data)})
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if err != nil {
		return err
	}
	if resp == nil || resp.Secret == nil {
		return nil
	}
	ttl, _, err := framework.CalculateTTL(&systemView{v: v, StaticSystemView: logical.StaticSystemView{DefaultLeaseTTLVal: 768 * time.Hour, MaxLeaseTTLVal: 768 * time.Hour}}, increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, l.issue)
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases[id] != l || l.revoking || v.term != t {
		return errors.New("lease not found")
	}
	l.secret, l.data = stored(resp.Secret), throughJSON(resp.Data)
	l.expire = time.Now().Add(v.offset).Add(ttl)
	v.schedule(t, l)
	return nil
}

// change waits for its turn to change the mount.
func (v *vault) change() (done func()) {
	v.changing <- struct{}{}
	return func() { <-v.changing }
}

// goesOn reports whether a term has not ended.
func (v *vault) goesOn(t *term) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.term == t && t.ctx.Err() == nil
}

// disable unmounts: taint, one rollback, the leases one by one, the mount is unloaded,
// its storage wiped. A failure leaves it tainted.
func (v *vault) disable() error {
	defer v.change()()
	t, _, err := v.serving()
	if err != nil {
		return err
	}
	v.w.tell(v.name, "disables the mount")
	v.tainted.Store(true)
	v.rollback(t.ctx)
	if err := v.revokePrefix(t.ctx, false); err != nil {
		v.w.tell(v.name, "cannot disable the mount: %v", err)
		return err
	}
	_, p, err := v.serving()
	if err != nil || !v.goesOn(t) {
		return errSealed
	}
	v.mu.Lock()
	v.mounted = false
	v.mu.Unlock()
	p.unload()
	v.mu.Lock()
	defer v.mu.Unlock()
	t.p = nil
	v.store = &logical.InmemStorage{}
	return nil
}

// enable mounts a new engine.
func (v *vault) enable() {
	defer v.change()()
	v.mu.Lock()
	t := v.term
	v.mu.Unlock()
	if t == nil {
		return
	}
	v.tainted.Store(false)
	v.mount.Add(1)
	p := v.spawn(fmt.Sprintf("%s/new%d", v.name, v.roll(1<<20)))
	v.mu.Lock()
	defer v.mu.Unlock()
	t.p, v.mounted = p, true
}

// move moves the mount. All leases end, and the plugin lives on with its storage. If
// it fails at a lease, or at Vault itself after that, the mount stays where it was,
// and tainted.
func (v *vault) move(to string, fails bool) error {
	defer v.change()()
	t, _, err := v.serving()
	if err != nil {
		return err
	}
	v.w.tell(v.name, "moves the mount to %s", to)
	v.tainted.Store(true)
	v.rollback(t.ctx)
	if err := v.revokePrefix(t.ctx, false); err != nil {
		v.w.tell(v.name, "cannot move the mount: %v", err)
		return err
	}
	if fails || !v.goesOn(t) {
		v.w.tell(v.name, "cannot move the mount: its storage fails")
		return errStorage
	}
	v.mu.Lock()
	v.path = to
	v.mu.Unlock()
	v.tainted.Store(false)
	return nil
}

// reload replaces the plugin's process; an upgrade is the same to it.
func (v *vault) reload() {
	defer v.change()()
	_, p, err := v.serving()
	if err != nil {
		return
	}
	v.w.tell(v.name, "reloads the plugin")
	p.unload()
	_, _, _ = v.serving() // which starts the next
}

// seal and unseal, crash, and a step-down to another node, after which the old one
// believes for a while that it is active.
func (v *vault) restart(crash bool, pause time.Duration) {
	v.powering <- struct{}{}
	defer func() { <-v.powering }()
	if crash {
		v.w.tell(v.name, "is killed")
	} else {
		v.w.tell(v.name, "is sealed")
	}
	v.moved.Add(1)
	v.stop(!crash)
	time.Sleep(pause)
	v.w.tell(v.name, "is unsealed")
	v.start()
}

func (v *vault) stepDown(overlap time.Duration) {
	v.powering <- struct{}{}
	defer func() { <-v.powering }()
	t, p, err := v.serving()
	if err != nil {
		return
	}
	v.w.tell(v.name, "steps down, and %s goes on for %s", p.name, overlap)
	v.moved.Add(1)
	if overlap == 0 {
		v.stop(true)
		v.start()
		return
	}
	v.mu.Lock()
	for _, l := range v.leases {
		l.timer.Stop()
	}
	v.term = nil
	v.mu.Unlock()
	t.ends.Store(true)
	p.deposed.Store(true)
	v.start()
	time.Sleep(overlap)
	t.cancel()
	p.unload()
}

// snapshot is a copy of all that Vault stores.
type snapshot struct {
	store  *logical.InmemStorage
	leases map[string]lease
	path   string
	at     time.Time
	mount  int64
	taint  bool
}

func (v *vault) snapshot() *snapshot {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := &snapshot{store: &logical.InmemStorage{}, leases: map[string]lease{}, path: v.path, at: time.Now(), taint: v.tainted.Load(), mount: v.mount.Load()}
	ctx := context.Background()
	_ = logical.ScanView(ctx, v.store, func(key string) { // in memory, nothing fails
		if entry, err := v.store.Get(ctx, key); err == nil && entry != nil {
			_ = s.store.Put(ctx, entry)
		}
	})
	for id, l := range v.leases {
		s.leases[id] = *l
	}
	return s
}

// restore puts a snapshot in place; the Vault is sealed meanwhile.
func (v *vault) restore(s *snapshot) {
	v.powering <- struct{}{}
	defer func() { <-v.powering }()
	v.w.tell(v.name, "is restored from a snapshot of %s ago", time.Since(s.at).Round(time.Second))
	v.stop(false)
	v.load(s)
	v.start()
}

func (v *vault) load(s *snapshot) {
	v.moved.Add(1)
	v.loads.Add(1)
	defer v.excuseLost()
	v.mu.Lock()
	defer v.mu.Unlock()
	// From storage again, since it may be restored twice.
	v.store, v.leases, v.path, v.mounted = &logical.InmemStorage{}, map[string]*lease{}, s.path, true
	v.tainted.Store(s.taint)
	ctx := context.Background()
	_ = logical.ScanView(ctx, s.store, func(key string) {
		if entry, err := s.store.Get(ctx, key); err == nil && entry != nil {
			_ = v.store.Put(ctx, entry)
		}
	})
	for id, l := range s.leases {
		copied := l
		copied.timer, copied.revoking = nil, false
		v.leases[id] = &copied
	}
}

// end stops the Vault for good, and waits for nothing that could go on.
func (v *vault) end() {
	v.stop(false)
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, p := range v.processes {
		if !p.dead.Load() {
			p.kill()
			go p.b.Cleanup(context.Background())
		}
	}
}

// stored is a lease's secret after a trip through Vault's storage.
func stored(s *logical.Secret) *logical.Secret {
	copied := *s
	copied.InternalData = throughJSON(s.InternalData)
	return &copied
}

// throughJSON is what data looks like after a trip through storage or the wire.
func throughJSON(data map[string]any) map[string]any {
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
