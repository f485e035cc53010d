package client

// This file owns the rate of calls. The Admin API may allow as few as ten calls a minute
// per endpoint, does not publish its limits, and may omit Retry-After
// (docs/openai-api.md), so the rate is learned: unlimited until the first 429, then
// decreased with each further one, and slowly increased with each success and while calls
// are possible but not made.
//
// What must stay true:
//   - no lock is held while waiting;
//   - a wait that cannot end within its context fails early, with its length, and does
//     not delay others;
//   - background calls use only permits that no other call waits for;
//   - no answer stops an endpoint for longer than a minute or after its admin key was
//     replaced, and no limit lasts for hours without calls.

import (
	"context"
	"crypto/sha256"
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// decrease and blindDecrease are the factors for the rate after a 429:
	// blindDecrease if no call has succeeded since the last decrease.
	decrease      = 0.7
	blindDecrease = 0.5
	// increase is the part by which the rate grows in a second without a 429 (below one
	// call a second: with each call), and acceleration is added to it for each further
	// second. From a decrease back to the limit takes about nine seconds, few calls then
	// exceed the limit compared with those made meanwhile, and a limit that no longer
	// applies is left behind within a minute.
	increase     = 0.02
	acceleration = 0.005
	// doubling is the idle time in which the rate doubles: from minRate to a call a
	// second within 20 minutes, and to no limit within 70, while a limit of ten calls a
	// minute that still applies causes one or two 429s per doubling.
	doubling = 5 * time.Minute
	// minRate and maxRate bound a learned rate, in calls a second. The lowest measured
	// limit is seven a minute; above maxRate there is effectively no limit.
	minRate = 0.1
	maxRate = 1000
	// minFirstRate is the least rate after the first 429, in calls a second: a rate that
	// is too high costs a few calls, one that is too low delays all of them.
	minFirstRate = 10
	// firstPause and longestPause bound the cooldown after a 429 without Retry-After.
	firstPause   = 500 * time.Millisecond
	longestPause = 15 * time.Second
	// longestCooldown bounds the cooldown after a 429 with Retry-After: a limit per
	// minute has passed by then, and otherwise one call a minute finds out.
	longestCooldown = time.Minute
	// yieldEvery is how often a background call checks for a free permit.
	yieldEvery = 200 * time.Millisecond
)

// RateLimiter has the learned limits of one API for one organization, by endpoint, and
// through For those of other scopes. It outlives the clients that share it, since a new
// admin key has the limits of the old one.
type RateLimiter struct {
	mu        sync.Mutex
	endpoints map[string]*endpoint
	throttled *atomic.Int64     // shared with others
	key       [sha256.Size]byte // the hash of the latest client's admin key

	others map[scope]*RateLimiter // created by For
}

// scope is the base URL and organization to which OpenAI's limits apply.
type scope struct{ baseURL, organization string }

// maxScopes bounds the scopes in memory: the current one, and those of config writes.
const maxScopes = 8

// NewRateLimiter returns a rate limiter without limits.
func NewRateLimiter() *RateLimiter {
	return &RateLimiter{endpoints: map[string]*endpoint{}, throttled: &atomic.Int64{}}
}

// For returns the rate limiter of a scope for a client with this key. If the key has
// changed, it ends all cooldowns, which may have been due to the old key.
func (p *RateLimiter) For(baseURL, organization string, key Secret) *RateLimiter {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := scope{baseURL, organization}
	known, hash := p.others[at], sha256.Sum256([]byte(key.Reveal()))
	if known == nil {
		if p.others == nil || len(p.others) >= maxScopes {
			p.others = map[scope]*RateLimiter{} // clients keep theirs
		}
		known = &RateLimiter{endpoints: map[string]*endpoint{}, throttled: p.throttled, key: hash}
		p.others[at] = known
	}
	known.mu.Lock()
	defer known.mu.Unlock()
	if known.key != hash {
		known.key = hash
		for _, e := range known.endpoints {
			e.cooldown = time.Time{}
		}
	}
	return known
}

// forget resets all limits. Calls that already wait are not affected.
func (p *RateLimiter) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.endpoints)
}

