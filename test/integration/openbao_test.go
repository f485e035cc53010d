//go:build integration

package integration

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// standIn returns a Vault server that reports itself as OpenBao, also to its plugins.
// It shows that the suite and the engine recognize OpenBao, not that they work on it.
func standIn(t *testing.T) string {
	t.Helper()
	bin, err := devenv.FindVault(t.Context())
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "bao")
	script := fmt.Sprintf(`#!/bin/sh
case $1 in
version) echo "OpenBao v2.6.2 (stand-in), built 2026-08-18T09:00:00Z"; exit ;;
server) [ "$2" != -config ] || grep -q disable_mlock "$3" || echo "disable_mlock = true" >>"$3" ;; # Vault requires it
esac
BAO_VERSION=2.6.2 exec %q "$@"
`, bin)
	require.NoError(t, os.WriteFile(path, []byte(script), 0o700))
	return path
}

func TestOpenBaoIsRecognized(t *testing.T) {
	runParallel(t)
	if server.Product == devenv.OpenBao {
		t.Skipf("NOT TESTED: the stand-in is not needed on %s", server)
	}
	opts := serverOptions()
	opts.VaultBin = standIn(t)
	v, err := devenv.Start(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, v.Stop()) })
	v.WrapTransport = answers.record
	require.Equal(t, devenv.OpenBao, v.Product)
	require.NoError(t, v.Register(t.Context(), plugin))

	agents := make(chan string, 1000)
	sim := openaitest.Start(t, openaitest.Options{})
	sim.Fail(openaitest.Fault{Kind: openaitest.FaultSlow, OnStrike: func(r *http.Request) { agents <- r.UserAgent() }})
	m := mountPlugin(t, v, devenv.PluginName, sim)
	require.Contains(t, <-agents, " OpenBao/")
	_, err = m.client.Logical().ReadWithContext(t.Context(), m.path+"/creds/none")
	require.ErrorContains(t, err, fmt.Sprintf(`run "bao list %s/roles"`, m.path))
	require.Contains(t, m.cli("bao path-help "+m.path), "$ bao write openai/config")

	// In a possible namespace, a disable looks the same as a seal of the namespace.
	const path = "team/openai"
	require.NoError(t, m.client.Sys().MountWithContext(t.Context(), path, &api.MountInput{Type: devenv.PluginName}))
	inTeam := *m
	inTeam.path = path
	inTeam.write("config", m.adminConfig())
	inTeam.write("static-roles/batch", map[string]any{"project_id": m.project, "rotation_period": "24h"})
	key := inTeam.read("static-creds/batch").Data["api_key"].(string)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	require.NoError(t, m.client.Sys().UnmountWithContext(ctx, path))
	require.Equal(t, http.StatusOK, infer(t, sim, key), "the static role's key stays valid")
	require.Equal(t, 1, inTeam.inLog("static role keeps its credential", path))
	for _, a := range sim.Accounts() {
		sim.DeleteServiceAccount(m.project, a.ID)
	}
}
