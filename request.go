package openaisecrets

// This file owns what every path does alike with a request: refusing what it
// does not know (what it makes of each value is in write.go), checking text, and turning a failed call into the right kind
// of answer: the caller's mistake is a response with status 400, OpenAI's or
// ours is an error with a cause. None of them ever carries a key.

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// HandleExistenceCheck is framework.Backend's for the path alone: whether
// something exists does not depend on the data, and what is wrong with that is
// for HandleRequest to say. Here it would be an internal error that quotes it.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (bool, bool, error) {
	if !storable(req.Path) {
		return false, false, nil
	}
	bare := *req // the request itself comes again
	bare.Data = nil
	checked, exists, err := b.Backend.HandleExistenceCheck(ctx, &bare)
	if err != nil && client.HoldsKey(err.Error()) {
		err = errors.New("checking whether the entry exists has failed")
	}
	return checked, exists, err
}

// HandleRequest is framework.Backend's, on data of which each value has its
// field's type and one spelling.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	if problem, err := b.checkKeys(ctx, req); problem != "" || err != nil {
		if err != nil {
			return nil, err
		}
		return logical.ErrorResponse("%s", problem), nil
	}
	ignored, problem := b.normalize(req)
	if problem != "" {
		return logical.ErrorResponse("%s", problem), nil
	}
	b.metrics.push.seen(req)
	done := b.watch(ctx, req)
	resp, err := b.Backend.HandleRequest(ctx, req)
	done(resp, err)
	if err != nil && client.HoldsKey(req.Path) { // of what was stored before the rule
		err = errors.New(client.HideKeys(err.Error()))
	}
	if req.Operation == logical.HelpOperation && resp != nil {
		keepReferences(resp)
	}
	if len(ignored) > 0 && err == nil && !resp.IsError() {
		if resp == nil {
			resp = &logical.Response{}
		}
		resp.AddWarning("Ignored fields that only a read shows: " + strings.Join(ignored, ", "))
	}
	return resp, err
}

// checkKeys says which part of a request holds a key that does not belong there,
// "" for none, without quoting it.
func (b *backend) checkKeys(ctx context.Context, req *logical.Request) (problem string, err error) {
	switch req.Operation { //nolint:exhaustive // the others send text
	case logical.RevokeOperation, logical.RenewOperation, logical.RollbackOperation:
		return "", nil // what they send is the engine's own
	}
	for _, name := range slices.Sorted(maps.Keys(req.Data)) {
		if problem := misplacedKey(name, req.Data[name]); problem != "" {
			return problem, nil
		}
	}
	if !client.HoldsKey(req.Path) {
		return "", nil
	}
	// What was stored before the rule is read and deleted, and nothing else.
	where, name, _ := strings.Cut(req.Path, "/")
	for _, prefix := range entriesAt[where] {
		entry, err := req.Storage.Get(ctx, prefix+name)
		if err != nil {
			return "", errors.New("reading the role that the path names has failed")
		}
		switch {
		case entry == nil:
		case strings.HasSuffix(where, "roles") && (req.Operation == logical.ReadOperation || req.Operation == logical.DeleteOperation):
			return "", nil
		default:
			return "the name of this role has the form of an API key, so it can only be listed, read and deleted; write the role under another name", nil
		}
	}
	return "the path contains an API key; revoke that key, because Vault's audit log has paths in clear text", nil
}

// entriesAt are the storage prefixes of what the paths with a name use.
var entriesAt = map[string][]string{
	"roles":        {roleStoragePrefix, communityRolePrefix},
	"creds":        {roleStoragePrefix, communityRolePrefix},
	"static-roles": {staticStoragePrefix},
	"static-creds": {staticStoragePrefix},
	"rotate-role":  {staticStoragePrefix},
}

// misplacedKey says that a field, given or unknown, holds a key and may not, ""
// when all is well. Only admin_api_key may, and only as one string.
func misplacedKey(name string, value any) (problem string) {
	text, isText := value.(string)
	if !isText {
		text = fmt.Sprint(value) // lists and objects at any depth
	}
	switch {
	case client.HoldsKey(name):
		return "the name of a field contains an API key; nothing was stored, revoke that key"
	case name == "admin_api_key" && !isText && value != nil:
		return name + " must be one string"
	case name != "admin_api_key" && client.HoldsKey(text):
		return fmt.Sprintf("%.64q contains an API key; nothing was stored. Only admin_api_key of the config takes one, and a key that was sent in another field should be revoked", name)
	}
	return ""
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
