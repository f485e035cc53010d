package openaisecrets

// This file owns the projects of a mount: the record of every project that a role
// has used, and the verification of a project or service account that a write names.
//
// What must stay true: nothing is created in a project that tidy does not search; a
// check has no effect at OpenAI.

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
)

const (
	projectStoragePrefix = "project/"
	projectVersion       = 1
)

// projectEntry records that a role has used the project whose ID is in the entry's
// key. It outlives the role, so that tidy finds orphans of deleted roles.
type projectEntry struct {
	Version int `json:"version"`
	// UnknownSince is when OpenAI first did not find the project.
	UnknownSince time.Time `json:"unknown_since,omitzero"`
	// ArchivedSince is when tidy first found the project archived, and named by no role.
	ArchivedSince time.Time `json:"archived_since,omitzero"`
	// StaticChecked is when the keys of its static roles were last looked for.
	StaticChecked time.Time `json:"static_roles_checked_at,omitzero"`
}

// getProjectEntry returns nil if the project is not recorded.
func getProjectEntry(ctx context.Context, s logical.Storage, id string) (*projectEntry, error) {
	var entry projectEntry
	stored, err := readEntry(ctx, s, projectStoragePrefix+id, "the record of project "+id, projectVersion, &entry)
	if err != nil || stored == nil {
		return nil, err
	}
	return &entry, nil
}

func putProjectEntry(ctx context.Context, s logical.Storage, id string, entry projectEntry) error {
	entry.Version = projectVersion
	return writeEntry(ctx, s, projectStoragePrefix+id, "the record of project "+id, entry)
}

// amendProject changes the record of a project. Tidy and the check of static roles
// have a field each.
func (b *backend) amendProject(ctx context.Context, s logical.Storage, id string, change func(*projectEntry)) error {
	unlock, err := b.entries.Lock(ctx, projectStoragePrefix+id)
	if err != nil {
		return fmt.Errorf("waiting for another write of the record of project %s: %w", id, err)
	}
	defer unlock()
	entry, err := getProjectEntry(ctx, s, id)
	if err != nil {
		return err
	}
	if entry == nil {
		entry = &projectEntry{}
	}
	change(entry)
	return putProjectEntry(ctx, s, id, *entry)
}

// recordProject records that a role uses a project. It precedes the write of the role,
// so that nothing is created in a project that tidy does not search.
func (b *backend) recordProject(ctx context.Context, s logical.Storage, id string) error {
	entry, err := getProjectEntry(ctx, s, id)
	if err != nil || entry != nil {
		return err
	}
	return b.amendProject(ctx, s, id, func(*projectEntry) {})
}

// checkProject returns why a project cannot be used; an error comes from OpenAI.
func checkProject(ctx context.Context, req *logical.Request, api *client.Client, id string) (refusal, err error) {
	project, err := api.GetProject(ctx, id)
	switch {
	case client.IsNotFound(err):
		return fmt.Errorf("project %q not found in the admin key's organization; run \"vault list %sprojects\" to list projects: %w", id, req.MountPoint, err), nil
	case err != nil:
		return nil, err
	case project.ID != id:
		return nil, upstreamError(fmt.Sprintf("the answer for project %s has ID %.64q", id, project.ID))
	case project.Archived():
		return fmt.Errorf("project %q is archived and cannot be used again; create or choose another project at %s", id, projectsPage), nil
	}
	return nil, nil
}

// checkAdopted verifies an existing account that the engine is to use without owning
// it. It returns its name, or why it cannot be used; an error comes from OpenAI.
func checkAdopted(ctx context.Context, api *client.Client, tag, project, id string, response *logical.Response) (name string, refusal, err error) {
	account, err := api.GetServiceAccount(ctx, project, id)
	if client.IsNotFound(err) {
		return "", fmt.Errorf("service account %q not found in project %q: %w", id, project, err), nil
	}
	if err != nil {
		return "", nil, err
	}
	ours, err := naming.BearsTag(tag)
	if err != nil {
		return "", nil, err
	}
	if ours(account.Name) {
		return "", fmt.Errorf("service account %q (%s) belongs to a lease or static role of this mount and is deleted with it; use another service account", id, account.Name), nil
	}
	switch account.Role {
	case "member": // the role of the accounts that this engine creates
	case "none":
		response.AddWarning(fmt.Sprintf("Service account %s (%s) has the role %q in project %s: its keys have no permissions until you change that role.", id, account.Name, account.Role, project))
	default:
		response.AddWarning(fmt.Sprintf("Service account %s (%s) has the role %q in project %s, not %q: everyone who reads its keys gets the permissions of that role. Restrict the keys with scopes, or use an account with the role %[5]q.", id, account.Name, account.Role, project, "member"))
	}
	return account.Name, nil, nil
}
