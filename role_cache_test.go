package openaisecrets

// The role cache: writes, deletions, and changes on other nodes apply immediately, even
// to a read in progress.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func putRole(t *testing.T, s logical.Storage, name string, ttl time.Duration) {
	t.Helper()
	r := newRole()
	r.Version, r.TTL, r.MaxTTL = roleVersion, ttl, 24*time.Hour
	entry, err := logical.StorageEntryJSON(roleStoragePrefix+name, r)
	require.NoError(t, err)
	require.NoError(t, s.Put(context.Background(), entry))
}

func TestRoleCache_ReadsARoleOnce(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &watchedStorage{Storage: &logical.InmemStorage{}}
	c := newRoleCache()
	for range 2 {
		r, err := c.get(ctx, s, "app")
		require.NoError(t, err)
		require.Nil(t, r)
	}
	require.EqualValues(t, 4, s.reads.Load(), "a role that is missing under both prefixes is not cached")
	putRole(t, s, "app", time.Hour)
	for range 3 {
		r, err := c.get(ctx, s, "app")
		require.NoError(t, err)
		require.Equal(t, time.Hour, r.TTL)
	}
	require.EqualValues(t, 5, s.reads.Load())
	for i := range maxCachedRoles {
		name := fmt.Sprint("role-", i)
		putRole(t, s, name, time.Hour)
		_, err := c.get(ctx, s, name)
		require.NoError(t, err)
	}
	require.LessOrEqual(t, len(c.cached), maxCachedRoles)
}

func TestRoleCache_DoesNotKeepARoleThatChangedDuringTheRead(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &watchedStorage{Storage: &logical.InmemStorage{}}
	c := newRoleCache()
	putRole(t, s, "app", time.Hour)
	held := newHold()
	s.next.Store(held)
	var reading sync.WaitGroup
	reading.Go(func() {
		r, err := c.get(ctx, s, "app")
		if err != nil || r.TTL != time.Hour {
			t.Error(r, err)
		}
	})
	<-held.entered // it has read the old role
	putRole(t, s, "app", 2*time.Hour)
	c.forget("app")
	close(held.release)
	reading.Wait()
	r, err := c.get(ctx, s, "app")
	require.NoError(t, err)
	require.Equal(t, 2*time.Hour, r.TTL)
}

// A write applies before it returns: after a read shows a narrowed role, no request may
// use the previous one.
func TestRoleCache_AWriteInvalidatesBeforeItReturns(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &watchedStorage{Storage: &logical.InmemStorage{}}
	c := newRoleCache()
	ttl := func() time.Duration {
		r, err := c.get(ctx, s, "app")
		require.NoError(t, err)
		return r.TTL
	}
	putRole(t, s, "app", time.Hour)
	require.Equal(t, time.Hour, ttl())
	require.NoError(t, c.change("app", func() error {
		require.Equal(t, time.Hour, ttl(), "not yet")
		putRole(t, s, "app", 2*time.Hour)
		require.Equal(t, 2*time.Hour, ttl())
		return nil
	}))
	reads := s.reads.Load()
	for range 2 {
		require.Equal(t, 2*time.Hour, ttl())
	}
	require.Equal(t, reads+1, s.reads.Load(), "and then it is cached")
	require.Empty(t, c.unsure)
}

// A failed write can still take effect later, even after another write, for example if
// Vault's storage timed out.
func TestRoleCache_AFailedWriteIsNotCached(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &watchedStorage{Storage: &logical.InmemStorage{}}
	c := newRoleCache()
	ttl := func() time.Duration {
		r, err := c.get(ctx, s, "app")
		require.NoError(t, err)
		return r.TTL
	}
	putRole(t, s, "app", time.Hour)
	require.Error(t, c.change("app", func() error { return errors.New("timed out") }))
	require.Equal(t, time.Hour, ttl())
	putRole(t, s, "app", 2*time.Hour) // the failed write takes effect
	require.Equal(t, 2*time.Hour, ttl())
	require.NoError(t, c.change("app", func() error { putRole(t, s, "app", 3*time.Hour); return nil }))
	c.forget("app")
	require.Equal(t, 3*time.Hour, ttl())
	putRole(t, s, "app", 2*time.Hour) // the first write, delayed
	require.Equal(t, 2*time.Hour, ttl())
}

// After concurrent reads and writes, the cache matches storage.
func TestRoleCache_MatchesStorageAfterConcurrentChanges(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &logical.InmemStorage{}
	c := newRoleCache()
	putRole(t, s, "app", time.Hour)
	var many sync.WaitGroup
	for w := range 8 {
		many.Go(func() {
			for i := range 200 {
				if w < 2 {
					_ = c.change("app", func() error { putRole(t, s, "app", time.Duration(2+i*2+w)*time.Minute); return nil })
				} else if w == 2 {
					c.forget("app")
				} else if _, err := c.get(ctx, s, "app"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	many.Wait()
	stored, err := getRole(ctx, s, "app")
	require.NoError(t, err)
	kept, err := c.get(ctx, s, "app")
	require.NoError(t, err)
	require.Equal(t, stored, kept)
	require.Empty(t, c.unsure)
}

func TestRoleCache_ChangesApplyImmediately(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	ttl := func() time.Duration {
		lease := h.lease("creds/app", nil)
		_, err := h.end(logical.RenewOperation, lease)
		require.NoError(t, err)
		require.NoError(t, h.revoke(lease))
		return lease.Secret.TTL
	}
	require.Equal(t, time.Hour, ttl())
	h.must(h.write("roles/app", map[string]any{"ttl": "2h"}))
	require.Equal(t, 2*time.Hour, ttl())

	// A change on another node, as on a performance secondary.
	putRole(t, h.storage, "app", 3*time.Hour)
	require.Equal(t, 2*time.Hour, ttl())
	h.b.invalidate(context.Background(), roleStoragePrefix+"app")
	h.must(h.write("config", map[string]any{"project_id": h.project})) // the role has no project
	require.Equal(t, 3*time.Hour, ttl())

	lease := h.lease("creds/app", nil)
	h.must(h.remove("roles/app"))
	require.Contains(t, h.refused(h.read("creds/app")), `role "app" not found`)
	_, err := h.end(logical.RenewOperation, lease)
	require.ErrorContains(t, err, "not found")
	require.NoError(t, h.revoke(lease))

	// A write that takes effect but returns an error.
	h.must(h.write("roles/app", nil))
	require.Equal(t, time.Hour, ttl())
	h.storage.fail(storageFault{write: 0, after: true})
	_, err = h.write("roles/app", map[string]any{"ttl": "4h"})
	h.storage.heal()
	require.Error(t, err)
	require.Equal(t, 4*time.Hour, ttl())
}
