package simulation

// This file owns the model's lease manager: how a lease is stored, renewed, expired and
// revoked (vault/expiration.go).

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// lease is an entry of the lease store.
type lease struct {
	id, role      string
	path          string
	secret        *logical.Secret
	data, issued  map[string]any
	issue, expire time.Time // by this Vault's clock
	asked, began  time.Time // by the world's: before and after the request
	renewable     bool
	token         *token
	attempts      int           // to revoke it, in this term
	lock          chan struct{} // one slot, as Vault has a lock for each lease
	revoking      bool          // its end was asked for, or its time is over
	irrevocable   bool
	timer         *time.Timer
}

// token is a client's, of which leases are.
type token struct {
	batch bool
	ends  time.Time
}

// token makes a token. Leases end with it: those of a batch token have no longer time,
// those of others are revoked (expiration.go, RevokeByToken).
func (v *vault) token(batch bool, ttl time.Duration) *token {
	made := &token{batch: batch, ends: v.now().Add(ttl)}
	if !batch {
		time.AfterFunc(ttl, func() { v.revokeWhere(func(l *lease) bool { return l.token == made }) })
	}
	return made
}

// account, keyID and key are what the lease was issued with; renewals replace data.
func (l *lease) account() string { id, _ := l.issued["service_account_id"].(string); return id }
func (l *lease) keyID() string   { id, _ := l.issued["api_key_id"].(string); return id }
func (l *lease) key() string     { key, _ := l.issued["api_key"].(string); return key }

// endOf is when the lease ends by this Vault's clock.
func (v *vault) endOf(l *lease) time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return l.expire
}

// issue reads credentials of a role, and stores the lease.
func (v *vault) issue(ctx context.Context, role string) (*lease, *logical.Response, error) {
	return v.issueBy(ctx, nil, role, nil)
}

// issueBy issues to a token, with which the lease ends.
func (v *vault) issueBy(ctx context.Context, by *token, role string, data map[string]any) (*lease, *logical.Response, error) {
	path := "creds/" + role
	v.mu.Lock()
	t := v.term
	v.mu.Unlock()
	asked, maxAge := time.Now(), v.maxAge(role)
	resp, err := v.request(ctx, logical.ReadOperation, path, data)
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if err != nil {
		return nil, resp, err
	}
	if ctx.Err() != nil {
		return nil, resp, ctx.Err() // the client has gone: the answer is dropped, and nothing is revoked
	}
	if resp == nil || resp.Secret == nil {
		return nil, resp, errors.New("no secret")
	}
	now := v.now()
	l := &lease{role: role, path: path, token: by, lock: make(chan struct{}, 1), issue: now, asked: asked, began: time.Now(), renewable: resp.Secret.Renewable, data: throughJSON(resp.Data)}
	l.issued = l.data
	l.secret = stored(resp.Secret)
	l.secret.IssueTime = v.real(now)
	ttl, _, err := framework.CalculateTTL(v.system(), 0, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, v.real(now))
	if err != nil {
		return nil, resp, err
	}
	l.expire = l.until(now.Add(ttl))
	if v.w.Trouble && v.roll(100) == 0 { // in the gap, of which nobody knows
		v.w.act(func() { v.restart(true, time.Minute) })
	}
	time.Sleep(time.Duration(1+v.roll(40)) * time.Millisecond)
	v.mu.Lock()
	alive := v.term == t && t != nil && t.ctx.Err() == nil
	l.id = fmt.Sprintf("%screds/%s/%d", v.path, role, v.dice.Int64())
	fails, kept := v.w.Trouble && v.dice.IntN(60) == 0, v.dice.IntN(3) == 0
	if alive && (!fails || kept) {
		v.leases[l.id] = l
		v.schedule(t, l)
	}
	v.mu.Unlock()
	if !alive {
		v.w.tell(v.name, "dies before it has stored the lease of %s %s", l.account(), l.keyID())
		return nil, resp, errSealed
	}
	// Vault revokes at once, once, and forgets (expiration.go, Register). If its storage
	// has failed after the effect, and again as it deletes the entry, the lease is there
	// again after a restart.
	if fails {
		v.w.tell(v.name, "cannot store the lease of %s %s, and revokes", l.account(), l.keyID())
		v.note(l)
		calm := v.w.openai.weather.storesWell()
		err := v.revokeCall(t.ctx, l)
		v.w.tell(v.name, "has revoked %s %s: %v", l.account(), l.keyID(), err)
		if calm && !errors.Is(err, errDied) && !errors.Is(err, errSealed) && !errors.Is(err, errNoMount) { // the plugin knows
			v.w.ledger.excuse(false, l.account(), l.keyID())
		}
		return nil, resp, errStorage
	}
	v.w.tell(v.name, "leases %s %s of role %s until %s", l.account(), l.keyID(), role, v.endOf(l).UTC().Format(time.DateTime))
	v.w.ledger.leased(l)
	v.w.money.doom(v, l)
	if v == v.w.vault {
		v.w.checkScopes(role, l.keyID(), l.began)
		v.w.checkAge(l, maxAge)
	}
	v.w.ledger.excuse(false, l.account(), l.keyID())
	return l, resp, nil
}

