package broker

import "syscall"

func endWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{} }

// harden has nothing to do: macOS protects signed binaries from inspection, and
// offers nothing to others.
func (b *broker) harden() { b.ledger.set(0, "memory_locked") }
