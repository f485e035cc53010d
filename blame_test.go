package openaisecrets

// Each kind of rejection on each path. An error blames only what OpenAI blames. Its
// status shows whether the client, the operator, or OpenAI must act, and it contains the
// original message and request ID.

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// The parts of error messages that name a cause.
const (
	blamesKey          = "OpenAI rejects the engine's admin key"
	blamesNewKey       = "rejects this admin_api_key"
	blamesPermission   = "the engine's admin key requires the permission"
	blamesItsScope     = "the admin key requires the permission"
	blamesOrganization = "organization_id"
	blamesHost         = "api_endpoint"
	blamesAddress      = "IP address"
	blamesPolicy       = "a setting of the organization or project"
	blamesProxy        = "the HTTP proxy rejects the request"
	blamesStranger     = "not in OpenAI's error format"
	blamesNobody       = "rejected the request"
	blamesExpiry       = "does not support expires_in_seconds"
	blamesLifetime     = "longer than a policy"
)

var allBlames = []string{blamesKey, blamesNewKey, blamesPermission, blamesItsScope, blamesOrganization, blamesHost, blamesAddress, blamesPolicy,
	blamesProxy, blamesStranger, blamesExpiry, blamesLifetime, "write a valid admin_api_key"}

// refusal is a response to a call with the admin key.
type refusal struct {
	status int
	body   string
	// blames and inConfig are what an error must blame, in general and of a config write.
	blames, inConfig []string
	// want and wantConfig are the statuses of the two; 500 is an error without a status.
	want, wantConfig int
	said             string // the part of the answer that the error must contain
}

