// The AVX2 candidate of `linear` (FMA and F16C: Haswell, Zen and later), with the bits of all
// others.
//
// Both operands are widened to f32 in the sequence of linear.h; the 16 lanes are two ymm, and every
// kind of weight is then the same chain of fused multiply-adds:
//   panel     48 rows of W x 1024 columns, expanded to tiles [step][3 rows][16 lanes]
//   register  4 rows of x x 3 of W, first lanes 0-7 over the whole block, then lanes 8-15:
//             12 accumulators, 7 loads and 12 FMA a step
// Up to 4 rows of x, W is widened in registers and never stored.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/linear.h"
#include "core/numbers.h"

#define DSV4_INLINE inline __attribute__((always_inline))

namespace dsv4::cpu {
namespace {

constexpr int kTileColumns = 3;  // rows of W in a register tile
constexpr int64_t kMaxRowsOfX = 256;
constexpr int64_t kPanelRows = 48;  // 192 KiB expanded: fits the L2 cache of most
constexpr int64_t kFewRows = 4;     // up to here x is not tiled
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

// ---- W: 128 columns of a row to f32, in sequence. Each kind hands its 8 steps of 16 lanes to a
// `sink(step, lanes 0-7, lanes 8-15)`: the tiles store them, the streaming kernel multiplies them.

DSV4_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
DSV4_INLINE __m128i load_half(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

/// A row of W: data and scales from its first column on.
struct WeightRow {
  const Weight* w;
  const uint8_t* data;
  const uint8_t* scales;

  WeightRow() = default;
  WeightRow(const Weight& weight, int64_t row) : w(&weight) {
    const bool fp4 = weight.dtype == DType::kF4E2M1;
    const int64_t bytes = weight.row_stride * size_of(weight.dtype) / (fp4 ? 2 : 1);
    data = static_cast<const uint8_t*>(weight.data) + row * bytes;
    scales = weight.scale == nullptr
                 ? nullptr
                 : weight.scale + (fp4 ? row : row / weight.block_rows) * weight.scale_stride;
  }
  /// 128 columns at k; a partial last group is copied to `tail` and padded with zeros.
  template <int kBits>
  DSV4_INLINE const uint8_t* group(int64_t k, uint8_t* tail) const {
    const uint8_t* from = data + k * kBits / 8;
    if (k + kLinearGroup <= w->cols) [[likely]]
      return from;
    std::memset(tail, 0, kLinearGroup * kBits / 8);
    std::memcpy(tail, from, static_cast<size_t>((w->cols - k) * kBits / 8));
    return tail;
  }
};

constexpr int kMaxTailBytes = kLinearGroup * 4;

template <typename Sink>
DSV4_INLINE void sink_bits(const Sink& sink, int step, __m256i low, __m256i high) {
  sink(step, _mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
}

// Each dword holds a pair of bf16: the odd element above.
struct Bf16Pairs {
  template <typename Sink>
  static DSV4_INLINE void expand(const WeightRow& row, int64_t k, const Sink& sink) {
    alignas(32) uint8_t tail[kMaxTailBytes];
    const uint8_t* from = row.group<16>(k, tail);
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i a = load(from + 64 * i), b = load(from + 64 * i + 32);
      sink_bits(sink, 2 * i, _mm256_and_si256(a, odd), _mm256_and_si256(b, odd));
      sink_bits(sink, 2 * i + 1, _mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
    }
  }
};

struct Bf16Natural {
  template <typename Sink>
  static DSV4_INLINE void expand(const WeightRow& row, int64_t k, const Sink& sink) {
    alignas(32) uint8_t tail[kMaxTailBytes];
    const uint8_t* from = row.group<16>(k, tail);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      const __m256i low = _mm256_cvtepu16_epi32(load_half(from + 32 * step));
      const __m256i high = _mm256_cvtepu16_epi32(load_half(from + 32 * step + 16));
      sink_bits(sink, step, _mm256_slli_epi32(low, 16), _mm256_slli_epi32(high, 16));
    }
  }
};

struct F32Natural {
  template <typename Sink>
  static DSV4_INLINE void expand(const WeightRow& row, int64_t k, const Sink& sink) {
    alignas(32) uint8_t tail[kMaxTailBytes];
    const uint8_t* from = row.group<32>(k, tail);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step)
      sink_bits(sink, step, load(from + 64 * step), load(from + 64 * step + 32));
  }
};

// 128 columns with any block sizes, scales and codes, one by one.
__attribute__((noinline)) void expand_fp8_general(const WeightRow& row, Lanes lanes, int64_t k,
                                                  float* values) {
  const Weight& w = *row.w;
  const Fp8Tables& tables = fp8_tables();
  for (int p = 0; p < kLinearGroup; ++p) {
    const int64_t col = k + kColumns[static_cast<size_t>(lanes)][static_cast<size_t>(p)];
    values[p] = col < w.cols
                    ? bf16_to_f32(tables.bf16(row.data[col], row.scales[col / w.block_cols]))
                    : 0.0f;
  }
}

// A code that is neither zero, subnormal nor NaN becomes bf16 by a shift and an addition to its
// exponent; that stays in bf16's normal range for scales from here ...
constexpr uint8_t kMinFastScale = 7;
// ... to here, where 2^8 * scale is still a float, too (expand_fp8_careful).
constexpr uint8_t kMaxFastScale = 246;

DSV4_INLINE bool has_fast_scale(const Weight& w, uint8_t scale) {
  return w.block_cols % kLinearGroup == 0 && scale <= kMaxFastScale;
}

// 128 columns with any codes. Into memory, not into a sink: the sink's accumulators would have to
// live there, too.
template <Lanes kLanes>
__attribute__((noinline)) void expand_fp8_careful(const WeightRow& row, int64_t k, uint8_t scale,
                                                  const uint8_t* from, float* values) {
  const __m256i magnitude = _mm256_set1_epi8(0x7f);
  __m256i nan = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    nan = _mm256_or_si256(
        nan, _mm256_cmpeq_epi8(_mm256_and_si256(load(from + 32 * i), magnitude), magnitude));
  }
  if (!has_fast_scale(*row.w, scale) || _mm256_movemask_epi8(nan) != 0) {
    expand_fp8_general(row, kLanes, k, values);
    return;
  }
  // E4M3 shifted into f16 is 2^-8 of its value, so one multiplication by 2^8 * scale finishes it.
  const __m256 factor = _mm256_set1_ps(exp2_int(scale - 127 + 8));
  // 16 words with a code in the high byte (the low byte is dropped) -> 16 values.
  const auto store = [&](int step, __m256i words) {
    // The arithmetic shift copies the sign; the mask removes the copy and what was below.
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(words, 1),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
    float* at = values + step * kLinearLanes;
    _mm256_store_ps(at, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), factor));
    _mm256_store_ps(at + 8,
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), factor));
  };
  if constexpr (kLanes == Lanes::kFp8) {
    // Of every 64 codes the low 8 bytes of each 16, then the high 8, in pairs.
    for (int i = 0; i < 2; ++i) {
      // Pieces 0 and 2, 1 and 3 of 16 bytes, so that unpacking within halves joins neighbours.
      const __m256i a = _mm256_set_m128i(load_half(from + 64 * i + 32), load_half(from + 64 * i));
      const __m256i b =
          _mm256_set_m128i(load_half(from + 64 * i + 48), load_half(from + 64 * i + 16));
      for (int half = 0; half < 2; ++half) {
        const __m256i pairs = half == 0 ? _mm256_unpacklo_epi64(a, b) : _mm256_unpackhi_epi64(a, b);
        store(4 * i + 2 * half, pairs);
        store(4 * i + 2 * half + 1, _mm256_slli_epi16(pairs, 8));
      }
    }
  } else {
    for (int step = 0; step < 8; ++step)
      store(step, _mm256_slli_epi16(_mm256_cvtepu8_epi16(load_half(from + 16 * step)), 8));
  }
}

