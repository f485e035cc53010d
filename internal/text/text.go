// Package text checks texts from outside and shows times, alike on every path.
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

// Check says what is wrong with a one-line field, "" when nothing is.
func Check(field, value string) string {
	switch {
	case len(value) > MaxLen:
		return fmt.Sprintf("%s is %d bytes long; the limit is %d", field, len(value), MaxLen)
	case !utf8.ValidString(value) || strings.ContainsRune(value, utf8.RuneError):
		return field + " is not valid UTF-8"
	case strings.ContainsFunc(value, unicode.IsControl):
		return field + " contains a control character or a line break"
	}
	return ""
}

// CheckID is Check for an identifier of OpenAI's, which is opaque but goes
// into URL paths and listings.
func CheckID(field, value string) string {
	if problem := Check(field, value); problem != "" {
		return problem
	}
	if strings.ContainsFunc(value, unicode.IsSpace) || strings.ContainsAny(value, "/?#%") || value == "." || value == ".." {
		return fmt.Sprintf("%s %.64q is not an identifier: it contains a space or one of / ? # %%", field, value)
	}
	return ""
}

// Time shows a time as every answer does: RFC 3339, empty for none.
func Time(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// TimeOrNull shows a time as every answer does: RFC 3339, null for none.
func TimeOrNull(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return Time(t)
}
