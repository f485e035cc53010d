package openaisecrets

// The state machine of unmount.go alone, and a whole mount in each way in which Vault or
// OpenBao ends it, with faked calls of the server.

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

// fakeMount drives the state machine as Vault does.
type fakeMount struct {
	*unmount
	taint bool
	at    time.Time
}

func newFakeMount() *fakeMount {
	f := &fakeMount{at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	f.unmount = newUnmount(func() bool { return f.taint }, func() time.Time { return f.at }, func() bool { return false })
	return f
}

func (f *fakeMount) ask(op logical.Operation, handle func() error) {
	done := f.watch(context.Background(), &logical.Request{Operation: op, MountPoint: "openai/"})
	done(nil, handle())
}

// mountEvents are the events that a mount can see.
var mountEvents = map[string]func(f *fakeMount){
	"request":  func(f *fakeMount) { f.ask(logical.ReadOperation, func() error { return nil }) },
	"taint":    func(f *fakeMount) { f.taint = true },
	"untaint":  func(f *fakeMount) { f.taint = false },
	"rollback": func(f *fakeMount) { f.ask(logical.RollbackOperation, func() error { f.look(f.taint); return nil }) },
	"revoke":   func(f *fakeMount) { f.ask(logical.RevokeOperation, func() error { return nil }) },
	"fails":    func(f *fakeMount) { f.ask(logical.RevokeOperation, func() error { return errStorage }) },
	"canceled": func(f *fakeMount) { // a rollback that Vault cancels
		f.ask(logical.RollbackOperation, func() error { f.look(f.taint); f.fail(); return nil })
	},
	"seconds": func(f *fakeMount) { f.at = f.at.Add(unmountTick + time.Second) },
	"minutes": func(f *fakeMount) { f.at = f.at.Add(unmountPause + time.Second) },
}

func TestUnmountState_OnlyAnUndisturbedDisableIsOne(t *testing.T) {
	t.Parallel()
	for script, reason := range map[string]string{
		"request taint rollback":                                "",
		"rollback taint rollback":                               "",
		"request taint rollback revoke revoke":                  "",
		"request taint rollback seconds revoke seconds revoke":  "",
		"request taint rollback rollback":                       "", // an immediate second tick
		"request taint rollback revoke rollback revoke":         "",
		"request taint rollback revoke seconds rollback revoke": "",

		"taint rollback":                                                 reasonUnseen, // the process started under the taint
		"taint rollback revoke":                                          reasonUnseen,
		"request taint":                                                  reasonUnseen, // no rollback yet
		"request taint canceled":                                         reasonFailed,
		"request taint canceled rollback revoke":                         reasonFailed,
		"request taint rollback fails":                                   reasonFailed,
		"request taint rollback fails revoke":                            reasonFailed,
		"request taint rollback fails rollback":                          reasonFailed,
		"request taint rollback minutes":                                 reasonStopped,
		"request taint rollback revoke minutes":                          reasonStopped,
		"request taint rollback minutes revoke":                          reasonStopped,
		"request taint rollback seconds rollback":                        reasonStopped,
		"request taint rollback revoke rollback seconds rollback revoke": reasonStopped,

		"request taint rollback fails untaint request taint rollback":     "", // the next disable
		"taint rollback untaint rollback taint rollback revoke":           "",
		"request taint rollback minutes revoke untaint rollback":          reasonUnseen, // not tainted at all
		"request taint rollback fails untaint taint rollback":             reasonFailed, // the engine does not see the untaint
		"request fails taint rollback revoke":                             "",           // before the taint
		"request taint fails rollback revoke":                             reasonFailed, // of a disable whose rollback was in flight
		"request taint rollback untaint request seconds taint rollback":   "",
		"request taint rollback revoke untaint request taint rollback":    "",
		"request taint rollback request rollback":                         "", // requests that were in progress
		"request taint rollback request seconds rollback revoke revoke":   reasonStopped,
		"request taint rollback revoke seconds rollback seconds rollback": reasonStopped,
	} {
		f := newFakeMount()
		for _, event := range strings.Fields(script) {
			mountEvents[event](f)
		}
		require.Equal(t, reason, f.whyKeepStaticRoles(), script)
	}
}

// For each sequence of six events, the state machine must agree with isDisable, which
// applies the rule of unmount.go's header to the whole sequence.
func TestUnmountState_EverySequenceFollowsTheRule(t *testing.T) {
	t.Parallel()
	events := []string{"request", "taint", "untaint", "rollback", "canceled", "revoke", "fails", "seconds", "minutes"}
	const length = 6
	disables := 0
	var script [length]string
	var play func(n int)
	play = func(n int) {
		if n < length {
			for _, event := range events {
				script[n] = event
				play(n + 1)
			}
			return
		}
		f := newFakeMount()
		for _, event := range script {
			mountEvents[event](f)
		}
		got, want := f.whyKeepStaticRoles() == "", isDisable(script[:])
		if got != want {
			t.Fatalf("%v: a disable: %t, by the rule: %t (%s)", script, got, want, f.whyKeepStaticRoles())
		}
		if got {
			disables++
		}
	}
	play(0)
	require.Greater(t, disables, 100)
}

// isDisable is the rule: the engine saw the mount without the taint, then a rollback
// under a taint whose end it did not see, and since then no failure and no pause.
func isDisable(script []string) bool {
	tainted, seenWithout, begun, clean := false, false, false, false
	var sinceStep time.Duration
	revoked := false
	for _, event := range script {
		rollback := event == "rollback" || event == "canceled"
		looked := rollback || event == "request" && begun
		if !tainted && looked || event == "request" && !begun {
			seenWithout, begun = true, false
		}
		switch event {
		case "taint":
			tainted = true
		case "untaint":
			tainted = false
		case "rollback", "canceled":
			switch {
			case !tainted:
			case !begun:
				begun, clean, sinceStep = true, seenWithout, 0
			case !revoked && sinceStep > unmountTick:
				clean = false
			}
			revoked, clean = false, clean && event == "rollback"
		case "revoke", "fails":
			if begun && (sinceStep > unmountPause || event == "fails") {
				clean = false
			}
			begun = begun || tainted && event == "fails"
			sinceStep, revoked = 0, true
		case "seconds":
			sinceStep += unmountTick + time.Second
		case "minutes":
			sinceStep += unmountPause + time.Second
		}
	}
	return begun && clean && sinceStep <= unmountPause
}

// wayToEnd is one way in which a mount ends, or seems to.
type wayToEnd struct {
	bao bool   // on OpenBao
	at  string // the mount point
	run func(w *mountEnd)
	// Whether these work at OpenAI afterward: the leased credentials, the static role's
	// key and the superseded admin key.
	leases, static, admin bool
	// over means that Vault deletes the storage, so no process follows.
	over bool
}

// mountEnd is a mount that ends in one of these ways.
type mountEnd struct {
	*harness
	at       string
	one, two *logical.Response
}

func (w *mountEnd) rollback() { w.tickAt(w.at) }
func (w *mountEnd) taint()    { w.manager.taint() }
func (w *mountEnd) unload()   { w.b.Cleanup(context.Background()) }
func (w *mountEnd) wipe()     { w.storage.swap(&logical.InmemStorage{}) }

func (w *mountEnd) revokes()  { w.revokesOne(w.one); w.revokesOne(w.two) }
func (w *mountEnd) followed() { w.restartStatic() }
func (w *mountEnd) revokesOne(l *logical.Response) {
	w.t.Helper()
	secret := *l.Secret
	_, err := w.b.HandleRequest(w.t.Context(), &logical.Request{Operation: logical.RevokeOperation, Path: "creds/app", Storage: w.storage, MountPoint: w.at, Secret: &secret, Data: l.Data})
	require.NoError(w.t, err)
}

// waysToEnd are the rows of docs/architecture.md, by name.
var waysToEnd = map[string]wayToEnd{
	"disable": {at: "openai/", over: true, run: func(w *mountEnd) { w.taint(); w.rollback(); w.revokes(); w.unload(); w.wipe() }},
	"disable that fails": {at: "openai/", leases: true, static: true, run: func(w *mountEnd) {
		w.taint()
		w.rollback()
		w.refusesOnce()
		require.Error(w.t, w.revoke(w.one)) // Vault gives up, and the taint stays
		w.advance(time.Minute)
		w.rollback()
		w.unload() // a restart
		w.followed()
	}},
	"move": {at: "openai/", static: true, run: func(w *mountEnd) {
		w.taint()
		w.rollback()
		w.revokes()
		w.manager.untaint()
		w.at = "moved/"
		w.rollback()
	}},
	"move that fails": {at: "openai/", static: true, run: func(w *mountEnd) {
		w.taint()
		w.rollback()
		w.revokes() // then the new path is in use; the taint stays
		w.advance(time.Minute)
		w.rollback()
		w.unload()
		w.followed()
	}},
	"move across namespaces (OpenBao)": {at: "openai/", bao: true, static: true, run: func(w *mountEnd) {
		w.taint()
		w.rollback()
		w.revokes()
		w.manager.untaint()
		moved := w.storage.swap(&logical.InmemStorage{}) // the process still has the old view
		w.at = "target/openai/"
		resp, err := w.read("static-creds/batch")
		require.True(w.t, err != nil || resp.IsError(), "the role is missing until the reload")
		w.rollback()
		w.unload()
		w.storage.swap(moved)
		w.followed()
	}},
	"reload":  {at: "openai/", leases: true, static: true, admin: true, run: func(w *mountEnd) { w.unload(); w.followed() }},
	"upgrade": {at: "openai/", leases: true, static: true, admin: true, run: func(w *mountEnd) { w.unload(); w.followed() }},
	"step-down": {at: "openai/", leases: true, static: true, admin: true, run: func(w *mountEnd) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // cancels Vault's requests
		_, _ = w.b.HandleRequest(ctx, &logical.Request{Operation: logical.RollbackOperation, Storage: w.storage, MountPoint: w.at})
		w.unload()
		w.followed() // on another node
	}},
	"seal": {at: "openai/", leases: true, static: true, admin: true, run: func(w *mountEnd) { w.unload(); w.followed() }},
	"namespace seal (OpenBao)": {at: "team/openai/", bao: true, leases: true, static: true, admin: true, run: func(w *mountEnd) {
		w.taint() // in memory only
		w.rollback()
		w.unload()
		w.manager.untaint()
		w.followed() // after the unseal
	}},
	"namespace deletion (OpenBao)": {at: "team/openai/", bao: true, leases: true, static: true, admin: true, over: true, run: func(w *mountEnd) {
		w.taint()
		w.rollback() // its leases are under sys/, which is deleted first: none is revoked
		w.unload()
		w.wipe()
	}},
	"disable in a namespace (OpenBao)": {at: "team/openai/", bao: true, static: true, admin: true, over: true, run: func(w *mountEnd) { w.taint(); w.rollback(); w.revokes(); w.unload(); w.wipe() }},
	"server kill":                      {at: "openai/", leases: true, static: true, admin: true, run: func(w *mountEnd) { w.followed() }},
}

