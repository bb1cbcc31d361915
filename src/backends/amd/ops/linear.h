// Dense products: matrix instructions for bf16 x, one fma chain a lane for the rest.
//
// Problem   out[m, n] = sum_k x[m, k] W[n, k] of up to kMaxLinearItems products in one launch
// Tiling    rows of W are the rows of an instruction, tokens its columns; K goes by pieces of 32
//           columns (weight_codes.h), straight from memory to registers
//             stream  up to 64 tokens: a block has 16 rows, a wave of it one segment of K
//             tile    more: a wave has 64 rows x 32 tokens, a block 128 x 64
//             any     other operands: a lane group has 4 rows x 8 tokens
// Budget    docs/kernels/linear_amd.md
// Launch    grid: sum of row tiles x token tiles over the items; 512 lanes (stream) or 256
// Contract  stream and tile: bf16 x with rows aligned to 16 bytes, cols % 32 == 0, rows of W
// aligned
//           to a lane's bytes of a piece, FP8 blocks of 16 n rows x 2^n >= 128 columns, FP4 of 4 n
//           rows; nothing beyond
//           the ends is read; W, its scales and x span less than 4 GiB. any: no condition
// Numerics  one order for every number of tokens, tile and place in a batch. K is cut into
//           kSegments parts, which depend on K only. Inside one, from zero: FP8 and FP4 codes are
//           multiplied and added up in f32 per 128 (32) columns, the sum times its scale is added
//           to the segment's by fma; bf16 products are added to the segment's sum directly.
//           Segments are added in ascending order from zero, then one rounding
#pragma once
#include "backends/amd/ops/weight_codes.h"

namespace dsv4::amd {

constexpr int kSegments = 8;
constexpr int kGroupCols = 128;  ///< a segment is a multiple of it

/// A weight as kernels read it.
struct WeightView {
  const uint8_t* data;
  const uint8_t* scale;
  int64_t row_bytes, scale_stride;
  int32_t rows, cols;
  int32_t block_rows, block_cols;  ///< of a scale; 1 and 32 for kF4E2M1
  int32_t block_cols_log2;         ///< where matrix instructions take it
  DType dtype;
  bool scale_words;  ///< four scale bytes of a row from a multiple of 4 on are an aligned word
};

/// One product. `first_tile` is the first block that works on it.
struct LinearItem {
  WeightView w;
  const void* x;  ///< [tokens, cols] bf16; f32 for `any`
  int64_t x_stride;
  void* out;
  int64_t out_stride;
  int32_t tokens, first_tile;
  bool x_f32, out_f32;
};

constexpr int kMaxLinearItems = 24;
struct LinearBatch {
  int32_t count;
  LinearItem items[kMaxLinearItems];
};
static_assert(sizeof(LinearBatch) <= 4096, "fits the arguments of a kernel");

/// Outputs of rows from row0 on and of tokens [token0, token_end) of one product.
struct LinearTile {
  WeightView w;
  const uint16_t* x;
  int64_t x_stride;
  const int32_t* x_rows;  ///< token m reads row x_rows[m] of x; null: row m
  void* out;
  int64_t out_stride;
  bool out_f32;
  int32_t row0, token0, token_end;
};

DSV4_DEVICE const LinearItem& find_item(const LinearBatch& batch, int32_t block) {
  int i = 0;
  while (i + 1 < batch.count && block >= batch.items[i + 1].first_tile) ++i;
  return batch.items[i];
}
/// Tile `block` of the item; tokens vary fastest, so that blocks which share rows of W run
/// together.
DSV4_DEVICE LinearTile make_tile(const LinearItem& item, int32_t block, int tile_rows,
                                 int tile_tokens) {
  const int32_t token_tiles = (item.tokens + tile_tokens - 1) / tile_tokens;
  const int32_t tile = block - item.first_tile;
  return {.w = item.w,
          .x = static_cast<const uint16_t*>(item.x),
          .x_stride = item.x_stride,
          .x_rows = nullptr,
          .out = item.out,
          .out_stride = item.out_stride,
          .out_f32 = item.out_f32,
          .row0 = tile / token_tiles * tile_rows,
          .token0 = tile % token_tiles * tile_tokens,
          .token_end = item.tokens};
}

/// A wave's part of a tile: kM x kN results of 16 rows x 16 tokens.
template <DType kDType, int kM, int kN>
class WaveTile {
  using Format = Codes<kDType>;
  static constexpr int kPieces = kGroupCols / kPieceCols;
  // Scales of a group that a lane needs: of its four rows of a result, or one that the 16 rows
  // share.
  static constexpr bool kRowScales = kDType == DType::kF4E2M1;
  static constexpr int kScales = Format::kScaleCols == 0 ? 0 : kRowScales ? 4 : 1;
  // The next group's codes are on their way while one is multiplied, if registers are left.
  static constexpr bool kPrefetch = kM == 1;

