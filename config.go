package openaisecrets

// This file owns the config: its entry, how a write changes it, the checks of each
// field and of the admin key before it is stored, and its schedule.
//
// What must stay true: a check has no effect at OpenAI, and no response quotes the
// admin key. A key that this engine created with an expiry is replaced before it
// expires, even if its schedule was removed, unless disable_automated_rotation is set.

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/schedule"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	configStorageKey = "config"
	configVersion    = 1

	maxCACert = 256 << 10
	// minConcurrent leaves a slot each for credential requests and revocations.
	minConcurrent = 4
	maxConcurrent = 1024
)

// configSpelled lists the fields that can be written in several spellings, or where ""
// stands for a default or for a value that the engine looks up.
var configSpelled = []string{"admin_api_key_id", "api_endpoint"}

// config is the engine's configuration, as stored and as used.
type config struct {
	Version int `json:"version"`
	// AdminKey prints as ***; putConfig and getConfig carry its value.
	AdminKey client.Secret `json:"-"`
	// AdminKeyID is empty only after skip_verify.
	AdminKeyID string `json:"admin_api_key_id"`
	// AdminKeyRotated reports that this engine created the key: only Vault has its
	// value, and the engine must delete it.
	AdminKeyRotated bool `json:"admin_api_key_rotated,omitempty"`
	// KeyOriginUnknown reports that another plugin stored, and may have created, the key.
	KeyOriginUnknown bool   `json:"admin_api_key_origin_unknown,omitempty"`
	OrganizationID   string `json:"organization_id,omitempty"`
	// ProjectID is the default for roles without one; it may be empty.
	ProjectID             string          `json:"project_id,omitempty"`
	APIEndpoint           string          `json:"api_endpoint"`
	AllowInsecureEndpoint bool            `json:"allow_insecure_endpoint,omitempty"`
	CACert                string          `json:"ca_cert,omitempty"`
	RotationGracePeriod   time.Duration   `json:"rotation_grace_period"`
	RequestTimeout        time.Duration   `json:"request_timeout"`
	MaxConcurrent         int             `json:"max_concurrent_requests"`
	Superseded            []supersededKey `json:"superseded_admin_keys,omitempty"`

	// TidyInterval is the interval between automatic tidy runs; 0 disables them.
	TidyInterval     time.Duration `json:"tidy_interval"`
	TidySafetyBuffer time.Duration `json:"tidy_safety_buffer"`

	// UsageInterval is the interval between refreshes of the usage metrics, UsageRetention
	// how long usage records are kept; 0 disables each.
	UsageInterval       time.Duration `json:"usage_interval"`
	UsageRetention      time.Duration `json:"usage_retention"`
	UsageRecordIdentity bool          `json:"usage_record_identity"`

	schedule.Schedule
	DisableAutomatedRotation bool `json:"disable_automated_rotation,omitempty"`
	// RotationManager names the scheduler. managerVault stays until the rotation job
	// at Vault is deregistered.
	RotationManager string `json:"rotation_manager,omitempty"`
	// RotationError is the error of the last automatic rotation; empty after a success.
	RotationError string `json:"last_rotation_error,omitempty"`
	// AdminKeyExpires is when the admin key expires at OpenAI; zero if not known.
	AdminKeyExpires time.Time `json:"admin_api_key_expires_at,omitzero"`

	requirements

	AsWritten asWritten `json:"as_written,omitempty"`
}

// requirements are the guardrails: what the config requires of roles and their projects.
type requirements struct {
	RequireSpendLimit     bool `json:"require_spend_limit,omitempty"`
	RequireModelAllowList bool `json:"require_model_allow_list,omitempty"`
	RequireScopes         bool `json:"require_scopes,omitempty"`
}

// judges reports whether a project must be judged.
func (r requirements) judges() bool { return r.RequireSpendLimit || r.RequireModelAllowList }

