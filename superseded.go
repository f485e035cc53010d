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
//   - a key that OpenAI says was superseded later than this clock says counts from
//     then: the clock was behind, and the use of the key began no earlier;
//   - OpenAI is not asked while configLock is held, except by a request that
//     holds it anyway, and one key whose call hangs does not keep the others.

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
	endsAtOnce = 4
	// lookAgain is the least time between two lists of admin keys that are to tell
	// which of them the current key sees.
	lookAgain = time.Hour
)

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
	return fmt.Sprintf("%d superseded admin keys wait for the end of their grace period, and the limit is %d; the next one is deleted at %s. Rotate then, shorten rotation_grace_period, or send force=true to delete all of them at once", waiting, maxWaiting, text.Time(next))
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
		k := &c.Retired[i]
		listed := slices.ContainsFunc(keys, func(a client.AdminKey) bool { return a.ID == k.ID })
		k.Elsewhere = !listed && (k.Elsewhere || k.Unchecked || away)
		k.Unchecked = false
	}
}

// unsure returns the superseded keys of which it is not known whether the current
// key sees them, or is one of them.
func (c *config) unsure() []string {
	return c.retiredIDs(func(k *retiredKey) bool { return k.Unchecked || c.AdminKeyID == "" })
}

// mustLook reports whether a list of admin keys is needed to go on.
func (c *config) mustLook(now time.Time) bool {
	return c.AdminKeyID == "" || slices.ContainsFunc(c.Retired, func(k retiredKey) bool { return k.Unchecked || c.lost(&k, now) })
}

// lost reports whether a key that no list shows has been waited for long enough.
func (c *config) lost(k *retiredKey, now time.Time) bool {
	return isElsewhere(k) && now.Sub(k.superseded(c.RotationGracePeriod)) >= longestKept
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

func isElsewhere(k *retiredKey) bool { return k.Elsewhere && !k.Unchecked }

// elsewhereText says of keys that only a person can delete them.
func elsewhereText(ids []string) string {
	return fmt.Sprintf("Not among the admin keys that the current one sees, so the engine does not delete them: %s. If they belong to another organization or endpoint, delete them there.", strings.Join(ids, ", "))
}

// unsureText says of keys that they wait for a list of admin keys.
func unsureText(ids []string) string {
	return fmt.Sprintf("The engine has not checked whether the current admin key sees these superseded ones, and does not delete them before: %s. It checks within a minute, and after a failure once an hour. A config write without skip_verify checks at once; if the ID of the current key cannot be found, send it as admin_api_key_id.", strings.Join(ids, ", "))
}

// leftText says why the key outlives the mount or the config, and until when.
func (c *config) leftText(k *retiredKey, end time.Time) string {
	why := k.keptWhy()
	switch {
	case c.AdminKeyID == "":
		why = "the ID of the current admin key is unknown, so it may be this one"
	case k.Unchecked:
		why = "the engine could not check whether the current admin key sees it"
	case k.Elsewhere:
		why = "it is not among the admin keys that the current one sees"
	case why == "":
		why = "it could not be deleted"
	}
	until := ""
	if !end.IsZero() {
		until = fmt.Sprintf(" It expires at %s.", text.Time(end))
	}
	return fmt.Sprintf("Superseded admin key %s is left at OpenAI: %s.%s", k.ID, why, until)
}

// warnOfRetired adds to a read of the config what has become of superseded keys.
func (c *config) warnOfRetired(resp *logical.Response) {
	unsure := c.unsure()
	for i := range c.Retired {
		if k := &c.Retired[i]; k.Kept != "" && !k.Elsewhere && !slices.Contains(unsure, k.ID) {
			resp.AddWarning(k.keptText())
		}
	}
	if len(unsure) > 0 {
		resp.AddWarning(unsureText(unsure))
	} else if ids := c.retiredIDs(isElsewhere); len(ids) > 0 {
		resp.AddWarning(elsewhereText(ids))
	}
}

// --- Who uses a key ---

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
	// grace period in the same write, or has none, wants its end.
	if old.AdminKeyRotated && !old.AdminKey.Equal(cfg.AdminKey) && cfg.RotationGracePeriod > 0 && cfg.RotationGracePeriod >= old.RotationGracePeriod &&
		(before < 0 || !b.useOf(old.AdminKey).vouches(keys[before].LastUsedAt)) {
		cfg.keep(old.AdminKeyID, keptUnvouched, time.Time{})
	}
	if keys != nil {
		cfg.locate(keys, moved)
	} else if cfg.asksAnother(old) {
		for i := range cfg.Retired {
			cfg.Retired[i].Unchecked = true
		}
	}
	return moved
}

