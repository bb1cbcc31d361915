// Indexer scores of MXFP4 keys in integers, with the bits of the order in index_logits.h.
//
// Why equal A query head and a key are whole numbers of a unit each. While the sum of |q k| over
//           all dims stays below 2^24 units, every step of the canonical f32 sum is exact, hence so
//           is any other way to the same number. Codes are multiples of half their scale up to 12,
//           and kMaxQuerySpread and kMaxKeySpread bound the scales of a head and of a key:
//           4 groups x 32 dims x 12 x 12 x 2^(5 + 4) < 2^24. Heads or keys beyond take the f32
//           kernel, decided per token and per block of keys.
// Layout    in groups of 32 dims: the even ones, then the odd ones (the nibbles of a byte), four
//           to a dword; keys as code + 12 (unsigned), queries as int8 [quad][head][4]
// Tiling    16 heads x kTileKeys keys; AVX2, 4 keys: per 4 dims 2 loads, 4 broadcasts, 8
//           VPMADDUBSW, 8 VPADDW; a group ends in VPMADDWD with 2^(scale over unit). f32 takes 32
//           FMA for 18 instructions here, or for 10 where VPDPBUSD multiplies and adds
//           (index_logits_avx512vnni.cc).
// Budget    262144 keys x 64 heads x 128 dims: 134 M vector instructions, 11 ms of one core at
//           4 a cycle and 3.1 GHz (AVX2); what was reached: docs/kernels/index_logits.md
#pragma once
#include <cmath>

#include "backends/cpu/ops/index_logits_wide-inl.h"

namespace dsv4::cpu {
namespace {

constexpr int kGroups = kIndexTileDims / kMxfp4Block;
constexpr int kQuads = kIndexTileDims / 4;
constexpr int kGroupQuads = kQuads / kGroups;
constexpr int kMaxCode = 12;  // twice the largest E2M1
// Exponents of the groups of a head or key above its unit.
constexpr int kMaxQuerySpread = 5, kMaxKeySpread = 4;
// |exponent| of units: sums and products stay normal.
constexpr int kMaxQueryUnit = 40, kMaxKeyUnit = 60;

/// 16 heads of a token.
struct alignas(64) QueryHeads {
  int8_t codes[kQuads][kIndexLanes][4];
  int16_t start[kGroups][kIndexLanes][2];  // -12 times the sum of the codes of a lane
  int16_t factor[kGroups][kIndexLanes][2];
  float unit[kIndexLanes];
  int32_t exact;
};
struct alignas(32) KeyCodes {
  uint8_t codes[kIndexTileDims];  // + 12
  uint32_t factor[kGroups];       // twice, as 16-bit halves
  float unit;
};
enum class KeyForm : int32_t { kCodes, kF32, kBoth };

constexpr int kMxfp4ElemBytes = 6;  // f32 for the kernel that takes over, and the integers
static_assert(kMxfp4ElemBytes <= kMaxIndexElemBytes);
static_assert(sizeof(QueryHeads) <= kIndexLanes * kIndexTileDims * (kMxfp4ElemBytes - 4));
static_assert(kKeyBlock * sizeof(KeyCodes) + sizeof(KeyForm) <=
              kKeyBlock * kIndexTileDims * (kMxfp4ElemBytes - 4));

// ---- queries

// 32 values -> codes |c| <= 12 with value = c 2^exponent. False when there are none such; -128 is
// left in `exponent` where all values are zero.
bool codes_of_group(const uint16_t* values, __m256i& codes, int& exponent) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 x[4], largest = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = Lanes8::load_bf16(values + 8 * i);
    largest = _mm256_castsi256_ps(_mm256_max_epi32(
        _mm256_castps_si256(largest), _mm256_castps_si256(_mm256_and_ps(x[i], magnitude))));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_castps_si256(largest));
  uint32_t bits = 0;
  for (const uint32_t lane : lanes) bits = bits < lane ? lane : bits;
  if (bits == 0) {
    codes = _mm256_setzero_si256();
    exponent = -128;
    return true;
  }
  // The largest code is 8 or 12 then.
  exponent = static_cast<int>(bits >> 23) - 127 - 3;
  if (std::abs(exponent) > kMaxQueryUnit + kMaxQuerySpread) return false;
  const __m256 inverse = _mm256_set1_ps(pow2_or_nan(-exponent));
  __m256i whole[4];
  __m256 wrong = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 scaled = _mm256_mul_ps(x[i], inverse);
    whole[i] = _mm256_cvtps_epi32(scaled);
    wrong = _mm256_or_ps(wrong, _mm256_cmp_ps(_mm256_cvtepi32_ps(whole[i]), scaled, _CMP_NEQ_UQ));
    wrong = _mm256_or_ps(wrong, _mm256_cmp_ps(_mm256_and_ps(scaled, magnitude),
                                              _mm256_set1_ps(kMaxCode), _CMP_NLE_UQ));
  }
  if (_mm256_movemask_ps(wrong) != 0) return false;
  // Packing works within halves; the dwords of 4 codes are put back in order.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                            _mm256_packs_epi32(whole[2], whole[3]));
  codes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return true;
}

