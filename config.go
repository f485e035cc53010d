package openaisecrets

// This file owns the config: its entry, what a write makes of it, the checks before
// that is stored, of each field and of what the API says to it, and its schedule.
//
// What must stay true: a check has no effect at OpenAI, and no answer quotes the admin
// key. A key that this engine gave an end is replaced before that, whatever has become
// of its schedule, unless disable_automated_rotation forbids it.

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
	"vault-plugin-secrets-openai/internal/text"
)

const (
	configStorageKey = "config"
	configVersion    = 1

	maxCACert = 256 << 10
	// minConcurrent leaves a place each for issues and revokes.
	minConcurrent = 4
	maxConcurrent = 1024
)

// configSpelled are the fields of which an empty text stands for a default or for
// what the engine finds, or that have several spellings.
var configSpelled = []string{"admin_api_key_id", "api_endpoint"}

// config is the engine's configuration, as stored and as used.
type config struct {
	Version int `json:"version"`
	// AdminKey prints as ***; putConfig and getConfig carry its value.
	AdminKey client.Secret `json:"-"`
	// AdminKeyID is empty only after skip_verify.
	AdminKeyID string `json:"admin_api_key_id"`
	// AdminKeyRotated says that this engine made the key, so that nobody else
	// holds its value and it must not be left behind.
	AdminKeyRotated bool `json:"admin_api_key_rotated,omitempty"`
	// KeyOriginUnknown says that another plugin stored the key, and may have made it.
	KeyOriginUnknown bool   `json:"admin_api_key_origin_unknown,omitempty"`
	OrganizationID   string `json:"organization_id,omitempty"`
	// ProjectID is that of roles which name none; it may be empty.
	ProjectID             string        `json:"project_id,omitempty"`
	APIEndpoint           string        `json:"api_endpoint"`
	AllowInsecureEndpoint bool          `json:"allow_insecure_endpoint,omitempty"`
	CACert                string        `json:"ca_cert,omitempty"`
	RotationGracePeriod   time.Duration `json:"rotation_grace_period"`
	RequestTimeout        time.Duration `json:"request_timeout"`
	MaxConcurrent         int           `json:"max_concurrent_requests"`
	Retired               []retiredKey  `json:"retired_admin_keys,omitempty"`

	// TidyInterval is how often the engine sweeps by itself; 0 = never.
	TidyInterval     time.Duration `json:"tidy_interval"`
	TidySafetyBuffer time.Duration `json:"tidy_safety_buffer"`

	schedule
	DisableAutomatedRotation bool `json:"disable_automated_rotation,omitempty"`
	// RotationManager says who keeps the schedule. managerVault stays until
	// Vault has been told that there is none any more.
	RotationManager string `json:"rotation_manager,omitempty"`
	// RotationError is why the last rotation that nobody asked for has failed;
	// empty after a success.
	RotationError string `json:"last_rotation_error,omitempty"`
	// AdminKeyExpires is the admin key's end at OpenAI; zero = none known.
	AdminKeyExpires time.Time `json:"admin_api_key_expires_at,omitzero"`

	AsWritten asWritten `json:"as_written,omitempty"`
}

// storedConfig adds the one value that config itself never encodes.
type storedConfig struct {
	*config
	AdminKey string `json:"admin_api_key"`
}

// readConfig reads the entry, in which only the community plugin names no version.
func readConfig(ctx context.Context, s logical.Storage) (*config, *logical.StorageEntry, error) {
	entry, err := s.Get(ctx, configStorageKey)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the config: %w", err)
	}
	if entry == nil {
		return nil, nil, nil
	}
	stored := storedConfig{config: &config{}}
	if err := entry.DecodeJSON(&stored); err != nil {
		return nil, nil, fmt.Errorf("decoding the config: %w", err)
	}
	if stored.Version > configVersion {
		return nil, nil, fmt.Errorf("the config was written by a newer version of this plugin (format %d, this one knows %d)", stored.Version, configVersion)
	}
	stored.config.AdminKey = client.NewSecret(stored.AdminKey)
	return stored.config, entry, nil
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

