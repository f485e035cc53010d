package openaisecrets

// This file owns the pools: credentials that are ready before a client requests them,
// which roles have a pool, how a request takes a credential, and how a credential leaves
// a pool without one.
//
// What must stay true: the keys are only in the memory of this process. Storage has a
// WAL entry for each from before its creation until it is returned or recorded for
// deletion, and the entry counts as used until it is deleted, so that the WAL worker
// ignores it. A credential is returned at most once, for a lease that it covers and a
// role that has not changed. A mount without pools makes no additional call, storage
// operation or goroutine.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/job"
	"vault-plugin-secrets-openai/internal/metrics"
	"vault-plugin-secrets-openai/internal/naming"
)

// pools holds the pools of a mount in this process.
type pools struct {
	// sizes is a mutex, held by a write of a role that changes the sum of the pools.
	sizes chan struct{}
	// answers has a lock per role and one for the config. Requests share them while they
	// compare a credential with the role and the config and delete its WAL entry.
	answers *job.SharedLocks
	// era counts the config writes that may have changed the organization of the admin
	// key.
	era atomic.Int64

	mu     sync.Mutex
	closed bool // the mount is being disabled
	roles  map[string]*pooledRole
	known  bool // every role has been read
	// unread has the roles that may have changed since they were read.
	unread map[string]bool
	// leaving has the credentials that left their pool and are not yet recorded for
	// deletion.
	leaving []*issued
	// resting stops creates until the next periodic call.
	resting bool
	// rejectedLife is the shortest key lifetime that OpenAI has rejected, by project.
	rejectedLife map[string]time.Duration
}

// pooledRole is a role with a pool.
type pooledRole struct {
	role     *role     // nil if it no longer has a pool
	stock    []*pooled // soonest expiry first
	creating bool

	failures int // in a row
	failure  string
	retryAt  time.Time // after a rejection
}

func (k *pooledRole) succeeded() { k.failures, k.failure, k.retryAt = 0, "", time.Time{} }

// pooled is a credential in a pool.
type pooled struct {
	*issued
	made  fingerprint   // of the role and config for which it was created
	life  time.Duration // of its key
	start time.Time     // of its creation, with the monotonic clock
}

// fingerprint is what a role and a config require of a credential.
type fingerprint struct {
	era                             int64
	endpoint, organization, project string
	kind, account, template, scopes string
	keyExpiry                       string
	key, covers                     time.Duration
}

// basis is the role and the config for which a credential was created.
type basis struct {
	role   *role
	config *config
	era    int64
}

func newPools() *pools {
	return &pools{sizes: make(chan struct{}, 1), answers: job.NewSharedLocks()}
}

// configAnswers is the name of the config's lock in answers. No role has this name.
const configAnswers = ""

// limitWrites is the name of the lock in answers that a write of a static role with a limit
// shares: it calls OpenAI, so it cannot share the config's. No role has this name.
const limitWrites = "/"

// errChanged means that the credential does not fit the role or the config any more.
var errChanged = errors.New("the role or the config has changed since the credential was created")

// fingerprint returns what a credential must be, within the limits of the mount.
func (b *backend) fingerprint(of basis) fingerprint {
	r, life := of.role, of.role.lifetime(b.System(), 0)
	return fingerprint{
		era: of.era, endpoint: of.config.APIEndpoint, organization: of.config.OrganizationID, project: r.project(of.config),
		kind: r.CredentialType, account: r.ServiceAccountID, template: r.NameTemplate,
		scopes:    strings.Join(slices.Sorted(slices.Values(r.Scopes)), ","),
		keyExpiry: r.KeyExpiry, key: life.Key, covers: life.Covers,
	}
}

// order returns the spec of a credential of a role.
func (b *backend) order(roleName string, r *role, project, displayName string, life lifetime) credentialSpec {
	return credentialSpec{
		label:      fmt.Sprintf("role %q", roleName),
		credential: credential{Type: r.CredentialType, ProjectID: project, ID: r.ServiceAccountID, Name: r.ServiceAccount},
		template:   r.NameTemplate,
		data:       naming.Data{RoleName: roleName, DisplayName: displayName, ProjectID: project, UnixTime: b.now().Unix()},
		scopes:     r.Scopes,
		covers:     life.Covers,
		expiry:     life.Key,
		activation: r.ActivationTimeout,
		unproven:   r.ActivationFailure == activationWarn,
	}
}

