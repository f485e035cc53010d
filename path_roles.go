package openaisecrets

// This file owns the role entry: its rules, how what is made for a role is
// named, and how long a lease of it lasts.
//
// What must stay true: a name always carries the mount's tag and a random
// tail, whatever is cut; what a request asks for and does not get is said in a
// warning.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/go-secure-stdlib/base62"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/template"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	roleStoragePrefix = "role/"
	roleVersion       = 2

	defaultTTL          = time.Hour
	defaultMaxTTL       = 24 * time.Hour
	defaultNameTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"
	defaultActivation   = 10 * time.Second
	// maxActivation leaves room for the create in a request's budget.
	maxActivation = 45 * time.Second

	// maxScopes and maxScope bound the list and each of it, in characters.
	// OpenAI publishes no limit; its longest known identifier has 48.
	maxScopes = 100
	maxScope  = 128

	// randomLength is how many random characters follow the mount's tag in
	// .RandomSuffix: about fifty bits.
	randomLength = 10
	// maxNameLength bounds an account's name, in characters. OpenAI publishes
	// no limit; this is what the tools around it use.
	maxNameLength = 64

	// expiryMargin is how much longer a key lives at OpenAI than its lease can
	// last: the lease begins when Vault stores it, after the key was made, but
	// within the request's budget.
	expiryMargin = 75 * time.Second
	// maxLease is the longest a lease may last for its key's end to be within
	// what OpenAI accepts.
	maxLease = client.MaxExpiry - expiryMargin
)

// When a key ends at OpenAI by itself.
const (
	expiryMaxTTL = "max_ttl" // after the longest life of its lease
	expiryTTL    = "ttl"     // after the lease, with which it is moved
	expiryNone   = "none"    // never
)

// role is what a credential may be.
type role struct {
	Version int `json:"version"`
	// ProjectID is empty where the config's applies.
	ProjectID    string `json:"project_id"`
	NameTemplate string `json:"service_account_name_template"`
	Description  string `json:"service_account_description,omitempty"`
	// TTL and MaxTTL are never zero in storage.
	TTL    time.Duration `json:"ttl"`
	MaxTTL time.Duration `json:"max_ttl"`

	// Format 1 knew none of the following.
	// Scopes is what the keys may do; none = all that the account may do.
	Scopes         []string `json:"scopes,omitempty"`
	KeyExpiry      string   `json:"key_expiry"`
	CredentialType string   `json:"credential_type"`
	// ServiceAccountID and its name when the role was written are the account's
	// of typeKey.
	ServiceAccountID string `json:"service_account_id,omitempty"`
	ServiceAccount   string `json:"service_account,omitempty"`
	// ActivationTimeout is how long a new key is given to work; 0 = it is not
	// tried.
	ActivationTimeout time.Duration `json:"activation_timeout"`
}

// newRole is what a write, and an entry of an earlier release, does not name.
func newRole() *role {
	return &role{NameTemplate: defaultNameTemplate, KeyExpiry: expiryMaxTTL, CredentialType: typeAccount, ActivationTimeout: defaultActivation}
}

// project is the one in which the role's credentials are made, "" without any.
func (r *role) project(cfg *config) string {
	if r.ProjectID == "" && cfg != nil {
		return cfg.ProjectID
	}
	return r.ProjectID
}

// getRole returns nil when there is no such role.
func getRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	entry, err := s.Get(ctx, roleStoragePrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading role %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil
	}
	r := newRole()
	if err := entry.DecodeJSON(r); err != nil {
		return nil, fmt.Errorf("decoding role %q: %w", name, err)
	}
	if r.Version > roleVersion {
		return nil, fmt.Errorf("role %q was written by a newer version of this plugin (format %d, this one knows %d)", name, r.Version, roleVersion)
	}
	return r, nil
}

func roleNameField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type:         framework.TypeString,
		Description:  "Name of the role: letters, digits, dots, dashes and underscores.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Role name"},
		Required:     true,
	}
}

