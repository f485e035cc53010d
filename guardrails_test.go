package openaisecrets

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

const (
	routeSpendLimit  = "/organization/projects/{project_id}/spend_limit"
	routePermissions = "/organization/projects/{project_id}/model_permissions"
)

// guarded is a mount whose guardrails were enabled after its role "app" was stored.
func guarded(t *testing.T, settings ...string) *harness {
	t.Helper()
	h := configured(t, openaitest.Options{})
	h.require(settings...)
	return h
}

func (h *harness) require(settings ...string) *logical.Response {
	h.t.Helper()
	data := fields{}
	for _, setting := range settings {
		data[setting] = true
	}
	return h.must(h.write("config", data))
}

// rejudge runs the worker that verifies projects.
func (h *harness) rejudge() error {
	h.t.Helper()
	err := h.b.rejudge(client.Background(context.Background()), h.background())
	h.recordMessages(nil, err)
	return err
}

// asked counts the verification calls since the last ResetRequests.
func (h *harness) asked() int {
	return h.sim.Count(http.MethodGet, routeSpendLimit) + h.sim.Count(http.MethodGet, routePermissions)
}

// unavailable fails the test unless a request failed with status 503.
func (h *harness) unavailable(resp *logical.Response, err error) string {
	h.t.Helper()
	var coded logical.HTTPCodedError
	require.ErrorAs(h.t, err, &coded)
	require.Equal(h.t, http.StatusServiceUnavailable, coded.Code())
	require.Nil(h.t, resp)
	return err.Error()
}

// silence makes the verification calls fail.
func (h *harness) silence() {
	for _, route := range []string{routeSpendLimit, routePermissions} {
		h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultStatus, Status: 500, Route: route})
	}
}

func TestGuardrails_RejectARoleWhoseProjectIsNotBounded(t *testing.T) {
	t.Parallel()
	for setting, bound := range map[string]func(h *harness){
		"require_spend_limit":      func(h *harness) { h.sim.SetSpendLimit(h.project, 10_000) },
		"require_model_allow_list": func(h *harness) { h.sim.SetModelPermissions(h.project, client.AllowList, "gpt-5-mini") },
	} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			h := guarded(t, setting)
			said := h.refused(h.write("roles/new", fields{"project_id": h.project}))
			for _, part := range []string{`role "new" not stored`, h.project, setting, "openai/projects/" + h.project, "req_"} {
				require.Contains(t, said, part)
			}
			require.Contains(t, h.refused(h.write("static-roles/new", fields{"project_id": h.project, "rotation_period": "24h"})), setting)
			require.Contains(t, h.refused(h.read("creds/app")), setting)
			require.Empty(t, h.alive())

			bound(h)
			h.must(h.write("roles/new", fields{"project_id": h.project}))
			require.NoError(t, h.revoke(h.lease("creds/new", nil)))
			require.NoError(t, h.revoke(h.lease("creds/app", nil)), "one verdict counts for all roles of the project")
			h.must(h.write("static-roles/new", fields{"project_id": h.project, "rotation_period": "24h"}))
			h.must(h.read("static-creds/new"))
			h.must(h.remove("static-roles/new"))
		})
	}
}

func TestGuardrails_ADenyListIsNoAllowList(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_model_allow_list")
	h.sim.SetModelPermissions(h.project, "deny_list", "gpt-5-mini")
	require.Contains(t, h.refused(h.read("creds/app")), `"deny_list"`)
}

func TestGuardrails_ScopesNeedNoCall(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h"}))
	warned := strings.Join(h.require("require_scopes").Warnings, "\n")
	require.Contains(t, warned, `role "app", static role "batch"`)
	h.sim.ResetRequests()
	require.Contains(t, h.refused(h.read("creds/app")), "require_scopes")
	require.Contains(t, h.refused(h.read("static-creds/batch")), "require_scopes")
	require.Contains(t, h.refused(h.write("roles/app", fields{"ttl": "5m"})), "require_scopes")
	require.Zero(t, h.sim.Count("", ""))
	h.must(h.write("roles/app", fields{"scopes": scopeChat}))
	require.Zero(t, h.sim.Count("", ""), "narrowing the role makes no call")
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.must(h.remove("static-roles/batch"))
}

