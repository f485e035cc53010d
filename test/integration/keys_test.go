//go:build integration

package integration

// The permissions, lifetime and activation of keys on a real Vault: scopes, keys
// of an existing account, and key expiry at OpenAI.

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// use calls an inference endpoint with a key and returns the status.
func use(t *testing.T, sim *openaitest.Server, endpoint, key string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, sim.URL()+endpoint, bytes.NewReader([]byte(`{"model":"gpt-5-mini"}`)))
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode
}

// adopted creates an account as a user would. The leak check ignores it.
func (m *mount) adopted(name string) string {
	m.t.Helper()
	return m.sim.AddServiceAccount(m.project, name)
}

func TestAChatOnlyKeyCanOnlyChat(t *testing.T) {
	runParallel(t)
	for _, kind := range []string{"service_account", "api_key", "static"} {
		t.Run(kind, func(t *testing.T) {
			m := newMount(t)
			fields := map[string]any{"project_id": m.project, "scopes": "api.model.request"}
			var key string
			switch kind {
			case "static":
				fields["rotation_period"] = "1h"
				m.write("static-roles/r", fields)
				key = m.read("static-creds/r").Data["api_key"].(string)
			case "api_key":
				fields["credential_type"], fields["service_account_id"] = kind, m.adopted("team")
				fallthrough
			default:
				m.write("roles/r", fields)
				key = m.creds("r").key
			}
			require.Equal(t, http.StatusOK, use(t, m.sim, "/chat/completions", key))
			require.Equal(t, http.StatusForbidden, use(t, m.sim, "/responses", key))
		})
	}
}

func TestAKeyWorksAtTheMomentItIsReturned(t *testing.T) {
	const delay = 1500 * time.Millisecond
	m := newMount(t)
	m.role("r", "1h", "24h")
	m.write("roles/scoped", map[string]any{"project_id": m.project, "scopes": "api.responses.write"})
	m.write("roles/key", map[string]any{"project_id": m.project, "credential_type": "api_key", "service_account_id": m.adopted("team")})
	m.sim.Configure(func(o *openaitest.Options) { o.ActivationDelay = delay })

	for _, role := range []string{"r", "key"} {
		began := time.Now()
		require.Equal(t, http.StatusOK, infer(t, m.sim, m.creds(role).key), role)
		require.GreaterOrEqual(t, time.Since(began), delay)
		t.Logf("%s: returned %s after the request, with an activation delay of %s", role, time.Since(began).Round(time.Millisecond), delay)
	}
	require.Equal(t, http.StatusOK, use(t, m.sim, "/responses", m.creds("scoped").key), "a key without permission to list models")
	m.write("static-roles/s", map[string]any{"project_id": m.project, "rotation_period": "1h"})
	m.write("rotate-role/s", nil)
	require.Equal(t, http.StatusOK, infer(t, m.sim, m.read("static-creds/s").Data["api_key"].(string)))

	m.sim.Configure(func(o *openaitest.Options) { o.ActivationDelay = time.Minute })
	m.write("roles/r", map[string]any{"activation_timeout": "1s"})
	before := len(m.alive())
	_, err := m.client.Logical().Read(m.path + "/creds/r")
	requireStatus(t, http.StatusBadGateway, err)
	require.ErrorContains(t, err, "did not accept the new key within 1s")
	require.Len(t, m.alive(), before, "a key that does not work must be deleted")
	m.write("roles/r", map[string]any{"activation_timeout": 0})
	require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, m.creds("r").key), "returned without a probe")
}

