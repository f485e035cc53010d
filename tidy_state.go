package openaisecrets

// This file owns what a run of tidy is and knows, what it shows of itself, what it
// takes for an orphan, and the deletion of one.
//
// What must stay true: the memory that it takes is a hundred bytes or so for each
// account; nothing that storage still names is an orphan.

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	tidyStorageKey = "tidy"
	tidyVersion    = 1
	// maxListed and maxErrors bound what a status shows; the counts are whole.
	maxListed = 1000
	maxErrors = 20
)

// The states of a sweep, as in Vault's PKI engine.
const (
	tidyInactive   = "Inactive"
	tidyRunning    = "Running"
	tidyCancelling = "Cancelling"
	tidyCancelled  = "Cancelled"
	tidyFinished   = "Finished"
	tidyError      = "Error"
)

// tidyEntry is what storage knows of the sweep.
type tidyEntry struct {
	Version     int       `json:"version"`
	LastAutoRun time.Time `json:"last_auto_run"`
}

// getTidyEntry returns nil when the sweep has never run by itself.
func getTidyEntry(ctx context.Context, s logical.Storage) (*tidyEntry, error) {
	stored, err := s.Get(ctx, tidyStorageKey)
	if err != nil {
		return nil, fmt.Errorf("reading the time of the last sweep: %w", err)
	}
	if stored == nil {
		return nil, nil
	}
	var entry tidyEntry
	if err := stored.DecodeJSON(&entry); err != nil {
		return nil, fmt.Errorf("decoding the time of the last sweep: %w", err)
	}
	if entry.Version > tidyVersion {
		return nil, fmt.Errorf("the time of the last sweep was written by a newer version of this plugin (format %d, this one knows %d)", entry.Version, tidyVersion)
	}
	return &entry, nil
}

func putTidyEntry(ctx context.Context, s logical.Storage, lastAutoRun time.Time) error {
	entry, err := logical.StorageEntryJSON(tidyStorageKey, tidyEntry{Version: tidyVersion, LastAutoRun: lastAutoRun.UTC().Truncate(time.Second)})
	if err != nil {
		return err
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing the time of the sweep: %w", err)
	}
	return nil
}

// tidyStatus describes a sweep. It is lost with the process, as in Vault's PKI
// engine; what a lost one has not done, the next does.
type tidyStatus struct {
	state             string
	apply, automatic  bool
	safetyBuffer      time.Duration
	started, finished time.Time
	message           string

	projects, done, skipped  int
	accounts, keys           int
	orphans, deleted, failed int
	// waiting are orphans without a key that only a forced run deletes, unconfirmed
	// accounts that so far one listing shows without one.
	waiting, unconfirmed int
	listed               []orphan
	errors               []string
}

// dropKeys takes a project's keys off the orphans: there is nothing that could
// be done about them.
func (t *tidyStatus) dropKeys(project string, keys int) {
	t.orphans -= keys
	t.listed = slices.DeleteFunc(t.listed, func(o orphan) bool { return o.isKey() && o.ProjectID == project })
}

// tidyState holds the sweep under way, or what is known of the last one. The
// zero value is ready.
type tidyState struct {
	mu     sync.Mutex
	status tidyStatus
	cancel context.CancelFunc // nil when none is under way

	// absent is what earlier runs saw, by project. It is the run's under way.
	absent    map[string]absences
	witnesses witnesses

	stall time.Duration // tidyStall if 0
}

// note changes the status.
func (t *tidyState) note(change func(*tidyStatus)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.status)
}

// current returns a copy of the status.
func (t *tidyState) current() tidyStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	status := t.status
	status.listed, status.errors = slices.Clone(status.listed), slices.Clone(status.errors)
	return status
}

// stop asks the sweep under way, if there is one, to end.
func (t *tidyState) stop() (wasRunning bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cancel == nil {
		return false
	}
	t.cancel()
	t.status.state = tidyCancelling
	return true
}

