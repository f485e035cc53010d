package client

// This file owns the forms in which answers come: the parts of OpenAI's objects
// that are used, and what makes an answer the object that was asked for.
//
// What must stay true: an ID, a key's value and the end of a listing count only
// as OpenAI documents them. What an answer can do without, such as a name or a
// time, may be of any form, and is then absent.

import (
	"encoding/json"
	"math"
	"strconv"
	"time"
)

// answer is a decoded body that can tell whether it is the documented object:
// {} and a page of another service are JSON, too.
type answer interface{ valid() bool }

// label is a text, and "" for anything else. Whether an answer can do without it
// is for its reader to say.
type label string

func (l *label) UnmarshalJSON(raw []byte) error {
	_ = json.Unmarshal(raw, (*string)(l))
	return nil
}

// unixTime is a time in seconds, and 0 for anything that is no number or no time
// that can be written down.
type unixTime int64

// maxUnix is the end of the year 9999. Beyond an int64, what a conversion gives
// differs between processors.
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

// owner is who a key belongs to: nobody, for a value of another form.
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

// listing is a page of a listing. Things are deleted because a listing does not
// have them, so a page without has_more, which OpenAI's document requires, is
// none: its end proves nothing.
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

// seconds is the API's form of an expiry, 0 for none. It rounds up, since an
// expiry is there to outlast something.
func seconds(d time.Duration) int64 {
	return int64((d + time.Second - 1) / time.Second)
}

// negative is why a create refuses a negative expiry: sent as none at all, a
// miscalculated end would make a key that lives forever.
const negative = "the expiry is negative"
