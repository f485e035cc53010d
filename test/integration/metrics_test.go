//go:build integration

package integration

// Metrics as an operator scrapes them: with a real Prometheus through Vault, a
// token that allows nothing else, and the files under deploy/.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// prometheusBin returns the directory of prometheus and promtool, or skips the
// test.
func prometheusBin(t *testing.T) string {
	t.Helper()
	bin, err := devenv.FindPrometheus(t.Context())
	if errors.Is(err, devenv.ErrNoPrometheus) {
		t.Skipf("NOT TESTED with a real Prometheus: %v", err)
	}
	require.NoError(t, err)
	return bin
}

// promtool runs promtool in deploy/prometheus.
func promtool(t *testing.T, bin string, args ...string) string {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "promtool"), args...)
	cmd.Dir = filepath.Join(root, "deploy", "prometheus")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "promtool %v: %s", args, out)
	t.Logf("promtool %s: %s", strings.Join(args, " "), strings.Join(strings.Fields(string(out)), " "))
	return string(out)
}

// deployed reads a file under deploy/.
func deployed(t *testing.T, path ...string) string {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	content, err := os.ReadFile(filepath.Join(append([]string{root, "deploy"}, path...)...))
	require.NoError(t, err)
	return string(content)
}

func TestTheAlertsFireAndAreDocumented(t *testing.T) {
	runParallel(t)
	bin := prometheusBin(t)
	rules := strings.Count(deployed(t, "prometheus", "openai-alerts.yml"), "- alert: ")
	require.Contains(t, promtool(t, bin, "check", "rules", "openai-alerts.yml"), fmt.Sprintf("%d rules found", rules))
	promtool(t, bin, "test", "rules", "openai-alerts.test.yml")
	root, err := devenv.Root()
	require.NoError(t, err)
	page, err := os.ReadFile(filepath.Join(root, "docs", "metrics.md"))
	require.NoError(t, err)
	tests := deployed(t, "prometheus", "openai-alerts.test.yml")
	for line := range strings.Lines(deployed(t, "prometheus", "openai-alerts.yml")) {
		if _, name, is := strings.Cut(strings.TrimSpace(line), "- alert: "); is {
			require.Contains(t, string(page), "`"+name+"`", "docs/metrics.md")
			require.Contains(t, tests, "alertname: "+name+"\n        exp_alerts", "no test shows that it fires")
		}
	}
}

// scraper returns a token that may read a mount's metrics and nothing else.
func (m *mount) scraper() string {
	m.t.Helper()
	name := "metrics-" + m.path
	require.NoError(m.t, m.client.Sys().PutPolicyWithContext(m.t.Context(), name, `path "`+m.path+`/metrics" { capabilities = ["read"] }`))
	secret, err := m.client.Auth().Token().CreateWithContext(m.t.Context(), &api.TokenCreateRequest{Policies: []string{name}, NoParent: true, NoDefaultPolicy: true, Period: "1h"})
	require.NoError(m.t, err)
	return secret.Auth.ClientToken
}

// scrape reads a path of the mount as Prometheus does.
func (m *mount) scrape(path, token string) (status int, header http.Header, body string) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(m.t.Context(), http.MethodGet, m.vault.Addr+"/v1/"+m.path+"/"+path, nil)
	require.NoError(m.t, err)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	require.NoError(m.t, err)
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	require.NoError(m.t, err)
	return resp.StatusCode, resp.Header, string(content)
}

