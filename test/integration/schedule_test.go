//go:build integration

package integration

// Scheduled rotation of the admin key, by Vault's periodic call, which comes once
// a minute.

import (
	"encoding/json"
	"maps"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLong_TheAdminKeyIsRotatedOnScheduleOnCommunity(t *testing.T) {
	runParallel(t)
	for name, schedule := range map[string]map[string]any{
		"period": {"rotation_period": "50s"},
		"cron":   {"rotation_schedule": "* * * * *"},
	} {
		t.Run(name, func(t *testing.T) {
			config := map[string]any{"rotation_grace_period": "1s"}
			maps.Copy(config, schedule)
			m := newMount(t, config)
			m.role("r", "1h", "24h")
			before := m.read("config").Data
			require.Equal(t, "internal", before["rotation_manager"])
			require.NotEmpty(t, before["next_rotation"])
			require.Empty(t, before["last_rotated"])

			r := m.startReaders(2, 200*time.Millisecond, "r", m.client)
			began := time.Now()
			seen := []any{before["admin_api_key_id"]}
			for range 2 {
				require.Eventually(t, func() bool {
					return m.read("config").Data["admin_api_key_id"] != seen[len(seen)-1]
				}, 150*time.Second, 500*time.Millisecond, "no automatic rotation %d", len(seen))
				after := m.read("config").Data
				require.NotContains(t, seen, after["admin_api_key_id"])
				require.NotEmpty(t, after["last_rotated"])
				require.NotEmpty(t, after["admin_api_key_expires_at"])
				require.Empty(t, after["last_rotation_error"])
				t.Logf("rotated automatically %s after the config was written, next at %s", time.Since(began).Round(time.Second), after["next_rotation"])
				seen = append(seen, after["admin_api_key_id"])
				r.wait(t, 4, "after a rotation")
			}
			// Without a schedule, one key is left in the end.
			m.write("config", map[string]any{"rotation_period": 0, "rotation_schedule": ""})
			r.stop()
			t.Logf("%d reads meanwhile", r.answered.Load())
			require.Zero(t, r.failed.Load(), "%v", r.failuresSoFar())
			require.Eventually(t, func() bool {
				return m.read("config").Data["superseded_admin_keys"] == json.Number("0")
			}, 150*time.Second, 500*time.Millisecond, "superseded admin keys remain")
			require.Len(t, m.sim.AdminKeys(), 1)
		})
	}
}
