package client

// This file owns the classification of an error by its cause.
//
// What must stay true: the admin key counts as the cause only if OpenAI's own error says
// that it is invalid or lacks a permission; the same applies to the project's settings,
// the organization, the host and the network. Any other answer is BlameUnknown.

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// Blame is the cause of an error.
type Blame int

const (
	// BlameUnknown is an error with an unknown cause.
	BlameUnknown Blame = iota
	// BlameRequest is an invalid request.
	BlameRequest
	// BlameKey is an invalid key: the one that was sent.
	BlameKey
	// BlamePermission is a valid key that lacks a permission.
	BlamePermission
	// BlameOrganization is an organization that the key does not belong to.
	BlameOrganization
	// BlameHost is the wrong host for the organization or project; RightHost is the
	// right one.
	BlameHost
	// BlameAddress is an IP address that is not on OpenAI's allowlist.
	BlameAddress
	// BlamePolicy is a setting of the organization or the project.
	BlamePolicy
	// BlameProxy is the HTTP proxy.
	BlameProxy
	// BlameStranger is a firewall, gateway or other server that answered instead of
	// OpenAI.
	BlameStranger
	// BlameServer is a server error, a lost answer, a rate limit, or an unexpected
	// answer.
	BlameServer
)

// OpenAI's codes and messages (docs/openai-api.md). A code takes precedence over the
// message.
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

// Blame returns the cause of the error, for messages and statuses. Whether an account or
// key may exist or is deleted is decided by Ambiguous and NotFound instead.
func (e *Error) Blame() Blame {
	var proxy *proxyRefusal
	switch {
	case errors.As(e.Cause, &proxy), e.Status == http.StatusProxyAuthRequired:
		return BlameProxy
	case e.Status == 0, e.Ambiguous(), e.RateLimited():
		return BlameServer
	case e.missesScope():
		return BlamePermission
	case !e.inOpenAIsForm:
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
		return BlameStranger // the URL is unknown there, so api_endpoint or a gateway is wrong
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

// missesScope reports whether the key is valid but lacks a scope: a 401 or a 403 with
// that code or message, which may be a bare string.
func (e *Error) missesScope() bool {
	return e.Denied() && (e.Code == "missing_scope" || missingText.MatchString(e.Message))
}

// BlamesKey reports whether the key that was sent is invalid or lacks a permission.
func BlamesKey(err error) bool {
	e := AsError(err)
	return e != nil && (e.Blame() == BlameKey || e.Blame() == BlamePermission)
}

// defaultHost is the host of DefaultBaseURL.
const defaultHost = "api.openai.com"

// RightHost is the host that OpenAI's error names as the right one, "" if there is none.
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
		return "" // ambiguous
	}
	return others[0]
}

// ExpiryUnknown reports whether the API does not support expires_in_seconds, as some
// gateways and older releases of it.
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

// strange extracts a description from an answer that is not OpenAI's, as common gateways
// send it: the title of a page, or the message of an object of another form.
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

// proxyRefusal is the answer of a proxy that did not connect to the host.
type proxyRefusal struct{ host, status string }

func (p *proxyRefusal) Error() string {
	return fmt.Sprintf("proxy %s returned %s", p.host, p.status)
}
