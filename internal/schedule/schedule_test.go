package schedule

import (
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLongestGap(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"* * * * *":       time.Minute,
		"*/7 * * * *":     7 * time.Minute,
		"0 2 * * *":       day,
		"* 2 * * *":       23*time.Hour + time.Minute,
		"0 2,3,10 * * *":  16 * time.Hour,
		"0 2 * * 1":       7 * day,
		"0 2 * * 1-5":     3 * day,
		"0 0 1 * *":       31 * day,
		"0 0 31 * *":      61 * day,
		"0 6,18 1,15 * *": 17*day - 12*time.Hour,
		"30 4 1 1,7 *":    184 * day,
		"0 0 1,2 1 *":     365 * day,
		"0 0 29 2 *":      4*365*day + day,
		"59 23 31 12 *":   366 * day,
		"0,1 0,23 * * *":  22*time.Hour + 59*time.Minute,
		"* * 1 * *":       30*day + time.Minute,
		"0 12 * 6 *":      337 * day,
	} {
		for _, now := range []time.Time{
			time.Date(2026, 5, 4, 2, 5, 7, 11, time.UTC), time.Date(2026, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(2028, 2, 29, 0, 0, 0, 0, time.UTC),
			time.Date(2027, 6, 30, 12, 30, 0, 0, time.FixedZone("", 9*3600)),
		} {
			s := Schedule{RotationSchedule: text}
			require.Equal(t, want, s.LongestGap(now), "%s at %s", text, now)
		}
	}
	require.Equal(t, MaxPeriod, (&Schedule{RotationSchedule: "0 0 30 2 *"}).LongestGap(time.Now()), "a schedule without a future occurrence")
	require.Zero(t, (&Schedule{}).LongestGap(time.Now()))
	require.Equal(t, time.Hour, (&Schedule{RotationPeriod: time.Hour}).LongestGap(time.Now()))
	// LongestGap must not step through five years minute by minute: it has to be faster
	// than stepping through three weeks.
	minutely := &Schedule{RotationSchedule: "* * * * *"}
	took := time.Duration(math.MaxInt64)
	for range 5 { // the minimum, since a busy machine can delay any of them
		began := time.Now()
		minutely.LongestGap(began)
		took = min(took, time.Since(began))
	}
	began := time.Now()
	for at, next := began, minutely.Parsed().Schedule.Next; at.Sub(began) < 3*7*24*time.Hour; at = next(at) {
	}
	require.Less(t, took, time.Since(began))
}
