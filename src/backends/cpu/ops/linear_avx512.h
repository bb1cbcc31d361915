// The parts of the AVX-512 candidate of `linear`, one file each.
#pragma once
#include "backends/cpu/ops/linear.h"

namespace dsv4::cpu::avx512 {

/// Most rows of x that the streaming kernels take; above, tiles pay.
constexpr int kMaxStreamedRows = 8;
constexpr int kMaxStreamedRowsF32 = 4;

/// Fills the prepared form of x (linear_prepare_avx512bf16.cc).
void prepare(const PreparedX& x, int64_t m_begin, int64_t m_end);

/// True when the FP8 kernels read the scales of `w` directly: one scale per 128 columns or a power
/// of two more. Other block sizes are expanded code by code.
bool has_fast_scales(const Weight& w);

/// Few rows of x, W streamed once from memory (linear_stream_avx512bf16.cc). tile_rows = 1.
void compute_streamed(const LinearTile& tile);

/// Many rows of x: panels of W expanded into the cache, register tiles
/// (linear_tiled_avx512bf16.cc).
void compute_tiled(const LinearTile& tile);
LinearBlocking tiled_blocking(Lanes lanes, int64_t rows, int64_t total_rows, int num_threads);
constexpr int64_t kTiledScratchBytes = (256 + 128 + 48) * 1024;

}  // namespace dsv4::cpu::avx512
