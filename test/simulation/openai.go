package simulation

// This file owns OpenAI in this world: the simulator behind connections of
// net.Pipe, what goes wrong on the way, and what people do there by hand.
//
// What must stay true: a call has its effect whole or not at all; each form in which
// OpenAI is wrong passes, within the bounds that the engine is built for (a replica
// knows what is five minutes old; a listing omits the same thing once, not always).

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-openai/client/openaitest"
)

// endpoint is where the engine believes OpenAI to be. No socket is ever opened.
const endpoint = "http://127.0.0.1:1/v1"

type openai struct {
	w       *world
	sim     *openaitest.Server
	closed  chan struct{}
	weather *weather
	count   atomic.Int64

	mu       sync.Mutex
	projects []string

	personKey string               // an admin key
	other     *openaitest.Server   // another organization's
	otherKey  string               // its admin key
	listings  map[string]listing   // by URL: what it answered some minutes ago
	omitted   map[string]time.Time // when a listing last left an ID out
	short     string               // what the next listing that has it leaves out
	vanished  map[string]time.Time // since when an ID is not known
	found     map[string]time.Time // since when it is known again
	knowsAll  bool                 // nothing vanishes now
}

// listing is an answer of a list call.
type listing struct {
	at   time.Time
	body []byte
}

func newOpenAI(w *world) *openai {
	o := &openai{
		w: w, closed: make(chan struct{}),
		listings: map[string]listing{}, omitted: map[string]time.Time{}, vanished: map[string]time.Time{}, found: map[string]time.Time{},
	}
	o.weather = newWeather(w, o)
	o.sim = openaitest.New(openaitest.Options{})
	o.sim.SetURL(endpoint)
	_, o.personKey = o.sim.AddAdminKey("of a person")
	o.other = openaitest.New(openaitest.Options{})
	o.other.SetURL(endpoint)
	_, o.otherKey = o.other.AdminKey()
	o.projects = []string{o.sim.AddProject("apps"), o.sim.AddProject("jobs"), o.sim.AddProject("old")}
	return o
}

func (o *openai) close() {
	close(o.closed)
	o.sim.Close()
	o.other.Close()
}

// serve answers the calls of a connection until that is closed, in less time than
// net/http's server would.
func (o *openai) serve(c *conn, far net.Conn) {
	defer func() { _ = far.Close() }() // net.Pipe's never fails
	in := bufio.NewReader(far)
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		answer := o.answer(c, r)
		if answer == nil {
			return
		}
		var out bytes.Buffer
		fmt.Fprintf(&out, "HTTP/1.1 %03d %s\r\nContent-Length: %d\r\n", answer.Code, http.StatusText(answer.Code), answer.Body.Len())
		_ = answer.Header().Write(&out) // in memory, nothing fails
		out.WriteString("\r\n")
		out.Write(answer.Body.Bytes())
		if _, err := far.Write(out.Bytes()); err != nil {
			return
		}
	}
}

func (o *openai) calls() int { return int(o.count.Load()) }

