package client

// The change of a learned rate over time, in a synctest bubble.

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"
)

// limited answers like an endpoint with a limit per minute and a burst of ten.
type limited struct {
	mu              sync.Mutex
	bucket          *rate.Limiter
	calls, refusals int
}

func allowing(perMinute float64) *limited {
	return &limited{bucket: rate.NewLimiter(rate.Limit(perMinute/60), 10)}
}

func (l *limited) answer() *Error {
	time.Sleep(100 * time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls++
	if l.bucket.Allow() {
		return nil
	}
	l.refusals++
	return &Error{Status: http.StatusTooManyRequests, Sent: true}
}

// call makes one call with retries, and reports whether it succeeded in time.
func (l *limited) call(p *RateLimiter, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		turn, _, err := p.acquire(ctx, "x")
		if err != nil {
			return false
		}
		failure := l.answer()
		p.learn(turn, failure)
		if failure == nil {
			return true
		}
	}
}

// demand makes rounds of concurrent calls, and returns how many succeeded in time.
func (l *limited) demand(p *RateLimiter, callers int, every, within, span time.Duration) (served int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for began := time.Now(); time.Since(began) < span; time.Sleep(every) {
		for range callers {
			wg.Go(func() {
				if l.call(p, within) {
					mu.Lock()
					defer mu.Unlock()
					served++
				}
			})
		}
	}
	wg.Wait()
	return served
}

// After hours without calls no limit remains.
func TestRateLimiter_IdleEndpointRecovers(t *testing.T) {
	t.Parallel()
	for _, quiet := range []time.Duration{30 * time.Minute, time.Hour, 8 * time.Hour} {
		t.Run(quiet.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := NewRateLimiter()
				outage := &limited{bucket: rate.NewLimiter(0, 0)}
				outage.demand(p, 1, time.Minute, time.Minute, 10*time.Minute)
				require.GreaterOrEqual(t, outage.refusals, 8)
				time.Sleep(quiet)
				free := &limited{bucket: rate.NewLimiter(rate.Inf, 1)}
				served := free.demand(p, 200, time.Minute, time.Minute, time.Second)
				require.Equal(t, 200, served)
				if quiet > 2*time.Hour {
					require.Equal(t, rate.Inf, p.endpoints["x"].limiter.Limit())
				}
			})
		})
	}
}

func TestRateLimiter_SteadyLimitCausesFew429s(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		callers       int
		every, within time.Duration
		refusals      int // at most, in an hour
	}{
		"a call every twenty seconds":      {1, 20 * time.Second, time.Minute, 0},
		"fifteen calls every five minutes": {15, 5 * time.Minute, 4 * time.Minute, 60},
		"thirty calls every ten minutes":   {30, 10 * time.Minute, 9 * time.Minute, 75},
		"sixty calls every twenty minutes": {60, 20 * time.Minute, 19 * time.Minute, 100},
		"more calls than are allowed":      {10, 30 * time.Second, 5 * time.Minute, 100},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := NewRateLimiter()
				l := allowing(10)
				served := l.demand(p, test.callers, test.every, test.within, time.Hour)
				asked := test.callers * int(time.Hour/test.every)
				t.Logf("%d asked, %d served, with %d calls, of which %d were refused", asked, served, l.calls, l.refusals)
				require.LessOrEqual(t, l.refusals, test.refusals)
				// The limit and its burst bound the served calls.
				require.GreaterOrEqual(t, served, min(asked, 600))
			})
		})
	}
}

func TestRateLimiter_CooldownIsAtMostAMinute(t *testing.T) {
	t.Parallel()
	for _, asked := range []time.Duration{time.Second, time.Minute, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			p := NewRateLimiter()
			turn, _, err := p.acquire(t.Context(), "x")
			require.NoError(t, err)
			p.learn(turn, &Error{Status: http.StatusTooManyRequests, Sent: true, RetryAfter: asked})
			began := time.Now()
			_, _, err = p.acquire(t.Context(), "x")
			require.NoError(t, err)
			require.InDelta(t, min(asked, time.Minute), time.Since(began), float64(time.Second))
		})
	}
}

func TestRateLimiter_IsPerEndpointAndOrganization(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const base, organization = "https://api.openai.com/v1", "org-a"
		old, fresh := NewSecret(testKey), NewSecret(testKey+"-2")
		waits := func(p *RateLimiter) bool {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, _, err := p.acquire(ctx, "x")
			return err != nil
		}
		all := NewRateLimiter()
		p := all.For(base, organization, old)
		for range 8 {
			turn, _, err := p.acquire(t.Context(), "x")
			require.NoError(t, err)
			p.learn(turn, &Error{Status: http.StatusTooManyRequests, Sent: true, RetryAfter: time.Hour})
		}
		require.True(t, waits(p))
		require.True(t, waits(all.For(base, organization, old)), "a new client has the same limit")
		require.False(t, waits(all.For("https://eu.api.openai.com/v1", organization, old)))
		require.False(t, waits(all.For(base, "org-b", old)))
		require.True(t, waits(p))

		learned := p.endpoints["x"].limiter.Limit()
		require.Same(t, p, all.For(base, organization, fresh))
		require.InDelta(t, float64(learned), float64(p.endpoints["x"].limiter.Limit()), float64(learned)/2, "the limit is that of the organization")
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, _, err := p.acquire(ctx, "x")
		require.NoError(t, err, "the cooldown was for the old key")

		require.EqualValues(t, 8, all.Throttled())
		for i := range 100 {
			all.For(base, strconv.Itoa(i), old)
		}
		require.LessOrEqual(t, len(all.others), maxScopes)
		p.forget()
		require.False(t, waits(p))
	})
}

// overTime runs a test in a bubble, with a client of a server outside it. Each request
// has its own connection: a pending read of an idle one would stop the bubble's time.
func overTime(t *testing.T, h http.HandlerFunc, test func(t *testing.T, c *Client)) {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.SetKeepAlivesEnabled(false)
	server.Start()
	defer server.Close()
	synctest.Test(t, func(t *testing.T) { test(t, pointAt(t, server.URL+"/v1")) })
}

func TestRetry_StopsAtARateLimitWithoutDeadline(t *testing.T) {
	t.Parallel()
	for _, asked := range []string{"", "1", "60"} {
		var calls atomic.Int64
		overTime(t, func(w http.ResponseWriter, _ *http.Request) {
			calls.Add(1)
			w.Header().Set("Retry-After", asked)
			w.WriteHeader(http.StatusTooManyRequests)
			_, _ = w.Write([]byte(`{"error":{"message":"slow down","code":"rate_limit_exceeded"}}`))
		}, func(t *testing.T, c *Client) {
			began := time.Now()
			err := c.DeleteServiceAccount(context.Background(), "p", "a")
			require.True(t, failed(t, err).RateLimited())
			require.ErrorContains(t, err, "slow down")
			require.EqualValues(t, maxLimited, calls.Load())
			t.Logf("Retry-After %q: %s", asked, time.Since(began))
			require.Less(t, time.Since(began), maxLimited*longestCooldown+time.Minute)
		})
	}
}

func TestRetry_ReportsRetryAfter(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	overTime(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusTooManyRequests)
	}, func(t *testing.T, c *Client) {
		err := c.DeleteServiceAccount(context.Background(), "p", "a")
		require.ErrorContains(t, err, "retry in 1h0m0s")
		require.Equal(t, time.Hour, failed(t, err).RetryAfter)
		require.EqualValues(t, 1, calls.Load(), "the client does not wait that long")
	})
}
