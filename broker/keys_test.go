package broker

// The lifecycle of a key on a virtual clock: each test runs in a bubble, where the
// simulator, the fake Vault and the broker share the time.

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// inMemory answers requests with a handler, without a network.
type inMemory struct {
	handler http.Handler
	vault   *fakeVault
}

func (m inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	m.vault.set(m.vault.expire)
	w := httptest.NewRecorder()
	in := r.Clone(r.Context())
	in.RequestURI = in.URL.RequestURI()
	m.handler.ServeHTTP(w, in)
	resp := w.Result()
	resp.Request = r
	return resp, nil
}

// bubble is a world without a network. Its broker is closed at the end.
func bubble(t *testing.T, setUp func(*fakeVault), change func(*Config)) *world {
	t.Helper()
	sim := openaitest.New(openaitest.Options{})
	w := prepare(t, sim, "https://api.openai.example/v1", change)
	if setUp != nil {
		setUp(w.vault)
	}
	w.b.base = inMemory{sim, w.vault}
	w.b.hosts["broker"] = true
	w.b.address = "broker"
	require.Nil(t, w.a.keys.replace(t.Context(), nil))
	t.Cleanup(func() {
		require.NoError(t, w.b.close(0))
		require.Empty(t, w.liveKeys(), "keys are left")
	})
	return w
}

// ask sends one request through the broker's handler.
func (w *world) ask() (int, string) {
	rec := httptest.NewRecorder()
	req := w.request("GET", "/v1/models", "")
	req.RequestURI, req.URL.Host, req.URL.Scheme = "/v1/models", "", ""
	w.b.ServeHTTP(rec, req)
	return rec.Code, rec.Body.String()
}

// use sends 20 requests a second and requires that all succeed.
func (w *world) use(d time.Duration) {
	w.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if status, body := w.ask(); status != 200 {
			w.t.Fatalf("after %s: %d %s", d-time.Until(end), status, body)
		}
	}
}

func TestKeys_RenewalsAndReplacementsAreInvisible(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.leaseTTL, f.leaseMax = time.Minute, 3*time.Minute }, nil)
		w.use(10 * time.Minute)
		require.Equal(t, 4, w.vault.called("openai/creds/"), "one key for 3 minutes, replaced slightly earlier")
		require.Greater(t, w.vault.called("sys/leases/renew"), 8)
		require.Len(t, w.liveKeys(), 1, "replaced keys are revoked")
		require.Zero(t, w.vault.called("sys/leases/revoke"), "Vault's default policy does not permit it")
	})
}

func TestKeys_ALeaseThatCannotBeRenewedIsReplacedAtTwoThirds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.leaseTTL, f.leaseMax = time.Minute, time.Minute }, nil)
		began := time.Now()
		first := w.liveKeys()
		for w.vault.called("openai/creds/") == 1 {
			w.use(time.Second)
		}
		require.InDelta(t, 53, time.Since(began).Seconds(), 2, "after two thirds, and two thirds of the rest")
		synctest.Wait()
		require.NotEqual(t, first, w.liveKeys())
	})
}

func TestKeys_ATokenIsReplacedBeforeItsMaximum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.tokenTTL, f.tokenMax = 2*time.Minute, 5*time.Minute }, nil)
		began := time.Now()
		for w.vault.called("auth/approle/login") == 1 {
			w.use(time.Second)
		}
		require.InDelta(t, 280, time.Since(began).Seconds(), 2, "before the maximum of 300 s")
		w.use(10 * time.Minute)
		require.Equal(t, 4, w.vault.called("auth/approle/login"), "one login in 5 minutes")
	})
}

func TestKeys_AnotherKeyIsLeasedAfterACentralRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, nil)
		for range 5 {
			w.vault.revokeAll()
			w.use(time.Second)
		}
		require.Equal(t, 6, w.vault.called("openai/creds/"))
		time.Sleep(2 * time.Hour) // without requests, the renewal detects it
		w.vault.revokeAll()
		time.Sleep(time.Hour)
		require.Len(t, w.liveKeys(), 1)
		w.use(time.Second)
	})
}

