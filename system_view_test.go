package openaisecrets

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

func TestSystemView_IsAskedOnceForMany(t *testing.T) {
	t.Parallel()
	v := &countedView{}
	v.ttl.Store(int64(time.Hour))
	calm := &calmView{SystemView: v}
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
	require.LessOrEqual(t, v.asked.Load(), 2+2*int64(time.Since(began)/viewAge))

	v.ttl.Store(int64(2 * time.Hour))
	changed := time.Now()
	for calm.MaxLeaseTTL() != 2*time.Hour {
		require.Less(t, time.Since(changed), viewAge+10*time.Second, "a tune is never seen")
	}
	time.Sleep(viewAge)
	v.ttl.Store(int64(3 * time.Hour))
	time.Sleep(viewAge)
	require.Equal(t, 3*time.Hour, calm.MaxLeaseTTL(), "no answer is older than viewAge")
}
