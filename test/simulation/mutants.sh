#!/usr/bin/env bash
# Shows that the simulated world finds mistakes: applies the patches of
# test/simulation/mutants one at a time to a copy of the working tree, lives there
# with fresh seeds until an invariant breaks or the time is over, and prints a
# table. Exit status 1 says that a mutant was not found or does not build.
#
# usage: test/simulation/mutants.sh [-m MINUTES] [PATCH...]
#   PATCH is the beginning of a patch's name, such as 07; default is all of them
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh" # which changes into scripts/..

minutes=10
while getopts m: option; do
  case $option in
    m) minutes=$OPTARG ;;
    *) die "usage: test/simulation/mutants.sh [-m MINUTES] [PATCH...]" ;;
  esac
done
shift $((OPTIND - 1))
mutants=$PWD/test/simulation/mutants patches=()
for wanted in "${@:-}"; do
  found=("$mutants/$wanted"*.patch)
  [ -e "${found[0]}" ] || die "there is no patch whose name begins with $wanted"
  patches+=("${found[@]}")
done

work=$(mktemp -d)
child=''
trap '[ -z "$child" ] || kill "$child" 2>/dev/null || :; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
mkdir "$work/tree"
git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' sh |
  tar --null -T - -cf - | tar -xf - -C "$work/tree"
cd "$work/tree"
# A repository of its own: of another one git apply would skip what lies outside.
git init -q .

# live runs the world in the copy, and sets row to the invariant that broke, and the
# lives and seconds that it took. Its status is 0 if none broke.
live() {
  local status=0 lives
  # The time-out ends a life that has begun.
  GOGC=${GOGC:-400} ./world.test -test.run '^TestWorld$' -test.timeout "$((minutes * 60 + 1))s" -for "${minutes}m" -first >"$work/out" 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=''
  lives=$(sed -n 's/^life \([0-9]*\):.*/\1/p' "$work/out" | tail -1)
  if [ $status = 0 ] || grep -q '^panic: test timed out' "$work/out"; then
    status=0
    row="**not found** | $lives | $((minutes * 60))"
  elif ! row=$(sed -n 's/^broken: \(.*\); lives \(.*\); seconds \(.*\)/\1 | \2 | \3/p' "$work/out" | grep -m1 .); then
    # before any invariant was asked
    row="$(grep -m1 -oE '^(panic|fatal error): .{0,60}' "$work/out" || echo "exit status $status") | $lives | $SECONDS"
  fi
  return $status
}

failed=0
printf '| Mutant | Invariant that broke | Lives | Seconds |\n|---|---|---|---|\n'
for patch in "${patches[@]}"; do
  name=$(basename "$patch" .patch)
  if ! git apply "$patch" 2>"$work/out"; then
    say "$name: $(head -1 "$work/out")"
    row='**does not apply** | |' failed=1
  elif ! go test -c -o world.test ./test/simulation 2>"$work/out"; then
    say "$name: $(sed -n 2p "$work/out")"
    row='**does not build** | |' failed=1
  else
    SECONDS=0
    if live; then failed=1; fi
    if [ -n "${MUTANTS_KEEP:-}" ]; then cp "$work/out" "$MUTANTS_KEEP/$name.txt"; fi
  fi
  printf '| %s | %s |\n' "$name" "$row"
  git apply -R "$patch" 2>/dev/null || :
done
exit $failed
