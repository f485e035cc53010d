package openaisecrets

import (
	"context"
	"encoding/csv"
	"fmt"
	"math/big"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func (h *harness) withEntities(entities map[string]*logical.Entity) {
	h.manager.mu.Lock()
	defer h.manager.mu.Unlock()
	h.manager.entities = entities
}

func (h *harness) usage(data map[string]any) map[string]any {
	h.t.Helper()
	resp, err := h.do(context.Background(), logical.ReadOperation, "usage", data)
	return h.must(resp, err).Data
}

// groups returns the costs of the groups.
func groups(data map[string]any) map[string]string {
	found := map[string]string{}
	for name, value := range data {
		if group, is := strings.CutPrefix(name, costField); is {
			found[group] = value.(string)
		}
	}
	return found
}

// spend adds a cost of a lease's key, today.
func (h *harness) spend(lease *logical.Response, lineItem, amount string) {
	h.sim.AddCost(h.project, lease.Data["api_key_id"].(string), lineItem, h.now(), amount)
}

func exact(t *testing.T, text any) *big.Rat {
	t.Helper()
	sum, ok := new(big.Rat).SetString(text.(string))
	require.True(t, ok, text)
	return sum
}

// Three leases of two roles, one deleted, and a key in the project that the engine did
// not create.
func TestUsage_ByEachGroup(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{AmountsVary: true})
	h.must(h.write("roles/batch", map[string]any{"project_id": h.project}))
	h.withEntities(map[string]*logical.Entity{
		"entity-1": {ID: "entity-1", Name: "alice", Metadata: map[string]string{"team": "search"}},
		"entity-2": {ID: "entity-2", Name: "bob", Metadata: map[string]string{"team": "search"}},
	})
	one, two := h.leaseAs("app", "entity-1", "userpass-alice"), h.leaseAs("app", "entity-2", "userpass-bob")
	three, four := h.leaseAs("batch", "entity-gone", "approle"), h.leaseAs("batch", "", "root")
	require.NoError(t, h.revoke(two))
	h.spend(one, "gpt-5-mini, input_tokens", "1.25")
	h.spend(one, "gpt-5-mini, output_tokens", "0.000012")
	h.spend(two, "gpt-6, input_tokens", "2")
	h.spend(three, "web search tool calls", "0.5")
	h.spend(four, "gpt-6, input_tokens", "0.1")
	h.sim.AddCost(h.project, "key_of_a_person", "gpt-6, input_tokens", h.now(), "10")
	h.sim.AddCost(h.project, "", "", h.now(), "0.25")
	h.sim.AddCost("proj_of_others", "key_x", "", h.now(), "99")
	today := h.now().UTC().Format(time.DateOnly)
	id := func(lease *logical.Response) string { return lease.Data["api_key_id"].(string) }
	for group, want := range map[string]map[string]string{
		"":              {"app": "3.250012", "batch": "0.6"},
		"role":          {"app": "3.250012", "batch": "0.6"},
		"entity":        {"alice": "1.250012", "bob": "2", "entity-gone": "0.5", "(none)": "0.1"},
		"display_name":  {"userpass-alice": "1.250012", "userpass-bob": "2", "approle": "0.5", "root": "0.1"},
		"key":           {id(one): "1.250012", id(two): "2", id(three): "0.5", id(four): "0.1"},
		"model":         {"gpt-5-mini": "1.250012", "gpt-6": "2.1", "web search tool calls": "0.5"},
		"day":           {today: "3.850012"},
		"metadata:team": {"search": "3.250012", "entity-gone": "0.5", "(none)": "0.1"},
		"metadata:none": {"entity-gone": "0.5", "(none)": "3.350012"},
	} {
		data := h.usage(map[string]any{"group_by": group})
		require.Equal(t, want, groups(data), group)
		require.Equal(t, "14.100012", data["total"], group)
		require.Equal(t, "10.25", data["unattributed"], group)
		require.NotContains(t, data, "rows")
	}
	require.Equal(t, 3, h.manager.entitiesAsked, "each entity is read once in five minutes")

	// The identity store fails: the costs keep their entities' IDs, and a warning says so.
	h.manager.mu.Lock()
	h.manager.entitiesFailed = errStorage
	h.manager.mu.Unlock()
	h.advance(entityFresh + time.Second)
	failing := h.must(h.do(context.Background(), logical.ReadOperation, "usage", map[string]any{"group_by": "metadata:team"}))
	require.Equal(t, map[string]string{"entity-1": "1.250012", "entity-2": "2", "entity-gone": "0.5", "(none)": "0.1"}, groups(failing.Data))
	require.Contains(t, strings.Join(failing.Warnings, "\n"), "Vault did not return some entities")
	h.manager.mu.Lock()
	h.manager.entitiesFailed = nil
	h.manager.mu.Unlock()

	app := h.usage(map[string]any{"role": "app", "group_by": "model"})
	require.Equal(t, map[string]string{"gpt-5-mini": "1.250012", "gpt-6": "2"}, groups(app))
	require.Equal(t, "0.6", app["other_roles"])
	require.Equal(t, "14.100012", app["total"])
	require.Empty(t, groups(h.usage(map[string]any{"start": today, "end": today, "role": "app", "group_by": "role"}))["batch"])

	nested := h.usage(map[string]any{"format": "json", "group_by": "entity"})
	require.Empty(t, groups(nested))
	require.Equal(t, []any{
		map[string]any{"group": "entity-2", "name": "bob", "cost": "2"}, map[string]any{"group": "entity-1", "name": "alice", "cost": "1.250012"},
		map[string]any{"group": "entity-gone", "cost": "0.5"}, map[string]any{"group": "(none)", "cost": "0.1"},
	}, nested["rows"], "highest cost first")

	// A role that was deleted is still reported.
	h.must(h.remove("roles/batch"))
	require.Equal(t, map[string]string{"batch": "0.6"}, groups(h.usage(map[string]any{"role": "batch"})))
	for _, lease := range []*logical.Response{one, three, four} {
		require.NoError(t, h.revoke(lease))
	}
}

