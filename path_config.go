package openaisecrets

// This file owns the path of the config: its fields, the checks of a write with the
// API, and how the config is read and deleted. What a write makes of each field is in
// config.go.
//
// What must stay true: a refused write leaves the stored config as it was; a check
// has no effect at OpenAI; the admin key is never read back, and never sent to an
// endpoint that was not named together with it.

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
			Description:  "ID of the admin key. Found by itself; to be given only where that is ambiguous, which the answer then says.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Admin API key ID"},
		},
		"organization_id": {
			Type:         framework.TypeString,
			Description:  "Organization to name in requests (OpenAI-Organization). Not needed: an admin key belongs to one organization.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Organization ID"},
		},
		"project_id": {
			Type:         framework.TypeString,
			Description:  "ID of the project of roles that name none. Empty = each role must name one.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Default project ID"},
		},
		"api_endpoint": {
			Type:         framework.TypeString,
			Description:  "Base URL of the API with its version: https, or http to a loopback address. To change it, send admin_api_key with it. Default " + client.DefaultBaseURL + ".",
			DisplayAttrs: &framework.DisplayAttributes{Name: "API endpoint"},
		},
		"allow_insecure_endpoint": {
			Type:         framework.TypeBool,
			Description:  "Accept an http endpoint that is not on a loopback address. The admin key then travels in clear text.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Allow insecure endpoint"},
		},
		"ca_cert": {
			Type:         framework.TypeString,
			Description:  "PEM bundle of the CAs to trust for the endpoint, instead of the system's. To change it other than by removing some of its certificates, or to clear it, send admin_api_key with it.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificates", EditType: "file"},
		},
		"rotation_grace_period": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a replaced admin key lives on, for requests that still use it: 0 to 7 days. A shorter one applies to keys that wait already, and has them deleted whoever uses them. Default 5m.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Rotation grace period"},
		},
		"request_timeout": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long one HTTP request may take: 1s to 60s. Default 30s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Request timeout"},
		},
		"max_concurrent_requests": {
			Type:         framework.TypeInt,
			Description:  "How many requests to OpenAI may be under way at once: 4 to 1024, of which issues and revokes each leave an eighth to the other. Default 256.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum concurrent requests"},
		},
		"tidy_interval": {
			Type:         framework.TypeDurationSecond,
			Description:  "How often the engine sweeps up by itself what this mount left at OpenAI and nobody can use: 1m to 30 days, 0 = only by hand. Default 12h.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Tidy interval"},
		},
		"tidy_safety_buffer": {
			Type:         framework.TypeDurationSecond,
			Description:  "How old an account must be for the sweep to look at it: 1s to 30 days. Default 10m.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Tidy safety buffer"},
		},
	}
	addScheduleFields(fields)
	answer := map[string]*framework.FieldSchema{
		"last_rotated":             {Type: framework.TypeString, Description: "When a rotation put the current admin key in place (RFC 3339); null for a key that was written to the config.", Required: true},
		"retired_admin_keys":       {Type: framework.TypeInt, Description: "How many replaced admin keys wait for the end of their grace period, or are kept beyond it since another Vault uses them.", Required: true},
		"journal_entries":          {Type: framework.TypeInt, Description: "How many accounts and admin keys the journal holds that may still have to be deleted, those of requests under way included.", Required: true},
		"journal_oldest":           {Type: framework.TypeString, Description: "Since when the oldest entry waits that the last pass over the journal left over (RFC 3339); null when none.", Required: true},
		"admin_api_key_expires_at": {Type: framework.TypeString, Description: "When the admin key expires at OpenAI (RFC 3339); null when it does not, as far as is known.", Required: true},
		"next_rotation":            {Type: framework.TypeString, Description: "When the admin key is to be replaced next (RFC 3339); null when nothing is planned.", Required: true},
		"rotation_manager":         {Type: framework.TypeString, Description: "Who makes the next rotation: vault (Enterprise's rotation manager) or internal (this engine); empty when none is planned.", Required: true},
		"last_rotation_error":      {Type: framework.TypeString, Description: "Why the last rotation on schedule failed; empty after a success, a change of the schedule or another admin key.", Required: true},
	}
	for name, field := range fields {
		if name != "admin_api_key" {
			answer[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
		}
	}
	addEffective(answer, configSpelled)
	fields["skip_verify"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Store the config without checking it against the API. Not stored itself.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Skip verification"},
	}
	fields["force"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Use an admin key that this mount has superseded, or, with skip_verify, replace without a check one that this engine made. Not stored itself.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Force"},
	}

	write := &framework.PathOperation{
		Callback:                    strict(b.configWrite),
		Summary:                     "Check the engine's configuration against the API and store it.",
		Responses:                   noContent("Stored."),
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
				Summary:   "Read the engine's configuration, without the admin key.",
				Responses: okFields("The configuration.", answer),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.configDelete,
				Summary:                     "Delete the engine's configuration.",
				Responses:                   noContent("Deleted, or there was none. Warnings, with status 200, say what can no longer be revoked and which admin keys are left."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (bool, error) {
			cfg, err := getConfig(ctx, req.Storage)
			return cfg != nil, err
		},
		HelpSynopsis: "Configure the admin key with which the engine works.",
		HelpDescription: strings.TrimSpace(`
The admin key must be one of an organization owner's with the permission
"Organization Administration: Write". A write is checked against the API before
it is stored (skip_verify=true skips that); when it is refused, what was stored
stays in force. A write that names only some fields keeps the others. The admin
key itself is never read back. Another admin key, endpoint or organization must
know the projects of all roles and static roles.

With rotation_period or rotation_schedule the engine replaces its admin key by
itself. The schedule is five cron fields in UTC, and with rotation_window (an
hour at least) a rotation that was missed is made up for only that long after
its time. Both are looked at once a minute; writing one clears the other, and 0
or "" clears it. Keys made so expire at OpenAI, should Vault be gone, after three
rotations were missed and not before a week.
`),
	}
}

func (b *backend) configRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if cfg == nil {
		return nil, nil // Vault's own 404, on which scripts rely
	}
	journal, err := framework.ListWAL(ctx, req.Storage)
	if err != nil {
		return nil, fmt.Errorf("listing the journal: %w", err)
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
		"journal_entries":         len(journal),
		"journal_oldest":          text.TimeOrNull(oldest),
		"tidy_interval":           int64(cfg.TidyInterval / time.Second),
		"tidy_safety_buffer":      int64(cfg.TidySafetyBuffer / time.Second),
		"last_rotated":            text.TimeOrNull(cfg.LastRotated),
		"retired_admin_keys":      len(cfg.Retired),
	}}
	cfg.AsWritten.show(resp.Data, configSpelled)
	cfg.showSchedule(resp, b.now())
	cfg.warnOfRetired(resp)
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
		b.log(req).Warn("config not stored: the check has failed", "endpoint", api.Host(), "error", errors.Join(err, refusal.Error()))
		return refusal, err
	}
	moved := b.supersede(old, cfg, keys)
	if problem := b.beingEnded(old, cfg); problem != "" {
		api.Close()
		return logical.ErrorResponse("%s", problem), nil
	}
	cfg.forget(cfg.AdminKeyID) // whoever configures a retired key again wants it to live
	cfg.AsWritten = cfg.AsWritten.note(d, cfg.spelling(), configSpelled)

	if cfg.ProjectID != "" {
		if err := recordProject(ctx, req.Storage, cfg.ProjectID); err != nil {
			return nil, fmt.Errorf("config not stored: %w", err)
		}
	}
	tag, err := b.ensureTag(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	arranged, err := b.arrangeWrite(ctx, req, old, cfg)
	if err != nil {
		return nil, err
	}
	if err := putConfig(ctx, req.Storage, cfg); err != nil {
		// Storage may have taken it all the same: let the next request look.
		b.dropSnapshot()
		return nil, err
	}
	snap := newSnapshot(cfg, api, tag)
	b.install(snap)
	b.rotation.stored(arranged)
	b.rotation.forget(lookForKeys)
	b.notify(eventConfigWrite, req.MountPoint, configStorageKey, true, "admin_api_key_id", cfg.AdminKeyID)
	b.log(req).Info("config stored", "admin_api_key_id", cfg.AdminKeyID, "endpoint", api.Host())

	if moved {
		api.ForgetPace()
		response.AddWarning(fmt.Sprintf("Admin key %s, with which this engine has worked until now, is not among the admin keys that the new one sees. "+
			"If that is because it belongs to another organization or endpoint: leases, journal entries and static roles from there cannot be ended with the new key, and revoking them fails until a key of that organization is written again. "+
			"Use a mount for each organization.", old.AdminKeyID))
	}
	b.reportRetired(ctx, req, old, snap, skip, response)
	if cfg.AllowInsecureEndpoint && strings.HasPrefix(cfg.APIEndpoint, "http:") {
		response.AddWarning("The admin key travels in clear text: api_endpoint is not https.")
	}
	if !arranged {
		response.AddWarning("Vault's rotation manager could not be told that the rotation job has ended; what it still asks for is not done, and it is told again every minute.")
	}
	if text := cfg.expiryText(); text != "" && (!cfg.scheduled() || cfg.NextRotation.After(cfg.renewBy())) {
		response.AddWarning(text)
	}
	return unlessEmpty(response), nil
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
	// The last chance for what is retired: nothing knows of it afterwards.
	var expire map[string]time.Time
	if api, err := b.newClient(ctx, cfg); err == nil {
		if len(cfg.Retired) > 0 {
			expire = b.lastLook(ctx, req, cfg, api)
		}
		cleanup, cancel := context.WithTimeout(ctx, cleanupBudget)
		var keys []retiredKey
		for i := range cfg.Retired {
			if k := &cfg.Retired[i]; k.ID != cfg.AdminKeyID && ours(k) {
				keys = append(keys, *k)
			}
		}
		b.endKeys(cleanup, req, newSnapshot(cfg, api, ""), keys, false).apply(cfg)
		cancel()
		api.Close()
	}
	if err := req.Storage.Delete(ctx, configStorageKey); err != nil {
		b.dropSnapshot()
		return nil, fmt.Errorf("deleting the config: %w", err)
	}
	b.dropSnapshot()
	if cfg.RotationManager == managerVault {
		if err := b.deregister(ctx, req.MountPoint); err != nil {
			b.log(req).Warn("rotation job not ended at Vault; what it asks for is not done", "error", err)
		}
	}
	b.notify(eventConfigDelete, req.MountPoint, configStorageKey, true)
	b.log(req).Info("config deleted")

	response := &logical.Response{}
	response.AddWarning("Live leases of this mount can no longer be revoked, nor can the journal be worked off, until a config is written again, and static roles are not rotated. Their keys stay usable until they expire at OpenAI.")
	for i := range cfg.Retired {
		k := &cfg.Retired[i]
		said := cfg.leftText(k, expire[k.ID])
		response.AddWarning(said)
		b.log(req).Warn("the config is deleted and a superseded admin key is left at OpenAI", "admin_api_key_id", k.ID, "expires_at", text.Time(expire[k.ID]), "text", said)
	}
	left := cfg.retiredIDs(func(*retiredKey) bool { return true })
	if cfg.AdminKeyRotated {
		left = append(left, cfg.AdminKeyID)
	}
	if len(left) > 0 {
		response.AddWarning("These admin keys were made or replaced by this engine and are still alive; nobody holds their values, delete them at OpenAI unless another Vault uses them: " + strings.Join(left, ", "))
	}
	return response, nil
}

