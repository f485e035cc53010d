package simulation

// This file owns money in a life: what keys cost, the limits that operators set and
// clear, the guardrails, and who reads reports.
//
// What must stay true: what keys cost is known here to the digit, whatever the engine has
// recorded; a block is known from its write to storage, or from a refusal that a client saw.

import (
	"context"
	"encoding/json"
	"fmt"
	"math/big"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client/openaitest"
)

const (
	// underWay is how long a write of storage may take after its effect, until which the
	// process does not act on it.
	underWay = 15 * time.Second
	// nearEnd is how long before a window's end a block may have ended, by a clock to the
	// second and with answers on their way.
	nearEnd = 2 * time.Minute
	// sinceChange is how long the engine may work with a limit as it was.
	sinceChange = 3 * time.Minute
	// yesCounts is how long a project counts as bounded after OpenAI said so.
	yesCounts = 24*time.Hour + 10*time.Minute
	oneDay    = 24 * time.Hour
	// interval is the usage_interval while it matters.
	interval = 5 * time.Minute
)

// The bubble's time begins in the year 2000.
var _ = func() bool { openaitest.KeyCostsSince = time.Time{}; return true }()

// money is what is known of costs, limits and guardrails.
type money struct {
	mu       sync.Mutex
	dice     *rand.Rand
	costs    map[string]map[time.Time]*big.Rat // by key and day
	owner    map[string]string                 // of a key: the label of a role
	total    *big.Rat
	charged  time.Time             // last
	blocks   map[string]*block     // by label
	written  map[string]time.Time  // since when a rule is as it is, by label
	switched map[string]time.Time  // when spend_action=revoke was last in force, by label
	recorded map[string]record     // by the ID of a key or account
	doomed   map[string]bool       // what the switch may delete, by ID
	bounds   map[boundOf]*boundary // what people have set at OpenAI
	required requirements
	changed  time.Time // when required did
}

func newMoney(w *world) *money {
	return &money{
		dice: w.dice("money"), costs: map[string]map[time.Time]*big.Rat{}, owner: map[string]string{}, total: new(big.Rat),
		blocks: map[string]*block{}, written: map[string]time.Time{}, switched: map[string]time.Time{}, recorded: map[string]record{}, doomed: map[string]bool{}, bounds: map[boundOf]*boundary{},
	}
}

// record is a WAL entry by which the switch may have a key of some roles deleted.
type record struct {
	v     *vault
	at    time.Time
	roles []string
}

// block is one that is complete.
type block struct {
	since, end   time.Time
	window       string
	spend        *big.Rat
	loads, mount int64
}

// boundOf names a guardrail of a project, boundary is its truth.
type boundOf struct{ project, setting string }

type boundary struct {
	is        bool
	since     time.Time
	ever      bool      // was it given
	never     bool      // was it missing
	no        time.Time // since when it is refused as missing, after since; zero for not
	loads, at int64
	// refused is when each process first refused it: until then it does not ask again, and
	// what it has read may be from a restored snapshot.
	refused map[*process]time.Time
}

// rule is what is read here of the entry of a role or static role.
type rule struct {
	Limit  int64  `json:"spend_limit_cents"`
	Window string `json:"spend_window"`
	Action string `json:"spend_action"`
}

func (r rule) window() string {
	if r.Window == "" {
		return "month"
	}
	return r.Window
}

// blocks reports whether these costs block a role with the rule.
func (r rule) blocks(spend *big.Rat) bool {
	return r.Limit > 0 && r.Action != "" && spend.Cmp(big.NewRat(r.Limit, 100)) >= 0
}

// roleState is what is read here of a block's entry.
type roleState struct {
	Window string    `json:"window"`
	Start  time.Time `json:"window_start"`
	End    time.Time `json:"window_end"`
	Spend  string    `json:"spend"`
	Limit  int64     `json:"limit_cents"`
}

// requirements are the guardrails in the config's entry.
type requirements struct {
	SpendLimit bool `json:"require_spend_limit"`
	AllowList  bool `json:"require_model_allow_list"`
	Scopes     bool `json:"require_scopes"`
}

// fails has all calls about one thing fail, "" for none.
func (x *weather) fails(route string) {
	route = strings.ReplaceAll(route, "model_allow_list", "model_permissions")
	x.set(func(x *weather) {
		if x.bad { // it is bad enough
			return
		}
		if x.route, x.odds = route, 1; route == "" {
			x.odds = 0
		}
	})
}

