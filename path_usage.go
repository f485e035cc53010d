package openaisecrets

// This file owns the usage path: its fields, and a report as fields for a terminal, as
// JSON and as CSV.
//
// What must stay true: a read changes nothing; text of a client never becomes a formula
// of a spreadsheet; an amount is a decimal string in full.

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/text"
)

// costField begins the name of a field with the cost of a group.
const costField = "cost_"

func (b *backend) pathUsage() *framework.Path {
	field := func(name, description string, values ...any) *framework.FieldSchema {
		return &framework.FieldSchema{Type: framework.TypeString, Description: description, AllowedValues: values, DisplayAttrs: &framework.DisplayAttributes{Name: name}, Query: true}
	}
	required := func(description string) *framework.FieldSchema {
		return &framework.FieldSchema{Type: framework.TypeString, Description: description, Required: true}
	}
	count := func(description string) *framework.FieldSchema {
		return &framework.FieldSchema{Type: framework.TypeInt64, Description: description}
	}
	return &framework.Path{
		Pattern:      "usage/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "usage"},
		Fields: map[string]*framework.FieldSchema{
			"start":    field("Start", "First day (UTC, YYYY-MM-DD). Default: the first day of the month of end."),
			"end":      field("End", "Last day (UTC, YYYY-MM-DD), included. Default: today. A report covers up to 180 days."),
			"group_by": field("Group by", "role (default), entity, display_name, key, model, day, or metadata:<name> for a metadata key of the clients' entities, such as metadata:team."),
			"role":     field("Role", "Report only the keys of this role; static-roles/<name> for a static role."),
			"format":   field("Format", "json for nested rows, csv for a table. Default: one field per group.", "json", "csv"),
			"detail":   field("Detail", "tokens adds requests and tokens, with six more calls to OpenAI.", "tokens"),
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: rejectUnknownFields(b.usageRead),
				Summary:  "Report what the keys of this mount cost.",
				Responses: map[int][]framework.Response{http.StatusOK: {
					{Description: "The costs, with a field cost_<group> for each group.", Fields: map[string]*framework.FieldSchema{
						"start":               required("First day."),
						"end":                 required("Last day."),
						"group_by":            required("The grouping."),
						"currency":            required("Always usd."),
						"total":               required("Costs of all projects of this mount's roles, as OpenAI reports them: a decimal string in US dollars, in full. The groups, unattributed, and other_roles add up to it exactly."),
						"unattributed":        required("Costs without a key, and those of keys that no record of this mount names: keys of others in the same projects, or of records that are lost or older than usage_retention."),
						"other_roles":         {Type: framework.TypeString, Description: "With role: costs of keys of other roles."},
						"fresh_until":         required("Time until which OpenAI is unlikely to change the figures (RFC 3339)."),
						"read_at":             required("Time at which the engine read the figures from OpenAI (RFC 3339); up to a minute ago."),
						"rows":                {Type: framework.TypeSlice, Description: "With format=json: the groups, with group, cost, and with detail=tokens the counts. By entity, name is its name."},
						"total_requests":      count("With detail=tokens: requests of all keys."),
						"total_input_tokens":  count("With detail=tokens: input tokens of all keys."),
						"total_output_tokens": count("With detail=tokens: output tokens of all keys."),
					}},
					{Description: "The costs as a table, the unattributed ones in the last row.", MediaType: "text/csv"},
				}},
				// The active node has the records that are not written yet.
				ForwardPerformanceStandby: true,
			},
		},
		HelpSynopsis: "Report what the keys of this mount cost.",
		HelpDescription: strings.TrimSpace(`
Joins OpenAI's costs by key with the engine's records of which role and client
had a key, so that the spending of keys that no longer exist still has an owner.
The admin key requires the permission api.usage.read. OpenAI reports costs with a
delay that it does not publish, and may change those of the last days.
`),
	}
}

