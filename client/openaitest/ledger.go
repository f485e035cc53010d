// This file owns the views for tests: the ledger of all events of a credential, the request
// log, the valid accounts and keys, and the leak check.

package openaitest

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// The events of the ledger.
const (
	EventCreated  = "created"
	EventDeleted  = "deleted" // by a call, or with its account or project
	EventExpired  = "expired"
	EventUpdated  = "updated"
	EventArchived = "archived" // projects only
)

// The kinds of objects in the ledger.
const (
	KindAccount  = "service_account"
	KindKey      = "api_key"
	KindAdminKey = "admin_api_key"
	KindProject  = "project"
)

// Entry is one event in the ledger. RequestID is empty for a test's own changes and for an
// expiry, whose At is the time of expiry.
type Entry struct {
	At        time.Time `json:"at"`
	Event     string    `json:"event"`
	Kind      string    `json:"kind"`
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	ProjectID string    `json:"project_id,omitempty"`
	RequestID string    `json:"request_id,omitempty"`
}

// Request is one request that reached the simulator. Status is 0 until it is answered, and
// stays 0 if a fault prevents the answer. AuthKeyID is the ID of the key that was sent,
// even if it is invalid.
type Request struct {
	At         time.Time `json:"at"`
	Method     string    `json:"method"`
	Path       string    `json:"path"`
	Route      string    `json:"route"` // template without /v1; "" if unknown
	Status     int       `json:"status"`
	Fault      FaultKind `json:"fault,omitempty"`
	UserAgent  string    `json:"user_agent"`
	AuthKeyID  string    `json:"auth_key_id"`
	RequestID  string    `json:"request_id"`
	RemoteAddr string    `json:"remote_addr"`
}

// Account is a service account that exists, with its valid keys.
type Account struct {
	ProjectID string    `json:"project_id"`
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Role      string    `json:"role"`
	CreatedAt time.Time `json:"created_at"`
	Keys      []Key     `json:"keys"`
}

// Key is a project key that is neither deleted nor expired.
type Key struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	AccountID string    `json:"account_id"`
	ProjectID string    `json:"project_id"`
	Scopes    []string  `json:"scopes,omitempty"` // empty for all
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at,omitzero"` // zero = never
	Value     string    `json:"-"`
}

// AdminKey is an admin key that is neither deleted nor expired.
type AdminKey struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at,omitzero"` // zero = never
	Value     string    `json:"-"`
}

func (s *Server) record(event, kind, id, name, projectID, requestID string) {
	s.ledger = append(s.ledger, Entry{
		At: s.now(), Event: event, Kind: kind, ID: id, Name: name, ProjectID: projectID, RequestID: requestID,
	})
}

// Ledger returns all events, in the order in which they were recorded.
func (s *Server) Ledger() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	return slices.Clone(s.ledger)
}

// Secrets returns every key value that the simulator generated or was given, including
// those whose answer was lost.
func (s *Server) Secrets() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.idByValue))
}

// Requests returns the request log, in order of arrival.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Request, len(s.requests))
	for i, r := range s.requests {
		out[i] = *r
	}
	return out
}

// ResetRequests clears the request log.
func (s *Server) ResetRequests() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = nil
}

// Count returns how many requests reached the simulator for a method and a route template
// (without /v1), "" for any, including those with a fault or over the rate limit.
func (s *Server) Count(method, route string) int {
	n := 0
	for _, r := range s.Requests() {
		if (method == "" || r.Method == method) && (route == "" || r.Route == route) {
			n++
		}
	}
	return n
}

// Stats are the totals of a run.
type Stats struct {
	Connections int     `json:"connections"` // accepted since the start
	Accounts    int     `json:"accounts"`    // service accounts that exist
	Calls       []Calls `json:"calls"`       // since the request log was cleared
}

// Calls counts the requests with the same method, route and status, as in Request.
type Calls struct {
	Method string `json:"method"`
	Route  string `json:"route"`
	Status int    `json:"status"`
	Count  int    `json:"count"`
}

