package openaisecrets

// This file owns the replacement of the admin key and the end of replaced
// ones.
//
// What must stay true: the new key is journalled before it is made, verified
// before it is stored, and stored together with the note that the old one is
// retired, in one write; after that write nothing returns an error. Only key
// IDs that this engine recorded are ever deleted, and never the current one.
// Two rotations never run at once.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	// maxAttempts bounds the creates of one request, each under its own name.
	maxAttempts = 4
	// lockBudget bounds how long the worker keeps others from the config.
	lockBudget = 20 * time.Second
	// settleBudget is how long a new admin key may take to work. Nothing is
	// published on it (docs/openai-api.md).
	settleBudget = 20 * time.Second

	adminKeyVersion = 1
)

// adminKeyEntry is the journal's record of an admin key about to be made.
type adminKeyEntry struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
}

func (b *backend) pathRotate(pattern string) *framework.Path {
	return &framework.Path{
		Pattern:      pattern,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "rotate", OperationSuffix: map[string]string{"config/rotate": "admin-key", "rotate-root": "root"}[pattern]},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: strict(b.rotateWrite),
				Summary:  "Replace the engine's admin key by a new one.",
				Responses: okFields("The new admin key's ID.", map[string]*framework.FieldSchema{
					"admin_api_key_id": {Type: framework.TypeString, Description: "ID of the new admin key.", Required: true},
					"last_rotated":     {Type: framework.TypeString, Description: "When it was put in force (RFC 3339).", Required: true},
				}),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Replace the engine's admin key by a new one.",
		HelpDescription: strings.TrimSpace(`
Makes a new admin key, checks that it works for reading and writing, stores it,
and deletes the old one once rotation_grace_period has passed. The new key is
never shown: afterwards only this engine knows it. config/rotate and
rotate-root are the same.
`),
	}
}

func (b *backend) rotateWrite(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	// A rotation once begun is finished whether or not its client waits.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestBudget)
	defer cancel()
	cfg, warnings, err := b.rotateAdminKey(ctx, req)
	if err != nil { // a rotation on schedule says so itself
		b.log(req).Warn("admin key not rotated", "error", err)
	}
	switch {
	case errors.Is(err, errNotConfigured):
		return notConfigured(req), nil
	case errors.Is(err, errAdminKeyIDUnknown):
		return logical.ErrorResponse("%s", err), nil
	case errors.Is(err, errWhichKey):
		return nil, err
	case err != nil:
		return failure("admin key not rotated, the old one stays in force", err)
	}
	return &logical.Response{
		Data: map[string]any{
			"admin_api_key_id": cfg.AdminKeyID,
			"last_rotated":     cfg.LastRotated.Format(time.RFC3339),
		},
		Warnings: warnings,
	}, nil
}

var (
	errAdminKeyIDUnknown = errors.New("the ID of the current admin key is unknown or not that of the key, so it could not be deleted after a rotation: write the right one to the config as admin_api_key_id")
	errWhichKey          = errors.New("storage failed while the new admin key was put in force; the old one or the new one is, both work, and the journal deletes the new one if it is not")
)

// rotateAdminKey replaces the admin key and returns the config then in force.
// An error means that the old key stays in force; what is left over at OpenAI
// is in the journal.
func (b *backend) rotateAdminKey(ctx context.Context, req *logical.Request) (*config, []string, error) {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()

	// From storage, not from the snapshot: this is the base of a write.
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, nil, err
	}
	if cfg == nil {
		return nil, nil, errNotConfigured
	}
	return b.rotateLocked(ctx, req, cfg)
}

