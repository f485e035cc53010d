package openaisecrets

// This file owns what is asked of Vault for every request: the replication
// state, by the framework, and the mount's longest lease, by an issue. Each is a
// round trip through the plugin protocol.
//
// What must stay true: no answer is older than viewAge, since Vault does not tell
// a plugin when one changes. An older replication state would do no harm, as
// Vault refuses what a node may not write; an older maximum would give a key a
// longer life at OpenAI than its mount now allows, not a longer lease.

import (
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// viewAge is shorter than it takes a person, or a program over a network, to
// tune a mount and then to use it.
const viewAge = 20 * time.Millisecond

// calmView is Vault's system view, less often asked.
type calmView struct {
	logical.SystemView
	replication recent[consts.ReplicationState]
	maxLeaseTTL recent[time.Duration]
}

func (v *calmView) ReplicationState() consts.ReplicationState {
	return v.replication.get(v.SystemView.ReplicationState)
}

func (v *calmView) MaxLeaseTTL() time.Duration { return v.maxLeaseTTL.get(v.SystemView.MaxLeaseTTL) }

// recent is an answer, and when it was asked for.
type recent[T any] struct {
	mu     sync.Mutex
	asked  time.Time
	answer T
}

func (r *recent[T]) get(ask func() T) T {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.Sub(r.asked) >= viewAge {
		r.answer, r.asked = ask(), now
	}
	return r.answer
}
