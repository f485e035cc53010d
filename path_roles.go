package openaisecrets

// This file owns the role entry: its rules, how an account of a role is named,
// and how long a lease of it lasts.
//
// What must stay true: a name always carries the mount's tag and a random
// tail, whatever is cut; what a request asks for and does not get is said in a
// warning.

import (
	"context"
	"errors"
	"fmt"
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
	roleVersion       = 1

	defaultTTL          = time.Hour
	defaultMaxTTL       = 24 * time.Hour
	defaultNameTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"

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

// role is what a credential may be.
type role struct {
	Version      int    `json:"version"`
	ProjectID    string `json:"project_id"`
	NameTemplate string `json:"service_account_name_template"`
	Description  string `json:"service_account_description,omitempty"`
	// TTL and MaxTTL are never zero in storage.
	TTL    time.Duration `json:"ttl"`
	MaxTTL time.Duration `json:"max_ttl"`
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
	var r role
	if err := entry.DecodeJSON(&r); err != nil {
		return nil, fmt.Errorf("decoding role %q: %w", name, err)
	}
	if r.Version > roleVersion {
		return nil, fmt.Errorf("role %q was written by a newer version of this plugin (format %d, this one knows %d)", name, r.Version, roleVersion)
	}
	return &r, nil
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
			Description:  "ID of the project in which service accounts are made. Required; `vault list` of the projects path shows them.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Project ID"},
		},
		"service_account_name_template": {
			Type: framework.TypeString,
			Description: "Template of the accounts' names, with .RoleName, .DisplayName, .ProjectID, .UnixTime and .RandomSuffix, of which the last is required. " +
				"Names are cut to 64 characters around the suffix; other characters than letters, digits, spaces and ._@- become dashes. Default " + defaultNameTemplate + ".",
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
			Description:  "How long a lease can last with renewals; the key expires at OpenAI shortly after. 0 = the default, 24h.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Maximum TTL"},
		},
	}
	answer := map[string]*framework.FieldSchema{}
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
is named and how long the lease lasts. A write that names only some fields keeps
the others. Live leases of a deleted role can still be revoked, but no longer be
renewed.
`),
	}
}

func (b *backend) roleRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := getRole(ctx, req.Storage, d.Get("name").(string))
	if r == nil || err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"project_id":                    r.ProjectID,
		"service_account_name_template": r.NameTemplate,
		"service_account_description":   r.Description,
		"ttl":                           int64(r.TTL / time.Second),
		"max_ttl":                       int64(r.MaxTTL / time.Second),
	}}, nil
}

func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	if err := req.Storage.Delete(ctx, roleStoragePrefix+d.Get("name").(string)); err != nil {
		return nil, fmt.Errorf("deleting the role: %w", err)
	}
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
	switch {
	case errors.Is(err, errNotConfigured):
		response.AddWarning("Project " + r.ProjectID + " was not checked: the engine has no admin key yet.")
	case err != nil:
		return nil, err
	default:
		project, err := snap.api.GetProject(ctx, r.ProjectID)
		switch {
		case client.IsGone(err):
			return logical.ErrorResponse("role %q: the admin key's organization has no project %q; `vault list %sprojects` shows those it has: %s", name, r.ProjectID, req.MountPoint, err), nil
		case err != nil:
			return failure(fmt.Sprintf("role %q not stored", name), err)
		case project.Archived():
			return logical.ErrorResponse("role %q: project %q is archived, and archived projects cannot be used again", name, r.ProjectID), nil
		}
	}

	if mountMax := b.System().MaxLeaseTTL(); mountMax > 0 && r.MaxTTL > mountMax {
		response.AddWarning(fmt.Sprintf("max_ttl %s is longer than the mount allows: leases end after %s (max_lease_ttl of the mount).", r.MaxTTL, mountMax))
	}
	if r.MaxTTL > maxLease {
		response.AddWarning(fmt.Sprintf("max_ttl %s is longer than a key can live at OpenAI: leases end after %s.", r.MaxTTL, maxLease))
	}

	if err := recordProject(ctx, req.Storage, r.ProjectID); err != nil {
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
	b.Logger().Info("role stored", "mount", req.MountPoint, "role", name, "project_id", r.ProjectID)
	if len(response.Warnings) == 0 {
		return nil, nil
	}
	return response, nil
}

// mergeRole applies a write to the stored role (nil when there is none) and
// checks everything that can be checked without a call.
func mergeRole(old *role, name string, d *framework.FieldData) (r *role, problem string) {
	r = &role{NameTemplate: defaultNameTemplate}
	if old != nil {
		copied := *old
		r = &copied
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
	if r.ProjectID == "" {
		return nil, "project_id is required"
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

	for field, target := range map[string]*time.Duration{"ttl": &r.TTL, "max_ttl": &r.MaxTTL} {
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
	return r, ""
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

// lifetime is how long a lease lasts.
type lifetime struct {
	TTL, Max time.Duration
	Warnings []string
}

// lifetime computes a lease's times from the role, the mount's maximum and
// what was asked for (0 = nothing).
func (r *role) lifetime(mountMax, asked time.Duration) lifetime {
	l := lifetime{TTL: r.TTL, Max: min(r.MaxTTL, maxLease)}
	if mountMax > 0 {
		l.Max = min(l.Max, mountMax)
	}
	if asked > 0 {
		l.TTL = asked
	}
	if l.TTL > l.Max {
		l.Warnings = append(l.Warnings, fmt.Sprintf("ttl %s is longer than the %s that the role and the mount allow, and was cut to that.", l.TTL, l.Max))
		l.TTL = l.Max
	}
	return l
}
