package openaisecrets

// This file owns the rotation of a static role's key, and the deletion of a role.
//
// What must stay true: a new key has a WAL entry before it is created. Unless the role
// skips the probe (activation_timeout=0) or ignores its failure (activation_failure=warn),
// OpenAI accepts the key before one write stores it and marks the old one superseded; after
// that write nothing returns an error. The caller holds the role's lock.
// docs/failures.md#rotation has what a crash leaves at each step.

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
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/text"
)

// rotateStatic creates a key for the role, with an account if it has none, and stores
// it. The caller holds the role's lock, and has just read r from storage or is creating
// it. The context must not end with the client (beginStatic); the worker's ends with the
// backend. With force, superseded keys are deleted even if they are still used. After an
// error, the role's entry is unchanged unless the error is errWhichStaticKey.
func (b *backend) rotateStatic(ctx context.Context, req *logical.Request, name string, r *staticRole, force bool) (next *staticRole, warnings []string, err error) {
	b.issuing.Add(1) // the drain waits for it
	defer b.issuing.Add(-1)
	defer func() {
		b.metrics.StaticRotated(name, outcome(nil, err))
		if err != nil {
			b.events.Emit(events.StaticRotateFail, req.MountPoint, "static-creds/"+name, false, "name", name)
		}
	}()
	if len(r.Superseded) >= maxSuperseded {
		return nil, nil, clientError(fmt.Sprintf("%d superseded keys are not deleted yet, so the key cannot be rotated; to delete them now, run rotate-role with force=true", len(r.Superseded)))
	}
	m, err := b.makeCredential(ctx, req, r.keySpec(name, req.DisplayName, b.now()))
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
		next.Superseded = append(next.Superseded, old)
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
	next.LastRotated, next.RotationError, next.Missing = now.UTC().Truncate(time.Second), "", nil
	next.PlanFrom(now)
	if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
		// It is not known which of the two keys storage holds, so neither is destroyed;
		// the WAL destroys the new one if the role does not have it.
		b.static.lookAt(name, now)
		return nil, nil, fmt.Errorf("%w: %w", errWhichStaticKey, err)
	}
	if err := framework.DeleteWAL(ctx, req.Storage, m.walID); err != nil {
		b.log(req).Warn("WAL entry of a static role rotation not deleted; the WAL worker keeps the key, because it is active", "static_role", name, "error", err)
	}
	b.recordUsage(next.usageRecord(name, &next.Current))
	b.events.Emit(events.StaticRotate, req.MountPoint, "static-creds/"+name, true, append([]string{"name", name}, m.pairs()...)...)
	b.log(req).Info("static role rotated", append([]any{"static_role", name, "superseded_api_key_id", r.Current.ID, "openai_request_id", m.requestID,
		"next_rotation", text.Time(next.NextRotation), "expires_at", text.Time(next.Current.ExpiresAt)}, m.attrs()...)...)
	next, warnings = b.deleteUnwanted(ctx, req, name, next)
	if m.warning != "" {
		warnings = append(warnings, m.warning)
	}
	b.static.succeeded(name)
	b.static.set(name, next.plan(b.now()))
	return next, warnings, nil
}

// supersedes returns when a key that was created and activated by now supersedes
// another, by OpenAI's clock. Zero if OpenAI did not return its creation time.
func (m *issued) supersedes(now time.Time) time.Time {
	if m.key.CreatedAt.IsZero() {
		return time.Time{}
	}
	// This server's clock may have been set since.
	activation := min(max(now.Sub(m.began), 0), requestBudget)
	return m.key.CreatedAt.UTC().Add(activation).Truncate(time.Second)
}

// explainMissing explains a 404 for the creation of a key, which alone does not prove
// that the account is deleted.
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
	return fmt.Errorf("service account %s no longer exists; delete the static role and create it again: %w", r.ServiceAccountID, failure)
}

var errWhichStaticKey = errors.New("storage failed while the new key was being stored; read the static role to see which key is active; if the new key is not active, the WAL deletes it")

