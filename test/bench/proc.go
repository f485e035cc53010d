package main

// CPU time and memory of processes, from Linux's /proc. Processes are identified
// only by ID; those of plugins are found among Vault's children.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

// tick is the unit of times in /proc: 1/100 s on every architecture that Go
// supports.
const tick = 10 * time.Millisecond

// cpuTime is the CPU time that a process has used since its start.
func cpuTime(pid int) (time.Duration, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, the name, can contain any character, so fields are counted
	// from its end: utime and stime are the 14th and 15th.
	fields := strings.Fields(string(content[bytes.LastIndexByte(content, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * tick, err
}

// machineTime is the CPU time that all processes have used since the machine's
// start.
func machineTime() (time.Duration, error) {
	content, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(content), "\n")
	fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal …
	if len(fields) < 9 {
		return 0, errors.New("/proc/stat does not begin with the machine's times")
	}
	busy := int64(0)
	for i, field := range fields[1:9] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		if i != 3 && i != 4 { // idle and iowait
			busy += n
		}
	}
	return time.Duration(busy) * tick, nil
}

// rss is the memory that a process has resident, in MiB.
func rss(pid int) (float64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(content)) {
		if rest, found := strings.CutPrefix(line, "VmRSS:"); found {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no VmRSS", pid)
}

// peakRSS samples a process's memory until stop is called, which returns the
// maximum.
func peakRSS(ctx context.Context, pid int) (stop func() float64) {
	ctx, cancel := context.WithCancel(ctx)
	peak := make(chan float64, 1)
	go func() {
		most := 0.0
		for {
			now, err := rss(pid)
			if err == nil {
				most = max(most, now)
			}
			select {
			case <-ctx.Done():
				peak <- most
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	return func() float64 { cancel(); return <-peak }
}

// pluginPID returns the process of a plugin: the only child of Vault that runs its
// binary. While a plugin is being mounted, there can be two.
func pluginPID(ctx context.Context, v *devenv.Vault, p devenv.Plugin) (int, error) {
	want := filepath.Join(v.PluginDir, filepath.Base(p.Path))
	for deadline := time.Now().Add(20 * time.Second); ; {
		pids, err := v.PluginPIDs()
		if err != nil {
			return 0, err
		}
		var found []int
		for _, pid := range pids {
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && exe == want {
				found = append(found, pid)
			}
		}
		if len(found) == 1 {
			return found[0], nil
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("%d processes of %s under Vault; want 1", len(found), p.Name)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// pause waits for d, or until the context ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
