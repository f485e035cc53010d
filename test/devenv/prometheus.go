package devenv

// A Prometheus server under test, and promtool.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// ErrNoPrometheus means that this machine has no Prometheus and cannot download it.
var ErrNoPrometheus = errors.New("no Prometheus server found, and none could be downloaded")

// FindPrometheus returns the folder of prometheus and promtool. It runs
// scripts/prometheus.sh.
func FindPrometheus(ctx context.Context) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	var said strings.Builder
	cmd := exec.CommandContext(ctx, filepath.Join(root, "scripts", "prometheus.sh"))
	cmd.Stderr = &said
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 {
		return "", fmt.Errorf("%w: %s", ErrNoPrometheus, strings.TrimSpace(said.String()))
	}
	if err != nil {
		return "", fmt.Errorf("finding Prometheus: %w\n%s", err, said.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// Prometheus is a running server.
type Prometheus struct {
	Addr    string
	process *process
	log     *os.File
}

// StartPrometheus starts the server in folder bin with a configuration file. Its
// data and log are in dir. The caller must Stop it.
func StartPrometheus(ctx context.Context, bin, config, dir string) (*Prometheus, error) {
	ports, err := freePorts(ctx, 1)
	if err != nil {
		return nil, err
	}
	listen := fmt.Sprintf("127.0.0.1:%d", ports[0])
	p := &Prometheus{Addr: "http://" + listen}
	if p.log, err = os.Create(filepath.Join(dir, "prometheus.log")); err != nil {
		return nil, err
	}
	// Not CommandContext: the server outlives the call that started it.
	cmd := exec.Command(filepath.Join(bin, "prometheus"),
		"--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+listen)
	cmd.Dir = dir
	cmd.Env = serverEnv(nil)
	cmd.Stdout, cmd.Stderr = p.log, p.log
	if p.process, err = startProcess(cmd); err != nil {
		_ = p.log.Close()
		return nil, fmt.Errorf("starting Prometheus: %w", err)
	}
	err = poll(ctx, startTimeout, "Prometheus to answer", func() error {
		if !p.process.running() {
			return stop{errors.New("the Prometheus process ended")}
		}
		_, err := p.Query(ctx, "1")
		return err
	})
	if err != nil {
		content, _ := os.ReadFile(p.log.Name()) // empty if unreadable
		_ = p.Stop()
		return nil, fmt.Errorf("%w\nPrometheus's log:\n%s", err, content)
	}
	return p, nil
}

// Stop ends the server.
func (p *Prometheus) Stop() error {
	p.process.terminate()
	return p.log.Close()
}

// Sample is one series of a query's result.
type Sample struct {
	Metric map[string]string `json:"metric"`
	Value  [2]any            `json:"value"` // the time, and the value as a string
}

// Query returns the current value of an expression.
func (p *Prometheus) Query(ctx context.Context, expr string) ([]Sample, error) {
	var result struct {
		Type   string          `json:"resultType"`
		Result json.RawMessage `json:"result"`
	}
	if err := p.Get(ctx, "query", url.Values{"query": {expr}}, &result); err != nil {
		return nil, fmt.Errorf("%s: %w", expr, err)
	}
	var samples []Sample
	if result.Type != "vector" { // return a number as a sample without labels
		samples = make([]Sample, 1)
		return samples, json.Unmarshal(result.Result, &samples[0].Value)
	}
	return samples, json.Unmarshal(result.Result, &samples)
}

// Get calls one of the server's API paths.
func (p *Prometheus) Get(ctx context.Context, path string, params url.Values, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.Addr+"/api/v1/"+path+"?"+params.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer := struct {
		Status string
		Error  string
		Data   any
	}{Data: into}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("status %d: %w", resp.StatusCode, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("status %d: %s", resp.StatusCode, answer.Error)
	}
	return nil
}
