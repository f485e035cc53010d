package simulation

// This file owns what must always hold, and what is known for checking it: who made
// and who deleted each thing at OpenAI, and who has asked for that.
//
// What must stay true: a check that excuses something says why.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// The invariants, by name.
const (
	leaseWorks   = "a living lease's key works"
	nothingLeft  = "nothing is left that nobody holds"
	adminWorks   = "the admin key in storage works"
	fewAdmins    = "few admin keys are alive"
	staticWorks  = "static-creds answers with a key that works"
	onlyOwn      = "nothing of others is touched"
	copyHarmless = "a copy ends nothing of its original"
	callsEnd     = "every request ends"
	fewCalls     = "calls stay within a bound"
	staysNarrow  = "a narrowed role never issues wide"
	noSecrets    = "no secret is in a log, an error or a storage key"
	soonDeleted  = "what nobody holds is soon deleted"
	graceKept    = "a replaced key lives on for its grace"
	poolsBounded = "pools hold what their roles allow"

	blocksHold   = "a block holds"
	blocksRight  = "only what is spent blocks"
	switchRight  = "the switch deletes only keys of its role"
	guarded      = "a guardrail holds"
	reportsRight = "reports are right to the digit"

	calmWorks        = "in calm, the engine does its work"
	recreatedRightly = "only what is missing is created again"
)

// invariants says what each means.
var invariants = map[string]string{
	leaseWorks:   "While Vault has a lease that has not ended, OpenAI accepts its key, unless a person has ended it at OpenAI.",
	nothingLeft:  "Once OpenAI and storage work again, each account, key and admin key that the mount has made and that no lease, role or config holds is deleted.",
	adminWorks:   "OpenAI accepts the admin key in the config, unless a person has deleted it.",
	fewAdmins:    "At most a dozen admin keys of the mount are alive at any time.",
	staticWorks:  "The key that static-creds answers with is accepted, unless a person has ended it at OpenAI.",
	onlyOwn:      "A mount deletes and changes only what it has made itself, and the admin key that was configured, and nothing in another organization.",
	copyHarmless: "A second Vault on a copy of the storage ends nothing that the original holds, but what its own Vault has asked it to revoke.",
	callsEnd:     "Each request to the plugin returns in the time that Vault and its clients wait.",
	fewCalls:     "The calls to OpenAI and to storage are bounded by what was asked of the plugin.",
	staysNarrow:  "A key that is issued after a role was narrowed has no more scopes than the role.",
	noSecrets:    "No key is in a log line, in an error, in a warning, or in a storage key.",
	soonDeleted:  "Nothing that the mount has made outlives its last holder by half an hour in which OpenAI, storage and Vault work, unless nobody could know.",
	graceKept:    "An admin key is deleted no sooner than rotation_grace_period after its successor was stored, a static role's key no sooner than revocation_delay.",
	poolsBounded: "In calm, no more credentials wait for a role than its pool_size, and none longer than its pool_max_age; none is ever leased that has waited longer.",

	blocksHold:   "From the moment at which a block is complete to the end of its window or a raised limit, its role issues and renews nothing, and static-creds returns nothing.",
	blocksRight:  "A block says no more than what the keys of its role have cost in the window, and that is its limit or more.",
	switchRight:  "spend_action=revoke deletes keys of roles that have reached their limit, and no other.",
	guarded:      "With a guardrail on, no key is returned for a project that OpenAI has never said to be bounded, nor for one that was refused until OpenAI says yes; one that has it is not refused.",
	reportsRight: "In a usage report, rows, unattributed and other roles add up to what OpenAI has charged, and no key is of another role than the one that had it.",

	calmWorks:        "Once OpenAI, storage and Vault work, a role can be written, and credentials of it leased, renewed and revoked; and no static role waits for longer than failures are retried for a rotation that is due.",
	recreatedRightly: "A static role's key or account is created again only if a person has deleted it or two proofs say so, and at most once a day.",
}

