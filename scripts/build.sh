#!/usr/bin/env bash
# build.sh PRESET [TARGET...]: configures once, builds what changed. Presets: CMakePresets.json. With DSV4_WARNINGS=fail in the
# environment a warning of a compiler is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if [ ! -f "build/$preset/build.ninja" ]; then
  cmake --preset "$preset" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
fi
if [ -t 2 ]; then
  cmake --build --preset "$preset" ${@:+--target "$@"} >&2
else
  cmake --build --preset "$preset" ${@:+--target "$@"} >"$log" 2>&1 || { tail -n 60 "$log" >&2; exit 1; }
  if grep -B 12 -A 4 'warning: ' "$log" >&2 && [ "${DSV4_WARNINGS:-}" = fail ]; then exit 1; fi
fi
