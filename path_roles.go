package openaisecrets

// This file owns the paths of roles: their fields, and how a role is written, read
// and deleted. What a write makes of each field is in role.go.
//
// What must stay true: narrowing a role needs nothing of OpenAI; a check has no
// effect there.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
)

func (b *backend) pathRoles() *framework.Path {
	return pathNames("roles", "roles", roleStoragePrefix, communityRolePrefix)
}

func (b *backend) pathRole() *framework.Path {
	fields := map[string]*framework.FieldSchema{
		"project_id": {
			Type:         framework.TypeString,
			Description:  "ID of the project in which service accounts are made; `vault list` of the projects path shows them. Required unless the config has one.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Project ID"},
		},
		"service_account_name_template": {
			Type: framework.TypeString,
			Description: "Template of the accounts' names, with .RoleName, .DisplayName, .ProjectID, .UnixTime and .RandomSuffix, of which the last is required, {{if}}, and the functions that the documentation lists. " +
				"Names are cut to 64 characters around the suffix; other characters than letters, digits, spaces and ._@- become dashes. With credential_type=api_key it names the keys. Default " + naming.DefaultTemplate + ".",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account name template"},
		},
		"service_account_description": {
			Type:         framework.TypeString,
			Description:  "A note on what the accounts are for. Recorded in the role only: OpenAI's API has no such field.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Description"},
		},
		"ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a lease lasts unless it is renewed. 0 = the default: the shortest of 1h, max_ttl and the mount's default_lease_ttl.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "TTL"},
		},
		"max_ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a lease can last with renewals; by default the key expires at OpenAI shortly after. 0 = the default, 24h.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum TTL"},
		},
		"scopes": {
			Type:         framework.TypeCommaStringSlice,
			Description:  "What the keys may do, as OpenAI's identifiers, such as api.model.request. None = all that the account may do in its project.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Scopes"},
		},
		"key_expiry": {
			Type:          framework.TypeString,
			Description:   "When a key expires at OpenAI by itself: max_ttl (after the longest life of its lease; the default), ttl (after the lease; each renewal moves it at OpenAI first) or none (never; such a key outlives its lease if Vault cannot delete it).",
			AllowedValues: []any{expiryMaxTTL, expiryTTL, expiryNone},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Key expiry"},
		},
		"credential_type": {
			Type:          framework.TypeString,
			Description:   "What a lease is: service_account (an account of its own; the default) or api_key (a key of the existing service_account_id).",
			AllowedValues: []any{typeAccount, typeKey},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Credential type"},
		},
		"service_account_id": {
			Type:         framework.TypeString,
			Description:  "ID of the existing service account, in the role's project, whose keys are leased. With credential_type=api_key only, and required there. This engine never deletes it.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account ID"},
		},
		"activation_timeout": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long to wait until OpenAI accepts a new key before it is handed out: 0 (hand it out untried) to 45s. What happens to a key that is not accepted by then is up to activation_failure. Default 10s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Activation timeout"},
		},
		"activation_failure": {
			Type:          framework.TypeString,
			Description:   "What happens to a new key that OpenAI has not accepted within activation_timeout, or of which that could not be found out: error (it is destroyed and the read fails; the default) or warn (it is handed out with a warning).",
			AllowedValues: []any{string(activationError), string(activationWarn)},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Activation failure"},
		},
	}
	answer := map[string]*framework.FieldSchema{
		"effective_project_id":   {Type: framework.TypeString, Description: "The project in which credentials are made: the role's or else the config's; empty without either.", Required: true},
		"effective_ttl":          {Type: framework.TypeInt, Description: "How long a lease lasts at first, in seconds, within what the mount and OpenAI allow.", Required: true},
		"effective_max_ttl":      {Type: framework.TypeInt, Description: "How long a lease can last, in seconds, within what the mount and OpenAI allow.", Required: true},
		"effective_key_lifetime": {Type: framework.TypeInt, Description: "How long a key lives at OpenAI from its creation, in seconds; 0 = it does not expire.", Required: true},
	}
	for name, field := range fields {
		answer[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
	}
	spelling := spelled(fields, "service_account_name_template")
	addEffective(answer, spelling)
	fields["name"] = roleNameField()

	write := &framework.PathOperation{
		Callback: strict(func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
			return b.roleWrite(ctx, req, d, spelling)
		}),
		Summary:                     "Create or change a role.",
		Responses:                   noContent("Stored."),
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
	return &framework.Path{
		Pattern:      "roles/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "role"},
		Fields:       fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
					return b.roleRead(ctx, req, d, spelling)
				},
				Summary:   "Read a role.",
				Responses: okFields("The role.", answer),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.roleDelete,
				Summary:                     "Delete a role.",
				Responses:                   noContent("Deleted."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
			r, err := getRole(ctx, req.Storage, d.Get("name").(string))
			return r != nil, err
		},
		HelpSynopsis: "Manage the roles for which credentials are issued.",
		HelpDescription: strings.TrimSpace(`
A role says in which project an account is made for each lease, how the account
is named, what its key may do and how long the lease lasts. A write that names
only some fields keeps the others. Live leases keep their key as it was made;
those of a deleted role can still be revoked, but no longer be renewed.

OpenAI enforces the scopes, and publishes no list of them: they are passed on as
they are, and a refusal names the one that was not taken. With
credential_type=api_key the role leases keys of an account that exists already,
which takes one call and keeps OpenAI's usage figures by account readable; the
account itself is never deleted.
`),
	}
}

