package openaisecrets

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/job"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/schedule"
)

const (
	listAccountsRoute  = "/organization/projects/{project_id}/service_accounts"
	listKeysRoute      = "/organization/projects/{project_id}/api_keys"
	deleteAccountRoute = "/organization/projects/{project_id}/service_accounts/{service_account_id}"
)

// listed returns the IDs of the accounts in a tidy status.
func listed(status map[string]any) []string {
	ids := []string{}
	for _, o := range status["orphans"].([]any) {
		ids = append(ids, o.(map[string]any)["service_account_id"].(string))
	}
	return ids
}

// crowd is 500 accounts in three projects.
type crowd struct {
	*harness
	projects              []string
	orphans, rest, leased []string
}

func newCrowd(t *testing.T) *crowd {
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	c := &crowd{harness: h, projects: []string{h.project, h.sim.AddProject("two"), h.sim.AddProject("three")}}
	other := h.anotherMount()
	for i, id := range c.projects {
		for _, m := range []*harness{h, other} {
			m.must(m.write(fmt.Sprintf("roles/short-%d", i), map[string]any{"project_id": id, "ttl": "1m", "max_ttl": "5m"}))
			m.must(m.write(fmt.Sprintf("roles/long-%d", i), map[string]any{"project_id": id, "service_account_name_template": "{{.RandomSuffix}}{{.RoleName}}"}))
		}
	}
	lease := func(m *harness, role string, i int) string {
		return m.lease(fmt.Sprintf("creds/%s-%d", role, i%3), nil).Data["service_account_id"].(string)
	}
	for i := range 40 {
		c.orphans = append(c.orphans, lease(h, "short", i))
	}
	for i := range 20 {
		c.rest = append(c.rest, lease(other, "short", i))
	}
	tag := h.ours()[len("vault-app-"):][:naming.TagLength]
	for i := range 20 {
		name := []string{"ci", "vault-app-" + tag, tag + "-abcdefghij", tag + "abcdefghi", strings.ToUpper(tag + "abcdefghij")}[i%5]
		c.rest = append(c.rest, h.sim.AddServiceAccount(c.projects[i%3], name))
	}
	for i := range 200 {
		c.leased = append(c.leased, lease(h, "long", i))
	}
	h.advance(time.Hour)
	for i := range 220 { // younger than the buffer
		c.leased = append(c.leased, lease(h, []string{"long", "short"}[i%2], i))
	}
	require.Len(t, h.alive(), 500)
	c.rest = append(c.rest, c.leased...)
	return c
}

func TestTidy_DeletesExactlyTheOrphans(t *testing.T) {
	t.Parallel()
	path := func(project string) string {
		return strings.Replace(listAccountsRoute, "{project_id}", project, 1)
	}
	for name, test := range map[string]struct {
		fault  func(c *crowd) openaitest.Fault
		hidden bool // by a retry
	}{
		"no fault": {hidden: true},
		"a page fails twice": {hidden: true, fault: func(c *crowd) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: path(c.projects[1]), Skip: 1, Times: 2, Status: 500}
		}},
		"a page of accounts is refused": {fault: func(c *crowd) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: path(c.projects[1]), Skip: 1, Times: 1, Status: 403}
		}},
		"a page of keys is refused": {fault: func(*crowd) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodGet, Route: listKeysRoute, Skip: 3, Times: 1, Status: 400}
		}},
		"deletes fail once": {hidden: true, fault: func(*crowd) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodDelete, Skip: 7, Times: 1, Kind: openaitest.FaultLost}
		}},
		"two deletes are refused": {fault: func(*crowd) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodDelete, Skip: 7, Times: 2, Status: 400}
		}},
		"one project's deletes all fail": {fault: func(c *crowd) openaitest.Fault {
			return openaitest.Fault{Method: http.MethodDelete, Route: path(c.projects[0]) + "/*", Status: 501}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCrowd(t)
			require.NoError(t, c.b.writeUsage(t.Context(), c.storage)) // or the crowd's usage records would be written during the dry run
			c.storage.fail(storageFault{write: -1})
			status := c.tidy(false)
			require.Equal(t, tidyFinished, status["state"])
			require.ElementsMatch(t, c.orphans, listed(status))
			require.Equal(t, 40, status["orphan_count"])
			require.Equal(t, 460, status["account_count"])
			require.Equal(t, 3, status["project_count"])
			require.Equal(t, 3, status["done_project_count"])
			require.Zero(t, status["deleted_count"])
			require.Len(t, c.alive(), 500, "a dry run deletes nothing")
			require.Empty(t, c.storage.writes, "a dry run writes nothing")

			if test.fault != nil {
				c.sim.Fail(test.fault(c))
			}
			status = c.tidy(true)
			if test.hidden {
				require.Equal(t, tidyFinished, status["state"], status["error"])
				require.Equal(t, 40, status["deleted_count"])
			} else {
				require.Equal(t, tidyError, status["state"])
				require.NotEmpty(t, status["error"])
				require.Equal(t, 3, status["done_project_count"], "a failure in one project does not stop the others")
				require.Greater(t, status["deleted_count"], 20)
				require.Subset(t, c.alive(), c.rest)
				c.sim.ClearFaults()
				status = c.tidy(true)
				require.Equal(t, tidyFinished, status["state"], "the next run succeeds")
			}
			require.ElementsMatch(t, c.rest, c.alive())
			require.Equal(t, 40, strings.Count(c.log.String(), `"orphan deleted"`), "one log line for each orphan")
			status = c.tidy(true)
			require.Equal(t, 420, status["account_count"])
			require.Zero(t, status["orphan_count"])
		})
	}
}

