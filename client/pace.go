package client

// This file owns how fast calls are made. The Admin API may allow as few as
// ten calls a minute for an endpoint, says so nowhere, and need not say how
// long to wait (docs/openai-api.md), so the pace is learned: unlimited until
// the first 429, then cut with each further one and slowly raised with each
// success and with each moment in which a call was possible and none came.
//
// What must stay true: no lock is held while waiting; a wait that is seen not
// to end within its context is refused, with its length, and costs the others
// nothing; cleaning up takes only what nobody else is waiting for; no answer
// stops an endpoint for longer than a minute or outlasts its admin key, and no
// limit outlasts hours without calls.

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
	// cut and cutBlind are what remains of the pace after a 429: the first
	// where calls had succeeded at the last pace, the second where none had.
	cut      = 0.7
	cutBlind = 0.5
	// raise and hasten are by what part the pace rises in a second without a
	// 429 (at less than one call a second: with a call), and by how much more
	// in each further one. From a cut back to the limit takes about nine, the
	// calls in flight that then find it are few against those made meanwhile,
	// and a limit that is gone is left behind within the minute.
	raise  = 0.02
	hasten = 0.005
	// doubling is how long an endpoint rests idle until its pace is twice as
	// fast: from the slowest to a call a second within twenty minutes, and to no
	// limit within 70, while a limit of ten calls a minute that is still there
	// costs one or two 429s for each doubling.
	doubling = 5 * time.Minute
	// slowest and fastest bound a learned pace, in calls a second. The lowest
	// limit that anybody has measured is seven a minute; beyond the fastest
	// there is none worth keeping.
	slowest = 0.1
	fastest = 1000
	// firstGuess is the least that a first 429 is taken for, in calls a second:
	// too high is found out by a few calls, too low keeps everybody waiting.
	firstGuess = 10
	// firstPause and longestPause bound how long an endpoint rests after a 429
	// that does not say how long.
	firstPause   = 500 * time.Millisecond
	longestPause = 15 * time.Second
	// longestCooldown bounds how long it rests after one that does: a limit by
	// the minute is over by then, and if not, a call a minute finds out.
	longestCooldown = time.Minute
	// yieldEvery is how often cleaning up looks whether it may go on.
	yieldEvery = 200 * time.Millisecond
)

// Pace is what one mount knows of the limits of one API for one organization,
// by endpoint, and by For those of others. It outlives the clients that share
// it, since a new admin key has the limits of the old.
type Pace struct {
	mu        sync.Mutex
	endpoints map[string]*endpoint
	throttled *atomic.Int64     // shared with others
	key       [sha256.Size]byte // the hash of the latest client's admin key

	others map[scope]*Pace // made by For
}

// scope is what OpenAI's limits belong to.
type scope struct{ baseURL, organization string }

// maxScopes bounds how many are remembered: one, and those that somebody tries.
const maxScopes = 8

// NewPace returns a pace that knows of no limit.
func NewPace() *Pace {
	return &Pace{endpoints: map[string]*endpoint{}, throttled: &atomic.Int64{}}
}

// For returns what is known of an API and an organization to a client with this
// key: nothing, when they are new. A cooldown ends with the key that it was
// told to, for it may have been the reason; the next answer says if it was not.
func (p *Pace) For(baseURL, organization string, key Secret) *Pace {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := scope{baseURL, organization}
	known, hash := p.others[at], sha256.Sum256([]byte(key.Reveal()))
	if known == nil {
		if p.others == nil || len(p.others) >= maxScopes {
			p.others = map[scope]*Pace{} // clients keep what they have
		}
		known = &Pace{endpoints: map[string]*endpoint{}, throttled: p.throttled, key: hash}
		p.others[at] = known
	}
	known.mu.Lock()
	defer known.mu.Unlock()
	if known.key != hash {
		known.key = hash
		for _, e := range known.endpoints {
			e.rests = time.Time{}
		}
	}
	return known
}

// forget drops all that is known. Calls that wait already keep their turn.
func (p *Pace) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.endpoints)
}

// Throttled returns how many calls OpenAI has answered with 429 so far.
func (p *Pace) Throttled() int64 { return p.throttled.Load() }

// endpoint is one method and route. Its fields are guarded by Pace.mu.
type endpoint struct {
	limiter *rate.Limiter // rate.Inf until the first 429
	turn    chan struct{} // one slot: held by the next to call
	rests   time.Time     // no call before
	// epoch counts the cuts. A 429 to a call sent before the last cut says
	// nothing about the present pace.
	epoch  int
	blind  int // cuts since the last success
	streak int // successes since the last cut
	// idle is when the next call would have been possible, or until when the
	// pace has been raised for the time since.
	idle    time.Time
	waiting int // calls that wait and are not cleaning up

	// What was possible without a limit: successes in the current second and
	// in the one before.
	second          int64
	count, previous int
}