func (b *backend) pathRoles() *framework.Path {
	return &framework.Path{
		Pattern:      "roles/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "roles"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
					names, err := req.Storage.List(ctx, roleStoragePrefix)
					if err != nil {
						return nil, fmt.Errorf("listing roles: %w", err)
					}
					return logical.ListResponse(names), nil
				},
				Summary: "List the roles.",
				Responses: okFields("Names of the roles.", map[string]*framework.FieldSchema{
					"keys": {Type: framework.TypeStringSlice, Description: "Role names."},
				}),
			},
		},
		HelpSynopsis:    "List the roles.",
		HelpDescription: "Lists the names of all roles of this mount.",
	}
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
			Description: "Template of the accounts' names, with .RoleName, .DisplayName, .ProjectID, .UnixTime and .RandomSuffix, of which the last is required. " +
				"Names are cut to 64 characters around the suffix; other characters than letters, digits, spaces and ._@- become dashes. With credential_type=api_key it names the keys. Default " + defaultNameTemplate + ".",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Service account name template"},
		},
		"service_account_description": {
			Type:         framework.TypeString,
			Description:  "A note on what the accounts are for. Recorded in the role only: OpenAI's API has no such field.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Description"},
		},
		"ttl": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a lease lasts unless it is renewed. 0 = the default, 1h or max_ttl if that is shorter.",
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
			Description:  "How long to wait until OpenAI accepts a new key before it is handed out: 0 (hand it out untried) to 45s. A key that is not accepted by then is destroyed. Default 10s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Activation timeout"},
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
	fields["name"] = roleNameField()

	write := &framework.PathOperation{
		Callback:                    strict(b.roleWrite),
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
				Callback:  b.roleRead,
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

func (b *backend) roleRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := getRole(ctx, req.Storage, d.Get("name").(string))
	if r == nil || err != nil {
		return nil, err
	}
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	life := r.lifetime(b.System().MaxLeaseTTL(), 0)
	return &logical.Response{Data: map[string]any{
		"project_id":                    r.ProjectID,
		"service_account_name_template": r.NameTemplate,
		"service_account_description":   r.Description,
		"ttl":                           int64(r.TTL / time.Second),
		"max_ttl":                       int64(r.MaxTTL / time.Second),
		"scopes":                        append([]string{}, r.Scopes...), // [] and not null without any
		"key_expiry":                    r.KeyExpiry,
		"credential_type":               r.CredentialType,
		"service_account_id":            r.ServiceAccountID,
		"activation_timeout":            int64(r.ActivationTimeout / time.Second),
		"effective_project_id":          r.project(cfg),
		"effective_ttl":                 int64(life.TTL / time.Second),
		"effective_max_ttl":             int64(life.Max / time.Second),
		"effective_key_lifetime":        int64(life.Key / time.Second),
	}}, nil
}

func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	if err := req.Storage.Delete(ctx, roleStoragePrefix+d.Get("name").(string)); err != nil {
		return nil, fmt.Errorf("deleting the role: %w", err)
	}
	b.notify(eventRoleDelete, req.MountPoint, req.Path, true, "name", d.Get("name").(string))
	b.log(req).Info("role deleted", "role", d.Get("name").(string))
	return nil, nil
}

