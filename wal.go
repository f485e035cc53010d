package openaisecrets

// This file owns how WAL entries are processed. An entry of a create whose answer was
// lost has only a name, so its ID must be found in a listing.
//
// What must stay true:
//   - an entry is deleted only when its account or key is proven to be deleted, was never
//     created, or is named by a stored static role or config;
//   - each kind of entry has its own runs, so that one throttled endpoint does not
//     delay the others, and each attempt is bounded in time;
//   - a create counts as never executed only if two complete listings, begun once the
//     entry was old enough, do not show its name;
//   - a credential that was used after its create is not deleted, because its key was
//     returned to a client. Only a listing that shows the key proves that it is unused;
//     without one, an account is deleted after two listings, or at once in a disable.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/metrics"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	// maxLines bounds the log lines of one run.
	maxLines = 10
)

// refreshWAL updates the WAL index from storage. It reads only entries that the index
// lacks.
func (b *backend) refreshWAL(ctx context.Context, req *logical.Request) error {
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return fmt.Errorf("%w: %w", errWAL, err)
	}
	r := &walRun{b: b, req: req, began: time.Now()}
	unknown := b.wal.listed(ids, b.now())
	// Shuffled, so that unreadable entries cannot block the others.
	rand.Shuffle(len(unknown), func(i, j int) { unknown[i], unknown[j] = unknown[j], unknown[i] }) // #nosec G404 -- an order, not a secret
	r.each(ctx, unknown, func(ctx context.Context, id string) error {
		entry, err := framework.GetWAL(ctx, req.Storage, id)
		if err != nil {
			return fmt.Errorf("%w: %w", errWAL, err)
		}
		if entry == nil {
			return nil
		}
		var c credential
		_ = decodeInto(&c, entry.Data) // the worker reports an entry that cannot be decoded
		created, now := time.Unix(entry.CreatedAt, 0), b.now()
		if latest := now.Add(clockSlack); created.After(latest) || c.CreatedAt.After(latest) {
			// Written while the clock was ahead; without the correction it would not be
			// processed before that time.
			b.log(req).Warn("WAL entry has a creation time in the future; reset to the current time", "kind", entry.Kind, "created_at", text.Time(created))
			if data, ok := entry.Data.(map[string]any); ok && c.CreatedAt.After(now) {
				data["created_at"] = text.Time(now)
			}
			created = earlier(created, now)
			if err := putWALEntry(ctx, req.Storage, id, entry.Kind, entry.Data, created); err != nil {
				return err
			}
		}
		b.wal.put(id, newWALNote(entry.Kind, created, c))
		if laneOf(entry.Kind) == "" {
			return fmt.Errorf("this version of the plugin does not support WAL entries of kind %q", entry.Kind)
		}
		return nil
	})
	return r.first
}

// runAllWAL processes all entries that are old enough. It returns the most important
// failure, if any, and whether another attempt may succeed.
func (b *backend) runAllWAL(ctx context.Context, req *logical.Request, minAge time.Duration) (again bool, err error) {
	err = b.refreshWAL(ctx, req)
	again = errors.Is(err, errWAL)
	runs := make([]*walRun, len(walKinds))
	var group sync.WaitGroup
	for i, kind := range walKinds {
		group.Go(func() { runs[i] = b.runWAL(ctx, req, kind, minAge) })
	}
	group.Wait()
	for _, run := range runs {
		again = again || run.again || run.cut
		if failure := run.err(); err == nil || errors.Is(err, errNotFinal) && failure != nil {
			err = failure
		}
	}
	return again, err
}

// runWAL processes the entries of a kind that are old enough, and returns the completed
// run. It stops early when OpenAI does not answer or rejects the admin key, since the
// other entries would fail too.
func (b *backend) runWAL(ctx context.Context, req *logical.Request, kind string, minAge time.Duration) *walRun {
	r := &walRun{b: b, req: req, began: time.Now(), minAge: minAge, refused: map[string]int{}}
	if kind == walRevokedAccount || kind == walRevokedKey {
		minAge = math.MinInt64 // no request uses these entries
	}
	ids := b.wal.due(kind, b.now(), minAge)
	if kind == walAccount || kind == walKey {
		r.lookUp(ctx, kind, ids)
	} else {
		r.each(ctx, ids, func(ctx context.Context, id string) error { return r.execute(ctx, id, r.processEntry) })
	}
	return r
}

// err is the first failure, or else errNotFinal if an entry needs another attempt.
func (r *walRun) err() error {
	if r.first == nil && r.waits {
		return errNotFinal
	}
	return r.first
}