// ticket is the permission for one call.
type ticket struct {
	endpoint *endpoint
	epoch    int
}

type backgroundKey struct{}

// Background marks work that cleans up: its calls let all others go first. That is
// the context's and no option of a call, since the functions between the worker and
// the call serve requests, too, and know nothing of it.
func Background(ctx context.Context) context.Context {
	return context.WithValue(ctx, backgroundKey{}, true)
}

func isBackground(ctx context.Context) bool { return ctx.Value(backgroundKey{}) != nil }

// take waits for the turn of a call to the endpoint. When that is after the
// context's deadline it returns with how long the wait would be: at once where
// that can be foreseen. It returns the context's error when that ends.
func (p *Pace) take(ctx context.Context, name string) (t ticket, tooLong time.Duration, err error) {
	p.mu.Lock()
	e := p.endpoints[name]
	if e == nil {
		e = &endpoint{limiter: rate.NewLimiter(rate.Inf, 1), turn: make(chan struct{}, 1)}
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
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return ticket{}, max(p.queue(e), time.Second), ctx.Err()
		}
		return ticket{}, 0, ctx.Err()
	}
	for {
		p.mu.Lock()
		now, epoch := time.Now(), e.epoch
		delay := e.rests.Sub(now)
		var reserved *rate.Reservation
		if delay <= 0 {
			// Only who has the turn reserves, so a later change of the pace
			// finds one reservation at most.
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
			// Given back: refusals alone must not push the next turn away.
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

// queue estimates how long the last of those that wait will have waited.
func (p *Pace) queue(e *endpoint) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.recover(time.Now())
	ahead := max(0, time.Until(e.rests))
	if limit := e.limiter.Limit(); limit != rate.Inf {
		turns := float64(e.waiting-1) + max(0, 1-e.limiter.Tokens())
		ahead += time.Duration(turns / float64(limit) * float64(time.Second))
	}
	return ahead
}

// yield is take for cleaning up: a call when nobody else waits for one.
func (p *Pace) yield(ctx context.Context, e *endpoint) (ticket, time.Duration, error) {
	for {
		p.mu.Lock()
		now := time.Now()
		e.recover(now)
		free := e.waiting == 0 && !now.Before(e.rests) && e.limiter.AllowN(now, 1)
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

// ticket is for a call made now. The caller holds Pace.mu.
func (e *endpoint) ticket() ticket {
	e.used(time.Now())
	return ticket{endpoint: e, epoch: e.epoch}
}

// used notes that no call is possible for as long as the pace wants. The caller
// holds Pace.mu.
func (e *endpoint) used(now time.Time) {
	e.idle = now.Add(time.Duration(float64(time.Second) / float64(e.limiter.Limit())))
}

// recover raises the pace for the time in which a call was possible and none
// came: limits end, and only a call could tell. Callers who come as fast as the
// pace allows leave no such time. The caller holds Pace.mu.
func (e *endpoint) recover(now time.Time) {
	limit := e.limiter.Limit()
	if limit == rate.Inf {
		return
	}
	if e.rests.After(e.idle) {
		e.idle = e.rests
	}
	quiet := now.Sub(e.idle)
	if quiet <= 0 {
		return
	}
	e.idle = now
	limit *= rate.Limit(math.Exp2(float64(quiet) / float64(doubling)))
	if limit > fastest {
		limit, e.blind, e.streak = rate.Inf, 0, 0
	}
	e.limiter.SetLimitAt(now, limit)
}

// learn takes note of the answer to a call.
func (p *Pace) learn(t ticket, failure *Error) {
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
			limit *= 1 + (raise+hasten*rate.Limit(e.streak)/round)/round
			if e.streak++; limit > fastest {
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
	if until := now.Add(min(failure.RetryAfter, longestCooldown)); until.After(e.rests) && failure.RetryAfter > 0 {
		e.rests = until
	}
	if t.epoch != e.epoch {
		return
	}
	limit := float64(e.limiter.Limit())
	if e.limiter.Limit() == rate.Inf {
		limit = float64(max(e.count, e.previous, firstGuess))
	}
	if e.blind == 0 {
		limit *= cut
	} else {
		limit *= cutBlind
	}
	pause := min(firstPause<<min(e.blind, 10), longestPause)
	e.epoch++
	e.blind++
	e.streak = 0
	e.limiter.SetLimitAt(now, rate.Limit(max(limit, slowest)))
	e.used(now)
	if until := now.Add(pause); until.After(e.rests) && failure.RetryAfter == 0 {
		e.rests = until
	}
}
