#!/usr/bin/env bash
# Finds a Prometheus server and its promtool for the tests, or downloads them. It prints
# only the folder of both on stdout; messages go to stderr.
#
# In this order: both on PATH; bin/prometheus from an earlier run; Debian's package,
# which is unpacked into bin/ instead of installed. Exit status 3 means that none is
# available.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }

# usable prints the version, if a folder has both programs.
usable() {
  [ -x "$1/prometheus" ] && [ -x "$1/promtool" ] &&
    "$1/prometheus" --version 2>&1 | sed -n 's/^prometheus, version \([^ ]*\).*/\1/p' | grep .
}

if server=$(command -v prometheus) && version=$(usable "$(dirname "$server")"); then
  say "Prometheus $version from PATH ($server)"
  dirname "$server"
  exit 0
fi

unpacked=$PWD/bin/prometheus/usr/bin
if version=$(usable "$unpacked"); then
  say "Prometheus $version from an earlier run (bin/prometheus)"
  printf '%s\n' "$unpacked"
  exit 0
fi

for tool in apt-get dpkg; do
  command -v "$tool" >/dev/null || { say "no Prometheus on PATH, and no $tool to download it"; exit 3; }
done
say "No Prometheus on PATH: downloading Debian's package into bin/ (20 MB, once)"
mkdir -p bin
work=$(mktemp -d "$PWD/bin/.prometheus.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
fetch() { (cd "$work" && apt-get -qq "$@" download prometheus) >&2; }
# On a machine without package lists, use temporary ones.
own=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o "APT::Sandbox::User=")
if ! fetch -o "APT::Sandbox::User="; then
  { apt-get -qq "${own[@]}" update >&2 && fetch "${own[@]}"; } || { say "Debian's package could not be downloaded"; exit 3; }
fi
dpkg -x "$work"/prometheus_*.deb "$work/root"
version=$(usable "$work/root/usr/bin") || { say "the downloaded program is not a Prometheus server"; exit 3; }
rm -rf bin/prometheus
mv "$work/root" bin/prometheus
say "Prometheus $version (bin/prometheus)"
printf '%s\n' "$unpacked"