func TestTidy_ReportsOrphansAndReasons(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	keyless := h.account(h.project, h.ours(), time.Hour)
	require.NoError(t, h.api().DeleteProjectKey(t.Context(), h.project, h.sim.Keys()[0].ID))
	two := h.account(h.project, h.ours(), time.Minute)
	_, err := h.api().CreateServiceAccountKey(t.Context(), h.project, two, "by hand", nil, 5*time.Minute)
	require.NoError(t, err)
	one := h.orphan()
	h.advance(time.Hour)

	h.advance(defaultMaxTTL)

	status := h.tidy(false)
	require.Equal(t, "1 of 1 projects processed, 2 orphans found, 0 deleted", status["message"])
	require.Equal(t, 1, status["unconfirmed_count"])
	h.advance(confirmAfter + time.Second)
	status = h.tidy(false)
	require.Equal(t, tidyFinished, status["state"])
	require.Equal(t, "1 of 1 projects processed, 3 orphans found, 0 deleted", status["message"])
	why := map[string]string{}
	for _, entry := range status["orphans"].([]any) {
		o := entry.(map[string]any)
		why[o["service_account_id"].(string)] = o["why"].(string)
		require.Contains(t, o["service_account"], "vault-app-")
		require.Equal(t, h.project, o["project_id"])
		require.InDelta(t, 25*3600+20*60, o["age"], 600)
		created, err := time.Parse(time.RFC3339, o["created_at"].(string))
		require.NoError(t, err)
		require.WithinDuration(t, h.now().Add(-defaultMaxTTL-time.Hour-17*time.Minute), created, time.Minute)
	}
	require.Equal(t, "it has no key", why[keyless])
	require.Regexp(t, `^its key expired at \d{4}-.*Z$`, why[one])
	require.Regexp(t, `^its 2 keys have expired, the last at .*Z$`, why[two])

	require.Equal(t, 3, h.tidy(true)["deleted_count"])
	h.onlyLeased()
}

func TestTidy_NeverDeletesALiveKey(t *testing.T) {
	t.Parallel()
	for name, keep := range map[string]func(h *harness, id string){
		"a key created by hand": func(h *harness, id string) {
			_, err := h.api().CreateServiceAccountKey(t.Context(), h.project, id, "by hand", nil, time.Hour)
			require.NoError(t, err)
		},
		"a key without an expiry": func(h *harness, id string) {
			_, err := h.api().CreateServiceAccountKey(t.Context(), h.project, id, "by hand", nil, 0)
			require.NoError(t, err)
		},
		"a key that expired just now by this clock": func(h *harness, id string) {
			_, err := h.api().CreateServiceAccountKey(t.Context(), h.project, id, "by hand", nil, time.Second)
			require.NoError(t, err)
			h.advance(30 * time.Second)
		},
		"a key with an unknown owner": func(h *harness, _ string) {
			h.sim.Fail(openaitest.Fault{Route: listKeysRoute, Kind: openaitest.FaultGarbage, Body: `{"object":"list","data":[{"object":"organization.project.api_key","id":"key_1","owner":{"type":"robot"}}],"first_id":"key_1","last_id":"key_1","has_more":false}`})
		},
		"keys that cannot be listed": func(h *harness, _ string) {
			h.sim.Fail(openaitest.Fault{Route: listKeysRoute, Status: 403})
		},
		"a WAL entry": func(h *harness, id string) {
			_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: 1, Type: typeAccount, ProjectID: h.project, ID: id})
			require.NoError(t, err)
		},
		"a tag that cannot be read": func(h *harness, _ string) {
			require.NoError(t, h.storage.Put(t.Context(), &logical.StorageEntry{Key: mountStorageKey, Value: []byte(`{"version":1}`)}))
			h.restart()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			id := h.orphan()
			h.sim.KeepAll()
			keep(h, id)
			h.tidy(true)
			require.Equal(t, []string{id}, h.alive())
		})
	}
}

func TestTidy_SafetyBuffer(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.account(h.project, h.ours(), time.Second)
	h.advance(9 * time.Minute)
	require.Zero(t, h.tidy(true)["orphan_count"])
	h.must(h.write("config", map[string]any{"tidy_safety_buffer": "50s"}))
	status := h.tidy(true)
	require.Equal(t, int64(50), status["safety_buffer"])
	require.Equal(t, 1, status["deleted_count"])

	h.account(h.project, h.ours(), time.Second)
	h.advance(20 * time.Second)
	require.Zero(t, h.tidy(true)["orphan_count"])
	h.advance(34 * time.Second)
	require.Equal(t, 1, h.tidy(true)["orphan_count"], "the clock slack does not exceed the buffer")
	h.onlyLeased()
}

// Tidy reads an old listing again before it deletes more accounts of it.
func TestTidy_ReadsTheListingAgain(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for range 3 {
		h.orphan()
	}
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(r *http.Request) {
		for _, id := range h.alive() { // as if this delete had taken an hour
			if !strings.HasSuffix(r.URL.Path, id) {
				_, err := h.api().CreateServiceAccountKey(context.Background(), h.project, id, "by hand", nil, 10*time.Hour)
				require.NoError(t, err)
				break
			}
		}
		h.advance(time.Hour)
	}})
	status := h.tidy(true)
	require.Equal(t, tidyFinished, status["state"])
	require.Equal(t, 3, status["orphan_count"])
	require.Equal(t, 3, status["account_count"], "not counted twice")
	require.Len(t, listed(status), 3)
	require.Equal(t, 2, status["deleted_count"])
	require.Len(t, h.alive(), 1)
	require.Len(t, h.sim.Keys(), 1)
	h.sim.KeepAll()
}

func TestTidy_TriesEachOrphanOnce(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for range 2 {
		h.orphan()
	}
	h.sim.KeepAll()
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 400, OnStrike: func(*http.Request) { h.advance(time.Hour) }})
	status := h.tidy(true)
	require.Equal(t, 2, status["orphan_count"])
	require.Equal(t, 2, status["failed_count"])
	require.Len(t, status["errors"], 2)
}

func TestTidy_UsesTheActiveAdminKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for range 2 {
		h.orphan()
	}
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) {
		id, key := h.sim.AddAdminKey("another")
		h.must(h.write("config", map[string]any{"admin_api_key": key}))
		for _, k := range h.sim.AdminKeys() {
			if k.ID != id {
				h.sim.DeleteAdminKey(k.ID)
			}
		}
	}})
	h.tidy(true)
	h.tidy(true) // repeats the deletes that failed with the old key
	h.onlyLeased()
}

