package openaisecrets

// This file owns the proof that an account or key no longer exists at OpenAI.
//
// What must stay true: an account or key counts as deleted only if OpenAI confirms it:
//   - its own "deleted" answer;
//   - a project that was read and is archived;
//   - a proven 404: in OpenAI's error form, for the account or key, confirmed by a read of
//     it that answers with the same form, while the same endpoint, organization and admin
//     key can read the project;
//   - for a key, that it has expired, in a read after a 404 or after OpenAI refused to
//     delete it (destroyKey, which also sets an expiry moments away);
//   - for an admin key, a complete listing that shows the current key and not that one;
//   - for a create without an answer, two complete listings that lack its name (notListed).
//
// Alone, a missing permission, any other 404 or a lost answer proves nothing. The callers
// check with isFinal whether something is old enough for its 404 to be final.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-openai/client"
)

// errNotFinal is returned for an account or key that OpenAI does not find but that is so
// new that it may still appear. The caller must look for it again.
var errNotFinal = errors.New("not found at OpenAI, but created so recently that it may still appear")

// errUnconfirmed is returned for a create that one listing lacks, of a mount that may be
// about to end. A disable wipes its WAL entry; after a move or the seal of a namespace, a
// later listing decides.
var errUnconfirmed = errors.New("not found by one listing")

// isFinal reports whether a 404 is final for an account or key created at that time,
// zero if unknown.
func (b *backend) isFinal(created time.Time) bool {
	return created.IsZero() || b.now().Sub(created) >= time.Duration(b.settling.Load())
}

// accountDeleted returns nil if failure, the error of a call about a service account,
// proves that the account is deleted, and otherwise an error with the reason.
func (s *snapshot) accountDeleted(ctx context.Context, project, id string, failure error) error {
	return s.proveDeleted(ctx, project, id, failure, func(ctx context.Context) (bool, error) {
		_, err := s.api.GetServiceAccount(ctx, project, id)
		return false, err
	})
}

// keyDeleted is accountDeleted for a key. A key that has expired by now counts as
// deleted, unless now is zero.
func (s *snapshot) keyDeleted(ctx context.Context, project, id string, failure error, now time.Time) error {
	return s.proveDeleted(ctx, project, id, failure, func(ctx context.Context) (expired bool, err error) {
		key, err := s.api.GetProjectKey(ctx, project, id)
		return !key.ExpiresAt.IsZero() && s.api.NotAfter(now).After(key.ExpiresAt.Add(clockSlack)), err
	})
}

// proveDeleted reads the project before the first 404 in it counts, and again if its read
// of the account or key is about the project. read reads the account or key, and reports
// whether it has expired.
func (s *snapshot) proveDeleted(ctx context.Context, project, id string, failure error, read func(context.Context) (ended bool, err error)) error {
	if !client.IsNotFound(failure) {
		return s.unlessArchived(ctx, project, failure)
	}
	if _, shown := s.shown.ids.Load(project); !shown || isAboutProject(failure, project, id) {
		if archived, err := s.readProject(ctx, project, failure); archived || err != nil {
			return err
		}
	}
	ended, err := read(ctx)
	switch {
	case isAboutProject(err, project, id):
		return unconfirmed(failure, err)
	case client.IsNotFound(err), err == nil && ended:
		return nil
	case err == nil:
		return fmt.Errorf("%w; not counted as deleted: OpenAI still shows it", failure)
	case s.unlessArchived(ctx, project, err) == nil: // archived after it was first read
		return nil
	}
	return unconfirmed(failure, err)
}

// isAboutProject reports whether a 404 is about the project instead of the account or
// key in it.
func isAboutProject(err error, project, id string) bool {
	e := client.AsError(err)
	return e != nil && e.NotFound() && (strings.HasPrefix(e.Code, "project") || strings.Contains(e.Message, project) && !strings.Contains(e.Message, id))
}