// storedConfig adds the one value that config never encodes.
type storedConfig struct {
	*config
	AdminKey string `json:"admin_api_key"`
}

// readConfig reads the entry. An entry without a version is the community plugin's.
func readConfig(ctx context.Context, s logical.Storage) (*config, *logical.StorageEntry, error) {
	// Entries stored before usage records existed have none of their fields.
	stored := storedConfig{config: &config{UsageRetention: defaultUsageRetention, UsageRecordIdentity: true}}
	entry, err := readEntry(ctx, s, configStorageKey, "the config", configVersion, &stored)
	if err != nil || entry == nil {
		return nil, nil, err
	}
	stored.config.AdminKey = client.NewSecret(stored.AdminKey)
	return stored.config, entry, nil
}

func putConfig(ctx context.Context, s logical.Storage, cfg *config) error {
	cfg.Version = configVersion
	return writeEntry(ctx, s, configStorageKey, "the config", storedConfig{config: cfg, AdminKey: cfg.AdminKey.Reveal()})
}

// spelling returns the effective values of configSpelled. An unknown ID is nil, which
// differs from the "" that asks the engine to look it up.
func (c *config) spelling() map[string]any {
	used := map[string]any{"api_endpoint": c.APIEndpoint, "admin_api_key_id": c.AdminKeyID}
	if c.AdminKeyID == "" {
		used["admin_api_key_id"] = nil
	}
	return used
}

// clone returns a copy that shares no mutable data.
func (c *config) clone() *config {
	copied := *c
	copied.Superseded = slices.Clone(c.Superseded)
	return &copied
}

// The schedulers.
const (
	managerVault    = "vault"
	managerInternal = "internal"
)