const (
	// callBound is a create's 60 s and 30 s of cleaning up, and slow storage.
	callBound = 2 * time.Minute
	// unloadBound is the 15 s of a drain, the 30 s for naming what it leaves, the 15 s and
	// 5 s of static roles at the end of a mount, and the end of the workers.
	unloadBound = 100 * time.Second
	// window, and what may be called in it beyond what requests explain.
	window        = 10 * time.Minute
	callsAtRest   = 3000 // a drain tries what has failed for 80 s of each minute
	callsForEach  = 25
	opsAtRest     = 60_000
	maxAdminKeys  = 12
	youngestKnown = 4 * time.Minute
)

// thing is an account, a key or an admin key at OpenAI.
type thing struct {
	id, kind, name string
	project        string
	account        string // of a key
	scopes         []string
	by             *process // nil: a person
	at             time.Time
	lost           bool // the answer of its create was, of an admin key
	goneBy         *process
	gone           bool
	owed
}

type ledger struct {
	mu         sync.Mutex
	things     map[string]*thing
	byHand     map[string]bool // what people have ended, archived or changed
	configured map[string]bool // admin keys that were written to a config
	said       []string        // what callers were told
	issued     int
	trouble    time.Time
	scopes     map[string][]scopesOf // by role, of the original
	graces     map[string]grace      // by the ID of a key that was replaced
	crowded    map[string]int        // by role: looks in a row at too full or old a pool
	recreated  map[string]recreation // by static role
	removed    map[string]time.Time  // when an operator deleted it, by path
}

// scopesOf is one state of a role, from a write's beginning on.
type scopesOf struct {
	from, until time.Time
	scopes      []string
}

// load is what a process has called in the present window.
type load struct {
	began            time.Time
	calls, ops, asks int
	pooled           int // creates for pools
}

// isOf reports whether the mount of a process, or that of which it is a copy, has made
// something. The next mount on a path has another tag.
func (t *thing) isOf(p *process) bool {
	return t != nil && (t.by.v != p.v || t.by.mount == p.mount)
}

func (l *ledger) leased(*lease) { l.mu.Lock(); l.issued++; l.mu.Unlock() }
func (l *ledger) leases() int   { l.mu.Lock(); defer l.mu.Unlock(); return l.issued }

// troubled notes that OpenAI does not answer for some time.
func (l *ledger) troubled(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trouble = time.Now().Add(d)
}

// hand notes that a person has ended something.
func (l *ledger) hand(ids ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		l.mark(id)
	}
}

func (l *ledger) mark(id string) {
	l.byHand[id] = true
}

func (l *ledger) handed(ids ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(ids, func(id string) bool { return l.byHand[id] })
}

// byPerson reports whether a person has ended one of these, or their project.
func (l *ledger) byPerson(ids ...string) bool {
	return l.handed(ids...) || slices.ContainsFunc(ids, func(id string) bool {
		t := l.thing(id)
		return t != nil && l.handed(t.project)
	})
}

// forgotten notes that a restored Vault knows nothing of what it has made since.
func (l *ledger) forgotten(since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.things {
		if t.at.After(since) {
			l.markForgotten(t)
		}
	}
}

// markForgotten leaves to people what a restored Vault knows nothing of, if that has no
// end that anybody sees: admin keys, and what belongs to static roles. The caller holds mu.
func (l *ledger) markForgotten(t *thing) {
	if t.kind == "admin key" || strings.HasPrefix(t.name, "vault-static") {
		l.mark(t.id)
	}
}

