// Row kernels for AVX-512 F, BW, DQ, VL: one register of 16 floats.
#define DSV4_ROWWISE_ISA rowwise_avx512
#define DSV4_ROWWISE_VECTOR_BYTES 64
#include "backends/cpu/ops/rowwise-inl.h"

namespace dsv4::cpu {
const RowKernels kRowKernelsAvx512 = rowwise_avx512::kTable;
}  // namespace dsv4::cpu
