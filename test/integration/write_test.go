//go:build integration

package integration

// The meaning of values that are written through Vault: its CLI sends strings, its
// API sends JSON, and the plugin protocol changes the type of numbers.

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// send sends a request with a raw body and returns the status and the response.
func (m *mount) send(method, path, body string) (status int, answer string) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(m.t.Context(), method, m.vault.Addr+"/v1/"+m.path+"/"+path, strings.NewReader(body))
	require.NoError(m.t, err)
	req.Header.Set("X-Vault-Token", m.client.Token())
	resp, err := http.DefaultClient.Do(req)
	require.NoError(m.t, err)
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	require.NoError(m.t, err)
	return resp.StatusCode, string(content)
}

// notNow is a schedule that rotates nothing while a test runs.
func notNow() string { return fmt.Sprintf("0 %d * * *", (time.Now().UTC().Hour()+12)%24) }

// TestAReadCanBeWrittenBack reads and writes with the CLI, without an edit.
func TestAReadCanBeWrittenBack(t *testing.T) {
	m := newMount(t)
	m.write("config", map[string]any{"admin_api_key": m.adminConfig()["admin_api_key"], "admin_api_key_id": "", "rotation_schedule": notNow()})
	m.write("roles/app", map[string]any{"project_id": m.project, "ttl": 0, "max_ttl": 0, "scopes": []string{"b.read", "a.read"}, "key_expiry": ""})
	m.static("batch", map[string]any{"service_account_id": "", "key_ttl": 0})
	for _, path := range []string{"config", "roles/app", "static-roles/batch"} {
		out, err := m.vaultCLI("read", "-format=json", m.path+"/"+path)
		require.NoError(t, err, out)
		var read struct{ Data json.RawMessage }
		require.NoError(t, json.Unmarshal([]byte(out), &read), out)
		before := m.read(path).Data
		require.NoError(t, m.command(m.client.Token(), string(read.Data), "write", m.path+"/"+path, "-"))
		require.Equal(t, before, m.read(path).Data, path)
		status, answer := m.send(http.MethodPut, path, string(read.Data))
		require.Equal(t, http.StatusOK, status, answer)
		require.Contains(t, answer, "Ignored read-only fields: ")
		require.NotContains(t, answer, "unrecognized")
		require.Equal(t, before, m.read(path).Data, path)
	}
	require.Empty(t, m.read("config").Data["admin_api_key_id"], "must stay empty, as written")
	require.NotEmpty(t, m.read("config").Data["effective_admin_api_key_id"])
}

// TestWrite_InvalidOrNullValuesChangeNothing sends values that no client library does.
func TestWrite_InvalidOrNullValuesChangeNothing(t *testing.T) {
	m := newMount(t)
	m.write("config", map[string]any{"rotation_schedule": notNow(), "rotation_window": "2h"})
	m.write("roles/app", map[string]any{"project_id": m.project, "ttl": "30m", "scopes": "a.read"})
	m.static("batch", nil)
	for _, path := range []string{"config", "roles/app", "static-roles/batch"} {
		before := m.read(path).Data
		for field := range before {
			for _, method := range []string{http.MethodPut, http.MethodPost} {
				status, answer := m.send(method, path, `{"`+field+`":null}`)
				require.Less(t, status, 300, "%s %s: %s", path, field, answer)
			}
			values := []string{"0.9", "1e-3", `{"a":[1]}`, `[[null]]`, `[{"a":1}]`, `" x"`, `"x\n\n"`}
			if _, number := before[field].(json.Number); number {
				values = append(values, `"0.9s"`, `"500ms"`, `"null"`, `true`, `99999999999999999999`)
			}
			for _, value := range values {
				status, answer := m.send(http.MethodPut, path, `{"`+field+`":`+value+`}`)
				if !strings.Contains(answer, "Ignored read-only fields") {
					require.Equal(t, http.StatusBadRequest, status, "%s %s=%s: %s", path, field, value, answer)
				}
			}
		}
		require.Equal(t, before, m.read(path).Data, path)
	}
	for _, body := range []string{`{"ttl":0.9}`, `{"ttl":"0.9"}`, `{"ttl":[1]}`, `{"ttl":" 5m"}`, `{"ttl":-1}`} {
		status, answer := m.send(http.MethodPut, "creds/app", body)
		require.Equal(t, http.StatusBadRequest, status, "%s: %s", body, answer)
	}
	require.Len(t, m.alive(), 1, "only the static role's account")

	for _, scopes := range []string{"null", "NULL", "[]", "{}"} { // as the CLI sends them
		require.Error(t, m.command(m.client.Token(), "", "write", m.path+"/roles/app", "scopes="+scopes))
	}
	require.Equal(t, []any{"a.read"}, m.read("roles/app").Data["scopes"])
}
