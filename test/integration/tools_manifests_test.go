//go:build integration

package integration

// The examples for tools that do not run here: the tests check them against the
// formats that the tools read, or send a tool's requests to Vault.

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
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/test/devenv"
)

func TestTheExamplesFitWhatTheirToolsRead(t *testing.T) {
	runParallel(t)
	root, err := devenv.Root()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // it may compile everything
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", ".")
	cmd.Dir = filepath.Join(root, "tools", "examples")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
}

var attribute = regexp.MustCompile(`(?m)^ +(\w+) += (.+)$`)

// Terraform's generic endpoint writes a role, reads it and compares: a value that
// reads back differently shows up as a change in every plan.
func TestTerraformFindsARoleAsItWroteIt(t *testing.T) {
	m := newMount(t)
	written := map[string]any{}
	block := regexp.MustCompile(`(?s)"vault_generic_endpoint" "role".*?jsonencode\(\{(.*?)\}\)`).
		FindStringSubmatch(m.example("terraform/main.tf", "", "var.project_id", `"`+m.project+`"`))
	require.NotNil(t, block, "no role in main.tf")
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
	for range 2 { // a repeated destroy must not fail
		_, err := m.client.Logical().Delete(m.path + "/roles/my-app")
		require.NoError(t, err)
	}

	// The ephemeral variant writes data_json to the path.
	m.role("my-app", "1h", "2h")
	l := newLease(t, m.write("creds/my-app", map[string]any{"ttl": 900}), nil)
	l.requireSeconds(t, 900)
}

// The External Secrets Operator's generator runs as in the Operator. It takes
// minutes to compile, so the test is optional.
func TestTheExternalSecretsGeneratorMakesAKeyEachTime(t *testing.T) {
	if os.Getenv("TOOLS_FULL") == "" {
		t.Skip("NOT TESTED: TOOLS_FULL=1 builds the External Secrets Operator's generator, which takes minutes, and runs it")
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
		require.Len(t, m.alive(), n, "each refresh creates an account, and the previous one stays")
	}
}

// The Secrets Operator requests the original TTL again, and treats a shorter one as
// the end of the lease: a renewal must return exactly the requested TTL.
func TestTheSecretsOperatorsRenewalIsNotTakenForTheLast(t *testing.T) {
	m := newMount(t)
	m.role("my-app", "1h", "24h")
	m.role("short", "1h", "1h")
	l := m.creds("my-app")
	for range 5 {
		time.Sleep(250 * time.Millisecond) // so that rounding would show
		renewed := m.renewAsTheOperator(l)
		require.Equal(t, l.seconds, renewed)
	}
	last := m.creds("short")
	time.Sleep(1100 * time.Millisecond)
	require.Less(t, m.renewAsTheOperator(last), last.seconds, "at max_ttl, the renewal must be shorter")
}

func (m *mount) renewAsTheOperator(l lease) (seconds int) {
	m.t.Helper()
	renewed, err := m.client.Logical().Write("sys/leases/renew", map[string]any{"lease_id": l.id, "increment": l.seconds})
	require.NoError(m.t, err)
	return renewed.LeaseDuration
}

// The GitHub job's three requests: the action's login and read, and the last
// step. Only the signature differs from GitHub's.
func TestTheGitHubJobLogsInAndEndsItsKey(t *testing.T) {
	m := newMount(t)
	m.role("ci", "1h", "2h")
	p := m.provider("github", "https://token.actions.githubusercontent.com",
		map[string]any{"sub": "repo:my-org/my-repo:ref:refs/heads/main", "repository": "my-org/my-repo", "ref": "refs/heads/main"})
	p.requireOnly(map[string]map[string]any{
		"another repository": {"repository": "my-org/another"},
		"another branch":     {"ref": "refs/heads/feature"},
		"another audience":   {"aud": "https://elsewhere"},
	})
	session, err := p.login(nil)
	require.NoError(t, err)
	job := m.vault.ClientFor(session.Auth.ClientToken)
	secret, err := job.Logical().Read(m.path + "/creds/ci")
	l := newLease(t, secret, err)
	require.Equal(t, http.StatusOK, infer(t, m.sim, l.key))
	require.NoError(t, job.Auth().Token().RevokeSelf(""))
	require.Eventually(t, func() bool { return infer(t, m.sim, l.key) == http.StatusUnauthorized }, time.Minute, 50*time.Millisecond, "the key still works after the job")
}

