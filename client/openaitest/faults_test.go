// These tests check for each kind of fault what the client receives, and whether the
// request still has an effect.

package openaitest

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFaultKinds(t *testing.T) {
	connectionReset := func(t *testing.T, _ reply, err error) {
		t.Helper()
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	answers := func(status int, check func(t *testing.T, r reply)) func(*testing.T, reply, error) {
		return func(t *testing.T, r reply, err error) {
			t.Helper()
			require.NoError(t, err)
			require.Equal(t, status, r.status)
			if check != nil {
				check(t, r)
			}
		}
	}
	notJSON := func(t *testing.T, r reply) {
		t.Helper()
		require.NotEmpty(t, r.raw)
		require.Nil(t, r.body)
	}
	for name, tc := range map[string]struct {
		fault  Fault
		effect bool
		status int // in the log
		check  func(*testing.T, reply, error)
	}{
		"status": {Fault{Kind: FaultStatus, Status: 503, Message: "busy", Code: "overloaded"}, false, 503, answers(503, func(t *testing.T, r reply) {
			requireError(t, r, 503, "overloaded", "")
			require.Equal(t, "busy", r.field("error.message"))
			require.NotEmpty(t, r.header.Get("X-Request-Id"))
		})},
		"default status": {Fault{}, false, 500, answers(500, nil)},
		"literal body": {Fault{Status: 403, Body: `{"error":"bare"}`, Header: http.Header{"X-Y": {"z"}}}, false, 403, answers(403, func(t *testing.T, r reply) {
			require.Equal(t, `{"error":"bare"}`, r.raw)
			require.Equal(t, "z", r.header.Get("X-Y"))
		})},
		"status after":   {Fault{Kind: FaultStatusAfter, Status: 502}, true, 502, answers(502, nil)},
		"reset":          {Fault{Kind: FaultReset}, false, 0, connectionReset},
		"lost":           {Fault{Kind: FaultLost}, true, 0, connectionReset},
		"garbage":        {Fault{Kind: FaultGarbage}, true, 200, answers(200, notJSON)},
		"garbage before": {Fault{Kind: FaultGarbageBefore, Body: "<<<"}, false, 200, answers(200, notJSON)},
		"empty":          {Fault{Kind: FaultEmpty}, true, 200, answers(200, func(t *testing.T, r reply) { require.Empty(t, r.raw) })},
		"empty object":   {Fault{Kind: FaultEmptyObject}, true, 200, answers(200, func(t *testing.T, r reply) { require.Equal(t, "{}", r.raw) })},
		"truncated": {Fault{Kind: FaultTruncated}, true, 200, func(t *testing.T, r reply, err error) {
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			require.NotEmpty(t, r.raw)
		}},
		"huge": {Fault{Kind: FaultHuge}, true, 200, answers(200, func(t *testing.T, r reply) { require.Greater(t, len(r.raw), HugeBody) })},
		"html": {Fault{Kind: FaultHTML}, false, 502, answers(502, func(t *testing.T, r reply) {
			require.Contains(t, r.raw, "<html>")
			require.Contains(t, r.header.Get("Content-Type"), "text/html")
		})},
		"slow": {Fault{Kind: FaultSlow, Delay: 50 * time.Millisecond}, true, 200, answers(200, nil)},
		"redirect": {Fault{Kind: FaultRedirect}, false, 307, answers(307, func(t *testing.T, r reply) {
			require.Contains(t, r.header.Get("Location"), "https://elsewhere.invalid/v1/")
		})},
		"redirect to a URL": {Fault{Kind: FaultRedirect, Status: 302, Header: http.Header{"Location": {"http://127.0.0.1:9/"}}}, false, 302,
			answers(302, func(t *testing.T, r reply) { require.Equal(t, "http://127.0.0.1:9/", r.header.Get("Location")) })},
		"missing key": {Fault{Kind: FaultMissingKey}, true, 200, answers(200, func(t *testing.T, r reply) {
			require.NotEmpty(t, r.text(t, "id"))
			require.Contains(t, r.raw, `"api_key": null`)
		})},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, Options{})
			s.KeepAll()
			_, key := s.AdminKey()
			project := s.AddProject("p")
			tc.fault.Times = 1
			var struck atomic.Int32
			tc.fault.OnStrike = func(r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				require.Contains(t, string(body), "victim")
				require.Empty(t, s.Accounts(), "OnStrike can call the simulator, and runs before the effect")
				struck.Add(1)
			}
			s.Fail(tc.fault)
			began := time.Now()
			r, err := try(s, key, "POST", accountsPath(project), object{"name": "victim"})
			tc.check(t, r, err)
			require.GreaterOrEqual(t, time.Since(began), tc.fault.Delay)
			require.EqualValues(t, 1, struck.Load())
			require.Equal(t, tc.effect, len(s.Accounts()) == 1)
			log := s.Requests()
			require.Len(t, log, 1)
			require.NotEmpty(t, log[0].Fault)
			require.Equal(t, tc.status, log[0].Status)
			require.Equal(t, 200, manage(t, s, "POST", accountsPath(project), object{"name": "after"}).status, "the fault strikes once")
		})
	}
}

func TestFaultMissingValue(t *testing.T) {
	s := start(t, Options{})
	s.KeepAll()
	s.Fail(Fault{Kind: FaultMissingKey})
	r := manage(t, s, "POST", "/organization/admin_api_keys", object{"name": "x"})
	require.NotEmpty(t, r.text(t, "id"))
	require.Nil(t, r.field("value"))
	require.Len(t, s.AdminKeys(), 2)
}

