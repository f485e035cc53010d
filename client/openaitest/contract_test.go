// These tests validate the simulator against OpenAI's published document. TestContract
// must make an accepted and a rejected request for every route: a new route without them
// fails the test.

package openaitest

import (
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// needContract skips the test if no document is set.
func needContract(t *testing.T) *contract {
	t.Helper()
	rules, err := loadContract()
	if err == errNoSpec { //nolint:errorlint // never wrapped
		t.Skipf("not tested: the simulator's answers against OpenAI's document: %v", err)
	}
	require.NoError(t, err)
	return rules
}

func TestContract(t *testing.T) {
	rules := needContract(t)
	s := Start(t, Options{})
	s.KeepAll()
	var mu sync.Mutex
	accepted, refused := map[string]int{}, map[string]int{}
	s.addObserver(func(x exchange) {
		err := rules.check(x)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			t.Error(err)
		}
		if x.route == nil || !x.route.admin {
			return
		}
		if name := x.route.method + " " + x.route.template; x.status < 400 {
			accepted[name]++
		} else {
			refused[name]++
		}
	})

	call := func(method, path string, body any) reply { return manage(t, s, method, path, body) }
	const projects, admins = "/organization/projects", "/organization/admin_api_keys"
	project := call("POST", projects, object{"name": "p", "residency": "GLOBAL", "external_key_id": nil}).text(t, "id")
	one := projects + "/" + project
	accounts, keys := accountsPath(project), keysPath(project)
	call("POST", one, object{"name": "q", "external_key_id": "ext"})
	call("GET", one, nil)
	call("GET", projects+"?limit=1&include_archived=true", nil)

	requireError(t, call("GET", one+"/spend_limit", nil), 404, "spend_limit_not_found", "")
	requireError(t, call("GET", one+"/model_permissions", nil), 404, "model_permissions_not_found", "")
	limit := object{"threshold_amount": 10_000, "currency": "USD", "interval": "month"}
	require.EqualValues(t, 10_000, call("POST", one+"/spend_limit", limit).field("threshold_amount"))
	require.Equal(t, "inactive", call("GET", one+"/spend_limit", nil).field("enforcement.status"))
	for field, bad := range map[string]struct {
		value any
		code  string
	}{"threshold_amount": {0, "integer_out_of_range"}, "currency": {"EUR", "invalid_value"}, "interval": {"day", "invalid_value"}} {
		refused := maps.Clone(limit)
		refused[field] = bad.value
		requireError(t, call("POST", one+"/spend_limit", refused), 400, bad.code, field)
		delete(refused, field)
		requireError(t, call("POST", one+"/spend_limit", refused), 400, "missing_required_parameter", field)
	}
	call("DELETE", one+"/spend_limit", nil)
	requireError(t, call("DELETE", one+"/spend_limit", nil), 404, "spend_limit_not_found", "")
	require.Equal(t, "deny_list", call("POST", one+"/model_permissions", object{"mode": "deny_list", "model_ids": []string{"gpt-5-mini"}}).field("mode"))
	require.Equal(t, "deny_list", call("GET", one+"/model_permissions", nil).field("mode"))
	requireError(t, call("POST", one+"/model_permissions", object{"mode": "none", "model_ids": []string{}}), 400, "invalid_value", "mode")
	requireError(t, call("POST", one+"/model_permissions", object{"mode": "allow_list"}), 400, "missing_required_parameter", "model_ids")
	call("DELETE", one+"/model_permissions", nil)
	rates := call("GET", one+"/rate_limits?limit=1", nil)
	require.Equal(t, true, rates.field("has_more"))
	rate := one + "/rate_limits/" + rates.ids(t)[0]
	require.EqualValues(t, 7, call("POST", rate, object{"max_requests_per_1_minute": 7}).field("max_requests_per_1_minute"))

	made := call("POST", accounts, object{"name": "a"})
	account, key := made.text(t, "id"), made.text(t, "api_key.id")
	call("POST", accounts, object{"name": "b", "create_service_account_only": true, "expires_in_seconds": nil})
	call("POST", accounts, object{"name": "c", "create_service_account_only": nil, "expires_in_seconds": 60})
	call("GET", accounts+"?limit=1&after="+account, nil)
	call("GET", accounts+"/"+account, nil)
	call("POST", accounts+"/"+account, object{"name": "d", "role": "owner"})
	call("POST", accounts+"/"+account+"/api_keys", nil)
	call("POST", accounts+"/"+account+"/api_keys", object{"name": "k", "scopes": []string{"api.model.read"}, "expires_in_seconds": 60})
	send(t, s, made.text(t, "api_key.value"), "GET", "/models", nil) // so that last_used_at is set
	call("GET", keys+"?owner_project_access=any&limit=100", nil)
	call("GET", keys+"/"+key, nil)
	call("POST", keys+"/"+key, object{"scopes": []string{}, "expires_in_seconds": 60})
	call("DELETE", keys+"/"+key, nil)
	call("DELETE", accounts+"/"+account, nil)

	admin := call("POST", admins, object{"name": "a"}).text(t, "id")
	call("POST", admins, object{"name": "b", "expires_in_seconds": 60})
	call("GET", admins+"?order=desc&limit=1", nil)
	call("GET", admins+"/"+admin, nil)
	call("DELETE", admins+"/"+admin, nil)

	s.AddCost(project, key, "gpt-5-mini, input_tokens", s.Now(), "0.0000123")
	s.AddCost(project, "", "", s.Now(), "1")
	s.AddUsage("completions", project, key, "gpt-5-mini", s.Now(), Counts{Requests: 1, Input: 2})
	s.Configure(func(o *Options) { o.AmountsVary = true })
	yesterday := strconv.FormatInt(s.Now().Add(-24*time.Hour).Unix(), 10)
	call("GET", costsRoute+"?start_time="+yesterday+"&group_by[]=api_key_id&group_by[]=line_item&project_ids[]="+project+"&limit=180", nil)
	call("GET", costsRoute+"?limit=1&start_time="+yesterday, nil)
	for _, kind := range UsageKinds {
		call("GET", usageRoute+"/"+kind+"?start_time="+yesterday+"&group_by[]=api_key_id&group_by[]=model", nil)
	}

	// Send each operation without a key, with a read-only key, with an invalid body, and
	// for a missing project.
	_, reader := s.AddAdminKey("reader", ReadOnly())
	fill := strings.NewReplacer("{project_id}", project, "{service_account_id}", "none", "{api_key_id}", "none", "{key_id}", "none", "{rate_limit_id}", "none")
	for _, rt := range routes {
		if rt.admin {
			path := fill.Replace(rt.template)
			send(t, s, "", rt.method, path, nil)
			send(t, s, reader, rt.method, path, nil)
			if rt.writes() {
				call(rt.method, path, object{"unknown": true})
			}
			call(rt.method, strings.Replace(path, project, "none", 1), nil)
		}
	}
	call("POST", one+"/archive", nil)
	call("GET", one, nil)
	for _, path := range []string{accounts, keys} {
		requireError(t, call("GET", path, nil), 400, "project_archived", "")
	}
	s.Configure(func(o *Options) { o.RatePerMinute, o.RateBurst, o.RetryAfter = 1, 1, true })
	call("GET", projects, nil)
	requireError(t, call("GET", projects, nil), 429, "rate_limit_exceeded", "")

	mu.Lock()
	defer mu.Unlock()
	for _, rt := range routes {
		if name := rt.method + " " + rt.template; rt.admin {
			require.Positive(t, accepted[name], "%s was never accepted", name)
			require.Positive(t, refused[name], "%s was never rejected", name)
		}
	}
}

