// Package client is the OpenAI Administration API in this engine's words, over
// the official SDK, which nothing outside this package imports.
//
// What must stay true:
//   - a create is sent once per call: only reads and deletes are retried here,
//     since no Admin endpoint documents an idempotency key (docs/openai-api.md);
//   - the environment cannot redirect a call: SDK services are built directly,
//     which read no OPENAI_* variable, and redirects are not followed;
//   - every call is bounded in time, in size and in number at once;
//   - errors are *Error and never carry a key.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/respjson"
)

const (
	// DefaultBaseURL is OpenAI's public endpoint.
	DefaultBaseURL = "https://api.openai.com/v1"
	// DefaultTimeout bounds one HTTP attempt, answer included.
	DefaultTimeout = 30 * time.Second
	// DefaultConcurrency bounds the calls in flight and is the size of the
	// idle connection pool. Vault can send 180 revokes at a time.
	DefaultConcurrency = 256
	// MinExpiry is the shortest expires_in_seconds of any key.
	MinExpiry = time.Second
	// MaxExpiry is the longest: one year (API reference).
	MaxExpiry = 31_536_000 * time.Second

	// maxBody bounds an answer. The largest page (100 keys with owners) is
	// about 60 KiB.
	maxBody = 4 << 20
	// maxAttempts bounds the tries of a read or a delete.
	maxAttempts = 4
	// maxWait is the longest wait between them. One that OpenAI wants longer is
	// its caller's to plan, who alone knows what else is waiting.
	maxWait = time.Minute
	// maxPages ends a listing whose cursor never does: 2,000 projects, the
	// documented maximum, are 20 pages.
	maxPages = 1000
	pageSize = 100
)

// Options are the settings of a Client. AdminKey is required, the rest has
// defaults.
type Options struct {
	AdminKey     Secret
	BaseURL      string        // default DefaultBaseURL; must be absolute
	Organization string        // sent as OpenAI-Organization when not empty
	CACert       []byte        // PEM; when given, the only roots trusted
	Timeout      time.Duration // one HTTP attempt; default DefaultTimeout
	Concurrency  int           // calls in flight; default DefaultConcurrency
	Pace         *Pace         // what is known of rate limits; default none
	UserAgent    string
}

// Client calls the Admin API with one admin key. It is safe for concurrent use
// and holds idle connections until Close.
type Client struct {
	host     string
	adminKey Secret
	timeout  time.Duration
	slots    chan struct{} // calls in flight, of which
	creates  chan struct{} // these are issues
	others   chan struct{} // and these are all others
	pace     *Pace
	http     *http.Transport
	accounts openai.AdminOrganizationProjectServiceAccountService
	keys     openai.AdminOrganizationProjectAPIKeyService
	admin    openai.AdminOrganizationAdminAPIKeyService
	projects openai.AdminOrganizationProjectService
}

