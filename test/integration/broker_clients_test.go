//go:build integration

package integration

// Clients in the languages of agents, each configured only by the environment that
// the broker sets.

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

const pythonClient = `
import json, os, urllib.request
base, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
def call(path, body=None, kind="application/json"):
    request = urllib.request.Request(base + path, data=body, headers={"Authorization": "Bearer " + key, "Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        return answer.read()
assert json.loads(call("/models"))["data"]
assert json.loads(call("/responses", b'{"model":"m"}'))["status"] == "completed"
assert b"response.completed" in call("/responses", b'{"model":"m","stream":true}')
assert json.loads(call("/files", bytes(5 << 20), "application/octet-stream"))["bytes"] == 5 << 20
print("all answered")
`

const nodeClient = `
const base = process.env.OPENAI_BASE_URL, key = process.env.OPENAI_API_KEY;
const call = (path, body) => fetch(base + path, { method: body ? "POST" : "GET", body, headers: { Authorization: "Bearer " + key, "Content-Type": "application/json" } });
const check = (ok, what) => { if (!ok) { console.error(what); process.exit(1); } };
(async () => {
  check((await (await call("/models")).json()).data.length > 0, "models");
  check((await (await call("/responses", '{"model":"m"}')).json()).status === "completed", "response");
  check((await (await call("/responses", '{"model":"m","stream":true}')).text()).includes("response.completed"), "stream");
  check((await (await call("/files", Buffer.alloc(5 << 20))).json()).bytes === 5 << 20, "upload");
  if (typeof WebSocket === "function") { // with the placeholder in a subprotocol, as the SDK's browser class does
    await new Promise((resolve, reject) => {
      const ws = new WebSocket(process.env.OPENAI_WEBSOCKET_BASE_URL + "/realtime?model=m", ["realtime", "openai-insecure-api-key." + key]);
      ws.onopen = () => ws.send("hello");
      ws.onmessage = (e) => { e.data === "hello" ? resolve() : reject(e.data); ws.close(); };
      ws.onerror = (e) => reject(e.message || "socket");
    }).catch((e) => check(false, "socket: " + e));
    console.log("socket answered");
  }
  console.log("all answered");
})();
`

func TestBroker_Clients(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	token := m.tokenOf("application")
	sdk := filepath.Join(bin, "sdk-client")
	require.NoError(t, devenv.BuildTool(t.Context(), sdk, "test/sdk", "."))
	for name, program := range map[string][]string{
		"OpenAI's Go SDK":           {sdk},
		"Python's standard library": {"python3", "-c", pythonClient},
		"Node's standard library":   {"node", "-e", nodeClient},
		"curl":                      {"bash", "-c", `curl -fsS "$OPENAI_BASE_URL/models" -H "Authorization: Bearer $OPENAI_API_KEY" >/dev/null && echo all answered`},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(program[0]); err != nil {
				t.Skipf("NOT TESTED: %s: %v", name, err)
			}
			if name == "curl" {
				if _, err := exec.LookPath("curl"); err != nil {
					t.Skipf("NOT TESTED: %v", err)
				}
			}
			cmd, out := m.runBroker(token, append([]string{"--"}, program...)...)
			require.NoError(t, cmd.Run(), out)
			require.Contains(t, out.String(), "all answered")
			t.Log(out.String())
		})
	}
	require.NoError(t, m.client.Sys().RevokeWithOptions(&api.RevokeOptions{LeaseID: m.path + "/creds/my-app", Prefix: true, Sync: true}))
}
