//go:build !linux

package parent

// wait returns when the parent has ended.
func wait(parent int) { poll(parent) }
