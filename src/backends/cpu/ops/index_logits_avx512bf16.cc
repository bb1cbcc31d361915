// Indexer scores on AVX-512 with VDPBF16PS for FP8 and MXFP4 keys; all else is
// index_logits_avx512.cc. See index_logits.h.
//
// Layout    q in head groups of up to 64: [dim/2][16 kRegs] dwords; k [64][dim] bf16
// Tiling    lanes = heads, the key pair broadcast from memory. 64 heads: 4 keys x 4 registers, per
//           pair 4 loads, 4 broadcasts, 16 dots. Sums over lanes of 16 keys at once.
#include "backends/cpu/ops/attend_avx512bf16-inl.h"
#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/index_logits_wide-inl.h"

namespace dsv4::cpu {
namespace {

constexpr int kGroup = 64;

int group_lanes(int heads) {
  const int padded = (heads + 15) / 16 * 16;
  return padded < kGroup ? padded : kGroup;
}

void pack_q(const void* q, DType, int64_t stride, int heads, int dim, void* packed) {
  auto* out = static_cast<uint32_t*>(packed);
  for (int first = 0; first < heads; first += kGroup) {
    const int lanes = group_lanes(heads - first);
    pack_q_pairs(static_cast<const uint16_t*>(q) + first * stride, stride, heads - first, lanes,
                 dim, out);
    out += dim / 2 * lanes;
  }
}

// 128 E2M1 codes with 4 scale bytes -> bf16. A word holds elements 4w..4w+3, and VPERMW takes 5
// index bits, so a table with its 16 entries twice needs no masks.
void load_mxfp4_128(const uint8_t* nibbles, const uint8_t* scales, uint16_t* out) {
  // Dwords are dealt so that the two unpacks leave 32 consecutive elements in each register.
  const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  // bf16 of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the negatives
  const __m512i table = _mm512_setr_epi32(
      0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080, static_cast<int>(0xbf008000),
      static_cast<int>(0xbfc0bf80), static_cast<int>(0xc040c000), static_cast<int>(0xc0c0c080),
      0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080, static_cast<int>(0xbf008000),
      static_cast<int>(0xbfc0bf80), static_cast<int>(0xc040c000), static_cast<int>(0xc0c0c080));
  const __m512i w = _mm512_permutexvar_epi32(deal, _mm512_loadu_si512(nibbles));
  const __m512i e0 = _mm512_permutexvar_epi16(w, table);
  const __m512i e1 = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), table);
  const __m512i e2 = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), table);
  const __m512i e3 = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), table);
  const __m512i lo01 = _mm512_unpacklo_epi16(e0, e1), hi01 = _mm512_unpackhi_epi16(e0, e1);
  const __m512i lo23 = _mm512_unpacklo_epi16(e2, e3), hi23 = _mm512_unpackhi_epi16(e2, e3);
  const __m512i blocks[4] = {_mm512_unpacklo_epi32(lo01, lo23), _mm512_unpackhi_epi32(lo01, lo23),
                             _mm512_unpacklo_epi32(hi01, hi23), _mm512_unpackhi_epi32(hi01, hi23)};
  // The scale is added to the exponent of the codes that are not zero.
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((scales[b] - 127) * 128));
    const __mmask32 nonzero = _mm512_test_epi16_mask(blocks[b], magnitude);
    _mm512_storeu_si512(out + 32 * b, _mm512_mask_add_epi16(blocks[b], nonzero, blocks[b], shift));
  }
}

// Scale bytes outside 2..252 leave bf16's normal range (0.5 and 6 times the scale): through f32.
bool ordinary(const std::byte* scales, int count) {
  for (int i = 0; i < count; ++i) {
    const int byte = static_cast<int>(scales[i]);
    if (byte < 2 || byte > 252) return false;
  }
  return true;
}

void load_mxfp4_row(RowRef row, int dim, uint16_t* out) {
  if (ordinary(row.scales, dim / kMxfp4Block)) {
    for (int d = 0; d < dim; d += kIndexTileDims) {
      load_mxfp4_128(reinterpret_cast<const uint8_t*>(row.values) + d / 2,
                     reinterpret_cast<const uint8_t*>(row.scales) + d / kMxfp4Block, out + d);
    }
    return;
  }
  for (int d = 0; d < dim; d += kIndexTileDims) {
    alignas(64) float values[kIndexTileDims];
    mxfp4_row_to_f32<Lanes16>({row.values + d / 2, row.scales + d / kMxfp4Block}, kIndexTileDims,
                              values);
    for (int i = 0; i < kIndexTileDims; i += 16) {
      Lanes16::store_bf16(out + d + i, _mm512_load_ps(values + i));
    }
  }
}

