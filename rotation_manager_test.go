package openaisecrets

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/schedule"
)

// The errors of servers without a rotation manager, as a plugin receives them.
var (
	errCommunity     = status.Error(codes.Internal, "error registering rotation job: "+automatedrotationutil.ErrRotationManagerUnsupported.Error())
	errUnimplemented = status.Error(codes.Unimplemented, "unknown method RegisterRotationJob for service pb.SystemView")
	errManager       = status.Error(codes.Internal, "the rotation queue is full")
)

func TestSchedule_Rules(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	type fields = map[string]any
	for name, test := range map[string]struct {
		data fields
		said string
	}{
		"both":                           {fields{"rotation_period": "24h", "rotation_schedule": "0 2 * * *"}, "mutually exclusive"},
		"window with period":             {fields{"rotation_period": "24h", "rotation_window": "1h"}, "rotation_window does not apply to period"},
		"window without schedule":        {fields{"rotation_window": "1h"}, "without rotation_schedule"},
		"window with an empty schedule":  {fields{"rotation_window": "1h", "rotation_schedule": ""}, "rotation_window requires rotation_schedule"},
		"short window":                   {fields{"rotation_schedule": "0 2 * * *", "rotation_window": 3599}, "3600 seconds or more"},
		"negative window":                {fields{"rotation_schedule": "0 2 * * *", "rotation_window": -3600}, "rotation_window"},
		"huge window":                    {fields{"rotation_schedule": "0 2 * * *", "rotation_window": 1 << 32}, "rotation_window must be between"},
		"negative period":                {fields{"rotation_period": -1}, "rotation_period"},
		"negative period as text":        {fields{"rotation_period": "-24h"}, "rotation_period"},
		"short period":                   {fields{"rotation_period": 9}, "10s or more"},
		"huge period":                    {fields{"rotation_period": 1 << 32}, "rotation_period must be between"},
		"invalid period":                 {fields{"rotation_period": "often"}, "rotation_period"},
		"invalid schedule":               {fields{"rotation_schedule": "often"}, "rotation_schedule"},
		"seconds":                        {fields{"rotation_schedule": "0 0 2 * * *"}, "rotation_schedule"},
		"descriptor":                     {fields{"rotation_schedule": "@daily"}, "rotation_schedule"},
		"time zone":                      {fields{"rotation_schedule": "CRON_TZ=Asia/Tokyo 0 2 * * *"}, "must not contain a time zone"},
		"time zone that would panic":     {fields{"rotation_schedule": "TZ=UTC"}, "must not contain a time zone"},
		"schedule without an occurrence": {fields{"rotation_schedule": "0 0 31 2 *"}, "has no future occurrence"},
		"control character":              {fields{"rotation_schedule": "0 2 * *\n*"}, "control character"},
		"huge schedule":                  {fields{"rotation_schedule": strings.Repeat("0", 1<<20)}, "limit"},
		"field of Vault Enterprise 2.0":  {fields{"rotation_policy": "p"}, "unknown field"},
		"invalid boolean":                {fields{"disable_automated_rotation": "perhaps"}, "disable_automated_rotation"},
	} {
		t.Run(name, func(t *testing.T) {
			before := h.config()
			resp, err := h.write("config", test.data)
			if err != nil { // a rejection by the framework
				require.ErrorContains(t, err, test.said)
			} else {
				require.Contains(t, h.refused(resp, nil), test.said)
			}
			require.Equal(t, before, h.config())
		})
	}
	asked, unasked := h.manager.calls()
	require.Zero(t, asked+unasked, "nothing was scheduled")
}

func TestSchedule_PeriodAndScheduleReplaceEachOther(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	shows := func(period int64, schedule string, window int64, manager string) {
		t.Helper()
		data := h.config()
		require.Equal(t, []any{period, schedule, window, manager},
			[]any{data["rotation_period"], data["rotation_schedule"], data["rotation_window"], data["rotation_manager"]})
		require.Equal(t, manager != "", data["next_rotation"] != nil)
	}
	write := func(data map[string]any) { t.Helper(); h.must(h.write("config", data)) }
	shows(0, "", 0, "")
	write(map[string]any{"rotation_schedule": "0 2 * * *", "rotation_window": "2h"})
	shows(0, "0 2 * * *", 7200, "internal")
	write(map[string]any{"request_timeout": 9})
	shows(0, "0 2 * * *", 7200, "internal")
	write(map[string]any{"rotation_schedule": "0 3 * * *"})
	shows(0, "0 3 * * *", 7200, "internal")
	write(map[string]any{"rotation_period": "24h"})
	shows(86400, "", 0, "internal")
	write(map[string]any{"rotation_schedule": "0 2 * * *"})
	shows(0, "0 2 * * *", 0, "internal")
	write(map[string]any{"rotation_schedule": "0 2 * * *", "rotation_window": "2h", "rotation_period": 0})
	shows(0, "0 2 * * *", 7200, "internal")
	write(map[string]any{"disable_automated_rotation": true})
	shows(0, "0 2 * * *", 7200, "")
	write(map[string]any{"disable_automated_rotation": false})
	shows(0, "0 2 * * *", 7200, "internal")
	write(map[string]any{"rotation_schedule": ""})
	shows(0, "", 0, "")
	write(map[string]any{"rotation_period": "24h", "rotation_schedule": ""})
	shows(86400, "", 0, "internal")
	write(map[string]any{"rotation_period": 0})
	shows(0, "", 0, "")
}

