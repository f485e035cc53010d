package client

// This file owns how a call is made: its turn, the attempt, what becomes of
// the answer, trying again, and reading a listing to its end.
//
// What must stay true: a create is sent once; whatever fails is an *Error
// whose text is clean; nothing waits beyond its context.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/openai/openai-go/v3/option"
)

// callKind names an endpoint, each of which OpenAI limits by itself.
type callKind string

const (
	createServiceAccount callKind = "create_service_account"
	deleteServiceAccount callKind = "delete_service_account"
	getServiceAccount    callKind = "get_service_account"
	listServiceAccounts  callKind = "list_service_accounts"
	createKey            callKind = "create_key"
	getKey               callKind = "get_key"
	listKeys             callKind = "list_keys"
	updateKey            callKind = "update_key"
	deleteKey            callKind = "delete_key"
	createAdminKey       callKind = "create_admin_key"
	getAdminKey          callKind = "get_admin_key"
	listAdminKeys        callKind = "list_admin_keys"
	deleteAdminKey       callKind = "delete_admin_key"
	getProject           callKind = "get_project"
	listProjects         callKind = "list_projects"
	probeKey             callKind = "probe_key"
)

// turn waits until a call fits the pace. What waits for that holds no slot.
func (c *Client) turn(ctx context.Context, v callKind) (ticket, *Error) {
	t, tooLong, err := c.pace.take(ctx, string(v))
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

// enter waits until a call fits the number of calls in flight, and says how to
// leave.
func (c *Client) enter(ctx context.Context, v callKind) (leave func(), failure *Error) {
	// Issues leave some of the slots to all other calls, and those to issues.
	class := c.others
	if v == createServiceAccount || v == createKey || v == probeKey {
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

type requestIDKey struct{}

// Trace has the x-request-id of the last answer to a call, which OpenAI's
// support asks for, put into id. It is for calls of one goroutine.
func Trace(ctx context.Context, id *string) context.Context {
	return context.WithValue(ctx, requestIDKey{}, id)
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

// plain has an answer decoded into a type of this package's. The SDK's own types
// keep the raw text of every field, which is half of the work of a call: too much
// for the two that each credential costs.
func plain[T, S any](call sdkCall[S]) sdkCall[T] {
	return func(ctx context.Context, o ...option.RequestOption) (*T, error) {
		answer := new(T)
		_, err := call(ctx, append(o, option.WithResponseBodyInto(answer))...)
		return answer, err
	}
}

// unixTime is a time in seconds, 0 for anything that is no number or no time that
// can be written down, and label is a text, "" for anything else: whether an
// answer can do without them is for its reader to say.
type (
	unixTime int64
	label    string
)

// maxUnix is the end of the year 9999. Beyond an int64, what a conversion gives
// differs between processors.
const maxUnix = 253402300799

func (l *label) UnmarshalJSON(raw []byte) error {
	_ = json.Unmarshal(raw, (*string)(l))
	return nil
}

func (u *unixTime) UnmarshalJSON(text []byte) error {
	*u = 0
	if seconds, err := strconv.ParseFloat(string(text), 64); err == nil && math.Abs(seconds) <= maxUnix {
		*u = unixTime(seconds)
	}
	return nil
}

// once makes one attempt at a call and turns every way to fail into an *Error.
// valid says whether a decoded answer is what was asked for: the SDK decodes
// {} or a page of another service without complaint.
func once[T any](ctx context.Context, c *Client, v callKind, op string, valid func(*T) bool, call sdkCall[T]) (*T, error) {
	result, failure := attempt(ctx, c, v, valid, call)
	if failure != nil {
		failure.Op = c.clean(op) // names and ids in it came from elsewhere
		return nil, failure
	}
	return result, nil
}

// attempt is once with errors that do not say yet what it was.
func attempt[T any](ctx context.Context, c *Client, v callKind, valid func(*T) bool, call sdkCall[T]) (*T, *Error) {
	asked := time.Now()
	t, failure := c.turn(ctx, v)
	if failure != nil {
		if failure.RateLimited() {
			c.observer.Throttled(string(v), true)
		}
		return nil, failure
	}
	leave, failure := c.enter(ctx, v)
	if failure != nil {
		return nil, failure
	}
	defer leave()
	if err := ctx.Err(); err != nil {
		return nil, &Error{Host: c.host, Cause: err}
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
	result, failure := observed(c, v, asked, func() (*T, *Error) { return send(ctx, c, valid, call) })
	c.pace.learn(t, failure)
	return result, failure
}

// send is the attempt itself.
func send[T any](ctx context.Context, c *Client, valid func(*T) bool, call sdkCall[T]) (*T, *Error) {
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
	if id, traced := ctx.Value(requestIDKey{}).(*string); traced && raw != nil {
		*id = c.clean(raw.Header.Get("x-request-id"))
	}
	if err == nil && raw != nil && raw.StatusCode/100 == 2 && result != nil && valid(result) {
		return result, nil
	}

	failure := &Error{Host: c.host, Sent: sent.Load()}
	if raw == nil {
		var transport *url.Error
		if !failure.Sent && ctx.Err() == nil && !errors.As(err, &transport) {
			return nil, c.refuse("", c.clean(err.Error())) // the SDK never got as far as a request
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
// context would end first. It ends without a deadline, too.
func repeat[T any](ctx context.Context, c *Client, v callKind, op string, valid func(*T) bool, call sdkCall[T]) (*T, error) {
	var said *Error // the last that OpenAI said
	attempt, limited := 0, 0
	for again := false; ; again = true {
		if again {
			c.observer.Repeated(string(v))
		}
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
			// The pace knows when the next call fits; a 429 is no attempt that
			// might have had an effect.
			if limited++; limited >= maxLimited || failure.RetryAfter > maxWait {
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

// walk reads a listing to its end, a page at a time. The next cursor is the
// answer's last_id or else the id of the last item (OpenAPI document). Callers
// decide by what is absent, so a listing that cannot be read to its end is an
// error: a cursor that repeats, a further page without a cursor, or an item
// without an id. An error of each ends the listing and is returned unchanged.
func walk[T any](c *Client, op string, id func(T) string, next func(after string) (page[T], error), each func([]T) error) error {
	items := 0
	broken := func(format string, args ...any) error {
		return &Error{Op: c.clean(op), Host: c.host, Status: http.StatusOK, Sent: true, Message: fmt.Sprintf(format, args...)}
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
func collect[T any](c *Client, op string, id func(T) string, next func(after string) (page[T], error)) ([]T, error) {
	return gather(func(each func([]T) error) error { return walk(c, op, id, next, each) })
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
