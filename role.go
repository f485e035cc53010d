package openaisecrets

// This file owns the role: what its entry holds, how a write changes and validates it, and
// the lifetime of its leases. role_cache.go reads entries.
//
// What must stay true: a check has no effect at OpenAI; a list of scopes never becomes
// empty by accident; if the engine shortens a requested TTL, the response includes a
// warning.

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/schedule"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	roleStoragePrefix = "role/"
	roleVersion       = 1

	defaultTTL        = time.Hour
	defaultMaxTTL     = 24 * time.Hour
	defaultActivation = 10 * time.Second
	// untunedTTL is the default_lease_ttl of a Vault that does not configure one.
	untunedTTL = 32 * 24 * time.Hour
)

// The values of key_expiry: when a key expires at OpenAI.
const (
	expiryMaxTTL = "max_ttl" // after the maximum TTL of its lease
	expiryTTL    = "ttl"     // after its lease; renewals extend it
	expiryNone   = "none"    // never
)

// activationFailure selects what happens to a new key that OpenAI does not accept in
// time. "", as in entries stored before the field existed, is activationError.
type activationFailure string

const (
	activationError activationFailure = "error" // the key is destroyed
	activationWarn  activationFailure = "warn"  // the key is returned with a warning
)

func (a activationFailure) String() string { return string(cmp.Or(a, activationError)) }

// role holds the settings of the credentials that are issued for it.
type role struct {
	Version int `json:"version"`
	// ProjectID is empty if the config's default applies.
	ProjectID    string `json:"project_id"`
	NameTemplate string `json:"service_account_name_template"`
	Description  string `json:"service_account_description,omitempty"`
	// TTL and MaxTTL are 0 if the default applies.
	TTL    time.Duration `json:"ttl"`
	MaxTTL time.Duration `json:"max_ttl"`
	// Scopes limits the keys; an empty list allows everything that the account can do.
	Scopes         []string `json:"scopes,omitempty"`
	KeyExpiry      string   `json:"key_expiry"`
	CredentialType string   `json:"credential_type"`
	// ServiceAccountID, with its name when the role was written, is set for typeKey.
	ServiceAccountID string `json:"service_account_id,omitempty"`
	ServiceAccount   string `json:"service_account,omitempty"`
	// ActivationTimeout bounds the wait for OpenAI to accept a new key; 0 skips the
	// test. ActivationFailure applies after it.
	ActivationTimeout time.Duration     `json:"activation_timeout"`
	ActivationFailure activationFailure `json:"activation_failure,omitempty"`

	// PoolSize is 0 without a pool. PoolMaxAge is 0 if the default applies.
	PoolSize   int           `json:"pool_size,omitempty"`
	PoolMaxAge time.Duration `json:"pool_max_age,omitempty"`

	spendRule

	AsWritten asWritten `json:"as_written,omitempty"`
}

// maxTTL returns the role's maximum TTL.
func (r *role) maxTTL() time.Duration { return cmp.Or(r.MaxTTL, defaultMaxTTL) }

// leaseTTL returns the role's initial TTL. An untuned mount cannot be told from one
// that is tuned to Vault's default of 32 days, so the mount's default can only shorten
// the engine's.
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

// newRole returns a role with the defaults, also for entries of the community plugin.
func newRole() *role {
	return &role{NameTemplate: naming.DefaultTemplate, KeyExpiry: expiryMaxTTL, CredentialType: typeAccount, ActivationTimeout: defaultActivation}
}

// project returns the project of the role's credentials, "" if neither the role nor the
// config sets one.
func (r *role) project(cfg *config) string {
	if r.ProjectID == "" && cfg != nil {
		return cfg.ProjectID
	}
	return r.ProjectID
}

// widens reports whether a write of the role allows anything that the old one, nil for
// none, did not allow.
func (r *role) widens(old *role, cfg *config) bool {
	switch {
	case old == nil, old.project(cfg) != r.project(cfg), old.CredentialType != r.CredentialType, old.ServiceAccountID != r.ServiceAccountID:
		return true
	case len(old.Scopes) > 0 && (len(r.Scopes) == 0 || slices.ContainsFunc(r.Scopes, func(scope string) bool { return !slices.Contains(old.Scopes, scope) })):
		return true
	}
	return r.leaseTTL(0) > old.leaseTTL(0) || r.maxTTL() > old.maxTTL() || r.PoolSize > old.PoolSize ||
		r.KeyExpiry != old.KeyExpiry && old.KeyExpiry != expiryNone && r.KeyExpiry != expiryMaxTTL
}

// fields returns the effective values of the writable fields.
func (r *role) fields() map[string]any {
	data := map[string]any{
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
		"pool_size":                     r.PoolSize,
		"pool_max_age":                  int64(r.PoolMaxAge / time.Second),
	}
	r.show(data)
	return data
}

