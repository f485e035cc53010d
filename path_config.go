package openaisecrets

// This file owns the config path: its fields, the verification of a write with the
// API, and how the config is read and deleted. config.go has how a write changes each
// field.
//
// What must stay true: a rejected write leaves the stored config unchanged; a check
// has no effect at OpenAI; the admin key is never read back, and never sent to an
// endpoint that was not written together with it.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/schedule"
	"vault-plugin-secrets-openai/internal/text"
)

func (b *backend) pathConfig() *framework.Path {
	fields := map[string]*framework.FieldSchema{
		"admin_api_key": {
			Type:         framework.TypeString,
			Description:  `Admin key of the organization (sk-admin-...), with the permission "Organization Administration: Write". Never read back.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Admin API key", Sensitive: true},
		},
		"admin_api_key_id": {
			Type:         framework.TypeString,
			Description:  "ID of the admin key. Set it only if the engine's own lookup is ambiguous.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Admin API key ID"},
		},
		"organization_id": {
			Type:         framework.TypeString,
			Description:  "Organization ID for the OpenAI-Organization header. Usually not needed.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Organization ID"},
		},
		"project_id": {
			Type:         framework.TypeString,
			Description:  "Default project ID for roles.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Default project ID"},
		},
		"api_endpoint": {
			Type:         framework.TypeString,
			Description:  "Base URL of the API, with its version. Must use https, or http for a loopback address. A change requires admin_api_key in the same write. Default " + client.DefaultBaseURL + ".",
			DisplayAttrs: &framework.DisplayAttributes{Name: "API endpoint"},
		},
		"allow_insecure_endpoint": {
			Type:         framework.TypeBool,
			Description:  "Allow http to other than loopback addresses, which sends the admin key in plaintext.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Allow insecure endpoint"},
		},
		"ca_cert": {
			Type:         framework.TypeString,
			Description:  "PEM bundle of the only CAs to trust for the endpoint. Adding certificates or clearing the field requires admin_api_key in the same write.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificates", EditType: "file"},
		},
		"rotation_grace_period": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a superseded admin key stays valid: 0 to 7 days. A reduction also applies to superseded keys, even if they are used. Default 5m.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Rotation grace period"},
		},
		"request_timeout": {
			Type:         framework.TypeDurationSecond,
			Description:  "Timeout of each HTTP request to OpenAI: 1s to 60s. Default 30s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Request timeout"},
		},
		"max_concurrent_requests": {
			Type:         framework.TypeInt,
			Description:  "Maximum number of concurrent requests to OpenAI: 4 to 1024. Default 256.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum concurrent requests"},
		},
		"tidy_interval": {
			Type:         framework.TypeDurationSecond,
			Description:  "Interval between automatic tidy runs: 1m to 30 days; 0 disables them. Default 12h.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Tidy interval"},
		},
		"tidy_safety_buffer": {
			Type:         framework.TypeDurationSecond,
			Description:  "Minimum age of the accounts that tidy considers: 1s to 30 days. Default 10m.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Tidy safety buffer"},
		},
		"require_spend_limit": {
			Type:         framework.TypeBool,
			Description:  "Reject roles, static roles, and requests for their keys unless their project has a hard spend limit at OpenAI.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Require spend limit"},
		},
		"require_model_allow_list": {
			Type:         framework.TypeBool,
			Description:  "Reject roles, static roles, and requests for their keys unless their project has a list of allowed models at OpenAI.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Require model allow list"},
		},
		"require_scopes": {
			Type:         framework.TypeBool,
			Description:  "Reject roles and static roles without scopes, and requests for their keys.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Require scopes"},
		},
	}
	fields["usage_interval"] = &framework.FieldSchema{
		Type:         framework.TypeDurationSecond,
		Description:  "Interval between refreshes of the usage metrics, each of one or more calls to OpenAI's Costs API: 5m to 24h; 0 disables them. Requires usage_retention. Default 0.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Usage interval"},
	}
	fields["usage_retention"] = &framework.FieldSchema{
		Type:         framework.TypeDurationSecond,
		Description:  "How long the engine records which role and client had a key, in whole days: 1 to 400 days; 0 disables and deletes the records. Records of keys that are still valid are kept. Default 35 days.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Usage retention"},
	}
	fields["usage_record_identity"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Record the entity ID and display name of the client with each key. If false, reports by entity, display name, and metadata are empty. Default true.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Record identities"},
	}
	schedule.AddFields(fields)
	responseFields := map[string]*framework.FieldSchema{
		"last_rotated":             {Type: framework.TypeString, Description: "When a rotation created the active admin key (RFC 3339); null for a key that was written.", Required: true},
		"superseded_admin_keys":    {Type: framework.TypeInt, Description: "Superseded admin keys that are not deleted yet.", Required: true},
		"wal_entries":              {Type: framework.TypeInt, Description: "Pending deletions at OpenAI, and creates in progress.", Required: true},
		"wal_oldest_entry":         {Type: framework.TypeString, Description: "Creation time of the oldest entry after the last WAL run (RFC 3339), or null.", Required: true},
		"admin_api_key_expires_at": {Type: framework.TypeString, Description: "Expiry of the admin key at OpenAI (RFC 3339); null if it has none, or an unknown one.", Required: true},
		"next_rotation":            {Type: framework.TypeString, Description: "Time of the next rotation (RFC 3339), or null.", Required: true},
		"rotation_manager":         {Type: framework.TypeString, Description: "Scheduler of the next rotation: vault (Vault Enterprise's rotation manager), internal (this engine), or empty.", Required: true},
		"last_rotation_error":      {Type: framework.TypeString, Description: "Error of the last automatic rotation; empty after a success.", Required: true},
	}
	for name, field := range fields {
		if name != "admin_api_key" {
			responseFields[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
		}
	}
	addEffective(responseFields, configSpelled)
	fields["skip_verify"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Store the config without verifying it. Not stored.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Skip verification"},
	}
	fields["force"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Accept a superseded admin key or, with skip_verify, an unverified one in place of one that the engine created. Not stored.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Force"},
	}

	write := &framework.PathOperation{
		Callback:                    rejectUnknownFields(b.configWrite),
		Summary:                     "Verify the configuration with OpenAI and store it.",
		Responses:                   noContent("Configuration stored."),
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
	return &framework.Path{
		Pattern:      "config",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "configuration"},
		Fields:       fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback:  b.configRead,
				Summary:   "Read the configuration, without the admin key.",
				Responses: okFields("The configuration.", responseFields),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.configDelete,
				Summary:                     "Delete the configuration.",
				Responses:                   noContent("Configuration deleted, or not found. Status 200 returns warnings about leases that can no longer be revoked and admin keys that still exist."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (bool, error) {
			cfg, err := getConfig(ctx, req.Storage)
			return cfg != nil, err
		},
		HelpSynopsis: "Configure the admin key and the connection to OpenAI.",
		HelpDescription: strings.TrimSpace(`
The admin key requires the permission "Organization Administration: Write"; an
organization owner can create one. The engine verifies a write with OpenAI
before it stores it, unless skip_verify=true. If OpenAI rejects it, the stored
configuration stays active. A write that sets only some fields keeps the others.
The admin key is never read back. After a change of the admin key, endpoint, or
organization, the new admin key must have access to the projects of all roles
and static roles.

With rotation_period or rotation_schedule, the engine rotates its admin key
automatically. rotation_schedule takes five cron fields in UTC. With
rotation_window (at least one hour), a missed rotation is made up only within
that time. The engine checks the schedule once a minute. Writing one of the two
fields clears the other; 0 or "" clears it. With a schedule, an admin key that
the engine creates expires at OpenAI after three missed rotations, but not
within a week, even if Vault is unavailable.
`),
	}
}

func (b *backend) configRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if cfg == nil {
		return nil, nil // Vault answers 404, as scripts expect
	}
	walEntries, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return nil, fmt.Errorf("listing the WAL: %w", err)
	}
	var oldest time.Time
	if _, unix, _ := b.wal.totals(); unix != 0 {
		oldest = time.Unix(unix, 0)
	}
	resp := &logical.Response{Data: map[string]any{
		"admin_api_key_id":        cfg.AdminKeyID,
		"organization_id":         cfg.OrganizationID,
		"project_id":              cfg.ProjectID,
		"api_endpoint":            cfg.APIEndpoint,
		"allow_insecure_endpoint": cfg.AllowInsecureEndpoint,
		"ca_cert":                 cfg.CACert,
		"rotation_grace_period":   int64(cfg.RotationGracePeriod / time.Second),
		"request_timeout":         int64(cfg.RequestTimeout / time.Second),
		"max_concurrent_requests": cfg.MaxConcurrent,
		"wal_entries":             b.wal.unused(walEntries),
		"wal_oldest_entry":        text.TimeOrNull(oldest),
		"tidy_interval":           int64(cfg.TidyInterval / time.Second),
		"tidy_safety_buffer":      int64(cfg.TidySafetyBuffer / time.Second),
		"usage_interval":          int64(cfg.UsageInterval / time.Second),
		"usage_retention":         int64(cfg.UsageRetention / time.Second),
		"usage_record_identity":   cfg.UsageRecordIdentity,
		"last_rotated":            text.TimeOrNull(cfg.LastRotated),
		"superseded_admin_keys":   len(cfg.Superseded),

		"require_spend_limit":      cfg.RequireSpendLimit,
		"require_model_allow_list": cfg.RequireModelAllowList,
		"require_scopes":           cfg.RequireScopes,
	}}
	cfg.AsWritten.show(resp.Data, configSpelled)
	cfg.showSchedule(resp, b.now())
	cfg.warnOfSuperseded(resp)
	return resp, nil
}

func (b *backend) configWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()

	old, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	cfg, problem := mergeConfig(old, d, b.now())
	if problem != "" {
		return logical.ErrorResponse("%s", problem), nil
	}
	if cfg.changesLimits(old) {
		release, err := b.pools.answers.Alone(ctx, limitWrites)
		if err != nil {
			return nil, fmt.Errorf("config not stored: waiting for a static role with a spend_limit to be written: %w", err)
		}
		defer release()
	}
	if err := checkSpendLimits(ctx, req, old, cfg); err != nil {
		return errorResponse("config not stored", err)
	}
	skip, force := d.Get("skip_verify").(bool), d.Get("force").(bool)
	if problem := cfg.losesKey(old); skip && !force && problem != "" {
		return logical.ErrorResponse("%s", problem), nil
	}
	api, err := b.newClient(ctx, cfg)
	if err != nil {
		return logical.ErrorResponse("config not stored: %s", err), nil
	}

	response := &logical.Response{}
	keys, refusal, err := b.checkConfig(ctx, req, old, cfg, api, skip, response)
	if problem := cfg.undoesRotation(old); refusal == nil && err == nil && !force && problem != "" {
		refusal = logical.ErrorResponse("%s", problem)
	}
	if refusal != nil || err != nil {
		api.Close()
		b.log(req).Warn("config not stored: verification failed", "endpoint", api.Host(), "error", errors.Join(err, refusal.Error()))
		return refusal, err
	}
	moved := b.supersede(old, cfg, keys)
	if problem := b.beingDeleted(old, cfg); problem != "" {
		api.Close()
		return logical.ErrorResponse("%s", problem), nil
	}
	cfg.dropSuperseded(cfg.AdminKeyID) // a superseded key that is configured again must not be deleted
	cfg.AsWritten = cfg.AsWritten.note(d, cfg.spelling(), configSpelled)

	if cfg.RequireScopes && (old == nil || !old.RequireScopes) {
		if err := warnOfScopes(ctx, req, response); err != nil {
			return nil, fmt.Errorf("config not stored: %w", err)
		}
	}
	if cfg.ProjectID != "" {
		if err := b.recordProject(ctx, req.Storage, cfg.ProjectID); err != nil {
			return nil, fmt.Errorf("config not stored: %w", err)
		}
	}
	tag, err := b.ensureTag(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	registered, err := b.registerWrite(ctx, req, old, cfg)
	if err != nil {
		return nil, err
	}
	snap := newSnapshot(cfg, api, tag)
	err = b.moveConfig(ctx, req, moved || skip && cfg.replacesKey(old), func() error {
		if err := checkSpendLimits(ctx, req, old, cfg); err != nil { // again, with the lock
			return err
		}
		if err := putConfig(ctx, req.Storage, cfg); err != nil {
			// Storage may still have the new config: the next request reads it.
			b.dropSnapshot()
			return err
		}
		b.install(snap)
		return nil
	})
	b.servePools(req) //nolint:contextcheck // it outlives the request
	if err != nil {
		return errorResponse("config not stored", err)
	}
	b.usage.sweepSoon()
	b.rotation.stored(registered)
	b.rotation.forget(lookForKeys)
	b.events.Emit(events.ConfigWrite, req.MountPoint, configStorageKey, true, "admin_api_key_id", cfg.AdminKeyID)
	b.log(req).Info("config stored", "admin_api_key_id", cfg.AdminKeyID, "endpoint", api.Host())

	if moved {
		api.ForgetRate()
		response.AddWarning(fmt.Sprintf("The new admin key does not list the previous admin key %s. "+
			"If the previous key belongs to another organization or endpoint, the engine cannot delete the credentials of existing leases, WAL entries, and static roles there, and their revocation fails until you write a key of that organization again. "+
			"Use one mount per organization.", old.AdminKeyID))
	}
	b.reportSuperseded(ctx, req, old, snap, skip, response)
	if cfg.AllowInsecureEndpoint && strings.HasPrefix(cfg.APIEndpoint, "http:") {
		response.AddWarning("The engine sends the admin key in plaintext, because api_endpoint uses http.")
	}
	if !registered {
		response.AddWarning("The rotation job could not be deregistered from Vault's rotation manager. The engine ignores its rotation requests and retries the deregistration every minute.")
	}
	if text := cfg.expiryText(); text != "" && (!cfg.scheduled() || cfg.NextRotation.After(cfg.renewBy())) {
		response.AddWarning(text)
	}
	return omitEmpty(response), nil
}

// warnOfScopes names the roles that require_scopes disables.
func warnOfScopes(ctx context.Context, req *logical.Request, response *logical.Response) error {
	names, err := rolesWhere(ctx, req.Storage, func(scopes []string, _ spendRule) bool { return len(scopes) == 0 })
	if err == nil && len(names) > 0 {
		response.AddWarning("require_scopes disables roles without scopes until you add scopes: " + nameSome(names))
	}
	return err
}

// checkSpendLimits returns why a config lacks what the limits of roles need, nil if it does
// not. A write of a role with a limit shares the config's lock, and one of a static role
// limitWrites, so none comes between this and the write of the config.
func checkSpendLimits(ctx context.Context, req *logical.Request, old, cfg *config) error {
	if !cfg.changesLimits(old) {
		return nil
	}
	names, err := rolesWhere(ctx, req.Storage, func(_ []string, s spendRule) bool { return s.lacks(cfg) != "" })
	if err != nil || len(names) == 0 {
		return err
	}
	return clientError(fmt.Sprintf("spend_limit requires usage_interval, usage_retention and, with spend_window=month, a usage_retention of 31 days or more; first clear the spend_limit of %s", nameSome(names)))
}

// changesLimits reports whether a write changes what limits need.
func (c *config) changesLimits(old *config) bool {
	return old == nil || old.UsageInterval != c.UsageInterval || old.UsageRetention != c.UsageRetention
}

// rolesWhere describes the roles and static roles of which is holds.
func rolesWhere(ctx context.Context, s logical.Storage, is func(scopes []string, s spendRule) bool) (found []string, err error) {
	err = eachRole(ctx, s, func(name string, r *role) {
		if is(r.Scopes, r.spendRule) {
			found = append(found, describeLabel(client.HideKeys(name)))
		}
	})
	if err != nil {
		return nil, err
	}
	err = eachStaticRole(ctx, s, func(name string, r *staticRole) {
		if is(r.Scopes, r.spendRule) {
			found = append(found, describeLabel(staticLabel+name))
		}
	})
	return found, err
}

// nameSome joins names, of which it shows at most ten.
func nameSome(names []string) string {
	const most = 10
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s, and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

func (b *backend) configDelete(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()

	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if cfg == nil {
		return nil, nil
	}
	// Superseded keys are deleted now: their record goes with the config.
	var expire map[string]time.Time
	if api, err := b.newClient(ctx, cfg); err == nil {
		if len(cfg.Superseded) > 0 {
			expire = b.lastLook(ctx, req, cfg, api)
		}
		cleanup, cancel := context.WithTimeout(ctx, cleanupBudget)
		var keys []supersededKey
		for i := range cfg.Superseded {
			if k := &cfg.Superseded[i]; k.ID != cfg.AdminKeyID && ours(k) {
				keys = append(keys, *k)
			}
		}
		b.deleteKeys(cleanup, req, newSnapshot(cfg, api, ""), keys, false).apply(cfg)
		cancel()
		api.Close()
	}
	err = req.Storage.Delete(ctx, configStorageKey)
	b.dropSnapshot()
	if err != nil {
		// If it is gone, only this request still knows what remains.
		stored := cfg
		unread := tryAgain(ctx, func() (err error) {
			stored, err = getConfig(ctx, req.Storage)
			return err
		})
		if unread != nil {
			b.log(req).Error("config perhaps deleted; if it is, these admin keys are still valid at OpenAI", "admin_api_key_ids", cfg.leftIDs(), "error", errors.Join(err, unread))
		}
		if unread != nil || stored != nil {
			return nil, fmt.Errorf("deleting the config: %w", err)
		}
	}
	if cfg.RotationManager == managerVault {
		if err := b.deregister(ctx, req.MountPoint); err != nil {
			b.log(req).Warn("rotation job not deregistered from Vault; its rotation requests are ignored", "error", err)
		}
	}
	b.events.Emit(events.ConfigDelete, req.MountPoint, configStorageKey, true)
	b.log(req).Info("config deleted")

	response := &logical.Response{}
	response.AddWarning("Until a config is written again, the engine cannot revoke leases of this mount, process the WAL, or rotate static roles. Their keys stay valid until they expire at OpenAI.")
	for i := range cfg.Superseded {
		k := &cfg.Superseded[i]
		warning := cfg.leftText(k, expire[k.ID])
		response.AddWarning(warning)
		b.log(req).Warn("config deleted; a superseded admin key still exists at OpenAI", "admin_api_key_id", k.ID, "expires_at", text.Time(expire[k.ID]), "text", warning)
	}
	if left := cfg.leftIDs(); len(left) > 0 {
		response.AddWarning("Admin keys that this engine created or replaced are still valid, and their values are no longer stored in this mount. Delete them at OpenAI unless another Vault uses them: " + strings.Join(left, ", "))
	}
	return response, nil
}

// leftIDs are those of the admin keys that the engine created or replaced, which stay
// valid without the config.
func (c *config) leftIDs() []string {
	left := c.supersededIDs(func(*supersededKey) bool { return true })
	if c.AdminKeyRotated {
		left = append(left, c.AdminKeyID)
	}
	return left
}

// checkConfig verifies with the API a config that is about to replace old, which is
// nil if there is none. A response or an error rejects it. It returns the
// organization's admin keys. With skip it makes no call and adds warnings.
func (b *backend) checkConfig(ctx context.Context, req *logical.Request, old, cfg *config, api *client.Client, skip bool, response *logical.Response) (keys []client.AdminKey, refusal *logical.Response, err error) {
	if skip {
		response.AddWarning("Stored without verification (skip_verify).")
		if cfg.asksAnother(old) {
			used, err := b.rolesByProject(ctx, req.Storage, cfg)
			if err != nil || len(used) > 0 {
				response.AddWarning("The projects of existing roles were not verified. If the new admin key has no access to them, their leases cannot be revoked.")
			}
		}
		return nil, nil, nil
	}
	keys, refusal, err = verifyConfig(ctx, cfg, api)
	if refusal != nil || err != nil {
		return nil, refusal, err
	}
	if cfg.ProjectID != "" && (old == nil || old.ProjectID != cfg.ProjectID) {
		unusable, err := checkProject(ctx, req, api, cfg.ProjectID)
		if err != nil {
			refusal, err = verdict(cfg, err)
			return nil, refusal, err
		}
		if unusable != nil {
			return nil, logical.ErrorResponse("config not stored: project_id: %s", unusable), nil
		}
	}
	if cfg.asksAnother(old) {
		refusal, err = b.checkRoleProjects(ctx, req, cfg, api)
	}
	return keys, refusal, err
}

// verifyConfig verifies that the admin key can read and write, and looks up or
// verifies its ID.
func verifyConfig(ctx context.Context, cfg *config, api *client.Client) (keys []client.AdminKey, refusal *logical.Response, err error) {
	keys, refusal, err = findAdminKeyID(ctx, cfg, api)
	if refusal != nil {
		return nil, refusal, nil
	}
	if err == nil {
		err = api.CheckWrite(ctx)
	}
	if err != nil {
		refusal, err = verdict(cfg, err)
	}
	return keys, refusal, err
}

// verdict turns a failed call of the verification into a response or an error.
func verdict(cfg *config, err error) (*logical.Response, error) {
	const what = "config not stored"
	e := client.AsError(err)
	switch {
	case e == nil:
		return nil, err
	case e.Blame() == client.BlameProxy:
	case e.Status == 0 && !e.Sent:
		return logical.ErrorResponse("%s: %s; check api_endpoint, ca_cert and the proxy settings of the plugin's environment", what, e), nil
	case e.Blame() == client.BlameKey:
		return logical.ErrorResponse("%s: OpenAI rejects this admin_api_key; check it at %s: %s", what, adminKeysPage, e), nil
	case e.Blame() == client.BlamePermission:
		return logical.ErrorResponse(`%s: the admin key requires the permission "Organization Administration: Write"; an organization owner can grant it at %s: %s`, what, adminKeysPage, e), nil
	case e.Blame() == client.BlameOrganization:
		return logical.ErrorResponse("%s: organization_id does not match the organization of this admin_api_key; correct it, or clear it with organization_id=\"\": %s", what, e), nil
	case e.Blame() == client.BlameHost:
		return logical.ErrorResponse("%s: api_endpoint is not the host for this organization%s; send the correct api_endpoint together with admin_api_key: %s", what, atHost(e), e), nil
	case e.Status == http.StatusNotFound, e.Status/100 == 2, e.Status/100 == 3:
		return logical.ErrorResponse("%s: %s does not serve the Admin API: %s", what, cfg.APIEndpoint, e), nil
	}
	return errorResponse(what, err)
}

// checkRoleProjects rejects an admin key without access to the projects of existing
// roles: it could not revoke their leases.
func (b *backend) checkRoleProjects(ctx context.Context, req *logical.Request, cfg *config, api *client.Client) (*logical.Response, error) {
	used, err := b.rolesByProject(ctx, req.Storage, cfg)
	if err != nil {
		return nil, fmt.Errorf("config not stored: %w", err)
	}
	if len(used) == 0 {
		return nil, nil
	}
	projects, err := api.ListProjects(ctx)
	if err != nil {
		return verdict(cfg, err)
	}
	for _, p := range projects {
		delete(used, p.ID)
	}
	var unknown []string
	for _, project := range slices.Sorted(maps.Keys(used)) {
		if len(unknown) == maxNamed {
			unknown = append(unknown, "…")
			break
		}
		names := used[project]
		if len(names) > maxNamed {
			names = append(names[:maxNamed:maxNamed], "…")
		}
		unknown = append(unknown, fmt.Sprintf("%s (%s)", project, strings.Join(names, ", ")))
	}
	if len(unknown) == 0 {
		return nil, nil
	}
	return logical.ErrorResponse("config not stored: the admin key has no access to projects of existing roles: %s; use one mount per organization, or send skip_verify=true to store it anyway", strings.Join(unknown, "; ")), nil
}

// maxNamed bounds the projects, and the roles of each, that an error lists.
const maxNamed = 10

// rolesByProject returns the roles and static roles by project, labeled for an error.
func (b *backend) rolesByProject(ctx context.Context, s logical.Storage, cfg *config) (map[string][]string, error) {
	used := map[string][]string{}
	add := func(project, what string) {
		if project != "" {
			used[project] = append(used[project], what)
		}
	}
	names, err := listNames(ctx, s, roleStoragePrefix, communityRolePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range names {
		r, err := b.roles.get(ctx, s, name)
		if err != nil {
			return nil, err
		}
		if r != nil {
			add(r.project(cfg), fmt.Sprintf("role %q", name))
		}
	}
	if names, err = s.List(ctx, staticStoragePrefix); err != nil {
		return nil, fmt.Errorf("listing the static roles: %w", err)
	}
	for _, name := range names {
		r, err := getStaticRole(ctx, s, name)
		if err != nil {
			return nil, err
		}
		if r != nil {
			add(r.ProjectID, fmt.Sprintf("static role %q", name))
		}
	}
	return used, nil
}
