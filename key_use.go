package openaisecrets

// This file owns the record of when this process last used each of its admin keys.
//
// What must stay true: use of a key that this process has no record of is never
// attributed to this process.

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-openai/client"
)

// keyUse records when this process last called OpenAI with an admin key, as the
// observer of that key's clients.
type keyUse struct {
	client.Observer
	key  client.Secret
	now  func() time.Time
	last atomic.Pointer[time.Time]
}

// Began implements client.Observer. Probes use another key but count as well, which is
// harmless: they follow calls with this one.
func (u *keyUse) Began(call string, waited time.Duration) {
	now := u.now()
	u.last.Store(&now)
	u.Observer.Began(call, waited)
}

// vouches reports whether this process may account for all use of the key.
func (u *keyUse) vouches(lastUsed time.Time) bool {
	last := u.last.Load()
	return last != nil && !lastUsed.After(last.Add(useTolerance))
}

// keyUses has the records of the keys for which clients were created last.
type keyUses struct {
	mu   sync.Mutex
	last []*keyUse // newest first
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
