package openaisecrets

// This file owns the role: its entry, what a write makes of it and must stand up to,
// and how long its leases last.
//
// What must stay true: a check has no effect at OpenAI; a list of scopes that was not
// meant to be empty never becomes one; what a request asks for and does not get is
// said in a warning.

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	roleStoragePrefix = "role/"
	roleVersion       = 1

	defaultTTL        = time.Hour
	defaultMaxTTL     = 24 * time.Hour
	defaultActivation = 10 * time.Second
	// untunedTTL is the default_lease_ttl of a Vault that was told of none.
	untunedTTL = 32 * 24 * time.Hour
)

// When a key ends at OpenAI by itself.
const (
	expiryMaxTTL = "max_ttl" // after the longest life of its lease
	expiryTTL    = "ttl"     // after the lease, with which it is moved
	expiryNone   = "none"    // never
)

// activationFailure is what happens to a new key that has not been accepted in
// time. Entries of before the field have none, which is activationError.
type activationFailure string

const (
	activationError activationFailure = "error" // it is destroyed
	activationWarn  activationFailure = "warn"  // it is handed out with a warning
)

func (a activationFailure) String() string { return string(cmp.Or(a, activationError)) }

// role is what a credential may be.
type role struct {
	Version int `json:"version"`
	// ProjectID is empty where the config's applies.
	ProjectID    string `json:"project_id"`
	NameTemplate string `json:"service_account_name_template"`
	Description  string `json:"service_account_description,omitempty"`
	// TTL and MaxTTL are 0 where the default applies.
	TTL    time.Duration `json:"ttl"`
	MaxTTL time.Duration `json:"max_ttl"`
	// Scopes is what the keys may do; none = all that the account may do.
	Scopes         []string `json:"scopes,omitempty"`
	KeyExpiry      string   `json:"key_expiry"`
	CredentialType string   `json:"credential_type"`
	// ServiceAccountID and its name when the role was written are the account's
	// of typeKey.
	ServiceAccountID string `json:"service_account_id,omitempty"`
	ServiceAccount   string `json:"service_account,omitempty"`
	// ActivationTimeout is how long a new key is given to work; 0 = it is not
	// tried. ActivationFailure is what happens then.
	ActivationTimeout time.Duration     `json:"activation_timeout"`
	ActivationFailure activationFailure `json:"activation_failure,omitempty"`

	AsWritten asWritten `json:"as_written,omitempty"`
}

// maxTTL is the longest that the role lets a lease last.
func (r *role) maxTTL() time.Duration { return cmp.Or(r.MaxTTL, defaultMaxTTL) }

// leaseTTL is how long the role lets a lease last at first. A mount that was not
// tuned looks like one that was tuned to Vault's default of 32 days, so that the
// mount's default only shortens the engine's.
func (r *role) leaseTTL(mountDefault time.Duration) time.Duration {
	if r.TTL != 0 {
		return r.TTL
	}
	ttl := min(defaultTTL, r.maxTTL())
	if mountDefault > 0 {
		ttl = min(ttl, mountDefault)
	}
	return ttl
}

// newRole is what a write, and an entry of the community plugin, does not name.
func newRole() *role {
	return &role{NameTemplate: naming.DefaultTemplate, KeyExpiry: expiryMaxTTL, CredentialType: typeAccount, ActivationTimeout: defaultActivation}
}

// project is the one in which the role's credentials are made, "" without any.
func (r *role) project(cfg *config) string {
	if r.ProjectID == "" && cfg != nil {
		return cfg.ProjectID
	}
	return r.ProjectID
}

// fields are what a write may have, as it is used.
func (r *role) fields() map[string]any {
	return map[string]any{
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
		"activation_failure":            r.ActivationFailure.String(),
	}
}

// unreadable is an error of an entry that storage has and this version cannot read,
// whereas any other leaves open what storage has.
type unreadable struct{ error }

func (u unreadable) Unwrap() error { return u.error }

