package openaisecrets

// This file owns usage reports: what the keys of this mount cost, by role, client, team,
// key, model or day.
//
// What must stay true: the rows, the unattributed costs and those of other roles add up
// to OpenAI's total, to the digit; each report is read from OpenAI, and no figure is
// stored. The memory is that of the answer: records are read one entry at a time.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	// reportFresh is how long a report is returned again, reportUsable how long in place
	// of an error of OpenAI.
	reportFresh  = time.Minute
	reportUsable = time.Hour
	// maxReports and maxReportRows bound the reports in memory.
	maxReports    = 8
	maxReportRows = 20_000
	// settlingDays is how many days, with the present one, OpenAI may still restate. It
	// publishes no figure.
	settlingDays = 3
	// entityFresh is how long the name and metadata of an entity are used again.
	entityFresh = 5 * time.Minute
	maxEntities = 10_000
)

// The groups of a report, beside metadata:<name>.
const (
	byRole        = "role"
	byEntity      = "entity"
	byDisplayName = "display_name"
	byKey         = "key"
	byModel       = "model"
	byDay         = "day"
	byMetadata    = "metadata:"
)

var usageGroups = []string{byRole, byEntity, byDisplayName, byKey, byModel, byDay}

// noValue is the group of keys without a value, such as those of a client without entity.
const noValue = "(none)"

// usageQuery is what a report is of. It is comparable.
type usageQuery struct {
	start, end time.Time // UTC days; end is the day after the last
	group      string
	role       string // "" for all
	tokens     bool
}

// usageCounts is what keys did.
type usageCounts struct{ requests, input, cached, output int64 }

func (n *usageCounts) add(m usageCounts) {
	n.requests, n.input, n.cached, n.output = n.requests+m.requests, n.input+m.input, n.cached+m.cached, n.output+m.output
}

// usageSum is a cost, with what was done for it.
type usageSum struct {
	cost *big.Rat
	usageCounts
}

func newUsageSum() *usageSum { return &usageSum{cost: new(big.Rat)} }

func (s *usageSum) add(t *usageSum) {
	s.cost.Add(s.cost, t.cost)
	s.usageCounts.add(t.usageCounts)
}

// usageRow is a group of a report.
type usageRow struct {
	group string
	name  string // of an entity, "" if unknown
	usageSum
}

// usageReport is immutable.
type usageReport struct {
	rows                               []usageRow // dearest first, days in order
	others, unattributed, total        *usageSum  // others: of keys of other roles than the query's
	unread                             int        // entries of records that could not be read
	omitted                            int        // archived projects that OpenAI refuses to report
	retention                          time.Duration
	recordsIdentity, someoneUnresolved bool
	readAt                             time.Time
}

// usageReports are the reports of this process.
type usageReports struct {
	mu       sync.Mutex
	flights  map[usageQuery]*usageFlight
	reports  *lru.Cache[usageQuery, *usageReport]
	entities *lru.Cache[string, knownEntity]
}

type usageFlight struct {
	done   chan struct{}
	report *usageReport
	err    error
}

type knownEntity struct {
	*logical.Entity // nil if it is deleted
	at              time.Time
}

func newUsageReports() *usageReports {
	reports, _ := lru.New[usageQuery, *usageReport](maxReports) // its only error is a size below 1
	entities, _ := lru.New[string, knownEntity](maxEntities)
	return &usageReports{flights: map[usageQuery]*usageFlight{}, reports: reports, entities: entities}
}

// report returns a report of at most a minute ago, or one that is read now, once for all
// that ask for it. If OpenAI does not answer, it returns an older one, with the error.
func (b *backend) report(ctx context.Context, req *logical.Request, q usageQuery) (report *usageReport, stale, err error) {
	u := b.reports
	u.mu.Lock()
	last, _ := u.reports.Get(q)
	if last != nil && b.now().Sub(last.readAt).Abs() < reportFresh {
		u.mu.Unlock()
		return last, nil, nil
	}
	f := u.flights[q]
	if f == nil {
		f = &usageFlight{done: make(chan struct{})}
		u.flights[q] = f
		req := &logical.Request{Storage: req.Storage, MountPoint: req.MountPoint}
		go func() { //nolint:contextcheck // it is of all that wait
			ctx, cancel := context.WithTimeout(b.lifetime, requestBudget)
			defer cancel()
			f.report, f.err = b.readReport(ctx, req, q)
			u.mu.Lock()
			defer u.mu.Unlock()
			delete(u.flights, q)
			if f.err == nil && len(f.report.rows) <= maxReportRows {
				u.reports.Add(q, f.report)
			}
			close(f.done)
		}()
	}
	u.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	if f.err == nil {
		return f.report, nil, nil
	}
	if e := client.AsError(f.err); e != nil && e.Blame() == client.BlameServer && last != nil && b.now().Sub(last.readAt).Abs() < reportUsable {
		return last, f.err, nil
	}
	return nil, nil, f.err
}

