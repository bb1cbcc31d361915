// Indexer scores on NVIDIA: what the candidates share on the host side. Kernels: index_logits.cu,
// index_logits_sm80.cu, index_logits_sm90a.cu.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ops/ops.h"

namespace dsv4::nvidia {

struct IndexLogitsArgs {
  const uint16_t* q;  ///< bf16; null where queries are codes
  int64_t q_token_stride, q_head_stride;
  const float* weights;
  int64_t weights_stride;
  const int32_t* token_to_seq;
  const int32_t* end;
  int32_t num_tokens, num_heads;
  int32_t max_end;
  const int32_t* table;
  int64_t table_stride;
  int32_t table_columns;
  const std::byte* cache;
  int64_t block_stride_bytes;
  int32_t rows_per_block;
  int32_t rows_shift;  ///< log2 of rows_per_block, or -1
  float* logits;
  int64_t logits_stride;
  /// A group of tokens is in shared memory at once; `splits` CTAs share the keys of a group.
  int32_t group_tokens, splits;
  uint32_t per_cta = 0;  ///< sm90: 2^32 / CTAs, and 1 more (at most 2^32 - 1)
  uint32_t nothing = 0;  ///< sm90: stays 0, which the compiler does not know
};

/// Limits of the kernels, checked.
IndexLogitsArgs index_logits_args(const IndexLogitsParams& params);
/// Do pages and queries allow loads of 16 bytes?
bool index_rows_aligned(const IndexLogitsParams& params);

/// Parameters whose queries are bf16: E4M3 codes are written out into scratch memory, given back
/// with this.
class Bf16Queries {
 public:
  Bf16Queries(const IndexLogitsParams& params, const OpContext& context);
  const IndexLogitsParams& params() const { return params_; }

 private:
  Arena::Scope scope_;
  IndexLogitsParams params_;
};

void index_logits_sm90(const IndexLogitsParams& params, const OpContext& context);
void index_logits_sm80(const IndexLogitsParams& params, const OpContext& context);
void index_logits_reference(const IndexLogitsParams& params, const OpContext& context);

}  // namespace dsv4::nvidia
