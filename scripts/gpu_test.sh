#!/usr/bin/env bash
# gpu_test.sh [--sanitize] [--bench DIR] [--preset NAME]: what needs a GPU, in one command: builds, runs every test that has a
# GPU case, then with --sanitize a selection under compute-sanitizer, and with --bench the benchmarks, their output in DIR.
# Preset `cuda` (all architectures) unless another is named: `cuda-sm90` builds fastest for Hopper.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=cuda sanitize= bench=
while [ $# -gt 0 ]; do
  case "$1" in
    --sanitize) sanitize=1 ;;
    --bench) bench=$2; shift ;;
    --preset) preset=$2; shift ;;
    *) echo "gpu_test: unknown option $1 (--sanitize, --bench DIR, --preset NAME)" >&2; exit 2 ;;
  esac
  shift
done
tests=(dsv4_ops_test dsv4_attention_test dsv4_devices_test dsv4_invariance_test)
benches=(cuda_attend_bench cuda_linear_bench cuda_index_bench cuda_rowwise_bench cuda_layer_bench)
scripts/build.sh "$preset" dsv4_cli "${tests[@]}" ${bench:+"${benches[@]}"}
build=build/$preset
"$build/dsv4" backends
if ! "$build/dsv4" backends | grep -A1 '_DSV4 .*usable' | grep -v CPU_DSV4 | grep -q cuda:; then
  echo "gpu_test: no usable CUDA device here" >&2
  exit 1
fi

"$build/tests/dsv4_ops_test" --gtest_filter='*cuda*' --gtest_brief=1
"$build/tests/dsv4_attention_test" --gtest_filter='*Flash*:Heads*' --gtest_brief=1
"$build/tests/dsv4_invariance_test" --gtest_filter='*Flash*' --gtest_brief=1
"$build/tests/dsv4_devices_test" --gtest_filter='*Flash*'

if [ -n "$sanitize" ]; then
  few='*RowwiseBits*cuda*:*OracleCompress*cuda*:*OracleTopK.Orders*cuda*:*OracleIndexLogits*cuda*:*OracleModelOps*cuda*'
  few+=':*OracleMoe*cuda_sm*:*AgreesWithTheOracle/cuda_sm80_csa_4heads*:*AgreesWithTheOracle/cuda_sm80_hca_chains*'
  few+=':*AgreesWithTheOracle/cuda_sm90_csa_4heads*:*LinearInvariance.ColumnsOfOneMatrix/cuda_sm*'
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 3 "$build/tests/dsv4_ops_test" --gtest_filter="$few" --gtest_brief=1
  done
fi

if [ -n "$bench" ]; then
  mkdir -p "$bench"
  for program in "${benches[@]}"; do
    "$build/bench/$program" | tee "$bench/$program.txt"
  done
fi
