// Package simulation runs the real engine in a simulated world: OpenAI is the
// simulator, Vault a model of what a plugin sees of it, and time the bubble's of
// testing/synctest. A life is one to thirty simulated days of one mount and what
// happens to it, chosen by a seed; it fails when an invariant is broken.
package simulation

// This file owns a life: its settings, its chance, its story, and its end.
//
// What must stay true: every choice comes from the seed, by a stream of its own for
// each actor, so that what one does changes no other's choices.

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Settings are what a life is made of. Shrinking takes away from them.
type Settings struct {
	Seed      uint64
	Days      int
	Programs  int // that lease keys
	Readers   int // of static roles
	Operators bool
	People    bool // at OpenAI
	Trouble   bool // Vault crashes, seals, steps down, restores
	Faults    int  // 0 to 3: how bad OpenAI and storage get
	Clocks    bool // differ and jump
	Copy      bool // a second Vault restored from a snapshot
	Namespace bool // of OpenBao, which seals it
	Pools     bool // of roles
	Spending  bool // keys cost money, which is limited
}

// SettingsOf chooses a life's settings by its seed. Of days 0, they are chosen, too.
func SettingsOf(seed uint64, days int) Settings {
	r := stream(seed, "settings")
	s := Settings{
		Seed: seed, Days: days,
		Programs: 1 + r.IntN(4), Readers: r.IntN(3), Operators: r.IntN(4) > 0, People: r.IntN(3) == 0,
		Trouble: r.IntN(3) > 0, Faults: r.IntN(4), Clocks: r.IntN(4) == 0, Copy: r.IntN(8) == 0,
	}
	if long := r.IntN(100); days == 0 {
		switch {
		case long < 90:
			s.Days = 1
		case long < 99:
			s.Days = 2 + r.IntN(4)
		default:
			s.Days = 10 + r.IntN(21)
		}
	}
	s.Namespace = r.IntN(6) == 0
	s.Pools = r.IntN(2) == 0 && !s.Copy    // a copy ends them: docs/failures.md
	s.Spending = r.IntN(3) == 0 && !s.Copy // a copy knows no limit that was raised since
	return s
}

func (s Settings) String() string {
	return fmt.Sprintf("seed %d: %d days, %d programs, %d readers, operators %t, people %t, trouble %t, faults %d, clocks %t, copy %t, namespace %t, pools %t, spending %t",
		s.Seed, s.Days, s.Programs, s.Readers, s.Operators, s.People, s.Trouble, s.Faults, s.Clocks, s.Copy, s.Namespace, s.Pools, s.Spending)
}

// smaller are settings with less of one thing, the greatest cuts first.
func (s Settings) smaller() (all []Settings) {
	try := func(change func(*Settings)) {
		less := s
		change(&less)
		if less != s {
			all = append(all, less)
		}
	}
	try(func(s *Settings) { s.Days = max(1, s.Days/2) })
	try(func(s *Settings) { s.Copy = false })
	try(func(s *Settings) { s.Namespace = false })
	try(func(s *Settings) { s.Pools = false })
	try(func(s *Settings) { s.Spending = false })
	try(func(s *Settings) { s.People = false })
	try(func(s *Settings) { s.Clocks = false })
	try(func(s *Settings) { s.Trouble = false })
	try(func(s *Settings) { s.Faults = 0 })
	try(func(s *Settings) { s.Faults = max(0, s.Faults-1) })
	try(func(s *Settings) { s.Operators = false })
	try(func(s *Settings) { s.Readers = max(0, s.Readers-1) })
	try(func(s *Settings) { s.Programs = max(1, s.Programs-1) })
	return all
}

func stream(seed uint64, name string) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name)) // never fails
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// Result is how a life went.
type Result struct {
	Settings
	Broken string // the invariant that broke, "" for none
	Story  string // what a person needs to see why
	Calls  int    // to OpenAI
	Leases int
	Lived  time.Duration // of simulated time
	story  []event
}

// event is one line of the story. It is put into words when somebody reads it.
type event struct {
	at   time.Time
	who  string
	text string
	args []any
}

func (e event) String() string {
	return fmt.Sprintf("%s  %-12s %s", e.at.UTC().Format("02 15:04:05.000"), e.who, fmt.Sprintf(e.text, e.args...))
}