// rotateLocked is the rotation itself, whoever asked for it. The caller holds
// configLock and has just read cfg from storage.
func (b *backend) rotateLocked(ctx context.Context, req *logical.Request, cfg *config) (_ *config, _ []string, err error) {
	defer func() {
		b.metrics.rotated(err)
		if err != nil {
			b.notify(eventRotateFail, req.MountPoint, configStorageKey, false, "admin_api_key_id", cfg.AdminKeyID)
		}
	}()
	if b.isDraining() { // one that has waited for the config while the drain had it
		return nil, nil, errors.New("this mount is being disabled")
	}
	tag, err := getTag(ctx, req.Storage)
	if err != nil {
		return nil, nil, err
	}
	api, err := b.newClient(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	defer api.Close()
	// Stored with skip_verify, the ID may be missing, or somebody else's key's.
	if _, resp, err := findAdminKeyID(ctx, cfg, api); err != nil {
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
	next.retire(b.now())
	next.AdminKey, next.AdminKeyID, next.AdminKeyRotated = value, key.ID, true
	next.LastRotated = b.now().UTC().Truncate(time.Second)
	next.AdminKeyExpires = key.ExpiresAt
	if life != 0 && next.AdminKeyExpires.IsZero() {
		next.AdminKeyExpires = next.LastRotated.Add(life) // what was asked for, though not confirmed
	}
	next.plan(b.now())
	nextAPI, err := b.newClient(ctx, next)
	if err != nil {
		return nil, nil, err // the journal deletes the new key
	}
	if err := settle(ctx, nextAPI, key.ID); err != nil {
		nextAPI.Close()
		b.discardAdminKey(ctx, req, api, key.ID, walID)
		if client.IsDenied(err) || client.IsNotFound(err) {
			return nil, nil, fmt.Errorf("the new admin key does not work: %w", err)
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
	b.log(req).Info("admin key rotated", "admin_api_key_id", key.ID, "retired_admin_api_key_id", cfg.AdminKeyID, "delete_after", timeText(b.now().Add(next.RotationGracePeriod)),
		"expires_at", timeText(next.AdminKeyExpires), "next_rotation", timeText(next.NextRotation))
	if next.RotationGracePeriod == 0 {
		if left := b.sweepRetired(ctx, req, snap, false); len(left.Retired) > 0 {
			warnings = append(warnings, "The old admin key could not be deleted yet; the engine tries again every minute.")
		}
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
		random, err := randomText(randomLength)
		if err != nil {
			return client.AdminKey{}, client.Secret{}, "", err
		}
		name := "vault-admin-" + tag + random
		walID, err := framework.PutWAL(ctx, s, journalAdminKey, adminKeyEntry{Version: adminKeyVersion, Name: name})
		if err != nil {
			return client.AdminKey{}, client.Secret{}, "", fmt.Errorf("writing the journal: %w", err)
		}
		requestID := ""
		key, value, err := api.CreateAdminKey(client.Trace(ctx, &requestID), name, life)
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
	if err == nil || client.IsNotFound(err) {
		err = framework.DeleteWAL(ctx, req.Storage, walID)
	}
	if err != nil {
		b.log(req).Warn("discarded admin key is left to the journal", "admin_api_key_id", id, "error", err)
	}
}

// rollbackAdminKey deletes what a journalled create of an admin key made,
// unless it is in use: then only the deletion of its entry had failed.
func (b *backend) rollbackAdminKey(ctx context.Context, req *logical.Request, entry adminKeyEntry) error {
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return err
	}
	keys, err := snap.api.ListAdminKeys(ctx)
	if err != nil {
		return err
	}
	keys = slices.DeleteFunc(keys, func(k client.AdminKey) bool { return k.Name != entry.Name })
	if len(keys) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lockBudget)
	defer cancel()
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// From storage: an entry may be left because this node could not tell
	// which config it had stored.
	b.dropSnapshot()
	if snap, err = b.current(ctx, req.Storage); err != nil {
		return err
	}
	for _, key := range keys {
		recorded := key.ID == snap.config.AdminKeyID ||
			slices.ContainsFunc(snap.config.Retired, func(r retiredKey) bool { return r.ID == key.ID })
		if recorded {
			continue
		}
		if err := snap.api.DeleteAdminKey(ctx, key.ID); err != nil && !client.IsNotFound(err) {
			return err
		}
		b.log(req).Info("admin key of an unfinished rotation deleted", "admin_api_key_id", key.ID, "name", key.Name)
	}
	return nil
}

// deleteRetired is the periodic part: it deletes retired admin keys whose
// grace period has passed.
func (b *backend) deleteRetired(ctx context.Context, req *logical.Request) error {
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	now := b.now()
	if !slices.ContainsFunc(snap.config.Retired, func(k retiredKey) bool { return !now.Before(k.DeleteAfter) }) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lockBudget)
	defer cancel()
	unlock, ok := b.tryLockConfig()
	if !ok {
		return nil // a rotation is under way; the next tick comes in a minute
	}
	defer unlock()
	if snap, err = b.current(ctx, req.Storage); err == nil {
		b.sweepRetired(ctx, req, snap, false)
	}
	return err
}

// endRetired deletes all retired admin keys, whatever is left of their grace
// period: the mount is being disabled, and then nothing knows of them.
func (b *backend) endRetired(ctx context.Context, req *logical.Request) error {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err == nil {
		b.sweepRetired(ctx, req, snap, true)
	}
	return err
}

// sweepRetired deletes what is due (or all) and stores the rest. The caller
// holds configLock, and snap is what is in force. It returns the config then in
// force; failures are logged and tried again at the next tick.
func (b *backend) sweepRetired(ctx context.Context, req *logical.Request, snap *snapshot, all bool) *config {
	next := snap.config.clone()
	if !b.deleteRetiredKeys(ctx, req, next, snap.api, all) {
		return snap.config
	}
	if err := putConfig(ctx, req.Storage, next); err != nil {
		// The keys are deleted; deleting them again finds them gone.
		b.dropSnapshot()
		b.log(req).Warn("config not stored after deleting retired admin keys", "error", err)
		return snap.config
	}
	b.install(snap.with(next))
	return next
}

// deleteRetiredKeys deletes the retired keys that are due (or all of them) and
// takes those that are gone off cfg's list. It reports whether the list
// changed.
func (b *backend) deleteRetiredKeys(ctx context.Context, req *logical.Request, cfg *config, api *client.Client, all bool) bool {
	if cfg.AdminKeyID == "" {
		// Stored with skip_verify: the current key may be one of them.
		return false
	}
	before := len(cfg.Retired)
	now := b.now()
	cfg.Retired = slices.DeleteFunc(cfg.Retired, func(key retiredKey) bool {
		if key.ID == cfg.AdminKeyID || (!all && now.Before(key.DeleteAfter)) {
			return false
		}
		err := api.DeleteAdminKey(ctx, key.ID)
		if err != nil && !client.IsNotFound(err) {
			b.log(req).Warn("retired admin key not deleted", "admin_api_key_id", key.ID, "error", err)
			return false
		}
		b.log(req).Info("retired admin key deleted", "admin_api_key_id", key.ID)
		return true
	})
	return len(cfg.Retired) != before
}
