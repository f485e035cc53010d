package client

// This file owns the error of a failed call: one type, Error, with methods for the
// decisions that callers make: whether OpenAI does not find an object, whether a create
// may have succeeded without an answer, whether to retry, and, in blame.go, the cause.
//
// What must stay true: an Error never contains a key, its text is printable and bounded,
// and callers never match its text.

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxMessage bounds OpenAI's message, in runes: Vault stores 240 characters of a failed
// revocation's error and logs all of it.
const maxMessage = 400

// Error is a failed call to the Admin API.
type Error struct {
	// Op is the operation, such as "create service account".
	Op string
	// Host is the endpoint's host, for errors that have no answer.
	Host string
	// Status is the HTTP status, 0 when no answer came.
	Status int
	// Code, Type and Param are OpenAI's own fields; any of them may be empty.
	Code, Type, Param string
	// Message is OpenAI's message, cleaned and bounded.
	Message string
	// RequestID is OpenAI's x-request-id, for its support.
	RequestID string
	// RetryAfter is how long OpenAI asks to wait, 0 if it does not.
	RetryAfter time.Duration
	// Sent is false if the request certainly did not reach the server.
	Sent bool
	// Cause is why there is no answer, nil if there is one. Its text is clean.
	Cause error

	// refused is set if this package did not send the call: because it is invalid or,
	// with Status 429, because the wait would be too long.
	refused bool
	// documented is set if the body is OpenAI's error object: a message with a type or a
	// code, and all fields of their documented types.
	documented bool
	// inOpenAIsForm is set if Message has OpenAI's form: documented, or an object with all of
	// its fields, which may be null.
	inOpenAIsForm bool
	// strange is the text of an answer in another form, cleaned and bounded.
	strange string
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	switch {
	case e.refused:
		fmt.Fprintf(&b, ": not sent: %s", e.Message)
	case e.Status == 0 && !e.Sent:
		fmt.Fprintf(&b, ": cannot reach %s: %s", e.Host, causeText(e.Cause))
	case e.Status == 0:
		fmt.Fprintf(&b, ": no answer from %s: %s", e.Host, causeText(e.Cause))
	case e.Status/100 == 2:
		fmt.Fprintf(&b, ": unexpected response from %s: %s", e.Host, e.Message)
	case e.Status/100 == 3:
		fmt.Fprintf(&b, ": redirect from %s: %s", e.Host, e.Message)
	case e.Message == "": // no text in OpenAI's form
		fmt.Fprintf(&b, ": %s rejected the request", e.Host)
		if text := http.StatusText(e.Status); text != "" {
			fmt.Fprintf(&b, ": %s", text)
		}
		if e.strange != "" {
			fmt.Fprintf(&b, ": %s", e.strange)
		}
	case e.inOpenAIsForm, e.Blame() == BlamePermission:
		fmt.Fprintf(&b, ": OpenAI error: %s", e.Message)
	default:
		fmt.Fprintf(&b, ": %s rejected the request: %s", e.Host, e.Message)
	}
	var details []string
	if e.Status != 0 && !e.refused {
		details = append(details, "status "+strconv.Itoa(e.Status))
	}
	if e.Code != "" {
		details = append(details, "code "+e.Code)
	}
	if e.Param != "" {
		details = append(details, "param "+e.Param)
	}
	if e.RequestID != "" {
		details = append(details, "request id "+e.RequestID)
	}
	if e.RetryAfter > 0 && !e.refused {
		details = append(details, "retry in "+e.RetryAfter.Round(time.Second).String())
	}
	if len(details) > 0 {
		fmt.Fprintf(&b, " (%s)", strings.Join(details, ", "))
	}
	return b.String()
}

// Unwrap returns the cause, so that errors.Is finds context errors.
func (e *Error) Unwrap() error { return e.Cause }

// NotFound reports whether OpenAI does not find the object. That does not prove a
// deletion: one of OpenAI's servers may not have the object yet, and a gateway may
// imitate the form. A 404 in another form or for an unknown URL does not count.
func (e *Error) NotFound() bool {
	return e.Status == http.StatusNotFound && e.documented && !aboutURL.MatchString(e.Message) && !codeOfURL.MatchString(e.Code)
}

// aboutURL matches a message about the URL instead of the object: OpenAI's "Unknown
// request URL: …", "Invalid URL (DELETE …)" and "unknown_url", and the messages of
// gateways about an unknown route.
var aboutURL = regexp.MustCompile(`(?i)(^|[^a-z0-9_-])(ur[li]s?|routes?|routing|paths?|endpoints?|methods?|hosts?|upstream|backend)([^a-z0-9_-]|$)|/organization/|(get|post|put|delete|patch) +/`)

// codeOfURL is aboutURL for a code.
var codeOfURL = regexp.MustCompile(`(?i)(^|_)(url|uri|route|path|endpoint|method|host)(_|$)`)

// Denied reports a 401 or a 403 from any server and for any reason; see Blame for the
// cause.
func (e *Error) Denied() bool {
	return e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden
}

// Refused reports whether this call was rejected: neither the admin key as such (401),
// nor the rate, nor an object that was not found.
func (e *Error) Refused() bool {
	return e.Status/100 == 4 && e.Status != http.StatusUnauthorized && !e.NotFound() && !e.RateLimited() && !e.Ambiguous()
}

// AboutExpiry reports whether an error seems to be about a key's lifetime. OpenAI does
// not publish the errors of such a policy (docs/openai-api.md), so use this only for
// hints in messages.
func (e *Error) AboutExpiry() bool {
	text := strings.ToLower(e.Message)
	// A 403 may mean that the admin key has expired.
	expiry := strings.Contains(text, "expir") && !(e.Denied() && strings.Contains(text, "expired"))
	return e.inOpenAIsForm && e.Refused() && !e.ExpiryUnknown() && (e.Param == "expires_in_seconds" || strings.Contains(text, "lifetime") || expiry)
}

