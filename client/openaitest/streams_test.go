package openaitest

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestStreams_EventsArriveApart(t *testing.T) {
	s := start(t, Options{StreamDelay: 50 * time.Millisecond})
	_, _, key := newAccount(t, s, s.AddProject("p"), object{"name": "a"})
	req, err := http.NewRequest("POST", s.URL()+"/responses", strings.NewReader(`{"model":"m","stream":true}`))
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, "text/event-stream", resp.Header.Get("Content-Type"))
	var at []time.Time
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "data: ") {
			at = append(at, time.Now())
		}
	}
	require.Len(t, at, streamEvents+1)
	require.Greater(t, at[streamEvents-1].Sub(at[0]), 50*time.Millisecond)
}

func TestStreams_SocketsEchoForAKey(t *testing.T) {
	s := start(t, Options{})
	_, _, key := newAccount(t, s, s.AddProject("p"), object{"name": "a"})
	at, err := url.Parse(s.URL())
	require.NoError(t, err)
	for _, path := range []string{"/v1/realtime?model=m", "/v1/responses"} {
		_, status, err := DialWebSocket(at.Host, path, http.Header{"Authorization": {"Bearer wrong"}})
		require.Error(t, err)
		require.Equal(t, 401, status)
		ws, _, err := DialWebSocket(at.Host, path, http.Header{"Authorization": {"Bearer " + key}, "Sec-Websocket-Protocol": {"realtime, other"}})
		require.NoError(t, err)
		require.Equal(t, "realtime", ws.Header.Get("Sec-WebSocket-Protocol"))
		for _, text := range []string{"hello", strings.Repeat("x", 300)} {
			require.NoError(t, ws.Write(text))
			got, err := ws.Read()
			require.NoError(t, err)
			require.Equal(t, text, got)
		}
		require.NoError(t, ws.Close())
	}
	require.Equal(t, 404, send(t, s, key, "GET", "/realtime", nil).status)
}

func TestStreams_UploadsAreCountedWhateverTheirSize(t *testing.T) {
	s := start(t, Options{})
	_, _, key := newAccount(t, s, s.AddProject("p"), object{"name": "a"})
	req, err := http.NewRequest("POST", s.URL()+"/files", io.LimitReader(zeros{}, 5<<20))
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.True(t, bytes.Contains(body, []byte(`"bytes": 5242880`)), string(body))
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

func TestStreams_MintedSecretsAreSearchedFor(t *testing.T) {
	s := start(t, Options{})
	_, _, key := newAccount(t, s, s.AddProject("p"), object{"name": "a"})
	for _, path := range []string{"/realtime/client_secrets", "/realtime/translations/client_secrets", "/realtime/sessions", "/realtime/transcription_sessions", "/chatkit/sessions"} {
		value := send(t, s, key, "POST", path, object{}).text(t, "value")
		require.Contains(t, s.Secrets(), value, path)
	}
}
