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
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// series are values by name and labels, as Prometheus writes them; those of a
// histogram are its counts.
type series map[string]float64

// measured reads the mount's metrics as JSON.
func (h *harness) measured() series {
	h.t.Helper()
	all := series{}
	resp := h.must(h.read("metrics"))
	for kind, field := range map[string]string{"counters": "value", "gauges": "value", "histograms": "count"} {
		for _, raw := range resp.Data[kind].([]any) {
			item := raw.(map[string]any)
			var labels []string
			for name, value := range item["labels"].(map[string]any) {
				labels = append(labels, fmt.Sprintf("%s=%q", name, value))
			}
			slices.Sort(labels)
			value, isFloat := item[field].(float64)
			if !isFloat {
				value = float64(item[field].(uint64))
			}
			all[item["name"].(string)+"{"+strings.Join(labels, ",")+"}"] = value
		}
	}
	return all
}

// of returns what is there under a name, without prefix, whatever its labels.
func (s series) of(name string) series {
	found := series{}
	for key, value := range s {
		if strings.HasPrefix(key, metricPrefix+name+"{") {
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
	require.Contains(t, s, metricPrefix+key)
	return s[metricPrefix+key]
}

// routeStaticKeys is where a static role's next key is made.
const routeStaticKeys = "/organization/projects/{project_id}/service_accounts/{service_account_id}/api_keys"

func TestMetrics_EveryDocumentedOneExistsAndMoves(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.sim.KeepAll()
	values := map[string]map[string]bool{} // by metric all that was seen of it
	look := func() series {
		now := h.measured()
		for _, d := range h.b.metrics.all {
			if values[d.name] == nil {
				values[d.name] = map[string]bool{}
			}
			values[d.name][fmt.Sprint(now.of(strings.TrimPrefix(d.name, metricPrefix)))] = true
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

	// The journal: what the reset may have made, and a revoke that fails.
	heal := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: deleteAccountRoute})
	require.Error(t, h.revoke(second))
	h.advance(time.Minute)
	h.tick()
	now = look()
	require.Equal(t, 1.0, now.one(t, `credentials_revoked_total{outcome="error",role="app"}`))
	require.Equal(t, 1.0, now.one(t, "journal_entries"))
	require.InDelta(t, 60, now.one(t, "journal_oldest_entry_age_seconds"), 30)
	require.NotZero(t, now.one(t, `api_retries_total{call="delete_service_account"}`))
	heal()
	h.tick()
	now = look()
	require.Zero(t, now.one(t, "journal_entries"))
	require.Zero(t, now.one(t, "journal_oldest_entry_age_seconds"))
	require.Equal(t, 1.0, now.one(t, `journal_entries_worked_total{outcome="error"}`))
	require.Equal(t, 2.0, now.one(t, `journal_entries_worked_total{outcome="ok"}`))

	// An entry whose key is used.
	used := h.lease("creds/app", nil)
	id, err := h.b.beginWAL(t.Context(), h.storage, journalAccount, credential{Version: 1, Type: typeAccount, ProjectID: h.project, Name: used.Data["service_account"].(string), CreatedAt: h.now()})
	require.NoError(t, err)
	h.b.wal.release(id)
	h.advance(time.Hour)
	require.Equal(t, 200, h.inference(used, http.MethodGet, "/models"))
	h.tick()
	now = look()
	require.Equal(t, 1.0, now.one(t, "journal_entries_kept"))
	require.Zero(t, now.one(t, "journal_entries"))
	require.NoError(t, h.revoke(used))

	// Static roles.
	ctx, keep := t.Context(), h.keep
	keep()
	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_period": "24h", "revocation_delay": "1h"}))
	require.NoError(t, h.b.static.pass.End(ctx))
	h.must(h.read("static-creds/batch"))
	now = look()
	require.Equal(t, 1.0, now.one(t, "static_roles"))
	require.Zero(t, now.one(t, "static_role_lag_seconds"))
	require.Equal(t, 1.0, now.one(t, `static_credentials_read_total{outcome="ok",static_role="batch"}`))
	require.Equal(t, 1.0, now.one(t, `static_rotations_total{outcome="ok",static_role="batch"}`))
	h.advance(25 * time.Hour)
	require.InDelta(t, 3600, look().one(t, "static_role_lag_seconds"), 60)
	heal = h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeStaticKeys, Status: http.StatusForbidden})
	keep()
	now = look()
	require.Equal(t, 1.0, now.one(t, "static_roles_failing"))
	require.Equal(t, 1.0, now.one(t, `static_rotations_total{outcome="error",static_role="batch"}`))
	heal()
	h.advance(time.Hour)
	keep()
	h.advance(2 * time.Hour)
	keep()
	now = look()
	require.Zero(t, now.one(t, "static_roles_failing"))
	require.Zero(t, now.one(t, "static_role_lag_seconds"))
	require.Equal(t, 2.0, now.one(t, `static_rotations_total{outcome="ok",static_role="batch"}`))
	require.Equal(t, 1.0, now.one(t, `static_keys_revoked_total{outcome="ok",static_role="batch"}`))

	// The admin key.
	require.Empty(t, now.of("admin_key_next_rotation_timestamp_seconds"))
	require.Empty(t, now.of("admin_key_expiry_timestamp_seconds"))
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.must(h.write("config/rotate", nil))
	now = look()
	require.Equal(t, 1.0, now.one(t, `admin_key_rotations_total{outcome="ok"}`))
	require.Zero(t, now.one(t, `admin_key_rotations_total{outcome="error"}`))
	require.Equal(t, 1.0, now.one(t, "admin_keys_retired"))
	require.InDelta(t, float64(h.now().Unix()), now.one(t, "admin_key_last_rotation_timestamp_seconds"), 60)
	require.InDelta(t, float64(h.now().Add(24*time.Hour).Unix()), now.one(t, "admin_key_next_rotation_timestamp_seconds"), 60)
	require.InDelta(t, float64(h.now().Add(7*24*time.Hour).Unix()), now.one(t, "admin_key_expiry_timestamp_seconds"), 60)
	heal = h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: http.StatusForbidden})
	h.advance(25 * time.Hour)
	h.tick()
	heal()
	now = look()
	require.Equal(t, 1.0, now.one(t, "admin_key_rotation_failing"))
	require.Equal(t, 1.0, now.one(t, `admin_key_rotations_total{outcome="error"}`))

	// The sweep.
	require.Empty(t, now.of("sweep_orphans"))
	h.orphan()
	heal = h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: deleteAccountRoute, Status: http.StatusForbidden})
	h.tidy(true)
	heal()
	h.tidy(true)
	now = look()
	require.Equal(t, 1.0, now.one(t, "sweep_orphans"))
	require.Equal(t, 1.0, now.one(t, "sweep_deleted_total"))
	require.Equal(t, 1.0, now.one(t, "sweep_failed_total"))
	require.Equal(t, 1.0, now.one(t, `sweeps_total{apply="true",state="Finished"}`))
	require.InDelta(t, float64(h.now().Unix()), now.one(t, "sweep_last_end_timestamp_seconds"), 60)

	for name, seen := range values {
		if name == metricPrefix+"build_info" {
			require.NotEqual(t, "map[]", strings.Join(slices.Collect(maps.Keys(seen)), ""), name)
			continue
		}
		require.Greater(t, len(seen), 1, "%s has never moved: %v", name, seen)
	}
}