// guardrails are the settings that ask about a project, and what a refusal says.
var guardrails = []struct {
	setting, refusal string
	required         func(requirements) bool
}{
	{"require_spend_limit", "has no hard spend limit", func(r requirements) bool { return r.SpendLimit }},
	{"require_model_allow_list", "has no list of allowed models", func(r requirements) bool { return r.AllowList }},
}

// begins is how late on its first day a life begins: blocks end at midnight.
func (s Settings) begins() time.Duration {
	if !s.Spending {
		return 0
	}
	return time.Duration(stream(s.Seed, "begins").IntN(24)) * time.Hour
}

// labelOf is the label of the role that a path of storage or a request names, "" for none.
func labelOf(path string) string {
	for _, prefix := range []string{"role/", "creds/", "role-state/"} {
		if name, ok := strings.CutPrefix(path, prefix); ok {
			return name
		}
	}
	for _, prefix := range []string{"static-role/", "static-creds/"} {
		if name, ok := strings.CutPrefix(path, prefix); ok {
			return "static-roles/" + name
		}
	}
	return ""
}

// pathOf is the path of a role by its label.
func pathOf(label string) string {
	if strings.HasPrefix(label, "static-roles/") {
		return label
	}
	return "roles/" + label
}

func (v *vault) rule(label string) (r rule) {
	if name, static := strings.CutPrefix(label, "static-roles/"); static {
		entry(v, "static-role/"+name, &r)
	} else {
		entry(v, "role/"+label, &r)
	}
	return r
}

// uses charges a key that has been used.
func (w *world) uses(v *vault, label, key string, project any) {
	if w.Spending && v == w.vault {
		w.money.mu.Lock()
		amount, free := big.NewRat(1+w.money.dice.Int64N(100_000), 10_000_000), w.money.dice.IntN(4) > 0
		w.money.mu.Unlock()
		if free { // few amounts are enough
			return
		}
		w.charge(label, key, fmt.Sprint(project), amount)
	}
}

// charge has a key cost an amount. Of no role, it is not the engine's.
func (w *world) charge(label, key, project string, amount *big.Rat) {
	m := w.money
	m.mu.Lock()
	defer m.mu.Unlock()
	day := time.Now().UTC().Truncate(oneDay)
	if m.costs[key] == nil {
		m.costs[key] = map[time.Time]*big.Rat{}
	}
	if m.costs[key][day] == nil {
		m.costs[key][day] = new(big.Rat)
	}
	m.costs[key][day].Add(m.costs[key][day], amount)
	m.total.Add(m.total, amount)
	m.charged = time.Now()
	if label != "" {
		m.owner[key] = label
	}
	w.openai.sim.AddCost(project, key, "gpt-5-mini, output_tokens", time.Now(), amount.FloatString(12))
}

// spent is what the keys of a role have cost in a window. The caller holds mu.
func (m *money) spent(label string, start, end time.Time) *big.Rat {
	sum := new(big.Rat)
	for key, days := range m.costs {
		if m.owner[key] != label {
			continue
		}
		for day, amount := range days {
			if !day.Before(start) && day.Before(end) {
				sum.Add(sum, amount)
			}
		}
	}
	return sum
}

// put takes note of a write of storage that has had its effect.
func (w *world) put(p *process, e *logical.StorageEntry) {
	if !w.Spending || p.v != w.vault {
		return
	}
	switch label := labelOf(e.Key); {
	case strings.HasPrefix(e.Key, "role-state/"):
		w.blocked(p, label, e.Value)
	case label != "":
		w.ruled(p.v, label)
	case e.Key == "config":
		w.money.require(p.v)
	case strings.HasPrefix(e.Key, "wal/"):
		w.recorded(p.v, e.Value)
	}
}

