// linear, many rows of x: panels of W are expanded into the cache and multiplied by register tiles.
// Compiled twice, see linear_avx512-inl.h.
//
// Problem   y[m][n] = sum_k x[m][k] W[n][k]; bound by VDPBF16PS, or by FMA
// Tiling    up to 256 rows of x x 128 rows of W x 1024 columns (f32: half the rows): x 512 KiB and
//           panel 256 KiB share the L2 cache. Register tile 4 x 4 (FP4 4 x 3): per step 8 loads, 16
//           dot products. Both operands lie in tiles [step][4 rows][64 bytes].
// Sums      block sums of a tile of outputs are one vector each and wait in scratch; the last step
//           stores them to `out`, whatever its type and stride.
// Tried     6x4 and 4x6 (60-70% of peak), 5x5 (65-75%), no blocking of x (75%); this: 88-90%.
#pragma once
#include "backends/cpu/ops/linear_avx512-inl.h"
#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

// x block: 256 x 1024 bf16 (128 f32) = half of the L2 cache
constexpr int64_t kMaxRowsOfXF32 = 128, kMaxRowsOfX = 2 * kMaxRowsOfXF32 / kPairVectors;
// panel: 128 x 1024 bf16 (64 f32) = a quarter
constexpr int64_t kMaxPanelRowsF32 = 64, kMaxPanelRows = 2 * kMaxPanelRowsF32 / kPairVectors;
constexpr int kFp4TileRows = 3;
constexpr int kTileRows = 4;
constexpr int64_t kMaxPanelRowsFp4 = kMaxPanelRows / kTileRows * kFp4TileRows;

constexpr int64_t kPanelBytes = kMaxPanelRows * kLinearBlock * 2 * kPairVectors;
constexpr int64_t kSumBytes = kMaxRowsOfX * kMaxPanelRows * 4;
// Lane scales of an FP4 panel: 64 bytes per row and group.
constexpr int64_t kScaleBytes = kMaxPanelRowsFp4 * (kLinearBlock / kLinearGroup) * 64;
static_assert(kPanelBytes == kMaxPanelRowsF32 * kLinearBlock * 4);
constexpr int64_t kTiledScratchBytes = kPanelBytes + kSumBytes + kScaleBytes;

int64_t panel_rows(Lanes lanes, int64_t rows_of_x) {
  // Few rows of x: small panels stay in L1, and expanding them is most of the work anyway.
  const int64_t rows = rows_of_x <= 16 ? 16 : rows_of_x <= 64 ? 32 : rows_of_x <= 128 ? 64 : 128;
  switch (lanes) {
    case Lanes::kF32:
      return std::min(rows, kMaxPanelRowsF32);
    case Lanes::kFp4:
      return std::min(rows, kMaxPanelRows) / kTileRows * kFp4TileRows;
    default:
      return std::min(rows, kMaxPanelRows);
  }
}

// ---- panels: rows [n, n + rows) of W, columns [k0, k0 + block), expanded to tiles of kRowsOfTile
// rows. Rows past the end repeat the last one: their outputs are not stored.

struct Panel {
  const Weight* w;
  int64_t n, n_end;
  int64_t k0, block;
  std::byte* out;
  int64_t next_bytes;  // from a byte of this panel to the same place of the one expanded next
};

// 128 columns of a row; a partial last group is copied to `tail` and padded with zeros.
template <int kBitsPerColumn>
DSV4_INLINE const std::byte* group_at(const Weight& w, int64_t row, int64_t k, std::byte* tail) {
  const std::byte* from =
      static_cast<const std::byte*>(w.data) + (row * w.row_stride + k) * kBitsPerColumn / 8;
  if (k + kLinearGroup <= w.cols) [[likely]]
    return from;
  std::memset(tail, 0, kLinearGroup * kBitsPerColumn / 8);
  std::memcpy(tail, from, static_cast<size_t>((w.cols - k) * kBitsPerColumn / 8));
  return tail;
}

