#!/usr/bin/env bash
# build.sh PRESET [TARGET...]: configures once, builds what changed. Presets: CMakePresets.json. DSV4_WERROR=ON in
# the environment, when it configures, makes warnings errors.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if [ ! -f "build/$preset/build.ninja" ]; then
  cmake --preset "$preset" ${DSV4_WERROR:+-DDSV4_WERROR="$DSV4_WERROR"} >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
fi
if [ -t 2 ]; then
  cmake --build --preset "$preset" ${@:+--target "$@"} >&2
else
  cmake --build --preset "$preset" ${@:+--target "$@"} >"$log" 2>&1 || { tail -n 60 "$log" >&2; exit 1; }
fi