func TestUsage_Tokens(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.leaseAs("app", "", "root")
	for range 3 {
		require.Equal(t, http.StatusOK, h.inference(lease, http.MethodPost, "/responses"))
	}
	h.sim.AddUsage("embeddings", h.project, lease.Data["api_key_id"].(string), "text-embedding-3-small", h.now(), openaitest.Counts{Requests: 2, Input: 100})
	h.sim.AddUsage("completions", h.project, "key_of_a_person", "gpt-6", h.now(), openaitest.Counts{Requests: 1, Input: 7, Cached: 5, Output: 3})
	data := h.usage(map[string]any{"detail": "tokens"})
	require.Equal(t, map[string]string{"app": "0.000168"}, groups(data), "three requests of 8 input and 5 output tokens")
	require.EqualValues(t, 5, data["requests_app"])
	require.EqualValues(t, 124, data["input_tokens_app"])
	require.EqualValues(t, 15, data["output_tokens_app"])
	require.EqualValues(t, 6, data["total_requests"])
	require.EqualValues(t, 131, data["total_input_tokens"])
	rows := h.usage(map[string]any{"detail": "tokens", "format": "json", "group_by": "model"})["rows"].([]any)
	require.Len(t, rows, 2)
	require.EqualValues(t, 100, rows[1].(map[string]any)["input_tokens"])
	require.NoError(t, h.revoke(lease))
}

