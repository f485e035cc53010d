package openaisecrets

// This file owns a lease after its credential is issued: its renewal and revocation.
// credential.go has its data.
//
// What must stay true: a revocation needs only the lease's own data and a config; a
// failed renewal does not change the lease.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/job"
	"vault-plugin-secrets-openai/internal/metrics"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	secretType = "openai_api_key" // #nosec G101 -- a type name
)

// decodeLease reads a lease's internal data.
func decodeLease(req *logical.Request) (leaseData, error) {
	var lease leaseData
	if req.Secret == nil {
		return lease, errors.New("lease has no data")
	}
	if isCommunityLease(req.Secret) {
		return communityLease(req), nil
	}
	if err := decodeInto(&lease, req.Secret.InternalData); err != nil {
		return lease, fmt.Errorf("decoding lease data: %w", err)
	}
	lease.KeyExpires = lease.KeyExpires.UTC().Truncate(time.Second)
	if lease.CreatedAt.IsZero() {
		lease.CreatedAt = req.Secret.IssueTime
	}
	err := lease.check()
	switch {
	case err != nil:
	case lease.ID == "":
		err = errors.New("service_account_id is missing")
	case lease.KeyID == "" && (lease.isKey() || lease.KeyExpiry == expiryTTL):
		err = errors.New("api_key_id is missing")
	case lease.MaxTTL <= 0:
		err = errors.New("max_ttl is missing")
	case lease.KeyExpires.Year() < 1 || lease.KeyExpires.Year() > 9999: // outside the range of RFC 3339
		err = errors.New("key_expires_at is out of range")
	}
	if err != nil {
		return lease, fmt.Errorf("invalid lease data: %w", err)
	}
	return lease, nil
}

func (b *backend) secretCreds() *framework.Secret {
	return &framework.Secret{
		Type: secretType,
		Fields: map[string]*framework.FieldSchema{
			"api_key":    {Type: framework.TypeString, Description: "The API key."},
			"api_key_id": {Type: framework.TypeString, Description: "ID of the key."},
		},
		Renew:  refusing(b.countLeases(b.metrics.Renewed, unlessCommunity(b.renew))),
		Revoke: b.countLeases(b.metrics.Revoked, b.revoke),
	}
}

// refusing converts an error response to an error: for a renewal Vault prints a response
// as a Go value, and an error as its text. It wraps countLeases, which does not count an
// error response as a failure of the engine.
func refusing(handler framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		resp, err := handler(ctx, req, d)
		if err == nil && resp.IsError() {
			return nil, logical.CodedError(http.StatusBadRequest, resp.Error().Error())
		}
		return resp, err
	}
}

