package client

// All calls: their target and headers, the number of attempts, timeouts and connections.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestNew_RejectsInvalidOptions(t *testing.T) {
	t.Parallel()
	const password = "hunter2-hunter2"
	for name, change := range map[string]func(*Options){
		"no key":                 func(o *Options) { o.AdminKey = Secret{} },
		"empty key":              func(o *Options) { o.AdminKey = NewSecret("") },
		"path only":              func(o *Options) { o.BaseURL = "/v1" },
		"host only":              func(o *Options) { o.BaseURL = "api.openai.com/v1" },
		"no host":                func(o *Options) { o.BaseURL = "https:///v1" },
		"not HTTP":               func(o *Options) { o.BaseURL = "ftp://api.openai.com" },
		"not a URL":              func(o *Options) { o.BaseURL = "https://u:" + password + "@host:port\x00" },
		"no certificate":         func(o *Options) { o.CACert = []byte("-----BEGIN CERTIFICATE-----") },
		"a key as a certificate": func(o *Options) { o.CACert = []byte(testKey) },
		"credentials, no host":   func(o *Options) { o.BaseURL = "u:" + password + "@host" },
	} {
		o := Options{AdminKey: NewSecret(testKey), BaseURL: "https://api.openai.com/v1"}
		change(&o)
		c, err := New(o)
		require.Error(t, err, name)
		require.Nil(t, c, name)
		require.NotContains(t, err.Error(), password)
		require.NotContains(t, err.Error(), testKey)
	}
	c, err := New(Options{AdminKey: NewSecret(testKey)})
	require.NoError(t, err)
	require.Equal(t, "api.openai.com", c.Host())
	require.Equal(t, DefaultTimeout, c.timeout)
	require.Equal(t, DefaultConcurrency, cap(c.slots))
}