// A positive verdict counts for a day, in memory and in storage. Meanwhile, no request
// asks OpenAI again.
func TestGuardrails_AYesCountsForADay(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	h.sim.SetSpendLimit(h.project, 1)
	h.sim.ResetRequests()
	for range 3 {
		require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	}
	require.Equal(t, 1, h.asked())
	h.silence()
	h.restart()
	h.advance(verdictFor - time.Minute)
	h.sim.ResetRequests()
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.must(h.write("roles/more", fields{"project_id": h.project}))
	require.Error(t, h.rejudge())
	require.NoError(t, h.revoke(h.lease("creds/more", nil)))
	h.advance(2 * time.Minute)
	require.Contains(t, h.unavailable(h.read("creds/app")), h.project)
	h.unavailable(h.write("roles/another", fields{"project_id": h.project}))
	h.sim.ClearFaults()
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

// A negative verdict counts until a positive one: time, a restart or an outage does not
// end it.
func TestGuardrails_ANoCountsUntilOpenAISaysYes(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	h.refused(h.read("creds/app"))
	h.silence()
	h.restart()
	h.advance(30 * 24 * time.Hour)
	h.sim.ResetRequests()
	h.refused(h.read("creds/app"))
	require.Zero(t, h.asked(), "a request does not ask OpenAI")
	h.refused(h.write("roles/app", fields{"ttl": "5m"}))
	require.Zero(t, h.asked(), "a narrowing write does not ask OpenAI")
	require.Error(t, h.rejudge())
	h.refused(h.read("creds/app"))

	h.sim.ClearFaults()
	h.sim.SetSpendLimit(h.project, 1)
	h.refused(h.read("creds/app"))
	h.advance(rejudgeUnmet)
	require.NoError(t, h.rejudge())
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
}

func TestGuardrails_AProjectWithoutAVerdictIs503(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"an outage":            {Kind: openaitest.FaultStatus, Status: 500},
		"garbage":              {Kind: openaitest.FaultGarbage},
		"an empty object":      {Kind: openaitest.FaultEmptyObject},
		"a missing permission": apiFaults["403"],
		"a gateway's 404":      {Kind: openaitest.FaultStatus, Status: 404, Body: `{"message":"no Route matched with those values"}`},
		"a 404 for the URL":    {Kind: openaitest.FaultStatus, Status: 404, Body: `{"error":{"message":"Invalid URL (GET /v1/x)","type":"invalid_request_error","param":null,"code":null}}`},
		"a 404 with a page":    {Kind: openaitest.FaultStatus, Status: 404, Body: `<html><title>Not Found</title></html>`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := guarded(t, "require_spend_limit")
			fault.Route = routeSpendLimit
			h.sim.Fail(fault)
			said := h.unavailable(h.read("creds/app"))
			require.Contains(t, said, h.project)
			h.unavailable(h.write("roles/new", fields{"project_id": h.project}))
			require.NotContains(t, h.entries(), verdictStoragePrefix, "no verdict is stored")
			h.onlyLeased()
			// A write that does not widen the role is stored.
			require.Contains(t, h.must(h.write("roles/app", fields{"ttl": "5m"})).Warnings[0], "was not verified")
		})
	}
}

// A 404 in OpenAI's own form proves nothing while the project itself cannot be read.
func TestGuardrails_A404CountsOnlyWhileTheProjectReads(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	h.sim.Fail(openaitest.Fault{Kind: openaitest.FaultStatus, Status: 500, Method: http.MethodGet, Route: "/organization/projects/{project_id}"})
	h.unavailable(h.read("creds/app"))
	require.NotContains(t, h.entries(), verdictStoragePrefix)
	h.sim.ClearFaults()
	h.sim.ArchiveProject(h.project)
	require.Contains(t, h.refused(h.read("creds/app")), "archived")
	require.NotContains(t, h.entries(), verdictStoragePrefix)
}

// A verdict is valid for one endpoint only.
func TestGuardrails_AnotherEndpointIsAskedAgain(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	h.sim.SetSpendLimit(h.project, 1)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	_, key := h.sim.AdminKey()
	h.must(h.write("config", fields{"admin_api_key": key, "api_endpoint": strings.Replace(h.sim.URL(), "127.0.0.1", "localhost", 1)}))
	h.silence()
	h.unavailable(h.read("creds/app"))
}