func TestSchedule_ByPeriodOnCommunity(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	first := h.adminKeyID()
	require.WithinDuration(t, h.now().Add(24*time.Hour), h.time("next_rotation"), time.Minute)

	for range 3 {
		h.advance(7 * time.Hour)
		h.runPeriodicWork()
	}
	require.Equal(t, first, h.adminKeyID(), "not yet")
	next := h.time("next_rotation")
	h.must(h.write("config", map[string]any{"rotation_period": "24h", "request_timeout": 20}))
	require.Equal(t, next, h.time("next_rotation"), "an unchanged write does not postpone the rotation")

	for range 3 {
		h.until(h.time("next_rotation").Add(30 * time.Second))
		before := h.adminKeyID()
		h.runPeriodicWork()
		h.runPeriodicWork()
		data := h.config()
		require.NotEqual(t, before, data["admin_api_key_id"])
		require.Equal(t, "internal", data["rotation_manager"])
		require.Empty(t, data["last_rotation_error"])
		require.Equal(t, 24*time.Hour, h.time("next_rotation").Sub(h.time("last_rotated")))
		require.WithinDuration(t, h.now(), h.time("last_rotated"), time.Minute)
	}
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.oneAdminKey()
	asked, unasked := h.manager.calls()
	require.Equal(t, []int{1, 0}, []int{asked, unasked}, "one call, whatever the number of writes and runs")
}

func TestSchedule_PeriodCountsFromTheLastRotation(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil))
	rotated := h.time("last_rotated")
	require.Empty(t, h.config()["next_rotation"])
	h.advance(10 * time.Hour)
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	require.Equal(t, rotated.Add(24*time.Hour), h.time("next_rotation"))

	// A manual rotation counts, too.
	h.must(h.write("config/rotate", nil))
	require.Equal(t, h.time("last_rotated").Add(24*time.Hour), h.time("next_rotation"))

	// A new key starts a new period.
	h.advance(10 * time.Hour)
	_, key := h.sim.AddAdminKey("by hand")
	h.must(h.write("config", map[string]any{"admin_api_key": key}))
	require.WithinDuration(t, h.now().Add(24*time.Hour), h.time("next_rotation"), time.Minute)
	h.advance(defaultRotationGrace + time.Second)
	h.runPeriodicWork()
}

func TestSchedule_ByCronWithinItsWindow(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_schedule": "0 2 * * *", "rotation_window": "2h"}))
	due := h.time("next_rotation")
	require.Equal(t, "02:00:00", due.UTC().Format(time.TimeOnly))
	require.Less(t, due.Sub(h.now()), 24*time.Hour)
	id := h.adminKeyID()

	h.until(due.Add(-time.Minute))
	h.runPeriodicWork()
	require.Equal(t, id, h.adminKeyID(), "not yet")
	h.until(due.Add(time.Minute))
	h.runPeriodicWork()
	require.NotEqual(t, id, h.adminKeyID())
	require.Equal(t, due.Add(24*time.Hour), h.time("next_rotation"))

	id = h.adminKeyID()
	due = h.time("next_rotation")
	h.until(due.Add(time.Hour + 59*time.Minute)) // Vault was down
	h.restart()
	h.runPeriodicWork()
	require.NotEqual(t, id, h.adminKeyID(), "the missed rotation runs within its window")
	require.Equal(t, due.Add(24*time.Hour), h.time("next_rotation"))

	id = h.adminKeyID()
	due = h.time("next_rotation")
	h.until(due.Add(2*time.Hour + time.Minute))
	h.restart()
	h.runPeriodicWork()
	require.Equal(t, id, h.adminKeyID(), "its window has passed")
	require.Equal(t, due.Add(24*time.Hour), h.time("next_rotation"))

	h.until(due.Add(3*24*time.Hour + time.Hour)) // Vault was down for days
	h.restart()
	require.Equal(t, due.Add(3*24*time.Hour), h.time("next_rotation"), "today's window is open")
	h.runPeriodicWork()
	require.NotEqual(t, id, h.adminKeyID())
	require.Equal(t, due.Add(4*24*time.Hour), h.time("next_rotation"))
	h.oneAdminKey()
}

