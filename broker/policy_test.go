package broker

import (
	"encoding/json"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPolicy_Paths(t *testing.T) {
	for escaped, want := range map[string]string{
		"/v1/models":                               "",
		"/v1/models/gpt-5":                         "",
		"/v1/models/ft:gpt-4o:org::id":             "",
		"/v1/models/ft%3Agpt-4o%3Aorg%3A%3Aid":     "",
		"/v1/m%6fdels":                             "",
		"/v1/chat/completions":                     "",
		"/v1/chat/completions/chatcmpl-1":          "",
		"/v1/responses/resp_1/cancel":              "",
		"/v1/files/file-1/content":                 "",
		"/v1/realtime":                             "",
		"/v1/realtime/calls":                       "",
		"/v1/chat":                                 "broker_not_allowed",
		"/v1/chatkit/threads":                      "broker_not_allowed",
		"/v1/fine_tuning/jobs":                     "broker_not_allowed",
		"/v1/Responses":                            "broker_not_allowed",
		"/v1/organization/projects":                "broker_never_allowed",
		"/v1/organization":                         "broker_never_allowed",
		"/v1/Organization":                         "broker_never_allowed",
		"/v1/projects/p/service_accounts":          "broker_never_allowed",
		"/v1/realtime/client-secrets":              "broker_never_allowed",
		"/v1/realtime/Client_Secrets":              "broker_never_allowed",
		"/v1/realtime/client_secrets/x":            "broker_never_allowed",
		"/v1/realtime/sessions":                    "broker_never_allowed",
		"/v1/realtime/translations/client_secrets": "broker_never_allowed",
		"/v1":                  "broker_path",
		"/v1/":                 "broker_path",
		"":                     "broker_path",
		"*":                    "broker_path",
		"/v1/models/":          "broker_path",
		"/v1/models//x":        "broker_path",
		"/v1/models/.":         "broker_path",
		"/v1/models/x.":        "broker_path",
		"/v1/models/..":        "broker_path",
		"/v1/models/%2e":       "broker_path",
		"/v1/models/a%2fb":     "broker_path",
		"/v1/models/a%2Fb":     "broker_path",
		"/v1/models/a%5cb":     "broker_path",
		"/v1/models/a%3bb":     "broker_path",
		"/v1/models/a;b":       "broker_path",
		"/v1/models/a%3fb":     "broker_path",
		"/v1/models/a%23b":     "broker_path",
		"/v1/models/a%25b":     "broker_path",
		"/v1/models/a%20b":     "broker_path",
		"/v1/models/a%0d%0ab":  "broker_path",
		"/v1/models/%e2%80%a6": "broker_path",
		"/v1/models/%zz":       "broker_path",
		"/v1/models/" + strings.Repeat("x", 1024): "broker_path",
	} {
		_, refused := checkPath("GET", escaped, defaultFamilies)
		code := ""
		if refused != nil {
			code = refused.code
		}
		require.Equal(t, want, code, escaped)
	}
	_, refused := checkPath("GET", "/v1/fine_tuning/jobs", []string{"fine_tuning"})
	require.Nil(t, refused, "the family is allowed by name")
}

func TestPolicy_Models(t *testing.T) {
	patterns := []string{"gpt-5*", "o4-mini"}
	for _, c := range []struct {
		name, method, path, body string
		header                   http.Header
		passes                   bool
	}{
		{"allowed", "POST", "responses", `{"model":"gpt-5-mini","input":"x"}`, nil, true},
		{"charset", "POST", "responses", `{"model":"o4-mini"}`, http.Header{"Content-Type": {"application/json; charset=utf-8"}}, true},
		{"another", "POST", "responses", `{"model":"gpt-4o"}`, nil, false},
		{"none", "POST", "responses", `{"input":"x"}`, nil, false},
		{"empty body", "POST", "responses", ``, nil, false},
		{"twice", "POST", "responses", `{"model":"gpt-5","model":"gpt-5"}`, nil, false},
		{"twice, another", "POST", "responses", `{"model":"gpt-5","model":"gpt-4o"}`, nil, false},
		{"twice, escaped", "POST", "responses", `{"model":"gpt-5","\u006dodel":"gpt-4o"}`, nil, false},
		{"another case", "POST", "responses", `{"Model":"gpt-5"}`, nil, false},
		{"both cases", "POST", "responses", `{"model":"gpt-5","MODEL":"gpt-4o"}`, nil, false},
		{"a number", "POST", "responses", `{"model":5}`, nil, false},
		{"null", "POST", "responses", `{"model":null}`, nil, false},
		{"a list", "POST", "responses", `{"model":["gpt-5"]}`, nil, false},
		{"an object", "POST", "responses", `{"model":{"id":"gpt-5"}}`, nil, false},
		{"only nested", "POST", "responses", `{"a":{"model":"gpt-5"}}`, nil, false},
		{"in a tool", "POST", "responses", `{"model":"gpt-5","tools":[{"type":"image_generation","model":"gpt-image-1"}]}`, nil, false},
		{"allowed in a tool", "POST", "responses", `{"model":"gpt-5","tools":[{"type":"image_generation","model":"gpt-5-image"}]}`, nil, true},
		{"a parameter of that name", "POST", "responses", `{"model":"gpt-5","tools":[{"parameters":{"properties":{"model":{"type":"string"}}}}]}`, nil, true},
		{"a stored prompt", "POST", "responses", `{"model":"gpt-5","prompt":{"id":"pmpt_1"}}`, nil, false},
		{"a text prompt", "POST", "completions", `{"model":"gpt-5","prompt":"x"}`, nil, true},
		{"a list of prompts", "POST", "completions", `{"model":"gpt-5","prompt":["x"]}`, nil, true},
		{"text after the object", "POST", "responses", `{"model":"gpt-5"}{"model":"gpt-4o"}`, nil, false},
		{"in a list", "POST", "responses", `[{"model":"gpt-5"}]`, nil, false},
		{"truncated", "POST", "responses", `{"model":"gpt-5"`, nil, false},
		{"deep", "POST", "responses", `{"model":"gpt-5","a":` + strings.Repeat("[", 300) + strings.Repeat("]", 300) + `}`, nil, false},
		{"a form", "POST", "audio/transcriptions", `model=gpt-5`, http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, false},
		{"no content type", "POST", "responses", `{"model":"gpt-5"}`, http.Header{}, false},
		{"compressed", "POST", "responses", `{"model":"gpt-5"}`, http.Header{"Content-Type": {"application/json"}, "Content-Encoding": {"gzip"}}, false},
		{"in the query too", "POST", "responses?model=gpt-4o", `{"model":"gpt-5"}`, nil, false},
		{"batches", "POST", "batches", `{"model":"gpt-5"}`, nil, false},
		{"batches, cancel", "POST", "batches/b/cancel", ``, nil, true},
		{"cancel", "POST", "responses/r/cancel", ``, nil, true},
		{"a list of models", "GET", "models", ``, nil, true},
		{"delete", "DELETE", "files/f", ``, nil, true},
		{"upload", "POST", "files", `x`, nil, true},
		{"realtime", "GET", "realtime?model=gpt-5-realtime", ``, http.Header{"Upgrade": {"websocket"}}, true},
		{"realtime, another", "GET", "realtime?model=gpt-4o-realtime", ``, http.Header{"Upgrade": {"websocket"}}, false},
		{"realtime, two", "GET", "realtime?model=gpt-5&model=gpt-4o", ``, http.Header{"Upgrade": {"websocket"}}, false},
		{"realtime, none", "GET", "realtime?intent=transcription", ``, http.Header{"Upgrade": {"websocket"}}, false},
		{"responses socket", "GET", "responses", ``, http.Header{"Upgrade": {"websocket"}}, false},
		{"a broken query", "GET", "models?a;b", ``, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			header := c.header
			if header == nil {
				header = http.Header{"Content-Type": {"application/json"}}
			}
			u, err := url.Parse("/v1/" + c.path)
			require.NoError(t, err)
			refused := checkModels(&http.Request{Method: c.method, URL: u, Header: header}, strings.Split(u.Path, "/")[2:], []byte(c.body), patterns)
			if c.passes {
				require.Nil(t, refused)
			} else {
				require.NotNil(t, refused)
				require.Equal(t, "broker_model", refused.code)
			}
		})
	}
}

