package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// git runs git in a folder, independent of the developer's settings. It clones
// this checkout even if another user owns it, as in many containers.
func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("[safe]\n\tdirectory = *\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL="+config, "GIT_CONFIG_SYSTEM=/dev/null",
		"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.com", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.com")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestVersion_DescribesTheCommit(t *testing.T) {
	dir := t.TempDir()
	git(t, dir, "init", "-q")
	git(t, dir, "commit", "-q", "--allow-empty", "-m", "one")
	expect := func(asked, prefix, suffix string) {
		t.Helper()
		got, err := versionOf(context.Background(), dir, asked)
		if err != nil || !strings.HasPrefix(got, prefix) || !strings.HasSuffix(got, suffix) {
			t.Errorf("%s: got %q, %v; want %s…%s", asked, got, err, prefix, suffix)
		}
	}
	expect("0.1.0", "v0.1.0-dev.g", "")
	expect("v0.1.0-dev", "v0.1.0-dev.g", "")
	expect("v0.1.0-rc.1", "v0.1.0-rc.1.dev.g", "")
	git(t, dir, "tag", "v0.1.0")
	expect("0.1.0", "v0.1.0", "v0.1.0")
	expect("v0.2.0", "v0.2.0-dev.g", "")
	if err := os.WriteFile(filepath.Join(dir, "more.go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	expect("0.1.0", "v0.1.0-dev.g", "+dirty")
	git(t, dir, "config", "status.showUntrackedFiles", "no")
	expect("0.1.0", "v0.1.0-dev.g", "+dirty")
	for _, bad := range []string{"", "v1", "1.2", "v1.2.3+meta", "v01.2.3", "latest"} {
		if got, err := versionOf(context.Background(), dir, bad); err == nil {
			t.Errorf("%q was taken, as %q", bad, got)
		}
	}
}

// The builds share Go's build cache, whose keys include all inputs: a path or a
// time that reaches the compiler or linker misses it and changes the result. The
// release workflow compares two machines, which share nothing.
func TestRelease_IsTheSameFromTwoFolders(t *testing.T) {
	if _, err := os.Stat("../../.git"); err != nil {
		t.Skip("not a git clone, so there is nothing to clone twice")
	}
	host := runtime.GOOS + "/" + runtime.GOARCH
	var dists []string
	for _, name := range []string{"a", "another/and/deeper"} {
		root := filepath.Join(t.TempDir(), name)
		git(t, ".", "clone", "-q", "../..", root)
		git(t, root, "tag", "-f", "v9.9.9")
		if len(dists) > 0 { // another tag and a file that git ignores must make no difference
			git(t, root, "tag", "v9.9.10")
			for path, content := range map[string]string{".git/info/exclude": "hidden.go\n", "hidden.go": "package openaisecrets\n\nfunc init() { println() }\n"} {
				if err := os.WriteFile(filepath.Join(root, path), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		dist, err := run(context.Background(), t.Output(), root, "9.9.9", []string{host})
		if err != nil {
			t.Fatal(err)
		}
		dists = append(dists, dist)
	}
	list := read(t, filepath.Join(dists[0], sums))
	if other := read(t, filepath.Join(dists[1], sums)); list != other {
		t.Fatalf("two builds of one commit differ:\n%s\n%s", list, other)
	}

	for _, program := range []string{plugin, broker} {
		binary := filepath.Join(dists[0], program+"_9.9.9_"+runtime.GOOS+"_"+runtime.GOARCH)
		said, err := exec.Command(binary, "-version").Output()
		if want := program + " v9.9.9\n"; err != nil || string(said) != want {
			t.Errorf("-version says %q, %v; want %q", said, err, want)
		}
		if program == plugin {
			checkSBOM(t, binary+".cdx.json", read(t, "../../go.mod"))
		}
	}

	if runtime.GOOS != "linux" {
		return // no image was made
	}
	if _, err := exec.LookPath("make"); err != nil {
		t.Skip("no make here, whose image is the one to compare with")
	}
	made := t.TempDir()
	cmd := exec.Command("make", "image", "VERSION=v9.9.9", "ARCH="+runtime.GOARCH, "DIST="+made)
	cmd.Dir = filepath.Join(dists[0], "../..")
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix:///nonexistent") // or it would load the images
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make image: %v\n%s", err, out)
	}
	for _, program := range []string{plugin, broker} {
		archive := program + "_9.9.9_linux_" + runtime.GOARCH + ".oci.tar"
		if !strings.Contains(list, "  "+archive+"\n") {
			t.Errorf("%s is not among the sums:\n%s", archive, list)
		}
		if read(t, filepath.Join(made, archive)) != read(t, filepath.Join(dists[0], archive)) {
			t.Errorf("the release's %s is another than that of make image", archive)
		}
	}
}

func TestRelease_RefusesAnotherCompiler(t *testing.T) {
	dir := t.TempDir()
	git(t, dir, "init", "-q")
	git(t, dir, "commit", "-q", "--allow-empty", "-m", "one")
	settings := filepath.Join(dir, ".git", "goenv")
	if err := os.WriteFile(settings, []byte("GOEXPERIMENT=nogreenteagc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOENV", settings)
	if _, err := run(context.Background(), t.Output(), dir, "v0.1.0", nil); err == nil || !strings.Contains(err.Error(), "GOEXPERIMENT") {
		t.Errorf("a compiler with experiments was taken: %v", err)
	}
}

// checkSBOM compares an SBOM with the go.mod that its binary was built from.
func checkSBOM(t *testing.T, path, gomod string) {
	t.Helper()
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(strings.NewReader(read(t, path)), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if self := bom.Metadata.Component; self.Name != plugin || self.Version != "v9.9.9" || len(*self.Hashes) != 1 {
		t.Errorf("the SBOM is about %+v", self)
	}
	seen := map[string]string{}
	for _, part := range *bom.Components {
		if seen[part.Name] != "" || part.Version == "" {
			t.Errorf("component %s is there twice or has no version", part.Name)
		}
		seen[part.Name] = part.Version
	}
	if seen["std"] != strings.TrimPrefix(runtime.Version(), "go") {
		t.Errorf("the standard library is %q", seen["std"])
	}
	for _, module := range []string{"github.com/hashicorp/vault/sdk", "golang.org/x/time"} {
		if seen[module] == "" || !strings.Contains(gomod, module+" "+seen[module]) {
			t.Errorf("%s is %q, which go.mod does not say", module, seen[module])
		}
	}
	if seen["github.com/getkin/kin-openapi"] != "" {
		t.Error("what only tests need is in the SBOM")
	}
}

func TestSign_SignsWithWhatTheEnvironmentNames(t *testing.T) {
	dist := t.TempDir()
	if err := os.WriteFile(filepath.Join(dist, sums), []byte("sums\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	signed := func(cosign, gpg string) string {
		t.Helper()
		t.Setenv("COSIGN_KEY", cosign)
		t.Setenv("GPG_KEY", gpg)
		var out bytes.Buffer
		if err := sign(context.Background(), io.MultiWriter(&out, t.Output()), dist); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if said := signed("", ""); !strings.Contains(said, "Not signed") {
		t.Errorf("a release without a signature does not say so: %q", said)
	}

	t.Run("cosign", func(t *testing.T) {
		// Cosign needs a service or a passphrase, so a stand-in records its
		// arguments.
		bin := t.TempDir()
		script := "#!/bin/sh\necho \"$@\" > called\n"
		if err := os.WriteFile(filepath.Join(bin, "cosign"), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
		for key, want := range map[string]string{
			"a.key":   "sign-blob --yes --bundle SHA256SUMS.sigstore.json --key a.key SHA256SUMS\n",
			"keyless": "sign-blob --yes --bundle SHA256SUMS.sigstore.json SHA256SUMS\n",
		} {
			signed(key, "")
			if got := read(t, filepath.Join(dist, "called")); got != want {
				t.Errorf("cosign was called with %q, want %q", got, want)
			}
		}
	})

	t.Run("gpg", func(t *testing.T) {
		if _, err := exec.LookPath("gpg"); err != nil {
			t.Skip("no gpg here")
		}
		home, err := os.MkdirTemp("", "gpg") // short: its agent's socket has a limit
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("GNUPGHOME", home)
		gpg := func(args ...string) {
			t.Helper()
			if out, err := exec.Command("gpg", append([]string{"--batch"}, args...)...).CombinedOutput(); err != nil {
				t.Fatalf("gpg %v: %v\n%s", args, err, out)
			}
		}
		t.Cleanup(func() {
			_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run() // there may be none
			_ = os.RemoveAll(home)
		})
		gpg("--passphrase", "", "--quick-generate-key", "release@example.com", "ed25519", "sign", "1d")
		signed("", "release@example.com")
		gpg("--verify", filepath.Join(dist, sums+".asc"), filepath.Join(dist, sums))
	})
}
