package openaisecrets

// This file owns superseded admin keys: when each is deleted, and which are kept
// since another Vault may use them.
//
// What must stay true:
//   - only IDs that this engine recorded are ever deleted, never the current one,
//     and none that the key in force may not be able to see: its 404 says nothing;
//   - at the end of a grace period a key that somebody else uses is kept, for
//     seven days at most: a copy of this Vault that was restored elsewhere must
//     not end the original's. An operator who asks for the end of a key gets it
//     at once, whoever uses it: that may be a thief;
//   - OpenAI is not asked while configLock is held, except by a request that
//     holds it anyway, and one key whose call hangs does not keep the others.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	// useTolerance is how long after its supersession a key's last use may still
	// be this process's own: that of a request under way, as coarse as OpenAI's
	// last_used_at may be.
	useTolerance = 3 * time.Minute
	// longestKept is how long after its supersession a key is kept at most. No
	// grace period is longer.
	longestKept = maxRotationGrace
	// endBudget bounds the end of one key, and endsAtOnce how many end at a time.
	// After endRun no further one is begun; the next minute comes soon enough.
	endBudget  = 30 * time.Second
	endsAtOnce = 4
	endRun     = 2 * time.Minute
	// remindEvery is how often the log repeats that a key is kept.
	remindEvery = 24 * time.Hour
)

// Why a superseded key outlives its grace period.
const (
	// keptUsed: OpenAI says that it was used after it was superseded.
	keptUsed = "used"
	// keptUnvouched: a config write replaced it, and this process could not tell
	// that all use of it until then was its own.
	keptUnvouched = "perhaps_used"
)

