package live

// The probes, in the order in which they run. Each reports its findings under the
// number of its question; a probe that fails reports the reason.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"vault-plugin-secrets-openai/client"
)

type step struct {
	section int
	about   string
	probe   func(*run, context.Context) error
}

var steps = []step{
	{1, "Errors", (*run).errors},
	{5, "A service account and its key", (*run).create},
	{2, "Deleting a key", (*run).deleteKey},
	{7, "Scopes", (*run).scopes},
	{3, "Changing a key's expiry", (*run).expiry},
	{8, "Policies", (*run).policies},
	{8, "Roles of accounts", (*run).roles},
	{9, "Idempotency-Key", (*run).idempotency},
	{6, "Admin keys", (*run).adminKeys},
	{10, "Audit log", (*run).auditLog},
	{12, "Other endpoints", (*run).others},
	{2, "Deleting an account", (*run).deleteAccount},
	{0, "", (*run).unchecked},
}

const unknownID = "vaultlive0nothing0has0this0id"

// describeAnswer describes OpenAI's answer to the client's last call.
func (r *run) describeAnswer(err error) string {
	e := client.AsError(err)
	switch {
	case err == nil:
		return "accepted"
	case e == nil || e.Status == 0:
		return err.Error()
	}
	return r.wire.last().String()
}

func (r *run) project(path string) string {
	return "/organization/projects/" + url.PathEscape(r.Project) + path
}

func (r *run) errors(ctx context.Context) error {
	unknown, err := r.connect(client.NewSecret("sk-admin-" + unknownID))
	if err != nil {
		return err
	}
	defer unknown.Close()
	_, err = unknown.GetProject(ctx, r.Project)
	r.report.expect(1, "An unknown admin key is a 401 or 403", client.IsDenied(err), r.describeAnswer(err))

	_, err = r.api.GetProject(ctx, "proj_"+unknownID)
	r.report.expect(1, "An unknown project is a 404 in OpenAI's form", client.IsNotFound(err), r.describeAnswer(err))
	for _, thing := range []struct {
		name   string
		remove func() error
	}{
		{"account", func() error { return r.api.DeleteServiceAccount(ctx, r.Project, "user-"+unknownID) }},
		{"project key", func() error { return r.api.DeleteProjectKey(ctx, r.Project, "key_"+unknownID) }},
		{"admin key", func() error { return r.api.DeleteAdminKey(ctx, "key_"+unknownID) }},
	} {
		err := thing.remove()
		r.report.expect(1, "Deleting an unknown "+thing.name+" is a 404 in OpenAI's form", client.IsNotFound(err), r.describeAnswer(err))
	}
	err = r.api.CheckWrite(ctx)
	r.report.expect(1, "The check without side effects confirms that this key may write", err == nil, r.describeAnswer(err))

	if r.ReadOnlyKey.IsZero() {
		r.report.add(1, "A read-only key", Unchecked, "no read-only admin key was given (OPENAI_READONLY_ADMIN_KEY)")
	} else {
		reader, err := r.connect(r.ReadOnlyKey)
		if err != nil {
			return err
		}
		defer reader.Close()
		err = reader.CheckWrite(ctx)
		r.report.expect(1, "Permissions are judged before existence: a read-only key is refused for an object that does not exist", client.IsDenied(err), r.describeAnswer(err))
	}

	projects, err := r.api.ListProjects(ctx)
	if err != nil {
		return err
	}
	for _, p := range projects {
		if p.Archived() {
			err := r.api.DeleteServiceAccount(ctx, p.ID, "user-"+unknownID)
			r.report.add(1, "Deleting an account in an archived project", Learned, r.describeAnswer(err))
			return nil
		}
	}
	r.report.add(1, "Deleting an account in an archived project", Unchecked, "the organization has no archived project")
	return nil
}

