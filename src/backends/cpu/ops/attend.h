// Attention over paged rows: what the driver (attend.cc) hands to the candidate kernels.
//
// Problem   out[t,h,:] = sum_r p_r k_r / (sum_r p_r + 2^(sink - m)), p_r = 2^(z_r - m),
//           z_r = (scale log2 e) (q[t,h,:] . k_r), m = max z_r; rows of t = window rows, then
//           compressed rows
// Order     canonical, equal in all candidates and for all row formats (bits are compared):
//             z    head dims in pairs (2i, 2i+1) ascending, acc = q_e k_e + (q_o k_o + acc), two
//                  fmas; then times the scale, one rounding
//             block of 64 rows: m' = max over unmasked rows ascending; alpha = 2^(m - m');
//                  l = l alpha, then += p_r ascending (p not rounded);
//                  O = O alpha, then row pairs (2i, 2i+1) ascending, O = p_e v_e + (p_o v_o + O);
//                  a pair without unmasked rows is skipped, a masked row in a pair is zero
//             chain of blocks from m = -inf, l = 0, O = 0; chains merged ascending, empty ones
//                  skipped; at the end O * (1 / (l + sink))
//           each step one rounding, subnormals are zero (attend_arith.h)
// Tiling    item = (token, range of heads[, chain]); block of 64 rows dequantised once per item and
//           used by its groups of up to 32 heads
// Budget    a block and 32 heads: 2 x 2 x 64 x 32 x 512 FLOP = 4.2 MFLOP = 17.8 us of one core's
//           VDPBF16PS (236 GFLOP/s); 64 x 584 B read = 37 kB
#pragma once
#include <cstddef>
#include <cstdint>

#include "dsv4/cache.h"
#include "dsv4/dtype.h"
#include "ops/ops.h"

namespace dsv4::cpu {

constexpr int kMaxBlockRows = 64;
constexpr int kGroupHeads = 32;   // most heads of one pass over a block: two zmm of lanes
constexpr int kRowPadElems = 16;  // between the rows of k in scratch, where a kernel wants it
constexpr int kScoresElems = kMaxBlockRows * kGroupHeads;  // of one group
constexpr int kMaxItemGroups = 4;                          // groups that share a dequantised block
/// The vector kernels work on tiles of 64 dims.
constexpr int kTileDims = 64;
constexpr int kMaxVectorHeadDim = 512;

struct RowRef {
  const std::byte* values;  // null: masked
  const std::byte* scales;
};

/// One block of the reduction: the row pairs that have an unmasked row, closed up. `count` is even;
/// bit r of `active` is set where rows[r] is unmasked.
struct BlockRows {
  RowRef rows[kMaxBlockRows];
  uint64_t active = 0;
  int count = 0;
  int row_bytes = 0;  // of the value area, for prefetching
  KvFormat format = KvFormat::kF32;
};

/// State of up to 32 heads within an item.
struct AttendGroup {
  alignas(64) float max[kGroupHeads];
  alignas(64) float sum[kGroupHeads];
  alignas(64) float alpha[kGroupHeads];
  alignas(64) float total_max[kGroupHeads];
  alignas(64) float total_sum[kGroupHeads];
  void* q;         // packed by the kernel
  float* o;        // [32, head_dim] of the current chain, dims in the kernel's own order
  float* total_o;  // the same of the chains before it
  int heads;       // real heads; lanes up to the next multiple of 16 are padding
  bool has_total;
};

/// Scratch of one thread. k holds a block of rows, v the same rows as the kernel wants them for PV.
struct AttendScratch {
  std::byte* k;
  std::byte* v;
  float* scores;  // [kMaxItemGroups][64][lanes of the group]
  float* p;       // [64][lanes], or pairs of bf16 [32][lanes]
};

struct AttendShape {
  int head_dim;
  float scale;  // log2_scale(softmax_scale)
  bool round_p;
};

/// A vector implementation. Dims are a multiple of 64 and at most 512.
struct AttendKernel {
  int elem_bytes;   // of packed q, k and v
  int group_heads;  // heads of one pass, at most kGroupHeads
  /// q [heads, head_dim] of `dtype`, rows `stride` elements apart -> `packed`.
  void (*pack_q)(const void* q, DType dtype, int64_t stride, int heads, int head_dim, void* packed);
  /// Dequantises a block; scores, online softmax and accumulation for each group. Meanwhile fetches
  /// the rows of `next` (or null) towards the caches.
  void (*attend_block)(const BlockRows& block, const BlockRows* next, const AttendShape& shape,
                       const AttendScratch& scratch, AttendGroup* groups, int num_groups);
  /// total[h, :] = chain[h, :] * by_chain[h] + total[h, :] * by_total[h]
  void (*merge)(float* total, const float* chain, const float* by_total, const float* by_chain,
                int heads, int head_dim);
  /// out[h, :] = o[h, :] * factor[h], rounded to `dtype`, dims back in order.
  void (*finish)(const float* o, const float* factor, int heads, int head_dim, DType dtype,
                 void* out, int64_t stride);
};

/// bf16: q is bf16, rows are exact in bf16 and P is rounded to bf16. wide: everything, in f32.
struct AttendKernels {
  const AttendKernel* bf16;  // may be null: then `wide` does it
  const AttendKernel* wide;
};

const AttendKernels& attend_avx512bf16_kernels();
const AttendKernels& attend_avx512_kernels();
const AttendKernels& attend_avx2_kernels();

// ---- shared by the driver and the reference candidate

/// The blocks of one token in canonical order.
class TokenBlocks {
 public:
  TokenBlocks(const AttendParams& params, int64_t token);
  /// Chains of this token, at least 1; chain 0 holds the window.
  int64_t num_chains() const { return num_chains_; }
  /// Restricts to chains [begin, end) and starts over.
  void select_chains(int64_t begin, int64_t end);
  /// The next block that is not wholly masked; false after the last. `chain` is its chain.
  bool next(BlockRows& block, int64_t& chain);

 private:
  void fill_range(const RangeRows& rows, int64_t first, BlockRows& block) const;
  void fill_list(const CacheView& cache, std::span<const int32_t> slots, int64_t first,
                 BlockRows& block) const;

  const AttendParams& params_;
  int64_t token_;
  int64_t seq_ = 0;
  int64_t rows_per_block_;
  int64_t window_place_ = 0, window_end_ = 0;          // next block's first place, and end
  int64_t compressed_block_ = 0, compressed_end_ = 0;  // likewise
  int64_t first_compressed_ = 0, last_compressed_ = 0, num_chains_ = 1;
};

/// The scalar candidate: any head count, any even head_dim, every row format.
void attend_reference(const AttendParams& params, const OpContext& context);
/// attend with the given kernels; falls back to the scalar one for head dims outside their reach.
void attend_with(const AttendKernels& kernels, const AttendParams& params,
                 const OpContext& context);

}  // namespace dsv4::cpu
