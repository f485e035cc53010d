package simulation

// This file owns who acts in a life: programs and readers, operators, people at
// OpenAI, and what befalls Vault. What they choose comes from their own stream of
// the seed.

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client/openaitest"
)

// roles are what programs lease from.
var roles = []struct {
	name string
	data map[string]any
}{
	{"app", map[string]any{"ttl": "1h", "max_ttl": "4h"}},
	{"short", map[string]any{"ttl": "15m", "max_ttl": "1h", "key_expiry": "ttl", "scopes": "api.model.read,api.model.request"}},
	{"key", map[string]any{"ttl": "1h", "max_ttl": "24h", "credential_type": "api_key"}},
	{"old", map[string]any{"ttl": "2h", "max_ttl": "8h"}}, // of a project that people archive
	{"keyed", map[string]any{"ttl": "20m", "max_ttl": "2h", "credential_type": "api_key", "key_expiry": "ttl", "scopes": "api.model.read"}},
}

// actorsOfLife sets the mount up, as an operator does on a calm day, and has
// everybody begin.
func (w *world) actorsOfLife() {
	r := w.dice("setup")
	id, key := w.openai.sim.AdminKey()
	w.ledger.configured[id] = true
	config := map[string]any{
		"admin_api_key": key, "api_endpoint": endpoint,
		"rotation_period": []string{"", "6h", "24h", "1h"}[r.IntN(4)], "rotation_grace_period": []string{"5m", "30m", "2h"}[r.IntN(3)],
		"tidy_interval": []string{"12h", "1h", "0"}[r.IntN(3)],
	}
	if w.Copy { // docs/rotation.md: in a shorter grace a copy cannot see the original's use
		config["rotation_grace_period"] = "2h"
	}
	w.must(w.vault, "config", config)
	w.writeRoles(w.vault)
	if w.Readers > 0 {
		for _, name := range []string{"made", "adopted", "paused"} {
			w.must(w.vault, "static-roles/"+name, w.staticData(name))
		}
	}
	for _, project := range w.openai.projects { // of people, with names that are near
		for _, name := range []string{"vault-app-somebody", "vault-static-made-x", "ci"} {
			w.openai.sim.AddServiceAccount(project, name)
		}
		// Of another mount, in a name that is nearer yet, with a key that ends.
		status, answer := w.openai.person(http.MethodPost, "/organization/projects/"+project+"/service_accounts", `{"name":"vault-app-0000000000000000","expires_in_seconds":3600}`)
		if status != http.StatusOK {
			panic(answer) // the world is built wrong
		}
	}
	for i := range w.Programs {
		w.act(func() { w.program(w.vault, fmt.Sprintf("program %d", i)) })
	}
	for i := range w.Readers {
		w.act(func() { w.reader(w.vault, fmt.Sprintf("reader %d", i)) })
	}
	if w.Operators {
		w.act(w.operator)
		w.act(w.removals)
	}
	if w.People {
		w.act(w.people)
		if w.Readers > 0 {
			w.act(w.strays)
			w.act(func() { w.compared("made", w.openai.projects[0]) })
			w.act(func() { w.compared("adopted", w.openai.projects[1]) })
		}
	}
	if w.Faults > 0 {
		w.act(w.openai.weather.change)
	}
	if w.Trouble {
		w.act(w.trouble)
	}
	if w.Clocks {
		w.act(w.clocks)
	}
	if w.Pools {
		w.act(w.pools)
	}
	if w.Spending {
		w.act(w.spending)
	}
	if w.Copy {
		w.act(w.copy)
	}
	w.act(func() { // what is checked however quiet it is
		for w.sleep(10 * time.Minute) {
			w.checkAdmins()
			w.checkOwed()
			w.openai.sim.ResetRequests()
		}
	})
}

// writeRoles writes all roles.
func (w *world) writeRoles(v *vault) {
	for i, role := range roles {
		data := w.roleData(i)
		done := w.ledger.wrote(role.name, split(data["scopes"]))
		done(w.write(v, "operator", "roles/"+role.name, data) == nil)
	}
}

