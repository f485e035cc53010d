package simulation

// This file owns what happens to the model's mount, node and storage: disable, move,
// reload, seal, step-down, snapshot and restore.

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

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
	wiped := v.adminKeyID()
	v.mu.Lock()
	defer v.mu.Unlock()
	t.p, v.cutShort, v.wiped = nil, !whole, wiped
	v.store = &logical.InmemStorage{}
	return nil
}

// taint begins a disable or a move: the taint, one rollback, the leases one by one. A
// failure leaves the mount tainted.
func (v *vault) taint(t *term, what string) error {
	if v.w.Trouble && v.roll(3) == 0 { // while a periodic rollback is in flight
		v.mu.Lock()
		next := t.lastTick.Add(tickEvery)
		v.mu.Unlock()
		time.Sleep(time.Until(next) + time.Duration(v.roll(20))*time.Millisecond)
		if !v.goesOn(t) {
			return errSealed
		}
	}
	v.w.tell(v.name, "%s", what)
	v.tainted.Store(true)
	v.waited.Store(v.rollback(t))
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
	v.rollback(t)
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
	p.deposed.Store(&deposed{clone(v.store), v.offset, v.tainted.Load()})
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
		if l != nil {
			v.mu.Lock()
			if l.revoking { // by another of these requests, whose failure is to end that
				v.mu.Unlock()
				return
			}
			l.revoking = true
			req.Secret, req.Data = stored(l.secret), throughJSON(l.data)
			v.mu.Unlock()
			v.note(l)
		}
		resp, err := v.send(ctx, t, p, req)
		if l != nil && (err != nil || resp.IsError()) { // the lease lives on
			v.mu.Lock()
			l.revoking = false
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
