package openaisecrets

// This file owns the check of static roles against OpenAI: whether the key of each role
// and its account still exist.
//
// What must stay true: a key counts as missing only after two proofs of its deletion
// (proof.go), confirmAfterFirst apart, and only if this engine did not delete it. The
// check costs one listing of accounts and one of keys per project and day, one read per
// automatic rotation, and a few reads per missing key. Nothing waits for it. A missing
// account or key is replaced by an ordinary rotation, after a WAL entry with the old IDs.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	// checkEvery is the interval between two checks of a project, recreateEvery the
	// shortest interval between two recreations of a role.
	checkEvery    = 24 * time.Hour
	recreateEvery = 24 * time.Hour
	// confirmAfterFirst is the time between the two proofs.
	confirmAfterFirst = 10 * time.Minute
	// checkRetry is the delay after a failed listing.
	checkRetry = time.Hour
	// lookBudget bounds the read of a key before its rotation.
	lookBudget = 5 * time.Second
)

// suspicion is a role whose key was not found, with the IDs that it named then.
type suspicion struct {
	project, account, key string
	// listed is true for a key that the listings lack; the check of the project waits
	// for it. It is false for a key that was read before its rotation, and for one that
	// waits for its recreation.
	listed bool
	told   bool      // logged as missing
	since  time.Time // the first proof; zero before that
	next   time.Time // the next look
	failed failures
}

// staticChecks is the state of the check in this process.
type staticChecks struct {
	mu       sync.Mutex
	pass     time.Time // the next look at the projects; zero = now
	suspects map[string]suspicion
}

// suspect records that the key of a role was not found.
func (c *staticChecks) suspect(name string, s suspicion) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if known, is := c.suspects[name]; is && known.key == s.key {
		return
	}
	if c.suspects == nil {
		c.suspects = map[string]suspicion{}
	}
	c.suspects[name] = s
}

// put updates a suspicion, and drop removes it. Neither touches a suspicion of another
// key of the same role.
func (c *staticChecks) put(name string, s suspicion) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.suspects[name].key == s.key {
		c.suspects[name] = s
	}
}

func (c *staticChecks) drop(name, key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.suspects[name].key == key {
		delete(c.suspects, name)
	}
}

// due returns the roles to look at, and whether to look at the projects.
func (c *staticChecks) due(now time.Time) (names []string, pass bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, s := range c.suspects {
		if !now.Before(s.next) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	// A pass further ahead than checkEvery was planned under a clock that was ahead.
	return names, !now.Before(c.pass) || c.pass.After(now.Add(checkEvery+clockTolerance))
}

func (c *staticChecks) get(name string) (s suspicion, is bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, is = c.suspects[name]
	return s, is
}

// waits reports whether the check of a project waits for a suspicion.
func (c *staticChecks) waits(project string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.suspects {
		if s.project == project && s.listed {
			return true
		}
	}
	return false
}

// acquit drops the suspicions of a project without a proof: a listing that lacks an
// existing key proves nothing about the others.
func (c *staticChecks) acquit(project string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, s := range c.suspects {
		if s.project == project && s.listed && s.since.IsZero() {
			delete(c.suspects, name)
		}
	}
}

// checkStaticRoles is one run of the check.
func (b *backend) checkStaticRoles(ctx context.Context, req *logical.Request) error {
	if _, pass := b.checks.due(b.now()); pass {
		if err := b.checkProjects(ctx, req); err != nil {
			return err
		}
	}
	names, _ := b.checks.due(b.now())
	for _, name := range names {
		s, is := b.checks.get(name)
		if !is {
			continue // dropped by acquit
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := b.examine(ctx, req, name, s); err != nil {
			s.failed = s.failed.again(b.now(), longestRetry)
			s.next = s.failed.retry
			b.checks.put(name, s)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			b.log(req).Warn("existence of a static role key not determined", "static_role", name, "api_key_id", s.key, "retry_after", text.Time(s.next), "error", err)
			if isSystemic(err) || errors.Is(err, errNotConfigured) {
				return nil // the others would fail, too
			}
		}
	}
	return nil
}

// checkProjects reads the listings of the projects whose check is due, and suspects the
// static roles whose keys the listings lack.
func (b *backend) checkProjects(ctx context.Context, req *logical.Request) error {
	names, err := req.Storage.List(ctx, staticStoragePrefix)
	if err != nil {
		return fmt.Errorf("listing the static roles: %w", err)
	}
	projects := map[string]map[string]suspicion{} // by ID, then by role
	for _, name := range names {
		r, err := getStaticRole(ctx, req.Storage, name)
		if errors.As(err, &unreadable{}) {
			continue // the worker logs it
		}
		if err != nil {
			return err
		}
		// A key that has expired has its own warning.
		if r == nil || r.Current.ID == "" || !r.Current.ExpiresAt.After(b.now()) {
			continue
		}
		if projects[r.ProjectID] == nil {
			projects[r.ProjectID] = map[string]suspicion{}
		}
		projects[r.ProjectID][name] = r.suspicion()
	}
	next := b.now().Add(checkEvery)
	for project, roles := range projects {
		at, err := b.checkRolesOf(ctx, req, project, roles)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			at = b.now().Add(checkRetry)
			b.log(req).Warn("static roles not checked", "project_id", project, "retry_after", text.Time(at), "error", err)
		}
		next = earlier(next, at)
	}
	b.checks.mu.Lock()
	b.checks.pass = next
	b.checks.mu.Unlock()
	return nil
}

// checkRolesOf checks the static roles of a project if the check is due, and returns
// the time of the next check.
func (b *backend) checkRolesOf(ctx context.Context, req *logical.Request, project string, roles map[string]suspicion) (next time.Time, err error) {
	entry, err := getProjectEntry(ctx, req.Storage, project)
	if err != nil {
		return next, err
	}
	now := b.now()
	if entry == nil {
		entry = &projectEntry{}
	}
	if entry.StaticChecked.IsZero() { // the keys were created just now
		return now.Add(checkEvery), b.projectChecked(ctx, req, project, now)
	}
	if due := entry.StaticChecked.Add(checkEvery); now.Before(due) && !entry.StaticChecked.After(now.Add(clockTolerance)) {
		return due, nil
	}
	if b.checks.waits(project) { // the suspicions come first
		return now.Add(confirmAfterFirst), nil
	}
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return next, err
	}
	accounts, keys := map[string]bool{}, map[string]bool{}
	err = snap.api.EachServiceAccount(ctx, project, func(page []client.ServiceAccount) error {
		for _, a := range page {
			accounts[a.ID] = true
		}
		return nil
	})
	if err == nil {
		err = snap.api.EachProjectKey(ctx, project, func(page []client.ProjectKey) error {
			for _, k := range page {
				keys[k.ID] = true
			}
			return nil
		})
	}
	if err != nil && snap.unlessArchived(ctx, project, err) != nil { // an archived project has no keys
		return next, err
	}
	for name, s := range roles {
		if keys[s.key] && accounts[s.account] {
			if err := b.found(ctx, req, name, s); err != nil {
				return next, err
			}
			continue
		}
		s.listed = true
		b.checks.suspect(name, s)
	}
	if b.checks.waits(project) { // not recorded yet, so that a restart reads the listings again
		return now.Add(confirmAfterFirst), nil
	}
	return now.Add(checkEvery), b.projectChecked(ctx, req, project, now)
}

