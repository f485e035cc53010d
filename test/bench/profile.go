package main

// Profiles under load: of the plugin, which is then built with the tag bench, of
// Vault, through sys/pprof, and of this program, to check that the load generator
// stays cheap.
//
// What must stay true: no figure is measured with such a plugin, since mutex and
// block profiling take time.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"time"
)

// envProfileDir names the folder of the plugin's sockets, as in its command.
const envProfileDir = "VAULT_OPENAI_PROFILE_DIR"

func profile(ctx context.Context, l *lab, out io.Writer) error {
	dir := filepath.Join(l.settings.Output, "profiles")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	s, err := l.startServer(ctx, "inmem", envProfileDir+"="+l.dir)
	if err != nil {
		return err
	}
	p, err := s.pair(ctx, "profile", l.sim)
	if err != nil {
		return err
	}
	m := p.engine
	seconds := l.settings.size(10, 1)
	// Send batches until the profiles are taken.
	n := l.settings.size(2000, 200)
	var ids []string
	if err := m.profiled(ctx, out, dir, "issue", seconds, func() (bool, error) {
		issued, err := m.run(ctx, m.issue(32, n))
		ids = append(ids, issued.leaseID...)
		return true, err
	}); err != nil {
		return err
	}
	// Shorter, since only the leases from above can be revoked.
	if err := m.profiled(ctx, out, dir, "revoke", (seconds+2)/3, func() (bool, error) {
		batch := ids[:min(n, len(ids))]
		ids = ids[len(batch):]
		_, err := m.run(ctx, revoke(batch))
		return len(ids) > 0, err
	}); err != nil {
		return err
	}
	if _, err := m.revokeAndCheck(ctx, ids, 0); err != nil {
		return err
	}
	fmt.Fprintf(out, "go tool pprof -top %s\n", filepath.Join(dir, "issue-plugin-profile.pprof"))
	return nil
}

// profiled takes all profiles while it repeats batch, until they are taken or
// batch returns false.
func (m *mount) profiled(ctx context.Context, out io.Writer, dir, phase string, seconds int, batch func() (more bool, err error)) error {
	plugin := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(m.lab.dir, fmt.Sprintf("%d.sock", m.plugin)))
		},
	}}
	defer plugin.CloseIdleConnections()
	var mu sync.Mutex
	var errs []error
	note := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		errs = append(errs, err)
	}
	save := func(who, kind string, content []byte, err error) {
		path := filepath.Join(dir, phase+"-"+who+"-"+kind+".pprof")
		if err == nil {
			err = os.WriteFile(path, content, 0o600)
		}
		if err != nil {
			note(fmt.Errorf("%s of %s under %s: %w", kind, who, phase, err))
			return
		}
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(out, path)
	}
	var group sync.WaitGroup
	for _, kind := range []string{"profile", "mutex", "block", "allocs"} {
		group.Go(func() {
			content, err := fetch(ctx, plugin, fmt.Sprintf("http://plugin/debug/pprof/%s?seconds=%d", kind, seconds))
			save("plugin", kind, content, err)
		})
	}
	group.Go(func() {
		content, err := m.do(ctx, http.MethodGet, fmt.Sprintf("sys/pprof/profile?seconds=%d", seconds), "")
		save("vault", "profile", content, err)
		// Since Vault's start, as Vault has no allocs profile of a period.
		content, err = m.do(ctx, http.MethodGet, "sys/pprof/allocs", "")
		save("vault", "allocs", content, err)
	})
	group.Go(func() {
		var own bytes.Buffer
		if err := pprof.StartCPUProfile(&own); err != nil {
			note(err)
			return
		}
		err := pause(ctx, time.Duration(seconds)*time.Second)
		pprof.StopCPUProfile()
		save("load", "profile", own.Bytes(), err)
	})
	taken := make(chan struct{})
	go func() { group.Wait(); close(taken) }()
	for more := true; more; {
		var err error
		if more, err = batch(); err != nil {
			note(err)
			break
		}
		select {
		case <-taken:
			more = false
		default:
		}
	}
	<-taken
	return errors.Join(errs...)
}

func fetch(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.200s", resp.Status, content)
	}
	return content, err
}
