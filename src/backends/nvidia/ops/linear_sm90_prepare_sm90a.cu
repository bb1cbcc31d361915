// linear_sm90_prepare: rows of x as the products of sm_90 read them.
//
// Problem   panels of 64 columns, rows of 128 bytes; through E4M3 and back where `quantise`
// Tiling    a warp per 128 columns of a row, 4 columns a lane
// Budget    4 B a column at the bandwidth of L2: x was just written
// Launch    grid out_rows * groups / 8, 256 threads; is started before the kernel before has ended
//           and lets the product start at once: it reads W
// Contract  any alignment of x; columns and rows beyond the end are not read and written as zero
// Numerics  exact: code * scale is a bf16 number
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90_x-inl.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kWarps = 8;

template <bool kFp8>
__global__ void __launch_bounds__(kWarps * 32) linear_sm90_prepare(const Sm90PrepareParams params) {
  sm90::start_next_kernel();
  sm90::wait_for_kernels_before();
  const int groups = (params.cols + kQuantiseGroup - 1) / kQuantiseGroup;
  const int64_t idx = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t row = idx / groups;
  if (row >= params.out_rows) return;
  const int group = static_cast<int>(idx % groups);
  float values[kQuantiseCols];
  load_columns(params.x + row * params.x_stride, group * kQuantiseGroup,
               row < params.rows ? params.cols : 0, values);
  if (params.quantise) quantise_group(values);
  put_columns<kFp8>(values, params.out + 2 * group * int64_t{params.out_rows} * kSm90PanelCols,
                    params.out_rows, row);
}

}  // namespace

void launch_linear_sm90_prepare(const Sm90PrepareParams& params, cudaStream_t stream) {
  const int64_t groups = ceil_div(params.cols, kQuantiseGroup) * params.out_rows;
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(groups, kWarps))), kWarps * 32};
  if (params.w == DType::kF8E4M3) {
    launch<linear_sm90_prepare<true>>(shape, stream, params);
  } else {
    launch<linear_sm90_prepare<false>>(shape, stream, params);
  }
}

}  // namespace dsv4::nvidia
