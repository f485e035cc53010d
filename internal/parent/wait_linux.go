package parent

import (
	"os"

	"golang.org/x/sys/unix"
)

// wait returns when the parent has ended: its pidfd becomes readable then. A kernel
// without pidfds, or a filter that refuses them, leaves the parent's ID.
func wait(parent int) {
	fd, err := unix.PidfdOpen(parent, 0)
	if err != nil {
		poll(parent)
		return
	}
	defer func() { _ = unix.Close(fd) }()
	watched := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} // #nosec G115 -- a file descriptor
	// If the parent has ended before the pidfd was opened, that may be another's.
	for os.Getppid() == parent {
		ready, err := unix.Poll(watched, -1)
		if ready > 0 {
			return
		}
		if err != nil && err != unix.EINTR {
			poll(parent)
			return
		}
	}
}
