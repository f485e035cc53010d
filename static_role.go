package openaisecrets

// This file owns a static role's entry: its keys, when each of them is due, and how a
// write changes it.
//
// What must stay true: a rejected write leaves the role unchanged; only the static
// role's own files, and drain.go for a disabled mount, destroy a credential that a stored
// role needs. One change of a role at a time, under its lock; readers take no lock.

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
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/schedule"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	staticStoragePrefix = "static-role/"
	staticVersion       = 1
	// defaultRevocationDelay is long enough for clients that read again every five
	// minutes.
	defaultRevocationDelay = 6 * time.Minute
	// staticLead is the minimum time reserved to replace a key before it expires.
	staticLead = 5 * time.Minute
	// maxSuperseded bounds the superseded keys, and with them the size of an entry and
	// the number of keys to delete with the role.
	maxSuperseded = 100
	// maxKept bounds how long a superseded key that is still used is kept, keptReminder
	// is the interval of the log line about it.
	maxKept      = 7 * 24 * time.Hour
	keptReminder = 24 * time.Hour
)

// staticRole is a long-lived identity whose key is replaced on a schedule.
type staticRole struct {
	Version int `json:"version"`
	schedule.Schedule
	ProjectID        string `json:"project_id"`
	ServiceAccountID string `json:"service_account_id"`
	ServiceAccount   string `json:"service_account"`
	// Adopted reports that the account existed before the role: the engine creates and
	// deletes its keys, but never deletes the account.
	Adopted bool `json:"adopted,omitempty"`
	// AccountCreatedAt is when the create of the role's own account was sent; zero in
	// entries stored before the field existed.
	AccountCreatedAt time.Time     `json:"service_account_created_at,omitzero"`
	Description      string        `json:"service_account_description,omitempty"`
	Scopes           []string      `json:"scopes,omitempty"`
	RevocationDelay  time.Duration `json:"revocation_delay"`
	// DefaultDelay reports that RevocationDelay is the default, which follows the
	// schedule. It is false in entries stored before the field existed.
	DefaultDelay      bool              `json:"revocation_delay_default,omitempty"`
	KeyTTL            time.Duration     `json:"key_ttl,omitempty"`
	ActivationTimeout time.Duration     `json:"activation_timeout"`
	ActivationFailure activationFailure `json:"activation_failure,omitempty"`
	// DisableAutomatedRotation pauses rotation; the key still expires.
	DisableAutomatedRotation bool `json:"disable_automated_rotation,omitempty"`
	// OnMissing is the reaction to a key or account that was deleted at OpenAI, Missing
	// what was deleted, and Recreated when the engine last created it again.
	OnMissing onMissing `json:"on_missing,omitempty"`
	Missing   *missing  `json:"missing,omitempty"`
	Recreated time.Time `json:"recreated_at,omitzero"`
	// RotationError is the error of the last automatic rotation; empty after a success.
	RotationError string `json:"last_rotation_error,omitempty"`

	spendRule

	AsWritten asWritten `json:"as_written,omitempty"`

	Current    staticKey   `json:"current_key"`
	Superseded []staticKey `json:"superseded_keys,omitempty"`
}

// staticKey is a key of a static role. putStaticRole stores the value of the current
// one, the only one that reads return.
type staticKey struct {
	ID        string        `json:"id"`
	Name      string        `json:"name,omitempty"`
	Value     client.Secret `json:"-"`
	ExpiresAt time.Time     `json:"expires_at"`
	// Warning is returned with the current key; "" if there is none.
	Warning string `json:"warning,omitempty"`
	// CreatedAt is when its create was sent. CreatedAt and ExpiresAt are by this
	// server's clock, the other two by OpenAI's. Zero means unknown, as in entries
	// stored before the field existed.
	CreatedAt       time.Time `json:"created_at,omitzero"`
	OpenAICreatedAt time.Time `json:"openai_created_at,omitzero"`
	OpenAIExpiresAt time.Time `json:"openai_expires_at,omitzero"`

	// The remaining fields are set for superseded keys. SupersededAt is by this server's
	// clock. SuccessorAt is the same time by OpenAI's: the creation of the successor plus
	// the duration of its activation.
	DeleteAfter  time.Time `json:"delete_after,omitzero"`
	SupersededAt time.Time `json:"superseded_at,omitzero"`
	SuccessorAt  time.Time `json:"successor_created_at,omitzero"`
	// EvenIfUsed reports that the operator wants it deleted even if it is still used.
	EvenIfUsed bool `json:"delete_even_if_used,omitempty"`
	// KeptAt is when it was last found to be used after its revocation was due, and
	// LastUsedAt the use that OpenAI reported.
	KeptAt     time.Time `json:"kept_at,omitzero"`
	LastUsedAt time.Time `json:"last_used_at,omitzero"`
}