func (r *run) create(ctx context.Context) (err error) {
	name := r.name("Az09 ._@-")
	name += strings.Repeat("x", 64-len(name))
	if r.main, err = r.account(ctx, name); err != nil {
		r.report.expect(5, "A name of 64 letters, digits, spaces and ._@- is accepted", false, r.describeAnswer(err))
		return err
	}
	began := time.Now()
	r.report.expect(5, "A name of 64 letters, digits, spaces and ._@- is accepted unchanged", r.main.Name == name, "accepted, and returned unchanged: "+yes(r.main.Name == name))
	left := time.Until(r.main.key.ExpiresAt)
	r.report.expect(3, "A key with an expiry of an hour expires in an hour", near(left, time.Hour), "expires_at is "+left.Round(time.Second).String()+" from now by the local clock")

	found, after, err := r.pollUntil(ctx, began, func() (bool, error) {
		accounts, err := r.api.ListServiceAccounts(ctx, r.Project)
		for _, a := range accounts {
			if a.ID == r.main.ID {
				return a.Name == name, err
			}
		}
		return false, err
	})
	if err != nil {
		return err
	}
	r.report.expect(2, "A new account is listed by its name within two minutes", found && after < 2*time.Minute, shown(found, after))
	keys, err := r.api.ListProjectKeys(ctx, r.Project)
	if err != nil {
		return err
	}
	owner := ""
	for _, k := range keys {
		if k.ID == r.main.key.ID {
			owner = k.AccountID
		}
	}
	r.report.expect(2, "The project's list of keys has the ID of the account that owns a key", owner == r.main.ID, "it has: "+yes(owner == r.main.ID))

	works, after := r.waitForKeyState(ctx, began, r.main.key.Value, exchange.ok)
	r.report.expect(3, "A new key of a service account works", works, shown(works, after))

	x := r.wire.call(ctx, r.main.key.Value, http.MethodGet, "/organization/projects?limit=1", nil)
	r.report.expect(1, "A project's key is refused by the Admin API", x.refused(), x.String())
	x = r.wire.call(ctx, r.main.key.Value, http.MethodDelete, "/organization/admin_api_keys/key_"+unknownID, nil)
	r.report.expect(1, "… before the API checks whether the object exists", x.refused(), x.String())

	twin, err := r.account(ctx, name)
	r.report.add(5, "A second account of the same name", Learned, r.describeAnswer(err))
	if err == nil {
		r.report.add(5, "… has a different ID", Learned, yes(twin.ID != r.main.ID))
	}
	_, err = r.account(ctx, r.name("long")+strings.Repeat("x", 200))
	r.report.add(5, "A name of more than 200 characters", Learned, r.describeAnswer(err))
	return ctx.Err()
}

func (r *run) deleteKey(ctx context.Context) error {
	k, err := r.key(ctx, nil, time.Hour)
	if err != nil {
		return err
	}
	works, after := r.waitForKeyState(ctx, time.Now(), k.Value, exchange.ok)
	r.report.expect(3, "A second key of an account works", works, shown(works, after))
	err = r.api.DeleteProjectKey(ctx, r.Project, k.ID)
	deleted := time.Now()
	r.report.expect(2, "A service account's key can be deleted alone", err == nil, r.describeAnswer(err))
	if err == nil {
		ended, after := r.waitForKeyState(ctx, deleted, k.Value, exchange.refused)
		r.report.expect(3, "A deleted key stops working", ended, shown(ended, after))
		err = r.api.DeleteProjectKey(ctx, r.Project, k.ID)
		r.report.expect(2, "Deleting it again is a 404 in OpenAI's form", client.IsNotFound(err), r.describeAnswer(err))
		x := r.inference(ctx, r.main.key.Value)
		r.report.expect(2, "The account's other key still works", x.ok(), x.String())
	}
	return nil
}

