package client

// This file owns what is known of OpenAI's clock: the Date of its last good answer.
//
// What must stay true: it never moves with this machine's wall clock, which is what
// it is compared with.

import (
	"net/http"
	"sync/atomic"
	"time"
)

// clock is OpenAI's. The zero value knows nothing.
type clock struct{ last atomic.Pointer[reading] }

// reading is a time that OpenAI said, and when, with its monotonic part.
type reading struct{ theirs, at time.Time }

func (c *clock) read(h http.Header) {
	if theirs, err := http.ParseTime(h.Get("Date")); err == nil {
		c.last.Store(&reading{theirs, time.Now()})
	}
}

// Now is the time by OpenAI's clock, to the second, as its last good answer's Date and
// the time since then say. False before there was one.
func (c *Client) Now() (time.Time, bool) {
	last := c.clock.last.Load()
	if last == nil {
		return time.Time{}, false
	}
	return last.theirs.Add(time.Since(last.at)), true
}

// NotAfter is t, or the time by OpenAI's clock where that is earlier: what is judged to
// be over by the result is over by both clocks.
func (c *Client) NotAfter(t time.Time) time.Time {
	if theirs, known := c.Now(); known && theirs.Before(t) {
		return theirs
	}
	return t
}

// Outlives reports whether what ends at a time by OpenAI's clock lives for d from now,
// as far as that is known.
func (c *Client) Outlives(end time.Time, d time.Duration) bool {
	theirs, known := c.Now()
	return !known || end.IsZero() || !end.Before(theirs.Add(d))
}
