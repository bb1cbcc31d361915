// Attention with f32 operands: `exact`, and every case without bf16 dot products. On bf16 values it
// gives the bits of VDPBF16PS, which is two fmas, odd element first. See attend.h.
//
// Layout    k [64][dim + 16] f32 (V is the same array; the padding spreads a column of rows over
//           the sets of L1), q [dim][lanes], p [64][lanes], o [32][dim]
// Tiling    scores: lanes = heads, kScoreRows rows x kRegs vectors; PV: lanes = dims, kPvHeads
//           heads x kPvRegs vectors. Chains of fma: >= latency 4 x 2 ports where registers allow.
//           Scores take kScoreDims dims of q through all rows before the next ones, and wait in
//           `scores` meanwhile: that part of q stays in L1.
#pragma once
#include <algorithm>

#include "backends/cpu/ops/attend_lanes-inl.h"
#include "cache/kv_format.h"

namespace dsv4::cpu {
namespace {

template <class L, int kMaxLanes_, int kScoreRows_, int kScoreDims_, int kPvHeads_, int kPvRegs_>
struct WideKernel {
  static constexpr int kMaxLanes = kMaxLanes_;  // heads of a group
  static constexpr int kScoreRows = kScoreRows_;
  static constexpr int kScoreDims = kScoreDims_;
  static constexpr int kPvHeads = kPvHeads_;
  static constexpr int kPvRegs = kPvRegs_;
  using F = typename L::F;

  static int row_stride(int head_dim) { return head_dim + kRowPadElems; }
  /// Lanes that a group of `heads` heads occupies.
  static int group_lanes(int heads) { return heads <= 16 ? 16 : kMaxLanes; }

  static void pack_q(const void* q, DType dtype, int64_t stride, int heads, int head_dim,
                     void* packed) {
    pack_heads<L>(q, dtype, stride, heads, group_lanes(heads), head_dim,
                  static_cast<float*>(packed));
  }

  static void load_row(RowRef row, KvFormat format, int head_dim, float* out) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(row.values);
    if (row.values == nullptr) {
      for (int d = 0; d < head_dim; d += L::kLanes) L::store(out + d, L::zero());
      return;
    }
    switch (format) {
      case KvFormat::kFp8DsMla:
        for (int tile = 0; tile < Fp8DsMla::kTiles; ++tile) {
          const int first = tile * Fp8DsMla::kTileElems;
          e4m3_to_f32_lanes<L>(bytes + first, static_cast<uint8_t>(row.scales[tile]),
                               Fp8DsMla::kTileElems, out + first);
        }
        load_bf16(bytes + Fp8DsMla::kRopeOffsetBytes, Fp8DsMla::kRopeDim, out + Fp8DsMla::kNopeDim);
        break;
      case KvFormat::kBf16:
        load_bf16(bytes, head_dim, out);
        break;
      case KvFormat::kFp8:
        e4m3_to_f32_lanes<L>(bytes, 127, head_dim, out);
        break;
      default:
        for (int d = 0; d < head_dim; d += L::kLanes) {
          L::store(out + d, L::load(reinterpret_cast<const float*>(bytes) + d));
        }
    }
  }
  static void load_bf16(const uint8_t* bytes, int count, float* out) {
    const auto* values = reinterpret_cast<const uint16_t*>(bytes);
    for (int d = 0; d < count; d += L::kLanes) L::store(out + d, L::load_bf16(values + d));
  }

  static void load_block(const BlockRows& block, int head_dim, const AttendScratch& scratch) {
    float* k = reinterpret_cast<float*>(scratch.k);
    for (int r = 0; r < block.count; ++r) {
      load_row(block.rows[r], block.format, head_dim, k + r * row_stride(head_dim));
    }
  }

  // Dims [begin, end) of z[row][lane] of kScoreRows rows; rows past the block give values that
  // nobody reads.
  template <int kRegs>
  static void score_tile(const float* q, const float* k, int begin, int end, int head_dim,
                         float scale, float* scores) {
    constexpr int kLanesAll = kRegs * L::kLanes;
    F acc[kScoreRows][kRegs];
#pragma GCC unroll 8
    for (int i = 0; i < kScoreRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kRegs; ++j) {
        acc[i][j] = begin == 0 ? L::zero() : L::load(scores + i * kLanesAll + j * L::kLanes);
      }
    for (int pair = begin; pair < end; pair += 2) {
#pragma GCC unroll 2
      for (int odd = 1; odd >= 0; --odd) {
        const int d = pair + odd;
        F x[kRegs];
#pragma GCC unroll 4
        for (int j = 0; j < kRegs; ++j) x[j] = L::load(q + d * kLanesAll + j * L::kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kScoreRows; ++i) {
          const F row = L::set(k[i * row_stride(head_dim) + d]);
#pragma GCC unroll 4
          for (int j = 0; j < kRegs; ++j) acc[i][j] = L::fma(row, x[j], acc[i][j]);
        }
      }
    }
    const F factor = L::set(end == head_dim ? scale : 1.0f);
#pragma GCC unroll 8
    for (int i = 0; i < kScoreRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kRegs; ++j) {
        L::store(scores + i * kLanesAll + j * L::kLanes, L::mul(acc[i][j], factor));
      }
  }

