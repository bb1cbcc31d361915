// Row kernels for AVX2: two registers of 8 floats.
#define DSV4_ROWWISE_ISA rowwise_avx2
#define DSV4_ROWWISE_VECTOR_BYTES 32
#include "backends/cpu/ops/rowwise-inl.h"

namespace dsv4::cpu {
const RowKernels kRowKernelsAvx2 = rowwise_avx2::kTable;
}  // namespace dsv4::cpu