// Calls f(row of W, column, bytes to the row's first step) for every row and group of a panel of
// elements of kBytes. A step of a tile is 64 bytes of each row.
template <int kRowsOfTile, int kBytes, typename F>
DSV4_INLINE void for_each_group(const Panel& panel, F&& f) {
  const int64_t rows = round_up(panel.n_end - panel.n, kRowsOfTile);
  for (int64_t n = 0; n < rows; n += kRowsOfTile) {
    for (int64_t k = 0; k < panel.block; k += kLinearGroup) {
      for (int r = 0; r < kRowsOfTile; ++r) {
        const int64_t row = std::min(panel.n + n + r, panel.n_end - 1);
        f(row, panel.k0 + k, (n * panel.block + k * kRowsOfTile) * kBytes + r * 64);
      }
    }
  }
}

constexpr int kPairBytes = 2 * kPairVectors;  // of an element of a pair

// Stores pairs [0, 4) of a group.
template <int kRowsOfTile>
DSV4_INLINE void store_group(std::byte* to, const __m512i (&pairs)[4]) {
  constexpr int64_t kStepBytes = kRowsOfTile * 64;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store_pairs(to + i * kPairVectors * kStepBytes, kStepBytes, pairs[i]);
}

void expand_fp8(const Panel& panel) {
  const Weight& w = *panel.w;
  const Fp8Tables& tables = fp8_tables();
  const int shift = __builtin_ctz(static_cast<unsigned>(w.block_cols));
  constexpr int64_t kGroupBytes = kTileRows * kLinearGroup * kPairBytes;
  alignas(64) std::byte tail[kLinearGroup];
  std::byte* to = panel.out;
  for (int64_t n = panel.n; n < panel.n_end; n += kTileRows) {
    int64_t rows[kTileRows];
    const uint8_t* scales[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      rows[r] = std::min(n + r, panel.n_end - 1);
      scales[r] = w.scale + rows[r] / w.block_rows * w.scale_stride;
    }
    for (int64_t k = panel.k0; k < panel.k0 + panel.block; k += kLinearGroup, to += kGroupBytes) {
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        const Fp8Table table = load_table(tables, scales[r][k >> shift]);
        const std::byte* from = group_at<8>(w, rows[r], k, tail);
        __m512i pairs[4];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          _mm_prefetch(from + 64 * half + panel.next_bytes, _MM_HINT_T0);
          fp8_to_bf16(_mm512_loadu_si512(from + 64 * half), table, pairs[2 * half],
                      pairs[2 * half + 1]);
        }
        store_group<kTileRows>(to + 64 * r, pairs);
      }
    }
  }
}

// Any block sizes: code by code.
void expand_fp8_general(const Panel& panel) {
  const Weight& w = *panel.w;
  const Fp8Tables& tables = fp8_tables();
  for_each_group<kTileRows, kPairBytes>(panel, [&](int64_t row, int64_t k, int64_t place) {
    const auto* codes = static_cast<const uint8_t*>(w.data) + row * w.row_stride;
    const uint8_t* scales = w.scale + row / w.block_rows * w.scale_stride;
    alignas(64) uint16_t values[kLinearGroup];
    for (int i = 0; i < kLinearGroup; ++i) {
      // Pairs as stored: even element first.
      const int pair = i % 32 / 2, sequence = i / 32 * 32 + (i % 2 == 0 ? 16 : 0) + pair;
      const int64_t col = k + linear_column(Lanes::kFp8, sequence);
      values[i] = col < w.cols ? tables.bf16(codes[col], scales[col / w.block_cols]) : uint16_t{0};
    }
    __m512i pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = _mm512_load_si512(values + 32 * i);
    store_group<kTileRows>(panel.out + place, pairs);
  });
}

void expand_bf16(const Panel& panel) {
  alignas(64) std::byte tail[kLinearGroup * 2];
  for_each_group<kTileRows, kPairBytes>(panel, [&](int64_t row, int64_t k, int64_t place) {
    const std::byte* from = group_at<16>(*panel.w, row, k, tail);
    __m512i pairs[4];
    for (int part = 0; part < 4; ++part) {
      _mm_prefetch(from + 64 * part + panel.next_bytes, _MM_HINT_T0);
      pairs[part] = _mm512_loadu_si512(from + 64 * part);
    }
    store_group<kTileRows>(panel.out + place, pairs);
  });
}

// The 4 scale bytes of 128 columns; those of padded columns are 1.0.
DSV4_INLINE const uint8_t* fp4_scales_at(const Weight& w, int64_t row, int64_t k, uint8_t* tail) {
  const uint8_t* from = w.scale + row * w.scale_stride + k / kFp4ScaleGroup;
  if (k + kLinearGroup <= w.cols) [[likely]]
    return from;
  std::memset(tail, 127, 4);
  std::memcpy(tail, from, static_cast<size_t>(ceil_div(w.cols - k, kFp4ScaleGroup)));
  return tail;
}

