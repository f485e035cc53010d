package openaisecrets

// This file owns the path that rotates the admin key on request.
//
// What must stay true: a rotation that has begun completes even if its client
// disconnects, and the response never contains the key.

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

func (b *backend) pathRotate(pattern string) *framework.Path {
	return &framework.Path{
		Pattern:      pattern,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "rotate", OperationSuffix: map[string]string{"config/rotate": "admin-key", "rotate-root": "root"}[pattern]},
		Fields: map[string]*framework.FieldSchema{
			"force": {
				Type:         framework.TypeBool,
				Description:  "Delete all superseded admin keys immediately, also the one that this rotation replaces, even if they are used.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "Delete superseded keys immediately"},
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: rejectUnknownFields(b.rotateWrite),
				Summary:  "Rotate the admin key.",
				Responses: okFields("Admin key rotated.", map[string]*framework.FieldSchema{
					"admin_api_key_id": {Type: framework.TypeString, Description: "ID of the new admin key.", Required: true},
					"last_rotated":     {Type: framework.TypeString, Description: "Time at which the key became active (RFC 3339).", Required: true},
					"note":             {Type: framework.TypeString, Description: "When the superseded key stops working, if that key was written to the config."},
				}),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Rotate the admin key.",
		HelpDescription: strings.TrimSpace(`
Creates an admin key, verifies that it can read and write, stores it, and
deletes the superseded key after rotation_grace_period. The new key is never
returned; only Vault knows it. config/rotate and rotate-root are equivalent.

If a superseded key is used more than three minutes after it was superseded,
the engine retains it until seven days after it was superseded, because another
Vault still uses it, for example a copy restored from a snapshot. With
rotation_grace_period=0, after any reduction of it, and with force=true, the engine
deletes superseded keys even if they are still used; with 0 and with force=true
it deletes all of them immediately. With force=true, the response lists the keys
that the active key does not see. The engine no longer tracks them: delete them
at OpenAI. While five superseded keys are in their grace period, a rotation
requires force=true; an automatic rotation does not.

If two mounts share an admin key, a rotation in one of them invalidates it in
the other. Give each mount its own admin key.
`),
	}
}

func (b *backend) rotateWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestBudget)
	defer cancel()
	cfg, note, warnings, err := b.rotateAdminKey(ctx, req, d.Get("force").(bool))
	if err != nil { // an automatic rotation logs its own failure
		b.log(req).Warn("admin key not rotated", "error", err)
	}
	switch {
	case errors.Is(err, errNotConfigured):
		return notConfigured(req), nil
	case errors.Is(err, errAdminKeyIDUnknown):
		return logical.ErrorResponse("%s", err), nil
	case errors.Is(err, errWhichKey):
		return nil, err
	case err != nil:
		what := "admin key not rotated; the previous one stays active"
		if d.Get("force").(bool) {
			what += "; to delete superseded keys without a rotation, write rotation_grace_period=0 to the config"
		}
		return errorResponse(what, err)
	}
	resp := &logical.Response{
		Data: map[string]any{
			"admin_api_key_id": cfg.AdminKeyID,
			"last_rotated":     cfg.LastRotated.Format(time.RFC3339),
		},
		Warnings: warnings,
	}
	if note != "" {
		resp.Data["note"] = note
	}
	return resp, nil
}