// mergeConfig applies a write to the stored config (nil if there is none) and runs
// every check that needs no call. The problem is for the client; "" if there is none.
func mergeConfig(old *config, d *framework.FieldData, now time.Time) (cfg *config, problem string) {
	if old == nil {
		cfg = &config{
			APIEndpoint:         client.DefaultBaseURL,
			RotationGracePeriod: defaultRotationGrace,
			RequestTimeout:      client.DefaultTimeout,
			MaxConcurrent:       client.DefaultConcurrency,
			TidyInterval:        defaultTidyInterval,
			TidySafetyBuffer:    defaultTidySafetyBuffer,
			UsageRetention:      defaultUsageRetention,
			UsageRecordIdentity: true,
		}
	} else {
		cfg = old.clone()
	}

	newKey, known := false, false // a key was given, and its ID is stored
	if raw, ok := d.GetOk("admin_api_key"); ok {
		key := strings.TrimSpace(raw.(string)) // a key read from a file ends in a line break
		if problem := checkAdminKey(key); problem != "" {
			return nil, problem
		}
		newKey, known = true, cfg.AdminKeyID != "" && cfg.AdminKey.Equal(client.NewSecret(key))
		if !cfg.AdminKey.Equal(client.NewSecret(key)) {
			if cfg.AdminKeyRotated {
				cfg.supersedeKey(now, time.Time{}) // only Vault has its value
			}
			cfg.AdminKey, cfg.AdminKeyID, cfg.AdminKeyRotated, cfg.KeyOriginUnknown = client.NewSecret(key), "", false, false
			cfg.AdminKeyExpires, cfg.NextRotation, cfg.LastRotated = time.Time{}, time.Time{}, time.Time{}
			cfg.RotationError = "" // it concerned the previous key
		}
	}
	if cfg.AdminKey.IsZero() {
		return nil, "admin_api_key is required"
	}

	id, idGiven := d.GetOk("admin_api_key_id")
	// "" asks for a lookup. It does not clear a known ID that skip_verify would not
	// look up again.
	idGiven = idGiven && (id.(string) != "" || newKey && !(known && d.Get("skip_verify").(bool)))
	if idGiven && cfg.AdminKeyRotated && strings.TrimSpace(id.(string)) != cfg.AdminKeyID {
		// A rotation would delete the key with this ID instead of the real one.
		return nil, fmt.Sprintf("admin_api_key_id cannot be changed: the engine created the active admin key, and its ID is %s; to use another key, send admin_api_key with it", cfg.AdminKeyID)
	}
	for name, target := range map[string]*string{"admin_api_key_id": &cfg.AdminKeyID, "organization_id": &cfg.OrganizationID, "project_id": &cfg.ProjectID} {
		if raw, ok := d.GetOk(name); ok && (name != "admin_api_key_id" || idGiven) {
			value := strings.TrimSpace(raw.(string))
			if problem := text.CheckID(name, value); problem != "" {
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
		// Otherwise write access to the config would be enough to have the stored key
		// sent to another server.
		return nil, "changing api_endpoint requires admin_api_key, because the engine sends the admin key to that endpoint" + keyFirst
	}
	cfg.APIEndpoint = endpoint

	if raw, ok := d.GetOk("ca_cert"); ok {
		cfg.CACert = strings.TrimSpace(raw.(string))
		if len(cfg.CACert) > maxCACert {
			return nil, fmt.Sprintf("ca_cert is %d bytes long; the limit is %d", len(cfg.CACert), maxCACert)
		}
		if cfg.CACert != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(cfg.CACert)) {
			return nil, "ca_cert contains no PEM certificate"
		}
		if old != nil && !newKey && !trustsNoMore(old.CACert, cfg.CACert) {
			// Otherwise write access to the config, with control of the endpoint's DNS
			// name or proxy, would be enough to read the stored key.
			return nil, "adding certificates to ca_cert or clearing it requires admin_api_key, because ca_cert decides which servers receive the admin key" + keyFirst
		}
	}
	if raw, ok := d.GetOk("rotation_grace_period"); ok {
		grace := time.Duration(raw.(int)) * time.Second
		if grace < 0 || grace > maxRotationGrace {
			return nil, fmt.Sprintf("rotation_grace_period must be between 0 and %s", maxRotationGrace)
		}
		if grace < cfg.RotationGracePeriod || grace == 0 {
			cfg.hurry(grace, now)
		}
		cfg.RotationGracePeriod = grace
	}
	if raw, ok := d.GetOk("request_timeout"); ok {
		cfg.RequestTimeout = time.Duration(raw.(int)) * time.Second
		if cfg.RequestTimeout < time.Second || cfg.RequestTimeout > maxRequestTimeout {
			return nil, fmt.Sprintf("request_timeout must be between 1s and %s", maxRequestTimeout)
		}
	}
	if raw, ok := d.GetOk("max_concurrent_requests"); ok {
		cfg.MaxConcurrent = raw.(int)
		if cfg.MaxConcurrent < minConcurrent || cfg.MaxConcurrent > maxConcurrent {
			return nil, fmt.Sprintf("max_concurrent_requests must be between %d and %d", minConcurrent, maxConcurrent)
		}
	}
	if raw, ok := d.GetOk("tidy_interval"); ok {
		cfg.TidyInterval = time.Duration(raw.(int)) * time.Second
		if cfg.TidyInterval != 0 && (cfg.TidyInterval < minTidyInterval || cfg.TidyInterval > maxTidyTime) {
			return nil, fmt.Sprintf("tidy_interval must be between %s and %s, or 0 to disable automatic runs", minTidyInterval, maxTidyTime)
		}
	}
	if raw, ok := d.GetOk("tidy_safety_buffer"); ok {
		cfg.TidySafetyBuffer = time.Duration(raw.(int)) * time.Second
		if cfg.TidySafetyBuffer < time.Second || cfg.TidySafetyBuffer > maxTidyTime {
			return nil, fmt.Sprintf("tidy_safety_buffer must be between 1s and %s", maxTidyTime)
		}
	}
	if problem := cfg.mergeUsage(d); problem != "" {
		return nil, problem
	}
	for field, target := range map[string]*bool{
		"require_spend_limit":      &cfg.RequireSpendLimit,
		"require_model_allow_list": &cfg.RequireModelAllowList,
		"require_scopes":           &cfg.RequireScopes,
	} {
		if raw, ok := d.GetOk(field); ok {
			*target = raw.(bool)
		}
	}
	if problem := cfg.mergeSchedule(d, now); problem != "" {
		return nil, problem
	}
	return cfg, ""
}

// mergeUsage applies a write to the settings of usage records and metrics.
func (c *config) mergeUsage(d *framework.FieldData) (problem string) {
	if raw, ok := d.GetOk("usage_interval"); ok {
		c.UsageInterval = time.Duration(raw.(int)) * time.Second
		if c.UsageInterval != 0 && (c.UsageInterval < minUsageInterval || c.UsageInterval > maxUsageInterval) {
			return fmt.Sprintf("usage_interval must be between %s and %s, or 0 to disable usage metrics", minUsageInterval, maxUsageInterval)
		}
	}
	if raw, ok := d.GetOk("usage_retention"); ok {
		c.UsageRetention = time.Duration(raw.(int)) * time.Second
		if c.UsageRetention != 0 && (c.UsageRetention < minUsageRetention || c.UsageRetention > maxUsageRetention) {
			return "usage_retention must be between 1 and 400 days, or 0 to disable usage records"
		}
	}
	if raw, ok := d.GetOk("usage_record_identity"); ok {
		c.UsageRecordIdentity = raw.(bool)
	}
	if c.UsageInterval != 0 && c.UsageRetention == 0 {
		return "usage_interval requires usage_retention: without usage records, no cost belongs to a role"
	}
	return ""
}

// keyFirst ends the errors of writes that require the admin key.
const keyFirst = "; if the engine has rotated the key, create another admin key at " + adminKeysPage

// trustsNoMore reports whether a CA bundle trusts only CAs that the previous one
// trusts; an empty one trusts the system's CAs.
func trustsNoMore(before, after string) bool {
	if before == "" || after == "" {
		return before == after
	}
	known := certificates(before)
	return !slices.ContainsFunc(certificates(after), func(c string) bool { return !slices.Contains(known, c) })
}

// certificates returns the certificates that a pool takes from a bundle, in DER.
func certificates(bundle string) (all []string) {
	for rest := []byte(bundle); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return all
		}
		if block.Type != "CERTIFICATE" || len(block.Headers) != 0 {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err == nil {
			all = append(all, string(block.Bytes))
		}
	}
}