// sweep is one run. It works from one goroutine.
type sweep struct {
	b                *backend
	storage          logical.Storage
	mount            string
	log              hclog.Logger
	apply, automatic bool
	buffer           time.Duration
	// partial says that not every role could be read, so that nothing is known
	// to be named by none.
	partial bool
	// claims are the accounts and keys, by ID and by name, that roles hold and that
	// the journal names. They are read once, before any listing. A role cannot name
	// one of this mount's own later, see checkAdopted, and of what the journal has
	// named since only the journal's own work is done twice.
	claims hashes
	// longest is how old an account without a key must be.
	longest time.Duration
	// absences is how many accounts without a key may still be deleted.
	absences int
	deleted  int // orphans so far
	// inRow counts the deletes of a project that failed for a shared reason, and
	// stalls the projects in which nothing went on.
	inRow, stalls int
	// moved says that a call has succeeded.
	moved func()
	// keysGo and keysStay say what the first delete of an expired key has shown:
	// OpenAI's documents disagree on whether it deletes keys of service accounts.
	// Where it does not there is no use in trying others, which are dead anyway.
	keysGo, keysStay bool
}

// fail notes a failure, unless it is the end of the sweep.
func (s *sweep) fail(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	s.log.Warn("sweep: left to the next one", "error", err)
	s.b.tidy.note(func(t *tidyStatus) {
		if len(t.errors) < maxErrors {
			t.errors = append(t.errors, err.Error())
		}
	})
}

// orphan is an account, or a key of one that stays, that nobody can need any
// more.
type orphan struct {
	credential
	createdAt time.Time
	age       time.Duration
	why       string
}

// hashes are the hashes of texts of which there may be hundreds of thousands. Two
// texts that share one only have something be left alone.
type hashes []uint64

func (h *hashes) add(texts ...string) {
	for _, text := range texts {
		if text != "" {
			*h = append(*h, hash(text))
		}
	}
}

// has reports whether a text is among them, which must be sorted.
func (h hashes) has(text string) bool {
	_, found := slices.BinarySearch(h, hash(text))
	return found
}

var hashSeed = maphash.MakeSeed()

func hash(text string) uint64 { return maphash.String(hashSeed, text) }

// listedAccount is an account that may be an orphan, in little memory: there may be
// hundreds of thousands. Times are Unix seconds, which fit until 2106.
type listedAccount struct {
	text    string // its ID and its name
	created uint32
	ended   uint32 // when the last of its keys expired
	keys    uint32 // how many keys it has
	idLen   uint16
	live    bool // one of them may work
}

func (a listedAccount) id() string { return a.text[:a.idLen] }

func (a listedAccount) name() string { return a.text[a.idLen:] }

// listedKey is an expired key of an account that stays.
type listedKey struct {
	id, name, account string
	created, ended    int64
}

// finding is what a project holds of this mount's.
type finding struct {
	accounts, keys int             // all that bear the tag
	expired        []listedAccount // orphans all of whose keys are seen to have expired
	expiredKeys    []listedKey     // orphans
	absent         []listedAccount // orphans that two listings show without a key
	unconfirmed    int             // accounts that so far only one shows so
	began, at      time.Time       // when the listings began and were complete
}

func (f finding) orphans() int { return len(f.expired) + len(f.expiredKeys) + len(f.absent) }

// id is the ID of the orphan of that number.
func (f finding) id(i int) string {
	expired, keys := len(f.expired), len(f.expiredKeys)
	switch {
	case i < expired:
		return f.expired[i].id()
	case i < expired+keys:
		return f.expiredKeys[i-expired].id
	}
	return f.absent[i-expired-keys].id()
}

// holds is how long a finding may be acted upon. Where it takes hours to list a
// project, to list it again and again would take all of the pace.
func (f finding) holds() time.Duration { return max(listingHolds, 10*f.at.Sub(f.began)) }

// seconds is a time in Unix seconds, as far as it fits.
func seconds(t time.Time) uint32 { return uint32(max(0, min(t.Unix(), math.MaxUint32))) } // #nosec G115 -- bounded

