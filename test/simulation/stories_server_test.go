//go:build integration

package simulation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

var learn = flag.Bool("learn", false, "write "+storiesFile+" as a real Vault tells it")

// TestStoriesOnVault plays the stories on a real Vault. Those that harm the server have
// one of their own. Those whose title says that they are slow run with STORIES=slow.
func TestStoriesOnVault(t *testing.T) {
	devenv.IsolateEnv()
	ctx := t.Context()
	bin, err := devenv.FindVault(ctx)
	require.NoError(t, err)
	shared, err := devenv.Start(ctx, devenv.Options{VaultBin: bin, LogLevel: "warn"})
	require.NoError(t, err)
	defer func() { require.NoError(t, shared.Stop()) }()
	plugin, err := devenv.BuildPlugin(ctx, shared.PluginDir, devenv.BuildOptions{Name: "probe", Package: "./test/simulation/probe/plugin"})
	require.NoError(t, err)

	stories := readStories(t)
	played := slices.Clone(stories)
	took := make([]time.Duration, len(stories))
	all, own := make(chan struct{}, 16), make(chan struct{}, 3) // most wait for clocks; servers are heavy
	var group sync.WaitGroup
	for i, s := range stories {
		if strings.Contains(s.title, "(slow)") && os.Getenv("STORIES") != "slow" {
			continue
		}
		group.Go(func() {
			name := fmt.Sprintf("story%d", i)
			stage := &serverStage{dir: t.TempDir(), plugin: plugin, name: name, mount: name, v: shared, leases: map[string]string{}, tokens: map[string]string{}}
			turn := all
			nodes := 0
			switch {
			case s.has("step-down"):
				turn, nodes = own, 2
			case s.has("seal", "crash", "restore"):
				turn, nodes = own, 1
			}
			turn <- struct{}{}
			defer func() { <-turn }()
			began := time.Now()
			err := stage.start(ctx, nodes)
			if err == nil {
				played[i] = s.play(stage, *learn)
				took[i] = time.Since(began)
			}
			if err := errors.Join(err, stage.end()); err != nil {
				t.Errorf("%s: %v", s.title, err)
			}
		})
	}
	group.Wait()
	if *learn {
		var b strings.Builder
		for _, s := range played {
			fmt.Fprintf(&b, "%s\n", s)
		}
		require.NoError(t, os.WriteFile(storiesFile, []byte(strings.TrimSuffix(b.String(), "\n")), 0o600))
	}
	for i, s := range stories {
		t.Run(s.title, func(t *testing.T) {
			if took[i] == 0 {
				t.Skip("it runs with STORIES=slow")
			}
			t.Logf("took %s", took[i].Round(time.Millisecond))
			require.Equal(t, s.String(), played[i].String())
		})
	}
}

// serverStage plays on a real server.
type serverStage struct {
	dir    string // of the probe
	plugin devenv.Plugin
	name   string // of the plugin
	mount  string

	v      *devenv.Vault   // the active node
	nodes  *devenv.Cluster // its own, nil for the shared server
	client *api.Client
	read   int // of what is recorded
	leases map[string]string
	tokens map[string]string
	kept   bytes.Buffer
}

// start starts a server of its own if the story needs one, and registers a plugin of its
// own: since its environment differs from the others', so does its process.
func (s *serverStage) start(ctx context.Context, nodes int) (err error) {
	options := devenv.Options{VaultBin: s.v.Binary(), LogLevel: "warn"}
	switch nodes {
	case 0:
	case 1:
		v, err := devenv.Start(ctx, options)
		if err != nil {
			return err
		}
		s.v, s.nodes = v, &devenv.Cluster{Nodes: []*devenv.Vault{v}}
	default:
		if s.nodes, err = devenv.StartCluster(ctx, nodes, options); err != nil {
			return err
		}
		if s.v, err = s.nodes.Leader(ctx); err != nil {
			return err
		}
	}
	s.client = s.v.Client()
	p := s.plugin
	p.Name = s.name
	if s.nodes != nil { // this brings the binary to its nodes
		if err := s.nodes.Register(ctx, p); err != nil {
			return err
		}
	}
	return s.client.Sys().RegisterPluginWithContext(ctx, &api.RegisterPluginInput{
		Name: p.Name, Type: api.PluginTypeSecrets, Command: filepath.Base(p.Path), SHA256: p.SHA256, Version: p.Version,
		Env: []string{"PROBE_DIR=" + s.dir},
	})
}

func (s *serverStage) end() error {
	if s.nodes != nil {
		return s.nodes.Stop()
	}
	return nil
}

func (s *serverStage) calls() []string {
	content, _ := os.ReadFile(filepath.Join(s.dir, "calls")) // there is none before the first
	lines := strings.SplitAfter(string(content), "\n")
	var all []string
	for _, line := range lines[s.read:] {
		if call, whole := strings.CutSuffix(line, "\n"); whole {
			all = append(all, call)
			s.read++
		}
	}
	return all
}

