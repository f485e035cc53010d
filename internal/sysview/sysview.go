// Package sysview owns what is asked of Vault for every request: the replication
// state, by the framework, and the mount's longest lease, by an issue. Each is a
// round trip through the plugin protocol.
//
// What must stay true: no answer is older than staleAfter, nor, unless the next is
// on its way, than FreshFor, since Vault does not tell a plugin when one changes.
// An older replication state would do no harm, as Vault refuses what a node may
// not write; an older maximum would give a key a longer life at OpenAI than its
// mount now allows, not a longer lease.
package sysview

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// FreshFor is shorter than it takes a person, or a program over a network, to
	// tune a mount and then to use it.
	FreshFor = 20 * time.Millisecond
	// staleAfter is longer than Vault takes to answer on a busy machine.
	staleAfter = 500 * time.Millisecond
)

// CachedView is Vault's system view, less often asked.
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

// cachedValue is an answer, which one caller asks for anew while the others go on with
// the one there is: that all of them wait for Vault together, many times a second,
// costs more than it saves.
type cachedValue[T any] struct {
	known  atomic.Pointer[timedValue[T]]
	asking sync.Mutex
}

type timedValue[T any] struct {
	answer T
	asked  time.Time
}

func (d *timedValue[T]) fresherThan(than time.Duration) bool {
	return d != nil && time.Since(d.asked) < than
}

func (r *cachedValue[T]) get(ask func() T) T {
	known := r.known.Load()
	switch {
	case known.fresherThan(FreshFor):
		return known.answer
	case !known.fresherThan(staleAfter):
		r.asking.Lock()
	case !r.asking.TryLock():
		return known.answer
	}
	defer r.asking.Unlock()
	if known = r.known.Load(); known.fresherThan(FreshFor) { // while this one waited
		return known.answer
	}
	asked := time.Now()
	known = &timedValue[T]{ask(), asked}
	r.known.Store(known)
	return known.answer
}
