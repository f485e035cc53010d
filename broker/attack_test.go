package broker

// Attacks by a hostile agent or a hostile response, beyond the table of refusals in
// proxy_test.go.

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// upstream replaces OpenAI with a handler, and records requests.
func upstream(t *testing.T, change func(*Config), handler http.HandlerFunc) (w *world, seen func() []*http.Request) {
	t.Helper()
	var mu sync.Mutex
	var requests []*http.Request
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		mu.Lock()
		requests = append(requests, r)
		mu.Unlock()
		handler(rw, r)
	}))
	t.Cleanup(server.Close)
	w = prepare(t, openaitest.Start(t, openaitest.Options{}), server.URL+"/v1", change)
	require.NoError(t, w.b.open(t.Context()))
	t.Cleanup(func() { require.NoError(t, w.b.close(time.Second)) })
	return w, func() []*http.Request {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(requests)
	}
}

func fine(http.ResponseWriter, *http.Request) {}

// After a 101, the broker does not check the agent's traffic, so an upgrade must not
// switch to a protocol that carries requests.
func TestAttack_NothingButAWebSocketIsAnUpgrade(t *testing.T) {
	w, seen := upstream(t, nil, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			return
		}
		conn, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+r.Header.Get("Upgrade")+"\r\n\r\ntunnel")
	})
	for _, headers := range []string{
		"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n",
		"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
		"Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
		"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
		"Connection: Upgrade\r\nUpgrade: \r\n",
	} {
		got := w.raw("GET /v1/responses HTTP/1.1\r\nHost: " + w.b.address + "\r\nAuthorization: Bearer " + w.a.token + "\r\n" + headers + "Connection: close\r\n\r\n")
		require.NotContains(t, got, "101 Switching", headers)
	}
	got := w.raw("POST /v1/responses HTTP/1.1\r\nHost: " + w.b.address + "\r\nAuthorization: Bearer " + w.a.token + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	require.NotContains(t, got, "101 Switching")
	for _, r := range seen() {
		require.Empty(t, r.Header["Upgrade"])
		require.Empty(t, r.Header["Http2-Settings"])
	}
	got = w.raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	require.NotContains(t, got, "HTTP/2")
	require.NotContains(t, got, "200 OK")
}

// OpenAI must read the same model as the model check.
func TestAttack_NothingHidesTheModel(t *testing.T) {
	w, seen := upstream(t, func(c *Config) { c.Agents[0].Models = []string{"gpt-5"} }, fine)
	form := `{"a":"&model=gpt-4o&","model":"gpt-5"}`
	for name, r := range map[string]struct{ line, headers, body string }{
		"an invalid upgrade":        {"POST /v1/realtime/calls?model=gpt-5", "Content-Type: multipart/form-data; boundary=x\r\nUpgrade: websocket\r\n", "--x\r\n\r\ngpt-4o\r\n--x--"},
		"two content types":         {"POST /v1/responses", "Content-Type: application/json\r\nContent-Type: application/x-www-form-urlencoded\r\n", form},
		"another charset":           {"POST /v1/responses", "Content-Type: application/json; charset=utf-7\r\n", form},
		"an empty encoding first":   {"POST /v1/responses", "Content-Type: application/json\r\nContent-Encoding:\r\nContent-Encoding: gzip\r\n", form},
		"another case in the query": {"POST /v1/responses?Model=gpt-4o", "Content-Type: application/json\r\n", form},
		"a list in the query":       {"POST /v1/responses?model%5B%5D=gpt-4o", "Content-Type: application/json\r\n", form},
	} {
		got := w.rawBody(r.line, r.headers, r.body)
		require.Contains(t, got, "HTTP/1.1 403", name)
	}
	require.Empty(t, seen())
	got := w.rawBody("POST /v1/responses", "Content-Type: application/json\r\nConnection: close, Content-Type\r\n", form)
	require.Contains(t, got, "HTTP/1.1 200")
	require.Equal(t, "application/json", seen()[0].Header.Get("Content-Type"), "Connection removed a checked header")
}

