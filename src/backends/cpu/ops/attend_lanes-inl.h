// Vectors of f32 lanes for the files compiled per instruction set, and the parts of attention that
// are written once for all of them. Included by files compiled for one instruction set only;
// everything sits in an anonymous namespace, so that no code of one is linked into another file.
// All callers hold FlushSubnormals.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// g++ 12's own intrinsics read a variable that they leave uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

#include "backends/cpu/ops/attend.h"
#include "backends/cpu/ops/attend_arith.h"

namespace dsv4::cpu {
namespace {

#if defined(__AVX512F__)
/// 16 rows of 16 dwords -> their transpose.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

struct Lanes16 {
  static constexpr int kLanes = 16;
  using F = __m512;
  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
  /// 2^n for whole n in [-126, 127].
  static F pow2(F n) {
    const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(i, 23));
  }
  /// x < limit ? 0 : value
  static F zero_below(F x, float limit, F value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(limit), _CMP_NLT_UQ), value);
  }
  /// Upper halves after rounding to bf16, nearest-even; NaN stays NaN.
  static F round_bf16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i rounded =
        _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    return _mm512_castsi512_ps(
        _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  /// x holds bf16 values.
  static void store_bf16(uint16_t* p, F x) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  /// E4M3 codes -> value * 2^-8 through binary16 (exact); the two NaN codes give NaN.
  static F load_e4m3(const uint8_t* p) {
    const __m256i codes =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)),
                                         _mm256_set1_epi16(0x7c00));
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(codes, 7), 15);
    const __m256i half =
        _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), nan), sign);
    return _mm512_cvtph_ps(half);
  }
  /// See Lanes8.
  static constexpr int kCodes = 64;
  static bool store_ordinary_e4m3(const uint8_t* codes, int16_t offset, float* values) {
    const __m512i code = _mm512_loadu_si512(codes);
    const __m512i rank = _mm512_sub_epi8(_mm512_add_epi8(code, code), _mm512_set1_epi8(16));
    if (_mm512_cmpgt_epu8_mask(rank, _mm512_set1_epi8(static_cast<char>(236))) != 0) [[unlikely]]
      return false;
    const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i dealt = _mm512_permutexvar_epi32(deal, code), zero = _mm512_setzero_si512();
    const __m512i magnitude_and_sign = _mm512_set1_epi16(static_cast<int16_t>(0x87f0));
    const auto store = [&](__m512i words, float* to) {
      const __m512i bf16 =
          _mm512_add_epi16(_mm512_and_si512(_mm512_srai_epi16(words, 4), magnitude_and_sign),
                           _mm512_set1_epi16(offset));
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(zero, bf16));
      _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(zero, bf16));
    };
    store(_mm512_unpacklo_epi8(zero, dealt), values);
    store(_mm512_unpackhi_epi8(zero, dealt), values + 32);
    return true;
  }
  /// Element j of vector i <-> element i of vector j.
  static void transpose(F (&rows)[kLanes]) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(rows[i]);
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(r[i]);
  }
};
#endif