// renew extends a lease. With key_expiry=ttl it first moves the key's expiry at OpenAI;
// otherwise the key outlives the lease's max_ttl already, and no call is needed. The
// current role applies, limited by the max_ttl with which the lease was issued.
func (b *backend) renew(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	lease, err := decodeLease(req)
	if err != nil {
		return nil, err
	}
	r, err := b.roles.get(ctx, req.Storage, lease.Role)
	if err != nil {
		return nil, err
	}
	if r == nil {
		b.log(req).Warn("lease not renewed: role not found", append([]any{"role", lease.Role}, lease.attrs()...)...)
		return logical.ErrorResponse("lease not renewed: role %q not found; request a new credential", lease.Role), nil
	}
	restored := b.restoreUsage(lease)
	if err := b.renewable(ctx, req, lease.Role, r); err != nil {
		if restored { // the switch may not have known the key
			if failure := b.states.reconsider(ctx, req.Storage, lease.Role); failure != nil {
				err = failure
			}
		}
		return errorResponse(fmt.Sprintf("lease of role %q not renewed", lease.Role), err)
	}
	// Vault replaces the lease's data with the response, so it must be complete.
	resp := &logical.Response{Secret: req.Secret, Data: req.Data}
	resp.Secret.TTL = r.leaseTTL(b.System().DefaultLeaseTTL())
	resp.Secret.MaxTTL = min(r.maxTTL(), lease.MaxTTL)
	log := b.log(req).With("role", lease.Role).With(lease.attrs()...)
	renewed := func() {
		log.Info("lease renewed", "ttl", resp.Secret.TTL.String(), "key_expires_at", text.Time(lease.KeyExpires))
		b.events.Emit(events.CredsRenew, req.MountPoint, req.Path, false, append([]string{"name", lease.Role}, lease.pairs()...)...)
	}
	if lease.KeyExpiry != expiryTTL {
		renewed()
		return resp, nil
	}

	// Vault applies the same function to the response, after the key has its new expiry.
	// The response sets MaxTTL so that an increment cannot exceed that expiry, even if
	// the mount's maximum was raised in the meantime.
	if mountMax := b.System().MaxLeaseTTL(); mountMax > 0 {
		resp.Secret.MaxTTL = min(resp.Secret.MaxTTL, mountMax)
	}
	granted, _, err := framework.CalculateTTL(b.System(), req.Secret.Increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, req.Secret.IssueTime)
	if err != nil {
		return logical.ErrorResponse("lease of role %q not renewed: %s", lease.Role, err), nil
	}
	if granted > maxLease {
		granted = maxLease
		resp.Secret.MaxTTL = time.Since(req.Secret.IssueTime) + granted // only MaxTTL limits an increment
	}
	resp.Secret.TTL = granted
	// Of two concurrent renewals the later expiry must stay, whichever Vault stores.
	theirs, unlock, err := b.renewals.lock(ctx, &lease, shownEnd(req.Data))
	if err != nil {
		return nil, err
	}
	defer unlock()
	// The expiry never moves to an earlier time: if Vault fails to store the shorter
	// lease, the key must still cover the longer one. The slack is for the clocks, and
	// for the time until Vault has stored the lease.
	asked := b.now()
	snap, err := b.current(ctx, req.Storage)
	if lease.covers(granted, asked) && (err != nil || snap.api.Outlives(theirs, granted)) {
		resp.Secret.InternalData["key_expires_at"] = text.Time(lease.KeyExpires)
		renewed()
		return resp, nil
	}
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	var key client.ProjectKey
	update := func(life time.Duration) error {
		return b.updateKey(ctx, req, &snap, lease.credential, func(snap *snapshot) (err error) {
			key, err = snap.api.UpdateProjectKey(ctx, lease.ProjectID, lease.KeyID, nil, life)
			return err
		})
	}
	err = update(granted + expiryMargin)
	if end := key.ExpiresAt; err == nil && !end.IsZero() && end.Before(theirs) {
		// This server's clock is ahead, so the key seemed to end sooner than it did.
		if err = update(granted + expiryMargin + theirs.Sub(end)); err != nil {
			b.renewals.cut(lease.KeyID)
			log.Warn("lease not renewed: the key's expiry was moved to an earlier time and could not be restored; the next renewal restores it", "key_expires_at", text.Time(end), "error", err)
			return errorResponse(fmt.Sprintf("lease of role %q not renewed, and its key now expires at %s, before the lease; renew it again", lease.Role, text.Time(end)), err)
		}
	}
	if err != nil {
		log.Warn("lease not renewed: the key's expiry could not be extended", "error", err)
		return errorResponse(fmt.Sprintf("lease of role %q not renewed; it and its key keep their expiry", lease.Role), err)
	}
	if key.ExpiresAt.Before(asked.Add(granted - maxSkew)) {
		return nil, fmt.Errorf("lease of role %q not renewed: OpenAI set the key to expire at %s, before the lease would; if the clock of this Vault node is off by more than %s, correct it", lease.Role, text.Time(key.ExpiresAt), maxSkew)
	}
	lease.KeyExpires = asked.Add(granted + expiryMargin).UTC().Truncate(time.Second)
	b.renewals.moved(lease, key.ExpiresAt)
	for name, value := range lease.internal() {
		resp.Secret.InternalData[name] = value
	}
	renewed()
	if _, shown := resp.Data["expires_at"]; shown {
		resp.Data["expires_at"] = text.Time(key.ExpiresAt)
	}
	return resp, nil
}

// renewable returns why a lease of a role must not be renewed, nil if it may.
func (b *backend) renewable(ctx context.Context, req *logical.Request, name string, r *role) error {
	if r.SpendLimit == 0 {
		return nil
	}
	snap, err := b.current(ctx, req.Storage)
	if err != nil && !errors.Is(err, errNotConfigured) {
		return err
	}
	return b.blocked(ctx, req.Storage, snap, name, r.spendRule)
}

// shownEnd is the expiry of a lease's key by OpenAI's clock, zero if unknown.
func shownEnd(data map[string]any) time.Time {
	text, _ := data["expires_at"].(string)
	end, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}
	}
	return end
}

