package client

// This file owns whose fault a refusal is, as far as the answer says.
//
// What must stay true: the admin key is blamed only where OpenAI says in its own
// words that the key is invalid or lacks a permission, and this project's
// settings, organization, host or network only likewise. An answer that this
// version does not know blames nobody.

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// Blame is the cause of a refusal.
type Blame int

const (
	// BlameUnknown is a refusal for a reason that this version does not know.
	BlameUnknown Blame = iota
	// BlameRequest is OpenAI's refusal of what was asked for.
	BlameRequest
	// BlameKey is a key that OpenAI does not accept: the one that was sent.
	BlameKey
	// BlamePermission is a key that OpenAI knows and that lacks a permission.
	BlamePermission
	// BlameOrganization is an organization that is not the key's.
	BlameOrganization
	// BlameHost is a host that does not serve what was asked for; RightHost names
	// the one that does.
	BlameHost
	// BlameAddress is an IP address from which OpenAI takes no calls.
	BlameAddress
	// BlamePolicy is a setting of the organization or the project.
	BlamePolicy
	// BlameProxy is the HTTP proxy between here and the host.
	BlameProxy
	// BlameStranger is something that answers in the host's place: a firewall or a
	// gateway with a page of its own.
	BlameStranger
	// BlameServer is a server error, no answer, a rate limit, or an answer that is
	// not the API's.
	BlameServer
)

// OpenAI's codes and messages (docs/openai-api.md). Codes decide before messages.
var (
	keyCode          = regexp.MustCompile(`^((invalid|incorrect|expired|revoked|deactivated|disabled|inactive)_(admin_)?(api_)?key|(admin_)?(api_)?key_(invalid|expired|revoked|deactivated|disabled|inactive))$`)
	keyText          = regexp.MustCompile(`(?i)^incorrect (admin )?api key\b`)
	organizationCode = regexp.MustCompile(`^((mismatched|invalid|incorrect|unknown)_organization|organization_(mismatch|not_found))$`)
	organizationText = regexp.MustCompile(`(?i)header should match organization for api key|^no such organization`)
	hostCode         = regexp.MustCompile(`^(incorrect|invalid|wrong)_(regional_)?hostname$`)
	hostText         = regexp.MustCompile(`(?i)incorrect (regional )?hostname`)
	addressCode      = regexp.MustCompile(`^ip_(address_)?not_(authorized|allowed|permitted)$|^ip_forbidden$`)
	policyCode       = regexp.MustCompile(`(creation|keys|accounts|feature|endpoint)_disabled|disabled_(by|for|in)_|policy`)
	policyText       = regexp.MustCompile(`(?i)\b(disabled|not (enabled|allowed|permitted)) (for|by|in) (this|your|the) (organi[sz]ation|project)|\bpolic(y|ies)\b`)
	missingText      = regexp.MustCompile(`(?i)\bmissing scopes?\b`)
	hostname         = regexp.MustCompile(`(?i)\b(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}\b`)
	unknownParameter = regexp.MustCompile(`(?i)\b(unknown|unrecogni[sz]ed|unsupported|unexpected|extra|additional)\b|not permitted`)
	unknownCode      = regexp.MustCompile(`^(unknown|unrecogni[sz]ed|unsupported|unexpected)_(parameter|argument|field)$`)
)

// Blame says whose fault the failure is. It is for texts and statuses: whether
// something may exist or is deleted, the other questions answer.
func (e *Error) Blame() Blame {
	var proxy *proxyRefusal
	switch {
	case errors.As(e.Cause, &proxy), e.Status == http.StatusProxyAuthRequired:
		return BlameProxy
	case e.Status == 0, e.Ambiguous(), e.RateLimited():
		return BlameServer
	case e.missesScope():
		return BlamePermission
	case !e.spoken:
		if e.Message == "" {
			return BlameStranger
		}
		return BlameUnknown
	case organizationCode.MatchString(e.Code):
		return BlameOrganization
	case hostCode.MatchString(e.Code):
		return BlameHost
	case addressCode.MatchString(e.Code):
		return BlameAddress
	case e.Denied() && keyCode.MatchString(e.Code):
		return BlameKey
	case e.Denied() && policyCode.MatchString(e.Code), e.Status == http.StatusForbidden && e.AboutExpiry():
		return BlamePolicy
	case e.Status == http.StatusNotFound && !e.NotFound(), e.Status == http.StatusMethodNotAllowed:
		return BlameStranger // it does not know the URL: the endpoint or a gateway is wrong
	case !e.Denied():
		return BlameRequest
	case organizationText.MatchString(e.Message):
		return BlameOrganization
	case hostText.MatchString(e.Message):
		return BlameHost
	case e.Status == http.StatusUnauthorized && keyText.MatchString(e.Message):
		return BlameKey
	case e.Status == http.StatusForbidden && policyText.MatchString(e.Message):
		return BlamePolicy
	}
	return BlameUnknown
}

// missesScope reports whether OpenAI knows the key and misses a scope of it, with
// a 401 or a 403, by its code or by its text, which may be a bare string.
func (e *Error) missesScope() bool {
	return e.Denied() && (e.Code == "missing_scope" || missingText.MatchString(e.Message))
}

// BlamesKey reports whether OpenAI says that the key which was sent is invalid or
// lacks a permission.
func BlamesKey(err error) bool {
	e := AsError(err)
	return e != nil && (e.Blame() == BlameKey || e.Blame() == BlamePermission)
}

// defaultHost is that of DefaultBaseURL.
const defaultHost = "api.openai.com"

// RightHost is the host that OpenAI's refusal of the wrong one names, "" without
// any.
func (e *Error) RightHost() string {
	if e.Blame() != BlameHost {
		return ""
	}
	own, _, _ := strings.Cut(e.Host, ":")
	var others []string
	for _, name := range hostname.FindAllString(strings.ToLower(e.Message), -1) {
		if name != strings.ToLower(own) && name != defaultHost && !slices.Contains(others, name) {
			others = append(others, name)
		}
	}
	if len(others) != 1 {
		return "" // which it is, is not known
	}
	return others[0]
}

// ExpiryUnknown reports whether the API refuses expires_in_seconds because it has
// no such parameter, as gateways and releases from before it.
func (e *Error) ExpiryUnknown() bool {
	const parameter = "expires_in_seconds"
	if e.Status != http.StatusBadRequest && e.Status != http.StatusUnprocessableEntity {
		return false
	}
	if e.Param != parameter && !strings.Contains(e.Message, parameter) {
		return false
	}
	return unknownCode.MatchString(e.Code) || e.Code == "" && unknownParameter.MatchString(e.Message)
}

// strange is the text by which something that is not OpenAI says what it is, as
// far as common gateways have one: the title of a page, or the message of an
// object of another form.
func strange(body []byte) string {
	var object map[string]any
	if json.Unmarshal(body, &object) == nil {
		for _, name := range []string{"message", "Message", "detail", "title"} {
			if text, ok := object[name].(string); ok {
				return text
			}
		}
		return ""
	}
	if m := pageTitle.FindSubmatch(body[:min(len(body), 1<<16)]); m != nil {
		return string(m[1])
	}
	return ""
}

var pageTitle = regexp.MustCompile(`(?is)<title[^>]*>([^<]*)</title>`)

// proxyRefusal is what a proxy answers instead of connecting to the host.
type proxyRefusal struct{ host, status string }

func (p *proxyRefusal) Error() string {
	return fmt.Sprintf("the proxy %s answered with %s", p.host, p.status)
}
