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
	"cmp"
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

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
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
	cutShort  bool  // the process died while its mount was disabled
	term      *term // nil while sealed
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
}

// lease is an entry of the lease store.
type lease struct {
	id, role      string
	path          string
	secret        *logical.Secret
	data, issued  map[string]any
	issue, expire time.Time // by this Vault's clock
	asked, began  time.Time // by the world's: before and after the request
	renewable     bool
	token         *token
	attempts      int           // to revoke it, in this term
	lock          chan struct{} // one slot, as Vault has a lock for each lease
	revoking      bool          // its end was asked for, or its time is over
	irrevocable   bool
	timer         *time.Timer
}

// token is a client's, of which leases are.
type token struct {
	batch bool
	ends  time.Time
}

// token makes a token. Leases end with it: those of a batch token have no longer time,
// those of others are revoked (expiration.go, RevokeByToken).
func (v *vault) token(batch bool, ttl time.Duration) *token {
	made := &token{batch: batch, ends: v.now().Add(ttl)}
	if !batch {
		time.AfterFunc(ttl, func() { v.revokeWhere(func(l *lease) bool { return l.token == made }) })
	}
	return made
}

// account, keyID and key are what the lease was issued with; renewals replace data.
func (l *lease) account() string { id, _ := l.issued["service_account_id"].(string); return id }
func (l *lease) keyID() string   { id, _ := l.issued["api_key_id"].(string); return id }
func (l *lease) key() string     { key, _ := l.issued["api_key"].(string); return key }

// endOf is when the lease ends by this Vault's clock.
func (v *vault) endOf(l *lease) time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return l.expire
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
	t := &term{ctx: ctx, cancel: cancel, slots: make(chan struct{}, revokeWorkers)}
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
	if t, p, err = v.respawn(t, p); err != nil {
		return nil, err
	}
	return v.send(ctx, t, p, &again)
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
func (v *vault) issue(ctx context.Context, role string) (*lease, *logical.Response, error) {
	return v.issueBy(ctx, nil, role, nil)
}

// issueBy issues to a token, with which the lease ends.
func (v *vault) issueBy(ctx context.Context, by *token, role string, data map[string]any) (*lease, *logical.Response, error) {
	path := "creds/" + role
	v.mu.Lock()
	t := v.term
	v.mu.Unlock()
	asked, maxAge := time.Now(), v.maxAge(role)
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
	l := &lease{role: role, path: path, token: by, lock: make(chan struct{}, 1), issue: now, asked: asked, began: time.Now(), renewable: resp.Secret.Renewable, data: throughJSON(resp.Data)}
	l.issued = l.data
	l.secret = stored(resp.Secret)
	l.secret.IssueTime = v.real(now)
	ttl, _, err := framework.CalculateTTL(v.system(), 0, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, v.real(now))
	if err != nil {
		return nil, resp, err
	}
	l.expire = l.until(now.Add(ttl))
	if v.w.Trouble && v.roll(100) == 0 { // in the gap, of which nobody knows
		v.w.act(func() { v.restart(true, time.Minute) })
	}
	time.Sleep(time.Duration(1+v.roll(40)) * time.Millisecond)
	v.mu.Lock()
	alive := v.term == t && t != nil && t.ctx.Err() == nil
	l.id = fmt.Sprintf("%screds/%s/%d", v.path, role, v.dice.Int64())
	fails, kept := v.w.Trouble && v.dice.IntN(60) == 0, v.dice.IntN(3) == 0
	if alive && (!fails || kept) {
		v.leases[l.id] = l
		v.schedule(t, l)
	}
	v.mu.Unlock()
	if !alive {
		v.w.tell(v.name, "dies before it has stored the lease of %s %s", l.account(), l.keyID())
		return nil, resp, errSealed
	}
	// Vault revokes at once, once, and forgets (expiration.go, Register). If its storage
	// has failed after the effect, and again as it deletes the entry, the lease is there
	// again after a restart.
	if fails {
		v.w.tell(v.name, "cannot store the lease of %s %s, and revokes", l.account(), l.keyID())
		v.note(l)
		calm := v.w.openai.weather.storesWell()
		err := v.revokeCall(t.ctx, l)
		v.w.tell(v.name, "has revoked %s %s: %v", l.account(), l.keyID(), err)
		if calm && !errors.Is(err, errDied) && !errors.Is(err, errSealed) && !errors.Is(err, errNoMount) { // the plugin knows
			v.w.ledger.excuse(false, l.account(), l.keyID())
		}
		return nil, resp, errStorage
	}
	v.w.tell(v.name, "leases %s %s of role %s until %s", l.account(), l.keyID(), role, v.endOf(l).UTC().Format(time.DateTime))
	v.w.ledger.leased(l)
	v.w.money.doom(v, l)
	if v == v.w.vault {
		v.w.checkScopes(role, l.keyID(), l.began)
		v.w.checkAge(l, maxAge)
	}
	v.w.ledger.excuse(false, l.account(), l.keyID())
	return l, resp, nil
}

