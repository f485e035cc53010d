package openaisecrets

// This file owns a static role's entry: its keys, when each of them is due, what a
// write makes of it, and its lock.
//
// What must stay true: a refused write leaves the role as it was; what a stored role
// still needs is destroyed by nobody but the static role's own files. One change of a
// role at a time, under its lock; a reader takes none.

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	staticStoragePrefix = "static-role/"
	staticVersion       = 1
	// defaultRevocationDelay lets a reader that waits for the rotation, and one
	// that reads again every five minutes, change over.
	defaultRevocationDelay = 6 * time.Minute
	// staticLead is the least time that is left for replacing a key whose end is
	// near.
	staticLead = 5 * time.Minute
	// maxRetired bounds the replaced keys that wait for their deletion, which is
	// the size of a role's entry and how much there is to delete with it.
	maxRetired = 100
	// maxKept is how long a superseded key that is still used is kept at most,
	// keptReminder how often the log says so.
	maxKept      = 7 * 24 * time.Hour
	keptReminder = 24 * time.Hour
)

// staticRole is a long-lived identity whose key is replaced on a schedule.
type staticRole struct {
	Version int `json:"version"`
	schedule
	ProjectID        string `json:"project_id"`
	ServiceAccountID string `json:"service_account_id"`
	ServiceAccount   string `json:"service_account"`
	// Adopted says that the account is somebody else's: its keys are made and
	// deleted here, it itself stays.
	Adopted bool `json:"adopted,omitempty"`
	// AccountCreatedAt is when the create of an account that was made for the role
	// was sent; zero in entries of before it was kept.
	AccountCreatedAt time.Time     `json:"service_account_created_at,omitzero"`
	Description      string        `json:"service_account_description,omitempty"`
	Scopes           []string      `json:"scopes,omitempty"`
	RevocationDelay  time.Duration `json:"revocation_delay"`
	// DefaultDelay says that nobody chose RevocationDelay, so that it follows the
	// schedule. In entries of before it was kept any value counts as chosen.
	DefaultDelay      bool              `json:"revocation_delay_default,omitempty"`
	KeyTTL            time.Duration     `json:"key_ttl,omitempty"`
	ActivationTimeout time.Duration     `json:"activation_timeout"`
	ActivationFailure activationFailure `json:"activation_failure,omitempty"`
	// DisableAutomatedRotation pauses rotation: the key stays, and ends when it does.
	DisableAutomatedRotation bool `json:"disable_automated_rotation,omitempty"`
	// RotationError is why the last rotation that nobody asked for has failed;
	// empty after a success.
	RotationError string    `json:"last_rotation_error,omitempty"`
	AsWritten     asWritten `json:"as_written,omitempty"`

	Current staticKey   `json:"current_key"`
	Retired []staticKey `json:"retired_keys,omitempty"`
}

// staticKey is a key of a static role. putStaticRole carries the value of the
// current one, which is the only one that is handed out.
type staticKey struct {
	ID        string        `json:"id"`
	Name      string        `json:"name,omitempty"`
	Value     client.Secret `json:"-"`
	ExpiresAt time.Time     `json:"expires_at"`
	// Warning is what readers of the current key must know of it; "" for nothing.
	Warning string `json:"warning,omitempty"`
	// CreatedAt is when its create was sent. It and ExpiresAt are by this server's
	// clock, the other two the same by OpenAI's. What is zero is not known, as in
	// entries of before it was kept.
	CreatedAt       time.Time `json:"created_at,omitzero"`
	OpenAICreatedAt time.Time `json:"openai_created_at,omitzero"`
	OpenAIExpiresAt time.Time `json:"openai_expires_at,omitzero"`

	// The rest is of superseded keys. SupersededAt is by this server's clock.
	// SuccessorAt is the same by OpenAI's: when it made the successor, and what the
	// activation took.
	DeleteAfter  time.Time `json:"delete_after,omitzero"`
	SupersededAt time.Time `json:"superseded_at,omitzero"`
	SuccessorAt  time.Time `json:"successor_created_at,omitzero"`
	// EvenIfUsed says that the operator wants it deleted whatever its use.
	EvenIfUsed bool `json:"delete_even_if_used,omitempty"`
	// KeptAt is when it was last seen to be in use after its end, and LastUsedAt
	// what OpenAI said then.
	KeptAt     time.Time `json:"kept_at,omitzero"`
	LastUsedAt time.Time `json:"last_used_at,omitzero"`
}

