// Package client calls the OpenAI Administration API. operations.go lists the operations,
// answers.go decodes the answers, and call.go makes the calls.
//
// What must stay true:
//   - a create is sent once per call: only reads, updates and deletes are retried here,
//     since no Admin endpoint documents an idempotency key (docs/openai-api.md);
//   - apart from the usual proxy variables, the environment cannot redirect a call: no
//     OPENAI_* variable is read, and redirects are not followed;
//   - every call is bounded in time and size, and the number of concurrent calls is
//     bounded;
//   - errors are *Error and never contain a key.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// DefaultBaseURL is OpenAI's public endpoint.
	DefaultBaseURL = "https://api.openai.com/v1"
	// DefaultTimeout bounds one HTTP attempt, answer included.
	DefaultTimeout = 30 * time.Second
	// DefaultConcurrency bounds the calls in flight and is the size of the
	// idle connection pool. Vault can send 180 revokes at a time.
	DefaultConcurrency = 256
	// reserved is the share of the calls in flight, one in reserved, that calls for
	// credential requests leave to all other calls, and vice versa: 32 of 256, which
	// allows 320 calls a second at a tenth of a second each.
	reserved = 8
	// MinExpiry is the shortest expires_in_seconds of any key.
	MinExpiry = time.Second
	// MaxExpiry is the longest: one year (API reference).
	MaxExpiry = 31_536_000 * time.Second

	// maxBody bounds an answer. The largest page (100 keys with owners) is
	// about 60 KiB.
	maxBody = 4 << 20
	// maxAttempts bounds the attempts of a read or a delete.
	maxAttempts = 4
	// maxLimited bounds the 429s of a read or a delete, with or without a deadline: by
	// then the rate limiter has reached its lowest rate.
	maxLimited = 10
	// maxWait is the longest wait between attempts. If OpenAI asks for a longer one, the
	// call fails, so that the caller can schedule its other work.
	maxWait = time.Minute
	// maxPages bounds a listing whose cursors never end. It allows a million items, or
	// 200,000 if the API returns its default of 20 per page.
	maxPages = 10_000
	pageSize = 100
)

// Options are the settings of a Client. Only AdminKey is required.
type Options struct {
	AdminKey     Secret
	BaseURL      string        // default DefaultBaseURL; must be absolute
	Organization string        // sent as OpenAI-Organization when not empty
	CACert       []byte        // PEM; when given, the only roots trusted
	Timeout      time.Duration // one HTTP attempt; default DefaultTimeout
	Concurrency  int           // calls in flight; default DefaultConcurrency
	RateLimiter  *RateLimiter  // shared with other clients of the mount; default a new one
	Clocks       *Clocks       // shared with other clients of the mount; default new ones
	Observer     Observer      // default none
	UserAgent    string
	// DialContext replaces the TCP dialer and disables the proxies of the environment.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error) `json:"-"`
}

// Client calls the Admin API with one admin key. It is safe for concurrent use
// and holds idle connections until Close.
type Client struct {
	baseURL      string // without a trailing slash
	host         string
	adminKey     Secret
	organization string
	userAgent    string
	timeout      time.Duration
	slots        chan struct{} // all calls in flight
	creates      chan struct{} // those for credential requests
	others       chan struct{} // all others
	rateLimiter  *RateLimiter
	observer     Observer
	http         *http.Transport
	clock        *clock
}

// New builds a client; it makes no call. It returns an error for a missing admin key, a
// base URL that is not an absolute HTTP one, or a CA bundle without a certificate.
func New(o Options) (*Client, error) {
	if o.AdminKey.IsZero() {
		return nil, errors.New("the admin key is missing")
	}
	if o.BaseURL == "" {
		o.BaseURL = DefaultBaseURL
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Concurrency <= 0 {
		o.Concurrency = DefaultConcurrency
	}
	if o.RateLimiter == nil {
		o.RateLimiter = NewRateLimiter()
	}
	if o.Clocks == nil {
		o.Clocks = &Clocks{}
	}
	if o.Observer == nil {
		o.Observer = noObserver{}
	}
	base, err := url.Parse(o.BaseURL)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		// Not quoted, since it may be a secret in the wrong field.
		return nil, errors.New("the base URL must be an absolute http or https URL")
	}

	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(o.CACert) > 0 {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(o.CACert) {
			return nil, errors.New("the CA bundle contains no certificate")
		}
		tlsConfig.RootCAs = pool
	}
	proxy, dial := http.ProxyFromEnvironment, o.DialContext
	if dial == nil {
		dial = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	} else {
		proxy = nil
	}
	transport := &http.Transport{
		Proxy:                 proxy,
		DialContext:           dial,
		TLSClientConfig:       tlsConfig,
		TLSHandshakeTimeout:   10 * time.Second,
		ForceAttemptHTTP2:     true,
		MaxConnsPerHost:       o.Concurrency,
		MaxIdleConns:          o.Concurrency,
		MaxIdleConnsPerHost:   o.Concurrency,
		IdleConnTimeout:       90 * time.Second,
		ExpectContinueTimeout: time.Second,
		// The default error has only the status text, and does not name the proxy.
		OnProxyConnectResponse: func(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			return &proxyRefusal{host: proxy.Host, status: resp.Status}
		},
		// All calls may share one HTTP/2 connection. If its peer vanishes, TCP takes
		// minutes to notice and each call would time out; pings detect it within the
		// first timeout.
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: min(15*time.Second, o.Timeout/2),
			PingTimeout:     min(15*time.Second, o.Timeout/2),
		},
	}
	reserve := max(o.Concurrency/reserved, min(o.Concurrency/4, 1)) // none below 4
	// Requests use only the scheme, host and path of the URL.
	root := url.URL{Scheme: base.Scheme, Host: base.Host, Path: base.Path, RawPath: base.RawPath}
	return &Client{
		baseURL:      strings.TrimRight(root.String(), "/"),
		host:         base.Host,
		adminKey:     o.AdminKey,
		organization: o.Organization,
		userAgent:    o.UserAgent,
		timeout:      o.Timeout,
		slots:        make(chan struct{}, o.Concurrency),
		creates:      make(chan struct{}, o.Concurrency-reserve),
		others:       make(chan struct{}, o.Concurrency-reserve),
		rateLimiter:  o.RateLimiter.For(strings.TrimRight(o.BaseURL, "/"), o.Organization, o.AdminKey),
		observer:     o.Observer,
		http:         transport,
		clock:        o.Clocks.of(strings.TrimRight(root.String(), "/")),
	}, nil
}

// Close drops idle connections; calls in flight continue.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// ForgetRate resets the learned rate limits, for a client whose admin key turns out to
// belong to another organization.
func (c *Client) ForgetRate() { c.rateLimiter.forget() }

// CreateRate returns how many service accounts, or keys of one, OpenAI accepts a minute
// as far as is known; limited is false where no limit is known.
func (c *Client) CreateRate(keys bool) (perMinute float64, limited bool) {
	if keys {
		return c.rateLimiter.rate(createKey.name)
	}
	return c.rateLimiter.rate(createServiceAccount.name)
}

// Host returns the host that calls go to, for messages.
func (c *Client) Host() string { return c.host }