// projectChecked records the check of a project.
func (b *backend) projectChecked(ctx context.Context, req *logical.Request, project string, at time.Time) error {
	return b.amendProject(ctx, req.Storage, project, func(e *projectEntry) { e.StaticChecked = at.UTC().Truncate(time.Second) })
}

func (r *staticRole) suspicion() suspicion {
	return suspicion{project: r.ProjectID, account: r.ServiceAccountID, key: r.Current.ID}
}

// lookBeforeRotation reads the key that a rotation replaces next: the rotation hides that
// the key was deleted. It does not wait long for the rate limiter.
func (b *backend) lookBeforeRotation(ctx context.Context, req *logical.Request, name string, r *staticRole) {
	ctx, cancel := context.WithTimeout(client.Background(ctx), lookBudget)
	defer cancel()
	snap, err := b.current(ctx, req.Storage)
	if err != nil || !r.Current.ExpiresAt.After(b.now()) {
		return
	}
	if _, err := snap.api.GetProjectKey(ctx, r.ProjectID, r.Current.ID); client.IsNotFound(err) {
		b.checks.suspect(name, r.suspicion())
	}
}

// examine looks at a suspected role once. It returns an error if OpenAI or storage did
// not answer.
func (b *backend) examine(ctx context.Context, req *logical.Request, name string, s suspicion) error {
	if s.listed { // a key that was rotated since the listing does not matter
		r, err := getStaticRole(ctx, req.Storage, name)
		if err != nil {
			return err
		}
		if r == nil || r.Current.ID != s.key {
			return b.settled(ctx, req, name, s)
		}
	}
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return err
	}
	what, err := snap.missing(ctx, s)
	switch now := b.now(); {
	case err != nil:
		return err
	case what == "":
		if s.since.IsZero() && s.listed {
			b.log(req).Warn("listings of a project are incomplete: OpenAI shows a key or account that they lack", "project_id", s.project, "static_role", name, "api_key_id", s.key)
			b.checks.acquit(s.project)
		}
		if err := b.found(ctx, req, name, s); err != nil {
			return err
		}
		return b.settled(ctx, req, name, s)
	case s.since.IsZero():
		s.since, s.next, s.failed = now, now.Add(confirmAfterFirst), failures{}
		b.checks.put(name, s)
		return nil
	case now.Sub(s.since) < confirmAfterFirst: // the clock was set back
		s.next = s.since.Add(confirmAfterFirst)
		b.checks.put(name, s)
		return nil
	}
	again, err := b.isMissing(ctx, req, name, s, what)
	if err == nil && again.IsZero() {
		return b.settled(ctx, req, name, s)
	}
	// The check of the project does not wait for the recreation.
	waited := s.listed
	s.told, s.listed = true, false
	if err != nil {
		s.failed = s.failed.again(b.now(), longestRetry)
		again = s.failed.retry
		b.log(req).Warn("static role not recreated", "static_role", name, "retry_after", text.Time(again), "error", err)
	}
	s.next = again
	b.checks.put(name, s)
	if waited && !b.checks.waits(s.project) {
		return b.projectChecked(ctx, req, s.project, b.now())
	}
	return nil
}

