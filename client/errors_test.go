package client

// Errors for every form of answer: the status, NotFound, Ambiguous and Retryable, and no key
// in any text.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// maxText bounds the text of an error: the operation, the message and the details with
// maxMessage each, and the text in between.
const maxText = 5*(maxMessage+1) + 300

// requireFit checks the text of an error in every printed form.
func requireFit(t testing.TB, e *Error, secrets ...string) {
	t.Helper()
	text := e.Error()
	if !utf8.ValidString(text) {
		t.Fatalf("not UTF-8: %q", text)
	}
	if n := utf8.RuneCountInString(text); n > maxText {
		t.Fatalf("%d characters", n)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Fatalf("not one printable line: %q", text)
	}
	var log bytes.Buffer
	hclog.New(&hclog.LoggerOptions{Output: &log, JSONFormat: true}).Error("m", "err", e)
	hclog.New(&hclog.LoggerOptions{Output: &log}).Error("m", "err", e)
	slog.New(slog.NewJSONHandler(&log, nil)).Error("m", "err", e)
	raw, _ := json.Marshal(e)
	prints := []string{text, log.String(), string(raw), fmt.Sprintf("%v %+v %#v %q", e, e, e, e), fmt.Sprintf("%#v", *e)}
	if e.Cause != nil {
		prints = append(prints, e.Cause.Error())
	}
	for _, print := range prints {
		if found := keyLike.FindString(print); found != "" {
			t.Fatalf("%q looks like a key: %s", found, print)
		}
		for _, secret := range secrets {
			if secret != "" && strings.Contains(print, secret) {
				t.Fatalf("a key leaks: %s", print)
			}
		}
	}
}

func TestHoldsKey_MatchesWordsThatBeginWithSK(t *testing.T) {
	t.Parallel()
	const key = "sk-ABCDEFGHIJ0123456_-9"
	for text, want := range map[string]bool{
		key: true, "sk-admin-0123456789abcdef": true, " " + key: true, "https://" + key + "@x": true, "a_" + key: true, "a-" + key: true,
		"[" + key + "]": true, "a\n" + key: true, "a," + key + ",b": true, "é" + key: false, "a" + key: false, "7" + key: false,
		"": false, "sk-": false, "sk-short": false, key[:22]: false, "task-runner": false, "task-runner-0123456789-0123456789": false,
		"risk-api-production-europe-west": false, "SK-ABCDEFGHIJ0123456789": false, "sk-admin-***************": false, "sk-0123456789 0123456789": false,
	} {
		require.Equal(t, want, HoldsKey(text), text)
		require.False(t, HoldsKey(HideKeys(text)), text)
		if !want {
			require.Equal(t, text, clean(strings.ReplaceAll(text, "\n", " ")), text)
		}
	}
}

