package openaisecrets

// This file owns the roles in memory, so that an issue asks Vault's storage
// nothing that it has told before: each question is a round trip through the
// plugin protocol.
//
// What must stay true: a role is here only as storage has it. Whoever writes or
// deletes one says so afterwards, and so does Vault where it changed under this
// node; what was being read meanwhile is not kept. A role here is never changed.

import (
	"context"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"
)

// maxKeptRoles bounds them. At about 2 KiB each, with what its name template
// was compiled to, they take 20 MiB if so many are in use.
const maxKeptRoles = 10_000

type roleCache struct {
	mu   sync.RWMutex
	kept map[string]*role
	// unsure are the roles whose last write has failed: storage may take it yet,
	// whatever it says now.
	unsure map[string]bool
	// changes counts what was forgotten, so that a role read before a change is
	// not kept after it.
	changes uint64
}

func newRoleCache() *roleCache {
	return &roleCache{kept: map[string]*role{}, unsure: map[string]bool{}}
}

// get returns a role that must not be changed, nil when there is none.
func (c *roleCache) get(ctx context.Context, s logical.Storage, name string) (*role, error) {
	c.mu.RLock()
	r, changes := c.kept[name], c.changes
	c.mu.RUnlock()
	if r != nil {
		return r, nil
	}
	r, err := getRole(ctx, s, name)
	if r == nil || err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changes == changes && !c.unsure[name] {
		if len(c.kept) >= maxKeptRoles {
			clear(c.kept)
		}
		c.kept[name] = r
	}
	return r, nil
}

// forget is for a role that has been written or deleted, or may have been: err
// is what the write said.
func (c *roleCache) forget(name string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	delete(c.kept, name)
	if delete(c.unsure, name); err != nil {
		c.unsure[name] = true
	}
}