func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
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
	if snap == nil {
		response.AddWarning("Project " + project + " was not checked: the engine has no admin key yet.")
		if r.CredentialType == typeKey {
			response.AddWarning("Nor was service account " + r.ServiceAccountID + ".")
		}
	} else {
		refusal, err := checkProject(ctx, req, snap.api, project)
		if refusal == nil && err == nil && r.CredentialType == typeKey {
			r.ServiceAccount, refusal, err = checkAdopted(ctx, snap, project, r.ServiceAccountID, response)
		}
		switch {
		case err != nil:
			return failure(fmt.Sprintf("role %q not stored", name), err)
		case refusal != nil:
			return logical.ErrorResponse("role %q: %s", name, refusal), nil
		}
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
	switch {
	case r.KeyExpiry == expiryMaxTTL && r.MaxTTL > maxLease:
		response.AddWarning(fmt.Sprintf("max_ttl %s is longer than a key can live at OpenAI: leases end after %s. With key_expiry=ttl renewals can go beyond.", r.MaxTTL, maxLease))
	case r.KeyExpiry == expiryTTL && r.TTL > maxLease:
		response.AddWarning(fmt.Sprintf("ttl %s is longer than a key can live at OpenAI: leases last %s, and longer with renewals.", r.TTL, maxLease))
	}

	if err := recordProject(ctx, req.Storage, project); err != nil {
		return nil, fmt.Errorf("role %q not stored: %w", name, err)
	}
	r.Version = roleVersion
	entry, err := logical.StorageEntryJSON(roleStoragePrefix+name, r)
	if err != nil {
		return nil, err
	}
	if err := req.Storage.Put(ctx, entry); err != nil {
		return nil, fmt.Errorf("storing role %q: %w", name, err)
	}
	b.notify(eventRoleWrite, req.MountPoint, req.Path, true, "name", name, "project_id", project)
	b.log(req).Info("role stored", "role", name, "project_id", project)
	if len(response.Warnings) == 0 {
		return nil, nil
	}
	return response, nil
}

// checkProject says why a project cannot be used; an error is OpenAI's.
func checkProject(ctx context.Context, req *logical.Request, api *client.Client, id string) (refusal, err error) {
	project, err := api.GetProject(ctx, id)
	switch {
	case client.IsGone(err):
		return fmt.Errorf("the admin key's organization has no project %q; `vault list %sprojects` shows those it has: %w", id, req.MountPoint, err), nil
	case err != nil:
		return nil, err
	case project.Archived():
		return fmt.Errorf("project %q is archived, and archived projects cannot be used again; make or choose another at %s", id, projectsPage), nil
	}
	return nil, nil
}

// checkAdopted looks at an account that is to be used and not to be owned. It
// returns its name, or why it cannot be used; an error is OpenAI's.
func checkAdopted(ctx context.Context, snap *snapshot, project, id string, response *logical.Response) (name string, refusal, err error) {
	account, err := snap.api.GetServiceAccount(ctx, project, id)
	if client.IsGone(err) {
		return "", fmt.Errorf("project %q has no service account %q: %w", project, id, err), nil
	}
	if err != nil {
		return "", nil, err
	}
	ours, err := bearsTag(snap.tag)
	if err != nil {
		return "", nil, err
	}
	if ours(account.Name) {
		return "", fmt.Errorf("service account %q (%s) was made by this mount, for a lease or a static role, and ends with that; make one that is nobody's", id, account.Name), nil
	}
	if account.Role == "none" {
		response.AddWarning(fmt.Sprintf("Service account %s (%s) has no role in project %s: its keys can do nothing until it is given one.", id, account.Name, project))
	}
	return account.Name, nil, nil
}