// roleData is what the role of that number is written with.
func (w *world) roleData(i int) map[string]any {
	data := map[string]any{"project_id": w.openai.projects[i%2]}
	for k, v := range roles[i].data {
		data[k] = v
	}
	if n := poolSizes[roles[i].name]; w.Pools && n > 0 {
		data["pool_size"] = n
	}
	if roles[i].name == "old" {
		data["project_id"] = w.openai.projects[2]
	}
	if data["credential_type"] == "api_key" {
		data["service_account_id"] = w.openai.sim.AddServiceAccount(data["project_id"].(string), "by hand")
	}
	return data
}

func split(scopes any) []string {
	text, _ := scopes.(string)
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' })
}

// must is a write that has to succeed.
func (w *world) must(v *vault, path string, data map[string]any) {
	if err := w.write(v, "operator", path, data); err != nil {
		panic(fmt.Sprintf("%s: %v", path, err)) // the world is built wrong
	}
}

// write is a write of an operator.
func (w *world) write(v *vault, who, path string, data map[string]any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	resp, err := v.request(ctx, logical.UpdateOperation, path, data)
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	shown := map[string]any{}
	for k, value := range data {
		if k != "admin_api_key" {
			shown[k] = value
		}
	}
	w.tell(who, "writes %s %v: %v", path, shown, err)
	return err
}

func pause(r *rand.Rand, mean time.Duration) time.Duration {
	return time.Duration((0.1 + r.ExpFloat64()) * float64(mean))
}

// program leases a key, uses it, renews it, revokes it or lets it end, and begins
// again. Now and then it hangs up in the middle of a request.
func (w *world) program(v *vault, who string) {
	r := w.dice(v.name + who)
	for w.sleep(pause(r, 10*time.Minute)) {
		role := roles[r.IntN(len(roles))].name
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		if r.IntN(12) == 0 {
			hangUp := time.Duration(r.Int64N(int64(2 * time.Second)))
			time.AfterFunc(hangUp, cancel)
		}
		if r.IntN(20) == 0 {
			w.spoil(v, r)
		}
		var by *token
		if r.IntN(8) == 0 {
			by = v.token(r.IntN(2) == 0, pause(r, time.Hour))
		}
		l, _, err := v.issueBy(ctx, by, role, nil)
		cancel()
		if err != nil {
			w.tell(who, "is refused credentials of %s: %v", role, err)
			continue
		}
		w.checkLease(v, l)
		uses := 1 + r.IntN(6)
		for range uses {
			if !w.sleep(pause(r, 8*time.Minute)) {
				return
			}
			w.checkLease(v, l)
			if l.renewable && r.IntN(2) == 0 {
				ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
				if r.IntN(3) == 0 { // two agents with the same lease
					w.act(func() { _ = v.renew(ctx, l.id, 45*time.Minute) })
				}
				_ = v.renew(ctx, l.id, time.Duration(r.IntN(3))*30*time.Minute) // it may have ended
				cancel()
				w.checkLease(v, l)
			}
		}
		switch r.IntN(3) {
		case 0:
			w.tell(who, "revokes %s", l.id)
			v.revoke(l.id)
		case 1: // it lets it end
		case 2: // and goes on until then
			for v.living(l) && w.sleep(20*time.Minute) {
				w.checkLease(v, l)
			}
		}
	}
}

// lease is what a client does that waits a minute for credentials.
func (w *world) lease(v *vault, role string) (*lease, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, _, err := v.issue(ctx, role)
	return l, err
}

// crowd has n clients lease at once, and use what they have got after a while.
func (w *world) crowd(v *vault, role string, n int, after func(l *lease)) {
	for range n {
		w.act(func() {
			if l, err := w.lease(v, role); err == nil && after != nil {
				after(l)
			}
		})
	}
}

// deploy is a deployment: many programs lease at once, and all of it is revoked some
// minutes later.
func (w *world) deploy(v *vault) {
	w.crowd(v, roles[0].name, 12, func(l *lease) {
		if w.sleep(5 * time.Minute) {
			w.checkLease(v, l)
			v.revoke(l.id)
		}
	})
}

