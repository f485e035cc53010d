// Command release builds a release: each program for each of its platforms, an SBOM of
// each from the binary's own build information, the container image of each Linux
// platform, a SHA256SUMS of all files and, if a key is set, its signature.
//
// What must stay true: the build is reproducible for the same commit, version and Go
// release, in any folder; the version of a binary shows if it was not built from a clean,
// tagged commit; a release without a signature prints that.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/mod/semver"
)

const (
	plugin = "vault-plugin-secrets-openai" // module, command and binary
	broker = "openai-broker"
	sums   = "SHA256SUMS"
)

// platforms are the common platforms of Vault.
const platforms = "linux/amd64,linux/arm64,darwin/amd64,darwin/arm64,windows/amd64"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := flag.String("root", ".", "`folder` of the checkout")
	version := flag.String("version", "", "`version` to release, such as v0.1.0")
	only := flag.String("platforms", platforms, "comma-separated `list` of GOOS/GOARCH")
	flag.Parse()
	if _, err := run(ctx, os.Stdout, *root, *version, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

// run builds a release and returns its folder.
func run(ctx context.Context, out io.Writer, root, asked string, platforms []string) (string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	version, err := versionOf(ctx, root, asked)
	if err != nil {
		return "", err
	}
	toolchain, err := command(ctx, root, nil, "go", "env", "GOVERSION")
	if err != nil {
		return "", err
	}
	// An empty variable does not override `go env -w`.
	experiments, err := command(ctx, root, []string{"GOEXPERIMENT="}, "go", "env", "GOEXPERIMENT")
	if err != nil {
		return "", err
	}
	if experiments != "" {
		return "", fmt.Errorf("GOEXPERIMENT=%s from go env -w changes the binaries; run go env -u GOEXPERIMENT", experiments)
	}
	fmt.Fprintf(out, "%s %s, built with %s\n", plugin, version, toolchain)
	sources := root
	if version == tag(asked) {
		if sources, err = clone(ctx, root, version); err != nil {
			return "", err
		}
		defer func() { _ = os.RemoveAll(filepath.Dir(sources)) }() // a temporary folder
	} else {
		fmt.Fprintln(out, "This is no clean commit with the tag "+tag(asked)+", and the version says so.")
	}

	dist := filepath.Join(root, "dist", version)
	if err := os.RemoveAll(dist); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dist, 0o755); err != nil {
		return "", err
	}
	for _, platform := range platforms {
		for _, program := range []string{plugin, broker} {
			if program == broker && strings.HasPrefix(platform, "windows/") {
				continue // the broker does not support Windows
			}
			if err := release(ctx, sources, dist, program, version, platform); err != nil {
				return "", err
			}
		}
	}
	list, err := writeSums(dist)
	if err != nil {
		return "", err
	}
	fmt.Fprint(out, list)
	return dist, sign(ctx, out, dist)
}

// release builds the files of one program for one platform.
func release(ctx context.Context, sources, dist, program, version, platform string) error {
	binary, err := build(ctx, sources, dist, program, version, platform)
	if err != nil {
		return err
	}
	if err := writeSBOM(binary, version); err != nil {
		return fmt.Errorf("the SBOM of %s: %w", filepath.Base(binary), err)
	}
	if arch, ok := strings.CutPrefix(platform, "linux/"); ok {
		if err := image(ctx, sources, dist, program, version, arch); err != nil {
			return fmt.Errorf("the image of %s for %s: %w", program, platform, err)
		}
	}
	return nil
}

func tag(asked string) string { return "v" + strings.TrimPrefix(asked, "v") }

// versionOf returns the requested version if the tree is clean and tagged with it, and
// otherwise a pre-release version with the commit, which a catalog cannot confuse with the
// release.
func versionOf(ctx context.Context, root, asked string) (string, error) {
	version := tag(asked)
	if semver.Canonical(version) != version {
		return "", fmt.Errorf("%q is not a semantic version such as v0.1.0 or v0.1.0-rc.1", asked)
	}
	tags, err := command(ctx, root, nil, "git", "tag", "--points-at", "HEAD")
	if err != nil {
		return "", err
	}
	// The option overrides a developer's settings, which may hide files that Go compiles.
	changes, err := command(ctx, root, nil, "git", "status", "--porcelain", "--untracked-files=normal")
	if err != nil {
		return "", err
	}
	if changes == "" && slices.Contains(strings.Fields(tags), version) {
		return version, nil
	}
	commit, err := command(ctx, root, nil, "git", "rev-parse", "--short=12", "HEAD")
	if err != nil {
		return "", err
	}
	switch semver.Prerelease(version) {
	case "":
		version += "-dev"
	case "-dev":
	default:
		version += ".dev"
	}
	version += ".g" + commit // with a g, since a numeric identifier must not start with 0
	if changes != "" {
		version += "+dirty"
	}
	return version, nil
}