// spelling is what is used of the fields of configSpelled. An ID that is unknown
// will be found, so it is not the empty text that asks for that.
func (c *config) spelling() map[string]any {
	used := map[string]any{"api_endpoint": c.APIEndpoint, "admin_api_key_id": c.AdminKeyID}
	if c.AdminKeyID == "" {
		used["admin_api_key_id"] = nil
	}
	return used
}

// clone returns a copy that shares nothing that is ever changed.
func (c *config) clone() *config {
	copied := *c
	copied.Retired = slices.Clone(c.Retired)
	return &copied
}

// Who keeps a schedule.
const (
	managerVault    = "vault"
	managerInternal = "internal"
)

// mergeConfig applies a write to the stored config (nil when there is none)
// and checks everything that can be checked without a call. The problem is for
// the caller, "" when there is none.
func mergeConfig(old *config, d *framework.FieldData, now time.Time) (cfg *config, problem string) {
	if old == nil {
		cfg = &config{
			APIEndpoint:         client.DefaultBaseURL,
			RotationGracePeriod: defaultRotationGrace,
			RequestTimeout:      client.DefaultTimeout,
			MaxConcurrent:       client.DefaultConcurrency,
			TidyInterval:        defaultTidyInterval,
			TidySafetyBuffer:    defaultTidySafetyBuffer,
		}
	} else {
		cfg = old.clone()
	}

	newKey, known := false, false // given, and the one whose ID is stored
	if raw, ok := d.GetOk("admin_api_key"); ok {
		key := strings.TrimSpace(raw.(string)) // a key read from a file ends in a line break
		if problem := checkAdminKey(key); problem != "" {
			return nil, problem
		}
		newKey, known = true, cfg.AdminKeyID != "" && cfg.AdminKey.Equal(client.NewSecret(key))
		if !cfg.AdminKey.Equal(client.NewSecret(key)) {
			if cfg.AdminKeyRotated {
				cfg.retire(now, time.Time{}) // nobody else knows its value
			}
			cfg.AdminKey, cfg.AdminKeyID, cfg.AdminKeyRotated, cfg.KeyOriginUnknown = client.NewSecret(key), "", false, false
			cfg.AdminKeyExpires, cfg.NextRotation, cfg.LastRotated = time.Time{}, time.Time{}, time.Time{}
			cfg.RotationError = "" // of the key before
		}
	}
	if cfg.AdminKey.IsZero() {
		return nil, "admin_api_key is required"
	}

	id, idGiven := d.GetOk("admin_api_key_id")
	// An empty one asks for it to be found, which it is, unless nothing is looked for.
	idGiven = idGiven && (id.(string) != "" || newKey && !(known && d.Get("skip_verify").(bool)))
	if idGiven && cfg.AdminKeyRotated && strings.TrimSpace(id.(string)) != cfg.AdminKeyID {
		// It would otherwise be retired, and deleted, in place of the real one.
		return nil, fmt.Sprintf("admin_api_key_id: this engine made the admin key in force and knows its ID, %s; send admin_api_key with the ID of another", cfg.AdminKeyID)
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
		// Otherwise whoever may write the config could have the stored key
		// sent to a server of theirs, and so read what is never read back.
		return nil, "api_endpoint says where the admin key is sent: to change it, send admin_api_key with it" + keyFirst
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
		if old != nil && !newKey && !trustsNoMore(old.CACert, cfg.CACert) {
			// Otherwise whoever may write the config and can answer for the
			// endpoint's name, by DNS or a proxy, could read the stored key.
			return nil, "ca_cert says which servers may receive the admin key: to change it other than by removing some of its certificates, or to clear it, send admin_api_key with it" + keyFirst
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
			return nil, fmt.Sprintf("tidy_interval must be 0 (only by hand) or between %s and %s", minTidyInterval, maxTidyTime)
		}
	}
	if raw, ok := d.GetOk("tidy_safety_buffer"); ok {
		cfg.TidySafetyBuffer = time.Duration(raw.(int)) * time.Second
		if cfg.TidySafetyBuffer < time.Second || cfg.TidySafetyBuffer > maxTidyTime {
			return nil, fmt.Sprintf("tidy_safety_buffer must be between 1s and %s", maxTidyTime)
		}
	}
	if problem := cfg.mergeSchedule(d, now); problem != "" {
		return nil, problem
	}
	return cfg, ""
}

