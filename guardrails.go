package openaisecrets

// This file owns the guardrails: whether a role and its project meet what the config
// requires, and what OpenAI last said about each project.
//
// What must stay true: a project counts as bounded for verdictFor after OpenAI said so,
// and as unbounded until OpenAI says otherwise; anything but OpenAI's own answer about
// the project changes neither. A credential request calls OpenAI only for a project
// without a verdict; without guardrails, nothing here costs a call or a storage
// operation. Each cluster has its own verdicts, in local storage.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/internal/job"
)

const (
	verdictStoragePrefix = "guardrail/"
	verdictVersion       = 1
)

// bounds is what OpenAI last said about a project.
type bounds struct {
	Version int `json:"version"`
	// Endpoint said it. Another endpoint may know another project by the same ID.
	Endpoint   string `json:"api_endpoint"`
	SpendLimit bound  `json:"spend_limit"`
	AllowList  bound  `json:"model_allow_list"`
}

// bound is OpenAI's answer to one question about a project; the zero value means that
// it has not answered.
type bound struct {
	At  time.Time `json:"at,omitzero"`
	Met bool      `json:"met,omitempty"`
	// Said explains an answer that the project does not meet the requirement.
	Said string `json:"said,omitempty"`
}

// question is a requirement of a project.
type question struct {
	setting, lacks string
	of             func(*bounds) *bound
	ask            func(context.Context, *client.Client, string) (met bool, said string, err error)
}

var (
	askSpendLimit = question{
		"require_spend_limit", "has no hard spend limit", func(v *bounds) *bound { return &v.SpendLimit },
		func(ctx context.Context, api *client.Client, project string) (bool, string, error) {
			_, err := api.GetSpendLimit(ctx, project)
			return err == nil, "", err
		},
	}
	askAllowList = question{
		"require_model_allow_list", "has no list of allowed models", func(v *bounds) *bound { return &v.AllowList },
		func(ctx context.Context, api *client.Client, project string) (bool, string, error) {
			models, err := api.GetModelPermissions(ctx, project)
			return err == nil && models.Mode == client.AllowList, otherMode(models.Mode), err
		},
	}
)

// otherMode explains that model permissions are no list of allowed models.
func otherMode(mode string) string {
	return fmt.Sprintf("its model permissions have the mode %.64q", mode)
}

// questions returns the questions to ask about a project.
func (r requirements) questions() (all []question) {
	if r.RequireSpendLimit {
		all = append(all, askSpendLimit)
	}
	if r.RequireModelAllowList {
		all = append(all, askAllowList)
	}
	return all
}

// counts reports whether the answer still counts.
func (f bound) counts(now time.Time) bool {
	age := now.Sub(f.At)
	return !f.At.IsZero() && (!f.Met || age < verdictFor && age > -clockTolerance)
}

// unmet returns the reason to reject a project, "" if there is none, and whether every
// answer counts.
func (v *bounds) unmet(r requirements, mount, project string, now time.Time) (problem string, known bool) {
	known = true
	for _, q := range r.questions() {
		f := q.of(v)
		known = known && f.counts(now)
		if !f.At.IsZero() && !f.Met && problem == "" {
			problem = fmt.Sprintf("project %q %s, which this mount requires (%s in the config); add one at %s, then run \"vault read %sprojects/%s\" to check again (%s)", project, q.lacks, q.setting, projectsPage, mount, project, f.Said)
		}
	}
	return problem, known
}

// guards has the verdicts of this process.
type guards struct {
	locks *job.NameLocks // one judgment and one write per project at a time

	mu       sync.Mutex
	verdicts map[string]bounds
	asked    map[string]time.Time // the last request for a key of the project
	retry    map[string]time.Time // after a failure of the worker
}

func newGuards() *guards {
	return &guards{locks: job.NewNameLocks(), verdicts: map[string]bounds{}, asked: map[string]time.Time{}, retry: map[string]time.Time{}}
}

// get returns the verdict in memory; it is empty if another endpoint said it.
func (g *guards) get(project, endpoint string) (v bounds, loaded bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v, loaded = g.verdicts[project]; v.Endpoint != endpoint {
		v = bounds{Endpoint: endpoint}
	}
	return v, loaded
}

func (g *guards) put(project string, v bounds) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.verdicts[project] = v
}

// forget drops a verdict that another node changed.
func (g *guards) forget(project string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.verdicts, project)
}

