package openaisecrets

// This file owns the paths of roles: their fields, and how a role is written, read
// and deleted. role.go, role_pool.go and role_spend.go have how a write changes each
// field.
//
// What must stay true: a write that narrows a role does not need OpenAI; a check has
// no effect at OpenAI.

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/naming"
)

func (b *backend) pathRoles() *framework.Path {
	return pathNames("roles", "roles", roleStoragePrefix, communityRolePrefix)
}

func (b *backend) pathRole() *framework.Path {
	fields := map[string]*framework.FieldSchema{
		"project_id": {
			Type:         framework.TypeString,
			Description:  "ID of the project. Defaults to the config's project_id and is required without one.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Project ID"},
		},
		"service_account_name_template": {
			Type: framework.TypeString,
			Description: "Template of the service account names, or of the key names with credential_type=api_key. It must contain .RandomSuffix. " +
				"The engine shortens names to 64 characters and replaces unusual characters with dashes. Default " + naming.DefaultTemplate + ".",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account name template"},
		},
		"service_account_description": {
			Type:         framework.TypeString,
			Description:  "Note on the purpose of the account, stored only in Vault.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Description"},
		},
		"ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "Default TTL of leases. 0 uses the shortest of 1h, max_ttl, and the mount's default_lease_ttl.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "TTL"},
		},
		"max_ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "Maximum TTL of leases, including renewals. 0 uses the default of 24h.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum TTL"},
		},
		"scopes": {
			Type:         framework.TypeCommaStringSlice,
			Description:  "Scopes of the keys, such as api.model.request. An empty list allows everything that the account can do.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Scopes"},
		},
		"key_expiry": {
			Type:          framework.TypeString,
			Description:   "When a key expires at OpenAI: max_ttl (after its lease's maximum TTL; the default), ttl (after the current TTL; a renewal extends it), or none (never).",
			AllowedValues: []any{expiryMaxTTL, expiryTTL, expiryNone},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Key expiry"},
		},
		"credential_type": {
			Type:          framework.TypeString,
			Description:   "Credential of a lease: service_account (a new account with a key; the default) or api_key (a new key of service_account_id).",
			AllowedValues: []any{typeAccount, typeKey},
			DisplayAttrs:  &framework.DisplayAttributes{Name: "Credential type"},
		},
		"service_account_id": {
			Type:         framework.TypeString,
			Description:  "ID of an existing service account, which the engine never deletes. Only with credential_type=api_key.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account ID"},
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
		"pool_size": {
			Type:         framework.TypeInt,
			Description:  "Number of keys to keep ready: up to 100, and up to 500 for all roles of a mount. 0 disables the pool.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Pool size"},
		},
		"pool_max_age": {
			Type:         framework.TypeDurationSecond,
			Description:  "Maximum time that a key waits in the pool: 10m to 7d. 0 uses the default of 6h.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Pool maximum age"},
		},
	}
	addSpendFields(fields, actionWarn, actionBlock, actionRevoke)
	responseFields := map[string]*framework.FieldSchema{
		"effective_project_id":   {Type: framework.TypeString, Description: "Project of new credentials.", Required: true},
		"effective_ttl":          {Type: framework.TypeInt, Description: "TTL of new leases, limited by the mount and OpenAI.", Required: true},
		"effective_max_ttl":      {Type: framework.TypeInt, Description: "Maximum TTL of new leases, limited by the mount and OpenAI.", Required: true},
		"effective_key_lifetime": {Type: framework.TypeInt, Description: "Lifetime of new keys at OpenAI; 0 if they do not expire.", Required: true},
		"effective_pool_max_age": {Type: framework.TypeInt, Description: "Value in use of pool_max_age, in seconds.", Required: true},
		"pool_ready":             {Type: framework.TypeInt, Description: "Keys in the pool of this cluster; null on a performance standby.", Required: true},
		"pool_refilling":         {Type: framework.TypeBool, Description: "Whether a key is being created for the pool; null on a performance standby.", Required: true},
		"pool_last_error":        {Type: framework.TypeString, Description: "Error of the last refill of the pool; empty after a success.", Required: true},
	}
	spendResponse(responseFields)
	for name, field := range fields {
		responseFields[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
	}
	spelling := spelled(fields, "service_account_name_template", "spend_limit")
	addEffective(responseFields, spelling)
	fields["name"] = roleNameField()

	write := &framework.PathOperation{
		Callback: rejectUnknownFields(func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
			return b.roleWrite(ctx, req, d, spelling)
		}),
		Summary:                     "Create or change a role.",
		Responses:                   noContent("Role stored."),
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
				Responses: okFields("The role.", responseFields),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.roleDelete,
				Summary:                     "Delete a role.",
				Responses:                   noContent("Role deleted, or not found."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
			r, err := getRole(ctx, req.Storage, d.Get("name").(string))
			return r != nil, err
		},
		HelpSynopsis: "Manage the roles that credentials are issued for.",
		HelpDescription: strings.TrimSpace(`
A role sets the project, name, scopes, and lifetime of the credentials that the
engine creates for it. A write that sets only some fields keeps the others. A
change does not affect the keys of existing leases. After a role is deleted, its
leases can be revoked but not renewed.

OpenAI enforces the scopes and publishes no list of them. The engine passes them
on unchanged, and the error of a rejected scope names it. With
credential_type=api_key, the role leases keys of an existing service account.
Such a credential takes one call to create, and all of them count as one account
in OpenAI's usage reports. The engine never deletes that account.
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
		"effective_pool_max_age": int64(r.poolMaxAge() / time.Second),
	} {
		data[field] = value
	}
	b.showPool(name, data)
	if err := b.showState(ctx, req, name, r.spendRule, data); err != nil {
		return nil, err
	}
	resp := &logical.Response{Data: data}
	if err := naming.Check(r.NameTemplate, name, r.ProjectID); err != nil {
		// The community plugin stored it, or an earlier version with fewer rules.
		resp.AddWarning(fmt.Sprintf("This role cannot issue credentials until you change service_account_name_template: %s", err))
	}
	return resp, nil
}

func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if r, err := b.roles.get(ctx, req.Storage, name); err != nil || r != nil && r.SpendLimit > 0 {
		if err := b.states.reconsider(ctx, req.Storage, name); err != nil { // it may be written again
			return nil, fmt.Errorf("deleting the role: %w", err)
		}
	}
	always := func() error { return nil }
	err := b.changeRole(ctx, req, name, nil, always, func() error { return deleteRole(ctx, req.Storage, name) })
	if err != nil {
		return nil, fmt.Errorf("deleting the role: %w", err)
	}
	shown := client.HideKeys(name) // the community plugin accepts any name
	b.events.Emit(events.RoleDelete, req.MountPoint, "roles/"+shown, true, "name", shown)
	b.log(req).Info("role deleted", "role", shown)
	return nil, nil
}

// errRoleChanged means that the role has changed since this write read it.
var errRoleChanged = errors.New("the role has changed during its write")

// roleWrite repeats a write during which the role changed. No lock is held while OpenAI
// answers, so that a write that narrows the role waits for no other write.
func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string) (resp *logical.Response, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	for again := false; ; again = true {
		resp, err = b.mergeAndStoreRole(ctx, req, d, spelling, again)
		if !errors.Is(err, errRoleChanged) {
			return resp, err
		}
	}
}

func (b *backend) mergeAndStoreRole(ctx context.Context, req *logical.Request, d *framework.FieldData, spelling []string, again bool) (*logical.Response, error) {
	name := d.Get("name").(string)
	if len(name) > maxRoleName {
		return logical.ErrorResponse("the role name has %d characters; the limit is %d", len(name), maxRoleName), nil
	}
	old, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if again && old == nil { // this would create one without its other fields, such as its scopes
		return logical.ErrorResponse("role %q not stored: it was deleted during the write; to create it again, write all its fields", name), nil
	}
	r, problem := mergeRole(old, name, d)
	if problem == "" {
		problem = r.mergePool(d)
	}
	if problem == "" {
		problem = r.merge(d, actionWarn, actionBlock, actionRevoke)
	}
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
		return logical.ErrorResponse("role %q: project_id is required, because the config has no default; run \"vault list %sprojects\" to list projects", name, req.MountPoint), nil
	}
	if problem, err := b.checkRole(ctx, req, snap, cfg, old, r, response); err != nil {
		return errorResponse(fmt.Sprintf("role %q not stored", name), err)
	} else if problem != nil {
		return logical.ErrorResponse("role %q: %s", name, problem), nil
	}
	if err := b.guardWrite(ctx, req, snap, project, r.Scopes, r.widens(old, cfg), response); err != nil {
		return errorResponse(fmt.Sprintf("role %q not stored", name), err)
	}
	if old != nil && len(old.Scopes) > 0 && len(r.Scopes) == 0 {
		response.AddWarning("The role no longer has scopes: new keys can do everything that their account can do.")
	}
	if r.KeyExpiry == expiryNone {
		response.AddWarning("With key_expiry=none, a key that Vault cannot delete, for example after a loss of storage, stays valid until you delete it at OpenAI.")
	}

	if mountMax := b.System().MaxLeaseTTL(); mountMax > 0 && r.MaxTTL > mountMax {
		response.AddWarning(fmt.Sprintf("max_ttl %s exceeds the max_lease_ttl of the mount: leases expire after %s.", r.MaxTTL, mountMax))
	}
	life, mountDefault := r.lifetime(b.System(), 0), b.System().DefaultLeaseTTL()
	// No warning about the default of an untuned mount, or about one that exceeds the
	// role's maximum.
	shorter := life.TTL < min(defaultTTL, r.maxTTL())
	longer := mountDefault > life.TTL && mountDefault <= life.Max && mountDefault != untunedTTL
	if r.TTL == 0 && (shorter || longer) {
		response.AddWarning(fmt.Sprintf("The role has no ttl: the TTL of leases is %s, the shortest of %s, max_ttl, and the mount's default_lease_ttl (%s). To change it, set ttl.", life.TTL, defaultTTL, mountDefault))
	}
	switch {
	case r.KeyExpiry == expiryMaxTTL && r.MaxTTL > maxLease:
		response.AddWarning(fmt.Sprintf("max_ttl %s exceeds the maximum key lifetime at OpenAI: leases expire after %s. With key_expiry=ttl, renewals can extend leases beyond that.", r.MaxTTL, maxLease))
	case r.KeyExpiry == expiryTTL && r.TTL > maxLease:
		response.AddWarning(fmt.Sprintf("ttl %s exceeds the maximum key lifetime at OpenAI: the TTL of leases is %s, and renewals can extend it.", r.TTL, maxLease))
	}

	release, problem, err := b.admitPool(ctx, req, name, old, r)
	if err != nil {
		return nil, fmt.Errorf("role %q not stored: %w", name, err)
	}
	if problem != "" {
		return logical.ErrorResponse("role %q: %s", name, problem), nil
	}
	defer release()
	b.warnOfPool(name, project, r, snap, response)

	if err := b.raiseLongestLease(ctx, req.Storage, r.longestLife()); err != nil {
		return nil, fmt.Errorf("role %q not stored: %w", name, err)
	}
	if err := b.recordProject(ctx, req.Storage, project); err != nil {
		return nil, fmt.Errorf("role %q not stored: %w", name, err)
	}
	r.Version = roleVersion
	if r.SpendLimit > 0 {
		unlock, err := b.shareConfig(ctx, req, &r.spendRule)
		if err != nil {
			return errorResponse(fmt.Sprintf("role %q not stored", name), err)
		}
		defer unlock()
	}
	if old != nil && old.SpendLimit > 0 && old.spendRule != r.spendRule {
		if err := b.states.reconsider(ctx, req.Storage, name); err != nil {
			return nil, fmt.Errorf("role %q not stored: %w", name, err)
		}
	}
	unchanged := func() error {
		now, err := getRole(ctx, req.Storage, name)
		if err == nil && !reflect.DeepEqual(now, old) {
			err = errRoleChanged
		}
		return err
	}
	err = b.changeRole(ctx, req, name, r, unchanged, func() error {
		return writeEntry(ctx, req.Storage, roleStoragePrefix+name, fmt.Sprintf("role %q", name), r)
	})
	if err != nil {
		return nil, err
	}
	b.states.compareAgain()
	b.servePools(req) //nolint:contextcheck // it outlives the request
	b.events.Emit(events.RoleWrite, req.MountPoint, req.Path, true, "name", name, "project_id", project)
	b.log(req).Info("role stored", "role", name, "project_id", project)
	return omitEmpty(response), nil
}

// shareConfig shares the config's lock if the config has what a limit needs.
func (b *backend) shareConfig(ctx context.Context, req *logical.Request, s *spendRule) (unlock func(), err error) {
	unlock, err = b.pools.answers.Share(ctx, configAnswers)
	if err != nil {
		return nil, fmt.Errorf("waiting for a write of the config: %w", err)
	}
	var cfg *config
	snap, err := b.current(ctx, req.Storage)
	if snap != nil {
		cfg = snap.config
	}
	if errors.Is(err, errNotConfigured) || err == nil {
		err = asClientError(s.lacks(cfg))
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// checkRole verifies with OpenAI the project and the account of a role, if they
// changed: a write that narrows a role must not need OpenAI. It waits for it, at most
// nameBudget, only if the account was stored without an admin key. A problem rejects the
// role; an error comes from OpenAI.
func (b *backend) checkRole(ctx context.Context, req *logical.Request, snap *snapshot, cfg *config, old, r *role, response *logical.Response) (problem, err error) {
	project := r.project(cfg)
	moved := old == nil || old.project(cfg) != project
	adopted := r.CredentialType == typeKey && (moved || old.CredentialType != typeKey || old.ServiceAccountID != r.ServiceAccountID)
	if snap == nil {
		if moved || adopted {
			response.AddWarning("Project " + project + " was not verified: no admin key is configured.")
		}
		if adopted {
			response.AddWarning("Service account " + r.ServiceAccountID + " was not verified: no admin key is configured.")
		}
		return nil, nil
	}
	if moved {
		if problem, err = checkProject(ctx, req, snap.api, project); problem != nil || err != nil {
			return problem, err
		}
	}
	unread := r.CredentialType == typeKey && r.ServiceAccount == "" // stored without an admin key
	if !adopted && !unread {
		return nil, nil
	}
	if !adopted { // only reads of the role need the name
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, nameBudget)
		defer cancel()
	}
	r.ServiceAccount, problem, err = checkAdopted(ctx, snap.api, snap.tag, project, r.ServiceAccountID, response)
	if failure := errors.Join(problem, err); failure != nil && !adopted {
		response.AddWarning(fmt.Sprintf("Service account %s was not verified: %s", r.ServiceAccountID, failure))
		return nil, nil
	}
	return problem, err
}
