package openaisecrets

// This file owns a static role's entry and the replacement of its key.
//
// What must stay true: a new key is journalled before it is made and accepted
// by OpenAI before it is stored, together with the note that the old one is
// retired, in one write; after that write nothing returns an error. One change
// of a role at a time, under its lock; a reader takes none. What a stored role
// names is destroyed by nobody but this file.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	staticStoragePrefix = "static-role/"
	staticVersion       = 1
	staticNameTemplate  = "vault-static-{{.RoleName}}-{{.RandomSuffix}}"
	// defaultRevocationDelay lets a reader that waits for the rotation, and one
	// that reads again every five minutes, change over.
	defaultRevocationDelay = 6 * time.Minute
	// staticLead is the least time that is left for replacing a key whose end is
	// near.
	staticLead = 5 * time.Minute
	// maxRetired bounds the replaced keys that wait for their deletion, which is
	// the size of a role's entry and how much there is to delete with it.
	maxRetired = 100
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
	Adopted           bool          `json:"adopted,omitempty"`
	Description       string        `json:"service_account_description,omitempty"`
	Scopes            []string      `json:"scopes,omitempty"`
	RevocationDelay   time.Duration `json:"revocation_delay"`
	KeyTTL            time.Duration `json:"key_ttl,omitempty"`
	ActivationTimeout time.Duration `json:"activation_timeout"`
	// RotationError is why the last rotation that nobody asked for has failed;
	// empty after a success.
	RotationError string `json:"last_rotation_error,omitempty"`

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
	// DeleteAfter is set for retired ones.
	DeleteAfter time.Time `json:"delete_after,omitzero"`
}

