package client

// This file owns the keys of service accounts after their account: making more
// of them, listing, changing and deleting them. The API reaches them through
// their project, and never tells which scopes a key has (OpenAPI document).

import (
	"context"
	"time"
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
func (c *Client) CreateServiceAccountKey(ctx context.Context, project, account, name string, scopes []string, expiry time.Duration, options ...CallOption) (Key, error) {
	what := "create key " + name + " of service account " + account + " in project " + project
	if expiry < 0 {
		return Key{}, c.refuse(what, negative)
	}
	got, err := doOnce[newKey](ctx, c, request{
		operation: createKey, what: what, ids: []string{project, account},
		body: struct {
			Name    string   `json:"name"`
			Scopes  []string `json:"scopes,omitempty"`
			Expires int64    `json:"expires_in_seconds,omitempty"`
		}{name, scopes, seconds(expiry)},
		options: optionsOf(options),
	})
	if err != nil {
		return Key{}, err
	}
	return got.public(), nil
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
	what := "list keys of project " + project
	return walk(c, what, func(k ProjectKey) string { return k.ID },
		func(after string) (page[ProjectKey], error) {
			query := pageAfter(after)
			query.Set("owner_project_access", "any")
			got, err := doWithRetry[listing[projectKey]](ctx, c, request{operation: listKeys, what: what, ids: []string{project}, query: query})
			return pageOf(got, projectKey.public), err
		}, each)
}

// GetProjectKey returns one key, expired ones included. IsNotFound holds for an
// unknown one.
func (c *Client) GetProjectKey(ctx context.Context, project, id string) (ProjectKey, error) {
	got, err := doWithRetry[projectKey](ctx, c, request{operation: getKey, what: "read key " + id + " in project " + project, ids: []string{project, id}})
	return got.public(), err
}

// UpdateProjectKey moves a key's end to expiry from now, or replaces its
// scopes, or both; what is zero stays as it is. An expired key cannot be
// updated. Making the same call again is harmless: the expiry counts from the
// last one. It refuses a call that changes nothing and an empty, non-nil list
// of scopes, which at OpenAI means every scope.
func (c *Client) UpdateProjectKey(ctx context.Context, project, id string, scopes []string, expiry time.Duration, options ...CallOption) (ProjectKey, error) {
	what := "update key " + id + " in project " + project
	switch {
	case scopes != nil && len(scopes) == 0:
		return ProjectKey{}, c.refuse(what, "an empty list of scopes would allow all of them")
	case expiry < 0:
		return ProjectKey{}, c.refuse(what, negative)
	case scopes == nil && expiry == 0:
		return ProjectKey{}, c.refuse(what, "neither scopes nor expiry to change")
	}
	got, err := doWithRetry[projectKey](ctx, c, request{
		operation: updateKey, what: what, ids: []string{project, id},
		body: struct {
			Scopes  []string `json:"scopes,omitempty"`
			Expires int64    `json:"expires_in_seconds,omitempty"`
		}{scopes, seconds(expiry)},
		options: optionsOf(options),
	})
	return got.public(), err
}

// DeleteProjectKey deletes one key; its account and other keys stay. IsNotFound
// holds for an unknown one.
func (c *Client) DeleteProjectKey(ctx context.Context, project, id string, options ...CallOption) error {
	_, err := doWithRetry[deletion](ctx, c, request{
		operation: deleteKey, what: "delete key " + id + " in project " + project, ids: []string{project, id},
		options: optionsOf(options),
	})
	return err
}

// newKey is a key of an account as it comes once.
type newKey struct {
	ID        string   `json:"id"`
	Name      label    `json:"name"`
	Value     string   `json:"value"` // #nosec G117 -- read here, and never written
	CreatedAt unixTime `json:"created_at"`
	ExpiresAt unixTime `json:"expires_at"`
}

func (k newKey) valid() bool { return k.ID != "" && k.Value != "" }

func (k newKey) public() Key {
	return Key{ID: k.ID, Name: string(k.Name), Value: NewSecret(k.Value), CreatedAt: k.CreatedAt.time(), ExpiresAt: k.ExpiresAt.time()}
}

// projectKey is a key as it comes later.
type projectKey struct {
	ID         string   `json:"id"`
	Name       label    `json:"name"`
	Owner      owner    `json:"owner"`
	CreatedAt  unixTime `json:"created_at"`
	ExpiresAt  unixTime `json:"expires_at"`
	LastUsedAt unixTime `json:"last_used_at"`
}

func (k projectKey) valid() bool { return k.ID != "" }

func (k projectKey) public() ProjectKey {
	return ProjectKey{
		ID: k.ID, Name: string(k.Name), AccountID: string(k.Owner.ServiceAccount.ID), UserID: string(k.Owner.User.ID),
		CreatedAt: k.CreatedAt.time(), ExpiresAt: k.ExpiresAt.time(), LastUsedAt: k.LastUsedAt.time(),
	}
}