// system is what a Community Vault says of itself and of the mount.
func (v *vault) system() *systemView {
	return &systemView{v: v, StaticSystemView: logical.StaticSystemView{
		DefaultLeaseTTLVal:  768 * time.Hour,
		ReplicationStateVal: consts.ReplicationPerformanceDisabled | consts.ReplicationDRDisabled,
		PluginEnvironment:   &logical.PluginEnvironment{VaultVersion: "1.21.2"},
	}}
}

// schedule has a lease end at its time. The caller holds mu.
func (v *vault) schedule(t *term, l *lease) {
	wait := l.expire.Sub(time.Now().Add(v.offset))
	if l.irrevocable {
		wait = irrevocableTry
	}
	v.expireIn(t, l, wait)
}

func (v *vault) expireIn(t *term, l *lease, wait time.Duration) {
	if l.timer != nil {
		l.timer.Stop()
	}
	l.timer = time.AfterFunc(max(wait, 0), func() { v.expire(t, l) })
}

// until is when a lease ends that would end at t: with its batch token at the latest
// (expiration.go, Register and Renew).
func (l *lease) until(t time.Time) time.Time {
	if l.token != nil && l.token.batch && t.After(l.token.ends) {
		return l.token.ends
	}
	return t
}

// expire revokes a lease whose time is over: six tries in a term, and one a day after
// that; or after one, if the plugin says that others are of no use.
func (v *vault) expire(t *term, l *lease) {
	v.w.checkEnd(v, l)
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
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.term != t || v.leases[l.id] != l {
		return
	}
	l.attempts++
	if l.attempts < revokeAttempts && !l.irrevocable && !unrecoverable(err) {
		backoff := float64(revokeBackoff << l.attempts)
		v.expireIn(t, l, time.Duration(backoff*(0.5+v.dice.Float64())))
		return
	}
	l.irrevocable = true
	v.schedule(t, l)
	v.w.tell(v.name, "lease %s of %s %s is irrevocable: %v", l.id, l.account(), l.keyID(), err)
}

// unrecoverable reports whether Vault gives up at once (expiration.go,
// errIsUnrecoverable). Over the plugin protocol only the errors themselves arrive as
// what they are, not what wraps them (sdk/plugin/pb/translation.go).
func unrecoverable(err error) bool {
	return err == logical.ErrUnrecoverable || err == logical.ErrUnsupportedOperation || //nolint:errorlint // see above
		err == logical.ErrUnsupportedPath || err == logical.ErrInvalidRequest //nolint:errorlint // see above
}

