package broker

// This file owns what Linux offers to protect the process.

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// endWithParent has the kernel end the child when the broker is killed.
func endWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} }

// harden keeps other processes of the same account, the child among them, out of
// the broker's memory: no core dump, no /proc/<pid>/mem, no debugger. It locks
// the memory only where that cannot exhaust a limit.
func (b *broker) harden() {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		b.log.Warn("other processes of this account can inspect the broker", "error", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	var limit unix.Rlimit
	_ = unix.Capget(&header, &data[0]) // no capability if it fails
	_ = unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit)
	locked := 0.0
	if limit.Cur == unix.RLIM_INFINITY || data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0 {
		if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
			b.log.Warn("memory is not locked", "error", err)
		} else {
			locked = 1
		}
	}
	b.ledger.set(locked, "memory_locked")
}