// verdictOf returns the verdict of a project, from memory or else from storage.
func (b *backend) verdictOf(ctx context.Context, s logical.Storage, project, endpoint string) (bounds, error) {
	if v, loaded := b.guards.get(project, endpoint); loaded {
		return v, nil
	}
	var stored bounds
	_, err := readEntry(ctx, s, verdictStoragePrefix+project, "the verdict on project "+project, verdictVersion, &stored)
	if err != nil {
		return bounds{}, err
	}
	b.guards.mu.Lock()
	if _, loaded := b.guards.verdicts[project]; !loaded {
		b.guards.verdicts[project] = stored
	}
	b.guards.mu.Unlock()
	v, _ := b.guards.get(project, endpoint)
	return v, nil
}

// checkScopes returns why a role without scopes must not have a key, nil if it may.
func (r requirements) checkScopes(scopes []string) error {
	if r.RequireScopes && len(scopes) == 0 {
		return clientError("the role has no scopes, which this mount requires (require_scopes in the config); set scopes in the role")
	}
	return nil
}

// rejects returns why a role must not have a key, as far as this process knows, nil if
// there is no reason.
func (b *backend) rejects(snap *snapshot, mount, project string, scopes []string) error {
	r := snap.config.requirements
	if err := r.checkScopes(scopes); err != nil || !r.judges() {
		return err
	}
	v, _ := b.guards.get(project, snap.config.APIEndpoint)
	problem, _ := v.unmet(r, mount, project, b.now())
	return asClientError(problem)
}

// guard returns why a role must not have a key now, nil if it may. It calls OpenAI only
// if no verdict counts.
func (b *backend) guard(ctx context.Context, req *logical.Request, snap *snapshot, project string, scopes []string) error {
	r := snap.config.requirements
	if r.judges() {
		b.guards.mu.Lock()
		b.guards.asked[project] = b.now()
		b.guards.mu.Unlock()
	}
	if err := b.rejects(snap, req.MountPoint, project, scopes); err != nil || !r.judges() {
		return err
	}
	v, err := b.verdictOf(ctx, req.Storage, project, snap.config.APIEndpoint)
	if err != nil {
		return err
	}
	problem, known := v.unmet(r, req.MountPoint, project, b.now())
	if problem == "" && !known {
		return b.judgeOnce(ctx, req, snap, project)
	}
	return asClientError(problem)
}

func asClientError(problem string) error {
	if problem == "" {
		return nil
	}
	return clientError(problem)
}

// judgeOnce judges a project unless a concurrent request has just done so.
func (b *backend) judgeOnce(ctx context.Context, req *logical.Request, snap *snapshot, project string) error {
	ctx, cancel := context.WithTimeout(ctx, requestBudget)
	defer cancel()
	unlock, err := b.guards.locks.Lock(ctx, "judge "+project)
	if err != nil {
		return err
	}
	defer unlock()
	v, _ := b.guards.get(project, snap.config.APIEndpoint)
	problem, known := v.unmet(snap.config.requirements, req.MountPoint, project, b.now())
	if problem != "" || known {
		return asClientError(problem)
	}
	return b.judge(ctx, req, snap, project, snap.config.requirements)
}

// judge asks OpenAI about a project. It returns why the project does not meet the
// requirements, or that OpenAI does not say.
func (b *backend) judge(ctx context.Context, req *logical.Request, snap *snapshot, project string, r requirements) error {
	v, failure := b.ask(ctx, req, snap, project, r)
	problem, known := v.unmet(r, req.MountPoint, project, b.now())
	var clientErr clientError
	switch {
	case problem != "":
		return clientError(problem)
	case errors.As(failure, &clientErr):
		return clientErr
	case !known:
		return unverifiedError{fmt.Sprintf("the engine could not verify what this mount requires of project %s", project), failure}
	}
	return nil
}

// ask asks OpenAI about a project and keeps the answers. It returns the verdict, and the
// first failure of a question.
func (b *backend) ask(ctx context.Context, req *logical.Request, snap *snapshot, project string, r requirements) (v bounds, failure error) {
	var answers bounds
	for _, q := range r.questions() {
		f, err := b.answer(ctx, req, snap.api, project, q)
		if err == nil {
			*q.of(&answers) = f
		} else if failure == nil {
			failure = err
		}
		if isSystemic(err) {
			break
		}
	}
	return b.recordVerdict(ctx, req, project, snap.config.APIEndpoint, answers), failure
}

