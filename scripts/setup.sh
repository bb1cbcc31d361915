#!/usr/bin/env bash
# Installs what a CPU build needs on Debian 12 or later (root or sudo). Repeat runs only look.
# With --ci also what the sanitizer, fuzz and lint stages of .ci/run need; with --amd the compiler and disassembler for AMD
# GPUs (clang 22; no ROCm).
set -euo pipefail

packages=(g++ cmake ninja-build ccache pkg-config nlohmann-json3-dev libcli11-dev libpcre2-dev libgtest-dev libbenchmark-dev)
for option in "$@"; do
  case "$option" in
    --ci) packages+=(clang clang-tidy clang-format libclang-rt-14-dev python3-dev python3-venv) ;;
    --amd) packages+=(clang-22 lld-22 llvm-22) ;;
    *) echo "setup: unknown option $option (--ci, --amd)" >&2; exit 2 ;;
  esac
done

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [ "$status" = "install ok installed" ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "setup: needs root or sudo to install: ${missing[*]}" >&2; exit 1; }
  sudo=sudo
fi
command -v apt-get >/dev/null || {
  echo "setup: no apt-get here; install by hand: ${missing[*]}" >&2
  exit 1
}
echo "setup: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
