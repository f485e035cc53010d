package devenv

// The simulator as a separate process, for the demo and the benchmark. Tests run
// it in their own process instead, where they can inspect it.

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// Simulator is a running openai-sim, with the values that it printed.
type Simulator struct {
	URL        string `json:"url"`
	CACert     string `json:"ca_cert"` // PEM, only with -tls
	AdminKey   string `json:"admin_key"`
	AdminKeyID string `json:"admin_key_id"`
	Projects   []struct {
		ID   string `json:"id"`
		Name string `json:"name"`
	} `json:"projects"`

	process *process
}

// StartSimulator starts a simulator with one project and additional flags.
// The caller must Stop it.
func StartSimulator(ctx context.Context, bin, project string, flags ...string) (*Simulator, error) {
	cmd := exec.Command(bin, append([]string{"-listen", "127.0.0.1:0", "-project", project}, flags...)...)
	cmd.Stderr = os.Stderr
	stdout, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = out
	p, err := startProcess(cmd)
	_ = out.Close() // the process has its own copy
	if err != nil {
		_ = stdout.Close()
		return nil, fmt.Errorf("starting %s: %w", bin, err)
	}
	s := &Simulator{process: p}
	introduced := make(chan error, 1)
	go func() {
		defer func() { _ = stdout.Close() }() // it was only read
		lines := bufio.NewScanner(stdout)
		if lines.Scan() {
			introduced <- json.Unmarshal(lines.Bytes(), s)
		} else {
			introduced <- fmt.Errorf("%s exited without printing its address", bin)
		}
		for lines.Scan() { // drain the pipe, so that the process does not block
		}
	}()
	select {
	case err = <-introduced:
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(10 * time.Second):
		err = fmt.Errorf("%s did not print its address within 10 s", bin)
	}
	if err == nil && (s.URL == "" || s.AdminKey == "" || len(s.Projects) == 0) {
		err = fmt.Errorf("%s did not print its url, admin_key and projects", bin)
	}
	if err != nil {
		p.terminate()
		return nil, err
	}
	return s, nil
}

// PID is the process's id.
func (s *Simulator) PID() int { return s.process.pid() }

// Stop ends the simulator, which loses its data.
func (s *Simulator) Stop() { s.process.terminate() }
