package openaisecrets

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/metrics"
)

// series are values by name and labels in the Prometheus format; the value of a histogram
// is its count.
type series map[string]float64

// of returns the series of a name without prefix, with any labels.
func (s series) of(name string) series {
	found := series{}
	for key, value := range s {
		if strings.HasPrefix(key, metrics.Prefix+name+"{") {
			found[key] = value
		}
	}
	return found
}

// one returns a series by its name without prefix and its labels.
func (s series) one(t *testing.T, key string) float64 {
	t.Helper()
	if !strings.Contains(key, "{") {
		key += "{}"
	}
	require.Contains(t, s, metrics.Prefix+key)
	return s[metrics.Prefix+key]
}

// routeStaticKeys is the route that creates the next key of a static role.
const routeStaticKeys = "/organization/projects/{project_id}/service_accounts/{service_account_id}/api_keys"

func TestMetrics_EveryDocumentedMetricExistsAndChanges(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.sim.KeepAll()
	values := map[string]map[string]bool{} // all values seen, by metric
	look := func() series {
		now := h.measured()
		for _, d := range h.b.metrics.All {
			if values[d.Name] == nil {
				values[d.Name] = map[string]bool{}
			}
			values[d.Name][fmt.Sprint(now.of(strings.TrimPrefix(d.Name, metrics.Prefix)))] = true
		}
		return now
	}
	look()

	// Leases.
	h.configure(map[string]any{"tidy_interval": 0})
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	flying := 0.0
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Kind: openaitest.FaultSlow, Times: 1, OnStrike: func(*http.Request) {
		flying = look().one(t, "api_requests_in_flight")
	}})
	first := h.lease("creds/app", nil)
	require.Equal(t, 1.0, flying)
	_, err := h.end(logical.RenewOperation, first)
	require.NoError(t, err)
	require.NoError(t, h.revoke(first))
	second := h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Status: http.StatusTooManyRequests, Times: 1})
	third := h.lease("creds/app", nil)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Status: http.StatusBadRequest, Times: 1})
	h.refused(h.read("creds/app"))
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Kind: openaitest.FaultReset, Times: 1})
	fourth := h.lease("creds/app", nil)
	now := look()
	require.Equal(t, 4.0, now.one(t, `credentials_issued_total{outcome="ok",role="app"}`))
	require.Equal(t, 1.0, now.one(t, `credentials_issued_total{outcome="refused",role="app"}`))
	require.Equal(t, 1.0, now.one(t, `credentials_renewed_total{outcome="ok",role="app"}`))
	require.Equal(t, 1.0, now.one(t, `credentials_revoked_total{outcome="ok",role="app"}`))
	require.Equal(t, 4.0, now.one(t, `credential_issue_duration_seconds{outcome="ok"}`))
	require.Equal(t, 4.0, now.one(t, `key_activation_seconds{outcome="ok"}`))
	require.Equal(t, 4.0, now.one(t, `api_requests_total{call="create_service_account",status="2xx"}`))
	require.Equal(t, 2.0, now.one(t, `api_requests_total{call="create_service_account",status="4xx"}`))
	require.Equal(t, 1.0, now.one(t, `api_requests_total{call="create_service_account",status="none"}`))
	require.Equal(t, 7.0, now.one(t, `api_request_duration_seconds{call="create_service_account"}`))
	require.Equal(t, 7.0, now.one(t, `api_wait_seconds{call="create_service_account"}`))
	require.Equal(t, 2.0, now.one(t, `api_retries_total{call="create_service_account"}`))
	require.Equal(t, 1.0, now.one(t, `api_throttled_total{by="openai",call="create_service_account"}`))

	for _, l := range []*logical.Response{third, fourth} {
		require.NoError(t, h.revoke(l))
	}

	// The WAL: an account that the reset may have created, and a failed revocation.
	heal := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: deleteAccountRoute})
	require.Error(t, h.revoke(second))
	h.advance(time.Minute)
	h.runPeriodicWork()
	now = look()
	require.Equal(t, 1.0, now.one(t, `credentials_revoked_total{outcome="error",role="app"}`))
	require.Equal(t, 1.0, now.one(t, "wal_entries"))
	require.InDelta(t, 60, now.one(t, "wal_oldest_entry_age_seconds"), 30)
	require.NotZero(t, now.one(t, `api_retries_total{call="delete_service_account"}`))
	heal()
	h.runPeriodicWork()
	now = look()
	require.Zero(t, now.one(t, "wal_entries"))
	require.Zero(t, now.one(t, "wal_oldest_entry_age_seconds"))
	require.Equal(t, 1.0, now.one(t, `wal_entries_processed_total{outcome="error"}`))
	require.Equal(t, 2.0, now.one(t, `wal_entries_processed_total{outcome="ok"}`))

	// Costs.
	h.sim.AddCost(h.project, first.Data["api_key_id"].(string), "gpt-6, input_tokens", h.now(), "2")
	h.sim.AddCost(h.project, "key_of_a_person", "gpt-6, input_tokens", h.now(), "1")
	h.must(h.write("config", map[string]any{"usage_interval": "5m"}))
	h.rollback()
	now = look()
	require.Equal(t, 2.0, now.one(t, `role_cost_usd{role="app",window="day"}`))
	require.Equal(t, 1.0, now.one(t, `usage_unattributed_usd{window="month"}`))
	require.Equal(t, 3.0, now.one(t, `usage_total_usd{window="month"}`))
	h.must(h.write("roles/app", map[string]any{"spend_limit": "2", "spend_action": "block"}))
	h.rollback()
	require.Equal(t, 1.0, look().one(t, `role_blocked{role="app"}`))
	h.must(h.write("roles/app", map[string]any{"spend_limit": ""}))
	h.rollback()
	require.Empty(t, look().of("role_blocked"))

	// A WAL entry whose key is used.
	used := h.lease("creds/app", nil)
	id, err := h.b.beginWAL(t.Context(), h.storage, walAccount, credential{Version: 1, Type: typeAccount, ProjectID: h.project, Name: used.Data["service_account"].(string), CreatedAt: h.now()})
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(time.Hour)
	require.Equal(t, 200, h.inference(used, http.MethodGet, "/models"))
	h.runPeriodicWork()
	now = look()
	require.Equal(t, 1.0, now.one(t, "wal_entries_retained"))
	require.Zero(t, now.one(t, "wal_entries"))
	require.NoError(t, h.revoke(used))

	// Pools.
	h.must(h.write("roles/pooled", map[string]any{"project_id": h.project, "pool_size": 2, "pool_max_age": "1h"}))
	h.fill()
	release := h.holdPools()
	require.Equal(t, 2.0, look().one(t, `pool_ready{role="pooled"}`))
	pooled := []*logical.Response{h.lease("creds/pooled", nil), h.lease("creds/pooled", nil), h.lease("creds/pooled", nil)}
	release()
	h.fill()
	h.advance(61 * time.Minute)
	h.fill()
	now = look()
	require.Equal(t, 2.0, now.one(t, `pool_taken_total{role="pooled"}`))
	require.Equal(t, 1.0, now.one(t, `pool_missed_total{reason="empty",role="pooled"}`))
	require.Equal(t, 2.0, now.one(t, `pool_destroyed_total{reason="aged"}`))
	require.Zero(t, now.one(t, `pool_destroyed_total{reason="changed"}`))
	h.must(h.remove("roles/pooled"))
	for _, lease := range pooled {
		require.NoError(t, h.revoke(lease))
	}
	h.settlePools()
	h.runPeriodicWork()
	look()

	// Static roles.
	ctx, work := t.Context(), h.runStaticWorker
	work()
	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_period": "24h", "revocation_delay": "1h"}))
	require.NoError(t, h.b.static.worker.End(ctx))
	h.must(h.read("static-creds/batch"))
	now = look()
	require.Equal(t, 1.0, now.one(t, "static_roles"))
	require.Zero(t, now.one(t, "static_role_lag_seconds"))
	require.Equal(t, 1.0, now.one(t, `static_credentials_read_total{outcome="ok",static_role="batch"}`))
	require.Equal(t, 1.0, now.one(t, `static_rotations_total{outcome="ok",static_role="batch"}`))
	h.advance(25 * time.Hour)
	require.InDelta(t, 3600, look().one(t, "static_role_lag_seconds"), 60)
	heal = h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeStaticKeys, Status: http.StatusForbidden})
	work()
	now = look()
	require.Equal(t, 1.0, now.one(t, "static_roles_failing"))
	require.Equal(t, 1.0, now.one(t, `static_rotations_total{outcome="error",static_role="batch"}`))
	heal()
	h.advance(time.Hour)
	work()
	h.advance(2 * time.Hour)
	work()
	now = look()
	require.Zero(t, now.one(t, "static_roles_failing"))
	require.Zero(t, now.one(t, "static_role_lag_seconds"))
	require.Equal(t, 2.0, now.one(t, `static_rotations_total{outcome="ok",static_role="batch"}`))
	require.Equal(t, 1.0, now.one(t, `static_keys_revoked_total{outcome="ok",static_role="batch"}`))

	h.check()
	h.byHand("batch", missingKey)
	h.advance(checkEvery)
	h.check()
	h.advance(confirmAfterFirst)
	h.check()
	now = look()
	require.Equal(t, 1.0, now.one(t, `static_missing_total{missing="api_key",static_role="batch"}`))
	require.Equal(t, 1.0, now.one(t, "static_roles_missing"))
	work()
	require.Zero(t, look().one(t, "static_roles_missing"), "the rotation replaces the key")

	// The admin key.
	require.Empty(t, now.of("admin_key_next_rotation_timestamp_seconds"))
	require.Empty(t, now.of("admin_key_expiry_timestamp_seconds"))
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.must(h.write("config/rotate", nil))
	now = look()
	require.Equal(t, 1.0, now.one(t, `admin_key_rotations_total{outcome="ok"}`))
	require.Zero(t, now.one(t, `admin_key_rotations_total{outcome="error"}`))
	require.Equal(t, 1.0, now.one(t, "admin_keys_superseded"))
	require.InDelta(t, float64(h.now().Unix()), now.one(t, "admin_key_last_rotation_timestamp_seconds"), 60)
	require.InDelta(t, float64(h.now().Add(24*time.Hour).Unix()), now.one(t, "admin_key_next_rotation_timestamp_seconds"), 60)
	require.InDelta(t, float64(h.now().Add(7*24*time.Hour).Unix()), now.one(t, "admin_key_expiry_timestamp_seconds"), 60)
	heal = h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: http.StatusForbidden})
	h.advance(25 * time.Hour)
	h.runPeriodicWork()
	heal()
	now = look()
	require.Equal(t, 1.0, now.one(t, "admin_key_rotation_failing"))
	require.Equal(t, 1.0, now.one(t, `admin_key_rotations_total{outcome="error"}`))

	// Tidy.
	require.Empty(t, now.of("tidy_orphans"))
	h.orphan()
	heal = h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: deleteAccountRoute, Status: http.StatusForbidden})
	h.tidy(true)
	heal()
	h.tidy(true)
	now = look()
	require.Equal(t, 1.0, now.one(t, "tidy_orphans"))
	require.Equal(t, 1.0, now.one(t, "tidy_deleted_total"))
	require.Equal(t, 1.0, now.one(t, "tidy_failed_total"))
	require.Equal(t, 1.0, now.one(t, `tidy_runs_total{apply="true",state="Finished"}`))
	require.InDelta(t, float64(h.now().Unix()), now.one(t, "tidy_last_end_timestamp_seconds"), 60)

	for name, seen := range values {
		if name == metrics.Prefix+"build_info" {
			require.NotEqual(t, "map[]", strings.Join(slices.Collect(maps.Keys(seen)), ""), name)
			continue
		}
		require.Greater(t, len(seen), 1, "%s never changed: %v", name, seen)
	}
}