// scopes uses calls that cost nothing: a list of models, and a request for a
// response without a model, which OpenAI rejects after checking its permission.
func (r *run) scopes(ctx context.Context) error {
	respond := func(key client.Secret) string {
		x := r.wire.call(ctx, key, http.MethodPost, "/responses", struct{}{})
		if x.refused() {
			return "refused: " + x.String()
		}
		return "allowed (" + x.String() + ")"
	}
	for _, scope := range []string{"api.model.read", "model.read", "api.all.read", "api.responses.write", "api.model.request", "model.request"} {
		k, err := r.key(ctx, []string{scope}, time.Hour)
		if err != nil {
			r.report.add(7, "A key with the scope "+scope, Learned, r.describeAnswer(err))
			continue
		}
		works, after := r.waitForKeyState(ctx, time.Now(), k.Value, func(x exchange) bool { return x.ok() || missing(x) })
		models := "not in effect after " + after.String()
		if works {
			models = r.inference(ctx, k.Value).String()
		}
		r.report.add(7, "A key with the scope "+scope, Learned, "list of models: "+models+"; responses: "+respond(k.Value))
	}
	_, err := r.key(ctx, []string{"api.vaultlive.nothing"}, time.Hour)
	r.report.add(1, "A key with an unknown scope", Learned, r.describeAnswer(err))

	x := r.wire.call(ctx, r.AdminKey, http.MethodPost, r.project("/service_accounts/"+url.PathEscape(r.main.ID)+"/api_keys"),
		map[string]any{"name": r.name("key"), "scopes": []string{}, "expires_in_seconds": 3600})
	if !x.ok() {
		r.report.add(7, "A key created with an empty list of scopes", Learned, x.String())
	} else {
		works, _ := r.waitForKeyState(ctx, time.Now(), x.value(), exchange.ok)
		r.report.add(7, "A key created with an empty list of scopes has full access", Learned, yes(works))
	}

	k, err := r.key(ctx, nil, time.Hour)
	if err != nil {
		return err
	}
	if works, _ := r.waitForKeyState(ctx, time.Now(), k.Value, exchange.ok); !works {
		return errors.New("the key whose scopes are to change never worked")
	}
	_, err = r.api.UpdateProjectKey(ctx, r.Project, k.ID, []string{"api.responses.write"}, 0)
	r.report.expect(7, "The scopes of a key can be changed", err == nil, r.describeAnswer(err))
	if err == nil {
		ended, after := r.waitForKeyState(ctx, time.Now(), k.Value, exchange.refused)
		r.report.add(3, "A removed scope stops working", Learned, shown(ended, after))
	}
	return nil
}

func (r *run) expiry(ctx context.Context) error {
	short, err := r.key(ctx, nil, r.Expiry)
	if err != nil {
		return err
	}
	// Until it expires, change the expiry of another key.
	k, err := r.key(ctx, nil, time.Hour)
	if err != nil {
		return err
	}
	longer, err := r.api.UpdateProjectKey(ctx, r.Project, k.ID, nil, 2*time.Hour)
	left := time.Until(longer.ExpiresAt)
	r.report.expect(13, "A key's expiry can be postponed, counted from the request", err == nil && near(left, 2*time.Hour), r.describeAnswer(err)+", expires_at is "+left.Round(time.Second).String()+" from now")
	ended, err := r.api.UpdateProjectKey(ctx, r.Project, k.ID, nil, client.MinExpiry)
	r.report.add(3, "A key's expiry can be shortened to one second", Learned, r.describeAnswer(err))
	if err == nil {
		is, after := r.waitForKeyState(ctx, ended.ExpiresAt, k.Value, exchange.refused)
		r.report.add(3, "… and it stops working, counted from its expires_at", Learned, shown(is, after))
	}

	if err := client.Wait(ctx, time.Until(short.ExpiresAt)-5*r.Pause); err != nil {
		return err
	}
	is, after := r.waitForKeyState(ctx, short.ExpiresAt, short.Value, exchange.refused)
	r.report.expect(3, fmt.Sprintf("A key of %s stops working at its expires_at, give or take a minute", r.Expiry), is && after.Abs() < time.Minute, shown(is, after))
	keys, err := r.api.ListProjectKeys(ctx, r.Project)
	if err != nil {
		return err
	}
	listed := false
	for _, other := range keys {
		listed = listed || other.ID == short.ID
	}
	r.report.add(3, "An expired key is still listed", Learned, yes(listed))
	_, err = r.api.UpdateProjectKey(ctx, r.Project, short.ID, nil, time.Hour)
	r.report.add(3, "An expired key can be given a new expiry", Learned, r.describeAnswer(err))
	err = r.api.DeleteProjectKey(ctx, r.Project, short.ID)
	r.report.expect(2, "Deleting an expired key succeeds or is a 404", err == nil || client.IsNotFound(err), r.describeAnswer(err))
	return nil
}