func TestMetrics_RequirePolicyAndContainNoSecrets(t *testing.T) {
	m := newMount(t)
	m.role("app", "5m", "10m")
	lease := m.creds("app")
	token := m.scraper()

	status, _, body := m.scrape("metrics?format=prometheus", "")
	require.Equal(t, http.StatusForbidden, status, body)
	status, _, _ = m.scrape("config", token)
	require.Equal(t, http.StatusForbidden, status)

	status, header, body := m.scrape("metrics?format=prometheus", token)
	require.Equal(t, http.StatusOK, status, body)
	require.Equal(t, "text/plain; version=0.0.4; charset=utf-8", header.Get("Content-Type"))
	require.Contains(t, body, `vault_openai_credentials_issued_total{mount_point="`+m.path+`/",outcome="ok",role="app"} 1`)
	status, header, inJSON := m.scrape("metrics", token)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "application/json", header.Get("Content-Type"))
	require.Contains(t, inJSON, `"name":"vault_openai_credentials_issued_total"`)
	require.NotContains(t, body+inJSON, lease.account)
	for _, secret := range m.sim.Secrets() {
		require.NotContains(t, body+inJSON, secret)
	}

	// Another mount in the same process counts separately.
	other := &mount{t: t, vault: m.vault, client: m.client, path: m.path + "-other"}
	require.NoError(t, m.vault.Mount(t.Context(), other.path, api.MountConfigInput{}))
	defer func() { require.NoError(t, m.client.Sys().Unmount(other.path)) }()
	status, _, body = other.scrape("metrics?format=prometheus", m.client.Token())
	require.Equal(t, http.StatusOK, status)
	require.Contains(t, body, `mount_point="`+other.path+`/"`)
	require.NotContains(t, body, "vault_openai_credentials_issued_total{")
	require.NotContains(t, body, `"`+m.path+`/"`)
	require.NoError(t, m.revoke(lease))
}

// cli runs a documented command with the server's own CLI.
func (m *mount) cli(command string) string {
	m.t.Helper()
	env, err := m.vault.CLIEnv()
	require.NoError(m.t, err)
	cmd := exec.CommandContext(m.t.Context(), "bash", "-c", command)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	require.NoError(m.t, err, "%s: %s", command, out)
	return string(out)
}

func TestMetricsCommandsOfTheDocumentationWork(t *testing.T) {
	m := newMount(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	page, err := os.ReadFile(filepath.Join(root, "docs", "metrics.md"))
	require.NoError(t, err)
	for command, want := range map[string]string{
		"vault read -format=json openai/metrics":                  `"mount_point": "` + m.path + `/"`,
		"vault read -format=raw openai/metrics format=prometheus": "# TYPE vault_openai_build_info gauge",
	} {
		require.Contains(t, string(page), command)
		require.Contains(t, m.cli(strings.Replace(command, "openai/metrics", m.path+"/metrics", 1)), want)
	}
}

func TestMetricsArePushedByAPluginRegisteredForIt(t *testing.T) {
	needs(t, devenv.RegisterEnvFlag)
	m := newMount(t) // for its server
	heard, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer heard.Close()
	// As documented, but under another name, so that other mounts do not push.
	const name = "openai-pushing"
	m.cli("vault plugin register -sha256=" + plugin.SHA256 + " -version=" + plugin.Version + " -command=" + filepath.Base(plugin.Path) +
		" -env=VAULT_OPENAI_METRICS_DOGSTATSD_ADDR=" + heard.LocalAddr().String() + " secret " + name)
	path := m.path + "-pushing"
	require.NoError(t, m.client.Sys().MountWithContext(t.Context(), path, &api.MountInput{Type: name}))
	defer func() { require.NoError(t, m.client.Sys().Unmount(path)) }()
	config := m.adminConfig()
	_, err = m.client.Logical().WriteWithContext(t.Context(), path+"/config", config)
	require.NoError(t, err)

	packet := make([]byte, 1<<16)
	require.NoError(t, heard.SetReadDeadline(time.Now().Add(time.Minute)))
	for text := ""; !strings.Contains(text, "vault.openai.api_requests:1|c|#mount_point:"+path+"/,call:"); {
		n, _, err := heard.ReadFrom(packet)
		require.NoError(t, err, "received only: %s", text)
		text += string(packet[:n]) + "\n"
	}
}

// scraped starts a Prometheus that scrapes the mount once a second, with the example's
// configuration. The caller must Stop it.
func (m *mount) scraped(bin string) *devenv.Prometheus {
	t := m.t
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "vault-token"), []byte(m.scraper()+"\n"), 0o600))
	// The example, with only the changes that its comments require.
	config := deployed(t, "prometheus", "prometheus.yml")
	for _, change := range [][2]string{
		{"/v1/openai/metrics", "/v1/" + m.path + "/metrics"},
		{"    scheme: https\n    tls_config:\n      ca_file: /etc/prometheus/vault-ca.pem\n", ""}, // the test's Vault has no TLS
		{"/etc/prometheus/vault-token", filepath.Join(dir, "vault-token")},
		{"vault.example.com:8200", strings.TrimPrefix(m.vault.Addr, "http://")},
		{"scrape_interval: 30s", "scrape_interval: 1s"},
		{"evaluation_interval: 30s", "evaluation_interval: 1s"},
	} {
		require.Equal(t, 1, strings.Count(config, change[0]), "%q in the example", change[0])
		config = strings.Replace(config, change[0], change[1], 1)
	}
	path := filepath.Join(dir, "prometheus.yml")
	require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "openai-alerts.yml"), []byte(deployed(t, "prometheus", "openai-alerts.yml")), 0o600))
	promtool(t, bin, "check", "config", path)
	prom, err := devenv.StartPrometheus(t.Context(), bin, path, dir)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		samples, err := prom.Query(t.Context(), `up{job="vault-openai"} == 1`)
		return err == nil && len(samples) == 1
	}, time.Minute, 200*time.Millisecond, "no scrape has succeeded")
	return prom
}

