package openaisecrets

// This file owns when something is to be replaced without being asked: a
// schedule's fields and rules and the next time, which the admin key and static
// roles share.
//
// What must stay true: a write that is refused changes nothing of a schedule, and
// the next time follows from storage and the clock alone.

import (
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/rotation"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	minRotationPeriod = 10 * time.Second
	// maxRotationPeriod keeps what is given within a time.Duration.
	maxRotationPeriod = 10 * 365 * 24 * time.Hour
)

// addScheduleFields adds Vault's own fields, but for the one that only the
// rotation manager of Enterprise 2.0 knows, and says what they mean here.
func addScheduleFields(fields map[string]*framework.FieldSchema) {
	automatedrotationutil.AddAutomatedRotationFields(fields)
	delete(fields, "rotation_policy")
	for name, description := range map[string]string{
		"rotation_period":            "Rotate by itself this often: 10s or more, 0 = not. Clears rotation_schedule.",
		"rotation_schedule":          "Rotate by itself at these times: five cron fields, UTC; empty = not. Clears rotation_period.",
		"rotation_window":            "How long after its time a missed rotation of rotation_schedule is still made up for: 1h or more, 0 = without limit.",
		"disable_automated_rotation": "Keep the schedule but do not act on it.",
	} {
		fields[name].Description = description
	}
}

// schedule is when something is to be rotated without being asked. Of period
// and schedule one is set at most.
type schedule struct {
	RotationPeriod   time.Duration `json:"rotation_period,omitempty"`
	RotationSchedule string        `json:"rotation_schedule,omitempty"`
	RotationWindow   time.Duration `json:"rotation_window,omitempty"`
	LastRotated      time.Time     `json:"last_rotated,omitzero"`
	NextRotation     time.Time     `json:"next_rotation,omitzero"`
}

// merge applies a write to the schedule. Vault's own parser knows nothing of
// what is stored, nor of bounds, so that is made up for here.
func (s *schedule) merge(d *framework.FieldData, now time.Time) (problem string) {
	for _, name := range []string{"rotation_period", "rotation_window"} {
		if raw, ok := d.GetOk(name); ok {
			if seconds := raw.(int); seconds < 0 || seconds > int(maxRotationPeriod/time.Second) {
				return fmt.Sprintf("%s must be between 0 and %s", name, maxRotationPeriod)
			}
		}
	}
	cron, cronGiven := d.GetOk("rotation_schedule")
	if cronGiven {
		if problem := text.Check("rotation_schedule", cron.(string)); problem != "" {
			return problem
		}
		// The parser takes a time zone, of which Vault makes UTC without a
		// word, and panics on one that stands alone (robfig/cron v3.0.1).
		if strings.Contains(cron.(string), "TZ=") {
			return "rotation_schedule is in UTC and takes no time zone"
		}
	}
	p := automatedrotationutil.AutomatedRotationParams{
		RotationSchedule: s.RotationSchedule, RotationWindow: s.RotationWindow, RotationPeriod: s.RotationPeriod,
	}
	given := *d
	if period, ok := d.GetOk("rotation_period"); !cronGiven && s.RotationSchedule != "" && (!ok || period.(int) == 0) {
		given.Raw = maps.Clone(d.Raw)
		given.Raw["rotation_schedule"] = s.RotationSchedule // to which a window may be given alone
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
			return "rotation_window is of use only with a rotation_schedule"
		}
		p.RotationWindow = 0
	}
	if p.RotationPeriod != 0 && p.RotationPeriod < minRotationPeriod {
		return fmt.Sprintf("rotation_period must be %s or more, or 0 for none", minRotationPeriod)
	}
	if p.RotationWindow != 0 {
		if err := rotation.DefaultScheduler.ValidateRotationWindow(int(p.RotationWindow / time.Second)); err != nil {
			return err.Error()
		}
	}
	s.RotationPeriod, s.RotationSchedule, s.RotationWindow = p.RotationPeriod, p.RotationSchedule, p.RotationWindow

	if rs := s.parsed(); rs != nil && rs.Schedule != nil && rs.Schedule.Next(now.UTC()).IsZero() {
		return fmt.Sprintf("rotation_schedule %q never comes", p.RotationSchedule)
	}
	return ""
}

func (s *schedule) same(o *schedule) bool {
	return s.RotationPeriod == o.RotationPeriod && s.RotationSchedule == o.RotationSchedule && s.RotationWindow == o.RotationWindow
}

// parsed is the schedule as Vault's scheduler takes it, nil without one.
func (s *schedule) parsed() *rotation.RotationSchedule {
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
			return nil // refused when it was written
		}
		rs.Schedule = parsed
	}
	return rs
}

// planFrom sets when the next rotation is due, counted from a time.
func (s *schedule) planFrom(from time.Time) {
	s.NextRotation = time.Time{}
	if rs := s.parsed(); rs != nil {
		rotation.DefaultScheduler.SetNextVaultRotation(rs, from.UTC())
		s.NextRotation = rs.NextVaultRotation.Truncate(time.Second)
	}
}

// tick is when the schedule wants the next rotation: in the past when one is
// due. One that was missed for longer than its window gives way to the first
// whose window is still open, or else to the next to come.
func (s *schedule) tick(now time.Time) time.Time {
	rs := s.parsed()
	if rs == nil {
		return time.Time{}
	}
	if !rotation.DefaultScheduler.IsInsideRotationWindow(rs, now) {
		rotation.DefaultScheduler.SetNextVaultRotation(rs, now.UTC().Add(-rs.RotationWindow))
	}
	return rs.NextVaultRotation
}

// longestGap is the longest time from one rotation to the next, 0 without a
// schedule. It hardly depends on when it is asked for: a role that was taken
// once must be taken again, at whatever time of the day it is written.
func (s *schedule) longestGap(now time.Time) (longest time.Duration) {
	const day, looked = 24 * time.Hour, 5 * 366 * 24 * time.Hour
	rs := s.parsed()
	if rs == nil {
		return 0
	}
	if rs.Schedule == nil {
		return rs.RotationPeriod
	}
	// A schedule has the same times on each of its days: the gaps within one of
	// them are those within all, and the others are from one of them to another.
	first := rs.Schedule.Next(now.UTC())
	if first.IsZero() {
		return maxRotationPeriod // it never comes
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
			return maxRotationPeriod // it does not come again
		}
		longest = max(longest, next.Sub(last))
		last = next.Add(span)
	}
	return longest
}

// threeRotations is how long it takes from now until three rotations in a row
// would have been missed; a year where a time is beyond that, and 0 when two
// would take longer than a year already.
func (s *schedule) threeRotations(now time.Time) time.Duration {
	rs := s.parsed()
	if rs == nil {
		return 0
	}
	at := now.UTC()
	for n := range 3 {
		at = rotation.DefaultScheduler.NextRotationTimeFromInput(rs, at)
		if n < 2 && (at.IsZero() || at.Sub(now) > client.MaxExpiry) {
			return 0
		}
	}
	if at.IsZero() {
		return client.MaxExpiry
	}
	return min(at.Sub(now).Truncate(time.Second), client.MaxExpiry)
}
