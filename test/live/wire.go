package live

// The recorder: a proxy on loopback between the client and OpenAI. Calls that the
// client does not support also use it. Of each answer, it keeps what the probes
// need, and no key.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-openai/client"
)

const maxBody = 4 << 20

// exchange is one answer.
type exchange struct {
	method, route    string
	status           int
	form             string // of an error body: object, string, other
	code, kind, text string
	limits           []string // names of headers about limits
	body             []byte
	err              error
}

type wire struct {
	upstream *url.URL
	base     string // the proxy's URL
	proxy    *httputil.ReverseProxy
	http     *http.Client

	mu       sync.Mutex
	seen     []exchange
	accounts []string // IDs of created accounts and admin keys
	admins   []string
}

func newWire(base string) (*wire, error) {
	upstream, err := url.Parse(strings.TrimSuffix(base, "/"))
	if err != nil || upstream.Host == "" {
		return nil, fmt.Errorf("%q is not a base URL", base)
	}
	// The engine rejects this too, but its client sees only the proxy's URL.
	if ip := net.ParseIP(upstream.Hostname()); upstream.Scheme != "https" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("https is required: the admin key would be sent to %s in clear text", upstream.Host)
	}
	w := &wire{upstream: upstream, http: &http.Client{Timeout: time.Minute}}
	w.proxy = &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(upstream)
			p.Out.Header.Del("Accept-Encoding") // so that the transport decompresses the answer
		},
		ModifyResponse: w.record,
		ErrorHandler: func(out http.ResponseWriter, in *http.Request, err error) {
			w.keep(exchange{method: in.Method, route: route(in.URL.Path), status: http.StatusBadGateway, form: "no answer", text: err.Error()})
			out.WriteHeader(http.StatusBadGateway)
		},
	}
	return w, nil
}

// serve starts the proxy on loopback. Closing it waits for the calls in progress.
func (w *wire) serve() *httptest.Server {
	server := httptest.NewServer(w)
	w.base = server.URL
	return server
}

// ServeHTTP completes a call even if its caller stops waiting: a create that is
// aborted may take effect later, after the cleanup.
func (w *wire) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(in.Context()), oneCall)
	defer cancel()
	w.proxy.ServeHTTP(out, in.WithContext(ctx))
}

// made returns the IDs of the accounts and admin keys that were created.
func (w *wire) made() (accounts, admins []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.accounts), slices.Clone(w.admins)
}

func (w *wire) record(resp *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(body))
	x := exchange{method: resp.Request.Method, route: route(strings.TrimPrefix(resp.Request.URL.Path, w.upstream.Path)), status: resp.StatusCode}
	for name := range resp.Header {
		if lower := strings.ToLower(name); strings.Contains(lower, "ratelimit") || lower == "retry-after" {
			x.limits = append(x.limits, name)
		}
	}
	if x.status >= http.StatusBadRequest {
		x.readError(body)
	}
	w.keep(x)
	if x.method == http.MethodPost && x.ok() {
		w.keepID(resp.Request.URL.Path, body)
	}
	return nil
}

// keepID records the ID in a create's answer, since its caller may not wait for it.
func (w *wire) keepID(path string, body []byte) {
	var thing struct{ ID string }
	if json.Unmarshal(body, &thing) != nil || thing.ID == "" {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case strings.HasSuffix(path, "/service_accounts"):
		w.accounts = append(w.accounts, thing.ID)
	case strings.HasSuffix(path, "/admin_api_keys"):
		w.admins = append(w.admins, thing.ID)
	}
}

func (w *wire) keep(x exchange) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = append(w.seen, x)
}

func (x *exchange) readError(body []byte) {
	x.form = "no OpenAI error"
	var envelope struct {
		Error json.RawMessage `json:"error"`
	}
	if json.Unmarshal(body, &envelope) != nil {
		return
	}
	var object struct{ Code, Type, Message string }
	switch {
	case json.Unmarshal(envelope.Error, &x.text) == nil && x.text != "":
		x.form = "a bare string"
	case json.Unmarshal(envelope.Error, &object) == nil:
		x.form, x.code, x.kind, x.text = "an object", object.Code, object.Type, object.Message
	}
}

// last is the newest answer; the probes run one after the other.
func (w *wire) last() exchange {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.seen) == 0 {
		return exchange{}
	}
	return w.seen[len(w.seen)-1]
}

func (x exchange) ok() bool { return x.err == nil && x.status/100 == 2 }
func (x exchange) refused() bool {
	return x.status == http.StatusUnauthorized || x.status == http.StatusForbidden
}

func (x exchange) String() string {
	switch {
	case x.err != nil:
		return x.err.Error()
	case x.status < http.StatusBadRequest:
		return fmt.Sprint(x.status)
	}
	text := []rune(x.text)
	return fmt.Sprintf("%d, error is %s, type %q, code %q: %s", x.status, x.form, x.kind, x.code, string(text[:min(160, len(text))]))
}

// call sends a request that the client has no method for. It waits out a rate
// limit as the client does.
func (w *wire) call(ctx context.Context, key client.Secret, method, path string, body any, header ...string) exchange {
	for attempt := 0; ; attempt++ {
		x := w.once(ctx, key, method, path, body, header...)
		if x.status != http.StatusTooManyRequests || attempt == 4 || client.Wait(ctx, 15*time.Second) != nil {
			return x
		}
	}
}

func (w *wire) once(ctx context.Context, key client.Secret, method, path string, body any, header ...string) exchange {
	var payload io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return exchange{err: err}
		}
		payload = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, w.base+path, payload)
	if err != nil {
		return exchange{err: err}
	}
	req.Header.Set("Authorization", "Bearer "+key.Reveal())
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := w.http.Do(req)
	if err != nil {
		return exchange{err: err}
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	x := w.last()
	x.body, x.err = content, err
	return x
}

// decode decodes the body and ignores errors.
func (x exchange) decode(into any) { _ = json.Unmarshal(x.body, into) }

var (
	// Keys and IDs in OpenAI's texts.
	secretLike = regexp.MustCompile(`sk-[A-Za-z0-9_*\-]+`)
	idLike     = regexp.MustCompile(`\b(proj|org|user|key|svc_acct|req|sess|acct)([-_])[A-Za-z0-9]{6,}`)
	// A path segment that is an ID.
	segment = regexp.MustCompile(`/[^/]*[A-Z0-9][^/]*|/key_[^/]+|/proj_[^/]+|/user-[^/]+`)
)

func scrub(text string) string {
	text = secretLike.ReplaceAllString(text, "sk-***")
	return idLike.ReplaceAllString(text, "$1$2***")
}

func route(path string) string { return segment.ReplaceAllString(path, "/{id}") }
