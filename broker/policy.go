package broker

// This file owns which requests pass. A request passes only for what is allowed
// by name: everything else is refused, with a code that says which rule refused
// it. What must stay true: OpenAI receives exactly the path that was checked.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// keptBody is the size up to which a request's body is kept, to read the model
// and to repeat the request with another key.
const keptBody = 1 << 20

var defaultFamilies = []string{
	"responses", "chat/completions", "completions", "embeddings", "images", "audio", "moderations", "models",
	"realtime", "files", "uploads", "vector_stores", "batches", "conversations", "videos",
}

// never are path prefixes that manage an organization or that return another
// bearer secret. Nothing can allow them.
var never = []string{
	"organization", "organizations", "projects", "vaults", "dashboard", "chatkit/sessions", "realtime/client_secrets",
	"realtime/translations/client_secrets", "realtime/sessions", "realtime/transcription_sessions",
}

// begins says whether a path is a prefix or lies under it.
func begins(segments []string, prefix string) bool {
	want := strings.Split(prefix, "/")
	return len(segments) >= len(want) && slices.Equal(segments[:len(want)], want)
}

// neverAllowed ignores case, and "-" for "_", in case a server does.
func neverAllowed(segments []string) bool {
	plain := strings.Split(strings.ToLower(strings.ReplaceAll(strings.Join(segments, "/"), "-", "_")), "/")
	return slices.ContainsFunc(never, func(prefix string) bool { return begins(plain, prefix) })
}

// refusal is an answer of the broker's own.
type refusal struct {
	status  int
	code    string
	message string
	retry   time.Duration
	cause   error // for the log; the agent sees the message
}

func (r *refusal) Error() string { return cmp.Or(r.cause, errors.New(r.message)).Error() }

func refuse(status int, code, message string) *refusal {
	return &refusal{status: status, code: code, message: message}
}

// write answers in the form of OpenAI's errors, which every SDK shows.
func (r *refusal) write(w http.ResponseWriter) {
	if r.retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(r.retry.Seconds()))))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(r.status)
	_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{ // a client that left needs no answer
		"message": r.message, "type": "broker_error", "param": nil, "code": r.code,
	}})
}

// checkOrigin refuses what a web page can send: another Host by DNS rebinding,
// an Origin, a request meant for a proxy.
func checkOrigin(r *http.Request, hosts map[string]bool) *refusal {
	switch {
	case r.URL.Host != "" || r.URL.Scheme != "" || r.Method == http.MethodConnect:
		return refuse(http.StatusForbidden, "broker_host", "The broker is not a forward proxy: use OPENAI_BASE_URL.")
	case !hosts[strings.ToLower(r.Host)]:
		return refuse(http.StatusForbidden, "broker_host", "The Host header is not an address of the broker.")
	case len(r.Header["Origin"]) > 0:
		return refuse(http.StatusForbidden, "broker_origin", "The broker does not serve web pages.")
	}
	return nil
}

// placeholder finds the agent's token: in the one Authorization header, or in
// the WebSocket subprotocol that browsers' clients use.
func placeholder(h http.Header) string {
	switch values := h["Authorization"]; len(values) {
	case 0:
		for _, protocol := range subprotocols(h) {
			if token, found := strings.CutPrefix(protocol, "openai-insecure-api-key."); found {
				return token
			}
		}
	case 1:
		if scheme, token, _ := strings.Cut(values[0], " "); strings.EqualFold(scheme, "Bearer") {
			return token
		}
	}
	return ""
}

var methods = []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodDelete, http.MethodPatch}

// checkPath returns the segments after /v1 of a canonical path of an allowed
// family. Escapes are accepted only where no server reads them two ways.
func checkPath(method, escaped string, allow []string) ([]string, *refusal) {
	if !slices.Contains(methods, method) {
		return nil, refuse(http.StatusMethodNotAllowed, "broker_method", "The broker does not forward this method.")
	}
	invalid := refuse(http.StatusForbidden, "broker_path", "The path is not in canonical form.")
	clean, err := url.PathUnescape(escaped)
	if err != nil || len(clean) > 1024 || path.Clean(clean) != clean || !strings.HasPrefix(clean, "/v1/") {
		return nil, invalid
	}
	for _, c := range []byte(clean) {
		if c <= ' ' || c > '~' || strings.IndexByte(`\;?#%`, c) >= 0 {
			return nil, invalid
		}
	}
	if lower := strings.ToLower(escaped); strings.Contains(lower, "%2f") || strings.Contains(lower, "%2e") {
		return nil, invalid
	}
	segments := strings.Split(clean[len("/v1/"):], "/")
	switch {
	case slices.ContainsFunc(segments, func(s string) bool { return strings.HasSuffix(s, ".") }):
		return nil, invalid
	case neverAllowed(segments):
		return nil, refuse(http.StatusForbidden, "broker_never_allowed", "The broker never forwards requests that manage an organization or create other credentials.")
	case !slices.ContainsFunc(allow, func(family string) bool { return begins(segments, family) }):
		return nil, refuse(http.StatusForbidden, "broker_not_allowed", "The broker does not allow this path for this agent.")
	}
	return segments, nil
}

// stripped are parts of names of headers, subprotocols and query parameters that
// name another key, organization or project, or another method than was checked.
var stripped = []string{
	"authorization", "api-key", "apikey", "cookie", "openai-organization", "openai-project", "chatgpt-account", "x-http-method", "x-method",
}

func isStripped(name string) bool {
	plain := strings.ToLower(strings.ReplaceAll(name, "_", "-"))
	return slices.ContainsFunc(stripped, func(s string) bool { return strings.Contains(plain, s) })
}

