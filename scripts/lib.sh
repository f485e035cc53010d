# What the scripts share. It is sourced, changes into the checkout and has no
# other effect; all that it says goes to stderr, so that a caller can keep stdout
# for its answer.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

# version_of prints the version of a Vault server, or fails if it is not one.
# The environment is cut down because VAULT_* settings reach the CLI too.
version_of() {
  env -i PATH="$PATH" HOME="${HOME:-/}" "$1" version 2>/dev/null |
    sed -n 's/^Vault v\([0-9][0-9A-Za-z.+-]*\).*/\1/p' | grep .
}

# pinned_go prints the Go release that go.mod names.
pinned_go() {
  local release
  release=$(sed -n 's/^toolchain go//p' go.mod)
  printf '%s\n' "${release:-$(sed -n 's/^go //p' go.mod)}"
}
