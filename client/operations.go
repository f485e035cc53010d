package client

// This file owns the list of OpenAI operations that the engine uses, and the URL of a
// request.
//
// What must stay true: an ID is always one path segment, whatever it contains, and a
// request with an empty one is not sent, since its URL would be another operation's.

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// operation is a method on a route. OpenAI limits each of them separately.
type operation struct {
	name   string // for limits and metrics
	method string
	path   string // below the base URL, with the parameters' names of OpenAI's document
}

const (
	projectsPath    = "/organization/projects"
	projectPath     = projectsPath + "/{project_id}"
	spendLimitPath  = projectPath + "/spend_limit"
	modelsOfPath    = projectPath + "/model_permissions"
	rateLimitsPath  = projectPath + "/rate_limits"
	accountsPath    = projectPath + "/service_accounts"
	accountPath     = accountsPath + "/{service_account_id}"
	accountKeysPath = accountPath + "/api_keys"
	keysPath        = projectPath + "/api_keys"
	keyPath         = keysPath + "/{api_key_id}"
	adminKeysPath   = "/organization/admin_api_keys"
	adminKeyPath    = adminKeysPath + "/{key_id}"
	costsPath       = "/organization/costs"
	usagePath       = "/organization/usage"
	modelsPath      = "/models" // of the inference side
)

var (
	createServiceAccount = operation{"create_service_account", http.MethodPost, accountsPath}
	deleteServiceAccount = operation{"delete_service_account", http.MethodDelete, accountPath}
	getServiceAccount    = operation{"get_service_account", http.MethodGet, accountPath}
	listServiceAccounts  = operation{"list_service_accounts", http.MethodGet, accountsPath}
	createKey            = operation{"create_key", http.MethodPost, accountKeysPath}
	getKey               = operation{"get_key", http.MethodGet, keyPath}
	listKeys             = operation{"list_keys", http.MethodGet, keysPath}
	updateKey            = operation{"update_key", http.MethodPost, keyPath}
	deleteKey            = operation{"delete_key", http.MethodDelete, keyPath}
	createAdminKey       = operation{"create_admin_key", http.MethodPost, adminKeysPath}
	getAdminKey          = operation{"get_admin_key", http.MethodGet, adminKeyPath}
	listAdminKeys        = operation{"list_admin_keys", http.MethodGet, adminKeysPath}
	deleteAdminKey       = operation{"delete_admin_key", http.MethodDelete, adminKeyPath}
	getProject           = operation{"get_project", http.MethodGet, projectPath}
	listProjects         = operation{"list_projects", http.MethodGet, projectsPath}
	getCosts             = operation{"get_costs", http.MethodGet, costsPath}
	getSpendLimit        = operation{"get_spend_limit", http.MethodGet, spendLimitPath}
	getModelPermissions  = operation{"get_model_permissions", http.MethodGet, modelsOfPath}
	listRateLimits       = operation{"list_rate_limits", http.MethodGet, rateLimitsPath}
	probeKey             = operation{"probe_key", http.MethodGet, modelsPath}
)

// getUsage is the operation of a kind of usage.
func getUsage(kind string) operation {
	return operation{"get_usage_" + kind, http.MethodGet, usagePath + "/" + kind}
}

// issues reports whether the operation belongs to a credential request. See reserved.
func (o operation) issues() bool {
	return o == createServiceAccount || o == createKey || o == probeKey
}

// request is an operation with its parameters.
type request struct {
	operation
	what  string     // for errors, such as "list projects"
	ids   []string   // the values of the path parameters, in order
	query url.Values // nil for none
	body  any        // sent as JSON, nil for none
	// maxBody bounds the answer; 0 for the default.
	maxBody int64

	options callOptions
}

// target is the path and the query of a request.
func (r request) target() (string, error) {
	var b strings.Builder
	rest, ids := r.path, r.ids
	for {
		before, after, found := strings.Cut(rest, "{")
		b.WriteString(before)
		if !found {
			break
		}
		name, after, _ := strings.Cut(after, "}")
		if len(ids) == 0 || ids[0] == "" {
			return "", fmt.Errorf("missing required %s parameter", name)
		}
		b.WriteString(segment(ids[0]))
		rest, ids = after, ids[1:]
	}
	if len(r.query) > 0 {
		b.WriteByte('?')
		b.WriteString(r.query.Encode())
	}
	return b.String(), nil
}

// segment escapes an ID, including "." and "..", which url.PathEscape does not escape and
// a server or gateway would resolve.
func segment(id string) string {
	if id == "." || id == ".." {
		return strings.Repeat("%2E", len(id))
	}
	return url.PathEscape(id)
}

// pageAfter is the query for the page after a cursor, or for the first page.
func pageAfter(cursor string) url.Values {
	query := url.Values{"limit": {strconv.Itoa(pageSize)}}
	if cursor != "" {
		query.Set("after", cursor)
	}
	return query
}
