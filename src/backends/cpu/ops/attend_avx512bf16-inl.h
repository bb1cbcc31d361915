// AVX-512 BF16 and VBMI pieces that attention and indexer scores share. Included by
// *_avx512bf16.cc only.
#pragma once
#include "backends/cpu/ops/attend_lanes-inl.h"

namespace dsv4::cpu {
namespace {

inline __m512 dot(__m512 acc, __m512i x, __m512i y) {
  return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y);
}

/// Heads [0, lanes) of q, bf16, as dim pairs: out [dim / 2][lanes] dwords; heads past `heads` are
/// zero. `lanes` is a multiple of 16, dim of 32.
inline void pack_q_pairs(const uint16_t* q, int64_t stride, int heads, int lanes, int dim,
                         uint32_t* out) {
  for (int first = 0; first < lanes; first += 16) {
    for (int d = 0; d < dim; d += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = first + i < heads ? _mm512_loadu_si512(q + (first + i) * stride + d)
                                 : _mm512_setzero_si512();
      }
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (d / 2 + i) * lanes + first, r[i]);
    }
  }
}

/// Tables of fp8_tables.h for one scale byte, in registers.
struct ByteTables {
  __m512i high0, high1, low0, low1;
};
inline ByteTables load_tables(const uint8_t* bytes) {
  return {_mm512_load_si512(bytes), _mm512_load_si512(bytes + 64), _mm512_load_si512(bytes + 128),
          _mm512_load_si512(bytes + 192)};
}
/// 64 E4M3 codes with their scale -> 64 bf16 in order: lo = 0..31, hi = 32..63.
inline void convert64(const uint8_t* codes, const ByteTables& t, __m512i& lo, __m512i& hi) {
  // VPUNPCK works inside 128-bit lanes: lane q gets codes 8q.. and 32 + 8q..
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i w = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes));
  const __m512i low = _mm512_permutex2var_epi8(t.low0, w, t.low1);
  __m512i high = _mm512_permutex2var_epi8(t.high0, w, t.high1);
  high = _mm512_ternarylogic_epi32(high, w, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
  lo = _mm512_unpacklo_epi8(low, high);
  hi = _mm512_unpackhi_epi8(low, high);
}

}  // namespace
}  // namespace dsv4::cpu