// note takes note of what a call has done, and checks it.
func (l *ledger) note(p *process, r *http.Request, body []byte, answer *httptest.ResponseRecorder, lost bool) {
	if answer.Code != http.StatusOK || r.Method == http.MethodGet {
		return
	}
	segments := strings.Split(strings.TrimPrefix(r.URL.Path, "/v1/organization/"), "/")
	project := ""
	if segments[0] == "projects" && len(segments) > 1 {
		project = segments[1]
	}
	var asked struct {
		Name   string
		Scopes []string
	}
	var got struct {
		ID     string
		Name   string
		APIKey *struct{ ID, Name string } `json:"api_key"`
	}
	_ = json.Unmarshal(body, &asked) // a DELETE has none
	if err := json.Unmarshal(answer.Body.Bytes(), &got); err != nil {
		return
	}
	last := segments[len(segments)-1]
	jumped := p.v.jumped(time.Now().Add(-2 * time.Minute))
	l.mu.Lock()
	switch {
	case r.Method == http.MethodPost && last == "service_accounts":
		l.things[got.ID] = &thing{id: got.ID, kind: "account", name: got.Name, project: project, by: p, at: time.Now()}
		if got.APIKey != nil {
			l.things[got.APIKey.ID] = &thing{id: got.APIKey.ID, kind: "key", name: got.APIKey.Name, project: project, account: got.ID, by: p, at: time.Now()}
		}
	case r.Method == http.MethodPost && last == "api_keys":
		l.things[got.ID] = &thing{id: got.ID, kind: "key", name: got.Name, project: project, account: segments[3], scopes: asked.Scopes, by: p, at: time.Now()}
	case r.Method == http.MethodPost && len(segments) > 2 && segments[len(segments)-2] == "api_keys":
		t := l.things[last]
		if t != nil && asked.Scopes != nil {
			t.scopes = asked.Scopes
		}
		if l.mu.Unlock(); !t.isOf(p) {
			p.w.violate(onlyOwn, []string{last}, "%s changed the key %s, which its mount had not made", p.name, last)
		}
		return
	case r.Method == http.MethodPost && last == "admin_api_keys":
		l.things[got.ID] = &thing{id: got.ID, kind: "admin key", name: got.Name, by: p, at: time.Now(), lost: lost}
	case r.Method == http.MethodDelete:
		t := l.things[last]
		known := t.isOf(p) || l.configured[last]
		if t != nil {
			t.gone, t.goneBy = true, p
		}
		l.mu.Unlock()
		if !known {
			p.w.violate(onlyOwn, []string{last}, "%s deleted %s, which its mount had not made", p.name, last)
			return
		}
		p.w.checkGrace(p, last)
		p.w.checkLate(p, last)
		p.w.checkDeletion(p, last)
		return
	}
	if p.dead.Load() && p.loads != p.v.loads.Load() { // an older storage has been restored since the call
		for id, t := range l.things {
			if id == got.ID || t.account == got.ID {
				t.excused = true
				l.markForgotten(t)
			}
		}
	}
	if t := l.things[got.ID]; t != nil && t.at.Equal(time.Now()) && t.kind != "admin key" && jumped {
		t.aged = true
		if got.APIKey != nil {
			l.things[got.APIKey.ID].aged = true
		}
	}
	l.mu.Unlock()
}

// isYoung reports whether a call is for something made just now.
func (l *ledger) isYoung(r *http.Request, age time.Duration) bool {
	return r.Method != http.MethodPost && l.youngerThan(path.Base(r.URL.Path), age)
}

// lags reports whether a listing may not show something yet.
func (l *ledger) lags(id string) bool { return l.youngerThan(id, 5*time.Minute) }

// youngerThan reports whether something was made so recently.
func (l *ledger) youngerThan(id string, age time.Duration) bool {
	t := l.thing(id)
	return t != nil && time.Since(t.at) < age
}

func (l *ledger) thing(id string) *thing {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t := l.things[id]; t != nil {
		copied := *t
		return &copied
	}
	return nil
}

