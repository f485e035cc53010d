package openaisecrets

// This file owns the journal: Vault's WAL as this engine uses it, and the
// worker that acts on it.
//
// What must stay true: an entry ends only when what it names is known to be
// gone; the worker runs once at a time, only where this node may write the
// journal, and ends with the backend. But for the drain of a mount that is
// being disabled nothing of it runs within a request of Vault's, which holds a
// lock that a seal or a step-down needs.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

// The kinds of journal entries.
const (
	// journalAccount and journalKey name an account, or a key of one that stays,
	// about to be created.
	journalAccount = "service_account"
	journalKey     = "api_key"
	// journalRevoked and journalRevokedKey name one that must go and that no
	// request works on any more: a revoke has failed, or its key is dead by
	// itself.
	journalRevoked    = "revoked_service_account"
	journalRevokedKey = "revoked_api_key"
	// journalAdminKey names an admin key about to be created.
	journalAdminKey = "admin_key"
)

const (
	// journalMinAge is how old an entry of a create must be before it is acted
	// upon: older than any request that may still be using it, which is the
	// budget of a request (60 s) plus that of its cleaning up (30 s).
	journalMinAge = 2 * time.Minute
	// leaseTransit is how long Vault may take from the engine's answer to the
	// stored lease.
	leaseTransit = 2 * time.Second
	// workers bounds the deletes that a pass has under way.
	workers = 4
	// patience is how many entries in a row may fail for a reason that others
	// would share before a pass gives up until the next tick.
	patience = 3
)

// background is the state of the worker.
type background struct {
	ctx   context.Context // ends with the backend
	close context.CancelFunc
	busy  chan struct{}                      // one slot: held by a pass
	stop  atomic.Pointer[context.CancelFunc] // ends the pass under way

	entries atomic.Int64 // left over by the last pass
	oldest  atomic.Int64 // when the oldest of them was made, Unix seconds; 0 = none
}

func newBackground() *background {
	ctx, cancel := context.WithCancel(context.Background())
	return &background{ctx: ctx, close: cancel, busy: make(chan struct{}, 1)}
}

// kick starts a pass unless one is under way. It returns at once.
func (b *backend) kick(req *logical.Request) {
	select {
	case b.work.busy <- struct{}{}:
	default:
		return
	}
	// Of the request only what outlives it.
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	ctx, cancel := context.WithCancel(b.work.ctx)
	b.work.stop.Store(&cancel)
	go func() {
		defer func() { <-b.work.busy }()
		defer cancel()
		b.pass(client.Background(ctx), req, journalMinAge)
	}()
}

// pass is all that this engine does by itself, in order of urgency. minAge is
// how old a journal entry must be before it is acted upon.
func (b *backend) pass(ctx context.Context, req *logical.Request, minAge time.Duration) {
	log := b.log(req)
	primary := b.WriteSafeReplicationState()
	if primary {
		if err := b.deleteRetired(ctx, req); err != nil && ctx.Err() == nil {
			log.Warn("retired admin keys not looked at", "error", err)
		}
		// It only starts here: the sweep has a goroutine of its own.
		if err := b.tidyIfDue(ctx, req); err != nil && ctx.Err() == nil {
			log.Warn("sweep not started", "error", err)
		}
	}
	if err := b.workJournal(ctx, req, minAge); err != nil && ctx.Err() == nil {
		// Vault logs nothing of it, and the entries' own failures are at debug.
		log.Warn("journal not worked off", "entries", b.work.entries.Load(), "oldest", time.Unix(b.work.oldest.Load(), 0).UTC(), "error", err)
	}
}

// drain works off the journal within the request, however young its entries:
// the mount is being disabled and its storage goes next.
func (b *backend) drain(ctx context.Context, req *logical.Request) error {
	if stop := b.work.stop.Load(); stop != nil {
		(*stop)() // what the worker does now is done here
	}
	b.tidy.stop()
	select {
	case b.work.busy <- struct{}{}:
		defer func() { <-b.work.busy }()
	case <-ctx.Done():
		return ctx.Err()
	}
	// What is being created has its entry, but may not be at OpenAI yet; and of
	// what has just been handed out Vault must have stored the lease before it
	// revokes all there are.
	for b.issuing.Load() > 0 || time.Since(time.Unix(0, b.lastIssued.Load())) < leaseTransit {
		if err := client.Wait(ctx, 50*time.Millisecond); err != nil {
			break
		}
	}
	if unlock, err := b.lockConfig(ctx); err == nil {
		unlock() // a rotation was finished; its entry is settled below
	}
	err := b.workJournal(ctx, req, 0)
	if b.WriteSafeReplicationState() {
		if retiredErr := b.endRetired(ctx, req); err == nil {
			err = retiredErr
		}
	}
	if err != nil {
		b.log(req).Error("the mount is being disabled with a journal that is not worked off; its accounts are left at OpenAI",
			"entries", b.work.entries.Load(), "error", err)
	}
	return err
}

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