func TestUnmount_EachWayAMountEnds(t *testing.T) {
	t.Parallel()
	for name, way := range waysToEnd {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, one, two := leased(t)
			h.must(h.write("config/rotate", nil))
			admins := h.adminKeyIDs()
			require.Len(t, admins, 2)
			h.sim.Keep(admins...)
			h.advance(2 * time.Minute) // from here on, a refusal is not due to a new key
			if way.bao {
				h.b.getenv = baoEnv
			}
			young := h.account(h.project, "vault-app-young", 24*time.Hour)
			require.NoError(t, putWALEntry(t.Context(), h.storage, "young", walAccount, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, Name: "vault-app-young", CreatedAt: h.now()}, h.now()))
			batch := h.storedStatic("batch")
			h.releaseStatic()
			w := &mountEnd{harness: h, at: way.at, one: one, two: two}
			w.rollback()
			require.NoError(t, h.b.static.worker.End(t.Context()))

			way.run(w)

			// The first lease is the one whose revocation fails; the WAL deletes its account.
			require.Equal(t, way.leases, h.accepted(two.Data["api_key"].(string)), "a leased credential works")
			require.Equal(t, way.static, h.accepted(batch.Current.Value.Reveal()), "the static role's key works")
			require.Equal(t, way.admin, slices.Equal(admins, h.adminKeyIDs()), "the superseded admin key exists")
			if way.over {
				said := h.log.String()
				if way.static {
					require.Len(t, lines(said, "static role keeps its credential"), 1, "the log names what stays")
					require.Contains(t, h.liveAccounts(), young)
				} else {
					require.NotContains(t, h.liveAccounts(), young)
				}
				h.sim.KeepAll()
				return
			}
			// The mount continues: everything works, and nothing is left over.
			h.manager.untaint()
			require.Equal(t, batch.Current.ID, h.staticCreds("batch")["api_key_id"])
			h.must(h.write("rotate-role/batch", nil))
			for _, lease := range []*logical.Response{one, two} {
				require.NoError(t, h.revoke(lease))
			}
			h.advance(notFinalBefore)
			h.advance(defaultRevocationDelay)
			h.runPeriodicWork()
			h.runStaticWorker()
			h.onlyStatic()
			require.Len(t, h.adminKeyIDs(), 1)
			require.NoError(t, h.revoke(h.lease("creds/app", nil)))
			h.deleteStaticRole("batch")
		})
	}
}

// Each row of the page is one of waysToEnd, with the same result.
func TestUnmount_TheArchitecturePageHasEachWay(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/architecture.md")
	require.NoError(t, err)
	_, table, found := strings.Cut(string(page), "\n## The end of a mount\n")
	require.True(t, found)
	table, _, _ = strings.Cut(table, "\n## ")
	rows := map[string]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+?) \|[^|]*\| ([^|]+?) \|$`).FindAllStringSubmatch(table, -1)[1:] {
		rows[row[1]] = row[2]
	}
	delete(rows, "---")
	for name, way := range waysToEnd {
		require.Contains(t, rows, name)
		var left []string
		for what, is := range map[string]bool{"leased credentials": way.leases, "static roles": way.static, "superseded admin keys": way.admin} {
			if is {
				left = append(left, what)
			}
		}
		slices.Sort(left)
		switch len(left) {
		case 0:
			left = []string{"nothing"}
		case 3:
			left = []string{"everything"} // as the page explains
		}
		require.True(t, strings.HasPrefix(rows[name], strings.Join(left, ", ")), "%s: the page says %q, the test %q", name, rows[name], left)
	}
	require.Len(t, rows, len(waysToEnd), fmt.Sprint(rows))
}