// mergeRole applies a write to the stored role (nil when there is none) and
// checks everything that can be checked without a call.
func mergeRole(old *role, name string, d *framework.FieldData) (r *role, problem string) {
	r = newRole()
	if old != nil {
		*r = *old
	}
	for field, target := range map[string]*string{
		"project_id":                    &r.ProjectID,
		"service_account_name_template": &r.NameTemplate,
		"service_account_description":   &r.Description,
	} {
		if raw, ok := d.GetOk(field); ok {
			value := raw.(string)
			if problem := checkText(field, value); problem != "" {
				return nil, problem
			}
			*target = strings.TrimSpace(value)
		}
	}
	if problem := checkID("project_id", r.ProjectID); problem != "" {
		return nil, problem
	}
	if r.NameTemplate == "" {
		r.NameTemplate = defaultNameTemplate
	}
	example, err := accountName(r.NameTemplate, nameData{
		RoleName: name, DisplayName: "token", ProjectID: r.ProjectID, UnixTime: 1767225600, RandomSuffix: "ab3defghij4klmn",
	})
	if err != nil {
		return nil, fmt.Sprintf("service_account_name_template: %s", err)
	}
	if example == "" {
		return nil, "service_account_name_template gives an empty name"
	}

	for field, target := range map[string]*time.Duration{"ttl": &r.TTL, "max_ttl": &r.MaxTTL, "activation_timeout": &r.ActivationTimeout} {
		if raw, ok := d.GetOk(field); ok {
			*target = time.Duration(raw.(int)) * time.Second
			if *target < 0 {
				return nil, field + " must not be negative"
			}
		}
	}
	if r.MaxTTL == 0 {
		r.MaxTTL = defaultMaxTTL
	}
	if r.TTL == 0 {
		r.TTL = min(defaultTTL, r.MaxTTL)
	}
	if r.TTL > r.MaxTTL {
		return nil, fmt.Sprintf("ttl %s is longer than max_ttl %s", r.TTL, r.MaxTTL)
	}
	if r.ActivationTimeout > maxActivation {
		return nil, fmt.Sprintf("activation_timeout must be between 0 (hand keys out untried) and %s", maxActivation)
	}

	if problem := takeScopes(d, &r.Scopes); problem != "" {
		return nil, problem
	}
	if problem := choose(d, "key_expiry", &r.KeyExpiry, expiryMaxTTL, expiryTTL, expiryNone); problem != "" {
		return nil, problem
	}
	if problem := choose(d, "credential_type", &r.CredentialType, typeAccount, typeKey); problem != "" {
		return nil, problem
	}
	raw, given := d.GetOk("service_account_id")
	if given {
		id := strings.TrimSpace(raw.(string))
		if problem := checkID("service_account_id", id); problem != "" {
			return nil, problem
		}
		if id != r.ServiceAccountID {
			r.ServiceAccountID, r.ServiceAccount = id, "" // whose name is yet to be read
		}
	}
	switch {
	case r.CredentialType == typeKey && r.ServiceAccountID == "":
		return nil, "service_account_id is required with credential_type=api_key: the ID of an existing service account of the project"
	case r.CredentialType == typeAccount && given && r.ServiceAccountID != "":
		return nil, "service_account_id is of use only with credential_type=api_key; otherwise each lease gets an account of its own"
	case r.CredentialType == typeAccount:
		r.ServiceAccountID, r.ServiceAccount = "", "" // of the type that it had before
	}
	return r, ""
}

// choose takes a field that must be one of some values, of which the first is
// the default.
func choose(d *framework.FieldData, field string, target *string, values ...string) (problem string) {
	if raw, ok := d.GetOk(field); ok {
		if *target = raw.(string); *target == "" {
			*target = values[0]
		}
	}
	if !slices.Contains(values, *target) {
		return fmt.Sprintf("%s %.64q is not one of %s", field, *target, strings.Join(values, ", "))
	}
	return ""
}

// takeScopes takes the field scopes. A list without any is given as "" or [] and
// not as null or {}, which are what is left of a variable that was not set.
func takeScopes(d *framework.FieldData, target *[]string) (problem string) {
	raw, ok := d.GetOk("scopes")
	if !ok {
		return ""
	}
	switch d.Raw["scopes"].(type) {
	case nil, map[string]any:
		return "scopes must be a list, or text with commas between them"
	}
	scopes, problem := parseScopes(raw.([]string))
	if problem == "" {
		*target = scopes
	}
	return problem
}