// checkDeletion checks that what a process has just deleted was not held.
func (w *world) checkDeletion(p *process, id string) {
	for _, v := range w.vaults() {
		own := v == p.v
		if !own && v != w.vault {
			continue // what the original ends is not held against it by a copy
		}
		holder := v.holder(id)
		if holder == "" {
			continue
		}
		switch {
		case (p.v.jumped(w.began) || v.jumped(w.began)) && w.openai.keysExpired(id): // checkLease's to judge
		case !own:
			if !p.v.asked(id) {
				w.violate(copyHarmless, []string{id}, "%s deleted %s, which the original holds: %s", p.name, id, holder)
			}
		case w.money.isDoomed(id): // its role has spent too much
		case p.deposed.Load() != nil && v.asked(id): // the replaced node was asked for it
		case p.loads != p.v.loads.Load(): // it was on its way when an older storage was restored
		case w.openai.expired(id): // its end is another matter: checkLease's
		default:
			invariant := leaseWorks
			if w.money.switches(p.v) {
				invariant = switchRight
			} else if strings.HasPrefix(holder, "static") {
				invariant = staticWorks
			} else if strings.HasPrefix(holder, "config") {
				invariant = adminWorks
			}
			w.violate(invariant, []string{id}, "%s deleted %s, which is held: %s", p.name, id, holder)
		}
	}
}

func (v *vault) asked(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ended[id]
}

// holder says who holds an account, a key or an admin key, "" for nobody: a lease that
// has not ended, a static role's current key, the config.
func (v *vault) holder(id string) string {
	v.mu.Lock()
	for _, l := range v.leases {
		if (l.account() == id || l.keyID() == id) && !l.revoking && time.Now().Add(v.offset).Before(l.expire) {
			v.mu.Unlock()
			// Its end is another matter: checkLease's. And an account without the key that a
			// person has deleted shows no use of it.
			if v.w.openai.expired(l.keyID()) || v.w.ledger.handed(l.keyID()) {
				return ""
			}
			return "lease " + l.id
		}
	}
	v.mu.Unlock()
	if v.ends() { // static roles end with their mount
		return ""
	}
	for name, r := range v.staticRoles() {
		if r.Current.ID == id || (r.Account == id && !r.Adopted) {
			return "static role " + name
		}
	}
	if v.adminKeyID() == id {
		return "config"
	}
	return ""
}

// storedStatic is what is read here of a static role's entry.
type storedStatic struct {
	Project   string        `json:"project_id"`
	Account   string        `json:"service_account_id"`
	Adopted   bool          `json:"adopted"`
	Recreated time.Time     `json:"recreated_at"`
	Paused    bool          `json:"disable_automated_rotation"`
	Next      time.Time     `json:"next_rotation"`
	Delay     time.Duration `json:"revocation_delay"`
	Current   struct {
		ID string `json:"id"`
	} `json:"current_key"`
	Superseded []struct {
		ID          string    `json:"id"`
		DeleteAfter time.Time `json:"delete_after"`
		KeptAt      time.Time `json:"kept_at"`
	} `json:"superseded_keys"`
}

func (v *vault) staticRoles() map[string]storedStatic {
	store := v.storage()
	all := map[string]storedStatic{}
	names, _ := store.List(context.Background(), "static-role/") // in memory, nothing fails
	for _, name := range names {
		var r storedStatic
		if entry(v, "static-role/"+name, &r) {
			all[name] = r
		}
	}
	return all
}

func (v *vault) storage() *logical.InmemStorage {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.store
}

// entry reads an entry of storage into target, if there is one. It is decoded again only
// if it has changed.
func entry[T any](v *vault, key string, target *T) bool {
	stored, err := v.storage().Get(context.Background(), key)
	if err != nil || stored == nil {
		return false
	}
	if last, ok := v.decoded.Load(key); ok && bytes.Equal(last.(decoded).raw, stored.Value) {
		if value, same := last.(decoded).value.(T); same {
			*target = value
			return true
		}
	}
	if json.Unmarshal(stored.Value, target) != nil {
		return false
	}
	v.decoded.Store(key, decoded{stored.Value, *target})
	return true
}

