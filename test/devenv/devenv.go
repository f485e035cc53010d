// Package devenv starts the real things that this engine runs among: a Vault
// server from a real configuration file, with the plugin built from this
// checkout and registered by its SHA-256 and version. The integration tests,
// the demo and the development environment share it.
//
// What must stay true: everything is on loopback and in one temporary folder;
// every wait is bounded; every process is stopped by the id under which it was
// started, never by name; and after Stop nothing is left, neither process nor
// file. Nothing of the caller's environment that could point Vault or the
// plugin at a real server reaches them.
package devenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// PluginName is the name of the plugin: its binary's, its catalog entry's and
// its command package's.
const PluginName = "vault-plugin-secrets-openai"

// IsolateEnv removes the variables from this process's environment that Vault's API client
// and OpenAI's SDK read. Programs that use this package call it first. Otherwise every
// request of a test would carry VAULT_TOKEN or VAULT_NAMESPACE of the developer's own
// Vault. The variables that choose the server for the tests stay.
func IsolateEnv() {
	for _, entry := range os.Environ() {
		name, _, _ := strings.Cut(entry, "=")
		if isClientSetting(name) && name != "VAULT_BIN" && name != "VAULT_VERSION" {
			_ = os.Unsetenv(name)
		}
	}
}

func isClientSetting(name string) bool {
	return strings.HasPrefix(name, "OPENAI_") || strings.HasPrefix(name, "VAULT_") || strings.HasPrefix(name, "BAO_")
}

// serverEnv is what a Vault server is started with. Vault hands its environment
// on to the plugins, so this decides what they see too; proxies go for the same
// reason as the client settings.
func serverEnv(extra []string) []string {
	var env []string
	for _, entry := range os.Environ() {
		name, _, _ := strings.Cut(entry, "=")
		if !isClientSetting(name) && !strings.HasSuffix(strings.ToUpper(name), "_PROXY") {
			env = append(env, entry)
		}
	}
	return append(env, extra...)
}

// Root is the folder of this checkout, wherever in it the program runs.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if content, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && bytes.HasPrefix(content, []byte("module "+PluginName+"\n")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not inside a checkout of " + PluginName)
		}
	}
}

// FindVault returns the path of a Vault server, building one if the machine has
// none; the rules are scripts/vault.sh's, which tells its progress on stderr.
func FindVault(ctx context.Context) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "scripts", "vault.sh"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("finding a Vault server: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