// parseScopes checks and deduplicates a list of scopes and keeps its order.
// There is no list of those that exist, so only their shape is checked.
func parseScopes(raw []string) (scopes []string, problem string) {
	for _, scope := range raw {
		scope = strings.TrimSpace(scope)
		switch {
		case scope == "":
			// It may be what is left of a variable that was not set, and a list
			// without any scope means all of them.
			return nil, "scopes contains an empty one"
		case len(scope) > maxScope:
			return nil, fmt.Sprintf("scopes: %.64q... has %d characters; the limit is %d", scope, len(scope), maxScope)
		case strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' || r == '"' }):
			return nil, fmt.Sprintf("scopes: %.64q is not an identifier like api.model.request", scope)
		}
		if !slices.Contains(scopes, scope) {
			scopes = append(scopes, scope)
		}
	}
	if len(scopes) > maxScopes {
		return nil, fmt.Sprintf("scopes has %d entries; the limit is %d", len(scopes), maxScopes)
	}
	return scopes, ""
}

// nameData is what a name template can use.
type nameData struct {
	RoleName, DisplayName, ProjectID string
	UnixTime                         int64
	// RandomSuffix is the mount's tag and randomLength random characters.
	RandomSuffix string
}

// accountName renders a name of at most maxNameLength characters in which
// RandomSuffix stands whole. An error says what the template gave.
func accountName(text string, data nameData) (string, error) {
	parsed, err := template.NewTemplate(template.Template(text), template.Function("random", shortRandom))
	if err != nil {
		return "", err
	}
	rendered, err := parsed.Generate(data)
	if err != nil {
		return "", err
	}
	before, after, found := strings.Cut(rendered, data.RandomSuffix)
	if !found {
		return "", fmt.Errorf("it must contain {{.RandomSuffix}} unchanged, which makes each name unique; it gives %.80q", rendered)
	}
	// No space at either end, which OpenAI might trim: the journal finds an
	// account by exactly this name.
	before, after = strings.TrimLeft(plainName(before), " "), strings.TrimRight(plainName(after), " ")
	// What follows the suffix is cut before what precedes it.
	room := maxNameLength - len(data.RandomSuffix)
	before = before[:min(len(before), room)]
	after = after[:min(len(after), room-len(before))]
	return before + data.RandomSuffix + strings.TrimRight(after, " "), nil
}

// shortRandom is the template function random, for as much as fits a name.
func shortRandom(length int) (string, error) {
	if length < 1 || length > maxNameLength {
		return "", fmt.Errorf("random takes a length between 1 and %d", maxNameLength)
	}
	return base62.Random(length)
}

// plainName replaces all that is not sure to be allowed in a name, one dash
// for each character, so that the result is ASCII.
func plainName(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune(" ._@-", r):
			return r
		case r == utf8.RuneError:
			return '-'
		}
		return '-'
	}, text)
}

// lifetime is how long a lease lasts, and its key.
type lifetime struct {
	TTL, Max time.Duration
	// Key is how long the key is to live at OpenAI, 0 = without end, and Covers
	// the part of it in which it must work.
	Key, Covers time.Duration
	Warnings    []string
}

// lifetime computes a lease's times from the role, the mount's maximum and
// what was asked for (0 = nothing).
func (r *role) lifetime(mountMax, asked time.Duration) lifetime {
	l := lifetime{TTL: r.TTL, Max: r.MaxTTL}
	if mountMax > 0 {
		l.Max = min(l.Max, mountMax)
	}
	if r.KeyExpiry == expiryMaxTTL {
		l.Max = min(l.Max, maxLease)
	}
	if asked > 0 {
		l.TTL = asked
	}
	longest := l.Max
	if r.KeyExpiry == expiryTTL {
		longest = min(longest, maxLease)
	}
	if l.TTL > longest {
		l.Warnings = append(l.Warnings, fmt.Sprintf("ttl %s is longer than the %s that the role and the mount allow, and was cut to that.", l.TTL, longest))
		l.TTL = longest
	}
	switch r.KeyExpiry {
	case expiryTTL:
		l.Covers, l.Key = l.TTL, l.TTL+expiryMargin
	case expiryNone:
		l.Covers = l.Max
	default:
		l.Covers, l.Key = l.Max, l.Max+expiryMargin
	}
	return l
}
