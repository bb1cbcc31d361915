// linear_any: products of any operands without matrix instructions (f32 x or weights, rows that are
// not aligned, odd scale blocks), and linear_prepare: rows of x as the products read them.
//
// Tiling    any: a lane group has 4 rows of W x 8 tokens, a lane 8 columns of every 256; prepare: a
//           lane group per 128 columns, 4 a lane
// Budget    any: bytes of W once for 8 tokens, 2 x 8 x 4 x 8 FLOP a lane and step; prepare: 4 B a
//           column through L2
// Launch    any: row tiles x token tiles of all items; prepare: rows x groups / 8; 256 lanes
// Contract  any alignment; nothing beyond the ends is read or written
// Numerics  any: one fma chain per lane in ascending k, lanes by a butterfly: the same for every
//           number of tokens. prepare: exact, code * scale is a bf16 number; a group with an
//           infinity or NaN becomes NaN
#pragma once
#include "backends/amd/ops/linear.h"

namespace dsv4::amd {

struct LinearAny {
  using Params = LinearBatch;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 4, kTokens = 8, kCols = 8;
  static constexpr int kTileRows = kThreads / gpu::kGroupLanes * kRows, kTileTokens = kTokens;

  DSV4_DEVICE static void run(const Params& batch) {
    const auto block = static_cast<int32_t>(gpu::block_idx());
    const LinearItem& item = find_item(batch, block);
    const int32_t token_tiles = (item.tokens + kTokens - 1) / kTokens;
    const int32_t tile = block - item.first_tile;
    const int32_t row0 = tile / token_tiles * kTileRows + gpu::group_idx() * kRows;
    if (row0 >= item.w.rows) return;  // the whole group
    multiply(item, row0, tile % token_tiles * kTokens);
  }

 private:
  DSV4_DEVICE static float weight_at(const WeightView& w, int32_t row, int32_t col) {
    const uint8_t* data = w.data + row * w.row_bytes;
    if (w.dtype == DType::kF32) return reinterpret_cast<const float*>(data)[col];
    if (w.dtype == DType::kBf16)
      return gpu::to_float(reinterpret_cast<const gpu::Bf16*>(data)[col]);
    const uint8_t* scales = w.scale + int64_t{row / w.block_rows} * w.scale_stride;
    const float scale = gpu::e8m0_to_float(scales[col / w.block_cols]);
    if (w.dtype == DType::kF8E4M3) return gpu::e4m3_to_float(data[col]) * scale;
    return gpu::e2m1_to_float(col % 2 == 0 ? data[col / 2] : data[col / 2] >> 4) * scale;
  }
  DSV4_DEVICE static float x_at(const LinearItem& item, int32_t token, int32_t col) {
    const int64_t at = token * item.x_stride + col;
    return item.x_f32 ? static_cast<const float*>(item.x)[at]
                      : gpu::to_float(static_cast<const gpu::Bf16*>(item.x)[at]);
  }

  DSV4_DEVICE static void multiply(const LinearItem& item, int32_t row0, int32_t token0) {
    const WeightView& w = item.w;
    int32_t rows[kRows], tokens[kTokens];
    float sums[kRows][kTokens];
    DSV4_UNROLL
    for (int t = 0; t < kTokens; ++t)
      tokens[t] = token0 + t < item.tokens ? token0 + t : item.tokens - 1;
    DSV4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      rows[r] = row0 + r < w.rows ? row0 + r : w.rows - 1;
      DSV4_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[r][t] = 0.0f;
    }
    for (int32_t first = gpu::group_lane() * kCols; first < w.cols;
         first += gpu::kGroupLanes * kCols) {
      for (int32_t col = first; col < first + kCols && col < w.cols; ++col) {
        float values[kRows];
        DSV4_UNROLL
        for (int r = 0; r < kRows; ++r) values[r] = weight_at(w, rows[r], col);
        DSV4_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          if (token0 + t >= item.tokens) break;
          const float x = x_at(item, tokens[t], col);
          DSV4_UNROLL
          for (int r = 0; r < kRows; ++r) sums[r][t] = gpu::fma(values[r], x, sums[r][t]);
        }
      }
    }
    DSV4_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      if (token0 + t >= item.tokens) break;  // the same in all lanes
      DSV4_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float sum = gpu::group_sum(sums[r][t]);
        if (gpu::group_lane() != 0 || row0 + r >= w.rows) continue;
        const int64_t at = (token0 + t) * item.out_stride + row0 + r;
        if (item.out_f32) {
          static_cast<float*>(item.out)[at] = sum;
        } else {
          static_cast<gpu::Bf16*>(item.out)[at] = gpu::to_bf16(sum);
        }
      }
    }
  }
};

// ---- x

/// Columns that share a scale, and those of a lane.
constexpr int kQuantiseCols = 128;
constexpr int kQuantiseLaneCols = kQuantiseCols / gpu::kGroupLanes;

/// A group's values through E4M3 and back under their power-of-two scale (numerics.md 4).
DSV4_DEVICE void quantise_group(float (&values)[kQuantiseLaneCols]) {
  uint32_t largest = 0;
  DSV4_UNROLL
  for (const float value : values) {
    const uint32_t size = gpu::bits_of(value) & 0x7fffffffu;
    largest = largest < size ? size : largest;
  }
  const gpu::Scale scale =
      gpu::scale_for(gpu::float_of(gpu::group_max(largest)), gpu::kFp8AmaxFloor, gpu::kE4m3Max);
  DSV4_UNROLL
  for (float& value : values) value = gpu::round_to_e4m3(value * scale.inverse) * scale.value;
}

/// out[r, :] = x[r, :], where `quantise` through E4M3 and back per 128 columns.
struct LinearPrepareArgs {
  const gpu::Bf16* x;
  int64_t x_stride;
  gpu::Bf16* out;
  int64_t out_stride;
  int32_t rows, cols;
  bool quantise;
};

struct LinearPrepare {
  using Params = LinearPrepareArgs;
  static constexpr int kThreads = 256;
  static constexpr int kGroups = kThreads / gpu::kGroupLanes;

  DSV4_DEVICE static void run(const Params& args) {
    const int32_t groups = (args.cols + kQuantiseCols - 1) / kQuantiseCols;
    const int64_t idx = gpu::block_idx() * kGroups + gpu::group_idx();
    const int64_t row = idx / groups;
    if (row >= args.rows) return;  // the whole group
    const int32_t col =
        static_cast<int32_t>(idx % groups) * kQuantiseCols + gpu::group_lane() * kQuantiseLaneCols;
    const gpu::Bf16* x = args.x + row * args.x_stride + col;
    gpu::Bf16* out = args.out + row * args.out_stride + col;
    float values[kQuantiseLaneCols];
    DSV4_UNROLL
    for (int i = 0; i < kQuantiseLaneCols; ++i)
      values[i] = col + i < args.cols ? gpu::to_float(x[i]) : 0.0f;
    if (args.quantise) quantise_group(values);
    DSV4_UNROLL
    for (int i = 0; i < kQuantiseLaneCols; ++i) {
      if (col + i < args.cols) out[i] = gpu::to_bf16(values[i]);
    }
  }
};

}  // namespace dsv4::amd
