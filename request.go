package openaisecrets

// This file owns the request handling that all paths share: it rejects unknown fields
// (write.go has the values), and turns a failed call into a response. A client error is
// a response with status 400; a failure of OpenAI or the engine is an error with a
// cause.
//
// What must stay true: no error contains a key.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/metrics"
)

// rejectUnknownFields rejects fields that the path does not have. Vault only warns, but
// a misspelled field that should narrow a key must not widen it.
func rejectUnknownFields(handler framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		var unknown []string
		for name := range d.Raw {
			if _, ok := d.Schema[name]; !ok {
				unknown = append(unknown, fmt.Sprintf("%.64q", name))
			}
		}
		if len(unknown) > 0 {
			slices.Sort(unknown)
			return logical.ErrorResponse("unknown field: %s; run \"vault path-help %s%s\" to list the supported fields",
				strings.Join(unknown[:min(len(unknown), 8)], ", "), req.MountPoint, req.Path), nil
		}
		return handler(ctx, req, d)
	}
}

// log returns a logger with the mount and, if there is one, the request ID, which is
// also in Vault's audit log.
func (b *backend) log(req *logical.Request) hclog.Logger {
	if req.ID == "" {
		return b.Logger().With("mount", req.MountPoint)
	}
	return b.Logger().With("mount", req.MountPoint, "request_id", req.ID)
}

// clientError is an error that the client of the engine can fix.
type clientError string

func (m clientError) Error() string { return string(m) }

// upstreamError is a failure of OpenAI other than a failed call.
type upstreamError string

func (u upstreamError) Error() string { return string(u) }

// unverifiedError means that a project could not be verified, because OpenAI did not say
// what it allows.
type unverifiedError struct {
	text  string
	cause error
}

func (u unverifiedError) Error() string { return u.text + ": " + u.cause.Error() }

func (u unverifiedError) Unwrap() error { return u.cause }

// errorResponse turns an error, mostly of a call to OpenAI, into a response or an error.
// Vault's plugin protocol keeps an HTTP status only if the coded error is outermost.
func errorResponse(what string, err error) (*logical.Response, error) {
	text := fmt.Sprintf("%s: %s", what, err)
	var clientErr clientError
	var upstreamErr upstreamError
	var unverified unverifiedError
	e := client.AsError(err)
	switch {
	case errors.As(err, &clientErr):
		return logical.ErrorResponse("%s", text), nil
	case errors.As(err, &unverified):
		if e != nil {
			text = fmt.Sprintf("%s: %s%s", what, remedy(e), err)
		}
		return nil, logical.CodedError(http.StatusServiceUnavailable, text)
	case errors.As(err, &upstreamErr):
		return nil, logical.CodedError(http.StatusBadGateway, text)
	case e == nil:
		return nil, fmt.Errorf("%s: %w", what, err)
	case e.RateLimited():
		return nil, logical.CodedError(http.StatusTooManyRequests, text)
	}
	text = fmt.Sprintf("%s: %s%s", what, remedy(e), err)
	switch blame := e.Blame(); {
	case blame == client.BlameKey, blame == client.BlamePermission:
		return nil, fmt.Errorf("%s: %s%w", what, remedy(e), err)
	case blame == client.BlameRequest, e.AboutExpiry(): // a policy may reject with 403, too
		return logical.ErrorResponse("%s", text), nil
	}
	return nil, logical.CodedError(http.StatusBadGateway, text)
}

// remedy returns the explanation and fix of an error to prepend to its text; "" if the
// text is sufficient.
func remedy(e *client.Error) string {
	if e.ExpiryUnknown() {
		return fmt.Sprintf("the API at %s does not support expires_in_seconds, which sets the expiry of a key; check api_endpoint and any gateway: ", e.Host)
	}
	switch e.Blame() {
	case client.BlameKey:
		return fmt.Sprintf("OpenAI rejects the engine's admin key; check it at %s, or write a valid admin_api_key to the config: ", adminKeysPage)
	case client.BlamePermission:
		return fmt.Sprintf("the engine's admin key requires the permission \"Organization Administration: Write\"; grant it at %s, or write another admin_api_key to the config: ", adminKeysPage)
	case client.BlameOrganization:
		return "the config's organization_id does not match the organization of its admin key; correct it, or clear it with organization_id=\"\": "
	case client.BlameHost:
		return fmt.Sprintf("the config's api_endpoint is not the host for this organization%s; write the correct api_endpoint together with admin_api_key: ", atHost(e))
	case client.BlameAddress:
		return "OpenAI rejects requests from the IP address of this Vault node or its proxy; add the address to the IP allowlist at OpenAI: "
	case client.BlamePolicy:
		if e.AboutExpiry() {
			return "" // the error already names the field to change
		}
		return fmt.Sprintf("a setting of the organization or project does not allow this; an owner can change it at %s: ", projectsPage)
	case client.BlameProxy:
		return "the HTTP proxy rejects the request; check the proxy's log and the proxy settings of the plugin's environment: "
	case client.BlameStranger:
		return fmt.Sprintf("%s rejected the request, but not in OpenAI's error format; a firewall, gateway, or proxy may have answered: ", e.Host)
	case client.BlameUnknown:
		return fmt.Sprintf("%s rejected the request: ", e.Host)
	case client.BlameRequest, client.BlameServer: // the text is sufficient
	}
	return ""
}

// atHost names the correct host, if OpenAI returned it.
func atHost(e *client.Error) string {
	if host := e.RightHost(); host != "" {
		return ", which is " + host
	}
	return ""
}

