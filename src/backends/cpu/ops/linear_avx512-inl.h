// Building blocks of the AVX-512 kernels of `linear`; included only by files compiled for it.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 sees the deliberately undefined operands inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/linear.h"

#define DSV4_INLINE inline __attribute__((always_inline))

namespace dsv4::cpu::avx512 {

/// acc + the products of 16 pairs: fma(even, fma(odd, acc)) in every lane.
DSV4_INLINE __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// ---- FP8: two byte permutes look up both bytes of a bf16, the sign is OR'ed in

struct Fp8Table {
  __m512i high_0, high_1, low_0, low_1;
};

DSV4_INLINE Fp8Table load_table(const Fp8Tables& tables, uint8_t scale) {
  const uint8_t* bytes = tables.bytes[scale];
  return {_mm512_load_si512(bytes), _mm512_load_si512(bytes + 64), _mm512_load_si512(bytes + 128),
          _mm512_load_si512(bytes + 192)};
}

/// 64 codes -> 2 x 32 bf16; `first` gets the low 8 codes of every 16, `second` the high 8
/// (Lanes::kFp8).
DSV4_INLINE void fp8_to_bf16(__m512i codes, const Fp8Table& table, __m512i& first,
                             __m512i& second) {
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  __m512i high = _mm512_permutex2var_epi8(table.high_0, codes, table.high_1);
  const __m512i low = _mm512_permutex2var_epi8(table.low_0, codes, table.low_1);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), kOrAnd);
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

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
  // Nearest-even; sums below 2^-126 were flushed before, so VCVTNEPS2BF16 flushes nothing more.
  const auto bits = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(values));
  uint16_t* to = static_cast<uint16_t*>(out.data) + element;
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), bits);
  if (count == 4) {
    std::memcpy(to, lanes, 8);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
}

}  // namespace dsv4::cpu::avx512
