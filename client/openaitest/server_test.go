// These tests check the request log, rate limits, connections, the leak check, the control
// plane, and parallel requests.

package openaitest

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRequestLog(t *testing.T) {
	s := start(t, Options{})
	rootID, _ := s.AdminKey()
	project := s.AddProject("p")
	manage(t, s, "GET", accountsPath(project)+"?limit=5", nil)
	send(t, s, "sk-unknown", "GET", accountsPath(project), nil)
	manage(t, s, "GET", "/nowhere", nil)
	log := s.Requests()
	require.Len(t, log, 3)
	require.Equal(t, accountsRoute, log[0].Route)
	require.Equal(t, basePath+accountsPath(project), log[0].Path)
	require.Equal(t, 200, log[0].Status)
	require.Equal(t, rootID, log[0].AuthKeyID)
	require.NotEmpty(t, log[0].RequestID)
	require.NotEmpty(t, log[0].RemoteAddr)
	require.Contains(t, log[0].UserAgent, "Go-http-client")
	require.Empty(t, log[1].AuthKeyID)
	require.Equal(t, 401, log[1].Status)
	require.Empty(t, log[2].Route)
	require.Equal(t, 2, s.Count("GET", accountsRoute))
	require.Equal(t, 3, s.Count("", ""))
	require.Equal(t, 0, s.Count("POST", ""))
	require.Positive(t, s.Connections())
	s.ResetRequests()
	require.Zero(t, s.Count("", ""))
}

func TestRateLimit(t *testing.T) {
	at := time.Now()
	s := start(t, Options{RatePerMinute: 6, RateBurst: 2, Clock: func() time.Time { return at }})
	get := func() reply { return manage(t, s, "GET", "/organization/projects", nil) }
	require.Equal(t, 200, get().status)
	require.Equal(t, 200, get().status)
	r := get()
	requireError(t, r, 429, "rate_limit_exceeded", "")
	require.Empty(t, r.header.Get("Retry-After"))
	require.Equal(t, 200, manage(t, s, "GET", "/organization/admin_api_keys", nil).status, "each endpoint has its own limit")
	require.Equal(t, 3, s.Count("GET", projectsRoute))
	s.Advance(10 * time.Second)
	require.Equal(t, 200, get().status)
	requireError(t, get(), 429, "rate_limit_exceeded", "")

	s.Configure(func(o *Options) { o.RetryAfter, o.RateBurst = true, 0 })
	for range 6 {
		require.Equal(t, 200, get().status)
	}
	require.Equal(t, "10", get().header.Get("Retry-After"))

	_, _, value := newAccount(t, s, s.AddProject("p"), object{"name": "a"})
	for range 20 {
		require.Equal(t, 200, send(t, s, value, "GET", "/models", nil).status, "inference requests are not limited")
	}
}

func TestLatency(t *testing.T) {
	s := start(t, Options{Latency: 40 * time.Millisecond})
	began := time.Now()
	manage(t, s, "GET", "/organization/projects", nil)
	require.GreaterOrEqual(t, time.Since(began), 40*time.Millisecond)
}

func TestTLSAndHTTP2(t *testing.T) {
	s := start(t, Options{TLS: true})
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM([]byte(s.CACert())))
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Get(s.URL() + "/models")
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 2, resp.ProtoMajor)
	require.Equal(t, 401, resp.StatusCode)
	s.Fail(Fault{Kind: FaultReset})
	_, err = client.Get(s.URL() + "/models") //nolint:bodyclose // no response
	require.Error(t, err)
}

// recorder is a testing.TB that records errors and runs its cleanups in end.
type recorder struct {
	testing.TB
	cleanups []func()
	errors   []string
}