// missing returns what OpenAI proves to be deleted: the account, only the key, or
// nothing.
func (s *snapshot) missing(ctx context.Context, of suspicion) (what string, err error) {
	_, err = s.api.GetProjectKey(ctx, of.project, of.key)
	if err != nil {
		if err := s.keyDeleted(ctx, of.project, of.key, err, time.Time{}); err != nil {
			return "", err
		}
	}
	there := err == nil
	_, err = s.api.GetServiceAccount(ctx, of.project, of.account)
	switch {
	case err == nil && there:
		return "", nil
	case err == nil:
		return missingKey, nil
	}
	return missingAccount, s.accountDeleted(ctx, of.project, of.account, err)
}

// settled ends a suspicion. The last one completes the check of its project.
func (b *backend) settled(ctx context.Context, req *logical.Request, name string, s suspicion) error {
	b.checks.drop(name, s.key)
	if !s.listed || b.checks.waits(s.project) {
		return nil
	}
	return b.projectChecked(ctx, req, s.project, b.now())
}

// found clears the stored state of a role whose key exists again.
func (b *backend) found(ctx context.Context, req *logical.Request, name string, s suspicion) error {
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil || r == nil || r.Missing == nil || r.Current.ID != s.key {
		return err
	}
	r.Missing = nil
	if err := putStaticRole(ctx, req.Storage, name, r); err != nil {
		b.static.lookAt(name, b.now())
		return err
	}
	b.static.set(name, r.plan(b.now()))
	b.log(req).Info("static role key exists at OpenAI again", "static_role", name, "api_key_id", s.key)
	return nil
}

// isMissing records what is proven to be missing, and creates it again for
// on_missing=recreate. It returns the time of the next look, zero for none.
func (b *backend) isMissing(ctx context.Context, req *logical.Request, name string, s suspicion, what string) (again time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		return again, err
	}
	defer unlock()
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		return again, err
	}
	log := b.log(req).With("static_role", name, "missing", what, "project_id", s.project, "service_account_id", s.account, "api_key_id", s.key)
	if r == nil || r.Current.ID != s.key {
		// The role was rotated or deleted since. A key that this engine deleted then was
		// not missing.
		if r != nil && !s.told && !b.deleted.Contains(s.key) {
			b.metrics.StaticMissing(name, what)
			log.Warn("static role key was deleted at OpenAI before its rotation, not by this engine")
		}
		return again, nil
	}
	if known := r.Missing; known == nil || known.What != what {
		r.Missing = &missing{What: what, Since: s.since.UTC().Truncate(time.Second)}
		if err := putStaticRole(ctx, req.Storage, name, r); err != nil {
			b.static.lookAt(name, b.now())
			return again, err
		}
		b.static.set(name, r.plan(b.now()))
		b.metrics.StaticMissing(name, what)
		log.Warn("static role key was deleted at OpenAI, not by this engine", "on_missing", r.OnMissing.String())
	}
	switch due := r.Recreated.Add(recreateEvery); {
	case r.OnMissing != recreateMissing || r.Adopted && what == missingAccount:
		return again, nil
	case !r.Recreated.IsZero() && b.now().Before(due) && !r.Recreated.After(b.now().Add(clockTolerance)):
		log.Warn("static role key was deleted again within a day of its recreation; recreation postponed", "not_before", text.Time(due))
		return due, nil
	}
	return again, b.recreate(ctx, req, name, r)
}

// recreate replaces a missing account or key. The caller holds the role's lock.
func (b *backend) recreate(ctx context.Context, req *logical.Request, name string, r *staticRole) error {
	fresh := r.clone()
	fresh.Current = staticKey{} // the missing key must not become a superseded one
	gone := r.credential(name, &r.Current)
	if r.Missing.What == missingAccount { // its keys are gone, too
		gone = r.credential(name, nil)
		fresh.ServiceAccountID, fresh.ServiceAccount, fresh.AccountCreatedAt, fresh.Superseded = "", "", time.Time{}, nil
	}
	// If it appears again, only this entry knows it. Until the new key is stored, the
	// role still names it, and the WAL worker deletes nothing that a role names.
	if _, err := framework.PutWAL(ctx, req.Storage, walKind(gone, true), gone); err != nil {
		return fmt.Errorf("writing the WAL: %w", err)
	}
	fresh.Missing, fresh.Recreated = nil, b.now().UTC().Truncate(time.Second)
	next, _, err := b.rotateStatic(ctx, req, name, fresh, false)
	if err != nil {
		return err
	}
	b.log(req).Warn("static role recreated", "static_role", name, "former_service_account_id", r.ServiceAccountID, "former_api_key_id", r.Current.ID,
		"service_account_id", next.ServiceAccountID, "api_key_id", next.Current.ID)
	return nil
}
