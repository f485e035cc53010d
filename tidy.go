package openaisecrets

// This file owns a tidy run: when the engine starts one, which projects it covers, where
// it looks for orphans, and in which order it deletes them.
//
// What must stay true:
//   - one run at a time, outside Vault's requests, since at ten calls a minute it may
//     take hours; it stops with the backend;
//   - tidy touches only accounts and keys whose name has this mount tag, and none with a
//     key that may still work, none younger than the safety buffer, and none that storage
//     still names;
//   - incomplete listings are not used, and absence from a listing counts only by the
//     rules of tidy_absence.go;
//   - the failure of one project does not stop the others.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	// forgetAfter is how long a project must have been unknown before its record is
	// deleted. OpenAI does not delete projects (docs/openai-api.md), so a 404 is about
	// the admin key's organization, or comes from another server, and may be temporary.
	forgetAfter = 7 * 24 * time.Hour
	// tidyStall is how long a project may go without a successful call. Revocations go
	// first, and at ten calls a minute they can take that long.
	tidyStall = 5 * time.Minute
)

var errStalled = errors.New("no call to OpenAI has succeeded")

// run tidies all projects. Failures are recorded in the status.
func (s *tidyRun) run(ctx context.Context) {
	if s.automatic {
		// Before the run: one that crashes the process must not be repeated each minute.
		if err := putTidyEntry(ctx, s.storage, s.b.now()); err != nil {
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
	s.b.tidy.note(func(t *tidyStatus) { t.projects = len(projects) })
	for _, p := range projects {
		if ctx.Err() != nil {
			return
		}
		if s.stalls >= maxSystemicFailures {
			s.fail(ctx, fmt.Errorf("run stopped after %d stalled projects in a row; the next run continues", s.stalls))
			return
		}
		s.b.tidy.note(func(t *tidyStatus) { t.message = "tidying project " + p.id })
		if err := s.watched(ctx, func(ctx context.Context) error { return s.project(ctx, p) }); err != nil {
			s.fail(ctx, fmt.Errorf("project %s: %w", p.id, err))
		}
		s.b.tidy.note(func(t *tidyStatus) { t.done++ })
	}
}

// watched stops the work on a project when no call has succeeded for a while: an
// endpoint that hangs or is throttled must not delay the next run.
func (s *tidyRun) watched(ctx context.Context, work func(context.Context) error) error {
	stall := cmp.Or(s.b.tidy.stall, tidyStall)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(stall, func() { cancel(errStalled) })
	defer timer.Stop()
	s.moved = func() { timer.Reset(stall) }
	s.inRow = 0
	err := work(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		s.stalls++
		return fmt.Errorf("%w for %s; the next run tries the project again: %w", errStalled, stall, err)
	}
	s.stalls = 0
	return err
}

// end completes the status and allows the next run.
func (s *tidyRun) end(cancelled bool) {
	s.b.tidy.mu.Lock()
	defer s.b.tidy.mu.Unlock()
	t := &s.b.tidy.status
	t.finished = s.b.now()
	switch {
	case cancelled:
		t.state = tidyCancelled
	case len(t.errors) > 0:
		t.state = tidyError
	default:
		t.state = tidyFinished
	}
	t.message = fmt.Sprintf("%d of %d projects processed, %d orphans found, %d deleted", t.done, t.projects, t.orphans, t.deleted)
	s.b.events.Emit(events.Tidy, s.mount, "tidy", t.deleted > 0, "state", t.state, "apply", strconv.FormatBool(t.apply),
		"orphan_count", strconv.Itoa(t.orphans), "deleted_count", strconv.Itoa(t.deleted))
	if t.waiting > 0 && t.apply {
		s.log.Warn("some accounts without a key were not deleted because a run deletes at most limit of them; verify at OpenAI that they have no keys, then run tidy with force=true",
			"waiting", t.waiting, "limit", absenceLimit, "command", cli(s.b.getenv)+" write "+s.mount+"tidy apply=true force=true")
	}
	s.log.Info("tidy run finished", "state", t.state, "apply", t.apply, "automatic", t.automatic,
		"projects", t.projects, "done", t.done, "skipped", t.skipped, "accounts", t.accounts,
		"orphans", t.orphans, "deleted", t.deleted, "failed", t.failed, "waiting", t.waiting, "unconfirmed", t.unconfirmed, "errors", len(t.errors),
		"duration", t.finished.Sub(t.started).Round(time.Millisecond).String())
	s.b.metrics.Tidied(t.state, t.apply, t.deleted, t.failed)
	s.b.tidy.cancel = nil
}

// coveredProject is a project that a role or the config names, or once named.
type coveredProject struct {
	id    string
	named bool // a role names it now
	// others are the other projects that this mount covers.
	others []string
}

// covered lists the projects to tidy, and records those without a record.
func (s *tidyRun) covered(ctx context.Context) ([]coveredProject, error) {
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
			longest = max(longest, r.longestLife())
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
	delete(named, "") // a role without a project has created nothing

	var projects []coveredProject
	for _, id := range recorded {
		projects = append(projects, coveredProject{id: id, named: named[id]})
		delete(named, id)
	}
	for id := range named {
		projects = append(projects, coveredProject{id: id, named: true})
		// The role is older than the records, or was being written when its project's
		// record was deleted.
		if s.apply {
			if err := s.b.recordProject(ctx, s.storage, id); err != nil {
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

// project tidies one project.
func (s *tidyRun) project(ctx context.Context, p coveredProject) error {
	tried := map[uint64]bool{} // by the hash of an ID; false if only counted so far
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
		s.b.tidy.note(func(t *tidyStatus) {
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
		// Last, since absence is the least certain finding. Shuffled, as in remove.
		rand.Shuffle(len(found.absent), func(i, j int) { found.absent[i], found.absent[j] = found.absent[j], found.absent[i] }) // #nosec G404 -- an order, not a secret
		allowed := min(len(found.absent), s.absences)
		s.b.tidy.note(func(t *tidyStatus) { t.waiting += len(found.absent) - allowed })
		if !s.apply {
			s.absences -= allowed
			return nil
		}
		// Only accounts that were deleted reduce the limit for other projects.
		before := s.deleted
		defer func() { s.absences -= s.deleted - before }()
		return s.removeAbsent(ctx, p.id, found.absent[:allowed])
	}
}

// find searches a project for orphans. It lists keys after the accounts that own them.
func (s *tidyRun) find(ctx context.Context, project string) (finding, error) {
	snap, err := s.b.current(ctx, s.storage)
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
	f := finding{began: s.b.now()}
	var old []listedAccount
	if err := snap.api.EachServiceAccount(ctx, project, func(page []client.ServiceAccount) error {
		s.moved()
		for _, a := range page {
			if !ours(a.Name) {
				continue
			}
			f.accounts++
			// Without a creation time the age is unknown.
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

	keysBegan := s.b.now()
	required := s.requiredKeys(project, static)
	if err := snap.api.EachProjectKey(ctx, project, func(page []client.ProjectKey) error {
		s.moved()
		for _, k := range page {
			required.shown(k)
			began := snap.api.NotAfter(f.began)
			expired := s.keyExpired(k, began)
			if len(old) > 0 && ownerless(k) && !expired {
				return unknownOwner(k)
			}
			// A service account is a kind of user, and its ID looks like a user's.
			owners := []string{k.AccountID, k.UserID}
			for _, owner := range slices.Compact(owners) {
				if i, found := slices.BinarySearchFunc(old, owner, func(a listedAccount, id string) int { return strings.Compare(a.id(), id) }); found {
					a := &old[i]
					a.keys++
					a.live = a.live || !expired
					a.ended = max(a.ended, seconds(k.ExpiresAt))
				}
			}
			// Keys created for a lease or a static role, on any account.
			if !ours(k.Name) {
				continue
			}
			f.keys++
			if expired && s.keyDeletes != keyDeletesFail && !k.CreatedAt.IsZero() && began.Sub(k.CreatedAt) > s.buffer && free(k.ID, k.Name) {
				one := listedKey{id: k.ID, name: k.Name, account: cmp.Or(k.AccountID, k.UserID), created: k.CreatedAt.Unix(), ended: k.ExpiresAt.Unix()}
				if n := len(f.expiredKeys); n > 0 && f.expiredKeys[n-1].account == one.account {
					one.account = f.expiredKeys[n-1].account // one string for all keys of an account
				}
				f.expiredKeys = append(f.expiredKeys, one)
			}
		}
		return nil
	}); err != nil {
		return finding{}, err
	}
	f.at = s.b.now()
	old = slices.DeleteFunc(old, func(a listedAccount) bool {
		tooYoung := s.partial || snap.api.NotAfter(f.began).Sub(time.Unix(int64(a.created), 0)) <= s.longest+expiryMargin+clockSlack
		return a.live || (a.keys == 0 && tooYoung)
	})
	if len(old)+len(f.expiredKeys) > 0 {
		if err := s.complete(ctx, snap, required); err != nil {
			delete(s.b.tidy.absent, project)
			return finding{}, err
		}
	}
	old, f.unconfirmed = s.b.tidy.confirm(project, old, keysBegan, f.at)
	f.expiredKeys = slices.DeleteFunc(f.expiredKeys, func(k listedKey) bool { // deleted with its account
		i, found := slices.BinarySearchFunc(old, k.account, func(a listedAccount, id string) int { return strings.Compare(a.id(), id) })
		return found && old[i].keys > 0
	})
	slices.SortFunc(old, func(a, b listedAccount) int { return cmp.Compare(min(b.keys, 1), min(a.keys, 1)) })
	n, _ := slices.BinarySearchFunc(old, 0, func(a listedAccount, _ int) int { return -int(min(a.keys, 1)) }) // #nosec G115 -- bounded
	f.expired, f.absent = old[:n], old[n:]
	return f, nil
}

// readClaims adds the accounts and keys in the WAL to the claims.
func (s *tidyRun) readClaims(ctx context.Context) error {
	ids, err := framework.ListWAL(ctx, s.storage)
	if err != nil {
		return fmt.Errorf("listing the WAL: %w", err)
	}
	for _, id := range ids {
		entry, err := framework.GetWAL(ctx, s.storage, id)
		if err != nil {
			return fmt.Errorf("reading the WAL: %w", err)
		}
		var c credential
		if entry == nil || decodeInto(&c, entry.Data) != nil {
			continue // deleted since, or not an entry of a credential
		}
		s.claims.add(c.ID, c.Name, c.KeyID, c.KeyName)
	}
	slices.Sort(s.claims)
	return nil
}

// remove deletes a project's expired orphans, except those tried already, one at a
// time. It returns done=false when the listing has become too old.
func (s *tidyRun) remove(ctx context.Context, project string, found finding, tried map[uint64]bool) (done bool, err error) {
	// In random order, so that orphans that always fail cannot block the others.
	for _, i := range rand.Perm(len(found.expired) + len(found.expiredKeys)) { // #nosec G404 -- an order, not a secret
		id := hash(found.id(i))
		if tried[id] || (i >= len(found.expired) && s.keyDeletes == keyDeletesFail) {
			continue
		}
		if s.b.now().Sub(found.at) > found.holds() {
			return false, nil
		}
		tried[id] = true
		o := s.orphan(project, found, i)
		if err := s.removeOne(ctx, o); err != nil {
			return true, err
		}
		if o.isKey() && s.keyDeletes == keyDeletesFail {
			s.b.tidy.note(func(t *tidyStatus) { t.dropKeys(project, len(found.expiredKeys)) })
		}
	}
	return true, nil
}

// unlessEnded returns why a project could not be tidied, or nil if there is nothing to
// tidy because the project is archived or not found. The record of an archived project
// that no role names is deleted once longArchived. A project that is not found may belong
// to another admin key: its record is deleted after forgetAfter, if a listing that shows
// another project of this mount does not show it.
func (s *tidyRun) unlessEnded(ctx context.Context, p coveredProject, failure error) error {
	e := client.AsError(failure)
	if e == nil || e.Status/100 != 4 || e.RateLimited() {
		return failure
	}
	snap, err := s.b.current(ctx, s.storage)
	if err != nil {
		return failure
	}
	project, err := snap.api.GetProject(ctx, p.id)
	archived, unknown := err == nil && project.ID == p.id && project.Archived(), client.IsNotFound(err)
	if !archived && !unknown {
		return failure
	}
	s.moved()
	s.b.tidy.note(func(t *tidyStatus) { t.skipped++ })
	s.log.Debug("tidy skipped a project", "project_id", p.id, "archived", archived, "unknown", unknown)
	if !s.apply || p.named || s.partial {
		return nil
	}
	ended := s.longUnknown
	if archived {
		ended = s.longArchived
	}
	if ended, err := ended(ctx, snap, p); err != nil || !ended {
		return err
	}
	if err := s.storage.Delete(ctx, projectStoragePrefix+p.id); err != nil {
		return fmt.Errorf("deleting the record of project %s: %w", p.id, err)
	}
	s.log.Info("project removed from tidy: it is archived or deleted and no role names it", "project_id", p.id)
	return nil
}

// longArchived reports whether a project has been archived for as long as the records of
// its keys' use stay, and for over a month. Until then reports and limits count what those
// have cost. A clock that is ahead by mistake must not end that.
func (s *tidyRun) longArchived(ctx context.Context, snap *snapshot, p coveredProject) (bool, error) {
	retention := snap.config.UsageRetention
	if retention == 0 {
		return true, nil
	}
	entry, err := getProjectEntry(ctx, s.storage, p.id)
	if err != nil || entry == nil {
		return false, err
	}
	now := s.b.openAINow(snap)
	if entry.ArchivedSince.IsZero() || entry.ArchivedSince.After(now.Add(clockSlack)) {
		return false, s.b.amendProject(ctx, s.storage, p.id, func(e *projectEntry) { e.ArchivedSince = now.UTC().Truncate(time.Second) })
	}
	return now.Sub(entry.ArchivedSince) >= max(retention, defaultUsageRetention), nil
}

// longUnknown reports whether a project has been unknown for forgetAfter, and is absent
// from a listing of the organization to which this mount's projects belong.
func (s *tidyRun) longUnknown(ctx context.Context, snap *snapshot, p coveredProject) (bool, error) {
	entry, err := getProjectEntry(ctx, s.storage, p.id)
	if err != nil || entry == nil {
		return false, err
	}
	now := s.b.now()
	if entry.UnknownSince.IsZero() || entry.UnknownSince.After(now.Add(clockSlack)) {
		return false, s.b.amendProject(ctx, s.storage, p.id, func(e *projectEntry) { e.UnknownSince = now.UTC().Truncate(time.Second) })
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

// known records that OpenAI shows a project.
func (s *tidyRun) known(ctx context.Context, id string) error {
	entry, err := getProjectEntry(ctx, s.storage, id)
	if err != nil || entry == nil || entry.UnknownSince.IsZero() && entry.ArchivedSince.IsZero() {
		return err
	}
	return s.b.amendProject(ctx, s.storage, id, func(e *projectEntry) { e.UnknownSince, e.ArchivedSince = time.Time{}, time.Time{} })
}

const (
	// tickSlack prevents a periodic call that is slightly early from delaying the run by
	// a whole interval.
	tickSlack = 5 * time.Second
)

// beginTidy reserves a tidy run and returns it for the caller to run, with a channel
// that is closed when it finishes; nil when another is in progress.
func (b *backend) beginTidy(req *logical.Request, apply, force, automatic bool, buffer time.Duration) (run func(), done <-chan struct{}) {
	b.tidy.mu.Lock()
	defer b.tidy.mu.Unlock()
	if b.tidy.cancel != nil {
		return nil, nil
	}
	ctx, cancel := context.WithCancel(client.Background(b.lifetime))
	ended := make(chan struct{})
	b.tidy.cancel = cancel
	b.tidy.status = tidyStatus{state: tidyRunning, apply: apply, automatic: automatic, safetyBuffer: buffer, started: b.now()}
	// The run outlives the request, so it takes only what remains valid.
	s := &tidyRun{b: b, storage: req.Storage, mount: req.MountPoint, log: b.log(req), apply: apply, automatic: automatic, buffer: buffer, absences: absenceLimit}
	if force {
		s.absences = math.MaxInt
	}
	return func() {
		defer close(ended)
		defer cancel()
		defer func() { s.end(ctx.Err() != nil) }()
		s.run(ctx)
	}, ended
}

// tidyIfDue starts an automatic tidy run when tidy_interval has passed.
func (b *backend) tidyIfDue(ctx context.Context, req *logical.Request) error {
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	interval := snap.config.TidyInterval
	if interval == 0 {
		return nil
	}
	last, err := getTidyEntry(ctx, req.Storage)
	if err != nil {
		return err
	}
	now := b.now()
	if last == nil || last.LastAutoRun.After(now.Add(clockSlack)) {
		// The interval starts now: a new mount has no orphans yet. The same applies after
		// the clock was set back, which might otherwise delay the next run for years.
		if last != nil {
			b.log(req).Warn("last tidy run is recorded in the future; tidy_interval starts now", "last_auto_run", text.Time(last.LastAutoRun))
		}
		return putTidyEntry(ctx, req.Storage, now)
	}
	if now.Add(tickSlack).Sub(last.LastAutoRun) < interval {
		return nil
	}
	run, _ := b.beginTidy(req, true, false, true, snap.config.TidySafetyBuffer) //nolint:contextcheck // it outlives this call
	if run != nil {
		go run()
	}
	return nil
}