// revokeLease revokes a lease once, and forgets it if that succeeds.
func (v *vault) revokeLease(ctx context.Context, l *lease) error {
	select { // one at a time: expiration.go, revokeCommon
	case l.lock <- struct{}{}:
		defer func() { <-l.lock }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if v.lookup(l.id) != l {
		return nil
	}
	v.note(l)
	if err := v.revokeCall(ctx, l); err != nil {
		return err
	}
	v.forget(l)
	return nil
}

// drop forgets a lease although nobody has ended its key.
func (v *vault) drop(l *lease) {
	v.w.tell(v.name, "forgets lease %s of %s %s by force", l.id, l.account(), l.keyID())
	v.w.ledger.excuse(true, l.account(), l.keyID())
	v.forget(l)
}

// forget deletes a lease from the lease store.
func (v *vault) forget(l *lease) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases[l.id] == l {
		delete(v.leases, l.id)
	}
	if l.timer != nil {
		l.timer.Stop()
	}
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
	v.mu.Lock()
	secret, data := l.secret, l.data // which are replaced, and not changed
	v.mu.Unlock()
	resp, err := v.call(ctx, t, p, &logical.Request{Operation: logical.RevokeOperation, Path: l.path, Secret: stored(secret), Data: throughJSON(data)})
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

// revoke ends a lease as `vault lease revoke` does: in the background, and at once also
// if an attempt has failed; but one that is irrevocable stays so (expiration.go,
// lazyRevokeInternal and updatePending).
func (v *vault) revoke(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l := v.leases[id]; l != nil && v.term != nil && v.mounted && !l.irrevocable {
		l.expire = time.Now().Add(v.offset)
		v.schedule(v.term, l)
	}
}

// revokeNow is `vault lease revoke -sync`: one attempt in the client's request.
func (v *vault) revokeNow(id string) error {
	if l := v.lookup(id); l != nil {
		return v.revokeLease(context.Background(), l)
	}
	return nil
}

// revokeWhere ends leases in the background.
func (v *vault) revokeWhere(which func(*lease) bool) {
	for _, id := range v.leaseIDs() {
		if l := v.lookup(id); l != nil && which(l) {
			v.revoke(id)
		}
	}
}

// revokePrefix revokes all leases, one after the other until one fails, or by force.
func (v *vault) revokePrefix(ctx context.Context, force bool) error {
	return v.revokeRole(ctx, "", force)
}

// revokeRole does so with the leases of a role, or of all. Folders come in the reverse
// order (sdk/logical/storage.go, ScanView).
func (v *vault) revokeRole(ctx context.Context, role string, force bool) error {
	v.mu.Lock()
	var all []*lease
	for _, l := range v.leases {
		if role == "" || l.role == role {
			all = append(all, l)
		}
	}
	v.mu.Unlock()
	slices.SortFunc(all, func(a, b *lease) int { return cmp.Or(cmp.Compare(b.role, a.role), cmp.Compare(a.id, b.id)) })
	for _, l := range all {
		err := v.revokeLease(ctx, l)
		if err != nil && !force {
			return fmt.Errorf("failed to revoke %q: %w", l.id, err)
		}
		if err != nil { // forgotten all the same
			v.drop(l)
		}
	}
	return nil
}

// renew renews a lease for increment.
func (v *vault) renew(ctx context.Context, id string, increment time.Duration) error {
	l := v.lookup(id)
	if l == nil {
		return errors.New("lease not found")
	}
	select { // expiration.go, Renew
	case l.lock <- struct{}{}:
		defer func() { <-l.lock }()
	case <-ctx.Done():
		return ctx.Err()
	}
	v.mu.Lock()
	// A revocation that has failed in a client's request leaves the lease as it was.
	if v.leases[id] != l || l.irrevocable || v.tainted.Load() || !time.Now().Add(v.offset).Before(l.expire) {
		v.mu.Unlock()
		return errors.New("lease not found or not renewable")
	}
	secret, data := stored(l.secret), l.data
	v.mu.Unlock()
	t, p, err := v.serving()
	if err != nil {
		return err
	}
	secret.Increment, secret.IssueTime = increment, v.real(l.issue)
	ctx, cancel := t.under(ctx)
	defer cancel()
	resp, err := v.call(ctx, t, p, &logical.Request{Operation: logical.RenewOperation, Path: l.path, Secret: secret, Data: throughJSON(data)})
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if err != nil {
		return err
	}
	if resp == nil || resp.Secret == nil {
		return nil
	}
	ttl, _, err := framework.CalculateTTL(v.system(), increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, v.real(l.issue))
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases[id] != l || v.term != t {
		return errors.New("lease not found")
	}
	l.secret, l.data = stored(resp.Secret), throughJSON(resp.Data)
	l.expire = l.until(time.Now().Add(v.offset).Add(ttl))
	v.schedule(t, l)
	return nil
}

// change waits for its turn to change the mount.
func (v *vault) change() (done func()) {
	v.changing <- struct{}{}
	return func() { <-v.changing }
}

// power waits for its turn to change the active node.
func (v *vault) power() (done func()) {
	v.powering <- struct{}{}
	return func() { <-v.powering }
}

// goesOn reports whether a term has not ended.
func (v *vault) goesOn(t *term) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.term == t && t.ctx.Err() == nil
}

