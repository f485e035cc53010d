package openaisecrets

// This file owns who keeps the schedule of the admin key's rotation: Vault's
// rotation manager where there is one, and this engine everywhere else.
//
// What must stay true: a schedule is kept by somebody on every server, and a
// server that has no rotation manager is not asked again and again; whatever
// asks for a rotation, rotateLocked makes it; one that nobody waits for leaves
// word of its failure in the config.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	rotationJob = "openai-admin-key"
	// managerSlack is how late Vault's rotation manager may be before the
	// engine steps in: it can lose a job, for one when a mount is moved.
	managerSlack = time.Hour
	// managerTimeout bounds a call to Vault's rotation manager, during which
	// configLock is held; some releases of it are known to hang.
	managerTimeout = 10 * time.Second
)

// unsupported reports whether a server has no rotation manager: Community says
// so in a text, which is all that Vault's plugin protocol leaves of its error,
// and other servers do not know the call.
func unsupported(err error) bool {
	return err != nil && (status.Code(err) == codes.Unimplemented ||
		strings.Contains(err.Error(), automatedrotationutil.ErrRotationManagerUnsupported.Error()))
}

// arrange has Vault's rotation manager keep cfg's schedule, where there is one,
// and notes in cfg who does.
func (b *backend) arrange(ctx context.Context, mount string, cfg *config) error {
	if !cfg.scheduled() {
		if cfg.RotationManager == managerVault {
			if err := b.deregister(ctx, mount); err != nil {
				return err
			}
		}
		cfg.RotationManager = ""
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, managerTimeout)
	defer cancel()
	_, err := b.System().RegisterRotationJob(ctx, &rotation.RotationJobConfigureRequest{
		Name: rotationJob, MountPoint: mount, ReqPath: configStorageKey,
		RotationSchedule: cfg.RotationSchedule, RotationWindow: cfg.RotationWindow, RotationPeriod: cfg.RotationPeriod,
	})
	switch {
	case err == nil:
		cfg.RotationManager = managerVault
	case unsupported(err):
		cfg.RotationManager = managerInternal
	default:
		return err
	}
	return nil
}

func (b *backend) deregister(ctx context.Context, mount string) error {
	ctx, cancel := context.WithTimeout(ctx, managerTimeout)
	defer cancel()
	err := b.System().DeregisterRotationJob(ctx, &rotation.RotationJobDeregisterRequest{MountPoint: mount, ReqPath: configStorageKey})
	if unsupported(err) {
		return nil
	}
	return err
}

// arrangeWrite arranges the schedule that is about to be stored; the caller
// holds configLock. One that the rotation manager refuses is not stored. That
// it could not be told of the end of one is no reason to go on rotating.
func (b *backend) arrangeWrite(ctx context.Context, req *logical.Request, old, cfg *config) (arranged bool, err error) {
	if b.rotation.arranged.Load() && old != nil && old.sameSchedule(cfg) {
		return true, nil
	}
	// Until it is stored, the worker sets right what is arranged here.
	b.rotation.arranged.Store(false)
	err = b.arrange(ctx, req.MountPoint, cfg)
	if err != nil && cfg.scheduled() {
		return false, fmt.Errorf("config not stored: Vault's rotation manager did not take the schedule: %w", err)
	}
	return err == nil, nil
}

// arrangeStored arranges what is stored, once in the life of a process: Vault
// may have become another edition, or have died in the middle of a write.
func (b *backend) arrangeStored(ctx context.Context, req *logical.Request) error {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if b.rotation.arranged.Load() {
		return nil
	}
	cfg, err := getConfig(ctx, req.Storage)
	if cfg == nil || err != nil {
		return err
	}
	before := cfg.RotationManager
	if err := b.arrange(ctx, req.MountPoint, cfg); err != nil {
		return fmt.Errorf("asking Vault's rotation manager: %w", err)
	}
	if cfg.RotationManager != before {
		err := putConfig(ctx, req.Storage, cfg)
		b.dropSnapshot()
		if err != nil {
			return err
		}
	}
	if cfg.scheduled() {
		b.log(req).Info("rotation of the admin key is scheduled", "rotation_manager", cfg.RotationManager, "next_rotation", text.Time(cfg.nextRotation(b.now(), 0)))
	}
	b.rotation.arranged.Store(true)
	return nil
}

// due reports whether this engine is to rotate now. Where Vault keeps the
// schedule that is so only when Vault is late.
func (b *backend) due(c *config) bool {
	slack := time.Duration(0)
	if c.RotationManager == managerVault {
		slack = managerSlack
	}
	now := b.now()
	at := c.nextRotation(now, slack)
	return !at.IsZero() && !now.Before(at) && b.rotation.mayTry(now)
}

// kickSchedule looks at the schedule unless that is under way, and returns at
// once. It does not wait its turn behind the journal, whose work can take
// longer than a rotation_window.
func (b *backend) kickSchedule(req *logical.Request) {
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	b.rotation.look.Start(b.lifetime, func(ctx context.Context) {
		b.complain(ctx, req, "schedule of the admin key's rotation not kept", b.keepSchedule(ctx, req))
	})
}