// age is the greater of the ages by the wall clock and by the monotonic clock. A step of
// the wall clock back does not hide age, and neither does the monotonic clock, which
// stands still while the machine is suspended.
func (p *pooled) age(now time.Time) time.Duration {
	return max(now.Sub(p.began), time.Since(p.start))
}

// leaves returns the credential with its times by the clock as it is now, which may have
// been set since the create. A credential that seems younger than it is, is looked for
// again; one that seems to expire early is renewed.
func (p *pooled) leaves(now time.Time) *issued {
	p.CreatedAt = now.Add(-time.Since(p.start)).UTC().Truncate(time.Second)
	p.KeyExpires = now.Add(p.life - p.age(now)).UTC().Truncate(time.Second)
	return p.issued
}

// ends is the expiry of the key by the monotonic clock, so that a clock which is set back
// does not put a new credential before those that it replaces.
func (p *pooled) ends() time.Time { return p.start.Add(p.life) }

// maxAge is how long the credential can wait for a request of the role.
func (p *pooled) maxAge(r *role) time.Duration { return min(p.spare, r.poolMaxAge()) }

// replaceBefore is the fraction of pool_max_age, 1/replaceBefore, that is left when a
// credential is replaced. Otherwise, a pool filled at once would also expire at once.
const replaceBefore = 4

// isDue reports whether the credential should be replaced.
func (p *pooled) isDue(r *role, now time.Time) bool {
	most := p.maxAge(r)
	return p.age(now) > most-most/replaceBefore
}

// lasts reports whether the key outlives a lease that begins now, by OpenAI's clock, too.
func (p *pooled) lasts(covers time.Duration, now time.Time, api *client.Client) bool {
	covers += expiryMargin - requestBudget
	return p.life-p.age(now) >= covers && api.Outlives(p.key.ExpiresAt, covers)
}

// fits reports whether the credential has a fingerprint, and was not created for a longer
// pool_max_age than the role's.
func (p *pooled) fits(r *role, now fingerprint) bool {
	return p.made == now && p.spare <= r.poolMaxAge()
}

// takePooled takes the fitting credential with the soonest expiry out of the pool of a
// role, nil if there is none. Its WAL entry counts as used until the caller releases it.
func (b *backend) takePooled(roleName string, of basis, snap *snapshot, life lifetime) *issued {
	r := of.role
	if r.PoolSize == 0 {
		return nil
	}
	now, want := b.now(), b.fingerprint(of)
	p := b.pools
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	var taken *pooled
	why := metrics.PoolEmpty
	if known := p.roles[roleName]; known != nil {
		known.stock = slices.DeleteFunc(known.stock, func(c *pooled) bool {
			switch {
			case !c.fits(r, want):
				b.leave(c, metrics.PoolChanged)
				if why == metrics.PoolEmpty {
					why = metrics.PoolFingerprint
				}
				return true
			case c.age(now) > c.maxAge(r):
				b.leave(c, metrics.PoolAged)
				return true
			case taken != nil:
			case !c.lasts(life.Covers, now, snap.api):
				why = metrics.PoolTooShort
			default:
				taken = c
				return true
			}
			return false
		})
	}
	p.mu.Unlock()
	if taken == nil {
		b.metrics.PoolMissed(roleName, why)
		return nil
	}
	b.metrics.PoolTaken(roleName)
	taken.snap = snap
	return taken.leaves(now)
}

// unchanged returns errChanged if a credential does not fit the role or the config any
// more, or the role must not have one any more. The caller shares the locks of both.
func (b *backend) unchanged(ctx context.Context, req *logical.Request, roleName string, was basis) error {
	r, err := b.roles.get(ctx, req.Storage, roleName)
	if err != nil {
		return err
	}
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) || err == nil && r == nil {
		return errChanged
	}
	if err != nil {
		return err
	}
	is := basis{r, snap.config, b.pools.era.Load()}
	err = b.blocked(ctx, req.Storage, snap, roleName, r.spendRule)
	if err != nil && !errors.As(err, new(clientError)) {
		return err
	}
	if err != nil || is != was && b.fingerprint(is) != b.fingerprint(was) || b.rejects(snap, req.MountPoint, r.project(snap.config), r.Scopes) != nil {
		return errChanged
	}
	return nil
}

// shareAnswers shares the locks of a role and of the config.
func (b *backend) shareAnswers(ctx context.Context, roleName string) (release func(), err error) {
	config, err := b.pools.answers.Share(ctx, configAnswers)
	if err != nil {
		return nil, err
	}
	role, err := b.pools.answers.Share(ctx, roleName)
	if err != nil {
		config()
		return nil, err
	}
	return func() { role(); config() }, nil
}

