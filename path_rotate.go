package openaisecrets

// This file owns the path that rotates the admin key by hand.
//
// What must stay true: a rotation once begun is finished whether or not its client
// waits, and the answer never carries the key.

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
				Description:  "Delete all superseded admin keys at once, the one that this rotation replaces included, whatever is left of rotation_grace_period and whoever uses them.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "Delete superseded keys at once"},
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: strict(b.rotateWrite),
				Summary:  "Replace the engine's admin key by a new one.",
				Responses: okFields("The new admin key's ID.", map[string]*framework.FieldSchema{
					"admin_api_key_id": {Type: framework.TypeString, Description: "ID of the new admin key.", Required: true},
					"last_rotated":     {Type: framework.TypeString, Description: "When it was put in force (RFC 3339).", Required: true},
					"note":             {Type: framework.TypeString, Description: "When a key that a person wrote stops working, if it was one; absent otherwise."},
				}),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Replace the engine's admin key by a new one.",
		HelpDescription: strings.TrimSpace(`
Makes a new admin key, checks that it works for reading and writing, stores it,
and deletes the old one once rotation_grace_period has passed. The new key is
never shown: afterwards only this engine knows it. config/rotate and
rotate-root are the same.

A superseded key that is used more than three minutes after it was superseded
is kept instead, until seven days after that: another Vault uses it, for
example a copy that was restored from a snapshot. With rotation_grace_period=0,
after any shortening of rotation_grace_period, and with force=true, superseded
keys are deleted whoever uses them. force=true and 0 do so at once and for all of
them. With force=true the answer names those that the current key does not see;
the engine forgets them, delete them at OpenAI. Without force a rotation is
refused while five superseded keys wait for the end of their grace period; one on
schedule is not.

An admin key that was written to the config of two mounts stops working in the
second one when the first one rotates it. Give each mount a key of its own.
`),
	}
}

func (b *backend) rotateWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	// A rotation once begun is finished whether or not its client waits.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestBudget)
	defer cancel()
	cfg, note, warnings, err := b.rotateAdminKey(ctx, req, d.Get("force").(bool))
	if err != nil { // a rotation on schedule says so itself
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
		what := "admin key not rotated, the old one stays in force"
		if d.Get("force").(bool) {
			what += "; to end superseded keys without a new one, write rotation_grace_period=0 to the config"
		}
		return failure(what, err)
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
