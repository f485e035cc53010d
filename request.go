package openaisecrets

// This file owns what every path does alike with a request: refusing what it does not
// know (write.go has what it makes of each value), and turning a failed call into the
// right kind of answer: the caller's mistake is a response with status 400, OpenAI's
// or ours is an error with a cause.
//
// What must stay true: no answer carries a key.

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
)

// strict refuses fields that the path does not have. Vault itself only warns,
// and a misspelt field that is meant to narrow a key must not widen it.
func strict(handler framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		var unknown []string
		for name := range d.Raw {
			if _, ok := d.Schema[name]; !ok {
				unknown = append(unknown, fmt.Sprintf("%.64q", name))
			}
		}
		if len(unknown) > 0 {
			slices.Sort(unknown)
			return logical.ErrorResponse("unknown field: %s; `vault path-help %s%s` lists the fields of this version",
				strings.Join(unknown[:min(len(unknown), 8)], ", "), req.MountPoint, req.Path), nil
		}
		return handler(ctx, req, d)
	}
}

// log returns the logger of all that is done for a request: its lines name the
// mount and, where there is one, the request, by the ID that Vault's audit log
// has for it.
func (b *backend) log(req *logical.Request) hclog.Logger {
	if req.ID == "" {
		return b.Logger().With("mount", req.MountPoint)
	}
	return b.Logger().With("mount", req.MountPoint, "request_id", req.ID)
}

// mistake is an error that is the caller's.
type mistake string

func (m mistake) Error() string { return string(m) }

// upstream is a failure of OpenAI's that is not that of a call of ours.
type upstream string

func (u upstream) Error() string { return string(u) }

// failure answers a request that has failed, by a call to OpenAI for the most
// part. Vault keeps a status over its plugin protocol only when it is outermost.
func failure(what string, err error) (*logical.Response, error) {
	text := fmt.Sprintf("%s: %s", what, err)
	var theirs mistake
	var openAIs upstream
	e := client.AsError(err)
	switch {
	case errors.As(err, &theirs):
		return logical.ErrorResponse("%s", text), nil
	case errors.As(err, &openAIs):
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
	case blame == client.BlameRequest, e.AboutExpiry(): // a policy may refuse with 403, too
		return logical.ErrorResponse("%s", text), nil
	}
	return nil, logical.CodedError(http.StatusBadGateway, text)
}

// remedy says what a refusal of a call with the admin key means and what to do
// about it, to stand before its own text; "" where that says enough.
func remedy(e *client.Error) string {
	if e.ExpiryUnknown() {
		return fmt.Sprintf("the API at %s does not know expires_in_seconds, with which a key gets its end; check api_endpoint and any gateway there: ", e.Host)
	}
	switch e.Blame() {
	case client.BlameKey:
		return fmt.Sprintf("the engine's admin key is refused; see %s, and write a working one to the config path: ", adminKeysPage)
	case client.BlamePermission:
		return fmt.Sprintf("the engine's admin key lacks a permission; give it \"Organization Administration: Write\" at %s, or write another one to the config path: ", adminKeysPage)
	case client.BlameOrganization:
		return "the organization_id of the config is not the organization of the key there; correct it, or clear it with organization_id=\"\": "
	case client.BlameHost:
		return fmt.Sprintf("the api_endpoint of the config is not the host for this organization%s; write the right one there, together with the key: ", atHost(e))
	case client.BlameAddress:
		return "OpenAI does not accept calls from the IP address of this Vault node or its proxy; add it to the IP allowlist at OpenAI: "
	case client.BlamePolicy:
		if e.AboutExpiry() {
			return "" // whoever ordered the key has said which field to change
		}
		return fmt.Sprintf("a setting of the organization or the project does not allow this; an owner changes it at %s: ", projectsPage)
	case client.BlameProxy:
		return "the HTTP proxy does not let the call pass; check its log and the proxy settings of the plugin's environment: "
	case client.BlameStranger:
		return fmt.Sprintf("refused by %s, but not in OpenAI's form; a firewall, gateway or proxy may have answered: ", e.Host)
	case client.BlameUnknown:
		return fmt.Sprintf("refused by %s: ", e.Host)
	case client.BlameRequest, client.BlameServer: // whose own text says enough
	}
	return ""
}

// atHost names the host that OpenAI says is the right one, where it does.
func atHost(e *client.Error) string {
	if host := e.RightHost(); host != "" {
		return ", which is " + host
	}
	return ""
}

// notConfigured answers a request that needs a config where there is none.
func notConfigured(req *logical.Request) *logical.Response {
	return logical.ErrorResponse("this engine has no admin key yet: run `vault write %sconfig admin_api_key=@admin-key.txt`. An organization owner makes the key at %s", req.MountPoint, adminKeysPage)
}

// unlessEmpty returns a response of warnings, or nil, which Vault answers with
// 204, when there are none.
func unlessEmpty(resp *logical.Response) *logical.Response {
	if len(resp.Warnings) == 0 {
		return nil
	}
	return resp
}

// noContent documents a write that answers with nothing, or with warnings.
func noContent(description string) map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusNoContent: {{Description: description}}}
}

// okFields documents an answer with data.
func okFields(description string, fields map[string]*framework.FieldSchema) map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusOK: {{Description: description, Fields: fields}}}
}

// Where OpenAI's own pages for a remedy are.
const (
	adminKeysPage = "platform.openai.com/settings/organization/admin-keys"
	projectsPage  = "platform.openai.com/settings/organization/projects"
)

// keepReferences makes Vault keep the references in an external plugin's
// document. It decodes what comes over the plugin protocol by the names of Go
// fields, finds no "$ref" and would describe every body as anything at all; "ref"
// it finds. A Vault that reads "$ref" ignores it.
func keepReferences(resp *logical.Response) {
	doc, ok := resp.Data["openapi"].(*framework.OASDocument)
	if !ok {
		return
	}
	encoded, err := json.Marshal(doc)
	if err != nil {
		return // as it was
	}
	var generic map[string]any
	if json.Unmarshal(encoded, &generic) == nil {
		repeatReferences(generic)
		resp.Data["openapi"] = generic
	}
}

// repeatReferences adds "ref" wherever there is a "$ref".
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
		Description:  "Name of the role: letters, digits, dots, dashes and underscores.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Role name"},
		Required:     true,
	}
}

// pathNames lists what is stored under one of the prefixes, by its name.
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
		HelpDescription: "Lists the names of all " + what + " of this mount.",
	}
}

// listNames returns what is stored under any of the prefixes, sorted.
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

// decodeInto reads what storage has turned into generic JSON values.
func decodeInto(target any, data any) error {
	encoded, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return json.Unmarshal(encoded, target)
}

// shared reports whether err has a cause that other calls would share.
func shared(err error) bool {
	e := client.AsError(err)
	return e != nil && (e.Ambiguous() || e.Status == 0 || e.RateLimited() || e.Status == http.StatusUnauthorized)
}

// isNotFoundAtAll reports a 404, in whatever form.
func isNotFoundAtAll(err error) bool {
	e := client.AsError(err)
	return e != nil && e.Status == http.StatusNotFound
}

// complain logs the failure of work that has no caller.
func (b *backend) complain(ctx context.Context, req *logical.Request, what string, err error) {
	if err != nil && ctx.Err() == nil {
		b.log(req).Warn(what, "error", err)
	}
}
