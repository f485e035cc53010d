package client

import (
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
)

// redacted is the printed form of every Secret.
const redacted = "***"

// Secret holds a key value that must not reach a log line, an error or a storage key.
// Printing, formatting or encoding it yields "***"; only Reveal returns the value, so a
// search for Reveal lists every place that can leak it.
//
// The value is behind a pointer because fmt prints the unexported fields of an enclosing
// struct by reflection, without calling their methods: a nested pointer prints as an
// address, a nested string as its value.
type Secret struct {
	value *string
}

// NewSecret wraps a key value.
func NewSecret(value string) Secret {
	return Secret{value: &value}
}

// Reveal returns the value, "" for the zero Secret.
func (s Secret) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// IsZero reports whether there is no value.
func (s Secret) IsZero() bool { return s.Reveal() == "" }

// Equal compares two values in constant time.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// String implements fmt.Stringer.
func (s Secret) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (s Secret) GoString() string { return redacted }

// Format implements fmt.Formatter, so that no verb prints the value.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText implements encoding.TextMarshaler (hclog's JSON output uses it).
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON implements json.Marshaler.
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }
