package client

// This file owns how a call is made: its turn, the attempt, what becomes of
// the answer, trying again, and reading a listing to its end.
//
// What must stay true: a create is sent once; whatever fails is an *Error
// whose text is clean; nothing waits beyond its context.

import (
	"bytes"
	"context"
	"encoding/json"
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

// acquirePermit waits until a call fits the pace. It holds no slot meanwhile.
func (c *Client) acquirePermit(ctx context.Context, o operation) (ticket, *Error) {
	t, tooLong, err := c.pace.take(ctx, o.name)
	if tooLong > 0 {
		return t, &Error{
			Host: c.host, Status: http.StatusTooManyRequests, RetryAfter: tooLong, Cause: err, refused: true,
			Message: fmt.Sprintf("OpenAI limits the rate of these calls, and the next one fits in about %s", tooLong.Round(time.Second)),
		}
	}
	if err != nil {
		return t, &Error{Host: c.host, Cause: err}
	}
	return t, nil
}

// acquireSlot waits until a call fits the number of calls in flight, and returns
// how to give the slot back.
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
			return nil, &Error{Host: c.host, Cause: fmt.Errorf("%d calls are under way and none has ended: %w", len(c.slots), ctx.Err())}
		}
	}
	return func() { <-c.slots; <-class }, nil
}

// CallOption changes how one call is made, or takes more of what comes of it.
type CallOption func(*callOptions)

type callOptions struct {
	withoutCancel bool
	requestID     *string
}

// WithoutCancelAfterSend has a call that was sent waited for although its context
// is cancelled: a create that is broken off leaves something of which nothing is
// known but its name. Before that, and by its deadline, it ends as any other.
func WithoutCancelAfterSend() CallOption {
	return func(o *callOptions) { o.withoutCancel = true }
}

// WithRequestID puts the x-request-id of the call's last answer, which OpenAI's
// support asks for, into id. Without an answer id stays as it is.
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

// doOnce makes a call once, and turns every way to fail into an *Error.
func doOnce[T answer](ctx context.Context, c *Client, r request) (T, error) {
	var result, none T
	failure := c.perform(ctx, r, func(body []byte) bool {
		return json.Unmarshal(body, &result) == nil && result.valid()
	})
	if failure != nil {
		failure.Op = c.clean(r.what) // names and IDs in it came from elsewhere
		return none, failure
	}
	return result, nil
}

// perform waits until the call may be made, and makes it. Its errors do not say
// yet what was being done.
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
	c.pace.learn(t, failure)
	return failure
}

// send is the attempt itself: one request, and its answer read whole. Nothing else
// in this package sends anything.
func (c *Client) send(ctx context.Context, r request, decode func(body []byte) bool) *Error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var sent atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// Not WroteHeaders: over HTTP/2 that may be told after the server has
		// the request and its sender has gone.
		GotConn: func(httptrace.GotConnInfo) { sent.Store(true) },
	})
	req, err := c.newRequest(ctx, r)
	if err != nil {
		return c.refuse("", c.clean(err.Error()))
	}
	noAnswer := func(err error) *Error {
		return &Error{Host: c.host, Sent: sent.Load(), Cause: &cause{text: c.clean(err.Error()), err: err}}
	}
	// Not by an http.Client, which follows redirects and sends a request again to
	// where they point. Here a redirect is an answer as any other.
	resp, err := c.http.RoundTrip(req)
	if err != nil {
		return noAnswer(err)
	}
	defer resp.Body.Close()
	body, err := readBody(resp.Body)
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
		// The body may be broken or too long: the status says enough.
		failure.decodeBody(body, c.clean)
	}
	return failure
}

// newRequest makes the HTTP request of a call.
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
	// No Idempotency-Key in any spelling: net/http takes it as leave to send a POST
	// again.
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

// readBody reads an answer to its end, up to maxBody.
func readBody(from io.Reader) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(from, maxBody+1))
	if err != nil {
		return body, fmt.Errorf("the answer broke off: %w", err)
	}
	if len(body) > maxBody {
		return body, fmt.Errorf("the answer is larger than %d bytes", maxBody)
	}
	return body, nil
}

