package openaisecrets

// This file owns the snapshot that all requests work with: how it is built from the
// stored config, replaced and dropped, the config's lock, the mount's tag, and calls
// that are repeated when a rotation has replaced the admin key under them.
//
// What must stay true: a snapshot is immutable; snapshotMu guards the pointer only and
// is never held across storage or HTTP; readers and revokers never wait for configLock;
// every writer of the config entry holds configLock.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/useragent"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

// snapshot is what a request works with from start to end. It is immutable.
type snapshot struct {
	config *config
	api    *client.Client
	tag    string
	// shown belongs to api: a snapshot that takes over the one takes the other.
	shown *shownProjects
}

func newSnapshot(cfg *config, api *client.Client, tag string) *snapshot {
	return &snapshot{config: cfg, api: api, tag: tag, shown: &shownProjects{}}
}

// with returns the snapshot with another config for the same client.
func (s *snapshot) with(cfg *config) *snapshot {
	next := *s
	next.config = cfg
	return &next
}

// errNotConfigured says that there is no config entry.
var errNotConfigured = errors.New("the engine has no admin key: write one to the mount's config path (admin_api_key)")

// current returns the snapshot, from memory or else from storage.
// errNotConfigured when there is no config.
func (b *backend) current(ctx context.Context, s logical.Storage) (*snapshot, error) {
	b.snapshotMu.RLock()
	snap, generation := b.snapshot, b.generation
	b.snapshotMu.RUnlock()
	if snap != nil {
		return snap, nil
	}

	cfg, err := getConfig(ctx, s)
	if err != nil {
		return nil, err
	}
	if cfg == nil {
		return nil, errNotConfigured
	}
	tag, err := b.ensureTag(ctx, s)
	if err != nil {
		return nil, err
	}
	api, err := b.newClient(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("the stored config does not give a client: %w", err)
	}
	snap = newSnapshot(cfg, api, tag)

	b.snapshotMu.Lock()
	defer b.snapshotMu.Unlock()
	switch {
	case b.generation != generation: // changed meanwhile: for this request only
	case b.snapshot == nil:
		b.snapshot = snap
	default: // another request was first, and one client has the connections
		snap = b.snapshot
	}
	return snap, nil
}

// install makes snap what all requests from now on work with. The caller
// holds configLock and has written snap.config to storage.
func (b *backend) install(snap *snapshot) {
	b.snapshotMu.Lock()
	old := b.snapshot
	b.snapshot = snap
	b.generation++
	b.snapshotMu.Unlock()
	if old != nil && (snap == nil || old.api != snap.api) {
		old.api.Close()
	}
}

// amendConfig stores a config whose client is the one in force. The caller holds
// configLock.
func (b *backend) amendConfig(ctx context.Context, s logical.Storage, cfg *config) error {
	if err := putConfig(ctx, s, cfg); err != nil {
		b.dropSnapshot()
		return err
	}
	b.snapshotMu.RLock()
	snap := b.snapshot
	b.snapshotMu.RUnlock()
	if snap != nil {
		snap = snap.with(cfg)
	}
	b.install(snap)
	return nil
}

// dropSnapshot makes the next request read the config from storage again.
func (b *backend) dropSnapshot() { b.install(nil) }

// newClient builds the client that cfg describes.
func (b *backend) newClient(ctx context.Context, cfg *config) (*client.Client, error) {
	agent := PluginName + "/" + strings.TrimPrefix(version, "v")
	if env, err := b.System().PluginEnv(ctx); err == nil && env != nil {
		agent += " " + useragent.PluginString(env, PluginName)
	}
	return client.New(client.Options{
		AdminKey:     cfg.AdminKey,
		BaseURL:      cfg.APIEndpoint,
		Organization: cfg.OrganizationID,
		CACert:       []byte(cfg.CACert),
		Timeout:      cfg.RequestTimeout,
		Concurrency:  cfg.MaxConcurrent,
		Pace:         b.pace,
		Observer:     b.useOf(cfg.AdminKey),
		UserAgent:    agent,
		DialContext:  b.dial,
	})
}

// lockConfig takes configLock; the context bounds the wait.
func (b *backend) lockConfig(ctx context.Context) (unlock func(), err error) {
	select {
	case b.configLock <- struct{}{}:
		return func() { <-b.configLock }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another change of the config or a rotation is under way: %w", ctx.Err())
	}
}

