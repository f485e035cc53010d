package openaisecrets

// This file owns how WAL entries are written and deleted, and what this process
// remembers of them, so that a run reads only the entries that it acts on.
//
// What must stay true: an entry is never acted on while a request of this process
// may be using it, whatever the clock says; what is remembered is checked against
// storage before it is acted on; at 100,000 entries it takes some 20 MiB.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/go-secure-stdlib/base62"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// walNote is what is remembered of an entry. Times are Unix seconds.
type walNote struct {
	kind    string
	created int64
	ends    int64 // when its key ends; 0 = unknown or never
	notDue  int64 // not acted on before; 0 = at once
	seen    int   // the refresh that last saw it in storage
	kept    bool  // reported and not executed: its key was handed out
}

// walIndex is safe for concurrent use.
type walIndex struct {
	mu      sync.Mutex
	notes   map[string]walNote
	inUse   map[string]bool
	refresh int
}

func newWALIndex() *walIndex {
	return &walIndex{notes: map[string]walNote{}, inUse: map[string]bool{}}
}

// use marks an entry as a request's own until release.
func (x *walIndex) use(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.inUse[id] = true
}

func (x *walIndex) release(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.inUse, id)
}

// get returns what is remembered of an entry.
func (x *walIndex) get(id string) (note walNote, known bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	note, known = x.notes[id]
	return note, known
}

// put remembers an entry, which the refresh in progress may not see.
func (x *walIndex) put(id string, note walNote) {
	x.mu.Lock()
	defer x.mu.Unlock()
	note.seen = x.refresh + 1
	x.notes[id] = note
}

// forget is for an entry that is deleted.
func (x *walIndex) forget(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.notes, id)
}

// listed takes note of all IDs that storage holds, and returns those of which
// nothing is remembered, or a time that lies in the future: the clock was ahead. It
// leaves out what a request uses, whose entry may be about to be deleted.
func (x *walIndex) listed(ids []string, now time.Time) (unknown []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.refresh++
	for _, id := range ids {
		note, known := x.notes[id]
		if (!known || note.created > now.Add(clockSlack).Unix()) && !x.inUse[id] {
			unknown = append(unknown, id)
		}
		if !known {
			continue
		}
		note.seen = max(note.seen, x.refresh)
		x.notes[id] = note
	}
	for id, note := range x.notes {
		if note.seen < x.refresh {
			delete(x.notes, id)
		}
	}
	return unknown
}

// due returns the entries of a kind that may be acted on, those first whose key
// may still work. Apart from that the order differs each time, so that entries
// which always fail cannot keep others from their turn.
func (x *walIndex) due(kind string, now time.Time, minAge time.Duration) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	unix := now.Unix()
	var live, invalid []string
	for id, note := range x.notes {
		switch {
		case note.kind != kind || x.inUse[id] || unix < note.notDue || time.Unix(unix, 0).Sub(time.Unix(note.created, 0)) < minAge:
		case note.ends != 0 && note.ends < unix:
			invalid = append(invalid, id)
		default:
			live = append(live, id)
		}
	}
	for _, ids := range [][]string{live, invalid} {
		rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] }) // #nosec G404 -- an order, not a secret
	}
	return append(live, invalid...)
}

// keep marks an entry as one that is reported and not executed, until a time.
func (x *walIndex) keep(id string, until time.Time) (first bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	note, known := x.notes[id]
	first = known && !note.kept
	note.kept, note.notDue = true, until.Unix()
	if known {
		x.notes[id] = note
	}
	return first
}

// totals counts the entries that wait for their deletion, with the creation of the
// oldest in Unix seconds (0 = none), and those that are kept.
func (x *walIndex) totals() (entries int, oldest int64, kept int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, note := range x.notes {
		if note.kept {
			kept++
			continue
		}
		entries++
		if oldest == 0 || note.created < oldest {
			oldest = note.created
		}
	}
	return entries, oldest, kept
}

// beginWAL writes the entry of a create, which no worker acts on until release.
// framework.PutWAL gives an ID only once the entry can be seen.
func (b *backend) beginWAL(ctx context.Context, s logical.Storage, kind string, data any) (id string, err error) {
	if id, err = base62.Random(32); err != nil {
		return "", err
	}
	b.wal.use(id)
	if err = putWALEntry(ctx, s, id, kind, data, b.now()); err != nil {
		b.wal.release(id)
	}
	return id, err
}

func putWALEntry(ctx context.Context, s logical.Storage, id, kind string, data any, created time.Time) error {
	value, err := json.Marshal(framework.WALEntry{Kind: kind, Data: data, CreatedAt: created.Unix()})
	if err != nil {
		return err
	}
	return s.Put(ctx, &logical.StorageEntry{Key: framework.WALPrefix + id, Value: value})
}

// deleteWAL deletes an entry whose purpose is served.
func (b *backend) deleteWAL(ctx context.Context, s logical.Storage, id string) error {
	if err := framework.DeleteWAL(ctx, s, id); err != nil {
		return fmt.Errorf("%w: %w", errWAL, err)
	}
	b.wal.forget(id)
	return nil
}

// errWAL says that storage fails, which other entries would meet, too.
var errWAL = errors.New("the WAL cannot be read or written")

// The kinds of WAL entries.
const (
	// journalAccount and journalKey name an account, or a key of one that stays,
	// about to be created.
	journalAccount = "service_account"
	journalKey     = "api_key"
	// journalRevoked and journalRevokedKey name one that must be deleted and that
	// no request works on any more: a revocation has failed or is not final, or its
	// key has expired.
	journalRevoked    = "revoked_service_account"
	journalRevokedKey = "revoked_api_key"
	// journalAdminKey names an admin key about to be created.
	journalAdminKey = "admin_key"
)

// journalKinds are the kinds whose endpoints OpenAI limits independently.
var journalKinds = []string{journalRevoked, journalRevokedKey, journalAccount, journalKey, journalAdminKey}

// errHandedOut is the outcome of an entry whose credential was handed out, so that
// another Vault with the same storage must hold its lease.
var errHandedOut = errors.New("its key has been used since its create, so it was handed out")