func TestMetrics_PrometheusTextIsValidAndNamesTheMount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.lease("creds/app", nil)
	resp := h.must(h.do(t.Context(), logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"}))
	require.Equal(t, "text/plain; version=0.0.4; charset=utf-8", strings.Split(resp.Data[logical.HTTPContentType].(string), "; escaping")[0])
	require.Equal(t, http.StatusOK, resp.Data[logical.HTTPStatusCode])
	text := string(resp.Data[logical.HTTPRawBody].([]byte))
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	require.NoError(t, err)
	for _, f := range families {
		require.NotEmpty(t, f.GetHelp(), f.GetName())
		for _, one := range f.GetMetric() {
			require.True(t, slices.ContainsFunc(one.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == "mount_point" }), f.GetName())
		}
	}
	require.Contains(t, text, `vault_openai_credentials_issued_total{mount_point="openai/",outcome="ok",role="app"} 1`)
	require.Contains(t, text, `vault_openai_api_request_duration_seconds_bucket{call="create_service_account",mount_point="openai/",le="+Inf"} 1`)
	// No secrets and no unbounded values.
	for _, secret := range h.sim.Secrets() {
		require.NotContains(t, text, secret)
	}
	for _, field := range []string{"api_key_id", "service_account", "service_account_id", "project_id"} {
		require.NotContains(t, text, lease.Data[field].(string))
	}

	require.Contains(t, h.refused(h.do(t.Context(), logical.ReadOperation, "metrics", map[string]any{"format": "xml"})), `must be "json" or "prometheus"`)
	require.NoError(t, h.revoke(lease))
}