// keepSchedule is the periodic part: it sees to it that somebody keeps the
// schedule, rotates when that is due, and warns of a key whose end is near.
func (b *backend) keepSchedule(ctx context.Context, req *logical.Request) error {
	if !b.rotation.arranged.Load() {
		if err := b.arrangeStored(ctx, req); err != nil && b.rotation.mayWarn("arrange", b.now(), warnEvery) {
			b.log(req).Warn("rotation schedule not arranged yet", "error", err)
		}
	}
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err == nil && snap.config.clone().correctTimes(b.now()) {
		if err = b.correctTimes(ctx, req, snap); err == nil {
			snap, err = b.current(ctx, req.Storage)
		}
	}
	if err == nil && b.due(snap.config) {
		if err = b.rotateByItself(ctx, req, b.due); err == nil {
			snap, err = b.current(ctx, req.Storage)
		}
	}
	if snap == nil {
		return err
	}
	if by := snap.config.renewBy(); !by.IsZero() && !b.now().Before(by) && b.rotation.mayWarn("expiry", b.now(), warnEvery) {
		b.log(req).Warn("the admin key's end is near", "admin_api_key_id", snap.config.AdminKeyID, "text", snap.config.expiryText())
	}
	return err
}

// correctTimes stores what is known of the past where a clock that was ahead has
// left it in the future.
func (b *backend) correctTimes(ctx context.Context, req *logical.Request, snap *snapshot) error {
	// OpenAI's clock made the end of the key; what is recorded may be this node's.
	ask, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	key, keyErr := client.AdminKey{}, error(nil)
	if snap.config.AdminKeyRotated && snap.config.AdminKeyID != "" && !snap.config.AdminKeyExpires.IsZero() {
		key, keyErr = snap.api.GetAdminKey(ask, snap.config.AdminKeyID)
	}
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil {
		return err
	}
	before := cfg.clone()
	if !cfg.correctTimes(b.now()) {
		return nil
	}
	if keyErr == nil && key.ID == cfg.AdminKeyID && !key.ExpiresAt.IsZero() {
		cfg.AdminKeyExpires = key.ExpiresAt
	}
	if err := b.amendConfig(ctx, req.Storage, cfg); err != nil {
		return err
	}
	b.rotation.settled()
	b.log(req).Warn("the clock was ahead when the config was written; times of the future are replaced by now",
		"last_rotated", text.Time(before.LastRotated), "next_rotation", text.Time(before.NextRotation), "now", text.Time(b.now()), "next_rotation_now", text.Time(cfg.NextRotation))
	return nil
}

// rotateCredential is called by Vault's rotation manager.
func (b *backend) rotateCredential(ctx context.Context, req *logical.Request) error {
	// As with a rotation by hand: once begun it is finished.
	ctx = context.WithoutCancel(ctx)
	asked := false
	err := b.rotateByItself(ctx, req, func(cfg *config) bool { asked = cfg.scheduled(); return asked })
	if err != nil {
		b.log(req).Warn("rotation asked for by Vault has failed", "error", err)
	} else if !asked {
		// A job that outlived its schedule. To refuse it would only have it
		// repeated.
		b.log(req).Info("rotation asked for by Vault but not scheduled: nothing done")
		if err := b.deregister(ctx, req.MountPoint); err != nil {
			b.log(req).Warn("rotation job not ended at Vault", "error", err)
		}
	}
	return err
}

// rotateByItself makes a rotation that nobody waits for, if the config in
// force wants it, and keeps note of a failure.
func (b *backend) rotateByItself(parent context.Context, req *logical.Request, wanted func(*config) bool) error {
	ctx, cancel := context.WithTimeout(parent, requestBudget)
	defer cancel()
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil || !wanted(cfg) {
		return err
	}
	if _, _, err = b.rotateLocked(ctx, req, cfg, false); err == nil || parent.Err() != nil {
		return err // a seal or a step-down is no failure of the rotation
	}
	retry := b.rotation.failed(b.now(), cfg.RotationPeriod)
	if noteErr := b.noteFailure(parent, req.Storage, cfg.AdminKey, err); noteErr != nil {
		b.log(req).Warn("the failure of a rotation could not be stored", "error", noteErr)
	}
	return fmt.Errorf("admin key %s not rotated, it stays in force; not tried again before %s: %w", cfg.AdminKeyID, text.Time(retry), err)
}

// noteFailure stores why a rotation failed, where it can be read.
func (b *backend) noteFailure(ctx context.Context, s logical.Storage, key client.Secret, failure error) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	// Read anew: if it was storing the new key that failed, either may be in
	// force, and the new one is not to be lost again.
	cfg, err := getConfig(ctx, s)
	if err != nil || cfg == nil || !cfg.AdminKey.Equal(key) {
		return err
	}
	cfg.RotationError = failure.Error()
	if len(cfg.RotationError) > maxStoredText {
		cfg.RotationError = strings.ToValidUTF8(cfg.RotationError[:maxStoredText], "") + "…"
	}
	err = putConfig(ctx, s, cfg)
	b.dropSnapshot()
	return err
}
