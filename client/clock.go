package client

// This file owns the estimate of OpenAI's clock, from the Date of its last successful
// answer.
//
// What must stay true: the estimate is independent of this machine's wall clock, with
// which it is compared.

import (
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Clocks has the clock of each base URL, so that a new client knows the time that an
// earlier one has read. The zero value is ready to use.
type Clocks struct{ byURL sync.Map }

func (c *Clocks) of(baseURL string) *clock {
	shared, _ := c.byURL.LoadOrStore(baseURL, &clock{})
	return shared.(*clock)
}

// clock is OpenAI's clock. The zero value has no reading.
type clock struct{ last atomic.Pointer[reading] }

// reading is a Date from OpenAI, and the local time of its arrival with the monotonic
// reading.
type reading struct{ theirs, at time.Time }

func (c *clock) read(h http.Header) {
	if theirs, err := http.ParseTime(h.Get("Date")); err == nil {
		c.last.Store(&reading{theirs, time.Now()})
	}
}

// Now is the time by OpenAI's clock, to the second: the Date of its last successful
// answer, to this client or another that shares its Clocks, plus the time since then. It
// returns false before the first one.
func (c *Client) Now() (time.Time, bool) {
	last := c.clock.last.Load()
	if last == nil {
		return time.Time{}, false
	}
	return last.theirs.Add(time.Since(last.at)), true
}

// NowOr returns the time by OpenAI's clock, or t before that is known.
func (c *Client) NowOr(t time.Time) time.Time {
	if theirs, known := c.Now(); known {
		return theirs
	}
	return t
}

// NotAfter returns t, or the time by OpenAI's clock if that is earlier. A time that has
// passed by the result has passed by both clocks.
func (c *Client) NotAfter(t time.Time) time.Time {
	if theirs, known := c.Now(); known && theirs.Before(t) {
		return theirs
	}
	return t
}

// Outlives reports whether an expiry by OpenAI's clock is at least d from now, or that
// clock is unknown.
func (c *Client) Outlives(end time.Time, d time.Duration) bool {
	theirs, known := c.Now()
	return !known || end.IsZero() || !end.Before(theirs.Add(d))
}
