// The AVX2 candidate of `linear` (FMA and F16C: Haswell, Zen and later), with the bits of all
// others.
//
// Both operands are widened to f32 in the sequence of linear.h; the 16 lanes are two ymm, and every
// kind of weight is then the same chain of fused multiply-adds:
//   panel     48 rows of W x 1024 columns, expanded to tiles [step][3 rows][16 lanes]
//   register  4 rows of x x 3 of W, first lanes 0-7 over the whole block, then lanes 8-15:
//             12 accumulators, 7 loads and 12 FMA a step
// A row of x alone goes through the same code with a 1 x 3 tile and a panel that stays in L1.
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstring>

#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/linear.h"
#include "core/numbers.h"

#define DSV4_INLINE inline __attribute__((always_inline))

namespace dsv4::cpu {
namespace {

constexpr int kTileColumns = 3;  // rows of W in a register tile
constexpr int64_t kMaxRowsOfX = 256;
constexpr int64_t kPanelRows = 48;  // 192 KiB expanded: fits the L2 cache of most
constexpr int64_t kFewRows = 3;     // up to here x is not tiled
constexpr int64_t kSmallPanel = 3;  // 12 KiB: stays in L1
constexpr int kGroupsOfBlock = kLinearBlock / kLinearGroup;
constexpr int64_t kStep = kTileColumns * kLinearLanes;  // floats of a step of a panel tile

constexpr int64_t kPanelBytes = kPanelRows * kLinearBlock * 4;
constexpr int64_t kSumBytes = kMaxRowsOfX * kPanelRows * 4;
constexpr int64_t kScaleBytes = kPanelRows * kGroupsOfBlock * kLinearLanes * 4;

// ---- x

// Places of the sequence -> columns, within 128, for each kind of lanes.
constexpr auto kColumns = [] {
  std::array<std::array<uint8_t, kLinearGroup>, 4> columns{};
  for (const Lanes lanes : {Lanes::kBf16, Lanes::kFp8, Lanes::kFp4, Lanes::kF32}) {
    for (int p = 0; p < kLinearGroup; ++p) {
      columns[static_cast<size_t>(lanes)][static_cast<size_t>(p)] =
          static_cast<uint8_t>(linear_column(lanes, p));
    }
  }
  return columns;
}();

// Nearest E4M3 value (saturating) of v / 2^exponent, times 2^exponent.
DSV4_INLINE __m256 quantise8(__m256 v, __m256 inverse_scale, __m256 scale) {
  const __m256 sign_bit = _mm256_set1_ps(-0.0f);
  const __m256 value = _mm256_mul_ps(v, inverse_scale);
  const __m256 sign = _mm256_and_ps(value, sign_bit);
  const __m256 magnitude =
      _mm256_min_ps(_mm256_andnot_ps(sign_bit, value), _mm256_set1_ps(kE4m3Max));
  // Normal codes keep 3 mantissa bits; subnormal ones are multiples of 2^-9, where adding
  // 1.5 * 2^14 rounds.
  const __m256i bits = _mm256_castps_si256(magnitude);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff)), odd),
                       _mm256_set1_epi32(static_cast<int>(0xfff00000u)));
  const __m256 magic = _mm256_set1_ps(24576.0f);
  const __m256 subnormal = _mm256_sub_ps(_mm256_add_ps(magnitude, magic), magic);
  const __m256 small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);
  const __m256 code = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), subnormal, small);
  return _mm256_or_ps(_mm256_mul_ps(code, scale), sign);
}

void quantise(float* values, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < kLinearGroup; i += 8) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t amax_bits = 0;
  for (const uint32_t lane : lanes) amax_bits = std::max(amax_bits, lane);
  if (amax_bits >= 0x7f800000u) {  // infinity or NaN: the group has no scale
    for (int64_t i = 0; i < count; ++i) values[i] = bf16_to_f32(0x7fc0);
    return;
  }
  const float amax = std::max(std::bit_cast<float>(amax_bits), 1e-4f);
  const int exponent = ceil_log2_ratio(amax, kE4m3Max);
  const __m256 scale = _mm256_set1_ps(exp2_int(exponent));
  const __m256 inverse_scale = _mm256_set1_ps(exp2_int(-exponent));
  for (int i = 0; i < kLinearGroup; i += 8)
    _mm256_store_ps(values + i, quantise8(_mm256_load_ps(values + i), inverse_scale, scale));
}

