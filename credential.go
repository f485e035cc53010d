package openaisecrets

// This file owns a credential's life at OpenAI: the one way in which it is
// made and made ready, and the one way in which it ends.
//
// What must stay true: nothing is created before the journal holds its name;
// each attempt has its own name and its own entry; an entry goes only when what
// it names is handed over, was never made, or is destroyed. A key that is not
// yet what was ordered never leaves this file. Gone is success, a missing
// permission never is.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
)

const (
	credentialVersion = 1
	// clockSlack is how far Vault's clock may be ahead of OpenAI's.
	clockSlack = time.Minute

	// probeFirst and probeLongest bound the wait between two looks at whether a
	// new key works; probeTimeout bounds one look.
	probeFirst   = 50 * time.Millisecond
	probeLongest = 500 * time.Millisecond
	probeTimeout = 5 * time.Second
)

// What a credential is.
const (
	// typeAccount is a service account, with which all its keys end.
	typeAccount = "service_account"
	// typeKey is one key of an account that stays.
	typeKey = "api_key"
)

// credential is all that destroying a credential takes. It is the journal's
// entry and part of each lease.
type credential struct {
	Version   int    `json:"version"`
	Type      string `json:"credential_type"`
	ProjectID string `json:"project_id"`
	// Name and ID are the account's, its ID empty where the answer to its create
	// is not known.
	Name string `json:"service_account,omitempty"`
	ID   string `json:"service_account_id,omitempty"`
	// KeyName and KeyID are the key's; of typeAccount it need not be known.
	KeyName string `json:"api_key_name,omitempty"`
	KeyID   string `json:"api_key_id,omitempty"`
	// StaticRole is the static role that it is made for or was taken from. What
	// that role still names is not destroyed, whatever else says so.
	StaticRole string `json:"static_role,omitempty"`
	// CreatedAt is when its create was sent and KeyExpires when its key ends, as
	// far as the entry or lease knows, both by this server's clock. CreatedAt is
	// zero where it is unknown, KeyExpires where there is no end.
	CreatedAt  time.Time `json:"created_at,omitzero"`
	KeyExpires time.Time `json:"key_expires_at,omitzero"`
}

func (c credential) isKey() bool { return c.Type == typeKey }

// check says what is missing for destroying the credential.
func (c credential) check() error {
	switch {
	case c.Version > credentialVersion:
		return fmt.Errorf("it was written by a newer version of this plugin (format %d, this one knows %d)", c.Version, credentialVersion)
	case c.ProjectID == "":
		return errors.New("it has no project_id")
	case c.isKey() && c.KeyID == "" && c.KeyName == "":
		return errors.New("it has neither api_key_id nor api_key_name")
	case !c.isKey() && c.ID == "" && c.Name == "":
		return errors.New("it has neither service_account_id nor service_account")
	case c.Type != typeAccount && c.Type != typeKey:
		return fmt.Errorf("its credential_type %q is unknown", c.Type)
	}
	return nil
}

// attrs names the credential in a line of the log.
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

// pairs names the credential in an event.
func (c credential) pairs() []string {
	return []string{"project_id", c.ProjectID, "service_account_id", c.ID, "service_account", c.Name, "api_key_id", c.KeyID}
}

// what names in an error what is to be destroyed.
func (c credential) what() string {
	if c.isKey() {
		return fmt.Sprintf("key %s of service account %s in project %s", c.KeyID, c.ID, c.ProjectID)
	}
	return fmt.Sprintf("service account %s in project %s", c.ID, c.ProjectID)
}

// noun is what a reader calls it.
func (c credential) noun() string {
	if c.isKey() {
		return "key"
	}
	return "account"
}

// order is a credential to be made.
type order struct {
	label      string // for errors: role "app"
	credential        // what is known before: type, project, of a key its account
	template   string
	data       nameData
	scopes     []string
	// covers is how long the key must work, expiry what is asked of OpenAI for
	// that: 0 = no end.
	covers, expiry time.Duration
	activation     time.Duration // 0 = the key is not tried
	// unproven says that a key which has not been accepted by then is handed out.
	unproven bool
}

// made is a credential as ordered, whose journal entry is walID.
type made struct {
	credential
	key   client.Key
	began time.Time // CreatedAt, to less than a second
	snap  *snapshot
	walID string
	// requestID is OpenAI's, of the create.
	requestID string
	// warning is what whoever gets the key must know of it; "" for nothing.
	warning string
}

