package openaisecrets

// This file owns the sweep itself: which projects it covers, what it takes for
// an orphan, and the deleting.
//
// What must stay true: only what bears this mount's tag is ever touched, and of
// that nothing with a key that may still work, nothing younger than the safety
// buffer, and nothing that storage still names; what cannot be read whole is
// not judged, and that something is not listed is believed only by the rules of
// tidy_absence.go; one project's failure stops no other; the memory that it takes
// is a hundred bytes or so for each account.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (

	// forgetAfter is how long a project must have been unknown before its
	// record goes. OpenAI deletes no projects (docs/openai-api.md), so a 404
	// speaks of the admin key's organization, or of whoever answers in
	// OpenAI's place, and may well pass.
	forgetAfter = 7 * 24 * time.Hour
	// listingHolds is how long a project's listing may be acted upon. At a slow
	// pace the deletes of one project take hours, in which somebody may make a
	// key of an account that had none.
	listingHolds = 5 * time.Minute
	// tidyStall is how long a project may go without a call that succeeds. Vault's
	// own revokes go first, and at ten calls a minute some of them take as long.
	tidyStall = 5 * time.Minute
)

var errStalled = errors.New("no call to OpenAI has succeeded")

// orphan is an account, or a key of one that stays, that nobody can need any
// more.
type orphan struct {
	credential
	createdAt time.Time
	age       time.Duration
	why       string
}

