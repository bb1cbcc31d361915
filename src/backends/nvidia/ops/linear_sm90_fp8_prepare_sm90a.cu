// linear_sm90_fp8_prepare: rows of bf16 x as the FP8 products read them.
//
// Problem   E4M3 codes in rows and a scale, a power of two, per row and 128 columns
// Tiling    a warp per 256 columns of kRows rows, 8 columns a lane; several rows where there are
//           many, for the sake of loads under way
// Budget    3 B a column: few tokens wait for the launch and one round of loads, many for memory
// Launch    grid (rows / kRows, cols / 2048), 256 threads; starts before the kernel before has
// ended
//           and lets the product start at once: it reads W
// Contract  any alignment of x; columns up to a multiple of 128 are written as zero
// Numerics  numerics.md 3, 4, in the bit form. Values that were quantised before keep their
// numbers:
//           the scale that is found is theirs or a smaller power of two
#include <type_traits>

#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90_fp8-inl.h"
#include "backends/nvidia/ops/linear_sm90_fp8.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kPrepareWarps = 8;
constexpr int kPrepareCols = 8;        // of a lane: 16 lanes hold a group
constexpr float kNoFloor = 0x1p-118f;  // of amax: its scale is 2^-126

/// 8 columns of x from `col`, zero from `cols` on.
__device__ __forceinline__ uint4 load_eight(const uint16_t* x, int col, int cols) {
  const uint16_t* from = x + col;
  if (col + kPrepareCols <= cols && reinterpret_cast<uintptr_t>(from) % 16 == 0)
    return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kPrepareCols; ++i) {
    if (col + i < cols) words[i / 2] |= uint32_t{from[i]} << (i % 2 * 16);
  }
  return {words[0], words[1], words[2], words[3]};
}

/// Two groups of kRows rows a warp, whose loads are under way together.
template <int kRows>
__global__ void __launch_bounds__(kPrepareWarps * 32)
    sm90_linear_fp8_prepare(const Fp8PrepareParams params) {
  sm90::start_next_kernel();
  sm90::wait_for_kernels_before();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int col =
      (static_cast<int>(blockIdx.y) * kPrepareWarps * 32 + static_cast<int>(threadIdx.x)) *
      kPrepareCols;
  const int64_t row0 = int64_t{blockIdx.x} * kRows;
  const int padded_cols = (params.cols + kFp8BlockCols - 1) / kFp8BlockCols * kFp8BlockCols;
  uint4 words[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    words[r] = row0 + r < params.rows
                   ? load_eight(params.x + (row0 + r) * params.x_stride, col, params.cols)
                   : uint4{};
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t pairs[4] = {words[r].x, words[r].y, words[r].z, words[r].w};
    uint32_t largest = 0;
#pragma unroll
    for (const uint32_t pair : pairs) largest = max(largest, larger_magnitude(pair));
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    const GroupScale scale = group_scale(largest, params.quantised ? kNoFloor : kQuantiseFloor);
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      codes[i] = scale.codes(pairs[2 * i]) | scale.codes(pairs[2 * i + 1]) << 16;
    if (col >= padded_cols || row0 + r >= params.rows) continue;
    *reinterpret_cast<uint2*>(params.codes + (row0 + r) * params.code_stride + col) = {codes[0],
                                                                                       codes[1]};
    if (lane % 16 == 0) {
      params.scale[col / kQuantiseGroup * params.scale_stride + row0 + r] = scale.value();
    }
  }
}

}  // namespace

void launch_linear_sm90_fp8_prepare(const Fp8PrepareParams& params, cudaStream_t stream) {
  const auto blocks_of_cols =
      static_cast<unsigned>(ceil_div(params.cols, kPrepareWarps * 32 * kPrepareCols));
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, kRows)), blocks_of_cols);
    launch<sm90_linear_fp8_prepare<kRows>>({grid, kPrepareWarps * 32}, stream, params);
  };
  params.rows < 256 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 4>{});
}

}  // namespace dsv4::nvidia