func refusals() map[string]refusal {
	object := func(code, message string) string {
		if code != "null" {
			code = `"` + code + `"`
		}
		return fmt.Sprintf(`{"error":{"message":%q,"type":"invalid_request_error","param":null,"code":%s}}`, message, code)
	}
	const (
		missing   = "You have insufficient permissions for this operation. Missing scopes: api.management.write. Check that you have the correct role."
		incorrect = "Incorrect API key provided: sk-admin*****wxyz. You can find your API key at https://platform.openai.com/account/api-keys."
		regional  = "Attempted to access resource with incorrect regional hostname. Please make your request to eu.api.openai.com"
	)
	key := refusal{want: 500, wantConfig: 400, blames: []string{blamesKey, "write a valid admin_api_key"}, inConfig: []string{blamesNewKey}}
	permission := refusal{want: 500, wantConfig: 400, blames: []string{blamesPermission}, inConfig: []string{blamesItsScope}}
	organization := refusal{want: 502, wantConfig: 400, blames: []string{blamesOrganization}, inConfig: []string{blamesOrganization}}
	host := refusal{want: 502, wantConfig: 400, blames: []string{blamesHost, "eu.api.openai.com"}, inConfig: []string{blamesHost, "eu.api.openai.com"}}
	address := refusal{want: 502, wantConfig: 502, blames: []string{blamesAddress}, inConfig: []string{blamesAddress}}
	policy := refusal{want: 502, wantConfig: 502, blames: []string{blamesPolicy}, inConfig: []string{blamesPolicy}}
	stranger := refusal{want: 502, wantConfig: 502, blames: []string{blamesStranger, blamesNobody}, inConfig: []string{blamesStranger, blamesNobody}}
	nobody := refusal{want: 502, wantConfig: 502, blames: []string{blamesNobody}, inConfig: []string{blamesNobody}}
	proxy := refusal{want: 502, wantConfig: 502, blames: []string{blamesProxy}, inConfig: []string{blamesProxy}}
	request := refusal{want: 400, wantConfig: 400}
	as := func(r refusal, status int, body, said string) refusal {
		r.status, r.body, r.said = status, body, said
		return r
	}
	return map[string]refusal{
		"an invalid key":                         as(key, 401, object("invalid_api_key", incorrect), "Incorrect API key provided"),
		"an invalid key, by the text":            as(key, 401, object("null", incorrect), "Incorrect API key provided"),
		"an expired key":                         as(key, 401, object("api_key_expired", "This API key has expired."), "has expired"),
		"a missing scope":                        as(permission, 403, object("missing_scope", missing), "api.management.write"),
		"a missing scope with 401":               as(permission, 401, object("missing_scope", missing), "api.management.write"),
		"a missing scope, by the text":           as(permission, 403, object("null", missing), "api.management.write"),
		"a missing scope as a bare string":       as(permission, 403, fmt.Sprintf(`{"error":%q}`, missing), "api.management.write"),
		"another organization":                   as(organization, 401, object("mismatched_organization", "OpenAI-Organization header should match organization for API key."), "should match"),
		"an unknown organization":                as(organization, 401, object("invalid_organization", "No such organization: org-x."), "org-x"),
		"another organization, by the text":      as(organization, 401, object("null", "OpenAI-Organization header should match organization for API key."), "should match"),
		"another host":                           as(host, 401, object("incorrect_hostname", regional), "regional hostname"),
		"another host, by the text":              as(host, 403, object("null", regional), "regional hostname"),
		"an address that is not allowed":         as(address, 401, object("ip_not_authorized", "Your IP 10.0.0.1 is not authorized."), "10.0.0.1"),
		"an address that is not allowed, 403":    as(address, 403, object("ip_not_authorized", "Your IP 10.0.0.1 is not authorized by the policy."), "10.0.0.1"),
		"creation disabled":                      as(policy, 403, object("key_creation_disabled", "Creation of API keys is disabled."), "Creation of API keys"),
		"disabled for this project":              as(policy, 403, object("null", "Service accounts are disabled for this project."), "disabled for this project"),
		"an unknown code with a policy's text":   as(policy, 403, object("forbidden", "This is not allowed by your organization."), "not allowed"),
		"an unsupported country":                 as(nobody, 403, object("unsupported_country_region_territory", "Country, region, or territory not supported"), "Country, region"),
		"an unknown code":                        as(nobody, 403, object("teapot", "We are a teapot."), "We are a teapot."),
		"an unknown code with 401":               as(nobody, 401, object("teapot", "We are a teapot."), "We are a teapot."),
		"a deactivated account":                  as(nobody, 401, object("account_deactivated", "The account of this API key is deactivated."), "deactivated"),
		"a bare string":                          as(nobody, 403, `{"error":"Forbidden by the gateway"}`, "Forbidden by the gateway"),
		"a bare string with 401":                 as(nobody, 401, `{"error":"unauthorized"}`, "unauthorized"),
		"a gateway's object":                     as(nobody, 403, `{"error":{"message":"Blocked by rule 7","status":403}}`, "Blocked by rule 7"),
		"a firewall's page":                      as(stranger, 403, `<!doctype html><html><head><title>Attention Required! | Firewall</title></head><body>Incorrect API key Missing scopes: x</body></html>`, "Attention Required! | Firewall"),
		"a login portal's page":                  as(stranger, 401, `<html><title>Sign in</title></html>`, "Sign in"),
		"a cloud gateway's object":               as(stranger, 403, `{"message":"Forbidden by the API gateway"}`, "Forbidden by the API gateway"),
		"a blank body":                           as(stranger, 403, ` `, "Forbidden"),
		"a proxy's 407":                          as(proxy, 407, `<html><title>Access denied</title></html>`, "status 407"),
		"a page for a request that is too large": as(stranger, 413, `<html><title>Too large</title></html>`, "Too large"),
		"an invalid value":                       as(request, 400, object("invalid_value", "That will not do."), "That will not do."),
		"a spend limit":                          {status: 429, body: object("project_spend_limit_exceeded", "All is spent."), want: 429, wantConfig: 429, said: "All is spent."},
	}
}

