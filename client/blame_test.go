package client

// The cause of an error: the admin key only if OpenAI says so, and none if the answer is
// unknown.

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestBlame_Answers(t *testing.T) {
	t.Parallel()
	object := func(code, message string) string {
		return fmt.Sprintf(`{"error":{"message":%q,"code":%q,"type":"invalid_request_error","param":null}}`, message, code)
	}
	const missing = "You have insufficient permissions for this operation. Missing scopes: api.management.read."
	for name, test := range map[string]struct {
		status int
		body   string
		want   Blame
	}{
		"an invalid key":               {401, object("invalid_api_key", "no"), BlameKey},
		"an invalid key, by its text":  {401, object("", "Incorrect API key provided: sk-x."), BlameKey},
		"a revoked key":                {401, object("api_key_revoked", "no"), BlameKey},
		"an invalid key, on a page":    {401, "<title>Incorrect API key provided</title>", BlameStranger},
		"an invalid key, as a string":  {401, `{"error":"Incorrect API key provided"}`, BlameUnknown},
		"a gateway's invalid key":      {401, object("401", "Invalid API key of this gateway"), BlameUnknown},
		"an invalid key with a 400":    {400, object("invalid_api_key", "no"), BlameRequest},
		"an expired key to be updated": {400, object("api_key_expired", "Expired API keys cannot be updated."), BlameRequest},
		"no key":                       {401, object("", "You didn't provide an API key."), BlameUnknown},
		"a missing scope":              {403, object("missing_scope", "no"), BlamePermission},
		"a missing scope, by its text": {401, object("", missing), BlamePermission},
		"a missing scope, as a string": {403, `{"error":"` + missing + `"}`, BlamePermission},
		"a missing scope with a 400":   {400, object("missing_scope", missing), BlameRequest},
		"an organization":              {401, object("mismatched_organization", "no"), BlameOrganization},
		"a host":                       {401, object("incorrect_hostname", "no"), BlameHost},
		"an address":                   {403, object("ip_not_authorized", "Not allowed by your organization's policy"), BlameAddress},
		"a policy, by its code":        {403, object("key_creation_disabled", "no"), BlamePolicy},
		"a policy, by its text":        {403, object("", "This is disabled for this project."), BlamePolicy},
		"a policy on lifetimes":        {403, object("", "The expiry is too far off."), BlamePolicy},
		"a policy with a 400":          {400, object("key_creation_disabled", "no"), BlameRequest},
		"a policy, on a page":          {403, "<title>Corporate policy</title>", BlameStranger},
		"an unsupported country":       {403, object("unsupported_country_region_territory", "no"), BlameUnknown},
		"a proxy":                      {407, "", BlameProxy},
		"an empty answer":              {403, "", BlameStranger},
		"a missing object":             {404, object("api_key_not_found", "no"), BlameRequest},
		"a gateway without a route":    {404, "<title>404</title>", BlameStranger},
		"a bad request":                {422, object("", "no"), BlameRequest},
		"a rate limit":                 {429, object("rate_limit_exceeded", "no"), BlameServer},
		"a server error":               {500, object("invalid_api_key", "no"), BlameServer},
		"a redirect":                   {302, "", BlameServer},
		"a page":                       {200, "<title>hello</title>", BlameServer},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := answering(t, test.status, nil, test.body).CreateServiceAccount(context.Background(), "p", "n", time.Hour)
			e := failed(t, err)
			require.Equal(t, test.want, e.Blame(), e)
			require.Equal(t, test.want == BlameKey || test.want == BlamePermission, BlamesKey(fmt.Errorf("revoke: %w", err)))
			requireFit(t, e)
		})
	}
	require.False(t, BlamesKey(nil))
}