// obtain creates what is ordered and makes it ready: restricted to its scopes,
// and accepted by OpenAI. An ambiguous create is tried again under a fresh
// name, within the context. After an error, which is for failure, the journal
// holds whatever may exist.
func (b *backend) obtain(ctx context.Context, req *logical.Request, o order) (*made, error) {
	m, err := b.create(ctx, req, o)
	if err != nil {
		return nil, err
	}
	if err := b.ready(ctx, req, m, o); err != nil {
		// The unrestricted or untried key ends here, and with it the journal entry.
		return nil, fmt.Errorf("%w; %s", err, b.abandon(ctx, req, m, o.label, err))
	}
	return m, nil
}

// create is obtain up to the answer of the create itself.
func (b *backend) create(ctx context.Context, req *logical.Request, o order) (*made, error) {
	var limited error // the last refusal for the rate
	for attempt, again := 0, false; ; again = true {
		if b.isDraining() {
			return nil, mistake("this mount is being disabled")
		}
		// Anew for each attempt: a rotation may have replaced the admin key.
		snap, err := b.current(ctx, req.Storage)
		if err != nil {
			return nil, err
		}
		random, err := randomText(randomLength)
		if err != nil {
			return nil, err
		}
		o.data.RandomSuffix = snap.tag + random
		name, err := accountName(o.template, o.data)
		if err != nil {
			return nil, mistake("service_account_name_template: " + err.Error())
		}
		began := b.now()
		m := &made{credential: o.credential, began: began, snap: snap}
		m.Version, m.CreatedAt = credentialVersion, began.UTC().Truncate(time.Second)
		if m.isKey() {
			m.KeyName = name
		} else {
			m.Name = name
		}
		if o.expiry != 0 {
			m.KeyExpires = began.Add(o.expiry).UTC().Truncate(time.Second)
		}
		if m.walID, err = b.beginWAL(ctx, req.Storage, journalKind(m.credential, false), m.credential); err != nil {
			return nil, fmt.Errorf("writing the WAL, before anything was created: %w", err)
		}
		if again {
			b.metrics.Repeated(m.createCall())
		}
		// Once sent it is waited for, client or no client: its answer lets what
		// nobody wants be destroyed at once.
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
				// OpenAI's clock may be minutes off, and plans are made by this one.
				m.KeyExpires = began.Add(m.key.ExpiresAt.Sub(m.key.CreatedAt)).UTC().Truncate(time.Second)
			}
			return m, nil
		}

		b.work.wal.release(m.walID)
		e := client.AsError(err)
		if !e.Ambiguous() {
			// Nothing was made, so a client that has gone changes nothing.
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
			walErr := b.deleteWAL(cleanup, req.Storage, m.walID)
			cancel()
			if walErr != nil {
				return nil, fmt.Errorf("%w; and its journal entry could not be deleted: %w", err, walErr)
			}
		}
		b.log(req).Warn(m.noun()+" not created", "for", o.label, "attempt", attempt+1, "left_to_journal", e.Ambiguous(), "error", err)
		if e.RateLimited() && e.Retryable() {
			limited = err
			continue // the pace knows when the next call fits, and says when that is too late
		}
		if e.RateLimited() && limited != nil {
			return nil, limited // says more than that it is too late
		}
		retry := e.Retryable() || (e.Denied() && (b.replaced(snap) || snap.fresh(b.now())))
		if attempt++; attempt >= maxAttempts || !retry || client.Wait(ctx, client.Backoff(attempt-1, e.RetryAfter)) != nil {
			return nil, fmt.Errorf("%s%w", o.hint(e), err)
		}
	}
}

// hint is what the caller may do about a refusal that seems to be for the
// key's lifetime.
func (o order) hint(e *client.Error) string {
	switch {
	case e.ExpiryUnknown() && o.StaticRole != "":
		return "static roles need it: "
	case e.ExpiryUnknown():
		return "or set the role's key_expiry=none, with which keys have no end: "
	case e.AboutExpiry() && o.expiry == 0:
		return "the key was asked for without an end (key_expiry=none), which a policy of the organization or the project seems to forbid; use key_expiry=max_ttl or ttl: "
	case e.AboutExpiry() && o.StaticRole != "":
		return fmt.Sprintf("the key was to live %s, longer than a policy of the organization or the project seems to allow; set the role's key_ttl: ", o.expiry)
	case e.AboutExpiry():
		return fmt.Sprintf("the key was to live %s, longer than a policy of the organization or the project seems to allow; shorten the role's max_ttl or, with key_expiry=ttl, its ttl: ", o.expiry)
	}
	return ""
}

