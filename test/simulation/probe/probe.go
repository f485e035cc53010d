// Package probe is a secrets engine that does nothing but record what Vault asks of
// it, and fail as it is told to. The stories of test/simulation run it on a real
// Vault, as the plugin in the folder beside, and on the model of Vault.
package probe

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// Options connect a probe with who runs it.
type Options struct {
	Record  func(call string)
	Control func() string // how to behave: words such as "revoke=fail ttl=2s"
	Die     func()        // ends the process
}

type backend struct {
	*framework.Backend
	Options
}

// Factory makes a backend.
func (o Options) Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := &backend{Options: o}
	text := func(names ...string) map[string]*framework.FieldSchema {
		fields := map[string]*framework.FieldSchema{}
		for _, name := range names {
			fields[name] = &framework.FieldSchema{Type: framework.TypeString}
		}
		return fields
	}
	nothing := func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
		return nil, nil
	}
	something := func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
		return &logical.Response{Data: map[string]any{"value": "x"}}, nil
	}
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: "v0.0.1",
		InitializeFunc: func(context.Context, *logical.InitializationRequest) error {
			b.Record("initialize" + b.taint())
			if b.told("initialize") == "fail" {
				return errors.New("the probe does not initialize")
			}
			return nil
		},
		Clean:   func(context.Context) { b.Record("cleanup" + b.taint()) },
		Secrets: []*framework.Secret{{Type: "probe", Renew: b.renew, Revoke: nothing}},
		Paths: []*framework.Path{
			{
				Pattern: "creds/" + framework.GenericNameRegex("role"), Fields: text("role", "as"),
				Operations: map[logical.Operation]framework.OperationHandler{logical.ReadOperation: &framework.PathOperation{Callback: b.issue}},
			},
			{
				Pattern: "config", Fields: text("value"),
				ExistenceCheck: func(context.Context, *logical.Request, *framework.FieldData) (bool, error) { return false, nil },
				Operations: map[logical.Operation]framework.OperationHandler{
					logical.ReadOperation:   &framework.PathOperation{Callback: something},
					logical.CreateOperation: &framework.PathOperation{Callback: nothing},
				},
			},
		},
	}
	return b, b.Setup(ctx, conf)
}

// HandleExistenceCheck records the check.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checked, exists bool, err error) {
	b.Record("existence check of " + req.Path)
	return b.Backend.HandleExistenceCheck(ctx, req)
}

// HandleRequest records the request, and answers it as it is told to.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	line := strings.TrimSpace(string(req.Operation) + " " + req.Path)
	if req.Secret != nil {
		line += fmt.Sprintf(" of %v", req.Secret.InternalData["as"])
		if len(req.Data) > 0 {
			line += " with data"
		}
	}
	if deadline, ok := ctx.Deadline(); ok {
		const step = 30 * time.Second // on a busy machine, some of the time is over
		line += " within " + ((time.Until(deadline) + step - 1) / step * step).String()
	}
	b.Record(line + b.taint())
	switch b.told(string(req.Operation)) {
	case "fail":
		return nil, errors.New("the probe fails")
	case "refuse":
		return logical.ErrorResponse("the probe refuses"), nil
	case "unrecoverable":
		return nil, logical.ErrUnrecoverable
	case "wrapped":
		return nil, fmt.Errorf("the probe fails: %w", logical.ErrUnrecoverable)
	case "die":
		b.Die()
		return nil, errors.New("the probe is dead")
	case "slow":
		select {
		case <-time.After(3 * time.Second):
		case <-ctx.Done():
			b.Record("canceled " + string(req.Operation))
			return nil, ctx.Err()
		}
	case "bare":
		return &logical.Response{Data: map[string]any{"key": "without a secret"}}, nil
	}
	return b.Backend.HandleRequest(ctx, req)
}

func (b *backend) issue(_ context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	resp := b.Secret("probe").Response(map[string]any{"key": "sesame"}, map[string]any{"as": data.Get("as")})
	b.lease(resp)
	return resp, nil
}

func (b *backend) renew(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	resp := &logical.Response{Secret: req.Secret, Data: req.Data}
	if b.told("renew") == "empty" {
		resp.Data = nil
	}
	b.lease(resp)
	return resp, nil
}

// lease sets how long a lease is.
func (b *backend) lease(resp *logical.Response) {
	resp.Secret.TTL, resp.Secret.MaxTTL = time.Hour, 24*time.Hour
	if ttl, err := time.ParseDuration(b.told("ttl")); err == nil {
		resp.Secret.TTL = ttl
	}
	if ttl, err := time.ParseDuration(b.told("max_ttl")); err == nil {
		resp.Secret.MaxTTL = ttl
	}
}

// told is what it is told of a name, "" for nothing.
func (b *backend) told(name string) string {
	for _, word := range strings.Fields(b.Control()) {
		if key, value, _ := strings.Cut(word, "="); key == name {
			return value
		}
	}
	return ""
}

func (b *backend) taint() string {
	if b.System().Tainted() {
		return " tainted"
	}
	return ""
}
