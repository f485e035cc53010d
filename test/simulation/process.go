package simulation

// This file owns a plugin process: its storage, its connections and its clock.
//
// What must stay true: a process that was killed has no effect from then on,
// neither on storage nor at OpenAI; its goroutines may run on until they notice.

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"

	openaisecrets "vault-plugin-secrets-openai"
)

var (
	errDied     = errors.New("rpc error: code = Unavailable desc = error reading from server: EOF")
	errStorage  = errors.New("storage does not answer")
	errReadOnly = errors.New("node is not the leader")
	// errCommunity is how Community answers RegisterRotationJob (facts, section 3).
	errCommunity = errors.New("rpc error: code = Internal desc = error registering rotation job: rotation manager capabilities not supported in Vault community edition")
)

// process is a plugin process that serves the mount of one Vault node.
type process struct {
	w       *world
	v       *vault
	name    string
	began   time.Time
	b       logical.Backend
	store   *logical.InmemStorage
	dead    atomic.Bool
	died    chan struct{}
	broken  error // what Initialize has said
	unloads atomic.Bool
	deposed atomic.Bool // another node is active: writes fail
	log     logBuffer

	mu    sync.Mutex
	end   time.Time // when it died
	dice  *rand.Rand
	conns map[net.Conn]struct{}
	// killAt counts the storage operations and calls until it is killed; 0 = not.
	killAt int
	// failAt counts the writes of storage until one fails; 0 = none.
	failAt    int
	failAfter bool // its effect
	// doubt is the WAL entry whose deletion had an effect and has failed last.
	doubt   string
	doubted time.Time
	load    load
}

// spawn starts a process on the Vault's storage, as Vault does when a mount is
// first used, and after its process has died.
func (v *vault) spawn(name string) *process {
	p := &process{w: v.w, v: v, name: name, began: time.Now(), store: v.store, died: make(chan struct{}), conns: map[net.Conn]struct{}{}, dice: v.w.dice(name)}
	p.log.p = p
	ctx := context.Background()
	factory := openaisecrets.World{Now: v.now, Dial: p.dial}.Factory
	if v.plugin != nil {
		factory = v.plugin(p)
	}
	b, err := factory(ctx, &logical.BackendConfig{
		System:      v.system(),
		StorageView: view{p},
		Logger:      hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: &p.log, DisableTime: true}),
	})
	if err != nil {
		panic(err) // nothing in this world makes it fail
	}
	p.b = b
	if err := b.Initialize(ctx, &logical.InitializationRequest{Storage: view{p}}); err != nil {
		v.w.tell(name, "does not initialize: %v", err)
		p.broken = err
	}
	v.w.tell(name, "starts")
	v.mu.Lock()
	v.processes = append(v.processes, p)
	v.mu.Unlock()
	return p
}

// kill ends the process right now.
func (p *process) kill() {
	p.mu.Lock()
	if p.dead.Swap(true) {
		p.mu.Unlock()
		return
	}
	p.end = time.Now()
	close(p.died)
	if p.doubt != "" && time.Since(p.doubted) < 5*time.Second {
		p.w.ledger.excuseNamed(p.doubt)
	}
	for conn := range p.conns {
		_ = conn.Close() // net.Pipe's never fails
	}
	p.mu.Unlock()
	p.w.tell(p.name, "is killed")
}

func (p *process) diedAt() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.end
}

// unload is Vault's Cleanup of a mount that it unloads.
func (p *process) unload() {
	if p.unloads.Swap(true) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	began := time.Now()
	p.b.Cleanup(ctx)
	p.w.bounded(p.name+": Cleanup", began, unloadBound)
	p.kill() // what is left of it has no effect
}

// mayDie kills the process if its time has come, at a storage operation or a call.
func (p *process) mayDie() {
	p.mu.Lock()
	dies := false
	if p.killAt > 0 {
		p.killAt--
		dies = p.killAt == 0
	}
	p.mu.Unlock()
	if dies {
		p.kill()
	}
}

// failing has a write fail if its time has come.
func (p *process) failing(f *storageFault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failAt > 0 {
		if p.failAt--; p.failAt == 0 {
			f.before, f.after = !p.failAfter, p.failAfter
		}
	}
}

