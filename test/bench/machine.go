package main

// The machine of a run, without which its times mean nothing.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

type machine struct {
	Time      time.Time `json:"time"`
	Cores     int       `json:"cores"`
	Processor string    `json:"processor,omitempty"`
	System    string    `json:"system"`
	Go        string    `json:"go"`
	Vault     string    `json:"vault"`
	Commit    string    `json:"commit"`
	// Others is the share of the machine's CPU time that processes other than the
	// measured ones used during measurements.
	Others  float64 `json:"others_share"`
	Seconds int     `json:"seconds"`
}

func describe(ctx context.Context) (machine, error) {
	m := machine{Time: time.Now().UTC().Truncate(time.Second), Cores: runtime.NumCPU(), System: runtime.GOOS + "/" + runtime.GOARCH, Go: runtime.Version()}
	if runtime.GOOS != "linux" {
		return m, fmt.Errorf("the benchmark reads processes from Linux's /proc, which %s does not have", runtime.GOOS)
	}
	if content, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(content)) {
			if name, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(name) == "model name" {
				m.Processor = strings.TrimSpace(value)
				break
			}
		}
	}
	root, err := devenv.Root()
	if err != nil {
		return m, err
	}
	cmd := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--exclude", "*")
	cmd.Dir = root
	if out, err := cmd.Output(); err == nil { // there is none in an unpacked archive
		m.Commit = strings.TrimSpace(string(out))
	}
	return m, nil
}

func (m *machine) finish(l *lab) {
	if l.lasted > 0 {
		m.Others = l.others.Seconds() / (l.lasted.Seconds() * float64(m.Cores))
	}
}

func (m *machine) print(out io.Writer, s settings) {
	how := fmt.Sprintf("median of %d", s.Repetitions)
	if s.Quick {
		how = "quick: one small repetition, so the times mean little"
	}
	fmt.Fprintf(out, "Vault %s, %s, %s, %d cores, commit %s; %s, in %d s; other processes used %.0f %% of the machine.\n",
		m.Vault, m.Go, m.System, m.Cores, m.Commit, how, m.Seconds, 100*m.Others)
	fmt.Fprint(out, "Unless a line says otherwise, roles have their defaults except activation_timeout=0. A ratio is the engine's figure divided by the floor's.\n\n")
}

// trusting is a transport that trusts only one CA certificate.
func trusting(pem string) *http.Transport {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(pem))
	return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true}
}