func TestError_TextForEveryForm(t *testing.T) {
	t.Parallel()
	type want struct {
		message, code, kind, param string
		text                       string // part of Error()
	}
	for name, test := range map[string]struct {
		status int
		body   string
		want
	}{
		"object": {400, `{"error":{"message":"No.","type":"invalid_request_error","param":"name","code":"bad_name"}}`,
			want{"No.", "bad_name", "invalid_request_error", "name", ": OpenAI error: No. (status 400, code bad_name, param name, request id req_1)"}},
		"null fields": {401, `{"error":{"message":"Who?","type":null,"param":null,"code":null}}`,
			want{message: "Who?", text: ": OpenAI error: Who? (status 401, request id req_1)"}},
		"a bare string from another server": {403, `{"error":"Not with me"}`, want{message: "Not with me", text: " rejected the request: Not with me (status 403"}},
		"bare string": {403, `{"error":"You have insufficient permissions for this operation. Missing scopes: api.management.read."}`,
			want{message: "You have insufficient permissions for this operation. Missing scopes: api.management.read.", text: "Missing scopes"}},
		"number as code":         {400, `{"error":{"message":"m","code":42,"type":"t"}}`, want{message: "m", kind: "t"}},
		"object as message":      {400, `{"error":{"message":{"a":1},"code":"c"}}`, want{code: "c"}},
		"list as type":           {400, `{"error":{"message":"m","type":["a"],"param":{"b":2}}}`, want{message: "m"}},
		"boolean as param":       {400, `{"error":{"message":"m","param":true,"code":"c"}}`, want{message: "m", code: "c"}},
		"null error":             {400, `{"error":null}`, want{text: "rejected the request: Bad Request"}},
		"number as error":        {400, `{"error":5}`, want{text: "rejected the request: Bad Request"}},
		"list as error":          {400, `{"error":[{"message":"m"}]}`, want{text: "rejected the request: Bad Request"}},
		"empty error":            {400, `{"error":{}}`, want{text: "rejected the request: Bad Request"}},
		"another object":         {422, `{"detail":"m"}`, want{text: "rejected the request: Unprocessable Entity: m (status 422"}},
		"empty":                  {403, ``, want{text: "rejected the request: Forbidden (status 403, request id req_1)"}},
		"a page's title":         {403, "<html><head><title>\nStop sk-admin-abcdefghijklmnop!\n</title></head>", want{text: "rejected the request: Forbidden: Stop sk-***! (status 403"}},
		"HTML":                   {502, `<html><body>Bad gateway sk-admin-abcdefghijkl</body></html>`, want{text: "rejected the request: Bad Gateway (status 502"}},
		"garbage":                {500, "\xff\xfe\x00{", want{text: "rejected the request: Internal Server Error"}},
		"truncated":              {500, `{"error":{"message":"m"`, want{text: "rejected the request: Internal Server Error"}},
		"trailing garbage":       {500, `{"error":{"message":"m"}} x`, want{text: "rejected the request: Internal Server Error"}},
		"huge":                   {403, `{"error":{"message":"` + strings.Repeat("A", maxBody) + `"}}`, want{text: "rejected the request: Forbidden"}},
		"huge but whole":         {403, `{"error":{"message":"` + strings.Repeat("é", 1<<20) + `"}}`, want{message: strings.Repeat("é", maxMessage) + "…"}},
		"deep":                   {400, `{"error":` + strings.Repeat("[", 1<<16), want{text: "rejected the request: Bad Request"}},
		"lines":                  {400, `{"error":{"message":"a\r\nb\u2028c\tdd\u0000\u001b[31m\u202eee"}}`, want{message: "a  b c dd[31mee"}},
		"unpaired surrogate":     {400, `{"error":{"message":"a\ud800b"}}`, want{message: "a\uFFFDb"}},
		"not UTF-8":              {400, "{\"error\":{\"message\":\"a\xffb\"}}", want{message: "a\uFFFDb"}},
		"unknown status":         {599, ``, want{text: "rejected the request (status 599"}},
		"a key":                  {400, `{"error":{"message":"Incorrect key sk-proj-AbCdEf1234567890 provided","code":"sk-svcacct-abcdefghijklmnop"}}`, want{message: "Incorrect key sk-*** provided", code: "sk-***"}},
		"a key in pieces":        {400, `{"error":{"message":"sk-ab\u0000cdef\u200bghijklmnopqrstuvwx"}}`, want{message: "sk-***"}},
		"words with sk- inside":  {400, `{"error":{"message":"no task-runner-of-project-production, risk-api-production-europe-west or sk-short"}}`, want{message: "no task-runner-of-project-production, risk-api-production-europe-west or sk-short"}},
		"a key cut in two":       {400, `{"error":{"message":"m` + strings.Repeat("\u200b", 1060) + ` sk-proj-AbCdEf1234567890"}}`, want{message: "m sk-***"}},
		"a key masked by OpenAI": {401, `{"error":{"message":"Incorrect API key provided: sk-admin*****wxyz."}}`, want{message: "Incorrect API key provided: sk-admin*****wxyz."}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := answering(t, test.status, map[string]string{"x-request-id": "req_1"}, test.body)
			_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
			e := failed(t, err)
			require.Equal(t, test.status, e.Status)
			require.Equal(t, "req_1", e.RequestID)
			require.True(t, e.Sent)
			require.Equal(t, test.message, e.Message)
			require.Equal(t, test.code, e.Code)
			require.Equal(t, test.kind, e.Type)
			require.Equal(t, test.param, e.Param)
			require.ErrorContains(t, e, test.text)
			require.True(t, strings.HasPrefix(e.Error(), "create service account n in project p: "), e)
			requireFit(t, e)
		})
	}
}