// readReport reads a report from OpenAI and joins it with the records.
func (b *backend) readReport(ctx context.Context, req *logical.Request, q usageQuery) (*usageReport, error) {
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	r := &usageReport{others: newUsageSum(), unattributed: newUsageSum(), total: newUsageSum(), retention: snap.config.UsageRetention, recordsIdentity: snap.config.UsageRecordIdentity, readAt: b.now()}
	cells, err := b.readCells(ctx, req, q, r)
	if err != nil {
		return nil, err
	}
	owners, known, err := b.owners(ctx, req.Storage, q, cells, r)
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, clientError(fmt.Sprintf("role %q not found, and no usage record names it; run \"vault list %sroles\" to list roles; a static role is %s<name>", q.role, req.MountPoint, staticLabel))
	}
	rows := map[string]*usageSum{}
	for cell, sum := range cells {
		r.total.add(sum)
		owner, ours := owners[cell.key]
		switch {
		case !ours:
			r.unattributed.add(sum)
		case q.role != "" && owner.role != q.role:
			r.others.add(sum)
		default:
			group := owner.group
			if q.group == byModel || q.group == byDay {
				group = cell.group
			}
			if rows[group] == nil {
				rows[group] = newUsageSum()
			}
			rows[group].add(sum)
		}
	}
	if err := b.nameRows(ctx, q, rows, r); err != nil {
		return nil, err
	}
	return r, nil
}