// decoded is an entry, and what it says. Nobody changes that.
type decoded struct {
	raw   []byte
	value any
}

// storedConfig is what is read here of the config's entry.
type storedConfig struct {
	ID         string        `json:"admin_api_key_id"`
	Key        string        `json:"admin_api_key"`
	Grace      time.Duration `json:"rotation_grace_period"`
	Superseded []struct {
		ID          string    `json:"id"`
		DeleteAfter time.Time `json:"delete_after"`
		Kept        string    `json:"kept"`
		Elsewhere   bool      `json:"elsewhere"` // no list has shown it: looked for once an hour
		Unchecked   bool      `json:"not_checked"`
		Hurried     bool      `json:"delete_even_if_used"` // its time was moved
	} `json:"superseded_admin_keys"`
}

func (v *vault) adminKeyID() string {
	var c storedConfig
	entry(v, "config", &c)
	return c.ID
}

func (w *world) vaults() []*vault {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*vault{w.vault}, w.copies...)
}

// checkLease uses the key of a lease, which must work while the lease lives.
func (w *world) checkLease(v *vault, l *lease) {
	if v.living(l) {
		w.checkKey(v, l)
	}
}

// checkKey uses the key of a lease that has not ended.
func (w *world) checkKey(v *vault, l *lease) {
	ends := v.now().Before(v.endOf(l))
	status := w.openai.use(l.key())
	if status == http.StatusOK {
		w.uses(v, l.role, l.keyID(), l.issued["project_id"])
	}
	if status == http.StatusOK || status == http.StatusForbidden || ends && !v.living(l) {
		return
	}
	switch {
	case w.ledger.byPerson(l.account(), l.keyID()):
		return
	case w.money.isDoomed(l.account(), l.keyID()): // its role has spent too much
		return
	case v.asked(l.account()) || v.asked(l.keyID()): // a restored lease that had ended
		return
	case v.jumped(l.began): // OpenAI's clock did not
		return
	}
	for _, id := range []string{l.account(), l.keyID()} {
		t := w.ledger.thing(id)
		for _, other := range w.vaults() {
			if other != v && other.asked(id) && (t == nil || t.goneBy == nil || t.goneBy.v != v) {
				return // the copy's Vault has asked for it
			}
		}
	}
	w.violate(leaseWorks, []string{l.account(), l.keyID()}, "the key %s of lease %s, which lasts until %s, is refused with %d", l.keyID(), l.id, v.endOf(l).UTC().Format(time.DateTime), status)
}

// living reports whether a lease is still what Vault has stored of it, and has not
// ended.
func (v *vault) living(l *lease) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.leases[l.id] == l && !l.revoking && time.Now().Add(v.offset).Before(l.expire)
}

// checkStatic uses the key that static-creds has just answered with.
func (w *world) checkStatic(v *vault, name string, data map[string]any) {
	key, _ := data["api_key"].(string)
	id, _ := data["api_key_id"].(string)
	account, _ := data["service_account_id"].(string)
	status := w.openai.use(key)
	if status == http.StatusOK {
		w.uses(v, "static-roles/"+name, id, data["project_id"])
	}
	if status == http.StatusOK || status == http.StatusForbidden {
		return
	}
	deleted := func(id string) bool { t := w.ledger.thing(id); return t != nil && t.goneBy != nil && t.goneBy.v == v }
	switch {
	case w.ledger.byPerson(account, id):
		return
	case (deleted(id) || deleted(account)) && v.loads.Load() > 0 && v.staticRoles()[name].Current.ID == id:
		return // replaced and deleted, and then restored from a snapshot of before that
	case v.staticRoles()[name].Current.ID != id:
		return // replaced since it was read, however long that took
	case v.jumped(w.began):
		return // the key has ended by OpenAI's clock
	}
	w.violate(staticWorks, []string{id, account}, "the key %s of static role %s is refused with %d", id, name, status)
}

