// Command vault-plugin-secrets-openai is the OpenAI secrets engine as a Vault plugin. Vault
// starts it; with -version it prints its version.
package main

import (
	"fmt"
	"math"
	"os"
	"slices"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	backend "github.com/hashicorp/vault/sdk/plugin"
	"google.golang.org/grpc"

	// Public CA roots for systems without any, such as an image FROM scratch. The roots of
	// the system or of SSL_CERT_FILE take precedence.
	_ "golang.org/x/crypto/x509roots/fallback"

	openaisecrets "vault-plugin-secrets-openai"
	"vault-plugin-secrets-openai/internal/parent"
)

func main() {
	if slices.ContainsFunc(os.Args[1:], func(a string) bool { return a == "-version" || a == "--version" }) {
		fmt.Println(openaisecrets.PluginName, openaisecrets.Version())
		return
	}
	if err := serve(os.Args[1:]); err != nil {
		hclog.New(&hclog.LoggerOptions{JSONFormat: true}).Error("plugin stopped", "error", err)
		os.Exit(1)
	}
}

// serve runs the plugin until Vault stops it. The TLS provider is for Vault servers without
// automatic mutual TLS.
func serve(args []string) error {
	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(args); err != nil {
		return err
	}
	if err := mayLockMemory(); err != nil {
		return fmt.Errorf("raising cap_ipc_lock: %w", err)
	}
	if err := pluginutil.OptionallyEnableMlock(); err != nil {
		return err
	}
	// The end of the server needs no cleanup: operations in progress have WAL entries.
	connections := parent.Watch(func() { os.Exit(0) })
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, JSONFormat: true})
	served := func(multiplexed bool) plugin.PluginSet {
		return plugin.PluginSet{backend.BackendPluginName: &backend.GRPCBackendPlugin{
			Factory: openaisecrets.Factory, MultiplexingSupport: multiplexed, Logger: log,
		}}
	}
	// Like the SDK's ServeMultiplex, which accepts no stats handler.
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig:  backend.HandshakeConfig,
		VersionedPlugins: map[int]plugin.PluginSet{3: served(false), 4: served(false), 5: served(true)},
		TLSProvider:      api.VaultPluginTLSProvider(meta.GetTLSConfig()),
		Logger:           log,
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return plugin.DefaultGRPCServer(append(opts, grpc.MaxRecvMsgSize(math.MaxInt32), grpc.MaxSendMsgSize(math.MaxInt32), grpc.StatsHandler(connections)))
		},
	})
	return nil
}