func (w *world) rawBody(line, headers, body string) string {
	return w.raw(line + " HTTP/1.1\r\nHost: " + w.b.address + "\r\nAuthorization: Bearer " + w.a.token + "\r\nConnection: close\r\n" + headers +
		"Content-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body)
}

// Two requests in one, in every form on which parsers have disagreed.
func TestAttack_NoRequestIsSmuggled(t *testing.T) {
	w, seen := upstream(t, nil, fine)
	inner := "GET /v1/organization/projects HTTP/1.1\r\nHost: " + w.b.address + "\r\n\r\n"
	for name, headers := range map[string]string{
		"length and chunks":       "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner,
		"chunks and length":       "Transfer-Encoding: chunked\r\nContent-Length: 500\r\n\r\n0\r\n\r\n" + inner,
		"unknown coding":          "Transfer-Encoding: xchunked\r\n\r\n" + inner,
		"two codings":             "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + inner,
		"coding twice":            "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n" + inner,
		"space before the colon":  "Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + inner,
		"two lengths":             "Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + inner,
		"signed length":           "Content-Length: +5\r\n\r\n12345" + inner,
		"folded":                  "X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + inner,
		"bare line feed in chunk": "Transfer-Encoding: chunked\r\n\r\n5;\nxx\r\n12345\r\n0\r\n\r\n" + inner,
		"hop-by-hop length":       "Connection: Content-Length\r\nContent-Length: 5\r\n\r\n12345" + inner,
	} {
		conn, err := net.Dial("tcp", w.b.address)
		require.NoError(t, err)
		_, err = io.WriteString(conn, "POST /v1/responses HTTP/1.1\r\nHost: "+w.b.address+"\r\nAuthorization: Bearer "+w.a.token+"\r\n"+headers)
		require.NoError(t, err)
		require.NoError(t, conn.(*net.TCPConn).CloseWrite())
		answer, _ := io.ReadAll(conn) // 400, or two responses
		_ = conn.Close()
		require.NotContains(t, strings.TrimPrefix(string(answer), "HTTP/1.1 200"), "HTTP/1.1 200", "%s: the inner request passed", name)
	}
	for _, r := range seen() {
		require.Equal(t, "/v1/responses", r.URL.Path)
		require.Equal(t, http.MethodPost, r.Method)
	}
}

// No trailer, query parameter or header under another name may pass another key or
// project.
func TestAttack_AlternateCredentialsAreDropped(t *testing.T) {
	w, seen := upstream(t, nil, fine)
	got := w.raw("POST /v1/responses?api_key=sk-other&api-key=sk-other&Authorization=sk-other&openai-project=p&x=1&x=2 HTTP/1.1\r\nHost: " + w.b.address +
		"\r\nAuthorization: Bearer " + w.a.token + "\r\nX-OpenAI-Actor-Authorization: sk-other\r\nX-Goog-Api-Key: sk-other\r\nApiKey: sk-other\r\n" +
		"ChatGPT-Account-ID: other\r\nX-HTTP-Method: DELETE\r\nX-Method-Override: DELETE\r\nConnection: close\r\n" +
		"Transfer-Encoding: chunked\r\nTrailer: OpenAI-Organization, Authorization\r\n\r\n2\r\n{}\r\n0\r\nOpenAI-Organization: org-other\r\nAuthorization: Bearer sk-other\r\n\r\n")
	require.Contains(t, got, "HTTP/1.1 200")
	require.Len(t, seen(), 1)
	r := seen()[0]
	require.Equal(t, "x=1&x=2", r.URL.RawQuery)
	require.Empty(t, r.Trailer)
	var names []string
	for name := range r.Header {
		names = append(names, name)
	}
	require.ElementsMatch(t, []string{"Authorization"}, names)
	require.Equal(t, []string{"Bearer " + w.sim.Keys()[0].Value}, r.Header["Authorization"])
}

// The broker filters early hints and trailers like the headers of OpenAI's response.
func TestAttack_EarlyHintsAndTrailersAreFiltered(t *testing.T) {
	w, _ := upstream(t, nil, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Set-Cookie", "a=b")
		rw.WriteHeader(http.StatusEarlyHints)
		rw.Header().Del("Set-Cookie")
		rw.Header().Set("Trailer", "Set-Cookie")
		_, _ = io.WriteString(rw, "{}")
		rw.Header().Set("Set-Cookie", "c=d")
	})
	got := w.raw("GET /v1/models HTTP/1.1\r\nHost: " + w.b.address + "\r\nAuthorization: Bearer " + w.a.token + "\r\nConnection: close\r\n\r\n")
	require.NotContains(t, got, "Set-Cookie")
	require.Contains(t, got, "HTTP/1.1 200")
}