func TestSchedule_MissedRotationWithoutWindowRunsOnce(t *testing.T) {
	t.Parallel()
	for name, data := range map[string]map[string]any{
		"cron":   {"rotation_schedule": "0 2 * * *"},
		"period": {"rotation_period": "24h"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.must(h.write("config", data))
			h.until(h.time("next_rotation").Add(60 * time.Hour)) // three missed rotations
			h.restart()
			first := h.adminKeyID()
			h.runPeriodicWork()
			second := h.adminKeyID()
			require.NotEqual(t, first, second)
			require.True(t, h.time("next_rotation").After(h.now()))
			h.runPeriodicWork()
			require.Equal(t, second, h.adminKeyID())
			h.oneAdminKey()
		})
	}
}

func TestSchedule_FailuresBackOffAndAreReported(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.until(h.time("next_rotation"))
	id := h.adminKeyID()
	tries := func() int { return h.sim.Count(http.MethodPost, "/organization/admin_api_keys") }
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: 403, Message: "admin keys are frozen"})
	var gaps []int
	since := 0
	for range 8 * 60 { // eight hours of ticks
		before := tries()
		h.runSchedule()
		if since++; tries() > before {
			gaps, since = append(gaps, since), 0
		}
		h.advance(time.Minute)
	}
	require.Greater(t, len(gaps), 10)
	require.Less(t, len(gaps), 30)
	require.LessOrEqual(t, gaps[1], 2, "the first retry comes at the next tick")
	for _, gap := range gaps[len(gaps)-4:] {
		require.GreaterOrEqual(t, gap, 30)
		require.LessOrEqual(t, gap, 61)
	}
	require.Contains(t, h.config()["last_rotation_error"], "admin keys are frozen")
	require.Equal(t, id, h.adminKeyID())
	require.True(t, h.time("next_rotation").Before(h.now()), "the rotation is overdue")
	require.NoError(t, h.revoke(h.lease("creds/app", nil)), "the old key stays active")

	h.restart()
	require.Contains(t, h.config()["last_rotation_error"], "admin keys are frozen")
	cancel()
	h.runPeriodicWork()
	require.NotEqual(t, id, h.adminKeyID(), "a new process retries immediately")
	require.Empty(t, h.config()["last_rotation_error"])
	h.oneAdminKey()
}

func TestSchedule_ManualRotationClearsTheError(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.until(h.time("next_rotation"))
	h.sim.SetNewAdminKeys(openaitest.ReadOnly())
	cancel := h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: 403, Message: "frozen"})
	h.runPeriodicWork()
	require.NotEmpty(t, h.config()["last_rotation_error"])
	cancel()
	h.sim.SetNewAdminKeys()
	h.must(h.write("config/rotate", nil))
	require.Empty(t, h.config()["last_rotation_error"])
	h.oneAdminKey()
}

// An error stays until a rotation succeeds, or a write changes the failed settings.
func TestSchedule_UnrelatedWriteKeepsTheError(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	fail := func() {
		t.Helper()
		cfg, err := getConfig(t.Context(), h.storage)
		require.NoError(t, err)
		require.NoError(t, h.b.noteFailure(t.Context(), h.storage, cfg.AdminKey, errors.New("frozen")))
		require.Equal(t, "frozen", h.config()["last_rotation_error"])
	}
	said := func(want string, data map[string]any) {
		t.Helper()
		fail()
		h.must(h.write("config", data))
		require.Equal(t, want, h.config()["last_rotation_error"], data)
	}
	_, key := h.sim.AdminKey()
	_, other := h.sim.AddAdminKey("other")
	// Without a schedule, the key's expiry causes rotations, which can fail, too.
	said("frozen", map[string]any{"tidy_interval": "6h"})
	said("frozen", map[string]any{"rotation_period": 0, "rotation_schedule": "", "rotation_window": 0, "disable_automated_rotation": false})
	said("frozen", map[string]any{"admin_api_key": key})
	said("", map[string]any{"rotation_period": "24h"})
	said("frozen", map[string]any{"rotation_period": "24h", "rotation_schedule": ""})
	said("frozen", map[string]any{"request_timeout": "20s"})
	said("", map[string]any{"disable_automated_rotation": true})
	said("frozen", map[string]any{"disable_automated_rotation": true, "rotation_period": 86400})
	said("", map[string]any{"rotation_period": 0})
	said("", map[string]any{"admin_api_key": other})
	fail()
	h.must(h.write("config/rotate", nil))
	require.Empty(t, h.config()["last_rotation_error"])
}

