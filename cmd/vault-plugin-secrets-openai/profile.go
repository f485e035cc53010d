//go:build bench

package main

// Profiles for the benchmark. Only a binary built with the tag bench has this,
// and no release is: who can read profiles can read memory.

import (
	"context"
	"fmt"
	"net"
	"net/http"
	_ "net/http/pprof" //nolint:gosec // that is what the tag is for, and it listens on a socket in a folder of the benchmark's
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// Each process has a socket of its own there: Vault may run several.
const envProfileDir = "VAULT_OPENAI_PROFILE_DIR"

func init() {
	dir := os.Getenv(envProfileDir)
	if dir == "" {
		return
	}
	runtime.SetMutexProfileFraction(5)
	runtime.SetBlockProfileRate(int(10 * time.Microsecond))
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", filepath.Join(dir, fmt.Sprintf("%d.sock", os.Getpid())))
	if err != nil {
		panic(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Second}
	go func() { panic(server.Serve(listener)) }()
}
