// Package events sends Vault events and observations.
//
// What must stay true: no caller waits for the server's answer; after one failure nothing
// more is sent to a server without support; nothing is sent to Community, which drops
// both; no event contains a key.
package events

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	log "github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The types of events, and of observations. docs/events.md lists when each is
// sent and with which metadata.
const (
	ConfigWrite      = "openai/config-write"
	ConfigDelete     = "openai/config-delete"
	Rotate           = "openai/rotate"
	RotateFail       = "openai/rotate-fail"
	RoleWrite        = "openai/role-write"
	RoleDelete       = "openai/role-delete"
	RoleOverspent    = "openai/role-overspent"
	CredsCreate      = "openai/creds-create"      //nolint:gosec // an event type, not a credential
	CredsRenew       = "openai/creds-renew"       //nolint:gosec // an event type, not a credential
	CredsRevoke      = "openai/creds-revoke"      //nolint:gosec // an event type, not a credential
	CredsRevokeFail  = "openai/creds-revoke-fail" //nolint:gosec // an event type, not a credential
	PoolRefillFail   = "openai/pool-refill-fail"
	StaticRoleWrite  = "openai/static-role-write"
	StaticRoleDelete = "openai/static-role-delete"
	StaticRotate     = "openai/static-rotate"
	StaticRotateFail = "openai/static-rotate-fail"
	Tidy             = "openai/tidy"
)

const (
	// queueLength bounds the queued events; further ones are dropped.
	queueLength = 512
	sendTimeout = 5 * time.Second
)

// Server is the plugin's framework.Backend.
type Server interface {
	logical.EventSender
	RecordObservation(ctx context.Context, kind string, data map[string]any) error
	System() logical.SystemView
	Logger() log.Logger
}

// Queue sends events to the server in the background.
type Queue struct {
	lifetime context.Context // ends with the backend
	server   Server
	start    func() // starts run, once
	waiting  chan event

	noEvents, noObservations atomic.Bool
	dropped                  atomic.Int64
}

type event struct {
	kind string
	data map[string]string
}

// New returns a queue that sends to server until the lifetime ends. It starts its
// goroutine with the first event.
func New(lifetime context.Context, server Server) *Queue {
	q := &Queue{lifetime: lifetime, server: server, waiting: make(chan event, queueLength)}
	q.start = sync.OnceFunc(func() { go q.run() }) //nolint:contextcheck // it runs until lifetime is canceled
	return q
}

// Emit queues an event. path is the API path that was changed or read, and modified is
// whether its data has changed. pairs are the names and values of further metadata; empty
// values are omitted.
func (q *Queue) Emit(kind, mount, path string, modified bool, pairs ...string) {
	if q.Unsupported() {
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
	q.start()
	select {
	case q.waiting <- event{kind: kind, data: data}:
	default:
		q.dropped.Add(1)
	}
}

// Unsupported reports whether the server supports neither events nor observations.
func (q *Queue) Unsupported() bool { return q.noEvents.Load() && q.noObservations.Load() }

// Waiting returns the number of queued events.
func (q *Queue) Waiting() int { return len(q.waiting) }

// Dropped returns the number of events that found the queue full.
func (q *Queue) Dropped() int64 { return q.dropped.Load() }

// run sends queued events until the lifetime ends. It sends nothing to Community, which
// accepts events and drops them: that saves two round trips for each credential.
func (q *Queue) run() {
	ctx, cancel := context.WithTimeout(q.lifetime, sendTimeout)
	env, err := q.server.System().PluginEnv(ctx)
	cancel()
	if err == nil && env != nil && env.VaultVersionMetadata == "" { // "ent…" on Enterprise
		q.noEvents.Store(true)
		q.noObservations.Store(true)
		return
	}
	for {
		select {
		case e := <-q.waiting:
			q.send(e)
		case <-q.lifetime.Done():
			return
		}
	}
}

func (q *Queue) send(e event) {
	ctx, cancel := context.WithTimeout(q.lifetime, sendTimeout)
	defer cancel()
	if !q.noEvents.Load() {
		pairs := make([]string, 0, 2*len(e.data)+2)
		pairs = append(pairs, logical.EventMetadataOperation, e.kind[len("openai/"):])
		for name, value := range e.data {
			pairs = append(pairs, name, value)
		}
		q.noteUnsupported("event", &q.noEvents, logical.SendEvent(ctx, q.server, e.kind, pairs...))
	}
	if !q.noObservations.Load() {
		data := make(map[string]any, len(e.data))
		for name, value := range e.data {
			data[name] = value
		}
		q.noteUnsupported("observation", &q.noObservations, q.server.RecordObservation(ctx, e.kind, data))
	}
}

// noteUnsupported handles the result of a send, and stops further ones if the server does
// not support them.
func (q *Queue) noteUnsupported(what string, unsupported *atomic.Bool, err error) {
	switch {
	case err == nil, q.lifetime.Err() != nil:
	case errors.Is(err, framework.ErrNoEvents), errors.Is(err, framework.ErrNoObservations), status.Code(err) == codes.Unimplemented:
		unsupported.Store(true)
		q.server.Logger().Debug("server does not support events of this type; sending stopped", "type", what)
	default:
		q.server.Logger().Debug("event not sent", "type", what, "error", err)
	}
}
