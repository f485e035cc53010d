package client

// The probe of a new key: which answers accept the key, that the admin key is not sent, and
// that neither the key nor a project's limit affects anything else.

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestProbe_AnswersThatAcceptTheKey(t *testing.T) {
	t.Parallel()
	const missing = "You have insufficient permissions for this operation. Missing scopes: api.model.read."
	object := func(message, code, kind string) string {
		return fmt.Sprintf(`{"error":{"message":%q,"code":%q,"type":%q,"param":null}}`, message, code, kind)
	}
	for name, test := range map[string]struct {
		status int
		body   string
		known  bool
	}{
		"the models":                     {200, `{"object":"list","data":[{"id":"gpt-5-mini","object":"model"}]}`, true},
		"no model":                       {200, `{"object":"list","data":[]}`, true},
		"another object":                 {200, `{"status":"ok"}`, false},
		"a page":                         {200, `<html>welcome</html>`, false},
		"nothing":                        {200, ``, false},
		"a missing scope, 403":           {403, object(missing, "missing_scope", ""), true},
		"a missing scope, 401":           {401, object(missing, "missing_scope", ""), true},
		"by its code only":               {403, object("No.", "missing_scope", ""), true},
		"by its text only, 403":          {403, object(missing, "", "invalid_request_error"), true},
		"by its text only, 401":          {401, object(missing, "", "invalid_request_error"), true},
		"by its text, as a bare string":  {403, `{"error":"` + missing + `"}`, true},
		"a missing scope, in a 400":      {400, object(missing, "missing_scope", ""), false},
		"an unknown key":                 {401, object("Incorrect API key provided", "invalid_api_key", "invalid_request_error"), false},
		"no key":                         {401, object("You didn't provide an API key", "", ""), false},
		"an address that is not allowed": {401, object("IP not authorized", "ip_not_authorized", ""), false},
		"an unsupported country":         {403, object("Country, region, or territory not supported", "unsupported_country_region_territory", ""), false},
		"a gateway's 403":                {403, `<html>forbidden</html>`, false},
		"a rate limit":                   {429, object("slow", "rate_limit_exceeded", "requests"), true},
		"a rate limit without a code":    {429, `{"error":{"message":"slow","type":"requests","code":null}}`, true},
		"a spend limit":                  {429, object("spent", "project_spend_limit_exceeded", "insufficient_quota"), true},
		"a gateway's 429, as a page":     {429, `<html>slow down</html>`, false},
		"a gateway's 429, as a string":   {429, `{"error":"slow down"}`, false},
		"a server error":                 {500, object(missing, "missing_scope", ""), false},
		"unavailable":                    {503, ``, false},
		"not found":                      {404, object("no such path", "unknown_url", ""), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				assert.Equal(t, http.MethodGet+" /v1/models", r.Method+" "+r.URL.Path)
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(test.status)
				_, _ = w.Write([]byte(test.body))
			})
			err := c.Probe(context.Background(), NewSecret(placeholderIDs.value))
			require.EqualValues(t, 1, asked.Load(), "the probe does not retry")
			if test.known {
				require.NoError(t, err)
				return
			}
			e := failed(t, err)
			require.Equal(t, test.status, e.Status)
			require.ErrorContains(t, e, "check the new key: ")
			requireFit(t, e, placeholderIDs.value, testKey)
		})
	}
}

func TestProbe_SimulatorKeys(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		o.ActivationDelay = time.Minute
		ctx := context.Background()
		sim := simulate(t, o)
		on := populate(t, sim)
		c := connect(t, sim)
		key := NewSecret(on.value)
		require.Equal(t, "invalid_api_key", failed(t, c.Probe(ctx, key)).Code, "the key is not active yet")
		sim.Advance(2 * time.Minute)
		require.NoError(t, c.Probe(ctx, key))
		_, err := c.UpdateProjectKey(ctx, on.project, on.key, []string{"api.responses.write"}, 0)
		require.NoError(t, err)
		require.NoError(t, c.Probe(ctx, key), "the key lacks a scope, but is active")
		require.NoError(t, c.DeleteProjectKey(ctx, on.project, on.key))
		require.Equal(t, "invalid_api_key", failed(t, c.Probe(ctx, key)).Code)
	})
}

