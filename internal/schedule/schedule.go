// Package schedule decides when a key is rotated automatically. It owns the rotation
// fields that the admin key and static roles share.
//
// What must stay true: a rejected write changes nothing, and the next rotation
// follows from storage and the clock alone.
package schedule

import (
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/rotation"

	"vault-plugin-secrets-openai/internal/text"
)

const (
	// MinPeriod is the shortest rotation_period.
	MinPeriod = 10 * time.Second
	// MaxPeriod is the longest; a sum of a few fits a time.Duration.
	MaxPeriod = 10 * 365 * 24 * time.Hour
)

// AddFields adds Vault's rotation fields with this engine's descriptions, without
// rotation_policy, which requires the rotation manager of Vault Enterprise 2.0.
func AddFields(fields map[string]*framework.FieldSchema) {
	automatedrotationutil.AddAutomatedRotationFields(fields)
	delete(fields, "rotation_policy")
	for name, description := range map[string]string{
		"rotation_period":            "Interval between automatic rotations. Minimum 10s; 0 disables it. Clears rotation_schedule.",
		"rotation_schedule":          "Cron schedule of automatic rotations: five fields in UTC; empty disables it. Clears rotation_period.",
		"rotation_window":            "How late a missed rotation of rotation_schedule may run. Minimum 1h; 0 means no limit.",
		"disable_automated_rotation": "Pause automatic rotation and keep the schedule.",
	} {
		fields[name].Description = description
	}
}

// Schedule is when a key is rotated automatically. At most one of RotationPeriod and
// RotationSchedule is set.
type Schedule struct {
	RotationPeriod   time.Duration `json:"rotation_period,omitempty"`
	RotationSchedule string        `json:"rotation_schedule,omitempty"`
	RotationWindow   time.Duration `json:"rotation_window,omitempty"`
	LastRotated      time.Time     `json:"last_rotated,omitzero"`
	NextRotation     time.Time     `json:"next_rotation,omitzero"`
}

// Merge applies a write to the schedule. It adds the stored values and the limits,
// which Vault's own parser does not consider.
func (s *Schedule) Merge(d *framework.FieldData, now time.Time) (problem string) {
	for _, name := range []string{"rotation_period", "rotation_window"} {
		if raw, ok := d.GetOk(name); ok {
			if seconds := raw.(int); seconds < 0 || seconds > int(MaxPeriod/time.Second) {
				return fmt.Sprintf("%s must be between 0 and %s", name, MaxPeriod)
			}
		}
	}
	cron, cronGiven := d.GetOk("rotation_schedule")
	if cronGiven {
		if problem := text.Check("rotation_schedule", cron.(string)); problem != "" {
			return problem
		}
		// The parser accepts a time zone, which Vault silently replaces with UTC, and
		// panics on a time zone without a schedule (robfig/cron v3.0.1).
		if strings.Contains(cron.(string), "TZ=") {
			return "rotation_schedule must not contain a time zone; the schedule is in UTC"
		}
	}
	p := automatedrotationutil.AutomatedRotationParams{
		RotationSchedule: s.RotationSchedule, RotationWindow: s.RotationWindow, RotationPeriod: s.RotationPeriod,
	}
	given := *d
	if period, ok := d.GetOk("rotation_period"); !cronGiven && s.RotationSchedule != "" && (!ok || period.(int) == 0) {
		given.Raw = maps.Clone(d.Raw)
		given.Raw["rotation_schedule"] = s.RotationSchedule // a write of only the window needs it
	}
	if err := p.ParseAutomatedRotationFields(&given); err != nil {
		return err.Error()
	}
	switch period, given := d.GetOk("rotation_period"); {
	case given && period.(int) != 0:
		p.RotationSchedule, p.RotationWindow = "", 0
	case cronGiven && p.RotationSchedule != "":
		p.RotationPeriod = 0
	case p.RotationSchedule == "":
		if window, ok := d.GetOk("rotation_window"); ok && window.(int) != 0 {
			return "rotation_window requires rotation_schedule"
		}
		p.RotationWindow = 0
	}
	if p.RotationPeriod != 0 && p.RotationPeriod < MinPeriod {
		return fmt.Sprintf("rotation_period must be %s or more, or 0 to disable it", MinPeriod)
	}
	if p.RotationWindow != 0 {
		if err := rotation.DefaultScheduler.ValidateRotationWindow(int(p.RotationWindow / time.Second)); err != nil {
			return err.Error()
		}
	}
	s.RotationPeriod, s.RotationSchedule, s.RotationWindow = p.RotationPeriod, p.RotationSchedule, p.RotationWindow

	if rs := s.Parsed(); rs != nil && rs.Schedule != nil && rs.Schedule.Next(now.UTC()).IsZero() {
		return fmt.Sprintf("rotation_schedule %q has no future occurrence", p.RotationSchedule)
	}
	return ""
}