// reader reads a static role and uses its key.
func (w *world) reader(v *vault, who string) {
	r := w.dice(v.name + who)
	for w.sleep(pause(r, 3*time.Minute)) {
		w.read(v, []string{"made", "adopted"}[r.IntN(2)])
	}
}

// read reads a static role and uses its key, which it returns.
func (w *world) read(v *vault, name string) (key string) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	resp, err := v.request(ctx, logical.ReadOperation, "static-creds/"+name, nil)
	if err != nil || resp == nil || resp.IsError() {
		return ""
	}
	w.checkStatic(v, name, resp.Data)
	key, _ = resp.Data["api_key"].(string)
	return key
}

// spoil has something go wrong in the middle of what is done next: a write of storage
// fails, the process dies, listings do not show what was made.
func (w *world) spoil(v *vault, r *rand.Rand) {
	_, p, err := v.serving()
	if err != nil || w.Faults == 0 {
		return
	}
	p.mu.Lock()
	switch r.IntN(5) {
	case 0, 1:
		p.failAt, p.failAfter = 1+r.IntN(5), r.IntN(2) == 0
	case 2:
		if w.Trouble {
			p.killAt = 1 + r.IntN(30)
		}
	case 3:
		n := 1 + r.IntN(2)
		w.openai.weather.set(func(x *weather) { x.loses = n })
	}
	p.mu.Unlock()
	if r.IntN(3) == 0 {
		w.openai.weather.burst(2)
		w.act(func() {
			w.sleep(20 * time.Second)
			w.openai.weather.burst(0)
		})
	}
	if r.IntN(2) == 0 {
		w.hide()
	}
}

// hide has listings leave things out for some minutes.
func (w *world) hide() {
	w.openai.weather.set(func(x *weather) { x.hides = true })
	w.act(func() {
		w.sleep(20 * time.Minute)
		w.openai.weather.set(func(x *weather) { x.hides = false })
	})
}

// operator changes what there is to change.
func (w *world) operator() {
	r := w.dice("operator")
	v, who := w.vault, "operator"
	for w.sleep(pause(r, time.Hour)) {
		role := roles[r.IntN(len(roles))]
		switch r.IntN(14) {
		case 12:
			w.tell(who, "revokes leases one by one, until one fails")
			if t, _, err := v.serving(); err == nil {
				_ = v.revokePrefix(t.ctx, false)
			}
		case 13:
			most := []time.Duration{768 * time.Hour, 2 * time.Hour, 30 * time.Minute}[r.IntN(3)]
			w.tell(who, "tunes max_lease_ttl to %s", most)
			v.maxTTL.Store(int64(most))
		case 0, 1:
			if r.IntN(2) == 0 {
				w.spoil(v, r)
			}
			if r.IntN(3) == 0 {
				w.act(func() { _ = w.write(v, "another", "config/rotate", nil) })
			}
			_ = w.write(v, who, "config/rotate", nil) // refused while five wait
		case 2:
			w.narrow(who, role.name, r)
		case 3:
			_ = w.write(v, who, "roles/"+role.name, map[string]any{"ttl": fmt.Sprintf("%dm", 10+r.IntN(50))})
		case 4:
			role := []string{"made", "adopted"}[r.IntN(2)]
			if r.IntN(3) == 0 {
				w.spoil(v, r)
			}
			if r.IntN(2) == 0 {
				w.act(func() { _ = w.write(v, "another", "rotate-role/"+role, nil) })
			}
			_ = w.write(v, who, "rotate-role/"+role, nil)
		case 5:
			if w.Faults > 0 && r.IntN(2) == 0 {
				w.hide()
			}
			_ = w.write(v, who, "tidy", map[string]any{"apply": true})
		case 6:
			w.tell(who, "revokes all leases")
			for _, id := range v.leaseIDs() {
				v.revoke(id)
			}
		case 7:
			if !w.Copy {
				w.shorten(who, []time.Duration{5 * time.Minute, time.Hour}[r.IntN(2)])
			}
		case 8:
			if w.Copy {
				continue
			}
			if v.move(v.at([]string{"openai/", "keys/"}[r.IntN(2)]), r.IntN(4) == 0) != nil {
				if w.sleep(pause(r, 10*time.Minute)); r.IntN(2) == 0 {
					v.restart(false, time.Minute)
				}
				w.untaint(v)
			}
		case 9:
			v.reload()
		case 10:
			if w.Readers > 0 && !w.Copy {
				_ = w.write(v, who, "static-roles/made", map[string]any{"rotation_period": []string{"1h", "3h"}[r.IntN(2)]})
			}
		case 11:
			if r.IntN(4) == 0 && !w.Copy {
				w.disableAndBeginAnew(v, who)
			}
		}
	}
}

