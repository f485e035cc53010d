package openaisecrets

// This file owns what a written value means, the same for every field of every
// path: what counts as given, how a value is spelled, and what a read shows of it.
//
// What must stay true: a value that is nothing (null, or empty where the type has
// no empty value) never becomes another value; no answer quotes one that has the
// wrong type, since it may be a key in the wrong place; a read that is written
// back changes nothing.

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

// storable reports whether a path can be part of a storage key: Vault takes two
// dots in a row for a way out of the mount's storage.
func storable(path string) bool { return !strings.Contains(path, "..") }

// normalize drops the values that are not given from a request's data and gives
// the others their field's type. It returns the fields that it dropped because
// only a read shows them, and what is wrong with the data, "" when nothing is.
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
		return nil, fmt.Sprintf("Vault cannot store the name in %.64q: it contains two dots in a row", req.Path)
	}
	shown := onlyShown(path)
	data := make(map[string]any, len(req.Data))
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		raw, field := req.Data[name], path.Fields[name]
		switch {
		case field == nil && shown[name]:
			ignored = append(ignored, name)
		case field == nil, strings.Contains(path.Pattern, "(?P<"+name+">"): // the path decides on those
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

// onlyShown are the fields that a read of an entry has and a write of it has not.
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

// fieldValue is a value in its field's type, nil when it is not given.
func fieldValue(name string, field *framework.FieldSchema, raw any) (value any, problem string) {
	text, isText := raw.(string)
	if isText {
		if text, problem = trimmed(name, text); problem != "" {
			return nil, problem
		}
		raw = text
	}
	switch field.Type { //nolint:exhaustive // no other is used
	case framework.TypeString:
		if !isText {
			return nil, name + " must be one string"
		}
		return text, ""
	case framework.TypeCommaStringSlice:
		return listValue(name, raw)
	}
	if isText && text == "" {
		return nil, ""
	}
	switch field.Type { //nolint:exhaustive // likewise
	case framework.TypeDurationSecond:
		if seconds, ok := secondsOf(raw); ok && seconds < 0 {
			return nil, name + " must not be negative"
		} else if ok {
			return seconds, ""
		}
		return nil, fmt.Sprintf("%s must be whole seconds, such as 5400 or 90m, from 0 to %d", name, maxSeconds)
	case framework.TypeInt:
		if number, ok := wholeNumber(raw); ok && number == int64(int(number)) {
			return number, ""
		}
		return nil, name + " must be a whole number"
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

// trimmed is a text without the line break in which a file ends.
func trimmed(name, text string) (_, problem string) {
	text = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r")
	if strings.TrimSpace(text) != text {
		return "", name + " begins or ends with a space or a line break"
	}
	return text, ""
}

// listValue is a list of texts. An element that is null stays, as an empty one,
// to be refused: without it the list would say something else.
func listValue(name string, raw any) (value any, problem string) {
	var list []string
	switch raw := raw.(type) {
	case string:
		if raw == "" {
			return list, ""
		}
		for text := range strings.SplitSeq(raw, ",") {
			list = append(list, strings.TrimSpace(text)) // "a, b" is a way to write it
		}
		return list, ""
	case []string:
		list = raw
	case []any:
		for _, element := range raw {
			text, isText := element.(string)
			if !isText && element != nil {
				return nil, name + " must be a list of strings, or one string with commas"
			}
			list = append(list, text)
		}
	default:
		return nil, name + " must be a list of strings, or one string with commas"
	}
	list = slices.Clone(list)
	for i, text := range list {
		if strings.TrimSpace(text) == "" {
			list[i] = "" // to be refused as what it is
			continue
		}
		if list[i], problem = trimmed(name, text); problem != "" {
			return nil, problem
		}
	}
	return list, ""
}

// wholeNumber is a number without a fraction, as JSON or as text. External plugins
// get JSON's numbers as float64.
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

// secondsOf is a duration in seconds. Vault's own parser cuts fractions off, and
// makes of 0.9 the 0 that switches things off.
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

// asWritten has the texts that were written where what is used is spelled
// otherwise, by field: an empty one for a default, an endpoint with a slash. Reads
// show them, and what is used as effective_<field>; otherwise a tool that compares
// the two, as Terraform does, would write them again and again.
type asWritten map[string]string

// note takes what a write gives of some fields. used has what is used.
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

// show puts both into the data of a read.
func (w asWritten) show(data map[string]any, fields []string) {
	for _, field := range fields {
		data["effective_"+field] = data[field]
		if text, ok := w[field]; ok {
			data[field] = text
		}
	}
}

// spelled are the fields of a path of which an empty value stands for a default,
// those of a fixed set of values and some more, sorted.
func spelled(fields map[string]*framework.FieldSchema, more ...string) []string {
	for name, field := range fields {
		if field.Type == framework.TypeString && len(field.AllowedValues) > 0 {
			more = append(more, name)
		}
	}
	slices.Sort(more)
	return more
}

// addEffective documents what show adds.
func addEffective(answer map[string]*framework.FieldSchema, fields []string) {
	for _, field := range fields {
		answer["effective_"+field] = &framework.FieldSchema{Type: framework.TypeString, Required: true, Description: "What is used of " + field + ", which itself reads as it was written."}
	}
}
