package devenv

import "syscall"

// sysProcAttr gives a process its own group and, where the kernel can, has it
// end with us: a test binary that a timeout kills runs no cleanup. It is asked
// to end, not killed, since a Vault that is killed leaves its plugins running.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}
