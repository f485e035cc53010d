package client

// This file owns projects.

import "context"

// Project is a project of the admin key's organization.
type Project struct {
	ID     string // opaque
	Name   string // may be empty
	Status string // "active" or "archived"; may be empty
}

// Archived reports whether the project is archived. That is permanent, and an archived
// project has no service accounts (OpenAPI document).
func (p Project) Archived() bool { return p.Status == "archived" }

// GetProject reads one project; IsNotFound holds for an unknown one.
func (c *Client) GetProject(ctx context.Context, id string) (Project, error) {
	got, err := doWithRetry[project](ctx, c, request{operation: getProject, what: "read project " + id, ids: []string{id}})
	return got.public(), err
}

// ListProjects returns all projects, archived ones included.
func (c *Client) ListProjects(ctx context.Context) ([]Project, error) {
	const what = "list projects"
	return collect(c, what, func(p Project) string { return p.ID },
		func(after string) (page[Project], error) {
			query := pageAfter(after)
			query.Set("include_archived", "true")
			got, err := doWithRetry[listing[project]](ctx, c, request{operation: listProjects, what: what, query: query})
			return pageOf(got, project.public), err
		})
}

// project is a project in an answer.
type project struct {
	ID     string `json:"id"`
	Name   label  `json:"name"`
	Status label  `json:"status"`
}

func (p project) valid() bool { return p.ID != "" }

func (p project) public() Project {
	return Project{ID: p.ID, Name: string(p.Name), Status: string(p.Status)}
}