// answer answers one call of a process, under the weather; nil resets its connection.
func (o *openai) answer(c *conn, r *http.Request) *httptest.ResponseRecorder {
	p := c.p
	o.count.Add(1)
	p.called()
	p.mayDie()
	what := r.Method + " " + strings.TrimPrefix(r.URL.Path, "/v1")
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil
	}
	f := o.weather.strike(r)
	if !f.before && o.unknown(r.URL.Path) {
		f = notKnown
	}
	if f.slow > 0 {
		o.wait(c, f.slow)
	}
	if f.before {
		o.w.tell(p.name, "%s -> %s, without effect", what, f)
		return o.wrong(c, f)
	}
	answer := httptest.NewRecorder()
	r.Body = io.NopCloser(bytes.NewReader(body))
	if r.Header.Get("Authorization") == "Bearer "+o.otherKey {
		o.other.ServeHTTP(answer, r)
		if r.Method != http.MethodGet && answer.Code == http.StatusOK { // a deletion of nothing asks for permission
			o.w.violate(onlyOwn, nil, "%s has another organization %s", p.name, what)
		}
		return answer
	}
	o.sim.ServeHTTP(answer, r)
	o.w.ledger.note(p, r, body, answer, f.after)
	if r.Method == http.MethodGet && answer.Code == http.StatusOK {
		o.list(p, r, f, answer)
	}
	p.mayDie()
	if f.after {
		o.w.tell(p.name, "%s -> %d %s, but %s", what, answer.Code, told{body, answer.Body.Bytes()}, f)
		return o.wrong(c, f)
	}
	o.w.tell(p.name, "%s -> %d %s", what, answer.Code, told{body, answer.Body.Bytes()})
	if !p.knowsTime.Load() && answer.Code == http.StatusOK && strings.Contains(r.URL.Path, "/organization/") {
		var c storedConfig
		entry(p.v, "config", &c) // a config that is being verified has a client of its own
		p.knowsTime.Store(r.Header.Get("Authorization") == "Bearer "+c.Key)
	}
	return answer
}

// wait waits, unless the client goes.
func (o *openai) wait(c *conn, d time.Duration) {
	select {
	case <-time.After(d):
	case <-c.gone:
	case <-o.closed:
	}
}

// told is what the story says of an answer: names and IDs, no keys.
type told struct{ body, answer []byte }

func (t told) String() string {
	var in, out struct {
		Name, ID, Code string
		APIKey         struct{ ID, Name string } `json:"api_key"`
		Error          *struct{ Code, Message string }
		Data           []struct{ ID string }
		HasMore        bool `json:"has_more"`
	}
	_ = json.Unmarshal(t.body, &in) // what is not there stays empty
	_ = json.Unmarshal(t.answer, &out)
	var parts []string
	for _, s := range []string{in.Name, out.ID, out.APIKey.ID} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	if out.Error != nil {
		parts = append(parts, strings.TrimSpace(out.Error.Code+" "+out.Error.Message))
	}
	for _, d := range out.Data {
		parts = append(parts, d.ID)
	}
	text := strings.Join(parts, " ")
	return text[:min(len(text), 300)]
}

// wrong answers with what a fault is.
func (o *openai) wrong(c *conn, f fault) *httptest.ResponseRecorder {
	rw := httptest.NewRecorder()
	switch {
	case f.hang:
		o.wait(c, 10*time.Minute)
		return nil
	case f.status == 0:
		return nil
	case f.retryAfter != "":
		rw.Header().Set("Retry-After", f.retryAfter)
	}
	if strings.HasPrefix(f.body, "<") {
		rw.Header().Set("Content-Type", "text/html")
	} else {
		rw.Header().Set("Content-Type", "application/json")
	}
	rw.Header().Set("X-Request-Id", "req_wrong")
	rw.WriteHeader(f.status)
	_, _ = rw.WriteString(f.body) // in memory, nothing fails
	return rw
}

// list makes a listing lag or fall short, as the weather has it, and remembers it.
func (o *openai) list(p *process, r *http.Request, f fault, answer *httptest.ResponseRecorder) {
	body := slices.Clone(answer.Body.Bytes())
	if !bytes.Contains(body, []byte(`"object": "list"`)) {
		return
	}
	page := r.URL.String()
	o.mu.Lock()
	defer o.mu.Unlock()
	before, known := o.listings[page]
	if !known || time.Since(before.at) > 4*time.Minute {
		o.listings[page] = listing{time.Now(), body}
	}
	var omitted []string
	if f.omits || o.short != "" {
		omitted = o.omit(p, body, f.omits)
	}
	short := p.chance(10) // which OpenAI may, and which the next page completes
	if !f.lags && len(omitted) == 0 && len(o.vanished) == 0 && !short {
		return
	}
	if f.lags && known && time.Since(before.at) < youngestKnown && p.chance(2) {
		body = before.body // with what has been deleted since
	}
	answer.Body.Reset()
	answer.Body.Write(without(body, func(id string) bool {
		return slices.Contains(omitted, id) || !o.vanished[id].IsZero() || f.lags && o.w.ledger.lags(id)
	}, short))
	if f.lags || len(omitted) > 0 {
		o.w.tell(p.name, "the next listing lags (%t), or leaves something out (%s)", f.lags, strings.Join(omitted, ", "))
	}
}

