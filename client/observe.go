package client

// This file owns what others may learn of the calls as they are made, which is
// enough for counting and timing them. What counts them is not this package's.
//
// What must stay true: an observer learns neither a key nor a name nor an ID,
// so nothing that it does can leak one.

import (
	"net/http"
	"time"
)

// Observer is told of every attempt at a call, which is named by its endpoint:
// there are as many names as there are operations. Its methods are called in
// the middle of requests, by many at once, so they must be quick.
type Observer interface {
	// Began is told that an attempt goes out, and how long it has waited for
	// its turn.
	Began(call string, waited time.Duration)
	// Ended is told what came of it: the HTTP status, or 0 without an
	// answer that can be read.
	Ended(call string, status int, took time.Duration)
	// Throttled is told of each 429 that waiting clears, and of each call that
	// is held back, unsent, since the wait for its turn would be too long.
	Throttled(call string, heldBack bool)
	// Repeated is told that a call which has failed is tried again.
	Repeated(call string)
}

// observed makes an attempt under the observer's eyes; asked is when its wait
// for its turn began.
func (c *Client) observed(o operation, asked time.Time, attempt func() *Error) *Error {
	sent := time.Now()
	c.observer.Began(o.name, sent.Sub(asked))
	failure := attempt()
	took := time.Since(sent)
	status := http.StatusOK
	if failure != nil {
		status = failure.Status
		if status/100 == 2 {
			status = 0 // it was not OpenAI's answer
		}
		// A project's limit on the inference side is not the Admin API's.
		if failure.RateLimited() && failure.Retryable() && o != probeKey {
			c.observer.Throttled(o.name, false)
		}
	}
	c.observer.Ended(o.name, status, took)
	return failure
}

// nobody observes nothing.
type nobody struct{}

func (nobody) Began(string, time.Duration)      {}
func (nobody) Ended(string, int, time.Duration) {}
func (nobody) Throttled(string, bool)           {}
func (nobody) Repeated(string)                  {}
