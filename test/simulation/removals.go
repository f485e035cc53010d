package simulation

// This file owns the operators who delete roles, static roles and the config, and write
// them again later, and the one who tries another organization's admin key.
//
// What must stay true: a delete also ends grace periods; whatever it leaves at OpenAI has the
// same bound as everything else without a holder, except admin keys, which operators delete.

import (
	"context"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// removals deletes roles, static roles and the config, and writes them again. A copy does
// not know what its original's operators have deleted, so with one only roles are deleted;
// and the config only without spending, since usage_interval goes with it.
func (w *world) removals() {
	r := w.dice("removals")
	for w.sleep(pause(r, 4*time.Hour)) {
		switch r.IntN(6) {
		case 0, 1:
			w.removeRole(r)
		case 2, 3:
			if w.Readers > 0 && !w.Copy {
				w.removeStatic(r)
			}
		case 4:
			if !w.Spending && !w.Copy {
				w.removeConfig(r)
			}
		case 5:
			w.mistake()
		}
	}
}

// remove is a delete of an operator, which something may befall.
func (w *world) remove(path string, r *rand.Rand) error {
	if r.IntN(2) == 0 {
		w.spoil(w.vault, r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if r.IntN(8) == 0 { // who hangs up
		time.AfterFunc(time.Duration(r.Int64N(int64(5*time.Second))), cancel)
	}
	before := w.ledger.ends(path, time.Now().Add(time.Hour))
	resp, err := w.vault.request(ctx, logical.DeleteOperation, path, nil)
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if _, stands := w.vault.staticRoles()[strings.TrimPrefix(path, "static-roles/")]; err == nil || !stands && path != "config" || path == "config" && w.vault.adminKeyID() == "" {
		before = time.Now()
	}
	w.ledger.ends(path, before)
	w.tell("remover", "deletes %s: %v", path, err)
	return err
}

// removeRole deletes a role, whose leases live on. Meanwhile programs lease from it.
func (w *world) removeRole(r *rand.Rand) {
	i := r.IntN(len(roles))
	if r.IntN(2) == 0 && w.ledger.handed(w.openai.projects[2]) { // the last of its project, which a person has archived
		i = 3
	}
	role := roles[i].name
	w.crowd(w.vault, role, r.IntN(4), nil)
	w.sleep(time.Duration(r.Int64N(int64(2 * time.Second))))
	w.ledger.wrote(role, nil) // a colleague may write it again, with any scopes
	_ = w.remove("roles/"+role, r)
	if r.IntN(2) == 0 {
		_ = w.write(w.vault, "remover", "tidy", map[string]any{"apply": true})
	}
	w.sleep(pause(r, 40*time.Minute))
	for try := 0; try < 5; try++ {
		data := w.roleData(i)
		done := w.ledger.wrote(role, split(data["scopes"]))
		err := w.write(w.vault, "remover", "roles/"+role, data)
		if done(err == nil); err == nil || !w.sleep(10*time.Minute) {
			return
		}
	}
}

// removeStatic deletes a static role, and writes it again: as one with a new account, or
// for the account that it had adopted.
func (w *world) removeStatic(r *rand.Rand) {
	name := []string{"made", "adopted", "paused"}[r.IntN(3)]
	if r.IntN(3) == 0 { // what a rotation leaves goes, too
		_ = w.write(w.vault, "remover", "rotate-role/"+name, nil)
	}
	_ = w.remove("static-roles/"+name, r)
	w.sleep(pause(r, 40*time.Minute))
	for try := 0; try < 5; try++ {
		w.ledger.mu.Lock()
		delete(w.ledger.recreated, name) // another role has another day
		w.ledger.mu.Unlock()
		if w.write(w.vault, "remover", "static-roles/"+name, w.staticData(name)) == nil || !w.sleep(10*time.Minute) {
			return
		}
	}
}

// removeConfig deletes the config, and writes another with a key that a person has made.
// The operator disposes of the admin keys of the first.
func (w *world) removeConfig(r *rand.Rand) {
	mount := w.vault.mount.Load()
	if w.vault.tainted.Load() || w.vault.adminKeyID() == "" {
		return
	}
	_ = w.remove("config", r)
	if w.vault.adminKeyID() != "" {
		return // it stands, whatever the answer was
	}
	w.sleep(pause(r, 30*time.Minute))
	if w.vault.mount.Load() != mount {
		return
	}
	w.disposeOfAdmins()
	if w.vault.adminKeyID() == "" {
		w.configure(map[string]any{"api_endpoint": endpoint, "rotation_period": []string{"", "6h", "1h"}[r.IntN(3)], "rotation_grace_period": []string{"5m", "30m"}[r.IntN(2)]})
	}
	w.openai.weather.set(func(*weather) {}) // its absence has kept the engine from its work
}

// disposeOfAdmins leaves to the operator the admin keys that no config names.
func (w *world) disposeOfAdmins() {
	named := w.vault.held(w.vault.now())
	for _, k := range w.openai.sim.AdminKeys() {
		if t := w.ledger.thing(k.ID); t != nil && !named[k.ID] {
			w.ledger.hand(k.ID)
		}
	}
}

// mistake writes the admin key of another organization.
func (w *world) mistake() {
	names, _ := w.vault.storage().List(context.Background(), "role/") // in memory, nothing fails
	if len(names) == 0 || w.vault.adminKeyID() == "" {
		return
	}
	if w.write(w.vault, "remover", "config", map[string]any{"admin_api_key": w.openai.otherKey}) == nil {
		w.violate(onlyOwn, nil, "the config takes the admin key of another organization, although roles name projects of the first")
	}
}

// staticData is what a static role is written with.
func (w *world) staticData(name string) map[string]any {
	switch name {
	case "made":
		return map[string]any{"project_id": w.openai.projects[0], "rotation_period": "2h", "revocation_delay": "10m", "on_missing": "recreate"}
	case "adopted":
		return map[string]any{"project_id": w.openai.projects[1], "rotation_period": "6h", "on_missing": "recreate", "service_account_id": w.openai.batch()}
	default: // its key expires, and its account stays
		return map[string]any{"project_id": w.openai.projects[0], "rotation_period": "1h", "key_ttl": "2h", "disable_automated_rotation": true}
	}
}

// batch is the account that a static role adopts. A person makes another if somebody has
// deleted it.
func (o *openai) batch() string {
	for _, a := range o.sim.Accounts() {
		if a.ProjectID == o.projects[1] && a.Name == "batch" {
			return a.ID
		}
	}
	return o.sim.AddServiceAccount(o.projects[1], "batch")
}

// ends notes until when a delete of a static role or the config may end keys that were
// replaced before, and returns what was noted last.
func (l *ledger) ends(path string, at time.Time) (before time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before, l.removed[path] = l.removed[path], at
	return before
}
