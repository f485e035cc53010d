// This file owns service accounts. An account's keys are deleted with it in the same step.

package openaitest

import (
	"fmt"
	"net/http"
	"slices"
)

const (
	roleMember = "member"
	roleOwner  = "owner"
	roleNone   = "none" // no permission at all
)

type account struct {
	entity
	project *project
	role    string
	keys    []*apiKey // separate from those of the project, which are many
}

func (s *Server) newAccount(p *project, name, role, requestID string) *account {
	a := &account{
		entity:  s.newEntity("accounts of "+p.id, "user-", name, requestID),
		project: p,
		role:    role,
	}
	p.accounts.add(a)
	s.record(EventCreated, KindAccount, a.id, a.name, p.id, requestID)
	return a
}

// AddServiceAccount creates an account, as a person would in the dashboard: the leak check
// ignores it, and it has no key. It panics if the project does not exist.
func (s *Server) AddServiceAccount(projectID, name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.projects.byID[projectID]
	if p == nil {
		panic("openaitest: project " + projectID + " not found")
	}
	return s.addAccount(p, name)
}

func (s *Server) addAccount(p *project, name string) string {
	a := s.newAccount(p, name, roleMember, "")
	s.kept[a.id] = true
	return a.id
}

// DeleteServiceAccount deletes an account and its keys, as a person would in the
// dashboard. An unknown account is not an error.
func (s *Server) DeleteServiceAccount(projectID, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.projects.byID[projectID]; p != nil && p.accounts.byID[id] != nil {
		s.removeAccount(p.accounts.byID[id], "")
	}
}

func (s *Server) removeAccount(a *account, requestID string) {
	for _, k := range slices.Clone(a.keys) {
		s.removeKey(k, requestID)
	}
	a.project.accounts.remove(a)
	s.record(EventDeleted, KindAccount, a.id, a.name, a.project.id, requestID)
}

// account finds the account of the path.
func (s *Server) account(c *call) (*account, *answer) {
	p, missing := s.activeProject(c)
	if missing != nil {
		return nil, missing
	}
	id := c.vars["service_account_id"]
	a := p.accounts.byID[id]
	if a == nil {
		ans := fail(http.StatusNotFound, "service_account_not_found", "",
			fmt.Sprintf("No service account found with id '%s' in project '%s'.", id, p.id))
		return nil, &ans
	}
	return a, nil
}

func (s *Server) listAccounts(c *call) answer {
	q, bad := c.query()
	if bad != nil {
		return *bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	return page(s, q, "accounts of "+p.id, &p.accounts, false, func(*account) bool { return true }, (*account).render)
}

func (s *Server) createAccount(c *call) answer {
	f := s.fields(c, "name", "create_service_account_only", "expires_in_seconds")
	name := f.requiredText("name")
	only := f.nullableFlag("create_service_account_only")
	seconds := f.nullableSeconds("expires_in_seconds")
	if only && seconds != 0 {
		f.refuse("invalid_value", "expires_in_seconds", "'expires_in_seconds' must be null or absent when 'create_service_account_only' is true.")
	}
	if f.bad != nil {
		return *f.bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	if only {
		o := s.newAccount(p, name, roleNone, c.id).render()
		o["api_key"] = nil
		return ok(o)
	}
	if refused := s.keyPolicy(seconds, true); refused != nil {
		return *refused
	}
	a := s.newAccount(p, name, roleMember, c.id)
	o := a.render()
	o["api_key"] = s.newKey(a, "", nil, seconds, c.id).renderNew()
	return ok(o)
}

func (s *Server) getAccount(c *call) answer {
	a, missing := s.account(c)
	if missing != nil {
		return *missing
	}
	return ok(a.render())
}

func (s *Server) updateAccount(c *call) answer {
	f := c.fields("name", "role")
	name := f.text("name")
	role := f.choice("role", roleMember, roleOwner)
	if f.bad != nil {
		return *f.bad
	}
	a, missing := s.account(c)
	if missing != nil {
		return *missing
	}
	if name != "" {
		a.name = name
	}
	if role != "" {
		a.role = role
	}
	s.record(EventUpdated, KindAccount, a.id, a.name, a.project.id, c.id)
	return ok(a.render())
}

func (s *Server) deleteAccount(c *call) answer {
	a, missing := s.account(c)
	if missing != nil {
		return *missing
	}
	s.removeAccount(a, c.id)
	return ok(object{"object": "organization.project.service_account.deleted", "id": a.id, "deleted": true})
}

func (a *account) render() object {
	return object{
		"object":     "organization.project.service_account",
		"id":         a.id,
		"name":       a.name,
		"role":       a.role,
		"created_at": a.createdAt.Unix(),
	}
}
