package main

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"golang.org/x/sys/unix"
)

// mayLockMemory makes cap_ipc_lock effective if Vault wants the plugin's memory locked and
// the capability is permitted but not effective, as in our image (see
// tools/release/image). All threads need it, since the lock covers memory that any of them
// allocates later. If it is not permitted, locking the memory later fails with its own
// error.
func mayLockMemory() error {
	if os.Getenv(pluginutil.PluginMlockEnabled) != "true" {
		return nil
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // 64 capabilities in two halves
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	missing := data[0].Permitted &^ data[0].Effective & (1 << unix.CAP_IPC_LOCK)
	if missing == 0 {
		return nil
	}
	data[0].Effective |= missing
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0) //nolint:gosec // x/sys has capset only for one thread
	if errno == syscall.ENOTSUP {
		return errors.New("not supported for all threads of a binary with cgo; build with CGO_ENABLED=0")
	}
	if errno != 0 {
		return errno
	}
	return nil
}
