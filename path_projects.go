package openaisecrets

// This file owns the listing of the organization's projects, so that an
// operator finds the project_id for a role without leaving Vault.

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

func (b *backend) pathProjects() *framework.Path {
	return &framework.Path{
		Pattern:      "projects/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "projects"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback: b.projectsList,
				Summary:  "List the organization's projects.",
				Responses: okFields("IDs of the projects, archived ones included.", map[string]*framework.FieldSchema{
					"keys":     {Type: framework.TypeStringSlice, Description: "Project IDs."},
					"key_info": {Type: framework.TypeMap, Description: "Name and status (active or archived) by project ID."},
				}),
			},
		},
		HelpSynopsis: "List the organization's projects.",
		HelpDescription: strings.TrimSpace(`
Lists the projects that the engine's admin key sees, with name and status. The
ID is what a role takes as project_id. "vault list -detailed" shows it all.
`),
	}
}

func (b *backend) projectsList(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	projects, err := snap.api.ListProjects(ctx)
	if err != nil {
		return failure("projects not listed", err)
	}
	keys := make([]string, 0, len(projects))
	info := make(map[string]any, len(projects))
	for _, p := range projects {
		keys = append(keys, p.ID)
		info[p.ID] = map[string]any{"name": p.Name, "status": p.Status}
	}
	slices.Sort(keys)
	return logical.ListResponseWithInfo(keys, info), nil
}