void load_keys(const KeyRows& keys, KvFormat format, int dim, void* k) {
  static const Fp8Tables& tables = fp8_tables();
  auto* out = static_cast<uint16_t*>(k);
  if (format == KvFormat::kIndexMxfp4) {
    for (int i = 0; i < keys.count; ++i) load_mxfp4_row(keys.rows[i], dim, out + i * dim);
    return;
  }
  const ByteTables unit = load_tables(tables.bytes[127]);
  for (int i = 0; i < keys.count; ++i) {
    const auto* codes = reinterpret_cast<const uint8_t*>(keys.rows[i].values);
    for (int d = 0; d < dim; d += 64) {
      __m512i lo, hi;
      convert64(codes + d, unit, lo, hi);
      _mm512_storeu_si512(out + i * dim + d, lo);
      _mm512_storeu_si512(out + i * dim + d + 32, hi);
    }
  }
}

// t_l of kKeys keys over the heads of one group. Keys past the count give values that nobody reads.
template <int kKeys, int kRegs>
inline void score_tile(const uint32_t* q, const float* weights, const uint32_t* k, int pairs,
                       bool first, float* lanes) {
  __m512 acc[kKeys][kRegs];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kRegs; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int d = 0; d < pairs; ++d) {
    __m512i x[kRegs];
#pragma GCC unroll 4
    for (int j = 0; j < kRegs; ++j) x[j] = _mm512_loadu_si512(q + (d * kRegs + j) * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const __m512i key = _mm512_set1_epi32(static_cast<int>(k[i * pairs + d]));
#pragma GCC unroll 4
      for (int j = 0; j < kRegs; ++j) acc[i][j] = dot(acc[i][j], x[j], key);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i) {
    __m512 sum = first ? _mm512_setzero_ps() : _mm512_loadu_ps(lanes + i * 16);
#pragma GCC unroll 4
    for (int j = 0; j < kRegs; ++j) {
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(weights + 16 * j),
                            _mm512_max_ps(_mm512_setzero_ps(), acc[i][j]), sum);
    }
    _mm512_storeu_ps(lanes + i * 16, sum);
  }
}

template <int kKeys, int kRegs>
void score_group(const uint32_t* q, const float* weights, const uint32_t* k, int count, int pairs,
                 bool first, float* lanes, const KeyRows* next) {
  for (int j = 0; j < count; j += kKeys) {
    if (first) prefetch_keys(next, j, kKeys);
    score_tile<kKeys, kRegs>(q, weights, k + j * pairs, pairs, first, lanes + j * 16);
  }
}

void score(const void* packed_q, const float* weights, const void* k, int count, int heads, int dim,
           float* lanes, float* sums, const KeyRows* next) {
  const auto* q = static_cast<const uint32_t*>(packed_q);
  const auto* keys = static_cast<const uint32_t*>(k);
  const int pairs = dim / 2;
  for (int h = 0; h < heads; h += kGroup) {
    const int group = group_lanes(heads - h);
    const bool first = h == 0;
    switch (group / 16) {
      case 1:
        score_group<8, 1>(q, weights + h, keys, count, pairs, first, lanes, next);
        break;
      case 2:
        score_group<8, 2>(q, weights + h, keys, count, pairs, first, lanes, next);
        break;
      case 3:
        score_group<4, 3>(q, weights + h, keys, count, pairs, first, lanes, next);
        break;
      default:
        score_group<4, 4>(q, weights + h, keys, count, pairs, first, lanes, next);
    }
    q += pairs * group;
  }
  tree_sums<Lanes16>(lanes, count, sums);
}

constexpr IndexKernel kBf16{
    .elem_bytes = 2, .pack_q = pack_q, .load_keys = load_keys, .score = score};

}  // namespace

const IndexKernels& index_avx512bf16_kernels() {
  static const IndexKernels kernels{&kBf16, index_avx512_kernels().wide};
  return kernels;
}

}  // namespace dsv4::cpu
