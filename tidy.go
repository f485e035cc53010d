package openaisecrets

// This file owns the sweep itself: which projects it covers, what it takes for
// an orphan, and the deleting.
//
// What must stay true: only what bears this mount's tag is ever touched, and of
// that nothing with a key that may still work, nothing younger than the safety
// buffer, and nothing that storage still names; what cannot be read whole is
// not judged; one project's failure stops no other.

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	projectStoragePrefix = "project/"
	projectVersion       = 1

	// forgetAfter is how long a project must have been unknown before its
	// record goes. OpenAI deletes no projects (docs/openai-api.md), so a 404
	// speaks of the admin key's organization, or of whoever answers in
	// OpenAI's place, and may well pass.
	forgetAfter = 7 * 24 * time.Hour
	// listingHolds is how long a project's listing may be acted upon. At a slow
	// pace the deletes of one project take hours, in which somebody may make a
	// key of an account that had none.
	listingHolds = 5 * time.Minute
)

// projectEntry says that a role names or has named a project, whose ID is in
// the entry's key. Roles come and go, and what they left stays to be found.
type projectEntry struct {
	Version int `json:"version"`
	// UnknownSince is since when OpenAI does not know the project.
	UnknownSince time.Time `json:"unknown_since,omitzero"`
}

// getProjectEntry returns nil when the project is not recorded.
func getProjectEntry(ctx context.Context, s logical.Storage, id string) (*projectEntry, error) {
	stored, err := s.Get(ctx, projectStoragePrefix+id)
	if err != nil {
		return nil, fmt.Errorf("reading the record of project %s: %w", id, err)
	}
	if stored == nil {
		return nil, nil
	}
	var entry projectEntry
	if err := stored.DecodeJSON(&entry); err != nil {
		return nil, fmt.Errorf("decoding the record of project %s: %w", id, err)
	}
	if entry.Version > projectVersion {
		return nil, fmt.Errorf("the record of project %s was written by a newer version of this plugin (format %d, this one knows %d)", id, entry.Version, projectVersion)
	}
	return &entry, nil
}

func putProjectEntry(ctx context.Context, s logical.Storage, id string, entry projectEntry) error {
	entry.Version = projectVersion
	stored, err := logical.StorageEntryJSON(projectStoragePrefix+id, entry)
	if err != nil {
		return err
	}
	if err := s.Put(ctx, stored); err != nil {
		return fmt.Errorf("storing the record of project %s: %w", id, err)
	}
	return nil
}

// recordProject notes that a role names a project. It precedes the write of
// the role, so that nothing can be made in a project that no sweep looks at.
func recordProject(ctx context.Context, s logical.Storage, id string) error {
	entry, err := getProjectEntry(ctx, s, id)
	if err != nil || entry != nil {
		return err
	}
	return putProjectEntry(ctx, s, id, projectEntry{})
}

// orphan is an account, or a key of one that stays, that nobody can need any
// more.
type orphan struct {
	credential
	createdAt time.Time
	age       time.Duration
	why       string
}

// id is the ID of what is to be deleted.
func (o orphan) id() string {
	if o.isKey() {
		return o.KeyID
	}
	return o.ID
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
	// held are the accounts that roles name when the sweep begins. One of this
	// mount's own cannot be named later, see checkAdopted.
	held map[string]bool
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
	s.held = map[string]bool{}
	projects, err := s.covered(ctx)
	if err != nil {
		s.fail(ctx, err)
		return
	}
	s.tidy.note(func(t *tidyStatus) { t.projects = len(projects) })
	for _, p := range projects {
		if ctx.Err() != nil {
			return
		}
		s.tidy.note(func(t *tidyStatus) { t.message = "sweeping project " + p.id })
		if err := s.project(ctx, p); err != nil {
			s.fail(ctx, fmt.Errorf("project %s: %w", p.id, err))
		}
		s.tidy.note(func(t *tidyStatus) { t.done++ })
	}
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
	s.log.Info("sweep ended", "state", t.state, "apply", t.apply, "automatic", t.automatic,
		"projects", t.projects, "done", t.done, "skipped", t.skipped, "accounts", t.accounts,
		"orphans", t.orphans, "deleted", t.deleted, "failed", t.failed, "errors", len(t.errors),
		"duration", t.finished.Sub(t.started).Round(time.Millisecond).String())
	s.metrics.swept(t)
	s.tidy.cancel = nil
}

// coveredProject is a project that a role or the config names or has named.
type coveredProject struct {
	id    string
	named bool // a role names it now
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
	roles, err := s.storage.List(ctx, roleStoragePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range roles {
		r, err := getRole(ctx, s.storage, name)
		if err != nil {
			s.partial = true
			s.fail(ctx, err)
			continue
		}
		if r != nil {
			named[r.project(cfg)] = true
			s.held[r.ServiceAccountID] = true
		}
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
	return projects, nil
}

// project sweeps one project.
func (s *sweep) project(ctx context.Context, p coveredProject) error {
	tried := map[string]bool{} // false: only counted so far
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
			}
			for _, o := range found.orphans {
				if _, counted := tried[o.id()]; counted {
					continue
				}
				tried[o.id()] = false
				t.orphans++
				if len(t.listed) < maxListed {
					t.listed = append(t.listed, o)
				}
			}
		})
		if !s.apply {
			return nil
		}
		if done, err := s.remove(ctx, found, tried); done || err != nil {
			return err
		}
	}
}

