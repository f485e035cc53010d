// This file owns the observation of answers: Validate and the contract test get every
// exchange that no fault changed.

package openaitest

import "net/http"

type exchange struct {
	request *http.Request // with its body unread
	route   *route
	vars    map[string]string
	status  int
	header  http.Header
	body    []byte
}

func (s *Server) addObserver(watch func(exchange)) (remove func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	id := int(s.seq)
	s.observers[id] = watch
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.observers, id)
	}
}

func (s *Server) observe(c *call, status int, header http.Header, body []byte) {
	s.mu.Lock()
	watchers := make([]func(exchange), 0, len(s.observers))
	for _, watch := range s.observers {
		watchers = append(watchers, watch)
	}
	s.mu.Unlock()
	for _, watch := range watchers {
		watch(exchange{request: c.withBody(), route: c.route, vars: c.vars, status: status, header: header.Clone(), body: body})
	}
}