func TestSchedule_EnterpriseManagerRunsTheSchedule(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.manager.set(nil)
	h.configure(map[string]any{"rotation_schedule": "0 2 * * *", "rotation_window": "2h"})
	job, ok := h.manager.job()
	require.True(t, ok)
	require.Equal(t, rotation.RotationJobConfigureRequest{
		Name: rotationJob, MountPoint: "openai/", ReqPath: "config", RotationSchedule: "0 2 * * *", RotationWindow: 2 * time.Hour,
	}, job)
	require.Equal(t, "vault", h.config()["rotation_manager"])
	id := h.adminKeyID()

	h.must(h.write("config", map[string]any{"request_timeout": 20}))
	asked, _ := h.manager.calls()
	require.Equal(t, 1, asked, "a write with the same schedule does not register it again")

	due := h.time("next_rotation")
	h.until(due.Add(time.Minute))
	h.runPeriodicWork()
	require.Equal(t, id, h.adminKeyID(), "Vault rotates the key")
	require.NoError(t, h.rotateByVault())
	require.NotEqual(t, id, h.adminKeyID())
	require.Equal(t, due.Add(24*time.Hour), h.time("next_rotation"))

	// If Vault loses the job, the engine rotates within the window.
	id = h.adminKeyID()
	h.until(h.time("next_rotation").Add(time.Hour + time.Minute))
	h.runPeriodicWork()
	require.NotEqual(t, id, h.adminKeyID())

	// Vault retries after a failure, and the config shows it.
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Status: 403, Message: "frozen"})
	require.ErrorContains(t, h.rotateByVault(), "frozen")
	require.Contains(t, h.config()["last_rotation_error"], "frozen")
	h.sim.ClearFaults()

	id = h.adminKeyID()
	h.must(h.write("config", map[string]any{"disable_automated_rotation": true}))
	_, ok = h.manager.job()
	require.False(t, ok)
	require.NoError(t, h.rotateByVault(), "a job without a schedule is not an error")
	require.Equal(t, id, h.adminKeyID())

	h.must(h.write("config", map[string]any{"disable_automated_rotation": false, "rotation_period": "48h"}))
	job, ok = h.manager.job()
	require.True(t, ok)
	require.Equal(t, 48*time.Hour, job.RotationPeriod)
	require.Empty(t, job.RotationSchedule)
	h.oneAdminKey()
	h.must(h.remove("config"))
	_, ok = h.manager.job()
	require.False(t, ok)
	require.NoError(t, h.rotateByVault())
}

func TestSchedule_ServerWithoutManagerIsAskedOnce(t *testing.T) {
	t.Parallel()
	for name, refusal := range map[string]error{"Community": errCommunity, "Unimplemented": errUnimplemented} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.manager.set(refusal)
			h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
			require.Equal(t, "internal", h.config()["rotation_manager"])
			h.restart()
			logged := len(h.log.String())
			for range 120 {
				h.advance(time.Minute)
				h.runSchedule()
			}
			asked, _ := h.manager.calls()
			require.Equal(t, 2, asked, "once by the write, once by the new process")
			require.Less(t, strings.Count(h.log.String()[logged:], "\n"), 3, h.log.String()[logged:])
			h.must(h.write("config", map[string]any{"disable_automated_rotation": true}))
			h.must(h.write("config", map[string]any{"rotation_period": 0, "disable_automated_rotation": false}))
			require.NoError(t, h.revoke(h.lease("creds/app", nil)))
		})
	}
}

func TestSchedule_ManagerErrorRejectsTheWrite(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	h.manager.set(nil)
	h.configure(map[string]any{"rotation_period": "24h"})
	before := h.config()
	h.manager.set(errManager)
	_, err := h.write("config", map[string]any{"rotation_period": "48h"})
	require.ErrorContains(t, err, "config not stored")
	require.ErrorContains(t, err, "the rotation queue is full")
	require.Equal(t, before, h.config())
	logged := len(h.log.String())
	for range 50 {
		h.runSchedule()
		h.advance(time.Minute)
	}
	require.Equal(t, 1, strings.Count(h.log.String()[logged:], "not registered yet"), "one log line")

	// The error does not block the removal of a schedule, and the engine ignores a call
	// by the remaining job.
	resp := h.must(h.write("config", map[string]any{"rotation_period": 0}))
	require.Contains(t, strings.Join(resp.Warnings, " "), "rotation manager")
	require.Empty(t, h.config()["rotation_manager"])
	id := h.adminKeyID()
	require.NoError(t, h.rotateByVault())
	require.Equal(t, id, h.adminKeyID())
	_, ok := h.manager.job()
	require.True(t, ok)
	h.manager.set(nil)
	h.runSchedule()
	_, ok = h.manager.job()
	require.False(t, ok, "deregistered in the end")
	_, before2 := h.manager.calls()
	h.runSchedule()
	_, after := h.manager.calls()
	require.Equal(t, before2, after)
}

