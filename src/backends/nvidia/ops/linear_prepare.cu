// linear_prepare: rows of x as the products read them.
//
// Problem   out[r, :] = x[r, :], through E4M3 and back per 128 columns where `quantise`
// Tiling    a warp per 128 columns of a row, 4 columns a lane
// Budget    4 B a column at the bandwidth of L2: x was just written
// Launch    grid rows * groups / 8, 256 threads; lets the product start at once: it reads W
// Contract  any alignment; columns beyond the end are neither read nor written
// Numerics  exact: code * scale is a bf16 number
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear.h"
#include "backends/nvidia/ops/linear_quantise-inl.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kWarps = 8;

__global__ void __launch_bounds__(kWarps * 32) linear_prepare(const PrepareParams params) {
  start_next_kernel();  // it asks for W meanwhile
  wait_for_kernels_before();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int groups = (params.cols + kQuantiseGroup - 1) / kQuantiseGroup;
  const int64_t idx = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t row = idx / groups;
  if (row >= params.rows) return;
  const int col = static_cast<int>(idx % groups) * kQuantiseGroup + lane * kQuantiseCols;
  const uint16_t* x = params.x + row * params.x_stride + col;
  uint16_t* out = params.out + row * params.out_stride + col;
  float values[kQuantiseCols];
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i)
    values[i] = col + i < params.cols ? bf16_to_float(x[i]) : 0.0f;
  if (params.quantise) quantise_group(values);
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i) {
    if (col + i < params.cols) out[i] = float_to_bf16(values[i]);
  }
}

// x as three bf16 numbers: each is what the ones before leave, rounded.
__global__ void __launch_bounds__(kWarps * 32) linear_split(const SplitParams params) {
  start_next_kernel();  // it asks for W meanwhile
  wait_for_kernels_before();
  const int64_t idx = int64_t{blockIdx.x} * (kWarps * 32) + threadIdx.x;
  const int64_t row = idx / params.cols;
  if (row >= params.rows) return;
  const auto col = static_cast<int>(idx % params.cols);
  float rest = params.x[row * params.x_stride + col];
  uint16_t* out = params.out + row * params.out_stride + col;
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    const uint16_t part = float_to_bf16(rest);
    out[plane * params.plane_stride] = part;
    rest = __fsub_rn(rest, bf16_to_float(part));
  }
}

}  // namespace

void launch_linear_split_prepare(const SplitParams& params, cudaStream_t stream) {
  const int64_t blocks = ceil_div(int64_t{params.rows} * params.cols, kWarps * 32);
  launch<linear_split>({dim3(static_cast<unsigned>(blocks)), kWarps * 32}, stream, params);
}

void launch_linear_prepare(const PrepareParams& params, cudaStream_t stream) {
  const int64_t groups = ceil_div(params.cols, kQuantiseGroup) * params.rows;
  launch<linear_prepare>({dim3(static_cast<unsigned>(ceil_div(groups, kWarps))), kWarps * 32},
                         stream, params);
}

}  // namespace dsv4::nvidia
