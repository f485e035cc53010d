package openaisecrets

// This file owns the replacement of a static role's key, and the end of a role.
//
// What must stay true: a new key has its WAL entry before it is created, and is
// accepted by OpenAI before it is stored, together with the note that the old one is
// superseded, in one write; after that write nothing returns an error. The caller
// holds the role's lock.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

// rotateStatic gives the role a new key, and with the first one its account if
// it has none, and stores it. The caller holds the role's lock, has just read r
// from storage or is creating it, and finishes whether or not its client waits.
// With force no superseded key lives on, whatever its use. An error means that
// storage holds what it did, unless it is errWhichStaticKey.
func (b *backend) rotateStatic(ctx context.Context, req *logical.Request, name string, r *staticRole, force bool) (next *staticRole, warnings []string, err error) {
	b.issuing.Add(1) // the drain waits for it
	defer b.issuing.Add(-1)
	defer func() {
		b.metrics.staticRotated(name, err)
		if err != nil {
			b.notify(eventStaticRotateFail, req.MountPoint, "static-creds/"+name, false, "name", name)
		}
	}()
	if len(r.Retired) >= maxRetired {
		return nil, nil, mistake(fmt.Sprintf("%d replaced keys wait for the end of revocation_delay or could not be deleted; the next rotation waits for them", len(r.Retired)))
	}
	m, err := b.obtain(ctx, req, r.order(name, req.DisplayName, b.now()))
	if client.IsNotFound(err) && r.ServiceAccountID != "" {
		err = b.explainMissing(ctx, req, r, err)
	}
	if err != nil {
		return nil, nil, err
	}
	defer b.wal.release(m.walID)
	now := b.now()
	next = r.clone()
	next.correct(now)
	if r.Current.ID != "" {
		old := next.Current
		old.Value, old.Warning = client.Secret{}, ""
		old.SupersededAt, old.SuccessorAt = now.UTC().Truncate(time.Second), m.supersedes(now)
		old.DeleteAfter, old.EvenIfUsed = old.SupersededAt.Add(r.RevocationDelay), r.RevocationDelay == 0
		next.Retired = append(next.Retired, old)
	}
	if r.ServiceAccountID == "" {
		next.AccountCreatedAt = m.CreatedAt
	}
	if force {
		next.endNow(now)
	}
	next.ServiceAccountID, next.ServiceAccount = m.ID, m.Name
	next.Current = staticKey{
		ID: m.KeyID, Name: m.KeyName, Value: m.key.Value, ExpiresAt: m.KeyExpires, Warning: m.warning,
		CreatedAt: m.CreatedAt, OpenAICreatedAt: m.key.CreatedAt.UTC(), OpenAIExpiresAt: m.key.ExpiresAt.UTC(),
	}
	next.LastRotated, next.RotationError = now.UTC().Truncate(time.Second), ""
	next.planFrom(now)
	if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
		// Which of the two storage holds is not known now. All that may be named
		// there lives; the journal destroys what was made if it is not.
		b.static.lookAt(name, now)
		return nil, nil, fmt.Errorf("%w: %w", errWhichStaticKey, err)
	}
	if err := framework.DeleteWAL(ctx, req.Storage, m.walID); err != nil {
		b.log(req).Warn("journal entry of a rotation not deleted; the worker will find the key in use", "static_role", name, "error", err)
	}
	b.notify(eventStaticRotate, req.MountPoint, "static-creds/"+name, true, append([]string{"name", name}, m.pairs()...)...)
	b.log(req).Info("static role rotated", append([]any{"static_role", name, "retired_api_key_id", r.Current.ID, "openai_request_id", m.requestID,
		"next_rotation", text.Time(next.NextRotation), "expires_at", text.Time(next.Current.ExpiresAt)}, m.attrs()...)...)
	next, warnings = b.endUnwanted(ctx, req, name, next)
	if m.warning != "" {
		warnings = append(warnings, m.warning)
	}
	b.static.succeeded(name)
	b.static.set(name, next.plan(b.now()))
	return next, warnings, nil
}

