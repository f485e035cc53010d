package client

// This file owns costs and usage: what OpenAI says that keys cost and did in a window of
// UTC days.
//
// What must stay true: an amount is an exact decimal, never a float; a window is read to
// its end or the call fails, so that a sum is never of a part.

import (
	"bytes"
	"context"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"time"
)

// Cost is what a key cost on one day for one line item.
type Cost struct {
	Day      time.Time // its start, UTC
	KeyID    string    // "" for costs without a key
	LineItem string    // such as "gpt-5-mini, input_tokens"; may be empty
	Amount   *big.Rat  // US dollars; negative for a credit
}

// Usage is what a key did on one day with one model.
type Usage struct {
	Day                       time.Time
	KeyID, Model              string // may be empty
	Requests                  int64
	InputTokens, CachedTokens int64 // CachedTokens are part of InputTokens
	OutputTokens              int64
}

// UsageKinds are the kinds of usage that OpenAI counts in requests.
var UsageKinds = []string{"completions", "embeddings", "images", "audio_speeches", "audio_transcriptions", "moderations"}

// MaxCostDays is the longest window that OpenAI accepts.
const MaxCostDays = 180

const (
	day = 24 * time.Hour
	// maxPageOfDays bounds a page of several days, maxDay one of a single day: a busy
	// organization has hundreds of thousands of results a day.
	maxPageOfDays = 8 << 20
	maxDay        = 64 << 20
)

// pageDays are the sizes of a page in days: a smaller one follows if an answer is too
// large. OpenAI allows 31 for usage, more for costs.
var pageDays = []int{31, 7, 1}

// EachCost reads the costs of some projects from the day start until before end, by key
// and line item. It calls each with the results of one day at a time, ascending.
func (c *Client) EachCost(ctx context.Context, start, end time.Time, projects []string, each func([]Cost) error) error {
	const what = "read costs"
	return eachDay(ctx, c, request{operation: getCosts, what: what, query: usageQuery(projects, "line_item")}, start, end,
		func(at time.Time, results []costResult) error {
			costs := make([]Cost, len(results))
			for i := range results {
				costs[i] = Cost{Day: at, KeyID: string(results[i].KeyID), LineItem: string(results[i].LineItem), Amount: results[i].Amount.Value.Rat}
			}
			return each(costs)
		})
}

// EachUsage is EachCost for the usage of a kind, by key and model.
func (c *Client) EachUsage(ctx context.Context, kind string, start, end time.Time, projects []string, each func([]Usage) error) error {
	if !slices.Contains(UsageKinds, kind) {
		return c.refuse("read usage", "unknown kind of usage "+kind)
	}
	return eachDay(ctx, c, request{operation: getUsage(kind), what: "read usage of " + kind, query: usageQuery(projects, "model")}, start, end,
		func(at time.Time, results []usageResult) error {
			usages := make([]Usage, len(results))
			for i, r := range results {
				usages[i] = Usage{Day: at, KeyID: string(r.KeyID), Model: string(r.Model), Requests: r.Requests, InputTokens: r.Input, CachedTokens: r.Cached, OutputTokens: r.Output}
			}
			return each(usages)
		})
}

func usageQuery(projects []string, group string) url.Values {
	return url.Values{"bucket_width": {"1d"}, "group_by[]": {"api_key_id", group}, "project_ids[]": projects}
}

