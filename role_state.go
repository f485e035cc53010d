package openaisecrets

// This file owns the state of roles whose keys have reached their spend_limit: its
// storage, and whether it blocks a role now.
//
// What must stay true: a request finds the state in memory, after the first of a role in
// this process; a role without a limit reads nothing. The state is local: each cluster
// counts its own keys. It ends with its window, by OpenAI's clock, or when the limit
// exceeds what was spent; a failure to read or write it ends nothing.

import (
	"context"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/text"
)

const (
	// stateStoragePrefix is followed by the name of a role, or by static-roles/ and that
	// of a static role.
	stateStoragePrefix = "role-state/"
	stateVersion       = 1

	// staticLabel begins the name of a static role where it stands beside roles.
	staticLabel = "static-roles/"
)

// roleState says that the keys of a role have reached its limit.
type roleState struct {
	Version int `json:"version"`
	// Since is when the engine noticed.
	Since time.Time `json:"since"`
	// Window is the role's spend_window then, and Start and End its bounds.
	Window string    `json:"window"`
	Start  time.Time `json:"window_start"`
	End    time.Time `json:"window_end"`
	// Spend is what the keys had cost, in dollars, and Limit the limit then, in cents.
	Spend string `json:"spend"`
	Limit int64  `json:"limit_cents"`
	// Recorded reports that the WAL has had each key that spend_action=revoke deletes.
	Recorded bool `json:"keys_recorded,omitempty"`
}

// reaches reports whether an amount in dollars is at least a limit in cents.
func reaches(spend *big.Rat, limit int64) bool {
	return limit > 0 && spend.Cmp(big.NewRat(limit, 100)) >= 0
}

// applies reports whether the state still holds for a role with these fields.
func (s *roleState) applies(of spendRule, now time.Time) bool {
	if s == nil || !now.Before(s.End) {
		return false
	}
	spend, ok := new(big.Rat).SetString(s.Spend)
	return of.SpendLimit > 0 && (!ok || reaches(spend, of.SpendLimit))
}

// blocks reports whether a role with these fields must not have a key.
func (s *roleState) blocks(of spendRule, now time.Time) bool {
	return of.action() != actionWarn && s.applies(of, now)
}

// roleStates has the states that this process knows.
type roleStates struct {
	mu sync.Mutex
	// known has nil for a role without a state. changes counts what is forgotten, so
	// that a state read before is not kept.
	known   map[string]*roleState
	changes uint64
	loaded  bool // every state has been read
	// again counts, by role, when its keys must be looked for again.
	again map[string]uint64
	// compared is the figures with which the limits were last compared, blocked the roles
	// that were blocked then.
	compared any
	rules    uint64 // counts the changes of limits
	blocked  map[string]int
}

func newRoleStates() *roleStates {
	return &roleStates{known: map[string]*roleState{}, again: map[string]uint64{}}
}