func TestMetrics_AvailableWithoutAConfigAndStorage(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	now := h.measured()
	require.Equal(t, 1.0, now.one(t, fmt.Sprintf(`build_info{go_version=%q,version=%q}`, runtime.Version(), strings.TrimPrefix(version, "v"))))
	require.Empty(t, now.of("admin_key_last_rotation_timestamp_seconds"), "unknown values are omitted")
	require.Empty(t, now.of("static_roles"))

	resp, err := h.b.metricsRead(t.Context(), &logical.Request{Storage: &watchedStorage{Storage: h.storage, get: func(string) error { return errStorage }}, MountPoint: "openai/"}, &framework.FieldData{Schema: h.b.pathMetrics().Fields})
	h.must(resp, err)
	require.Contains(t, h.log.String(), "admin key metrics unavailable")
}

func TestMetrics_MountsOfOneProcessAreSeparate(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	other := h.anotherMount()
	lease := h.lease("creds/app", nil)
	require.Equal(t, 1.0, h.measured().one(t, `credentials_issued_total{outcome="ok",role="app"}`))
	require.Empty(t, other.measured().of("credentials_issued_total"))
	require.NoError(t, h.revoke(lease))
}

func TestMetrics_ReadsHaveNoSideEffects(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	calls := len(h.sim.Requests())
	h.storage.fail(storageFault{write: 0})
	counting := &watchedStorage{Storage: h.storage}
	for range 3 {
		_, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "metrics", Storage: counting, MountPoint: "openai/"})
		require.NoError(t, err)
	}
	require.Empty(t, h.storage.last())
	require.Zero(t, counting.reads.Load())
	require.Len(t, h.sim.Requests(), calls)
}