// ready checks that the key lives long enough, restricts it and waits until it
// is accepted.
func (b *backend) ready(ctx context.Context, req *logical.Request, m *made, o order) error {
	endless, made := m.key.ExpiresAt.IsZero(), m.key.CreatedAt
	if made.IsZero() { // not said: by our clock, then
		made = b.now().Add(-clockSlack)
	}
	if (endless && o.expiry != 0) || (!endless && m.key.ExpiresAt.Sub(made) < o.covers) {
		return upstream(fmt.Sprintf("OpenAI made the key with an end (%s) that does not cover the %s for which it must work", timeText(m.key.ExpiresAt), o.covers))
	}
	if len(o.scopes) > 0 && !m.isKey() { // those of a lone key went with its create
		err := b.updateKey(ctx, req, &m.snap, m.credential, func(snap *snapshot) error {
			_, err := snap.api.UpdateProjectKey(ctx, m.ProjectID, m.KeyID, o.scopes, 0)
			return err
		})
		if err != nil {
			return fmt.Errorf("the key could not be restricted to the role's scopes: %w", err)
		}
	}
	began := time.Now()
	err := activate(ctx, m.snap.api, m.key.Value, o.activation)
	if ctx.Err() != nil {
		return fmt.Errorf("nobody waits any more for OpenAI to accept the new key: %w", ctx.Err())
	}
	if e := client.AsError(err); e != nil && e.Blame() == client.BlameHost {
		m.warning, err = residencyText(e), nil
	}
	b.metrics.activated(o.activation, began, err)
	if err == nil {
		return nil
	}
	// What was refused is the new key and not the admin key.
	text := notActiveText(err, o.activation)
	if !o.unproven {
		return upstream(text + ": " + err.Error())
	}
	m.warning = fmt.Sprintf("The key had not been accepted when it was made, and may not work (activation_failure=warn): %s: %s", text, err)
	b.log(req).Warn(m.noun()+" handed out although it may not work yet", append([]any{"for", o.label, "error", err}, m.attrs()...)...)
	return nil
}

// notActiveText says why a new key does not count as active.
func notActiveText(err error, waited time.Duration) string {
	e := client.AsError(err)
	if e != nil && e.Blame() == client.BlameKey {
		return fmt.Sprintf("OpenAI does not accept the new key after %s (activation_timeout; 0 = hand keys out untried)", waited)
	}
	cause := ""
	switch {
	case e == nil:
	case e.Status >= http.StatusInternalServerError:
		cause = ", because of a server error"
	case e.Blame() == client.BlameAddress:
		cause = ", because OpenAI does not accept calls with it from the IP address of this Vault node"
	case e.Blame() == client.BlameProxy:
		cause = ", because the HTTP proxy does not let the call pass"
	case e.Blame() == client.BlameStranger, e.Blame() == client.BlameUnknown:
		cause = ", because the call was refused by " + e.Host
	}
	return fmt.Sprintf("it is unknown after %s whether OpenAI accepts the new key (activation_timeout; 0 = hand keys out untried)%s", waited, cause)
}

// residencyText is the warning with a key whose project has data residency.
func residencyText(e *client.Error) string {
	host := e.RightHost()
	if host == "" {
		return fmt.Sprintf("The key is valid, but its project has data residency: OpenAI does not serve it at %s. Use the key with the base URL of the project's region. %s", e.Host, e.Message)
	}
	return fmt.Sprintf("The key is valid, but its project has data residency: OpenAI serves it at %[1]s and not at %[2]s. Use the key with the base URL https://%[1]s/v1.", host, e.Host)
}

// withCurrent makes a call that may be made again. If the admin key was replaced
// under it, or is so new that one of OpenAI's servers may not know it, the call
// is made again with the one then in force.
func (b *backend) withCurrent(ctx context.Context, req *logical.Request, snap **snapshot, call func(*snapshot) error) error {
	for attempt := 0; ; attempt++ {
		err := call(*snap)
		replaced := b.replaced(*snap)
		if !client.IsDenied(err) || attempt+1 >= maxAttempts || (!replaced && !(*snap).fresh(b.now())) {
			return err
		}
		if !replaced && client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
		current, currentErr := b.current(ctx, req.Storage)
		if currentErr != nil {
			return currentErr
		}
		*snap = current
	}
}

