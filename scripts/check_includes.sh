#!/usr/bin/env bash
# Checks who may include whom: a backend is known to src/backends/registry.cc, to its own folder, and to tests and
# benchmarks, and to nobody else; the library reaches backends through dsv4/backend.h. Prints every include that breaks a
# rule and exits 1. An argument checks another tree.
set -euo pipefail
cd "${1:-$(dirname "$0")/..}"

bad=0
report() {
  printf 'check_includes: %s: %s (%s)\n' "$1" "$2" "$3" >&2
  bad=1
}

# "file:path" for every quoted include of a C++, CUDA or HIP source.
includes() {
  find "$@" -type f \( -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.hip' \) \
    -exec grep -HoE '^[[:space:]]*#[[:space:]]*include[[:space:]]*["<][^">]+[">]' {} + |
    sed -E 's/^([^:]+):[[:space:]]*#[[:space:]]*include[[:space:]]*["<]([^">]+)[">]$/\1:\2/' || true
}

folders=()
for folder in include src apps; do
  if [ -d "$folder" ]; then folders+=("$folder"); fi
done

while IFS=: read -r file path; do
  case "$path" in
    *backends/*) ;;
    ../*) report "$file" "$path" "paths start at include/ or src/"; continue ;;
    *) continue ;;
  esac
  case "$file" in
    src/backends/registry.cc) continue ;;
    src/backends/*/*)
      # Its own folder, or gpu/, which NVIDIA and AMD share.
      own="${file#src/backends/}"
      own="${own%%/*}"
      case "$path" in
        "backends/$own/"*) continue ;;
        backends/gpu/*) if [ "$own" != cpu ]; then continue; fi ;;
      esac
      report "$file" "$path" "a backend includes its own folder only" ;;
    src/backends/*)
      report "$file" "$path" "only src/backends/registry.cc includes a backend" ;;
    *)
      report "$file" "$path" "use dsv4/backend.h; only src/backends/registry.cc includes a backend" ;;
  esac
done < <(includes "${folders[@]}")

# Public headers stand alone: nothing from src/.
if [ -d include ]; then
  while IFS=: read -r file path; do
    if [ -e "src/$path" ]; then report "$file" "$path" "a public header includes public headers only"; fi
  done < <(includes include)
fi

exit "$bad"
