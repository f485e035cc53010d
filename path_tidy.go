package openaisecrets

// This file owns the paths of tidy: to start it, to show its status, to stop it.
//
// What must stay true: a dry run changes nothing, and whoever asks for one never
// takes another run's list for its answer.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/text"
)

func (b *backend) pathTidy() *framework.Path {
	return &framework.Path{
		Pattern:      "tidy",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "tidy", OperationSuffix: "accounts"},
		Fields: map[string]*framework.FieldSchema{
			"apply": {
				Type:         framework.TypeBool,
				Description:  "Delete what is found. Without it nothing is changed, and the answer lists what would be deleted.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "Apply"},
			},
			"force": {
				Type:         framework.TypeBool,
				Description:  fmt.Sprintf("Delete more than %d accounts that have no key. Requires apply=true.", absenceLimit),
				DisplayAttrs: &framework.DisplayAttributes{Name: "Force"},
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback:                    strict(b.tidyWrite),
				Summary:                     "Find, and with apply=true delete, the accounts that this mount left at OpenAI and that no lease can need.",
				Responses:                   okFields("The sweep: finished if it is a dry run that did not take long, or else under way.", tidyFields()),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Sweep up the accounts that this mount left at OpenAI.",
		HelpDescription: strings.TrimSpace(`
Looks through every project that a role names or ever named for service accounts
whose name bears this mount's tag, all of whose keys have expired, and which are
older than tidy_safety_buffer. Nobody can use what is found: it is what is left of
credentials whose lease Vault never stored or has forgotten.

An account without a key is an orphan only if two listings at least five minutes
apart show none and it is older than any lease of this mount can be. A run deletes
at most 20 of those; apply=true force=true deletes all of them.

Without apply nothing is changed. The answer lists what was found; when that
takes longer than a request may, tidy-status has the list once it is complete.
With apply=true what is found is deleted, one account at a time, after the
request: tidy-status shows how far it is and tidy-cancel stops it. The engine
does this by itself every tidy_interval (config).
`),
	}
}

func (b *backend) pathTidyStatus() *framework.Path {
	return &framework.Path{
		Pattern:      "tidy-status",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "tidy", OperationSuffix: "status"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
					return b.tidyAnswer(ctx, req)
				},
				Summary:   "Read how far the sweep is, or how the last one ended.",
				Responses: okFields("The sweep.", tidyFields()),
				// Only the node that sweeps knows.
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Show how far the sweep is.",
		HelpDescription: strings.TrimSpace(`
Shows the sweep that is under way, or else the last one since the plugin
started, with what it found and what failed. What failed is tried again by the
next sweep.
`),
	}
}

func (b *backend) pathTidyCancel() *framework.Path {
	return &framework.Path{
		Pattern:      "tidy-cancel",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "tidy", OperationSuffix: "cancel"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: strict(func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
					running := b.tidy.stop()
					resp, err := b.tidyAnswer(ctx, req)
					if err == nil && !running {
						resp.AddWarning("No sweep is under way, so there is none to cancel.")
					}
					return resp, err
				}),
				Summary:                     "Stop the sweep that is under way.",
				Responses:                   okFields("The sweep.", tidyFields()),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Stop the sweep that is under way.",
		HelpDescription: strings.TrimSpace(`
Stops the sweep that is under way. What it has deleted stays deleted, and the
next one begins anew.
`),
	}
}

// tidyFields is the answer of all three paths.
func tidyFields() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{}
	for name, field := range map[string]framework.FieldSchema{
		"state":                 {Type: framework.TypeString, Description: "Inactive (none since the plugin started), Running, Cancelling, Cancelled, Finished, or Error: finished, but for what errors names."},
		"apply":                 {Type: framework.TypeBool, Description: "Whether what is found is deleted; otherwise it is a dry run."},
		"automatic":             {Type: framework.TypeBool, Description: "Whether the engine started it by itself."},
		"safety_buffer":         {Type: framework.TypeDurationSecond, Description: "How old an account must be, in seconds."},
		"time_started":          {Type: framework.TypeString, Description: "When it started (RFC 3339); null before."},
		"time_finished":         {Type: framework.TypeString, Description: "When it ended (RFC 3339); null before."},
		"message":               {Type: framework.TypeString, Description: "What it is doing, or how it ended."},
		"project_count":         {Type: framework.TypeInt, Description: "Projects that roles name or have named."},
		"done_project_count":    {Type: framework.TypeInt, Description: "Those looked through so far, whatever came of it."},
		"skipped_project_count": {Type: framework.TypeInt, Description: "Those of them that are archived or that the admin key's organization does not have."},
		"account_count":         {Type: framework.TypeInt, Description: "Service accounts found that bear this mount's tag, those of live leases included."},
		"key_count":             {Type: framework.TypeInt, Description: "Keys found that bear this mount's tag in a name of their own: those of api_key and static roles."},
		"orphan_count":          {Type: framework.TypeInt, Description: "Those of both that nobody can need any more."},
		"deleted_count":         {Type: framework.TypeInt, Description: "Orphans deleted."},
		"failed_count":          {Type: framework.TypeInt, Description: "Orphans that could not be deleted; the next sweep tries again."},
		"waiting_count":         {Type: framework.TypeInt, Description: fmt.Sprintf("Orphans without a key beyond the %d that a run deletes; apply=true force=true deletes them.", absenceLimit)},
		"unconfirmed_count":     {Type: framework.TypeInt, Description: "Accounts that so far one listing shows without a key. They are orphans if a run at least five minutes later sees the same. A restart of the plugin starts this over."},
		"orphans":               {Type: framework.TypeSlice, Description: fmt.Sprintf("The orphans found: service_account_id, service_account or else api_key_id and api_key_name, project_id, created_at, age in seconds, and why. At most %d of them.", maxListed)},
		"error":                 {Type: framework.TypeString, Description: "The first of errors, empty without any."},
		"errors":                {Type: framework.TypeStringSlice, Description: fmt.Sprintf("What failed, at most %d of it.", maxErrors)},
		"last_auto_run":         {Type: framework.TypeString, Description: "When the engine last started one by itself (RFC 3339), or when it began to count the first interval; null before."},
		"next_auto_run":         {Type: framework.TypeString, Description: "When it starts the next one (RFC 3339); null where tidy_interval is 0."},
	} {
		field.Required = true
		fields[name] = &field
	}
	return fields
}

