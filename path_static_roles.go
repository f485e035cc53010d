package openaisecrets

// This file owns the paths of static roles: how one is written, read, listed
// and deleted. How its key is replaced is in static_rotate.go.
//
// What must stay true: a refused write leaves the role as it was; deleting a
// role deletes what this engine made for it, and never an adopted account.

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

func (b *backend) pathStaticRoles() *framework.Path {
	return pathNames("static-roles", "static roles", staticStoragePrefix)
}

func (b *backend) pathStaticRole() *framework.Path {
	fields := map[string]*framework.FieldSchema{
		"project_id": {
			Type:         framework.TypeString,
			Description:  "ID of the project in which the service account is, or is made. The config's, if there is one, when it is not given. It cannot be changed.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Project ID"},
		},
		"service_account_id": {
			Type:         framework.TypeString,
			Description:  "ID of an existing service account to adopt: its keys are made and deleted here, it itself is never deleted. Without it an account is made, which ends with the role. It cannot be changed.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account ID"},
		},
		"service_account_description": {
			Type:         framework.TypeString,
			Description:  "A note on what the account is for. Recorded in the role only: OpenAI's API has no such field.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Description"},
		},
		"scopes": {
			Type:         framework.TypeCommaStringSlice,
			Description:  "What the key may do, as OpenAI's identifiers, such as api.model.request. None = all that the account may do. A change rotates the key at once; the old one lives on for revocation_delay.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Scopes"},
		},
		"revocation_delay": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a replaced key lives on, for those who have not read the new one yet: 0 to the rotation period, or to the time between two rotations of the schedule. A shorter one applies to the keys that already wait. Default 6m, or that time if it is shorter, which follows the schedule.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Revocation delay"},
		},
		"key_ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a key lives at OpenAI if no rotation replaces it: long enough for the next rotation and revocation_delay, a year at most. 0 = the default, three rotations and revocation_delay, and a week at least.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Key TTL"},
		},
		"activation_timeout": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long to wait until OpenAI accepts a new key before it replaces the old one: 0 (not at all) to 45s. Default 10s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Activation timeout"},
		},
		"activation_failure": {
			Type:          framework.TypeString,
			Description:   "What happens to a new key that OpenAI has not accepted within activation_timeout, or of which that could not be found out: error (it is destroyed and the old key stays in force; the default) or warn (it replaces the old key, with a warning).",
			AllowedValues: []any{string(activationError), string(activationWarn)},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Activation failure"},
		},
	}
	addScheduleFields(fields)
	fields["disable_automated_rotation"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Pause rotation: keep the schedule and the key, which ends at api_key_expires_at. false resumes it, with a rotation at once if one is due.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Disable automated rotation"},
	}
	answer := map[string]*framework.FieldSchema{
		"effective_key_ttl":       {Type: framework.TypeInt, Description: "How long a key made now lives at OpenAI if no rotation replaces it, in seconds.", Required: true},
		"service_account":         {Type: framework.TypeString, Description: "Name of the service account; of an adopted one, its name when it was adopted.", Required: true},
		"service_account_adopted": {Type: framework.TypeBool, Description: "Whether the account was there before the role, and stays after it.", Required: true},
		"api_key_id":              {Type: framework.TypeString, Description: "ID of the key in force.", Required: true},
		"api_key_expires_at":      {Type: framework.TypeString, Description: "When that key expires at OpenAI if no rotation replaces it (RFC 3339).", Required: true},
		"retired_keys":            {Type: framework.TypeInt, Description: "How many replaced keys are not deleted yet.", Required: true},
		"kept_keys":               {Type: framework.TypeInt, Description: "How many of them are kept beyond revocation_delay since they are still used.", Required: true},
		"last_vault_rotation":     {Type: framework.TypeString, Description: "When the key was put in force (RFC 3339).", Required: true},
		"next_vault_rotation":     {Type: framework.TypeString, Description: "When it is to be replaced next (RFC 3339); null while rotation is paused.", Required: true},
		"last_rotation_error":     {Type: framework.TypeString, Description: "Why the last rotation on schedule failed; empty after a success.", Required: true},
		"next_rotation_retry":     {Type: framework.TypeString, Description: "When a rotation that has failed is tried again (RFC 3339), as far as this node knows; null without any.", Required: true},
	}
	for name, field := range fields {
		answer[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
	}
	spelling := spelled(fields, "project_id", "service_account_id")
	addEffective(answer, spelling)
	fields["name"] = roleNameField()
	write := &framework.PathOperation{
		Callback: strict(func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
			return b.staticRoleWrite(ctx, req, d, spelling)
		}),
		Summary:                     "Create or change a static role.",
		Responses:                   noContent("Stored."),
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
	return &framework.Path{
		Pattern:      "static-roles/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "static-role"},
		Fields:       fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
					return b.staticRoleRead(ctx, req, d, spelling)
				},
				Summary:   "Read a static role.",
				Responses: okFields("The static role.", answer),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.staticRoleDelete,
				Summary:                     "Delete a static role, its keys and the account that was made for it.",
				Responses:                   noContent("Deleted."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
			r, err := getStaticRole(ctx, req.Storage, d.Get("name").(string))
			return r != nil, err
		},
		HelpSynopsis: "Manage the static roles, for consumers that cannot use leases.",
		HelpDescription: strings.TrimSpace(`
A static role is one service account whose key is replaced by rotation_period or
by rotation_schedule (five cron fields, UTC, with rotation_window if a missed
rotation is to be made up for only that long). static-creds returns the key in
force. The account is made and named by this engine, or adopted by
service_account_id; deleting the role deletes its keys, and the account only if
it was made.

A new key is in force once OpenAI accepts it, and the old one lives on for
revocation_delay. Should Vault be gone, the key expires by itself after three
rotations were missed and not before a week, or after key_ttl.
`),
	}
}

