package openaisecrets

// This file owns the config entry: its fields, their rules, and the check
// against the API before anything is stored.
//
// What must stay true: a refused write leaves the stored config in force; the
// admin key is never read back, and never sent to an endpoint that was not
// named together with it.

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	configStorageKey = "config"
	configVersion    = 1

	defaultRotationGrace = 5 * time.Minute
	maxRotationGrace     = 7 * 24 * time.Hour
	// maxRequestTimeout keeps one attempt within a request's budget, on which
	// the age at which a journal entry may be acted upon is built.
	maxRequestTimeout = requestBudget
	maxCACert         = 256 << 10
)

// config is the engine's configuration, as stored and as used.
type config struct {
	Version int `json:"version"`
	// AdminKey prints as ***; putConfig and getConfig carry its value.
	AdminKey client.Secret `json:"-"`
	// AdminKeyID is empty only after skip_verify.
	AdminKeyID string `json:"admin_api_key_id"`
	// AdminKeyRotated says that this engine made the key, so that nobody else
	// holds its value and it must not be left behind.
	AdminKeyRotated       bool          `json:"admin_api_key_rotated,omitempty"`
	OrganizationID        string        `json:"organization_id,omitempty"`
	APIEndpoint           string        `json:"api_endpoint"`
	AllowInsecureEndpoint bool          `json:"allow_insecure_endpoint,omitempty"`
	CACert                string        `json:"ca_cert,omitempty"`
	RotationGracePeriod   time.Duration `json:"rotation_grace_period"`
	RequestTimeout        time.Duration `json:"request_timeout"`
	LastRotated           time.Time     `json:"last_rotated,omitzero"`
	Retired               []retiredKey  `json:"retired_admin_keys,omitempty"`
}

// retiredKey is an admin key that this engine has replaced and will delete.
type retiredKey struct {
	ID          string    `json:"id"`
	DeleteAfter time.Time `json:"delete_after"`
}

// storedConfig adds the one value that config itself never encodes.
type storedConfig struct {
	*config
	AdminKey string `json:"admin_api_key"`
}

func getConfig(ctx context.Context, s logical.Storage) (*config, error) {
	entry, err := s.Get(ctx, configStorageKey)
	if err != nil {
		return nil, fmt.Errorf("reading the config: %w", err)
	}
	if entry == nil {
		return nil, nil
	}
	stored := storedConfig{config: &config{}}
	if err := entry.DecodeJSON(&stored); err != nil {
		return nil, fmt.Errorf("decoding the config: %w", err)
	}
	if stored.Version > configVersion {
		return nil, fmt.Errorf("the config was written by a newer version of this plugin (format %d, this one knows %d)", stored.Version, configVersion)
	}
	stored.config.AdminKey = client.NewSecret(stored.AdminKey)
	return stored.config, nil
}

func putConfig(ctx context.Context, s logical.Storage, cfg *config) error {
	cfg.Version = configVersion
	entry, err := logical.StorageEntryJSON(configStorageKey, storedConfig{config: cfg, AdminKey: cfg.AdminKey.Reveal()})
	if err != nil {
		return err
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing the config: %w", err)
	}
	return nil
}

// clone returns a copy that shares nothing that is ever changed.
func (c *config) clone() *config {
	copied := *c
	copied.Retired = slices.Clone(c.Retired)
	return &copied
}

// retire notes that the current admin key, if this engine made or replaced
// it, is to be deleted once the grace period has passed.
func (c *config) retire(now time.Time) {
	if c.AdminKeyID != "" {
		c.Retired = append(c.Retired, retiredKey{ID: c.AdminKeyID, DeleteAfter: now.Add(c.RotationGracePeriod).UTC().Truncate(time.Second)})
	}
}