// omit chooses what a listing leaves out: what is chosen already or, with any, something,
// or all that would come after something. Lagging is for what is younger than five minutes,
// and twice the same thing would be no lag but a loss.
func (o *openai) omit(p *process, listing []byte, any bool) (omitted []string) {
	var body struct{ Data []struct{ ID string } }
	_ = json.Unmarshal(listing, &body) // the simulator writes JSON
	var old []string
	for _, item := range body.Data {
		if !o.w.ledger.youngerThan(item.ID, 5*time.Minute) && time.Since(o.omitted[item.ID]) > 24*time.Hour {
			old = append(old, item.ID)
		}
	}
	has := slices.Contains(old, o.short)
	if len(old) == 0 || !has && !any {
		return nil
	}
	chosen := old[p.pick(len(old))]
	if has {
		chosen, o.short = o.short, ""
	} else if p.chance(2) { // the youngest, or what only the WAL knows
		chosen = old[len(old)-1]
		for _, id := range old {
			if t := o.w.ledger.thing(id); t != nil && t.lost {
				chosen = id
			}
		}
	}
	omitted = []string{chosen}
	if n := len(body.Data); !has && p.chance(3) && len(old) == n { // it ends early
		omitted = nil
		for _, item := range body.Data[p.pick(n):] {
			omitted = append(omitted, item.ID)
		}
	}
	for _, id := range omitted {
		o.omitted[id] = time.Now()
		o.w.ledger.excuseOmitted(id)
	}
	return omitted
}

// without is a listing without some of its things, and cut after one of them if it is short:
// the rest is on the next page.
func without(listing []byte, leaves func(id string) bool, short bool) []byte {
	var body map[string]any
	if err := json.Unmarshal(listing, &body); err != nil {
		panic(err) // the simulator writes JSON
	}
	body["data"] = slices.DeleteFunc(body["data"].([]any), func(item any) bool {
		id, _ := item.(map[string]any)["id"].(string)
		return leaves(id)
	})
	if data := body["data"].([]any); short && len(data) > 1 {
		data = data[:(len(data)+1)/2]
		body["data"], body["has_more"], body["last_id"] = data, true, data[len(data)-1].(map[string]any)["id"]
	}
	text, err := json.Marshal(body)
	if err != nil {
		panic(err) // it was JSON
	}
	return text
}

// use uses a key as a program does, on the inference side, and returns the status.
func (o *openai) use(key string) int {
	return o.direct(http.MethodGet, "/models", key, "").Code
}

// direct is a call that no process makes, and that no weather touches.
func (o *openai) direct(method, path, key, body string) *httptest.ResponseRecorder {
	r := &http.Request{
		Method: method, URL: &url.URL{Path: "/v1" + path}, Body: io.NopCloser(strings.NewReader(body)),
		Header: http.Header{"Authorization": {"Bearer " + key}, "Content-Type": {"application/json"}},
	}
	answer := httptest.NewRecorder()
	o.sim.ServeHTTP(answer, r)
	return answer
}

// person is who acts at OpenAI by hand, with an admin key that no Vault knows.
func (o *openai) person(method, path, body string) (status int, answer string) {
	rec := o.direct(method, path, o.personKey, body)
	return rec.Code, rec.Body.String()
}

// fault is what goes wrong with one call.
type fault struct {
	before, after bool // the effect; neither = none
	hang          bool
	status        int // 0 = the connection is reset
	body          string
	retryAfter    string
	slow          time.Duration
	lags, omits   bool // of a listing
	name          string
}

func (f fault) String() string { return f.name }