// superseded returns when the key was superseded. For entries stored before
// SupersededAt existed, it follows from revocation_delay.
func (k *staticKey) superseded(delay time.Duration) time.Time {
	if k.SupersededAt.IsZero() {
		return k.DeleteAfter.Add(-delay)
	}
	return k.SupersededAt
}

// kept reports whether a superseded key is kept beyond its revocation time.
func (k *staticKey) kept() bool { return !k.KeptAt.IsZero() && !k.EvenIfUsed }

// keptUntil returns until when a superseded key that is still used is kept.
func (k *staticKey) keptUntil(delay time.Duration) time.Time {
	end := k.superseded(delay).Add(maxKept)
	// An expired key need not be kept; the later time is safe if a clock is wrong.
	if expired := later(k.ExpiresAt, k.OpenAIExpiresAt); expired.Before(end) {
		return expired
	}
	return end
}

// due returns when a superseded key needs attention.
func (k *staticKey) due(delay time.Duration) time.Time {
	if !k.kept() {
		return k.DeleteAfter
	}
	if end := k.keptUntil(delay); end.Before(k.KeptAt.Add(keptReminder)) {
		return end
	}
	return k.KeptAt.Add(keptReminder)
}

// end returns the latest time at which a superseded key works.
func (k *staticKey) end(delay time.Duration) time.Time {
	if k.kept() {
		return k.keptUntil(delay)
	}
	if k.ExpiresAt.Before(k.DeleteAfter) {
		return k.ExpiresAt
	}
	return k.DeleteAfter
}

// readersEnd returns when all clients should have read the successor of a superseded
// key. It is by OpenAI's clock, if known, since last_used_at is; the margin allows for
// rounding at OpenAI.
func (k *staticKey) readersEnd(delay time.Duration) time.Time {
	overlap := k.DeleteAfter.Sub(k.superseded(delay))
	end := k.DeleteAfter
	if !k.SuccessorAt.IsZero() {
		end = k.SuccessorAt.Add(overlap)
	}
	return end.Add(-min(time.Minute, overlap/6))
}

// usedAfterEnd reports whether a superseded key was used after readersEnd.
func (k *staticKey) usedAfterEnd(lastUsed time.Time, delay time.Duration) bool {
	return lastUsed.After(k.readersEnd(delay))
}

// behind returns how far this server's clock was behind OpenAI's when the key was
// superseded, 0 if unknown.
func (k *staticKey) behind(delay time.Duration) time.Duration {
	if k.SuccessorAt.IsZero() {
		return 0
	}
	return k.SuccessorAt.Sub(k.superseded(delay))
}

// tooSoon reports whether a superseded key that was used is due only because this
// server's clock was slightly behind when it was superseded. correct handles larger
// differences.
func (k *staticKey) tooSoon(lastUsed, now time.Time, delay time.Duration) bool {
	behind := k.behind(delay)
	return behind > 0 && behind <= maxSkew && lastUsed.After(k.SuccessorAt) && now.Before(k.readersEnd(delay))
}

// putOff postpones the revocation of a superseded key to its time by OpenAI's clock.
func (k *staticKey) putOff(delay time.Duration) {
	overlap := k.DeleteAfter.Sub(k.superseded(delay))
	k.SupersededAt, k.DeleteAfter = k.SuccessorAt, k.SuccessorAt.Add(overlap)
}

// storedStaticRole adds the one value that staticRole never encodes.
type storedStaticRole struct {
	*staticRole
	Key string `json:"api_key"`
}

// getStaticRole returns nil if there is no such role.
func getStaticRole(ctx context.Context, s logical.Storage, name string) (*staticRole, error) {
	stored := storedStaticRole{staticRole: &staticRole{}}
	entry, err := readEntry(ctx, s, staticStoragePrefix+name, fmt.Sprintf("static role %q", name), staticVersion, &stored)
	if err != nil || entry == nil {
		return nil, err
	}
	stored.Current.Value = client.NewSecret(stored.Key)
	return stored.staticRole, nil
}

