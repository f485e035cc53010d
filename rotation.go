package openaisecrets

// This file owns the replacement of the admin key and the end of what a rotation
// that did not finish has made; superseded.go has the end of replaced keys.
//
// What must stay true: the new key is journalled before it is made, verified
// before it is stored, and stored together with the note that the old one is
// retired, in one write; after that write nothing returns an error. Two rotations
// never run at once.

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
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	adminKeyVersion = 1
)

// adminKeyEntry is the journal's record of an admin key about to be made.
type adminKeyEntry struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	// CreatedAt is when it was about to be made; entries of earlier releases have
	// none and count as old.
	CreatedAt time.Time `json:"created_at,omitzero"`
}

var (
	errWhichKey = errors.New("storage failed while the new admin key was put in force; the old one or the new one is, both work, and the journal deletes the new one if it is not")
)

// rotateAdminKey replaces the admin key and returns the config then in force, and
// a note where a person may hold the old key. An error means that the old key
// stays in force; what is left over at OpenAI is in the journal.
func (b *backend) rotateAdminKey(ctx context.Context, req *logical.Request, force bool) (_ *config, note string, warnings []string, err error) {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, "", nil, err
	}
	defer unlock()

	// From storage, not from the snapshot: this is the base of a write.
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, "", nil, err
	}
	if cfg == nil {
		return nil, "", nil, errNotConfigured
	}
	if problem := cfg.crowded(b.now()); problem != "" && !force {
		return nil, "", nil, mistake(problem)
	}
	next, warnings, err := b.rotateLocked(ctx, req, cfg, force)
	if err == nil && !cfg.AdminKeyRotated {
		when := "at once"
		if grace := next.RotationGracePeriod; grace > 0 && !force {
			when = "in " + grace.String()
		}
		note = fmt.Sprintf("The admin key %s that was written to the config stops working %s, also in any other mount or program that has it. Give each mount an admin key of its own.", cfg.AdminKeyID, when)
	}
	return next, note, warnings, err
}

// rotateLocked is the rotation itself, whoever asked for it. The caller holds
// configLock and has just read cfg from storage.
// With force no superseded key has a grace period.
func (b *backend) rotateLocked(ctx context.Context, req *logical.Request, cfg *config, force bool) (_ *config, _ []string, err error) {
	defer func() {
		b.metrics.rotated(err)
		if err != nil {
			b.notify(eventRotateFail, req.MountPoint, configStorageKey, false, "admin_api_key_id", cfg.AdminKeyID)
		}
	}()
	if b.isDraining() { // one that has waited for the config while the drain had it
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
	// Stored with skip_verify, the ID may be missing, or somebody else's key's.
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
	next.retire(b.now(), key.CreatedAt)
	var lost []string
	if force {
		lost = next.retiredIDs(isElsewhere)
		next.Retired = slices.DeleteFunc(next.Retired, func(k retiredKey) bool { return k.Elsewhere })
	}
	if force || next.RotationGracePeriod == 0 {
		next.hurry(0, b.now())
	}
	next.AdminKey, next.AdminKeyID, next.AdminKeyRotated = value, key.ID, true
	next.LastRotated = b.now().UTC().Truncate(time.Second)
	next.AdminKeyExpires = key.ExpiresAt
	if life != 0 && next.AdminKeyExpires.IsZero() {
		next.AdminKeyExpires = next.LastRotated.Add(life) // what was asked for, though not confirmed
	}
	next.RotationError = ""
	next.plan(b.now())
	nextAPI, err := b.newClient(ctx, next)
	if err != nil {
		return nil, nil, err // the journal deletes the new key
	}
	if err := settle(ctx, nextAPI, key.ID); err != nil {
		nextAPI.Close()
		b.discardAdminKey(ctx, req, api, key.ID, walID)
		if client.BlamesKey(err) || client.IsNotFound(err) {
			return nil, nil, upstream(fmt.Sprintf("the new admin key does not work: %s", err)) // and not the one in force
		}
		return nil, nil, fmt.Errorf("the new admin key could not be verified: %w", err)
	}

	if err := putConfig(ctx, req.Storage, next); err != nil {
		// Which of the two keys storage holds is not known now. Both live;
		// the journal deletes the new one if it is not the stored one.
		b.dropSnapshot()
		nextAPI.Close()
		return nil, nil, fmt.Errorf("%w: %w", errWhichKey, err)
	}
	snap := newSnapshot(next, nextAPI, tag)
	b.install(snap)
	b.rotation.settled()

	var warnings []string
	if err := framework.DeleteWAL(ctx, req.Storage, walID); err != nil {
		warnings = append(warnings, "The journal entry of the new key could not be deleted; the next rollback clears it.")
		b.log(req).Warn("journal entry of a rotation not deleted", "admin_api_key_id", key.ID, "error", err)
	}
	b.notify(eventRotate, req.MountPoint, configStorageKey, true, "admin_api_key_id", key.ID)
	b.log(req).Info("admin key rotated", "admin_api_key_id", key.ID, "retired_admin_api_key_id", cfg.AdminKeyID, "delete_after", text.Time(next.Retired[len(next.Retired)-1].DeleteAfter),
		"expires_at", text.Time(next.AdminKeyExpires), "next_rotation", text.Time(next.NextRotation))
	if force || next.RotationGracePeriod == 0 {
		if left := b.sweepRetired(ctx, req, snap, b.atOnce()).retiredIDs(b.atOnce()); len(left) > 0 {
			warnings = append(warnings, notDeletedText(left))
		}
	}
	if len(lost) > 0 {
		warnings = append(warnings, elsewhereText(lost))
	}
	return next, warnings, nil
}

// createAdminKey makes an admin key, each attempt under a fresh, journalled
// name, and returns it with its journal entry's ID. After an error the journal
// holds whatever may exist.
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
		walID, err := framework.PutWAL(ctx, s, journalAdminKey, adminKeyEntry{Version: adminKeyVersion, Name: name, CreatedAt: b.now().UTC()})
		if err != nil {
			return client.AdminKey{}, client.Secret{}, "", fmt.Errorf("writing the journal: %w", err)
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
				return client.AdminKey{}, client.Secret{}, "", fmt.Errorf("%w; and its journal entry could not be deleted: %w", err, walErr)
			}
		}
		if e.RateLimited() && e.Retryable() {
			continue // the pace knows when the next call fits
		}
		if attempt++; attempt >= maxAttempts || !e.Retryable() || client.Wait(ctx, client.Backoff(attempt-1, e.RetryAfter)) != nil {
			return client.AdminKey{}, client.Secret{}, "", err
		}
	}
}