func TestHangs(t *testing.T) {
	for kind, effect := range map[FaultKind]int{FaultHang: 0, FaultHangAfter: 1} {
		t.Run(string(kind), func(t *testing.T) {
			tb := &recorder{TB: t}
			s := Start(tb, Options{})
			s.KeepAll()
			_, key := s.AdminKey()
			project := s.AddProject("p")
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			var first sync.Once
			s.Fail(Fault{Kind: kind, OnStrike: func(*http.Request) {
				first.Do(func() {
					go func() { // cancel after the request has hung for a while
						for len(s.Accounts()) < effect {
							time.Sleep(time.Millisecond)
						}
						time.Sleep(50 * time.Millisecond)
						cancel()
					}()
				})
			}})

			req, err := http.NewRequestWithContext(ctx, "POST", s.URL()+accountsPath(project), strings.NewReader(`{"name":"x"}`))
			require.NoError(t, err)
			req.Header.Set("Authorization", "Bearer "+key)
			req.Header.Set("Content-Type", "application/json")
			_, err = http.DefaultClient.Do(req) //nolint:bodyclose // no response
			require.ErrorIs(t, err, context.Canceled)
			require.Len(t, s.Accounts(), effect)

			// A second request has no deadline; it must end with the server.
			ended := make(chan error, 1)
			go func() {
				_, err := try(s, key, "GET", "/organization/projects", nil)
				ended <- err
			}()
			require.Eventually(t, func() bool { return s.Count("GET", "") == 1 }, time.Minute, time.Millisecond)
			tb.end()
			select {
			case err := <-ended:
				require.Error(t, err)
			case <-time.After(time.Minute):
				t.Fatal("the request hangs after the server closed")
			}
		})
	}
}

func TestFaultSelection(t *testing.T) {
	s := start(t, Options{})
	project := s.AddProject("p")
	status := func(method, path string) int { return manage(t, s, method, path, nil).status }
	list, one := "/organization/projects", "/organization/projects/"+project

	s.Fail(Fault{Method: "GET", Route: projectRoute, Status: 501, Skip: 1, Times: 2})
	require.Equal(t, 200, status("GET", list), "the fault is for another route")
	require.Equal(t, []int{200, 501, 501, 200}, []int{status("GET", one), status("GET", one), status("GET", one), status("GET", one)})

	for _, route := range []string{one, basePath + one, "/organization/proj*", basePath + "/organization/*", basePath + projectRoute} {
		cancel := s.Fail(Fault{Route: route, Status: 502})
		require.Equal(t, 502, status("GET", one), route)
		cancel()
		cancel()
		require.Equal(t, 200, status("GET", one), route)
	}

	s.Fail(Fault{Status: 503, Match: func(r *http.Request) bool { return r.URL.Query().Get("limit") == "7" }})
	require.Equal(t, 200, status("GET", list+"?limit=8"))
	require.Equal(t, 503, status("GET", list+"?limit=7"))
	s.ClearFaults()
	require.Equal(t, 200, status("GET", list+"?limit=7"))

	s.Fail(Fault{Probability: 0.5, Status: 500})
	seen := map[int]int{}
	for range 200 {
		seen[status("GET", list)]++
	}
	require.Greater(t, seen[200], 50)
	require.Greater(t, seen[500], 50)
	s.ClearFaults()

	// The first of two matching faults strikes. The rate limit is applied before faults.
	s.Fail(Fault{Status: 501, Times: 1})
	s.Fail(Fault{Status: 502, Times: 1})
	require.Equal(t, []int{501, 502, 200}, []int{status("GET", list), status("GET", list), status("GET", list)})
	s.Fail(Fault{Status: 501, Times: 1})
	s.Configure(func(o *Options) { o.RatePerMinute, o.RateBurst = 1, 1 })
	require.Equal(t, 501, status("GET", list))
	require.Equal(t, 429, status("GET", list))
	require.Panics(t, func() { s.Fail(Fault{Kind: "nonsense"}) })
}

func TestFaultTimesUnderParallelRequests(t *testing.T) {
	s := start(t, Options{})
	_, key := s.AdminKey()
	s.Fail(Fault{Status: 500, Times: 5})
	var failed atomic.Int32
	done := make(chan struct{})
	for range 20 {
		go func() {
			defer func() { done <- struct{}{} }()
			if r, err := try(s, key, "GET", "/organization/projects", nil); err == nil && r.status == 500 {
				failed.Add(1)
			}
		}()
	}
	for range 20 {
		<-done
	}
	require.EqualValues(t, 5, failed.Load())
}

// A canceled request still takes effect.
func TestSlowFaultCommitsWithoutItsClient(t *testing.T) {
	s := start(t, Options{})
	s.KeepAll()
	_, key := s.AdminKey()
	project := s.AddProject("p")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	left := make(chan struct{})
	s.Fail(Fault{Kind: FaultSlow, Times: 1, OnStrike: func(*http.Request) {
		cancel()
		<-left
	}})
	req, err := http.NewRequestWithContext(ctx, "POST", s.URL()+accountsPath(project), strings.NewReader(`{"name":"x"}`))
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	_, err = http.DefaultClient.Do(req) //nolint:bodyclose // no response
	require.Error(t, err)
	require.Empty(t, s.Accounts())
	close(left)
	require.Eventually(t, func() bool { return len(s.Accounts()) == 1 }, time.Minute, time.Millisecond)
}
