package client

// The limits of a project, and responses that do not contain them.

import (
	"context"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestLimits_AreReadAsOpenAIHasThem(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	sim := simulate(t, openaitest.Options{})
	c := connect(t, sim)
	project := sim.AddProject("one")
	_, err := c.GetSpendLimit(ctx, project)
	require.True(t, IsNotFound(err))
	_, err = c.GetModelPermissions(ctx, project)
	require.True(t, IsNotFound(err))

	sim.SetSpendLimit(project, 12_345)
	sim.SetModelPermissions(project, AllowList, "gpt-5-mini")
	limit, err := c.GetSpendLimit(ctx, project)
	require.NoError(t, err)
	require.Equal(t, SpendLimit{12_345, "USD", "month", "enforcing"}, limit)
	models, err := c.GetModelPermissions(ctx, project)
	require.NoError(t, err)
	require.Equal(t, ModelPermissions{AllowList, []string{"gpt-5-mini"}}, models)
	rates, err := c.ListRateLimits(ctx, project)
	require.NoError(t, err)
	require.Len(t, rates, 2)
	require.Equal(t, "gpt-5-mini", rates[0].Model)
	require.EqualValues(t, 500, *rates[0].Limits.Requests)
	require.Nil(t, rates[0].Limits.Images)
}

// An answer of another service must not count as a limit.
func TestLimits_OtherAnswersAreErrors(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for name, body := range map[string]string{
		"an empty object":       `{}`,
		"no amount":             `{"object":"project.spend_limit","threshold_amount":null,"currency":"USD","interval":"month"}`,
		"an amount of 0":        `{"threshold_amount":0,"mode":"","model_ids":[]}`,
		"an amount as text":     `{"threshold_amount":"100","mode":1,"model_ids":[]}`,
		"a mode without a list": `{"threshold_amount":-1,"mode":"allow_list"}`,
		"a list without a mode": `{"model_ids":["gpt-5-mini"]}`,
		"another API's page":    `{"status":"ok"}`,
	} {
		c := answering(t, http.StatusOK, nil, body)
		_, err := c.GetSpendLimit(ctx, "p")
		require.Error(t, err, name)
		require.False(t, IsNotFound(err), name)
		_, err = c.GetModelPermissions(ctx, "p")
		require.Error(t, err, name)
	}
}
