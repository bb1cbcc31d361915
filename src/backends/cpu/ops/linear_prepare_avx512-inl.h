// Preparation of x for the AVX-512 kernels: optional quantisation, order of the lanes, tiles.
#pragma once
#include "backends/cpu/ops/linear_avx512-inl.h"
#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

constexpr uint16_t kBf16Infinity = 0x7f80, kBf16Nan = 0x7fc0, kBf16MinNormal = 0x0080;

// 128 columns as bf16, or as f32 where x or W is.
struct GroupBf16 {
  __m512i part[4];
};

DSV4_INLINE __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// Nearest E4M3 value (saturating) of v * inverse_scale, times scale: exact in bf16, so the upper
// half of the float is all of it.
DSV4_INLINE __m256i quantise16(__m256i bf16, __m512 inverse_scale, __m512 scale) {
  const __m512i sign_bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512 value = _mm512_mul_ps(widen(bf16), inverse_scale);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(value), sign_bit);
  const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(value), _mm512_set1_ps(kE4m3Max));
  // Normal codes keep 3 mantissa bits; subnormal ones are multiples of 2^-9, where adding
  // 1.5 * 2^14 rounds.
  const __m512i bits = _mm512_castps_si512(magnitude);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff)), odd),
                       _mm512_set1_epi32(static_cast<int>(0xfff00000u)));
  const __m512 magic = _mm512_set1_ps(24576.0f);
  const __m512 subnormal = _mm512_sub_ps(_mm512_add_ps(magnitude, magic), magic);
  const __mmask16 small = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
  const __m512 code = _mm512_mask_mov_ps(_mm512_castsi512_ps(rounded), small, subnormal);
  const __m512i result = _mm512_or_si512(_mm512_castps_si512(_mm512_mul_ps(code, scale)), sign);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

DSV4_INLINE __m512i magnitudes(__m512i bf16) {
  return _mm512_and_si512(bf16, _mm512_set1_epi16(0x7fff));
}

