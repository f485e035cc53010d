package openaisecrets

// This file owns the projects of a mount: the record of those that roles name or have
// named, and the checks of a project, and of an account in one, that a write names.
//
// What must stay true: nothing can be made in a project that no sweep looks at; a
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

// projectEntry says that a role names or has named a project, whose ID is in
// the entry's key. Roles come and go, and what they left stays to be found.
type projectEntry struct {
	Version int `json:"version"`
	// UnknownSince is since when OpenAI does not know the project.
	UnknownSince time.Time `json:"unknown_since,omitzero"`
}

// getProjectEntry returns nil when the project is not recorded.
func getProjectEntry(ctx context.Context, s logical.Storage, id string) (*projectEntry, error) {
	stored, err := s.Get(ctx, projectStoragePrefix+id)
	if err != nil {
		return nil, fmt.Errorf("reading the record of project %s: %w", id, err)
	}
	if stored == nil {
		return nil, nil
	}
	var entry projectEntry
	if err := stored.DecodeJSON(&entry); err != nil {
		return nil, fmt.Errorf("decoding the record of project %s: %w", id, err)
	}
	if entry.Version > projectVersion {
		return nil, fmt.Errorf("the record of project %s was written by a newer version of this plugin (format %d, this one knows %d)", id, entry.Version, projectVersion)
	}
	return &entry, nil
}

func putProjectEntry(ctx context.Context, s logical.Storage, id string, entry projectEntry) error {
	entry.Version = projectVersion
	stored, err := logical.StorageEntryJSON(projectStoragePrefix+id, entry)
	if err != nil {
		return err
	}
	if err := s.Put(ctx, stored); err != nil {
		return fmt.Errorf("storing the record of project %s: %w", id, err)
	}
	return nil
}

// recordProject notes that a role names a project. It precedes the write of
// the role, so that nothing can be made in a project that no sweep looks at.
func recordProject(ctx context.Context, s logical.Storage, id string) error {
	entry, err := getProjectEntry(ctx, s, id)
	if err != nil || entry != nil {
		return err
	}
	return putProjectEntry(ctx, s, id, projectEntry{})
}

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
func checkAdopted(ctx context.Context, api *client.Client, tag, project, id string, response *logical.Response) (name string, refusal, err error) {
	account, err := api.GetServiceAccount(ctx, project, id)
	if client.IsNotFound(err) {
		return "", fmt.Errorf("project %q has no service account %q: %w", project, id, err), nil
	}
	if err != nil {
		return "", nil, err
	}
	ours, err := naming.BearsTag(tag)
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
