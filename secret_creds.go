package openaisecrets

// This file owns a credential after its issue: what a lease carries, renewal
// and revocation.
//
// What must stay true: revoke, journal and drain share destroy; a revoke needs
// nothing but the lease's own data and a config; gone is success, a missing
// permission never is.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	secretType     = "openai_api_key" // #nosec G101 -- a type's name
	accountVersion = 1
	// clockSlack is how far Vault's clock may be ahead of OpenAI's.
	clockSlack = time.Minute
)

// account is all that destroying a service account takes. It is the journal's
// entry and part of each lease.
type account struct {
	Version   int    `json:"version"`
	ProjectID string `json:"project_id"`
	Name      string `json:"service_account"`
	// ID is empty where the answer to the create is not known.
	ID string `json:"service_account_id,omitempty"`
}

// check says what is missing for destroying the account.
func (a account) check() error {
	switch {
	case a.Version > accountVersion:
		return fmt.Errorf("it was written by a newer version of this plugin (format %d, this one knows %d)", a.Version, accountVersion)
	case a.ProjectID == "":
		return errors.New("it has no project_id")
	case a.ID == "" && a.Name == "":
		return errors.New("it has neither service_account_id nor service_account")
	}
	return nil
}

// leaseData is what Vault keeps with a lease and hands back.
type leaseData struct {
	account
	Role string `json:"role"`
	// MaxTTL is the most that the lease could last when it was issued, which
	// the key's expiry at OpenAI covers.
	MaxTTL time.Duration `json:"max_ttl"`
	// KeyExpires is the key's end at OpenAI.
	KeyExpires time.Time `json:"key_expires_at"`
}

// internal returns the lease's data as Vault stores it.
func (l leaseData) internal() map[string]any {
	return map[string]any{
		"version":            l.Version,
		"project_id":         l.ProjectID,
		"service_account":    l.Name,
		"service_account_id": l.ID,
		"role":               l.Role,
		"max_ttl":            int64(l.MaxTTL),
		"key_expires_at":     l.KeyExpires.UTC().Format(time.RFC3339),
	}
}

// decodeInto reads what storage has turned into generic JSON values.
func decodeInto(target any, data any) error {
	encoded, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return json.Unmarshal(encoded, target)
}

// decodeLease reads a lease's internal data.
func decodeLease(req *logical.Request) (leaseData, error) {
	var lease leaseData
	if req.Secret == nil {
		return lease, errors.New("the lease has no data")
	}
	if err := decodeInto(&lease, req.Secret.InternalData); err != nil {
		return lease, fmt.Errorf("the lease's data cannot be read: %w", err)
	}
	err := lease.check()
	switch {
	case err != nil:
	case lease.ID == "":
		err = errors.New("it has no service_account_id")
	case lease.MaxTTL <= 0:
		err = errors.New("it has no max_ttl")
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
		Renew:  b.renew,
		Revoke: b.revoke,
	}
}

// renew prolongs a lease without a call to OpenAI: the key's expiry there
// covers the longest life of its lease from the start. The role decides as it
// is now, but never beyond what it was at the issue.
func (b *backend) renew(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	lease, err := decodeLease(req)
	if err != nil {
		return nil, err
	}
	r, err := getRole(ctx, req.Storage, lease.Role)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q no longer exists: its leases end, and are not renewed", lease.Role), nil
	}
	// Vault replaces the lease's data by what is returned, so all of it is.
	resp := &logical.Response{Secret: req.Secret, Data: req.Data}
	resp.Secret.TTL = r.TTL
	resp.Secret.MaxTTL = min(r.MaxTTL, lease.MaxTTL)
	return resp, nil
}

// revoke destroys a lease's account. A failure is an error, after which Vault
// tries again, six times within about ten minutes and then once a day; so it
// is journalled, too, and the journal tries until the account is gone.
func (b *backend) revoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, revokeBudget)
	defer cancel()
	lease, err := decodeLease(req)
	if err != nil {
		return nil, err
	}
	log := b.Logger().With("mount", req.MountPoint, "role", lease.Role, "project_id", lease.ProjectID, "service_account_id", lease.ID)
	if !lease.KeyExpires.IsZero() && b.now().After(lease.KeyExpires.Add(clockSlack)) {
		// The key is dead by itself. Only an empty account is left, which may
		// wait for its turn; the lease need not.
		if _, err := journalRevoke(ctx, req.Storage, lease.account); err == nil {
			log.Info("credential had expired at OpenAI; its account is left to the journal")
			return nil, nil
		}
	}
	snap, err := b.current(ctx, req.Storage)
	if err == nil {
		err = destroy(ctx, snap.api, lease.account)
		if client.IsDenied(err) && b.replaced(snap) {
			// A rotation without grace has ended the key under this revoke.
			if snap, err = b.current(ctx, req.Storage); err == nil {
				err = destroy(ctx, snap.api, lease.account)
			}
		}
	}
	if err != nil {
		// The request's context may be what ended the revoke.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
		defer cancel()
		_, journalErr := journalRevoke(cleanup, req.Storage, lease.account)
		log.Warn("credential not revoked yet; it is left to the journal", "error", err, "journal_error", journalErr)
		return nil, fmt.Errorf("service account %s in project %s not deleted yet: %w", lease.ID, lease.ProjectID, err)
	}
	log.Info("credential revoked")
	return nil, nil
}

// destroy makes sure that an account does not exist. Without error it is gone.
func destroy(ctx context.Context, api *client.Client, acct account) error {
	err := api.DeleteServiceAccount(ctx, acct.ProjectID, acct.ID)
	if err == nil || client.IsGone(err) {
		return nil
	}
	return unlessProjectGone(ctx, api, acct.ProjectID, err)
}

// unlessProjectGone returns err, or nil if it means all the same that the
// account is gone. Archived projects have no accounts, and what OpenAI answers
// to a delete in one is not published (docs/openai-api.md), so the project's
// own status decides.
func unlessProjectGone(ctx context.Context, api *client.Client, id string, err error) error {
	e := client.AsError(err)
	if e == nil || e.Ambiguous() || e.RateLimited() || e.Status == 0 {
		return err
	}
	if e.Gone() {
		return nil
	}
	project, readErr := api.GetProject(ctx, id)
	if client.IsGone(readErr) || (readErr == nil && project.Archived()) {
		return nil
	}
	return err
}
