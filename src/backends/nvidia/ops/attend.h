// Attention over paged rows: what every attend kernel is launched with.
//
// Problem   out[t,h,:] = sum_r p_r k_r / (sum_r p_r + 2^(sink_h log2 e - m)), p_r = 2^(z_r - m),
//           z_r = (scale log2 e) (q[t,h,:] . k_r), m = max z_r; rows of t = window rows, then
//           compressed rows
// Order     ReductionGrid (ops/ops.h): blocks of rows_per_block rows, chains of blocks_per_chain
//           compressed blocks, chain 0 starts with the window blocks; attend_rows.cuh walks them.
//           A chain is one sum in one order, whatever CTAs add it up; chains that saw no row are
//           left out, the others are merged in ascending order by merge_chains
//           (attend_rows.cuh), in whatever kernel that happens.
//           sm90 has two parts in a chain of up to 64 heads (attend_sm90.h)
// Grids     come from host numbers only (tokens, heads, max_entries), so that a captured graph
//           stays right when lengths change
#pragma once
#include <cstddef>
#include <cstdint>

#include "dsv4/cache.h"
#include "ops/ops.h"

namespace dsv4::nvidia {

/// Rows of one paged cache that tokens read: a range of the sequence's own rows through a block
/// table, or a list of slots per token.
struct RowSource {
  enum Kind : int32_t { kNone, kRange, kList };
  Kind kind = kNone;
  KvFormat format = KvFormat::kFp8DsMla;
  const std::byte* base = nullptr;
  int64_t block_stride_bytes = 0;
  int32_t rows_per_block = 1;  ///< any number; rows of a page and of a block table's block
  int32_t value_bytes = 0;     ///< of a row in the value area of its page
  int32_t scale_bytes = 0;     ///< of a row in the scale area behind it; 0: none
  // kRange: row r of sequence s lies in block table[s * table_stride + r / rows_per_block %
  // columns]
  const int32_t* table = nullptr;
  int64_t table_stride = 0;
  int32_t columns = 1;
  const int32_t* begin = nullptr;  ///< [T]
  const int32_t* end = nullptr;    ///< [T]; kList: the length, where begin counts as 0
  // kList: slot of place i is slots[t * slots_stride + i], negative: no row
  const int32_t* slots = nullptr;
  int64_t slots_stride = 0;
};

/// Passed to kernels by value (__grid_constant__).
struct AttendArgs {
  const uint16_t* q = nullptr;                    ///< bf16 [T, heads, head_dim]
  int64_t q_token_stride = 0, q_head_stride = 0;  ///< elements
  uint16_t* out = nullptr;                        ///< bf16 [T, heads, head_dim]
  int64_t out_token_stride = 0, out_head_stride = 0;
  float* lse = nullptr;         ///< [T, heads], or null
  float* max_logits = nullptr;  ///< [T, heads], or null
  const float* sink = nullptr;  ///< [heads], or null
  float scale_log2 = 0;         ///< softmax_scale * log2 e
  int32_t num_tokens = 0, num_heads = 0, head_dim = 0;
  bool round_p = true;
  const int32_t* token_to_seq = nullptr;
  RowSource window, compressed;
  int32_t rows_per_block = 64, blocks_per_chain = 32;
  int32_t max_blocks = 0;  ///< compressed blocks of a token, at most
  int32_t max_chains = 1;  ///< host bound of the chains of a token
};

/// @throws Error kUnsupported naming what kernels here do not take: f32 activations or caches.
AttendArgs attend_args(const AttendParams& params);

/// True when rows, q and out can be read and written 16 bytes at a time: bases and strides.
bool is_aligned_16(const AttendArgs& args);

/// The family's plain kernel: any head_dim that is a multiple of 64, any alignment, blocks of up to
/// 64 rows.
void attend_reference(const AttendParams& params, const OpContext& context);
/// mma.sync and cp.async, sm_80 and later; what it does not take goes to attend_reference.
void attend_sm80(const AttendParams& params, const OpContext& context);

}  // namespace dsv4::nvidia