func TestMetrics_PrometheusTextIsValidAndTellsTheMount(t *testing.T) {
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
	// Neither what is secret nor what is without bound.
	for _, secret := range h.sim.Secrets() {
		require.NotContains(t, text, secret)
	}
	for _, field := range []string{"api_key_id", "service_account", "service_account_id", "project_id"} {
		require.NotContains(t, text, lease.Data[field].(string))
	}

	require.Contains(t, h.refused(h.do(t.Context(), logical.ReadOperation, "metrics", map[string]any{"format": "xml"})), "json or prometheus")
	require.NoError(t, h.revoke(lease))
}

func TestMetrics_AreThereWithoutAConfigAndWithoutStorage(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	now := h.measured()
	require.Equal(t, 1.0, now.one(t, fmt.Sprintf(`build_info{go_version=%q,version=%q}`, runtime.Version(), strings.TrimPrefix(version, "v"))))
	require.Empty(t, now.of("admin_key_last_rotation_timestamp_seconds"), "what is not known is not said")
	require.Empty(t, now.of("static_roles"))

	resp, err := h.b.metricsRead(t.Context(), &logical.Request{Storage: failingReads{h.storage}, MountPoint: "openai/"}, &framework.FieldData{Schema: h.b.pathMetrics().Fields})
	h.must(resp, err)
	require.Contains(t, h.log.String(), "metrics are without what the config tells")
}

