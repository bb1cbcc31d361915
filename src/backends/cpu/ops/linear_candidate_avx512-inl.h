// An AVX-512 candidate of `linear`, put together. Compiled twice, see linear_avx512-inl.h.
#pragma once
#include "backends/cpu/ops/linear_prepare_avx512-inl.h"
#include "backends/cpu/ops/linear_stream_avx512-inl.h"
#include "backends/cpu/ops/linear_tiled_avx512-inl.h"

namespace dsv4::cpu {
namespace {

int tile_rows(const Weight& w, Lanes lanes, int64_t rows) {
  // The streaming kernels convert FP8 and FP4 to bf16 only, and need a scale per 128 columns.
  if (w.dtype == DType::kF8E4M3 && (lanes == Lanes::kF32 || !has_fast_scales(w)))
    return kLinearTileRows;
  if (w.dtype == DType::kF4E2M1 && lanes == Lanes::kF32) return kLinearTileRows;
  int64_t most = kMaxStreamedRows;
  if (lanes == Lanes::kF32) most = kMaxStreamedRowsF32;
  // 4 rows of x that fit L1.
  if (lanes == Lanes::kFp8 && w.cols <= kMaxStreamedColsFp8) most = kMaxStreamedRowsFp8;
  return rows <= most ? 1 : kLinearTileRows;
}

LinearBlocking blocking(const PreparedX& x, const Weight&, int64_t total_rows, int num_threads) {
  if (x.tile_rows != 1) return tiled_blocking(x.lanes, x.rows, total_rows, num_threads);
  // Long stripes for the prefetcher, and some chunks per thread for balance.
  constexpr int64_t kMinRows = 64, kMaxRows = 512;
  const int64_t rows = round_up(ceil_div(total_rows, int64_t{8} * num_threads), int64_t{16});
  return {x.rows, std::clamp(rows, kMinRows, kMaxRows)};
}

void compute(const LinearTile& tile) {
  if (tile.x->tile_rows == 1) {
    compute_streamed(tile);
  } else {
    compute_tiled(tile);
  }
}

constexpr LinearKernels kKernels{
    .tile_rows = tile_rows,
    .blocking = blocking,
    .element_bytes_bf16 = 2 * kPairVectors,
    .scratch_bytes = kTiledScratchBytes,
    .prepare = prepare,
    .compute = compute,
};

}  // namespace
}  // namespace dsv4::cpu
