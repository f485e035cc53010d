package client

// The learned rate, with a simulator that limits calls.

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

const routeAccount = "/organization/projects/{project_id}/service_accounts/{service_account_id}"

// fill adds n accounts at the simulator.
func fill(sim *openaitest.Server, project string, n int) []string {
	var ids []string
	for i := range n {
		ids = append(ids, sim.AddServiceAccount(project, fmt.Sprintf("account-%d", i)))
	}
	return ids
}

func TestRateLimiter_ManyDeletesCauseFew429s(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{RatePerMinute: 3000})
	project := sim.AddProject("p")
	const n, at = 500, 180
	ids := fill(sim, project, n)
	c := connect(t, sim)
	ctx, cancel := context.WithTimeout(context.Background(), 80*time.Second)
	defer cancel()
	began := time.Now()
	var next atomic.Int64
	var failed atomic.Int64
	var wg sync.WaitGroup
	for range at {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < n; i = next.Add(1) - 1 {
				if err := c.DeleteServiceAccount(ctx, project, ids[i]); err != nil && !IsNotFound(err) {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	calls := sim.Count(http.MethodDelete, routeAccount)
	t.Logf("%d deletes took %s and %d calls", n, time.Since(began).Round(time.Millisecond), calls)
	require.Zero(t, failed.Load())
	require.Empty(t, sim.Accounts())
	require.Less(t, float64(calls)/n, 1.5)
	require.Less(t, time.Since(began), 40*time.Second, "the rate approaches the limit, at which the deletes would take 10 s")
}

func TestRateLimiter_LearnsASlowEndpoint(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{RatePerMinute: 10})
	project := sim.AddProject("p")
	ids := fill(sim, project, 40)
	c := connect(t, sim)
	// Until the first 429, and the time to learn from it.
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	var last error
	deleted := 0
	for _, id := range ids {
		if last = c.DeleteServiceAccount(ctx, project, id); last != nil {
			break
		}
		deleted++
	}
	require.GreaterOrEqual(t, deleted, 10)
	require.True(t, failed(t, last).RateLimited())
	calls := sim.Count("", "")
	require.Less(t, calls, deleted+8, "a few calls find the limit")

	// The next delete fails immediately, without a call.
	short, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := c.DeleteServiceAccount(short, project, ids[39])
	require.ErrorContains(t, err, "retry in about")
	require.NoError(t, short.Err())
	require.True(t, failed(t, err).RateLimited())
	require.Positive(t, AsError(err).RetryAfter)
	require.Equal(t, calls, sim.Count("", ""))

	// Another endpoint has its own limit.
	_, err = c.ListServiceAccounts(context.Background(), project)
	require.NoError(t, err)
}

func TestRateLimiter_BackgroundCallsYield(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := NewRateLimiter()
		first, _, err := p.acquire(context.Background(), "x")
		require.NoError(t, err)
		p.learn(first, &Error{Status: http.StatusTooManyRequests, Sent: true})
		p.mu.Lock()
		e := p.endpoints["x"]
		e.limiter.SetLimit(5)
		e.cooldown = time.Time{}
		p.mu.Unlock()

		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		var order []string
		var mu sync.Mutex
		var wg sync.WaitGroup
		run := func(ctx context.Context, name string) {
			wg.Go(func() {
				if _, _, err := p.acquire(ctx, "x"); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, name)
			})
		}
		for range 3 {
			run(Background(ctx), "cleaning")
		}
		for range 4 {
			run(ctx, "revoke")
		}
		wg.Wait()
		// At most one token was free before the revokes arrived.
		late := 0
		for _, name := range order[:5] {
			if name == "revoke" {
				late++
			}
		}
		require.Equal(t, 4, late, "%v", order)
	})
}

func TestRateLimiter_RateGrowsAfterALimitEnds(t *testing.T) {
	t.Parallel()
	p := NewRateLimiter()
	turn, _, err := p.acquire(context.Background(), "x")
	require.NoError(t, err)
	for range 6 {
		turn.epoch = turn.endpoint.epoch
		p.learn(turn, &Error{Status: http.StatusTooManyRequests, Sent: true})
	}
	require.Less(t, float64(turn.endpoint.limiter.Limit()), 0.3)
	for range 200 {
		p.learn(turn, nil)
	}
	require.Greater(t, float64(turn.endpoint.limiter.Limit()), 10.0)
}

func TestRateLimiter_IgnoresSpendLimits(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	sim.Fail(openaitest.Fault{Status: http.StatusTooManyRequests, Code: "project_spend_limit_exceeded", Times: 1})
	c := connect(t, sim)
	_, err := c.ListProjects(context.Background())
	require.Error(t, err)
	require.Zero(t, c.rateLimiter.Throttled())
	_, err = c.ListProjects(context.Background())
	require.NoError(t, err)
}

func TestRateLimiter_FailedWaitsDelayNoOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := NewRateLimiter()
		first, _, err := p.acquire(context.Background(), "x")
		require.NoError(t, err)
		p.learn(first, &Error{Status: http.StatusTooManyRequests, Sent: true})
		p.mu.Lock()
		p.endpoints["x"].limiter.SetLimit(0.5)
		p.endpoints["x"].cooldown = time.Time{}
		p.mu.Unlock()
		_, _, err = p.acquire(context.Background(), "x") // the available token
		require.NoError(t, err)
		for range 50 {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
			_, wait, err := p.acquire(ctx, "x")
			cancel()
			require.Error(t, err)
			require.Less(t, wait, 3*time.Second)
		}
		began := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, _, err = p.acquire(ctx, "x")
		require.NoError(t, err)
		require.Less(t, time.Since(began), 3*time.Second)
	})
}

func TestRateLimiter_FailedQueueLeavesNoReservation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := NewRateLimiter()
		first, _, err := p.acquire(context.Background(), "x")
		require.NoError(t, err)
		p.mu.Lock()
		p.endpoints["x"].limiter.SetLimit(2)
		p.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				// As if all had arrived before the rate was learned.
				_, _, _ = p.acquire(context.WithoutCancel(ctx), "y")
				_, _, _ = p.acquire(ctx, "x")
			})
		}
		time.Sleep(100 * time.Millisecond)
		p.learn(ticket{endpoint: first.endpoint, epoch: first.endpoint.epoch}, &Error{Status: http.StatusTooManyRequests, Sent: true})
		wg.Wait()
		require.Less(t, p.queue(first.endpoint), 5*time.Second)
	})
}

func TestWithoutCancelAfterSend_IgnoresCancellation(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	sim.KeepAll()
	project := sim.AddProject("p")
	c := connect(t, sim)
	ctx, cancel := context.WithCancel(context.Background())
	sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, Delay: 100 * time.Millisecond, Times: 1, OnStrike: func(*http.Request) { cancel() }})
	_, _, err := c.CreateServiceAccount(ctx, project, "n", time.Hour, WithoutCancelAfterSend())
	require.NoError(t, err)
	// After the cancellation, a new call is not sent.
	_, _, err = c.CreateServiceAccount(ctx, project, "n", time.Hour, WithoutCancelAfterSend())
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, 1, sim.Count("", ""))
}
