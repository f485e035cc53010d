package parent

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/stats"
)

// The test starts itself twice: a server, and the plugin that it starts.
const envRole = "TEST_PARENT_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(envRole); role {
	case "":
		os.Exit(m.Run())
	case "server":
		serveAsTest()
	default:
		pluginAsTest(role)
	}
}

// serveAsTest starts the plugin from a thread that ends, prints the plugin's process ID,
// and runs until it is killed.
func serveAsTest() {
	plugin := exec.Command(os.Args[0])
	plugin.Env = append(os.Environ(), envRole+"="+os.Getenv("TEST_PARENT_WAIT"))
	plugin.Stdin = os.Stdin
	plugin.Stdout = os.Stdout
	started := make(chan struct{})
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with this function
		if err := plugin.Start(); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		close(started)
	}()
	<-started
	time.Sleep(100 * time.Millisecond)
	fmt.Println("started", plugin.Process.Pid)
	select {}
}

func pluginAsTest(how string) {
	end := func() { os.Exit(0) }
	if how == "poll" {
		parent := os.Getppid()
		go func() { poll(parent); end() }()
	} else {
		Watch(end)
	}
	select {}
}

// The plugin ends within two seconds after its server is killed, but not when the thread
// that started it ends.
func TestWatch_EndsWithTheParentAndNotWithItsThread(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"watch", "poll"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			server := exec.Command(os.Args[0])
			server.Env = append(os.Environ(), envRole+"=server", "TEST_PARENT_WAIT="+how)
			out, err := server.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, server.Start())
			line, err := bufio.NewReader(out).ReadString('\n')
			require.NoError(t, err)
			pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "started ")))
			require.NoError(t, err, line)
			time.Sleep(2 * look)
			require.True(t, runs(pid), "the plugin outlives the thread that started it")

			require.NoError(t, server.Process.Kill())
			killed := time.Now()
			_ = server.Wait()
			for runs(pid) {
				if time.Since(killed) > 10*time.Second {
					_ = syscall.Kill(pid, syscall.SIGKILL)
					t.Fatal("the plugin outlives its server")
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Logf("ended %s after its server", time.Since(killed))
		})
	}
}

// runs reports whether a process runs. A process that has ended may remain as a zombie.
func runs(pid int) bool {
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		_, state, _ := strings.Cut(string(stat), ") ")
		return !strings.HasPrefix(state, "Z")
	}
	return syscall.Kill(pid, 0) == nil
}

func TestConnections_TheProcessEndsHalfAMinuteAfterTheLast(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		happens func(c *Connections)
		after   time.Duration // 0 = the process continues
	}{
		"no connection":                  {func(*Connections) {}, unconnected},
		"a late first connection":        {func(c *Connections) { time.Sleep(unconnected - time.Second); c.begin() }, 0},
		"one open connection":            {func(c *Connections) { c.begin() }, 0},
		"the only connection closes":     {func(c *Connections) { c.begin(); c.closed() }, disconnected},
		"one of two connections closes":  {func(c *Connections) { c.begin(); c.begin(); c.closed() }, 0},
		"both connections close":         {func(c *Connections) { c.begin(); c.begin(); c.closed(); time.Sleep(time.Minute); c.closed() }, time.Minute + disconnected},
		"another connection in time":     {func(c *Connections) { c.begin(); c.closed(); time.Sleep(disconnected - time.Second); c.begin() }, 0},
		"another connection that closes": {func(c *Connections) { c.begin(); c.closed(); time.Sleep(20 * time.Second); c.begin(); c.closed() }, 20*time.Second + disconnected},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began, ends := time.Now(), 0
				var ended time.Time
				connections := newConnections(func() { ends++; ended = time.Now() })
				c.happens(connections)
				time.Sleep(time.Hour)
				synctest.Wait()
				if c.after == 0 {
					require.Zero(t, ends)
					return
				}
				require.Equal(t, 1, ends)
				require.Equal(t, c.after, ended.Sub(began))
			})
		})
	}
}

// If the process watches its parent, connections do not matter.
func TestConnections_CountForNothingWhereTheParentIsTheServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(*testing.T) {
		c := &Connections{}
		c.begin()
		c.closed()
		time.Sleep(time.Hour)
	})
}

func (c *Connections) begin()  { c.HandleConn(context.Background(), &stats.ConnBegin{}) }
func (c *Connections) closed() { c.HandleConn(context.Background(), &stats.ConnEnd{}) }