func TestKeys_WithoutVaultTheKeyLastsUntilItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.leaseTTL = 10 * time.Minute }, nil)
		began := time.Now()
		w.vault.set(func() { w.vault.down = true })
		w.use(10*time.Minute - time.Second)
		time.Sleep(2 * time.Second)
		asked := w.sim.Count("GET", "/models")
		status, body := w.ask()
		require.Equal(t, 503, status, "%s after %s", body, time.Since(began))
		require.Contains(t, body, "broker_no_key")
		time.Sleep(20 * time.Minute)
		_, _ = w.ask()
		require.Equal(t, asked, w.sim.Count("GET", "/models"), "a key is used after its expiry")
		tries := w.vault.called("")
		require.Less(t, tries, 500, "at most one call to Vault every 10 s")
		w.vault.set(func() { w.vault.down = false })
		time.Sleep(maxVaultBackoff + time.Second)
		w.use(time.Minute)
	})
}

func TestKeys_ARunningRequestKeepsItsKeyAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.leaseTTL, f.leaseMax = 30*time.Minute, 24*time.Hour; f.tokenTTL = 0 }, nil)
		held, refused := w.a.keys.take(t.Context())
		require.Nil(t, refused)
		w.a.keys.mu.Lock()
		held.final = true // as if the lease had reached its maximum
		w.a.keys.mu.Unlock()
		time.Sleep(21 * time.Minute)
		require.Len(t, w.liveKeys(), 2, "the old key serves a request")
		w.a.keys.mu.Lock()
		held.final = false
		w.a.keys.mu.Unlock()
		time.Sleep(3 * time.Hour)
		require.Len(t, w.liveKeys(), 2, "the old key is renewed meanwhile")
		w.a.keys.release(held)
		synctest.Wait()
		require.Len(t, w.liveKeys(), 1)
	})
}

func TestKeys_FreshKeysThatOpenAIRefusesArePaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, nil)
		w.b.base = inMemory{http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(401) }), w.vault}
		for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			status, _ := w.ask()
			require.Contains(t, []int{401, 503}, status)
		}
		require.Less(t, w.vault.called("openai/creds/"), 20, "1, 2, 4 up to 60 s apart")
		w.b.base = inMemory{w.sim, w.vault}
		time.Sleep(maxRefusedBackoff)
		w.use(time.Minute)
	})
}

func TestKeys_AVaultThatReturnsTheSameKeyIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, nil)
		w.vault.set(func() { w.vault.caching = true })
		w.vault.revokeAll()
		status, _ := w.ask()
		require.Equal(t, 503, status)
		require.Contains(t, w.log.String(), "caches leases")
		w.vault.set(func() { w.vault.caching = false })
	})
}

func TestKeys_AStaticRoleIsReadAgainAfterItsRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sim := openaitest.New(openaitest.Options{})
		w := prepare(t, sim, "https://api.openai.example/v1", func(c *Config) { c.Agents = []Agent{{StaticRole: "s"}} })
		w.b.base, w.b.hosts["broker"], w.b.address = inMemory{sim, w.vault}, true, "broker"
		w.vault.static, w.vault.rotation = true, 10*time.Minute
		account, firstID, _ := w.vault.create("static-1")
		require.Nil(t, w.a.keys.replace(t.Context(), nil))
		w.use(9 * time.Minute)
		require.Equal(t, 1, w.vault.called("openai/static-creds"))

		// Vault rotates the key and deletes the old one.
		second, secondID, _ := w.vault.create("static-2")
		w.vault.set(func() { sim.DeleteServiceAccount(w.vault.project, account) })
		w.use(2 * time.Minute)
		held, refused := w.a.keys.take(t.Context())
		require.Nil(t, refused)
		require.Equal(t, secondID, held.keyID)
		require.NotEqual(t, firstID, secondID)
		w.a.keys.release(held)
		time.Sleep(time.Hour)
		w.use(time.Second)
		require.NoError(t, w.b.close(0))
		require.Equal(t, []string{secondID}, w.liveKeys(), "the broker does not revoke a static role's key")
		sim.DeleteServiceAccount(w.vault.project, second)
	})
}