func (b *backend) roleRead(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string) (*logical.Response, error) {
	name := d.Get("name").(string)
	r, err := getRole(ctx, req.Storage, name)
	if r == nil || err != nil {
		return nil, err
	}
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	life := r.lifetime(b.System(), 0)
	data := r.fields()
	r.AsWritten.show(data, spelling)
	for field, value := range map[string]any{
		"effective_project_id":   r.project(cfg),
		"effective_ttl":          int64(life.TTL / time.Second),
		"effective_max_ttl":      int64(life.Max / time.Second),
		"effective_key_lifetime": int64(life.Key / time.Second),
	} {
		data[field] = value
	}
	resp := &logical.Response{Data: data}
	if err := naming.Check(r.NameTemplate, name, r.ProjectID); err != nil {
		// As stored by the community plugin, or before a rule was added.
		resp.AddWarning(fmt.Sprintf("This role issues no credentials until service_account_name_template is changed: %s", err))
	}
	return resp, nil
}

func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	err := b.roles.change(name, func() error { return deleteRole(ctx, req.Storage, name) })
	if err != nil {
		return nil, fmt.Errorf("deleting the role: %w", err)
	}
	shown := client.HideKeys(name) // of what the community plugin stored
	b.notify(eventRoleDelete, req.MountPoint, "roles/"+shown, true, "name", shown)
	b.log(req).Info("role deleted", "role", shown)
	return nil, nil
}

