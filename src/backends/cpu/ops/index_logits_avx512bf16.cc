// Indexer scores on AVX-512 with VDPBF16PS for FP8 keys; all else is index_logits_avx512vnni.cc.
// See index_logits.h.
//
// Layout    q in head groups of up to 64: [dim/2][16 kRegs] dwords; k [64][dim] bf16
// Tiling    lanes = heads, the key pair broadcast from memory. 64 heads: 4 keys x 4 registers, per
//           pair 4 loads, 4 broadcasts, 16 dots. Sums over lanes of 16 keys at once.
#include "backends/cpu/ops/attend_avx512bf16-inl.h"
#include "backends/cpu/ops/fp8_tables.h"
#include "backends/cpu/ops/index_bounds.h"
#include "backends/cpu/ops/index_logits_wide-inl.h"

namespace dsv4::cpu {
namespace {

int group_lanes(int heads) {
  return std::min((heads + kIndexLanes - 1) / kIndexLanes * kIndexLanes, kGroupOfHeads);
}

void pack_q(const void* q, DType, int64_t stride, int heads, int dim, void* packed) {
  auto* out = static_cast<uint32_t*>(packed);
  for (int first = 0; first < heads; first += kGroupOfHeads) {
    const int lanes = group_lanes(heads - first);
    pack_q_pairs(static_cast<const uint16_t*>(q) + first * stride, stride, heads - first, lanes,
                 dim, out);
    out += dim / 2 * lanes;
  }
}

void load_keys(const KeyRows& keys, KvFormat, int dim, void* k) {
  static const Fp8Tables& tables = fp8_tables();
  auto* out = static_cast<uint16_t*>(k);
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

void score(const void* packed_q, const float* weights, const void* k, int count, int heads, int dim,
           float* lanes, float* sums, const KeyRows* next) {
  const auto* q = static_cast<const uint32_t*>(packed_q);
  const auto* keys = static_cast<const uint32_t*>(k);
  const int pairs = dim / 2;
  over_groups(heads, count, next, [&]<int kKeys, int kRegs>(int h, int j) {
    score_tile<kKeys, kRegs>(q + h * pairs, weights + h, keys + j * pairs, pairs, h == 0,
                             lanes + j * kIndexLanes);
  });
  tree_sums<Lanes16>(lanes, count, sums);
}

constexpr IndexKernel kBf16{
    .elem_bytes = 2, .pack_q = pack_q, .load_keys = load_keys, .score = score};

}  // namespace

const IndexKernels& index_avx512bf16_kernels() {
  static const IndexKernels kernels{&kBf16, index_avx512vnni_kernels().wide,
                                    index_avx512vnni_kernels().mxfp4, &index_bound_avx512vbmi()};
  return kernels;
}

}  // namespace dsv4::cpu
