// linear_fp8_prepare: rows of x as E4M3 codes and scales, for the FP8 tensor cores.
//
// Problem   per row and 128 columns: scale 2^ceil(log2(max(amax, floor) / 448)), codes x / scale
// Tiling    a warp per 128 columns of a row, 4 columns a lane
// Budget    3 B a column at the bandwidth of L2: x was just written
// Launch    grid rows * groups / 8, 256 threads; lets the product start at once
// Contract  any alignment of x; codes up to a multiple of 128 columns are written, 4-byte aligned
// Numerics  numerics.md 2-4; a group with an infinity or NaN gets code NaN
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_quantise-inl.h"
#include "backends/nvidia/ops/linear_sm90.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kWarps = 8;

__global__ void __launch_bounds__(kWarps * 32) linear_fp8_prepare(const Fp8PrepareParams params) {
  sm90::start_next_kernel();  // it reads W meanwhile
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int groups = (params.cols + kQuantiseGroup - 1) / kQuantiseGroup;
  const int64_t idx = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t row = idx / groups;
  if (row >= params.rows) return;
  const int group = static_cast<int>(idx % groups);
  const int col = group * kQuantiseGroup + lane * kQuantiseCols;
  const uint16_t* x = params.x + row * params.x_stride + col;
  float values[kQuantiseCols];
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i)
    values[i] = col + i < params.cols ? bf16_to_float(x[i]) : 0.0f;
  const float scale = quantise_group_codes(values, params.floor);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i) codes |= e4m3_code(values[i]) << (8 * i);
  *reinterpret_cast<uint32_t*>(params.codes + row * params.codes_stride + col) = codes;
  if (lane == 0) params.scales[group * params.scale_stride + row] = scale;
}

}  // namespace

void launch_linear_fp8_prepare(const Fp8PrepareParams& params, cudaStream_t stream) {
  const int64_t groups = ceil_div(params.cols, kQuantiseGroup) * params.rows;
  linear_fp8_prepare<<<static_cast<unsigned>(ceil_div(groups, kWarps)), kWarps * 32, 0, stream>>>(
      params);
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace dsv4::nvidia
