package openaisecrets

// This file owns what a static role stores about a key or account that was deleted at
// OpenAI, not by this engine, and the field on_missing.
//
// What must stay true: it is stored only after two proofs (static_check.go).

import (
	"cmp"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"

	"vault-plugin-secrets-openai/internal/text"
)

// What can be missing.
const (
	missingKey     = "api_key"
	missingAccount = "service_account"
)

// missing says what was deleted of the active key and the account of a static role.
type missing struct {
	What  string    `json:"what"`
	Since time.Time `json:"since"` // the first proof
}

// what is empty if nothing is missing.
func (m *missing) what() string {
	if m == nil {
		return ""
	}
	return m.What
}

// since is zero if nothing is missing.
func (m *missing) since() time.Time {
	if m == nil {
		return time.Time{}
	}
	return m.Since
}

// text is the warning for readers of the role.
func (m *missing) text(mount, name, account, key string, adopted bool) string {
	since := text.Time(m.Since)
	if m.What == missingKey {
		return fmt.Sprintf("Key %s was deleted at OpenAI before %s, not by this mount. To create another, run \"vault write -f %srotate-role/%s\" or set on_missing=recreate.", key, since, mount, name)
	}
	how := "delete the static role and write it again, or set on_missing=recreate"
	if adopted {
		how = "delete the static role and write it with another service_account_id"
	}
	return fmt.Sprintf("Service account %s, with its keys, was deleted at OpenAI before %s, not by this mount. To replace it, %s.", account, since, how)
}

// onMissing is the reaction to a key or account that was deleted at OpenAI. "" is the
// default.
type onMissing string

const (
	warnMissing     onMissing = "warn"     // readers are warned
	recreateMissing onMissing = "recreate" // it is created again
)

func (m onMissing) String() string { return string(cmp.Or(m, warnMissing)) }

// take reads the field on_missing. The default is stored as no value.
func (m *onMissing) take(d *framework.FieldData) (problem string) {
	raw, ok := d.GetOk("on_missing")
	if !ok {
		return ""
	}
	switch value := onMissing(raw.(string)); value {
	case "", warnMissing:
		*m = ""
	case recreateMissing:
		*m = value
	default:
		return fmt.Sprintf("on_missing must be %s or %s", warnMissing, recreateMissing)
	}
	return ""
}
