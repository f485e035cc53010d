package simulation

// This file owns how long things at OpenAI live: what nobody holds is soon deleted,
// and what was replaced lives on for its grace.
//
// What must stay true: an excuse is for one thing and for one reason; time counts only
// while OpenAI, storage and Vault let the engine do its work.

import (
	"context"
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

const (
	// calmTicks is for how many looks in a row, ten minutes apart and in calm, something
	// may live that nobody holds.
	calmTicks = 4
	// latest is how late the worker may be, which comes each minute.
	latest = 6 * time.Minute
	// retried is how late a rotation may be that has failed: it is retried within the hour.
	retried = 75 * time.Minute
	// aside is how much sooner than its grace period or revocation_delay after its successor
	// was stored a key may be deleted: that counts from the create of the new one, before it
	// is looked at.
	aside = time.Minute
)

// owed is what is known of a thing beyond who made it.
type owed struct {
	excused bool // nobody can know that it is held by nobody
	aged    bool // by the clock of its Vault it seems older than it is
	calm    int  // looks in a row at which nobody held it
}

// answered takes note of credentials that the plugin has returned. Until Vault has
// stored the lease nobody knows of them. A client that had gone before is another
// matter: the engine could know.
func (l *ledger) answered(resp *logical.Response, late bool) {
	if resp == nil || resp.Secret == nil || resp.Data == nil || late {
		return
	}
	account, _ := resp.Data["service_account_id"].(string)
	key, _ := resp.Data["api_key_id"].(string)
	l.excuse(true, account, key)
}

// excuse says whether it is nobody's fault that things live which nobody holds.
func (l *ledger) excuse(excused bool, ids ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		if t := l.things[id]; t != nil {
			t.excused, t.calm = excused, 0
		}
	}
}

// excuseNamed excuses what a WAL entry names whose deletion was the last that a process
// did: the answer was on its way.
func (l *ledger) excuseNamed(entry string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, t := range l.things {
		if strings.Contains(entry, `"`+t.name+`"`) || strings.Contains(entry, `"`+id+`"`) {
			t.excused = true
		}
	}
	for _, t := range l.things {
		if account := l.things[t.account]; account != nil && account.excused {
			t.excused = true
		}
	}
}

// excuseOmitted excuses an account whose key expires and that a listing leaves out: two runs
// in a row may end its WAL entry, and tidy finds it when its key has expired.
func (l *ledger) excuseOmitted(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.things {
		if (t.id == id || t.account == id) && t.kind != "admin key" {
			t.excused = true
		}
	}
}

// excuseAged excuses what was made just before a step of its Vault's clock: by that clock
// it is older than OpenAI's servers may lag, so a 404 or a listing seems final. Tidy finds
// it when its key has expired; an admin key is looked for twice, by another clock. note
// excuses what is made just after a step: its WAL entry is from before.
func (l *ledger) excuseAged(v *vault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.things {
		if t.by != nil && t.by.v == v && t.kind != "admin key" && time.Since(t.at) < 5*time.Minute {
			t.aged = true
		}
	}
}

// excuseLost excuses what Vault has forgotten by the restore of a snapshot. If that is from
// before the mount had a tag, no mount has the old one, and nothing finds what carries it.
func (v *vault) excuseLost() {
	held := v.held(time.Now())
	var mount struct{}
	tagged := entry(v, "mount", &mount)
	l := &v.w.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, t := range l.things {
		if t.by.v == v && !held[id] {
			t.excused = true
			l.byHand[id] = l.byHand[id] || !tagged
		}
	}
}

// held are the IDs of what somebody holds: a lease that has not ended, a static role,
// the config; of what was replaced until its time is over.
func (v *vault) held(now time.Time) map[string]bool {
	held, _ := v.stock()
	v.mu.Lock()
	for _, l := range v.leases {
		if !l.revoking {
			held[l.account()], held[l.keyID()] = true, true
		}
	}
	v.mu.Unlock()
	for _, r := range v.staticRoles() {
		held[r.Account], held[r.Current.ID] = true, true
		for _, k := range r.Superseded {
			held[k.ID] = now.Before(k.DeleteAfter) || !k.KeptAt.IsZero()
		}
	}
	var c storedConfig
	entry(v, "config", &c)
	for _, k := range c.Superseded {
		held[k.ID] = now.Before(k.DeleteAfter) || k.Kept != "" || k.Elsewhere || k.Unchecked
	}
	held[c.ID] = true
	return held
}

// calmFor reports whether for a while nothing has kept the engine from its work.
func (w *world) calmFor(d time.Duration) bool {
	v := w.vault
	id := v.adminKeyID()
	v.mu.Lock()
	serves := v.term != nil && v.mounted
	v.mu.Unlock()
	return serves && !v.tainted.Load() && id != "" && w.openai.hasAdmin(id) && w.openai.weather.calmFor(d)
}

