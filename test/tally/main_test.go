package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func count(t *testing.T, stream string) (last, all string, passed bool) {
	t.Helper()
	var out strings.Builder
	passed, err := run(strings.NewReader(stream), &out)
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	return lines[len(lines)-1], out.String(), passed
}

func TestCountsLeavesOnce(t *testing.T) {
	last, all, passed := count(t, `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/one"}
{"Action":"pass","Package":"p","Test":"TestA/one"}
{"Action":"run","Package":"p","Test":"TestA/two"}
{"Action":"pass","Package":"p","Test":"TestA/two"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:3: no such thing here\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"pass","Package":"p","Elapsed":0.1}
`)
	require.Equal(t, "2 passed, 0 failed, 1 skipped", last)
	require.Contains(t, all, "TestB: b_test.go:3: no such thing here")
	require.True(t, passed)
}

func TestRun_CountsParentFailureWithoutFailedSubtest(t *testing.T) {
	last, all, passed := count(t, `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/one"}
{"Action":"pass","Package":"p","Test":"TestA/one"}
{"Action":"output","Package":"p","Test":"TestA","Output":"left behind\n"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p","Elapsed":0.1}
`)
	require.Equal(t, "1 passed, 1 failed, 0 skipped", last)
	require.Contains(t, all, "left behind")
	require.False(t, passed)
}

func TestRun_FailsOnCrashOrBuildError(t *testing.T) {
	last, all, passed := count(t, `{"ImportPath":"q [q.test]","Action":"build-output","Output":"q.go:1: no good\n"}
{"Action":"fail","Package":"q","FailedBuild":"q [q.test]"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"panic: out\n"}
{"Action":"fail","Package":"p","Elapsed":0.1}
`)
	require.Equal(t, "0 passed, 2 failed, 0 skipped", last)
	require.Contains(t, all, "no good")
	require.Contains(t, all, "panic: out")
	require.False(t, passed)
}

func TestRun_FailsIfNoTestRan(t *testing.T) {
	last, _, passed := count(t, "")
	require.Equal(t, "0 passed, 0 failed, 0 skipped", last)
	require.False(t, passed)
}