// untaint moves a mount on which a move or disable has failed, until that succeeds;
// what refuses to be revoked is forgotten by force at last.
func (w *world) untaint(v *vault) {
	for try := 0; v.tainted.Load() && try < 50; try++ {
		if try > 5 {
			v.forceRevoke()
		}
		if v.move(v.at("openai/"), false) == nil {
			return
		}
		w.sleep(5 * time.Minute)
	}
}

// disableAndBeginAnew disables the mount, checks what it has left, and enables
// another.
func (w *world) disableAndBeginAnew(v *vault, who string) {
	defer w.openai.knowAll()()
	// What is orphaned already is not found by the next mount, which has another tag;
	// and of the last admin key the operator disposes.
	_, orphans := w.left()
	w.ledger.hand(append(orphans, v.adminKeyID())...)
	v.mu.Lock()
	spawned := v.count
	v.mu.Unlock()
	began := w.told()
	r := w.dice(fmt.Sprint("disable ", spawned))
	if w.Faults > 0 { // what is in progress then, and may have failed
		w.openai.weather.burst(2)
	}
	w.crowd(v, roles[0].name, 4, nil)
	w.sleep(time.Duration(r.Int64N(int64(30 * time.Second))))
	w.openai.weather.burst(0)
	for try := 0; v.disable() != nil; try++ {
		w.ledger.hand(v.adminKeyID())
		if !w.sleep(10 * time.Minute) {
			w.untaint(v)
			return
		}
		if try > 5 {
			v.forceRevoke()
		}
	}
	_, left := w.left() // what could not be deleted, or may not have been a disable: the log names it
	v.mu.Lock()
	died := v.cutShort || v.count > spawned // the process that would have named it
	v.mu.Unlock()
	if unnamed := w.unnamed(left, began, ""); len(unnamed) > 0 && !died {
		w.violate(nothingLeft, unnamed, "after the mount was disabled there is still, and no line of the log names it: %s", strings.Join(unnamed, ", "))
	}
	w.ledger.hand(left...)
	w.tell(who, "has disabled the mount, and enables another")
	v.enable()
	w.setUpAgain(v)
}