// orphan returns the finding's orphan of that number.
func (s *sweep) orphan(project string, f finding, i int) orphan {
	if i < len(f.expired) {
		return s.orphanAccount(project, f.expired[i])
	}
	if i -= len(f.expired); i >= len(f.expiredKeys) {
		return s.orphanAccount(project, f.absent[i-len(f.expiredKeys)])
	}
	k := f.expiredKeys[i]
	created := time.Unix(k.created, 0)
	return orphan{
		credential: credential{Version: credentialVersion, Type: typeKey, ProjectID: project, ID: k.account, KeyName: k.name, KeyID: k.id, CreatedAt: created},
		createdAt:  created, age: s.b.now().Sub(created), why: "it expired at " + text.Time(time.Unix(k.ended, 0)),
	}
}

func (s *sweep) orphanAccount(project string, a listedAccount) orphan {
	created, last := time.Unix(int64(a.created), 0), text.Time(time.Unix(int64(a.ended), 0))
	why := fmt.Sprintf("its %d keys have expired, the last at %s", a.keys, last)
	switch a.keys {
	case 0:
		why = "it has no key"
	case 1:
		why = "its key expired at " + last
	}
	return orphan{
		credential: credential{Version: credentialVersion, Type: typeAccount, ProjectID: project, Name: a.name(), ID: a.id(), CreatedAt: created},
		createdAt:  created, age: s.b.now().Sub(created), why: why,
	}
}

const (
	// A key that was handed out is remembered if the last one was so long before;
	// of each project so many are. Without that spacing a busy mount would remember
	// only keys that are too young for a listing to be held against.
	witnessSpacing = 2 * time.Minute
	maxWitnesses   = 8
)

// witness is a key that OpenAI must list as long as it lives.
type witness struct {
	id, account string
	at, end     time.Time // when it was made, and when it expires, zero = never
}

// valid reports whether a listing must show the key: it is old enough for every
// server of OpenAI's to know it, and has not expired.
func (w witness) valid(now time.Time) bool {
	return now.Sub(w.at) >= notFinalBefore && (w.end.IsZero() || now.Before(w.end))
}

// witnesses are the keys that this process has handed out lately, by project. The
// zero value is ready.
type witnesses struct {
	mu   sync.Mutex
	keys map[string][]witness
}

// add remembers a key that is handed out.
func (w *witnesses) add(c credential, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	keys := w.keys[c.ProjectID]
	if n := len(keys); c.KeyID == "" || (n > 0 && now.Sub(keys[n-1].at).Abs() < witnessSpacing) {
		return
	}
	if w.keys == nil {
		w.keys = map[string][]witness{}
	}
	if len(keys) == maxWitnesses {
		keys = slices.Delete(keys, 0, 1)
	}
	w.keys[c.ProjectID] = append(keys, witness{id: c.KeyID, account: c.ID, at: now, end: c.KeyExpires})
}

func (w *witnesses) of(project string) []witness {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.keys[project])
}

func (w *witnesses) forget(project, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.keys[project] == nil { // it was a static role's
		return
	}
	w.keys[project] = slices.DeleteFunc(w.keys[project], func(k witness) bool { return k.id == id })
}

// absences are the accounts that a project's listings showed without a key, by the
// hash of their ID, and when that was seen first, as time since then. They are lost
// with the process, which only means that they are looked at longer.
type absences map[uint64]time.Time

const (
	// listingHolds is how long a project's listing may be acted upon. At a slow
	// pace the deletes of one project take hours, in which somebody may make a
	// key of an account that had none.
	listingHolds = 5 * time.Minute
)

// ownerless reports a key whose owner is not known. One that has expired is no
// reason to leave a project alone: whosever it is, it keeps nothing in use.
func ownerless(k client.ProjectKey) bool { return k.AccountID == "" && k.UserID == "" }