func TestPrometheusScrapesThroughVaultAndTheDashboardsQueriesAnswer(t *testing.T) {
	bin := prometheusBin(t)
	m := newMount(t, map[string]any{"tidy_interval": 0})
	prom := m.scraped(bin)
	defer func() { require.NoError(t, prom.Stop()) }()

	m.role("app", "5m", "10m")
	m.write("static-roles/batch", map[string]any{"project_id": m.project, "rotation_period": "1h", "revocation_delay": 0})
	defer func() { // a disable may leave static roles
		_, err := m.client.Logical().Delete(m.path + "/static-roles/batch")
		require.NoError(t, err)
	}()
	// On a busy machine, a scrape can be late or time out. The next one has the value.
	expect := func(want, expr string) {
		t.Helper()
		var samples []devenv.Sample
		var err error
		require.Eventually(t, func() bool {
			samples, err = prom.Query(t.Context(), expr)
			return err == nil && len(samples) == 1 && samples[0].Value[1] == want
		}, time.Minute, 200*time.Millisecond, "%s is not %s: %v", expr, want, lazyMessage(func() []string { return []string{fmt.Sprint(samples, err)} }))
	}
	this := `{mount_point="` + m.path + `/"`
	for round := range 2 { // with a scrape between, since a rate needs a change
		m.traffic()
		expect(strconv.Itoa(round+1), `vault_openai_admin_key_rotations_total`+this+`,outcome="ok"}`)
	}
	expect("1", `up{job="vault-openai"}`)
	expect("4", `vault_openai_credentials_issued_total`+this+`,role="app",outcome="ok"}`)
	expect("2", `vault_openai_credentials_issued_total`+this+`,role="app",outcome="refused"}`)
	expect("2", `vault_openai_credentials_renewed_total`+this+`,role="app",outcome="ok"}`)
	expect("4", `vault_openai_credentials_revoked_total`+this+`,role="app",outcome="ok"}`)
	expect("2", `vault_openai_admin_key_rotations_total`+this+`,outcome="ok"}`)
	expect("3", `vault_openai_static_rotations_total`+this+`,static_role="batch",outcome="ok"}`)
	expect("2", `sum(vault_openai_api_throttled_total`+this+`,by="openai"})`)
	expect("4", `vault_openai_credential_issue_duration_seconds_count`+this+`,outcome="ok"}`)
	expect("1", `vault_openai_build_info`+this+`,version="`+strings.TrimPrefix(plugin.Version, "v")+`"}`)

	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, State string }
		}
	}
	require.Eventually(t, func() bool {
		require.NoError(t, prom.Get(t.Context(), "rules", url.Values{}, &rules))
		for _, r := range rules.Groups[0].Rules {
			if r.Health != "ok" {
				return false
			}
		}
		return len(rules.Groups) == 1 && len(rules.Groups[0].Rules) == strings.Count(deployed(t, "prometheus", "openai-alerts.yml"), "- alert: ")
	}, time.Minute, 200*time.Millisecond, "%+v", &rules)
	for _, r := range rules.Groups[0].Rules {
		require.NotEqual(t, "firing", r.State, r.Name)
	}

	m.overspend(prom)
	m.dashboard(prom)
}

