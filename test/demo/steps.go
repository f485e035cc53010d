package main

// The steps of the demo: what it starts, which commands it runs, the result
// that each must have, and the cleanup.

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

type demo struct {
	out   io.Writer
	live  bool
	env   []string // of the commands
	api   *api     // with the user's own admin key
	vault *devenv.Vault
	sim   *devenv.Simulator

	plugin    devenv.Plugin
	mounted   bool
	keyName   string   // of the admin key that the demo creates for Vault
	adminKeys []string // IDs of all admin keys that exist because of the demo
	accounts  []string // IDs of all service accounts that Vault created
	secrets   []string // never printed in full
	bin       string   // folder of the binaries that the demo built
}

// start builds and starts the plugin, Vault and the simulator, and creates an
// admin key for Vault, which will rotate it.
func (d *demo) start(ctx context.Context, user *api) (err error) {
	fmt.Fprintln(d.out, "Finding a Vault server.")
	vaultBin, err := devenv.FindVault(ctx)
	if err != nil {
		return err
	}
	if d.bin, err = os.MkdirTemp("", "vault-openai-demo-"); err != nil {
		return err
	}
	if user == nil {
		fmt.Fprintln(d.out, "Building and starting the simulator of OpenAI's API.")
		bin := filepath.Join(d.bin, "openai-sim")
		if err := devenv.Build(ctx, bin, "./cmd/openai-sim"); err != nil {
			return err
		}
		if d.sim, err = devenv.StartSimulator(ctx, bin, "demo"); err != nil {
			return err
		}
		user = newAPI(d.sim.URL, d.sim.AdminKey, d.sim.Projects[0].ID)
	} else {
		fmt.Fprintf(d.out, "OPENAI_ADMIN_KEY is set: using %s, project %s.\n", user.base, user.project)
	}
	d.api = user
	d.secrets = append(d.secrets, user.key)

	fmt.Fprintln(d.out, "Starting Vault and building the plugin.")
	if d.vault, err = devenv.Start(ctx, devenv.Options{VaultBin: vaultBin, Env: d.env}); err != nil {
		return err
	}
	if d.plugin, err = devenv.BuildPlugin(ctx, d.vault.PluginDir, devenv.BuildOptions{}); err != nil {
		return err
	}

	d.keyName = "vault-demo-" + strings.ToLower(rand.Text()[:6])
	// An interrupt does not cancel this request: OpenAI could still create the
	// key, after the cleanup.
	var expiry time.Duration
	if d.live { // in case the demo is killed
		expiry = time.Hour
	}
	id, value, err := user.createAdminKey(context.WithoutCancel(ctx), d.keyName, expiry)
	if err != nil {
		return err
	}
	d.adminKeys = append(d.adminKeys, id)
	d.secrets = append(d.secrets, value)
	if d.live {
		fmt.Fprintf(d.out, "Created an admin key for Vault (%s, %s). It expires in an hour in case this program is killed. Yours is not rotated.\n", d.keyName, id)
	} else {
		fmt.Fprintf(d.out, "Created an admin key for Vault (%s, %s).\n", d.keyName, id)
	}

	cli, err := d.vault.CLIEnv()
	if err != nil {
		return err
	}
	d.env = append(cli, d.env...)
	d.set("OPENAI_BASE_URL", user.base)
	d.set("OPENAI_PROJECT_ID", user.project)
	d.set("OPENAI_ADMIN_KEY", value)
	fmt.Fprintf(d.out, "\n%s at %s, the API at %s. Keys are shortened below; output is otherwise unmodified.\n", d.vault, d.vault.Addr, user.base)
	return nil
}

// configure runs the operator's commands.
func (d *demo) configure(ctx context.Context) error {
	if _, err := d.run(ctx, "Register the plugin by its checksum and version",
		fmt.Sprintf("vault plugin register -sha256=%s -version=%s secret %s", d.plugin.SHA256, d.plugin.Version, devenv.PluginName)); err != nil {
		return err
	}
	if _, err := d.run(ctx, "Enable the engine", "vault secrets enable -path=openai "+devenv.PluginName); err != nil {
		return err
	}
	d.mounted = true
	if _, err := d.run(ctx, "Configure the admin key; the engine looks up its ID",
		`printf %s "$OPENAI_ADMIN_KEY" | vault write openai/config admin_api_key=- api_endpoint="$OPENAI_BASE_URL" rotation_grace_period=5s`); err != nil {
		return err
	}
	config, err := d.run(ctx, "", "vault read openai/config")
	if err != nil {
		return err
	}
	if err := want(config["admin_api_key_id"] == d.adminKeys[0], "the config to name admin key %s, not %q", d.adminKeys[0], config["admin_api_key_id"]); err != nil {
		return err
	}
	projects, err := d.run(ctx, "List the projects that the key can access", "vault list -detailed openai/projects")
	if err != nil {
		return err
	}
	if err := want(d.live || projects[d.api.project] != "", "project %s in the list", d.api.project); err != nil {
		return err
	}
	_, err = d.run(ctx, "Create a role; anyone who can read openai/creds/demo gets a key for this project",
		`vault write openai/roles/demo project_id="$OPENAI_PROJECT_ID" ttl=1h max_ttl=24h`)
	return err
}

