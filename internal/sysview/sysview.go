// Package sysview caches the values that every request reads from Vault: the
// replication state, for the framework, and the mount's lease TTLs, for credential
// requests. Each read is a round trip through the plugin protocol.
//
// What must stay true: no value is older than staleAfter, nor, unless a refresh is in
// progress, than FreshFor, since Vault does not notify a plugin of changes. An older
// replication state would be harmless, as Vault rejects writes that a node may not
// make; an older maximum would give a key a longer lifetime at OpenAI than its mount
// now allows, but not a longer lease.
package sysview

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// FreshFor is shorter than the time between tuning a mount and using it, for a
	// person or a program over a network.
	FreshFor = 20 * time.Millisecond
	// staleAfter is longer than a response of Vault takes on a busy machine.
	staleAfter = 500 * time.Millisecond
)

// CachedView is Vault's system view with cached values.
type CachedView struct {
	logical.SystemView
	replication cachedValue[consts.ReplicationState]
	maxLeaseTTL cachedValue[time.Duration]
	leaseTTL    cachedValue[time.Duration]
}

// ReplicationState implements logical.SystemView.
func (v *CachedView) ReplicationState() consts.ReplicationState {
	return v.replication.get(v.SystemView.ReplicationState)
}

// MaxLeaseTTL implements logical.SystemView.
func (v *CachedView) MaxLeaseTTL() time.Duration { return v.maxLeaseTTL.get(v.SystemView.MaxLeaseTTL) }

// DefaultLeaseTTL implements logical.SystemView.
func (v *CachedView) DefaultLeaseTTL() time.Duration {
	return v.leaseTTL.get(v.SystemView.DefaultLeaseTTL)
}

// cachedValue is a value that one caller refreshes while the others use the current
// one: if all of them waited for Vault, many times a second, the cache would cost more
// than it saves.
type cachedValue[T any] struct {
	current    atomic.Pointer[timedValue[T]]
	refreshing sync.Mutex
}

type timedValue[T any] struct {
	value     T
	requested time.Time
}

func (v *timedValue[T]) fresherThan(age time.Duration) bool {
	return v != nil && time.Since(v.requested) < age
}

func (c *cachedValue[T]) get(read func() T) T {
	current := c.current.Load()
	switch {
	case current.fresherThan(FreshFor):
		return current.value
	case !current.fresherThan(staleAfter):
		c.refreshing.Lock()
	case !c.refreshing.TryLock():
		return current.value
	}
	defer c.refreshing.Unlock()
	if current = c.current.Load(); current.fresherThan(FreshFor) { // refreshed during the wait
		return current.value
	}
	requested := time.Now()
	current = &timedValue[T]{read(), requested}
	c.current.Store(current)
	return current.value
}
