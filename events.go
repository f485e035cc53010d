package openaisecrets

// This file owns what is told to Vault's event bus and to its observations,
// both of which only Enterprise passes on.
//
// What must stay true: nobody waits for a server's answer, a server that knows
// neither is asked once, Community is told nothing, and no event carries a key.

import (
	"context"
	"errors"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The types of events, and of observations. docs/events.md says when each is
// sent and with what.
const (
	eventConfigWrite      = "openai/config-write"
	eventConfigDelete     = "openai/config-delete"
	eventRotate           = "openai/rotate"
	eventRotateFail       = "openai/rotate-fail"
	eventRoleWrite        = "openai/role-write"
	eventRoleDelete       = "openai/role-delete"
	eventIssue            = "openai/creds-create"
	eventRenew            = "openai/creds-renew"
	eventRevoke           = "openai/creds-revoke"
	eventRevokeFail       = "openai/creds-revoke-fail"
	eventStaticWrite      = "openai/static-role-write"
	eventStaticDelete     = "openai/static-role-delete"
	eventStaticRotate     = "openai/static-rotate"
	eventStaticRotateFail = "openai/static-rotate-fail"
	eventTidy             = "openai/tidy"
)

const (
	// eventQueue is how many may wait for the server; further ones are dropped.
	eventQueue   = 512
	eventTimeout = 5 * time.Second
)

// notices are the events on their way to the server.
type notices struct {
	start func() // has what is queued sent; once
	queue chan event

	noEvents, noObservations atomic.Bool
	dropped                  atomic.Int64
}

type event struct {
	kind string
	data map[string]string
}

func newNotices() *notices { return &notices{queue: make(chan event, eventQueue)} }

// notify tells the server of something that was done. path is the API path that
// it was done to, modified whether what is read there has changed; pairs are
// further names and values.
func (b *backend) notify(kind, mount, path string, modified bool, pairs ...string) {
	if b.notices.noEvents.Load() && b.notices.noObservations.Load() {
		return
	}
	data := map[string]string{
		logical.EventMetadataPath:     mount + path,
		logical.EventMetadataModified: strconv.FormatBool(modified),
	}
	if modified {
		data[logical.EventMetadataDataPath] = mount + path
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			data[pairs[i]] = pairs[i+1]
		}
	}
	b.notices.start()
	select {
	case b.notices.queue <- event{kind: kind, data: data}:
	default:
		b.notices.dropped.Add(1)
	}
}

// tell sends what is queued, until the backend ends. Community takes it all, and
// drops it: it has nothing to subscribe with. That is two round trips for each
// credential which are better not made.
func (b *backend) tell() {
	ctx, cancel := context.WithTimeout(b.lifetime, eventTimeout)
	env, err := b.System().PluginEnv(ctx)
	cancel()
	if err == nil && env != nil && env.VaultVersionMetadata == "" { // "ent…" on Enterprise
		b.notices.noEvents.Store(true)
		b.notices.noObservations.Store(true)
		return
	}
	for {
		select {
		case e := <-b.notices.queue:
			b.send(e)
		case <-b.lifetime.Done():
			return
		}
	}
}

func (b *backend) send(e event) {
	ctx, cancel := context.WithTimeout(b.lifetime, eventTimeout)
	defer cancel()
	if !b.notices.noEvents.Load() {
		pairs := make([]string, 0, 2*len(e.data)+2)
		pairs = append(pairs, logical.EventMetadataOperation, e.kind[len("openai/"):])
		for name, value := range e.data {
			pairs = append(pairs, name, value)
		}
		b.heard("event", &b.notices.noEvents, logical.SendEvent(ctx, b, e.kind, pairs...))
	}
	if !b.notices.noObservations.Load() {
		data := make(map[string]any, len(e.data))
		for name, value := range e.data {
			data[name] = value
		}
		b.heard("observation", &b.notices.noObservations, b.RecordObservation(ctx, e.kind, data))
	}
}

// heard takes note of a server that has no such thing.
func (b *backend) heard(what string, none *atomic.Bool, err error) {
	switch {
	case err == nil, b.lifetime.Err() != nil:
	case errors.Is(err, framework.ErrNoEvents), errors.Is(err, framework.ErrNoObservations), status.Code(err) == codes.Unimplemented:
		none.Store(true)
		b.Logger().Debug("this server takes none, so none is sent any more", "what", what)
	default:
		b.Logger().Debug("not sent", "what", what, "error", err)
	}
}