func TestMetrics_RoleLabelsAreBounded(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for i := range 1000 {
		h.b.metrics.Issued(fmt.Sprintf("role-%d", i), metrics.OK, time.Second)
	}
	now := h.measured()
	require.Len(t, now.of("credentials_issued_total"), metrics.DefaultMaxRoles+1)
	require.Equal(t, 900.0, now.one(t, `credentials_issued_total{outcome="ok",role="_other"}`))
	require.Equal(t, 1.0, now.one(t, `credentials_issued_total{outcome="ok",role="role-99"}`))

	// A role that does not exist has no label.
	h.refused(h.read("creds/no-such-role"))
	require.Len(t, h.measured().of("credentials_issued_total"), metrics.DefaultMaxRoles+1)
}

func TestMetrics_OutcomesDistinguishClientAndUpstreamErrors(t *testing.T) {
	t.Parallel()
	for want, end := range map[string]struct {
		resp *logical.Response
		err  error
	}{
		metrics.OK:        {nil, nil},
		metrics.Refused:   {logical.ErrorResponse("no"), nil},
		metrics.Throttled: {nil, logical.CodedError(http.StatusTooManyRequests, "slowly")},
		metrics.Cancelled: {nil, fmt.Errorf("gone: %w", context.Canceled)},
		metrics.Failed:    {nil, errStorage},
	} {
		require.Equal(t, want, outcome(end.resp, end.err))
	}
	require.Equal(t, metrics.Refused, outcome(nil, clientError("no")))
}

// listen starts a UDP server.
func listen(t *testing.T) (addr string, heard func(want ...string) string) {
	t.Helper()
	conn, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() }) // an error here does not matter
	var all strings.Builder
	return conn.LocalAddr().String(), func(want ...string) string {
		t.Helper()
		packet := make([]byte, 1<<16)
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(20*time.Second)))
		for slices.ContainsFunc(want, func(w string) bool { return !regexp.MustCompile("(?m)^" + w).MatchString(all.String()) }) {
			n, _, err := conn.ReadFrom(packet)
			require.NoError(t, err, "not received: %q in\n%s", want, all.String())
			all.Write(packet[:n])
			all.WriteByte('\n')
		}
		return all.String()
	}
}

