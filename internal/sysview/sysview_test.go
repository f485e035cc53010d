package sysview

// What is asked of Vault for every request, and how seldom.

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

// countedView counts the questions, and answers with what it is set to.
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

// slowView holds up an answer when told to.
type slowView struct {
	countedView
	next atomic.Pointer[pause]
}

func (v *slowView) MaxLeaseTTL() time.Duration {
	if h := v.next.Swap(nil); h != nil {
		h.up()
	}
	return v.countedView.MaxLeaseTTL()
}

func TestSystemView_NobodyWaitsForAnAnswerThatIsAskedForInTime(t *testing.T) {
	t.Parallel()
	for attempt := 0; ; attempt++ {
		require.Less(t, attempt, 10, "this machine never comes back within %s", staleAfter)
		v := &slowView{}
		calm := &CachedView{SystemView: v}
		calm.MaxLeaseTTL()
		time.Sleep(FreshFor)
		held := newPause()
		v.next.Store(held)
		var asking sync.WaitGroup
		asking.Go(func() { calm.MaxLeaseTTL() })
		<-held.entered
		served := make(chan struct{})
		go func() {
			calm.MaxLeaseTTL()
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

func TestSystemView_NoAnswerIsOlderThanItsLimit(t *testing.T) {
	t.Parallel()
	v := &slowView{}
	calm := &CachedView{SystemView: v}
	calm.MaxLeaseTTL()
	time.Sleep(staleAfter)
	v.ttl.Store(int64(time.Hour))
	held := newPause()
	v.next.Store(held)
	var asking sync.WaitGroup
	asking.Go(func() { calm.MaxLeaseTTL() })
	<-held.entered
	time.AfterFunc(50*time.Millisecond, func() { close(held.release) })
	require.Equal(t, time.Hour, calm.MaxLeaseTTL(), "who comes while it is asked for waits")
	asking.Wait()
}

func TestSystemView_IsAskedOnceForMany(t *testing.T) {
	t.Parallel()
	v := &countedView{}
	v.ttl.Store(int64(time.Hour))
	calm := &CachedView{SystemView: v}
	began := time.Now()
	var many sync.WaitGroup
	for range 16 {
		many.Go(func() {
			for range 1000 {
				if calm.MaxLeaseTTL() != time.Hour || calm.ReplicationState() != consts.ReplicationPerformancePrimary {
					t.Error("a wrong answer")
				}
			}
		})
	}
	many.Wait()
	require.LessOrEqual(t, v.asked.Load(), 2*(2+int64(time.Since(began)/FreshFor)))

	v.ttl.Store(int64(2 * time.Hour))
	changed := time.Now()
	for calm.MaxLeaseTTL() != 2*time.Hour {
		require.Less(t, time.Since(changed), FreshFor+10*time.Second, "a tune is never seen")
	}
	time.Sleep(FreshFor)
	v.ttl.Store(int64(3 * time.Hour))
	time.Sleep(FreshFor)
	require.Equal(t, 3*time.Hour, calm.MaxLeaseTTL(), "an answer older than viewAge is asked for anew")
}

// pause is where somebody is held up, once.
type pause struct{ entered, release chan struct{} }

func newPause() *pause { return &pause{make(chan struct{}), make(chan struct{})} }

func (p *pause) up() {
	close(p.entered)
	<-p.release
}
