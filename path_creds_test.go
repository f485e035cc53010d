package openaisecrets

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

const (
	routeAccounts = "/organization/projects/{project_id}/service_accounts"
	routeAccount  = routeAccounts + "/{service_account_id}"
	routeProject  = "/organization/projects/{project_id}"
	routeKeys     = "/organization/projects/{project_id}/api_keys"
	routeKey      = routeKeys + "/{api_key_id}"
	routeNewKey   = routeAccount + "/api_keys"
	routeModels   = "/models"
)

func TestCreds_LeaseOfOneKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.ResetRequests()

	lease := h.lease("creds/app", nil)
	require.Equal(t, 1, h.sim.Count(http.MethodPost, routeAccounts))
	require.Equal(t, 1, h.sim.Count(http.MethodGet, routeModels), "one probe")
	require.Equal(t, 2, h.sim.Count("", ""), "one Admin API call per credential")
	require.Equal(t, time.Hour, lease.Secret.TTL)
	require.Equal(t, 24*time.Hour, lease.Secret.MaxTTL)
	require.True(t, lease.Secret.Renewable)
	h.onlyLeased(lease)

	accounts := h.sim.Accounts()
	require.Equal(t, lease.Data["service_account"], accounts[0].Name)
	require.Equal(t, lease.Data["api_key"], accounts[0].Keys[0].Value)
	require.Equal(t, lease.Data["api_key_id"], accounts[0].Keys[0].ID)
	require.Equal(t, h.project, lease.Data["project_id"])

	tag, err := getTag(t.Context(), h.storage)
	require.NoError(t, err)
	require.Regexp(t, `^vault-app-`+tag+`[a-z0-9]{10}$`, accounts[0].Name)

	end := accounts[0].Keys[0].ExpiresAt
	require.Equal(t, end.Format(time.RFC3339), lease.Data["expires_at"])
	require.WithinRange(t, end, time.Now().Add(24*time.Hour), time.Now().Add(24*time.Hour+5*time.Minute), "the key covers the max_ttl of the lease")

	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

func TestCreds_OneCallPerCredential(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.ResetRequests()
	const n = 20
	for range n {
		require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	}
	require.Equal(t, n, h.sim.Count(http.MethodPost, routeAccounts))
	require.Equal(t, n, h.sim.Count(http.MethodDelete, routeAccount))
	require.Equal(t, n, h.sim.Count(http.MethodGet, routeModels), "one probe for each")
	require.Equal(t, 3*n, h.sim.Count("", ""))
}

func TestCreds_TTL(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("roles/app", map[string]any{"ttl": "1h", "max_ttl": "2h"}))

	for name, test := range map[string]struct {
		asked    any
		mountMax time.Duration
		ttl, max time.Duration
		warned   bool
	}{
		"none":             {nil, 0, time.Hour, 2 * time.Hour, false},
		"zero":             {0, 0, time.Hour, 2 * time.Hour, false},
		"number":           {600, 0, 10 * time.Minute, 2 * time.Hour, false},
		"text":             {"600", 0, 10 * time.Minute, 2 * time.Hour, false},
		"duration":         {"30m", 0, 30 * time.Minute, 2 * time.Hour, false},
		"at the maximum":   {"2h", 0, 2 * time.Hour, 2 * time.Hour, false},
		"over the maximum": {"3h", 0, 2 * time.Hour, 2 * time.Hour, true},
		"mount is shorter": {"90m", 80 * time.Minute, 80 * time.Minute, 80 * time.Minute, true},
		"role over mount":  {nil, 30 * time.Minute, 30 * time.Minute, 30 * time.Minute, true},
		"mount is longer":  {"90m", 100 * time.Minute, 90 * time.Minute, 100 * time.Minute, false},
	} {
		h.tune(test.mountMax)
		for _, op := range []logical.Operation{logical.ReadOperation, logical.UpdateOperation} {
			data := map[string]any{}
			if test.asked != nil {
				data["ttl"] = test.asked
			}
			resp := h.must(h.do(t.Context(), op, "creds/app", data))
			require.Equal(t, test.ttl, resp.Secret.TTL, name)
			require.Equal(t, test.max, resp.Secret.MaxTTL, name)
			require.Equal(t, test.warned, len(resp.Warnings) > 0, "%s: %v", name, resp.Warnings)
			lease := h.stored(resp)
			end, err := time.Parse(time.RFC3339, lease.Data["expires_at"].(string))
			require.NoError(t, err)
			require.True(t, end.After(time.Now().Add(test.max)), "%s: the key expires before the lease can", name)
			require.NoError(t, h.revoke(lease))
		}
	}

	for _, bad := range []any{-1, "-1h", "soon", "", "1e400", "500ms", "1.5s", "99999999999999999999h", strings.Repeat("9", 1<<20), "\xff", []any{1}} {
		if bad == "" {
			continue // Vault treats an empty duration as unset
		}
		said := h.refused(h.do(t.Context(), logical.ReadOperation, "creds/app", map[string]any{"ttl": bad}))
		require.Contains(t, said, "ttl")
	}
	h.onlyLeased()
}

