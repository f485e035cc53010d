package openaisecrets

// Vault's conventions for every path.

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestPaths_FollowVaultsConventions(t *testing.T) {
	t.Parallel()
	b := newBackend()
	for _, p := range b.Paths {
		t.Run(p.Pattern, func(t *testing.T) {
			require.NotEmpty(t, p.HelpSynopsis)
			require.NotEmpty(t, p.HelpDescription)
			require.NotNil(t, p.DisplayAttrs)
			require.Equal(t, "openai", p.DisplayAttrs.OperationPrefix)
			require.NotEmpty(t, p.DisplayAttrs.OperationSuffix)
			require.NotEmpty(t, p.Operations)
			for name, field := range p.Fields {
				require.NotEmpty(t, field.Description, name)
				if !strings.Contains(p.Pattern, "(?P<"+name+">") {
					require.NotNil(t, field.DisplayAttrs, name)
				}
			}
			if key, ok := p.Fields["admin_api_key"]; ok {
				require.True(t, key.DisplayAttrs.Sensitive)
			}
			for op, handler := range p.Operations {
				props := handler.Properties()
				require.NotEmpty(t, props.Summary, op)
				require.NotEmpty(t, props.Responses, op)
				for _, responses := range props.Responses {
					for _, response := range responses {
						require.NotEmpty(t, response.Description)
						for name, field := range response.Fields {
							require.NotEmpty(t, field.Description, name)
						}
					}
				}
				switch op { //nolint:exhaustive // no rule for the others
				case logical.CreateOperation:
					require.NotNil(t, p.ExistenceCheck, "Vault panics without it")
					require.True(t, props.ForwardPerformanceStandby)
				case logical.UpdateOperation, logical.DeleteOperation:
					require.True(t, props.ForwardPerformanceStandby)
				case logical.ListOperation:
					require.True(t, strings.HasSuffix(p.Pattern, "/?$"), "a list works with and without slash")
				}
			}
		})
	}
	require.Equal(t, []string{"config", "static-role/"}, b.PathsSpecial.SealWrapStorage)
	require.Equal(t, []string{framework.WALPrefix, usageStoragePrefix, verdictStoragePrefix, stateStoragePrefix}, b.PathsSpecial.LocalStorage)
	require.Equal(t, version, b.RunningVersion)
}

func TestPaths_HelpTexts(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	for _, at := range []string{"", "config", "config/rotate", "rotate-root", "roles", "roles/app", "creds/app", "static-roles", "static-roles/app", "static-creds/app", "rotate-role/app", "projects", "tidy", "tidy-status", "tidy-cancel", "metrics"} {
		resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Path: at, Storage: h.storage})
		require.NoError(t, err, at)
		require.NotEmpty(t, resp.Data["help"], at)
		require.NotNil(t, resp.Data["openapi"], at)
	}
}

func TestFactory_WorksDuringRegistration(t *testing.T) {
	t.Parallel()
	// Vault starts the plugin at registration without working storage and system view.
	b, err := Factory(context.Background(), &logical.BackendConfig{})
	require.NoError(t, err)
	require.Equal(t, logical.TypeLogical, b.Type())
	require.Regexp(t, `^v\d+\.\d+\.\d+`, b.(*backend).RunningVersion)
	b.Cleanup(context.Background())
}

func TestUserAgent_ContainsPluginAndVaultVersion(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	requests := h.sim.Requests()
	require.NotEmpty(t, requests)
	for _, r := range requests {
		require.Contains(t, r.UserAgent, PluginName+"/"+strings.TrimPrefix(version, "v"))
		require.Contains(t, r.UserAgent, "Vault/1.21.2")
	}
	require.True(t, slices.IsSortedFunc(requests, func(a, b openaitest.Request) int { return a.At.Compare(b.At) }))
}