// notKnown is the answer of a replica that does not know something yet, or any more.
var notKnown = fault{before: true, status: 404, name: "404 of a replica",
	body: `{"error":{"message":"No such thing was found in this project.","type":"invalid_request_error","param":null,"code":"not_found"}}`}

// answers are the wrong answers that a call may have.
var answers = []fault{
	{name: "reset"},
	{name: "hang", hang: true},
	{name: "500", status: 500, body: `{"error":{"message":"The server had an error while processing your request.","type":"server_error","param":null,"code":null}}`},
	{name: "503", status: 503, body: `<html><body>upstream connect error</body></html>`},
	{name: "502", status: 502, body: ``},
	{name: "429", status: 429, body: `{"error":{"message":"Rate limit reached.","type":"requests","param":null,"code":"rate_limit_exceeded"}}`},
	{name: "429 with Retry-After", status: 429, retryAfter: "20", body: `{"error":{"message":"Rate limit reached.","type":"requests","param":null,"code":"rate_limit_exceeded"}}`},
	{name: "404 of a URL", status: 404, body: `{"error":{"message":"Invalid URL (DELETE /v1/organization)","type":"invalid_request_error","param":null,"code":null}}`},
	{name: "404 of a gateway", status: 404, body: `<html><head><title>404 Not Found</title></head></html>`},
	{name: "404 in a string", status: 404, body: `{"error":"Not Found"}`},
	{name: "404 of a route", status: 404, body: `{"detail":"Not Found"}`},
	{name: "403 of a gateway", status: 403, body: `<html><body>Request blocked</body></html>`},
	{name: "garbage", status: 200, body: `{"object":"orga`},
	{name: "nothing", status: 200, body: ``},
	{name: "an empty object", status: 200, body: `{}`},
	{name: "429 for an hour", status: 429, retryAfter: "3600", body: `{"error":{"message":"Rate limit reached.","type":"requests","param":null,"code":"rate_limit_exceeded"}}`},
	{name: "huge", status: 200, body: `{"a":"` + strings.Repeat("x", 5<<20) + `"}`},
}

// weather is how OpenAI and storage are just now.
type weather struct {
	w *world
	o *openai

	mu     sync.Mutex
	dice   *rand.Rand
	odds   int           // one call in so many goes wrong; 0 = none
	route  string        // only calls with this in their path; "" = all
	only   *fault        // what then happens; nil = anything
	lists  bool          // listings lag and fall short now and then
	hides  bool          // the same, and those of admin keys all lag
	young  bool          // replicas do not know what is new
	loses  int           // so many creates from now, the answer of one is lost; 0 = none
	longer time.Duration // by up to this each call of the Admin API takes longer
	delays time.Duration // by up to this each operation of storage does
	writes time.Duration // or only those that write: reads are the node's own
	reads  time.Duration // or only those that read: what was written is answered at once
	rests  bool          // for good: nothing is slow either
	closed int           // people who allow no new keys, or only short ones
	bad    bool          // until the next calm, which began at since
	since  time.Time
	admin  time.Time // since when calls about admin keys are well; zero = they are not
	stores int       // one storage operation in so many goes wrong
}

func newWeather(w *world, o *openai) *weather {
	return &weather{w: w, o: o, dice: w.dice("weather")}
}

// calm ends all that goes wrong.
func (x *weather) calm() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.odds, x.route, x.only, x.lists, x.young, x.stores = 0, "", nil, false, false, 0
	x.longer, x.bad, x.since = 0, false, time.Now()
	if x.admin.IsZero() {
		x.admin = x.since
	}
}

// adminCalmFor is calmFor of calls about admin keys alone.
func (x *weather) adminCalmFor(d time.Duration) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return !x.admin.IsZero() && time.Since(x.admin) >= d
}

// set changes something for a while. What goes wrong meanwhile is no calm.
func (x *weather) set(change func(x *weather)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	change(x)
	x.since = time.Now()
	if !x.admin.IsZero() {
		x.admin = x.since
	}
}

