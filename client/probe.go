package client

// This file owns the only call to the inference API: a check whether OpenAI accepts a
// project key.
//
// What must stay true: the admin key and its organization are not sent; the rate limits
// of the inference API, which are per project, do not affect other calls; no error quotes
// the key.

import (
	"context"
	"encoding/json"
	"time"
)

// Probe returns nil if OpenAI accepts a key, even if the key may not list models or its
// project is at a limit: OpenAI checks permissions and limits only for a valid key. The
// key of a project with data residency may be valid at another host; the error's Blame is
// then BlameHost, and RightHost is that host. Probe sends one request, GET models.
func (c *Client) Probe(ctx context.Context, key Secret) error {
	const op = "check the new key"
	asked := time.Now()
	r := request{operation: probeKey}
	release, failure := c.acquireSlot(ctx, r.operation)
	if failure != nil {
		failure.Op = op
		return failure
	}
	defer release()
	sender := *c
	sender.adminKey, sender.organization = key, "" // the key to send, and to mask in texts
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

// keyIsKnown reports whether an error of the inference API shows that the key is valid.
func (e *Error) keyIsKnown() bool {
	return e.missesScope() || e.RateLimited() && (e.Code != "" || e.Type != "")
}
