// Indexer scores: sizes that the matrix kernels share, and how sm80_index_logits holds keys and
// queries.
//
// A key tile of sm80 is rows x 128 dims, the left operand of a matrix instruction, and never passes
// through shared memory: lane (g, t) = (lane / 4, lane % 4) of a warp loads 32 dims of its rows g,
// g + 8, ... straight from the page, in pieces of 16 bytes so that four lanes read 64 bytes in a
// row:
//   FP8     dims [16 t, 16 t + 16) and [64 + 16 t, 64 + 16 t + 16)
//   MXFP4   dims [32 t, 32 t + 32), which share a scale
// An instruction wants other dims in its lanes, but a dot product does not mind the order of its
// dims: queries are put down in the same order.
#pragma once
#include <cstdint>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/ops/index_logits.h"
#include "cache/kv_format.h"

namespace dsv4::nvidia {

constexpr int kIndexDim = 128;
constexpr int kIndexMaxHeads = 64;

/// Bytes of a lane's dims of one row, as stored.
template <KvFormat kFormat>
struct IndexRowTraits {
  static constexpr bool kFp8 = kFormat == KvFormat::kIndexFp8;
  static constexpr int kValueBytes = kFp8 ? kIndexDim : kIndexDim / 2;
  static constexpr int kScaleBytes = 4;
  static constexpr int kLaneWords = kValueBytes / 16;
  static constexpr int kPieceStep = 64;
};

/// Where the page of an entry is: block number of the entry, or -1 at `end` and later.
__device__ __forceinline__ int32_t index_block(const IndexLogitsArgs& args, const int32_t* table,
                                               int32_t entry, int32_t end) {
  if (entry >= end) return -1;
  const int32_t logical =
      args.rows_shift >= 0 ? entry >> args.rows_shift : entry / args.rows_per_block;
  return __ldg(table + logical);
}

/// Pieces of 16 bytes, kStep apart (or fewer words in one piece).
template <int kWords, bool kAligned, int kStep = 16>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const std::byte* from) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 piece = __ldg(reinterpret_cast<const uint4*>(from + i / 4 * kStep));
      words[i] = piece.x, words[i + 1] = piece.y, words[i + 2] = piece.z, words[i + 3] = piece.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(from + i / 4 * kStep + i % 4 * 4);
      words[i] = __ldg(bytes) | __ldg(bytes + 1) << 8 | __ldg(bytes + 2) << 16 |
                 static_cast<uint32_t>(__ldg(bytes + 3)) << 24;
    }
  }
}

/// A lane's part of kRows rows g, g + 8, ... of a tile.
template <KvFormat kFormat, bool kAligned, int kRows>
struct IndexKeys {
  using Traits = IndexRowTraits<kFormat>;
  uint32_t words[kRows][Traits::kLaneWords];
  /// MXFP4: the scale byte of the lane's dims of each row. FP8: scale[0] is the float scale of row
  /// t, whose score the lane writes.
  uint32_t scale[Traits::kFp8 ? 1 : kRows];

  /// Rows whose block is -1 are not read; they count as zeros.
  __device__ __forceinline__ void load(const IndexLogitsArgs& args, int32_t first,
                                       const int32_t (&blocks)[kRows]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if constexpr (Traits::kFp8) scale[0] = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (blocks[r] < 0) {
#pragma unroll
        for (uint32_t& word : words[r]) word = 0;
        if constexpr (!Traits::kFp8) scale[r] = 127;
        continue;
      }
      const int32_t entry = first + 8 * r + g;
      const int32_t row =
          args.rows_shift >= 0 ? entry & (args.rows_per_block - 1) : entry % args.rows_per_block;
      const std::byte* page = args.cache + blocks[r] * args.block_stride_bytes;
      const std::byte* scales =
          page + int64_t{args.rows_per_block} * Traits::kValueBytes + row * Traits::kScaleBytes;
      load_words<Traits::kLaneWords, kAligned, Traits::kPieceStep>(
          words[r], page + int64_t{row} * Traits::kValueBytes + 16 * t);
      if constexpr (Traits::kFp8) {
        if (r == t) {
          uint32_t bits[1];
          load_words<1, false>(bits, scales);
          scale[0] = bits[0];
        }
      } else {
        scale[r] = __ldg(reinterpret_cast<const uint8_t*>(scales) + t);
      }
    }
  }
};

/// Rows of sums over a lane's heads -> the score of row t's entry, in lane (g, t): lanes are added
/// as (t0 + t2) + (t1 + t3) whatever the row.
__device__ __forceinline__ float sum_over_lanes(const float (&sums)[4]) {
  const int t = threadIdx.x % 4;
  const bool upper = (t & 2) != 0, odd = (t & 1) != 0;
  const float even_row =
      (upper ? sums[2] : sums[0]) + __shfl_xor_sync(~0u, upper ? sums[0] : sums[2], 2);
  const float odd_row =
      (upper ? sums[3] : sums[1]) + __shfl_xor_sync(~0u, upper ? sums[1] : sums[3], 2);
  return (odd ? odd_row : even_row) + __shfl_xor_sync(~0u, odd ? even_row : odd_row, 1);
}

}  // namespace dsv4::nvidia
