package openaisecrets

// This file owns the issue of a credential, the main data path.
//
// What must stay true: nothing is created before the journal holds its name;
// each attempt has its own name and its own entry; an entry goes only when the
// answer is complete, or nothing was made, or what was made is destroyed. Only
// what happens after issue() has returned is out of this engine's sight.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

func (b *backend) pathCreds() *framework.Path {
	issue := func(verb string) *framework.PathOperation {
		return &framework.PathOperation{
			Callback:     strict(b.credsRead),
			Summary:      "Issue a credential of a role, as a lease.",
			DisplayAttrs: &framework.DisplayAttributes{OperationVerb: verb},
			Responses: okFields("The credential.", map[string]*framework.FieldSchema{
				"api_key":            {Type: framework.TypeString, Description: "The API key.", Required: true, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}},
				"api_key_id":         {Type: framework.TypeString, Description: "ID of the key, by which OpenAI reports its usage.", Required: true},
				"service_account":    {Type: framework.TypeString, Description: "Name of the service account that owns the key.", Required: true},
				"service_account_id": {Type: framework.TypeString, Description: "ID of that account.", Required: true},
				"project_id":         {Type: framework.TypeString, Description: "ID of its project.", Required: true},
				"expires_at":         {Type: framework.TypeString, Description: "When the key expires at OpenAI whatever becomes of the lease (RFC 3339).", Required: true},
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
			logical.ReadOperation:   issue("issue"),
			logical.UpdateOperation: issue("issue-with-parameters"),
		},
		HelpSynopsis: "Issue an OpenAI API key as a lease.",
		HelpDescription: strings.TrimSpace(`
Each read makes a service account in the role's project and returns its key. The
account is deleted when the lease ends or is revoked. The lease can be renewed
up to the role's max_ttl; the key expires at OpenAI shortly after that.
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
		if asked < 0 {
			return logical.ErrorResponse("ttl must not be negative"), nil
		}
	}
	r, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("there is no role %q; `vault list %sroles` shows those there are", name, req.MountPoint), nil
	}
	return b.issue(ctx, req, name, r, r.lifetime(b.System().MaxLeaseTTL(), asked))
}

// issue makes an account and returns its key as a lease. An ambiguous create
// is tried again under a fresh name, within the request's budget.
func (b *backend) issue(ctx context.Context, req *logical.Request, roleName string, r *role, life lifetime) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	b.issuing.Add(1)
	defer b.issuing.Add(-1)
	var limited error // the last refusal for the rate
	for attempt := 0; ; {
		if b.isDraining() {
			return logical.ErrorResponse("this mount is being disabled"), nil
		}
		// Anew for each attempt: a rotation may have replaced the admin key.
		snap, err := b.current(ctx, req.Storage)
		if errors.Is(err, errNotConfigured) {
			return notConfigured(req), nil
		}
		if err != nil {
			return nil, err
		}
		random, err := randomText(randomLength)
		if err != nil {
			return nil, err
		}
		name, err := accountName(r.NameTemplate, nameData{
			RoleName: roleName, DisplayName: req.DisplayName, ProjectID: r.ProjectID,
			UnixTime: b.now().Unix(), RandomSuffix: snap.tag + random,
		})
		if err != nil {
			return logical.ErrorResponse("role %q: service_account_name_template: %s", roleName, err), nil
		}

		acct := account{Version: accountVersion, ProjectID: r.ProjectID, Name: name}
		walID, err := framework.PutWAL(ctx, req.Storage, journalAccount, acct)
		if err != nil {
			return nil, fmt.Errorf("writing the journal, before anything was created: %w", err)
		}
		// Once sent it is waited for, client or no client: its answer lets an
		// account that nobody wants be destroyed at once.
		made, key, err := snap.api.CreateServiceAccount(client.Finish(ctx), acct.ProjectID, acct.Name, life.Max+expiryMargin)
		if err == nil {
			acct.ID = made.ID
			return b.handOut(ctx, req, snap, walID, roleName, acct, made.CreatedAt, key, life)
		}

		e := client.AsError(err)
		if !e.Ambiguous() {
			// Nothing was made, so a client that has gone changes nothing.
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
			walErr := framework.DeleteWAL(cleanup, req.Storage, walID)
			cancel()
			if walErr != nil {
				return nil, fmt.Errorf("role %q: %w; and its journal entry could not be deleted: %w", roleName, err, walErr)
			}
		}
		b.Logger().Warn("account not created", "mount", req.MountPoint, "role", roleName, "attempt", attempt+1, "left_to_journal", e.Ambiguous(), "error", err)
		if e.RateLimited() && e.Retryable() {
			limited = err
			continue // the pace knows when the next call fits, and says when that is too late
		}
		if e.RateLimited() && limited != nil {
			return failure(fmt.Sprintf("role %q", roleName), limited) // says more than that it is too late
		}
		retry := e.Retryable() || (e.Denied() && (b.replaced(snap) || snap.fresh(b.now())))
		if attempt++; attempt >= maxAttempts || !retry || client.Wait(ctx, client.Backoff(attempt-1, e.RetryAfter)) != nil {
			return failure(fmt.Sprintf("role %q", roleName), err)
		}
	}
}

// fresh reports whether the admin key came into force so recently that one of
// OpenAI's servers may not know it yet.
func (s *snapshot) fresh(now time.Time) bool {
	return s.config.AdminKeyRotated && now.Sub(s.config.LastRotated) < time.Minute
}

// replaced reports whether another snapshot has come into force.
func (b *backend) replaced(snap *snapshot) bool {
	b.snapshotMu.RLock()
	defer b.snapshotMu.RUnlock()
	return b.snapshot != snap
}

// handOut ends the journal entry and shapes the answer, or destroys the
// account when nobody is there to take it or its key is not what was asked for.
func (b *backend) handOut(ctx context.Context, req *logical.Request, snap *snapshot, walID, roleName string, acct account, created time.Time, key client.Key, life lifetime) (*logical.Response, error) {
	err := ctx.Err()
	if b.isDraining() {
		err = errors.New("the mount is being disabled")
	}
	if err == nil && (key.ExpiresAt.IsZero() || key.ExpiresAt.Sub(created) < life.Max) {
		err = fmt.Errorf("OpenAI made its key with an end (%s) that does not cover the lease", key.ExpiresAt)
	}
	// Complete before the entry goes: what is done between the last look at the
	// context and Vault's receipt of the answer is done in the gap that only
	// the sweep covers.
	lease := leaseData{account: acct, Role: roleName, MaxTTL: life.Max, KeyExpires: key.ExpiresAt}
	resp := b.Secret(secretType).Response(map[string]any{
		"api_key":            key.Value.Reveal(),
		"api_key_id":         key.ID,
		"service_account":    acct.Name,
		"service_account_id": acct.ID,
		"project_id":         acct.ProjectID,
		"expires_at":         key.ExpiresAt.Format(time.RFC3339),
	}, lease.internal())
	resp.Secret.TTL = life.TTL
	resp.Secret.MaxTTL = life.Max
	resp.Secret.Renewable = true
	resp.Warnings = life.Warnings
	if err == nil {
		b.Logger().Info("credential issued", "mount", req.MountPoint, "role", roleName, "project_id", acct.ProjectID,
			"service_account_id", acct.ID, "api_key_id", key.ID, "ttl", life.TTL.String(), "request_id", req.ID)
		b.lastIssued.Store(time.Now().UnixNano())
		if err = framework.DeleteWAL(ctx, req.Storage, walID); err == nil {
			err = ctx.Err()
		}
	}
	if err != nil {
		fate := b.abandon(ctx, req, snap, walID, acct)
		return nil, fmt.Errorf("role %q: the credential was made but not handed out, and %s: %w", roleName, fate, err)
	}
	return resp, nil
}

// abandon destroys an account that cannot be handed out and says what became
// of it. It is journalled anew, by its ID, before anything else, since the
// first entry may be gone already.
func (b *backend) abandon(ctx context.Context, req *logical.Request, snap *snapshot, walID string, acct account) (fate string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	log := b.Logger().With("mount", req.MountPoint, "project_id", acct.ProjectID, "service_account_id", acct.ID)
	entry, journalErr := journalRevoke(ctx, req.Storage, acct)
	if err := destroy(ctx, snap.api, acct); err != nil {
		log.Warn("credential not handed out; its account is left to the journal", "error", err, "journal_error", journalErr)
		return "its account is left to the journal"
	}
	log.Info("credential not handed out; its account is destroyed")
	for _, id := range []string{walID, entry} {
		if err := framework.DeleteWAL(ctx, req.Storage, id); err != nil {
			log.Warn("journal entry not deleted; the worker will find nothing to do", "error", err)
		}
	}
	return "its account is destroyed"
}
