//go:build integration

package integration

// The audit log of this engine with the example's settings, and Vault's quotas for
// its requests.

import (
	"bufio"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

type auditLine struct {
	Type    string
	Request struct {
		Path string
		Data map[string]any
	}
	Response struct {
		Data   map[string]any
		Secret struct {
			LeaseID string `json:"lease_id"`
		}
	}
}

// audited lists the responses in the audit log for a path.
func (m *mount) audited(path string) (lines []auditLine) {
	m.t.Helper()
	log, err := os.Open(m.vault.AuditPath)
	require.NoError(m.t, err)
	defer log.Close()
	scanner := bufio.NewScanner(log)
	scanner.Buffer(nil, 1<<24)
	for scanner.Scan() {
		if !strings.Contains(scanner.Text(), m.path) {
			continue
		}
		var line auditLine
		require.NoError(m.t, json.Unmarshal(scanner.Bytes(), &line))
		if line.Type == "response" && line.Request.Path == path {
			lines = append(lines, line)
		}
	}
	require.NoError(m.t, scanner.Err())
	return lines
}

// Every test ends with a search for its keys in the log. This one checks the
// values that the log shows instead.
func TestTheAuditLogShowsNamesAndNoKeys(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "2h")
	m.creds("my-app")
	before := m.audited(m.path + "/creds/my-app")
	require.Len(t, before, 1)
	for name, value := range before[0].Response.Data {
		if name == "expires_at" && server.Product.Lacks(devenv.HashedAuditTimes) {
			continue
		}
		require.Contains(t, value, "hmac-sha256:", "%s, before tuning", name)
	}

	_, err := m.script(m.vault.RootToken, m.exampleFile("audit/tune.sh", t.TempDir()))
	require.NoError(t, err)
	issued, err := m.client.Logical().Read(m.path + "/creds/my-app")
	l := newLease(t, issued, err)
	m.role("my-app", "30m", "2h")
	m.write("config", m.adminConfig())
	m.write("config/rotate", nil)

	lines := m.audited(m.path + "/creds/my-app")
	require.Len(t, lines, 2)
	data := lines[1].Response.Data
	require.Equal(t, l.id, lines[1].Response.Secret.LeaseID)
	for name, value := range issued.Data {
		if name == "api_key" {
			require.Contains(t, data[name], "hmac-sha256:")
		} else {
			require.Equal(t, value, data[name], name)
		}
	}
	roles := m.audited(m.path + "/roles/my-app")
	require.Equal(t, m.project, roles[len(roles)-1].Request.Data["project_id"])
	require.Equal(t, "30m", roles[len(roles)-1].Request.Data["ttl"])
	rotated := m.audited(m.path + "/config/rotate")
	require.Equal(t, m.read("config").Data["admin_api_key_id"], rotated[0].Response.Data["admin_api_key_id"])
	for _, line := range m.audited(m.path + "/config") {
		if key, ok := line.Request.Data["admin_api_key"]; ok {
			require.Contains(t, key, "hmac-sha256:")
		}
	}
}

func TestAKeysIDLeadsToItsHolderAndItsLease(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "2h")
	_, err := m.script(m.vault.RootToken, m.exampleFile("audit/tune.sh", t.TempDir()))
	require.NoError(t, err)
	m.creds("my-app")
	client := m.vault.ClientFor(m.tokenOf("application"))
	issued, err := client.Logical().Read(m.path + "/creds/my-app")
	l := newLease(t, issued, err)
	_, err = client.Sys().Renew(l.id, 0)
	require.NoError(t, err)
	require.NoError(t, m.revoke(l))

	jq(t, m.vault)
	who := m.exampleFile("audit/who-has-key", t.TempDir())
	out, err := m.script(m.vault.RootToken, who, issued.Data["api_key_id"].(string), m.vault.AuditPath)
	require.NoError(t, err)
	var paths []string
	for _, text := range strings.Split(out, "\n") {
		var line map[string]any
		require.NoError(t, json.Unmarshal([]byte(text), &line), text)
		paths = append(paths, line["path"].(string))
		require.NotEmpty(t, line["time"])
		require.NotEmpty(t, line["display_name"])
	}
	// Vault's client puts the ID of the lease into the path, which is not hashed.
	// The renewal has it in the body.
	require.Equal(t, []string{m.path + "/creds/my-app", "sys/leases/renew", "sys/leases/revoke/" + l.id}, paths)
	_, err = m.script(m.vault.RootToken, who, "key_nobody_has", m.vault.AuditPath)
	require.ErrorContains(t, err, "no response in")
}

func TestARateLimitQuotaStopsALoopBeforeTheEngine(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "2h")
	m.role("ci", "1h", "2h")
	script := m.exampleFile("quotas/quotas.sh", t.TempDir(), "rate-limit/openai", "rate-limit/"+m.path)
	_, err := m.script(m.vault.RootToken, script)
	require.NoError(t, err)
	t.Cleanup(func() {
		for _, name := range []string{"-creds", "-creds-ci"} {
			_, err := m.client.Logical().Delete("sys/quotas/rate-limit/" + m.path + name)
			require.NoError(t, err)
		}
	})
	var leases []lease
	var refused error
	for range 6 {
		secret, err := m.client.Logical().Read(m.path + "/creds/ci")
		if err != nil {
			refused = err
			break
		}
		leases = append(leases, newLease(t, secret, err))
	}
	require.Len(t, leases, 5)
	requireStatus(t, http.StatusTooManyRequests, refused)
	require.Len(t, m.alive(), 5, "the refused request must not create an account")

	// Other roles, renewals and revocations still work.
	m.creds("my-app")
	_, err = m.client.Sys().Renew(leases[0].id, 0)
	require.NoError(t, err)
	for _, l := range leases {
		require.NoError(t, m.revoke(l))
	}
	m.read("roles/ci")
}

// The page says that these require Vault Enterprise. Other editions must reject the
// rule and not ignore it.
func TestLeaseCountQuotasAreEnterprise(t *testing.T) {
	m := newMount(t)
	if strings.Contains(m.vault.Version, "ent") {
		t.Skip("NOT TESTED on Vault Enterprise, which supports these quotas")
	}
	_, err := m.script(m.vault.RootToken, m.exampleFile("quotas/lease-count.sh", t.TempDir(), "lease-count/openai", "lease-count/"+m.path))
	require.Error(t, err)
}