template <Lanes kLanes>
struct Fp8Kind {
  // 16 times an ordinary code with its sign (the low 4 bits are dropped) -> bf16.
  static DSV4_INLINE __m256i to_bf16(__m256i words, __m256i exponent) {
    const __m256i sign_and_code = _mm256_set1_epi16(static_cast<int16_t>(0x87f0));
    return _mm256_add_epi16(_mm256_and_si256(words, sign_and_code), exponent);
  }

  // Twice the magnitude less 16 is 0..236 for ordinary codes.
  static DSV4_INLINE __m256i rank(__m256i codes) {
    return _mm256_sub_epi8(_mm256_add_epi8(codes, codes), _mm256_set1_epi8(16));
  }
  static DSV4_INLINE bool all_ordinary(__m256i largest_rank) {
    const __m256i beyond = _mm256_subs_epu8(largest_rank, _mm256_set1_epi8(static_cast<char>(236)));
    return _mm256_testz_si256(beyond, beyond) != 0;
  }

  /// Whether `expand_ordinary` does for `count` columns from k on.
  static DSV4_INLINE bool ordinary(const WeightRow& row, int64_t k, int64_t count) {
    if (row.w->block_cols != kLinearGroup || k + count > row.w->cols) return false;
    __m256i largest = _mm256_setzero_si256();
    uint8_t low = 255, high = 0;
    for (int64_t group = k; group < k + count; group += kLinearGroup) {
      const uint8_t scale = row.scales[group / kLinearGroup];
      low = std::min(low, scale);
      high = std::max(high, scale);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        largest = _mm256_max_epu8(largest, rank(load(row.data + group + 32 * i)));
    }
    return low >= kMinFastScale && high <= kMaxFastScale && all_ordinary(largest);
  }
  /// Steps 2 * quarter and 2 * quarter + 1 of 128 such columns.
  template <typename Sink>
  static DSV4_INLINE void expand_ordinary(const WeightRow& row, int64_t k, int quarter,
                                          const Sink& sink) {
    const uint8_t scale = row.scales[k / kLinearGroup];
    expand_by_shift(row.data + k, exponent_of(scale), quarter, sink);
  }

