// This file owns what a project allows: its hard spend limit, its model permissions and
// its rate limits.
//
// OpenAI's document declares no answer for a project without a spend limit or model
// permissions; a third party saw 404 for the limit, and the simulator answers both so.

package openaitest

import (
	"fmt"
	"net/http"
	"slices"
)

// spendLimit is a project's hard spend limit, in cents a month.
type spendLimit struct {
	cents  int64
	status string
}

// modelPermissions is a project's list of models.
type modelPermissions struct {
	mode   string
	models []string
}

// rateLimit is the limits of a model in a project.
type rateLimit struct {
	entity
	requests, tokens int64
}

const rateLimitList = "rate_limits"

// limitedModels have rate limits in every project.
var limitedModels = []string{defaultModel, "text-embedding-3-small"}

func (s *Server) addRateLimits(p *project) {
	p.rateLimits = newTable[*rateLimit]()
	for _, model := range limitedModels {
		p.rateLimits.add(&rateLimit{entity: s.newEntity(rateLimitList+p.id, "rl_", model, ""), requests: 500, tokens: 200_000})
	}
}

// SetSpendLimit sets a project's hard spend limit in cents a month, as a person would in
// the dashboard; 0 removes it.
func (s *Server) SetSpendLimit(projectID string, cents int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.projects.byID[projectID]; p != nil {
		if p.spendLimit = nil; cents != 0 {
			p.spendLimit = &spendLimit{cents: cents, status: "enforcing"}
		}
	}
}

// SetModelPermissions sets a project's model permissions, as a person would in the
// dashboard; mode "" removes them.
func (s *Server) SetModelPermissions(projectID, mode string, models ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.projects.byID[projectID]; p != nil {
		if p.models = nil; mode != "" {
			p.models = &modelPermissions{mode: mode, models: slices.Clone(models)}
		}
	}
}

// SetEnforcement sets what a spend limit's enforcement status is; OpenAI defines neither
// of its values.
func (s *Server) SetEnforcement(projectID, status string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.projects.byID[projectID]; p != nil && p.spendLimit != nil {
		p.spendLimit.status = status
	}
}

func (s *Server) getSpendLimit(c *call) answer {
	p, missing := s.activeProject(c)
	switch {
	case missing != nil:
		return *missing
	case p.spendLimit == nil:
		return fail(http.StatusNotFound, "spend_limit_not_found", "", fmt.Sprintf("No spend limit found for project '%s'.", p.id))
	}
	return ok(p.spendLimit.render())
}

func (s *Server) setSpendLimit(c *call) answer {
	f := c.fields("threshold_amount", "currency", "interval")
	var cents int64
	if !f.has("threshold_amount") {
		f.refuse("missing_required_parameter", "threshold_amount", "Missing required parameter: 'threshold_amount'.")
	}
	if f.decode("threshold_amount", "an integer", &cents) && cents < 1 {
		f.refuse("integer_out_of_range", "threshold_amount", fmt.Sprintf("Invalid 'threshold_amount': %d is not positive.", cents))
	}
	for name, value := range map[string]string{"currency": "USD", "interval": "month"} {
		f.requiredText(name)
		f.choice(name, value)
	}
	if f.bad != nil {
		return *f.bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	p.spendLimit = &spendLimit{cents: cents, status: "inactive"} // as in the mirrored reference
	return ok(p.spendLimit.render())
}

func (s *Server) deleteSpendLimit(c *call) answer {
	p, missing := s.activeProject(c)
	switch {
	case missing != nil:
		return *missing
	case p.spendLimit == nil:
		return fail(http.StatusNotFound, "spend_limit_not_found", "", fmt.Sprintf("No spend limit found for project '%s'.", p.id))
	}
	p.spendLimit = nil
	return ok(object{"object": "project.spend_limit.deleted", "deleted": true})
}

func (l *spendLimit) render() object {
	return object{
		"object": "project.spend_limit", "threshold_amount": l.cents, "currency": "USD", "interval": "month",
		"enforcement": object{"status": l.status},
	}
}

func (s *Server) getModelPermissions(c *call) answer {
	p, missing := s.activeProject(c)
	switch {
	case missing != nil:
		return *missing
	case p.models == nil:
		return fail(http.StatusNotFound, "model_permissions_not_found", "", fmt.Sprintf("No model permissions found for project '%s'.", p.id))
	}
	return ok(p.models.render())
}

func (s *Server) setModelPermissions(c *call) answer {
	f := c.fields("mode", "model_ids")
	f.requiredText("mode")
	mode := f.choice("mode", "allow_list", "deny_list")
	var models []string
	if !f.has("model_ids") {
		f.refuse("missing_required_parameter", "model_ids", "Missing required parameter: 'model_ids'.")
	}
	f.decode("model_ids", "an array of strings", &models)
	if f.bad != nil {
		return *f.bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	p.models = &modelPermissions{mode: mode, models: models}
	return ok(p.models.render())
}

func (s *Server) deleteModelPermissions(c *call) answer {
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	deleted := p.models != nil
	p.models = nil
	return ok(object{"object": "project.model_permissions.deleted", "deleted": deleted})
}

func (m *modelPermissions) render() object {
	return object{"object": "project.model_permissions", "mode": m.mode, "model_ids": append([]string{}, m.models...)}
}

func (s *Server) listRateLimits(c *call) answer {
	q, bad := c.query()
	if bad != nil {
		return *bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	return page(s, q, rateLimitList+p.id, &p.rateLimits, false, func(*rateLimit) bool { return true }, (*rateLimit).render)
}

func (s *Server) updateRateLimit(c *call) answer {
	f := c.fields("max_requests_per_1_minute", "max_tokens_per_1_minute")
	var requests, tokens int64
	f.decode("max_requests_per_1_minute", "an integer", &requests)
	f.decode("max_tokens_per_1_minute", "an integer", &tokens)
	if f.bad != nil {
		return *f.bad
	}
	p, missing := s.activeProject(c)
	if missing != nil {
		return *missing
	}
	l := p.rateLimits.byID[c.vars["rate_limit_id"]]
	if l == nil {
		return fail(http.StatusNotFound, "rate_limit_not_found", "", fmt.Sprintf("No rate limit found with id '%s'.", c.vars["rate_limit_id"]))
	}
	if f.has("max_requests_per_1_minute") {
		l.requests = requests
	}
	if f.has("max_tokens_per_1_minute") {
		l.tokens = tokens
	}
	return ok(l.render())
}

func (l *rateLimit) render() object {
	return object{
		"object": "project.rate_limit", "id": l.id, "model": l.name,
		"max_requests_per_1_minute": l.requests, "max_tokens_per_1_minute": l.tokens,
	}
}