func (b *backend) pathConfig() *framework.Path {
	fields := map[string]*framework.FieldSchema{
		"admin_api_key": {
			Type:         framework.TypeString,
			Description:  `Admin key of the organization (sk-admin-...), with the permission "Organization Administration: Write". Never read back.`,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Admin API key", Sensitive: true},
		},
		"admin_api_key_id": {
			Type:         framework.TypeString,
			Description:  "ID of the admin key. Found by itself; to be given only where that is ambiguous, which the answer then says.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Admin API key ID"},
		},
		"organization_id": {
			Type:         framework.TypeString,
			Description:  "Organization to name in requests (OpenAI-Organization). Not needed: an admin key belongs to one organization.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Organization ID"},
		},
		"api_endpoint": {
			Type:         framework.TypeString,
			Description:  "Base URL of the API with its version: https, or http to a loopback address. To change it, send admin_api_key with it. Default " + client.DefaultBaseURL + ".",
			DisplayAttrs: &framework.DisplayAttributes{Name: "API endpoint"},
		},
		"allow_insecure_endpoint": {
			Type:         framework.TypeBool,
			Description:  "Accept an http endpoint that is not on a loopback address. The admin key then travels in clear text.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Allow insecure endpoint"},
		},
		"ca_cert": {
			Type:         framework.TypeString,
			Description:  "PEM bundle of the CAs to trust for the endpoint, instead of the system's.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "CA certificates", EditType: "file"},
		},
		"rotation_grace_period": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long a replaced admin key lives on, for requests that still use it: 0 to 7 days. Default 5m.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Rotation grace period"},
		},
		"request_timeout": {
			Type:         framework.TypeDurationSecond,
			Description:  "How long one HTTP request may take: 1s to 60s. Default 30s.",
			DisplayAttrs: &framework.DisplayAttributes{Name: "Request timeout"},
		},
	}
	answer := map[string]*framework.FieldSchema{
		"last_rotated":       {Type: framework.TypeString, Description: "When this engine last replaced its admin key (RFC 3339); empty when never.", Required: true},
		"retired_admin_keys": {Type: framework.TypeInt, Description: "How many replaced admin keys wait for the end of their grace period.", Required: true},
	}
	for name, field := range fields {
		if name != "admin_api_key" {
			answer[name] = &framework.FieldSchema{Type: field.Type, Description: field.Description, Required: true}
		}
	}
	fields["skip_verify"] = &framework.FieldSchema{
		Type:         framework.TypeBool,
		Description:  "Store the config without checking it against the API. Not stored itself.",
		DisplayAttrs: &framework.DisplayAttributes{Name: "Skip verification"},
	}

	write := &framework.PathOperation{
		Callback:                    strict(b.configWrite),
		Summary:                     "Check the engine's configuration against the API and store it.",
		Responses:                   noContent("Stored."),
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
	return &framework.Path{
		Pattern:      "config",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "configuration"},
		Fields:       fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback:  b.configRead,
				Summary:   "Read the engine's configuration, without the admin key.",
				Responses: okFields("The configuration.", answer),
			},
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.DeleteOperation: &framework.PathOperation{
				Callback:                    b.configDelete,
				Summary:                     "Delete the engine's configuration.",
				Responses:                   noContent("Deleted."),
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (bool, error) {
			cfg, err := getConfig(ctx, req.Storage)
			return cfg != nil, err
		},
		HelpSynopsis: "Configure the admin key with which the engine works.",
		HelpDescription: strings.TrimSpace(`
The admin key must be one of an organization owner's with the permission
"Organization Administration: Write". A write is checked against the API before
it is stored (skip_verify=true skips that); when it is refused, what was stored
stays in force. A write that names only some fields keeps the others. The admin
key itself is never read back.
`),
	}
}

func (b *backend) configRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	cfg, err := getConfig(ctx, req.Storage)
	if cfg == nil || err != nil {
		return nil, err
	}
	lastRotated := ""
	if !cfg.LastRotated.IsZero() {
		lastRotated = cfg.LastRotated.Format(time.RFC3339)
	}
	return &logical.Response{Data: map[string]any{
		"admin_api_key_id":        cfg.AdminKeyID,
		"organization_id":         cfg.OrganizationID,
		"api_endpoint":            cfg.APIEndpoint,
		"allow_insecure_endpoint": cfg.AllowInsecureEndpoint,
		"ca_cert":                 cfg.CACert,
		"rotation_grace_period":   int64(cfg.RotationGracePeriod / time.Second),
		"request_timeout":         int64(cfg.RequestTimeout / time.Second),
		"last_rotated":            lastRotated,
		"retired_admin_keys":      len(cfg.Retired),
	}}, nil
}

