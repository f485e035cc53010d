#!/usr/bin/env bash
# Builds the plugin and its image, starts a Vault server in dev mode and registers both,
# as the user of the rootless Docker engine. It is idempotent, but restarts the server,
# which loses its data in dev mode.
#
# It also works outside of a virtual machine. Apart from Docker's own settings, it
# writes only to the checkout and to one folder.
#
# usage: vagrant_provision_as_user.sh [--no-container]
# STATE is that folder (default ~/vault-openai), LISTEN the server's address (default
# 127.0.0.1:8200), VERSION the plugin's version.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

STATE=${STATE:-$HOME/vault-openai}
LISTEN=${LISTEN:-127.0.0.1:8200}
VERSION=${VERSION:-v0.1.0-dev}
NAME="vault-plugin-secrets-openai"

# start_docker starts the user's engine, if rootless Docker is installed, and adds gVisor
# as a runtime, with the two arguments that plugins need: access to the host's sockets,
# and no control groups, which the user may not create.
start_docker() {
  [ "$(id -u)" != 0 ] && command -v dockerd-rootless-setuptool.sh >/dev/null || return 0
  XDG_RUNTIME_DIR=/run/user/$(id -u)
  export XDG_RUNTIME_DIR
  export DOCKER_HOST=unix://$XDG_RUNTIME_DIR/docker.sock
  local settings=$HOME/.config/docker/daemon.json runsc
  if runsc=$(command -v runsc) && [ ! -e "$settings" ]; then
    mkdir -p "${settings%/*}"
    jq -n --arg path "$runsc" \
      '{runtimes: {runsc: {path: $path, runtimeArgs: ["--host-uds=create", "--ignore-cgroups"]}}}' >"$settings"
  fi
  dockerd-rootless-setuptool.sh install >&2
  systemctl --user restart docker
}

# stop_vault stops the server of an earlier run. After a reboot another process may have
# its ID, so the command is checked.
stop_vault() {
  local pid
  pid=$(cat "$STATE/vault.pid" 2>/dev/null) || return 0
  if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "-config=$STATE/vault.hcl"; then
    kill "$pid"
    while [ -e "/proc/$pid" ]; do sleep 0.1; done
  fi
  rm -f "$STATE/vault.pid"
}

start_vault() { # server
  mkdir -p "$STATE/bin" "$STATE/plugins"
  ln -sf "$1" "$STATE/bin/vault"
  printf 'plugin_directory = "%s"\n' "$STATE/plugins" >"$STATE/vault.hcl"
  cat >"$STATE/env" <<EOF
export VAULT_ADDR=http://$LISTEN VAULT_TOKEN=root PATH=$STATE/bin:\$PATH ${DOCKER_HOST:+DOCKER_HOST=$DOCKER_HOST}
EOF
  # shellcheck source=/dev/null
  . "$STATE/env"
  setsid vault server -dev -dev-no-store-token -dev-root-token-id=root -dev-listen-address="$LISTEN" \
    -config="$STATE/vault.hcl" >"$STATE/vault.log" 2>&1 </dev/null &
  printf '%s\n' $! >"$STATE/vault.pid"
  local problem="did not answer within 100 attempts"
  for _ in {1..100}; do
    if vault status >/dev/null 2>&1; then return; fi
    if ! kill -0 $! 2>/dev/null; then problem="ended before it answered"; break; fi
    sleep 0.2
  done
  cat "$STATE/vault.log" >&2
  die "Vault $problem; see its log above"
}

register_process() {
  cp "bin/$NAME" "$STATE/plugins/"
  vault plugin register -version="$VERSION" -sha256="$(sha256sum "bin/$NAME" | cut -d' ' -f1)" secret "$NAME" >&2
  vault secrets enable -path=openai "$NAME" >&2
}

# register_container prefers gVisor. Under runc, a rootless engine maps only the
# container's root to the user: a container with another user could not create the
# socket, so the image runs as root.
register_container() {
  local image=$NAME:${VERSION#v} oci=runc rootless=false
  docker info --format '{{json .Runtimes}}' | grep -q '"runsc"' && oci=runsc
  docker info --format '{{json .SecurityOptions}}' | grep -q 'name=rootless' && rootless=true
  if [ "$oci/$rootless" = runc/true ]; then
    printf 'FROM %s\nUSER 0:0\n' "$image" | docker build -q -t "$image" - >&2
  fi
  say "The container runs under $oci, rootless: $rootless"
  vault plugin runtime register -type=container -oci_runtime="$oci" -rootless="$rootless" openai >&2
  vault plugin register -version="$VERSION" -oci_image="$NAME" -runtime=openai \
    -sha256="$(docker image inspect --format '{{.Id}}' "$image" | cut -d: -f2)" secret "$NAME-container" >&2
  vault secrets enable -path=openai-container "$NAME-container" >&2
}

main() {
  case ${1:-} in
    '' | --no-container) ;;
    *) die "usage: vagrant_provision_as_user.sh [--no-container]" ;;
  esac
  local vault
  vault=$(scripts/vault.sh)
  make --no-print-directory build VERSION="$VERSION" >&2
  stop_vault
  if [ "${1:-}" != --no-container ]; then
    start_docker
    make --no-print-directory image VERSION="$VERSION" >&2
  fi
  start_vault "$vault"
  register_process
  if [ "${1:-}" != --no-container ]; then register_container; fi
  say "Vault listens on $LISTEN with the engine at openai/. In a shell: . $STATE/env"
  say "Then: vault write openai/config admin_api_key=@admin-key.txt"
}

main "$@"
