package client

// This file owns the decoding of answers: the parts of OpenAI's objects that are used,
// and the check that an answer is the documented object.
//
// What must stay true: an ID, a key's value and the end of a listing count only in the
// form that OpenAI documents. Optional fields, such as a name or a time, count as absent
// in any other form.

import (
	"encoding/json"
	"math"
	"strconv"
	"time"
)

// answer is a decoded body. valid reports whether it is the documented object; JSON
// alone does not prove that, since {} and other services' answers are JSON too.
type answer interface{ valid() bool }

// label is a string, and "" for any other JSON value.
type label string

func (l *label) UnmarshalJSON(raw []byte) error {
	_ = json.Unmarshal(raw, (*string)(l))
	return nil
}

// unixTime is a time in seconds, and 0 for a value that is not a number or is out of
// range.
type unixTime int64

// maxUnix is the end of the year 9999. A bound is needed because the conversion of a
// float beyond an int64 differs between processors.
const maxUnix = 253402300799

func (u *unixTime) UnmarshalJSON(text []byte) error {
	*u = 0
	if seconds, err := strconv.ParseFloat(string(text), 64); err == nil && math.Abs(seconds) <= maxUnix {
		*u = unixTime(seconds)
	}
	return nil
}

// time is the zero time for 0 (null on the wire).
func (u unixTime) time() time.Time {
	if u == 0 {
		return time.Time{}
	}
	return time.Unix(int64(u), 0).UTC()
}

// owner is the owner of a key, empty for a value in another form.
type owner struct {
	ServiceAccount struct {
		ID label `json:"id"`
	} `json:"service_account"`
	User struct {
		ID label `json:"id"`
	} `json:"user"`
}

func (o *owner) UnmarshalJSON(raw []byte) error {
	type plain owner // without this method
	var read plain
	if json.Unmarshal(raw, &read) == nil {
		*o = owner(read)
	}
	return nil
}

// listing is a page of a listing. It is invalid without has_more, which OpenAI's
// document requires: deletions depend on absence from a complete listing.
type listing[T any] struct {
	Data    []T   `json:"data"`
	LastID  label `json:"last_id"`
	HasMore *bool `json:"has_more"`
}

func (l listing[T]) valid() bool { return l.Data != nil && l.HasMore != nil }

// deletion is OpenAI's answer to every delete.
type deletion struct {
	Deleted bool `json:"deleted"`
}

func (d deletion) valid() bool { return d.Deleted }

// seconds is the API's form of an expiry, 0 for none. It rounds up, since a key must
// outlast its lease.
func seconds(d time.Duration) int64 {
	return int64((d + time.Second - 1) / time.Second)
}

// negative is the error for a negative expiry: without the check, the request would omit
// it and create a key that does not expire.
const negative = "the expiry must not be negative"