func TestSchedule_EditionIsDetectedAtStart(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	require.Equal(t, "internal", h.config()["rotation_manager"])
	h.manager.set(nil)
	h.restart()
	h.runPeriodicWork()
	require.Equal(t, "vault", h.config()["rotation_manager"])
	_, ok := h.manager.job()
	require.True(t, ok)

	h.manager.set(errCommunity)
	h.restart()
	h.runPeriodicWork()
	require.Equal(t, "internal", h.config()["rotation_manager"])
	h.until(h.time("next_rotation"))
	h.runPeriodicWork()
	require.NotEmpty(t, h.config()["last_rotated"])
	h.oneAdminKey()
}

func TestSchedule_OnlyOnThePrimaryCluster(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		state  consts.ReplicationState
		local  bool
		rotate bool
	}{
		"primary":                              {consts.ReplicationPerformancePrimary, false, true},
		"performance secondary":                {consts.ReplicationPerformanceSecondary, false, false},
		"performance secondary, a local mount": {consts.ReplicationPerformanceSecondary, true, true},
		"performance standby":                  {consts.ReplicationPerformanceStandby, false, false},
		"DR secondary":                         {consts.ReplicationDRSecondary, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
			id := h.adminKeyID()
			h.until(h.time("next_rotation"))
			h.system.LocalMountVal = test.local
			h.become(test.state)
			h.restart()
			h.rollback()
			require.Equal(t, test.rotate, id != h.adminKeyID())
			err := h.rotateByVault()
			if test.rotate {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, logical.ErrReadOnly)
				require.Equal(t, id, h.adminKeyID())
			}
			asked, _ := h.manager.calls()
			require.Equal(t, map[bool]int{true: 2, false: 1}[test.rotate], asked)
			h.become(0)
			h.runPeriodicWork()
			h.oneAdminKey()
		})
	}
}

func TestSchedule_ScheduledKeysExpireUnlessRotated(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config", map[string]any{"rotation_period": "240h"}))
	require.Empty(t, h.config()["admin_api_key_expires_at"], "the operator's key is unchanged")
	for range 2 {
		h.until(h.time("next_rotation"))
		h.runPeriodicWork()
		require.WithinDuration(t, h.now().Add(720*time.Hour), h.time("admin_api_key_expires_at"), time.Minute)
	}
	require.Empty(t, h.must(h.read("config")).Warnings)

	// Rotation keeps failing: warnings start in the last third of the lifetime.
	h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: 403})
	h.advance(470 * time.Hour)
	h.runPeriodicWork()
	require.Empty(t, h.must(h.read("config")).Warnings)
	require.NotContains(t, h.log.String(), "expires soon")
	h.advance(11 * time.Hour)
	for range 100 {
		h.runSchedule()
		h.advance(time.Minute)
	}
	require.Contains(t, strings.Join(h.must(h.read("config")).Warnings, " "), "expires at OpenAI at "+h.config()["admin_api_key_expires_at"].(string))
	h.sim.ClearFaults()
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.Empty(t, h.must(h.read("config")).Warnings)
	h.oneAdminKey()
}

func TestSchedule_KeyLife(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	for name, test := range map[string]struct {
		config config
		want   time.Duration
	}{
		"no schedule":           {config{}, 0},
		"disabled":              {config{Schedule: schedule.Schedule{RotationPeriod: day}, DisableAutomatedRotation: true}, 0},
		"seconds":               {config{Schedule: schedule.Schedule{RotationPeriod: 10 * time.Second}}, 7 * day},
		"an hour":               {config{Schedule: schedule.Schedule{RotationPeriod: time.Hour}}, 7 * day},
		"a month":               {config{Schedule: schedule.Schedule{RotationPeriod: 30 * day}}, 90 * day},
		"five months":           {config{Schedule: schedule.Schedule{RotationPeriod: 150 * day}}, 365 * day},
		"a year":                {config{Schedule: schedule.Schedule{RotationPeriod: 365 * day}}, 0},
		"every minute":          {config{Schedule: schedule.Schedule{RotationSchedule: "* * * * *"}}, 7 * day},
		"Mondays, a minute ago": {config{Schedule: schedule.Schedule{RotationSchedule: "59 11 * * 1"}}, 21*day - time.Minute},
		"Mondays, in a minute":  {config{Schedule: schedule.Schedule{RotationSchedule: "1 12 * * 1"}}, 14*day + time.Minute},
		"two days a year":       {config{Schedule: schedule.Schedule{RotationSchedule: "0 0 1,2 1 *"}}, 365 * day},
		"once a year":           {config{Schedule: schedule.Schedule{RotationSchedule: "0 0 1 1 *"}}, 0},
		"29 February":           {config{Schedule: schedule.Schedule{RotationSchedule: "0 0 29 2 *"}}, 0},
	} {
		require.Equal(t, test.want, test.config.keyLife(now), name)
	}
}