// asksAnother reports whether a config may lead to another organization than the
// one before.
func (c *config) asksAnother(old *config) bool {
	return old != nil && (!c.AdminKey.Equal(old.AdminKey) || c.APIEndpoint != old.APIEndpoint || c.OrganizationID != old.OrganizationID)
}

// reportRetired says in the answer to a config write what becomes of superseded
// keys, and deletes those that are to end at once.
func (b *backend) reportRetired(ctx context.Context, req *logical.Request, old *config, snap *snapshot, quiet bool, response *logical.Response) {
	cfg := snap.config
	if old == nil {
		return
	}
	if (cfg.RotationGracePeriod < old.RotationGracePeriod || cfg.RotationGracePeriod == 0) && !quiet {
		cfg = b.sweepRetired(ctx, req, snap, b.atOnce())
		if left := cfg.retiredIDs(b.atOnce()); len(left) > 0 && cfg.AdminKeyID != "" {
			response.AddWarning(notDeletedText(left))
		}
	}
	if cfg.asksAnother(old) {
		cfg.warnOfRetired(response)
	} else if ids := cfg.unsure(); len(ids) > 0 {
		response.AddWarning(unsureText(ids))
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
		switch {
		case id == cfg.AdminKeyID:
			problem = "config not stored: the engine is deleting this admin key, which it has superseded; try again in a minute, or write another"
		case cfg.AdminKeyID == "" && cfg.asksAnother(old):
			problem = "config not stored: the engine is deleting a superseded admin key, and without an ID this one may be it; send admin_api_key_id with it, or try again in a minute"
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
	grace := snap.config.RotationGracePeriod
	if key.Regardless || b.now().Sub(key.superseded(grace)) >= longestKept {
		return time.Time{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, endBudget)
	defer cancel()
	known, err := snap.api.GetAdminKey(ctx, key.ID)
	switch {
	case client.IsNotFound(err):
		return time.Time{}, nil // whether it is deleted is the delete's to prove
	case err != nil:
		return time.Time{}, err
	case key.usedAfter(known.LastUsedAt, grace):
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
	if snap.config.mustLook(now) && b.rotation.mayWarn(lookForKeys, now, lookAgain) {
		if err := b.look(ctx, req, snap); err != nil {
			if b.rotation.mayWarn(lookForKeys+" in vain", now, remindEvery) {
				b.log(req).Warn("which admin keys the current one sees is not known yet", "superseded_admin_api_key_ids", snap.config.retiredIDs(func(*retiredKey) bool { return true }), "error", err)
			}
		} else if snap, err = b.current(ctx, req.Storage); err != nil {
			return err
		}
	}
	if snap.config.AdminKeyID == "" {
		return nil
	}
	if len(snap.config.retiredIDs(func(k *retiredKey) bool { return k.due(now) })) == 0 {
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
	unlock()
	e := b.endKeys(ctx, req, snap, keys, true)
	if len(e.deleted)+len(e.used) == 0 {
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
	if !e.apply(cfg) {
		return nil
	}
	if err := b.amendConfig(ctx, req.Storage, cfg); err != nil {
		return err // deleting them again finds them gone
	}
	b.remindOfRetired(req, cfg)
	return nil
}

// lookForKeys names the look of the worker where its last time is noted.
const lookForKeys = "look for admin keys"

// completeList returns what a list of admin keys says: the current key's ID and end, and
// the others. Without an error the list is complete, since it shows the current key.
func completeList(ctx context.Context, cfg *config, api *client.Client) (found *config, keys []client.AdminKey, err error) {
	found = cfg.clone()
	keys, resp, err := findAdminKeyID(ctx, found, api)
	if err == nil && resp != nil {
		err = errAdminKeyIDUnknown
	}
	return found, keys, err
}

// learn takes over what a list of admin keys has said.
func (c *config) learn(found *config, keys []client.AdminKey) {
	if c.AdminKeyID == "" {
		c.AdminKeyID, c.AdminKeyExpires = found.AdminKeyID, found.AdminKeyExpires
	}
	c.locate(keys, false)
	c.forget(c.AdminKeyID) // it was superseded once, and written back
}

// look finds the ID of the current admin key and which superseded ones it sees, and
// forgets those that it has not seen for a week.
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
		return err // of a config that is not in force the list says nothing
	}
	cfg.learn(found, keys)
	gone := cfg.retiredIDs(func(k *retiredKey) bool { return cfg.lost(k, b.now()) })
	for _, id := range gone {
		cfg.forget(id)
	}
	if err := b.amendConfig(ctx, req.Storage, cfg); err != nil {
		return err
	}
	if cfg.AdminKeyID != snap.config.AdminKeyID {
		b.log(req).Info("ID of the admin key found", "admin_api_key_id", cfg.AdminKeyID)
	}
	if len(gone) > 0 {
		b.log(req).Warn("superseded admin keys of another organization or endpoint are forgotten; delete those that are alive there", "admin_api_key_ids", gone)
	}
	return nil
}

// lastLook is for a mount or config that ends, after which nothing knows of
// superseded keys: it notes in the config which are used by another Vault, and
// returns when each ends at OpenAI. Where OpenAI does not say, they count as unused.
func (b *backend) lastLook(ctx context.Context, req *logical.Request, cfg *config, api *client.Client) (ends map[string]time.Time) {
	ctx, cancel := context.WithTimeout(ctx, lastLookBudget)
	defer cancel()
	if len(cfg.unsure()) > 0 {
		found, keys, err := completeList(ctx, cfg, api)
		if err != nil {
			b.log(req).Warn("which admin keys the current one sees is not known", "error", err)
			return nil
		}
		cfg.learn(found, keys)
	}
	ends = map[string]time.Time{}
	var mu sync.Mutex
	var group sync.WaitGroup
	used := map[string]time.Time{}
	for _, key := range slices.Clone(cfg.Retired) {
		if key.Regardless || !key.seen() || key.ID == cfg.AdminKeyID {
			continue
		}
		group.Go(func() {
			known, err := api.GetAdminKey(ctx, key.ID)
			if err != nil {
				b.log(req).Warn("use of a superseded admin key not read", "admin_api_key_id", key.ID, "error", err)
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

// remindOfRetired logs once a day which superseded keys are kept and why.
func (b *backend) remindOfRetired(req *logical.Request, cfg *config) {
	for i := range cfg.Retired {
		k := &cfg.Retired[i]
		if !k.seen() || k.Kept == "" || !b.rotation.mayWarn("kept "+k.ID, b.now(), remindEvery) {
			continue
		}
		b.log(req).Warn("superseded admin key is kept", "admin_api_key_id", k.ID, "text", k.keptText())
	}
}

// endRetired deletes superseded admin keys whatever is left of their grace
// period: the mount is being disabled, and then nothing knows of them. Those that
// another Vault uses or may use stay.
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
	if len(snap.config.Retired) == 0 {
		return nil
	}
	next := snap.config.clone()
	expire := b.lastLook(ctx, req, next, snap.api)
	left := b.sweepRetired(ctx, req, snap.with(next), ours)
	for i := range left.Retired {
		k := &left.Retired[i]
		b.log(req).Warn("the mount is being disabled and a superseded admin key is left at OpenAI", "admin_api_key_id", k.ID, "expires_at", text.Time(expire[k.ID]), "text", left.leftText(k, expire[k.ID]))
	}
	return nil
}

// ours selects the keys that go when this engine does.
func ours(k *retiredKey) bool { return k.seen() && k.Kept == "" }

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
