//go:build !linux

package main

// mayLockMemory has nothing to do where there are no capabilities.
func mayLockMemory() error { return nil }
