package openaisecrets

// This file owns superseded admin keys: when each is deleted, and which are retained
// because another Vault may use them.
//
// What must stay true:
//   - only IDs that this engine recorded are deleted, never the current one, and none
//     that may be invisible to the active key, whose 404 would prove nothing;
//   - a key that is used elsewhere is retained after its grace period, for at most seven
//     days: a copy of this Vault that was restored elsewhere must not delete the
//     original's key. With force it is deleted at once, regardless of its use, which may
//     be by a thief;
//   - if OpenAI's creation time of the next key is later than the local time of the
//     rotation, it counts: the clock was behind;
//   - OpenAI is not called with configLock held, except by a request that holds it
//     anyway, and a call that hangs does not delay the other keys.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	deleteWorkers = 4
	// lookAgain is the least time between two lists of admin keys that check which
	// superseded keys the current key sees.
	lookAgain = time.Hour
)

// maxWaiting is how many superseded keys may be in their grace period when a manual
// rotation starts: each is a valid admin key.
const maxWaiting = 5

// crowded returns why a manual rotation is rejected, "" if it is not. Keys that are
// retained or could not be deleted do not count.
func (c *config) crowded(now time.Time) (problem string) {
	var next time.Time
	waiting := 0
	for i := range c.Superseded {
		if k := &c.Superseded[i]; k.ID != c.AdminKeyID && ours(k) && !k.due(now) {
			if waiting++; next.IsZero() || k.DeleteAfter.Before(next) {
				next = k.DeleteAfter
			}
		}
	}
	if waiting < maxWaiting || c.RotationGracePeriod == 0 {
		return ""
	}
	return fmt.Sprintf("%d superseded admin keys are still in their grace period, and the limit is %d; the next one is deleted at %s. Rotate after that, reduce rotation_grace_period, or set force=true to delete them all now", waiting, maxWaiting, text.Time(next))
}

// keep retains a key until longestKept after it was superseded.
func (c *config) keep(id, why string, lastUsed time.Time) {
	for i := range c.Superseded {
		if k := &c.Superseded[i]; k.ID == id {
			k.EvenIfUsed, k.Kept, k.LastUsed = false, why, lastUsed
			k.SupersededAt = k.superseded(c.RotationGracePeriod)
			k.DeleteAfter = k.SupersededAt.Add(longestKept)
		}
	}
}

// locate records which superseded keys a list of admin keys shows. With away, the others
// may belong to another organization or endpoint.
func (c *config) locate(keys []client.AdminKey, away bool) {
	for i := range c.Superseded {
		k := &c.Superseded[i]
		listed := slices.ContainsFunc(keys, func(a client.AdminKey) bool { return a.ID == k.ID })
		k.Elsewhere = !listed && (k.Elsewhere || k.Unchecked || away)
		k.Unchecked = false
	}
}

// unsure returns the superseded keys that the current key may not see, or may be.
func (c *config) unsure() []string {
	return c.supersededIDs(func(k *supersededKey) bool { return k.Unchecked || c.AdminKeyID == "" })
}

// mustLook reports whether a list of admin keys is needed before keys can be deleted.
func (c *config) mustLook(now time.Time) bool {
	return c.AdminKeyID == "" || slices.ContainsFunc(c.Superseded, func(k supersededKey) bool { return k.Unchecked || c.lost(&k, now) })
}

// lost reports whether a key has been absent from lists for longestKept.
func (c *config) lost(k *supersededKey, now time.Time) bool {
	return isElsewhere(k) && now.Sub(k.superseded(c.RotationGracePeriod)) >= longestKept
}

// supersededIDs returns the IDs of the superseded keys that match.
func (c *config) supersededIDs(which func(*supersededKey) bool) (ids []string) {
	for i := range c.Superseded {
		if which(&c.Superseded[i]) {
			ids = append(ids, c.Superseded[i].ID)
		}
	}
	return ids
}

func isElsewhere(k *supersededKey) bool { return k.Elsewhere && !k.Unchecked }

// elsewhereText is the warning for keys that the engine cannot delete.
func elsewhereText(ids []string) string {
	return fmt.Sprintf("The engine cannot delete these superseded admin keys, because the current admin key does not see them: %s. If they belong to another organization or endpoint, delete them there.", strings.Join(ids, ", "))
}

