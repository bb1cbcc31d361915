#!/usr/bin/env bash
# Builds the Python wheel for the CPU, installs it into a fresh virtual environment, and runs its tests there with numpy
# (torch's tests are skipped where there is no torch). Links the library of build/release, so that only the module is compiled;
# the wheel holds all of it. PYTHON=... takes another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

scripts/build.sh release dsv4
"${PYTHON:-python3}" -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip wheel -q . --no-deps -w "$work/wheels" --config-settings=cmake.define.DSV4_ENABLE_CUDA=OFF \
  --config-settings=cmake.define.DSV4_PYTHON_LIBRARY="$tree/build/release/src/libdsv4.a" --config-settings=build-dir="$work/build"
"$python" -m pip install -q "$work"/wheels/dsv4-*.whl numpy pytest

cd "$work" # not the tree: what was installed is tested
module=$("$python" -c 'import dsv4._dsv4; print(dsv4._dsv4.__file__)')
if ldd "$module" | grep -E 'dsv4|pcre|not found' | grep -v "$work/venv"; then
  echo "check_python: the wheel needs a library that it does not hold" >&2
  exit 1
fi
"$python" -m pytest -q -p no:cacheprovider "$tree/python/tests"
echo "python: ok"