func (b *backend) configWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()

	old, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	cfg, problem := mergeConfig(old, d, b.now())
	if problem != "" {
		return logical.ErrorResponse("%s", problem), nil
	}
	api, err := b.newClient(ctx, cfg)
	if err != nil {
		return logical.ErrorResponse("config not stored: %s", err), nil
	}

	response := &logical.Response{}
	if d.Get("skip_verify").(bool) {
		response.AddWarning("Stored without a check against the API (skip_verify).")
	} else if resp, err := verifyConfig(ctx, cfg, api); resp != nil || err != nil {
		api.Close()
		return resp, err
	}
	// Whoever configures a retired key again wants it to live.
	cfg.Retired = slices.DeleteFunc(cfg.Retired, func(k retiredKey) bool { return k.ID == cfg.AdminKeyID })

	tag, err := ensureTag(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if err := putConfig(ctx, req.Storage, cfg); err != nil {
		// Storage may have taken it all the same: let the next request look.
		b.dropSnapshot()
		return nil, err
	}
	b.install(&snapshot{config: cfg, api: api, tag: tag})
	b.Logger().Info("config stored", "mount", req.MountPoint, "admin_api_key_id", cfg.AdminKeyID, "endpoint", api.Host())

	if cfg.AllowInsecureEndpoint && strings.HasPrefix(cfg.APIEndpoint, "http:") {
		response.AddWarning("The admin key travels in clear text: api_endpoint is not https.")
	}
	if len(response.Warnings) == 0 {
		return nil, nil
	}
	return response, nil
}

// mergeConfig applies a write to the stored config (nil when there is none)
// and checks everything that can be checked without a call. The problem is for
// the caller, "" when there is none.
func mergeConfig(old *config, d *framework.FieldData, now time.Time) (cfg *config, problem string) {
	if old == nil {
		cfg = &config{
			APIEndpoint:         client.DefaultBaseURL,
			RotationGracePeriod: defaultRotationGrace,
			RequestTimeout:      client.DefaultTimeout,
		}
	} else {
		cfg = old.clone()
	}

	newKey := false
	if raw, ok := d.GetOk("admin_api_key"); ok {
		key := strings.TrimSpace(raw.(string)) // a key read from a file ends in a line break
		if problem := checkAdminKey(key); problem != "" {
			return nil, problem
		}
		newKey = true
		if !cfg.AdminKey.Equal(client.NewSecret(key)) {
			if cfg.AdminKeyRotated {
				cfg.retire(now) // nobody else knows its value
			}
			cfg.AdminKey, cfg.AdminKeyID, cfg.AdminKeyRotated = client.NewSecret(key), "", false
		}
	}
	if cfg.AdminKey.IsZero() {
		return nil, "admin_api_key is required"
	}

	for name, target := range map[string]*string{"admin_api_key_id": &cfg.AdminKeyID, "organization_id": &cfg.OrganizationID} {
		if raw, ok := d.GetOk(name); ok {
			value := strings.TrimSpace(raw.(string))
			if problem := checkID(name, value); problem != "" {
				return nil, problem
			}
			*target = value
		}
	}

	if raw, ok := d.GetOk("allow_insecure_endpoint"); ok {
		cfg.AllowInsecureEndpoint = raw.(bool)
	}
	endpoint := cfg.APIEndpoint
	if raw, ok := d.GetOk("api_endpoint"); ok {
		endpoint = strings.TrimSpace(raw.(string))
		if endpoint == "" {
			endpoint = client.DefaultBaseURL
		}
	}
	endpoint, problem = parseEndpoint(endpoint, cfg.AllowInsecureEndpoint)
	if problem != "" {
		return nil, problem
	}
	if old != nil && endpoint != old.APIEndpoint && !newKey {
		// Otherwise whoever may write the config could have the stored key
		// sent to a server of theirs, and so read what is never read back.
		return nil, "api_endpoint says where the admin key is sent: to change it, send admin_api_key with it"
	}
	cfg.APIEndpoint = endpoint

	if raw, ok := d.GetOk("ca_cert"); ok {
		cfg.CACert = strings.TrimSpace(raw.(string))
		if len(cfg.CACert) > maxCACert {
			return nil, fmt.Sprintf("ca_cert is %d bytes long; the limit is %d", len(cfg.CACert), maxCACert)
		}
		if cfg.CACert != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(cfg.CACert)) {
			return nil, "ca_cert holds no PEM certificate"
		}
	}
	if raw, ok := d.GetOk("rotation_grace_period"); ok {
		cfg.RotationGracePeriod = time.Duration(raw.(int)) * time.Second
		if cfg.RotationGracePeriod < 0 || cfg.RotationGracePeriod > maxRotationGrace {
			return nil, fmt.Sprintf("rotation_grace_period must be between 0 and %s", maxRotationGrace)
		}
	}
	if raw, ok := d.GetOk("request_timeout"); ok {
		cfg.RequestTimeout = time.Duration(raw.(int)) * time.Second
		if cfg.RequestTimeout < time.Second || cfg.RequestTimeout > maxRequestTimeout {
			return nil, fmt.Sprintf("request_timeout must be between 1s and %s", maxRequestTimeout)
		}
	}
	return cfg, ""
}

