// linear_tile: products with many tokens, bound by the tensor cores.
//
// Problem   out[m, n] = sum_k x[m, k] W[n, k]
// Tiling    block = 128 rows of W x 64 or 128 tokens; 8 warps of 32 rows x half the tokens; K in
//           chunks of 64 bytes of W a row, 4 stages by cp.async. W is expanded to bf16 in registers
//           (two warps expand the same rows), x comes from shared memory as it is
// Budget    128 x 128 x 64 columns: 512 instructions m16n8k16 = 512 clocks at the full rate of the
//           tensor cores, mma.sync reaches about 0.62 of it on sm_90; 80 KB from shared memory =
//           640 clocks; expansion 160 and reads 36 instructions a warp, 2 warps a scheduler
// Launch    grid sum of row tiles x token tiles, 256 threads, 1 block an SM
// Contract  as linear_stream; x spans fewer than 2^32 elements
// Numerics  the order of linear.h: the same bits as linear_stream
#include <algorithm>

#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_tile128-inl.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

template <int kTokens>
__global__ void __launch_bounds__(kTileThreads, 1)
    linear_tile(const __grid_constant__ LinearBatch batch) {
  extern __shared__ __align__(128) std::byte shared[];
  const auto block = static_cast<int>(blockIdx.x);
  const LinearItem& item = find_item(batch, block);
  const LinearTile tile = make_tile(item, block, kTileRows, kTokens);
  switch (item.w.dtype) {
    case DType::kBf16:
      return tile128<DType::kBf16, kTokens>(tile, shared);
    case DType::kF8E4M3:
      return tile128<DType::kF8E4M3, kTokens>(tile, shared);
    default:
      return tile128<DType::kF4E2M1, kTokens>(tile, shared);
  }
}

template <int kTokens>
void launch(LinearBatch& batch, cudaStream_t stream) {
  int64_t tiles = 0;
  int shared_bytes = 0;
  for (int i = 0; i < batch.count; ++i) {
    LinearItem& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, kTileRows) * ceil_div(item.tokens, kTokens);
    const int bytes = item.w.dtype == DType::kBf16 ? TileShape<DType::kBf16, kTokens>::kSharedBytes
                      : item.w.dtype == DType::kF8E4M3
                          ? TileShape<DType::kF8E4M3, kTokens>::kSharedBytes
                          : TileShape<DType::kF4E2M1, kTokens>::kSharedBytes;
    shared_bytes = std::max(shared_bytes, bytes);
  }
  allow_shared_memory(linear_tile<kTokens>, shared_bytes);
  linear_tile<kTokens>
      <<<static_cast<unsigned>(tiles), kTileThreads, static_cast<size_t>(shared_bytes), stream>>>(
          batch);
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace

void launch_linear_tile(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream) {
  if (batch.count == 0) return;
  if (max_tokens <= 64) {
    launch<64>(batch, stream);
  } else {
    launch<128>(batch, stream);
  }
}

}  // namespace dsv4::nvidia
