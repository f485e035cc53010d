// Package live probes what the documentation of the real Admin API leaves open,
// and compares it with the engine's assumptions (docs/openai-api.md). The probes
// use the engine's own client through a recorder, which sees what the client hides.
//
// What must stay true: no model is ever called, so a run costs nothing; a run
// changes and deletes only objects that it created, or whose names have the form of
// those of a run that began over an hour ago, so never the caller's admin key; it
// deletes all that it creates, however it ends, and the next run cleans up after one
// that was killed; the report identifies neither an organization nor a key.
//
// A unit test runs the same code against the simulator.
package live

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"vault-plugin-secrets-openai/client"
)

const (
	// namePrefix is the prefix of the names of all runs. The time of the run follows,
	// in base 36, since not every list has creation times.
	namePrefix = "vault-live-"
	// abandoned is the age from which another run's objects count as left over.
	abandoned = time.Hour
	// oneCall limits a call, which continues even if its caller stops waiting.
	oneCall = time.Minute
	// cleanupTime limits the cleanup; it is enough at ten calls a minute.
	cleanupTime = 5 * time.Minute
)

// wholeName matches a run's names from start to end. A shorter match is not enough:
// many words are numbers in base 36, and the engine names the accounts of a role
// live-stable-east vault-live-stable-east-….
var wholeName = regexp.MustCompile(`^` + namePrefix + `([0-9a-z]{6})-[a-z2-7]{4}-((Az09 ._@-|long)\d+x*|(only|twice|key|admin)\d+)$`)

// Config configures a run. AdminKey and Project are required.
type Config struct {
	BaseURL      string // default client.DefaultBaseURL
	AdminKey     client.Secret
	Organization string
	Project      string
	ReadOnlyKey  client.Secret // a read-only admin key; optional, for one probe

	Expiry   time.Duration // of the key whose expiry is timed
	Pause    time.Duration // between two polls
	Patience time.Duration // time limit for polling
}

// Defaults returns the defaults for the real API.
func Defaults() Config {
	return Config{BaseURL: client.DefaultBaseURL, Expiry: time.Minute, Pause: 500 * time.Millisecond, Patience: 2 * time.Minute}
}

type run struct {
	Config
	prefix string
	wire   *wire
	api    *client.Client
	report *Report
	named  int
	main   made // the account that most probes use
}

type made struct {
	client.ServiceAccount
	key client.Key
}

// Run runs all probes and returns their findings, even if it is interrupted. It
// fails if it cannot start, is interrupted or cannot clean up, not on a finding.
func Run(ctx context.Context, cfg Config) (report *Report, err error) {
	wire, err := newWire(cfg.BaseURL)
	if err != nil {
		return nil, err
	}
	proxy := wire.serve()
	defer proxy.Close()
	r := &run{Config: cfg, wire: wire, report: &Report{Host: wire.upstream.Host, Began: time.Now()}}
	r.prefix = namePrefix + strconv.FormatInt(r.report.Began.Unix(), 36) + "-" + strings.ToLower(rand.Text()[:4]) + "-"
	if r.api, err = r.connect(cfg.AdminKey); err != nil {
		return nil, err
	}
	defer r.api.Close()

	project, err := r.api.GetProject(ctx, cfg.Project)
	if err != nil {
		return nil, err
	}
	if project.Archived() {
		return nil, errors.New("the project is archived")
	}
	defer func() {
		// The context may have ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		proxy.Close() // waits for the calls in progress
		if cleanupErr := r.cleanUp(ctx); cleanupErr != nil {
			err = errors.Join(err, fmt.Errorf("objects whose names begin with %s may be left: %w", r.prefix, cleanupErr))
		}
		r.report.finish(r.wire)
	}()
	for _, step := range steps {
		if ctx.Err() != nil {
			return r.report, fmt.Errorf("cut short: %w", context.Cause(ctx))
		}
		if err := step.probe(r, ctx); err != nil {
			r.report.add(step.section, step.about, Unchecked, err.Error())
		}
	}
	return r.report, nil
}

func (r *run) connect(key client.Secret) (*client.Client, error) {
	return client.New(client.Options{
		AdminKey: key, BaseURL: r.wire.base, Organization: r.Organization, UserAgent: "vault-plugin-secrets-openai/live-test",
	})
}

// name returns a unique name, by which the cleanup finds the object.
func (r *run) name(kind string) string {
	r.named++
	return r.prefix + kind + strconv.Itoa(r.named)
}

// account creates a service account, and retries if OpenAI limits the rate.
func (r *run) account(ctx context.Context, name string) (made, error) {
	var m made
	err := r.retryRateLimited(ctx, func() (err error) {
		m.ServiceAccount, m.key, err = r.api.CreateServiceAccount(ctx, r.Project, name, time.Hour)
		return err
	})
	return m, err
}

// key creates another key of the main account.
func (r *run) key(ctx context.Context, scopes []string, expiry time.Duration) (k client.Key, err error) {
	if r.main.ID == "" {
		return k, errors.New("there is no account to create a key for")
	}
	err = r.retryRateLimited(ctx, func() error {
		k, err = r.api.CreateServiceAccountKey(ctx, r.Project, r.main.ID, r.name("key"), scopes, expiry)
		return err
	})
	return k, err
}

// retryRateLimited retries a create that OpenAI's rate limit rejected, which created nothing.
func (r *run) retryRateLimited(ctx context.Context, create func() error) error {
	for began := time.Now(); ; {
		err := create()
		e := client.AsError(err)
		if e == nil || !e.RateLimited() || !e.Retryable() && e.RetryAfter == 0 || time.Since(began) > r.Patience {
			return err
		}
		if err := client.Wait(ctx, max(e.RetryAfter, 10*r.Pause)); err != nil {
			return err
		}
	}
}

// cleanUp deletes what this run created and what abandoned runs have left. First
// it deletes by the IDs that the recorder saw, since a list may be out of date. The
// names find objects whose create lost its answer.
func (r *run) cleanUp(ctx context.Context) error {
	proxy := r.wire.serve()
	defer proxy.Close()
	api, err := r.connect(r.AdminKey)
	if err != nil {
		return err
	}
	defer api.Close()
	var errs []error
	gone := func(err error) {
		if err != nil && !client.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	accountIDs, adminIDs := r.wire.made()
	for _, id := range accountIDs {
		gone(api.DeleteServiceAccount(ctx, r.Project, id))
	}
	for _, id := range adminIDs {
		gone(api.DeleteAdminKey(ctx, id))
	}
	accounts, err := api.ListServiceAccounts(ctx, r.Project)
	gone(err)
	for _, a := range accounts {
		if r.ours(a.Name) {
			gone(api.DeleteServiceAccount(ctx, r.Project, a.ID))
		}
	}
	keys, err := api.ListAdminKeys(ctx)
	gone(err)
	for _, k := range keys {
		if r.ours(k.Name) {
			gone(api.DeleteAdminKey(ctx, k.ID))
		}
	}
	return errors.Join(errs...)
}

// ours reports whether a name is of this run or of an abandoned one.
func (r *run) ours(name string) bool {
	if strings.HasPrefix(name, r.prefix) {
		return true
	}
	parts := wholeName.FindStringSubmatch(name)
	if parts == nil {
		return false
	}
	began, err := strconv.ParseInt(parts[1], 36, 64)
	return err == nil && time.Since(time.Unix(began, 0)) > abandoned
}