// Same reports whether both have the same settings.
func (s *Schedule) Same(o *Schedule) bool {
	return s.RotationPeriod == o.RotationPeriod && s.RotationSchedule == o.RotationSchedule && s.RotationWindow == o.RotationWindow
}

// Parsed returns the schedule for Vault's scheduler, nil if there is none.
func (s *Schedule) Parsed() *rotation.RotationSchedule {
	if s.RotationPeriod == 0 && s.RotationSchedule == "" {
		return nil
	}
	rs := &rotation.RotationSchedule{
		RotationPeriod: s.RotationPeriod, RotationSchedule: s.RotationSchedule, RotationWindow: s.RotationWindow,
		NextVaultRotation: s.NextRotation, LastVaultRotation: s.LastRotated,
	}
	if s.RotationSchedule != "" {
		parsed, err := rotation.DefaultScheduler.Parse(s.RotationSchedule)
		if err != nil {
			return nil // Merge rejects it
		}
		rs.Schedule = parsed
	}
	return rs
}

// PlanFrom sets when the next rotation is due, counted from a time.
func (s *Schedule) PlanFrom(from time.Time) {
	s.NextRotation = time.Time{}
	if rs := s.Parsed(); rs != nil {
		rotation.DefaultScheduler.SetNextVaultRotation(rs, from.UTC())
		s.NextRotation = rs.NextVaultRotation.Truncate(time.Second)
	}
}

// Tick returns the scheduled time of the next rotation, which is in the past if one is
// due. A rotation that was missed for longer than its window is replaced by the first
// whose window is still open, or else by the next one.
func (s *Schedule) Tick(now time.Time) time.Time {
	rs := s.Parsed()
	if rs == nil {
		return time.Time{}
	}
	if !rotation.DefaultScheduler.IsInsideRotationWindow(rs, now) {
		rotation.DefaultScheduler.SetNextVaultRotation(rs, now.UTC().Add(-rs.RotationWindow))
	}
	return rs.NextVaultRotation
}

// LongestGap returns the longest time from one rotation to the next, 0 without a
// schedule. It hardly depends on now: a role that was accepted once must be accepted
// again at any other time.
func (s *Schedule) LongestGap(now time.Time) (longest time.Duration) {
	const day, looked = 24 * time.Hour, 5 * 366 * 24 * time.Hour
	rs := s.Parsed()
	if rs == nil {
		return 0
	}
	if rs.Schedule == nil {
		return rs.RotationPeriod
	}
	// A schedule has the same times on each of its days, so the gaps within one day are
	// those within any day; the other gaps are between two days.
	first := rs.Schedule.Next(now.UTC())
	if first.IsZero() {
		return MaxPeriod // no future occurrence
	}
	first = rs.Schedule.Next(first.Truncate(day).Add(-time.Second))
	last := first
	for next := rs.Schedule.Next(last); next.Truncate(day).Equal(last.Truncate(day)); next = rs.Schedule.Next(last) {
		longest = max(longest, next.Sub(last))
		last = next
	}
	for span, began := last.Sub(first), last; last.Sub(began) < looked; {
		next := rs.Schedule.Next(last)
		if next.IsZero() {
			return MaxPeriod // no further occurrence
		}
		longest = max(longest, next.Sub(last))
		last = next.Add(span)
	}
	return longest
}

// ThreeRotations returns the time from now to the third next rotation, at most span; 0
// if the second one is already later than span.
func (s *Schedule) ThreeRotations(now time.Time, span time.Duration) time.Duration {
	rs := s.Parsed()
	if rs == nil {
		return 0
	}
	at := now.UTC()
	for n := range 3 {
		at = rotation.DefaultScheduler.NextRotationTimeFromInput(rs, at)
		if n < 2 && (at.IsZero() || at.Sub(now) > span) {
			return 0
		}
	}
	if at.IsZero() {
		return span
	}
	return min(at.Sub(now).Truncate(time.Second), span)
}
