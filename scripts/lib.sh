# shellcheck shell=bash disable=SC2034  # what is set here is used by the scripts that source it
# What the scripts share. Sourced, never run: it sets up names and starts nothing.
#
# Where Debian's packages are to be had (Debian, Ubuntu), what is missing is installed; elsewhere it is named. Nothing
# that an installation brings along is left running: PostgreSQL's and etcd's packages would start servers of their own.

root_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
else bold='' dim='' red='' green='' yellow='' plain=''; fi

say() { printf '%s\n' "$*"; }
head_line() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
note() { printf '%s%s%s\n' "$dim" "$*" "$plain"; }
warn() { printf '%s%s%s\n' "$yellow" "$*" "$plain" >&2; }
die() { printf '%s%s%s\n' "$red" "$*" "$plain" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root: as we are, or by sudo without asking where nobody could answer.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif have sudo && [ -t 0 ]; then sudo "$@"
  elif have sudo; then sudo -n "$@"
  else return 126; fi
}

# Is one of these there? A name with a slash is a path (it may be a pattern), any other a command.
present() {
  local alternative
  for alternative in ${1//|/ }; do
    case $alternative in
      */*) compgen -G "$alternative" >/dev/null && return 0 ;;
      *) have "$alternative" && return 0 ;;
    esac
  done
  return 1
}

# need "<command or path>[|…]:<Debian package>" …
# Installs the packages of what is missing, or says what to install, and fails.
need() {
  local pair packages=()
  for pair in "$@"; do
    present "${pair%:*}" || packages+=("${pair##*:}")
  done
  [ ${#packages[@]} -eq 0 ] && return 0
  if ! have apt-get || ! have dpkg; then
    warn "missing on this machine, by the names of Debian's packages: ${packages[*]}"
    die "install what corresponds to them here (commands looked for: $*), then run this again"
  fi
  install_packages "${packages[@]}" || die "could not install ${packages[*]}: run 'apt-get install ${packages[*]}' as root, then this again"
}

install_packages() {
  note "installing: $*"
  local policy=/usr/sbin/policy-rc.d planted=no failed=0 had_etcd=no
  present etcd && had_etcd=yes
  # No server of a package starts: the tests bring up their own on free ports, and 2379 and 5432 stay as they were.
  if ! as_root test -e "$policy"; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null || return 1
    as_root chmod 755 "$policy"
    planted=yes
  fi
  if ! present '/usr/lib/postgresql/*/bin/postgres'; then
    as_root mkdir -p /etc/postgresql-common/createcluster.d
    echo 'create_main_cluster = false' | as_root tee /etc/postgresql-common/createcluster.d/pgvigil.conf >/dev/null
  fi
  as_root apt-get update -qq </dev/null || warn "apt-get update failed; going on with the lists that are here"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null || failed=1
  [ $planted = yes ] && as_root rm -f "$policy"
  if [ $had_etcd = no ] && [ -d /run/systemd/system ] && present etcd; then
    as_root systemctl disable etcd >/dev/null 2>&1 || true
  fi
  return $failed
}

# What a build needs. The Rust toolchain is the one thing that is never installed behind somebody's back.
need_build_tools() {
  have cargo || die "the Rust toolchain (1.88 or newer) is missing: install it from https://rustup.rs, then run this again"
  need cc:gcc '/usr/include/stdio.h|/usr/include/*/stdio.h:libc6-dev' protoc:protobuf-compiler \
    '/usr/include/google/protobuf/descriptor.proto|/usr/local/include/google/protobuf/descriptor.proto:libprotobuf-dev'
}

# What a cluster on this machine needs.
need_servers() {
  need 'postgres|/usr/lib/postgresql/*/bin/postgres:postgresql' 'psql:postgresql-client' 'etcd:etcd-server'
}

# A container engine that answers, and a compose tool for it. Sets `engine_missing` to the reason when there is none.
engine_missing=''
have_engine() {
  if ! have docker; then engine_missing="no docker command"
  elif ! timeout 20 docker info >/dev/null 2>&1; then engine_missing="no Docker engine answers"
  else return 0; fi
  return 1
}
need_compose() {
  if docker compose version >/dev/null 2>&1; then compose=(docker compose)
  else
    need docker-compose:docker-compose
    compose=(docker-compose)
  fi
}

# 75 → 1m 15s
took() {
  local seconds=$1
  if [ "$seconds" -ge 60 ]; then printf '%dm %02ds' $((seconds / 60)) $((seconds % 60)); else printf '%ds' "$seconds"; fi
}