// overspend adds costs to a role's key and waits until the role is blocked.
func (m *mount) overspend(prom *devenv.Prometheus) {
	m.t.Helper()
	m.role("spender", "5m", "10m")
	l := m.creds("spender")
	for _, key := range m.sim.Keys() {
		if key.AccountID == l.account {
			m.sim.AddCost(m.project, key.ID, "gpt-5-mini, input_tokens", m.sim.Now(), "1.5")
		}
	}
	m.write("config", map[string]any{"usage_interval": "5m"}) // the first refresh must have the costs
	m.write("roles/spender", map[string]any{"spend_limit": "1", "spend_action": "block"})
	require.Eventually(m.t, func() bool {
		samples, err := prom.Query(m.t.Context(), `vault_openai_role_blocked{mount_point="`+m.path+`/", role="spender"} == 1`)
		return err == nil && len(samples) == 1
	}, 2*periodicTimeout, 200*time.Millisecond, "the role is not blocked")
	require.NoError(m.t, m.revoke(l))
}

// traffic causes the events that are counted.
func (m *mount) traffic() {
	m.t.Helper()
	m.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/projects/{project_id}/service_accounts", Status: http.StatusTooManyRequests, Times: 1})
	first, second := m.creds("app"), m.creds("app")
	_, err := m.client.Sys().RenewWithContext(m.t.Context(), first.id, 60)
	require.NoError(m.t, err)
	m.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1}) // one retry
	for _, l := range []lease{first, second} {
		require.NoError(m.t, m.revoke(l))
	}
	m.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/projects/{project_id}/service_accounts", Status: http.StatusBadRequest, Times: 1})
	_, err = m.client.Logical().ReadWithContext(m.t.Context(), m.path+"/creds/app")
	require.Error(m.t, err)
	m.read("static-creds/batch")
	m.write("rotate-role/batch", nil)
	m.write("config", map[string]any{"rotation_period": "24h", "rotation_grace_period": "1h"})
	m.write("config/rotate", nil)
	m.write("tidy", map[string]any{"apply": true})
	require.Eventually(m.t, func() bool { return m.read("tidy-status").Data["state"] == "Finished" }, time.Minute, 50*time.Millisecond)
}

// dashboard runs every query of the dashboard.
func (m *mount) dashboard(prom *devenv.Prometheus) {
	t := m.t
	t.Helper()
	var dashboard struct {
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			ID          int
			Type, Title string
			Targets     []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(deployed(t, "grafana", "openai.json")), &dashboard))
	asked, ids := 0, map[int]bool{}
	for _, p := range dashboard.Panels {
		require.False(t, ids[p.ID], "two panels with id %d", p.ID)
		ids[p.ID] = true
		require.Equal(t, p.Type == "row", len(p.Targets) == 0, p.Title)
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$mount_point", m.path+"/", "$__rate_interval", "1m").Replace(target.Expr)
			require.NotContains(t, expr, "$", p.Title)
			samples := query(t, prom, expr)
			some := false
			for _, s := range samples {
				some = some || s.Value[1] != "NaN"
			}
			require.True(t, some, "%s: only NaN from %s", p.Title, expr)
			t.Logf("%s: %d series, the first %v %v", p.Title, len(samples), samples[0].Metric, samples[0].Value[1])
			asked++
		}
	}
	require.Greater(t, asked, 30)
	// An existing metric fills the list of mounts.
	definition := dashboard.Templating.List[1].Definition
	metric, label, found := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(definition, "label_values("), ")"), ", ")
	require.True(t, found, definition)
	require.Equal(t, m.path+"/", query(t, prom, "group by ("+label+") ("+metric+")")[0].Metric["mount_point"])
}

// query returns the samples of a query, at least one. After a scrape that timed out, there
// are none until the next.
func query(t *testing.T, prom *devenv.Prometheus, expr string) (samples []devenv.Sample) {
	t.Helper()
	require.Eventually(t, func() bool {
		var err error
		samples, err = prom.Query(t.Context(), expr)
		return err == nil && len(samples) > 0
	}, time.Minute, 200*time.Millisecond, "no samples: %s", expr)
	return samples
}

