package broker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestProxy_ForwardsWithTheKeyInPlaceOfThePlaceholder(t *testing.T) {
	w := newWorld(t, nil)
	var got response
	req := w.request("POST", "/v1/responses?x=1", `{"model":"gpt-5-mini","input":"secret text"}`)
	for name, value := range map[string]string{
		"OpenAI-Organization": "org-other", "OpenAI-Project": "proj_other", "Openai_organization": "org-other", "Api-Key": "sk-other",
		"X-Api-Key": "sk-other", "Cookie": "a=b", "Proxy-Authorization": "Basic x", "X-HTTP-Method-Override": "DELETE",
		"X-Forwarded-For": "1.2.3.4", "OpenAI-Beta": "realtime=v1",
	} {
		req.Header[name] = []string{value}
	}
	seen := w.seen(func() { got = w.do(req) })
	require.Equal(t, 200, got.status, got.body)
	require.Equal(t, "Bearer "+w.sim.Keys()[0].Value, seen.Header.Get("Authorization"))
	require.Equal(t, "x=1", seen.URL.RawQuery)
	require.Equal(t, strings.TrimPrefix(w.sim.URL(), "http://"), seen.Host+"/v1")
	require.Equal(t, "realtime=v1", seen.Header.Get("OpenAI-Beta"))
	for _, name := range []string{"OpenAI-Organization", "OpenAI-Project", "Api-Key", "X-Api-Key", "Cookie", "Proxy-Authorization", "X-Http-Method-Override", "X-Forwarded-For"} {
		require.Empty(t, seen.Header.Get(name), name)
	}
	require.Empty(t, seen.Header["Openai_organization"])

	w.eventually("end")
	records := w.records()
	require.Len(t, records, 2)
	start, end := records[0], records[1]
	require.Equal(t, []string{"start", "end"}, []string{start.Event, end.Event})
	require.Equal(t, start.ID, end.ID)
	require.Equal(t, w.sim.Keys()[0].ID, start.KeyID)
	require.NotEmpty(t, start.LeaseID)
	require.Equal(t, record{
		Time: end.Time, Event: "end", ID: start.ID, Agent: "r", Method: "POST", Path: "/v1/responses", Model: "gpt-5-mini",
		KeyID: start.KeyID, LeaseID: start.LeaseID, Status: 200, RequestID: got.header.Get("X-Request-Id"), BytesIn: 44,
		BytesOut: int64(len(got.body)), Millis: end.Millis, Outcome: "answered",
	}, end)
	content, err := os.ReadFile(w.b.config.Audit)
	require.NoError(t, err)
	require.NotContains(t, string(content), "secret text")
	require.NotContains(t, string(content), "x=1")
}