// Vault keeps the status of a plugin's error only if it is not wrapped.
func TestErrors_StatusAndTextDependOnTheCause(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	for name, test := range map[string]struct {
		fault  openaitest.Fault
		status int
		says   string
	}{
		"the admin key":          {openaitest.Fault{Status: 401, Code: "invalid_api_key", Message: "Incorrect API key provided"}, http.StatusInternalServerError, "rejects the engine's admin key"},
		"a missing permission":   {openaitest.Fault{Status: 403, Body: `{"error":"Missing scopes: api.management.write"}`}, http.StatusInternalServerError, "the engine's admin key requires the permission"},
		"a firewall":             {openaitest.Fault{Status: 403, Body: "<html><title>Blocked by rule 7</title></html>"}, http.StatusBadGateway, "Blocked by rule 7"},
		"a proxy":                {openaitest.Fault{Status: 407, Body: "<html></html>"}, http.StatusBadGateway, "the HTTP proxy"},
		"a project's setting":    {openaitest.Fault{Status: 403, Code: "key_creation_disabled", Message: "disabled"}, http.StatusBadGateway, "a setting of the organization or project"},
		"an organization":        {openaitest.Fault{Status: 401, Code: "mismatched_organization", Message: "no"}, http.StatusBadGateway, "organization_id"},
		"a host":                 {openaitest.Fault{Status: 401, Code: "incorrect_hostname", Message: "use eu.api.openai.com"}, http.StatusBadGateway, "which is eu.api.openai.com"},
		"an address":             {openaitest.Fault{Status: 401, Code: "ip_not_authorized", Message: "no"}, http.StatusBadGateway, "IP address"},
		"an unknown reason":      {openaitest.Fault{Status: 403, Code: "teapot", Message: "short and stout"}, http.StatusBadGateway, "127.0.0.1"},
		"a policy on a lifetime": {openaitest.Fault{Status: 403, Message: "Keys must expire within a day."}, http.StatusBadRequest, "reduce max_ttl"},
	} {
		test.fault.Route = "/organization/*"
		cancel := m.sim.Fail(test.fault)
		_, err := m.client.Logical().Read(m.path + "/creds/r")
		cancel()
		requireStatus(t, test.status, err, name)
		require.ErrorContains(t, err, test.says, name)
		require.ErrorContains(t, err, "request id req_", name)
	}
}

func TestAKeyOfAProjectWithDataResidencyComesWithItsHost(t *testing.T) {
	m := newMount(t)
	m.role("r", "1h", "24h")
	m.sim.SetResidency(m.project, "EU_STORAGE_PROCESSING")
	require.Contains(t, strings.Join(m.read("creds/r").Warnings, "\n"), "https://eu.api.openai.com/v1")
	m.write("static-roles/s", map[string]any{"project_id": m.project, "rotation_period": "1h"})
	require.Contains(t, strings.Join(m.read("static-creds/s").Warnings, "\n"), "https://eu.api.openai.com/v1")
}

func TestAKeyIsHandedOutDuringAnOutageIfTheRoleSaysSo(t *testing.T) {
	m := newMount(t)
	m.write("roles/r", map[string]any{"project_id": m.project, "activation_timeout": "1s"})
	m.sim.Fail(openaitest.Fault{Route: "/models", Status: http.StatusServiceUnavailable, Message: "down"})
	_, err := m.client.Logical().Read(m.path + "/creds/r")
	requireStatus(t, http.StatusBadGateway, err)
	require.ErrorContains(t, err, "could not verify within 1s that OpenAI accepts the new key")
	m.write("roles/r", map[string]any{"activation_failure": "warn"})
	require.Equal(t, "warn", m.read("roles/r").Data["activation_failure"])
	require.Contains(t, strings.Join(m.read("creds/r").Warnings, "\n"), "activation_failure=warn")
}

// Under a policy on the lifetime of keys, a role works if its keys expire in time.
// Otherwise, the error states the reason.
func TestUnderAMaximumLifetimeOfKeys(t *testing.T) {
	m := newMount(t)
	m.sim.Configure(func(o *openaitest.Options) { o.MaxKeyLifetime = 2 * time.Hour })
	account := m.adopted("team")
	for name, test := range map[string]struct {
		fields map[string]any
		why    string
	}{
		"short":    {map[string]any{"max_ttl": "1h"}, ""},
		"long":     {map[string]any{"max_ttl": "24h"}, "reduce max_ttl"},
		"follows":  {map[string]any{"max_ttl": "24h", "key_expiry": "ttl"}, ""},
		"long ttl": {map[string]any{"ttl": "3h", "max_ttl": "24h", "key_expiry": "ttl"}, "with key_expiry=ttl, ttl"},
		"endless":  {map[string]any{"max_ttl": "1h", "key_expiry": "none"}, "set key_expiry=max_ttl or ttl"},
	} {
		for _, kind := range []string{"service_account", "api_key"} {
			test.fields["project_id"], test.fields["credential_type"] = m.project, kind
			delete(test.fields, "service_account_id")
			if kind == "api_key" {
				test.fields["service_account_id"] = account
			}
			_, err := m.client.Logical().Delete(m.path + "/roles/r")
			require.NoError(t, err)
			m.write("roles/r", test.fields)
			secret, err := m.client.Logical().Read(m.path + "/creds/r")
			if test.why != "" {
				requireStatus(t, http.StatusBadRequest, err, name)
				require.ErrorContains(t, err, test.why, name)
				require.ErrorContains(t, err, "expires_in_seconds", "OpenAI's message")
				continue
			}
			l := newLease(t, secret, err)
			require.Equal(t, http.StatusOK, infer(t, m.sim, l.key), name)
			if name == "follows" {
				_, err := m.client.Sys().Renew(l.id, 7000)
				require.NoError(t, err, "a renewal within the policy")
				_, err = m.client.Sys().Renew(l.id, 10000)
				requireStatus(t, http.StatusBadRequest, err, "a renewal beyond the policy")
			}
			require.NoError(t, m.revoke(l))
		}
	}
	static := map[string]any{"project_id": m.project, "rotation_period": "10m"}
	_, err := m.client.Logical().Write(m.path+"/static-roles/s", static)
	requireStatus(t, http.StatusBadRequest, err)
	require.ErrorContains(t, err, "reduce key_ttl")
	static["key_ttl"] = "2h"
	m.write("static-roles/s", static)
	require.Equal(t, http.StatusOK, infer(t, m.sim, m.read("static-creds/s").Data["api_key"].(string)))
}

