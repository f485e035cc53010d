package devenv

// A cluster of servers with raft storage, as in production.

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/vault/api"
)

// Cluster is a number of Vault nodes on loopback, of which one is active.
type Cluster struct {
	Nodes []*Vault
}

// StartCluster starts n nodes. The caller must Stop the cluster.
func StartCluster(ctx context.Context, n int, opts Options) (_ *Cluster, err error) {
	// Vault's default: with a lower value, nodes on a busy machine lose contact. A
	// single node does not need it.
	opts.raftPace = 5
	first, err := Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Nodes: []*Vault{first}}
	defer func() {
		if err != nil {
			_ = c.Stop()
		}
	}()
	first.clustered = true
	for i := 2; i <= n; i++ {
		node, err := start(ctx, opts, fmt.Sprintf("node%d", i), func(v *Vault, ctx context.Context) error { return v.join(ctx, first) })
		if err != nil {
			return nil, err
		}
		node.AuditPath = first.AuditPath // all nodes share one audit device, and write to this file
		c.Nodes = append(c.Nodes, node)
	}
	return c, c.WaitHealthy(ctx)
}

// WaitHealthy waits until all nodes are healthy voters, so that one can fail.
func (c *Cluster) WaitHealthy(ctx context.Context) error {
	leader, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	return poll(ctx, startTimeout, "all nodes to become voters", func() error {
		state, err := leader.Client().Sys().RaftAutopilotStateWithContext(ctx)
		if err == nil && (state == nil || len(state.Voters) < len(c.Nodes) || !state.Healthy) {
			err = fmt.Errorf("not all %d nodes are healthy voters: %+v", len(c.Nodes), state)
		}
		return err
	})
}

// join makes the server a node of another one's cluster and unseals it.
func (v *Vault) join(ctx context.Context, first *Vault) error {
	v.RootToken, v.unsealKey, v.clustered = first.RootToken, first.unsealKey, true
	answer, err := v.Client().Sys().RaftJoinWithContext(ctx, &api.RaftJoinRequest{LeaderAPIAddr: first.Addr})
	if err == nil && !answer.Joined {
		err = errors.New("the response has joined=false")
	}
	if err != nil {
		return fmt.Errorf("joining the cluster: %w", err)
	}
	return v.unseal(ctx)
}

// Leader returns the active node, waiting for one to be elected.
func (c *Cluster) Leader(ctx context.Context) (leader *Vault, err error) {
	err = poll(ctx, startTimeout, "a leader", func() error {
		for _, node := range c.Nodes {
			if !node.process.running() {
				continue
			}
			health, err := node.Client().Sys().HealthWithContext(ctx)
			if err == nil && health.Initialized && !health.Sealed && !health.Standby {
				leader = node
				return nil
			}
		}
		return errors.New("no node is active")
	})
	return leader, err
}

// WaitMounted waits until each node answers a read of a path in a mount. OpenBao's
// standbys serve reads themselves, and receive a new mount after a delay.
func (c *Cluster) WaitMounted(ctx context.Context, path string) error {
	for _, node := range c.Nodes {
		if err := poll(ctx, startTimeout, "the mount on "+node.Addr, func() error {
			secret, err := node.Client().Logical().ReadWithContext(ctx, path)
			if err == nil && secret == nil {
				err = errors.New("the read returned nothing")
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// Register copies a plugin to every node and registers it in the catalog.
func (c *Cluster) Register(ctx context.Context, p Plugin) error {
	for _, node := range c.Nodes {
		if err := node.install(p); err != nil {
			return err
		}
	}
	leader, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	return leader.Register(ctx, p)
}

// Stop ends all nodes and removes their files. The first node stops last: its
// folder has the audit log, without which the others serve no requests.
func (c *Cluster) Stop() error {
	var errs []error
	for i := len(c.Nodes) - 1; i >= 0; i-- {
		errs = append(errs, c.Nodes[i].Stop())
	}
	return errors.Join(errs...)
}
