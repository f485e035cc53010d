package openaisecrets

// This file owns the reading of a static role's key, and its rotation by hand.
//
// What must stay true: a read is one look into storage, whatever a rotation is
// doing, and carries what its readers need to read again in time.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/text"
)

func (b *backend) pathStaticCreds() *framework.Path {
	return &framework.Path{
		Pattern:      "static-creds/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "read", OperationSuffix: "static-role-credentials"},
		Fields:       map[string]*framework.FieldSchema{"name": roleNameField()},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.staticCredsRead,
				Summary:  "Read the key in force of a static role.",
				Responses: okFields("The key.", map[string]*framework.FieldSchema{
					"api_key":             {Type: framework.TypeString, Description: "The API key.", Required: true, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}},
					"api_key_id":          {Type: framework.TypeString, Description: "ID of the key, by which OpenAI reports its usage.", Required: true},
					"service_account":     {Type: framework.TypeString, Description: "Name of the service account that owns the key.", Required: true},
					"service_account_id":  {Type: framework.TypeString, Description: "ID of that account.", Required: true},
					"project_id":          {Type: framework.TypeString, Description: "ID of its project.", Required: true},
					"expires_at":          {Type: framework.TypeString, Description: "When the key expires at OpenAI if no rotation replaces it (RFC 3339).", Required: true},
					"ttl":                 {Type: framework.TypeInt, Description: "Seconds to the next rotation, or while that is paused to the end of the key; 0 when it is due.", Required: true},
					"last_vault_rotation": {Type: framework.TypeString, Description: "When the key was put in force (RFC 3339).", Required: true},
					// Vault Agent and consul-template read again after ttl only where
					// there is a rotation_period, whatever it is.
					"rotation_period":             {Type: framework.TypeInt, Description: "Seconds between rotations; 0 with a rotation_schedule.", Required: true},
					"rotation_schedule":           {Type: framework.TypeString, Description: "The schedule of rotations, if there is one."},
					"rotation_window":             {Type: framework.TypeInt, Description: "Seconds for which a missed rotation of the schedule is made up for; 0 = without limit."},
					"previous_api_key_expires_at": {Type: framework.TypeString, Description: "When the key that this one has replaced stops to work (RFC 3339), while it still does."},
				}),
			},
		},
		HelpSynopsis: "Read the key in force of a static role.",
		HelpDescription: strings.TrimSpace(`
Returns the key in force, without a lease. It is replaced after ttl seconds; the
one before works until previous_api_key_expires_at. Vault Agent, consul-template
and Vault Secrets Operator read again by themselves when it is replaced.
`),
	}
}

func (b *backend) staticCredsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return noStaticRole(req, name), nil
	}
	now := b.now()
	r.correct(now) // stored by the next pass
	change := r.next(now)
	if r.DisableAutomatedRotation {
		change = r.Current.ExpiresAt
	}
	data := map[string]any{
		"api_key":             r.Current.Value.Reveal(),
		"api_key_id":          r.Current.ID,
		"service_account":     r.ServiceAccount,
		"service_account_id":  r.ServiceAccountID,
		"project_id":          r.ProjectID,
		"expires_at":          text.TimeOrNull(r.Current.ExpiresAt),
		"ttl":                 max(0, int64(change.Sub(now).Round(time.Second)/time.Second)),
		"last_vault_rotation": text.TimeOrNull(r.LastRotated),
		"rotation_period":     int64(r.RotationPeriod / time.Second),
	}
	if r.RotationSchedule != "" {
		data["rotation_schedule"] = r.RotationSchedule
		data["rotation_window"] = int64(r.RotationWindow / time.Second)
	}
	var previous time.Time
	for _, k := range r.Retired {
		if end := k.end(r.RevocationDelay); end.After(now) && end.After(previous) {
			previous = end
		}
	}
	if !previous.IsZero() {
		data["previous_api_key_expires_at"] = text.Time(previous)
	}
	resp := &logical.Response{Data: data}
	if r.Current.Warning != "" {
		resp.AddWarning(r.Current.Warning)
	}
	b.metrics.staticRead(name)
	switch {
	case r.DisableAutomatedRotation && r.inLastThird(now):
		resp.AddWarning(r.pausedText(req.MountPoint, name, now))
	case !r.Current.ExpiresAt.After(now):
		resp.AddWarning(fmt.Sprintf("This key has expired at OpenAI: no rotation has succeeded since %s. %s", text.Time(r.LastRotated), r.RotationError))
	}
	return resp, nil
}

func noStaticRole(req *logical.Request, name string) *logical.Response {
	return logical.ErrorResponse("there is no static role %q; `vault list %sstatic-roles` shows those there are", name, req.MountPoint)
}

func (b *backend) pathRotateRole() *framework.Path {
	return &framework.Path{
		Pattern:      "rotate-role/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "rotate", OperationSuffix: "static-role"},
		Fields: map[string]*framework.FieldSchema{
			"name": roleNameField(),
			"force": {
				Type:         framework.TypeBool,
				Description:  "Delete all replaced keys of the role at once, whatever is left of revocation_delay and whether or not they are still used.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "Force"},
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: strict(b.rotateRoleWrite),
				Summary:  "Replace the key of a static role now.",
				Responses: okFields("The new key's ID.", map[string]*framework.FieldSchema{
					"api_key_id":          {Type: framework.TypeString, Description: "ID of the new key.", Required: true},
					"last_vault_rotation": {Type: framework.TypeString, Description: "When it was put in force (RFC 3339).", Required: true},
				}),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Replace the key of a static role now.",
		HelpDescription: strings.TrimSpace(`
Makes a new key, puts it in force once OpenAI accepts it, and deletes the old one
after revocation_delay. A rotation_period counts from then. With force=true no
replaced key lives on: use it when a key has leaked.
`),
	}
}

func (b *backend) rotateRoleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	ctx, done, err := b.beginStatic(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return noStaticRole(req, name), nil
	}
	force := d.Get("force").(bool)
	if force && len(r.Retired) >= maxRetired { // without room there is no rotation
		r.endNow(b.now())
		r, _ = b.endUnwanted(ctx, req, name, r)
	}
	next, warnings, err := b.rotateStatic(ctx, req, name, r, force)
	switch {
	case errors.Is(err, errNotConfigured):
		return notConfigured(req), nil
	case errors.Is(err, errWhichStaticKey):
		return nil, err
	case err != nil:
		return failure(fmt.Sprintf("static role %q not rotated, its key stays in force", name), err)
	}
	b.kickStatic(req)
	return &logical.Response{
		Data:     map[string]any{"api_key_id": next.Current.ID, "last_vault_rotation": text.Time(next.LastRotated)},
		Warnings: warnings,
	}, nil
}