func (r *recorder) Helper()             {}
func (r *recorder) Cleanup(f func())    { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Logf(string, ...any) {}
func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func (r *recorder) end() {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
}

func TestLeakCheck(t *testing.T) {
	leave := func(keep func(s *Server, account, key, admin string)) []string {
		tb := &recorder{TB: t}
		s := Start(tb, Options{})
		project := s.AddProject("p")
		s.AddServiceAccount(project, "a person's")
		s.AddAdminKey("a person's")
		r := manage(t, s, "POST", accountsPath(project), object{"name": "stray"})
		a := manage(t, s, "POST", "/organization/admin_api_keys", object{"name": "stray admin"})
		if keep != nil {
			keep(s, r.text(t, "id"), r.text(t, "api_key.id"), a.text(t, "id"))
		}
		tb.end()
		return tb.errors
	}
	errs := leave(nil)
	require.Len(t, errs, 2)
	require.Contains(t, errs[0], `"stray" in project p (live keys: key_`)
	require.Contains(t, errs[1], `"stray admin"`)
	errs = leave(func(s *Server, account, _, admin string) { s.Keep(account, admin) })
	require.Len(t, errs, 1, "keeping an account does not keep its keys")
	require.Contains(t, errs[0], "key key_")
	require.Empty(t, leave(func(s *Server, account, key, admin string) { s.Keep(account, key, admin) }))
	require.Empty(t, leave(func(s *Server, _, _, _ string) { s.KeepAll() }))
}

func TestControlPlane(t *testing.T) {
	s := New(Options{})
	hs := httptest.NewServer(s.WithControl())
	defer hs.Close()
	s.SetURL(hs.URL + basePath)
	project := s.AddProject("p")
	_, _, value := newAccount(t, s, project, object{"name": "a", "expires_in_seconds": 60})
	control := func(method, path, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, hs.URL+ControlPath+path, strings.NewReader(body))
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(text)
	}
	for _, path := range []string{"ledger", "alive", "requests"} {
		status, body := control("GET", path, "")
		require.Equal(t, 200, status)
		require.NotEmpty(t, body)
		require.NotContains(t, body, value)
	}
	_, body := control("GET", "alive", "")
	require.Contains(t, body, s.Keys()[0].ID)

	status, _ := control("POST", "faults", `{"kind":"status","status":503,"route":"/organization/*","times":1,"header":{"Retry-After":["7"]},"code":"busy"}`)
	require.Equal(t, 204, status)
	r := manage(t, s, "GET", "/organization/projects", nil)
	requireError(t, r, 503, "busy", "")
	require.Equal(t, "7", r.header.Get("Retry-After"))
	require.Equal(t, 200, manage(t, s, "GET", "/organization/projects", nil).status)
	control("POST", "faults", `{"kind":"reset"}`)
	status, _ = control("DELETE", "faults", "")
	require.Equal(t, 204, status)
	require.Equal(t, 200, manage(t, s, "GET", "/organization/projects", nil).status)

	control("DELETE", "requests", "")
	manage(t, s, "GET", "/organization/projects", nil)
	status, _ = control("POST", "accounts", `{"project_id":"`+project+`","count":3}`)
	require.Equal(t, 204, status)
	_, body = control("GET", "stats", "")
	require.JSONEq(t, `{"connections":0,"accounts":4,"calls":[{"method":"GET","route":"/organization/projects","status":200,"count":1}]}`, body)
	require.Empty(t, s.Leaks(), "accounts from the control plane are not leaks")
	status, _ = control("POST", "options", `{"rate_per_minute":60,"rate_burst":1}`)
	require.Equal(t, 204, status)
	require.Equal(t, 200, manage(t, s, "GET", "/organization/projects", nil).status)
	require.Equal(t, 429, manage(t, s, "GET", "/organization/projects", nil).status)
	status, _ = control("POST", "options", `{"latency":"1ms"}`)
	require.Equal(t, 204, status)
	require.Equal(t, 200, manage(t, s, "GET", "/organization/projects", nil).status)
	require.Equal(t, 429, manage(t, s, "GET", "/organization/projects", nil).status, "unspecified options are unchanged")
	control("POST", "options", `{"rate_per_minute":0}`)
	for path, bad := range map[string]string{"options": `{"latency":"-1s"}`, "accounts": `{"project_id":"nowhere","count":1}`} {
		status, body := control("POST", path, bad)
		require.Equal(t, 400, status, body)
	}
	status, _ = control("POST", "options", `{"rate_burst":-1}`)
	require.Equal(t, 400, status)
	for _, bad := range []string{`{"kind":"nonsense"}`, `{"kidn":"reset"}`, `{"delay":"soon"}`, `{"times":-1}`, `{"status":99}`, `{"probability":2}`, ``} {
		status, body := control("POST", "faults", bad)
		require.Equal(t, 400, status, body)
	}
	status, _ = control("POST", "clock", `{"advance":"1m"}`)
	require.Equal(t, 200, status)
	require.Equal(t, 401, send(t, s, value, "GET", "/models", nil).status)
	require.Equal(t, 404, manage(t, s, "GET", "/organization/projects//archive", nil).status, "the simulator does not clean paths")
	status, _ = control("GET", "nowhere", "")
	require.Equal(t, 404, status)
}

func TestDirectCalls(t *testing.T) {
	s := New(Options{})
	req, err := http.NewRequest("GET", "http://x/v1/models", nil)
	require.NoError(t, err)
	w := httptest.NewRecorder()
	s.ServeHTTP(w, req)
	require.Equal(t, 401, w.Code)
}

// Parallel requests with faults must not race, and the ledger must match the accounts that
// remain.
func TestHammer(t *testing.T) {
	s := start(t, Options{})
	_, root := s.AdminKey()
	projects := []string{s.AddProject("one"), s.AddProject("two")}
	s.Fail(Fault{Method: "POST", Kind: FaultStatusAfter, Status: 500, Probability: 0.1})
	s.Fail(Fault{Method: "DELETE", Kind: FaultLost, Probability: 0.1})
	s.Fail(Fault{Method: "GET", Kind: FaultReset, Probability: 0.1})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			project := projects[i%2]
			for n := range 15 {
				name := fmt.Sprintf("w%d-%d", i, n)
				r, err := try(s, root, "POST", accountsPath(project), object{"name": name, "expires_in_seconds": 30})
				if err == nil && r.status == 200 {
					id, _ := r.field("id").(string)
					value, _ := r.field("api_key.value").(string)
					_, _ = try(s, value, "GET", "/models", nil)
					_, _ = try(s, root, "DELETE", accountsPath(project)+"/"+id, nil)
				}
				_, _ = try(s, root, "GET", accountsPath(project), nil)
				s.Advance(time.Second)
				_, _, _, _ = s.Accounts(), s.Ledger(), s.Requests(), s.Leaks()
				s.Keep(name)
			}
		})
	}
	wg.Wait()
	s.ClearFaults()
	made, gone := map[string]bool{}, map[string]bool{}
	for _, e := range s.Ledger() {
		if e.Kind == KindAccount && e.Event == EventCreated {
			made[e.ID] = true
		} else if e.Kind == KindAccount && e.Event == EventDeleted {
			gone[e.ID] = true
		}
	}
	require.Len(t, made, 120)
	require.Len(t, s.Accounts(), len(made)-len(gone))
	for _, a := range s.Accounts() {
		require.Equal(t, 200, manage(t, s, "DELETE", accountsPath(a.ProjectID)+"/"+a.ID, nil).status)
	}
}
