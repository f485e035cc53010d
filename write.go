package openaisecrets

// This file owns the interpretation of written values, for all fields of all paths:
// which values count as given, how they are normalized, and how a read shows them.
//
// What must stay true: null, or an empty value where the type has none, is not given
// and never becomes another value; no error quotes a value of the wrong type, since it
// may be a misplaced key; writing back a read changes nothing.

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// maxSeconds is the longest duration that time.Duration holds.
const maxSeconds = math.MaxInt64 / int64(time.Second)

// storable reports whether a path can be part of a storage key: Vault rejects two dots
// in a row as a path traversal.
func storable(path string) bool { return !strings.Contains(path, "..") }

// normalize removes the values that are not given from a request's data and converts
// the others to their field's type. It returns the read-only fields that it removed,
// and the problem with the data, "" if there is none.
func (b *backend) normalize(req *logical.Request) (ignored []string, problem string) {
	switch req.Operation {
	case logical.CreateOperation, logical.UpdateOperation, logical.ReadOperation, logical.ListOperation, logical.DeleteOperation:
	default:
		return nil, ""
	}
	path := b.Route(req.Path)
	if path == nil {
		return nil, ""
	}
	if !storable(req.Path) {
		return nil, fmt.Sprintf("the name in %.64q must not contain two consecutive dots, because Vault cannot store it", req.Path)
	}
	shown := onlyShown(path)
	data := make(map[string]any, len(req.Data))
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		raw, field := req.Data[name], path.Fields[name]
		switch {
		case field == nil && shown[name]:
			ignored = append(ignored, name)
		case field == nil, strings.Contains(path.Pattern, "(?P<"+name+">"): // framework.Backend and rejectUnknownFields handle these
			data[name] = raw
		case raw == nil:
		default:
			value, problem := fieldValue(name, field, raw)
			if problem != "" {
				return nil, problem
			}
			if value != nil {
				data[name] = value
			}
		}
	}
	req.Data = data
	return ignored, ""
}

// onlyShown returns the read-only fields of a path.
func onlyShown(path *framework.Path) map[string]bool {
	shown := map[string]bool{}
	read := path.Operations[logical.ReadOperation]
	if read == nil || path.Operations[logical.CreateOperation] == nil {
		return shown
	}
	for _, responses := range read.Properties().Responses {
		for _, response := range responses {
			for name := range response.Fields {
				shown[name] = path.Fields[name] == nil
			}
		}
	}
	return shown
}

// fieldValue converts a value to its field's type; nil if it is not given.
func fieldValue(name string, field *framework.FieldSchema, raw any) (value any, problem string) {
	text, isText := raw.(string)
	if isText {
		if text, problem = trimmed(name, text); problem != "" {
			return nil, problem
		}
		raw = text
	}
	switch field.Type { //nolint:exhaustive // the engine uses no others
	case framework.TypeString:
		if !isText {
			return nil, name + " must be a string"
		}
		return text, ""
	case framework.TypeCommaStringSlice:
		return listValue(name, raw)
	}
	if isText && text == "" {
		return nil, ""
	}
	switch field.Type { //nolint:exhaustive // the engine uses no others
	case framework.TypeDurationSecond:
		if seconds, ok := secondsOf(raw); ok && seconds < 0 {
			return nil, name + " must not be negative"
		} else if ok {
			return seconds, ""
		}
		return nil, fmt.Sprintf("%s must be a duration in whole seconds, such as 5400 or 90m, between 0 and %d", name, maxSeconds)
	case framework.TypeInt:
		if number, ok := wholeNumber(raw); ok && number == int64(int(number)) {
			return number, ""
		}
		return nil, name + " must be an integer"
	case framework.TypeBool:
		switch number, isNumber := wholeNumber(raw); {
		case isNumber && number == 0, isNumber && number == 1:
			return number == 1, ""
		case isText:
			if value, err := strconv.ParseBool(text); err == nil {
				return value, ""
			}
		}
		if value, ok := raw.(bool); ok {
			return value, ""
		}
		return nil, name + " must be true or false"
	}
	return raw, ""
}

// trimmed removes the final line break of a file.
func trimmed(name, text string) (_, problem string) {
	text = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r")
	if strings.TrimSpace(text) != text {
		return "", name + " must not begin or end with a space or line break"
	}
	return text, ""
}