func TestARenewalMovesTheKeysEndFirst(t *testing.T) {
	m := newMount(t)
	m.write("roles/r", map[string]any{"project_id": m.project, "ttl": "10m", "max_ttl": "24h", "key_expiry": "ttl"})
	l := m.creds("r")
	end := func() time.Time { return m.sim.Keys()[0].ExpiresAt }
	first := end()
	require.WithinDuration(t, time.Now().Add(10*time.Minute+75*time.Second), first, time.Minute)

	renewed, err := m.client.Sys().Renew(l.id, 3600)
	require.NoError(t, err)
	require.InDelta(t, 3600, renewed.LeaseDuration, 2)
	require.WithinDuration(t, time.Now().Add(time.Hour+75*time.Second), end(), time.Minute)

	// A renewal that OpenAI rejects changes neither the lease nor the key.
	expires := func() string {
		lease, err := m.client.Sys().Lookup(l.id)
		require.NoError(t, err)
		return lease.Data["expire_time"].(string)
	}
	before, key := expires(), end()
	for _, status := range []int{http.StatusBadRequest, http.StatusForbidden} {
		cancel := m.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/projects/{project_id}/api_keys/{api_key_id}", Status: status})
		_, err = m.client.Sys().Renew(l.id, 7200)
		require.Error(t, err)
		cancel()
		require.Equal(t, before, expires())
		require.Equal(t, key, end())
	}
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))

	// The next renewal and the revocation work, so the lease kept its data.
	_, err = m.client.Sys().Renew(l.id, 7200)
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(2*time.Hour+75*time.Second), end(), time.Minute)
	require.NoError(t, m.revoke(l))
	require.Empty(t, m.alive())
}

func TestAKeyOfAnAccountThatStays(t *testing.T) {
	runParallel(t)
	for name, refused := range map[string]bool{"key deleted": false, "deletion refused, key expires": true} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			m.sim.Configure(func(o *openaitest.Options) { o.DeleteServiceAccountKeyRefused = refused })
			account := m.adopted("team")
			m.write("roles/r", map[string]any{"project_id": m.project, "credential_type": "api_key", "service_account_id": account})
			l, other := m.creds("r"), m.creds("r")
			require.Equal(t, account, l.account)
			require.NoError(t, m.revoke(l))
			require.Eventually(t, func() bool { return infer(t, m.sim, l.key) == http.StatusUnauthorized }, time.Minute, 100*time.Millisecond)
			require.False(t, m.leased(l))
			require.Equal(t, http.StatusOK, infer(t, m.sim, other.key), "the other lease's key")
			require.NoError(t, m.revoke(other))
			require.Eventually(t, func() bool { return len(m.sim.Keys()) == 0 }, time.Minute, 100*time.Millisecond)
			require.Equal(t, []string{account}, m.alive(), "the account stays")
		})
	}
}

