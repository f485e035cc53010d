package main

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The agent tries to read the broker's memory with ptrace and process_vm_readv.
func init() {
	agents["inspect"] = func() {
		runtime.LockOSThread()
		broker := os.Getppid() // of the shell, whose parent is the broker
		if content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", broker)); err == nil {
			var name, state string
			_, _ = fmt.Sscan(string(content), &broker, &name, &state, &broker)
		}
		err := unix.PtraceAttach(broker)
		if fmt.Printf("ptrace: %v\n", err); err == nil {
			_, _ = unix.Wait4(broker, nil, unix.WALL, nil)
			_ = unix.PtraceDetach(broker)
		}
		var here [8]byte
		_, err = unix.ProcessVMReadv(broker, []unix.Iovec{{Base: &here[0], Len: 8}}, []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&here[0])), Len: 8}}, 0)
		fmt.Printf("process_vm_readv: %v\n", err)
	}
}
