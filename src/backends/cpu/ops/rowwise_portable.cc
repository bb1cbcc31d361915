// Row kernels for Any CPU: four 16-byte registers (SSE2, NEON).
#define DSV4_ROWWISE_ISA rowwise_portable
#define DSV4_ROWWISE_VECTOR_BYTES 16
#include "backends/cpu/ops/rowwise-inl.h"

namespace dsv4::cpu {
const RowKernels kRowKernelsPortable = rowwise_portable::kTable;
}  // namespace dsv4::cpu