// unsureText is the warning for keys that need a list of admin keys.
func unsureText(ids []string) string {
	return fmt.Sprintf("The engine deletes these superseded admin keys only after it has checked that the current admin key sees them: %s. It checks within a minute, and after a failure once an hour. To check immediately, write the config without skip_verify; if the engine cannot find the ID of the current key, set admin_api_key_id.", strings.Join(ids, ", "))
}

// leftText is the log text for a key that outlives the mount or the config.
func (c *config) leftText(k *supersededKey, end time.Time) string {
	why := k.keptWhy()
	switch {
	case c.AdminKeyID == "":
		why = "the ID of the current admin key is unknown, so it may be this one"
	case k.Unchecked:
		why = "the engine could not check whether the current admin key sees it"
	case k.Elsewhere:
		why = "the current admin key does not see it"
	case why == "":
		why = "it could not be deleted"
	}
	until := ""
	if !end.IsZero() {
		until = fmt.Sprintf(" It expires at %s.", text.Time(end))
	}
	return fmt.Sprintf("Superseded admin key %s remains at OpenAI: %s.%s", k.ID, why, until)
}

// warnOfSuperseded adds warnings about superseded keys to a config read.
func (c *config) warnOfSuperseded(resp *logical.Response) {
	unsure := c.unsure()
	for i := range c.Superseded {
		if k := &c.Superseded[i]; k.Kept != "" && !k.Elsewhere && !slices.Contains(unsure, k.ID) {
			resp.AddWarning(k.keptText())
		}
	}
	if len(unsure) > 0 {
		resp.AddWarning(unsureText(unsure))
	} else if ids := c.supersededIDs(isElsewhere); len(ids) > 0 {
		resp.AddWarning(elsewhereText(ids))
	}
}

// --- Use of a key ---

// supersede applies a config write to the superseded keys. keys is the list of admin
// keys that the new key sees, nil if it was not read. moved reports whether the list
// lacks the old admin key.
func (b *backend) supersede(old, cfg *config, keys []client.AdminKey) (moved bool) {
	if old == nil {
		return false
	}
	before := slices.IndexFunc(keys, func(k client.AdminKey) bool { return k.ID == old.AdminKeyID })
	moved = keys != nil && old.AdminKeyID != "" && before < 0
	// This Vault may be a copy of another one, whose key this write replaces. If the
	// write also shortens the grace period, or there is none, the key is deleted anyway.
	if old.AdminKeyRotated && !old.AdminKey.Equal(cfg.AdminKey) && cfg.RotationGracePeriod > 0 && cfg.RotationGracePeriod >= old.RotationGracePeriod &&
		(before < 0 || !b.useOf(old.AdminKey).vouches(keys[before].LastUsedAt)) {
		cfg.keep(old.AdminKeyID, keptUnvouched, time.Time{})
	}
	if keys != nil {
		cfg.locate(keys, moved)
	} else if cfg.asksAnother(old) {
		for i := range cfg.Superseded {
			cfg.Superseded[i].Unchecked = true
		}
	}
	return moved
}

// asksAnother reports whether a config may use another organization than the old one.
func (c *config) asksAnother(old *config) bool {
	return old != nil && (!c.AdminKey.Equal(old.AdminKey) || c.APIEndpoint != old.APIEndpoint || c.OrganizationID != old.OrganizationID)
}

// reportSuperseded adds warnings about superseded keys to the response of a config write,
// and deletes the keys that no longer have a grace period.
func (b *backend) reportSuperseded(ctx context.Context, req *logical.Request, old *config, snap *snapshot, quiet bool, response *logical.Response) {
	cfg := snap.config
	if old == nil {
		return
	}
	if (cfg.RotationGracePeriod < old.RotationGracePeriod || cfg.RotationGracePeriod == 0) && !quiet {
		cfg = b.processSuperseded(ctx, req, snap, b.atOnce())
		if left := cfg.supersededIDs(b.atOnce()); len(left) > 0 && cfg.AdminKeyID != "" {
			response.AddWarning(notDeletedText(left))
		}
	}
	if cfg.asksAnother(old) {
		cfg.warnOfSuperseded(response)
	} else if ids := cfg.unsure(); len(ids) > 0 {
		response.AddWarning(unsureText(ids))
	}
}

