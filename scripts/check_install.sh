#!/usr/bin/env bash
# Installs the release build into a temporary tree and uses it from outside: CMake package and pkg-config, C++ and C.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/build.sh release
prefix=$(mktemp -d)
trap 'rm -rf "$prefix"' EXIT
cmake --install build/release --prefix "$prefix/tree" >/dev/null
sed -i "s|^prefix=.*|prefix=$prefix/tree|" "$prefix"/tree/lib*/pkgconfig/dsv4.pc "$prefix"/tree/lib/*/pkgconfig/dsv4.pc 2>/dev/null || true

cmake -S tests/consumer -B "$prefix/consumer" -DCMAKE_PREFIX_PATH="$prefix/tree" -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$prefix/consumer" >/dev/null
"$prefix/consumer/consumer" models/tiny-shakespeare

pc=$(dirname "$(find "$prefix/tree" -name dsv4.pc | head -n 1)")
flags=$(PKG_CONFIG_PATH=$pc pkg-config --static --cflags --libs dsv4)
# shellcheck disable=SC2086
cc tests/consumer/consumer.c -o "$prefix/consumer_c" $flags
"$prefix/consumer_c"
# shellcheck disable=SC2086
c++ -std=c++20 tests/consumer/consumer.cc -o "$prefix/consumer_pc" $flags
"$prefix/consumer_pc" models/tiny-shakespeare
echo "install tree: ok"