func (b *backend) staticRoleRead(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string) (*logical.Response, error) {
	name := d.Get("name").(string)
	r, err := getStaticRole(ctx, req.Storage, name)
	if r == nil || err != nil {
		return nil, err
	}
	now := b.now()
	r.correct(now) // stored by the next pass
	data := r.fields()
	r.AsWritten.show(data, spelling)
	for field, value := range map[string]any{
		"effective_key_ttl":       int64(r.keyLife(now) / time.Second),
		"service_account":         r.ServiceAccount,
		"service_account_adopted": r.Adopted,
		"api_key_id":              r.Current.ID,
		"api_key_expires_at":      text.TimeOrNull(r.Current.ExpiresAt),
		"retired_keys":            len(r.Retired),
		"last_vault_rotation":     text.TimeOrNull(r.LastRotated),
		"next_vault_rotation":     text.TimeOrNull(r.next(now)),
		"last_rotation_error":     r.RotationError,
		"next_rotation_retry":     text.TimeOrNull(b.static.retry(name)),
	} {
		data[field] = value
	}
	resp := &logical.Response{Data: data}
	kept := 0
	for _, k := range r.Retired {
		if !k.kept() {
			continue
		}
		kept++
		resp.AddWarning(fmt.Sprintf("The replaced key %s was used at %s, after its end at %s, so it is kept until %s: another Vault, restored from a snapshot, may use it. `vault write %srotate-role/%s force=true` deletes it at once.",
			k.ID, text.Time(k.LastUsedAt), text.Time(k.DeleteAfter), text.Time(k.keptUntil(r.RevocationDelay)), req.MountPoint, name))
	}
	resp.Data["kept_keys"] = kept
	return resp, nil
}

