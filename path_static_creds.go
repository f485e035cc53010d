package openaisecrets

// This file owns the paths that read a static role's key and rotate it on request.
//
// What must stay true: a read does not wait for a rotation and, unless a limit or a
// guardrail needs more, is one storage operation and no call; its response tells clients
// when to read again.

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
				Summary:  "Read the active key of a static role.",
				Responses: okFields("The active key.", map[string]*framework.FieldSchema{
					"api_key":             {Type: framework.TypeString, Description: "API key.", Required: true, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}},
					"api_key_id":          {Type: framework.TypeString, Description: "ID of the key. OpenAI reports usage by this ID.", Required: true},
					"service_account":     {Type: framework.TypeString, Description: "Name of the service account that owns the key.", Required: true},
					"service_account_id":  {Type: framework.TypeString, Description: "ID of the service account.", Required: true},
					"project_id":          {Type: framework.TypeString, Description: "ID of the project of the service account.", Required: true},
					"expires_at":          {Type: framework.TypeString, Description: "Expiry of the key at OpenAI if no rotation replaces it (RFC 3339).", Required: true},
					"ttl":                 {Type: framework.TypeInt, Description: "Seconds until the next rotation or, while rotation is paused, until the key expires; at least 0.", Required: true},
					"last_vault_rotation": {Type: framework.TypeString, Description: "Time at which the key became active (RFC 3339).", Required: true},
					// Vault Agent and consul-template read again after ttl only if the
					// response has a rotation_period, even if it is 0.
					"rotation_period":             {Type: framework.TypeInt, Description: "Seconds between rotations; 0 with a rotation_schedule.", Required: true},
					"rotation_schedule":           {Type: framework.TypeString, Description: "Cron schedule of rotations; absent without one."},
					"rotation_window":             {Type: framework.TypeInt, Description: "How late a missed rotation may run, in seconds."},
					"previous_api_key_expires_at": {Type: framework.TypeString, Description: "When the superseded key stops working (RFC 3339); absent without one."},
				}),
			},
		},
		HelpSynopsis: "Read the active key of a static role.",
		HelpDescription: strings.TrimSpace(`
Returns the active key, without a lease. The engine rotates the key after ttl
seconds. The superseded key works until previous_api_key_expires_at. Vault Agent,
consul-template, and Vault Secrets Operator read the new key after the rotation.
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
	snap, err := b.current(ctx, req.Storage)
	if err == nil {
		err = b.blocked(ctx, req.Storage, snap, staticLabel+name, r.spendRule)
	}
	if err == nil {
		err = b.guard(ctx, req, snap, r.ProjectID, r.Scopes)
	}
	if err != nil && !errors.Is(err, errNotConfigured) { // without a config, nothing is required
		return errorResponse(fmt.Sprintf("static role %q", name), err)
	}
	now := b.now()
	r.correct(now) // the worker stores the correction
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
	for _, k := range r.Superseded {
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
	if r.Missing != nil {
		resp.AddWarning(r.Missing.text(req.MountPoint, name, r.ServiceAccountID, r.Current.ID, r.Adopted))
	}
	b.metrics.StaticRead(name)
	switch {
	case r.DisableAutomatedRotation && r.inLastThird(now):
		resp.AddWarning(r.pausedText(req.MountPoint, name, now))
	case !r.Current.ExpiresAt.After(now):
		resp.AddWarning(fmt.Sprintf("This key expired at OpenAI, because no rotation has succeeded since %s. %s", text.Time(r.LastRotated), r.RotationError))
	}
	return resp, nil
}

func noStaticRole(req *logical.Request, name string) *logical.Response {
	return logical.ErrorResponse("static role %q not found; run \"vault list %sstatic-roles\" to list static roles", name, req.MountPoint)
}

func (b *backend) pathRotateRole() *framework.Path {
	return &framework.Path{
		Pattern:      "rotate-role/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "rotate", OperationSuffix: "static-role"},
		Fields: map[string]*framework.FieldSchema{
			"name": roleNameField(),
			"force": {
				Type:         framework.TypeBool,
				Description:  "Delete all superseded keys of the role immediately, even if they are used.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "Force"},
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: rejectUnknownFields(b.rotateRoleWrite),
				Summary:  "Rotate the key of a static role.",
				Responses: okFields("Key rotated.", map[string]*framework.FieldSchema{
					"api_key_id":          {Type: framework.TypeString, Description: "ID of the new key.", Required: true},
					"last_vault_rotation": {Type: framework.TypeString, Description: "Time at which the key became active (RFC 3339).", Required: true},
				}),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Rotate the key of a static role.",
		HelpDescription: strings.TrimSpace(`
Creates a key, makes it active once OpenAI accepts it, and deletes the
superseded key after revocation_delay. The rotation_period starts again. With
force=true, the engine deletes all superseded keys immediately: use it after a
key has leaked.
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
	if force && len(r.Superseded) >= maxSuperseded { // otherwise rotateStatic rejects it
		r.endNow(b.now())
		r, _ = b.deleteUnwanted(ctx, req, name, r)
	}
	next, warnings, err := b.rotateStatic(ctx, req, name, r, force)
	switch {
	case errors.Is(err, errNotConfigured):
		return notConfigured(req), nil
	case errors.Is(err, errWhichStaticKey):
		return nil, err
	case err != nil:
		return errorResponse(fmt.Sprintf("static role %q not rotated; its key stays active", name), err)
	}
	b.startStaticWorker(req)
	return &logical.Response{
		Data:     map[string]any{"api_key_id": next.Current.ID, "last_vault_rotation": text.Time(next.LastRotated)},
		Warnings: warnings,
	}, nil
}
