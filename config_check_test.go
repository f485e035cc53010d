package openaisecrets

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseEndpoint(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		"https://api.openai.com/v1":        "https://api.openai.com/v1",
		"https://api.openai.com/v1/":       "https://api.openai.com/v1",
		"HTTPS://eu.api.openai.com/v1":     "https://eu.api.openai.com/v1",
		"http://127.0.0.1:8080/v1":         "http://127.0.0.1:8080/v1",
		"http://[::1]:8080/v1":             "http://[::1]:8080/v1",
		"http://localhost/v1":              "http://localhost/v1",
		"http://127.0.0.1.evil.example/v1": "",
		"http://10.0.0.1/v1":               "",
		"https://":                         "",
		"https:opaque":                     "",
		"/v1":                              "",
		"":                                 "",
		"ftp://api.openai.com/v1":          "",
		"https://api.openai.com/v1#x":      "",
		"https://api.openai.com/v1#":       "",
		"https://api.openai.com/v1?":       "",
		"https://user@api.openai.com":      "",
		"https://api.openai.com/\x00":      "",
		"https://api.openai.com/ä\xff":     "",
		"https://exa mple.com":             "",
	} {
		got, problem := parseEndpoint(raw, false)
		require.Equal(t, want, got, raw)
		require.Equal(t, want == "", problem != "", raw)
	}
	got, problem := parseEndpoint("http://10.0.0.1/v1", true)
	require.Equal(t, "http://10.0.0.1/v1", got)
	require.Empty(t, problem)
}

func FuzzParseEndpoint(f *testing.F) {
	for _, seed := range []string{"https://api.openai.com/v1", "http://localhost:1", "https://a@b/?#", "http://[::1%25eth0]/", "\xff", "https://%"} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, raw string, insecure bool) {
		endpoint, problem := parseEndpoint(raw, insecure)
		if (endpoint == "") == (problem == "") {
			t.Fatalf("%q: endpoint %q, problem %q", raw, endpoint, problem)
		}
		if problem != "" {
			return
		}
		again, problem := parseEndpoint(endpoint, insecure)
		if problem != "" || again != endpoint {
			t.Fatalf("%q gives %q, which gives %q (%s)", raw, endpoint, again, problem)
		}
		if !insecure && !strings.HasPrefix(endpoint, "https://") && !strings.HasPrefix(endpoint, "http://localhost") &&
			!strings.HasPrefix(endpoint, "http://127.") && !strings.HasPrefix(endpoint, "http://[") {
			t.Fatalf("%q is accepted as %q", raw, endpoint)
		}
	})
}