void prepare_row(const PreparedX& x, int64_t m) {
  const auto& columns = kColumns[static_cast<size_t>(x.lanes)];
  const int64_t tile = m / x.tile_rows * x.tile_rows;
  for (int64_t k = 0; k < x.padded_cols; k += kLinearGroup) {
    alignas(32) float values[kLinearGroup] = {};
    if (m < x.rows) {
      const int64_t count = std::min<int64_t>(kLinearGroup, x.x.shape[1] - k);
      const int64_t element = (x.row_begin + m) * x.x.strides[0] + k;
      if (x.x.dtype == DType::kF32) {
        std::memcpy(values, static_cast<const float*>(x.x.data) + element,
                    static_cast<size_t>(count) * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(x.x.data) + element;
        for (int64_t i = 0; i < count; ++i) values[i] = bf16_to_f32(from[i]);
      }
      if (x.quantise) quantise(values, count);
    }
    const int64_t k0 = k / kLinearBlock * kLinearBlock;
    float* to = reinterpret_cast<float*>(x.data) + linear_tile_offset(x, tile, k0) +
                (k - k0) * x.tile_rows + (m - tile) * kLinearLanes;
    for (int p = 0; p < kLinearGroup; ++p)
      to[p / kLinearLanes * kLinearLanes * x.tile_rows + p % kLinearLanes] = values[columns[p]];
  }
}

void prepare(const PreparedX& x, int64_t m_begin, int64_t m_end) {
  if (m_end == x.rows) m_end = x.padded_rows;
  for (int64_t m = m_begin; m < m_end; ++m) prepare_row(x, m);
}

// ---- W: 128 columns of a row to f32, in sequence, steps kStep floats apart

DSV4_INLINE void store16(float* to, int64_t step, __m256 low, __m256 high) {
  _mm256_storeu_ps(to + step * kStep, low);
  _mm256_storeu_ps(to + step * kStep + 8, high);
}

DSV4_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Each dword holds a pair of bf16: the odd element above.
void expand_bf16_pairs(const uint16_t* w, float* to) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < 4; ++i) {
    const __m256i a = load(w + 32 * i), b = load(w + 32 * i + 16);
    store16(to, 2 * i, _mm256_castsi256_ps(_mm256_and_si256(a, odd)),
            _mm256_castsi256_ps(_mm256_and_si256(b, odd)));
    store16(to, 2 * i + 1, _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)));
  }
}

// 8 codes in the low bytes of words -> value * 2^8 scale: E4M3 shifted into f16 is 2^-8 of it.
DSV4_INLINE __m256 fp8_to_f32(__m128i codes, __m256 scale_times_256) {
  const __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7f), codes), 8);
  const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), scale_times_256);
}

// The largest scale whose product with 2^8 is a float. The rare others go code by code.
constexpr uint8_t kMaxFastScale = 246;

DSV4_INLINE __m256 scale_times_256(uint8_t scale) {
  return _mm256_set1_ps(exp2_int(scale - 127 + 8));
}

// Lanes::kFp8: of every 64 codes the low 8 bytes of each 16, then the high 8, in pairs.
void expand_fp8_pairs(const uint8_t* w, uint8_t scale_byte, float* to) {
  const __m256 scale = scale_times_256(scale_byte);
  const __m128i low_byte = _mm_set1_epi16(0xff);
  for (int i = 0; i < 2; ++i) {
    const auto* from = reinterpret_cast<const __m128i*>(w + 64 * i);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    const __m128i parts[2][2] = {{_mm_unpacklo_epi64(a, b), _mm_unpacklo_epi64(c, d)},
                                 {_mm_unpackhi_epi64(a, b), _mm_unpackhi_epi64(c, d)}};
    for (int half = 0; half < 2; ++half) {
      const auto [low, high] = parts[half];
      store16(to, 4 * i + 2 * half, fp8_to_f32(_mm_srli_epi16(low, 8), scale),
              fp8_to_f32(_mm_srli_epi16(high, 8), scale));
      store16(to, 4 * i + 2 * half + 1, fp8_to_f32(_mm_and_si128(low, low_byte), scale),
              fp8_to_f32(_mm_and_si128(high, low_byte), scale));
    }
  }
}

void expand_fp8_natural(const uint8_t* w, uint8_t scale_byte, float* to) {
  const __m256 scale = scale_times_256(scale_byte);
  for (int step = 0; step < 8; ++step) {
    const __m256i words =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * step)));
    store16(to, step, fp8_to_f32(_mm256_castsi256_si128(words), scale),
            fp8_to_f32(_mm256_extracti128_si256(words, 1), scale));
  }
}