// A 401 about the request does not concern the key: the broker leases no new key, and
// ends no client's WebSocket.
func TestAttack_AMissingScopeCostsNoLease(t *testing.T) {
	w := newWorld(t, nil)
	ws, _, err := openaitest.DialWebSocket(w.b.address, "/v1/responses", http.Header{"Authorization": {"Bearer " + w.a.token}})
	require.NoError(t, err)
	cancel := w.sim.Fail(openaitest.Fault{Route: "/models", Status: 401, Message: "You have insufficient permissions for this operation. Missing scopes: api.model.read. Check that sk-svcac***abcd has them."})
	defer cancel()
	for range 3 {
		got := w.send("GET", "/v1/models", "")
		require.Equal(t, 403, got.status)
		require.Equal(t, "broker_scope", got.code())
		require.Contains(t, got.body, "lacks scopes: api.model.read")
		require.NotContains(t, got.body, "sk-svcac")
	}
	require.Equal(t, 1, w.vault.called("openai/creds/"))
	require.NoError(t, ws.Write("hello"))
	text, err := ws.Read()
	require.NoError(t, err)
	require.Equal(t, "hello", text)
	require.NoError(t, ws.Close())
}

// If OpenAI refuses one path and accepts another, the broker must not lease a key for
// each request.
func TestAttack_RefusedKeysArePacedWhateverComesBetween(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, nil)
		n := 0
		w.b.base = inMemory{http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			if n++; n%2 == 0 {
				rw.WriteHeader(401)
			}
		}), w.vault}
		for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			_, _ = w.ask()
		}
		require.LessOrEqual(t, w.vault.called("openai/creds/"), 1+maxRefused+10*maxRefused)
	})
}

// A client that announces a body and does not send it is served for no longer than one
// with an unfinished header.
func TestAttack_AnUnfinishedBodyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, func(c *Config) { c.Agents[0].Models = []string{"gpt-5"} })
		dial, listener := pipeListener()
		w.b.serve(listener)
		w.b.phase.Store(serving)
		w.b.hosts["broker"] = true
		for _, token := range []string{"sk-broker-x", w.a.token} {
			conn, err := dial(t.Context(), "", "")
			require.NoError(t, err)
			began := time.Now()
			go func() {
				_, _ = io.WriteString(conn, "POST /v1/responses HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer "+token+"\r\nContent-Type: application/json\r\nContent-Length: 2000000\r\n\r\n{")
			}()
			answer, _ := io.ReadAll(conn)
			require.Contains(t, string(answer), "HTTP/1.1 40")
			require.LessOrEqual(t, time.Since(began), 2*headerTimeout)
		}

		// A refusal does not close the connection early.
		conn, err := dial(t.Context(), "", "")
		require.NoError(t, err)
		answers := bufio.NewReader(conn)
		for token, want := range map[string]int{"sk-broker-x": 401, w.a.token: 200} {
			go func() {
				_, _ = io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer "+token+"\r\n\r\n")
			}()
			resp, err := http.ReadResponse(answers, nil)
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, resp.Body)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, want, resp.StatusCode)
			time.Sleep(3 * headerTimeout)
		}
		require.NoError(t, conn.Close())
	})
}

