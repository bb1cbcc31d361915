#!/usr/bin/env bash
# Sets everything up (Debian 12 or later, root or sudo), builds, and runs all tests that need no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
echo "test: building" >&2
scripts/build.sh release
ctest --test-dir build/release -j 2 --output-on-failure "$@"