// disable unmounts: after the taint the mount is unloaded, and its storage wiped. A process that has died is first
// replaced by the rollback, and so begins with the taint.
func (v *vault) disable() error {
	defer v.change()()
	t, _, err := v.active()
	if err != nil {
		return err
	}
	if err := v.taint(t, "disables the mount"); err != nil {
		return err
	}
	_, p, err := v.active()
	if err != nil || !v.goesOn(t) {
		return errSealed
	}
	v.mu.Lock()
	v.mounted = false
	v.mu.Unlock()
	whole := p.unload()
	v.mu.Lock()
	defer v.mu.Unlock()
	t.p, v.cutShort = nil, !whole
	v.store = &logical.InmemStorage{}
	return nil
}

// taint begins a disable or a move: the taint, one rollback, the leases one by one. A
// failure leaves the mount tainted.
func (v *vault) taint(t *term, what string) error {
	v.w.tell(v.name, "%s", what)
	v.tainted.Store(true)
	v.rollback(t.ctx)
	err := v.revokePrefix(t.ctx, false)
	if err != nil {
		v.w.tell(v.name, "has failed, and leaves the taint: %v", err)
	}
	return err
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
	p := v.spawnNext()
	v.mu.Lock()
	defer v.mu.Unlock()
	t.p, v.mounted = p, true
}

// move moves the mount. All leases end, and the plugin lives on with its storage. If
// it fails at a lease, or at Vault itself after that, the mount stays where it was,
// and tainted.
func (v *vault) move(to string, fails bool) error {
	defer v.change()()
	t, _, err := v.active()
	if err != nil {
		return err
	}
	if err := v.taint(t, "moves the mount to "+to); err != nil {
		return err
	}
	if fails || !v.goesOn(t) {
		v.w.tell(v.name, "cannot move the mount: its storage fails")
		// Nothing tells the engine from a disable what is unloaded within a minute of
		// the last revoke (unmountPause), so the node does not change for that long.
		select {
		case v.powering <- struct{}{}:
			time.Sleep(61 * time.Second)
			<-v.powering
		default: // it does already
		}
		return errStorage
	}
	v.mu.Lock()
	v.path = to
	v.mu.Unlock()
	v.w.openai.weather.set(func(*weather) {}) // the taint has kept the engine from its work
	v.tainted.Store(false)
	return nil
}

// reload replaces the plugin's process; an upgrade is the same to it.
func (v *vault) reload() {
	defer v.change()()
	t, p, err := v.active()
	if err != nil {
		return
	}
	v.w.tell(v.name, "reloads the plugin")
	p.unload()
	_, _, _ = v.respawn(t, p) // what does not initialize, serves all the same
}

