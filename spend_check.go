package openaisecrets

// This file owns the switch: it compares the costs of roles with their limits, blocks
// roles, and deletes the keys of those with spend_action=revoke.
//
// What must stay true: only a complete answer about costs blocks a role. The block is
// stored, and the role's pool is empty, before a key is refused. A key has its WAL entry
// before it is deleted, and those with the highest costs are deleted first. Without
// usage_interval, nothing is read or asked.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/text"
)

// limitedRole is a role or static role with a limit.
type limitedRole struct {
	label string // as usageRecord.role names it
	name  string
	spendRule
	static bool
}

// limitedRoles returns the roles that have a limit. One that cannot be read may have one:
// it is returned without, so that its state stays.
func (b *backend) limitedRoles(ctx context.Context, s logical.Storage) (all []limitedRole, err error) {
	names, err := listNames(ctx, s, roleStoragePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range names {
		r, err := b.roles.get(ctx, s, name)
		switch {
		case errors.As(err, &unreadable{}):
			all = append(all, limitedRole{label: name, name: name})
		case err != nil:
			return nil, err
		case r != nil && r.SpendLimit > 0:
			all = append(all, limitedRole{label: name, name: name, spendRule: r.spendRule})
		}
	}
	if names, err = listNames(ctx, s, staticStoragePrefix); err != nil {
		return nil, fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range names {
		r, err := getStaticRole(ctx, s, name)
		switch {
		case errors.As(err, &unreadable{}):
			all = append(all, limitedRole{label: staticLabel + name, name: name, static: true})
		case err != nil:
			return nil, err
		case r != nil && r.SpendLimit > 0:
			all = append(all, limitedRole{label: staticLabel + name, name: name, spendRule: r.spendRule, static: true})
		}
	}
	return all, nil
}

// checkSpending ends the blocks whose window has ended, and compares the costs of roles
// with their limits, once after each refresh of the costs and after a change of a limit.
func (b *backend) checkSpending(ctx context.Context, req *logical.Request) error {
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) || err == nil && snap.config.UsageInterval == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if err := b.states.load(ctx, req.Storage); err != nil {
		return err
	}
	for label, state := range b.states.all() {
		if !b.windowNow(snap).Before(state.End) {
			if err := b.endState(ctx, req, label, state); err != nil {
				return err
			}
		}
	}
	figures, _, _ := b.spending.figures()
	if figures != nil && !figures.day.Equal(b.openAINow(snap).UTC().Truncate(usageDay)) {
		figures = nil // of another window
	}
	compare := figures != nil && !b.states.isCompared(figures)
	if !compare && len(b.states.all()) == 0 {
		b.states.count(nil)
		return nil
	}
	rules := b.states.ruleChanges()
	limited, err := b.limitedRoles(ctx, req.Storage)
	if err != nil {
		return err
	}
	failures := b.dropStates(ctx, req, limited)
	if compare {
		for _, l := range limited { // a failure of one role does not keep the others from being compared
			if l.SpendLimit == 0 {
				continue
			}
			if err := b.applyLimit(ctx, req, snap, l, figures); err != nil {
				failures = errors.Join(failures, fmt.Errorf("%s: %w", describeLabel(l.label), err))
			}
		}
		if failures == nil {
			b.states.setCompared(figures, rules)
		}
	}
	failures = errors.Join(failures, b.recordKeys(ctx, req, snap, limited))
	blocked := map[string]int{}
	for _, l := range limited {
		if state, err := b.states.get(ctx, req.Storage, l.label); err == nil && state.blocks(l.spendRule, b.windowNow(snap)) {
			blocked[l.label] = 1
		}
	}
	b.states.count(blocked)
	return failures
}

// dropStates ends the states of roles that have no limit any more.
func (b *backend) dropStates(ctx context.Context, req *logical.Request, limited []limitedRole) (failures error) {
	for label, state := range b.states.all() {
		if !slices.ContainsFunc(limited, func(l limitedRole) bool { return l.label == label }) {
			failures = errors.Join(failures, b.endState(ctx, req, label, state))
		}
	}
	return failures
}

// applyLimit changes the state of a role to what it has spent.
func (b *backend) applyLimit(ctx context.Context, req *logical.Request, snap *snapshot, l limitedRole, figures *spending) error {
	spend := new(big.Rat)
	if windows := figures.roles[l.label]; windows != nil {
		spend = windows[l.window()]
	}
	state, err := b.states.get(ctx, req.Storage, l.label)
	if err != nil {
		return err
	}
	start, end := windowOf(l.window(), figures.day)
	holds := state.applies(l.spendRule, b.windowNow(snap)) && state.Window == l.window() && state.Start.Equal(start)
	switch {
	case holds:
	case reaches(spend, l.SpendLimit):
		state = &roleState{
			Since: b.now().UTC().Truncate(time.Second), Window: l.window(), Start: start, End: end, Spend: dollars(spend), Limit: l.SpendLimit,
		}
		if err := b.enter(ctx, req, l, state); err != nil {
			return err
		}
		b.announce(req, l, state)
	case state != nil: // the limit was raised, or the window changed
		return b.endState(ctx, req, l.label, state)
	}
	if state.blocks(l.spendRule, b.windowNow(snap)) && !l.static { // also after a change of spend_action
		b.clearPool(l.name)
		b.recordLeaving(ctx, req)
	}
	return nil
}

// enter stores a state. With spend_action=block or revoke, no answer that is on its way
// has a key of the role afterwards, and its pool is empty.
func (b *backend) enter(ctx context.Context, req *logical.Request, l limitedRole, state *roleState) error {
	if l.static || l.action() == actionWarn {
		return b.states.set(ctx, req.Storage, l.label, state)
	}
	release, err := b.pools.answers.Alone(ctx, l.name)
	if err != nil {
		return fmt.Errorf("waiting for credential requests of the role: %w", err)
	}
	defer release()
	b.clearPool(l.name)
	b.recordLeaving(ctx, req)
	return b.states.set(ctx, req.Storage, l.label, state)
}

// announce logs that a role has reached its limit.
func (b *backend) announce(req *logical.Request, l limitedRole, state *roleState) {
	log := b.log(req).With("role", l.label, "spend_action", l.action(), "spend", state.Spend, "spend_limit", cents(l.SpendLimit), "spend_window", state.Window, "window_end", text.Time(state.End))
	switch {
	case l.action() == actionWarn:
		log.Warn("role has reached its spend_limit")
	case l.static:
		log.Warn("static role has reached its spend_limit; its key is not returned")
	default:
		log.Warn("role has reached its spend_limit; no key is issued and no lease renewed", "to_end_its_leases", fmt.Sprintf("vault lease revoke -prefix %screds/%s", req.MountPoint, l.name))
	}
	b.events.Emit(events.RoleOverspent, req.MountPoint, pathOf(l.label), false, "name", l.name, "spend_action", l.action(),
		"spend", state.Spend, "spend_limit", cents(l.SpendLimit), "spend_window", state.Window, "window_end", text.Time(state.End))
}

// pathOf is the path of a role by its label.
func pathOf(label string) string {
	if isStaticLabel(label) {
		return label
	}
	return "roles/" + label
}

// endState ends the state of a role.
func (b *backend) endState(ctx context.Context, req *logical.Request, label string, state *roleState) error {
	if err := b.states.set(ctx, req.Storage, label, nil); err != nil {
		return err
	}
	b.log(req).Info("role may spend again", "role", label, "window_end", text.Time(state.End))
	if !isStaticLabel(label) {
		b.pools.retry(label)
	}
	return nil
}

// doomed is a credential that is to be deleted, and its WAL entry, which the WAL worker
// leaves alone meanwhile.
type doomed struct {
	credential
	role, walID string
	spend       *big.Rat // in the month
}

// doomedKeys is the queue of deletions, those with the highest costs first.
type doomedKeys struct {
	mu  sync.Mutex
	all []doomed
}

// doomedRole is a role whose keys are being recorded.
type doomedRole struct {
	limitedRole
	keys    []doomed
	changes uint64 // what reconsidered returned before the keys were read
	unsure  bool   // a listing left a key out, and no earlier one confirms that
}

func (q *doomedKeys) add(some []doomed) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all = append(q.all, some...)
	sort.SliceStable(q.all, func(i, j int) bool { return q.all[i].spend.Cmp(q.all[j].spend) > 0 })
}