// journalRevoke notes that a credential must go, and returns the entry's ID.
// The ID follows from the credential, so that any number of failed revokes make
// one entry.
func journalRevoke(ctx context.Context, s logical.Storage, c credential) (string, error) {
	name := c.ProjectID + "/" + c.ID
	if c.isKey() {
		name += "/" + c.KeyID
	}
	sum := sha256.Sum256([]byte(name))
	id := hex.EncodeToString(sum[:16])
	value, err := json.Marshal(framework.WALEntry{Kind: journalKind(c, true), Data: c, CreatedAt: time.Now().Unix()})
	if err != nil {
		return id, err
	}
	return id, s.Put(ctx, &logical.StorageEntry{Key: framework.WALPrefix + id, Value: value})
}

// workJournal acts on every entry that is old enough, and returns the first
// failure. It stops early when OpenAI does not answer or refuses the admin
// key: the other entries would fare no better.
func (b *backend) workJournal(ctx context.Context, req *logical.Request, minAge time.Duration) error {
	// A pass can last: an entry must be old enough when it begins, since what it
	// then reads at OpenAI may be read before that entry's turn comes.
	began := b.now()
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return fmt.Errorf("listing the journal: %w", err)
	}
	// A pass can last for hours where OpenAI's pace is slow, and meanwhile what is
	// known is this.
	b.work.entries.Store(int64(len(ids)))
	// In another order each time, so that entries which always fail cannot keep
	// others from their turn.
	rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] }) // #nosec G404 -- an order, not a secret
	p := &journalPass{backend: b, req: req, listings: map[string]func() ([]named, error){}, forbidden: map[string]int{}}
	var group sync.WaitGroup
	slots := make(chan struct{}, workers)
	left, oldest := 0, int64(0)
	keep := func(entry *framework.WALEntry) {
		left++
		if entry.CreatedAt != 0 && (oldest == 0 || entry.CreatedAt < oldest) {
			oldest = entry.CreatedAt
		}
	}
	var mu sync.Mutex // guards left and oldest while the group works
	for i, id := range ids {
		entry, err := framework.GetWAL(ctx, req.Storage, id)
		if err != nil {
			p.failed(fmt.Errorf("reading the journal: %w", err))
			mu.Lock()
			left += len(ids) - i - 1
			keep(&framework.WALEntry{CreatedAt: b.work.oldest.Load()}) // as it was known to be
			mu.Unlock()
			break
		}
		if entry == nil {
			continue
		}
		if seen := b.work.oldest.Load(); entry.CreatedAt != 0 && (seen == 0 || entry.CreatedAt < seen) {
			b.work.oldest.Store(entry.CreatedAt)
		}
		revoked := entry.Kind == journalRevoked || entry.Kind == journalRevokedKey
		young := !revoked && began.Sub(time.Unix(entry.CreatedAt, 0)) < minAge
		if young || p.hopeless() || ctx.Err() != nil {
			mu.Lock()
			keep(entry)
			mu.Unlock()
			continue
		}
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			err := p.act(ctx, entry.Kind, entry.Data)
			if err == nil {
				err = framework.DeleteWAL(ctx, req.Storage, id)
			}
			p.failed(err)
			if err == nil {
				b.work.entries.Add(-1)
			} else {
				mu.Lock()
				keep(entry)
				mu.Unlock()
			}
		})
	}
	group.Wait()
	b.work.entries.Store(int64(left))
	b.work.oldest.Store(oldest)
	return p.first
}

// journalPass is one run over the journal.
type journalPass struct {
	*backend
	req *logical.Request

	mu       sync.Mutex
	first    error
	inRow    int
	listings map[string]func() ([]named, error)
	// forbidden counts by project the deletes that were not allowed.
	forbidden map[string]int
}

// errForbidden is the outcome of entries that were not tried since others of
// their project were refused in this pass.
var errForbidden = errors.New("the admin key may not delete in this project")