func TestError_NotFoundAmbiguousRetryable(t *testing.T) {
	t.Parallel()
	const (
		gone = 1 << iota
		denied
		ambiguous
		retryable
		limited
	)
	code := func(code string) string { return `{"error":{"message":"m","code":"` + code + `"}}` }
	for _, test := range []struct {
		status int
		body   string
		want   int
	}{
		{301, "", ambiguous}, {302, "", ambiguous}, {307, "", ambiguous}, {308, "", ambiguous},
		{400, "", 0}, {405, "", 0}, {410, "", 0}, {413, "", 0}, {422, "", 0},
		{401, "", denied}, {403, "", denied},
		{404, code("api_key_not_found"), gone},
		{404, `{"error":"No such thing."}`, retryable}, {404, `{"error":{"message":"m"}}`, retryable},
		{404, `{"error":{"message":"m","code":404,"type":"not_found"}}`, retryable},
		{404, code("unknown_url"), 0}, // OpenAI's, but about the URL
		{404, `{"error":{"message":"Unknown request URL: DELETE /v1/x. Please check the URL for typos.","type":"invalid_request_error","param":null,"code":"unknown_url"}}`, 0},
		{404, `{"error":{"message":"Invalid URL (DELETE /v1/organization/x)","type":"invalid_request_error","param":null,"code":null}}`, 0},
		{404, `{"error":{"message":"no Route matched with those values","type":"not_found"}}`, 0},
		{404, "", retryable}, {404, "<h1>Not Found</h1>", retryable}, {404, `{"detail":"Not Found"}`, retryable}, // of unknown origin
		{408, "", ambiguous | retryable}, {409, "", ambiguous | retryable},
		{429, "", limited | retryable},
		{429, code("rate_limit_exceeded"), limited | retryable},
		{429, code("organization_spend_limit_exceeded"), limited},
		{429, code("project_spend_limit_exceeded"), limited},
		{429, code("organization_usage_limit_exceeded"), limited},
		{429, code("credit_balance_exhausted"), limited},
		{429, code("insufficient_quota"), limited},
		{429, code("billing_hard_limit_reached"), limited},
		{403, code("project_spend_limit_exceeded"), denied},
		{500, "", ambiguous | retryable}, {502, "", ambiguous | retryable}, {503, "", ambiguous | retryable},
		{504, "", ambiguous | retryable}, {520, "", ambiguous | retryable}, {599, "", ambiguous | retryable},
		{501, "", ambiguous},
		{200, "{}", ambiguous | retryable}, {202, "", ambiguous | retryable}, {204, "", ambiguous | retryable},
	} {
		t.Run(fmt.Sprintf("%d %s", test.status, test.body), func(t *testing.T) {
			t.Parallel()
			c := answering(t, test.status, nil, test.body)
			_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
			e := failed(t, err)
			got := 0
			for bit, holds := range map[int]bool{
				gone: e.NotFound(), denied: e.Denied(), ambiguous: e.Ambiguous(), retryable: e.Retryable(), limited: e.RateLimited(),
			} {
				if holds {
					got |= bit
				}
			}
			require.Equal(t, test.want, got, "%v", e)
			wrapped := fmt.Errorf("revoke: %w", err)
			require.Equal(t, e.NotFound(), IsNotFound(wrapped))
			require.Equal(t, e.Denied(), IsDenied(wrapped))
		})
	}
	for _, err := range []error{nil, errors.New("other")} {
		require.Nil(t, AsError(err))
		require.False(t, IsNotFound(err) || IsDenied(err))
	}
}

func TestError_RetryAfterInEveryForm(t *testing.T) {
	t.Parallel()
	date := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	for value, want := range map[string]time.Duration{
		"":                       0,
		"0":                      0,
		"7":                      7 * time.Second,
		"3600":                   time.Hour,
		"86400":                  time.Hour,
		"9223372037":             time.Hour, // overflows in nanoseconds
		"9223372036854775807":    time.Hour,
		"99999999999999999999":   0,
		"-5":                     0,
		"1.5":                    0,
		"soon":                   0,
		"Thu, 99 Foo 2026 00:00": 0,
		date(-time.Hour):         0,
		date(1000 * time.Hour):   time.Hour,
		date(30 * time.Minute):   30 * time.Minute,
	} {
		c := answering(t, http.StatusTooManyRequests, map[string]string{"Retry-After": value}, "")
		_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		tolerance := time.Duration(0)
		if want == 30*time.Minute {
			tolerance = time.Minute // a date moves nearer while the test runs
		}
		require.InDelta(t, want, failed(t, err).RetryAfter, float64(tolerance), value)
	}
}

