package openaisecrets

// This file owns the state and status of a tidy run, what storage claims, and the deletion
// of one orphan. What counts as an orphan is decided by find in tidy.go and by the rules of
// absence in tidy_absence.go.
//
// What must stay true: a run uses about a hundred bytes of memory per account.

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

// The states of a tidy run, as in Vault's PKI engine.
const (
	tidyInactive   = "Inactive"
	tidyRunning    = "Running"
	tidyCancelling = "Cancelling"
	tidyCancelled  = "Cancelled"
	tidyFinished   = "Finished"
	tidyError      = "Error"
)

// tidyEntry is tidy's storage entry.
type tidyEntry struct {
	Version     int       `json:"version"`
	LastAutoRun time.Time `json:"last_auto_run"`
}

// getTidyEntry returns nil if there was no automatic run yet.
func getTidyEntry(ctx context.Context, s logical.Storage) (*tidyEntry, error) {
	var entry tidyEntry
	stored, err := readEntry(ctx, s, tidyStorageKey, "the time of the last tidy run", tidyVersion, &entry)
	if err != nil || stored == nil {
		return nil, err
	}
	return &entry, nil
}

func putTidyEntry(ctx context.Context, s logical.Storage, lastAutoRun time.Time) error {
	return writeEntry(ctx, s, tidyStorageKey, "the time of the last tidy run", tidyEntry{Version: tidyVersion, LastAutoRun: lastAutoRun.UTC().Truncate(time.Second)})
}

// tidyStatus describes a tidy run. It is lost with the process, as in Vault's PKI
// engine; the next run does the remaining work.
type tidyStatus struct {
	state             string
	apply, automatic  bool
	safetyBuffer      time.Duration
	started, finished time.Time
	message           string

	projects, done, skipped  int
	accounts, keys           int
	orphans, deleted, failed int
	// waiting counts orphans without a key beyond the limit, which only a forced run
	// deletes; unconfirmed counts accounts that only one listing shows without a key.
	waiting, unconfirmed int
	listed               []orphan
	errors               []string
}

// dropKeys removes a project's keys from the orphans, since OpenAI does not delete them.
func (t *tidyStatus) dropKeys(project string, keys int) {
	t.orphans -= keys
	t.listed = slices.DeleteFunc(t.listed, func(o orphan) bool { return o.isKey() && o.ProjectID == project })
}

// tidyState holds the status of the current or last tidy run. The zero value is ready.
type tidyState struct {
	mu     sync.Mutex
	status tidyStatus
	cancel context.CancelFunc // nil when none is in progress

	// absent is the result of earlier runs, by project. Only the current run uses it.
	absent    map[string]absences
	knownKeys knownKeys

	stall time.Duration // 0 means tidyStall
}

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

// stop cancels the current tidy run, if there is one.
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

// tidyRun is one run, used by one goroutine.
type tidyRun struct {
	b                *backend
	storage          logical.Storage
	mount            string
	log              hclog.Logger
	apply, automatic bool
	buffer           time.Duration
	// partial is set when a role could not be read, so that any account may be in use.
	partial bool
	// claims are the accounts and keys, by ID and by name, of roles and of the WAL. They
	// are read once, before any listing: a role cannot adopt an account of this mount
	// later (see checkAdopted; without a config, which skips that check, tidy deletes
	// nothing), and deleting what a newer WAL entry names only repeats the work of the WAL.
	claims hashes
	// longest is how old an account without a key must be.
	longest time.Duration
	// absences is how many accounts without a key may still be deleted.
	absences int
	deleted  int // orphans so far
	// inRow counts the systemic failures in a row of a project's deletes, and stalls the
	// projects in a row without a successful call.
	inRow, stalls int
	// moved reports that a call has succeeded.
	moved func()
	// keyDeletes is the result of the first delete of an expired key: OpenAI's documents
	// disagree on whether it deletes keys of service accounts. If it does not, the others
	// are not tried; they have expired anyway.
	keyDeletes keyDeletes
}

// keyDeletes is whether OpenAI deletes keys of service accounts.
type keyDeletes int

const (
	keyDeletesUnknown keyDeletes = iota
	keyDeletesWork
	keyDeletesFail // OpenAI rejects or ignores the delete, and still shows the key
)