func (b *backend) usageRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	get := func(name string) string { return d.Get(name).(string) }
	q := usageQuery{group: byRole, role: get("role"), tokens: get("detail") == "tokens"}
	if group := get("group_by"); group != "" {
		q.group = group
	}
	problem := parseUsageGroup(q.group)
	switch format, detail := get("format"), get("detail"); {
	case problem != "":
	case format != "" && format != "json" && format != "csv":
		problem = `format must be "json" or "csv"`
	case detail != "" && detail != "tokens":
		problem = `detail must be "tokens"`
	default:
		q.start, q.end, problem = parseUsageWindow(get("start"), get("end"), b.now())
	}
	if problem != "" {
		return logical.ErrorResponse("%s", problem), nil
	}
	r, stale, err := b.report(ctx, req, q)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return usageError(err)
	}
	warnings := r.warnings(q, b.now())
	if stale != nil {
		warnings = append(warnings, fmt.Sprintf("These figures are of %s, because OpenAI did not answer: %s", text.Time(r.readAt), stale))
	}
	if get("format") == "csv" {
		if stale != nil { // a table has no place for the warning
			return usageError(stale)
		}
		return usageCSV(q, r, b.now())
	}
	data := map[string]any{
		"start": q.start.Format(time.DateOnly), "end": q.end.AddDate(0, 0, -1).Format(time.DateOnly),
		"group_by": q.group, "currency": "usd", "total": dollars(r.total.cost), "unattributed": dollars(r.unattributed.cost),
		"fresh_until": text.Time(q.settled(b.now())), "read_at": text.Time(r.readAt),
	}
	if q.role != "" {
		data["other_roles"] = dollars(r.others.cost)
	}
	if q.tokens {
		data["total_requests"], data["total_input_tokens"], data["total_output_tokens"] = r.total.requests, r.total.input, r.total.output
	}
	if get("format") == "json" {
		data["rows"] = usageRows(q, r)
	} else {
		for i, label := range r.labels() {
			row := r.rows[i]
			data[costField+label] = dollars(row.cost)
			if q.tokens {
				data["requests_"+label], data["input_tokens_"+label], data["output_tokens_"+label] = row.requests, row.input, row.output
			}
		}
	}
	return &logical.Response{Data: data, Warnings: warnings}, nil
}

func usageRows(q usageQuery, r *usageReport) []any {
	rows := []any{} // [] and not null without any
	for _, row := range r.rows {
		item := map[string]any{"group": row.group, "cost": dollars(row.cost)}
		if row.name != "" {
			item["name"] = row.name
		}
		if q.tokens {
			item["requests"], item["input_tokens"], item["cached_tokens"], item["output_tokens"] = row.requests, row.input, row.cached, row.output
		}
		rows = append(rows, item)
	}
	return rows
}

// usageCSV is a report as a table whose column of costs adds up to the total.
func usageCSV(q usageQuery, r *usageReport, now time.Time) (*logical.Response, error) {
	header := []string{"start", "end", q.group, "name", "cost_usd"}
	if q.tokens {
		header = append(header, "requests", "input_tokens", "cached_tokens", "output_tokens")
	}
	header = append(header, "fresh_until")
	var table bytes.Buffer
	w := csv.NewWriter(&table)
	write := func(group, name string, s *usageSum) {
		line := []string{q.start.Format(time.DateOnly), q.end.AddDate(0, 0, -1).Format(time.DateOnly), group, name, dollars(s.cost)}
		if q.tokens {
			for _, n := range []int64{s.requests, s.input, s.cached, s.output} {
				line = append(line, strconv.FormatInt(n, 10))
			}
		}
		_ = w.Write(append(line, text.Time(q.settled(now)))) // Error below
	}
	_ = w.Write(inert(header))
	for i := range r.rows {
		row := inert([]string{r.rows[i].group, r.rows[i].name})
		write(row[0], row[1], &r.rows[i].usageSum)
	}
	if q.role != "" {
		write("(other roles)", "", r.others)
	}
	write("(unattributed)", "", r.unattributed)
	if w.Flush(); w.Error() != nil {
		return nil, fmt.Errorf("writing the table: %w", w.Error())
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: "text/csv; charset=utf-8",
		logical.HTTPStatusCode:  http.StatusOK,
		logical.HTTPRawBody:     table.Bytes(), // Vault would try to decode a string as base64
	}}, nil
}

// formula finds where a spreadsheet would take text for a formula: at the beginning of a
// cell, and after a semicolon, which separates cells where a comma is the decimal sign.
var formula = regexp.MustCompile(`(^|;)([\s"]*[=+\-@＝＋－＠])`)

// inert returns cells that are printable and that no spreadsheet takes for a formula.
func inert(cells []string) []string {
	cells = slices.Clone(cells)
	for i, cell := range cells {
		cells[i] = formula.ReplaceAllString(printable(cell), "$1'$2")
	}
	return cells
}
