// This file owns admin keys: who may manage the organization, and what a
// rotation replaces. A deleted or expired one is dead at once.

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
	access access
}

const adminKeyList = "admin keys"

// AdminKeyOption shapes an admin key.
type AdminKeyOption func(*adminKeyShape)

type adminKeyShape struct {
	access access
	value  string
	life   time.Duration
}

// ReadOnly lets the key read; its writes are 403.
func ReadOnly() AdminKeyOption { return func(k *adminKeyShape) { k.access = accessRead } }

// NoAccess makes a key that is valid but may do nothing.
func NoAccess() AdminKeyOption { return func(k *adminKeyShape) { k.access = accessNone } }

// ExpiresIn ends the key after a time, rounded down to seconds but at least one.
func ExpiresIn(d time.Duration) AdminKeyOption { return func(k *adminKeyShape) { k.life = d } }

// WithValue gives the key a value of the test's choice, for example to make two
// redacted values alike.
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
		access: shape.access,
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

// AdminKey is the first admin key. It is kept, and may be deleted.
func (s *Server) AdminKey() (id, value string) { return s.rootKey.id, s.rootKey.value }

// AddAdminKey makes an admin key as a person would in the dashboard: it works at
// once and is kept.
func (s *Server) AddAdminKey(name string, opts ...AdminKeyOption) (id, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.newAdminKey(name, "", "", opts)
	s.kept[k.id] = true
	return k.id, k.value
}

// DeleteAdminKey deletes an admin key as a person would; one that is gone
// already is no error.
func (s *Server) DeleteAdminKey(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.adminKeys.byID[id]; k != nil {
		s.removeAdminKey(k, "")
	}
}

// SetAdminKeyUsed says when an admin key was last used, zero for never; a later
// use counts as ever. How exact OpenAI's own last_used_at is is not published.
func (s *Server) SetAdminKeyUsed(id string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.adminKeys.byID[id]; k != nil {
		k.lastUsed = at
	}
}

// SetNewAdminKeys shapes the admin keys made over HTTP from now on. It is not
// known whether the real API gives a new key its creator's restrictions; with
// ReadOnly a caller meets the worse case. WithValue makes no sense here.
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

// deleteAdminKey lets a key delete itself: nothing says that it may not, and a
// caller must survive either.
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
