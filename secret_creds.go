package openaisecrets

// This file owns a lease after its issue: what it carries, renewal and
// revocation.
//
// What must stay true: a revoke needs nothing but the lease's own data and a
// config; a renewal that fails leaves the lease as it was.

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
	"vault-plugin-secrets-openai/internal/job"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	secretType = "openai_api_key" // #nosec G101 -- a type's name
)

// decodeLease reads a lease's internal data.
func decodeLease(req *logical.Request) (leaseData, error) {
	var lease leaseData
	if req.Secret == nil {
		return lease, errors.New("the lease has no data")
	}
	if isCommunityLease(req.Secret) {
		return communityLease(req), nil
	}
	if err := decodeInto(&lease, req.Secret.InternalData); err != nil {
		return lease, fmt.Errorf("the lease's data cannot be read: %w", err)
	}
	lease.KeyExpires = lease.KeyExpires.UTC().Truncate(time.Second)
	if lease.CreatedAt.IsZero() { // as in leases of before it was kept
		lease.CreatedAt = req.Secret.IssueTime
	}
	err := lease.check()
	switch {
	case err != nil:
	case lease.ID == "":
		err = errors.New("it has no service_account_id")
	case lease.KeyID == "" && (lease.isKey() || lease.KeyExpiry == expiryTTL):
		err = errors.New("it has no api_key_id")
	case lease.MaxTTL <= 0:
		err = errors.New("it has no max_ttl")
	case lease.KeyExpires.Year() < 1 || lease.KeyExpires.Year() > 9999: // which RFC 3339 cannot say
		err = errors.New("its key_expires_at is out of range")
	}
	if err != nil {
		return lease, fmt.Errorf("the lease's data is not usable: %w", err)
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
		Renew:  refusing(b.metrics.countLeases(b.metrics.renewed, unlessCommunity(b.renew))),
		Revoke: b.metrics.countLeases(b.metrics.revoked, b.revoke),
	}
}

// refusing returns a refusal as an error: Vault prints a renewal's response as a Go
// value, and an error as its text. It is outside of what counts, for which a
// refusal is no failure.
func refusing(handler framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		resp, err := handler(ctx, req, d)
		if err == nil && resp.IsError() {
			return nil, logical.CodedError(http.StatusBadRequest, resp.Error().Error())
		}
		return resp, err
	}
}

// renew prolongs a lease. With key_expiry=ttl the key's end at OpenAI is moved
// first; otherwise it covers the longest life of the lease from the start, and
// nobody is called. The role decides as it is now, but never beyond what it was
// at the issue.
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
		b.log(req).Warn("lease not renewed: its role is gone", append([]any{"role", lease.Role}, lease.attrs()...)...)
		return logical.ErrorResponse("role %q no longer exists: its leases end, and are not renewed", lease.Role), nil
	}
	// Vault replaces the lease's data by what is returned, so all of it is.
	resp := &logical.Response{Secret: req.Secret, Data: req.Data}
	resp.Secret.TTL = r.leaseTTL(b.System().DefaultLeaseTTL())
	resp.Secret.MaxTTL = min(r.maxTTL(), lease.MaxTTL)
	log := b.log(req).With("role", lease.Role).With(lease.attrs()...)
	renewed := func() {
		log.Info("lease renewed", "ttl", resp.Secret.TTL.String(), "key_expires_at", text.Time(lease.KeyExpires))
		b.notify(eventRenew, req.MountPoint, req.Path, false, append([]string{"name", lease.Role}, lease.pairs()...)...)
	}
	if lease.KeyExpiry != expiryTTL {
		renewed()
		return resp, nil
	}

	// What Vault will make of it, by the same function that it uses. It does so
	// once the key has its new end, and must not go beyond that although the
	// mount's maximum may have been raised meanwhile: an increment would.
	if mountMax := b.System().MaxLeaseTTL(); mountMax > 0 {
		resp.Secret.MaxTTL = min(resp.Secret.MaxTTL, mountMax)
	}
	granted, _, err := framework.CalculateTTL(b.System(), req.Secret.Increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, req.Secret.IssueTime)
	if err != nil {
		return logical.ErrorResponse("lease of role %q not renewed: %s", lease.Role, err), nil
	}
	if granted > maxLease {
		granted = maxLease
		resp.Secret.MaxTTL = time.Since(req.Secret.IssueTime) + granted // an increment yields to nothing else
	}
	resp.Secret.TTL = granted
	// Of two renewals at once the longer one's end must stay, whichever Vault stores.
	theirs, unlock, err := b.renewals.lock(ctx, &lease, shownEnd(req.Data))
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Never sooner than it is: should Vault fail to store the shorter lease, the
	// longer one must still be covered. The slack is for the clocks, and for the
	// time until Vault has stored the lease.
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
	err = b.updateKey(ctx, req, &snap, lease.credential, func(snap *snapshot) (err error) {
		key, err = snap.api.UpdateProjectKey(ctx, lease.ProjectID, lease.KeyID, nil, granted+expiryMargin)
		return err
	})
	if err != nil {
		log.Warn("lease not renewed: the key's end could not be moved", "error", err)
		return failure(fmt.Sprintf("lease of role %q not renewed, it and its key end as they would have", lease.Role), err)
	}
	if key.ExpiresAt.Before(asked.Add(granted - maxSkew)) {
		return nil, fmt.Errorf("lease of role %q not renewed: OpenAI moved the key's end to %s, which does not cover it; or the clocks are more than %s apart", lease.Role, text.Time(key.ExpiresAt), maxSkew)
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

// shownEnd is when OpenAI said that a lease's key ends, by its own clock; zero if that
// is not known.
func shownEnd(data map[string]any) time.Time {
	text, _ := data["expires_at"].(string)
	end, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}
	}
	return end
}