// listValue converts a value to a list of strings. A null element becomes "", so that
// it is rejected: dropping it would change the meaning of the list.
func listValue(name string, raw any) (value any, problem string) {
	var list []string
	switch raw := raw.(type) {
	case string:
		if raw == "" {
			return list, ""
		}
		for text := range strings.SplitSeq(raw, ",") {
			list = append(list, strings.TrimSpace(text)) // "a, b" is valid
		}
		return list, ""
	case []string:
		list = raw
	case []any:
		for _, element := range raw {
			text, isText := element.(string)
			if !isText && element != nil {
				return nil, name + " must be a list of strings or a comma-separated string"
			}
			list = append(list, text)
		}
	default:
		return nil, name + " must be a list of strings or a comma-separated string"
	}
	list = slices.Clone(list)
	for i, text := range list {
		if strings.TrimSpace(text) == "" {
			list[i] = "" // rejected as an empty value
			continue
		}
		if list[i], problem = trimmed(name, text); problem != "" {
			return nil, problem
		}
	}
	return list, ""
}

// wholeNumber converts an integer in JSON or text. External plugins receive JSON
// numbers as float64.
func wholeNumber(raw any) (number int64, ok bool) {
	switch raw := raw.(type) {
	case int:
		return int64(raw), true
	case int64:
		return raw, true
	case float64:
		const exact = 1 << 53
		return int64(raw), raw == math.Trunc(raw) && math.Abs(raw) <= exact
	case json.Number:
		if number, err := raw.Int64(); err == nil {
			return number, true
		}
		float, err := raw.Float64()
		if err != nil {
			return 0, false
		}
		return wholeNumber(float)
	case string:
		number, err := strconv.ParseInt(raw, 10, 64)
		return number, err == nil
	}
	return 0, false
}

// secondsOf converts a duration to seconds. Vault's own parser truncates fractions, so
// that 0.9 would become 0, which disables features.
func secondsOf(raw any) (seconds int64, ok bool) {
	if number, ok := wholeNumber(raw); ok {
		return number, number <= maxSeconds
	}
	text, isText := raw.(string)
	if !isText {
		return 0, false
	}
	exact, err := parseutil.ParseDurationSecond(text)
	return int64(exact / time.Second), err == nil && exact%time.Second == 0
}

// parseEnum reads a field that must have one of the values; the first is the default.
func parseEnum(d *framework.FieldData, field string, target *string, values ...string) (problem string) {
	if raw, ok := d.GetOk(field); ok {
		if *target = raw.(string); *target == "" {
			*target = values[0]
		}
	}
	if !slices.Contains(values, *target) {
		return fmt.Sprintf("%s must be one of %[3]s, not %.64[2]q", field, *target, strings.Join(values, ", "))
	}
	return ""
}

// asWritten has, by field, the written values that differ from the effective ones, such
// as "" for a default or an endpoint with a trailing slash. Reads return them, and the
// effective value as effective_<field>; otherwise a tool that compares the two, such as
// Terraform, would write them repeatedly.
type asWritten map[string]string

// note records the written values of some fields. used has the effective values.
func (w asWritten) note(d *framework.FieldData, used map[string]any, fields []string) asWritten {
	next := maps.Clone(w)
	if next == nil {
		next = asWritten{}
	}
	for _, field := range fields {
		raw, given := d.GetOk(field)
		if !given {
			continue
		}
		if text := raw.(string); text != used[field] {
			next[field] = text
		} else {
			delete(next, field)
		}
	}
	if len(next) == 0 {
		return nil
	}
	return next
}

// show adds the written and effective values to the data of a read.
func (w asWritten) show(data map[string]any, fields []string) {
	for _, field := range fields {
		data["effective_"+field] = data[field]
		if text, ok := w[field]; ok {
			data[field] = text
		}
	}
}

// spelled returns the fields of a path where "" stands for a default: those with a
// fixed set of values, and more. It is sorted.
func spelled(fields map[string]*framework.FieldSchema, more ...string) []string {
	for name, field := range fields {
		if field.Type == framework.TypeString && len(field.AllowedValues) > 0 {
			more = append(more, name)
		}
	}
	slices.Sort(more)
	return more
}

// addEffective documents the fields that show adds.
func addEffective(responseFields map[string]*framework.FieldSchema, fields []string) {
	for _, field := range fields {
		responseFields["effective_"+field] = &framework.FieldSchema{Type: framework.TypeString, Required: true, Description: "Effective value of " + field + ", which is returned as written."}
	}
}