// superseded is when the key was superseded. Entries of before that was kept say
// only what follows from revocation_delay.
func (k *staticKey) superseded(delay time.Duration) time.Time {
	if k.SupersededAt.IsZero() {
		return k.DeleteAfter.Add(-delay)
	}
	return k.SupersededAt
}

// kept reports whether a superseded key stays although its time is over.
func (k *staticKey) kept() bool { return !k.KeptAt.IsZero() && !k.EvenIfUsed }

// keptUntil is until when a superseded key that is still used is kept.
func (k *staticKey) keptUntil(delay time.Duration) time.Time {
	end := k.superseded(delay).Add(maxKept)
	// Whichever clock is wrong, of a key that has ended nobody has any use.
	if dead := later(k.ExpiresAt, k.OpenAIExpiresAt); dead.Before(end) {
		return dead
	}
	return end
}

// due is when something is to be done about a superseded key.
func (k *staticKey) due(delay time.Duration) time.Time {
	if !k.kept() {
		return k.DeleteAfter
	}
	if end := k.keptUntil(delay); end.Before(k.KeptAt.Add(keptReminder)) {
		return end
	}
	return k.KeptAt.Add(keptReminder)
}

// end is when a superseded key stops working at the latest.
func (k *staticKey) end(delay time.Duration) time.Time {
	if k.kept() {
		return k.keptUntil(delay)
	}
	if k.ExpiresAt.Before(k.DeleteAfter) {
		return k.ExpiresAt
	}
	return k.DeleteAfter
}

// readersEnd is from when its readers should all have had a superseded key's
// successor, by OpenAI's clock where that is known: it is what last_used_at is by. The
// margin is for what OpenAI may round.
func (k *staticKey) readersEnd(delay time.Duration) time.Time {
	overlap := k.DeleteAfter.Sub(k.superseded(delay))
	end := k.DeleteAfter
	if !k.SuccessorAt.IsZero() {
		end = k.SuccessorAt.Add(overlap)
	}
	return end.Add(-min(time.Minute, overlap/6))
}

// usedAfterEnd reports whether a superseded key was used when its readers should
// all have had its successor.
func (k *staticKey) usedAfterEnd(lastUsed time.Time, delay time.Duration) bool {
	return lastUsed.After(k.readersEnd(delay))
}

// behind is by how much this server's clock was behind OpenAI's when the key was
// superseded, as far as that is known.
func (k *staticKey) behind(delay time.Duration) time.Duration {
	if k.SuccessorAt.IsZero() {
		return 0
	}
	return k.SuccessorAt.Sub(k.superseded(delay))
}

// tooSoon reports whether a superseded key that its readers have used is due only
// because this server's clock was a little behind and perhaps is no more. By correct
// it would be put off only after more than that.
func (k *staticKey) tooSoon(lastUsed, now time.Time, delay time.Duration) bool {
	behind := k.behind(delay)
	return behind > 0 && behind <= maxSkew && lastUsed.After(k.SuccessorAt) && now.Before(k.readersEnd(delay))
}

// putOff has a superseded key end when it would by OpenAI's clock.
func (k *staticKey) putOff(delay time.Duration) {
	overlap := k.DeleteAfter.Sub(k.superseded(delay))
	k.SupersededAt, k.DeleteAfter = k.SuccessorAt, k.SuccessorAt.Add(overlap)
}

// storedStaticRole adds the one value that staticRole never encodes.
type storedStaticRole struct {
	*staticRole
	Key string `json:"api_key"`
}

// getStaticRole returns nil when there is no such role.
func getStaticRole(ctx context.Context, s logical.Storage, name string) (*staticRole, error) {
	entry, err := s.Get(ctx, staticStoragePrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading static role %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil
	}
	stored := storedStaticRole{staticRole: &staticRole{}}
	if err := entry.DecodeJSON(&stored); err != nil {
		return nil, fmt.Errorf("decoding static role %q: %w", name, err)
	}
	if stored.Version > staticVersion {
		return nil, fmt.Errorf("static role %q was written by a newer version of this plugin (format %d, this one knows %d)", name, stored.Version, staticVersion)
	}
	stored.Current.Value = client.NewSecret(stored.Key)
	return stored.staticRole, nil
}