// willPut takes note of a write of storage before its effect, deleted of a deletion.
func (w *world) willPut(p *process, key string, deleted bool) {
	if !w.Spending || p.v != w.vault {
		return
	}
	label := labelOf(key)
	m := w.money
	if label == "" || deleted && !strings.HasPrefix(key, "role-state/") {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.revokes(p.v, label) {
		m.switched[label] = time.Now()
	}
	if b := m.inForce(p.v, label); deleted && b != nil && time.Since(m.written[label]) > sinceChange {
		w.violate(blocksHold, []string{label}, "%s ends the block of %s, whose keys have cost %s, although its window lasts until %s", p.name, label, b.spend.FloatString(4), b.end.UTC().Format(time.DateTime))
	}
}

// inForce is the block of a role that must not have a key now. The caller holds mu.
func (m *money) inForce(v *vault, label string) *block {
	b := m.blocks[label]
	if b == nil || b.loads != v.loads.Load() || b.mount != v.mount.Load() || time.Until(b.end) < nearEnd {
		return nil
	}
	if r := v.rule(label); r.window() != b.window || !r.blocks(b.spend) {
		return nil
	}
	return b
}

// revokes reports whether the switch may delete the keys of a role. The caller holds mu.
func (m *money) revokes(v *vault, label string) bool {
	var state roleState
	r := v.rule(label)
	if r.Action != "revoke" || !entry(v, "role-state/"+label, &state) {
		return false
	}
	spend, ok := new(big.Rat).SetString(state.Spend)
	return ok && r.blocks(spend)
}

// blocked takes note of a block in storage, and checks that it is right.
func (w *world) blocked(p *process, label string, value []byte) {
	var s roleState
	if json.Unmarshal(value, &s) != nil {
		return
	}
	spend, ok := new(big.Rat).SetString(s.Spend)
	if !ok {
		w.violate(blocksRight, []string{label}, "%s has stored %q as the costs of %s", p.name, s.Spend, label)
		return
	}
	w.money.mu.Lock()
	defer w.money.mu.Unlock()
	w.checkCosts(p.name, label, spend, s.Limit, s.Start, s.End)
	w.money.block(p.v, label, &block{end: s.End, window: s.Window, spend: spend})
}

// checkCosts checks that the keys of a blocked role have cost that, and its limit. The
// caller holds money.mu.
func (w *world) checkCosts(who, label string, spend *big.Rat, limit int64, start, end time.Time) {
	if most := w.money.spent(label, start, end); spend.Cmp(most) > 0 || spend.Cmp(big.NewRat(limit, 100)) < 0 {
		w.violate(blocksRight, []string{label}, "%s blocks %s by its limit of %d cents for costs of %s since %s, which are %s", who, label, limit, spend.FloatString(12), start.UTC().Format(time.DateOnly), most.FloatString(12))
	}
}

// block notes a block that is complete. The caller holds mu.
func (m *money) block(v *vault, label string, b *block) {
	if v.rule(label).window() != b.window || m.inForce(v, label) != nil {
		return
	}
	b.since, b.loads, b.mount = time.Now(), v.loads.Load(), v.mount.Load()
	m.blocks[label] = b
}

// ruled takes note of a write of a role.
func (w *world) ruled(v *vault, label string) {
	m := w.money
	m.mu.Lock()
	defer m.mu.Unlock()
	m.written[label] = time.Now()
	if m.inForce(v, label) == nil {
		delete(m.blocks, label)
	}
}

// require takes note of a write of the config.
func (m *money) require(v *vault) {
	var is requirements
	entry(v, "config", &is)
	m.mu.Lock()
	defer m.mu.Unlock()
	if is != m.required {
		m.required, m.changed = is, time.Now()
	}
}

// recorded takes note of a WAL entry that has a credential deleted: before the switch
// deletes a key of a lease, that is recorded, perhaps before Vault has stored the lease.
func (w *world) recorded(v *vault, value []byte) {
	var e struct {
		Kind string `json:"type"`
		Data struct {
			ID    string `json:"service_account_id"`
			KeyID string `json:"api_key_id"`
		} `json:"data"`
	}
	if json.Unmarshal(value, &e) != nil || !strings.HasPrefix(e.Kind, "revoked_") {
		return
	}
	m := w.money
	m.mu.Lock()
	var may []string
	for _, role := range roles {
		if m.revokes(v, role.name) || time.Since(m.switched[role.name]) < sinceChange {
			may = append(may, role.name)
		}
	}
	m.recorded[e.Data.KeyID] = record{v, time.Now(), may}
	if e.Kind == "revoked_service_account" {
		m.recorded[e.Data.ID] = record{v, time.Now(), may}
	}
	m.mu.Unlock()
	for _, l := range v.allLeases() {
		m.doom(v, l)
	}
}

// doom notes what the switch may delete of a lease: what was recorded since it was asked
// for.
func (m *money) doom(v *vault, l *lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range []string{l.keyID(), l.account()} {
		if r := m.recorded[id]; r.v == v && !r.at.Before(l.asked) && slices.Contains(r.roles, l.role) {
			m.doomed[id], m.doomed[l.keyID()] = true, true
		}
	}
}

// isDoomed reports whether the switch may delete one of these.
func (m *money) isDoomed(ids ...string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(ids, func(id string) bool { return m.doomed[id] })
}

// switches reports whether the switch may delete keys of some role now.
func (m *money) switches(v *vault) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for label := range m.blocks {
		if m.revokes(v, label) {
			return true
		}
	}
	return false
}