func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	name := d.Get("name").(string)
	if len(name) > maxRoleName {
		return logical.ErrorResponse("the role's name is %d characters long; the limit is %d", len(name), maxRoleName), nil
	}
	old, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	r, problem := mergeRole(old, name, d)
	if problem != "" {
		return logical.ErrorResponse("role %q: %s", name, problem), nil
	}

	r.AsWritten = r.AsWritten.note(d, r.fields(), spelling)

	response := &logical.Response{}
	snap, err := b.current(ctx, req.Storage)
	if err != nil && !errors.Is(err, errNotConfigured) {
		return nil, err
	}
	var cfg *config
	if snap != nil {
		cfg = snap.config
	}
	project := r.project(cfg)
	if project == "" {
		return logical.ErrorResponse("role %q: project_id is required, since the config has none; `vault list %sprojects` shows those there are", name, req.MountPoint), nil
	}
	if problem, err := b.checkRole(ctx, req, snap, cfg, old, r, response); err != nil {
		return failure(fmt.Sprintf("role %q not stored", name), err)
	} else if problem != nil {
		return logical.ErrorResponse("role %q: %s", name, problem), nil
	}
	if old != nil && len(old.Scopes) > 0 && len(r.Scopes) == 0 {
		response.AddWarning("The role has no scopes any more: new keys can do all that their account may do.")
	}
	if r.KeyExpiry == expiryNone {
		response.AddWarning("With key_expiry=none a key that Vault cannot delete, for one because its storage is lost, works until somebody deletes it by hand.")
	}

	if mountMax := b.System().MaxLeaseTTL(); mountMax > 0 && r.MaxTTL > mountMax {
		response.AddWarning(fmt.Sprintf("max_ttl %s is longer than the mount allows: leases end after %s (max_lease_ttl of the mount).", r.MaxTTL, mountMax))
	}
	life, mountDefault := r.lifetime(b.System(), 0), b.System().DefaultLeaseTTL()
	// Of an untuned mount's, and of one that no lease of the role could have, there is
	// nothing to say.
	shorter := life.TTL < min(defaultTTL, r.maxTTL())
	longer := mountDefault > life.TTL && mountDefault <= life.Max && mountDefault != untunedTTL
	if r.TTL == 0 && (shorter || longer) {
		response.AddWarning(fmt.Sprintf("The role has no ttl: leases last %s at first, the shortest of %s, max_ttl and the mount's default_lease_ttl (%s). Set ttl for another length.", life.TTL, defaultTTL, mountDefault))
	}
	switch {
	case r.KeyExpiry == expiryMaxTTL && r.MaxTTL > maxLease:
		response.AddWarning(fmt.Sprintf("max_ttl %s is longer than a key can live at OpenAI: leases end after %s. With key_expiry=ttl renewals can go beyond.", r.MaxTTL, maxLease))
	case r.KeyExpiry == expiryTTL && r.TTL > maxLease:
		response.AddWarning(fmt.Sprintf("ttl %s is longer than a key can live at OpenAI: leases last %s, and longer with renewals.", r.TTL, maxLease))
	}

	if err := b.raiseLongestLease(ctx, req.Storage, r.maxTTL()); err != nil {
		return nil, fmt.Errorf("role %q not stored: %w", name, err)
	}
	if err := recordProject(ctx, req.Storage, project); err != nil {
		return nil, fmt.Errorf("role %q not stored: %w", name, err)
	}
	r.Version = roleVersion
	entry, err := logical.StorageEntryJSON(roleStoragePrefix+name, r)
	if err != nil {
		return nil, err
	}
	err = b.roles.change(name, func() error { return req.Storage.Put(ctx, entry) })
	if err != nil {
		return nil, fmt.Errorf("storing role %q: %w", name, err)
	}
	b.notify(eventRoleWrite, req.MountPoint, req.Path, true, "name", name, "project_id", project)
	b.log(req).Info("role stored", "role", name, "project_id", project)
	return unlessEmpty(response), nil
}

// checkRole asks OpenAI about the project and the account of a role. What it was
// asked before it is not asked again: narrowing a role must not wait for OpenAI. A
// problem says why the role cannot be stored; an error is OpenAI's.
func (b *backend) checkRole(ctx context.Context, req *logical.Request, snap *snapshot, cfg *config, old, r *role, response *logical.Response) (problem, err error) {
	project := r.project(cfg)
	moved := old == nil || old.project(cfg) != project
	adopted := r.CredentialType == typeKey && (moved || old.CredentialType != typeKey || old.ServiceAccountID != r.ServiceAccountID)
	if snap == nil {
		if moved || adopted {
			response.AddWarning("Project " + project + " was not checked: the engine has no admin key yet.")
		}
		if adopted {
			response.AddWarning("Service account " + r.ServiceAccountID + " was not checked: the engine has no admin key yet.")
		}
		return nil, nil
	}
	if moved {
		if problem, err = checkProject(ctx, req, snap.api, project); problem != nil || err != nil {
			return problem, err
		}
	}
	unread := r.CredentialType == typeKey && r.ServiceAccount == "" // as when there was no admin key
	if !adopted && !unread {
		return nil, nil
	}
	if !adopted { // nothing waits for a name that only reads show
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, nameBudget)
		defer cancel()
	}
	r.ServiceAccount, problem, err = checkAdopted(ctx, snap.api, snap.tag, project, r.ServiceAccountID, response)
	if failure := errors.Join(problem, err); failure != nil && !adopted {
		response.AddWarning(fmt.Sprintf("Service account %s was not checked: %s", r.ServiceAccountID, failure))
		return nil, nil
	}
	return problem, err
}