// isJSON reports whether an answer says that it is JSON.
func isJSON(h http.Header) bool {
	media, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	return media == "application/json" || strings.HasSuffix(media, "+json")
}

// refuse is the error of a call that this package does not make.
func (c *Client) refuse(op, why string) *Error {
	return &Error{Op: c.clean(op), Host: c.host, Message: why, refused: true}
}

// clean is the package's clean for text that may quote the key that was sent, whatever
// that looks like; one too short to be a key would only garble the text.
func (c *Client) clean(text string) string {
	if key := c.adminKey.Reveal(); len(key) >= 8 {
		text = strings.ReplaceAll(text, key, redacted)
	}
	return clean(text)
}

// doWithRetry is doOnce for calls that may be made again without harm (reads,
// updates and deletes), with jittered exponential backoff from 250 ms. It honours
// Retry-After, and gives up early when that is longer than maxWait or the
// context would end first. It ends without a deadline, too.
func doWithRetry[T answer](ctx context.Context, c *Client, r request) (T, error) {
	var none T
	var said *Error // the last that OpenAI said
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
		if !failure.Sent && said != nil {
			// Why there was an answer before says more than that time is up.
			said.RetryAfter = max(said.RetryAfter, failure.RetryAfter)
			return none, said
		}
		if !failure.Retryable() || ctx.Err() != nil {
			return none, err
		}
		if failure.Sent {
			said = failure
		}
		if failure.RateLimited() {
			// The pace knows when the next call fits; a 429 is no attempt that
			// might have had an effect.
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

// Backoff is the wait before attempt+1: 250 ms · 2^attempt, capped at 8 s, of
// which the upper half is random, and never less than the server asked for.
func Backoff(attempt int, asked time.Duration) time.Duration {
	delay := min(250*time.Millisecond<<min(attempt, 10), 8*time.Second)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	return max(delay, asked)
}

// Wait sleeps for d. It returns at once, with an error, when the context is
// done or would be by the time that d has passed.
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

// page is one page of a listing, whichever of the two cursor styles it has.
type page[T any] struct {
	items []T
	last  string // the answer's last_id, "" where the style has none
	more  bool
}

// pageOf is a listing's page with its items in this package's words.
func pageOf[W, T any](l listing[W], public func(W) T) page[T] {
	p := page[T]{last: string(l.LastID), more: l.HasMore != nil && *l.HasMore}
	for _, item := range l.Data {
		p.items = append(p.items, public(item))
	}
	return p
}

// walk reads a listing to its end, a page at a time. The next cursor is the
// answer's last_id or else the id of the last item (OpenAPI document). Callers
// decide by what is absent, so a listing that cannot be read to its end is an
// error: a cursor that repeats, a further page without a cursor, or an item
// without an id. An error of each ends the listing and is returned unchanged.
func walk[T any](c *Client, what string, id func(T) string, next func(after string) (page[T], error), each func([]T) error) error {
	items := 0
	broken := func(format string, args ...any) error {
		return &Error{Op: c.clean(what), Host: c.host, Status: http.StatusOK, Sent: true, Message: fmt.Sprintf(format, args...)}
	}
	after := ""
	// Hashes, because a cursor is as long as the server likes. The seed is new
	// for each listing, so that a collision does not come back.
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

// gather returns all that a listing has, and nothing after an error.
func gather[T any](listing func(each func([]T) error) error) ([]T, error) {
	var all []T
	if err := listing(func(items []T) error { all = append(all, items...); return nil }); err != nil {
		return nil, err
	}
	return all, nil
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

// cause is a transport error whose text, which may quote the server, is clean,
// and in which errors.Is still finds what there was.
type cause struct {
	text string
	err  error
}

func (c *cause) Error() string { return c.text }

func (c *cause) Unwrap() error { return c.err }