func (b *backend) tidyWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	apply, force := d.Get("apply").(bool), d.Get("force").(bool)
	if force && !apply {
		return logical.ErrorResponse("force=true requires apply=true"), nil
	}
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	run, done := b.beginTidy(req, apply, force, false, snap.config.TidySafetyBuffer) //nolint:contextcheck // it outlives the request
	if run == nil {
		// Not a warning, as in the PKI engine: whoever asks for a dry run must
		// not take another sweep's list for its answer.
		return logical.ErrorResponse("a sweep is under way since %s: `vault read %[2]stidy-status` shows how far it is, `vault write -f %[2]stidy-cancel` stops it",
			text.Time(b.tidy.current().started), req.MountPoint), nil
	}
	go run()
	if !apply {
		timer := time.NewTimer(dryRunWait)
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
		case <-ctx.Done(): // the list is in tidy-status all the same
		}
	}
	// A client that has gone is no reason to answer with an error of storage.
	return b.tidyAnswer(context.WithoutCancel(ctx), req)
}

// tidyAnswer shows the sweep under way or the last one.
func (b *backend) tidyAnswer(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	status := b.tidy.current()
	if status.state == "" {
		status.state = tidyInactive
	}
	orphans := make([]any, 0, len(status.listed))
	for _, o := range status.listed {
		shown := map[string]any{
			"service_account_id": o.ID,
			"project_id":         o.ProjectID,
			"created_at":         text.TimeOrNull(o.createdAt),
			"age":                int64(o.age / time.Second),
			"why":                o.why,
		}
		if o.isKey() {
			shown["api_key_id"], shown["api_key_name"] = o.KeyID, o.KeyName
		} else {
			shown["service_account"] = o.Name
		}
		orphans = append(orphans, shown)
	}
	firstError := ""
	if len(status.errors) > 0 {
		firstError = status.errors[0]
	}
	last, err := getTidyEntry(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	var lastAuto, nextAuto any
	if last != nil {
		lastAuto = text.TimeOrNull(last.LastAutoRun)
		if snap, err := b.current(ctx, req.Storage); err == nil && snap.config.TidyInterval > 0 {
			nextAuto = text.TimeOrNull(last.LastAutoRun.Add(snap.config.TidyInterval))
		}
	}
	resp := &logical.Response{Data: map[string]any{
		"state":                 status.state,
		"apply":                 status.apply,
		"automatic":             status.automatic,
		"safety_buffer":         int64(status.safetyBuffer / time.Second),
		"time_started":          text.TimeOrNull(status.started),
		"time_finished":         text.TimeOrNull(status.finished),
		"message":               status.message,
		"project_count":         status.projects,
		"done_project_count":    status.done,
		"skipped_project_count": status.skipped,
		"account_count":         status.accounts,
		"key_count":             status.keys,
		"orphan_count":          status.orphans,
		"deleted_count":         status.deleted,
		"failed_count":          status.failed,
		"waiting_count":         status.waiting,
		"unconfirmed_count":     status.unconfirmed,
		"orphans":               orphans,
		"error":                 firstError,
		"errors":                append([]string{}, status.errors...),
		"last_auto_run":         lastAuto,
		"next_auto_run":         nextAuto,
	}}
	switch {
	case status.state == tidyRunning:
		resp.AddWarning(fmt.Sprintf("The sweep is under way; `vault read %stidy-status` shows how far it is.", req.MountPoint))
	case status.state == tidyError && !status.apply:
		resp.AddWarning("The list is not complete: " + firstError)
	}
	if status.waiting > 0 {
		resp.AddWarning(fmt.Sprintf("%d accounts without a key are left, because a run deletes at most %d of them. If they have no key at OpenAI either, run `vault write %stidy apply=true force=true`.", status.waiting, absenceLimit, req.MountPoint))
	}
	if status.unconfirmed > 0 {
		resp.AddWarning(fmt.Sprintf("%d accounts have no key in the listing. A run at least %s later confirms it.", status.unconfirmed, confirmAfter))
	}
	if status.orphans > len(status.listed) {
		resp.AddWarning(fmt.Sprintf("Only %d of the %d orphans are listed.", len(status.listed), status.orphans))
	}
	return resp, nil
}