// walRun is one run over the entries of a kind.
type walRun struct {
	b     *backend
	req   *logical.Request
	began time.Time // with the monotonic clock
	// minAge is the minimum age of a credential that an unfinished create may delete.
	minAge time.Duration

	mu    sync.Mutex
	first error
	waits bool // an entry is not final yet
	again bool // waits, or a failure may be transient
	cut   bool // entries were skipped because the time was up
	done  int  // entries that were processed, or are kept for later
	inRow int
	lines int // written to the log
	// refused counts, by project, deletes that OpenAI rejected or whose 404 was not
	// proven.
	refused map[string]int
}

// errProjectRefuses is the outcome of entries that are skipped because other deletes in
// their project failed in this run.
var errProjectRefuses = errors.New("skipped: OpenAI rejected other deletes in this project")

// each calls do for the entries, several at a time and each in bounded time, until the
// run's budget is spent.
func (r *walRun) each(ctx context.Context, ids []string, do func(context.Context, string) error) {
	var group sync.WaitGroup
	slots := make(chan struct{}, workers)
	for _, id := range ids {
		slots <- struct{}{}
		if time.Since(r.began) > runBudget {
			r.cut = true
			break
		}
		if ctx.Err() != nil || r.circuitOpen() {
			break
		}
		group.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, tryBudget)
			defer cancel()
			r.outcome(do(ctx, id))
		})
	}
	group.Wait()
}

// execute processes an entry, and deletes it on success.
func (r *walRun) execute(ctx context.Context, id string, act func(context.Context, *framework.WALEntry) error) error {
	entry, err := framework.GetWAL(ctx, r.req.Storage, id)
	if err != nil {
		return fmt.Errorf("%w: %w", errWAL, err)
	}
	if entry == nil {
		r.b.wal.forget(id)
		return nil
	}
	err = act(ctx, entry)
	if !errors.Is(err, errKeyUsed) {
		r.b.wal.unkeep(id)
	}
	switch {
	case errors.Is(err, errKeyUsed):
		if r.b.wal.keep(id, r.b.now().Add(keptFor)) {
			r.b.log(r.req).Warn("WAL entry retained: its key was used after the create, so another Vault with a copy of this storage may hold its lease", "kind", entry.Kind, "error", err)
		}
		return nil
	case errors.Is(err, errUnconfirmed):
		// Skipped for a while, so that a drain comes to the others.
		if r.b.wal.postpone(id, r.b.now().Add(time.Duration(r.b.settling.Load()))) {
			r.b.log(r.req).Warn("unfinished create not found by one listing; if the mount is being disabled, look for its account or key at OpenAI", entryAttrs(entry)...)
		}
		return nil
	case err == nil:
		if err = r.b.deleteWAL(ctx, r.req.Storage, id); err == nil && isPooled(entry.Kind) {
			r.b.metrics.PoolDestroyed(metrics.PoolLost, 1)
		}
	}
	if !errors.Is(err, errNotFinal) {
		r.b.metrics.WALProcessed(err)
	}
	return err
}

// outcome records the result of an entry.
func (r *walRun) outcome(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.done++
		r.inRow = 0
		return
	case errors.Is(err, errNotFinal):
		r.waits, r.again = true, true
		return
	case r.first == nil:
		r.first = err
	}
	r.again = r.again || mayPass(err)
	if isSystemic(err) || errors.Is(err, errWAL) || errors.Is(err, errNotConfigured) {
		r.inRow++
	}
	if client.AsError(err) == nil && !errors.Is(err, context.Canceled) && !errors.Is(err, errProjectRefuses) && r.lines < maxLines {
		// Not a failure at OpenAI, so it may be permanent: logged for each entry.
		r.lines++
		r.b.log(r.req).Warn("WAL entry not processed", "error", err)
	}
}

func (r *walRun) circuitOpen() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.inRow >= maxSystemicFailures
}

// entryAttrs is what the log says of an entry.
func entryAttrs(entry *framework.WALEntry) []any {
	attrs := []any{"kind", entry.Kind, "created_at", text.Time(time.Unix(entry.CreatedAt, 0).UTC())}
	var c credential
	var key adminKeyEntry
	if entry.Kind == walAdminKey && decodeInto(&key, entry.Data) == nil {
		return append(attrs, "name", key.Name)
	} else if decodeInto(&c, entry.Data) == nil {
		return append(append(attrs, c.attrs()...), "key_expires_at", text.Time(c.KeyExpires))
	}
	return attrs
}