func TestSchedule_ExpiringKeyWithoutScheduleWarns(t *testing.T) {
	t.Parallel()
	rotated := func(t *testing.T) *harness {
		h := configured(t, openaitest.Options{})
		h.must(h.write("config", map[string]any{"rotation_period": "240h"}))
		h.must(h.write("config/rotate", nil))
		require.NotEmpty(t, h.config()["admin_api_key_expires_at"])
		return h
	}
	t.Run("removed", func(t *testing.T) {
		t.Parallel()
		h := rotated(t)
		id, end := h.adminKeyID(), h.time("admin_api_key_expires_at")
		resp := h.must(h.write("config", map[string]any{"rotation_period": 0}))
		require.Contains(t, resp.Warnings[0], "with a key that does not expire")
		require.Equal(t, "internal", h.config()["rotation_manager"])
		require.WithinDuration(t, end.Add(-240*time.Hour), h.time("next_rotation"), time.Minute)
		h.until(end.Add(-241 * time.Hour))
		h.runPeriodicWork()
		require.Equal(t, id, h.adminKeyID())
		h.until(end.Add(-240*time.Hour + 5*time.Second))
		h.runPeriodicWork()
		require.NotEqual(t, id, h.adminKeyID())
		require.Empty(t, h.config()["admin_api_key_expires_at"])
		require.Empty(t, h.config()["next_rotation"])
		h.oneAdminKey()
		h.until(end.Add(time.Hour))
		require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	})
	t.Run("disabled", func(t *testing.T) {
		t.Parallel()
		h := rotated(t)
		id, end := h.adminKeyID(), h.time("admin_api_key_expires_at")
		resp := h.must(h.write("config", map[string]any{"disable_automated_rotation": true}))
		require.Contains(t, resp.Warnings[0], "disable_automated_rotation prevents its replacement")
		require.Empty(t, h.config()["next_rotation"])
		h.until(end.Add(-239 * time.Hour))
		for range 3 * 60 {
			h.runSchedule()
			h.advance(time.Minute)
		}
		require.Equal(t, id, h.adminKeyID())
		require.Equal(t, 3, strings.Count(h.log.String(), "expires soon"), "hourly")
		require.Contains(t, h.must(h.read("config")).Warnings[0], "disable_automated_rotation prevents its replacement")
		h.must(h.write("config/rotate", nil))
		require.Empty(t, h.config()["admin_api_key_expires_at"])
		h.oneAdminKey()
	})
	t.Run("longer period", func(t *testing.T) {
		t.Parallel()
		h := rotated(t)
		id, end := h.adminKeyID(), h.time("admin_api_key_expires_at")
		resp := h.must(h.write("config", map[string]any{"rotation_period": "8000h"}))
		require.Contains(t, resp.Warnings[0], "earlier than the schedule requires")
		require.WithinDuration(t, end.Add(-240*time.Hour), h.time("next_rotation"), time.Minute)
		h.until(end.Add(-240*time.Hour + 5*time.Second))
		h.runPeriodicWork()
		require.NotEqual(t, id, h.adminKeyID())
		require.Empty(t, h.config()["admin_api_key_expires_at"], "the period is too long for an expiry")
		h.oneAdminKey()
	})
	t.Run("operator's key", func(t *testing.T) {
		t.Parallel()
		h := newHarness(t, openaitest.Options{})
		id, key := h.sim.AddAdminKey("for a month", openaitest.ExpiresIn(30*24*time.Hour))
		resp := h.must(h.write("config", map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()}))
		require.Contains(t, resp.Warnings[0], "no rotation is scheduled")
		require.Empty(t, h.config()["next_rotation"])
		h.advance(24 * 24 * time.Hour)
		h.runPeriodicWork()
		require.Equal(t, id, h.adminKeyID(), "not replaced without a schedule")
		require.Contains(t, h.log.String(), "expires soon")
		h.must(h.write("config", map[string]any{"rotation_period": "2400h"}))
		h.runPeriodicWork()
		require.NotEqual(t, id, h.adminKeyID(), "replaced before its expiry with a schedule")
		root, _ := h.sim.AdminKey()
		h.sim.DeleteAdminKey(root)
		h.oneAdminKey()
	})
}

