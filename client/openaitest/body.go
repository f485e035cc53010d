// This file owns the strict decoding of requests: an unknown field, a wrong type, a value
// out of range and a missing field get a 400 that names the parameter.

package openaitest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"unicode/utf8"
)

// maxExpiry is the longest expires_in_seconds: one year, the bound of the API
// reference.
const maxExpiry = 31_536_000

// fields decodes a JSON object and keeps the first error.
type fields struct {
	raw map[string]json.RawMessage
	bad *answer
}

// fields parses the body as an object that has only known fields. An empty body counts as
// an empty object, which lacks the required fields.
func (c *call) fields(known ...string) *fields {
	f := &fields{raw: map[string]json.RawMessage{}}
	if len(c.body) == 0 {
		return f
	}
	if media, _, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type")); media != "application/json" {
		f.refuse("unsupported_content_type", "", "Unsupported content type: the body must be application/json.")
		return f
	}
	dec := json.NewDecoder(bytes.NewReader(c.body))
	err := dec.Decode(&f.raw)
	if _, trailing := dec.Token(); err != nil || f.raw == nil || trailing != io.EOF || !utf8.Valid(c.body) {
		f.refuse("invalid_json", "", "We could not parse the JSON body of your request: it must be one JSON object.")
		return f
	}
	for name := range f.raw {
		if !slices.Contains(known, name) {
			f.refuse("unknown_parameter", name, fmt.Sprintf("Unknown parameter: '%s'.", name))
		}
	}
	return f
}

// fields is call.fields for a body with expires_in_seconds, which is unknown with
// Options.ExpiryUnknown.
func (s *Server) fields(c *call, known ...string) *fields {
	if s.opts.ExpiryUnknown {
		known = slices.DeleteFunc(known, func(name string) bool { return name == "expires_in_seconds" })
	}
	return c.fields(known...)
}

func (f *fields) refuse(code, param, message string) {
	if f.bad == nil {
		ans := fail(http.StatusBadRequest, code, param, message)
		f.bad = &ans
	}
}

func (f *fields) has(name string) bool { _, given := f.raw[name]; return given }

func (f *fields) null(name string) bool { return string(f.raw[name]) == "null" }

// decode reads a field, if present, into target. Null is an error.
func (f *fields) decode(name, kind string, target any) bool {
	if !f.has(name) {
		return false
	}
	if f.null(name) || json.Unmarshal(f.raw[name], target) != nil {
		f.refuse("invalid_type", name, fmt.Sprintf("Invalid type for '%s': expected %s.", name, kind))
		return false
	}
	return true
}

// text reads an optional string that must not be empty.
func (f *fields) text(name string) string {
	var s string
	if f.decode(name, "a string", &s) && s == "" {
		f.refuse("empty_string", name, fmt.Sprintf("Invalid '%s': empty string. Expected a string with minimum length 1.", name))
	}
	return s
}

func (f *fields) requiredText(name string) string {
	if !f.has(name) {
		f.refuse("missing_required_parameter", name, fmt.Sprintf("Missing required parameter: '%s'.", name))
	}
	return f.text(name)
}

// nullableText is "" for null and for a missing field.
func (f *fields) nullableText(name string) string {
	if f.null(name) {
		return ""
	}
	return f.text(name)
}

func (f *fields) nullableFlag(name string) bool {
	var b bool
	if !f.null(name) {
		f.decode(name, "a boolean", &b)
	}
	return b
}

// seconds reads a lifetime of 1..maxExpiry, 0 if missing.
func (f *fields) seconds(name string) int64 {
	var n int64
	if f.decode(name, "an integer", &n) && (n < 1 || n > maxExpiry) {
		f.refuse("integer_out_of_range", name, fmt.Sprintf("Invalid '%s': %d is not between 1 and %d.", name, n, maxExpiry))
	}
	return n
}

func (f *fields) nullableSeconds(name string) int64 {
	if f.null(name) {
		return 0
	}
	return f.seconds(name)
}

var scopeShape = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[a-z0-9_]+)+$`)

// scopes reads a list, nil if missing. OpenAI does not publish a list of scopes, so only
// the form of all known ones is checked.
func (f *fields) scopes(name string) []string {
	var list []string
	if !f.decode(name, "an array of strings", &list) {
		return nil
	}
	for _, scope := range list {
		if !scopeShape.MatchString(scope) {
			f.refuse("invalid_scope", name, fmt.Sprintf("Invalid scope: '%s'.", scope))
		}
	}
	return list
}

func (f *fields) choice(name string, values ...string) string {
	s := f.text(name)
	if s != "" && !slices.Contains(values, s) {
		f.refuse("invalid_value", name, fmt.Sprintf("Invalid value: '%s'. Supported values are: %q.", s, values))
	}
	return s
}

// query reads the query string of a list, as strictly as a body.
type query struct {
	limit int
	after string
	extra map[string]string
}

// The size of a page, from the API reference.
const (
	defaultPage = 20
	maxPage     = 100
)

func (c *call) query(extra ...string) (query, *answer) {
	q := query{limit: defaultPage, extra: map[string]string{}}
	for name, values := range c.r.URL.Query() {
		value := values[len(values)-1]
		switch {
		case name == "limit":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > maxPage {
				ans := fail(http.StatusBadRequest, "integer_out_of_range", "limit",
					fmt.Sprintf("Invalid 'limit': expected an integer between 1 and %d.", maxPage))
				return q, &ans
			}
			q.limit = n
		case name == "after":
			q.after = value
		case slices.Contains(extra, name):
			q.extra[name] = value
		default:
			ans := fail(http.StatusBadRequest, "unknown_parameter", name, fmt.Sprintf("Unknown query parameter: '%s'.", name))
			return q, &ans
		}
	}
	return q, nil
}

// choose checks an enumerated query parameter, "" if missing.
func (q query) choose(name string, values ...string) *answer {
	value, given := q.extra[name]
	if !given || slices.Contains(values, value) {
		return nil
	}
	ans := fail(http.StatusBadRequest, "invalid_value", name,
		fmt.Sprintf("Invalid value for '%s': supported values are: %q.", name, values))
	return &ans
}

// page renders one page of a list. show filters it; backwards reverses the order.
func page[T interface{ base() *entity }](s *Server, q query, list string, t *table[T], backwards bool, show func(T) bool, render func(T) object) answer {
	items := t.list
	if q.after != "" {
		at, known := s.places[q.after]
		if !known || at.list != list {
			return fail(http.StatusBadRequest, "invalid_value", "after", fmt.Sprintf("Invalid 'after': no object with id '%s' in this list.", q.after))
		}
		if backwards {
			items = items[:t.after(at.seq-1)]
		} else {
			items = items[t.after(at.seq):]
		}
	}
	if backwards {
		items = slices.Clone(items)
		slices.Reverse(items)
	}
	data := []object{}
	more := false
	for _, item := range items {
		if !show(item) {
			continue
		}
		if more = len(data) == q.limit; more {
			break
		}
		data = append(data, render(item))
	}
	var first, last any
	if len(data) > 0 {
		first, last = data[0]["id"], data[len(data)-1]["id"]
	}
	return ok(object{"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})
}