// deleteUnwanted deletes the superseded keys that are due even if they are still used. It
// does not read their use from OpenAI, since a request waits. The caller holds the
// role's lock.
func (b *backend) deleteUnwanted(ctx context.Context, req *logical.Request, name string, r *staticRole) (next *staticRole, warnings []string) {
	due := func(r *staticRole) bool {
		return slices.ContainsFunc(r.Superseded, func(k staticKey) bool { return k.EvenIfUsed && !b.now().Before(k.DeleteAfter) })
	}
	if !due(r) {
		return r, nil
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	if r, _ = b.deleteSupersededStaticKeys(ctx, req, name, r, false); due(r) {
		warnings = append(warnings, "The superseded key could not be deleted; the engine retries every minute.")
	}
	return r, warnings
}

// deleteSupersededStaticKeys deletes the superseded keys that are due and stores the
// role. A key that was used after its revocation was due is kept for a while: it may be
// the active key of another Vault, restored from a snapshot of this one. Without read,
// only keys whose use does not matter are deleted. Failures are logged and retried
// later, and the last one is returned. The caller holds the role's lock.
func (b *backend) deleteSupersededStaticKeys(ctx context.Context, req *logical.Request, name string, r *staticRole, read bool) (next *staticRole, last error) {
	now := b.now()
	next = r.clone()
	full := len(r.Superseded) >= maxSuperseded // it blocks rotation
	changed := false
	var rest []staticKey
	for _, k := range r.Superseded {
		if now.Before(k.due(r.RevocationDelay)) || (!read && !k.EvenIfUsed) {
			rest = append(rest, k)
			continue
		}
		if last = cmp.Or(last, ctx.Err()); ctx.Err() != nil || isSystemic(last) { // the other calls would fail, too
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
			log.Warn("superseded key retained: it was used after its revocation was due, possibly by another Vault; rotate-role with force=true deletes it",
				"last_used_at", text.Time(used), "delete_after", text.Time(k.DeleteAfter), "retained_until", text.Time(k.keptUntil(r.RevocationDelay)))
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
		if errors.Is(err, errNotFinal) { // verified again later
			last = cmp.Or(last, errNotFinal)
			rest = append(rest, k)
			continue
		}
		b.metrics.StaticKeyRevoked(name, outcome(nil, err))
		if err != nil {
			log.Warn("superseded key not deleted", "error", err)
			last = err
			rest = append(rest, k)
			continue
		}
		log.Info("superseded key deleted")
		changed = true
	}
	if !changed {
		return r, last
	}
	next.Superseded = rest
	// The deletions must be stored even if the context is done.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
		// The next run deletes the keys again, which is idempotent.
		b.log(req).Warn("static role not stored after the deletion of superseded keys", "static_role", name, "error", err)
		return r, err
	}
	return next, last
}

// lastUse returns the last use of a key that OpenAI reports; zero if it reports none or
// does not find the key.
func (s *snapshot) lastUse(ctx context.Context, project, id string) (time.Time, error) {
	key, err := s.api.GetProjectKey(ctx, project, id)
	if client.IsNotFound(err) { // destroy verifies whether it is deleted
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, s.unlessArchived(ctx, project, err)
	}
	return key.LastUsedAt, nil
}

// deleteStaticIdentity deletes a role and its credentials at OpenAI: it writes WAL
// entries, deletes the role's entry, then destroys the credentials. It returns those
// that stay queued in the WAL. The caller holds the role's lock.
func (b *backend) deleteStaticIdentity(ctx context.Context, req *logical.Request, name string, r *staticRole) (left string, err error) {
	owned := r.owned(name)
	var entries []string
	for _, c := range owned {
		// The WAL worker destroys nothing that a stored role needs. The entries are new,
		// since the worker may be about to delete those of an earlier failed delete.
		id, err := framework.PutWAL(ctx, req.Storage, walKind(c, true), c)
		if err != nil {
			return "", fmt.Errorf("static role %q not deleted: writing the WAL: %w", name, err)
		}
		entries = append(entries, id)
	}
	if err := req.Storage.Delete(ctx, staticStoragePrefix+name); err != nil {
		return "", fmt.Errorf("deleting static role %q: %w", name, err)
	}
	b.static.drop(name)
	shown := client.HideKeys(name) // an entry stored before checkKeys existed
	log := b.log(req).With("static_role", shown)
	b.events.Emit(events.StaticRoleDelete, req.MountPoint, "static-roles/"+shown, true, "name", shown)
	log.Info("static role deleted", "adopted", r.Adopted)
	var remaining []string
	for i, c := range owned {
		snap, err := b.current(ctx, req.Storage)
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		if errors.Is(err, errNotFinal) {
			log.Info("recently created credential of the static role not found at OpenAI; queued in the WAL for another check", c.attrs()...)
			continue
		}
		if err != nil {
			log.Warn("credential of the static role not deleted; queued for deletion in the WAL", append(c.attrs(), "error", err)...)
			remaining = append(remaining, fmt.Sprintf("%s: %s", c.describe(), err))
			continue
		}
		log.Info("credential of the static role deleted", c.attrs()...)
		if err := framework.DeleteWAL(ctx, req.Storage, entries[i]); err != nil {
			log.Warn("WAL entry not deleted; the WAL worker removes it", "error", err)
		}
	}
	return strings.Join(remaining, "; "), nil
}

// beginStatic begins a change of a role, under its lock. The returned context ignores
// the client's cancellation, so that a key that was created is stored or destroyed.
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

// unavailable reports whether OpenAI could not be reached, or rejected the request for
// a reason other than its content.
func unavailable(err error) bool {
	if errors.Is(err, errNotConfigured) {
		return true
	}
	e := client.AsError(err)
	return e != nil && !errors.Is(err, errWhichStaticKey) &&
		(e.Status == 0 || e.Ambiguous() || e.RateLimited() || e.Denied() || e.Status == http.StatusProxyAuthRequired)
}
