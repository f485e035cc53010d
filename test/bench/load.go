package main

// The load generator: sends requests to Vault from several workers and times them.
//
// What must stay true: it shares the cores with the measured processes, so it
// does as little as possible, and the same for each engine: it keeps connections
// and searches answers for lease IDs without decoding them.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// request is one request to Vault, without its host.
type request struct {
	method, path, body string
}

// load is a number of requests from a number of workers, each of which sends its
// next request after the answer to its last.
type load struct {
	workers int
	count   int
	request func(i int) request
	leases  bool // collect the lease IDs in the answers
}

// outcome is the result of a load.
type outcome struct {
	count   int
	took    time.Duration
	waits   []time.Duration // of each request, ascending
	leaseID []string
}

// rate is requests per second.
func (o outcome) rate() float64 { return float64(o.count) / o.took.Seconds() }

// each is milliseconds of wall time per request, for all workers together.
func (o outcome) each() float64 { return milliseconds(o.took) / float64(o.count) }

// percentile is in milliseconds.
func (o outcome) percentile(p float64) float64 {
	if len(o.waits) == 0 {
		return 0
	}
	i := int(p/100*float64(len(o.waits))+0.5) - 1
	return milliseconds(o.waits[min(max(i, 0), len(o.waits)-1)])
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// caller sends requests to one Vault.
type caller struct {
	base   *url.URL
	header http.Header
	http   *http.Transport
}

func newCaller(addr, token string) (*caller, error) {
	base, err := url.Parse(addr)
	if err != nil {
		return nil, err
	}
	return &caller{
		base:   base,
		header: http.Header{"X-Vault-Token": {token}, "User-Agent": {"bench"}},
		http:   &http.Transport{MaxIdleConns: 1024, MaxIdleConnsPerHost: 1024, DisableCompression: true},
	}, nil
}

// call sends one request and reads the answer into buf.
func (c *caller) call(ctx context.Context, r request, buf *bytes.Buffer) error {
	u := *c.base
	u.Path = "/v1/" + r.path
	if path, query, has := strings.Cut(u.Path, "?"); has {
		u.Path, u.RawQuery = path, query
	}
	req := (&http.Request{Method: r.method, URL: &u, Host: u.Host, Header: c.header}).WithContext(ctx)
	if r.body != "" {
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(r.body)), int64(len(r.body))
	}
	resp, err := c.http.RoundTrip(req)
	if err != nil {
		return err
	}
	buf.Reset()
	_, err = buf.ReadFrom(resp.Body)
	err = errors.Join(err, resp.Body.Close())
	if err == nil && resp.StatusCode/100 != 2 {
		err = &statusError{status: resp.StatusCode, text: fmt.Sprintf("%s %s answered %d: %s", r.method, r.path, resp.StatusCode, bytes.TrimSpace(buf.Bytes()))}
	}
	return err
}

// statusError is an answer with a status other than 2xx.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return e.text }

// do is call for requests that are not measured.
func (c *caller) do(ctx context.Context, method, path, body string) ([]byte, error) {
	var buf bytes.Buffer
	err := c.call(ctx, request{method, path, body}, &buf)
	return buf.Bytes(), err
}

var leaseMark = []byte(`"lease_id":"`)

// leaseIn finds the lease ID in an answer.
func leaseIn(answer []byte) (string, error) {
	_, rest, found := bytes.Cut(answer, leaseMark)
	id, _, closed := bytes.Cut(rest, []byte{'"'})
	if !found || !closed || len(id) == 0 {
		return "", fmt.Errorf("the answer has no lease ID: %.200s", answer)
	}
	return string(id), nil
}

// run sends a load. The first failed request ends it, since failures would
// distort the figures.
func (c *caller) run(ctx context.Context, l load) (outcome, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	type share struct {
		waits   []time.Duration
		leaseID []string
	}
	shares := make([]share, l.workers)
	var group sync.WaitGroup
	began := time.Now()
	for w := range l.workers {
		group.Go(func() {
			var buf bytes.Buffer
			mine := &shares[w]
			mine.waits = make([]time.Duration, 0, 2*l.count/l.workers+1)
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= l.count {
					return
				}
				sent := time.Now()
				err := c.call(ctx, l.request(i), &buf)
				mine.waits = append(mine.waits, time.Since(sent))
				if err == nil && l.leases {
					var id string
					id, err = leaseIn(buf.Bytes())
					mine.leaseID = append(mine.leaseID, id)
				}
				if err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	group.Wait()
	o := outcome{count: l.count, took: time.Since(began)}
	for _, s := range shares {
		o.waits = append(o.waits, s.waits...)
		o.leaseID = append(o.leaseID, s.leaseID...)
	}
	slices.Sort(o.waits)
	return o, context.Cause(ctx)
}
