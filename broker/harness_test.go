package broker

// Shared test helpers: the simulator as OpenAI, and a fake Vault that can fail. The fake
// has only the calls that the broker makes; test/integration uses a real Vault.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// fakeVault is a Vault as a RoundTripper, on the clock of its test.
type fakeVault struct {
	sim     *openaitest.Server
	project string

	mu                 sync.Mutex
	leaseTTL, leaseMax time.Duration
	tokenTTL, tokenMax time.Duration // 0 = no expiry
	down               bool          // no connection
	reject             string        // a path that returns 403
	slow               time.Duration // delay before a lease
	caching            bool          // a Vault Proxy with a cache
	static             bool          // static-creds has a key
	rotation           time.Duration // of the static role
	tokens             map[string]*fakeTerm
	leases             map[string]*fakeLease
	count              int
	calls              []string
}

type fakeTerm struct{ from, ends time.Time }

type fakeLease struct {
	fakeTerm
	token, account string
}

// RoundTrip answers one call.
func (f *fakeVault) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.Contains(r.URL.Path, "/creds/") {
		time.Sleep(f.slow)
	}
	resp, err := f.roundTrip(r)
	if resp != nil {
		resp.Request = r
	}
	return resp, err
}

func (f *fakeVault) roundTrip(r *http.Request) (*http.Response, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expire()
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	f.calls = append(f.calls, path)
	if f.down {
		return nil, errors.New("connection refused")
	}
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	if f.reject != "" && strings.HasPrefix(path, f.reject) {
		return answer(403, map[string]any{"errors": []string{"permission denied"}}), nil
	}
	if strings.HasSuffix(path, "/cache-clear") {
		if f.caching {
			return answer(400, map[string]any{"errors": []string{"failed to parse clear input: no type provided"}}), nil
		}
		return answer(200, nil), nil
	}
	var in map[string]any
	if r.Body != nil {
		_ = json.NewDecoder(r.Body).Decode(&in)
	}
	token := r.Header.Get("X-Vault-Token")
	if strings.HasSuffix(path, "/login") {
		f.count++
		token = fmt.Sprintf("token-%d", f.count)
		f.tokens[token] = newFakeTerm(f.tokenTTL)
		return answer(200, map[string]any{"auth": map[string]any{"client_token": token, "renewable": true, "lease_duration": int(f.tokenTTL.Seconds())}}), nil
	}
	session, valid := f.tokens[token]
	if !valid {
		return answer(403, map[string]any{"errors": []string{"permission denied"}}), nil
	}
	resp := f.serve(path, token, session, in)
	if f.caching || strings.HasPrefix(path, "auth/token/lookup") && f.reject == "x-cache" {
		resp.Header.Set("X-Cache", "MISS")
	}
	return resp, nil
}

func (f *fakeVault) serve(path, token string, session *fakeTerm, in map[string]any) *http.Response {
	switch path {
	case "auth/token/lookup-self":
		return answer(200, map[string]any{"data": map[string]any{"accessor": "accessor-of-" + token, "ttl": session.left(), "renewable": f.tokenTTL > 0}})
	case "auth/token/renew-self":
		session.extend(f.tokenTTL, f.tokenMax)
		return answer(200, map[string]any{"auth": map[string]any{"client_token": token, "renewable": true, "lease_duration": session.left()}})
	case "auth/token/revoke-self":
		f.drop(token)
		return answer(204, nil)
	case "sys/leases/renew":
		l := f.leases[fmt.Sprint(in["lease_id"])]
		if l == nil {
			return answer(400, map[string]any{"errors": []string{"lease not found"}})
		}
		l.extend(f.leaseTTL, f.leaseMax)
		return answer(200, map[string]any{"lease_id": in["lease_id"], "renewable": true, "lease_duration": l.left()})
	case "openai/creds/r":
		f.count++
		id := fmt.Sprintf("openai/creds/r/%d", f.count)
		account, keyID, key := f.create(fmt.Sprintf("lease-%d", f.count))
		f.leases[id] = &fakeLease{fakeTerm: *newFakeTerm(f.leaseTTL), token: token, account: account}
		return answer(200, map[string]any{"lease_id": id, "renewable": true, "lease_duration": int(f.leaseTTL.Seconds()),
			"data": map[string]any{"api_key": key, "api_key_id": keyID}})
	case "openai/static-creds/s": // the first key
		for _, k := range f.sim.Keys() {
			if f.static {
				return answer(200, map[string]any{"data": map[string]any{"api_key": k.Value, "api_key_id": k.ID, "ttl": int(f.rotation.Seconds()), "expires_at": nil}})
			}
		}
	}
	if id, found := strings.CutPrefix(path, "sys/leases/revoke/"); found {
		f.end(id)
		return answer(204, nil)
	}
	return answer(404, map[string]any{"errors": []string{}})
}