func putStaticRole(ctx context.Context, s logical.Storage, name string, r *staticRole) error {
	r.Version = staticVersion
	return writeEntry(ctx, s, staticStoragePrefix+name, fmt.Sprintf("static role %q", name), storedStaticRole{staticRole: r, Key: r.Current.Value.Reveal()})
}

// fields returns the effective values of the writable fields.
func (r *staticRole) fields() map[string]any {
	data := map[string]any{
		"project_id":                  r.ProjectID,
		"service_account_id":          r.ServiceAccountID,
		"service_account_description": r.Description,
		"scopes":                      append([]string{}, r.Scopes...), // [] and not null without any
		"revocation_delay":            int64(r.RevocationDelay / time.Second),
		"key_ttl":                     int64(r.KeyTTL / time.Second),
		"activation_timeout":          int64(r.ActivationTimeout / time.Second),
		"activation_failure":          r.ActivationFailure.String(),
		"on_missing":                  r.OnMissing.String(),
		"rotation_period":             int64(r.RotationPeriod / time.Second),
		"rotation_schedule":           r.RotationSchedule,
		"rotation_window":             int64(r.RotationWindow / time.Second),
		"disable_automated_rotation":  r.DisableAutomatedRotation,
	}
	r.show(data)
	return data
}

// mergeStaticRole applies a write to the stored role (nil if there is none) and runs
// every check that needs no call.
func mergeStaticRole(old *staticRole, d *framework.FieldData, now time.Time) (r *staticRole, problem string) {
	r = &staticRole{ActivationTimeout: defaultActivation, DefaultDelay: true}
	if old != nil {
		r = old.clone()
		r.correct(now)
	}
	for field, target := range map[string]*string{"project_id": &r.ProjectID, "service_account_id": &r.ServiceAccountID} {
		raw, ok := d.GetOk(field)
		if !ok {
			continue
		}
		value := raw.(string)
		if problem := text.CheckID(field, value); problem != "" {
			return nil, problem
		}
		if value == "" && old != nil && !(old.Adopted && field == "service_account_id") {
			continue // "" repeats the value with which the role was created
		}
		if old != nil && value != *target {
			return nil, fmt.Sprintf("%s cannot be changed from %q; to change it, delete the static role and create it again", field, *target)
		}
		*target = value
	}
	if old == nil {
		r.Adopted = r.ServiceAccountID != ""
	}
	if raw, ok := d.GetOk("service_account_description"); ok {
		if problem := text.Check("service_account_description", raw.(string)); problem != "" {
			return nil, problem
		}
		r.Description = raw.(string)
	}
	if problem := readScopes(d, &r.Scopes); problem != "" {
		return nil, problem
	}
	if problem := r.Merge(d, now); problem != "" {
		return nil, problem
	}
	if r.RotationPeriod == 0 && r.RotationSchedule == "" {
		return nil, "rotation_period or rotation_schedule is required"
	}
	if raw, ok := d.GetOk("disable_automated_rotation"); ok {
		r.DisableAutomatedRotation = raw.(bool)
	}
	for field, target := range map[string]*time.Duration{"key_ttl": &r.KeyTTL, "activation_timeout": &r.ActivationTimeout} {
		if raw, ok := d.GetOk(field); ok {
			*target = time.Duration(raw.(int)) * time.Second
		}
	}
	if r.ActivationTimeout > maxActivation {
		return nil, fmt.Sprintf("activation_timeout must be between 0 and %s; 0 makes keys active without testing them", maxActivation)
	}

	if problem := r.ActivationFailure.take(d); problem != "" {
		return nil, problem
	}
	if problem := r.OnMissing.take(d); problem != "" {
		return nil, problem
	}
	if problem := r.merge(d, actionWarn, actionBlock); problem != "" {
		return nil, problem
	}

	gap := r.LongestGap(now)
	byDefault := min(defaultRevocationDelay, gap)
	raw, chosen := d.GetOk("revocation_delay")
	if chosen {
		delay := time.Duration(raw.(int)) * time.Second
		// A default that is read and written back stays the default.
		r.DefaultDelay = r.DefaultDelay && old != nil && delay == old.RevocationDelay && delay == byDefault
		r.RevocationDelay = delay
	} else if r.DefaultDelay && (old == nil || !r.Same(&old.Schedule)) {
		r.RevocationDelay = byDefault
	}
	if r.RevocationDelay > gap {
		return nil, fmt.Sprintf("revocation_delay must be between 0 and %s, the time between two rotations", gap)
	}
	if old != nil && chosen && (r.RevocationDelay < old.RevocationDelay || r.RevocationDelay == 0) {
		r.shorten(old.RevocationDelay)
	}
	// A key must outlive the longest gap to the next rotation, whenever it is created.
	least := gap + r.RotationWindow + r.RevocationDelay + staticLead
	switch {
	case least > client.MaxExpiry:
		return nil, fmt.Sprintf("the schedule requires a key lifetime of %s, but OpenAI allows at most %s; rotate more often", least, client.MaxExpiry)
	case r.KeyTTL != 0 && r.KeyTTL < least:
		return nil, fmt.Sprintf("key_ttl must be %s or more: the time to the next rotation, rotation_window, revocation_delay, and %s in reserve", least, staticLead)
	case r.KeyTTL > client.MaxExpiry:
		return nil, fmt.Sprintf("key_ttl must be %s or less, the maximum at OpenAI", client.MaxExpiry)
	}
	switch {
	case old == nil: // the first rotation plans the next
	case r.RotationPeriod == old.RotationPeriod && r.RotationSchedule == old.RotationSchedule:
	case r.RotationSchedule != "":
		r.PlanFrom(now)
	default:
		r.PlanFrom(r.LastRotated)
	}
	return r, ""
}