// Each response of the table in docs/broker.md, as sent on the wire.
func TestProxy_RefusesWhatItDoesNotKnow(t *testing.T) {
	w := newWorld(t, nil)
	auth := "Authorization: Bearer " + w.a.token + "\r\n"
	host := "Host: " + w.b.address + "\r\n"
	for _, c := range []struct{ name, line, headers, want string }{
		{"allowed", "GET /v1/models HTTP/1.1", host + auth, "200"},
		{"localhost", "GET /v1/models HTTP/1.1", "Host: localhost:" + strings.Split(w.b.address, ":")[1] + "\r\n" + auth, "200"},
		{"no token", "GET /v1/models HTTP/1.1", host, "broker_token"},
		{"wrong token", "GET /v1/models HTTP/1.1", host + "Authorization: Bearer sk-broker-x\r\n", "broker_token"},
		{"basic", "GET /v1/models HTTP/1.1", host + "Authorization: Basic " + w.a.token + "\r\n", "broker_token"},
		{"two tokens", "GET /v1/models HTTP/1.1", host + auth + "Authorization: Bearer sk-other\r\n", "broker_token"},
		{"the same token twice", "GET /v1/models HTTP/1.1", host + auth + auth, "broker_token"},
		{"another host", "GET /v1/models HTTP/1.1", "Host: evil.example\r\n" + auth, "broker_host"},
		{"rebound host with the port", "GET /v1/models HTTP/1.1", "Host: evil.example:" + strings.Split(w.b.address, ":")[1] + "\r\n" + auth, "broker_host"},
		{"no port", "GET /v1/models HTTP/1.1", "Host: 127.0.0.1\r\n" + auth, "broker_host"},
		{"trailing dot in host", "GET /v1/models HTTP/1.1", "Host: localhost.:" + strings.Split(w.b.address, ":")[1] + "\r\n" + auth, "broker_host"},
		{"origin", "GET /v1/models HTTP/1.1", host + auth + "Origin: http://localhost\r\n", "broker_origin"},
		{"empty origin", "GET /v1/models HTTP/1.1", host + auth + "Origin:\r\n", "broker_origin"},
		{"null origin", "OPTIONS /v1/models HTTP/1.1", host + auth + "Origin: null\r\n", "broker_origin"},
		{"absolute form", "GET http://" + w.b.address + "/v1/models HTTP/1.1", host + auth, "broker_host"},
		{"absolute form of another host", "GET https://api.openai.com/v1/organization/projects HTTP/1.1", host + auth, "broker_host"},
		{"connect", "CONNECT api.openai.com:443 HTTP/1.1", host + auth, "broker_host"},
		{"options star", "OPTIONS * HTTP/1.1", host + auth, "broker_method"},
		{"trace", "TRACE /v1/models HTTP/1.1", host + auth, "broker_method"},
		{"put", "PUT /v1/models HTTP/1.1", host + auth, "broker_method"},
		{"http/1.0", "GET /v1/models HTTP/1.0", host + auth, "200"},
		{"two hosts", "GET /v1/models HTTP/1.1", host + "Host: evil.example\r\n" + auth, "400"},
		{"hop-by-hop authorization", "GET /v1/models HTTP/1.1", host + auth + "Connection: Authorization\r\n", "200"},
		{"organization", "GET /v1/organization/projects HTTP/1.1", host + auth, "broker_never_allowed"},
		{"organization, escaped", "GET /v1/%6frganization/projects HTTP/1.1", host + auth, "broker_never_allowed"},
		{"organization, upper case", "GET /v1/ORGANIZATION/projects HTTP/1.1", host + auth, "broker_never_allowed"},
		{"dot segments", "GET /v1/models/../organization/projects HTTP/1.1", host + auth, "broker_path"},
		{"escaped dots", "GET /v1/models/%2e%2e/organization HTTP/1.1", host + auth, "broker_path"},
		{"escaped slash", "GET /v1/models%2f..%2forganization HTTP/1.1", host + auth, "broker_path"},
		{"double slash", "GET /v1//organization/projects HTTP/1.1", host + auth, "broker_path"},
		{"double slash at the start", "GET //v1/models HTTP/1.1", host + auth, "broker_path"},
		{"semicolon", "GET /v1/models;/organization HTTP/1.1", host + auth, "broker_path"},
		{"trailing dot", "GET /v1/models./x HTTP/1.1", host + auth, "broker_path"},
		{"trailing slash", "GET /v1/models/ HTTP/1.1", host + auth, "broker_path"},
		{"backslash", "GET /v1/models\\..\\organization HTTP/1.1", host + auth, "broker_path"},
		{"double escape", "GET /v1/models/%252e%252e/x HTTP/1.1", host + auth, "broker_path"},
		{"nul", "GET /v1/models/%00 HTTP/1.1", host + auth, "broker_path"},
		{"no version", "GET /models HTTP/1.1", host + auth, "broker_path"},
		{"another version", "GET /v2/models HTTP/1.1", host + auth, "broker_path"},
		{"root", "GET / HTTP/1.1", host + auth, "broker_path"},
		{"unknown family", "GET /v1/fine_tuning/jobs HTTP/1.1", host + auth, "broker_not_allowed"},
		{"longer family", "GET /v1/modelsx HTTP/1.1", host + auth, "broker_not_allowed"},
		{"upper case family", "GET /v1/Models HTTP/1.1", host + auth, "broker_not_allowed"},
		{"half a family", "POST /v1/chat HTTP/1.1", host + auth, "broker_not_allowed"},
		{"minting", "POST /v1/realtime/client_secrets HTTP/1.1", host + auth, "broker_never_allowed"},
		{"minting, escaped", "POST /v1/realtime/client%5fsecrets HTTP/1.1", host + auth, "broker_never_allowed"},
		{"minting translations", "POST /v1/realtime/translations/client_secrets HTTP/1.1", host + auth, "broker_never_allowed"},
		{"minting sessions", "POST /v1/realtime/sessions HTTP/1.1", host + auth, "broker_never_allowed"},
		{"minting transcriptions", "POST /v1/realtime/transcription_sessions HTTP/1.1", host + auth, "broker_never_allowed"},
		{"minting chatkit", "POST /v1/chatkit/sessions HTTP/1.1", host + auth, "broker_never_allowed"},
		{"projects", "GET /v1/projects/p HTTP/1.1", host + auth, "broker_never_allowed"},
		{"vaults", "GET /v1/vaults HTTP/1.1", host + auth, "broker_never_allowed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(w.sim.Requests())
			got := w.raw(c.line + "\r\n" + c.headers + "Connection: close\r\n\r\n")
			require.Contains(t, got, c.want)
			if c.want != "200" {
				require.Len(t, w.sim.Requests(), before, "the request reached OpenAI")
			}
		})
	}
	for _, r := range w.records() {
		if r.Event == "refused" {
			require.Positive(t, r.Status)
			require.NotEmpty(t, r.Outcome)
		}
	}
}