// statusOf returns the HTTP status of Vault's response.
func statusOf(resp *logical.Response, err error) int {
	switch coded := err.(type) { //nolint:errorlint // the plugin protocol sees only the outermost error
	case nil:
		if resp.IsError() {
			return 400
		}
		return 200
	case logical.HTTPCodedError:
		return coded.Code()
	}
	return 500
}

func answerText(resp *logical.Response, err error) string {
	if err != nil {
		return err.Error()
	}
	if resp.IsError() {
		return resp.Error().Error()
	}
	return ""
}

func requireBlames(t *testing.T, text string, blames ...string) {
	t.Helper()
	for _, blame := range blames {
		require.Contains(t, text, blame)
	}
	for _, other := range allBlames {
		for _, blame := range blames {
			if strings.Contains(blame, other) || strings.Contains(blamesPermission, other) && blame == blamesPermission {
				other = ""
				break
			}
		}
		if other != "" {
			require.NotContains(t, text, other)
		}
	}
}

func TestBlame_EveryPath(t *testing.T) {
	t.Parallel()
	for name, r := range refusals() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.must(h.write("roles/short", map[string]any{"project_id": h.project, "key_expiry": "ttl"}))
			h.static("batch", nil)
			lease := h.lease("creds/app", nil)
			short := h.lease("creds/short", nil)
			_, admin := h.sim.AdminKey()
			cancel := h.sim.Fail(openaitest.Fault{Route: "/organization/*", Status: r.status, Body: r.body})

			for path, ask := range map[string]func() (*logical.Response, error){
				"creds": func() (*logical.Response, error) { return h.read("creds/app") },
				"roles": func() (*logical.Response, error) {
					return h.write("roles/new", map[string]any{"project_id": h.project})
				},
				"static-roles": func() (*logical.Response, error) {
					return h.write("static-roles/new", fields{"project_id": h.project, "rotation_period": "24h"})
				},
				"rotate-role": func() (*logical.Response, error) { return h.write("rotate-role/batch", nil) },
				"projects":    func() (*logical.Response, error) { return h.list("projects") },
				"rotate":      func() (*logical.Response, error) { return h.write("config/rotate", nil) },
				"renew":       func() (*logical.Response, error) { return h.renew(t.Context(), short, 0, 7200e9) },
			} {
				resp, err := ask()
				text := answerText(resp, err)
				require.Equal(t, r.want, statusOf(resp, err), "%s: %s", path, text)
				requireBlames(t, text, r.blames...)
				require.Contains(t, text, r.said, path)
				require.Contains(t, text, "request id req_", path)
			}

			resp, err := h.write("config", map[string]any{"admin_api_key": admin})
			text := answerText(resp, err)
			require.Equal(t, r.wantConfig, statusOf(resp, err), text)
			requireBlames(t, text, r.inConfig...)
			require.Contains(t, text, r.said)
			require.Contains(t, text, "request id req_")

			err = h.revoke(lease)
			require.ErrorContains(t, err, r.said)
			requireBlames(t, err.Error())

			status := h.tidy(false)
			require.Contains(t, fmt.Sprint(status), r.said)
			requireBlames(t, fmt.Sprint(status))

			cancel()
			require.NoError(t, h.revoke(lease))
			require.NoError(t, h.revoke(short))
			h.must(h.remove("static-roles/batch"))
			h.runPeriodicWork()
			h.onlyLeased()
		})
	}
}