// retiredKey is an admin key that this engine has replaced and will delete.
type retiredKey struct {
	ID          string    `json:"id"`
	DeleteAfter time.Time `json:"delete_after"`
	// SupersededAt is when another took its place; entries of earlier releases
	// have none.
	SupersededAt time.Time `json:"superseded_at,omitzero"`
	// SupersededThere is the same by OpenAI's clock, which last_used_at is of: when
	// the key that took its place was made. Zero if none was.
	SupersededThere time.Time `json:"superseded_at_openai,omitzero"`
	// CreatedAt is when this engine made it, zero if it did not.
	CreatedAt time.Time `json:"created_at,omitzero"`
	// Regardless says that it is deleted whoever uses it.
	Regardless bool `json:"regardless_of_use,omitempty"`
	// Kept is why it outlives its grace period, and LastUsed what OpenAI said.
	Kept     string    `json:"kept,omitempty"`
	LastUsed time.Time `json:"last_used_at,omitzero"`
	// Elsewhere says that no list of the key in force has shown it: it may belong
	// to another organization or endpoint.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// superseded is when the key was superseded. Of one of an earlier release that
// follows from the grace period.
func (k *retiredKey) superseded(grace time.Duration) time.Time {
	if k.SupersededAt.IsZero() {
		return k.DeleteAfter.Add(-grace)
	}
	return k.SupersededAt
}

// maxWaiting is how many superseded keys may wait when a person asks for a rotation:
// each is a live admin key.
const maxWaiting = 5

// crowded says why a rotation that a person asks for is refused, "" when it is not.
// Keys that are kept, or could not be deleted, are no reason to keep a key in force.
func (c *config) crowded(now time.Time) (problem string) {
	var next time.Time
	waiting := 0
	for i := range c.Retired {
		if k := &c.Retired[i]; k.ID != c.AdminKeyID && ours(k) && !k.due(now) {
			if waiting++; next.IsZero() || k.DeleteAfter.Before(next) {
				next = k.DeleteAfter
			}
		}
	}
	if waiting < maxWaiting || c.RotationGracePeriod == 0 {
		return ""
	}
	return fmt.Sprintf("%d superseded admin keys wait for the end of their grace period, and the limit is %d; the next one is deleted at %s. Rotate then, shorten rotation_grace_period, or send force=true to delete all of them at once", waiting, maxWaiting, timeText(next))
}

func (k *retiredKey) due(now time.Time) bool { return !k.Elsewhere && !now.Before(k.DeleteAfter) }

// hurry has the key deleted whoever uses it, at a time or when it was due if that
// is sooner.
func (k *retiredKey) hurry(at time.Time) {
	if at.Before(k.DeleteAfter) {
		k.DeleteAfter = at.UTC().Truncate(time.Second)
	}
	k.Regardless, k.Kept, k.LastUsed = true, "", time.Time{}
}

// retire notes that the current admin key, which this engine made or is about to
// replace, is to be deleted once the grace period has passed;
// there is the time by OpenAI's clock, zero if unknown.
func (c *config) retire(now, there time.Time) {
	if c.AdminKeyID == "" {
		return
	}
	c.forget(c.AdminKeyID) // retired before, and configured again since
	now = now.UTC().Truncate(time.Second)
	key := retiredKey{ID: c.AdminKeyID, SupersededAt: now, SupersededThere: there, DeleteAfter: now.Add(c.RotationGracePeriod), Regardless: c.RotationGracePeriod == 0}
	if c.AdminKeyRotated {
		key.CreatedAt = c.LastRotated
	}
	c.Retired = append(c.Retired, key)
}

// forget takes a key off the list of those to be deleted.
func (c *config) forget(id string) {
	c.Retired = slices.DeleteFunc(c.Retired, func(k retiredKey) bool { return k.ID == id })
}

// hurry has superseded keys deleted whoever uses them, each this long after it
// was superseded, and none later than planned.
func (c *config) hurry(grace time.Duration) {
	for i := range c.Retired {
		k := &c.Retired[i]
		k.SupersededAt = k.superseded(c.RotationGracePeriod)
		k.hurry(k.SupersededAt.Add(grace))
	}
}

// keep has a key live on until seven days after it was superseded.
func (c *config) keep(id, why string, lastUsed time.Time) {
	for i := range c.Retired {
		if k := &c.Retired[i]; k.ID == id {
			k.Regardless, k.Kept, k.LastUsed = false, why, lastUsed
			k.SupersededAt = k.superseded(c.RotationGracePeriod)
			k.DeleteAfter = k.SupersededAt.Add(longestKept)
		}
	}
}

// locate notes which superseded keys a list of admin keys shows, and with away
// that the others may be elsewhere.
func (c *config) locate(keys []client.AdminKey, away bool) {
	for i := range c.Retired {
		if k := &c.Retired[i]; slices.ContainsFunc(keys, func(a client.AdminKey) bool { return a.ID == k.ID }) {
			k.Elsewhere = false
		} else if away {
			k.Elsewhere = true
		}
	}
}

// retiredIDs returns the IDs of some of the superseded keys.
func (c *config) retiredIDs(which func(*retiredKey) bool) (ids []string) {
	for i := range c.Retired {
		if which(&c.Retired[i]) {
			ids = append(ids, c.Retired[i].ID)
		}
	}
	return ids
}

func isElsewhere(k *retiredKey) bool { return k.Elsewhere }

// elsewhereText says of keys that only a person can delete them.
func elsewhereText(ids []string) string {
	return fmt.Sprintf("The current admin key has not shown that it sees these superseded ones, so the engine does not delete them: %s. A rotation and a config write without skip_verify look again. If they belong to another organization or endpoint, delete them there.", strings.Join(ids, ", "))
}

// keptText says why the key is kept, "" for one that is not.
func (k *retiredKey) keptText() string {
	why := ""
	switch k.Kept {
	case keptUsed:
		why = fmt.Sprintf("OpenAI says that it was last used at %s, after it was superseded: another Vault, such as a copy of this one, or somebody else uses it", timeText(k.LastUsed))
	case keptUnvouched:
		why = "another Vault, such as the one that this one is a copy of, may use it"
	default:
		return ""
	}
	return fmt.Sprintf("Superseded admin key %s is kept until %s: %s. To delete it at once, run config/rotate with force=true or shorten rotation_grace_period.", k.ID, timeText(k.DeleteAfter), why)
}

// warnOfRetired adds to a read of the config what has become of superseded keys.
func (c *config) warnOfRetired(resp *logical.Response) {
	for i := range c.Retired {
		if text := c.Retired[i].keptText(); text != "" && !c.Retired[i].Elsewhere {
			resp.AddWarning(text)
		}
	}
	if text := c.stuckText(); text != "" {
		resp.AddWarning(text)
	} else if ids := c.retiredIDs(isElsewhere); len(ids) > 0 {
		resp.AddWarning(elsewhereText(ids))
	}
}

// stuckText says of which superseded keys none is deleted, since the current key may
// be one of them; "" when its ID is known.
func (c *config) stuckText() string {
	ids := c.retiredIDs(func(*retiredKey) bool { return true })
	if c.AdminKeyID != "" || len(ids) == 0 {
		return ""
	}
	return fmt.Sprintf("The ID of the current admin key is unknown after skip_verify, so the engine does not delete superseded admin keys: %s. Write admin_api_key again without skip_verify, or delete them at OpenAI.", strings.Join(ids, ", "))
}

// --- Who uses a key ---

// keyUse is when this process last called OpenAI with an admin key. It is the
// observer of the key's clients.
type keyUse struct {
	client.Observer
	key  client.Secret
	now  func() time.Time
	last atomic.Pointer[time.Time]
}

// Began implements client.Observer. A probe is made with another key, which costs
// nothing to count: it follows calls with this one.
func (u *keyUse) Began(call string, waited time.Duration) {
	now := u.now()
	u.last.Store(&now)
	u.Observer.Began(call, waited)
}

// vouches reports whether all use of the key may be this process's own.
func (u *keyUse) vouches(lastUsed time.Time) bool {
	last := u.last.Load()
	return last != nil && !lastUsed.After(last.Add(useTolerance))
}

// keyUses has what is known of the keys with which clients were made last. One
// that it has forgotten is one that this process cannot vouch for.
type keyUses struct {
	mu   sync.Mutex
	last []*keyUse // the latest first
}

const keyUsesKept = 8

func (b *backend) useOf(key client.Secret) *keyUse {
	b.uses.mu.Lock()
	defer b.uses.mu.Unlock()
	var use *keyUse
	if i := slices.IndexFunc(b.uses.last, func(u *keyUse) bool { return u.key.Equal(key) }); i >= 0 {
		use = b.uses.last[i]
		b.uses.last = slices.Delete(b.uses.last, i, i+1)
	} else {
		use = &keyUse{Observer: b.metrics, key: key, now: func() time.Time { return b.now() }}
	}
	b.uses.last = slices.Insert(b.uses.last, 0, use)
	b.uses.last = b.uses.last[:min(len(b.uses.last), keyUsesKept)]
	return use
}

// supersede settles what a config write means for superseded keys: keys is what
// OpenAI lists to the new admin key, nil if it was not asked. It reports whether
// the list lacks the admin key before the write.
func (b *backend) supersede(old, cfg *config, keys []client.AdminKey) (moved bool) {
	if old == nil {
		return false
	}
	before := slices.IndexFunc(keys, func(k client.AdminKey) bool { return k.ID == old.AdminKeyID })
	moved = keys != nil && old.AdminKeyID != "" && before < 0
	// A copy of another Vault replaces that one's key so. Whoever shortens the
	// grace period in the same write wants its end.
	if old.AdminKeyRotated && !old.AdminKey.Equal(cfg.AdminKey) && cfg.RotationGracePeriod >= old.RotationGracePeriod &&
		(before < 0 || !b.useOf(old.AdminKey).vouches(keys[before].LastUsedAt)) {
		cfg.keep(old.AdminKeyID, keptUnvouched, time.Time{})
	}
	cfg.locate(keys, moved || keys == nil && cfg.asksAnother(old))
	return moved
}

// asksAnother reports whether a config may lead to another organization than the
// one before.
func (c *config) asksAnother(old *config) bool {
	return old != nil && (!c.AdminKey.Equal(old.AdminKey) || c.APIEndpoint != old.APIEndpoint || c.OrganizationID != old.OrganizationID)
}

// reportRetired says in the answer to a config write what becomes of superseded
// keys, and deletes those whose grace period it has shortened to nothing.
func (b *backend) reportRetired(ctx context.Context, req *logical.Request, old *config, snap *snapshot, quiet bool, response *logical.Response) {
	cfg := snap.config
	if old == nil {
		return
	}
	if cfg.RotationGracePeriod < old.RotationGracePeriod && !quiet {
		cfg = b.sweepRetired(ctx, req, snap, b.atOnce())
		if left := cfg.retiredIDs(b.atOnce()); len(left) > 0 && cfg.AdminKeyID != "" {
			response.AddWarning(notDeletedText(left))
		}
	}
	if cfg.asksAnother(old) {
		cfg.warnOfRetired(response)
	} else if text := cfg.stuckText(); text != "" {
		response.AddWarning(text)
	}
}

// notDeletedText says of keys whose end was asked for that they live.
func notDeletedText(ids []string) string {
	return fmt.Sprintf("Superseded admin keys that could not be deleted yet: %s. The engine tries again every minute.", strings.Join(ids, ", "))
}

// beingEnded says why a config cannot be stored now: its key may be one that the
// worker is deleting.
func (b *backend) beingEnded(old, cfg *config) (problem string) {
	b.ending.Range(func(id, _ any) bool {
		if id == cfg.AdminKeyID || cfg.AdminKeyID == "" && cfg.asksAnother(old) {
			problem = "config not stored: the engine is deleting a superseded admin key that may be this one; try again in a minute, or write another"
		}
		return problem == ""
	})
	return problem
}

// --- Their end ---

// endAdminKey deletes an admin key that was made at a time, zero if unknown.
// Without an error it is deleted.
func (b *backend) endAdminKey(ctx context.Context, snap *snapshot, id string, created time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, endBudget)
	defer cancel()
	if b.isFinal(created) {
		return snap.deleteAdminKey(ctx, id)
	}
	err := snap.api.DeleteAdminKey(ctx, id)
	if client.IsNotFound(err) {
		return errNotFinal
	}
	return err
}

