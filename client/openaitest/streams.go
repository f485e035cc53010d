// This file owns what the inference side does over time: server-sent events,
// WebSockets and uploads, and the endpoints that create other secrets.

package openaitest

import (
	"bufio"
	"crypto/sha1" // the handshake of RFC 6455, no protection
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// streamEvents is the number of events that a streamed response has.
const streamEvents = 3

var streamRoutes = []*route{
	upload(http.MethodPost, "/files", (*Server).createFile, "api.files.write"),
	upload(http.MethodPost, "/uploads/{upload_id}/parts", (*Server).createFile, "api.files.write"),
	inference(http.MethodGet, "/realtime", (*Server).openSocket, "api.model.request", "model.request"),
	inference(http.MethodGet, "/responses", (*Server).openSocket, "api.responses.write"),
	inference(http.MethodPost, "/realtime/client_secrets", (*Server).createSecret, "api.model.request", "model.request"),
	inference(http.MethodPost, "/realtime/translations/client_secrets", (*Server).createSecret, "api.model.request", "model.request"),
	inference(http.MethodPost, "/realtime/sessions", (*Server).createSecret, "api.model.request", "model.request"),
	inference(http.MethodPost, "/realtime/transcription_sessions", (*Server).createSecret, "api.model.request", "model.request"),
	inference(http.MethodPost, "/chatkit/sessions", (*Server).createSecret, "api.model.request", "model.request"),
}

// upload is a route whose body is counted and not kept.
func upload(method, template string, handle func(*Server, *call) answer, scopes ...string) *route {
	rt := inference(method, template, handle, scopes...)
	rt.discard = true
	return rt
}

// createFile answers with the number of bytes that arrived, framing included.
func (s *Server) createFile(c *call) answer {
	return ok(object{
		"id": "file-" + alnum(24), "object": "file", "bytes": c.size, "created_at": c.now.Unix(),
		"filename": "upload", "purpose": "user_data",
	})
}

// createSecret creates a secret that opens sessions without the key.
func (s *Server) createSecret(c *call) answer {
	value := "ek_" + randomHex(24)
	s.idByValue[value] = "ephemeral"
	return ok(object{"value": value, "client_secret": value, "expires_at": c.now.Add(10 * time.Minute).Unix()})
}

// openSocket upgrades the connection. A request without Upgrade is the plain
// GET of the same path, which the simulator does not have.
func (s *Server) openSocket(c *call) answer {
	if !strings.EqualFold(c.r.Header.Get("Upgrade"), "websocket") {
		return fail(http.StatusNotFound, "unknown_url", "", "Invalid URL ("+c.r.Method+" "+c.r.URL.Path+")")
	}
	sum := sha1.Sum([]byte(c.r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	header := http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Accept": {base64.StdEncoding.EncodeToString(sum[:])},
	}
	for _, protocol := range strings.Split(c.r.Header.Get("Sec-Websocket-Protocol"), ",") {
		if strings.TrimSpace(protocol) == "realtime" {
			header.Set("Sec-Websocket-Protocol", "realtime")
		}
	}
	return answer{status: http.StatusSwitchingProtocols, header: header}
}

// streamed says whether the caller asked for server-sent events.
func (c *call) streamed() bool {
	var body struct {
		Stream bool `json:"stream"`
	}
	return json.Unmarshal(c.body, &body) == nil && body.Stream
}

// stream sends an answer as events, StreamDelay apart.
func (s *Server) stream(w http.ResponseWriter, c *call, ans answer) {
	s.mu.Lock()
	delay := s.opts.StreamDelay
	s.mu.Unlock()
	s.head(w, c, ans)
	w.Header().Set("Content-Type", "text/event-stream")
	s.done(c, ans.status)
	w.WriteHeader(ans.status)
	flush := http.NewResponseController(w).Flush
	for i := range streamEvents {
		if i > 0 {
			s.pause(delay)
		}
		if _, err := fmt.Fprintf(w, "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"sequence_number\":%d,\"delta\":\"Hello\"}\n\n", i); err != nil || flush() != nil {
			return // the client left
		}
	}
	last, _ := json.Marshal(object{"type": "response.completed", "response": ans.body}) // built from maps and strings
	_, _ = fmt.Fprintf(w, "event: response.completed\ndata: %s\n\n", last)
}

// upgrade answers the handshake and then every text message with the same text,
// until one side closes.
func (s *Server) upgrade(w http.ResponseWriter, c *call, ans answer) {
	s.head(w, c, ans)
	w.Header().Del("Content-Type")
	s.done(c, ans.status)
	w.WriteHeader(ans.status)
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	socket := &WebSocket{conn: conn, r: buffered.Reader}
	defer func() { _ = socket.Close() }()
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-s.closing:
			_ = socket.Close()
		case <-ended:
		}
	}()
	for {
		text, err := socket.Read()
		if err != nil || socket.Write(text) != nil {
			return
		}
	}
}