struct Lanes8 {
  static constexpr int kLanes = 8;
  using F = __m256;
  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F pow2(F n) {
    const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
  }
  static F zero_below(F x, float limit, F value) {
    return _mm256_and_ps(_mm256_cmp_ps(x, set(limit), _CMP_NLT_UQ), value);
  }
  static F round_bf16(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 rounded = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet),
                                            _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_and_ps(rounded,
                         _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store_bf16(uint16_t* p, F x) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static F load_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
    const __m128i nan =
        _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7c00));
    const __m128i sign = _mm_slli_epi16(_mm_srli_epi16(codes, 7), 15);
    return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), nan), sign));
  }
  /// kCodes values = e4m3(codes) * 2^(scale - 127), offset = (scale - 7) << 7 of a scale in 7..246.
  /// False, and nothing stored, when a code is zero, subnormal or NaN; all others become bf16 by a
  /// shift and an addition to their exponent.
  static constexpr int kCodes = 32;
  static bool store_ordinary_e4m3(const uint8_t* codes, int16_t offset, float* values) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    // Twice the magnitude less 16 is 0..236 for ordinary codes.
    const __m256i beyond =
        _mm256_subs_epu8(_mm256_sub_epi8(_mm256_add_epi8(code, code), _mm256_set1_epi8(16)),
                         _mm256_set1_epi8(static_cast<char>(236)));
    if (!_mm256_testz_si256(beyond, beyond)) [[unlikely]]
      return false;
    // Unpacking twice works within 128 bits: fours of codes are dealt to them in turns.
    const __m256i dealt =
        _mm256_permutevar8x32_epi32(code, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m256i zero = _mm256_setzero_si256();
    const __m256i magnitude_and_sign = _mm256_set1_epi16(static_cast<int16_t>(0x87f0));
    const auto store = [&](__m256i words, float* to) {  // codes are the upper bytes
      const __m256i bf16 =
          _mm256_add_epi16(_mm256_and_si256(_mm256_srai_epi16(words, 4), magnitude_and_sign),
                           _mm256_set1_epi16(offset));
      _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, bf16)));
      _mm256_storeu_ps(to + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, bf16)));
    };
    store(_mm256_unpacklo_epi8(zero, dealt), values);
    store(_mm256_unpackhi_epi8(zero, dealt), values + 16);
    return true;
  }
  /// Element j of vector i <-> element i of vector j.
  static void transpose(F (&r)[kLanes]) {
    F t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F low = r[i], high = r[i + 4];
      r[i] = _mm256_permute2f128_ps(low, high, 0x20);
      r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }
};

/// 2^n, and NaN for n = 128: the factors of a UE8M0 scale.
inline float pow2_or_nan(int n) {
  if (n >= 128) return __builtin_nanf("");
  return __builtin_bit_cast(float, static_cast<uint32_t>(n + 127) << 23);
}

/// values = e4m3(codes) * 2^(scale - 127), count a multiple of 64. Where a shift does not do, the
/// scale is applied in two exact halves, because binary16 brings 2^-8 and because byte 0 alone is
/// subnormal.
template <class L>
inline void e4m3_to_f32_lanes(const uint8_t* codes, uint8_t scale, int count, float* values) {
  const int exponent = static_cast<int>(scale) - 127 + 8, half = exponent / 2;
  const auto first = L::set(scale == 255 ? pow2_or_nan(128) : pow2_or_nan(half));
  const auto second = L::set(pow2_or_nan(exponent - half));
  const bool ordinary_scale = scale >= 7 && scale <= 246;
  const auto offset = static_cast<int16_t>((scale - 7) * 128);
  for (int i = 0; i < count; i += L::kCodes) {
    if (ordinary_scale && L::store_ordinary_e4m3(codes + i, offset, values + i)) [[likely]]
      continue;
    for (int j = i; j < i + L::kCodes; j += L::kLanes) {
      L::store(values + j, L::mul(L::mul(L::load_e4m3(codes + j), first), second));
    }
  }
}

/// Heads [0, lanes) of q, f32 or bf16, as [dim][lanes]; heads past `heads` are zero.
template <class L>
inline void pack_heads(const void* q, DType dtype, int64_t stride, int heads, int lanes, int dim,
                       float* out) {
  for (int first = 0; first < lanes; first += L::kLanes) {
    for (int d = 0; d < dim; d += L::kLanes) {
      typename L::F rows[L::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < L::kLanes; ++i) {
        const int64_t at = (first + i) * stride + d;
        rows[i] = first + i >= heads      ? L::zero()
                  : dtype == DType::kBf16 ? L::load_bf16(static_cast<const uint16_t*>(q) + at)
                                          : L::load(static_cast<const float*>(q) + at);
      }
      L::transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L::kLanes; ++i) L::store(out + (d + i) * lanes + first, rows[i]);
    }
  }
}