// Stats returns the current totals.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{Connections: s.Connections(), Calls: []Calls{}}
	for _, p := range s.projects.list {
		st.Accounts += len(p.accounts.list)
	}
	counts := map[Calls]int{}
	for _, r := range s.requests {
		counts[Calls{Method: r.Method, Route: r.Route, Status: r.Status}]++
	}
	for c, n := range counts {
		c.Count = n
		st.Calls = append(st.Calls, c)
	}
	slices.SortFunc(st.Calls, func(a, b Calls) int {
		return cmp.Or(strings.Compare(a.Route, b.Route), strings.Compare(a.Method, b.Method), cmp.Compare(a.Status, b.Status))
	})
	return st
}

// Accounts returns all service accounts, oldest first within each project.
func (s *Server) Accounts() []Account {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	out := []Account{}
	for _, p := range s.projects.list {
		keys := map[*account][]Key{}
		for _, k := range p.keys.list {
			if k.alive(now) {
				keys[k.account] = append(keys[k.account], k.view())
			}
		}
		for _, a := range p.accounts.list {
			out = append(out, Account{ProjectID: p.id, ID: a.id, Name: a.name, Role: a.role, CreatedAt: a.createdAt, Keys: keys[a]})
		}
	}
	return out
}

// Keys returns all valid project keys.
func (s *Server) Keys() []Key {
	out := []Key{}
	for _, a := range s.Accounts() {
		out = append(out, a.Keys...)
	}
	return out
}

func (k *apiKey) view() Key {
	return Key{
		ID: k.id, Name: k.name, AccountID: k.account.id, ProjectID: k.account.project.id,
		Scopes: slices.Clone(k.scopes), CreatedAt: k.createdAt, ExpiresAt: k.expiresAt, Value: k.value,
	}
}

// AdminKeys returns all valid admin keys, oldest first.
func (s *Server) AdminKeys() []AdminKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	out := []AdminKey{}
	for _, k := range s.adminKeys.list {
		if k.alive(now) {
			out = append(out, AdminKey{ID: k.id, Name: k.name, CreatedAt: k.createdAt, ExpiresAt: k.expiresAt, Value: k.value})
		}
	}
	return out
}

// Keep excludes accounts, keys and admin keys from the leak check, by ID. An account's keys
// must be kept separately.
func (s *Server) Keep(ids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		s.kept[id] = true
	}
}

// KeepAll disables the leak check.
func (s *Server) KeepAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keepAll = true
}

// Leaks returns one line for each leak: a valid account, key or admin key that was created
// over HTTP and not kept. The keys of a leaked account are part of its line.
func (s *Server) Leaks() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keepAll {
		return nil
	}
	now := s.now()
	leaked := func(e *entity) bool { return e.overHTTP && !s.kept[e.id] }
	var out []string
	for _, p := range s.projects.list {
		for _, a := range p.accounts.list {
			if leaked(&a.entity) {
				out = append(out, fmt.Sprintf("service account %s %q in project %s (%s)", a.id, a.name, p.name, describe(a.keys, now)))
			}
		}
		for _, k := range p.keys.list {
			if k.alive(now) && leaked(&k.entity) && !leaked(&k.account.entity) {
				out = append(out, fmt.Sprintf("key %s %q of service account %s %q in project %s", k.id, k.name, k.account.id, k.account.name, p.name))
			}
		}
	}
	for _, k := range s.adminKeys.list {
		if k.alive(now) && leaked(&k.entity) {
			out = append(out, fmt.Sprintf("admin key %s %q", k.id, k.name))
		}
	}
	return out
}

func describe(keys []*apiKey, now time.Time) string {
	var live []string
	for _, k := range keys {
		if k.alive(now) {
			live = append(live, k.id)
		}
	}
	if len(live) == 0 {
		return "no live key"
	}
	return "live keys: " + strings.Join(live, ", ")
}