// leave notes that a credential has left its pool. Its WAL entry counts as used until
// recordLeaving. The caller holds the mutex.
func (b *backend) leave(c *pooled, why string) {
	b.pools.leaving = append(b.pools.leaving, c.leaves(b.now()))
	b.metrics.PoolDestroyed(why, 1)
}

// leaveTaken is leave for a credential that is in no pool, without the mutex.
func (b *backend) leaveTaken(m *issued, why string) {
	p := b.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leaving = append(p.leaving, m)
	b.metrics.PoolDestroyed(why, 1)
}

// recordLeaving records the credentials that have left the pools for deletion, by ID, and
// releases their WAL entries. If that fails, the WAL worker finds a credential by name.
func (b *backend) recordLeaving(ctx context.Context, req *logical.Request) {
	// A credential taken off the list is recorded even if the backend ends.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	for ctx.Err() == nil {
		p := b.pools
		p.mu.Lock()
		if len(p.leaving) == 0 {
			p.leaving = nil
			p.mu.Unlock()
			return
		}
		m := p.leaving[0]
		p.leaving = p.leaving[1:]
		p.mu.Unlock()
		_, err := b.recordRevocation(bounded, req.Storage, m.credential)
		if err == nil {
			err = b.deleteWAL(bounded, req.Storage, m.walID)
		}
		b.wal.release(m.walID)
		if err != nil {
			b.log(req).Warn("pooled credential not recorded for deletion; its WAL entry remains", append([]any{"error", err}, m.attrs()...)...)
		}
	}
}

// changeRole writes the entry of a role, or deletes it with r == nil, if the role may
// still change. After it has returned, no credential of the former role is returned.
func (b *backend) changeRole(ctx context.Context, req *logical.Request, name string, r *role, may, write func() error) error {
	release, err := b.pools.answers.Alone(ctx, name)
	if err != nil {
		return fmt.Errorf("waiting for credential requests of the role: %w", err)
	}
	defer release()
	if err := may(); err != nil {
		return err
	}
	if err := b.roles.change(name, write); err != nil {
		b.rereadPool(name) // storage may still have the new role
		return err
	}
	if b.poolsUsed.Load() {
		snap, _ := b.current(ctx, req.Storage) // without a config, no credential is returned
		b.setPool(name, r, snap)
	}
	return nil
}

// setPool stores the current role, nil for none, and removes the credentials that do not
// fit from its pool.
func (b *backend) setPool(name string, r *role, snap *snapshot) {
	want := b.wanted(r, snap)
	p := b.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.unread, name)
	p.set(name, r)
	if known := p.roles[name]; known != nil {
		known.succeeded()
		p.resting = false
		b.trim(name, want)
	}
}

// wanted is the fingerprint of a role with a pool, nil without a role or config.
func (b *backend) wanted(r *role, snap *snapshot) *fingerprint {
	if r == nil || r.PoolSize == 0 || snap == nil {
		return nil
	}
	want := b.fingerprint(basis{r, snap.config, b.pools.era.Load()})
	return &want
}

// set stores the current role, nil for none. The caller holds the mutex.
func (p *pools) set(name string, r *role) {
	has, known := r != nil && r.PoolSize > 0, p.roles[name]
	switch {
	case known == nil && !has:
		return
	case known == nil:
		if p.roles == nil {
			p.roles = map[string]*pooledRole{}
		}
		known = &pooledRole{}
		p.roles[name] = known
	}
	if known.role = r; !has {
		known.role = nil
	}
}

// trim removes the credentials that do not fit, are too old or are too many from the pool
// of a role. Without a fingerprint it keeps them for the next request to compare. The
// caller holds the mutex.
func (b *backend) trim(name string, want *fingerprint) {
	p, now := b.pools, b.now()
	known := p.roles[name]
	r := known.role
	if r != nil && want != nil {
		known.stock = slices.DeleteFunc(known.stock, func(c *pooled) bool {
			switch {
			case !c.fits(r, *want):
				b.leave(c, metrics.PoolChanged)
			case c.age(now) > c.maxAge(r):
				b.leave(c, metrics.PoolAged)
			default:
				return false
			}
			return true
		})
	}
	size := 0
	if r != nil {
		size = r.PoolSize
	}
	for len(known.stock) > size {
		// The one that the last create replaces, which by a clock that has been set need not
		// be the oldest; else it would be replaced again and again.
		i := max(0, slices.IndexFunc(known.stock, func(c *pooled) bool { return r != nil && c.isDue(r, now) }))
		b.leave(known.stock[i], metrics.PoolChanged)
		known.stock = slices.Delete(known.stock, i, i+1)
	}
	if r == nil && !known.creating {
		delete(p.roles, name)
	}
}