func (q *doomedKeys) take() (next doomed, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.all) == 0 {
		q.all = nil
		return doomed{}, false
	}
	next, q.all = q.all[0], q.all[1:]
	return next, true
}

func (q *doomedKeys) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.all)
}

// recordKeys records the keys of the roles whose state demands it in the WAL, and queues
// them for deletion.
func (b *backend) recordKeys(ctx context.Context, req *logical.Request, snap *snapshot, limited []limitedRole) error {
	pending := map[string]*doomedRole{}
	for _, l := range limited {
		state, err := b.states.get(ctx, req.Storage, l.label)
		if err != nil {
			return err
		}
		if !l.static && l.action() == actionRevoke && !state.recorded() && state.blocks(l.spendRule, b.windowNow(snap)) {
			pending[l.label] = &doomedRole{limitedRole: l, changes: b.states.reconsidered(l.label)}
		}
	}
	if len(pending) == 0 {
		return nil
	}
	byRole := map[string][]usageRecord{}
	seen, now := map[string]bool{}, snap.api.NotAfter(b.now())
	if _, err := b.eachKnownKey(ctx, req.Storage, func(r *usageRecord) {
		if _, is := pending[r.role()]; is && !seen[r.KeyID] && (r.Ends.IsZero() || r.Ends.After(now.Add(-clockSlack))) && !b.deleted.Contains(r.AccountID) && !b.deleted.Contains(r.KeyID) {
			seen[r.KeyID] = true
			byRole[r.role()] = append(byRole[r.role()], *r)
		}
	}); err != nil {
		return err
	}
	costs := b.costsByKey(ctx, req, snap)
	listed := map[string]*keyListing{} // by project; nil if it failed
	for _, label := range slices.Sorted(maps.Keys(pending)) {
		p := pending[label]
		for _, r := range byRole[label] {
			if _, known := b.wal.get(revokedID(r.credential())); known {
				continue
			}
			if list := b.keysIn(ctx, snap, r.ProjectID, listed); list != nil && !list.ids[r.KeyID] && b.isFinal(r.IssuedAt) {
				// A key that two listings lack counts as gone and is not queued; its lease, if
				// there is one, still deletes it.
				p.unsure = p.unsure || !b.unseen.confirmed(r.KeyID, list.began, time.Duration(b.settling.Load()))
				continue
			}
			b.unseen.forget(r.KeyID)
			d := doomed{credential: r.credential(), role: p.name, spend: new(big.Rat)}
			if amount := costs[r.KeyID]; amount != nil {
				d.spend = amount
			}
			p.keys = append(p.keys, d)
		}
		if err := b.recordDoomed(ctx, req, snap, p); err != nil {
			return fmt.Errorf("role %q: recording its keys for deletion: %w", p.name, err)
		}
	}
	return nil
}

