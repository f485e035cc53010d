//go:build live

package live

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-openai/client"
)

// TestLive probes the API that the environment selects (docs/live-tests.md). It
// fails if the API differs from the engine's assumptions.
func TestLive(t *testing.T) {
	key, project := os.Getenv("OPENAI_ADMIN_KEY"), os.Getenv("OPENAI_TEST_PROJECT_ID")
	if key == "" || project == "" {
		t.Skip("OPENAI_ADMIN_KEY and OPENAI_TEST_PROJECT_ID are not both set")
	}
	cfg := Defaults()
	cfg.AdminKey, cfg.Project = client.NewSecret(key), project
	cfg.Organization = os.Getenv("OPENAI_ORG_ID")
	cfg.ReadOnlyKey = client.NewSecret(os.Getenv("OPENAI_READONLY_ADMIN_KEY"))
	if base := os.Getenv("OPENAI_BASE_URL"); base != "" {
		cfg.BaseURL = base
		if simulated(base) { // it answers fast
			cfg.Expiry, cfg.Pause, cfg.Patience = 2*time.Second, 20*time.Millisecond, 3*time.Second
		}
	}
	ctx, stop := signal.NotifyContext(t.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 40*time.Minute)
	defer cancel()

	report, err := Run(ctx, cfg)
	if report != nil {
		fmt.Println(report)
		if path := os.Getenv("LIVE_REPORT"); path != "" {
			if err := os.WriteFile(path, []byte(report.String()), 0o600); err != nil {
				t.Error(err)
			}
		}
		for _, f := range report.Differences() {
			t.Errorf("§%d %s: %s", f.Section, f.About, f.Observed)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// simulated reports whether a base URL is on this machine.
func simulated(base string) bool {
	u, err := url.Parse(base)
	if err != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return ip != nil && ip.IsLoopback()
}
