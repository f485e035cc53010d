package openaisecrets

// This file owns the issue of a credential as a lease, the main data path. How
// a credential is made is in credential.go.
//
// What must stay true: the journal's entry goes when the answer is complete and
// about to be returned. Only what happens after issue() has returned is out of
// this engine's sight.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

func (b *backend) pathCreds() *framework.Path {
	issue := func(suffix string) *framework.PathOperation {
		return &framework.PathOperation{
			Callback:     strict(b.credsRead),
			Summary:      "Issue a credential of a role, as a lease.",
			DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "issue", OperationSuffix: suffix},
			Responses: okFields("The credential.", map[string]*framework.FieldSchema{
				"api_key":            {Type: framework.TypeString, Description: "The API key.", Required: true, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}},
				"api_key_id":         {Type: framework.TypeString, Description: "ID of the key, by which OpenAI reports its usage.", Required: true},
				"service_account":    {Type: framework.TypeString, Description: "Name of the service account that owns the key; of an account that a role names, its name when the role was written.", Required: true},
				"service_account_id": {Type: framework.TypeString, Description: "ID of that account.", Required: true},
				"project_id":         {Type: framework.TypeString, Description: "ID of its project.", Required: true},
				"expires_at":         {Type: framework.TypeString, Description: "When the key expires at OpenAI whatever becomes of the lease (RFC 3339); null with key_expiry=none.", Required: true},
			}),
			// A standby would create the account and only then learn that it
			// cannot write the lease.
			ForwardPerformanceStandby: true,
		}
	}
	return &framework.Path{
		Pattern:      "creds/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "credentials"},
		Fields: map[string]*framework.FieldSchema{
			"name": roleNameField(),
			"ttl": {
				Type:         framework.TypeDurationSecond,
				Description:  "How long the lease is to last at first; cut to what the role and the mount allow. 0 = the role's ttl.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "TTL"},
				Query:        true,
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation:   issue("credentials"),
			logical.UpdateOperation: issue("credentials-with-parameters"),
		},
		HelpSynopsis: "Issue an OpenAI API key as a lease.",
		HelpDescription: strings.TrimSpace(`
Each read makes a service account in the role's project and returns its key or,
with credential_type=api_key, a key of the account that the role names. What was
made is deleted when the lease ends or is revoked. The key can do what the
role's scopes allow, and is returned once OpenAI accepts it. The lease can be
renewed up to the role's max_ttl; should Vault be gone then, the key expires at
OpenAI by itself, as the role's key_expiry says.
`),
	}
}

func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if len(name) > maxRoleName {
		return logical.ErrorResponse("the role's name is %d characters long; the limit is %d", len(name), maxRoleName), nil
	}
	asked := time.Duration(0)
	if raw, ok := d.GetOk("ttl"); ok {
		asked = time.Duration(raw.(int)) * time.Second
	}
	r, err := b.roles.get(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("there is no role %q; `vault list %sroles` shows those there are", name, req.MountPoint), nil
	}
	began := time.Now()
	resp, err := b.issue(ctx, req, name, r, r.lifetime(b.System(), asked))
	b.metrics.issue(ctx, name, began, resp, err)
	return resp, err
}

// issue makes a credential and returns its key as a lease.
func (b *backend) issue(ctx context.Context, req *logical.Request, roleName string, r *role, life lifetime) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	b.issuing.Add(1)
	defer b.issuing.Add(-1)
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	project := r.project(snap.config)
	if project == "" {
		return logical.ErrorResponse("role %q has no project_id, and neither has the config: write one to either", roleName), nil
	}
	m, err := b.obtain(ctx, req, order{
		label:      fmt.Sprintf("role %q", roleName),
		credential: credential{Type: r.CredentialType, ProjectID: project, ID: r.ServiceAccountID, Name: r.ServiceAccount},
		template:   r.NameTemplate,
		data:       naming.Data{RoleName: roleName, DisplayName: req.DisplayName, ProjectID: project, UnixTime: b.now().Unix()},
		scopes:     r.Scopes,
		covers:     life.Covers,
		expiry:     life.Key,
		activation: r.ActivationTimeout,
		unproven:   r.ActivationFailure == activationWarn,
	})
	if errors.Is(err, errNotConfigured) { // deleted meanwhile
		return notConfigured(req), nil
	}
	if err != nil {
		return failure(fmt.Sprintf("role %q", roleName), err)
	}
	defer b.wal.release(m.walID)
	return b.handOut(ctx, req, m, roleName, r.KeyExpiry, life)
}

// handOut ends the journal entry and shapes the answer, or destroys the
// credential when nobody is there to take it.
func (b *backend) handOut(ctx context.Context, req *logical.Request, m *made, roleName, keyExpiry string, life lifetime) (*logical.Response, error) {
	err := ctx.Err()
	if b.isDraining() {
		err = errors.New("the mount is being disabled")
	}
	// Complete before the entry goes: what is done between the last look at the
	// context and Vault's receipt of the answer is done in the gap that only
	// the sweep covers.
	lease := leaseData{credential: m.credential, Role: roleName, MaxTTL: life.Max, KeyExpiry: keyExpiry}
	resp := b.Secret(secretType).Response(map[string]any{
		"api_key":            m.key.Value.Reveal(),
		"api_key_id":         m.KeyID,
		"service_account":    m.Name,
		"service_account_id": m.ID,
		"project_id":         m.ProjectID,
		"expires_at":         text.TimeOrNull(m.key.ExpiresAt),
	}, lease.internal())
	resp.Secret.TTL = life.TTL
	resp.Secret.MaxTTL = life.Max
	resp.Secret.Renewable = true
	resp.Warnings = life.Warnings
	if m.warning != "" {
		resp.AddWarning(m.warning)
	}
	if err == nil {
		b.log(req).Info("credential issued", append([]any{"role", roleName, "openai_request_id", m.requestID,
			"ttl", life.TTL.String(), "expires_at", text.Time(m.key.ExpiresAt)}, m.attrs()...)...)
		b.issued()
		if err = b.deleteWAL(ctx, req.Storage, m.walID); err == nil {
			err = ctx.Err()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("role %q: the credential was made but not handed out, and %s: %w", roleName, b.abandon(ctx, req, m, fmt.Sprintf("role %q", roleName), err), err)
	}
	b.tidy.witnesses.add(m.credential, b.now())
	b.notify(eventIssue, req.MountPoint, req.Path, false, append([]string{"name", roleName}, m.pairs()...)...)
	return resp, nil
}