// checkAdminKey returns the problem with the shape of an admin key, "" if there is
// none. It recognizes other kinds of keys, since pasting one is a common mistake.
func checkAdminKey(key string) string {
	const remedy = "; an organization owner can create an admin key (sk-admin-...) at " + adminKeysPage
	if key == "" {
		return "admin_api_key is empty"
	}
	if problem := text.Check("admin_api_key", key); problem != "" {
		return problem
	}
	if strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "admin_api_key contains a space or another invalid character"
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

// parseEndpoint checks and normalizes a base URL. There is deliberately no list of
// forbidden addresses: anyone with write access to config controls the host, and a
// change of it requires the admin key.
func parseEndpoint(raw string, allowInsecure bool) (endpoint, problem string) {
	if problem := text.Check("api_endpoint", raw); problem != "" {
		return "", problem
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "", "api_endpoint is not a valid URL" // not quoted: it may contain a password
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
			return "", "api_endpoint must use https, because http sends the admin key in plaintext; http is allowed for loopback addresses and with allow_insecure_endpoint=true"
		}
	default:
		return "", fmt.Sprintf("api_endpoint must use https, not %.32q", u.Scheme)
	}
	return strings.TrimRight(u.String(), "/"), ""
}

// replacesKey reports whether the config has another admin key than old.
func (c *config) replacesKey(old *config) bool {
	return old != nil && !c.AdminKey.Equal(old.AdminKey)
}