// burst has one call in so many go wrong from now on, none with 0.
func (x *weather) burst(odds int) {
	x.set(func(x *weather) {
		if !x.bad { // it is bad enough
			x.odds = odds
		}
	})
}

// slow has each call of the Admin API take up to d longer.
func (x *weather) slow(d time.Duration) { x.set(func(x *weather) { x.longer = d }) }

// storesWell reports whether no operation of storage fails.
func (x *weather) storesWell() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.stores == 0
}

// calmFor reports whether it has been calm for so long.
func (x *weather) calmFor(d time.Duration) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return !x.bad && x.closed == 0 && x.odds == 0 && !x.hides && x.longer == 0 && time.Since(x.since) >= d
}

// change is the weather of a life: calm and trouble in turns.
func (x *weather) change() {
	r := x.w.dice("weather changes")
	hours := func(n int) time.Duration { return time.Duration((0.2 + r.Float64()) * float64(n) * float64(time.Hour)) }
	for x.w.sleep(hours(3)) {
		x.mu.Lock()
		x.bad = true
		name := ""
		limit := 0
		switch r.IntN(9) {
		case 0, 1:
			x.odds, name = 3+r.IntN(30), "sprinkles"
		case 2:
			x.odds, x.only, name = 1, &answers[r.IntN(7)], "outage"
		case 3:
			x.odds, x.only = 1, &answers[r.IntN(len(answers))]
			if r.IntN(2) == 0 { // which keep a caller waiting
				x.only = &answers[[]int{1, 5}[r.IntN(2)]]
			}
			if x.route = []string{"service_accounts", "api_keys", "admin_api_keys"}[r.IntN(3)]; x.route == "service_accounts" {
				x.odds = 0 // not yet
			}
			name = "outage of " + x.route
		case 4:
			limit, name = 10, "ten calls a minute"
		case 5:
			x.lists, x.odds, name = true, 20, "listings lag"
		case 6:
			x.young, x.odds, name = true, 50, "replicas lag"
		case 7:
			x.stores, name = 20+r.IntN(200), "storage fails"
		case 8:
			x.longer, name = 25*time.Second, "slow"
		}
		lasts := hours(1)
		if x.w.Faults == 1 {
			lasts /= 6
		}
		if x.route != "service_accounts" { // api_keys are those of projects and admin_api_keys
			x.admin = time.Time{}
		}
		crowded := x.route == "service_accounts" || limit > 0
		x.mu.Unlock()
		if crowded { // there is much to revoke then, and an admin key to delete meanwhile
			x.w.act(func() { x.w.deploy(x.w.vault) })
			x.w.act(func() { _ = x.w.write(x.w.vault, "another", "config/rotate", nil) })
		}
		x.o.sim.Configure(func(o *openaitest.Options) {
			o.RatePerMinute, o.RetryAfter = limit, r.IntN(2) == 0
			o.ActivationDelay = []time.Duration{0, 0, time.Second, time.Second, 3 * time.Second, 8 * time.Second}[r.IntN(6)]
			o.AdminActivationDelay = []time.Duration{0, 0, 3 * time.Second, 10 * time.Second}[r.IntN(4)]
		})
		if crowded {
			x.w.sleep(time.Minute)
			x.set(func(x *weather) {
				if x.route != "" { // the outage was put off
					x.odds = 1
				}
			})
		}
		x.w.tell("weather", "%s for %s", name, lasts.Round(time.Second))
		if limit > 0 || name == "outage" || x.route != "" {
			x.w.ledger.troubled(lasts)
		}
		x.w.sleep(lasts)
		x.calm()
		x.o.sim.Configure(func(o *openaitest.Options) { o.RatePerMinute, o.ActivationDelay, o.AdminActivationDelay = 0, 0, 0 })
		x.w.tell("weather", "calm")
	}
}