// The end of the broker loses no line: when close returns, all are written.
func TestAttack_TheLastLinesAreWrittenBeforeTheEnd(t *testing.T) {
	w := newWorld(t, nil)
	file := w.b.ledger.file
	ws, _, err := openaitest.DialWebSocket(w.b.address, "/v1/responses", http.Header{"Authorization": {"Bearer " + w.a.token}})
	require.NoError(t, err)
	defer ws.Close()
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
	w.b.ledger.file = slowly{file}
	require.NoError(t, w.b.close(50*time.Millisecond))
	ends := 0
	for _, r := range w.records() {
		if r.Event == "end" {
			require.Contains(t, []string{"stopped", "key_ended"}, r.Outcome)
			ends++
		}
	}
	require.Equal(t, 2, ends, "a line is not written yet")
}

type slowly struct{ io.Writer }

func (s slowly) Write(b []byte) (int, error) {
	time.Sleep(200 * time.Millisecond)
	return s.Writer.Write(b)
}

// "OPTIONS *" is refused and recorded like any other request.
func TestAttack_EveryRequestIsRecorded(t *testing.T) {
	w := newWorld(t, nil)
	got := w.raw("OPTIONS * HTTP/1.1\r\nHost: " + w.b.address + "\r\nConnection: close\r\n\r\n")
	require.Contains(t, got, "broker_token")
	require.Equal(t, "broker_token", w.last().Outcome)
}

// A WebSocket ends when its lease reaches the maximum, and leaves nothing behind.
func TestAttack_ASocketDoesNotOutliveItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.leaseTTL, f.leaseMax = 10*time.Minute, 30*time.Minute }, func(c *Config) { c.MaxSession = Duration(24 * time.Hour) })
		dialOpenAI, atOpenAI := pipeListener()
		server := &http.Server{Handler: w.sim}
		go func() { _ = server.Serve(atOpenAI) }()
		defer server.Close()
		transport := newTransport()
		transport.Proxy, transport.DialContext = nil, dialOpenAI
		w.b.base, w.b.upstream.Scheme = transport, "http"
		dial, listener := pipeListener()
		w.b.serve(listener)
		w.b.phase.Store(serving)
		w.b.hosts["broker"] = true
		conn, err := dial(context.Background(), "", "")
		require.NoError(t, err)
		go func() {
			_, _ = io.WriteString(conn, "GET /v1/responses HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer "+w.a.token+"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		}()
		began := time.Now()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		defer resp.Body.Close()
		require.Equal(t, 101, resp.StatusCode)
		_, _ = io.ReadAll(conn)
		require.InDelta(t, 30, time.Since(began).Minutes(), 1)
		synctest.Wait()
		require.Equal(t, "key_ended", w.last().Outcome)
		transport.CloseIdleConnections()
	})
}

// If the process ends in the middle of a line, the next start must not join two lines.
func TestAttack_TheLogIsReadableAfterACrash(t *testing.T) {
	w := newWorld(t, nil)
	content, err := os.ReadFile(w.b.config.Audit)
	require.NoError(t, err)
	require.Empty(t, content)
	require.NoError(t, os.WriteFile(w.b.config.Audit, []byte(`{"time":"half a li`), 0o600))
	log, err := newLedger(w.b.config.Audit)
	require.NoError(t, err)
	require.True(t, log.write(record{Event: "start"}))
	content, err = os.ReadFile(w.b.config.Audit)
	require.NoError(t, err)
	require.Regexp(t, `^\{"time":"half a li\n\{.*\}\n$`, string(content))
}
