package client

// This file owns service accounts and the keys born with them.

import (
	"context"
	"strings"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/param"
)

// ServiceAccount is an account of a project.
type ServiceAccount struct {
	ID        string // opaque
	Name      string
	Role      string // in the project: member, owner, or none, which may do nothing
	CreatedAt time.Time
}

// Key is an API key as the API hands it out, once.
type Key struct {
	ID        string // opaque
	Name      string
	Value     Secret
	CreatedAt time.Time
	ExpiresAt time.Time // zero = never
}

// CreateServiceAccount makes an account with project role "member" and one
// unscoped key that expires after expiry (MinExpiry..MaxExpiry, 0 = never).
// One request, never repeated: see Error.Ambiguous for what a failure means.
func (c *Client) CreateServiceAccount(ctx context.Context, project, name string, expiry time.Duration) (ServiceAccount, Key, error) {
	op := "create service account " + name + " in project " + project
	if expiry < 0 {
		return ServiceAccount{}, Key{}, c.refuse(op, negative)
	}
	params := openai.AdminOrganizationProjectServiceAccountNewParams{Name: name, ExpiresInSeconds: seconds(expiry)}
	answer, err := once(ctx, c, createServiceAccount, op,
		func(a *createdAccount) bool { return a.ID != "" && a.APIKey.ID != "" && a.APIKey.Value != "" },
		plain[createdAccount](func(ctx context.Context, o ...option.RequestOption) (*openai.AdminOrganizationProjectServiceAccountNewResponse, error) {
			return c.accounts.New(ctx, project, params, o...)
		}))
	if err != nil {
		return ServiceAccount{}, Key{}, err
	}
	return ServiceAccount{ID: answer.ID, Name: string(answer.Name), Role: string(answer.Role), CreatedAt: at(int64(answer.CreatedAt))},
		Key{
			ID:        answer.APIKey.ID,
			Name:      string(answer.APIKey.Name),
			Value:     NewSecret(answer.APIKey.Value),
			CreatedAt: at(int64(answer.APIKey.CreatedAt)),
			ExpiresAt: at(int64(answer.APIKey.ExpiresAt)),
		}, nil
}

// createdAccount is the part of the answer to a create that is used.
type createdAccount struct {
	ID        string   `json:"id"`
	Name      label    `json:"name"`
	Role      label    `json:"role"`
	CreatedAt unixTime `json:"created_at"`
	APIKey    struct {
		ID        string   `json:"id"`
		Name      label    `json:"name"`
		Value     string   `json:"value"` // #nosec G117 -- read here, and never written
		CreatedAt unixTime `json:"created_at"`
		ExpiresAt unixTime `json:"expires_at"`
	} `json:"api_key"`
}

// GetServiceAccount returns one account. IsNotFound holds for an unknown one.
func (c *Client) GetServiceAccount(ctx context.Context, project, id string) (ServiceAccount, error) {
	answer, err := repeat(ctx, c, getServiceAccount, "read service account "+id+" in project "+project,
		func(a *openai.ProjectServiceAccount) bool { return a.ID != "" },
		func(ctx context.Context, o ...option.RequestOption) (*openai.ProjectServiceAccount, error) {
			return c.accounts.Get(ctx, project, id, o...)
		})
	if err != nil {
		return ServiceAccount{}, err
	}
	return serviceAccount(*answer), nil
}

// DeleteServiceAccount deletes an account and with it all its keys. An account
// that does not exist is an error for which IsNotFound holds.
func (c *Client) DeleteServiceAccount(ctx context.Context, project, id string) error {
	type deleted struct {
		Deleted bool `json:"deleted"`
	}
	_, err := repeat(ctx, c, deleteServiceAccount, "delete service account "+id+" in project "+project,
		func(d *deleted) bool { return d.Deleted },
		plain[deleted](func(ctx context.Context, o ...option.RequestOption) (*openai.AdminOrganizationProjectServiceAccountDeleteResponse, error) {
			return c.accounts.Delete(ctx, project, id, o...)
		}))
	return err
}

// ListServiceAccounts returns all accounts of a project.
func (c *Client) ListServiceAccounts(ctx context.Context, project string) ([]ServiceAccount, error) {
	return gather(func(each func([]ServiceAccount) error) error {
		return c.EachServiceAccount(ctx, project, each)
	})
}

// EachServiceAccount reads the accounts of a project without holding more than
// a page of them. It calls each with every page that is not empty, in the
// API's order, and stops at its first error. Only nil means that each has seen
// the whole listing.
func (c *Client) EachServiceAccount(ctx context.Context, project string, each func([]ServiceAccount) error) error {
	op := "list service accounts of project " + project
	return walk(c, op, func(a ServiceAccount) string { return a.ID },
		func(after string) (page[ServiceAccount], error) {
			params := openai.AdminOrganizationProjectServiceAccountListParams{Limit: param.NewOpt[int64](pageSize), After: cursor(after)}
			answer, err := repeat(ctx, c, listServiceAccounts, op, isListing[openai.ProjectServiceAccount],
				func(ctx context.Context, o ...option.RequestOption) (*listing[openai.ProjectServiceAccount], error) {
					return c.accounts.List(ctx, project, params, o...)
				})
			if err != nil {
				return page[ServiceAccount]{}, err
			}
			p := page[ServiceAccount]{last: answer.LastID, more: answer.HasMore}
			for _, a := range answer.Data {
				p.items = append(p.items, serviceAccount(a))
			}
			return p, nil
		}, each)
}

// serviceAccount copies the texts: the SDK's are parts of the item as it came,
// all of which they would keep in memory.
func serviceAccount(a openai.ProjectServiceAccount) ServiceAccount {
	return ServiceAccount{ID: strings.Clone(a.ID), Name: strings.Clone(a.Name), Role: strings.Clone(string(a.Role)), CreatedAt: at(a.CreatedAt)}
}