// settle waits until a new admin key works for reading and for writing, twice
// in a row and the second time over another connection: OpenAI's servers need
// not all learn of a key at the same moment.
func settle(ctx context.Context, api *client.Client, id string) error {
	ctx, cancel := context.WithTimeout(ctx, settleBudget)
	defer cancel()
	worked := false
	var verdict error // the last that was said of the key, and not of the call
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

// discardAdminKey deletes a new key that does not work. What cannot be deleted
// now stays journalled.
func (b *backend) discardAdminKey(ctx context.Context, req *logical.Request, api *client.Client, id, walID string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	err := api.DeleteAdminKey(ctx, id)
	if err == nil {
		err = framework.DeleteWAL(ctx, req.Storage, walID)
	} else if client.IsNotFound(err) {
		err = errNotFinal // it is seconds old
	}
	if err != nil {
		b.log(req).Warn("discarded admin key is left to the journal", "admin_api_key_id", id, "error", err)
	}
}

// rollbackAdminKey deletes what a journalled create of an admin key made, unless
// it is in use: then only the deletion of its entry had failed. That nothing was
// made is only said by a complete list, which shows the current key, only of an entry
// that is old enough when the list is read, and only the second time: nothing else
// looks for an admin key that a list has left out once.
func (b *backend) rollbackAdminKey(ctx context.Context, req *logical.Request, entry adminKeyEntry) error {
	if now := b.now(); entry.CreatedAt.After(now.Add(clockTolerance)) {
		// The clock was ahead then. Another entry takes this one's place.
		b.log(req).Warn("journal entry of an admin key is of the future; its age is counted from now", "name", entry.Name, "created_at", text.Time(entry.CreatedAt))
		entry.CreatedAt = now.UTC()
		_, err := framework.PutWAL(ctx, req.Storage, journalAdminKey, entry)
		return err
	}
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return err
	}
	final := b.isFinal(entry.CreatedAt)
	keys, err := snap.api.ListAdminKeys(ctx)
	if err != nil {
		return err
	}
	complete := slices.ContainsFunc(keys, func(k client.AdminKey) bool { return k.ID == snap.config.AdminKeyID })
	keys = slices.DeleteFunc(keys, func(k client.AdminKey) bool { return k.Name != entry.Name })
	switch {
	case len(keys) > 0:
	case !final:
		return errNotFinal
	case !complete:
		return fmt.Errorf("admin key %q of an unfinished rotation: the list of admin keys does not show the current key %q, so it does not say that there is none", entry.Name, snap.config.AdminKeyID)
	case !b.isDraining() && !b.unseen.confirmed(entry.Name, time.Now(), time.Duration(b.settling.Load())):
		return errNotFinal
	default:
		b.unseen.forget(entry.Name)
		return nil
	}
	b.unseen.forget(entry.Name)
	wait, cancel := context.WithTimeout(ctx, lockBudget)
	defer cancel()
	unlock, err := b.lockConfig(wait)
	if err != nil {
		return err
	}
	// From storage: an entry may be left because this node could not tell
	// which config it had stored.
	b.dropSnapshot()
	snap, err = b.current(ctx, req.Storage)
	unlock() // the rotation that made the key has ended: nothing records it any more
	if err != nil {
		return err
	}
	for _, key := range keys {
		recorded := key.ID == snap.config.AdminKeyID ||
			slices.ContainsFunc(snap.config.Retired, func(r retiredKey) bool { return r.ID == key.ID })
		if recorded {
			continue
		}
		made := key.CreatedAt // by the clock that last_used_at is of
		if made.IsZero() {
			made = entry.CreatedAt
		}
		// No request that does not finish uses its key for longer. This Vault is a
		// copy of one whose request did, and which has stored it.
		if !made.IsZero() && key.LastUsedAt.After(made.Add(requestBudget+cleanupBudget)) {
			return fmt.Errorf("admin key %s (%s): %w", key.ID, key.Name, errHandedOut)
		}
		if err := b.endAdminKey(ctx, snap, key.ID, entry.CreatedAt); err != nil {
			return err
		}
		b.log(req).Info("admin key of an unfinished rotation deleted", "admin_api_key_id", key.ID, "name", key.Name)
	}
	return nil
}

// unseen are the admin keys of unfinished rotations, by name, and the keys of accounts
// of unfinished creates, by the account's ID, that one complete list did not show, and
// since when. They are lost with the process, which only means another look. The zero
// value is ready.
type unseen struct {
	mu    sync.Mutex
	since map[string]time.Time
}

// confirmed reports whether a list that was read so long ago, or earlier, did not show
// the name either.
func (u *unseen) confirmed(name string, now time.Time, ago time.Duration) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, seen := u.since[name]; !seen {
		if u.since == nil {
			u.since = map[string]time.Time{}
		}
		u.since[name] = now
	}
	return now.Sub(u.since[name]) >= ago
}

func (u *unseen) forget(name string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.since, name)
}
