package client

// This file owns how a call is made: rate limiting, the attempt, its answer, retries,
// and reading a listing to its end.
//
// What must stay true: a create is sent once; every failure is an *Error with a clean
// text; nothing waits beyond its context.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// acquirePermit waits for the rate limiter. It holds no slot meanwhile.
func (c *Client) acquirePermit(ctx context.Context, o operation) (ticket, *Error) {
	t, tooLong, err := c.rateLimiter.acquire(ctx, o.name)
	if tooLong > 0 {
		return t, &Error{
			Host: c.host, Status: http.StatusTooManyRequests, RetryAfter: tooLong, Cause: err, refused: true,
			Message: fmt.Sprintf("OpenAI limits the rate of these calls; retry in about %s", tooLong.Round(time.Second)),
		}
	}
	if err != nil {
		return t, &Error{Host: c.host, Cause: err}
	}
	return t, nil
}

// acquireSlot waits until the number of calls in flight allows another.
func (c *Client) acquireSlot(ctx context.Context, o operation) (release func(), failure *Error) {
	class := c.others
	if o.issues() {
		class = c.creates
	}
	for i, slots := range []chan struct{}{class, c.slots} {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			if i > 0 {
				<-class
			}
			return nil, &Error{Host: c.host, Cause: fmt.Errorf("timed out waiting for %d calls in progress (max_concurrent_requests): %w", len(c.slots), ctx.Err())}
		}
	}
	return func() { <-c.slots; <-class }, nil
}

// CallOption changes how one call is made, or returns more of its result.
type CallOption func(*callOptions)

type callOptions struct {
	withoutCancel bool
	requestID     *string
}

// WithoutCancelAfterSend ignores the cancellation of the context once the call was sent:
// a canceled create may leave an account or key whose ID is unknown. The deadline of the
// context still applies.
func WithoutCancelAfterSend() CallOption {
	return func(o *callOptions) { o.withoutCancel = true }
}

// WithRequestID stores the x-request-id of the call's last answer, which OpenAI's support
// asks for, in id. Without an answer, id is unchanged.
func WithRequestID(id *string) CallOption {
	return func(o *callOptions) { o.requestID = id }
}

func optionsOf(options []CallOption) callOptions {
	var o callOptions
	for _, set := range options {
		set(&o)
	}
	return o
}

// doOnce makes a call once. Every failure is an *Error.
func doOnce[T answer](ctx context.Context, c *Client, r request) (T, error) {
	var result, none T
	failure := c.perform(ctx, r, func(body []byte) bool {
		return json.Unmarshal(body, &result) == nil && result.valid()
	})
	if failure != nil {
		failure.Op = c.clean(r.what) // contains names and IDs from outside
		return none, failure
	}
	return result, nil
}

// perform waits until the call may be made, and makes it. Its errors lack Op.
func (c *Client) perform(ctx context.Context, r request, decode func(body []byte) bool) *Error {
	asked := time.Now()
	t, failure := c.acquirePermit(ctx, r.operation)
	if failure != nil {
		if failure.RateLimited() {
			c.observer.Throttled(r.name, true)
		}
		return failure
	}
	release, failure := c.acquireSlot(ctx, r.operation)
	if failure != nil {
		return failure
	}
	defer release()
	if err := ctx.Err(); err != nil {
		return &Error{Host: c.host, Cause: err}
	}
	if r.options.withoutCancel {
		deadline, bounded := ctx.Deadline()
		ctx = context.WithoutCancel(ctx)
		if bounded {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, deadline)
			defer cancel()
		}
	}
	failure = c.observed(r.operation, asked, func() *Error { return c.send(ctx, r, decode) })
	c.rateLimiter.learn(t, failure)
	return failure
}

