// This file owns the control plane: what a test reads and sets by calling the
// Server, over HTTP, for those who run the simulator as a command. It never
// shows a key's value.

package openaitest

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"
)

// ControlPath precedes the routes of the control plane.
const ControlPath = "/_sim/"

// WithControl is the simulator with its control plane:
//
//	GET    /_sim/ledger    all that happened
//	GET    /_sim/alive     accounts with their keys, and admin keys
//	GET    /_sim/requests  the log of requests
//	POST   /_sim/faults    install a Fault: {"kind":"status","method":"POST","route":"/organization/*","times":2,
//	                       "skip":0,"probability":0,"status":503,"body":"","header":{"Retry-After":["1"]},
//	                       "message":"","code":"","delay":"1s"}
//	DELETE /_sim/faults    remove all faults
//	POST   /_sim/clock     {"advance":"10m"}
//
// It has no authentication: serve it on loopback.
func (s *Server) WithControl() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+ControlPath+"ledger", func(w http.ResponseWriter, _ *http.Request) {
		controlReply(w, http.StatusOK, s.Ledger())
	})
	mux.HandleFunc("GET "+ControlPath+"alive", func(w http.ResponseWriter, _ *http.Request) {
		controlReply(w, http.StatusOK, object{"service_accounts": s.Accounts(), "admin_api_keys": s.AdminKeys()})
	})
	mux.HandleFunc("GET "+ControlPath+"requests", func(w http.ResponseWriter, _ *http.Request) {
		controlReply(w, http.StatusOK, s.Requests())
	})
	mux.HandleFunc("POST "+ControlPath+"faults", s.controlFail)
	mux.HandleFunc("DELETE "+ControlPath+"faults", func(w http.ResponseWriter, _ *http.Request) {
		s.ClearFaults()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST "+ControlPath+"clock", s.controlClock)
	// The mux redirects paths that it finds untidy, which OpenAI's do not; so it
	// sees its own only.
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, ControlPath) {
			mux.ServeHTTP(w, r)
			return
		}
		s.ServeHTTP(w, r)
	})
}

// duration reads "1m30s" from JSON.
type duration time.Duration

func (d *duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = duration(parsed)
	return err
}

func (s *Server) controlFail(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Method      string      `json:"method"`
		Route       string      `json:"route"`
		Times       int         `json:"times"`
		Skip        int         `json:"skip"`
		Probability float64     `json:"probability"`
		Kind        FaultKind   `json:"kind"`
		Status      int         `json:"status"`
		Body        string      `json:"body"`
		Header      http.Header `json:"header"`
		Message     string      `json:"message"`
		Code        string      `json:"code"`
		Delay       duration    `json:"delay"`
	}
	if !controlBody(w, r, &in) {
		return
	}
	f := Fault{
		Method: in.Method, Route: in.Route, Times: in.Times, Skip: in.Skip, Probability: in.Probability,
		Kind: in.Kind, Status: in.Status, Body: in.Body, Header: in.Header, Message: in.Message, Code: in.Code,
		Delay: time.Duration(in.Delay),
	}
	if err := f.check(); err != nil {
		controlReply(w, http.StatusBadRequest, object{"error": err.Error()})
		return
	}
	s.Fail(f)
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) controlClock(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Advance duration `json:"advance"`
	}
	if !controlBody(w, r, &in) {
		return
	}
	s.Advance(time.Duration(in.Advance))
	controlReply(w, http.StatusOK, object{"now": s.Now()})
}

// controlBody reads a body strictly: a mistyped fault that does nothing would
// make a test pass for the wrong reason.
func controlBody(w http.ResponseWriter, r *http.Request, target any) bool {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(target); err != nil {
		controlReply(w, http.StatusBadRequest, object{"error": err.Error()})
		return false
	}
	return true
}

func controlReply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(answer{body: body}.encode()) // a client that is gone is not our problem
}
