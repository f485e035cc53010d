package openaisecrets

// This file owns how a role is read and written, whoever stored it, and the roles in
// memory, so that an issue asks Vault's storage nothing that it has told before: each
// question is a round trip through the plugin protocol.
//
// What must stay true: a role is here only as storage has it, and not while that is in
// doubt: from the start of a write on, whose effect others may see before its answer
// comes, and for good after one that has failed. Vault says where one changed under
// this node; what was being read meanwhile is not kept. A role here is never changed.

import (
	"context"
	"fmt"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"
)

// maxKeptRoles bounds them. At less than 1 KiB each, unless their texts are long,
// they take 10 MiB if so many are in use; name templates are kept by internal/naming.
const maxKeptRoles = 10_000

type roleCache struct {
	mu   sync.RWMutex
	kept map[string]*role
	// unsure counts the writes of a role that are under way or have failed: storage
	// may take such a one yet, even after a later one that it has confirmed.
	unsure map[string]int
	// changes counts what was forgotten, so that a role read before a change is
	// not kept after it.
	changes uint64
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
	if c.changes == changes && c.unsure[name] == 0 {
		if len(c.kept) >= maxKeptRoles {
			clear(c.kept)
		}
		c.kept[name] = r
	}
	return r, nil
}

// change writes or deletes a role's entry.
func (c *roleCache) change(name string, write func() error) error {
	c.mu.Lock()
	c.drop(name)
	c.unsure[name]++
	c.mu.Unlock()
	err := write()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(name) // what was read while it was written
	if c.unsure[name]--; c.unsure[name] == 0 {
		delete(c.unsure, name)
	}
	return nil
}

// forget is for a role that has changed under this node.
func (c *roleCache) forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(name)
}

// drop is forget under the lock.
func (c *roleCache) drop(name string) {
	c.changes++
	delete(c.kept, name)
}

func newRoleCache() *roleCache {
	return &roleCache{kept: map[string]*role{}, unsure: map[string]int{}}
}

// getRole reads a role from storage; nil when there is no such role.
func getRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	entry, err := s.Get(ctx, roleStoragePrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading role %q: %w", name, err)
	}
	if entry == nil {
		return getCommunityRole(ctx, s, name)
	}
	r := &role{}
	if err := entry.DecodeJSON(r); err != nil {
		return nil, unreadable{fmt.Errorf("decoding role %q: %w", name, err)}
	}
	if r.Version > roleVersion {
		return nil, unreadable{fmt.Errorf("role %q was written by a newer version of this plugin (format %d, this one knows %d)", name, r.Version, roleVersion)}
	}
	return r, nil
}

// deleteRole deletes a role in both formats, this engine's last: otherwise a
// failure in between would bring the other one back.
func deleteRole(ctx context.Context, s logical.Storage, name string) error {
	if err := s.Delete(ctx, communityRolePrefix+name); err != nil {
		return err
	}
	return s.Delete(ctx, roleStoragePrefix+name)
}