func TestMetrics_MountsOfOneProcessAreKeptApart(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	other := h.anotherMount()
	lease := h.lease("creds/app", nil)
	require.Equal(t, 1.0, h.measured().one(t, `credentials_issued_total{outcome="ok",role="app"}`))
	require.Empty(t, other.measured().of("credentials_issued_total"))
	require.NoError(t, h.revoke(lease))
}

func TestMetrics_ReadingThemCallsNobodyAndWritesNothing(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	calls := len(h.sim.Requests())
	h.storage.fail(storageFault{write: 0})
	counting := &countedReads{Storage: h.storage}
	for range 3 {
		_, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "metrics", Storage: counting, MountPoint: "openai/"})
		require.NoError(t, err)
	}
	require.Empty(t, h.storage.last())
	require.Zero(t, counting.reads.Load())
	require.Len(t, h.sim.Requests(), calls)
}

// countedReads counts the reads of storage.
type countedReads struct {
	logical.Storage
	reads atomic.Int64
}

func (c *countedReads) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	c.reads.Add(1)
	return c.Storage.Get(ctx, key)
}

func (c *countedReads) List(ctx context.Context, prefix string) ([]string, error) {
	c.reads.Add(1)
	return c.Storage.List(ctx, prefix)
}

// failingReads is storage that cannot be read.
type failingReads struct{ logical.Storage }

func (failingReads) Get(context.Context, string) (*logical.StorageEntry, error) {
	return nil, errStorage
}

func TestMetrics_AThousandRolesAreAHundredLabels(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for i := range 1000 {
		h.b.metrics.issue(t.Context(), fmt.Sprintf("role-%d", i), time.Now(), nil, nil)
	}
	now := h.measured()
	require.Len(t, now.of("credentials_issued_total"), defaultMaxRoles+1)
	require.Equal(t, 900.0, now.one(t, `credentials_issued_total{outcome="ok",role="_other"}`))
	require.Equal(t, 1.0, now.one(t, `credentials_issued_total{outcome="ok",role="role-99"}`))

	// One that does not exist has none.
	h.refused(h.read("creds/no-such-role"))
	require.Len(t, h.measured().of("credentials_issued_total"), defaultMaxRoles+1)
}

func TestMetrics_OutcomesSayWhoseFaultItWas(t *testing.T) {
	t.Parallel()
	for want, end := range map[string]struct {
		resp *logical.Response
		err  error
	}{
		outcomeOK:        {nil, nil},
		outcomeRefused:   {logical.ErrorResponse("no"), nil},
		outcomeThrottled: {nil, logical.CodedError(http.StatusTooManyRequests, "slowly")},
		outcomeCancelled: {nil, fmt.Errorf("gone: %w", context.Canceled)},
		outcomeError:     {nil, errStorage},
	} {
		require.Equal(t, want, outcome(end.resp, end.err))
	}
	require.Equal(t, outcomeRefused, outcome(nil, mistake("no")))
}

// listen is a server that hears what is sent by UDP.
func listen(t *testing.T) (addr string, heard func(want ...string) string) {
	t.Helper()
	conn, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() }) // nothing hangs on it
	var all strings.Builder
	return conn.LocalAddr().String(), func(want ...string) string {
		t.Helper()
		packet := make([]byte, 1<<16)
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(20*time.Second)))
		for slices.ContainsFunc(want, func(w string) bool { return !regexp.MustCompile("(?m)^" + w).MatchString(all.String()) }) {
			n, _, err := conn.ReadFrom(packet)
			require.NoError(t, err, "not heard: %q in\n%s", want, all.String())
			all.Write(packet[:n])
			all.WriteByte('\n')
		}
		return all.String()
	}
}

