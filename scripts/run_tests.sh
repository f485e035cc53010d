#!/usr/bin/env bash
# Runs the tests: all that need nothing, as `make test` does, or with
# --integration those against OpenAI itself (docs/live-tests.md). What else is
# given goes to make, such as VAULT_VERSION=all.
#
# What must stay true: a key reaches a child's environment and nothing else, no
# argument and no output. Hence tracing goes off first, for children, too, which
# inherit it by SHELLOPTS.
set +xv
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --integration)
    [ $# = 1 ] || die "--integration takes nothing after it; VAULT_VERSION and VAULT_BIN are read from the environment" ;;
  -h | --help)
    say "usage: scripts/run_tests.sh [--integration | VARIABLE=value for make...]"
    exit 0 ;;
  *) exec make --no-print-directory test "$@" ;;
esac

for name in OPENAI_ADMIN_KEY OPENAI_TEST_PROJECT_ID; do
  [ -n "${!name:-}" ] || die "--integration needs $name in the environment (docs/live-tests.md)"
done
VAULT_BIN=$(scripts/vault.sh)
export VAULT_BIN

# A signal ends what runs, which cleans up first, and then all of it. It may have
# been sent to this script alone, and bash would wait with it for its child.
child='' ended=''
trap 'ended=1; [ -z "$child" ] || kill "$child" 2>/dev/null || :' INT TERM HUP
finish() { # pid
  local status
  child=$1
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # or else the signal has ended only the wait
  done
  child=''
  [ -z "$ended" ] || exit 130
  return "$status"
}

say "== What the engine assumes of OpenAI"
# The binary is run and not go test, so that a signal reaches what cleans up.
mkdir -p bin dist
go test -c -buildvcs=false -tags live -o bin/live.test ./test/live
failed=0
LIVE_REPORT=$PWD/dist/live-report.md bin/live.test -test.run '^TestLive$' &
finish $! || failed=1
say "The report is in dist/live-report.md."

say "== The life of a key, on a real Vault"
OPENAI_PROJECT_ID=$OPENAI_TEST_PROJECT_ID make --no-print-directory demo || failed=1
[ -z "$ended" ] || exit 130
exit "$failed"