// Faults at each storage write of a scheduled rotation.
func TestSchedule_StorageFaultsLeaveOneWorkingKey(t *testing.T) {
	t.Parallel()
	for name, flow := range map[string]struct {
		before func(h *harness)
		run    func(h *harness)
	}{
		"rotation": {
			func(h *harness) { h.runSchedule(); h.until(h.time("next_rotation")) },
			func(h *harness) { h.runSchedule() },
		},
		"failed rotation": {
			func(h *harness) {
				h.until(h.time("next_rotation"))
				h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: "/organization/admin_api_keys", Status: 403})
			},
			func(h *harness) { h.runSchedule() },
		},
		"a new Vault edition": {
			func(h *harness) { h.manager.set(nil); h.restart() },
			func(h *harness) { h.runSchedule() },
		},
		"the removal of a schedule": {
			func(h *harness) {
				h.manager.set(nil)
				h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
			},
			func(h *harness) { _, _ = h.write("config", map[string]any{"rotation_period": 0}) },
		},
		"a new schedule": {
			func(h *harness) { h.manager.set(nil) },
			func(h *harness) { _, _ = h.write("config", map[string]any{"rotation_period": "72h"}) },
		},
	} {
		prepare := func(t *testing.T) *harness {
			h := configured(t, openaitest.Options{})
			h.must(h.write("config", map[string]any{"rotation_period": "48h"}))
			flow.before(h)
			return h
		}
		check := func(t *testing.T, h *harness) {
			h.sim.ClearFaults()
			if h.storage.heal() {
				h.restart()
			}
			lease := h.lease("creds/app", nil)
			h.runPeriodicWork()
			h.advance(time.Hour) // past any retry
			h.runPeriodicWork()
			cfg, err := getConfig(context.Background(), h.storage)
			require.NoError(t, err)
			job, kept := h.manager.job()
			require.Equal(t, cfg.RotationManager == managerVault, kept, "Vault has the stored schedule, or none")
			if kept {
				require.Equal(t, cfg.RotationPeriod, job.RotationPeriod)
			}
			if cfg.scheduled() {
				require.False(t, cfg.nextRotation(h.now(), 0).Before(h.now()), "nothing is overdue")
			}
			require.NoError(t, h.revoke(lease))
			h.oneAdminKey()
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := prepare(t)
			h.storage.fail(storageFault{write: -1})
			flow.run(h)
			writes := len(h.storage.writes)
			require.NotZero(t, writes)
			check(t, h)
			for n := range writes {
				for kind, fault := range map[string]storageFault{
					"error before":  {write: n},
					"error after":   {write: n, after: true},
					"killed before": {write: n, kill: true},
					"killed after":  {write: n, after: true, kill: true},
				} {
					t.Run(fmt.Sprintf("write %d, %s", n, kind), func(t *testing.T) {
						t.Parallel()
						h := prepare(t)
						h.storage.fail(fault)
						flow.run(h)
						check(t, h)
					})
				}
			}
		})
	}
}

func TestSchedule_DisableEndsARotation(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	id, _ := h.sim.AdminKey()
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.until(h.time("next_rotation"))
	struck := make(chan struct{})
	h.sim.Fail(openaitest.Fault{
		Method: http.MethodPost, Route: "/organization/admin_api_keys", Kind: openaitest.FaultHangAfter, Times: 1,
		OnStrike: func(*http.Request) { close(struck) },
	})
	req := &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"}
	_, err := h.b.HandleRequest(context.Background(), req)
	require.NoError(t, err)
	<-struck
	require.Len(t, h.adminKeyIDs(), 2)
	h.manager.taint()
	start := time.Now()
	_, err = h.b.HandleRequest(context.Background(), req)
	require.NoError(t, err)
	require.Less(t, time.Since(start), 20*time.Second)
	require.Equal(t, []string{id}, h.adminKeyIDs())
	require.Empty(t, h.walEntries())
}

func TestRotate_NewKeyMustWorkTwiceInARow(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		const route = "/organization/admin_api_keys/{key_id}"
		h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: route, Skip: 1, Times: 1, Status: 401})
		h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: route, Skip: 2, Times: 1, Status: 404})
		h.must(h.write("config/rotate", nil))
		require.GreaterOrEqual(t, h.sim.Count(http.MethodGet, route), 4, "works, refused, works, works")
		h.sim.ClearFaults()
		h.oneAdminKey()
	})
}