// TestTheDashboardIsDrawn draws docs/dashboard.png if DRAW_DASHBOARD names the file: a
// real Prometheus scrapes a real Vault during seven minutes of load, with a rate limit
// and an outage of OpenAI, and tools/plot draws the results of the dashboard's queries.
func TestTheDashboardIsDrawn(t *testing.T) {
	picture := os.Getenv("DRAW_DASHBOARD")
	if picture == "" {
		t.Skip("draws docs/dashboard.png in ten minutes if DRAW_DASHBOARD names the file")
	}
	root, err := devenv.Root()
	require.NoError(t, err)
	if !filepath.IsAbs(picture) {
		picture = filepath.Join(root, picture)
	}
	bin := prometheusBin(t)
	m := newMount(t, map[string]any{"tidy_interval": 0, "rotation_period": "720h"})
	m.sim.Configure(func(o *openaitest.Options) { o.Latency, o.ActivationDelay = 40*time.Millisecond, 150*time.Millisecond })
	roles := []string{"app", "ci", "agent"}
	for _, role := range roles {
		m.role(role, "5m", "10m")
	}
	m.write("static-roles/batch", map[string]any{"project_id": m.project, "rotation_period": "1h", "revocation_delay": 0})
	defer func() { // a disable may leave static roles
		_, err := m.client.Logical().Delete(m.path + "/static-roles/batch")
		require.NoError(t, err)
	}()
	prom := m.scraped(bin)
	defer func() { require.NoError(t, prom.Stop()) }()

	const length = 7 * time.Minute
	begin := time.Now()
	ctx, cancel := context.WithDeadline(t.Context(), begin.Add(length))
	defer cancel()
	var work sync.WaitGroup
	for i, role := range roles {
		work.Go(func() { m.live(ctx, role, time.Duration(400+300*i)*time.Millisecond) })
	}
	at := func(after time.Duration, do func()) {
		work.Go(func() {
			select {
			case <-time.After(time.Until(begin.Add(after))):
				do()
			case <-ctx.Done():
			}
		})
	}
	accounts := "/organization/projects/{project_id}/service_accounts"
	at(50*time.Second, func() {
		end := m.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: accounts, Status: http.StatusTooManyRequests, Probability: 0.2})
		time.AfterFunc(15*time.Second, end)
	})
	at(110*time.Second, func() {
		end := m.sim.Fail(openaitest.Fault{Status: http.StatusServiceUnavailable})
		time.AfterFunc(45*time.Second, end)
	})
	for _, after := range []time.Duration{30 * time.Second, 200 * time.Second} {
		at(after, func() {
			m.write("config/rotate", nil)
			m.write("rotate-role/batch", nil)
			m.write("tidy", map[string]any{"apply": true})
		})
	}
	work.Wait()

	const rows = "65" // of the grid; the panels below show static roles and versions
	cmd := exec.CommandContext(t.Context(), "go", "run", ".", "-prometheus", prom.Addr, "-dashboard", filepath.Join(root, "deploy", "grafana", "openai.json"),
		"-start", strconv.FormatInt(begin.Unix(), 10), "-end", strconv.FormatInt(begin.Add(length).Unix(), 10),
		"-set", "mount_point="+m.path+"/", "-rename", m.path+"/=openai/", "-rows", rows, "-out", picture)
	cmd.Dir = filepath.Join(root, "tools", "plot")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	info, err := os.Stat(picture)
	require.NoError(t, err)
	require.Less(t, info.Size(), int64(300<<10))
}

// live uses a role as programs do, until the context ends: leases, renewals and
// revocations, some of which fail in an outage.
func (m *mount) live(ctx context.Context, role string, pause time.Duration) {
	var held []string
	for ctx.Err() == nil {
		if secret, err := m.client.Logical().ReadWithContext(ctx, m.path+"/creds/"+role); err == nil && secret != nil {
			held = append(held, secret.LeaseID)
		}
		if len(held) > 4 {
			_, _ = m.client.Sys().RenewWithContext(ctx, held[1], 60)
			_ = m.client.Sys().RevokeWithContext(ctx, held[0])
			held = held[1:]
		}
		_, _ = m.client.Logical().ReadWithContext(ctx, m.path+"/static-creds/batch")
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}
