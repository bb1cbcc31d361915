// Indexer scores with f32 operands: `exact`, and every case without bf16 dot products. On bf16
// values it gives the bits of VDPBF16PS. See index_logits.h.
//
// Layout    q [pass][dim][heads of the pass] f32, k [64][dim] f32
// Tiling    lanes = heads, up to kPassHeads a pass; as many keys at a time as kChains accumulators
//           hold
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "backends/cpu/ops/attend_lanes-inl.h"
#include "backends/cpu/ops/index_logits.h"

namespace dsv4::cpu {
namespace {

constexpr int kMxfp4Block = 32;

template <class L>
struct E2m1;
#if defined(__AVX512F__)
template <>
struct E2m1<Lanes16> {
  static __m512 load(const uint8_t* nibbles) {
    const __m512 table =
        _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    uint64_t bits;
    std::memcpy(&bits, nibbles, 8);
    const __m512i all = _mm512_inserti64x4(_mm512_set1_epi32(static_cast<int>(bits)),
                                           _mm256_set1_epi32(static_cast<int>(bits >> 32)), 1);
    const __m512i shift =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(all, shift), table);
  }
};
#endif
template <>
struct E2m1<Lanes8> {
  static __m256 load(const uint8_t* nibbles) {
    const __m256 table = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
    uint32_t bits;
    std::memcpy(&bits, nibbles, 4);
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)),
                                           _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28);
    return _mm256_or_ps(_mm256_permutevar8x32_ps(table, code), _mm256_castsi256_ps(sign));
  }
};

/// One MXFP4 row -> f32. The scale goes in by two exact halves: byte 0 alone is subnormal.
template <class L>
inline void mxfp4_row_to_f32(RowRef row, int dim, float* out) {
  const auto* nibbles = reinterpret_cast<const uint8_t*>(row.values);
  for (int block = 0; block < dim; block += kMxfp4Block) {
    const int byte = static_cast<int>(static_cast<uint8_t>(row.scales[block / kMxfp4Block]));
    const int exponent = byte - 127, half = exponent / 2;
    const auto first = L::set(byte == 255 ? pow2_or_nan(128) : pow2_or_nan(half));
    const auto second = L::set(pow2_or_nan(byte == 255 ? 0 : exponent - half));
    for (int d = block; d < block + kMxfp4Block; d += L::kLanes) {
      L::store(out + d, L::mul(L::mul(E2m1<L>::load(nibbles + d / 2), first), second));
    }
  }
}

/// Fetches keys [first, first + count) into L2, beside the scores of the block before them.
__attribute__((always_inline)) inline void prefetch_keys(const KeyRows* keys, int first,
                                                         int count) {
  if (keys == nullptr) return;
  for (int i = first; i < first + count && i < keys->count; ++i) {
    const auto* bytes = reinterpret_cast<const char*>(keys->rows[i].values);
    for (int b = 0; b < keys->value_bytes; b += 64) _mm_prefetch(bytes + b, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(keys->rows[i].scales), _MM_HINT_T1);
  }
}

// Tree over the 16 lanes of a key.
inline float tree_sum(const float* lanes) {
  const __m256 eight = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#if defined(__AVX512F__)
// Tree over the lanes of 16 keys at once: each step halves the lanes of a key and doubles the keys
// of a register; the pairing of keys brings them out in order.
inline __m512 tree16(const float* lanes) {
  const auto key = [&](int i) { return _mm512_loadu_ps(lanes + i * 16); };
  const auto by8 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const auto by4 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto by2 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
  };
  const auto by1 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  };
  // Each 128-bit lane b of column(c) ends as 4 partial sums of key 4b + c.
  const auto column = [&](int c) {
    return by4(by8(key(c), key(c + 4)), by8(key(c + 8), key(c + 12)));
  };
  return by1(by2(column(0), column(1)), by2(column(2), column(3)));
}
#endif

/// Sums over the lanes of `count` keys; writes up to the next multiple of 16.
template <class L>
inline void tree_sums(const float* lanes, int count, float* sums) {
#if defined(__AVX512F__)
  if constexpr (L::kLanes == 16) {
    for (int j = 0; j < count; j += 16) _mm512_storeu_ps(sums + j, tree16(lanes + j * 16));
    return;
  }
#endif
  for (int j = 0; j < count; ++j) sums[j] = tree_sum(lanes + j * kIndexLanes);
}

#if defined(__AVX512VNNI__)
/// acc + four products of unsigned and signed bytes a lane. Not the intrinsic, around which g++ 12
/// moves every accumulator twice.
inline __m512i dot4(__m512i acc, __m512i codes, __m512i signed_codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(signed_codes));
  return acc;
}
#endif

#if defined(__AVX512F__)
/// Heads of a group, whose queries lie together.
constexpr int kGroupOfHeads = 64;

template <int kKeys, int kRegs, typename Tile>
void over_keys_of_group(int first_head, int count, const KeyRows* next, const Tile& tile) {
  for (int key = 0; key < count; key += kKeys) {
    if (first_head == 0) prefetch_keys(next, key, kKeys);
    tile.template operator()<kKeys, kRegs>(first_head, key);
  }
}