// Code in the low 4 bits of each dword -> value without scale.
DSV4_INLINE __m256 fp4_to_f32(__m256i codes) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28);
  return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, codes), _mm256_castsi256_ps(sign));
}

// Lanes::kFp4: lane l holds 16-bit words 2l and 2l + 1 (below and above) of 64 bytes.
void expand_fp4_pairs(const uint8_t* w, float* to) {
  const __m256i a = load(w), b = load(w + 32);
  for (int nibble = 0; nibble < 4; ++nibble) {
    const __m128i even = _mm_cvtsi32_si128(4 * nibble), odd = _mm_cvtsi32_si128(4 * nibble + 16);
    store16(to, 2 * nibble, fp4_to_f32(_mm256_srl_epi32(a, odd)),
            fp4_to_f32(_mm256_srl_epi32(b, odd)));
    store16(to, 2 * nibble + 1, fp4_to_f32(_mm256_srl_epi32(a, even)),
            fp4_to_f32(_mm256_srl_epi32(b, even)));
  }
}

void expand_fp4_natural(const uint8_t* w, const uint8_t* scales, float* to) {
  for (int step = 0; step < 8; ++step) {
    const uint8_t scale = scales[step / 2];
    // 2^-127 is no normal float: small scales are applied in two factors.
    const float first = scale == 255 ? e8m0_to_f32(255) : scale < 127 ? 0.5f : 1.0f;
    const float second = scale == 255 ? 1.0f : exp2_int(scale < 127 ? scale - 126 : scale - 127);
    __m256 values[2];
    for (int half = 0; half < 2; ++half) {
      int32_t four;
      std::memcpy(&four, w + 8 * step + 4 * half, sizeof(four));
      const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      const __m256 value = fp4_to_f32(_mm256_srlv_epi32(_mm256_set1_epi32(four), shifts));
      values[half] =
          _mm256_mul_ps(_mm256_mul_ps(value, _mm256_set1_ps(first)), _mm256_set1_ps(second));
    }
    store16(to, step, values[0], values[1]);
  }
}

void expand_f32(const float* w, float* to) {
  for (int step = 0; step < 8; ++step)
    store16(to, step, _mm256_loadu_ps(w + 16 * step), _mm256_loadu_ps(w + 16 * step + 8));
}

void expand_bf16_natural(const uint16_t* w, float* to) {
  for (int step = 0; step < 8; ++step) {
    const auto* from = reinterpret_cast<const __m128i*>(w + 16 * step);
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1));
    store16(to, step, _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)));
  }
}

// Any block sizes and scales, code by code.
void expand_fp8_general(const Weight& w, Lanes lanes, int64_t row, int64_t k, float* to) {
  const Fp8Tables& tables = fp8_tables();
  const auto* codes = static_cast<const uint8_t*>(w.data) + row * w.row_stride;
  const uint8_t* scales = w.scale + row / w.block_rows * w.scale_stride;
  const auto& columns = kColumns[static_cast<size_t>(lanes)];
  for (int p = 0; p < kLinearGroup; ++p) {
    const int64_t col = k + columns[p];
    const uint16_t bits =
        col < w.cols ? tables.bf16(codes[col], scales[col / w.block_cols]) : uint16_t{0};
    to[p / kLinearLanes * kStep + p % kLinearLanes] = bf16_to_f32(bits);
  }
}

// Columns [k, k + 128) of one row. A partial last group is copied and padded with zeros.
void expand_group(const Weight& w, Lanes lanes, int64_t row, int64_t k, float* to) {
  const int64_t bits = w.dtype == DType::kF4E2M1 ? 4 : 8 * size_of(w.dtype);
  const auto* from = static_cast<const uint8_t*>(w.data) + (row * w.row_stride + k) * bits / 8;
  alignas(32) uint8_t tail[kLinearGroup * 4];
  if (k + kLinearGroup > w.cols) {
    std::memset(tail, 0, sizeof(tail));
    std::memcpy(tail, from, static_cast<size_t>((w.cols - k) * bits / 8));
    from = tail;
  }
  const bool natural = lanes == Lanes::kF32;
  switch (w.dtype) {
    case DType::kF8E4M3: {
      const uint8_t scale = w.scale[row / w.block_rows * w.scale_stride + k / w.block_cols];
      if (w.block_cols % kLinearGroup != 0 || scale > kMaxFastScale)
        return expand_fp8_general(w, lanes, row, k, to);
      return natural ? expand_fp8_natural(from, scale, to) : expand_fp8_pairs(from, scale, to);
    }
    case DType::kF4E2M1: {
      if (!natural) return expand_fp4_pairs(from, to);
      uint8_t scales[4] = {127, 127, 127, 127};
      const int64_t count = std::min<int64_t>(4, ceil_div(w.cols - k, kFp4ScaleGroup));
      std::memcpy(scales, w.scale + row * w.scale_stride + k / kFp4ScaleGroup,
                  static_cast<size_t>(count));
      return expand_fp4_natural(from, scales, to);
    }
    case DType::kBf16: {
      const auto* values = reinterpret_cast<const uint16_t*>(from);
      return natural ? expand_bf16_natural(values, to) : expand_bf16_pairs(values, to);
    }
    default:
      return expand_f32(reinterpret_cast<const float*>(from), to);
  }
}

