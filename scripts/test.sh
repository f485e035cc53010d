#!/usr/bin/env bash
# Runs `make test`: the linters, the unit tests and the integration tests. It prints one
# line for each package and the counts last (test/tally). All parts run even if one fails,
# so that one run shows all failures; the exit status covers all of them.
#
# SUITE is all, unit or integration, RUN a regexp that selects tests, and VAULT_VERSION as
# in scripts/vault.sh. With PKG, it only runs the tests of one package.
#
# The order keeps two processors busy. The linters take only the time that the tests
# leave. The integration tests that wait for minutes (TestLong_) begin with the unit tests,
# or come last without them.
# The others begin after these: all of them at once left Vault too little time.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

suite=${SUITE:-all} run=${RUN:-.}

# The tests that try every fault, every order or large numbers run without the race
# detector, which makes them five times as slow: other tests run the same code with it, and
# the nightly workflow runs all of them with it. The same holds for the simulated world,
# which runs more lives without it.
tables='_Faults|StorageFault|EveryFault|EverySequence|EveryField|EveryQueuedKey|AThousandDueRoles|RetriesBeforeTheKeyExpires|DeletesExactlyTheOrphans|ManyAccounts|OfManyRecords|AddsUpToTheDigit'

case $suite in all | unit | integration) ;; *) die "SUITE must be all, unit or integration" ;; esac
if [ -n "${PKG:-}" ]; then exec go test -run "$run" "$PKG"; fi

# The race detector requires cgo and therefore a C compiler.
race=-race cc=$(go env CC)
if ! command -v "${cc%% *}" >/dev/null; then
  race=
  say "no C compiler: the tests run without the race detector"
fi
vet=
if [ "$suite" = all ]; then vet=-vet=off; fi # lint includes vet

go build -buildvcs=false -o bin/tally ./test/tally
if [ "$suite" != unit ]; then servers=$(scripts/vault.sh); fi

# background starts a command in a process group of its own, since bash has background
# jobs of the script's group ignore Ctrl-C, and leaves its process ID in job.
background() { # output command [argument...]
  local output=$1
  shift
  set -m
  {
    trap 'exit 130' INT TERM
    "$@"
  } >"$output" &
  set +m
  job=$! groups="$groups$! "
}

# finish waits for a background job, and prints its output if that is in a file.
finish() { # job [output]
  if [ -z "$1" ]; then return; fi
  wait "$1" || rc=1
  groups=${groups/ $1 / }
  if [ $# = 2 ]; then cat "$2"; fi
}

lint() { nice -n 19 "${MAKE:-make}" --no-print-directory lint 2>&1; }

unit() { go test -json -timeout 20m ${vet:+"$vet"} "$@"; }

unit_tests() {
  local packages
  if [ "$run" = . ]; then
    packages=$(go list -e ./... | grep -v '/test/simulation$')
    # shellcheck disable=SC2086 # an import path contains no space
    unit ${race:+"$race"} -skip "$tables" $packages
  else
    unit ${race:+"$race"} -run "$run" ./...
  fi
}

# other_unit_tests says where the tables ran, since tally counts tests by package and name.
other_unit_tests() {
  local rc=0
  if [ "$run" = . ]; then
    unit -run "$tables" . | sed 's|"Package":"[^"]*|& (tables)|' || rc=1
    unit -count=1 ./test/simulation || rc=1 # its seeds are fresh
  fi
  (cd tools/release && unit -run "$run" ./...) || rc=1
  return $rc
}

# integration runs integration tests on each server. Only the plugin has the race detector.
integration() { # note [argument of go test...]
  local rc=0 note=$1
  shift
  while IFS= read -r VAULT_BIN; do
    export VAULT_BIN
    go test -json -vet=off -tags integration -count=1 -timeout 20m "$@" </dev/null |
      sed "s|\"Package\":\"[^\"]*|& (${note}on ${VAULT_BIN##*/})|" || rc=1
  done <<<"$servers"
  return $rc
}

long_tests() { integration 'long, ' -run '^TestLong_' ./test/integration; }

groups=' ' # not local: a trap on EXIT has no local variables
parts() {
  local rc=0 job lint='' units='' others='' long='' skip='^TestWorld|OnTheModel$'
  trap 'for group in $groups; do kill -INT -- "-$group" 2>/dev/null || :; done' EXIT
  trap 'exit 130' INT TERM
  if [ "$suite" = all ]; then background bin/lint.out lint; lint=$job; fi
  if [ "$suite" != unit ] && [ "$run" = . ]; then
    skip="$skip|^TestLong_"
    if [ "$suite" = all ]; then background bin/long.out long_tests; long=$job; fi
  fi
  if [ "$suite" != integration ]; then
    background bin/others.out other_unit_tests; others=$job
    background /dev/stdout unit_tests; units=$job
  fi
  finish "$units"
  if [ "$suite" != unit ]; then
    integration '' -run "$run" -skip "$skip" ./test/integration/... ./test/simulation || rc=1
    if [ "$suite$run" = integration. ]; then long_tests || rc=1; fi
  fi
  finish "$others" bin/others.out
  finish "$long" bin/long.out
  finish "$lint" bin/lint.out
  return $rc
}

parts | bin/tally