// costsByKey returns what keys cost this month, which orders their deletion. It is empty
// if OpenAI does not answer: the deletion does not wait for it.
func (b *backend) costsByKey(ctx context.Context, req *logical.Request, snap *snapshot) map[string]*big.Rat {
	ctx, cancel := context.WithTimeout(ctx, tryBudget)
	defer cancel()
	day := b.openAINow(snap).UTC().Truncate(usageDay)
	start, _ := windowOf(windowMonth, day)
	byKey := map[string]*big.Rat{}
	sums, err := b.readCosts(ctx, req, start, day.Add(usageDay), nil)
	if err != nil {
		b.complain(ctx, req, "keys are deleted in any order, because their costs are not known", err)
		return byKey
	}
	for cell, amount := range sums.cells {
		byKey[cell.key] = amount
	}
	return byKey
}

// keyListing is a complete listing of a project's keys.
type keyListing struct {
	began time.Time // with the monotonic clock
	ids   map[string]bool
}

// keysIn lists the keys of a project, once. It returns nil if that fails.
func (b *backend) keysIn(ctx context.Context, snap *snapshot, project string, listed map[string]*keyListing) *keyListing {
	if list, known := listed[project]; known {
		return list
	}
	listed[project] = nil
	ctx, cancel := context.WithTimeout(ctx, tryBudget)
	defer cancel()
	list := &keyListing{time.Now(), map[string]bool{}}
	keys, err := snap.api.ListProjectKeys(ctx, project)
	if err != nil {
		return nil
	}
	for _, k := range keys {
		list.ids[k.ID] = true
	}
	listed[project] = list
	return list
}