func TestMetrics_GoToStatsdAndDogstatsdWhenAskedFor(t *testing.T) {
	t.Parallel()
	statsd, heardPlain := listen(t)
	dogstatsd, heardTagged := listen(t)
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	env := map[string]string{envStatsd: statsd, envDogstatsd: dogstatsd, envMaxRoles: "1"}
	require.NoError(t, h.b.metrics.configure(func(name string) string { return env[name] }))
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
		`vault\.openai\.journal_entries\.openai:0\.0+\|g`,
		`vault\.openai\.admin_key_last_rotation_timestamp_seconds\.openai:`+fmt.Sprint(h.now().Unix()/1000)+`\d{3}\.0+\|g`,
	)
	tagged := heardTagged(
		`vault\.openai\.credentials_issued:1\|c\|#mount_point:openai/,role:app,outcome:ok$`,
		`vault\.openai\.credentials_revoked:1\|c\|#mount_point:openai/,role:app,outcome:ok$`,
		`vault\.openai\.api_request_duration:\d+\.\d+\|ms\|#mount_point:openai/,call:create_service_account$`,
		`vault\.openai\.journal_entries:0(\.0+)?\|g\|#mount_point:openai/$`,
		`vault\.openai\.admin_key_last_rotation_timestamp_seconds:`+fmt.Sprint(h.now().Unix()/1000)+`\d{3}(\.0+)?\|g\|#mount_point:openai/$`,
	)
	for _, secret := range h.sim.Secrets() {
		require.NotContains(t, text+tagged, secret)
	}

	// Counting goes on after the end, and is heard by nobody.
	h.b.Cleanup(t.Context())
	h.b.metrics.rotated(nil)
}

func TestMetrics_NothingIsSentUnasked(t *testing.T) {
	t.Parallel()
	m := newMeters(tidyFinished, tidyError, tidyCancelled)
	require.NoError(t, m.configure(func(string) string { return "" }))
	require.Nil(t, m.push)
	err := m.configure(func(name string) string {
		return map[string]string{envStatsd: "no address", envDogstatsd: "nor this", envMaxRoles: "many"}[name]
	})
	require.ErrorContains(t, err, envStatsd)
	require.ErrorContains(t, err, envDogstatsd)
	require.ErrorContains(t, err, envMaxRoles)
	require.Nil(t, m.push)
	require.Equal(t, defaultMaxRoles, m.roles.limit)
}

// The page's tables are those of the code. UPDATE_DOCS=1 writes them.
func TestMetrics_TheDocumentationNamesThemAll(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	table.WriteString("| Name | | Labels | statsd | |\n|---|---|---|---|---|\n")
	for _, d := range newMeters(tidyFinished, tidyError, tidyCancelled).all {
		labels := make([]string, len(d.labels))
		for i, l := range d.labels {
			labels[i] = "`" + l + "`"
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s | `%s` | %s |\n", d.name, d.kind, strings.Join(labels, " "), d.pushedName(), d.help)
	}
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
	require.Equal(t, want, string(page), "docs/metrics.md is not up to date: UPDATE_DOCS=1 go test -run TheDocumentationNamesThemAll .")
	for _, o := range outcomes {
		require.Contains(t, want, "`"+o+"`", "outcome")
	}
	for _, env := range []string{envStatsd, envDogstatsd, envMaxRoles} {
		require.Contains(t, want, env)
	}
}

// A replaced key that cannot be deleted is a key alive beyond its time.
func TestMetrics_AReplacedStaticKeyThatStaysIsOverdue(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", fields{"rotation_period": "24h", "revocation_delay": "1h"})
	h.must(h.write("rotate-role/batch", nil))
	h.sim.Fail(openaitest.Fault{Route: routeKey, Status: http.StatusForbidden})
	for range 4 {
		h.advance(time.Hour)
		h.keep()
	}
	require.Greater(t, h.measured().one(t, "static_role_lag_seconds"), 2.5*3600)
	h.sim.ClearFaults()
	h.advance(time.Hour)
	h.keep()
	require.Zero(t, h.measured().one(t, "static_role_lag_seconds"))
	h.gone("batch")
}
