package client

// This file owns what the engine knows about a failed call: one type, Error,
// that answers the questions every caller has: does OpenAI not find the thing,
// may it exist although no answer came, is it worth trying again, and, in
// blame.go, whose fault it is.
//
// What must stay true: an Error never carries a key, its text is printable and
// bounded, and nobody outside decides by matching the text.

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

// maxMessage bounds what is kept of OpenAI's message, in runes: Vault stores
// 240 characters of a failed revoke's error and logs all of it.
const maxMessage = 400

// Error is a call to the Admin API that did not give what was asked for.
type Error struct {
	// Op says what was being done, as a phrase: "create service account".
	Op string
	// Host is the endpoint's host, for errors that have no answer.
	Host string
	// Status is the HTTP status, 0 when no answer came.
	Status int
	// Code, Type and Param are OpenAI's own fields; any of them may be empty.
	Code, Type, Param string
	// Message is OpenAI's message, cleaned and bounded.
	Message string
	// RequestID is OpenAI's x-request-id, for their support.
	RequestID string
	// RetryAfter is how long OpenAI asks to wait; 0 when it did not say.
	RetryAfter time.Duration
	// Sent is false when the request certainly never reached the server.
	Sent bool
	// Cause is why there is no answer; nil when one came. Its text is clean.
	Cause error

	// refused says that this package did not make the call: because it makes no
	// sense or, with Status 429, because its turn is too far off.
	refused bool
	// documented says that the answer's body is OpenAI's error object: a message
	// with a type or a code, and nothing in it of another type than documented.
	documented bool
	// spoken says that Message is OpenAI's as far as its form tells: documented, or
	// an object that has all of its fields, though they may be null.
	spoken bool
	// strange is what an answer of another form says, cleaned and bounded.
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
		fmt.Fprintf(&b, ": %s answered with something that is not the Admin API's: %s", e.Host, e.Message)
	case e.Status/100 == 3:
		fmt.Fprintf(&b, ": %s answered with a redirect: %s", e.Host, e.Message)
	case e.Message == "": // nothing was said that could be OpenAI's
		fmt.Fprintf(&b, ": %s refused", e.Host)
		if text := http.StatusText(e.Status); text != "" {
			fmt.Fprintf(&b, ": %s", text)
		}
		if e.strange != "" {
			fmt.Fprintf(&b, ": %s", e.strange)
		}
	case e.spoken, e.Blame() == BlamePermission:
		fmt.Fprintf(&b, ": OpenAI says: %s", e.Message)
	default:
		fmt.Fprintf(&b, ": %s refused and says: %s", e.Host, e.Message)
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
		details = append(details, "try again in "+e.RetryAfter.Round(time.Second).String())
	}
	if len(details) > 0 {
		fmt.Fprintf(&b, " (%s)", strings.Join(details, ", "))
	}
	return b.String()
}

// Unwrap returns the cause, so that errors.Is sees context errors.
func (e *Error) Unwrap() error { return e.Cause }

// NotFound reports whether OpenAI says that it does not find the thing that was
// named. That alone proves no deletion: one of OpenAI's servers may not know the
// thing yet, and a gateway may imitate the form. A 404 in another form never
// counts, nor does one for a URL that OpenAI does not know.
func (e *Error) NotFound() bool {
	return e.Status == http.StatusNotFound && e.documented && !aboutURL.MatchString(e.Message) && !codeOfURL.MatchString(e.Code)
}

// aboutURL matches a message or a code that complains of the URL and not of the
// thing: OpenAI's "Unknown request URL: …", "Invalid URL (DELETE …)" and
// "unknown_url", and what gateways say of a route that they do not have.
var aboutURL = regexp.MustCompile(`(?i)(^|[^a-z0-9_-])(ur[li]s?|routes?|routing|paths?|endpoints?|methods?|hosts?|upstream|backend)([^a-z0-9_-]|$)|/organization/|(get|post|put|delete|patch) +/`)

// codeOfURL is aboutURL for a code.
var codeOfURL = regexp.MustCompile(`(?i)(^|_)(url|uri|route|path|endpoint|method|host)(_|$)`)

// Denied reports a 401 or a 403, whoever answered it and whatever for: Blame
// says that.
func (e *Error) Denied() bool {
	return e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden
}

// Refused reports whether OpenAI has said no to this very call: not to the
// admin key as such (401), not for its rate, and not that there is no such thing.
func (e *Error) Refused() bool {
	return e.Status/100 == 4 && e.Status != http.StatusUnauthorized && !e.NotFound() && !e.RateLimited() && !e.Ambiguous()
}