func TestProbe_SendsNoAdminKey(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	rec := record(sim)
	_, admin := sim.AdminKey()
	c := connect(t, sim, func(o *Options) { o.Organization = sim.OrganizationID() })
	require.NoError(t, c.Probe(context.Background(), NewSecret(on.value)))
	r := rec.last(t)
	require.Equal(t, []string{"Bearer " + on.value}, r.header["Authorization"])
	require.NotContains(t, r.header, "Openai-Organization")
	require.NotContains(t, fmt.Sprint(r), admin)
	require.Empty(t, r.body+r.query)
}

// A server in OpenAI's place may echo the key.
func TestProbe_NoErrorQuotesTheKey(t *testing.T) {
	t.Parallel()
	for _, key := range []string{placeholderIDs.value, "a key of another make: p4ssw0rd!"} {
		for name, answer := range map[string]func(w http.ResponseWriter){
			"message": func(w http.ResponseWriter) {
				w.WriteHeader(401)
				fmt.Fprintf(w, `{"error":{"message":"Incorrect API key: %s","code":"%[1]s","type":"x%[1]s","param":"%[1]s"}}`, key)
			},
			"at the end of a long message": func(w http.ResponseWriter) {
				w.WriteHeader(400)
				fmt.Fprintf(w, `{"error":{"message":"%s%s"}}`, strings.Repeat("x", maxMessage-len(key)/2), key)
			},
			"request id": func(w http.ResponseWriter) {
				w.Header().Set("X-Request-Id", key)
				w.WriteHeader(500)
			},
			"status line": func(w http.ResponseWriter) { raw(w, key+"\r\n\r\n") },
			"header line": func(w http.ResponseWriter) { raw(w, "HTTP/1.1 200 OK\r\n"+key+"\r\n\r\n") },
		} {
			t.Run(name+"/"+key[:4], func(t *testing.T) {
				t.Parallel()
				c := serve(t, func(w http.ResponseWriter, _ *http.Request) { answer(w) })
				requireFit(t, failed(t, c.Probe(context.Background(), NewSecret(key))), key, key[:len(key)/2])
			})
		}
	}
}

func TestProbe_HonorsItsContext(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	on := populate(t, sim)
	sim.Fail(openaitest.Fault{Route: modelsRoute, Kind: openaitest.FaultHang})
	began := time.Now()
	err := connect(t, sim, withTimeout(200*time.Millisecond)).Probe(context.Background(), NewSecret(on.value))
	require.ErrorIs(t, failed(t, err), context.DeadlineExceeded)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	err = connect(t, sim).Probe(ctx, NewSecret(on.value))
	require.ErrorIs(t, failed(t, err), context.DeadlineExceeded)
	require.Less(t, time.Since(began), DefaultTimeout/2)

	// The context also bounds the wait for a slot.
	c := connect(t, sim, withConcurrency(1))
	c.slots <- struct{}{}
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	e := failed(t, c.Probe(short, NewSecret(on.value)))
	require.ErrorIs(t, e, context.DeadlineExceeded)
	require.False(t, e.Sent)
}

// The limits of the inference API are per project: a project at its limit must not delay the
// probes of others.
func TestProbe_RateLimitDoesNotAffectOtherCalls(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	on := populate(t, sim)
	c := connect(t, sim)
	cancel := sim.Fail(openaitest.Fault{Route: modelsRoute, Status: 429, Code: "rate_limit_exceeded", Header: http.Header{"Retry-After": {"3600"}}})
	began := time.Now()
	for range 20 {
		require.NoError(t, c.Probe(context.Background(), NewSecret(on.value)))
	}
	cancel()
	require.NoError(t, c.Probe(context.Background(), NewSecret(on.value)))
	require.Less(t, time.Since(began), 3*time.Second)
	require.Zero(t, c.rateLimiter.Throttled())
}
