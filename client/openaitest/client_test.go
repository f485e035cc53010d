// These tests validate the request and response of every client call against OpenAI's
// published document.

package openaitest_test

import (
	"context"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

// calls makes every call of the client at least once; each must succeed. Later calls use
// the resources that earlier calls create.
func calls(t *testing.T, sim *openaitest.Server, c *client.Client) {
	t.Helper()
	ctx := context.Background()
	project := sim.AddProject("contract")
	account, born, err := c.CreateServiceAccount(ctx, project, "an account", time.Hour)
	require.NoError(t, err)
	key, err := c.CreateServiceAccountKey(ctx, project, account.ID, "a key", []string{"api.model.read"}, time.Hour)
	require.NoError(t, err)
	admin, _, err := c.CreateAdminKey(ctx, "an admin key", time.Hour)
	require.NoError(t, err)
	require.NoError(t, c.Probe(ctx, born.Value))
	_, err = c.UpdateProjectKey(ctx, project, key.ID, []string{"api.responses.write"}, 2*time.Hour)
	require.NoError(t, err)
	_, err = c.GetServiceAccount(ctx, project, account.ID)
	require.NoError(t, err)
	_, err = c.GetProjectKey(ctx, project, born.ID) // the probe set last_used_at
	require.NoError(t, err)
	_, err = c.GetAdminKey(ctx, admin.ID)
	require.NoError(t, err)
	_, err = c.GetProject(ctx, project)
	require.NoError(t, err)
	_, err = c.ListServiceAccounts(ctx, project)
	require.NoError(t, err)
	_, err = c.ListProjectKeys(ctx, project)
	require.NoError(t, err)
	_, err = c.ListAdminKeys(ctx)
	require.NoError(t, err)
	_, err = c.ListProjects(ctx)
	require.NoError(t, err)
	today := sim.Now().UTC().Truncate(24 * time.Hour)
	sim.AddCost(project, key.ID, "gpt-5-mini, input_tokens", today, "0.0000123")
	require.NoError(t, c.EachCost(ctx, today, today.AddDate(0, 0, 1), []string{project}, func([]client.Cost) error { return nil }))
	require.Equal(t, openaitest.UsageKinds, client.UsageKinds)
	for _, kind := range client.UsageKinds {
		sim.AddUsage(kind, project, key.ID, "gpt-5-mini", today, openaitest.Counts{Requests: 1})
		require.NoError(t, c.EachUsage(ctx, kind, today, today.AddDate(0, 0, 1), []string{project}, func([]client.Usage) error { return nil }))
	}
	sim.SetSpendLimit(project, 10_000)
	_, err = c.GetSpendLimit(ctx, project)
	require.NoError(t, err)
	sim.SetModelPermissions(project, "allow_list", "gpt-5-mini")
	_, err = c.GetModelPermissions(ctx, project)
	require.NoError(t, err)
	_, err = c.ListRateLimits(ctx, project)
	require.NoError(t, err)
	require.NoError(t, c.DeleteProjectKey(ctx, project, key.ID))
	require.NoError(t, c.DeleteServiceAccount(ctx, project, account.ID))
	require.NoError(t, c.DeleteAdminKey(ctx, admin.ID))
	// without scopes or an expiry
	account, _, err = c.CreateServiceAccount(ctx, project, "another", 0)
	require.NoError(t, err)
	_, err = c.CreateServiceAccountKey(ctx, project, account.ID, "another", nil, 0)
	require.NoError(t, err)
	require.NoError(t, c.DeleteServiceAccount(ctx, project, account.ID))
}

// operations maps each call's name in limits and metrics to its operation in OpenAI's
// document.
var operations = map[string]string{
	"create_service_account":         "POST /organization/projects/{project_id}/service_accounts",
	"delete_service_account":         "DELETE /organization/projects/{project_id}/service_accounts/{service_account_id}",
	"get_service_account":            "GET /organization/projects/{project_id}/service_accounts/{service_account_id}",
	"list_service_accounts":          "GET /organization/projects/{project_id}/service_accounts",
	"create_key":                     "POST /organization/projects/{project_id}/service_accounts/{service_account_id}/api_keys",
	"get_key":                        "GET /organization/projects/{project_id}/api_keys/{api_key_id}",
	"list_keys":                      "GET /organization/projects/{project_id}/api_keys",
	"update_key":                     "POST /organization/projects/{project_id}/api_keys/{api_key_id}",
	"delete_key":                     "DELETE /organization/projects/{project_id}/api_keys/{api_key_id}",
	"create_admin_key":               "POST /organization/admin_api_keys",
	"get_admin_key":                  "GET /organization/admin_api_keys/{key_id}",
	"list_admin_keys":                "GET /organization/admin_api_keys",
	"delete_admin_key":               "DELETE /organization/admin_api_keys/{key_id}",
	"get_project":                    "GET /organization/projects/{project_id}",
	"list_projects":                  "GET /organization/projects",
	"get_costs":                      "GET /organization/costs",
	"get_usage_completions":          "GET /organization/usage/completions",
	"get_usage_embeddings":           "GET /organization/usage/embeddings",
	"get_usage_images":               "GET /organization/usage/images",
	"get_usage_audio_speeches":       "GET /organization/usage/audio_speeches",
	"get_usage_audio_transcriptions": "GET /organization/usage/audio_transcriptions",
	"get_usage_moderations":          "GET /organization/usage/moderations",
	"get_spend_limit":                "GET /organization/projects/{project_id}/spend_limit",
	"get_model_permissions":          "GET /organization/projects/{project_id}/model_permissions",
	"list_rate_limits":               "GET /organization/projects/{project_id}/rate_limits",
	"probe_key":                      "GET /models",
}

// seen records the names of the calls.
type seen struct {
	mu    sync.Mutex
	names map[string]bool
}

func (s *seen) Began(call string, _ time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[call] = true
}
func (*seen) Ended(string, int, time.Duration) {}
func (*seen) Throttled(string, bool)           {}
func (*seen) Repeated(string)                  {}

// reports collects the errors of a validation.
type reports struct {
	testing.TB
	mu  sync.Mutex
	all []string
}

func (r *reports) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, fmt.Sprintf(format, args...))
}

