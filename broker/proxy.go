package broker

// This file owns one request: from the checks over the key and OpenAI's answer
// to the last byte. What must stay true: no answer is buffered, no time-out but
// -max-session and -drain cuts a request, and each forwarded request has a line
// in the audit log before it leaves and one when it has ended.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httputil"
	"regexp"
	"strconv"
	"sync/atomic"
	"time"
)

// agent is a program that may use the broker.
type agent struct {
	Agent
	token  string            // its placeholder
	hash   [sha256.Size]byte // of the placeholder
	keys   *keys
	limits *limits
}

// The phases of a broker.
const (
	serving  = iota
	draining // connections end with their next answer
	stopping // requests are refused; also before the agents have keys
	cutting  // requests in progress are being ended
)

// exchange is one request and what is known of it.
type exchange struct {
	record
	agent    *agent
	admitted bool            // counts against the agent's limits
	body     []byte          // nil if it was not kept
	key      *key            // in use until the request ends
	ctx      context.Context // of the request
	cut      context.CancelCauseFunc
	detach   func() bool // ends the bond of a WebSocket to its key
	in, out  atomic.Int64
}

// outcome is why the broker ended a request.
type outcome string

func (o outcome) Error() string { return string(o) }

// drained is what is read of the body of a request that is refused.
const drained = 16 << 20

type exchangeKey struct{}

func exchangeOf(r *http.Request) *exchange { return r.Context().Value(exchangeKey{}).(*exchange) }

// newTransport has no time-outs: a reasoning model can think for minutes before
// it sends a header.
func newTransport() *http.Transport {
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, DisableCompression: true,
		MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second,
	}
}

// ServeHTTP checks a request, forwards it and records it.
func (b *broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	x := &exchange{record: record{ID: b.prefix + strconv.FormatInt(b.sequence.Add(1), 36), Method: r.Method}}
	x.Path = r.URL.Path[:min(len(r.URL.Path), 256)]
	ctx, cut := context.WithCancelCause(context.WithValue(r.Context(), exchangeKey{}, x))
	defer cut(nil)
	defer time.AfterFunc(time.Duration(b.config.MaxSession), func() { cut(outcome("max_session")) }).Stop()
	x.ctx, x.cut, r = ctx, cut, r.WithContext(ctx)
	if !isSocket(r) {
		r.Header.Del("Upgrade") // another protocol could carry unchecked requests
		if b.phase.Load() >= draining {
			w.Header().Set("Connection", "close") // none is left idle that the shutdown would close under a request
		}
	}
	refused := b.admit(x, r)
	if x.admitted {
		defer x.agent.limits.leave()
	}
	if refused == nil {
		x.key, refused = x.agent.keys.take(ctx)
	}
	if refused == nil {
		defer func() { x.agent.keys.release(x.key) }()
		x.Event, x.KeyID, x.LeaseID = "start", x.key.keyID, x.key.leaseID
		if !b.ledger.write(x.record) {
			refused = errAudit
		}
	}
	if refused != nil {
		b.refuse(w, r, x, refused)
		return
	}
	b.ledger.add(1, "requests_in_flight{agent=%q}", x.Agent)
	defer func() { // also when ReverseProxy panics because an answer broke off
		if x.detach != nil {
			x.detach()
		}
		if x.Outcome == "" && x.ctx.Err() != nil {
			x.Outcome = b.why(x)
		}
		x.Event, x.Outcome = "end", cmp.Or(x.Outcome, "answered")
		x.BytesIn, x.BytesOut, x.Millis = x.in.Load(), x.out.Load(), time.Since(began).Milliseconds()
		b.ledger.add(-1, "requests_in_flight{agent=%q}", x.Agent)
		b.ledger.add(1, "requests_total{agent=%q,outcome=%q}", x.Agent, x.Outcome)
		b.ledger.add(time.Since(began).Seconds(), "request_seconds_total{agent=%q}", x.Agent)
		b.ledger.write(x.record)
	}()
	b.reverse.ServeHTTP(w, r)
}

