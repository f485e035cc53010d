//go:build integration

package integration

// The examples for tools that do not run here: held against what those tools
// read, and, where a tool only asks Vault in a certain way, asked in that way.

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

func TestTheExamplesFitWhatTheirToolsRead(t *testing.T) {
	t.Parallel()
	root, err := devenv.Root()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", ".")
	cmd.Dir = filepath.Join(root, "tools", "examples")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
}

var attribute = regexp.MustCompile(`(?m)^ +(\w+) += (.+)$`)

// Terraform's generic endpoint writes a role, reads it and compares: what is not
// read back as it was written is a change in every plan from then on.
func TestTerraformFindsARoleAsItWroteIt(t *testing.T) {
	m := newMount(t)
	written := map[string]any{}
	block := regexp.MustCompile(`(?s)"vault_generic_endpoint" "role".*?jsonencode\(\{(.*?)\}\)`).
		FindStringSubmatch(m.example("terraform/main.tf", "", "var.project_id", `"`+m.project+`"`))
	require.NotNil(t, block, "the role in main.tf")
	for _, pair := range attribute.FindAllStringSubmatch(block[1], -1) {
		var value any
		require.NoError(t, json.Unmarshal([]byte(pair[2]), &value), pair[0])
		written[pair[1]] = value
	}
	require.Len(t, written, 3)
	for range 2 { // the second write is an apply without a change
		m.write("roles/my-app", written)
		read := m.read("roles/my-app").Data
		for name, value := range written {
			want, err := json.Marshal(value)
			require.NoError(t, err)
			got, err := json.Marshal(read[name])
			require.NoError(t, err)
			require.Equal(t, string(want), string(got), name)
		}
	}
	for range 2 { // nor may a destroy that is repeated fail
		_, err := m.client.Logical().Delete(m.path + "/roles/my-app")
		require.NoError(t, err)
	}

	// The ephemeral variant writes to the path, with what is in data_json.
	m.role("my-app", "1h", "2h")
	l := newLease(t, m.write("creds/my-app", map[string]any{"ttl": 900}), nil)
	require.Equal(t, 900, l.seconds)
}

// The External Secrets Operator's generator is run as the Operator runs it. What
// it is built from takes minutes to compile, so this has to be asked for.
func TestTheExternalSecretsGeneratorMakesAKeyEachTime(t *testing.T) {
	if os.Getenv("TOOLS_FULL") == "" {
		t.Skip("TOOLS_FULL=1 builds the External Secrets Operator's generator, for some minutes, and runs it")
	}
	m := newMount(t)
	m.role("my-app", "45m", "45m")
	dir := t.TempDir()
	program := filepath.Join(dir, "external-secrets")
	require.NoError(t, devenv.BuildTool(t.Context(), program, "tools/external-secrets", "."))
	manifest := m.exampleFile("external-secrets/generator.yaml", dir)
	token := m.tokenOf("application")
	for n := 1; n <= 2; n++ {
		cmd := exec.CommandContext(t.Context(), program, manifest)
		cmd.Env = append(cmd.Environ(), "VAULT_TOKEN="+token)
		out, err := cmd.Output()
		require.NoError(t, err)
		var secret map[string]string
		require.NoError(t, json.Unmarshal(out, &secret))
		require.Equal(t, http.StatusOK, infer(t, m.sim, secret["api_key"]))
		require.Len(t, m.alive(), n, "each refresh is an account, and the last one stays")
	}
}

// The Secrets Operator renews for as long as it got, and takes any second less
// for the end of the lease: a renewal must give exactly what was asked for.
func TestTheSecretsOperatorsRenewalIsNotTakenForTheLast(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	m.role("short", "1h", "1h")
	l := m.creds("my-app")
	for range 5 {
		time.Sleep(250 * time.Millisecond) // so that parts of seconds would show
		renewed := m.renewAsTheOperator(l)
		require.Equal(t, l.seconds, renewed)
	}
	last := m.creds("short")
	time.Sleep(1100 * time.Millisecond)
	require.Less(t, m.renewAsTheOperator(last), last.seconds, "at max_ttl the Operator has to notice")
}

func (m *mount) renewAsTheOperator(l lease) (seconds int) {
	m.t.Helper()
	renewed, err := m.client.Logical().Write("sys/leases/renew", map[string]any{"lease_id": l.id, "increment": l.seconds})
	require.NoError(m.t, err)
	return renewed.LeaseDuration
}

// The job's three requests: the action's login and read, and the last step. Only
// the signature is not GitHub's.
func TestTheGitHubJobLogsInAndEndsItsKey(t *testing.T) {
	m := newMount(t)
	m.role("ci", "1h", "2h")
	signer, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	public, err := x509.MarshalPKIXPublicKey(&signer.PublicKey)
	require.NoError(t, err)
	dir := t.TempDir()
	keys := filepath.Join(dir, "github.pem")
	require.NoError(t, os.WriteFile(keys, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600))
	auth := m.path + "-github"
	setup := m.exampleFile("github-actions/vault-setup.sh", dir,
		"oidc_discovery_url=https://token.actions.githubusercontent.com", "jwt_validation_pubkeys=@"+keys,
		"-path=github", "-path="+auth, "auth/github/", "auth/"+auth+"/",
		`["openai-ci"]`, `["`+m.policy("ci")+`"]`)
	_, err = m.script(m.vault.RootToken, setup)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.client.Sys().DisableAuth(auth)) })

	login := func(claims map[string]any) (*api.Secret, error) {
		all := map[string]any{"iss": "https://token.actions.githubusercontent.com", "aud": m.vault.Addr,
			"sub": "repo:my-org/my-repo:ref:refs/heads/main", "repository": "my-org/my-repo", "ref": "refs/heads/main",
			"iat": time.Now().Unix(), "exp": time.Now().Add(5 * time.Minute).Unix()}
		maps.Copy(all, claims)
		return m.vault.ClientFor("").Logical().Write("auth/"+auth+"/login", map[string]any{"role": "openai-ci", "jwt": sign(t, signer, all)})
	}
	for name, claims := range map[string]map[string]any{
		"another repository": {"repository": "my-org/another"},
		"another branch":     {"ref": "refs/heads/feature"},
		"another audience":   {"aud": "https://elsewhere"},
	} {
		_, err := login(claims)
		require.Error(t, err, name)
	}
	session, err := login(nil)
	require.NoError(t, err)
	job := m.vault.ClientFor(session.Auth.ClientToken)
	secret, err := job.Logical().Read(m.path + "/creds/ci")
	l := newLease(t, secret, err)
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
	require.NoError(t, job.Auth().Token().RevokeSelf(""))
	require.Eventually(t, func() bool { return infer(t, m.sim, l.key) == http.StatusUnauthorized }, time.Minute, 50*time.Millisecond, "the key, after the job")
}

// sign makes a JWT as GitHub would.
func sign(t *testing.T, key *rsa.PrivateKey, claims map[string]any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	require.NoError(t, err)
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(payload)
	digest := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	require.NoError(t, err)
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}