// revoke destroys what a lease stands for. A failure is an error, after which Vault
// tries again, six times within about ten minutes and then once a day; so it
// is in the WAL, too, which tries until it is deleted.
func (b *backend) revoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, revokeBudget)
	defer cancel()
	lease, err := decodeLease(req)
	if err != nil {
		return nil, err
	}
	if lease.CreatedAt.After(b.now()) { // by a clock that was ahead
		lease.CreatedAt = b.now().UTC().Truncate(time.Second)
	}
	log := b.log(req).With("role", lease.Role).With(lease.attrs()...)
	notify := func(kind string) {
		b.notify(kind, req.MountPoint, req.Path, kind == eventRevoke, append([]string{"name", lease.Role}, lease.pairs()...)...)
	}
	// The slack covers a request's whole budget, for which the call that set the
	// key's end may have waited for its turn. With key_expiry=ttl the key may live
	// longer still, if Vault could not store a renewal: then the WAL ends it. When
	// the mount is being disabled the WAL is deleted next, so nothing is put off.
	if !lease.KeyExpires.IsZero() && b.now().After(lease.KeyExpires.Add(clockSlack)) && !b.beingDisabled(req) {
		// What is left may wait for its turn; the lease need not.
		if _, err := b.journalRevoke(ctx, req.Storage, lease.credential); err == nil {
			log.Info("credential already expired; its deletion is left to the WAL")
			notify(eventRevoke)
			return nil, nil
		}
	}
	requestID := ""
	var snap *snapshot
	destroy := func() error {
		if snap, err = b.current(ctx, req.Storage); err != nil {
			return err
		}
		return b.withCurrent(ctx, req, &snap, func(snap *snapshot) error {
			return b.destroy(ctx, snap, lease.credential, client.WithRequestID(&requestID))
		})
	}
	err = destroy()
	for pause := time.Second; (errors.Is(err, errNotFinal) || isNotFoundAtAll(err)) && b.beingDisabled(req); pause = min(2*pause, 8*time.Second) {
		// Nothing looks for it afterwards.
		if time.Until(b.drainEnd()) < pause || client.Wait(ctx, pause) != nil {
			log.Error("the mount is being disabled, and OpenAI does not find a credential that it may show again; it may be left there", "key_expires_at", text.Time(lease.KeyExpires), "error", err)
			break
		}
		err = destroy()
	}
	// The request's context may be what ended the revocation.
	cleanup, cancelCleanup := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancelCleanup()
	if err == nil {
		if walErr := b.endRevoked(cleanup, req.Storage, lease.credential); walErr != nil {
			log.Warn("WAL entry of an earlier try not deleted; its worker finds nothing to do", "error", walErr)
		}
		log.Info("credential revoked", "openai_request_id", requestID)
		notify(eventRevoke)
		return nil, nil
	}
	if !errors.Is(err, errNotFinal) {
		b.taint.fail() // before anything is awaited: the mount may be unloaded next
	}
	_, walErr := b.journalRevoke(cleanup, req.Storage, lease.credential)
	if errors.Is(err, errNotFinal) && walErr == nil {
		// Deleted, as far as OpenAI can say yet: the lease ends, and the WAL looks
		// again.
		log.Info("credential revoked; OpenAI does not find it and, since it is new, is asked again", "openai_request_id", requestID)
		notify(eventRevoke)
		return nil, nil
	}
	log.Warn("credential not revoked yet; it is left to the WAL", "error", err, "wal_error", walErr)
	notify(eventRevokeFail)
	return nil, fmt.Errorf("%s not deleted yet: %w", lease.what(), errors.Join(err, walErr))
}

// renewals keep two renewals of a lease from undoing each other: Vault may hand
// out the lease as it was before the first to both.
type renewals struct {
	locks *job.NameLocks
	ends  *lru.Cache[string, keyEnd] // where keys were last moved to, by ID
}

// keyEnd is the end of a key by this server's clock and by OpenAI's.
type keyEnd struct{ ours, theirs time.Time }

func newRenewals() renewals {
	ends, _ := lru.New[string, keyEnd](maxRenewals) // its only error is a size below 1
	return renewals{locks: job.NewNameLocks(), ends: ends}
}

// lock takes the lease's lock and brings its key's end up to date, also the one by
// OpenAI's clock, which it returns.
func (r *renewals) lock(ctx context.Context, lease *leaseData, shown time.Time) (theirs time.Time, unlock func(), err error) {
	if unlock, err = r.locks.Lock(ctx, lease.KeyID); err != nil {
		return shown, nil, fmt.Errorf("another renewal of this lease is in progress: %w", err)
	}
	if end, known := r.ends.Get(lease.KeyID); known && end.ours.After(lease.KeyExpires) {
		lease.KeyExpires, shown = end.ours, end.theirs
	}
	return shown, unlock, nil
}

func (r *renewals) moved(lease leaseData, theirs time.Time) {
	r.ends.Add(lease.KeyID, keyEnd{lease.KeyExpires, theirs})
}

// maxRenewals is for the renewals within the moment that Vault takes to store one.
const maxRenewals = 4096