func TestPolicy_ModelsEndToEnd(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Agents[0].Models = []string{"gpt-5*"} })
	require.Equal(t, 200, w.send("POST", "/v1/responses", `{"model":"gpt-5"}`).status)
	got := w.send("POST", "/v1/responses", `{"model":"gpt-4o"}`)
	require.Equal(t, 403, got.status)
	require.Equal(t, "broker_model", got.code())
	require.Equal(t, "gpt-4o", w.last().Model)
	large := w.request("POST", "/v1/responses", `{"model":"gpt-5","input":"`+strings.Repeat("x", keptBody)+`"}`)
	require.Equal(t, "broker_model", w.do(large).code())
	larger := w.request("POST", "/v1/responses", `{"model":"gpt-5","input":"`+strings.Repeat("x", 8*keptBody)+`"}`)
	require.Equal(t, "broker_model", w.do(larger).code(), "the client is still sending")
	chunked := w.request("POST", "/v1/responses", `{"model":"gpt-5"}`)
	chunked.ContentLength = -1
	require.Equal(t, "broker_model", w.do(chunked).code(), "a body of unknown size is not read")
}

// A path that passes is under an allowed family, and not under a forbidden one, even for
// a server that reads paths loosely.
func FuzzPath(f *testing.F) {
	for _, seed := range []string{
		"/v1/models", "/v1/m%6fdels", "/v1//organization", "/v1/models/../organization", "/v1/models%2f..%2forganization", "/v1/models;/organization",
		"/v1/ORGANIZATION", "/v1/realtime/client_secrets", "/v1/realtime/client%5Fsecrets", "/v1/models/%252e%252e/organization", "/v1/models/.", "/V1/models",
	} {
		f.Add(seed)
	}
	loose := strings.NewReplacer("\\", "/", "-", "_")
	f.Fuzz(func(t *testing.T, escaped string) {
		segments, refused := checkPath("GET", escaped, defaultFamilies)
		if refused != nil {
			return
		}
		decoded := escaped
		for range 3 { // further servers may decode again
			if once, err := url.PathUnescape(decoded); err == nil {
				decoded = once
			}
			for _, read := range []string{decoded, loose.Replace(decoded), strings.ToLower(decoded), path.Clean(loose.Replace(strings.ToLower(decoded)))} {
				read, _, _ = strings.Cut(read, ";")
				got := strings.Split(strings.Trim(path.Clean(read), "/"), "/")
				if got[0] != "v1" || neverAllowed(got[1:]) {
					t.Fatalf("%q passes and reads as %q", escaped, read)
				}
			}
		}
		if !slices.ContainsFunc(defaultFamilies, func(family string) bool { return begins(segments, family) }) {
			t.Fatalf("%q passes as %q", escaped, segments)
		}
		sent := (&url.URL{Path: "/v1/" + strings.Join(segments, "/")}).EscapedPath()
		if again, refused := checkPath("GET", sent, defaultFamilies); refused != nil || !slices.Equal(again, segments) {
			t.Fatalf("%q is sent as %q, which reads as %q", escaped, sent, again)
		}
	})
}

