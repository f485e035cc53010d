package broker

// This file owns the calls to Vault. Each lease has a session of its own where
// the broker can log in, so that revoking the session revokes that lease only,
// which Vault's default policy permits. Nothing here retries: keys.go decides
// what a failure means.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

const (
	// vaultTimeout bounds each call. Creating a key can wait for OpenAI's rate
	// limits and for the key to become active.
	vaultTimeout  = 90 * time.Second
	revokeTimeout = 15 * time.Second
	// staticPoll is the shortest time between two reads of a static role.
	staticPoll = 5 * time.Second
)

// secret returns a value. It is a function because no formatting verb prints
// what a function holds, in whatever struct it is.
type secret func() string

var (
	errReplace = errors.New("the lease or its token cannot be renewed again")
	errEmpty   = errors.New("empty response")
)

// lease is a key, and the Vault token under which it was read.
type lease struct {
	client   *api.Client
	own      bool // the broker logged in for the token
	accessor string
	tokenTTL time.Duration // as first granted; 0 is no end
	leaseTTL time.Duration
	leaseID  string // empty for a static role
	keyID    string
	key      secret
	ends     time.Time // zero is never
	due      time.Time // to be renewed; zero is never
	final    bool      // to be replaced then
}

type vault struct {
	login     Login
	transport http.RoundTripper // for tests; nil is Vault's default
}

func (v *vault) client() (*api.Client, error) {
	config := api.DefaultConfig()
	if config.Error != nil {
		return nil, config.Error
	}
	config.MaxRetries, config.Timeout = 0, vaultTimeout
	if v.transport != nil {
		config.HttpClient.Transport = v.transport
	}
	client, err := api.NewClient(config)
	if err == nil {
		client.SetWrappingLookupFunc(func(string, string) string { return "" }) // VAULT_WRAP_TTL is for people
	}
	return client, err
}

// lease logs in and reads a key for an agent.
func (v *vault) lease(ctx context.Context, a Agent) (*lease, error) {
	client, err := v.client()
	if err != nil {
		return nil, err
	}
	l := &lease{client: client}
	path, data, err := v.credentials(client)
	if err != nil {
		return nil, err
	}
	if path != "" {
		client.ClearToken()
		answer, err := client.Logical().WriteWithContext(ctx, path, data)
		if err != nil || answer == nil || answer.Auth == nil {
			return nil, fmt.Errorf("log in to Vault with %s: %w", v.login.Method, cmp.Or(err, errEmpty))
		}
		client.SetToken(answer.Auth.ClientToken)
		l.own = true
	}
	life, renewable, err := l.token(ctx)
	if err == nil {
		l.tokenTTL, l.final = life, l.own && life > 0 && !renewable
		err = l.read(ctx, a)
	}
	if err != nil && l.own { // the token goes, and with it a lease whose answer was lost
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
		defer cancel()
		err = errors.Join(err, client.Auth().Token().RevokeSelfWithContext(ctx, ""))
	}
	return l, err
}

// credentials returns the login request, or sets a token that exists already.
func (v *vault) credentials(client *api.Client) (path string, data map[string]any, err error) {
	data = map[string]any{}
	files, _ := v.login.files()
	switch v.login.Method {
	case "none":
		client.ClearToken()
		return "", nil, nil
	case "token":
		if client.Token() != "" {
			return "", nil, nil
		}
		home, _ := os.UserHomeDir() // without one the file is not found either
		files = []loginFile{{"token", "", filepath.Join(home, ".vault-token"), 0o007}}
	case "kubernetes", "jwt":
		data["role"] = v.login.Role
	case "cert":
		data["name"] = v.login.Role
	}
	for _, f := range files {
		if data[f.field], err = readFile(f.path, f.forbidden); errors.Is(err, os.ErrNotExist) && v.login.Method == "token" {
			return "", nil, errors.New("no Vault token: set VAULT_TOKEN, run \"vault login\", or choose another -auth method")
		} else if err != nil {
			return "", nil, err
		}
	}
	if token, found := data["token"].(string); found {
		client.SetToken(token)
		return "", nil, nil
	}
	return "auth/" + v.login.Mount + "/login", data, nil
}

// readFile reads one line. None of the forbidden permissions may be set.
func readFile(file string, forbidden os.FileMode) (string, error) {
	info, err := os.Stat(file)
	if err != nil {
		return "", err
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		return "", fmt.Errorf("other users can access %s (mode %04o); run \"chmod 600 %s\"", file, mode, file)
	}
	content, err := os.ReadFile(file) //nolint:gosec // the operator names the file
	text := strings.TrimSpace(string(content))
	if err == nil && text == "" {
		err = fmt.Errorf("%s is empty", file)
	}
	return text, err
}

// token returns what is left of the token's life, after renewing a token that
// somebody else logged in for. It rejects a Vault Proxy that caches: one would
// answer every request for a new key with the old one.
func (l *lease) token(ctx context.Context) (life time.Duration, renewable bool, err error) {
	resp, err := l.client.Logical().ReadRawWithContext(ctx, "auth/token/lookup-self")
	if err != nil {
		return 0, false, fmt.Errorf("look up the Vault token: %w", err)
	}
	answer, err := l.client.Logical().ParseRawResponseAndCloseBody(resp, nil)
	if err != nil || answer == nil {
		return 0, false, fmt.Errorf("look up the Vault token: %w", cmp.Or(err, errEmpty))
	}
	if resp.Header.Get("X-Cache") != "" && l.cached(ctx) {
		return 0, false, fmt.Errorf("the Vault Proxy at %s caches leases, so the broker could not replace a key; remove the cache stanza from its configuration", l.client.Address())
	}
	accessor, _ := answer.Data["accessor"].(string)
	if l.accessor != "" && l.accessor != accessor {
		return 0, false, errReplace
	}
	l.accessor = accessor
	renewable, _ = answer.Data["renewable"].(bool)
	life, err = answer.TokenTTL()
	if err == nil && renewable && life > 0 && (!l.own || l.tokenTTL > 0) {
		answer, err = l.client.Auth().Token().RenewSelfWithContext(ctx, 0)
		if err != nil || answer == nil || answer.Auth == nil {
			return 0, false, fmt.Errorf("renew the Vault token: %w", cmp.Or(err, errEmpty))
		}
		life = time.Duration(answer.Auth.LeaseDuration) * time.Second
	}
	return life, renewable, err
}