func TestMetrics_PushToStatsdAndDogstatsd(t *testing.T) {
	t.Parallel()
	statsd, heardPlain := listen(t)
	dogstatsd, heardTagged := listen(t)
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	env := map[string]string{metrics.EnvStatsd: statsd, metrics.EnvDogstatsd: dogstatsd, metrics.EnvMaxRoles: "1"}
	require.NoError(t, h.b.metrics.Configure(func(name string) string { return env[name] }))
	lease := h.lease("creds/app", nil)
	h.must(h.write("roles/b", map[string]any{"project_id": h.project}))
	other := h.lease("creds/b", nil)
	require.NoError(t, h.revoke(lease))
	require.NoError(t, h.revoke(other))
	h.must(h.write("config/rotate", nil))
	h.rollback()

	text := heardPlain(
		`vault\.openai\.credentials_issued\.openai\.app\.ok:1\.0+\|c`,
		`vault\.openai\.credentials_issued\.openai\._other\.ok:1\.0+\|c`,
		`vault\.openai\.credentials_revoked\.openai\.app\.ok:1\.0+\|c`,
		`vault\.openai\.api_request_duration\.openai\.create_service_account:\d+\.\d+\|ms`,
		`vault\.openai\.wal_entries\.openai:0\.0+\|g`,
		`vault\.openai\.admin_key_last_rotation_timestamp_seconds\.openai:`+fmt.Sprint(h.now().Unix()/1000)+`\d{3}\.0+\|g`,
	)
	tagged := heardTagged(
		`vault\.openai\.credentials_issued:1\|c\|#mount_point:openai/,role:app,outcome:ok$`,
		`vault\.openai\.credentials_revoked:1\|c\|#mount_point:openai/,role:app,outcome:ok$`,
		`vault\.openai\.api_request_duration:\d+\.\d+\|ms\|#mount_point:openai/,call:create_service_account$`,
		`vault\.openai\.wal_entries:0(\.0+)?\|g\|#mount_point:openai/$`,
		`vault\.openai\.admin_key_last_rotation_timestamp_seconds:`+fmt.Sprint(h.now().Unix()/1000)+`\d{3}(\.0+)?\|g\|#mount_point:openai/$`,
	)
	for _, secret := range h.sim.Secrets() {
		require.NotContains(t, text+tagged, secret)
	}

	// After the cleanup, counting has no effect.
	h.b.Cleanup(t.Context())
	h.b.metrics.Rotated(metrics.OK)
}

// The tables of the page match the code. UPDATE_DOCS=1 writes them.
func TestMetrics_TheDocumentationNamesThemAll(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	all := metrics.New(tidyFinished, tidyError, tidyCancelled).All
	for _, kind := range []string{"counter", "gauge", "histogram"} {
		fmt.Fprintf(&table, "\n### %ss\n\n", strings.ToUpper(kind[:1])+kind[1:])
		for _, d := range all {
			if d.Kind != kind {
				continue
			}
			labels := ""
			if len(d.Labels) > 0 {
				labels = " (`" + strings.Join(d.Labels, "`, `") + "`)"
			}
			fmt.Fprintf(&table, "- `%s`%s: %s\n", d.Name, labels, d.Help)
			// The page's rule for statsd names.
			pushed := strings.TrimSuffix(d.Name, map[string]string{"counter": "_total", "gauge": "", "histogram": "_seconds"}[kind])
			require.Equal(t, "vault.openai."+strings.TrimPrefix(pushed, metrics.Prefix), d.PushedName())
		}
	}
	table.WriteString("\n")
	const start, end = "<!-- metrics: written by UPDATE_DOCS=1 go test -run TheDocumentationNamesThemAll . -->\n", "<!-- end -->"
	path := filepath.Join("docs", "metrics.md")
	page, err := os.ReadFile(path)
	require.NoError(t, err)
	before, rest, found := strings.Cut(string(page), start)
	require.True(t, found)
	_, after, found := strings.Cut(rest, end)
	require.True(t, found)
	want := before + start + table.String() + end + after
	if os.Getenv("UPDATE_DOCS") != "" {
		require.NoError(t, os.WriteFile(path, []byte(want), 0o644))
		return
	}
	requireSameLines(t, path, "UPDATE_DOCS=1 go test -run TheDocumentationNamesThemAll .", want, string(page))
	for _, o := range metrics.Outcomes {
		require.Contains(t, want, "`"+o+"`", "outcome")
	}
	for _, env := range []string{metrics.EnvStatsd, metrics.EnvDogstatsd, metrics.EnvMaxRoles} {
		require.Contains(t, want, env)
	}
}

// A superseded key that cannot be deleted counts as overdue.
func TestMetrics_AnUndeletedSupersededKeyIsOverdue(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "24h", "revocation_delay": "1h"})
	h.must(h.write("rotate-role/batch", nil))
	h.sim.Fail(openaitest.Fault{Route: routeKey, Status: http.StatusForbidden})
	for range 4 {
		h.advance(time.Hour)
		h.runStaticWorker()
	}
	require.Greater(t, h.measured().one(t, "static_role_lag_seconds"), 2.5*3600)
	h.sim.ClearFaults()
	h.advance(time.Hour)
	h.runStaticWorker()
	require.Zero(t, h.measured().one(t, "static_role_lag_seconds"))
	h.deleteStaticRole("batch")
}
