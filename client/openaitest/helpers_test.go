// This file owns the helpers of this package's tests. They send plain HTTP requests,
// since the client is itself tested with the simulator.

package openaitest

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// start is Start with validation against OpenAI's document.
func start(t *testing.T, opts Options) *Server {
	t.Helper()
	s := Start(t, opts)
	s.Validate(t)
	return s
}

type reply struct {
	status int
	header http.Header
	raw    string
	body   map[string]any
}

// field returns the value at a path such as "api_key.value", or nil.
func (r reply) field(path string) any {
	var at any = r.body
	for _, name := range strings.Split(path, ".") {
		o, _ := at.(map[string]any)
		at = o[name]
	}
	return at
}

func (r reply) text(t *testing.T, path string) string {
	t.Helper()
	s, isText := r.field(path).(string)
	require.True(t, isText, "%s in %s", path, r.raw)
	return s
}

func (r reply) ids(t *testing.T) []string {
	t.Helper()
	list, isList := r.body["data"].([]any)
	require.True(t, isList, r.raw)
	ids := []string{}
	for _, item := range list {
		ids = append(ids, item.(map[string]any)["id"].(string))
	}
	return ids
}

// try sends a request; body may be nil, a string to send unchanged, or a value to encode
// as JSON.
func try(s *Server, key, method, path string, body any) (reply, error) {
	var raw []byte
	switch b := body.(type) {
	case nil:
	case string:
		raw = []byte(b)
	default:
		raw, _ = json.Marshal(b)
	}
	req, err := http.NewRequest(method, s.URL()+path, bytes.NewReader(raw))
	if err != nil {
		return reply{}, err
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	r := reply{status: resp.StatusCode, header: resp.Header, raw: string(text)}
	_ = json.Unmarshal(text, &r.body)
	return r, err
}

func send(t *testing.T, s *Server, key, method, path string, body any) reply {
	t.Helper()
	r, err := try(s, key, method, path, body)
	require.NoError(t, err)
	return r
}

// manage sends a request with the first admin key.
func manage(t *testing.T, s *Server, method, path string, body any) reply {
	t.Helper()
	_, key := s.AdminKey()
	return send(t, s, key, method, path, body)
}

func requireError(t *testing.T, r reply, status int, code, param string) {
	t.Helper()
	require.Equal(t, status, r.status, r.raw)
	require.NotEmpty(t, r.text(t, "error.message"))
	require.Equal(t, orNull(code), r.field("error.code"), r.raw)
	require.Equal(t, orNull(param), r.field("error.param"), r.raw)
}

func accountsPath(project string) string {
	return "/organization/projects/" + project + "/service_accounts"
}

func keysPath(project string) string { return "/organization/projects/" + project + "/api_keys" }

// newAccount creates an account over HTTP and excludes it and its key from the leak check.
func newAccount(t *testing.T, s *Server, project string, body object) (account, key, value string) {
	t.Helper()
	r := manage(t, s, "POST", accountsPath(project), body)
	require.Equal(t, 200, r.status, r.raw)
	account = r.text(t, "id")
	s.Keep(account)
	if r.body["api_key"] != nil {
		key, value = r.text(t, "api_key.id"), r.text(t, "api_key.value")
		s.Keep(key)
	}
	return account, key, value
}