// One head; false when it has no codes.
bool pack_head(const uint16_t* values, int lane, QueryHeads& out) {
  const __m256i even_odd = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0,
                                            2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  int exponents[kGroups], unit = 127;
  for (int g = 0; g < kGroups; ++g) {
    __m256i codes;
    if (!codes_of_group(values + g * kMxfp4Block, codes, exponents[g])) return false;
    if (exponents[g] != -128) unit = std::min(unit, exponents[g]);
    // Quads of a half: two of even dims, two of odd ones -> all even ones first.
    const __m256i quads = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(codes, even_odd),
                                                      _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
    alignas(32) int32_t dwords[kGroupQuads];
    _mm256_store_si256(reinterpret_cast<__m256i*>(dwords), quads);
    int low = 0, high = 0;
    for (int i = 0; i < kGroupQuads; ++i) {
      int8_t* to = out.codes[g * kGroupQuads + i][lane];
      std::memcpy(to, &dwords[i], 4);
      low += to[0] + to[1];
      high += to[2] + to[3];
    }
    out.start[g][lane][0] = static_cast<int16_t>(-kMaxCode * low);
    out.start[g][lane][1] = static_cast<int16_t>(-kMaxCode * high);
  }
  if (unit == 127) unit = 0;
  for (int g = 0; g < kGroups; ++g) {
    const int spread = exponents[g] == -128 ? 0 : exponents[g] - unit;
    if (spread > kMaxQuerySpread) return false;
    out.factor[g][lane][0] = out.factor[g][lane][1] = static_cast<int16_t>(1 << spread);
  }
  out.unit[lane] = pow2_or_nan(unit);
  return std::abs(unit) <= kMaxQueryUnit;
}

QueryHeads* query_heads(void* packed, int heads, int dim) {
  const int64_t padded = (heads + kIndexLanes - 1) / kIndexLanes * kIndexLanes;
  return reinterpret_cast<QueryHeads*>(static_cast<std::byte*>(packed) + padded * dim * 4);
}

// ---- keys

KeyCodes* key_codes(void* k) {
  return reinterpret_cast<KeyCodes*>(static_cast<std::byte*>(k) + kKeyBlock * kIndexTileDims * 4);
}
KeyForm* key_form(void* k) {
  return reinterpret_cast<KeyForm*>(key_codes(k) + kKeyBlock);
}

// A group of zeros may have any scale, and has the smallest by rule.
bool all_zero(const uint8_t* nibbles) {
  uint64_t halves[2];
  std::memcpy(halves, nibbles, sizeof(halves));
  return ((halves[0] | halves[1]) & 0x7777777777777777u) == 0;
}