// lifecycle reads, uses and renews a key, rotates the admin key, and revokes.
func (d *demo) lifecycle(ctx context.Context) error {
	first, err := d.read(ctx, "Get a key with a lease of one hour", "vault read openai/creds/demo", "1h")
	if err != nil {
		return err
	}
	if err := d.infer(ctx, "Use the key", first["api_key"], 200); err != nil {
		return err
	}
	if err := d.report(ctx, first["api_key"]); err != nil {
		return err
	}
	if _, err := d.read(ctx, "Get another key, with a lease of 30 minutes", "vault read openai/creds/demo ttl=30m", "30m"); err != nil {
		return err
	}

	d.set("LEASE_ID", first["lease_id"])
	renewed, err := d.run(ctx, "Renew the first lease", `vault lease renew -increment=2h "$LEASE_ID"`)
	if err != nil {
		return err
	}
	if err := want(renewed["lease_duration"] == "2h", "a lease of 2h, not of %s", renewed["lease_duration"]); err != nil {
		return err
	}

	rotated, err := d.run(ctx, "Rotate the admin key. Only Vault knows the new key, and requests continue meanwhile", "vault write -f openai/config/rotate")
	if err != nil {
		return err
	}
	config, err := d.run(ctx, "", "vault read openai/config")
	if err != nil {
		return err
	}
	current := config["admin_api_key_id"]
	if err := want(current != "" && current != d.adminKeys[0], "a new admin_api_key_id, not %q", current); err != nil {
		return err
	}
	d.adminKeys = append(d.adminKeys, current)
	if err := want(rotated["admin_api_key_id"] == current, "rotate to return the new key %s, not %q", current, rotated["admin_api_key_id"]); err != nil {
		return err
	}
	if err := want(config["superseded_admin_keys"] == "1" || config["superseded_admin_keys"] == "0", "superseded_admin_keys to be 0 or 1, not %q", config["superseded_admin_keys"]); err != nil {
		return err
	}
	if _, err := d.read(ctx, "Get a key after the rotation", "vault read openai/creds/demo", "1h"); err != nil {
		return err
	}

	if _, err := d.run(ctx, "Revoke the first lease", `vault lease revoke -sync "$LEASE_ID"`); err != nil {
		return err
	}
	if err := d.infer(ctx, "The key is invalid", first["api_key"], 401); err != nil {
		return err
	}
	_, err = d.run(ctx, "Revoke all leases of the role", "vault lease revoke -prefix -sync openai/creds/demo")
	return err
}

// read runs a command that reads a credential, and checks the response.
func (d *demo) read(ctx context.Context, title, command, duration string) (map[string]string, error) {
	cred, err := d.run(ctx, title, command)
	if err != nil {
		return nil, err
	}
	d.accounts = append(d.accounts, cred["service_account_id"])
	if err := want(cred["api_key"] != "" && cred["lease_id"] != "" && cred["service_account_id"] != "", "a key with a lease and an account"); err != nil {
		return nil, err
	}
	return cred, want(cred["lease_duration"] == duration, "a lease of %s, not of %s", duration, cred["lease_duration"])
}

// infer calls the inference API with a key. At the real API a change can take
// a moment to reach every server, so it repeats the request for a while.
func (d *demo) infer(ctx context.Context, title, key string, status int) error {
	d.set("OPENAI_API_KEY", key)
	command := `curl -sS -w '\nHTTP %{http_code}\n' -H "Authorization: Bearer $OPENAI_API_KEY" "$OPENAI_BASE_URL/models"`
	got, output := 0, ""
	for deadline := time.Now().Add(15 * time.Second); ; {
		var err error
		if _, missing := exec.LookPath("curl"); missing == nil {
			output, err = d.shell(ctx, command)
			if err == nil {
				_, err = fmt.Sscanf(output[max(0, strings.LastIndex(output, "HTTP ")):], "HTTP %d", &got)
			}
		} else {
			got, err = d.api.call(ctx, key, "GET", "/models", nil, nil)
			output = fmt.Sprintf("HTTP %d   (curl is not on the PATH; this program sent the same request)\n", got)
		}
		if err != nil {
			d.show(title, command, output)
			return err
		}
		if got == status || time.Now().After(deadline) {
			break
		}
		time.Sleep(time.Second)
	}
	d.show(title, command, output)
	return want(got == status, "status %d from the inference API, not %d", status, got)
}