func (s *serverStage) do(verb string, args []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	sys := s.client.Sys()
	arg := append(slices.Clone(args), make([]string, 5)...)
	length := func(secret *api.Secret, err error) (string, error) {
		switch {
		case err != nil:
			return "", err
		case secret == nil:
			return "", errors.New("nothing there")
		case secret.LeaseID == "":
			return "no lease", nil
		}
		return rounded(time.Duration(secret.LeaseDuration) * time.Second), nil
	}
	switch verb {
	case "plugin":
		return "", os.WriteFile(filepath.Join(s.dir, "how"), []byte(strings.Join(args, " ")), 0o600)
	case "mount":
		return "", sys.MountWithContext(ctx, s.mount, &api.MountInput{Type: s.name})
	case "write":
		_, err := s.client.Logical().WriteWithContext(ctx, s.mount+"/"+arg[0], map[string]any{"value": "x"})
		return "", err
	case "read":
		secret, err := s.client.Logical().ReadWithContext(ctx, s.mount+"/"+arg[0])
		if err == nil && secret == nil {
			err = errors.New("nothing there")
		}
		return "", err
	case "issue":
		client := s.client
		switch {
		case arg[3] == "hangs":
			client = s.v.Client()
			client.SetClientTimeout(time.Second)
		case arg[3] == "by":
			client = s.v.ClientFor(s.tokens[arg[4]])
		}
		secret, err := client.Logical().ReadWithDataWithContext(ctx, s.mount+"/creds/"+arg[0], map[string][]string{"as": {arg[2]}})
		if secret != nil {
			s.leases[arg[2]] = secret.LeaseID
		}
		return length(secret, err)
	case "renew":
		increment, _ := time.ParseDuration(arg[1])
		if _, err := sys.RenewWithContext(ctx, s.leases[arg[0]], int(increment.Seconds())); err != nil {
			return "", err
		}
		found, err := sys.LookupWithContext(ctx, s.leases[arg[0]])
		if err != nil {
			return "", err
		}
		seconds, err := found.Data["ttl"].(json.Number).Int64()
		return rounded(time.Duration(seconds) * time.Second), err
	case "lookup":
		if _, err := sys.LookupWithContext(ctx, s.leases[arg[0]]); err != nil {
			return "gone", nil
		}
		return "there", nil
	case "revoke", "revoke-sync":
		return "", sys.RevokeWithOptionsWithContext(ctx, &api.RevokeOptions{LeaseID: s.leases[arg[0]], Sync: verb == "revoke-sync"})
	case "revoke-all":
		return "", sys.RevokeWithOptionsWithContext(ctx, &api.RevokeOptions{LeaseID: s.mount + "/creds/" + arg[0], Prefix: true})
	case "revoke-prefix":
		prefix := s.mount
		if arg[0] != "all" {
			prefix += "/creds/" + arg[0]
		}
		return "", sys.RevokeWithOptionsWithContext(ctx, &api.RevokeOptions{LeaseID: prefix, Prefix: true, Sync: true, Force: arg[1] == "force"})
	case "token":
		if err := sys.PutPolicyWithContext(ctx, s.mount, `path "*" { capabilities = ["read", "update"] }`); err != nil {
			return "", err
		}
		request := &api.TokenCreateRequest{Policies: []string{s.mount}, TTL: arg[2], Type: arg[1]}
		secret, err := s.client.Auth().Token().CreateWithContext(ctx, request)
		if err == nil {
			s.tokens[arg[0]] = secret.Auth.ClientToken
		}
		return "", err
	case "end":
		return "", s.client.Auth().Token().RevokeTreeWithContext(ctx, s.tokens[arg[0]])
	case "disable":
		return "", sys.UnmountWithContext(ctx, s.mount)
	case "move":
		to := s.mount + arg[0]
		err := sys.RemountWithContext(ctx, s.mount, to)
		if err == nil {
			s.mount = to
		}
		return "", err
	case "tune":
		return "", sys.TuneMountAllowNilWithContext(ctx, s.mount, api.TuneMountConfigInput{DefaultLeaseTTL: &arg[0], MaxLeaseTTL: &arg[0]})
	case "reload":
		_, err := s.client.Logical().WriteWithContext(ctx, "sys/plugins/reload/backend", map[string]any{"mounts": s.mount + "/"})
		return "", err
	case "kill":
		return "", s.kill()
	case "seal":
		return "", sys.SealWithContext(ctx)
	case "crash":
		return "", s.v.Kill()
	case "unseal":
		return "", s.v.Restart(ctx)
	case "step-down":
		return "", s.stepDown(ctx)
	case "snapshot":
		s.kept.Reset()
		return "", s.v.Snapshot(ctx, &s.kept)
	case "restore":
		if err := sys.RaftSnapshotRestoreWithContext(ctx, &s.kept, false); err != nil {
			return "", err
		}
		time.Sleep(time.Second) // the answer comes before it
		for {
			if health, err := sys.HealthWithContext(ctx); err == nil && !health.Standby && !health.Sealed {
				return "", nil
			} else if ctx.Err() != nil {
				return "", err
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return "", errors.New("no such step")
}

// kill kills the plugin's process, and waits until Vault has noticed.
func (s *serverStage) kill() error {
	content, err := os.ReadFile(filepath.Join(s.dir, "pid"))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(content))
	if err != nil {
		return err
	}
	own, err := s.v.PluginPIDs()
	if err != nil || !slices.Contains(own, pid) {
		return fmt.Errorf("%d is no plugin of this Vault: %w", pid, err)
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	if err := process.Kill(); err != nil {
		return err
	}
	time.Sleep(time.Second)
	return nil
}

func (s *serverStage) stepDown(ctx context.Context) error {
	if err := s.client.Sys().StepDownWithContext(ctx); err != nil {
		return err
	}
	before := s.v
	for ctx.Err() == nil {
		leader, err := s.nodes.Leader(ctx)
		if err == nil && leader != before {
			s.v, s.client = leader, leader.Client()
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return ctx.Err()
}
