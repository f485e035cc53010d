package openaisecrets

// This file owns a credential's lifecycle at OpenAI: how it is created and prepared, and
// how it is destroyed.
//
// What must stay true: nothing is created before the WAL holds its name; each attempt
// has its own name and its own entry; an entry is deleted only when its credential is
// returned, was never created, or is destroyed. A key without the expiry and scopes of its
// spec never leaves this file, nor does one that OpenAI has not accepted, unless its role
// skips the probe (activation_timeout=0) or ignores its failure (activation_failure=warn).
// A deleted credential counts as success, a missing permission never does.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/text"
)

const (
	credentialVersion = 1

	// probeFirst and probeLongest bound the wait between two probes of a new key;
	// probeTimeout bounds one probe.
	probeFirst   = 50 * time.Millisecond
	probeLongest = 500 * time.Millisecond
	probeTimeout = 5 * time.Second
)

// credential has everything that is needed to destroy a credential. It is the data of a
// WAL entry and part of each lease.
type credential struct {
	Version   int    `json:"version"`
	Type      string `json:"credential_type"`
	ProjectID string `json:"project_id"`
	// Name and ID are the account's. ID is empty if the answer to the create is unknown.
	Name string `json:"service_account,omitempty"`
	ID   string `json:"service_account_id,omitempty"`
	// KeyName and KeyID are the key's; they are optional for typeAccount.
	KeyName string `json:"api_key_name,omitempty"`
	KeyID   string `json:"api_key_id,omitempty"`
	// StaticRole is the static role that the credential is or was for. A credential that
	// the role still uses is not destroyed.
	StaticRole string `json:"static_role,omitempty"`
	// CreatedAt is when the create was sent and KeyExpires when the key expires, both by
	// this server's clock. CreatedAt is zero if unknown, KeyExpires if the key does not
	// expire.
	CreatedAt  time.Time `json:"created_at,omitzero"`
	KeyExpires time.Time `json:"key_expires_at,omitzero"`
}

func (c credential) isKey() bool { return c.Type == typeKey }

// check returns an error if the credential lacks what is needed to destroy it.
func (c credential) check() error {
	switch {
	case c.Version > credentialVersion:
		return newerFormat("it", c.Version, credentialVersion)
	case c.ProjectID == "":
		return errors.New("project_id is missing")
	case c.isKey() && c.KeyID == "" && c.KeyName == "":
		return errors.New("api_key_id and api_key_name are missing")
	case !c.isKey() && c.ID == "" && c.Name == "":
		return errors.New("service_account_id and service_account are missing")
	case c.Type != typeAccount && c.Type != typeKey:
		return fmt.Errorf("unknown credential_type %q", c.Type)
	}
	return nil
}

// attrs are the log fields that identify the credential.
func (c credential) attrs() []any {
	attrs := []any{"project_id", c.ProjectID, "service_account_id", c.ID}
	if !c.isKey() {
		attrs = append(attrs, "service_account", c.Name)
	} else {
		attrs = append(attrs, "api_key_name", c.KeyName)
	}
	if c.KeyID != "" {
		attrs = append(attrs, "api_key_id", c.KeyID)
	}
	return attrs
}

// pairs is the event metadata that identifies the credential.
func (c credential) pairs() []string {
	return []string{"project_id", c.ProjectID, "service_account_id", c.ID, "service_account", c.Name, "api_key_id", c.KeyID}
}

// describe identifies the credential in an error.
func (c credential) describe() string {
	if c.isKey() {
		return fmt.Sprintf("key %s of service account %s in project %s", c.KeyID, c.ID, c.ProjectID)
	}
	return fmt.Sprintf("service account %s in project %s", c.ID, c.ProjectID)
}

// typeName is for messages.
func (c credential) typeName() string {
	if c.isKey() {
		return "key"
	}
	return "account"
}

// credentialSpec specifies a credential to be created.
type credentialSpec struct {
	label      string // for errors, such as: role "app"
	credential        // type, project and, for a key, its account
	template   string
	data       naming.Data
	scopes     []string
	// covers is how long the key must work, expiry the expiry to request from OpenAI
	// for that: 0 means that the key does not expire.
	covers, expiry time.Duration
	activation     time.Duration // 0 skips the probe
	// unproven allows a key to be returned that was not accepted within activation.
	unproven bool
	// spare is how long the key may wait in a pool, 0 for a request. covers and expiry
	// include it. A create for a pool is not retried.
	spare time.Duration
}