// report sends a request to a model and reads the costs of each role. The real API
// reports costs hours later, so there it sends no request.
func (d *demo) report(ctx context.Context, key string) error {
	if d.live {
		_, err := d.run(ctx, "Read what each role has cost. OpenAI reports the costs of this demo later", "vault read openai/usage")
		return err
	}
	if status, err := d.api.call(ctx, key, "POST", "/responses", map[string]any{"input": "hello"}, nil); err != nil || status != 200 {
		return fmt.Errorf("a request with the key: status %d: %w", status, err)
	}
	costs, err := d.run(ctx, "After a request to a model, read what each role has cost", "vault read openai/usage")
	if err != nil {
		return err
	}
	return want(costs["cost_demo"] == "0.000056" && costs["total"] == costs["cost_demo"], "the cost of one request, not %q of %q", costs["cost_demo"], costs["total"])
}

// nothingIsLeft disables the engine, deletes the demo's admin keys and checks
// that no account and no key is left.
func (d *demo) nothingIsLeft(ctx context.Context) error {
	left, err := d.remainingAccounts(ctx)
	if err != nil {
		return err
	}
	d.show("Check which service accounts are left", requestLine("GET …/organization/projects/$OPENAI_PROJECT_ID/service_accounts"),
		fmt.Sprintf("%d of the %d service accounts that Vault created\n", len(left), len(d.accounts)))
	if err := want(len(left) == 0, "no account left, not %v", left); err != nil {
		return err
	}
	if _, err := d.run(ctx, "Disable the engine", "vault secrets disable openai"); err != nil {
		return err
	}
	d.mounted = false
	made := len(d.adminKeys)
	if err := d.removeAdminKeys(ctx); err != nil {
		return err
	}
	keys, err := d.api.adminKeys(ctx)
	if err != nil {
		return err
	}
	remaining := slices.DeleteFunc(keys, func(k item) bool { return !d.isOurs(k) })
	d.show("Delete the admin keys of the demo with the user's own key", requestLine("DELETE …/organization/admin_api_keys/$ID, GET …/organization/admin_api_keys"),
		fmt.Sprintf("%d of the %d admin keys of the demo are left\n", len(remaining), made))
	return want(len(remaining) == 0, "no admin key of the demo left, not %v", remaining)
}

func (d *demo) isOurs(k item) bool {
	return strings.HasPrefix(k.Name, d.keyName) || slices.Contains(d.adminKeys, k.ID)
}

func (d *demo) remainingAccounts(ctx context.Context) ([]item, error) {
	accounts, err := d.api.serviceAccounts(ctx)
	return slices.DeleteFunc(accounts, func(a item) bool { return !slices.Contains(d.accounts, a.ID) }), err
}

func (d *demo) removeAdminKeys(ctx context.Context) error {
	var errs []error
	for _, id := range d.adminKeys {
		errs = append(errs, d.api.deleteAdminKey(ctx, id))
	}
	return errors.Join(errs...)
}

// cleanUp deletes and stops everything that still exists. After a successful run,
// only the processes are left.
func (d *demo) cleanUp(ctx context.Context) error {
	var errs []error
	if d.mounted {
		// Disabling revokes all leases. Read the ID of the current admin key first:
		// it may have been rotated in the meantime.
		if out, err := d.shell(ctx, "vault read -field=admin_api_key_id openai/config"); err == nil {
			d.adminKeys = append(d.adminKeys, strings.TrimSpace(out))
		}
		if out, err := d.shell(ctx, "vault secrets disable openai"); err != nil {
			errs = append(errs, fmt.Errorf("disabling the engine to revoke its leases: %w\n%s", err, d.shorten(out)))
		}
	}
	if d.live && d.keyName != "" {
		// Also by name, since the ID of a key is unknown if the response was lost.
		keys, err := d.api.adminKeys(ctx)
		errs = append(errs, err)
		for _, k := range keys {
			if d.isOurs(k) && !slices.Contains(d.adminKeys, k.ID) {
				d.adminKeys = append(d.adminKeys, k.ID)
			}
		}
		errs = append(errs, d.removeAdminKeys(ctx))
	}
	if d.live && len(d.accounts) > 0 {
		left, err := d.remainingAccounts(ctx)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("service accounts left in project %s: %v", d.api.project, left)
		}
		errs = append(errs, err)
	}
	if d.vault != nil {
		errs = append(errs, d.vault.Stop())
	}
	if d.sim != nil {
		d.sim.Stop()
	}
	if d.bin != "" {
		errs = append(errs, os.RemoveAll(d.bin))
	}
	return errors.Join(errs...)
}

