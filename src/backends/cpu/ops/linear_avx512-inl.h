// Building blocks of the AVX-512 kernels of `linear`. These headers are compiled twice, with and
// without BF16 and VBMI instructions (linear_avx512bf16.cc, linear_avx512.cc); this one holds what
// differs: how bf16 operands lie in memory, their dot product, FP8 codes, rounding to bf16.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 sees the deliberately undefined operands inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/linear.h"

#define DSV4_INLINE inline __attribute__((always_inline))

namespace dsv4::cpu {
namespace {

/// Most rows of x that the streaming kernels take; above, tiles pay.
constexpr int kMaxStreamedRows = 8;
constexpr int kMaxStreamedRowsFp8 = 16;  // up to kMaxStreamedColsFp8 columns
constexpr int64_t kMaxStreamedColsFp8 = 2048;
constexpr int kMaxStreamedRowsF32 = 4;

/// True when the FP8 kernels read the scales of `w` directly: one scale per 128 columns or a power
/// of two more. Other block sizes are expanded code by code.
inline bool has_fast_scales(const Weight& w) {
  return w.block_cols >= kLinearGroup && std::has_single_bit(static_cast<uint32_t>(w.block_cols));
}

// ---- pairs: 32 columns as bf16, the odd element of each dword above. Prepared x and panels of W
// hold them as kPairVectors vectors of 64 bytes.

#if defined(__AVX512BF16__)
constexpr int kPairVectors = 1;

DSV4_INLINE void store_pairs(std::byte* to, int64_t, __m512i pairs) {
  _mm512_storeu_si512(to, pairs);
}
/// acc + the products of one vector of x and one of W: for pairs fma(even, fma(odd, acc)) in every
/// lane.
DSV4_INLINE __m512 dot_vector(__m512 acc, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}
DSV4_INLINE __m512 dot_pairs(__m512 acc, __m512i w, const std::byte* x) {
  return dot_vector(acc, w, _mm512_loadu_si512(x));
}
#else
constexpr int kPairVectors = 2;  // the odd elements as f32, then the even ones

DSV4_INLINE __m512i odd_elements(__m512i pairs) {
  return _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
DSV4_INLINE __m512i even_elements(__m512i pairs) {
  return _mm512_slli_epi32(pairs, 16);
}
/// The vectors lie `stride_bytes` apart.
DSV4_INLINE void store_pairs(std::byte* to, int64_t stride_bytes, __m512i pairs) {
  _mm512_storeu_si512(to, odd_elements(pairs));
  _mm512_storeu_si512(to + stride_bytes, even_elements(pairs));
}
DSV4_INLINE __m512 dot_vector(__m512 acc, __m512i w, __m512i x) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), acc);
}
DSV4_INLINE __m512 dot_pairs(__m512 acc, __m512i w, const std::byte* x) {
  acc = dot_vector(acc, odd_elements(w), _mm512_loadu_si512(x));
  return dot_vector(acc, even_elements(w), _mm512_loadu_si512(x + 64));
}
#endif

// ---- FP8: 64 codes with their scale -> 2 x 32 bf16; `first` gets the low 8 codes of every 16,
// `second` the high 8 (Lanes::kFp8)

#if defined(__AVX512BF16__)
// Two byte permutes look up both bytes of a bf16, the sign is OR'ed in.
struct Fp8Table {
  __m512i high_0, high_1, low_0, low_1;
};

DSV4_INLINE Fp8Table load_table(const Fp8Tables& tables, uint8_t scale) {
  const uint8_t* bytes = tables.bytes[scale];
  return {_mm512_load_si512(bytes), _mm512_load_si512(bytes + 64), _mm512_load_si512(bytes + 128),
          _mm512_load_si512(bytes + 192)};
}

DSV4_INLINE void fp8_to_bf16(__m512i codes, const Fp8Table& table, __m512i& first,
                             __m512i& second) {
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  asm("" : "+v"(codes));  // permutes overwrite an operand: g++ would load the codes for each again
  __m512i high = _mm512_permutex2var_epi8(table.high_0, codes, table.high_1);
  const __m512i low = _mm512_permutex2var_epi8(table.low_0, codes, table.low_1);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), kOrAnd);
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}
#else
// A code that is neither zero, subnormal nor NaN becomes bf16 by a shift and an addition to its
// exponent, which stays in bf16's normal range for scales in 7..246. All others are looked up: in
// line, because a call would have the accumulators around it kept in memory.
struct Fp8Table {
  const uint8_t* bytes;
  __m512i exponent;
  bool ordinary_scale;
};

DSV4_INLINE Fp8Table load_table(const Fp8Tables& tables, uint8_t scale) {
  return {tables.bytes[scale], _mm512_set1_epi16(static_cast<int16_t>((scale - 7) * 128)),
          scale >= 7 && scale <= 246};
}

