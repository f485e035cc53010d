//go:build integration

package integration

// Test helpers: a configured mount with its own simulator, methods to use it, and
// the search for secrets that ends each test.

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// mount is the engine at one path of a Vault, configured for one simulated
// organization that has one project.
type mount struct {
	t       *testing.T
	vault   *devenv.Vault
	client  *api.Client
	path    string
	sim     *openaitest.Server
	project string
	// staysMounted skips the disable at the end, on the test's own server.
	staysMounted bool
}

// newMount mounts and configures the engine on the shared server. extra holds
// additional fields for the config.
func newMount(t *testing.T, extra ...map[string]any) *mount {
	t.Helper()
	runParallel(t)
	return newMountOn(t, server, extra...)
}

// needs skips a test if the server lacks a feature.
func needs(t *testing.T, features ...devenv.Feature) {
	t.Helper()
	for _, f := range features {
		if server.Product.Lacks(f) {
			t.Skipf("NOT TESTED on %s, which does not have: %s", server, f)
		}
	}
}

var mounts struct {
	sync.Mutex
	n int
}

var notInAPath = regexp.MustCompile(`[^a-z0-9]+`)

func newMountOn(t *testing.T, v *devenv.Vault, extra ...map[string]any) *mount {
	t.Helper()
	return mountPlugin(t, v, devenv.PluginName, openaitest.Start(t, openaitest.Options{}), extra...)
}

// mountPlugin mounts the engine by its name in the catalog, for a simulator.
func mountPlugin(t *testing.T, v *devenv.Vault, name string, sim *openaitest.Server, extra ...map[string]any) *mount {
	t.Helper()
	mounts.Lock()
	mounts.n++
	path := notInAPath.ReplaceAllString(strings.ToLower(t.Name()), "-") + "-" + time.Now().Format("150405") + "-" + string(rune('a'+mounts.n%26))
	mounts.Unlock()
	return mountAt(t, v, name, path, sim, extra...)
}

// mountAt is mountPlugin at a path that the caller chooses.
func mountAt(t *testing.T, v *devenv.Vault, name, path string, sim *openaitest.Server, extra ...map[string]any) *mount {
	t.Helper()
	t.Logf("on %s", v)
	m := &mount{t: t, vault: v, client: v.Client(), path: path, sim: sim}
	m.project = m.sim.AddProject("project of " + t.Name())
	require.NoError(t, m.client.Sys().MountWithContext(t.Context(), path, &api.MountInput{Type: name}))
	// Cleanup order: disable the mount, which deletes everything that it created;
	// search for secrets; then openaitest checks for leftovers.
	t.Cleanup(func() { m.requireNoSecretWritten(m.sim.Secrets()...) })
	t.Cleanup(func() {
		m.keepAdminKey()
		if !m.staysMounted {
			require.NoError(t, m.unmount())
		}
	})

	config := m.adminConfig()
	for _, fields := range extra {
		for name, value := range fields {
			config[name] = value
		}
	}
	m.write("config", config)
	return m
}

// unmount disables the mount. That may outlast the default client timeout: the
// engine waits for objects that OpenAI does not find but may show again.
func (m *mount) unmount() error {
	m.client.SetClientTimeout(2 * time.Minute)
	return m.client.Sys().Unmount(m.path)
}

// adminConfig is a config for this mount's organization.
func (m *mount) adminConfig() map[string]any {
	_, key := m.sim.AdminKey()
	return map[string]any{"admin_api_key": key, "api_endpoint": m.sim.URL()}
}

// keepAdminKey excludes Vault's admin key from the leak check: disabling an engine
// does not delete the admin key.
func (m *mount) keepAdminKey() {
	var config *api.Secret
	var err error
	for range 5 { // a busy server may not answer in time
		if config, err = m.client.Logical().Read(m.path + "/config"); err == nil {
			break
		}
		time.Sleep(time.Second)
	}
	if err != nil {
		m.t.Logf("the admin key of the config is not known: %v", err)
		return
	}
	if config != nil {
		if id, ok := config.Data["effective_admin_api_key_id"].(string); ok {
			m.sim.Keep(id)
		}
	}
}

func (m *mount) write(path string, data map[string]any) *api.Secret {
	m.t.Helper()
	secret, err := m.client.Logical().WriteWithContext(m.t.Context(), m.path+"/"+path, data)
	require.NoError(m.t, err, "write %s", path)
	return secret
}

func (m *mount) read(path string) *api.Secret {
	m.t.Helper()
	secret, err := m.client.Logical().ReadWithContext(m.t.Context(), m.path+"/"+path)
	require.NoError(m.t, err, "read %s", path)
	require.NotNil(m.t, secret, "read %s: not found", path)
	return secret
}

