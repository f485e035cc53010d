//go:build integration

package integration

// docs/use-a-key.md, run from top to bottom as a reader would: on a separate Vault
// with the engine at openai/, with the page's blocks and the files that they copy.
// Only addresses, paths and names are replaced, and sudo runs its command.

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

const useAKey = "docs/use-a-key.md"

// pageBlock is a block of a page with its heading and the comment before it.
type pageBlock struct {
	line                          int
	heading, language, mark, text string
}

var (
	pageFence   = regexp.MustCompile("^```([a-z]*)$")
	pageHeredoc = regexp.MustCompile(`<<'?([A-Z]+)'?$`)
	pageDaemon  = regexp.MustCompile(`^(sudo )?vault (agent|proxy) `)
)

// pageBlocks reads the blocks of a page.
func pageBlocks(t *testing.T, page string) (blocks []pageBlock) {
	t.Helper()
	root, err := devenv.Root()
	require.NoError(t, err)
	content, err := os.ReadFile(filepath.Join(root, page))
	require.NoError(t, err)
	heading, mark, inside := "", "", false
	for i, line := range strings.Split(string(content), "\n") {
		fence := pageFence.FindStringSubmatch(line)
		switch {
		case fence != nil && inside:
			inside, mark = false, ""
		case fence != nil:
			inside = true
			blocks = append(blocks, pageBlock{line: i + 1, heading: heading, language: fence[1], mark: mark})
		case inside:
			blocks[len(blocks)-1].text += line + "\n"
		case strings.HasPrefix(line, "#"):
			heading, mark = strings.TrimLeft(line, "# "), ""
		case docsMark.MatchString(line):
			mark = line
		case line != "":
			mark = ""
		}
	}
	return blocks
}

