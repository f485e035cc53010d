package openaisecrets

// This file owns the rotation of the admin key and the cleanup after a rotation that did
// not finish; superseded.go owns the deletion of replaced keys.
//
// What must stay true: the new key is recorded in the WAL before it is created, verified
// before it is stored, and stored in one write that also records the old one as
// superseded; after that write nothing returns an error. Two rotations never run at once.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	adminKeyVersion = 1
)

// adminKeyEntry is the WAL entry of an admin key that is about to be created.
type adminKeyEntry struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	// CreatedAt is when the create was about to be sent; an entry without it counts as
	// old.
	CreatedAt time.Time `json:"created_at,omitzero"`
}

var (
	errWhichKey = errors.New("storage failed while it stored the new admin key, so the active key is unknown; both keys work, and the WAL deletes the new one if it is not active")
)

// rotateAdminKey replaces the admin key and returns the new config, and a note if others
// may use the old key. After an error the old key stays active, and the WAL has whatever
// remains at OpenAI.
func (b *backend) rotateAdminKey(ctx context.Context, req *logical.Request, force bool) (_ *config, note string, warnings []string, err error) {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, "", nil, err
	}
	defer unlock()

	// From storage instead of the snapshot, since it is modified and written back.
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, "", nil, err
	}
	if cfg == nil {
		return nil, "", nil, errNotConfigured
	}
	if problem := cfg.crowded(b.now()); problem != "" && !force {
		return nil, "", nil, clientError(problem)
	}
	next, warnings, err := b.rotateLocked(ctx, req, cfg, force)
	if err == nil && !cfg.AdminKeyRotated {
		when := "immediately"
		if grace := next.RotationGracePeriod; grace > 0 && !force {
			when = "in " + grace.String()
		}
		note = fmt.Sprintf("Admin key %s, which was written to the config, stops working %s, including in any other mount or program that uses it. Give each mount its own admin key.", cfg.AdminKeyID, when)
	}
	return next, note, warnings, err
}

