package client

// This file owns the one look at the inference side: whether OpenAI accepts a
// project key by now.
//
// What must stay true: neither the admin key nor its organization is sent there;
// its limits, which are each project's own, slow down nothing here; no error
// quotes the key that is tried.

import (
	"context"
	"encoding/json"
	"time"
)

// Probe returns nil once OpenAI accepts a key, also one that may not list the
// models or whose project is at a limit: only a key that is known can lack a
// permission. A key of a project with data residency is known as well, and the
// error's Blame is BlameHost: it is accepted at RightHost. One request, GET models.
func (c *Client) Probe(ctx context.Context, key Secret) error {
	const op = "try the new key"
	asked := time.Now()
	r := request{operation: probeKey}
	release, failure := c.acquireSlot(ctx, r.operation)
	if failure != nil {
		failure.Op = op
		return failure
	}
	defer release()
	sender := *c
	sender.adminKey, sender.organization = key, "" // what is sent, and what texts are cleaned of
	failure = c.observed(r.operation, asked, func() *Error {
		return sender.send(ctx, r, func(body []byte) bool {
			var models struct {
				Data []struct{} `json:"data"`
			}
			return json.Unmarshal(body, &models) == nil && models.Data != nil
		})
	})
	if failure == nil || failure.keyIsKnown() {
		return nil
	}
	failure.Op = op
	return failure
}

// keyIsKnown reports whether a refusal of the inference side says that the key
// itself is in order.
func (e *Error) keyIsKnown() bool {
	return e.missesScope() || e.RateLimited() && (e.Code != "" || e.Type != "")
}