// The GitLab job's own script, with the page's copy of with-openai-key. Only the
// signature differs from GitLab's.
func TestTheGitLabJobLogsInAndEndsItsKey(t *testing.T) {
	m := newMount(t)
	m.role("ci", "1h", "2h")
	p := m.provider("gitlab", "https://gitlab.com",
		map[string]any{"sub": "project_path:my-group/my-project:ref_type:branch:ref:main", "project_path": "my-group/my-project", "ref_type": "branch", "ref": "main"})
	p.requireOnly(map[string]map[string]any{
		"another project":  {"project_path": "my-group/another"},
		"another branch":   {"ref": "feature"},
		"a tag":            {"ref_type": "tag"},
		"another audience": {"aud": "https://elsewhere"},
	})

	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "deploy", "ci"), 0o700))
	m.exampleFile("ci/with-openai-key", filepath.Join(dir, "deploy", "ci"))
	_, job, found := strings.Cut(m.example("gitlab-ci/openai.yml", "",
		"auth/gitlab/", "auth/"+p.auth+"/", "https://api.openai.com/v1", m.sim.URL()), "\n  script:\n")
	require.True(t, found)
	job = regexp.MustCompile(`(?m)^    - (\|\n)?`).ReplaceAllString(job, "")
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("NOT TESTED: GitLab's job requires curl")
	}
	var copied string
	for _, b := range pageBlocks(t, "docs/tools/ci.md") {
		if commands := b.commands(); b.heading == "GitLab CI" && strings.HasPrefix(commands[0], "install ") {
			copied = commands[0]
		}
	}
	require.NotEmpty(t, copied)
	env, err := m.vault.CLIEnv()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", copied+"\n"+job)
	cmd.Dir, cmd.Env = dir, append(env, "VAULT_TOKEN=", "VAULT_ID_TOKEN="+p.jwt(nil))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Eventually(t, func() bool { return len(m.alive()) == 0 }, time.Minute, 50*time.Millisecond, "accounts remain after the job")
	require.NotEmpty(t, m.sim.Secrets(), "no key was read")
}

// provider is a CI system as Vault sees it: an issuer with a key.
type provider struct {
	m            *mount
	auth, issuer string
	claims       map[string]any // of the job that may log in
	signer       *rsa.PrivateKey
}

// provider runs the example's vault-setup.sh for the test's signer.
func (m *mount) provider(name, issuer string, claims map[string]any) *provider {
	m.t.Helper()
	signer, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(m.t, err)
	public, err := x509.MarshalPKIXPublicKey(&signer.PublicKey)
	require.NoError(m.t, err)
	dir := m.t.TempDir()
	keys := filepath.Join(dir, name+".pem")
	require.NoError(m.t, os.WriteFile(keys, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600))
	p := &provider{m: m, auth: m.path + "-" + name, issuer: issuer, claims: claims, signer: signer}
	folder := map[string]string{"github": "github-actions", "gitlab": "gitlab-ci"}[name]
	setup := m.exampleFile(folder+"/vault-setup.sh", dir,
		"oidc_discovery_url="+issuer, "jwt_validation_pubkeys=@"+keys,
		"-path="+name, "-path="+p.auth, "auth/"+name+"/", "auth/"+p.auth+"/",
		`["openai-ci"]`, `["`+m.policy("ci")+`"]`)
	_, err = m.script(m.vault.RootToken, setup)
	require.NoError(m.t, err)
	m.t.Cleanup(func() { require.NoError(m.t, m.client.Sys().DisableAuth(p.auth)) })
	return p
}

// jwt returns the job's token, with the given claims replaced.
func (p *provider) jwt(claims map[string]any) string {
	p.m.t.Helper()
	all := map[string]any{"iss": p.issuer, "aud": p.m.vault.Addr,
		"iat": time.Now().Unix(), "exp": time.Now().Add(5 * time.Minute).Unix()}
	maps.Copy(all, p.claims)
	maps.Copy(all, claims)
	return sign(p.m.t, p.signer, all)
}

func (p *provider) login(claims map[string]any) (*api.Secret, error) {
	return p.m.vault.ClientFor("").Logical().Write("auth/"+p.auth+"/login", map[string]any{"role": "openai-ci", "jwt": p.jwt(claims)})
}

func (p *provider) requireOnly(others map[string]map[string]any) {
	p.m.t.Helper()
	for name, claims := range others {
		_, err := p.login(claims)
		require.Error(p.m.t, err, name)
	}
}

// sign signs a JWT as the CI systems do.
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