func TestProxy_EventsArriveAsOpenAISendsThem(t *testing.T) {
	w := newWorld(t, nil)
	w.sim.Configure(func(o *openaitest.Options) { o.StreamDelay = 100 * time.Millisecond })
	resp, err := http.DefaultClient.Do(w.request("POST", "/v1/responses", `{"model":"m","stream":true}`))
	require.NoError(t, err)
	defer resp.Body.Close()
	first := make(chan time.Time, 1)
	lines := bufio.NewScanner(resp.Body)
	n := 0
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "data: ") {
			if n++; n == 1 {
				first <- time.Now()
			}
		}
	}
	require.Equal(t, 4, n)
	require.Greater(t, time.Since(<-first), 150*time.Millisecond, "the first event came with the last")
	require.Equal(t, "answered", w.eventually("end").Outcome)
}

// eventually waits for the next line of a kind, which follows the response.
func (w *world) eventually(event string) (found record) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		all := w.records()
		found = all[len(all)-1]
		return found.Event == event
	}, 10*time.Second, 5*time.Millisecond)
	return found
}

func TestProxy_BothWebSocketsPass(t *testing.T) {
	w := newWorld(t, nil)
	for _, c := range []struct {
		path   string
		header http.Header
	}{
		{"/v1/realtime?model=gpt-realtime", http.Header{"Authorization": {"Bearer " + w.a.token}}},
		{"/v1/responses", http.Header{"Authorization": {"Bearer " + w.a.token}}},
		{"/v1/realtime?model=gpt-realtime", http.Header{"Sec-Websocket-Protocol": {"realtime, openai-insecure-api-key." + w.a.token + ", openai-organization.org-x, openai-project.proj_x"}}},
	} {
		var ws *openaitest.WebSocket
		var err error
		seen := w.seen(func() { ws, _, err = openaitest.DialWebSocket(w.b.address, c.path, c.header) })
		require.NoError(t, err)
		require.Equal(t, "Bearer "+w.sim.Keys()[0].Value, seen.Header.Get("Authorization"))
		require.NotContains(t, seen.Header.Get("Sec-Websocket-Protocol"), "openai-")
		require.NoError(t, ws.Write("hello"))
		text, err := ws.Read()
		require.NoError(t, err)
		require.Equal(t, "hello", text)
		require.NoError(t, ws.Close())
		end := w.eventually("end")
		require.Equal(t, 101, end.Status)
		require.Positive(t, end.BytesIn)
		require.Positive(t, end.BytesOut)
	}
	_, status, err := openaitest.DialWebSocket(w.b.address, "/v1/responses", http.Header{"Sec-Websocket-Protocol": {"realtime, openai-insecure-api-key.sk-broker-x"}})
	require.Error(t, err)
	require.Equal(t, 401, status)
}