// answer asks OpenAI one question. A 404 counts only if OpenAI shows the project itself.
// An archived project has no limits, and is rejected as such.
func (b *backend) answer(ctx context.Context, req *logical.Request, api *client.Client, project string, q question) (f bound, err error) {
	met, said, err := q.ask(ctx, api, project)
	if e := client.AsError(err); e != nil && (e.NotFound() || e.Refused() && !e.Denied()) {
		said = err.Error()
		refusal, failure := checkProject(ctx, req, api, project)
		switch {
		case refusal != nil:
			return f, clientError(refusal.Error())
		case e.NotFound():
			err = failure
		}
	}
	if err != nil {
		return f, err
	}
	return b.answered(met, said), nil
}

// answered is an answer that OpenAI has just given.
func (b *backend) answered(met bool, said string) bound {
	if met {
		said = ""
	}
	return bound{At: b.now().UTC().Truncate(time.Second), Met: met, Said: said[:min(len(said), maxStoredText)]}
}

// recordVerdict merges answers into the verdict of a project, in memory and storage.
// Without storage, it is only known to this process.
func (b *backend) recordVerdict(ctx context.Context, req *logical.Request, project, endpoint string, answers bounds) bounds {
	// An answer counts even if its request has ended, but waits no longer for storage than
	// a clean-up.
	waiting, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupBudget)
	defer cancel()
	unlock, err := b.guards.locks.Lock(waiting, project)
	if err != nil {
		return answers
	}
	defer unlock()
	v, _ := b.guards.get(project, endpoint)
	changed := false
	for _, q := range []question{askSpendLimit, askAllowList} {
		if f, is := *q.of(&answers), q.of(&v); !f.At.IsZero() {
			*is, changed = f, true
		}
	}
	if !changed {
		return v
	}
	v.Version, v.Endpoint = verdictVersion, endpoint
	b.guards.put(project, v)
	if b.mayWriteLocally() {
		if err := writeEntry(ctx, req.Storage, verdictStoragePrefix+project, "the verdict on project "+project, v); err != nil {
			b.log(req).Warn("verdict on a project not stored; the next answer of OpenAI is stored again", "project_id", project, "error", err)
		}
	}
	return v
}

// guardWrite returns why a role must not be stored, nil if it may. A write that does not
// widen the role uses the last verdict.
func (b *backend) guardWrite(ctx context.Context, req *logical.Request, snap *snapshot, project string, scopes []string, widens bool, response *logical.Response) error {
	if snap == nil {
		return nil // without a config, nothing is required
	}
	r := snap.config.requirements
	if err := r.checkScopes(scopes); err != nil || !r.judges() {
		return err
	}
	v, err := b.verdictOf(ctx, req.Storage, project, snap.config.APIEndpoint)
	if err != nil {
		return err
	}
	if widens {
		return b.judge(ctx, req, snap, project, r)
	}
	problem, known := v.unmet(r, req.MountPoint, project, b.now())
	if problem == "" && !known {
		response.AddWarning(fmt.Sprintf("Project %s was not verified. The next request for a key of the role verifies it.", project))
	}
	return asClientError(problem)
}

// due returns the projects to judge again, those that were judged first before others.
func (g *guards) due(r requirements, endpoint string, now time.Time) (projects []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	since := map[string]time.Time{}
	for project, v := range g.verdicts {
		if v.Endpoint != endpoint || now.Sub(g.asked[project]) > askedFor || waits(now, g.retry[project], rejudgeUnmet) {
			continue
		}
		for _, q := range r.questions() {
			f := q.of(&v)
			every := rejudgeUnmet
			if f.Met {
				every = rejudgeMet
			}
			if age := now.Sub(f.At); age >= every || age < -clockTolerance {
				projects = append(projects, project)
				since[project] = f.At
				break
			}
		}
	}
	slices.SortFunc(projects, func(a, b string) int {
		if c := since[a].Compare(since[b]); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	return projects
}

// rejudge judges the projects that are due again, so that no credential request waits for
// it.
func (b *backend) rejudge(ctx context.Context, req *logical.Request) error {
	snap, err := b.current(ctx, req.Storage)
	if errors.Is(err, errNotConfigured) || err == nil && !snap.config.judges() {
		return nil
	}
	if err != nil {
		return err
	}
	for _, project := range b.guards.due(snap.config.requirements, snap.config.APIEndpoint, b.now()) {
		attempt, cancel := context.WithTimeout(ctx, tryBudget)
		_, err := b.ask(attempt, req, snap, project, snap.config.requirements)
		cancel()
		if err == nil {
			continue
		}
		b.guards.mu.Lock()
		b.guards.retry[project] = b.now().Add(rejudgeUnmet)
		b.guards.mu.Unlock()
		if isSystemic(err) {
			return err // the others would fail, too
		}
		b.complain(ctx, req, "project not verified", err)
	}
	return nil
}
