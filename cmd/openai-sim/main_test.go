// These tests check the command's line on standard output, its listen address and
// its shutdown. The tests of client/openaitest check the API that it serves.

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func start(t *testing.T, args ...string) (line introduction, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	read, write := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, args, write, io.Discard)
		write.CloseWithError(io.EOF)
		ended <- err
	}()
	text, err := bufio.NewReader(read).ReadBytes('\n')
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &line))
	return line, func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(10 * time.Second):
			t.Fatal("the command does not end")
			return nil
		}
	}
}

func do(t *testing.T, method, url, key, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(text)
}

func TestCommand(t *testing.T) {
	line, stop := start(t, "-admin-key", "sk-admin-of-the-test", "-project", "one", "-project", "two")
	require.Equal(t, "sk-admin-of-the-test", line.AdminKey)
	require.NotEmpty(t, line.AdminKeyID)
	require.Len(t, line.Projects, 2)
	require.Equal(t, "two", line.Projects[1].Name)

	status, body := do(t, "GET", line.URL+"/organization/projects", line.AdminKey, "")
	require.Equal(t, 200, status)
	require.Contains(t, body, line.Projects[0].ID)

	control := strings.TrimSuffix(line.URL, "/v1") + "/_sim/"
	status, body = do(t, "POST", control+"faults", "", `{"kind":"hang","method":"POST","times":1,"delay":"1s"}`)
	require.Equal(t, 204, status, body)
	hung := make(chan struct{})
	go func() {
		defer close(hung)
		req, _ := http.NewRequest("POST", line.URL+"/organization/projects", strings.NewReader("{}"))
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
		}
	}()
	require.Eventually(t, func() bool {
		_, body := do(t, "GET", control+"requests", "", "")
		return strings.Contains(body, `"fault": "hang"`)
	}, 5*time.Second, 10*time.Millisecond)
	require.NoError(t, stop(), "a request that hangs must not hold up the end")
	<-hung
}

func TestServesHTTP2WithItsOwnCertificate(t *testing.T) {
	line, stop := start(t, "-tls")
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM([]byte(line.CACert)))
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}}
	resp, err := client.Get(line.URL + "/models")
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 401, resp.StatusCode)
	require.Equal(t, 2, resp.ProtoMajor)
	client.CloseIdleConnections()
	require.NoError(t, stop())
}

func TestListensOnLoopbackOnly(t *testing.T) {
	err := run(context.Background(), []string{"-listen", "0.0.0.0:0"}, io.Discard, io.Discard)
	require.ErrorContains(t, err, "not a loopback address")
	_, stop := start(t, "-listen", "0.0.0.0:0", "-allow-remote")
	require.NoError(t, stop())
}

func TestBadArguments(t *testing.T) {
	for _, args := range [][]string{{"-project", ""}, {"extra"}, {"-latency", "-1s"}, {"-nonsense"}} {
		require.Error(t, run(context.Background(), args, io.Discard, io.Discard), args)
	}
}