/// Fetches row `r` of a block into L2. Spread over the scores of the block before it: 64 rows at
/// once would wait for the few outstanding misses that a core may have.
/// always_inline: g++ takes a function that only prefetches for one without effect and drops the
/// calls.
__attribute__((always_inline)) inline void prefetch_row(const BlockRows* block, int r) {
  if (block == nullptr || r >= block->count || block->rows[r].values == nullptr) return;
  const auto* bytes = reinterpret_cast<const char*>(block->rows[r].values);
  for (int b = 0; b < block->row_bytes; b += 64) _mm_prefetch(bytes + b, _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(block->rows[r].scales), _MM_HINT_T1);
}

/// exp2_flushed of attend_arith.h, lane by lane.
template <class L>
inline typename L::F exp2_lanes(typename L::F x) {
  const auto n = L::round(x);
  const auto f = L::sub(x, n);
  auto p = L::set(kExp2[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = L::fma(p, f, L::set(kExp2[i]));
  p = L::fma(p, f, L::set(1.0f));
  return L::zero_below(x, -126.0f, L::mul(p, L::pow2(n)));
}

/// Online softmax of a block: z = scores [count][lanes] -> store_pair(row, lane, p_even, p_odd);
/// updates max and sum of the group and leaves alpha. Two vectors of lanes at a time where there
/// are two: their chains of maxima and sums wait side by side.
template <class L, int kVectors, class StorePair>
inline void softmax_lanes(const float* scores, int lanes, int lane, const BlockRows& block,
                          AttendGroup& group, StorePair store_pair) {
  using F = typename L::F;
  constexpr int kStep = L::kLanes;
  const int count = block.count;
  const uint64_t active = block.active;
  const float* z = scores + lane;
  F before[kVectors], max[kVectors], sum[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) before[v] = max[v] = L::load(group.max + lane + v * kStep);
  for (int r = 0; r < count; ++r) {
    if ((active >> r & 1) == 0) continue;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) max[v] = L::max(L::load(z + r * lanes + v * kStep), max[v]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const F alpha = exp2_lanes<L>(L::sub(before[v], max[v]));
    sum[v] = L::mul(L::load(group.sum + lane + v * kStep), alpha);
    L::store(group.alpha + lane + v * kStep, alpha);
    L::store(group.max + lane + v * kStep, max[v]);
  }
  for (int r = 0; r < count; r += 2) {
    F p[2][kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if ((active >> (r + j) & 1) != 0) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          p[j][v] = exp2_lanes<L>(L::sub(L::load(z + (r + j) * lanes + v * kStep), max[v]));
          sum[v] = L::add(sum[v], p[j][v]);
        }
      } else {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) p[j][v] = L::zero();
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store_pair(r, lane + v * kStep, p[0][v], p[1][v]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) L::store(group.sum + lane + v * kStep, sum[v]);
}

template <class L, class StorePair>
inline void softmax_block(const float* scores, int lanes, const BlockRows& block,
                          AttendGroup& group, StorePair store_pair) {
  for (int lane = 0; lane < lanes;) {
    if (lane + 2 * L::kLanes <= lanes) {
      softmax_lanes<L, 2>(scores, lanes, lane, block, group, store_pair);
      lane += 2 * L::kLanes;
    } else {
      softmax_lanes<L, 1>(scores, lanes, lane, block, group, store_pair);
      lane += L::kLanes;
    }
  }
}

template <class L>
void merge_lanes(float* total, const float* chain, const float* by_total, const float* by_chain,
                 int heads, int head_dim) {
  for (int h = 0; h < heads; ++h) {
    const auto wt = L::set(by_total[h]), wc = L::set(by_chain[h]);
    for (int d = 0; d < head_dim; d += L::kLanes) {
      float* t = total + h * head_dim + d;
      L::store(t, L::fma(L::load(chain + h * head_dim + d), wc, L::mul(L::load(t), wt)));
    }
  }
}

}  // namespace
}  // namespace dsv4::cpu
