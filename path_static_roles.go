package openaisecrets

// This file owns the paths of static roles: how one is written, read, listed, and
// deleted. static_rotate.go has how its key is rotated.
//
// What must stay true: a rejected write leaves the role unchanged; deleting a role
// deletes everything that the engine created for it, and never an adopted account.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/schedule"
	"vault-plugin-secrets-openai/internal/text"
)

func (b *backend) pathStaticRoles() *framework.Path {
	return pathNames("static-roles", "static roles", staticStoragePrefix)
}

func (b *backend) pathStaticRole() *framework.Path {
	fields := map[string]*framework.FieldSchema{
		"project_id": {
			Type:         framework.TypeString,
			Description:  "ID of the project. Defaults to the config's project_id and is required without one. Cannot be changed.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Project ID"},
		},
		"service_account_id": {
			Type:         framework.TypeString,
			Description:  "ID of an existing service account to adopt. If empty, the engine creates an account and deletes it with the role. Cannot be changed.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account ID"},
		},
		"service_account_description": {
			Type:         framework.TypeString,
			Description:  "Note on the purpose of the account, stored only in Vault.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Description"},
		},
		"scopes": {
			Type:         framework.TypeCommaStringSlice,
			Description:  "Scopes of the keys, such as api.model.request. An empty list allows everything that the account can do.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Scopes"},
		},
		"revocation_delay": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a superseded key stays valid: 0 to the time between two rotations. A reduction also applies to superseded keys, even if they are used. Default 6m.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Revocation delay"},
		},
		"key_ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "Lifetime of a key at OpenAI if no rotation replaces it: at most a year. 0 uses three rotations plus revocation_delay, and at least a week.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Key TTL"},
		},
		"activation_timeout": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long to wait until OpenAI accepts a new key: 0 to 45s; 0 skips the test. Default 10s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Activation timeout"},
		},
		"activation_failure": {
			Type:          framework.TypeString,
			Description:   "If OpenAI does not accept a new key in time: error (delete it and fail; the default) or warn (use it, with a warning).",
			AllowedValues: []any{string(activationError), string(activationWarn)},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Activation failure"},
		},
		"on_missing": {
			Type:          framework.TypeString,
			Description:   "Reaction to a key or account that others deleted at OpenAI: warn (warn readers; the default) or recreate (create it again, at most once a day; never an adopted account).",
			AllowedValues: []any{string(warnMissing), string(recreateMissing)},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "On missing"},
		},
	}
	addSpendFields(fields, actionWarn, actionBlock)
	schedule.AddFields(fields)
	fields["disable_automated_rotation"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Pause automatic rotation and keep the schedule.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Disable automated rotation"},
	}
	responseFields := map[string]*framework.FieldSchema{
		"effective_key_ttl":       {Type: framework.TypeInt, Description: "Lifetime of new keys at OpenAI if no rotation replaces them.", Required: true},
		"service_account":         {Type: framework.TypeString, Description: "Name of the service account that owns the key.", Required: true},
		"service_account_adopted": {Type: framework.TypeBool, Description: "Whether the role adopted the account.", Required: true},
		"api_key_id":              {Type: framework.TypeString, Description: "ID of the active key.", Required: true},
		"api_key_expires_at":      {Type: framework.TypeString, Description: "Expiry of the active key at OpenAI if no rotation replaces it (RFC 3339).", Required: true},
		"superseded_keys":         {Type: framework.TypeInt, Description: "Superseded keys that are not deleted yet.", Required: true},
		"retained_keys":           {Type: framework.TypeInt, Description: "Superseded keys retained beyond revocation_delay because they are used.", Required: true},
		"missing":                 {Type: framework.TypeString, Description: "What others deleted at OpenAI: api_key, service_account (with its keys), or empty.", Required: true},
		"missing_since":           {Type: framework.TypeString, Description: "Time of the first proof of that (RFC 3339), or null.", Required: true},
		"last_recreated":          {Type: framework.TypeString, Description: "When on_missing=recreate last created a key or account (RFC 3339), or null.", Required: true},
		"last_vault_rotation":     {Type: framework.TypeString, Description: "Time at which the key became active (RFC 3339).", Required: true},
		"next_vault_rotation":     {Type: framework.TypeString, Description: "Time of the next rotation (RFC 3339); null while rotation is paused.", Required: true},
		"last_rotation_error":     {Type: framework.TypeString, Description: "Error of the last automatic rotation; empty after a success.", Required: true},
		"next_rotation_retry":     {Type: framework.TypeString, Description: "When this node retries a failed rotation (RFC 3339), or null.", Required: true},
	}
	spendResponse(responseFields)
	for name, field := range fields {
		responseFields[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
	}
	spelling := spelled(fields, "project_id", "service_account_id", "spend_limit")
	addEffective(responseFields, spelling)
	fields["name"] = roleNameField()
	write := &framework.PathOperation{
		Callback: rejectUnknownFields(func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
			return b.staticRoleWrite(ctx, req, d, spelling)
		}),
		Summary:                     "Create or change a static role.",
		Responses:                   noContent("Static role stored."),
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
				Responses: okFields("The static role.", responseFields),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.staticRoleDelete,
				Summary:                     "Delete a static role, its keys, and the account created for it.",
				Responses:                   noContent("Static role deleted, or not found."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
			r, err := getStaticRole(ctx, req.Storage, d.Get("name").(string))
			return r != nil, err
		},
		HelpSynopsis: "Manage static roles, for consumers that cannot use leases.",
		HelpDescription: strings.TrimSpace(`
A static role manages one service account and rotates its key every
rotation_period or on a rotation_schedule. The schedule takes five cron fields in
UTC. With rotation_window, a missed rotation is made up only within that time.
static-creds returns the active key. The engine creates the account, unless
service_account_id adopts an existing one. Deleting the role deletes its keys,
and the account if the engine created it.

A new key becomes active once OpenAI accepts it, and the superseded key stays
valid for revocation_delay. If Vault is unavailable, the key expires at OpenAI
after key_ttl; by default, that is after three missed rotations, but not within
a week.
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
	r.correct(now) // the worker stores the correction
	data := r.fields()
	r.AsWritten.show(data, spelling)
	for field, value := range map[string]any{
		"effective_key_ttl":       int64(r.keyLife(now) / time.Second),
		"service_account":         r.ServiceAccount,
		"service_account_adopted": r.Adopted,
		"api_key_id":              r.Current.ID,
		"api_key_expires_at":      text.TimeOrNull(r.Current.ExpiresAt),
		"superseded_keys":         len(r.Superseded),
		"missing":                 r.Missing.what(),
		"missing_since":           text.TimeOrNull(r.Missing.since()),
		"last_recreated":          text.TimeOrNull(r.Recreated),
		"last_vault_rotation":     text.TimeOrNull(r.LastRotated),
		"next_vault_rotation":     text.TimeOrNull(r.next(now)),
		"last_rotation_error":     r.RotationError,
		"next_rotation_retry":     text.TimeOrNull(b.static.retry(name)),
	} {
		data[field] = value
	}
	if err := b.showState(ctx, req, staticLabel+name, r.spendRule, data); err != nil {
		return nil, err
	}
	resp := &logical.Response{Data: data}
	kept := 0
	for _, k := range r.Superseded {
		if !k.kept() {
			continue
		}
		kept++
		resp.AddWarning(fmt.Sprintf("Superseded key %s was used at %s, after its revocation was due at %s, so it is retained until %s: another Vault, such as a copy restored from a snapshot, may use it. To delete it immediately, run \"vault write %srotate-role/%s force=true\".",
			k.ID, text.Time(k.LastUsedAt), text.Time(k.DeleteAfter), text.Time(k.keptUntil(r.RevocationDelay)), req.MountPoint, name))
	}
	resp.Data["retained_keys"] = kept
	return resp, nil
}

func (b *backend) staticRoleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string) (*logical.Response, error) {
	name := d.Get("name").(string)
	if len(name) > maxRoleName {
		return logical.ErrorResponse("the role name has %d characters; the limit is %d", len(name), maxRoleName), nil
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
	if r.SpendLimit > 0 {
		unlock, err := b.pools.answers.Share(ctx, limitWrites)
		if err != nil {
			return nil, fmt.Errorf("%s not stored: waiting for a write of the config: %w", label, err)
		}
		defer unlock()
	}
	rotates := old == nil || !sameScopes(old.Scopes, r.Scopes) // other writes do not call OpenAI
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) && rotates && !narrows(old, r) {
		return notConfigured(req), nil // a new key requires the admin key
	}
	if err != nil && !errors.Is(err, errNotConfigured) {
		return nil, err
	}

	var cfg *config
	if snap != nil {
		cfg = snap.config
	}
	if problem := r.lacks(cfg); problem != "" {
		return logical.ErrorResponse("%s: %s", label, problem), nil
	}

	response := &logical.Response{}
	if old == nil {
		if r.ProjectID == "" {
			r.ProjectID = snap.config.ProjectID
		}
		if r.ProjectID == "" {
			return logical.ErrorResponse("%s: project_id is required, because the config has no default; run \"vault list %sprojects\" to list projects", label, req.MountPoint), nil
		}
		refusal, err := checkProject(ctx, req, snap.api, r.ProjectID)
		if refusal == nil && err == nil && r.Adopted {
			r.ServiceAccount, refusal, err = checkAdopted(ctx, snap.api, snap.tag, r.ProjectID, r.ServiceAccountID, response)
		}
		switch {
		case err != nil:
			return errorResponse(label+" not stored", err)
		case refusal != nil:
			return logical.ErrorResponse("%s: %s", label, refusal), nil
		}
		if err := b.recordProject(ctx, req.Storage, r.ProjectID); err != nil {
			return nil, fmt.Errorf("%s not stored: %w", label, err)
		}
	}

	if err := b.guardWrite(ctx, req, snap, r.ProjectID, r.Scopes, rotates && !narrows(old, r), response); err != nil {
		return errorResponse(label+" not stored", err)
	}

	// An account that is not created yet has no ID, so a written "" differs from it.
	used := r.fields()
	if old == nil && !r.Adopted {
		used["service_account_id"] = nil
	}
	r.AsWritten = r.AsWritten.note(d, used, spelling)
	if rotates {
		if old != nil && len(r.Scopes) == 0 {
			response.AddWarning("The static role no longer has scopes: its key can do everything that its account can do.")
		}
		next, warnings, err := b.rotateStatic(ctx, req, name, r, false)
		if unavailable(err) && narrows(old, r) {
			// Narrowing a role does not require OpenAI; only its key has to wait.
			warning := fmt.Sprintf("The scopes are stored, but the active key keeps its previous scopes until a rotation succeeds; the engine retries every few minutes: %s", err)
			if r.DisableAutomatedRotation {
				warning = fmt.Sprintf("The scopes are stored, but the active key keeps its previous scopes until you run rotate-role or resume rotation: %s", err)
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
		case errors.Is(err, errNotConfigured): // deleted since
			return notConfigured(req), nil
		case errors.Is(err, errWhichStaticKey):
			return nil, fmt.Errorf("%s: %w", label, err)
		case err != nil:
			return errorResponse(label+" not stored", err)
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
		r, warnings = b.deleteUnwanted(ctx, req, name, r)
		for _, warning := range warnings {
			response.AddWarning(warning)
		}
		b.static.set(name, r.plan(b.now()))
	}
	if r.Missing != nil { // on_missing may have changed
		s := r.suspicion()
		s.since = r.Missing.Since
		b.checks.suspect(name, s)
	}
	if r.DisableAutomatedRotation {
		response.AddWarning(r.pausedText(req.MountPoint, name, b.now()))
	}
	b.states.compareAgain()
	b.events.Emit(events.StaticRoleWrite, req.MountPoint, req.Path, true, "name", name, "project_id", r.ProjectID)
	b.log(req).Info("static role stored", "static_role", name, "project_id", r.ProjectID, "adopted", r.Adopted)
	b.startStaticWorker(req)
	return omitEmpty(response), nil
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
	left, err := b.deleteStaticIdentity(ctx, req, name, r)
	if err != nil {
		return nil, err
	}
	if left == "" {
		return nil, nil
	}
	response := &logical.Response{}
	response.AddWarning("The static role is deleted. Queued for deletion at OpenAI in the WAL: " + left)
	return response, nil
}