func (v *vault) leaseIDs() (ids []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for id := range v.leases {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (v *vault) allLeases() (all []*lease) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, l := range v.leases {
		all = append(all, l)
	}
	return all
}

func (v *vault) forceRevoke() {
	t, _, err := v.serving()
	if err == nil {
		_ = v.revokePrefix(t.ctx, true)
	}
}

// people do at OpenAI what they like.
func (w *world) people() {
	r := w.dice("people")
	for w.sleep(pause(r, 4*time.Hour)) {
		switch r.IntN(7) {
		case 4:
			if r.IntN(4) == 0 && !w.ledger.handed(w.openai.projects[2]) {
				w.ledger.hand(w.openai.projects[2])
				w.tell("people", "archive project %s", w.openai.projects[2])
				w.openai.sim.ArchiveProject(w.openai.projects[2])
			}
		case 5: // and switch it off again
			w.tell("people", "switch a policy on")
			disabled := r.IntN(2) == 0
			w.openai.weather.set(func(x *weather) { x.closed++ })
			w.openai.sim.SetKeyCreationDisabled(disabled)
			if !disabled {
				w.openai.sim.Configure(func(o *openaitest.Options) { o.MaxKeyLifetime = time.Hour })
			}
			w.sleep(pause(r, time.Hour))
			w.openai.sim.SetKeyCreationDisabled(false)
			w.openai.sim.Configure(func(o *openaitest.Options) { o.MaxKeyLifetime = 0 })
			w.openai.weather.set(func(x *weather) { x.closed-- })
		case 0: // of what the engine has made, or others
			accounts := w.openai.sim.Accounts()
			if len(accounts) == 0 {
				continue
			}
			a := accounts[r.IntN(len(accounts))]
			w.deleteAccount(a.ProjectID, a.ID)
		case 1:
			keys := w.openai.sim.Keys()
			if len(keys) == 0 {
				continue
			}
			k := keys[r.IntN(len(keys))]
			w.deleteKey(k.ProjectID, k.ID, 2)
		case 6:
			w.cleanUp()
		case 2:
			if id := w.vault.adminKeyID(); id != "" && r.IntN(3) == 0 {
				if first, _ := w.openai.sim.AdminKey(); id != first {
					w.ledger.hand(id)
					w.tell("people", "delete admin key %s", id)
					w.openai.sim.DeleteAdminKey(id)
					w.sleep(pause(r, time.Hour))
					w.repairAdmin()
				}
			}
		case 3:
			w.openai.sim.AddServiceAccount(w.openai.projects[r.IntN(2)], "vault-app-"+fmt.Sprint(r.IntN(1000)))
		}
	}
}

// deleteAccount deletes an account by hand.
func (w *world) deleteAccount(project, id string) {
	w.ledger.hand(id)
	for _, k := range w.openai.sim.Keys() {
		if t := w.ledger.thing(k.ID); t != nil && t.account == id {
			w.ledger.hand(k.ID)
		}
	}
	w.tell("people", "delete account %s", id)
	w.openai.sim.DeleteServiceAccount(project, id)
}

// deleteKey deletes a key by hand, and tidy looks some times whether something is left of
// it.
func (w *world) deleteKey(project, id string, looks int) {
	w.ledger.hand(id)
	status, _ := w.openai.person(http.MethodDelete, "/organization/projects/"+project+"/api_keys/"+id, "")
	w.tell("people", "delete key %s: %d", id, status)
	for range looks {
		if w.sleep(6 * time.Minute) {
			_ = w.write(w.vault, "people", "tidy", map[string]any{"apply": true})
		}
	}
}

// cleanUp has tidy find, in a process that has returned no key yet, an orphan beside a
// static role whose key a person has deleted.
func (w *world) cleanUp() {
	v := w.vault
	if l, err := w.lease(v, "short"); err == nil {
		v.drop(l)
	}
	if !w.sleep(90 * time.Minute) {
		return
	}
	w.act(func() {
		w.sleep(5 * time.Minute)
		v.reload()
	})
	if role, ok := v.staticRoles()["adopted"]; ok {
		w.deleteKey(w.openai.projects[1], role.Current.ID, 2)
	}
}

// repairAdmin writes an admin key where the config's does not work any more.
func (w *world) repairAdmin() {
	current := w.vault.adminKeyID()
	if current != "" && !w.ledger.handed(current) {
		return
	}
	defer w.openai.weather.set(func(*weather) {}) // a person has kept the engine from its work
	config := map[string]any{}
	if current == "" { // restored from before the config was written
		config["api_endpoint"] = endpoint
	}
	w.configure(config)
}

// configure writes a new admin key to the config until that succeeds, unless the life is
// over first.
func (w *world) configure(config map[string]any) {
	for try := 0; try < 50; try++ {
		id, key := w.openai.sim.AddAdminKey("by hand")
		w.ledger.mu.Lock()
		w.ledger.configured[id] = true
		w.ledger.mu.Unlock()
		config["admin_api_key"], config["admin_api_key_id"] = key, id
		if w.write(w.vault, "operator", "config", config) == nil || !w.sleep(5*time.Minute) {
			return
		}
	}
}

// trouble is what befalls Vault.
func (w *world) trouble() {
	r := w.dice("trouble")
	v := w.vault
	var kept *snapshot
	for w.sleep(pause(r, 90*time.Minute)) {
		switch r.IntN(10) {
		case 0:
			v.restart(true, pause(r, 2*time.Minute))
		case 1:
			if w.Copy { // while the original does nothing, a copy cannot see it
				continue
			}
			if w.Namespace && r.IntN(2) == 0 {
				v.sealNamespace(pause(r, 10*time.Minute))
				continue
			}
			v.restart(false, pause(r, 10*time.Minute))
		case 2:
			v.stepDown(0)
		case 3:
			v.stepDown(pause(r, 20*time.Second))
		case 4, 5, 6: // the plugin dies at some step of what it does next
			if _, p, err := v.serving(); err == nil {
				p.mu.Lock()
				p.killAt = 1 + r.IntN(40)
				p.mu.Unlock()
			}
		case 7:
			if _, p, err := v.serving(); err == nil {
				p.kill()
			}
		case 8:
			if !w.Copy && v.isMounted() {
				kept = v.snapshot()
				w.tell("operator", "takes a snapshot")
			}
		case 9:
			if kept != nil && time.Since(kept.at) < 6*time.Hour && v.isMounted() && kept.mount == v.mount.Load() {
				v.restore(kept)
				w.ledger.anyScopes() // the roles are those of then
				w.ledger.forgotten(kept.at)
				if id := v.adminKeyID(); !w.openai.hasAdmin(id) { // it has been replaced since
					w.ledger.hand(id)
					w.repairAdmin()
				}
				kept = nil
				if v.tainted.Load() {
					w.untaint(v)
				}
			}
		}
	}
}

func (v *vault) isMounted() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.mounted
}

