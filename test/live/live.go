// Package live asks the real Admin API what its documents leave open, and holds
// it against what the engine assumes of it (docs/openai-api.md). The probes use
// the engine's own client; a recorder between the two sees what the client hides.
//
// What must stay true: no model is ever called, so a run costs nothing; only
// things whose name begins with this run's prefix are changed or deleted, and
// the caller's admin key only makes and deletes; all that is made is deleted
// again, however the run ends, and a run that was killed is cleaned up after by
// the next; and nothing in the report identifies an organization or a key.
//
// The same code runs against the simulator in an ordinary test.
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
	// family begins the names of all that any run makes. The time of the run
	// follows, in base 36, since not every listing tells when a thing was made.
	family = "vault-live-"
	// abandoned is the age from which a thing of another run has no run any more.
	abandoned = time.Hour
	// oneCall is what OpenAI has for an answer, whether or not it is waited for.
	oneCall = time.Minute
	// cleanupTime is what deleting everything may take at ten calls a minute.
	cleanupTime = 5 * time.Minute
)

// wholeName is the form of a run's names from end to end. Less would not do: many
// words are numbers in base 36, and the engine itself calls the accounts of a role
// live-stable-east vault-live-stable-east-….
var wholeName = regexp.MustCompile(`^` + family + `([0-9a-z]{6})-[a-z2-7]{4}-((Az09 ._@-|long)\d+x*|(only|twice|key|admin)\d+)$`)

// Config says what to probe, and how patiently. AdminKey and Project are needed.
type Config struct {
	BaseURL      string // default client.DefaultBaseURL
	AdminKey     client.Secret
	Organization string
	Project      string
	ReadOnlyKey  client.Secret // an admin key that may not write; without it that is not probed

	Expiry   time.Duration // of the key whose end is timed
	Pause    time.Duration // between two looks at something that is awaited
	Patience time.Duration // how long it is awaited
}

// Defaults are for the real API.
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
	main   made // the account that most probes are about
}

type made struct {
	client.ServiceAccount
	key client.Key
}

// Run makes all probes and returns what they found, also when it was cut short.
// It fails if it could not begin or not clean up; what it finds is no failure.
func Run(ctx context.Context, cfg Config) (report *Report, err error) {
	wire, err := newWire(cfg.BaseURL)
	if err != nil {
		return nil, err
	}
	proxy := wire.serve()
	defer proxy.Close()
	r := &run{Config: cfg, wire: wire, report: &Report{Host: wire.upstream.Host, Began: time.Now()}}
	r.prefix = family + strconv.FormatInt(r.report.Began.Unix(), 36) + "-" + strings.ToLower(rand.Text()[:4]) + "-"
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
		// The reason for cleaning up may well be that the context has ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		proxy.Close() // not before all that is in progress has ended
		if cleanupErr := r.cleanUp(ctx); cleanupErr != nil {
			err = errors.Join(err, fmt.Errorf("what may be left has a name that begins with %s: %w", r.prefix, cleanupErr))
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

// name is a name that nothing else has, and by which it is found again.
func (r *run) name(kind string) string {
	r.named++
	return r.prefix + kind + strconv.Itoa(r.named)
}

// account makes a service account; one that OpenAI has no time for is asked for
// again.
func (r *run) account(ctx context.Context, name string) (made, error) {
	var m made
	err := r.patiently(ctx, func() (err error) {
		m.ServiceAccount, m.key, err = r.api.CreateServiceAccount(ctx, r.Project, name, time.Hour)
		return err
	})
	return m, err
}

// key makes another key of the main account.
func (r *run) key(ctx context.Context, scopes []string, expiry time.Duration) (k client.Key, err error) {
	if r.main.ID == "" {
		return k, errors.New("there is no account to make a key of")
	}
	err = r.patiently(ctx, func() error {
		k, err = r.api.CreateServiceAccountKey(ctx, r.Project, r.main.ID, r.name("key"), scopes, expiry)
		return err
	})
	return k, err
}

// patiently repeats a create that was refused for its rate: nothing was made.
func (r *run) patiently(ctx context.Context, create func() error) error {
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

// cleanUp deletes what this run made, and what abandoned ones have left. The ids
// that the recorder saw come first: a listing may lag behind. The names find what
// an answer that was lost has made.
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

// ours says whether a name is this run's or an abandoned one's.
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