// bounded checks how long something took.
func (w *world) bounded(what string, began time.Time, most time.Duration) {
	if took := time.Since(began); took > most {
		w.violate(callsEnd, nil, "%s took %s", what, took)
	}
}

// heard keeps what a caller was told.
func (w *world) heard(resp *logical.Response, err error) {
	var said []string
	if err != nil {
		said = append(said, err.Error())
	}
	if resp != nil {
		said = append(said, resp.Warnings...)
		if resp.IsError() {
			said = append(said, resp.Error().Error())
		}
	}
	w.ledger.mu.Lock()
	defer w.ledger.mu.Unlock()
	w.ledger.said = append(w.ledger.said, said...)
}

// called counts a call, and operated an operation of storage. A process that makes too
// many is slowed down, so that time goes on.
func (p *process) called() { p.counts(func(l *load) { l.calls++ }) }

func (p *process) operated() { p.counts(func(l *load) { l.ops++ }) }

func (p *process) asked(*logical.Request) { p.counts(func(l *load) { l.asks++ }) }

func (p *process) counts(add func(*load)) {
	p.mu.Lock()
	if time.Since(p.load.began) > window {
		p.load = load{began: time.Now()}
	}
	add(&p.load)
	l := p.load
	p.mu.Unlock()
	if l.calls > callsAtRest+callsForEach*l.asks || l.ops > opsAtRest+100*l.asks || l.pooled > pooledAtRest+2*l.asks {
		p.w.violate(fewCalls, nil, "%s made %d calls, %d creates for pools and %d storage operations in %s, for %d requests", p.name, l.calls, l.pooled, l.ops, time.Since(l.began), l.asks)
		time.Sleep(10 * time.Second)
	}
}

// wrote notes the beginning of a write of a role's scopes; the write's result ends the
// state before it, if it was a success.
func (l *ledger) wrote(role string, scopes []string) (done func(ok bool)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.scopes[role])
	l.scopes[role] = append(l.scopes[role], scopesOf{from: time.Now(), scopes: scopes})
	return func(ok bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !ok {
			return // either may hold now
		}
		for i := range before {
			if l.scopes[role][i].until.IsZero() {
				l.scopes[role][i].until = time.Now()
			}
		}
	}
}

// anyScopes notes that what roles allow is not known until they are written again.
func (l *ledger) anyScopes() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for role := range l.scopes {
		l.scopes[role] = append(l.scopes[role], scopesOf{from: time.Now()})
	}
}

// checkScopes checks that a key has no more scopes than its role had when the plugin
// answered with it, whenever the request began.
func (w *world) checkScopes(role, keyID string, answered time.Time) {
	t := w.ledger.thing(keyID)
	if t == nil {
		return
	}
	w.ledger.mu.Lock()
	defer w.ledger.mu.Unlock()
	states := w.ledger.scopes[role]
	if len(states) == 0 {
		return
	}
	for _, s := range states {
		if !s.until.IsZero() && s.until.Before(answered) {
			continue
		}
		if len(s.scopes) == 0 || (len(t.scopes) > 0 && !slices.ContainsFunc(t.scopes, func(scope string) bool { return !slices.Contains(s.scopes, scope) })) {
			return
		}
	}
	w.violate(staysNarrow, []string{keyID}, "key %s of role %s has the scopes %v", keyID, role, t.scopes)
}

var secretLike = regexp.MustCompile(`sk-[A-Za-z0-9_-]{40,}`)

