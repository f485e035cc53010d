package openaisecrets

// This file owns what is asked of Vault for every request: the replication
// state, by the framework, and the mount's longest lease, by an issue. Each is a
// round trip through the plugin protocol.
//
// What must stay true: no answer is older than viewLimit, nor, unless the next is
// on its way, than viewAge, since Vault does not tell a plugin when one changes.
// An older replication state would do no harm, as Vault refuses what a node may
// not write; an older maximum would give a key a longer life at OpenAI than its
// mount now allows, not a longer lease.

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// viewAge is shorter than it takes a person, or a program over a network, to
	// tune a mount and then to use it.
	viewAge = 20 * time.Millisecond
	// viewLimit is longer than Vault takes to answer on a busy machine.
	viewLimit = 500 * time.Millisecond
)

// calmView is Vault's system view, less often asked.
type calmView struct {
	logical.SystemView
	replication recent[consts.ReplicationState]
	maxLeaseTTL recent[time.Duration]
	leaseTTL    recent[time.Duration]
}

func (v *calmView) ReplicationState() consts.ReplicationState {
	return v.replication.get(v.SystemView.ReplicationState)
}

func (v *calmView) MaxLeaseTTL() time.Duration { return v.maxLeaseTTL.get(v.SystemView.MaxLeaseTTL) }

func (v *calmView) DefaultLeaseTTL() time.Duration {
	return v.leaseTTL.get(v.SystemView.DefaultLeaseTTL)
}

// recent is an answer, which one caller asks for anew while the others go on with
// the one there is: that all of them wait for Vault together, many times a second,
// costs more than it saves.
type recent[T any] struct {
	known  atomic.Pointer[dated[T]]
	asking sync.Mutex
}

type dated[T any] struct {
	answer T
	asked  time.Time
}

func (d *dated[T]) younger(than time.Duration) bool { return d != nil && time.Since(d.asked) < than }

func (r *recent[T]) get(ask func() T) T {
	known := r.known.Load()
	switch {
	case known.younger(viewAge):
		return known.answer
	case !known.younger(viewLimit):
		r.asking.Lock()
	case !r.asking.TryLock():
		return known.answer
	}
	defer r.asking.Unlock()
	if known = r.known.Load(); known.younger(viewAge) { // while this one waited
		return known.answer
	}
	asked := time.Now()
	known = &dated[T]{ask(), asked}
	r.known.Store(known)
	return known.answer
}