// end is when a retired key stops to work at the latest.
func (k staticKey) end() time.Time {
	if k.ExpiresAt.Before(k.DeleteAfter) {
		return k.ExpiresAt
	}
	return k.DeleteAfter
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
// where it would otherwise end before its successor has taken over.
func (r *staticRole) next(now time.Time) time.Time {
	at := r.tick(now)
	if by := r.renewBy(); by.Before(at) {
		return by
	}
	return at
}

// renewBy is when the key must be replaced at the latest, for it to live on for
// revocation_delay then.
func (r *staticRole) renewBy() time.Time {
	by := r.Current.ExpiresAt.Add(-r.RevocationDelay - staticLead)
	// Whatever the clocks say: no rotation follows upon another at once.
	if soonest := r.LastRotated.Add(minRotationPeriod); by.Before(soonest) {
		return soonest
	}
	return by
}

// plan is what is to be done for the role next.
func (r *staticRole) plan(now time.Time) plan {
	p := plan{rotate: r.next(now), deadline: r.renewBy()}
	for _, k := range r.Retired {
		if p.clean.IsZero() || k.DeleteAfter.Before(p.clean) {
			p.clean = k.DeleteAfter
		}
	}
	p.owed = p.clean
	return p
}

// credential is the role's account, or one of its keys, as destroy takes it.
func (r *staticRole) credential(name string, k *staticKey) credential {
	c := credential{Version: credentialVersion, Type: typeAccount, ProjectID: r.ProjectID, ID: r.ServiceAccountID, Name: r.ServiceAccount, StaticRole: name}
	if k != nil {
		c.Type, c.KeyID, c.KeyName = typeKey, k.ID, k.Name
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

// lockStatic takes a role's lock; the context bounds the wait. Whoever holds it
// is bounded in time, too.
func (b *backend) lockStatic(ctx context.Context, name string) (unlock func(), err error) {
	if unlock, err = b.static.locks.lock(ctx, name); err != nil {
		return nil, fmt.Errorf("another change of static role %q is under way: %w", name, err)
	}
	return unlock, nil
}

// nameLocks is a lock for each name. Names do not share any: a rotation that
// waits for its key to work keeps nobody from another role.
type nameLocks struct {
	mu   sync.Mutex
	held map[string]*nameLock
}

type nameLock struct {
	slot  chan struct{} // one slot, whose wait honours a context
	users int           // who holds it or waits for it; guarded by nameLocks.mu
}

func (l *nameLocks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	n := l.held[name]
	if n == nil {
		n = &nameLock{slot: make(chan struct{}, 1)}
		l.held[name] = n
	}
	n.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
	select {
	case n.slot <- struct{}{}:
		return func() { <-n.slot; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// order is the making of a key for the role, or of its account with the first.
func (r *staticRole) order(name, displayName string, now time.Time) order {
	o := order{
		label:      fmt.Sprintf("static role %q", name),
		credential: credential{Type: typeAccount, ProjectID: r.ProjectID, StaticRole: name},
		template:   staticNameTemplate,
		data:       nameData{RoleName: name, DisplayName: displayName, ProjectID: r.ProjectID, UnixTime: now.Unix()},
		scopes:     r.Scopes, expiry: r.keyLife(now), activation: r.ActivationTimeout,
	}
	o.covers = o.expiry - expiryMargin
	if r.ServiceAccountID != "" {
		o.Type, o.ID, o.Name = typeKey, r.ServiceAccountID, r.ServiceAccount
	}
	return o
}

// rotateStatic gives the role a new key, and with the first one its account if
// it has none, and stores it. The caller holds the role's lock, has just read r
// from storage or is creating it, and finishes whether or not its client waits.
// An error means that storage holds what it did, unless it is errWhichStaticKey.
func (b *backend) rotateStatic(ctx context.Context, req *logical.Request, name string, r *staticRole) (next *staticRole, warnings []string, err error) {
	b.issuing.Add(1) // the drain waits for it
	defer b.issuing.Add(-1)
	defer func() {
		b.metrics.staticRotated(name, err)
		if err != nil {
			b.notify(eventStaticRotateFail, req.MountPoint, "static-creds/"+name, false, "name", name)
		}
	}()
	if len(r.Retired) >= maxRetired {
		return nil, nil, mistake(fmt.Sprintf("%d replaced keys wait for the end of revocation_delay or could not be deleted; the next rotation waits for them", len(r.Retired)))
	}
	m, err := b.obtain(ctx, req, r.order(name, req.DisplayName, b.now()))
	if client.IsNotFound(err) && r.ServiceAccountID != "" {
		err = fmt.Errorf("service account %s is not there any more; delete the static role and write it anew: %w", r.ServiceAccountID, err)
	}
	if err != nil {
		return nil, nil, err
	}
	defer b.work.wal.release(m.walID)
	now := b.now()
	next = r.clone()
	if r.Current.ID != "" {
		old := r.Current
		old.Value, old.DeleteAfter = client.Secret{}, now.Add(r.RevocationDelay).UTC().Truncate(time.Second)
		next.Retired = append(next.Retired, old)
	}
	next.ServiceAccountID, next.ServiceAccount = m.ID, m.Name
	next.Current = staticKey{ID: m.KeyID, Name: m.KeyName, Value: m.key.Value, ExpiresAt: m.KeyExpires}
	next.LastRotated, next.RotationError = now.UTC().Truncate(time.Second), ""
	next.planFrom(now)
	if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
		// Which of the two storage holds is not known now. All that may be named
		// there lives; the journal destroys what was made if it is not.
		b.static.forget()
		return nil, nil, fmt.Errorf("%w: %w", errWhichStaticKey, err)
	}
	if err := framework.DeleteWAL(ctx, req.Storage, m.walID); err != nil {
		b.log(req).Warn("journal entry of a rotation not deleted; the worker will find the key in use", "static_role", name, "error", err)
	}
	b.notify(eventStaticRotate, req.MountPoint, "static-creds/"+name, true, append([]string{"name", name}, m.pairs()...)...)
	b.log(req).Info("static role rotated", append([]any{"static_role", name, "retired_api_key_id", r.Current.ID, "openai_request_id", m.requestID,
		"next_rotation", timeText(next.NextRotation), "expires_at", timeText(next.Current.ExpiresAt)}, m.attrs()...)...)
	if next.RevocationDelay == 0 {
		if next, _ = b.endRetiredKeys(ctx, req, name, next); len(next.Retired) > 0 {
			warnings = append(warnings, "The old key could not be deleted yet; the engine tries again every minute.")
		}
	}
	b.static.succeeded(name)
	b.static.set(name, next.plan(b.now()))
	return next, warnings, nil
}

var errWhichStaticKey = errors.New("storage failed while the new key was put in force; it is in force, or all is as it was and the journal deletes it")

// endRetiredKeys deletes the retired keys that are due and stores the rest. The
// caller holds the role's lock. Failures are logged, the last is returned, and
// they are tried again.
func (b *backend) endRetiredKeys(ctx context.Context, req *logical.Request, name string, r *staticRole) (next *staticRole, last error) {
	now := b.now()
	next = r.clone()
	next.Retired = slices.DeleteFunc(next.Retired, func(k staticKey) bool {
		if now.Before(k.DeleteAfter) {
			return false
		}
		c := r.credential(name, &k)
		log := b.log(req).With("static_role", name).With(c.attrs()...)
		snap, err := b.current(ctx, req.Storage)
		if err == nil {
			err = b.destroy(ctx, snap, c)
		}
		b.metrics.staticKeyRevoked(name, err)
		if err != nil {
			log.Warn("retired key not deleted", "error", err)
			last = err
			return false
		}
		log.Info("retired key deleted")
		return true
	})
	if len(next.Retired) == len(r.Retired) {
		return r, last
	}
	if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
		// The keys are deleted; deleting them again finds them gone.
		b.log(req).Warn("static role not stored after deleting retired keys", "static_role", name, "error", err)
		return r, err
	}
	return next, last
}

// staticHolds reports whether the static role that a credential was made for
// or taken from still names it.
func (b *backend) staticHolds(ctx context.Context, s logical.Storage, c credential) (bool, error) {
	if c.StaticRole == "" {
		return false, nil
	}
	// Behind a request that is storing it.
	unlock, err := b.lockStatic(ctx, c.StaticRole)
	if err != nil {
		return false, err
	}
	defer unlock()
	r, err := getStaticRole(ctx, s, c.StaticRole)
	if err != nil || r == nil {
		return false, err
	}
	return r.names(c), nil
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
