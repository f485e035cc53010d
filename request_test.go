package openaisecrets

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestRequest_AMisplacedKeyIsRejectedWithoutQuotingIt(t *testing.T) {
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
		at := strings.TrimPrefix(strings.ReplaceAll(readablePath(p.Pattern), ":name", "app"), "openai/")
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
		refused(op, at, map[string]any{key: "x"}, "a field name contains an API key")
		refused(op, at, map[string]any{"a " + key + strings.Repeat("x", 100): "x"}, "a field name contains an API key")
	}
	require.Greater(t, fields, 200)
	require.Equal(t, before, h.entries())
	require.Empty(t, h.routes())
	for _, text := range []string{h.log.String(), strings.Join(h.said, "\n"), h.events.text()} {
		require.NotContains(t, text, key[:20])
	}
}

func TestRequest_ExistenceChecksDoNotQuoteAKey(t *testing.T) {
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

func TestRequest_WordsThatContainSKAreAccepted(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	for _, word := range []string{"task-runner", "task-runner-0123456789-0123456789", "risk-api-production-europe-west", "sk-short"} {
		h.must(h.write("roles/"+word, map[string]any{"project_id": h.project, "service_account_description": word, "service_account_name_template": word + "-{{.RandomSuffix}}"}))
		require.Equal(t, word, h.must(h.read("roles/" + word)).Data["service_account_description"])
		lease := h.lease("creds/"+word, nil)
		require.True(t, strings.HasPrefix(lease.Data["service_account"].(string), word+"-"))
		require.NoError(t, h.revoke(lease))
		require.Contains(t, h.refused(h.write("roles/x", map[string]any{"project_id": word})), word, "an error quotes the word unchanged")
		h.must(h.remove("roles/" + word))
	}
}

// A role that an earlier release stored with a key as its name can be listed, read, and
// deleted; other operations are rejected with the reason.
func TestRequest_ARoleWithAKeyForANameCanBeReadAndDeleted(t *testing.T) {
	t.Parallel()
	const name = "sk-proj-AbCdEf0123456789"
	for where, c := range map[string]struct{ at, prefix string }{
		"role":                 {"roles/", roleStoragePrefix},
		"community role":       {"roles/", communityRolePrefix},
		"static role":          {"static-roles/", staticStoragePrefix},
		"unreadable":           {"roles/", roleStoragePrefix},
		"unreadable static":    {"static-roles/", staticStoragePrefix},
		"unreadable community": {"roles/", communityRolePrefix},
	} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.holdStatic()
			value := []byte(fmt.Sprintf(`{"version":1,"project_id":%q,"adopted":true,"current_key":{"id":"key_x"}}`, h.project))
			broken := strings.HasPrefix(where, "unreadable")
			if broken {
				value = []byte("{")
			}
			require.NoError(t, h.storage.inner.Put(t.Context(), &logical.StorageEntry{Key: c.prefix + name, Value: value}))
			if c.prefix == communityRolePrefix && !broken {
				require.NoError(t, h.storage.inner.Put(t.Context(), &logical.StorageEntry{Key: c.prefix + name, Value: []byte(fmt.Sprintf(`{"project_id":%q}`, h.project))}))
			}
			require.Contains(t, h.must(h.list(c.at)).Data["keys"], name)

			refuse := func(resp *logical.Response, err error) {
				t.Helper()
				said := h.refused(resp, err)
				require.Contains(t, said, "can only be listed, read, and deleted")
				require.NotContains(t, said, name)
			}
			refuse(h.write(c.at+name, map[string]any{"project_id": h.project}))
			if c.at == "roles/" {
				refuse(h.read("creds/" + name))
				refuse(h.write("creds/"+name, nil))
			} else {
				refuse(h.read("static-creds/" + name))
				refuse(h.write("rotate-role/"+name, nil))
			}
			resp, err := h.read(c.at + name)
			if broken {
				require.Error(t, err)
				require.NotContains(t, err.Error(), name)
			} else {
				require.Equal(t, h.project, h.must(resp, err).Data["project_id"])
			}
			if !broken || c.at == "roles/" {
				h.must(h.remove(c.at + name))
				require.NotContains(t, h.entries(), c.prefix+name)
				require.Contains(t, h.refused(h.read(c.at+name)), "the path contains an API key")
				require.Contains(t, h.refused(h.remove(c.at+name)), "the path contains an API key")
			}
			require.NotContains(t, h.log.String(), name)
		})
	}
}
