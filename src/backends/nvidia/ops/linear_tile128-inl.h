// One tile of 128 rows of W x kTokens. Included by kernels only; see linear_tile.cu.
#pragma once
#include <cstddef>

#include "backends/nvidia/ops/linear_tile-inl.h"
#include "backends/nvidia/ops/linear_weight-inl.h"

namespace dsv4::nvidia {

constexpr int kTileRows = 128;
constexpr int kTileThreads = 256;

template <DType kDType, int kTokens>
struct TileShape {
  static constexpr int kLaneCols = Format<kDType>::kLaneCols;
  static constexpr int kChunkCols = 4 * kLaneCols;
  static constexpr int kPieces = kLaneCols / 8;
  static constexpr int kUnits = kChunkCols / 8;  ///< 16-byte units of a row of x in a chunk
  /// bf16 chunks are short: two of them between barriers.
  static constexpr int kChunks = kDType == DType::kBf16 ? 2 : 1;
  static constexpr int kStages = kDType == DType::kF4E2M1 && kTokens == 128 ? 3 : 4;
  static constexpr int kWBytes = kTileRows * 64;  ///< of a chunk
  static constexpr int kXBytes = kTokens * kUnits * 16;
  static constexpr int kStageBytes = kChunks * (kWBytes + kXBytes);
  /// Sums over segments [token][row]; 4 more floats spread the banks.
  static constexpr int kSumStride = kTileRows + 4;
  static constexpr int kSharedBytes = kStages * kStageBytes + kTokens * kSumStride * 4;
  static_assert(kSharedBytes <= 227 << 10);
  /// Place of unit u of a token's row, so that eight lanes that read together (two tokens, four
  /// lane shares) hit all banks.
  __device__ static __forceinline__ int place(int token, int u) {
    if constexpr (kDType == DType::kF8E4M3) return u ^ (token & 1);
    if constexpr (kDType == DType::kF4E2M1) return u ^ (u >> 3 & 1) ^ (token & 1) << 1;
    return u;
  }
};

/// Warps: 4 of rows (32 each) x 2 of tokens (kTokens / 2 each).
template <DType kDType, int kTokens>
__device__ __forceinline__ void tile128(const LinearTile& tile, std::byte* shared) {
  using F = Format<kDType>;
  using Shape = TileShape<kDType, kTokens>;
  constexpr int kM = 2, kN = kTokens / 16, kStages = Shape::kStages;
  constexpr int kXCopies = kTokens * Shape::kUnits / kTileThreads;
  constexpr int kXTokenStep = kTileThreads / Shape::kUnits;
  const LinearWeight& w = *tile.w;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = thread / 32 % 4 * 32, warp_token = thread / 128 * (kTokens / 2);
  const uint32_t base = sm80::shared_address(shared);

  // What this thread copies: unit w_unit of rows w_row and w_row + 64, unit x_unit of some tokens.
  const int w_row = thread / 4, w_unit = thread % 4;
  const int w_end = tile.w_bytes<F::kLaneCols>();
  const uint8_t* w_rows[2];
  int w_ends[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile.row0 + w_row + 64 * i;
    w_rows[i] = w.data + min(row, w.rows - 1) * w.row_bytes;
    w_ends[i] = row < w.rows ? w_end : 0;
  }
  const int x_unit = thread % Shape::kUnits, x_token = thread / Shape::kUnits;
  uint32_t x_offsets[kXCopies];  // elements; the launcher keeps x below 2^32 of them
#pragma unroll
  for (int i = 0; i < kXCopies; ++i) {
    const int token = min(tile.token0 + x_token + i * kXTokenStep, tile.token_end - 1);
    x_offsets[i] = static_cast<uint32_t>(tile.x_row(token) - tile.x);
  }

  const int segments = linear_num_segments(w.cols), segment_cols = linear_segment_cols(w.cols);
  // Chunks of all segments in a row; a segment may end early (the last ones).
  const auto segment_chunks = [&](int s) {
    return max(0, min(segment_cols, w.cols - s * segment_cols) + Shape::kChunkCols - 1) /
           Shape::kChunkCols;
  };
  // The copying side runs ahead: its own place in K.
  int copy_segment = 0, copy_chunk = 0, copy_stage = 0;
  const auto copy = [&] {
    const uint32_t stage = base + copy_stage * Shape::kStageBytes;
    copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int k = copy_segment * segment_cols + (copy_chunk + c) * Shape::kChunkCols;
      const bool inside = copy_segment < segments && copy_chunk + c < segment_chunks(copy_segment);
      const uint32_t w_to = stage + c * (Shape::kWBytes + Shape::kXBytes);
      const int byte = static_cast<int>(int64_t{k} * 16 / F::kLaneCols) + w_unit * 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sm80::copy_async_stream(w_to + (w_row + 64 * i) * 64 + w_unit * 16, w_rows[i] + byte,
                                inside ? valid_bytes(w_ends[i], byte) : 0);
      }
      const int col = k + x_unit * 8;
      const int bytes = inside ? valid_bytes(2 * w.cols, 2 * col) : 0;
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        const int token = x_token + i * kXTokenStep;
        sm80::copy_async_stream(
            w_to + Shape::kWBytes + (token * Shape::kUnits + Shape::place(token, x_unit)) * 16,
            tile.x + x_offsets[i] + col, tile.token0 + token < tile.token_end ? bytes : 0);
      }
    }
    copy_chunk += Shape::kChunks;
    if (copy_segment < segments && copy_chunk >= segment_chunks(copy_segment)) {
      copy_chunk = 0;
      ++copy_segment;
    }
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    copy();
    sm80::copy_async_commit();
  }

  const uint8_t* scale_rows[kM][2];
  if constexpr (F::kScaled) {
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r)
      scale_rows[r / 2][r % 2] = tile.scale_row(tile.row0 + warp_row + 8 * r + g);
  }
  // Scales of a chunk are asked for one chunk ahead.
  const auto load_scales = [&](int k, uint32_t(&bytes)[kM][2]) {
    const int block = min(k + t * F::kLaneCols, w.cols - 1) >> w.block_cols_log2;
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) bytes[r / 2][r % 2] = scale_rows[r / 2][r % 2][block];
  };
  uint32_t next_scales[kM][2] = {};
  if constexpr (F::kScaled) load_scales(0, next_scales);

  // Sums over segments wait in shared memory, each thread's own: in registers they would keep
  // operands of the next products from being loaded early.
  float* totals = reinterpret_cast<float*>(shared + kStages * Shape::kStageBytes) +
                  (warp_token + 2 * t) * Shape::kSumStride + warp_row + g;
  int stage_idx = 0;
  for (int segment = 0; segment < segments; ++segment) {
    float sums[kM][kN][4] = {};
    const int chunks = segment_chunks(segment);
    for (int chunk = 0; chunk < chunks; chunk += Shape::kChunks) {
      sm80::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy();
      sm80::copy_async_commit();
      const uint32_t stage = base + stage_idx * Shape::kStageBytes;
      stage_idx = stage_idx + 1 == kStages ? 0 : stage_idx + 1;
#pragma unroll
      for (int c = 0; c < Shape::kChunks; ++c) {
        const uint32_t w_from = stage + c * (Shape::kWBytes + Shape::kXBytes);
        uint4 codes[kM][2];
        typename F::Factor factors[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            codes[m][h] =
                sm80::load_shared_16(w_from + (warp_row + 16 * m + 8 * h) * 64 + lane * 16);
            factors[m][h] = F::factor(next_scales[m][h]);
          }
        }
        if constexpr (F::kScaled) {
          const int k = segment * segment_cols + (chunk + 1) * Shape::kChunkCols;
          load_scales(chunk + 1 < chunks ? k : (segment + 1) * segment_cols, next_scales);
        }
        const uint32_t x_from = w_from + Shape::kWBytes;
#pragma unroll
        for (int p = 0; p < Shape::kPieces; ++p) {
          uint32_t low[kM][4], high[kM][4];
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            F::expand(codes[m][0], p, factors[m][0], low[m]);
            F::expand(codes[m][1], p, factors[m][1], high[m]);
          }
          // The two products that go to one sum are kNs * kM products apart: 33 clocks each to
          // another of the same sum.
          constexpr int kNs = kN < 4 ? kN : 4;
#pragma unroll
          for (int n0 = 0; n0 < kN; n0 += kNs) {
            uint4 x[kNs];
#pragma unroll
            for (int n = 0; n < kNs; ++n) {
              const int token = warp_token + 8 * (n0 + n) + g;
              x[n] = sm80::load_shared_16(
                  x_from +
                  (token * Shape::kUnits + Shape::place(token, t * Shape::kPieces + p)) * 16);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int n = 0; n < kNs; ++n) {
#pragma unroll
                for (int m = 0; m < kM; ++m)
                  multiply_half(sums[m][n0 + n], low[m], high[m], x[n], half);
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& total = totals[(8 * n + i % 2) * Shape::kSumStride + 16 * m + 8 * (i / 2)];
          total = segment == 0 ? sums[m][n][i] : __fadd_rn(total, sums[m][n][i]);
        }
      }
    }
  }

  // From shared memory, so that rows of out are written in one piece.
  sm80::copy_async_wait<0>();
  __syncthreads();
  const float* out = reinterpret_cast<const float*>(shared + kStages * Shape::kStageBytes);
  const int row = thread % kTileRows;
  if (tile.row0 + row < w.rows) {
    const int tokens = min(kTokens, tile.token_end - tile.token0);
    for (int token = thread / kTileRows; token < tokens; token += kTileThreads / kTileRows)
      tile.store(tile.token0 + token, tile.row0 + row, out[token * Shape::kSumStride + row]);
  }
}

}  // namespace dsv4::nvidia