func TestProxy_ASocketEndsWithItsKey(t *testing.T) {
	w := newWorld(t, nil)
	ws, _, err := openaitest.DialWebSocket(w.b.address, "/v1/responses", http.Header{"Authorization": {"Bearer " + w.a.token}})
	require.NoError(t, err)
	w.vault.revokeAll()
	require.Equal(t, 200, w.send("GET", "/v1/models", "").status, "the key is replaced after a 401")
	_, err = ws.Read()
	require.Error(t, err, "the socket of the revoked key is open")
	require.Eventually(t, func() bool {
		return slices.ContainsFunc(w.records(), func(r record) bool { return r.Path == "/v1/responses" && r.Outcome == "key_ended" })
	}, 10*time.Second, 5*time.Millisecond)
	require.Len(t, w.liveKeys(), 1)
}

func TestProxy_MaxSessionCutsARequest(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxSession = Duration(100 * time.Millisecond) })
	ws, _, err := openaitest.DialWebSocket(w.b.address, "/v1/responses", http.Header{"Authorization": {"Bearer " + w.a.token}})
	require.NoError(t, err)
	_, err = ws.Read()
	require.Error(t, err)
	require.Equal(t, "max_session", w.eventually("end").Outcome)
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang, Route: "/models"})
	defer cancel()
	got := w.send("GET", "/v1/models", "")
	require.Equal(t, 502, got.status)
	require.Equal(t, "max_session", got.code())
}

func TestProxy_ARefusedKeyIsReplacedOnceAndTheRequestRepeated(t *testing.T) {
	w := newWorld(t, nil)
	first := w.liveKeys()
	w.vault.slow = 200 * time.Millisecond // so that all requests wait for the first
	w.vault.revokeAll()
	var wait sync.WaitGroup
	var failed atomic.Int64
	for range 20 { // all use the refused key, and one replacement serves them
		wait.Go(func() {
			req := w.request("POST", "/v1/responses", `{"model":"gpt-5-mini"}`)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				failed.Add(1)
				return
			}
			if resp.Body.Close(); resp.StatusCode != 200 {
				failed.Add(1)
			}
		})
	}
	wait.Wait()
	require.Zero(t, failed.Load())
	require.Equal(t, 2, w.vault.called("openai/creds/"))
	require.NotEqual(t, first, w.liveKeys())
}

func TestProxy_ALargeUploadIsNotRepeatedButTheNextPasses(t *testing.T) {
	w := newWorld(t, nil)
	w.vault.revokeAll()
	upload := func() response {
		req := w.request("POST", "/v1/files", "")
		req.Body, req.ContentLength = io.NopCloser(io.LimitReader(zeros{}, 2<<20)), 2<<20
		return w.do(req)
	}
	got := upload()
	require.Equal(t, 401, got.status)
	require.Equal(t, "broker_key_replaced", got.code())
	got = upload()
	require.Equal(t, 200, got.status, got.body)
	require.EqualValues(t, 2<<20, w.eventually("end").BytesIn)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

func TestProxy_OpenAIsWordsAboutAKeyDoNotPass(t *testing.T) {
	w := newWorld(t, nil)
	cancel := w.sim.Fail(openaitest.Fault{Route: "/models", Status: 401, Code: "invalid_api_key", Message: "Incorrect API key provided: sk-svcac***abcd."})
	defer cancel()
	got := w.send("GET", "/v1/models", "")
	require.Equal(t, 401, got.status)
	require.Equal(t, "broker_key_refused", got.code())
	require.NotContains(t, got.body, "sk-svcac")

	// OpenAI refused two new keys, so the next request has to wait.
	got = w.send("GET", "/v1/models", "")
	require.Equal(t, 503, got.status, got.body)
	require.Equal(t, "broker_no_key", got.code())
	require.NotEmpty(t, got.header.Get("Retry-After"))
	require.Equal(t, 2, w.vault.called("openai/creds/"))
}

func TestProxy_VaultsWordsReachTheAgentWhenItRejects(t *testing.T) {
	w := newWorld(t, nil)
	w.vault.set(func() { w.vault.reject = "openai/creds" })
	w.vault.revokeAll()
	got := w.send("GET", "/v1/models", "")
	require.Equal(t, 403, got.status)
	require.Equal(t, "broker_no_key", got.code())
	require.Contains(t, got.body, "permission denied")
	require.Positive(t, w.vault.called("auth/token/revoke-self"), "the token is revoked, and with it a lease whose response was lost")
}

func TestProxy_CloseCutsWhatIsInProgress(t *testing.T) {
	w := newWorld(t, nil)
	ws, _, err := openaitest.DialWebSocket(w.b.address, "/v1/responses", http.Header{"Authorization": {"Bearer " + w.a.token}})
	require.NoError(t, err)
	struck := make(chan struct{}, 1)
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang, Route: "/models", OnStrike: func(*http.Request) { struck <- struct{}{} }})
	defer cancel()
	go func() {
		resp, err := http.DefaultClient.Do(w.request("GET", "/v1/models", ""))
		if err == nil {
			_ = resp.Body.Close()
		}
	}()
	<-struck
	require.NoError(t, w.b.close(50*time.Millisecond))
	_, err = ws.Read()
	require.Error(t, err)
	require.Eventually(t, func() bool {
		stopped := 0
		for _, r := range w.records() {
			if r.Event == "end" && (r.Outcome == "stopped" || r.Outcome == "key_ended") {
				stopped++
			}
		}
		return stopped == 2
	}, 10*time.Second, 5*time.Millisecond)
	require.Empty(t, w.liveKeys())
}