// Scale of every lane for 128 columns of FP4: lanes 4g..4g+3 = group g; byte 0 is zero.
void fp4_lane_scales(const Weight& w, int64_t row, int64_t k, float* to) {
  for (int g = 0; g < kLinearGroup / kFp4ScaleGroup; ++g) {
    float value = 1.0f;
    if (k + g * kFp4ScaleGroup < w.cols) {
      const uint8_t byte = w.scale[row * w.scale_stride + k / kFp4ScaleGroup + g];
      value = byte == 0 ? 0.0f : e8m0_to_f32(byte);
    }
    for (int i = 0; i < 4; ++i) to[4 * g + i] = value;
  }
}

// ---- register tiles

// Tree over lanes 0-7 of an accumulator whose lanes l and l + 8 were added.
DSV4_INLINE float tree8(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// kRows rows of x (interleaved) times one tile of a panel. scales: [group][3][16] for FP4.
template <int kRows, bool kFp4>
__attribute__((noinline)) void multiply(const float* x, const float* w, const float* scales,
                                        int64_t block, float (&sums)[kRows][kTileColumns]) {
  __m256 halves[2][kRows][kTileColumns];
  for (int half = 0; half < 2; ++half) {
    const float* x_at = x + 8 * half;
    const float* w_at = w + 8 * half;
    const float* scale_at = scales + 8 * half;
    auto& total = halves[half];
    __m256 acc[kRows][kTileColumns];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
      for (int n = 0; n < kTileColumns; ++n) {
        acc[m][n] = _mm256_setzero_ps();
        if constexpr (kFp4) total[m][n] = _mm256_setzero_ps();
      }
    }
    const int64_t run = kFp4 ? kLinearGroup : block;
    for (int64_t k = 0; k < block; k += run) {
      for (int64_t step = 0; step < run; step += kLinearLanes) {
        __m256 columns[kTileColumns];
#pragma GCC unroll 3
        for (int n = 0; n < kTileColumns; ++n)
          columns[n] = _mm256_loadu_ps(w_at + kLinearLanes * n);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const __m256 row = _mm256_loadu_ps(x_at + kLinearLanes * m);
#pragma GCC unroll 3
          for (int n = 0; n < kTileColumns; ++n)
            acc[m][n] = _mm256_fmadd_ps(columns[n], row, acc[m][n]);
        }
        x_at += kRows * kLinearLanes;
        w_at += kStep;
      }
      if constexpr (kFp4) {
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
          for (int n = 0; n < kTileColumns; ++n) {
            total[m][n] = _mm256_fmadd_ps(acc[m][n], _mm256_loadu_ps(scale_at + kLinearLanes * n),
                                          total[m][n]);
            acc[m][n] = _mm256_setzero_ps();
          }
        }
        scale_at += kStep;
      }
    }
    if constexpr (!kFp4) {
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
        for (int n = 0; n < kTileColumns; ++n) total[m][n] = acc[m][n];
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kTileColumns; ++n)
      sums[m][n] = tree8(_mm256_add_ps(halves[0][m][n], halves[1][m][n]));
  }
}

// ---- one tile of outputs

struct Panel {
  int64_t n, n_end;
  int64_t k0, block;
};

struct TileScratch {
  float* panel;
  float* sums;  // [rows of x][kPanelRows]
  float* scales;
  explicit TileScratch(std::byte* base)
      : panel(reinterpret_cast<float*>(base)),
        sums(reinterpret_cast<float*>(base + kPanelBytes)),
        scales(reinterpret_cast<float*>(base + kPanelBytes + kSumBytes)) {}
};

