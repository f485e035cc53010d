package simulation

// Stories hold the model of Vault against Vault: testdata/stories.txt has short
// scripts, and what a plugin is asked for at each step. The model is held against
// that file here, a real server in stories_server_test.go, which also writes it.
//
// A step is a line that begins with ">". Below it are the calls that the plugin
// receives in their order, and what came of the step: "= ..." an answer, "!" an error.
// Ticks of the rollback manager come by the clock, so they are told only where a step
// waits for one, or where Vault asks for one itself. The calls of steps that revoke
// several leases at the same time are sorted.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/simulation/probe"
)

const storiesFile = "testdata/stories.txt"

// story is a script, with what is expected of it.
type story struct {
	title string
	steps []step
}

type step struct {
	words []string
	calls int    // how many are expected
	came  string // what is expected to come of it, with the calls
}

func (s story) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n", s.title)
	for _, step := range s.steps {
		fmt.Fprintf(&b, "> %s\n%s", strings.Join(step.words, " "), step.came)
	}
	return b.String()
}

// has reports whether a story has a step of one of the verbs.
func (s story) has(verbs ...string) bool {
	return slices.ContainsFunc(s.steps, func(step step) bool { return slices.Contains(verbs, step.words[0]) })
}

func readStories(t *testing.T) (all []story) {
	t.Helper()
	content, err := os.ReadFile(storiesFile)
	require.NoError(t, err)
	for _, line := range strings.Split(string(content), "\n") {
		if title, ok := strings.CutPrefix(line, "# "); ok {
			all = append(all, story{title: title})
			continue
		}
		if line == "" || len(all) == 0 {
			continue
		}
		s := &all[len(all)-1]
		if words, ok := strings.CutPrefix(line, "> "); ok {
			s.steps = append(s.steps, step{words: strings.Fields(words)})
			continue
		}
		last := &s.steps[len(s.steps)-1]
		last.came += line + "\n"
		if line[0] != '=' && line[0] != '!' {
			last.calls++
		}
	}
	require.GreaterOrEqual(t, len(all), 30)
	return all
}

// stage is where a story is played.
type stage interface {
	// do takes a step, and returns what it answers.
	do(verb string, args []string) (string, error)
	// calls are those that the plugin has received since the last time.
	calls() []string
}

// play plays a story and returns what came of it. A step ends when no more calls come;
// or, where time is dear, when those that are expected have come, and what is early
// counts for the next step.
func (s story) play(on stage, calm bool) story {
	played := story{title: s.title}
	var waiting []string
	for i, step := range s.steps {
		verb := step.words[0]
		asked := false
		receive := func() {
			for _, call := range on.calls() {
				if strings.HasPrefix(call, "rollback") {
					told := verb == "tick" || (strings.HasSuffix(call, " tainted") && (verb == "disable" || verb == "move"))
					if !told || asked {
						continue
					}
					asked = true
				}
				waiting = append(waiting, call)
			}
		}
		receive()
		answer, err := "", error(nil)
		switch {
		case verb == "wait":
			d, _ := time.ParseDuration(step.words[1]) // 0 shows at once
			time.Sleep(d)
		case verb != "tick":
			answer, err = on.do(verb, step.words[1:])
		}
		for tries := 0; verb == "lookup" && !calm && !strings.HasPrefix(step.came, "= "+answer) && tries < 50; tries++ {
			time.Sleep(100 * time.Millisecond) // a lease goes after its revocation
			answer, err = on.do(verb, step.words[1:])
		}
		last := i == len(s.steps)-1
		for began, count := time.Now(), -1; ; time.Sleep(20 * time.Millisecond) {
			if receive(); len(waiting) != count && (calm || last) {
				began, count = time.Now(), len(waiting)
			}
			patience := 20 * time.Second
			switch {
			case verb == "tick" && !asked:
				patience = 65 * time.Second
			case calm || (last && len(waiting) >= step.calls):
				patience = 1500 * time.Millisecond
			case len(waiting) >= step.calls:
				patience = 0
			}
			if time.Since(began) >= patience {
				break
			}
		}
		calls := waiting
		if !calm && !last {
			calls = calls[:min(step.calls, len(calls))]
		}
		waiting = waiting[len(calls):]
		if verb == "revoke-all" || verb == "end" {
			calls = slices.Sorted(slices.Values(calls))
		}
		came := strings.Join(append(slices.Clip(calls), ""), "\n")
		if answer != "" {
			came += "= " + answer + "\n"
		}
		if err != nil {
			came += "!\n"
		}
		step.came = came
		played.steps = append(played.steps, step)
	}
	return played
}

