package openaisecrets

// This file owns the takeover of a mount from the community plugin
// (gitrgoliveira/vault-plugin-secrets-openai), which has the same name, and the
// same types of secret and lease: its config and roles as this engine uses them;
// community_lease.go has its leases.
//
// What must stay true: an entry is that plugin's only if it has no format version,
// which every entry of this engine has. That plugin's entries are read and not
// converted; a write stores this engine's format. What its entries do not say is
// assumed so that nothing is deleted for it: that people made the admin key, and
// that keys of its leases do not expire. What tidy must know of its roles is
// recorded before the mount has a tag, so it knows that of all that bears the tag.

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

// communityRolePrefix is where that plugin stores roles. Its config has the
// storage key of this engine's.
const communityRolePrefix = "roles/"

// takeOver completes a config that was read from an entry, if that is the
// community plugin's.
func takeOver(entry *logical.StorageEntry, c *config) (*config, error) {
	if c.Version != 0 {
		return c, nil
	}
	// Its time of the last rotation is that of the first write of the config as
	// well, so it is good for planning the next one only.
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
		// That plugin takes http without being told that it may.
		_, problem = parseEndpoint(c.APIEndpoint, true)
		c.AllowInsecureEndpoint = problem == ""
	}
	if endpoint, problem := parseEndpoint(c.APIEndpoint, true); problem == "" {
		c.APIEndpoint = endpoint
	}
	if c.RotationSchedule != "" {
		c.RotationPeriod = 0 // it stores both, and Vault's scheduler takes this one
	}
	if c.scheduled() {
		c.RotationManager = managerVault // without one it refuses a schedule
		c.planFrom(only.LastRotated)
	}
	return c, nil
}

// getCommunityRole reads a role of the community plugin; nil when there is none.
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