// New builds a client; it makes no call. It fails on a base URL that is not an
// absolute one of HTTP or a CA bundle without a certificate.
func New(o Options) (*Client, error) {
	if o.AdminKey.IsZero() {
		return nil, errors.New("no admin key")
	}
	if o.BaseURL == "" {
		o.BaseURL = DefaultBaseURL
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Concurrency <= 0 {
		o.Concurrency = DefaultConcurrency
	}
	if o.Pace == nil {
		o.Pace = NewPace()
	}
	base, err := url.Parse(o.BaseURL)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		// Not quoted: what is no URL may well be something secret.
		return nil, errors.New("the base URL is not an absolute http or https URL")
	}

	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(o.CACert) > 0 {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(o.CACert) {
			return nil, errors.New("the CA bundle holds no certificate")
		}
		tlsConfig.RootCAs = pool
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       tlsConfig,
		TLSHandshakeTimeout:   10 * time.Second,
		ForceAttemptHTTP2:     true,
		MaxConnsPerHost:       o.Concurrency,
		MaxIdleConns:          o.Concurrency,
		MaxIdleConnsPerHost:   o.Concurrency,
		IdleConnTimeout:       90 * time.Second,
		ExpectContinueTimeout: time.Second,
		// All calls may share one HTTP/2 connection. When its other end vanishes
		// without a word, TCP takes minutes to notice and each call until then
		// would wait out its timeout; a ping notices within the first.
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: min(15*time.Second, o.Timeout/2),
			PingTimeout:     min(15*time.Second, o.Timeout/2),
		},
	}
	options := []option.RequestOption{
		option.WithBaseURL(strings.TrimRight(o.BaseURL, "/") + "/"),
		option.WithAdminAPIKey(o.AdminKey.Reveal()),
		option.WithMaxRetries(0),
		option.WithHTTPClient(&http.Client{
			Transport:     boundedBody{transport},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}),
	}
	if o.Organization != "" {
		options = append(options, option.WithOrganization(o.Organization))
	}
	if o.UserAgent != "" {
		options = append(options, option.WithHeader("User-Agent", o.UserAgent))
	}
	return &Client{
		host:     base.Host,
		adminKey: o.AdminKey,
		timeout:  o.Timeout,
		slots:    make(chan struct{}, o.Concurrency),
		creates:  make(chan struct{}, o.Concurrency-o.Concurrency/4),
		others:   make(chan struct{}, o.Concurrency-o.Concurrency/4),
		pace:     o.Pace,
		http:     transport,
		accounts: openai.NewAdminOrganizationProjectServiceAccountService(options...),
		keys:     openai.NewAdminOrganizationProjectAPIKeyService(options...),
		admin:    openai.NewAdminOrganizationAdminAPIKeyService(options...),
		projects: openai.NewAdminOrganizationProjectService(options...),
	}, nil
}

// Close drops idle connections; calls in flight go on.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Host returns the host that calls go to, for messages.
func (c *Client) Host() string { return c.host }

// callKind names an endpoint, each of which OpenAI limits by itself.
type callKind string

const (
	createServiceAccount callKind = "create_service_account"
	deleteServiceAccount callKind = "delete_service_account"
	listServiceAccounts  callKind = "list_service_accounts"
	createKey            callKind = "create_key"
	listKeys             callKind = "list_keys"
	updateKey            callKind = "update_key"
	deleteKey            callKind = "delete_key"
	createAdminKey       callKind = "create_admin_key"
	getAdminKey          callKind = "get_admin_key"
	listAdminKeys        callKind = "list_admin_keys"
	deleteAdminKey       callKind = "delete_admin_key"
	getProject           callKind = "get_project"
	listProjects         callKind = "list_projects"
)

// enter waits until a call fits the pace and the number of calls in flight,
// and says how to leave. What waits for its pace holds no slot.
func (c *Client) enter(ctx context.Context, v callKind, op string) (ticket, func(), *Error) {
	t, tooLong, err := c.pace.take(ctx, string(v))
	if tooLong > 0 {
		return t, nil, &Error{
			Op: op, Host: c.host, Status: http.StatusTooManyRequests, RetryAfter: tooLong, Cause: err, refused: true,
			Message: fmt.Sprintf("OpenAI limits the rate of these calls, and the next one fits in about %s", tooLong.Round(time.Second)),
		}
	}
	if err != nil {
		return t, nil, &Error{Op: op, Host: c.host, Cause: err}
	}
	// Issues and revokes each leave a quarter of the slots to the other.
	class := c.others
	if v == createServiceAccount || v == createKey {
		class = c.creates
	}
	for i, slots := range []chan struct{}{class, c.slots} {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			if i > 0 {
				<-class
			}
			return t, nil, &Error{Op: op, Host: c.host, Cause: fmt.Errorf("%d calls are under way and none has ended: %w", len(c.slots), ctx.Err())}
		}
	}
	return t, func() { <-c.slots; <-class }, nil
}

type finishKey struct{}

// Finish marks calls that, once sent, are waited for although their context is
// cancelled: a create that is broken off leaves something of which nothing is
// known but its name. Before that, and by its deadline, they end as any other.
func Finish(ctx context.Context) context.Context {
	return context.WithValue(ctx, finishKey{}, true)
}

// sdkCall is any SDK method with its arguments bound.
type sdkCall[T any] func(context.Context, ...option.RequestOption) (*T, error)