// rounded is how the answers of stories tell the length of a lease.
func rounded(d time.Duration) string {
	if d > 2*time.Minute {
		return d.Round(time.Minute).String()
	}
	return d.Round(10 * time.Second).String()
}

func TestStoriesOnTheModel(t *testing.T) {
	for _, s := range readStories(t) {
		t.Run(s.title, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newModelStage()
				defer m.end()
				require.Equal(t, s.String(), s.play(m, true).String())
			})
		})
	}
}

// modelStage plays on the model.
type modelStage struct {
	w      *world
	v      *vault
	leases map[string]*lease
	tokens map[string]*token
	kept   *snapshot

	mu       sync.Mutex
	how      string
	recorded []string
}

func newModelStage() *modelStage {
	m := &modelStage{w: newWorld(Settings{Seed: 1}), leases: map[string]*lease{}, tokens: map[string]*token{}}
	m.v = m.w.vault
	m.v.plugin = func(p *process) logical.Factory {
		return probe.Options{
			Record: func(call string) {
				if !p.dead.Load() { // what is dead reaches nobody
					m.mu.Lock()
					defer m.mu.Unlock()
					m.recorded = append(m.recorded, call)
				}
			},
			Control: func() string { m.mu.Lock(); defer m.mu.Unlock(); return m.how },
			Die:     p.kill,
		}.Factory
	}
	m.v.mounted = false
	m.v.start()
	return m
}

func (m *modelStage) end() {
	m.v.end()
	m.w.openai.close()
	close(m.w.ended)
}

func (m *modelStage) calls() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := m.recorded
	m.recorded = nil
	return all
}

func (m *modelStage) do(verb string, args []string) (string, error) {
	v, ctx := m.v, context.Background()
	arg := append(slices.Clone(args), make([]string, 5)...)
	switch verb {
	case "plugin":
		m.mu.Lock()
		defer m.mu.Unlock()
		m.how = strings.Join(args, " ")
	case "mount":
		v.enable()
	case "write", "read":
		op := map[string]logical.Operation{"write": logical.UpdateOperation, "read": logical.ReadOperation}[verb]
		_, err := v.request(ctx, op, arg[0], map[string]any{"value": "x"})
		return "", err
	case "issue": // a role, "as", a name, and "hangs up" or "by" with a token
		by := m.tokens[arg[4]]
		if arg[3] == "hangs" {
			var cancel context.CancelFunc
			ctx, cancel = context.WithCancel(ctx)
			time.AfterFunc(time.Second, cancel)
		}
		l, resp, err := v.issueBy(ctx, by, arg[0], map[string]any{"as": arg[2]})
		switch {
		case err == nil:
			m.leases[arg[2]] = l
			return rounded(v.endOf(l).Sub(l.issue)), nil
		case resp != nil && !resp.IsError() && ctx.Err() == nil:
			return "no lease", nil
		}
		return "", err
	case "renew":
		increment, _ := time.ParseDuration(arg[1])
		err := v.renew(ctx, m.leases[arg[0]].id, increment)
		if err != nil {
			return "", err
		}
		return rounded(m.leases[arg[0]].expire.Sub(v.now())), nil
	case "lookup":
		if v.lookup(m.leases[arg[0]].id) == nil {
			return "gone", nil
		}
		return "there", nil
	case "revoke":
		v.revoke(m.leases[arg[0]].id)
	case "revoke-sync":
		return "", v.revokeNow(m.leases[arg[0]].id)
	case "revoke-all":
		v.revokeWhere(func(l *lease) bool { return l.role == arg[0] })
	case "revoke-prefix":
		return "", v.revokeRole(ctx, strings.TrimPrefix(arg[0], "all"), arg[1] == "force")
	case "token":
		ends, _ := time.ParseDuration(arg[2])
		m.tokens[arg[0]] = v.token(arg[1] == "batch", ends)
	case "end":
		v.revokeWhere(func(l *lease) bool { return l.token == m.tokens[arg[0]] })
	case "disable":
		return "", v.disable()
	case "move":
		return "", v.move(arg[0]+"/", false)
	case "tune":
		longest, _ := time.ParseDuration(arg[0])
		v.maxTTL.Store(int64(longest))
	case "reload":
		v.reload()
		if _, p, err := v.active(); err == nil {
			return "", p.broken
		}
	case "kill":
		if _, p, err := v.serving(); err == nil {
			p.kill()
			time.Sleep(time.Second) // until Vault has noticed
		}
	case "seal":
		v.stop(true)
	case "crash":
		v.stop(false)
	case "unseal":
		v.start()
	case "step-down":
		v.stepDown(0)
	case "snapshot":
		m.kept = v.snapshot()
	case "restore":
		v.restore(m.kept)
	default:
		return "", errors.New("no such step")
	}
	return "", nil
}