// seal and unseal, crash, and a step-down to another node, after which the old one
// believes for a while that it is active.
func (v *vault) restart(crash bool, pause time.Duration) {
	defer v.power()()
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

// sealNamespace seals the mount's namespace, as OpenBao does, and unseals it: the mount is
// tainted in memory, rolled back and unloaded, and its leases and storage stay
// (openbao vault/namespace_store.go, clearNamespaceResources; vault/mount.go,
// unmountInternal).
func (v *vault) sealNamespace(pause time.Duration) {
	defer v.change()()
	defer v.power()()
	t, _, err := v.active()
	if err != nil || v.tainted.Load() {
		return
	}
	v.w.tell(v.name, "seals the namespace for %s", pause)
	v.sealing.Store(true)
	v.tainted.Store(true)
	v.rollback(t.ctx)
	_, p, err := v.active()
	v.mu.Lock()
	v.mounted = false
	for _, l := range v.leases {
		l.timer.Stop()
	}
	v.mu.Unlock()
	if err == nil {
		p.unload()
	}
	time.Sleep(pause)
	v.w.tell(v.name, "unseals the namespace")
	v.sealing.Store(false)
	v.tainted.Store(false)
	next := v.spawnNext()
	v.mu.Lock()
	defer v.mu.Unlock()
	t.p, v.mounted = next, true
	v.scheduleAll(t)
}

// ends reports whether the mount's end has begun.
func (v *vault) ends() bool { return v.tainted.Load() && !v.sealing.Load() }

func (v *vault) stepDown(overlap time.Duration) {
	defer v.power()()
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
	p.deposed.Store(&deposed{clone(v.store), v.offset})
	skew := time.Duration(v.dice.Int64N(int64(2*nodeSkew))) - nodeSkew
	by := skew - v.skew
	v.skew = skew
	v.mu.Unlock()
	v.setClock(by)
	t.ends.Store(true)
	v.start()
	v.lastRequests(t, p, overlap)
	t.cancel()
	p.unload()
}

// lastRequests is what a node does that does not know yet that it is not active any more:
// Vault's own work, and that of clients which have not been sent away.
func (v *vault) lastRequests(t *term, p *process, lasts time.Duration) {
	send := func(op logical.Operation, path string, l *lease) {
		req := &logical.Request{Operation: op, Path: path, ID: fmt.Sprintf("req-%d", v.roll(1<<30)), MountPoint: v.mountPoint(), DisplayName: "userpass-alice"}
		ctx, cancel := context.WithTimeout(t.ctx, revokeTimeout)
		defer cancel()
		before := false
		if l != nil {
			v.mu.Lock()
			before = l.revoking
			req.Secret, req.Data = stored(l.secret), throughJSON(l.data)
			v.mu.Unlock()
			v.note(l)
		}
		resp, err := v.send(ctx, t, p, req)
		if l != nil && (err != nil || resp.IsError()) { // the lease lives on
			v.mu.Lock()
			l.revoking = before
			v.mu.Unlock()
		}
		if op == logical.ReadOperation && err == nil && resp != nil && !resp.IsError() && resp.Secret == nil {
			v.w.checkStatic(v, "made", resp.Data)
		}
		v.w.tell(v.name, "whose node is not active any more, has asked for %s %s: %v", op, path, err)
	}
	// Its storage is the node's own copy, and a write needs the cluster
	// (physical/raft/raft.go, Get and applyLog); a request may last until the drain's end
	// (ha.go, "Stop Active Duty").
	for end := time.Now().Add(lasts); time.Now().Before(end); time.Sleep(time.Duration(v.roll(int(10 * time.Second)))) {
		switch v.roll(4) {
		case 0:
			go send(logical.RollbackOperation, "", nil)
		case 1:
			go send(logical.ReadOperation, "creds/app", nil)
		case 2:
			go send(logical.ReadOperation, "static-creds/made", nil)
		case 3: // which ends now, or whose client asks for that; the other node keeps it
			if ids := v.leaseIDs(); len(ids) > 0 {
				if l := v.lookup(ids[v.roll(len(ids))]); l != nil {
					go send(logical.RevokeOperation, l.path, l)
				}
			}
		}
	}
}

// clone is a copy of a storage.
func clone(store *logical.InmemStorage) *logical.InmemStorage {
	ctx, copied := context.Background(), &logical.InmemStorage{}
	_ = logical.ScanView(ctx, store, func(key string) { // in memory, nothing fails
		if entry, err := store.Get(ctx, key); err == nil && entry != nil {
			_ = copied.Put(ctx, entry)
		}
	})
	return copied
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
	s := &snapshot{store: clone(v.store), leases: map[string]lease{}, path: v.path, at: time.Now(), taint: v.tainted.Load(), mount: v.mount.Load()}
	for id, l := range v.leases {
		s.leases[id] = *l
	}
	return s
}

// restore puts a snapshot in place. Meanwhile the mount is unloaded as by sealing
// (logical_system_raft.go, handleStorageRaftSnapshotWrite).
func (v *vault) restore(s *snapshot) {
	defer v.power()()
	v.w.tell(v.name, "is restored from a snapshot of %s ago", time.Since(s.at).Round(time.Second))
	v.stop(true)
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
	v.store, v.leases, v.path, v.mounted = clone(s.store), map[string]*lease{}, s.path, true
	v.tainted.Store(s.taint)
	for id, l := range s.leases {
		copied := l
		copied.timer, copied.revoking, copied.lock = nil, false, make(chan struct{}, 1)
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
