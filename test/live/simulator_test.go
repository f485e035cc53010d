package live

// Tests of the live tests: they run against the simulator, whose answers are known
// and which fails a test that leaves an object behind.

import (
	"context"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
)

func against(sim *openaitest.Server) Config {
	_, key := sim.AdminKey()
	return Config{
		BaseURL: sim.URL(), AdminKey: client.NewSecret(key), Project: sim.AddProject("live"),
		Expiry: 2 * time.Second, Pause: 20 * time.Millisecond, Patience: 3 * time.Second,
	}
}

func TestRun_FindsWhatTheSimulatorDoes(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{ActivationDelay: 300 * time.Millisecond, AdminActivationDelay: 100 * time.Millisecond})
	cfg := against(sim)
	_, reader := sim.AddAdminKey("reader", openaitest.ReadOnly())
	cfg.ReadOnlyKey = client.NewSecret(reader)

	report, err := Run(t.Context(), cfg)
	require.NoError(t, err)
	text := report.String()
	t.Log("\n" + text)
	assert.Empty(t, report.Differences(), "the engine's assumptions differ from the simulator")
	for _, part := range []string{
		"| 2 | A service account's key can be deleted alone | as assumed | accepted |",
		"| 8 | A key for a year and a second | learned | 400, error is an object",
		"| 3 | A key of 2s stops working at its expires_at, give or take a minute | as assumed | yes, ",
		"| 1 | Permissions are judged before existence",
		"a bare string",
	} {
		assert.Contains(t, text, part)
	}
	for _, secret := range []string{cfg.AdminKey.Reveal(), cfg.Project, sim.OrganizationID()} {
		assert.NotContains(t, text, secret)
	}
	assert.NotRegexp(t, `sk-[a-z]+-`, text)
	assert.NotContains(t, text, "could not")
}

func TestRun_NoticesWhatDiffers(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{DeleteServiceAccountKeyRefused: true})
	report, err := Run(t.Context(), against(sim))
	require.NoError(t, err)
	var about []string
	for _, f := range report.Differences() {
		about = append(about, f.About)
	}
	assert.Contains(t, about, "A service account's key can be deleted alone")
}

func TestRun_CleansUpHoweverItEnds(t *testing.T) {
	t.Parallel()
	for _, requests := range []int{12, 20, 60, 90} {
		sim := openaitest.Start(t, openaitest.Options{}) // fails the test if an object is left
		ctx, interrupt := context.WithCancel(t.Context())
		go func() {
			for len(sim.Requests()) < requests {
				time.Sleep(time.Millisecond)
			}
			interrupt()
		}()
		report, err := Run(ctx, against(sim))
		require.ErrorContains(t, err, "cut short", "after %d requests", requests)
		assert.Contains(t, report.String(), "| calls made |")
	}
}

// A create that is aborted in progress takes effect afterward.
func TestRun_DeletesObjectsCreatedAfterInterrupt(t *testing.T) {
	t.Parallel()
	for _, route := range []string{"/organization/projects/{project_id}/service_accounts", "/organization/admin_api_keys"} {
		sim := openaitest.Start(t, openaitest.Options{}) // fails the test if an object is left
		sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: route, Kind: openaitest.FaultSlow, Delay: time.Second, Times: 1})
		ctx, interrupt := context.WithCancel(t.Context())
		go func() {
			for !slices.ContainsFunc(sim.Requests(), func(r openaitest.Request) bool { return r.Method == http.MethodPost && r.Route == route }) {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(100 * time.Millisecond)
			interrupt()
		}()
		_, err := Run(ctx, against(sim))
		require.ErrorContains(t, err, "cut short", route)
	}
}

func TestRun_FindsWhatALostAnswerMade(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/projects/{project_id}/service_accounts", Kind: openaitest.FaultLost, Times: 1})
	_, err := Run(t.Context(), against(sim))
	require.NoError(t, err)
}

func TestRun_CleansUpAfterARunThatWasKilled(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	cfg := against(sim)
	admin, err := client.New(client.Options{AdminKey: cfg.AdminKey, BaseURL: sim.URL()})
	require.NoError(t, err)
	defer admin.Close()
	for name, stays := range map[string]bool{
		"vault-live-sobzz0-abcd-Az09 ._@-1xxx":   false, // of a run in 2024
		"vault-live-sobzz0-abcd-key12":           false,
		"vault-live-zzzzzz-abcd-key12":           true, // of a run whose clock is ahead
		"vault-live-prod-ab3defghij4klmn":        true, // of the engine, for roles named live-…
		"vault-live-stable-east-ab3defghij4klmn": true,
		"vault-live-":                            true,
		"somebody's":                             true,
	} {
		a, k, err := admin.CreateServiceAccount(t.Context(), cfg.Project, name, time.Hour)
		require.NoError(t, err)
		if stays {
			sim.Keep(a.ID, k.ID)
		}
	}
	_, err = Run(t.Context(), cfg)
	require.NoError(t, err)
	accounts, err := admin.ListServiceAccounts(t.Context(), cfg.Project)
	require.NoError(t, err)
	assert.Len(t, accounts, 5)
}

func TestRun_RefusesWhatItCannotUse(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	cfg := against(sim)
	cfg.Project = "proj_unknown"
	_, err := Run(t.Context(), cfg)
	require.Error(t, err)
	assert.NotContains(t, err.Error(), cfg.AdminKey.Reveal())

	cfg.BaseURL = "http://gateway.example.com/v1"
	_, err = Run(t.Context(), cfg)
	require.ErrorContains(t, err, "clear text")
}
