// Command vault-plugin-secrets-openai is the OpenAI secrets engine as a Vault
// plugin. Vault starts it; run by hand it only tells its version.
package main

import (
	"fmt"
	"os"
	"slices"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	// Public CA roots for where the system has none, as in an image FROM
	// scratch. Wherever it has some, those of SSL_CERT_FILE included, they rule.
	_ "golang.org/x/crypto/x509roots/fallback"

	openaisecrets "vault-plugin-secrets-openai"
)

func main() {
	if slices.ContainsFunc(os.Args[1:], func(a string) bool { return a == "-version" || a == "--version" }) {
		fmt.Println(openaisecrets.PluginName, openaisecrets.Version())
		return
	}
	if err := serve(os.Args[1:]); err != nil {
		hclog.New(&hclog.LoggerOptions{JSONFormat: true}).Error("plugin ends", "error", err)
		os.Exit(1)
	}
}

// serve runs the plugin until Vault ends it. The TLS provider serves Vault
// servers that do not do mutual TLS by themselves.
func serve(args []string) error {
	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(args); err != nil {
		return err
	}
	if err := mayLockMemory(); err != nil {
		return fmt.Errorf("raising cap_ipc_lock: %w", err)
	}
	return plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: openaisecrets.Factory,
		TLSProviderFunc:    api.VaultPluginTLSProvider(meta.GetTLSConfig()),
	})
}