// updateKey is withCurrent for an update of a key. While OpenAI does not find the
// key the update is repeated, within the context: one of its servers may not know
// the key yet. It ends early if the key is proven to be deleted.
func (b *backend) updateKey(ctx context.Context, req *logical.Request, snap **snapshot, c credential, call func(*snapshot) error) error {
	for attempt := 0; ; attempt++ {
		err := b.withCurrent(ctx, req, snap, call)
		if !isNotFoundAtAll(err) || b.isFinal(c.CreatedAt) && (*snap).keyDeleted(ctx, c.ProjectID, c.KeyID, err, b.now()) == nil || client.Wait(ctx, client.Backoff(attempt, 0)) != nil {
			return err
		}
	}
}

// activate waits until OpenAI accepts a key, for timeout at most. An error whose
// Blame is BlameHost says that it does, at another host.
func activate(ctx context.Context, api *client.Client, key client.Secret, timeout time.Duration) error {
	if timeout == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var said error // the last answer, which says more than that time is up
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

// abandon destroys what cannot be handed over and says what became of it. It is
// journalled anew, by its ID, before anything else, since the first entry may be
// gone already.
func (b *backend) abandon(ctx context.Context, req *logical.Request, m *made, label string, why error) (fate string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	log := b.log(req).With("for", label, "why", why, "openai_request_id", m.requestID).With(m.attrs()...)
	defer b.work.wal.release(m.walID)
	entry, journalErr := b.journalRevoke(ctx, req.Storage, m.credential)
	if err := b.destroy(ctx, m.snap, m.credential); err != nil {
		log.Warn("credential not handed out; it is left to the journal", "error", err, "journal_error", journalErr)
		return "its " + m.noun() + " is left to the journal"
	}
	log.Info("credential not handed out; it is destroyed")
	for _, id := range []string{m.walID, entry} {
		if err := b.deleteWAL(ctx, req.Storage, id); err != nil {
			log.Warn("journal entry not deleted; the worker will find nothing to do", "error", err)
		}
	}
	return "its " + m.noun() + " is destroyed"
}

// fresh reports whether the admin key came into force so recently that one of
// OpenAI's servers may not know it yet.
func (s *snapshot) fresh(now time.Time) bool {
	return s.config.AdminKeyRotated && now.Sub(s.config.LastRotated) < time.Minute
}

// replaced reports whether another snapshot has come into force.
func (b *backend) replaced(snap *snapshot) bool {
	b.snapshotMu.RLock()
	defer b.snapshotMu.RUnlock()
	return b.snapshot != snap
}

// destroy deletes a credential of known ID, or has its key end. Without an error
// it is deleted or invalid; errNotFinal says that it must be looked for again.
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
	// What OpenAI has told this process that it deleted does not appear again.
	if err == nil && client.IsNotFound(failure) && !b.isFinal(c.CreatedAt) && !b.deleted.Contains(id) {
		return errNotFinal
	}
	return err
}

// maxDeleted is for what the WAL's workers delete until Vault's next try of the same
// revocations, and for what a disable deletes.
const maxDeleted = 8192

func newDeleted() *lru.Cache[string, struct{}] {
	deleted, _ := lru.New[string, struct{}](maxDeleted) // its only error is a size below 1
	return deleted
}

// destroyKey deletes a key or, where OpenAI does not delete keys of service
// accounts, has it expire within a second: its documents disagree on that
// (docs/openai-api.md).
func (b *backend) destroyKey(ctx context.Context, api *client.Client, c credential, options ...client.CallOption) (deleted bool, err error) {
	err = api.DeleteProjectKey(ctx, c.ProjectID, c.KeyID, options...)
	if e := client.AsError(err); e == nil || !e.Refused() {
		return err == nil, err
	}
	soon := b.now().Add(2 * clockSlack)
	key, updateErr := api.UpdateProjectKey(ctx, c.ProjectID, c.KeyID, nil, client.MinExpiry, options...)
	if updateErr != nil {
		// An expired key cannot be updated, so that may be why.
		if key, updateErr = api.GetProjectKey(ctx, c.ProjectID, c.KeyID); updateErr == nil {
			soon = b.now()
		}
	}
	switch {
	case client.IsNotFound(updateErr):
		return false, updateErr
	case updateErr == nil && !key.ExpiresAt.IsZero() && key.ExpiresAt.Before(soon):
		b.Logger().Debug("OpenAI refuses to delete the key, which has expired instead", append(c.attrs(), "expires_at", timeText(key.ExpiresAt), "error", err)...)
		return false, nil
	}
	return false, err
}