func putStaticRole(ctx context.Context, s logical.Storage, name string, r *staticRole) error {
	r.Version = staticVersion
	entry, err := logical.StorageEntryJSON(staticStoragePrefix+name, storedStaticRole{staticRole: r, Key: r.Current.Value.Reveal()})
	if err != nil {
		return err
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing static role %q: %w", name, err)
	}
	return nil
}

// fields are what a write may have, as it is used.
func (r *staticRole) fields() map[string]any {
	return map[string]any{
		"project_id":                  r.ProjectID,
		"service_account_id":          r.ServiceAccountID,
		"service_account_description": r.Description,
		"scopes":                      append([]string{}, r.Scopes...), // [] and not null without any
		"revocation_delay":            int64(r.RevocationDelay / time.Second),
		"key_ttl":                     int64(r.KeyTTL / time.Second),
		"activation_timeout":          int64(r.ActivationTimeout / time.Second),
		"activation_failure":          r.ActivationFailure.String(),
		"rotation_period":             int64(r.RotationPeriod / time.Second),
		"rotation_schedule":           r.RotationSchedule,
		"rotation_window":             int64(r.RotationWindow / time.Second),
		"disable_automated_rotation":  r.DisableAutomatedRotation,
	}
}

// mergeStaticRole applies a write to the stored role (nil when there is none)
// and checks everything that can be checked without a call.
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
			continue // as when it was created
		}
		if old != nil && value != *target {
			return nil, fmt.Sprintf("%s cannot be changed from %q: delete the static role and write it anew", field, *target)
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
	if problem := takeScopes(d, &r.Scopes); problem != "" {
		return nil, problem
	}
	if problem := r.merge(d, now); problem != "" {
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
		return nil, fmt.Sprintf("activation_timeout must be between 0 (not at all) and %s", maxActivation)
	}

	if problem := r.ActivationFailure.take(d); problem != "" {
		return nil, problem
	}

	gap := r.longestGap(now)
	byDefault := min(defaultRevocationDelay, gap)
	raw, chosen := d.GetOk("revocation_delay")
	if chosen {
		delay := time.Duration(raw.(int)) * time.Second
		// A default that was read and is written back stays one.
		r.DefaultDelay = r.DefaultDelay && old != nil && delay == old.RevocationDelay && delay == byDefault
		r.RevocationDelay = delay
	} else if r.DefaultDelay && (old == nil || !r.same(&old.schedule)) {
		r.RevocationDelay = byDefault
	}
	if r.RevocationDelay > gap {
		return nil, fmt.Sprintf("revocation_delay must be between 0 and the %s from one rotation to the next", gap)
	}
	if old != nil && chosen && (r.RevocationDelay < old.RevocationDelay || r.RevocationDelay == 0) {
		r.shorten(old.RevocationDelay)
	}
	// What a key made at any time must live through, to which a schedule adds the
	// window and none of its gaps may be too long.
	least := gap + r.RotationWindow + r.RevocationDelay + staticLead
	switch {
	case least > client.MaxExpiry:
		return nil, fmt.Sprintf("from one rotation to the end of the key that it replaces are %s, and a key can live at OpenAI for %s: rotate more often", least, client.MaxExpiry)
	case r.KeyTTL != 0 && r.KeyTTL < least:
		return nil, fmt.Sprintf("key_ttl must be %s or more: to the next rotation, with its window, through revocation_delay, and %s to spare", least, staticLead)
	case r.KeyTTL > client.MaxExpiry:
		return nil, fmt.Sprintf("key_ttl must be %s or less, which is what OpenAI allows", client.MaxExpiry)
	}
	switch {
	case old == nil: // its first rotation plans the next
	case r.RotationPeriod == old.RotationPeriod && r.RotationSchedule == old.RotationSchedule:
	case r.RotationSchedule != "":
		r.planFrom(now)
	default:
		r.planFrom(r.LastRotated)
	}
	return r, ""
}