// notDeletedText is the warning for keys whose immediate deletion failed.
func notDeletedText(ids []string) string {
	return fmt.Sprintf("Some superseded admin keys could not be deleted yet: %s. The engine tries again every minute.", strings.Join(ids, ", "))
}

// beingDeleted returns why a config cannot be stored now, because the worker may be
// deleting its key, or "".
func (b *backend) beingDeleted(old, cfg *config) (problem string) {
	b.deleting.Range(func(id, _ any) bool {
		switch {
		case id == cfg.AdminKeyID:
			problem = "config not stored: the engine is deleting this superseded admin key; write another key, or try again in a minute"
		case cfg.AdminKeyID == "" && cfg.asksAnother(old):
			problem = "config not stored: the engine is deleting a superseded admin key, which may be this one; set admin_api_key_id, or try again in a minute"
		}
		return problem == ""
	})
	return problem
}

// --- Deletion ---

// deleteAdminKey deletes an admin key that was created at a time, zero if unknown. After
// nil it is deleted.
func (b *backend) deleteAdminKey(ctx context.Context, snap *snapshot, id string, created time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, deleteBudget)
	defer cancel()
	if b.isFinal(created) {
		return snap.deleteAdminKeyProven(ctx, id)
	}
	err := snap.api.DeleteAdminKey(ctx, id)
	if client.IsNotFound(err) {
		return errNotFinal
	}
	return err
}

// deletionResult is the result of deleting superseded keys.
type deletionResult struct {
	mu      sync.Mutex
	deleted []string
	used    map[string]time.Time // when another Vault last used it
}

// apply applies the result to a config, and reports whether that changed it.
func (e *deletionResult) apply(c *config) bool {
	before := len(c.Superseded)
	c.Superseded = slices.DeleteFunc(c.Superseded, func(k supersededKey) bool { return slices.Contains(e.deleted, k.ID) })
	changed := len(c.Superseded) != before
	for id, at := range e.used {
		// Unless its immediate deletion was requested in the meantime.
		if len(c.supersededIDs(func(k *supersededKey) bool { return k.ID == id && !k.EvenIfUsed })) > 0 {
			c.keep(id, keptUsed, at)
			changed = true
		}
	}
	return changed
}

// deleteKeys deletes superseded keys. With look it first checks whether they are used
// elsewhere, which is never done while a request waits.
func (b *backend) deleteKeys(ctx context.Context, req *logical.Request, snap *snapshot, keys []supersededKey, look bool) *deletionResult {
	e := &deletionResult{used: map[string]time.Time{}}
	if snap.config.AdminKeyID == "" {
		return e // after skip_verify the current key may be one of them
	}
	began := time.Now()
	var group sync.WaitGroup
	slots := make(chan struct{}, deleteWorkers)
	for _, key := range keys {
		slots <- struct{}{}
		if time.Since(began) >= deleteRun || ctx.Err() != nil {
			break
		}
		group.Go(func() {
			defer func() { <-slots }()
			used, err := time.Time{}, error(nil)
			if look {
				used, err = b.usedByOthers(ctx, snap, key)
			}
			if err == nil && used.IsZero() {
				err = b.deleteAdminKey(ctx, snap, key.ID, key.CreatedAt)
			}
			log := b.log(req).With("admin_api_key_id", key.ID)
			e.mu.Lock()
			defer e.mu.Unlock()
			switch {
			case err != nil:
				log.Warn("superseded admin key not deleted", "error", err)
			case !used.IsZero():
				e.used[key.ID] = used
			default:
				e.deleted = append(e.deleted, key.ID)
				log.Info("superseded admin key deleted")
			}
		})
	}
	group.Wait()
	return e
}

