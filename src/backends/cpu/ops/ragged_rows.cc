// The rows of every token as one flat list of slots with row pointers.
#include <algorithm>

#include "backends/cpu/candidates.h"
#include "backends/cpu/parallel.h"

namespace dsv4::cpu {
namespace {

int32_t length_of(const RangeRows& rows, int64_t token) {
  return rows.begin == nullptr ? 0 : std::max(0, rows.end[token] - rows.begin[token]);
}
int32_t length_of(const ListedRows& rows, int64_t token) {
  return rows.length == nullptr ? 0 : std::max(0, rows.length[token]);
}

void fill(const RangeRows& rows, int64_t token, int64_t seq, int32_t length, int32_t* to) {
  const BlockTable& blocks = rows.blocks;
  const int32_t* table = blocks.table + seq * blocks.stride;
  for (int32_t i = 0; i < length; ++i) {
    const int32_t row = rows.begin[token] + i, logical = row / blocks.tokens_per_block;
    const int32_t block = table[logical % blocks.columns];
    to[i] = block < 0 ? -1
                      : block * blocks.tokens_per_block + (row - logical * blocks.tokens_per_block);
  }
}
void fill(const ListedRows& rows, int64_t token, int64_t, int32_t length, int32_t* to) {
  std::copy_n(rows.slots + token * rows.stride, length, to);
}

}  // namespace

void ragged_rows(const RaggedRowsParams& params, const OpContext& context) {
  std::visit(
      [&](const auto& rows) {
        params.indptr[0] = 0;
        for (int64_t t = 0; t < params.num_tokens; ++t)
          params.indptr[t + 1] = params.indptr[t] + length_of(rows, t);
        parallel_chunks(context.stream, params.num_tokens, 8, [&](int64_t begin, int64_t end, int) {
          for (int64_t t = begin; t < end; ++t) {
            const int64_t seq = params.token_to_seq == nullptr ? 0 : params.token_to_seq[t];
            fill(rows, t, seq, length_of(rows, t), params.slots + params.indptr[t]);
          }
        });
      },
      params.rows);
}

}  // namespace dsv4::cpu
