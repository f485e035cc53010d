# Shared functions of the scripts. When sourced, it changes into the checkout and has
# no other effect; its messages go to stderr, so that stdout is free for results.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

# version_of prints the version of a Vault server, or fails if it is not one. It clears
# the environment because the CLI reads VAULT_* settings.
version_of() {
  env -i PATH="$PATH" HOME="${HOME:-/}" "$1" version 2>/dev/null |
    sed -n 's/^Vault v\([0-9][0-9A-Za-z.+-]*\).*/\1/p' | grep .
}

# server_of prints the product and version of a server, Vault's or OpenBao's, or fails if
# it is neither.
server_of() {
  env -i PATH="$PATH" HOME="${HOME:-/}" "$1" version 2>/dev/null |
    sed -nE 's/^(Vault|OpenBao) v([0-9][0-9A-Za-z.+-]*).*/\1 \2/p' | grep .
}

# pinned_go prints the Go release that go.mod names.
pinned_go() {
  local release
  release=$(sed -n 's/^toolchain go//p' go.mod)
  printf '%s\n' "${release:-$(sed -n 's/^go //p' go.mod)}"
}
