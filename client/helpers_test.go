package client

// Shared test helpers: the client with the simulator, or with a server that returns invalid
// answers, and a list of all calls.

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// simulate starts a simulator that validates every exchange against OpenAI's document.
func simulate(t testing.TB, o openaitest.Options) *openaitest.Server {
	t.Helper()
	sim := openaitest.Start(t, o)
	sim.Validate(t)
	return sim
}

// connect is a client with the simulator's first admin key.
func connect(t testing.TB, sim *openaitest.Server, change ...func(*Options)) *Client {
	t.Helper()
	_, key := sim.AdminKey()
	o := Options{AdminKey: NewSecret(key), BaseURL: sim.URL(), CACert: []byte(sim.CACert()), UserAgent: "the tests"}
	for _, f := range change {
		f(&o)
	}
	c, err := New(o)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func withKey(key string) func(*Options) {
	return func(o *Options) { o.AdminKey = NewSecret(key) }
}

func withTimeout(d time.Duration) func(*Options) {
	return func(o *Options) { o.Timeout = d }
}

func withConcurrency(n int) func(*Options) {
	return func(o *Options) { o.Concurrency = n }
}

// testKey is the admin key of clients without a simulator.
const testKey = "sk-admin-0123456789abcdefghijklmnopqrstuvwxyz"

// pointAt is a client of any server.
func pointAt(t testing.TB, base string, change ...func(*Options)) *Client {
	t.Helper()
	o := Options{AdminKey: NewSecret(testKey), BaseURL: base, UserAgent: "the tests"}
	for _, f := range change {
		f(&o)
	}
	c, err := New(o)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

// serve is a client of a handler.
func serve(t testing.TB, h http.HandlerFunc, change ...func(*Options)) *Client {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return pointAt(t, server.URL+"/v1", change...)
}

// answering is a client of a server that always returns the same response.
func answering(t testing.TB, status int, header map[string]string, body string) *Client {
	t.Helper()
	return serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for name, value := range header {
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
}

// onBothProtocols runs a test over HTTP/1.1 and over HTTP/2.
func onBothProtocols(t *testing.T, test func(t *testing.T, o openaitest.Options)) {
	t.Helper()
	for name, o := range map[string]openaitest.Options{"HTTP1": {}, "HTTP2": {TLS: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, o)
		})
	}
}

// sent is a request as the simulator received it.
type sent struct {
	path   string
	header http.Header
	query  string
	body   string
}

// recorder records the requests from now on.
type recorder struct {
	mu  sync.Mutex
	all []sent
}

func record(sim *openaitest.Server) *recorder {
	r := &recorder{}
	sim.Fail(openaitest.Fault{Match: func(req *http.Request) bool {
		body, _ := io.ReadAll(req.Body)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.all = append(r.all, sent{path: req.URL.Path, header: req.Header.Clone(), query: req.URL.RawQuery, body: string(body)})
		return false // observes only
	}})
	return r
}

func (r *recorder) requests() []sent {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

func (r *recorder) last(t *testing.T) sent {
	t.Helper()
	all := r.requests()
	require.NotEmpty(t, all)
	return all[len(all)-1]
}

// The routes, as the simulator names them.
const (
	accountsRoute    = "/organization/projects/{project_id}/service_accounts"
	accountRoute     = accountsRoute + "/{service_account_id}"
	accountKeysRoute = accountRoute + "/api_keys"
	keysRoute        = "/organization/projects/{project_id}/api_keys"
	keyRoute         = keysRoute + "/{api_key_id}"
	adminKeysRoute   = "/organization/admin_api_keys"
	adminKeyRoute    = adminKeysRoute + "/{key_id}"
	projectsRoute    = "/organization/projects"
	projectRoute     = projectsRoute + "/{project_id}"
	modelsRoute      = "/models"
)

// ids are the objects of the calls; value is the value of the key.
type ids struct{ project, account, key, adminKey, value string }

// placeholderIDs are IDs for servers without objects.
var placeholderIDs = ids{"p", "a", "k", "r", "sk-svcacct-nobodys-0123456789"}

type verb struct {
	method, route string
	once          bool // a create or the probe: never repeated
	call          func(context.Context, *Client, ids) error
}

// allCalls are all calls of the client.
var allCalls = map[string]verb{
	"CreateServiceAccount": {http.MethodPost, accountsRoute, true, func(ctx context.Context, c *Client, on ids) error {
		_, _, err := c.CreateServiceAccount(ctx, on.project, "an account", time.Hour)
		return err
	}},
	"CreateServiceAccountKey": {http.MethodPost, accountKeysRoute, true, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.CreateServiceAccountKey(ctx, on.project, on.account, "a key", nil, time.Hour)
		return err
	}},
	"CreateAdminKey": {http.MethodPost, adminKeysRoute, true, func(ctx context.Context, c *Client, _ ids) error {
		_, _, err := c.CreateAdminKey(ctx, "an admin key", time.Hour)
		return err
	}},
	"UpdateProjectKey": {http.MethodPost, keyRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.UpdateProjectKey(ctx, on.project, on.key, nil, time.Hour)
		return err
	}},
	"DeleteServiceAccount": {http.MethodDelete, accountRoute, false, func(ctx context.Context, c *Client, on ids) error {
		return c.DeleteServiceAccount(ctx, on.project, on.account)
	}},
	"DeleteProjectKey": {http.MethodDelete, keyRoute, false, func(ctx context.Context, c *Client, on ids) error {
		return c.DeleteProjectKey(ctx, on.project, on.key)
	}},
	"DeleteAdminKey": {http.MethodDelete, adminKeyRoute, false, func(ctx context.Context, c *Client, on ids) error {
		return c.DeleteAdminKey(ctx, on.adminKey)
	}},
	"GetServiceAccount": {http.MethodGet, accountRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.GetServiceAccount(ctx, on.project, on.account)
		return err
	}},
	"GetProjectKey": {http.MethodGet, keyRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.GetProjectKey(ctx, on.project, on.key)
		return err
	}},
	"Probe": {http.MethodGet, modelsRoute, true, func(ctx context.Context, c *Client, on ids) error {
		return c.Probe(ctx, NewSecret(on.value))
	}},
	"ListServiceAccounts": {http.MethodGet, accountsRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.ListServiceAccounts(ctx, on.project)
		return err
	}},
	"ListProjectKeys": {http.MethodGet, keysRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.ListProjectKeys(ctx, on.project)
		return err
	}},
	"ListAdminKeys": {http.MethodGet, adminKeysRoute, false, func(ctx context.Context, c *Client, _ ids) error {
		_, err := c.ListAdminKeys(ctx)
		return err
	}},
	"GetAdminKey": {http.MethodGet, adminKeyRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.GetAdminKey(ctx, on.adminKey)
		return err
	}},
	"ListProjects": {http.MethodGet, projectsRoute, false, func(ctx context.Context, c *Client, _ ids) error {
		_, err := c.ListProjects(ctx)
		return err
	}},
	"GetProject": {http.MethodGet, projectRoute, false, func(ctx context.Context, c *Client, on ids) error {
		_, err := c.GetProject(ctx, on.project)
		return err
	}},
}

// populate creates one of each object that the calls need.
func populate(t testing.TB, sim *openaitest.Server) ids {
	t.Helper()
	sim.KeepAll()
	on := ids{project: sim.AddProject("a project")}
	on.account = sim.AddServiceAccount(on.project, "populated")
	key, err := connect(t, sim).CreateServiceAccountKey(context.Background(), on.project, on.account, "populated", nil, time.Hour)
	require.NoError(t, err)
	on.key, on.value = key.ID, key.Value.Reveal()
	on.adminKey, _ = sim.AddAdminKey("populated")
	sim.ResetRequests()
	return on
}

// failed returns the *Error of a call.
func failed(t testing.TB, err error) *Error {
	t.Helper()
	require.Error(t, err)
	e := AsError(err)
	require.NotNil(t, e, "%T: %v", err, err)
	return e
}

// together makes calls concurrently, since most of them only wait for a backoff or a
// timeout.
func together(calls map[string]func() error) map[string]error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	errs := map[string]error{}
	for name, call := range calls {
		wg.Go(func() {
			err := call()
			mu.Lock()
			defer mu.Unlock()
			errs[name] = err
		})
	}
	wg.Wait()
	return errs
}
