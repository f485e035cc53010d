// Package parent ends this process when the server that started it has ended. A
// server that is killed ends none of its plugins, and each of them holds an admin key.
//
// What must stay true: a plugin whose server runs is never ended. The parent's end is
// that of the process, not of the thread that started the plugin: Go's threads come
// and go. A parent of 0 or 1 is no server but the init of a container or of the
// system, and there only the server's connections count.
package parent

import (
	"context"
	"os"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/stats"
)

const (
	// disconnected is how long the server may be without a connection: it keeps one
	// for as long as it uses the plugin.
	disconnected = 30 * time.Second
	// unconnected is how long it may take to connect first. Vault gives up after one
	// minute.
	unconnected = 2 * time.Minute
	// look is the time between two looks at the parent's ID, where the system offers
	// nothing better.
	look = time.Second
)

// Watch calls end, once, when the server has ended. It returns the handler that counts
// the server's connections.
func Watch(end func()) *Connections {
	end = sync.OnceFunc(end)
	parent := os.Getppid()
	if parent <= 1 || runtime.GOOS == "windows" { // where a process keeps the ID of a parent that has ended
		return newConnections(end)
	}
	go func() {
		wait(parent)
		end()
	}()
	return &Connections{}
}

// poll returns when the parent has ended, which gives the process another one.
func poll(parent int) {
	for os.Getppid() == parent {
		time.Sleep(look)
	}
}

// Connections counts those to this process. It implements stats.Handler.
type Connections struct {
	end func() // nil where the parent's end is seen otherwise

	mu    sync.Mutex
	open  int
	timer *time.Timer // runs while none is open
}

func newConnections(end func()) *Connections {
	c := &Connections{end: end}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expect(unconnected)
	return c
}

// expect has the process end unless there is a connection within d.
func (c *Connections) expect(d time.Duration) {
	c.timer = time.AfterFunc(d, func() {
		c.mu.Lock()
		none := c.open == 0
		c.mu.Unlock()
		if none {
			c.end()
		}
	})
}

// HandleConn implements stats.Handler.
func (c *Connections) HandleConn(_ context.Context, s stats.ConnStats) {
	if c.end == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer.Stop()
	switch s.(type) {
	case *stats.ConnBegin:
		c.open++
	case *stats.ConnEnd:
		if c.open--; c.open == 0 {
			c.expect(disconnected)
		}
	}
}

// TagConn implements stats.Handler.
func (*Connections) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// TagRPC implements stats.Handler.
func (*Connections) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler.
func (*Connections) HandleRPC(context.Context, stats.RPCStats) {}
