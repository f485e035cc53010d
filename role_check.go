package openaisecrets

// This file owns what a write makes of a role, and the checks before that is
// stored: of each field, and of what the API says to it. Static roles share
// them.
//
// What must stay true: a check has no effect at OpenAI, and a list of scopes that
// was not meant to be empty never becomes one.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	// maxScopes and maxScope bound the list and each of it, in characters.
	// OpenAI publishes no limit; its longest known identifier has 48.
	maxScopes = 100
	maxScope  = 128
	// notInScope are characters of which lists and objects are made: as a scope, "[]"
	// would be no list without any.
	notInScope = ",\"'`[]{}()<>"
)

// checkProject says why a project cannot be used; an error is OpenAI's.
func checkProject(ctx context.Context, req *logical.Request, api *client.Client, id string) (refusal, err error) {
	project, err := api.GetProject(ctx, id)
	switch {
	case client.IsNotFound(err):
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
	if client.IsNotFound(err) {
		return "", fmt.Errorf("project %q has no service account %q: %w", project, id, err), nil
	}
	if err != nil {
		return "", nil, err
	}
	ours, err := naming.BearsTag(snap.tag)
	if err != nil {
		return "", nil, err
	}
	if ours(account.Name) {
		return "", fmt.Errorf("service account %q (%s) was made by this mount, for a lease or a static role, and ends with that; make one that is nobody's", id, account.Name), nil
	}
	switch account.Role {
	case "member": // as of the accounts that this engine makes
	case "none":
		response.AddWarning(fmt.Sprintf("Service account %s (%s) has the role %q in project %s: its keys can do nothing until it has another.", id, account.Name, account.Role, project))
	default:
		response.AddWarning(fmt.Sprintf("Service account %s (%s) has the role %q in project %s and not %q, as the accounts that the engine makes have: all who read its keys can do what that role allows. Restrict the keys with scopes, or use an account with that other role.", id, account.Name, account.Role, project, "member"))
	}
	return account.Name, nil, nil
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
	r.ServiceAccount, problem, err = checkAdopted(ctx, snap, project, r.ServiceAccountID, response)
	if failure := errors.Join(problem, err); failure != nil && !adopted {
		response.AddWarning(fmt.Sprintf("Service account %s was not checked: %s", r.ServiceAccountID, failure))
		return nil, nil
	}
	return problem, err
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