// eachStaticRole calls each with every static role but those of a newer version.
func eachStaticRole(ctx context.Context, s logical.Storage, each func(name string, r *staticRole)) error {
	names, err := listNames(ctx, s, staticStoragePrefix)
	if err != nil {
		return fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range names {
		r, err := getStaticRole(ctx, s, name)
		if err != nil && !errors.As(err, &unreadable{}) {
			return err
		}
		if r != nil && err == nil {
			each(name, r)
		}
	}
	return nil
}

// narrows reports whether a write only removes scopes.
func narrows(old, r *staticRole) bool {
	if old == nil || len(r.Scopes) == 0 {
		return false
	}
	return len(old.Scopes) == 0 || !slices.ContainsFunc(r.Scopes, func(scope string) bool { return !slices.Contains(old.Scopes, scope) })
}

// sameScopes reports whether two lists have the same scopes, in any order.
func sameScopes(a, b []string) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(scope string) bool { return !slices.Contains(b, scope) })
}

// clone returns a copy that shares no mutable data.
func (r *staticRole) clone() *staticRole {
	copied := *r
	copied.Scopes, copied.Superseded = slices.Clone(r.Scopes), slices.Clone(r.Superseded)
	return &copied
}

// keyLife returns the lifetime at OpenAI of a key created now: key_ttl or, by default,
// three rotations and at least a week, so that the key survives an outage of Vault of
// some days.
func (r *staticRole) keyLife(now time.Time) time.Duration {
	if r.KeyTTL != 0 {
		return r.KeyTTL
	}
	life := r.ThreeRotations(now, client.MaxExpiry)
	if life == 0 {
		return client.MaxExpiry
	}
	return min(max(life+r.RevocationDelay, minKeyLife), client.MaxExpiry)
}

// next returns the time of the next rotation: the scheduled time, or sooner if the key
// would expire before its successor replaces it. Zero while rotation is paused.
func (r *staticRole) next(now time.Time) time.Time {
	if r.DisableAutomatedRotation {
		return time.Time{}
	}
	at := r.Tick(now)
	if by := r.renewBy(); by.Before(at) {
		return by
	}
	return at
}

// due reports whether a rotation is due.
func (r *staticRole) due(now time.Time) bool {
	next := r.next(now)
	return !next.IsZero() && !now.Before(next)
}

// inLastThird reports whether less than a third of the key's life is left.
func (r *staticRole) inLastThird(now time.Time) bool {
	return now.After(r.Current.ExpiresAt.Add(-r.Current.ExpiresAt.Sub(r.LastRotated) / 3))
}