// Random ledgers with credits, null keys, sub-cent amounts in each form, deleted keys,
// unknown keys and several projects: the report adds up to OpenAI's total, exactly.
func TestUsage_AddsUpToTheDigit(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 18)) // #nosec G404 -- a test's
			h := configured(t, openaitest.Options{AmountsVary: true})
			other := h.sim.AddProject("more")
			h.must(h.write("roles/more", map[string]any{"project_id": other}))
			h.withEntities(map[string]*logical.Entity{"entity-0": {Name: "same"}, "entity-1": {Name: "same"}, "entity-2": {Name: "x", Metadata: map[string]string{"team": "=cmd()"}}})
			days := 1 + random.IntN(100)
			today := h.now().UTC().Truncate(usageDay)
			want := new(big.Rat)
			for i := range random.IntN(600) {
				key := fmt.Sprint("key_", random.IntN(80))
				if random.IntN(3) > 0 {
					h.b.recordUsage(usageRecord{KeyID: key, ProjectID: h.project, Role: fmt.Sprint("role-", random.IntN(4)), EntityID: fmt.Sprint("entity-", random.IntN(5)), DisplayName: fmt.Sprint("user\n", random.IntN(3))})
				}
				if i%100 == 0 {
					h.flush()
				}
				amount := fmt.Sprintf("%d.%0*d", random.IntN(40)-5, 1+random.IntN(18), random.IntN(10))
				project := []string{h.project, other, "proj_of_others"}[random.IntN(3)]
				if random.IntN(10) == 0 {
					key = ""
				}
				h.sim.AddCost(project, key, fmt.Sprintf("model-%d, %s", random.IntN(3), []string{"input_tokens", "output_tokens"}[random.IntN(2)]), today.AddDate(0, 0, -random.IntN(days)), amount)
				if project != "proj_of_others" {
					want.Add(want, exact(t, amount))
				}
			}
			for _, group := range append(usageGroups, "metadata:team") {
				start := today.AddDate(0, 0, 1-days).Format(time.DateOnly)
				data := h.usage(map[string]any{"start": start, "group_by": group})
				require.Zero(t, want.Cmp(exact(t, data["total"])), "%s: %s", group, data["total"])
				sum := exact(t, data["unattributed"])
				for _, cost := range groups(data) {
					sum.Add(sum, exact(t, cost))
				}
				require.Zero(t, want.Cmp(sum), "%s: the rows and unattributed add up to %s, not %s", group, dollars(sum), dollars(want))

				resp, err := h.do(context.Background(), logical.ReadOperation, "usage", map[string]any{"start": start, "group_by": group, "format": "csv"})
				raw := h.must(resp, err).Data[logical.HTTPRawBody].([]byte)
				lines, err := csv.NewReader(strings.NewReader(string(raw))).ReadAll()
				require.NoError(t, err)
				sum = new(big.Rat)
				for _, line := range lines[1:] {
					sum.Add(sum, exact(t, line[4]))
					require.NotRegexp(t, `^[=+@-]`, line[2]+"|"+line[3])
				}
				require.Zero(t, want.Cmp(sum), "%s: the sum of the CSV column", group)
			}
		})
	}
}

func TestUsage_BadInput(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	today := h.now().UTC()
	day := func(n int) string { return today.AddDate(0, 0, n).Format(time.DateOnly) }
	for _, c := range []struct {
		data map[string]any
		said string
	}{
		{map[string]any{"start": day(-3), "end": day(-4)}, "start " + day(-3) + " is after end " + day(-4)},
		{map[string]any{"start": day(1)}, "start " + day(1) + " is in the future"},
		{map[string]any{"end": day(1)}, "end " + day(1) + " is in the future"},
		{map[string]any{"start": day(-180)}, "start and end are 181 days apart"},
		{map[string]any{"start": "yesterday"}, "start must be a day in UTC, such as"},
		{map[string]any{"end": "2026-02-30"}, "end must be a day in UTC"},
		{map[string]any{"start": "2025-10-01", "end": "2025-10-02"}, "start: OpenAI rejects this day"},
		{map[string]any{"group_by": "team"}, `group_by "team" is unknown; use role, entity`},
		{map[string]any{"group_by": "metadata:"}, "group_by=metadata: requires the name"},
		{map[string]any{"role": "none"}, `role "none" not found`},
		{map[string]any{"role": "static-roles/none"}, `role "static-roles/none" not found`},
		{map[string]any{"role": "../config"}, `role "../config" not found`},
		{map[string]any{"format": "xml"}, "format must be"},
		{map[string]any{"detail": "all"}, "detail must be"},
		{map[string]any{"groupby": "role"}, "unknown field"},
	} {
		resp, err := h.do(context.Background(), logical.ReadOperation, "usage", c.data)
		require.Contains(t, h.refused(resp, err), c.said)
	}
	require.Equal(t, 4, h.sim.Count(http.MethodGet, "/organization/costs"), "bad input costs a call only for an early day and for the three roles that no record names")
	h.usage(map[string]any{"start": day(-179)})
}

