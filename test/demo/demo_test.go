package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

func TestTheRealAPIIsUsedOnlyWithAProject(t *testing.T) {
	env := map[string]string{}
	getenv := func(name string) string { return env[name] }
	user, err := account(getenv)
	require.NoError(t, err)
	require.Nil(t, user, "without an admin key, the demo uses the simulator")

	env["OPENAI_ADMIN_KEY"] = "sk-admin-mine"
	_, err = account(getenv)
	require.ErrorContains(t, err, "OPENAI_PROJECT_ID")

	env["OPENAI_PROJECT_ID"] = "proj_1"
	user, err = account(getenv)
	require.NoError(t, err)
	require.Equal(t, "https://api.openai.com/v1", user.base)
}

func TestNoKeyIsShownInFull(t *testing.T) {
	told, untold := "sk-svcacct-told-0123456789", "sk-admin-untold-0123456789"
	var out strings.Builder
	d := &demo{out: &out, secrets: []string{told, "short"}}
	d.show("title", "command", "key "+told+" and "+untold+" and short\n")
	require.NotContains(t, out.String(), told)
	require.NotContains(t, out.String(), untold)
	require.NotContains(t, out.String(), "short")
	require.Contains(t, out.String(), "sk-svcacct-to…")
}

func TestPrintExports_WarnsAboutRotation(t *testing.T) {
	var out strings.Builder
	d := &demo{out: &out, vault: &devenv.Vault{}, api: newAPI("http://127.0.0.1:1/v1", "sk-admin-mine", "proj_1")}
	d.printExports()
	require.Contains(t, out.String(), "export OPENAI_ADMIN_KEY=sk-admin-mine\n")
	require.Contains(t, out.String(), rotatable)
	require.Contains(t, out.String(), createKeyCommand)

	out.Reset()
	d.live = true
	d.printExports()
	require.NotContains(t, out.String(), "sk-admin-mine", "the user's own key")
	require.Contains(t, out.String(), rotatable)
}