func TestProxy_UnreachableOpenAI(t *testing.T) {
	w := newWorld(t, nil)
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultReset})
	defer cancel()
	got := w.send("POST", "/v1/responses", `{"model":"m"}`)
	require.Equal(t, 502, got.status)
	require.Equal(t, "broker_unreachable", got.code())
	require.Equal(t, "broker_unreachable", w.eventually("end").Outcome)
}

func TestProxy_AnAnswerThatBreaksOffIsRecorded(t *testing.T) {
	w := newWorld(t, nil)
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultTruncated})
	defer cancel()
	resp, err := http.DefaultClient.Do(w.request("GET", "/v1/models", ""))
	require.NoError(t, err)
	defer resp.Body.Close()
	_, err = io.ReadAll(resp.Body)
	require.Error(t, err, "a truncated response looks complete")
	require.Equal(t, "broken_off", w.eventually("end").Outcome)
}

func TestProxy_TheAgentsCancelReachesOpenAI(t *testing.T) {
	w := newWorld(t, nil)
	struck := make(chan struct{}, 1)
	cancelFault := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { struck <- struct{}{} }})
	defer cancelFault()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-struck
		cancel()
	}()
	_, err := http.DefaultClient.Do(w.request("POST", "/v1/responses", `{"model":"m"}`).WithContext(ctx)) //nolint:bodyclose // there is no response
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, "canceled", w.eventually("end").Outcome)
	drained, done := context.WithTimeout(t.Context(), 10*time.Second)
	defer done()
	require.NoError(t, w.sim.CloseConnections(drained), "OpenAI still works on the request")
}

func TestProxy_RedirectsAndCookies(t *testing.T) {
	w := newWorld(t, nil)
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultRedirect, Times: 1, Header: http.Header{"Set-Cookie": {"a=b"}, "Alt-Svc": {"h3=x"}, "Location": {"https://elsewhere.invalid/"}}})
	defer cancel()
	resp, err := http.DefaultTransport.RoundTrip(w.request("GET", "/v1/models", ""))
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, 307, resp.StatusCode, "passed on, not followed")
	require.Equal(t, "https://elsewhere.invalid/", resp.Header.Get("Location"))
	require.Empty(t, resp.Header.Get("Set-Cookie"))
	require.Empty(t, resp.Header.Get("Alt-Svc"))
}

func TestProxy_Limits(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Agents[0].MaxConcurrent, c.Agents[0].MaxRPM = 1, 3 })
	struck, release := make(chan struct{}), make(chan struct{})
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, Times: 1, OnStrike: func(*http.Request) { close(struck); <-release }})
	defer cancel()
	done := make(chan response, 1)
	go func() { done <- w.send("GET", "/v1/models", "") }()
	<-struck
	got := w.send("GET", "/v1/models", "")
	require.Equal(t, 429, got.status)
	require.Equal(t, "broker_concurrency", got.code())
	close(release)
	require.Equal(t, 200, (<-done).status)
	for range 2 { // immediately after each other
		require.Equal(t, 200, w.send("GET", "/v1/models", "").status)
	}
	got = w.send("GET", "/v1/models", "")
	require.Equal(t, 429, got.status)
	require.Equal(t, "broker_rate", got.code())
	require.Equal(t, "20", got.header.Get("Retry-After"))
}

