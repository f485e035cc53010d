package openaisecrets

// This file owns what a mount records of itself: its tag, and the longest lease that a
// role of it has ever allowed.
//
// What must stay true: both are recorded before anything is created with them.

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

const (
	mountStorageKey = "mount"
	mountVersion    = 1
)

// mountEntry is what a mount knows of itself, made once.
type mountEntry struct {
	Version int `json:"version"`
	// Tag starts the random suffix of every name that this mount gives, so
	// that each name says which mount made it.
	Tag string `json:"tag"`
}

// getTag reads the mount's tag; it is errNoTag when there is none.
func getTag(ctx context.Context, s logical.Storage) (string, error) {
	entry, err := s.Get(ctx, mountStorageKey)
	if err != nil {
		return "", fmt.Errorf("reading the mount's tag: %w", err)
	}
	var m mountEntry
	if entry == nil {
		return "", errNoTag
	}
	if err := entry.DecodeJSON(&m); err != nil {
		return "", fmt.Errorf("decoding the mount's tag: %w", err)
	}
	if m.Version > mountVersion {
		return "", fmt.Errorf("the mount's tag was written by a newer version of this plugin (format %d, this one knows %d)", m.Version, mountVersion)
	}
	return m.Tag, nil
}

var errNoTag = errors.New("the mount has no tag: write its config again")

const (
	longestLeaseStorageKey = "longest-lease"
	longestLeaseVersion    = 1
	// assumedLongest is what leases of a mount can have lasted that an earlier
	// release made, whose former roles nobody remembers: Vault's default limit, or
	// the mount's if that is longer.
	assumedLongest = 768 * time.Hour
)

// longestLeaseEntry is the longest lease that a role of this mount has ever
// allowed. The mount's max_lease_ttl, which may be raised again, does not limit it.
type longestLeaseEntry struct {
	Version      int           `json:"version"`
	LongestLease time.Duration `json:"longest_lease"`
}

// getLongestLease returns nil when it is not recorded.
func getLongestLease(ctx context.Context, s logical.Storage) (*longestLeaseEntry, error) {
	stored, err := s.Get(ctx, longestLeaseStorageKey)
	if err != nil {
		return nil, fmt.Errorf("reading the longest lease of the roles: %w", err)
	}
	if stored == nil {
		return nil, nil
	}
	var entry longestLeaseEntry
	if err := stored.DecodeJSON(&entry); err != nil {
		return nil, fmt.Errorf("decoding the longest lease of the roles: %w", err)
	}
	if entry.Version > longestLeaseVersion {
		return nil, fmt.Errorf("the longest lease of the roles was written by a newer version of this plugin (format %d, this one knows %d)", entry.Version, longestLeaseVersion)
	}
	return &entry, nil
}

func putLongestLease(ctx context.Context, s logical.Storage, lease time.Duration) error {
	entry, err := logical.StorageEntryJSON(longestLeaseStorageKey, longestLeaseEntry{Version: longestLeaseVersion, LongestLease: lease})
	if err != nil {
		return err
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing the longest lease of the roles: %w", err)
	}
	return nil
}

// raiseLongestLease records that a role is about to allow leases of that length. It
// precedes the write of the role.
func (b *backend) raiseLongestLease(ctx context.Context, s logical.Storage, lease time.Duration) error {
	lease = min(lease, maxRotationPeriod)
	b.longestLock.Lock() // roles are written in parallel
	defer b.longestLock.Unlock()
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

// longestUnrecorded is the longest lease of a mount without the entry that now
// allows leases of that length. What has no tag has issued nothing; what has one was
// made by an earlier release.
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
		case errors.As(err, &unreadable{}): // by a newer release, which has recorded its lease
		case err != nil:
			return 0, err
		case r != nil:
			lease = max(lease, r.maxTTL())
		}
	}
	return lease, nil
}