// losesKey returns the reason to reject an unchecked replacement of the admin key, ""
// if there is none.
func (c *config) losesKey(old *config) (problem string) {
	if !c.replacesKey(old) || !old.AdminKeyRotated && !old.KeyOriginUnknown {
		return ""
	}
	return fmt.Sprintf("config not stored: skip_verify=true would replace admin key %s with an unverified key, and the value of %[1]s may exist only in Vault; remove skip_verify, or add force=true to give that key up", old.AdminKeyID)
}

// undoesRotation returns the reason to reject a superseded admin key, "" if there is
// none: a tool that applies the same config repeatedly would undo each rotation.
func (c *config) undoesRotation(old *config) (problem string) {
	if !c.replacesKey(old) || c.AdminKeyID == "" {
		return ""
	}
	for i := range old.Superseded {
		if k := &old.Superseded[i]; k.ID == c.AdminKeyID {
			return fmt.Sprintf("config not stored: admin_api_key is key %s, which this mount superseded at %s and will delete; omit admin_api_key, send a new admin key from %s, or send force=true to undo that rotation",
				k.ID, text.Time(k.superseded(old.RotationGracePeriod)), adminKeysPage)
		}
	}
	return ""
}

// findAdminKeyID looks up the ID of the admin key, or verifies the one given: with a
// wrong ID, a rotation would delete another key. It also sets when the key expires. A
// non-nil response rejects the write.
func findAdminKeyID(ctx context.Context, cfg *config, api *client.Client) ([]client.AdminKey, *logical.Response, error) {
	keys, err := api.ListAdminKeys(ctx)
	if err != nil {
		return nil, nil, err
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
		return nil, logical.ErrorResponse("config not stored: the admin key works but matches none of the organization's %d admin keys; send its ID as admin_api_key_id", len(keys)), nil
	case cfg.AdminKeyID == "":
		return nil, logical.ErrorResponse("config not stored: the admin key matches several admin keys (%s); send its ID as admin_api_key_id", strings.Join(matching, ", ")), nil
	case exists && len(matching) == 0:
		// The redacted values have an unknown format, so the ID cannot be verified.
	case !slices.Contains(matching, cfg.AdminKeyID):
		return nil, logical.ErrorResponse("config not stored: admin_api_key_id %q is not the ID of this admin key; omit it to let the engine look it up", cfg.AdminKeyID), nil
	}
	for _, key := range keys {
		if key.ID == cfg.AdminKeyID {
			cfg.AdminKeyExpires = key.ExpiresAt
		}
	}
	return keys, nil, nil
}

const (
	// renewFloor is the minimum time between rotations that only the key's expiry
	// requires: this clock and OpenAI's may disagree on the expiry.
	renewFloor = time.Hour
)

// mergeSchedule applies a write to the schedule of the admin key.
func (c *config) mergeSchedule(d *framework.FieldData, now time.Time) (problem string) {
	before := *c
	if problem := c.Merge(d, now); problem != "" {
		return problem
	}
	if raw, ok := d.GetOk("disable_automated_rotation"); ok {
		c.DisableAutomatedRotation = raw.(bool)
	}
	// A write that leaves the schedule unchanged neither postpones the next rotation
	// nor clears an error.
	changed := !c.sameSchedule(&before)
	if changed {
		c.RotationError = ""
	}
	if changed || c.NextRotation.IsZero() {
		c.plan(now)
	}
	return ""
}

// scheduled reports whether automatic rotations are configured.
func (c *config) scheduled() bool {
	return !c.DisableAutomatedRotation && (c.RotationPeriod != 0 || c.RotationSchedule != "")
}

func (c *config) sameSchedule(o *config) bool {
	return c.Same(&o.Schedule) && c.DisableAutomatedRotation == o.DisableAutomatedRotation
}

