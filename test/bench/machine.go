package main

// Where a run took place, without which its times say nothing.

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
	// Others is the part of the machine's processor time that processes other
	// than those measured used while measuring.
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
		how = "quick: everything once and small, so the times mean little"
	}
	fmt.Fprintf(out, "Vault %s, %s, %s, %d cores, commit %s; %s, in %d s; other processes used %.0f %% of the machine.\n",
		m.Vault, m.Go, m.System, m.Cores, m.Commit, how, m.Seconds, 100*m.Others)
	fmt.Fprint(out, "Roles have their defaults but activation_timeout=0, where a line does not say otherwise. Ratios are the engine's figure by the floor's.\n\n")
}

// trusting is a transport that knows one more authority.
func trusting(pem string) *http.Transport {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(pem))
	return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true}
}