// role writes a role for the mount's project.
func (m *mount) role(name, ttl, maxTTL string) {
	m.t.Helper()
	m.write("roles/"+name, map[string]any{"project_id": m.project, "ttl": ttl, "max_ttl": maxTTL})
}

// lease is a credential as a client sees it.
type lease struct {
	id        string
	seconds   int
	renewable bool
	warnings  []string
	key       string
	account   string
}

func newLease(t *testing.T, secret *api.Secret, err error) lease {
	t.Helper()
	require.NoError(t, err, "read a credential")
	require.NotNil(t, secret, "read a credential: not found")
	l := lease{id: secret.LeaseID, seconds: secret.LeaseDuration, renewable: secret.Renewable, warnings: secret.Warnings}
	for field, into := range map[string]*string{"api_key": &l.key, "service_account_id": &l.account} {
		value, ok := secret.Data[field].(string)
		require.True(t, ok && value != "", "the credential has no %s", field)
		*into = value
	}
	return l
}

// requireSeconds requires a lease_duration. Vault subtracts the time for which it stores the
// lease (vault/expiration.go, Register).
func (l lease) requireSeconds(t *testing.T, want int) {
	t.Helper()
	require.LessOrEqual(t, l.seconds, want)
	require.Greater(t, l.seconds, want-10)
}

// creds reads a credential.
func (m *mount) creds(role string) lease {
	m.t.Helper()
	secret, err := m.client.Logical().ReadWithContext(m.t.Context(), m.path+"/creds/"+role)
	return newLease(m.t, secret, err)
}

func (m *mount) revoke(l lease) error {
	return m.client.Sys().RevokeWithOptionsWithContext(m.t.Context(), &api.RevokeOptions{LeaseID: l.id, Sync: true})
}

// leased reports whether Vault still holds a lease.
func (m *mount) leased(l lease) bool {
	_, err := m.client.Sys().LookupWithContext(m.t.Context(), l.id)
	if err != nil {
		require.ErrorContains(m.t, err, "invalid lease")
	}
	return err == nil
}

// alive lists the IDs of the service accounts that exist at the API.
func (m *mount) alive() []string {
	var ids []string
	for _, account := range m.sim.Accounts() {
		ids = append(ids, account.ID)
	}
	return ids
}

// infer calls the inference API with a key and returns the status.
func infer(t *testing.T, sim *openaitest.Server, key string) int {
	t.Helper()
	status, err := tryKey(sim, key)
	require.NoError(t, err)
	return status
}

// tryKey is infer for other goroutines, or for use after the test.
func tryKey(sim *openaitest.Server, key string) (status int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, sim.URL()+"/models", nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// answers records the responses to Vault's clients that must not contain a secret:
// all errors, and every response whose purpose is not to return a key.
var answers recorder

type recorder struct {
	mu   sync.Mutex
	text bytes.Buffer
}

var handsOutKeys = regexp.MustCompile(`/(static-)?creds/|/sys/wrapping/unwrap|/sys/leases/renew`)

func (r *recorder) record(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(req *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(req)
		if err != nil || (resp.StatusCode < 400 && handsOutKeys.MatchString(req.URL.Path)) {
			return resp, err
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		resp.Body = io.NopCloser(bytes.NewReader(body))
		r.mu.Lock()
		defer r.mu.Unlock()
		r.text.WriteString(req.Method + " " + req.URL.Path + ": ")
		r.text.Write(body)
		r.text.WriteByte('\n')
		return resp, err
	})
}

func (r *recorder) content() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.text.Bytes())
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// requireNoSecretWritten searches everything that Vault and its clients keep: the
// trace log, the audit log, the storage (which encrypts values but not their paths)
// and the recorded answers.
func (m *mount) requireNoSecretWritten(secrets ...string) {
	m.t.Helper()
	require.NotEmpty(m.t, secrets, "there were no secrets to search for")
	places := map[string][]byte{"an answer": answers.content()}
	for _, path := range []string{m.vault.LogPath, m.vault.AuditPath} {
		content, err := os.ReadFile(path)
		require.NoError(m.t, err)
		require.NotEmpty(m.t, content, "%s is empty: nothing was searched", path)
		places[filepath.Base(path)] = content
	}
	for _, pattern := range []string{"raft/*.db", "raft/raft/*.db", "raft/raft/wal/*"} {
		paths, err := filepath.Glob(filepath.Join(m.vault.Dir, pattern))
		require.NoError(m.t, err)
		for _, path := range paths {
			content, err := os.ReadFile(path)
			require.NoError(m.t, err)
			places[path] = content
		}
	}
	require.Greater(m.t, len(places), 3, "the storage was not found")
	for place, content := range places {
		if i, secret := find(content, secrets); i >= 0 {
			m.t.Errorf("a key is in %s: …%q", place, bytes.ReplaceAll(content[max(0, i-200):i], []byte(secret), []byte("<key>")))
		}
	}
}
