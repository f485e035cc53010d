// Package text validates input strings and formats times, consistently on every path.
package text

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// MaxLen bounds any one-line field, in bytes.
	MaxLen = 1024
)

// Check returns the problem with a one-line field, "" if there is none.
func Check(field, value string) string {
	switch {
	case len(value) > MaxLen:
		return fmt.Sprintf("%s is %d bytes long; the limit is %d", field, len(value), MaxLen)
	case !utf8.ValidString(value) || strings.ContainsRune(value, utf8.RuneError):
		return field + " must be valid UTF-8"
	case strings.ContainsFunc(value, unicode.IsControl):
		return field + " must not contain control characters or line breaks"
	}
	return ""
}

// CheckID is Check for an OpenAI identifier, which is opaque but becomes part of URL
// paths and listings.
func CheckID(field, value string) string {
	if problem := Check(field, value); problem != "" {
		return problem
	}
	if strings.ContainsFunc(value, unicode.IsSpace) || strings.ContainsAny(value, "/?#%") || value == "." || value == ".." {
		return fmt.Sprintf("%s %.64q is not a valid ID: it must not contain spaces or any of / ? # %%", field, value)
	}
	return ""
}

// Time formats a time for responses: RFC 3339, "" if it is zero.
func Time(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// TimeOrNull formats a time for responses: RFC 3339, null if it is zero.
func TimeOrNull(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return Time(t)
}