// walKind is the kind of the WAL entry of the create.
func (o credentialSpec) walKind() string {
	switch {
	case o.spare == 0:
		return walKind(o.credential, false)
	case o.isKey():
		return walPooledKey
	}
	return walPooledAccount
}

// issued is a created credential, whose WAL entry is walID.
type issued struct {
	credential
	key   client.Key
	began time.Time // CreatedAt, with its fraction of a second and no monotonic reading
	snap  *snapshot
	walID string
	// committed means that the deletion of that entry was sent to storage.
	committed bool
	// requestID is OpenAI's ID of the create request.
	requestID string
	// warning is for the recipient of the key; "" if there is none.
	warning string
	// spare is that of the spec.
	spare time.Duration
}

// makeCredential creates and prepares a credential: restricted to its scopes, and
// accepted by OpenAI. An ambiguous create is retried under a fresh name, within the
// context. After an error, which is for errorResponse, the WAL holds every credential
// that may exist.
func (b *backend) makeCredential(ctx context.Context, req *logical.Request, o credentialSpec) (*issued, error) {
	m, err := b.createOnce(ctx, req, o)
	if err != nil {
		return nil, err
	}
	if err := b.prepare(ctx, req, m, o); err != nil {
		// Destroys the unrestricted or unproven key, and deletes its WAL entry.
		return nil, fmt.Errorf("%w; %s", err, b.discard(ctx, req, m, o.label, err))
	}
	return m, nil
}

// createOnce creates a credential, unprepared.
func (b *backend) createOnce(ctx context.Context, req *logical.Request, o credentialSpec) (*issued, error) {
	var limited error // the last rate limit error
	for attempt, again := 0, false; ; again = true {
		if b.isDraining() {
			return nil, clientError("this mount is being disabled")
		}
		// Read again for each attempt: a rotation may have replaced the admin key.
		snap, err := b.current(ctx, req.Storage)
		if err != nil {
			return nil, err
		}
		random, err := naming.Random(naming.RandomLength)
		if err != nil {
			return nil, err
		}
		o.data.RandomSuffix = snap.tag + random
		name, err := naming.Name(o.template, o.data)
		if err != nil {
			return nil, clientError("service_account_name_template: " + err.Error())
		}
		began := b.now().Round(0)
		m := &issued{credential: o.credential, began: began, snap: snap, spare: o.spare}
		m.Version, m.CreatedAt = credentialVersion, began.UTC().Truncate(time.Second)
		if m.isKey() {
			m.KeyName = name
		} else {
			m.Name = name
		}
		if o.expiry != 0 {
			m.KeyExpires = began.Add(o.expiry).UTC().Truncate(time.Second)
		}
		if m.walID, err = b.beginWAL(ctx, req.Storage, o.walKind(), m.credential); err != nil {
			return nil, fmt.Errorf("nothing created: writing the WAL failed: %w", err)
		}
		if again {
			b.metrics.Repeated(m.createCall())
		}
		// After it was sent, the create is not canceled with the client: its answer has
		// the ID, so that an unwanted credential can be destroyed at once.
		options := []client.CallOption{client.WithoutCancelAfterSend(), client.WithRequestID(&m.requestID)}
		if m.isKey() {
			m.key, err = snap.api.CreateServiceAccountKey(ctx, m.ProjectID, m.ID, m.KeyName, o.scopes, o.expiry, options...)
		} else {
			var account client.ServiceAccount
			account, m.key, err = snap.api.CreateServiceAccount(ctx, m.ProjectID, m.Name, o.expiry, options...)
			m.ID = account.ID
		}
		if err == nil {
			m.KeyID, m.KeyExpires = m.key.ID, m.key.ExpiresAt
			if !m.KeyExpires.IsZero() && !m.key.CreatedAt.IsZero() {
				// OpenAI's clock may be minutes off; this engine schedules by its own.
				m.KeyExpires = began.Add(m.key.ExpiresAt.Sub(m.key.CreatedAt)).UTC().Truncate(time.Second)
			}
			return m, nil
		}

		b.wal.release(m.walID)
		e := client.AsError(err)
		if !e.Ambiguous() {
			// Nothing was created, so the entry is deleted even for a canceled request.
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
			walErr := b.deleteWAL(cleanup, req.Storage, m.walID)
			cancel()
			if walErr != nil {
				return nil, fmt.Errorf("%w; deleting its WAL entry also failed: %w", err, walErr)
			}
		}
		b.log(req).Warn(m.typeName()+" not created", "for", o.label, "attempt", attempt+1, "queued_in_wal", e.Ambiguous(), "error", err)
		if o.spare != 0 {
			return nil, fmt.Errorf("%s%w", o.hint(e), err)
		}
		if e.RateLimited() && e.Retryable() {
			limited = err
			continue // the rate limiter waits, or fails if the wait exceeds the context
		}
		if e.RateLimited() && limited != nil {
			return nil, limited // OpenAI's error says more than the limiter's
		}
		retry := e.Retryable() || (e.Denied() && (b.isSuperseded(snap) || snap.keyIsNew(b.now())))
		if attempt++; attempt >= maxAttempts || !retry || client.Wait(ctx, client.Backoff(attempt-1, e.RetryAfter)) != nil {
			return nil, fmt.Errorf("%s%w", o.hint(e), err)
		}
	}
}

