// index_logits: scores of indexer keys by bf16 matrix instructions.
//
// Problem   logits[t, j] = k_scale_j sum_h w[t, h] max(0, q[t, h] . k_j), j < end[t]; up to 64
// heads
//           x 128 dims; FP8 keys (132 B) or MXFP4 keys (68 B) in pages
// Tiling    a wave keeps the queries of one token in registers, the rows of an instruction, and
// goes
//           through tiles of 16 keys, its columns; a block's four waves take neighbouring tiles of
//           its share of the keys. Keys come straight from the page, 8 columns a lane and piece
// Budget    docs/kernels/index_amd.md
// Launch    grid tokens x splits, 256 lanes, no shared memory
// Contract  dim 128, heads 1..64; q rows aligned to 16 bytes, values of a page to 8 (MXFP4: 4)
// Numerics  keys and queries are exact in bf16, products and sums in f32. Order: pieces of 32 dims
//           ascending (MXFP4: each from zero, added times its scale by fma); heads 4 q .. 4 q + 3,
//           16 + 4 q, ... of quad q ascending by fma; quads (0 + 1) + (2 + 3); times k_scale. NaN
//           stays. Nothing depends on split or tile
#pragma once
#include "backends/amd/ops/weight_codes.h"

namespace dsv4::amd {

constexpr int kIndexDim = 128;
constexpr int kIndexMaxHeads = 64;
constexpr int kIndexPieces = kIndexDim / kPieceCols;

struct IndexLogitsArgs {
  const uint16_t* q;
  int64_t q_token_stride, q_head_stride;
  const float* weights;
  int64_t weights_stride;
  const int32_t* token_to_seq;
  const int32_t* end;
  const int32_t* table;
  int64_t table_stride;
  const uint8_t* cache;
  int64_t block_stride_bytes;
  float* logits;
  int64_t logits_stride;
  int32_t max_end, heads;
  int32_t rows_per_block, rows_log2;  ///< log2: -1 where it is no integer
  int32_t splits;                     ///< blocks of a token
  int32_t block_keys;                 ///< of one of them, a multiple of kTileKeys
};

/// kCodes: kF8E4M3 or kF4E2M1; kHeadTiles x 16 heads.
template <DType kCodes, int kHeadTiles>
struct IndexLogits {
  using Params = IndexLogitsArgs;
  static constexpr int kThreads = 256;
  static constexpr int kWaveKeys = 16;
  static constexpr int kTileKeys = kThreads / 64 * kWaveKeys;
  static constexpr bool kFp8 = kCodes == DType::kF8E4M3;
  static constexpr int kValueBytes = kFp8 ? kIndexDim : kIndexDim / 2;
  static constexpr int kScaleBytes = 4;
  using Format = Codes<kCodes>;

  DSV4_DEVICE static void run(const Params& args) {
    const int64_t token = gpu::block_idx() / args.splits;
    const auto split = static_cast<int32_t>(gpu::block_idx() % args.splits);
    const int32_t limit = args.end[token] < args.max_end ? args.end[token] : args.max_end;
    const int32_t first = split * args.block_keys;
    const int32_t stop = first + args.block_keys < limit ? first + args.block_keys : limit;
    int32_t key = first + wave_idx() * kWaveKeys;
    if (key >= stop) return;  // the whole wave
    const int32_t* table = args.table + args.token_to_seq[token] * args.table_stride;

    Bf16x8 q[kHeadTiles][kIndexPieces];
    float weights[kHeadTiles][4];
    load_queries(args, token, q, weights);
    for (; key < stop; key += kTileKeys) {
      // Keys beyond the end are not read: the last one stands in, its score is not stored.
      const int32_t entry = key + wave_lane() % 16;
      const int32_t valid = entry < stop ? entry : stop - 1;
      const int32_t block =
          args.rows_log2 >= 0 ? valid >> args.rows_log2 : valid / args.rows_per_block;
      const int32_t row = valid - block * args.rows_per_block;
      const uint8_t* page = args.cache + table[block] * args.block_stride_bytes;
      const uint8_t* values = page + int64_t{row} * kValueBytes;
      const uint8_t* scale = page + int64_t{args.rows_per_block} * kValueBytes + row * kScaleBytes;
      const float score = score_of(values, scale, q, weights);
      if (wave_lane() < 16 && entry < stop) {
        args.logits[token * args.logits_stride + entry] =
            kFp8 ? score * (gpu::load_as<float>(scale) * Format::kUnit) : score;
      }
    }
  }

 private:
  // Heads beyond the end count as zeros.
  DSV4_DEVICE static void load_queries(const Params& args, int64_t token,
                                       Bf16x8 (&q)[kHeadTiles][kIndexPieces],
                                       float (&weights)[kHeadTiles][4]) {
    DSV4_UNROLL
    for (int h = 0; h < kHeadTiles; ++h) {
      const int head = 16 * h + wave_lane() % 16;
      const uint16_t* from =
          args.q + token * args.q_token_stride + head * args.q_head_stride + lane_col();
      DSV4_UNROLL
      for (int p = 0; p < kIndexPieces; ++p) {
        q[h][p] = head < args.heads ? gpu::load_as<Bf16x8>(from + p * kPieceCols) : Bf16x8{};
      }
      DSV4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * h + wave_lane() / 16 * 4 + i;
        weights[h][i] = row < args.heads ? args.weights[token * args.weights_stride + row] : 0.0f;
      }
    }
  }

  /// Of key lane % 16, without FP8's scale; in all quads.
  DSV4_DEVICE static float score_of(const uint8_t* values, const uint8_t* scale,
                                    const Bf16x8 (&q)[kHeadTiles][kIndexPieces],
                                    const float (&weights)[kHeadTiles][4]) {
    F32x4 dots[kHeadTiles];
    DSV4_UNROLL
    for (int h = 0; h < kHeadTiles; ++h) dots[h] = F32x4{};
    DSV4_UNROLL
    for (int p = 0; p < kIndexPieces; ++p) {
      const Bf16x8 keys = Format::expand(gpu::load_as<typename Format::Words>(
          values + (p * kPieceCols + lane_col()) / kLaneCols * Format::kLaneBytes));
      if constexpr (kFp8) {
        DSV4_UNROLL
        for (int h = 0; h < kHeadTiles; ++h) dots[h] = mfma_16x16x32_bf16(q[h][p], keys, dots[h]);
      } else {
        const float factor = scale_of(scale[p]);
        DSV4_UNROLL
        for (int h = 0; h < kHeadTiles; ++h) {
          const F32x4 part = mfma_16x16x32_bf16(q[h][p], keys, F32x4{});
          DSV4_UNROLL
          for (int i = 0; i < 4; ++i) dots[h][i] = gpu::fma(factor, part[i], dots[h][i]);
        }
      }
    }
    float sum = 0.0f;
    DSV4_UNROLL
    for (int h = 0; h < kHeadTiles; ++h) {
      DSV4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float positive = dots[h][i] < 0.0f ? 0.0f : dots[h][i];  // NaN stays
        sum = gpu::fma(weights[h][i], positive, sum);
      }
    }
    sum = sum + wave_shuffle_xor(sum, 16);
    return sum + wave_shuffle_xor(sum, 32);
  }
};

}  // namespace dsv4::amd
