package client

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// diary is an observer that records its calls.
type diary struct {
	mu    sync.Mutex
	lines []string
}

func (d *diary) write(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

func (d *diary) Began(call string, _ time.Duration)             { d.write("%s began", call) }
func (d *diary) Ended(call string, status int, _ time.Duration) { d.write("%s ended %d", call, status) }
func (d *diary) Throttled(call string, heldBack bool)           { d.write("%s throttled %t", call, heldBack) }
func (d *diary) Repeated(call string)                           { d.write("%s repeated", call) }

func TestObserver_GetsEachAttempt(t *testing.T) {
	t.Parallel()
	sim := simulate(t, openaitest.Options{})
	d := &diary{}
	c := connect(t, sim, func(o *Options) { o.Observer = d })
	sim.Fail(openaitest.Fault{Times: 1})
	sim.Fail(openaitest.Fault{Times: 1, Kind: openaitest.FaultEmptyObject})
	sim.Fail(openaitest.Fault{Times: 1, Status: http.StatusTooManyRequests})
	_, err := c.ListProjects(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{
		"list_projects began", "list_projects ended 500", "list_projects repeated",
		"list_projects began", "list_projects ended 0", "list_projects repeated",
		"list_projects began", "list_projects throttled false", "list_projects ended 429", "list_projects repeated",
		"list_projects began", "list_projects ended 200",
	}, d.lines)

	// A limit that does not end with time is not throttling.
	d.lines = nil
	sim.Fail(openaitest.Fault{Times: 1, Status: http.StatusTooManyRequests, Code: "project_spend_limit_exceeded"})
	_, err = c.ListProjects(t.Context())
	require.Error(t, err)
	require.Equal(t, []string{"list_projects began", "list_projects ended 429"}, d.lines)
}
