package openaisecrets

// Faults of unit tests: storage that fails, blocks, counts or crashes the process; the
// failures of a call to OpenAI; and the driver that runs a flow with each fault at each
// step.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// apiFaults are the failures of one API call. Retries may hide the transient ones from
// the caller.
var apiFaults = map[string]openaitest.Fault{
	"500 before":  {Kind: openaitest.FaultStatus, Status: 500},
	"500 after":   {Kind: openaitest.FaultStatusAfter, Status: 500},
	"429":         {Kind: openaitest.FaultStatus, Status: 429},
	"400":         {Kind: openaitest.FaultStatus, Status: 400},
	"401":         {Kind: openaitest.FaultStatus, Status: 401},
	"403":         {Kind: openaitest.FaultStatus, Status: 403, Body: `{"error":"Missing scopes: api.management.write."}`},
	"reset":       {Kind: openaitest.FaultReset},
	"lost":        {Kind: openaitest.FaultLost},
	"hang":        {Kind: openaitest.FaultHang},
	"hang after":  {Kind: openaitest.FaultHangAfter},
	"garbage":     {Kind: openaitest.FaultGarbage},
	"empty":       {Kind: openaitest.FaultEmpty},
	"{}":          {Kind: openaitest.FaultEmptyObject},
	"truncated":   {Kind: openaitest.FaultTruncated},
	"missing key": {Kind: openaitest.FaultMissingKey},
}

// errKilled is the error that a caller receives if the process dies.
var errKilled = errors.New("the plugin process died")

var errStorage = errors.New("storage is not there")

// faultyStorage is storage that fails, or crashes the process, at a chosen step.
type faultyStorage struct {
	inner *logical.InmemStorage

	mu        sync.Mutex
	plan      *storageFault
	dead      bool
	writes    []string
	lifetimes []context.Context // of the processes; each flushes its usage records with its own
}

// storageFault selects the write that fails. Writes count from 0.
type storageFault struct {
	write int
	after bool // the write takes effect
	kill  bool // the process dies; otherwise an error is returned
	more  int  // number of further writes that fail without effect
}

// fail plans a fault, counting writes from here.
func (s *faultyStorage) fail(f storageFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plan, s.writes = &f, nil
}

// heal ends all faults and reports whether the process had died.
func (s *faultyStorage) heal() (died bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	died = s.dead
	s.plan, s.dead = nil, false
	return died
}

func (s *faultyStorage) died() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

// kill makes every further step fail as in a dead process.
func (s *faultyStorage) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
}

// last returns the last write, whether or not it took effect.
func (s *faultyStorage) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.writes) == 0 {
		return ""
	}
	return s.writes[len(s.writes)-1]
}

// lived records the lifetime of a new process.
func (s *faultyStorage) lived(lifetime context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lifetimes = append(s.lifetimes, lifetime)
}

func (s *faultyStorage) alive(ctx context.Context) {
	if s.died() {
		s.die(ctx)
	}
}

// die ends a request with a panic that the test recovers. It silently ends the flush of
// usage records, which starts half a minute after a lease.
func (s *faultyStorage) die(ctx context.Context) {
	s.mu.Lock()
	own := slices.Contains(s.lifetimes, ctx)
	s.mu.Unlock()
	if own {
		runtime.Goexit()
	}
	panic(errKilled)
}

// step runs one write under the plan.
func (s *faultyStorage) step(ctx context.Context, what string, write func() error) error {
	s.alive(ctx)
	if err := ctx.Err(); err != nil {
		return err // like Vault's storage over the plugin protocol
	}
	s.mu.Lock()
	n := len(s.writes)
	s.writes = append(s.writes, what)
	plan := s.plan
	strikes := plan != nil && plan.write <= n && n <= plan.write+plan.more
	if strikes {
		s.dead = plan.kill
	}
	s.mu.Unlock()
	if !strikes {
		return write()
	}
	if plan.after && plan.write == n {
		if err := write(); err != nil {
			return err
		}
	}
	if plan.kill {
		s.die(ctx)
	}
	return errStorage
}

