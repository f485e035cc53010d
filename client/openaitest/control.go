// This file owns the control plane: the Server's methods over HTTP, for the simulator as a
// command. It never returns a key's value.

package openaitest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// ControlPath is the prefix of the control plane's routes.
const ControlPath = "/_sim/"

// WithControl is the simulator with its control plane:
//
//	GET    /_sim/ledger    all events
//	GET    /_sim/alive     valid accounts with their keys, and admin keys
//	GET    /_sim/requests  the request log
//	DELETE /_sim/requests  clear the request log
//	GET    /_sim/stats     connections, valid accounts, and requests by method, route and status
//	POST   /_sim/options   change the given options: {"latency":"100ms","rate_per_minute":600,"rate_burst":0,
//	                       "retry_after":false,"activation_delay":"1s"}
//	POST   /_sim/accounts  {"project_id":"proj_…","count":5000}: add accounts without a lease
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
	mux.HandleFunc("DELETE "+ControlPath+"requests", func(w http.ResponseWriter, _ *http.Request) {
		s.ResetRequests()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET "+ControlPath+"stats", func(w http.ResponseWriter, _ *http.Request) {
		controlReply(w, http.StatusOK, s.Stats())
	})
	mux.HandleFunc("POST "+ControlPath+"options", s.controlOptions)
	mux.HandleFunc("POST "+ControlPath+"accounts", s.controlAccounts)
	mux.HandleFunc("POST "+ControlPath+"faults", s.controlFail)
	mux.HandleFunc("DELETE "+ControlPath+"faults", func(w http.ResponseWriter, _ *http.Request) {
		s.ClearFaults()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST "+ControlPath+"clock", s.controlClock)
	// The mux redirects paths that are not clean, which OpenAI does not, so it gets only
	// the control plane's.
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

func (s *Server) controlOptions(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Latency         *duration `json:"latency"`
		RatePerMinute   *int      `json:"rate_per_minute"`
		RateBurst       *int      `json:"rate_burst"`
		RetryAfter      *bool     `json:"retry_after"`
		ActivationDelay *duration `json:"activation_delay"`
	}
	if !controlBody(w, r, &in) {
		return
	}
	for _, d := range []*duration{in.Latency, in.ActivationDelay} {
		if d != nil && *d < 0 {
			controlReply(w, http.StatusBadRequest, object{"error": "durations must not be negative"})
			return
		}
	}
	for _, n := range []*int{in.RatePerMinute, in.RateBurst} {
		if n != nil && *n < 0 {
			controlReply(w, http.StatusBadRequest, object{"error": "rates must not be negative"})
			return
		}
	}
	s.Configure(func(o *Options) {
		set(&o.Latency, (*time.Duration)(in.Latency))
		set(&o.RatePerMinute, in.RatePerMinute)
		set(&o.RateBurst, in.RateBurst)
		set(&o.RetryAfter, in.RetryAfter)
		set(&o.ActivationDelay, (*time.Duration)(in.ActivationDelay))
	})
	w.WriteHeader(http.StatusNoContent)
}

// set changes only the given options.
func set[T any](target, value *T) {
	if value != nil {
		*target = *value
	}
}

func (s *Server) controlAccounts(w http.ResponseWriter, r *http.Request) {
	var in struct {
		ProjectID string `json:"project_id"`
		Count     int    `json:"count"`
	}
	if !controlBody(w, r, &in) {
		return
	}
	if !s.addAccounts(in.ProjectID, in.Count) {
		controlReply(w, http.StatusBadRequest, object{"error": "project_id must name a project and count be positive"})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) addAccounts(projectID string, count int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.projects.byID[projectID]
	if p == nil || count < 1 {
		return false
	}
	for i := range count {
		s.addAccount(p, fmt.Sprintf("somebody-%d", i+1))
	}
	return true
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

// controlBody decodes a body strictly: with a mistyped fault, a test could pass for the
// wrong reason.
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
	_, _ = w.Write(answer{body: body}.encode()) // the client may have disconnected
}
