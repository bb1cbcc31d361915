#!/usr/bin/env bash
# Sets everything up (Debian 12 or later, root or sudo), builds, and lets the small model write.
#   scripts/demo.sh [PROMPT] [more options of dsv4 generate]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
[ -x build/release/dsv4 ] || echo "demo: building (a few minutes, once)" >&2
scripts/build.sh release dsv4_cli
prompt=${1:-$'MENENIUS:\n'}
[ $# -gt 0 ] && shift
printf '%s' "$prompt"
exec build/release/dsv4 generate -m models/tiny-shakespeare -p "$prompt" -n 100 --stats "$@"