// clocks differ, and jump.
func (w *world) clocks() {
	r := w.dice("clocks")
	for w.sleep(pause(r, 4*time.Hour)) {
		across := r.IntN(2) == 0
		if across { // in the middle of requests
			w.openai.weather.slow(25 * time.Second)
			w.crowd(w.vault, roles[1].name, 4, func(l *lease) {
				w.sleep(time.Minute)
				w.checkLease(w.vault, l)
			})
			w.sleep(pause(r, 20*time.Second))
		}
		by := time.Duration(r.NormFloat64() * float64([]time.Duration{20 * time.Second, 10 * time.Minute, 3 * time.Hour}[r.IntN(3)]))
		w.tell("clock", "of Vault is set by %s", by)
		w.vault.setClock(by)
		if across {
			w.sleep(90 * time.Second)
			w.openai.weather.slow(0)
		}
		w.sleep(pause(r, 2*time.Hour))
		if across {
			w.openai.weather.burst(2)
			_, _ = w.lease(w.vault, roles[0].name)
			w.openai.weather.burst(0)
		}
		w.tell("clock", "of Vault is set right")
		w.vault.setClock(-by)
	}
}

// copy restores a snapshot as a second Vault, beside the first, for some hours.
func (w *world) copy() {
	r := w.dice("copy")
	if !w.sleep(pause(r, 4*time.Hour)) {
		return
	}
	c := newVault(w, "copy")
	w.tell("operator", "restores a snapshot as a second Vault")
	inProgress := 3
	if w.Clocks { // by another clock what has just begun is old
		inProgress = 0
	}
	w.openai.weather.slow(25 * time.Second)
	w.crowd(w.vault, roles[0].name, inProgress, nil) // which is in the copy's WAL
	var ended atomic.Bool
	defer ended.Store(true)
	// A copy can see only what it is shown: the original's use of what the copy has
	// superseded (docs/rotation.md).
	w.act(func() {
		last := map[string]string{}
		for i := 0; !ended.Load() && w.sleep(20*time.Second); i++ {
			for _, name := range []string{"made", "adopted"} {
				if i%3 == 0 {
					last[name] = cmp.Or(w.read(w.vault, name), last[name])
				}
				w.openai.use(last[name])
			}
			var c storedConfig
			entry(w.vault, "config", &c)
			w.openai.direct(http.MethodGet, "/organization/projects", c.Key, "")
		}
	})
	w.act(func() { // a copy can see only that it is used
		for began := time.Now(); time.Since(began) < 10*time.Minute && w.sleep(10*time.Second); {
			for _, l := range w.vault.allLeases() {
				w.checkLease(w.vault, l)
			}
		}
	})
	w.sleep(time.Duration(r.Int64N(int64(25 * time.Second))))
	c.load(w.vault.snapshot())
	w.openai.weather.slow(0)
	w.mu.Lock()
	w.copies = append(w.copies, c)
	w.mu.Unlock()
	c.start()
	if w.Faults > 0 && r.IntN(2) == 0 {
		w.hide() // also the original's keys
	}
	ends := time.Now().Add(pause(r, 8*time.Hour))
	for time.Now().Before(ends) && w.sleep(pause(r, 30*time.Minute)) {
		switch r.IntN(6) {
		case 0:
			_ = w.write(c, "copy's", "config/rotate", nil)
		case 1:
			_ = w.write(c, "copy's", "tidy", map[string]any{"apply": true})
		case 2:
			_ = w.write(c, "copy's", "rotate-role/made", nil)
		case 3:
			_, _ = w.lease(c, roles[r.IntN(len(roles))].name)
		case 4:
			c.restart(r.IntN(2) == 0, time.Minute)
		case 5:
			if ids := c.leaseIDs(); len(ids) > 0 {
				c.revoke(ids[r.IntN(len(ids))])
			}
		}
	}
	w.tell("operator", "ends the second Vault")
	c.end()
}

