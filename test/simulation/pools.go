package simulation

// This file owns the pools of a life: who changes them, who empties them in bursts, and
// what may wait in them.
//
// What must stay true: only what the process that serves the mount has made, and storage
// names as pooled, counts as stock.

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// poolSizes are what roles with a pool are written with.
var poolSizes = map[string]int{"app": 3, "short": 2, "key": 1, "old": 1}

const (
	defaultPoolAge = 6 * time.Hour
	// pooledAtRest is how many credentials a process may make for its pools in a window:
	// each change of a role or the config replaces all of them.
	pooledAtRest = 150
)

// pools has operators change pools, and programs lease in bursts.
func (w *world) pools() {
	r := w.dice("pools")
	for w.sleep(pause(r, 2*time.Hour)) {
		names := []string{"app", "app", "short", "key", "old"}
		name := names[r.IntN(len(names))]
		switch r.IntN(8) {
		case 0, 1:
			w.burst(name, 3+r.IntN(6))
		case 2:
			n := 3 + r.IntN(6)
			w.act(func() { w.burst(name, n) })
			w.sleep(pause(r, 30*time.Second))
			w.narrow("operator", name, r)
		case 3:
			_ = w.write(w.vault, "operator", "roles/"+name, map[string]any{"pool_size": r.IntN(5), "pool_max_age": []string{"20m", "1h", "6h", "0"}[r.IntN(4)]})
			w.sleep(pause(r, time.Hour))
			_ = w.write(w.vault, "operator", "roles/"+name, map[string]any{"pool_size": poolSizes[name], "pool_max_age": "0"})
		case 4:
			_ = w.write(w.vault, "operator", "roles/app", map[string]any{"project_id": w.openai.projects[r.IntN(2)], "ttl": []string{"20m", "1h"}[r.IntN(2)]})
		case 5:
			w.overstay(name, r)
		case 6:
			if w.Clocks { // what is made after a step back seems to end first
				_ = w.write(w.vault, "operator", "roles/"+name, map[string]any{"pool_max_age": "20m"})
				w.sleep(2 * time.Minute)
				w.tell("clock", "of Vault is set back by 2h")
				w.vault.setClock(-2 * time.Hour)
				w.sleep(30 * time.Minute)
				w.tell("clock", "of Vault is set right")
				w.vault.setClock(2 * time.Hour)
				_ = w.write(w.vault, "operator", "roles/"+name, map[string]any{"pool_max_age": "0"})
			}
		case 7:
			if w.Clocks { // a key seems old as soon as it is created
				_ = w.write(w.vault, "operator", "roles/"+name, map[string]any{"pool_max_age": "20m"})
				w.sleep(2 * time.Minute)
				w.openai.weather.set(func(x *weather) { x.longer = 200 * time.Millisecond })
				w.act(func() { _, _ = w.lease(w.vault, name) })
				w.sleep(time.Duration(r.Int64N(int64(100 * time.Millisecond))))
				by := 16*time.Minute + time.Duration(r.Int64N(int64(4*time.Minute)))
				w.tell("clock", "of Vault is set by %s during a create", by)
				w.vault.setClock(by)
				w.openai.weather.set(func(x *weather) { x.longer = 0 })
				w.sleep(5 * time.Minute)
				w.vault.setClock(-by)
				_ = w.write(w.vault, "operator", "roles/"+name, map[string]any{"pool_max_age": "0"})
			}
		}
	}
}