  template <typename Sink>
  static DSV4_INLINE void expand(const WeightRow& row, int64_t k, const Sink& sink) {
    const Weight& w = *row.w;
    const uint8_t scale =
        row.scales[static_cast<uint32_t>(k) / static_cast<uint32_t>(w.block_cols)];
    alignas(32) uint8_t tail[kMaxTailBytes];
    const uint8_t* from = row.group<8>(k, tail);
    __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) largest = _mm256_max_epu8(largest, rank(load(from + 32 * i)));
    if (!has_fast_scale(w, scale) || scale < kMinFastScale || !all_ordinary(largest)) [[unlikely]] {
      alignas(32) float values[kLinearGroup];
      expand_fp8_careful<kLanes>(row, k, scale, from, values);
      for (int step = 0; step < 8; ++step)
        sink(step, _mm256_load_ps(values + 16 * step), _mm256_load_ps(values + 16 * step + 8));
      return;
    }
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter)
      expand_by_shift(from, exponent_of(scale), quarter, sink);
  }

 private:
  static DSV4_INLINE __m256i exponent_of(uint8_t scale) {
    return _mm256_set1_epi16(static_cast<int16_t>((scale - kMinFastScale) << 7));
  }
  template <typename Sink>
  static DSV4_INLINE void expand_by_shift(const uint8_t* from, __m256i exponent, int quarter,
                                          const Sink& sink) {
    if constexpr (kLanes == Lanes::kFp8) {
      // Of every 64 codes the low 8 bytes of each 16, then the high 8, in pairs. Unpacking words
      // brings pairs l and l + 8 into one dword: lanes 0-7 below, lanes 8-15 above.
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
      const auto split = [&](int step, __m256i bf16) __attribute__((always_inline)) {
        sink_bits(sink, step, _mm256_slli_epi32(bf16, 16), _mm256_and_si256(bf16, upper));
      };
      const uint8_t* codes = from + 64 * (quarter / 2);
      const __m256i a = load(codes), b = load(codes + 32);
      const __m256i pairs =
          quarter % 2 == 0 ? _mm256_unpacklo_epi16(a, b) : _mm256_unpackhi_epi16(a, b);
      split(2 * quarter, to_bf16(_mm256_srai_epi16(pairs, 4), exponent));
      // 16 times the low code with its sign: one instruction on a port that has no shifts to do.
      split(2 * quarter + 1, to_bf16(_mm256_maddubs_epi16(_mm256_set1_epi16(16), pairs), exponent));
    } else {
      const __m256i zero = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int step = 2 * quarter; step < 2 * quarter + 2; ++step) {
        const __m256i codes = _mm256_cvtepi8_epi16(load_half(from + 16 * step));
        // Unpacking works within halves: quarters 0 and 1 of the words go to different ones.
        const __m256i bf16 = _mm256_permute4x64_epi64(
            to_bf16(_mm256_slli_epi16(codes, 4), exponent), _MM_SHUFFLE(3, 1, 2, 0));
        sink_bits(sink, step, _mm256_unpacklo_epi16(zero, bf16), _mm256_unpackhi_epi16(zero, bf16));
      }
    }
  }
};
using Fp8Pairs = Fp8Kind<Lanes::kFp8>;
using Fp8Natural = Fp8Kind<Lanes::kF32>;

