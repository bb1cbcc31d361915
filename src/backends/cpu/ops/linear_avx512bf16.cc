// The AVX-512 candidate of `linear`: BF16 dot products and VBMI byte permutes (Zen 4, Sapphire
// Rapids and later).
#if defined(__x86_64__)
#include <bit>

#include "backends/cpu/ops/linear_avx512.h"

namespace dsv4::cpu {
namespace avx512 {

bool has_fast_scales(const Weight& w) {
  return w.block_cols >= kLinearGroup && std::has_single_bit(static_cast<uint32_t>(w.block_cols));
}

}  // namespace avx512

namespace {

int tile_rows(const Weight& w, Lanes lanes, int64_t rows) {
  // The streaming kernels convert FP8 and FP4 to bf16 only, and need a scale per 128 columns.
  if (w.dtype == DType::kF8E4M3 && (lanes == Lanes::kF32 || !avx512::has_fast_scales(w)))
    return kLinearTileRows;
  if (w.dtype == DType::kF4E2M1 && lanes == Lanes::kF32) return kLinearTileRows;
  const int64_t most =
      lanes == Lanes::kF32 ? avx512::kMaxStreamedRowsF32 : avx512::kMaxStreamedRows;
  return rows <= most ? 1 : kLinearTileRows;
}

LinearBlocking blocking(const PreparedX& x, const Weight&, int64_t total_rows, int num_threads) {
  if (x.tile_rows != 1) return avx512::tiled_blocking(x.lanes, x.rows, total_rows, num_threads);
  // Long stripes for the prefetcher, and some chunks per thread for balance.
  constexpr int64_t kMinRows = 64, kMaxRows = 512;
  const int64_t rows = round_up(ceil_div(total_rows, int64_t{8} * num_threads), int64_t{16});
  return {x.rows, std::clamp(rows, kMinRows, kMaxRows)};
}

void compute(const LinearTile& tile) {
  if (tile.x->tile_rows == 1) {
    avx512::compute_streamed(tile);
  } else {
    avx512::compute_tiled(tile);
  }
}

}  // namespace

const LinearKernels kLinearAvx512Bf16{
    .tile_rows = tile_rows,
    .blocking = blocking,
    .element_bytes_bf16 = 2,
    .scratch_bytes = avx512::kTiledScratchBytes,
    .prepare = avx512::prepare,
    .compute = compute,
};

}  // namespace dsv4::cpu

#endif  // __x86_64__