 public:
  F32x4 sums[kM][kN];

  DSV4_DEVICE WaveTile(const LinearTile& tile, int32_t row0, int32_t token0)
      : w_(tile.w), x_(reinterpret_cast<const uint8_t*>(tile.x)), row0_(row0), token0_(token0) {
    // What lies beyond the ends takes the last row or token: its results are not stored.
    DSV4_UNROLL
    for (int m = 0; m < kM; ++m) {
      rows_[m] = offset(clamp_row(16 * m + wave_lane() % 16) * w_.row_bytes + lane_bytes(0));
      if constexpr (kScales > 0) {
        // Rows of FP4 are a multiple of four.
        const int32_t row = row0 + 16 * m + (kRowScales ? wave_lane() / 16 * 4 : 0);
        const int32_t last = w_.rows - kScales;
        scales_[m] = offset((row < last ? row : last) / w_.block_rows * w_.scale_stride);
      }
    }
    DSV4_UNROLL
    for (int n = 0; n < kN; ++n) {
      const int32_t token = token0 + 16 * n + wave_lane() % 16;
      const int32_t valid = token < tile.token_end ? token : tile.token_end - 1;
      const int64_t row = tile.x_rows == nullptr ? valid : tile.x_rows[valid];
      tokens_[n] = offset((row * tile.x_stride + lane_col()) * int64_t{sizeof(uint16_t)});
    }
  }

  /// sums = products of the columns of segment `segment`.
  DSV4_DEVICE void multiply_segment(int segment) {
    const int32_t groups = (w_.cols + kSegments * kGroupCols - 1) / (kSegments * kGroupCols);
    const int32_t begin = segment * groups * kGroupCols;
    const int32_t end =
        begin + groups * kGroupCols < w_.cols ? begin + groups * kGroupCols : w_.cols;
    clear(sums);
    int32_t col = begin;
    if constexpr (kPrefetch) {
      if (col + kGroupCols <= end) {
        Group group = load_group<true>(col, kPieces);
        for (; col + 2 * kGroupCols <= end; col += kGroupCols) {
          const Group next = load_group<true>(col + kGroupCols, kPieces);
          multiply_group<true>(col, group, kPieces);
          group = next;
        }
        multiply_group<true>(col, group, kPieces);
        col += kGroupCols;
      }
    } else {
      for (; col + kGroupCols <= end; col += kGroupCols)
        multiply_group<true>(col, load_group<true>(col, kPieces), kPieces);
    }
    if (col < end) {
      const int pieces = (end - col) / kPieceCols;
      multiply_group<false>(col, load_group<false>(col, pieces), pieces);
    }
  }

  /// Stores results (m, n) of `values`.
  DSV4_DEVICE void store(const LinearTile& tile, int m, int n, const F32x4& values) const {
    const int32_t token = token0_ + 16 * n + wave_lane() % 16;
    const int32_t row = row0_ + 16 * m + wave_lane() / 16 * 4;
    if (token >= tile.token_end) return;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (row + i >= w_.rows) return;
      const int64_t at = token * tile.out_stride + row + i;
      if (tile.out_f32) {
        static_cast<float*>(tile.out)[at] = values[i];
      } else {
        static_cast<gpu::Bf16*>(tile.out)[at] = gpu::to_bf16(values[i]);
      }
    }
  }