// hint is the prefix of an error that seems to be about the key's lifetime: the setting
// to change.
func (o credentialSpec) hint(e *client.Error) string {
	switch {
	case e.ExpiryUnknown() && o.StaticRole != "":
		return "static roles require key expiry: "
	case e.ExpiryUnknown():
		return "alternatively, set the role's key_expiry=none, which creates keys that do not expire: "
	case e.AboutExpiry() && o.expiry == 0:
		return "OpenAI rejected a key without expiry (key_expiry=none), probably because of an organization or project policy; set key_expiry=max_ttl or ttl: "
	case e.AboutExpiry() && o.spare != 0:
		return fmt.Sprintf("OpenAI rejected the key lifetime of %s, probably because of an organization or project policy; reduce pool_max_age or max_ttl: ", o.expiry)
	case e.AboutExpiry() && o.StaticRole != "":
		return fmt.Sprintf("OpenAI rejected the key lifetime of %s, probably because of an organization or project policy; reduce key_ttl: ", o.expiry)
	case e.AboutExpiry():
		return fmt.Sprintf("OpenAI rejected the key lifetime of %s, probably because of an organization or project policy; reduce max_ttl or, with key_expiry=ttl, ttl: ", o.expiry)
	}
	return ""
}

// prepare checks the key's expiry, restricts the key and waits until it is accepted.
func (b *backend) prepare(ctx context.Context, req *logical.Request, m *issued, o credentialSpec) error {
	endless, created := m.key.ExpiresAt.IsZero(), m.key.CreatedAt
	if created.IsZero() { // by this server's clock, then
		created = b.now().Add(-clockSlack)
	}
	switch {
	case endless && o.expiry != 0:
		return upstreamError(fmt.Sprintf("OpenAI created a key that does not expire, but the requested lifetime is %s", o.expiry))
	case !endless && m.key.ExpiresAt.Sub(created) < o.covers:
		return upstreamError(fmt.Sprintf("OpenAI created a key that expires at %s, but the key must be valid for %s", text.Time(m.key.ExpiresAt), o.covers))
	}
	if len(o.scopes) > 0 && !m.isKey() { // a key's own create sets its scopes
		err := b.updateKey(ctx, req, &m.snap, m.credential, func(snap *snapshot) error {
			_, err := snap.api.UpdateProjectKey(ctx, m.ProjectID, m.KeyID, o.scopes, 0)
			return err
		})
		if err != nil {
			return fmt.Errorf("restricting the key to the role's scopes: %w", err)
		}
	}
	began := time.Now()
	err := activate(ctx, m.snap.api, m.key.Value, o.activation)
	if ctx.Err() != nil {
		return fmt.Errorf("request canceled while waiting for the new key to become active: %w", ctx.Err())
	}
	if e := client.AsError(err); e != nil && e.Blame() == client.BlameHost {
		m.warning, err = residencyText(e), nil
	}
	if o.activation != 0 {
		b.metrics.Activated(time.Since(began), outcome(nil, err))
	}
	if err == nil {
		return nil
	}
	// OpenAI rejected the new key, not the admin key, so this is not a denied error.
	text := notActiveText(err, o.activation)
	if !o.unproven {
		return upstreamError(text + ": " + err.Error())
	}
	m.warning = fmt.Sprintf("The key may not work yet (activation_failure=warn): %s: %s", text, err)
	b.log(req).Warn(m.typeName()+" returned before OpenAI accepted its key", append([]any{"for", o.label, "error", err}, m.attrs()...)...)
	return nil
}

// notActiveText is the reason why a new key does not count as active.
func notActiveText(err error, waited time.Duration) string {
	e := client.AsError(err)
	if e != nil && e.Blame() == client.BlameKey {
		return fmt.Sprintf("OpenAI did not accept the new key within %s; increase activation_timeout, or set it to 0 to skip the check", waited)
	}
	cause := ""
	switch {
	case e == nil:
	case e.Status >= http.StatusInternalServerError:
		cause = ", because of a server error"
	case e.Blame() == client.BlameAddress:
		cause = ", because OpenAI rejects calls with it from the IP address of this Vault node"
	case e.Blame() == client.BlameProxy:
		cause = ", because the HTTP proxy rejected the call"
	case e.Blame() == client.BlameStranger, e.Blame() == client.BlameUnknown:
		cause = ", because " + e.Host + " rejected the call"
	}
	return fmt.Sprintf("the engine could not verify within %s that OpenAI accepts the new key%s; increase activation_timeout, or set it to 0 to skip the check", waited, cause)
}

// residencyText is the warning for a key whose project has data residency.
func residencyText(e *client.Error) string {
	host := e.RightHost()
	if host == "" {
		return fmt.Sprintf("The key is valid, but its project has data residency and is not served at %s. Use the base URL of the project's region. %s", e.Host, e.Message)
	}
	return fmt.Sprintf("The key is valid, but its project has data residency and is served at %[1]s instead of %[2]s. Use the base URL https://%[1]s/v1.", host, e.Host)
}

// updateKey is retryWithCurrentKey for an update of a key. It repeats an update that
// OpenAI answers with 404, within the context, because some of its servers may not have
// the key yet. It stops early if the key is proven to be deleted.
func (b *backend) updateKey(ctx context.Context, req *logical.Request, snap **snapshot, c credential, call func(*snapshot) error) error {
	for attempt := 0; ; attempt++ {
		err := b.retryWithCurrentKey(ctx, req, snap, call)
		if !isNotFoundAtAll(err) || b.isFinal(c.CreatedAt) && (*snap).keyDeleted(ctx, c.ProjectID, c.KeyID, err, b.now()) == nil || client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
	}
}

// activate waits until OpenAI accepts a key, at most for timeout. An error whose Blame is
// BlameHost means that the key is accepted at another host.
func activate(ctx context.Context, api *client.Client, key client.Secret, timeout time.Duration) error {
	if timeout == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var said error // the last answer, which says more than a timeout
	for pause := probeFirst; ; pause = min(2*pause, probeLongest) {
		attempt, cancel := context.WithTimeout(ctx, probeTimeout)
		err := api.Probe(attempt, key)
		cancel()
		if err == nil {
			return nil
		}
		e := client.AsError(err)
		if e != nil && e.Blame() == client.BlameHost {
			return err
		}
		if said == nil || (e != nil && e.Status != 0) {
			said = err
		}
		if client.Wait(ctx, pause/2+rand.N(pause/2)) != nil { // #nosec G404 -- jitter, not a secret
			return said
		}
	}
}

