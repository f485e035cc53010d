package openaisecrets

// A credential is restricted and probed before it is returned, and otherwise destroyed.

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	scopeChat = "api.model.request"
	scopeRead = "api.model.read"
)

// coded is the HTTP status of a request's error.
func coded(t *testing.T, err error) int {
	t.Helper()
	var withCode logical.HTTPCodedError
	require.ErrorAs(t, err, &withCode)
	return withCode.Code()
}

func TestScopes_AreSetBeforeTheKeyIsReturned(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"scopes": "api.model.request,api.files.read"})
	h.sim.ResetRequests()
	lease := h.lease("creds/app", nil)
	require.Equal(t, []string{"POST " + routeAccounts, "POST " + routeKey, "GET " + routeModels}, h.routes())
	requests := h.sim.Requests()
	require.Equal(t, lease.Data["api_key_id"], requests[2].AuthKeyID, "the probe follows the restriction")
	require.Equal(t, []string{scopeChat, "api.files.read"}, h.sim.Keys()[0].Scopes)
	require.Equal(t, 200, h.inference(lease, http.MethodPost, "/chat/completions"))
	require.Equal(t, 403, h.inference(lease, http.MethodPost, "/responses"))
	require.Equal(t, 403, h.inference(lease, http.MethodGet, "/models"))
	h.onlyLeased(lease)
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
}

func TestScopes_ArePartOfTheCreateOfAKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(map[string]any{"scopes": []string{scopeChat, "api.files.read"}})
	h.sim.ResetRequests()
	lease := h.lease("creds/app", nil)
	require.Equal(t, []string{"POST " + routeNewKey, "GET " + routeModels}, h.routes())
	require.Equal(t, []string{scopeChat, "api.files.read"}, h.sim.Keys()[0].Scopes)
	require.Equal(t, 403, h.inference(lease, http.MethodPost, "/responses"))
	h.onlyKeys(account, lease)
	require.NoError(t, h.revoke(lease))
	h.runPeriodicWork()
	h.onlyKeys(account)
}

// OpenAI treats an empty list as all scopes.
func TestScopes_EmptyListIsNotSent(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
	bodies := h.bodies()
	sent := 0
	use := func(want string) {
		t.Helper()
		lease := h.lease("creds/app", nil)
		_, err := h.renew(t.Context(), lease, 0, 2*time.Hour)
		require.NoError(t, err)
		require.NoError(t, h.revoke(lease))
		all := bodies()
		require.Greater(t, len(all), sent)
		text := strings.Join(all[sent:], "\n")
		require.NotContains(t, strings.ReplaceAll(text, " ", ""), `"scopes":[]`)
		require.NotContains(t, strings.ReplaceAll(text, " ", ""), `"scopes":null`)
		require.Equal(t, want != "", strings.Contains(text, "scopes"), text)
		require.Contains(t, text, want)
		sent = len(all)
	}
	for _, none := range []any{nil, "", []string{}} {
		data := map[string]any{"key_expiry": expiryTTL}
		if none != nil {
			data["scopes"] = none
		}
		h.role(data)
		use("")
		h.adopted(data)
		use("")
	}
	h.adopted(map[string]any{"scopes": scopeChat, "key_expiry": expiryTTL})
	use(`"scopes":["` + scopeChat + `"]`)
	h.must(h.write("roles/app", map[string]any{"scopes": ""}))
	use("")
	h.advance(time.Second) // keys that OpenAI does not delete expire
	require.Empty(t, h.sim.Keys())
}

func TestScopes_UnknownScopeIsReportedAndCleanedUp(t *testing.T) {
	t.Parallel()
	const unknown = "Api.Nope"
	for name, role := range map[string]func(h *harness){
		typeAccount: func(h *harness) { h.role(map[string]any{"scopes": []string{scopeChat, unknown}}) },
		typeKey:     func(h *harness) { h.adopted(map[string]any{"scopes": []string{scopeChat, unknown}}) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			role(h)
			said := h.refused(h.read("creds/app"))
			require.Contains(t, said, unknown)
			require.Contains(t, said, "param scopes")
			require.Empty(t, h.sim.Keys())
			require.Empty(t, h.walEntries())
			require.Zero(t, h.sim.Count(http.MethodGet, routeModels))
			if name == typeAccount {
				require.Contains(t, said, "the account was deleted")
				h.onlyLeased()
			}
		})
	}
}