// ends is what has become of superseded keys.
type ends struct {
	mu      sync.Mutex
	deleted []string
	used    map[string]time.Time // when another Vault last used it
}

// apply takes what has become of superseded keys over into a config, and reports
// whether that changed it.
func (e *ends) apply(c *config) bool {
	before := len(c.Retired)
	c.Retired = slices.DeleteFunc(c.Retired, func(k retiredKey) bool { return slices.Contains(e.deleted, k.ID) })
	changed := len(c.Retired) != before
	for id, at := range e.used {
		// Unless somebody has asked for its end meanwhile.
		if len(c.retiredIDs(func(k *retiredKey) bool { return k.ID == id && !k.Regardless })) > 0 {
			c.keep(id, keptUsed, at)
			changed = true
		}
	}
	return changed
}

// endKeys deletes superseded keys. With look it first asks whether somebody else
// uses them; no request waits for that.
func (b *backend) endKeys(ctx context.Context, req *logical.Request, snap *snapshot, keys []retiredKey, look bool) *ends {
	e := &ends{used: map[string]time.Time{}}
	if snap.config.AdminKeyID == "" {
		return e // stored with skip_verify: the current key may be one of them
	}
	began := time.Now()
	var group sync.WaitGroup
	slots := make(chan struct{}, endsAtOnce)
	for _, key := range keys {
		slots <- struct{}{}
		if time.Since(began) >= endRun || ctx.Err() != nil {
			break
		}
		group.Go(func() {
			defer func() { <-slots }()
			used, err := time.Time{}, error(nil)
			if look {
				used, err = b.usedByOthers(ctx, snap, key)
			}
			if err == nil && used.IsZero() {
				err = b.endAdminKey(ctx, snap, key.ID, key.CreatedAt)
			}
			log := b.log(req).With("admin_api_key_id", key.ID)
			e.mu.Lock()
			defer e.mu.Unlock()
			switch {
			case err != nil:
				log.Warn("retired admin key not deleted", "error", err)
			case !used.IsZero():
				e.used[key.ID] = used
			default:
				e.deleted = append(e.deleted, key.ID)
				log.Info("retired admin key deleted")
			}
		})
	}
	group.Wait()
	return e
}

