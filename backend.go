// Package openaisecrets is a HashiCorp Vault secrets engine that leases OpenAI
// API keys: a read of creds/<role> creates a project service account, and the
// revocation of the lease deletes it.
//
// An entity (its entry and rules) is in the file of its name, an API path in
// path_<noun>.go, and each operation or worker in its own file. Code that does not
// depend on the backend is in internal/, and the Admin API client in client/.
//
// No two files use each other, except that this one wires them together. From the files
// that use others to those that are used:
//
//   - paths: path_metrics, path_config, path_rotate, path_static_creds,
//     path_static_roles, path_tidy, path_creds, path_roles, path_projects,
//     path_usage, secret_creds;
//   - background work: drain, worker, spend_check, pool_worker, rotation_manager, static_worker,
//     static_check, tidy, tidy_absence, tidy_state, wal, usage_refresh;
//   - verbs: rotation, superseded, static_rotate;
//   - entities: usage_report, usage_record, usage_costs, static_queue, static_role,
//     static_missing, community_lease, pool,
//     role_state, credential, wal_index, proof, unmount, guardrails, snapshot, key_use, project, mount,
//     role_cache, community, role_pool, role, role_spend, rotation_state, config;
//   - used by all: write, request, entry, limits, product, version.
//
// tools/layout checks this order, and that this list and its order.txt agree.
package openaisecrets

// This file owns the backend: its assembly, the entry point of each request, and the
// periodic function.
//
// What must stay true: nothing is written to storage before the first request, because
// Vault rejects writes during setup.

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
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/job"
	"vault-plugin-secrets-openai/internal/metrics"
	"vault-plugin-secrets-openai/internal/sysview"
)

const backendHelp = `
The OpenAI secrets engine leases OpenAI API keys. Each read of creds/<role>
creates a service account in the role's project and returns its key. The engine
deletes the account when the lease expires or is revoked. If Vault is
unavailable then, the key still expires at OpenAI.

To get started, have an organization owner create an admin key with the
permission "Organization Administration: Write" at
` + adminKeysPage + `:

    $ vault write openai/config admin_api_key=@admin-key.txt
    $ vault write -f openai/config/rotate
    $ vault list -detailed openai/projects
    $ vault write openai/roles/my-app project_id=proj_... ttl=1h \
        scopes=api.model.read,api.model.request,api.responses.write
    $ vault read openai/creds/my-app

The second command replaces the key that you pasted; after it, only Vault knows
the admin key. The scopes limit what the keys of a role can do, and OpenAI
enforces them. A key without scopes can do everything that its account can do.

For a consumer that cannot renew leases, a static role manages one account and
rotates its key on a schedule:

    $ vault write openai/static-roles/batch project_id=proj_... rotation_period=24h
    $ vault read openai/static-creds/batch

"vault write openai/tidy" finds accounts and keys that a crash left at OpenAI;
the engine also runs tidy every tidy_interval. For help with a path, run
"vault path-help openai/<path>".
`

// Factory builds the backend for one mount. Vault also calls it during registration,
// without storage and with a system view that does not answer.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	return World{}.Factory(ctx, conf)
}

// World holds the dependencies that test/simulation replaces. The zero value selects
// the real ones; no setting and no environment variable changes it.
type World struct {
	Now  func() time.Time
	Dial func(ctx context.Context, network, addr string) (net.Conn, error) // to OpenAI
	// Getenv reads the environment of the server, which tells its product.
	Getenv func(string) string
}