// get returns the state of a role, nil if there is none. It must not be modified.
func (r *roleStates) get(ctx context.Context, s logical.Storage, label string) (*roleState, error) {
	r.mu.Lock()
	state, known := r.known[label]
	changes := r.changes
	r.mu.Unlock()
	if known {
		return state, nil
	}
	state = &roleState{}
	entry, err := readEntry(ctx, s, stateStoragePrefix+label, "the spending state of "+describeLabel(label), stateVersion, state)
	if err != nil {
		return nil, err
	}
	if entry == nil {
		state = nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changes == changes {
		r.known[label] = state
	}
	return state, nil
}

// set stores the state of a role, nil to delete it. After a failure, the next request
// reads what storage has.
func (r *roleStates) set(ctx context.Context, s logical.Storage, label string, state *roleState) (err error) {
	key, what := stateStoragePrefix+label, "the spending state of "+describeLabel(label)
	if state == nil {
		if err = s.Delete(ctx, key); err != nil {
			err = fmt.Errorf("deleting %s: %w", what, err)
		}
	} else {
		state.Version = stateVersion
		err = writeEntry(ctx, s, key, what, state)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes++
	if r.known[label] = state; err != nil {
		delete(r.known, label)
	}
	return err
}

// reconsider lets the keys of a role be deleted that were unknown when its state was
// stored: its limit was raised meanwhile, or their records were lost. It precedes a write
// of another rule.
func (r *roleStates) reconsider(ctx context.Context, s logical.Storage, label string) error {
	r.mu.Lock()
	r.again[label]++
	r.mu.Unlock()
	state, err := r.get(ctx, s, label)
	if err != nil || state == nil || !state.Recorded {
		return err
	}
	again := *state
	again.Recorded = false
	return r.set(ctx, s, label, &again)
}

// reconsidered changes with each reconsider of a role.
func (r *roleStates) reconsidered(label string) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.again[label]
}

// forget drops a state that another node changed.
func (r *roleStates) forget(label string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes++
	delete(r.known, label)
}

// load reads every state once.
func (r *roleStates) load(ctx context.Context, s logical.Storage) error {
	r.mu.Lock()
	loaded := r.loaded
	r.mu.Unlock()
	if loaded {
		return nil
	}
	for _, kind := range []string{"", staticLabel} {
		names, err := s.List(ctx, stateStoragePrefix+kind)
		if err != nil {
			return fmt.Errorf("listing the spending states: %w", err)
		}
		for _, name := range names {
			if strings.HasSuffix(name, "/") {
				continue
			}
			if _, err := r.get(ctx, s, kind+name); err != nil {
				return err
			}
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.loaded = true
	return nil
}

// all returns the states in memory.
func (r *roleStates) all() map[string]*roleState {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[string]*roleState{}
	for label, state := range r.known {
		if state != nil {
			all[label] = state
		}
	}
	return all
}

// isCompared reports whether the limits were compared with these figures.
func (r *roleStates) isCompared(figures any) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.compared == figures
}

// setCompared keeps the figures, unless a limit has changed since there were rules changes.
func (r *roleStates) setCompared(figures any, rules uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rules == rules {
		r.compared = figures
	}
}

// ruleChanges counts the changes of limits.
func (r *roleStates) ruleChanges() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rules
}

// count keeps the blocked roles for the metrics.
func (r *roleStates) count(blocked map[string]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocked = blocked
}

func (r *roleStates) counted() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.blocked
}

// compareAgain makes the next periodic call compare the limits, one of which has changed.
func (r *roleStates) compareAgain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.compared, r.rules = nil, r.rules+1
}

func isStaticLabel(label string) bool { return strings.HasPrefix(label, staticLabel) }

// describeLabel is for messages.
func describeLabel(label string) string {
	if name, static := strings.CutPrefix(label, staticLabel); static {
		return fmt.Sprintf("static role %q", name)
	}
	return fmt.Sprintf("role %q", label)
}

// openAINow is the time by OpenAI's clock, which begins the windows, or by this server's
// before the first answer. snap may be nil.
func (b *backend) openAINow(snap *snapshot) time.Time {
	if snap != nil {
		if now, known := snap.api.Now(); known {
			return now
		}
	}
	return b.now()
}

// windowNow is the time by which windows end: OpenAI's, and before its first answer none
// has ended yet. snap may be nil.
func (b *backend) windowNow(snap *snapshot) time.Time {
	if snap == nil {
		return b.now()
	}
	now, _ := snap.api.Now()
	return now
}

// blocked returns why a role must not have a key now, nil if it may. It is a client error
// unless the state cannot be read.
func (b *backend) blocked(ctx context.Context, s logical.Storage, snap *snapshot, label string, of spendRule) error {
	if of.SpendLimit == 0 || of.action() == actionWarn {
		return nil
	}
	state, err := b.states.get(ctx, s, label)
	if err != nil || !state.blocks(of, b.windowNow(snap)) {
		return err
	}
	return clientError(fmt.Sprintf("blocked by its spend_limit: since %s, its keys have cost %s USD, and the limit is %s USD per %s; the block ends at %s, or when you set spend_limit above these costs",
		text.Time(state.Start), state.Spend, cents(of.SpendLimit), state.Window, text.Time(state.End)))
}

// showState adds the state to a read of a role.
func (b *backend) showState(ctx context.Context, req *logical.Request, label string, of spendRule, data map[string]any) error {
	data["spend_blocked_until"], data["spend_at_block"] = nil, nil
	if of.SpendLimit == 0 || of.action() == actionWarn {
		return nil
	}
	state, err := b.states.get(ctx, req.Storage, label)
	if err != nil {
		return err
	}
	b.snapshotMu.RLock()
	snap := b.snapshot
	b.snapshotMu.RUnlock()
	if state.blocks(of, b.windowNow(snap)) {
		data["spend_blocked_until"], data["spend_at_block"] = text.Time(state.End), state.Spend
	}
	return nil
}
