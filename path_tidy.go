package openaisecrets

// This file owns the paths that start tidy, show its status, and cancel it.
//
// What must stay true: a dry run changes nothing, and its response never shows another
// run's list.

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
				Description:  "Delete the orphans. By default, tidy only lists them.",
				DisplayAttrs: &framework.DisplayAttributes{Name: "Apply"},
			},
			"force": {
				Type:         framework.TypeBool,
				Description:  fmt.Sprintf("Allow the run to delete more than %d accounts without a key. Requires apply=true.", absenceLimit),
				DisplayAttrs: &framework.DisplayAttributes{Name: "Force"},
			},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback:                    rejectUnknownFields(b.tidyWrite),
				Summary:                     "Find orphaned accounts and keys of this mount at OpenAI and, with apply=true, delete them.",
				Responses:                   okFields("Status of the tidy operation: usually finished for a dry run, in progress with apply=true.", tidyFields()),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Tidy up orphaned accounts and keys of this mount.",
		HelpDescription: strings.TrimSpace(`
Searches every project that a role uses or has used for orphans: service accounts
and keys whose name contains the mount tag, whose keys have all expired, and that
are older than tidy_safety_buffer. No lease can still need them. They remain if
Vault did not store a lease, for example after a crash.

An account without a key is an orphan only if two listings at least five minutes
apart show none and it is older than any lease of this mount can be. A run deletes
at most 20 of these accounts; with apply=true force=true it deletes all of them.

By default, the operation is a dry run that changes nothing and returns a list of
the orphans. If the run takes longer than a request may take, read the list from
tidy-status later. With apply=true, the run deletes the orphans in the background:
tidy-status shows its progress and tidy-cancel stops it. The engine also starts
such a run every tidy_interval (config).
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
				Summary:   "Show the status of the tidy operation.",
				Responses: okFields("Status of the tidy operation.", tidyFields()),
				// Only the node that runs tidy has its status.
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Show the status of the tidy operation.",
		HelpDescription: strings.TrimSpace(`
Shows the tidy operation in progress, or the last one since the plugin started,
with its orphans and errors. The next run retries deletions that failed.
`),
	}
}

func (b *backend) pathTidyCancel() *framework.Path {
	return &framework.Path{
		Pattern:      "tidy-cancel",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationVerb: "tidy", OperationSuffix: "cancel"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: rejectUnknownFields(func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
					running := b.tidy.stop()
					resp, err := b.tidyAnswer(ctx, req)
					if err == nil && !running {
						resp.AddWarning("No tidy operation is in progress.")
					}
					return resp, err
				}),
				Summary:                     "Cancel the tidy operation in progress.",
				Responses:                   okFields("Status of the tidy operation.", tidyFields()),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		HelpSynopsis: "Cancel the tidy operation in progress.",
		HelpDescription: strings.TrimSpace(`
Cancels the tidy operation in progress. Orphans that it already deleted stay
deleted, and the next run searches all projects again.
`),
	}
}

// tidyFields documents the response of all three paths.
func tidyFields() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{}
	for name, field := range map[string]framework.FieldSchema{
		"state":                 {Type: framework.TypeString, Description: "State of the run: Inactive, Running, Cancelling, Cancelled, Finished, or Error."},
		"apply":                 {Type: framework.TypeBool, Description: "Whether the run deletes orphans."},
		"automatic":             {Type: framework.TypeBool, Description: "Whether tidy_interval started the run."},
		"safety_buffer":         {Type: framework.TypeDurationSecond, Description: "Minimum age of the accounts that the run considers."},
		"time_started":          {Type: framework.TypeString, Description: "Start of the run (RFC 3339), or null."},
		"time_finished":         {Type: framework.TypeString, Description: "End of the run (RFC 3339), or null."},
		"message":               {Type: framework.TypeString, Description: "Current step or result of the run."},
		"project_count":         {Type: framework.TypeInt, Description: "Projects that roles use or have used."},
		"done_project_count":    {Type: framework.TypeInt, Description: "Projects searched so far, including skipped and failed ones."},
		"skipped_project_count": {Type: framework.TypeInt, Description: "Projects skipped because they are archived or not in the admin key's organization."},
		"account_count":         {Type: framework.TypeInt, Description: "Service accounts with the mount tag, including those of leases."},
		"key_count":             {Type: framework.TypeInt, Description: "Keys with the mount tag in their own name."},
		"orphan_count":          {Type: framework.TypeInt, Description: "Orphaned accounts and keys."},
		"deleted_count":         {Type: framework.TypeInt, Description: "Orphans deleted."},
		"failed_count":          {Type: framework.TypeInt, Description: "Orphans that could not be deleted; the next run retries them."},
		"waiting_count":         {Type: framework.TypeInt, Description: fmt.Sprintf("Orphaned accounts without a key beyond the %d that a run deletes.", absenceLimit)},
		"unconfirmed_count":     {Type: framework.TypeInt, Description: "Accounts without a key in one listing so far."},
		"orphans":               {Type: framework.TypeSlice, Description: fmt.Sprintf("At most %d orphans, each with the reason.", maxListed)},
		"error":                 {Type: framework.TypeString, Description: "First entry of errors; empty if there is none."},
		"errors":                {Type: framework.TypeStringSlice, Description: fmt.Sprintf("At most %d errors of the run.", maxErrors)},
		"last_auto_run":         {Type: framework.TypeString, Description: "Start of the last automatic run (RFC 3339); before the first, of its interval."},
		"next_auto_run":         {Type: framework.TypeString, Description: "Time of the next automatic run (RFC 3339), or null."},
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
		// Not a warning as in the PKI engine: the response to a dry run must not show
		// another run's list.
		return logical.ErrorResponse("a tidy operation has been in progress since %s; run \"vault read %[2]stidy-status\" for its status or \"vault write -f %[2]stidy-cancel\" to cancel it",
			text.Time(b.tidy.current().started), req.MountPoint), nil
	}
	go run()
	if !apply {
		timer := time.NewTimer(dryRunWait)
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
		case <-ctx.Done(): // tidy-status still shows the list
		}
	}
	// A canceled request must not look like a storage error.
	return b.tidyAnswer(context.WithoutCancel(ctx), req)
}

// tidyAnswer returns the status of the tidy run in progress or of the last one.
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
		resp.AddWarning(fmt.Sprintf("The tidy operation is in progress; run \"vault read %stidy-status\" for its status.", req.MountPoint))
	case status.state == tidyError && !status.apply:
		resp.AddWarning("The list of orphans is incomplete: " + firstError)
	}
	if status.waiting > 0 {
		resp.AddWarning(fmt.Sprintf("%d orphaned accounts without a key remain, because a run deletes at most %d of them. After you verify at OpenAI that they have no key, run \"vault write %stidy apply=true force=true\".", status.waiting, absenceLimit, req.MountPoint))
	}
	if status.unconfirmed > 0 {
		resp.AddWarning(fmt.Sprintf("%d accounts have no key in the listing. A run at least %s later confirms whether they are orphans.", status.unconfirmed, confirmAfter))
	}
	if status.orphans > len(status.listed) {
		resp.AddWarning(fmt.Sprintf("Only %d of the %d orphans are listed.", len(status.listed), status.orphans))
	}
	return resp, nil
}