// overstay has programs lease what has waited for as long as it may, and for longer, while
// nothing can take its place.
func (w *world) overstay(role string, r *rand.Rand) {
	_ = w.write(w.vault, "operator", "roles/"+role, map[string]any{"pool_max_age": "10m"})
	w.sleep(7 * time.Minute)
	w.openai.weather.set(func(x *weather) { x.closed++ })
	w.openai.sim.SetKeyCreationDisabled(true)
	w.tell("people", "allow no new keys for some minutes")
	last := time.Now()
	stock, _ := w.vault.stock()
	for id := range stock {
		if t := w.ledger.thing(id); t != nil && strings.HasPrefix(t.name, "vault-"+role+"-") {
			last = later(last, t.at.Add(10*time.Minute))
		}
	}
	w.sleep(time.Until(last) - 20*time.Second)
	w.crowd(w.vault, role, 1, func(l *lease) { w.checkLease(w.vault, l) })
	w.sleep(21*time.Second + time.Duration(r.Int64N(int64(20*time.Second))))
	w.crowd(w.vault, role, 3, func(l *lease) { w.checkLease(w.vault, l) })
	w.sleep(time.Minute)
	w.openai.sim.SetKeyCreationDisabled(false)
	w.openai.weather.set(func(x *weather) { x.closed-- })
	_ = w.write(w.vault, "operator", "roles/"+role, map[string]any{"pool_max_age": "0"})
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// maxAge is how long a key may wait in the pool of a role, as that is stored.
func (v *vault) maxAge(role string) time.Duration {
	var r storedPool
	entry(v, "role/"+role, &r)
	return cmp.Or(r.Age, defaultPoolAge)
}

// storedPool is what is read here of a role's entry.
type storedPool struct {
	Size int           `json:"pool_size"`
	Age  time.Duration `json:"pool_max_age"`
}

// checkAge checks that a key which is leased had not waited for too long when its request
// began. was is maxAge of that time.
func (w *world) checkAge(l *lease, was time.Duration) {
	if t := w.ledger.thing(l.keyID()); t != nil && was == w.vault.maxAge(l.role) && l.asked.Sub(t.at) > was {
		w.violate(poolsBounded, []string{l.keyID(), t.account}, "the key %s of lease %s was %s old when it was requested, and pool_max_age of role %s is %s", l.keyID(), l.id, l.asked.Sub(t.at), l.role, was)
	}
}

// burst has programs lease from a pool while Vault's storage is slow and the workers of the
// engine run.
func (w *world) burst(role string, n int) {
	var first time.Duration
	w.openai.weather.set(func(x *weather) {
		switch {
		case n%2 == 0: // so slow that the workers reach their last reads when the programs come
			x.reads, first = 16*time.Second, 40*time.Second
		case n == 3:
			x.delays = 2 * time.Second
		default:
			x.writes = 12 * time.Second
		}
	})
	for i := range n {
		w.act(func() {
			w.sleep(first + time.Duration(i)*5*time.Second)
			if l, err := w.lease(w.vault, role); err == nil && w.sleep(5*time.Minute) {
				w.checkLease(w.vault, l)
				w.vault.revoke(l.id)
			}
		})
	}
	w.sleep(first + 90*time.Second)
	w.openai.weather.set(func(x *weather) { x.delays, x.writes, x.reads = 0, 0, 0 })
}

// narrow has clients read a role while its scopes are written, and a colleague writes
// another field of it, which OpenAI is asked about meanwhile.
func (w *world) narrow(who, role string, r *rand.Rand) {
	scopes := []string{"api.model.read", "api.model.read,api.model.request", ""}[r.IntN(3)]
	w.openai.weather.set(func(x *weather) { x.delays = time.Second })
	for i := range 10 {
		w.act(func() {
			w.sleep(time.Duration(i) * 500 * time.Millisecond)
			_, _ = w.lease(w.vault, role)
		})
	}
	if project := w.openai.projects[r.IntN(2)]; role == "app" {
		w.act(func() {
			w.sleep(400 * time.Millisecond)
			_ = w.write(w.vault, "colleague", "roles/app", map[string]any{"project_id": project})
		})
	}
	w.sleep(500 * time.Millisecond)
	done := w.ledger.wrote(role, split(scopes))
	done(w.write(w.vault, who, "roles/"+role, map[string]any{"scopes": scopes}) == nil)
	w.openai.weather.set(func(x *weather) { x.delays = 0 })
}

// stock are the IDs of what waits in pools, and others counts the WAL entries of all else.
func (v *vault) stock() (stock map[string]bool, others int) {
	stock = map[string]bool{}
	ids, _ := v.storage().List(context.Background(), "wal/") // in memory, nothing fails
	if !v.w.Pools {
		return stock, len(ids)
	}
	_, p, err := v.active()
	waiting := map[string]bool{} // by name: found at OpenAI
	for _, id := range ids {
		var e storedWAL
		if entry(v, "wal/"+id, &e) && strings.HasPrefix(e.Kind, "pooled_") && err == nil && !p.dead.Load() {
			waiting[cmp.Or(e.Data.KeyName, e.Data.Name)] = false
		}
	}
	l := &v.w.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, t := range l.things {
		name, gone := t.name, t.gone
		if account := l.things[t.account]; account != nil {
			name, gone = account.name, gone || account.gone
		}
		if _, waits := waiting[name]; waits && t.by == p && !gone {
			stock[id], waiting[name] = true, true
		}
	}
	others = len(ids)
	for _, made := range waiting {
		if made {
			others--
		}
	}
	return stock, others
}

// storedWAL is what is read here of a WAL entry.
type storedWAL struct {
	Kind string `json:"type"`
	Data struct {
		Name    string `json:"service_account"`
		KeyName string `json:"api_key_name"`
	} `json:"data"`
}

// checkPools checks that what waits in the pools is wanted there. The caller has seen some
// minutes of calm.
func (w *world) checkPools(stock map[string]bool) {
	waiting, ages := map[string][]string{}, map[string]time.Duration{}
	for id := range stock {
		t := w.ledger.thing(id)
		if t == nil || t.kind == "key" && stock[t.account] {
			continue
		}
		role := strings.Split(t.name, "-")[1] // vault-<role>-<random>
		waiting[role], ages[id] = append(waiting[role], id), time.Since(t.at)
	}
	for role := range poolSizes {
		var r storedPool
		entry(w.vault, "role/"+role, &r)
		wrong := waiting[role]
		if len(wrong) <= r.Size+1 { // one is being made
			wrong = slices.DeleteFunc(wrong, func(id string) bool { return ages[id] < cmp.Or(r.Age, defaultPoolAge)+20*time.Minute })
		}
		w.ledger.mu.Lock()
		w.ledger.crowded[role]++
		if len(wrong) == 0 {
			w.ledger.crowded[role] = 0
		}
		looks := w.ledger.crowded[role]
		w.ledger.mu.Unlock()
		if looks >= calmTicks {
			w.violate(poolsBounded, wrong, "in %d looks, ten minutes apart, more or older credentials wait for role %s than its pool_size %d and pool_max_age %s allow: %s", looks, role, r.Size, r.Age, strings.Join(wrong, ", "))
		}
	}
}