// Codes alone, and the lane scales for the register tile: [tile][group][row of the tile][16].
void expand_fp4(const Panel& panel, float* lane_scales) {
  const __m512i table = fp4_table();
  alignas(64) std::byte tail[kLinearGroup / 2];
  uint8_t scale_tail[4];
  for_each_group<kFp4TileRows, kPairBytes>(panel, [&](int64_t row, int64_t k, int64_t place) {
    __m512i values[4];
    fp4_to_bf16(_mm512_loadu_si512(group_at<4>(*panel.w, row, k, tail)), table, values);
    store_group<kFp4TileRows>(panel.out + place, values);
    // Tiles and groups follow each other as in the panel.
    constexpr int64_t kGroupBytes = kFp4TileRows * kLinearGroup * kPairBytes;
    const int64_t group = place / kGroupBytes, r = place % kGroupBytes / 64;
    _mm512_storeu_ps(lane_scales + (group * kFp4TileRows + r) * 16,
                     fp4_lane_scales(fp4_scales_at(*panel.w, row, k, scale_tail)));
  });
}

// Codes times scales, exact in bf16 for the scales that `can_fold` admits: exponents are added.
void expand_fp4_folded(const Panel& panel) {
  const __m512i table = fp4_table();
  // Byte g of the scales to the low byte of the 8 words of 16-byte piece g.
  alignas(64) uint8_t pick[64];
  for (int i = 0; i < 64; ++i) pick[i] = i % 2 == 0 ? static_cast<uint8_t>(i / 16) : 0x80;
  const __m512i words = _mm512_load_si512(pick);
  const __m512i bias = _mm512_set1_epi16(127 << 7), magnitude = _mm512_set1_epi16(0x7fff);
  alignas(64) std::byte tail[kLinearGroup / 2];
  uint8_t scale_tail[4];
  for_each_group<kFp4TileRows, kPairBytes>(panel, [&](int64_t row, int64_t k, int64_t place) {
    const std::byte* from = group_at<4>(*panel.w, row, k, tail);
    _mm_prefetch(from + panel.next_bytes, _MM_HINT_T0);
    __m512i values[4];
    fp4_to_bf16(_mm512_loadu_si512(from), table, values);
    int32_t scales;
    std::memcpy(&scales, fp4_scales_at(*panel.w, row, k, scale_tail), sizeof(scales));
    const __m512i exponent = _mm512_sub_epi16(
        _mm512_slli_epi16(_mm512_shuffle_epi8(_mm512_set1_epi32(scales), words), 7), bias);
    for (int part = 0; part < 4; ++part) {
      const __mmask32 nonzero = _mm512_test_epi16_mask(values[part], magnitude);
      values[part] = _mm512_mask_add_epi16(values[part], nonzero, values[part], exponent);
    }
    store_group<kFp4TileRows>(panel.out + place, values);
  });
}