// Code in the low 4 bits of each dword -> value without scale.
DSV4_INLINE __m256 fp4_to_f32(__m256i codes) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28);
  return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, codes), _mm256_castsi256_ps(sign));
}

// Lane l holds 16-bit words 2l and 2l + 1 (below and above) of 64 bytes. Scales come later.
struct Fp4Pairs {
  template <typename Sink>
  static DSV4_INLINE void expand(const WeightRow& row, int64_t k, const Sink& sink) {
    alignas(32) uint8_t tail[kMaxTailBytes];
    const uint8_t* from = row.group<4>(k, tail);
    const __m256i a = load(from), b = load(from + 32);
#pragma GCC unroll 4
    for (int nibble = 0; nibble < 4; ++nibble) {
      const int even = 4 * nibble, odd = 4 * nibble + 16;
      sink(2 * nibble, fp4_to_f32(_mm256_srli_epi32(a, odd)),
           fp4_to_f32(_mm256_srli_epi32(b, odd)));
      sink(2 * nibble + 1, fp4_to_f32(_mm256_srli_epi32(a, even)),
           fp4_to_f32(_mm256_srli_epi32(b, even)));
    }
  }
};

struct Fp4Natural {
  template <typename Sink>
  static DSV4_INLINE void expand(const WeightRow& row, int64_t k, const Sink& sink) {
    alignas(32) uint8_t tail[kMaxTailBytes];
    const uint8_t* from = row.group<4>(k, tail);
    uint8_t scales[4] = {127, 127, 127, 127};
    const int64_t count = std::min<int64_t>(4, ceil_div(row.w->cols - k, kFp4ScaleGroup));
    std::memcpy(scales, row.scales + k / kFp4ScaleGroup, static_cast<size_t>(count));
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    for (int step = 0; step < 8; ++step) {
      const uint8_t scale = scales[step / 2];
      // 2^-127 is no normal float: small scales are applied in two factors.
      const float first = scale == 255 ? e8m0_to_f32(255) : scale < 127 ? 0.5f : 1.0f;
      const float second = scale == 255 ? 1.0f : exp2_int(scale < 127 ? scale - 126 : scale - 127);
      __m256 values[2];
      for (int half = 0; half < 2; ++half) {
        int32_t codes;
        std::memcpy(&codes, from + 8 * step + 4 * half, sizeof(codes));
        const __m256 value = fp4_to_f32(_mm256_srlv_epi32(_mm256_set1_epi32(codes), shifts));
        values[half] =
            _mm256_mul_ps(_mm256_mul_ps(value, _mm256_set1_ps(first)), _mm256_set1_ps(second));
      }
      sink(step, values[0], values[1]);
    }
  }
};

// Scale of every lane for 128 columns of FP4: lanes 4g..4g+3 = group g; byte 0 is zero, 255 NaN.
DSV4_INLINE void fp4_lane_scales(const WeightRow& row, int64_t k, __m256& low, __m256& high) {
  int32_t bytes = 0x7f7f7f7f;
  const int64_t count = std::min<int64_t>(4, ceil_div(row.w->cols - k, kFp4ScaleGroup));
  const uint8_t* from = row.scales + k / kFp4ScaleGroup;
  if (count == 4) [[likely]] {
    std::memcpy(&bytes, from, 4);
  } else {
    std::memcpy(&bytes, from, static_cast<size_t>(count));
  }
  const __m128i exponent = _mm_slli_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)), 23);
  const __m128i nan = _mm_cmpeq_epi32(exponent, _mm_set1_epi32(0x7f800000));
  const __m256 scales = _mm256_castsi256_ps(_mm256_castsi128_si256(_mm_or_si128(exponent, nan)));
  low = _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  high = _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3));
}

