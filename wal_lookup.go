package openaisecrets

// This file owns the WAL entries of creates whose answer is not known: they name
// an account or a key, and what OpenAI gave it as an ID must be found in a listing.
//
// What must stay true: an entry counts as never executed only when a listing that
// was read whole, and begun once the entry was old enough, does not show its name;
// what has been used since its create is not deleted, since nobody can use what was
// not handed out.

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

// lookedUp is what the listings of a project show of the names that entries have.
type lookedUp struct {
	began    time.Time
	archived bool
	byName   map[string][]credential
	// used is when a key was last used that has been used later than any request for
	// it can have lasted, all by OpenAI's clock; by the ID of its account, or by its
	// own in entries of keys. Keys that have expired count for nothing.
	used map[string]time.Time
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
			r.work.wal.forget(id)
			return nil
		}
		c, err := entryCredential(entry)
		if err != nil {
			r.metrics.journalled(err)
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
					r.metrics.journalled(err)
				}
				r.outcome(err)
				return
			}
			// The time that a listing takes at a slow pace is not the entries'.
			part := &walRun{backend: r.backend, req: r.req, began: time.Now(), refused: map[string]int{}}
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

// ownName is the name that a create gave.
func (c credential) ownName() string {
	if c.isKey() {
		return c.KeyName
	}
	return c.Name
}

// list reads what a project's listings show of the names.
func (r *walRun) list(ctx context.Context, kind, project string, names map[string]bool) (*lookedUp, error) {
	snap, err := r.current(ctx, r.req.Storage)
	if err != nil {
		return nil, err
	}
	found := &lookedUp{began: r.now(), byName: map[string][]credential{}, used: map[string]time.Time{}}
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
			now := snap.api.NotAfter(r.now())
			for _, k := range page {
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
	if held, err := r.staticHolds(ctx, r.req.Storage, c); err != nil || held || found.archived {
		return err
	}
	created := c.CreatedAt
	if created.IsZero() { // as in entries of before it was kept
		created = time.Unix(entry.CreatedAt, 0)
	}
	matches := found.byName[c.ownName()]
	if len(matches) == 0 && found.began.Sub(created) < time.Duration(r.settling.Load()) {
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
		if err := r.delete(ctx, c); err != nil {
			return err
		}
	}
	return nil
}
