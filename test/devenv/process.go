package devenv

// Child processes: each has its own process group, so that a Ctrl-C at the
// terminal reaches only the program that has to clean up, and ends by its ID.

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
		_ = cmd.Wait() // only that it has ended matters; its log has the reason
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

// terminate sends SIGTERM, and kills the process if it has not ended in time.
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

// children lists the processes whose parent is pid. It prefers /proc, because a
// minimal system may have no ps.
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
			continue // it has ended
		}
		// "pid (name) state ppid …", where the name can contain any character.
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

// runningFrom lists the processes whose program is in a folder. It needs /proc.
func runningFrom(dir string) (found []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/exe") // its only error is a bad pattern
	for _, link := range links {
		program, err := os.Readlink(link)
		if err != nil || filepath.Dir(program) != dir {
			continue // another program, or it has ended
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
			found = append(found, pid)
		}
	}
	return found
}

// killOwn kills a process if it is in the group of the child process that started
// it. Otherwise its ID may belong to another process by now.
func killOwn(pid, group int) error {
	pgid, err := syscall.Getpgid(pid)
	if errors.Is(err, syscall.ESRCH) || (err == nil && pgid != group) {
		return nil // it has ended, and its ID may be in use again
	}
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}