// checkOwed looks for what lives although nobody holds it.
func (w *world) checkOwed() {
	if !w.calmFor(10 * time.Minute) {
		return
	}
	v := w.vault
	if w.Pools {
		stock, _ := v.stock()
		w.checkPools(stock)
	}
	w.checkDue()
	held := v.held(v.now())
	check := func(id, account, project string) {
		w.ledger.mu.Lock()
		t := w.ledger.things[id]
		if t == nil || t.by.v != v || t.excused || t.aged || w.ledger.byHand[id] || w.ledger.byHand[account] || w.ledger.byHand[project] || held[id] {
			if t != nil {
				t.calm = 0
			}
			w.ledger.mu.Unlock()
			return
		}
		t.calm++
		calm, made := t.calm, t.at
		w.ledger.mu.Unlock()
		if calm >= calmTicks {
			w.violate(soonDeleted, []string{id}, "the %s %s (%s) of %s is alive, and nobody has held it for %d0 minutes of calm", t.kind, id, t.name, made.UTC().Format(time.DateTime), calm)
		}
	}
	for _, a := range w.openai.sim.Accounts() {
		check(a.ID, "", a.ProjectID)
		for _, k := range a.Keys {
			check(k.ID, a.ID, a.ProjectID)
		}
	}
	for _, k := range w.openai.sim.AdminKeys() {
		check(k.ID, "", "")
	}
}

// checkDue looks for rotations of static roles that are due although nothing has kept the
// engine from its work.
func (w *world) checkDue() {
	_, p, err := w.vault.serving()
	if err != nil || time.Since(p.began) < retried || !w.calmFor(retried) || p.v.jumped(time.Now().Add(-retried)) {
		return
	}
	for name, r := range w.vault.staticRoles() {
		if !r.Paused && w.vault.now().Sub(r.Next) > retried && !w.ledger.byPerson(r.Account, r.Current.ID, r.Project) && w.openai.knew(retried, r.Account, r.Current.ID) {
			w.violate(calmWorks, []string{r.Account, r.Current.ID}, "static role %s should have been rotated at %s", name, r.Next.UTC().Format(time.DateTime))
		}
	}
}

// checkWorks has an operator write a role, and a program lease from it, where no limit is
// in the way.
func (w *world) checkWorks() {
	if w.Spending || w.isBroken() || w.vault.tainted.Load() {
		return
	}
	v := w.vault
	try := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err := w.write(v, "operator", "roles/last", map[string]any{"project_id": w.openai.projects[0], "ttl": "20m", "max_ttl": "1h"})
		if err != nil {
			return err
		}
		l, _, err := v.issue(ctx, "last")
		if err != nil {
			return err
		}
		w.checkLease(v, l)
		if err := v.renew(ctx, l.id, 30*time.Minute); err != nil {
			return err
		}
		w.checkLease(v, l)
		return v.revokeNow(l.id)
	}
	err := try()
	// Vault may fail to store a lease, and a planned crash or storage fault may still come.
	for n := 0; n < 5 && err != nil; n++ {
		time.Sleep(2 * time.Minute)
		err = try()
	}
	w.actors.Wait()
	if err != nil {
		w.violate(calmWorks, nil, "at rest, a role is not written, or a credential of it not leased, renewed and revoked: %v", err)
	}
}

// replaced takes note of a write of storage that puts another key in the place of one.
func (p *process) replaced(entry *logical.StorageEntry) {
	note := func(was, is string, shortest time.Duration) {
		if was == "" || was == is {
			return
		}
		p.w.ledger.mu.Lock()
		defer p.w.ledger.mu.Unlock()
		p.w.ledger.graces[was] = grace{p.v, entry.Key, time.Now(), shortest}
	}
	stored, _ := p.store.Get(context.Background(), entry.Key) // in memory, nothing fails
	if stored == nil {
		return
	}
	if strings.HasPrefix(entry.Key, "static-role/") {
		var was, is storedStatic
		if json.Unmarshal(stored.Value, &was) == nil && json.Unmarshal(entry.Value, &is) == nil {
			note(was.Current.ID, is.Current.ID, is.Delay-aside)
			p.w.checkRecreated(p, strings.TrimPrefix(entry.Key, "static-role/"), was, is)
		}
	}
	if entry.Key == "config" {
		var was, is storedConfig
		if json.Unmarshal(stored.Value, &was) == nil && json.Unmarshal(entry.Value, &is) == nil {
			note(was.ID, is.ID, is.Grace-aside)
			if is.Grace < was.Grace { // also of what was replaced since that was asked for
				p.w.ledger.shortened(is.Grace)
			}
			p.w.checkAdminKey(p, is)
		}
	}
}