func TestTidy_SearchesEveryProjectThatRolesUsed(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	second, third := h.sim.AddProject("second"), h.sim.AddProject("third")
	h.must(h.write("roles/moved", map[string]any{"project_id": second}))
	h.must(h.write("roles/moved", map[string]any{"project_id": third}))
	h.must(h.remove("roles/moved"))
	h.must(h.remove("roles/app"))
	for _, id := range []string{h.project, second, third} {
		h.account(id, h.ours(), time.Second)
	}
	h.advance(time.Hour)
	h.restart()
	require.Equal(t, 3, h.tidy(true)["deleted_count"])
	h.onlyLeased()
}

func TestTidy_SkipsArchivedAndUnknownProjects(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	archived, unknown := h.sim.AddProject("old"), h.sim.AddProject("of another organization")
	h.must(h.write("roles/old", map[string]any{"project_id": archived}))
	h.must(h.write("roles/elsewhere", map[string]any{"project_id": unknown}))
	h.orphan()
	h.sim.ArchiveProject(archived)
	gone := func() (cancel func()) {
		return h.sim.Fail(openaitest.Fault{Status: 404, Message: "no such project", Match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, unknown) }})
	}
	// projects makes OpenAI list only these projects.
	projects := func(ids ...string) (cancel func()) {
		data := []any{}
		for _, id := range ids {
			data = append(data, map[string]any{"object": "organization.project", "id": id, "name": "n", "created_at": 1, "archived_at": nil, "status": "active"})
		}
		body, err := json.Marshal(map[string]any{"object": "list", "data": data, "first_id": nil, "last_id": nil, "has_more": false})
		require.NoError(t, err)
		return h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: "/organization/projects", Kind: openaitest.FaultGarbage, Body: string(body)})
	}
	cancel := gone()

	status := h.tidy(true)
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, 3, status["project_count"])
	require.Equal(t, 2, status["skipped_project_count"])
	require.Equal(t, 1, status["deleted_count"], "skipped projects do not stop the run")
	require.Len(t, h.recorded(), 3, "roles still use these projects")

	h.must(h.remove("roles/old"))
	h.must(h.remove("roles/elsewhere"))
	h.tidy(false)
	require.Len(t, h.recorded(), 3, "a dry run changes nothing")
	h.tidy(true)
	require.Len(t, h.recorded(), 3, "reports still count what was spent in the archived project")
	h.must(h.write("config", map[string]any{"usage_retention": 0}))
	h.tidy(true)
	require.ElementsMatch(t, []string{h.project, unknown}, h.recorded(), "archived is final, unknown may be temporary")

	h.advance(forgetAfter - time.Hour)
	h.tidy(true)
	require.Len(t, h.recorded(), 2)
	cancel()
	h.tidy(true) // the project is listed again
	cancel = gone()
	h.advance(2 * time.Hour)
	h.tidy(true)
	h.advance(forgetAfter + time.Second)
	cancel()
	gone()
	h.tidy(true)
	require.Len(t, h.recorded(), 2, "the list of projects contains it")
	for _, ids := range [][]string{{}, {"proj_of_others"}, {"proj_of_others", unknown}} {
		cancel := projects(ids...)
		h.tidy(true)
		require.Len(t, h.recorded(), 2, "not the list of this organization: %v", ids)
		cancel()
	}
	projects("proj_of_others", h.project)
	h.tidy(true)
	require.Equal(t, []string{h.project}, h.recorded())
	h.onlyLeased()
}

// What was spent in a project counts after it was archived and its last role deleted.
func TestTidy_AnArchivedProjectStaysInReportsUntilTheRetentionEnds(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	at := h.now().UTC()
	h.until(time.Date(at.Year(), at.Month()+1, 15, 12, 0, 0, 0, time.UTC)) // reports are of the month
	archived := h.sim.AddProject("old")
	h.must(h.write("roles/old", map[string]any{"project_id": archived}))
	lease := h.must(h.read("creds/old"))
	h.sim.AddCost(archived, lease.Data["api_key_id"].(string), "gpt-6, input_tokens", h.now(), "7")
	h.must(h.remove("roles/old"))
	h.sim.ArchiveProject(archived)
	var last *logical.Response
	total := func() string {
		last = h.must(h.do(t.Context(), logical.ReadOperation, "usage", map[string]any{"group_by": "role", "format": "json"}))
		return fmt.Sprint(last.Data["total"])
	}
	for range 2 {
		h.tidy(true)
		require.Equal(t, "7", total())
		h.advance(24 * time.Hour)
	}

	// Should OpenAI answer nothing about it, it answers about the others.
	h.sim.AddCost(h.project, "", "", h.now(), "2")
	cancel := h.sim.Fail(openaitest.Fault{Status: 400, Message: "project is archived", Match: func(r *http.Request) bool {
		return strings.Contains(r.URL.RawQuery, archived)
	}})
	h.advance(time.Hour) // longer than a report is kept
	require.Equal(t, "2", total())
	require.Contains(t, h.log.String(), "costs of archived projects are not counted")
	require.Contains(t, strings.Join(last.Warnings, "\n"), "OpenAI refused to report 1 of the projects, which are archived")
	cancel()

	right := h.now()
	h.setClock(time.Until(right) + 2*defaultUsageRetention) // by mistake; OpenAI's is right
	h.tidy(true)
	require.Contains(t, h.recorded(), archived)
	h.setClock(time.Until(right))

	h.advance(defaultUsageRetention - 3*24*time.Hour)
	h.tidy(true)
	require.Contains(t, h.recorded(), archived)
	h.advance(3 * 24 * time.Hour)
	h.tidy(true)
	require.NotContains(t, h.recorded(), archived)
}

func TestTidy_ReportsARoleThatCannotBeRead(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.orphan()
	archived := h.sim.AddProject("old")
	require.NoError(t, h.b.recordProject(t.Context(), h.storage, archived))
	h.sim.ArchiveProject(archived)
	require.NoError(t, h.storage.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + "new", Value: []byte(`{"version":99}`)}))
	status := h.tidy(true)
	require.Equal(t, tidyError, status["state"])
	require.Contains(t, status["error"], "newer version")
	require.Equal(t, 1, status["deleted_count"])
	require.Contains(t, h.recorded(), archived, "the unreadable role may use it")

	// The project of a role that was stored before the records existed is searched and
	// recorded.
	require.NoError(t, h.storage.Delete(t.Context(), projectStoragePrefix+h.project))
	h.orphan()
	require.Equal(t, 1, h.tidy(true)["deleted_count"])
	require.Contains(t, h.recorded(), h.project)
	h.onlyLeased()
}