// keyFirst is said where a write needs the admin key.
const keyFirst = "; after a rotation only this engine knows the key, so make another admin key first, at " + adminKeysPage

// trustsNoMore reports whether a CA bundle trusts nothing that the one before does
// not; an empty one trusts the system's CAs.
func trustsNoMore(before, after string) bool {
	if before == "" || after == "" {
		return before == after
	}
	known := certificates(before)
	return !slices.ContainsFunc(certificates(after), func(c string) bool { return !slices.Contains(known, c) })
}

// certificates are those that a pool takes from a bundle, in DER.
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

// checkAdminKey says what is wrong with the shape of an admin key, "" when
// nothing is. It names a key of another kind as what it is, since pasting the
// wrong one is the likeliest mistake of all.
func checkAdminKey(key string) string {
	const remedy = "; an organization owner makes an admin key (sk-admin-...) at " + adminKeysPage
	if key == "" {
		return "admin_api_key is empty"
	}
	if problem := text.Check("admin_api_key", key); problem != "" {
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
	if problem := text.Check("api_endpoint", raw); problem != "" {
		return "", problem
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "", "api_endpoint is not a URL" // and not quoted: a password may be why
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

// replacesKey reports whether a config has another admin key than the one before.
func (c *config) replacesKey(old *config) bool {
	return old != nil && !c.AdminKey.Equal(old.AdminKey)
}

// losesKey says why a write may not replace the admin key unchecked, "" when it may.
func (c *config) losesKey(old *config) (problem string) {
	if !c.replacesKey(old) || !old.AdminKeyRotated && !old.KeyOriginUnknown {
		return ""
	}
	return fmt.Sprintf("config not stored: skip_verify=true would replace admin key %s, of which only this engine may have the value, by one that may not work; leave skip_verify out, or send force=true as well to give that key up", old.AdminKeyID)
}

// undoesRotation says why a write may not bring an admin key back into force, ""
// when it may: a tool that writes the same config again and again would undo each
// rotation.
func (c *config) undoesRotation(old *config) (problem string) {
	if !c.replacesKey(old) || c.AdminKeyID == "" {
		return ""
	}
	for i := range old.Retired {
		if k := &old.Retired[i]; k.ID == c.AdminKeyID {
			return fmt.Sprintf("config not stored: admin_api_key is key %s, which this mount superseded at %s and deletes: writing it back would undo that rotation. Leave admin_api_key out, make another at %s, or send force=true to keep this one",
				k.ID, text.Time(k.superseded(old.RotationGracePeriod)), adminKeysPage)
		}
	}
	return ""
}

// findAdminKeyID fills in the ID of the admin key, or confirms the one given:
// a wrong one would have a rotation delete somebody else's key. It notes when
// the key expires. A response tells the caller what to send.
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
		return nil, logical.ErrorResponse("config not stored: the admin key works, but none of the organization's %d admin keys looks like it; send its ID as admin_api_key_id", len(keys)), nil
	case cfg.AdminKeyID == "":
		return nil, logical.ErrorResponse("config not stored: several admin keys look like this one (%s); send its ID as admin_api_key_id", strings.Join(matching, ", ")), nil
	case exists && len(matching) == 0:
		// Redacted in a way that this version does not read: the ID's word.
	case !slices.Contains(matching, cfg.AdminKeyID):
		return nil, logical.ErrorResponse("config not stored: admin_api_key_id %q is not the ID of this admin key; leave it out and it is found", cfg.AdminKeyID), nil
	}
	for _, key := range keys {
		if key.ID == cfg.AdminKeyID {
			cfg.AdminKeyExpires = key.ExpiresAt
		}
	}
	return keys, nil, nil
}

const (
	// renewFloor is the least time from one rotation to the next that only the
	// key's end asks for: this clock and OpenAI's may disagree on when that is.
	renewFloor = time.Hour
)

// mergeSchedule applies a write to the schedule of the admin key.
func (c *config) mergeSchedule(d *framework.FieldData, now time.Time) (problem string) {
	before := *c
	if problem := c.merge(d, now); problem != "" {
		return problem
	}
	if raw, ok := d.GetOk("disable_automated_rotation"); ok {
		c.DisableAutomatedRotation = raw.(bool)
	}
	// A write that changes nothing of the schedule does not put it off, and does not
	// make a failure forgotten.
	changed := !c.sameSchedule(&before)
	if changed {
		c.RotationError = ""
	}
	if changed || c.NextRotation.IsZero() {
		c.plan(now)
	}
	return ""
}

// scheduled reports whether rotations are to happen by themselves.
func (c *config) scheduled() bool {
	return !c.DisableAutomatedRotation && (c.RotationPeriod != 0 || c.RotationSchedule != "")
}

func (c *config) sameSchedule(o *config) bool {
	return c.same(&o.schedule) && c.DisableAutomatedRotation == o.DisableAutomatedRotation
}

// plan sets when the next rotation is due. A period counts from the last
// rotation, or from now for a key that no rotation has made.
func (c *config) plan(now time.Time) {
	c.NextRotation = time.Time{}
	if !c.scheduled() {
		return
	}
	from := now
	if c.RotationPeriod != 0 && c.AdminKeyRotated {
		from = c.LastRotated
	}
	c.planFrom(from)
}

// nextRotation is when the engine, or Vault for it, replaces the key next:
// when the schedule says so, or sooner when the key's own end demands it. Zero
// when nothing is planned. The schedule's part may be later by slack.
func (c *config) nextRotation(now time.Time, slack time.Duration) time.Time {
	if c.DisableAutomatedRotation {
		return time.Time{}
	}
	at := time.Time{}
	if c.scheduled() {
		at = c.tick(now)
	}
	if !at.IsZero() {
		at = at.Add(slack)
	}
	// A key of the operator's is not replaced uninvited.
	by := c.renewBy()
	if floor := c.LastRotated.Add(renewFloor); !by.IsZero() && c.AdminKeyRotated && !c.LastRotated.After(now) && by.Before(floor) {
		by = floor
	}
	if !by.IsZero() && (c.scheduled() || c.AdminKeyRotated) && (at.IsZero() || by.Before(at)) {
		return by
	}
	return at
}

// correctTimes replaces times of the past that lie in the future, which a clock
// that was ahead has left, by now, and plans anew what follows from them, never
// later than before. It reports whether there were any.
func (c *config) correctTimes(now time.Time) (corrected bool) {
	now = now.UTC().Truncate(time.Second)
	if c.LastRotated.After(now.Add(clockTolerance)) {
		c.LastRotated, corrected = now, true
		if life := c.keyLife(now); life != 0 && c.AdminKeyExpires.After(now.Add(life)) {
			c.AdminKeyExpires = now.Add(life)
		}
	}
	// A schedule that was planned by the right clock is never further away.
	if planned := c.schedule; c.scheduled() {
		planned.planFrom(now)
		if c.NextRotation.After(planned.NextRotation.Add(clockTolerance)) {
			c.NextRotation, corrected = planned.NextRotation, true
		}
	}
	for i := range c.Retired {
		k := &c.Retired[i]
		// What OpenAI's clock confirms is not of the future: then this one is behind.
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

// keyLife is how long an admin key made now is to live: until three rotations
// in a row would have been missed, but a week at least; 0 = without end. A
// schedule with which two would take longer than OpenAI's limit of a year gets
// none, since such an end could come before the rotation that renews it.
func (c *config) keyLife(now time.Time) time.Duration {
	if !c.scheduled() {
		return 0
	}
	life := c.threeRotations(now)
	if life == 0 {
		return 0
	}
	return max(life, minKeyLife)
}

// renewBy is when a key that has an end must be replaced at the latest, zero
// for one that has none: with a third of its life left, or a period where that
// is more. Of a key that this engine has not made only the end is known.
func (c *config) renewBy() time.Time {
	if c.AdminKeyExpires.IsZero() {
		return time.Time{}
	}
	left := minKeyLife
	if c.AdminKeyRotated {
		// Unless the clock was so far ahead at the rotation that the key's end
		// lies before it.
		if life := c.AdminKeyExpires.Sub(c.LastRotated); life > 0 {
			left = life / 3
			if c.RotationPeriod <= life/2 {
				left = max(left, c.RotationPeriod)
			}
		}
	}
	return c.AdminKeyExpires.Add(-left)
}

// expiryText says what becomes of an admin key that has an end, "" for one
// that has none.
func (c *config) expiryText() string {
	if c.AdminKeyExpires.IsZero() {
		return ""
	}
	end, by := text.Time(c.AdminKeyExpires), text.Time(c.renewBy())
	switch {
	case c.DisableAutomatedRotation:
		return fmt.Sprintf("The admin key expires at OpenAI at %s, and nothing replaces it before (disable_automated_rotation). Rotate it by hand, which gives it no end, or write another.", end)
	case c.scheduled():
		return fmt.Sprintf("The admin key expires at OpenAI at %s; it is replaced from %s on, whatever the schedule says.", end, by)
	case c.AdminKeyRotated:
		return fmt.Sprintf("The admin key expires at OpenAI at %s, and no rotation is scheduled any more; at %s it is replaced once, by a key without an end.", end, by)
	default:
		return fmt.Sprintf("The admin key expires at OpenAI at %s, and no rotation is scheduled. Rotate it, or write another before.", end)
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

// Why a superseded key outlives its grace period.
const (
	// keptUsed: OpenAI says that it was used after it was superseded.
	keptUsed = "used"
	// keptUnvouched: a config write replaced it, and this process could not tell
	// that all use of it until then was its own.
	keptUnvouched = "perhaps_used"
)

// retiredKey is an admin key that this engine has replaced and will delete.
type retiredKey struct {
	ID          string    `json:"id"`
	DeleteAfter time.Time `json:"delete_after"`
	// SupersededAt is when another took its place; entries of earlier releases
	// have none.
	SupersededAt time.Time `json:"superseded_at,omitzero"`
	// SupersededThere is the same by OpenAI's clock, which last_used_at is of: when
	// the key that took its place was made. Zero if none was.
	SupersededThere time.Time `json:"superseded_at_openai,omitzero"`
	// CreatedAt is when this engine made it, zero if it did not.
	CreatedAt time.Time `json:"created_at,omitzero"`
	// Regardless says that it is deleted whoever uses it.
	Regardless bool `json:"regardless_of_use,omitempty"`
	// Kept is why it outlives its grace period, and LastUsed what OpenAI said.
	Kept     string    `json:"kept,omitempty"`
	LastUsed time.Time `json:"last_used_at,omitzero"`
	// Elsewhere says that no list of the key in force has shown it: it may belong
	// to another organization or endpoint.
	Elsewhere bool `json:"elsewhere,omitempty"`
	// Unchecked says that no list of the key in force has been read since it may be
	// another organization's.
	Unchecked bool `json:"not_checked,omitempty"`
}

// superseded is when the key was superseded, by the later of the two clocks. Of
// one of an earlier release that follows from the grace period.
func (k *retiredKey) superseded(grace time.Duration) time.Time {
	if k.SupersededAt.IsZero() {
		return k.DeleteAfter.Add(-grace)
	}
	return later(k.SupersededAt, k.SupersededThere)
}

// seen reports whether the key in force is known to see the key, or was never in
// doubt to.
func (k *retiredKey) seen() bool { return !k.Elsewhere && !k.Unchecked }

func (k *retiredKey) due(now time.Time) bool { return k.seen() && !now.Before(k.DeleteAfter) }

// usedAfter reports whether a use of the key is so long after it was superseded
// that it was not by this process.
func (k *retiredKey) usedAfter(lastUsed time.Time, grace time.Duration) bool {
	at := k.SupersededThere
	if at.IsZero() {
		at = k.superseded(grace)
	}
	return lastUsed.After(at.Add(useTolerance))
}

// hurry has the key deleted whoever uses it, at a time or when it was due if that
// is sooner.
func (k *retiredKey) hurry(at time.Time) {
	if at.Before(k.DeleteAfter) {
		k.DeleteAfter = at.UTC().Truncate(time.Second)
	}
	k.Regardless, k.Kept, k.LastUsed = true, "", time.Time{}
}

// keptText says why the key is kept, "" for one that is not.
func (k *retiredKey) keptText() string {
	why := k.keptWhy()
	if why == "" {
		return ""
	}
	return fmt.Sprintf("Superseded admin key %s is kept until %s: %s. To delete it at once, run config/rotate with force=true or write rotation_grace_period=0 to the config.", k.ID, text.Time(k.DeleteAfter), why)
}

func (k *retiredKey) keptWhy() string {
	switch k.Kept {
	case keptUsed:
		return fmt.Sprintf("OpenAI says that it was last used at %s, after it was superseded: another Vault, such as a copy of this one, or somebody else uses it", text.Time(k.LastUsed))
	case keptUnvouched:
		return "another Vault, such as the one that this one is a copy of, may use it"
	}
	return ""
}

// retire notes that the current admin key, which this engine made or is about to
// replace, is to be deleted once the grace period has passed;
// there is the time by OpenAI's clock, zero if unknown.
func (c *config) retire(now, there time.Time) {
	if c.AdminKeyID == "" {
		return
	}
	c.forget(c.AdminKeyID) // retired before, and configured again since
	now = now.UTC().Truncate(time.Second)
	key := retiredKey{ID: c.AdminKeyID, SupersededAt: now, SupersededThere: there, DeleteAfter: now, Regardless: c.RotationGracePeriod == 0}
	if !key.Regardless {
		key.DeleteAfter = later(now, there).Add(c.RotationGracePeriod)
	}
	if c.AdminKeyRotated {
		key.CreatedAt = c.LastRotated
	}
	c.Retired = append(c.Retired, key)
}

// forget takes a key off the list of those to be deleted.
func (c *config) forget(id string) {
	c.Retired = slices.DeleteFunc(c.Retired, func(k retiredKey) bool { return k.ID == id })
}

// hurry has superseded keys deleted whoever uses them, each this long after it
// was superseded and at once with 0, and none later than planned.
func (c *config) hurry(grace time.Duration, now time.Time) {
	for i := range c.Retired {
		k := &c.Retired[i]
		k.SupersededAt = k.superseded(c.RotationGracePeriod)
		at := now // whatever the clock was when it was superseded
		if grace > 0 {
			at = k.SupersededAt.Add(grace)
		}
		k.hurry(at)
	}
}

var (
	errAdminKeyIDUnknown = errors.New("the ID of the current admin key is unknown or not that of the key, so it could not be deleted after a rotation: write the right one to the config as admin_api_key_id")
)
