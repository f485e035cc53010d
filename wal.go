package openaisecrets

// This file owns how WAL entries are executed. Those of creates whose answer is not
// known name an account or a key, and what OpenAI gave it as an ID must be found in a
// listing.
//
// What must stay true: an entry ends only when what it names is proven to be
// deleted or was never created; each kind of entry has runs of its own, so that one
// throttled endpoint keeps no other waiting; each try is bounded in time. An entry
// counts as never executed only when a listing that was read whole, and begun once the
// entry was old enough, does not show its name; what has been used since its create is
// not deleted, since nobody can use what was not handed out. That it was not used is only
// said by a listing that shows its key.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	// maxLines bounds the lines of the log of a run.
	maxLines = 10
)

// refreshWAL brings what is remembered of the WAL up to date with storage. It reads
// only entries that are not remembered.
func (b *backend) refreshWAL(ctx context.Context, req *logical.Request) error {
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return fmt.Errorf("listing the WAL: %w", err)
	}
	r := &walRun{b: b, req: req, began: time.Now()}
	unknown := b.wal.listed(ids, b.now())
	// Those that cannot be read must not keep others from their turn.
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
		_ = decodeInto(&c, entry.Data) // one that cannot be read is the worker's to complain of
		created, now := time.Unix(entry.CreatedAt, 0), b.now()
		if latest := now.Add(clockSlack); created.After(latest) || c.CreatedAt.After(latest) {
			// It was written under a clock that was ahead, and would not be acted on
			// before that time.
			b.log(req).Warn("WAL entry is dated in the future; dated now instead", "kind", entry.Kind, "created_at", text.Time(created))
			if data, ok := entry.Data.(map[string]any); ok && c.CreatedAt.After(now) {
				data["created_at"] = text.Time(now)
			}
			created = earlier(created, now)
			if err := putWALEntry(ctx, req.Storage, id, entry.Kind, entry.Data, created); err != nil {
				return err
			}
		}
		b.wal.put(id, newWALNote(entry.Kind, created, c))
		if !slices.Contains(journalKinds, entry.Kind) {
			return fmt.Errorf("a WAL entry of kind %q is unknown to this version of the plugin", entry.Kind)
		}
		return nil
	})
	return r.first
}