func TestBaseURL_WithAndWithoutSlashAndPath(t *testing.T) {
	t.Parallel()
	for _, base := range []string{"/v1", "/v1/", "/v1//", "", "/", "/proxy/openai/v1"} {
		var path atomic.Value
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			path.Store(r.URL.Path)
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"id":"p"}`)
		}))
		_, err := pointAt(t, server.URL+base).GetProject(context.Background(), "p")
		server.Close()
		require.NoError(t, err)
		require.Equal(t, strings.TrimRight(base, "/")+"/organization/projects/p", path.Load())
	}
}

// Not parallel, since it changes the environment of the process.
func TestEnvironment_ReachesNoRequest(t *testing.T) {
	decoy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("redirected by the environment: %s %s", r.Method, r.URL)
	}))
	defer decoy.Close()
	const mark = "from-the-environment"
	for name, value := range map[string]string{
		"OPENAI_BASE_URL":       decoy.URL,
		"OPENAI_API_KEY":        mark,
		"OPENAI_ADMIN_KEY":      mark,
		"OPENAI_ORG_ID":         mark,
		"OPENAI_PROJECT_ID":     mark,
		"OPENAI_WEBHOOK_SECRET": mark,
		"OPENAI_CUSTOM_HEADERS": "Authorization: Bearer " + mark + "\nX-Custom: " + mark + "\nUser-Agent: " + mark,
		"OPENAI_LOG":            "debug",
	} {
		t.Setenv(name, value)
	}
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	rec := record(sim)
	c := connect(t, sim)
	for name, v := range allCalls {
		if v.method != http.MethodDelete {
			require.NoError(t, v.call(context.Background(), c, on), name)
		}
	}
	_, key := sim.AdminKey()
	for _, r := range rec.requests() {
		require.NotContains(t, fmt.Sprint(r), mark)
		want := key
		if r.path == "/v1"+modelsRoute {
			want = on.value
		}
		require.Equal(t, []string{"Bearer " + want}, r.header["Authorization"])
		require.NotContains(t, r.header, "Openai-Organization")
		require.NotContains(t, r.header, "Openai-Project")
	}
}

func TestHeaders_AreExactlyTheExpected(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	on := populate(t, sim)
	rec := record(sim)
	for _, organization := range []string{"", sim.OrganizationID()} {
		c := connect(t, sim, func(o *Options) {
			o.Organization = organization
			o.UserAgent = "vault-plugin-secrets-openai/v1.2.3 (vault 1.21.2)"
		})
		for name, v := range allCalls {
			if v.method == http.MethodDelete {
				continue
			}
			require.NoError(t, v.call(context.Background(), c, on), name)
			h := rec.last(t).header
			organization := organization
			if name == "Probe" { // a project key determines its organization
				organization = ""
			}
			require.Equal(t, []string{"vault-plugin-secrets-openai/v1.2.3 (vault 1.21.2)"}, h["User-Agent"], name)
			require.Equal(t, organization, h.Get("OpenAI-Organization"), name)
			require.Equal(t, organization != "", h["Openai-Organization"] != nil, name)
			// With these headers, net/http may repeat a POST.
			require.Empty(t, h.Get("Idempotency-Key")+h.Get("X-Idempotency-Key"), name)
		}
	}
	_, err := connect(t, sim, func(o *Options) { o.Organization = "org-other" }).ListProjects(context.Background())
	require.Equal(t, "mismatched_organization", failed(t, err).Code)
}

func TestRedirects_AreNotFollowed(t *testing.T) {
	t.Parallel()
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, where := range []string{"another origin", "the same origin"} {
			t.Run(fmt.Sprintf("%d to %s", status, where), func(t *testing.T) {
				t.Parallel()
				elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
					t.Errorf("%s arrived with %q", r.Method, r.Header.Get("Authorization"))
				}))
				t.Cleanup(elsewhere.Close)
				var asked atomic.Int64
				c := serve(t, func(w http.ResponseWriter, r *http.Request) {
					asked.Add(1)
					target := "/v1/other"
					if where == "another origin" {
						target = elsewhere.URL + r.URL.Path
					}
					http.Redirect(w, r, target, status)
				})
				for name, v := range allCalls {
					asked.Store(0)
					e := failed(t, v.call(context.Background(), c, placeholderIDs))
					require.Equal(t, int64(1), asked.Load(), name)
					require.Equal(t, status, e.Status, name)
					require.ErrorContains(t, e, "redirects are not followed", name)
					require.False(t, e.NotFound() || e.Retryable(), name)
					requireFit(t, e, testKey)
				}
			})
		}
	}
}

func TestRedirect_WithoutLocationIsARedirect(t *testing.T) {
	t.Parallel()
	for _, location := range []string{"", "http://[::1%25/", "%zz"} {
		e := failed(t, allCalls["CreateServiceAccount"].call(context.Background(),
			answering(t, http.StatusFound, map[string]string{"Location": location}, ""), placeholderIDs))
		require.Equal(t, http.StatusFound, e.Status, "%q", location)
		require.ErrorContains(t, e, "redirects are not followed")
	}
}

// An answer without a JSON content type is not decoded: a page may start with a brace.
func TestAnswer_MustBeJSON(t *testing.T) {
	t.Parallel()
	for media, works := range map[string]bool{
		"application/json": true, "application/json; charset=utf-8": true, "APPLICATION/JSON": true, "application/problem+json": true,
		"text/html": false, "text/plain; charset=utf-8": false, "": false, "application/jsonp": false, ";": false,
	} {
		_, err := answering(t, http.StatusOK, map[string]string{"Content-Type": media}, `{"id":"p"}`).GetAdminKey(context.Background(), "p")
		require.Equal(t, works, err == nil, "%q: %v", media, err)
		if !works {
			require.ErrorContains(t, failed(t, err), "not the documented object")
		}
	}
}

func TestWithRequestID_IsThatOfTheLastAnswer(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	project := sim.AddProject("p")
	c := connect(t, sim)
	last := func() string { requests := sim.Requests(); return requests[len(requests)-1].RequestID }
	id := ""
	account, _, err := c.CreateServiceAccount(context.Background(), project, "n", time.Hour, WithRequestID(&id))
	require.NoError(t, err)
	require.Equal(t, last(), id)
	sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 503, Times: 1})
	require.NoError(t, c.DeleteServiceAccount(context.Background(), project, account.ID, WithRequestID(&id)))
	require.Equal(t, last(), id, "not the ID of the failed attempt")
	before := id
	require.True(t, IsNotFound(c.DeleteProjectKey(context.Background(), project, "none", WithRequestID(&id))))
	require.NotEqual(t, before, id, "an error has an ID, too")

	before = id
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _, err = c.CreateAdminKey(ctx, "r", time.Hour, WithRequestID(&id))
	require.Error(t, err)
	require.Equal(t, before, id)
}

// faults are transient failures of a call.
var faults = map[string]openaitest.Fault{
	"500":            {Status: 500},
	"500 after":      {Kind: openaitest.FaultStatusAfter, Status: 500},
	"503 with retry": {Status: 503, Header: http.Header{"Retry-After": {"0"}, "X-Should-Retry": {"true"}}},
	"429":            {Status: 429},
	"408":            {Status: 408},
	"409":            {Status: 409},
	"reset":          {Kind: openaitest.FaultReset},
	"lost":           {Kind: openaitest.FaultLost},
	"hang":           {Kind: openaitest.FaultHang},
	"garbage":        {Kind: openaitest.FaultGarbage},
	"garbage before": {Kind: openaitest.FaultGarbageBefore},
	"empty":          {Kind: openaitest.FaultEmpty},
	"empty object":   {Kind: openaitest.FaultEmptyObject},
	"truncated":      {Kind: openaitest.FaultTruncated},
	"HTML":           {Kind: openaitest.FaultHTML},
}

func TestCreates_AreSentOnce(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		on := populate(t, sim)
		c := connect(t, sim)
		for kind, fault := range faults {
			for name, v := range allCalls {
				if v.method != http.MethodPost || !v.once {
					continue
				}
				ctx, cancel := context.WithCancel(context.Background())
				// A rate that one fault teaches would slow down the next.
				c.rateLimiter = NewRateLimiter()
				_, err := c.ListProjects(ctx)
				require.NoError(t, err) // so that there is a connection to reuse
				sim.ResetRequests()
				fault.Method = http.MethodPost
				if fault.Kind == openaitest.FaultHang {
					fault.OnStrike = func(*http.Request) { cancel() }
				}
				heal := sim.Fail(fault)
				require.Error(t, v.call(ctx, c, on), "%s, %s", name, kind)
				require.Equal(t, 1, sim.Count("", ""), "%s, %s", name, kind)
				heal()
				cancel()
			}
		}
	})
}

func TestReadsAndDeletes_RetryTransientErrors(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		calls := map[string]func() error{}
		check := map[string]func(err error){}
		for kind, fault := range faults {
			sim := openaitest.Start(t, o)
			on := populate(t, sim)
			c := connect(t, sim)
			fault.Times = 2
			if fault.Kind == openaitest.FaultHang {
				c, fault.Times = connect(t, sim, withTimeout(5*time.Second)), 1
			}
			struck := int64(fault.Times)
			for name, v := range allCalls {
				switch {
				case v.once:
					continue
				case kind != "500" && name != "ListProjects" && name != "DeleteAdminKey" && name != "UpdateProjectKey":
					continue // one call of each kind is enough
				case name == "DeleteProjectKey":
					continue // another call deletes the account with this key
				}
				fault.Method, fault.Route = v.method, v.route
				var strikes atomic.Int64
				fault.OnStrike = func(*http.Request) { strikes.Add(1) }
				sim.Fail(fault)
				id := name + ", " + kind
				on := on
				if v.method == http.MethodDelete { // the other calls need their account and key
					on.account = sim.AddServiceAccount(on.project, "to be deleted")
					on.adminKey, _ = sim.AddAdminKey("to be deleted")
				}
				calls[id] = func() error { return v.call(context.Background(), c, on) }
				check[id] = func(err error) {
					// A delete whose response was lost took effect: the retry finds nothing.
					if v.method != http.MethodDelete || !IsNotFound(err) {
						require.NoError(t, err, id)
						require.Equal(t, struck, strikes.Load(), id)
					}
				}
			}
		}
		for id, err := range together(calls) {
			check[id](err)
		}
	})
}

func TestReadsAndDeletes_BoundTheAttempts(t *testing.T) {
	t.Parallel()
	calls := map[string]func() error{}
	check := map[string]func(err error){}
	for kind, test := range map[string]struct {
		fault openaitest.Fault
		want  int
	}{
		"500":                  {openaitest.Fault{Status: 500}, maxAttempts},
		"reset":                {openaitest.Fault{Kind: openaitest.FaultReset}, maxAttempts},
		"empty":                {openaitest.Fault{Kind: openaitest.FaultGarbageBefore, Body: "{}"}, maxAttempts},
		"400":                  {openaitest.Fault{Status: 400}, 1},
		"401":                  {openaitest.Fault{Status: 401}, 1},
		"403":                  {openaitest.Fault{Status: 403}, 1},
		"404":                  {openaitest.Fault{Status: 404}, 1},
		"501":                  {openaitest.Fault{Status: 501}, 1},
		"spend limit":          {openaitest.Fault{Status: 429, Code: "project_spend_limit_exceeded"}, 1},
		"400 with Retry-After": {openaitest.Fault{Status: 400, Header: http.Header{"X-Should-Retry": {"true"}, "Retry-After": {"1"}}}, 1},
		"a long wait":          {openaitest.Fault{Status: 429, Header: http.Header{"Retry-After": {"61"}}}, 1},
	} {
		sim := openaitest.Start(t, openaitest.Options{})
		on := populate(t, sim)
		c := connect(t, sim)
		sim.Fail(test.fault)
		for name, v := range allCalls {
			if v.once {
				continue
			}
			id := name + ", " + kind
			calls[id] = func() error { return v.call(context.Background(), c, on) }
			check[id] = func(err error) {
				require.Error(t, err, id)
				require.Equal(t, test.want, sim.Count(v.method, v.route), id)
				require.Equal(t, test.fault.Status, failed(t, err).Status*min(1, test.fault.Status), id)
			}
		}
	}
	for id, err := range together(calls) {
		check[id](err)
	}
}

func TestRetryAfter_IsHonouredWithinTheContext(t *testing.T) {
	t.Parallel()
	fault := openaitest.Fault{Status: 429, Times: 1, Header: http.Header{"Retry-After": {"1"}}}
	t.Run("waits as long as Retry-After", func(t *testing.T) {
		t.Parallel()
		sim := openaitest.Start(t, openaitest.Options{})
		sim.Fail(fault)
		began := time.Now()
		_, err := connect(t, sim).ListProjects(context.Background())
		require.NoError(t, err)
		require.GreaterOrEqual(t, time.Since(began), time.Second)
		require.Equal(t, 2, sim.Count("", ""))
	})
	t.Run("does not wait if the context ends first", func(t *testing.T) {
		t.Parallel()
		sim := openaitest.Start(t, openaitest.Options{})
		fault := fault
		fault.Header = http.Header{"Retry-After": {"30"}}
		sim.Fail(fault)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_, err := connect(t, sim).ListProjects(ctx)
		require.True(t, failed(t, err).RateLimited(), "OpenAI's error, not the deadline")
		require.GreaterOrEqual(t, AsError(err).RetryAfter, 29*time.Second)
		require.NoError(t, ctx.Err())
	})
	t.Run("waits until the context is canceled", func(t *testing.T) {
		t.Parallel()
		sim := openaitest.Start(t, openaitest.Options{})
		fault := fault
		fault.Header = http.Header{"Retry-After": {"60"}}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		fault.OnStrike = func(*http.Request) { time.AfterFunc(500*time.Millisecond, cancel) }
		sim.Fail(fault)
		began := time.Now()
		_, err := connect(t, sim).ListProjects(ctx)
		require.True(t, failed(t, err).RateLimited())
		require.Less(t, time.Since(began), 30*time.Second)
	})
	t.Run("retries within the context without Retry-After", func(t *testing.T) {
		t.Parallel()
		sim := openaitest.Start(t, openaitest.Options{})
		sim.Fail(openaitest.Fault{Status: 429})
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := connect(t, sim).ListProjects(ctx)
		require.True(t, failed(t, err).RateLimited())
		require.GreaterOrEqual(t, sim.Count("", ""), 2)
		require.LessOrEqual(t, sim.Count("", ""), maxAttempts, "no retry storm")
	})
}

func TestBackoff_GrowsWithJitterUpToItsCap(t *testing.T) {
	t.Parallel()
	for attempt, top := range map[int]time.Duration{0: 250 * time.Millisecond, 1: 500 * time.Millisecond, 4: 4 * time.Second, 5: 8 * time.Second, 1000: 8 * time.Second} {
		different := map[time.Duration]bool{}
		for range 100 {
			d := Backoff(attempt, 0)
			require.GreaterOrEqual(t, d, top/2)
			require.LessOrEqual(t, d, top)
			different[d] = true
		}
		require.Greater(t, len(different), 10)
		require.Equal(t, time.Minute, Backoff(attempt, time.Minute))
	}
	require.NoError(t, Wait(context.Background(), 0))
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	require.ErrorIs(t, Wait(ctx, time.Hour), context.DeadlineExceeded)
	cancel()
	require.ErrorIs(t, Wait(ctx, time.Millisecond), context.Canceled)
}

func TestTimeout_EndsAHangingCall(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		on := populate(t, sim)
		sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang, Method: http.MethodPost})
		began := time.Now()
		err := allCalls["CreateServiceAccount"].call(context.Background(), connect(t, sim, withTimeout(200*time.Millisecond)), on)
		require.ErrorIs(t, failed(t, err), context.DeadlineExceeded)
		require.Less(t, time.Since(began), DefaultTimeout/2)
	})
}

// The timeout also applies after the headers have arrived.
func TestTimeout_CoversTheBody(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		for range 100 {
			_, _ = io.WriteString(w, " ")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}, withTimeout(200*time.Millisecond))
	began := time.Now()
	_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
	require.ErrorIs(t, failed(t, err), context.DeadlineExceeded)
	require.True(t, AsError(err).Ambiguous())
	require.Less(t, time.Since(began), DefaultTimeout/2)
}

func TestCancel_EndsACallImmediately(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		for _, name := range []string{"CreateServiceAccount", "DeleteServiceAccount", "ListProjects"} {
			sim := openaitest.Start(t, o)
			on := populate(t, sim)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { cancel() }})
			began := time.Now()
			e := failed(t, allCalls[name].call(ctx, connect(t, sim), on))
			require.ErrorIs(t, e, context.Canceled, name)
			require.True(t, e.Sent, name)
			require.Less(t, time.Since(began), DefaultTimeout/2, name)
			require.Equal(t, 1, sim.Count("", ""), "%s: no retry", name)
		}
	})
}

// burst makes concurrent calls and returns the maximum that the server saw at a time.
func burst(t *testing.T, sim *openaitest.Server, c *Client, calls, concurrency int) int64 {
	t.Helper()
	var now, most atomic.Int64
	var wg sync.WaitGroup
	sim.Fail(openaitest.Fault{Match: func(*http.Request) bool {
		n := now.Add(1)
		defer now.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		time.Sleep(2 * time.Millisecond)
		return false
	}})
	work := make(chan int, calls)
	for i := range calls {
		work <- i
	}
	close(work)
	for range concurrency {
		wg.Go(func() {
			for i := range work {
				var err error
				if i%2 == 0 {
					_, err = c.ListProjects(context.Background())
				} else {
					_, _, err = c.CreateAdminKey(context.Background(), "r", time.Hour)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	return most.Load()
}

func TestConnections_AreReused(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		sim.KeepAll()
		// Without a limit, net/http may dial for a call that then uses an idle
		// connection.
		c := connect(t, sim, withConcurrency(16))
		_, err := c.ListProjects(context.Background())
		require.NoError(t, err)
		most := burst(t, sim, c, 200, 16)
		require.LessOrEqual(t, sim.Connections(), 16)
		require.Greater(t, most, int64(4), "the calls run in parallel")
		if o.TLS {
			require.Equal(t, 1, sim.Connections())
		}
		burst(t, sim, c, 100, 16)
		require.LessOrEqual(t, sim.Connections(), 16, "idle connections are kept")
	})
}

// In a first burst HTTP/2 opens more connections than it needs; the surplus must be closed
// and not opened again.
func TestConnections_HTTP2BurstLeavesOne(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{TLS: true})
	sim.KeepAll()
	c := connect(t, sim)
	burst(t, sim, c, 64, 16)
	dialled := sim.Connections()
	require.LessOrEqual(t, dialled, 16)
	burst(t, sim, c, 64, 16)
	require.Equal(t, dialled, sim.Connections())
}

func TestConcurrency_BoundsTheCallsInFlight(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		sim.KeepAll()
		c := connect(t, sim, withConcurrency(3))
		require.LessOrEqual(t, burst(t, sim, c, 60, 12), int64(3))
		require.LessOrEqual(t, sim.Connections(), 3)

		// A call that waits for a slot ends with its context, unsent.
		holding := make(chan struct{}, 3)
		release, let := context.WithCancel(context.Background())
		sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { holding <- struct{}{} }})
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { _, _ = c.ListProjects(release) })
		}
		for range 3 {
			<-holding
		}
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		_, _, err := c.CreateAdminKey(ctx, "r", time.Hour)
		require.ErrorIs(t, failed(t, err), context.DeadlineExceeded)
		require.False(t, AsError(err).Sent || AsError(err).Ambiguous())
		let()
		wg.Wait()
	})
}

// Each class leaves some of the calls in flight to the other, so that an API that hangs for
// one does not block both.
func TestConcurrency_ReservesSlotsForBothClasses(t *testing.T) {
	t.Parallel()
	for total, left := range map[int]int{4: 1, 7: 1, 16: 2, 64: 8} {
		for _, method := range []string{http.MethodPost, http.MethodGet} {
			t.Run(fmt.Sprintf("%d, %s hangs", total, method), func(t *testing.T) {
				t.Parallel()
				sim := openaitest.Start(t, openaitest.Options{})
				sim.KeepAll()
				project := sim.AddProject("apps")
				c := connect(t, sim, withConcurrency(total))
				calls := map[string]func(context.Context) error{
					http.MethodPost: func(ctx context.Context) error {
						_, _, err := c.CreateServiceAccount(ctx, project, "n", time.Hour)
						return err
					},
					http.MethodGet: func(ctx context.Context) error {
						_, err := c.ListProjects(ctx)
						return err
					},
				}
				holding := make(chan struct{}, 2*total)
				sim.Fail(openaitest.Fault{Method: method, Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { holding <- struct{}{} }})
				ctx, release := context.WithCancel(context.Background())
				defer release()
				var wg sync.WaitGroup
				for range 2 * total {
					wg.Go(func() { _ = calls[method](ctx) })
				}
				for range total - left {
					<-holding
				}
				other := http.MethodGet
				if method == other {
					other = http.MethodPost
				}
				bounded, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				require.NoError(t, calls[other](bounded))
				require.Empty(t, holding, "no further call is in flight")
				release()
				wg.Wait()
			})
		}
	}
}

// DialContext determines the target of connections, regardless of endpoint and environment.
func TestDialContext_DisablesProxies(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	real := strings.TrimSuffix(strings.TrimPrefix(sim.URL(), "http://"), "/v1")
	var asked atomic.Value
	c := connect(t, sim, func(o *Options) {
		o.BaseURL = "http://api.example.com/v1"
		o.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			asked.Store(network + " " + address)
			var d net.Dialer
			return d.DialContext(ctx, network, real)
		}
	})
	require.Nil(t, c.http.Proxy, "a proxy of the environment would be dialed instead")
	_, err := c.ListProjects(context.Background())
	require.NoError(t, err)
	require.Equal(t, "tcp api.example.com:80", asked.Load())
	require.NotNil(t, connect(t, sim).http.Proxy)

	refused := errors.New("no way")
	c = connect(t, sim, func(o *Options) {
		o.DialContext = func(context.Context, string, string) (net.Conn, error) { return nil, refused }
	})
	_, _, err = c.CreateAdminKey(context.Background(), "r", time.Hour)
	require.ErrorIs(t, failed(t, err), refused)
	require.False(t, AsError(err).Sent)
}

// newCA creates a certificate authority that signed no certificate in use.
func newCA(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestCACert_IsTheOnlyRootTrusted(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{TLS: true})
	right, other := []byte(sim.CACert()), newCA(t)
	for name, test := range map[string]struct {
		roots []byte
		works bool
	}{
		"its own CA":       {right, true},
		"another CA":       {other, false},
		"a bundle":         {append(other[:len(other):len(other)], right...), true},
		"the system's CAs": {nil, false},
		"with a comment":   {append([]byte("# our roots\n"), right...), true},
	} {
		_, err := connect(t, sim, func(o *Options) { o.CACert = test.roots }).ListProjects(context.Background())
		if test.works {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, failed(t, err), "certificate signed by unknown authority", name)
	}
	require.Equal(t, 3, sim.Count("", ""), "no request is sent to an untrusted server")
}

// stallingProxy forwards connections until it stalls the open ones, as a firewall that
// dropped their state.
func stallingProxy(t *testing.T, to string) (address string, stall func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	var mu sync.Mutex
	silent := make(chan struct{})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				_ = client.Close()
				continue
			}
			t.Cleanup(func() { _, _ = client.Close(), server.Close() })
			mu.Lock()
			mine := silent
			mu.Unlock()
			pipe := func(to, from net.Conn) {
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					if err != nil {
						_ = to.Close()
						return
					}
					select {
					case <-mine: // dropped
					default:
						_, _ = to.Write(buf[:n])
					}
				}
			}
			go pipe(server, client)
			go pipe(client, server)
		}
	}()
	return l.Addr().String(), func() {
		mu.Lock()
		defer mu.Unlock()
		close(silent)
		silent = make(chan struct{})
	}
}

// All calls share one HTTP/2 connection, so a stalled one must be detected quickly.
func TestConnections_SilentOneIsReplaced(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		host := strings.TrimSuffix(sim.URL()[strings.Index(sim.URL(), "//")+2:], "/v1")
		proxy, stall := stallingProxy(t, host)
		c := connect(t, sim, withTimeout(time.Second), func(o *Options) {
			o.BaseURL = strings.Replace(o.BaseURL, host, proxy, 1)
		})
		_, err := c.ListProjects(context.Background())
		require.NoError(t, err)
		stall()
		_, err = c.ListProjects(context.Background())
		require.NoError(t, err)
		require.Equal(t, 2, sim.Connections())
	})
}

func TestClose_DropsOnlyIdleConnections(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		c := connect(t, sim)
		inFlight := make(chan struct{})
		sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, Delay: 200 * time.Millisecond, Times: 1,
			OnStrike: func(*http.Request) { close(inFlight) }})
		done := make(chan error)
		go func() {
			_, err := c.ListProjects(context.Background())
			done <- err
		}()
		<-inFlight
		c.Close()
		require.NoError(t, <-done)
		_, err := c.ListProjects(context.Background())
		require.NoError(t, err, "a closed client still serves its callers")
	})
}

func BenchmarkCreateServiceAccount(b *testing.B) {
	for name, o := range map[string]openaitest.Options{"proto=HTTP1": {}, "proto=HTTP2": {TLS: true}} {
		b.Run(name, func(b *testing.B) {
			sim := openaitest.Start(b, o)
			sim.KeepAll()
			project := sim.AddProject("p")
			c := connect(b, sim)
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := c.CreateServiceAccount(context.Background(), project, "n", time.Hour); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
