package openaisecrets

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// entries is all that storage holds, as text.
func (h *harness) entries() string {
	h.t.Helper()
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	var all strings.Builder
	for _, key := range slices.Sorted(slices.Values(keys)) {
		entry, err := h.storage.inner.Get(context.Background(), key)
		require.NoError(h.t, err)
		fmt.Fprintf(&all, "%s %s\n", key, entry.Value)
	}
	return all.String()
}

func TestRequest_AKeyInAnyOtherPlaceIsRefusedWithoutBeingQuoted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("static-roles/batch", map[string]any{"project_id": h.project, "rotation_period": "24h"}))
	h.sim.KeepAll()
	const key = "sk-proj-AbCdEf0123456789_-AbCdEf0123456789"
	before := h.entries()
	h.sim.ResetRequests()
	refused := func(op logical.Operation, at string, data map[string]any, named string) {
		t.Helper()
		resp, err := h.do(t.Context(), op, at, data)
		require.Contains(t, h.refused(resp, err), named)
	}
	fields := 0
	for _, p := range h.b.Paths {
		at := strings.TrimPrefix(strings.ReplaceAll(readablePath(p.Pattern), "<name>", "app"), "openai/")
		var op logical.Operation
		for _, op = range []logical.Operation{logical.UpdateOperation, logical.ReadOperation, logical.ListOperation} {
			if p.Operations[op] != nil {
				break
			}
		}
		for name := range p.Fields {
			if strings.Contains(p.Pattern, "(?P<"+name+">") {
				for op := range p.Operations {
					refused(op, strings.TrimSuffix(at, "app")+key, nil, "the path contains an API key")
				}
				continue
			}
			for _, value := range []any{key, " " + key + "\n", "https://" + key + "@api.openai.com/v1", "a," + key, []any{"api.model.read", key}, map[string]any{"a": []any{key}}, map[string]any{key: 1}, []any{map[string]any{"a": map[string]any{"b": key}}}} {
				_, isText := value.(string)
				if name == "admin_api_key" && isText {
					continue
				}
				fields++
				refused(op, at, map[string]any{name: value}, name)
			}
		}
		refused(op, at, map[string]any{"no_such_field": key}, "no_such_field")
		refused(op, at, map[string]any{key: "x"}, "the name of a field contains an API key")
		refused(op, at, map[string]any{"a " + key + strings.Repeat("x", 100): "x"}, "the name of a field contains an API key")
	}
	require.Greater(t, fields, 200)
	require.Equal(t, before, h.entries())
	require.Empty(t, h.routes())
	for _, text := range []string{h.log.String(), strings.Join(h.said, "\n"), h.told.text()} {
		require.NotContains(t, text, key[:20])
	}
}

func TestRequest_NoExistenceCheckQuotesAKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	const key = "sk-proj-AbCdEf0123456789_-AbCdEf0123456789"
	check := func(at string, data map[string]any) {
		t.Helper()
		_, _, err := h.b.HandleExistenceCheck(t.Context(), &logical.Request{Operation: logical.CreateOperation, Path: at, Data: data, Storage: h.storage})
		if err != nil {
			require.NotContains(t, err.Error(), key)
		}
	}
	for at, field := range map[string]string{"config": "admin_api_key", "roles/app": "ttl", "static-roles/app": "rotation_period"} {
		for _, value := range []any{key, []any{key}, map[string]any{key: key}} {
			check(at, map[string]any{field: value})
		}
	}
	require.NoError(t, h.storage.inner.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + key, Value: []byte("{")}))
	check("roles/"+key, nil)
	require.NotContains(t, h.log.String(), key)
}

func TestRequest_WordsThatContainSKPassEverywhere(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for _, word := range []string{"task-runner", "task-runner-0123456789-0123456789", "risk-api-production-europe-west", "sk-short"} {
		h.must(h.write("roles/"+word, map[string]any{"project_id": h.project, "service_account_description": word, "service_account_name_template": word + "-{{.RandomSuffix}}"}))
		require.Equal(t, word, h.must(h.read("roles/" + word)).Data["service_account_description"])
		lease := h.lease("creds/"+word, nil)
		require.True(t, strings.HasPrefix(lease.Data["service_account"].(string), word+"-"))
		require.NoError(t, h.revoke(lease))
		require.Contains(t, h.refused(h.write("roles/x", map[string]any{"project_id": word})), word, "a refusal names it as it is")
		h.must(h.remove("roles/" + word))
	}
}

// A role that an earlier release stored under a key as its name can be deleted,
// and only that.
func TestRequest_ARoleWithAKeyForANameCanBeDeleted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	const name = "sk-proj-AbCdEf0123456789"
	entry, err := h.storage.inner.Get(t.Context(), roleStoragePrefix+"app")
	require.NoError(t, err)
	require.NoError(t, h.storage.inner.Put(t.Context(), &logical.StorageEntry{Key: roleStoragePrefix + name, Value: entry.Value}))
	h.refused(h.read("creds/" + name))
	h.must(h.remove("roles/" + name))
	require.NotContains(t, h.entries(), name)
	h.refused(h.remove("roles/" + name))
}