func TestRole_ProjectIsRecordedFirst(t *testing.T) {
	t.Parallel()
	for _, fault := range []storageFault{{write: 0}, {write: 0, after: true}, {write: 0, kill: true}, {write: 0, after: true, kill: true},
		{write: 1}, {write: 1, after: true}, {write: 1, kill: true}, {write: 1, after: true, kill: true}} {
		h := newHarness(t, openaitest.Options{})
		h.configure(nil)
		h.storage.fail(fault)
		_, err := h.write("roles/app", map[string]any{"project_id": h.project})
		require.Error(t, err)
		h.storage.heal()
		h.restart()
		r, err := getRole(t.Context(), h.storage, "app")
		require.NoError(t, err)
		if r != nil {
			require.Equal(t, []string{h.project}, h.recorded())
		}
		h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
		require.Equal(t, []string{h.project}, h.recorded())
	}
}

func TestTidy_Automatic(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	id := h.account(h.project, h.ours(), time.Minute)
	h.rollback()
	status := h.must(h.read("tidy-status")).Data
	require.Equal(t, tidyInactive, status["state"], "the first interval begins")
	began, err := time.Parse(time.RFC3339, status["last_auto_run"].(string))
	require.NoError(t, err)
	require.WithinDuration(t, h.now(), began, 30*time.Second)

	h.advance(defaultTidyInterval - time.Minute)
	h.rollback()
	require.Equal(t, tidyInactive, h.tidied()["state"])
	h.restart()
	h.rollback()
	require.Equal(t, tidyInactive, h.tidied()["state"], "a restart does not start a run")
	require.Equal(t, []string{id}, h.alive())

	h.advance(time.Minute)
	h.rollback()
	status = h.tidied()
	require.Equal(t, tidyFinished, status["state"])
	require.Equal(t, true, status["automatic"])
	require.Equal(t, true, status["apply"])
	require.Equal(t, 1, status["deleted_count"])
	require.Empty(t, h.alive())
	last, err := time.Parse(time.RFC3339, status["last_auto_run"].(string))
	require.NoError(t, err)
	require.WithinDuration(t, h.now(), last, 30*time.Second)
	require.Equal(t, last.Add(defaultTidyInterval).Format(time.RFC3339), status["next_auto_run"])

	h.advance(time.Hour)
	h.sim.ResetRequests()
	h.restart()
	h.rollback()
	require.Equal(t, tidyInactive, h.tidied()["state"])
	require.Zero(t, h.sim.Count("", ""))

	// Several missed runs cause one run.
	h.advance(10 * defaultTidyInterval)
	h.rollback()
	require.Equal(t, tidyFinished, h.tidied()["state"])
	h.sim.ResetRequests()
	h.rollback()
	h.tidied()
	require.Zero(t, h.sim.Count("", ""))

	h.must(h.write("config", map[string]any{"tidy_interval": 0}))
	h.advance(10 * defaultTidyInterval)
	h.sim.ResetRequests()
	h.rollback()
	require.Empty(t, h.tidied()["next_auto_run"])
	require.Zero(t, h.sim.Count("", ""))

	// A tick slightly before the interval has passed starts the run.
	h.must(h.write("config", map[string]any{"tidy_interval": "1m"}))
	h.rollback()
	h.tidied()
	h.advance(58 * time.Second)
	h.sim.ResetRequests()
	h.rollback()
	h.tidied()
	require.NotZero(t, h.sim.Count("", ""))

	// A clock that was set back does not postpone the next run for years.
	require.NoError(t, putTidyEntry(t.Context(), h.storage, h.now().Add(1000*time.Hour)))
	h.rollback()
	h.advance(time.Minute)
	h.sim.ResetRequests()
	h.rollback()
	h.tidied()
	require.NotZero(t, h.sim.Count("", ""))
}

func TestTidy_AutomaticOnlyOnWritableNodes(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.rollback()
	h.orphan()
	h.advance(defaultTidyInterval)
	for _, state := range []consts.ReplicationState{
		consts.ReplicationPerformanceSecondary, consts.ReplicationPerformanceStandby, consts.ReplicationDRSecondary,
	} {
		h.become(state)
		h.rollback()
		require.Empty(t, h.b.tidy.current().state)
	}
	h.become(0)
	h.rollback()
	require.Equal(t, 1, h.tidied()["deleted_count"])
}

// After a fault at any write of an automatic run, a later run deletes all orphans, and
// a run that crashes the process is not started again immediately.
func TestTidy_EveryStorageFault(t *testing.T) {
	t.Parallel()
	// The first run records the role's project, drops the archived one, and records that
	// the third is unknown.
	prepare := func(t *testing.T) *harness {
		h := configured(t, openaitest.Options{})
		h.orphan()
		archived := h.sim.AddProject("old")
		h.sim.ArchiveProject(archived)
		h.must(h.write("config", map[string]any{"usage_retention": 0}))
		for _, id := range []string{archived, "proj_unknown"} {
			require.NoError(t, h.b.recordProject(t.Context(), h.storage, id))
		}
		require.NoError(t, h.storage.Delete(t.Context(), projectStoragePrefix+h.project))
		return h
	}
	// run runs tidy in this goroutine and reports whether the process died.
	run := func(h *harness) (killed bool) {
		defer func() {
			if died := recover(); died == any(errKilled) {
				killed = true
			} else if died != nil {
				panic(died)
			}
		}()
		run, _ := h.b.beginTidy(&logical.Request{Storage: h.storage, MountPoint: "openai/"}, true, false, true, defaultTidySafetyBuffer)
		run()
		return false
	}
	check := func(h *harness) {
		require.ElementsMatch(h.t, []string{h.project, "proj_unknown"}, h.recorded())
		h.onlyLeased()
	}
	h := prepare(t)
	h.storage.fail(storageFault{write: -1})
	require.False(t, run(h))
	require.Equal(t, tidyFinished, h.tidied()["state"])
	require.ElementsMatch(t, []string{"put .", "put project", "delete project", "put project"}, h.storage.writes)
	writes := len(h.storage.writes)
	check(h)

	for n := range writes {
		for name, fault := range map[string]storageFault{
			"error before":  {write: n},
			"error after":   {write: n, after: true},
			"killed before": {write: n, kill: true},
			"killed after":  {write: n, after: true, kill: true},
		} {
			t.Run(fmt.Sprintf("write %d, %s", n, name), func(t *testing.T) {
				t.Parallel()
				h := prepare(t)
				h.storage.fail(fault)
				require.Equal(t, fault.kill, run(h))
				if h.storage.heal() {
					h.restart()
				} else {
					status := h.tidied()
					require.Equal(t, tidyError, status["state"])
					require.Contains(t, status["error"], errStorage.Error())
				}
				require.False(t, run(h))
				require.Equal(t, tidyFinished, h.tidied()["state"])
				check(h)
			})
		}
	}
}

