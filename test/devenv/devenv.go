// Package devenv starts a real Vault server from a configuration file, with the
// plugin built from this checkout and registered by its SHA-256 and version. The
// integration tests, the demo, the development environment and the benchmark
// share it.
//
// What must stay true: everything is on loopback and in one temporary folder;
// every wait is bounded; every process is stopped by its process ID, never by
// name; Stop leaves neither processes nor files. Vault and the plugin do not
// inherit variables that could point them at a real server.
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

// PluginName is the name of the plugin's binary, of its catalog entry and of its
// command package.
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

// serverEnv returns the environment of a Vault server, which passes it on to its
// plugins. It omits proxy settings for the same reason as client settings.
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

// Root returns the root folder of this checkout, from any folder in it.
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

// FindVault returns the path of a Vault server, and builds one if the machine has
// none. It runs scripts/vault.sh, which prints its progress on stderr.
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
