package simulation

// This file owns what befalls the keys and accounts of static roles at OpenAI: people
// delete them, and OpenAI may not know them for a while.
//
// What must stay true: what a person has deleted, or OpenAI does not know at two proofs ten
// minutes apart, may be created again; nothing else.

import (
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-openai/client/openaitest"
)

const (
	// betweenProofs is how long OpenAI does not know what counts as missing, and
	// recreateEvery how often a role's key or account may be created again, each by the
	// clocks of two nodes. The engine's times are in seconds.
	betweenProofs = 10*time.Minute - 2*nodeSkew
	recreateEvery = 24*time.Hour - 2*nodeSkew - 2*time.Second
)

// strays is a person who deletes by hand what static roles use, again and again.
func (w *world) strays() {
	r := w.dice("strays")
	for w.sleep(pause(r, 4*time.Hour)) {
		name := []string{"made", "made", "adopted", "paused"}[r.IntN(4)]
		switch r.IntN(4) {
		case 0, 1:
			for range 1 + r.IntN(3) {
				role, ok := w.vault.staticRoles()[name]
				if !ok {
					break
				}
				if role.Adopted || r.IntN(2) == 0 {
					w.deleteKey(role.Project, role.Current.ID, 0)
				} else {
					w.deleteAccount(role.Project, role.Account)
				}
				w.sleep(pause(r, time.Hour))
			}
		case 2, 3:
			if soon := time.Until(w.vault.staticRoles()[name].Next) - soonBefore; soon < 4*time.Hour && r.IntN(4) > 0 {
				w.sleep(soon)
			}
			w.vanish(name, []time.Duration{2 * time.Minute, 8 * time.Minute, time.Hour, 3 * time.Hour}[r.IntN(4)], r.IntN(3) > 0)
		}
	}
}

// soonBefore is how long before the engine looks at a role that changes what it sees.
const soonBefore = 20 * time.Second

// compared has something be wrong when the engine compares a role of a project with OpenAI's
// listings.
func (w *world) compared(name, id string) {
	r := w.dice("compared " + name)
	for w.sleep(time.Hour) {
		var project struct {
			Checked time.Time `json:"static_roles_checked_at"`
		}
		entry(w.vault, "project/"+id, &project)
		due := time.Until(project.Checked.Add(24 * time.Hour))
		if project.Checked.IsZero() || due < 0 || due > 2*time.Hour || !w.sleep(due-soonBefore) {
			continue
		}
		switch role := w.vault.staticRoles()[name]; r.IntN(5) {
		case 0:
			w.hide()
		case 1, 2: // nothing but the listing is short
			w.openai.mu.Lock()
			w.openai.short = []string{role.Account, role.Current.ID}[r.IntN(2)]
			w.openai.mu.Unlock()
		case 3, 4:
			w.vanish(name, []time.Duration{2 * time.Minute, time.Hour}[r.IntN(2)], name != "adopted" && r.IntN(2) == 0)
		}
	}
}

// vanish has OpenAI not know a static role's key, or its account with all keys, until it was
// replaced, or for some time.
func (w *world) vanish(name string, d time.Duration, account bool) {
	role, ok := w.vault.staticRoles()[name]
	if !ok || w.ledger.byPerson(role.Account, role.Current.ID) {
		return
	}
	lost := []string{role.Current.ID}
	if account {
		lost = append(lost, role.Account)
		w.ledger.mu.Lock()
		for _, t := range w.ledger.things {
			if t.account == role.Account && t.id != role.Current.ID {
				lost = append(lost, t.id)
			}
		}
		w.ledger.mu.Unlock()
	}
	o := w.openai
	o.mu.Lock()
	// Not again within the hour: two proofs may be of two absences.
	if o.knowsAll || slices.ContainsFunc(lost, func(id string) bool { return !o.vanished[id].IsZero() || time.Since(o.found[id]) < time.Hour }) {
		o.mu.Unlock()
		return
	}
	for _, id := range lost {
		o.vanished[id] = time.Now()
	}
	o.mu.Unlock()
	w.tell("OpenAI", "does not know %s of static role %s for %s", strings.Join(lost, ", "), name, d)
	w.ledger.excuse(true, lost...) // what is deleted meanwhile is proven not to exist
	w.sleep(d)
	o.known(lost...)
	w.tell("OpenAI", "knows %s again", strings.Join(lost, ", "))
}

func (o *openai) known(ids ...string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, id := range ids {
		delete(o.vanished, id)
		o.found[id] = time.Now()
	}
}

// knowAll has nothing be unknown until done: the end of a mount deletes at once.
func (o *openai) knowAll() (done func()) {
	set := func(all bool) {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.knowsAll = all
		clear(o.vanished)
	}
	set(true)
	return func() { set(false) }
}

// unknown reports whether OpenAI does not know what a path names.
func (o *openai) unknown(path string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.vanished) > 0 && slices.ContainsFunc(strings.Split(path, "/"), func(id string) bool { return !o.vanished[id].IsZero() })
}

// knew reports whether things exist, and OpenAI has known them for so long.
func (o *openai) knew(d time.Duration, ids ...string) bool {
	return !slices.ContainsFunc(ids, func(id string) bool {
		o.mu.Lock()
		found := time.Since(o.found[id])
		o.mu.Unlock()
		return found < d || o.gone(id)
	})
}

// gone reports whether something does not exist at OpenAI, or was not known there for as
// long as two proofs take.
func (o *openai) gone(id string) bool {
	o.mu.Lock()
	since := o.vanished[id]
	o.mu.Unlock()
	exists := slices.ContainsFunc(o.sim.Accounts(), func(a openaitest.Account) bool { return a.ID == id }) ||
		slices.ContainsFunc(o.sim.Keys(), func(k openaitest.Key) bool { return k.ID == id })
	return !exists || !since.IsZero() && time.Since(since) >= betweenProofs
}

// checkRecreated checks a write of a static role that says its key or account was created
// again.
func (w *world) checkRecreated(p *process, name string, was, is storedStatic) {
	if is.Recreated.IsZero() || is.Recreated.Equal(was.Recreated) || p.v != w.vault {
		return
	}
	w.ledger.mu.Lock()
	before := w.ledger.recreated[name]
	w.ledger.recreated[name] = recreation{time.Now(), p.loads}
	delete(w.ledger.graces, was.Current.ID) // what does not exist has none
	w.ledger.mu.Unlock()
	missing := was.Current.ID
	if is.Account != was.Account {
		missing = was.Account
	}
	if !w.openai.gone(missing) && !p.v.jumped(time.Now().Add(-betweenProofs)) {
		w.violate(recreatedRightly, []string{missing, was.Current.ID}, "%s has created the key or account of static role %s again, although %s exists", p.name, name, missing)
	}
	if since := time.Since(before.at); since < recreateEvery && before.loads == p.loads && !p.v.jumped(before.at) {
		w.violate(recreatedRightly, []string{missing, is.Current.ID}, "%s has created the key or account of static role %s again, %s after the last time", p.name, name, since)
	}
	// OpenAI finds it after all: it must be deleted now.
	w.openai.mu.Lock()
	defer w.openai.mu.Unlock()
	for id := range w.openai.vanished {
		t := w.ledger.thing(id)
		switch {
		case id == was.Account, id == was.Current.ID:
			w.ledger.excuse(false, id)
		case t == nil || t.account != was.Account:
			continue
		}
		delete(w.openai.vanished, id)
	}
}

// recreation is when a static role's key or account was created again, and how many
// restores its Vault had seen.
type recreation struct {
	at    time.Time
	loads int64
}