DSV4_INLINE uint16_t reduce_max(__m512i v) {
  __m256i a = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  __m128i b = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  // PHMINPOSUW finds the minimum; the complement turns it into the maximum.
  b = _mm_minpos_epu16(_mm_xor_si128(b, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_extract_epi16(b, 0));
}
DSV4_INLINE uint16_t reduce_min(__m512i v) {
  return static_cast<uint16_t>(~reduce_max(_mm512_xor_si512(v, _mm512_set1_epi16(-1))));
}

void quantise(GroupBf16& group, int64_t count) {
  __m512i largest = magnitudes(group.part[0]);
  for (int i = 1; i < 4; ++i) largest = _mm512_max_epu16(largest, magnitudes(group.part[i]));
  const uint16_t amax_bits = reduce_max(largest);
  if (amax_bits >= kBf16Infinity) {
    for (int i = 0; i < 4; ++i) {
      const int64_t live = std::clamp<int64_t>(count - 32 * i, 0, 32);
      const auto mask = static_cast<__mmask32>((uint64_t{1} << live) - 1);
      group.part[i] = _mm512_maskz_set1_epi16(mask, static_cast<int16_t>(kBf16Nan));
    }
    return;
  }
  const float amax = std::max(bf16_to_f32(amax_bits), 1e-4f);
  const int exponent = ceil_log2_ratio(amax, kE4m3Max);
  const __m512 scale = _mm512_set1_ps(exp2_int(exponent));
  const __m512 inverse_scale = _mm512_set1_ps(exp2_int(-exponent));
  for (__m512i& part : group.part) {
    const __m256i low = quantise16(_mm512_castsi512_si256(part), inverse_scale, scale);
    const __m256i high = quantise16(_mm512_extracti64x4_epi64(part, 1), inverse_scale, scale);
    part = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
}

// Natural order -> the steps of `lanes`.
void order_fp8(GroupBf16& group) {
  for (int i = 0; i < 4; i += 2) {
    const __m512i a = group.part[i], b = group.part[i + 1];
    group.part[i] = _mm512_shuffle_i64x2(a, b, 0x88);  // 16-byte pieces 0, 2, 4, 6
    group.part[i + 1] = _mm512_shuffle_i64x2(a, b, 0xdd);
  }
}

void order_fp4(GroupBf16& group) {
  alignas(64) uint16_t even[32];
  for (int i = 0; i < 32; ++i) even[i] = static_cast<uint16_t>(2 * i);
  const __m512i evens = _mm512_load_si512(even);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  const auto [a, b, c, d] = group.part;
  const __m512i even_low = _mm512_permutex2var_epi16(a, evens, b);
  const __m512i even_high = _mm512_permutex2var_epi16(c, evens, d);
  const __m512i odd_low = _mm512_permutex2var_epi16(a, odds, b);
  const __m512i odd_high = _mm512_permutex2var_epi16(c, odds, d);
  group.part[0] = _mm512_permutex2var_epi16(even_low, evens, even_high);
  group.part[1] = _mm512_permutex2var_epi16(odd_low, evens, odd_high);
  group.part[2] = _mm512_permutex2var_epi16(even_low, odds, even_high);
  group.part[3] = _mm512_permutex2var_epi16(odd_low, odds, odd_high);
}

// Exponents of the non-zero numbers of a row, as the row is prepared.
class RangeOfRow {
 public:
  void add(const GroupBf16& group) {
    for (const __m512i& part : group.part) {
      const __m512i magnitude = magnitudes(part);
      const __mmask32 live = _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(kBf16MinNormal));
      low_ = _mm512_mask_min_epu16(low_, live, low_, magnitude);
      high_ = _mm512_mask_max_epu16(high_, live, high_, magnitude);
    }
  }
  ExponentRange range() const {
    return {static_cast<uint8_t>(reduce_min(low_) >> 7),
            static_cast<uint8_t>(reduce_max(high_) >> 7)};
  }

 private:
  __m512i low_ = _mm512_set1_epi16(0x7fff);
  __m512i high_ = _mm512_setzero_si512();
};

GroupBf16 load_bf16(const PreparedX& x, int64_t m, int64_t k, int64_t count) {
  const uint16_t* from =
      static_cast<const uint16_t*>(x.x.data) + (x.row_begin + m) * x.x.strides[0] + k;
  alignas(64) uint16_t tail[kLinearGroup];
  if (count < kLinearGroup) {
    std::memset(tail, 0, sizeof(tail));
    std::memcpy(tail, from, static_cast<size_t>(count) * sizeof(uint16_t));
    from = tail;
  }
  GroupBf16 group;
  for (int i = 0; i < 4; ++i) group.part[i] = _mm512_loadu_si512(from + 32 * i);
  if (x.quantise) quantise(group, count);
  return group;
}

// Elements from x.data to columns k .. k + 127 of the tile that starts with row m. The streaming
// kernels (tile_rows 1) find the group of all rows in one place.
int64_t group_offset(const PreparedX& x, int64_t m, int64_t k) {
  if (x.tile_rows == 1) return k * x.padded_rows + m * kLinearGroup;
  const int64_t k0 = k / kLinearBlock * kLinearBlock;
  return linear_tile_offset(x, m, k0) + (k - k0) * x.tile_rows;
}

void prepare_row_bf16(const PreparedX& x, int64_t m) {
  RangeOfRow range;
  const int64_t step_bytes = 64 * x.tile_rows, tile = m / x.tile_rows * x.tile_rows;
  for (int64_t k = 0; k < x.padded_cols; k += kLinearGroup) {
    GroupBf16 group{};
    if (m < x.rows) group = load_bf16(x, m, k, std::min<int64_t>(kLinearGroup, x.x.shape[1] - k));
    if (x.lanes == Lanes::kFp8) order_fp8(group);
    if (x.lanes == Lanes::kFp4) {
      range.add(group);
      order_fp4(group);
    }
    std::byte* to = x.data + group_offset(x, tile, k) * 2 * kPairVectors + (m - tile) * 64;
    for (int i = 0; i < 4; ++i)
      store_pairs(to + i * kPairVectors * step_bytes, step_bytes, group.part[i]);
  }
  if (x.lanes == Lanes::kFp4) x.range[m] = range.range();
}

void prepare_row_f32(const PreparedX& x, int64_t m) {
  auto* data = reinterpret_cast<float*>(x.data);
  const int64_t step = 16 * x.tile_rows, tile = m / x.tile_rows * x.tile_rows;
  for (int64_t k = 0; k < x.padded_cols; k += kLinearGroup) {
    const int64_t count = std::min<int64_t>(kLinearGroup, x.x.shape[1] - k);
    alignas(64) float values[kLinearGroup] = {};
    if (m < x.rows) {
      if (x.x.dtype == DType::kF32) {
        const float* from =
            static_cast<const float*>(x.x.data) + (x.row_begin + m) * x.x.strides[0] + k;
        std::memcpy(values, from, static_cast<size_t>(count) * sizeof(float));
      } else {
        const GroupBf16 group = load_bf16(x, m, k, count);
        for (int i = 0; i < 4; ++i) {
          _mm512_store_ps(values + 32 * i, widen(_mm512_castsi512_si256(group.part[i])));
          _mm512_store_ps(values + 32 * i + 16, widen(_mm512_extracti64x4_epi64(group.part[i], 1)));
        }
      }
    }
    float* to = data + group_offset(x, tile, k) + (m - tile) * 16;
    for (int i = 0; i < 8; ++i) _mm512_storeu_ps(to + i * step, _mm512_load_ps(values + 16 * i));
  }
}

/// LinearKernels::prepare
void prepare(const PreparedX& x, int64_t m_begin, int64_t m_end) {
  if (m_end == x.rows) m_end = x.padded_rows;
  for (int64_t m = m_begin; m < m_end; ++m) {
    if (x.lanes == Lanes::kF32) {
      prepare_row_f32(x, m);
    } else {
      prepare_row_bf16(x, m);
    }
  }
}

}  // namespace
}  // namespace dsv4::cpu