 private:
  /// Of kGroupCols columns: codes, and bytes of scales (of FP4: piece p at bits 8 p).
  struct Group {
    typename Format::Words codes[kM][kPieces];
    uint32_t scales[kM][kScales == 0 ? 1 : kScales];
  };

  DSV4_DEVICE int64_t clamp_row(int32_t row) const {
    return row0_ + row < w_.rows ? row0_ + row : w_.rows - 1;
  }
  DSV4_DEVICE static uint32_t offset(int64_t bytes) { return static_cast<uint32_t>(bytes); }
  DSV4_DEVICE static int32_t lane_bytes(int32_t col) {
    return (col + lane_col()) / kLaneCols * Format::kLaneBytes;
  }
  static DSV4_DEVICE void clear(F32x4 (&tiles)[kM][kN]) {
    DSV4_UNROLL
    for (int m = 0; m < kM; ++m) {
      DSV4_UNROLL
      for (int n = 0; n < kN; ++n) tiles[m][n] = F32x4{};
    }
  }

  // `pieces` of the group are inside; all of them if kWhole.
  template <bool kWhole>
  DSV4_DEVICE Group load_group(int32_t col, int pieces) const {
    Group group;
    DSV4_UNROLL
    for (int m = 0; m < kM; ++m) {
      DSV4_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        if (!kWhole && p >= pieces) break;
        group.codes[m][p] = gpu::load_as<typename Format::Words>(
            w_.data + (rows_[m] + offset((col + p * kPieceCols) / kLaneCols * Format::kLaneBytes)));
      }
      DSV4_UNROLL
      for (int i = 0; i < kScales; ++i) {
        const uint8_t* scale =
            w_.scale + (scales_[m] + offset(i * w_.scale_stride + (col >> w_.block_cols_log2)));
        if (!kRowScales) {
          group.scales[m][i] = *scale;
        } else if (kWhole && w_.scale_words) {
          group.scales[m][i] = gpu::load_as<uint32_t>(scale);
        } else {
          group.scales[m][i] = 0;
          for (int p = 0; p < pieces; ++p)
            group.scales[m][i] |= static_cast<uint32_t>(scale[p]) << (8 * p);
        }
      }
    }
    return group;
  }

  template <bool kWhole>
  DSV4_DEVICE void multiply_group(int32_t col, const Group& group, int pieces) {
    F32x4 part[kM][kN];
    clear(part);
    DSV4_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      if (!kWhole && p >= pieces) break;
      Bf16x8 x[kN];
      DSV4_UNROLL
      for (int n = 0; n < kN; ++n)
        x[n] = gpu::load_as<Bf16x8>(x_ + (tokens_[n] + offset((col + p * kPieceCols) * 2)));
      DSV4_UNROLL
      for (int m = 0; m < kM; ++m) {
        const Bf16x8 w = Format::expand(group.codes[m][p]);
        DSV4_UNROLL
        for (int n = 0; n < kN; ++n) {
          F32x4& into = kScales == 0 ? sums[m][n] : part[m][n];
          into = mfma_16x16x32_bf16(w, x[n], kRowScales ? F32x4{} : into);
        }
        if (kRowScales) add_scaled(group, m, p, part);
      }
    }
    if (kScales == 0 || kRowScales) return;
    DSV4_UNROLL
    for (int m = 0; m < kM; ++m) add_scaled(group, m, 0, part);
  }

  DSV4_DEVICE void add_scaled(const Group& group, int m, int p, const F32x4 (&part)[kM][kN]) {
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = group.scales[m][kRowScales ? i : 0] >> (8 * p) & 0xffu;
      const float scale = scale_of(byte) * Format::kUnit;
      DSV4_UNROLL
      for (int n = 0; n < kN; ++n) sums[m][n][i] = gpu::fma(scale, part[m][n][i], sums[m][n][i]);
    }
  }

  const WeightView& w_;
  const uint8_t* x_;
  int32_t row0_, token0_;
  // Bytes from the start of W, of its scales and of x: one register where a pointer takes two.
  uint32_t rows_[kM];
  uint32_t scales_[kM];
  uint32_t tokens_[kN];
};

