// This file owns the server and the handling of a request. The mutex guards all state and
// is never held while sleeping, hanging, writing to a connection or calling a test's
// function.

package openaitest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"
)

// basePath is the prefix of every route, as in https://api.openai.com/v1.
const basePath = "/v1"

// maxBody bounds request bodies, in bytes. OpenAI publishes no limit for the Admin API; its
// largest documented body is far smaller.
const maxBody = 1 << 20

// Options configures a Server; the zero value is an organization with one admin key and no
// project.
type Options struct {
	AdminKey       string        // value of the first admin key; generated if ""
	OrganizationID string        // generated if ""; a request for another organization is a 401
	TLS            bool          // Start serves HTTPS with HTTP/2; see CACert
	Latency        time.Duration // added to each answer, half before its effect and half after

	// RatePerMinute limits each admin endpoint (method and route template) with a token
	// bucket; 0 for no limit. The inference API is not limited: its real limits are
	// orders of magnitude higher.
	RatePerMinute int
	// RateBurst is the size of the bucket; 0 for the smaller of RatePerMinute and 10. On
	// the real API, 7 to 10 calls were measured to pass before the limit applied.
	RateBurst  int
	RetryAfter bool // send Retry-After, in whole seconds, with a 429

	StreamDelay          time.Duration // between the events of a streamed response
	ActivationDelay      time.Duration // until a new project key works on the inference API; before, invalid_api_key
	AdminActivationDelay time.Duration // until a new admin key works on the Admin API

	MaxKeyLifetime                 time.Duration // new project keys must expire within it; 0 for no policy
	ExpiryUnknown                  bool          // expires_in_seconds is an unknown parameter, as before September 2026 and at gateways
	DeleteServiceAccountKeyRefused bool          // DELETE of a service account's key is a 400, as documented until August
	AmountsVary                    bool          // costs are numbers, strings and numbers with an exponent in turn, as seen live

	// Clock replaces time.Now; Advance adds to either. It is called with the lock held
	// and must not call the Server. It applies to expiry, activation and the rate limit,
	// but not to the sleeps of latency and faults.
	Clock func() time.Time
}

// Server is the simulator. It is an http.Handler and safe for concurrent use.
type Server struct {
	mu     sync.Mutex
	opts   Options
	offset time.Duration

	seq       uint64
	orgID     string
	ownerID   string
	rootKey   *adminKey
	projects  table[*project]
	adminKeys table[*adminKey]

	keyByValue   map[string]*apiKey   // project keys that were not deleted
	adminByValue map[string]*adminKey // admin keys that were not deleted
	idByValue    map[string]string    // every key value ever seen, and its ID
	places       map[string]place     // every ID ever listed, for page cursors
	nextExpiry   time.Time            // no key expires before; zero if none does

	costs   map[costCell]*big.Rat
	usage   map[usageCell]Counts
	amounts int // rendered

	creationDisabled bool
	newAdminKeys     []AdminKeyOption

	limiters  map[string]*rate.Limiter
	faults    []*installed
	observers map[int]func(exchange)
	ledger    []Entry
	requests  []*Request
	kept      map[string]bool
	keepAll   bool

	url         string
	caCert      string
	connections atomic.Int64
	open        atomic.Int64
	listener    *httptest.Server // of Start
	closeOnce   sync.Once
	closing     chan struct{}
}

// New returns a simulator that does not listen.
func New(opts Options) *Server {
	s := &Server{
		opts:         opts,
		orgID:        opts.OrganizationID,
		ownerID:      "user-" + alnum(24),
		projects:     newTable[*project](),
		adminKeys:    newTable[*adminKey](),
		keyByValue:   map[string]*apiKey{},
		adminByValue: map[string]*adminKey{},
		idByValue:    map[string]string{},
		places:       map[string]place{},
		costs:        map[costCell]*big.Rat{},
		usage:        map[usageCell]Counts{},
		limiters:     map[string]*rate.Limiter{},
		observers:    map[int]func(exchange){},
		kept:         map[string]bool{},
		closing:      make(chan struct{}),
	}
	if s.orgID == "" {
		s.orgID = "org-" + alnum(24)
	}
	s.rootKey = s.newAdminKey("root", opts.AdminKey, "", nil)
	s.kept[s.rootKey.id] = true
	return s
}

// Start serves a new simulator on loopback until the end of the test, and then fails the
// test if there are Leaks.
func Start(t testing.TB, opts Options) *Server {
	t.Helper()
	s := New(opts)
	hs := httptest.NewUnstartedServer(s)
	s.listener = hs
	hs.Config.ConnState = s.ConnState
	// Faults close connections on purpose; net/http's log lines about that would flood
	// the output of the test.
	hs.Config.ErrorLog = log.New(io.Discard, "", 0)
	if opts.TLS {
		hs.EnableHTTP2 = true
		hs.StartTLS()
		s.caCert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: hs.Certificate().Raw}))
	} else {
		hs.Start()
	}
	s.SetURL(hs.URL + basePath)
	// A subtest keeps its cleanups until its test ends: without what they refer to.
	kept := s
	t.Cleanup(func() {
		kept.Close()
		hs.Close()
		for _, leak := range kept.Leaks() {
			t.Errorf("leaked at the simulated OpenAI: %s", leak)
		}
		kept, hs = nil, nil
	})
	return s
}

