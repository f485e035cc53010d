package openaisecrets

// This file owns reading and writing storage entries, and the check of their format.
//
// What must stay true: the engine rejects an entry of a newer version with an error
// that names it, and distinguishes an entry that it cannot decode from a storage
// failure.

import (
	"context"
	"fmt"

	"github.com/hashicorp/vault/sdk/logical"
)

// unreadable is the error for an entry that storage has and this version cannot decode.
// After any other error, it is unknown whether storage has the entry.
type unreadable struct{ error }

func (u unreadable) Unwrap() error { return u.error }

// notRead is the error for a read that storage did not answer; a repeat may succeed.
type notRead struct{ error }

func (n notRead) Unwrap() error { return n.error }

// newerFormat is the error for an entry that a newer version of this plugin wrote.
func newerFormat(what string, format, known int) error {
	return fmt.Errorf("%s was written by a newer version of this plugin (format %d; this version supports up to format %d); upgrade the plugin", what, format, known)
}

// readEntry decodes an entry into a value and returns the raw entry, nil if there is
// none. what names it in errors; known is the newest format that this version supports.
func readEntry(ctx context.Context, s logical.Storage, key, what string, known int, into any) (*logical.StorageEntry, error) { //nolint:unparam // each kind of entry has its own version
	entry, err := s.Get(ctx, key)
	if err != nil {
		return nil, notRead{fmt.Errorf("reading %s: %w", what, err)}
	}
	if entry == nil {
		return nil, nil
	}
	var format struct {
		Version int `json:"version"`
	}
	if err := entry.DecodeJSON(&format); err != nil {
		return nil, unreadable{fmt.Errorf("decoding %s: %w", what, err)}
	}
	if format.Version > known { // its fields may have other types
		return nil, unreadable{newerFormat(what, format.Version, known)}
	}
	if err := entry.DecodeJSON(into); err != nil {
		return nil, unreadable{fmt.Errorf("decoding %s: %w", what, err)}
	}
	return entry, nil
}

// writeEntry stores a value whose version the caller has set.
func writeEntry(ctx context.Context, s logical.Storage, key, what string, value any) error {
	entry, err := logical.StorageEntryJSON(key, value)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", what, err)
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing %s: %w", what, err)
	}
	return nil
}
