package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "vault-plugin-secrets-openai"

// The broker holds keys, so it may link only these modules: vault/api with its
// dependencies, x/sys, and the public CA certificates.
var allowed = []string{
	"github.com/hashicorp/vault/api",
	"golang.org/x/sys",
	"golang.org/x/crypto/x509roots/fallback",

	"github.com/cenkalti/backoff/v4",
	"github.com/go-jose/go-jose/v4",
	"github.com/hashicorp/errwrap",
	"github.com/hashicorp/go-cleanhttp",
	"github.com/hashicorp/go-multierror",
	"github.com/hashicorp/go-retryablehttp",
	"github.com/hashicorp/go-rootcerts",
	"github.com/hashicorp/go-secure-stdlib/parseutil",
	"github.com/hashicorp/go-secure-stdlib/strutil",
	"github.com/hashicorp/go-sockaddr",
	"github.com/hashicorp/hcl",
	"github.com/mitchellh/go-homedir",
	"github.com/mitchellh/mapstructure",
	"github.com/ryanuber/go-glob",
	"golang.org/x/net",
	"golang.org/x/text",
	"golang.org/x/time",
}

func TestDependencies_NothingElseIsLinked(t *testing.T) {
	t.Parallel()
	linked, ours := map[string]bool{}, map[string]bool{}
	for _, goos := range []string{"linux", "darwin"} {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}} {{.ImportPath}}", ".")
		cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH=amd64", "CGO_ENABLED=0")
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		require.NoError(t, err)
		for line := range strings.Lines(string(out)) {
			switch of, pkg, _ := strings.Cut(strings.TrimSpace(line), " "); {
			case of == module:
				ours[pkg] = true
			case pkg != "" && of != "":
				linked[of] = true
			}
		}
	}
	for of := range linked {
		require.Contains(t, allowed, of)
	}
	for _, of := range allowed {
		require.Contains(t, linked, of, "it is not linked any more")
	}
	require.Equal(t, map[string]bool{module + "/broker": true, module + "/cmd/openai-broker": true}, ours, "the broker knows nothing of the engine")
}
