package openaisecrets

// This file owns the credential request, the main data path. credential.go has how a
// credential is created.
//
// What must stay true: the WAL entry is deleted only when the response is complete and
// about to be returned. The engine cannot see what happens after issue() returned.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/metrics"
	"vault-plugin-secrets-openai/internal/text"
)

func (b *backend) pathCreds() *framework.Path {
	issue := func(suffix string) *framework.PathOperation {
		return &framework.PathOperation{
			Callback:     rejectUnknownFields(b.credsRead),
			Summary:      "Issue an API key as a lease.",
			DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "issue", OperationSuffix: suffix},
			Responses: okFields("Credential issued.", map[string]*framework.FieldSchema{
				"api_key":            {Type: framework.TypeString, Description: "API key.", Required: true, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}},
				"api_key_id":         {Type: framework.TypeString, Description: "ID of the key. OpenAI reports usage by this ID.", Required: true},
				"service_account":    {Type: framework.TypeString, Description: "Name of the service account that owns the key.", Required: true},
				"service_account_id": {Type: framework.TypeString, Description: "ID of the service account.", Required: true},
				"project_id":         {Type: framework.TypeString, Description: "ID of the project of the service account.", Required: true},
				"expires_at":         {Type: framework.TypeString, Description: "Expiry of the key at OpenAI (RFC 3339); null with key_expiry=none.", Required: true},
			}),
			// A performance standby would create the account before it fails to
			// write the lease.
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
				Description:  "Requested TTL, limited by the role and the mount. 0 uses the role's ttl.",
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
Each read creates a service account in the role's project and returns its key.
With credential_type=api_key, it creates a key of the service account that the
role names. The engine returns the key once OpenAI accepts it, and deletes the
account or key when the lease expires or is revoked. The role's scopes limit
what the key can do. The lease can be renewed up to the role's max_ttl. If Vault
is unavailable, the key still expires at OpenAI as set by the role's key_expiry.
`),
	}
}

func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if len(name) > maxRoleName {
		return logical.ErrorResponse("the role name has %d characters; the limit is %d", len(name), maxRoleName), nil
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
		return noRole(req, name), nil
	}
	began := time.Now()
	resp, err := b.issue(ctx, req, name, r, asked)
	b.metrics.Issued(name, outcomeFor(ctx, resp, err), time.Since(began))
	return resp, err
}

// issue creates a credential, or takes one from the pool of the role, and returns its
// key as a lease. It starts over if the role or the config has changed since.
func (b *backend) issue(ctx context.Context, req *logical.Request, roleName string, r *role, asked time.Duration) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	b.issuing.Add(1)
	defer b.issuing.Add(-1)
	for attempt := 1; ; attempt++ {
		resp, err := b.issueOnce(ctx, req, roleName, r, r.lifetime(b.System(), asked))
		if errors.Is(err, errChanged) && attempt >= maxAttempts { // written again and again
			return nil, logical.CodedError(http.StatusConflict, err.Error()+"; repeat the request")
		}
		if !errors.Is(err, errChanged) {
			return resp, err
		}
		if r, err = b.roles.get(ctx, req.Storage, roleName); err != nil {
			return nil, err
		}
		if r == nil {
			return noRole(req, roleName), nil
		}
	}
}

func noRole(req *logical.Request, name string) *logical.Response {
	return logical.ErrorResponse("role %q not found; run \"vault list %sroles\" to list roles", name, req.MountPoint)
}

// issueOnce returns errChanged if the role or the config has changed since.
func (b *backend) issueOnce(ctx context.Context, req *logical.Request, roleName string, r *role, life lifetime) (*logical.Response, error) {
	era := b.pools.era.Load() // before the config is read
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	project := r.project(snap.config)
	if project == "" {
		return logical.ErrorResponse("role %q has no project_id, and the config has no default; set project_id in one of them", roleName), nil
	}
	err = b.blocked(ctx, req.Storage, snap, roleName, r.spendRule)
	if err == nil {
		err = b.guard(ctx, req, snap, project, r.Scopes)
	}
	if err != nil {
		return errorResponse(fmt.Sprintf("role %q", roleName), err)
	}
	of := basis{r, snap.config, era}
	m := b.takePooled(roleName, of, snap, life)
	if r.PoolSize > 0 {
		defer b.servePools(req) //nolint:contextcheck // it outlives the request
	}
	if m == nil {
		m, err = b.makeCredential(ctx, req, b.order(roleName, r, project, req.DisplayName, life))
	}
	if errors.Is(err, errNotConfigured) { // deleted since
		return notConfigured(req), nil
	}
	if err != nil {
		return errorResponse(fmt.Sprintf("role %q", roleName), err)
	}
	return b.issueResponse(ctx, req, m, roleName, of, life)
}

// issueResponse builds the response and deletes the WAL entry. If the request was
// canceled or the mount is being disabled, it destroys the credential instead.
func (b *backend) issueResponse(ctx context.Context, req *logical.Request, m *issued, roleName string, of basis, life lifetime) (*logical.Response, error) {
	// Only tidy covers a crash between the deletion of the WAL entry and Vault's
	// receipt of the response, so the response is complete before the deletion.
	lease := leaseData{credential: m.credential, Role: roleName, MaxTTL: life.Max, KeyExpiry: of.role.KeyExpiry, Spare: m.spare}
	if of.config.UsageRetention > 0 && of.config.UsageRecordIdentity {
		lease.EntityID, lease.DisplayName = req.EntityID, req.DisplayName
	}
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
	err := b.commit(ctx, req, m, lease, of, life.TTL)
	if errors.Is(err, errChanged) && m.spare != 0 {
		b.leaveTaken(m, metrics.PoolChanged) // recordLeaving replaces its WAL entry
		return nil, fmt.Errorf("role %q: %w", roleName, err)
	}
	defer b.wal.release(m.walID)
	if err != nil {
		if m.spare != 0 {
			b.metrics.PoolDestroyed(metrics.PoolNotReturned, 1)
		}
		return nil, fmt.Errorf("role %q: the credential was created but not returned, and %s: %w", roleName, b.discard(ctx, req, m, fmt.Sprintf("role %q", roleName), err), err)
	}
	b.tidy.knownKeys.add(m.credential, b.now())
	b.events.Emit(events.CredsCreate, req.MountPoint, req.Path, false, append([]string{"name", roleName}, m.pairs()...)...)
	return resp, nil
}

// commit deletes the WAL entry of a credential that is about to be returned, unless the
// role or the config has changed. A write of the role waits for it, and so does a block,
// which then knows the key.
func (b *backend) commit(ctx context.Context, req *logical.Request, m *issued, lease leaseData, of basis, ttl time.Duration) error {
	if b.isDraining() {
		return errors.New("the mount is being disabled")
	}
	release, err := b.shareAnswers(ctx, lease.Role)
	if err != nil {
		return err
	}
	defer release()
	if err := b.unchanged(ctx, req, lease.Role, of); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.committed = true
	b.log(req).Info("credential issued", append([]any{"role", lease.Role, "openai_request_id", m.requestID,
		"ttl", ttl.String(), "expires_at", text.Time(m.key.ExpiresAt)}, m.attrs()...)...)
	b.issued()
	b.recordUsage(lease.usageRecord())
	if err := b.deleteWAL(ctx, req.Storage, m.walID); err != nil {
		return err
	}
	return ctx.Err()
}