// now is the inner storage, which swap may replace while background jobs run.
func (s *faultyStorage) now() *logical.InmemStorage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inner
}

func (s *faultyStorage) swap(inner *logical.InmemStorage) (former *logical.InmemStorage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	former, s.inner = s.inner, inner
	return former
}

func (s *faultyStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.step(ctx, "put "+path.Dir(entry.Key), func() error { return s.now().Put(ctx, entry) })
}

func (s *faultyStorage) Delete(ctx context.Context, key string) error {
	return s.step(ctx, "delete "+path.Dir(key), func() error { return s.now().Delete(ctx, key) })
}

func (s *faultyStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.alive(ctx)
	return s.now().Get(ctx, key)
}

func (s *faultyStorage) List(ctx context.Context, prefix string) ([]string, error) {
	s.alive(ctx)
	return s.now().List(ctx, prefix)
}

// hold blocks one caller, once.
type hold struct{ entered, release chan struct{} }

func newHold() *hold { return &hold{make(chan struct{}), make(chan struct{})} }

func (h *hold) up() {
	close(h.entered)
	<-h.release
}

// watchedStorage counts operations, blocks a read before it returns, and fails as
// configured.
type watchedStorage struct {
	logical.Storage
	reads, operations atomic.Int64 // operations are reads and writes
	next              atomic.Pointer[hold]

	mu       sync.Mutex             // background jobs read these while a test sets them
	get, put func(key string) error // nil = none fails
}