// The create of a key succeeds, and the call that restricts it is rejected.
func TestBlame_ErrorDuringACredentialRequest(t *testing.T) {
	t.Parallel()
	for name, r := range refusals() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.role(map[string]any{"scopes": scopeChat})
			h.static("batch", fields{"scopes": scopeChat})
			h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Status: r.status, Body: r.body})
			for path, ask := range map[string]func() (*logical.Response, error){
				"creds": func() (*logical.Response, error) { return h.read("creds/app") },
				"static-roles": func() (*logical.Response, error) {
					return h.write("static-roles/new", fields{"project_id": h.project, "rotation_period": "24h", "scopes": scopeChat})
				},
			} {
				resp, err := ask()
				text := answerText(resp, err)
				require.Equal(t, r.want, statusOf(resp, err), "%s: %s", path, text)
				requireBlames(t, text, r.blames...)
				require.Contains(t, text, r.said, path)
				require.Contains(t, text, "restricting the key", path)
			}
			h.sim.ClearFaults()
			h.must(h.remove("static-roles/batch"))
			h.runPeriodicWork()
			h.onlyLeased()
		})
	}
}

// After a rotation has created its key, errors blame the new key or the call.
func TestBlame_RotationBlamesTheNewKeyOnlyForInvalidKeyErrors(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fault openaitest.Fault
		says  string
	}{
		"an invalid key":    {openaitest.Fault{Status: 401, Code: "invalid_api_key", Message: "Incorrect API key provided"}, "the new admin key does not work"},
		"a firewall's page": {openaitest.Fault{Status: 403, Body: "<title>Stop</title>"}, "verifying the new admin key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			test.fault.Method, test.fault.Route = http.MethodGet, "/organization/admin_api_keys/{key_id}"
			h.sim.Fail(test.fault)
			resp, err := h.write("config/rotate", nil)
			require.Equal(t, 502, statusOf(resp, err))
			require.ErrorContains(t, err, test.says)
			require.NotContains(t, err.Error(), blamesKey, "the current key is valid")
			h.sim.ClearFaults()
			h.runPeriodicWork()
			require.Len(t, h.adminKeyIDs(), 1)
		})
	}
}

func TestBlame_APIWithoutExpiry(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{ExpiryUnknown: true})
	h.must(h.write("config", map[string]any{"rotation_period": "720h"}))
	text := h.refused(h.read("creds/app"))
	requireBlames(t, text, blamesExpiry, "api_endpoint", "key_expiry=none", "Unknown parameter: 'expires_in_seconds'")
	require.NotContains(t, text, "max_ttl")
	text = h.refused(h.write("static-roles/new", fields{"project_id": h.project, "rotation_period": "24h"}))
	requireBlames(t, text, blamesExpiry, "api_endpoint", "static roles require key expiry")
	text = h.refused(h.write("config/rotate", nil))
	requireBlames(t, text, blamesExpiry, "api_endpoint")
	h.role(map[string]any{"key_expiry": "none"})
	lease := h.lease("creds/app", nil)
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

func TestResidency_KeyIsReturnedWithItsHost(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{typeAccount, typeKey} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.SetResidency(h.project, "EU_STORAGE_PROCESSING")
			if kind == typeKey {
				h.adopted(nil)
			}
			h.sim.ResetRequests()
			lease := h.lease("creds/app", nil)
			require.Equal(t, 1, h.sim.Count(http.MethodGet, routeModels), "a second probe is useless")
			require.Len(t, lease.Warnings, 1)
			require.Contains(t, lease.Warnings[0], "https://eu.api.openai.com/v1")
			require.NoError(t, h.revoke(lease))
		})
	}
	h := configured(t, openaitest.Options{})
	h.sim.SetResidency(h.project, "EU_STORAGE_PROCESSING")
	resp := h.static("batch", nil)
	require.Contains(t, strings.Join(resp.Warnings, "\n"), "eu.api.openai.com")
	for range 2 {
		resp = h.must(h.read("static-creds/batch"))
		require.Contains(t, strings.Join(resp.Warnings, "\n"), "eu.api.openai.com", "every read returns the warning")
		resp = h.must(h.write("rotate-role/batch", nil))
		require.Contains(t, strings.Join(resp.Warnings, "\n"), "eu.api.openai.com")
	}
	h.sim.SetResidency(h.project, "")
	require.Empty(t, h.must(h.write("rotate-role/batch", nil)).Warnings)
	require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
	h.must(h.remove("static-roles/batch"))

	// The warning quotes a message that names no host.
	h.sim.Fail(openaitest.Fault{Route: routeModels, Status: 401, Code: "incorrect_hostname", Message: "Wrong host."})
	lease := h.lease("creds/app", nil)
	require.Contains(t, lease.Warnings[0], "Wrong host.")
	require.NoError(t, h.revoke(lease))
}