  // O[h][d] for kPvHeads heads and kPvRegs vectors of dims.
  static void pv_tile(const float* p, int lanes, const float* v, int count, int head_dim,
                      const float* alpha, float* o) {
    F acc[kPvHeads][kPvRegs];
#pragma GCC unroll 8
    for (int i = 0; i < kPvHeads; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPvRegs; ++j) {
        acc[i][j] = L::mul(L::load(o + i * head_dim + j * L::kLanes), L::set(alpha[i]));
      }
    for (int pair = 0; pair < count; pair += 2) {
#pragma GCC unroll 2
      for (int odd = 1; odd >= 0; --odd) {
        const int r = pair + odd;
        F x[kPvRegs];
#pragma GCC unroll 4
        for (int j = 0; j < kPvRegs; ++j)
          x[j] = L::load(v + r * row_stride(head_dim) + j * L::kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kPvHeads; ++i) {
          const F weight = L::set(p[r * lanes + i]);
#pragma GCC unroll 4
          for (int j = 0; j < kPvRegs; ++j) acc[i][j] = L::fma(weight, x[j], acc[i][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPvHeads; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPvRegs; ++j) L::store(o + i * head_dim + j * L::kLanes, acc[i][j]);
  }

  template <int kLanesAll>
  static void scores_of(const BlockRows& block, const BlockRows* next, const AttendShape& shape,
                        const AttendScratch& scratch, const AttendGroup& group) {
    constexpr int kRegs = kLanesAll / L::kLanes;
    const float* k = reinterpret_cast<const float*>(scratch.k);
    const int dim = shape.head_dim, passes = (dim + kScoreDims - 1) / kScoreDims;
    for (int pass = 0; pass < passes; ++pass) {
      const int begin = pass * kScoreDims, end = std::min(dim, begin + kScoreDims);
      for (int r = 0; r < block.count; r += kScoreRows) {
        if (r / kScoreRows % passes == pass) {
          for (int i = 0; i < kScoreRows; ++i) prefetch_row(next, r + i);
        }
        score_tile<kRegs>(static_cast<const float*>(group.q), k + r * row_stride(dim), begin, end,
                          dim, shape.scale, scratch.scores + r * kLanesAll);
      }
    }
  }

  static void attend_block(const BlockRows& block, const BlockRows* next, const AttendShape& shape,
                           const AttendScratch& scratch, AttendGroup* groups, int num_groups) {
    load_block(block, shape.head_dim, scratch);
    for (int g = 0; g < num_groups; ++g) {
      attend_group(block, g == 0 ? next : nullptr, shape, scratch, groups[g]);
    }
  }

  static void attend_group(const BlockRows& block, const BlockRows* next, const AttendShape& shape,
                           const AttendScratch& scratch, AttendGroup& group) {
    const int lanes = group_lanes(group.heads), dim = shape.head_dim;
    if (lanes == 16) {
      scores_of<16>(block, next, shape, scratch, group);
    } else {
      scores_of<kMaxLanes>(block, next, shape, scratch, group);
    }
    float* p = scratch.p;
    softmax_block<L>(scratch.scores, lanes, block, group, [&](int r, int lane, F even, F odd) {
      if (shape.round_p) {
        even = L::round_bf16(even);
        odd = L::round_bf16(odd);
      }
      L::store(p + r * lanes + lane, even);
      L::store(p + (r + 1) * lanes + lane, odd);
    });
    constexpr int kDims = kPvRegs * L::kLanes;
    const float* v = reinterpret_cast<const float*>(scratch.k);
    for (int d = 0; d < dim; d += kDims) {
      for (int h = 0; h < group.heads; h += kPvHeads) {
        pv_tile(p + h, lanes, v + d, block.count, dim, group.alpha + h, group.o + h * dim + d);
      }
    }
  }

  static void finish(const float* o, const float* factor, int heads, int head_dim, DType dtype,
                     void* out, int64_t stride) {
    for (int h = 0; h < heads; ++h) {
      const F x = L::set(factor[h]);
      for (int d = 0; d < head_dim; d += L::kLanes) {
        const F value = L::mul(L::load(o + h * head_dim + d), x);
        if (dtype == DType::kBf16) {
          L::store_bf16(static_cast<uint16_t*>(out) + h * stride + d, L::round_bf16(value));
        } else {
          L::store(static_cast<float*>(out) + h * stride + d, value);
        }
      }
    }
  }
};

}  // namespace
}  // namespace dsv4::cpu
