package client

// This file owns what a project allows: its hard spend limit, its model permissions and
// its rate limits.
//
// What must stay true: an answer without the amount or the mode is not OpenAI's. What a
// project lacks is a 404, which alone proves nothing; see Error.NotFound.

import "context"

// SpendLimit is a project's hard spend limit.
type SpendLimit struct {
	Cents    int64
	Currency string // "USD"
	Interval string // "month"
	// Enforcement is "inactive" or "enforcing". OpenAI defines neither: it may mean "in
	// effect" or "blocking now".
	Enforcement string
}

// GetSpendLimit reads a project's spend limit; IsNotFound holds for a project without one.
func (c *Client) GetSpendLimit(ctx context.Context, project string) (SpendLimit, error) {
	got, err := doWithRetry[spendLimit](ctx, c, request{operation: getSpendLimit, what: "read the spend limit of project " + project, ids: []string{project}})
	if err != nil {
		return SpendLimit{}, err
	}
	return SpendLimit{Cents: *got.Cents, Currency: string(got.Currency), Interval: string(got.Interval), Enforcement: string(got.Enforcement.Status)}, nil
}

// ModelPermissions is a project's list of models.
type ModelPermissions struct {
	Mode     string // AllowList or "deny_list"
	ModelIDs []string
}

// AllowList is the mode in which a project has access to the listed models only.
const AllowList = "allow_list"

// GetModelPermissions reads a project's model permissions; IsNotFound holds for a project
// without any.
func (c *Client) GetModelPermissions(ctx context.Context, project string) (ModelPermissions, error) {
	got, err := doWithRetry[modelPermissions](ctx, c, request{operation: getModelPermissions, what: "read the model permissions of project " + project, ids: []string{project}})
	return ModelPermissions(got), err
}

// RateLimit is the limits of a model in a project.
type RateLimit struct {
	ID, Model string
	Limits    RateLimitValues
}

// RateLimitValues has a limit by its name in OpenAI's document, nil if it does not apply to the model.
type RateLimitValues struct {
	Requests       *int64 `json:"max_requests_per_1_minute"`
	Tokens         *int64 `json:"max_tokens_per_1_minute"`
	Images         *int64 `json:"max_images_per_1_minute"`
	AudioMegabytes *int64 `json:"max_audio_megabytes_per_1_minute"`
	RequestsPerDay *int64 `json:"max_requests_per_1_day"`
	BatchTokens    *int64 `json:"batch_1_day_max_input_tokens"`
}

// ListRateLimits returns the rate limits of all models in a project.
func (c *Client) ListRateLimits(ctx context.Context, project string) ([]RateLimit, error) {
	what := "list rate limits of project " + project
	return collect(c, what, func(l RateLimit) string { return l.ID },
		func(after string) (page[RateLimit], error) {
			got, err := doWithRetry[listing[rateLimit]](ctx, c, request{operation: listRateLimits, what: what, ids: []string{project}, query: pageAfter(after)})
			return pageOf(got, rateLimit.public), err
		})
}

type spendLimit struct {
	Cents       *int64 `json:"threshold_amount"`
	Currency    label  `json:"currency"`
	Interval    label  `json:"interval"`
	Enforcement struct {
		Status label `json:"status"`
	} `json:"enforcement"`
}

func (l spendLimit) valid() bool { return l.Cents != nil && *l.Cents > 0 }

type modelPermissions struct {
	Mode     string   `json:"mode"`
	ModelIDs []string `json:"model_ids"`
}

func (m modelPermissions) valid() bool { return m.Mode != "" && m.ModelIDs != nil }

type rateLimit struct {
	ID    string `json:"id"`
	Model label  `json:"model"`
	RateLimitValues
}

func (l rateLimit) valid() bool { return l.ID != "" }

func (l rateLimit) public() RateLimit {
	return RateLimit{ID: l.ID, Model: string(l.Model), Limits: l.RateLimitValues}
}