// create creates an account at OpenAI as the engine does.
func (f *fakeVault) create(name string) (account, keyID, key string) {
	_, admin := f.sim.AdminKey()
	body, _ := json.Marshal(map[string]any{"name": name})
	req := httptest.NewRequest("POST", "/v1/organization/projects/"+f.project+"/service_accounts", bytes.NewReader(body))
	req.Header.Set("Authorization", "Bearer "+admin)
	req.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	f.sim.ServeHTTP(w, req)
	var out struct {
		ID     string                     `json:"id"`
		APIKey struct{ ID, Value string } `json:"api_key"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil || out.APIKey.Value == "" {
		panic("no account: " + w.Body.String())
	}
	return out.ID, out.APIKey.ID, out.APIKey.Value
}

func (f *fakeVault) expire() {
	for token, t := range f.tokens {
		if t.left() == 0 && !t.ends.IsZero() {
			f.drop(token)
		}
	}
	for id, l := range f.leases {
		if l.left() == 0 {
			f.end(id)
		}
	}
}

func (f *fakeVault) drop(token string) {
	delete(f.tokens, token)
	for id, l := range f.leases {
		if l.token == token {
			f.end(id)
		}
	}
}

func (f *fakeVault) end(id string) {
	if l := f.leases[id]; l != nil {
		f.sim.DeleteServiceAccount(f.project, l.account)
		delete(f.leases, id)
	}
}

// revokeAll ends every lease, as an operator does.
func (f *fakeVault) revokeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range maps.Clone(f.leases) {
		f.end(id)
	}
}

func (f *fakeVault) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeVault) called(path string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, call := range f.calls {
		if strings.HasPrefix(call, path) {
			n++
		}
	}
	return n
}

func newFakeTerm(ttl time.Duration) *fakeTerm {
	t := &fakeTerm{from: time.Now()}
	if ttl > 0 {
		t.ends = t.from.Add(ttl)
	}
	return t
}

func (t *fakeTerm) left() int {
	if t.ends.IsZero() {
		return 0
	}
	return int(max(0, time.Until(t.ends)).Seconds())
}

func (t *fakeTerm) extend(ttl, most time.Duration) {
	t.ends = time.Now().Add(ttl)
	if last := t.from.Add(most); most > 0 && t.ends.After(last) {
		t.ends = last
	}
}

func answer(status int, body any) *http.Response {
	content, _ := json.Marshal(body)
	if body == nil {
		content = nil
	}
	return &http.Response{StatusCode: status, Status: http.StatusText(status), Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(content)), ContentLength: int64(len(content)), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
}

// world is a broker between a client, the simulator and the fake Vault.
type world struct {
	t     *testing.T
	sim   *openaitest.Server
	vault *fakeVault
	b     *broker
	a     *agent
	log   *safeBuffer
	dir   string
}

func newFake(sim *openaitest.Server) *fakeVault {
	return &fakeVault{
		sim: sim, project: sim.AddProject("p"), leaseTTL: time.Hour, leaseMax: 24 * time.Hour, tokenTTL: 2 * time.Hour, tokenMax: 48 * time.Hour,
		tokens: map[string]*fakeTerm{}, leases: map[string]*fakeLease{},
	}
}

// newWorld starts a broker that serves on loopback until the test ends. change may be
// nil; the first agent's role is r.
func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	sim := openaitest.Start(t, openaitest.Options{})
	w := prepare(t, sim, sim.URL(), change)
	require.NoError(t, w.b.open(t.Context()))
	t.Cleanup(func() { require.NoError(t, w.b.close(time.Second)) })
	return w
}

// prepare creates a world whose broker does not serve yet.
func prepare(t *testing.T, sim *openaitest.Server, upstream string, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, sim: sim, vault: newFake(sim), log: &safeBuffer{}, dir: t.TempDir()}
	config := Defaults()
	config.Upstream = upstream
	config.Audit = filepath.Join(w.dir, "audit.json")
	config.Vault = Login{Method: "approle", RoleIDFile: w.file("role-id", "r"), SecretIDFile: w.file("secret-id", "s")}
	config.Agents = []Agent{{Role: "r"}}
	if change != nil {
		change(&config)
	}
	var err error
	w.b, err = newBroker(&config, slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	require.NoError(t, err)
	w.a = w.b.agents[0]
	w.a.keys.vault.transport = w.vault
	t.Cleanup(w.searchForKeys)
	return w
}

func (w *world) file(name, content string) string {
	path := filepath.Join(w.dir, name)
	require.NoError(w.t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// searchForKeys searches the broker's output for every key.
func (w *world) searchForKeys() {
	if w.t.Failed() {
		w.t.Log(w.log.String())
	}
	written := w.log.String()
	if content, err := os.ReadFile(filepath.Join(w.dir, "audit.json")); err == nil {
		written += string(content)
	}
	for _, s := range append(w.sim.Secrets(), w.a.token, "token-1") {
		require.NotContains(w.t, written, s, "a secret is in the log or the audit log")
	}
}

type response struct {
	status int
	header http.Header
	body   string
}

func (r response) code() string {
	var body struct {
		Error struct{ Code string }
	}
	_ = json.Unmarshal([]byte(r.body), &body)
	return body.Error.Code
}

// request builds a request as the agent sends it.
func (w *world) request(method, path, body string) *http.Request {
	w.t.Helper()
	req, err := http.NewRequest(method, "http://"+w.b.address+path, strings.NewReader(body))
	require.NoError(w.t, err)
	req.Header.Set("Authorization", "Bearer "+w.a.token)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return req
}

func (w *world) do(req *http.Request) response {
	w.t.Helper()
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	require.NoError(w.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(w.t, err)
	for _, s := range w.sim.Secrets() {
		require.NotContains(w.t, string(body)+fmt.Sprint(resp.Header), s, "a key is in a response")
	}
	return response{resp.StatusCode, resp.Header, string(body)}
}

func (w *world) send(method, path, body string) response {
	w.t.Helper()
	return w.do(w.request(method, path, body))
}

// raw sends text unchanged and returns the whole response.
func (w *world) raw(text string) string {
	w.t.Helper()
	conn, err := net.Dial("tcp", w.b.address)
	require.NoError(w.t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, text)
	require.NoError(w.t, err)
	require.NoError(w.t, conn.SetReadDeadline(time.Now().Add(20*time.Second)))
	answer, err := io.ReadAll(conn)
	require.NoError(w.t, err)
	return string(answer)
}

// records are the lines of the audit log.
func (w *world) records() []record {
	w.t.Helper()
	content, err := os.ReadFile(filepath.Join(w.dir, "audit.json"))
	require.NoError(w.t, err)
	var all []record
	for line := range strings.Lines(string(content)) {
		var r record
		dec := json.NewDecoder(strings.NewReader(line))
		dec.DisallowUnknownFields()
		require.NoError(w.t, dec.Decode(&r), line)
		all = append(all, r)
	}
	return all
}

func (w *world) last() record {
	all := w.records()
	return all[len(all)-1]
}

// seen returns the first request that OpenAI gets during do.
func (w *world) seen(do func()) *http.Request {
	w.t.Helper()
	got := make(chan *http.Request, 10)
	cancel := w.sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, OnStrike: func(r *http.Request) { got <- r.Clone(context.Background()) }})
	defer cancel()
	do()
	select {
	case r := <-got:
		return r
	default:
		w.t.Fatal("no request reached OpenAI")
		return nil
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// liveKeys are the IDs of the keys that OpenAI accepts.
func (w *world) liveKeys() []string {
	var ids []string
	for _, k := range w.sim.Keys() {
		ids = append(ids, k.ID)
	}
	slices.Sort(ids)
	return ids
}