func TestGuardrails_TheWorkerAsksInTheBackground(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit", "require_model_allow_list")
	h.sim.SetSpendLimit(h.project, 1)
	h.sim.SetModelPermissions(h.project, client.AllowList)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.sim.ResetRequests()
	require.NoError(t, h.rejudge())
	require.Zero(t, h.asked(), "not due")
	h.advance(rejudgeMet)
	h.rollback()
	require.Equal(t, 2, h.asked())

	h.sim.SetSpendLimit(h.project, 0)
	h.advance(rejudgeMet)
	require.NoError(t, h.rejudge())
	h.sim.ResetRequests()
	require.Contains(t, h.refused(h.read("creds/app")), "require_spend_limit")
	require.Zero(t, h.asked())

	// A failure is retried after a while, but only for a project that requests use.
	h.silence()
	h.advance(rejudgeMet)
	require.Error(t, h.rejudge())
	h.sim.ResetRequests()
	require.NoError(t, h.rejudge())
	require.Zero(t, h.asked())
	h.sim.ClearFaults()
	h.advance(askedFor)
	require.NoError(t, h.rejudge())
	require.Zero(t, h.asked())
	h.refused(h.read("creds/app"))
	require.NoError(t, h.rejudge())
	require.NotZero(t, h.asked())

	// A node that may not write does not ask OpenAI.
	h.advance(rejudgeMet)
	h.sim.ResetRequests()
	h.become(consts.ReplicationPerformanceStandby)
	h.rollback()
	require.Zero(t, h.asked())
}

// A failure under a clock that was ahead does not delay the worker after the clock is
// corrected.
func TestGuardrails_TheWorkerAsksAfterAStepOfTheClock(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	require.NotEmpty(t, h.refused(h.read("creds/app")))
	h.advance(rejudgeMet)
	h.silence()
	right := h.offset
	h.setClock(right + 5*time.Hour)
	require.Error(t, h.rejudge())
	h.sim.ClearFaults()
	h.setClock(right)
	h.sim.ResetRequests()
	require.NoError(t, h.rejudge())
	require.NotZero(t, h.asked())
}

func TestGuardrails_OneRequestAsksForAll(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	h.sim.SetSpendLimit(h.project, 1)
	h.sim.Configure(func(o *openaitest.Options) { o.Latency = 50 * time.Millisecond })
	h.sim.ResetRequests()
	leases := make(chan *logical.Response, 20)
	for range cap(leases) {
		go func() {
			resp, _ := h.read("creds/app")
			leases <- resp
		}()
	}
	for range cap(leases) {
		resp := <-leases
		require.NotNil(t, resp)
		require.NoError(t, h.revoke(h.stored(resp)))
	}
	require.Equal(t, 1, h.asked())
}

func TestGuardrails_APoolReturnsNothingOfAnUnboundedProject(t *testing.T) {
	t.Parallel()
	h := withPool(t, 2, nil)
	h.require("require_spend_limit")
	h.sim.ResetRequests()
	require.Contains(t, h.refused(h.read("creds/app")), "require_spend_limit")
	require.Equal(t, 2, h.ready("app"), "no key left the pool")
	h.sim.SetSpendLimit(h.project, 1)
	h.must(h.read("projects/" + h.project))
	lease := h.lease("creds/app", nil)
	require.Equal(t, 2, h.sim.Count(http.MethodGet, routeSpendLimit), "one call by the request, one by the read of the project")

	// With a negative verdict, no credential is created.
	h.sim.SetSpendLimit(h.project, 0)
	h.must(h.read("projects/" + h.project))
	h.settlePools()
	h.sim.ResetRequests()
	h.fill()
	require.Zero(t, h.sim.Count(http.MethodPost, routeCreate))
	require.NoError(t, h.revoke(lease))
	h.closed()
}

// A verdict that changes while a key is created applies before the key is returned.
func TestGuardrails_AKeyInTheMakingIsNotReturned(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit")
	h.sim.SetSpendLimit(h.project, 1)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.sim.SetSpendLimit(h.project, 0)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeCreate, Match: func(*http.Request) bool {
		_, err := h.read("projects/" + h.project)
		require.NoError(t, err)
		return false // observes only
	}})
	require.Contains(t, h.refused(h.read("creds/app")), "require_spend_limit")
	h.sim.ClearFaults()
	h.runPeriodicWork()
	h.onlyLeased()
}

// Without guardrails, the engine asks and stores nothing. With them, a credential costs
// no additional call or storage operation.
func TestGuardrails_CostNothingPerCredential(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("static-roles/batch", fields{"project_id": h.project, "rotation_period": "24h", "scopes": scopeChat}))
	h.role(fields{"scopes": scopeChat})
	h.sim.SetSpendLimit(h.project, 1)
	h.sim.SetModelPermissions(h.project, client.AllowList, "gpt-5-mini")
	watched := &watchedStorage{Storage: h.storage}
	life := func() (operations int64, calls int) {
		h.sim.ResetRequests()
		from := watched.operations.Load()
		for _, path := range []string{"creds/app", "static-creds/batch"} {
			resp, err := h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: path, Storage: watched, MountPoint: "openai/"})
			h.must(resp, err)
			if resp.Secret != nil {
				defer func() { require.NoError(t, h.revoke(h.stored(resp))) }()
			}
		}
		return watched.operations.Load() - from, h.sim.Count("", "")
	}
	life()
	operations, calls := life()
	require.Zero(t, h.asked())
	require.NotContains(t, h.entries(), verdictStoragePrefix)

	h.require("require_spend_limit", "require_model_allow_list", "require_scopes")
	life() // the first verdict
	require.Equal(t, 2, h.asked())
	with, callsWith := life()
	require.Equal(t, operations, with)
	require.Equal(t, calls, callsWith)
	h.must(h.remove("static-roles/batch"))
}

