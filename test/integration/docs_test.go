//go:build integration

package integration

// The commands of the README and of the pages in docs/ run unchanged, page by
// page and in order, on a real Vault and against the simulator. A comment before
// a block that does not run gives the reason:
//
//	<!-- not run: the reason -->
//	<!-- run by: TestOfThatName -->
//
// The sample output of a block must match the real output: the first column of each
// line starts a line of the real output. An ellipsis stands for the rest of a line,
// or for other lines.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/test/devenv"
)

// substitute replaces only these placeholders in a command:
//
//	proj_abc, proj_ci                     a project
//	user-abc                              an unused service account in it
//	admin_api_key=@admin-key.txt          the same, and the simulator's URL
//
// bin/vault-plugin-secrets-openai, admin-key.txt and deploy/ exist.
func (p *docsPage) substitute(command string) string {
	return strings.NewReplacer(
		"proj_abc", p.project,
		"proj_ci", p.project,
		"user-abc", p.account,
		"admin_api_key=@admin-key.txt", "admin_api_key=@admin-key.txt api_endpoint="+p.sim.URL(),
	).Replace(command)
}

// docsPage is the environment of a page: the configured engine at openai/ with a role
// my-app and a static role batch, unless the page mounts the engine.
type docsPage struct {
	sim              *openaitest.Server
	project, account string
	dir              string
	env              []string
}

type docsBlock struct {
	line   int
	mark   string // the comment before it, or ""
	script string
	// shown are the lines of sample output.
	shown []string
	// foreign is the first command that is not a vault command.
	foreign string
}

var (
	docsFence = regexp.MustCompile("^ *(```+|~~~+) *([a-z]*)")
	docsMark  = regexp.MustCompile(`^<!-- (not run|run by): (.{10,}) -->$`)
)

