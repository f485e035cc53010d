package openaisecrets

// This file owns the refresh of the costs that the metrics show: of each role, for the
// present day, the seven days before it, and the month to date.
//
// What must stay true: a failed refresh leaves the figures as they are and lets them grow
// old, never 0; each cluster refreshes the costs of the credentials that it issued.

import (
	"context"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	// windowWeek is the window of the metrics beside windowDay and windowMonth.
	windowWeek     = "previous_7_days" // without the present day
	spendWeek      = 7
	refreshBudget  = 5 * time.Minute
	unattributedTo = "" // stands for a role
)

// spending is what roles cost in each window. It is immutable.
type spending struct {
	day   time.Time                      // the present one, UTC
	roles map[string]map[string]*big.Rat // by role, unattributedTo for the rest; then by window
	total map[string]*big.Rat            // by window
}

// usageRefresh holds the last refresh of this process.
type usageRefresh struct {
	mu      sync.Mutex
	last    *spending // nil before the first
	tried   time.Time
	succeed time.Time // zero if none has
	since   time.Time // when refreshes began; zero if they are disabled
}

// refreshUsage refreshes the figures if it is time to.
func (b *backend) refreshUsage(ctx context.Context, req *logical.Request) error {
	u, now := b.spending, b.now()
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return nil // others report that the config is missing or cannot be read
	}
	interval := snap.config.UsageInterval
	u.mu.Lock()
	if interval == 0 {
		u.last, u.tried, u.succeed, u.since = nil, time.Time{}, time.Time{}, time.Time{}
	}
	due := interval != 0 && now.Sub(u.tried).Abs() >= interval
	if due {
		u.tried = now
		if u.since.IsZero() {
			u.since = now
		}
	}
	u.mu.Unlock()
	if !due {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, refreshBudget)
	defer cancel()
	// The days are OpenAI's, and its answer tells its time.
	figures, err := b.readSpending(ctx, req, b.openAINow(snap))
	if err == nil && !figures.day.Equal(b.openAINow(snap).UTC().Truncate(usageDay)) {
		figures, err = b.readSpending(ctx, req, b.openAINow(snap))
	}
	if err != nil {
		return fmt.Errorf("the metrics keep their last figures: %w", err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.last, u.succeed = figures, now
	return nil
}

// readSpending reads the costs of all windows.
func (b *backend) readSpending(ctx context.Context, req *logical.Request, now time.Time) (*spending, error) {
	day := now.UTC().Truncate(usageDay)
	month, week := day.AddDate(0, 0, 1-day.Day()), day.AddDate(0, 0, -spendWeek)
	windows := func(at string) (in []string) {
		if at == day.Format(time.DateOnly) {
			in = append(in, windowDay)
		} else if at >= week.Format(time.DateOnly) {
			in = append(in, windowWeek)
		}
		if at >= month.Format(time.DateOnly) {
			in = append(in, windowMonth)
		}
		return in
	}
	costs, err := b.readCosts(ctx, req, earlier(month, week), day.AddDate(0, 0, 1), func(c client.Cost) string { return c.Day.Format(time.DateOnly) })
	if err != nil {
		return nil, err
	}
	roleOf := map[string]string{}
	for cell := range costs.cells {
		roleOf[cell.key] = unattributedTo
	}
	delete(roleOf, "")
	if _, err := b.eachKnownKey(ctx, req.Storage, func(r *usageRecord) {
		if _, wanted := roleOf[r.KeyID]; wanted {
			roleOf[r.KeyID] = r.role()
		}
	}); err != nil {
		return nil, err
	}
	s := &spending{day: day, roles: map[string]map[string]*big.Rat{unattributedTo: newWindows()}, total: newWindows()}
	for cell, amount := range costs.cells {
		role := roleOf[cell.key]
		if s.roles[role] == nil {
			s.roles[role] = newWindows()
		}
		for _, window := range windows(cell.group) {
			s.roles[role][window].Add(s.roles[role][window], amount)
			s.total[window].Add(s.total[window], amount)
		}
	}
	return s, nil
}

func newWindows() map[string]*big.Rat {
	return map[string]*big.Rat{windowDay: new(big.Rat), windowWeek: new(big.Rat), windowMonth: new(big.Rat)}
}

// figures returns the last refresh, nil if there is none, and when it was. enabled is
// false without refreshes.
func (u *usageRefresh) figures() (last *spending, at time.Time, enabled bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.last, u.succeed, !u.since.IsZero()
}

// windows are those of the figures, none before the first refresh.
func (s *spending) windows() []string {
	if s == nil {
		return nil
	}
	return []string{windowDay, windowWeek, windowMonth}
}

// byRole returns the costs of the roles in a window.
func (s *spending) byRole(window string) map[string]float64 {
	costs := map[string]float64{}
	for role, windows := range s.roles {
		if role != unattributedTo {
			costs[role] = float(windows[window])
		}
	}
	return costs
}

func (s *spending) unattributed(window string) float64 { return float(s.roles[unattributedTo][window]) }

// float is an amount for a gauge, which is not exact.
func float(amount *big.Rat) float64 {
	value, _ := amount.Float64()
	return value
}