// policies checks whether the organization or project limits the lifetime of keys,
// which no endpoint returns. It deletes each key immediately.
func (r *run) policies(ctx context.Context) error {
	for _, e := range []struct {
		about  string
		expiry time.Duration
	}{
		{"A key for a year (refused = a policy limits lifetimes)", client.MaxExpiry},
		{"A key without an expiry (refused = a policy requires one)", 0},
		{"A key for a year and a second", client.MaxExpiry + time.Second},
	} {
		k, err := r.key(ctx, nil, e.expiry)
		r.report.add(8, e.about, Learned, r.describeAnswer(err))
		if err == nil {
			if err := r.api.DeleteProjectKey(ctx, r.Project, k.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *run) roles(ctx context.Context) error {
	x := r.wire.call(ctx, r.AdminKey, http.MethodPost, r.project("/service_accounts"),
		map[string]any{"name": r.name("only"), "create_service_account_only": true})
	if !x.ok() {
		r.report.add(8, "An account without a key or role", Learned, x.String())
		return nil
	}
	var a struct {
		ID, Role string
		APIKey   json.RawMessage `json:"api_key"`
	}
	x.decode(&a)
	r.report.add(8, "An account without a key or role", Learned, fmt.Sprintf("role %q, api_key %s", a.Role, kindOf(a.APIKey)))
	x = r.wire.call(ctx, r.AdminKey, http.MethodPost, r.project("/service_accounts/"+url.PathEscape(a.ID)), map[string]any{"role": "member"})
	r.report.add(8, "… made a member afterwards", Learned, x.String())
	x = r.wire.call(ctx, r.AdminKey, http.MethodGet, "/projects/"+url.PathEscape(r.Project)+"/users/"+url.PathEscape(a.ID)+"/roles", nil)
	r.report.add(8, "The list of a user's roles accepts a service account's ID", Learned, x.String())
	return nil
}

func (r *run) idempotency(ctx context.Context) error {
	name, token := r.name("twice"), r.prefix+"token"
	var ids []string
	for range 2 {
		x := r.wire.call(ctx, r.AdminKey, http.MethodPost, r.project("/service_accounts"),
			map[string]any{"name": name, "expires_in_seconds": 3600}, "Idempotency-Key", token)
		var a struct{ ID string }
		x.decode(&a)
		if !x.ok() || a.ID == "" {
			r.report.add(9, "Two creates of an account with one Idempotency-Key", Learned, x.String())
			return nil
		}
		ids = append(ids, a.ID)
	}
	r.report.add(9, "The create of an account honors Idempotency-Key", Learned, yes(ids[0] == ids[1]))
	return nil
}

func (r *run) adminKeys(ctx context.Context) error {
	matching := func(key client.Secret) (n int, err error) {
		keys, err := r.api.ListAdminKeys(ctx)
		for _, k := range keys {
			if k.Matches(key) {
				n++
			}
		}
		return n, err
	}
	n, err := matching(r.AdminKey)
	if err != nil {
		return err
	}
	r.report.expect(6, "Only the admin key in use matches its redacted value", n == 1, fmt.Sprintf("%d keys match", n))

	var k client.AdminKey
	var value client.Secret
	err = r.retryRateLimited(ctx, func() (err error) {
		k, value, err = r.api.CreateAdminKey(ctx, r.name("admin"), 15*time.Minute)
		return err
	})
	r.report.expect(6, "An admin key can be created with an expiry", err == nil, r.describeAnswer(err))
	if err != nil {
		return nil
	}
	began := time.Now()
	works, after, err := r.pollUntil(ctx, began, func() (bool, error) {
		return r.wire.call(ctx, value, http.MethodGet, "/organization/projects?limit=1", nil).ok(), nil
	})
	if err != nil {
		return err
	}
	r.report.expect(6, "A new admin key works within 20 seconds", works && after < 20*time.Second, shown(works, after))
	if n, err = matching(value); err == nil {
		r.report.expect(6, "Only this key matches its redacted value", n == 1, fmt.Sprintf("%d keys match", n))
	}
	fresh, err := r.connect(value)
	if err != nil {
		return err
	}
	defer fresh.Close()
	err = fresh.CheckWrite(ctx)
	r.report.expect(6, "It may write, like the key that created it", err == nil, r.describeAnswer(err))

	x := r.wire.call(ctx, r.AdminKey, http.MethodGet, "/organization/admin_api_keys/"+url.PathEscape(k.ID), nil)
	var shownKey struct {
		Owner struct{ Type, Object, Role string }
	}
	x.decode(&shownKey)
	r.report.add(6, "Its owner", Learned, fmt.Sprintf("type %q, object %q, role %q", shownKey.Owner.Type, shownKey.Owner.Object, shownKey.Owner.Role))

	err = fresh.DeleteAdminKey(ctx, k.ID)
	r.report.add(6, "An admin key deletes itself", Learned, r.describeAnswer(err))
	if err != nil {
		if err := r.api.DeleteAdminKey(ctx, k.ID); err != nil {
			return err
		}
	}
	deleted := time.Now()
	ended, after, err := r.pollUntil(ctx, deleted, func() (bool, error) {
		return r.wire.call(ctx, value, http.MethodGet, "/organization/projects?limit=1", nil).refused(), nil
	})
	r.report.expect(6, "A deleted admin key stops working", ended, shown(ended, after))
	return err
}

func (r *run) auditLog(ctx context.Context) error {
	var page struct {
		Data []struct {
			Type    string
			Created *struct {
				ID   string
				Data struct{ Scopes []string }
			} `json:"api_key.created"`
		}
	}
	path := "/organization/audit_logs?limit=20&resource_ids[]=" + url.QueryEscape(r.main.key.ID)
	var x exchange
	found, after, err := r.pollUntil(ctx, time.Now(), func() (bool, error) {
		x = r.wire.call(ctx, r.AdminKey, http.MethodGet, path, nil)
		x.decode(&page)
		return !x.ok() || len(page.Data) > 0, nil
	})
	switch {
	case err != nil:
		return err
	case !x.ok():
		r.report.add(10, "Events about a key in the audit log", Unchecked, x.String())
	case !found:
		r.report.add(10, "Events about a key in the audit log", Learned, "none for the key's ID (is the audit log enabled?)")
	default:
		same, scopes := false, 0
		for _, e := range page.Data {
			if e.Created != nil {
				same, scopes = e.Created.ID == r.main.key.ID, len(e.Created.Data.Scopes)
			}
		}
		r.report.add(10, "Events about a key in the audit log", Learned,
			fmt.Sprintf("%d, %s after the first query; api_key.created has the key's ID: %s, and %d scopes", len(page.Data), after.Round(time.Second), yes(same), scopes))
	}
	return nil
}

func (r *run) others(ctx context.Context) error {
	since := fmt.Sprint(time.Now().Add(-time.Hour).Unix())
	for _, o := range []struct {
		section int
		about   string
		path    string
	}{
		{10, "Usage of a key", "/organization/usage/completions?limit=1&start_time=" + since + "&api_key_ids[]=" + url.QueryEscape(r.main.key.ID)},
		{11, "Workload identity providers can be listed", "/organization/workload_identity_providers?limit=1"},
	} {
		x := r.wire.call(ctx, r.AdminKey, http.MethodGet, o.path, nil)
		r.report.add(o.section, o.about, Learned, x.String())
	}
	if r.wire.upstream.Host != "api.openai.com" {
		r.report.add(12, "Regional hosts serve the Admin API", Unchecked, "checked only at api.openai.com")
		return nil
	}
	regional, err := newWire(strings.Replace(r.BaseURL, "//api.", "//eu.api.", 1))
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, regional.upstream.String()+"/organization/projects?limit=1", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+r.AdminKey.Reveal())
	resp, err := regional.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	r.report.add(12, "The European host serves the Admin API", Learned, resp.Status)
	return nil
}

func (r *run) deleteAccount(ctx context.Context) error {
	if r.main.ID == "" {
		return errors.New("there is no account to delete")
	}
	err := r.api.DeleteServiceAccount(ctx, r.Project, r.main.ID)
	deleted := time.Now()
	r.report.expect(2, "An account that has keys can be deleted", err == nil, r.describeAnswer(err))
	if err != nil {
		return err
	}
	ended, after := r.waitForKeyState(ctx, deleted, r.main.key.Value, exchange.refused)
	r.report.expect(2, "Its keys stop working with it", ended, shown(ended, after))
	err = r.api.DeleteServiceAccount(ctx, r.Project, r.main.ID)
	r.report.expect(2, "Deleting it again is a 404 in OpenAI's form", client.IsNotFound(err), r.describeAnswer(err))
	keys, err := r.api.ListProjectKeys(ctx, r.Project)
	if err != nil {
		return err
	}
	left := 0
	for _, k := range keys {
		if k.AccountID == r.main.ID {
			left++
		}
	}
	r.report.add(2, "Its keys are no longer listed", Learned, fmt.Sprintf("%d are listed", left))
	return nil
}

// unchecked lists the questions that a safe run cannot answer.
func (r *run) unchecked(context.Context) error {
	for _, u := range []struct {
		section int
		about   string
		why     string
	}{
		{4, "Rate limits in numbers", "needs a burst of calls; the table of calls shows whether any was limited"},
		{5, "Maximum number of accounts, keys and scopes", "needs hundreds of each"},
		{6, "Whether an admin key stays valid when its owner leaves", "needs a user who leaves"},
		{8, "Accounts in the Default project", "needs a project other than the test project"},
		{8, "Whether the role member removes custom roles", "needs a custom role"},
		{11, "Vault as an issuer of workload identities", "needs a provider, which belongs to the organization"},
		{13, "Key policies: how to read them, and from when a renewal counts", "no endpoint; needs a policy set in the settings"},
	} {
		r.report.add(u.section, u.about, Unchecked, u.why)
	}
	return nil
}

// inference lists the models, which costs nothing. A key without that permission gets a
// 403.
func (r *run) inference(ctx context.Context, key client.Secret) exchange {
	return r.wire.once(ctx, key, http.MethodGet, "/models", nil)
}

// waitForKeyState waits until three answers in a row to a key match as, since a change may
// not reach all servers at once. It returns the time of the first.
func (r *run) waitForKeyState(ctx context.Context, since time.Time, key client.Secret, as func(exchange) bool) (bool, time.Duration) {
	var first time.Duration
	streak := 0
	began := time.Now()
	for time.Since(began) < r.Patience {
		asked := time.Since(since)
		if as(r.inference(ctx, key)) {
			if streak++; streak == 1 {
				first = asked
			}
			if streak == 3 {
				return true, first
			}
		} else {
			streak = 0
		}
		if client.Wait(ctx, r.Pause) != nil {
			break
		}
	}
	return false, time.Since(since)
}

// pollUntil waits until so returns true or Patience has passed.
func (r *run) pollUntil(ctx context.Context, since time.Time, so func() (bool, error)) (bool, time.Duration, error) {
	for began := time.Now(); ; {
		is, err := so()
		if is || err != nil || time.Since(began) > r.Patience {
			return is, time.Since(since), err
		}
		if err := client.Wait(ctx, r.Pause); err != nil {
			return false, time.Since(since), err
		}
	}
}

// missing reports whether a key lacks a scope, as opposed to being unknown yet.
func missing(x exchange) bool {
	return x.refused() && (x.status == http.StatusForbidden || strings.Contains(strings.ToLower(x.text), "scope"))
}

func (x exchange) value() client.Secret {
	var k struct{ Value string }
	x.decode(&k)
	return client.NewSecret(k.Value)
}

func near(d, target time.Duration) bool { return (d - target).Abs() < time.Minute }

func shown(is bool, after time.Duration) string {
	if !is {
		return "not within " + after.Round(time.Second).String()
	}
	return "yes, after " + after.Round(10*time.Millisecond).String()
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

func kindOf(raw json.RawMessage) string {
	if text := string(raw); text == "null" || text == "" {
		return "null"
	}
	return "not null"
}