// WebSocket is enough of RFC 6455 for short text messages. It is safe for one
// reader and one writer.
type WebSocket struct {
	Header http.Header // of the handshake's answer

	conn   net.Conn
	r      *bufio.Reader
	client bool // masks what it writes
	close  sync.Once
}

// DialWebSocket connects to ws://host/path with a header of the caller's, and
// returns the status of the handshake's answer.
func DialWebSocket(address, path string, header http.Header) (*WebSocket, int, error) {
	conn, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return nil, 0, err
	}
	req, err := http.NewRequest(http.MethodGet, "http://"+address+path, http.NoBody)
	if err != nil {
		return nil, 0, errors.Join(err, conn.Close())
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "websocket")
	req.Header.Set("Sec-WebSocket-Version", "13")
	req.Header.Set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
	r := bufio.NewReader(conn)
	if err := req.Write(conn); err != nil {
		return nil, 0, errors.Join(err, conn.Close())
	}
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, 0, errors.Join(err, conn.Close())
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		body, _ := io.ReadAll(resp.Body) // what there is of it
		return nil, resp.StatusCode, errors.Join(fmt.Errorf("no WebSocket: status %d: %s", resp.StatusCode, body), conn.Close())
	}
	return &WebSocket{Header: resp.Header, conn: conn, r: r, client: true}, resp.StatusCode, nil
}

// Close closes the connection without a closing handshake.
func (ws *WebSocket) Close() (err error) {
	ws.close.Do(func() { err = ws.conn.Close() })
	return err
}

// Write sends a text message of at most 65535 bytes.
func (ws *WebSocket) Write(text string) error {
	frame := []byte{0x81}
	mask := byte(0)
	if ws.client {
		mask = 0x80
	}
	if n := len(text); n < 126 {
		frame = append(frame, mask|byte(n))
	} else {
		frame = binary.BigEndian.AppendUint16(append(frame, mask|126), uint16(n))
	}
	payload := []byte(text)
	if ws.client {
		key := []byte{1, 2, 3, 4} // a mask protects proxies from browsers, and there is neither here
		frame = append(frame, key...)
		for i := range payload {
			payload[i] ^= key[i%4]
		}
	}
	_, err := ws.conn.Write(append(frame, payload...))
	return err
}

// Read returns the next text message. A close frame is io.EOF.
func (ws *WebSocket) Read() (string, error) {
	var head [2]byte
	if _, err := io.ReadFull(ws.r, head[:]); err != nil {
		return "", err
	}
	if head[0]&0x0f == 8 {
		return "", io.EOF
	}
	n := int(head[1] & 0x7f)
	if n == 126 {
		var long [2]byte
		if _, err := io.ReadFull(ws.r, long[:]); err != nil {
			return "", err
		}
		n = int(binary.BigEndian.Uint16(long[:]))
	}
	var key [4]byte
	if head[1]&0x80 != 0 {
		if _, err := io.ReadFull(ws.r, key[:]); err != nil {
			return "", err
		}
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(ws.r, payload); err != nil {
		return "", err
	}
	for i := range payload {
		payload[i] ^= key[i%4]
	}
	return string(payload), nil
}