// A body that passes names an allowed model for every JSON parser: one that takes the
// first of two names, one that takes the last, one that ignores case.
func FuzzModels(f *testing.F) {
	for _, seed := range []string{
		`{"model":"gpt-5"}`, `{"model":"gpt-5","model":"x"}`, `{"\u006dodel":"x","model":"gpt-5"}`, `{"MODEL":"x","model":"gpt-5"}`,
		`{"model":"gpt-5","tools":[{"model":"x"}]}`, `{"a":{"model":"gpt-5"}}`, `{"model":"gpt-5","prompt":{"id":"p"}}`, `[]`, `{"model":"gpt-5"} x`, "{\"model\":\"gpt-5\xff\"}",
	} {
		f.Add([]byte(seed))
	}
	request := &http.Request{Method: "POST", URL: &url.URL{Path: "/v1/responses"}, Header: http.Header{"Content-Type": {"application/json"}}}
	f.Fuzz(func(t *testing.T, body []byte) {
		if checkModels(request, []string{"responses"}, body, []string{"gpt-5"}) != nil {
			return
		}
		var last map[string]any
		var folded struct{ Model string }
		if json.Unmarshal(body, &last) != nil || json.Unmarshal(body, &folded) != nil {
			t.Fatalf("%q passes and is not an object", body)
		}
		if last["model"] != "gpt-5" || folded.Model != "gpt-5" {
			t.Fatalf("%q passes and names %v and %q", body, last["model"], folded.Model)
		}
		for name, value := range last {
			if _, stored := value.(map[string]any); stored && strings.EqualFold(name, "prompt") || strings.EqualFold(name, "model") && name != "model" {
				t.Fatalf("%q passes with %q", body, name)
			}
		}
		var nested func(any)
		nested = func(v any) {
			switch v := v.(type) {
			case map[string]any:
				for name, value := range v {
					if text, isText := value.(string); isText && strings.EqualFold(name, "model") && text != "gpt-5" {
						t.Fatalf("%q passes and names %q", body, text)
					}
					nested(value)
				}
			case []any:
				for _, value := range v {
					nested(value)
				}
			}
		}
		nested(last)
	})
}
