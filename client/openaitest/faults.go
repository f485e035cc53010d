// This file owns injected faults. A fault strikes before or after the effect of a request,
// never in between, so the request has either happened completely or not at all, and the
// ledger shows which.

package openaitest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// FaultKind is the kind of failure, and whether the request has its effect.
type FaultKind string

// The kinds of fault. "Effect" is the result without the fault, which may be an error.
const (
	FaultStatus        FaultKind = "status"         // no effect; Status is answered
	FaultStatusAfter   FaultKind = "status_after"   // effect; Status is answered
	FaultReset         FaultKind = "reset"          // no effect; the connection is reset
	FaultLost          FaultKind = "lost"           // effect; the connection is reset
	FaultHang          FaultKind = "hang"           // no effect; no answer until the client disconnects or the server closes
	FaultHangAfter     FaultKind = "hang_after"     // effect; as FaultHang
	FaultGarbage       FaultKind = "garbage"        // effect; 200 with Body, or with bytes that are not JSON
	FaultGarbageBefore FaultKind = "garbage_before" // no effect; as FaultGarbage
	FaultEmpty         FaultKind = "empty"          // effect; 200 without a body
	FaultEmptyObject   FaultKind = "empty_object"   // effect; 200 with {}
	FaultTruncated     FaultKind = "truncated"      // effect; half of the body with the full Content-Length
	FaultHuge          FaultKind = "huge"           // effect; a JSON body of HugeBody bytes
	FaultHTML          FaultKind = "html"           // no effect; 502 (or Status) with a page
	FaultSlow          FaultKind = "slow"           // Delay, then the normal answer, even if the client has disconnected
	FaultRedirect      FaultKind = "redirect"       // no effect; 307 (or Status) to the Location of Header
	FaultMissingKey    FaultKind = "missing_key"    // effect; a created key's value is missing from the answer
)

// HugeBody is the size of a FaultHuge body, in bytes.
const HugeBody = 16 << 20

var faultKinds = []FaultKind{
	FaultStatus, FaultStatusAfter, FaultReset, FaultLost, FaultHang, FaultHangAfter, FaultGarbage, FaultGarbageBefore,
	FaultEmpty, FaultEmptyObject, FaultTruncated, FaultHuge, FaultHTML, FaultSlow, FaultRedirect, FaultMissingKey,
}

// Fault selects requests and how they fail. Of several matching faults, the one installed
// first strikes; the request then does not count towards the Skip of the others.
type Fault struct {
	Method      string  // "" for any
	Route       string  // template, exact path, or prefix of a path ending in "*", each with or without /v1; "" for any
	Times       int     // how often it strikes; 0 for no limit
	Skip        int     // how many matching requests pass first
	Probability float64 // of striking a matching request; 0 for always

	Kind    FaultKind     // "" for FaultStatus
	Status  int           // 0 for 500, for the status kinds
	Body    string        // literal body; "" for OpenAI's error object from Message and Code
	Header  http.Header   // set on the answer, if there is one
	Message string        // of the error object
	Code    string        // of the error object
	Delay   time.Duration // of FaultSlow

	Match    func(*http.Request) bool // further condition; may read the body
	OnStrike func(*http.Request)      // called in the request's goroutine when the fault strikes
}

type installed struct {
	Fault
	gone bool
}

// check returns an error for a fault that would never strike, or make net/http panic.
func (f *Fault) check() error {
	switch {
	case f.Kind != "" && !slices.Contains(faultKinds, f.Kind):
		return fmt.Errorf("unknown fault kind %q; use one of %q", f.Kind, faultKinds)
	case f.Status != 0 && (f.Status < 200 || f.Status > 599):
		return fmt.Errorf("status must be between 200 and 599, not %d", f.Status)
	case f.Times < 0 || f.Skip < 0 || f.Delay < 0:
		return errors.New("times, skip and delay must not be negative")
	case f.Probability < 0 || f.Probability > 1:
		return fmt.Errorf("probability must be between 0 and 1, not %v", f.Probability)
	}
	return nil
}

// Fail installs a fault; cancel removes it. It panics for an invalid fault, such as an
// unknown kind.
func (s *Server) Fail(f Fault) (cancel func()) {
	if err := f.check(); err != nil {
		panic("openaitest: " + err.Error())
	}
	if f.Kind == "" {
		f.Kind = FaultStatus
	}
	if f.Status == 0 && (f.Kind == FaultStatus || f.Kind == FaultStatusAfter) {
		f.Status = http.StatusInternalServerError
	}
	in := &installed{Fault: f}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, in)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.uninstall(in)
	}
}

// ClearFaults removes every fault. Requests that already hang are not released.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range slices.Clone(s.faults) {
		s.uninstall(f)
	}
}

func (s *Server) uninstall(f *installed) {
	f.gone = true
	s.faults = slices.DeleteFunc(s.faults, func(other *installed) bool { return other == f })
}

// strike finds the fault for a request, if any. Match and OnStrike are the test's and may
// call the simulator, so they run without the lock.
func (s *Server) strike(c *call) *Fault {
	s.mu.Lock()
	candidates := slices.Clone(s.faults)
	s.mu.Unlock()
	for _, f := range candidates {
		if f.fits(c) && s.take(c, f) {
			if f.OnStrike != nil {
				f.OnStrike(c.withBody())
			}
			return &f.Fault
		}
	}
	return nil
}

// take uses up one strike, and reports whether the fault strikes.
func (s *Server) take(c *call, f *installed) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case f.gone:
		return false
	case f.Skip > 0:
		f.Skip--
		return false
	case f.Probability > 0 && rand.Float64() >= f.Probability: // not a secret
		return false
	}
	if f.Times > 0 {
		if f.Times--; f.Times == 0 {
			s.uninstall(f)
		}
	}
	c.log.Fault = f.Kind
	return true
}