// W as f32, whatever its type, 16 columns a step in their own order.
void expand_f32(const Panel& panel) {
  const Weight& w = *panel.w;
  const Fp8Tables& tables = fp8_tables();
  for_each_group<kTileRows, 4>(panel, [&](int64_t row, int64_t k, int64_t place) {
    alignas(64) float values[kLinearGroup];
    alignas(64) std::byte tail[kLinearGroup * 4];
    switch (w.dtype) {
      case DType::kF32: {
        const std::byte* from = group_at<32>(w, row, k, tail);
        for (int i = 0; i < 8; ++i)
          _mm512_store_ps(values + 16 * i, _mm512_loadu_ps(from + 64 * i));
        break;
      }
      case DType::kBf16: {
        const std::byte* from = group_at<16>(w, row, k, tail);
        for (int i = 0; i < 8; ++i) {
          const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i));
          _mm512_store_si512(values + 16 * i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
        break;
      }
      case DType::kF8E4M3: {
        const auto* codes = reinterpret_cast<const uint8_t*>(group_at<8>(w, row, k, tail));
        const uint8_t* scales = w.scale + row / w.block_rows * w.scale_stride;
        const int64_t last = std::min(w.cols, k + kLinearGroup) - 1;
        if (has_fast_scales(w)) {
          const Fp8Table table = load_table(tables, scales[k / w.block_cols]);
          for (int half = 0; half < 2; ++half) {
            __m512i first, second;
            fp8_to_bf16(_mm512_loadu_si512(codes + 64 * half), table, first, second);
            alignas(64) uint16_t parts[2][32];
            _mm512_store_si512(parts[0], first);
            _mm512_store_si512(parts[1], second);
            for (int q = 0; q < 4; ++q) {
              const __m256i bits =
                  _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(parts[1] + 8 * q),
                                      reinterpret_cast<const __m128i*>(parts[0] + 8 * q));
              _mm512_store_si512(values + 64 * half + 16 * q,
                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
            }
          }
        } else {
          for (int i = 0; i < kLinearGroup; ++i) {
            const int64_t col = std::min(k + i, last);
            values[i] = k + i > last
                            ? 0.0f
                            : bf16_to_f32(tables.bf16(codes[i], scales[col / w.block_cols]));
          }
        }
        break;
      }
      default: {
        const auto* codes = reinterpret_cast<const uint8_t*>(group_at<4>(w, row, k, tail));
        uint8_t scale_tail[4];
        const uint8_t* scales = fp4_scales_at(w, row, k, scale_tail);
        const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                            -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
        for (int i = 0; i < 8; ++i) {
          // 8 bytes -> 16 lanes with the code in the low 4 bits: byte b below, b >> 4 above.
          const __m512i bytes = _mm512_cvtepu8_epi64(
              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
          const __m512i lanes = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
          const uint8_t scale = scales[i / 2];
          // 2^-127 is no normal float: small scales are applied in two factors.
          const float first = scale == 255 ? e8m0_to_f32(255) : scale < 127 ? 0.5f : 1.0f;
          const float second =
              scale == 255 ? 1.0f : exp2_int(scale < 127 ? scale - 126 : scale - 127);
          const __m512 value =
              _mm512_mul_ps(_mm512_permutexvar_ps(lanes, table), _mm512_set1_ps(first));
          _mm512_store_ps(values + 16 * i, _mm512_mul_ps(value, _mm512_set1_ps(second)));
        }
      }
    }
    for (int i = 0; i < 8; ++i)
      _mm512_storeu_ps(panel.out + place + i * kTileRows * 64, _mm512_load_ps(values + 16 * i));
  });
}

// ---- register tiles: 4 rows of x times one tile of the panel; lane 4m + n of the result

// A step is a vector of each row. kPairs: of pairs, else of f32 in their own order.
template <bool kPairs>
__attribute__((noinline)) __m512 multiply(const std::byte* x, const std::byte* w, int64_t block) {
  __m512 acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
  const int64_t steps = kPairs ? block / 32 * kPairVectors : block / 16;
  for (int64_t step = 0; step < steps; ++step, x += 256, w += 256) {
    __m512i columns[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) columns[n] = _mm512_loadu_si512(w + 64 * n);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const __m512i row = _mm512_loadu_si512(x + 64 * m);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        __m512& sum = acc[4 * m + n];
        sum = kPairs
                  ? dot_vector(sum, columns[n], row)
                  : _mm512_fmadd_ps(_mm512_castsi512_ps(columns[n]), _mm512_castsi512_ps(row), sum);
      }
    }
  }
  return tree16(acc);
}

// Sums of 128 columns from zero; then they are added, scaled by the lane scales unless the weights
// hold their scales already (the sum then is s * sum exactly, so both give the same bits).
template <bool kFolded>
__attribute__((noinline)) __m512 multiply_fp4(const std::byte* x, const std::byte* w,
                                              const float* lane_scales, int64_t block) {
  __m512 total[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < block; k += kLinearGroup) {
    __m512 acc[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm512_setzero_ps();
#pragma GCC unroll(kPairVectors == 1 ? 4 : 1)
    for (int step = 0; step < 4 * kPairVectors; ++step, x += 256, w += 192) {
      __m512i columns[3];
#pragma GCC unroll 3
      for (int n = 0; n < 3; ++n) columns[n] = _mm512_loadu_si512(w + 64 * n);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        __m512i row = _mm512_loadu_si512(x + 64 * m);
        if constexpr (kPairVectors == 2) {
          // g++ would load it again for each FMA: 15 loads beside 12 FMAs are more than two ports
          // do.
          asm("" : "+v"(row));
        }
#pragma GCC unroll 3
        for (int n = 0; n < 3; ++n) acc[3 * m + n] = dot_vector(acc[3 * m + n], columns[n], row);
      }
    }
    if constexpr (kFolded) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) total[i] = _mm512_add_ps(total[i], acc[i]);
    } else {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i)
        total[i] = _mm512_fmadd_ps(acc[i], _mm512_loadu_ps(lane_scales + i % 3 * 16), total[i]);
      lane_scales += 3 * 16;
    }
  }
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    sums[i] = i % 4 == 3 ? _mm512_setzero_ps() : total[i / 4 * 3 + i % 4 % 3];
  return tree16(sums);
}

