// This file owns authentication and permissions. Permissions are checked before any
// lookup, so a caller without them cannot find out what exists.

package openaitest

import (
	"net/http"
	"slices"
	"strings"
)

const (
	scopeRead  = "api.management.read"
	scopeWrite = "api.management.write"
	scopeUsage = "api.usage.read"
)

// authorize returns an error answer, or nil. On admin routes it stores the caller's key in
// the call.
func (s *Server) authorize(c *call) *answer {
	value := bearer(c.r)
	if value == "" {
		ans := fail(http.StatusUnauthorized, "", "",
			"You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).")
		return &ans
	}
	if org := c.r.Header.Get("OpenAI-Organization"); org != "" && org != s.orgID {
		ans := fail(http.StatusUnauthorized, "mismatched_organization", "",
			"OpenAI-Organization header should match organization for API key.")
		return &ans
	}
	key, adminKey := s.keyByValue[value], s.adminByValue[value]
	if key != nil && !key.working(c.now) {
		key = nil
	}
	if adminKey != nil && !adminKey.working(c.now) {
		adminKey = nil
	}
	switch {
	case key == nil && adminKey == nil:
		ans := fail(http.StatusUnauthorized, "invalid_api_key", "",
			"Incorrect API key provided: "+mask(value)+". You can find your API key at https://platform.openai.com/account/api-keys.")
		return &ans
	case c.route.admin:
		return authorizeAdmin(c, adminKey)
	default:
		return authorizeInference(c, key)
	}
}

// authorizeAdmin answers with a bare string under "error", the form of admin permission
// errors that was observed on the live API.
func authorizeAdmin(c *call, key *adminKey) *answer {
	missing := ""
	switch {
	case c.route.needs == scopeUsage && (key == nil || key.access == accessNone || key.noUsage):
		missing = scopeUsage
	case !c.route.writes() && (key == nil || key.access == accessNone):
		missing = scopeRead
	case c.route.writes() && (key == nil || key.access != accessAll):
		missing = scopeWrite
	}
	if missing != "" {
		return &answer{status: http.StatusForbidden, body: object{"error": insufficient(missing)}}
	}
	key.lastUsed = c.now
	c.admin = key
	return nil
}

// authorizeInference accepts a key at the host of its project's region if it is
// unrestricted or has one of the route's scopes, and its account has a role in the
// project. Admin keys (nil here) are rejected.
func authorizeInference(c *call, key *apiKey) *answer {
	if key != nil {
		if host := key.account.project.host(); host != "" && c.r.Host != host {
			ans := fail(http.StatusUnauthorized, "incorrect_hostname", "",
				"Attempted to access resource with incorrect regional hostname. Please make your request to "+host)
			return &ans
		}
	}
	allowed := key != nil && key.account.role != roleNone &&
		(len(key.scopes) == 0 || slices.ContainsFunc(c.route.scopes, func(scope string) bool {
			return slices.Contains(key.scopes, scope)
		}))
	if !allowed {
		ans := fail(http.StatusForbidden, "missing_scope", "", insufficient(c.route.scopes[0]))
		return &ans
	}
	key.lastUsed = c.now
	c.key = key
	return nil
}

func insufficient(scope string) string {
	return "You have insufficient permissions for this operation. Missing scopes: " + scope +
		". Check that you have the correct role in your organization, and if you're using a restricted API key, that it has the necessary scopes."
}

// mask masks a wrong key as OpenAI's 401 does: its start, asterisks, and its last four
// characters.
func mask(value string) string {
	const head, tail = 8, 4
	if len(value) < head+tail+4 {
		return strings.Repeat("*", len(value))
	}
	return value[:head] + strings.Repeat("*", len(value)-head-tail) + value[len(value)-tail:]
}

// redact masks a key as lists do: "sk-admin...a1B2".
func redact(value string) string {
	const head, tail = 8, 4
	if len(value) < head+tail {
		return "..."
	}
	return value[:head] + "..." + value[len(value)-tail:]
}
