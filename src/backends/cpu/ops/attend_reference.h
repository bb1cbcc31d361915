// Rows of every cache format as f32, for the scalar candidates.
#pragma once
#include <algorithm>

#include "backends/cpu/ops/attend.h"
#include "backends/cpu/ops/attend_arith.h"
#include "cache/kv_format.h"

namespace dsv4::cpu {

/// values [row_elems] f32; subnormals are zero as everywhere in attention. A masked row is zero.
inline void decode_row_flushed(RowRef row, KvFormat format, int row_elems, float* values) {
  if (row.values == nullptr) {
    std::fill_n(values, row_elems, 0.0f);
    return;
  }
  // A page of one row whose scales lie where they are: decode_row reads values and scales through
  // the layout of the page, so both parts are brought side by side.
  const RowLayout layout = row_layout(format, row_elems);
  std::byte page[4 * 1024];
  static_assert(Fp8DsMla::kRowBytes <= 4 * 1024);
  const bool fits = layout.row_bytes() <= static_cast<int64_t>(sizeof(page));
  CacheView view{.base = page,
                 .block_stride_bytes = layout.row_bytes(),
                 .num_blocks = 1,
                 .rows_per_block = 1,
                 .format = format,
                 .row_elems = row_elems};
  if (fits) {
    std::copy_n(row.values, layout.value_bytes, page);
    std::copy_n(row.scales, layout.scale_bytes, page + layout.value_bytes);
  } else {
    view.base = const_cast<std::byte*>(row.values);  // a format without scales: one contiguous row
  }
  decode_row(view, 0, values);
  for (int i = 0; i < row_elems; ++i) values[i] = flush(values[i]);
}

}  // namespace dsv4::cpu