bool load_key(RowRef row, KeyCodes& out) {
  const auto* nibbles = reinterpret_cast<const uint8_t*>(row.values);
  const auto* scales = reinterpret_cast<const uint8_t*>(row.scales);
  const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  const __m128i low = _mm_set1_epi8(15);
  int smallest = 255, largest = 0;
  bool zero[kGroups] = {};
  for (int g = 0; g < kGroups; ++g) {
    smallest = std::min(smallest, int{scales[g]});
    largest = std::max(largest, int{scales[g]});
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles + g * kMxfp4Block / 2));
    auto* to = reinterpret_cast<__m128i*>(out.codes + g * kMxfp4Block);
    _mm_store_si128(to, _mm_shuffle_epi8(table, _mm_and_si128(bytes, low)));
    _mm_store_si128(to + 1, _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low)));
  }
  if (largest - smallest > kMaxKeySpread) {
    smallest = 255, largest = 0;
    for (int g = 0; g < kGroups; ++g) {
      zero[g] = scales[g] != 255 && all_zero(nibbles + g * kMxfp4Block / 2);
      if (zero[g]) continue;
      smallest = std::min(smallest, int{scales[g]});
      largest = std::max(largest, int{scales[g]});
    }
    if (largest - smallest > kMaxKeySpread) return false;  // never so when all are zero
    if (smallest > largest) smallest = 127;
  }
  const int unit = smallest - 127 - 1;  // codes are twice the E2M1 values
  if (std::abs(unit) > kMaxKeyUnit) return false;
  out.unit = pow2_or_nan(unit);
  for (int g = 0; g < kGroups; ++g)
    out.factor[g] = zero[g] ? 0x10001u : 0x10001u << (scales[g] - smallest);
  return true;
}

// Codes -> f32, for a token that has none.
void widen_keys(void* k, int count) {
  const KeyCodes* codes = key_codes(k);
  for (int i = 0; i < count; ++i) {
    float* out = static_cast<float*>(k) + i * kIndexTileDims;
    for (int g = 0; g < kGroups; ++g) {
      const __m256 scale =
          _mm256_set1_ps(codes[i].unit * static_cast<float>(codes[i].factor[g] & 0xffff));
      const auto* from = reinterpret_cast<const __m128i*>(codes[i].codes + g * kMxfp4Block);
      const __m128i even = _mm_load_si128(from), odd = _mm_load_si128(from + 1);
      const __m128i halves[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
#pragma GCC unroll 4
      for (int eight = 0; eight < 4; ++eight) {
        const __m128i bytes =
            eight % 2 == 0 ? halves[eight / 2] : _mm_srli_si128(halves[eight / 2], 8);
        const __m256i code =
            _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(kMaxCode));
        _mm256_storeu_ps(out + g * kMxfp4Block + 8 * eight,
                         _mm256_mul_ps(_mm256_cvtepi32_ps(code), scale));
      }
    }
  }
  *key_form(k) = KeyForm::kBoth;
}

// ---- scores

/// Integers in the vectors of L; load: aligned. A sum of a group is two 16-bit halves a lane:
/// `start` makes it of QueryHeads::start, dot4 adds four dims, dot16 multiplies by factors and adds
/// the halves; query_factor is for QueryHeads::factor.
template <class L>
struct Ints;
template <>
struct Ints<Lanes8> {
  using I = __m256i;
  static I zero() { return _mm256_setzero_si256(); }
  static I set(int x) { return _mm256_set1_epi32(x); }
  static I load(const void* p) { return _mm256_load_si256(static_cast<const I*>(p)); }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I mul16(I a, I b) { return _mm256_mullo_epi16(a, b); }
  static I start(I halves) { return halves; }
  static I dot4(I acc, I codes, I signed_codes) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, signed_codes));
  }
  static I query_factor(I factor) { return factor; }
  static I dot16(I a, I b) { return _mm256_madd_epi16(a, b); }
  static __m256 to_f32(I x) { return _mm256_cvtepi32_ps(x); }
};
#if defined(__AVX512F__)
template <>
struct Ints<Lanes16> {
  using I = __m512i;
  static I zero() { return _mm512_setzero_si512(); }
  static I set(int x) { return _mm512_set1_epi32(x); }
  static I load(const void* p) { return _mm512_load_si512(p); }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I mul16(I a, I b) { return _mm512_mullo_epi16(a, b); }
  static I start(I halves) { return halves; }
  static I dot4(I acc, I codes, I signed_codes) {
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, signed_codes));
  }
  static I query_factor(I factor) { return factor; }
  static I dot16(I a, I b) { return _mm512_madd_epi16(a, b); }
  static __m512 to_f32(I x) { return _mm512_cvtepi32_ps(x); }
};
#endif

/// Wide: the f32 kernel that takes over. V: as Ints<L>.
template <class L, class Wide, int kTileKeys, class V = Ints<L>>
struct Mxfp4IndexKernel {
  static constexpr int kElemBytes = kMxfp4ElemBytes;

