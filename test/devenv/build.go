package devenv

// Builds plugins, the simulator and other programs from this checkout.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Plugin is a built plugin binary, with the fields of Vault's catalog.
type Plugin struct {
	Name    string // in the catalog; PluginName if empty
	Path    string
	Version string // as -version prints it
	SHA256  string
}

// BuildOptions are the options of BuildPlugin. The zero value builds this engine
// without changes.
type BuildOptions struct {
	Name    string   // of a plugin other than this engine
	Package string   // of that plugin, in this checkout
	Version string   // replaces the version in the code, for tests with two versions
	Race    bool     // with the race detector, which needs RaceAvailable
	Release bool     // as make build compiles it: static, without symbols
	Tags    []string // build tags
}

// BuildPlugin builds a plugin into dir, such as a server's plugin directory. One
// folder can hold several versions of a plugin.
func BuildPlugin(ctx context.Context, dir string, opts BuildOptions) (Plugin, error) {
	name, pkg := cmp.Or(opts.Name, PluginName), cmp.Or(opts.Package, "./cmd/"+PluginName)
	path := filepath.Join(dir, name)
	var env, args []string
	ldflags := []string{"-w"} // debug information takes a quarter of the link
	if opts.Race {
		args = append(args, "-race")
	}
	if opts.Release {
		env = append(env, "CGO_ENABLED=0")
		args = append(args, "-trimpath")
		ldflags = append(ldflags, "-s")
	}
	if opts.Version != "" {
		path += "_" + opts.Version
		ldflags = append(ldflags, "-X", PluginName+".version="+opts.Version)
	}
	args = append(args, "-ldflags", strings.Join(ldflags, " "))
	if len(opts.Tags) > 0 {
		args = append(args, "-tags", strings.Join(opts.Tags, ","))
	}
	if err := build(ctx, env, path, pkg, args...); err != nil {
		return Plugin{}, err
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return Plugin{}, err
	}
	said, err := exec.CommandContext(ctx, path, "-version").Output()
	fields := strings.Fields(string(said))
	if err != nil || len(fields) == 0 {
		return Plugin{}, fmt.Errorf("asking %s for its version: %q, %w", path, said, err)
	}
	sum := sha256.Sum256(content)
	return Plugin{Name: name, Path: path, Version: fields[len(fields)-1], SHA256: hex.EncodeToString(sum[:])}, nil
}

// Build runs go build for one package of this checkout. It uses the flags of go
// test and go vet to share their build cache, which saves minutes on a new
// machine. VCS stamping is off because it fails if git does not trust the
// folder's owner, as in many containers.
func Build(ctx context.Context, output, pkg string, args ...string) error {
	return build(ctx, nil, output, pkg, args...)
}

func build(ctx context.Context, env []string, output, pkg string, args ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	args = append([]string{"build", "-buildvcs=false", "-o", output}, args...)
	if out, err := runGo(ctx, root, env, append(args, pkg)...); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// runGo runs a go command in a folder and returns its output. When the context
// ends, it interrupts the command, which then waits for its compilers; if it were
// killed, they would keep running. An interrupt while the command loads packages
// leaves its temporary folder behind, so runGo removes that folder.
func runGo(ctx context.Context, dir string, env []string, args ...string) ([]byte, error) {
	temporary, err := os.MkdirTemp("", "vault-openai-build-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(temporary) }()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(append(cmd.Environ(), "GOTMPDIR="+temporary), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	return cmd.CombinedOutput()
}

// RaceAvailable reports whether this machine can build with the race detector,
// which needs cgo and therefore a C compiler.
func RaceAvailable(ctx context.Context) bool {
	out, err := exec.CommandContext(ctx, "go", "env", "CC").Output()
	cc := strings.Fields(string(out))
	if err != nil || len(cc) == 0 {
		return false
	}
	_, err = exec.LookPath(cc[0])
	return err == nil
}
