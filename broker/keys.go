package broker

// This file owns the key of one agent. There is one current key; a replaced key
// stays leased until the requests that use it end. What must stay true: one
// replacement at a time, and every lease is revoked, or left to expire with a
// log line that says when.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

const (
	maxVaultBackoff   = 10 * time.Second // between tries while Vault does not answer
	maxRefusedBackoff = time.Minute      // between keys that OpenAI refuses
	maxRefused        = 20               // keys a minute that OpenAI accepts at first
)

var errRefused = errors.New("OpenAI refuses the keys that Vault issues")

// key is a leased key in use. keys.mu guards what changes; the key itself and
// the IDs do not.
type key struct {
	lease
	users    int             // requests that use it
	retired  bool            // another key is current
	refused  bool            // OpenAI answered 401
	accepted bool            // OpenAI answered anything else
	lost     bool            // Vault has no such lease any more
	idle     chan struct{}   // closed when retired and unused
	ctx      context.Context // ends when nothing may use the key any more
	end      context.CancelFunc
}

// keys holds the keys of one agent.
type keys struct {
	agent   Agent
	vault   *vault
	log     *slog.Logger
	ledger  *ledger
	ctx     context.Context // ends when the broker closes
	cancel  context.CancelFunc
	workers sync.WaitGroup
	turn    chan struct{} // held during a replacement
	pace    *limits       // of replacing refused keys

	mu       sync.Mutex
	current  *key
	live     map[*key]bool // not yet revoked
	failures int           // failed replacements in a row
	refusals int           // fresh keys in a row that OpenAI refused
	retryAt  time.Time     // no replacement before
	cause    error         // of the last failed replacement
}

func newKeys(a Agent, v *vault, log *slog.Logger, l *ledger) *keys {
	k := &keys{agent: a, vault: v, log: log.With("agent", a.Name), ledger: l, turn: make(chan struct{}, 1), pace: newLimits(0, maxRefused), live: map[*key]bool{}}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// noKey says why there is no key, and when to ask again.
func noKey(cause error, retry time.Duration) *refusal {
	none := &refusal{http.StatusServiceUnavailable, "broker_no_key", "The broker has no OpenAI key at the moment.", max(retry, time.Second), cause}
	if status, words := rejected(cause); status != 0 {
		none.status, none.message, none.retry = http.StatusForbidden, "Vault issues no key: "+words, 0
	}
	return none
}

// take returns the current key for one request; release returns it.
func (k *keys) take(ctx context.Context) (*key, *refusal) {
	for range 3 { // a fresh key can be refused while this request waits for it
		k.mu.Lock()
		current := k.current
		usable := !current.refused && !reached(current.ends)
		if usable {
			current.users++
		}
		k.mu.Unlock()
		if usable {
			return current, nil
		}
		if refused := k.replace(ctx, current); refused != nil {
			return nil, refused
		}
	}
	return nil, noKey(errRefused, 0)
}

func (k *keys) release(used *key) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if used.users--; used.users == 0 && used.retired {
		close(used.idle)
	}
}

// judge notes OpenAI's verdict on a key. Fresh keys that are refused one after
// the other are paced.
func (k *keys) judge(used *key, refused bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !refused {
		if used.accepted = true; used == k.current {
			k.refusals = 0
		}
		return
	}
	k.ledger.add(1, "key_refusals_total{agent=%q}", k.agent.Name)
	if used.refused || used != k.current {
		return
	}
	used.refused = true
	k.log.Warn("OpenAI refused the key", "api_key_id", used.keyID, "lease_id", used.leaseID)
	if !used.accepted {
		k.refusals++
	}
	if k.refusals >= 2 {
		k.cause, k.retryAt = errRefused, time.Now().Add(backoff(k.refusals-2, maxRefusedBackoff))
	}
}

// replace makes another key than old the current one: somebody else's
// replacement, or a lease of its own. old is nil at the start.
func (k *keys) replace(ctx context.Context, old *key) *refusal {
	select {
	case k.turn <- struct{}{}:
		defer func() { <-k.turn }()
	case <-ctx.Done():
		return noKey(ctx.Err(), 0)
	}
	k.mu.Lock()
	current, wait, cause := k.current, time.Until(k.retryAt), k.cause
	refused := old != nil && old.refused
	k.mu.Unlock()
	if current != old {
		return nil
	}
	if wait > 0 && cause != nil {
		return noKey(cause, wait)
	}
	if refused {
		if many := k.pace.enter(); many != nil {
			return noKey(errRefused, many.retry)
		}
	}
	lasting, cancel := context.WithTimeout(k.ctx, 2*vaultTimeout) // for all who wait, and not for this request only
	defer cancel()
	if old == nil {
		defer context.AfterFunc(ctx, cancel)()
	}
	next, err := k.vault.lease(lasting, k.agent) //nolint:contextcheck // see lasting
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil && old != nil && next.keyID == old.keyID && (old.leaseID != "" || old.refused) {
		err = fmt.Errorf("vault returned key %s again, which ends or which OpenAI refuses", next.keyID)
		k.workers.Go(func() { _ = next.revoke(k.ctx) })
	}
	if err == nil {
		k.install(next) //nolint:contextcheck // its worker ends with the broker
		return nil
	}
	k.cause, k.retryAt = err, time.Now().Add(backoff(k.failures, maxVaultBackoff))
	k.failures++
	k.ledger.add(1, "vault_errors_total{agent=%q}", k.agent.Name)
	if old != nil {
		k.log.Warn("no new key", "error", err, "current_expires", text(old.ends))
	}
	return noKey(err, time.Until(k.retryAt))
}