// Close releases every request that hangs or sleeps, including later ones, so that the
// listener can be closed. It does not close the listener.
func (s *Server) Close() { s.closeOnce.Do(func() { close(s.closing) }) }

// URL is the base URL, with /v1.
func (s *Server) URL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.url
}

// SetURL sets the base URL of a simulator in a caller's own http.Server.
func (s *Server) SetURL(base string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.url = strings.TrimSuffix(base, "/")
}

// CACert is the PEM certificate of a server started with Options.TLS or served
// with Certificate.
func (s *Server) CACert() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.caCert
}

// OrganizationID is the ID of the organization.
func (s *Server) OrganizationID() string { return s.orgID }

// Configure changes the options of a running simulator. Changes of AdminKey, OrganizationID
// and TLS have no effect; rate limits are reset. change is called with the lock held and
// must not call the Server.
func (s *Server) Configure(change func(*Options)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.opts)
	s.limiters = map[string]*rate.Limiter{}
}

// Advance moves the simulator's clock forward.
func (s *Server) Advance(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offset += d
	s.expire()
}

// Now is the simulator's time.
func (s *Server) Now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now()
}

func (s *Server) now() time.Time {
	if s.opts.Clock != nil {
		return s.opts.Clock().Add(s.offset)
	}
	return time.Now().Add(s.offset)
}

// ConnState counts connections; set it in a caller's own http.Server.
func (s *Server) ConnState(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		s.connections.Add(1)
		s.open.Add(1)
	case http.StateClosed, http.StateHijacked: // hijacked connections are closed
		s.open.Add(-1)
	case http.StateActive, http.StateIdle:
	}
}

// Connections returns how many connections were accepted since the start.
func (s *Server) Connections() int { return int(s.connections.Load()) }

// CloseConnections waits, for a simulator from Start, until all sent requests had their
// effect and closes the connections: a client that disconnected may have left a request in
// one. A request that hangs ends with its client.
func (s *Server) CloseConnections(ctx context.Context) error {
	// Connections are accepted in order, so after the answer on this one all earlier ones
	// are accepted. net/http answers even an invalid request.
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", s.listener.Listener.Addr().String())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // only read
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline) // on failure the calls below fail
	}
	if _, err := io.WriteString(conn, "\r\n\r\n"); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		return err
	}
	defer s.listener.Config.SetKeepAlivesEnabled(true)
	for s.open.Load() > 0 {
		s.listener.Config.SetKeepAlivesEnabled(false) // which closes idle ones
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// call is one request on its way through the simulator.
type call struct {
	r     *http.Request
	route *route // nil if none matches
	allow string // the methods of the path, if only the method is wrong
	vars  map[string]string
	body  []byte
	size  int64 // of a body that was not kept
	id    string
	log   *Request
	began time.Time

	now   time.Time // of the effect
	admin *adminKey // the caller, on admin routes
	key   *apiKey   // the caller, on inference routes
}

// answer is the result of a handler. The body is marshaled after the lock is released, so
// handlers build it from copies.
type answer struct {
	status int
	body   any
	header http.Header
	stream bool // as server-sent events
	// encoded is the body if it never changes.
	encoded []byte
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c, ans := s.accept(w, r)
	if ans != nil {
		s.reply(w, c, *ans)
		return
	}
	s.mu.Lock()
	half := s.opts.Latency / 2
	limited := s.limit(c)
	s.mu.Unlock()
	s.pause(half)
	// Timers are late by about a millisecond, so one sleep replaces two.
	rest := func() { s.pause(time.Until(c.began.Add(2 * half))) }
	if limited != nil {
		rest()
		s.reply(w, c, *limited)
		return
	}

	f := s.strike(c)
	if f != nil && s.playBefore(w, c, f) {
		return
	}
	result := s.perform(c)
	rest()
	if f != nil && s.playAfter(w, c, f, result) {
		return
	}
	s.reply(w, c, result)
}

// accept reads and logs the request before any fault. A returned answer ends its handling.
func (s *Server) accept(w http.ResponseWriter, r *http.Request) (*call, *answer) {
	c := &call{r: r, id: "req_" + randomHex(16), began: time.Now()}
	c.route, c.vars, c.allow = match(r.Method, r.URL.EscapedPath())
	entry := Request{
		Method:     r.Method,
		Path:       r.URL.Path,
		UserAgent:  r.UserAgent(),
		RequestID:  c.id,
		RemoteAddr: r.RemoteAddr,
	}
	if c.route != nil {
		entry.Route = c.route.template
	}
	s.mu.Lock()
	entry.At = s.now()
	entry.AuthKeyID = s.idByValue[bearer(r)]
	c.log = &entry
	s.requests = append(s.requests, c.log)
	s.mu.Unlock()

	if r.Body == nil { // called directly
		r.Body = http.NoBody
	}
	if c.route != nil && c.route.discard {
		var err error
		if c.size, err = io.Copy(io.Discard, r.Body); err != nil {
			panic(http.ErrAbortHandler) // as below
		}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		ans := fail(http.StatusRequestEntityTooLarge, "request_too_large", "", "The request body is larger than 1 MiB.")
		return c, &ans
	case err != nil:
		// The client disconnected during its body.
		panic(http.ErrAbortHandler)
	}
	c.body = body
	return c, nil
}

// perform executes a request. No other function has an effect.
func (s *Server) perform(c *call) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.now = s.now()
	s.expire()
	switch {
	case c.route == nil && c.allow != "":
		ans := fail(http.StatusMethodNotAllowed, "method_not_allowed", "",
			"Not allowed to "+c.r.Method+" on "+c.r.URL.Path+" (allowed: "+c.allow+").")
		ans.header = http.Header{"Allow": {c.allow}}
		return ans
	case c.route == nil:
		return fail(http.StatusNotFound, "unknown_url", "", "Invalid URL ("+c.r.Method+" "+c.r.URL.Path+")")
	}
	if refused := s.authorize(c); refused != nil {
		return *refused
	}
	return c.route.handle(s, c)
}