// commands returns the commands of a console block, without output.
func (b pageBlock) commands() (all []string) {
	until, continued := "", false
	for line := range strings.Lines(b.text) {
		line = strings.TrimSuffix(line, "\n")
		command, starts := strings.CutPrefix(line, "$ ")
		switch {
		case until != "" || continued:
			all[len(all)-1] += "\n" + line
			if line == until {
				until = ""
			}
		case starts:
			all = append(all, command)
			if m := pageHeredoc.FindStringSubmatch(line); m != nil {
				until = m[1]
			}
		}
		if until == "" && (starts || continued) {
			continued = strings.HasSuffix(line, `\`)
		}
	}
	return all
}

// page runs use-a-key.md as a reader would.
type page struct {
	*mount
	dir   string
	env   []string
	pairs []string // each old text and its new text
	tools int
}

// newPage mounts the engine at openai/ of a new Vault and prepares the reader's
// machine: a home directory, a PATH with sudo, and a copy of deploy/.
func newPage(t *testing.T) *page {
	t.Helper()
	v, err := startVault(t.Context(), plugin)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, v.Stop()) })
	p := &page{
		mount: mountAt(t, v, devenv.PluginName, "openai", openaitest.Start(t, openaitest.Options{})),
		dir:   t.TempDir(),
	}
	for _, folder := range []string{"bin", "home", "etc", "run"} {
		require.NoError(t, os.Mkdir(filepath.Join(p.dir, folder), 0o700))
	}
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "bin", "sudo"), []byte("#!/bin/sh\nexec \"$@\"\n"), 0o700))
	cli, err := v.CLIEnv()
	require.NoError(t, err)
	p.env = append(cli,
		"HOME="+filepath.Join(p.dir, "home"),
		"PATH="+filepath.Join(p.dir, "bin")+":"+filepath.Join(v.Dir, "bin")+":"+os.Getenv("PATH"))
	port, err := devenv.FreePort(t.Context())
	require.NoError(t, err)
	p.pairs = []string{
		"https://vault.example.com:8200", v.Addr,
		"https://api.openai.com/v1", p.sim.URL(),
		"127.0.0.1:8100", fmt.Sprintf("127.0.0.1:%d", port),
		"proj_abc", p.project,
		"/etc/openai-agent", filepath.Join(p.dir, "etc", "openai-agent"),
		"/run/openai", filepath.Join(p.dir, "run", "openai"),
		"/usr/local/bin", filepath.Join(p.dir, "bin"),
	}
	p.copyExamples()
	return p
}

func (p *page) replaced(text string) string { return strings.NewReplacer(p.pairs...).Replace(text) }

// copyExamples copies deploy/ to the reader's directory.
func (p *page) copyExamples() {
	p.t.Helper()
	root, err := devenv.Root()
	require.NoError(p.t, err)
	require.NoError(p.t, filepath.WalkDir(filepath.Join(root, "deploy"), func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		to := filepath.Join(p.dir, relative)
		if entry.IsDir() {
			return os.MkdirAll(to, 0o700)
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(to, []byte(p.replaced(string(content))), info.Mode())
	}))
}

// run runs the commands of a block and returns their standard output. It starts an
// Agent or a Proxy in the background and returns it.
func (p *page) run(b pageBlock) (out string, daemon *devenv.Tool) {
	p.t.Helper()
	script := ""
	for _, command := range b.commands() {
		if pageDaemon.MatchString(command) {
			require.Nil(p.t, daemon, "%s:%d: two background programs", useAKey, b.line)
			out += p.shell(b, script)
			script = ""
			p.tools++
			dir := filepath.Join(p.dir, "tool-"+strconv.Itoa(p.tools))
			require.NoError(p.t, os.Mkdir(dir, 0o700))
			daemon = p.tool(dir, p.env, "bash", "-c", "exec "+p.replaced(command))
			continue
		}
		script += command + "\n"
	}
	if script != "" {
		out += p.shell(b, script)
	}
	return out, daemon
}

func (p *page) shell(b pageBlock, script string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Minute)
	defer cancel()
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", p.replaced(script))
	cmd.Dir, cmd.Env, cmd.Stderr = p.dir, p.env, &stderr
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.Output()
	require.NoError(p.t, err, "%s:%d: %s\n%s%s", useAKey, b.line, script, out, stderr.String())
	return string(out)
}

// waitForKey waits until a file has a working key.
func (p *page) waitForKey(path string) string {
	p.t.Helper()
	var key string
	require.Eventually(p.t, func() bool {
		content, err := os.ReadFile(path)
		key = string(content)
		return err == nil && key != "" && infer(p.t, p.sim, key) == http.StatusOK
	}, time.Minute, 50*time.Millisecond, "no working key in %s", path)
	return key
}

// asksWithEachKey runs a program that sends a request for each line that it reads.
// It must use the current key in the file: the previous one is revoked.
func (p *page) asksWithEachKey(name string, program ...string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program[0], program[1:]...)
	cmd.Dir, cmd.Env, cmd.Stderr = p.dir, p.env, os.Stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(p.t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(p.t, err)
	require.NoError(p.t, cmd.Start())
	answers := bufio.NewScanner(stdout)
	for range 3 {
		l := p.creds("my-app")
		require.NoError(p.t, os.WriteFile(filepath.Join(p.dir, "run", "openai", "api-key"), []byte(l.key), 0o600))
		_, err := fmt.Fprintln(stdin)
		require.NoError(p.t, err)
		require.True(p.t, answers.Scan(), "%s exited without a response", name)
		require.Regexp(p.t, `^(200 OK|Hello from the simulator\.)$`, answers.Text())
		require.NoError(p.t, p.revoke(l))
	}
	require.NoError(p.t, stdin.Close())
	require.NoError(p.t, cmd.Wait())
}

// The test adds its own loop to the block of each language.
const (
	askInPython = `
import sys
for line in sys.stdin:
    print(ask("Say hello.")["output"][0]["content"][0]["text"], flush=True)
`
	askInNode = `
import { createInterface } from "node:readline";
for await (const line of createInterface({ input: process.stdin })) {
  console.log((await ask("Say hello.")).output[0].content[0].text);
}
`
	askInGo = `package main

import (
	"bufio"
	"os"
)

func main() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		once()
	}
}
`
)

// goProgram builds the page's Go block with another main, which calls the page's
// main as once.
func (p *page) goProgram(b pageBlock, output, main string) {
	p.t.Helper()
	dir := p.t.TempDir()
	code := strings.Replace(p.replaced(b.text), "func main() {", "func once() {", 1)
	for name, content := range map[string]string{"go.mod": "module example\n\ngo 1.26\n", "page.go": code, "main.go": main} {
		require.NoError(p.t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	cmd := exec.CommandContext(p.t.Context(), "go", "build", "-buildvcs=false", "-o", output, ".")
	cmd.Dir, cmd.Env = dir, append(cmd.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	require.NoError(p.t, err, "%s", out)
}

func TestUseAKeyPage(t *testing.T) {
	runParallel(t)
	p := newPage(t)
	keyFile := filepath.Join(p.dir, "run", "openai", "api-key")
	var agent *devenv.Tool
	done := map[string]int{}
	for _, b := range pageBlocks(t, useAKey) {
		require.False(t, b.mark == "" && (b.language != "console" || b.heading != "The role and the policy"), "%s:%d: no comment before the block", useAKey, b.line)
		if !strings.Contains(b.mark, t.Name()) && b.mark != "" {
			continue
		}
		part := b.heading + ", " + b.language
		done[part]++
		switch part {
		case "The role and the policy, console":
			p.run(b)
		case "Shell, console":
			if _, err := exec.LookPath("curl"); err != nil {
				t.Log("NOT TESTED: a shell block requires curl")
				continue
			}
			out, _ := p.run(b)
			require.Contains(t, out, "gpt-5-mini")
			if done[part] == 2 { // with-openai-key: only the key of the first block is left
				require.Eventually(t, func() bool { return len(p.alive()) == 1 }, time.Minute, 50*time.Millisecond)
			}
		case "Vault Agent, console":
			if _, tool := p.run(b); tool != nil {
				agent = tool
				p.waitForKey(keyFile)
			}
		case "Python, Node and Go, python":
			require.NoError(t, agent.Stop()) // from here on the test writes the file
			if python, err := exec.LookPath("python3"); err != nil {
				t.Log("NOT TESTED: the Python block requires python3")
			} else {
				p.asksWithEachKey(part, python, "-c", p.replaced(b.text)+askInPython)
			}
		case "Python, Node and Go, javascript":
			if node, err := exec.LookPath("node"); err != nil {
				t.Log("NOT TESTED: the Node block requires node")
			} else {
				program := filepath.Join(p.dir, "ask.mjs")
				require.NoError(t, os.WriteFile(program, []byte(p.replaced(b.text)+askInNode), 0o600))
				p.asksWithEachKey(part, node, program)
			}
		case "Python, Node and Go, go":
			program := filepath.Join(p.dir, "ask")
			p.goProgram(b, program, askInGo)
			p.asksWithEachKey(part, program)
		case "A program that reads its key at the start, console":
			started := filepath.Join(p.dir, "started")
			require.NoError(t, os.WriteFile(filepath.Join(p.dir, "bin", "my-app"), []byte("#!/bin/sh\nprintf %s \"$OPENAI_API_KEY\" >"+started+"\nexec sleep 600\n"), 0o700))
			_, tool := p.run(b)
			p.waitForKey(started)
			require.NoError(t, tool.Stop())
		case "Laptop and coding agents, console":
			p.laptop(b, done[part])
		default:
			t.Errorf("%s:%d: the test does not handle %q", useAKey, b.line, part)
		}
	}
	require.Equal(t, map[string]int{
		"The role and the policy, console": 1, "Shell, console": 2, "Vault Agent, console": 2,
		"Python, Node and Go, python": 1, "Python, Node and Go, javascript": 1, "Python, Node and Go, go": 1,
		"A program that reads its key at the start, console": 1, "Laptop and coding agents, console": 2,
	}, done)
}

// laptop runs the Proxy with a login's token, and then a tool's requests.
func (p *page) laptop(b pageBlock, n int) {
	t := p.t
	login := func(ttl string) {
		t.Helper()
		secret, err := p.client.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{"openai-my-app"}, TTL: ttl, ExplicitMaxTTL: ttl})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(p.dir, "home", ".vault-token"), []byte(secret.Auth.ClientToken), 0o600))
	}
	if n == 1 {
		p.env = slices.DeleteFunc(p.env, func(entry string) bool { return strings.HasPrefix(entry, "VAULT_TOKEN=") })
		login("20s")
		p.run(b)
		return
	}
	read := func() (string, error) {
		cmd := exec.CommandContext(t.Context(), "bash", "-c", p.replaced(b.commands()[0]))
		cmd.Dir, cmd.Env = p.dir, p.env
		out, err := cmd.Output()
		return string(out), err
	}
	var key string
	require.Eventually(t, func() bool {
		var err error
		key, err = read()
		return err == nil && key != ""
	}, time.Minute, 100*time.Millisecond, "no key from the Proxy")
	require.Equal(t, http.StatusOK, infer(t, p.sim, key))
	out, _ := p.run(b)
	require.Equal(t, key, out, "all reads must share one lease")
	codex := regexp.MustCompile(`(?m)^command = "(.*)"\nargs = \[(.*)\]`).FindStringSubmatch(p.readExample("coding-agents/codex.toml"))
	require.NotNil(t, codex)
	require.Equal(t, b.commands()[0], codex[1]+" "+strings.Join(strings.Split(strings.ReplaceAll(codex[2], `"`, ""), ", "), " "), "Codex must run the page's command")

	// The user logs in again before the login expires.
	login("10m")
	require.Eventually(t, func() bool { return infer(t, p.sim, key) == http.StatusUnauthorized }, time.Minute, 50*time.Millisecond, "the key still works after its login expired")
	began := time.Now()
	require.Eventually(t, func() bool {
		again, err := read()
		return err == nil && again != key && infer(t, p.sim, again) == http.StatusOK
	}, 2*time.Minute, 50*time.Millisecond, "no new key from the Proxy after the new login")
	t.Logf("the Proxy had a new key %s after the old one stopped working", time.Since(began).Round(time.Millisecond))
}

// readExample reads an unmodified file of deploy/.
func (p *page) readExample(name string) string {
	p.t.Helper()
	root, err := devenv.Root()
	require.NoError(p.t, err)
	content, err := os.ReadFile(filepath.Join(root, "deploy", name))
	require.NoError(p.t, err)
	return string(content)
}

const (
	// testCommand is the "test" command that the health check needs.
	testCommand = `package main

import "os"

func main() {
	if info, err := os.Stat(os.Args[2]); os.Args[1] != "-s" || err != nil || info.Size() == 0 {
		os.Exit(1)
	}
}
`
	askAndAgain = `package main

import "time"

func main() {
	for ; ; time.Sleep(100 * time.Millisecond) {
		once()
	}
}
`
)

func TestTheComposeFileKeepsAKeyForTheProgram(t *testing.T) {
	if _, err := devenv.FindDocker(t.Context()); err != nil {
		t.Skipf("NOT TESTED: the Compose file requires Docker: %v", err)
	}
	compose := []string{"docker", "compose"}
	if exec.CommandContext(t.Context(), "docker", "compose", "version").Run() != nil {
		compose = []string{"docker-compose"}
		if _, err := exec.LookPath(compose[0]); err != nil {
			t.Skip("NOT TESTED: the Compose file requires Compose")
		}
	}
	runParallel(t)
	p := newPage(t)
	blocks := pageBlocks(t, useAKey)
	for _, b := range blocks {
		// Only the login of the Agent's section: here it runs in a container.
		if b.heading == "The role and the policy" || b.heading == "Vault Agent" && !strings.Contains(b.text, "vault agent") {
			p.run(b)
		}
	}

	// The containers use the page's paths, and reach Vault and the simulator at the
	// host's address in Docker's network.
	target, err := url.Parse(p.vault.Addr)
	require.NoError(t, err)
	vaultURL := serveOnBridge(t, httputil.NewSingleHostReverseProxy(target))
	apiURL := serveOnBridge(t, p.sim) + "/v1"
	version := ownVersion()
	own := devenv.Image{Repository: "openai-compose-test", Version: version}
	vaultImage, appImage := own.Repository+"-vault:"+strings.TrimPrefix(version, "v"), own.Repository+"-app:"+strings.TrimPrefix(version, "v")
	user := fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid())
	p.pairs = []string{
		"https://vault.example.com:8200", vaultURL,
		"https://api.openai.com/v1", apiURL,
		"hashicorp/vault:1.21.2", vaultImage,
		"image: my-app", "image: " + appImage,
		"1000:1000", user,
		"uid=1000,gid=1000", fmt.Sprintf("uid=%d,gid=%d", os.Getuid(), os.Getgid()),
		"docker compose", strings.Join(compose, " "),
	}
	require.NoError(t, os.RemoveAll(filepath.Join(p.dir, "deploy")))
	p.copyExamples()

	images := t.TempDir()
	vaultContext, appContext := filepath.Join(images, "vault"), filepath.Join(images, "app")
	for _, folder := range []string{vaultContext, appContext} {
		require.NoError(t, os.Mkdir(folder, 0o700))
	}
	server, err := os.ReadFile(p.vault.Binary())
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(vaultContext, "vault"), server, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(vaultContext, "Dockerfile"), []byte("FROM scratch\nCOPY vault test /bin/\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(appContext, "Dockerfile"), []byte("FROM scratch\nCOPY my-app /bin/\nENTRYPOINT [\"my-app\"]\n"), 0o600))
	p.goProgram(pageBlock{text: strings.Replace(testCommand, "func main() {", "func check() {", 1)}, filepath.Join(vaultContext, "test"), "package main\n\nfunc main() { check() }\n")
	for _, b := range blocks {
		if b.language == "go" {
			p.goProgram(b, filepath.Join(appContext, "my-app"), askAndAgain)
		}
	}
	buildImage(t, own, "vault", vaultContext)
	buildImage(t, own, "app", appContext)

	project := strings.NewReplacer(".", "-").Replace(own.Repository + "-" + version)
	p.env = append(p.env, "COMPOSE_PROJECT_NAME="+project, "DOCKER_HOST="+os.Getenv("DOCKER_HOST"))
	composed := func(ctx context.Context, args ...string) string {
		cmd := exec.CommandContext(ctx, compose[0], append(compose[1:], args...)...)
		cmd.Dir, cmd.Env = p.dir, p.env
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return string(out)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute)
		defer cancel()
		log := composed(ctx, "logs")
		if t.Failed() {
			t.Logf("%s", log)
		}
		for _, secret := range p.sim.Secrets() {
			require.NotContains(t, log, secret)
		}
		composed(ctx, "down", "--volumes", "--timeout", "5")
	})
	ran := false
	for _, b := range blocks {
		if strings.Contains(b.mark, t.Name()) {
			p.run(b)
			ran = true
		}
	}
	require.True(t, ran)

	answered := func() (ok, other int) {
		for line := range strings.Lines(composed(t.Context(), "logs", "my-app")) {
			switch {
			case strings.HasSuffix(line, "200 OK\n"):
				ok++
			case strings.Contains(line, "|"):
				other++
			}
		}
		return ok, other
	}
	require.Eventually(t, func() bool { ok, _ := answered(); return ok >= 10 }, time.Minute, 500*time.Millisecond, "too few responses to the program")
	_, other := answered()
	require.Zero(t, other, "a request had no working key")
	require.Len(t, p.alive(), 1)
	options, err := devenv.Docker(t.Context(), "volume", "inspect", "--format", "{{.Options.type}}", project+"_openai-key")
	require.NoError(t, err)
	require.Equal(t, "tmpfs", options)
}