// fail records a failure, unless the run was canceled.
func (s *tidyRun) fail(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	s.log.Warn("tidy failed; the next run tries again", "error", err)
	s.b.tidy.note(func(t *tidyStatus) {
		if len(t.errors) < maxErrors {
			t.errors = append(t.errors, err.Error())
		}
	})
}

// orphan is an account, or a key of an account that stays, that no lease or role can
// still use.
type orphan struct {
	credential
	createdAt time.Time
	age       time.Duration
	why       string
}

// hashes is a compact set for hundreds of thousands of strings. A collision only keeps
// an orphan from being deleted.
type hashes []uint64

func (h *hashes) add(texts ...string) {
	for _, text := range texts {
		if text != "" {
			*h = append(*h, hash(text))
		}
	}
}

// has requires sorted hashes.
func (h hashes) has(text string) bool {
	_, found := slices.BinarySearch(h, hash(text))
	return found
}

var hashSeed = maphash.MakeSeed()

func hash(text string) uint64 { return maphash.String(hashSeed, text) }

// listedAccount is an account that may be an orphan. It is compact, since there may be
// hundreds of thousands. Times are Unix seconds, which fit until 2106.
type listedAccount struct {
	text    string // its ID and its name
	created uint32
	ended   uint32 // when the last of its keys expired
	keys    uint32 // how many keys it has
	idLen   uint16
	live    bool // one of them may still work
}

func (a listedAccount) id() string { return a.text[:a.idLen] }

func (a listedAccount) name() string { return a.text[a.idLen:] }

// listedKey is an expired key of an account that stays.
type listedKey struct {
	id, name, account string
	created, ended    int64
}

// finding is what a project's listings show of this mount.
type finding struct {
	accounts, keys int             // all that have the mount tag
	expired        []listedAccount // orphans whose keys are all listed as expired
	expiredKeys    []listedKey     // orphans
	absent         []listedAccount // orphans that two listings show without a key
	unconfirmed    int             // accounts that only one listing shows without a key
	began, at      time.Time       // when the listings began and were complete
}

func (f finding) orphans() int { return len(f.expired) + len(f.expiredKeys) + len(f.absent) }

// id is the ID of orphan i.
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

// holds is how long a finding may be used. It grows with the time of the listings, so
// that repeated listings of a large project do not use up the rate limit.
func (f finding) holds() time.Duration { return max(listingHolds, 10*f.at.Sub(f.began)) }

// seconds is a time in Unix seconds, clamped to its range.
func seconds(t time.Time) uint32 { return uint32(max(0, min(t.Unix(), math.MaxUint32))) } // #nosec G115 -- bounded

// orphan returns the finding's orphan i.
func (s *tidyRun) orphan(project string, f finding, i int) orphan {
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

func (s *tidyRun) orphanAccount(project string, a listedAccount) orphan {
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
	// Of the keys returned to clients, at most one per knownKeySpacing and maxKnownKeys
	// per project are remembered. Without the spacing, those of a busy mount would all be
	// too young to check a listing with.
	knownKeySpacing = 2 * time.Minute
	maxKnownKeys    = 8
)

// knownKey is a key that OpenAI must list while it exists.
type knownKey struct {
	id, account string
	at, end     time.Time // its creation and expiry; zero if it does not expire
}

// valid reports whether a listing must show the key: it is old enough to have reached
// all of OpenAI's servers, and has not expired.
func (w knownKey) valid(now time.Time) bool {
	return now.Sub(w.at) >= notFinalBefore && (w.end.IsZero() || now.Before(w.end))
}

// knownKeys are keys that this process returned recently, by project. The zero value is
// ready.
type knownKeys struct {
	mu   sync.Mutex
	keys map[string][]knownKey
}

// add remembers a key that is returned to a client.
func (w *knownKeys) add(c credential, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	keys := w.keys[c.ProjectID]
	if n := len(keys); c.KeyID == "" || (n > 0 && now.Sub(keys[n-1].at).Abs() < knownKeySpacing) {
		return
	}
	if w.keys == nil {
		w.keys = map[string][]knownKey{}
	}
	if len(keys) == maxKnownKeys {
		keys = slices.Delete(keys, 0, 1)
	}
	w.keys[c.ProjectID] = append(keys, knownKey{id: c.KeyID, account: c.ID, at: now, end: c.KeyExpires})
}

func (w *knownKeys) of(project string) []knownKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.keys[project])
}

