#!/usr/bin/env bash
# Runs the tests: `make test`, or with --integration the tests against OpenAI
# (docs/live-tests.md). Other arguments are passed to make, such as VAULT_VERSION=all.
#
# What must stay true: keys are only in the environment of children, never in arguments
# or output. Therefore tracing is disabled first, also for children, which inherit it
# through SHELLOPTS.
set +xv
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --integration)
    [ $# = 1 ] || die "--integration takes no further arguments; set VAULT_VERSION and VAULT_BIN in the environment" ;;
  -h | --help)
    say "usage: scripts/run_tests.sh [--integration | VARIABLE=value for make...]"
    exit 0 ;;
  *) exec make --no-print-directory test "$@" ;;
esac

for name in OPENAI_ADMIN_KEY OPENAI_TEST_PROJECT_ID; do
  [ -n "${!name:-}" ] || die "--integration requires $name in the environment (docs/live-tests.md)"
done
VAULT_BIN=$(scripts/vault.sh)
export VAULT_BIN

# On a signal, stop the child, which cleans up first, and then this script. The signal
# may go to this script alone, and bash would otherwise wait for the child.
child='' ended=''
trap 'ended=1; [ -z "$child" ] || kill "$child" 2>/dev/null || :' INT TERM HUP
finish() { # pid
  local status
  child=$1
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # otherwise the signal interrupted only the wait
  done
  child=''
  [ -z "$ended" ] || exit 130
  return "$status"
}

say "== The engine's assumptions about OpenAI"
# Run the binary instead of go test, so that signals reach it for its cleanup.
mkdir -p bin dist
go test -c -buildvcs=false -tags live -o bin/live.test ./test/live
failed=0
LIVE_REPORT=$PWD/dist/live-report.md bin/live.test -test.run '^TestLive$' &
finish $! || failed=1
say "The report is in dist/live-report.md."

say "== The lifecycle of a key, on a real Vault"
OPENAI_PROJECT_ID=$OPENAI_TEST_PROJECT_ID make --no-print-directory demo || failed=1
[ -z "$ended" ] || exit 130
exit "$failed"