func TestTidy_CancelAndStatus(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	status := h.must(h.read("tidy-status")).Data
	require.Equal(t, tidyInactive, status["state"])
	require.Empty(t, status["time_started"])
	resp := h.must(h.write("tidy-cancel", nil))
	require.Contains(t, resp.Warnings[0], "No tidy operation is in progress")

	for range 3 {
		h.orphan()
	}
	struck := make(chan struct{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Skip: 1, Times: 1, Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { close(struck) }})
	resp = h.must(h.write("tidy", map[string]any{"apply": true}))
	require.Equal(t, true, resp.Data["apply"])
	<-struck
	resp = h.must(h.read("tidy-status"))
	require.Equal(t, tidyRunning, resp.Data["state"])
	require.Equal(t, 1, resp.Data["deleted_count"])
	require.Equal(t, 3, resp.Data["orphan_count"])
	require.Contains(t, resp.Data["message"], h.project)
	require.Contains(t, resp.Warnings[0], "vault read openai/tidy-status")

	for _, apply := range []bool{true, false} {
		said := h.refused(h.write("tidy", map[string]any{"apply": apply}))
		require.Contains(t, said, "a tidy operation has been in progress since")
		require.Contains(t, said, "openai/tidy-cancel")
	}
	resp = h.must(h.write("tidy-cancel", nil))
	require.Contains(t, []string{tidyCancelling, tidyCancelled}, resp.Data["state"])
	require.Empty(t, resp.Warnings)
	status = h.tidied()
	require.Equal(t, tidyCancelled, status["state"])
	require.Equal(t, 1, status["deleted_count"])
	require.Zero(t, status["failed_count"])
	require.Empty(t, status["errors"])
	require.NotEmpty(t, status["time_finished"])
	require.Len(t, h.alive(), 2)

	require.Equal(t, 2, h.tidy(true)["deleted_count"])
	h.onlyLeased()
}

func TestTidy_LongDryRun(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	id := h.orphan()
	struck := make(chan struct{})
	release := make(chan struct{})
	h.sim.Fail(openaitest.Fault{Route: listKeysRoute, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) { close(struck); <-release }})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-struck; cancel() }()
	resp := h.must(h.do(ctx, logical.UpdateOperation, "tidy", nil))
	require.Equal(t, tidyRunning, resp.Data["state"])
	require.NotEmpty(t, resp.Warnings)
	close(release)
	require.Equal(t, []string{id}, listed(h.tidied()))
	require.Equal(t, []string{id}, h.alive())
	h.tidy(true)
}

func TestTidy_StopsWithTheBackendAndTheMount(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(h *harness){
		"the backend is unloaded": func(h *harness) { h.b.Cleanup(t.Context()) },
		"the mount is being disabled": func(h *harness) {
			h.system.TaintedVal = true
			_, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage})
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.orphan()
			h.sim.KeepAll()
			struck := make(chan struct{})
			h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Kind: openaitest.FaultHang, OnStrike: func(*http.Request) { close(struck) }})
			h.must(h.write("tidy", map[string]any{"apply": true}))
			<-struck
			end(h)
			require.Eventually(t, func() bool { return h.b.tidy.current().state == tidyCancelled }, time.Minute, time.Millisecond)
		})
	}
}

func TestTidy_StopsInAProjectWhoseDeletionsFail(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for range maxSystemicFailures + 2 {
		h.orphan()
	}
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 401})
	status := h.tidy(true)
	require.Equal(t, tidyError, status["state"])
	require.Equal(t, maxSystemicFailures, status["failed_count"])
	require.Contains(t, status["errors"].([]string)[maxSystemicFailures], "project stopped")
	cancel()
	require.Equal(t, maxSystemicFailures+2, h.tidy(true)["deleted_count"])
	h.onlyLeased()
}

func TestTidy_RejectsASecondRun(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for range 10 {
		h.orphan()
	}
	h.must(h.write("config", map[string]any{"tidy_interval": "1m"}))
	h.rollback()
	results := make(chan bool)
	for range 16 {
		go func() {
			resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.UpdateOperation, Path: "tidy", Data: map[string]any{"apply": true}, Storage: h.storage, MountPoint: "openai/"})
			_, _ = h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: "tidy-status", Storage: h.storage, MountPoint: "openai/"})
			results <- err == nil && !resp.IsError()
		}()
	}
	accepted := 0
	for range 16 {
		if <-results {
			accepted++
		}
	}
	require.NotZero(t, accepted)
	h.rollback()
	h.tidied()
	require.Equal(t, 10, h.sim.Count(http.MethodDelete, deleteAccountRoute), "each orphan is deleted once")
	h.onlyLeased()
}

func TestTidy_WithoutConfig(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.Contains(t, h.refused(h.write("tidy", nil)), "vault write openai/config")
	require.Contains(t, h.refused(h.write("tidy", map[string]any{"aply": true})), "aply")
	require.Equal(t, tidyInactive, h.must(h.read("tidy-status")).Data["state"])
	h.rollback()

	h.configure(nil)
	status := h.tidy(true)
	require.Equal(t, tidyFinished, status["state"])
	require.Zero(t, status["project_count"])
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	h.must(h.remove("config"))
	require.Contains(t, h.refused(h.write("tidy", nil)), "vault write openai/config")
}

func TestTidy_ReportsAnOutage(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Status: 403, Body: `{"error":"Missing scopes: api.management.read."}`})
	resp := h.must(h.write("tidy", nil))
	require.Equal(t, tidyError, resp.Data["state"])
	require.Contains(t, resp.Data["error"], "Missing scopes: api.management.read.")
	require.Contains(t, resp.Warnings[0], "The list of orphans is incomplete: project "+h.project)
}

