// linear_stream: products with few tokens, bound by reading W.
//
// Problem   out[m, n] = sum_k x[m, k] W[n, k], m <= 16 (kMaxStreamTokens; more in token tiles)
// Tiling    block = 8 warps; a warp = one segment of K (linear.h) x 16 kM rows of W x 8 kN tokens;
//           with S segments, 8 / S groups of rows. Each lane copies the 16-byte pieces that it
//           alone reads into a ring of 3 to 6 stages: no barrier until the segments are added
// Budget    bytes of W once at 4.27 TB/s: 16 B a clock and multiprocessor. Expansion takes 2.25
//           (FP8), 2.6 (FP4) instructions a code: a third to two thirds of the issue slots at that
//           rate; matrix instructions under a tenth. x is read from L2 once per 16 kM rows
// Launch    grid sum of row tiles x token tiles, 256 threads, 1 to 4 blocks an SM; may start before
//           the kernel that prepares x has ended, and reads W meanwhile
// Contract  W: tensor_cores_take(); x 16-byte aligned rows; x and W beyond their ends not read
// Numerics  the order of linear.h
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_stream-inl.h"
#include "core/checked_math.h"

#include <algorithm>

namespace dsv4::nvidia {
namespace {

template <int kM, int kN, int kDepth, int kBlocks>
__global__ void __launch_bounds__(kStreamWarps * 32, kBlocks)
    linear_stream(const __grid_constant__ LinearBatch batch) {
  extern __shared__ __align__(128) std::byte shared[];
  start_next_kernel();  // it waits for this one's end before it reads
  const auto block = static_cast<int>(blockIdx.x);
  const LinearItem& item = find_item(batch, block);
  const LinearTile tile = make_tile(item, block, stream_tile_rows(item.w.cols, kM), 8 * kN);
  const auto wait = [] { wait_for_kernels_before(); };
  switch (item.w.dtype) {
    case DType::kBf16:
      return stream_tile<DType::kBf16, kM, kN, kDepth>(tile, shared, wait);
    case DType::kF8E4M3:
      return stream_tile<DType::kF8E4M3, kM, kN, kDepth>(tile, shared, wait);
    default:
      return stream_tile<DType::kF4E2M1, kM, kN, kDepth>(tile, shared, wait);
  }
}

__global__ void __launch_bounds__(kStreamWarps * 32, 2)
    linear_stream_split(const __grid_constant__ LinearBatch batch) {
  extern __shared__ __align__(128) std::byte shared[];
  start_next_kernel();  // it waits for this one's end before it reads
  const auto block = static_cast<int>(blockIdx.x);
  const LinearItem& item = find_item(batch, block);
  stream_tile<DType::kBf16, 1, 3, 4, true>(
      make_tile(item, block, stream_tile_rows(item.w.cols, 1), 8), shared,
      [] { wait_for_kernels_before(); });
}

template <int kM, int kN, int kDepth>
int warp_bytes(DType dtype) {
  if (dtype == DType::kBf16) return StreamShape<DType::kBf16, kM, kN, kDepth>::kWarpBytes;
  if (dtype == DType::kF8E4M3) return StreamShape<DType::kF8E4M3, kM, kN, kDepth>::kWarpBytes;
  return StreamShape<DType::kF4E2M1, kM, kN, kDepth>::kWarpBytes;
}

template <int kM, int kN, int kDepth, int kBlocks>
void launch(LinearBatch& batch, cudaStream_t stream) {
  int64_t tiles = 0;
  int shared_bytes = 0;
  for (int i = 0; i < batch.count; ++i) {
    LinearItem& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    const int64_t tile_rows = stream_tile_rows(item.w.cols, kM);
    tiles += ceil_div(item.w.rows, tile_rows) * ceil_div(item.tokens, 8 * kN);
    const int scale_bytes = item.w.scale == nullptr
                                ? 0
                                : 16 * kM * stream_scale_cols(item.w.cols, item.w.block_cols_log2);
    shared_bytes = std::max(
        shared_bytes, kStreamWarps * (warp_bytes<kM, kN, kDepth>(item.w.dtype) + scale_bytes));
  }
  nvidia::launch<linear_stream<kM, kN, kDepth, kBlocks>>(
      {dim3(static_cast<unsigned>(tiles)), kStreamWarps * 32, shared_bytes}, stream, batch);
}

}  // namespace

void launch_linear_split(LinearBatch& batch, cudaStream_t stream) {
  if (batch.count == 0) return;
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    LinearItem& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, stream_tile_rows(item.w.cols, 1)) * ceil_div(item.tokens, 8);
  }
  constexpr int kBytes = kStreamWarps * StreamShape<DType::kBf16, 1, 3>::kWarpBytes;
  nvidia::launch<linear_stream_split>(
      {dim3(static_cast<unsigned>(tiles)), kStreamWarps * 32, kBytes}, stream, batch);
}

void launch_linear_stream(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream) {
  if (batch.count == 0) return;
  if (max_tokens <= 8) {
    // Four blocks a multiprocessor of short rings, or two of long ones: where there are no more,
    // and for bf16, of which there is less to expand and more to wait for. Long ones of FP4 would
    // fill a multiprocessor, or not fit.
    bool long_rings = false, fp4 = false;
    int64_t blocks = 0;
    for (int i = 0; i < batch.count; ++i) {
      const LinearWeight& w = batch.items[i].w;
      long_rings = long_rings || w.dtype == DType::kBf16;
      fp4 = fp4 || w.dtype == DType::kF4E2M1;
      blocks += ceil_div(w.rows, stream_tile_rows(w.cols, 1));
    }
    long_rings = !fp4 && (long_rings || blocks <= 2 * num_multiprocessors());
    long_rings ? launch<1, 1, 6, 2>(batch, stream) : launch<1, 1, 3, 4>(batch, stream);
  } else {
    launch<2, 2, 4, 1>(batch, stream);
  }
}

}  // namespace dsv4::nvidia
