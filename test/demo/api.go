package main

// The Admin API as the demo's user would see it, from outside of Vault. It is
// written by hand and not with the engine's client, since a check that shares
// the code that it checks proves little.

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
	base    string // with the /v1
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

// call makes one request with a bearer key. A status of 400 and above is not an
// error here: some steps are about those.
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
			return 0, fmt.Errorf("%s %s answered something else than JSON: %w", method, path, err)
		}
	}
	return resp.StatusCode, nil
}

// item is what lists are searched for.
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
			return nil, fmt.Errorf("GET %s answered %d", path, status)
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

// makeAdminKey makes an admin key that ends by itself within the hour, should
// the demo be stopped in a way that lets nobody clean up.
func (a *api) makeAdminKey(ctx context.Context, name string) (id, value string, err error) {
	var made struct {
		ID    string `json:"id"`
		Value string `json:"value"`
	}
	body := map[string]any{"name": name, "expires_in_seconds": 3600}
	status, err := a.call(ctx, a.key, http.MethodPost, "/organization/admin_api_keys", body, &made)
	if err != nil {
		return "", "", err
	}
	if status >= 300 || made.Value == "" {
		return "", "", fmt.Errorf("making an admin key for the demo: the API answered %d (does OPENAI_ADMIN_KEY have the permission to manage admin keys?)", status)
	}
	return made.ID, made.Value, nil
}

// deleteAdminKey deletes an admin key; one that is gone already is fine.
func (a *api) deleteAdminKey(ctx context.Context, id string) error {
	status, err := a.call(ctx, a.key, http.MethodDelete, "/organization/admin_api_keys/"+url.PathEscape(id), nil, nil)
	if err != nil {
		return err
	}
	if status >= 300 && status != http.StatusNotFound {
		return fmt.Errorf("deleting admin key %s: the API answered %d", id, status)
	}
	return nil
}