// recorded is false without a state.
func (s *roleState) recorded() bool { return s != nil && s.Recorded }

// recordDoomed writes the WAL entries of all keys of a role, then notes that in its state
// unless a key may be missing, and queues the keys. After a failure the WAL worker deletes
// what is recorded, and the next run records the rest.
func (b *backend) recordDoomed(ctx context.Context, req *logical.Request, snap *snapshot, p *doomedRole) error {
	// A write of the role waits, so no limit is raised while its keys are recorded.
	unlock, err := b.pools.answers.Share(ctx, p.name)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := b.roles.get(ctx, req.Storage, p.name)
	if err != nil {
		return err
	}
	state, err := b.states.get(ctx, req.Storage, p.label)
	if err != nil {
		return err
	}
	if r == nil || r.action() != actionRevoke || !state.blocks(r.spendRule, b.windowNow(snap)) {
		return nil
	}
	released := false
	defer func() {
		if !released {
			for _, d := range p.keys {
				b.wal.release(d.walID)
			}
		}
	}()
	for i := range p.keys {
		p.keys[i].walID = revokedID(p.keys[i].credential)
		b.wal.use(p.keys[i].walID)
	}
	for _, d := range p.keys {
		if _, err := b.recordRevocation(ctx, req.Storage, d.credential); err != nil {
			return err
		}
	}
	if !p.unsure && b.states.reconsidered(p.label) == p.changes {
		done := *state
		done.Recorded = true
		if err := b.states.set(ctx, req.Storage, p.label, &done); err != nil {
			return err
		}
		if b.states.reconsidered(p.label) != p.changes { // it may have read the state as it was before
			if err := b.states.set(ctx, req.Storage, p.label, state); err != nil {
				return err
			}
		}
	}
	released = true
	b.doomed.add(p.keys)
	if len(p.keys) == 0 {
		return nil
	}
	b.log(req).Warn("keys of a role recorded for deletion, because it has reached its spend_limit", "role", p.name, "keys", len(p.keys))
	return nil
}

// deleteDoomed deletes the queued keys: the first alone, so that none overtakes it, then
// several at a time. What fails is left to the WAL worker.
func (b *backend) deleteDoomed(ctx context.Context, req *logical.Request) {
	defer b.releaseDoomed()
	var mu sync.Mutex
	inRow, deleted, left := 0, 0, 0
	one := func(d doomed) {
		err := b.deleteOne(ctx, req, d)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
			deleted, inRow = deleted+1, 0
		case isSystemic(err):
			left, inRow = left+1, inRow+1
		default:
			left, inRow = left+1, 0
		}
	}
	goOn := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return ctx.Err() == nil && inRow < maxSystemicFailures
	}
	if d, ok := b.doomed.take(); ok {
		one(d)
	}
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for goOn() {
				d, ok := b.doomed.take()
				if !ok {
					return
				}
				one(d)
			}
		})
	}
	group.Wait()
	if deleted+left > 0 {
		b.log(req).Info("keys of blocked roles deleted", "deleted", deleted, "left_to_wal", left+b.doomed.waiting())
	}
}

func (b *backend) deleteOne(ctx context.Context, req *logical.Request, d doomed) error {
	defer b.wal.release(d.walID)
	ctx, cancel := context.WithTimeout(ctx, doomedBudget)
	defer cancel()
	snap, err := b.current(ctx, req.Storage)
	if err == nil {
		err = b.retryWithCurrentKey(ctx, req, &snap, func(snap *snapshot) error { return b.destroy(ctx, snap, d.credential) })
	}
	if err == nil {
		err = b.deleteWAL(ctx, req.Storage, d.walID)
	}
	log := b.log(req).With("role", d.role, "spend", dollars(d.spend)).With(d.attrs()...)
	if err != nil {
		log.Warn("key of a blocked role not deleted; its WAL entry remains", "error", err)
		return err
	}
	log.Info("key of a blocked role deleted")
	return nil
}

// releaseDoomed leaves all queued keys to the WAL worker.
func (b *backend) releaseDoomed() {
	for {
		d, ok := b.doomed.take()
		if !ok {
			return
		}
		b.wal.release(d.walID)
	}
}