// system is what a Community Vault says of itself and of the mount.
func (v *vault) system() *systemView {
	return &systemView{v: v, StaticSystemView: logical.StaticSystemView{
		DefaultLeaseTTLVal:  768 * time.Hour,
		ReplicationStateVal: consts.ReplicationPerformanceDisabled | consts.ReplicationDRDisabled,
		PluginEnvironment:   &logical.PluginEnvironment{VaultVersion: "1.21.2"},
	}}
}

// schedule has a lease end at its time. The caller holds mu.
func (v *vault) schedule(t *term, l *lease) {
	wait := l.expire.Sub(time.Now().Add(v.offset))
	if l.irrevocable {
		wait = irrevocableTry
	}
	v.expireIn(t, l, wait)
}

func (v *vault) expireIn(t *term, l *lease, wait time.Duration) {
	if l.timer != nil {
		l.timer.Stop()
	}
	l.timer = time.AfterFunc(max(wait, 0), func() { v.expire(t, l) })
}

// until is when a lease ends that would end at t: with its batch token at the latest
// (expiration.go, Register and Renew).
func (l *lease) until(t time.Time) time.Time {
	if l.token != nil && l.token.batch && t.After(l.token.ends) {
		return l.token.ends
	}
	return t
}

// expire revokes a lease whose time is over: six tries in a term, and one a day after
// that; or after one, if the plugin says that others are of no use.
func (v *vault) expire(t *term, l *lease) {
	v.w.checkEnd(v, l)
	select {
	case t.slots <- struct{}{}:
	case <-t.ctx.Done():
		return
	}
	ctx, cancel := context.WithTimeout(t.ctx, revokeTimeout)
	err := v.revokeLease(ctx, l)
	cancel()
	<-t.slots
	if err == nil || t.ctx.Err() != nil {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.term != t || v.leases[l.id] != l || v.sealing.Load() { // a seal drops pending leases
		return
	}
	l.attempts++
	if l.attempts < revokeAttempts && !l.irrevocable && !unrecoverable(err) {
		backoff := float64(revokeBackoff << l.attempts)
		v.expireIn(t, l, time.Duration(backoff*(0.5+v.dice.Float64())))
		return
	}
	l.irrevocable = true
	v.schedule(t, l)
	v.w.tell(v.name, "lease %s of %s %s is irrevocable: %v", l.id, l.account(), l.keyID(), err)
}

// unrecoverable reports whether Vault gives up at once (expiration.go,
// errIsUnrecoverable). Over the plugin protocol only the errors themselves arrive as
// what they are, not what wraps them (sdk/plugin/pb/translation.go).
func unrecoverable(err error) bool {
	return err == logical.ErrUnrecoverable || err == logical.ErrUnsupportedOperation || //nolint:errorlint // see above
		err == logical.ErrUnsupportedPath || err == logical.ErrInvalidRequest //nolint:errorlint // see above
}

// revokeLease revokes a lease once, and forgets it if that succeeds.
func (v *vault) revokeLease(ctx context.Context, l *lease) error {
	select { // one at a time: expiration.go, revokeCommon
	case l.lock <- struct{}{}:
		defer func() { <-l.lock }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if v.lookup(l.id) != l {
		return nil
	}
	v.note(l)
	if err := v.revokeCall(ctx, l); err != nil {
		return err
	}
	v.forget(l)
	return nil
}

// drop forgets a lease although nobody has ended its key.
func (v *vault) drop(l *lease) {
	v.w.tell(v.name, "forgets lease %s of %s %s by force", l.id, l.account(), l.keyID())
	v.w.ledger.excuse(true, l.account(), l.keyID())
	v.forget(l)
}

// forget deletes a lease from the lease store.
func (v *vault) forget(l *lease) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases[l.id] == l {
		delete(v.leases, l.id)
	}
	if l.timer != nil {
		l.timer.Stop()
	}
}

// note says that a lease's end was asked for.
func (v *vault) note(l *lease) {
	v.mu.Lock()
	defer v.mu.Unlock()
	l.revoking = true
	v.ended[l.account()], v.ended[l.keyID()] = true, true
}

func (v *vault) revokeCall(ctx context.Context, l *lease) error {
	t, p, err := v.serving()
	if err != nil {
		return err
	}
	v.mu.Lock()
	secret, data := l.secret, l.data // which are replaced, and not changed
	v.mu.Unlock()
	resp, err := v.call(ctx, t, p, &logical.Request{Operation: logical.RevokeOperation, Path: l.path, Secret: stored(secret), Data: throughJSON(data)})
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	return err
}

// lookup is the lease of an ID that still stands; nil for none.
func (v *vault) lookup(id string) *lease {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.leases[id]
}

// revoke ends a lease as `vault lease revoke` does: in the background, and at once also
// if an attempt has failed; but one that is irrevocable stays so (expiration.go,
// lazyRevokeInternal and updatePending).
func (v *vault) revoke(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l := v.leases[id]; l != nil && v.term != nil && v.mounted && !l.irrevocable {
		l.expire = time.Now().Add(v.offset)
		v.schedule(v.term, l)
	}
}

// revokeNow is `vault lease revoke -sync`: one attempt in the client's request.
func (v *vault) revokeNow(id string) error {
	if l := v.lookup(id); l != nil {
		return v.revokeLease(context.Background(), l)
	}
	return nil
}

// revokeWhere ends leases in the background.
func (v *vault) revokeWhere(which func(*lease) bool) {
	for _, id := range v.leaseIDs() {
		if l := v.lookup(id); l != nil && which(l) {
			v.revoke(id)
		}
	}
}

// revokePrefix revokes all leases, one after the other until one fails, or by force.
func (v *vault) revokePrefix(ctx context.Context, force bool) error {
	return v.revokeRole(ctx, "", force)
}

// revokeRole does so with the leases of a role, or of all. Folders come in the reverse
// order (sdk/logical/storage.go, ScanView).
func (v *vault) revokeRole(ctx context.Context, role string, force bool) error {
	v.mu.Lock()
	var all []*lease
	for _, l := range v.leases {
		if role == "" || l.role == role {
			all = append(all, l)
		}
	}
	v.mu.Unlock()
	slices.SortFunc(all, func(a, b *lease) int { return cmp.Or(cmp.Compare(b.role, a.role), cmp.Compare(a.id, b.id)) })
	for _, l := range all {
		err := v.revokeLease(ctx, l)
		if err != nil && !force {
			return fmt.Errorf("failed to revoke %q: %w", l.id, err)
		}
		if err != nil { // forgotten all the same
			v.drop(l)
		}
	}
	return nil
}

// renew renews a lease for increment.
func (v *vault) renew(ctx context.Context, id string, increment time.Duration) error {
	l := v.lookup(id)
	if l == nil {
		return errors.New("lease not found")
	}
	select { // expiration.go, Renew
	case l.lock <- struct{}{}:
		defer func() { <-l.lock }()
	case <-ctx.Done():
		return ctx.Err()
	}
	v.mu.Lock()
	// A revocation that has failed in a client's request leaves the lease as it was.
	if v.leases[id] != l || l.irrevocable || v.tainted.Load() || !time.Now().Add(v.offset).Before(l.expire) {
		v.mu.Unlock()
		return errors.New("lease not found or not renewable")
	}
	secret, data := stored(l.secret), l.data
	v.mu.Unlock()
	t, p, err := v.serving()
	if err != nil {
		return err
	}
	secret.Increment, secret.IssueTime = increment, v.real(l.issue)
	ctx, cancel := t.under(ctx)
	defer cancel()
	resp, err := v.call(ctx, t, p, &logical.Request{Operation: logical.RenewOperation, Path: l.path, Secret: secret, Data: throughJSON(data)})
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if err != nil {
		return err
	}
	if resp == nil || resp.Secret == nil {
		return nil
	}
	ttl, _, err := framework.CalculateTTL(v.system(), increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, v.real(l.issue))
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases[id] != l || v.term != t {
		return errors.New("lease not found")
	}
	l.secret, l.data = stored(resp.Secret), throughJSON(resp.Data)
	l.expire = l.until(time.Now().Add(v.offset).Add(ttl))
	v.schedule(t, l)
	return nil
}
