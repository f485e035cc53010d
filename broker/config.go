package broker

// This file owns the settings. broker.json and the flags of "run" fill the same
// structures under the same names, and validate checks them before anything is
// opened or leased.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Duration is a time.Duration that JSON and flags write as "90s" or "1h".
type Duration time.Duration

// UnmarshalText parses what time.ParseDuration accepts.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = Duration(parsed)
	return err
}

// MarshalText returns the duration as time.Duration prints it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Config is a whole broker. A field with a help text is also a flag of "run", of
// the same name with "-" for "_".
type Config struct {
	Vault       Login    `json:"vault"`
	Agents      []Agent  `json:"agents"`
	Listen      string   `json:"listen" help:"'address' for the program; port 0 picks a free one"`
	AllowRemote bool     `json:"allow_remote" help:"allow an address that other machines can reach"`
	Hosts       []string `json:"hosts" flag:"host" help:"'name' that -allow-remote accepts in the Host header, besides loopback"`
	Upstream    string   `json:"upstream" help:"base 'URL' of the API"`
	Audit       string   `json:"audit" help:"'file' to append a JSON line to at the start and at the end of each request"`
	Metrics     string   `json:"metrics" help:"'address' for Prometheus, such as 127.0.0.1:9102"`
	Drain       Duration `json:"drain" help:"'time' for requests in progress after the program has ended"`
	MaxSession  Duration `json:"max_session" help:"longest 'time' for one request or WebSocket"`
}

// Agent is one program with its own placeholder, key and limits.
type Agent struct {
	Name          string   `json:"name"`
	Mount         string   `json:"mount" help:"'path' of the secrets engine (default openai)"`
	Role          string   `json:"role" help:"'role' whose keys to lease"`
	StaticRole    string   `json:"static_role" help:"static 'role' whose key to read instead"`
	TTL           Duration `json:"ttl" help:"'lifetime' of the lease (default: the ttl of the role)"`
	TokenFile     string   `json:"token_file"`
	User          string   `json:"user" help:"'account' to run the program under (requires root)"` // under "serve", the owner of TokenFile
	Allow         []string `json:"allow" help:"comma-separated path 'families' to allow instead of the default"`
	Models        []string `json:"models" help:"comma-separated model 'patterns' to allow, such as gpt-5*; requests that hide their model are refused"`
	MaxConcurrent int      `json:"max_concurrent" help:"'requests' in progress at most (default: no limit)"`
	MaxRPM        int      `json:"max_rpm" help:"'requests' a minute at most (default: no limit)"`
}

// Login says how the broker authenticates to Vault. The server's address,
// namespace and TLS settings come from the VAULT_* environment variables.
type Login struct {
	Method       string `json:"auth" help:"'method': token (VAULT_TOKEN or ~/.vault-token), token-file, approle, kubernetes, jwt, cert, or none for a Vault Proxy"`
	Mount        string `json:"auth_mount" help:"'path' of the auth method (default: its name)"`
	Role         string `json:"auth_role" help:"'role' of kubernetes, jwt or cert"`
	TokenFile    string `json:"token_file" help:"'file' with a Vault token, read again for each login"`
	RoleIDFile   string `json:"role_id_file" help:"'file' with the role ID of the AppRole"`
	SecretIDFile string `json:"secret_id_file" help:"'file' with the secret ID of the AppRole"`
	JWTFile      string `json:"jwt_file" help:"'file' with the JWT (kubernetes: default is that of the pod)"`
}

// Defaults returns the settings that apply when nothing else is given.
func Defaults() Config {
	return Config{
		Vault: Login{Method: "token"}, Listen: "127.0.0.1:0", Upstream: "https://api.openai.com/v1",
		Drain: Duration(30 * time.Second), MaxSession: Duration(time.Hour),
	}
}

// Flags returns the defaults with one agent, and defines the flags that fill them.
func Flags(fs *flag.FlagSet) *Config {
	c := Defaults()
	c.Agents = make([]Agent, 1)
	for _, part := range []any{&c, &c.Vault, &c.Agents[0]} {
		fields := reflect.ValueOf(part).Elem()
		for i := range fields.NumField() {
			tag := fields.Type().Field(i).Tag
			name, help := cmp.Or(tag.Get("flag"), strings.ReplaceAll(tag.Get("json"), "_", "-")), strings.ReplaceAll(tag.Get("help"), "'", "`")
			if help == "" {
				continue
			}
			switch field := fields.Field(i).Addr().Interface().(type) {
			case *string:
				fs.StringVar(field, name, *field, help)
			case *bool:
				fs.BoolVar(field, name, *field, help)
			case *int:
				fs.IntVar(field, name, *field, help)
			case *Duration:
				fs.TextVar(field, name, *field, help)
			case *[]string:
				fs.Func(name, help, func(value string) error {
					*field = append(*field, strings.Split(value, ",")...)
					return nil
				})
			}
		}
	}
	return &c
}

