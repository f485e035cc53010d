// This file owns what keys cost and did. Costs and usage outlive their key, its account
// and its project, as OpenAI's do. Each POST of the inference API with a body that is
// kept is charged; a test adds anything else.

package openaitest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const day = 24 * time.Hour

// UsageKinds are the kinds of usage that the simulator has.
var UsageKinds = []string{"completions", "embeddings", "images", "audio_speeches", "audio_transcriptions", "moderations"}

// KeyCostsSince is the first day whose costs can be grouped by key.
var KeyCostsSince = time.Date(2025, 12, 1, 0, 0, 0, 0, time.UTC)

// costCell is what the amounts of a ledger of costs are of, usageCell the same for usage.
type costCell struct {
	day                    int64 // Unix seconds
	project, key, lineItem string
}

type usageCell struct {
	day                       int64
	kind, project, key, model string
}

// Counts is what a key did.
type Counts struct{ Requests, Input, Cached, Output int64 }

// AddCost adds an amount in US dollars, which may be negative: OpenAI restates costs of
// past days. The key may be unknown, deleted, or "" for costs without one.
func (s *Server) AddCost(project, key, lineItem string, at time.Time, amount string) {
	value, ok := new(big.Rat).SetString(amount)
	if !ok {
		panic("openaitest: not an amount: " + amount)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addCost(costCell{at.UTC().Truncate(day).Unix(), project, key, lineItem}, value)
}

func (s *Server) addCost(cell costCell, amount *big.Rat) {
	if s.costs[cell] == nil {
		s.costs[cell] = new(big.Rat)
	}
	s.costs[cell].Add(s.costs[cell], amount)
}

// AddUsage adds usage of a kind.
func (s *Server) AddUsage(kind, project, key, model string, at time.Time, n Counts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addUsage(usageCell{at.UTC().Truncate(day).Unix(), kind, project, key, model}, n)
}

func (s *Server) addUsage(cell usageCell, n Counts) {
	sum := s.usage[cell]
	s.usage[cell] = Counts{sum.Requests + n.Requests, sum.Input + n.Input, sum.Cached + n.Cached, sum.Output + n.Output}
}

// charge charges one inference request to the key that made it: two dollars per million
// input tokens, eight per million output tokens.
func (s *Server) charge(c *call, kind, model string, input, output int64) {
	p, today := c.key.account.project.id, c.now.UTC().Truncate(day).Unix()
	s.addUsage(usageCell{today, kind, p, c.key.id, model}, Counts{Requests: 1, Input: input, Output: output})
	s.addCost(costCell{today, p, c.key.id, model + ", input_tokens"}, big.NewRat(2*input, 1_000_000))
	if output > 0 {
		s.addCost(costCell{today, p, c.key.id, model + ", output_tokens"}, big.NewRat(8*output, 1_000_000))
	}
}

// window is the query of costs and usage.
type window struct {
	start, end time.Time
	limit      int
	groups     []string
	filter     map[string][]string
	from       time.Time // where the page starts
	bound      string    // the query without its page, to which a cursor is bound
}

func (c *call) window(now time.Time, maxLimit int, groups, filters []string) (w window, bad *answer) {
	refuse := func(param, format string, args ...any) (window, *answer) {
		ans := fail(http.StatusBadRequest, "invalid_request_error", param, fmt.Sprintf(format, args...))
		return w, &ans
	}
	values := c.r.URL.Query()
	w = window{end: now, limit: 7, filter: map[string][]string{}}
	seconds := map[string]*time.Time{"start_time": &w.start, "end_time": &w.end}
	for name, given := range values {
		value := given[len(given)-1]
		switch {
		case seconds[name] != nil:
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return refuse(name, "Invalid '%s': expected Unix seconds.", name)
			}
			*seconds[name] = time.Unix(n, 0).UTC()
		case name == "bucket_width":
			if value != "1d" {
				return refuse(name, "Invalid 'bucket_width': the simulator has '1d' only.")
			}
		case name == "limit":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > maxLimit {
				return refuse(name, "Invalid 'limit': expected an integer between 1 and %d.", maxLimit)
			}
			w.limit = n
		case name == "group_by[]":
			for _, group := range given {
				if !slices.Contains(groups, group) {
					return refuse(name, "Invalid 'group_by': '%s' is not supported.", group)
				}
			}
			w.groups = given
		case slices.Contains(filters, name):
			w.filter[name] = given
		case name != "page":
			return refuse(name, "Unknown query parameter: '%s'.", name)
		}
	}
	if w.start.IsZero() {
		return refuse("start_time", "Missing required parameter: 'start_time'.")
	}
	if !w.start.Before(w.end) {
		return refuse("end_time", "'end_time' must be after 'start_time'.")
	}
	w.start = w.start.Truncate(day)
	bound := url.Values{}
	for name, given := range values {
		if name != "page" {
			bound[name] = given
		}
	}
	w.bound, w.from = bound.Encode(), w.start
	if cursor := values.Get("page"); cursor != "" {
		raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(cursor, "page_"))
		at, query, found := strings.Cut(string(raw), " ")
		n, numErr := strconv.ParseInt(at, 10, 64)
		if err != nil || numErr != nil || !found || query != w.bound {
			return refuse("page", "Invalid 'page': it belongs to another query.")
		}
		w.from = time.Unix(n, 0).UTC()
	}
	return w, nil
}