// supersedes is when a key that was made and activated by now supersedes another, by
// OpenAI's clock. Zero if OpenAI does not say when it made it.
func (m *made) supersedes(now time.Time) time.Time {
	if m.key.CreatedAt.IsZero() {
		return time.Time{}
	}
	// This server's clock may be set meanwhile.
	activation := min(max(now.Sub(m.began), 0), requestBudget)
	return m.key.CreatedAt.UTC().Add(activation).Truncate(time.Second)
}

// explainMissing explains a 404 to the create of a key: whether its account is
// deleted takes more than that to know.
func (b *backend) explainMissing(ctx context.Context, req *logical.Request, r *staticRole, failure error) error {
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return failure
	}
	switch err := snap.accountDeleted(ctx, r.ProjectID, r.ServiceAccountID, failure); {
	case err != nil:
		return fmt.Errorf("OpenAI did not find service account %s: %w", r.ServiceAccountID, err)
	case !b.isFinal(r.AccountCreatedAt):
		return fmt.Errorf("service account %s: %w: %w", r.ServiceAccountID, errNotFinal, failure)
	}
	return fmt.Errorf("service account %s is not there any more; delete the static role and write it anew: %w", r.ServiceAccountID, failure)
}

var errWhichStaticKey = errors.New("storage failed while the new key was put in force; it is in force, or all is as it was and the journal deletes it")

// endUnwanted deletes at once the superseded keys that the operator wants gone. It
// reads none of them, since a request waits. The caller holds the role's lock.
func (b *backend) endUnwanted(ctx context.Context, req *logical.Request, name string, r *staticRole) (next *staticRole, warnings []string) {
	due := func(r *staticRole) bool {
		return slices.ContainsFunc(r.Retired, func(k staticKey) bool { return k.EvenIfUsed && !b.now().Before(k.DeleteAfter) })
	}
	if !due(r) {
		return r, nil
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	if r, _ = b.endRetiredKeys(ctx, req, name, r, false); due(r) {
		warnings = append(warnings, "The old key could not be deleted yet; the engine tries again every minute.")
	}
	return r, warnings
}

// endRetiredKeys deletes the superseded keys that are due and stores the rest. One
// that was used after its end may be another Vault's current key, one that was
// restored from a snapshot of this one's storage: it is read, and kept for a while.
// Without read only those go whose use does not matter. The caller holds the role's
// lock. Failures are logged, the last is returned, and they are tried again.
func (b *backend) endRetiredKeys(ctx context.Context, req *logical.Request, name string, r *staticRole, read bool) (next *staticRole, last error) {
	now := b.now()
	next = r.clone()
	full := len(r.Retired) >= maxRetired // without room there is no rotation
	changed := false
	var rest []staticKey
	for _, k := range r.Retired {
		if now.Before(k.due(r.RevocationDelay)) || (!read && !k.EvenIfUsed) {
			rest = append(rest, k)
			continue
		}
		if last = cmp.Or(last, ctx.Err()); ctx.Err() != nil || shared(last) { // the others would fare no better
			rest = append(rest, k)
			continue
		}
		c := r.credential(name, &k)
		log := b.log(req).With("static_role", name).With(c.attrs()...)
		snap, err := b.current(ctx, req.Storage)
		used := time.Time{}
		if err == nil && !k.EvenIfUsed && !full && now.Before(k.keptUntil(r.RevocationDelay)) {
			used, err = snap.lastUse(ctx, r.ProjectID, k.ID)
		}
		if err == nil && k.usedAfterEnd(used, r.RevocationDelay) {
			k.KeptAt, k.LastUsedAt, changed = now.UTC().Truncate(time.Second), used.UTC(), true
			log.Warn("superseded key kept: it was used after its end, perhaps by another Vault; rotate-role with force=true deletes it",
				"last_used_at", text.Time(used), "delete_after", text.Time(k.DeleteAfter), "kept_until", text.Time(k.keptUntil(r.RevocationDelay)))
			rest = append(rest, k)
			continue
		}
		if err == nil && k.tooSoon(used, now, r.RevocationDelay) {
			k.putOff(r.RevocationDelay)
			rest, changed = append(rest, k), true
			continue
		}
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		if errors.Is(err, errNotFinal) { // looked for again
			last = cmp.Or(last, errNotFinal)
			rest = append(rest, k)
			continue
		}
		b.metrics.staticKeyRevoked(name, err)
		if err != nil {
			log.Warn("retired key not deleted", "error", err)
			last = err
			rest = append(rest, k)
			continue
		}
		log.Info("retired key deleted")
		changed = true
	}
	if !changed {
		return r, last
	}
	next.Retired = rest
	// What was done is stored although the time for doing more is over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
		// The keys are deleted; deleting them again finds them gone.
		b.log(req).Warn("static role not stored after deleting retired keys", "static_role", name, "error", err)
		return r, err
	}
	return next, last
}

