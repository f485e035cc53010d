package main

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"golang.org/x/sys/unix"
)

// mayLockMemory puts cap_ipc_lock into force where Vault wants the plugin's
// memory locked and the process is permitted to use the capability without yet
// having it in force, as in our image (tools/release/image says why it is
// made so). Locking covers memory that any thread asks for later, so all of them
// need it. Where it cannot be had nothing is lost: locking itself then says why it fails.
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
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0) //nolint:gosec // x/sys has capset for one thread only
	if errno == syscall.ENOTSUP {
		return errors.New("a binary with cgo cannot do this for all of its threads")
	}
	if errno != 0 {
		return errno
	}
	return nil
}