// runAllWAL executes all entries that are old enough and returns when it has tried
// them, with a failure if there was one, and whether trying again may do better.
func (b *backend) runAllWAL(ctx context.Context, req *logical.Request, minAge time.Duration) (again bool, err error) {
	err = b.refreshWAL(ctx, req)
	runs := make([]*walRun, len(journalKinds))
	var group sync.WaitGroup
	for i, kind := range journalKinds {
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

// runWAL acts on the entries of a kind that are old enough, and returns the run once
// it has ended. It stops early when OpenAI does not answer or refuses the admin key:
// the other entries would fare no better.
func (b *backend) runWAL(ctx context.Context, req *logical.Request, kind string, minAge time.Duration) *walRun {
	r := &walRun{b: b, req: req, began: time.Now(), refused: map[string]int{}}
	if kind == journalRevoked || kind == journalRevokedKey {
		minAge = math.MinInt64 // no request works on it any more
	}
	ids := b.wal.due(kind, b.now(), minAge)
	if kind == journalAccount || kind == journalKey {
		r.lookUp(ctx, kind, ids)
	} else {
		r.each(ctx, ids, func(ctx context.Context, id string) error { return r.execute(ctx, id, r.act) })
	}
	return r
}

// err is the first failure, or else errNotFinal if something must be looked for
// again.
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

	mu    sync.Mutex
	first error
	waits bool // something must be looked for again
	again bool // it does, or what kept an entry from its end may pass
	cut   bool // entries were left for want of time
	done  int  // entries that are ended
	inRow int
	lines int // of the log
	// refused counts by project the deletes that were refused or whose 404 was not
	// proven.
	refused map[string]int
}

// errProjectRefuses is the outcome of entries that were not tried since others of
// their project failed in this run.
var errProjectRefuses = errors.New("deletes in this project are refused")

// each has something done for entries, some at once and each in bounded time, for
// as long as the run may take up further ones.
func (r *walRun) each(ctx context.Context, ids []string, do func(context.Context, string) error) {
	var group sync.WaitGroup
	slots := make(chan struct{}, workers)
	for _, id := range ids {
		slots <- struct{}{}
		if time.Since(r.began) > runBudget {
			r.cut = true
			break
		}
		if ctx.Err() != nil || r.hopeless() {
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

// execute does what an entry asks for, and deletes the entry if that leaves nothing
// to do.
func (r *walRun) execute(ctx context.Context, id string, act func(context.Context, *framework.WALEntry) error) error {
	entry, err := framework.GetWAL(ctx, r.req.Storage, id)
	if err != nil {
		return fmt.Errorf("%w: %w", errWAL, err)
	}
	if entry == nil {
		r.b.wal.forget(id)
		return nil
	}
	switch err = act(ctx, entry); {
	case errors.Is(err, errHandedOut):
		if r.b.wal.keep(id, r.b.now().Add(keptFor)) {
			r.b.log(r.req).Warn("WAL entry not executed: its key has been used since, so another Vault with a copy of this storage may hold its lease", "kind", entry.Kind, "error", err)
		}
		return nil
	case err == nil:
		err = r.b.deleteWAL(ctx, r.req.Storage, id)
	}
	if !errors.Is(err, errNotFinal) {
		r.b.metrics.journalled(err)
	}
	return err
}

// outcome takes note of what came of an entry.
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
	if shared(err) || errors.Is(err, errWAL) || errors.Is(err, errNotConfigured) {
		r.inRow++
	}
	if client.AsError(err) == nil && !errors.Is(err, context.Canceled) && !errors.Is(err, errProjectRefuses) && r.lines < maxLines {
		// Not OpenAI's doing, so it may well stay: said for each entry.
		r.lines++
		r.b.log(r.req).Warn("WAL entry not executed", "error", err)
	}
}

func (r *walRun) hopeless() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.inRow >= patience
}

// act does what an entry of a revocation or of an admin key asks for; nil ends the
// entry.
func (r *walRun) act(ctx context.Context, entry *framework.WALEntry) error {
	if entry.Kind != journalAdminKey {
		c, err := entryCredential(entry)
		if err != nil {
			return err
		}
		return r.delete(ctx, c)
	}
	var key adminKeyEntry
	if err := decodeInto(&key, entry.Data); err != nil {
		return fmt.Errorf("a WAL entry cannot be read: %w", err)
	}
	if key.Version > adminKeyVersion {
		return fmt.Errorf("a WAL entry cannot be used: it was written by a newer version of this plugin (format %d, this one knows %d)", key.Version, adminKeyVersion)
	}
	if key.Name == "" {
		return errors.New("a WAL entry cannot be used: it has no name")
	}
	return r.b.rollbackAdminKey(ctx, r.req, key)
}

// delete destroys a credential of known ID, unless a static role needs it: then
// only the deletion of its entry had failed.
func (r *walRun) delete(ctx context.Context, c credential) error {
	if held, err := r.b.staticHolds(ctx, r.req.Storage, c); err != nil || held {
		return err
	}
	r.mu.Lock()
	hopeless := r.refused[c.ProjectID] >= patience
	r.mu.Unlock()
	if hopeless {
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

// lookedUp is what the listings of a project show of the names that entries have.
type lookedUp struct {
	began    time.Time
	archived bool
	byName   map[string][]credential
	// used is when a key was last used that has been used later than any request for
	// it can have lasted, all by OpenAI's clock; by the ID of its account, or by its
	// own in entries of keys. Keys that have expired count for nothing.
	used map[string]time.Time
	// keyed are the accounts, of those by name, of which the listing of keys shows one.
	keyed map[string]bool
}

// lookUp acts on entries of creates. For each project it reads one listing, and if
// that shows one of the names a listing of the project's keys.
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
			r.b.metrics.journalled(err)
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
	r.cut, r.done = r.cut || len(batch) < len(ids), 0 // to read is not to end
	var group sync.WaitGroup
	slots := make(chan struct{}, workers)
	for project, names := range wanted {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			if ctx.Err() != nil || r.hopeless() {
				return
			}
			found, err := r.list(ctx, kind, project, names)
			if err != nil {
				for range entries[project] {
					r.b.metrics.journalled(err)
				}
				r.outcome(err)
				return
			}
			// The time that a listing takes at a slow pace is not the entries'.
			part := &walRun{b: r.b, req: r.req, began: time.Now(), refused: map[string]int{}}
			part.each(ctx, entries[project], func(ctx context.Context, id string) error {
				return part.execute(ctx, id, func(ctx context.Context, entry *framework.WALEntry) error {
					return part.actFound(ctx, entry, found)
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

// list reads what a project's listings show of the names.
func (r *walRun) list(ctx context.Context, kind, project string, names map[string]bool) (*lookedUp, error) {
	snap, err := r.b.current(ctx, r.req.Storage)
	if err != nil {
		return nil, err
	}
	found := &lookedUp{began: r.b.now(), byName: map[string][]credential{}, used: map[string]time.Time{}, keyed: map[string]bool{}}
	accounts := map[string]bool{}
	if kind == journalAccount {
		err = snap.api.EachServiceAccount(ctx, project, func(page []client.ServiceAccount) error {
			for _, a := range page {
				if names[a.Name] {
					found.byName[a.Name] = append(found.byName[a.Name], credential{ID: a.ID})
					accounts[a.ID] = true
				}
			}
			return nil
		})
	}
	if err == nil && (kind == journalKey || len(accounts) > 0) {
		err = snap.api.EachProjectKey(ctx, project, func(page []client.ProjectKey) error {
			now := snap.api.NotAfter(r.b.now())
			for _, k := range page {
				for _, id := range []string{k.AccountID, k.UserID} {
					if accounts[id] {
						found.keyed[id] = true
					}
				}
				if kind == journalKey && names[k.Name] {
					found.byName[k.Name] = append(found.byName[k.Name], credential{KeyID: k.ID})
				}
				expired := !k.ExpiresAt.IsZero() && now.After(k.ExpiresAt.Add(clockSlack))
				if expired || !k.LastUsedAt.After(k.CreatedAt.Add(requestBudget+cleanupBudget)) {
					continue
				}
				// The document knows owners of both forms.
				for _, id := range []string{k.ID, k.AccountID, k.UserID} {
					if (kind == journalKey && id == k.ID && names[k.Name]) || accounts[id] {
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

// actFound acts on an entry with what listings show of its name; nil ends it.
func (r *walRun) actFound(ctx context.Context, entry *framework.WALEntry, found *lookedUp) error {
	c, err := entryCredential(entry)
	if err != nil {
		return err
	}
	if held, err := r.b.staticHolds(ctx, r.req.Storage, c); err != nil || held || found.archived {
		return err
	}
	created := c.CreatedAt
	if created.IsZero() { // as in entries of before it was kept
		created = time.Unix(entry.CreatedAt, 0)
	}
	matches := found.byName[c.ownName()]
	if len(matches) == 0 && found.began.Sub(created) < time.Duration(r.b.settling.Load()) {
		return errNotFinal
	}
	for _, match := range matches {
		id := match.ID
		if c.isKey() {
			id, c.KeyID = match.KeyID, match.KeyID
		} else {
			c.ID = match.ID
		}
		if used, handedOut := found.used[id]; handedOut {
			return fmt.Errorf("%s, last used at %s: %w", c.what(), text.Time(used), errHandedOut)
		}
		// The engine makes no account without a key, so the listing lacks it and does
		// not say whether it is used; or a person has deleted it, and all listings do.
		if !c.isKey() && !found.keyed[id] && !r.b.isDraining() && !r.b.unseen.confirmed(id, time.Now(), time.Duration(r.b.settling.Load())) {
			return errNotFinal
		}
		r.b.unseen.forget(id)
		if err := r.delete(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// mayPass reports whether what kept a WAL entry from its end may pass within the
// drain's budget.
func mayPass(err error) bool {
	return isNotFoundAtAll(err) || shared(err) && !client.IsDenied(err)
}
