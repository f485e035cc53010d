// Package openaisecrets is a HashiCorp Vault secrets engine that leases OpenAI
// API keys: a read of creds/<role> makes a project service account, and the
// end of the lease deletes it.
package openaisecrets

// This file owns the backend: how it is put together, the snapshot that all
// requests work with, and what runs once a minute.
//
// What must stay true:
//   - snapshotMu guards the snapshot pointer only and is never held across
//     storage or HTTP; readers and revokers never wait for configLock;
//   - every writer of the config entry holds configLock;
//   - nothing is written to storage before the first request (Vault refuses
//     writes during setup).

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-secure-stdlib/base62"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/useragent"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const backendHelp = `
The OpenAI secrets engine leases OpenAI API keys. Each read of creds/<role>
makes a service account of its own in the role's project and returns its key;
when the lease ends the account is deleted, and should Vault be gone by then
the key expires at OpenAI by itself.

Start with an admin key of the organization, which an organization owner makes
with the permission "Organization Administration: Write" at
` + adminKeysPage + `:

    $ vault write openai/config admin_api_key=@admin-key.txt
    $ vault write -f openai/config/rotate
    $ vault list -detailed openai/projects
    $ vault write openai/roles/my-app project_id=proj_... ttl=1h \
        scopes=api.model.read,api.model.request,api.responses.write
    $ vault read openai/creds/my-app

The second command replaces the key that you pasted: afterwards nobody but the
engine knows the admin key. scopes say what a role's keys may do, and OpenAI
enforces them; without any they may do all that their account may.

For a consumer that cannot renew a lease, a static role keeps one account whose
key is replaced on a schedule:

    $ vault write openai/static-roles/batch project_id=proj_... rotation_period=24h
    $ vault read openai/static-creds/batch

What a crash has left at OpenAI, "vault write openai/tidy" finds; the engine
sweeps it up by itself, too. "vault path-help openai/<path>" explains each path.
`

const (
	mountStorageKey = "mount"
	mountVersion    = 1
	tagLength       = 5

	// requestBudget bounds an issue or a rotation in all. Vault puts no
	// deadline on a plugin's request, and its clients give up after 60 s.
	requestBudget = 60 * time.Second
	// cleanupBudget bounds the destroying of what a failed request made.
	cleanupBudget = 30 * time.Second
	// revokeBudget bounds one revoke: Vault allows 90 s per try, and none at
	// all when a mount is disabled.
	revokeBudget = 80 * time.Second
	// drainBudget bounds the last work on the journal when the mount is being
	// disabled; Vault allows 90 s.
	drainBudget = 80 * time.Second
)

// errNotConfigured says that there is no config entry.
var errNotConfigured = errors.New("the engine has no admin key: write one to the mount's config path (admin_api_key)")

// Factory builds the backend for one mount. Vault calls it for registration,
// too, with neither storage nor a system view that answers.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	return World{}.Factory(ctx, conf)
}

// World is what test/simulation replaces around a backend. The zero value is the
// real world; no setting and no environment variable reaches it.
type World struct {
	Now  func() time.Time
	Dial func(ctx context.Context, network, addr string) (net.Conn, error) // to OpenAI
}

// Factory is the package's, in this world.
func (w World) Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend() //nolint:contextcheck // what it starts outlives this call
	b.dial = w.Dial
	if w.Now != nil {
		b.now = w.Now
	}
	if err := b.Setup(ctx, conf); err != nil {
		return nil, err
	}
	if err := b.metrics.configure(os.Getenv); err != nil {
		b.Logger().Warn("metrics are not sent as the environment asks for", "error", err)
	}
	return b, nil
}

type backend struct {
	*framework.Backend

	snapshotMu sync.RWMutex
	snapshot   *snapshot
	// generation counts invalidations, so that a snapshot read from storage
	// before one is not installed after it.
	generation uint64

	// tagLock is held while the mount's tag is made, once in a mount's life.
	tagLock sync.Mutex

	// configLock is a mutex of one slot whose wait honours a context.
	configLock chan struct{}

	unmount
	// drainEnds is drainEnd's, nil before the first disabling.
	drainEnds atomic.Pointer[time.Time]

	roles *roleCache
	// pace is what is known of OpenAI's rate limits.
	pace *client.Pace
	work *background
	// rotation is what this process knows of the schedule beyond the config.
	rotation *rotationState
	// uses is when this process last used its admin keys, and ending has the IDs of
	// superseded ones that are being deleted.
	uses     keyUses
	ending   sync.Map
	unseen   unseen
	static   *staticState
	renewals renewals
	// deleted has the IDs of what OpenAI has told this process that it deleted.
	deleted *lru.Cache[string, struct{}]
	tidy    tidyState
	metrics *meters
	notices *notices

	// storage is the mount's, for what Vault asks for without a request.
	storage logical.Storage

	now  func() time.Time
	dial func(ctx context.Context, network, addr string) (net.Conn, error) // nil = the client's
	// settling is notFinalBefore, but for tests.
	settling atomic.Int64
}

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