// pausedText returns the warning about the key while rotation is paused.
func (r *staticRole) pausedText(mount, name string, now time.Time) string {
	if !r.Current.ExpiresAt.After(now) {
		return fmt.Sprintf("Rotation is paused (disable_automated_rotation), and key %s expired at OpenAI at %s. To resume rotation, run \"vault write %sstatic-roles/%s disable_automated_rotation=false\".",
			r.Current.ID, text.Time(r.Current.ExpiresAt), mount, name)
	}
	return fmt.Sprintf("Rotation is paused (disable_automated_rotation), and key %s expires at OpenAI at %s. To resume rotation, run \"vault write %sstatic-roles/%s disable_automated_rotation=false\".",
		r.Current.ID, text.Time(r.Current.ExpiresAt), mount, name)
}

// renewBy returns the latest time to replace the key so that it stays valid for
// revocation_delay after that.
func (r *staticRole) renewBy() time.Time {
	life := r.Current.OpenAIExpiresAt.Sub(r.Current.OpenAICreatedAt)
	by := r.Current.ExpiresAt.Add(-r.RevocationDelay - staticLead)
	// This server's clock may have been ahead when the key was created and corrected
	// since. If it is still ahead, half of the key's life is soon enough.
	if theirs := r.Current.OpenAIExpiresAt.Add(-r.RevocationDelay - staticLead); life > 0 && theirs.Before(by.Add(-clockSlack)) {
		if soonest := r.LastRotated.Add(life / 2); theirs.Before(soonest) {
			theirs = soonest
		}
		if theirs.Before(by) {
			by = theirs
		}
	}
	// Clock errors must not cause one rotation right after another.
	if soonest := r.LastRotated.Add(schedule.MinPeriod); by.Before(soonest) {
		return soonest
	}
	return by
}

// nextWork holds the times of the next work for a role; zero means none.
type nextWork struct {
	rotate, deadline time.Time // the next rotation, and the latest time for it
	clean            time.Time // the next deletion of a superseded key, or its retry
	owed             time.Time // when the first such deletion was due
	kept             int       // superseded keys that are kept because they are still used
	missing          bool      // the key was deleted at OpenAI
}

// plan returns the next work for the role.
func (r *staticRole) plan(now time.Time) nextWork {
	p := nextWork{rotate: r.next(now), deadline: r.renewBy(), missing: r.Missing != nil}
	for i := range r.Superseded {
		k := &r.Superseded[i]
		if due := k.due(r.RevocationDelay); p.clean.IsZero() || due.Before(p.clean) {
			p.clean = due
		}
		if k.kept() {
			p.kept++
		}
	}
	p.owed = p.clean
	return p
}

// correct repairs times that a clock that was ahead stored: it sets past events that
// are in the future to now, and recomputes the plan from them, never beyond the key's
// expiry at OpenAI. It reports whether it changed the role.
func (r *staticRole) correct(now time.Time) (changed bool) {
	present := now.UTC().Truncate(time.Second)
	ahead := func(t *time.Time) bool {
		if !t.After(now.Add(clockSlack)) {
			return false
		}
		*t, changed = present, true
		return true
	}
	correctKey := func(k *staticKey) bool {
		if !ahead(&k.CreatedAt) {
			return false
		}
		if end := k.OpenAIExpiresAt; !end.IsZero() && end.Before(k.ExpiresAt) {
			k.ExpiresAt = end
		}
		return true
	}
	ahead(&r.AccountCreatedAt)
	wrong := correctKey(&r.Current)
	if ahead(&r.LastRotated) || wrong {
		r.PlanFrom(present)
		if r.Current.OpenAIExpiresAt.IsZero() { // the key's expiry is not known
			r.NextRotation = present
		}
	}
	for i := range r.Superseded {
		k := &r.Superseded[i]
		correctKey(k)
		ahead(&k.KeptAt)
		superseded := k.superseded(r.RevocationDelay)
		overlap := k.DeleteAfter.Sub(superseded)
		switch {
		case ahead(&superseded):
			if !k.SuccessorAt.IsZero() { // it may be long past
				superseded = earlier(superseded, k.SuccessorAt)
			}
			k.SupersededAt, k.DeleteAfter = superseded, superseded.Add(overlap)
		case k.behind(r.RevocationDelay) > maxSkew && !now.Add(clockSlack).Before(k.SuccessorAt) && !k.EvenIfUsed:
			// The clock was behind, so clients have not had the whole delay yet.
			k.putOff(r.RevocationDelay)
			changed = true
		}
	}
	return changed
}