// docsBlocks returns the command blocks of a page. The language of a block with
// commands must be console.
func docsBlocks(t *testing.T, page, text string) []docsBlock {
	t.Helper()
	var blocks []docsBlock
	fence, language, before := "", "", ""
	var current *docsBlock
	continued := false
	for i, line := range strings.Split(text, "\n") {
		if m := docsFence.FindStringSubmatch(line); m != nil && (fence == "" || strings.HasPrefix(m[1], fence) && m[2] == "") {
			if fence != "" {
				fence, current = "", nil
				continue
			}
			fence, language = m[1], m[2]
			if language == "console" {
				mark := ""
				if docsMark.MatchString(before) {
					mark = before
				}
				blocks = append(blocks, docsBlock{line: i + 1, mark: mark})
				current = &blocks[len(blocks)-1]
			}
			before, continued = "", false
			continue
		}
		if fence == "" {
			before = strings.TrimSpace(line) // in a list, it is indented
			continue
		}
		command, isCommand := strings.CutPrefix(strings.TrimSpace(line), "$ ")
		if isCommand && current == nil {
			t.Errorf("%s:%d: a command in a block whose language is not console", page, i+1)
		}
		if current != nil && (isCommand || continued) {
			if !isCommand {
				command = line
			}
			if isCommand && !strings.HasPrefix(command, "vault ") && current.foreign == "" {
				current.foreign = command
			}
			current.script += command + "\n"
			continued = strings.HasSuffix(command, `\`)
		} else if current != nil {
			current.shown = append(current.shown, strings.TrimSpace(line))
		}
	}
	return blocks
}

func TestTheDocumentedCommandsRun(t *testing.T) {
	runParallel(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	pages := []string{"README.md"}
	require.NoError(t, filepath.WalkDir(filepath.Join(root, "docs"), func(path string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(path, ".md") {
			relative, _ := filepath.Rel(root, path)
			pages = append(pages, relative)
		}
		return err
	}))
	tests, err := filepath.Glob(filepath.Join(root, "test", "integration", "*_test.go"))
	require.NoError(t, err)
	var code strings.Builder
	for _, name := range tests {
		content, err := os.ReadFile(name)
		require.NoError(t, err)
		code.Write(content)
	}

	// The pages use this version and this file name.
	work := t.TempDir()
	built, err := devenv.BuildPlugin(t.Context(), t.TempDir(), devenv.BuildOptions{Version: "v0.1.0"})
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(filepath.Join(work, "bin"), 0o700))
	require.NoError(t, os.Rename(built.Path, filepath.Join(work, "bin", devenv.PluginName)))
	built.Path = filepath.Join(work, "bin", devenv.PluginName)
	require.NoError(t, os.Symlink(filepath.Join(root, "deploy"), filepath.Join(work, "deploy")))
	v, err := devenv.Start(t.Context(), serverOptions())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, v.Stop()) })
	require.NoError(t, v.Register(t.Context(), built)) // which copies it to the plugin directory
	built.Path = filepath.Join(v.PluginDir, devenv.PluginName)
	env, err := v.CLIEnv()
	require.NoError(t, err)

	run := 0
	for _, page := range pages {
		content, err := os.ReadFile(filepath.Join(root, page))
		require.NoError(t, err)
		blocks := docsBlocks(t, page, string(content))
		var script string
		for _, block := range blocks {
			if name, ok := strings.CutPrefix(block.mark, "<!-- run by: "); ok {
				name = regexp.MustCompile(`^\w+`).FindString(name)
				require.Contains(t, code.String(), "func "+name+"(", "%s:%d: test not found", page, block.line)
			}
			if block.mark != "" {
				continue
			}
			require.NotEmpty(t, block.script, "%s:%d: no command in the block", page, block.line)
			if block.foreign != "" {
				// It might build, push or call a service, so it needs a comment.
				t.Errorf("%s:%d: not a vault command, so it needs a comment (not run, run by): %s", page, block.line, block.foreign)
				continue
			}
			script += block.script
			run++
		}
		if script == "" {
			continue
		}
		t.Run(page, func(t *testing.T) {
			p := newDocsPage(t, v, built, work, env)
			if !strings.Contains(script, "vault secrets enable -path=openai ") {
				p.prepare(t)
			}
			t.Cleanup(func() {
				p.end(t)
				if strings.Contains(script, "vault delete openai/config") {
					p.deleteLeftAdminKeys() // as the page instructs
				}
			})
			for _, block := range blocks {
				if block.mark == "" && block.foreign == "" {
					at := fmt.Sprintf("%s:%d", page, block.line)
					out := p.run(t, at, block.script)
					for _, line := range block.shown {
						if want := p.substitute(firstColumn(line)); !beginsALine(out, want) {
							t.Errorf("%s: no line of the output begins with %q:\n%s", at, want, out)
						}
					}
				}
			}
		})
	}
	require.Greater(t, run, 15, "too few blocks found")
}

func newDocsPage(t *testing.T, v *devenv.Vault, plugin devenv.Plugin, work string, env []string) *docsPage {
	t.Helper()
	p := &docsPage{sim: openaitest.Start(t, openaitest.Options{}), dir: work, env: env}
	p.project = p.sim.AddProject("apps")
	p.sim.SetSpendLimit(p.project, 10_000)
	p.sim.SetModelPermissions(p.project, "allow_list", "gpt-5-mini")
	p.account = p.sim.AddServiceAccount(p.project, "batch")
	p.newAdminKey(t)
	require.NoError(t, v.Register(t.Context(), plugin)) // a page may deregister it
	return p
}

func (p *docsPage) prepare(t *testing.T) {
	t.Helper()
	p.run(t, "setup", `vault secrets enable -path=openai vault-plugin-secrets-openai
vault write openai/config admin_api_key=@admin-key.txt
vault write openai/roles/my-app project_id=proj_abc
vault write openai/static-roles/batch project_id=proj_abc rotation_period=24h
`)
}

// newAdminKey writes a new admin key to admin-key.txt, as a user would.
func (p *docsPage) newAdminKey(t *testing.T) {
	t.Helper()
	_, key := p.sim.AddAdminKey("for Vault")
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "admin-key.txt"), []byte(key+"\n"), 0o600))
}

// end disables a mount that the page left, with a valid admin key, so that the
// simulator finds no leftovers.
func (p *docsPage) end(t *testing.T) {
	t.Helper()
	p.newAdminKey(t)
	p.run(t, "cleanup", `mounts=$(vault secrets list)
if grep -q ^openai/ <<<"$mounts"; then
vault write openai/config admin_api_key=@admin-key.txt
vault delete openai/static-roles/batch
vault secrets disable openai/
fi`)
}

// deleteLeftAdminKeys deletes the admin keys that the engine created, as a user
// would at OpenAI.
func (p *docsPage) deleteLeftAdminKeys() {
	for _, key := range p.sim.AdminKeys() {
		if strings.HasPrefix(key.Name, "vault-admin-") {
			p.sim.DeleteAdminKey(key.ID)
		}
	}
}

// firstColumn returns the part of a sample line that the real output must have: up to
// two spaces, an ellipsis or the value of a JSON field. It leaves out random values.
func firstColumn(line string) string {
	end := len(line)
	for _, mark := range []string{"  ", "…", "...", "\": "} {
		if i := strings.Index(line, mark); i >= 0 {
			end = min(end, i)
		}
	}
	return line[:end]
}

// beginsALine reports whether a line of a block's output begins with want. "vault read
// -field" ends without a newline.
func beginsALine(text, want string) bool {
	text = strings.ReplaceAll(text, "Success! ", "\nSuccess! ")
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), want) {
			return true
		}
	}
	return want == ""
}

// run runs a block as one script that fails on any error, and returns its output.
func (p *docsPage) run(t *testing.T, at, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", p.substitute(script))
	cmd.WaitDelay = 5 * time.Second
	cmd.Dir, cmd.Env = p.dir, p.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s\n%s", at, err, script, out)
	}
	return string(out)
}