/// f(DType constant) for the formats of stream and tile.
template <typename F>
DSV4_DEVICE void with_codes(DType dtype, F f) {
  if (dtype == DType::kBf16) {
    f(std::integral_constant<DType, DType::kBf16>{});
  } else if (dtype == DType::kF8E4M3) {
    f(std::integral_constant<DType, DType::kF8E4M3>{});
  } else {
    f(std::integral_constant<DType, DType::kF4E2M1>{});
  }
}

// ---- stream

/// 16 rows x 16 kN tokens by one block, a wave a segment.
template <int kN>
struct StreamShape {
  static constexpr int kThreads = 64 * kSegments;
  static constexpr int kTileRows = 16, kTileTokens = 16 * kN;
  static constexpr int kMinWaves = 2;

  struct Storage {
    F32x4 sums[kSegments][kN][64];
  };

  DSV4_DEVICE static void run(const LinearTile& tile) {
    DSV4_SHARED(Storage, storage);
    with_codes(tile.w.dtype, [&](auto dtype) { run_as<decltype(dtype)::value>(tile, storage); });
  }

 private:
  template <DType kDType>
  DSV4_DEVICE static void run_as(const LinearTile& tile, Storage& storage) {
    WaveTile<kDType, 1, kN> wave(tile, tile.row0, tile.token0);
    wave.multiply_segment(wave_idx());
    DSV4_UNROLL
    for (int n = 0; n < kN; ++n) storage.sums[wave_idx()][n][wave_lane()] = wave.sums[0][n];
    gpu::block_sync();
    for (int n = wave_idx(); n < kN; n += kSegments) {
      F32x4 total = {};
      for (int s = 0; s < kSegments; ++s) total = total + storage.sums[s][n][wave_lane()];
      wave.store(tile, 0, n, total);
    }
  }
};

// ---- tile

/// 128 rows x 64 tokens by one block of four waves.
struct TileShape {
  static constexpr int kThreads = 256;
  static constexpr int kTileRows = 128, kTileTokens = 64;
  static constexpr int kMinWaves = 2;

  DSV4_DEVICE static void run(const LinearTile& tile) {
    with_codes(tile.w.dtype, [&](auto dtype) { run_as<decltype(dtype)::value>(tile); });
  }

 private:
  template <DType kDType>
  DSV4_DEVICE static void run_as(const LinearTile& tile) {
    constexpr int kM = 4, kN = 2;  // three sets of sums, and codes, in 256 registers
    const int32_t row0 = tile.row0 + wave_idx() % 2 * (16 * kM);
    const int32_t token0 = tile.token0 + wave_idx() / 2 * (16 * kN);
    if (row0 >= tile.w.rows || token0 >= tile.token_end) return;  // the whole wave
    WaveTile<kDType, kM, kN> wave(tile, row0, token0);
    F32x4 total[kM][kN] = {};
    DSV4_UNROLL_BY(1)
    for (int s = 0; s < kSegments; ++s) {
      wave.multiply_segment(s);
      DSV4_UNROLL
      for (int m = 0; m < kM; ++m) {
        DSV4_UNROLL
        for (int n = 0; n < kN; ++n) total[m][n] = total[m][n] + wave.sums[m][n];
      }
    }
    DSV4_UNROLL
    for (int m = 0; m < kM; ++m) {
      DSV4_UNROLL
      for (int n = 0; n < kN; ++n) wave.store(tile, m, n, total[m][n]);
    }
  }
};

/// Products of a batch by tiles of one shape.
template <typename Shape>
struct LinearMatrix {
  using Params = LinearBatch;
  static constexpr int kThreads = Shape::kThreads, kMinWaves = Shape::kMinWaves;
  static constexpr int kTileRows = Shape::kTileRows, kTileTokens = Shape::kTileTokens;
  DSV4_DEVICE static void run(const Params& batch) {
    const auto block = static_cast<int32_t>(gpu::block_idx());
    Shape::run(make_tile(find_item(batch, block), block, kTileRows, kTileTokens));
  }
};
using LinearStream16 = LinearMatrix<StreamShape<1>>;
using LinearStream64 = LinearMatrix<StreamShape<4>>;
using LinearTile128x64 = LinearMatrix<TileShape>;

}  // namespace dsv4::amd