// finding is what a project holds of this mount's.
type finding struct {
	accounts, keys int // all that bear the tag
	orphans        []orphan
	at             time.Time // when the listing was complete
}

// find looks for a project's orphans. The order matters: what is claimed now
// may be released before the listing, but what is claimed after this is
// younger than the buffer; and keys are listed after the accounts whose they
// are.
func (s *sweep) find(ctx context.Context, project string) (finding, error) {
	snap, err := s.current(ctx, s.storage)
	if err != nil {
		return finding{}, err
	}
	ours, err := bearsTag(snap.tag)
	if err != nil {
		return finding{}, err
	}
	now := s.now()
	claimed, err := s.claimed(ctx)
	if err != nil {
		return finding{}, err
	}
	accounts, err := snap.api.ListServiceAccounts(ctx, project)
	if err != nil {
		return finding{}, err
	}
	result := finding{at: s.now()}
	var old []client.ServiceAccount
	for _, a := range accounts {
		if !ours(a.Name) {
			continue
		}
		result.accounts++
		// No time of creation is no age.
		if !a.CreatedAt.IsZero() && now.Sub(a.CreatedAt) > s.buffer && !claimed[a.ID] && !claimed[a.Name] {
			old = append(old, a)
		}
	}
	keys, err := snap.api.ListProjectKeys(ctx, project)
	if err != nil {
		return finding{}, err
	}
	result.at = s.now()
	owned := map[string][]client.ProjectKey{}
	for _, k := range keys {
		if len(old) > 0 && k.AccountID == "" && k.UserID == "" && !s.dead(k, now) {
			return finding{}, fmt.Errorf("key %s is owned by neither a user nor a service account as far as this version can tell, so any account might be in use", k.ID)
		}
		owned[k.AccountID] = append(owned[k.AccountID], k)
	}
	ending := map[string]bool{}
	for _, a := range old {
		if why, is := s.orphaned(owned[a.ID], now); is {
			ending[a.ID] = true
			result.orphans = append(result.orphans, orphan{
				credential: credential{Version: credentialVersion, Type: typeAccount, ProjectID: project, Name: a.Name, ID: a.ID},
				createdAt:  a.CreatedAt, age: now.Sub(a.CreatedAt), why: why,
			})
		}
	}
	// Keys made for a lease or a static role, on whosever account.
	for _, k := range keys {
		if !ours(k.Name) {
			continue
		}
		result.keys++
		if ending[k.AccountID] || !s.dead(k, now) || k.CreatedAt.IsZero() || now.Sub(k.CreatedAt) <= s.buffer || claimed[k.ID] || claimed[k.Name] || s.keysStay {
			continue
		}
		result.orphans = append(result.orphans, orphan{
			credential: credential{Version: credentialVersion, Type: typeKey, ProjectID: project, ID: k.AccountID, KeyName: k.Name, KeyID: k.ID},
			createdAt:  k.CreatedAt, age: now.Sub(k.CreatedAt), why: "it expired at " + timeText(k.ExpiresAt),
		})
	}
	return result, nil
}

