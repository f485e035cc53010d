// This file owns projects. A project is never deleted; archiving it deletes its accounts
// and their keys.

package openaitest

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

type project struct {
	entity
	archivedAt  time.Time // zero if active
	residency   string
	externalKey string
	accounts    table[*account]
	keys        table[*apiKey]
	spendLimit  *spendLimit       // nil for none
	models      *modelPermissions // nil for none
	rateLimits  table[*rateLimit]
}

const projectList = "projects"

func (s *Server) newProject(name, requestID string) *project {
	p := &project{
		entity:   s.newEntity(projectList, "proj_", name, requestID),
		accounts: newTable[*account](),
		keys:     newTable[*apiKey](),
	}
	s.addRateLimits(p)
	s.projects.add(p)
	s.record(EventCreated, KindProject, p.id, p.name, p.id, requestID)
	return p
}

// AddProject creates a project, as a person would in the dashboard, and returns its ID.
func (s *Server) AddProject(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newProject(name, "").id
}

// SetResidency sets a project's region, such as "EU_STORAGE_PROCESSING", "" for none: the
// inference API then accepts its keys only at eu.api.openai.com, and answers elsewhere
// with a 401.
func (s *Server) SetResidency(id, region string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.projects.byID[id]; p != nil {
		p.residency = region
	}
}

// host is the only host that accepts the project's keys, "" for any.
func (p *project) host() string {
	region, _, _ := strings.Cut(strings.ToLower(p.residency), "_")
	if region == "" || region == "global" {
		return ""
	}
	return region + ".api.openai.com"
}

// ArchiveProject archives a project, as a person would in the dashboard, which deletes its
// accounts and keys.
func (s *Server) ArchiveProject(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.projects.byID[id]; p != nil && p.archivedAt.IsZero() {
		s.archive(p, "")
	}
}

func (s *Server) archive(p *project, requestID string) {
	for _, a := range slices.Clone(p.accounts.list) {
		s.removeAccount(a, requestID)
	}
	p.archivedAt = s.now()
	s.record(EventArchived, KindProject, p.id, p.name, p.id, requestID)
}

// project finds the project of the path, even if archived.
func (s *Server) project(c *call) (*project, *answer) {
	id := c.vars["project_id"]
	p := s.projects.byID[id]
	if p == nil {
		ans := fail(http.StatusNotFound, "project_not_found", "", fmt.Sprintf("No project found with id '%s'.", id))
		return nil, &ans
	}
	return p, nil
}

func (s *Server) activeProject(c *call) (*project, *answer) {
	p, missing := s.project(c)
	if missing == nil && !p.archivedAt.IsZero() {
		ans := fail(http.StatusBadRequest, "project_archived", "", fmt.Sprintf("Project '%s' is archived.", p.id))
		return nil, &ans
	}
	return p, missing
}

func (s *Server) listProjects(c *call) answer {
	q, bad := c.query("include_archived")
	if bad != nil {
		return *bad
	}
	if bad := q.choose("include_archived", "true", "false"); bad != nil {
		return *bad
	}
	all, _ := strconv.ParseBool(q.extra["include_archived"])
	show := func(p *project) bool { return all || p.archivedAt.IsZero() }
	return page(s, q, projectList, &s.projects, false, show, (*project).render)
}

func (s *Server) createProject(c *call) answer {
	f := c.fields("name", "residency", "external_key_id")
	name := f.requiredText("name")
	residency := f.nullableText("residency")
	externalKey := f.nullableText("external_key_id")
	if f.bad != nil {
		return *f.bad
	}
	p := s.newProject(name, c.id)
	p.residency, p.externalKey = residency, externalKey
	return ok(p.render())
}

func (s *Server) getProject(c *call) answer {
	p, missing := s.project(c)
	if missing != nil {
		return *missing
	}
	return ok(p.render())
}

func (s *Server) updateProject(c *call) answer {
	f := c.fields("name", "external_key_id")
	name := f.nullableText("name")
	externalKey := f.nullableText("external_key_id")
	if f.bad != nil {
		return *f.bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	if name != "" {
		p.name = name
	}
	if externalKey != "" {
		p.externalKey = externalKey
	}
	s.record(EventUpdated, KindProject, p.id, p.name, p.id, c.id)
	return ok(p.render())
}

func (s *Server) archiveProject(c *call) answer {
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	s.archive(p, c.id)
	return ok(p.render())
}

func (p *project) render() object {
	status := "active"
	if !p.archivedAt.IsZero() {
		status = "archived"
	}
	o := object{
		"id":          p.id,
		"object":      "organization.project",
		"name":        p.name,
		"status":      status,
		"created_at":  p.createdAt.Unix(),
		"archived_at": unix(p.archivedAt),
	}
	if p.residency != "" {
		o["residency"] = p.residency
	}
	if p.externalKey != "" {
		o["external_key_id"] = p.externalKey
	}
	return o
}