// checkSecrets looks for keys where none may be.
func (w *world) checkSecrets() {
	look := func(where, text string) {
		if found := secretLike.FindString(text); found != "" {
			w.violate(noSecrets, nil, "a key is in %s: %s...", where, found[:12])
		}
	}
	for _, v := range w.vaults() {
		v.mu.Lock()
		processes := slices.Clone(v.processes)
		v.mu.Unlock()
		for _, p := range processes {
			look("the log of "+p.name, p.log.String())
		}
		keys, _ := logical.CollectKeys(context.Background(), v.storage()) // in memory, nothing fails
		look("a storage key", strings.Join(keys, "\n"))
	}
	w.ledger.mu.Lock()
	said := strings.Join(w.ledger.said, "\n")
	w.ledger.mu.Unlock()
	look("an error or a warning", said)
}

// left is what is alive at OpenAI, or in the WAL, that nobody holds.
func (w *world) left() (all []string, ids []string) {
	v := w.vault
	add := func(id, format string, args ...any) {
		all, ids = append(all, fmt.Sprintf(format, args...)), append(ids, id)
	}
	held, entries := v.stock()
	v.mu.Lock()
	for _, l := range v.leases {
		held[l.account()], held[l.keyID()] = true, true
		if l.revoking {
			add(l.account(), "lease %s, whose end was asked for (%s %s)", l.id, l.account(), l.keyID())
		}
	}
	v.mu.Unlock()
	for _, r := range v.staticRoles() {
		held[r.Account], held[r.Current.ID] = true, true
		for _, k := range r.Superseded {
			held[k.ID] = true
		}
	}
	var c storedConfig
	entry(v, "config", &c)
	held[c.ID] = true
	for _, k := range c.Superseded {
		held[k.ID] = true
	}
	foreign := func(t *thing) bool { // a copy's that has no end of its own
		if w.ledger.handed(t.id) {
			return true
		}
		return t.by.v != v && (t.kind == "admin key" || strings.HasPrefix(t.name, "vault-static"))
	}
	for _, a := range w.openai.sim.Accounts() {
		if w.ledger.handed(a.ProjectID) {
			continue // of an archived project
		}
		if t := w.ledger.thing(a.ID); t != nil && !held[a.ID] && !foreign(t) {
			add(a.ID, "account %s %s", a.ID, a.Name)
		}
		for _, k := range a.Keys {
			if t := w.ledger.thing(k.ID); t != nil && !held[k.ID] && !held[a.ID] && !foreign(t) {
				add(k.ID, "key %s %s of account %s", k.ID, k.Name, a.ID)
			} else if t != nil && !held[k.ID] && w.ledger.thing(a.ID) == nil && !foreign(t) {
				add(k.ID, "key %s %s of account %s, which a person made", k.ID, k.Name, a.ID)
			}
		}
	}
	for _, k := range w.openai.sim.AdminKeys() {
		if t := w.ledger.thing(k.ID); t != nil && !held[k.ID] && !foreign(t) {
			add(k.ID, "admin key %s %s", k.ID, k.Name)
		}
	}
	if entries > 0 {
		add("", "%d WAL entries", entries)
	}
	return all, ids
}

// checkAdmins checks how many admin keys are alive, and that the one in the config is.
func (w *world) checkAdmins() {
	alive := w.openai.sim.AdminKeys()
	made, current := 0, w.vault.adminKeyID()
	works := current == ""
	var ids []string
	for _, k := range alive {
		works = works || k.ID == current
		if t := w.ledger.thing(k.ID); t != nil && t.by.v == w.vault && !w.ledger.handed(k.ID) {
			made++
			ids = append(ids, k.ID)
		}
	}
	behind := max(0, time.Since(w.vault.now()))
	// A grace period ends by both clocks, and a rotation comes each hour at most.
	if made > maxAdminKeys+int((behind+time.Hour-1)/time.Hour) {
		w.violate(fewAdmins, ids, "%d admin keys of the mount are alive", made)
	}
	if !works && !w.ledger.handed(current) && w.vault.adminKeyID() == current {
		w.violate(adminWorks, []string{current}, "the admin key %s of the config is deleted", current)
	}
}