func TestCreds_BadRequests(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.Contains(t, h.refused(h.read("creds/app")), `role "app" not found`)
	require.Contains(t, h.refused(h.read("creds/"+strings.Repeat("r", 1<<20))), "the limit is 128")
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	require.Contains(t, h.refused(h.read("creds/app")), "vault write openai/config")
	h.configure(nil)
	require.Contains(t, h.refused(h.write("creds/app", map[string]any{"scopes": "api.all.read"})), `unknown field: "scopes"`)
	h.onlyLeased()
}

func TestCreds_RetriesAnAmbiguousCreateUnderANewName(t *testing.T) {
	t.Parallel()
	for _, kind := range []openaitest.FaultKind{
		openaitest.FaultLost, openaitest.FaultReset, openaitest.FaultGarbage, openaitest.FaultEmpty, openaitest.FaultEmptyObject,
		openaitest.FaultTruncated, openaitest.FaultHuge, openaitest.FaultHTML, openaitest.FaultMissingKey,
		openaitest.FaultStatus, openaitest.FaultStatusAfter, openaitest.FaultHang, openaitest.FaultHangAfter,
	} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.hangs(kind)
			h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 2, Kind: kind, Status: 503})
			lease := h.lease("creds/app", nil)
			require.Equal(t, 3, h.sim.Count(http.MethodPost, routeAccounts))

			names := map[string]bool{}
			for _, entry := range h.sim.Ledger() {
				if entry.Kind == openaitest.KindAccount {
					require.False(t, names[entry.Name], "a name was used twice")
					names[entry.Name] = true
				}
			}
			require.Len(t, h.walEntries(), 2, "each ambiguous attempt keeps its entry")
			h.runPeriodicWork()
			h.onlyLeased(lease)
			require.NoError(t, h.revoke(lease))
		})
	}
}

func TestCreds_PermanentFailures(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		fault   openaitest.Fault
		code    int // 0 = no coded error
		said    string
		creates int
	}{
		"server error":      {openaitest.Fault{Status: 500, Message: "we broke"}, 502, "we broke", maxAttempts},
		"answer lost":       {openaitest.Fault{Kind: openaitest.FaultLost}, 502, "no answer", maxAttempts},
		"garbage":           {openaitest.Fault{Kind: openaitest.FaultGarbage}, 502, "unexpected response", maxAttempts},
		"rate limit":        {openaitest.Fault{Status: 429, Message: "slow down", Header: http.Header{"Retry-After": {"120"}}}, 429, "slow down", 1},
		"spend limit":       {openaitest.Fault{Status: 429, Message: "no money", Code: "project_spend_limit_exceeded"}, 429, "no money", 1},
		"redirect":          {openaitest.Fault{Kind: openaitest.FaultRedirect, Header: http.Header{"Location": {"https://example.com/"}}}, 502, "redirects are not followed", 1},
		"permission string": {openaitest.Fault{Status: 403, Body: `{"error":"Missing scopes: api.management.write."}`}, 0, "Missing scopes", 1},
		"invalid admin key": {openaitest.Fault{Status: 401, Message: "Incorrect API key provided"}, 0, "Incorrect API key", 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			test.fault.Method, test.fault.Route = http.MethodPost, routeAccounts
			h.sim.Fail(test.fault)
			h.sim.ResetRequests()
			began := time.Now()
			resp, err := h.read("creds/app")
			require.Nil(t, resp)
			require.ErrorContains(t, err, test.said)
			require.ErrorContains(t, err, `role "app"`)
			require.Less(t, time.Since(began), requestBudget)
			if test.code != 0 {
				var coded logical.HTTPCodedError
				require.ErrorAs(t, err, &coded)
				require.Equal(t, test.code, coded.Code())
			}
			require.Equal(t, test.creates, h.sim.Count(http.MethodPost, routeAccounts))
			h.sim.ClearFaults()
			h.runPeriodicWork()
			h.onlyLeased()
		})
	}
}

func TestCreds_RejectionsByOpenAIAreClientErrors(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.ArchiveProject(h.project)
	said := h.refused(h.read("creds/app"))
	require.Contains(t, said, "archived")
	require.Contains(t, said, h.project)
	require.Contains(t, said, "request id req_")
	h.onlyLeased()

	h = configured(t, openaitest.Options{MaxKeyLifetime: time.Hour})
	require.Contains(t, h.refused(h.read("creds/app")), "expire")
	h.must(h.write("roles/app", map[string]any{"ttl": "10m", "max_ttl": "50m"}))
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.onlyLeased()
}

func TestCreds_AnUnreachableEndpointFailsFastAndLeavesNoWALEntry(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	_, key := h.sim.AdminKey()
	h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": "http://127.0.0.1:1/v1", "skip_verify": true}))
	began := time.Now()
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "cannot reach 127.0.0.1:1")
	require.Less(t, time.Since(began), requestBudget/2)
	h.onlyLeased()
}