// Rows past the end repeat the last one: their outputs are not stored.
void expand(const LinearTile& tile, const Panel& panel, const TileScratch& scratch) {
  for (int64_t n = panel.n; n < panel.n_end; n += kTileColumns) {
    for (int r = 0; r < kTileColumns; ++r) {
      const int64_t row = std::min(n + r, panel.n_end - 1);
      const int64_t tile_floats = (n - panel.n) * panel.block;
      for (int64_t k = 0; k < panel.block; k += kLinearGroup) {
        float* to = scratch.panel + tile_floats + k * kTileColumns + r * kLinearLanes;
        expand_group(*tile.w, tile.x->lanes, row, panel.k0 + k, to);
        if (tile.x->lanes == Lanes::kFp4) {
          fp4_lane_scales(*tile.w, row, panel.k0 + k,
                          scratch.scales + (tile_floats / kTileColumns + k) / kLinearGroup * kStep +
                              r * kLinearLanes);
        }
      }
    }
  }
}

template <int kRows, bool kFp4>
void multiply_panel(const LinearTile& tile, const Panel& panel, const TileScratch& scratch) {
  const PreparedX& x = *tile.x;
  for (int64_t m = tile.m_begin; m < tile.m_end; m += kRows) {
    const float* rows = reinterpret_cast<const float*>(x.data) + linear_tile_offset(x, m, panel.k0);
    for (int64_t n = 0; n < panel.n_end - panel.n; n += kTileColumns) {
      float sums[kRows][kTileColumns];
      multiply<kRows, kFp4>(rows, scratch.panel + n * panel.block,
                            scratch.scales + n / kTileColumns * panel.block / kLinearGroup * kStep,
                            panel.block, sums);
      for (int i = 0; i < kRows; ++i) {
        float* to = scratch.sums + (m - tile.m_begin + i) * kPanelRows + n;
        for (int j = 0; j < kTileColumns; ++j)
          to[j] = panel.k0 == 0 ? sums[i][j] : to[j] + sums[i][j];
      }
    }
  }
}

void store(const LinearTile& tile, const Panel& panel, const float* sums) {
  const Tensor& out = tile.out;
  for (int64_t m = tile.m_begin; m < tile.m_end; ++m, sums += kPanelRows) {
    const int64_t element = m * out.strides[0] + panel.n;
    const int64_t count = panel.n_end - panel.n;
    if (out.dtype == DType::kF32) {
      std::memcpy(static_cast<float*>(out.data) + element, sums,
                  static_cast<size_t>(count) * sizeof(float));
    } else {
      uint16_t* to = static_cast<uint16_t*>(out.data) + element;
      for (int64_t i = 0; i < count; ++i) to[i] = f32_to_bf16(sums[i]);
    }
  }
}

void compute(const LinearTile& tile) {
  const PreparedX& x = *tile.x;
  const TileScratch scratch(tile.scratch);
  const bool few = x.tile_rows == 1, fp4 = x.lanes == Lanes::kFp4;
  const auto multiply_it =
      few ? (fp4 ? multiply_panel<1, true> : multiply_panel<1, false>)
          : (fp4 ? multiply_panel<kLinearTileRows, true> : multiply_panel<kLinearTileRows, false>);
  const int64_t rows = few ? kSmallPanel : kPanelRows;
  for (int64_t n = tile.n_begin; n < tile.n_end; n += rows) {
    Panel panel{n, std::min(tile.n_end, n + rows), 0, 0};
    for (; panel.k0 < x.padded_cols; panel.k0 += kLinearBlock) {
      panel.block = std::min<int64_t>(kLinearBlock, x.padded_cols - panel.k0);
      expand(tile, panel, scratch);
      multiply_it(tile, panel, scratch);
    }
    store(tile, panel, scratch.sums);
  }
}

int tile_rows(const Weight&, Lanes, int64_t rows) {
  return rows <= kFewRows ? 1 : kLinearTileRows;
}

LinearBlocking blocking(const PreparedX& x, const Weight&, int64_t total_rows, int num_threads) {
  const int64_t m_block = round_up(ceil_div(x.rows, ceil_div(x.rows, kMaxRowsOfX)), x.tile_rows);
  if (x.tile_rows != 1) return {m_block, kPanelRows};
  // Long runs of W for the prefetcher, and some chunks per thread for balance.
  const int64_t rows = round_up(ceil_div(total_rows, int64_t{8} * num_threads), kSmallPanel);
  return {m_block, std::clamp<int64_t>(rows, kPanelRows, 4 * kPanelRows)};
}

}  // namespace

const LinearKernels kLinearAvx2{
    .tile_rows = tile_rows,
    .blocking = blocking,
    .element_bytes_bf16 = sizeof(float),
    .scratch_bytes = kPanelBytes + kSumBytes + kScaleBytes,
    .prepare = prepare,
    .compute = compute,
};

}  // namespace dsv4::cpu
