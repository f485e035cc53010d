package openaisecrets

// This file owns the snapshot that all requests use: how it is built from the stored
// config, replaced and dropped, the config lock, the mount tag, and the retry of calls
// when a rotation has replaced the admin key.
//
// What must stay true: a snapshot is immutable; snapshotMu guards only the pointer and is
// never held during storage or HTTP calls; readers and revocations never wait for
// configLock; every writer of the config entry holds configLock.

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

// snapshot is the config and client that a request uses from start to end.
type snapshot struct {
	config *config
	api    *client.Client
	tag    string
	// shown belongs to api: both are always copied together.
	shown *shownProjects
}

func newSnapshot(cfg *config, api *client.Client, tag string) *snapshot {
	return &snapshot{config: cfg, api: api, tag: tag, shown: &shownProjects{}}
}

// with returns a snapshot with another config and the same client.
func (s *snapshot) with(cfg *config) *snapshot {
	next := *s
	next.config = cfg
	return &next
}

// errNotConfigured means that there is no config entry.
var errNotConfigured = errors.New("no admin key configured: set admin_api_key in the mount's config")

// tryAgain repeats a failed operation of storage, up to three times within about two
// seconds. It is for operations that have no later retry, as at the end of a mount.
func tryAgain(ctx context.Context, operate func() error) error {
	for attempt := 0; ; attempt++ {
		err := operate()
		if err == nil || errors.Is(err, errNotConfigured) || attempt == 3 || client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
	}
}

// current returns the snapshot, from memory or else from storage. It returns
// errNotConfigured if there is no config.
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
		return nil, fmt.Errorf("invalid stored config: %w", err)
	}
	snap = newSnapshot(cfg, api, tag)

	b.snapshotMu.Lock()
	defer b.snapshotMu.Unlock()
	switch {
	case b.generation != generation: // the config has changed, so this request does not install it
	case b.snapshot == nil:
		b.snapshot = snap
	default: // another request was first; its client has the connections
		snap = b.snapshot
	}
	return snap, nil
}

// install sets the snapshot for all later requests. The caller holds configLock and has
// stored snap.config.
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

// amendConfig stores a config that keeps the active client. The caller holds configLock.
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
		agent += " " + agentOf(useragent.PluginString(env, PluginName), isOpenBao(b.getenv))
	}
	return client.New(client.Options{
		AdminKey:     cfg.AdminKey,
		BaseURL:      cfg.APIEndpoint,
		Organization: cfg.OrganizationID,
		CACert:       []byte(cfg.CACert),
		Timeout:      cfg.RequestTimeout,
		Concurrency:  cfg.MaxConcurrent,
		RateLimiter:  b.rateLimiter,
		Clocks:       &b.clocks,
		Observer:     b.useOf(cfg.AdminKey),
		UserAgent:    agent,
		DialContext:  b.dial,
	})
}

// lockConfig locks configLock; the context bounds the wait.
func (b *backend) lockConfig(ctx context.Context) (unlock func(), err error) {
	select {
	case b.configLock <- struct{}{}:
		return func() { <-b.configLock }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another config change or rotation is in progress: %w", ctx.Err())
	}
}

// mayWriteLocally reports whether this node may write the mount's local storage, which
// has the WAL. A performance secondary may write only that: it processes the WAL entries
// of the credentials that it issued.
func (b *backend) mayWriteLocally() bool {
	state := b.System().ReplicationState()
	return !state.HasState(consts.ReplicationDRSecondary) && !state.HasState(consts.ReplicationPerformanceStandby)
}

// ensureTag returns the mount tag, and creates it before the first config is stored or
// when a config of the community plugin is first used.
func (b *backend) ensureTag(ctx context.Context, s logical.Storage) (string, error) {
	m, err := getMount(ctx, s)
	if !errors.Is(err, errNoTag) {
		if m.Pools {
			b.poolsUsed.Store(true)
		}
		return m.Tag, err
	}
	unlock, err := b.entries.Lock(ctx, mountStorageKey)
	if err != nil {
		return "", fmt.Errorf("waiting for another write of the mount tag: %w", err)
	}
	defer unlock()
	tag, err := getTag(ctx, s)
	if !errors.Is(err, errNoTag) {
		return tag, err
	}
	if err := b.recordCommunityRoles(ctx, s); err != nil {
		return "", err
	}
	if tag, err = naming.Random(naming.TagLength); err != nil {
		return "", err
	}
	// Nothing was issued before the mount had a tag.
	if err := b.raiseLongestLease(ctx, s, 0); err != nil {
		return "", err
	}
	if err := writeEntry(ctx, s, mountStorageKey, "the mount tag", mountEntry{Version: mountVersion, Tag: tag}); err != nil {
		return "", err
	}
	return tag, nil
}

// isSuperseded reports whether another snapshot has become active.
func (b *backend) isSuperseded(snap *snapshot) bool {
	b.snapshotMu.RLock()
	defer b.snapshotMu.RUnlock()
	return b.snapshot != snap
}

// keyIsNew reports whether the admin key was rotated so recently that some of OpenAI's
// servers may not accept it yet.
func (s *snapshot) keyIsNew(now time.Time) bool {
	return s.config.AdminKeyRotated && now.Sub(s.config.LastRotated) < time.Minute
}

// retryWithCurrentKey makes an idempotent call. If OpenAI rejects the admin key and it
// was replaced in the meantime, or is new, the call is repeated with the active one.
func (b *backend) retryWithCurrentKey(ctx context.Context, req *logical.Request, snap **snapshot, call func(*snapshot) error) error {
	for attempt := 0; ; attempt++ {
		err := call(*snap)
		replaced := b.isSuperseded(*snap)
		if !client.IsDenied(err) || attempt+1 >= maxAttempts || (!replaced && !(*snap).keyIsNew(b.now())) {
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

// recordCommunityRoles records, for tidy, the project of each role of the community
// plugin and how long its leases can last.
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
			continue // the role cannot issue credentials
		}
		if err := b.raiseLongestLease(ctx, s, r.MaxTTL); err != nil {
			return err
		}
		if err := b.recordProject(ctx, s, r.ProjectID); err != nil {
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

// shownProjects are the projects that OpenAI has returned for the endpoint, organization
// and admin key of a snapshot.
type shownProjects struct{ ids sync.Map }
