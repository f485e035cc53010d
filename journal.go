package openaisecrets

// This file owns Vault's WAL as this engine uses it: how an entry is written, and
// how one is executed.
//
// What must stay true: an entry ends only when what it names is proven to be
// deleted or was never created; each kind of entry has runs of its own, so that one
// throttled endpoint keeps no other waiting; each try is bounded in time.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-secure-stdlib/base62"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

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

const (
	// maxLines bounds the lines of the log of a run.
	maxLines = 10
)

// journalKind is the kind of a credential's entry.
func journalKind(c credential, revoked bool) string {
	switch {
	case c.isKey() && revoked:
		return journalRevokedKey
	case c.isKey():
		return journalKey
	case revoked:
		return journalRevoked
	}
	return journalAccount
}

// beginWAL writes the entry of a create, which no worker acts on until release.
// framework.PutWAL gives an ID only once the entry can be seen.
func (b *backend) beginWAL(ctx context.Context, s logical.Storage, kind string, data any) (id string, err error) {
	if id, err = base62.Random(32); err != nil {
		return "", err
	}
	b.work.wal.use(id)
	if err = putWALEntry(ctx, s, id, kind, data, b.now()); err != nil {
		b.work.wal.release(id)
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
	b.work.wal.forget(id)
	return nil
}

// revokedID is the ID of the entry that journalRevoke writes. It follows from the
// credential, so that any number of failed revocations make one entry.
func revokedID(c credential) string {
	name := c.ProjectID + "/" + c.ID
	if c.isKey() {
		name += "/" + c.KeyID
	}
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:16])
}

// journalRevoke notes that a credential must be deleted, and returns the entry's
// ID. A later note of the same credential keeps the time of the first.
func (b *backend) journalRevoke(ctx context.Context, s logical.Storage, c credential) (string, error) {
	id, created := revokedID(c), b.now()
	if note, known := b.work.wal.get(id); known {
		created = time.Unix(note.created, 0)
	}
	kind := journalKind(c, true)
	err := putWALEntry(ctx, s, id, kind, c, created)
	if err == nil {
		b.work.wal.put(id, newWALNote(kind, created, c))
	}
	return id, err
}

// endRevoked deletes the entry that an earlier try of a revocation left, if this
// process knows of one.
func (b *backend) endRevoked(ctx context.Context, s logical.Storage, c credential) error {
	id := revokedID(c)
	if _, known := b.work.wal.get(id); !known {
		return nil
	}
	return b.deleteWAL(ctx, s, id)
}

func newWALNote(kind string, created time.Time, c credential) walNote {
	note := walNote{kind: kind, created: created.Unix()}
	if !c.KeyExpires.IsZero() {
		note.ends = c.KeyExpires.Add(clockSlack).Unix()
	}
	if i := slices.Index(journalKinds, kind); i >= 0 {
		note.kind = journalKinds[i] // and not a copy for each entry
	}
	return note
}

// refreshWAL brings what is remembered of the WAL up to date with storage. It reads
// only entries that are not remembered.
func (b *backend) refreshWAL(ctx context.Context, req *logical.Request) error {
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return fmt.Errorf("listing the WAL: %w", err)
	}
	r := &walRun{backend: b, req: req, began: time.Now()}
	unknown := b.work.wal.listed(ids, b.now())
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
		b.work.wal.put(id, newWALNote(entry.Kind, created, c))
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
	r := &walRun{backend: b, req: req, began: time.Now(), refused: map[string]int{}}
	if kind == journalRevoked || kind == journalRevokedKey {
		minAge = math.MinInt64 // no request works on it any more
	}
	ids := b.work.wal.due(kind, b.now(), minAge)
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
	*backend
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

// errWAL says that storage fails, which other entries would meet, too.
var errWAL = errors.New("the WAL cannot be read or written")

// errProjectRefuses is the outcome of entries that were not tried since others of
// their project failed in this run.
var errProjectRefuses = errors.New("deletes in this project are refused")

// errHandedOut is the outcome of an entry whose credential was handed out, so that
// another Vault with the same storage must hold its lease.
var errHandedOut = errors.New("its key has been used since its create, so it was handed out")

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
		r.work.wal.forget(id)
		return nil
	}
	switch err = act(ctx, entry); {
	case errors.Is(err, errHandedOut):
		if r.work.wal.keep(id, r.now().Add(keptFor)) {
			r.log(r.req).Warn("WAL entry not executed: its key has been used since, so another Vault with a copy of this storage may hold its lease", "kind", entry.Kind, "error", err)
		}
		return nil
	case err == nil:
		err = r.deleteWAL(ctx, r.req.Storage, id)
	}
	if !errors.Is(err, errNotFinal) {
		r.metrics.journalled(err)
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
		r.log(r.req).Warn("WAL entry not executed", "error", err)
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
	return r.rollbackAdminKey(ctx, r.req, key)
}

// entryCredential reads the credential of an entry.
func entryCredential(entry *framework.WALEntry) (c credential, err error) {
	if err := decodeInto(&c, entry.Data); err != nil {
		return c, fmt.Errorf("a WAL entry cannot be read: %w", err)
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("a WAL entry cannot be used: %w", err)
	}
	return c, nil
}

// delete destroys a credential of known ID, unless a static role needs it: then
// only the deletion of its entry had failed.
func (r *walRun) delete(ctx context.Context, c credential) error {
	if held, err := r.staticHolds(ctx, r.req.Storage, c); err != nil || held {
		return err
	}
	r.mu.Lock()
	hopeless := r.refused[c.ProjectID] >= patience
	r.mu.Unlock()
	if hopeless {
		return errProjectRefuses
	}
	snap, err := r.current(ctx, r.req.Storage)
	if err != nil {
		return err
	}
	log := r.log(r.req).With(c.attrs()...)
	if err := r.destroy(ctx, snap, c); err != nil {
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