// limit takes a token from the endpoint's bucket, or returns a 429.
func (s *Server) limit(c *call) *answer {
	if s.opts.RatePerMinute <= 0 || c.route == nil || !c.route.admin {
		return nil
	}
	endpoint := c.route.method + " " + c.route.template
	l := s.limiters[endpoint]
	if l == nil {
		burst := s.opts.RateBurst
		if burst <= 0 {
			burst = min(s.opts.RatePerMinute, 10)
		}
		l = rate.NewLimiter(rate.Limit(float64(s.opts.RatePerMinute)/60), burst)
		s.limiters[endpoint] = l
	}
	now := s.now()
	if l.AllowN(now, 1) {
		return nil
	}
	ans := fail(http.StatusTooManyRequests, "rate_limit_exceeded", "",
		"Rate limit reached for "+endpoint+": limit "+strconv.Itoa(s.opts.RatePerMinute)+" requests per minute. Please try again later.")
	if s.opts.RetryAfter {
		missing := (1 - l.TokensAt(now)) / float64(l.Limit())
		ans.header = http.Header{"Retry-After": {strconv.Itoa(max(1, int(missing+0.999)))}}
	}
	return &ans
}

// reply writes a complete answer, and calls the observers.
func (s *Server) reply(w http.ResponseWriter, c *call, ans answer) {
	switch {
	case ans.status == http.StatusSwitchingProtocols:
		s.upgrade(w, c, ans)
		return
	case ans.stream:
		s.stream(w, c, ans)
		return
	}
	body := ans.encode()
	s.head(w, c, ans)
	s.done(c, ans.status)
	s.observe(c, ans.status, w.Header(), body)
	w.WriteHeader(ans.status)
	_, _ = w.Write(body) // the client may have disconnected
}

// head sets the headers of every answer, including those of faults.
func (s *Server) head(w http.ResponseWriter, c *call, ans answer) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Date", s.Now().UTC().Format(http.TimeFormat))
	h.Set("X-Request-Id", c.id)
	h.Set("Openai-Organization", s.orgID)
	h.Set("Openai-Version", "2020-10-01")
	h.Set("Openai-Processing-Ms", strconv.FormatInt(time.Since(c.began).Milliseconds(), 10))
	for name, values := range ans.header {
		h[http.CanonicalHeaderKey(name)] = values
	}
}

// done records the status of the answer, 0 for none.
func (s *Server) done(c *call, status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.log.Status = status
}

// pause sleeps in real time until Close: a real server also continues after its client
// disconnected.
func (s *Server) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.closing:
	}
}

func (a answer) encode() []byte {
	if a.encoded != nil {
		return a.encoded
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(a.body); err != nil {
		panic(err) // bodies have only maps, strings and numbers
	}
	return buf.Bytes()
}

// fail is OpenAI's error object; empty code and param are null.
func fail(status int, code, param, message string) answer {
	kind := "invalid_request_error"
	switch {
	case status == http.StatusTooManyRequests:
		kind = "requests"
	case status >= http.StatusInternalServerError:
		kind = "server_error"
	}
	return answer{status: status, body: object{"error": object{
		"message": message,
		"type":    kind,
		"param":   orNull(param),
		"code":    orNull(code),
	}}}
}

func ok(body object) answer { return answer{status: http.StatusOK, body: body} }

type object = map[string]any

func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func bearer(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// alnum returns n random letters and digits, the alphabet of IDs observed on the live API.
func alnum(n int) string {
	raw := make([]byte, n)
	_, _ = rand.Read(raw) // never fails
	for i, b := range raw {
		raw[i] = alphabet[int(b)%len(alphabet)]
	}
	return string(raw)
}

func randomHex(bytes int) string {
	raw := make([]byte, bytes)
	_, _ = rand.Read(raw) // never fails
	return hex.EncodeToString(raw)
}