// cached asks a Vault Proxy or Vault Agent to clear no part of its cache. Only
// one with a cache objects.
func (l *lease) cached(ctx context.Context) bool {
	for _, kind := range []string{"proxy", "agent"} {
		req := l.client.NewRequest(http.MethodPost, "/"+kind+"/v1/cache-clear")
		req.BodyBytes = []byte("{}")
		_, err := l.client.RawRequestWithContext(ctx, req) //nolint:staticcheck // the only call outside of /v1
		if status, words := rejected(err); status == http.StatusBadRequest && strings.Contains(words, "no type") {
			return true
		}
	}
	return false
}

// read reads the key.
func (l *lease) read(ctx context.Context, a Agent) error {
	path, query := a.Mount+"/creds/"+a.Role, map[string][]string{}
	if a.StaticRole != "" {
		path = a.Mount + "/static-creds/" + a.StaticRole
	}
	if a.TTL > 0 {
		query["ttl"] = []string{time.Duration(a.TTL).String()}
	}
	answer, err := l.client.Logical().ReadWithDataWithContext(ctx, path, query)
	if err != nil || answer == nil {
		return fmt.Errorf("read %s: %w", path, cmp.Or(err, errors.New("nothing found")))
	}
	key, _ := answer.Data["api_key"].(string)
	l.key, l.leaseID = func() string { return key }, answer.LeaseID
	l.keyID, _ = answer.Data["api_key_id"].(string)
	l.leaseTTL = time.Duration(answer.LeaseDuration) * time.Second
	if key == "" || l.keyID == "" || a.Role != "" && (l.leaseID == "" || l.leaseTTL <= 0) {
		return fmt.Errorf("read %s: the response is not a leased OpenAI key", path)
	}
	l.final = l.final || !answer.Renewable
	l.last(l.tokenTTL, l.leaseTTL)
	if a.Role != "" {
		return nil
	}
	next, err := answer.TokenTTL() // reads the field ttl
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	l.due = earliest(l.due, time.Now().Add(max(next+time.Second, staticPoll)))
	expires, _ := answer.Data["expires_at"].(string)
	l.ends, _ = time.Parse(time.RFC3339, expires) // null is never
	l.leaseID, l.final = "", true
	return nil
}

// last sets the end and the time to renew, two thirds of the way there. The
// lease ends with its token. Both use the wall clock: the monotonic one stands
// still while a machine sleeps, and Vault's does not.
func (l *lease) last(token, life time.Duration) {
	if token > 0 && (life == 0 || token < life) {
		life = token
	}
	if l.ends, l.due = (time.Time{}), (time.Time{}); life > 0 {
		now := time.Now().Round(0)
		l.ends, l.due = now.Add(life), now.Add(life*2/3)
	}
}

// renew extends the token and the lease, and returns the lease as it is then.
// What a maximum cuts short is replaced the next time.
func (v *vault) renew(ctx context.Context, l lease) (lease, error) {
	if l.final {
		return l, errReplace
	}
	if !l.own {
		if _, _, err := v.credentials(l.client); err != nil { // the file may have a new token
			return l, err
		}
	}
	life, renewable, err := l.token(ctx)
	if err != nil {
		return l, err
	}
	answer, err := l.client.Sys().RenewWithContext(ctx, l.leaseID, int(l.leaseTTL.Seconds()))
	if err != nil || answer == nil {
		return l, fmt.Errorf("renew lease %s: %w", l.leaseID, cmp.Or(err, errEmpty))
	}
	left := time.Duration(answer.LeaseDuration) * time.Second
	l.final = !answer.Renewable || left < l.leaseTTL*9/10 || l.own && life > 0 && (!renewable || life < l.tokenTTL*9/10)
	l.last(life, left)
	return l, nil
}

// revoke ends the lease with its token, or by itself: a token of someone else
// is not the broker's to end, and a batch token cannot be revoked.
func (l *lease) revoke(ctx context.Context) error {
	err := error(nil)
	if l.own {
		err = l.client.Auth().Token().RevokeSelfWithContext(ctx, "")
	}
	if status, _ := rejected(err); l.leaseID != "" && (!l.own || status != 0) {
		err = l.client.Sys().RevokeWithOptionsWithContext(ctx, &api.RevokeOptions{LeaseID: l.leaseID, Sync: true})
	}
	return err
}

// rejected returns Vault's own words when it answered with a client error,
// which another try does not change.
func rejected(err error) (status int, words string) {
	var answer *api.ResponseError
	if !errors.As(err, &answer) || answer.StatusCode >= 500 || answer.StatusCode == http.StatusTooManyRequests {
		return 0, ""
	}
	return answer.StatusCode, strings.Join(strings.Fields(strings.Join(answer.Errors, "; ")), " ")
}

// earliest is the earlier of two times, where zero is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// reached says whether a moment has come; zero never does.
func reached(t time.Time) bool { return !t.IsZero() && !time.Now().Round(0).Before(t) }

func text(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}
