// Maps of matrices for the copy engine of sm_90.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace dsv4::nvidia {

/// A matrix of bytes, `row_bytes` of each of `rows` rows that lie `row_stride` bytes apart, read in
/// boxes of 128 bytes x `box_rows`; zeros outside. `swizzle`: 16-byte unit u of the box's row r
/// arrives at u ^ (r & 7), where r counts from a multiple of 1024 bytes. `data` and `row_stride`
/// are multiples of 16. A host call without synchronisation.
CUtensorMap byte_map(const void* data, int64_t row_stride, int64_t rows, int64_t row_bytes,
                     int box_rows, bool swizzle);

/// Matrices of bytes that lie `matrix_stride` bytes apart, swizzled, in boxes of `box_matrices` of
/// them.
CUtensorMap byte_map_3d(const void* data, int64_t row_stride, int64_t matrix_stride,
                        int64_t matrices, int64_t rows, int64_t row_bytes, int box_rows,
                        int box_matrices = 1);

}  // namespace dsv4::nvidia
