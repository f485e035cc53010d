package main

// A client of the Admin API for the demo's checks. It shares no code with the
// engine's client, which the demo checks.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

type api struct {
	base    string // including /v1
	key     string
	project string
	http    *http.Client
}

func newAPI(base, key, project string) *api {
	return &api{
		base:    strings.TrimSuffix(base, "/"),
		key:     key,
		project: project,
		http:    &http.Client{Timeout: 30 * time.Second},
	}
}

// call sends one request with a bearer key. A status of 400 and above is not an
// error here: some steps expect one.
func (a *api) call(ctx context.Context, key, method, path string, body, answer any) (int, error) {
	var payload io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return 0, err
		}
		payload = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, payload)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return 0, err
	}
	if answer != nil && resp.StatusCode < 300 {
		if err := json.Unmarshal(content, answer); err != nil {
			return 0, fmt.Errorf("%s %s: the response is not JSON: %w", method, path, err)
		}
	}
	return resp.StatusCode, nil
}

// item is an entry of a list.
type item struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// list reads all pages of a list.
func (a *api) list(ctx context.Context, path string) ([]item, error) {
	var all []item
	query := url.Values{"limit": {"100"}}
	for {
		var page struct {
			Data    []item `json:"data"`
			HasMore bool   `json:"has_more"`
		}
		status, err := a.call(ctx, a.key, http.MethodGet, path+"?"+query.Encode(), nil, &page)
		if err != nil {
			return nil, err
		}
		if status != http.StatusOK {
			return nil, fmt.Errorf("GET %s: status %d", path, status)
		}
		all = append(all, page.Data...)
		if !page.HasMore || len(page.Data) == 0 {
			return all, nil
		}
		query.Set("after", all[len(all)-1].ID)
	}
}

func (a *api) serviceAccounts(ctx context.Context) ([]item, error) {
	return a.list(ctx, "/organization/projects/"+url.PathEscape(a.project)+"/service_accounts")
}

func (a *api) adminKeys(ctx context.Context) ([]item, error) {
	return a.list(ctx, "/organization/admin_api_keys")
}

// createAdminKey creates an admin key. With an expiry of 0 the key does not
// expire; the engine warns about a key that does.
func (a *api) createAdminKey(ctx context.Context, name string, expiry time.Duration) (id, value string, err error) {
	var created struct {
		ID    string `json:"id"`
		Value string `json:"value"`
	}
	body := map[string]any{"name": name}
	if expiry > 0 {
		body["expires_in_seconds"] = int(expiry.Seconds())
	}
	status, err := a.call(ctx, a.key, http.MethodPost, "/organization/admin_api_keys", body, &created)
	if err != nil {
		return "", "", err
	}
	if status >= 300 || created.Value == "" {
		return "", "", fmt.Errorf("creating an admin key for the demo: status %d; OPENAI_ADMIN_KEY needs the permission to manage admin keys", status)
	}
	return created.ID, created.Value, nil
}

// deleteAdminKey deletes an admin key. It succeeds if the key does not exist.
func (a *api) deleteAdminKey(ctx context.Context, id string) error {
	status, err := a.call(ctx, a.key, http.MethodDelete, "/organization/admin_api_keys/"+url.PathEscape(id), nil, nil)
	if err != nil {
		return err
	}
	if status >= 300 && status != http.StatusNotFound {
		return fmt.Errorf("deleting admin key %s: status %d", id, status)
	}
	return nil
}