// lastUse is when OpenAI last saw a key in use; zero if it never did, does not say,
// or does not find the key.
func (s *snapshot) lastUse(ctx context.Context, project, id string) (time.Time, error) {
	key, err := s.api.GetProjectKey(ctx, project, id)
	if client.IsNotFound(err) { // its deletion proves whether it is deleted
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, s.unlessArchived(ctx, project, err)
	}
	return key.LastUsedAt, nil
}

// endStaticRole deletes a role and what it owns at OpenAI: first journalled,
// then unnamed, then destroyed. It says what is left to the journal. The caller
// holds the role's lock.
func (b *backend) endStaticRole(ctx context.Context, req *logical.Request, name string, r *staticRole) (left string, err error) {
	owned := r.owned(name)
	var entries []string
	for _, c := range owned {
		// Until the role is gone it names what the entries name, and nothing is
		// destroyed for them. Entries of their own: the worker may be about to end
		// those of a delete that has failed.
		id, err := framework.PutWAL(ctx, req.Storage, journalKind(c, true), c)
		if err != nil {
			return "", fmt.Errorf("static role %q not deleted: writing the journal: %w", name, err)
		}
		entries = append(entries, id)
	}
	if err := req.Storage.Delete(ctx, staticStoragePrefix+name); err != nil {
		return "", fmt.Errorf("deleting static role %q: %w", name, err)
	}
	b.static.drop(name)
	shown := client.HideKeys(name) // of what was stored before the rule
	log := b.log(req).With("static_role", shown)
	b.notify(eventStaticDelete, req.MountPoint, "static-roles/"+shown, true, "name", shown)
	log.Info("static role deleted", "adopted", r.Adopted)
	var lefts []string
	for i, c := range owned {
		snap, err := b.current(ctx, req.Storage)
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		if errors.Is(err, errNotFinal) {
			log.Info("OpenAI does not find what the static role owned, and is asked again since it is new", c.attrs()...)
			continue
		}
		if err != nil {
			log.Warn("what the static role owned is left to the journal", append(c.attrs(), "error", err)...)
			lefts = append(lefts, fmt.Sprintf("%s: %s", c.what(), err))
			continue
		}
		log.Info("what the static role owned is deleted", c.attrs()...)
		if err := framework.DeleteWAL(ctx, req.Storage, entries[i]); err != nil {
			log.Warn("journal entry not deleted; the worker will find nothing to do", "error", err)
		}
	}
	return strings.Join(lefts, "; "), nil
}

// beginStatic begins a change of a role, under its lock. Once it has begun it is
// finished, whether or not its client waits: a key that was made is stored or
// destroyed.
func (b *backend) beginStatic(ctx context.Context, name string) (_ context.Context, done func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	unlock, err := b.lockStatic(ctx, name)
	if err != nil {
		cancel()
		return nil, nil, err
	}
	deadline, _ := ctx.Deadline()
	cancel()
	ctx, cancel = context.WithDeadline(context.WithoutCancel(ctx), deadline)
	return ctx, func() { unlock(); cancel() }, nil
}

// unavailable reports whether OpenAI could not be asked, or refused for another
// reason than what was asked for.
func unavailable(err error) bool {
	if errors.Is(err, errNotConfigured) {
		return true
	}
	e := client.AsError(err)
	return e != nil && !errors.Is(err, errWhichStaticKey) &&
		(e.Status == 0 || e.Ambiguous() || e.RateLimited() || e.Denied() || e.Status == http.StatusProxyAuthRequired)
}
