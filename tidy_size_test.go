package openaisecrets

// The memory and the calls that tidy needs in a very large organization.

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// The number of accounts; there are half as many WAL entries. The figures in
// docs/performance.md are for 200,000, which takes a minute.
var many = flag.Int("accounts", 20_000, "accounts of TestTidy_ManyAccounts")

const pageOf = 100

// multitude is the simulator with that many accounts of this mount, each with one key.
// Only their listings exist.
type multitude struct {
	*openaitest.Server
	tag            string
	created, ends  int64
	accounts, keys atomic.Int64 // pages read
	deletes        atomic.Int64
	enough         func()
}

func (m *multitude) id(i int) string { return fmt.Sprintf("user-%024d", i) }

func (m *multitude) name(i int) string { return fmt.Sprintf("vault-app-%s%010d", m.tag, i) }

func (m *multitude) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind := ""
	switch {
	case r.Method == http.MethodDelete && strings.Contains(r.URL.Path, "/service_accounts/user-"):
		if m.deletes.Add(1) == 1000 { // further deletes take no memory
			m.enough()
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"object":"organization.project.service_account.deleted","id":%q,"deleted":true}`, r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
		return
	case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/service_accounts"):
		kind = "service_account"
		m.accounts.Add(1)
	case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/api_keys"):
		kind = "api_key"
		m.keys.Add(1)
	default:
		m.Server.ServeHTTP(w, r)
		return
	}
	after := r.URL.Query().Get("after")
	first := 0
	if after != "" {
		first, _ = strconv.Atoi(after[strings.IndexAny(after, "-_")+1:])
		first++
	}
	var b strings.Builder
	fmt.Fprintf(&b, `{"object":"list","has_more":%t,"data":[`, first+pageOf < *many)
	for i := first; i < first+pageOf; i++ {
		if i > first {
			b.WriteByte(',')
		}
		if kind == "service_account" {
			fmt.Fprintf(&b, `{"object":"organization.project.service_account","id":%q,"name":%q,"role":"member","created_at":%d}`, m.id(i), m.name(i), m.created)
		} else {
			fmt.Fprintf(&b, `{"object":"organization.project.api_key","id":"key_%024d","name":"Secret Key","redacted_value":"sk-...abcd","created_at":%d,"expires_at":%d,"last_used_at":null,"owner_project_access":"active","owner":{"type":"service_account","service_account":{"id":%q,"name":%q,"created_at":%d,"role":"member"}}}`,
				i, m.created, m.ends, m.id(i), m.name(i), m.created)
		}
	}
	b.WriteString("]}")
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write([]byte(b.String()))
}

// walStorage is storage whose WAL has many entries of other accounts, which take no
// memory.
type walStorage struct {
	logical.Storage
	m       *multitude
	project string
	reads   atomic.Int64
}

func (s *walStorage) List(ctx context.Context, prefix string) ([]string, error) {
	if prefix != framework.WALPrefix {
		return s.Storage.List(ctx, prefix)
	}
	ids := make([]string, *many/2)
	for i := range ids {
		ids[i] = fmt.Sprintf("00000000-0000-0000-0000-%012d", i)
	}
	return ids, nil
}

func (s *walStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	id, ok := strings.CutPrefix(key, framework.WALPrefix)
	if !ok {
		return s.Storage.Get(ctx, key)
	}
	s.reads.Add(1)
	i, err := strconv.Atoi(id[strings.LastIndex(id, "-")+1:])
	if err != nil {
		return nil, err
	}
	i += *many
	return logical.StorageEntryJSON(key, framework.WALEntry{ID: id, Kind: walRevokedAccount, CreatedAt: s.m.created, Data: credential{
		Version: credentialVersion, Type: typeAccount, ProjectID: s.project, Name: s.m.name(i), ID: s.m.id(i), KeyID: fmt.Sprintf("key_%024d", i),
	}})
}

// most runs work and returns the maximum growth of the heap in bytes.
func most(work func()) int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	before, peak := m.HeapAlloc, m.HeapAlloc
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapAlloc)
			}
		}
	}()
	work()
	close(done)
	<-ended
	return int64(peak) - int64(before) // #nosec G115 -- of a heap
}

func TestTidy_ManyAccounts(t *testing.T) {
	// Not parallel: it measures the heap.
	h := newHarness(t, openaitest.Options{})
	m := &multitude{Server: h.sim, enough: func() { h.b.tidy.stop() }}
	front := httptest.NewServer(m)
	t.Cleanup(front.Close)
	h.configure(map[string]any{"api_endpoint": front.URL + "/v1"})
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	var err error
	m.tag, err = getTag(t.Context(), h.storage)
	require.NoError(t, err)
	m.created = h.now().Add(-time.Hour).Unix()
	storage := &walStorage{Storage: h.storage, m: m, project: h.project}
	pages := *many / pageOf
	limit := 64.0
	if *many < 100_000 {
		limit = 24 // mostly garbage of the responses
	}
	for _, run := range []struct {
		name    string
		ends    time.Duration
		orphans int
	}{
		{"all in use", time.Hour, 0},
		{"all expired", -30 * time.Minute, *many},
	} {
		m.ends = h.now().Add(run.ends).Unix()
		m.accounts.Store(0)
		m.keys.Store(0)
		began := time.Now()
		grown := float64(most(func() {
			tidy, _ := h.b.beginTidy(&logical.Request{Storage: storage, MountPoint: "openai/"}, true, false, false, defaultTidySafetyBuffer)
			tidy()
		})) / (1 << 20)
		status := h.must(h.read("tidy-status")).Data
		t.Logf("%s: %d accounts, %d WAL entries: %.1f MiB more heap at most, %d+%d pages read, %d accounts deleted, %s",
			run.name, *many, *many/2, grown, m.accounts.Load(), m.keys.Load(), m.deletes.Load(), time.Since(began).Round(time.Millisecond))
		require.Empty(t, status["errors"])
		require.Equal(t, *many, status["account_count"])
		require.Equal(t, run.orphans, status["orphan_count"])
		require.EqualValues(t, pages, m.accounts.Load(), "no page is read twice")
		require.EqualValues(t, pages, m.keys.Load(), "no page is read twice")
		require.EqualValues(t, *many/2, storage.reads.Swap(0), "no WAL entry is read twice")
		require.LessOrEqual(t, grown, limit)
	}
}