// A validator that finds nothing proves nothing, so the test also validates the calls
// against documents that each query, body, and response violates.
func TestClient_CallsMatchTheDocument(t *testing.T) {
	if os.Getenv(openaitest.SpecEnv) == "" {
		t.Skip("not tested: the client's calls against OpenAI's document; set " + openaitest.SpecEnv)
	}
	for name, test := range map[string]struct {
		fault openaitest.SpecFault
		said  string // the error of each affected operation
	}{
		"no change":                {openaitest.SpecAsItIs, ""},
		"required query parameter": {openaitest.SpecQuery, "the request was accepted"},
		"required body field":      {openaitest.SpecBody, "the request was accepted"},
		"required response field":  {openaitest.SpecAnswer, "answer 200"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := openaitest.Start(t, openaitest.Options{})
			found := &reports{TB: t}
			concerned := sim.ValidateFalsified(found, test.fault)
			_, key := sim.AdminKey()
			made := &seen{names: map[string]bool{}}
			c, err := client.New(client.Options{AdminKey: client.NewSecret(key), BaseURL: sim.URL(), Observer: made})
			require.NoError(t, err)
			defer c.Close()
			calls(t, sim, c)
			require.Len(t, made.names, len(operations))

			found.mu.Lock()
			defer found.mu.Unlock()
			if test.fault == openaitest.SpecAsItIs {
				require.Empty(t, found.all)
				return
			}
			bodies := 0
			for call, operation := range operations {
				require.True(t, made.names[call], call)
				if !slices.Contains(concerned, operation) {
					require.Equal(t, openaitest.SpecBody, test.fault, operation)
					continue
				}
				bodies++
				require.True(t, slices.ContainsFunc(found.all, func(report string) bool {
					return strings.Contains(report, ": "+operation+": "+test.said)
				}), "no error for %s: %q", operation, found.all)
			}
			if test.fault == openaitest.SpecBody {
				require.Equal(t, 4, bodies, "calls with a body: three that create and one that updates")
			}
		})
	}
}

// A new client call must be added to calls and operations.
func TestClient_AllCallsAreValidated(t *testing.T) {
	known := []string{
		"CreateServiceAccount", "DeleteServiceAccount", "GetServiceAccount", "ListServiceAccounts",
		"CreateServiceAccountKey", "GetProjectKey", "ListProjectKeys", "UpdateProjectKey", "DeleteProjectKey",
		"CreateAdminKey", "GetAdminKey", "ListAdminKeys", "DeleteAdminKey", "GetProject", "ListProjects", "Probe",
		"EachCost", "EachUsage",
		"GetSpendLimit", "GetModelPermissions", "ListRateLimits",
		// These use the calls above, or make none.
		"EachServiceAccount", "EachProjectKey", "CheckWrite", "Close", "CreateRate", "ForgetRate", "Host", "Now", "NowOr", "NotAfter", "Outlives",
	}
	all := reflect.TypeFor[*client.Client]()
	for i := range all.NumMethod() {
		require.Contains(t, known, all.Method(i).Name)
	}
	require.Equal(t, len(known), all.NumMethod())
	require.Len(t, operations, 20+len(client.UsageKinds))
}
