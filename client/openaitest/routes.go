// This file owns the table of routes: every operation of the simulator is one
// line here. Path parameters carry the names that OpenAI's document gives them,
// since the contract test looks operations up by template.

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
	scopes   []string // inference: any of these lets a restricted key in
	handle   func(*Server, *call) answer

	segments []string
}

const (
	projectsRoute    = "/organization/projects"
	projectRoute     = projectsRoute + "/{project_id}"
	archiveRoute     = projectRoute + "/archive"
	accountsRoute    = projectRoute + "/service_accounts"
	accountRoute     = accountsRoute + "/{service_account_id}"
	accountKeysRoute = accountRoute + "/api_keys"
	keysRoute        = projectRoute + "/api_keys"
	keyRoute         = keysRoute + "/{api_key_id}"
	adminKeysRoute   = "/organization/admin_api_keys"
	adminKeyRoute    = adminKeysRoute + "/{key_id}"
	modelsRoute      = "/models"
)

var routes = prepare([]*route{
	admin(http.MethodGet, projectsRoute, (*Server).listProjects),
	admin(http.MethodPost, projectsRoute, (*Server).createProject),
	admin(http.MethodGet, projectRoute, (*Server).getProject),
	admin(http.MethodPost, projectRoute, (*Server).updateProject),
	admin(http.MethodPost, archiveRoute, (*Server).archiveProject),

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

	inference(http.MethodGet, modelsRoute, (*Server).listModels, "api.model.read", "model.read", "api.all.read"),
	inference(http.MethodPost, "/responses", (*Server).createResponse, "api.responses.write"),
	inference(http.MethodPost, "/chat/completions", (*Server).createChatCompletion, "api.model.request", "model.request"),
	inference(http.MethodPost, "/embeddings", (*Server).createEmbedding, "api.model.request", "model.request"),
})

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

// match finds the route of an escaped path, or the methods that the path would
// take. Segments are unescaped one by one, so that an id with an escaped slash
// stays one id.
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
	// Most routes are ruled out by a word, before anything is made.
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