// eachDay reads a window page by page. The days of an answer ascend, so a day that comes
// twice is an error and not counted twice.
func eachDay[T interface{ valid() bool }](ctx context.Context, c *Client, r request, start, end time.Time, each func(time.Time, []T) error) error {
	broken := func(format string, args ...any) error {
		return &Error{Op: c.clean(r.what), Host: c.host, Status: http.StatusOK, Sent: true, Message: fmt.Sprintf(format, args...)}
	}
	query, sizes, next := r.query, pageDays, start
	seen := map[string]bool{}
	for range maxPages {
		r.query = url.Values{"limit": {strconv.Itoa(sizes[0])}, "end_time": {strconv.FormatInt(end.Unix(), 10)}}
		for name, values := range query {
			r.query[name] = values
		}
		if r.query.Get("start_time") == "" {
			r.query.Set("start_time", strconv.FormatInt(next.Unix(), 10))
		}
		r.maxBody = maxPageOfDays
		if sizes[0] == 1 {
			r.maxBody = maxDay
		}
		got, err := doWithRetry[usagePage[T]](ctx, c, r)
		if isTooLarge(err) && len(sizes) > 1 {
			// A cursor is bound to its query, so the rest is another query.
			sizes = sizes[1:]
			query = without(query, "start_time", "page")
			clear(seen)
			continue
		}
		if err != nil {
			return err
		}
		for _, b := range got.Data {
			at := b.Start.time()
			if at.Before(next) || !at.Before(end) {
				return broken("the answer has the day %s twice, or outside of the window", at.Format(time.DateOnly))
			}
			next = at.Add(day)
			if len(b.Results) == 0 {
				continue
			}
			if err := each(at, b.Results); err != nil {
				return err
			}
		}
		if !*got.HasMore || !next.Before(end) {
			return nil
		}
		cursor := string(got.Next)
		if cursor == "" || seen[cursor] {
			return broken("the answer repeats itself before its end")
		}
		seen[cursor] = true
		query = without(query, "page")
		query.Set("start_time", r.query.Get("start_time"))
		query.Set("page", cursor)
	}
	return broken("the answer has more than %d pages", maxPages)
}

// without returns a copy of a query without some parameters.
func without(query url.Values, names ...string) url.Values {
	rest := url.Values{}
	for name, values := range query {
		if !slices.Contains(names, name) {
			rest[name] = values
		}
	}
	return rest
}

// usagePage is a page of days in an answer.
type usagePage[T interface{ valid() bool }] struct {
	Data []struct {
		Start   unixTime `json:"start_time"`
		Results []T      `json:"results"`
	} `json:"data"`
	HasMore *bool `json:"has_more"`
	Next    label `json:"next_page"`
}

func (p usagePage[T]) valid() bool {
	if p.Data == nil || p.HasMore == nil {
		return false
	}
	for _, b := range p.Data {
		if b.Start == 0 || b.Results == nil || slices.ContainsFunc(b.Results, func(r T) bool { return !r.valid() }) {
			return false
		}
	}
	return true
}

type costResult struct {
	Amount struct {
		Value    decimal `json:"value"`
		Currency label   `json:"currency"`
	} `json:"amount"`
	KeyID    label `json:"api_key_id"`
	LineItem label `json:"line_item"`
}

// valid rejects an amount that is missing or in another currency: a sum would be wrong.
func (r costResult) valid() bool {
	return r.Amount.Value.Rat != nil && (r.Amount.Currency == "usd" || r.Amount.Currency == "")
}

type usageResult struct {
	KeyID    label `json:"api_key_id"`
	Model    label `json:"model"`
	Requests int64 `json:"num_model_requests"`
	Input    int64 `json:"input_tokens"`
	Cached   int64 `json:"input_cached_tokens"`
	Output   int64 `json:"output_tokens"`
}

func (usageResult) valid() bool { return true }

// decimal is a number, or a string with one, as OpenAI returns amounts; nil for any other
// value. The form is bounded, since the digits of a large exponent would fill the memory.
type decimal struct{ *big.Rat }

var decimalForm = regexp.MustCompile(`^-?[0-9]{1,20}(\.[0-9]{1,60})?([eE][+-]?[0-9]{1,2})?$`)

func (d *decimal) UnmarshalJSON(raw []byte) error {
	d.Rat = nil
	raw = bytes.Trim(raw, `"`)
	if !decimalForm.Match(raw) {
		return nil
	}
	d.Rat, _ = new(big.Rat).SetString(string(raw))
	return nil
}