// once makes one attempt at a call and turns every way to fail into an *Error.
// valid says whether a decoded answer is what was asked for: the SDK decodes
// {} or a page of another service without complaint.
func once[T any](ctx context.Context, c *Client, v callKind, op string, valid func(*T) bool, call sdkCall[T]) (*T, error) {
	op = c.clean(op) // names and ids in it came from elsewhere
	t, leave, failure := c.enter(ctx, v, op)
	if failure != nil {
		return nil, failure
	}
	defer leave()
	if err := ctx.Err(); err != nil {
		return nil, &Error{Op: op, Host: c.host, Cause: err}
	}
	if ctx.Value(finishKey{}) != nil {
		deadline, bounded := ctx.Deadline()
		ctx = context.WithoutCancel(ctx)
		if bounded {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, deadline)
			defer cancel()
		}
	}
	result, failure := send(ctx, c, op, valid, call)
	c.pace.learn(t, failure)
	if failure != nil {
		return nil, failure
	}
	return result, nil
}

// send is the attempt itself.
func send[T any](ctx context.Context, c *Client, op string, valid func(*T) bool, call sdkCall[T]) (*T, *Error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var sent atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// Not WroteHeaders: over HTTP/2 that may be told after the server has
		// the request and its sender has gone.
		GotConn: func(httptrace.GotConnInfo) { sent.Store(true) },
	})

	// The SDK loses status and message of an error that is a bare string
	// (SDK v3.95.0), so the raw answer is always asked for.
	var raw *http.Response
	result, err := call(ctx, option.WithResponseInto(&raw))
	if err == nil && raw != nil && raw.StatusCode/100 == 2 && result != nil && valid(result) {
		return result, nil
	}

	failure := &Error{Op: op, Host: c.host, Sent: sent.Load()}
	if raw == nil {
		var transport *url.Error
		if !failure.Sent && ctx.Err() == nil && !errors.As(err, &transport) {
			return nil, c.refuse(op, c.clean(err.Error())) // the SDK never got as far as a request
		}
		failure.Cause = &cause{text: c.clean(withoutURL(err).Error()), err: err}
		return nil, failure
	}
	// The SDK's error is dropped: it holds the request, and with it the key.
	failure.Status = raw.StatusCode
	failure.Sent = true
	failure.RequestID = c.clean(raw.Header.Get("x-request-id"))
	failure.RetryAfter = retryAfter(raw.Header)
	switch {
	case raw.StatusCode/100 == 2:
		failure.Message = "the body is not the documented object"
	case raw.StatusCode/100 == 3:
		failure.Message = "redirects are not followed; check api_endpoint"
	default:
		if body, readErr := io.ReadAll(raw.Body); readErr == nil {
			failure.decodeBody(body, c.clean)
		}
	}
	return nil, failure
}

// refuse is the error of a call that this package does not make.
func (c *Client) refuse(op, why string) *Error {
	return &Error{Op: c.clean(op), Host: c.host, Message: why, refused: true}
}

// clean is the package's clean for text that may quote the admin key, whatever
// that looks like; one too short to be a key would only garble the text.
func (c *Client) clean(text string) string {
	if key := c.adminKey.Reveal(); len(key) >= 8 {
		text = strings.ReplaceAll(text, key, redacted)
	}
	return clean(text)
}

// repeat is once for calls that may be made again without harm (reads and
// deletes), with jittered exponential backoff from 250 ms. It honours
// Retry-After, and gives up early when that is longer than maxWait or the
// context would end first.
func repeat[T any](ctx context.Context, c *Client, v callKind, op string, valid func(*T) bool, call sdkCall[T]) (*T, error) {
	var said *Error // the last that OpenAI said
	for attempt := 0; ; {
		result, err := once(ctx, c, v, op, valid, call)
		if err == nil {
			return result, nil
		}
		failure := AsError(err)
		if !failure.Sent && said != nil {
			// Why there was an answer before says more than that time is up.
			said.RetryAfter = max(said.RetryAfter, failure.RetryAfter)
			return nil, said
		}
		if !failure.Retryable() || ctx.Err() != nil {
			return nil, err
		}
		if failure.Sent {
			said = failure
		}
		if failure.RateLimited() {
			// The pace knows when the next call fits, and the context bounds
			// the wait; a 429 is no attempt that might have had an effect.
			if failure.RetryAfter > maxWait {
				return nil, err
			}
			continue
		}
		if attempt++; attempt >= maxAttempts || Wait(ctx, Backoff(attempt-1, failure.RetryAfter)) != nil {
			return nil, err
		}
	}
}

