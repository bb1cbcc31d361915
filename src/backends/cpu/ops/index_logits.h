// Indexer scores: what the driver (index_logits.cc) hands to the candidate kernels.
//
// Problem   logits[t,j] = k_scale_j sum_h w[t,h] max(0, q[t,h] . k_j), j < end[t]; 64 heads x 128
//           dims, one key per 4 tokens: 262144 keys and 4.3 GFLOP a token at 1M context
// Order     canonical, equal in all candidates (bits are compared):
//             s_h  dims in pairs (2i, 2i+1) ascending, s = q_e k_e + (q_o k_o + s)
//             t_l  l = 0..15: heads l, 16 + l, 32 + l, ... ascending, t_l = w_h max(0, s_h) + t_l;
//                  heads are padded with zeros to a multiple of 16
//             sum  tree over lanes (l, l+8), (l, l+4), (l, l+2), (l, l+1); times k_scale (FP8 only)
//           each step one rounding, subnormals are zero (attend_arith.h); a NaN stays NaN
// Tiling    item = (up to 8 tokens of one sequence, up to 4096 keys; 512 at the end of a
//           call's only run of tokens); blocks of 64 keys are converted once per item and used by
//           its tokens, whose queries a thread packs once
// Budget    per key and token 64 x 128 x 2 FLOP = 256 VDPBF16PS; conversion of a key 10-20 cycles:
//           4-8% of a decode step, 1% with 8 tokens; 132 B per key: 4 GB/s at full speed
#pragma once
#include <cstdint>

#include "backends/cpu/ops/attend.h"
#include "ops/ops.h"

namespace dsv4::cpu {

constexpr int kKeyBlock = 64;
constexpr int kIndexLanes = 16;
/// The vector kernels take index dims that are a multiple of this, and any head count.
constexpr int kIndexTileDims = 128;
constexpr int kMaxIndexElemBytes = 6;

/// Up to 64 consecutive keys of a sequence.
struct KeyRows {
  RowRef rows[kKeyBlock];
  int count = 0;
  int value_bytes = 0;  // of a row, for prefetching
};

struct IndexKernel {
  int elem_bytes;  // of packed q and k, at most kMaxIndexElemBytes
  /// q [heads, dim] of `dtype`, rows `stride` elements apart -> `packed`, heads padded to 16.
  void (*pack_q)(const void* q, DType dtype, int64_t stride, int heads, int dim, void* packed);
  /// Dequantises keys without k_scale.
  void (*load_keys)(const KeyRows& keys, KvFormat format, int dim, void* k);
  /// sums[j] of `count` loaded keys; sums has room for kKeyBlock. weights: heads padded to 16 with
  /// zeros. k: as load_keys left it. lanes: scratch [kKeyBlock][16]. Meanwhile fetches `next` (or
  /// null) towards the caches.
  void (*score)(const void* packed_q, const float* weights, const void* k, int count, int heads,
                int dim, float* lanes, float* sums, const KeyRows* next);
};

/// The kernel whose functions are class K's.
template <class K>
inline constexpr IndexKernel kIndexKernel{
    .elem_bytes = K::kElemBytes, .pack_q = K::pack_q, .load_keys = K::load_keys, .score = K::score};

struct IndexBoundKernel;

/// bf16: q is bf16, keys are kIndexFp8. mxfp4: q is bf16, keys are kIndexMxfp4 of kIndexTileDims
/// dims. wide: everything, in f32. bound: bounds of scores that are wanted in bf16
/// (index_bounds.h).
struct IndexKernels {
  const IndexKernel* bf16;  // may be null: then `wide` does it
  const IndexKernel* wide;
  const IndexKernel* mxfp4;
  const IndexBoundKernel* bound = nullptr;  // may be null: then every score is computed
};
const IndexKernels& index_avx512bf16_kernels();
const IndexKernels& index_avx512vnni_kernels();
const IndexKernels& index_avx512_kernels();
const IndexKernels& index_avx2_kernels();

/// The scalar candidate: any head count, any even dim.
void index_logits_reference(const IndexLogitsParams& params, const OpContext& context);
void index_logits_with(const IndexKernels& kernels, const IndexLogitsParams& params,
                       const OpContext& context);

/// The kernel for these queries and keys, whose dims are a multiple of kIndexTileDims.
const IndexKernel& index_kernel(const IndexKernels& kernels, const IndexLogitsParams& params);
/// Every score, of whichever matter.
void all_index_logits(const IndexKernels& kernels, const IndexLogitsParams& params,
                      const OpContext& context);

/// Up to a block of keys of sequence `seq` from `first` on, before `end`.
void resolve_keys(const IndexLogitsParams& params, int64_t seq, int64_t first, int64_t end,
                  KeyRows& keys);
/// logits[j] = sums[j] times the scale of FP8 key j; may be the same memory.
void scale_sums(const KeyRows& keys, int count, const float* sums, float* logits);
/// Row of entry `entry` of sequence `seq`.
RowRef index_row(const IndexLogitsParams& params, int64_t seq, int64_t entry);

}  // namespace dsv4::cpu