// usedByOthers returns when a key was last used, if that is too late for a use by this
// process, and zero otherwise.
func (b *backend) usedByOthers(ctx context.Context, snap *snapshot, key supersededKey) (time.Time, error) {
	grace := snap.config.RotationGracePeriod
	if key.EvenIfUsed || b.now().Sub(key.superseded(grace)) >= longestKept {
		return time.Time{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, deleteBudget)
	defer cancel()
	known, err := snap.api.GetAdminKey(ctx, key.ID)
	switch {
	case client.IsNotFound(err):
		return time.Time{}, nil // the delete then proves whether the key is deleted
	case err != nil:
		return time.Time{}, err
	case key.usedAfter(known.LastUsedAt, grace):
		return known.LastUsedAt, nil
	}
	return time.Time{}, nil
}

// deleteSuperseded is the periodic work: it deletes superseded admin keys after their
// grace period. It claims the keys in b.deleting, so that configLock is free during the
// calls and no config write makes one of them active again.
func (b *backend) deleteSuperseded(ctx context.Context, req *logical.Request) error {
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	b.remindOfSuperseded(req, snap.config)
	now := b.now()
	if snap.config.mustLook(now) && b.rotation.mayWarn(lookForKeys, now, lookAgain) {
		if err := b.look(ctx, req, snap); err != nil {
			if b.rotation.mayWarn(lookForKeys+" failed", now, remindEvery) {
				b.log(req).Warn("superseded admin keys not checked: the list of admin keys could not be read", "superseded_admin_api_key_ids", snap.config.supersededIDs(func(*supersededKey) bool { return true }), "error", err)
			}
		} else if snap, err = b.current(ctx, req.Storage); err != nil {
			return err
		}
	}
	if snap.config.AdminKeyID == "" {
		return nil
	}
	if len(snap.config.supersededIDs(func(k *supersededKey) bool { return k.due(now) })) == 0 {
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
	var keys []supersededKey
	for _, key := range snap.config.Superseded {
		if key.ID == snap.config.AdminKeyID || !key.due(now) {
			continue
		}
		if _, claimed := b.deleting.LoadOrStore(key.ID, true); !claimed {
			defer b.deleting.Delete(key.ID)
			keys = append(keys, key)
		}
	}
	unlock()
	e := b.deleteKeys(ctx, req, snap, keys, true)
	if len(e.deleted)+len(e.used) == 0 {
		return nil
	}

	// The result is stored even if the worker has been stopped.
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
	if !e.apply(cfg) {
		return nil
	}
	if err := b.amendConfig(ctx, req.Storage, cfg); err != nil {
		return err // the next deletion succeeds for deleted keys
	}
	b.remindOfSuperseded(req, cfg)
	return nil
}

// lookForKeys is the name under which mayWarn limits the calls of look.
const lookForKeys = "look for admin keys"

// completeList returns a list of admin keys, and a config with the current key's ID and
// expiry from it. Without an error the list is complete, since it shows the current key.
func completeList(ctx context.Context, cfg *config, api *client.Client) (found *config, keys []client.AdminKey, err error) {
	found = cfg.clone()
	keys, resp, err := findAdminKeyID(ctx, found, api)
	if err == nil && resp != nil {
		err = errAdminKeyIDUnknown
	}
	return found, keys, err
}

// learn applies a complete list of admin keys to the config.
func (c *config) learn(found *config, keys []client.AdminKey) {
	if c.AdminKeyID == "" {
		c.AdminKeyID, c.AdminKeyExpires = found.AdminKeyID, found.AdminKeyExpires
	}
	c.locate(keys, false)
	c.dropSuperseded(c.AdminKeyID) // a superseded key may have been written back
}

// look finds the ID of the current admin key and which superseded keys it sees, and drops
// the records of those that it has not seen for longestKept.
func (b *backend) look(ctx context.Context, req *logical.Request, snap *snapshot) error {
	found, keys, err := completeList(ctx, snap.config, snap.api)
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, lockBudget)
	defer cancel()
	unlock, err := b.lockConfig(wait)
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil || cfg.asksAnother(snap.config) || cfg.AdminKeyID != snap.config.AdminKeyID {
		return err // the list belongs to another config
	}
	known := cfg.supersededIDs(isElsewhere) // by an earlier list: this one may have left a key out
	cfg.learn(found, keys)
	gone := cfg.supersededIDs(func(k *supersededKey) bool { return cfg.lost(k, b.now()) && slices.Contains(known, k.ID) })
	for _, id := range gone {
		cfg.dropSuperseded(id)
	}
	if err := b.amendConfig(ctx, req.Storage, cfg); err != nil {
		return err
	}
	if cfg.AdminKeyID != snap.config.AdminKeyID {
		b.log(req).Info("ID of the admin key found", "admin_api_key_id", cfg.AdminKeyID)
	}
	if len(gone) > 0 {
		b.log(req).Warn("superseded admin keys of another organization or endpoint are no longer tracked; delete them there", "admin_api_key_ids", gone)
	}
	return nil
}

// lastLook is called before a mount or config is deleted, after which superseded keys are
// no longer tracked: it records in the config which keys another Vault uses, and returns
// when each expires. If OpenAI does not answer, they count as unused.
func (b *backend) lastLook(ctx context.Context, req *logical.Request, cfg *config, api *client.Client) (ends map[string]time.Time) {
	ctx, cancel := context.WithTimeout(ctx, lastLookBudget)
	defer cancel()
	if len(cfg.unsure()) > 0 {
		found, keys, err := completeList(ctx, cfg, api)
		if err != nil {
			b.log(req).Warn("superseded admin keys not checked: the list of admin keys could not be read", "error", err)
			return nil
		}
		cfg.learn(found, keys)
	}
	ends = map[string]time.Time{}
	var mu sync.Mutex
	var group sync.WaitGroup
	used := map[string]time.Time{}
	for _, key := range slices.Clone(cfg.Superseded) {
		if key.EvenIfUsed || !key.seen() || key.ID == cfg.AdminKeyID {
			continue
		}
		group.Go(func() {
			known, err := api.GetAdminKey(ctx, key.ID)
			if err != nil {
				b.log(req).Warn("last use of a superseded admin key could not be read", "admin_api_key_id", key.ID, "error", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			ends[key.ID] = known.ExpiresAt
			if key.usedAfter(known.LastUsedAt, cfg.RotationGracePeriod) {
				used[key.ID] = known.LastUsedAt
			}
		})
	}
	group.Wait()
	for id, at := range used {
		cfg.keep(id, keptUsed, at)
	}
	return ends
}

// remindOfSuperseded logs once a day which superseded keys are retained and why.
func (b *backend) remindOfSuperseded(req *logical.Request, cfg *config) {
	for i := range cfg.Superseded {
		k := &cfg.Superseded[i]
		if !k.seen() || k.Kept == "" || !b.rotation.mayWarn("kept "+k.ID, b.now(), remindEvery) {
			continue
		}
		b.log(req).Warn("superseded admin key retained", "admin_api_key_id", k.ID, "text", k.keptText())
	}
}

// expireSuperseded deletes superseded admin keys regardless of their grace period: the
// mount is being disabled, after which they are no longer tracked. Keys that another
// Vault may use are retained.
func (b *backend) expireSuperseded(ctx context.Context, req *logical.Request) error {
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	var snap *snapshot
	err = tryAgain(ctx, func() (err error) {
		snap, err = b.current(ctx, req.Storage)
		return err
	})
	if errors.Is(err, errNotConfigured) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(snap.config.Superseded) == 0 {
		return nil
	}
	next := snap.config.clone()
	expire := b.lastLook(ctx, req, next, snap.api)
	left := b.processSuperseded(ctx, req, snap.with(next), ours)
	for i := range left.Superseded {
		k := &left.Superseded[i]
		b.log(req).Warn("mount is being disabled but a superseded admin key remains at OpenAI", "admin_api_key_id", k.ID, "expires_at", text.Time(expire[k.ID]), "text", left.leftText(k, expire[k.ID]))
	}
	return nil
}

// ours selects the keys that this mount deletes when it is disabled.
func ours(k *supersededKey) bool { return k.seen() && k.Kept == "" }

// processSuperseded deletes the matching superseded keys without checking their use, and
// stores the config. The caller holds configLock, and snap is active. It returns the
// config with the remaining keys even if it could not be stored; the worker retries after
// a failure, which is logged.
func (b *backend) processSuperseded(ctx context.Context, req *logical.Request, snap *snapshot, which func(*supersededKey) bool) *config {
	next := snap.config.clone()
	var keys []supersededKey
	for i := range next.Superseded {
		if k := &next.Superseded[i]; k.ID != next.AdminKeyID && which(k) {
			keys = append(keys, *k)
		}
	}
	if !b.deleteKeys(ctx, req, snap, keys, false).apply(next) {
		return snap.config
	}
	if err := b.amendConfig(ctx, req.Storage, next); err != nil {
		b.log(req).Warn("config not stored after superseded admin keys were deleted", "error", err)
	}
	return next
}

// atOnce selects the keys that are due regardless of their use.
func (b *backend) atOnce() func(*supersededKey) bool {
	now := b.now()
	return func(k *supersededKey) bool { return k.EvenIfUsed && k.due(now) }
}
