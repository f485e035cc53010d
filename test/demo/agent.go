package main

// The last step: an agent that uses the API without holding a key.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

// agentWithoutKey runs an agent under openai-broker that prints its environment
// and uses the API, and checks that no key is left.
func (d *demo) agentWithoutKey(ctx context.Context) error {
	if _, err := exec.LookPath("curl"); err != nil {
		fmt.Fprintln(d.out, "\nSkipped: an agent under openai-broker, since curl is not on PATH.")
		return nil //nolint:nilerr // the rest of the demo needs no curl
	}
	if err := devenv.Build(ctx, filepath.Join(d.bin, "openai-broker"), "./cmd/openai-broker"); err != nil {
		return err
	}
	for _, entry := range slices.Backward(d.env) {
		if path, found := strings.CutPrefix(entry, "PATH="); found {
			d.set("PATH", d.bin+string(os.PathListSeparator)+path)
			break
		}
	}
	before, err := d.api.serviceAccounts(ctx)
	if err != nil {
		return err
	}
	command := `openai-broker run -role demo -upstream "$OPENAI_BASE_URL" -- sh -c '
  env | grep -E "VAULT|OPENAI_(API|ADMIN)_KEY|OPENAI_BASE_URL"
  curl -sS -o /dev/null -w "HTTP %{http_code}\n" -H "Authorization: Bearer $OPENAI_API_KEY" "$OPENAI_BASE_URL/models"'`
	output, err := d.shell(ctx, command)
	d.show("An agent prints its environment, and uses the API. It has a placeholder, and no key", command, output)
	if err != nil {
		return fmt.Errorf("the command above failed: %w", err)
	}
	if err := want(strings.Contains(output, "HTTP 200"), "HTTP 200 for the agent's request"); err != nil {
		return err
	}
	if err := want(strings.Contains(output, "OPENAI_API_KEY=sk-broker-") && !strings.Contains(output, "VAULT") &&
		!strings.Contains(output, "ADMIN") && strings.Count(output, "sk-") == 1, "a placeholder and no key"); err != nil {
		return err
	}
	var left []item
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		now, err := d.api.serviceAccounts(ctx)
		if err != nil {
			return err
		}
		left = slices.DeleteFunc(now, func(a item) bool { return slices.Contains(before, a) })
		if len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	d.show("The agent has ended, and so has its key", requestLine("GET …/organization/projects/$OPENAI_PROJECT_ID/service_accounts"),
		fmt.Sprintf("%d service accounts more than before\n", len(left)))
	return want(len(left) == 0, "no new account, not %v", left)
}
