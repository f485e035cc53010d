package openaisecrets

// This file owns a credential after its issue: what a lease carries, renewal,
// revocation, and the journal's part in both.
//
// What must stay true: revoke, rollback and drain share destroy; a revoke
// needs nothing but the lease's own data and a config; gone is success, a
// missing permission never is.

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
	secretType = "openai_api_key" // #nosec G101 -- a type's name
	// journalAccount is the kind of the entries that hold an account.
	journalAccount = "service_account"
	accountVersion = 1
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
	if err := lease.check(); err != nil {
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

// revoke destroys a lease's account. Any failure is an error, after which
// Vault tries again.
func (b *backend) revoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, revokeBudget)
	defer cancel()
	lease, err := decodeLease(req)
	if err != nil {
		return nil, err
	}
	snap, err := b.current(ctx, req.Storage)
	if err == nil {
		err = destroy(ctx, snap.api, lease.account)
	}
	log := b.Logger().With("mount", req.MountPoint, "role", lease.Role, "project_id", lease.ProjectID, "service_account_id", lease.ID)
	if err != nil {
		log.Warn("credential not revoked", "error", err)
		return nil, fmt.Errorf("service account %s in project %s not deleted: %w", lease.ID, lease.ProjectID, err)
	}
	log.Info("credential revoked")
	return nil, nil
}

// destroy makes sure that an account does not exist: by its ID, or where that
// is not known by its name, which is unique. Without error it is gone.
func destroy(ctx context.Context, api *client.Client, acct account) error {
	ids := []string{acct.ID}
	if acct.ID == "" {
		all, err := api.ListServiceAccounts(ctx, acct.ProjectID)
		if err != nil {
			return unlessProjectGone(ctx, api, acct.ProjectID, err)
		}
		ids = nil
		for _, a := range all {
			if a.Name == acct.Name {
				ids = append(ids, a.ID)
			}
		}
	}
	for _, id := range ids {
		if err := api.DeleteServiceAccount(ctx, acct.ProjectID, id); err != nil && !client.IsGone(err) {
			return unlessProjectGone(ctx, api, acct.ProjectID, err)
		}
	}
	return nil
}

// unlessProjectGone returns err, or nil if the project's end explains it.
// Archived projects have no accounts, and what OpenAI answers to a delete in
// one is not published (docs/openai-api.md), so the project's own status decides.
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

// rollback acts on one journal entry; nil ends the entry. Vault logs nothing
// of a rollback's failure, so it is logged here.
func (b *backend) rollback(ctx context.Context, req *logical.Request, kind string, data any) error {
	err := b.rollbackEntry(ctx, req, kind, data)
	if err != nil {
		b.Logger().Warn("journal entry not worked off yet", "mount", req.MountPoint, "kind", kind, "error", err)
	}
	return err
}

func (b *backend) rollbackEntry(ctx context.Context, req *logical.Request, kind string, data any) error {
	if !b.WriteSafeReplicationState() {
		return logical.ErrReadOnly
	}
	switch kind {
	case journalAccount:
		var acct account
		if err := decodeInto(&acct, data); err != nil {
			return err
		}
		if err := acct.check(); err != nil {
			return err
		}
		snap, err := b.current(ctx, req.Storage)
		if err != nil {
			return err
		}
		if err := destroy(ctx, snap.api, acct); err != nil {
			return err
		}
		b.Logger().Info("journal entry worked off", "mount", req.MountPoint, "project_id", acct.ProjectID, "service_account", acct.Name)
		return nil
	case journalAdminKey:
		var entry adminKeyEntry
		if err := decodeInto(&entry, data); err != nil {
			return err
		}
		if entry.Name == "" {
			return errors.New("it has no name")
		}
		return b.rollbackAdminKey(ctx, req, entry)
	default:
		return fmt.Errorf("the journal's kind %q is unknown to this version of the plugin", kind)
	}
}

// drainJournal acts on every entry, however young: the mount is being disabled
// and its storage goes next. A failure keeps the entry for the next tick, if
// there is one.
func (b *backend) drainJournal(ctx context.Context, req *logical.Request) error {
	ids, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return fmt.Errorf("listing the journal: %w", err)
	}
	var failed []error
	for _, id := range ids {
		entry, err := framework.GetWAL(ctx, req.Storage, id)
		if err == nil && entry != nil {
			if err = b.rollback(ctx, req, entry.Kind, entry.Data); err == nil {
				err = framework.DeleteWAL(ctx, req.Storage, id)
			}
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
