package client

// This file owns the keys of service accounts after their account: making more
// of them, listing, changing and deleting them. The API reaches them through
// their project, and never tells which scopes a key has (OpenAPI document, SDK v3.95.0).

import (
	"context"
	"strings"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/param"
)

// ProjectKey is a key of a project as the API shows it after its creation.
type ProjectKey struct {
	ID        string // opaque
	Name      string
	AccountID string // the owning service account, "" when a user owns it
	UserID    string // that user
	CreatedAt time.Time
	ExpiresAt time.Time // zero = never
	// LastUsedAt is when the key was last used, zero if it never was or if the
	// API does not say. How exact it is is undocumented.
	LastUsedAt time.Time
}

// CreateServiceAccountKey makes a key of an existing account. No scopes means
// all that the account may do; expiry is MinExpiry..MaxExpiry, 0 = never. One
// request, never repeated: see Error.Ambiguous.
func (c *Client) CreateServiceAccountKey(ctx context.Context, project, account, name string, scopes []string, expiry time.Duration) (Key, error) {
	op := "create key " + name + " of service account " + account + " in project " + project
	if expiry < 0 {
		return Key{}, c.refuse(op, negative)
	}
	params := openai.AdminOrganizationProjectServiceAccountAPIKeyNewParams{
		Name:             param.NewOpt(name),
		ExpiresInSeconds: seconds(expiry),
	}
	if len(scopes) > 0 { // the SDK sends [] for an empty non-nil list
		params.Scopes = scopes
	}
	type created = openai.AdminOrganizationProjectServiceAccountAPIKeyNewResponse
	answer, err := once(ctx, c, createKey, op,
		func(k *created) bool { return isText(k.JSON.ID) && isText(k.JSON.Value) },
		func(ctx context.Context, o ...option.RequestOption) (*created, error) {
			return c.accounts.APIKeys.New(ctx, project, account, params, o...)
		})
	if err != nil {
		return Key{}, err
	}
	return Key{ID: answer.ID, Name: answer.Name, Value: NewSecret(answer.Value), CreatedAt: at(answer.CreatedAt), ExpiresAt: at(answer.ExpiresAt)}, nil
}

// ListProjectKeys returns all keys of a project, those included whose owner
// has lost access to it: without that filter the API may hide live keys.
func (c *Client) ListProjectKeys(ctx context.Context, project string) ([]ProjectKey, error) {
	return gather(func(each func([]ProjectKey) error) error {
		return c.EachProjectKey(ctx, project, each)
	})
}

// EachProjectKey is ListProjectKeys without holding more than a page. See
// EachServiceAccount for when it calls each and what nil means.
func (c *Client) EachProjectKey(ctx context.Context, project string, each func([]ProjectKey) error) error {
	op := "list keys of project " + project
	return walk(c, op, func(k ProjectKey) string { return k.ID },
		func(after string) (page[ProjectKey], error) {
			params := openai.AdminOrganizationProjectAPIKeyListParams{
				Limit: param.NewOpt[int64](pageSize), After: cursor(after),
				OwnerProjectAccess: openai.AdminOrganizationProjectAPIKeyListParamsOwnerProjectAccessAny,
			}
			answer, err := repeat(ctx, c, listKeys, op, isListing[openai.ProjectAPIKey],
				func(ctx context.Context, o ...option.RequestOption) (*listing[openai.ProjectAPIKey], error) {
					return c.keys.List(ctx, project, params, o...)
				})
			if err != nil {
				return page[ProjectKey]{}, err
			}
			p := page[ProjectKey]{last: answer.LastID, more: answer.HasMore}
			for _, k := range answer.Data {
				p.items = append(p.items, projectKey(k))
			}
			return p, nil
		}, each)
}

// GetProjectKey returns one key, expired ones included. IsNotFound holds for an
// unknown one.
func (c *Client) GetProjectKey(ctx context.Context, project, id string) (ProjectKey, error) {
	answer, err := repeat(ctx, c, getKey, "read key "+id+" in project "+project,
		func(k *openai.ProjectAPIKey) bool { return k.ID != "" },
		func(ctx context.Context, o ...option.RequestOption) (*openai.ProjectAPIKey, error) {
			return c.keys.Get(ctx, project, id, o...)
		})
	if err != nil {
		return ProjectKey{}, err
	}
	return projectKey(*answer), nil
}

// UpdateProjectKey moves a key's end to expiry from now, or replaces its
// scopes, or both; what is zero stays as it is. An expired key cannot be
// updated. Making the same call again is harmless: the expiry counts from the
// last one. It refuses a call that changes nothing and an empty, non-nil list
// of scopes, which at OpenAI means every scope.
func (c *Client) UpdateProjectKey(ctx context.Context, project, id string, scopes []string, expiry time.Duration) (ProjectKey, error) {
	op := "update key " + id + " in project " + project
	switch {
	case scopes != nil && len(scopes) == 0:
		return ProjectKey{}, c.refuse(op, "an empty list of scopes would allow all of them")
	case expiry < 0:
		return ProjectKey{}, c.refuse(op, negative)
	case scopes == nil && expiry == 0:
		return ProjectKey{}, c.refuse(op, "neither scopes nor expiry to change")
	}
	params := openai.AdminOrganizationProjectAPIKeyUpdateParams{Scopes: scopes, ExpiresInSeconds: seconds(expiry).Value}
	answer, err := repeat(ctx, c, updateKey, op,
		func(k *openai.ProjectAPIKey) bool { return k.ID != "" },
		func(ctx context.Context, o ...option.RequestOption) (*openai.ProjectAPIKey, error) {
			return c.keys.Update(ctx, project, id, params, o...)
		})
	if err != nil {
		return ProjectKey{}, err
	}
	return projectKey(*answer), nil
}

// DeleteProjectKey deletes one key; its account and other keys stay. IsNotFound
// holds for an unknown one.
func (c *Client) DeleteProjectKey(ctx context.Context, project, id string) error {
	type deleted = openai.AdminOrganizationProjectAPIKeyDeleteResponse
	_, err := repeat(ctx, c, deleteKey, "delete key "+id+" in project "+project,
		func(d *deleted) bool { return d.Deleted },
		func(ctx context.Context, o ...option.RequestOption) (*deleted, error) {
			return c.keys.Delete(ctx, project, id, o...)
		})
	return err
}

// projectKey copies the texts, as serviceAccount does.
func projectKey(k openai.ProjectAPIKey) ProjectKey {
	return ProjectKey{
		ID: strings.Clone(k.ID), Name: strings.Clone(k.Name),
		AccountID: strings.Clone(k.Owner.ServiceAccount.ID), UserID: strings.Clone(k.Owner.User.ID),
		CreatedAt: at(k.CreatedAt), ExpiresAt: at(k.ExpiresAt), LastUsedAt: at(k.LastUsedAt),
	}
}