// Backoff is the wait before attempt+1: 250 ms · 2^attempt, capped at 8 s, of
// which the upper half is random, and never less than the server asked for.
func Backoff(attempt int, asked time.Duration) time.Duration {
	delay := min(250*time.Millisecond<<min(attempt, 10), 8*time.Second)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	return max(delay, asked)
}

// Wait sleeps for d. It returns at once, with an error, when the context is
// done or would be before d has passed.
func Wait(ctx context.Context, d time.Duration) error {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < d {
		return context.DeadlineExceeded
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// page is one page of a listing, whichever of the two cursor styles it has.
type page[T any] struct {
	items []T
	last  string // the answer's last_id, "" where the style has none
	more  bool
}

// collect reads a listing to its end. The next cursor is the answer's last_id
// or else the id of the last item (OpenAPI document). Whoever asks decides by what is
// absent, so a listing that cannot be read to its end is an error, never a
// shorter one: that is a cursor that repeats, a further page that nothing leads
// to, and an item without an id.
func collect[T any](c *Client, op string, id func(T) string, next func(after string) (page[T], error)) ([]T, error) {
	var all []T
	broken := func(format string, args ...any) error {
		return &Error{Op: c.clean(op), Host: c.host, Status: http.StatusOK, Sent: true, Message: fmt.Sprintf(format, args...)}
	}
	after := ""
	seen := map[string]bool{"": true}
	for range maxPages {
		p, err := next(after)
		if err != nil {
			return nil, err
		}
		for _, item := range p.items {
			if id(item) == "" {
				return nil, broken("the listing has an item without an id")
			}
		}
		all = append(all, p.items...)
		if !p.more {
			return all, nil
		}
		after = p.last
		if after == "" && len(p.items) > 0 {
			after = id(p.items[len(p.items)-1])
		}
		if seen[after] {
			return nil, broken("the listing repeats itself after %d items", len(all))
		}
		seen[after] = true
	}
	return nil, broken("the listing has more than %d pages", maxPages)
}

// hasMore reads has_more. Without one, the end is where nothing comes any more:
// one call too many is better than a listing cut short.
func hasMore(field respjson.Field, value bool, items int) bool {
	if field.Valid() {
		return value
	}
	return items > 0
}

// retryAfter reads the header's two forms, seconds and HTTP date; 0 when it is
// absent or makes no sense, and an hour at most.
func retryAfter(h http.Header) time.Duration {
	value := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 63); err == nil {
		return time.Duration(min(seconds, 3600)) * time.Second // #nosec G115 -- bounded
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, min(time.Until(at), time.Hour))
	}
	return 0
}

// withoutURL drops the *url.Error around a transport error: the host is named
// already, and the URL's query is nobody's business.
func withoutURL(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		return wrapped.Err
	}
	return err
}

// cause is a transport error whose text, which may quote the server, is clean,
// and in which errors.Is still finds what there was.
type cause struct {
	text string
	err  error
}

func (c *cause) Error() string { return c.text }

func (c *cause) Unwrap() error { return c.err }

// boundedBody reads each answer whole, up to maxBody, so that a broken answer
// is an error of the attempt rather than of whoever reads on. The body of a
// refusal may be broken or too long all the same: its status says enough.
type boundedBody struct{ next http.RoundTripper }

func (b boundedBody) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	closeErr := resp.Body.Close()
	switch {
	case resp.StatusCode >= http.StatusBadRequest:
	case err != nil:
		return nil, fmt.Errorf("the answer broke off: %w", err)
	case len(body) > maxBody:
		return nil, fmt.Errorf("the answer is larger than %d bytes", maxBody)
	case closeErr != nil:
		return nil, closeErr
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	resp.ContentLength = int64(len(body))
	return resp, nil
}