// refuse answers and records a request that is not forwarded.
func (b *broker) refuse(w http.ResponseWriter, r *http.Request, x *exchange, refused *refusal) {
	x.Outcome, x.Event, x.Status = refused.code, "refused", refused.status
	b.ledger.add(1, "requests_total{agent=%q,outcome=%q}", x.Agent, x.Outcome)
	if refused != errAudit || x.key != nil { // nothing is added while nothing can be written
		b.ledger.write(x.record)
	}
	// The rest of the body is waited for as long as a header is. Only tests have no connection.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(headerTimeout))
	if x.agent != nil { // else a client that is still sending sees a reset and no reason
		_, _ = io.CopyN(io.Discard, r.Body, drained)
	}
	refused.write(w)
}

var errAudit = refuse(http.StatusServiceUnavailable, "broker_audit", "The broker cannot write its audit log.")

// why says what ended a request's context.
func (b *broker) why(x *exchange) string {
	var own outcome
	switch {
	case errors.As(context.Cause(x.ctx), &own):
		return string(own)
	case b.phase.Load() == cutting:
		return "stopped"
	}
	return "canceled" // by the agent
}

// admit applies the rules in order, from the cheapest to the dearest.
func (b *broker) admit(x *exchange, r *http.Request) *refusal {
	if b.phase.Load() >= stopping {
		return &refusal{status: http.StatusServiceUnavailable, code: "broker_stopping", message: "The broker is stopping.", retry: time.Second}
	}
	if refused := checkOrigin(r, b.hosts); refused != nil {
		return refused
	}
	hash := sha256.Sum256([]byte(placeholder(r.Header)))
	for _, a := range b.agents {
		if subtle.ConstantTimeCompare(hash[:], a.hash[:]) == 1 {
			x.agent, x.Agent = a, a.Name
		}
	}
	if x.agent == nil {
		return refuse(http.StatusUnauthorized, "broker_token", "The broker does not know this API key: use the OPENAI_API_KEY that it gave to this agent.")
	}
	segments, refused := checkPath(r.Method, r.URL.EscapedPath(), x.agent.Allow)
	if refused != nil {
		return refused
	}
	if !b.ledger.write() {
		return errAudit
	}
	if refused := x.agent.limits.enter(); refused != nil {
		return refused
	}
	x.admitted = true
	if refused := x.keep(r); refused != nil || len(x.agent.Models) == 0 {
		return refused
	}
	return checkModels(r, segments, x.body, x.agent.Models)
}

var modelForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$`)

// keep reads a body of at most 1 MiB, so that the request can be repeated and
// its model be seen. A body of unknown size can be a stream, and passes unread.
func (x *exchange) keep(r *http.Request) *refusal {
	models := r.URL.Query()["model"]
	if r.ContentLength < 0 || r.ContentLength > keptBody {
		r.Body = &incoming{r.Body, &x.in}
	} else {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return refuse(http.StatusBadRequest, "broker_body", "The request body ended early.")
		}
		if x.in.Store(int64(len(body))); len(models) == 0 && len(body) > 0 {
			models, _ = bodyModels(body)
		}
		x.body = body
	}
	if len(models) > 0 && modelForm.MatchString(models[0]) {
		x.Model = models[0]
	}
	return nil
}

// rewrite makes the request that OpenAI receives: in the form that was checked,
// whatever the Connection header names.
func (b *broker) rewrite(pr *httputil.ProxyRequest) {
	pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = b.upstream.Scheme, b.upstream.Host, b.upstream.Host
	pr.Out.URL.Path, pr.Out.URL.RawPath = b.upstream.Path+pr.In.URL.Path[len("/v1"):], ""
	query := pr.In.URL.Query()
	maps.DeleteFunc(query, func(name string, _ []string) bool { return isStripped(name) })
	pr.Out.URL.RawQuery, pr.Out.Trailer = query.Encode(), nil
	strip(pr.Out.Header)
	if kind := pr.In.Header["Content-Type"]; kind != nil {
		pr.Out.Header["Content-Type"] = kind
	}
}

// missingScopes finds the 401 that is about the request and not about the key.
var missingScopes = regexp.MustCompile(`(?i)\bmissing scopes?: ([a-z_., ]*[a-z])`)

// RoundTrip sends a request with the agent's key. When OpenAI refuses the key,
// it asks for a successor and repeats the request once, if the body was kept.
func (b *broker) RoundTrip(out *http.Request) (*http.Response, error) {
	x := exchangeOf(out)
	out = out.WithContext(x.ctx) // without ReverseProxy's hook, which passes 1xx answers on as they are
	for try := 0; ; try++ {
		if len(x.body) > 0 { // GetBody lets the transport repeat what a closed idle connection did not take
			out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(x.body)), nil }
			out.Body, _ = out.GetBody()
		}
		out.Header.Set("Authorization", "Bearer "+x.key.key())
		resp, err := b.base.RoundTrip(out)
		if err != nil {
			return nil, err
		}
		refused := resp.StatusCode == http.StatusUnauthorized
		if refused {
			words, _ := io.ReadAll(io.LimitReader(resp.Body, keptBody)) // of which only the scopes pass: others quote the key
			_ = resp.Body.Close()
			x.RequestID = resp.Header.Get("X-Request-Id")
			if scopes := missingScopes.FindSubmatch(words); scopes != nil {
				x.agent.keys.judge(x.key, false)
				return nil, refuse(http.StatusForbidden, "broker_scope", "OpenAI reports that the key of this agent lacks scopes: "+string(scopes[1]))
			}
		}
		if x.agent.keys.judge(x.key, refused); !refused {
			answer := *resp // a copy, since the transport adds trailers to its own
			answer.Trailer = nil
			return &answer, nil
		}
		if try > 0 {
			return nil, refuse(http.StatusUnauthorized, "broker_key_refused", "OpenAI refused two keys for this request.")
		}
		next, none := x.agent.keys.take(x.ctx)
		if none != nil {
			return nil, none
		}
		x.agent.keys.release(x.key)
		if x.key, x.KeyID, x.LeaseID = next, next.keyID, next.leaseID; x.body == nil {
			return nil, refuse(http.StatusUnauthorized, "broker_key_replaced", "OpenAI refused the key, and the broker has a new one: send the request again.")
		}
	}
}

// answered prepares OpenAI's answer for the agent.
func (b *broker) answered(resp *http.Response) error {
	x := exchangeOf(resp.Request)
	x.Status, x.RequestID = resp.StatusCode, resp.Header.Get("X-Request-Id")
	resp.Header.Del("Set-Cookie")
	resp.Header.Del("Alt-Svc")
	resp.Body = &counted{resp.Body, x}
	if resp.StatusCode == http.StatusSwitchingProtocols { // a WebSocket does not outlive its key
		x.detach = context.AfterFunc(x.key.ctx, func() { x.cut(outcome("key_ended")) })
	}
	return nil
}

// unanswered answers for a request that got no answer from OpenAI.
func (b *broker) unanswered(w http.ResponseWriter, r *http.Request, err error) {
	x := exchangeOf(r)
	var own *refusal
	if !errors.As(err, &own) {
		own = refuse(http.StatusBadGateway, "broker_unreachable", "OpenAI cannot be reached.")
		if x.ctx.Err() != nil {
			own = refuse(http.StatusBadGateway, b.why(x), "The request was ended.")
		}
		b.log.Warn("no answer from OpenAI", "agent", x.Agent, "id", x.ID, "outcome", own.code, "error", err)
	}
	x.Status, x.Outcome = own.status, own.code
	own.write(w)
}

// counted is the body of an answer, or both directions of a WebSocket. It counts
// bytes, and notes an answer that breaks off.
type counted struct {
	io.ReadCloser
	x *exchange
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.x.out.Add(int64(n))
	switch {
	case err == nil || c.x.Status == http.StatusSwitchingProtocols:
	case err == io.EOF:
		c.x.Outcome = "answered" // whatever the agent does then
	case c.x.ctx.Err() == nil:
		c.x.Outcome = "broken_off"
	}
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	socket, isSocket := c.ReadCloser.(io.Writer)
	if !isSocket {
		return 0, errors.ErrUnsupported
	}
	n, err := socket.Write(b)
	c.x.in.Add(int64(n))
	return n, err
}

// incoming counts the bytes of a request's body.
type incoming struct {
	io.ReadCloser
	count *atomic.Int64
}

func (i *incoming) Read(b []byte) (int, error) {
	n, err := i.ReadCloser.Read(b)
	i.count.Add(int64(n))
	return n, err
}
