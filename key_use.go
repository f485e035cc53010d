package openaisecrets

// This file owns when this process last used each of its admin keys: it is the
// observer of their clients.
//
// What must stay true: of a key that this process has forgotten it vouches for nothing.

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-openai/client"
)

// keyUse is when this process last called OpenAI with an admin key. It is the
// observer of the key's clients.
type keyUse struct {
	client.Observer
	key  client.Secret
	now  func() time.Time
	last atomic.Pointer[time.Time]
}

// Began implements client.Observer. A probe is made with another key, which costs
// nothing to count: it follows calls with this one.
func (u *keyUse) Began(call string, waited time.Duration) {
	now := u.now()
	u.last.Store(&now)
	u.Observer.Began(call, waited)
}

// vouches reports whether all use of the key may be this process's own.
func (u *keyUse) vouches(lastUsed time.Time) bool {
	last := u.last.Load()
	return last != nil && !lastUsed.After(last.Add(useTolerance))
}

// keyUses has what is known of the keys with which clients were made last. One
// that it has forgotten is one that this process cannot vouch for.
type keyUses struct {
	mu   sync.Mutex
	last []*keyUse // the latest first
}

const keyUsesKept = 8

func (b *backend) useOf(key client.Secret) *keyUse {
	b.uses.mu.Lock()
	defer b.uses.mu.Unlock()
	var use *keyUse
	if i := slices.IndexFunc(b.uses.last, func(u *keyUse) bool { return u.key.Equal(key) }); i >= 0 {
		use = b.uses.last[i]
		b.uses.last = slices.Delete(b.uses.last, i, i+1)
	} else {
		use = &keyUse{Observer: b.metrics, key: key, now: func() time.Time { return b.now() }}
	}
	b.uses.last = slices.Insert(b.uses.last, 0, use)
	b.uses.last = b.uses.last[:min(len(b.uses.last), keyUsesKept)]
	return use
}
