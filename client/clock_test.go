package client

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestNow_FollowsTheLastSuccessfulAnswer(t *testing.T) {
	t.Parallel()
	s := simulate(t, openaitest.Options{})
	c := connect(t, s)
	_, known := c.Now()
	require.False(t, known)
	local := time.Now()
	require.Equal(t, local, c.NotAfter(local))
	s.Advance(3 * time.Hour)
	s.Fail(openaitest.Fault{Status: http.StatusForbidden, Times: 1})
	_, err := c.ListProjects(t.Context())
	require.Error(t, err)
	_, known = c.Now()
	require.False(t, known, "a gateway may have sent the error")
	_, err = c.ListProjects(t.Context())
	require.NoError(t, err)
	now, known := c.Now()
	require.True(t, known)
	require.WithinDuration(t, local.Add(3*time.Hour), now, 10*time.Second)
	require.Equal(t, local, c.NotAfter(local), "this clock is behind")
	require.WithinDuration(t, now, c.NotAfter(local.Add(4*time.Hour)), 10*time.Second, "this clock is ahead")
}

func TestNow_IsKnownToTheNextClientOfTheEndpoint(t *testing.T) {
	t.Parallel()
	s, other := simulate(t, openaitest.Options{}), simulate(t, openaitest.Options{})
	var clocks Clocks
	first := connect(t, s, func(o *Options) { o.Clocks = &clocks })
	s.Advance(3 * time.Hour)
	_, err := first.ListProjects(t.Context())
	require.NoError(t, err)
	now, known := connect(t, s, func(o *Options) { o.Clocks = &clocks }).Now()
	require.True(t, known)
	require.WithinDuration(t, time.Now().Add(3*time.Hour), now, 10*time.Second)
	_, known = connect(t, other, func(o *Options) { o.Clocks = &clocks }).Now()
	require.False(t, known, "another endpoint may have another clock")
	_, known = connect(t, s).Now()
	require.False(t, known)
}
