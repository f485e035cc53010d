// This file owns project keys, all of which belong to service accounts. A key's value is
// returned only in the answer to its create.

package openaitest

import (
	"fmt"
	"net/http"
	"slices"
	"time"
)

type apiKey struct {
	credential
	account *account
	scopes  []string // empty for all permissions of the account
}

// defaultKeyName is the name of a key created without one, as in the API reference's
// example.
const defaultKeyName = "Secret Key"

func (s *Server) newKey(a *account, name string, scopes []string, seconds int64, requestID string) *apiKey {
	if name == "" {
		name = defaultKeyName
	}
	k := &apiKey{
		credential: credential{
			entity: s.newEntity("keys of "+a.project.id, "key_", name, requestID),
			value:  "sk-svcacct-" + alnum(140),
		},
		account: a,
		scopes:  scopes,
	}
	k.activeAt = k.createdAt.Add(s.opts.ActivationDelay)
	s.setExpiry(&k.credential, seconds)
	a.project.keys.add(k)
	a.keys = append(a.keys, k)
	s.keyByValue[k.value] = k
	s.idByValue[k.value] = k.id
	s.record(EventCreated, KindKey, k.id, k.name, a.project.id, requestID)
	return k
}

func (s *Server) removeKey(k *apiKey, requestID string) {
	delete(s.keyByValue, k.value)
	k.account.project.keys.remove(k)
	k.account.keys = slices.DeleteFunc(k.account.keys, func(other *apiKey) bool { return other == k })
	s.record(EventDeleted, KindKey, k.id, k.name, k.account.project.id, requestID)
}

// SetKeyCreationDisabled sets whether the organization's policy forbids new project keys;
// the error is a 403.
func (s *Server) SetKeyCreationDisabled(disabled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.creationDisabled = disabled
}

// keyPolicy returns an error answer if a key with that lifetime is not allowed. OpenAI does
// not publish the statuses and codes of these errors.
func (s *Server) keyPolicy(seconds int64, creating bool) *answer {
	limit := int64(s.opts.MaxKeyLifetime / time.Second)
	var ans answer
	switch {
	case creating && s.creationDisabled:
		ans = fail(http.StatusForbidden, "key_creation_disabled", "", "Creation of API keys is disabled by your organization's policy.")
	case limit > 0 && creating && seconds == 0:
		ans = fail(http.StatusBadRequest, "key_expiration_required", "expires_in_seconds",
			fmt.Sprintf("Your organization's policy requires API keys to expire: 'expires_in_seconds' must be given and at most %d.", limit))
	case limit > 0 && seconds > limit:
		ans = fail(http.StatusBadRequest, "key_expiration_too_long", "expires_in_seconds",
			fmt.Sprintf("Your organization's policy limits the lifetime of API keys: 'expires_in_seconds' must be at most %d.", limit))
	default:
		return nil
	}
	return &ans
}

// key finds the key of the path.
func (s *Server) key(c *call) (*apiKey, *answer) {
	p, missing := s.activeProject(c)
	if missing != nil {
		return nil, missing
	}
	id := c.vars["api_key_id"]
	k := p.keys.byID[id]
	if k == nil {
		ans := fail(http.StatusNotFound, "api_key_not_found", "",
			fmt.Sprintf("No API key found with id '%s' in project '%s'.", id, p.id))
		return nil, &ans
	}
	return k, nil
}

func (s *Server) createAccountKey(c *call) answer {
	f := s.fields(c, "name", "scopes", "expires_in_seconds")
	name := f.text("name")
	scopes := f.scopes("scopes")
	seconds := f.nullableSeconds("expires_in_seconds")
	if f.bad != nil {
		return *f.bad
	}
	a, missing := s.account(c)
	if missing != nil {
		return *missing
	}
	if refused := s.keyPolicy(seconds, true); refused != nil {
		return *refused
	}
	return ok(s.newKey(a, name, scopes, seconds, c.id).renderNew())
}

func (s *Server) listKeys(c *call) answer {
	q, bad := c.query("owner_project_access")
	if bad != nil {
		return *bad
	}
	if bad := q.choose("owner_project_access", "active", "inactive", "any"); bad != nil {
		return *bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	show := func(k *apiKey) bool {
		switch q.extra["owner_project_access"] {
		case "any":
			return true
		case "inactive":
			return k.account.role == roleNone
		default:
			return k.account.role != roleNone
		}
	}
	return page(s, q, "keys of "+p.id, &p.keys, false, show, (*apiKey).render)
}

func (s *Server) getKey(c *call) answer {
	k, missing := s.key(c)
	if missing != nil {
		return *missing
	}
	return ok(k.render())
}

func (s *Server) updateKey(c *call) answer {
	f := s.fields(c, "scopes", "expires_in_seconds")
	scopes := f.scopes("scopes")
	seconds := f.seconds("expires_in_seconds")
	if len(f.raw) == 0 {
		f.refuse("missing_required_parameter", "", "At least one of 'scopes' and 'expires_in_seconds' is required.")
	}
	if f.bad != nil {
		return *f.bad
	}
	k, missing := s.key(c)
	if missing != nil {
		return *missing
	}
	if !k.alive(c.now) {
		return fail(http.StatusBadRequest, "api_key_expired", "", "Expired API keys cannot be updated.")
	}
	if refused := s.keyPolicy(seconds, false); refused != nil {
		return *refused
	}
	if scopes != nil {
		k.scopes = scopes
	}
	s.setExpiry(&k.credential, seconds)
	s.record(EventUpdated, KindKey, k.id, k.name, k.account.project.id, c.id)
	return ok(k.render())
}

func (s *Server) deleteKey(c *call) answer {
	k, missing := s.key(c)
	if missing != nil {
		return *missing
	}
	if s.opts.DeleteServiceAccountKeyRefused {
		return fail(http.StatusBadRequest, "service_account_key", "",
			"This API key belongs to a service account and cannot be deleted here. Delete the service account instead.")
	}
	s.removeKey(k, c.id)
	return ok(object{"object": "organization.project.api_key.deleted", "id": k.id, "deleted": true})
}

// renderNew is the only rendering that includes the value.
func (k *apiKey) renderNew() object {
	return object{
		"object":     "organization.project.service_account.api_key",
		"id":         k.id,
		"name":       k.name,
		"value":      k.value,
		"created_at": k.createdAt.Unix(),
		"expires_at": unix(k.expiresAt),
	}
}

func (k *apiKey) render() object {
	access := "active"
	if k.account.role == roleNone {
		access = "inactive"
	}
	return object{
		"object":               "organization.project.api_key",
		"id":                   k.id,
		"name":                 k.name,
		"redacted_value":       redact(k.value),
		"created_at":           k.createdAt.Unix(),
		"last_used_at":         unix(k.lastUsed),
		"expires_at":           unix(k.expiresAt),
		"owner_project_access": access,
		"owner": object{
			"type": "service_account",
			"service_account": object{
				"id":         k.account.id,
				"name":       k.account.name,
				"created_at": k.account.createdAt.Unix(),
				"role":       k.account.role,
			},
		},
	}
}
