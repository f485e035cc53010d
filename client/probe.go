package client

// This file owns the one look at the inference side: whether OpenAI accepts a
// project key by now.
//
// What must stay true: neither the admin key nor its organization is sent there;
// its limits, which are each project's own, slow down nothing here; no error
// quotes the key that is tried.

import (
	"context"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/pagination"
)

// Probe returns nil once OpenAI accepts a key, also one that may not list the
// models or whose project is at a limit: only a key that is known can lack a
// permission. A key of a project with data residency is known as well, and the
// error's Blame is BlameHost: it is accepted at RightHost. One request, GET models.
func (c *Client) Probe(ctx context.Context, key Secret) error {
	const op = "try the new key"
	asked := time.Now()
	leave, failure := c.enter(ctx, probeKey)
	if failure != nil {
		failure.Op = op
		return failure
	}
	defer leave()
	sender := *c
	sender.adminKey = key // the one of which texts are cleaned
	type models = pagination.Page[openai.Model]
	_, failure = observed(c, probeKey, asked, func() (*models, *Error) {
		return send(ctx, &sender,
			func(m *models) bool { return m.JSON.Data.Valid() },
			func(ctx context.Context, o ...option.RequestOption) (*models, error) {
				return c.models.List(ctx, append(o, option.WithAPIKey(key.Reveal()))...)
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