// plan sets when the next rotation is due. A period counts from the last rotation, or
// from now for a key that no rotation created.
func (c *config) plan(now time.Time) {
	c.NextRotation = time.Time{}
	if !c.scheduled() {
		return
	}
	from := now
	if c.RotationPeriod != 0 && c.AdminKeyRotated {
		from = c.LastRotated
	}
	c.PlanFrom(from)
}

// nextRotation returns when the engine or Vault rotates the key next: at the scheduled
// time plus slack, or sooner if the key expires before. Zero if nothing is planned.
func (c *config) nextRotation(now time.Time, slack time.Duration) time.Time {
	if c.DisableAutomatedRotation {
		return time.Time{}
	}
	at := time.Time{}
	if c.scheduled() {
		at = c.Tick(now)
	}
	if !at.IsZero() {
		at = at.Add(slack)
	}
	// Without a schedule, a key that the operator wrote is not replaced.
	by := c.renewBy()
	if floor := c.LastRotated.Add(renewFloor); !by.IsZero() && c.AdminKeyRotated && !c.LastRotated.After(now) && by.Before(floor) {
		by = floor
	}
	if !by.IsZero() && (c.scheduled() || c.AdminKeyRotated) && (at.IsZero() || by.Before(at)) {
		return by
	}
	return at
}

// correctTimes repairs times that a clock that was ahead stored: it sets past events
// that are in the future to now, and recomputes the plan from them, never later than
// before. It reports whether it changed anything.
func (c *config) correctTimes(now time.Time) (corrected bool) {
	now = now.UTC().Truncate(time.Second)
	if c.LastRotated.After(now.Add(clockTolerance)) {
		c.LastRotated, corrected = now, true
		if life := c.keyLife(now); life != 0 && c.AdminKeyExpires.After(now.Add(life)) {
			c.AdminKeyExpires = now.Add(life)
		}
	}
	// With a correct clock, the next rotation is never later than this.
	if planned := c.Schedule; c.scheduled() {
		planned.PlanFrom(now)
		if c.NextRotation.After(planned.NextRotation.Add(clockTolerance)) {
			c.NextRotation, corrected = planned.NextRotation, true
		}
	}
	for i := range c.Superseded {
		k := &c.Superseded[i]
		// A time that OpenAI's clock confirms is not in the future: this clock is behind.
		at := later(now, k.SupersededThere)
		if k.CreatedAt.After(at.Add(clockTolerance)) {
			k.CreatedAt, corrected = at, true
		}
		superseded := k.superseded(c.RotationGracePeriod)
		if !superseded.After(at.Add(clockTolerance)) {
			continue
		}
		after := at.Add(k.DeleteAfter.Sub(superseded))
		if after.Before(k.DeleteAfter) {
			k.DeleteAfter = after
		}
		k.SupersededAt, corrected = at, true
	}
	return corrected
}

// keyLife returns the lifetime of an admin key created now: three rotations, and at
// least a week; 0 means that it does not expire. If two rotations take longer than a
// year, OpenAI's limit, the key does not expire, since it could expire before the
// rotation that replaces it.
func (c *config) keyLife(now time.Time) time.Duration {
	if !c.scheduled() {
		return 0
	}
	life := c.ThreeRotations(now, client.MaxExpiry)
	if life == 0 {
		return 0
	}
	return max(life, minKeyLife)
}

// renewBy returns the latest time to replace a key that expires, zero for one that
// does not: when a third of its life is left, or a period if that is longer. The life
// of a key that this engine did not create is not known.
func (c *config) renewBy() time.Time {
	if c.AdminKeyExpires.IsZero() {
		return time.Time{}
	}
	left := minKeyLife
	if c.AdminKeyRotated {
		// Not positive if the clock was so far ahead at the rotation that the key
		// expires before it.
		if life := c.AdminKeyExpires.Sub(c.LastRotated); life > 0 {
			left = life / 3
			if c.RotationPeriod <= life/2 {
				left = max(left, c.RotationPeriod)
			}
		}
	}
	return c.AdminKeyExpires.Add(-left)
}