var refusal = regexp.MustCompile(`blocked by its spend_limit: since (\S+), its keys have cost (\S+) USD, and the limit is (\d+)\.(\d\d) USD per (\w+); the block ends at (\S+),`)

// checkSpending checks what the plugin has answered to a client.
func (w *world) checkSpending(p *process, req *logical.Request, began time.Time, resp *logical.Response, err error) {
	label := labelOf(req.Path)
	issues := req.Operation == logical.ReadOperation && strings.HasPrefix(req.Path, "creds/")
	reads := req.Operation == logical.ReadOperation && strings.HasPrefix(req.Path, "static-creds/")
	if !w.Spending || p.v != w.vault || label == "" || !issues && !reads && req.Operation != logical.RenewOperation ||
		p.dead.Load() || p.deposed.Load() != nil || p.loads != p.v.loads.Load() {
		return
	}
	text := ""
	switch {
	case err != nil:
		text = err.Error()
	case resp.IsError():
		text = resp.Error().Error()
	case resp == nil:
		return
	}
	v, m := p.v, w.money
	m.mu.Lock()
	defer m.mu.Unlock()
	if text != "" {
		if found := refusal.FindStringSubmatch(text); found != nil {
			w.refused(p, label, found)
		}
		w.judged(p, text)
		return
	}
	if b := m.inForce(v, label); b != nil && began.After(m.written[label].Add(underWay)) && (issues && time.Now().After(b.since) || began.After(b.since.Add(underWay))) {
		w.violate(blocksHold, []string{label}, "%s answers %s %s, although the keys of %s had cost %s at %s and are blocked until %s", p.name, req.Operation, req.Path, label, b.spend.FloatString(4), b.since.UTC().Format(time.DateTime), b.end.UTC().Format(time.DateTime))
	}
	if issues || reads {
		w.checkGuarded(p, label, began, resp)
	}
}

// refused takes note of a refusal by a block, and checks that it is right. The caller
// holds money.mu.
func (w *world) refused(p *process, label string, found []string) {
	start, err := time.Parse(time.RFC3339, found[1])
	end, endErr := time.Parse(time.RFC3339, found[6])
	spend, ok := new(big.Rat).SetString(found[2])
	var limit int64
	if _, err := fmt.Sscan(found[3]+found[4], &limit); err != nil || !ok {
		ok = false
	}
	if err != nil || endErr != nil || !ok {
		w.violate(blocksRight, []string{label}, "%s refuses %s by %q", p.name, label, found[0])
		return
	}
	w.checkCosts(p.name, label, spend, limit, start, end)
	if time.Since(end) > nearEnd && !p.v.jumped(w.began) && p.knowsTime.Load() {
		w.violate(blocksRight, []string{label}, "%s blocks %s, although its window ended at %s", p.name, label, found[6])
	}
	if time.Since(w.money.written[label]) > sinceChange {
		w.money.block(p.v, label, &block{end: end, window: found[5], spend: spend})
	}
}

// bound has people give a project a bound, or remove it.
func (w *world) bound(project, setting string, is bool) {
	m := w.money
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.bounds[boundOf{project, setting}]
	if b == nil {
		b = &boundary{}
		m.bounds[boundOf{project, setting}] = b
	}
	*b = boundary{is: is, since: time.Now(), ever: b.ever || is, never: b.never || !is}
	switch {
	case setting == "require_spend_limit" && is:
		w.openai.sim.SetSpendLimit(project, 5000)
	case setting == "require_spend_limit":
		w.openai.sim.SetSpendLimit(project, 0)
	case is:
		w.openai.sim.SetModelPermissions(project, "allow_list", "gpt-5-mini")
	default:
		w.openai.sim.SetModelPermissions(project, []string{"", "deny_list"}[m.dice.IntN(2)], "gpt-5")
	}
	w.tell("people", "meet %s in %s: %t", setting, project, is)
}

