// linear_sm90_prepare: rows of x as the products of sm_90 read them.
//
// Problem   panels of 64 columns, rows of 128 bytes; through E4M3 and back where `quantise`
// Tiling    a warp per 128 columns of kRows rows, 4 columns a lane; several rows where x is only
//           rearranged, for the sake of loads under way
// Budget    4 B a column at the bandwidth of L2: x was just written. Short code: few tokens wait
//           for its instructions
// Launch    grid (out_rows / kRows, groups / 8), 256 threads; is started before the kernel before
//           has ended and lets the product start at once: it reads W
// Contract  any alignment of x; columns and rows beyond the end are not read and written as zero
// Numerics  exact: code * scale is a bf16 number
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90_x-inl.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kWarps = 8;

template <bool kFp8, bool kQuantise, int kRows>
__global__ void __launch_bounds__(kWarps * 32) linear_sm90_prepare(const Sm90PrepareParams params) {
  sm90::start_next_kernel();
  sm90::wait_for_kernels_before();
  const auto col = static_cast<int>(blockIdx.y * kWarps + threadIdx.x / 32) * kQuantiseGroup;
  const int row0 = static_cast<int>(blockIdx.x) * kRows;
  if (col >= params.cols) return;
  float values[kRows][kQuantiseCols];
  load_columns(params, row0, col, values);
  uint16_t* panels = params.out + int64_t{col} * params.out_rows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kQuantise) quantise_group(values[r]);
    put_columns<kFp8>(values[r], panels, params.out_rows, row0 + r);
  }
}

template <bool kFp8, bool kQuantise>
void launch_prepare(const Sm90PrepareParams& params, cudaStream_t stream) {
  constexpr int kRows = kQuantise ? 1 : 4;
  const dim3 grid(static_cast<unsigned>(params.out_rows / kRows),
                  static_cast<unsigned>(ceil_div(params.cols, kWarps * kQuantiseGroup)));
  launch<linear_sm90_prepare<kFp8, kQuantise, kRows>>({grid, kWarps * 32}, stream, params);
}

template <bool kFp8>
void launch_prepare(const Sm90PrepareParams& params, cudaStream_t stream) {
  params.quantise ? launch_prepare<kFp8, true>(params, stream)
                  : launch_prepare<kFp8, false>(params, stream);
}

}  // namespace

void launch_linear_sm90_prepare(const Sm90PrepareParams& params, cudaStream_t stream) {
  params.w == DType::kF8E4M3 ? launch_prepare<true>(params, stream)
                             : launch_prepare<false>(params, stream);
}

}  // namespace dsv4::nvidia