// ---- one tile of outputs

// Whether s * (sum of x * code) equals the sum of x * (s * code) bit for bit: no number on either
// way may leave f32's normal range. Non-zero sums are multiples of 2^(low - 127 - 7 - 1) (7 bits
// of x's mantissa, half-integer codes) and below 2^(high - 126) * 2^3 * 2^3 (|code| <= 6, 8
// products a lane).
bool can_fold(ExponentRange x, ExponentRange scale) {
  return x.low >= 9 && x.high <= 247 &&          // unscaled sums in [2^-126, 2^127]
         scale.low >= 2 && scale.high <= 251 &&  // scaled codes, 0.5 to 6
         x.low + scale.low >= 136 && x.high + scale.high <= 374;  // scaled sums
}

ExponentRange merge(ExponentRange a, ExponentRange b) {
  return {std::min(a.low, b.low), std::max(a.high, b.high)};
}

ExponentRange scale_range(const Panel& panel) {
  // A block has up to 32 scales a row: one masked load each.
  static_assert(kLinearBlock / kFp4ScaleGroup == 32);
  const Weight& w = *panel.w;
  const int64_t count = ceil_div(std::min(panel.block, w.cols - panel.k0), kFp4ScaleGroup);
  const auto live = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  const __m256i ones = _mm256_set1_epi8(-1);
  __m256i low = ones, high = _mm256_setzero_si256();
  for (int64_t row = panel.n; row < panel.n_end; ++row) {
    const uint8_t* scales = w.scale + row * w.scale_stride + panel.k0 / kFp4ScaleGroup;
    low = _mm256_min_epu8(low, _mm256_mask_loadu_epi8(ones, live, scales));
    high = _mm256_max_epu8(high, _mm256_maskz_loadu_epi8(live, scales));
  }
  alignas(32) uint8_t lows[32], highs[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lows), low);
  _mm256_store_si256(reinterpret_cast<__m256i*>(highs), high);
  return {*std::min_element(lows, lows + 32), *std::max_element(highs, highs + 32)};
}

struct TileScratch {
  std::byte* panel;
  float* sums;
  float* lane_scales;
  explicit TileScratch(std::byte* base)
      : panel(base),
        sums(reinterpret_cast<float*>(base + kPanelBytes)),
        lane_scales(reinterpret_cast<float*>(base + kPanelBytes + kSumBytes)) {}
};

enum class Expansion : uint8_t { kPairs, kF32, kFp4, kFp4Folded };

Expansion expand(const Panel& panel, Lanes lanes, ExponentRange range_of_x, float* lane_scales) {
  switch (lanes) {
    case Lanes::kFp8:
      has_fast_scales(*panel.w) ? expand_fp8(panel) : expand_fp8_general(panel);
      return Expansion::kPairs;
    case Lanes::kBf16:
      expand_bf16(panel);
      return Expansion::kPairs;
    case Lanes::kF32:
      expand_f32(panel);
      return Expansion::kF32;
    case Lanes::kFp4:
      if (can_fold(range_of_x, scale_range(panel))) {
        expand_fp4_folded(panel);
        return Expansion::kFp4Folded;
      }
      expand_fp4(panel, lane_scales);
      return Expansion::kFp4;
  }
  return Expansion::kPairs;
}