func TestActivationFailure_WarnReturnsTheKey(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct {
		openaitest.Fault
		says []string
	}{
		"a server error":                    {openaitest.Fault{Status: 503, Message: "we broke"}, []string{"the engine could not verify", "server error", "we broke"}},
		"a connection reset":                {openaitest.Fault{Kind: openaitest.FaultReset}, []string{"the engine could not verify", "no answer"}},
		"a firewall":                        {openaitest.Fault{Status: 403, Body: "<title>Stop</title>"}, []string{"the engine could not verify", "rejected the call", "Stop"}},
		"an IP address that is not allowed": {openaitest.Fault{Status: 401, Code: "ip_not_authorized", Message: "not you"}, []string{"the engine could not verify", "IP address", "not you"}},
		"an invalid key":                    {openaitest.Fault{Status: 401, Code: "invalid_api_key", Message: "Incorrect API key provided"}, []string{"OpenAI did not accept the new key within 1s", "Incorrect API key"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// In a synctest bubble, a probe is answered in time on a busy machine.
			inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
				h.configure(nil)
				fault.Route = routeModels
				h.static("batch", fields{"activation_timeout": 1, "activation_failure": "warn"})
				require.Empty(t, h.must(h.read("static-creds/batch")).Warnings)
				h.role(map[string]any{"activation_timeout": 1})
				h.sim.Fail(fault.Fault)
				_, err := h.read("creds/app")
				require.Equal(t, 502, coded(t, err))
				for _, said := range fault.says {
					require.ErrorContains(t, err, said)
				}
				if name != "an invalid key" {
					require.NotContains(t, err.Error(), "did not accept the new key")
				}
				require.NotContains(t, err.Error(), "admin key")

				h.role(map[string]any{"activation_timeout": 1, "activation_failure": "warn"})
				lease := h.lease("creds/app", nil)
				require.Len(t, lease.Warnings, 1)
				resp := h.must(h.write("rotate-role/batch", nil))
				read := h.must(h.read("static-creds/batch"))
				for _, said := range append(fault.says, "activation_failure=warn") {
					require.Contains(t, lease.Warnings[0], said)
					require.Contains(t, strings.Join(resp.Warnings, "\n"), said)
					require.Contains(t, strings.Join(read.Warnings, "\n"), said)
				}
				require.NoError(t, h.revoke(lease))
				h.must(h.remove("static-roles/batch"))
				h.runPeriodicWork()
				h.onlyLeased()
			})
		})
	}
}

func TestActivationFailure_ReadAndDefault(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.static("batch", nil)
	for _, at := range []string{"roles/app", "static-roles/batch"} {
		require.Equal(t, "error", h.must(h.read(at)).Data["activation_failure"])
		h.must(h.write(at, map[string]any{"activation_failure": "warn"}))
		h.must(h.write(at, map[string]any{"activation_timeout": 7}))
		require.Equal(t, "warn", h.must(h.read(at)).Data["activation_failure"], "a write without the field keeps it")
		require.Contains(t, h.refused(h.write(at, map[string]any{"activation_failure": "ignore"})), `activation_failure must be one of error, warn, not "ignore"`)
		h.must(h.write(at, map[string]any{"activation_failure": ""}))
		data := h.must(h.read(at)).Data
		require.Equal(t, []any{"", "error"}, []any{data["activation_failure"], data["effective_activation_failure"]})
	}
	h.must(h.remove("static-roles/batch"))
}