// narrows reports whether a write only takes scopes away.
func narrows(old, r *staticRole) bool {
	if old == nil || len(r.Scopes) == 0 {
		return false
	}
	return len(old.Scopes) == 0 || !slices.ContainsFunc(r.Scopes, func(scope string) bool { return !slices.Contains(old.Scopes, scope) })
}

// sameScopes reports whether two lists allow the same, in whatever order.
func sameScopes(a, b []string) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(scope string) bool { return !slices.Contains(b, scope) })
}

// clone returns a copy that shares nothing that is ever changed.
func (r *staticRole) clone() *staticRole {
	copied := *r
	copied.Scopes, copied.Retired = slices.Clone(r.Scopes), slices.Clone(r.Retired)
	return &copied
}

// keyLife is how long a key made now is to live at OpenAI: what the role says,
// or else until three rotations in a row would have been missed and a week at
// least, so that a Vault which is down for some days costs nobody the key.
func (r *staticRole) keyLife(now time.Time) time.Duration {
	if r.KeyTTL != 0 {
		return r.KeyTTL
	}
	life := r.threeRotations(now)
	if life == 0 {
		return client.MaxExpiry
	}
	return min(max(life+r.RevocationDelay, minKeyLife), client.MaxExpiry)
}

// next is when the key is to be replaced: when the schedule says so, or sooner
// where it would otherwise end before its successor has taken over. Zero while
// rotation is paused.
func (r *staticRole) next(now time.Time) time.Time {
	if r.DisableAutomatedRotation {
		return time.Time{}
	}
	at := r.tick(now)
	if by := r.renewBy(); by.Before(at) {
		return by
	}
	return at
}

// due reports whether the key is to be replaced now.
func (r *staticRole) due(now time.Time) bool {
	next := r.next(now)
	return !next.IsZero() && !now.Before(next)
}

// inLastThird reports whether less than a third of the key's life is left.
func (r *staticRole) inLastThird(now time.Time) bool {
	return now.After(r.Current.ExpiresAt.Add(-r.Current.ExpiresAt.Sub(r.LastRotated) / 3))
}

// pausedText says what becomes of the key while rotation is paused.
func (r *staticRole) pausedText(mount, name string, now time.Time) string {
	if !r.Current.ExpiresAt.After(now) {
		return fmt.Sprintf("Rotation is paused (disable_automated_rotation), and key %s expired at OpenAI at %s. To resume, run `vault write %sstatic-roles/%s disable_automated_rotation=false`.",
			r.Current.ID, text.Time(r.Current.ExpiresAt), mount, name)
	}
	return fmt.Sprintf("Rotation is paused (disable_automated_rotation): key %s expires at OpenAI at %s, and nothing replaces it before. To resume, run `vault write %sstatic-roles/%s disable_automated_rotation=false`.",
		r.Current.ID, text.Time(r.Current.ExpiresAt), mount, name)
}

// renewBy is when the key must be replaced at the latest, for it to live on for
// revocation_delay then.
func (r *staticRole) renewBy() time.Time {
	life := r.Current.OpenAIExpiresAt.Sub(r.Current.OpenAICreatedAt)
	by := r.Current.ExpiresAt.Add(-r.RevocationDelay - staticLead)
	// This server's clock may have been ahead when the key was made and have been
	// set right since. If it is ahead for good, half a life is soon enough.
	if theirs := r.Current.OpenAIExpiresAt.Add(-r.RevocationDelay - staticLead); life > 0 && theirs.Before(by.Add(-clockSlack)) {
		if soonest := r.LastRotated.Add(life / 2); theirs.Before(soonest) {
			theirs = soonest
		}
		if theirs.Before(by) {
			by = theirs
		}
	}
	// Whatever the clocks say: no rotation follows upon another at once.
	if soonest := r.LastRotated.Add(minRotationPeriod); by.Before(soonest) {
		return soonest
	}
	return by
}

// plan is what is to be done for a role next.
type plan struct {
	rotate, deadline time.Time // from when (zero = never), and until when a reader may rely on it
	clean            time.Time // when a retired key is to be deleted, or tried again; zero = none
	owed             time.Time // since when the first of them should be gone; zero = none
	kept             int       // retired keys that are still used
}

