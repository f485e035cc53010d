package main

// The figures in docs/broker.md, measured in one run against a bare
// httputil.ReverseProxy. Each time is the best of several rounds, to exclude the
// delays of a busy machine.

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// started is a running broker in front of an upstream.
type started struct {
	t       *testing.T
	cmd     *exec.Cmd
	address string
	token   string
	client  *http.Client
}

func startBroker(t *testing.T, upstream string) *started {
	t.Helper()
	v := startVault(t)
	dir := t.TempDir()
	binary := filepath.Join(dir, "openai-broker")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	config := filepath.Join(dir, "broker.json")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `{"upstream":%q,"drain":"0s","audit":%q,"agents":[{"role":"r","token_file":%q}]}`,
		upstream+"/v1", filepath.Join(dir, "audit.json"), filepath.Join(dir, "token")), 0o600))
	s := &started{t: t, cmd: exec.CommandContext(t.Context(), binary, "serve", "-config", config)}
	s.cmd.Env = []string{"VAULT_ADDR=" + v.URL, "VAULT_TOKEN=x"}
	errOut, err := s.cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() {
		_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		_ = s.cmd.Wait()
	})
	lines := bufio.NewScanner(errOut)
	for s.address == "" && lines.Scan() {
		if _, after, found := strings.Cut(lines.Text(), "address="); found {
			s.address, _, _ = strings.Cut(after, " ")
		}
	}
	require.NotEmpty(t, s.address)
	go func() {
		for lines.Scan() { // drain stderr, so that the broker does not block
		}
	}()
	token, err := os.ReadFile(filepath.Join(dir, "token"))
	require.NoError(t, err)
	s.token = strings.TrimSpace(string(token))
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	return s
}

func (s *started) request(method, address, path string, body io.Reader) *http.Request {
	req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+address+path, body)
	require.NoError(s.t, err)
	req.Header.Set("Authorization", "Bearer "+s.token)
	req.Header.Set("Content-Type", "application/json")
	return req
}

// memory returns a value of the broker's /proc/<pid>/status, in MiB.
func (s *started) memory(line string) float64 {
	s.t.Helper()
	if runtime.GOOS != "linux" {
		s.t.Skip("NOT TESTED: memory, which /proc tells")
	}
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	require.NoError(s.t, err)
	_, after, found := strings.Cut(string(content), line+":")
	require.True(s.t, found)
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	require.NoError(s.t, err)
	return float64(kib) / 1024
}

func TestFigures_AnUploadOf100MB(t *testing.T) {
	var got int64
	upstream := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got, _ = io.Copy(io.Discard, r.Body) }))
	defer upstream.Close()
	s := startBroker(t, upstream.URL)
	const size = 100 << 20
	req := s.request(http.MethodPost, s.address, "/v1/files", io.LimitReader(zeros{}, size))
	req.ContentLength = size
	resp, err := s.client.Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.EqualValues(t, size, got)
	peak := s.memory("VmHWM")
	t.Logf("100 MB upload: peak memory %.1f MiB", peak)
	require.Less(t, peak, 32.0)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

func TestFigures_TheFirstByteOfAStream(t *testing.T) {
	sent := make(chan time.Time, 1)
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, "data: x\n\n")
		sent <- time.Now()
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done() // the stream stays open
	}))
	defer upstream.Close()
	s := startBroker(t, upstream.URL)
	best := time.Hour
	for range 20 {
		resp, err := s.client.Do(s.request(http.MethodPost, s.address, "/v1/responses", strings.NewReader(`{"model":"m","stream":true}`)))
		require.NoError(t, err)
		_, err = resp.Body.Read(make([]byte, 1))
		require.NoError(t, err)
		best = min(best, time.Since(<-sent))
		require.NoError(t, resp.Body.Close())
	}
	t.Logf("first byte of a stream: %s after upstream's", best)
	require.Less(t, best, 50*time.Millisecond)
}

func TestFigures_OverheadAndThroughputBesideABareReverseProxy(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, `{"ok":true}`)
	}))
	defer upstream.Close()
	s := startBroker(t, upstream.URL)
	direct, bare := strings.TrimPrefix(upstream.URL, "http://"), startBare(t, upstream.URL)
	body := `{"model":"gpt-5-mini","input":"` + strings.Repeat("x", 1000) + `"}`
	call := func(address string) time.Duration {
		began := time.Now()
		resp, err := s.client.Do(s.request(http.MethodPost, address, "/v1/responses", strings.NewReader(body)))
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%v %v", resp, err)
			return 0
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		return time.Since(began)
	}
	median := func(address string) time.Duration {
		times := make([]time.Duration, 300)
		for i := range times {
			times[i] = call(address)
		}
		slices.Sort(times)
		return times[len(times)/2]
	}
	perSecond := func(address string) float64 {
		const workers, each = 16, 60
		began := time.Now()
		var wait sync.WaitGroup
		for range workers {
			wait.Go(func() {
				for range each {
					call(address)
				}
			})
		}
		wait.Wait()
		return workers * each / time.Since(began).Seconds()
	}
	alone, through, beside, ours, theirs := time.Hour, time.Hour, time.Hour, 0.0, 0.0
	for range 5 {
		alone, beside, through = min(alone, median(direct)), min(beside, median(bare)), min(through, median(s.address))
		theirs, ours = max(theirs, perSecond(bare)), max(ours, perSecond(s.address))
	}
	t.Logf("median: direct %s, bare ReverseProxy %s, broker %s (%s more than the bare one); with 16 clients: %.0f requests a second, bare %.0f",
		alone, beside, through, through-beside, ours, theirs)
	require.Less(t, through-beside, 300*time.Microsecond)
}

// startBare starts a ReverseProxy in a separate process, like the broker.
func startBare(t *testing.T, upstream string) (address string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asBareProxy+"="+upstream)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	address, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	return strings.TrimSpace(address)
}

func bareProxy(upstream string) {
	at, err := url.Parse(upstream)
	if err != nil {
		panic(err)
	}
	server := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite:   func(pr *httputil.ProxyRequest) { pr.SetURL(at) },
		Transport: &http.Transport{MaxIdleConnsPerHost: 64}, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
	})
	fmt.Println(server.Listener.Addr())
	select {} // until it is killed
}

// 10,000 connections that send nothing use memory for ten seconds, and the broker
// still serves others.
func TestFigures_IdleConnections(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()
	s := startBroker(t, upstream.URL)
	var limit syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	n := min(10_000, int(limit.Cur)-500)
	conns := make([]net.Conn, 0, n)
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range n {
		c, err := net.Dial("tcp", s.address)
		require.NoError(t, err)
		conns = append(conns, c)
	}
	resp, err := s.client.Do(s.request(http.MethodGet, s.address, "/v1/models", http.NoBody))
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusOK, resp.StatusCode)
	t.Logf("%d idle connections: %.0f MiB", n, s.memory("VmRSS"))
	for _, c := range []net.Conn{conns[0], conns[n-1]} {
		require.NoError(t, c.SetReadDeadline(time.Now().Add(2*time.Minute)))
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF, "the broker did not close it")
	}
}