// grace is since when, and for how long at least, a replaced key lives on.
type grace struct {
	v        *vault
	of       string // the entry
	since    time.Time
	shortest time.Duration
}

// shortened notes that a grace period was written.
func (l *ledger) shortened(to time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, g := range l.graces {
		if g.of == "config" {
			g.shortest = min(g.shortest, to-aside)
			l.graces[id] = g
		}
	}
}

// shorten writes a grace period, which also applies to what was replaced already if it is
// shorter (docs/rotation.md).
func (w *world) shorten(who string, to time.Duration) {
	w.ledger.shortened(to)
	_ = w.write(w.vault, who, "config", map[string]any{"rotation_grace_period": to.String()})
}

// checkLate checks that an admin key which is deleted was so in time, whatever went on
// at other endpoints.
func (w *world) checkLate(p *process, id string) {
	var c storedConfig
	entry(p.v, "config", &c)
	for _, k := range c.Superseded {
		late := p.v.now().Sub(k.DeleteAfter)
		if k.ID != id || k.Kept != "" || k.Elsewhere || k.Unchecked || k.Hurried || late < latest || w.ledger.handed(id) {
			continue
		}
		if w.openai.weather.adminCalmFor(late) && time.Since(p.began) > late && !p.v.jumped(w.began) && p.v == w.vault {
			w.violate(soonDeleted, []string{id}, "%s deletes the admin key %s %s late", p.name, id, late)
		}
	}
}

// checkGrace checks that a key which is deleted was not replaced just now.
func (w *world) checkGrace(p *process, id string) {
	w.ledger.mu.Lock()
	g, known := w.ledger.graces[id]
	ended := !g.since.After(w.ledger.removed[strings.Replace(g.of, "static-role/", "static-roles/", 1)]) // with what named it
	w.ledger.mu.Unlock()
	if !known || ended || g.v != p.v || p.v.ends() || p.v.jumped(g.since.Add(-time.Hour)) || w.ledger.handed(id) {
		return
	}
	// The engine's times are in seconds.
	if lived := time.Since(g.since); lived < g.shortest-2*time.Second {
		w.violate(graceKept, []string{id}, "%s deleted %s, %s after it was replaced", p.name, id, lived)
	}
}

// checkAdminKey checks that an admin key works that is being activated.
func (w *world) checkAdminKey(p *process, c storedConfig) {
	answer := w.openai.direct(http.MethodGet, "/organization/admin_api_keys/"+c.ID, c.Key, "")
	if answer.Code == http.StatusUnauthorized && !w.ledger.handed(c.ID) && p.v == w.vault && !p.dead.Load() {
		w.violate(adminWorks, []string{c.ID}, "%s activates %s, which is refused: %s", p.name, c.ID, answer.Body.String())
	}
}

// told counts the events so far.
func (w *world) told() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.story)
}

// unreadRole is in the log of a mount that ends while storage fails: all that it can name
// is the role, whose name begins those of its account and keys.
var unreadRole = regexp.MustCompile(`static role could not be read.* static_role=(\S+)`)

// logged returns the lines of the log since then that contain a text.
func (w *world) logged(since int, text string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var lines []string
	for _, e := range w.story[min(since, len(w.story)):] {
		if line := e.String(); strings.HasPrefix(e.text, "logs ") && strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// unnamed returns those of the things left at the end of a mount that no line of the log
// since then names which contains a text.
func (w *world) unnamed(left []string, since int, text string) []string {
	said := w.logged(since, text)
	var prefixes []string
	for _, found := range unreadRole.FindAllStringSubmatch(said, -1) {
		prefixes = append(prefixes, "vault-static-"+found[1]+"-")
	}
	if strings.Contains(said, "static roles could not be listed") {
		prefixes = append(prefixes, "vault-static-")
	}
	names := func(t *thing) bool {
		return t != nil && (strings.Contains(said, t.id) || t.name != "" && strings.Contains(said, t.name) ||
			slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(t.name, prefix) }))
	}
	return slices.DeleteFunc(slices.Clone(left), func(id string) bool {
		t := w.ledger.thing(id)
		return t == nil || names(t) || names(w.ledger.thing(t.account))
	})
}

// checkEnd uses the key of a lease at the moment at which it ends.
func (w *world) checkEnd(v *vault, l *lease) {
	v.mu.Lock()
	late := time.Now().Add(v.offset).Sub(l.expire)
	current := v.leases[l.id] == l && !l.revoking && !l.irrevocable
	v.mu.Unlock()
	if current && late >= 0 && late < time.Second {
		w.checkKey(v, l)
	}
}