// Between the create and the restriction, the key is unrestricted.
func TestScopes_UnrestrictedKeyIsDestroyedOnFailure(t *testing.T) {
	t.Parallel()
	for name, fault := range apiFaults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.hangs(fault.Kind)
			h.role(map[string]any{"scopes": scopeChat})
			fault := fault
			fault.Method, fault.Route = http.MethodPost, routeKey
			h.sim.Fail(fault)
			ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second) // a rate-limited call waits until the deadline
			defer cancel()
			resp, err := h.do(ctx, logical.ReadOperation, "creds/app", nil)
			if name == "missing key" { // harmless: an update does not return the key
				require.NoError(t, h.revoke(h.stored(h.must(resp, err))))
				return
			}
			require.True(t, err != nil || resp.IsError())
			if resp != nil {
				require.NotContains(t, fmt.Sprint(resp.Data), "sk-")
			}
			require.Zero(t, h.sim.Count(http.MethodGet, routeModels), "the unrestricted key was not used")
			h.onlyLeased() // immediately, without a WAL run
		})
	}
}

func TestScopes_UpdateIsRetriedWithTheRotatedAdminKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_grace_period": 0}))
	h.role(map[string]any{"scopes": scopeChat})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Times: 1, Status: 401, OnStrike: func(*http.Request) {
		if _, err := h.write("config/rotate", nil); err != nil {
			t.Error(err)
		}
	}})
	lease := h.lease("creds/app", nil)
	require.Equal(t, []string{scopeChat}, h.sim.Keys()[0].Scopes)
	require.NoError(t, h.revoke(lease))
	h.onlyLeased()
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestAPIKey_OneCallPerLease(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(nil)
	h.sim.ResetRequests()
	const n = 10
	names := map[string]bool{}
	for range n {
		lease := h.lease("creds/app", nil)
		require.Equal(t, account, lease.Data["service_account_id"])
		require.Equal(t, "batch", lease.Data["service_account"])
		key := h.sim.Keys()[0]
		require.Equal(t, lease.Data["api_key_id"], key.ID)
		require.Equal(t, lease.Data["api_key"], key.Value)
		require.Equal(t, key.ExpiresAt.Format(time.RFC3339), lease.Data["expires_at"])
		require.Regexp(t, "^vault-app-[a-z0-9]{15}$", key.Name)
		names[key.Name] = true
		require.NoError(t, h.revoke(lease))
		h.onlyKeys(account)
	}
	require.Len(t, names, n)
	require.Equal(t, n, h.sim.Count(http.MethodPost, routeNewKey))
	require.Equal(t, n, h.sim.Count(http.MethodDelete, routeKey))
	require.Equal(t, n, h.sim.Count(http.MethodGet, routeModels))
	require.Equal(t, 3*n, h.sim.Count("", ""))
}

func TestAPIKey_LostAnswerLeavesWALEntryWithKeyName(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(nil)
	other, err := h.api().CreateServiceAccountKey(t.Context(), h.project, account, "by hand", nil, time.Hour)
	require.NoError(t, err)
	h.sim.Keep(other.ID)
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Times: 2, Kind: openaitest.FaultLost})
	lease := h.lease("creds/app", nil)
	require.Len(t, h.sim.Keys(), 4)
	require.Len(t, h.walEntries(), 2, "each ambiguous attempt keeps its entry")
	h.runPeriodicWork()
	require.Empty(t, h.walEntries())
	require.Equal(t, []string{account}, h.alive())
	require.Len(t, h.sim.Keys(), 2, "the lease's key, and the one created by hand")
	require.NoError(t, h.revoke(lease))
	require.Len(t, h.sim.Keys(), 1)
	require.Equal(t, other.ID, h.sim.Keys()[0].ID)

	// All responses are lost, and the account is deleted.
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err = h.read("creds/app")
	require.Equal(t, 502, coded(t, err))
	require.Len(t, h.walEntries(), maxAttempts)
	h.sim.DeleteServiceAccount(h.project, account)
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestAPIKey_MissingAccountIsAClientError(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(nil)
	h.sim.DeleteServiceAccount(h.project, account)
	require.Contains(t, h.refused(h.read("creds/app")), account)
	h.onlyLeased()
}