// discard destroys a credential that cannot be returned, and describes the outcome. It
// first records the credential in the WAL by its ID, since the entry of the create may
// be deleted already, and tries that again if OpenAI does not delete it either.
func (b *backend) discard(ctx context.Context, req *logical.Request, m *issued, label string, why error) (fate string) {
	whole := context.WithoutCancel(ctx)
	ctx, cancel := context.WithTimeout(whole, cleanupBudget)
	defer cancel()
	log := b.log(req).With("for", label, "reason", why, "openai_request_id", m.requestID).With(m.attrs()...)
	defer b.wal.release(m.walID)
	recording, recorded := context.WithTimeout(ctx, cleanupBudget/3) // the rest is for OpenAI
	entry, walErr := b.recordRevocation(recording, req.Storage, m.credential)
	recorded()
	if err := b.destroy(ctx, m.snap, m.credential); err != nil {
		if walErr != nil {
			again, cancel := context.WithTimeout(whole, cleanupBudget)
			defer cancel()
			walErr = tryAgain(again, func() error {
				_, err := b.recordRevocation(again, req.Storage, m.credential)
				return err
			})
		}
		if walErr != nil && m.committed {
			log.Error("credential not returned; not deleted, and perhaps not in the WAL", "error", err, "wal_error", walErr)
			return m.describe() + " may remain at OpenAI: it was not deleted, and storing its WAL entry failed"
		}
		log.Warn("credential not returned; queued for deletion in the WAL", "error", err)
		return "the " + m.typeName() + " is queued for deletion in the WAL"
	}
	log.Info("credential not returned; deleted")
	for _, id := range []string{m.walID, entry} {
		if err := b.deleteWAL(ctx, req.Storage, id); err != nil {
			log.Warn("WAL entry of a deleted credential not deleted; the WAL worker deletes it later", "error", err)
		}
	}
	return "the " + m.typeName() + " was deleted"
}

// destroy deletes a credential of known ID, or expires its key. After nil it is deleted
// or invalid; errNotFinal means that it must be looked for again.
func (b *backend) destroy(ctx context.Context, snap *snapshot, c credential, options ...client.CallOption) error {
	id := c.ID
	var deleted bool
	var failure, err error
	if c.isKey() {
		id = c.KeyID
		if deleted, failure = b.destroyKey(ctx, snap.api, c, options...); failure != nil {
			err = snap.keyDeleted(ctx, c.ProjectID, c.KeyID, failure, b.now())
		}
	} else if failure = snap.api.DeleteServiceAccount(ctx, c.ProjectID, c.ID, options...); failure != nil {
		err = snap.accountDeleted(ctx, c.ProjectID, c.ID, failure)
	} else {
		deleted = true
	}
	if deleted {
		b.deleted.Add(id, struct{}{})
	}
	// A 404 is final for a credential that OpenAI has confirmed as deleted.
	if err == nil && client.IsNotFound(failure) && !b.isFinal(c.CreatedAt) && !b.deleted.Contains(id) {
		return errNotFinal
	}
	return err
}

// maxDeleted covers what the WAL workers delete before Vault retries the same
// revocations, and what a disable deletes.
const maxDeleted = 8192

func newDeleted() *lru.Cache[string, struct{}] {
	deleted, _ := lru.New[string, struct{}](maxDeleted) // its only error is a size below 1
	return deleted
}

// destroyKey deletes a key or, if OpenAI does not delete keys of service accounts, sets
// it to expire within a second. OpenAI's documents disagree on which applies
// (docs/openai-api.md).
func (b *backend) destroyKey(ctx context.Context, api *client.Client, c credential, options ...client.CallOption) (deleted bool, err error) {
	err = api.DeleteProjectKey(ctx, c.ProjectID, c.KeyID, options...)
	if e := client.AsError(err); e == nil || !e.Refused() {
		return err == nil, err
	}
	key, updateErr := api.UpdateProjectKey(ctx, c.ProjectID, c.KeyID, nil, client.MinExpiry, options...)
	slack := 2 * clockSlack
	if updateErr != nil {
		// OpenAI may reject the update because the key has expired.
		key, updateErr = api.GetProjectKey(ctx, c.ProjectID, c.KeyID)
		slack = 0
	}
	// By OpenAI's clock, which its answer has just told: by one that is ahead, a valid key
	// would seem to have expired.
	soon := api.NowOr(b.now()).Add(slack)
	switch {
	case client.IsNotFound(updateErr):
		return false, updateErr
	case updateErr == nil && !key.ExpiresAt.IsZero() && key.ExpiresAt.Before(soon):
		b.Logger().Debug("key expired instead of deleted: OpenAI rejected the delete", append(c.attrs(), "expires_at", text.Time(key.ExpiresAt), "error", err)...)
		return false, nil
	}
	return false, err
}

// walKind is the kind of a credential's WAL entry.
func walKind(c credential, revoked bool) string {
	switch {
	case c.isKey() && revoked:
		return walRevokedKey
	case c.isKey():
		return walKey
	case revoked:
		return walRevokedAccount
	}
	return walAccount
}

// revokedID is the ID of the entry that recordRevocation writes. It is derived from the
// credential, so that repeated revocations share one entry.
func revokedID(c credential) string {
	name := c.ProjectID + "/" + c.ID
	if c.isKey() {
		name += "/" + c.KeyID
	}
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:16])
}