type world struct {
	Settings
	began time.Time

	mu     sync.Mutex
	story  []event
	broken *event // the first broken invariant
	about  []string
	over   atomic.Bool // actors end

	openai *openai
	vault  *vault   // the original
	copies []*vault // its copies
	actors sync.WaitGroup
	idle   chan func() // to goroutines that have nothing to do
	ended  chan struct{}
	ledger ledger
	money  *money
}

func newWorld(s Settings) *world {
	w := &world{Settings: s, began: time.Now(), idle: make(chan func()), ended: make(chan struct{}), ledger: ledger{
		things: map[string]*thing{}, byHand: map[string]bool{}, configured: map[string]bool{},
		scopes: map[string][]scopesOf{}, graces: map[string]grace{}, crowded: map[string]int{}, recreated: map[string]recreation{}, removed: map[string]time.Time{},
	}}
	w.money = newMoney(w)
	w.openai = newOpenAI(w)
	w.vault = newVault(w, "vault")
	return w
}

// getenv is the environment of the server, which is OpenBao if it has namespaces.
func (w *world) getenv(name string) string {
	if name == "BAO_VERSION" && w.Namespace {
		return "2.6.2"
	}
	return ""
}

// run is a goroutine for do, on a stack that others have grown.
func (w *world) run(do func()) {
	select {
	case w.idle <- do:
	default:
		go func() {
			for {
				do()
				select {
				case do = <-w.idle:
				case <-w.ended:
					return
				}
			}
		}()
	}
}

func (w *world) dice(name string) *rand.Rand { return stream(w.Seed, name) }

// tell adds an event to the story.
func (w *world) tell(who, text string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.story = append(w.story, event{time.Now(), who, text, args})
}

// violate says that an invariant is broken. The first one counts. about are IDs
// whose events the report shows.
func (w *world) violate(invariant string, about []string, text string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken != nil {
		return
	}
	w.broken = &event{time.Now(), invariant, text, args}
	w.about = slices.DeleteFunc(about, func(id string) bool { return id == "" })
	w.over.Store(true)
}

// sleep waits, in the bubble's time, unless the life is over; it reports whether it
// goes on.
func (w *world) sleep(d time.Duration) bool {
	for d > 0 && !w.over.Load() {
		step := min(d, 10*time.Minute)
		time.Sleep(step)
		d -= step
	}
	return !w.over.Load()
}

// act runs an actor until the life is over.
func (w *world) act(do func()) { w.actors.Go(do) }

// Live runs a life and returns how it went.
func Live(t *testing.T, s Settings) (result Result) {
	result.Settings = s
	synctest.Test(t, func(*testing.T) {
		time.Sleep(s.begins())
		w := newWorld(s)
		w.live()
		result.Lived = time.Since(w.began)
		result.Calls, result.Leases = w.openai.calls(), w.ledger.leases()
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.broken != nil {
			result.Broken, result.Story = w.broken.who, w.report()
		}
		result.story = w.story
	})
	return result
}

func (w *world) live() {
	defer w.openai.close()
	w.vault.start()
	w.actorsOfLife()
	w.sleep(time.Duration(w.Days) * 24 * time.Hour)
	if w.People && w.Readers > 0 {
		w.sleep(time.Hour) // in which the engine compares its static roles with OpenAI
	}
	broken := w.isBroken()
	w.over.Store(true)
	w.actors.Wait()
	if !broken {
		w.over.Store(false)
		w.settle()
	}
	w.over.Store(true)
	for _, v := range append([]*vault{w.vault}, w.copies...) {
		v.end()
	}
	time.Sleep(time.Minute) // what a process that was killed still waits for
	close(w.ended)
}

func (w *world) isBroken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.broken != nil
}

// report is the broken invariant, and the events that have to do with it.
func (w *world) report() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", w.Settings)
	fmt.Fprintf(&b, "BROKEN: %s\n  %s\n  %s\n", w.broken.who, invariants[w.broken.who], *w.broken)
	var hits, last []event
	for _, e := range w.story {
		if e.at.After(w.broken.at) {
			break // what the actors still did
		}
		line := e.String()
		for _, id := range w.about {
			if strings.Contains(line, id) {
				hits = append(hits, e)
				break
			}
		}
		last = append(last, e)
	}
	section := func(title string, events []event, n int) {
		if len(events) > n {
			events = events[len(events)-n:]
		}
		fmt.Fprintf(&b, "-- %s\n", title)
		for _, e := range events {
			fmt.Fprintf(&b, "%s\n", e)
		}
	}
	section("all that names "+strings.Join(w.about, ", "), hits, 50)
	section("the last events before it", last, 50)
	return b.String()
}
