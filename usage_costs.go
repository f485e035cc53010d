package openaisecrets

// This file owns the reading of costs: which projects, with which admin key, and their
// sums.
//
// What must stay true: a sum is of a complete answer or there is none; amounts are added
// exactly.

import (
	"context"
	"fmt"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	usageDay = 24 * time.Hour
	// projectsPerCall bounds the length of a query.
	projectsPerCall = 50
)

// costCell is what an amount is of: a key, "" for costs without one, and a group within
// it, which by chooses.
type costCell struct{ key, group string }

// costs are sums of what OpenAI says that the projects of this mount cost in a window.
type costs struct {
	by      func(client.Cost) string // nil for sums by key alone
	cells   map[costCell]*big.Rat
	total   *big.Rat
	omitted int // archived projects that OpenAI refuses to report
}

func (c *costs) add(some []client.Cost) error {
	for _, one := range some {
		cell := costCell{key: one.KeyID}
		if c.by != nil {
			cell.group = c.by(one)
		}
		sum := c.cells[cell]
		if sum == nil {
			sum = new(big.Rat)
			c.cells[cell] = sum
		}
		sum.Add(sum, one.Amount)
		c.total.Add(c.total, one.Amount)
	}
	return nil
}

// readCosts returns the costs of all recorded projects from the UTC day start until
// before end, by key and by what by chooses.
func (b *backend) readCosts(ctx context.Context, req *logical.Request, start, end time.Time, by func(client.Cost) string) (*costs, error) {
	var sums *costs
	omitted, err := b.readUsage(ctx, req, func(snap *snapshot, projects [][]string) error {
		sums = &costs{by: by, cells: map[costCell]*big.Rat{}, total: new(big.Rat)} // again after a rotation
		for _, some := range projects {
			if err := snap.api.EachCost(ctx, start, end, some, sums.add); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	sums.omitted = omitted
	return sums, nil
}

// readUsage calls read with the recorded projects, in parts that fit into a query. It
// calls again from the start if a rotation has replaced the admin key, and without the
// archived projects if OpenAI refuses; omitted is their number.
func (b *backend) readUsage(ctx context.Context, req *logical.Request, read func(snap *snapshot, projects [][]string) error) (omitted int, err error) {
	snap, err := b.current(ctx, req.Storage)
	if err != nil {
		return 0, err
	}
	projects, err := req.Storage.List(ctx, projectStoragePrefix)
	if err != nil {
		return 0, fmt.Errorf("listing the projects: %w", err)
	}
	readAll := func(projects []string) error {
		parts := slices.Collect(slices.Chunk(projects, projectsPerCall))
		return b.retryWithCurrentKey(ctx, req, &snap, func(snap *snapshot) error { return read(snap, parts) })
	}
	err = readAll(projects)
	if e := client.AsError(err); e == nil || e.Status != http.StatusBadRequest && e.Status != http.StatusNotFound {
		return 0, err
	}
	// Whether OpenAI answers about archived projects is not documented. If it does not, the
	// costs of the others must still be read.
	var others []string
	for _, id := range projects {
		entry, unread := getProjectEntry(ctx, req.Storage, id)
		if unread != nil || entry == nil || entry.ArchivedSince.IsZero() {
			others = append(others, id)
		}
	}
	omitted = len(projects) - len(others)
	if omitted == 0 {
		return 0, err
	}
	b.log(req).Warn("costs of archived projects are not counted", "projects", omitted, "error", err)
	return omitted, readAll(others)
}

// modelOf is the model of a line item such as "gpt-5-mini, input_tokens", and the line
// item itself if it has no model.
func modelOf(lineItem string) string {
	if i := strings.LastIndex(lineItem, ", "); i > 0 {
		return lineItem[:i]
	}
	return lineItem
}

// dollars is an amount in full: every decimal fraction ends.
func dollars(amount *big.Rat) string {
	digits, _ := amount.FloatPrec()
	return amount.FloatString(digits)
}