// readCells returns the costs, and what was done for them, by key and by the group of the
// query as far as it depends on the cost and not on the key.
func (b *backend) readCells(ctx context.Context, req *logical.Request, q usageQuery, r *usageReport) (map[costCell]*usageSum, error) {
	var by func(client.Cost) string
	used := func(client.Usage) string { return "" }
	switch q.group {
	case byModel:
		by, used = func(c client.Cost) string { return modelOf(c.LineItem) }, func(n client.Usage) string { return n.Model }
	case byDay:
		by, used = func(c client.Cost) string { return c.Day.Format(time.DateOnly) }, func(n client.Usage) string { return n.Day.Format(time.DateOnly) }
	}
	costs, err := b.readCosts(ctx, req, q.start, q.end, by)
	if err != nil {
		return nil, err
	}
	r.omitted = costs.omitted
	cells := make(map[costCell]*usageSum, len(costs.cells))
	for cell, amount := range costs.cells {
		cells[cell] = &usageSum{cost: amount}
	}
	if !q.tokens {
		return cells, nil
	}
	counts := map[costCell]usageCounts{}
	omitted, err := b.readUsage(ctx, req, func(snap *snapshot, projects [][]string) error {
		clear(counts) // again after a rotation
		for _, kind := range client.UsageKinds {
			for _, some := range projects {
				err := snap.api.EachUsage(ctx, kind, q.start, q.end, some, func(results []client.Usage) error {
					for _, n := range results {
						cell := costCell{n.KeyID, used(n)}
						sum := counts[cell]
						sum.add(usageCounts{n.Requests, n.InputTokens, n.CachedTokens, n.OutputTokens})
						counts[cell] = sum
					}
					return nil
				})
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	for cell, n := range counts {
		if cells[cell] == nil {
			cells[cell] = newUsageSum()
		}
		cells[cell].usageCounts = n
	}
	r.omitted = max(r.omitted, omitted)
	return cells, err
}

// keyOwner is the part of a record that a report needs.
type keyOwner struct{ role, group string }

// owners finds the owners of the keys in the cells. known reports whether the role of the
// query exists or has existed.
func (b *backend) owners(ctx context.Context, s logical.Storage, q usageQuery, cells map[costCell]*usageSum, r *usageReport) (owners map[string]keyOwner, known bool, err error) {
	wanted := map[string]bool{}
	for cell := range cells {
		wanted[cell.key] = true
	}
	delete(wanted, "")
	owners, known = map[string]keyOwner{}, q.role == ""
	shared := map[string]string{} // one copy of each text
	intern := func(text string) string {
		if have, found := shared[text]; found {
			return have
		}
		shared[text] = text
		return text
	}
	unread, err := b.eachKnownKey(ctx, s, func(record *usageRecord) {
		role := record.role()
		known = known || role == q.role
		if !wanted[record.KeyID] {
			return
		}
		// The first record counts: a later one is the same, or lacks its client.
		if have, found := owners[record.KeyID]; !found || have.group == noValue {
			owners[record.KeyID] = keyOwner{intern(role), intern(q.groupOf(record))}
		}
	})
	r.unread = unread
	if err != nil || known {
		return owners, known, err
	}
	name, static := strings.CutPrefix(q.role, staticLabel)
	if strings.Contains(name, "/") { // not a name, nor a storage key
		return owners, false, nil
	}
	if static {
		role, err := getStaticRole(ctx, s, name)
		return owners, role != nil, err
	}
	role, err := b.roles.get(ctx, s, q.role)
	return owners, role != nil, err
}

// groupOf is the group of a key. A static role has no client, so it stands for itself.
func (q usageQuery) groupOf(r *usageRecord) string {
	group := ""
	switch {
	case q.group == byRole:
		return r.role()
	case q.group == byKey:
		return r.KeyID
	case q.group == byModel, q.group == byDay:
		return ""
	case r.StaticRole != "":
		return r.role()
	case q.group == byDisplayName:
		group = r.DisplayName
	default: // by entity, or by its metadata
		group = r.EntityID
	}
	return cmp.Or(group, noValue)
}

// nameRows makes the rows of the report, with the entities of a grouping by metadata
// merged by its value.
func (b *backend) nameRows(ctx context.Context, q usageQuery, sums map[string]*usageSum, r *usageReport) error {
	metadata, merge := strings.CutPrefix(q.group, byMetadata)
	names := map[string]string{}
	if merge || q.group == byEntity {
		merged := map[string]*usageSum{}
		for _, id := range slices.Sorted(maps.Keys(sums)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			group := id
			if id != noValue && !strings.HasPrefix(id, staticLabel) {
				entity, err := b.entity(id)
				r.someoneUnresolved = r.someoneUnresolved || err != nil
				switch {
				case entity == nil: // deleted, or not known now
				case merge:
					group = cmp.Or(entity.Metadata[metadata], noValue)
				default:
					names[id] = entity.Name
				}
			}
			if merged[group] == nil {
				merged[group] = newUsageSum()
			}
			merged[group].add(sums[id])
		}
		sums = merged
	}
	for group, sum := range sums {
		r.rows = append(r.rows, usageRow{group: group, name: names[group], usageSum: *sum})
	}
	slices.SortFunc(r.rows, func(x, y usageRow) int {
		if q.group != byDay {
			if order := y.cost.Cmp(x.cost); order != 0 {
				return order
			}
		}
		return cmp.Compare(x.group, y.group)
	})
	return nil
}

// entity returns an entity, nil if it is deleted.
func (b *backend) entity(id string) (*logical.Entity, error) {
	if known, ok := b.reports.entities.Get(id); ok && b.now().Sub(known.at).Abs() < entityFresh {
		return known.Entity, nil
	}
	entity, err := b.System().EntityInfo(id)
	if err != nil {
		return nil, err
	}
	b.reports.entities.Add(id, knownEntity{entity, b.now()})
	return entity, nil
}

// settled returns until when the figures of a window are unlikely to change.
func (q usageQuery) settled(now time.Time) time.Time {
	last := now.UTC().Truncate(usageDay).AddDate(0, 0, 1-settlingDays)
	return later(q.start, earlier(q.end, last))
}

// warnings of a report.
func (r *usageReport) warnings(q usageQuery, now time.Time) (all []string) {
	if settled := q.settled(now); settled.Before(q.end) {
		all = append(all, fmt.Sprintf("OpenAI may still change the figures of %s and later days.", settled.Format(time.DateOnly)))
	}
	switch {
	case r.retention == 0:
		all = append(all, "usage_retention of the config is 0, so the engine does not record who has a key, and all costs of leases are unattributed.")
	case q.start.Before(now.Add(-r.retention).Truncate(usageDay)):
		all = append(all, fmt.Sprintf("The engine records who had a key for %d days (usage_retention of the config), so costs of earlier days may be unattributed.", r.retention/usageDay))
	}
	identity := q.group == byEntity || q.group == byDisplayName || strings.HasPrefix(q.group, byMetadata)
	if identity && !r.recordsIdentity {
		all = append(all, "usage_record_identity of the config is false, so the engine does not record which client has a key.")
	}
	if r.someoneUnresolved {
		all = append(all, "Vault did not return some entities, so their costs are shown under the entity IDs.")
	}
	if r.omitted > 0 {
		all = append(all, fmt.Sprintf("OpenAI refused to report %d of the projects, which are archived, so their figures are missing; the log has its answer.", r.omitted))
	}
	if r.unread > 0 {
		all = append(all, fmt.Sprintf("%d entries of usage records could not be read, so the costs of their keys are unattributed; the log names the entries.", r.unread))
	}
	return all
}

// label is a group as part of a field's name.
func (r usageRow) label() string { return printable(cmp.Or(r.name, r.group)) }

// printable is text on one line that does nothing to a terminal.
func printable(text string) string {
	return strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, text)
}

// labels returns the label of each row. Rows whose labels are the same, such as two
// entities of the same name, have their group as well.
func (r *usageReport) labels() []string {
	count := map[string]int{}
	for _, row := range r.rows {
		count[row.label()]++
	}
	labels, taken := make([]string, len(r.rows)), map[string]bool{}
	for i, row := range r.rows {
		labels[i] = row.label()
		if count[labels[i]] > 1 {
			labels[i] = fmt.Sprintf("%s (%q)", labels[i], row.group)
		}
		for n := 2; taken[labels[i]]; n++ {
			labels[i] = fmt.Sprintf("%s #%d", row.label(), n)
		}
		taken[labels[i]] = true
	}
	return labels
}

// parseUsageGroup returns the problem with a grouping, "" if there is none.
func parseUsageGroup(group string) (problem string) {
	if name, isMetadata := strings.CutPrefix(group, byMetadata); isMetadata {
		if name == "" {
			return "group_by=metadata: requires the name of a metadata key of the entities, such as metadata:team"
		}
		return ""
	}
	if !slices.Contains(usageGroups, group) {
		return fmt.Sprintf("group_by %.64q is unknown; use %s, or metadata:<name>", group, strings.Join(usageGroups, ", "))
	}
	return ""
}

// parseUsageWindow reads the days of a window, both inclusive; "" for the month to date.
func parseUsageWindow(start, end string, now time.Time) (from, until time.Time, problem string) {
	today := now.UTC().Truncate(usageDay)
	until = today
	for name, given := range map[string]struct {
		text string
		into *time.Time
	}{"start": {start, &from}, "end": {end, &until}} {
		if given.text == "" {
			continue
		}
		day, err := time.Parse(time.DateOnly, given.text)
		if err != nil {
			return from, until, fmt.Sprintf("%s must be a day in UTC, such as %s", name, today.Format(time.DateOnly))
		}
		if day.After(today) {
			return from, until, fmt.Sprintf("%s %s is in the future; today is %s in UTC", name, given.text, today.Format(time.DateOnly))
		}
		*given.into = day
	}
	if start == "" {
		from = until.AddDate(0, 0, 1-until.Day())
	}
	until = until.AddDate(0, 0, 1)
	switch days := int(until.Sub(from) / usageDay); {
	case days < 1:
		return from, until, fmt.Sprintf("start %s is after end %s", from.Format(time.DateOnly), until.AddDate(0, 0, -1).Format(time.DateOnly))
	case days > client.MaxCostDays:
		return from, until, fmt.Sprintf("start and end are %d days apart; the limit is %d days, both included", days, client.MaxCostDays)
	}
	return from, until, ""
}

// usageError is the response or error of a report that could not be read.
func usageError(err error) (*logical.Response, error) {
	e := client.AsError(err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded) && e == nil:
		return nil, logical.CodedError(http.StatusBadGateway, "usage not read: OpenAI did not answer all calls in time; request fewer days, or omit detail")
	case e != nil && e.Blame() == client.BlamePermission:
		return logical.ErrorResponse("usage not read: the engine's admin key lacks the permission api.usage.read; grant it at %s, or write another admin_api_key to the config; everything else works without it: %s", adminKeysPage, err), nil
	case e != nil && e.Param == "start_time":
		return logical.ErrorResponse("start: OpenAI rejects this day; costs by key exist since about December 2025: %s", err), nil
	}
	return errorResponse("usage not read", err)
}