// send makes one attempt: it sends the request and reads the complete answer. It is the
// only sender in this package.
func (c *Client) send(ctx context.Context, r request, decode func(body []byte) bool) *Error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var sent atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// Not WroteHeaders: over HTTP/2 it may be called after the server has the
		// request and the sender has returned.
		GotConn: func(httptrace.GotConnInfo) { sent.Store(true) },
	})
	req, err := c.newRequest(ctx, r)
	if err != nil {
		return c.refuse("", c.clean(err.Error()))
	}
	noAnswer := func(err error) *Error {
		return &Error{Host: c.host, Sent: sent.Load(), Cause: &cause{text: c.clean(err.Error()), err: err}}
	}
	// Not an http.Client, which would follow a redirect and send the admin key to its
	// target.
	resp, err := c.http.RoundTrip(req)
	if err != nil {
		return noAnswer(err)
	}
	defer resp.Body.Close()
	body, err := readBody(resp.Body, cmp.Or(r.maxBody, maxBody))
	id := c.clean(resp.Header.Get("x-request-id"))
	if r.options.requestID != nil {
		*r.options.requestID = id
	}
	failure := &Error{Host: c.host, Sent: true, Status: resp.StatusCode, RequestID: id, RetryAfter: retryAfter(resp.Header)}
	switch resp.StatusCode / 100 {
	case 2:
		if err != nil {
			return noAnswer(err)
		}
		if isJSON(resp.Header) && decode(body) {
			c.clock.read(resp.Header)
			return nil
		}
		failure.Message = "the body is not the documented object"
	case 3:
		failure.Message = "redirects are not followed; check api_endpoint"
	default:
		// Even if the body is truncated, since the status is sufficient.
		failure.decodeBody(body, c.clean)
	}
	return failure
}

// newRequest builds the HTTP request of a call.
func (c *Client) newRequest(ctx context.Context, r request) (*http.Request, error) {
	target, err := r.target()
	if err != nil {
		return nil, err
	}
	var body io.Reader
	if r.body != nil {
		encoded, err := json.Marshal(r.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.baseURL+target, body)
	if err != nil {
		return nil, err
	}
	// No Idempotency-Key in any spelling: net/http resends a POST that has one.
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Authorization", "Bearer "+c.adminKey.Reveal())
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.organization != "" {
		req.Header.Set("OpenAI-Organization", c.organization)
	}
	if c.userAgent != "" {
		req.Header.Set("User-Agent", c.userAgent)
	}
	return req, nil
}

// tooLargeError is the cause of an answer that was not read to its end.
type tooLargeError int64

func (limit tooLargeError) Error() string {
	return fmt.Sprintf("the response is larger than %d bytes", int64(limit))
}

func isTooLarge(err error) bool {
	var limit tooLargeError
	return errors.As(err, &limit)
}

// readBody reads a complete answer, up to limit.
func readBody(from io.Reader, limit int64) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(from, limit+1))
	if err != nil {
		return body, fmt.Errorf("reading the response: %w", err)
	}
	if int64(len(body)) > limit {
		return body, tooLargeError(limit)
	}
	return body, nil
}

// isJSON reports whether the Content-Type is JSON.
func isJSON(h http.Header) bool {
	media, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	return media == "application/json" || strings.HasSuffix(media, "+json")
}

// refuse is the error of a call that is not sent.
func (c *Client) refuse(op, why string) *Error {
	return &Error{Op: c.clean(op), Host: c.host, Message: why, refused: true}
}

// clean is the package's clean for text that may quote the key that was sent, in any
// form; a value too short to be a key would only garble the text.
func (c *Client) clean(text string) string {
	if key := c.adminKey.Reveal(); len(key) >= 8 {
		text = strings.ReplaceAll(text, key, redacted)
	}
	return clean(text)
}

// doWithRetry is doOnce for idempotent calls (reads, updates and deletes), with jittered
// exponential backoff from 250 ms. It honors Retry-After, and gives up early when that is
// longer than maxWait or than the context allows. The number of attempts is bounded.
func doWithRetry[T answer](ctx context.Context, c *Client, r request) (T, error) {
	var none T
	var answered *Error // the last error that was an answer
	attempt, limited := 0, 0
	for again := false; ; again = true {
		if again {
			c.observer.Repeated(r.name)
		}
		result, err := doOnce[T](ctx, c, r)
		if err == nil {
			return result, nil
		}
		failure := AsError(err)
		if !failure.Sent && answered != nil {
			// The earlier answer says more than a timeout.
			answered.RetryAfter = max(answered.RetryAfter, failure.RetryAfter)
			return none, answered
		}
		if !failure.Retryable() || ctx.Err() != nil || isTooLarge(err) {
			return none, err
		}
		if failure.Sent {
			answered = failure
		}
		if failure.RateLimited() {
			// The rate limiter delays the next call. A 429 has no effect at OpenAI, so it
			// does not count as an attempt.
			if limited++; limited >= maxLimited || failure.RetryAfter > maxWait {
				return none, err
			}
			continue
		}
		if attempt++; attempt >= maxAttempts || Wait(ctx, Backoff(attempt-1, failure.RetryAfter)) != nil {
			return none, err
		}
	}
}

