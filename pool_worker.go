package openaisecrets

// This file owns the refill of the pools.
//
// What must stay true: one create at a time, which waits for every credential request;
// the emptiest pool comes first; after a failure that other creates would share, no
// create is sent until the next periodic call, and after a rejection none for that role
// until a growing delay has passed; a credential enters a pool only if the role, as it
// is then, still wants it.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/events"
	"vault-plugin-secrets-openai/internal/metrics"
)

// refillPools creates one credential after the other until the pools are full or a
// failure concerns other creates, too.
func (b *backend) refillPools(ctx context.Context, req *logical.Request) error {
	rejections := 0 // in a row
	for ctx.Err() == nil && !b.isDraining() {
		if err := b.readPools(ctx, req.Storage); err != nil {
			b.pools.rest()
			return fmt.Errorf("reading the roles: %w", err)
		}
		era := b.pools.era.Load() // before the config is read
		snap, err := b.current(ctx, req.Storage)
		if errors.Is(err, errNotConfigured) {
			return nil
		}
		if err != nil {
			b.pools.rest()
			return err
		}
		b.trimAll(snap)
		b.recordLeaving(ctx, req)
		name, r := b.pools.next(b.now())
		if r == nil {
			return nil
		}
		err = b.refill(ctx, req, name, basis{r, snap.config, era}, snap)
		b.recordLeaving(ctx, req)
		switch {
		case err == nil:
			rejections = 0
		case ctx.Err() != nil, b.isDraining(): // which is the cause
		case errors.Is(err, errChanged): // the next create is for the new role
			rejections++
		case b.noteRefill(req, name, r.project(snap.config), err):
			rejections++
		default:
			rejections = maxSystemicFailures
		}
		if rejections >= maxSystemicFailures {
			b.pools.rest()
		}
	}
	return nil
}

// next returns the role with the emptiest pool or, if all are full, one with a credential
// to replace. It returns nil if no create is due.
func (p *pools) next(now time.Time) (name string, r *role) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.resting {
		return "", nil
	}
	names := make([]string, 0, len(p.roles))
	for name := range p.roles {
		names = append(names, name)
	}
	slices.Sort(names)
	least := 1.0
	for _, candidate := range names {
		known := p.roles[candidate]
		if known.role == nil || waits(now, known.retryAt, longestRetry) {
			continue
		}
		full := float64(len(known.stock)) / float64(known.role.PoolSize)
		if full >= 1 && slices.ContainsFunc(known.stock, func(c *pooled) bool { return c.isDue(known.role, now) }) {
			full = 0.999 // after every pool that is not full
		}
		if full < least {
			least, name, r = full, candidate, known.role
		}
	}
	return name, r
}

// refill creates a credential and adds it to the pool of a role.
func (b *backend) refill(ctx context.Context, req *logical.Request, name string, of basis, snap *snapshot) error {
	r := of.role
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	b.pools.setCreating(name, true)
	defer b.pools.setCreating(name, false)
	project := r.project(snap.config)
	if project == "" {
		return clientError("the role has no project_id, and the config has no default")
	}
	if err := b.blocked(ctx, req.Storage, snap, name, r.spendRule); err != nil {
		return err
	}
	if err := b.guard(ctx, req, snap, project, r.Scopes); err != nil {
		return err
	}
	o := b.order(name, r, project, "", r.lifetime(b.System(), 0))
	o.spare, o.unproven = r.poolMaxAge(), false // a pool holds only keys that work
	o.covers += o.spare
	o.expiry += o.spare
	made, start := b.fingerprint(of), time.Now()
	m, err := b.makeCredential(ctx, req, o)
	if err != nil {
		if e := client.AsError(err); e != nil && e.AboutExpiry() {
			b.pools.noteRejectedLife(project, o.expiry)
		}
		if isRejection(err) && snap.unlessArchived(ctx, project, err) == nil {
			b.emptyPool(name, project) // its keys no longer work
		}
		return err
	}
	c := &pooled{issued: m, made: made, life: m.KeyExpires.Sub(m.began), start: start}
	release, err := b.shareAnswers(ctx, name)
	if err == nil {
		defer release()
		err = b.unchanged(ctx, req, name, of)
	}
	if err == nil && !b.pools.add(name, c) {
		err = errChanged
	}
	if err != nil {
		b.leaveTaken(m, metrics.PoolChanged)
	}
	return err
}

// isRejection reports whether a failure concerns one role and not the creates of others.
func isRejection(err error) bool {
	var theirs clientError
	var openAIs upstreamError
	return errors.As(err, &theirs) || errors.As(err, &openAIs) || client.AsError(err) != nil && !isSystemic(err)
}

// add adds a credential to the pool of a role, and returns false if the role has none any
// more. The credential that it replaces leaves the pool with the next trim.
func (p *pools) add(name string, c *pooled) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.roles[name]
	if p.closed || known == nil || known.role == nil {
		return false
	}
	known.succeeded()
	i, _ := slices.BinarySearchFunc(known.stock, c, func(a, b *pooled) int { return a.ends().Compare(b.ends()) })
	known.stock = slices.Insert(known.stock, i, c)
	return true
}

func (p *pools) setCreating(name string, creating bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.roles[name]; known != nil {
		known.creating = creating
	}
}

// rest stops creates until the next periodic call.
func (p *pools) rest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resting = true
}

// noteRejectedLife keeps the shortest key lifetime that OpenAI has rejected in a project.
func (p *pools) noteRejectedLife(project string, life time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rejectedLife == nil {
		p.rejectedLife = map[string]time.Duration{}
	}
	if known, ok := p.rejectedLife[project]; !ok || life < known {
		p.rejectedLife[project] = life
	}
}

// emptyPool removes the credentials of a project from the pool of a role.
func (b *backend) emptyPool(name, project string) {
	p := b.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.roles[name]; known != nil {
		known.stock = slices.DeleteFunc(known.stock, func(c *pooled) bool {
			if c.ProjectID == project {
				b.leave(c, metrics.PoolChanged)
				return true
			}
			return false
		})
	}
}

// noteRefill keeps the error of a refill for the read of the role, and reports whether it
// is a rejection. The first failure in a row is logged and sent as an event.
func (b *backend) noteRefill(req *logical.Request, name, project string, err error) (rejected bool) {
	rejected = isRejection(err)
	said := err.Error()
	if e := client.AsError(err); e != nil {
		said = remedy(e) + said
	}
	p := b.pools
	p.mu.Lock()
	known := p.roles[name]
	if known == nil { // deleted since
		p.mu.Unlock()
		return rejected
	}
	known.failures++
	known.failure = said[:min(len(said), maxStoredText)]
	if rejected {
		known.retryAt = b.now().Add(min(longestRetry, firstRetry<<min(known.failures-1, 10)))
	}
	first := known.failures == 1
	p.mu.Unlock()
	log := b.log(req).With("role", name, "error", err)
	if !first {
		log.Debug("pool not refilled")
		return rejected
	}
	log.Warn("pool not refilled")
	b.events.Emit(events.PoolRefillFail, req.MountPoint, "roles/"+name, false, "name", name, "project_id", project)
	return rejected
}