// checkConfig asks the API about a config that is about to be stored in place of
// old, nil when there is none. A response or an error means that it must not be
// stored. The keys are those of the organization. With skip it asks nothing and
// warns of what that leaves open.
func (b *backend) checkConfig(ctx context.Context, req *logical.Request, old, cfg *config, api *client.Client, skip bool, response *logical.Response) (keys []client.AdminKey, refusal *logical.Response, err error) {
	if skip {
		response.AddWarning("Stored without a check against the API (skip_verify).")
		if cfg.asksAnother(old) {
			used, err := b.rolesByProject(ctx, req.Storage, cfg)
			if err != nil || len(used) > 0 {
				response.AddWarning("The projects of existing roles were not checked: if the new admin key's organization does not have them, their leases cannot be revoked with it.")
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

// verifyConfig asks the API whether the admin key works for reading and for
// writing, and finds or confirms its ID.
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

// verdict says what the failure of a check means.
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
		return logical.ErrorResponse("%s: OpenAI does not accept this admin_api_key; see %s: %s", what, adminKeysPage, e), nil
	case e.Blame() == client.BlamePermission:
		return logical.ErrorResponse(`%s: the admin key lacks a permission; it needs "Organization Administration: Write", which an organization owner gives it at %s: %s`, what, adminKeysPage, e), nil
	case e.Blame() == client.BlameOrganization:
		return logical.ErrorResponse("%s: organization_id is not the organization of this admin_api_key; correct it, or clear it with organization_id=\"\": %s", what, e), nil
	case e.Blame() == client.BlameHost:
		return logical.ErrorResponse("%s: api_endpoint is not the host for this organization%s; send the right one with the admin_api_key: %s", what, atHost(e), e), nil
	case e.Status == http.StatusNotFound, e.Status/100 == 2, e.Status/100 == 3:
		return logical.ErrorResponse("%s: %s does not serve the Admin API: %s", what, cfg.APIEndpoint, e), nil
	}
	return failure(what, err)
}

// checkRoleProjects refuses an admin key to which OpenAI does not list the
// projects of existing roles: it could end none of their leases.
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
	return logical.ErrorResponse("config not stored: the admin key's organization does not have projects of existing roles: %s; use a mount for each organization, or skip_verify=true if these roles are to fail", strings.Join(unknown, "; ")), nil
}

// maxNamed bounds the projects, and the roles of each, that an answer names.
const maxNamed = 10

// rolesByProject returns the roles and static roles by project, as an answer
// names them.
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