func TestAPIKey_RevokeOfDeletedKeySucceeds(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(h *harness, account, key string){
		"the key": func(h *harness, _, key string) {
			require.NoError(h.t, h.api().DeleteProjectKey(h.t.Context(), h.project, key))
		},
		"the account": func(h *harness, account, _ string) { h.sim.DeleteServiceAccount(h.project, account) },
		"the project": func(h *harness, _, _ string) { h.sim.ArchiveProject(h.project) },
		"the project, and OpenAI answers with 403": func(h *harness, _, _ string) {
			h.sim.ArchiveProject(h.project)
			h.sim.Fail(openaitest.Fault{Route: routeKey, Status: 403, Message: "no"})
		},
	} {
		for _, refused := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, DELETE refused: %t", name, refused), func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: refused})
				account := h.adopted(nil)
				lease := h.lease("creds/app", nil)
				h.sim.Configure(func(o *openaitest.Options) { o.DeleteServiceAccountKeyRefused = false })
				lose(h, account, lease.Data["api_key_id"].(string))
				h.sim.Configure(func(o *openaitest.Options) { o.DeleteServiceAccountKeyRefused = refused })
				h.advance(notFinalBefore)
				require.NoError(t, h.revoke(lease))
				require.Empty(t, h.walEntries())
			})
		}
	}
}

func TestAPIKey_RevokeWithoutPermissionFails(t *testing.T) {
	t.Parallel()
	for _, status := range []int{401, 403} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			account := h.adopted(nil)
			lease := h.lease("creds/app", nil)
			cancel := h.sim.Fail(openaitest.Fault{Route: routeKey, Status: status, Message: "not allowed"})
			for range 2 {
				err := h.revoke(lease)
				require.ErrorContains(t, err, "not allowed")
				require.ErrorContains(t, err, lease.Data["api_key_id"].(string))
			}
			require.Len(t, h.sim.Keys(), 1)
			require.Len(t, h.walEntries(), 1, "repeated failed revocations create one entry")
			h.runPeriodicWork()
			require.Len(t, h.sim.Keys(), 1)
			cancel()
			h.runPeriodicWork()
			h.onlyKeys(account)
			require.NoError(t, h.revoke(lease), "Vault's next attempt succeeds")
		})
	}
}

// OpenAI's documents disagree on whether such a key can be deleted.
func TestAPIKey_RejectedDeleteExpiresTheKey(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"no fault":                    {},
		"a lost response":             {Kind: openaitest.FaultLost, Times: 1},
		"a response after the expiry": {Kind: openaitest.FaultHangAfter, Times: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
			h.hangs(fault.Kind)
			account := h.adopted(map[string]any{"scopes": scopeChat})
			lease := h.lease("creds/app", nil)
			second := h.lease("creds/app", nil)
			if fault.Kind != "" {
				fault.Method, fault.Route = http.MethodPost, routeKey
				h.sim.Fail(fault)
			}
			require.NoError(t, h.revoke(lease))
			require.Empty(t, h.walEntries())
			h.advance(time.Second)
			require.Equal(t, 401, h.inference(lease, http.MethodPost, "/chat/completions"), "the key is invalid")
			require.Equal(t, 200, h.inference(second, http.MethodPost, "/chat/completions"))
			require.Contains(t, h.log.String(), "key expired instead of deleted")
			h.onlyKeys(account, second)
			require.NoError(t, h.revoke(lease), "Vault may repeat the revocation")
			h.advance(time.Hour)
			require.NoError(t, h.revoke(lease))
			require.NoError(t, h.revoke(second))
			h.advance(time.Second)
			h.onlyKeys(account)
		})
	}
}

// Only OpenAI's clock, as shown in its responses, decides whether a key has expired.
func TestAPIKey_OnlyOpenAIsClockSaysThatAKeyHasExpired(t *testing.T) {
	t.Parallel()
	t.Run("Vault's clock is ahead", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
		account := h.adopted(nil)
		lease := h.lease("creds/app", nil)
		h.setClock(1000 * time.Hour)
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeKey, Status: 403, Message: "not allowed"})
		require.NoError(t, h.revoke(lease), "it has expired by Vault's clock")
		h.runPeriodicWork()
		require.Equal(t, 200, h.inference(lease, http.MethodPost, "/chat/completions"))
		require.Len(t, h.walEntries(), 1)
		h.sim.ClearFaults()
		h.runPeriodicWork()
		h.advance(time.Second)
		h.onlyKeys(account)
	})
	t.Run("Vault's clock is behind", func(t *testing.T) {
		t.Parallel()
		h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
		account := h.adopted(nil)
		lease := h.lease("creds/app", nil)
		h.setClock(-3 * time.Hour)
		require.NoError(t, h.revoke(lease))
		h.advance(time.Second)
		h.onlyKeys(account)
		h.advance(time.Hour)
		require.NoError(t, h.revoke(lease), "Vault may repeat the revocation after the expiry")
	})
}