func TestTheSystemdUnitsAreValid(t *testing.T) {
	runParallel(t)
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("NOT TESTED: the systemd units require systemd-analyze")
	}
	root, err := devenv.Root()
	require.NoError(t, err)
	units, err := filepath.Glob(filepath.Join(root, "deploy", "systemd", "*"))
	require.NoError(t, err)
	require.Len(t, units, 4)
	units = append(units, filepath.Join(root, "deploy", "broker", "openai-broker.service"))
	verify := func(change func(string) string) error {
		dir := t.TempDir()
		var files []string
		for _, unit := range units {
			content, err := os.ReadFile(unit)
			require.NoError(t, err)
			// The programs must exist; any program will do.
			text := strings.NewReplacer("/usr/bin/vault", "/bin/sh", "/usr/local/bin/my-app", "/bin/sh", "/usr/bin/systemctl", "/bin/sh", "/usr/local/bin/openai-broker", "/bin/sh").Replace(string(content))
			file := filepath.Join(dir, filepath.Base(unit))
			require.NoError(t, os.WriteFile(file, []byte(change(text)), 0o600))
			files = append(files, file)
		}
		cmd := exec.CommandContext(t.Context(), analyze, append([]string{"verify", "--man=no"}, files...)...)
		out, err := cmd.CombinedOutput()
		for _, line := range strings.Split(string(out), "\n") {
			if strings.Contains(line, dir) { // ignores lines about the machine's other units
				return fmt.Errorf("%s", line)
			}
		}
		return err
	}
	require.NoError(t, verify(func(text string) string { return text }))
	require.Error(t, verify(func(text string) string { return strings.Replace(text, "LoadCredential=", "LoadCredentials=", 1) }), "an unknown field must be an error")
}