// install makes a lease the current key. The caller holds mu.
func (k *keys) install(next *lease) {
	fresh, old := &key{lease: *next, idle: make(chan struct{})}, k.current
	fresh.ctx, fresh.end = context.WithCancel(context.Background())
	k.current, k.live[fresh], k.failures, k.cause = fresh, true, 0, nil
	k.ledger.add(1, "leases_total{agent=%q}", k.agent.Name)
	k.log.Info("key leased", "api_key_id", fresh.keyID, "lease_id", fresh.leaseID, "expires", text(fresh.ends))
	if old != nil {
		if old.retired = true; old.refused || old.lost {
			old.end()
		}
		if old.users == 0 {
			close(old.idle)
		}
	}
	k.workers.Go(func() { k.tend(fresh) })
}

// tend renews a key until it is retired and unused, and then revokes it. A key
// that cannot be renewed is replaced.
func (k *keys) tend(mine *key) {
	for failures := 0; ; {
		k.mu.Lock()
		next, over, retired, lost := mine.due, reached(mine.ends), mine.retired, mine.lost
		if failures > 0 || over {
			next = time.Now().Add(backoff(failures, maxVaultBackoff))
		}
		if over {
			mine.end()
		} else {
			next = earliest(next, mine.ends)
		}
		if !retired {
			k.ledger.set(max(0, float64(mine.ends.Unix())), "key_expires_timestamp_seconds{agent=%q}", k.agent.Name)
		}
		k.mu.Unlock()
		if retired && (over || lost) {
			_ = k.dispose(k.ctx, mine)
			return
		}
		var timer <-chan time.Time // never, for what has no end
		if !next.IsZero() {
			timer = time.After(max(time.Until(next), 0))
		}
		select {
		case <-k.ctx.Done():
			return // close revokes
		case <-mine.idle:
			_ = k.dispose(k.ctx, mine)
			return
		case <-timer:
		}
		if failures++; k.renew(mine) {
			failures = 0
		}
	}
}

// renew extends a key, or replaces it, and says whether it did.
func (k *keys) renew(mine *key) bool {
	ctx, cancel := context.WithTimeout(k.ctx, vaultTimeout)
	defer cancel()
	k.mu.Lock()
	next, err := mine.lease, errReplace
	usable := !mine.refused && !reached(mine.ends)
	k.mu.Unlock()
	if usable {
		next, err = k.vault.renew(ctx, next)
	}
	status, _ := rejected(err)
	k.mu.Lock()
	mine.accessor, mine.ends, mine.due, mine.final = next.accessor, next.ends, next.due, next.final // requests read the rest
	mine.lost = mine.lost || status == http.StatusBadRequest
	retired := mine.retired
	k.mu.Unlock()
	switch {
	case err == nil:
		k.ledger.add(1, "renewals_total{agent=%q}", k.agent.Name)
		return true
	case !errors.Is(err, errReplace):
		k.ledger.add(1, "vault_errors_total{agent=%q}", k.agent.Name)
		k.log.Warn("renewal failed", "lease_id", next.leaseID, "error", err, "expires", text(next.ends))
		if status == 0 { // Vault did not answer
			return false
		}
	}
	return !retired && k.replace(ctx, mine) == nil
}

// dispose revokes a key that nothing uses, and tries until the key has ended.
// A refusal of Vault's is final.
func (k *keys) dispose(ctx context.Context, mine *key) error {
	mine.end()
	k.mu.Lock()
	l := mine.lease
	k.mu.Unlock()
	for tries := 0; ; tries++ {
		try, cancel := context.WithTimeout(ctx, revokeTimeout)
		err := l.revoke(try)
		cancel()
		status, words := rejected(err)
		switch {
		case err == nil && l.leaseID != "":
			k.log.Info("key revoked", "api_key_id", l.keyID, "lease_id", l.leaseID)
		case status != 0 && !mine.lost && !reached(l.ends):
			k.log.Warn("Vault rejected the revocation; the key stays valid until it expires",
				"api_key_id", l.keyID, "lease_id", l.leaseID, "expires", text(l.ends), "error", words)
		}
		if err == nil || status != 0 || reached(l.ends) {
			k.mu.Lock()
			defer k.mu.Unlock()
			delete(k.live, mine)
			return nil
		}
		select {
		case <-time.After(backoff(tries, maxVaultBackoff)):
		case <-ctx.Done():
			return fmt.Errorf("revoke lease %s: %w; key %s stays valid until it expires: %s", l.leaseID, err, l.keyID, text(l.ends))
		}
	}
}

// close stops the workers and revokes every key that is left.
func (k *keys) close(ctx context.Context) (err error) {
	if k.ctx.Err() != nil {
		return nil //nolint:nilerr // closed already
	}
	k.cancel()
	k.turn <- struct{}{} // for good: no key is leased after this
	k.workers.Wait()
	for mine := range k.live {
		err = cmp.Or(err, k.dispose(ctx, mine))
	}
	return err
}

// backoff is 1s, 2s, 4s and so on, up to a limit.
func backoff(tries int, limit time.Duration) time.Duration {
	return min(time.Second<<min(tries, 10), limit)
}
