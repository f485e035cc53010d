package openaisecrets

// This file owns the listing of the organization's projects, where an operator finds
// the project_id for a role, and the read of a project, which shows what the keys of a
// role can spend.
//
// What must stay true: a read shows what OpenAI says now, and the guardrails learn of it.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

func (b *backend) pathProjects() *framework.Path {
	return &framework.Path{
		Pattern:      "projects/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "projects"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback: b.projectsList,
				Summary:  "List the organization's projects.",
				Responses: okFields("The projects, including archived ones.", map[string]*framework.FieldSchema{
					"keys":     {Type: framework.TypeStringSlice, Description: "Project IDs."},
					"key_info": {Type: framework.TypeMap, Description: "Name and status (active or archived) by project ID."},
				}),
			},
		},
		HelpSynopsis: "List the organization's projects.",
		HelpDescription: strings.TrimSpace(`
Lists the projects to which the admin key has access. Use an ID as the
project_id of a role. "vault list -detailed" also shows name and status.
`),
	}
}

func (b *backend) projectsList(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	projects, err := snap.api.ListProjects(ctx)
	if err != nil {
		return errorResponse("projects not listed", err)
	}
	keys := make([]string, 0, len(projects))
	info := make(map[string]any, len(projects))
	for _, p := range projects {
		keys = append(keys, p.ID)
		info[p.ID] = map[string]any{"name": p.Name, "status": p.Status}
	}
	slices.Sort(keys)
	return logical.ListResponseWithInfo(keys, info), nil
}

func (b *backend) pathProject() *framework.Path {
	return &framework.Path{
		Pattern:      "projects/" + framework.GenericNameRegex("id"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "project"},
		Fields: map[string]*framework.FieldSchema{
			"id": {Type: framework.TypeString, Description: "ID of the project.", DisplayAttrs: &framework.DisplayAttributes{Name: "Project ID"}, Required: true},
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: rejectUnknownFields(b.projectRead),
				Summary:  "Read what a project allows.",
				Responses: okFields("The project.", map[string]*framework.FieldSchema{
					"id":                      {Type: framework.TypeString, Description: "ID of the project.", Required: true},
					"name":                    {Type: framework.TypeString, Description: "Name of the project.", Required: true},
					"status":                  {Type: framework.TypeString, Description: "Status of the project: active or archived.", Required: true},
					"spend_limit":             {Type: framework.TypeString, Description: "Hard spend limit as a decimal amount; null without one.", Required: true},
					"spend_limit_currency":    {Type: framework.TypeString, Description: "Currency of the spend limit; null without one.", Required: true},
					"spend_limit_interval":    {Type: framework.TypeString, Description: "Time in which the spend limit applies, such as month; null without one.", Required: true},
					"spend_limit_enforcement": {Type: framework.TypeString, Description: "Enforcement status of the spend limit, which OpenAI does not define: inactive or enforcing; null without a limit.", Required: true},
					"model_permissions":       {Type: framework.TypeString, Description: "Mode of the model permissions: allow_list or deny_list; null without any.", Required: true},
					"model_ids":               {Type: framework.TypeStringSlice, Description: "Models on that list.", Required: true},
					"rate_limits":             {Type: framework.TypeMap, Description: "Rate limits by model, under OpenAI's names.", Required: true},
					"requirements_unmet":      {Type: framework.TypeStringSlice, Description: "Settings of the config whose requirement the project does not meet.", Required: true},
				}),
				// Only the active node stores what the guardrails learn.
				ForwardPerformanceStandby: true,
			},
		},
		HelpSynopsis: "Read what a project allows.",
		HelpDescription: strings.TrimSpace(`
Shows the status, spend limit, model permissions, and rate limits of a project,
as OpenAI has them. If the config requires a spend limit or a list of allowed
models, the engine applies the answer to the roles of the project immediately.
`),
	}
}

func (b *backend) projectRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	id := d.Get("id").(string)
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) {
		return notConfigured(req), nil
	}
	if err != nil {
		return nil, err
	}
	failed := func(err error) (*logical.Response, error) {
		return errorResponse(fmt.Sprintf("project %q not read", id), err)
	}
	project, err := snap.api.GetProject(ctx, id)
	if client.IsNotFound(err) {
		return logical.ErrorResponse("project %q not found in the admin key's organization; run \"vault list %sprojects\" to list projects: %s", id, req.MountPoint, err), nil
	}
	if err != nil {
		return failed(err)
	}
	data := map[string]any{
		"id": id, "name": project.Name, "status": project.Status,
		"spend_limit": nil, "spend_limit_currency": nil, "spend_limit_interval": nil, "spend_limit_enforcement": nil,
		"model_permissions": nil, "model_ids": []string{}, "rate_limits": map[string]any{}, "requirements_unmet": []string{},
	}
	response := &logical.Response{Data: data}
	if project.Archived() { // it has neither keys nor limits
		return response, nil
	}
	limit, err := snap.api.GetSpendLimit(ctx, id)
	if err != nil && !client.IsNotFound(err) {
		return failed(err)
	}
	answers := bounds{SpendLimit: b.answered(err == nil, fmt.Sprint(err))}
	if err == nil {
		data["spend_limit"], data["spend_limit_currency"] = cents(limit.Cents), limit.Currency
		data["spend_limit_interval"], data["spend_limit_enforcement"] = limit.Interval, limit.Enforcement
		if limit.Enforcement == "inactive" {
			response.AddWarning("OpenAI reports the spend limit as inactive. OpenAI does not document whether that means that it is not in effect, or not exceeded.")
		}
	}
	models, err := snap.api.GetModelPermissions(ctx, id)
	if err != nil && !client.IsNotFound(err) {
		return failed(err)
	}
	answers.AllowList = b.answered(err == nil && models.Mode == client.AllowList, fmt.Sprint(err))
	if err == nil {
		data["model_permissions"], data["model_ids"] = models.Mode, models.ModelIDs
		answers.AllowList.Said = otherMode(models.Mode)
	}
	rates, err := snap.api.ListRateLimits(ctx, id)
	if err != nil {
		return failed(err)
	}
	byModel := map[string]any{}
	for _, rate := range rates {
		var values map[string]*int64
		if err := decodeInto(&values, rate.Limits); err != nil {
			return nil, err
		}
		maps.DeleteFunc(values, func(_ string, value *int64) bool { return value == nil })
		byModel[rate.Model] = values
	}
	data["rate_limits"] = byModel
	if snap.config.judges() {
		b.recordVerdict(ctx, req, id, snap.config.APIEndpoint, answers)
	}
	unmet := []string{}
	for _, q := range snap.config.questions() {
		if !q.of(&answers).Met {
			unmet = append(unmet, q.setting)
		}
	}
	data["requirements_unmet"] = unmet
	return response, nil
}
