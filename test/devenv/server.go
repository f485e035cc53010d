package devenv

// The product of a server: Vault, which scripts/vault.sh can build, or OpenBao, which a
// user provides with VAULT_BIN.

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
)

// Product is a product's name in the output of its version command.
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

// Feature is a feature that tests use and that not every product has.
type Feature string

// Features that OpenBao lacks, as measured (docs/openbao.md).
const (
	ContainerPlugins Feature = "plugin runtimes and containers"
	RegisterEnvFlag  Feature = "plugin register -env"
	PluginPins       Feature = "plugin pins"
	Mlock            Feature = "mlock"
	HashedAuditTimes Feature = "hashed times in the audit log"
	// RunningSHA256 is running_sha256 in the mount table after a failed and after a
	// successful reload.
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

// versionLine matches the product and the version in the output of the version command.
var versionLine = regexp.MustCompile(`(?m)^(Vault|OpenBao) v([0-9][0-9A-Za-z.+-]*)`)

// parseVersion parses the output of the version command.
func parseVersion(said string) (product Product, version string, err error) {
	found := versionLine.FindStringSubmatch(said)
	if found == nil {
		return "", "", fmt.Errorf("the output is not that of Vault or OpenBao: %.200q", said)
	}
	return Product(found[1]), found[2], nil
}

// identify returns the product and version of a server binary. It clears client settings
// from the environment, because the command reads them.
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

// configFor returns the settings that only this product has.
func (p Product) configFor(mlock bool) string {
	if p == OpenBao { // has no mlock, and by default rejects audit devices over the API
		return "unsafe_allow_api_audit_creation = true\n"
	}
	return fmt.Sprintf("disable_mlock    = %t\n", !mlock)
}