func TestTidy_SettingsOfTheConfig(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	data := h.must(h.read("config")).Data
	require.Equal(t, int64(12*3600), data["tidy_interval"])
	require.Equal(t, int64(600), data["tidy_safety_buffer"])
	h.must(h.write("config", map[string]any{"tidy_interval": 0, "tidy_safety_buffer": "1s"}))
	h.restart()
	data = h.must(h.read("config")).Data
	require.Equal(t, int64(0), data["tidy_interval"])
	require.Equal(t, int64(1), data["tidy_safety_buffer"])
	for field, values := range map[string][]any{
		"tidy_interval":      {"59s", "721h"},
		"tidy_safety_buffer": {0, "721h"},
	} {
		for _, value := range values {
			require.Contains(t, h.refused(h.write("config", map[string]any{field: value})), field+" must be")
		}
	}
}

// listedKeys returns the IDs of the keys in a status, "" for accounts.
func listedKeys(status map[string]any) []string {
	ids := []string{}
	for _, o := range status["orphans"].([]any) {
		id, _ := o.(map[string]any)["api_key_id"].(string)
		ids = append(ids, id)
	}
	return ids
}

func TestTidy_DeletesExpiredKeysOfAdoptedAccounts(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	account := h.adopted(map[string]any{"ttl": "1h", "max_ttl": "24h"})
	dead := []string{h.key(account, h.ours(), time.Minute), h.key(account, "x"+h.ours()[len("vault-app-"):], 2*time.Minute)}
	stay := []string{
		h.key(account, h.ours(), 24*time.Hour),
		h.key(account, h.ours(), 0),
		h.key(account, "by hand", time.Minute),
		h.key(account, strings.ToUpper(h.ours()), time.Minute),
		h.key(account, h.anotherMount().ours(), time.Minute),
	}
	lease := h.lease("creds/app", nil)
	stay = append(stay, lease.Data["api_key_id"].(string))
	// The WAL contains the revocation of one key and the create of another.
	revoked, creating := h.key(account, h.ours(), time.Minute), h.ours()
	_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeKey, ProjectID: h.project, ID: account, KeyID: revoked})
	require.NoError(t, err)
	stay = append(stay, revoked, h.key(account, creating, time.Minute))
	_, err = framework.PutWAL(t.Context(), h.storage, walKey, credential{Version: credentialVersion, Type: typeKey, ProjectID: h.project, ID: account, KeyName: creating})
	require.NoError(t, err)
	h.advance(defaultTidySafetyBuffer)
	stay = append(stay, h.key(account, h.ours(), time.Second)) // younger than the buffer
	h.advance(2 * time.Minute)

	status := h.tidy(false)
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.ElementsMatch(t, dead, listedKeys(status))
	require.Equal(t, 2, status["orphan_count"])
	require.Equal(t, 8, status["key_count"])
	require.Zero(t, status["account_count"])
	for _, entry := range status["orphans"].([]any) {
		o := entry.(map[string]any)
		require.Equal(t, account, o["service_account_id"])
		require.Equal(t, h.project, o["project_id"])
		require.NotContains(t, o, "service_account")
		require.Regexp(t, "[a-z0-9]{15}$", o["api_key_name"])
		require.Regexp(t, `^it expired at \d{4}-.*Z$`, o["why"])
		require.InDelta(t, 12*60+30, o["age"], 30)
	}
	require.ElementsMatch(t, append(dead, stay...), h.keysThere(), "a dry run deletes nothing")

	h.sim.ResetRequests()
	status = h.tidy(true)
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, 2, status["deleted_count"])
	require.Equal(t, 2, h.sim.Count(http.MethodDelete, ""))
	require.Equal(t, 1, h.sim.Count(http.MethodGet, routeKey), "one read verifies the first delete")
	require.ElementsMatch(t, stay, h.keysThere())
	require.Equal(t, []string{account}, h.alive())
	require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
	require.Equal(t, 6, h.tidy(true)["key_count"])
}

// Only the keys of an adopted account belong to the engine.
func TestTidy_AnAdoptedAccountOutlivesItsKeysAndItsRole(t *testing.T) {
	t.Parallel()
	for name, name2 := range map[string]string{"a name without the tag": "batch", "a name with the tag": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			if name2 == "" {
				name2 = h.ours() // a copied name
			}
			account := h.sim.AddServiceAccount(h.project, name2)
			entry, err := logical.StorageEntryJSON(roleStoragePrefix+"app", &role{
				Version: roleVersion, ProjectID: h.project, NameTemplate: naming.DefaultTemplate, TTL: time.Minute, MaxTTL: 5 * time.Minute,
				KeyExpiry: expiryTTL, CredentialType: typeKey, ServiceAccountID: account, ServiceAccount: name2,
			})
			require.NoError(t, err)
			require.NoError(t, h.storage.Put(t.Context(), entry))
			for range 3 {
				h.lease("creds/app", nil) // a lease that Vault has lost
			}
			h.advance(time.Hour)
			status := h.tidy(true)
			require.Equal(t, tidyFinished, status["state"], status["error"])
			require.Equal(t, 3, status["deleted_count"])
			require.Empty(t, h.keysThere())
			require.Equal(t, []string{account}, h.alive(), "the account stays without a key")
			require.Zero(t, h.tidy(true)["orphan_count"])
			if name == "a name with the tag" {
				return // without the role, the account counts as the mount's
			}
			h.lease("creds/app", nil)
			h.must(h.remove("roles/app"))
			h.restart()
			h.advance(time.Hour)
			require.Equal(t, 1, h.tidy(true)["deleted_count"])
			require.Empty(t, h.keysThere())
			require.Equal(t, []string{account}, h.alive())
		})
	}
}

