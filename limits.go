package openaisecrets

// This file owns the time budgets, ages, and limits that depend on each other or that
// several files share.
//
// What must stay true: the order of the budgets, which the compiler checks at the end
// of this file.

import (
	"time"

	"vault-plugin-secrets-openai/client"
)

const (
	// requestBudget bounds a credential request or a rotation. Vault sets no deadline
	// on a plugin's request, and its clients time out after 60 s.
	requestBudget = 60 * time.Second
	// cleanupBudget bounds the deletion of what a failed request created.
	cleanupBudget = 30 * time.Second
	// revokeBudget bounds one revocation. Vault allows 90 s per attempt, and sets no
	// deadline when a mount is disabled.
	revokeBudget = 80 * time.Second
	// drainBudget bounds the last WAL run when the mount is being disabled; Vault
	// allows 90 s.
	drainBudget = 80 * time.Second

	// walMinAge is the minimum age of a create's WAL entry before it is processed. It
	// exceeds the budgets of the request that may still use the entry (60 s) and of its
	// cleanup (30 s).
	walMinAge = 2 * time.Minute

	// leaseTransit is how long Vault may take to store the lease after the response.
	leaseTransit = 2 * time.Second

	// tryBudget bounds one attempt for a WAL entry, and runBudget how long a run starts
	// further attempts.
	tryBudget = 30 * time.Second
	runBudget = 2 * time.Minute

	// deleteBudget bounds the deletion of one admin key. After deleteRun a run starts no
	// further one; the next run follows within a minute.
	deleteBudget = 30 * time.Second
	deleteRun    = 2 * time.Minute

	// lockBudget bounds how long a worker waits for the config lock.
	lockBudget = 20 * time.Second
	// settleBudget is how long a new admin key may take to work. OpenAI publishes no
	// figure (docs/openai-api.md).
	settleBudget = 20 * time.Second

	// lastLookBudget bounds the calls before the deletion of the keys of a mount that
	// is being disabled, or of a config that is being deleted.
	lastLookBudget = 10 * time.Second
	// unmountBudget bounds the calls for a drain at the unload, and then those for the
	// static roles. Other mounts of the process wait meanwhile.
	unmountBudget = 15 * time.Second

	// nameBudget bounds the lookup of the name of an account that is already adopted.
	nameBudget = 5 * time.Second

	// dryRunWait is how long a request waits for its dry run. Vault's clients time out
	// after 60 s.
	dryRunWait = 45 * time.Second

	// maxActivation leaves room for the create in a request's budget.
	maxActivation = 45 * time.Second

	// maxAttempts bounds the creates of one request, each under its own name.
	maxAttempts = 4

	// workers bounds the WAL entries that a run processes in parallel.
	workers = 4
	// maxSystemicFailures is how many consecutive systemic failures stop a run until
	// the next tick.
	maxSystemicFailures = 3
	// doomedBudget bounds the deletion of one key of a blocked role, with the wait for a
	// permit: at ten calls a minute, those of all workers take half a minute.
	doomedBudget = 2 * time.Minute
	// lookUpBatch bounds the entries for which one run reads listings.
	lookUpBatch = 2000
	// keptFor is how long a WAL entry that was retained, and reported, is skipped before
	// it is checked again.
	keptFor = 10 * time.Minute

	// clockSlack is how far Vault's clock may be ahead of OpenAI's.
	clockSlack = time.Minute

	// maxSkew is the largest difference between OpenAI's clock and this server's at
	// which times of a response are used.
	maxSkew = 10 * time.Minute

	// clockTolerance is how far apart the clocks of two nodes may be: a stored time that
	// is further in the future was written by a wrong clock.
	clockTolerance = time.Minute
)

const (
	// verdictFor is how long a project counts as bounded after OpenAI last said so.
	// rejudgeMet and rejudgeUnmet are the intervals at which the worker asks again, and
	// askedFor is for how long after the last request for a key of the project.
	verdictFor   = 24 * time.Hour
	rejudgeMet   = time.Hour
	rejudgeUnmet = 5 * time.Minute
	askedFor     = 24 * time.Hour
)

// notFinalBefore is the minimum age at which a 404, or the absence from a listing, is
// final: one of OpenAI's servers may not have the new object yet. OpenAI publishes no
// figure; Vault's AWS engine waits as long for IAM.
const notFinalBefore = 5 * time.Minute