func (d *demo) printExports() {
	fmt.Fprintf(d.out, "\nReady. Press Ctrl-C to stop. To use it from another terminal, paste:\n\n")
	fmt.Fprintf(d.out, "export VAULT_ADDR=%s\nexport VAULT_TOKEN=%s\n", d.vault.Addr, d.vault.RootToken)
	if _, err := exec.LookPath("vault"); err != nil {
		fmt.Fprintf(d.out, "export PATH=%q:$PATH\n", filepath.Join(d.vault.Dir, "bin"))
	}
	fmt.Fprintf(d.out, "export OPENAI_BASE_URL=%s\nexport OPENAI_PROJECT_ID=%s\n", d.api.base, d.api.project)
	if !d.live { // the user has a real one already
		fmt.Fprintf(d.out, "export OPENAI_ADMIN_KEY=%s\n", d.api.key)
	}
	fmt.Fprintf(d.out, "\n  vault read openai/creds/demo\n  vault path-help openai\n\nVault's log: %s\n", d.vault.LogPath)
	fmt.Fprint(d.out, rotatable)
	if d.live {
		fmt.Fprint(d.out, "\nTo configure another mount, create another admin key.\n")
		return
	}
	fmt.Fprintf(d.out, "\nTo configure another mount, create an admin key for it:\n\n  %s\n", createKeyCommand)
}

// rotatable explains to users of -dev which admin key a rotation deletes.
const rotatable = `
Safe to rotate: the admin key of the mount openai/, with "vault write -f openai/config/rotate".
Do not write OPENAI_ADMIN_KEY to a config: the mount's first rotation deletes the key
that it was configured with, and the variables above stop working.
`

// createKeyCommand prints the value of a new admin key.
const createKeyCommand = `curl -sS -H "Authorization: Bearer $OPENAI_ADMIN_KEY" -H 'Content-Type: application/json' -d '{"name":"my-mount"}' "$OPENAI_BASE_URL/organization/admin_api_keys"`

// run runs a command in a shell exactly as it is shown, prints its output, and
// returns the output's table of keys and values.
func (d *demo) run(ctx context.Context, title, command string) (map[string]string, error) {
	output, err := d.shell(ctx, command)
	table := map[string]string{}
	for line := range strings.Lines(output) {
		if key, value, ok := strings.Cut(strings.TrimRight(line, "\n"), " "); ok {
			table[key] = strings.TrimSpace(value)
		}
	}
	if key := table["api_key"]; key != "" {
		d.secrets = append(d.secrets, key)
	}
	d.show(title, command, output)
	if err != nil {
		return nil, fmt.Errorf("the command above failed: %w", err)
	}
	return table, nil
}

func (d *demo) shell(ctx context.Context, command string) (string, error) {
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.Env = d.env
	cmd.WaitDelay = 5 * time.Second // for processes of an interrupted shell
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (d *demo) set(name, value string) { d.env = append(d.env, name+"="+value) }

// show prints a step. It shortens long output, such as the list of models.
func (d *demo) show(title, command, output string) {
	if title != "" {
		fmt.Fprintf(d.out, "\n# %s\n", title)
	}
	if !strings.HasPrefix(command, requestPrefix) {
		command = "$ " + command
	}
	fmt.Fprintln(d.out, command)
	lines := strings.Split(strings.TrimSpace(d.shorten(output)), "\n")
	const most = 24
	if len(lines) > most {
		lines = append(append(lines[:most-6:most-6], fmt.Sprintf("[%d more lines]", len(lines)-most+1)), lines[len(lines)-5:]...)
	}
	for _, line := range lines {
		fmt.Fprintln(d.out, line)
	}
}

// requestLine formats a request that this program sends itself, so that it does not
// look like a command to type.
func requestLine(requests string) string { return requestPrefix + requests }

const requestPrefix = "(sent by this program with the user's own admin key) "

// looksLikeAKey finds keys that the demo does not know, for example in an error.
var looksLikeAKey = regexp.MustCompile(`\bsk-[A-Za-z0-9_-]{16,}`)

// shorten truncates each key to a prefix that identifies it.
func (d *demo) shorten(s string) string {
	for _, secret := range d.secrets {
		s = strings.ReplaceAll(s, secret, secret[:min(14, len(secret)/2)]+"…")
	}
	return looksLikeAKey.ReplaceAllStringFunc(s, func(key string) string { return key[:14] + "…" })
}

// want returns an error with the expected result of a step, unless ok is true.
func want(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf("unexpected result of the step above: want "+format, args...)
}