// passes reports whether the filters of the query allow a value.
func (w window) passes(filter, value string) bool {
	allowed := w.filter[filter]
	return len(allowed) == 0 || slices.Contains(allowed, value)
}

// group is a field of a result: null unless the query groups by it, or if it has no value.
func (w window) group(name, value string) any {
	if value == "" || !slices.Contains(w.groups, name) {
		return nil
	}
	return value
}

// page answers with a bucket for each day, also for one without results.
func (w window) page(results func(at int64) []object) answer {
	buckets, at := []object{}, w.from
	for ; at.Before(w.end) && len(buckets) < w.limit; at = at.Add(day) {
		buckets = append(buckets, object{"object": "bucket", "start_time": at.Unix(), "end_time": at.Add(day).Unix(), "results": results(at.Unix())})
	}
	var next any
	if at.Before(w.end) {
		next = "page_" + base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(at.Unix(), 10)+" "+w.bound))
	}
	return ok(object{"object": "page", "data": buckets, "has_more": next != nil, "next_page": next})
}

func (s *Server) listCosts(c *call) answer {
	w, bad := c.window(s.now(), 180, []string{"project_id", "user_id", "line_item", "api_key_id", "api_source"}, []string{"project_ids[]", "api_key_ids[]", "line_items[]"})
	if bad != nil {
		return *bad
	}
	if w.start.Before(KeyCostsSince) && slices.Contains(w.groups, "api_key_id") {
		return fail(http.StatusBadRequest, "invalid_request_error", "start_time", "Grouping by api_key_id is not available before "+KeyCostsSince.Format(time.DateOnly)+".")
	}
	byDay := map[int64]map[costCell]*big.Rat{}
	for cell, amount := range s.costs {
		if !w.passes("project_ids[]", cell.project) || !w.passes("api_key_ids[]", cell.key) || !w.passes("line_items[]", cell.lineItem) {
			continue
		}
		project, _ := w.group("project_id", cell.project).(string)
		key, _ := w.group("api_key_id", cell.key).(string)
		item, _ := w.group("line_item", cell.lineItem).(string)
		grouped := costCell{cell.day, project, key, item}
		if byDay[cell.day] == nil {
			byDay[cell.day] = map[costCell]*big.Rat{}
		}
		sum := byDay[cell.day][grouped]
		if sum == nil {
			sum = new(big.Rat)
			byDay[cell.day][grouped] = sum
		}
		sum.Add(sum, amount)
	}
	return w.page(func(at int64) []object {
		results := []object{}
		for cell, amount := range byDay[at] {
			results = append(results, object{
				"object": "organization.costs.result", "amount": object{"value": s.amount(amount), "currency": "usd"},
				"project_id": w.group("project_id", cell.project), "api_key_id": w.group("api_key_id", cell.key),
				"line_item": w.group("line_item", cell.lineItem), "user_id": nil, "api_source": nil,
			})
		}
		return results
	})
}

// amount is the value of an amount on the wire, in full: OpenAI sends a number or, seen
// live, a string.
func (s *Server) amount(value *big.Rat) any {
	digits, _ := value.FloatPrec()
	text := value.FloatString(digits)
	s.amounts++
	if s.opts.AmountsVary && s.amounts%3 == 1 {
		return text
	}
	if s.opts.AmountsVary && s.amounts%3 == 2 && digits > 0 {
		text = strings.TrimLeft(strings.Replace(text, ".", "", 1), "0")
		if negative := strings.HasPrefix(text, "-"); negative {
			text = "-" + strings.TrimLeft(text[1:], "0")
		}
		return json.RawMessage(text + "e-" + strconv.Itoa(digits))
	}
	return json.RawMessage(text)
}

func listUsage(kind string) func(*Server, *call) answer {
	return func(s *Server, c *call) answer {
		w, bad := c.window(s.now(), 31, []string{"project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"}, []string{"project_ids[]", "user_ids[]", "api_key_ids[]", "models[]"})
		if bad != nil {
			return *bad
		}
		byDay := map[int64]map[usageCell]Counts{}
		for cell, n := range s.usage {
			if cell.kind != kind || !w.passes("project_ids[]", cell.project) || !w.passes("api_key_ids[]", cell.key) || !w.passes("models[]", cell.model) {
				continue
			}
			project, _ := w.group("project_id", cell.project).(string)
			key, _ := w.group("api_key_id", cell.key).(string)
			model, _ := w.group("model", cell.model).(string)
			if byDay[cell.day] == nil {
				byDay[cell.day] = map[usageCell]Counts{}
			}
			grouped := usageCell{cell.day, kind, project, key, model}
			sum := byDay[cell.day][grouped]
			byDay[cell.day][grouped] = Counts{sum.Requests + n.Requests, sum.Input + n.Input, sum.Cached + n.Cached, sum.Output + n.Output}
		}
		return w.page(func(at int64) []object {
			results := []object{}
			for cell, n := range byDay[at] {
				results = append(results, object{
					"object":       "organization.usage." + kind + ".result",
					"input_tokens": n.Input, "input_cached_tokens": n.Cached, "output_tokens": n.Output, "num_model_requests": n.Requests,
					"project_id": w.group("project_id", cell.project), "api_key_id": w.group("api_key_id", cell.key), "model": w.group("model", cell.model),
					"user_id": nil, "batch": nil, "service_tier": nil,
				})
			}
			return results
		})
	}
}
