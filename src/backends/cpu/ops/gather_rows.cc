#include <cstring>

#include "backends/cpu/candidates.h"
#include "backends/cpu/ops/rowwise.h"

namespace dsv4::cpu {

void gather_rows(const GatherRowsParams& params, const OpContext& context) {
  const auto row_bytes = static_cast<size_t>(params.x.shape[1] * size_of(params.x.dtype));
  parallel_chunks(context.stream, params.out.shape[0], 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(row_at(params.out, i), row_at(params.x, params.rows[i]), row_bytes);
  });
}

}  // namespace dsv4::cpu
