package openaisecrets

// This file owns reading and deleting role entries, including the community plugin's,
// and the role cache, which saves a credential request a round trip to storage through
// the plugin protocol. path_roles.go writes the entries.
//
// What must stay true: the cache holds a role only as storage has it. It does not hold
// a role during a write, whose effect others may see before it returns, or after a
// write that failed. A role that was read while it changed, on this node or another
// one, is not cached. A cached role is never modified.

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"
)

// maxCachedRoles bounds the cache to about 10 MiB, at less than 1 KiB per role with
// short texts; internal/naming caches name templates.
const maxCachedRoles = 10_000

type roleCache struct {
	mu     sync.RWMutex
	cached map[string]*role
	// unsure counts the writes of a role that are in progress or failed: storage may
	// apply a failed write later, even after a later write that succeeded.
	unsure map[string]int
	// changes counts invalidations, so that a role read before one is not cached
	// after it.
	changes uint64
}

// get returns a role, which must not be modified; nil if there is none.
func (c *roleCache) get(ctx context.Context, s logical.Storage, name string) (*role, error) {
	c.mu.RLock()
	r, changes := c.cached[name], c.changes
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
		if len(c.cached) >= maxCachedRoles {
			clear(c.cached)
		}
		c.cached[name] = r
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
	c.drop(name) // a read during the write may have cached it
	if c.unsure[name]--; c.unsure[name] == 0 {
		delete(c.unsure, name)
	}
	return nil
}

// forget invalidates a role that changed on another node.
func (c *roleCache) forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(name)
}

// drop is forget with the lock held.
func (c *roleCache) drop(name string) {
	c.changes++
	delete(c.cached, name)
}

func newRoleCache() *roleCache {
	return &roleCache{cached: map[string]*role{}, unsure: map[string]int{}}
}

// getRole reads a role from storage; nil if there is none.
func getRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	r := &role{}
	entry, err := readEntry(ctx, s, roleStoragePrefix+name, fmt.Sprintf("role %q", name), roleVersion, r)
	if err != nil {
		return nil, err
	}
	if entry == nil {
		return getCommunityRole(ctx, s, name)
	}
	return r, nil
}

// deleteRole deletes a role in both formats, this engine's last: in the other order, a
// failure in between would bring the community plugin's role back.
func deleteRole(ctx context.Context, s logical.Storage, name string) error {
	if err := s.Delete(ctx, communityRolePrefix+name); err != nil {
		return err
	}
	return s.Delete(ctx, roleStoragePrefix+name)
}

// eachRole calls each with every role but those of a newer version.
func eachRole(ctx context.Context, s logical.Storage, each func(name string, r *role)) error {
	names, err := listNames(ctx, s, roleStoragePrefix, communityRolePrefix)
	if err != nil {
		return fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range names {
		r, err := getRole(ctx, s, name)
		if err != nil && !errors.As(err, &unreadable{}) {
			return err
		}
		if r != nil && err == nil {
			each(name, r)
		}
	}
	return nil
}