// clone clones a tagged commit, without its other tags, into a temporary folder. A release
// is built from the clone because Go compiles files that git ignores, and stamps the
// highest tag of the commit into the binary.
func clone(ctx context.Context, root, version string) (string, error) {
	parent, err := os.MkdirTemp("", "release-")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(parent, plugin)
	for _, args := range [][]string{
		{"clone", "--quiet", "--no-tags", "--no-checkout", root, dir},
		{"-C", dir, "fetch", "--quiet", "--no-tags", "origin", "tag", version},
		{"-C", dir, "-c", "advice.detachedHead=false", "checkout", "--quiet", version},
	} {
		if _, err := command(ctx, parent, nil, "git", args...); err != nil {
			return "", errors.Join(err, os.RemoveAll(parent))
		}
	}
	return dir, nil
}

// build compiles a program for one platform. All settings that change the
// result are given here and not taken from the environment.
func build(ctx context.Context, root, dist, program, version, platform string) (string, error) {
	goos, goarch, ok := strings.Cut(platform, "/")
	if !ok {
		return "", fmt.Errorf("%q is not GOOS/GOARCH", platform)
	}
	binary := filepath.Join(dist, fileName(program, version, goos, goarch))
	if goos == "windows" {
		binary += ".exe"
	}
	return binary, compile(ctx, root, program, binary, version, goos, goarch, "-buildvcs=true")
}

func fileName(program, version, goos, goarch string) string {
	return fmt.Sprintf("%s_%s_%s_%s", program, strings.TrimPrefix(version, "v"), goos, goarch)
}

func compile(ctx context.Context, root, program, binary, version, goos, goarch, vcs string) error {
	env := []string{
		"GOOS=" + goos, "GOARCH=" + goarch, "CGO_ENABLED=0", "GOAMD64=v1", "GOARM64=v8.0",
		"GOFLAGS=-mod=readonly", "GOEXPERIMENT=", "GOFIPS140=off", "GOWORK=off",
	}
	_, err := command(ctx, root, env, "go", "build", "-trimpath", vcs,
		"-ldflags", "-s -w -X "+plugin+".version="+version+" -X "+plugin+"/broker.version="+version, "-o", binary, "./cmd/"+program)
	return err
}

// image makes the same archive as `make image` does of the same commit, which a
// test checks. A version with build metadata cannot be an image's tag.
func image(ctx context.Context, root, dist, program, version, arch string) error {
	if strings.Contains(version, "+") {
		return nil
	}
	dir, err := os.MkdirTemp("", "image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary := filepath.Join(dir, program)
	if err := compile(ctx, root, program, binary, version, "linux", arch, "-buildvcs=false"); err != nil {
		return err
	}
	revision, err := command(ctx, root, nil, "git", "rev-parse", "HEAD")
	if err != nil {
		return err
	}
	date, err := command(ctx, root, nil, "git", "log", "-1", "--format=%ct")
	if err != nil {
		return err
	}
	env := []string{"SOURCE_DATE_EPOCH=" + date, "GOOS=", "GOARCH="}
	_, err = command(ctx, filepath.Join(root, "tools", "release"), env, "go", "run", "./image", "-name", program, "-binary", binary, "-version", version, "-arch", arch,
		"-revision", revision, "-o", filepath.Join(dist, fileName(program, version, "linux", arch)+".oci.tar"))
	return err
}

// writeSums writes the checksums of all files in the format of sha256sum. A binary's sum is
// for `vault plugin register -sha256`.
func writeSums(dist string) (string, error) {
	files, err := os.ReadDir(dist) // sorted by name
	if err != nil {
		return "", err
	}
	var list strings.Builder
	for _, file := range files {
		sum, err := sumOf(filepath.Join(dist, file.Name()))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&list, "%x  %s\n", sum, file.Name())
	}
	return list.String(), os.WriteFile(filepath.Join(dist, sums), []byte(list.String()), 0o644)
}

func sumOf(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // only read
	hash := sha256.New()
	_, err = io.Copy(hash, file)
	return hash.Sum(nil), err
}

// sign signs the checksums with the key from the environment. COSIGN_KEY is a key that
// cosign supports (a file, a KMS, hashivault://…), or "keyless" for the identity of the
// current workflow; GPG_KEY is a key ID. cosign and gpg prompt for passphrases.
func sign(ctx context.Context, out io.Writer, dist string) error {
	signed := false
	if key := os.Getenv("COSIGN_KEY"); key != "" {
		args := []string{"sign-blob", "--yes", "--bundle", sums + ".sigstore.json"}
		if key != "keyless" {
			args = append(args, "--key", key)
		}
		if _, err := command(ctx, dist, nil, "cosign", append(args, sums)...); err != nil {
			return err
		}
		fmt.Fprintln(out, "Signed with cosign: "+sums+".sigstore.json")
		signed = true
	}
	if key := os.Getenv("GPG_KEY"); key != "" {
		if _, err := command(ctx, dist, nil, "gpg", "--batch", "--yes", "--local-user", key,
			"--armor", "--detach-sign", "--output", sums+".asc", sums); err != nil {
			return err
		}
		fmt.Fprintln(out, "Signed with GPG: "+sums+".asc")
		signed = true
	}
	if !signed {
		fmt.Fprintln(out, "Not signed: neither COSIGN_KEY nor GPG_KEY is set.")
	}
	return nil
}

// command runs a program in a folder and returns its trimmed output.
func command(ctx context.Context, dir string, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, args[0], err, strings.TrimSpace(complaint.String()))
	}
	return strings.TrimSpace(string(out)), nil
}