// usedByOthers returns when a key was last used, if that is so long after it was
// superseded that it was not by this process, and zero otherwise.
func (b *backend) usedByOthers(ctx context.Context, snap *snapshot, key retiredKey) (time.Time, error) {
	superseded := key.superseded(snap.config.RotationGracePeriod)
	if key.Regardless || b.now().Sub(superseded) >= longestKept {
		return time.Time{}, nil
	}
	if !key.SupersededThere.IsZero() {
		superseded = key.SupersededThere
	}
	ctx, cancel := context.WithTimeout(ctx, endBudget)
	defer cancel()
	known, err := snap.api.GetAdminKey(ctx, key.ID)
	switch {
	case client.IsNotFound(err):
		return time.Time{}, nil // whether it is deleted is the delete's to prove
	case err != nil:
		return time.Time{}, err
	case known.LastUsedAt.After(superseded.Add(useTolerance)):
		return known.LastUsedAt, nil
	}
	return time.Time{}, nil
}

// deleteRetired is the periodic part: it deletes superseded admin keys whose grace
// period has passed. Those that it works on are claimed, so that configLock is
// free meanwhile and no config write puts one of them in force again.
func (b *backend) deleteRetired(ctx context.Context, req *logical.Request) error {
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	b.remindOfRetired(req, snap.config)
	now := b.now()
	lost := func(k *retiredKey) bool {
		return k.Elsewhere && now.Sub(k.superseded(snap.config.RotationGracePeriod)) >= longestKept
	}
	if len(snap.config.retiredIDs(func(k *retiredKey) bool { return k.due(now) || lost(k) })) == 0 {
		return nil
	}

	wait, cancel := context.WithTimeout(ctx, lockBudget)
	defer cancel()
	unlock, err := b.lockConfig(wait)
	if err != nil {
		return err
	}
	snap, err = b.current(ctx, req.Storage)
	if err != nil {
		unlock()
		return err
	}
	var keys []retiredKey
	for _, key := range snap.config.Retired {
		if key.ID == snap.config.AdminKeyID || !key.due(now) {
			continue
		}
		if _, claimed := b.ending.LoadOrStore(key.ID, true); !claimed {
			defer b.ending.Delete(key.ID)
			keys = append(keys, key)
		}
	}
	gone := snap.config.retiredIDs(lost)
	unlock()
	e := b.endKeys(ctx, req, snap, keys, true)
	var seen []client.AdminKey
	if len(gone) > 0 {
		seen, err = snap.api.ListAdminKeys(ctx)
		if err != nil || !slices.ContainsFunc(seen, func(k client.AdminKey) bool { return k.ID == snap.config.AdminKeyID }) {
			b.log(req).Warn("whether superseded admin keys belong to another organization is not known yet", "admin_api_key_ids", gone, "error", err)
			seen, gone = nil, nil
		}
	}
	if len(e.deleted)+len(e.used)+len(gone) == 0 {
		return nil
	}

	// What is done is noted even where the worker is told to stop.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), requestBudget+cleanupBudget)
	defer cancel()
	if unlock, err = b.lockConfig(ctx); err != nil {
		return err
	}
	defer unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil {
		return err
	}
	cfg.locate(seen, false)
	gone = cfg.retiredIDs(func(k *retiredKey) bool { return k.Elsewhere && slices.Contains(gone, k.ID) })
	e.deleted = append(e.deleted, gone...)
	if !e.apply(cfg) && len(seen) == 0 {
		return nil
	}
	if err := b.amendConfig(ctx, req.Storage, cfg); err != nil {
		return err // deleting them again finds them gone
	}
	if len(gone) > 0 {
		b.log(req).Warn("superseded admin keys of another organization or endpoint are forgotten; delete those that are alive there", "admin_api_key_ids", gone)
	}
	b.remindOfRetired(req, cfg)
	return nil
}