// failed takes note of an entry's outcome.
func (p *journalPass) failed(err error) {
	if errors.Is(err, errNotFinal) {
		return // it only waits
	}
	p.metrics.journalled(err)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		p.inRow = 0
		return
	}
	if p.first == nil {
		p.first = err
	}
	if shared(err) {
		p.inRow++
	} else if client.AsError(err) == nil && !errors.Is(err, context.Canceled) && !errors.Is(err, errForbidden) {
		// Not OpenAI's doing, so it may well stay: said for each entry.
		p.log(p.req).Warn("journal entry not worked off", "error", err)
	}
}

// shared reports whether err has a cause that other calls would share.
func shared(err error) bool {
	e := client.AsError(err)
	return e != nil && (e.Ambiguous() || e.Status == 0 || e.RateLimited() || e.Status == http.StatusUnauthorized)
}

func (p *journalPass) hopeless() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.inRow >= patience
}

// act does what an entry asks for; nil ends the entry.
func (p *journalPass) act(ctx context.Context, kind string, data any) error {
	switch kind {
	case journalAccount, journalRevoked, journalKey, journalRevokedKey:
		var c credential
		if err := decodeInto(&c, data); err != nil {
			return fmt.Errorf("a journal entry cannot be read: %w", err)
		}
		if err := c.check(); err != nil {
			return fmt.Errorf("a journal entry cannot be used: %w", err)
		}
		snap, err := p.current(ctx, p.req.Storage)
		if err != nil {
			return err
		}
		log := p.log(p.req).With(c.attrs()...)
		if held, err := p.staticHolds(ctx, p.req.Storage, c); err != nil || held {
			return err // only the deletion of its entry had failed
		}
		p.mu.Lock()
		hopeless := p.forbidden[c.ProjectID] >= patience
		p.mu.Unlock()
		if hopeless {
			return errForbidden
		}
		if err := p.destroyNamed(ctx, snap, c); err != nil {
			if client.IsDenied(err) {
				p.mu.Lock()
				p.forbidden[c.ProjectID]++
				p.mu.Unlock()
			}
			log.Debug("journalled credential not deleted yet", "error", err)
			return err
		}
		log.Info("journalled credential is gone")
		return nil
	case journalAdminKey:
		var entry adminKeyEntry
		if err := decodeInto(&entry, data); err != nil {
			return fmt.Errorf("a journal entry cannot be read: %w", err)
		}
		if entry.Version > adminKeyVersion {
			return fmt.Errorf("a journal entry cannot be used: it was written by a newer version of this plugin (format %d, this one knows %d)", entry.Version, adminKeyVersion)
		}
		if entry.Name == "" {
			return errors.New("a journal entry cannot be used: it has no name")
		}
		return p.rollbackAdminKey(ctx, p.req, entry)
	default:
		return fmt.Errorf("a journal entry of kind %q is unknown to this version of the plugin", kind)
	}
}

// named is an account or a key as a listing shows it.
type named struct{ id, name string }

// destroyNamed destroys a credential whose ID may not be known. It reads each
// project's accounts, and keys, once in a pass: an entry is older than any
// request that could still create what it names, so one reading holds for all.
func (p *journalPass) destroyNamed(ctx context.Context, snap *snapshot, c credential) error {
	id, name := &c.ID, c.Name
	if c.isKey() {
		id, name = &c.KeyID, c.KeyName
	}
	if *id != "" {
		return p.destroy(ctx, snap, c)
	}
	found, err := p.listing(ctx, snap.api, c)()
	if err != nil {
		return snap.unlessArchived(ctx, c.ProjectID, err)
	}
	for _, n := range found {
		if n.name != name {
			continue
		}
		*id = n.id
		if err := p.destroy(ctx, snap, c); err != nil {
			return err
		}
	}
	return nil
}

// listing returns what reads the listing in which a credential would be, once.
func (p *journalPass) listing(ctx context.Context, api *client.Client, c credential) func() ([]named, error) {
	kind, read := typeAccount+" ", func() (all []named, err error) {
		accounts, err := api.ListServiceAccounts(ctx, c.ProjectID)
		for _, a := range accounts {
			all = append(all, named{a.ID, a.Name})
		}
		return all, err
	}
	if c.isKey() {
		kind, read = typeKey+" ", func() (all []named, err error) {
			keys, err := api.ListProjectKeys(ctx, c.ProjectID)
			for _, k := range keys {
				all = append(all, named{k.ID, k.Name})
			}
			return all, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listings[kind+c.ProjectID] == nil {
		p.listings[kind+c.ProjectID] = sync.OnceValues(read)
	}
	return p.listings[kind+c.ProjectID]
}