// claimed returns the accounts and keys, by ID and by name, that are somebody's
// to keep or to delete: those that roles hold and those of the journal.
func (s *sweep) claimed(ctx context.Context) (map[string]bool, error) {
	ids, err := framework.ListWAL(ctx, s.storage)
	if err != nil {
		return nil, fmt.Errorf("listing the journal: %w", err)
	}
	claimed := maps.Clone(s.held)
	// Unlike a role's, a static role's account may have no working key and still
	// be in use. One that cannot be read may name any.
	static, err := s.storage.List(ctx, staticStoragePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range static {
		r, err := getStaticRole(ctx, s.storage, name)
		if err != nil {
			return nil, err
		}
		if r == nil {
			continue
		}
		claimed[r.ServiceAccountID], claimed[r.ServiceAccount] = true, true
		for _, k := range r.keys() {
			claimed[k.ID], claimed[k.Name] = true, true
		}
	}
	for _, id := range ids {
		entry, err := framework.GetWAL(ctx, s.storage, id)
		if err != nil {
			return nil, fmt.Errorf("reading the journal: %w", err)
		}
		var c credential
		if entry == nil || decodeInto(&c, entry.Data) != nil {
			continue // ended since, or not one that names a credential
		}
		for _, what := range []string{c.ID, c.Name, c.KeyID, c.KeyName} {
			if what != "" {
				claimed[what] = true
			}
		}
	}
	return claimed, nil
}

// bearsTag returns what tells this mount's names: the tag and the random
// characters that follow it, wherever a template has put them.
func bearsTag(tag string) (func(name string) bool, error) {
	if len(tag) != tagLength {
		return nil, fmt.Errorf("the mount's tag has %d characters instead of %d, so no name is known to be this mount's", len(tag), tagLength)
	}
	pattern, err := regexp.Compile(regexp.QuoteMeta(tag) + fmt.Sprintf("[a-z0-9]{%d}", randomLength))
	if err != nil {
		return nil, err
	}
	return pattern.MatchString, nil
}

// dead reports whether a key has expired beyond doubt: OpenAI's clock may be
// behind.
func (s *sweep) dead(k client.ProjectKey, now time.Time) bool {
	return !k.ExpiresAt.IsZero() && now.Sub(k.ExpiresAt) > min(clockSlack, s.buffer)
}

// orphaned reports whether none of an account's keys may work, and says so.
func (s *sweep) orphaned(keys []client.ProjectKey, now time.Time) (why string, is bool) {
	var last time.Time
	for _, k := range keys {
		if !s.dead(k, now) {
			return "", false
		}
		if k.ExpiresAt.After(last) {
			last = k.ExpiresAt
		}
	}
	switch len(keys) {
	case 0:
		return "it has no key", true
	case 1:
		return "its key expired at " + timeText(last), true
	default:
		return fmt.Sprintf("its %d keys have expired, the last at %s", len(keys), timeText(last)), true
	}
}

// remove deletes a project's orphans, except those tried already, one at a
// time. It is not done when the listing has become too old to go by.
func (s *sweep) remove(ctx context.Context, found finding, tried map[string]bool) (done bool, err error) {
	// In another order each time, so that those which always fail cannot keep
	// others from their turn.
	rand.Shuffle(len(found.orphans), func(i, j int) { // #nosec G404 -- an order, not a secret
		found.orphans[i], found.orphans[j] = found.orphans[j], found.orphans[i]
	})
	inRow := 0
	for _, o := range found.orphans {
		if tried[o.id()] || (o.isKey() && s.keysStay) {
			continue
		}
		if s.now().Sub(found.at) > listingHolds {
			return false, nil
		}
		tried[o.id()] = true
		// Anew for each: a rotation may have replaced the admin key.
		snap, err := s.current(ctx, s.storage)
		if err == nil {
			err = s.destroy(ctx, snap, o.credential)
		}
		if err == nil && o.isKey() && !s.keysGo {
			_, readErr := snap.api.GetProjectKey(ctx, o.ProjectID, o.KeyID)
			s.keysGo, s.keysStay = client.IsNotFound(readErr), readErr == nil
			if s.keysStay {
				s.log.Info("OpenAI does not delete keys of service accounts; expired ones stay listed there", "project_id", o.ProjectID, "api_key_id", o.KeyID)
				s.tidy.note(func(t *tidyStatus) { t.dropKeys(found.orphans) })
				continue
			}
		}
		if err == nil {
			inRow = 0
			s.tidy.note(func(t *tidyStatus) { t.deleted++ })
			s.log.Info("orphan deleted", append(o.attrs(), "age", o.age.Truncate(time.Second).String(), "why", o.why)...)
			continue
		}
		if ctx.Err() != nil {
			return true, ctx.Err()
		}
		s.tidy.note(func(t *tidyStatus) { t.failed++ })
		s.fail(ctx, fmt.Errorf("%s not deleted: %w", o.what(), err))
		if !shared(err) {
			continue
		}
		if inRow++; inRow >= patience {
			return true, fmt.Errorf("%d deletes in a row have failed, the others are not tried", inRow)
		}
	}
	return true, nil
}

// unlessEnded returns why a project could not be swept, or nil if it has none
// to sweep: it is archived, or OpenAI does not know it. The record of such a
// project goes once no role names it any more.
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
	archived, unknown := err == nil && project.Archived(), client.IsNotFound(err)
	if !archived && !unknown {
		return failure
	}
	s.tidy.note(func(t *tidyStatus) { t.skipped++ })
	s.log.Debug("sweep: project skipped", "project_id", p.id, "archived", archived, "unknown", unknown)
	if !s.apply || p.named || s.partial {
		return nil
	}
	if unknown {
		entry, err := getProjectEntry(ctx, s.storage, p.id)
		switch {
		case err != nil:
			return err
		case entry == nil:
			return nil
		case entry.UnknownSince.IsZero():
			return putProjectEntry(ctx, s.storage, p.id, projectEntry{UnknownSince: s.now().UTC().Truncate(time.Second)})
		case s.now().Sub(entry.UnknownSince) < forgetAfter:
			return nil
		}
	}
	if err := s.storage.Delete(ctx, projectStoragePrefix+p.id); err != nil {
		return fmt.Errorf("deleting the record of project %s: %w", p.id, err)
	}
	s.log.Info("project no longer swept: it has ended and no role names it", "project_id", p.id)
	return nil
}

// known takes note that OpenAI knows a project (again).
func (s *sweep) known(ctx context.Context, id string) error {
	entry, err := getProjectEntry(ctx, s.storage, id)
	if err != nil || entry == nil || entry.UnknownSince.IsZero() {
		return err
	}
	return putProjectEntry(ctx, s.storage, id, projectEntry{})
}