// mayWriteLocally reports whether this node may write the mount's local
// storage, where the journal is. A performance secondary may, unlike the rest
// of the mount's storage: it works off what it has issued itself.
func (b *backend) mayWriteLocally() bool {
	state := b.System().ReplicationState()
	return !state.HasState(consts.ReplicationDRSecondary) && !state.HasState(consts.ReplicationPerformanceStandby)
}

// ensureTag returns the mount's tag and makes it if there is none: before the
// first config is stored, or when a config of the community plugin is first used.
func (b *backend) ensureTag(ctx context.Context, s logical.Storage) (string, error) {
	tag, err := getTag(ctx, s)
	if !errors.Is(err, errNoTag) {
		return tag, err
	}
	b.tagLock.Lock()
	defer b.tagLock.Unlock()
	tag, err = getTag(ctx, s)
	if !errors.Is(err, errNoTag) {
		return tag, err
	}
	if err := b.recordCommunityRoles(ctx, s); err != nil {
		return "", err
	}
	if tag, err = naming.Random(naming.TagLength); err != nil {
		return "", err
	}
	// Before there is a tag nothing can have been issued.
	if recorded, err := getLongestLease(ctx, s); err != nil {
		return "", err
	} else if recorded == nil {
		if err := putLongestLease(ctx, s, 0); err != nil {
			return "", err
		}
	}
	entry, err := logical.StorageEntryJSON(mountStorageKey, mountEntry{Version: mountVersion, Tag: tag})
	if err != nil {
		return "", err
	}
	if err := s.Put(ctx, entry); err != nil {
		return "", fmt.Errorf("storing the mount's tag: %w", err)
	}
	return tag, nil
}

// replaced reports whether another snapshot has come into force.
func (b *backend) replaced(snap *snapshot) bool {
	b.snapshotMu.RLock()
	defer b.snapshotMu.RUnlock()
	return b.snapshot != snap
}

// fresh reports whether the admin key came into force so recently that one of
// OpenAI's servers may not know it yet.
func (s *snapshot) fresh(now time.Time) bool {
	return s.config.AdminKeyRotated && now.Sub(s.config.LastRotated) < time.Minute
}

// withCurrent makes a call that may be made again. If the admin key was replaced
// under it, or is so new that one of OpenAI's servers may not know it, the call
// is made again with the one then in force.
func (b *backend) withCurrent(ctx context.Context, req *logical.Request, snap **snapshot, call func(*snapshot) error) error {
	for attempt := 0; ; attempt++ {
		err := call(*snap)
		replaced := b.replaced(*snap)
		if !client.IsDenied(err) || attempt+1 >= maxAttempts || (!replaced && !(*snap).fresh(b.now())) {
			return err
		}
		if !replaced && client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
		current, currentErr := b.current(ctx, req.Storage)
		if currentErr != nil {
			return currentErr
		}
		*snap = current
	}
}

// recordCommunityRoles records what tidy must know of each role of the community
// plugin: its project and how long its leases can last.
func (b *backend) recordCommunityRoles(ctx context.Context, s logical.Storage) error {
	names, err := s.List(ctx, communityRolePrefix)
	if err != nil {
		return fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range names {
		r, err := getCommunityRole(ctx, s, name)
		if err != nil && !errors.As(err, &unreadable{}) {
			return err
		}
		if r == nil || r.ProjectID == "" || text.CheckID("project_id", r.ProjectID) != "" {
			continue // nothing can be made with it
		}
		if err := b.raiseLongestLease(ctx, s, r.MaxTTL); err != nil {
			return err
		}
		if err := recordProject(ctx, s, r.ProjectID); err != nil {
			return err
		}
	}
	return nil
}

// getConfig returns the stored config, nil when there is none.
func getConfig(ctx context.Context, s logical.Storage) (*config, error) {
	cfg, entry, err := readConfig(ctx, s)
	if cfg == nil || err != nil {
		return nil, err
	}
	return takeOver(entry, cfg)
}

// shownProjects are the projects that OpenAI has shown to an admin key. They are
// kept with the snapshot whose endpoint, organization and key they belong to.
type shownProjects struct{ ids sync.Map }
