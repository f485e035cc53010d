//go:build integration

package integration

// A Vault restored from a snapshot while the original still runs: both manage the
// same keys at OpenAI, and neither knows of the other.

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// grace is a rotation_grace_period in which the engine can detect another Vault's
// use of a superseded admin key, which takes three minutes, with a margin.
const grace = 210 * time.Second

// loadedMount is a mount under constant load, and the failures of its clients.
type loadedMount struct {
	*mount
	issued, revoked, used atomic.Int64

	mu     sync.Mutex
	kept   []lease         // not revoked
	ended  map[string]bool // by account: revocations requested by these clients
	failed []string

	over  atomic.Bool
	group sync.WaitGroup
}

func (p *loadedMount) fail(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.failed) < 20 {
		p.failed = append(p.failed, time.Now().UTC().Format("15:04:05 ")+fmt.Sprintf(format, args...))
	}
}

func (p *loadedMount) failures() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.failed)
}

func (p *loadedMount) leases() []lease {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.kept)
}

func (p *loadedMount) works(what, key string) {
	status, err := tryKey(p.sim, key)
	if err != nil || status != http.StatusOK {
		p.fail("%s: %d %v", what, status, err)
	}
	p.used.Add(1)
}

// begin starts clients that run until end: one issues, keeps some leases and
// revokes the others, one uses all kept keys, and one reads each static role and
// uses its key.
func (p *loadedMount) begin(role string, static ...string) {
	each := func(do func(ctx context.Context, client *api.Client)) {
		client := p.vault.Client()
		p.group.Go(func() {
			for !p.over.Load() {
				ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
				do(ctx, client)
				cancel()
				time.Sleep(500 * time.Millisecond) // limits load
			}
		})
	}
	each(func(ctx context.Context, client *api.Client) {
		secret, err := client.Logical().ReadWithContext(ctx, p.path+"/creds/"+role)
		if err != nil || secret == nil {
			p.fail("issue: %v", err)
			return
		}
		l := lease{id: secret.LeaseID, key: secret.Data["api_key"].(string), account: secret.Data["service_account_id"].(string)}
		p.works("a key just issued", l.key)
		keep := p.issued.Add(1)%20 == 0
		p.mu.Lock()
		if keep {
			p.kept = append(p.kept, l)
		} else {
			p.ended[l.account] = true
		}
		p.mu.Unlock()
		if keep {
			return
		}
		if err := client.Sys().RevokeWithOptionsWithContext(ctx, &api.RevokeOptions{LeaseID: l.id, Sync: true}); err != nil {
			p.fail("revoke: %v", err)
			return
		}
		p.revoked.Add(1)
	})
	each(func(context.Context, *api.Client) {
		for _, l := range p.leases() {
			p.works("the key of lease "+l.id, l.key)
		}
	})
	each(func(ctx context.Context, client *api.Client) {
		for _, name := range static {
			secret, err := client.Logical().ReadWithContext(ctx, p.path+"/static-creds/"+name)
			if err != nil || secret == nil {
				p.fail("static role %s: %v", name, err)
				continue
			}
			p.works("the key of static role "+name, secret.Data["api_key"].(string))
		}
	})
	p.t.Cleanup(p.end)
}

func (p *loadedMount) end() {
	p.over.Store(true)
	p.group.Wait()
}

// endedByOthers returns the accounts that were deleted without a request from a
// client of the original.
func (p *loadedMount) endedByOthers() (accounts []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.sim.Ledger() {
		if e.Kind == openaitest.KindAccount && e.Event == openaitest.EventDeleted && !p.ended[e.ID] {
			accounts = append(accounts, e.ID)
		}
	}
	return accounts
}

// restored starts a Vault from a snapshot of this Vault.
func (m *mount) restored(snapshot []byte) *mount {
	m.t.Helper()
	v := ownVaultWith(m.t, plugin)
	require.NoError(m.t, v.Restore(m.t.Context(), bytes.NewReader(snapshot), m.vault))
	other := &mount{t: m.t, vault: v, client: v.Client(), path: m.path, sim: m.sim, project: m.project}
	require.Eventually(m.t, func() bool {
		_, err := other.client.Logical().Read(m.path + "/config")
		return err == nil
	}, time.Minute, 100*time.Millisecond, "the restored mount does not respond")
	return other
}

