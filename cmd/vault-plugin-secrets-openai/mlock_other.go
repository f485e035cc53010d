//go:build !linux

package main

// mayLockMemory does nothing on systems without capabilities.
func mayLockMemory() error { return nil }