// A key that is deleted with its account needs no separate call.
func TestTidy_AccountsAndKeys(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(nil)
	for range 3 {
		h.key(account, h.ours(), time.Minute)
		h.key(h.account(h.project, h.ours(), time.Minute), h.ours(), time.Minute)
	}
	// The expired keys of an account with a valid key are deleted.
	busy := h.account(h.project, h.ours(), 10*time.Hour)
	h.sim.Keep(busy, h.sim.Keys()[len(h.sim.Keys())-1].ID)
	deadOfBusy := h.key(busy, h.ours(), time.Minute)
	h.advance(time.Hour)
	h.sim.ResetRequests()
	status := h.tidy(true)
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, 7, status["deleted_count"])
	require.Equal(t, 7, status["key_count"])
	require.Equal(t, 4, status["account_count"])
	require.Contains(t, listedKeys(status), deadOfBusy)
	require.Equal(t, 3, h.sim.Count(http.MethodDelete, routeAccount))
	require.Equal(t, 4, h.sim.Count(http.MethodDelete, routeKey))
	require.Len(t, h.sim.Keys(), 1)
	require.ElementsMatch(t, []string{account, busy}, h.alive())
}

// If OpenAI does not delete keys of service accounts, listed expired keys are not a
// failure.
func TestTidy_ReportsUndeletableKeysOnce(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
	second := h.sim.AddProject("second")
	account := h.adopted(nil)
	var dead []string
	for range 5 {
		dead = append(dead, h.key(account, h.ours(), time.Minute))
	}
	elsewhere := h.sim.AddServiceAccount(second, "batch")
	h.must(h.write("roles/second", map[string]any{"project_id": second, "credential_type": typeKey, "service_account_id": elsewhere}))
	_, err := h.api().CreateServiceAccountKey(t.Context(), second, elsewhere, h.ours(), nil, time.Minute)
	require.NoError(t, err)
	h.account(h.project, h.ours(), time.Minute)
	h.account(second, h.ours(), time.Minute)
	h.advance(time.Hour)
	require.Equal(t, 8, h.tidy(false)["orphan_count"])

	for i := range 2 {
		h.sim.ResetRequests()
		status := h.tidy(true)
		require.Equal(t, tidyFinished, status["state"], status["error"])
		require.Empty(t, status["errors"])
		require.Zero(t, status["failed_count"])
		require.Equal(t, 2-2*i, status["deleted_count"], "only the accounts")
		require.Equal(t, 2-2*i, status["orphan_count"], "an undeletable key is not an orphan")
		require.Len(t, status["orphans"], 2-2*i)
		require.Equal(t, 6, status["key_count"])
		require.Equal(t, 1, h.sim.Count(http.MethodDelete, routeKey), "one refusal stands for all")
		require.Equal(t, i+1, strings.Count(h.log.String(), "OpenAI does not delete keys of service accounts"))
	}
	require.Subset(t, h.keysThere(), dead)
	require.ElementsMatch(t, []string{account, elsewhere}, h.alive())

	// OpenAI may support it later.
	h.sim.Configure(func(o *openaitest.Options) { o.DeleteServiceAccountKeyRefused = false })
	require.Equal(t, 6, h.tidy(true)["deleted_count"])
	require.Empty(t, h.keysThere())
}

// Only the static role deletes its keys, valid or expired.
func TestTidy_DoesNotDeleteKeysOfStaticRoles(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.sim.AddServiceAccount(h.project, "batch")
	current, superseded, former := h.ours(), h.ours(), h.ours()
	r := &staticRole{
		Version: 1, Schedule: schedule.Schedule{RotationPeriod: 24 * time.Hour, NextRotation: h.now().Add(24 * time.Hour)}, ProjectID: h.project, ServiceAccountID: account, Adopted: true,
		Current:    staticKey{ID: h.key(account, current, time.Minute), Name: current},
		Superseded: []staticKey{{ID: h.key(account, superseded, time.Minute), Name: superseded, DeleteAfter: h.now().Add(24 * time.Hour)}},
	}
	require.NoError(t, putStaticRole(t.Context(), h.storage, "batch", r))
	left := h.key(account, former, time.Minute)
	h.advance(time.Hour)
	status := h.tidy(true)
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, []string{left}, listedKeys(status))
	require.ElementsMatch(t, []string{r.Current.ID, r.Superseded[0].ID}, h.keysThere())
	require.Equal(t, []string{account}, h.alive())
}

func TestTidy_FaultsOfKeys(t *testing.T) {
	t.Parallel()
	for name, fault := range apiFaults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.hangs(fault.Kind)
			account := h.adopted(nil)
			for range 4 {
				h.key(account, h.ours(), time.Minute)
			}
			lease := h.lease("creds/app", nil)
			h.advance(time.Hour)
			fault := fault
			fault.Route, fault.Times = routeKey, 5
			if fault.Status == http.StatusTooManyRequests {
				fault.Times = 2 // each one delays the next call longer
			}
			h.sim.Fail(fault)
			status := h.tidy(true)
			require.Contains(t, []any{tidyFinished, tidyError}, status["state"])
			h.sim.ClearFaults()
			require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
			status = h.tidy(true)
			require.Equal(t, tidyFinished, status["state"], status["error"])
			require.Equal(t, []string{lease.Data["api_key_id"].(string)}, h.keysThere())
			require.NoError(t, h.revoke(lease))
			h.onlyKeys(account)
		})
	}
}

func TestBearsTag(t *testing.T) {
	t.Parallel()
	ours, err := naming.BearsTag("ab3de")
	require.NoError(t, err)
	for name, want := range map[string]bool{
		"vault-app-ab3defghij4klmn":           true,
		"ab3defghij4klmn":                     true,
		"xab3defghij4klmnx":                   true,
		"ab3de-ab3defghij4klmn.prod":          true,
		"ab3deab3deab3dea":                    true,
		"vault-app-ab3defghij4klm":            false,
		"vault-app-ab3de-fghij4klmn":          false,
		"vault-app-AB3DEFGHIJ4KLMN":           false,
		"vault-app-ab3deFGHIJ4KLMN":           false,
		"vault-app-zz3defghij4klmn":           false,
		"":                                    false,
		"vault-app-ab3défghij4klmnopqrs":      false,
		"ab3de":                               false,
		"a person's account of 15 characters": false,
	} {
		require.Equal(t, want, ours(name), name)
	}
	for _, tag := range []string{"", "ab3d", "ab3def"} {
		_, err := naming.BearsTag(tag)
		require.Error(t, err, "an invalid tag would match every name")
	}
}