// checkAdminKey says what is wrong with the shape of an admin key, "" when
// nothing is. It names a key of another kind as what it is, since pasting the
// wrong one is the likeliest mistake of all.
func checkAdminKey(key string) string {
	const remedy = "; an organization owner makes an admin key (sk-admin-...) at platform.openai.com/settings/organization/admin-keys"
	if key == "" {
		return "admin_api_key is empty"
	}
	if problem := checkText("admin_api_key", key); problem != "" {
		return problem
	}
	if strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "admin_api_key contains a space or a character that no key has"
	}
	for prefix, kind := range map[string]string{
		"sk-proj-":    "a project API key",
		"sk-svcacct-": "a service account's API key",
	} {
		if strings.HasPrefix(key, prefix) {
			return "admin_api_key is " + kind + " (" + prefix + "...), which cannot use the Admin API" + remedy
		}
	}
	return ""
}

// parseEndpoint checks and normalises a base URL. There is deliberately no
// list of forbidden addresses: who may write the config may choose the host,
// and naming it always takes the admin key itself.
func parseEndpoint(raw string, allowInsecure bool) (endpoint, problem string) {
	if problem := checkText("api_endpoint", raw); problem != "" {
		return "", problem
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "", fmt.Sprintf("api_endpoint %.200q is not a URL", raw)
	}
	switch {
	case u.User != nil:
		return "", "api_endpoint must not contain a user name or password"
	case u.Hostname() == "" || u.Opaque != "":
		return "", fmt.Sprintf("api_endpoint %.200q must be an absolute URL such as %s", raw, client.DefaultBaseURL)
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(raw, "#"):
		return "", "api_endpoint must not contain a query or a fragment"
	}
	switch u.Scheme {
	case "https":
	case "http":
		ip := net.ParseIP(u.Hostname())
		if u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) && !allowInsecure {
			return "", "api_endpoint must be https: the admin key would travel in clear text (http is for loopback addresses, or with allow_insecure_endpoint=true)"
		}
	default:
		return "", fmt.Sprintf("api_endpoint has scheme %.32q; it must be https", u.Scheme)
	}
	return strings.TrimRight(u.String(), "/"), ""
}