// RateLimited reports a 429.
func (e *Error) RateLimited() bool { return e.Status == http.StatusTooManyRequests }

// Ambiguous reports whether a write may have taken effect although the call failed: no
// answer after the request was sent, a server error, or an answer that cannot be
// decoded. Only a definite 4xx and a request that was never sent are unambiguous. 408 and
// 409 are not documented for any endpoint here and count as ambiguous.
func (e *Error) Ambiguous() bool {
	switch {
	case e.Status == 0:
		return e.Sent
	case e.Status == http.StatusRequestTimeout, e.Status == http.StatusConflict:
		return true
	default:
		return e.Status < 400 || e.Status >= 500
	}
}

// permanentLimits are the 429 codes of limits that do not pass with time (OpenAI's
// error-codes guide).
var permanentLimits = map[string]bool{
	"organization_spend_limit_exceeded": true,
	"project_spend_limit_exceeded":      true,
	"organization_usage_limit_exceeded": true,
	"credit_balance_exhausted":          true,
	"insufficient_quota":                true,
	"billing_hard_limit_reached":        true,
}

// Retryable reports whether the same call may succeed if repeated. A create that is
// Ambiguous must not be repeated under the same name.
func (e *Error) Retryable() bool {
	var certificate *tls.CertificateVerificationError
	switch {
	case e.Status == 0:
		return !e.refused && !errors.As(e.Cause, &certificate)
	case e.RateLimited():
		return !e.refused && !permanentLimits[e.Code]
	case e.Status == http.StatusRequestTimeout, e.Status == http.StatusConflict:
		return true
	case e.Status == http.StatusNotImplemented:
		return false
	case e.Status/100 == 2, e.Status == http.StatusNotFound && !e.documented:
		return true // not in OpenAI's form
	default:
		return e.Status >= 500
	}
}

// AsError returns the *Error in a chain, nil if there is none.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// IsNotFound reports whether err is an Error that is NotFound.
func IsNotFound(err error) bool {
	e := AsError(err)
	return e != nil && e.NotFound()
}

// IsDenied reports whether err is an Error that is Denied.
func IsDenied(err error) bool {
	e := AsError(err)
	return e != nil && e.Denied()
}

// decodeBody fills the OpenAI fields from an error body: the documented object, the bare
// string of a missing admin permission (docs/openai-api.md), or any other form, from
// which it fills only strange.
func (e *Error) decodeBody(body []byte, clean func(string) string) {
	var envelope struct {
		Error json.RawMessage `json:"error"`
	}
	if json.Unmarshal(body, &envelope) != nil || len(envelope.Error) == 0 {
		e.strange = clean(strange(body))
		return
	}
	var text string
	if json.Unmarshal(envelope.Error, &text) == nil {
		e.Message = clean(text)
		return
	}
	// Each field is decoded separately, so that one of an unexpected type does not
	// affect the others.
	var fields map[string]json.RawMessage
	if json.Unmarshal(envelope.Error, &fields) != nil {
		return
	}
	asDocumented, complete := true, true
	for name, target := range map[string]*string{
		"message": &e.Message, "code": &e.Code, "type": &e.Type, "param": &e.Param,
	} {
		var value string
		if json.Unmarshal(fields[name], &value) == nil { // also for null
			*target = clean(value)
		} else if len(fields[name]) > 0 {
			asDocumented = false
		}
		complete = complete && len(fields[name]) > 0
	}
	e.documented = asDocumented && e.Message != "" && (e.Type != "" || e.Code != "")
	e.inOpenAIsForm = e.documented || asDocumented && complete && e.Message != ""
}

// keyLike matches a word that begins with sk- and is long enough to be a key, with the
// character before it. It does not match words such as task-runner. OpenAI masks keys in
// its messages; a proxy or a test server may not.
var keyLike = regexp.MustCompile(`(^|[^\pL\pN])sk-[A-Za-z0-9_\-]{20,}`)

// keyFront matches the start of a truncated key at the end of a text.
var keyFront = regexp.MustCompile(`(^|[^\pL\pN])sk-[A-Za-z0-9_\-]*$`)

// HoldsKey reports whether a text contains a word in the form of an OpenAI key.
func HoldsKey(text string) bool { return keyLike.MatchString(text) }

// HideKeys masks all words in the form of an OpenAI key.
func HideKeys(text string) string {
	if !strings.Contains(text, "sk-") { // as nearly always
		return text
	}
	return keyLike.ReplaceAllString(text, "${1}sk-"+redacted)
}

// clean makes text from outside safe for an error: valid UTF-8, one line, printable,
// bounded, and without keys.
func clean(text string) string {
	cut := len(text) > 8*maxMessage
	if cut {
		text = text[:8*maxMessage]
	}
	if !utf8.ValidString(text) {
		text = strings.ToValidUTF8(text, "\uFFFD")
	}
	text = HideKeys(text)
	text = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	// Dropping characters may have joined the halves of a key, and truncation may have
	// left too little of one to match.
	text = HideKeys(strings.TrimSpace(text))
	if cut {
		text = keyFront.ReplaceAllString(text, "${1}sk-"+redacted)
	}
	if utf8.RuneCountInString(text) > maxMessage {
		text = string([]rune(text)[:maxMessage]) + "…"
	}
	return text
}

func causeText(err error) string {
	if err == nil {
		return "unknown error"
	}
	return err.Error()
}