/// Calls f.template operator()<Kind>() for the kind of weight and lanes.
template <typename F>
DSV4_INLINE void with_kind(DType dtype, Lanes lanes, F&& f) {
  const bool natural = lanes == Lanes::kF32;
  switch (dtype) {
    case DType::kF8E4M3:
      return natural ? f.template operator()<Fp8Natural>() : f.template operator()<Fp8Pairs>();
    case DType::kF4E2M1:
      return natural ? f.template operator()<Fp4Natural>() : f.template operator()<Fp4Pairs>();
    case DType::kBf16:
      return natural ? f.template operator()<Bf16Natural>() : f.template operator()<Bf16Pairs>();
    default:
      return f.template operator()<F32Natural>();
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
template <typename Kind>
void expand(const LinearTile& tile, const Panel& panel, const TileScratch& scratch) {
  constexpr bool kFp4 = std::is_same_v<Kind, Fp4Pairs>;
  float* to = scratch.panel;
  float* scales = scratch.scales;
  for (int64_t n = panel.n; n < panel.n_end; n += kTileColumns) {
    WeightRow rows[kTileColumns];
    for (int r = 0; r < kTileColumns; ++r)
      rows[r] = WeightRow(*tile.w, std::min(n + r, panel.n_end - 1));
    for (int64_t k = panel.k0; k < panel.k0 + panel.block; k += kLinearGroup, to += 8 * kStep) {
      for (int r = 0; r < kTileColumns; ++r) {
        Kind::expand(rows[r], k, [&](int step, __m256 low, __m256 high) {
          float* at = to + step * kStep + r * kLinearLanes;
          _mm256_storeu_ps(at, low);
          _mm256_storeu_ps(at + 8, high);
        });
        if constexpr (kFp4) {
          __m256 low, high;
          fp4_lane_scales(rows[r], k, low, high);
          _mm256_storeu_ps(scales + r * kLinearLanes, low);
          _mm256_storeu_ps(scales + r * kLinearLanes + 8, high);
        }
      }
      if constexpr (kFp4) scales += kStep;
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

void store_one(const Tensor& out, int64_t row, int64_t col, float value) {
  const int64_t element = row * out.strides[0] + col;
  if (out.dtype == DType::kF32) {
    static_cast<float*>(out.data)[element] = value;
  } else {
    static_cast<uint16_t*>(out.data)[element] = f32_to_bf16(value);
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

template <typename Kind>
void compute_tiled(const LinearTile& tile) {
  const PreparedX& x = *tile.x;
  const TileScratch scratch(tile.scratch);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += kPanelRows) {
    Panel panel{n, std::min(tile.n_end, n + kPanelRows), 0, 0};
    for (; panel.k0 < x.padded_cols; panel.k0 += kLinearBlock) {
      panel.block = std::min<int64_t>(kLinearBlock, x.padded_cols - panel.k0);
      expand<Kind>(tile, panel, scratch);
      multiply_panel<kLinearTileRows, std::is_same_v<Kind, Fp4Pairs>>(tile, panel, scratch);
    }
    store(tile, panel, scratch.sums);
  }
}

// ---- few rows of x: W is widened in registers and never stored. Two rows of W at a time, from two
// stripes of the tile, so that each stream of memory is long (one from 3 rows of x on: registers).

// `ordinary` looks at a whole block before it is multiplied, and waits for memory unless it was
// fetched beside the block before. Rows follow each other: this reaches into the next one.
constexpr int kPrefetchBytes = 2048;

// Sums of one block of K. With kOrdinary nothing in the loop calls a function, so that the
// accumulators stay in registers.
template <typename Kind, int kStreams, int M, bool kOrdinary>
DSV4_INLINE void stream_block(const WeightRow (&rows)[kStreams], int64_t k0, int64_t block,
                              const float* x_block, float (&sums)[kStreams][M]) {
  constexpr bool kFp4 = std::is_same_v<Kind, Fp4Pairs>;
  __m256 total[kStreams][M][2];
#pragma GCC unroll 2
  for (int r = 0; r < kStreams; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[r][m][0] = total[r][m][1] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < block; k += kLinearGroup) {
    const auto add_to = [&](__m256(&acc)[M][2]) {
      return [&](int step, __m256 low, __m256 high) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const float* at = x_block + m * block + k + step * kLinearLanes;
          acc[m][0] = _mm256_fmadd_ps(low, _mm256_loadu_ps(at), acc[m][0]);
          acc[m][1] = _mm256_fmadd_ps(high, _mm256_loadu_ps(at + 8), acc[m][1]);
        }
      };
    };
    if constexpr (kOrdinary) {
#pragma GCC unroll 2
      for (int r = 0; r < kStreams; ++r) {
        const auto* ahead = reinterpret_cast<const char*>(rows[r].data + k0 + k) + kPrefetchBytes;
        _mm_prefetch(ahead, _MM_HINT_T0);
        _mm_prefetch(ahead + 64, _MM_HINT_T0);
      }
      // In turns: a row's sums are two chains, whose waiting steps would fill the scheduler.
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
#pragma GCC unroll 2
        for (int r = 0; r < kStreams; ++r)
          Kind::expand_ordinary(rows[r], k0 + k, quarter, add_to(total[r]));
      }
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < kStreams; ++r) {
        if constexpr (!kFp4) {
          Kind::expand(rows[r], k0 + k, add_to(total[r]));
          continue;
        }
        __m256 acc[M][2];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
        Kind::expand(rows[r], k0 + k, add_to(acc));
        __m256 low, high;
        fp4_lane_scales(rows[r], k0 + k, low, high);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          total[r][m][0] = _mm256_fmadd_ps(acc[m][0], low, total[r][m][0]);
          total[r][m][1] = _mm256_fmadd_ps(acc[m][1], high, total[r][m][1]);
        }
      }
    }
  }
  for (int r = 0; r < kStreams; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = tree8(_mm256_add_ps(total[r][m][0], total[r][m][1]));
  }
}

template <typename Kind, int M>
__attribute__((noinline)) void stream(const LinearTile& tile) {
  constexpr int kStreams = M <= 2 ? 2 : 1;
  const PreparedX& x = *tile.x;
  const int64_t stripe = ceil_div(tile.n_end - tile.n_begin, kStreams);
  for (int64_t i = 0; i < stripe; ++i) {
    int64_t n[kStreams];
    WeightRow rows[kStreams];
    for (int r = 0; r < kStreams; ++r) {
      n[r] = std::min(tile.n_begin + r * stripe + i, tile.n_end - 1);
      rows[r] = WeightRow(*tile.w, n[r]);
    }
    float y[kStreams][M] = {};
    for (int64_t k0 = 0; k0 < x.padded_cols; k0 += kLinearBlock) {
      const int64_t block = std::min<int64_t>(kLinearBlock, x.padded_cols - k0);
      const float* x_block = reinterpret_cast<const float*>(x.data) + k0 * x.padded_rows;
      float sums[kStreams][M];
      bool ordinary = false;
      if constexpr (requires { &Kind::ordinary; }) {
        ordinary = true;
        for (const WeightRow& row : rows) ordinary = ordinary && Kind::ordinary(row, k0, block);
        if (ordinary) stream_block<Kind, kStreams, M, true>(rows, k0, block, x_block, sums);
      }
      if (!ordinary) stream_block<Kind, kStreams, M, false>(rows, k0, block, x_block, sums);
      for (int r = 0; r < kStreams; ++r) {
        for (int m = 0; m < M; ++m) {
          y[r][m] = k0 == 0 ? sums[r][m] : y[r][m] + sums[r][m];
        }
      }
    }
    for (int r = 0; r < kStreams; ++r) {
      for (int m = 0; m < M; ++m) store_one(tile.out, tile.m_begin + m, n[r], y[r][m]);
    }
  }
}

void compute(const LinearTile& tile) {
  with_kind(tile.w->dtype, tile.x->lanes, [&]<typename Kind>() {
    if (tile.x->tile_rows != 1) return compute_tiled<Kind>(tile);
    static_assert(kFewRows == 4);
    switch (tile.x->rows) {
      case 1:
        return stream<Kind, 1>(tile);
      case 2:
        return stream<Kind, 2>(tile);
      case 3:
        return stream<Kind, 3>(tile);
      default:
        return stream<Kind, 4>(tile);
    }
  });
}

int tile_rows(const Weight&, Lanes, int64_t rows) {
  return rows <= kFewRows ? 1 : kLinearTileRows;
}

LinearBlocking blocking(const PreparedX& x, const Weight&, int64_t total_rows, int num_threads) {
  const int64_t m_block = round_up(ceil_div(x.rows, ceil_div(x.rows, kMaxRowsOfX)), x.tile_rows);
  if (x.tile_rows != 1) return {m_block, kPanelRows};
  // Long runs of W for the prefetcher, and some chunks per thread for balance.
  const int64_t rows = round_up(ceil_div(total_rows, int64_t{8} * num_threads), int64_t{16});
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

#endif  // __x86_64__