// notConfigured is the response to a request that requires a config if there is none.
func notConfigured(req *logical.Request) *logical.Response {
	return logical.ErrorResponse("no admin key is configured; run \"vault write %sconfig admin_api_key=@admin-key.txt\" with an admin key that an organization owner created at %s", req.MountPoint, adminKeysPage)
}

// omitEmpty returns a response with warnings, or nil, for which Vault answers 204.
func omitEmpty(resp *logical.Response) *logical.Response {
	if len(resp.Warnings) == 0 {
		return nil
	}
	return resp
}

// noContent documents a write whose response is empty or has only warnings.
func noContent(description string) map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusNoContent: {{Description: description}}}
}

// okFields documents a response with data.
func okFields(description string, fields map[string]*framework.FieldSchema) map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusOK: {{Description: description, Fields: fields}}}
}

// Pages at OpenAI that error messages refer to.
const (
	adminKeysPage = "platform.openai.com/settings/organization/admin-keys"
	projectsPage  = "platform.openai.com/settings/organization/projects"
)

// keepReferences preserves the references in the OpenAPI document of an external
// plugin. Vault decodes the document by the names of Go fields, so it ignores "$ref"
// and describes every body as an arbitrary object, but reads "ref". A Vault that reads
// "$ref" ignores "ref".
func keepReferences(resp *logical.Response) {
	doc, ok := resp.Data["openapi"].(*framework.OASDocument)
	if !ok {
		return
	}
	encoded, err := json.Marshal(doc)
	if err != nil {
		return // the document stays unchanged
	}
	var generic map[string]any
	if json.Unmarshal(encoded, &generic) == nil {
		repeatReferences(generic)
		resp.Data["openapi"] = generic
	}
}

// repeatReferences adds a "ref" for each "$ref".
func repeatReferences(node any) {
	switch node := node.(type) {
	case map[string]any:
		if ref, ok := node["$ref"].(string); ok {
			node["ref"] = ref
		}
		for _, child := range node {
			repeatReferences(child)
		}
	case []any:
		for _, child := range node {
			repeatReferences(child)
		}
	}
}

func roleNameField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type:         framework.TypeString,
		Description:  "Name of the role. Letters, digits, dots, dashes, and underscores.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Role name"},
		Required:     true,
	}
}

// pathNames returns a path that lists the names stored under the prefixes.
func pathNames(at, what string, prefixes ...string) *framework.Path {
	return &framework.Path{
		Pattern:      at + "/?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: at},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
					names, err := listNames(ctx, req.Storage, prefixes...)
					if err != nil {
						return nil, fmt.Errorf("listing the %s: %w", what, err)
					}
					slices.Sort(names)
					return logical.ListResponse(names), nil
				},
				Summary: "List the " + what + ".",
				Responses: okFields("Names of the "+what+".", map[string]*framework.FieldSchema{
					"keys": {Type: framework.TypeStringSlice, Description: "Names of the " + what + "."},
				}),
			},
		},
		HelpSynopsis:    "List the " + what + ".",
		HelpDescription: "Lists all " + what + " of this mount.",
	}
}

// listNames returns the names stored under any of the prefixes, sorted.
func listNames(ctx context.Context, s logical.Storage, prefixes ...string) ([]string, error) {
	var all []string
	for _, prefix := range prefixes {
		names, err := s.List(ctx, prefix)
		if err != nil {
			return nil, err
		}
		all = append(all, names...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// decodeInto decodes generic JSON values from storage.
func decodeInto(target any, data any) error {
	encoded, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return json.Unmarshal(encoded, target)
}

// isSystemic reports whether the cause of err would make other calls fail, too.
func isSystemic(err error) bool {
	e := client.AsError(err)
	return e != nil && (e.Ambiguous() || e.Status == 0 || e.RateLimited() || e.Status == http.StatusUnauthorized)
}

// isNotFoundAtAll reports whether err is a 404 in any error format.
func isNotFoundAtAll(err error) bool {
	e := client.AsError(err)
	return e != nil && e.Status == http.StatusNotFound
}

// complain logs the failure of background work.
func (b *backend) complain(ctx context.Context, req *logical.Request, what string, err error) {
	if err != nil && ctx.Err() == nil {
		b.log(req).Warn(what, "error", err)
	}
}

// outcome returns the label of a request, a rotation, or a step of it for the metrics.
func outcome(resp *logical.Response, err error) string {
	var coded logical.HTTPCodedError
	var clientErr clientError
	switch {
	case err == nil && resp.IsError(), errors.As(err, &clientErr):
		return metrics.Refused
	case err == nil:
		return metrics.OK
	case errors.Is(err, context.Canceled):
		return metrics.Cancelled
	case errors.As(err, &coded) && coded.Code() == http.StatusTooManyRequests:
		return metrics.Throttled
	}
	switch e := client.AsError(err); {
	case e != nil && e.RateLimited():
		return metrics.Throttled
	case e != nil && e.Refused() && !e.Denied():
		return metrics.Refused
	}
	return metrics.Failed
}

// outcomeFor returns the outcome of a request. A coded error no longer shows that the
// client disconnected, but the request's context does.
func outcomeFor(ctx context.Context, resp *logical.Response, err error) string {
	if o := outcome(resp, err); o == metrics.OK || !errors.Is(ctx.Err(), context.Canceled) {
		return o
	}
	return metrics.Cancelled
}