func TestGolden_ProjectV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	want := projectEntry{Version: 1, UnknownSince: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), ArchivedSince: time.Date(2026, 1, 4, 3, 4, 5, 0, time.UTC), StaticChecked: time.Date(2026, 1, 3, 3, 4, 5, 0, time.UTC)}
	require.NoError(t, putProjectEntry(t.Context(), s, "proj_1", want))
	entry, err := s.Get(t.Context(), "project/proj_1")
	require.NoError(t, err)
	pinned(t, "project.v1.json", entry.Value)
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: "project/proj_1", Value: golden(t, "project.v1.json")}))
	got, err := getProjectEntry(t.Context(), s, "proj_1")
	require.NoError(t, err)
	require.Equal(t, want, *got)

	require.NoError(t, (&backend{entries: job.NewNameLocks()}).recordProject(t.Context(), s, "proj_2"))
	entry, err = s.Get(t.Context(), "project/proj_2")
	require.NoError(t, err)
	require.JSONEq(t, `{"version": 1}`, string(entry.Value))
}

func TestGolden_TidyV1(t *testing.T) {
	t.Parallel()
	s := &logical.InmemStorage{}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	require.NoError(t, putTidyEntry(t.Context(), s, at))
	entry, err := s.Get(t.Context(), "tidy")
	require.NoError(t, err)
	require.JSONEq(t, string(golden(t, "tidy.v1.json")), string(entry.Value))
	require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: "tidy", Value: golden(t, "tidy.v1.json")}))
	got, err := getTidyEntry(t.Context(), s)
	require.NoError(t, err)
	require.Equal(t, tidyEntry{Version: 1, LastAutoRun: at}, *got)

	for _, key := range []string{"tidy", "project/proj_1"} {
		require.NoError(t, s.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(`{"version":99}`)}))
	}
	_, err = getTidyEntry(t.Context(), s)
	require.ErrorContains(t, err, "newer version")
	_, err = getProjectEntry(t.Context(), s, "proj_1")
	require.ErrorContains(t, err, "newer version")
}

// A new account that OpenAI does not find counts neither as deleted nor as failed.
func TestTidy_LeavesANewAccountToTheNextRun(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"tidy_safety_buffer": "1s"}))
	h.account(h.project, h.ours(), time.Second)
	h.advance(2 * time.Minute)
	cancel := h.sim.Fail(openaitest.Fault{Route: deleteAccountRoute, Status: 404, Code: "service_account_not_found", Message: "No service account found."})
	status := h.tidy(true)
	require.Equal(t, tidyFinished, status["state"], status["error"])
	require.Equal(t, 1, status["orphan_count"])
	require.Zero(t, status["deleted_count"])
	require.Zero(t, status["failed_count"])
	h.advance(notFinalBefore)
	require.Equal(t, 1, h.tidy(true)["deleted_count"], "the 404 for the account is final")
	cancel()
	require.Equal(t, 1, h.tidy(true)["deleted_count"], "an account that still exists is deleted")
	h.onlyLeased()
}

// Only OpenAI's own 404 for the account proves its deletion.
func TestTidy_A404IsNotADeletion(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"an unknown URL": `{"error":{"message":"Unknown request URL: DELETE /v1/organization/projects","type":"invalid_request_error","param":null,"code":"unknown_url"}}`,
		"a gateway":      `{"timestamp":"2026-01-02T03:04:05Z","status":404,"error":"Not Found","path":"/v1"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			account := h.adopted(nil)
			for range 2 {
				h.key(account, h.ours(), time.Minute)
			}
			h.orphan()
			cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 404, Body: body})
			status := h.tidy(true)
			require.Equal(t, tidyError, status["state"])
			require.Zero(t, status["deleted_count"])
			require.Equal(t, 1, status["failed_count"], "an expired key that remains is not a failure")
			require.Len(t, h.keysThere(), 3)
			cancel()

			// Such a response after the first delete does not prove the deletion of keys.
			h.sim.ResetRequests()
			cancel = h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: routeKey, Status: 404, Body: body})
			status = h.tidy(true)
			require.Equal(t, 3, status["deleted_count"], "%v %v", status["errors"], h.routes())
			require.GreaterOrEqual(t, h.sim.Count(http.MethodGet, routeKey), 2, "each delete is verified, since none is proven")
			cancel()
			require.Empty(t, h.keysThere())
		})
	}
}

func TestTidy_AHangingProjectDoesNotStopTheOthers(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	second := h.sim.AddProject("second")
	h.must(h.write("roles/second", map[string]any{"project_id": second}))
	for _, id := range []string{h.project, second} {
		h.account(id, h.ours(), time.Minute)
	}
	h.advance(time.Hour)
	h.b.tidy.stall = 4 * time.Second
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Kind: openaitest.FaultHang, Match: func(r *http.Request) bool {
		return strings.HasSuffix(r.URL.Path, second+"/api_keys")
	}})
	status := h.tidy(true)
	require.Equal(t, tidyError, status["state"])
	require.Contains(t, status["error"], "project "+second+": no call to OpenAI has succeeded for 4s; the next run tries the project again")
	require.Equal(t, 2, status["done_project_count"])
	require.Equal(t, 1, status["deleted_count"])
	cancel()
	require.Equal(t, 1, h.tidy(true)["deleted_count"])
	h.onlyLeased()
}

func TestTidy_StopsAfterSystemicFailures(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"permanent throttling": {Status: 429, Message: "slow down"},
		"no answer":            {Kind: openaitest.FaultHang},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			for i := range maxSystemicFailures + 2 {
				h.must(h.write(fmt.Sprintf("roles/%d", i), map[string]any{"project_id": h.sim.AddProject(fmt.Sprint(i))}))
			}
			h.b.tidy.stall = time.Second
			fault.Method, fault.Route = http.MethodGet, listAccountsRoute
			h.sim.Fail(fault)
			status := h.tidy(true)
			require.Equal(t, tidyError, status["state"])
			require.Equal(t, maxSystemicFailures, status["done_project_count"])
			require.Len(t, status["errors"], maxSystemicFailures+1)
			require.Contains(t, status["errors"].([]string)[maxSystemicFailures], "run stopped after 3 stalled projects in a row")
		})
	}
}
