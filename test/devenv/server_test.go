package devenv

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseVersion(t *testing.T) {
	t.Parallel()
	for said, want := range map[string]struct {
		product Product
		version string
	}{
		"Vault v1.21.2 (7b9ddea3e3d2b1e9d0fd1d3c4f5ebd2ac9c3cf5c), built 2025-12-17T18:20:25Z\n": {HashiCorpVault, "1.21.2"},
		"Vault v1.19.4\n": {HashiCorpVault, "1.19.4"},
		"Vault v1.20.1+ent.hsm (abc), built 2025-07-01T00:00:00Z\n":                               {HashiCorpVault, "1.20.1+ent.hsm"},
		"OpenBao v2.6.2 (5a90d0b9b6d5e0b3ac2ba2ae4bb4e3b1cf0c2d11), built 2026-08-18T09:00:00Z\n": {OpenBao, "2.6.2"},
		"OpenBao v2.7.0-beta20260909 (abc), built 2026-09-09T00:00:00Z\n":                         {OpenBao, "2.7.0-beta20260909"},
		"a notice comes first\nOpenBao v2.6.2\n":                                                  {OpenBao, "2.6.2"},
	} {
		product, version, err := parseVersion(said)
		require.NoError(t, err, said)
		require.Equal(t, want.product, product, said)
		require.Equal(t, want.version, version, said)
	}
	for _, said := range []string{"", "vault 1.21.2", "Consul v1.20.0", "Vaulted v1.0.0", "OpenBao"} {
		_, _, err := parseVersion(said)
		require.Error(t, err, said)
	}
}

func TestAServerIsAskedForItsVersion(t *testing.T) {
	t.Setenv("BAO_ADDR", "of-the-caller")
	dir := t.TempDir()
	bao := filepath.Join(dir, "anything")
	require.NoError(t, os.WriteFile(bao, []byte("#!/bin/sh\n[ \"$1\" = version ] && [ -z \"$BAO_ADDR\" ] && echo 'OpenBao v2.6.2 (abc), built today'\n"), 0o700))
	product, version, err := identify(t.Context(), bao)
	require.NoError(t, err)
	require.Equal(t, []string{"OpenBao", "2.6.2", "bao"}, []string{string(product), version, product.CLI()})
	_, _, err = identify(t.Context(), filepath.Join(dir, "none"))
	require.Error(t, err)
	require.Equal(t, "vault", HashiCorpVault.CLI())
}

func TestOpenBaoLacksWhatItsTestsSkip(t *testing.T) {
	t.Parallel()
	for _, f := range []Feature{ContainerPlugins, RegisterEnvFlag, PluginPins, Mlock, HashedAuditTimes, RunningSHA256} {
		require.True(t, OpenBao.Lacks(f), f)
		require.False(t, HashiCorpVault.Lacks(f), f)
	}
}

func TestWriteConfig_ProductSettings(t *testing.T) {
	t.Parallel()
	for product, want := range map[Product]string{HashiCorpVault: "disable_mlock    = true", OpenBao: "unsafe_allow_api_audit_creation = true"} {
		v := &Vault{Dir: t.TempDir(), Product: product}
		require.NoError(t, v.writeConfig(t.Context(), "node1"))
		config, err := os.ReadFile(v.configPath())
		require.NoError(t, err)
		require.Contains(t, string(config), want)
		if product == OpenBao {
			require.NotContains(t, string(config), "mlock")
		}
	}
}
