// Attention on AVX-512 with VDPBF16PS for bf16 values; all else is attend_avx512.cc. See attend.h.
//
// Layout    k [8][dim] bf16; v [dim/64][32 row pairs][64] dwords (even row low), inside 32 dims in
//           the order that VPUNPCK{L,H}WD leaves; q [dim/2][lanes] dwords; p [32][lanes] dwords; o
//           in the dim order of v until `finish`
// Tiling    scores: lanes = heads, 8 rows x 2 registers, the K pair broadcast from memory: 2 loads,
//           8 broadcasts, 16 dots, 16 chains >= latency 6. PV: lanes = dims, 4 heads x 4 registers,
//           the P pair broadcast. No horizontal sums.
#include "backends/cpu/ops/attend_avx512bf16-inl.h"
#include "backends/cpu/ops/fp8_tables.h"
#include "cache/kv_format.h"

namespace dsv4::cpu {
namespace {

using L = Lanes16;

constexpr int kTileRows = 8;

int lanes_of(int heads) {
  return heads <= 16 ? 16 : 32;
}

void pack_q(const void* q, DType, int64_t stride, int heads, int head_dim, void* packed) {
  pack_q_pairs(static_cast<const uint16_t*>(q), stride, heads, lanes_of(heads), head_dim,
               static_cast<uint32_t*>(packed));
}

// 64 dims of a row as bf16; null rows are zero.
inline void load64(RowRef row, KvFormat format, int d, const Fp8Tables& tables, __m512i& lo,
                   __m512i& hi) {
  if (row.values == nullptr) {
    lo = hi = _mm512_setzero_si512();
    return;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(row.values);
  if (format == KvFormat::kBf16) {
    lo = _mm512_loadu_si512(bytes + 2 * d);
    hi = _mm512_loadu_si512(bytes + 2 * d + 64);
  } else if (format == KvFormat::kFp8DsMla && d == Fp8DsMla::kNopeDim) {
    lo = _mm512_loadu_si512(bytes + Fp8DsMla::kRopeOffsetBytes);
    hi = _mm512_loadu_si512(bytes + Fp8DsMla::kRopeOffsetBytes + 64);
  } else {
    const uint8_t scale = format == KvFormat::kFp8DsMla
                              ? static_cast<uint8_t>(row.scales[d / Fp8DsMla::kTileElems])
                              : 127;
    convert64(bytes + d, load_tables(tables.bytes[scale]), lo, hi);
  }
}

// Rows [first, first + 8) of a block -> k rows 0..7 and their places in v. Tiles of 64 dims of v
// are contiguous (8 KiB): rows of dim dwords would share 8 sets of L1.
void load_tile(const BlockRows& block, int first, int head_dim, const Fp8Tables& tables,
               uint16_t* k, uint32_t* v) {
  const int end = first + kTileRows < block.count ? first + kTileRows : block.count;
  for (int r = first; r < end; r += 2, k += 2 * head_dim) {
    const RowRef even = block.rows[r], odd = block.rows[r + 1];
    uint32_t* pairs = v + r / 2 * kTileDims;
    for (int d = 0; d < head_dim; d += kTileDims, pairs += kMaxBlockRows / 2 * kTileDims) {
      __m512i e[2], o[2];
      load64(even, block.format, d, tables, e[0], e[1]);
      load64(odd, block.format, d, tables, o[0], o[1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        _mm512_storeu_si512(k + d + 32 * j, e[j]);
        _mm512_storeu_si512(k + head_dim + d + 32 * j, o[j]);
        _mm512_storeu_si512(pairs + 32 * j, _mm512_unpacklo_epi16(e[j], o[j]));
        _mm512_storeu_si512(pairs + 32 * j + 16, _mm512_unpackhi_epi16(e[j], o[j]));
      }
    }
  }
}

template <int kRows, int kRegs>
inline void score_tile(const uint32_t* q, const uint32_t* k, int pairs, float scale, float* scores,
                       const BlockRows* next, int next_row) {
  constexpr int kLanes = 16 * kRegs;
  const int part = pairs / 8;
  __m512 acc[kRows][kRegs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kRegs; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int first = 0; first < pairs; first += part, ++next_row) {
    prefetch_row(next, next_row);
    for (int d = first; d < first + part; ++d) {
      __m512i x[kRegs];
#pragma GCC unroll 2
      for (int j = 0; j < kRegs; ++j) x[j] = _mm512_loadu_si512(q + d * kLanes + 16 * j);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const __m512i row = _mm512_set1_epi32(static_cast<int>(k[i * pairs + d]));
#pragma GCC unroll 2
        for (int j = 0; j < kRegs; ++j) acc[i][j] = dot(acc[i][j], x[j], row);
      }
    }
  }
  const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kRegs; ++j) {
      _mm512_storeu_ps(scores + i * kLanes + 16 * j, _mm512_mul_ps(acc[i][j], factor));
    }
}

// 4 heads x 64 dims (4 registers).
inline void pv_tile(const uint32_t* p, int lanes, const uint32_t* v, int pairs, int head_dim,
                    const float* alpha, float* o) {
  __m512 acc[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc[i][j] =
          _mm512_mul_ps(_mm512_loadu_ps(o + i * head_dim + 16 * j), _mm512_set1_ps(alpha[i]));
    }
  for (int r = 0; r < pairs; ++r) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = _mm512_loadu_si512(v + r * kTileDims + 16 * j);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int>(p[r * lanes + i]));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = dot(acc[i][j], weight, x[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(o + i * head_dim + 16 * j, acc[i][j]);
}

void attend_block(const BlockRows& block, const BlockRows* next, const AttendShape& shape,
                  const AttendScratch& scratch, AttendGroup* groups, int num_groups) {
  static const Fp8Tables& tables = fp8_tables();
  const int pairs = shape.head_dim / 2;
  auto* k = reinterpret_cast<uint16_t*>(scratch.k);
  auto* v = reinterpret_cast<uint32_t*>(scratch.v);
  // Dequantise and score 8 rows at a time: their K stays in L1.
  for (int r = 0; r < block.count; r += kTileRows) {
    load_tile(block, r, shape.head_dim, tables, k, v);
    for (int g = 0; g < num_groups; ++g) {
      const int lanes = lanes_of(groups[g].heads);
      const auto* q = static_cast<const uint32_t*>(groups[g].q);
      float* scores = scratch.scores + g * kScoresElems + r * lanes;
      const BlockRows* fetch = g == 0 ? next : nullptr;
      if (lanes == 16) {
        score_tile<kTileRows, 1>(q, reinterpret_cast<const uint32_t*>(k), pairs, shape.scale,
                                 scores, fetch, r);
      } else {
        score_tile<kTileRows, 2>(q, reinterpret_cast<const uint32_t*>(k), pairs, shape.scale,
                                 scores, fetch, r);
      }
    }
  }
  auto* p = reinterpret_cast<uint32_t*>(scratch.p);
  for (int g = 0; g < num_groups; ++g) {
    AttendGroup& group = groups[g];
    const int lanes = lanes_of(group.heads);
    softmax_block<L>(scratch.scores + g * kScoresElems, lanes, block, group,
                     [&](int r, int lane, __m512 even, __m512 odd) {
                       const __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
                       const __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
                       _mm512_storeu_si512(p + r / 2 * lanes + lane,
                                           _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
                     });
    for (int d = 0; d < shape.head_dim; d += kTileDims) {
      const uint32_t* tile = v + d * (kMaxBlockRows / 2);
      for (int h = 0; h < group.heads; h += 4) {
        pv_tile(p + h, lanes, tile, block.count / 2, shape.head_dim, group.alpha + h,
                group.o + h * shape.head_dim + d);
      }
    }
  }
}

void finish(const float* o, const float* factor, int heads, int head_dim, DType dtype, void* out,
            int64_t stride) {
  // Dims of the two registers that VPUNPCK made of 32: lane 4q + r of the first is 8q + r, of the
  // second 8q + 4 + r.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int h = 0; h < heads; ++h) {
    const __m512 x = _mm512_set1_ps(factor[h]);
    for (int d = 0; d < head_dim; d += 32) {
      const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(o + h * head_dim + d), x);
      const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(o + h * head_dim + d + 16), x);
      const __m512 lo = _mm512_permutex2var_ps(a, first, b);
      const __m512 hi = _mm512_permutex2var_ps(a, second, b);
      if (dtype == DType::kBf16) {
        _mm512_storeu_si512(static_cast<uint16_t*>(out) + h * stride + d,
                            (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
      } else {
        _mm512_storeu_ps(static_cast<float*>(out) + h * stride + d, lo);
        _mm512_storeu_ps(static_cast<float*>(out) + h * stride + d + 16, hi);
      }
    }
  }
}

constexpr AttendKernel kBf16{.elem_bytes = 2,
                             .group_heads = 32,
                             .pack_q = pack_q,
                             .attend_block = attend_block,
                             .merge = merge_lanes<L>,
                             .finish = finish};

}  // namespace

const AttendKernels& attend_avx512bf16_kernels() {
  static const AttendKernels kernels{&kBf16, attend_avx512_kernels().wide};
  return kernels;
}

}  // namespace dsv4::cpu