// revoke destroys the credential of a lease. After an error Vault retries six times
// within about ten minutes and then once a day, so the credential is also queued in the
// WAL, which retries until it is deleted.
func (b *backend) revoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, revokeBudget)
	defer cancel()
	lease, err := decodeLease(req)
	if err != nil {
		return nil, err
	}
	if lease.CreatedAt.After(b.now()) { // stored while the clock was ahead
		lease.CreatedAt = b.now().UTC().Truncate(time.Second)
	}
	b.restoreUsage(lease)
	log := b.log(req).With("role", lease.Role).With(lease.attrs()...)
	notify := func(kind string) {
		b.events.Emit(kind, req.MountPoint, req.Path, kind == events.CredsRevoke, append([]string{"name", lease.Role}, lease.pairs()...)...)
	}
	// The slack covers a request's whole budget, since the call that set the key's
	// expiry may have waited that long for a permit. With key_expiry=ttl the key may
	// remain valid longer, if Vault could not store a renewal: then the WAL deletes it.
	// While the mount is being disabled, nothing is deferred to the WAL.
	if !lease.KeyExpires.IsZero() && b.now().After(lease.KeyExpires.Add(clockSlack)) && !b.beingDisabled(req) {
		// The lease does not wait for the cleanup of its account.
		if _, err := b.recordRevocation(ctx, req.Storage, lease.credential); err == nil {
			log.Info("credential already expired; queued for deletion in the WAL")
			notify(events.CredsRevoke)
			return nil, nil
		}
	}
	requestID := ""
	var snap *snapshot
	destroy := func() error {
		if snap, err = b.current(ctx, req.Storage); err != nil {
			return err
		}
		return b.retryWithCurrentKey(ctx, req, &snap, func(snap *snapshot) error {
			return b.destroy(ctx, snap, lease.credential, client.WithRequestID(&requestID))
		})
	}
	err = destroy()
	for pause := time.Second; (errors.Is(err, errNotFinal) || isNotFoundAtAll(err)) && b.beingDisabled(req); pause = min(2*pause, 8*time.Second) {
		// Nothing can look for it later.
		if time.Until(b.drainEnd()) < pause || client.Wait(ctx, pause) != nil {
			log.Error("mount is being disabled but a credential that OpenAI does not find may still exist", "key_expires_at", text.Time(lease.KeyExpires), "error", err)
			break
		}
		err = destroy()
	}
	// The revocation may have failed because the request's context ended.
	cleanup, cancelCleanup := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancelCleanup()
	if err == nil {
		if walErr := b.deleteRevoked(cleanup, req.Storage, lease.credential); walErr != nil {
			log.Warn("WAL entry of a deleted credential not deleted; the WAL worker deletes it later", "error", walErr)
		}
		log.Info("credential revoked", "openai_request_id", requestID)
		notify(events.CredsRevoke)
		return nil, nil
	}
	if !errors.Is(err, errNotFinal) {
		b.unmount.fail() // before any wait: the mount may be unloaded next
	}
	// Vault revokes what it cannot store as a lease only once, and its storage has just
	// failed.
	walErr := tryAgain(cleanup, func() error {
		_, err := b.recordRevocation(cleanup, req.Storage, lease.credential)
		return err
	})
	if errors.Is(err, errNotFinal) && walErr == nil {
		// Deleted as far as OpenAI can tell: the revocation succeeds, and the WAL checks
		// again later.
		log.Info("credential revoked; OpenAI does not find it, and the WAL checks again because it is new", "openai_request_id", requestID)
		notify(events.CredsRevoke)
		return nil, nil
	}
	if walErr != nil {
		log.Warn("credential not revoked, and its WAL entry not stored", "error", err, "wal_error", walErr)
	} else {
		log.Warn("credential not revoked; queued for deletion in the WAL", "error", err)
	}
	notify(events.CredsRevokeFail)
	return nil, fmt.Errorf("%s not deleted yet: %w", lease.describe(), errors.Join(err, walErr))
}

// renewals prevents concurrent renewals of a lease from undoing each other: Vault may
// pass the same lease data to both.
type renewals struct {
	locks *job.NameLocks
	ends  *lru.Cache[string, keyEnd] // the last known expiry, by key ID
}

// keyEnd is the expiry of a key by this server's clock and by OpenAI's.
type keyEnd struct{ ours, theirs time.Time }

func newRenewals() renewals {
	ends, _ := lru.New[string, keyEnd](maxRenewals) // its only error is a size below 1
	return renewals{locks: job.NewNameLocks(), ends: ends}
}

// lock takes the lease's lock and updates its key's expiry. It returns the expiry by
// OpenAI's clock.
func (r *renewals) lock(ctx context.Context, lease *leaseData, shown time.Time) (theirs time.Time, unlock func(), err error) {
	if unlock, err = r.locks.Lock(ctx, lease.KeyID); err != nil {
		return shown, nil, fmt.Errorf("another renewal of this lease is in progress: %w", err)
	}
	if end, known := r.ends.Get(lease.KeyID); known && (end.ours.IsZero() || end.ours.After(lease.KeyExpires)) {
		lease.KeyExpires, shown = end.ours, end.theirs
	}
	return shown, unlock, nil
}

func (r *renewals) moved(lease leaseData, theirs time.Time) {
	r.ends.Add(lease.KeyID, keyEnd{lease.KeyExpires, theirs})
}

// cut records that a key expires sooner than is known, so that the next renewal moves its
// expiry.
func (r *renewals) cut(keyID string) { r.ends.Add(keyID, keyEnd{}) }

// maxRenewals covers the renewals in the time that Vault takes to store one.
const maxRenewals = 4096

// countLeases counts a handler's renewals or revocations.
func (b *backend) countLeases(d *metrics.Metric, handler framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
		role := ""
		if req.Secret != nil { // read before the handler, which may replace it
			role, _ = req.Secret.InternalData["role"].(string)
		}
		resp, err := handler(ctx, req, data)
		b.metrics.Lease(d, role, outcomeFor(ctx, resp, err))
		return resp, err
	}
}