// judged takes note of a refusal by a guardrail, and checks that it is right. The caller
// holds money.mu.
func (w *world) judged(p *process, text string) {
	for _, g := range guardrails {
		if !strings.Contains(text, g.refusal) {
			continue
		}
		for of, b := range w.money.bounds {
			if of.setting != g.setting || !strings.Contains(text, of.project) {
				continue
			}
			if b.refused == nil {
				b.refused = map[*process]time.Time{}
			}
			if b.refused[p].IsZero() {
				b.refused[p] = time.Now()
			}
			if w.ledger.handed(of.project) {
				continue // archived: OpenAI says no more about its limits, so the last answer stays
			}
			switch {
			case b.is && !b.never:
				w.violate(guarded, []string{of.project}, "%s refuses project %s, which has always met %s: %s", p.name, of.project, g.setting, text)
			case b.is && !b.no.IsZero() && time.Since(b.no) > 20*time.Minute && time.Since(b.refused[p]) > 20*time.Minute && w.calmFor(30*time.Minute):
				w.violate(guarded, []string{of.project}, "%s refuses project %s since %s, although it meets %s: %s", p.name, of.project, b.no.UTC().Format(time.DateTime), g.setting, text)
			}
			if b.no.IsZero() || b.loads != p.loads || b.at != p.v.mount.Load() {
				b.no, b.loads, b.at = time.Now(), p.loads, p.v.mount.Load()
			}
		}
	}
}

// checkGuarded checks that the project of a key that is returned meets what the config
// requires. The caller holds money.mu.
func (w *world) checkGuarded(p *process, label string, began time.Time, resp *logical.Response) {
	m := w.money
	var is requirements
	entry(p.v, "config", &is)
	if is != m.required { // restored, or another mount's
		m.required, m.changed = is, time.Now()
	}
	if !began.After(m.changed.Add(underWay)) {
		return
	}
	key, _ := resp.Data["api_key_id"].(string)
	project, _ := resp.Data["project_id"].(string)
	if t := w.ledger.thing(key); t != nil && is.Scopes && len(t.scopes) == 0 {
		w.violate(guarded, []string{key}, "%s returns key %s of %s without scopes, which the config requires", p.name, key, label)
	}
	for _, g := range guardrails {
		b := m.bounds[boundOf{project, g.setting}]
		if b == nil || b.is || !g.required(is) || began.Before(b.since) {
			continue
		}
		why := ""
		switch {
		case !b.ever:
			why = "never met it"
		case !b.no.IsZero() && began.After(b.no.Add(underWay)) && b.loads == p.loads && b.at == p.v.mount.Load():
			why = "was refused for it at " + b.no.UTC().Format(time.DateTime)
		case time.Since(b.since) > yesCounts && !p.v.jumped(b.since):
			why = "has not met it for a day"
		default:
			continue
		}
		w.violate(guarded, []string{key, project}, "%s returns key %s of %s with %s, although project %s %s", p.name, key, label, g.setting, project, why)
	}
}

// spending has operators set limits that keys reach.
func (w *world) spending() {
	r := w.dice("spending")
	w.openai.sim.Configure(func(o *openaitest.Options) { o.AmountsVary = true })
	w.act(w.finance)
	w.act(w.guardrails)
	labels := []string{"app", "app", "short", "key", "keyed", "old"}
	if w.Readers > 0 {
		labels = append(labels, "static-roles/made", "static-roles/adopted")
	}
	for w.sleep(pause(r, time.Hour)) {
		w.overspend(r, labels[r.IntN(len(labels))])
	}
	for _, label := range slices.Compact(labels) { // what blocks costs work each minute
		_ = w.write(w.vault, "operator", pathOf(label), map[string]any{"spend_limit": ""})
	}
}

