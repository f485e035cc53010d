package openaisecrets

// This file owns the mount's own records: its tag, and the longest lease that any of
// its roles has ever allowed.
//
// What must stay true: both are recorded before anything is created with them.

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/schedule"
)

const (
	mountStorageKey = "mount"
	mountVersion    = 1
)

// mountEntry is written once per mount.
type mountEntry struct {
	Version int `json:"version"`
	// Tag starts the random suffix of every name that this mount generates, so that
	// each name identifies its mount.
	Tag string `json:"tag"`
	// Pools is set if a role of this mount has or has had a pool. Otherwise, no role is
	// read to find out.
	Pools bool `json:"pools,omitempty"`
}

// getMount returns errNoTag when there is no entry.
func getMount(ctx context.Context, s logical.Storage) (m mountEntry, err error) {
	entry, err := readEntry(ctx, s, mountStorageKey, "the mount tag", mountVersion, &m)
	if err == nil && entry == nil {
		err = errNoTag
	}
	return m, err
}

// getTag reads the mount tag; it is errNoTag when there is none.
func getTag(ctx context.Context, s logical.Storage) (string, error) {
	m, err := getMount(ctx, s)
	return m.Tag, err
}

var errNoTag = errors.New("the mount has no tag; write the config again")

const (
	longestLeaseStorageKey = "longest-lease"
	longestLeaseVersion    = 1
	// assumedLongest is the assumed longest lease of a mount that an earlier release
	// created, since its deleted roles are not recorded: Vault's default limit, unless
	// the mount's is longer.
	assumedLongest = 768 * time.Hour
)

// longestLeaseEntry is the longest lease that a role of this mount has ever allowed,
// plus the time that its key may have waited in a pool before. It ignores the mount's max_lease_ttl, which may be raised later.
type longestLeaseEntry struct {
	Version      int           `json:"version"`
	LongestLease time.Duration `json:"longest_lease"`
}

// getLongestLease returns nil when nothing is recorded.
func getLongestLease(ctx context.Context, s logical.Storage) (*longestLeaseEntry, error) {
	var entry longestLeaseEntry
	stored, err := readEntry(ctx, s, longestLeaseStorageKey, "the longest lease of the roles", longestLeaseVersion, &entry)
	if err != nil || stored == nil {
		return nil, err
	}
	return &entry, nil
}

func putLongestLease(ctx context.Context, s logical.Storage, lease time.Duration) error {
	return writeEntry(ctx, s, longestLeaseStorageKey, "the longest lease of the roles", longestLeaseEntry{Version: longestLeaseVersion, LongestLease: lease})
}

// raiseLongestLease records that a role is about to allow leases of that length. Call it
// before you store the role.
func (b *backend) raiseLongestLease(ctx context.Context, s logical.Storage, lease time.Duration) error {
	lease = min(lease, schedule.MaxPeriod)
	unlock, err := b.entries.Lock(ctx, longestLeaseStorageKey) // roles are written in parallel
	if err != nil {
		return fmt.Errorf("waiting for another write of the longest lease: %w", err)
	}
	defer unlock()
	entry, err := getLongestLease(ctx, s)
	if err != nil {
		return err
	}
	if entry == nil {
		if lease, err = b.longestUnrecorded(ctx, s, lease); err != nil {
			return err
		}
	} else if lease <= entry.LongestLease {
		return nil
	}
	return putLongestLease(ctx, s, lease)
}

// longestUnrecorded returns the longest lease of a mount that has no longestLeaseEntry
// and now allows leases of that length. A mount without a tag has issued nothing; one
// with a tag was created by an earlier release.
func (b *backend) longestUnrecorded(ctx context.Context, s logical.Storage, lease time.Duration) (time.Duration, error) {
	if _, err := getTag(ctx, s); errors.Is(err, errNoTag) {
		return lease, nil
	} else if err != nil {
		return 0, err
	}
	lease = max(lease, assumedLongest, b.System().MaxLeaseTTL())
	names, err := listNames(ctx, s, roleStoragePrefix, communityRolePrefix)
	if err != nil {
		return 0, fmt.Errorf("listing the roles: %w", err)
	}
	for _, name := range names {
		r, err := getRole(ctx, s, name)
		switch {
		case errors.As(err, &unreadable{}): // written by a newer release, which has recorded its lease
		case err != nil:
			return 0, err
		case r != nil:
			lease = max(lease, r.longestLife())
		}
	}
	return lease, nil
}
