// One tile of a product with few tokens. Included by kernels only; see linear_stream.cu.
#pragma once
#include <cstddef>

#include "backends/nvidia/ops/linear_tile-inl.h"
#include "backends/nvidia/ops/linear_weight-inl.h"

namespace dsv4::nvidia {

constexpr int kStreamWarps = 8;

/// Rows of W of a block whose warps each take one segment of K and kM x 16 rows.
__host__ __device__ constexpr int stream_tile_rows(int64_t cols, int m_tiles) {
  return kStreamWarps / linear_num_segments(cols) * 16 * m_tiles;
}

template <DType kDType, int kM, int kN, int kDepth = 4>
struct StreamShape {
  static constexpr int kLaneCols = Format<kDType>::kLaneCols;
  static constexpr int kChunkCols = 4 * kLaneCols;
  static constexpr int kPieces =
      kLaneCols / 8;  ///< 16-byte pieces of x in a chunk, per lane and token
  static constexpr int kStages = kDepth;
  static constexpr int kSlots = 2 * kM + kN * kPieces;  ///< 16-byte places of a lane in a stage
  static constexpr int kRingBytes = kStages * kSlots * 512;  ///< of a warp
  static constexpr int kSumStride = 16 * kM + 4;  ///< floats between tokens: 4 spreads the banks
  static constexpr int kSumBytes = 8 * kN * kSumStride * 4;
  static constexpr int kWarpBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

/// Scale bytes of a row that a segment may touch.
__host__ __device__ constexpr int stream_scale_cols(int64_t cols, int block_cols_log2) {
  return (linear_segment_cols(cols) >> block_cols_log2) + 1;
}

/// Shared memory: [warps][kWarpBytes], then [warps][16 * kM][stream_scale_cols]. kSplit: the kN
/// tiles of tokens are the parts of x of 8 tokens, and their sums are added. What the
/// ring takes of W, which no kernel writes, is asked for before `wait()`.
template <DType kDType, int kM, int kN, int kDepth = 4, bool kSplit = false, typename Wait>
__device__ __forceinline__ void stream_tile(const LinearTile& tile, std::byte* shared, Wait wait) {
  using F = Format<kDType>;
  using Shape = StreamShape<kDType, kM, kN, kDepth>;
  constexpr int kStages = Shape::kStages;
  const LinearWeight& w = *tile.w;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int segments = linear_num_segments(w.cols), segment_cols = linear_segment_cols(w.cols);
  const int groups = kStreamWarps / segments;
  const int group = warp / segments;
  float* sums_of_warp = reinterpret_cast<float*>(shared + warp * Shape::kWarpBytes);

  if (group < groups) {
    const int row0 = tile.row0 + group * 16 * kM;
    const int k0 = warp % segments * segment_cols;
    const int chunks =
        max(0, min(segment_cols, w.cols - k0) + Shape::kChunkCols - 1) / Shape::kChunkCols;
    const uint32_t ring = sm80::shared_address(shared) + warp * Shape::kWarpBytes + lane * 16;
    const int w_end = tile.w_bytes<F::kLaneCols>();
    const int w_begin = static_cast<int>(int64_t{k0} * 16 / F::kLaneCols) + t * 16;
    const uint8_t* w_rows[kM][2];
    int w_ends[kM][2];  // 0 beyond the last row: nothing is valid
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + 16 * m + 8 * h + g;
        w_rows[m][h] = w.data + min(row, w.rows - 1) * w.row_bytes;
        w_ends[m][h] = row < w.rows ? w_end : 0;
      }
    }
    const uint16_t* x_rows[kN];
    int x_ends[kN];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int token = tile.token0 + (kSplit ? 0 : 8 * n) + g;
      x_rows[n] =
          tile.x_row(min(token, tile.token_end - 1)) + (kSplit ? n * tile.x_plane_stride : 0);
      x_ends[n] = token < tile.token_end ? 2 * w.cols : 0;
    }
    // With few tokens W is read once: what else a step reads, and code, stays in the L2.
    const uint64_t policy = sm80::first_to_leave();
    // Every lane copies what it alone will read: no barrier between copy and use.
    const auto copy_w = [&](int chunk) {
      const uint32_t stage = ring + chunk % kStages * (Shape::kSlots * 512);
      const int byte = w_begin + chunk * 64;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t to = stage + (2 * m + h) * 512;
          const int bytes = valid_bytes(w_ends[m][h], byte);
          if constexpr (kSplit) {
            sm80::copy_async_stream(to, w_rows[m][h] + byte, bytes);
          } else {
            sm80::copy_async_stream(to, w_rows[m][h] + byte, bytes, policy);
          }
        }
      }
    };
    const auto copy_x = [&](int chunk) {
      const uint32_t stage = ring + chunk % kStages * (Shape::kSlots * 512);
      const int col = k0 + chunk * Shape::kChunkCols + t * F::kLaneCols;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int p = 0; p < Shape::kPieces; ++p) {
          sm80::copy_async_shared(stage + (2 * kM + n * Shape::kPieces + p) * 512,
                                  x_rows[n] + col + 8 * p,
                                  valid_bytes(x_ends[n], 2 * (col + 8 * p)));
        }
      }
    };
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) {
      if (chunk < chunks) copy_w(chunk);
    }

    // Scales of the whole segment, while the first chunks travel. Four lanes of a row share them.
    const int scale_cols = F::kScaled ? stream_scale_cols(w.cols, w.block_cols_log2) : 0;
    uint8_t* scales = reinterpret_cast<uint8_t*>(shared) + kStreamWarps * Shape::kWarpBytes +
                      warp * 16 * kM * scale_cols;
    const int first_block = k0 >> w.block_cols_log2;
    if constexpr (F::kScaled) {
      const int blocks = (w.cols + (1 << w.block_cols_log2) - 1) >> w.block_cols_log2;
      const int count = min(scale_cols, blocks - first_block);
      // All loads of a round are asked for before the first is used: one latency, not one each.
      constexpr int kRound = F::kLaneCols / 4;
      for (int first = t; first < scale_cols; first += 4 * kRound) {
        uint32_t bytes[2 * kM][kRound];
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
          const uint8_t* from = tile.scale_row(row0 + 8 * r + g) + first_block;
#pragma unroll
          for (int i = 0; i < kRound; ++i) {
            const int b = first + 4 * i;
            bytes[r][i] = b < count ? __ldg(from + b) : 127u;
          }
        }
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
#pragma unroll
          for (int i = 0; i < kRound; ++i) {
            const int b = first + 4 * i;
            if (b < scale_cols)
              scales[(8 * r + g) * scale_cols + b] = static_cast<uint8_t>(bytes[r][i]);
          }
        }
      }
      __syncwarp();
    }
    wait();
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) {
      if (chunk < chunks) copy_x(chunk);
      sm80::copy_async_commit();
    }

    float sums[kM][kN][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      sm80::copy_async_wait<kStages - 2>();
      if (chunk + kStages - 1 < chunks) {
        copy_w(chunk + kStages - 1);
        copy_x(chunk + kStages - 1);
      }
      sm80::copy_async_commit();
      const uint32_t stage = ring + chunk % kStages * (Shape::kSlots * 512);
      uint4 codes[kM][2];
      typename F::Factor factors[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          codes[m][h] = sm80::load_shared_16(stage + (2 * m + h) * 512);
          uint32_t byte = 0;
          if constexpr (F::kScaled) {
            const int col = k0 + chunk * Shape::kChunkCols + t * F::kLaneCols;
            byte = scales[(16 * m + 8 * h + g) * scale_cols + (col >> w.block_cols_log2) -
                          first_block];
          }
          factors[m][h] = F::factor(byte);
        }
      }