// Throttled returns how many calls OpenAI has answered with 429 so far.
func (p *RateLimiter) Throttled() int64 { return p.throttled.Load() }

// endpoint is one method and route. Its fields are guarded by RateLimiter.mu.
type endpoint struct {
	limiter  *rate.Limiter // rate.Inf until the first 429
	permit   chan struct{} // one slot: held by the next call
	cooldown time.Time     // no call before this time
	// epoch counts the decreases. A 429 to a call sent before the last one does not
	// count against the current rate.
	epoch  int
	blind  int // decreases since the last success
	streak int // successes since the last decrease
	// idle is when the next call became possible, or until when the rate has been
	// increased for the time since.
	idle    time.Time
	waiting int // waiting calls, except background ones

	// Successes in the current and the previous second, as the rate to start from when a
	// limit appears.
	second          int64
	count, previous int
}

// ticket is the permit for one call.
type ticket struct {
	endpoint *endpoint
	epoch    int
}

type backgroundKey struct{}

// Background marks background work, whose calls yield to all others. It is part of the
// context instead of a CallOption, since the functions between the worker and the call
// also serve requests and must not need to pass it on.
func Background(ctx context.Context) context.Context {
	return context.WithValue(ctx, backgroundKey{}, true)
}

func isBackground(ctx context.Context) bool { return ctx.Value(backgroundKey{}) != nil }

// acquire waits until the endpoint may be called. If the wait exceeds the context's
// deadline, it returns the length of the wait in tooLong, immediately if that can be
// predicted.
func (p *RateLimiter) acquire(ctx context.Context, name string) (t ticket, tooLong time.Duration, err error) {
	p.mu.Lock()
	e := p.endpoints[name]
	if e == nil {
		e = &endpoint{limiter: rate.NewLimiter(rate.Inf, 1), permit: make(chan struct{}, 1)}
		p.endpoints[name] = e
	}
	background := isBackground(ctx)
	if !background {
		e.waiting++
	}
	p.mu.Unlock()
	if background {
		return p.yield(ctx, e)
	}
	defer func() {
		p.mu.Lock()
		e.waiting--
		p.mu.Unlock()
	}()

	deadline, bounded := ctx.Deadline()
	if ahead := p.queue(e); bounded && ahead > time.Until(deadline) {
		return ticket{}, ahead, context.DeadlineExceeded
	}
	select {
	case e.permit <- struct{}{}:
		defer func() { <-e.permit }()
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return ticket{}, max(p.queue(e), time.Second), ctx.Err()
		}
		return ticket{}, 0, ctx.Err()
	}
	for {
		p.mu.Lock()
		now, epoch := time.Now(), e.epoch
		delay := e.cooldown.Sub(now)
		var reserved *rate.Reservation
		if delay <= 0 {
			// Only the holder of the permit reserves, so at most one reservation exists
			// when the rate changes.
			reserved = e.limiter.ReserveN(now, 1)
			delay = reserved.DelayFrom(now)
		}
		p.mu.Unlock()
		var err error
		if delay > 0 {
			err = Wait(ctx, delay)
		}
		p.mu.Lock()
		valid := reserved != nil && epoch == e.epoch
		if reserved != nil && (err != nil || !valid) {
			// Canceled, so that a failed wait does not delay the next call.
			reserved.CancelAt(time.Now())
		}
		if err == nil && valid {
			t = e.ticket()
		}
		p.mu.Unlock()
		if err != nil {
			if ctx.Err() == nil {
				return ticket{}, delay, err
			}
			return ticket{}, 0, err
		}
		if valid {
			return t, 0, nil
		}
	}
}

// queue estimates how long the last of the waiting calls has to wait.
func (p *RateLimiter) queue(e *endpoint) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.recover(time.Now())
	ahead := max(0, time.Until(e.cooldown))
	if limit := e.limiter.Limit(); limit != rate.Inf {
		calls := float64(e.waiting-1) + max(0, 1-e.limiter.Tokens())
		ahead += time.Duration(calls / float64(limit) * float64(time.Second))
	}
	return ahead
}

