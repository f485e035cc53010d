package openaisecrets

// What is told to Vault's event bus and observations. Every test's ear is
// searched for keys at its end, as the log is.

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-openai/client/openaitest"
)

// ear is the server's end of events and observations.
type ear struct {
	mu           sync.Mutex
	refusal      error
	asked        int
	events       map[string]map[string]string // the last of each type
	observations map[string]map[string]any
	all          strings.Builder
}

func (e *ear) SendEvent(_ context.Context, kind logical.EventType, event *logical.EventData) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	if e.refusal != nil {
		return e.refusal
	}
	data := map[string]string{}
	for name, value := range event.Metadata.AsMap() {
		data[name] = fmt.Sprint(value)
	}
	if e.events == nil {
		e.events = map[string]map[string]string{}
	}
	e.events[string(kind)] = data
	fmt.Fprintln(&e.all, kind, data)
	return nil
}

func (e *ear) RecordObservationFromPlugin(_ context.Context, kind string, data map[string]any) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	if e.refusal != nil {
		return e.refusal
	}
	if e.observations == nil {
		e.observations = map[string]map[string]any{}
	}
	e.observations[kind] = data
	fmt.Fprintln(&e.all, kind, data)
	return nil
}

func (e *ear) text() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all.String()
}

// heard waits for an event and its observation, and forgets them.
func (e *ear) heard(t *testing.T, kind string) map[string]string {
	t.Helper()
	var event map[string]string
	require.Eventually(t, func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.events[kind] == nil || e.observations[kind] == nil {
			return false
		}
		event = e.events[kind]
		for name, value := range e.observations[kind] {
			require.Equal(t, event[name], value, name)
		}
		delete(e.events, kind)
		delete(e.observations, kind)
		return true
	}, time.Minute, 5*time.Millisecond, "nothing was told of %s", kind)
	return event
}

func TestEvents_TellWhatWasDone(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.configure(nil)
	require.Equal(t, "openai/config", h.told.heard(t, eventConfigWrite)["data_path"])
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Equal(t, h.project, h.told.heard(t, eventRoleWrite)["project_id"])

	lease := h.lease("creds/app", nil)
	event := h.told.heard(t, eventIssue)
	for name, want := range map[string]string{
		"path": "openai/creds/app", "operation": "creds-create", "modified": "false", "name": "app", "project_id": h.project,
		"service_account_id": lease.Data["service_account_id"].(string), "api_key_id": lease.Data["api_key_id"].(string),
	} {
		require.Equal(t, want, event[name], name)
	}
	_, err := h.end(logical.RenewOperation, lease)
	require.NoError(t, err)
	require.Equal(t, "app", h.told.heard(t, eventRenew)["name"])
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
	require.Error(t, h.revoke(lease))
	require.Equal(t, "false", h.told.heard(t, eventRevokeFail)["modified"])
	require.NoError(t, h.revoke(lease))
	require.Equal(t, lease.Data["api_key_id"], h.told.heard(t, eventRevoke)["api_key_id"])

	h.must(h.write("config/rotate", nil))
	require.Equal(t, h.must(h.read("config")).Data["admin_api_key_id"], h.told.heard(t, eventRotate)["admin_api_key_id"])
	cancel := h.sim.Fail(openaitest.Fault{Route: "/organization/admin_api_keys", Method: http.MethodPost, Status: http.StatusBadRequest})
	h.refused(h.write("config/rotate", nil))
	cancel()
	h.told.heard(t, eventRotateFail)
	h.sim.Keep(h.adminKeyIDs()...)

	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_period": "1h"}))
	h.told.heard(t, eventStaticWrite)
	require.Equal(t, "openai/static-creds/batch", h.told.heard(t, eventStaticRotate)["data_path"])
	cancel = h.sim.Fail(openaitest.Fault{Route: routeNewKey, Status: http.StatusBadRequest})
	h.refused(h.write("rotate-role/batch", nil))
	cancel()
	h.told.heard(t, eventStaticRotateFail)
	h.must(h.remove("static-roles/batch"))
	h.told.heard(t, eventStaticDelete)

	h.must(h.write("tidy", nil))
	require.Equal(t, tidyFinished, h.told.heard(t, eventTidy)["state"])
	h.must(h.remove("roles/app"))
	h.told.heard(t, eventRoleDelete)
	h.must(h.remove("config"))
	h.told.heard(t, eventConfigDelete)
}

func TestEvents_AServerWithoutThemIsAskedOnce(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.told.refusal = status.Error(codes.Unimplemented, "unknown service")
	h.configure(nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Eventually(t, func() bool { return h.b.notices.noEvents.Load() && h.b.notices.noObservations.Load() }, time.Minute, 5*time.Millisecond)
	for range 5 {
		require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	}
	require.Eventually(t, func() bool { return len(h.b.notices.queue) == 0 }, time.Minute, 5*time.Millisecond)
	h.told.mu.Lock()
	defer h.told.mu.Unlock()
	require.LessOrEqual(t, h.told.asked, 2, "once for events and once for observations")
}

func TestEvents_CommunityIsToldNothing(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.system.PluginEnvironment = &logical.PluginEnvironment{VaultVersion: "1.21.2"}
	h.configure(nil)
	require.Eventually(t, func() bool { return h.b.notices.noEvents.Load() && h.b.notices.noObservations.Load() }, time.Minute, 5*time.Millisecond)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.told.mu.Lock()
	defer h.told.mu.Unlock()
	require.Zero(t, h.told.asked)
}

// A server that does not answer costs nobody any time.
func TestEvents_NobodyWaitsForThem(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.told.mu.Lock() // whoever tells it something waits
	for range eventQueue + 100 {
		h.b.notify(eventTidy, "openai/", "tidy", false)
	}
	require.Positive(t, h.b.notices.dropped.Load())
	h.told.mu.Unlock()
}

func TestEvents_AreDocumented(t *testing.T) {
	t.Parallel()
	code, err := os.ReadFile("events.go")
	require.NoError(t, err)
	page, err := os.ReadFile("docs/events.md")
	require.NoError(t, err)
	kinds := func(text []byte, pattern string) (found []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllSubmatch(text, -1) {
			found = append(found, string(m[1]))
		}
		slices.Sort(found)
		return slices.Compact(found)
	}
	require.Equal(t, kinds(code, `= "(openai/[a-z-]+)"`), kinds(page, "(?m)^\\| `(openai/[a-z-]+)` \\|"))
}
