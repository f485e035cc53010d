package openaisecrets

// This file owns the migration of a mount from the community plugin
// (gitrgoliveira/vault-plugin-secrets-openai), which has the same name and the same
// secret type: its config and roles. community_lease.go has its leases.
//
// What must stay true: an entry is the community plugin's only if it has no format
// version; all entries of this engine have one. The engine reads these entries without
// converting them, and a write stores its own format. Missing values get defaults that
// delete nothing: the admin key counts as created by a person, and keys of leases as
// never expiring. The projects and longest lease of its roles are recorded before the
// mount has a tag, so tidy has them for everything with the tag.

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

// communityRolePrefix is where that plugin stores roles. Its config has the same
// storage key as this engine's.
const communityRolePrefix = "roles/"

// takeOver completes a config that was read from an entry of the community plugin.
func takeOver(entry *logical.StorageEntry, c *config) (*config, error) {
	if c.Version != 0 {
		return c, nil
	}
	// That plugin also sets it when the config is first written, so it serves only to
	// plan the next rotation.
	var only struct {
		LastRotated time.Time `json:"last_rotated_time"`
	}
	if err := entry.DecodeJSON(&only); err != nil {
		return nil, fmt.Errorf("decoding the config: %w", err)
	}
	c.KeyOriginUnknown = true
	c.RotationGracePeriod = defaultRotationGrace
	c.RequestTimeout = client.DefaultTimeout
	c.MaxConcurrent = client.DefaultConcurrency
	c.TidyInterval, c.TidySafetyBuffer = defaultTidyInterval, defaultTidySafetyBuffer
	if c.APIEndpoint == "" {
		c.APIEndpoint = client.DefaultBaseURL
	}
	if _, problem := parseEndpoint(c.APIEndpoint, false); problem != "" {
		// That plugin accepts http without a setting that allows it.
		_, problem = parseEndpoint(c.APIEndpoint, true)
		c.AllowInsecureEndpoint = problem == ""
	}
	if endpoint, problem := parseEndpoint(c.APIEndpoint, true); problem == "" {
		c.APIEndpoint = endpoint
	}
	if c.RotationSchedule != "" {
		c.RotationPeriod = 0 // it can store both, and Vault's scheduler uses the schedule
	}
	if c.scheduled() {
		c.RotationManager = managerVault // that plugin rejects a schedule without it
		c.PlanFrom(only.LastRotated)
	}
	return c, nil
}

// getCommunityRole reads a role of the community plugin; nil if there is none.
func getCommunityRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	entry, err := s.Get(ctx, communityRolePrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading role %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil
	}
	r := newRole()
	if err := entry.DecodeJSON(r); err != nil {
		return nil, unreadable{fmt.Errorf("decoding role %q: %w", name, err)}
	}
	if r.MaxTTL <= 0 {
		r.MaxTTL = defaultMaxTTL
	}
	if r.TTL <= 0 {
		r.TTL = min(defaultTTL, r.MaxTTL)
	}
	return r, nil
}
