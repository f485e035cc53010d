package openaisecrets

// Golden files pin a field only if it is set in them: omitempty hides an empty one.

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/stretchr/testify/require"
)

func TestGolden_EveryFieldIsSet(t *testing.T) {
	t.Parallel()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		t.Skip("other tests are writing the files")
	}
	entries := map[string]any{ // by the start of the file's name; all others are WAL entries
		"config.": config{}, "role": role{}, "static_role": staticRole{}, "lease": leaseData{}, "mount.": mountEntry{},
		"project.": projectEntry{}, "tidy.": tidyEntry{}, "longest_lease.": longestLeaseEntry{}, "usage_records.": usageEntry{}, "guardrail.": bounds{}, "spending_state.": roleState{},
	}
	paths, err := filepath.Glob("testdata/*.v*.json")
	require.NoError(t, err)
	set := map[string]bool{} // the fields of stored structs; true if set in one of the files
	types := map[reflect.Type]bool{}
	for _, path := range paths {
		file := filepath.Base(path)
		content := golden(t, file)
		var entry any
		for start, value := range entries {
			if strings.HasPrefix(file, start) {
				entry = value
			}
		}
		if entry == nil {
			var stored framework.WALEntry
			require.NoError(t, json.Unmarshal(content, &stored), file)
			require.NotEmpty(t, stored.Kind, file)
			content, err = json.Marshal(stored.Data)
			require.NoError(t, err)
			if entry = (credential{}); stored.Kind == walAdminKey {
				entry = adminKeyEntry{}
			}
		}
		value := reflect.New(reflect.TypeOf(entry))
		require.NoError(t, json.Unmarshal(content, value.Interface()), file)
		types[value.Type().Elem()] = true
		noteFields(value.Elem(), set)
	}
	require.Len(t, types, len(entries)+2, "entries with a golden file")
	require.Greater(t, len(set), 60, "the fields were not found")
	for field, is := range set {
		if !is {
			t.Errorf("no golden file has %s; set it in the test of the entry, and run UPDATE_GOLDEN=1 go test -run TestGolden .", field)
		}
	}
}

// noteFields records the stored fields of a struct, and of the structs in it, and whether
// they are set.
func noteFields(value reflect.Value, set map[string]bool) {
	switch value.Kind() { //nolint:exhaustive // the others have no fields
	case reflect.Pointer:
		if value.IsNil() { // its fields are stored, too
			value = reflect.New(value.Type().Elem())
		}
		noteFields(value.Elem(), set)
	case reflect.Slice:
		for i := range value.Len() {
			noteFields(value.Index(i), set)
		}
	case reflect.Struct:
		for i := range value.NumField() {
			field := value.Type().Field(i)
			tag, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			if tag == "-" || !field.IsExported() && !field.Anonymous {
				continue
			}
			if !field.Anonymous {
				name := value.Type().Name() + "." + field.Name
				set[name] = set[name] || !value.Field(i).IsZero()
			}
			noteFields(value.Field(i), set)
		}
	}
}