// Without the permission, the path returns an error, and everything else works.
func TestUsage_MissingPermission(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	_, key := h.sim.AddAdminKey("restricted", openaitest.WithoutUsage())
	h.configure(map[string]any{"admin_api_key": key})
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	said := h.refused(h.read("usage"))
	require.Contains(t, said, "the engine's admin key lacks the permission api.usage.read; grant it at "+adminKeysPage)
	require.Contains(t, said, "Missing scopes: api.usage.read", "OpenAI's message")
	lease := h.lease("creds/app", nil)
	h.must(h.end(logical.RenewOperation, lease))
	h.must(h.write("config/rotate", nil))
	require.NoError(t, h.revoke(lease))
	h.sim.Keep(h.adminKeyIDs()...)
}

// Concurrent requests share one response, which is cached for a minute. A caller that
// gives up does not affect the others.
func TestUsage_SingleFlightAndCache(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{Latency: 200 * time.Millisecond})
	calls := func() int { return h.sim.Count(http.MethodGet, "/organization/costs") }
	ctx, cancel := context.WithCancel(context.Background())
	impatient := make(chan error)
	go func() {
		_, err := h.do(ctx, logical.ReadOperation, "usage", nil)
		impatient <- err
	}()
	require.Eventually(t, func() bool {
		h.b.reports.mu.Lock()
		defer h.b.reports.mu.Unlock()
		return len(h.b.reports.flights) == 1
	}, 5*time.Second, time.Millisecond)
	var group sync.WaitGroup
	var failed atomic.Int64
	for range 20 {
		group.Go(func() {
			if resp, err := h.read("usage"); err != nil || resp.IsError() {
				failed.Add(1)
			}
		})
	}
	cancel()
	require.Error(t, <-impatient)
	group.Wait()
	require.Zero(t, failed.Load())
	require.Equal(t, 1, calls())
	h.usage(nil)
	require.Equal(t, 1, calls())
	h.advance(reportFresh + time.Second)
	h.usage(nil)
	require.Equal(t, 2, calls())

	// An outage returns the last figures with their age, for an hour.
	h.sim.Fail(openaitest.Fault{Method: "GET", Route: "/organization/costs", Kind: openaitest.FaultStatus, Status: 503})
	h.advance(reportFresh + time.Second)
	resp := h.must(h.read("usage"))
	require.True(t, slices.ContainsFunc(resp.Warnings, func(w string) bool { return strings.HasPrefix(w, "These figures are of ") }), "%q", resp.Warnings)
	_, err := h.do(context.Background(), logical.ReadOperation, "usage", map[string]any{"format": "csv"})
	require.Error(t, err, "a table cannot show its age")
	h.advance(reportUsable)
	_, err = h.read("usage")
	var coded logical.HTTPCodedError
	require.ErrorAs(t, err, &coded)
	require.Equal(t, http.StatusBadGateway, coded.Code())
}

