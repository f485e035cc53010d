// This file owns admin keys. A deleted or expired key is invalid immediately.

package openaitest

import (
	"fmt"
	"net/http"
	"time"
)

type access int

const (
	accessAll access = iota
	accessRead
	accessNone
)

type adminKey struct {
	credential
	access  access
	noUsage bool
}

const adminKeyList = "admin keys"

// AdminKeyOption configures an admin key.
type AdminKeyOption func(*adminKeyShape)

type adminKeyShape struct {
	access  access
	noUsage bool
	value   string
	life    time.Duration
}

// ReadOnly allows reads only; writes get 403.
func ReadOnly() AdminKeyOption { return func(k *adminKeyShape) { k.access = accessRead } }

// NoAccess creates a valid key without any permission.
func NoAccess() AdminKeyOption { return func(k *adminKeyShape) { k.access = accessNone } }

// WithoutUsage takes the permission to read costs and usage from the key.
func WithoutUsage() AdminKeyOption { return func(k *adminKeyShape) { k.noUsage = true } }

// ExpiresIn sets the key's lifetime, rounded down to seconds but at least one.
func ExpiresIn(d time.Duration) AdminKeyOption { return func(k *adminKeyShape) { k.life = d } }

// WithValue sets the key's value, for example so that two redacted values are equal.
func WithValue(value string) AdminKeyOption { return func(k *adminKeyShape) { k.value = value } }

func (s *Server) newAdminKey(name, value, requestID string, opts []AdminKeyOption) *adminKey {
	shape := adminKeyShape{value: value}
	for _, opt := range opts {
		opt(&shape)
	}
	if shape.value == "" {
		shape.value = "sk-admin-" + alnum(140)
	}
	k := &adminKey{
		credential: credential{
			entity: s.newEntity(adminKeyList, "key_", name, requestID),
			value:  shape.value,
		},
		access:  shape.access,
		noUsage: shape.noUsage,
	}
	k.activeAt = k.createdAt
	if requestID != "" {
		k.activeAt = k.createdAt.Add(s.opts.AdminActivationDelay)
	}
	if shape.life > 0 {
		s.setExpiry(&k.credential, max(1, int64(shape.life/time.Second)))
	}
	s.adminKeys.add(k)
	s.adminByValue[k.value] = k
	s.idByValue[k.value] = k.id
	s.record(EventCreated, KindAdminKey, k.id, k.name, "", requestID)
	return k
}

func (s *Server) removeAdminKey(k *adminKey, requestID string) {
	delete(s.adminByValue, k.value)
	s.adminKeys.remove(k)
	s.record(EventDeleted, KindAdminKey, k.id, k.name, "", requestID)
}

// AdminKey is the first admin key. The leak check ignores it; it may be deleted.
func (s *Server) AdminKey() (id, value string) { return s.rootKey.id, s.rootKey.value }

// AddAdminKey creates an admin key, as a person would in the dashboard: it works
// immediately, and the leak check ignores it.
func (s *Server) AddAdminKey(name string, opts ...AdminKeyOption) (id, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.newAdminKey(name, "", "", opts)
	s.kept[k.id] = true
	return k.id, k.value
}

// DeleteAdminKey deletes an admin key, as a person would in the dashboard. An unknown key
// is not an error.
func (s *Server) DeleteAdminKey(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.adminKeys.byID[id]; k != nil {
		s.removeAdminKey(k, "")
	}
}

// SetAdminKeyUsed sets when an admin key was last used, zero for never; later uses update
// it. OpenAI does not publish the precision of its last_used_at.
func (s *Server) SetAdminKeyUsed(id string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.adminKeys.byID[id]; k != nil {
		k.lastUsed = at
	}
}

// SetNewAdminKeys configures the admin keys that are created over HTTP from now on. It is
// unknown whether OpenAI gives a new key its creator's restrictions; ReadOnly simulates
// the worse case. Do not use WithValue here.
func (s *Server) SetNewAdminKeys(opts ...AdminKeyOption) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newAdminKeys = opts
}

func (s *Server) listAdminKeys(c *call) answer {
	q, bad := c.query("order")
	if bad != nil {
		return *bad
	}
	if bad := q.choose("order", "asc", "desc"); bad != nil {
		return *bad
	}
	return page(s, q, adminKeyList, &s.adminKeys, q.extra["order"] == "desc", func(*adminKey) bool { return true }, s.renderAdminKey)
}

func (s *Server) createAdminKey(c *call) answer {
	f := s.fields(c, "name", "expires_in_seconds")
	name := f.requiredText("name")
	seconds := f.seconds("expires_in_seconds")
	if f.bad != nil {
		return *f.bad
	}
	k := s.newAdminKey(name, "", c.id, s.newAdminKeys)
	s.setExpiry(&k.credential, seconds)
	o := s.renderAdminKey(k)
	o["value"] = k.value
	return ok(o)
}

func (s *Server) adminKey(c *call) (*adminKey, *answer) {
	id := c.vars["key_id"]
	k := s.adminKeys.byID[id]
	if k == nil {
		ans := fail(http.StatusNotFound, "admin_api_key_not_found", "", fmt.Sprintf("No admin API key found with id '%s'.", id))
		return nil, &ans
	}
	return k, nil
}

func (s *Server) getAdminKey(c *call) answer {
	k, missing := s.adminKey(c)
	if missing != nil {
		return *missing
	}
	return ok(s.renderAdminKey(k))
}

// deleteAdminKey allows a key to delete itself: OpenAI does not document whether that is
// allowed, and callers must handle both.
func (s *Server) deleteAdminKey(c *call) answer {
	k, missing := s.adminKey(c)
	if missing != nil {
		return *missing
	}
	s.removeAdminKey(k, c.id)
	return ok(object{"object": "organization.admin_api_key.deleted", "id": k.id, "deleted": true})
}

func (s *Server) renderAdminKey(k *adminKey) object {
	return object{
		"object":         "organization.admin_api_key",
		"id":             k.id,
		"name":           k.name,
		"redacted_value": redact(k.value),
		"created_at":     k.createdAt.Unix(),
		"expires_at":     unix(k.expiresAt),
		"last_used_at":   unix(k.lastUsed),
		"owner": object{
			"type":       "user",
			"object":     "organization.user",
			"id":         s.ownerID,
			"name":       "Simulated Owner",
			"created_at": s.rootKey.createdAt.Unix(),
			"role":       "owner",
		},
	}
}