func TestRotate_RateLimitDoesNotDiscardAWorkingKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	const route = "/organization/admin_api_keys/{key_id}"
	h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: route, Skip: 1, Status: 429, Header: http.Header{"Retry-After": {"120"}}})
	h.must(h.write("config/rotate", nil))
	h.sim.ClearFaults()
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.sim.Keep(h.adminKeyIDs()...)
}

func TestRotate_ReadersRetryWhileTheNewKeyPropagates(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil))
	fault := openaitest.Fault{Method: http.MethodPost, Status: 401, Times: 2}
	h.sim.Fail(fault)
	require.NoError(t, h.revoke(h.lease("creds/app", nil)))
	h.advance(2 * time.Minute)
	h.sim.Fail(fault)
	_, err := h.read("creds/app")
	require.ErrorContains(t, err, "401", "after the propagation, a 401 is an error")
	h.sim.ClearFaults()
	h.oneAdminKey()
}

func TestRotate_FiftyTimesWithSixteenReaders(t *testing.T) {
	t.Parallel()
	// A new admin key is active after a second of the simulator's clock, which runs ten
	// times as fast as the engine's: only the order of events matters.
	start := time.Now()
	h := configured(t, openaitest.Options{
		AdminActivationDelay: time.Second,
		Clock:                func() time.Time { return start.Add(10 * time.Since(start)) },
	})
	var readers sync.WaitGroup
	var reads atomic.Int64
	stop := make(chan struct{})
	for range 16 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Millisecond):
				}
				resp, err := h.read("creds/app")
				if err != nil || resp.IsError() {
					t.Errorf("a read failed: %v %v", err, resp)
					return
				}
				if err := h.revoke(h.stored(resp)); err != nil {
					t.Errorf("a revoke failed: %v", err)
				}
				reads.Add(1)
			}
		})
	}
	for range 50 {
		before := reads.Load()
		unlock, err := h.b.lockConfig(t.Context())
		require.NoError(t, err)
		cfg, err := getConfig(t.Context(), h.storage)
		require.NoError(t, err)
		_, _, err = h.b.rotateLocked(t.Context(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}, cfg, false) // like a scheduled rotation, without the limit
		require.NoError(t, err)
		unlock()
		for reads.Load() < before+2 && !t.Failed() {
			time.Sleep(10 * time.Millisecond) // ensures reads between any two rotations
		}
	}
	close(stop)
	readers.Wait()
	t.Logf("50 rotations in %s, %d reads", time.Since(start).Round(time.Second), reads.Load())
	h.onlyLeased()
	h.setClock(time.Until(h.sim.Now())) // grace periods end by both clocks
	h.oneAdminKey()
}

func TestRotate_NeverInterleavesWithAnotherOrWithAConfigWrite(t *testing.T) {
	t.Parallel()
	inBubble(t, openaitest.Options{}, func(t *testing.T, h *harness) {
		h.configure(nil)
		h.role(nil)
		var all sync.WaitGroup
		for n := range 2 {
			all.Go(func() {
				if resp, err := h.write("config/rotate", nil); err != nil || resp.IsError() {
					t.Errorf("a rotation failed: %v %v", err, resp)
				}
			})
			all.Go(func() {
				if resp, err := h.write("config", map[string]any{"request_timeout": 10 + n, "rotation_period": "24h"}); err != nil || resp.IsError() {
					t.Errorf("a write failed: %v %v", err, resp)
				}
			})
			all.Go(func() {
				if err := h.rotateByVault(); err != nil {
					t.Errorf("a rotation by Vault failed: %v", err)
				}
			})
		}
		all.Wait()
		require.NotEqualValues(t, 30, h.config()["request_timeout"], "no write was lost to a rotation")
		require.NoError(t, h.revoke(h.lease("creds/app", nil)))
		h.oneAdminKey()
	})
}

func FuzzRotationSchedule(f *testing.F) {
	for _, seed := range []string{"0 2 * * *", "*/5 1-3 * JAN MON-FRI", "0 0 31 2 *", "TZ=UTC", "CRON_TZ= 0 2 * * *", "@daily", "9999999999 * * * *", "0-59/0 * * * *", "\x00"} {
		f.Add(seed)
	}
	schema := newBackend().pathConfig().Fields
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text string) {
		cfg := &config{}
		problem := cfg.mergeSchedule(&framework.FieldData{Raw: map[string]any{"rotation_schedule": text}, Schema: schema}, now)
		if problem != "" || text == "" {
			return
		}
		if next := cfg.nextRotation(now, 0); !next.After(now) {
			t.Fatalf("%q is next due at %s", text, next)
		}
		if life := cfg.keyLife(now); life != 0 && (life < minKeyLife || life > 366*24*time.Hour) {
			t.Fatalf("%q gives keys a lifetime of %s", text, life)
		}
	})
}
