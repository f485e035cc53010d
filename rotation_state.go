package openaisecrets

// This file owns what this process knows of the admin key's rotation beyond the config:
// whether Vault's rotation manager has the schedule, failures, and warnings given.

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-openai/internal/job"
)

// rotationState is what this process knows of the schedule beyond the config.
// It is lost with the process on purpose: a new one asks again who keeps the
// schedule, and tries a rotation that is due at once.
type rotationState struct {
	look *job.Job // at the schedule

	// arranged says that Vault's rotation manager, where there is one, knows
	// the schedule as it is stored. It is set under configLock.
	arranged atomic.Bool

	mu       sync.Mutex
	failures int                  // in a row
	retry    time.Time            // no try before
	warned   map[string]time.Time // when a warning was last logged
}

// settled forgets failures: a rotation has succeeded, or the config is new.
func (s *rotationState) settled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures, s.retry = 0, time.Time{}
}

// failed says when to try again: after a minute at first, and at last after an
// hour, or the period where that is shorter.
func (s *rotationState) failed(now time.Time, period time.Duration) time.Time {
	longest := longestRetry
	if period > 0 {
		longest = min(longest, period)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delay := min(firstRetry<<min(s.failures, 10), longest)
	delay = delay/2 + rand.N(delay/2) // #nosec G404 -- jitter, not a secret
	s.failures++
	s.retry = now.Add(delay)
	return s.retry
}

// mayTry reports whether a rotation may be tried. No wait is longer than
// longestRetry, unless the clock has been set back.
func (s *rotationState) mayTry(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !now.Before(s.retry) || s.retry.Sub(now) > longestRetry
}

// mayWarn reports whether a warning is due, once in a while for each.
func (s *rotationState) mayWarn(what string, now time.Time, every time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last, ok := s.warned[what]; ok && now.Sub(last).Abs() < every {
		return false
	}
	s.warned[what] = now
	return true
}

// forget has mayWarn answer yes the next time.
func (s *rotationState) forget(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.warned, what)
}

// stored notes that a config is in force, and whether its schedule is arranged.
func (s *rotationState) stored(arranged bool) {
	s.arranged.Store(arranged)
	s.settled()
}

func newRotationState() *rotationState {
	return &rotationState{look: job.New(), warned: map[string]time.Time{}}
}
