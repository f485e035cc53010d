// Command plugin is the probe as a Vault plugin. The folder PROBE_DIR has what it
// records, how it is to behave, and its process ID.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/plugin"

	"vault-plugin-secrets-openai/test/simulation/probe"
)

func main() {
	if slices.Contains(os.Args[1:], "-version") {
		fmt.Println("vault-plugin-secrets-probe v0.0.1")
		return
	}
	if err := serve(os.Args[1:]); err != nil {
		hclog.New(&hclog.LoggerOptions{JSONFormat: true}).Error("plugin stopped", "error", err)
		os.Exit(1)
	}
}

// die ends the process. Its connections end before it does: a Vault that hears of the
// process's end first sends the request again, and which is first would be chance.
func die() {
	for fd := range 256 {
		_ = syscall.Shutdown(fd, syscall.SHUT_RDWR) // what is no socket refuses
	}
	time.Sleep(300 * time.Millisecond)
	os.Exit(1)
}

func serve(args []string) error {
	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(args); err != nil {
		return err
	}
	dir := os.Getenv("PROBE_DIR")
	options := probe.Options{
		Record: func(string) {},
		Control: func() string {
			how, _ := os.ReadFile(filepath.Join(dir, "how")) // there is none until it is told
			return string(how)
		},
		Die: die,
	}
	if !pluginutil.InMetadataMode() { // in it Vault only looks at the plugin
		calls, err := os.OpenFile(filepath.Join(dir, "calls"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		options.Record = func(call string) { _, _ = calls.WriteString(call + "\n") } // what is missing, the story shows
		if err := os.WriteFile(filepath.Join(dir, "pid"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
			return err
		}
	}
	return plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: options.Factory,
		TLSProviderFunc:    api.VaultPluginTLSProvider(meta.GetTLSConfig()),
	})
}