// OpenAI may change the costs of the last days: the report names these days, and follows.
func TestUsage_Restatement(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.leaseAs("app", "", "root")
	yesterday := h.now().AddDate(0, 0, -1).UTC()
	start := yesterday.AddDate(0, 0, -9).Format(time.DateOnly)
	add := func(amount string) {
		h.sim.AddCost(h.project, lease.Data["api_key_id"].(string), "gpt-6, input_tokens", yesterday, amount)
	}
	add("3")
	resp := h.must(h.do(context.Background(), logical.ReadOperation, "usage", map[string]any{"start": start}))
	require.Equal(t, "3", resp.Data["total"])
	settled := yesterday.Truncate(usageDay).AddDate(0, 0, -1)
	require.Equal(t, settled.Format(time.RFC3339), resp.Data["fresh_until"])
	require.Contains(t, resp.Warnings, "OpenAI may still change the figures of "+settled.Format(time.DateOnly)+" and later days.")
	add("-0.5")
	h.advance(reportFresh + time.Second)
	require.Equal(t, map[string]string{"app": "2.5"}, groups(h.usage(map[string]any{"start": start})))
	old := h.must(h.do(context.Background(), logical.ReadOperation, "usage", map[string]any{"start": start, "end": yesterday.AddDate(0, 0, -5).Format(time.DateOnly)}))
	require.Empty(t, old.Warnings)
	require.Equal(t, "0", old.Data["total"])
	require.NoError(t, h.revoke(lease))
}

// Costs whose record a crash lost are unattributed until the lease is renewed or revoked.
func TestUsage_ACrashIsUnattributedAndRestored(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	lease := h.leaseAs("app", "", "root")
	h.spend(lease, "gpt-6, input_tokens", "1.5")
	h.crash()
	data := h.usage(nil)
	require.Equal(t, "1.5", data["unattributed"])
	require.Empty(t, groups(data))
	h.must(h.end(logical.RenewOperation, lease))
	h.advance(reportFresh + time.Second)
	data = h.usage(nil)
	require.Equal(t, "0", data["unattributed"])
	require.Equal(t, map[string]string{"app": "1.5"}, groups(data))
	require.NoError(t, h.revoke(lease))
}

// Text from a client or an identity cannot become a formula or another line.
func TestUsage_TextOfClientsIsInert(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	names := []string{`=HYPERLINK("http://x")`, "+1", "-1", "@SUM(1)", "\t=1", "two\nlines", `quo"te`, "plain", "a;=1", "b; +1", `c;"=1`, " =1", "＝1", "\x1b[2J", "d;e-f"}
	for i, name := range names {
		h.b.recordUsage(usageRecord{KeyID: fmt.Sprint("key_", i), ProjectID: h.project, Role: "app", DisplayName: name})
		h.sim.AddCost(h.project, fmt.Sprint("key_", i), "", h.now(), "1")
	}
	resp, err := h.do(context.Background(), logical.ReadOperation, "usage", map[string]any{"group_by": "display_name", "format": "csv"})
	raw := string(h.must(resp, err).Data[logical.HTTPRawBody].([]byte))
	lines, err := csv.NewReader(strings.NewReader(raw)).ReadAll()
	require.NoError(t, err)
	var cells []string
	for _, line := range lines[1 : len(lines)-1] {
		cells = append(cells, line[2])
	}
	require.ElementsMatch(t, []string{`'=HYPERLINK("http://x")`, "'+1", "'-1", "'@SUM(1)", "?=1", "two?lines", `quo"te`, "plain", "a;'=1", "b;' +1", `c;'"=1`, "' =1", "'＝1", "?[2J", "d;e-f"}, cells)
	for name := range groups(h.usage(map[string]any{"group_by": "display_name"})) {
		require.NotContains(t, name, "\n")
	}
}

// Two entities with the same name have separate fields.
func TestUsage_EqualLabels(t *testing.T) {
	t.Parallel()
	r := usageReport{rows: []usageRow{{group: "1", name: "a"}, {group: "2", name: "a"}, {group: "b"}, {group: "a\n"}, {group: "a\t"}, {group: `a ("1")`}}}
	labels := r.labels()
	slices.Sort(labels)
	require.Len(t, slices.Compact(labels), len(r.rows))
}

