package openaisecrets

// This file owns the schedule of admin key rotations: Vault's rotation manager runs it
// where available, and this engine otherwise.
//
// What must stay true: scheduled rotations run on every server, and a server without a
// rotation manager is not asked repeatedly; every rotation goes through rotateLocked; a
// failed automatic rotation stores its error in the config.

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
	// managerSlack is how late Vault's rotation manager may be before the engine rotates:
	// the manager can lose a job, for example when a mount is moved.
	managerSlack = time.Hour
	// managerTimeout bounds a call to Vault's rotation manager, which is made with
	// configLock held and hangs in some releases of Vault.
	managerTimeout = 10 * time.Second
)

// unsupported reports whether a server has no rotation manager: Community returns an
// error of which Vault's plugin protocol keeps only the text, and other servers do not
// implement the call.
func unsupported(err error) bool {
	return err != nil && (status.Code(err) == codes.Unimplemented ||
		strings.Contains(err.Error(), automatedrotationutil.ErrRotationManagerUnsupported.Error()))
}

// register registers cfg's schedule with Vault's rotation manager, if there is one, and
// sets cfg.RotationManager.
func (b *backend) register(ctx context.Context, mount string, cfg *config) error {
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

// registerWrite registers the schedule of a config that is about to be stored; the caller
// holds configLock. A schedule that the rotation manager rejects is an error. A failure
// to deregister is not, so that automatic rotation can always be disabled.
func (b *backend) registerWrite(ctx context.Context, req *logical.Request, old, cfg *config) (registered bool, err error) {
	if b.rotation.registered.Load() && old != nil && old.sameSchedule(cfg) {
		return true, nil
	}
	// If the config is not stored after this, the worker registers the stored one.
	b.rotation.registered.Store(false)
	err = b.register(ctx, req.MountPoint, cfg)
	if err != nil && cfg.scheduled() {
		return false, fmt.Errorf("config not stored: Vault's rotation manager rejected the schedule: %w", err)
	}
	return err == nil, nil
}

// registerStored registers the stored schedule, once per process: the Vault edition may
// have changed, or Vault may have stopped during a config write.
func (b *backend) registerStored(ctx context.Context, req *logical.Request) error {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if b.rotation.registered.Load() {
		return nil
	}
	cfg, err := getConfig(ctx, req.Storage)
	if cfg == nil || err != nil {
		return err
	}
	before := cfg.RotationManager
	if err := b.register(ctx, req.MountPoint, cfg); err != nil {
		return fmt.Errorf("registering with Vault's rotation manager: %w", err)
	}
	if cfg.RotationManager != before {
		err := putConfig(ctx, req.Storage, cfg)
		b.dropSnapshot()
		if err != nil {
			return err
		}
	}
	if cfg.scheduled() {
		b.log(req).Info("admin key rotation scheduled", "rotation_manager", cfg.RotationManager, "next_rotation", text.Time(cfg.nextRotation(b.now(), 0)))
	}
	b.rotation.registered.Store(true)
	return nil
}

// due reports whether this engine must rotate now. If Vault's rotation manager has the
// schedule, that is only the case when it is late.
func (b *backend) due(c *config) bool {
	slack := time.Duration(0)
	if c.RotationManager == managerVault {
		slack = managerSlack
	}
	now := b.now()
	at := c.nextRotation(now, slack)
	return !at.IsZero() && !now.Before(at) && b.rotation.mayTry(now)
}

// startSchedule starts runSchedule unless it is in progress, and returns immediately. It
// has its own job because the WAL worker can take longer than a rotation_window.
func (b *backend) startSchedule(req *logical.Request) {
	req = &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
	b.rotation.look.Start(b.lifetime, func(ctx context.Context) {
		b.complain(ctx, req, "scheduled admin key rotation failed", b.runSchedule(ctx, req))
	})
}

// runSchedule is the periodic work: it registers the schedule, rotates when that is due,
// and warns if the key expires soon.
func (b *backend) runSchedule(ctx context.Context, req *logical.Request) error {
	if !b.rotation.registered.Load() {
		if err := b.registerStored(ctx, req); err != nil && b.rotation.mayWarn("register", b.now(), warnEvery) {
			b.log(req).Warn("rotation schedule not registered yet", "error", err)
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
		if err = b.rotateOnSchedule(ctx, req, b.due); err == nil {
			snap, err = b.current(ctx, req.Storage)
		}
	}
	if snap == nil {
		return err
	}
	if by := snap.config.renewBy(); !by.IsZero() && !b.now().Before(by) && b.rotation.mayWarn("expiry", b.now(), warnEvery) {
		b.log(req).Warn("admin key expires soon", "admin_api_key_id", snap.config.AdminKeyID, "text", snap.config.expiryText())
	}
	return err
}

// correctTimes corrects past times in the config that were stored while the clock was
// ahead.
func (b *backend) correctTimes(ctx context.Context, req *logical.Request, snap *snapshot) error {
	// The key's expiry follows OpenAI's clock; the stored one may follow this node's.
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
	b.rotation.succeeded()
	b.log(req).Warn("config has times in the future, written while the clock was ahead; reset to the current time",
		"last_rotated", text.Time(before.LastRotated), "next_rotation", text.Time(before.NextRotation), "now", text.Time(b.now()), "next_rotation_now", text.Time(cfg.NextRotation))
	return nil
}

// rotateCredential is called by Vault's rotation manager.
func (b *backend) rotateCredential(ctx context.Context, req *logical.Request) error {
	// As for a manual rotation: once started, it runs to completion.
	ctx = context.WithoutCancel(ctx)
	asked := false
	err := b.rotateOnSchedule(ctx, req, func(cfg *config) bool { asked = cfg.scheduled(); return asked })
	if err != nil {
		b.log(req).Warn("rotation requested by Vault's rotation manager failed", "error", err)
	} else if !asked {
		// The job is older than the current config. An error would only make Vault
		// repeat it.
		b.log(req).Info("rotation requested by Vault's rotation manager skipped: automatic rotation is disabled")
		if err := b.deregister(ctx, req.MountPoint); err != nil {
			b.log(req).Warn("rotation job not deregistered from Vault's rotation manager", "error", err)
		}
	}
	return err
}

// rotateOnSchedule makes an automatic rotation if wanted returns true for the stored
// config, and records a failure.
func (b *backend) rotateOnSchedule(parent context.Context, req *logical.Request, wanted func(*config) bool) error {
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
		return err // a seal or a step-down does not count as a failed rotation
	}
	retry := b.rotation.failed(b.now(), cfg.RotationPeriod)
	if noteErr := b.noteFailure(parent, req.Storage, cfg.AdminKey, err); noteErr != nil {
		b.log(req).Warn("rotation error not stored in the config", "error", noteErr)
	}
	return fmt.Errorf("admin key %s not rotated and still active; next attempt after %s: %w", cfg.AdminKeyID, text.Time(retry), err)
}

// noteFailure stores the error of a rotation in the config, where an operator can read
// it.
func (b *backend) noteFailure(ctx context.Context, s logical.Storage, key client.Secret, failure error) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupBudget)
	defer cancel()
	// Read again: if storing the new key failed, either key may be active, and this write
	// must not lose the new one.
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
