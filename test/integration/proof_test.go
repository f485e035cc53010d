//go:build integration

package integration

// Deletions that OpenAI does not confirm, on a real Vault: a 404 that proves
// nothing, and pending revocations, which must not delay other work.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

const (
	keyRoute = "/organization/projects/{project_id}/api_keys/{api_key_id}"
	// threePeriods limits work that Vault's periodic calls start.
	threePeriods = 3 * periodicTimeout
)

func TestRevoke_Unproven404KeepsTheLease(t *testing.T) {
	m := newMount(t)
	m.role("account", "1h", "24h")
	m.write("roles/key", map[string]any{"project_id": m.project, "credential_type": "api_key", "service_account_id": m.adopted("team")})
	var leases []lease
	for name, body := range map[string]string{
		"OpenAI does not know the URL": `{"error":{"message":"Unknown request URL: DELETE /organization/projects. Please check the URL for typos, or see the docs at https://platform.openai.com/docs/api-reference/.","type":"invalid_request_error","param":null,"code":"unknown_url"}}`,
		"OpenAI calls the URL invalid": `{"error":{"message":"Invalid URL (DELETE /v1/organization/projects)","type":"invalid_request_error","param":null,"code":null}}`,
		"a gateway":                    `{"timestamp":"2026-11-26T10:00:00.000+00:00","status":404,"error":"Not Found","path":"/v1/organization/projects"}`,
	} {
		for _, role := range []string{"account", "key"} {
			l := m.creds(role)
			leases = append(leases, l)
			fault := openaitest.Fault{Kind: openaitest.FaultStatus, Method: http.MethodDelete, Route: "/organization/*", Status: http.StatusNotFound, Body: body}
			m.sim.Fail(fault)
			fault.Method = http.MethodPost // or the engine would set an expiry instead
			m.sim.Fail(fault)
			out, err := m.vaultCLI("lease", "revoke", "-sync", l.id)
			m.sim.ClearFaults()
			t.Logf("%s, credential_type of role %s: vault lease revoke -sync: %v\n%s", name, role, err, out)
			require.Error(t, err, name)
			require.Contains(t, out, "not deleted yet")
			require.Equal(t, http.StatusOK, infer(t, m.sim, l.key), name)
			require.True(t, m.leased(l), name)
		}
	}

	// An endpoint without its /v1 answers 404 to everything.
	l := m.creds("account")
	config := m.adminConfig()
	config["api_endpoint"] = strings.TrimSuffix(m.sim.URL(), "/v1")
	_, err := m.client.Logical().Write(m.path+"/config", config)
	requireStatus(t, http.StatusBadRequest, err)
	require.ErrorContains(t, err, "does not serve the Admin API")
	t.Logf("config without /v1: %v", err)
	config["skip_verify"] = true
	m.write("config", config)
	err = m.revoke(l)
	t.Logf("revocation at that endpoint: %v", err)
	require.Error(t, err)
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
	require.True(t, m.leased(l))
	m.write("config", m.adminConfig())
	leases = append(leases, l)

	began := time.Now()
	for _, l := range leases {
		require.Eventually(t, func() bool { return infer(t, m.sim, l.key) == http.StatusUnauthorized }, threePeriods, 200*time.Millisecond, "the WAL did not revoke the key of a failed revocation")
	}
	t.Logf("all %d keys were revoked by the WAL within %s of the last failure", len(leases), time.Since(began).Round(time.Second))
	for _, l := range leases {
		require.NoError(t, m.revoke(l), "Vault's next try")
	}
}

