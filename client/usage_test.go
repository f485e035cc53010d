package client

// Costs and usage: exact amounts, complete windows, and invalid responses.

import (
	"context"
	"fmt"
	"math/big"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

var costDay = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// costsOf reads costs, and returns them by day, key and line item.
func costsOf(c *Client, days int) (map[string]string, error) {
	all := map[string]string{}
	err := c.EachCost(context.Background(), costDay, costDay.AddDate(0, 0, days), []string{"proj_1"}, func(costs []Cost) error {
		for _, one := range costs {
			name := one.Day.Format(time.DateOnly) + " " + one.KeyID + " " + one.LineItem
			if _, twice := all[name]; twice {
				return fmt.Errorf("%s twice", name)
			}
			all[name] = one.Amount.RatString()
		}
		return nil
	})
	return all, err
}

func TestEachCost_ReadsAllDays(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{AmountsVary: true})
	want := map[string]string{}
	for i := range 100 {
		at := costDay.AddDate(0, 0, i-99)
		amount := fmt.Sprintf("%d.%018d", i, i)
		sim.AddCost("proj_1", "key_1", "gpt-5-mini, input_tokens", at, amount)
		exact, _ := new(big.Rat).SetString(amount)
		want[at.Format(time.DateOnly)+" key_1 gpt-5-mini, input_tokens"] = exact.RatString()
	}
	sim.AddCost("proj_1", "", "", costDay, "-0.1")
	want[costDay.Format(time.DateOnly)+"  "] = "-1/10"
	sim.AddCost("proj_2", "key_2", "", costDay, "1")
	got := map[string]string{}
	require.NoError(t, connect(t, sim).EachCost(context.Background(), costDay.AddDate(0, 0, -99), costDay.AddDate(0, 0, 1), []string{"proj_1"}, func(costs []Cost) error {
		for _, one := range costs {
			got[one.Day.Format(time.DateOnly)+" "+one.KeyID+" "+one.LineItem] = one.Amount.RatString()
		}
		return nil
	}))
	require.Equal(t, want, got)
	require.Equal(t, 4, sim.Count(http.MethodGet, "/organization/costs"))
}

// A response that is too large is read again in smaller pages, without repeating a day. A
// single day may be large.
func TestEachCost_LargeAnswers(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		query := r.URL.Query()
		limit, _ := strconv.Atoi(query.Get("limit"))
		start, _ := strconv.ParseInt(query.Get("start_time"), 10, 64)
		end, _ := strconv.ParseInt(query.Get("end_time"), 10, 64)
		if cursor := query.Get("page"); cursor != "" {
			bound, at, _ := strings.Cut(cursor, " ")
			if bound != query.Get("limit")+"/"+query.Get("start_time") {
				http.Error(w, `{"error":{"message":"another query's page","type":"invalid_request_error","param":"page","code":null}}`, http.StatusBadRequest)
				return
			}
			start, _ = strconv.ParseInt(at, 10, 64)
		}
		w.Header().Set("Content-Type", "application/json")
		var buckets []string
		padding := ""
		at := start
		for ; at < end && len(buckets) < limit; at += 86400 {
			if (at-costDay.Unix())/86400 == 10 { // a day that is too large for a page of several days
				padding = strings.Repeat(" ", maxPageOfDays)
			}
			buckets = append(buckets, fmt.Sprintf(`{"object":"bucket","start_time":%d,"end_time":%d,"results":[{"object":"organization.costs.result","amount":{"value":1,"currency":"usd"},"api_key_id":"key_1","line_item":"x"}]}`, at, at+86400))
		}
		next := "null"
		if at < end {
			next = fmt.Sprintf(`"%d/%s %d"`, limit, query.Get("start_time"), at)
		}
		fmt.Fprintf(w, `{"object":"page","data":[%s],%s"has_more":%t,"next_page":%s}`, strings.Join(buckets, ","), padding, at < end, next)
	})
	got, err := costsOf(c, 40)
	require.NoError(t, err)
	require.Len(t, got, 40)
	require.Less(t, calls.Load(), int64(40))
}