func (w *knownKeys) forget(project, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.keys[project] == nil { // the key is a static role's
		return
	}
	w.keys[project] = slices.DeleteFunc(w.keys[project], func(k knownKey) bool { return k.id == id })
}

// absences are the accounts that a project's listings show without a key, by the hash of
// their ID, with the time of the first such listing. They are lost with the process,
// which only delays the deletion.
type absences map[uint64]time.Time

const (
	// listingHolds is how long a project's listing may be used. With a low rate limit
	// the deletes of one project take hours, during which an account without a key may
	// get one.
	listingHolds = 5 * time.Minute
)

// ownerless reports whether the owner of a key is unknown. Unless the key has expired,
// tidy then skips the project.
func ownerless(k client.ProjectKey) bool { return k.AccountID == "" && k.UserID == "" }

// unknownOwner is the error for an ownerless key.
func unknownOwner(k client.ProjectKey) error {
	return fmt.Errorf("project skipped: the owner of key %s is neither a user nor a service account, so any account may be in use", k.ID)
}

// staticClaims returns the accounts and keys, by ID and by name, of static roles, and
// those of their keys that a listing of the project must show. Unlike a role's account,
// a static role's may have no working key and still be in use. A static role that cannot
// be read is an error, since it may use any account.
func (s *tidyRun) staticClaims(ctx context.Context, project string) (claimed map[string]bool, keys []knownKey, err error) {
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
			keys = append(keys, knownKey{id: r.Current.ID, account: r.ServiceAccountID, at: r.LastRotated, end: r.Current.ExpiresAt})
		}
	}
	return claimed, keys, nil
}

// keyExpired reports whether a key has certainly expired. now is by the earlier of the two
// clocks, and some of OpenAI's servers may be behind that.
func (s *tidyRun) keyExpired(k client.ProjectKey, now time.Time) bool {
	return !k.ExpiresAt.IsZero() && now.Sub(k.ExpiresAt) > min(clockSlack, s.buffer)
}

// removeOne deletes an orphan. It returns an error when the project's other orphans
// should not be tried.
func (s *tidyRun) removeOne(ctx context.Context, o orphan) error {
	// Read again each time: a rotation may have replaced the admin key.
	snap, err := s.b.current(ctx, s.storage)
	if err == nil {
		err = s.b.destroy(ctx, snap, o.credential)
	}
	if err == nil && o.isKey() && s.keyDeletes == keyDeletesUnknown {
		if s.keyDeletes = checkDeleted(ctx, snap, o.credential); s.keyDeletes == keyDeletesFail {
			s.moved()
			s.log.Info("OpenAI does not delete keys of service accounts; expired keys remain listed", "project_id", o.ProjectID, "api_key_id", o.KeyID)
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

// notRemoved records why an orphan was not deleted. It returns an error when the
// project's other orphans should not be tried.
func (s *tidyRun) notRemoved(ctx context.Context, o orphan, err error) error {
	if ctx.Err() != nil {
		return err
	}
	s.b.tidy.note(func(t *tidyStatus) { t.failed++ })
	s.fail(ctx, fmt.Errorf("%s not deleted: %w", o.describe(), err))
	if !isSystemic(err) {
		return nil
	}
	if s.inRow++; s.inRow >= maxSystemicFailures {
		return fmt.Errorf("project stopped after %d failed deletes in a row", s.inRow)
	}
	return nil
}

// checkDeleted checks whether OpenAI still shows a key after its delete. The result is
// keyDeletesUnknown if the answer is unclear.
func checkDeleted(ctx context.Context, snap *snapshot, c credential) keyDeletes {
	_, err := snap.api.GetProjectKey(ctx, c.ProjectID, c.KeyID)
	switch {
	case err == nil:
		return keyDeletesFail
	case client.IsNotFound(err) && !isAboutProject(err, c.ProjectID, c.KeyID):
		return keyDeletesWork
	}
	return keyDeletesUnknown
}

// absenceLimit is how many accounts without a key a run deletes unless it is forced.
const absenceLimit = 20
