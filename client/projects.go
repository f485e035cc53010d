package client

// This file owns projects and the small shapes that all listings share.

import (
	"context"
	"encoding/json"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/pagination"
	"github.com/openai/openai-go/v3/packages/param"
	"github.com/openai/openai-go/v3/packages/respjson"
)

// Project is a project of the admin key's organization.
type Project struct {
	ID     string // opaque
	Name   string // may be empty
	Status string // "active" or "archived"; may be empty
}

// Archived reports whether the project is closed for good: there is no
// un-archive, and an archived project has no service accounts (OpenAPI document).
func (p Project) Archived() bool { return p.Status == "archived" }

// GetProject reads one project; IsNotFound holds for an unknown one.
func (c *Client) GetProject(ctx context.Context, id string) (Project, error) {
	answer, err := repeat(ctx, c, getProject, "read project "+id,
		func(p *openai.Project) bool { return p.ID != "" },
		func(ctx context.Context, o ...option.RequestOption) (*openai.Project, error) {
			return c.projects.Get(ctx, id, o...)
		})
	if err != nil {
		return Project{}, err
	}
	return Project{ID: answer.ID, Name: answer.Name, Status: answer.Status}, nil
}

// ListProjects returns all projects, archived ones included.
func (c *Client) ListProjects(ctx context.Context) ([]Project, error) {
	const op = "list projects"
	return collect(c, op, func(p Project) string { return p.ID },
		func(after string) (page[Project], error) {
			params := openai.AdminOrganizationProjectListParams{
				Limit: param.NewOpt[int64](pageSize), After: cursor(after), IncludeArchived: param.NewOpt(true),
			}
			answer, err := repeat(ctx, c, listProjects, op, isListing[openai.Project],
				func(ctx context.Context, o ...option.RequestOption) (*listing[openai.Project], error) {
					return c.projects.List(ctx, params, o...)
				})
			if err != nil {
				return page[Project]{}, err
			}
			p := page[Project]{last: answer.LastID, more: answer.HasMore}
			for _, item := range answer.Data {
				p.items = append(p.items, Project{ID: item.ID, Name: item.Name, Status: item.Status})
			}
			return p, nil
		})
}

type listing[T any] = pagination.ConversationCursorPage[T]

// isListing tells a page from any other JSON object. By the gaps of a listing things
// are deleted, so one without has_more, which OpenAI's document requires, is none:
// its end proves nothing.
func isListing[T any](l *listing[T]) bool { return l.JSON.Data.Valid() && saysMore(l.JSON.HasMore) }

func saysMore(hasMore respjson.Field) bool {
	return hasMore.Raw() == "true" || hasMore.Raw() == "false"
}

func cursor(after string) param.Opt[string] {
	if after == "" {
		return param.Opt[string]{}
	}
	return param.NewOpt(after)
}

// seconds is the API's form of an expiry. It rounds up, since an expiry is
// there to outlast something.
func seconds(d time.Duration) param.Opt[int64] {
	if d == 0 {
		return param.Opt[int64]{}
	}
	return param.NewOpt(int64((d + time.Second - 1) / time.Second))
}

// negative is why a create refuses a negative expiry: sent as none at all, a
// miscalculated end would make a key that lives forever.
const negative = "the expiry is negative"

// isText tells a string from what the SDK would turn into one, such as a
// number. A key or an id that the API did not send as text is none.
func isText(field respjson.Field) bool {
	var text string
	return json.Unmarshal([]byte(field.Raw()), &text) == nil && text != ""
}

// at turns a Unix time into a time; 0 (null on the wire) is the zero time.
func at(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0).UTC()
}