// processEntry processes an entry of a revocation or of an admin key. After nil the
// entry can be deleted.
func (r *walRun) processEntry(ctx context.Context, entry *framework.WALEntry) error {
	if entry.Kind != walAdminKey {
		c, err := entryCredential(entry)
		if err != nil {
			return err
		}
		return r.delete(ctx, c)
	}
	var key adminKeyEntry
	if err := decodeInto(&key, entry.Data); err != nil {
		return fmt.Errorf("decoding WAL entry: %w", err)
	}
	if key.Version > adminKeyVersion {
		return newerFormat("WAL entry", key.Version, adminKeyVersion)
	}
	if key.Name == "" {
		return errors.New("invalid WAL entry: name is missing")
	}
	return r.b.rollbackAdminKey(ctx, r.req, key, r.minAge)
}

// delete destroys a credential of known ID, unless a static role still uses it: then
// only the deletion of its entry had failed.
func (r *walRun) delete(ctx context.Context, c credential) error {
	if held, err := r.b.staticHolds(ctx, r.req.Storage, c); err != nil || held {
		return err
	}
	r.mu.Lock()
	blocked := r.refused[c.ProjectID] >= maxSystemicFailures
	r.mu.Unlock()
	if blocked {
		return errProjectRefuses
	}
	snap, err := r.b.current(ctx, r.req.Storage)
	if err != nil {
		return err
	}
	log := r.b.log(r.req).With(c.attrs()...)
	if err := r.b.destroy(ctx, snap, c); err != nil {
		if client.IsDenied(err) || isNotFoundAtAll(err) {
			r.mu.Lock()
			r.refused[c.ProjectID]++
			r.mu.Unlock()
		}
		log.Debug("credential of a WAL entry not deleted yet", "error", err)
		return err
	}
	log.Info("credential of a WAL entry deleted")
	return nil
}

// lookedUp is the result of searching a project's listings for the names of entries.
type lookedUp struct {
	began    time.Time // by the server's clock
	asked    time.Time // the same, with the monotonic clock
	archived bool
	byName   map[string][]credential
	// used has the last use of keys that were used after the request that created them
	// must have ended, by OpenAI's clock. It is indexed by account ID, or by key ID for
	// entries of keys. Expired keys are ignored.
	used map[string]time.Time
	// keyed are the matching accounts for which the listing shows a key.
	keyed map[string]bool
	// young are the keys that are younger than minAge by OpenAI's clock, and their
	// accounts.
	young map[string]bool
	// recent are the matching accounts for which a listing of keys may still lag.
	recent map[string]bool
}

// lookUp processes entries of creates. For each project it reads one listing and, if
// that shows one of the names, a listing of the project's keys.
func (r *walRun) lookUp(ctx context.Context, kind string, ids []string) {
	wanted := map[string]map[string]bool{} // names by project
	entries := map[string][]string{}       // their entries by project
	var mu sync.Mutex
	batch := ids[:min(len(ids), lookUpBatch)]
	r.each(ctx, batch, func(ctx context.Context, id string) error {
		entry, err := framework.GetWAL(ctx, r.req.Storage, id)
		if err != nil {
			return fmt.Errorf("%w: %w", errWAL, err)
		}
		if entry == nil {
			r.b.wal.forget(id)
			return nil
		}
		c, err := entryCredential(entry)
		if err != nil {
			r.b.metrics.WALProcessed(err)
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if wanted[c.ProjectID] == nil {
			wanted[c.ProjectID] = map[string]bool{}
		}
		wanted[c.ProjectID][c.ownName()] = true
		entries[c.ProjectID] = append(entries[c.ProjectID], id)
		return nil
	})
	r.cut, r.done = r.cut || len(batch) < len(ids), 0 // so far entries were only read
	var group sync.WaitGroup
	slots := make(chan struct{}, workers)
	for project, names := range wanted {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			if ctx.Err() != nil || r.circuitOpen() {
				return
			}
			found, err := r.list(ctx, kind, project, names)
			if err != nil {
				for range entries[project] {
					r.b.metrics.WALProcessed(err)
				}
				r.outcome(err)
				return
			}
			// A rate-limited listing must not use up the budget of the entries.
			part := &walRun{b: r.b, req: r.req, began: time.Now(), minAge: r.minAge, refused: map[string]int{}}
			part.each(ctx, entries[project], func(ctx context.Context, id string) error {
				return part.execute(ctx, id, func(ctx context.Context, entry *framework.WALEntry) error {
					return part.processFound(ctx, entry, found)
				})
			})
			if part.first != nil {
				r.outcome(part.first)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.done += part.done
			r.cut = r.cut || part.cut
			r.waits = r.waits || part.waits
			r.again = r.again || part.again
		})
	}
	group.Wait()
}

