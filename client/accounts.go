package client

// This file owns service accounts and the keys that are created with them.

import (
	"context"
	"time"
)

// ServiceAccount is an account of a project.
type ServiceAccount struct {
	ID        string // opaque
	Name      string
	Role      string // in the project: member, owner, or none
	CreatedAt time.Time
}

// Key is an API key as the create returns it; later reads omit the value.
type Key struct {
	ID        string // opaque
	Name      string
	Value     Secret
	CreatedAt time.Time
	ExpiresAt time.Time // zero if it does not expire
}

// CreateServiceAccount creates an account with project role "member" and one unscoped
// key that expires after expiry (MinExpiry..MaxExpiry; 0 for no expiry). It sends one
// request and never repeats it; see Error.Ambiguous for the meaning of a failure.
func (c *Client) CreateServiceAccount(ctx context.Context, project, name string, expiry time.Duration, options ...CallOption) (ServiceAccount, Key, error) {
	what := "create service account " + name + " in project " + project
	if expiry < 0 {
		return ServiceAccount{}, Key{}, c.refuse(what, negative)
	}
	got, err := doOnce[newServiceAccount](ctx, c, request{
		operation: createServiceAccount, what: what, ids: []string{project},
		body: struct {
			Name    string `json:"name"`
			Expires int64  `json:"expires_in_seconds,omitempty"`
		}{name, seconds(expiry)},
		options: optionsOf(options),
	})
	if err != nil {
		return ServiceAccount{}, Key{}, err
	}
	return got.public(), got.APIKey.public(), nil
}

// GetServiceAccount returns one account. IsNotFound holds for an unknown one.
func (c *Client) GetServiceAccount(ctx context.Context, project, id string) (ServiceAccount, error) {
	got, err := doWithRetry[serviceAccount](ctx, c, request{operation: getServiceAccount, what: "read service account " + id + " in project " + project, ids: []string{project, id}})
	return got.public(), err
}

// DeleteServiceAccount deletes an account and all its keys. IsNotFound holds for an
// unknown one.
func (c *Client) DeleteServiceAccount(ctx context.Context, project, id string, options ...CallOption) error {
	_, err := doWithRetry[deletion](ctx, c, request{
		operation: deleteServiceAccount, what: "delete service account " + id + " in project " + project, ids: []string{project, id},
		options: optionsOf(options),
	})
	return err
}

// ListServiceAccounts returns all accounts of a project.
func (c *Client) ListServiceAccounts(ctx context.Context, project string) ([]ServiceAccount, error) {
	return gather(func(each func([]ServiceAccount) error) error {
		return c.EachServiceAccount(ctx, project, each)
	})
}

// EachServiceAccount reads the accounts of a project with one page in memory. It calls
// each with every page that is not empty, in the API's order, and stops at its first
// error. Only nil means that each received the complete listing.
func (c *Client) EachServiceAccount(ctx context.Context, project string, each func([]ServiceAccount) error) error {
	what := "list service accounts of project " + project
	return walk(c, what, func(a ServiceAccount) string { return a.ID },
		func(after string) (page[ServiceAccount], error) {
			got, err := doWithRetry[listing[serviceAccount]](ctx, c, request{operation: listServiceAccounts, what: what, ids: []string{project}, query: pageAfter(after)})
			return pageOf(got, serviceAccount.public), err
		}, each)
}

// serviceAccount is an account in an answer.
type serviceAccount struct {
	ID        string   `json:"id"`
	Name      label    `json:"name"`
	Role      label    `json:"role"`
	CreatedAt unixTime `json:"created_at"`
}

func (a serviceAccount) valid() bool { return a.ID != "" }

func (a serviceAccount) public() ServiceAccount {
	return ServiceAccount{ID: a.ID, Name: string(a.Name), Role: string(a.Role), CreatedAt: a.CreatedAt.time()}
}

// newServiceAccount is the answer to a create.
type newServiceAccount struct {
	serviceAccount
	APIKey newKey `json:"api_key"`
}

func (a newServiceAccount) valid() bool { return a.serviceAccount.valid() && a.APIKey.valid() }
