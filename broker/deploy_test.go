package broker

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Every configuration under deploy/broker is valid.
func TestDeploy_TheConfigurationsAreValid(t *testing.T) {
	manifest, err := os.ReadFile("../deploy/broker/kubernetes.yaml")
	require.NoError(t, err)
	_, block, found := strings.Cut(string(manifest), "broker.json: |\n")
	require.True(t, found)
	block, _, _ = strings.Cut(block, "---\n")
	inPod := filepath.Join(t.TempDir(), "broker.json")
	require.NoError(t, os.WriteFile(inPod, []byte(block), 0o600))
	for file, manager := range map[string]string{
		"../deploy/broker/broker.json":         "../deploy/broker/openai-broker.service",
		"../deploy/broker/compose-broker.json": "../deploy/broker/compose.yaml",
		inPod:                                  "../deploy/broker/kubernetes.yaml",
	} {
		config, err := Load(file)
		require.NoError(t, err, file)
		require.NoError(t, config.validate(), file)
		content, err := os.ReadFile(manager)
		require.NoError(t, err)
		given := regexp.MustCompile(`(?m)^\s*(?:TimeoutStopSec=|stop_grace_period: |terminationGracePeriodSeconds: )(\d+)`).FindSubmatch(content)
		require.NotNil(t, given, manager)
		seconds, err := strconv.Atoi(string(given[1]))
		require.NoError(t, err)
		require.GreaterOrEqual(t, time.Duration(seconds)*time.Second, time.Duration(config.Drain)+lastAnswers+closeTimeout, manager)
	}
}

func TestConfig_TextAfterTheObjectIsAnError(t *testing.T) {
	file := filepath.Join(t.TempDir(), "broker.json")
	require.NoError(t, os.WriteFile(file, []byte(`{"agents":[]} {}`), 0o600))
	_, err := Load(file)
	require.ErrorContains(t, err, "text after the JSON object")
	require.NoError(t, os.WriteFile(file, []byte(`{"drain":"soon"}`), 0o600))
	_, err = Load(file)
	require.Error(t, err)
}
