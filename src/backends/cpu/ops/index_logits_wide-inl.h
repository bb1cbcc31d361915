// Indexer scores with f32 operands: `exact`, and every case without bf16 dot products. On bf16
// values it gives the bits of VDPBF16PS. See index_logits.h.
//
// Layout    q [head group of 16][dim][16] f32, k [64][dim] f32
// Tiling    lanes = heads, 16 a pass; kKeys keys at a time
#pragma once
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

template <class L, int kKeys_>
struct WideIndexKernel {
  static constexpr int kKeys = kKeys_;
  static constexpr int kRegs = kIndexLanes / L::kLanes;
  using F = typename L::F;

  static void pack_q(const void* q, DType dtype, int64_t stride, int heads, int dim, void* packed) {
    float* out = static_cast<float*>(packed);
    for (int first = 0; first < heads; first += kIndexLanes, out += dim * kIndexLanes) {
      for (int lane = 0; lane < kIndexLanes; ++lane) {
        const bool real = first + lane < heads;
        const int64_t at = (first + lane) * stride;
        for (int d = 0; d < dim; d += L::kLanes) {
          F x = L::zero();
          if (real && dtype == DType::kBf16) {
            x = L::load_bf16(static_cast<const uint16_t*>(q) + at + d);
          } else if (real) {
            x = L::load(static_cast<const float*>(q) + at + d);
          }
          alignas(64) float values[L::kLanes];
          L::store(values, x);
          for (int i = 0; i < L::kLanes; ++i) out[(d + i) * kIndexLanes + lane] = values[i];
        }
      }
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
    for (int h = 0; h < heads; h += kIndexLanes, q += dim * kIndexLanes) {
      for (int j = 0; j < count; j += kKeys) {
        if (h == 0) prefetch_keys(next, j, kKeys);
        score_tile(q, weights + h, static_cast<const float*>(k) + j * dim, dim, h == 0,
                   lanes + j * kIndexLanes);
      }
    }
    for (int j = 0; j < count; ++j) sums[j] = tree_sum(lanes + j * kIndexLanes);
  }

 private:
  // Keys past `count` give values that nobody reads.
  static void score_tile(const float* q, const float* weights, const float* k, int dim, bool first,
                         float* lanes) {
    F acc[kKeys][kRegs];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kRegs; ++j) acc[i][j] = L::zero();
    for (int pair = 0; pair < dim; pair += 2) {
#pragma GCC unroll 2
      for (int odd = 1; odd >= 0; --odd) {
        const int d = pair + odd;
        F x[kRegs];
#pragma GCC unroll 2
        for (int j = 0; j < kRegs; ++j) x[j] = L::load(q + d * kIndexLanes + j * L::kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) {
          const F key = L::set(k[i * dim + d]);
#pragma GCC unroll 2
          for (int j = 0; j < kRegs; ++j) acc[i][j] = L::fma(key, x[j], acc[i][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kRegs; ++j) {
        float* lane = lanes + i * kIndexLanes + j * L::kLanes;
        const F before = first ? L::zero() : L::load(lane);
        L::store(lane,
                 L::fma(L::load(weights + j * L::kLanes), L::max(L::zero(), acc[i][j]), before));
      }
  }
};

}  // namespace
}  // namespace dsv4::cpu