// expiryText returns the warning for an admin key that expires, "" for one that does
// not.
func (c *config) expiryText() string {
	if c.AdminKeyExpires.IsZero() {
		return ""
	}
	end, by := text.Time(c.AdminKeyExpires), text.Time(c.renewBy())
	switch {
	case c.DisableAutomatedRotation:
		return fmt.Sprintf("The admin key expires at OpenAI at %s, and disable_automated_rotation prevents its replacement. Run config/rotate, which replaces it with a key that does not expire, or write another admin key.", end)
	case c.scheduled():
		return fmt.Sprintf("The admin key expires at OpenAI at %s. The engine replaces it at %s, earlier than the schedule requires.", end, by)
	case c.AdminKeyRotated:
		return fmt.Sprintf("The admin key expires at OpenAI at %s, and no rotation is scheduled. The engine replaces it once, at %s, with a key that does not expire.", end, by)
	default:
		return fmt.Sprintf("The admin key expires at OpenAI at %s, and no rotation is scheduled. Before then, run config/rotate or write another admin key.", end)
	}
}

// showSchedule adds the schedule to a read of the config.
func (c *config) showSchedule(resp *logical.Response, now time.Time) {
	next, manager := c.nextRotation(now, 0), ""
	if !next.IsZero() {
		manager = managerInternal
		if c.scheduled() && c.RotationManager != "" {
			manager = c.RotationManager
		}
	}
	for name, value := range map[string]any{
		"rotation_period":            int64(c.RotationPeriod / time.Second),
		"rotation_schedule":          c.RotationSchedule,
		"rotation_window":            int64(c.RotationWindow / time.Second),
		"disable_automated_rotation": c.DisableAutomatedRotation,
		"rotation_manager":           manager,
		"next_rotation":              text.TimeOrNull(next),
		"last_rotation_error":        c.RotationError,
		"admin_api_key_expires_at":   text.TimeOrNull(c.AdminKeyExpires),
	} {
		resp.Data[name] = value
	}
	if by := c.renewBy(); !by.IsZero() && !now.Before(by) {
		resp.AddWarning(c.expiryText())
	}
}

// Reasons to keep a superseded key beyond its grace period.
const (
	// keptUsed: OpenAI reports a use after it was superseded.
	keptUsed = "used"
	// keptUnvouched: a config write replaced it, and another process may have used it
	// until then.
	keptUnvouched = "perhaps_used"
)

// supersededKey is an admin key that this engine has replaced and will delete.
type supersededKey struct {
	ID          string    `json:"id"`
	DeleteAfter time.Time `json:"delete_after"`
	// SupersededAt is when another key replaced it; zero in entries of earlier
	// releases.
	SupersededAt time.Time `json:"superseded_at,omitzero"`
	// SupersededThere is when its replacement was created, by OpenAI's clock, which
	// last_used_at uses, too. Zero if this engine did not create the replacement.
	SupersededThere time.Time `json:"superseded_at_openai,omitzero"`
	// CreatedAt is when this engine created it, zero if it did not.
	CreatedAt time.Time `json:"created_at,omitzero"`
	// EvenIfUsed reports that it is deleted even if it is still used.
	EvenIfUsed bool `json:"delete_even_if_used,omitempty"`
	// Kept is the reason to keep it beyond its grace period, and LastUsed the use that
	// OpenAI reported.
	Kept     string    `json:"kept,omitempty"`
	LastUsed time.Time `json:"last_used_at,omitzero"`
	// Elsewhere reports that a listing with the active key does not show it: it may
	// belong to another organization or endpoint.
	Elsewhere bool `json:"elsewhere,omitempty"`
	// Unchecked reports that it may belong to another organization, and that no listing
	// with the active key has been read since.
	Unchecked bool `json:"not_checked,omitempty"`
}