// An incomplete or inexact response is an error.
func TestEachCost_BadAnswers(t *testing.T) {
	t.Parallel()
	bucket := func(at time.Time, results string) string {
		return fmt.Sprintf(`{"object":"bucket","start_time":%d,"end_time":0,"results":[%s]}`, at.Unix(), results)
	}
	result := func(value, currency string) string {
		return fmt.Sprintf(`{"amount":{"value":%s,"currency":%q},"api_key_id":"key_1"}`, value, currency)
	}
	page := func(buckets, more, next string) string {
		return fmt.Sprintf(`{"object":"page","data":[%s],"has_more":%s,"next_page":%s}`, buckets, more, next)
	}
	one := bucket(costDay, result("1", "usd"))
	for name, c := range map[string]struct{ body, said string }{
		"no has_more":             {`{"object":"page","data":[]}`, "not the documented object"},
		"no data":                 {`{"object":"page","has_more":false}`, "not the documented object"},
		"a missing amount":        {page(bucket(costDay, `{"api_key_id":"key_1"}`), "false", "null"), "not the documented object"},
		"a null amount":           {page(bucket(costDay, result("null", "usd")), "false", "null"), "not the documented object"},
		"an amount in words":      {page(bucket(costDay, result(`"a lot"`, "usd")), "false", "null"), "not the documented object"},
		"a huge exponent":         {page(bucket(costDay, result("1e999999999", "usd")), "false", "null"), "not the documented object"},
		"another currency":        {page(bucket(costDay, result("1", "eur")), "false", "null"), "not the documented object"},
		"a repeated day":          {page(one+","+one, "false", "null"), "twice, or outside of the window"},
		"a day before the window": {page(bucket(costDay.AddDate(0, 0, -1), ""), "false", "null"), "twice, or outside of the window"},
		"a day after the window":  {page(bucket(costDay.AddDate(0, 0, 9), ""), "false", "null"), "twice, or outside of the window"},
		"no next page":            {page("", "true", "null"), "repeats itself before its end"},
		"the same page again":     {page("", "true", `"p"`), "repeats itself before its end"},
		"a day without a list":    {page(fmt.Sprintf(`{"start_time":%d}`, costDay.Unix()), "false", "null"), "not the documented object"},
	} {
		got, err := costsOf(answering(t, http.StatusOK, map[string]string{"Content-Type": "application/json"}, c.body), 9)
		require.ErrorContains(t, err, c.said, name)
		_ = got
	}
	for value, want := range map[string]string{"1": "1", "0.25": "1/4", `"0.25"`: "1/4", "2.5e-7": "1/4000000", "-1E2": "-100", `"0.000000000000000000000000000001"`: "1/1000000000000000000000000000000"} {
		got, err := costsOf(answering(t, http.StatusOK, map[string]string{"Content-Type": "application/json"}, page(bucket(costDay, result(value, "usd")), "false", "null")), 9)
		require.NoError(t, err, value)
		require.Equal(t, want, got["2026-11-01 key_1 "], value)
	}
}

func TestEachUsage(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	sim.AddUsage("embeddings", "proj_1", "key_1", "text-embedding-3-small", costDay, openaitest.Counts{Requests: 2, Input: 30})
	sim.AddUsage("completions", "proj_1", "key_1", "gpt-5-mini", costDay.AddDate(0, 0, 40), openaitest.Counts{Requests: 1, Input: 9, Cached: 4, Output: 5})
	c := connect(t, sim)
	var got []Usage
	for _, kind := range UsageKinds {
		require.NoError(t, c.EachUsage(context.Background(), kind, costDay, costDay.AddDate(0, 0, 60), []string{"proj_1"}, func(some []Usage) error {
			got = append(got, some...)
			return nil
		}))
	}
	require.Equal(t, []Usage{
		{Day: costDay.AddDate(0, 0, 40), KeyID: "key_1", Model: "gpt-5-mini", Requests: 1, InputTokens: 9, CachedTokens: 4, OutputTokens: 5},
		{Day: costDay, KeyID: "key_1", Model: "text-embedding-3-small", Requests: 2, InputTokens: 30},
	}, got)
	require.ErrorContains(t, c.EachUsage(context.Background(), "../costs", costDay, costDay, nil, nil), "unknown kind of usage")
}
