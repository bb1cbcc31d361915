#!/usr/bin/env bash
# amd_test.sh [--bench DIR]: everything that wants an AMD GPU, in one command: says what this machine lacks, builds with
# preset `hip`, runs every test that has a GPU case, and with --bench the benchmarks, their output in DIR.
# Nobody has run it on such a machine yet: the first who does should send DIR and the output (docs/kernels/ says what was
# expected).
set -euo pipefail
cd "$(dirname "$0")/.."
bench=
while [ $# -gt 0 ]; do
  case "$1" in
    --bench) bench=${2:?amd_test: --bench needs a folder}; shift ;;
    *) echo "amd_test: unknown option $1 (--bench DIR)" >&2; exit 2 ;;
  esac
  shift
done

# ---- what is here, what is missing
missing=
say() { printf 'amd_test: %-34s %s\n' "$1" "$2" >&2; }
need() {  # need WHAT FOUND HINT
  if [ -n "$2" ]; then say "$1" "$2"; else say "$1" "MISSING: $3"; missing=1; fi
}
first() {
  local path
  for path in "$@"; do
    if command -v "$path" >/dev/null 2>&1; then command -v "$path"; return; fi
  done
}
need "compiler" "$(first clang++-22 /usr/lib/llvm-22/bin/clang++ amdclang++ /opt/rocm/bin/amdclang++)" \
  "clang-22 and lld-22 (Debian, apt.llvm.org), or ROCm's amdclang++"
need "GPU driver" "$([ -e /dev/kfd ] && echo /dev/kfd)" "/dev/kfd: the amdgpu kernel driver is not loaded, or not passed in"
need "access to it" "$([ -r /dev/kfd ] && [ -w /dev/kfd ] && echo yes)" "groups render and video"
runtime() {
  local folder file
  for folder in ${LD_LIBRARY_PATH//:/ } $(ldconfig -p 2>/dev/null | sed -n 's/.*=> \(.*\)\/libamdhip64\.so\.[567]$/\1/p'); do
    for file in "$folder"/libamdhip64.so.[567]; do
      if [ -e "$file" ]; then echo "$file"; return; fi
    done
  done
}
need "HIP runtime" "$(LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-} runtime)" \
  "libamdhip64.so.7, .6 or .5 (ROCm); where one is in /opt/rocm/lib only, set LD_LIBRARY_PATH=/opt/rocm/lib"
say "interpreter of code objects" "$(first llvm-objdump-22 /usr/lib/llvm-22/bin/llvm-objdump || true)"
if [ -n "$missing" ]; then
  echo "amd_test: nothing was built or run; what is missing is named above" >&2
  exit 1
fi

tests=(dsv4_ops_test dsv4_attention_test dsv4_devices_test)
scripts/build.sh hip dsv4_cli "${tests[@]}"
build=build/hip
"$build/dsv4" backends --attention-backend ROCM_FLASHMLA_SPARSE_DSV4
if ! "$build/dsv4" backends --attention-backend ROCM_FLASHMLA_SPARSE_DSV4 --json |
  grep -q '"id": *"rocm:[0-9]'; then
  echo "amd_test: no ROCm device that this build has kernels for; the reasons are above" >&2
  exit 1
fi

# ---- tests: operations against the oracle, the layer, the model, a long soak
"$build/tests/dsv4_ops_test" --gtest_filter='*rocm_gpu*' --gtest_brief=1
"$build/tests/dsv4_attention_test" --gtest_filter='*RocmAiter*-*Emulated*' --gtest_brief=1
"$build/tests/dsv4_devices_test" --gtest_filter='*RocmAiter*'

# ---- benchmarks: whole layers of V4-Flash, decode and prefill; the small model from end to end
if [ -n "$bench" ]; then
  mkdir -p "$bench"
  "$build/dsv4" bench attention --device rocm:0 --batches 1 16 64 --json | tee "$bench/attention.json"
  "$build/dsv4" generate -m models/tiny-shakespeare --device rocm:0 -p "To be, or not to be" -n 256 --json |
    tee "$bench/generate.json"
fi