// recordRevocation queues a credential for deletion in the WAL, and returns the entry's
// ID. A later call for the same credential keeps the time of the first.
func (b *backend) recordRevocation(ctx context.Context, s logical.Storage, c credential) (string, error) {
	id, created := revokedID(c), b.now()
	if note, known := b.wal.get(id); known {
		created = time.Unix(note.created, 0)
	}
	kind := walKind(c, true)
	err := putWALEntry(ctx, s, id, kind, c, created)
	if err == nil {
		b.wal.put(id, newWALNote(kind, created, c))
	}
	return id, err
}

// deleteRevoked deletes the entry of an earlier failed revocation, if the index has one.
func (b *backend) deleteRevoked(ctx context.Context, s logical.Storage, c credential) error {
	id := revokedID(c)
	if _, known := b.wal.get(id); !known {
		return nil
	}
	return b.deleteWAL(ctx, s, id)
}

// ownName is the name that the engine generated for the create.
func (c credential) ownName() string {
	if c.isKey() {
		return c.KeyName
	}
	return c.Name
}

// createCall is the name of the call that creates the credential.
func (c credential) createCall() string {
	if c.isKey() {
		return "create_key"
	}
	return "create_service_account"
}

// entryCredential reads the credential of an entry.
func entryCredential(entry *framework.WALEntry) (c credential, err error) {
	if err := decodeInto(&c, entry.Data); err != nil {
		return c, fmt.Errorf("decoding WAL entry: %w", err)
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("invalid WAL entry: %w", err)
	}
	return c, nil
}

// leaseData is the internal data that Vault stores with a lease.
type leaseData struct {
	credential
	Role string `json:"role"`
	// MaxTTL is the maximum TTL when the lease was issued.
	MaxTTL time.Duration `json:"max_ttl"`
	// KeyExpiry is the role's key_expiry when the lease was issued.
	KeyExpiry string `json:"key_expiry"`
	// Spare is how much longer the key may be valid than its lease requires, because it
	// could have waited in a pool.
	Spare time.Duration `json:"pool_max_age,omitempty"`
	// EntityID and DisplayName are the client's, for usage records.
	EntityID    string `json:"entity_id,omitempty"`
	DisplayName string `json:"display_name,omitempty"`
}

// internal returns the data as Vault stores it.
func (l leaseData) internal() map[string]any {
	data := map[string]any{
		"version":            l.Version,
		"credential_type":    l.Type,
		"project_id":         l.ProjectID,
		"service_account":    l.Name,
		"service_account_id": l.ID,
		"api_key_id":         l.KeyID,
		"role":               l.Role,
		"max_ttl":            int64(l.MaxTTL),
		"key_expiry":         l.KeyExpiry,
	}
	if l.isKey() {
		data["api_key_name"] = l.KeyName
	}
	if l.Spare != 0 {
		data["pool_max_age"] = int64(l.Spare)
	}
	if l.EntityID != "" {
		data["entity_id"] = l.EntityID
	}
	if l.DisplayName != "" {
		data["display_name"] = l.DisplayName
	}
	if !l.CreatedAt.IsZero() {
		data["created_at"] = l.CreatedAt.UTC().Format(time.RFC3339)
	}
	if !l.KeyExpires.IsZero() {
		data["key_expires_at"] = l.KeyExpires.UTC().Format(time.RFC3339)
	}
	return data
}

// covers reports whether the key is valid for granted and the slack between the clocks.
// An expiry beyond the longest lease does not count: it was stored while the clock was
// ahead.
func (l leaseData) covers(granted time.Duration, now time.Time) bool {
	return !l.KeyExpires.Before(now.Add(granted+clockSlack)) &&
		!l.KeyExpires.After(now.Add(max(granted, l.MaxTTL)+l.Spare+expiryMargin+clockSlack))
}

func newWALNote(kind string, created time.Time, c credential) walNote {
	note := walNote{kind: kind, created: created.Unix()}
	if !c.KeyExpires.IsZero() {
		note.ends = c.KeyExpires.Add(clockSlack).Unix()
	}
	if lane := laneOf(kind); lane != "" {
		note.kind = lane // shared instead of one copy per entry
	}
	return note
}