// list searches a project's listings for the names.
func (r *walRun) list(ctx context.Context, kind, project string, names map[string]bool) (*lookedUp, error) {
	snap, err := r.b.current(ctx, r.req.Storage)
	if err != nil {
		return nil, err
	}
	found := &lookedUp{began: r.b.now(), asked: time.Now(), byName: map[string][]credential{}, used: map[string]time.Time{}, keyed: map[string]bool{}, young: map[string]bool{}, recent: map[string]bool{}}
	accounts := map[string]bool{}
	if kind == walAccount {
		err = snap.api.EachServiceAccount(ctx, project, func(page []client.ServiceAccount) error {
			now := snap.api.NowOr(r.b.now())
			for _, a := range page {
				if names[a.Name] {
					found.byName[a.Name] = append(found.byName[a.Name], credential{ID: a.ID})
					accounts[a.ID] = true
					found.recent[a.ID] = now.Sub(a.CreatedAt) < time.Duration(r.b.settling.Load())
				}
			}
			return nil
		})
	}
	if err == nil && (kind == walKey || len(accounts) > 0) {
		err = snap.api.EachProjectKey(ctx, project, func(page []client.ProjectKey) error {
			now, expiredBy := snap.api.NowOr(r.b.now()), snap.api.NotAfter(r.b.now())
			for _, k := range page {
				for _, id := range []string{k.AccountID, k.UserID} {
					if accounts[id] {
						found.keyed[id] = true
					}
				}
				if r.minAge > 0 && now.Sub(k.CreatedAt) < r.minAge {
					for _, id := range []string{k.ID, k.AccountID, k.UserID} {
						found.young[id] = true
					}
				}
				if kind == walKey && names[k.Name] {
					found.byName[k.Name] = append(found.byName[k.Name], credential{KeyID: k.ID})
				}
				expired := !k.ExpiresAt.IsZero() && expiredBy.After(k.ExpiresAt.Add(clockSlack))
				if expired || !k.LastUsedAt.After(k.CreatedAt.Add(requestBudget+cleanupBudget)) {
					continue
				}
				// OpenAI's API document allows both forms of owner.
				for _, id := range []string{k.ID, k.AccountID, k.UserID} {
					if (kind == walKey && id == k.ID && names[k.Name]) || accounts[id] {
						found.used[id] = k.LastUsedAt
					}
				}
			}
			return nil
		})
	}
	if err != nil {
		if err = snap.unlessArchived(ctx, project, err); err == nil {
			found.archived = true
		}
	}
	return found, err
}

// processFound processes an entry of a create with the result of its search. After nil
// the entry can be deleted.
func (r *walRun) processFound(ctx context.Context, entry *framework.WALEntry, found *lookedUp) error {
	c, err := entryCredential(entry)
	if err != nil {
		return err
	}
	if held, err := r.b.staticHolds(ctx, r.req.Storage, c); err != nil || held || found.archived {
		if err == nil {
			r.b.unseen.forget(c.ownName())
		}
		return err
	}
	created := c.CreatedAt
	if created.IsZero() {
		created = time.Unix(entry.CreatedAt, 0)
	}
	matches := found.byName[c.ownName()]
	if len(matches) == 0 {
		if found.began.Sub(created) < time.Duration(r.b.settling.Load()) {
			return errNotFinal
		}
		return r.b.notListed(c.ownName(), found.asked, !c.KeyExpires.IsZero())
	}
	r.b.unseen.forget(c.ownName())
	for _, match := range matches {
		id := match.ID
		if c.isKey() {
			id, c.KeyID = match.KeyID, match.KeyID
		} else {
			c.ID = match.ID
		}
		if found.keyed[id] { // an earlier listing without its key was wrong
			r.b.unseen.forget(id)
		}
		if used, handedOut := found.used[id]; handedOut {
			return fmt.Errorf("%s, last used at %s: %w", c.describe(), text.Time(used), errKeyUsed)
		}
		// A create can be sent long after its entry was written. A key that is younger than
		// minAge has had no time to show that another Vault has returned it.
		if found.young[id] {
			return errNotFinal
		}
		// The engine never creates an account without a key. If no key is listed, either
		// the listing is incomplete and does not show whether the key is used, or a person
		// has deleted the key and it is absent from every listing.
		if !c.isKey() && !found.keyed[id] && !r.b.beingDisabled(r.req) && (found.recent[id] || !r.b.unseen.confirmed(id, found.asked, time.Duration(r.b.settling.Load()))) {
			return errNotFinal
		}
		r.b.unseen.forget(id)
		if err := r.delete(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// mayPass reports whether a failure may be over within the drain's budget.
func mayPass(err error) bool {
	var unread notRead
	return errors.Is(err, errWAL) || errors.As(err, &unread) || isNotFoundAtAll(err) || isSystemic(err) && !client.IsDenied(err)
}