/// tile<kKeys, kRegs>(first head, first key) for all heads, in 16 kRegs lanes, and `count`
/// keys: as many of both as 32 registers hold. Meanwhile fetches `next` (or null).
template <typename Tile>
void over_groups(int heads, int count, const KeyRows* next, const Tile& tile) {
  for (int h = 0; h < heads; h += kGroupOfHeads) {
    const int lanes = std::min(heads - h, kGroupOfHeads);
    switch ((lanes + kIndexLanes - 1) / kIndexLanes) {
      case 1:
        over_keys_of_group<8, 1>(h, count, next, tile);
        break;
      case 2:
        over_keys_of_group<8, 2>(h, count, next, tile);
        break;
      case 3:
        over_keys_of_group<4, 3>(h, count, next, tile);
        break;
      default:
        over_keys_of_group<4, 4>(h, count, next, tile);
    }
  }
}
#endif

template <class L, int kPassHeads, int kChains>
struct WideIndexKernel {
  using F = typename L::F;
  static constexpr int kElemBytes = 4;
  static constexpr int kVectors = kIndexLanes / L::kLanes;  // of the partial sums of a key

  /// Lanes of the pass that starts when `heads` heads are left.
  static int pass_lanes(int heads) {
    return std::min((heads + kIndexLanes - 1) / kIndexLanes * kIndexLanes, kPassHeads);
  }

  static void pack_q(const void* q, DType dtype, int64_t stride, int heads, int dim, void* packed) {
    const auto* from = static_cast<const char*>(q);
    float* out = static_cast<float*>(packed);
    for (int first = 0; first < heads; first += kPassHeads) {
      const int lanes = pass_lanes(heads - first);
      pack_heads<L>(from + first * stride * (dtype == DType::kBf16 ? 2 : 4), dtype, stride,
                    heads - first, lanes, dim, out);
      out += dim * lanes;
    }
  }

  static void load_keys(const KeyRows& keys, KvFormat format, int dim, void* k) {
    for (int i = 0; i < keys.count; ++i) {
      float* out = static_cast<float*>(k) + i * dim;
      const auto* bytes = reinterpret_cast<const uint8_t*>(keys.rows[i].values);
      if (format == KvFormat::kIndexFp8) {
        e4m3_to_f32_lanes<L>(bytes, 127, dim, out);
      } else if (format == KvFormat::kIndexMxfp4) {
        mxfp4_row_to_f32<L>(keys.rows[i], dim, out);
      } else {
        std::memcpy(out, bytes, static_cast<size_t>(dim) * 4);
      }
    }
  }

  static void score(const void* packed_q, const float* weights, const void* k, int count, int heads,
                    int dim, float* lanes, float* sums, const KeyRows* next) {
    const float* q = static_cast<const float*>(packed_q);
    for (int h = 0; h < heads; h += kPassHeads) {
      const int pass = pass_lanes(heads - h);
      score_pass<kPassHeads>(pass, q, weights + h, static_cast<const float*>(k), count, dim, h == 0,
                             lanes, next);
      q += dim * pass;
    }
    tree_sums<L>(lanes, count, sums);
  }

 private:
  template <int kHeads>
  static void score_pass(int heads, const float* q, const float* weights, const float* k, int count,
                         int dim, bool first, float* lanes, const KeyRows* next) {
    if constexpr (kHeads > kIndexLanes) {
      if (heads < kHeads) {
        score_pass<kHeads - kIndexLanes>(heads, q, weights, k, count, dim, first, lanes, next);
        return;
      }
    }
    constexpr int kRegs = kHeads / L::kLanes;
    constexpr int kKeys = static_cast<int>(std::bit_floor(unsigned{kChains / kRegs}));
    static_assert(kKeyBlock % kKeys == 0);
    for (int j = 0; j < count; j += kKeys) {
      if (first) prefetch_keys(next, j, kKeys);
      score_tile<kKeys, kRegs>(q, weights, k + j * dim, dim, first, lanes + j * kIndexLanes);
    }
  }

  // t_l of kKeys keys over the heads of a pass. Keys past `count` give values that nobody reads.
  template <int kKeys, int kRegs>
  static void score_tile(const float* q, const float* weights, const float* k, int dim, bool first,
                         float* lanes) {
    F acc[kKeys][kRegs];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kRegs; ++j) acc[i][j] = L::zero();
    for (int pair = 0; pair < dim; pair += 2) {
#pragma GCC unroll 2
      for (int odd = 1; odd >= 0; --odd) {
        const int d = pair + odd;
        F x[kRegs];
#pragma GCC unroll 4
        for (int j = 0; j < kRegs; ++j) x[j] = L::load(q + (d * kRegs + j) * L::kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const F key = L::set(k[i * dim + d]);
#pragma GCC unroll 4
          for (int j = 0; j < kRegs; ++j) acc[i][j] = L::fma(key, x[j], acc[i][j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* lane = lanes + i * kIndexLanes + v * L::kLanes;
        F sum = first ? L::zero() : L::load(lane);
#pragma GCC unroll 4
        for (int j = v; j < kRegs; j += kVectors) {
          sum = L::fma(L::load(weights + j * L::kLanes), L::max(L::zero(), acc[i][j]), sum);
        }
        L::store(lane, sum);
      }
  }
};

}  // namespace
}  // namespace dsv4::cpu