// shorten applies a reduced revocation_delay to the superseded keys, which are then
// deleted even if they are still used.
func (r *staticRole) shorten(former time.Duration) {
	for i := range r.Superseded {
		k := &r.Superseded[i]
		superseded := k.superseded(former)
		if at := superseded.Add(r.RevocationDelay); at.Before(k.DeleteAfter) {
			k.SupersededAt, k.DeleteAfter = superseded, at
		}
		k.EvenIfUsed = true
	}
}

// endNow schedules the deletion of all superseded keys for now, even if they are still
// used.
func (r *staticRole) endNow(now time.Time) {
	for i := range r.Superseded {
		k := &r.Superseded[i]
		k.SupersededAt, k.EvenIfUsed = k.superseded(r.RevocationDelay), true
		if at := now.UTC().Truncate(time.Second); at.Before(k.DeleteAfter) {
			k.DeleteAfter = at
		}
	}
}

// credential returns the role's account, or the key k, for destroy. For the account it
// has the active key and the latest expiry of all keys.
func (r *staticRole) credential(name string, k *staticKey) credential {
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: r.ProjectID, ID: r.ServiceAccountID, Name: r.ServiceAccount, StaticRole: name}
	if k != nil {
		c.Type, c.KeyID, c.KeyName, c.CreatedAt, c.KeyExpires = typeKey, k.ID, k.Name, k.CreatedAt, k.ExpiresAt
		return c
	}
	c.KeyID, c.CreatedAt = r.Current.ID, r.AccountCreatedAt
	for _, k := range r.keys() {
		c.KeyExpires = later(c.KeyExpires, k.ExpiresAt)
	}
	return c
}

// keys returns all keys of the role, the active one first.
func (r *staticRole) keys() []staticKey { return append([]staticKey{r.Current}, r.Superseded...) }

// stillNeeds reports whether the role still needs a credential.
func (r *staticRole) stillNeeds(c credential) bool {
	if !c.isKey() {
		return c.ID == r.ServiceAccountID || (c.ID == "" && c.Name == r.ServiceAccount)
	}
	return slices.ContainsFunc(r.keys(), func(k staticKey) bool {
		return c.KeyID == k.ID || (c.KeyID == "" && c.KeyName == k.Name)
	})
}

// owned returns the credentials to destroy with the role: its own account, or the keys
// of an adopted one.
func (r *staticRole) owned(name string) []credential {
	if !r.Adopted {
		return []credential{r.credential(name, nil)}
	}
	var owned []credential
	for _, k := range r.keys() {
		owned = append(owned, r.credential(name, &k))
	}
	return owned
}

// keySpec returns the spec of a new key for the role, with its account if it has none.
func (r *staticRole) keySpec(name, displayName string, now time.Time) credentialSpec {
	o := credentialSpec{
		label:      fmt.Sprintf("static role %q", name),
		credential: credential{Type: typeAccount, ProjectID: r.ProjectID, StaticRole: name},
		template:   naming.StaticTemplate,
		data:       naming.Data{RoleName: name, DisplayName: displayName, ProjectID: r.ProjectID, UnixTime: now.Unix()},
		scopes:     r.Scopes, expiry: r.keyLife(now), activation: r.ActivationTimeout,
		unproven: r.ActivationFailure == activationWarn,
	}
	o.covers = o.expiry - expiryMargin
	if r.ServiceAccountID != "" {
		o.Type, o.ID, o.Name = typeKey, r.ServiceAccountID, r.ServiceAccount
	}
	return o
}

// noteStaticFailure stores the error of an automatic rotation of the key id, for reads
// of the role. The caller holds the role's lock.
func noteStaticFailure(ctx context.Context, s logical.Storage, name, id string, failure error) error {
	// Read again: if storing the new key failed, that key may still be active, and the
	// rotation has succeeded.
	r, err := getStaticRole(ctx, s, name)
	text := failure.Error()
	if len(text) > maxStoredText {
		text = strings.ToValidUTF8(text[:maxStoredText], "") + "…"
	}
	if err != nil || r == nil || r.Current.ID != id || r.RotationError == text {
		return err
	}
	r.RotationError = text
	return putStaticRole(ctx, s, name, r)
}