func TestUsage_OfNothing(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.Contains(t, h.refused(h.read("usage")), "vault write openai/config admin_api_key")
	h.configure(nil)
	data := h.usage(nil)
	require.Equal(t, "0", data["total"])
	require.Zero(t, h.sim.Count(http.MethodGet, "/organization/costs"), "the mount has no project")
	require.Equal(t, []any{}, h.usage(map[string]any{"format": "json"})["rows"])
}

// Records of 400 days, of which a report of 180 days uses fewer than half.
// USAGE_RECORDS=100000 measures that number of records.
func TestUsage_OfManyRecords(t *testing.T) {
	h := newHarness(t, openaitest.Options{})
	// The server caches its responses, so that the second report shows only the engine's
	// memory.
	answers := map[string][]byte{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !strings.HasPrefix(r.URL.Path, "/v1/organization/costs") {
			h.sim.ServeHTTP(w, r)
			return
		}
		body := answers[r.RequestURI]
		if body == nil {
			answer := httptest.NewRecorder()
			h.sim.ServeHTTP(answer, r)
			body = answer.Body.Bytes()
			answers[r.RequestURI] = body
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	}))
	defer server.Close()
	h.configure(map[string]any{"api_endpoint": server.URL + "/v1", "usage_retention": "400d"})
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	today := h.now().UTC().Truncate(usageDay)
	const days = 400
	perDay, most := 10_000/days, int64(20<<20)
	if n, err := strconv.Atoi(os.Getenv("USAGE_RECORDS")); err == nil {
		perDay, most = n/days, 64<<20
	}
	for d := range days {
		at := today.AddDate(0, 0, -d)
		entry := usageEntry{Version: usageVersion}
		for i := range perDay {
			key := fmt.Sprintf("key_%016d", d*perDay+i)
			entry.Records = append(entry.Records, usageRecord{
				KeyID: key, AccountID: fmt.Sprintf("user-%024d", i), ProjectID: h.project, Type: typeAccount, Role: fmt.Sprint("role-", i%40),
				EntityID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i), DisplayName: "userpass-alice", IssuedAt: at, Ends: at.Add(usageDay),
			})
			if d < 180 {
				h.sim.AddCost(h.project, key, "gpt-5-mini, input_tokens", at, "0.001")
				h.sim.AddCost(h.project, key, "gpt-5-mini, output_tokens", at, "0.0025")
			}
		}
		require.NoError(t, writeEntry(context.Background(), h.storage, usageKeysPrefix+at.Format(time.DateOnly)+"/x-1", "records", entry))
	}
	for _, c := range []struct{ group, start string }{{"role", today.AddDate(0, 0, -179).Format(time.DateOnly)}, {"role", today.AddDate(0, 0, -30).Format(time.DateOnly)}} {
		from, until, problem := parseUsageWindow(c.start, "", h.now())
		require.Empty(t, problem)
		req, q := &logical.Request{Storage: h.storage, MountPoint: "openai/"}, usageQuery{start: from, end: until, group: c.group}
		_, err := h.b.readReport(context.Background(), req, q)
		require.NoError(t, err)
		defer debug.SetGCPercent(debug.SetGCPercent(10)) // so that the heap contains little garbage
		runtime.GC()
		var before, m runtime.MemStats
		runtime.ReadMemStats(&before)
		peak := before.HeapAlloc
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
					runtime.ReadMemStats(&m)
					peak = max(peak, m.HeapAlloc)
				}
			}
		}()
		began := time.Now()
		r, err := h.b.readReport(context.Background(), req, q)
		took := time.Since(began)
		close(stop)
		<-done
		require.NoError(t, err)
		require.Len(t, r.rows, min(40, perDay))
		require.Zero(t, r.unattributed.cost.Sign())
		t.Logf("%d records, 400 days, report of %d days: %s, %.0f MiB above the start at the peak; total %s", days*perDay, int(until.Sub(from)/usageDay), took.Round(time.Millisecond), float64(peak-before.HeapAlloc)/(1<<20), dollars(r.total.cost))
		require.Less(t, took, time.Minute)
		require.Less(t, int64(peak)-int64(before.HeapAlloc), most)
	}
}