// chance reports whether something happens that happens once in n times.
func (p *process) chance(n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dice.IntN(n) == 0
}

// dial connects the process with OpenAI.
func (p *process) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead.Load() {
		return nil, errDied
	}
	near, far := net.Pipe()
	p.conns[near] = struct{}{}
	select {
	case p.w.openai.accepted <- &conn{Conn: far, p: p}:
		return &conn{Conn: near, p: p, near: true}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// conn is an end of a connection. It knows whose it is.
type conn struct {
	net.Conn
	p    *process
	near bool
}

func (c *conn) Close() error {
	if c.near {
		c.p.mu.Lock()
		delete(c.p.conns, c.Conn)
		c.p.mu.Unlock()
	}
	return c.Conn.Close()
}

// view is the storage as a process sees it.
type view struct{ p *process }

// step runs one operation, under this world's faults.
func (s view) step(ctx context.Context, write bool, key string, do func() error) error {
	p := s.p
	p.operated()
	p.mayDie()
	if p.dead.Load() {
		return errDied
	}
	if err := ctx.Err(); err != nil {
		return err // as over Vault's plugin protocol
	}
	if write && p.deposed.Load() {
		return errReadOnly
	}
	faults := p.w.openai.weather.storage(p)
	if write {
		p.failing(&faults)
	}
	if faults.slow > 0 {
		time.Sleep(faults.slow)
		if p.dead.Load() {
			return errDied
		}
	}
	if faults.before {
		p.w.tell(p.name, "storage fails before %s (write %t)", key, write)
		return errStorage
	}
	if err := do(); err != nil {
		return err
	}
	if p.mayDie(); p.dead.Load() {
		return errDied
	}
	if faults.after {
		p.w.tell(p.name, "storage fails after %s (write %t)", key, write)
		return errStorage
	}
	return nil
}

func (s view) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.step(ctx, true, entry.Key, func() error {
		s.p.replaced(entry)
		return s.p.store.Put(ctx, entry)
	})
}

func (s view) Delete(ctx context.Context, key string) error {
	deleted := ""
	err := s.step(ctx, true, key, func() error {
		if entry, _ := s.p.store.Get(ctx, key); entry != nil && strings.HasPrefix(key, "wal/") { // in memory, nothing fails
			deleted = string(entry.Value)
		}
		return s.p.store.Delete(ctx, key)
	})
	if deleted != "" && err != nil { // what the entry names must be noted again first
		s.p.mu.Lock()
		s.p.doubt, s.p.doubted = deleted, time.Now()
		s.p.mu.Unlock()
	}
	if deleted != "" && s.p.dead.Load() {
		s.p.w.ledger.excuseNamed(deleted)
	}
	return err
}

func (s view) Get(ctx context.Context, key string) (entry *logical.StorageEntry, err error) {
	err = s.step(ctx, false, key, func() (err error) { entry, err = s.p.store.Get(ctx, key); return err })
	if err != nil {
		return nil, err
	}
	return entry, nil
}

func (s view) List(ctx context.Context, prefix string) (keys []string, err error) {
	err = s.step(ctx, false, prefix, func() (err error) { keys, err = s.p.store.List(ctx, prefix); return err })
	if err != nil {
		return nil, err
	}
	return keys, nil
}

// systemView is a Vault's.
type systemView struct {
	logical.StaticSystemView
	v *vault
}

func (s *systemView) MaxLeaseTTL() time.Duration { return time.Duration(s.v.maxTTL.Load()) }

func (s *systemView) Tainted() bool { return s.v.tainted.Load() }

func (s *systemView) RegisterRotationJob(context.Context, *rotation.RotationJobConfigureRequest) (string, error) {
	return "", errCommunity
}

func (s *systemView) DeregisterRotationJob(context.Context, *rotation.RotationJobDeregisterRequest) error {
	return nil
}

// logBuffer is a process's log.
type logBuffer struct {
	p   *process
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(line []byte) (int, error) {
	if !b.p.dead.Load() {
		b.p.w.tell(b.p.name, "logs %s", strings.TrimSpace(string(line)))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(line)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// pick chooses one of n.
func (p *process) pick(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dice.IntN(n)
}
