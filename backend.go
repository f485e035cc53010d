// Package openaisecrets is a HashiCorp Vault secrets engine that leases OpenAI
// API keys: a read of creds/<role> makes a project service account, and the
// end of the lease deletes it.
//
// An entity is a noun and has a file of that name: its entry, storage and rules. A
// surface is path_<noun>.go. Work is a verb or a worker, in a file of its own. What
// knows no backend is in internal/, and the Admin API in client/.
//
// No two files use each other, apart from this one, which wires them together. From
// the files that use others to those that are used:
//
//   - the paths: path_metrics, path_config, path_rotate, path_static_creds,
//     path_static_roles, path_tidy, path_creds, path_roles, path_projects, and
//     secret_creds, what Vault does to a lease;
//   - work that nobody asks for: drain, worker, rotation_manager, static_worker,
//     tidy with tidy_absence and tidy_state, wal;
//   - verbs: rotation and superseded (the admin key), static_rotate;
//   - entities: static_queue, static_role, community_lease, credential, wal_index,
//     unmount, proof, snapshot, key_use, project, mount, role_cache, community,
//     role, rotation_state, config, schedule;
//   - what all use: metrics, events, write, request, limits, version.
//
// tools/layout holds this order; its order.txt has it in full.
package openaisecrets

// This file owns the backend: how it is put together, the way of each request into it,
// and what runs once a minute.
//
// What must stay true: nothing is written to storage before the first request (Vault
// refuses writes during setup).

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/sysview"
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
	// longestLock is held while the longest lease is raised: roles are written in
	// parallel.
	longestLock sync.Mutex

	// lifetime ends with the backend, by end.
	lifetime context.Context
	end      context.CancelFunc

	// configLock is a mutex of one slot whose wait honours a context.
	configLock chan struct{}

	unmount
	// drainEnds is drainEnd's, nil before the first disabling.
	drainEnds atomic.Pointer[time.Time]

	roles *roleCache
	// pace is what is known of OpenAI's rate limits.
	pace *client.Pace
	work *background
	wal  *walIndex
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

func newBackend() *backend {
	b := &backend{configLock: make(chan struct{}, 1), roles: newRoleCache(), pace: client.NewPace(), work: newBackground(), wal: newWALIndex(), rotation: newRotationState(), static: newStaticState(), renewals: newRenewals(), deleted: newDeleted(), unmount: unmount{getenv: os.Getenv}, metrics: newMeters(tidyFinished, tidyError, tidyCancelled), notices: newNotices(), now: time.Now}
	b.lifetime, b.end = context.WithCancel(context.Background())
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
			b.end()
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
		calm.System = &sysview.CachedView{SystemView: conf.System}
	}
	return b.Backend.Setup(ctx, &calm)
}

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
		if err := b.rotation.look.End(ctx); err != nil {
			return err
		}
		if err := b.static.pass.End(ctx); err != nil {
			return err
		}
		return b.drain(ctx, req)
	}
	if b.WriteSafeReplicationState() {
		b.kickSchedule(req)
		b.kickStatic(req)
	}
	b.kick(req) //nolint:contextcheck // the worker outlives the tick that starts it
	return nil
}

// HandleExistenceCheck is framework.Backend's for the path alone: whether
// something exists does not depend on the data, and what is wrong with that is
// for HandleRequest to say. Here it would be an internal error that quotes it.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (bool, bool, error) {
	if !storable(req.Path) {
		return false, false, nil
	}
	bare := *req // the request itself comes again
	bare.Data = nil
	checked, exists, err := b.Backend.HandleExistenceCheck(ctx, &bare)
	if err != nil && client.HoldsKey(err.Error()) {
		err = errors.New("checking whether the entry exists has failed")
	}
	return checked, exists, err
}

// HandleRequest is framework.Backend's, on data of which each value has its
// field's type and one spelling.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	if problem, err := b.checkKeys(ctx, req); problem != "" || err != nil {
		if err != nil {
			return nil, err
		}
		return logical.ErrorResponse("%s", problem), nil
	}
	ignored, problem := b.normalize(req)
	if problem != "" {
		return logical.ErrorResponse("%s", problem), nil
	}
	b.metrics.push.seen(req)
	done := b.watch(ctx, req)
	resp, err := b.Backend.HandleRequest(ctx, req)
	done(resp, err)
	if err != nil && client.HoldsKey(req.Path) { // of what was stored before the rule
		err = errors.New(client.HideKeys(err.Error()))
	}
	if req.Operation == logical.HelpOperation && resp != nil {
		keepReferences(resp)
	}
	if len(ignored) > 0 && err == nil && !resp.IsError() {
		if resp == nil {
			resp = &logical.Response{}
		}
		resp.AddWarning("Ignored fields that only a read shows: " + strings.Join(ignored, ", "))
	}
	return resp, err
}

// checkKeys says which part of a request holds a key that does not belong there,
// "" for none, without quoting it.
func (b *backend) checkKeys(ctx context.Context, req *logical.Request) (problem string, err error) {
	switch req.Operation { //nolint:exhaustive // the others send text
	case logical.RevokeOperation, logical.RenewOperation, logical.RollbackOperation:
		return "", nil // what they send is the engine's own
	}
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		if problem := misplacedKey(name, req.Data[name]); problem != "" {
			return problem, nil
		}
	}
	if !client.HoldsKey(req.Path) {
		return "", nil
	}
	// What was stored before the rule is read and deleted, and nothing else.
	where, name, _ := strings.Cut(req.Path, "/")
	for _, prefix := range entriesAt[where] {
		entry, err := req.Storage.Get(ctx, prefix+name)
		if err != nil {
			return "", errors.New("reading the role that the path names has failed")
		}
		switch {
		case entry == nil:
		case strings.HasSuffix(where, "roles") && (req.Operation == logical.ReadOperation || req.Operation == logical.DeleteOperation):
			return "", nil
		default:
			return "the name of this role has the form of an API key, so it can only be listed, read and deleted; write the role under another name", nil
		}
	}
	return "the path contains an API key; revoke that key, because Vault's audit log has paths in clear text", nil
}

// entriesAt are the storage prefixes of what the paths with a name use.
var entriesAt = map[string][]string{
	"roles":        {roleStoragePrefix, communityRolePrefix},
	"creds":        {roleStoragePrefix, communityRolePrefix},
	"static-roles": {staticStoragePrefix},
	"static-creds": {staticStoragePrefix},
	"rotate-role":  {staticStoragePrefix},
}

// misplacedKey says that a field, given or unknown, holds a key and may not, ""
// when all is well. Only admin_api_key may, and only as one string.
func misplacedKey(name string, value any) (problem string) {
	text, isText := value.(string)
	if !isText {
		text = fmt.Sprint(value) // lists and objects at any depth
	}
	switch {
	case client.HoldsKey(name):
		return "the name of a field contains an API key; nothing was stored, revoke that key"
	case name == "admin_api_key" && !isText && value != nil:
		return name + " must be one string"
	case name != "admin_api_key" && client.HoldsKey(text):
		return fmt.Sprintf("%.64q contains an API key; nothing was stored. Only admin_api_key of the config takes one, and a key that was sent in another field should be revoked", name)
	}
	return ""
}