// While forty revocations wait for one endpoint, the engine deletes a superseded
// admin key, retries a failed revocation at another, and runs tidy.
func TestLong_StalledEndpointDoesNotBlockOtherWork(t *testing.T) {
	runParallel(t)
	const forty = 40
	for name, fault := range map[string]openaitest.Fault{
		"hanging endpoint":   {Kind: openaitest.FaultHang},
		"throttled endpoint": {Status: http.StatusTooManyRequests, Message: "Rate limit reached"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t, frequentTidy(), map[string]any{"rotation_grace_period": "1s"})
			account := m.adopted("team")
			m.role("waits", "1h", "24h")
			m.write("roles/key", map[string]any{"project_id": m.project, "credential_type": "api_key", "service_account_id": account})
			for range forty {
				m.creds("waits")
			}
			_, superseded := m.sim.AdminKey()
			orphan := m.expiringKey(account)
			other := m.creds("key")

			fault.Method, fault.Route = http.MethodDelete, accountRoute
			cancel := m.sim.Fail(fault)
			require.NoError(t, m.client.Sys().RevokeWithOptionsWithContext(t.Context(), &api.RevokeOptions{LeaseID: m.path + "/creds/waits", Prefix: true}))
			began := time.Now()
			refuse := m.sim.Fail(openaitest.Fault{Route: keyRoute, Status: http.StatusForbidden}) // also refuses to set an expiry
			require.Error(t, m.revoke(other))
			refuse()
			m.write("config/rotate", nil)

			goals := map[string]func() bool{
				"the superseded admin key is deleted": func() bool {
					for _, key := range m.sim.AdminKeys() {
						if key.Value == superseded {
							return false
						}
					}
					return true
				},
				"the key whose revocation failed is revoked": func() bool { return infer(t, m.sim, other.key) == http.StatusUnauthorized },
				"tidy has deleted an orphan":                 func() bool { return m.deleted(orphan) },
			}
			for len(goals) > 0 {
				require.Less(t, time.Since(began), threePeriods, "still waiting: %v", slices.Collect(maps.Keys(goals)))
				for what, reached := range goals {
					if reached() {
						t.Logf("%s %s after the request to revoke the forty", what, time.Since(began).Round(time.Second))
						delete(goals, what)
					}
				}
				time.Sleep(200 * time.Millisecond) // between two checks
			}
			require.Len(t, m.alive(), forty+1, "the forty must still be waiting")
			t.Logf("calls to the endpoint: %d", m.sim.Count(http.MethodDelete, accountRoute))

			cancel()
			// The engine learns a rate limit per endpoint: a new host name has none, so
			// the test does not wait for the rate limiter to recover.
			_, key := m.sim.AddAdminKey("by hand")
			m.write("config", map[string]any{"admin_api_key": key, "api_endpoint": strings.Replace(m.sim.URL(), "127.0.0.1", "localhost", 1)})
			healed := time.Now()
			require.Eventually(t, func() bool { return len(m.alive()) == 1 }, threePeriods, 200*time.Millisecond, "the forty remain after the endpoint recovered")
			t.Logf("the forty were revoked %s after the endpoint recovered", time.Since(healed).Round(time.Second))
		})
	}
}

// expiringKey creates a key with this mount's tag, without a lease or WAL entry,
// that expires after a second, and returns its ID.
func (m *mount) expiringKey(account string) (id string) {
	m.t.Helper()
	name := ""
	for _, a := range m.sim.Accounts() {
		if a.ID != account {
			name = "vault-lost-" + a.Name[strings.LastIndex(a.Name, "-")+1:] // with the mount tag
		}
	}
	require.NotEmpty(m.t, name)
	body := fmt.Sprintf(`{"name":%q,"expires_in_seconds":1}`, name)
	req, err := http.NewRequestWithContext(m.t.Context(), http.MethodPost, m.sim.URL()+"/organization/projects/"+m.project+"/service_accounts/"+account+"/api_keys", bytes.NewReader([]byte(body)))
	require.NoError(m.t, err)
	_, key := m.sim.AdminKey()
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(m.t, err)
	defer func() { require.NoError(m.t, resp.Body.Close()) }()
	answer, err := io.ReadAll(resp.Body)
	require.NoError(m.t, err)
	var made struct {
		ID string `json:"id"`
	}
	require.NoError(m.t, json.Unmarshal(answer, &made), "%s", answer)
	require.NotEmpty(m.t, made.ID, "%s", answer)
	return made.ID
}

// deleted reports whether an object was deleted at the API and did not only expire.
func (m *mount) deleted(id string) bool {
	for _, e := range m.sim.Ledger() {
		if e.ID == id && e.Event == openaitest.EventDeleted {
			return true
		}
	}
	return false
}