// The status of an error counts even if its body is truncated.
func TestError_StatusOfATruncatedBody(t *testing.T) {
	t.Parallel()
	for status, ambiguous := range map[int]bool{200: true, 404: false, 400: false, 401: false, 403: false, 500: true} {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, `{"error":{"message":"m"`)
		})
		_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		e := failed(t, err)
		require.Equal(t, ambiguous, e.Ambiguous(), status)
		require.True(t, e.Sent)
		require.False(t, e.NotFound(), "a 404 without OpenAI's error proves nothing")
		if status == http.StatusOK {
			require.Zero(t, e.Status, "a truncated response has no status")
			require.ErrorContains(t, e, "reading the response")
		} else {
			require.Equal(t, status, e.Status)
		}
	}
}

func TestError_BoundsAHugeAnswer(t *testing.T) {
	t.Parallel()
	sim := openaitest.Start(t, openaitest.Options{})
	on := populate(t, sim)
	sim.Fail(openaitest.Fault{Kind: openaitest.FaultHuge, Method: http.MethodPost})
	e := failed(t, allCalls["CreateServiceAccount"].call(context.Background(), connect(t, sim), on))
	require.ErrorContains(t, e, "larger than 4194304 bytes")
	require.True(t, e.Sent && e.Ambiguous())
	requireFit(t, e)
}

// A key that a server echoes or has just created must not be part of an error.
func TestError_MasksAnEchoedKey(t *testing.T) {
	t.Parallel()
	const made = "sk-svcacct-ZYXWVUTSRQPONMLKJIHGFEDCBA"
	echo := map[string]func(w http.ResponseWriter, key string){
		"message": func(w http.ResponseWriter, key string) {
			w.WriteHeader(400)
			fmt.Fprintf(w, `{"error":{"message":"bad key %s and %s"}}`, key, made)
		},
		"string": func(w http.ResponseWriter, key string) {
			w.WriteHeader(403)
			fmt.Fprintf(w, `{"error":"Bearer %s"}`, key)
		},
		"code": func(w http.ResponseWriter, key string) {
			w.WriteHeader(429)
			fmt.Fprintf(w, `{"error":{"code":"%[1]s","type":"x%[1]s","param":"%[1]s"}}`, key)
		},
		"request id": func(w http.ResponseWriter, key string) {
			w.Header().Set("X-Request-Id", "req "+key)
			w.WriteHeader(500)
		},
		"HTML": func(w http.ResponseWriter, key string) {
			w.WriteHeader(502)
			fmt.Fprintf(w, `<pre>%s %s</pre>`, key, made)
		},
		"answer": func(w http.ResponseWriter, key string) {
			fmt.Fprintf(w, `{"id":"a","api_key":{"id":"","value":"%s"},"note":"%s"}`, made, key)
		},
		"not JSON":   func(w http.ResponseWriter, key string) { fmt.Fprintf(w, `%s %s`, made, key) },
		"wrong type": func(w http.ResponseWriter, key string) { fmt.Fprintf(w, `["%s","%s"]`, made, key) },
		"location": func(w http.ResponseWriter, key string) {
			w.Header().Set("Location", "https://x.invalid/"+key)
			w.WriteHeader(307)
		},
		"bad location": func(w http.ResponseWriter, key string) {
			w.Header().Set("Location", "http://[::1%25/"+key)
			w.WriteHeader(302)
		},
		"status line": func(w http.ResponseWriter, key string) { raw(w, key+" "+made+"\r\n\r\n") },
		"header line": func(w http.ResponseWriter, key string) { raw(w, "HTTP/1.1 200 OK\r\n"+key+"\r\n\r\n") },
		"status code": func(w http.ResponseWriter, key string) { raw(w, "HTTP/1.1 "+key+" OK\r\n\r\n") },
		"encoding": func(w http.ResponseWriter, key string) {
			raw(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: "+key+"\r\n\r\n")
		},
		"length": func(w http.ResponseWriter, key string) { raw(w, "HTTP/1.1 200 OK\r\nContent-Length: "+key+"\r\n\r\n") },
	}
	for name, answer := range echo {
		for _, key := range []string{testKey, "a key of another make: p4ssw0rd!"} {
			t.Run(name+"/"+key[:4], func(t *testing.T) {
				t.Parallel()
				c := serve(t, func(w http.ResponseWriter, r *http.Request) {
					answer(w, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
				}, withKey(key))
				_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
				requireFit(t, failed(t, err), key, made, key[8:], made[8:])
				_, _, err = c.CreateServiceAccount(context.Background(), "p "+key, made+"\n"+strings.Repeat("n", 10_000), time.Hour)
				requireFit(t, failed(t, err), key, made, key[8:], made[8:])
			})
		}
	}
}

// raw answers with invalid HTTP.
func raw(w http.ResponseWriter, text string) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	_, _ = io.WriteString(conn, text)
	_ = conn.Close()
}

// A request with an invalid header is not sent, and the error does not quote the key.
func TestError_MasksAKeyThatIsNotAValidHeader(t *testing.T) {
	t.Parallel()
	key := testKey + "\nX-Other: 1"
	c := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("the request was sent") }, withKey(key))
	_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
	e := failed(t, err)
	require.False(t, e.Sent || e.Ambiguous())
	requireFit(t, e, testKey)
}