#pragma unroll
      for (int p = 0; p < Shape::kPieces; ++p) {
        uint4 x[kN];
#pragma unroll
        for (int n = 0; n < kN; ++n)
          x[n] = sm80::load_shared_16(stage + (2 * kM + n * Shape::kPieces + p) * 512);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t low[4], high[4];
          F::expand(codes[m][0], p, factors[m][0], low);
          F::expand(codes[m][1], p, factors[m][1], high);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < kN; ++n) multiply_half(sums[m][n], low, high, x[n], half);
          }
        }
      }
    }
    // The ring is this warp's own and empty now: it takes the sums.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * n + 2 * t + i % 2, row = 16 * m + 8 * (i / 2) + g;
          sums_of_warp[token * Shape::kSumStride + row] = sums[m][n][i];
        }
      }
    }
  }
  if (group >= groups) wait();  // warps without a segment write, too
  __syncthreads();

  // Segments in ascending order.
  constexpr int kParts = kSplit ? kN : 1, kTokens = 8 * kN / kParts;
  const int rows = groups * 16 * kM;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kTokens; i += kStreamWarps * 32) {
    const int row = i % rows, token = i / rows;
    if (tile.row0 + row >= w.rows || tile.token0 + token >= tile.token_end) continue;
    const int of_group = row / (16 * kM), of_row = row % (16 * kM);
    float total = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float sum = 0;
      for (int s = 0; s < segments; ++s) {
        const float segment_sum = reinterpret_cast<const float*>(
            shared + (of_group * segments + s) *
                         Shape::kWarpBytes)[(8 * part + token) * Shape::kSumStride + of_row];
        sum = s == 0 ? segment_sum : __fadd_rn(sum, segment_sum);
      }
      total = part == 0 ? sum : __fadd_rn(total, sum);
    }
    tile.store(tile.token0 + token, tile.row0 + row, total);
  }
}

}  // namespace dsv4::nvidia
