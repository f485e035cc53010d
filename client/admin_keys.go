package client

// This file owns admin keys: making, finding, checking and deleting them.

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"strings"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/pagination"
	"github.com/openai/openai-go/v3/packages/param"
)

// AdminKey is an admin key as the API shows it after its creation.
type AdminKey struct {
	ID            string    // opaque
	Name          string    // may be empty
	RedactedValue string    // such as "sk-admin...def"
	CreatedAt     time.Time // by OpenAI's clock, zero if the API does not say
	ExpiresAt     time.Time
	// LastUsedAt is when the key was last used, zero if it never was or if the
	// API does not say. How exact it is is undocumented.
	LastUsedAt time.Time
}

// Matches reports whether the redacted value can be that of key. OpenAI shows
// some of the front and some of the end, with dots or stars between.
func (k AdminKey) Matches(key Secret) bool {
	front, rest, found := cutMask(k.RedactedValue)
	if !found || rest == "" {
		return false
	}
	value := key.Reveal()
	return len(value) > len(front)+len(rest) && strings.HasPrefix(value, front) && strings.HasSuffix(value, rest)
}

// cutMask splits a redacted value at its mask: a run of dots, stars or the
// ellipsis character.
func cutMask(redacted string) (front, rest string, found bool) {
	const mask = ".*…"
	start := strings.IndexAny(redacted, mask)
	if start < 0 {
		return "", "", false
	}
	return redacted[:start], strings.TrimLeft(redacted[start:], mask), true
}

// CreateAdminKey makes an admin key that expires after expiry (0 = never). One
// request, never repeated: see Error.Ambiguous.
func (c *Client) CreateAdminKey(ctx context.Context, name string, expiry time.Duration) (AdminKey, Secret, error) {
	op := "create admin key " + name
	if expiry < 0 {
		return AdminKey{}, Secret{}, c.refuse(op, negative)
	}
	params := openai.AdminOrganizationAdminAPIKeyNewParams{Name: name, ExpiresInSeconds: seconds(expiry)}
	type created = openai.AdminOrganizationAdminAPIKeyNewResponse
	answer, err := once(ctx, c, createAdminKey, op,
		func(k *created) bool { return isText(k.AdminAPIKey.JSON.ID) && isText(k.JSON.Value) },
		func(ctx context.Context, o ...option.RequestOption) (*created, error) {
			return c.admin.New(ctx, params, o...)
		})
	if err != nil {
		return AdminKey{}, Secret{}, err
	}
	return adminKey(answer.AdminAPIKey), NewSecret(answer.Value), nil
}

// GetAdminKey reads one admin key; IsNotFound holds for an unknown one.
func (c *Client) GetAdminKey(ctx context.Context, id string) (AdminKey, error) {
	answer, err := repeat(ctx, c, getAdminKey, "read admin key "+id,
		func(k *openai.AdminAPIKey) bool { return k.ID != "" },
		func(ctx context.Context, o ...option.RequestOption) (*openai.AdminAPIKey, error) {
			return c.admin.Get(ctx, id, o...)
		})
	if err != nil {
		return AdminKey{}, err
	}
	return adminKey(*answer), nil
}

// ListAdminKeys returns all admin keys of the organization.
func (c *Client) ListAdminKeys(ctx context.Context) ([]AdminKey, error) {
	const op = "list admin keys"
	return collect(c, op, func(k AdminKey) string { return k.ID },
		func(after string) (page[AdminKey], error) {
			params := openai.AdminOrganizationAdminAPIKeyListParams{Limit: param.NewOpt[int64](pageSize), After: cursor(after)}
			type listing = pagination.CursorPage[openai.AdminAPIKey]
			answer, err := repeat(ctx, c, listAdminKeys, op, func(l *listing) bool { return l.JSON.Data.Valid() && saysMore(l.JSON.HasMore) },
				func(ctx context.Context, o ...option.RequestOption) (*listing, error) {
					return c.admin.List(ctx, params, o...)
				})
			if err != nil {
				return page[AdminKey]{}, err
			}
			p := page[AdminKey]{more: answer.HasMore}
			for _, k := range answer.Data {
				p.items = append(p.items, adminKey(k))
			}
			return p, nil
		})
}

// DeleteAdminKey deletes an admin key; IsNotFound holds for an unknown one.
func (c *Client) DeleteAdminKey(ctx context.Context, id string) error {
	type deleted = openai.AdminOrganizationAdminAPIKeyDeleteResponse
	_, err := repeat(ctx, c, deleteAdminKey, "delete admin key "+id,
		func(d *deleted) bool { return d.Deleted },
		func(ctx context.Context, o ...option.RequestOption) (*deleted, error) {
			return c.admin.Delete(ctx, id, o...)
		})
	return err
}

// CheckWrite finds out, without side effect, whether the admin key may write:
// OpenAI checks the permission before it looks for the thing, so deleting an
// id that cannot exist answers 404 when it is allowed and 403 (or 401) when
// not. Any other refusal comes after the permission check and counts as
// allowed.
func (c *Client) CheckWrite(ctx context.Context) error {
	var unique [12]byte
	_, _ = rand.Read(unique[:]) // never fails: crypto/rand aborts the process instead
	e := AsError(c.DeleteAdminKey(ctx, "key_vaultpermissioncheck"+hex.EncodeToString(unique[:])))
	if e == nil || e.NotFound() || e.documented && (e.Status == http.StatusBadRequest || e.Status == http.StatusUnprocessableEntity) {
		return nil
	}
	e.Op = "check that the admin key may write"
	return e
}

func adminKey(k openai.AdminAPIKey) AdminKey {
	return AdminKey{ID: k.ID, Name: k.Name, RedactedValue: k.RedactedValue, CreatedAt: at(k.CreatedAt), ExpiresAt: at(k.ExpiresAt), LastUsedAt: at(k.LastUsedAt)}
}