func TestError_WithoutAnAnswer(t *testing.T) {
	t.Parallel()
	create := func(ctx context.Context, c *Client) *Error {
		_, _, err := c.CreateServiceAccount(ctx, "p", "n", time.Hour)
		return failed(t, err)
	}
	t.Run("connection refused", func(t *testing.T) {
		t.Parallel()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		require.NoError(t, l.Close())
		e := create(context.Background(), pointAt(t, "http://"+l.Addr().String()))
		require.False(t, e.Sent || e.Ambiguous())
		require.True(t, e.Retryable())
		require.Zero(t, e.Status)
		require.ErrorContains(t, e, ": cannot reach "+l.Addr().String()+": dial tcp")
		var op *net.OpError
		require.ErrorAs(t, e, &op)
	})
	t.Run("unknown authority", func(t *testing.T) {
		t.Parallel()
		sim := openaitest.Start(t, openaitest.Options{TLS: true})
		c := connect(t, sim, func(o *Options) { o.CACert = nil })
		e := create(context.Background(), c)
		require.False(t, e.Sent || e.Ambiguous())
		require.False(t, e.Retryable(), "a retry does not help against a certificate")
		require.ErrorContains(t, e, "certificate signed by unknown authority")
		require.Error(t, allCalls["ListProjects"].call(context.Background(), c, ids{}))
		require.Equal(t, 2, sim.Connections())
		require.Empty(t, sim.Requests())
	})
	t.Run("no TLS", func(t *testing.T) {
		t.Parallel()
		plain := httptest.NewServer(http.NotFoundHandler())
		defer plain.Close()
		e := create(context.Background(), pointAt(t, strings.Replace(plain.URL, "http:", "https:", 1)))
		require.False(t, e.Sent || e.Ambiguous())
	})
	t.Run("a handshake that never ends", func(t *testing.T) {
		t.Parallel()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		e := create(context.Background(), pointAt(t, "https://"+l.Addr().String(), withTimeout(100*time.Millisecond)))
		require.False(t, e.Sent || e.Ambiguous())
		require.ErrorIs(t, e, context.DeadlineExceeded)
	})
	t.Run("canceled before the call", func(t *testing.T) {
		t.Parallel()
		sim := openaitest.Start(t, openaitest.Options{})
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		e := create(ctx, connect(t, sim))
		require.False(t, e.Sent || e.Ambiguous())
		require.ErrorIs(t, e, context.Canceled)
		require.Empty(t, sim.Requests())
	})
	for _, kind := range []openaitest.FaultKind{openaitest.FaultLost, openaitest.FaultReset, openaitest.FaultTruncated, openaitest.FaultHangAfter} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
				sim := openaitest.Start(t, o)
				on := populate(t, sim)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				fault := openaitest.Fault{Kind: kind, Method: http.MethodPost}
				if kind == openaitest.FaultHangAfter {
					fault.OnStrike = func(*http.Request) { cancel() }
				}
				sim.Fail(fault)
				err := allCalls["CreateServiceAccount"].call(ctx, connect(t, sim), on)
				e := failed(t, err)
				require.True(t, e.Sent && e.Ambiguous() && e.Retryable())
				require.Zero(t, e.Status)
				require.ErrorContains(t, e, ": no answer from 127.0.0.1:")
				require.NotContains(t, e.Error(), "/v1/", "the error does not contain the URL")
			})
		})
	}
}