// The metrics show the last refresh: a failure does not change them, and the time of the
// last success shows their age.
func TestUsageRefresh_Metrics(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{AmountsVary: true})
	h.static("batch", nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	lease := h.leaseAs("app", "", "root")
	now := h.now().Add(5 * time.Minute).UTC() // the time of the refresh below, possibly tomorrow
	for key, amounts := range map[string][]string{
		lease.Data["api_key_id"].(string):             {"2.5", "1", "0.5", "0", "0", "0", "0", "0.25", "100"},
		h.staticCreds("batch")["api_key_id"].(string): {"0.125"},
		"key_of_a_person":                             {"8", "4"}, "": {"1"},
	} {
		for i, amount := range amounts {
			h.sim.AddCost(h.project, key, "gpt-6, input_tokens", now.AddDate(0, 0, -i), amount)
		}
	}
	h.rollback()
	require.NotContains(t, h.measured(), "usage_last_success_timestamp_seconds", "off by default")
	require.Zero(t, h.sim.Count(http.MethodGet, "/organization/costs"))

	fail := h.sim.Fail(openaitest.Fault{Method: "GET", Route: "/organization/costs", Kind: openaitest.FaultStatus, Status: 403, Body: `{"error":"Missing scopes: api.usage.read."}`})
	h.must(h.write("config", map[string]any{"usage_interval": "5m"}))
	h.rollback()
	m := h.measured()
	require.Zero(t, m.one(t, "usage_last_success_timestamp_seconds"))
	require.NotContains(t, m, `usage_total_usd{window="day"}`, "unknown is absent, not 0")
	require.NotEmpty(t, h.lines("usage not refreshed"))
	fail()
	h.advance(5 * time.Minute)
	h.rollback()
	m = h.measured()
	require.InDelta(t, float64(h.now().Unix()), m.one(t, "usage_last_success_timestamp_seconds"), 60)
	require.Equal(t, 2.5, m.one(t, `role_cost_usd{role="app",window="day"}`))
	require.Equal(t, 1.75, m.one(t, `role_cost_usd{role="app",window="previous_7_days"}`))
	require.Equal(t, 0.125, m.one(t, `role_cost_usd{role="static-roles/batch",window="day"}`))
	require.Equal(t, 9.0, m.one(t, `usage_unattributed_usd{window="day"}`))
	require.Equal(t, 4.0, m.one(t, `usage_unattributed_usd{window="previous_7_days"}`))
	require.Equal(t, 11.625, m.one(t, `usage_total_usd{window="day"}`))
	month := 2.5
	for i, amount := range []float64{1, 0.5, 0, 0, 0, 0, 0.25, 100} {
		if now.AddDate(0, 0, -i-1).Month() == now.Month() {
			month += amount
		}
	}
	require.Equal(t, month, m.one(t, `role_cost_usd{role="app",window="month"}`))

	h.rollback()
	require.Equal(t, m.one(t, "usage_last_success_timestamp_seconds"), h.measured().one(t, "usage_last_success_timestamp_seconds"), "not before the interval has passed")
	defer h.sim.Fail(openaitest.Fault{Method: "GET", Route: "/organization/costs", Kind: openaitest.FaultStatus, Status: 400})()
	h.advance(5 * time.Minute)
	h.rollback()
	require.Equal(t, 2.5, h.measured().one(t, `role_cost_usd{role="app",window="day"}`))
	require.Equal(t, m.one(t, "usage_last_success_timestamp_seconds"), h.measured().one(t, "usage_last_success_timestamp_seconds"))

	h.must(h.write("config", map[string]any{"usage_interval": 0}))
	h.rollback()
	require.NotContains(t, h.measured(), "usage_last_success_timestamp_seconds")
	require.NoError(t, h.revoke(lease))
	h.must(h.remove("static-roles/batch"))
}