// overspend sets a limit, has a key of the role cost more, and looks what comes of it.
func (w *world) overspend(r *rand.Rand, label string) {
	v, who := w.vault, "operator"
	name, static := strings.CutPrefix(label, "static-roles/")
	path, actions := pathOf(label), []string{"block", "revoke", "revoke", "warn"}
	if static {
		actions = []string{"block", "block", "warn"}
	}
	// Each refresh of the costs takes its time here, too.
	if w.write(v, who, "config", map[string]any{"usage_interval": "5m"}) != nil {
		return
	}
	window := []string{"day", "month"}[r.IntN(2)]
	cents := 1 + r.Int64N(500)
	day := time.Now().UTC().Truncate(oneDay)
	start := day
	if window == "month" {
		start = day.AddDate(0, 0, 1-day.Day())
	}
	w.money.mu.Lock()
	spent := w.money.spent(label, start, day.Add(oneDay))
	w.money.mu.Unlock()
	limit, _ := new(big.Float).SetRat(spent).Float64()
	cents += int64(limit * 100)
	dollars := func(cents int64) string { return fmt.Sprintf("%d.%02d", cents/100, cents%100) }
	action := actions[r.IntN(len(actions))]
	if w.write(v, who, path, map[string]any{"spend_limit": dollars(cents), "spend_window": window, "spend_action": action}) != nil {
		return
	}
	var l *lease
	key, project := "", ""
	if static {
		w.read(v, name)
		key, project = v.staticRoles()[name].Current.ID, v.staticRoles()[name].Project
	} else {
		var err error
		if l, err = w.lease(v, label); err != nil {
			return
		}
		key, project = l.keyID(), fmt.Sprint(l.issued["project_id"])
	}
	again := func() bool { // what a client does
		if static {
			return w.read(v, name) != ""
		}
		l, err := w.lease(v, label)
		if err == nil {
			w.checkLease(v, l)
		}
		return err == nil
	}
	renew := func() {
		if l != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			_ = v.renew(ctx, l.id, 30*time.Minute) // it may have ended
			cancel()
		}
	}
	_, p, _ := v.active()
	began := time.Now()
	w.tell("program", "spends %d cents with key %s of %s", cents+5, key, label)
	w.charge(label, key, project, big.NewRat(cents+5, 100))
	if r.IntN(3) == 0 {
		w.sleep(time.Duration(r.Int64N(int64(interval + time.Minute))))
		w.spoil(v, r)
	}
	if !w.sleep(interval + 5*time.Minute) {
		return
	}
	returned := again()
	renew()
	_, now, err := v.active()
	w.money.mu.Lock()
	unchanged := w.money.written[label].Before(began)
	w.money.mu.Unlock()
	if returned && action != "warn" && unchanged && err == nil && p == now && p.loads == v.loads.Load() && w.calmFor(time.Since(began)) && time.Now().UTC().Day() == began.UTC().Day() && !v.jumped(w.began) {
		w.violate(blocksHold, []string{label, key}, "%s returns a key of %s, which has reached its limit %s ago", p.name, label, time.Since(began))
	}
	_ = w.write(v, who, "config", map[string]any{"usage_interval": "24h"})
	switch r.IntN(5) { // the block is there afterwards, too
	case 0:
		v.reload()
	case 1:
		if w.Trouble {
			v.stepDown(pause(r, 10*time.Second))
		}
	case 2:
		if _, p, err := v.serving(); err == nil && w.Trouble {
			p.kill()
			w.sleep(time.Second)
		}
	case 3: // also where OpenAI does not answer
		if w.Faults > 0 {
			w.openai.weather.burst(1)
		}
		v.reload()
	}
	for range 3 {
		again()
		renew()
		w.sleep(30 * time.Second)
	}
	w.openai.weather.burst(0)
	if !w.sleep(pause(r, time.Hour)) {
		return
	}
	again()
	renew()
	switch r.IntN(4) {
	case 0:
		_ = w.write(v, who, path, map[string]any{"spend_limit": dollars(cents + 1000)})
	case 1:
		_ = w.write(v, who, path, map[string]any{"spend_limit": ""})
	case 2: // and again, with another action
		_ = w.write(v, who, path, map[string]any{"spend_limit": dollars(cents + 1000)})
		w.sleep(pause(r, 5*time.Minute))
		again()
		_ = w.write(v, who, path, map[string]any{"spend_limit": dollars(cents), "spend_action": actions[r.IntN(len(actions))]})
		w.sleep(pause(r, 5*time.Minute))
	case 3: // the window ends
		if left := time.Until(day.Add(oneDay + 2*time.Minute)); left < 6*time.Hour {
			w.sleep(left)
		}
	}
	again()
	renew()
}