// verifyConfig asks the API whether the admin key works for reading and for
// writing, and finds or confirms its ID. A response or an error means that the
// config must not be stored.
func verifyConfig(ctx context.Context, cfg *config, api *client.Client) (*logical.Response, error) {
	const what = "config not stored"
	resp, err := findAdminKeyID(ctx, cfg, api)
	if err == nil && resp == nil {
		err = api.CheckWrite(ctx)
	}
	e := client.AsError(err)
	switch {
	case e == nil:
		return resp, err
	case e.Status == 0 && !e.Sent:
		return logical.ErrorResponse("%s: %s; check api_endpoint, ca_cert and the proxy settings of the plugin's environment", what, e), nil
	case e.Status == http.StatusUnauthorized:
		return logical.ErrorResponse("%s: OpenAI does not accept this admin_api_key: %s", what, e), nil
	case e.Status == http.StatusForbidden:
		return logical.ErrorResponse(`%s: the admin key lacks a permission; it needs "Organization Administration: Write": %s`, what, e), nil
	case e.Gone(), e.Status/100 == 2, e.Status/100 == 3:
		return logical.ErrorResponse("%s: %s does not serve the Admin API: %s", what, cfg.APIEndpoint, e), nil
	}
	return failure(what, err)
}

// findAdminKeyID fills in the ID of the admin key, or confirms the one given:
// a wrong one would have a rotation delete somebody else's key. A response
// tells the caller what to send.
func findAdminKeyID(ctx context.Context, cfg *config, api *client.Client) (*logical.Response, error) {
	keys, err := api.ListAdminKeys(ctx)
	if err != nil {
		return nil, err
	}
	var matching []string
	exists := false
	for _, key := range keys {
		exists = exists || key.ID == cfg.AdminKeyID
		if key.Matches(cfg.AdminKey) {
			matching = append(matching, key.ID)
		}
	}
	switch {
	case cfg.AdminKeyID == "" && len(matching) == 1:
		cfg.AdminKeyID = matching[0]
	case cfg.AdminKeyID == "" && len(matching) == 0:
		return logical.ErrorResponse("config not stored: the admin key works, but none of the organization's %d admin keys looks like it; send its ID as admin_api_key_id", len(keys)), nil
	case cfg.AdminKeyID == "":
		return logical.ErrorResponse("config not stored: several admin keys look like this one (%s); send its ID as admin_api_key_id", strings.Join(matching, ", ")), nil
	case exists && len(matching) == 0:
		// Redacted in a way that this version does not read: the ID's word.
	case !slices.Contains(matching, cfg.AdminKeyID):
		return logical.ErrorResponse("config not stored: admin_api_key_id %q is not the ID of this admin key; leave it out and it is found", cfg.AdminKeyID), nil
	}
	return nil, nil
}

func (b *backend) configDelete(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	unlock, err := b.lockConfig(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()

	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if cfg == nil {
		return nil, nil
	}
	// The last chance for what is retired: nothing knows of it afterwards.
	if api, err := b.newClient(ctx, cfg); err == nil {
		cleanup, cancel := context.WithTimeout(ctx, cleanupBudget)
		b.deleteRetiredKeys(cleanup, req, cfg, api, true)
		cancel()
		api.Close()
	}
	if err := req.Storage.Delete(ctx, configStorageKey); err != nil {
		b.dropSnapshot()
		return nil, fmt.Errorf("deleting the config: %w", err)
	}
	b.dropSnapshot()
	b.Logger().Info("config deleted", "mount", req.MountPoint)

	response := &logical.Response{}
	response.AddWarning("Live leases of this mount can no longer be revoked, nor can the journal be worked off, until a config is written again. Their keys stay usable until they expire at OpenAI.")
	var left []string
	for _, key := range cfg.Retired {
		left = append(left, key.ID)
	}
	if cfg.AdminKeyRotated {
		left = append(left, cfg.AdminKeyID)
	}
	if len(left) > 0 {
		response.AddWarning("These admin keys were made or replaced by this engine and are still alive; nobody holds their values, delete them at OpenAI: " + strings.Join(left, ", "))
	}
	return response, nil
}