DSV4_INLINE void fp8_to_bf16(__m512i codes, const Fp8Table& table, __m512i& first,
                             __m512i& second) {
  const __m512i zero = _mm512_setzero_si512();
  first = _mm512_unpacklo_epi8(zero, codes);  // words, the code above
  second = _mm512_unpackhi_epi8(zero, codes);
  // Twice the magnitude less 16 is 0..236 for ordinary codes.
  const __m512i rank = _mm512_sub_epi8(_mm512_add_epi8(codes, codes), _mm512_set1_epi8(16));
  const __mmask64 beyond = _mm512_cmpgt_epu8_mask(rank, _mm512_set1_epi8(static_cast<char>(236)));
  if (table.ordinary_scale && beyond == 0) [[likely]] {
    const auto convert = [&](__m512i words) __attribute__((always_inline)) {
      const __m512i magnitude_and_sign = _mm512_set1_epi16(static_cast<int16_t>(0x87f0));
      return _mm512_add_epi16(_mm512_and_si512(_mm512_srai_epi16(words, 4), magnitude_and_sign),
                              table.exponent);
    };
    first = convert(first);
    second = convert(second);
    return;
  }
  __m512i values[4];  // of 32 magnitudes each
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto bytes = [&](int at) __attribute__((always_inline)) {
      return _mm512_cvtepu8_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.bytes + at + 32 * i)));
    };
    values[i] = _mm512_or_si512(_mm512_slli_epi16(bytes(0), 8), bytes(128));
  }
  const auto look_up = [&](__m512i words) __attribute__((always_inline)) {
    const __m512i code = _mm512_srli_epi16(words, 8);  // the permutes take its low 6 bits
    const __m512i low = _mm512_permutex2var_epi16(values[0], code, values[1]);
    const __m512i high = _mm512_permutex2var_epi16(values[2], code, values[3]);
    const __mmask32 is_high = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x4000));
    const __m512i sign = _mm512_and_si512(words, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    return _mm512_or_si512(_mm512_mask_mov_epi16(low, is_high, high), sign);
  };
  first = look_up(first);
  second = look_up(second);
}
#endif

// ---- FP4: nibble t of every 16-bit word by a 32-entry word permute

/// The bf16 of the 16 codes, twice: VPERMW takes 5 index bits, and the fifth is a neighbour's.
DSV4_INLINE __m512i fp4_table() {
  alignas(64) static constexpr uint16_t kValues[32] = {
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  //
      0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,  //
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  //
      0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
  return _mm512_load_si512(kValues);
}

/// 128 codes -> 4 x 32 bf16 without scale; values[t] holds elements 4w + t (Lanes::kFp4).
DSV4_INLINE void fp4_to_bf16(__m512i codes, __m512i table, __m512i (&values)[4]) {
  values[0] = _mm512_permutexvar_epi16(codes, table);
  values[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
  values[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
  values[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
}

/// 4 scale bytes of 128 columns -> 2^(byte - 127) in 16 lanes, lanes 4g..4g+3 = group g. Byte 0 is
/// zero, byte 255 NaN.
DSV4_INLINE __m512 fp4_lane_scales(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  // Byte g to the top of lanes 4g..4g+3, then down to the exponent field.
  alignas(64) static constexpr uint32_t kGroups[16] = {
      0x00808080, 0x00808080, 0x00808080, 0x00808080, 0x01808080, 0x01808080,
      0x01808080, 0x01808080, 0x02808080, 0x02808080, 0x02808080, 0x02808080,
      0x03808080, 0x03808080, 0x03808080, 0x03808080};
  const __m512i groups = _mm512_load_si512(kGroups);
  const __m512i words = _mm512_set1_epi32(static_cast<int>(word));
  const __m512i exponent = _mm512_srli_epi32(_mm512_shuffle_epi8(words, groups), 1);
  // The test for a byte of 255 runs beside the vector pipes, which are the scarce ones here.
  if (((~word - 0x01010101u) & word & 0x80808080u) != 0) [[unlikely]] {
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(exponent, nan, _mm512_set1_epi32(0x7fc00000)));
  }
  return _mm512_castsi512_ps(exponent);
}

// ---- the tree (l, l+8), (l, l+4), (l, l+2), (l, l+1), for several accumulators at once

/// Halves of a and b: lanes l and l+8 added; a below, b above.
DSV4_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
/// Neighbouring quarters added: those of a below, those of b above.
DSV4_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/// Sums of four accumulators, in order.
DSV4_INLINE __m128 tree4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 sum = add_quarters(add_halves(a, b), add_halves(c, d));  // quarter i: 4 lanes of input i
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sum));
}

/// Sums of 16 accumulators, in order: 30 shuffles and 15 adds, beside the dot products' pipes.
DSV4_INLINE __m512 tree16(const __m512 (&acc)[16]) {
  __m512 quarters[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    quarters[i] = add_quarters(add_halves(acc[4 * i], acc[4 * i + 1]),
                               add_halves(acc[4 * i + 2], acc[4 * i + 3]));
  }
  const auto add_pairs = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 low = add_pairs(quarters[0], quarters[1]),
               high = add_pairs(quarters[2], quarters[3]);
  const __m512 sums =
      _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
  // Quarter i holds inputs i, 4+i, 8+i, 12+i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, sums);
}

// ---- results

/// 4 words, nearest-even. Sums below 2^-126 were flushed before.
DSV4_INLINE __m128i round_to_bf16(__m128 values) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m128i>(_mm_cvtneps_pbh(values));
#else
  const __m128i bits = _mm_castps_si128(values);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i up = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x400000));
  const __m128i rounded =
      _mm_mask_mov_epi32(up, _mm_cmp_ps_mask(values, values, _CMP_UNORD_Q), quiet);
  return _mm_cvtepi32_epi16(_mm_srli_epi32(rounded, 16));
#endif
}

DSV4_INLINE void store_row(const Tensor& out, int64_t row, int64_t col, __m128 values,
                           int64_t count) {
  const int64_t element = row * out.strides[0] + col;
  if (out.dtype == DType::kF32) {
    float* to = static_cast<float*>(out.data) + element;
    if (count == 4) {
      _mm_storeu_ps(to, values);
    } else {
      alignas(16) float lanes[4];
      _mm_store_ps(lanes, values);
      for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
    }
    return;
  }
  const __m128i bits = round_to_bf16(values);
  uint16_t* to = static_cast<uint16_t*>(out.data) + element;
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), bits);
  if (count == 4) {
    std::memcpy(to, lanes, 8);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
}

}  // namespace
}  // namespace dsv4::cpu