// lifetime is how long a lease lasts, and its key.
type lifetime struct {
	TTL, Max time.Duration
	// Key is how long the key is to live at OpenAI, 0 = without end, and Covers
	// the part of it in which it must work.
	Key, Covers time.Duration
	Warnings    []string
}

// lifetime computes a lease's times from the role, the mount's bounds and what
// was asked for (0 = nothing).
func (r *role) lifetime(mount logical.SystemView, asked time.Duration) lifetime {
	l := lifetime{TTL: r.leaseTTL(mount.DefaultLeaseTTL()), Max: r.maxTTL()}
	if mountMax := mount.MaxLeaseTTL(); mountMax > 0 {
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
	switch {
	case l.TTL <= longest:
	case asked == 0 && r.TTL == 0: // nobody asked for it
		l.TTL = longest
	default:
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

const (
	// maxScopes and maxScope bound the list and each of it, in characters.
	// OpenAI publishes no limit; its longest known identifier has 48.
	maxScopes = 100
	maxScope  = 128
	// notInScope are characters of which lists and objects are made: as a scope, "[]"
	// would be no list without any.
	notInScope = ",\"'`[]{}()<>"
)

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
			if problem := text.Check(field, value); problem != "" {
				return nil, problem
			}
			*target = value
		}
	}
	if problem := text.CheckID("project_id", r.ProjectID); problem != "" {
		return nil, problem
	}
	if r.NameTemplate == "" {
		r.NameTemplate = naming.DefaultTemplate
	}
	if err := naming.Check(r.NameTemplate, name, r.ProjectID); err != nil {
		return nil, fmt.Sprintf("service_account_name_template: %s", err)
	}

	for field, target := range map[string]*time.Duration{"ttl": &r.TTL, "max_ttl": &r.MaxTTL, "activation_timeout": &r.ActivationTimeout} {
		if raw, ok := d.GetOk(field); ok {
			*target = time.Duration(raw.(int)) * time.Second
			if *target > maxRotationPeriod { // beyond which sums of it could overflow
				return nil, fmt.Sprintf("%s must be %s or less", field, maxRotationPeriod)
			}
		}
	}
	if r.TTL > r.maxTTL() {
		return nil, fmt.Sprintf("ttl %s is longer than max_ttl %s", r.TTL, r.maxTTL())
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
	if problem := r.ActivationFailure.take(d); problem != "" {
		return nil, problem
	}
	if problem := choose(d, "credential_type", &r.CredentialType, typeAccount, typeKey); problem != "" {
		return nil, problem
	}
	raw, given := d.GetOk("service_account_id")
	if given {
		id := raw.(string)
		if problem := text.CheckID("service_account_id", id); problem != "" {
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

// take takes the field activation_failure. The default is stored as no value, as
// in entries of before the field.
func (a *activationFailure) take(d *framework.FieldData) (problem string) {
	value := a.String()
	problem = choose(d, "activation_failure", &value, string(activationError), string(activationWarn))
	if *a = activationFailure(value); *a == activationError {
		*a = ""
	}
	return problem
}

// takeScopes takes the field scopes.
func takeScopes(d *framework.FieldData, target *[]string) (problem string) {
	raw, ok := d.GetOk("scopes")
	if !ok {
		return ""
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
		switch {
		case scope == "":
			// It may be what is left of a variable that was not set, and a list
			// without any scope means all of them.
			return nil, "scopes contains an empty one"
		case strings.EqualFold(scope, "null"): // of the CLI, which sends text
			return nil, "scopes contains null, which is not a scope; leave scopes out to keep what is stored, or send an empty list for all that the account may do"
		case len(scope) > maxScope:
			return nil, fmt.Sprintf("scopes: %.64q... has %d characters; the limit is %d", scope, len(scope), maxScope)
		case strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(notInScope, r) }):
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

// What a credential is.
const (
	// typeAccount is a service account, with which all its keys end.
	typeAccount = "service_account"
	// typeKey is one key of an account that stays.
	typeKey = "api_key"
)