// Whenever a caller cancels, a create with an unambiguous error has no effect.
func TestError_UnambiguousMeansNothingWasCreated(t *testing.T) {
	t.Parallel()
	onBothProtocols(t, func(t *testing.T, o openaitest.Options) {
		sim := openaitest.Start(t, o)
		sim.KeepAll()
		project := sim.AddProject("p")
		certain := map[string]bool{}
		outcomes := map[string]int{}
		c := connect(t, sim)
		for i := range 300 {
			if i%20 == 0 { // some cancellations interrupt the dial
				c = connect(t, sim)
			}
			name := fmt.Sprintf("n%d", i)
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i%60)*25*time.Microsecond)
			_, _, err := c.CreateServiceAccount(ctx, project, name, time.Hour)
			cancel()
			switch {
			case err == nil:
				outcomes["made"]++
			case failed(t, err).Ambiguous():
				outcomes["ambiguous"]++
			default:
				outcomes["not made"]++
				certain[name] = true
			}
		}
		time.Sleep(100 * time.Millisecond) // until the simulator has handled all requests
		for _, account := range sim.Accounts() {
			require.False(t, certain[account.Name], "%s was created", account.Name)
		}
		require.NotZero(t, outcomes["not made"], "%v", outcomes)
		t.Log(outcomes)
	})
}

func FuzzErrorBody(f *testing.F) {
	for _, body := range []string{
		``, `{}`, `null`, `"x"`, `[]`, `{"error":null}`, `{"error":"s"}`, `{"error":{}}`, `{"error":[1]}`,
		`{"error":{"message":"m","type":"t","param":"p","code":"c"}}`,
		`{"error":{"message":5,"type":[],"param":{},"code":true}}`,
		`{"error":{"message":"sk-admin-abcdefghijklmnop sk-ab\u0000cdefghijklmnopqrstuvwx","code":"sk-\u200babcdefghijklmnopqrstuvwx"}}`,
		`{"error":"` + testKey + `"}`, `{"error":{"message":"` + testKey[:20] + `\n` + testKey[20:] + `"}}`,
		`{"error":{"message":"a\ud800b\r\n\u2028\u202e"}}`, "{\"error\":\"sk-ab\xffcdefghijklmnopqrstuvwx\"}",
		`<html>` + testKey + `</html>`, `{"error":{"message":"` + strings.Repeat("sk-abcdef ", 400) + `"}}`,
		`{"error":{"message":"` + strings.Repeat("x", 3196) + testKey + `"}}`,
		`{"Error":{"MESSAGE":"m"},"error":{"message":"n"}}`, strings.Repeat(`{"error":`, 2000),
	} {
		f.Add(uint8(0), "req_1", []byte(body))
		f.Add(uint8(29), testKey, []byte(body))
	}
	var status int
	var requestID string
	var body []byte
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["X-Request-Id"] = []string{requestID}
		w.WriteHeader(status)
		_, _ = w.Write(body)
	}))
	f.Cleanup(server.Close)
	c := pointAt(f, server.URL+"/v1")
	f.Fuzz(func(t *testing.T, offset uint8, id string, text []byte) {
		status, requestID, body = 400+int(offset)%200, id, text
		c.rateLimiter = NewRateLimiter() // a rate learned from a 429 would slow down the next input
		_, _, err := c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		e := failed(t, err)
		requireFit(t, e, testKey)
		if e.Status != 0 && e.Status != status {
			t.Fatalf("status %d became %d", status, e.Status)
		}
		for _, field := range []string{e.Message, e.Code, e.Type, e.Param, e.RequestID} {
			if utf8.RuneCountInString(field) > maxMessage+1 {
				t.Fatalf("%d characters", len(field))
			}
		}
	})
}

// If the connection of a create is closed, net/http must not send it again on another: this
// server reads every second request of a connection and closes it without an answer.
func TestCreate_IsNotRepeatedAfterAConnectionReset(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	posts := make(chan struct{}, 100)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				in := bufio.NewReader(conn)
				for n := range 2 {
					req, err := http.ReadRequest(in)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, req.Body)
					if req.Method == http.MethodPost {
						posts <- struct{}{}
					}
					if n == 0 {
						body := `{"id":"p"}`
						fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
					}
				}
			}()
		}
	}()
	c := pointAt(t, "http://"+l.Addr().String())
	for i := range 10 {
		_, err := c.GetProject(context.Background(), "p")
		require.NoError(t, err)
		_, _, err = c.CreateServiceAccount(context.Background(), "p", "n", time.Hour)
		e := failed(t, err)
		require.True(t, e.Sent && e.Ambiguous(), e)
		require.Len(t, posts, i+1)
	}
}
