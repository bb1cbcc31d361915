// Weights of linear_avx2.cc: 128 columns of a row of W to f32, in the sequence of linear.h. Each
// kind hands its 8 steps of 16 lanes to a `sink(step, lanes 0-7, lanes 8-15)`: tiles store them,
// the kernel for few rows multiplies them.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstring>
#include <type_traits>

#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/linear.h"
#include "core/numbers.h"

#define DSV4_INLINE inline __attribute__((always_inline))

namespace dsv4::cpu {
namespace {  // this is a part of linear_avx2.cc

/// Places of the sequence -> columns, within 128, for each kind of lanes.
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

}  // namespace
}  // namespace dsv4::cpu
