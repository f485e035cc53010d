//go:build integration

package integration

// The OpenAPI document of a mounted engine is valid, and clients can be generated
// from it.

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

// operationIDs give the methods of generated clients their names: a change breaks
// their users.
var operationIDs = map[string]string{
	"GET config":                 "openai-read-configuration",
	"POST config":                "openai-write-configuration",
	"DELETE config":              "openai-delete-configuration",
	"POST config/rotate":         "openai-rotate-admin-key",
	"POST rotate-root":           "openai-rotate-root",
	"GET roles/":                 "openai-list-roles",
	"GET roles/{name}":           "openai-read-role",
	"POST roles/{name}":          "openai-write-role",
	"DELETE roles/{name}":        "openai-delete-role",
	"GET projects/{id}":          "openai-read-project",
	"GET usage":                  "openai-read-usage",
	"GET creds/{name}":           "openai-issue-credentials",
	"POST creds/{name}":          "openai-issue-credentials-with-parameters",
	"GET static-roles/":          "openai-list-static-roles",
	"GET static-roles/{name}":    "openai-read-static-role",
	"POST static-roles/{name}":   "openai-write-static-role",
	"DELETE static-roles/{name}": "openai-delete-static-role",
	"GET static-creds/{name}":    "openai-read-static-role-credentials",
	"POST rotate-role/{name}":    "openai-rotate-static-role",
	"GET projects/":              "openai-list-projects",
	"POST tidy":                  "openai-tidy-accounts",
	"GET tidy-status":            "openai-tidy-status",
	"POST tidy-cancel":           "openai-tidy-cancel",
}

// document returns one mount's part of Vault's OpenAPI document.
func document(t *testing.T, m *mount) *openapi3.T {
	t.Helper()
	raw, err := m.client.Logical().ReadRawWithContext(t.Context(), "sys/internal/specs/openapi")
	require.NoError(t, err)
	defer raw.Body.Close()
	var doc struct {
		OpenAPI    string                     `json:"openapi"`
		Info       map[string]any             `json:"info"`
		Paths      map[string]json.RawMessage `json:"paths"`
		Components struct {
			Schemas map[string]json.RawMessage `json:"schemas"`
		} `json:"components"`
	}
	require.NoError(t, json.NewDecoder(raw.Body).Decode(&doc))
	for path := range doc.Paths {
		if !strings.HasPrefix(path, "/"+m.path+"/") {
			delete(doc.Paths, path)
		}
	}
	require.NotEmpty(t, doc.Paths)
	for name := range doc.Components.Schemas {
		if !strings.HasPrefix(name, "Openai") && name != "StandardListResponse" {
			delete(doc.Components.Schemas, name)
		}
	}
	encoded, err := json.Marshal(doc)
	require.NoError(t, err)
	parsed, err := openapi3.NewLoader().LoadFromData(encoded)
	require.NoError(t, err)
	return parsed
}

func TestTheOpenAPIDocumentIsValidAndMakesAClient(t *testing.T) {
	// Use a separate server: with several mounts of one type, Vault numbers their
	// operations.
	m := newMountOn(t, ownVault(t))
	doc := document(t, m)
	require.NoError(t, doc.Validate(t.Context()))

	found := map[string]string{}
	for path, item := range doc.Paths.Map() {
		for method, operation := range item.Operations() {
			at := method + " " + strings.TrimPrefix(path, "/"+m.path+"/")
			found[at] = operation.OperationID
			require.NotEmpty(t, operation.Summary, at)
			if operation.RequestBody != nil {
				schema := operation.RequestBody.Value.Content.Get("application/json").Schema
				require.NotEmpty(t, schema.Ref, "%s: the request body refers to no schema", at)
			}
			if ok := operation.Responses.Status(http.StatusOK); ok != nil {
				require.NotEmpty(t, ok.Value.Content.Get("application/json").Schema.Ref, "%s: the response refers to no schema", at)
			}
		}
	}
	ids := map[string]bool{}
	for at, id := range found {
		require.False(t, ids[id], "duplicate operation ID %s", id)
		ids[id] = true
		require.Regexp(t, `^openai(-[a-z]+){2,5}$`, id, at)
	}
	for at, id := range operationIDs {
		require.Equal(t, id, found[at], at)
	}

	began := time.Now()
	useGeneratedClient(t, m, doc)
	t.Logf("client generated, compiled and used in %s", time.Since(began).Round(100*time.Millisecond))
}

// generatorConfig asks the generator for the models and the client.
const generatorConfig = `package: engine
output: engine/engine.go
generate:
  models: true
  client: true
output-options:
  response-type-suffix: Result # Vault's own schemas are called ...Response
`

// generatedUser writes and reads a role with the generated client. Vault's
// document describes the data of a response, but not its envelope.
const generatedUser = `package main

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"vault-plugin-secrets-openai/tools/openapi/engine"
)

func main() {
	token := func(_ context.Context, r *http.Request) error { r.Header.Set("X-Vault-Token", os.Getenv("VAULT_TOKEN")); return nil }
	c, err := engine.NewClientWithResponses(os.Getenv("VAULT_ADDR")+"/v1", engine.WithRequestEditorFn(token))
	if err != nil {
		panic(err)
	}
	project, scopes := os.Getenv("PROJECT"), []string{"api.model.request"}
	written, err := c.OpenaiWriteRoleWithResponse(context.Background(), "generated", engine.OpenaiWriteRoleRequest{ProjectId: &project, Scopes: &scopes})
	if err != nil {
		panic(err)
	}
	read, err := c.OpenaiReadRoleWithResponse(context.Background(), "generated")
	if err != nil {
		panic(err)
	}
	fmt.Println(written.StatusCode(), read.StatusCode(), string(read.Body))
}
`

// useGeneratedClient generates a client from the document with the generator that
// tools/openapi pins, and compiles and runs a program that uses it.
func useGeneratedClient(t *testing.T, m *mount, doc *openapi3.T) {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	dir := t.TempDir()
	write := func(name, content string) {
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(root, "tools", "openapi", name))
		require.NoError(t, err)
		write(name, string(content))
	}
	encoded, err := doc.MarshalJSON()
	require.NoError(t, err)
	write("openapi.json", string(encoded))
	write("generate.yaml", generatorConfig)
	write("main.go", generatedUser)
	write("engine/doc.go", "package engine\n")

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // for a machine with a cold build cache
	defer cancel()
	run := func(name string, args ...string) string {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "VAULT_ADDR="+m.vault.Addr, "VAULT_TOKEN="+m.vault.RootToken, "PROJECT="+m.project)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s %v: %s", name, args, out)
		return string(out)
	}
	began := time.Now()
	run("go", "tool", "oapi-codegen", "-config", "generate.yaml", "openapi.json")
	t.Logf("generated in %s", time.Since(began).Round(100*time.Millisecond))
	run("go", "build", "-buildvcs=false", "-o", "user", ".")
	out := run(filepath.Join(dir, "user"))
	require.Regexp(t, `^204 200 `, out)
	var answer api.Secret
	require.NoError(t, json.Unmarshal([]byte(strings.SplitN(out, " ", 3)[2]), &answer))
	require.Equal(t, []any{"api.model.request"}, answer.Data["scopes"])
}