// amendConfig stores a config whose client is the one in force. The caller holds
// configLock.
func (b *backend) amendConfig(ctx context.Context, s logical.Storage, cfg *config) error {
	if err := putConfig(ctx, s, cfg); err != nil {
		b.dropSnapshot()
		return err
	}
	b.snapshotMu.RLock()
	snap := b.snapshot
	b.snapshotMu.RUnlock()
	if snap != nil {
		snap = snap.with(cfg)
	}
	b.install(snap)
	return nil
}

// remindOfRetired logs once a day which superseded keys are kept and why.
func (b *backend) remindOfRetired(req *logical.Request, cfg *config) {
	if text := cfg.stuckText(); text != "" && b.rotation.mayWarn("current key unknown", b.now(), remindEvery) {
		b.log(req).Warn("superseded admin keys are not deleted", "text", text)
	}
	for i := range cfg.Retired {
		k := &cfg.Retired[i]
		if k.Elsewhere || k.Kept == "" || !b.rotation.mayWarn("kept "+k.ID, b.now(), remindEvery) {
			continue
		}
		b.log(req).Warn("superseded admin key is kept", "admin_api_key_id", k.ID, "text", k.keptText())
	}
}

// endRetired deletes superseded admin keys whatever is left of their grace
// period: the mount is being disabled, and then nothing knows of them. Those that
// another Vault uses stay.
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
	if err != nil {
		return err
	}
	left := b.sweepRetired(ctx, req, snap, ours)
	for i := range left.Retired {
		k := &left.Retired[i]
		b.log(req).Warn("the mount is being disabled and a superseded admin key is left at OpenAI", "admin_api_key_id", k.ID, "text", k.keptText())
	}
	return nil
}

// ours selects the keys that go when this engine does.
func ours(k *retiredKey) bool { return !k.Elsewhere && k.Kept == "" }

// sweepRetired deletes some of the superseded keys without asking who uses them,
// and stores the rest. The caller holds configLock, and snap is what is in force.
// It returns the config with what is left, also where that could not be stored; a
// failure is logged and tried again by the worker, which finds deleted keys gone.
func (b *backend) sweepRetired(ctx context.Context, req *logical.Request, snap *snapshot, which func(*retiredKey) bool) *config {
	next := snap.config.clone()
	var keys []retiredKey
	for i := range next.Retired {
		if k := &next.Retired[i]; k.ID != next.AdminKeyID && which(k) {
			keys = append(keys, *k)
		}
	}
	if !b.endKeys(ctx, req, snap, keys, false).apply(next) {
		return snap.config
	}
	if err := b.amendConfig(ctx, req.Storage, next); err != nil {
		b.log(req).Warn("config not stored after deleting retired admin keys", "error", err)
	}
	return next
}

// atOnce selects the keys that are due and go whoever uses them.
func (b *backend) atOnce() func(*retiredKey) bool {
	now := b.now()
	return func(k *retiredKey) bool { return k.Regardless && k.due(now) }
}
