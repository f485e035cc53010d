package metrics

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestConfigure_InvalidSettingsDisablePush(t *testing.T) {
	t.Parallel()
	m := New("finished")
	require.NoError(t, m.Configure(func(string) string { return "" }))
	require.Nil(t, m.push)
	err := m.Configure(func(name string) string {
		return map[string]string{EnvStatsd: "no address", EnvDogstatsd: "nor this", EnvMaxRoles: "many"}[name]
	})
	require.ErrorContains(t, err, EnvStatsd)
	require.ErrorContains(t, err, EnvDogstatsd)
	require.ErrorContains(t, err, EnvMaxRoles)
	require.Nil(t, m.push)
	require.Equal(t, DefaultMaxRoles, m.roleNames.limit)
}
