//go:build bench

package main

// Profiles for the benchmark, only in a binary built with the tag bench. Releases do not
// have the tag, since profiles expose memory.

import (
	"context"
	"fmt"
	"net"
	"net/http"
	_ "net/http/pprof" //nolint:gosec // only with the tag, on a socket in the benchmark's folder
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// Each process has its own socket in this folder, since Vault may run several.
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