// guardrails has operators require things of projects, and people give and remove them.
func (w *world) guardrails() {
	r := w.dice("guardrails")
	for _, project := range w.openai.projects {
		for _, g := range guardrails {
			w.bound(project, g.setting, r.IntN(3) > 0)
		}
	}
	for w.sleep(pause(r, 2*time.Hour)) {
		g := guardrails[r.IntN(2)]
		project := w.openai.projects[r.IntN(len(w.openai.projects))]
		switch r.IntN(4) {
		case 0:
			_ = w.write(w.vault, "operator", "config", map[string]any{g.setting: true})
			w.sleep(underWay + time.Second)
			if w.Faults > 0 && r.IntN(2) == 0 { // OpenAI does not say
				w.openai.weather.fails(strings.TrimPrefix(g.setting, "require_"))
			}
			for _, role := range roles {
				_, _ = w.lease(w.vault, role.name)
			}
			w.openai.weather.fails("")
		case 1:
			_ = w.write(w.vault, "operator", "config", map[string]any{g.setting: false})
		case 2:
			w.bound(project, g.setting, r.IntN(2) == 0)
			_, _ = w.lease(w.vault, roles[r.IntN(len(roles))].name)
			if w.sleep(pause(r, 30*time.Minute)); r.IntN(2) == 0 {
				w.vault.reload()
			}
			for _, role := range roles {
				_, _ = w.lease(w.vault, role.name)
			}
		case 3:
			_ = w.write(w.vault, "operator", "config", map[string]any{"require_scopes": true})
			w.sleep(pause(r, 20*time.Minute))
			_, _ = w.lease(w.vault, "app")
			_ = w.write(w.vault, "operator", "config", map[string]any{"require_scopes": false})
		}
	}
}

// finance reads reports, and adds them up.
func (w *world) finance() {
	r := w.dice("finance")
	for w.sleep(pause(r, 2*time.Hour)) {
		// Of other applications, whose keys the engine does not know, or of none.
		w.charge("", []string{"key_of_another", ""}[r.IntN(2)], w.openai.projects[r.IntN(2)], big.NewRat(1+r.Int64N(1e9), 1e8))
		w.sleep(2 * time.Minute)
		role := roles[r.IntN(len(roles))].name
		w.readReport(role)
	}
}

// readReport reads a report of the keys of a role, which no report may give to another.
func (w *world) readReport(role string) {
	v, m := w.vault, w.money
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	asked := time.Now()
	resp, err := v.request(ctx, logical.ReadOperation, "usage", map[string]any{"group_by": "key", "role": role, "format": "json", "start": w.began.UTC().Format(time.DateOnly)})
	if err != nil || resp == nil || resp.IsError() {
		w.tell("finance", "is refused a report: %v %v", err, resp)
		return
	}
	amount := func(text any) *big.Rat {
		value, ok := new(big.Rat).SetString(fmt.Sprint(text))
		if !ok {
			w.violate(reportsRight, nil, "a report has the amount %q", text)
			return new(big.Rat)
		}
		return value
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	current := asked.Sub(m.charged) > 100*time.Second && !v.jumped(w.began) && !slices.ContainsFunc(resp.Warnings, func(text string) bool { return strings.Contains(text, "These figures are of") })
	total := amount(resp.Data["total"])
	sum := new(big.Rat).Add(amount(resp.Data["unattributed"]), amount(resp.Data["other_roles"]))
	rows, _ := resp.Data["rows"].([]any)
	for _, row := range rows {
		row, _ := row.(map[string]any)
		key := fmt.Sprint(row["group"])
		cost, all := amount(row["cost"]), new(big.Rat)
		sum.Add(sum, cost)
		for _, some := range m.costs[key] {
			all.Add(all, some)
		}
		if m.owner[key] != role || cost.Cmp(all) > 0 || current && cost.Cmp(all) != 0 {
			w.violate(reportsRight, []string{key}, "a report has costs of %s of key %s as of role %s; they are %s, of %s", cost.FloatString(12), key, role, all.FloatString(12), m.owner[key])
		}
	}
	if sum.Cmp(total) != 0 || total.Cmp(m.total) > 0 || current && v.mount.Load() == 0 && v.loads.Load() == 0 && total.Cmp(m.total) != 0 {
		w.violate(reportsRight, nil, "a report of role %s adds up to %s, and its total is %s of %s", role, sum.FloatString(12), total.FloatString(12), m.total.FloatString(12))
	}
	w.tell("finance", "reads a report of %s: %d keys, unattributed %v, total %v", role, len(rows), resp.Data["unattributed"], resp.Data["total"])
}