// yield is acquire for background calls: it waits until no other call is waiting.
func (p *RateLimiter) yield(ctx context.Context, e *endpoint) (ticket, time.Duration, error) {
	for {
		p.mu.Lock()
		now := time.Now()
		e.recover(now)
		free := e.waiting == 0 && !now.Before(e.cooldown) && e.limiter.AllowN(now, 1)
		var t ticket
		if free {
			t = e.ticket()
		}
		p.mu.Unlock()
		if free {
			return t, 0, nil
		}
		if err := Wait(ctx, yieldEvery); err != nil {
			if ctx.Err() == nil {
				return ticket{}, max(p.queue(e), time.Second), err
			}
			return ticket{}, 0, err
		}
	}
}

// ticket returns a permit for a call made now. The caller holds RateLimiter.mu.
func (e *endpoint) ticket() ticket {
	e.used(time.Now())
	return ticket{endpoint: e, epoch: e.epoch}
}

// used records a call, so that the next is possible after the interval of the rate. The
// caller holds RateLimiter.mu.
func (e *endpoint) used(now time.Time) {
	e.idle = now.Add(time.Duration(float64(time.Second) / float64(e.limiter.Limit())))
}

// recover increases the rate for the time in which a call was possible but not made:
// limits may be lifted, and without calls nothing shows it. At full use of the rate there
// is no such time. The caller holds RateLimiter.mu.
func (e *endpoint) recover(now time.Time) {
	limit := e.limiter.Limit()
	if limit == rate.Inf {
		return
	}
	if e.cooldown.After(e.idle) {
		e.idle = e.cooldown
	}
	quiet := now.Sub(e.idle)
	if quiet <= 0 {
		return
	}
	e.idle = now
	limit *= rate.Limit(math.Exp2(float64(quiet) / float64(doubling)))
	if limit > maxRate {
		limit, e.blind, e.streak = rate.Inf, 0, 0
	}
	e.limiter.SetLimitAt(now, limit)
}

// learn adjusts the rate to the result of a call.
func (p *RateLimiter) learn(t ticket, failure *Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, now := t.endpoint, time.Now()
	if failure == nil {
		e.blind = 0
		if s := now.Unix(); s != e.second {
			if e.previous = 0; s == e.second+1 {
				e.previous = e.count
			}
			e.second, e.count = s, 0
		}
		e.count++
		if limit := e.limiter.Limit(); limit != rate.Inf {
			round := max(1, limit) // calls that count as one step
			limit *= 1 + (increase+acceleration*rate.Limit(e.streak)/round)/round
			if e.streak++; limit > maxRate {
				limit = rate.Inf
			}
			e.limiter.SetLimitAt(now, limit)
		}
		return
	}
	if !failure.RateLimited() || !failure.Retryable() {
		return
	}
	p.throttled.Add(1)
	if until := now.Add(min(failure.RetryAfter, longestCooldown)); until.After(e.cooldown) && failure.RetryAfter > 0 {
		e.cooldown = until
	}
	if t.epoch != e.epoch {
		return
	}
	limit := float64(e.limiter.Limit())
	if e.limiter.Limit() == rate.Inf {
		limit = float64(max(e.count, e.previous, minFirstRate))
	}
	if e.blind == 0 {
		limit *= decrease
	} else {
		limit *= blindDecrease
	}
	pause := min(firstPause<<min(e.blind, 10), longestPause)
	e.epoch++
	e.blind++
	e.streak = 0
	e.limiter.SetLimitAt(now, rate.Limit(max(limit, minRate)))
	e.used(now)
	if until := now.Add(pause); until.After(e.cooldown) && failure.RetryAfter == 0 {
		e.cooldown = until
	}
}

// rate returns how many calls a minute an endpoint takes as far as is known; limited is
// false where no limit is known.
func (p *RateLimiter) rate(name string) (perMinute float64, limited bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.endpoints[name]
	if e == nil {
		return 0, false
	}
	e.recover(time.Now())
	limit := e.limiter.Limit()
	return float64(limit) * time.Minute.Seconds(), limit != rate.Inf
}