// lifetime holds the durations of a lease and its key.
type lifetime struct {
	TTL, Max time.Duration
	// Key is the lifetime of the key at OpenAI, 0 if it does not expire, and Covers
	// the part of it during which the lease needs the key.
	Key, Covers time.Duration
	Warnings    []string
}

// lifetime computes the durations of a lease from the role, the mount's limits, and
// the requested TTL (0 if none).
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
	case asked == 0 && r.TTL == 0: // a default is shortened without a warning
		l.TTL = longest
	default:
		l.Warnings = append(l.Warnings, fmt.Sprintf("ttl %s exceeds the maximum of %s that the role and the mount allow and was reduced to it.", l.TTL, longest))
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
	// maxScopes bounds the list and maxScope each scope, in characters. OpenAI
	// publishes no limit; its longest known identifier has 48.
	maxScopes = 100
	maxScope  = 128
	// notInScope lists the syntax of lists and objects: "[]" sent as text would be a
	// scope and not the empty list.
	notInScope = ",\"'`[]{}()<>"
)

// mergeRole applies a write to the stored role (nil if there is none), except for the
// fields of mergePool and spendRule.merge, and checks what it applied, without a call.
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
			if *target > schedule.MaxPeriod { // sums of longer durations could overflow
				return nil, fmt.Sprintf("%s must be %s or less", field, schedule.MaxPeriod)
			}
		}
	}
	if r.TTL > r.maxTTL() {
		return nil, fmt.Sprintf("ttl %s exceeds max_ttl %s; reduce ttl or increase max_ttl", r.TTL, r.maxTTL())
	}
	if r.ActivationTimeout > maxActivation {
		return nil, fmt.Sprintf("activation_timeout must be between 0 and %s; 0 returns keys without testing them", maxActivation)
	}

	if problem := readScopes(d, &r.Scopes); problem != "" {
		return nil, problem
	}
	if problem := parseEnum(d, "key_expiry", &r.KeyExpiry, expiryMaxTTL, expiryTTL, expiryNone); problem != "" {
		return nil, problem
	}
	if problem := r.ActivationFailure.take(d); problem != "" {
		return nil, problem
	}
	if problem := parseEnum(d, "credential_type", &r.CredentialType, typeAccount, typeKey); problem != "" {
		return nil, problem
	}
	raw, given := d.GetOk("service_account_id")
	if given {
		id := raw.(string)
		if problem := text.CheckID("service_account_id", id); problem != "" {
			return nil, problem
		}
		if id != r.ServiceAccountID {
			r.ServiceAccountID, r.ServiceAccount = id, "" // checkRole reads the name
		}
	}
	switch {
	case r.CredentialType == typeKey && r.ServiceAccountID == "":
		return nil, "credential_type=api_key requires service_account_id, the ID of an existing service account of the project"
	case r.CredentialType == typeAccount && given && r.ServiceAccountID != "":
		return nil, "service_account_id requires credential_type=api_key"
	case r.CredentialType == typeAccount:
		r.ServiceAccountID, r.ServiceAccount = "", "" // set while the role had typeKey
	}
	return r, ""
}

// take reads the field activation_failure. The default is stored as "", as in entries
// stored before the field existed.
func (a *activationFailure) take(d *framework.FieldData) (problem string) {
	value := a.String()
	problem = parseEnum(d, "activation_failure", &value, string(activationError), string(activationWarn))
	if *a = activationFailure(value); *a == activationError {
		*a = ""
	}
	return problem
}

// readScopes reads the field scopes.
func readScopes(d *framework.FieldData, target *[]string) (problem string) {
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

// parseScopes checks and deduplicates a list of scopes in order. OpenAI publishes no
// list of scopes, so only their shape is checked.
func parseScopes(raw []string) (scopes []string, problem string) {
	for _, scope := range raw {
		switch {
		case scope == "":
			// It may come from an unset variable, and an empty list allows everything.
			return nil, "scopes must not contain empty values"
		case strings.EqualFold(scope, "null"): // the CLI sends null as text
			return nil, "scopes must not contain null; omit scopes to keep the stored list, or send an empty list to allow everything that the account can do"
		case len(scope) > maxScope:
			return nil, fmt.Sprintf("scopes: %.64q... has %d characters; the limit is %d", scope, len(scope), maxScope)
		case strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(notInScope, r) }):
			return nil, fmt.Sprintf("scopes: %.64q is not an identifier such as api.model.request", scope)
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

// The values of credential_type.
const (
	// typeAccount is a service account, whose deletion deletes its keys.
	typeAccount = "service_account"
	// typeKey is one key of an account that the engine does not delete.
	typeKey = "api_key"
)
