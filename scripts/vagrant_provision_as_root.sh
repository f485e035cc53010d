#!/usr/bin/env bash
# Installs the dependencies of the container plugin, as root: Go, rootless Docker for
# one user, and gVisor. It is idempotent. Each download comes from its vendor and is
# checked by signature or checksum.
#
# usage: vagrant_provision_as_root.sh USER
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# go_archive prints the name of the Go release for a machine, as uname calls it.
go_archive() { # machine
  case $1 in
    x86_64) printf 'go%s.linux-amd64.tar.gz\n' "$(pinned_go)" ;;
    aarch64) printf 'go%s.linux-arm64.tar.gz\n' "$(pinned_go)" ;;
    *) die "unsupported machine $1 for Go" ;;
  esac
}

# repository adds a package source with the key that signs it.
repository() { # name key-url line
  install -m 0755 -d /etc/apt/keyrings
  curl -fsSL "$2" | gpg --dearmor --yes -o "/etc/apt/keyrings/$1.gpg"
  printf 'deb [arch=%s signed-by=/etc/apt/keyrings/%s.gpg] %s\n' "$(dpkg --print-architecture)" "$1" "$3" \
    >"/etc/apt/sources.list.d/$1.list"
}

install_go() {
  local archive folder
  archive=$(go_archive "$(uname -m)")
  if [ "$(/usr/local/go/bin/go env GOVERSION 2>/dev/null)" = "go$(pinned_go)" ]; then return; fi
  say "Installing $archive"
  folder=$(mktemp -d)
  curl -fsSL "https://dl.google.com/go/$archive" -o "$folder/$archive"
  printf '%s  %s\n' "$(curl -fsSL "https://dl.google.com/go/$archive.sha256")" "$folder/$archive" | sha256sum --check --quiet
  rm -rf /usr/local/go
  tar -C /usr/local -xzf "$folder/$archive"
  rm -rf "$folder"
  # shellcheck disable=SC2016 # expanded by the shells that read the file
  printf 'export PATH=$PATH:/usr/local/go/bin\n' >/etc/profile.d/go.sh
}

install_docker() { # user
  local distribution codename
  # shellcheck source=/dev/null
  distribution=$(. /etc/os-release && printf %s "$ID") codename=$(. /etc/os-release && printf %s "$VERSION_CODENAME")
  say "Installing rootless Docker for $1"
  repository docker "https://download.docker.com/linux/$distribution/gpg" \
    "https://download.docker.com/linux/$distribution $codename stable"
  apt-get update -q
  apt-get install -qy docker-ce docker-ce-cli containerd.io docker-ce-rootless-extras uidmap dbus-user-session slirp4netns acl
  systemctl disable --now docker.service docker.socket # only the user's daemon runs
  loginctl enable-linger "$1"                          # so that it runs without a session
}

# install_gvisor may fail, if the packages are unavailable or the kernel is too old: the
# plugin then runs under runc, which is part of Docker.
install_gvisor() {
  repository gvisor https://gvisor.dev/archive.key "https://storage.googleapis.com/gvisor/releases release main" &&
    apt-get update -q && apt-get install -qy runsc && runsc --version >/dev/null
}

main() { # user
  [ $# = 1 ] || die "usage: vagrant_provision_as_root.sh USER"
  [ "$(id -u)" = 0 ] || die "this script installs packages and must run as root"
  id "$1" >/dev/null
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q
  apt-get install -qy ca-certificates curl gcc git gnupg jq libc6-dev make
  install_go
  install_docker "$1"
  # An unavailable source would fail each update, and with it the next run.
  install_gvisor || { rm -f /etc/apt/sources.list.d/gvisor.list; say "gVisor could not be installed; the plugin will run under runc"; }
}

# When sourced, it only defines functions, so that tests can call them.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