// Factory is like the package's Factory, with the dependencies of w.
func (w World) Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend()
	b.dial = w.Dial
	if w.Now != nil {
		b.now = w.Now
	}
	if w.Getenv != nil {
		b.getenv = w.Getenv
	}
	if err := b.Setup(ctx, conf); err != nil {
		return nil, err
	}
	if err := b.metrics.Configure(os.Getenv); err != nil {
		b.Logger().Warn("metrics environment variables are invalid; the invalid ones are ignored", "error", err)
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

	// entries has a lock for each storage entry that requests and jobs change without
	// another lock: the mount tag, the longest lease, and the records of projects.
	entries *job.NameLocks

	// cancel ends lifetime.
	lifetime context.Context
	cancel   context.CancelFunc

	// configLock is a mutex, as a channel so that waiting honors a context.
	configLock chan struct{}

	*unmount

	roles       *roleCache
	rateLimiter *client.RateLimiter
	clocks      client.Clocks
	work        *background
	pools       *pools
	guards      *guards
	states      *roleStates
	doomed      doomedKeys
	// poolsUsed is set if a role of the mount has or has had a pool.
	poolsUsed atomic.Bool
	wal       *walIndex
	rotation  *rotationState
	// uses has the time at which this process last used each of its admin keys, and
	// deleting the IDs of superseded ones whose deletion is in progress.
	uses     keyUses
	deleting sync.Map
	unseen   unseen
	static   *staticState
	checks   staticChecks
	renewals renewals
	// deleted has the IDs whose deletion OpenAI confirmed to this process.
	deleted *lru.Cache[string, struct{}]
	tidy    tidyState
	usage   *usageRecords
	reports *usageReports
	// spending has the costs that the metrics show.
	spending *usageRefresh
	metrics  *metrics.Meters
	events   *events.Queue

	// storage serves Vault's calls that carry no request.
	storage logical.Storage

	now func() time.Time
	// getenv is os.Getenv, except in tests.
	getenv func(string) string
	dial   func(ctx context.Context, network, addr string) (net.Conn, error) // nil selects the client's
	// settling is notFinalBefore, which tests shorten.
	settling atomic.Int64
}

func newBackend() *backend {
	b := &backend{configLock: make(chan struct{}, 1), entries: job.NewNameLocks(), roles: newRoleCache(), rateLimiter: client.NewRateLimiter(), work: newBackground(), pools: newPools(), guards: newGuards(), states: newRoleStates(), wal: newWALIndex(), rotation: newRotationState(), static: newStaticState(), renewals: newRenewals(), deleted: newDeleted(), usage: newUsageRecords(), reports: newUsageReports(), spending: &usageRefresh{}, metrics: metrics.New(tidyFinished, tidyError, tidyCancelled), now: time.Now, getenv: os.Getenv}
	b.unmount = newUnmount(func() bool { return b.System().Tainted() }, func() time.Time { return b.now() }, func() bool { return isOpenBao(b.getenv) })
	b.lifetime, b.cancel = context.WithCancel(context.Background())
	b.settling.Store(int64(notFinalBefore))
	b.events = events.New(b.lifetime, b)
	b.Backend = &framework.Backend{
		Help:           strings.TrimSpace(backendHelp),
		BackendType:    logical.TypeLogical,
		RunningVersion: version,
		PathsSpecial: &logical.Paths{
			SealWrapStorage: []string{configStorageKey, staticStoragePrefix},
			// The WAL and the usage records are of what this cluster created, and
			// verdicts and states of roles follow what OpenAI told it; a performance secondary must be able to write its own.
			LocalStorage: []string{framework.WALPrefix, usageStoragePrefix, verdictStoragePrefix, stateStoragePrefix},
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
			b.pathProject(),
			b.pathUsage(),
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
			b.drainUnseen(ctx)
			b.cancel()
			b.lastFlush(ctx)
			b.deleteStaticRoles(ctx)
			b.dropSnapshot()
			b.metrics.Close()
		},
	}
	return b
}

// Setup keeps the storage, which framework.Backend does not.
func (b *backend) Setup(ctx context.Context, conf *logical.BackendConfig) error {
	b.storage = conf.StorageView
	if isOpenBao(b.getenv) {
		nameCLIInHelp(b.Backend)
	}
	cached := *conf
	if conf.System != nil {
		cached.System = &sysview.CachedView{SystemView: conf.System}
	}
	return b.Backend.Setup(ctx, &cached)
}

// invalidate drops cached values. Vault calls it when another node changed storage.
func (b *backend) invalidate(_ context.Context, key string) {
	if key == configStorageKey || key == mountStorageKey {
		b.dropSnapshot()
	}
	if strings.HasPrefix(key, staticStoragePrefix) {
		b.static.forget()
		b.states.compareAgain()
	}
	if project, ok := strings.CutPrefix(key, verdictStoragePrefix); ok {
		b.guards.forget(project)
	}
	if label, ok := strings.CutPrefix(key, stateStoragePrefix); ok {
		b.states.forget(label)
	}
	for _, prefix := range []string{roleStoragePrefix, communityRolePrefix} {
		if name, ok := strings.CutPrefix(key, prefix); ok {
			b.roles.forget(name)
			b.states.compareAgain()
			b.rereadPool(name)
		}
	}
}

