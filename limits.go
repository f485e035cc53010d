package openaisecrets

// This file owns the budgets, ages and bounds that depend on each other or that
// several files share. What only one file needs stays there.
//
// What must stay true: the order of the budgets, which the compiler holds at the
// end of this file.

import (
	"time"

	"vault-plugin-secrets-openai/client"
)

const (
	// requestBudget bounds an issue or a rotation in all. Vault puts no
	// deadline on a plugin's request, and its clients give up after 60 s.
	requestBudget = 60 * time.Second
	// cleanupBudget bounds the destroying of what a failed request made.
	cleanupBudget = 30 * time.Second
	// revokeBudget bounds one revoke: Vault allows 90 s per try, and none at
	// all when a mount is disabled.
	revokeBudget = 80 * time.Second
	// drainBudget bounds the last work on the journal when the mount is being
	// disabled; Vault allows 90 s.
	drainBudget = 80 * time.Second

	// walMinAge is how old an entry of a create must be before it is acted on:
	// older than any request that may still be using it, which is the budget of a
	// request (60 s) plus that of its cleaning up (30 s).
	walMinAge = 2 * time.Minute

	// leaseTransit is how long Vault may take from the engine's answer to the
	// stored lease.
	leaseTransit = 2 * time.Second

	// tryBudget bounds one try of an entry, and runBudget how long a run takes up
	// further ones.
	tryBudget = 30 * time.Second
	runBudget = 2 * time.Minute

	// endBudget bounds the end of one key, and endsAtOnce how many end at a time.
	// After endRun no further one is begun; the next minute comes soon enough.
	endBudget = 30 * time.Second
	endRun    = 2 * time.Minute

	// lockBudget bounds how long the worker waits for the config.
	lockBudget = 20 * time.Second
	// settleBudget is how long a new admin key may take to work. Nothing is
	// published on it (docs/openai-api.md).
	settleBudget = 20 * time.Second

	// lastLookBudget bounds all that is asked before the keys of a mount or config
	// that ends are deleted.
	lastLookBudget = 10 * time.Second
	unmountBudget  = 15 * time.Second

	// nameBudget bounds the look at the name of an account that is adopted already.
	nameBudget = 5 * time.Second

	// dryRunWait is how long a request waits for its dry run. Vault's clients
	// give up after 60 s.
	dryRunWait = 45 * time.Second

	// maxActivation leaves room for the create in a request's budget.
	maxActivation = 45 * time.Second

	// maxAttempts bounds the creates of one request, each under its own name.
	maxAttempts = 4

	// workers bounds the entries that a run acts on at once.
	workers = 4
	// patience is how many entries in a row may fail for a reason that others
	// would share before a run gives up until the next tick.
	patience = 3
	// lookUpBatch bounds the entries for which one run reads listings.
	lookUpBatch = 2000
	// keptFor is how long an entry that was reported and not executed is left
	// alone before it is looked at again.
	keptFor = 10 * time.Minute

	// clockSlack is how far Vault's clock may be ahead of OpenAI's.
	clockSlack = time.Minute

	// maxSkew is how far apart OpenAI's clock and this server's may be for an
	// answer to be judged by its time.
	maxSkew = 10 * time.Minute

	// clockTolerance is how far apart the clocks of two nodes may be: a time that
	// is further in the future was not now when it was written.
	clockTolerance = time.Minute
)

// notFinalBefore is how old something must be for a 404 or its absence from a
// listing to be final: one of OpenAI's servers may not know it yet. Nothing is
// published; Vault's AWS engine waits as long for IAM.
const notFinalBefore = 5 * time.Minute

const (
	// expiryMargin is how much longer a key lives at OpenAI than its lease can
	// last: the lease begins when Vault stores it, after the key was made, but
	// within the request's budget.
	expiryMargin = 75 * time.Second
	// maxLease is the longest a lease may last for its key's end to be within
	// what OpenAI accepts.
	maxLease     = client.MaxExpiry - expiryMargin
	firstRetry   = time.Minute
	longestRetry = time.Hour
	warnEvery    = time.Hour

	// remindEvery is how often the log repeats that a key is kept.
	remindEvery   = 24 * time.Hour
	maxStoredText = 512
)

const (
	// maxRoleName bounds a role's name, which is part of a storage key.
	maxRoleName = 128
)

const (
	// maxRequestTimeout keeps one attempt within a request's budget, on which
	// the age at which a journal entry may be acted upon is built.
	maxRequestTimeout    = requestBudget
	maxRotationGrace     = 7 * 24 * time.Hour
	defaultRotationGrace = 5 * time.Minute

	// minKeyLife is the shortest life of an admin key that has an end: a Vault
	// that was down over a long weekend still finds its key alive.
	minKeyLife = 7 * 24 * time.Hour

	// longestKept is how long after its supersession a key is kept at most. No
	// grace period is longer.
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

// The order of the budgets: each line fails to compile when its difference is
// negative.
const (
	// An entry of a create is acted on only when no request can be using it.
	_ = uint(walMinAge - requestBudget - cleanupBudget)
	// One attempt fits into a request, and so does the wait for a new key.
	_ = uint(requestBudget - maxRequestTimeout)
	_ = uint(requestBudget - maxActivation)
	_ = uint(requestBudget - settleBudget)
	// A lease that Vault stores at the end of a request's budget is covered.
	_ = uint(expiryMargin - requestBudget)
	// Vault allows 90 s for a revoke and for the rollback of a disable.
	_ = uint(90*time.Second - revokeBudget)
	_ = uint(90*time.Second - drainBudget)
	// Vault's clients give up after 60 s.
	_ = uint(60*time.Second - dryRunWait)
	// A run takes up at least a few entries.
	_ = uint(runBudget - tryBudget)
	// Two seconds for the lease are within the drain's time.
	_ = uint(drainBudget - leaseTransit)
	// What is asked before the keys of a mount that ends are deleted leaves time
	// for the deletes.
	_ = uint(drainBudget - lastLookBudget - endBudget)
	// No key is kept for less than its grace period.
	_ = uint(longestKept - maxRotationGrace)
	_ = uint(maxRotationGrace - defaultRotationGrace)
	// A retry is not put off for longer than a day is between two reminders.
	_ = uint(longestRetry - firstRetry)
	_ = uint(remindEvery - warnEvery)
)

const (
	defaultTidyInterval     = 12 * time.Hour
	defaultTidySafetyBuffer = 10 * time.Minute
	// minTidyInterval is the time between two of Vault's ticks.
	minTidyInterval = time.Minute
	// maxTidyTime bounds both settings: a sweep less often than that is one by
	// hand.
	maxTidyTime = 30 * 24 * time.Hour

	// useTolerance is how long after its supersession a key's last use may still
	// be this process's own: that of a request under way, as coarse as OpenAI's
	// last_used_at may be.
	useTolerance = 3 * time.Minute
)