void multiply_panel(const LinearTile& tile, const Panel& panel, Expansion expansion,
                    const TileScratch& scratch) {
  const PreparedX& x = *tile.x;
  const int rows_of_tile = x.lanes == Lanes::kFp4 ? kFp4TileRows : kTileRows;
  const int64_t element_bytes = x.lanes == Lanes::kF32 ? 4 : kPairBytes;
  const int64_t tile_bytes = rows_of_tile * panel.block * element_bytes;
  const int64_t tiles = ceil_div(panel.n_end - panel.n, rows_of_tile);
  float* sum = scratch.sums;
  for (int64_t m = tile.m_begin; m < tile.m_end; m += kLinearTileRows) {
    const std::byte* rows = x.data + linear_tile_offset(x, m, panel.k0) * element_bytes;
    for (int64_t j = 0; j < tiles; ++j, sum += 16) {
      const std::byte* columns = scratch.panel + j * tile_bytes;
      const float* scales =
          scratch.lane_scales + j * rows_of_tile * panel.block / kLinearGroup * 16;
      __m512 part;
      switch (expansion) {
        case Expansion::kPairs:
          part = multiply<true>(rows, columns, panel.block);
          break;
        case Expansion::kF32:
          part = multiply<false>(rows, columns, panel.block);
          break;
        case Expansion::kFp4:
          part = multiply_fp4<false>(rows, columns, scales, panel.block);
          break;
        default:
          part = multiply_fp4<true>(rows, columns, nullptr, panel.block);
      }
      if (panel.k0 != 0) part = _mm512_add_ps(_mm512_loadu_ps(sum), part);
      _mm512_storeu_ps(sum, part);
    }
  }
}

void store(const LinearTile& tile, const Panel& panel, const float* sums) {
  const int rows_of_tile = tile.x->lanes == Lanes::kFp4 ? kFp4TileRows : kTileRows;
  const int64_t tiles = ceil_div(panel.n_end - panel.n, rows_of_tile);
  for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
    const int64_t local = m - tile.m_begin;
    const float* row = sums + local / 4 * tiles * 16 + local % 4 * 4;
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t n = panel.n + j * rows_of_tile;
      store_row(tile.out, m, n, _mm_loadu_ps(row + j * 16),
                std::min<int64_t>(rows_of_tile, panel.n_end - n));
    }
  }
}

void compute_tiled(const LinearTile& tile) {
  const PreparedX& x = *tile.x;
  const TileScratch scratch(tile.scratch);
  ExponentRange range;
  if (x.lanes == Lanes::kFp4) {
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) range = merge(range, x.range[m]);
  }
  const int64_t rows = panel_rows(x.lanes, tile.m_end - tile.m_begin);
  const int64_t row_bytes =
      tile.w->row_stride * size_of(tile.w->dtype) / (tile.w->dtype == DType::kF4E2M1 ? 2 : 1);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += rows) {
    Panel panel{.w = tile.w,
                .n = n,
                .n_end = std::min(tile.n_end, n + rows),
                .k0 = 0,
                .block = 0,
                .out = scratch.panel,
                .next_bytes = 0};
    for (int64_t k0 = 0; k0 < x.padded_cols; k0 += kLinearBlock) {
      panel.k0 = k0;
      panel.block = std::min<int64_t>(kLinearBlock, x.padded_cols - k0);
      const int64_t block_bytes = kLinearBlock * row_bytes / tile.w->row_stride;
      panel.next_bytes = k0 + kLinearBlock < x.padded_cols
                             ? block_bytes
                             : rows * row_bytes - k0 / kLinearBlock * block_bytes;
      const Expansion expansion = expand(panel, x.lanes, range, scratch.lane_scales);
      multiply_panel(tile, panel, expansion, scratch);
    }
    store(tile, panel, scratch.sums);
  }
}

LinearBlocking tiled_blocking(Lanes lanes, int64_t rows, int64_t total_rows, int num_threads) {
  // Equal tiles of x rather than a small last one.
  const int64_t max_rows = lanes == Lanes::kF32 ? kMaxRowsOfXF32 : kMaxRowsOfX;
  const int64_t m_block =
      round_up(ceil_div(rows, ceil_div(rows, max_rows)), int64_t{kLinearTileRows});
  int64_t n_block = panel_rows(lanes, m_block);
  const int64_t tiles_of_x = ceil_div(rows, m_block);
  // Several small panels make one chunk, so that W is read in long runs, while every thread still
  // gets at least four chunks.
  const int64_t chunk_rows = total_rows * tiles_of_x / (4 * num_threads);
  n_block *= std::clamp<int64_t>(chunk_rows / n_block, 1, ceil_div(int64_t{256}, n_block));
  return {m_block, n_block};
}

}  // namespace
}  // namespace dsv4::cpu