// superseded returns when the key was superseded, by the later of the two clocks. For
// an entry of an earlier release it follows from the grace period.
func (k *supersededKey) superseded(grace time.Duration) time.Time {
	if k.SupersededAt.IsZero() {
		return k.DeleteAfter.Add(-grace)
	}
	return later(k.SupersededAt, k.SupersededThere)
}

// seen reports whether there is no doubt that the active key sees the key.
func (k *supersededKey) seen() bool { return !k.Elsewhere && !k.Unchecked }

func (k *supersededKey) due(now time.Time) bool { return k.seen() && !now.Before(k.DeleteAfter) }

// usedAfter reports whether a use of the key was too long after it was superseded to
// be by this process.
func (k *supersededKey) usedAfter(lastUsed time.Time, grace time.Duration) bool {
	at := k.SupersededThere
	if at.IsZero() {
		at = k.superseded(grace)
	}
	return lastUsed.After(at.Add(useTolerance))
}

// hurry schedules the deletion of the key even if it is still used, at the given time
// or when it was due if that is sooner.
func (k *supersededKey) hurry(at time.Time) {
	if at.Before(k.DeleteAfter) {
		k.DeleteAfter = at.UTC().Truncate(time.Second)
	}
	k.EvenIfUsed, k.Kept, k.LastUsed = true, "", time.Time{}
}

// keptText returns the warning for a key that is kept, "" for one that is not.
func (k *supersededKey) keptText() string {
	why := k.keptWhy()
	if why == "" {
		return ""
	}
	return fmt.Sprintf("Superseded admin key %s is retained until %s: %s. To delete it immediately, run config/rotate with force=true or write rotation_grace_period=0 to the config.", k.ID, text.Time(k.DeleteAfter), why)
}

func (k *supersededKey) keptWhy() string {
	switch k.Kept {
	case keptUsed:
		return fmt.Sprintf("OpenAI reports that it was last used at %s, after it was superseded, so another client, such as a restored copy of this Vault, still uses it", text.Time(k.LastUsed))
	case keptUnvouched:
		return "another Vault, such as the one from which this Vault was restored, may still use it"
	}
	return ""
}

// supersedeKey schedules the deletion of the current admin key, which this engine
// created or is about to replace, after the grace period; there is the time by
// OpenAI's clock, zero if unknown.
func (c *config) supersedeKey(now, there time.Time) {
	if c.AdminKeyID == "" {
		return
	}
	c.dropSuperseded(c.AdminKeyID) // it was superseded before and configured again
	now = now.UTC().Truncate(time.Second)
	key := supersededKey{ID: c.AdminKeyID, SupersededAt: now, SupersededThere: there, DeleteAfter: now, EvenIfUsed: c.RotationGracePeriod == 0}
	if !key.EvenIfUsed {
		key.DeleteAfter = later(now, there).Add(c.RotationGracePeriod)
	}
	if c.AdminKeyRotated {
		key.CreatedAt = c.LastRotated
	}
	c.Superseded = append(c.Superseded, key)
}

// dropSuperseded removes a key from the list of those to delete.
func (c *config) dropSuperseded(id string) {
	c.Superseded = slices.DeleteFunc(c.Superseded, func(k supersededKey) bool { return k.ID == id })
}

// hurry schedules the deletion of superseded keys even if they are still used, each
// this long after it was superseded (at once for 0), and none later than planned.
func (c *config) hurry(grace time.Duration, now time.Time) {
	for i := range c.Superseded {
		k := &c.Superseded[i]
		k.SupersededAt = k.superseded(c.RotationGracePeriod)
		at := now // the clock may have been wrong when it was superseded
		if grace > 0 {
			at = k.SupersededAt.Add(grace)
		}
		k.hurry(at)
	}
}

var (
	errAdminKeyIDUnknown = errors.New("the ID of the current admin key is unknown or wrong, so a rotation could not delete the key; write admin_api_key_id to the config")
)