// Backoff is the wait before attempt+1: 250 ms · 2^attempt, capped at 8 s, of which the
// upper half is random, and at least as long as the server asked for.
func Backoff(attempt int, asked time.Duration) time.Duration {
	delay := min(250*time.Millisecond<<min(attempt, 10), 8*time.Second)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	return max(delay, asked)
}

// Wait sleeps for d. It returns an error immediately if the context would end first.
func Wait(ctx context.Context, d time.Duration) error {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= d {
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

// page is one page of a listing, in either of the two cursor styles.
type page[T any] struct {
	items []T
	last  string // the answer's last_id, "" if it has none
	more  bool
}

// pageOf converts a page of an answer to this package's types.
func pageOf[W, T any](l listing[W], public func(W) T) page[T] {
	p := page[T]{last: string(l.LastID), more: l.HasMore != nil && *l.HasMore}
	for _, item := range l.Data {
		p.items = append(p.items, public(item))
	}
	return p
}

// walk reads a listing to its end, a page at a time. The next cursor is the answer's
// last_id or else the ID of the last item (OpenAPI document). Callers rely on absence
// from the listing, so any listing that cannot be read to its end is an error: a cursor
// that repeats, a further page without a cursor, or an item without an ID. An error of
// each stops the listing and is returned unchanged.
func walk[T any](c *Client, what string, id func(T) string, next func(after string) (page[T], error), each func([]T) error) error {
	items := 0
	broken := func(format string, args ...any) error {
		return &Error{Op: c.clean(what), Host: c.host, Status: http.StatusOK, Sent: true, Message: fmt.Sprintf(format, args...)}
	}
	after := ""
	// Hashes, because the server chooses the length of a cursor. Each listing has a new
	// seed, so that a collision does not recur.
	seed := maphash.MakeSeed()
	seen := map[uint64]bool{maphash.String(seed, after): true}
	for range maxPages {
		p, err := next(after)
		if err != nil {
			return err
		}
		for _, item := range p.items {
			if id(item) == "" {
				return broken("the listing has an item without an id")
			}
		}
		if items += len(p.items); len(p.items) > 0 {
			if err := each(p.items); err != nil {
				return err
			}
		}
		if !p.more {
			return nil
		}
		after = p.last
		if after == "" && len(p.items) > 0 {
			after = id(p.items[len(p.items)-1])
		}
		hash := maphash.String(seed, after)
		if seen[hash] {
			return broken("the listing repeats itself after %d items", items)
		}
		seen[hash] = true
	}
	return broken("the listing has more than %d pages", maxPages)
}

// collect is walk into one list.
func collect[T any](c *Client, what string, id func(T) string, next func(after string) (page[T], error)) ([]T, error) {
	return gather(func(each func([]T) error) error { return walk(c, what, id, next, each) })
}

// gather returns all items of a listing, and none after an error.
func gather[T any](listing func(each func([]T) error) error) ([]T, error) {
	var all []T
	if err := listing(func(items []T) error { all = append(all, items...); return nil }); err != nil {
		return nil, err
	}
	return all, nil
}

// retryAfter parses the header's two forms, seconds and HTTP date. It returns 0 if the
// header is absent or invalid, and at most an hour.
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

// cause is a transport error with a clean text, since the original may quote the server.
// It unwraps to the original.
type cause struct {
	text string
	err  error
}

func (c *cause) Error() string { return c.text }

func (c *cause) Unwrap() error { return c.err }
