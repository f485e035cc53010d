// This file owns the table of routes, with one line per operation. Path parameters have
// the names of OpenAI's document, since the contract test finds operations by template.

package openaitest

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
)

type route struct {
	method   string
	template string // without /v1
	admin    bool
	scopes   []string // inference: a restricted key needs one of these
	needs    string   // admin: the permission, "" for that of its method
	handle   func(*Server, *call) answer
	discard  bool // the body is counted and not kept

	segments []string
}

const (
	projectsRoute    = "/organization/projects"
	projectRoute     = projectsRoute + "/{project_id}"
	archiveRoute     = projectRoute + "/archive"
	spendLimitRoute  = projectRoute + "/spend_limit"
	modelsOfRoute    = projectRoute + "/model_permissions"
	rateLimitsRoute  = projectRoute + "/rate_limits"
	accountsRoute    = projectRoute + "/service_accounts"
	accountRoute     = accountsRoute + "/{service_account_id}"
	accountKeysRoute = accountRoute + "/api_keys"
	keysRoute        = projectRoute + "/api_keys"
	keyRoute         = keysRoute + "/{api_key_id}"
	adminKeysRoute   = "/organization/admin_api_keys"
	adminKeyRoute    = adminKeysRoute + "/{key_id}"
	costsRoute       = "/organization/costs"
	usageRoute       = "/organization/usage"
	modelsRoute      = "/models"
)

var routes = prepare(append([]*route{
	admin(http.MethodGet, projectsRoute, (*Server).listProjects),
	admin(http.MethodPost, projectsRoute, (*Server).createProject),
	admin(http.MethodGet, projectRoute, (*Server).getProject),
	admin(http.MethodPost, projectRoute, (*Server).updateProject),
	admin(http.MethodPost, archiveRoute, (*Server).archiveProject),

	admin(http.MethodGet, spendLimitRoute, (*Server).getSpendLimit),
	admin(http.MethodPost, spendLimitRoute, (*Server).setSpendLimit),
	admin(http.MethodDelete, spendLimitRoute, (*Server).deleteSpendLimit),
	admin(http.MethodGet, modelsOfRoute, (*Server).getModelPermissions),
	admin(http.MethodPost, modelsOfRoute, (*Server).setModelPermissions),
	admin(http.MethodDelete, modelsOfRoute, (*Server).deleteModelPermissions),
	admin(http.MethodGet, rateLimitsRoute, (*Server).listRateLimits),
	admin(http.MethodPost, rateLimitsRoute+"/{rate_limit_id}", (*Server).updateRateLimit),

	admin(http.MethodGet, accountsRoute, (*Server).listAccounts),
	admin(http.MethodPost, accountsRoute, (*Server).createAccount),
	admin(http.MethodGet, accountRoute, (*Server).getAccount),
	admin(http.MethodPost, accountRoute, (*Server).updateAccount),
	admin(http.MethodDelete, accountRoute, (*Server).deleteAccount),
	admin(http.MethodPost, accountKeysRoute, (*Server).createAccountKey),

	admin(http.MethodGet, keysRoute, (*Server).listKeys),
	admin(http.MethodGet, keyRoute, (*Server).getKey),
	admin(http.MethodPost, keyRoute, (*Server).updateKey),
	admin(http.MethodDelete, keyRoute, (*Server).deleteKey),

	admin(http.MethodGet, adminKeysRoute, (*Server).listAdminKeys),
	admin(http.MethodPost, adminKeysRoute, (*Server).createAdminKey),
	admin(http.MethodGet, adminKeyRoute, (*Server).getAdminKey),
	admin(http.MethodDelete, adminKeyRoute, (*Server).deleteAdminKey),

	usage(costsRoute, (*Server).listCosts),

	inference(http.MethodGet, modelsRoute, (*Server).listModels, "api.model.read", "model.read", "api.all.read"),
	inference(http.MethodPost, "/responses", (*Server).createResponse, "api.responses.write"),
	inference(http.MethodPost, "/chat/completions", (*Server).createChatCompletion, "api.model.request", "model.request"),
	inference(http.MethodPost, "/embeddings", (*Server).createEmbedding, "api.model.request", "model.request"),
}, slices.Concat(usageRoutes(), streamRoutes)...))

// usageRoutes has a route for each kind of usage.
func usageRoutes() (all []*route) {
	for _, kind := range UsageKinds {
		all = append(all, usage(usageRoute+"/"+kind, listUsage(kind)))
	}
	return all
}

// usage is a route that needs a permission of its own.
func usage(template string, handle func(*Server, *call) answer) *route {
	return &route{method: http.MethodGet, template: template, admin: true, handle: handle, needs: scopeUsage}
}

func admin(method, template string, handle func(*Server, *call) answer) *route {
	return &route{method: method, template: template, admin: true, handle: handle}
}

func inference(method, template string, handle func(*Server, *call) answer, scopes ...string) *route {
	return &route{method: method, template: template, scopes: scopes, handle: handle}
}

func prepare(table []*route) []*route {
	for _, rt := range table {
		rt.segments = strings.Split(rt.template, "/")
	}
	return table
}

// match finds the route of an escaped path, or the methods of the path. Segments are
// unescaped separately, so that an ID with an escaped slash stays one ID.
func match(method, escaped string) (*route, map[string]string, string) {
	path, under := strings.CutPrefix(escaped, basePath)
	if !under {
		return nil, nil, ""
	}
	segments := strings.Split(path, "/")
	var allowed []string
	for _, rt := range routes {
		vars, fits := rt.fit(segments)
		switch {
		case !fits:
		case rt.method == method:
			return rt, vars, ""
		case !slices.Contains(allowed, rt.method):
			allowed = append(allowed, rt.method)
		}
	}
	return nil, nil, strings.Join(allowed, ", ")
}

func (rt *route) fit(segments []string) (map[string]string, bool) {
	if len(segments) != len(rt.segments) {
		return nil, false
	}
	// Most routes are excluded by one segment, before any allocation.
	for i, want := range rt.segments {
		if !strings.HasPrefix(want, "{") && want != segments[i] && !strings.Contains(segments[i], "%") {
			return nil, false
		}
	}
	vars := map[string]string{}
	for i, want := range rt.segments {
		got, err := url.PathUnescape(segments[i])
		if err != nil {
			return nil, false
		}
		if name, isVar := strings.CutPrefix(want, "{"); isVar && got != "" {
			vars[strings.TrimSuffix(name, "}")] = got
		} else if want != got {
			return nil, false
		}
	}
	return vars, true
}

func (rt *route) writes() bool { return rt.method != http.MethodGet }
