package openaisecrets

// This file owns the in-memory state of the admin key's rotation: whether the schedule is
// registered, failures, and the warnings that were logged.

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-openai/internal/job"
)

// rotationState is lost with the process on purpose: a new process registers the
// schedule again, and tries a due rotation immediately.
type rotationState struct {
	look *job.Job // runs runSchedule

	// registered is set when Vault's rotation manager, if there is one, has the stored
	// schedule. It is set with configLock held.
	registered atomic.Bool

	mu       sync.Mutex
	failures int                  // in a row
	retry    time.Time            // of the next attempt
	warned   map[string]time.Time // when each warning was last logged
}

// succeeded resets the failures after a successful rotation or a config write.
func (s *rotationState) succeeded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures, s.retry = 0, time.Time{}
}

// failed returns when to try again: at first after firstRetry, and later after
// longestRetry, or the period if that is shorter.
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

// mayTry reports whether a rotation may be tried.
func (s *rotationState) mayTry(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !waits(now, s.retry, longestRetry)
}

// mayWarn reports whether a warning is due, at most once in every.
func (s *rotationState) mayWarn(what string, now time.Time, every time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last, ok := s.warned[what]; ok && now.Sub(last).Abs() < every {
		return false
	}
	s.warned[what] = now
	return true
}

// forget makes the next mayWarn return true.
func (s *rotationState) forget(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.warned, what)
}

// stored records that a config was stored, and whether its schedule is registered.
func (s *rotationState) stored(registered bool) {
	s.registered.Store(registered)
	s.succeeded()
}

func newRotationState() *rotationState {
	return &rotationState{look: job.New(), warned: map[string]time.Time{}}
}