// periodic is called by Vault once a minute. Vault holds its state lock during the
// call, so workers do the work, except when the mount is being disabled: there is no
// later call.
func (b *backend) periodic(ctx context.Context, req *logical.Request) error {
	if !b.mayWriteLocally() {
		return nil
	}
	b.pushGauges(ctx, req)
	tainted := b.System().Tainted()
	b.unmount.look(tainted)
	if !tainted {
		if b.WriteSafeReplicationState() {
			b.startSchedule(req)
			b.startStaticWorker(req)
		}
		b.startJobs(req) //nolint:contextcheck // the worker outlives the tick that starts it
		// A disable that begins during this call waits for its end, and makes no other.
		if tainted = b.System().Tainted(); !tainted {
			return nil
		}
		b.unmount.look(tainted)
	}
	return b.drain(ctx, req, drainBudget)
}

// HandleExistenceCheck checks the path without the request's data: existence does not
// depend on it, and framework.Backend would report invalid data here as an internal
// error that quotes it. HandleRequest validates the data.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (bool, bool, error) {
	if !storable(req.Path) {
		return false, false, nil
	}
	bare := *req // Vault uses the request again
	bare.Data = nil
	checked, exists, err := b.Backend.HandleExistenceCheck(ctx, &bare)
	if err != nil && client.HoldsKey(err.Error()) {
		err = errors.New("failed to check whether the entry exists")
	}
	return checked, exists, err
}

// HandleRequest rejects misplaced keys and normalizes the data before
// framework.Backend handles the request.
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
	b.metrics.Seen(req.MountPoint)
	done := b.watch(ctx, req)
	resp, err := b.Backend.HandleRequest(ctx, req)
	done(resp, err)
	if err != nil && client.HoldsKey(req.Path) { // an entry stored before checkKeys existed
		err = errors.New(client.HideKeys(err.Error()))
	}
	if req.Operation == logical.HelpOperation && resp != nil {
		keepReferences(resp)
	}
	if isOpenBao(b.getenv) {
		nameCLI(resp)
	}
	if len(ignored) > 0 && err == nil && !resp.IsError() {
		if resp == nil {
			resp = &logical.Response{}
		}
		resp.AddWarning("Ignored read-only fields: " + strings.Join(ignored, ", "))
	}
	return resp, err
}

// checkKeys returns the reason to reject a request that has a key in the wrong place,
// without quoting the key; "" if there is none.
func (b *backend) checkKeys(ctx context.Context, req *logical.Request) (problem string, err error) {
	switch req.Operation { //nolint:exhaustive // the others carry a client's data
	case logical.RevokeOperation, logical.RenewOperation, logical.RollbackOperation:
		return "", nil // they carry the engine's own data
	}
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		if problem := misplacedKey(name, req.Data[name]); problem != "" {
			return problem, nil
		}
	}
	if !client.HoldsKey(req.Path) {
		return "", nil
	}
	// An entry stored before this check existed can still be read and deleted.
	where, name, _ := strings.Cut(req.Path, "/")
	for _, prefix := range entriesAt[where] {
		entry, err := req.Storage.Get(ctx, prefix+name)
		if err != nil {
			return "", errors.New("failed to read the role that the path names")
		}
		switch {
		case entry == nil:
		case strings.HasSuffix(where, "roles") && (req.Operation == logical.ReadOperation || req.Operation == logical.DeleteOperation):
			return "", nil
		default:
			return "the role name has the form of an API key, so the role can only be listed, read, and deleted; create the role under another name", nil
		}
	}
	return "the path contains an API key; revoke that key, because Vault's audit log records paths in plaintext", nil
}

// entriesAt has the storage prefixes of the entries behind each path with a name.
var entriesAt = map[string][]string{
	"roles":        {roleStoragePrefix, communityRolePrefix},
	"creds":        {roleStoragePrefix, communityRolePrefix},
	"static-roles": {staticStoragePrefix},
	"static-creds": {staticStoragePrefix},
	"rotate-role":  {staticStoragePrefix},
}

// misplacedKey returns the reason to reject a field, known or unknown, that holds a
// key; "" if it may. Only admin_api_key may, and only as one string.
func misplacedKey(name string, value any) (problem string) {
	text, isText := value.(string)
	if !isText {
		text = fmt.Sprint(value) // lists and objects at any depth
	}
	switch {
	case client.HoldsKey(name):
		return "a field name contains an API key; nothing was stored; revoke that key"
	case name == "admin_api_key" && !isText && value != nil:
		return name + " must be a string"
	case name != "admin_api_key" && client.HoldsKey(text):
		return fmt.Sprintf("field %.64q contains an API key; nothing was stored; revoke that key, and send an API key only in admin_api_key of the config", name)
	}
	return ""
}
