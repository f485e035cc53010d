// Command null is the benchmark's floor: a secrets engine that does nothing, so
// that its cost is that of Vault and the plugin protocol.
//
// What must stay true: it is served as the real engine is (multiplexed, with the
// same SDK), under the same paths; its lease has the same options and is of the
// same size, since Vault's work depends on both; it makes no calls and stores
// nothing.
package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

const (
	secretType = "openai_api_key" // #nosec G101 -- a type's name

	ttl, maxTTL = time.Hour, 24 * time.Hour // the defaults of a role
)

func main() {
	if slices.Contains(os.Args[1:], "-version") {
		fmt.Println("vault-plugin-secrets-null v0.0.1")
		return
	}
	if err := serve(os.Args[1:]); err != nil {
		hclog.New(&hclog.LoggerOptions{JSONFormat: true}).Error("plugin stopped", "error", err)
		os.Exit(1)
	}
}

func serve(args []string) error {
	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(args); err != nil {
		return err
	}
	return plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: factory,
		TLSProviderFunc:    api.VaultPluginTLSProvider(meta.GetTLSConfig()),
	})
}

type backend struct{ *framework.Backend }

func factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := &backend{}
	name := map[string]*framework.FieldSchema{"name": {Type: framework.TypeString, Description: "Any name."}}
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: "v0.0.1",
		Help:           "Returns a constant with a lease, as the floor of the benchmark.",
		Paths: []*framework.Path{
			{
				Pattern: "creds/" + framework.GenericNameRegex("name"),
				Fields:  name,
				Operations: map[logical.Operation]framework.OperationHandler{
					logical.ReadOperation:   &framework.PathOperation{Callback: b.creds, ForwardPerformanceStandby: true},
					logical.UpdateOperation: &framework.PathOperation{Callback: b.creds, ForwardPerformanceStandby: true},
				},
			},
			{
				Pattern:    "static-creds/" + framework.GenericNameRegex("name"),
				Fields:     name,
				Operations: map[logical.Operation]framework.OperationHandler{logical.ReadOperation: &framework.PathOperation{Callback: staticCreds}},
			},
		},
		Secrets: []*framework.Secret{{
			Type:   secretType,
			Fields: map[string]*framework.FieldSchema{"api_key": {Type: framework.TypeString}},
			Renew: func(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
				return &logical.Response{Secret: req.Secret, Data: req.Data}, nil // as the engine does: Vault stores the lease again
			},
			Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
				return nil, nil //nolint:nilnil // the framework's "done"
			},
		}},
	}
	return b, b.Setup(ctx, conf)
}

// The engine returns values of these lengths for a role with a short name.
var (
	key     = "sk-svcacct-" + strings.Repeat("k", 140)
	keyID   = "key_" + strings.Repeat("i", 24)
	account = "user-" + strings.Repeat("a", 24)
	project = "proj_" + strings.Repeat("p", 24)
	name    = "vault-app-" + strings.Repeat("n", 15)
)

const expires = "2030-01-02T03:04:05Z"

func (b *backend) creds(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
	resp := b.Secret(secretType).Response(map[string]any{
		"api_key": key, "api_key_id": keyID, "service_account": name, "service_account_id": account,
		"project_id": project, "expires_at": expires,
	}, map[string]any{
		"version": 1, "credential_type": "service_account", "project_id": project, "service_account": name,
		"service_account_id": account, "api_key_id": keyID, "role": "app", "max_ttl": int64(maxTTL),
		"key_expiry": "max_ttl", "key_expires_at": expires,
	})
	resp.Secret.TTL, resp.Secret.MaxTTL, resp.Secret.Renewable = ttl, maxTTL, true
	return resp, nil
}

func staticCreds(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
	return &logical.Response{Data: map[string]any{
		"api_key": key, "api_key_id": keyID, "service_account": name, "service_account_id": account,
		"project_id": project, "expires_at": expires, "ttl": 86400, "last_vault_rotation": expires, "rotation_period": 86400,
	}}, nil
}
