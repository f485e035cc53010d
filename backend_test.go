package openaisecrets

import (
	"testing"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/sysview"
)

func TestBackend_UsesTheCachedSystemView(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.IsType(t, &sysview.CachedView{}, h.b.System())
}
