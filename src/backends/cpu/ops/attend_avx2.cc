// Attention on AVX2 with FMA and F16C: f32 operands throughout, bits as AVX-512 gives them. See
// attend.h.
#include "backends/cpu/ops/attend_wide-inl.h"

namespace dsv4::cpu {
namespace {

// 4 rows x 2 registers and 4 heads x 2 registers: 8 chains = latency 4 x 2 ports, 11 of 16
// registers.
using Wide = WideKernel<Lanes8, 16, 4, kMaxVectorHeadDim, 4, 2>;
constexpr AttendKernel kWide{.elem_bytes = 4,
                             .group_heads = Wide::kMaxLanes,
                             .pack_q = Wide::pack_q,
                             .attend_block = Wide::attend_block,
                             .merge = merge_lanes<Lanes8>,
                             .finish = Wide::finish};

}  // namespace

const AttendKernels& attend_avx2_kernels() {
  static const AttendKernels kernels{nullptr, &kWide};
  return kernels;
}

}  // namespace dsv4::cpu
