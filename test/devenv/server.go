package devenv

// The kind of a server: Vault, which is built here, or OpenBao, which a user brings with
// VAULT_BIN.

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
)

// Product is what a server calls itself.
type Product string

// The products that the engine runs on.
const (
	HashiCorpVault Product = "Vault"
	OpenBao        Product = "OpenBao"
)

// CLI is the name of the product's command.
func (p Product) CLI() string {
	if p == OpenBao {
		return "bao"
	}
	return "vault"
}

// Feature is something that tests use and that not every server has.
type Feature string

// What OpenBao lacks, by measurement (docs/openbao.md).
const (
	ContainerPlugins Feature = "plugin runtimes and containers"
	RegisterEnvFlag  Feature = "plugin register -env"
	PluginPins       Feature = "plugin pins"
	Mlock            Feature = "mlock"
	HashedAuditTimes Feature = "hashed times in the audit log"
	// RunningSHA256 is running_sha256 in the mount table after a reload that has failed
	// and one that has not.
	RunningSHA256 Feature = "running_sha256 after a failed reload"
)

var lacking = map[Product][]Feature{
	OpenBao: {ContainerPlugins, RegisterEnvFlag, PluginPins, Mlock, HashedAuditTimes, RunningSHA256},
}

// Lacks reports whether the product does not have a feature.
func (p Product) Lacks(f Feature) bool {
	for _, feature := range lacking[p] {
		if feature == f {
			return true
		}
	}
	return false
}

// versionLine is what a server's command says of itself: the product, and its version.
var versionLine = regexp.MustCompile(`(?m)^(Vault|OpenBao) v([0-9][0-9A-Za-z.+-]*)`)

// parseVersion reads the version line of a server.
func parseVersion(said string) (product Product, version string, err error) {
	found := versionLine.FindStringSubmatch(said)
	if found == nil {
		return "", "", fmt.Errorf("it does not answer as Vault or OpenBao: %.200q", said)
	}
	return Product(found[1]), found[2], nil
}

// identify asks a server's command what it is. The environment is empty because the
// command reads settings from it.
func identify(ctx context.Context, bin string) (Product, string, error) {
	cmd := exec.CommandContext(ctx, bin, "version")
	cmd.Env = serverEnv(nil)
	out, err := cmd.Output()
	if err != nil {
		return "", "", fmt.Errorf("asking %s for its version: %w", bin, err)
	}
	product, version, err := parseVersion(string(out))
	if err != nil {
		return "", "", fmt.Errorf("asking %s for its version: %w", bin, err)
	}
	return product, version, nil
}

// configFor is what the configuration of a product has besides what all have.
func (p Product) configFor(mlock bool) string {
	if p == OpenBao { // without mlock, and with audit devices in its configuration
		return "unsafe_allow_api_audit_creation = true\n"
	}
	return fmt.Sprintf("disable_mlock    = %t\n", !mlock)
}
