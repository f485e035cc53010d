package simulation

// This file owns a plugin process: its storage, its connections and its clock.
//
// What must stay true: a process that was killed has no effect from then on,
// neither on storage nor at OpenAI; its goroutines may run on until they notice.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	// knowsTime says that OpenAI has answered the client of its config, and so told the time.
	knowsTime atomic.Bool
	loads     int64 // how many restores its Vault had seen when it began
	mount     int64 // the number of the mount that it serves
	log       logBuffer

	// deposed is what a node sees that believes that it is active, while another is.
	deposed atomic.Pointer[deposed]

	mu    sync.Mutex
	end   time.Time // when it died
	dice  *rand.Rand
	conns map[*conn]struct{}
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

// deposed is the storage of a moment ago, to which nothing can be written, and how far
// the node's clock is off.
type deposed struct {
	store   *logical.InmemStorage
	offset  time.Duration
	tainted bool
}

// storage is what the process reads, and now its node's time.
func (p *process) storage() *logical.InmemStorage {
	if d := p.deposed.Load(); d != nil {
		return d.store
	}
	return p.store
}

func (p *process) now() time.Time {
	if d := p.deposed.Load(); d != nil {
		return time.Now().Add(d.offset)
	}
	return p.v.now()
}

// spawnNext starts a process on the Vault's storage, as Vault does when a mount is
// first used, and after its process has died.
func (v *vault) spawnNext() *process {
	v.mu.Lock()
	v.count++
	name := fmt.Sprintf("%s/%d", v.name, v.count)
	v.mu.Unlock()
	p := &process{w: v.w, v: v, name: name, began: time.Now(), store: v.store, loads: v.loads.Load(), mount: v.mount.Load(), died: make(chan struct{}), conns: map[*conn]struct{}{}, dice: v.w.dice(name)}
	p.log.p = p
	ctx := context.Background()
	factory := openaisecrets.World{Now: p.now, Dial: p.dial, Getenv: v.w.getenv}.Factory
	if v.plugin != nil {
		factory = v.plugin(p)
	}
	system := v.system()
	system.p = p
	b, err := factory(ctx, &logical.BackendConfig{
		System:      system,
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
	for c := range p.conns {
		c.end()
	}
	p.mu.Unlock()
	p.w.tell(p.name, "is killed")
}

func (p *process) diedAt() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.end
}

// unload is Vault's Cleanup of a mount that it unloads. It reports whether the process
// lived to its end.
func (p *process) unload() bool {
	if p.unloads.Swap(true) {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	began := time.Now()
	p.b.Cleanup(ctx)
	p.w.bounded(p.name+": Cleanup", began, unloadBound)
	whole := !p.dead.Load()
	p.kill() // what is left of it has no effect
	return whole
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
func (p *process) dial(context.Context, string, string) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead.Load() {
		return nil, errDied
	}
	near, far := net.Pipe()
	c := &conn{Conn: near, p: p, gone: make(chan struct{})}
	p.conns[c] = struct{}{}
	go p.w.openai.serve(c, far)
	return c, nil
}

// conn is a process's end of a connection.
type conn struct {
	net.Conn
	p    *process
	gone chan struct{} // closed with it
}

func (c *conn) Close() error {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	c.end()
	return nil
}

// end closes the connection. The caller holds the process's mu.
func (c *conn) end() {
	if _, open := c.p.conns[c]; open {
		delete(c.p.conns, c)
		close(c.gone)
		_ = c.Conn.Close() // net.Pipe's never fails
	}
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
	if write && p.deposed.Load() != nil {
		return errReadOnly
	}
	faults := p.w.openai.weather.storage(write)
	if write {
		p.failing(&faults)
	}
	// Slow before the effect, or on the way back.
	if err := takes(ctx, faults.slow/2); err != nil {
		return err
	}
	if p.dead.Load() {
		return errDied
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
	return takes(ctx, faults.slow/2)
}

// takes sleeps for d, but no longer than the request lasts: over Vault's plugin protocol a
// call ends with its context. client.Wait would fail before the deadline, without waiting.
func takes(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s view) Put(ctx context.Context, entry *logical.StorageEntry) error {
	if s.p.w.Pools && bytes.Contains(entry.Value, []byte(`"type":"pooled_`)) {
		s.p.counts(func(l *load) { l.pooled++ })
	}
	return s.step(ctx, true, entry.Key, func() error {
		s.p.replaced(entry)
		s.p.w.willPut(s.p, entry.Key, false)
		defer s.p.w.put(s.p, entry)
		return s.p.store.Put(ctx, entry)
	})
}

func (s view) Delete(ctx context.Context, key string) error {
	deleted := ""
	err := s.step(ctx, true, key, func() error {
		if entry, _ := s.p.store.Get(ctx, key); entry != nil && strings.HasPrefix(key, "wal/") { // in memory, nothing fails
			deleted = string(entry.Value)
		}
		s.p.w.willPut(s.p, key, true)
		return s.p.store.Delete(ctx, key)
	})
	if deleted != "" && (err != nil || ctx.Err() != nil) { // what the entry names must be noted again first
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
	err = s.step(ctx, false, key, func() (err error) { entry, err = s.p.storage().Get(ctx, key); return err })
	if err != nil {
		return nil, err
	}
	return entry, nil
}

func (s view) List(ctx context.Context, prefix string) (keys []string, err error) {
	err = s.step(ctx, false, prefix, func() (err error) { keys, err = s.p.storage().List(ctx, prefix); return err })
	if err != nil {
		return nil, err
	}
	return keys, nil
}

// systemView is a Vault's.
type systemView struct {
	logical.StaticSystemView
	v *vault
	p *process // nil for no process
}

func (s *systemView) MaxLeaseTTL() time.Duration { return time.Duration(s.v.maxTTL.Load()) }

// Tainted takes time on its way, in which the answer may become wrong.
func (s *systemView) Tainted() bool {
	pass := func() {
		if s.v.w.Trouble {
			time.Sleep(time.Duration(s.p.pick(10)) * time.Millisecond)
		}
	}
	pass()
	defer pass()
	if d := s.p.deposed.Load(); d != nil {
		return d.tainted // each node has its own mount table in memory
	}
	return s.v.tainted.Load()
}

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