func (s *watchedStorage) failures() (get, put func(key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.get, s.put
}

// fail sets how operations fail from now on.
func (s *watchedStorage) fail(get, put func(key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.get, s.put = get, put
}

// holdAt blocks the next read of a key before it returns.
func (s *watchedStorage) holdAt(key string) *hold {
	held := newHold()
	var once sync.Once
	s.fail(func(at string) error {
		if at == key {
			once.Do(func() { s.next.Store(held) })
		}
		return nil
	}, nil)
	return held
}

// failEachOnce makes the first read of each key and list fail, and returns a counter of
// the reads.
func (s *watchedStorage) failEachOnce() (reads func(key string) int) {
	var mu sync.Mutex
	count := map[string]int{}
	s.fail(func(key string) error {
		mu.Lock()
		defer mu.Unlock()
		if count[key]++; count[key] == 1 {
			return errStorage
		}
		return nil
	}, nil)
	return func(key string) int {
		mu.Lock()
		defer mu.Unlock()
		return count[key]
	}
}

func (s *watchedStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.reads.Add(1)
	s.operations.Add(1)
	if get, _ := s.failures(); get != nil {
		if err := get(key); err != nil {
			return nil, err
		}
	}
	entry, err := s.Storage.Get(ctx, key)
	if h := s.next.Swap(nil); h != nil {
		h.up()
	}
	return entry, err
}

func (s *watchedStorage) List(ctx context.Context, prefix string) ([]string, error) {
	s.reads.Add(1)
	s.operations.Add(1)
	if get, _ := s.failures(); get != nil {
		if err := get(prefix); err != nil {
			return nil, err
		}
	}
	return s.Storage.List(ctx, prefix)
}

func (s *watchedStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	s.operations.Add(1)
	if _, put := s.failures(); put != nil {
		if err := put(entry.Key); err != nil {
			return err
		}
	}
	return s.Storage.Put(ctx, entry)
}

func (s *watchedStorage) Delete(ctx context.Context, key string) error {
	s.operations.Add(1)
	return s.Storage.Delete(ctx, key)
}

// faultFlow is a flow that everyFault runs with each fault at each step of it.
type faultFlow struct {
	mount    func(t *testing.T) *harness
	arrange  func(h *harness)                                    // prepares the mount, without faults
	standing func(h *harness) error                              // checked at each call and at the end; may be nil
	restart  func(h *harness)                                    // starts a new process after a crash
	flow     func(h *harness) (*logical.Response, error)         // the tested operation
	check    func(h *harness, resp *logical.Response, err error) // runs after the faults
}

// everyFault runs the flow on a fresh mount once for each fault at each step of it.
// A run without faults determines the steps.
func everyFault(t *testing.T, f faultFlow) {
	t.Helper()
	begin := func(t *testing.T, kind openaitest.FaultKind) *harness {
		h := f.mount(t)
		h.hangs(kind)
		f.arrange(h)
		h.sim.ResetRequests()
		if f.standing != nil {
			h.sim.Fail(openaitest.Fault{Match: func(r *http.Request) bool {
				if err := f.standing(h); err != nil {
					t.Errorf("at %s %s: %s", r.Method, r.URL.Path, err)
				}
				return false // observes only
			}})
		}
		h.storage.fail(storageFault{write: -1})
		return h
	}
	end := func(h *harness, resp *logical.Response, err error) {
		h.waitForAbandonedRequests()
		h.sim.ClearFaults()
		if h.storage.heal() {
			f.restart(h)
		}
		if f.standing != nil {
			require.NoError(h.t, f.standing(h))
		}
		f.check(h, resp, err)
	}
	run := func(name string, kind openaitest.FaultKind, arm func(h *harness)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := begin(t, kind)
			arm(h)
			resp, err := f.flow(h)
			end(h, resp, err)
		})
	}

	var writes, calls int
	t.Run("no fault", func(t *testing.T) {
		h := begin(t, "")
		resp, err := f.flow(h)
		require.NoError(t, err)
		require.NoError(t, resp.Error())
		writes, calls = len(h.storage.writes), h.sim.Count("", "")
		end(h, resp, err)
	})
	require.NotZero(t, writes+calls)

	for n := range writes {
		for name, fault := range map[string]storageFault{
			"error before":  {write: n},
			"error after":   {write: n, after: true},
			"killed before": {write: n, kill: true},
			"killed after":  {write: n, after: true, kill: true},
		} {
			run(fmt.Sprintf("write %d, %s", n, name), "", func(h *harness) { h.storage.fail(fault) })
		}
	}
	for n := range calls {
		for name, fault := range apiFaults {
			fault.Skip, fault.Times = n, 1
			run(fmt.Sprintf("call %d, %s", n, name), fault.Kind, func(h *harness) { h.sim.Fail(fault) })
			run(fmt.Sprintf("call %d, %s, then killed", n, name), fault.Kind, func(h *harness) {
				fault := fault
				fault.OnStrike = func(*http.Request) { // no further write or call succeeds
					h.storage.kill()
					h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultReset})
				}
				h.sim.Fail(fault)
			})
		}
	}
}

// everyLeaseFault is everyFault for a mount with a config and the role "app".
func everyLeaseFault(t *testing.T, opts openaitest.Options, arrange func(h *harness), flow func(h *harness) (*logical.Response, error), check func(h *harness, resp *logical.Response, err error)) {
	t.Helper()
	everyFault(t, faultFlow{
		mount: func(t *testing.T) *harness { return configured(t, opts) }, arrange: arrange,
		restart: (*harness).restart, flow: flow, check: check,
	})
}

// everyStaticFault is everyFault for static roles, whose stored keys must work at every
// step.
func everyStaticFault(t *testing.T, arrange func(h *harness), flow func(h *harness) (*logical.Response, error), check func(h *harness, resp *logical.Response, err error)) {
	t.Helper()
	everyFault(t, faultFlow{
		mount: func(t *testing.T) *harness { return withStatic(t, openaitest.Options{}) }, arrange: arrange,
		standing: (*harness).checkStoredStaticKeys, restart: (*harness).restartStatic, flow: flow, check: check,
	})
}