// trimAll is trim for all pools.
func (b *backend) trimAll(snap *snapshot) {
	p := b.pools
	roles := map[string]*role{}
	p.mu.Lock()
	for name, known := range p.roles {
		roles[name] = known.role
	}
	p.mu.Unlock()
	wanted := map[string]*fingerprint{}
	for name, r := range roles { // without the mutex, since it may ask Vault for the mount's limits
		wanted[name] = b.wanted(r, snap)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, r := range roles {
		if known := p.roles[name]; known != nil && known.role == r {
			b.trim(name, wanted[name])
		}
	}
}

// rereadPool marks a role to be read again before the next refill.
func (b *backend) rereadPool(name string) {
	if !b.poolsUsed.Load() {
		return
	}
	p := b.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unread == nil {
		p.unread = map[string]bool{}
	}
	p.unread[name] = true
}

// readPools reads the roles that may have changed, or every role once in a process.
func (b *backend) readPools(ctx context.Context, s logical.Storage) error {
	p := b.pools
	p.mu.Lock()
	known := p.known
	var names []string
	for name := range p.unread {
		names = append(names, name)
	}
	p.mu.Unlock()
	if !b.poolsUsed.Load() || known && len(names) == 0 {
		return nil
	}
	if !known {
		all, err := listNames(ctx, s, roleStoragePrefix, communityRolePrefix)
		if err != nil {
			return fmt.Errorf("listing the roles: %w", err)
		}
		names = all
	}
	slices.Sort(names)
	for _, name := range names {
		// The lock keeps a write from coming between the read and set.
		release, err := p.answers.Share(ctx, name)
		if err != nil {
			return err
		}
		p.mu.Lock()
		delete(p.unread, name) // an invalidation from now on is kept
		p.mu.Unlock()
		r, err := getRole(ctx, s, name)
		if err == nil || errors.As(err, &unreadable{}) { // of a newer version
			p.mu.Lock()
			p.set(name, r)
			p.mu.Unlock()
			err = nil
		} else {
			b.rereadPool(name)
		}
		release()
		if err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known = true
	return nil
}

// admitPool checks the sum of the pools before a write of a role, and blocks other writes
// that change it until release.
func (b *backend) admitPool(ctx context.Context, req *logical.Request, name string, old, r *role) (release func(), problem string, err error) {
	if r.PoolSize == 0 && (old == nil || old.PoolSize == 0) {
		return func() {}, "", nil
	}
	p := b.pools
	select {
	case p.sizes <- struct{}{}:
		release = func() { <-p.sizes }
	case <-ctx.Done():
		return nil, "", fmt.Errorf("another role with a pool is being written: %w", ctx.Err())
	}
	sum := 0
	if r.PoolSize > 0 {
		if err = b.markPools(ctx, req.Storage); err == nil {
			err = b.readPools(ctx, req.Storage)
		}
		sum = p.sum(name)
	}
	if err == nil && sum+r.PoolSize > maxPoolSum {
		problem = fmt.Sprintf("pool_size %d exceeds the limit of %d for all roles of a mount; the other roles use %d", r.PoolSize, maxPoolSum, sum)
	}
	if err != nil || problem != "" {
		release()
		return nil, problem, err
	}
	return release, "", nil
}

// sum is the sum of the sizes of all pools but one.
func (p *pools) sum(but string) (sum int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, known := range p.roles {
		if name != but && known.role != nil {
			sum += known.role.PoolSize
		}
	}
	return sum
}

// markPools records that the mount has roles with pools, before the first is stored.
func (b *backend) markPools(ctx context.Context, s logical.Storage) error {
	if b.poolsUsed.Load() {
		return nil
	}
	if _, err := b.ensureTag(ctx, s); err != nil {
		return err
	}
	unlock, err := b.entries.Lock(ctx, mountStorageKey)
	if err != nil {
		return fmt.Errorf("waiting for another write of the mount tag: %w", err)
	}
	defer unlock()
	m, err := getMount(ctx, s)
	if err != nil {
		return err
	}
	if !m.Pools {
		m.Pools = true
		if err := writeEntry(ctx, s, mountStorageKey, "the mount tag", m); err != nil {
			return err
		}
	}
	b.poolsUsed.Store(true)
	return nil
}

// demand is the number of creates a minute that keep all pools fresh without requests.
// For the role of that name, r replaces the stored one.
func (p *pools) demand(name string, r *role) float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	demand := float64(r.PoolSize) / r.poolMaxAge().Minutes()
	for other, known := range p.roles {
		if other != name && known.role != nil {
			demand += float64(known.role.PoolSize) / known.role.poolMaxAge().Minutes()
		}
	}
	return demand
}

// warnOfPool adds warnings to the response of a role write if the pool may stay empty.
func (b *backend) warnOfPool(name, project string, r *role, snap *snapshot, response *logical.Response) {
	if r.PoolSize == 0 || snap == nil {
		return
	}
	demand := b.pools.demand(name, r)
	if rate, limited := snap.api.CreateRate(r.CredentialType == typeKey); limited && demand > rate {
		response.AddWarning(fmt.Sprintf("The pools of this mount need %.2g creates a minute even without requests, more than the %.2g that OpenAI currently allows, so they stay partly empty. Reduce pool_size or increase pool_max_age.", demand, rate))
	}
	key := r.lifetime(b.System(), 0).Key + r.poolMaxAge()
	b.pools.mu.Lock()
	rejected := b.pools.rejectedLife[project]
	b.pools.mu.Unlock()
	if rejected != 0 && key >= rejected {
		response.AddWarning(fmt.Sprintf("OpenAI has rejected a key lifetime of %s in project %s, and the pool needs %s (max_ttl or ttl, pool_max_age and a margin of %s): the pool may stay empty. Reduce pool_max_age or max_ttl.", rejected, project, key, expiryMargin))
	}
}

// moveConfig runs change, which replaces the config, while no credential is compared with
// it, and then trims the pools. With moved, all credentials leave them, because the
// admin key may belong to another organization.
func (b *backend) moveConfig(ctx context.Context, req *logical.Request, moved bool, change func() error) error {
	release, err := b.pools.answers.Alone(ctx, configAnswers)
	if err != nil {
		return fmt.Errorf("waiting for credential requests: %w", err)
	}
	defer release()
	err = change()
	if moved {
		b.pools.era.Add(1)
	}
	if !b.poolsUsed.Load() {
		return err
	}
	p := b.pools
	p.mu.Lock()
	p.resting = false
	clear(p.rejectedLife)
	for _, known := range p.roles {
		known.failures, known.retryAt = 0, time.Time{}
	}
	p.mu.Unlock()
	if snap, snapErr := b.current(ctx, req.Storage); snapErr == nil {
		b.trimAll(snap)
	}
	return err
}

// clearPool empties the pool of a role that is blocked. Nothing is added to it while the
// caller holds the lock of the role's answers, or the role's state blocks it.
func (b *backend) clearPool(name string) {
	p := b.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.roles[name]; known != nil {
		for _, c := range known.stock {
			b.leave(c, metrics.PoolBlocked)
		}
		known.stock = nil
	}
}

// retry lets the pool of a role be refilled at once.
func (p *pools) retry(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.roles[name]; known != nil {
		known.succeeded()
	}
}

// closePools empties the pools and keeps them empty, because the mount is being disabled.
func (b *backend) closePools() {
	p := b.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, known := range p.roles {
		for _, c := range known.stock {
			b.leave(c, metrics.PoolDisabled)
		}
		known.stock = nil
	}
}

// wake reverts rest and, after a move of the mount, closePools.
func (p *pools) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed, p.resting = false, false
}

// someLeave reports whether recordLeaving has something to record.
func (p *pools) someLeave() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.leaving) > 0
}

// poolStatus is the part of a role's read about its pool.
type poolStatus struct {
	ready    int
	creating bool
	failure  string
}

func (p *pools) status(name string) (s poolStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.roles[name]; known != nil {
		s = poolStatus{len(known.stock), known.creating, known.failure}
	}
	return s
}

// showPool adds the status of the pool to a read of a role. A performance standby does
// not know it, because the active node serves credentials.
func (b *backend) showPool(name string, data map[string]any) {
	s := b.pools.status(name)
	data["pool_ready"], data["pool_refilling"], data["pool_last_error"] = s.ready, s.creating, s.failure
	if !b.mayWriteLocally() {
		data["pool_ready"], data["pool_refilling"] = nil, nil
	}
}

// ready is the number of credentials in the pool of each role that has one.
func (p *pools) ready() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	ready := map[string]int{}
	for name, known := range p.roles {
		if known.role != nil {
			ready[name] = len(known.stock)
		}
	}
	return ready
}
