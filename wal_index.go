package openaisecrets

// This file owns how WAL entries are written and deleted, and this process's index of
// them, so that a run reads only the entries that it processes.
//
// What must stay true: an entry is never processed while a request or the pool of this
// process may be using it, regardless of the clock: the worker asks whether it is used
// before it reads the entry, and the use ends after the entry is deleted; an entry is
// read from storage again before it is processed; the index of 100,000 entries takes about 20 MiB.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-secure-stdlib/base62"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// walNote is an entry in the index. Times are Unix seconds.
type walNote struct {
	kind    string
	created int64
	ends    int64 // when its key expires; 0 if unknown or never
	notDue  int64 // not processed before this time; 0 means immediately
	seen    int   // the refresh that last found it in storage
	kept    bool  // reported but not processed: its key was returned to a client
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

// use reserves an entry for a request until release.
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

// unused counts the entries that neither a request nor the pool of this process uses.
func (x *walIndex) unused(ids []string) (n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, id := range ids {
		if !x.inUse[id] {
			n++
		}
	}
	return n
}

func (x *walIndex) get(id string) (note walNote, known bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	note, known = x.notes[id]
	return note, known
}

// put adds an entry, which the refresh in progress may not find.
func (x *walIndex) put(id string, note walNote) {
	x.mu.Lock()
	defer x.mu.Unlock()
	note.seen = x.refresh + 1
	x.notes[id] = note
}

// has reports whether there is an entry of a kind.
func (x *walIndex) has(kind string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, note := range x.notes {
		if note.kind == kind {
			return true
		}
	}
	return false
}

// forget removes a deleted entry.
func (x *walIndex) forget(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.notes, id)
}

// listed marks the IDs found in storage, and returns those that the index lacks or has
// with a time in the future, which means that the clock was ahead. It skips entries in
// use by a request, which may be about to delete them.
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

// due returns the entries of a kind that may be processed, those whose key may still
// work first. Otherwise the order is random, so that entries that always fail cannot
// block the others.
func (x *walIndex) due(kind string, now time.Time, minAge time.Duration) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	unix := now.Unix()
	var live, invalid []string
	for id, note := range x.notes {
		switch {
		case note.kind != kind || x.inUse[id] || waits(now, time.Unix(note.notDue, 0), keptFor) || time.Unix(unix, 0).Sub(time.Unix(note.created, 0)) < minAge:
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

// keep retains an entry, unprocessed, until a time.
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

// unkeep counts an entry as pending again: its key has expired since, or is known to be
// this Vault's.
func (x *walIndex) unkeep(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if note, known := x.notes[id]; known && note.kept {
		note.kept = false
		x.notes[id] = note
	}
}

// postpone skips an entry until a time. first is true for the first time.
func (x *walIndex) postpone(id string, until time.Time) (first bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	note, known := x.notes[id]
	first = known && note.notDue == 0
	if note.notDue = until.Unix(); known {
		x.notes[id] = note
	}
	return first
}

// totals counts the pending entries, with the creation of the oldest in Unix seconds
// (0 if there is none), and the retained ones.
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

// beginWAL writes the entry of a create, which no worker processes until release.
// framework.PutWAL is not used because it returns the ID only after the entry is
// visible.
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

func (b *backend) deleteWAL(ctx context.Context, s logical.Storage, id string) error {
	if err := framework.DeleteWAL(ctx, s, id); err != nil {
		return fmt.Errorf("%w: %w", errWAL, err)
	}
	b.wal.forget(id)
	return nil
}

// errWAL is a storage failure, which affects other entries too.
var errWAL = errors.New("reading or writing the WAL failed")

// The kinds of WAL entries.
const (
	// walAccount names an account that is about to be created, walKey a key of an
	// existing account.
	walAccount = "service_account"
	walKey     = "api_key"
	// walRevokedAccount and walRevokedKey name one, by ID, that must be deleted, for any
	// reason, and that no request uses.
	walRevokedAccount = "revoked_service_account"
	walRevokedKey     = "revoked_api_key"
	// walPooledAccount and walPooledKey are walAccount and walKey of a pool's create. The
	// entry remains until the credential is returned or recorded for deletion, and never
	// has the key.
	walPooledAccount = "pooled_service_account"
	walPooledKey     = "pooled_api_key"
	// walAdminKey names an admin key about to be created.
	walAdminKey = "admin_key"
)

// walKinds lists the kinds. OpenAI limits their endpoints independently. A pool entry
// that neither a request nor the pool of this process uses is one of a create.
var walKinds = []string{walRevokedAccount, walRevokedKey, walAccount, walKey, walAdminKey}

// laneOf returns the kind of walKinds whose worker processes an entry, "" if the kind is
// unknown.
func laneOf(kind string) string {
	switch kind {
	case walPooledAccount:
		return walAccount
	case walPooledKey:
		return walKey
	}
	if i := slices.Index(walKinds, kind); i >= 0 {
		return walKinds[i]
	}
	return ""
}

func isPooled(kind string) bool { return kind == walPooledAccount || kind == walPooledKey }

// errKeyUsed is the outcome of an entry whose credential was returned to a client, so
// that another Vault with the same storage must hold its lease.
var errKeyUsed = errors.New("the key was used after its create, so it was returned to a client")
