package client

// This file owns the interface through which calls are counted and timed.
//
// What must stay true: an observer gets no key, name or ID, so it cannot leak one.

import (
	"net/http"
	"time"
)

// Observer gets the attempts of all calls, named by their operation. Its methods are
// called concurrently and during requests, so they must be fast.
type Observer interface {
	// Began is called before an attempt is sent, with the time that it waited for the
	// rate limiter and a slot.
	Began(call string, waited time.Duration)
	// Ended is called with the HTTP status, or 0 without a valid answer.
	Ended(call string, status int, took time.Duration)
	// Throttled is called for each temporary 429, and for each call that is not sent
	// because the wait would be too long.
	Throttled(call string, heldBack bool)
	// Repeated is called when a failed call is repeated.
	Repeated(call string)
}

// observed makes an attempt and reports it to the observer; asked is when its wait began.
func (c *Client) observed(o operation, asked time.Time, attempt func() *Error) *Error {
	sent := time.Now()
	c.observer.Began(o.name, sent.Sub(asked))
	failure := attempt()
	took := time.Since(sent)
	status := http.StatusOK
	if failure != nil {
		status = failure.Status
		if status/100 == 2 {
			status = 0 // not OpenAI's answer
		}
		// A 429 to a probe is the project's limit, not the Admin API's.
		if failure.RateLimited() && failure.Retryable() && o != probeKey {
			c.observer.Throttled(o.name, false)
		}
	}
	c.observer.Ended(o.name, status, took)
	return failure
}

// noObserver ignores all calls.
type noObserver struct{}

func (noObserver) Began(string, time.Duration)      {}
func (noObserver) Ended(string, int, time.Duration) {}
func (noObserver) Throttled(string, bool)           {}
func (noObserver) Repeated(string)                  {}