// plan is what is to be done for the role next.
func (r *staticRole) plan(now time.Time) plan {
	p := plan{rotate: r.next(now), deadline: r.renewBy()}
	for i := range r.Retired {
		k := &r.Retired[i]
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

// correct replaces each time that lies in the past and is stored as if it were to
// come: this server's clock was ahead then, and has been set right since. What is
// planned is planned anew from it, never beyond the key's end at OpenAI. It reports
// whether it has changed the role.
func (r *staticRole) correct(now time.Time) (changed bool) {
	present := now.UTC().Truncate(time.Second)
	ahead := func(t *time.Time) bool {
		if !t.After(now.Add(clockSlack)) {
			return false
		}
		*t, changed = present, true
		return true
	}
	made := func(k *staticKey) bool {
		if !ahead(&k.CreatedAt) {
			return false
		}
		if end := k.OpenAIExpiresAt; !end.IsZero() && end.Before(k.ExpiresAt) {
			k.ExpiresAt = end
		}
		return true
	}
	ahead(&r.AccountCreatedAt)
	wrong := made(&r.Current)
	if ahead(&r.LastRotated) || wrong {
		r.planFrom(present)
		if r.Current.OpenAIExpiresAt.IsZero() { // when the key ends is not known
			r.NextRotation = present
		}
	}
	for i := range r.Retired {
		k := &r.Retired[i]
		made(k)
		ahead(&k.KeptAt)
		superseded := k.superseded(r.RevocationDelay)
		overlap := k.DeleteAfter.Sub(superseded)
		switch {
		case ahead(&superseded):
			if !k.SuccessorAt.IsZero() { // which may have been long ago
				superseded = earlier(superseded, k.SuccessorAt)
			}
			k.SupersededAt, k.DeleteAfter = superseded, superseded.Add(overlap)
		case k.behind(r.RevocationDelay) > maxSkew && !now.Add(clockSlack).Before(k.SuccessorAt) && !k.EvenIfUsed:
			// It was behind, and its readers have not had their time yet. Set right, it
			// may still be a little behind OpenAI's.
			k.putOff(r.RevocationDelay)
			changed = true
		}
	}
	return changed
}

// shorten applies a shorter revocation_delay to the keys that wait for the end of
// the former one: the operator wants them gone, whatever their use.
func (r *staticRole) shorten(former time.Duration) {
	for i := range r.Retired {
		k := &r.Retired[i]
		superseded := k.superseded(former)
		if at := superseded.Add(r.RevocationDelay); at.Before(k.DeleteAfter) {
			k.SupersededAt, k.DeleteAfter = superseded, at
		}
		k.EvenIfUsed = true
	}
}

// endNow has all superseded keys deleted at once, whatever their use.
func (r *staticRole) endNow(now time.Time) {
	for i := range r.Retired {
		k := &r.Retired[i]
		k.SupersededAt, k.EvenIfUsed = k.superseded(r.RevocationDelay), true
		if at := now.UTC().Truncate(time.Second); at.Before(k.DeleteAfter) {
			k.DeleteAfter = at
		}
	}
}

// credential is the role's account, or one of its keys, as destroy takes it. Of
// an account it names the key in force and the end of the key that lives longest.
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

// keys are all that the role names, the one in force first.
func (r *staticRole) keys() []staticKey { return append([]staticKey{r.Current}, r.Retired...) }

// names reports whether the role still needs a credential.
func (r *staticRole) names(c credential) bool {
	if !c.isKey() {
		return c.ID == r.ServiceAccountID || (c.ID == "" && c.Name == r.ServiceAccount)
	}
	return slices.ContainsFunc(r.keys(), func(k staticKey) bool {
		return c.KeyID == k.ID || (c.KeyID == "" && c.KeyName == k.Name)
	})
}

// owned is all that ends with the role: the account that was made for it, or
// the keys that were made for an adopted one.
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

// order is the making of a key for the role, or of its account with the first.
func (r *staticRole) order(name, displayName string, now time.Time) order {
	o := order{
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

// noteStaticFailure stores why a rotation that nobody waits for has failed to
// replace the key id, where it can be read. The caller holds the role's lock.
func noteStaticFailure(ctx context.Context, s logical.Storage, name, id string, failure error) error {
	// Read anew: if it was storing the new key that failed, it may be in force,
	// and then nothing has failed.
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