// unlessArchived returns failure, the error of a call about an account or key, or nil if
// the project is archived and therefore has none. OpenAI does not publish its answers to
// calls in an archived project (docs/openai-api.md).
func (s *snapshot) unlessArchived(ctx context.Context, project string, failure error) error {
	e := client.AsError(failure)
	if e == nil || e.Ambiguous() || e.RateLimited() || e.Status == 0 {
		return failure
	}
	if archived, _ := s.readProject(ctx, project, failure); archived {
		return nil
	}
	return failure
}

// readProject records that the project can be read, or returns why it cannot.
func (s *snapshot) readProject(ctx context.Context, id string, failure error) (archived bool, err error) {
	project, err := s.api.GetProject(ctx, id)
	switch {
	case client.IsNotFound(err):
		return false, fmt.Errorf("%w; not counted as deleted: project %s not found in the admin key's organization", failure, id)
	case err != nil:
		return false, unconfirmed(failure, err)
	case project.ID != id:
		return false, fmt.Errorf("%w; not counted as deleted: the answer for project %s has ID %.64q", failure, id, project.ID)
	case project.Archived():
		return true, nil
	}
	s.shown.ids.Store(id, true)
	return false, nil
}

// unconfirmed is the error of a 404 that could not be confirmed. It unwraps to the
// failure of the confirming call alone if that is systemic.
func unconfirmed(failure, err error) error {
	if isSystemic(err) || client.IsDenied(err) {
		failure = errors.New(failure.Error())
	}
	return fmt.Errorf("%w; the deletion could not be confirmed: %w", failure, err)
}

// deleteAdminKeyProven deletes an admin key. After nil it is proven to be deleted.
func (s *snapshot) deleteAdminKeyProven(ctx context.Context, id string) error {
	failure := s.api.DeleteAdminKey(ctx, id)
	if !client.IsNotFound(failure) {
		return failure
	}
	keys, err := s.api.ListAdminKeys(ctx)
	has := func(id string) bool {
		return slices.ContainsFunc(keys, func(k client.AdminKey) bool { return k.ID == id })
	}
	switch {
	case err != nil:
		return unconfirmed(failure, err)
	case s.config.AdminKeyID == "" || !has(s.config.AdminKeyID):
		return fmt.Errorf("%w; not counted as deleted: the list of admin keys does not show the current key %s", failure, s.config.AdminKeyID)
	case has(id):
		return fmt.Errorf("%w; not counted as deleted: OpenAI still lists it", failure)
	}
	return nil
}

// notListed returns nil if a create was never executed: two complete listings lack its
// name, since one may have left it out. They are minutes apart, even if the clock has been
// set since the create, unless expires says that tidy finds the account by its expired key.
// asked is when this listing began, with the monotonic clock.
func (b *backend) notListed(name string, asked time.Time, expires bool) error {
	apart := time.Duration(b.settling.Load())
	if expires {
		apart = min(apart, secondLook)
	}
	switch {
	case b.unseen.confirmed(name, asked, apart):
		b.unseen.forget(name)
		return nil
	case b.isDraining():
		return errUnconfirmed
	}
	return errNotFinal
}

// unseen has when a complete listing first did not show the account or key of an
// unfinished create, by name, a key of its account, by account ID, or the key of a blocked
// role, by ID. It is lost with the process, which only delays the result. The zero value is
// ready.
type unseen struct {
	mu    sync.Mutex
	since map[string]time.Time
}

// confirmed records that a listing that began at a time did not show the name, and reports
// whether an earlier one, which ended at least that long before, did not either. Both times
// are with the monotonic clock, since the server's may have been set. If ago is 0, one
// listing is enough.
func (u *unseen) confirmed(name string, began time.Time, ago time.Duration) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, seen := u.since[name]; !seen {
		if u.since == nil {
			u.since = map[string]time.Time{}
		}
		u.since[name] = time.Now()
	}
	return ago == 0 || began.Sub(u.since[name]) >= ago
}

func (u *unseen) forget(name string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.since, name)
}
