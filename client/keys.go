package client

// This file owns the keys of existing service accounts: creating, listing, updating and
// deleting them. The API addresses them through their project, and never returns the
// scopes of a key (OpenAPI document).

import (
	"context"
	"time"
)

// ProjectKey is a key of a project as the API returns it after its creation.
type ProjectKey struct {
	ID        string // opaque
	Name      string
	AccountID string // the owning service account, "" when a user owns it
	UserID    string // that user
	CreatedAt time.Time
	ExpiresAt time.Time // zero if it does not expire
	// LastUsedAt is when the key was last used, zero if it never was or if absent. Its
	// precision is undocumented.
	LastUsedAt time.Time
}

// CreateServiceAccountKey creates a key of an existing account. Without scopes it has all
// permissions of the account; expiry is MinExpiry..MaxExpiry, 0 for no expiry. It sends
// one request and never repeats it; see Error.Ambiguous.
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

// ListProjectKeys returns all keys of a project, including those whose owner has lost
// access to it: without that filter the API may omit valid keys.
func (c *Client) ListProjectKeys(ctx context.Context, project string) ([]ProjectKey, error) {
	return gather(func(each func([]ProjectKey) error) error {
		return c.EachProjectKey(ctx, project, each)
	})
}

// EachProjectKey is ListProjectKeys with one page in memory. It calls each as
// EachServiceAccount does.
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

// GetProjectKey returns one key, even if it has expired. IsNotFound holds for an unknown
// one.
func (c *Client) GetProjectKey(ctx context.Context, project, id string) (ProjectKey, error) {
	got, err := doWithRetry[projectKey](ctx, c, request{operation: getKey, what: "read key " + id + " in project " + project, ids: []string{project, id}})
	return got.public(), err
}

// UpdateProjectKey sets a key to expire after expiry from now, or replaces its scopes, or
// both; a zero value is not changed. An expired key cannot be updated. The call is
// idempotent, and the expiry counts from the last one. It rejects a call that changes
// nothing and an empty, non-nil list of scopes, which OpenAI treats as all scopes.
func (c *Client) UpdateProjectKey(ctx context.Context, project, id string, scopes []string, expiry time.Duration, options ...CallOption) (ProjectKey, error) {
	what := "update key " + id + " in project " + project
	switch {
	case scopes != nil && len(scopes) == 0:
		return ProjectKey{}, c.refuse(what, "the list of scopes must not be empty, which would allow all scopes")
	case expiry < 0:
		return ProjectKey{}, c.refuse(what, negative)
	case scopes == nil && expiry == 0:
		return ProjectKey{}, c.refuse(what, "scopes or expiry must be set")
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

// DeleteProjectKey deletes one key, but not its account or other keys. IsNotFound holds
// for an unknown one.
func (c *Client) DeleteProjectKey(ctx context.Context, project, id string, options ...CallOption) error {
	_, err := doWithRetry[deletion](ctx, c, request{
		operation: deleteKey, what: "delete key " + id + " in project " + project, ids: []string{project, id},
		options: optionsOf(options),
	})
	return err
}

// newKey is a key in the answer to its create.
type newKey struct {
	ID        string   `json:"id"`
	Name      label    `json:"name"`
	Value     string   `json:"value"` // #nosec G117 -- decoded only, never encoded
	CreatedAt unixTime `json:"created_at"`
	ExpiresAt unixTime `json:"expires_at"`
}

func (k newKey) valid() bool { return k.ID != "" && k.Value != "" }

func (k newKey) public() Key {
	return Key{ID: k.ID, Name: string(k.Name), Value: NewSecret(k.Value), CreatedAt: k.CreatedAt.time(), ExpiresAt: k.ExpiresAt.time()}
}

// projectKey is a key in later answers.
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