func TestKeys_ATokenOfSomeoneElseIsNotRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.tokens["r"] = newFakeTerm(0); f.tokenTTL = 0 }, func(c *Config) {
			c.Vault = Login{Method: "token-file", TokenFile: filepath.Join(filepath.Dir(c.Audit), "role-id")}
		})
		w.use(time.Minute)
		require.NoError(t, w.b.close(0))
		require.Zero(t, w.vault.called("auth/token/revoke-self"))
		require.Equal(t, 1, w.vault.called("sys/leases/revoke"))
		require.Empty(t, w.liveKeys())
	})
}

func TestKeys_ARejectedRevocationIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sim := openaitest.New(openaitest.Options{})
		w := prepare(t, sim, "https://api.openai.example/v1", nil)
		require.Nil(t, w.a.keys.replace(t.Context(), nil))
		w.vault.set(func() { w.vault.tokens = map[string]*fakeTerm{} }) // the token is invalid, the lease is not
		require.NoError(t, w.b.close(0))
		require.Contains(t, w.log.String(), "the key stays valid until it expires")
	})
}

func TestKeys_VaultDownAtTheEndIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, nil)
		w.vault.set(func() { w.vault.down = true })
		began := time.Now()
		err := w.b.close(0)
		require.ErrorContains(t, err, "stays valid until it expires")
		require.LessOrEqual(t, time.Since(began), closeTimeout+time.Second)
		w.vault.set(func() { w.vault.down = false })
		w.vault.revokeAll()
	})
}

// The broker's real server and transport do not cut a stream that pauses for half an hour
// before its first byte and between two.
func TestProxy_ASilentStreamIsNotCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, func(f *fakeVault) { f.leaseMax = 24 * time.Hour }, func(c *Config) { c.MaxSession = Duration(3 * time.Hour) })
		upstream, atOpenAI := pipeListener()
		server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			time.Sleep(30 * time.Minute)
			rw.Header().Set("Content-Type", "text/event-stream")
			for range 3 {
				_, _ = io.WriteString(rw, "data: x\n\n")
				_ = http.NewResponseController(rw).Flush()
				time.Sleep(30 * time.Minute)
			}
		})}
		go func() { _ = server.Serve(atOpenAI) }()
		defer server.Close()
		transport := newTransport()
		transport.Proxy = nil
		transport.DialContext = upstream
		w.b.base, w.b.upstream.Scheme = transport, "http"
		toBroker, atBroker := pipeListener()
		w.b.serve(atBroker)
		w.b.phase.Store(serving)
		w.b.hosts["broker"] = true

		client := &http.Client{Transport: &http.Transport{DialContext: toBroker}}
		req := w.request("GET", "/v1/models", "")
		req.URL.Host, req.Host = "broker", "broker"
		began := time.Now()
		resp, err := client.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		require.Equal(t, 200, resp.StatusCode)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, strings.Repeat("data: x\n\n", 3), string(body))
		require.Equal(t, 2*time.Hour, time.Since(began).Round(time.Minute))
		client.CloseIdleConnections()
		transport.CloseIdleConnections()
	})
}

// The server closes a connection with an unfinished header after ten seconds, and an idle
// one after two minutes.
func TestServer_SlowHeadersAndIdleConnectionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bubble(t, nil, nil)
		dial, listener := pipeListener()
		w.b.serve(listener)
		w.b.phase.Store(serving)
		w.b.hosts["broker"] = true
		for _, c := range []struct {
			send string
			want time.Duration
		}{
			{"", headerTimeout},
			{"GET /v1/models HTTP/1.1\r\nHost: bro", headerTimeout},
			{"GET /v1/models HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer " + w.a.token + "\r\n\r\n", idleTimeout},
		} {
			conn, err := dial(t.Context(), "", "")
			require.NoError(t, err)
			began := time.Now()
			if c.send != "" {
				_, err = io.WriteString(conn, c.send)
				require.NoError(t, err)
			}
			_, _ = io.ReadAll(conn) // until the broker closes
			require.Equal(t, c.want, time.Since(began).Round(time.Second))
		}
	})
}

// pipeListener is a listener in memory, and its dialer.
func pipeListener() (dial func(ctx context.Context, network, address string) (net.Conn, error), l net.Listener) {
	p := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		select {
		case p.conns <- theirs:
			return ours, nil
		case <-p.closed:
			return nil, net.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, p
}

type pipes struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
