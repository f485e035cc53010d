package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFiguresAreMediansAndTheirRatio(t *testing.T) {
	b := newBook()
	b.section = "issue"
	for i, rate := range []float64{1000, 4000, 2000} { // of each repetition, with its ratio
		b.note("issue/c32/0ms/rate", "throughput", "/s", floor, rate)
		b.note("issue/c32/0ms/rate", "throughput", "/s", engine, rate*[]float64{0.7, 0.5, 0.6}[i])
	}
	b.note("issue/admin_calls", "calls", "", floor, 0)
	b.note("issue/admin_calls", "calls", "", engine, 2)
	require.NoError(t, b.settle())

	rate := b.byID["issue/c32/0ms/rate"]
	require.Equal(t, 2000.0, rate.Floor.Median)
	require.Equal(t, 1200.0, rate.Engine.Median)
	require.InDelta(t, 0.6, rate.Ratio.Median, 1e-9)
	require.InDelta(t, 0.5, rate.Ratio.Min, 1e-9)
	require.InDelta(t, 0.7, rate.Ratio.Max, 1e-9)
	require.True(t, rate.Target.Reached, "a ratio to the floor")
	calls := b.byID["issue/admin_calls"]
	require.Nil(t, calls.Ratio, "a floor of zero has no ratio")
	require.False(t, calls.Target.Reached, "a maximum for the engine's own figure")
	require.Equal(t, "1 targets reached, 1 short: issue/admin_calls", b.verdict())

	var out strings.Builder
	require.NoError(t, b.table(&out))
	require.Regexp(t, `(?m)^0\.60 +0\.50\.\.0\.70 +throughput +2000 +1200 +/s +≥ 0\.60 of floor +0\.41 +ok$`, out.String())
	require.Regexp(t, `(?m)^ +calls +0 +2 +≤ 1 +2 +short$`, out.String())

	b.note("issue/broken", "not a number", "", engine, 0/zero())
	require.ErrorContains(t, b.settle(), "issue/broken")
}

func zero() float64 { return float64(len(os.Args[:0])) }

func TestTheReportIsReadable(t *testing.T) {
	b := newBook()
	b.note("a", "a", "ms", engine, 1)
	require.NoError(t, b.settle())
	path := t.TempDir() + "/new/bench.json"
	require.NoError(t, report{Figures: b.figures}.write(path))
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	var back report
	require.NoError(t, json.Unmarshal(content, &back))
	require.Equal(t, []float64{1}, back.Figures[0].Engine.Runs)
}

func TestLoad(t *testing.T) {
	var seen atomic.Int64
	fail := false
	vault := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := seen.Add(1)
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("X-Vault-Token") != "root" || r.URL.Path != "/v1/openai/creds/app" || string(body) != "{}" || fail && n == 20 {
			http.Error(w, "refused", http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, `{"lease_id":"openai/creds/app/%d","data":{}}`, n)
	}))
	defer vault.Close()
	c, err := newCaller(vault.URL, "root")
	require.NoError(t, err)
	defer c.http.CloseIdleConnections()
	l := load{workers: 8, count: 101, leases: true, request: func(int) request {
		return request{http.MethodPut, "openai/creds/app", "{}"}
	}}
	o, err := c.run(t.Context(), l)
	require.NoError(t, err)
	require.EqualValues(t, 101, seen.Load())
	require.Len(t, o.waits, 101)
	require.Len(t, o.leaseID, 101)
	require.Greater(t, o.rate(), 0.0)
	require.LessOrEqual(t, o.percentile(50), o.percentile(99))

	fail = true
	seen.Store(0)
	_, err = c.run(t.Context(), l)
	require.ErrorContains(t, err, "500: refused", "the first failure ends the load")
	require.Less(t, seen.Load(), int64(101))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = c.run(ctx, l)
	require.ErrorIs(t, err, context.Canceled)
}

func TestLeasesAreCounted(t *testing.T) {
	answer, status := `{"data":{"keys":["a1","b2","c3"]},"wrap_info":null,"warnings":null}`, http.StatusOK
	vault := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "LIST" {
			status = http.StatusMethodNotAllowed
		}
		w.WriteHeader(status)
		fmt.Fprint(w, answer)
	}))
	defer vault.Close()
	c, err := newCaller(vault.URL, "root")
	require.NoError(t, err)
	defer c.http.CloseIdleConnections()
	m := &mount{server: &server{caller: c}, path: "openai"}
	n, err := m.leased(t.Context())
	require.NoError(t, err)
	require.Equal(t, 3, n)
	answer, status = `{"errors":[]}`, http.StatusNotFound
	n, err = m.leased(t.Context())
	require.NoError(t, err)
	require.Zero(t, n)
	status = http.StatusForbidden
	_, err = m.leased(t.Context())
	require.ErrorContains(t, err, "403")
}

func TestPercentiles(t *testing.T) {
	o := outcome{}
	for i := range 100 {
		o.waits = append(o.waits, time.Duration(i+1)*time.Millisecond)
	}
	require.Equal(t, []float64{1, 50, 95, 99, 100}, []float64{o.percentile(0), o.percentile(50), o.percentile(95), o.percentile(99), o.percentile(100)})
	require.Equal(t, 7.0, outcome{waits: []time.Duration{7 * time.Millisecond}}.percentile(99))
}

func TestProcessCPUAndMemory(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	require.NoError(t, err)
	all, err := machineTime()
	require.NoError(t, err)
	for began := time.Now(); time.Since(began) < 200*time.Millisecond; { // busy
	}
	after, err := cpuTime(os.Getpid())
	require.NoError(t, err)
	require.Greater(t, after, before)
	allAfter, err := machineTime()
	require.NoError(t, err)
	require.GreaterOrEqual(t, allAfter-all+tick, after-before)
	mib, err := rss(os.Getpid())
	require.NoError(t, err)
	require.Greater(t, mib, 1.0)
	stop := peakRSS(t.Context(), os.Getpid())
	require.Greater(t, stop(), 1.0)
	_, err = cpuTime(-1)
	require.Error(t, err)
}

func TestBarrier_ParsesStorageOperations(t *testing.T) {
	counts, err := barrier([]byte(`# TYPE vault_barrier_get summary
vault_barrier_get{quantile="0.5"} 0.01
vault_barrier_get_sum 12.5
vault_barrier_get_count 345
# TYPE vault_barrier_put summary
vault_barrier_put_sum 1
vault_barrier_put_count 6
`))
	require.NoError(t, err)
	require.Equal(t, operations{"get": 345, "put": 6}, counts)
	_, err = barrier([]byte("# TYPE go_goroutines gauge\ngo_goroutines 7\n"))
	require.ErrorContains(t, err, "no operations")
}

func TestArguments(t *testing.T) {
	s, err := parse([]string{"-only", "issue,raft", "-quick"}, io.Discard)
	require.NoError(t, err)
	require.Equal(t, []string{"issue", "raft"}, s.Only)
	require.Equal(t, 1, s.Repetitions)
	require.True(t, strings.HasSuffix(s.Output, "/dist"))
	for _, bad := range [][]string{{"extra"}, {"-only", "nonsense"}, {"-count", "0"}, {"-nonsense"}} {
		var said bytes.Buffer
		_, err := parse(bad, &said)
		require.Error(t, err, bad)
	}
}