// AboutExpiry reports whether a refusal seems to be for a key's lifetime. What
// a policy on that answers is not published (docs/openai-api.md), so this is
// for a hint to the reader and nothing is decided by it.
func (e *Error) AboutExpiry() bool {
	text := strings.ToLower(e.Message)
	// A 403 may be for the admin key, which may have expired.
	expiry := strings.Contains(text, "expir") && !(e.Denied() && strings.Contains(text, "expired"))
	return e.spoken && e.Refused() && !e.ExpiryUnknown() && (e.Param == "expires_in_seconds" || strings.Contains(text, "lifetime") || expiry)
}

// RateLimited reports a 429.
func (e *Error) RateLimited() bool { return e.Status == http.StatusTooManyRequests }

// Ambiguous reports whether a write may have taken effect although the call
// failed: no answer after the request went out, a server error, or an answer
// that cannot be read. Only a definite refusal (4xx) and a request that never
// left are not ambiguous. 408 and 409 are documented for no endpoint here and
// say nothing certain.
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

// waitingCannotHelp are the 429 codes that stand for a limit which time does
// not lift (OpenAI's error-codes guide).
var waitingCannotHelp = map[string]bool{
	"organization_spend_limit_exceeded": true,
	"project_spend_limit_exceeded":      true,
	"organization_usage_limit_exceeded": true,
	"credit_balance_exhausted":          true,
	"insufficient_quota":                true,
	"billing_hard_limit_reached":        true,
}

// Retryable reports whether the same call may succeed when made again. For a
// create, see Ambiguous first: it must not be made again under the same name.
func (e *Error) Retryable() bool {
	var certificate *tls.CertificateVerificationError
	switch {
	case e.Status == 0:
		return !e.refused && !errors.As(e.Cause, &certificate)
	case e.RateLimited():
		return !e.refused && !waitingCannotHelp[e.Code]
	case e.Status == http.StatusRequestTimeout, e.Status == http.StatusConflict:
		return true
	case e.Status == http.StatusNotImplemented:
		return false
	case e.Status/100 == 2, e.Status == http.StatusNotFound && !e.documented:
		return true // not OpenAI's words
	default:
		return e.Status >= 500
	}
}

// AsError finds the *Error in a chain, nil when there is none.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// IsNotFound reports whether err says that OpenAI does not find the thing.
func IsNotFound(err error) bool {
	e := AsError(err)
	return e != nil && e.NotFound()
}

// IsDenied reports whether err is a 401 or a 403, whoever answered it.
func IsDenied(err error) bool {
	e := AsError(err)
	return e != nil && e.Denied()
}

// decodeBody fills the OpenAI fields from an error body, whatever it looks
// like: the documented object, the bare string that a missing admin permission
// gives (docs/openai-api.md), or something else, of which strange keeps a line.
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
	// Each field is decoded by itself: one of an unexpected type must not
	// cost the others.
	var fields map[string]json.RawMessage
	if json.Unmarshal(envelope.Error, &fields) != nil {
		return
	}
	asDocumented, complete := true, true
	for name, target := range map[string]*string{
		"message": &e.Message, "code": &e.Code, "type": &e.Type, "param": &e.Param,
	} {
		var value string
		if json.Unmarshal(fields[name], &value) == nil { // null, too
			*target = clean(value)
		} else if len(fields[name]) > 0 {
			asDocumented = false
		}
		complete = complete && len(fields[name]) > 0
	}
	e.documented = asDocumented && e.Message != "" && (e.Type != "" || e.Code != "")
	e.spoken = e.documented || asDocumented && complete && e.Message != ""
}

// keyLike matches a word that begins with sk- and is long enough to be a key, with
// the character before it. A word in which sk- stands elsewhere, such as
// task-runner, is none. OpenAI masks keys in its messages; a proxy or a test server
// may not.
var keyLike = regexp.MustCompile(`(^|[^\pL\pN])sk-[A-Za-z0-9_\-]{20,}`)

// keyFront matches what a cut has left of a key at the end of a text.
var keyFront = regexp.MustCompile(`(^|[^\pL\pN])sk-[A-Za-z0-9_\-]*$`)

// HoldsKey reports whether a text contains something shaped like an OpenAI key.
func HoldsKey(text string) bool { return keyLike.MatchString(text) }

// HideKeys replaces whatever is shaped like a key.
func HideKeys(text string) string { return keyLike.ReplaceAllString(text, "${1}sk-"+redacted) }

// clean makes foreign text fit for an error: valid UTF-8, one line, printable,
// bounded, and without anything that looks like a key.
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
	// Dropping characters above may have joined the halves of a key, and cutting
	// may have left too little of one to be known as such.
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
