package openaisecrets

// This file owns what counts as proof that something no longer exists at OpenAI.
//
// What must stay true: deleted is what OpenAI itself says is deleted. That is its
// own "deleted" answer, an archived project that was read as such, or a 404 that
// is proven: in OpenAI's form and for a thing, while with the same endpoint,
// organization and admin key the thing's project has answered a read, and a read
// of the thing itself answers 404 in the same form. Of an admin key the proof is
// a complete listing that shows the current key and not that one. A missing
// permission, any other 404 and silence prove nothing.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-openai/client"
)

// errNotFinal is returned where OpenAI does not find something so young that it
// may appear yet. It must be looked for again.
var errNotFinal = errors.New("OpenAI does not find it, but it was created so recently that it may appear yet")

// isFinal reports whether OpenAI's not finding something that was created at a
// time, zero if unknown, is final.
func (b *backend) isFinal(created time.Time) bool {
	return created.IsZero() || b.now().Sub(created) >= time.Duration(b.settling.Load())
}

// accountDeleted returns nil if failure, that of a call about a service account,
// means that the account is deleted, and otherwise an error that says why that is
// not proven.
func (s *snapshot) accountDeleted(ctx context.Context, project, id string, failure error) error {
	return s.proveDeleted(ctx, project, id, failure, func(ctx context.Context) (bool, error) {
		_, err := s.api.GetServiceAccount(ctx, project, id)
		return false, err
	})
}

// keyDeleted is accountDeleted for a key. One that has expired by now, unless that is
// zero, counts as deleted.
func (s *snapshot) keyDeleted(ctx context.Context, project, id string, failure error, now time.Time) error {
	return s.proveDeleted(ctx, project, id, failure, func(ctx context.Context) (expired bool, err error) {
		key, err := s.api.GetProjectKey(ctx, project, id)
		return !key.ExpiresAt.IsZero() && s.api.NotAfter(now).After(key.ExpiresAt.Add(clockSlack)), err
	})
}

// proveDeleted makes two reads at most for the first 404 in a project, and one for
// each later one. read reads the thing of that ID, and reports whether it has ended
// although it is there.
func (s *snapshot) proveDeleted(ctx context.Context, project, id string, failure error, read func(context.Context) (ended bool, err error)) error {
	if !client.IsNotFound(failure) {
		return s.unlessArchived(ctx, project, failure)
	}
	if _, shown := s.shown.ids.Load(project); !shown || speaksOfProject(failure, project, id) {
		if archived, err := s.readProject(ctx, project, failure); archived || err != nil {
			return err
		}
	}
	ended, err := read(ctx)
	switch {
	case speaksOfProject(err, project, id):
		return unconfirmed(failure, err)
	case client.IsNotFound(err), err == nil && ended:
		return nil
	case err == nil:
		return fmt.Errorf("%w; not taken for deleted: OpenAI still shows it", failure)
	case s.unlessArchived(ctx, project, err) == nil: // since it was shown
		return nil
	}
	return unconfirmed(failure, err)
}

// speaksOfProject reports whether a 404 is for the project and not for the thing in
// it, of which it then says nothing.
func speaksOfProject(err error, project, id string) bool {
	e := client.AsError(err)
	return e != nil && e.NotFound() && (strings.HasPrefix(e.Code, "project") || strings.Contains(e.Message, project) && !strings.Contains(e.Message, id))
}

// unlessArchived returns failure, that of a call about something in a project, or
// nil if the project is archived and therefore has no accounts or keys. What OpenAI
// answers to calls about those is not published (docs/openai-api.md).
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

// readProject notes that OpenAI shows the project, or returns why that is not so.
func (s *snapshot) readProject(ctx context.Context, id string, failure error) (archived bool, err error) {
	project, err := s.api.GetProject(ctx, id)
	switch {
	case client.IsNotFound(err):
		return false, fmt.Errorf("%w; not taken for deleted: the admin key's organization does not have project %s", failure, id)
	case err != nil:
		return false, unconfirmed(failure, err)
	case project.ID != id:
		return false, fmt.Errorf("%w; not taken for deleted: the read of project %s was answered with project %.64q", failure, id, project.ID)
	case project.Archived():
		return true, nil
	}
	s.shown.ids.Store(id, true)
	return false, nil
}

// unconfirmed is the error of a 404 that another call was to confirm. The cause
// is what kept that call from it, if others would share it.
func unconfirmed(failure, err error) error {
	if shared(err) || client.IsDenied(err) {
		failure = errors.New(failure.Error())
	}
	return fmt.Errorf("%w; whether it is deleted could not be confirmed: %w", failure, err)
}

// deleteAdminKey deletes an admin key. Without an error it is deleted.
func (s *snapshot) deleteAdminKey(ctx context.Context, id string) error {
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
		return fmt.Errorf("%w; not taken for deleted: the list of admin keys does not show the current key %s", failure, s.config.AdminKeyID)
	case has(id):
		return fmt.Errorf("%w; not taken for deleted: OpenAI still lists it", failure)
	}
	return nil
}
