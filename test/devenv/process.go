package devenv

// A process of ours: started in a group of its own, so that a Ctrl-C at the
// terminal reaches only the program that has to clean up, and ended by its id.

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// stopTimeout is how long a graceful stop may take.
const stopTimeout = 20 * time.Second

type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has been waited for
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = sysProcAttr()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in its log; here only that it did
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// terminate asks the process to end and, when it does not, ends it.
func (p *process) terminate() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // an error means that it has ended
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		p.kill()
	}
}

// kill ends the process without notice, as a crash would.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// children lists the processes whose parent is pid. /proc is read where it
// exists, because a small machine may have no ps.
func children(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var found []int
	if len(stats) == 0 {
		out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
		if err != nil {
			return nil, fmt.Errorf("listing processes: %w", err)
		}
		for line := range strings.Lines(string(out)) {
			var child, parent int
			if _, err := fmt.Sscan(line, &child, &parent); err == nil && parent == pid {
				found = append(found, child)
			}
		}
		return found, nil
	}
	for _, stat := range stats {
		content, err := os.ReadFile(stat)
		if err != nil {
			continue // it ended while we looked
		}
		// "pid (name) state ppid …", where the name may hold anything.
		fields := bytes.Fields(content[bytes.LastIndexByte(content, ')')+1:])
		if len(fields) < 2 || string(fields[0]) == "Z" || string(fields[1]) != strconv.Itoa(pid) {
			continue
		}
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
		if err == nil {
			found = append(found, child)
		}
	}
	return found, nil
}

// runningFrom lists the processes whose program is in a folder, where /proc says so.
func runningFrom(dir string) (found []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/exe") // its only error is a bad pattern
	for _, link := range links {
		program, err := os.Readlink(link)
		if err != nil || filepath.Dir(program) != dir {
			continue // somebody else's, or none any more
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
			found = append(found, pid)
		}
	}
	return found
}

// killOwn ends a process that a process of ours with the given id had started,
// provided that it still is one, which its being in the group that we made shows.
func killOwn(pid, group int) error {
	pgid, err := syscall.Getpgid(pid)
	if errors.Is(err, syscall.ESRCH) || (err == nil && pgid != group) {
		return nil // it has ended, and the id may be somebody else's by now
	}
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}