  static void pack_q(const void* q, DType dtype, int64_t stride, int heads, int dim, void* packed) {
    Wide::pack_q(q, dtype, stride, heads, dim, packed);
    QueryHeads* groups = query_heads(packed, heads, dim);
    bool exact = true;
    for (int first = 0; first < heads; first += kIndexLanes) {
      QueryHeads& group = groups[first / kIndexLanes];
      if (heads - first < kIndexLanes) std::memset(&group, 0, sizeof(group));
      for (int lane = 0; lane < kIndexLanes && first + lane < heads; ++lane) {
        exact = exact &&
                pack_head(static_cast<const uint16_t*>(q) + (first + lane) * stride, lane, group);
      }
    }
    groups[0].exact = exact ? 1 : 0;
  }

  static void load_keys(const KeyRows& keys, KvFormat format, int dim, void* k) {
    KeyCodes* codes = key_codes(k);
    for (int i = 0; i < keys.count; ++i) {
      if (load_key(keys.rows[i], codes[i])) [[likely]]
        continue;
      Wide::load_keys(keys, format, dim, k);
      *key_form(k) = KeyForm::kF32;
      return;
    }
    *key_form(k) = KeyForm::kCodes;
  }

  static void score(const void* packed_q, const float* weights, const void* k, int count, int heads,
                    int dim, float* lanes, float* sums, const KeyRows* next) {
    const QueryHeads* groups = query_heads(const_cast<void*>(packed_q), heads, dim);
    void* keys = const_cast<void*>(k);  // scratch of this item, written by load_keys
    if (groups[0].exact == 0 || *key_form(keys) == KeyForm::kF32) {
      if (*key_form(keys) == KeyForm::kCodes) widen_keys(keys, kKeyBlock);
      Wide::score(packed_q, weights, k, count, heads, dim, lanes, sums, next);
      return;
    }
    const KeyCodes* codes = key_codes(keys);
    for (int h = 0; h < heads; h += kIndexLanes) {
      for (int j = 0; j < count; j += kTileKeys) {
        if (h == 0) prefetch_keys(next, j, kTileKeys);
        score_tile(groups[h / kIndexLanes], weights + h, codes + j, h == 0,
                   lanes + j * kIndexLanes);
      }
    }
    tree_sums<L>(lanes, count, sums);
  }

 private:
  static constexpr int kVectors = kIndexLanes / L::kLanes;  // of 16 heads

  // t_l of kTileKeys keys over 16 heads. Keys past the count give values that nobody reads.
  static void score_tile(const QueryHeads& q, const float* weights, const KeyCodes* keys,
                         bool first, float* lanes) {
    typename V::I total[kTileKeys][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kTileKeys; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[i][v] = V::zero();
    for (int g = 0; g < kGroups; ++g) {
      typename V::I acc[kTileKeys][kVectors], by_query[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        by_query[v] = V::query_factor(V::load(q.factor[g] + v * L::kLanes));
        const typename V::I start = V::start(V::load(q.start[g] + v * L::kLanes));
#pragma GCC unroll 8
        for (int i = 0; i < kTileKeys; ++i) acc[i][v] = start;
      }
#pragma GCC unroll 8
      for (int quad = g * kGroupQuads; quad < (g + 1) * kGroupQuads; ++quad) {
        typename V::I x[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) x[v] = V::load(q.codes[quad] + v * L::kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileKeys; ++i) {
          int32_t dword;
          std::memcpy(&dword, keys[i].codes + 4 * quad, 4);
          const typename V::I key = V::set(dword);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] = V::dot4(acc[i][v], key, x[v]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileKeys; ++i) {
        const typename V::I by_key = V::set(static_cast<int>(keys[i].factor[g]));
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          total[i][v] = V::add32(total[i][v], V::dot16(acc[i][v], V::mul16(by_query[v], by_key)));
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileKeys; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const auto dot = L::mul(L::mul(V::to_f32(total[i][v]), L::load(q.unit + v * L::kLanes)),
                                L::set(keys[i].unit));
        float* lane = lanes + i * kIndexLanes + v * L::kLanes;
        const auto before = first ? L::zero() : L::load(lane);
        L::store(lane, L::fma(L::load(weights + v * L::kLanes), L::max(L::zero(), dot), before));
      }
    }
  }
};

}  // namespace
}  // namespace dsv4::cpu