// Two copies beside their original: one keeps the restored admin key, the other gets
// its own. The periodic work, rotations, tidy runs and config writes of the copies'
// engines delete nothing of the original. Revocations by a copy's Vault look like the
// original's, so the test counts them.
func TestLong_RestoredVaultDeletesNothingOfTheOriginal(t *testing.T) {
	p := &loadedMount{mount: newMountOn(t, ownVault(t), frequentTidy(), map[string]any{"rotation_grace_period": grace.String()}), ended: map[string]bool{}}
	p.role("app", "24h", "48h")
	p.static("seldom", map[string]any{"rotation_period": "24h", "revocation_delay": "2m"})
	p.static("often", map[string]any{"rotation_period": "40s", "revocation_delay": "30s"})
	for range 5 {
		p.kept = append(p.kept, p.creds("app"))
	}
	p.write("config/rotate", nil) // to a key that only Vault knows
	originals := p.read("config").Data["admin_api_key_id"].(string)
	key := p.read("static-creds/seldom").Data["api_key_id"].(string)

	// Take the snapshot while a create request is pending: the copies have its WAL
	// entry but not its lease.
	var snapshot bytes.Buffer
	var saved error
	p.sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, Method: http.MethodPost, Route: accountsRoute, Times: 1, OnStrike: func(*http.Request) {
		saved = p.vault.Snapshot(context.Background(), &snapshot)
	}})
	caught := p.creds("app")
	require.NoError(t, saved)
	p.kept = append(p.kept, caught)
	p.begin("app", "seldom", "often")

	same, own := p.restored(snapshot.Bytes()), p.restored(snapshot.Bytes())
	copies := map[string]*mount{"with the original's admin key": same, "with its own admin key": own}
	began := time.Now()
	answer := same.write("config/rotate", nil)
	t.Logf("the copy's rotation: %v %v", answer.Data, answer.Warnings)
	_, ownKey := p.sim.AddAdminKey("of the copy")
	answer = own.write("config", map[string]any{"admin_api_key": ownKey})
	t.Logf("the copy's config write: %v", answer)
	for name, c := range copies {
		c.write("rotate-role/seldom", nil)
		c.write("config", map[string]any{"tidy_safety_buffer": "20s", "rotation_period": "1h"})
		c.write("tidy", map[string]any{"apply": true, "force": true})
		l := c.creds("app") // copies can revoke their own
		require.NoError(t, c.revoke(l), name)
		p.mu.Lock()
		p.ended[l.account] = true
		p.mu.Unlock()
	}
	issued := p.issued.Load()

	for name, c := range copies {
		for what, words := range map[string][]string{
			"the admin key":      {"superseded admin key retained", originals, "this Vault"},
			"the static key":     {"superseded key retained", "static_role=seldom", key, "last_used_at"},
			"the pending create": {"WAL entry retained", "its key was used after the create", caught.account, "last used at"},
			"a tidy run":         {"tidy run finished", "automatic=true", "apply=true", "deleted=0", "errors=0"},
		} {
			require.Eventually(t, func() bool { return len(c.lines(words...)) > 0 || len(p.failures()) > 0 }, grace+2*periodicTimeout, 500*time.Millisecond,
				"%s is not in the log of the copy %s", what, name)
			require.Empty(t, p.failures())
			t.Logf("the copy %s logged %s within %s: %s", name, what, time.Since(began).Round(time.Second), c.lines(words...)[0])
		}
	}
	issued = p.issued.Load() - issued
	require.Empty(t, p.endedByOthers())
	alive := func(id string) bool {
		return slices.ContainsFunc(p.sim.AdminKeys(), func(k openaitest.AdminKey) bool { return k.ID == id })
	}
	require.True(t, alive(originals))

	// Decommission one copy as if it were the only Vault.
	answer, err := own.client.Logical().Delete(own.path + "/config")
	require.NoError(t, err)
	t.Logf("the copy's config delete: %v", answer)
	require.True(t, alive(originals))
	p.write("config/rotate", nil)
	require.NotEqual(t, originals, p.read("config").Data["admin_api_key_id"])
	at := p.issued.Load()
	require.Eventually(t, func() bool { return p.issued.Load() > at+3 || len(p.failures()) > 0 }, 2*time.Minute, 100*time.Millisecond, "too few keys issued with the new admin key")
	require.Empty(t, p.failures())

	p.end()

	// A copy revokes a restored lease.
	l := p.kept[0]
	require.NoError(t, same.revoke(l))
	require.Equal(t, http.StatusUnauthorized, infer(t, p.sim, l.key))
	for _, l := range p.kept[1:] {
		require.Equal(t, http.StatusOK, infer(t, p.sim, l.key))
	}
	require.Equal(t, []string{l.account}, p.endedByOthers())
	require.Empty(t, p.failures())
	t.Logf("the original issued %d credentials (%d of them while its copies ran), revoked %d, and %d of its %d leases are valid; keys were used %d times without a failure; the copies' engines deleted nothing, and a copy's revocation of a restored lease deleted %d",
		p.issued.Load(), issued, p.revoked.Load(), len(p.kept)-1, len(p.kept), p.used.Load(), len(p.endedByOthers()))
	for _, c := range copies {
		c.requireNoSecretWritten(p.sim.Secrets()...)
	}
	for _, key := range p.sim.AdminKeys() {
		p.sim.Keep(key.ID)
	}
}