// A validator that finds nothing would pass TestContract.
func TestContractFindsViolations(t *testing.T) {
	rules := needContract(t)
	get := func(body string, status int, query string) exchange {
		req, err := http.NewRequest("GET", "http://x/v1"+projectsRoute+query, http.NoBody)
		require.NoError(t, err)
		rt, vars, _ := match("GET", basePath+projectsRoute)
		return exchange{
			request: req, route: rt, vars: vars, status: status, body: []byte(body),
			header: http.Header{"Content-Type": {"application/json"}},
		}
	}
	good := `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`
	require.NoError(t, rules.check(get(good, 200, "")))
	require.Error(t, rules.check(get(`{"object":"list","data":[]}`, 200, "")), "has_more is missing")
	require.Error(t, rules.check(get(strings.Replace(good, "list", "page", 1), 200, "")), "the value is not in the enum")
	require.Error(t, rules.check(get(good, 200, "?limit=1000")), "limit is out of range and the request was accepted")
	require.Error(t, rules.check(get(good, 201, "")), "the document has no such status")
	require.Error(t, rules.check(get(`{"error":{"message":"x"}}`, 404, "")), "the body is not an error object")
	require.NoError(t, rules.check(get(`{"error":"bare"}`, 403, "")))

	post, err := http.NewRequest("POST", "http://x", io.NopCloser(strings.NewReader(`{"nome":"x"}`)))
	require.NoError(t, err)
	post.Header.Set("Content-Type", "application/json")
	rt, vars, _ := match("POST", basePath+projectsRoute)
	x := get(`{"id":"a","object":"organization.project","created_at":1}`, 200, "")
	x.request, x.route, x.vars = post, rt, vars
	require.Error(t, rules.check(x), "name is missing and the request was accepted")

	// Validate reports errors to its test until the test ends.
	tb := &recorder{TB: t}
	s := New(Options{})
	s.Validate(tb)
	watchers := s.observers
	require.Len(t, watchers, 1)
	for _, watch := range watchers {
		watch(x)
		require.Len(t, tb.errors, 1)
		tb.end()
		watch(x)
		require.Len(t, tb.errors, 1)
	}
	require.Empty(t, s.observers)
}
