package openaisecrets

// The cost of each kind of permanent failure for Vault's storage and log, over ten
// minutes in a synctest bubble.

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func ofRoles(key string) error {
	if strings.HasPrefix(key, staticStoragePrefix) {
		return errStorage
	}
	return nil
}

func TestStaticRetry_PermanentFailuresBackOff(t *testing.T) {
	t.Parallel()
	failures := map[string]func(h *harness, s *watchedStorage) (end func()){
		"an unreadable entry": func(_ *harness, s *watchedStorage) func() { s.fail(ofRoles, nil); return func() {} },
		"an entry of a newer format": func(h *harness, s *watchedStorage) func() {
			require.NoError(h.t, h.storage.Put(h.t.Context(), &logical.StorageEntry{Key: staticStoragePrefix + "batch", Value: []byte(`{"version":99}`)}))
			return func() {}
		},
		"storage that rejects roles": func(_ *harness, s *watchedStorage) func() { s.fail(nil, ofRoles); return func() {} },
		"storage that rejects all writes": func(_ *harness, s *watchedStorage) func() {
			s.fail(nil, func(string) error { return errStorage })
			return func() {}
		},
		"a lock that is held": func(h *harness, _ *watchedStorage) func() {
			unlock, err := h.b.lockStatic(h.t.Context(), "batch")
			require.NoError(h.t, err)
			return unlock
		},
		"garbage from OpenAI": func(h *harness, _ *watchedStorage) func() {
			// Except for listings: callers that wait for the same one stop the time of the
			// bubble.
			return h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultGarbageBefore, Match: func(r *http.Request) bool {
				return r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "s")
			}})
		},
		"a key that cannot be deleted": func(h *harness, _ *watchedStorage) func() {
			return h.sim.Fail(openaitest.Fault{Route: routeKey, Status: 403})
		},
		"no config": func(h *harness, _ *watchedStorage) func() { h.must(h.remove("config")); return func() {} },
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
					s := &watchedStorage{Storage: h.storage}
					tick := func() {
						_, _ = h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: s, MountPoint: "openai/"})
					}
					require.NoError(t, h.b.static.worker.End(t.Context())) // the run that the writes started uses other storage
					tick()                                                 // reads the due times while storage works
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
					require.Less(t, cost, int64(600)) // at most one a second, in ten minutes
					require.Less(t, said, 64<<10)
					h.b.Cleanup(context.Background())
					h.sim.KeepAll()
				})
			})
		}
	}
}

func TestStaticRetry_ARoleThatIsReadableAgainIsRotated(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.must(h.write("rotate-role/batch", nil))
	h.runStaticWorker() // reads the due times
	s := &watchedStorage{Storage: h.storage, get: ofRoles}
	h.advance(defaultRevocationDelay)
	h.b.static.extend(0)
	require.NoError(t, h.b.runStaticWorker(t.Context(), &logical.Request{Storage: s, MountPoint: "openai/"}))
	require.InDelta(t, 1, h.measured().one(t, "static_roles_failing"), 0)
	require.Empty(t, h.staticRole("batch")["next_rotation_retry"], "no rotation has failed")
	h.advance(firstRetry)
	h.runStaticWorker()
	require.Zero(t, h.measured().one(t, "static_roles_failing"))
	require.Equal(t, 0, h.staticRole("batch")["superseded_keys"])
	h.deleteStaticRole("batch")
}

func TestStaticRetry_AnUnreadableRoleWaitsForItsRetry(t *testing.T) {
	t.Parallel()
	s, now := newStaticState(), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s.due = map[string]nextWork{"batch": {rotate: now, deadline: now, clean: now}}
	names, _ := s.nextDue(now, 1)
	require.Equal(t, []string{"batch"}, names)
	retry := s.notRead("batch", now)
	require.GreaterOrEqual(t, retry.Sub(now), firstRetry/2)
	names, next := s.nextDue(retry.Add(-time.Second), 1)
	require.Empty(t, names)
	require.Equal(t, retry, next)
	names, _ = s.nextDue(retry, 1)
	require.Equal(t, []string{"batch"}, names)
}