// unknownOwner is why a project is left alone.
func unknownOwner(k client.ProjectKey) error {
	return fmt.Errorf("key %s is owned by neither a user nor a service account as far as this version can tell, so any account might be in use", k.ID)
}

// staticClaims returns the accounts and keys, by ID and by name, that static roles
// have, and those of their keys that a listing of the project must show. Unlike a
// role's, a static role's account may have no working key and still be in use. One
// that cannot be read may name any.
func (s *sweep) staticClaims(ctx context.Context, project string) (claimed map[string]bool, keys []witness, err error) {
	names, err := s.storage.List(ctx, staticStoragePrefix)
	if err != nil {
		return nil, nil, fmt.Errorf("listing the static roles: %w", err)
	}
	claimed = map[string]bool{}
	for _, name := range names {
		r, err := getStaticRole(ctx, s.storage, name)
		if err != nil {
			return nil, nil, err
		}
		if r == nil {
			continue
		}
		claimed[r.ServiceAccountID], claimed[r.ServiceAccount] = true, true
		for _, k := range r.keys() {
			claimed[k.ID], claimed[k.Name] = true, true
		}
		if r.ProjectID == project && r.Current.ID != "" {
			keys = append(keys, witness{id: r.Current.ID, account: r.ServiceAccountID, at: r.LastRotated, end: r.Current.ExpiresAt})
		}
	}
	return claimed, keys, nil
}

// dead reports whether a key has expired beyond doubt. now is by the earlier of the
// clocks, and OpenAI's other servers may be behind the one that it is of.
func (s *sweep) dead(k client.ProjectKey, now time.Time) bool {
	return !k.ExpiresAt.IsZero() && now.Sub(k.ExpiresAt) > min(clockSlack, s.buffer)
}

// removeOne deletes an orphan. It returns an error when the others of its project
// are not worth a try.
func (s *sweep) removeOne(ctx context.Context, o orphan) error {
	// Anew for each: a rotation may have replaced the admin key.
	snap, err := s.b.current(ctx, s.storage)
	if err == nil {
		err = s.b.destroy(ctx, snap, o.credential)
	}
	if err == nil && o.isKey() && !s.keysGo {
		if s.keysGo, s.keysStay = keyGone(ctx, snap, o.credential); s.keysStay {
			s.moved()
			s.log.Info("OpenAI does not delete keys of service accounts; expired ones stay listed there", "project_id", o.ProjectID, "api_key_id", o.KeyID)
			return nil
		}
	}
	switch {
	case err == nil:
		s.inRow = 0
		s.moved()
		s.deleted++
		s.b.tidy.note(func(t *tidyStatus) { t.deleted++ })
		s.log.Info("orphan deleted", append(o.attrs(), "age", o.age.Truncate(time.Second).String(), "why", o.why)...)
		return nil
	case errors.Is(err, errNotFinal): // the next run looks again
		return nil
	}
	return s.notRemoved(ctx, o, err)
}

// notRemoved notes why an orphan stays. It returns an error when the others of its
// project are not worth a try.
func (s *sweep) notRemoved(ctx context.Context, o orphan, err error) error {
	if ctx.Err() != nil {
		return err
	}
	s.b.tidy.note(func(t *tidyStatus) { t.failed++ })
	s.fail(ctx, fmt.Errorf("%s not deleted: %w", o.what(), err))
	if !shared(err) {
		return nil
	}
	if s.inRow++; s.inRow >= patience {
		return fmt.Errorf("%d deletes in a row have failed, the others are not tried", s.inRow)
	}
	return nil
}

// keyGone looks whether a key that was deleted is gone or stays. Neither is true
// where OpenAI does not say.
func keyGone(ctx context.Context, snap *snapshot, c credential) (gone, stays bool) {
	_, err := snap.api.GetProjectKey(ctx, c.ProjectID, c.KeyID)
	if err == nil {
		return false, true
	}
	return client.IsNotFound(err) && !speaksOfProject(err, c.ProjectID, c.KeyID), false
}

const (
	absenceLimit = 20
)