// strike says what goes wrong with a call.
func (x *weather) strike(r *http.Request) (f fault) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if r.Method == http.MethodGet && (x.lists || x.hides) && !strings.HasSuffix(r.URL.Path, "/models") {
		f.lags, f.omits = x.dice.IntN(2) == 0, x.dice.IntN(2) == 0
		f.lags = f.lags || x.hides && strings.HasSuffix(r.URL.Path, "/admin_api_keys")
	}
	if x.young && x.dice.IntN(2) == 0 && x.w.ledger.isYoung(r, 4*time.Minute) {
		return notKnown
	}
	if x.loses > 0 && r.Method == http.MethodPost && !strings.Contains(r.URL.Path, "/api_keys/") {
		if x.loses--; x.loses == 0 {
			return fault{after: true, name: "reset"}
		}
	}
	if !x.rests && x.dice.IntN(200) == 0 {
		f.slow = time.Duration(x.dice.Int64N(int64(20 * time.Second)))
	}
	if x.longer > 0 && !strings.HasSuffix(r.URL.Path, "/models") {
		f.slow = time.Duration(x.dice.Int64N(int64(x.longer)))
	}
	if x.odds == 0 || x.dice.IntN(x.odds) > 0 || !strings.Contains(r.URL.Path, x.route) {
		return f
	}
	chosen := answers[x.dice.IntN(len(answers))]
	if x.only != nil {
		chosen = *x.only
	}
	if chosen.name == "huge" && x.dice.IntN(20) > 0 {
		chosen = answers[0] // it takes long to send
	}
	if chosen.status == 429 && strings.HasSuffix(r.URL.Path, "/models") {
		return f // OpenAI limits the rate of a key that it knows
	}
	chosen.lags, chosen.omits, chosen.slow = f.lags, f.omits, f.slow
	// A refusal comes before the effect; the rest on either side.
	refusal := chosen.status == 429 || chosen.status == 404 || chosen.status == 403
	if chosen.before = refusal || x.dice.IntN(2) == 0; !chosen.before {
		chosen.after = true
	}
	return chosen
}

// storageFault is what goes wrong with one operation.
type storageFault struct {
	before, after bool
	slow          time.Duration
}

func (x *weather) storage(write bool) (f storageFault) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.delays > 0 {
		f.slow = time.Duration(x.dice.Int64N(int64(x.delays)))
	}
	if write && x.writes > 0 {
		f.slow = time.Duration(x.dice.Int64N(int64(x.writes)))
	}
	if !write && x.reads > 0 {
		f.slow = time.Duration(x.dice.Int64N(int64(x.reads)))
	}
	if x.stores == 0 || x.dice.IntN(x.stores) > 0 {
		return f
	}
	switch x.dice.IntN(3) {
	case 0:
		f.before = true
	case 1:
		f.after = true
	case 2:
		f.slow = time.Duration(x.dice.Int64N(int64(3 * time.Second)))
	}
	return f
}

// calmDown has OpenAI answer at once and without limits.
func (o *openai) calmDown() {
	o.weather.calm()
	o.weather.mu.Lock()
	o.weather.rests = true
	o.weather.mu.Unlock()
	o.sim.Configure(func(c *openaitest.Options) { c.RatePerMinute, c.ActivationDelay, c.AdminActivationDelay = 0, 0, 0 })
}

// hasAdmin reports whether an admin key is alive.
func (o *openai) hasAdmin(id string) bool {
	return slices.ContainsFunc(o.sim.AdminKeys(), func(k openaitest.AdminKey) bool { return k.ID == id })
}

// expired reports whether a key has ended by its own expiry.
func (o *openai) expired(id string) bool {
	return slices.ContainsFunc(o.sim.Ledger(), func(e openaitest.Entry) bool { return e.ID == id && e.Event == openaitest.EventExpired })
}

// keysExpired reports whether all keys of what was an account have ended by their
// expiry.
func (o *openai) keysExpired(account string) bool {
	l := &o.w.ledger
	l.mu.Lock()
	var keys []string
	for id, t := range l.things {
		if t.account == account {
			keys = append(keys, id)
		}
	}
	l.mu.Unlock()
	return len(keys) > 0 && !slices.ContainsFunc(keys, func(id string) bool { return !o.expired(id) })
}