// setUpAgain configures a mount that was enabled after another's end.
func (w *world) setUpAgain(v *vault) {
	w.configure(map[string]any{"api_endpoint": endpoint})
	w.writeRoles(v)
}

// settle lets the world come to rest: OpenAI and storage work, and operators put right
// what people have broken. Then nothing may be left that nobody holds; and after the
// mount's end, nothing at all.
func (w *world) settle() {
	w.tell("world", "comes to rest")
	w.openai.calmDown()
	v := w.vault
	v.setClock(-time.Until(v.now()))
	w.untaint(v)
	w.repairAdmin()
	w.checkSecrets()
	for range 2 * calmTicks { // before a look by hand
		w.sleep(10 * time.Minute)
		w.checkOwed()
	}
	w.checkWorks()
	// Longer than any kept key, than a day's irrevocable lease and a longest lease. The looks
	// are not at the minute of an hourly rotation.
	rest := 10 * 24 * time.Hour
	for began := time.Now(); time.Since(began) < rest && !w.isBroken(); w.sleep(61 * time.Minute) {
		if all, _ := w.left(); len(all) == 0 {
			break
		}
		if int(time.Since(began).Hours())%6 == 0 {
			_ = w.write(v, "operator", "tidy", map[string]any{"apply": true})
		}
	}
	if all, ids := w.left(); len(all) > 0 && !w.isBroken() {
		w.violate(nothingLeft, ids, "%s after the world came to rest there is still: %s", rest, strings.Join(all, "; "))
	}
	w.checkAdmins()
	if w.isBroken() {
		return
	}
	began := w.told()
	for try := 0; try < 10; try++ {
		// A process that begins with the taint cannot tell a disable from what a mount
		// survives.
		_, _ = v.request(context.Background(), logical.ReadOperation, "config", nil)
		if v.disable() == nil {
			break
		}
		w.sleep(time.Minute)
	}
	if v.isMounted() {
		w.violate(nothingLeft, nil, "the mount cannot be disabled")
	}
	_, ids := w.left()
	if w.Namespace { // where a seal is the same to the engine, it names in its log what it leaves
		ids = w.unnamed(ids, began, "")
	} else if v.waited.Load() && strings.Contains(w.logged(began, ""), "reason=\"this process did not see the taint begin\"") {
		// No rollback of this disable's own has shown the taint.
		ids = w.unnamed(ids, began, "static role keeps its credential")
	}
	ids = slices.DeleteFunc(ids, func(id string) bool {
		t := w.ledger.thing(id)
		switch {
		case t == nil || t.kind != "admin key":
			return false
		case id == v.wiped: // of it the operator disposes
			return true
		}
		return len(w.unnamed([]string{id}, began, "mount is being disabled but a superseded admin key remains")) == 0
	})
	if len(ids) > 0 {
		w.violate(nothingLeft, ids, "after the mount was disabled there is still: %s", strings.Join(ids, ", "))
	}
	w.checkSecrets()
}