// secondLook is the least time between two listings in two runs of the WAL, which are a
// minute apart.
const secondLook = 30 * time.Second

const (
	// expiryMargin is how much longer a key lives at OpenAI than its lease can last:
	// the lease starts when Vault stores it, after the key was created, but within the
	// request's budget.
	expiryMargin = 75 * time.Second
	// maxLease is the longest lease whose key has an expiry that OpenAI accepts.
	maxLease     = client.MaxExpiry - expiryMargin
	firstRetry   = time.Minute
	longestRetry = time.Hour
	warnEvery    = time.Hour

	// remindEvery is the interval of the log line about a key that is kept.
	remindEvery   = 24 * time.Hour
	maxStoredText = 512
)

const (
	// maxRoleName bounds a role's name, which is part of a storage key.
	maxRoleName = 128
)

const (
	// maxRequestTimeout keeps one attempt within a request's budget, on which walMinAge
	// depends.
	maxRequestTimeout    = requestBudget
	maxRotationGrace     = 7 * 24 * time.Hour
	defaultRotationGrace = 5 * time.Minute

	// minKeyLife is the shortest lifetime of an admin key that expires: the key survives
	// an outage of Vault over a long weekend.
	minKeyLife = 7 * 24 * time.Hour

	// longestKept bounds how long a key is kept after it was superseded. No grace period
	// is longer.
	longestKept = maxRotationGrace
)

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// waits reports whether a wait, of at most longest, is not over. One that seems longer
// began under a clock that was ahead, which matters where the monotonic reading is lost.
func waits(now, until time.Time, longest time.Duration) bool {
	return now.Before(until) && until.Sub(now) <= longest
}

// The order of the budgets: each line fails to compile if its difference is negative.
const (
	// A create's WAL entry is processed only when no request can still use it: one that
	// fails deletes the credential, and then may have to record it.
	_ = uint(walMinAge - requestBudget - 2*cleanupBudget)
	// One attempt fits into a request, and so does the wait for a new key.
	_ = uint(requestBudget - maxRequestTimeout)
	_ = uint(requestBudget - maxActivation)
	_ = uint(requestBudget - settleBudget)
	// A lease that Vault stores at the end of a request's budget is covered.
	_ = uint(expiryMargin - requestBudget)
	// Vault allows 90 s for a revocation and for the rollback of a disable.
	_ = uint(90*time.Second - revokeBudget)
	_ = uint(90*time.Second - drainBudget)
	// Vault's clients time out after 60 s.
	_ = uint(60*time.Second - dryRunWait)
	// A run starts at least a few attempts.
	_ = uint(runBudget - tryBudget)
	// The drain has time to wait for the transit of a lease.
	_ = uint(drainBudget - leaseTransit)
	// The last calls before the keys of a disabled mount are deleted leave time for the
	// deletions.
	_ = uint(drainBudget - lastLookBudget - deleteBudget)
	// An entry is not postponed for longer than one that is kept.
	_ = uint(keptFor - notFinalBefore)
	// No key is kept for less than its grace period.
	_ = uint(longestKept - maxRotationGrace)
	_ = uint(maxRotationGrace - defaultRotationGrace)
	// Retries and warnings come at least as often as reminders.
	_ = uint(longestRetry - firstRetry)
	_ = uint(remindEvery - warnEvery)
	// The worker asks many times before a verdict ends.
	_ = uint(verdictFor - 12*rejudgeMet)
)

const (
	defaultTidyInterval     = 12 * time.Hour
	defaultTidySafetyBuffer = 10 * time.Minute
	// minTidyInterval is the interval of Vault's ticks.
	minTidyInterval = time.Minute
	// maxTidyTime bounds tidy_interval and tidy_safety_buffer.
	maxTidyTime = 30 * 24 * time.Hour

	// defaultUsageRetention covers the month before the present one and the days for
	// which OpenAI restates costs.
	defaultUsageRetention = 35 * 24 * time.Hour
	minUsageRetention     = 24 * time.Hour
	maxUsageRetention     = 400 * 24 * time.Hour
	minUsageInterval      = 5 * time.Minute
	maxUsageInterval      = 24 * time.Hour

	// useTolerance is how long after a key was superseded its last use may still be by
	// a request of this process, given the coarseness of OpenAI's last_used_at.
	useTolerance = 3 * time.Minute
)