func newBackend() *backend {
	b := &backend{configLock: make(chan struct{}, 1), roles: newRoleCache(), pace: client.NewPace(), work: newBackground(), rotation: newRotationState(), static: newStaticState(), renewals: newRenewals(), deleted: newDeleted(), unmount: unmount{getenv: os.Getenv}, metrics: newMeters(), notices: newNotices(), now: time.Now}
	b.settling.Store(int64(notFinalBefore))
	b.notices.start = sync.OnceFunc(func() { go b.tell() })
	b.Backend = &framework.Backend{
		Help:           strings.TrimSpace(backendHelp),
		BackendType:    logical.TypeLogical,
		RunningVersion: version,
		PathsSpecial: &logical.Paths{
			SealWrapStorage: []string{configStorageKey, staticStoragePrefix},
			// The journal describes what this cluster made; a performance
			// secondary must be able to write its own.
			LocalStorage: []string{framework.WALPrefix},
		},
		Paths: []*framework.Path{
			b.pathConfig(),
			b.pathRotate("config/rotate"),
			b.pathRotate("rotate-root"),
			b.pathRole(),
			b.pathRoles(),
			b.pathCreds(),
			b.pathStaticRole(),
			b.pathStaticRoles(),
			b.pathStaticCreds(),
			b.pathRotateRole(),
			b.pathProjects(),
			b.pathTidy(),
			b.pathTidyStatus(),
			b.pathTidyCancel(),
			b.pathMetrics(),
		},
		Secrets:          []*framework.Secret{b.secretCreds()},
		Invalidate:       b.invalidate,
		PeriodicFunc:     b.periodic,
		RotateCredential: b.rotateCredential,
		Clean: func(ctx context.Context) {
			b.work.close()
			b.endStaticRoles(ctx)
			b.dropSnapshot()
			b.metrics.push.close()
		},
	}
	return b
}

// Setup is framework.Backend's, which forgets the storage.
func (b *backend) Setup(ctx context.Context, conf *logical.BackendConfig) error {
	b.storage = conf.StorageView
	calm := *conf
	if conf.System != nil {
		calm.System = &calmView{SystemView: conf.System}
	}
	return b.Backend.Setup(ctx, &calm)
}

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

// dropSnapshot makes the next request read the config from storage again.
func (b *backend) dropSnapshot() { b.install(nil) }

// invalidate is called by Vault where storage changed under this node.
func (b *backend) invalidate(_ context.Context, key string) {
	if key == configStorageKey || key == mountStorageKey {
		b.dropSnapshot()
	}
	if strings.HasPrefix(key, staticStoragePrefix) {
		b.static.forget()
	}
	for _, prefix := range []string{roleStoragePrefix, communityRolePrefix} {
		if name, ok := strings.CutPrefix(key, prefix); ok {
			b.roles.forget(name)
		}
	}
}

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

// periodic is called once a minute. Vault holds its state lock meanwhile, so
// the work itself is the worker's, except when the mount is being disabled:
// then there is no later.
func (b *backend) periodic(ctx context.Context, req *logical.Request) error {
	if !b.mayWriteLocally() {
		return nil
	}
	b.pushGauges(ctx, req)
	tainted := b.System().Tainted()
	b.draining.Store(tainted)
	b.taint.look(tainted)
	if tainted {
		ctx, cancel := context.WithTimeout(ctx, drainBudget)
		defer cancel()
		if err := b.stopSchedule(ctx); err != nil {
			return err
		}
		if err := b.stopStatic(ctx); err != nil {
			return err
		}
		return b.drain(ctx, req)
	}
	if b.WriteSafeReplicationState() {
		b.kickSchedule(req) //nolint:contextcheck // it outlives this request
		b.kickStatic(req)   //nolint:contextcheck // likewise
	}
	b.kick(req) //nolint:contextcheck // the worker outlives the tick that starts it
	return nil
}

// mayWriteLocally reports whether this node may write the mount's local
// storage, where the journal is. A performance secondary may, unlike the rest
// of the mount's storage: it works off what it has issued itself.
func (b *backend) mayWriteLocally() bool {
	state := b.System().ReplicationState()
	return !state.HasState(consts.ReplicationDRSecondary) && !state.HasState(consts.ReplicationPerformanceStandby)
}

// isDraining reports whether the mount is being disabled. Vault taints a mount
// that moves, too, and unlike a disabled one it comes back at once.
func (b *backend) isDraining() bool {
	if !b.draining.Load() {
		return false
	}
	tainted := b.System().Tainted()
	b.draining.Store(tainted)
	return tainted
}

// mountEntry is what a mount knows of itself, made once.
type mountEntry struct {
	Version int `json:"version"`
	// Tag starts the random suffix of every name that this mount gives, so
	// that each name says which mount made it.
	Tag string `json:"tag"`
}

// getTag reads the mount's tag; it is errNoTag when there is none.
func getTag(ctx context.Context, s logical.Storage) (string, error) {
	entry, err := s.Get(ctx, mountStorageKey)
	if err != nil {
		return "", fmt.Errorf("reading the mount's tag: %w", err)
	}
	var m mountEntry
	if entry == nil {
		return "", errNoTag
	}
	if err := entry.DecodeJSON(&m); err != nil {
		return "", fmt.Errorf("decoding the mount's tag: %w", err)
	}
	if m.Version > mountVersion {
		return "", fmt.Errorf("the mount's tag was written by a newer version of this plugin (format %d, this one knows %d)", m.Version, mountVersion)
	}
	return m.Tag, nil
}

var errNoTag = errors.New("the mount has no tag: write its config again")

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
	if tag, err = randomText(tagLength); err != nil {
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

// randomText returns n random lower-case letters and digits, about five bits
// each.
func randomText(n int) (string, error) {
	text, err := base62.Random(n)
	return strings.ToLower(text), err
}
