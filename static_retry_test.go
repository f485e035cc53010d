package openaisecrets

// Each kind of failure that lasts, over ten minutes of a bubble: what it costs
// Vault's storage and its log.

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// troubledStorage counts what is read, and fails as a test says.
type troubledStorage struct {
	logical.Storage
	reads    atomic.Int64
	get, put func(key string) error // nil = none fails
}

func (s *troubledStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.reads.Add(1)
	if s.get != nil {
		if err := s.get(key); err != nil {
			return nil, err
		}
	}
	return s.Storage.Get(ctx, key)
}

func (s *troubledStorage) List(ctx context.Context, prefix string) ([]string, error) {
	s.reads.Add(1)
	return s.Storage.List(ctx, prefix)
}

func (s *troubledStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	if s.put != nil {
		if err := s.put(entry.Key); err != nil {
			return err
		}
	}
	return s.Storage.Put(ctx, entry)
}

func ofRoles(key string) error {
	if strings.HasPrefix(key, staticStoragePrefix) {
		return errStorage
	}
	return nil
}

func TestStaticRetry_NoLastingFailureIsAHotLoop(t *testing.T) {
	t.Parallel()
	failures := map[string]func(h *harness, s *troubledStorage) (end func()){
		"an entry that cannot be read": func(_ *harness, s *troubledStorage) func() { s.get = ofRoles; return func() {} },
		"an entry of a newer format": func(h *harness, s *troubledStorage) func() {
			require.NoError(h.t, h.storage.Put(h.t.Context(), &logical.StorageEntry{Key: staticStoragePrefix + "batch", Value: []byte(`{"version":99}`)}))
			return func() {}
		},
		"storage that takes no entry": func(_ *harness, s *troubledStorage) func() { s.put = ofRoles; return func() {} },
		"storage that takes nothing": func(_ *harness, s *troubledStorage) func() {
			s.put = func(string) error { return errStorage }
			return func() {}
		},
		"a lock that is held": func(h *harness, _ *troubledStorage) func() {
			unlock, err := h.b.lockStatic(h.t.Context(), "batch")
			require.NoError(h.t, err)
			return unlock
		},
		"garbage of OpenAI's": func(h *harness, _ *troubledStorage) func() {
			// But for listings: callers that wait for the same one keep a bubble's time
			// from passing.
			return h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultGarbageBefore, Match: func(r *http.Request) bool {
				return r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "s")
			}})
		},
		"a key that may not be deleted": func(h *harness, _ *troubledStorage) func() {
			return h.sim.Fail(openaitest.Fault{Route: routeKey, Status: 403})
		},
		"no config": func(h *harness, _ *troubledStorage) func() { h.must(h.remove("config")); return func() {} },
	}
	for name, fail := range failures {
		for _, due := range []string{"a superseded key", "a rotation and a superseded key"} {
			t.Run(name+", "+due, func(t *testing.T) {
				t.Parallel()
				inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
					h.configure(fields{"tidy_interval": 0})
					h.static("batch", fields{"activation_timeout": 0})
					if due == "a superseded key" {
						h.advance(23 * time.Hour)
					} else {
						h.advance(24*time.Hour - time.Minute)
					}
					h.must(h.write("static-roles/batch", fields{"revocation_delay": "2m"}))
					h.must(h.write("rotate-role/batch", nil))
					if due != "a superseded key" {
						h.must(h.write("static-roles/batch", fields{"rotation_period": "2m"}))
					}
					s := &troubledStorage{Storage: h.storage}
					tick := func() {
						_, _ = h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: s, MountPoint: "openai/"})
					}
					require.NoError(t, h.b.static.pass.End(t.Context())) // one of the writes' has another storage
					tick()                                               // what is due is read while it can be
					time.Sleep(time.Second)
					end := fail(h, s)
					reads, logged := s.reads.Load(), len(h.log.String())
					for range 10 {
						time.Sleep(time.Minute)
						tick()
					}
					cost, said := s.reads.Load()-reads, len(h.log.String())-logged
					t.Logf("%d reads of storage, %d bytes of log", cost, said)
					end()
					require.Less(t, cost, int64(600)) // a minute of tries for each of several reasons
					require.Less(t, said, 64<<10)
					h.b.Cleanup(context.Background())
					h.sim.KeepAll()
				})
			})
		}
	}
}

func TestStaticRetry_ARoleThatCanBeReadAgainIsKept(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.must(h.write("rotate-role/batch", nil))
	h.keep() // what is due is known
	s := &troubledStorage{Storage: h.storage, get: ofRoles}
	h.advance(defaultRevocationDelay)
	h.b.static.extend(0)
	require.NoError(t, h.b.keepStatic(t.Context(), &logical.Request{Storage: s, MountPoint: "openai/"}))
	require.InDelta(t, 1, h.measured().one(t, "static_roles_failing"), 0)
	require.Empty(t, h.staticRole("batch")["next_rotation_retry"], "no rotation has failed")
	h.advance(firstRetry)
	h.keep()
	require.Zero(t, h.measured().one(t, "static_roles_failing"))
	require.Equal(t, 0, h.staticRole("batch")["retired_keys"])
	h.gone("batch")
}

func TestStaticRetry_NothingIsTakenBeforeARoleThatCouldNotBeReadMayBeLookedAt(t *testing.T) {
	t.Parallel()
	s, now := newStaticState(), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s.due = map[string]plan{"batch": {rotate: now, deadline: now, clean: now}}
	names, _ := s.take(now, 1)
	require.Equal(t, []string{"batch"}, names)
	retry := s.notRead("batch", now)
	require.GreaterOrEqual(t, retry.Sub(now), firstRetry/2)
	names, next := s.take(retry.Add(-time.Second), 1)
	require.Empty(t, names)
	require.Equal(t, retry, next)
	names, _ = s.take(retry, 1)
	require.Equal(t, []string{"batch"}, names)
}
