package openaisecrets

// Roles in memory: what is written, deleted or changed elsewhere is seen at
// once, whatever was being read meanwhile.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// hold is where somebody is held up, once.
type hold struct{ entered, release chan struct{} }

func newHold() *hold { return &hold{make(chan struct{}), make(chan struct{})} }

func (h *hold) up() {
	close(h.entered)
	<-h.release
}

// slowStorage counts reads, and holds one up on its way back when told to.
type slowStorage struct {
	logical.Storage
	reads atomic.Int64
	next  atomic.Pointer[hold]
}

func (s *slowStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.reads.Add(1)
	entry, err := s.Storage.Get(ctx, key)
	if h := s.next.Swap(nil); h != nil {
		h.up()
	}
	return entry, err
}

func putRole(t *testing.T, s logical.Storage, name string, ttl time.Duration) {
	t.Helper()
	r := newRole()
	r.Version, r.TTL, r.MaxTTL = roleVersion, ttl, 24*time.Hour
	entry, err := logical.StorageEntryJSON(roleStoragePrefix+name, r)
	require.NoError(t, err)
	require.NoError(t, s.Put(context.Background(), entry))
}

func TestRoles_AreReadOnce(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &slowStorage{Storage: &logical.InmemStorage{}}
	c := newRoleCache()
	for range 2 {
		r, err := c.get(ctx, s, "app")
		require.NoError(t, err)
		require.Nil(t, r)
	}
	require.EqualValues(t, 2, s.reads.Load(), "that there is none is not kept")
	putRole(t, s, "app", time.Hour)
	for range 3 {
		r, err := c.get(ctx, s, "app")
		require.NoError(t, err)
		require.Equal(t, time.Hour, r.TTL)
	}
	require.EqualValues(t, 3, s.reads.Load())
	for i := range maxKeptRoles {
		name := fmt.Sprint("role-", i)
		putRole(t, s, name, time.Hour)
		_, err := c.get(ctx, s, name)
		require.NoError(t, err)
	}
	require.LessOrEqual(t, len(c.kept), maxKeptRoles)
}

func TestRoles_WhatWasBeingReadWhileItChangedIsNotKept(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &slowStorage{Storage: &logical.InmemStorage{}}
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
	<-held.entered // it has the old role in its hands
	putRole(t, s, "app", 2*time.Hour)
	c.forget("app", nil)
	close(held.release)
	reading.Wait()
	r, err := c.get(ctx, s, "app")
	require.NoError(t, err)
	require.Equal(t, 2*time.Hour, r.TTL)
}

// What failed may yet take effect, as a write does that Vault's storage has
// given up waiting for.
func TestRoles_AFailedWriteIsNotTrusted(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := &slowStorage{Storage: &logical.InmemStorage{}}
	c := newRoleCache()
	putRole(t, s, "app", time.Hour)
	c.forget("app", errors.New("timed out"))
	r, err := c.get(ctx, s, "app")
	require.NoError(t, err)
	require.Equal(t, time.Hour, r.TTL)
	putRole(t, s, "app", 2*time.Hour) // only now
	r, err = c.get(ctx, s, "app")
	require.NoError(t, err)
	require.Equal(t, 2*time.Hour, r.TTL)
	c.forget("app", nil) // the next write, which succeeds
	reads := s.reads.Load()
	for range 2 {
		_, err = c.get(ctx, s, "app")
		require.NoError(t, err)
	}
	require.Equal(t, reads+1, s.reads.Load())
}

func TestRoles_AChangeIsInForceAtOnce(t *testing.T) {
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

	// Under this node, as on a performance secondary.
	putRole(t, h.storage, "app", 3*time.Hour)
	require.Equal(t, 2*time.Hour, ttl())
	h.b.invalidate(context.Background(), roleStoragePrefix+"app")
	h.must(h.write("config", map[string]any{"project_id": h.project})) // it names none
	require.Equal(t, 3*time.Hour, ttl())

	lease := h.lease("creds/app", nil)
	h.must(h.remove("roles/app"))
	require.Contains(t, h.refused(h.read("creds/app")), `there is no role "app"`)
	require.Contains(t, h.refused(h.end(logical.RenewOperation, lease)), "no longer exists")
	require.NoError(t, h.revoke(lease))

	// Written, with an answer that says that it was not.
	h.must(h.write("roles/app", nil))
	require.Equal(t, time.Hour, ttl())
	h.storage.fail(storageFault{write: 0, after: true})
	_, err := h.write("roles/app", map[string]any{"ttl": "4h"})
	h.storage.heal()
	require.Error(t, err)
	require.Equal(t, 4*time.Hour, ttl())
}
