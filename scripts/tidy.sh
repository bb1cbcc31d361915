#!/usr/bin/env bash
# Checks names with clang-tidy (.clang-tidy) over the library's and the programs' sources.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --ci
[ -f build/asan/build.ninja ] || cmake --preset asan >/dev/null
# Per-ISA kernel files are left out: the intrinsics headers alone cost minutes, and their names follow the same headers.
# So are files that this build does not compile (GPU backends).
mapfile -t files < <(git ls-files 'src/*.cc' 'apps/*.cc' | grep -vE '_(avx2|avx512|avx512bf16)\.cc$' |
  while read -r file; do if grep -qF "/$file\"" build/asan/compile_commands.json; then echo "$file"; fi; done)
printf '%s\n' "${files[@]}" |
  xargs -P "$(nproc)" -n 4 clang-tidy -p build/asan --quiet --warnings-as-errors='*' 2>/dev/null