// Vault is killed and never restarts: each key that the engine issued still expires
// at OpenAI, including the engine's admin key.
func TestKeysExpireAfterVaultIsLost(t *testing.T) {
	runParallel(t)
	v, err := startVault(t.Context(), plugin)
	require.NoError(t, err)
	t.Cleanup(func() { _ = v.Stop() })
	m := &mount{t: t, vault: v, client: v.Client(), path: "openai", sim: openaitest.Start(t, openaitest.Options{})}
	m.project = m.sim.AddProject("apps")
	require.NoError(t, v.Mount(t.Context(), m.path, api.MountConfigInput{}))
	config := m.adminConfig()
	config["rotation_period"] = "24h"
	m.write("config", config)
	m.write("config/rotate", nil)

	account := m.adopted("team")
	keys := map[string]string{}
	for name, fields := range map[string]map[string]any{
		"max_ttl": {}, "ttl": {"key_expiry": "ttl"}, "scoped": {"scopes": "api.model.read"},
		"api_key": {"credential_type": "api_key", "service_account_id": account},
	} {
		fields["project_id"] = m.project
		m.write("roles/"+name, fields)
		l := m.creds(name)
		_, err := m.client.Sys().Renew(l.id, 7200)
		require.NoError(t, err)
		keys[name] = l.key
	}
	for name, fields := range map[string]map[string]any{"made": {}, "adopted": {"service_account_id": account}} {
		fields["project_id"], fields["rotation_period"] = m.project, "24h"
		m.write("static-roles/"+name, fields)
		m.write("rotate-role/"+name, nil)
		keys["static "+name] = m.read("static-creds/" + name).Data["api_key"].(string)
	}
	require.NoError(t, v.Kill())

	ends := map[string]time.Time{}
	for _, k := range m.sim.Keys() {
		require.False(t, k.ExpiresAt.IsZero(), "key %s never expires", k.Name)
		ends[k.Value] = k.ExpiresAt
	}
	for name, key := range keys {
		require.Contains(t, ends, key, name)
		require.Equal(t, http.StatusOK, infer(t, m.sim, key), name)
	}
	began, passed := time.Now(), time.Duration(0)
	until := func(at time.Time) {
		m.sim.Advance(at.Sub(began) - passed)
		passed = at.Sub(began)
	}
	for name, longest := range map[string]time.Duration{"ttl": 2*time.Hour + 2*time.Minute, "max_ttl": 24*time.Hour + 2*time.Minute} {
		require.Less(t, ends[keys[name]].Sub(began), longest, name)
	}
	until(ends[keys["ttl"]].Add(time.Second))
	require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, keys["ttl"]))
	require.Equal(t, http.StatusOK, infer(t, m.sim, keys["max_ttl"]))
	for _, end := range ends {
		if end.Sub(began) > passed {
			until(end.Add(time.Second))
		}
	}
	for name, key := range keys {
		require.Equal(t, http.StatusUnauthorized, infer(t, m.sim, key), name)
	}
	require.Empty(t, m.sim.Keys())
	t.Logf("%d keys, the last expired %s after the kill", len(ends), passed.Round(time.Second))
	for _, k := range m.sim.AdminKeys() {
		if id, _ := m.sim.AdminKey(); k.ID != id {
			require.False(t, k.ExpiresAt.IsZero(), "admin key %s of the engine never expires", k.Name)
			until(k.ExpiresAt.Add(time.Second))
		}
	}
	id, _ := m.sim.AdminKey()
	for _, k := range m.sim.AdminKeys() {
		require.Equal(t, id, k.ID, "an admin key of the engine remains")
	}
	m.sim.KeepAll() // no Vault is left to delete the empty accounts
}

// The keys of the first role that the README, the docs and path-help show work for
// inference.
func TestTheReadmesRoleWorks(t *testing.T) {
	m := newMount(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	help, err := m.vaultCLI("path-help", m.path)
	require.NoError(t, err, help)
	role := regexp.MustCompile(`(?s)write openai/roles/my-app [^$]*?scopes=(\S+)`)
	texts := map[string]string{"path-help": help}
	for _, page := range []string{"README.md", "docs/roles.md", "docs/use-a-key.md"} {
		content, err := os.ReadFile(filepath.Join(root, page))
		require.NoError(t, err)
		texts[page] = string(content)
	}
	for from, text := range texts {
		found := role.FindStringSubmatch(text)
		require.NotNil(t, found, from)
		m.write("roles/my-app", map[string]any{"project_id": m.project, "ttl": "1h", "max_ttl": "24h", "scopes": found[1]})
		l := m.creds("my-app")
		require.Equal(t, http.StatusOK, infer(t, m.sim, l.key), "%s: /models", from)
		for _, endpoint := range []string{"/responses", "/chat/completions"} {
			require.Equal(t, http.StatusOK, use(t, m.sim, endpoint, l.key), "%s: %s", from, endpoint)
		}
		require.NoError(t, m.revoke(l))
	}
}