func (b *backend) staticRoleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string) (*logical.Response, error) {
	name := d.Get("name").(string)
	if len(name) > maxRoleName {
		return logical.ErrorResponse("the role's name is %d characters long; the limit is %d", len(name), maxRoleName), nil
	}
	ctx, done, err := b.beginStatic(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	old, err := getStaticRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	label := fmt.Sprintf("static role %q", name)
	r, problem := mergeStaticRole(old, d, b.now())
	if problem != "" {
		return logical.ErrorResponse("%s: %s", label, problem), nil
	}
	rotates := old == nil || !sameScopes(old.Scopes, r.Scopes)
	var snap *snapshot
	if rotates { // the rest needs nothing of OpenAI's
		snap, err = b.current(ctx, req.Storage)
		if errors.Is(err, errNotConfigured) && !narrows(old, r) {
			return notConfigured(req), nil // there is a key to be made
		}
		if err != nil && !errors.Is(err, errNotConfigured) {
			return nil, err
		}
	}

	response := &logical.Response{}
	if old == nil {
		if r.ProjectID == "" {
			r.ProjectID = snap.config.ProjectID
		}
		if r.ProjectID == "" {
			return logical.ErrorResponse("%s: project_id is required, since the config has none; `vault list %sprojects` shows those there are", label, req.MountPoint), nil
		}
		refusal, err := checkProject(ctx, req, snap.api, r.ProjectID)
		if refusal == nil && err == nil && r.Adopted {
			r.ServiceAccount, refusal, err = checkAdopted(ctx, snap.api, snap.tag, r.ProjectID, r.ServiceAccountID, response)
		}
		switch {
		case err != nil:
			return failure(label+" not stored", err)
		case refusal != nil:
			return logical.ErrorResponse("%s: %s", label, refusal), nil
		}
		if err := recordProject(ctx, req.Storage, r.ProjectID); err != nil {
			return nil, fmt.Errorf("%s not stored: %w", label, err)
		}
	}

	// As it will be used: an account that is to be made has no ID yet, but one.
	used := r.fields()
	if old == nil && !r.Adopted {
		used["service_account_id"] = nil
	}
	r.AsWritten = r.AsWritten.note(d, used, spelling)
	if rotates {
		if old != nil && len(r.Scopes) == 0 {
			response.AddWarning("The role has no scopes any more: its key can do all that its account may do.")
		}
		next, warnings, err := b.rotateStatic(ctx, req, name, r, false)
		if unavailable(err) && narrows(old, r) {
			// What the role allows does not wait for OpenAI, though its key does.
			warning := fmt.Sprintf("The scopes are stored, but the key in force keeps its former ones until a rotation succeeds, which is tried again every few minutes: %s", err)
			if r.DisableAutomatedRotation {
				warning = fmt.Sprintf("The scopes are stored, but the key in force keeps its former ones until you run rotate-role or resume its rotation: %s", err)
			}
			warnings = append(warnings, warning)
			next, err = r, nil
			next.NextRotation = b.now().UTC().Truncate(time.Second)
			if err := putStaticRole(ctx, req.Storage, name, next); err != nil {
				b.static.lookAt(name, b.now())
				return nil, err
			}
			b.static.set(name, next.plan(b.now()))
		}
		switch {
		case errors.Is(err, errNotConfigured): // deleted meanwhile
			return notConfigured(req), nil
		case errors.Is(err, errWhichStaticKey):
			return nil, fmt.Errorf("%s: %w", label, err)
		case err != nil:
			return failure(label+" not stored", err)
		}
		r = next
		for _, warning := range warnings {
			response.AddWarning(warning)
		}
	} else {
		if err := putStaticRole(ctx, req.Storage, name, r); err != nil {
			b.static.lookAt(name, b.now())
			return nil, err
		}
		var warnings []string
		r, warnings = b.endUnwanted(ctx, req, name, r)
		for _, warning := range warnings {
			response.AddWarning(warning)
		}
		b.static.set(name, r.plan(b.now()))
	}
	if r.DisableAutomatedRotation {
		response.AddWarning(r.pausedText(req.MountPoint, name, b.now()))
	}
	b.notify(eventStaticWrite, req.MountPoint, req.Path, true, "name", name, "project_id", r.ProjectID)
	b.log(req).Info("static role stored", "static_role", name, "project_id", r.ProjectID, "adopted", r.Adopted)
	b.kickStatic(req)
	return unlessEmpty(response), nil
}

func (b *backend) staticRoleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	ctx, done, err := b.beginStatic(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := getStaticRole(ctx, req.Storage, name)
	if r == nil || err != nil {
		return nil, err
	}
	left, err := b.endStaticRole(ctx, req, name, r)
	if err != nil {
		return nil, err
	}
	if left == "" {
		return nil, nil
	}
	response := &logical.Response{}
	response.AddWarning("The role is deleted. Left to the journal, which deletes it at OpenAI as soon as it can: " + left)
	return response, nil
}