func TestRightHost_FromTheMessage(t *testing.T) {
	t.Parallel()
	for message, want := range map[string]string{
		"attempted to access resource with incorrect regional hostname. Please make your request to eu.api.openai.com": "eu.api.openai.com",
		"Attempted to access resource with incorrect regional hostname. Please use 'US.API.OpenAI.com', not this one.": "us.api.openai.com",
		"Please make your request to https://jp.api.openai.com/v1.":                                                    "jp.api.openai.com",
		"Please make your request to another host.":                                                                    "",
	} {
		body := fmt.Sprintf(`{"error":{"message":%q,"code":"incorrect_hostname","type":"invalid_request_error","param":null}}`, message)
		e := failed(t, answering(t, 401, nil, body).Probe(context.Background(), NewSecret(placeholderIDs.value)))
		require.Equal(t, BlameHost, e.Blame())
		require.Equal(t, want, e.RightHost(), message)
	}
	require.Empty(t, (&Error{Status: 401, Message: "see eu.api.openai.com"}).RightHost())
}

func TestExpiryUnknown_IsNotALifetimeError(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status  int
		body    string
		unknown bool
		about   bool
	}{
		"OpenAI's form":       {400, `{"error":{"message":"Unknown parameter: 'expires_in_seconds'.","type":"invalid_request_error","param":"expires_in_seconds","code":"unknown_parameter"}}`, true, false},
		"OpenAI's older form": {400, `{"error":{"message":"Unrecognized request argument supplied: expires_in_seconds","type":"invalid_request_error","param":null,"code":null}}`, true, false},
		"a validator's form":  {422, `{"error":{"message":"expires_in_seconds: Extra inputs are not permitted","type":"invalid_request_error","param":null,"code":null}}`, true, false},
		"another parameter":   {400, `{"error":{"message":"Unknown parameter: 'scopes'.","type":"invalid_request_error","param":"scopes","code":"unknown_parameter"}}`, false, false},
		"too long":            {400, `{"error":{"message":"'expires_in_seconds' must be at most 60.","type":"invalid_request_error","param":"expires_in_seconds","code":"key_expiration_too_long"}}`, false, true},
		"out of range":        {400, `{"error":{"message":"Invalid 'expires_in_seconds'","type":"invalid_request_error","param":"expires_in_seconds","code":"integer_out_of_range"}}`, false, true},
		"a key that expired":  {401, `{"error":{"message":"expires_in_seconds unknown","type":"invalid_request_error","param":null,"code":null}}`, false, false},
	} {
		_, _, err := answering(t, test.status, nil, test.body).CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		e := failed(t, err)
		require.Equal(t, test.unknown, e.ExpiryUnknown(), name)
		require.Equal(t, test.about, e.AboutExpiry(), name)
	}
}

// Over TLS a proxy's error is not an answer of the host, and net/http's error would not
// mention the proxy.
func TestBlame_ProxyThatDoesNotConnect(t *testing.T) {
	t.Parallel()
	for status, said := range map[int]string{407: "407 Proxy Authentication Required", 403: "403 Forbidden", 502: "502 Bad Gateway"} {
		proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			assert.Equal(t, http.MethodConnect, r.Method)
			w.WriteHeader(status)
		}))
		at, err := url.Parse(proxy.URL)
		require.NoError(t, err)
		c := pointAt(t, "https://api.example.com/v1")
		c.http.Proxy = http.ProxyURL(at)
		_, _, err = c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		e := failed(t, err)
		require.Equal(t, BlameProxy, e.Blame())
		require.False(t, e.Sent || e.Ambiguous(), "the host did not receive the request")
		require.ErrorContains(t, e, "cannot reach api.example.com: proxy "+at.Host+" returned "+said)
		requireFit(t, e)
		proxy.Close()
	}
}

func TestProbe_ProjectWithDataResidency(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	sim.SetResidency(on.project, "eu")
	c := connect(t, sim)
	e := failed(t, c.Probe(context.Background(), NewSecret(on.value)))
	require.Equal(t, BlameHost, e.Blame())
	require.Equal(t, "eu.api.openai.com", e.RightHost())
	require.Equal(t, BlameKey, failed(t, c.Probe(context.Background(), NewSecret("sk-svcacct-0123456789012345678901"))).Blame(), "an unknown key")

	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, sim.URL()+"/models", nil)
	require.NoError(t, err)
	req.Host = "eu.api.openai.com"
	req.Header.Set("Authorization", "Bearer "+on.value)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode, "the key works at its own host")
	sim.SetResidency(on.project, "GLOBAL")
	require.NoError(t, c.Probe(context.Background(), NewSecret(on.value)))
}
