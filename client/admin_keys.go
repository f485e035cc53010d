package client

// This file owns admin keys: creating, finding, checking and deleting them.

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"strings"
	"time"
)

// AdminKey is an admin key as the API returns it after its creation.
type AdminKey struct {
	ID            string    // opaque
	Name          string    // may be empty
	RedactedValue string    // such as "sk-admin...def"
	CreatedAt     time.Time // by OpenAI's clock, zero if absent
	ExpiresAt     time.Time
	// LastUsedAt is when the key was last used, zero if it never was or if absent. Its
	// precision is undocumented.
	LastUsedAt time.Time
}

// Matches reports whether the redacted value fits key. OpenAI shows the start and the
// end of a key, with dots or stars in between.
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

// CreateAdminKey creates an admin key that expires after expiry (0 for no expiry). It
// sends one request and never repeats it; see Error.Ambiguous.
func (c *Client) CreateAdminKey(ctx context.Context, name string, expiry time.Duration, options ...CallOption) (AdminKey, Secret, error) {
	what := "create admin key " + name
	if expiry < 0 {
		return AdminKey{}, Secret{}, c.refuse(what, negative)
	}
	got, err := doOnce[newAdminKey](ctx, c, request{
		operation: createAdminKey, what: what,
		body: struct {
			Name    string `json:"name"`
			Expires int64  `json:"expires_in_seconds,omitempty"`
		}{name, seconds(expiry)},
		options: optionsOf(options),
	})
	if err != nil {
		return AdminKey{}, Secret{}, err
	}
	return got.public(), NewSecret(got.Value), nil
}

// GetAdminKey reads one admin key; IsNotFound holds for an unknown one.
func (c *Client) GetAdminKey(ctx context.Context, id string) (AdminKey, error) {
	got, err := doWithRetry[adminKey](ctx, c, request{operation: getAdminKey, what: "read admin key " + id, ids: []string{id}})
	return got.public(), err
}

// ListAdminKeys returns all admin keys of the organization.
func (c *Client) ListAdminKeys(ctx context.Context) ([]AdminKey, error) {
	const what = "list admin keys"
	return collect(c, what, func(k AdminKey) string { return k.ID },
		func(after string) (page[AdminKey], error) {
			got, err := doWithRetry[listing[adminKey]](ctx, c, request{operation: listAdminKeys, what: what, query: pageAfter(after)})
			p := pageOf(got, adminKey.public)
			p.last = "" // the documented cursor of this listing is the last item's ID
			return p, err
		})
}

// DeleteAdminKey deletes an admin key; IsNotFound holds for an unknown one.
func (c *Client) DeleteAdminKey(ctx context.Context, id string) error {
	_, err := doWithRetry[deletion](ctx, c, request{operation: deleteAdminKey, what: "delete admin key " + id, ids: []string{id}})
	return err
}

// CheckWrite checks, without side effect, whether the admin key may write: it deletes an
// ID that cannot exist. OpenAI checks the permission before the ID, so the answer is 404
// if the key may write, and otherwise 403 or 401. Any other 4xx in OpenAI's form comes
// after the permission check and counts as allowed.
func (c *Client) CheckWrite(ctx context.Context) error {
	var unique [12]byte
	_, _ = rand.Read(unique[:]) // never fails: crypto/rand aborts the process instead
	e := AsError(c.DeleteAdminKey(ctx, "key_vaultpermissioncheck"+hex.EncodeToString(unique[:])))
	if e == nil || e.NotFound() || e.documented && (e.Status == http.StatusBadRequest || e.Status == http.StatusUnprocessableEntity) {
		return nil
	}
	e.Op = "check that the admin key has write permission"
	return e
}

// adminKey is an admin key in an answer. The owner is not decoded: OpenAI's examples
// contradict its documented form.
type adminKey struct {
	ID            string   `json:"id"`
	Name          label    `json:"name"`
	RedactedValue label    `json:"redacted_value"`
	CreatedAt     unixTime `json:"created_at"`
	ExpiresAt     unixTime `json:"expires_at"`
	LastUsedAt    unixTime `json:"last_used_at"`
}

func (k adminKey) valid() bool { return k.ID != "" }

func (k adminKey) public() AdminKey {
	return AdminKey{
		ID: k.ID, Name: string(k.Name), RedactedValue: string(k.RedactedValue),
		CreatedAt: k.CreatedAt.time(), ExpiresAt: k.ExpiresAt.time(), LastUsedAt: k.LastUsedAt.time(),
	}
}

// newAdminKey is the answer to a create.
type newAdminKey struct {
	adminKey
	Value string `json:"value"` // #nosec G117 -- decoded only, never encoded
}

func (k newAdminKey) valid() bool { return k.adminKey.valid() && k.Value != "" }