// sweep is one run. It works from one goroutine.
type sweep struct {
	*backend
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

// run sweeps all projects. What fails is noted in the status.
func (s *sweep) run(ctx context.Context) {
	if s.automatic {
		// Before the sweep: one that ends the process each time must not be
		// started anew each minute.
		if err := putTidyEntry(ctx, s.storage, s.now()); err != nil {
			s.fail(ctx, err)
			return
		}
	}
	projects, err := s.covered(ctx)
	if err != nil {
		s.fail(ctx, err)
		return
	}
	if err := s.readClaims(ctx); err != nil {
		s.fail(ctx, err)
		return
	}
	s.tidy.note(func(t *tidyStatus) { t.projects = len(projects) })
	for _, p := range projects {
		if ctx.Err() != nil {
			return
		}
		if s.stalls >= patience {
			s.fail(ctx, fmt.Errorf("nothing went on in %d projects in a row, the others wait for the next run", s.stalls))
			return
		}
		s.tidy.note(func(t *tidyStatus) { t.message = "sweeping project " + p.id })
		if err := s.watched(ctx, func(ctx context.Context) error { return s.project(ctx, p) }); err != nil {
			s.fail(ctx, fmt.Errorf("project %s: %w", p.id, err))
		}
		s.tidy.note(func(t *tidyStatus) { t.done++ })
	}
}

// watched ends the work on a project when no call has succeeded for a while: an
// endpoint that hangs or is throttled must not keep the next run from its time.
func (s *sweep) watched(ctx context.Context, work func(context.Context) error) error {
	stall := cmp.Or(s.tidy.stall, tidyStall)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(stall, func() { cancel(errStalled) })
	defer timer.Stop()
	s.moved = func() { timer.Reset(stall) }
	s.inRow = 0
	err := work(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		s.stalls++
		return fmt.Errorf("%w for %s, so the project waits for the next run: %w", errStalled, stall, err)
	}
	s.stalls = 0
	return err
}

// fail notes a failure, unless it is the end of the sweep.
func (s *sweep) fail(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	s.log.Warn("sweep: left to the next one", "error", err)
	s.tidy.note(func(t *tidyStatus) {
		if len(t.errors) < maxErrors {
			t.errors = append(t.errors, err.Error())
		}
	})
}

// end closes the status and makes place for the next sweep.
func (s *sweep) end(cancelled bool) {
	s.tidy.mu.Lock()
	defer s.tidy.mu.Unlock()
	t := &s.tidy.status
	t.finished = s.now()
	switch {
	case cancelled:
		t.state = tidyCancelled
	case len(t.errors) > 0:
		t.state = tidyError
	default:
		t.state = tidyFinished
	}
	t.message = fmt.Sprintf("%d of %d projects looked through, %d orphans found, %d deleted", t.done, t.projects, t.orphans, t.deleted)
	s.notify(eventTidy, s.mount, "tidy", t.deleted > 0, "state", t.state, "apply", strconv.FormatBool(t.apply),
		"orphan_count", strconv.Itoa(t.orphans), "deleted_count", strconv.Itoa(t.deleted))
	if t.waiting > 0 && t.apply {
		s.log.Warn("accounts without a key are left: a run deletes only so many unless it is forced to; look at OpenAI whether they have none, then force a run",
			"waiting", t.waiting, "limit", absenceLimit, "command", "vault write "+s.mount+"tidy apply=true force=true")
	}
	s.log.Info("sweep ended", "state", t.state, "apply", t.apply, "automatic", t.automatic,
		"projects", t.projects, "done", t.done, "skipped", t.skipped, "accounts", t.accounts,
		"orphans", t.orphans, "deleted", t.deleted, "failed", t.failed, "waiting", t.waiting, "unconfirmed", t.unconfirmed, "errors", len(t.errors),
		"duration", t.finished.Sub(t.started).Round(time.Millisecond).String())
	s.metrics.swept(t)
	s.tidy.cancel = nil
}

// coveredProject is a project that a role or the config names or has named.
type coveredProject struct {
	id    string
	named bool // a role names it now
	// others are the other projects that this mount covers.
	others []string
}

// covered lists the projects to sweep, and records those that are not.
func (s *sweep) covered(ctx context.Context) ([]coveredProject, error) {
	recorded, err := s.storage.List(ctx, projectStoragePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the recorded projects: %w", err)
	}
	named := map[string]bool{}
	cfg, err := getConfig(ctx, s.storage)
	if err != nil {
		return nil, err
	}
	if cfg != nil {
		named[cfg.ProjectID] = true
	}
	roles, err := listNames(ctx, s.storage, roleStoragePrefix, communityRolePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the roles: %w", err)
	}
	longest := time.Duration(0)
	for _, name := range roles {
		r, err := getRole(ctx, s.storage, name)
		if err != nil {
			s.partial = true
			s.fail(ctx, err)
			continue
		}
		if r != nil {
			named[r.project(cfg)] = true
			s.claims.add(r.ServiceAccountID)
			longest = max(longest, r.maxTTL())
		}
	}
	if s.longest, err = s.longestLease(ctx, longest); err != nil {
		return nil, err
	}
	static, err := s.storage.List(ctx, staticStoragePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range static {
		r, err := getStaticRole(ctx, s.storage, name)
		if err != nil {
			s.partial = true
			s.fail(ctx, err)
			continue
		}
		if r != nil {
			named[r.ProjectID] = true
		}
	}
	delete(named, "") // a role without a project has made nothing

	var projects []coveredProject
	for _, id := range recorded {
		projects = append(projects, coveredProject{id: id, named: named[id]})
		delete(named, id)
	}
	for id := range named {
		projects = append(projects, coveredProject{id: id, named: true})
		// The role is older than the records, or was being written when its
		// project's record was dropped.
		if s.apply {
			if err := recordProject(ctx, s.storage, id); err != nil {
				s.fail(ctx, err)
			}
		}
	}
	slices.SortFunc(projects, func(a, b coveredProject) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	for i := range projects {
		for j, other := range projects {
			if i != j {
				projects[i].others = append(projects[i].others, other.id)
			}
		}
	}
	return projects, nil
}

// project sweeps one project.
func (s *sweep) project(ctx context.Context, p coveredProject) error {
	tried := map[uint64]bool{} // by the hash of an ID; false: only counted so far
	for first := true; ; first = false {
		found, err := s.find(ctx, p.id)
		if err != nil {
			return s.unlessEnded(ctx, p, err)
		}
		if first && s.apply {
			if err := s.known(ctx, p.id); err != nil {
				s.fail(ctx, err)
			}
		}
		s.tidy.note(func(t *tidyStatus) {
			if first {
				t.accounts += found.accounts
				t.keys += found.keys
				t.unconfirmed += found.unconfirmed
			}
			for i := range found.orphans() {
				id := hash(found.id(i))
				if _, counted := tried[id]; counted {
					continue
				}
				if s.apply { // otherwise there is no second listing
					tried[id] = false
				}
				t.orphans++
				if len(t.listed) < maxListed {
					t.listed = append(t.listed, s.orphan(p.id, found, i))
				}
			}
		})
		if s.apply {
			if done, err := s.remove(ctx, p.id, found, tried); err != nil {
				return err
			} else if !done {
				continue
			}
		}
		// Last, since of all that is found it is the least certain. In another
		// order each time, as remove.
		rand.Shuffle(len(found.absent), func(i, j int) { found.absent[i], found.absent[j] = found.absent[j], found.absent[i] }) // #nosec G404 -- an order, not a secret
		allowed := min(len(found.absent), s.absences)
		s.tidy.note(func(t *tidyStatus) { t.waiting += len(found.absent) - allowed })
		if !s.apply {
			s.absences -= allowed
			return nil
		}
		// Those that cannot be deleted take nothing from other projects.
		before := s.deleted
		defer func() { s.absences -= s.deleted - before }()
		return s.removeAbsent(ctx, p.id, found.absent[:allowed])
	}
}

// hashes are the hashes of texts of which there may be hundreds of thousands. Two
// texts that share one only have something be left alone.
type hashes []uint64

var hashSeed = maphash.MakeSeed()

func hash(text string) uint64 { return maphash.String(hashSeed, text) }

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

// seconds is a time in Unix seconds, as far as it fits.
func seconds(t time.Time) uint32 { return uint32(max(0, min(t.Unix(), math.MaxUint32))) } // #nosec G115 -- bounded

func (a listedAccount) id() string   { return a.text[:a.idLen] }
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
		createdAt:  created, age: s.now().Sub(created), why: "it expired at " + text.Time(time.Unix(k.ended, 0)),
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
		createdAt:  created, age: s.now().Sub(created), why: why,
	}
}

// find looks for a project's orphans. Keys are listed after the accounts whose they
// are.
func (s *sweep) find(ctx context.Context, project string) (finding, error) {
	snap, err := s.current(ctx, s.storage)
	if err != nil {
		return finding{}, err
	}
	ours, err := naming.BearsTag(snap.tag)
	if err != nil {
		return finding{}, err
	}
	claimed, static, err := s.staticClaims(ctx, project)
	if err != nil {
		return finding{}, err
	}
	free := func(id, name string) bool {
		return !claimed[id] && !claimed[name] && !s.claims.has(id) && !s.claims.has(name)
	}
	f := finding{began: s.now()}
	var old []listedAccount
	if err := snap.api.EachServiceAccount(ctx, project, func(page []client.ServiceAccount) error {
		s.moved()
		for _, a := range page {
			if !ours(a.Name) {
				continue
			}
			f.accounts++
			// No time of creation is no age.
			if !a.CreatedAt.IsZero() && snap.api.NotAfter(f.began).Sub(a.CreatedAt) > s.buffer && len(a.ID) <= math.MaxUint16 && free(a.ID, a.Name) {
				old = append(old, listedAccount{text: a.ID + a.Name, idLen: uint16(len(a.ID)), created: seconds(a.CreatedAt)}) // #nosec G115 -- bounded
			}
		}
		return nil
	}); err != nil {
		return finding{}, err
	}
	byID := func(a, b listedAccount) int { return strings.Compare(a.id(), b.id()) }
	slices.SortFunc(old, byID)
	old = slices.CompactFunc(old, func(a, b listedAccount) bool { return a.id() == b.id() })

	keysBegan := s.now()
	muster := s.muster(project, static)
	if err := snap.api.EachProjectKey(ctx, project, func(page []client.ProjectKey) error {
		s.moved()
		for _, k := range page {
			muster.shown(k)
			began := snap.api.NotAfter(f.began)
			dead := s.dead(k, began)
			if len(old) > 0 && ownerless(k) && !dead {
				return unknownOwner(k)
			}
			// A service account is a kind of user, and its ID looks like a user's.
			owners := []string{k.AccountID, k.UserID}
			for _, owner := range slices.Compact(owners) {
				if i, found := slices.BinarySearchFunc(old, owner, func(a listedAccount, id string) int { return strings.Compare(a.id(), id) }); found {
					a := &old[i]
					a.keys++
					a.live = a.live || !dead
					a.ended = max(a.ended, seconds(k.ExpiresAt))
				}
			}
			// Keys made for a lease or a static role, on whosever account.
			if !ours(k.Name) {
				continue
			}
			f.keys++
			if dead && !s.keysStay && !k.CreatedAt.IsZero() && began.Sub(k.CreatedAt) > s.buffer && free(k.ID, k.Name) {
				one := listedKey{id: k.ID, name: k.Name, account: cmp.Or(k.AccountID, k.UserID), created: k.CreatedAt.Unix(), ended: k.ExpiresAt.Unix()}
				if n := len(f.expiredKeys); n > 0 && f.expiredKeys[n-1].account == one.account {
					one.account = f.expiredKeys[n-1].account // one text for all of an account
				}
				f.expiredKeys = append(f.expiredKeys, one)
			}
		}
		return nil
	}); err != nil {
		return finding{}, err
	}
	f.at = s.now()
	old = slices.DeleteFunc(old, func(a listedAccount) bool {
		tooYoung := s.partial || snap.api.NotAfter(f.began).Sub(time.Unix(int64(a.created), 0)) <= s.longest+expiryMargin+clockSlack
		return a.live || (a.keys == 0 && tooYoung)
	})
	if len(old)+len(f.expiredKeys) > 0 {
		if err := s.complete(ctx, snap, muster); err != nil {
			delete(s.tidy.absent, project)
			return finding{}, err
		}
	}
	old, f.unconfirmed = s.tidy.confirm(project, old, keysBegan, f.at)
	f.expiredKeys = slices.DeleteFunc(f.expiredKeys, func(k listedKey) bool { // it goes with its account
		i, found := slices.BinarySearchFunc(old, k.account, func(a listedAccount, id string) int { return strings.Compare(a.id(), id) })
		return found && old[i].keys > 0
	})
	slices.SortFunc(old, func(a, b listedAccount) int { return cmp.Compare(min(b.keys, 1), min(a.keys, 1)) })
	n, _ := slices.BinarySearchFunc(old, 0, func(a listedAccount, _ int) int { return -int(min(a.keys, 1)) }) // #nosec G115 -- bounded
	f.expired, f.absent = old[:n], old[n:]
	return f, nil
}

// ownerless reports a key whose owner is not known. One that has expired is no
// reason to leave a project alone: whosever it is, it keeps nothing in use.
func ownerless(k client.ProjectKey) bool { return k.AccountID == "" && k.UserID == "" }

// unknownOwner is why a project is left alone.
func unknownOwner(k client.ProjectKey) error {
	return fmt.Errorf("key %s is owned by neither a user nor a service account as far as this version can tell, so any account might be in use", k.ID)
}

// readClaims reads what the journal names.
func (s *sweep) readClaims(ctx context.Context) error {
	ids, err := framework.ListWAL(ctx, s.storage)
	if err != nil {
		return fmt.Errorf("listing the journal: %w", err)
	}
	for _, id := range ids {
		entry, err := framework.GetWAL(ctx, s.storage, id)
		if err != nil {
			return fmt.Errorf("reading the journal: %w", err)
		}
		var c credential
		if entry == nil || decodeInto(&c, entry.Data) != nil {
			continue // ended since, or not one that names a credential
		}
		s.claims.add(c.ID, c.Name, c.KeyID, c.KeyName)
	}
	slices.Sort(s.claims)
	return nil
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

// remove deletes a project's expired orphans, except those tried already, one at a
// time. It is not done when the listing has become too old to go by.
func (s *sweep) remove(ctx context.Context, project string, found finding, tried map[uint64]bool) (done bool, err error) {
	// In another order each time, so that those which always fail cannot keep
	// others from their turn.
	for _, i := range rand.Perm(len(found.expired) + len(found.expiredKeys)) { // #nosec G404 -- an order, not a secret
		id := hash(found.id(i))
		if tried[id] || (i >= len(found.expired) && s.keysStay) {
			continue
		}
		if s.now().Sub(found.at) > found.holds() {
			return false, nil
		}
		tried[id] = true
		o := s.orphan(project, found, i)
		if err := s.removeOne(ctx, o); err != nil {
			return true, err
		}
		if o.isKey() && s.keysStay {
			s.tidy.note(func(t *tidyStatus) { t.dropKeys(project, len(found.expiredKeys)) })
		}
	}
	return true, nil
}

// removeOne deletes an orphan. It returns an error when the others of its project
// are not worth a try.
func (s *sweep) removeOne(ctx context.Context, o orphan) error {
	// Anew for each: a rotation may have replaced the admin key.
	snap, err := s.current(ctx, s.storage)
	if err == nil {
		err = s.destroy(ctx, snap, o.credential)
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
		s.tidy.note(func(t *tidyStatus) { t.deleted++ })
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
	s.tidy.note(func(t *tidyStatus) { t.failed++ })
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

// unlessEnded returns why a project could not be swept, or nil if there is nothing
// to sweep: it is archived, or OpenAI does not know it. The record of an archived
// project goes once no role names it. An unknown one may be another admin key's:
// its record goes when it has been unknown for long and a listing that shows
// another project of this mount does not show it.
func (s *sweep) unlessEnded(ctx context.Context, p coveredProject, failure error) error {
	e := client.AsError(failure)
	if e == nil || e.Status/100 != 4 || e.RateLimited() {
		return failure
	}
	snap, err := s.current(ctx, s.storage)
	if err != nil {
		return failure
	}
	project, err := snap.api.GetProject(ctx, p.id)
	archived, unknown := err == nil && project.ID == p.id && project.Archived(), client.IsNotFound(err)
	if !archived && !unknown {
		return failure
	}
	s.moved()
	s.tidy.note(func(t *tidyStatus) { t.skipped++ })
	s.log.Debug("sweep: project skipped", "project_id", p.id, "archived", archived, "unknown", unknown)
	if !s.apply || p.named || s.partial {
		return nil
	}
	if unknown {
		if ended, err := s.longUnknown(ctx, snap, p); err != nil || !ended {
			return err
		}
	}
	if err := s.storage.Delete(ctx, projectStoragePrefix+p.id); err != nil {
		return fmt.Errorf("deleting the record of project %s: %w", p.id, err)
	}
	s.log.Info("project no longer swept: it has ended and no role names it", "project_id", p.id)
	return nil
}

// longUnknown reports whether a project has been unknown for long enough, and is
// absent from a listing of the organization to which this mount's projects belong.
func (s *sweep) longUnknown(ctx context.Context, snap *snapshot, p coveredProject) (bool, error) {
	entry, err := getProjectEntry(ctx, s.storage, p.id)
	if err != nil || entry == nil {
		return false, err
	}
	now := s.now()
	if entry.UnknownSince.IsZero() || entry.UnknownSince.After(now.Add(clockSlack)) {
		return false, putProjectEntry(ctx, s.storage, p.id, projectEntry{UnknownSince: now.UTC().Truncate(time.Second)})
	}
	if now.Sub(entry.UnknownSince) < forgetAfter {
		return false, nil
	}
	projects, err := snap.api.ListProjects(ctx)
	if err != nil {
		return false, err
	}
	shown := false
	for _, one := range projects {
		if one.ID == p.id {
			return false, nil
		}
		shown = shown || slices.Contains(p.others, one.ID)
	}
	return shown, nil
}

// known takes note that OpenAI knows a project (again).
func (s *sweep) known(ctx context.Context, id string) error {
	entry, err := getProjectEntry(ctx, s.storage, id)
	if err != nil || entry == nil || entry.UnknownSince.IsZero() {
		return err
	}
	return putProjectEntry(ctx, s.storage, id, projectEntry{})
}