// rotateLocked rotates the admin key. The caller holds configLock and has just read cfg
// from storage. With force, superseded keys have no grace period.
func (b *backend) rotateLocked(ctx context.Context, req *logical.Request, cfg *config, force bool) (_ *config, _ []string, err error) {
	defer func() {
		b.metrics.Rotated(outcome(nil, err))
		if err != nil {
			b.events.Emit(events.RotateFail, req.MountPoint, configStorageKey, false, "admin_api_key_id", cfg.AdminKeyID)
		}
	}()
	if b.isDraining() { // the drain may have started while this rotation waited for configLock
		return nil, nil, errors.New("this mount is being disabled")
	}
	tag, err := b.ensureTag(ctx, req.Storage)
	if err != nil {
		return nil, nil, err
	}
	api, err := b.newClient(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	defer api.Close()
	// After a write with skip_verify, the ID may be missing or belong to another key.
	keys, resp, err := findAdminKeyID(ctx, cfg, api)
	if err != nil {
		return nil, nil, err
	} else if resp != nil {
		return nil, nil, errAdminKeyIDUnknown
	}

	life := cfg.keyLife(b.now())
	key, value, walID, err := b.createAdminKey(ctx, req.Storage, api, tag, life)
	if err != nil {
		return nil, nil, err
	}
	next := cfg.clone()
	next.locate(keys, false)
	next.supersedeKey(b.now(), key.CreatedAt)
	var lost []string
	if force {
		lost = next.supersededIDs(isElsewhere)
		next.Superseded = slices.DeleteFunc(next.Superseded, func(k supersededKey) bool { return k.Elsewhere })
	}
	if force || next.RotationGracePeriod == 0 {
		next.hurry(0, b.now())
	}
	next.AdminKey, next.AdminKeyID, next.AdminKeyRotated = value, key.ID, true
	next.LastRotated = b.now().UTC().Truncate(time.Second)
	next.AdminKeyExpires = key.ExpiresAt
	if life != 0 && next.AdminKeyExpires.IsZero() {
		next.AdminKeyExpires = next.LastRotated.Add(life) // requested, though not confirmed
	}
	next.RotationError = ""
	next.plan(b.now())
	nextAPI, err := b.newClient(ctx, next)
	if err != nil {
		return nil, nil, err // the WAL deletes the new key
	}
	if err := settle(ctx, nextAPI, key.ID); err != nil {
		nextAPI.Close()
		b.discardAdminKey(ctx, req, api, key.ID, walID)
		if client.BlamesKey(err) || client.IsNotFound(err) {
			return nil, nil, upstreamError(fmt.Sprintf("the new admin key does not work: %s", err)) // the active key is not to blame
		}
		return nil, nil, fmt.Errorf("verifying the new admin key: %w", err)
	}

	if err := putConfig(ctx, req.Storage, next); err != nil {
		// Storage may hold either key. Both are valid; the WAL deletes the new one if it
		// is not the stored one.
		b.dropSnapshot()
		nextAPI.Close()
		return nil, nil, fmt.Errorf("%w: %w", errWhichKey, err)
	}
	snap := newSnapshot(next, nextAPI, tag)
	b.install(snap)
	b.rotation.succeeded()

	var warnings []string
	if err := framework.DeleteWAL(ctx, req.Storage, walID); err != nil {
		warnings = append(warnings, "The WAL entry of the new key could not be deleted; the WAL worker deletes the entry, and the key stays active.")
		b.log(req).Warn("WAL entry of a rotation not deleted", "admin_api_key_id", key.ID, "error", err)
	}
	b.events.Emit(events.Rotate, req.MountPoint, configStorageKey, true, "admin_api_key_id", key.ID)
	b.log(req).Info("admin key rotated", "admin_api_key_id", key.ID, "superseded_admin_api_key_id", cfg.AdminKeyID, "delete_after", text.Time(next.Superseded[len(next.Superseded)-1].DeleteAfter),
		"expires_at", text.Time(next.AdminKeyExpires), "next_rotation", text.Time(next.NextRotation))
	if force || next.RotationGracePeriod == 0 {
		if left := b.processSuperseded(ctx, req, snap, b.atOnce()).supersededIDs(b.atOnce()); len(left) > 0 {
			warnings = append(warnings, notDeletedText(left))
		}
	}
	if len(lost) > 0 {
		warnings = append(warnings, elsewhereText(lost))
	}
	return next, warnings, nil
}

// createAdminKey creates an admin key and returns it with the ID of its WAL entry. Each
// attempt has a fresh name, recorded in the WAL. After an error the WAL has every key
// that may exist.
func (b *backend) createAdminKey(ctx context.Context, s logical.Storage, api *client.Client, tag string, life time.Duration) (client.AdminKey, client.Secret, string, error) {
	for attempt, again := 0, false; ; again = true {
		if again {
			b.metrics.Repeated("create_admin_key")
		}
		random, err := naming.Random(naming.RandomLength)
		if err != nil {
			return client.AdminKey{}, client.Secret{}, "", err
		}
		name := "vault-admin-" + tag + random
		walID, err := framework.PutWAL(ctx, s, walAdminKey, adminKeyEntry{Version: adminKeyVersion, Name: name, CreatedAt: b.now().UTC()})
		if err != nil {
			return client.AdminKey{}, client.Secret{}, "", fmt.Errorf("writing the WAL: %w", err)
		}
		requestID := ""
		key, value, err := api.CreateAdminKey(ctx, name, life, client.WithRequestID(&requestID))
		if err == nil {
			b.Logger().Info("admin key created", "admin_api_key_id", key.ID, "openai_request_id", requestID)
			return key, value, walID, nil
		}
		e := client.AsError(err)
		if !e.Ambiguous() {
			if walErr := framework.DeleteWAL(ctx, s, walID); walErr != nil {
				return client.AdminKey{}, client.Secret{}, "", fmt.Errorf("%w; deleting its WAL entry also failed: %w", err, walErr)
			}
		}
		if e.RateLimited() && e.Retryable() {
			continue // the rate limiter delays the next call
		}
		if attempt++; attempt >= maxAttempts || !e.Retryable() || client.Wait(ctx, client.Backoff(attempt-1, e.RetryAfter)) != nil {
			return client.AdminKey{}, client.Secret{}, "", err
		}
	}
}

// settle waits until a new admin key works for reads and writes, twice in a row and the
// second time over a new connection: OpenAI's servers may not all accept a key at the
// same time.
func settle(ctx context.Context, api *client.Client, id string) error {
	ctx, cancel := context.WithTimeout(ctx, settleBudget)
	defer cancel()
	worked := false
	var verdict error // the last error about the key rather than the call
	for attempt := 0; ; {
		_, err := api.GetAdminKey(ctx, id)
		if err == nil {
			err = api.CheckWrite(ctx)
		}
		pause := client.Backoff(0, 0)
		switch {
		case err == nil && worked:
			return nil
		case err == nil:
			worked = true
			api.Close()
		default:
			if e := client.AsError(err); verdict == nil || e.Denied() || e.NotFound() {
				verdict = err
				worked = worked && !e.Denied() && !e.NotFound()
			}
			pause = client.Backoff(attempt, 0)
			attempt++
		}
		if client.Wait(ctx, pause) != nil {
			if worked {
				return nil
			}
			return verdict
		}
	}
}

// discardAdminKey deletes a new key that does not work. If that fails, the key stays in
// the WAL.
func (b *backend) discardAdminKey(ctx context.Context, req *logical.Request, api *client.Client, id, walID string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	err := api.DeleteAdminKey(ctx, id)
	if err == nil {
		err = framework.DeleteWAL(ctx, req.Storage, walID)
	} else if client.IsNotFound(err) {
		err = errNotFinal // the key is seconds old
	}
	if err != nil {
		b.log(req).Warn("discarded admin key queued for deletion in the WAL", "admin_api_key_id", id, "error", err)
	}
}

// rollbackAdminKey deletes the admin key of a WAL entry, unless it is in use: then only
// the deletion of its entry had failed. A key counts as never created only if two
// complete lists, which show the current key, do not show it, and only if the entry was
// old enough by then: nothing else looks for an admin key that a list omitted.
func (b *backend) rollbackAdminKey(ctx context.Context, req *logical.Request, entry adminKeyEntry, minAge time.Duration) error {
	if now := b.now(); entry.CreatedAt.After(now.Add(clockTolerance)) {
		// Written while the clock was ahead. A new entry replaces this one.
		b.log(req).Warn("WAL entry of an admin key has a creation time in the future; reset to the current time", "name", entry.Name, "created_at", text.Time(entry.CreatedAt))
		entry.CreatedAt = now.UTC()
		_, err := framework.PutWAL(ctx, req.Storage, walAdminKey, entry)
		return err
	}
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return err
	}
	final, asked := b.isFinal(entry.CreatedAt), time.Now()
	keys, err := snap.api.ListAdminKeys(ctx)
	if err != nil {
		return err
	}
	now := snap.api.NowOr(b.now()) // by OpenAI's clock, which its answer has just told
	complete := slices.ContainsFunc(keys, func(k client.AdminKey) bool { return k.ID == snap.config.AdminKeyID })
	keys = slices.DeleteFunc(keys, func(k client.AdminKey) bool { return k.Name != entry.Name })
	switch {
	case len(keys) > 0:
	case !final:
		return errNotFinal
	case !complete:
		return fmt.Errorf("admin key %q of an unfinished rotation may still exist: the list of admin keys is incomplete, since it does not show the current key %q", entry.Name, snap.config.AdminKeyID)
	default:
		return b.notListed(entry.Name, asked, false)
	}
	b.unseen.forget(entry.Name)
	wait, cancel := context.WithTimeout(ctx, lockBudget)
	defer cancel()
	unlock, err := b.lockConfig(wait)
	if err != nil {
		return err
	}
	// From storage: after errWhichKey this node does not know which config is stored.
	b.dropSnapshot()
	snap, err = b.current(ctx, req.Storage)
	unlock() // the rotation that created the key has ended, so nothing can store it later
	if err != nil {
		return err
	}
	for _, key := range keys {
		recorded := key.ID == snap.config.AdminKeyID ||
			slices.ContainsFunc(snap.config.Superseded, func(r supersededKey) bool { return r.ID == key.ID })
		if recorded {
			continue
		}
		created := key.CreatedAt // by OpenAI's clock, as last_used_at
		if created.IsZero() {
			created = entry.CreatedAt
		}
		// An unfinished request does not use its key for longer. Otherwise this Vault is
		// a copy of one whose rotation finished and stored the key, until that expires.
		theirs, known := snap.api.Now()
		expired := known && !key.ExpiresAt.IsZero() && earlier(theirs, b.now()).After(key.ExpiresAt.Add(clockSlack))
		if !expired && !created.IsZero() && key.LastUsedAt.After(created.Add(requestBudget+cleanupBudget)) {
			return fmt.Errorf("admin key %s (%s): %w", key.ID, key.Name, errKeyUsed)
		}
		// A create can be sent long after its entry was written, so a young key has had
		// no time to show that it is in use.
		if minAge > 0 && now.Sub(created) < minAge {
			return errNotFinal
		}
		if err := b.deleteAdminKey(ctx, snap, key.ID, entry.CreatedAt); err != nil {
			return err
		}
		b.log(req).Info("admin key of an unfinished rotation deleted", "admin_api_key_id", key.ID, "name", key.Name)
	}
	return nil
}