// failingFile accepts a number of bytes and then fails until it has room again.
type failingFile struct {
	mu      sync.Mutex
	room    int
	written []byte
}

func (f *failingFile) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := min(len(b), f.room)
	f.written, f.room = append(f.written, b[:n]...), f.room-n
	if n < len(b) {
		return n, errors.New("no space left on device")
	}
	return n, nil
}

func TestAudit_WithoutALineNothingPasses(t *testing.T) {
	w := newWorld(t, nil)
	disk := &failingFile{}
	w.b.ledger.file = disk
	got := w.send("GET", "/v1/models", "")
	require.Equal(t, 503, got.status)
	require.Equal(t, "broker_audit", got.code())
	pending := len(w.b.ledger.pending)
	for range 3 {
		require.Equal(t, 503, w.send("GET", "/v1/models", "").status)
	}
	require.Len(t, w.b.ledger.pending, pending, "refusals accumulate")
	require.Zero(t, w.sim.Count("GET", "/models"))

	// Room for the lines above, the next start line, and half of its end line.
	disk.mu.Lock()
	disk.room = pending + 300
	disk.mu.Unlock()
	require.Equal(t, 200, w.send("GET", "/v1/models", "").status)
	require.Eventually(t, func() bool { return !w.b.ledger.write() }, 5*time.Second, time.Millisecond)
	require.Equal(t, "broker_audit", w.send("GET", "/v1/models", "").code(), "the end line of the last request is not written")

	disk.mu.Lock()
	disk.room = 1 << 20
	disk.mu.Unlock()
	require.Equal(t, 200, w.send("GET", "/v1/models", "").status)
	require.Eventually(t, func() bool {
		disk.mu.Lock()
		defer disk.mu.Unlock()
		lines := strings.Split(strings.TrimSpace(string(disk.written)), "\n")
		ends := 0
		for _, line := range lines {
			require.True(t, strings.HasPrefix(line, `{"time":`) && strings.HasSuffix(line, "}"), "half a line: %s", line)
			if strings.Contains(line, `"event":"end"`) {
				ends++
			}
		}
		return ends == 2
	}, 5*time.Second, 10*time.Millisecond)
}

func TestMetrics_ArePrometheusText(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Metrics = "127.0.0.1:0" })
	require.Equal(t, 200, w.send("GET", "/v1/models", "").status)
	w.eventually("end")
	require.Equal(t, 401, func() int {
		req := w.request("GET", "/v1/models", "")
		req.Header.Del("Authorization")
		return w.do(req).status
	}())
	var out strings.Builder
	rec := &recorder{header: http.Header{}, out: &out}
	w.b.ledger.ServeHTTP(rec, mustRequest("GET", "/metrics"))
	text := out.String()
	for _, line := range []string{
		"# TYPE openai_broker_requests_total counter", `openai_broker_requests_total{agent="r",outcome="answered"} 1`,
		`openai_broker_requests_total{agent="",outcome="broker_token"} 1`, `openai_broker_requests_in_flight{agent="r"} 0`,
		`openai_broker_leases_total{agent="r"} 1`, "openai_broker_audit_pending_bytes 0", `openai_broker_build_info{version="` + version + `"} 1`,
	} {
		require.Contains(t, text, line+"\n")
	}
	for name := range metricHelp {
		if name != "renewals_total" && name != "vault_errors_total" && name != "key_refusals_total" && name != "memory_locked" {
			require.Contains(t, text, "# HELP openai_broker_"+name+" ")
		}
	}
	rec = &recorder{header: http.Header{}, out: &out}
	w.b.ledger.ServeHTTP(rec, mustRequest("GET", "/"))
	require.Equal(t, 404, rec.status)
}

type recorder struct {
	header http.Header
	status int
	out    io.Writer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.out.Write(b) }

func mustRequest(method, path string) *http.Request {
	req, err := http.NewRequest(method, "http://127.0.0.1"+path, http.NoBody)
	if err != nil {
		panic(fmt.Sprint(err))
	}
	return req
}