// Load reads broker.json. Unknown fields are errors.
func Load(file string) (*Config, error) {
	c := Defaults()
	content, err := os.ReadFile(file) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(content))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil || dec.More() {
		return nil, fmt.Errorf("%s: %w", file, cmp.Or(err, errors.New("text after the JSON object")))
	}
	for _, a := range c.Agents {
		if a.TokenFile == "" {
			return nil, fmt.Errorf("%s: agent %q: token_file is required", file, cmp.Or(a.Name, a.Role, a.StaticRole))
		}
	}
	return &c, nil
}

// validate fills in what is left out and rejects what cannot work.
func (c *Config) validate() error {
	upstream, err := url.Parse(c.Upstream)
	switch {
	case err != nil || upstream.Host == "" || upstream.User != nil || upstream.RawQuery != "" || upstream.Fragment != "":
		return fmt.Errorf("upstream %q is not a plain URL such as https://api.openai.com/v1", c.Upstream)
	case upstream.Scheme != "https" && (upstream.Scheme != "http" || !isLoopback(upstream.Hostname())):
		return fmt.Errorf("upstream %q must use https, except on a loopback address", c.Upstream)
	case c.Drain < 0 || c.MaxSession <= 0:
		return errors.New("max-session must be positive, and drain must not be negative")
	case len(c.Hosts) > 0 && !c.AllowRemote:
		return errors.New("host requires allow-remote")
	case len(c.Agents) == 0:
		return errors.New("agents must not be empty")
	}
	var seen []string
	for i := range c.Agents {
		a := &c.Agents[i]
		if err := a.validate(); err != nil {
			return fmt.Errorf("agent %q: %w", a.Name, err)
		}
		if slices.Contains(seen, a.Name) || a.TokenFile != "" && slices.Contains(seen, "file "+a.TokenFile) {
			return fmt.Errorf("agent %q: each agent needs its own name and token_file", a.Name)
		}
		seen = append(seen, a.Name, "file "+a.TokenFile)
	}
	return c.Vault.validate()
}

var (
	nameForm   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)
	familyForm = regexp.MustCompile(`^[a-z_]+(/[a-z_]+)*$`)
)

func (a *Agent) validate() error {
	a.Name = cmp.Or(a.Name, a.Role, a.StaticRole)
	a.Mount = cmp.Or(strings.Trim(a.Mount, "/"), "openai")
	if len(a.Allow) == 0 {
		a.Allow = defaultFamilies
	}
	switch {
	case (a.Role == "") == (a.StaticRole == ""):
		return fmt.Errorf("exactly one of role and static-role is required; run \"vault list %s/roles\" to list roles", a.Mount)
	case !nameForm.MatchString(a.Name) || !nameForm.MatchString(a.Role+a.StaticRole):
		return errors.New("a name must have at most 64 letters, digits, \"-\", \"_\" and \".\"")
	case a.StaticRole != "" && a.TTL != 0:
		return errors.New("ttl requires role")
	case a.TTL < 0 || a.MaxConcurrent < 0 || a.MaxRPM < 0:
		return errors.New("ttl, max-concurrent and max-rpm must not be negative")
	}
	for _, family := range a.Allow {
		if !familyForm.MatchString(family) || neverAllowed(strings.Split(family, "/")) {
			return fmt.Errorf("%q cannot be allowed; the default is %s", family, strings.Join(defaultFamilies, ","))
		}
	}
	for _, pattern := range a.Models {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return fmt.Errorf("%q is not a model pattern such as gpt-5*", pattern)
		}
	}
	return nil
}

// loginFile is a file whose line is a field of a login request.
type loginFile struct {
	field, flag, path string
	forbidden         os.FileMode
}

// files returns what a method reads.
func (l *Login) files() (files []loginFile, known bool) {
	jwt := loginFile{"jwt", "jwt-file", l.JWTFile, 0}
	files, known = map[string][]loginFile{
		"token": nil, "cert": nil, "none": nil, "jwt": {jwt}, "kubernetes": {jwt},
		"token-file": {{"token", "token-file", l.TokenFile, 0o007}},
		"approle":    {{"role_id", "role-id-file", l.RoleIDFile, 0}, {"secret_id", "secret-id-file", l.SecretIDFile, 0o007}},
	}[l.Method]
	return files, known
}

func (l *Login) validate() error {
	if l.Method == "kubernetes" {
		l.JWTFile = cmp.Or(l.JWTFile, "/var/run/secrets/kubernetes.io/serviceaccount/token")
	}
	l.Mount = cmp.Or(strings.Trim(l.Mount, "/"), l.Method)
	files, known := l.files()
	if !known {
		return fmt.Errorf("auth %q is not one of token, token-file, approle, kubernetes, jwt, cert, none", l.Method)
	}
	for _, f := range files {
		if f.path == "" {
			return fmt.Errorf("auth=%s requires %s", l.Method, f.flag)
		}
		if f.field == "jwt" && l.Role == "" {
			return fmt.Errorf("auth=%s requires auth-role", l.Method)
		}
	}
	return nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