func TestGuardrails_EveryFaultAtEveryStepOfTheFirstJudgment(t *testing.T) {
	t.Parallel()
	for _, bounded := range []bool{true, false} {
		everyFault(t, faultFlow{
			mount: func(t *testing.T) *harness { return configured(t, openaitest.Options{}) },
			arrange: func(h *harness) {
				h.role(fields{"activation_timeout": 0})
				if bounded {
					h.sim.SetSpendLimit(h.project, 1)
				}
				h.require("require_spend_limit")
			},
			restart: (*harness).restart,
			flow: func(h *harness) (*logical.Response, error) {
				resp, err := h.read("creds/app")
				if !bounded && err == nil { // everyFault expects the flow to succeed
					return nil, map[bool]error{false: resp.Error()}[resp.IsError()]
				}
				return resp, err
			},
			check: func(h *harness, resp *logical.Response, err error) {
				gap := diedBeforeLeaseStored(h, err)
				h.runPeriodicWork()
				if gap {
					checkUnleasedKeyCleanup(h, defaultMaxTTL)
				}
				if bounded && err == nil && !resp.IsError() {
					require.NoError(h.t, h.revoke(h.stored(resp)))
				}
				h.onlyLeased()
				// After any fault, the next response is correct.
				if bounded {
					require.NoError(h.t, h.revoke(h.lease("creds/app", nil)))
				} else {
					require.Contains(h.t, h.refused(h.read("creds/app")), "require_spend_limit")
				}
			},
		})
	}
}

func TestGolden_GuardrailV1(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := bounds{
		Version: 1, Endpoint: "https://api.openai.com/v1", SpendLimit: bound{At: at, Met: true},
		AllowList: bound{At: at.Add(time.Hour), Said: "status 404"},
	}
	encoded, err := json.Marshal(want)
	require.NoError(t, err)
	pinned(t, "guardrail.v1.json", encoded)
	h := newHarness(t, openaitest.Options{})
	require.NoError(t, h.storage.Put(t.Context(), &logical.StorageEntry{Key: "guardrail/proj_1", Value: golden(t, "guardrail.v1.json")}))
	got, err := h.b.verdictOf(t.Context(), h.storage, "proj_1", "https://api.openai.com/v1")
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestProjectRead_ShowsWhatItsKeysCanSpend(t *testing.T) {
	t.Parallel()
	h := guarded(t, "require_spend_limit", "require_model_allow_list")
	data := h.must(h.read("projects/" + h.project)).Data
	require.Equal(t, []string{"require_spend_limit", "require_model_allow_list"}, data["requirements_unmet"])
	require.Nil(t, data["spend_limit"])
	require.Nil(t, data["model_permissions"])
	require.Equal(t, "active", data["status"])
	rates := throughJSON(t, data)["rate_limits"].(map[string]any)["gpt-5-mini"].(map[string]any)
	require.Equal(t, map[string]any{"max_requests_per_1_minute": json.Number("500"), "max_tokens_per_1_minute": json.Number("200000")}, rates)

	h.sim.SetSpendLimit(h.project, 123_405)
	h.sim.SetEnforcement(h.project, "inactive")
	h.sim.SetModelPermissions(h.project, client.AllowList, "gpt-5-mini")
	resp := h.must(h.read("projects/" + h.project))
	require.Equal(t, "1234.05", resp.Data["spend_limit"])
	require.Equal(t, "USD", resp.Data["spend_limit_currency"])
	require.Equal(t, "month", resp.Data["spend_limit_interval"])
	require.Equal(t, "inactive", resp.Data["spend_limit_enforcement"])
	require.Contains(t, resp.Warnings[0], "does not document")
	require.Equal(t, client.AllowList, resp.Data["model_permissions"])
	require.Equal(t, []string{"gpt-5-mini"}, resp.Data["model_ids"])
	require.Empty(t, resp.Data["requirements_unmet"])

	require.Contains(t, h.refused(h.read("projects/proj_none")), "not found")
	h.sim.ArchiveProject(h.project)
	require.Equal(t, "archived", h.must(h.read("projects/" + h.project)).Data["status"])
	h.silence()
	_, err := h.read("projects/" + h.sim.AddProject("another"))
	require.Error(t, err)
}
