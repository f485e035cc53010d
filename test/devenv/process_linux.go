package devenv

import "syscall"

// sysProcAttr gives a process its own group, and makes the kernel send it SIGTERM
// when this program ends: a test binary that a timeout kills runs no cleanup. With
// SIGKILL, Vault would leave its plugins running.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}
