#!/usr/bin/env bash
# Finds the Vault server for the tests, the demo and the development environment, or
# builds it. It prints only the path on stdout, for VAULT=$(scripts/vault.sh); messages
# go to stderr.
#
# In this order: VAULT_BIN, which may be OpenBao; the vault on PATH; bin/vault-<version> from an earlier
# build; a build from tools/vault, which pins the newest supported version and gets its
# sources from the Go module proxy, or from the subfolder of another version. The
# version of a server is always checked, since `vault` on PATH may be another program,
# such as OpenBao.
#
# VAULT_VERSION selects a version, and skips a vault on PATH of any other. It may also be
# oldest or newest, of the versions that can be built here, or all: then each is found or
# built, and printed on its own line, oldest first.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# progress counts the lines with a prefix against a total: on a terminal in one line,
# elsewhere with a line for every 200.
progress() { # label total prefix
  local count=0 began=$SECONDS line
  while IFS= read -r line; do
    case $line in "$3"*) count=$((count + 1)) ;; *) continue ;; esac
    if [ -t 2 ]; then
      printf '\r  %s: %d of about %d, %d s ' "$1" "$count" "$2" $((SECONDS - began)) >&2
    elif [ $((count % 200)) -eq 0 ]; then
      say "  $1: $count of about $2, $((SECONDS - began)) s"
    fi
  done
  if [ -t 2 ] && [ "$count" -gt 0 ]; then printf '\n' >&2; fi
}

# pin prints the version that a recipe builds.
pin() {
  sed -n 's|^[[:space:]]*github.com/hashicorp/vault v\([0-9.]*\).*|\1|p' "$1/go.mod" | grep . ||
    die "$1/go.mod does not pin github.com/hashicorp/vault"
}

if [ -n "${VAULT_BIN:-}" ]; then
  [ -x "$VAULT_BIN" ] || die "VAULT_BIN=$VAULT_BIN is not an executable file"
  server=$(server_of "$VAULT_BIN") || die "VAULT_BIN=$VAULT_BIN does not answer as a Vault or OpenBao server"
  say "$server from VAULT_BIN ($VAULT_BIN)"
  printf '%s\n' "$VAULT_BIN"
  exit 0
fi

recipe=tools/vault
newest=$(pin "$recipe")
supported=$({ printf '%s\n' "$newest"; for mod in "$recipe"/*/go.mod; do pin "${mod%/go.mod}"; done; } | sort -V)

case ${VAULT_VERSION:-} in
  all)
    for VAULT_VERSION in $supported; do VAULT_VERSION=$VAULT_VERSION scripts/vault.sh || exit 1; done
    exit 0 ;;
  oldest) VAULT_VERSION=${supported%%$'\n'*} ;;
  newest) VAULT_VERSION=$newest ;;
esac

if on_path=$(command -v vault); then
  version=$(version_of "$on_path") || version=""
  if [ -z "$version" ]; then
    say "passing over $on_path: it does not answer as a Vault server"
  elif [ -n "${VAULT_VERSION:-}" ] && [ "$version" != "$VAULT_VERSION" ]; then
    say "passing over $on_path: it is $version, and VAULT_VERSION asks for $VAULT_VERSION"
  else
    say "Vault $version from PATH ($on_path)"
    printf '%s\n' "$on_path"
    exit 0
  fi
fi

want=${VAULT_VERSION:-$newest}
if [ "$want" != "$newest" ]; then
  recipe=$recipe/$want
  [ -f "$recipe/go.mod" ] ||
    die "no way to build Vault $want, only ${supported//$'\n'/ }: set VAULT_BIN to a server instead"
fi

cached=$PWD/bin/vault-$want
if [ -x "$cached" ] && [ "$(version_of "$cached" || true)" = "$want" ]; then
  say "Vault $want from an earlier build (bin/vault-$want)"
  printf '%s\n' "$cached"
  exit 0
fi

command -v go >/dev/null || die "no Vault server found, and no go on PATH to build one"
say "No Vault server found (VAULT_BIN is empty, none on PATH): building Vault $want"
say "from $recipe into bin/. That takes about 4 minutes on two cores and happens once."
began=$SECONDS
mkdir -p bin
work=$(mktemp -d bin/.vault-build.XXXXXX)
trap 'rm -rf "$work"' EXIT
work=$PWD/$work

# The build does not depend on the caller's environment: CGO is off, so that the result
# is the same with and without a C compiler, and the version-control stamp is off, since
# the sources are not ours.
export CGO_ENABLED=0
package=github.com/hashicorp/vault
cd "$recipe"

# The list comes first: it downloads missing modules, with a line for each, and it is the
# total for the build's progress.
modules=$(grep -c '^[[:space:]]*[a-z].* v[0-9]' go.mod)
go list -deps -tags minimal "$package" 2>&1 >"$work/deps" |
  tee "$work/log" | progress "modules fetched" "$modules" "go: downloading" ||
  { cat "$work/log" >&2; die "could not list the packages of Vault $want"; }
total=$(($(wc -l <"$work/deps")))

go build -v -trimpath -buildvcs=false -tags minimal -ldflags '-s -w' -o "$work/vault" "$package" 2>&1 |
  tee "$work/log" | progress "packages built" "$total" "" ||
  { { grep -E '^#|:[0-9]+:|^go: ' "$work/log" || cat "$work/log"; } | tail -n 40 >&2
    die "the build of Vault $want failed, what it said is above"; }

built=$(version_of "$work/vault") || die "what was built does not answer as a Vault server"
[ "$built" = "$want" ] || die "what was built says that it is $built, not $want"
mv "$work/vault" "$cached"
say "Built Vault $want in $((SECONDS - began)) s (bin/vault-$want)"
printf '%s\n' "$cached"