func TestAPIKey_RejectedDeleteWithoutExpiryFails(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"the update is refused": {Status: 400, Message: "cannot be updated"},
		"a missing permission":  {Status: 403, Message: "not allowed"},
		"an invalid admin key":  {Status: 401, Message: "who are you"},
		"a server error":        {Status: 500},
		"the update changes nothing": {Kind: openaitest.FaultGarbageBefore, Body: `{"object":"organization.project.api_key","id":"key_x","name":"n","redacted_value":"sk...x","created_at":1767225600,
			"last_used_at":null,"expires_at":4102444800,"owner_project_access":"active","owner":{"type":"service_account"}}`},
		"a response without an expiry": {Kind: openaitest.FaultGarbageBefore, Body: `{"id":"key_x"}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
			account := h.adopted(nil)
			lease := h.lease("creds/app", nil)
			fault.Method, fault.Route = http.MethodPost, routeKey
			cancel := h.sim.Fail(fault)
			require.ErrorContains(t, h.revoke(lease), lease.Data["api_key_id"].(string))
			require.Len(t, h.walEntries(), 1)
			require.Equal(t, 200, h.inference(lease, http.MethodGet, "/models"))
			cancel()
			h.runPeriodicWork()
			h.advance(time.Second)
			h.onlyKeys(account)
		})
	}
}

func TestAPIKey_RevokeOfExpiredKeyMakesNoCall(t *testing.T) {
	t.Parallel()
	for _, refused := range []bool{false, true} {
		h := configured(t, openaitest.Options{DeleteServiceAccountKeyRefused: refused})
		account := h.adopted(map[string]any{"ttl": "1m", "max_ttl": "5m"})
		lease := h.lease("creds/app", nil)
		h.advance(5*time.Minute + expiryMargin + clockSlack + 2*time.Second)
		h.sim.ResetRequests()
		require.NoError(t, h.revoke(lease))
		require.Zero(t, h.sim.Count("", ""))
		require.Len(t, h.walEntries(), 1)
		h.rollback()
		h.onlyKeys(account)
		require.Zero(t, h.sim.Count(http.MethodDelete, routeAccount))
	}
}

func TestAPIKey_DisableDeletesKeysAndKeepsTheAccount(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(nil)
	lease := h.lease("creds/app", nil)
	cancel := h.sim.Fail(openaitest.Fault{Route: routeKey, Status: 403})
	require.Error(t, h.revoke(lease))
	cancel()
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Times: maxAttempts, Kind: openaitest.FaultLost})
	_, err := h.read("creds/app")
	require.Error(t, err)
	require.Len(t, h.walEntries(), 1+maxAttempts)
	h.system.TaintedVal = true
	h.rollback()
	h.onlyKeys(account)
	require.Contains(t, h.refused(h.read("creds/app")), "disabled")
}

func TestAPIKey_RevokeNeedsOnlyTheLease(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	account := h.adopted(nil)
	lease := h.lease("creds/app", nil)
	h.role(nil) // the role now creates accounts
	h.restart()
	resp, err := h.renew(t.Context(), lease, time.Minute, 0)
	require.NoError(t, err)
	require.NoError(t, h.revoke(resp), "a renewed lease can be revoked")
	h.must(h.remove("roles/app"))
	require.NoError(t, h.revoke(lease))
	h.runPeriodicWork()
	h.onlyKeys(account)
}

func TestActivation_ReturnedKeyIsActive(t *testing.T) {
	t.Parallel()
	for _, delay := range []time.Duration{0, 300 * time.Millisecond, 1500 * time.Millisecond} {
		for _, scopes := range []string{"", scopeChat} {
			for _, kind := range []string{typeAccount, typeKey} {
				t.Run(fmt.Sprint(delay, scopes, kind), func(t *testing.T) {
					t.Parallel()
					inBubble(t, openaitest.Options{ActivationDelay: delay}, func(t *testing.T, h *harness) {
						h.configure(nil)
						if kind == typeKey {
							h.adopted(map[string]any{"scopes": scopes})
						} else {
							h.role(map[string]any{"scopes": scopes})
						}
						h.sim.ResetRequests()
						began := time.Now()
						lease := h.lease("creds/app", nil)
						require.Equal(t, 200, h.inference(lease, http.MethodPost, "/chat/completions"))
						require.GreaterOrEqual(t, time.Since(began), delay)
						require.LessOrEqual(t, time.Since(began), delay+2*probeLongest)
						probes := h.sim.Count(http.MethodGet, routeModels)
						require.LessOrEqual(t, probes, 12, "the interval grows")
						if delay == 0 {
							require.Equal(t, 1, probes)
						}
						require.NoError(t, h.revoke(lease))
					})
				})
			}
		}
	}
}

func TestActivation_TimeoutDestroysTheKey(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"an invalid key":                    {Status: 401, Code: "invalid_api_key", Message: "Incorrect API key provided"},
		"an IP address that is not allowed": {Status: 401, Code: "ip_not_authorized", Message: "Your address is not authorized"},
		"a server error":                    {Status: 503, Message: "we broke"},
		"a connection reset":                {Kind: openaitest.FaultReset},
		"no response":                       {Kind: openaitest.FaultHang},
		"another server's page":             {Kind: openaitest.FaultGarbageBefore, Body: "<html>welcome</html>"},
	} {
		for _, kind := range []string{typeAccount, typeKey} {
			t.Run(name+", "+kind, func(t *testing.T) {
				t.Parallel()
				test := func(t *testing.T, h *harness) {
					data := map[string]any{"activation_timeout": "1s"}
					if kind == typeKey {
						h.adopted(data)
					} else {
						h.role(data)
					}
					fault := fault // both kinds run in parallel
					fault.Route = routeModels
					h.sim.Fail(fault)
					began := time.Now()
					_, err := h.read("creds/app")
					if fault.Kind != openaitest.FaultHang {
						require.LessOrEqual(t, time.Since(began), 2*time.Second)
					}
					require.Equal(t, 502, coded(t, err))
					said := `role "app": the engine could not verify within 1s that OpenAI accepts the new key`
					if fault.Code == "invalid_api_key" {
						said = `role "app": OpenAI did not accept the new key within 1s; increase activation_timeout, or set it to 0 to skip the check: check the new key: `
					}
					require.ErrorContains(t, err, said)
					require.ErrorContains(t, err, ": check the new key: ")
					require.ErrorContains(t, err, fault.Message)
					require.NotContains(t, err.Error(), "admin key", "the admin key is valid")
					require.Empty(t, h.sim.Keys())
					require.Empty(t, h.walEntries())
					if kind == typeAccount {
						require.ErrorContains(t, err, "the account was deleted")
						require.Empty(t, h.alive())
					} else {
						require.ErrorContains(t, err, "the key was deleted")
						require.Len(t, h.alive(), 1)
					}
				}
				if fault.Kind == openaitest.FaultHang { // a hanging call would stop the time of a bubble
					test(t, configured(t, openaitest.Options{}))
					return
				}
				inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
					h.configure(nil)
					test(t, h)
				})
			})
		}
	}
}

func TestActivation_ErrorReportsDeferredDeletion(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{ActivationDelay: time.Hour})
	h.role(map[string]any{"activation_timeout": 1})
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: 403})
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "the account is queued for deletion in the WAL")
	require.Len(t, h.sim.Accounts(), 1)
	cancel()
	h.runPeriodicWork()
	h.onlyLeased()
}

func TestActivation_ZeroTimeoutSkipsProbe(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{ActivationDelay: time.Hour})
	h.role(map[string]any{"activation_timeout": 0})
	lease := h.lease("creds/app", nil)
	require.Zero(t, h.sim.Count("", routeModels))
	require.NoError(t, h.revoke(lease))
}

// In a synctest bubble, where time passes only while waiting.
func TestActivation_ProbesBackOff(t *testing.T) {
	t.Parallel()
	for _, scopes := range []string{"", scopeChat} {
		inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
			h.configure(nil)
			h.role(map[string]any{"scopes": scopes})
			began := time.Now()
			lease := h.lease("creds/app", nil)
			require.Zero(t, time.Since(began))
			require.NoError(t, h.revoke(lease))

			h.sim.Configure(func(o *openaitest.Options) { o.ActivationDelay = time.Hour })
			h.sim.ResetRequests()
			_, err := h.read("creds/app")
			require.ErrorContains(t, err, "did not accept the new key within 10s")
			require.LessOrEqual(t, time.Since(began), defaultActivation)
			require.Greater(t, time.Since(began), defaultActivation-2*probeLongest)
			probes := h.sim.Count(http.MethodGet, routeModels)
			require.Greater(t, probes, 20)
			require.Less(t, probes, 50)
			h.onlyLeased()
		})
	}
}

func TestActivation_MissingScopeCountsAsActive(t *testing.T) {
	t.Parallel()
	const text = "You have insufficient permissions for this operation. Missing scopes: api.model.read."
	for name, fault := range map[string]openaitest.Fault{
		"403, by its code": {Status: 403, Code: "missing_scope", Message: "no"},
		"401, by its code": {Status: 401, Code: "missing_scope", Message: "no"},
		"403, by its text": {Status: 403, Message: text},
		"401, by its text": {Status: 401, Message: text},
		"as a bare string": {Status: 403, Body: `{"error":"` + text + `"}`},
		"at a rate limit":  {Status: 429, Code: "rate_limit_exceeded"},
		"at a spend limit": {Status: 429, Code: "project_spend_limit_exceeded"},
	} {
		h := configured(t, openaitest.Options{})
		fault.Route = routeModels
		h.sim.Fail(fault)
		lease := h.lease("creds/app", nil)
		require.Equal(t, 1, h.sim.Count("", routeModels), name)
		require.NoError(t, h.revoke(lease))
	}
}

func TestActivation_RetriesTransientProbeErrors(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"500": {Status: 500, Times: 3}, "reset": {Kind: openaitest.FaultReset, Times: 3}, "hang": {Kind: openaitest.FaultHang, Times: 1},
		"a gateway's 429": {Status: 429, Times: 3, Body: "slow", Header: http.Header{"Retry-After": {"3600"}}}, "{}": {Kind: openaitest.FaultEmptyObject, Times: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.role(map[string]any{"activation_timeout": "30s"}) // a probe that hangs takes probeTimeout
			fault.Route = routeModels
			h.sim.Fail(fault)
			lease := h.lease("creds/app", nil)
			require.Equal(t, fault.Times+1, h.sim.Count("", routeModels))
			require.NoError(t, h.revoke(lease))
		})
	}
}

func TestActivation_CanceledRequestDestroysTheKey(t *testing.T) {
	t.Parallel()
	for _, strike := range []int{0, 2} {
		h := configured(t, openaitest.Options{ActivationDelay: time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		h.sim.Fail(openaitest.Fault{Route: routeModels, Skip: strike, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) { cancel() }})
		_, err := h.do(ctx, logical.ReadOperation, "creds/app", nil)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorContains(t, err, "the account was deleted")
		require.NotContains(t, err.Error(), "10s", "the timeout is not the cause")
		require.Equal(t, strike+1, h.sim.Count("", routeModels), "no further probe")
		h.onlyLeased()
	}
	// The request is canceled during the probe that succeeds.
	h := configured(t, openaitest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.sim.Fail(openaitest.Fault{Route: routeModels, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) { cancel() }})
	_, err := h.do(ctx, logical.ReadOperation, "creds/app", nil)
	require.Error(t, err)
	h.onlyLeased()
}

func TestActivation_DisableDuringProbeLeavesNothing(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{ActivationDelay: 700 * time.Millisecond})
	struck := make(chan struct{})
	h.sim.Fail(openaitest.Fault{Route: routeModels, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) {
		h.b.draining.Store(true)
		close(struck)
	}})
	h.system.TaintedVal = true
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-struck
		h.rollback()
	}()
	// The engine accepts the request, because the drain has not started.
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "the mount is being disabled")
	<-done
	h.onlyLeased()
}

// An expiry without a creation time is compared with this server's clock.
func TestPrepare_ExpiryWithoutCreationTime(t *testing.T) {
	t.Parallel()
	for end, fine := range map[string]bool{fmt.Sprint(time.Now().Add(25 * time.Hour).Unix()): true, "1767225600": false, `"soon"`: false} {
		h := configured(t, openaitest.Options{})
		h.role(map[string]any{"activation_timeout": 0})
		h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: `{
			"id":"user-x","name":"n","api_key":{"id":"key_x","value":"sk-svcacct-0123456789","expires_at":` + end + `}}`})
		resp, err := h.read("creds/app")
		if fine {
			h.must(resp, err)
			continue
		}
		require.ErrorContains(t, err, "OpenAI created a key that ")
	}
}

// expiries returns the requested expires_in_seconds.
func expiries(t *testing.T, bodies []string) []string {
	t.Helper()
	var all []string
	for _, body := range bodies {
		_, after, found := strings.Cut(strings.ReplaceAll(body, " ", ""), `"expires_in_seconds":`)
		if !found {
			all = append(all, "none")
			continue
		}
		all = append(all, after[:strings.IndexFunc(after, func(r rune) bool { return r < '0' || r > '9' })])
	}
	return all
}

func TestKeyExpiry_RequestedExpiry(t *testing.T) {
	t.Parallel()
	long := 20000 * time.Hour
	for name, test := range map[string]struct {
		role     map[string]any
		ttl      string // requested with the read
		mountMax time.Duration
		asked    string // seconds
		leaseTTL time.Duration
		leaseMax time.Duration
		warned   bool
	}{
		"the default":                     {nil, "", 0, "86475", time.Hour, 24 * time.Hour, false},
		"max_ttl":                         {map[string]any{"key_expiry": "max_ttl", "max_ttl": "2h"}, "5m", 0, "7275", 5 * time.Minute, 2 * time.Hour, false},
		"the mount's maximum":             {map[string]any{"key_expiry": "max_ttl"}, "", 3 * time.Hour, "10875", time.Hour, 3 * time.Hour, false},
		"ttl":                             {map[string]any{"key_expiry": "ttl"}, "", 0, "3675", time.Hour, 24 * time.Hour, false},
		"ttl, as requested":               {map[string]any{"key_expiry": "ttl"}, "10m", 0, "675", 10 * time.Minute, 24 * time.Hour, false},
		"ttl of a second":                 {map[string]any{"key_expiry": "ttl", "ttl": 1}, "", 0, "76", time.Second, 24 * time.Hour, false},
		"ttl over max_ttl":                {map[string]any{"key_expiry": "ttl", "max_ttl": "2h"}, "5h", 0, "7275", 2 * time.Hour, 2 * time.Hour, true},
		"ttl over the mount's maximum":    {map[string]any{"key_expiry": "ttl", "ttl": "4h"}, "", 3 * time.Hour, "10875", 3 * time.Hour, 3 * time.Hour, true},
		"none":                            {map[string]any{"key_expiry": "none"}, "", 0, "none", time.Hour, 24 * time.Hour, false},
		"over a year":                     {map[string]any{"max_ttl": "10000h"}, "", long, "31536000", time.Hour, maxLease, false},
		"over a year, requested":          {map[string]any{"max_ttl": "10000h"}, "9000h", long, "31536000", maxLease, maxLease, true},
		"over a year, with ttl":           {map[string]any{"key_expiry": "ttl", "max_ttl": "15000h", "ttl": "9000h"}, "", long, "31536000", maxLease, 15000 * time.Hour, true},
		"over a year, none":               {map[string]any{"key_expiry": "none", "max_ttl": "15000h", "ttl": "9000h"}, "", long, "none", 9000 * time.Hour, 15000 * time.Hour, false},
		"back to the default":             {map[string]any{"key_expiry": ""}, "", 0, "86475", time.Hour, 24 * time.Hour, false},
		"the mount has no limit":          {map[string]any{"key_expiry": "ttl"}, "", -1, "3675", time.Hour, 24 * time.Hour, false},
		"the longest lease":               {map[string]any{"max_ttl": int64(maxLease / time.Second)}, "", long, "31536000", time.Hour, maxLease, false},
		"a second over the longest lease": {map[string]any{"max_ttl": int64(maxLease/time.Second) + 1}, "", long, "31536000", time.Hour, maxLease, false},
	} {
		for _, kind := range []string{typeAccount, typeKey} {
			t.Run(name+", "+kind, func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{})
				if test.mountMax != 0 {
					h.tune(max(test.mountMax, 0))
				}
				data := map[string]any{"activation_timeout": 0}
				maps.Copy(data, test.role)
				if kind == typeKey {
					h.adopted(data)
				} else {
					h.role(data)
				}
				bodies := h.bodies()
				asked := map[string]any{}
				if test.ttl != "" {
					asked["ttl"] = test.ttl
				}
				lease := h.lease("creds/app", asked)
				require.Equal(t, []string{test.asked}, expiries(t, bodies()))
				require.Equal(t, test.leaseTTL, lease.Secret.TTL)
				require.Equal(t, test.leaseMax, lease.Secret.MaxTTL)
				require.Equal(t, test.warned, len(lease.Warnings) > 0, "%v", lease.Warnings)
				require.True(t, lease.Secret.Renewable)
				key := h.sim.Keys()[0]
				require.Equal(t, text.TimeOrNull(key.ExpiresAt), lease.Data["expires_at"])
				require.Equal(t, test.asked == "none", lease.Data["expires_at"] == nil)
				shown := h.must(h.read("roles/app")).Data
				if test.ttl == "" {
					require.Equal(t, strings.Replace(test.asked, "none", "0", 1), fmt.Sprint(shown["effective_key_lifetime"]), "the role shows the lifetime")
					require.EqualValues(t, test.leaseTTL/time.Second, shown["effective_ttl"])
				}
				require.EqualValues(t, test.leaseMax/time.Second, shown["effective_max_ttl"])
				require.NoError(t, h.revoke(lease))
			})
		}
	}
}

// With a policy that limits the lifetime of keys, an error names the setting to change.
func TestKeyExpiry_UnderAPolicy(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		role map[string]any
		said []string // nil = no error
	}{
		"max_ttl":              {nil, []string{"24h1m15s", "max_ttl", "key_expiration_too_long", "at most 7200"}},
		"max_ttl that fits":    {map[string]any{"max_ttl": "1h"}, nil},
		"ttl":                  {map[string]any{"key_expiry": "ttl"}, nil},
		"ttl that is too long": {map[string]any{"key_expiry": "ttl", "ttl": "3h"}, []string{"3h1m15s", "key_expiry=ttl", "key_expiration_too_long"}},
		"none":                 {map[string]any{"key_expiry": "none"}, []string{"key_expiry=none", "set key_expiry=max_ttl or ttl", "key_expiration_required"}},
	} {
		for _, kind := range []string{typeAccount, typeKey} {
			t.Run(name+", "+kind, func(t *testing.T) {
				t.Parallel()
				h := configured(t, openaitest.Options{MaxKeyLifetime: 2 * time.Hour})
				data := map[string]any{"scopes": scopeChat}
				maps.Copy(data, test.role)
				if kind == typeKey {
					h.adopted(data)
				} else {
					h.role(data)
				}
				if test.said == nil {
					lease := h.lease("creds/app", nil)
					require.Equal(t, 200, h.inference(lease, http.MethodPost, "/chat/completions"))
					_, err := h.renew(t.Context(), lease, 0, 0)
					require.NoError(t, err)
					require.NoError(t, h.revoke(lease))
					return
				}
				said := h.refused(h.read("creds/app"))
				for _, text := range test.said {
					require.Contains(t, said, text)
				}
				require.Empty(t, h.sim.Keys())
				require.Empty(t, h.walEntries())
				require.Len(t, slices.DeleteFunc(h.routes(), func(r string) bool { return !strings.HasPrefix(r, "POST ") }), 1, "no retry")
			})
		}
	}
	// OpenAI does not document the status of a policy error.
	h := configured(t, openaitest.Options{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeAccounts, Times: 1, Status: 403, Message: "Keys of this organization must expire within a day."})
	said := h.refused(h.read("creds/app"))
	require.Contains(t, said, "reduce max_ttl")
	require.NotContains(t, said, "admin key")
	// Another refusal does not blame the lifetime.
	h.sim.SetKeyCreationDisabled(true)
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "key_creation_disabled")
	require.NotContains(t, err.Error(), "shorten")
	h.onlyLeased()
}

func TestScopes_UpdateRetriesWhileOpenAIDoesNotFindTheKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.role(map[string]any{"scopes": scopeChat})
	h.must(h.write("config/rotate", nil))
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/projects/{project_id}/api_keys/{api_key_id}", Status: 401, Times: 1})
	resp, err := h.read("creds/app")
	h.sim.KeepAll() // the admin key that the rotation created
	require.NoError(t, err)
	require.NoError(t, resp.Error())
}