func TestCreds_WaitsForRetryAfter(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 1, Status: 429, Header: http.Header{"Retry-After": {"1"}}})
	began := time.Now()
	lease := h.lease("creds/app", nil)
	require.GreaterOrEqual(t, time.Since(began), time.Second)
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))
}

func TestCreds_ACanceledRequestLeavesNoCredential(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"while creating":          {Kind: openaitest.FaultSlow, Delay: 200 * time.Millisecond},
		"while creating, refused": {Kind: openaitest.FaultStatus, Status: 400},
		"while creating, lost":    {Kind: openaitest.FaultLost},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			fault.Method, fault.Route, fault.Times = http.MethodPost, routeAccounts, 1
			fault.OnStrike = func(*http.Request) { cancel() }
			h.sim.Fail(fault)
			resp, err := h.do(ctx, logical.ReadOperation, "creds/app", nil)
			require.True(t, err != nil || resp.IsError())
			if name != "while creating, lost" {
				h.onlyLeased() // immediately, without a WAL run
			}
			h.runPeriodicWork()
			h.onlyLeased()
		})
	}
	t.Run("before the first call", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{})
		h.sim.ResetRequests()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := h.do(ctx, logical.ReadOperation, "creds/app", nil)
		require.Error(t, err)
		require.Zero(t, h.sim.Count("", ""))
		h.onlyLeased()
	})
}

func TestCreds_ARequestInProgressUsesTheRotatedAdminKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	// The admin key is rotated and deleted during the create.
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 1, Status: 401, OnStrike: func(*http.Request) {
		_, err := h.write("config/rotate", nil)
		if err != nil {
			t.Error(err)
		}
	}})
	lease := h.lease("creds/app", nil)
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestCreds_NothingIsCreatedWhileTheMountIsDisabled(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.system.TaintedVal = true
	h.rollback()
	h.sim.ResetRequests()
	require.Contains(t, h.refused(h.read("creds/app")), "disabled")
	require.Zero(t, h.sim.Count("", ""))
	// After a move, the mount works again.
	h.system.TaintedVal = false
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.onlyLeased()
}

func TestCreds_DisablingWaitsForRequestsInProgress(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	disable := make(chan struct{})
	done := make(chan struct{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 1, Kind: openaitest.FaultLost, OnStrike: func(*http.Request) {
		h.b.draining.Store(true)
		close(disable)
	}})
	go func() {
		defer close(done)
		<-disable
		h.rollback()
	}()
	h.system.TaintedVal = true
	h.refused(h.read("creds/app"))
	<-done
	require.Equal(t, 1, h.sim.Count(http.MethodPost, routeAccounts), "no further attempt")
	h.onlyLeased()
}

func TestCreds_DiscardsAKeyWithoutAnExpiry(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]string{"never": "null", "too early": "1767225600"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: `{
				"object":"organization.project.service_account","id":"user-x","name":"n","role":"member","created_at":1767225600,
				"api_key":{"object":"organization.project.service_account.api_key","id":"key_x","name":"n","value":"sk-svcacct-endless","created_at":1767225600,"expires_at":` + end + `}}`})
			_, err := h.read("creds/app")
			require.ErrorContains(t, err, "OpenAI created a key that ")
			require.ErrorContains(t, err, "the account is queued for deletion in the WAL", "the 404 for this account is not final")
			h.runPeriodicWork()
			h.onlyLeased()
		})
	}
}

func TestCreds_ManyFirstRequestsShareOneClient(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.restart()
	snaps := make([]*snapshot, 50)
	var wg sync.WaitGroup
	for i := range snaps {
		wg.Go(func() {
			snap, err := h.b.current(context.Background(), h.storage)
			if err != nil {
				t.Error(err)
			}
			snaps[i] = snap
		})
	}
	wg.Wait()
	for _, snap := range snaps {
		require.Same(t, snaps[0], snap)
	}
}

// Storage deletes the WAL entry of the create but answers with an error, and OpenAI does
// not delete the account. The account is recorded as soon as storage works again; if it
// does not, the error names the account.
func TestCreds_UnreturnedCredentialIsRecordedDespiteStorageErrors(t *testing.T) {
	t.Parallel()
	for _, more := range []int{1, 100} {
		h := configured(t, openaitest.Options{})
		h.role(nil)
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Kind: openaitest.FaultReset})
		h.storage.fail(storageFault{write: 1, after: true, more: more})
		_, err := h.read("creds/app")
		h.sim.ClearFaults()
		h.storage.heal()
		if more == 1 {
			require.ErrorContains(t, err, "the account is queued for deletion in the WAL")
			require.Len(t, h.walEntries(), 1)
			h.rollback()
			h.onlyLeased()
			continue
		}
		require.ErrorContains(t, err, h.alive()[0]+" in project "+h.project+" may remain at OpenAI")
		require.Empty(t, h.walEntries())
		h.sim.DeleteServiceAccount(h.project, h.alive()[0])
	}
}
