package sysview

// The cache of the values that every request reads from Vault.

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

// countedView counts the reads and returns a settable value.
type countedView struct {
	logical.StaticSystemView
	asked atomic.Int64
	ttl   atomic.Int64
}

func (v *countedView) MaxLeaseTTL() time.Duration {
	v.asked.Add(1)
	return time.Duration(v.ttl.Load())
}

func (v *countedView) ReplicationState() consts.ReplicationState {
	v.asked.Add(1)
	return consts.ReplicationPerformancePrimary
}

// slowView can block one read.
type slowView struct {
	countedView
	next atomic.Pointer[pause]
}

func (v *slowView) MaxLeaseTTL() time.Duration {
	if h := v.next.Swap(nil); h != nil {
		h.wait()
	}
	return v.countedView.MaxLeaseTTL()
}

func TestCachedView_ServesTheCurrentValueDuringARefresh(t *testing.T) {
	t.Parallel()
	for attempt := 0; ; attempt++ {
		require.Less(t, attempt, 10, "this machine is too slow for %s", staleAfter)
		v := &slowView{}
		cached := &CachedView{SystemView: v}
		cached.MaxLeaseTTL()
		time.Sleep(FreshFor)
		held := newPause()
		v.next.Store(held)
		var asking sync.WaitGroup
		asking.Go(func() { cached.MaxLeaseTTL() })
		<-held.entered
		served := make(chan struct{})
		go func() {
			cached.MaxLeaseTTL()
			close(served)
		}()
		inTime := false
		select {
		case <-served:
			inTime = true
		case <-time.After(staleAfter):
		}
		close(held.release)
		asking.Wait()
		<-served
		if inTime {
			return
		}
	}
}

func TestCachedView_WaitsForARefreshOfAStaleValue(t *testing.T) {
	t.Parallel()
	v := &slowView{}
	cached := &CachedView{SystemView: v}
	cached.MaxLeaseTTL()
	time.Sleep(staleAfter)
	v.ttl.Store(int64(time.Hour))
	held := newPause()
	v.next.Store(held)
	var asking sync.WaitGroup
	asking.Go(func() { cached.MaxLeaseTTL() })
	<-held.entered
	time.AfterFunc(50*time.Millisecond, func() { close(held.release) })
	require.Equal(t, time.Hour, cached.MaxLeaseTTL(), "a read during the refresh returned a stale value")
	asking.Wait()
}

func TestCachedView_ReadsOnceForConcurrentCallers(t *testing.T) {
	t.Parallel()
	v := &countedView{}
	v.ttl.Store(int64(time.Hour))
	cached := &CachedView{SystemView: v}
	began := time.Now()
	var many sync.WaitGroup
	for range 16 {
		many.Go(func() {
			for range 1000 {
				if cached.MaxLeaseTTL() != time.Hour || cached.ReplicationState() != consts.ReplicationPerformancePrimary {
					t.Error("wrong value")
				}
			}
		})
	}
	many.Wait()
	require.LessOrEqual(t, v.asked.Load(), 2*(2+int64(time.Since(began)/FreshFor)))

	v.ttl.Store(int64(2 * time.Hour))
	changed := time.Now()
	for cached.MaxLeaseTTL() != 2*time.Hour {
		require.Less(t, time.Since(changed), FreshFor+10*time.Second, "the new value is never read")
	}
	time.Sleep(FreshFor)
	v.ttl.Store(int64(3 * time.Hour))
	time.Sleep(FreshFor)
	require.Equal(t, 3*time.Hour, cached.MaxLeaseTTL(), "a value older than FreshFor was not refreshed")
}

// pause blocks one caller until it is released.
type pause struct{ entered, release chan struct{} }

func newPause() *pause { return &pause{make(chan struct{}), make(chan struct{})} }

func (p *pause) wait() {
	close(p.entered)
	<-p.release
}
