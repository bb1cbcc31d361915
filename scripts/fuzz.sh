#!/usr/bin/env bash
# fuzz.sh [SECONDS]: builds the fuzz targets and runs each for SECONDS (default 60) from its corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
mapfile -t targets < <(basename -s .cc tests/fuzz/*_fuzz.cc)
scripts/build.sh asan "${targets[@]}"
for target in "${targets[@]}"; do
  name=${target%_fuzz}
  target=build/asan/tests/fuzz/$target
  corpus=$(mktemp -d)
  echo "fuzz: $name, $seconds s"
  "$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -max_len=65536 -print_final_stats=0 -verbosity=0 \
    -artifact_prefix=build/asan/ "$corpus" "tests/fuzz/corpus/$name"
  rm -rf "$corpus"
done
