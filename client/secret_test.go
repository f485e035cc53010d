package client

// Only Reveal returns the value of a secret.

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
)

// carriers are the types that may contain a secret.
func carriers(s Secret) map[string]any {
	type hidden struct {
		name   string
		secret Secret
	}
	type Shown struct {
		Name   string
		Secret Secret
		Ref    *Secret
	}
	return map[string]any{
		"value":              s,
		"pointer":            &s,
		"pointer to pointer": func() any { p := &s; return &p }(),
		"exported field":     Shown{"n", s, &s},
		"unexported field":   hidden{"n", s},
		"pointer to a field": &hidden{"n", s},
		"deep":               struct{ a *hidden }{&hidden{"n", s}},
		"slice":              []Secret{s},
		"array":              [1]hidden{{"n", s}},
		"map":                map[string]hidden{"k": {"n", s}},
		"map key":            map[Secret]int{s: 1},
		"interface":          []any{s, hidden{"n", s}},
		"key":                Key{ID: "k", Value: s},
		"options":            Options{AdminKey: s},
		"client":             Client{adminKey: s},
	}
}

// requireHidden searches for the value in plain and encoded form.
func requireHidden(t *testing.T, text string, secret string) {
	t.Helper()
	for _, form := range []string{
		secret, hex.EncodeToString([]byte(secret)), strings.ToUpper(hex.EncodeToString([]byte(secret))),
		base64.StdEncoding.EncodeToString([]byte(secret)), fmt.Sprint([]byte(secret)), fmt.Sprintf("% x", secret), secret[len(secret)-12:],
	} {
		require.NotContains(t, text, form)
	}
}

func TestSecret_NoVerbPrintsIt(t *testing.T) {
	t.Parallel()
	for name, carrier := range carriers(NewSecret(testKey)) {
		for _, verb := range "vTtbcdoOqxXUeEfFgGspzw!" {
			for _, flags := range []string{"", "+", "#", "-", " ", "0", "200", ".100", "# "} {
				requireHidden(t, fmt.Sprintf("%"+flags+string(verb), carrier), testKey)
			}
		}
		requireHidden(t, fmt.Sprint(carrier), testKey)
		requireHidden(t, fmt.Errorf("%s: %v", name, carrier).Error(), testKey)
	}
	for _, verb := range []string{"%v", "%s", "%q", "%#v", "%+v", "%x", "%d"} {
		require.Equal(t, "***", fmt.Sprintf(verb, NewSecret(testKey)), verb)
		require.Equal(t, "***", fmt.Sprintf(verb, Secret{}), "%s: an empty secret looks the same", verb)
	}
}

func TestSecret_NoEncoderOrLoggerWritesIt(t *testing.T) {
	t.Parallel()
	secret := NewSecret(testKey)
	var out bytes.Buffer
	loggers := map[string]func(args ...any){
		"hclog": func(args ...any) {
			hclog.New(&hclog.LoggerOptions{Output: &out, Level: hclog.Trace}).Trace("m", args...)
		},
		"hclog JSON": func(args ...any) {
			hclog.New(&hclog.LoggerOptions{Output: &out, Level: hclog.Trace, JSONFormat: true}).Trace("m", args...)
		},
		"hclog with": func(args ...any) {
			hclog.New(&hclog.LoggerOptions{Output: &out, Level: hclog.Trace}).With(args...).Info("m")
		},
		"slog text": func(args ...any) { slog.New(slog.NewTextHandler(&out, nil)).Info("m", args...) },
		"slog JSON": func(args ...any) { slog.New(slog.NewJSONHandler(&out, nil)).Info("m", args...) },
		"json": func(args ...any) {
			raw, _ := json.Marshal(args)
			out.Write(raw)
		},
	}
	for logger, log := range loggers {
		for name, carrier := range carriers(secret) {
			out.Reset()
			log("secret", carrier)
			require.NotEmpty(t, out.String(), "%s, %s", logger, name)
			requireHidden(t, out.String(), testKey)
		}
		out.Reset()
		log("secret", secret)
		require.Contains(t, out.String(), "***", logger)
	}
	text, err := secret.MarshalText()
	require.NoError(t, err)
	require.Equal(t, "***", string(text))
	raw, err := json.Marshal(map[string]any{"a": secret, "b": &secret})
	require.NoError(t, err)
	require.JSONEq(t, `{"a":"***","b":"***"}`, string(raw))
}

func TestSecret_OnlyRevealReturnsTheValue(t *testing.T) {
	t.Parallel()
	secret := NewSecret(testKey)
	require.Equal(t, testKey, secret.Reveal())
	require.False(t, secret.IsZero())
	require.True(t, secret.Equal(NewSecret(strings.Clone(testKey))))
	require.False(t, secret.Equal(NewSecret(testKey+"x")))
	require.False(t, secret.Equal(Secret{}))
	require.True(t, Secret{}.Equal(NewSecret("")))
	require.Empty(t, Secret{}.Reveal())
	require.True(t, Secret{}.IsZero())
	require.True(t, NewSecret("").IsZero())
	require.EqualError(t, errors.Join(fmt.Errorf("key %s", secret)), "key ***")
}
