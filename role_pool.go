package openaisecrets

// This file owns the pool fields of a role, and which roles can have a pool.
//
// What must stay true: a key in a pool expires at OpenAI, within the API's limit of a
// year.

import (
	"cmp"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
)

const (
	// maxPoolSize bounds the pool of a role, and maxPoolSum those of a mount.
	maxPoolSize = 100
	maxPoolSum  = 500

	defaultPoolMaxAge = 6 * time.Hour
	minPoolMaxAge     = 10 * time.Minute
	maxPoolMaxAge     = 7 * 24 * time.Hour
)

// poolMaxAge is the maximum time that a key waits in the pool.
func (r *role) poolMaxAge() time.Duration { return cmp.Or(r.PoolMaxAge, defaultPoolMaxAge) }

// longestLife is the longest time from the creation of a credential of the role to the
// end of its lease.
func (r *role) longestLife() time.Duration {
	if r.PoolSize == 0 {
		return r.maxTTL()
	}
	return r.maxTTL() + r.poolMaxAge()
}

// mergePool applies the pool fields of a write to the role that mergeRole returned.
func (r *role) mergePool(d *framework.FieldData) (problem string) {
	if raw, ok := d.GetOk("pool_size"); ok {
		if r.PoolSize = raw.(int); r.PoolSize < 0 || r.PoolSize > maxPoolSize {
			return fmt.Sprintf("pool_size must be between 0 and %d; 0 disables the pool", maxPoolSize)
		}
	}
	if raw, ok := d.GetOk("pool_max_age"); ok {
		seconds := raw.(int)
		if seconds != 0 && (seconds < int(minPoolMaxAge/time.Second) || seconds > int(maxPoolMaxAge/time.Second)) {
			return fmt.Sprintf("pool_max_age must be between %s and %s, or 0 for the default of %s", minPoolMaxAge, maxPoolMaxAge, defaultPoolMaxAge)
		}
		r.PoolMaxAge = time.Duration(seconds) * time.Second
	}
	if r.PoolSize == 0 {
		return ""
	}
	if r.KeyExpiry == expiryNone {
		return "pool_size requires key_expiry=max_ttl or key_expiry=ttl: keys in a pool must expire at OpenAI if Vault is unavailable"
	}
	if naming.Uses(r.NameTemplate, "DisplayName") {
		return "pool_size cannot be combined with .DisplayName in service_account_name_template: keys of a pool are created before a client requests them; remove .DisplayName or set pool_size=0"
	}
	field, longest := "max_ttl", r.maxTTL()
	if r.KeyExpiry == expiryTTL {
		field, longest = "ttl", r.leaseTTL(0)
	}
	if longest+r.poolMaxAge()+expiryMargin > client.MaxExpiry {
		return fmt.Sprintf("%s %s plus pool_max_age %s exceeds the longest key lifetime that OpenAI accepts (%s, with a margin of %s); reduce one of them", field, longest, r.poolMaxAge(), client.MaxExpiry, expiryMargin)
	}
	return ""
}
