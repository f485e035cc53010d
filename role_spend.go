package openaisecrets

// This file owns the spending fields of roles and static roles, and the exact form of
// their amount.
//
// What must stay true: an amount is a whole number of cents, never a float.

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
)

// The values of spend_window: the UTC days or months in which OpenAI counts costs.
const (
	windowMonth = "month"
	windowDay   = "day"
)

// The values of spend_action: what happens when the keys of a role reach its limit.
const (
	actionWarn   = "warn"   // a log line, an event and a metric
	actionBlock  = "block"  // also, no key is returned and no lease renewed
	actionRevoke = "revoke" // also, the role's keys are deleted
)

// spendRule is the spending fields of a role or static role. Window and action are "" for
// the default, as in entries stored before the fields existed.
type spendRule struct {
	// SpendLimit is in cents, 0 for no limit.
	SpendLimit  int64  `json:"spend_limit_cents,omitempty"`
	SpendWindow string `json:"spend_window,omitempty"`
	SpendAction string `json:"spend_action,omitempty"`
}

func (s *spendRule) window() string { return cmp.Or(s.SpendWindow, windowMonth) }

func (s *spendRule) action() string { return cmp.Or(s.SpendAction, actionWarn) }

// addSpendFields adds the fields of a path whose roles allow these actions.
func addSpendFields(fields map[string]*framework.FieldSchema, actions ...any) {
	what := "warn (log it and raise the metric; the default) or block (return no key)"
	if len(actions) > 2 {
		what = "warn (log it and raise the metric; the default), block (also issue and renew nothing), or revoke (also delete the role's keys, those with the highest costs first)"
	}
	fields["spend_limit"] = &framework.FieldSchema{
		Type:         framework.TypeString,
		Description:  "Costs of the role's keys in spend_window, in US dollars, at which spend_action applies, such as 50 or 12.50. Not a cap: it applies after OpenAI's own delay in reporting costs, plus usage_interval. Requires usage_interval and usage_retention in the config. Empty or 0 disables it.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Spend limit"},
	}
	fields["spend_window"] = &framework.FieldSchema{
		Type:          framework.TypeString,
		Description:   "Time in which costs count, by UTC: month (the default) or day. It also ends what spend_action does.",
		AllowedValues: []any{windowMonth, windowDay},
		DisplayAttrs:  &framework.DisplayAttributes{Name: "Spend window"},
	}
	fields["spend_action"] = &framework.FieldSchema{
		Type:          framework.TypeString,
		Description:   "What happens at spend_limit: " + what + ".",
		AllowedValues: actions,
		DisplayAttrs:  &framework.DisplayAttributes{Name: "Spend action"},
	}
}

// spendResponse adds the fields that only a read of a role has.
func spendResponse(fields map[string]*framework.FieldSchema) {
	fields["spend_blocked_until"] = &framework.FieldSchema{Type: framework.TypeString, Description: "Time at which the block by spend_limit ends (RFC 3339); null while the role is not blocked.", Required: true}
	fields["spend_at_block"] = &framework.FieldSchema{Type: framework.TypeString, Description: "Costs in US dollars at which the role was blocked; null while it is not blocked.", Required: true}
}

// show adds the effective values to the fields of a role.
func (s *spendRule) show(data map[string]any) {
	data["spend_limit"] = ""
	if s.SpendLimit != 0 {
		data["spend_limit"] = cents(s.SpendLimit)
	}
	data["spend_window"], data["spend_action"] = s.window(), s.action()
}

// merge applies the spending fields of a write.
func (s *spendRule) merge(d *framework.FieldData, actions ...string) (problem string) {
	if raw, ok := d.GetOk("spend_limit"); ok {
		if s.SpendLimit, problem = parseAmount(raw.(string)); problem != "" {
			return problem
		}
	}
	window, action := s.window(), s.action()
	if problem := parseEnum(d, "spend_window", &window, windowMonth, windowDay); problem != "" {
		return problem
	}
	if problem := parseEnum(d, "spend_action", &action, actions...); problem != "" {
		return problem
	}
	if s.SpendWindow = window; window == windowMonth {
		s.SpendWindow = ""
	}
	if s.SpendAction = action; action == actionWarn {
		s.SpendAction = ""
	}
	return ""
}

// windowOf returns the bounds of the window that has a UTC day.
func windowOf(window string, day time.Time) (start, end time.Time) {
	if window == windowDay {
		return day, day.AddDate(0, 0, 1)
	}
	month := day.AddDate(0, 0, 1-day.Day())
	return month, month.AddDate(0, 1, 0)
}

// longestMonth is the usage_retention that a month's costs need: without the record of a
// key, its costs count for no role.
const longestMonth = 31 * 24 * time.Hour

// lacks returns what the config, nil for none, lacks for the limit, "" if nothing.
func (s *spendRule) lacks(cfg *config) (problem string) {
	switch {
	case s.SpendLimit == 0:
		return ""
	case cfg == nil || cfg.UsageInterval == 0 || cfg.UsageRetention == 0:
		return "spend_limit requires usage_interval and usage_retention in the config, because the engine compares it with the recorded costs"
	case s.window() == windowMonth && cfg.UsageRetention < longestMonth:
		return "spend_window=month requires a usage_retention of 31 days or more in the config"
	}
	return ""
}

var amountForm = regexp.MustCompile(`^([0-9]{1,12})(?:\.([0-9]{1,2}))?$`)

// parseAmount reads an amount in dollars, "" for 0, into cents.
func parseAmount(amount string) (all int64, problem string) {
	if amount == "" {
		return 0, ""
	}
	parts := amountForm.FindStringSubmatch(amount)
	if parts == nil {
		return 0, fmt.Sprintf("spend_limit must be an amount in US dollars with at most two decimals, such as 50 or 12.50, not %.64q", amount)
	}
	all, _ = strconv.ParseInt(parts[1]+(parts[2] + "00")[:2], 10, 64) // at most 14 digits
	return all, ""
}

// cents is an amount as a decimal.
func cents(all int64) string { return fmt.Sprintf("%d.%02d", all/100, all%100) }