func strip(h http.Header) {
	protocols := slices.DeleteFunc(subprotocols(h), isStripped)
	maps.DeleteFunc(h, func(name string, _ []string) bool { return isStripped(name) || name == "Sec-Websocket-Protocol" })
	if len(protocols) > 0 {
		h.Set("Sec-Websocket-Protocol", strings.Join(protocols, ", "))
	}
}

func subprotocols(h http.Header) []string {
	return strings.FieldsFunc(strings.Join(h["Sec-Websocket-Protocol"], ","), func(c rune) bool { return c == ',' || c == ' ' || c == '\t' })
}

// isSocket says whether a request opens a WebSocket. Nothing else may switch
// protocols: what follows a switch is not checked.
func isSocket(r *http.Request) bool {
	upgrade := r.Header["Upgrade"]
	return r.Method == http.MethodGet && len(upgrade) == 1 && strings.EqualFold(upgrade[0], "websocket")
}

// withoutModel are families whose requests name no model and run none.
var withoutModel = []string{"files", "uploads", "vector_stores", "conversations"}

// checkModels refuses a request unless every model that it names is allowed and
// it can name no other. body is nil if it was not kept.
func checkModels(r *http.Request, segments []string, body []byte, patterns []string) *refusal {
	no := func(message string) *refusal { return refuse(http.StatusForbidden, "broker_model", message) }
	query, err := url.ParseQuery(r.URL.RawQuery)
	for name := range query {
		if name != "model" && strings.HasPrefix(strings.ToLower(name), "model") {
			return no("The query must name its model as \"model\".")
		}
	}
	named := query["model"]
	switch {
	case err != nil:
		return no("The query cannot be checked for a model.")
	case isSocket(r):
		if len(named) != 1 || segments[0] != "realtime" {
			return no("With -models a WebSocket must name its model in the query, which only realtime does.")
		}
	case slices.Contains(withoutModel, segments[0]), len(segments) == 3 && strings.HasSuffix(r.URL.Path, "/cancel"):
	case r.Method == http.MethodGet, r.Method == http.MethodHead, r.Method == http.MethodDelete:
	default:
		models, fine := bodyModels(body)
		if !fine || !isJSON(r.Header) || segments[0] == "batches" {
			return no("With -models the request must be JSON of at most 1 MiB with one top-level model and no stored prompt.")
		}
		named = append(named, models...)
	}
	for _, model := range named {
		if !slices.ContainsFunc(patterns, func(p string) bool { matched, _ := path.Match(p, model); return matched }) { // validate tried the pattern
			return no("The broker does not allow this model for this agent.")
		}
	}
	return nil
}

// isJSON says whether every server reads a body as JSON in UTF-8.
func isJSON(h http.Header) bool {
	media, parameters, err := mime.ParseMediaType(strings.Join(h["Content-Type"], ","))
	charset := strings.ToLower(parameters["charset"])
	return err == nil && media == "application/json" && (charset == "" || charset == "utf-8") && len(h["Content-Encoding"]) == 0
}

// bodyModels returns every model that a JSON body names, at any depth. It is
// fine with one object that has exactly one top-level "model", in this spelling,
// and no stored prompt, which has a model of its own.
func bodyModels(body []byte) (models []string, fine bool) {
	dec := json.NewDecoder(bytes.NewReader(body))
	top := 0
	var walk func(depth int, name string) bool
	walk = func(depth int, name string) bool {
		t, err := dec.Token()
		open, nested := t.(json.Delim)
		model, isText := t.(string)
		if err != nil || depth > 200 || depth == 0 && open != '{' || depth == 1 && strings.EqualFold(name, "prompt") && open == '{' {
			return false
		}
		if strings.EqualFold(name, "model") {
			if isText {
				models = append(models, model)
			}
			if depth == 1 {
				if top++; !isText || name != "model" {
					return false
				}
			}
		}
		for nested && dec.More() {
			inner := ""
			if open == '{' {
				t, _ := dec.Token() // an error comes again
				inner, _ = t.(string)
			}
			if !walk(depth+1, inner) {
				return false
			}
		}
		if nested {
			_, err = dec.Token()
		}
		return err == nil
	}
	fine = walk(0, "") && top == 1
	_, err := dec.Token()
	return models, fine && err == io.EOF
}

// limits are an agent's bounds.
type limits struct {
	slots chan struct{} // one for each request in progress
	every time.Duration // a request on average; 0 is no limit

	mu   sync.Mutex
	next time.Time // when the rate allows a request; up to a minute ago
}

// overlap is how long a request waits for the one before it, which its agent
// takes for finished when the last byte has arrived.
const overlap = 100 * time.Millisecond

func newLimits(concurrent, rpm int) *limits {
	l := &limits{slots: make(chan struct{}, cmp.Or(concurrent, math.MaxInt32))} // slots take no memory
	if rpm > 0 {
		l.every = time.Minute / time.Duration(rpm)
	}
	return l
}

// enter admits one request, or says how long to wait. A minute's requests may
// come at once.
func (l *limits) enter() *refusal {
	select {
	case l.slots <- struct{}{}:
	case <-time.After(overlap):
		return &refusal{status: http.StatusTooManyRequests, code: "broker_concurrency", message: "The agent has as many requests in progress as -max-concurrent allows.", retry: time.Second}
	}
	if l.every == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if full := now.Add(l.every - time.Minute); l.next.Before(full) {
		l.next = full
	}
	if wait := l.next.Sub(now); wait > 0 {
		l.leave()
		return &refusal{status: http.StatusTooManyRequests, code: "broker_rate", message: "The agent has made as many requests as -max-rpm allows.", retry: wait}
	}
	l.next = l.next.Add(l.every)
	return nil
}

func (l *limits) leave() { <-l.slots }

func (l *limits) busy() bool { return len(l.slots) > 0 }