func (f *installed) fits(c *call) bool {
	if f.Method != "" && f.Method != c.r.Method {
		return false
	}
	if !f.fitsRoute(c) {
		return false
	}
	return f.Match == nil || f.Match(c.withBody())
}

func (f *installed) fitsRoute(c *call) bool {
	want := strings.TrimPrefix(f.Route, basePath)
	path := strings.TrimPrefix(c.r.URL.Path, basePath)
	prefix, isPrefix := strings.CutSuffix(want, "*")
	switch {
	case f.Route == "":
		return true
	case isPrefix:
		return strings.HasPrefix(path, prefix)
	case c.route != nil && c.route.template == want:
		return true
	default:
		return path == want
	}
}

// withBody returns the request with its body unread.
func (c *call) withBody() *http.Request {
	c.r.Body = io.NopCloser(bytes.NewReader(c.body))
	return c.r
}

// playBefore applies a fault that precedes the effect. It returns false if the request
// continues.
func (s *Server) playBefore(w http.ResponseWriter, c *call, f *Fault) bool {
	switch f.Kind {
	case FaultStatus:
		s.spoil(w, c, f, f.Status, f.statusBody())
	case FaultReset:
		s.reset(w)
	case FaultHang:
		s.hang(w, c)
	case FaultGarbageBefore:
		s.spoil(w, c, f, http.StatusOK, f.garbage())
	case FaultHTML:
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		s.spoil(w, c, f, orStatus(f.Status, http.StatusBadGateway), []byte(f.page()))
	case FaultRedirect:
		if f.Header.Get("Location") == "" {
			w.Header().Set("Location", "https://elsewhere.invalid"+c.r.URL.RequestURI())
		}
		s.spoil(w, c, f, orStatus(f.Status, http.StatusTemporaryRedirect), nil)
	case FaultSlow:
		s.pause(f.Delay)
		return false
	default:
		return false
	}
	return true
}

// playAfter applies a fault that follows the effect. It returns false for the normal
// answer.
func (s *Server) playAfter(w http.ResponseWriter, c *call, f *Fault, ans answer) bool {
	switch f.Kind {
	case FaultStatusAfter:
		s.spoil(w, c, f, f.Status, f.statusBody())
	case FaultLost:
		s.reset(w)
	case FaultHangAfter:
		s.hang(w, c)
	case FaultGarbage:
		s.spoil(w, c, f, http.StatusOK, f.garbage())
	case FaultEmpty:
		s.spoil(w, c, f, http.StatusOK, nil)
	case FaultEmptyObject:
		s.spoil(w, c, f, http.StatusOK, []byte("{}"))
	case FaultTruncated:
		body := ans.encode()
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		// net/http closes the connection because the body is shorter than declared.
		s.spoil(w, c, f, ans.status, body[:len(body)/2])
	case FaultHuge:
		body := append([]byte(`{"padding":"`), bytes.Repeat([]byte("A"), HugeBody)...)
		s.spoil(w, c, f, ans.status, append(body, `"}`...))
	case FaultMissingKey:
		s.spoil(w, c, f, ans.status, withoutKey(ans).encode())
	default:
		return false
	}
	return true
}

// spoil writes the fault's answer, which observers do not get since it need not match
// OpenAI's document.
func (s *Server) spoil(w http.ResponseWriter, c *call, f *Fault, status int, body []byte) {
	kind := w.Header().Get("Content-Type")
	s.head(w, c, answer{header: f.Header})
	if kind != "" && f.Header.Get("Content-Type") == "" {
		w.Header().Set("Content-Type", kind)
	}
	s.done(c, status)
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client may have disconnected
}

// reset closes the connection with a TCP reset, or aborts the stream if there is no such
// connection (HTTP/2, a recorder).
func (s *Server) reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, isTCP := conn.(*net.TCPConn); isTCP {
		_ = tcp.SetLinger(0) // makes Close send RST instead of FIN
	}
	_ = conn.Close()
}

// hang blocks until the client disconnects or the simulator closes.
func (s *Server) hang(w http.ResponseWriter, c *call) {
	select {
	case <-c.r.Context().Done():
	case <-s.closing:
	}
	s.reset(w)
}

func (f *Fault) statusBody() []byte {
	if f.Body != "" {
		return []byte(f.Body)
	}
	message := f.Message
	if message == "" {
		message = "The simulator was told to fail."
	}
	return fail(f.Status, f.Code, "", message).encode()
}

func (f *Fault) garbage() []byte {
	if f.Body != "" {
		return []byte(f.Body)
	}
	raw := make([]byte, 256)
	for i := range raw {
		raw[i] = byte(rand.IntN(256))
	}
	return append([]byte{0xff}, raw...) // not JSON
}

func (f *Fault) page() string {
	if f.Body != "" {
		return f.Body
	}
	return fmt.Sprintf("<html><head><title>%[1]d Bad Gateway</title></head><body><h1>%[1]d Bad Gateway</h1></body></html>\n",
		orStatus(f.Status, http.StatusBadGateway))
}

func orStatus(status, otherwise int) int {
	if status == 0 {
		return otherwise
	}
	return status
}

// withoutKey removes the new key's value from an answer: the key is null in the answer to
// an account's create, and has no value in the answer to its own.
func withoutKey(ans answer) answer {
	o, isObject := ans.body.(object)
	if !isObject {
		return ans
	}
	if _, nested := o["api_key"]; nested {
		o["api_key"] = nil
	}
	delete(o, "value")
	return ans
}
