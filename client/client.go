// Package client is the OpenAI Administration API in this engine's words.
// operations.go has all that it can ask for, answers.go what it reads of the
// answers; call.go makes the calls.
//
// What must stay true:
//   - a create is sent once per call: only reads and deletes are retried here,
//     since no Admin endpoint documents an idempotency key (docs/openai-api.md);
//   - the environment cannot redirect a call but by the usual proxy variables: no
//     OPENAI_* variable is read, and redirects are not followed;
//   - every call is bounded in time, in size and in number at once;
//   - errors are *Error and never carry a key.
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
	// reserved is the part of the calls in flight, 1 in so many, that issues leave
	// to all other calls, and those to issues: of 256 that is 32, which at a tenth
	// of a second each are 320 calls a second.
	reserved = 8
	// MinExpiry is the shortest expires_in_seconds of any key.
	MinExpiry = time.Second
	// MaxExpiry is the longest: one year (API reference).
	MaxExpiry = 31_536_000 * time.Second

	// maxBody bounds an answer. The largest page (100 keys with owners) is
	// about 60 KiB.
	maxBody = 4 << 20
	// maxAttempts bounds the tries of a read or a delete.
	maxAttempts = 4
	// maxLimited bounds the 429s that one of them takes, with or without a
	// deadline: by then the pace has backed off as far as it does.
	maxLimited = 10
	// maxWait is the longest wait between them. One that OpenAI wants longer is
	// its caller's to plan, who alone knows what else is waiting.
	maxWait = time.Minute
	// maxPages ends a listing whose cursor never does. A million items fit, and
	// 200,000 accounts even where the API gives its default of 20 to a page.
	maxPages = 10_000
	pageSize = 100
)

// Options are the settings of a Client. AdminKey is required, the rest has
// defaults.
type Options struct {
	AdminKey     Secret
	BaseURL      string        // default DefaultBaseURL; must be absolute
	Organization string        // sent as OpenAI-Organization when not empty
	CACert       []byte        // PEM; when given, the only roots trusted
	Timeout      time.Duration // one HTTP attempt; default DefaultTimeout
	Concurrency  int           // calls in flight; default DefaultConcurrency
	Pace         *Pace         // what is known of rate limits, here and elsewhere; default nothing
	Observer     Observer      // is told of each call; default nobody
	UserAgent    string
	// DialContext replaces how connections are made, and the proxies of the
	// environment with it: its owner decides about the whole way. Default is TCP.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error) `json:"-"`
}

// Client calls the Admin API with one admin key. It is safe for concurrent use
// and holds idle connections until Close.
type Client struct {
	baseURL      string // without a slash at its end
	host         string
	adminKey     Secret
	organization string
	userAgent    string
	timeout      time.Duration
	slots        chan struct{} // calls in flight, of which
	creates      chan struct{} // these are issues
	others       chan struct{} // and these are all others
	pace         *Pace
	observer     Observer
	http         *http.Transport
	clock        *clock
}

// New builds a client; it makes no call. It fails on a base URL that is not an
// absolute one of HTTP or a CA bundle without a certificate.
func New(o Options) (*Client, error) {
	if o.AdminKey.IsZero() {
		return nil, errors.New("no admin key")
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
	if o.Pace == nil {
		o.Pace = NewPace()
	}
	if o.Observer == nil {
		o.Observer = nobody{}
	}
	base, err := url.Parse(o.BaseURL)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		// Not quoted: what is no URL may well be something secret.
		return nil, errors.New("the base URL is not an absolute http or https URL")
	}

	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(o.CACert) > 0 {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(o.CACert) {
			return nil, errors.New("the CA bundle holds no certificate")
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
		// Without this the error is the status text alone, which says neither that a
		// proxy has answered nor which.
		OnProxyConnectResponse: func(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			return &proxyRefusal{host: proxy.Host, status: resp.Status}
		},
		// All calls may share one HTTP/2 connection. When its other end vanishes
		// without a word, TCP takes minutes to notice and each call until then
		// would wait out its timeout; a ping notices within the first.
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: min(15*time.Second, o.Timeout/2),
			PingTimeout:     min(15*time.Second, o.Timeout/2),
		},
	}
	reserve := max(o.Concurrency/reserved, min(o.Concurrency/4, 1)) // below 4 there is none to spare
	// Of the URL nothing but its host and its path goes into a request.
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
		pace:         o.Pace.For(strings.TrimRight(o.BaseURL, "/"), o.Organization, o.AdminKey),
		observer:     o.Observer,
		http:         transport,
		clock:        &clock{},
	}, nil
}

// Close drops idle connections; calls in flight go on.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// ForgetPace drops what is known of rate limits, for a client whose admin key
// turns out to be another organization's.
func (c *Client) ForgetPace() { c.pace.forget() }

// Host returns the host that calls go to, for messages.
func (c *Client) Host() string { return c.host }
