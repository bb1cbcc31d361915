// A matrix of a checkpoint, used as stored.
#pragma once
#include <cstdint>

#include "dsv4/dtype.h"

namespace dsv4 {

/// y = x W^T with W [rows, cols]. A view; the checkpoint mapping or a device buffer must outlive
/// it.
///   kF8E4M3: scale byte of element (r, c) at scale[r / block_rows * scale_stride + c /
///   block_cols], value 2^(byte-127); kF4E2M1: two elements a byte (even one low), scale of (r, c)
///   at scale[r * scale_stride + c / 32]; kBf16, kF32: no scale.
struct Weight {
  DType dtype = DType::kBf16;
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  ///< in elements (of a kF4E2M1 row: values, two a byte)
  const uint8_t* scale = nullptr;
  int64_t scale_stride = 0;  ///< in bytes
  int32_t block_rows = 128;  ///< scale block of kF8E4M3
  int32_t block_cols = 128;
  explicit operator bool() const { return data != nullptr; }

  int64_t num_bytes() const {
    return rows * (dtype == DType::kF4E2M1 ? cols / 2 : cols * size_of(dtype));
  }
  /// Rows [begin, begin + count); `begin` is a multiple of block_rows where there are scales.
  Weight row_slice(int64_t begin, int64_t count) const {
    Weight out = *this;
    const int64_t elems = begin * row_stride;
    out.data = static_cast<const char*>(data) +
               (dtype == DType::kF4E2M1 ? elems / 2 : elems * size_of(dtype));
    if (scale != nullptr)
      out.scale += (dtype == DType::kF4E2M1 ? begin : begin / block_rows) * scale_stride;
    out.rows = count;
    return out;
  }
  /// Columns [begin, begin + count); both multiples of the scale block where there are scales.
  Weight col_slice(int64_t begin, int64_t count) const {
    Weight out = *this;
    out.data = static_cast<const char*>(data) +
               (dtype == DType::kF4E2M1 ? begin / 2 : begin * size_of(dtype));
    if (scale != nullptr) out.scale += begin / (dtype == DType::kF4E2M1 ? 32 : block_cols);
    out.cols = count;
    return out;
  }
};

}  // namespace dsv4
